"""Laws of the sources of tasks: loading, bad input, the held-out guard."""

import json

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from etrm_arc import data, sources
from etrm_arc.config import DataConfig, UserError
from etrm_arc.data import Task
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import generators


def equal_pairs(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- loading


def raw_pair(p):
    return {"input": p[0].tolist()} | ({} if p[1] is None else {"output": p[1].tolist()})


def raw_task(t):
    return {"train": [raw_pair(p) for p in t.demos], "test": [raw_pair(p) for p in t.queries]}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def without_outputs(t):
    return t._replace(queries=[(x, None) for x, _ in t.queries])


def as_folder(root, some):
    for t in some:
        write(root / f"{t.name}.json", raw_task(t))
    return root


def as_nested_folder(root, some):
    write(root / "LICENSE", "")
    write(root / "submission.json", "not for us")
    for i, t in enumerate(some):
        write(root / "data" / f"part{i % 2}" / f"{t.name}.json", raw_task(t))
    return root


def as_one_file(root, some):
    return write(root / "all.json", {t.name: raw_task(t) for t in some})


def as_kaggle(root, some, line="_"):
    path = write(
        root / f"arc-agi_evaluation{line}challenges.json",
        {t.name: raw_task(without_outputs(t)) for t in some},
    )
    answers = {t.name: [y.tolist() for _, y in t.queries] for t in some}
    write(root / f"arc-agi_evaluation{line}solutions.json", answers)
    return path


def as_hyphenated_kaggle(root, some):
    return as_kaggle(root, some, "-")


def as_kaggle_folder(root, some):
    return as_kaggle(root, some).parent


def as_jsonl(root, some):
    return write(
        root / "all.jsonl", "\n".join(json.dumps({"id": t.name} | raw_task(t)) + "\n" for t in some)
    )


def as_written_by_re_arc(root, some):
    for t in some:
        write(root / "re_arc" / "tasks" / f"{t.name}.json", raw_task(t))
    write(
        root / "re_arc" / "metadata.json", {t.name: {"n_examples": 1, "runtime": 0.5} for t in some}
    )
    return root / "re_arc"


FORMS = [
    as_written_by_re_arc,
    as_folder,
    as_nested_folder,
    as_one_file,
    as_kaggle,
    as_hyphenated_kaggle,
    as_kaggle_folder,
    as_jsonl,
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_tasks(form, tmp_path):
    some = puzzles.tasks(generator(), 5)
    found = sources.load([str(form(tmp_path, some))])
    assert [t.name for t in found] == [t.name for t in some]
    assert [sources.task_digest(t) for t in found] == [sources.task_digest(t) for t in some]
    assert all(g.dtype == np.uint8 for t in found for p in (*t.demos, *t.queries) for g in p)


def test_the_task_beside_the_tests(request):
    (task,) = sources.load([str(request.path.parent / "data" / "task.json")])
    assert task.name == "task" and task.demos[0][0].tolist() == [[1, 0, 0], [2, 2, 0], [0, 0, 3]]


def test_challenges_without_solutions_have_hidden_outputs(tmp_path):
    some = puzzles.tasks(generator(), 3)
    path = as_kaggle(tmp_path, some)
    path.with_name("arc-agi_evaluation_solutions.json").unlink()
    found = sources.load([str(path)])
    assert sources.set_hash(found) == sources.set_hash(map(without_outputs, some))
    assert len(data.queries(data.pack(found), "test", data.DataConfig(max_side=6)).pair) == sum(
        len(t.queries) for t in some
    )


def test_a_bare_list_of_pairs_is_all_demos(tmp_path):
    pairs = [puzzles.pair(generator(i)) for i in range(7)]
    (task,) = sources.load([str(write(tmp_path / "abc.json", [raw_pair(p) for p in pairs]))])
    assert task.name == "abc" and task.queries == [] and len(task.demos) == 7
    assert all(map(equal_pairs, task.demos, pairs))


def test_lines_without_a_name_are_named_by_their_number(tmp_path):
    some = puzzles.tasks(generator(), 2)
    path = write(tmp_path / "x.jsonl", "\n\n".join(json.dumps(raw_task(t)) for t in some))
    assert [t.name for t in sources.load([str(path)])] == ["x:1", "x:3"]


@pytest.mark.parametrize("source, count, content", [
    ("arc1:training", 400, "1614cf3cf2555ad5"),
    ("arc1:evaluation", 400, "55bf54add07f5157"),
    ("arc2:training", 1000, "5a960a2809f5d1f9"),
    ("arc2:evaluation", 120, "7c7c04918d663f7c"),
    ("arc1:dev", 80, "50eb316c413f8ee8"),
])  # fmt: skip
def test_embedded_sets(source, count, content):
    found = sources.load([source])
    assert len(found) == count and sources.set_hash(found) == content


def test_the_dev_split_is_part_of_training():
    training = {t.name: sources.task_digest(t) for t in sources.load(["arc1:training"])}
    dev = sources.load(["arc1:dev"])
    assert all(training[t.name] == sources.task_digest(t) for t in dev)
    assert sources.dev_split(reversed(sorted(training))) == [t.name for t in dev]


def test_sources_combine(tmp_path):
    a, b, other = (
        puzzles.tasks(generator(), 3),
        puzzles.tasks(generator(), 5),
        puzzles.tasks(generator(9), 1),
    )
    paths = [str(as_folder(tmp_path / n, some)) for n, some in (("a", a), ("b", b), ("c", other))]
    found = sources.load(paths)
    # equal copies once; another task of the same name stays, under a name of its own
    assert [t.name for t in found] == ["t0", "t0#2", "t1", "t2", "t3", "t4"]
    assert sources.set_hash(found) == sources.set_hash([*b, *other])
    assert sources.set_hash(sources.load([*paths, *paths])) == sources.set_hash(found)


@given(generators)
def test_the_set_hash_is_of_content(g):
    some = puzzles.tasks(g, 4, hidden=True)
    order = torch.randperm(4, generator=g).tolist()
    assert sources.set_hash([some[i]._replace(name=f"n{i}") for i in order]) == sources.set_hash(
        some
    )
    assert sources.set_hash(some[1:]) != sources.set_hash(some)
    demos = list(some[0].demos)
    demos[0] = (demos[0][0], (demos[0][1] + 1) % 10)
    assert sources.set_hash([some[0]._replace(demos=demos), *some[1:]]) != sources.set_hash(some)


def test_describe_counts():
    some = [puzzles.task(generator(i), hidden=True) for i in range(6)]
    said = sources.describe(some, data.DataConfig(max_side=6))
    assert said["tasks"] == 6 and said["pairs"] == sum(len(t.demos) + len(t.queries) for t in some)
    assert said["hidden_outputs"] == sum(y is None for t in some for _, y in t.queries) > 0
    assert sum(said["demos_per_task"].values()) == 6
    assert sum(said["canvases"]["test"].values()) == said["queries"]
    json.dumps(said)


# ---------------------------------------------------------------- bad input

GOOD = {"input": [[1, 2]], "output": [[3]]}


def task_with(grid):
    return {"train": [GOOD, {"input": grid, "output": [[1]]}], "test": [GOOD]}


BAD = {
    "ragged": (task_with([[1, 2], [3]]), ["bad.json", "task bad", "train[1].input", "ragged"]),
    "colour 12": (task_with([[12]]), ["task bad", "train[1].input", "colour 12"]),
    "colour -1": (task_with([[-1]]), ["task bad", "train[1].input", "colour -1"]),
    "float": (task_with([[1.0]]), ["task bad", "train[1].input", "whole number"]),
    "string": (task_with([["1"]]), ["task bad", "train[1].input", "whole number"]),
    "bool": (task_with([[True]]), ["task bad", "train[1].input", "whole number"]),
    "null cell": (task_with([[None]]), ["task bad", "train[1].input", "whole number"]),
    "31 x 31": (task_with([[0] * 31] * 31), ["task bad", "train[1].input", "31 x 31", "1..30"]),
    "no cell": (task_with([[]]), ["task bad", "train[1].input", "1 x 0"]),
    "no row": (task_with([]), ["task bad", "train[1].input", "list of rows"]),
    "no grid": (task_with(7), ["task bad", "train[1].input", "list of rows"]),
    "no demos": ({"train": [], "test": [GOOD]}, ["bad.json", "task bad", "no demos"]),
    "empty list": ([], ["bad.json", "task bad", "no demos"]),
    "no train": ({"x": {"test": [GOOD]}}, ["bad.json", "task x", '"train"']),
    "test no list": ({"train": [GOOD], "test": GOOD}, ["bad.json", "task bad", '"test"']),
    "no input": (
        {"train": [GOOD], "test": [{"output": [[1]]}]},
        ["task bad", "test[0]", '"input"'],
    ),
    "no output": ({"train": [{"input": [[1]]}], "test": []}, ["task bad", "train[0]", '"output"']),
    "null output": (
        {"train": [{"input": [[1]], "output": None}], "test": []},
        ["task bad", "train[0]", '"output"'],
    ),
    "number": (7, ["bad.json", "neither a task"]),
    "text": ('{"train": [', ["bad.json", "broken JSON"]),
    "nested": ("[" * 200_000, ["bad.json", "broken JSON"]),
    "no task": ({}, ["no task found"]),
}


def complaint(source):
    with pytest.raises(UserError) as caught:
        sources.load([str(source)])
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name, tmp_path):
    value, words = BAD[name]
    said = complaint(write(tmp_path / "bad.json", value))
    assert all(word in said for word in words), said


def test_a_bad_line_is_named(tmp_path):
    good = json.dumps(raw_task(puzzles.task(generator())))
    for broken in ("{", "[" * 200_000):
        assert "x.jsonl: line 2: broken JSON" in complaint(
            write(tmp_path / "x.jsonl", f"{good}\n{broken}\n")
        )


def test_missing_and_empty_sources(tmp_path):
    assert "gone.json: no such file" in complaint(tmp_path / "gone.json")
    (tmp_path / "empty").mkdir()
    assert "empty: no task found" in complaint(tmp_path / "empty")
    with pytest.raises(UserError, match="no source: no task found"):
        sources.load([])
    with pytest.raises(UserError, match="nothing.json: no such file"):
        sources.read_json(tmp_path / "nothing.json")


def test_an_unknown_embedded_set_names_the_nearest():
    assert "did you mean arc1:training?" in complaint("arc1:trainig")
    assert "did you mean arc2:evaluation?" in complaint("arc2:evaluatoin")
    assert "arc2:dev: no such embedded set" in complaint("arc2:dev")


def test_solutions_must_match_their_queries(tmp_path):
    some = puzzles.tasks(generator(), 2)
    path = as_kaggle(tmp_path, some)
    beside = path.with_name("arc-agi_evaluation_solutions.json")
    answers = json.loads(beside.read_text())
    write(beside, answers | {"t1": answers["t1"] + [[[1]]]})
    said = complaint(path)
    assert "challenges.json" in said and "task t1" in said and "one grid per query" in said
    write(beside, answers | {"t1": [[[11]]] * len(some[1].queries)})
    said = complaint(path)
    assert "task t1" in said and "test[0].output" in said and "colour 11" in said
    write(beside, [1])
    assert "solutions.json" in complaint(path)
    write(beside, {"t0": answers["t0"]})
    assert complaint(path) == f"{beside}: has no solution of task t1"


def test_what_lies_beside_tasks_is_known_by_the_end_of_its_name(tmp_path):
    some = puzzles.tasks(generator(), 3)
    for t, name in zip(
        some, ("looks_like_a_star", "metadata_of_a_cat", "solutions-2"), strict=True
    ):
        write(tmp_path / f"{name}.json", raw_task(t))
    for name in ("looks", "my-submission", "arc_solutions", "metadata", "predictions-2"):
        write(tmp_path / f"{name}.json", "no task")
    assert [t.name for t in sources.load([str(tmp_path)])] == [
        "looks_like_a_star",
        "metadata_of_a_cat",
        "solutions-2",
    ]


def test_a_broken_line_is_named_by_its_number(tmp_path):
    good = json.dumps(raw_task(puzzles.task(generator())))
    path = write(tmp_path / "x.jsonl", f"{good}\n\n{good[:-4]}\n{good}")
    said = complaint(path)
    assert "x.jsonl" in said and "line 3" in said and "broken JSON" in said
    path.write_bytes(b"\xff\xfe{}")
    assert "x.jsonl" in complaint(path)


# ---------------------------------------------------------------- held-out guard


@given(generators)
def test_pair_digest_ignores_symmetry(g):
    pair = puzzles.pair(g)
    turned = puzzles.moved(puzzles.symmetry(g), pair)
    assert sources.pair_digest(turned) == sources.pair_digest(pair)
    assert sources._rough(turned) == sources._rough(pair)


def equal_up_to_symmetry(a, b):
    """The plain way: some turn of a becomes b by a one-to-one change of colours."""
    for k in range(8):
        turned = puzzles.moved(data.identity()._replace(dihedral=torch.tensor(k)), a)
        if all(x.shape == y.shape for x, y in zip(turned, b, strict=True)):
            change = {
                (p, q)
                for x, y in zip(turned, b, strict=True)
                for p, q in zip(x.flat, y.flat, strict=True)
            }
            if len(change) == len({p for p, _ in change}) == len({q for _, q in change}):
                return True
    return False


@given(generators, st.integers(1, 3), st.integers(2, 3))
@settings(max_examples=200)
def test_pair_digest_tells_orbits_apart(g, side, colours):
    """Small grids of few colours, of which many are equal up to symmetry and many are nearly so."""
    pairs = [puzzles.pair(g, max(1, side - 1), side, colours) for _ in range(3)]
    for a in pairs:
        for b in pairs:
            same = equal_up_to_symmetry(a, b)
            assert (sources.pair_digest(a) == sources.pair_digest(b)) == same
            assert sources._rough(a) == sources._rough(b) or not same


@given(generators)
def test_pair_digest_sees_every_cell(g):
    x, y = puzzles.pair(g, colours=9)
    at = tuple(puzzles.integer(g, 0, n - 1) for n in x.shape)
    y[0, 0] = x[at]  # the old colour stays in the pair, the new one is new: no symmetry can undo it
    changed = x.copy()
    changed[at] = 9
    assert sources.pair_digest((changed, y)) != sources.pair_digest((x, y))


def names(some):
    return [t.name for t in some]


def large(g, name):
    return puzzles.task(g, name, low=4)  # 32 cells a pair at least


def shared(g, task, other, place):
    """The task with a pair of the other one, moved, put among its demos."""
    pairs = [*other.demos, *other.queries]
    return task._replace(demos=[*task.demos, puzzles.moved(puzzles.symmetry(g), pairs[place])])


@given(generators, st.sampled_from(["demos", "queries"]))
@settings(max_examples=50)
def test_no_pair_of_a_held_out_or_dev_task_is_trained_on(g, part):
    train, dev, held_out = (
        [large(g, f"{kind}{i}") for i in range(3)] for kind in ("train", "dev", "held")
    )
    of = {"demos": 0, "queries": -1}[part]
    mixed = [shared(g, train[0], held_out[1], of), shared(g, train[1], dev[2], of), train[2]]
    kept, found = sources.guard(mixed, dev, held_out, "drop", 20)
    assert names(kept) == ["train2"]
    assert found == sources.Finding("drop", (("train0", "held1"),), set_aside=1)
    with pytest.raises(UserError, match="train0 shares a pair with held-out task held1"):
        sources.guard(mixed, dev, held_out, "refuse", 20)
    assert names(sources.guard(mixed[1:], dev, held_out, "refuse", 20)[0]) == ["train2"]

    kept, found = sources.guard(mixed, dev, held_out, "demos", 20)
    admitted = ["held0#demos", "held1#demos", "held2#demos"]
    assert names(kept) == [*(["train0"] if part == "demos" else []), "train2", *admitted]
    assert all(
        k.demos == t.demos and not k.queries for k, t in zip(kept[-3:], held_out, strict=True)
    )
    assert found.admitted == 3 and found.set_aside == 1
    assert found.dropped == (() if part == "demos" else (("train0", "held1"),))
    assert "TRAINED ON" in str(found)


@given(generators)
@settings(max_examples=30)
def test_a_held_out_task_whose_demo_is_its_query_is_admitted_all_the_same(g):
    twice, copied, train = large(g, "h0"), large(g, "h1"), large(g, "t")
    twice = twice._replace(queries=[puzzles.moved(puzzles.symmetry(g), twice.demos[0])])
    copied = copied._replace(
        demos=[*copied.demos, puzzles.moved(puzzles.symmetry(g), twice.queries[0])]
    )
    kept, found = sources.guard([train], [], [twice, copied], "demos", 20)
    assert names(kept) == ["t", "h0#demos"]  # that of another task still drops
    assert found.dropped == (("h1#demos", "h0"),) and found.admitted == 1


@given(generators)
@settings(max_examples=30)
def test_dev_tasks_are_never_trained_on_whatever_the_policy(g):
    dev, train = [large(g, f"d{i}") for i in range(3)], [large(g, "t")]
    for policy in ("refuse", "drop", "demos"):
        kept, _ = sources.guard([*train, *dev], dev, dev, policy, 20)
        assert names(kept) == ["t"]


@given(generators)
def test_one_tiny_pair_is_chance_and_several_or_all_are_not(g):
    tiny = [
        (np.array([[0, 1], [2, 3]], np.uint8), np.full((1, n), 4, np.uint8)) for n in (1, 2, 3)
    ]  # 5, 6, 7 cells
    other = Task("h", [*tiny, *puzzles.task(g).demos], [])
    task = large(g, "t")
    for count, cells, hit in (
        (1, 6, False),
        (1, 5, True),
        (2, 12, False),
        (2, 11, True),
        (3, 20, False),
        (3, 18, True),
    ):
        moved = [puzzles.moved(puzzles.symmetry(g), p) for p in tiny[:count]]
        # twice the same pair is no more evidence than once
        train = [task._replace(demos=[*moved, moved[0], *task.demos]), large(g, "u")]
        kept, found = sources.guard(train, [], [other], "drop", cells)
        assert len(kept) == 1 + (not hit)
        assert found.dropped == ((("t", "h"),) if hit else ()) and found.tiny == (
            0 if hit else count
        )
    moved = [puzzles.moved(puzzles.symmetry(g), p) for p in tiny[:1]]
    kept, found = sources.guard([Task("t", moved, []), train[1]], [], [other], "drop", 20)
    assert names(kept) == ["u"] and found.dropped == (("t", "h"),)


def test_a_guard_that_leaves_nothing_says_so():
    some = [large(generator(), "t")]
    with pytest.raises(UserError, match="data.train: no task is left"):
        sources.guard(some, [], some, "drop", 20)


def test_the_guard_on_arc():
    cfg = DataConfig()
    train, dev, found = sources.prepare(cfg)
    assert found.dropped == (("40853293", "070dd51e"), ("caa06a1f", "50a16a69"))
    assert found.set_aside == len(dev) == 80  # also those of nothing but 3 x 3 grids
    assert len(train) == 400 - 80 - 2
    forbidden = {
        sources.pair_digest(p)
        for t in dev
        for p in (*t.demos, *t.queries)
        if p[0].size + p[1].size >= 20
    }
    assert not forbidden & {sources.pair_digest(p) for t in train for p in (*t.demos, *t.queries)}
    with pytest.raises(UserError, match="40853293 shares a pair with held-out task 070dd51e"):
        sources.prepare(msgspec.structs.replace(cfg, policy="refuse"))
    train, _, found = sources.prepare(msgspec.structs.replace(cfg, dev=(), policy="demos"))
    assert (len(train), found.admitted) == (
        400 - 2 + 400,
        400,
    )  # seven of which have a demo equal to their query
    few, dev, _ = sources.prepare(msgspec.structs.replace(cfg, max_train_tasks=3, max_eval_tasks=2))
    assert len(few) == 3 and len(dev) == 2


def test_admitted_tasks_that_are_cut_off_are_not_counted(tmp_path):
    some = [large(generator(i), f"t{i}") for i in range(5)]
    shown, asked = (
        str(as_folder(tmp_path / n, part)) for n, part in (("a", some[:3]), ("b", some[3:]))
    )
    cfg = DataConfig(train=(shown,), dev=(), held_out=(asked,), policy="demos")
    for most, admitted in ((0, 2), (5, 2), (4, 1), (3, 0), (2, 0)):
        train, _, found = sources.prepare(msgspec.structs.replace(cfg, max_train_tasks=most))
        assert found.admitted == admitted == sum(t.name.endswith("#demos") for t in train)


def test_the_guard_on_arc_2():
    """376 of the held-out tasks are in it: none gets through, nor any dev task."""
    train, dev, found = sources.prepare(DataConfig(train=("arc2:training",)))
    held_out = {t.name for t in sources.load(["arc1:evaluation"])}
    assert not {t.name for t in train} & (held_out | {t.name for t in dev})
    assert len(found.dropped) == 377 and found.set_aside == 80
