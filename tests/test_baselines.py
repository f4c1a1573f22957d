"""TRM's table of tasks, the argmax-feedback TRM, several ACT steps in one optimizer step."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from etrm_arc import checkpoint, data, etrm, solve, train
from etrm_arc.config import Config, ModelConfig, UserError
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.etrm import Params, act_loss, fresh_carry, leaves, rebuild
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import SET, generators
from etrm_arc.tests.test_parity import batch_of, close
from etrm_arc.tests.test_train import FEEDBACK, tiny

TABLE = {"model__encoder__kind": "table", "data__symmetries": 4, "model__published": True}


@given(generators, st.integers(1, 9))
def test_a_row_is_a_task_under_one_symmetry_whoever_draws_it(g, symmetries):
    tasks = data.pack(puzzles.tasks(g, 4))
    cfg, slots = data.DataConfig(symmetries=symmetries, colours="all"), torch.arange(50)
    deck = data.deck(data.queries(tasks, cfg.query, cfg), 50)
    symmetry_of: dict[int, tuple] = {}
    for n in (0, 7):
        e = data.draw(tasks, deck, cfg, 3, slots, slots * 0 + n)
        assert torch.equal(e.row // symmetries, tasks.task_of[e.query]) and (e.row >= 0).all()
        rows = zip(e.row.tolist(), e.symmetry.dihedral, e.symmetry.colours, strict=True)
        for row, d, c in rows:
            one = (int(d), *c.tolist())
            assert symmetry_of.setdefault(row, one) == one
            assert row % symmetries or one == (0, *range(10))
    assert symmetries < 5 or len({s for r, s in symmetry_of.items() if r % symmetries}) > 3


def test_a_table_trains_only_the_rows_it_touched(tmp_path):
    cfg = tiny(tmp_path, **TABLE, train__steps=4)
    train.fit(cfg)
    c, s, slots = checkpoint.load(tmp_path), train.setup(cfg), torch.arange(6)
    touched = set(c.params.encoder.table.any(1).nonzero().flatten().tolist())
    rows = [data.draw(s.tasks, s.deck, cfg.data, 0, slots, slots * 0 + n).row for n in range(4)]
    assert set(rows[0].tolist()) <= touched <= set(torch.cat(rows).tolist())
    assert torch.equal(c.params.encoder.table, c.ema.encoder.table)  # it is not averaged


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table trained on four tasks of the set, of one of them, held out, on the demos alone."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "tasks").mkdir()
    for name in ("double", "mirror", "flip"):
        (folder / "tasks" / f"{name}.json").write_text((SET / f"{name}.json").read_text())
    sets = {"data__train": [str(folder / "tasks")], "data__held_out": [str(SET / "border.json")]}
    train.fit(tiny(folder / "run", **TABLE, **sets, data__policy="demos"))
    return folder / "run"


def evaluated(run, file, sets, folder):
    options = ["solve.views=4", *sets]
    predictions = str(folder / "p.jsonl")
    return solve.evaluate([run], [str(SET / file)], options, predictions_file=predictions)


def test_a_table_answers_tasks_whose_demos_it_was_trained_on_and_says_so(table, tmp_path):
    result = evaluated(table, "border.json", [], tmp_path)
    assert result["votes"] == 4 * result["n_queries"] and result["held_out"] is False
    assert "DEMOS of 1 held-out tasks TRAINED ON" in result["guard"]


@pytest.mark.parametrize(
    ("file", "sets", "text"),
    [
        ("transpose.json", [], "task transpose: unseen"),
        ("border.json", ["solve.views=5"], "rows for 4 symmetries"),
        ("border.json", ['solve.adapt="context"'], "no context for demos alone"),
        ("border.json", ['solve.adapt="full"'], "a table's rows"),
    ],
)
def test_what_a_table_cannot_answer_is_one_line(table, tmp_path, file, sets, text):
    with pytest.raises(UserError, match=text):
        evaluated(table, file, sets, tmp_path)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"data__symmetries": 0}, "data.symmetries"),
        ({"data__dev": [str(SET / "flip.json")], "eval__on": "dev"}, "eval.on"),
        ({"model__encoder__latent": 999}, "latent = 999"),
    ],
)
def test_a_table_refuses_what_it_cannot_be(tmp_path, options, field):
    with pytest.raises(UserError, match=field):
        train.setup(tiny(tmp_path, **TABLE | options))


def feedback(**changes):
    base = dict(hidden=32, heads=2, context_tokens=0, loss="softmax", H_cycles=3, L_cycles=2)
    return ModelConfig(**{**base, "feedback": "kept", "exploration": 0.0, **changes})


def test_the_feedback_model_has_its_published_size():
    p = init_params(feedback(hidden=512, heads=8, L_cycles=6), 0)
    assert sum(x.numel() for x in leaves(p).values()) == pytest.approx(10.5e6, rel=0.01)
    assert p.core.embed.shape == (11, 512) and p.core.head.shape == (10, 512)


def doubtful(cfg, g, halt):
    """Parameters whose halting head is `halt` times as large, in doubles: no two colours tie."""
    p = etrm.tree_map(torch.Tensor.double, init_params(cfg, puzzles.integer(g, 0, 99)))
    return p._replace(core=p.core._replace(halt=p.core.halt * halt))


def naive(p, cfg, grid):
    """One grid by itself, call by call as described, until it is surer than 0.9."""
    x = torch.where(grid >= 2, grid - 2, 10).flatten()
    at = torch.cartesian_prod(torch.arange(grid.shape[0]), torch.arange(grid.shape[1]))
    rotary = etrm.rotary_of(cfg, at + 1, p.embed.dtype)
    width = (cfg.hidden,)

    def net(s):
        for b, norm_1, norm_2 in p.blocks:
            attended = etrm.self_attention(b, cfg.heads, s, [len(x)], rotary)
            s = norm_1 * F.rms_norm(s + attended, width, eps=1e-5)
            s = norm_2 * F.rms_norm(s + etrm.swiglu(b.gate_up, b.down, s), width, eps=1e-5)
        return s

    y, z, e = torch.zeros_like(x), torch.zeros_like(x), p.embed
    for _ in range(cfg.H_cycles):
        z = torch.zeros_like(x) if cfg.feedback == "reset" else z
        for _ in range(cfg.L_cycles):
            z = (net(e[x] + e[y] + e[z]) @ p.head.T).argmax(-1)
        h = net(e[y] + e[z])
        logits, q = h @ p.head.T, (h.mean(0) @ p.halt.T).squeeze()
        y = logits.argmax(-1)
        if q.sigmoid() >= 0.9:
            break
    return logits, q


@settings(max_examples=20)
@given(generators, st.sampled_from(["reset", "kept"]), st.sampled_from([1.0, 4.0, -4.0]))
def test_feedback_is_as_described(g, kind, halt):
    """Each grid of a batch, whoever is sure before or after it; z reset or kept."""
    cfg = feedback(feedback=kind)
    p, grids = doubtful(cfg, g, halt), torch.randint(0, 12, (3, 16), generator=g)
    batch = batch_of(grids, grids)
    carry = fresh_carry(cfg, batch.cells, torch.float64)
    new, out = etrm.act_step(p, cfg, encoder_of(cfg), carry, batch, torch.zeros(3))
    for i, x in enumerate(grids):
        logits, q = naive(p.core, cfg, x.view(4, 4))
        close(out.logits[i * 16 : i * 16 + 16, 2:], logits)
        close(out.q_halt[i], q)
        assert bool(new.halted[i]) == bool(q.sigmoid() >= 0.9)
    assert (out.logits[:, :2] == -math.inf).all() and not new.z_H.requires_grad


def test_only_colours_are_asked_and_everything_learns():
    grids = torch.randint(0, 12, (4, 36), generator=torch.Generator().manual_seed(0))
    batch, cfg = batch_of(grids, grids), feedback(L_cycles=1)
    p = etrm.tree_map(torch.Tensor.requires_grad_, init_params(cfg, 1))
    carry = fresh_carry(cfg, batch.cells, torch.float32)
    out = etrm.act_step(p, cfg, encoder_of(cfg), carry, batch, None)[1]
    loss = act_loss(cfg, out, batch.labels, batch.cells)
    grads = torch.autograd.grad(loss.total.sum(), list(leaves(p).values()))
    assert all(x.isfinite().all() and x.any() for x in grads)
    right = (out.logits[:36].argmax(-1) == grids[0])[grids[0] >= 2]  # a mark does not count
    assert float(loss.cell_accuracy[0]) == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("taken", [3, 1])
def test_unrolled_steps_are_averaged_detached_and_end_together(taken):
    """Deep supervision: one gradient for several ACT steps, fewer where all slots halt before."""
    cfg = feedback(H_cycles=1, unrolled=3, halt_max_steps=taken)
    grids = torch.randint(2, 12, (3, 16), generator=torch.Generator().manual_seed(2))
    batch, like, encode = batch_of(grids, grids), init_params(cfg, 0), encoder_of(cfg)
    params = {k: v.requires_grad_() for k, v in leaves(like).items()}
    carry, least = fresh_carry(cfg, batch.cells, torch.float32), torch.zeros(3)
    s = types.SimpleNamespace(params=params, like=like, cfg=Config(model=cfg), encode=encode)
    s.dtype = torch.float32
    [after], grads, *_ = train.train_step(s, carry, batch, least, 1.0)
    assert after.halted.all() and after.steps.tolist() == [taken] * 3
    total = 0
    for _ in range(taken):
        carry, out = etrm.act_step(Params((), rebuild(like, params).core), cfg, encode, carry,
                                   batch, least)  # fmt: skip
        total = total + act_loss(cfg, out, batch.labels, batch.cells).total.sum() / taken
        carry = carry._replace(halted=torch.zeros(3, dtype=torch.bool))
    for ours, want in zip(grads, torch.autograd.grad(total, list(params.values())), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


def test_a_feedback_run_answers(tmp_path):
    rows = []
    train.fit(tiny(tmp_path / "run", **FEEDBACK, train__shards=1), rows.append)
    assert not any(k.startswith("encoder/") for r in rows for k in r)
    result = evaluated(tmp_path / "run", "border.json", [], tmp_path)
    assert result["votes"] == 4 * result["n_queries"] > 0
    with pytest.raises(UserError, match="no single context"):
        evaluated(tmp_path / "run", "border.json", ['solve.adapt="context"'], tmp_path)
