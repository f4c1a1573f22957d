"""Laws of composed tasks: functions of (seed, index), sound, held-out combinations kept apart."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from etrm_arc import data, sources
from etrm_arc.extras import compose, scenes


def pairs(task):
    return [*task.demos, *task.queries]


def digests(tasks):
    return [data.task_digest(t) for t in tasks]


@pytest.fixture(scope="module")
def made():
    return [compose.make(0, i) for i in range(1000)]


@pytest.fixture(scope="module")
def held_out():
    return [compose.make(0, i, "composed-held-out") for i in range(100)]


@given(st.integers(0, 100), st.integers(1, 4), st.integers(0, 4), st.sampled_from(compose.KINDS))
@settings(max_examples=30)
def test_a_task_is_a_pure_function_of_seed_and_index(seed, n, more, kind):
    tasks = digests(compose.tasks(n + more, kind, seed))
    assert tasks[:n] == digests(compose.tasks(n, kind, seed))
    others = (compose.make(seed + (k == kind), 0, k).task for k in compose.KINDS)
    assert not {*tasks} & {*digests(others)}


def test_every_task_is_a_valid_one_whose_demos_can_show_what_is_asked(made, held_out):
    assert len({*digests(m.task for m in made)}) == len({m.task.name for m in made}) == 1000
    for m in (*made, *held_out, *(compose.make(0, i, "object-rule") for i in range(300))):
        every = pairs(m.task)
        assert digests([sources.check(m.task)]) == digests([m.task])
        assert all(g.dtype == np.uint8 for pair in every for g in pair)
        assert 2 <= len(m.task.demos) <= 5 and len(m.task.queries) == 1
        assert len({(x.shape, x.tobytes()) for x, _ in every}) == len(every)
        assert len({(y.shape, y.tobytes()) for _, y in every}) > 1
        assert 3 * sum(np.array_equal(x, y) for x, y in every) <= len(every)
        for i, (x, y) in enumerate(every):
            others = every[:i] + every[i + 1 :]
            assert set(y.flat) <= set(x.flat).union(*(set(b.flat) for _, b in others))
            if any(compose.RULES[n].colours for n in m.names):
                assert set(x.flat) <= set().union(*(set(a.flat) for a, _ in others))


def test_held_out_combinations_are_never_drawn_for_training(made, held_out):
    trained, asked = ({frozenset(m.names) for m in ms} for ms in (made, held_out))
    assert not trained & asked and all(len(names) > 1 for names in asked)
    assert all(compose.is_held_out(m.names) == (m in held_out) for m in (*made[:200], *held_out))
    two = [(a, b) for a in compose.NAMES for b in compose.AFTER if a != b]
    assert 0.08 < np.mean([compose.is_held_out(names) for names in two]) < 0.12
    (single,) = zip(*(compose.make(0, i, "one-rule").names for i in range(200)), strict=True)
    assert 0.5 < np.mean([name in compose.WHOLE for name in single]) < 0.8


def test_every_rule_and_scene_occurs_and_none_rules(made):
    count = {name: sum(name in m.names for m in made) for name in compose.NAMES}
    assert min(count.values()) > 0 and max(count.values()) < 0.06 * len(made)
    assert {m.scene for m in made} == set(scenes.SCENES)
    assert {compose.make(0, i, "object-rule").names[0] for i in range(900)} == {*compose.OBJECTS}
    assert 0.35 < np.mean([len(m.names) > 1 for m in made]) < 0.5
    assert 0.55 < np.mean([len({x.shape for x, _ in pairs(m.task)}) > 1 for m in made]) < 0.75


def test_the_tasks_that_checkpoints_were_trained_on_stay_the_same():
    assert sources.set_hash(compose.tasks(100)) == "3afc031218f34536"
