"""The optimizer, the dealing of slots, the step, what is watched, and the loop."""

import json
import math
import os
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etrm_arc import baselines, checkpoint, config, data, optim, sources, train
from etrm_arc.config import DataConfig, EncoderConfig, ModelConfig, UserError
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.etrm import Params, act_loss, act_step, fresh_carry, leaves, rebuild
from etrm_arc.extras import launch, report
from etrm_arc.tests import published, puzzles
from etrm_arc.tests.kill import outcome
from etrm_arc.tests.puzzles import generators
from etrm_arc.tests.test_parity import batch_of

SET = str(puzzles.SET)
TINY = {
    "data": dict(dev=[], held_out=[], train=[SET], max_side=10),
    "model": dict(hidden=32, heads=2, expansion=1.0, H_cycles=2, L_cycles=1)
    | dict(context_tokens=4, halt_max_steps=3),
    "optimizer": dict(warmup=2, lr=3e-3),
    "train": dict(batch=6, shards=2, steps=6, dtype="fp32", log_every=2, save_every=3),
    "eval": dict(on="train", every=3),
}
FEEDBACK = {  # the argmax-feedback TRM, three ACT steps in one optimizer step
    "model": dict(hidden=32, heads=2, context_tokens=0, feedback="reset", H_cycles=1, L_cycles=1)
    | dict(loss="softmax", halt_max_steps=3, unrolled=3),
    "optimizer__freeze": {},
}


def tiny(folder, **changes):
    """A config whose run takes a fraction of a second; changes as model__hidden=16."""
    raw = json.loads(json.dumps(TINY)) | {"run": {"dir": str(folder)}}
    for key, value in changes.items():
        config.override(raw, key.replace("__", "."), value, key)
    return config.parse_config(raw, "test")


def started(folder, **changes):
    s = train.setup(tiny(folder, **changes))
    return s, train.fresh_state(s).carries


def test_training_trace_of_the_published_trainer(golden):
    """Six steps of Adam-atan2, warm-up and cosine, EMA, and sign-SGD on the rows of the table."""
    t, meta = golden("trm_train_trace")
    hyper = json.loads(meta["hyper"])
    cfg = published.config(encoder=EncoderConfig(kind="table", latent=1024))
    sd = published.sub(golden("trm_core")[0], "sd.inner.")
    table = baselines.Table(sd["puzzle_emb.weights"].clone(), torch.zeros(64, 3))
    core = published.core({**sd, "q_head.bias": torch.tensor([0.25, 0.1])})
    like, decay = Params(table, core), hyper["puzzle_emb_weight_decay"]
    rate = dict(lr=hyper["lr"], warmup=hyper["lr_warmup_steps"], final_lr=hyper["lr_min_ratio"])
    rate["weight_decay"] = hyper["weight_decay"]
    opt = config.OptimizerConfig(kind="adam_atan2", clip=0.0, **rate)
    assert (hyper["beta1"], hyper["beta2"]) == optim.BETAS
    params = {
        k: v.clone().requires_grad_(k.startswith("core.") and not optim.is_asleep(opt, k, math.inf))
        for k, v in leaves(like).items()
    }
    trained = [v for v in params.values() if v.requires_grad]
    opts = optim.optimizers(opt, params)
    ema = {k: v.detach().clone() for k, v in params.items()}
    s = types.SimpleNamespace(params=params, like=like, cfg=config.Config(model=cfg))
    s.encode, s.dtype = encoder_of(cfg), torch.float32
    carry, shown = None, None
    for i in range(6):
        offered = published.sub(t, f"t{i}.batch.")
        carry = carry or fresh_carry(cfg, [36] * len(offered["inputs"]), torch.float32)
        shown = shown or offered
        for k, v in offered.items():
            new = carry.halted.view(-1, *[1] * (v.ndim - 1))
            shown = {**shown, k: torch.where(new, v, shown[k])}
        least = (t[f"t{i}.rand"] < cfg.exploration) * t[f"t{i}.randint"]
        rows = shown["puzzle_identifiers"].long()
        batch = batch_of(shown["inputs"], shown["labels"])._replace(rows=rows)
        out = train.train_step(s, carry, batch, least, 1 / 6)
        [carry], lr = out.carries, optim.learning_rate(opt, i + 1, hyper["total_steps"])
        assert abs(lr - float(t[f"t{i}.reported.lr"])) < 1e-9
        touched = baselines.spread(torch.arange(6), batch, out.grads.pop(), 6)
        share = lr / opt.lr * hyper["puzzle_emb_lr"]
        baselines.sign_step(params[baselines.TABLE], *touched, share, decay)
        optim.update(opts, trained, out.grads, lr, 0.0)
        torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - hyper["ema_rate"])
        assert torch.equal(carry.halted, t[f"t{i}.halted"])
        assert (params[baselines.TABLE][:40, :8] - t[f"t{i}.puzzle_emb_rows"]).abs().max() <= 2e-5
        for k, v in published.by_path(published.sub(t, f"t{i}.param_norm.")).items():
            assert abs(float(params[k].detach().norm() - v)) <= 2e-5 * (1 + v)
    final = t["final.inner.puzzle_emb.weights_first40"]
    assert (params[baselines.TABLE][:40] - final).abs().max() <= 2e-5
    for which, ours in (("final.inner.", params), ("final_ema.inner.", ema)):
        for k, v in published.by_path(published.sub(t, which), "inner.").items():
            if k.startswith("core."):
                assert ((ours[k] - v).abs() / (1 + v.abs())).max() <= 2e-5


@pytest.mark.parametrize("kind", ["perceiver", "variational", "trm_style", "matching"])
def test_muon_takes_matrices_and_adamw_the_rest(kind):
    cfg = ModelConfig(hidden=32, heads=2, tied_head=False, encoder=EncoderConfig(kind=kind))
    params = leaves(init_params(cfg, 0))
    params = {k: v.requires_grad_("_init" not in k) for k, v in params.items()}
    muon, adam = optim.optimizers(config.OptimizerConfig(kind="muon"), params)
    matrices = {id(p) for g in muon.param_groups for p in g["params"]}
    chosen = {k for k, p in params.items() if id(p) in matrices}
    assert all(params[k].ndim == 2 for k in chosen)
    assert not any("embed" in k or "queries" in k or "q_weight" in k for k in chosen)
    assert {k for k in params if k.endswith((".qkv", ".o", ".gate_up", ".down"))} <= chosen
    assert sum(len(g["params"]) for o in (muon, adam) for g in o.param_groups) == len(params) - 2


def test_muon_steps_as_torchs_does_and_its_updates_are_all_but_orthogonal():
    g = torch.Generator().manual_seed(3)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (1, 8)]
    start, *grads = ([torch.randn(s, generator=g) for s in shapes] for _ in range(5))

    def after(kind, *options, **fields):
        params = [p.clone().requires_grad_() for p in start]
        opt = kind([{"params": params, "weight_decay": 0.1}], 0.02, *options, **fields)
        for step in grads:
            for p, grad in zip(params, step, strict=True):
                p.grad = grad.clone()
            opt.step()
        return torch.cat([p.detach().flatten() for p in params])

    expected = after(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    for dtype, error in ((torch.bfloat16, 1e-3), (torch.float32, 4e-3)):
        assert torch.allclose(after(optim.Muon, dtype), expected, atol=error)
    both = torch.stack([grads[0][0], 1e4 * grads[0][2]])
    values = torch.linalg.svdvals(optim.orthogonal(both, torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3


def test_patterns_freeze_for_a_while_or_for_ever_and_scale(tmp_path):
    opt = config.OptimizerConfig(kind="adamw", lr_scale={r"core\.embed": 0.5})
    params = {k: torch.ones(3, requires_grad=True) for k in ("core.embed", "core.q_bias")}
    opts = optim.optimizers(opt, params)
    optim.update(opts, list(params.values()), [torch.ones(3)] * 2, 0.1, 0.0)
    steps = [1 - float(v.detach()[0]) for v in params.values()]  # with the decay of 0.1
    assert steps == pytest.approx([0.055, 0.11], rel=1e-3)
    freeze = {r"core\..*_init": 0, r"encoder\..*": 2}
    options = {"optimizer__freeze": freeze, "optimizer__kind": "adamw"}
    before = {k: v.detach().clone() for k, v in train.setup(tiny(tmp_path)).params.items()}
    for steps, frozen in ((2, ("encoder.", "_init")), (3, ("_init",))):
        train.fit(tiny(tmp_path, train__steps=steps, **options), resume=steps > 2)
        trained = checkpoint.load(tmp_path / "last.safetensors").params
        for k, v in leaves(trained).items():
            assert torch.equal(v, before[k]) == any(name in k for name in frozen), k


def test_a_pattern_that_means_nothing_is_refused(tmp_path):
    for key, words in {"a": "no parameter", ".*": "nothing is left", "(.*)*x": "too many"}.items():
        with pytest.raises(UserError, match=words):
            train.setup(tiny(tmp_path, optimizer__freeze={key: 0}))


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    p = torch.zeros(4, requires_grad=True)
    opt = [torch.optim.SGD([{"params": [p], "scale": 1.0}], lr=1.0)]
    norm = optim.update(opt, [p], [torch.tensor([3.0, 0, 4.0, 0])], 1.0, 1.0)
    assert float(norm) == pytest.approx(5)
    assert float(p.detach().norm()) == pytest.approx(1, rel=1e-4)
    before = p.detach().clone()
    assert math.isnan(optim.update(opt, [p], [torch.full((4,), math.nan)], 1.0, 1.0))
    assert torch.equal(p, before)


@given(generators, st.integers(1, 12), st.integers(1, 4))
def test_shards_partition_the_slots_and_share_the_work(g, slots, parts):
    packed = data.pack(puzzles.tasks(g, 6))
    deck, cfg = data.deck(data.queries(packed, "leave_one_out", DataConfig()), slots), ModelConfig()
    if slots < parts:
        with pytest.raises(UserError, match="cannot fill"):
            train.deal(deck, cfg, parts)
        return
    shards, cost = train.deal(deck, cfg, parts), train.cost_of(deck, cfg)
    assert sorted(torch.cat(shards).tolist()) == list(range(slots))
    assert all(s.tolist() == sorted(s.tolist()) for s in shards)
    load = [float(cost[s].sum()) for s in shards]
    fullest = shards[load.index(max(load))]
    assert max(load) - min(load) <= float(cost[fullest].min()) + 1e-9  # costliest slot first


def test_exploration_is_drawn_anew_at_every_act_step():
    cfg, slots = ModelConfig(exploration=0.25, halt_max_steps=5), torch.arange(4000)
    one, two = (train.min_steps(cfg, 0, slots, slots * 0, slots * 0 + step) for step in (1, 2))
    for least in (one, two):
        assert set(least.tolist()) == {0, 2, 3, 4, 5}
        assert float((least > 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(((one > 0) & (two > 0)).float().mean()) == pytest.approx(0.25**2, abs=0.02)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_noise_is_a_function_of_seed_slot_episode_and_step(seed, demos):
    slots, zeros = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    x = train.noise(32, demos, seed, slots, zeros, zeros + 1)
    assert x.shape == (50, demos, 32) and x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    some = train.noise(32, 5, seed, slots[7:9], zeros[:2], zeros[:2] + 1)
    assert torch.equal(some[:, :demos], x[7:9]) and not torch.equal(x[0], x[1])
    for other, n, step in ((seed + 1, 0, 1), (seed, 1, 1), (seed, 0, 2)):
        y = train.noise(32, demos, other, slots, zeros + n, zeros + step)
        assert (y - x).abs().min(0).values.mean() > 1e-3


def test_a_slot_that_halted_begins_its_next_episode(tmp_path, monkeypatch):
    drawn = []

    def min_steps(cfg, seed, slots, n, step):
        drawn.append((n, step.tolist()))
        return torch.zeros(len(slots))

    monkeypatch.setattr(train, "min_steps", min_steps)
    s, [carry] = started(tmp_path, train__shards=1)
    carry, _, _ = train.next_batch(s, s.shards[0], carry)
    halted, steps = torch.tensor([True, False] * 3), torch.tensor([3, 1, 2, 2, 1, 0])
    after, _, _ = train.next_batch(s, s.shards[0], carry._replace(halted=halted, steps=steps))
    assert torch.equal(after.n, carry.n + halted) and torch.equal(drawn[-1][0], after.n)
    assert drawn[-1][1] == [1, 2, 1, 3, 1, 1]  # of which ACT step the exploration is drawn


@given(generators, st.integers(20, 200), st.integers(1, 3))
def test_batches_of_an_evaluation_hold_so_many_tokens(g, tokens, times):
    canvas = torch.randint(0, 9, (puzzles.integer(g, 1, 12), 2), generator=g)
    cfg, need = ModelConfig(context_tokens=4), (4 + canvas.prod(1)) * times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EVAL_TOKENS", tokens)
        batches = train.portions(types.SimpleNamespace(canvas=canvas), cfg, times)
    rows = sorted(torch.cat([torch.zeros(0), *batches]).tolist())
    assert rows == torch.where(canvas.prod(1) > 0)[0].tolist()
    assert all(int(need[rows].sum()) <= tokens or len(rows) == 1 for rows in batches)
    for rows, after in zip(batches, batches[1:], strict=False):  # no fewer
        assert int(need[rows].sum() + need[after[0]]) > tokens


@pytest.mark.parametrize("values", ["1", " 2", "2 2", "x 2 1 a", "5 2 1 a", "0 0 1 a", "0 2 x a"])
def test_half_of_a_launchers_environment_is_refused(tmp_path, monkeypatch, values):
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    for name, value in zip(names, values.split(" "), strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK is .*--procs"):
        train.setup(tiny(tmp_path))


def test_gradients_and_sums_of_shards_are_those_of_the_whole(tmp_path):
    steps = {}
    for shards in (1, 3):
        steps[shards] = train.one_step(*started(tmp_path, train__shards=shards))
    one, three = (torch.cat([g.flatten() for g in steps[k].grads]) for k in (1, 3))
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(steps[1].sums, steps[3].sums, rtol=1e-4, atol=1e-5)


def test_shards_side_by_side_are_shards_one_after_the_other(tmp_path, monkeypatch):
    """Weights, metrics and evaluation to the last bit, where each has one thread."""
    monkeypatch.setattr(train, "EVAL_TOKENS", 64)
    options = {"train__shards": 3, "train__steps": 3, "model__exploration": 0.5}
    for threads in (1, 3):
        monkeypatch.setattr(optim, "THREADS", threads)
        train.fit(tiny(tmp_path / str(threads), **options))
        torch.set_num_threads(1)
    assert outcome(tmp_path / "1") == outcome(tmp_path / "3")


def test_a_step_is_the_mean_of_its_slots_scaled_and_its_sums_are_theirs(tmp_path, monkeypatch):
    s, carries = started(tmp_path, train__shards=1, model__halt_max_steps=1)
    [slots] = s.shards
    carry, batch, least = train.next_batch(s, slots, carries[0])
    out = act_step(rebuild(s.like, s.params), s.cfg.model, s.encode, carry, batch, least)[1]
    loss = act_loss(s.cfg.model, out, batch.labels, batch.cells)
    expected = torch.autograd.grad(loss.total.mean(), s.params["core.embed"])[0]
    embed = [k for k, v in s.params.items() if v.requires_grad].index("core.embed")
    for scale in (1.0, 1024.0):
        grads = train.one_step(s, carries, scale).grads
        torch.testing.assert_close(grads[embed], expected, rtol=1e-4, atol=1e-7)
    halted = torch.arange(len(slots)) % 2 == 0  # only they count in the second row

    def half_halts(*args):
        carry, out = act_step(*args)
        return carry._replace(halted=halted), out

    monkeypatch.setattr(train, "act_step", half_halts)
    sums = train.one_step(s, carries).sums
    assert float(sums[1, -1]) == int(halted.sum())
    lm = train.METRICS.index("lm_loss")
    assert float(sums[0, lm]) == pytest.approx(float(loss.lm.sum()), rel=1e-5)
    assert float(sums[1, lm]) == pytest.approx(float(loss.lm[halted].sum()), rel=1e-5)


@given(generators, st.integers(1, 9), st.integers(1, 4))
def test_context_rows_are_variances_over_all_slots_however_they_are_dealt(g, slots, parts):
    c = torch.randn(slots, 3, 8, generator=g) * 2 + 5
    row = train.context_row([x for x in c.tensor_split(parts) if len(x)])
    variances = (float(c.var(i, unbiased=False).mean()) for i in (0, 1))
    names = ("encoder/context_var_across", "encoder/context_var_within")
    assert row == pytest.approx(dict(zip(names, variances, strict=True)), rel=1e-4, abs=1e-5)


def test_every_row_watches_the_encoder_and_every_evaluation_the_gaps(tmp_path):
    rows, options = [], {"data__train": ["arc1:training"], "data__max_train_tasks": 4}
    train.fit(tiny(tmp_path, data__dev=[SET], eval__on="dev", **options), rows.append)
    assert ["lr" in row for row in rows] == [True, False, True, True, False]
    for row in rows:
        if "lr" in row:
            norm = math.hypot(row["encoder/grad_norm"], row["core/grad_norm"])
            assert norm == pytest.approx(row["grad_norm"], rel=1e-4)
            assert row["encoder/context_var_across"] > 0 and 0 <= row["all/explored"] <= 1
        else:
            own, foreign = (row[f"dev/ema/{k}/cell_accuracy"] for k in ("own", "foreign"))
            assert row["gap/own_foreign/cell_accuracy"] == pytest.approx(own - foreign)
    row = train.fit(tiny(tmp_path / "single", data__max_train_tasks=1, train__steps=1))
    assert "train/ema/own/loss" in row and "train/ema/foreign/loss" not in row


def test_hidden_outputs_are_neither_trained_on_nor_probed(tmp_path):
    tasks = sources.load([SET])
    hidden = [t._replace(queries=[(x, None) for x, _ in t.queries]) for t in tasks]
    cfg = tiny(tmp_path)
    asked = data.queries(data.pack(hidden), "test", cfg.data)
    assert not asked.known.any() and asked.fits.all()
    with pytest.raises(UserError, match="no query to train on"):
        data.deck(asked, 6)
    s, mixed = train.setup(cfg), data.pack([hidden[0], *tasks[1:]])
    row = train.probe(rebuild(s.like, s.params), cfg, mixed, "test")
    assert row["n"] == 5 and math.isfinite(row["loss"])


def test_fit_learns_logs_and_leaves_a_checkpoint(tmp_path):
    cfg, rows = tiny(tmp_path, train__steps=15, eval__every=15, train__log_every=5), []
    last = train.fit(cfg, rows.append)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == rows and [r["step"] for r in rows] == [5, 10, 15, 15]
    assert rows[2]["all/lm_loss"] < rows[0]["all/lm_loss"]
    assert [r["all/count"] for r in rows[:3]] == [30] * 3 and 1 <= rows[-2]["halted/steps"] <= 3
    assert {"train/ema/own/loss", "train/ema/foreign/loss"} <= last.keys()
    c = checkpoint.load(tmp_path)
    assert c.meta["step"] == 15 and c.model == cfg.model
    assert config.parse_config(c.meta["config"], "checkpoint") == cfg


def test_the_average_follows_the_weights_and_a_scaled_loss_leaves_no_trace(tmp_path):
    norms = {}
    for dtype in ("fp32", "fp16"):
        options = {"train__dtype": dtype, "train__steps": 1, "train__log_every": 1}
        cfg, rows = tiny(tmp_path / dtype, train__ema=0.75, **options), []
        start = {k: v.detach().clone() for k, v in train.setup(cfg).params.items()}
        train.fit(cfg, rows.append)
        c = checkpoint.load(tmp_path / dtype / "last.safetensors")
        for k, mean in leaves(c.ema).items():
            torch.testing.assert_close(mean, 0.75 * start[k] + 0.25 * leaves(c.params)[k])
        norms[dtype] = rows[0]["grad_norm"]
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)


ENDS = {  # losses and exact matches of evaluations, options, the best of them
    "eval.patience": ([0.9, 0.7, 0.5, 0.45, 0.41], [0] * 5, {"eval__patience": 2}, 3),
    "eval.stop_at": ([1.0, 0.4], [0.5, 0.9], {"eval__stop_at": 0.9}, 2),
    "done": ([math.nan, 0.4, math.nan], [0] * 3, {"train__steps": 3}, 2),  # NaN is never the best
}


@pytest.mark.parametrize("end", ENDS)
def test_the_lowest_loss_is_best_and_a_run_ends_as_told(tmp_path, monkeypatch, end):
    losses, exact, options, best = ENDS[end]
    pairs = zip(losses, exact, strict=True)
    rows = iter([{"train/ema/own/loss": x, "train/ema/own/exact": y} for x, y in pairs])
    monkeypatch.setattr(train, "watch", lambda *args: next(rows))
    options = {"train__steps": 9, "train__save_every": 99, "eval__min_gain": 0.1, **options}
    train.fit(tiny(tmp_path, eval__every=1, **options))
    steps = [checkpoint.load(tmp_path / f"{k}.safetensors").meta["step"] for k in ("best", "last")]
    assert steps == [best, len(losses)]
    [row] = report.listing(tmp_path)
    assert (row["state"], row["step"], row["best"]) == (end, len(losses), losses[best - 1])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and ("null" in text) == (end == "done")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_overflow_ends_a_run_or_halves_the_scale_of_fp16(tmp_path, monkeypatch, dtype):
    update, steps, norms = train.update, iter(range(1, 99)), []

    def overflowing(opts, trained, grads, *rest):
        if next(steps) == 2:
            grads[0].fill_(math.inf)
        norms.append(update(opts, trained, grads, *rest))
        return norms[-1]

    monkeypatch.setattr(train, "update", overflowing)
    cfg = tiny(tmp_path, train__dtype=dtype, train__steps=4, eval__every=4)
    if dtype == "fp32":
        with pytest.raises(UserError, match="step 2: the gradient is not finite"):
            train.fit(cfg)
        return
    assert math.isfinite(train.fit(cfg)["train/ema/own/loss"])
    assert [math.isfinite(n) for n in norms] == [True, False, True, True]
    assert checkpoint.load_state(tmp_path).facts["scale"] == 2.0**15


def test_a_dead_process_ends_the_others_with_its_own_error(tmp_path, capfd, monkeypatch):
    """A random.py in the working folder does no harm."""
    monkeypatch.chdir(tmp_path)
    Path("random.py").write_text("raise ImportError('the wrong random')")
    Path("fatal.py").write_text(
        "import os\nfrom etrm_arc.encoders import apply_perceiver, init_perceiver\n"
        "def apply(*args):\n    os.kill(os.getpid(), 9 * int(os.environ['RANK']))\n"
        "    return apply_perceiver(*args)\nfatal = (init_perceiver, apply)\n"
    )
    Path("a.toml").write_text(
        f'data = {{ train = ["{SET}"], dev = [], held_out = [] }}\n'
        'model = { hidden = 16, heads = 2, expansion = 1.0, encoder = { kind = "fatal:fatal" } }\n'
        'train = { batch = 4, shards = 2, dtype = "fp32" }\neval = { on = "train" }\n'
    )
    with mock.patch.dict(os.environ):
        assert launch.launch(["train", "a.toml"], 2) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("etrm: process 1 was killed by signal 9"), lines
