"""The optimizer, the config, the dealing of slots, the loop and its checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etrm_arc import checkpoint, config, data, launch, optim, plan, runs, sources, train
from etrm_arc.data import UserError
from etrm_arc.encoders import ENCODERS, encoder_of, init_params
from etrm_arc.etrm import Context, Encode, EncoderConfig, ModelConfig, Params, act_loss, act_step, fresh_carry, leaves, rebuild
from etrm_arc.tests import published, puzzles
from etrm_arc.tests.kill import outcome
from etrm_arc.tests.puzzles import generators
from etrm_arc.tests.test_parity import all_demos, batch_of

TINY = {
    "data": {"dev": [], "held_out": [], "train": ["tests"], "canvases": [6, 10]},
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
    "train": {"batch": 6, "steps": 6, "dtype": "fp32", "log_every": 2, "save_every": 3},
    "eval": {"on": "train", "every": 3, "act_steps": 2},
}


def tiny(folder, **changes):
    raw = json.loads(json.dumps(TINY))
    raw["data"]["train"] = [str(Path(__file__).parent / "data" / "set")]
    raw["run"] = {"dir": str(folder)}
    for key, value in changes.items():
        config.override(raw, key.replace("__", "."), value)
    return config.parse_config(raw, "test")


# ---------------------------------------------------------------- optimizer


def test_training_trace_of_the_published_trainer(golden):
    """Six steps of Adam-atan2, warm-up and cosine, EMA, with the published puzzle table in the encoder's place."""
    t, meta = golden("trm_train_trace")
    hyper = meta["hyper"]
    cfg = published.config()
    sd = published.sub(golden("trm_core")[0], "sd.inner.")
    like = Params((), published.core({**sd, "q_head.bias": torch.tensor([0.25, 0.1])}))
    opt = config.OptimizerConfig(
        kind="adam_atan2", lr=hyper["lr"], warmup=hyper["lr_warmup_steps"], final_lr=hyper["lr_min_ratio"],
        betas=(hyper["beta1"], hyper["beta2"]), weight_decay=hyper["weight_decay"], clip=0.0,
    )  # fmt: skip
    params = {k: v.clone().requires_grad_(not optim.is_frozen(opt, k)) for k, v in leaves(like).items()}
    trained = {k: v for k, v in params.items() if v.requires_grad}
    opts, ema = optim.optimizers(opt, params), {k: v.detach().clone() for k, v in params.items()}
    table, carry, now = sd["puzzle_emb.weights"].clone(), None, None
    for i in range(6):
        offered = published.sub(t, f"t{i}.batch.")
        carry = carry or fresh_carry(cfg, [36] * len(offered["inputs"]), torch.float32)
        now = now or offered
        now = {k: torch.where(carry.halted.view(-1, *[1] * (v.ndim - 1)), v, now[k]) for k, v in offered.items()}
        ids = now["puzzle_identifiers"].long()
        rows = table[ids].clone().requires_grad_()
        least = (t[f"t{i}.rand"] < cfg.exploration) * t[f"t{i}.randint"]
        batch = batch_of(now["inputs"], now["labels"])
        carry, out = act_step(rebuild(like, params), cfg, Encode(lambda *_, r=rows: Context(r.view(-1, 16, 64))), carry, batch, least)
        total = act_loss(cfg, out, batch.labels, batch.cells).total.sum() / 6
        *grads, row_grads = torch.autograd.grad(total, [*trained.values(), rows])
        lr = optim.learning_rate(opt, i + 1, hyper["total_steps"])
        assert abs(lr - float(t[f"t{i}.reported.lr"])) < 1e-9
        table_lr = lr * hyper["puzzle_emb_lr"] / hyper["lr"]
        touched, where = ids.unique(return_inverse=True)
        summed = torch.zeros(len(touched), 1024).index_add_(0, where, row_grads)
        decayed = table[touched] * (1 - table_lr * hyper["puzzle_emb_weight_decay"])
        table[touched] = decayed - table_lr * torch.sign(summed)
        optim.update(opts, list(trained.values()), grads, lr, 0.0)
        torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - hyper["ema_rate"])
        assert torch.equal(carry.halted, t[f"t{i}.halted"])
        for k, v in published.sub(t, f"t{i}.param_norm.inner.").items():
            assert abs(float(published_leaf(params, k).detach().norm() - v)) <= 2e-5 * (1 + float(v))
    for which, ours in (("final.inner.", params), ("final_ema.inner.", ema)):
        for k, v in published.sub(t, which).items():
            if not k.startswith("puzzle_emb"):
                assert ((published_leaf(ours, k) - v).abs() / (1 + v.abs())).max() <= 2e-5


def published_leaf(params, name):
    renamed = name.removesuffix(".weight").removesuffix(".embedding_weight").replace("L_level.layers", "blocks")
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
        assert sum(len(g["params"]) for o in (muon, adam) for g in o.param_groups) == len(params) - 2


def test_patterns_freeze_and_scale():
    cfg = config.OptimizerConfig(
        kind="adamw",
        freeze=(r"core\.[HL]_init", r"encoder\..*"),
        lr_scale={r"core\.embed": 0.5},
        decay_scale={r".*bias": 0.0},
    )
    like = init_params(ModelConfig(hidden=32, heads=2), 0)
    params = {k: v.clone().requires_grad_(not optim.is_frozen(cfg, k)) for k, v in leaves(like).items()}
    assert not any(v.requires_grad for k, v in params.items() if k.startswith("encoder") or k.endswith("_init"))
    trained = [v for v in params.values() if v.requires_grad]
    before = {k: v.detach().clone() for k, v in params.items()}
    opts = optim.optimizers(cfg, params)
    optim.update(opts, trained, [torch.ones_like(p) for p in trained], 0.1, 0.0)
    moved = {k: float((v.detach() - before[k] * (1 - 0.1 * 0.1)).abs().max()) for k, v in params.items()}
    assert moved["core.blocks.0.o"] == pytest.approx(0.1, rel=1e-3)
    by_scale = {g["scale"]: g for o in opts for g in o.param_groups}
    assert any(p is params["core.embed"] for p in by_scale[0.5]["params"])
    decays = {g["weight_decay"] for o in opts for g in o.param_groups if any(p is params["core.q_bias"] for p in g["params"])}
    assert decays == {0.0}
    assert torch.equal(params["encoder.queries"], before["encoder.queries"])


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    p = torch.zeros(4, requires_grad=True)
    opt = [torch.optim.SGD([{"params": [p], "scale": 1.0}], lr=1.0)]
    norm = optim.update(opt, [p], [torch.tensor([3.0, 0, 4.0, 0])], 1.0, 1.0)
    assert float(norm) == pytest.approx(5) and float(p.detach().norm()) == pytest.approx(1, rel=1e-4)
    kept = p.detach().clone()
    assert math.isnan(optim.update(opt, [p], [torch.full((4,), math.nan)], 1.0, 1.0)) and torch.equal(p, kept)


# ---------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"train": {"bach": 3}}, "unknown key train.bach (did you mean batch?)"),
        ({"optimiser": {}}, "unknown key optimiser (did you mean optimizer?)"),
        ({"model": {"encoder": {"layer": 3}}}, "unknown key model.encoder.layer (did you mean layers?)"),
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
    cfg = config.load_config(file, ["train.batch=7", "run.dir=some/where", 'data.train=["a", "b"]'], fast=True)
    assert (cfg.train.batch, cfg.train.steps, cfg.run.dir, cfg.data.train) == (7, 5, "some/where", ("a", "b"))
    with pytest.raises(UserError, match="must be key=value"):
        config.load_config(file, ["train.batch"])
    with pytest.raises(UserError, match="broken TOML"):
        (tmp_path / "b.toml").write_text("[train")
        config.load_config(tmp_path / "b.toml")


# ---------------------------------------------------------------- dealing


@given(generators, st.integers(1, 12), st.integers(1, 4))
def test_shards_partition_the_slots_and_share_the_work(g, slots, parts):
    deck = data.deck(data.queries(data.pack(puzzles.tasks(g, 6)), "leave_one_out", ()), slots)
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
    assert max(load) - min(load) <= float(cost.max()) + 1e-9


def test_gradients_of_shards_sum_to_those_of_the_whole(tmp_path):
    """Slices of a step and processes alike: each slot belongs to one shard, the reduced gradient is the batch's."""
    total = {}
    for shards in (1, 3):
        cfg = tiny(tmp_path, train__shards=shards)
        s = train.setup(cfg)
        assert sorted(torch.cat(s.shards).tolist()) == list(range(cfg.train.batch))
        _, grads, _, _ = train.one_step(s, cfg, [train.start_carry(s, cfg, slots) for slots in s.shards])
        total[shards] = torch.cat([g.flatten() for g in grads])
    assert total[1].abs().max() > 1e-4
    torch.testing.assert_close(total[1], total[3], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the loop


def test_fit_learns_logs_and_leaves_a_checkpoint(tmp_path):
    cfg = tiny(tmp_path / "run", train__steps=30, eval__every=30, train__log_every=10)
    rows = []
    last = train.fit(cfg, rows.append)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == rows and [r["step"] for r in rows] == [10, 20, 30, 30]
    assert rows[2]["all/lm_loss"] < rows[0]["all/lm_loss"]
    assert rows[0]["all/count"] == 60 and 1 <= rows[-2]["halted/steps"] <= 3
    assert {"train/ema/own/loss", "train/ema/foreign/loss"} <= last.keys()
    c = checkpoint.load(tmp_path / "run")
    assert c.meta["step"] == 30 and c.model == cfg.model
    assert config.parse_config(c.meta["config"], "checkpoint") == cfg
    assert any(not torch.equal(a, b) for a, b in zip(leaves(c.params).values(), leaves(c.ema).values(), strict=True))


def test_the_same_config_gives_the_same_bits(tmp_path):
    saved = []
    for name in "ab":
        train.fit(tiny(tmp_path / name))
        saved.append(checkpoint.load(tmp_path / name / "last.safetensors"))
    for tree in ("params", "ema"):
        for a, b in zip(*(leaves(getattr(c, tree)).values() for c in saved), strict=True):
            assert torch.equal(a, b)


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for k, v in a[1].items():
        assert torch.equal(v, b[1][k]), k


@pytest.mark.parametrize("kind", ["muon", "adamw", "adam_atan2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_stopped_after_every_step_ends_in_the_same_bits(tmp_path, kind, dtype):
    options = {"optimizer__kind": kind, "train__dtype": dtype, "train__log_every": 4, "eval__every": 3, "train__steps": 7}
    train.fit(tiny(tmp_path / "whole", **options))
    cfg, steps = tiny(tmp_path / "pieces", **options), []
    while not steps or "stopped" in steps[-1]:
        steps.append(train.fit(cfg, resume=bool(steps), limit=-1))
        assert steps[-1]["step"] == len(steps)
    assert len(steps) == 7
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))


@pytest.mark.parametrize("kind", ["recurrent", "lpn_variational"])
def test_noise_and_states_of_an_encoder_are_taken_up_again(tmp_path, kind):
    options = {"model__encoder": {"kind": kind, "layers": 1}, "train__log_every": 1, "eval__every": 4, "train__steps": 4}
    rows = []
    train.fit(tiny(tmp_path / "whole", **options), rows.append)
    assert ("all/kl" in rows[0]) == (kind == "lpn_variational")
    cfg, steps = tiny(tmp_path / "pieces", **options), []
    while not steps or "stopped" in steps[-1]:
        steps.append(train.fit(cfg, resume=bool(steps), limit=-1))
    assert len(steps) == 4
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))
    states = {tuple(v.shape) for k, v in checkpoint.load_state(tmp_path / "whole")[1][0].items() if k.endswith(".z_E")}
    assert states == {(1, 4, 32) if kind == "recurrent" else (1, 1, 1)}


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_noise_is_a_function_of_seed_slot_episode_and_step(seed, demos):
    slots, zeros = torch.arange(50), torch.zeros(50, dtype=torch.int64)
    x = train.noise(32, demos, seed, slots, zeros, zeros + 1)
    assert x.shape == (50, demos, 32) and x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    assert torch.equal(train.noise(32, 5, seed, slots[7:9], zeros[:2], zeros[:2] + 1)[:, :demos], x[7:9])
    for other in ((seed + 1, slots, zeros, zeros + 1), (seed, slots, zeros + 1, zeros + 1), (seed, slots, zeros, zeros + 2)):
        assert (train.noise(32, demos, *other) - x).abs().min(0).values.mean() > 1e-3
    assert not torch.equal(x[0], x[1])


def test_a_killed_run_loses_only_what_came_after_its_newest_whole_state(tmp_path):
    train.fit(tiny(tmp_path / "whole"))
    cfg = tiny(tmp_path / "killed")
    train.fit(cfg)
    (tmp_path / "killed" / "state-00000006.json").unlink()  # killed before the commit
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lr"')  # and in the middle of a line
    train.fit(cfg, resume=True)
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


def test_resume_skips_a_broken_state_and_says_so(tmp_path):
    cfg, said = tiny(tmp_path), []
    train.fit(cfg)
    newest = tmp_path / "state-00000006-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    assert train.fit(cfg, said.append, resume=True)["step"] == 6
    assert said[0] == {"skipped": "state-00000006.json: state-00000006-0.safetensors differs from its checksum"}
    for manifest in tmp_path.glob("state-*.json"):
        manifest.write_text("{")
    with pytest.raises(UserError, match="holds no whole state"):
        train.fit(cfg, resume=True)


def test_resuming_with_other_shards_deals_the_carry_anew(tmp_path):
    cfg = tiny(tmp_path, train__steps=3)
    train.fit(cfg)
    _, before, _ = checkpoint.load_state(tmp_path)
    more = tiny(tmp_path, train__steps=4, train__shards=2)
    s = train.setup(more)
    slots, seen = runs.saved_slots(before), {}
    for mine in s.shards:
        seen |= runs.carry_tensors(mine, runs.carry_from(slots, mine, s.device))
    assert sorted(seen) == list(range(6))
    assert all(torch.equal(seen[i][k], slots[i][k]) for i in slots for k in slots[i])
    assert train.fit(more, resume=True)["step"] == 4


def test_another_yardstick_starts_a_new_best(tmp_path):
    train.fit(tiny(tmp_path, train__steps=3))
    assert checkpoint.load_state(tmp_path)[0]["best"] < math.inf
    said = []
    train.fit(tiny(tmp_path, train__steps=6, eval__act_steps=1), said.append, resume=True)
    manifest = checkpoint.load_state(tmp_path)[0]
    assert manifest["best"] == said[-1]["train/ema/own/loss"]


def test_another_dtype_or_training_set_is_refused(tmp_path):
    train.fit(tiny(tmp_path, train__steps=1))
    manifest = tmp_path / "state-00000001.json"
    for key in ("dtype", "data"):
        text = json.loads(manifest.read_text())
        text |= {key: "other", "step": 2}
        (tmp_path / "state-00000002.json").write_text(json.dumps({**text, "sha256": checkpoint.signed(text)}))
        with pytest.raises(UserError, match="--resume: the .* is "):
            train.fit(tiny(tmp_path, train__steps=2), resume=True)


def test_what_may_not_change_on_resume_is_refused(tmp_path):
    train.fit(tiny(tmp_path, train__steps=1))
    with pytest.raises(UserError, match=r"--resume: optimizer.lr is 0.5, the run has 0.003"):
        train.fit(tiny(tmp_path, optimizer__lr=0.5), resume=True)
    with pytest.raises(UserError, match="holds a run already: go on with --resume"):
        train.fit(tiny(tmp_path))


def test_a_folder_held_by_a_live_run_is_refused(tmp_path):
    with train.Run(tmp_path, 0, False), pytest.raises(UserError, match="held by a live process"):
        train.fit(tiny(tmp_path))


def test_a_signal_finishes_the_step_and_saves(tmp_path):
    rows = []

    def interrupt(row):
        rows.append(row)
        os.kill(os.getpid(), signal.SIGTERM)

    last = train.fit(tiny(tmp_path, train__log_every=1), interrupt)
    assert last["stopped"] == "SIGTERM" and last["step"] == 2
    assert checkpoint.load_state(tmp_path)[0]["step"] == 2


def test_a_full_disk_leaves_the_state_before_it(tmp_path, monkeypatch):
    train.fit(tiny(tmp_path, train__steps=3))
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        train.fit(tiny(tmp_path, train__steps=6), resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert checkpoint.load_state(tmp_path)[0]["step"] == 3


def test_a_crash_at_any_point_of_a_write_leaves_a_whole_state(tmp_path, monkeypatch):
    """Every write, sync and rename of the later saves fails once; what is taken up then is whole, and ends in the same bits."""
    options = {"eval__every": 6, "train__save_every": 6, "train__log_every": 6, "eval__foreign": False}
    train.fit(tiny(tmp_path / "whole", **options))
    points, crashes = 0, 0
    while crashes == points:
        folder, points = tmp_path / f"crash-{points}", points + 1
        train.fit(tiny(folder, **options), limit=-1)  # a step, and its state
        left = iter(range(points))

        def fails(real, left=left, last=points - 1):
            def call(*args, **kwargs):
                if next(left, None) == last:
                    raise OSError(5, "Input/output error")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "sync", fails(checkpoint.sync))
            patch.setattr(checkpoint, "save_file", fails(checkpoint.save_file))
            patch.setattr(Path, "replace", fails(Path.replace))
            patch.setattr(Path, "unlink", fails(Path.unlink))
            try:
                train.fit(tiny(folder, **options), resume=True)
            except (UserError, OSError):
                crashes += 1
        assert checkpoint.load_state(folder)[0]["step"] in (1, 6)
        train.fit(tiny(folder, **options), resume=True)
        same(outcome(tmp_path / "whole"), outcome(folder))
    assert crashes > 15


def test_a_checkpoint_on_the_hub_is_checked(tmp_path, monkeypatch):
    file, tree = saved(tmp_path)
    asked = []
    hub = types.SimpleNamespace(hf_hub_download=lambda *args: asked.append(args) or str(file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    c = checkpoint.load(f"hf:someone/model/a/last.safetensors#{checkpoint.digest(file)}")
    assert torch.equal(c.params.core.embed, tree.core.embed) and asked == [("someone/model", "a/last.safetensors")]
    for name, said in (("hf:a/b/c#00", "its checksum is"), ("hf:a/b", "must look like")):
        with pytest.raises(UserError, match=said):
            checkpoint.load(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub"):
        checkpoint.load("hf:a/b/c")


def recipe(path, cfg):
    """The config as a TOML file of dotted keys."""
    tables = json.loads(msgspec.json.encode(cfg))
    lines = [f"{t}.{k} = {json.dumps(v)}" for t in ("data", "train", "eval", "run") for k, v in tables[t].items()]
    lines += [f"model.{k} = {json.dumps(v)}" for k, v in tables["model"].items() if k != "encoder"]
    lines += [f"optimizer.{k} = {json.dumps(tables['optimizer'][k])}" for k in ("lr", "warmup")]
    path.write_text("\n".join(lines))
    return path


def test_two_processes_end_in_the_bits_of_one(tmp_path):
    """Gradients are summed in the order of shards, so the number of processes does not show, in weights or in carry."""
    for name in ("one", "two"):
        cfg = tiny(tmp_path / name, train__shards=2, train__steps=5)
        if name == "one":
            train.fit(cfg)
            continue
        command = [sys.executable, "-m", "etrm_arc.cli", "train", recipe(tmp_path / "two.toml", cfg)]
        shared = {
            **os.environ,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(launch.free_port()),
            "OMP_NUM_THREADS": "1",
        }
        ranks = [subprocess.Popen(command, env={**shared, "RANK": str(r)}) for r in range(2)]
        assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for part in (one, two):
        part[1].pop("sums")  # each process has its own share of these
    assert [r["step"] for r in one[0]] == [r["step"] for r in two[0]]
    for k, v in one[1].items():
        assert torch.equal(v, two[1][k]), k


def test_patience_gain_and_kept_weights(tmp_path, monkeypatch):
    """The best is beaten by more than min_gain or not at all; training ends after so many evaluations without."""
    value = iter((0.5, 0.55, 0.7, 0.71, 0.72, 0.75))
    monkeypatch.setattr(train, "watch", lambda *_: {"train/ema/own/exact": next(value), "train/ema/own/loss": 1.0})
    options = {"eval__best": "exact", "eval__min_gain": 0.1, "eval__patience": 2, "eval__every": 1, "train__keep_every": 2}
    last = train.fit(tiny(tmp_path, train__steps=9, **options))
    assert last["stopped"] == "eval.patience" and last["step"] == 5
    assert checkpoint.load(tmp_path / "best.safetensors").meta["step"] == 3
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002.safetensors", "step-00000004.safetensors"]
    (row,) = runs.listing(tmp_path)
    assert (row["state"], row["step"], row["best"], row["watched"]) == ("eval.patience", 5, 0.7, "train/ema/own/exact")


def test_a_fork_goes_on_elsewhere_from_a_folder_that_is_only_read(tmp_path):
    whole, fork = tmp_path / "whole", tmp_path / "fork"
    train.fit(tiny(whole))
    train.fit(tiny(tmp_path / "a", train__steps=3))
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    train.fit(tiny(fork), source=tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    changed = tiny(tmp_path / "other", train__steps=7, optimizer__lr=0.01)
    assert train.fit(changed, source=tmp_path / "a")["step"] == 7
    with pytest.raises(UserError, match="model.hidden is 64, the run has 32"):
        train.fit(tiny(tmp_path / "new", model__hidden=64), source=tmp_path / "a")
    rows = [[json.loads(line)["step"] for line in (f / "metrics.jsonl").open()] for f in (whole, fork)]
    assert rows[0][-2:] == rows[1][-2:]


def test_a_step_that_is_not_finite_can_be_left_out(tmp_path, monkeypatch):
    update, bad = train.update, {3}
    steps = iter(range(1, 99))

    def spoilt(opts, trained, grads, lr, clip):
        if next(steps) in bad:
            grads[0].fill_(math.nan)
        return update(opts, trained, grads, lr, clip)

    monkeypatch.setattr(train, "update", spoilt)
    said = []
    train.fit(tiny(tmp_path, train__non_finite="skip"), said.append)
    assert [r["skipped_steps"] for r in said if "skipped_steps" in r] == [0, 1, 1]
    assert all(x.isfinite().all() for x in leaves(checkpoint.load(tmp_path / "last.safetensors").params).values())


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


def test_what_a_run_says_of_itself_and_an_absent_tracker(tmp_path):
    train.fit(tiny(tmp_path / "a"))
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["config"]["train"]["steps"] == 6 and about["torch"] == torch.__version__
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    found = {Path(r["run"]).name: r["state"] for r in runs.listing(tmp_path)}
    assert found["a"] == "done" and found["b"].startswith("unreadable")
    with train.Run(tmp_path / "a", 0, True):
        assert runs.listing(tmp_path / "a")[0]["state"] == "running"
    sys.modules["wandb"] = None
    try:
        with pytest.raises(UserError, match="the package wandb is not installed"):
            train.fit(tiny(tmp_path / "c", run__track="wandb"))
    finally:
        del sys.modules["wandb"]


def test_a_tracker_gets_every_row(tmp_path, monkeypatch):
    got, said = [], []
    monkeypatch.setitem(runs.TRACKERS, "tensorboard", lambda folder, cfg: got.append)
    train.fit(tiny(tmp_path, run__track="tensorboard"), said.append)
    assert got == said and len(got) == 5


def test_what_was_written_after_the_state_never_was(tmp_path):
    cfg = tiny(tmp_path, train__save_every=2)
    train.fit(cfg)
    newest = tmp_path / "state-00000006-0.safetensors"
    newest.write_bytes(b"broken")
    (tmp_path / "state-00000005-1.safetensors").write_bytes(b"of a process that was killed")
    s = train.setup(cfg)
    with train.Run(tmp_path, 0, True) as run:
        run.begin(4, tmp_path, s.meta, "")
    assert sorted(p.name for p in tmp_path.glob("state-*")) == ["state-00000004-0.safetensors", "state-00000004.json"]


def test_training_stops_at_the_wanted_exact_match(tmp_path, monkeypatch):
    exact = iter((0.5, 0.9, 0.95))
    monkeypatch.setattr(train, "watch", lambda *_: {"train/ema/own/exact": next(exact), "train/ema/own/loss": 1.0})
    last = train.fit(tiny(tmp_path, eval__stop_at=0.9, train__steps=9))
    assert last["step"] == 6 and checkpoint.load(tmp_path / "last.safetensors").meta["step"] == 6


def test_a_diverged_run_stops_and_names_the_step(tmp_path):
    cfg = tiny(tmp_path, optimizer__kind="adamw", optimizer__lr=1e30, optimizer__clip=0)
    with pytest.raises(UserError, match=r"step \d: the gradient is not finite \((tasks \w|every state)"):
        train.fit(cfg)


def test_fp16_halves_its_scale_on_overflow_and_goes_on(tmp_path):
    last = train.fit(tiny(tmp_path, train__dtype="fp16"))
    assert math.isfinite(last["train/ema/own/loss"])


def test_hidden_outputs_are_neither_trained_on_nor_probed(tmp_path):
    tasks = [t._replace(queries=[(x, None) for x, _ in t.queries]) for t in sources.load([str(Path(__file__).parent / "data" / "set")])]
    packed = data.pack(tasks)
    asked = data.queries(packed, "test", (6, 20))
    assert not asked.known.any() and asked.fits.all()
    with pytest.raises(UserError, match="no query to train on"):
        data.deck(asked, 6)
    both = data.pack([tasks[0], *sources.load([str(Path(__file__).parent / "data" / "set")])[1:]])
    s = train.setup(tiny(tmp_path))
    row = train.probe(rebuild(s.like, s.params), tiny(tmp_path), both, "test", torch.float32)
    assert row["n"] == 5 and math.isfinite(row["loss"])


def test_foreign_demos_never_come_from_the_same_task():
    task = torch.tensor([0, 0, 3, 5, 5, 5, 9])
    for seed in range(20):
        assert (task[train.donors(task, seed)] != task).all()
    assert torch.equal(train.donors(task, 1), train.donors(task, 1))
    with pytest.raises(UserError, match="needs two tasks"):
        train.donors(torch.tensor([4, 4]), 0)


def planned(cfg):
    return plan.plan(cfg, train.setup(cfg), timed=True)


def test_plan_counts_work_and_memory(tmp_path):
    found = planned(tiny(tmp_path))
    assert found["parameters"] > 1e4 and sum(found["slots"].values()) == 6
    more = planned(tiny(tmp_path, train__batch=12))
    assert 1.5 < more["gflop_per_step"] / found["gflop_per_step"] < 2.7
    assert more["memory_gb"] > found["memory_gb"]


# ---------------------------------------------------------------- checkpoints


def saved(tmp_path):
    cfg = tiny(tmp_path)
    s = train.setup(cfg)
    tree = rebuild(s.like, s.params)
    checkpoint.save(tmp_path / "last.safetensors", tree, tree, {**s.meta, "step": 0})
    return tmp_path / "last.safetensors", tree


def test_a_checkpoint_round_trips_bit_for_bit(tmp_path):
    file, tree = saved(tmp_path)
    for a, b in zip(leaves(tree).values(), leaves(checkpoint.load(file).params).values(), strict=True):
        assert torch.equal(a, b)
    assert checkpoint.load(tmp_path).path == file


@pytest.mark.parametrize("cut", [0, 5, 100, 4000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, cut):
    file, _ = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated or no safetensors file"):
        checkpoint.load(file)


def test_foreign_and_misshapen_checkpoints_are_refused(tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(UserError, match="not a checkpoint of ETRM"):
        checkpoint.load(other)
    file, tree = saved(tmp_path)
    tensors, meta = checkpoint.read_file(file)

    def write(tensors):
        checkpoint.write_file(other, tensors, {**meta, "sha256": checkpoint.digest_of(tensors, meta["etrm"])})

    for change, said in (
        ({"params.core.embed": torch.zeros(3, 3)}, r"params.core.embed is of shape \(3, 3\)"),
        ({"params.more": torch.zeros(1)}, "unknown tensor params.more"),
    ):
        write({**tensors, **change})
        with pytest.raises(UserError, match=said):
            checkpoint.load(other)
    write({k: v for k, v in tensors.items() if k != "ema.core.q_bias"})
    with pytest.raises(UserError, match="ema.core.q_bias is missing"):
        checkpoint.load(other)
    checkpoint.write_file(other, {**tensors, "params.core.q_bias": torch.ones(2)}, meta)
    with pytest.raises(UserError, match="differs from its checksum"):
        checkpoint.load(other)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="neither best"):
        (tmp_path / "empty").mkdir()
        checkpoint.load(tmp_path / "empty")


def test_encode_is_the_table_entry():
    cfg = ModelConfig(hidden=32, heads=2, context_tokens=4)
    grids = torch.full((1, 1, 36), 2)
    demos = all_demos(grids, grids + 1, torch.ones(1, 1, dtype=torch.bool))
    context = encoder_of(cfg).read(init_params(cfg, 0).encoder, batch_of(grids[0], grids[0], demos)).tokens
    assert context.shape == (1, 4, 32)
    assert torch.allclose(context.square().mean(-1), torch.ones(1, 4), atol=1e-3)
