"""Laws of the sources of tasks: loading, bad input, the held-out guard, shares."""

import json
import logging
import os

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from etrm_arc import data, sources
from etrm_arc.config import DataConfig, UserError
from etrm_arc.data import Task
from etrm_arc.extras import cache, compose, rearc
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import as_folder, generators, raw_pair, raw_task, write


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def names(some):
    return [t.name for t in some]


def digests(some):
    return [data.task_digest(t) for t in some]


def as_folders_and_links(root, some):
    """Other files lie beside tasks, hidden copies, links to them and to the folder itself."""
    write(root / "LICENSE", "")
    for name in ("looks", "my-submission", "arc_solutions", "metadata", "predictions-2"):
        write(root / f"{name}.json", "no task")
    write(root / ".ipynb_checkpoints" / "copy.json", raw_task(some[0]))
    as_folder(root / "part", some[:3])
    (root / "part" / "t2.json").rename(root / "part" / "t2.JSON")
    (root / "linked").symlink_to(as_folder(root.parent / "elsewhere", some[3:]))
    (root / "part" / "again.json").symlink_to(root / "part" / "t0.json")
    (root / "part" / "loop").symlink_to(root)
    return root


def as_list(root, some):
    return write(root / "all.json", [{"id": t.name} | raw_task(t) for t in some])


def as_splits(root, some):
    one, two = ({t.name: raw_task(t) for t in part} for part in (some[:2], some[2:]))
    return write(root / "all.json", {"train": one, "eval": two})


def as_kaggle(root, some):
    answers = {t.name: [y.tolist() for _, y in t.queries] for t in some}
    write(root / "evaluation-challenges.json", {t.name: raw_task(sources.hidden(t)) for t in some})
    return write(root / "evaluation-solutions.json", answers).parent


def as_lines(root, some):
    """A byte-order mark, a line separator within a string, whole numbers with a point."""
    rows = [{"id": t.name, "about": "a\u2028b"} | raw_task(t) for t in some]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    return write(root / "all.jsonl", text.replace("0]", "0.0]"))


@pytest.mark.parametrize("form", [as_folders_and_links, as_list, as_splits, as_kaggle, as_lines])
def test_every_format_gives_the_same_tasks(form, tmp_path):
    some = puzzles.tasks(generator(), 5)
    loaded = sources.load(form(tmp_path / "tasks", some))
    assert names(loaded) == names(some) and digests(loaded) == digests(some)
    assert all(g.dtype == np.uint8 for t in loaded for p in (*t.demos, *t.queries) for g in p)
    hidden = sources.load(tmp_path / "tasks", hide=True)
    assert sources.set_hash(hidden) == sources.set_hash(map(sources.hidden, some))


@pytest.mark.parametrize(("key", "count"), [(None, 7), ("examples", 7), (None, 203)])
def test_pairs_alone_are_demos_and_many_become_tasks_of_few(key, count, tmp_path):
    pairs = [puzzles.pair(generator(i)) for i in range(count)]
    raw = [[x.tolist(), y.tolist()] for x, y in pairs] if key else [raw_pair(p) for p in pairs]
    tasks = sources.load(write(tmp_path / "abc.json", {key: raw} if key else raw))
    shown = sorted(sources.pair_digest(p) for t in tasks for p in t.demos)
    assert shown == sorted(map(sources.pair_digest, pairs))
    assert names(tasks) == ["abc"] if count == 7 else {len(t.demos) for t in tasks} <= {4, 5}
    assert len({*names(tasks)}) == len(tasks)


def test_demos_beyond_30_are_left_out_and_counted_and_queries_only_not_trained_on(tmp_path, caplog):
    some = puzzles.tasks(generator(), 3)
    huge = {"input": [[0] * 31], "output": [[1]]}
    raw = {t.name: raw_task(t) for t in some} | {"huge": {"train": [huge], "test": []}}
    for t in some[:2]:
        raw[t.name]["train"].append(huge)
    path = str(write(tmp_path / "all\x1b.json", raw))
    with caplog.at_level(logging.WARNING):
        assert sources.set_hash(sources.load(path)) == sources.set_hash(some)
    assert all(words in caplog.text for words in ("3 pairs beyond", ", 1 tasks without"))
    assert "\x1b" not in caplog.text
    raw["t0"]["test"] += [{"input": [[0] * 31]}, {"input": [[1]], "output": [[2] * 31]}]
    write(tmp_path / "all\x1b.json", raw)
    assert len(sources.load(path)[0].queries) == len(some[0].queries) + 2
    train, _, _ = sources.prepare(DataConfig(train=(path,), dev=(), held_out=()))
    assert sources.set_hash(train) == sources.set_hash(some)


@given(generators, st.sampled_from([np.int64, np.float32, list, tuple]))
def test_a_task_of_python_is_the_same_whatever_its_numbers(g, kind):
    def changed(x):
        return kind(map(kind, x.tolist())) if kind in (list, tuple) else x.astype(kind)

    task = puzzles.task(g)
    demos, asked = ([(changed(x), changed(y)) for x, y in part] for part in task[1:])
    assert digests([sources.check(Task("t", demos, asked))]) == digests([task])
    if kind is np.int64:  # also where nobody checks
        assert digests([Task("t", demos, asked)]) == digests([task])
        assert data.pack([Task("", demos, asked)]).cells.equal(data.pack([task]).cells)
        demos[0][0][0, 0] = -1
        with pytest.raises(UserError, match="colour -1"):
            sources.check(Task("bad", demos, asked))


EMBEDDED = {
    "arc1:training": (400, "1614cf3cf2555ad5"),
    "arc1:evaluation": (400, "55bf54add07f5157"),
    "arc2:training": (1000, "5a960a2809f5d1f9"),
    "arc2:evaluation": (120, "7c7c04918d663f7c"),
    "arc1:dev": (80, "50eb316c413f8ee8"),
}


@pytest.mark.parametrize("source", EMBEDDED)
def test_embedded_sets(source):
    loaded = sources.load([source])
    assert (len(loaded), sources.set_hash(loaded)) == EMBEDDED[source]


def test_sources_combine(tmp_path):
    """Equal copies count once; another task of the same name stays, under a name of its own."""
    a, b, other = (puzzles.tasks(generator(s), n) for s, n in ((0, 3), (0, 5), (9, 1)))
    paths = [as_folder(tmp_path / n, some) for n, some in (("a", a), ("b", b), ("c", other))]
    for loaded in (sources.load(paths), sources.load([*paths, *paths])):
        assert [t.name.partition("#")[0] for t in loaded] == ["t0", "t0", "t1", "t2", "t3", "t4"]
        assert len({*names(loaded)}) == 6
        assert sources.set_hash(loaded) == sources.set_hash([*b, *other])


@given(generators)
def test_the_set_hash_is_of_content(g):
    some = puzzles.tasks(g, 4, hidden=True)
    order = torch.randperm(4, generator=g).tolist()
    same = [some[i]._replace(name=f"n{i}") for i in order]
    assert sources.set_hash(same) == sources.set_hash(some) != sources.set_hash(some[1:])
    demos = [(some[0].demos[0][0], (some[0].demos[0][1] + 1) % 10), *some[0].demos[1:]]
    assert sources.set_hash([some[0]._replace(demos=demos), *some[1:]]) != sources.set_hash(some)


GOOD = {"input": [[1, 2]], "output": [[3]]}


def task_with(grid):
    return {"train": [GOOD, {"input": grid, "output": [[1]]}], "test": [GOOD]}


BAD = {
    "task bad, train[1].input: ragged": task_with([[1, 2], [3]]),
    "task bad, train[1].input: whole number": task_with([[True]]),
    "task bad: no demos": {"train": [], "test": [GOOD]},
    'task x: "train"': {"x": {"test": [GOOD]}},
    "neither a task": [[[1, 2, 3]]],
    "twice": '{"a": 1, "a": 2}',
    "surrogates": '{"a": "\\ud800"}',
    "no task found": {},
    "control character": {"x\n\x1b[1m": task_with([[1]])},
    "test[0].output": {"train": [GOOD], "test": [{"input": [[1]], "output": 5}]},
}


def complaint(source, hide=False):
    with pytest.raises(UserError) as caught:
        sources.load([str(source)], hide)
    text = str(caught.value)
    assert text.isprintable()
    return text


@pytest.mark.parametrize("words", BAD)
def test_bad_files_are_refused_by_name(words, tmp_path):
    path = write(tmp_path / "bad.json", BAD[words])
    for hide in (False, True):  # before any view is asked
        text = complaint(path, hide)
        assert all(word in text for word in ("bad.json", *words.split(": "))), text


def test_what_cannot_be_read_is_named(tmp_path):
    good = json.dumps(raw_task(puzzles.task(generator())))
    path = write(tmp_path / "x.jsonl", f"{good}\n\n{good[:-4]}\n{good}")
    assert "x.jsonl: line 3: broken JSON" in complaint(path)
    path.write_bytes(b"\xff\xfe{}")
    assert "x.jsonl" in complaint(path)
    path.unlink()
    assert "did you mean arc2:evaluation?" in complaint("arc2:evaluatoin")
    assert "no such file" in complaint("a" * 10_000) and "no such file" in complaint("a\0b")
    assert "no task found" in complaint(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    for source in (tmp_path / "pipe.json", tmp_path):
        assert "pipe.json: not a regular file" in complaint(source)
    (tmp_path / "pipe.json").unlink()
    (tmp_path / "folder").symlink_to(tmp_path / "gone")
    assert "folder: no such file" in complaint(tmp_path)


def test_solutions_must_match_their_queries(tmp_path):
    some = puzzles.tasks(generator(), 2)
    beside = as_kaggle(tmp_path, some) / "evaluation-solutions.json"
    answers = json.loads(beside.read_text())
    for bad, word in [
        (answers | {"t1": answers["t1"] + [[[1]]]}, "one grid per query"),
        ([1], "solutions.json"),
        ({"t0": answers["t0"]}, "task t1"),
    ]:
        write(beside, bad)
        assert all(word in complaint(tmp_path, hide) for hide in (False, True))


def equal_up_to_symmetry(a, b):
    """The plain way: some turn of a becomes b by a one-to-one change of colours."""
    for k in range(8):
        turned = [data.turn(k, x) for x in a]
        if all(x.shape == y.shape for x, y in zip(turned, b, strict=True)):
            both = zip(turned, b, strict=True)
            change = {c for x, y in both for c in zip(x.flat, y.flat, strict=True)}
            if len(change) == len({p for p, _ in change}) == len({q for _, q in change}):
                return True
    return False


@given(generators, st.integers(1, 3), st.integers(2, 3))
@settings(max_examples=200)
def test_pair_digest_tells_orbits_apart(g, side, colours):
    """Small grids of few colours: many are equal up to symmetry and many are nearly so."""
    pairs = [puzzles.pair(g, max(1, side - 1), side, colours) for _ in range(3)]
    pairs.append(puzzles.moved(puzzles.symmetry(g), puzzles.pair(g)))
    pairs.append(puzzles.moved(puzzles.symmetry(g), pairs[-1]))
    for a in pairs:
        for b in pairs:
            same = equal_up_to_symmetry(a, b)
            assert (sources.pair_digest(a) == sources.pair_digest(b)) == same
            assert sources.rough_key(a) == sources.rough_key(b) or not same


def large(g, name):
    return puzzles.task(g, name, low=4)  # 32 cells a pair at least


def shared(g, task, other, number):
    pair = [*other.demos, *other.queries][number]
    return task._replace(demos=[*task.demos, puzzles.moved(puzzles.symmetry(g), pair)])


@given(generators, st.sampled_from([0, -1]))
@settings(max_examples=50)
def test_no_pair_of_a_held_out_or_dev_task_is_trained_on(g, number):
    train, dev, held_out = ([large(g, f"{k}{i}") for i in range(3)] for k in ("t", "d", "h"))
    from_held_out = shared(g, train[0], held_out[1], number)
    mixed = [from_held_out, shared(g, train[1], dev[2], number), train[2]]
    kept, finding = sources.guard(mixed, dev, held_out, "drop")
    assert names(kept) == ["t2"] and finding.dropped == (("t0", "h1"),)
    with pytest.raises(UserError, match="t0 shares a pair with held-out task h1"):
        sources.guard(mixed, dev, held_out, "refuse")
    kept, finding = sources.guard(mixed, dev, held_out, "demos")
    is_demo = number == 0
    assert names(kept) == ["t0"] * is_demo + ["t2", "h0#demos", "h1#demos", "h2#demos"]
    assert [(t.demos, t.queries) for t in kept[-3:]] == [(t.demos, []) for t in held_out]
    assert finding.dropped == (() if is_demo else (("t0", "h1"),))
    assert finding.admitted == 3 and finding.set_aside == 1 and "TRAINED ON" in finding.warning
    for policy in ("refuse", "drop", "demos"):  # dev tasks are not even admitted
        assert names(sources.guard([train[2], *dev], dev, dev, policy)[0]) == ["t2"]


@given(generators)
@settings(max_examples=30)
def test_a_held_out_task_whose_demo_is_its_query_is_admitted_all_the_same(g):
    twice, copied, train = large(g, "h0"), large(g, "h1"), large(g, "t")
    twice = twice._replace(queries=[puzzles.moved(puzzles.symmetry(g), twice.demos[0])])
    copied = shared(g, copied, twice, -1)
    kept, finding = sources.guard([train], [], [twice, copied], "demos")
    assert names(kept) == ["t", "h0#demos"]  # that of another task is still dropped
    assert finding.dropped == (("h1#demos", "h0"),) and finding.admitted == 1


@given(generators)
def test_one_tiny_pair_is_chance_and_several_or_all_are_not(g):
    x = np.array([[0, 1], [2, 3]], np.uint8)
    tiny = [(x, np.full((1, n), 4, np.uint8)) for n in (1, 2, 3)]  # 5, 6, 7 cells
    other = Task("h", [*tiny, *puzzles.task(g).demos], [])
    task, second = large(g, "t"), large(g, "u")
    for count, cells, hit in ((1, 6, False), (1, 5, True), (3, 20, False), (3, 18, True)):
        moved = [puzzles.moved(puzzles.symmetry(g), p) for p in tiny[:count]]
        # twice the same pair is no more evidence than once
        train = [task._replace(demos=[*moved, moved[0], *task.demos]), second]
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sources, "MIN_SHARED_CELLS", cells)
            kept, finding = sources.guard(train, [], [other], "drop")
        assert names(kept) == ["t"] * (not hit) + ["u"] and finding.tiny == (0 if hit else count)
        assert finding.dropped == ((("t", "h"),) if hit else ())
    kept, _ = sources.guard([Task("t", moved[:1], []), second], [], [other], "drop")
    assert names(kept) == ["u"]
    with pytest.raises(UserError, match="no task is left"):
        sources.guard([second], [], [second], "drop")


def test_the_guard_on_arc():
    cfg = DataConfig()
    train, dev, finding = sources.prepare(msgspec.structs.replace(cfg, max_eval_tasks=2))
    assert finding.dropped == (("40853293", "070dd51e"), ("caa06a1f", "50a16a69"))
    assert finding.set_aside == 80 and len(dev) == 2  # also those of nothing but 3 x 3 grids
    assert len(train) == 400 - 80 - 2
    train, _, finding = sources.prepare(msgspec.structs.replace(cfg, dev=(), policy="demos"))
    assert len(train) == 400 - 2 + 400 and finding.admitted == 400  # seven have a demo as query
    # ARC-2 holds 376 of the held-out tasks
    train, _, finding = sources.prepare(DataConfig(train=("arc2:training",)))
    assert not {*names(sources.load(["arc1:evaluation", "arc1:dev"]))} & {*names(train)}
    assert len(finding.dropped) == 377 and finding.set_aside == 80


def test_admitted_tasks_that_are_cut_off_are_not_counted(tmp_path):
    some = [large(generator(i), f"t{i}") for i in range(5)]
    trained = str(as_folder(tmp_path / "a", some[:3]))
    (tmp_path / "link").symlink_to(as_folder(tmp_path / "b", some[3:]))  # no way around the guard
    cfg = DataConfig(train=(trained,), dev=(), held_out=(str(tmp_path / "link"),), policy="demos")
    for most, admitted in ((0, 2), (5, 2), (4, 1), (2, 0)):
        train, _, finding = sources.prepare(msgspec.structs.replace(cfg, max_train_tasks=most))
        assert finding.admitted == admitted == sum(t.name.endswith("#demos") for t in train)


@given(generators, st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(1, 8))
@settings(max_examples=30)
def test_sources_get_their_share_of_the_slots(g, first, second, slots):
    """Among the tasks that fit: the outputs of some fit no canvas that the other pair foretells."""
    kinds, one = ("composed:", "rearc:", ""), np.zeros((1, 1), np.uint8)
    cross = [(one, one.repeat(6, axis)) for axis in (0, 1)]
    tasks = [Task(f"{kind}cross", cross, []) for kind in kinds]
    for kind in kinds:
        tasks += [puzzles.task(g, f"{kind}{i}") for i in range(puzzles.integer(g, 1, 9))]
    packed, shares = data.pack(tasks), {"composed": first, "rearc": second}
    asked = data.queries(packed, "leave_one_out", DataConfig())
    fit = torch.zeros(len(tasks), dtype=torch.bool).index_fill_(0, asked.task[asked.fits], True)
    groups = [fit & torch.tensor([t.name.startswith(k) for t in tasks]) for k in kinds[:2]]
    groups.append(fit & ~groups[0] & ~groups[1])
    if not all(group.any() for group in groups):
        with pytest.raises(UserError, match="data.share"):
            sources.weights(tasks, shares, fit)
        return
    deck = data.deck(asked, slots, sources.weights(tasks, shares, fit))
    share_of = deck.cdf.diff(prepend=torch.zeros(1))
    for group, share in zip(groups, (first, second, 1 - first - second), strict=True):
        of_group = share_of[group[packed.task_of[deck.pair]]]
        assert float(of_group.sum()) == pytest.approx(share)


@pytest.mark.parametrize("kind", compose.KINDS)
def test_composed_tasks_are_a_source(kind):
    loaded = sources.load([f"{kind}:7", f"{kind}:3"])
    assert names(loaded) == [f"{kind}:{i:06d}" for i in range(7)]
    assert digests(loaded) == digests(compose.tasks(7, kind))
    for count in ("", "0", "-1", "x", "1.5", "1000001", "9" * 5000, "²", " 5"):
        assert "needs a number of tasks" in complaint(f"{kind}:{count}")


def test_many_generated_tasks_are_kept_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "STORED", 5)
    once = {s: sources.set_hash(sources.load(s)) for s in ("composed:4", "composed:6")}
    (file,) = tmp_path.glob("etrm-arc/*.npz")
    with monkeypatch.context() as m:
        m.setattr(compose, "tasks", None)
        assert sources.set_hash(sources.load("composed:6")) == once["composed:6"]
    for damaged in (file.read_bytes()[:100], b"", b"PK\x03\x04" + bytes(99)):
        file.write_bytes(damaged)
        assert sources.set_hash(sources.load("composed:6")) == once["composed:6"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    assert sources.set_hash(sources.load("composed:6")) == once["composed:6"]


def counting(rng, low, high):
    """Like RE-ARC's generators; one grid in three is too large."""
    n = rng.choice((3, 5, 40))
    x = tuple(tuple(rng.randrange(10) for _ in range(n)) for _ in range(3))
    return {"input": x, "output": x[::-1]}


def test_families_of_rearc_are_a_source(monkeypatch):
    """Pure functions of (seed, family, index), without families of the dev split or large grids."""
    dev = sources.load("arc1:dev")[0].name
    families = dict.fromkeys(("aa", "bb", dev), counting)
    monkeypatch.setattr(rearc, "generators", lambda: families)
    monkeypatch.setattr(rearc, "code", list)
    loaded = sources.load("rearc:6")
    assert names(loaded) == [f"rearc:{k}:{i:04d}" for k in ("aa", "bb") for i in range(6)]
    assert all(x.shape[1] < 30 and np.array_equal(x[::-1], y) for t in loaded for x, y in t.demos)
    assert len(set(digests(loaded))) == 12
    assert digests([rearc.task("bb", counting, 4)]) == digests(loaded[10:11])
