"""Laws of the hand-made experts: what features are, and that what one explains is solved."""

import numpy as np
import pytest
from hypothesis import given, settings

from etrm_arc import data, score, solve
from etrm_arc.data import FIRST_COLOUR, Task
from etrm_arc.extras import compose, experts, grids
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import generators


def features(x, canvas=(16, 16)):
    return experts.features(data.tokenise(x, canvas))


@given(generators)
def test_features_are_what_their_names_say(g):
    x = puzzles.grid(g, colours=3)
    (h, w), seen = x.shape, features(x)
    size = np.ones(x.size, int)
    for part in grids.parts(x):
        size[part] += len(part)
    assert np.array_equal(seen["size"][:h, :w], size.reshape(h, w).clip(max=11))
    assert np.array_equal(seen["enclosed"][:h, :w] == 2, grids.enclosed(x))
    for name, (di, dj) in experts.DIRECTIONS.items():
        for i, j in np.ndindex(h, w):
            line = [(i + n * di, j + n * dj) for n in range(1, 9)]
            cells = [int(x[r, c]) for r, c in line if 0 <= r < h and 0 <= c < w]
            assert seen[f"next {name}"][i, j] == (cells[0] + FIRST_COLOUR if cells else 0)
            first = next((c for c in cells if c), None)
            assert seen[f"met {name}"][i, j] == (first + FIRST_COLOUR if first else 0)
    down = np.stack([np.concatenate((c[c == 0], c[c > 0])) for c in x.T], 1)
    left = np.stack([np.concatenate((r[r > 0], r[r == 0])) for r in x])
    for name, y in (("fallen down", down), ("fallen left", left)):
        assert np.array_equal(seen[name][:h, :w], y + FIRST_COLOUR)


PALETTE = np.array([0, 5, 1, 7, 9, 2, 3, 4, 6, 8], np.uint8)
RULES = {
    "mirror": lambda x: x[:, ::-1],
    "enlarge": lambda x: grids.enlarged(x, 2),
    "recolour": lambda x: PALETTE[x],
    "fill": lambda x: np.where(grids.enclosed(x), 4, x).astype(np.uint8),
    "mirror, then frame": lambda x: np.pad(x[1:-1, -2:0:-1], 1, constant_values=8),
    "mirror and recolour": lambda x: PALETTE[x[::-1]],
}


def task_of(rule, seed):
    drawn, ring = np.random.default_rng(seed), np.full((4, 4), 3, np.uint8)
    ring[1:3, 1:3] = 0

    def pair():
        x = drawn.integers(1, 4, (6, 7), dtype=np.uint8) * (drawn.random((6, 7)) < 0.4)
        if rule == "fill":
            (i, j), x = drawn.integers(0, 5, 2), np.zeros((8, 8), np.uint8)
            x[i : i + 4, j : j + 4] = ring
        return x, np.ascontiguousarray(RULES[rule](x))

    return Task(f"{rule}-{seed}", [pair(), pair(), pair()], [pair()])


@pytest.mark.parametrize("rule", RULES)
def test_a_task_that_a_feature_explains_is_solved_in_every_view(rule):
    tasks = [task_of(rule, seed) for seed in range(3)]
    predictions = [p for part in experts.predict(tasks, range(3)) for p in part]
    assert score.score(tasks, score.joined(tasks, predictions))["pass@1"] == 1
    for task, p in zip(tasks, predictions, strict=True):
        assert [(v.view, v.source) for v in p.votes] == [(n, experts.SOURCE) for n in range(3)]
        assert all(np.array_equal(v.grid, task.queries[0][1]) and v.q > 0 for v in p.votes)


@given(generators)
@settings(max_examples=5)
def test_votes_know_neither_outputs_of_queries_nor_other_tasks_and_views(g):
    task, other = puzzles.task(g), puzzles.task(g, "other")
    spoilt = task._replace(queries=[(x, None) for x, _ in task.queries])

    def votes(tasks, views):
        parts = experts.predict(tasks, views)
        return [[score.to_line(p._replace(seconds=0, canvas=None)) for p in part] for part in parts]

    first = [p for part in experts.predict([task], [0]) for p in part]
    rest = solve.answer(solve.solver_of("experts"), [task], range(2), first, 1e18)
    assert {v.view for part in rest for p in part for v in p.votes} == {1}
    both = votes([other, task], [0, 2])
    assert both[len(other.queries) :] == votes([spoilt], [0, 2]) != votes([task], [1, 2])


@given(generators)
def test_a_demo_is_predicted_from_the_other_demos_alone(g):
    drawn, demo = np.random.default_rng(puzzles.integer(g, 0, 10**6)), np.arange(30) % 3
    own, y, other = drawn.integers(0, experts.TOKENS, (3, 30), dtype=np.uint8)
    seen, worth = drawn.integers(0, experts.TOKENS, (30, 2), dtype=np.uint8), drawn.random(10)
    changed = np.where(demo == 0, other, y)
    rules, learn = experts.RULES.values(), experts.learn
    tables = [[learn(r, own, seen, demo, z) for r in rules] for z in (y, changed)]
    p, q = (experts.mixture([c for c, _ in t], worth, own, seen, demo) for t in tables)
    assert np.allclose(p[demo == 0], q[demo == 0])


def test_the_second_round_solves_what_takes_two_steps_and_its_features_cost(monkeypatch):
    def solved(tasks):
        predictions = [p for part in experts.predict(tasks, range(1)) for p in part]
        return score.score(tasks, score.joined(tasks, predictions))["pass@1"]

    tasks = [task_of("mirror, then frame", seed) for seed in range(3)]
    composed = compose.tasks(24, seed=5)
    assert solved(tasks) == 1
    before = solved(composed)
    monkeypatch.setattr(experts, "ROUND_COST", 0.0)
    assert solved(composed) < before
    monkeypatch.setattr(experts, "ROUNDS", 1)
    assert solved(tasks) == 0
