"""The optimizer, the config, the dealing of slots, the step, the loop and what it watches."""

import json
import math
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etrm_arc import baselines, checkpoint, config, data, optim, sources, train
from etrm_arc.config import EncoderConfig, ModelConfig, UserError
from etrm_arc.encoders import ENCODERS, encoder_of, init_params
from etrm_arc.etrm import Params, act_loss, act_step, fresh_carry, leaves, rebuild
from etrm_arc.tests import published, puzzles
from etrm_arc.tests.puzzles import generators
from etrm_arc.tests.test_parity import all_demos, batch_of

TINY = {
    "data": {"dev": [], "held_out": [], "train": ["tests"], "max_side": 10},
    "model": {
        "hidden": 32,
        "heads": 2,
        "expansion": 1.0,
        "H_cycles": 2,
        "L_cycles": 1,
        "context_tokens": 4,
        "halt_max_steps": 3,
    },
    "optimizer": {"warmup": 2, "lr": 3e-3},
    "train": {
        "batch": 6,
        "shards": 2,
        "steps": 6,
        "dtype": "fp32",
        "log_every": 2,
        "save_every": 3,
    },
    "eval": {"on": "train", "every": 3, "act_steps": 2},
}


def tiny(folder, **changes):
    raw = json.loads(json.dumps(TINY))
    raw["data"]["train"] = [str(Path(__file__).parent / "data" / "set")]
    raw["run"] = {"dir": str(folder)}
    for key, value in changes.items():
        config.override(raw, key.replace("__", "."), value, key)
    return config.parse_config(raw, "test")


# ---------------------------------------------------------------- optimizer


def test_training_trace_of_the_published_trainer(golden):
    """Six steps of Adam-atan2, warm-up and cosine, EMA, and sign-SGD on the rows of the published puzzle table."""
    t, meta = golden("trm_train_trace")
    hyper = meta["hyper"]
    cfg = published.config(encoder=EncoderConfig(kind="table", latent=1024))
    sd = published.sub(golden("trm_core")[0], "sd.inner.")
    table = baselines.Table(sd["puzzle_emb.weights"].clone(), torch.zeros(64, 3))
    like = Params(table, published.core({**sd, "q_head.bias": torch.tensor([0.25, 0.1])}))
    opt = config.OptimizerConfig(
        kind="adam_atan2", lr=hyper["lr"], warmup=hyper["lr_warmup_steps"], final_lr=hyper["lr_min_ratio"],
        betas=(hyper["beta1"], hyper["beta2"]), weight_decay=hyper["weight_decay"], clip=0.0,
        table_lr=hyper["puzzle_emb_lr"], table_decay=hyper["puzzle_emb_weight_decay"],
    )  # fmt: skip
    frozen = lambda k: k.startswith("encoder.") or optim.is_frozen(opt, k)  # noqa: E731
    params = {k: v.clone().requires_grad_(not frozen(k)) for k, v in leaves(like).items()}
    trained = [v for v in params.values() if v.requires_grad]
    opts, ema, carry, now = (
        optim.optimizers(opt, params),
        {k: v.detach().clone() for k, v in params.items()},
        None,
        None,
    )
    for i in range(6):
        offered = published.sub(t, f"t{i}.batch.")
        carry = carry or fresh_carry(cfg, [36] * len(offered["inputs"]), torch.float32)
        now = now or offered
        now = {
            k: torch.where(carry.halted.view(-1, *[1] * (v.ndim - 1)), v, now[k])
            for k, v in offered.items()
        }
        least = (t[f"t{i}.rand"] < cfg.exploration) * t[f"t{i}.randint"]
        batch = batch_of(now["inputs"], now["labels"])._replace(
            rows=now["puzzle_identifiers"].long()
        )
        carry, grads, _, _ = train.train_step(
            params, like, cfg, encoder_of(cfg), torch.float32, carry, batch, least, 1 / 6
        )
        lr = optim.learning_rate(opt, i + 1, hyper["total_steps"])
        assert abs(lr - float(t[f"t{i}.reported.lr"])) < 1e-9
        rows, ids = baselines.spread(torch.arange(6), batch, grads.pop(), 6)
        baselines.sign_step(
            params[baselines.TABLE], rows, ids, lr / opt.lr * opt.table_lr, opt.table_decay
        )
        optim.update(opts, trained, grads, lr, 0.0)
        torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - hyper["ema_rate"])
        assert torch.equal(carry.halted, t[f"t{i}.halted"])
        assert (params[baselines.TABLE][:40, :8] - t[f"t{i}.puzzle_emb_rows"]).abs().max() <= 2e-5
        for k, v in published.sub(t, f"t{i}.param_norm.inner.").items():
            assert abs(float(published_leaf(params, k).detach().norm() - v)) <= 2e-5 * (
                1 + float(v)
            )
    assert (
        params[baselines.TABLE][:40] - t["final.inner.puzzle_emb.weights_first40"]
    ).abs().max() <= 2e-5
    for which, ours in (("final.inner.", params), ("final_ema.inner.", ema)):
        for k, v in published.sub(t, which).items():
            if not k.startswith("puzzle_emb"):
                assert ((published_leaf(ours, k) - v).abs() / (1 + v.abs())).max() <= 2e-5


def published_leaf(params, name):
    renamed = (
        name.removesuffix(".weight")
        .removesuffix(".embedding_weight")
        .replace("L_level.layers", "blocks")
    )
    for theirs, ours in (
        ("self_attn.qkv_proj", "qkv"), ("self_attn.o_proj", "o"), ("mlp.gate_up_proj", "gate_up"), ("mlp.down_proj", "down"),
        ("embed_tokens", "embed"), ("lm_head", "head"), ("q_head.bias", "q_bias"), ("q_head", "q_weight"),
    ):  # fmt: skip
        renamed = renamed.replace(theirs, ours)
    return params[f"core.{renamed}"]


def test_muon_takes_matrices_and_adamw_the_rest():
    for kind in ENCODERS:
        cfg = ModelConfig(hidden=32, heads=2, tied_head=False, encoder=EncoderConfig(kind=kind))
        params = leaves(init_params(cfg, 0))
        params = {k: v.requires_grad_("_init" not in k) for k, v in params.items()}
        muon, adam = optim.optimizers(config.OptimizerConfig(kind="muon"), params)
        own = {id(p) for g in muon.param_groups for p in g["params"]}
        chosen = {k for k, p in params.items() if id(p) in own}
        assert all(params[k].ndim == 2 for k in chosen)
        assert not any("embed" in k or "queries" in k or "q_weight" in k for k in chosen)
        assert {k for k in params if k.endswith((".qkv", ".o", ".gate_up", ".down"))} <= chosen
        assert (
            sum(len(g["params"]) for o in (muon, adam) for g in o.param_groups) == len(params) - 2
        )


def test_muon_steps_as_torchs_does_and_its_updates_are_all_but_orthogonal():
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (1, 8)]
    drawn = torch.Generator().manual_seed(3)
    start = [torch.randn(s, generator=drawn) for s in shapes]
    grads = [[torch.randn(s, generator=drawn) for s in shapes] for _ in range(4)]

    def after(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> list[torch.Tensor]:
        ps = [p.clone().requires_grad_() for p in start]
        opt = make(ps)
        for grad in grads:
            for p, g in zip(ps, grad, strict=True):
                p.grad = g.clone()
            opt.step()
        return [p.detach() for p in ps]

    def ours(dtype: torch.dtype) -> list[torch.Tensor]:
        return after(lambda ps: optim.Muon([{"params": ps, "weight_decay": 0.1}], 0.02, dtype))

    torchs = after(
        lambda ps: torch.optim.Muon(ps, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    )
    for theirs, same, exact, at_first in zip(
        torchs, ours(torch.bfloat16), ours(torch.float32), start, strict=True
    ):
        assert torch.allclose(same, theirs, atol=1e-3) and torch.allclose(exact, theirs, atol=4e-3)
        assert (theirs - at_first).abs().max() > 0.01
    spread = torch.linalg.svdvals(
        optim.orthogonal(torch.stack([grads[0][0], 1e4 * grads[0][2]]), torch.float32)
    )
    assert spread.min() > 0.6 and spread.max() < 1.3


def test_patterns_freeze_and_scale():
    cfg = config.OptimizerConfig(
        kind="adamw",
        freeze=(r"core\.[HL]_init", r"encoder\..*"),
        lr_scale={r"core\.embed": 0.5},
        decay_scale={r".*bias": 0.0},
    )
    like = init_params(ModelConfig(hidden=32, heads=2), 0)
    params = {
        k: v.clone().requires_grad_(not optim.is_frozen(cfg, k)) for k, v in leaves(like).items()
    }
    assert not any(
        v.requires_grad for k, v in params.items() if k.startswith("encoder") or k.endswith("_init")
    )
    trained = [v for v in params.values() if v.requires_grad]
    before = {k: v.detach().clone() for k, v in params.items()}
    opts = optim.optimizers(cfg, params)
    optim.update(opts, trained, [torch.ones_like(p) for p in trained], 0.1, 0.0)
    moved = {
        k: float((v.detach() - before[k] * (1 - 0.1 * 0.1)).abs().max()) for k, v in params.items()
    }
    assert moved["core.blocks.0.o"] == pytest.approx(0.1, rel=1e-3)
    by_scale = {g["scale"]: g for o in opts for g in o.param_groups}
    assert any(p is params["core.embed"] for p in by_scale[0.5]["params"])
    decays = {
        g["weight_decay"]
        for o in opts
        for g in o.param_groups
        if any(p is params["core.q_bias"] for p in g["params"])
    }
    assert decays == {0.0}
    assert torch.equal(params["encoder.queries"], before["encoder.queries"])


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    p = torch.zeros(4, requires_grad=True)
    opt = [torch.optim.SGD([{"params": [p], "scale": 1.0}], lr=1.0)]
    norm = optim.update(opt, [p], [torch.tensor([3.0, 0, 4.0, 0])], 1.0, 1.0)
    assert float(norm) == pytest.approx(5) and float(p.detach().norm()) == pytest.approx(
        1, rel=1e-4
    )
    kept = p.detach().clone()
    assert math.isnan(
        optim.update(opt, [p], [torch.full((4,), math.nan)], 1.0, 1.0)
    ) and torch.equal(p, kept)
    rows = [torch.tensor([0.0, math.nan])]  # of a table
    assert math.isinf(optim.update(opt, [p], [torch.ones(4)], 1.0, 1.0, rows)) and torch.equal(
        p, kept
    )
    assert math.isinf(optim.update([], [], [], 1.0, 1.0, rows))


# ---------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"train": {"bach": 3}}, "unknown key train.bach (did you mean batch?)"),
        ({"optimiser": {}}, "unknown key optimiser (did you mean optimizer?)"),
        (
            {"model": {"encoder": {"layer": 3}}},
            "unknown key model.encoder.layer (did you mean layers?)",
        ),
        ({"train": {"batch": "many"}}, "train.batch: expected `int`, got `str`"),
        ({"model": {"loss": "hinge"}}, "model.loss: invalid enum value 'hinge'"),
    ],
)
def test_a_wrong_key_or_type_is_named(raw, said):
    with pytest.raises(UserError) as e:
        config.parse_config(raw, "x.toml")
    assert str(e.value) == f"x.toml: {said}"


def test_every_shipped_config_parses_also_fast():
    folder = Path(config.__file__).parent / "configs"
    files = sorted(folder.glob("*.toml"))
    assert files
    for file in files:
        cfg = config.load_config(file)
        if cfg.fast:
            assert config.load_config(file, fast=True) != cfg


def test_overrides_are_toml_or_plain_strings(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[train]\nbatch = 3\n[fast]\n"train.batch" = 2\n"train.steps" = 5\n')
    cfg = config.load_config(
        file, ["train.batch=7", "run.dir=some/where", 'data.train=["a", "b"]'], fast=True
    )
    assert (cfg.train.batch, cfg.train.steps, cfg.run.dir, cfg.data.train) == (
        7,
        5,
        "some/where",
        ("a", "b"),
    )
    with pytest.raises(UserError, match="must be key=value"):
        config.load_config(file, ["train.batch"])
    with pytest.raises(UserError, match="broken TOML"):
        (tmp_path / "b.toml").write_text("[train")
        config.load_config(tmp_path / "b.toml")


# ---------------------------------------------------------------- dealing


@given(generators, st.integers(1, 12), st.integers(1, 4))
def test_shards_partition_the_slots_and_share_the_work(g, slots, parts):
    deck = data.deck(
        data.queries(data.pack(puzzles.tasks(g, 6)), "leave_one_out", data.DataConfig()), slots
    )
    cfg = ModelConfig()
    if slots < parts:
        with pytest.raises(UserError, match="cannot fill"):
            train.deal(deck, cfg, parts)
        return
    shards = train.deal(deck, cfg, parts)
    assert sorted(torch.cat(shards).tolist()) == list(range(slots))
    assert all(s.tolist() == sorted(s.tolist()) for s in shards)
    cost = train.cost_of(deck, cfg)
    load = [float(cost[s].sum()) for s in shards]
    fullest = shards[load.index(max(load))]
    assert (
        max(load) - min(load) <= float(cost[fullest].min()) + 1e-9
    )  # as only the costliest slot first can have it


def test_exploration_is_drawn_anew_at_every_act_step():
    cfg, slots = ModelConfig(exploration=0.25, halt_max_steps=5), torch.arange(4000)
    one, two = (
        train.min_steps(cfg, 0, slots, slots * 0, torch.full_like(slots, step)) for step in (1, 2)
    )
    for least in (one, two):
        assert set(least.tolist()) == {0, 2, 3, 4, 5} and float(
            (least > 0).float().mean()
        ) == pytest.approx(0.25, abs=0.03)
    assert float(((one > 0) & (two > 0)).float().mean()) == pytest.approx(0.25**2, abs=0.02)


def test_a_slot_that_halted_begins_its_next_episode(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train,
        "min_steps",
        lambda cfg, seed, slots, n, step: seen.append((n, step)) or torch.zeros(len(slots)),
    )
    cfg = tiny(tmp_path, train__shards=1)
    s = train.setup(cfg)
    carry, _, _ = train.next_batch(s, cfg, s.shards[0], train.start_carry(s, cfg, s.shards[0]))
    halted, steps = torch.tensor([True, False] * 3), torch.tensor([3, 1, 2, 2, 1, 0])
    after, _, _ = train.next_batch(s, cfg, s.shards[0], carry._replace(halted=halted, steps=steps))
    assert torch.equal(after.n, carry.n + halted) and torch.equal(seen[-1][0], after.n)
    assert seen[-1][1].tolist() == [1, 2, 1, 3, 1, 1]  # of which ACT step the exploration is drawn


@given(generators, st.integers(20, 200))
def test_batches_of_an_evaluation_hold_so_many_tokens(g, tokens):
    canvas = torch.randint(0, 9, (puzzles.integer(g, 1, 12), 2), generator=g)
    cfg, need = ModelConfig(context_tokens=4), 4 + canvas.prod(1)
    times = torch.randint(1, 4, (len(canvas),), generator=g) if puzzles.integer(g, 0, 1) else None
    need = need if times is None else need * times
    made = train.portions(types.SimpleNamespace(canvas=canvas), cfg, tokens, times)
    assert (
        sorted(torch.cat([torch.zeros(0), *made]).tolist())
        == torch.where(canvas.prod(1) > 0)[0].tolist()
    )
    sums = [int(need[rows].sum()) for rows in made]
    assert all(total <= tokens or len(rows) == 1 for total, rows in zip(sums, made, strict=True))
    assert all(
        total + int(need[rows[0]]) > tokens for total, rows in zip(sums, made[1:], strict=False)
    )  # and no fewer


def test_gradients_of_shards_sum_to_those_of_the_whole(tmp_path):
    """Slices of a step and processes alike: each slot belongs to one shard, the reduced gradient is the batch's."""
    total = {}
    for shards in (1, 3):
        cfg = tiny(tmp_path, train__shards=shards)
        s = train.setup(cfg)
        assert sorted(torch.cat(s.shards).tolist()) == list(range(cfg.train.batch))
        _, grads, *_ = train.one_step(
            s, cfg, [train.start_carry(s, cfg, slots) for slots in s.shards]
        )
        total[shards] = torch.cat([g.flatten() for g in grads])
    assert total[1].abs().max() > 1e-4
    torch.testing.assert_close(total[1], total[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_shards_side_by_side_are_shards_one_after_the_other(tmp_path, monkeypatch, threads):
    """Weights, metrics and evaluation to the last bit, however many are worked on at once, where each has one thread."""
    said = []
    for at_once in (1, threads):
        monkeypatch.setattr(train, "THREADS", at_once)
        cfg = tiny(
            tmp_path / str(at_once), train__shards=3, eval__tokens=64, model__exploration=0.5
        )
        train.fit(cfg)
        rows = [
            json.loads(line)
            for line in (tmp_path / str(at_once) / "metrics.jsonl").read_text().splitlines()
        ]
        weights = leaves(checkpoint.load(tmp_path / str(at_once) / "last.safetensors").params)
        said.append(
            (
                [
                    {k: v for k, v in r.items() if k not in ("seconds", "samples_per_s")}
                    for r in rows
                ],
                weights,
            )
        )
        torch.set_num_threads(1)
    assert said[0][0] == said[1][0]
    assert all(v.equal(said[1][1][k]) for k, v in said[0][1].items())


def test_what_fails_in_one_of_several_shards_fails_the_step(monkeypatch):
    monkeypatch.setattr(train, "THREADS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def work(i):
        if i == 2:
            raise UserError("shard 2")
        return i

    assert train.side_by_side(work, [0, 1, 3, 1], torch.device("cpu")) == [0, 1, 3, 1]
    with pytest.raises(UserError, match="shard 2"):
        train.side_by_side(work, [0, 1, 2, 3], torch.device("cpu"))


def test_a_step_is_the_mean_of_its_slots_scaled_and_its_sums_are_theirs(tmp_path):
    cfg = tiny(tmp_path, train__shards=1, model__halt_max_steps=1)
    s = train.setup(cfg)
    [slots] = s.shards
    carry, batch, least = train.next_batch(s, cfg, slots, train.start_carry(s, cfg, slots))
    halted = torch.arange(len(slots)) % 2 == 0
    out = act_step(rebuild(s.like, s.params), cfg.model, s.encode, carry, batch, least)[1]
    loss = act_loss(cfg.model, out, batch.labels, batch.cells)
    wanted = torch.autograd.grad(loss.total.mean(), s.params["core.embed"])[0]
    for scale in (1.0, 1024.0):
        _, grads, sums, *_ = train.one_step(s, cfg, [train.start_carry(s, cfg, slots)], scale)
        names = [k for k, v in s.params.items() if v.requires_grad]
        torch.testing.assert_close(
            grads[names.index("core.embed")] / scale, wanted, rtol=1e-4, atol=1e-7
        )
    assert float(sums[0, train.SUMS.index("lm_loss")]) == pytest.approx(
        float(loss.lm.sum()), rel=1e-5
    )
    act = train.act_step
    with pytest.MonkeyPatch.context() as m:  # half of the slots halt: the second row is theirs
        m.setattr(
            train, "act_step", lambda *a: (lambda c, o: (c._replace(halted=halted), o))(*act(*a))
        )
        sums = train.one_step(s, cfg, [train.start_carry(s, cfg, slots)])[2]
    assert float(sums[1, -1]) == int(halted.sum())
    assert float(sums[1, train.SUMS.index("lm_loss")]) == pytest.approx(
        float(loss.lm[halted].sum()), rel=1e-5
    )


# ---------------------------------------------------------------- what is watched


@given(generators, st.integers(1, 9), st.integers(1, 4))
def test_context_rows_are_variances_over_all_slots_however_they_are_dealt(g, slots, parts):
    c = torch.randn(slots, 3, 8, generator=g) * 2 + 5
    row = train.context_row([x for x in c.tensor_split(parts) if len(x)])
    want = (
        c.var(0, unbiased=False).mean(),
        c.var(1, unbiased=False).mean(),
        c.mean(),
        c.std(unbiased=False),
    )
    keys = ("var_across", "var_within", "mean", "std")
    assert row == pytest.approx(
        {f"encoder/context_{k}": float(v) for k, v in zip(keys, want, strict=True)},
        rel=1e-4,
        abs=1e-5,
    )
    same = train.context_row([c[:1].expand(slots, -1, -1)])
    assert same["encoder/context_var_across"] < 1e-9 < same["encoder/context_var_within"]
    assert train.context_row([None]) == {}


def test_every_row_watches_the_encoder_and_every_evaluation_the_gaps(tmp_path):
    said = []
    dev = [str(Path(__file__).parent / "data" / "set")]
    train.fit(
        tiny(
            tmp_path,
            data__dev=dev,
            data__train=["arc1:training"],
            data__max_train_tasks=4,
            eval__on="dev",
        ),
        said.append,
    )
    rows, looks = [r for r in said if "lr" in r], [r for r in said if "gap/own_foreign/loss" in r]
    assert len(rows) == 3 and len(looks) == 2
    for row in rows:
        assert row["encoder/grad_norm"] ** 2 + row["core/grad_norm"] ** 2 == pytest.approx(
            row["grad_norm"] ** 2, rel=1e-4
        )
        assert row["encoder/grad_ratio"] == pytest.approx(
            row["encoder/grad_norm"] / row["core/grad_norm"]
        )
        assert (
            row["encoder/context_std"] == pytest.approx(1, abs=0.05)
            and row["encoder/context_var_across"] > 0
        )
        assert 0 <= row["all/explored"] <= 1
    for look, row in zip(looks, rows[::2], strict=True):
        own, foreign = (look[f"dev/ema/{k}/cell_accuracy"] for k in ("own", "foreign"))
        assert look["gap/own_foreign/cell_accuracy"] == pytest.approx(own - foreign)
        assert look["gap/train_dev/loss"] == pytest.approx(
            row["all/lm_loss"] - look["dev/ema/own/loss"]
        )


# ---------------------------------------------------------------- the loop


def test_the_average_follows_the_weights_and_a_scaled_loss_leaves_no_trace(tmp_path):
    rows: dict[str, list] = {}
    for dtype in ("fp32", "fp16"):
        cfg, rows[dtype] = (
            tiny(
                tmp_path / dtype,
                train__dtype=dtype,
                train__steps=1,
                train__ema=0.75,
                train__log_every=1,
            ),
            [],
        )
        start = {k: v.detach().clone() for k, v in train.setup(cfg).params.items()}
        train.fit(cfg, rows[dtype].append)
        c = checkpoint.load(tmp_path / dtype / "last.safetensors")
        for k, mean in leaves(c.ema).items():
            torch.testing.assert_close(mean, 0.75 * start[k] + 0.25 * leaves(c.params)[k])
    assert rows["fp16"][0]["grad_norm"] == pytest.approx(rows["fp32"][0]["grad_norm"], rel=0.05)


def test_fit_learns_logs_and_leaves_a_checkpoint(tmp_path):
    cfg = tiny(tmp_path / "run", train__steps=30, eval__every=30, train__log_every=10)
    rows = []
    last = train.fit(cfg, rows.append)
    written = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert written == rows and [r["step"] for r in rows] == [10, 20, 30, 30]
    assert rows[2]["all/lm_loss"] < rows[0]["all/lm_loss"]
    assert [r["all/count"] for r in rows[:3]] == [60] * 3 and 1 <= rows[-2]["halted/steps"] <= 3
    assert {"train/ema/own/loss", "train/ema/foreign/loss"} <= last.keys()
    c = checkpoint.load(tmp_path / "run")
    assert c.meta["step"] == 30 and c.model == cfg.model
    assert config.parse_config(c.meta["config"], "checkpoint") == cfg
    assert any(
        not torch.equal(a, b)
        for a, b in zip(leaves(c.params).values(), leaves(c.ema).values(), strict=True)
    )


def test_the_same_config_gives_the_same_bits(tmp_path):
    saved = []
    for name in "ab":
        train.fit(tiny(tmp_path / name))
        saved.append(checkpoint.load(tmp_path / name / "last.safetensors"))
    for tree in ("params", "ema"):
        for a, b in zip(*(leaves(getattr(c, tree)).values() for c in saved), strict=True):
            assert torch.equal(a, b)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_noise_is_a_function_of_seed_slot_episode_and_step(seed, demos):
    slots, zeros = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    x = train.noise(32, demos, seed, slots, zeros, zeros + 1)
    assert x.shape == (50, demos, 32) and x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    assert torch.equal(
        train.noise(32, 5, seed, slots[7:9], zeros[:2], zeros[:2] + 1)[:, :demos], x[7:9]
    )
    for other in (
        (seed + 1, slots, zeros, zeros + 1),
        (seed, slots, zeros + 1, zeros + 1),
        (seed, slots, zeros, zeros + 2),
    ):
        assert (train.noise(32, demos, *other) - x).abs().min(0).values.mean() > 1e-3
    assert not torch.equal(x[0], x[1])


def test_patience_gain_and_kept_weights(tmp_path, monkeypatch):
    """The best is beaten by more than min_gain or not at all; training ends after so many evaluations without."""
    value = iter((0.5, 0.59, 0.7, 0.79, 0.795, 0.85))
    monkeypatch.setattr(
        train, "watch", lambda *_: {"train/ema/own/exact": next(value), "train/ema/own/loss": 1.0}
    )
    options = {
        "eval__best": "exact",
        "eval__min_gain": 0.1,
        "eval__patience": 2,
        "eval__every": 1,
        "train__keep_every": 2,
    }
    last = train.fit(tiny(tmp_path, train__steps=9, **options))
    assert last["stopped"] == "eval.patience" and last["step"] == 5
    assert checkpoint.load(tmp_path / "best.safetensors").meta["step"] == 3
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
    ]
    (row,) = checkpoint.listing(tmp_path)
    assert (row["state"], row["step"], row["best"], row["watched"]) == (
        "eval.patience",
        5,
        0.7,
        "train/ema/own/exact",
    )


def test_a_step_that_is_not_finite_can_be_left_out(tmp_path, monkeypatch):
    update, bad = train.update, {3}
    steps = iter(range(1, 99))

    def spoilt(opts, trained, grads, *rest):
        if next(steps) in bad:
            grads[0].fill_(math.nan)
        return update(opts, trained, grads, *rest)

    monkeypatch.setattr(train, "update", spoilt)
    said = []
    train.fit(tiny(tmp_path, train__non_finite="skip"), said.append)
    assert [r["skipped_steps"] for r in said if "skipped_steps" in r] == [0, 1, 1]
    assert all(
        x.isfinite().all()
        for x in leaves(checkpoint.load(tmp_path / "last.safetensors").params).values()
    )


def test_culprits_are_named_by_task_and_canvas(tmp_path):
    cfg = tiny(tmp_path, train__shards=1)
    s = train.setup(cfg)
    carries, *_ = train.one_step(s, cfg, [train.start_carry(s, cfg, slots) for slots in s.shards])
    assert train.culprits(s, cfg, carries) == "every state is"
    z = carries[0].z_H.clone()
    z[carries[0].tokens[0] + 2] = math.nan  # of the second slot
    e = data.draw(s.tasks, s.deck, cfg.data, 0, s.shards[0], carries[0].n)
    h, w = e.canvas[1].tolist()
    want = f"tasks {s.names[int(s.tasks.task_of[e.query[1]])]} on {h} x {w}"
    assert train.culprits(s, cfg, [carries[0]._replace(z_H=z)]) == want


def test_training_stops_at_the_wanted_exact_match(tmp_path, monkeypatch):
    exact = iter((0.5, 0.9, 0.95))
    monkeypatch.setattr(
        train, "watch", lambda *_: {"train/ema/own/exact": next(exact), "train/ema/own/loss": 1.0}
    )
    last = train.fit(tiny(tmp_path, eval__stop_at=0.9, train__steps=9, train__save_every=99))
    assert last["step"] == 6 and checkpoint.load(tmp_path / "last.safetensors").meta["step"] == 6
    assert checkpoint.described(tmp_path)["state"] == "eval.stop_at"


def test_the_lowest_loss_is_best_and_the_end_is_saved(tmp_path, monkeypatch):
    loss = iter((1.0, 0.4, 0.6))
    monkeypatch.setattr(
        train, "watch", lambda *_: {"train/ema/own/exact": 0.0, "train/ema/own/loss": next(loss)}
    )
    train.fit(tiny(tmp_path, train__steps=3, eval__every=1, train__save_every=99))
    assert [
        checkpoint.load(tmp_path / f"{n}.safetensors").meta["step"] for n in ("best", "last")
    ] == [2, 3]
    assert checkpoint.described(tmp_path) | {"age_s": 0, "run": ""} == {
        "run": "", "state": "done", "step": 3, "steps": 3, "best": 0.4, "watched": "train/ema/own/loss", "age_s": 0,
    }  # fmt: skip


def test_seconds_go_on_counting_where_they_were(tmp_path, monkeypatch):
    fresh, said = train.fresh_facts, []
    monkeypatch.setattr(train, "fresh_facts", lambda scale: {**fresh(scale), "seconds": 1000.0})
    train.fit(tiny(tmp_path, train__steps=2), said.append)
    monkeypatch.setattr(train, "fresh_facts", fresh)
    train.fit(tiny(tmp_path, train__steps=4), said.append, resume=True)
    assert all(1000 < r["seconds"] < 2000 for r in said) and said[-1]["step"] == 4


def test_a_diverged_run_stops_and_names_the_step(tmp_path):
    cfg = tiny(tmp_path, optimizer__kind="adamw", optimizer__lr=1e30, optimizer__clip=0)
    with pytest.raises(
        UserError, match=r"step \d: the gradient is not finite \((tasks \w|every state)"
    ):
        train.fit(cfg)


def test_fp16_halves_its_scale_on_overflow_and_goes_on(tmp_path, monkeypatch):
    update, steps, norms = train.update, iter(range(1, 99)), []

    def overflowing(opts, trained, grads, *rest):
        if next(steps) == 2:
            grads[0].fill_(math.inf)
        norms.append(float(update(opts, trained, grads, *rest)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(train, "update", overflowing)
    last = train.fit(tiny(tmp_path, train__dtype="fp16", train__steps=4, eval__foreign=False))
    assert math.isfinite(last["train/ema/own/loss"]) and [math.isfinite(n) for n in norms] == [
        True,
        False,
        True,
        True,
    ]
    manifest = checkpoint.load_state(tmp_path)[0]
    assert manifest["scale"] == 2.0**15 and manifest["skipped"] == 0


def test_hidden_outputs_are_neither_trained_on_nor_probed(tmp_path):
    tasks = [
        t._replace(queries=[(x, None) for x, _ in t.queries])
        for t in sources.load([str(Path(__file__).parent / "data" / "set")])
    ]
    packed = data.pack(tasks)
    asked = data.queries(packed, "test", data.DataConfig(max_side=20))
    assert not asked.known.any() and asked.fits.all()
    with pytest.raises(UserError, match="no query to train on"):
        data.deck(asked, 6)
    both = data.pack([tasks[0], *sources.load([str(Path(__file__).parent / "data" / "set")])[1:]])
    s = train.setup(tiny(tmp_path))
    row = train.probe(rebuild(s.like, s.params), tiny(tmp_path), both, "test", torch.float32)
    assert row["n"] == 5 and math.isfinite(row["loss"])


def test_foreign_demos_never_come_from_the_same_task():
    task, fit = (
        torch.tensor([0, 0, 3, 5, 5, 5, 9]),
        torch.tensor([False, True, True, False, False, False, True]),
    )

    def asked(task, fits):
        return data.Queries(task, task, fits, fits[:, None].long().expand(-1, 2), fits)

    for seed in range(20):
        for fits in (fit, fit | True):
            rows = data.donors(asked(task, fits), seed)
            assert (task[rows] != task).all() and fits[
                rows
            ].all()  # nor from one that no canvas holds
    assert torch.equal(data.donors(asked(task, fit), 1), data.donors(asked(task, fit), 1))
    for fits in (torch.tensor([True, True, False]), torch.tensor([False, False, False])):
        with pytest.raises(UserError, match="needs two tasks that fit a canvas, there is"):
            data.donors(asked(torch.tensor([4, 4, 5]), fits), 0)


def planned(cfg):
    return train.plan(cfg, train.setup(cfg), timed=True)


def test_plan_counts_work_and_memory(tmp_path):
    found = planned(tiny(tmp_path))
    assert found["parameters"] > 1e4 and sum(found["slots"].values()) == 6
    more = planned(tiny(tmp_path, train__batch=12))
    assert 1.5 < more["gflop_per_step"] / found["gflop_per_step"] < 2.7
    assert more["memory_gb"] > found["memory_gb"]


def test_encode_is_the_table_entry():
    cfg = ModelConfig(hidden=32, heads=2, context_tokens=4)
    grids = torch.full((1, 1, 36), 2)
    demos = all_demos(grids, grids + 1, torch.ones(1, 1, dtype=torch.bool))
    context = (
        encoder_of(cfg)
        .read(init_params(cfg, 0).encoder, batch_of(grids[0], grids[0], demos))
        .tokens
    )
    assert context.shape == (1, 4, 32)
    assert torch.allclose(context.square().mean(-1), torch.ones(1, 4), atol=1e-3)
