"""Adaptation to a task: from its demos alone, on a copy of the weights, within its time, and called what it is."""

import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from etrm_arc import checkpoint, data, etrm, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.data import Task
from etrm_arc.etrm import leaves
from etrm_arc.tests.puzzles import SET, lines, tasks_of_all, told, with_solve


def questions(s, tasks, rows=None):
    rows = list(range(len(tasks))) if rows is None else rows
    lots = torch.arange(9).expand(len(rows), -1) / 9
    return solve.ask_demos(
        tasks, rows, (data.identity(len(rows)), lots), s.cfg, torch.device("cpu")
    )


def test_demos_are_asked_from_the_others_only(run):
    s, tasks = solve.opened(run), tasks_of_all()
    asked = questions(s, tasks, [2, 0, 2])
    counts = [len(tasks[t].demos) for t in (2, 0, 2)]
    assert torch.bincount(asked.owner).tolist() == counts
    d = asked.batch.demos
    assert torch.bincount(d.owner).tolist() == [n - 1 for n in counts for _ in range(n)]
    inputs, shown = asked.batch.inputs.split(asked.batch.cells), d.inputs.split(d.cells)
    for i in range(len(inputs)):
        seen = [x[x > 1] for x, o in zip(shown, d.owner.tolist(), strict=True) if o == i]
        assert not any(torch.equal(x, inputs[i][inputs[i] > 1]) for x in seen)


def test_a_search_makes_no_demo_less_likely_and_rows_know_nothing_of_each_other(run):
    s, tasks = solve.opened(run), tasks_of_all()
    cfg = with_solve(s.cfg, adapt_steps=8, adapt_lr=0.05)
    encode = solve.encoder_of(cfg.model)
    asked = questions(s, tasks)
    context = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0))
    base = encode.read(s.params.encoder, asked.batch).tokens.detach()

    def search(cfg, asked=asked, context=context):
        return solve.search(
            s.params, cfg, encode, asked, etrm.Context(context), float("inf")
        ).tokens

    def score(added):
        return solve.likelihood(s.params, cfg, asked, etrm.Context(base + added[asked.owner]), 6)[1]

    found = search(cfg)
    before, after = score(torch.zeros(6, 4, 32)), score(found - context)
    assert (after >= before - 1e-6).all() and (after - before).mean() > 0.01
    assert torch.equal(*(search(with_solve(cfg, adapt_lr=lr)) for lr in (0.0, 0.1)))
    alone = search(cfg, questions(s, tasks, [3]), context[3:4])
    torch.testing.assert_close(alone[0], found[3], rtol=1e-3, atol=1e-4)
    scores = []
    for steps in (1, 3, 6):  # of a search that leaps about, the best step is kept
        scores.append(score(search(with_solve(cfg, adapt_lr=3.0, adapt_steps=steps)) - context))
    assert (scores[1] >= scores[0] - 1e-4).all() and (scores[2] >= scores[1] - 1e-4).all()


def test_a_single_demo_is_joined_by_its_symmetric_copies(run):
    s, task = solve.opened(run), tasks_of_all()[0]
    one = task._replace(demos=task.demos[:1])
    copies = solve.several(one).demos
    assert (
        len(copies) == 1 + solve.COPIES and len({x.tobytes() + y.tobytes() for x, y in copies}) > 1
    )
    assert {sources.pair_digest(pair) for pair in copies} == {sources.pair_digest(one.demos[0])}
    assert solve.several(task).demos == task.demos and solve.several(task).queries == []
    for how in ("context", "full"):
        cfg = with_solve(s.cfg, adapt=how, adapt_steps=2, adapt_batch=2)
        assert len(solve.predict(s.params, cfg, one, 2)[0].votes) == 2


def test_full_adaptation_learns_the_demos_and_touches_only_its_copy(run):
    s, task = solve.opened(run), tasks_of_all()[1]
    before = {k: v.clone() for k, v in leaves(s.params).items()}
    cfg = with_solve(s.cfg, adapt_steps=12, adapt_lr=1e-2, adapt_batch=8)
    own = solve.tuned(s.params, cfg, task, float("inf"))
    odd = msgspec.structs.replace(
        cfg, data=msgspec.structs.replace(cfg.data, turn_outputs=1.0, min_demos=1)
    )
    again = solve.tuned(
        s.params, odd, task, float("inf")
    )  # asks the task's own rule, from all its demos
    assert all(
        torch.equal(x, y)
        for x, y in zip(etrm.leaves(own).values(), etrm.leaves(again).values(), strict=True)
    )
    packed = data.pack([solve.several(task)])
    loss = [
        train.probe(p, s.cfg, packed, "leave_one_out", torch.float32)["loss"]
        for p in (s.params, own)
    ]
    assert loss[1] < 0.9 * loss[0]
    assert all(torch.equal(v, before[k]) for k, v in leaves(s.params).items())
    part = solve.tuned(
        s.params,
        with_solve(cfg, adapt_weights=r"core\.embed|encoder\..*", adapt_steps=2),
        task,
        float("inf"),
    )
    changed = {k for k, v in leaves(part).items() if not torch.equal(v, before[k])}
    assert changed and all(k == "core.embed" or k.startswith("encoder.") for k in changed)
    assert "core.embed" in changed
    assert solve.tuned(s.params, cfg, task, 0.0) is s.params  # no time
    once = solve.tuned(s.params, with_solve(cfg, adapt_steps=1), task, time.monotonic() + 1e-3)
    assert not torch.equal(once.core.embed, own.core.embed)


def test_a_task_whose_demos_cannot_be_asked_is_answered_without_adaptation(run, tmp_path):
    """Each output is beyond the canvas of the other; or beyond every canvas."""
    small, tall, big = (
        np.ones((3, 3), np.uint8),
        np.ones((9, 3), np.uint8),
        np.ones((12, 12), np.uint8),
    )
    raw = {"cross": [(small, tall), (small, tall.T)], "huge": [(big, big), (big, big)]}
    for name, demos in raw.items():
        task = {
            "train": [{"input": x.tolist(), "output": y.tolist()} for x, y in demos],
            "test": [{"input": demos[0][0].tolist()}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    sets, file = (
        ["solve.adapt=full", "solve.adapt_steps=2"],
        str(tmp_path / "predictions.jsonl"),
    )  # which is no task
    result = solve.evaluate([run], [str(tmp_path)], sets, predictions_file=file)
    assert result["votes"] == 3 and result["too_large"] == 1 and result["unanswered"] == 1
    s = solve.opened(run)
    assert (
        lines(Path(file))[0][2]
        == told(solve.predict(s.params, s.cfg, sources.load([str(tmp_path / "cross.json")])))[0][2]
    )


def test_what_needs_all_of_a_step_is_adapted_in_one_shard(run):
    cfg = solve.opened(run).cfg
    assert solve.recipe(cfg).train.shards == 4
    encoder = msgspec.structs.replace(cfg.model.encoder, kind="variational", published=True)
    assert (
        solve.recipe(
            msgspec.structs.replace(cfg, model=msgspec.structs.replace(cfg.model, encoder=encoder))
        ).train.shards
        == 1
    )


def test_time_spent_on_adaptation_is_time_spent_on_its_task(run, tmp_path, monkeypatch):
    clock = [0.0]
    one_step = train.one_step

    def slow(*args):
        clock[0] += 40
        return one_step(*args)

    monkeypatch.setattr(train, "one_step", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for how, steps in (("full", 2 * 6), ("joint", 2)):
        sets = [f"solve.adapt={how}", "solve.adapt_steps=2"]
        result = solve.evaluate(
            [run], [str(SET)], sets, predictions_file=str(tmp_path / f"{how}.jsonl")
        )
        assert result["seconds_per_task"] == pytest.approx(40 * steps / 6, rel=0.01)
    first, more = (
        [f"solve.adapt={how}", "solve.adapt_steps=2", f"solve.views={n}"]
        for how, n in (("full", 1), ("full", 3))
    )
    for sets, times in ((first, 1), (more, 2)):  # adapted anew for each call
        result = solve.evaluate(
            [run], [str(SET)], sets, predictions_file=str(tmp_path / "more.jsonl")
        )
        assert result["seconds_per_task"] == pytest.approx(times * 40 * 2, rel=0.01)
    late = ["solve.adapt=full", "solve.adapt_steps=100"]
    file = str(tmp_path / "late.jsonl")
    begun = clock[0]
    part = solve.evaluate([run], [str(SET)], late, predictions_file=file, budget=1200.0)
    assert (
        part["unanswered"] == 0 and clock[0] - begun <= 1200
    )  # each task had its share of the time
    joint = solve.evaluate(
        [run],
        [str(SET)],
        ["solve.adapt=joint", "solve.adapt_steps=100"],
        predictions_file=file,
        budget=600.0,
    )
    assert (
        joint["unanswered"] == 0 and 480 <= joint["seconds_per_task"] * 6 <= 560
    )  # four fifths, and the steps under way


def test_shares_of_a_budget_go_by_cells_and_one_that_is_overdrawn_is_answered(
    run, tmp_path, monkeypatch
):
    clock, price, one_step = [0.0], [40.0], train.one_step
    steps: list[int] = []

    def slow(*args):
        clock[0] += price[0]
        steps[-1] += 1
        return one_step(*args)

    def counted(*args, tuned=solve.tuned):
        steps.append(0)
        return tuned(*args)

    monkeypatch.setattr(train, "one_step", slow)
    monkeypatch.setattr(solve, "tuned", counted)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for name, side in (("a", 2), ("b", 4)):
        x = np.arange(side * side).reshape(side, side) % 9
        demos = [
            {"input": x.tolist(), "output": (x + k).tolist()} for k in (0, 1)
        ]  # which cannot both be right
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"train": demos, "test": [{"input": x.tolist()}]})
        )
    sets, tasks = (
        ["solve.adapt=full", "solve.adapt_steps=1000"],
        [str(tmp_path / f"{name}.json") for name in "ab"],
    )
    part = solve.evaluate(
        [run], tasks, sets, predictions_file=str(tmp_path / "first.jsonl"), budget=2000.0
    )
    assert (
        part["unanswered"] == 0 and steps[0] == 9 and 30 < steps[1] < 40
    )  # 4 of 20 cells: 400 s, of which 320 to learn
    price[0] = 1500.0  # one step is more than the first has
    assert (
        solve.evaluate(
            [run], tasks, sets, predictions_file=str(tmp_path / "more.jsonl"), budget=3200.0
        )["unanswered"]
        == 0
    )


def test_gradients_of_a_search_are_those_of_all_steps_together(run):
    s, tasks = solve.opened(run), tasks_of_all()
    asked = questions(s, tasks)
    context = torch.randn(
        len(asked.owner), 4, 32, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    got, _ = solve.likelihood(s.params, s.cfg, asked, etrm.Context(context), 6)
    carry, total = etrm.fresh_carry(s.cfg.model, asked.batch.cells, torch.float32), torch.zeros(())
    for _ in range(s.cfg.model.halt_max_steps):
        carry, out = etrm.act_step(
            s.params, s.cfg.model, solve.given(etrm.Context(context)), carry, asked.batch, None
        )
        total = (
            total
            + -etrm.per_slot(
                torch.where(
                    asked.batch.labels >= 0,
                    etrm.log_prob(s.cfg.model, out.logits).gather(
                        -1, asked.batch.labels.clamp(min=0)[:, None]
                    )[:, 0],
                    0.0,
                ),
                asked.batch.cells,
            )
            .div(etrm.per_slot(asked.batch.labels >= 0, asked.batch.cells))
            .sum()
        )
    torch.testing.assert_close(got, torch.autograd.grad(total, context)[0], rtol=1e-4, atol=1e-6)
    assert got.abs().max() > 1e-4


def test_adaptation_in_half_precision_moves_and_stays_finite(run, monkeypatch):
    s, task = solve.opened(run, ["train.dtype=fp16"]), tasks_of_all()[1]
    cfg, norms, update = (
        with_solve(s.cfg, adapt_steps=3, adapt_lr=1e-2, adapt_batch=4),
        [],
        solve.update,
    )
    monkeypatch.setattr(solve, "update", lambda *args: norms.append(update(*args)) or norms[-1])
    plain = with_solve(solve.opened(run).cfg, adapt_steps=1, adapt_lr=1e-2, adapt_batch=4)
    solve.tuned(s.params, plain, task, float("inf"))
    own = solve.tuned(s.params, cfg, task, float("inf"))
    assert float(norms[1]) == pytest.approx(
        float(norms[0]), rel=0.05
    )  # what was scaled is scaled back
    assert all(x.isfinite().all() for x in leaves(own).values()) and not torch.equal(
        own.core.embed, s.params.core.embed
    )
    half, encode = etrm.tree_map(torch.Tensor.half, s.params), solve.encoder_of(cfg.model)
    zeros = torch.zeros(1, 4, 32)
    found = solve.search(
        half, cfg, encode, questions(s, [task]), etrm.Context(zeros.half()), float("inf")
    ).tokens
    full = solve.search(
        s.params, cfg, encode, questions(s, [task]), etrm.Context(zeros), float("inf")
    ).tokens
    torch.testing.assert_close(found.float(), full, rtol=0.1, atol=5e-3)
    assert full.abs().max() > 0.01


def test_full_adaptation_ends_when_its_demos_are_solved(run, monkeypatch):
    s, task, count = solve.opened(run), tasks_of_all()[1], []
    one_step = train.one_step

    def solved(*args):
        carries, grads, sums, *more = one_step(*args)
        count.append(1)
        sums[0, train.SUMS.index("exact")] = sums[0, -1]
        return carries, grads, sums, *more

    monkeypatch.setattr(train, "one_step", solved)
    solve.tuned(s.params, with_solve(s.cfg, adapt_steps=9, adapt_batch=2), task, float("inf"))
    assert len(count) == 3


def test_joint_adaptation_is_a_run_that_goes_on_and_is_called_transductive(
    run, tmp_path, monkeypatch
):
    sets, file = (
        ['solve.adapt="joint"', "solve.adapt_steps=3", "solve.adapt_batch=6"],
        tmp_path / "p.jsonl",
    )
    result = solve.evaluate([run], [str(SET)], sets, predictions_file=str(file))
    assert "TRANSDUCTIVE" in result["adaptation"] and result["votes"] == 18
    [folder] = tmp_path.glob("joint-*")
    c = checkpoint.load(folder / "last.safetensors")
    assert c.meta["step"] == 3 and not torch.equal(
        c.params.core.embed, solve.opened(run).params.core.embed
    )
    file.unlink()
    with monkeypatch.context() as m:
        m.setattr(train, "train_step", None)  # the weights are there: none is trained again
        assert solve.evaluate([run], [str(SET)], sets, predictions_file=str(file))["votes"] == 18
        parts = [
            tmp_path / f"{i}.jsonl" for i in (1, 2)
        ]  # a shard stands on the demos of all tasks, too
        for i, part in enumerate(parts, 1):
            solve.evaluate([run], [str(SET)], sets, predictions_file=str(part), shard=f"{i}/2")
    close = lambda made: [(t, [v[4] for v in vs]) for t, _, vs in sorted(made)]  # noqa: E731
    assert close(lines(file)) == close([p for part in parts for p in lines(part)])
    own = solve.evaluate(
        [run], [str(SET / "double.json")], sets, predictions_file=str(file)
    )  # other tasks: another adaptation
    assert own["votes"] == 3 and len([*tmp_path.glob("joint-*")]) == 2


def test_the_demos_weight_of_a_vote_is_the_likelihood_under_its_own_context(run):
    s, task = solve.opened(run), tasks_of_all()[1]
    [p] = solve.predict(s.params, with_solve(s.cfg, vote="demos"), task, 1)
    packed = data.pack(
        [Task("", task.demos, [(x, y) for x, y in task.demos])]
    )  # each demo asked, all of them shown
    probed = train.probe(s.params, s.cfg, packed, "test", torch.float32)
    assert p.votes[0].demos == pytest.approx(-probed["loss"], abs=1e-4)


def test_votes_of_joint_weights_that_are_gone_are_not_joined_by_others(run, tmp_path):
    sets, file = (
        ['solve.adapt="joint"', "solve.adapt_steps=2", "solve.adapt_batch=6"],
        tmp_path / "p.jsonl",
    )
    solve.evaluate([run], [str(SET)], sets, predictions_file=str(file))
    [folder] = tmp_path.glob("joint-*")
    folder.rename(tmp_path / "elsewhere")
    before = file.read_bytes()
    with pytest.raises(UserError, match="joint-.*absent, though weights that it had have voted"):
        solve.evaluate([run], [str(SET)], [*sets, "solve.views=4"], predictions_file=str(file))
    assert file.read_bytes() == before and not folder.exists()


def test_what_explains_no_demo_is_still_a_number(run, monkeypatch):
    s = solve.opened(run)
    monkeypatch.setattr(
        solve,
        "likelihood",
        lambda params, cfg, asked, said, rows: (None, torch.full((rows,), torch.nan)),
    )
    found = solve.predict(s.params, with_solve(s.cfg, vote="demos"), tasks_of_all()[:1])
    assert all(v.demos == -1e9 for p in found for v in p.votes)


def test_adaptation_trains_what_slept_in_training(run):
    s = solve.opened(run)
    asleep = msgspec.structs.replace(s.cfg.optimizer, freeze_until={r"core\..*": 1000})
    cfg = with_solve(
        msgspec.structs.replace(s.cfg, optimizer=asleep), adapt_steps=2, adapt_weights=r"core\..*"
    )
    found = solve.tuned(s.params, cfg, tasks_of_all()[0], float("inf"))
    assert not torch.equal(found.core.blocks[0].qkv, s.params.core.blocks[0].qkv)
