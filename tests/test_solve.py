"""Predictions depend on nothing that they should not see, go on where they stopped and are scored;
adaptation learns from a task's demos alone, on a copy of the weights, within its time."""

import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from etrm_arc import checkpoint, data, etrm, score, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.data import Task
from etrm_arc.etrm import leaves
from etrm_arc.extras import submissions
from etrm_arc.score import Prediction, Vote
from etrm_arc.tests.puzzles import SET, as_folder, lines, tasks_of_all, told, with_solve

FOREVER = float("inf")
ALL = [str(SET)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def evaluate(name, file="p.jsonl", sources=ALL, sets=(), **options):
    names = [name] if isinstance(name, (str, Path)) else name
    sources = [str(source) for source in sources]
    return solve.evaluate(names, sources, sets, predictions_file=str(file), **options)


def copy_of(run, file, change=lambda x: x, **fields):
    """A checkpoint beside a run: its weights changed, fields of its config (table__name) too."""
    c = checkpoint.load(run)
    for key, value in fields.items():
        table, _, name = key.partition("__")
        c.meta["config"][table][name] = value
    weights = {"pairs": c.pairs}
    for name, tree in {"params": c.params, "ema": c.ema}.items():
        weights |= {f"{name}.{path}": change(v) for path, v in leaves(tree).items()}
    checkpoint.save(Path(file), weights, c.meta)
    return Path(file)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in calls of two functions alone, by their `seconds`; `calls` counts them."""
    state = SimpleNamespace(now=0.0, seconds={"one_step": 40.0, "think": 0.0}, calls=Counter())

    def slow(name, function, *args):
        state.now += state.seconds[name]
        state.calls[name] += 1
        return function(*args)

    monkeypatch.setattr(train, "one_step", partial(slow, "one_step", train.one_step))
    monkeypatch.setattr(etrm, "think", partial(slow, "think", etrm.think))
    monkeypatch.setattr(time, "monotonic", lambda: state.now)
    return state


def answers(s, tasks, views=2, **fields):
    return told(solve.predict(s.params, with_solve(s.cfg, **fields), tasks, views))


def grids_in(file):
    return sorted((p[0], p[1], [(v[0], v[3]) for v in p[2]]) for p in lines(Path(file)))


def test_predictions_do_not_depend_on_the_other_tasks(run):
    s, tasks = solve.opened(run), tasks_of_all()
    full, [alone] = solve.predict(s.params, s.cfg, tasks), solve.predict(s.params, s.cfg, tasks[0])
    assert all(len(p.votes) == 3 for p in full)
    for a, b in zip(alone.votes, full[0].votes, strict=True):
        assert (a.grid is None) == (b.grid is None) and a.q == pytest.approx(b.q, abs=1e-4)


@pytest.mark.parametrize("adapted", ["none", "context", "full"])
def test_solutions_replaced_by_noise_change_no_prediction(run, tmp_path, adapted):
    """Through the command's own path, files and all: what is on disk is the same."""
    sets = [f"solve.adapt={adapted}", "solve.adapt_steps=2"]
    true = tasks_of_all()
    noise = [t._replace(queries=[(x, 9 - y[:1, :1]) for x, y in t.queries]) for t in true]
    for name, tasks in (("true", true), ("noise", noise)):
        evaluate(run, f"{name}.jsonl", [as_folder(tmp_path / name, tasks)], sets)
    assert lines(Path("true.jsonl")) == lines(Path("noise.jsonl"))
    assert len(lines(Path("true.jsonl"))) == 6


@pytest.mark.parametrize("colours", ["all", "keep_black", "fixed"])
def test_an_oracle_scores_one_under_every_set_of_symmetries(run, monkeypatch, colours):
    """Of tasks whose output is their input, the model that copies is the oracle."""

    def think(params, cfg, encode, batch, dtype, steps, *rest):
        q = torch.zeros(len(batch.cells))
        logits = etrm.F.one_hot(batch.inputs, 12).float()
        return etrm.Output(logits, q), torch.full((len(q),), steps)

    monkeypatch.setattr(etrm, "think", think)
    same = [t._replace(queries=[(x, x) for x, _ in t.queries]) for t in tasks_of_all()]
    s = solve.opened(run)
    drawn = msgspec.structs.replace(s.cfg.data, dihedral=colours != "fixed", colours=colours)
    predictions = solve.predict(s.params, msgspec.structs.replace(s.cfg, data=drawn), same, 12)
    scores = score.score(same, predictions)
    assert [scores[k] for k in ("pass@1", "oracle", "exact_match")] == [1.0] * 3
    assert all(len(p.votes) == 12 and all(v.grid is not None for v in p.votes) for p in predictions)


def test_evaluation_agrees_with_what_training_watches(run):
    """One view, no symmetry: exact match and cell accuracy are those of train.probe."""
    s, tasks = solve.opened(run), tasks_of_all()
    scores = score.score(tasks, solve.predict(s.params, s.cfg, tasks, 1))
    probed = train.probe(s.params, s.cfg, data.pack(tasks), "test")
    assert scores["cell_accuracy"] == pytest.approx(probed["cell_accuracy"], abs=1e-6)
    assert probed["cell_accuracy"] > 0 and scores["exact_match"] == probed["exact"]


def test_act_steps_of_an_answer_are_a_choice_of_their_own(run):
    """More than in training, too; fewer where the model is sure. Their mean is reported."""
    two, tasks = solve.opened(run), tasks_of_all()[:2]
    model = msgspec.structs.replace(two.cfg.model, halt_max_steps=5)
    five = two._replace(cfg=msgspec.structs.replace(two.cfg, model=model))
    assert answers(two, tasks, act_steps=5) == answers(five, tasks) != answers(two, tasks)
    core = two.params.core._replace(q_bias=torch.ones(2))  # sure at once
    sure = two._replace(params=two.params._replace(core=core))
    early = answers(sure, tasks, act_steps=5, leave="q")
    assert {v[1] for _, _, votes in early for v in votes} == {1}
    assert evaluate(run, sets=["solve.act_steps=3"])["act_steps"] == 3


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(run, monkeypatch):
    monkeypatch.setattr(train, "EVAL_TOKENS", 60)
    evaluate(run, "whole.jsonl")
    append = score.append

    def dying(path, lines):
        append(path, lines)
        if len(path.read_text().splitlines()) >= 3:
            path.write_text(path.read_text() + '{"task": "cut of')
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(score, "append", dying)
        evaluate(run, "broken.jsonl")
    assert 0 < sum(len(p[2]) for p in lines(Path("broken.jsonl"))) < 18
    evaluate(run, "broken.jsonl")
    assert grids_in("whole.jsonl") == grids_in("broken.jsonl")
    monkeypatch.setattr(etrm, "think", None)  # all is there: nothing is asked again
    assert evaluate(run, "broken.jsonl")["votes"] == 18
    counts = [evaluate(run, "broken.jsonl", sets=[f"solve.views={n}"])["votes"] for n in (2, 1)]
    assert counts == [12, 6]  # of the first views


def test_shards_checkpoints_and_submissions_join(run, tmp_path):
    whole = evaluate(run, "whole.jsonl")
    for i in (1, 2):
        evaluate(run, f"{i}.jsonl", shard=f"{i}/2")
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    joint = submissions.merge(files, ALL, "all.jsonl", "sub.json")
    assert joint["pass@2"] == whole["pass@2"] and joint["votes"] == 18
    assert joint["cell_accuracy"] == pytest.approx(whole["cell_accuracy"])
    assert len({p.task for p in submissions.read_votes(Path("sub.json"))}) == 6
    more = submissions.merge([*files, tmp_path / "all.jsonl", tmp_path / "sub.json"], [])
    assert more["votes"] >= 18 + 6 and "pass@2" not in more
    alone = submissions.merge([tmp_path / "sub.json"], ALL, submit="again.json")
    assert Path("again.json").read_text() == Path("sub.json").read_text()
    assert alone["pass@2"] == whole["pass@2"]
    part = submissions.merge([tmp_path / "all.jsonl"], [str(SET / "flip.json")], "part.jsonl")
    assert part["queries"] == 1 and grids_in("part.jsonl") == grids_in("all.jsonl")
    other = copy_of(run, "other.safetensors", lambda x: 1.1 * x)
    both = evaluate([run, other], "whole.jsonl")
    assert both["votes"] == 36 and len(both["checkpoints"]) == 2


def test_a_budget_ends_the_views_and_loses_nothing(run, monkeypatch, clock):
    monkeypatch.setattr(train, "EVAL_TOKENS", 60)
    sets = ["solve.views=64"]
    with pytest.raises(UserError, match="not enough for a single view"):
        evaluate(run, sets=sets, budget=-1.0, submit="sub.json")
    empty = submissions.read_votes(Path("sub.json"))  # valid all the same
    assert len({p.task for p in empty}) == 6
    clock.seconds["think"] = 1.0
    part = evaluate(run, sets=sets, budget=30.0)
    assert 0 < part["votes"] < 64 * 6 and part["n_tasks"] == 6
    counts = [len(p.votes) for p in score.joined(tasks_of_all(), score.read(Path("p.jsonl")))]
    assert max(counts) <= 2 * max(1, min(counts)) + 1  # spent on all queries alike


def test_who_votes_depends_on_all_that_decides_the_answers(run):
    def source(*sets, **fields):
        return solve.opened(copy_of(run, "c.safetensors", **fields), sets).source

    plain, full = source(), source("solve.adapt=full")
    assert plain == source("solve.views=9") == source(optimizer__lr=0.5)
    others = [source("solve.leave=q"), source("solve.act_steps=1"), source("solve.adapt=context")]
    others += [source(model__halt_max_steps=3), source(data__colours="all")]
    others += [full, source("solve.adapt=full", optimizer__kind="adamw"), source("data.max_side=9")]
    assert len({plain, *others}) == 9
    assert evaluate(run)["votes"] == evaluate(run, sets=["solve.leave=q"])["votes"] == 18
    assert len({p.source for p in score.read(Path("p.jsonl"))}) == 2  # kept apart in one file


def test_hand_made_solvers_vote_and_are_never_one_number_with_learned_ones(run, monkeypatch):
    def predict(tasks, views):
        for t in tasks:
            for i in range(len(t.queries)):
                votes = [Vote(t.demos[0][1], view=v, source="made-1") for v in views]
                yield [Prediction(t.name, i, sources.task_hash(t), votes, source="made-1")]

    monkeypatch.setitem(sys.modules, "made", SimpleNamespace(SOURCE="made-1", predict=predict))
    monkeypatch.setitem(solve.SOLVERS, "made", "made")
    sets = ["solve.views=2"]
    alone = evaluate("made", sets=sets)
    assert alone["votes"] == 12 and "held_out" not in alone and alone["adaptation"] == "hand-made"
    both, learned = evaluate([run, "made"], sets=sets), evaluate(run, "q.jsonl", sets=sets)
    name = str(checkpoint.find(run))
    assert both["votes"] == 24 and both["by_solver"].keys() == {name, "made"}
    assert both["by_solver"]["made"]["oracle"] == alone["oracle"]
    assert both["by_solver"][name]["cell_accuracy"] == learned["cell_accuracy"]
    assert both["held_out"] is learned["held_out"]


def test_a_task_is_held_out_unless_its_pairs_were_trained_on(run):
    dev = solve.evaluate([run])
    assert dev["held_out"] is True and dev["n_tasks"] == 1 and "held_out_evaluation" not in dev
    assert evaluate(run, sources=[str(SET / "double.json")])["held_out"] is False
    numbers = [evaluate(run, sources=[str(SET / "flip.json")])["held_out_evaluation"] for _ in "ab"]
    assert numbers[1] == numbers[0] + 1
    assert "held_out_evaluation" not in evaluate(run, shard="2/2")  # which is without that task


@pytest.mark.parametrize("side", [2, 4])
def test_a_tiny_pair_in_common_is_chance_and_all_demos_are_not(side):
    g = np.random.default_rng(0)
    pairs = [tuple(g.integers(0, 10, (2, side, side), dtype=np.uint8)) for _ in range(4)]
    trained = [np.frombuffer(sources.pair_digest(pair), np.uint8) for pair in pairs]
    digests = torch.from_numpy(np.stack(trained))
    turned = [(np.rot90(x), np.rot90(y)) for x, y in pairs]
    task = Task("t", [turned[0], pairs[1], pairs[2]], [turned[3]])
    assert not score.held_out(digests[:3], [task])
    assert score.held_out(digests[:2], [task]) is (side == 2)
    assert score.held_out(digests[3:], [task]) is (side == 2)
    assert score.held_out(digests[:0], [task])


def test_predictions_lie_in_the_run_folder_or_where_they_can_be_read_again(run, tmp_path):
    for name, place in ((run, run), (copy_of(run, "loose.safetensors"), Path("runs/loose"))):
        result = solve.evaluate([name], ALL)
        assert Path(result["predictions"]) == place / "predictions.jsonl"
        assert len(lines(place / "predictions.jsonl")) == 6
    (run / "predictions.jsonl").rename("p.jsonl")
    Path("votes.json").write_text("a file of the user")
    with pytest.raises(UserError, match="^--predictions votes.json"):
        evaluate(run, "votes.json")
    with pytest.raises(UserError, match="^--output votes.json"):
        submissions.merge([tmp_path / "p.jsonl"], [], "votes.json")
    assert Path("votes.json").read_text() == "a file of the user"


def test_what_cannot_end_well_is_found_before_a_view_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr(etrm, "think", None)
    unasked = as_folder(tmp_path / "tasks", [t._replace(queries=[]) for t in tasks_of_all()])
    for phrase, wrong in {
        "no query": {"sources": [unasked]},
        "NaN": {"name": copy_of(run, "nan.safetensors", lambda x: x * float("nan"))},
        "cannot be written": {"submit": "no/s.json"},
        "model.raster = 9": {"name": copy_of(run, "raster.safetensors", model__raster=9)},
        "must look like 1/4": {"shard": "3/2"},
        "²/3: must look like": {"shard": "²/3"},
    }.items():
        with pytest.raises(UserError, match=phrase):
            evaluate(**{"name": run, **wrong})
    assert not Path("p.jsonl").exists()


def test_a_task_of_an_earlier_source_is_left_out_and_another_of_its_id_is_not(run, tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("flip.json", "new.json", "mirror.json"):
        (tmp_path / "other" / name).write_text((SET / "mirror.json").read_text())
    chosen = [*ALL, str(tmp_path / "other"), *ALL]  # a source named twice is asked once
    result = evaluate(run, sources=chosen)
    assert [row["n_tasks"] for row in result["by_source"].values()] == [6, 2]
    tasks = score.load_by_source(chosen, hide=True)
    assert [t.name.partition("#")[:2] for t in tasks[chosen[1]]] == [("flip", "#"), ("new", "")]
    assert [len(ts) for ts in score.load_by_source(chosen, 7).values()] == [6, 1]


def test_tasks_without_solutions_are_predicted_and_take_no_score_from_others(run, tmp_path):
    hidden = as_folder(tmp_path / "hidden", map(sources.hidden, tasks_of_all()[:2]))
    result = evaluate(run, sources=[hidden], submit="sub.json")
    assert "pass@2" not in result and result["unanswered"] == 0
    assert len(submissions.read_votes(Path("sub.json"))) == 2
    reader, writer = os.pipe()  # to which it is written once
    evaluate(run, sources=[hidden], submit=f"/dev/fd/{writer}")
    assert os.read(reader, 10**6).decode() == Path("sub.json").read_text()
    small, large = (np.full((1, n), n, np.uint8) for n in (1, 2))
    unlike = as_folder(tmp_path / "unlike", [Task("x", [(small, small)] * 2, [(large, None)])])
    unasked = as_folder(tmp_path / "unasked", [Task("y", [(small, small)] * 2, [])])
    both, alone = evaluate(run, sources=[*ALL, unlike, unasked]), evaluate(run, "q.jsonl")
    assert both["without_query"] == 1
    assert [*both["by_source"]] == ALL
    assert both["by_source"][ALL[0]]["pass@2"] == alone["pass@2"]


def test_a_query_larger_than_every_canvas_is_wrong(run, tmp_path):
    s, big, small = solve.opened(run), np.ones((12, 12), np.uint8), np.ones((3, 3), np.uint8)
    task = Task("big", [(big, big)], [(big, big)])
    result = evaluate(run, sources=[as_folder(tmp_path / "big", [task])])
    assert (result["votes"], result["unanswered"], result["pass@2"]) == (0, 1, 0)
    grow = Task("grow", [(small, small)], [(small, np.ones((9, 9), np.uint8))])
    scores = score.score([grow], solve.predict(s.params, s.cfg, grow))
    assert scores["exact_match"] == 0 == scores["cell_accuracy"]  # it does not fit its canvas


def questions(s, tasks):
    """All demos of the tasks as they are, each asked from the others."""
    packed = data.pack([t._replace(queries=[]) for t in tasks])
    lots = torch.arange(int(packed.n_demos.max())).expand(len(tasks), -1) / 9
    task, view = torch.arange(len(tasks)), data.identity(len(tasks))
    return solve.ask_demos(packed, s.cfg, task, view, lots)


def test_demos_are_asked_from_the_others_only(run):
    s, tasks = solve.opened(run), tasks_of_all()
    asked = questions(s, [tasks[2], tasks[0], tasks[2]])
    counts = [len(tasks[t].demos) for t in (2, 0, 2)]
    (batch, row), d = asked, asked[0].demos
    assert torch.bincount(row).tolist() == counts
    assert torch.bincount(d.owner).tolist() == [n - 1 for n in counts for _ in range(n)]
    inputs, shown = batch.inputs.split(batch.cells), d.inputs.split(d.cells)
    for i in range(len(inputs)):
        seen = [x[x > 1] for x, o in zip(shown, d.owner.tolist(), strict=True) if o == i]
        assert not any(torch.equal(x, inputs[i][inputs[i] > 1]) for x in seen)


def test_a_search_makes_no_demo_less_likely_and_rows_do_not_meet(run):
    s, tasks = solve.opened(run), tasks_of_all()
    cfg = with_solve(s.cfg, adapt_steps=8, adapt_lr=0.05)
    encode, asked = solve.encoder_of(cfg.model), questions(s, tasks)
    context = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0))
    base = encode.read(s.params.encoder, asked[0]).tokens.detach()

    def search(cfg, asked=asked, tokens=context):
        start = etrm.Context(tokens)
        return solve.search_context(s.params, cfg, encode, asked, start, FOREVER).tokens

    def value(added):
        moved = etrm.Context(base + added[asked[1]])
        return solve.likelihood(s.params, cfg, asked, moved, 6)[1]

    searched = search(cfg)
    before, after = value(torch.zeros(6, 4, 32)), value(searched - context)
    assert (after >= before - 1e-6).all() and (after - before).mean() > 0.01
    alone = search(cfg, questions(s, tasks[3:4]), context[3:4])
    torch.testing.assert_close(alone[0], searched[3], rtol=1e-3, atol=1e-4)
    wild = [with_solve(cfg, adapt_lr=3.0, adapt_steps=n) for n in (1, 4)]
    one, four = (value(search(c) - context) for c in wild)  # it leaps about: the best is kept
    assert (four >= one - 1e-4).all()


def test_a_task_whose_demos_cannot_be_asked_is_answered_without_adaptation(run):
    """It has one; or each output is beyond the canvas of the other, or beyond every canvas."""
    s, (task, other, *_) = solve.opened(run), tasks_of_all()
    small, tall, big = (np.ones(s, np.uint8) for s in ((3, 3), (9, 3), (12, 12)))
    one = task._replace(demos=task.demos[:1])
    cross = Task("cross", [(small, tall), (small, tall.T)], [(small, small)])
    huge = Task("huge", [(big, big), (big, big)], [(big, big)])
    for adapt, asked in (("context", one), ("full", one), ("full", cross), ("full", huge)):
        assert answers(s, asked, adapt=adapt, adapt_steps=2) == answers(s, asked)
    assert questions(s, [one]) is None and 1 not in questions(s, [other, one])[1]


def test_full_adaptation_learns_the_demos_and_touches_only_its_copy(run):
    s, task = solve.opened(run), tasks_of_all()[1]
    before = {k: v.clone() for k, v in leaves(s.params).items()}
    cfg = with_solve(s.cfg, adapt_steps=12, adapt_lr=1e-2)
    adapted = solve.adapt_weights(s.params, cfg, task, FOREVER)
    packed = data.pack([task._replace(queries=[])])
    loss = [train.probe(p, s.cfg, packed, "leave_one_out")["loss"] for p in (s.params, adapted)]
    assert loss[1] < 0.9 * loss[0]
    assert all(torch.equal(v, before[k]) for k, v in leaves(s.params).items())
    assert solve.adapt_weights(s.params, cfg, task, 0.0) is s.params  # no time
    late = time.monotonic() + 1e-3
    once = solve.adapt_weights(s.params, with_solve(cfg, adapt_steps=1), task, late)
    assert not torch.equal(once.core.embed, adapted.core.embed)


def test_time_spent_on_adaptation_is_time_spent_on_its_task(run, clock, monkeypatch):
    sets = ["solve.adapt=full", "solve.adapt_steps=2"]
    for views, seconds in ((1, 80), (3, 160), (3, 160)):  # nothing is learned for no question
        result = evaluate(run, sets=[*sets, f"solve.views={views}"])
        assert result["seconds_per_task"] == pytest.approx(seconds, rel=0.01)
    assert clock.calls["one_step"] == 2 * 2 * 6  # adapted anew for each call
    monkeypatch.setattr(train, "metrics_row", lambda sums: {"all/exact": 1.0})
    s, clock.calls["one_step"] = solve.opened(run), 0  # it ends when its demos are solved
    solve.adapt_weights(s.params, with_solve(s.cfg, adapt_steps=9), tasks_of_all()[1], FOREVER)
    assert clock.calls["one_step"] == 3


def test_a_budget_is_shared_by_cells_and_rates_fall_in_time(run, tmp_path, clock, monkeypatch):
    tasks = []
    for name, side in (("a", 2), ("b", 4)):
        x = np.arange(side * side, dtype=np.uint8).reshape(side, side) % 9
        tasks.append(Task(name, [(x, x), (x, x + 1)], [(x, None)]))  # which cannot both be right
    chosen = [as_folder(tmp_path / t.name, [t]) for t in tasks]
    sets = ["solve.adapt=full", "solve.adapt_steps=1000"]
    clock.seconds["one_step"], rates, rate = 80.0, [], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *a: rates.append(rate(*a)) or rates[-1])
    unanswered = evaluate(run, "a.jsonl", chosen, sets, budget=2000.0)["unanswered"]
    steps = [round(p.seconds / 80) for p in score.joined(tasks, score.read(Path("a.jsonl")))]
    assert unanswered == 0 and sum(steps) == clock.calls["one_step"]
    assert steps[0] == 4 and 15 < steps[1] < 20  # 4 of 20 cells: 400 s, of which 320 to learn
    assert max(rates[3], rates[-1]) < 1.1e-4 < min(rates[0], rates[4])  # it falls within the time
    clock.seconds["one_step"] = 1500.0  # one step is more than the first has
    assert evaluate(run, "b.jsonl", chosen, sets, budget=3200.0)["unanswered"] == 0


def test_adaptation_in_half_precision_moves_and_stays_finite(run, monkeypatch):
    s, task, norms, update = solve.opened(run), tasks_of_all()[1], [], train.update
    half = solve.opened(run, ["train.dtype=fp16"]).cfg
    monkeypatch.setattr(train, "update", lambda *args: norms.append(update(*args)) or norms[-1])
    for cfg in (s.cfg, half):
        cfg = with_solve(cfg, adapt_steps=1, adapt_lr=1e-2)
        adapted = solve.adapt_weights(s.params, cfg, task, FOREVER)
    assert float(norms[1]) == pytest.approx(float(norms[0]), rel=0.05)  # scaled back
    assert all(x.isfinite().all() for x in leaves(adapted).values())
    assert not torch.equal(adapted.core.embed, s.params.core.embed)
