"""TRM's table of tasks, the mixer, the argmax-feedback TRM, several ACT steps in one optimizer step."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etrm_arc import baselines, checkpoint, config, data, etrm, score, show, solve, sources, train
from etrm_arc.config import ModelConfig, UserError
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.etrm import Encode, Params, act_loss, fresh_carry, leaves, rebuild
from etrm_arc.tests import puzzles
from etrm_arc.tests.kill import outcome
from etrm_arc.tests.puzzles import generators
from etrm_arc.tests.test_parity import batch_of, close
from etrm_arc.tests.test_runs import same
from etrm_arc.tests.test_train import tiny

SET = Path(__file__).parent / "data" / "set"
TABLE = {
    "model__encoder__kind": "table",
    "data__symmetries": 4,
    "model__published": True,
}

# ---------------------------------------------------------------- the table of tasks


@given(generators, st.integers(1, 9))
def test_a_row_is_a_task_under_one_symmetry_whoever_draws_it(g, symmetries):
    tasks = data.pack(puzzles.tasks(g, 4))
    cfg = data.DataConfig(symmetries=symmetries, colours="all")
    deck, slots = data.deck(data.queries(tasks, cfg.query, cfg), 50), torch.arange(50)
    seen: dict[int, str] = {}
    for n in (0, 7):
        e = data.draw(tasks, deck, cfg, 3, slots, torch.full((50,), n))
        assert torch.equal(e.row // symmetries, tasks.task_of[e.query]) and (e.row >= 0).all()
        for row, d, c in zip(
            e.row.tolist(), e.symmetry.dihedral.tolist(), e.symmetry.colours.tolist(), strict=True
        ):
            assert seen.setdefault(row, f"{d} {c}") == f"{d} {c}"
            assert row % symmetries or (d, c) == (0, list(range(10)))
    assert symmetries < 5 or len({s for row, s in seen.items() if row % symmetries}) > 3


def test_a_table_trains_only_the_rows_it_touched_and_ends_in_the_same_bits_when_stopped(tmp_path):
    options = TABLE | {"train__log_every": 1, "eval__every": 2, "train__steps": 4}
    rows = []
    train.fit(tiny(tmp_path / "whole", **options), rows.append)
    assert all(r["encoder/grad_norm"] > 0 for r in rows if "lr" in r)
    cfg, steps = tiny(tmp_path / "pieces", **options), []
    while not steps or "stopped" in steps[-1]:
        steps.append(train.fit(cfg, resume=bool(steps), limit=-1))
    assert len(steps) == 4
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))
    c, s = checkpoint.load(tmp_path / "whole"), train.setup(cfg)
    [touched] = [c.params.encoder.table.any(1).nonzero().flatten()]
    drawn = [
        data.draw(s.tasks, s.deck, cfg.data, 0, torch.arange(6), torch.full((6,), n)).row
        for n in range(4)
    ]
    assert set(touched.tolist()) <= set(torch.cat(drawn).tolist()) and set(touched.tolist()) >= set(
        drawn[0].tolist()
    )
    assert torch.equal(c.params.encoder.table, c.ema.encoder.table)  # it is not averaged
    assert "train/ema/foreign/loss" in rows[-1] and rows[-1]["gap/own_foreign/loss"] != 0


def test_equal_rows_are_summed_before_their_sign_and_others_stay():
    table = torch.ones(5000, 3)
    batch = batch_of(torch.zeros(3, 1), torch.zeros(3, 1))._replace(
        rows=torch.tensor([4097, 3000, 4097])
    )
    grads = torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, -1.0], [-2.0, -1.0, 3.0]])
    parts = [
        baselines.spread(
            torch.tensor([0, 2]), batch._replace(rows=batch.rows[[0, 2]]), grads[[0, 2]], 3
        ),
        baselines.spread(torch.tensor([1]), batch._replace(rows=batch.rows[[1]]), grads[[1]], 3),
    ]
    baselines.sign_step(table, *train.reduce(parts), lr=0.1, decay=0.5)
    want = torch.ones(5000, 3)
    want[4097], want[3000] = torch.tensor([1.05, 1.05, 0.85]), torch.tensor([0.95, 0.85, 1.05])
    torch.testing.assert_close(table, want)


def test_gradients_of_rows_are_those_of_the_whole_table(tmp_path):
    cfg = tiny(tmp_path, **TABLE, train__shards=1)
    s = train.setup(cfg)
    s.params[baselines.TABLE].normal_()
    [slots] = s.shards
    step = train.one_step(s, cfg, [train.start_carry(s, cfg, slots)])
    rows, ids = step.touched
    carry, batch, least = train.next_batch(s, cfg, slots, train.start_carry(s, cfg, slots))
    whole = s.params | {baselines.TABLE: s.params[baselines.TABLE].clone().requires_grad_()}
    out = etrm.act_step(rebuild(s.like, whole), cfg.model, s.encode, carry, batch, least)[1]
    dense = torch.autograd.grad(
        act_loss(cfg.model, out, batch.labels, batch.cells).total.mean(), whole[baselines.TABLE]
    )[0]
    found = torch.zeros_like(dense).index_add_(0, (ids[:, 0] * 4096 + ids[:, 1]).long(), rows)
    torch.testing.assert_close(found, dense)
    assert dense.any()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Trained on the set but for one task, of which only the demos, and without another."""
    folder, data_folder = tmp_path_factory.mktemp("table"), tmp_path_factory.mktemp("tasks")
    for name in ("double", "mirror", "flip"):
        (data_folder / f"{name}.json").write_text((SET / f"{name}.json").read_text())
    held_out = {
        "data__train": [str(data_folder)],
        "data__held_out": [str(SET / "border.json")],
        "data__policy": "demos",
    }
    train.fit(tiny(folder / "run", **TABLE, **held_out))
    return folder / "run"


def test_a_table_answers_tasks_whose_demos_it_was_trained_on_and_says_so(table, tmp_path):
    found = solve.evaluate(
        [table],
        [str(SET / "border.json")],
        ["solve.views=4"],
        predictions_file=str(tmp_path / "p.jsonl"),
    )
    assert found["votes"] == 4 * found["n_queries"] and found["held_out"] is False
    assert "DEMOS of 1 held-out tasks TRAINED ON" in found["guard"]


@pytest.mark.parametrize(
    ("file", "sets", "said"),
    [
        ("transpose", [], "task transpose: unseen: the table has rows for the 4 tasks"),
        ("border", ["solve.views=5"], "--views 5: the table has rows for 4 symmetries"),
        (
            "border",
            ["solve.views=4", 'solve.adapt="context"'],
            "a model with a table of tasks has no context for demos alone",
        ),
        (
            "border",
            ["solve.views=4", 'solve.adapt="full"'],
            "solve.adapt: a table's rows are its tasks'",
        ),
    ],
)
def test_what_a_table_cannot_answer_is_one_line(table, tmp_path, file, sets, said):
    with pytest.raises(UserError) as e:
        solve.evaluate(
            [table],
            [str(SET / f"{file}.json")],
            ["solve.views=2", *sets],
            predictions_file=str(tmp_path / "p.jsonl"),
        )
    assert str(e.value).startswith(said)


def test_a_page_of_a_table_shows_its_answers_without_steps(table, tmp_path):
    solve.evaluate([table], [str(SET / "border.json")], ["solve.views=2"])
    page = show.page(table, [str(SET / "border.json")])
    assert [row["task"] for row in page["gallery"]] == ["border"]


@pytest.mark.parametrize("how", [{r"core\..*": 0}, {r"core\..*": 9}])
def test_rows_can_be_trained_alone(tmp_path, how):
    options = TABLE | {
        "eval__on": "train",
        "data__dev": (),
        "optimizer__freeze": how,
    }
    cfg = tiny(tmp_path, **options)
    before = train.setup(cfg).params
    train.fit(cfg)
    after = etrm.leaves(checkpoint.load(tmp_path / "last.safetensors").params)
    assert torch.equal(before["core.embed"], after["core.embed"]) and after["encoder.table"].any()


def test_views_are_the_symmetries_of_the_rows(table, monkeypatch):
    s, seen = solve.opened(table), []
    [task] = sources.load([str(SET / "border.json")])
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda tasks, e, *a: seen.append(e) or batch(tasks, e, *a))
    list(solve.predictions(s.params, s.cfg, [task], range(4)))
    names = [t.name for t in sources.prepare(s.cfg.data)[0]]
    assert seen[0].row.tolist() == [names.index("border#demos") * 4 + k for k in range(4)] * len(
        task.queries
    )
    k = torch.arange(4)
    want = data.row_symmetry(s.cfg.data, 0, k * 0 + names.index("border#demos"), k)
    assert torch.equal(seen[0].symmetry.colours[:4], want.colours) and torch.equal(
        seen[0].symmetry.dihedral[:4], want.dihedral
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data__symmetries": 0}, "data.symmetries: a table needs"),
        (
            {"data__dev": [str(SET / "flip.json")], "eval__on": "dev"},
            "eval.on: a table has no row for the dev split",
        ),
        (
            {"model__encoder__latent": 999},
            "a row of the table has latent = 999 numbers, at most 128",
        ),
        ({"model__context_tokens": 0}, "model.context_tokens: must be at least 1"),
        ({"model__feedback": "kept"}, "model.feedback: has no context"),
    ],
)
def test_regimes_refuse_what_they_cannot_be(tmp_path, options, said):
    with pytest.raises(UserError) as e:
        train.setup(tiny(tmp_path, **TABLE | options))
    assert said in str(e.value)


# ---------------------------------------------------------------- the mixer


# ---------------------------------------------------------------- the argmax-feedback TRM


def feedback(**changes):
    base = dict(
        hidden=32,
        heads=2,
        context_tokens=0,
        loss="softmax",
        H_cycles=3,
        L_cycles=2,
        feedback="kept",
        exploration=0.0,
    )
    return ModelConfig(**{**base, **changes})


def test_the_feedback_model_has_the_parameters_it_is_said_to_have():
    p = init_params(feedback(hidden=512, heads=8, L_cycles=6), 0)
    assert sum(x.numel() for x in leaves(p).values()) == pytest.approx(10.5e6, rel=0.01)
    assert (
        p.core.blocks[0].block.down.shape == (512, 2731)
        and p.core.embed.shape == (11, 512)
        and p.core.head.shape == (10, 512)
    )
    assert not any("bias" in k for k in leaves(p))


def doubtful(cfg, g, halt=1.0):
    """Parameters whose halting head is `halt` times as large; of doubles, so that no two colours are as likely."""
    p = etrm.tree_map(torch.Tensor.double, init_params(cfg, puzzles.integer(g, 0, 99)))
    return p._replace(core=p.core._replace(halt=p.core.halt * halt))


def naive(p, cfg, grid, reset):
    """One grid by itself, all calls of the net one after the other, as described, until it is surer than 0.9."""
    x = torch.where(grid >= 2, grid - 2, 10).flatten()
    at = torch.cartesian_prod(torch.arange(grid.shape[0]), torch.arange(grid.shape[1]))
    turn = etrm.rotary_of(at + 1, cfg.heads, cfg.hidden // cfg.heads, p.embed.dtype)

    def net(s):
        for b in p.blocks:
            q = etrm.self_attention(
                b.block.qkv, b.block.o, cfg.heads, s, [(1, len(x), False)], turn
            )
            s = b.norm_1 * torch.nn.functional.rms_norm(s + q, s.shape[-1:], eps=1e-5)
            s = b.norm_2 * torch.nn.functional.rms_norm(
                s + etrm.swiglu(b.block.gate_up, b.block.down, s), s.shape[-1:], eps=1e-5
            )
        return s

    y, z, e = torch.zeros_like(x), torch.zeros_like(x), p.embed
    for _ in range(cfg.H_cycles):
        z = torch.zeros_like(x) if reset else z
        for _ in range(cfg.L_cycles):
            z = (net(e[x] + e[y] + e[z]) @ p.head.T).argmax(-1)
        h = net(e[y] + e[z])
        logits = h @ p.head.T
        y, q = logits.argmax(-1), (h.mean(0) @ p.halt.T).squeeze()
        if q.sigmoid() >= 0.9:
            break
    return logits, q


HALTS = st.sampled_from([1.0, 4.0, -4.0])  # never sure, and sure at times


@settings(max_examples=20)
@given(generators, st.sampled_from(["reset", "kept"]), HALTS)
def test_feedback_is_as_described(g, kind, halt):
    cfg = feedback(feedback=kind)
    p = doubtful(cfg, g, halt)
    grids = torch.randint(0, 12, (2, 16), generator=g)
    batch = batch_of(grids, grids)
    carry = fresh_carry(cfg, batch.cells, torch.float64)
    new, out = etrm.act_step(p, cfg, encoder_of(cfg), carry, batch, None)
    for i, x in enumerate(grids):
        logits, q = naive(p.core, cfg, x.view(4, 4), kind == "reset")
        close(out.logits[i * 16 : i * 16 + 16, 2:], logits)
        close(out.q_halt[i], q)
    assert (out.logits[:, :2] == -math.inf).all() and not new.z_H.requires_grad


@settings(max_examples=10)
@given(generators, st.sampled_from(["reset", "kept"]), HALTS)
def test_a_grid_alone_is_the_grid_in_the_batch(g, kind, halt):
    """Its answer, the step at which it is sure and leaves, and its gradient, whoever is sure before or after it."""
    cfg = feedback(feedback=kind)
    p, encode = doubtful(cfg, g, halt), encoder_of(cfg)
    grids = torch.randint(2, 12, (4, 9), generator=g)

    def thought(grids, leave):
        batch, said = batch_of(grids, grids), []
        out, spent = etrm.think(
            p,
            cfg,
            encode,
            batch,
            torch.float64,
            2,
            leave,
            lambda step, slots, out: said.append(out.q_halt),
        )
        return out.logits[:, 2:].split(batch.cells), out.q_halt, spent, said[0]

    def slopes(grids, slot):
        batch, params = (
            batch_of(grids, grids),
            etrm.tree_map(lambda x: x.clone().requires_grad_(), p),
        )
        out = etrm.act_step(
            params,
            cfg,
            encode,
            fresh_carry(cfg, batch.cells, torch.float64),
            batch,
            torch.zeros(len(grids)),
        )[1]
        return torch.autograd.grad(
            act_loss(cfg, out, batch.labels, batch.cells).total[slot], list(leaves(params).values())
        )

    for leave in ("never", "q"):
        together = thought(grids, leave)
        for i in range(4):
            alone = thought(grids[i : i + 1], leave)
            close(together[0][i], alone[0][0])
            close(together[1][i], alone[1][0])
            assert (
                together[2][i]
                == alone[2][0]
                == (1 if leave == "q" and together[3][i].sigmoid() >= 0.9 else 2)
            )
    slot = puzzles.integer(g, 0, 3)
    for ours, mine in zip(slopes(grids, slot), slopes(grids[slot : slot + 1], 0), strict=True):
        close(ours, mine)


def test_resetting_z_makes_a_difference_and_only_colours_are_asked():
    g = torch.Generator().manual_seed(0)
    grids = torch.randint(0, 12, (4, 36), generator=g)
    batch, said = batch_of(grids, grids), []
    for kind in ("reset", "kept"):
        cfg = feedback(feedback=kind, L_cycles=1)
        p = init_params(cfg, 1)
        for v in leaves(p).values():
            v.requires_grad_()
        out = etrm.act_step(
            p, cfg, encoder_of(cfg), fresh_carry(cfg, batch.cells, torch.float32), batch, None
        )[1]
        said.append(out.logits)
        loss = act_loss(cfg, out, batch.labels, batch.cells)
        assert loss.total.isfinite().all()
        grads = torch.autograd.grad(loss.total.sum(), list(leaves(p).values()))
        assert all(x.isfinite().all() and x.any() for x in grads)
        assert float(loss.cell_accuracy[0]) == pytest.approx(
            float((out.logits[:36].argmax(-1) == grids[0])[grids[0] >= 2].float().mean())
        )  # a mark is neither right nor wrong
    assert not torch.equal(*said)


def test_feedback_ends_when_all_are_sure(monkeypatch):
    cfg = feedback(halt_max_steps=4)
    p = init_params(cfg, 0)
    batch = batch_of(torch.full((2, 9), 3), torch.full((2, 9), 3))
    carry, calls = fresh_carry(cfg, batch.cells, torch.float32), []
    block = baselines.block
    monkeypatch.setattr(baselines, "block", lambda *a: calls.append(1) or block(*a))
    for halt, halts, nets in ((0.0, False, 9), (100.0, True, 3)):
        core, direction = p.core, naive(p.core, feedback(H_cycles=1), torch.full((3, 3), 3), False)
        sure = core._replace(
            halt=torch.zeros_like(core.halt) if not halt else direction[1].sign() * halt * core.halt
        )
        calls.clear()
        new, out = etrm.act_step(
            Params((), sure), cfg, encoder_of(cfg), carry, batch, torch.zeros(2)
        )
        assert new.halted.tolist() == [halts, halts] and len(calls) == nets * cfg.layers
        assert bool((out.q_halt >= etrm.SURE).all()) == halts


@pytest.mark.parametrize("taken", [3, 1])
def test_unrolled_steps_are_averaged_detached_and_end_together(taken):
    """Deep supervision: one gradient for up to so many ACT steps, fewer where all slots halt before."""
    cfg = feedback(H_cycles=1, unrolled=3, halt_max_steps=taken)
    g = torch.Generator().manual_seed(2)
    grids = torch.randint(2, 12, (3, 16), generator=g)
    batch, like = batch_of(grids, grids), init_params(cfg, 0)
    params = {k: v.requires_grad_() for k, v in leaves(like).items()}
    carry = fresh_carry(cfg, batch.cells, torch.float32)
    after, grads, _, _ = train.train_step(
        params, like, cfg, encoder_of(cfg), torch.float32, carry, batch, torch.zeros(3), 1.0
    )
    assert after.halted.all() and after.steps.tolist() == [taken] * 3
    total = 0
    for _ in range(taken):
        carry, out = etrm.act_step(
            rebuild(like, params), cfg, encoder_of(cfg), carry, batch, torch.zeros(3)
        )
        total = total + act_loss(cfg, out, batch.labels, batch.cells).total.sum() / taken
        carry = carry._replace(halted=torch.zeros(3, dtype=torch.bool))
    for ours, want in zip(grads, torch.autograd.grad(total, list(params.values())), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


SHAPE = {
    "hidden": 32,
    "heads": 2,
    "context_tokens": 0,
    "feedback": "reset",
    "H_cycles": 1,
    "L_cycles": 1,
    "loss": "softmax",
}
FEEDBACK = {
    "model": {**SHAPE, "halt_max_steps": 3, "unrolled": 3, "exploration": 0.0},
    "optimizer__freeze": {}, "optimizer__kind": "adamw", "train__shards": 1,
}  # fmt: skip


def test_a_feedback_run_stops_resumes_and_answers(tmp_path):
    rows = []
    train.fit(tiny(tmp_path / "whole", **FEEDBACK), rows.append)
    assert (
        not any(k.startswith("encoder/") for r in rows for k in r) and rows[0]["core/grad_norm"] > 0
    )
    cfg, steps = tiny(tmp_path / "pieces", **FEEDBACK), []
    while not steps or "stopped" in steps[-1]:
        steps.append(train.fit(cfg, resume=bool(steps), limit=-1))
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))
    found = solve.evaluate(
        [tmp_path / "whole"],
        [str(SET)],
        ["solve.views=2"],
        predictions_file=str(tmp_path / "p.jsonl"),
    )
    cast = [v for p in score.read(tmp_path / "p.jsonl") for v in p.votes]
    assert found["votes"] == len(cast) > 0 and all(
        v.grid is not None for v in cast
    )  # it fills its canvas
    task = sources.load([str(SET / "border.json")])[0]
    s = solve.opened(tmp_path / "whole")
    assert all(np.isfinite(step.entropy) for step in show.timeline(s.params, s.cfg, task).steps)
    assert (
        show.page(tmp_path / "whole", [str(SET)])["space"]["said"]
        == "this system reads no demos: no contexts"
    )
    with pytest.raises(UserError, match="no one context to search"):
        solve.evaluate(
            [tmp_path / "whole"],
            [str(SET)],
            ['solve.adapt="context"'],
            predictions_file=str(tmp_path / "q.jsonl"),
        )


def test_feedback_lowers_its_loss_though_no_call_that_sees_the_input_is_trained(tmp_path):
    """Why it learns little by heart: hard predictions pass no gradient on, and the last call reads y and z alone."""
    options = FEEDBACK | {
        "data__dihedral": False,
        "data__colours": "fixed",
        "data__translate": False,
        "optimizer__weight_decay": 0.0,
    }
    rows = []
    train.fit(
        tiny(
            tmp_path,
            **options,
            train__steps=40,
            train__log_every=20,
            eval__every=40,
            train__save_every=99,
        ),
        rows.append,
    )
    losses = [r["all/lm_loss"] for r in rows if "lr" in r]
    assert losses[1] < losses[0] - 0.2
    before = train.setup(tiny(tmp_path, **options)).params["core.embed"]
    after = checkpoint.load(tmp_path / "last.safetensors").params.core.embed
    assert torch.equal(after[10], before[10]) and not torch.equal(
        after[:10], before[:10]
    )  # what only the input holds


def test_encode_of_a_regime_is_a_step():
    assert (
        isinstance(encoder_of(feedback()), Encode)
        and encoder_of(feedback()).step is baselines.feedback_step
    )
    assert config.load_config("cpu").model.feedback == ""
