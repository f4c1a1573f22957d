"""The folder of a run: stopping, crashing and going on to the same bits; checkpoints."""

import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from etrm_arc import checkpoint, train
from etrm_arc.config import UserError
from etrm_arc.etrm import leaves, rebuild
from etrm_arc.tests.kill import outcome
from etrm_arc.tests.test_train import tiny

# ---------------------------------------------------------------- stopping, crashing, going on


SMALL = {
    "model__hidden": 16,
    "data__canvas": 10,
    "train__shards": 1,
}


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for k, v in a[1].items():
        assert torch.equal(v, b[1][k]), k


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("muon", "bf16"), ("muon", "fp32"), ("adamw", "fp32"), ("adam_atan2", "bf16")],
)
def test_a_run_stopped_after_every_step_ends_in_the_same_bits(tmp_path, kind, dtype):
    options = {
        "optimizer__kind": kind,
        "train__dtype": dtype,
        "train__log_every": 3,
        "eval__every": 2,
        "train__steps": 5,
    }
    options |= SMALL if dtype == "bf16" else {}
    train.fit(tiny(tmp_path / "whole", **options))
    cfg, steps = tiny(tmp_path / "pieces", **options), []
    while not steps or "stopped" in steps[-1]:
        steps.append(train.fit(cfg, resume=bool(steps), limit=-1))
        assert steps[-1]["step"] == len(steps)
    assert len(steps) == 5
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))


@pytest.mark.parametrize("kind", ["recurrent", "lpn_variational"])
def test_noise_and_states_of_an_encoder_are_taken_up_again(tmp_path, kind):
    options = {
        "model__encoder": {"kind": kind, "layers": 1},
        "train__log_every": 1,
        "eval__every": 4,
        "train__steps": 4,
    }
    rows = []
    train.fit(tiny(tmp_path / "whole", **options), rows.append)
    assert ("all/kl" in rows[0]) == (kind == "lpn_variational")
    cfg, steps = tiny(tmp_path / "pieces", **options), []
    while not steps or "stopped" in steps[-1]:
        steps.append(train.fit(cfg, resume=bool(steps), limit=-1))
    assert len(steps) == 4
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))
    states = {
        tuple(v.shape)
        for k, v in checkpoint.load_state(tmp_path / "whole")[1][0].items()
        if k.endswith(".z_E")
    }
    assert states == {(1, 4, 32) if kind == "recurrent" else (1, 1, 1)}


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
    (tmp_path / ".step-00000009.safetensors.writing").write_bytes(
        b"half"
    )  # of a run that kept weights
    assert train.fit(cfg, said.append, resume=True)["step"] == 6
    assert said[0] == {
        "skipped": "state-00000006.json: state-00000006-0.safetensors differs from its checksum"
    }
    assert not list(tmp_path.glob(".*.writing"))
    for manifest in tmp_path.glob("state-*.json"):
        manifest.write_text("{")
    with pytest.raises(UserError, match="holds no whole state"):
        train.fit(cfg, resume=True)


def test_a_state_waits_for_the_files_of_all_processes(tmp_path, monkeypatch):
    tensors = {"x": torch.zeros(2)}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(checkpoint.save_state, tmp_path, 1, 0, 2, tensors, {})
        time.sleep(0.3)
        assert not first.done() and not checkpoint.manifests(tmp_path)
        checkpoint.save_state(tmp_path, 1, 1, 2, tensors, {})
    assert len(checkpoint.load_state(tmp_path)[1]) == 2
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="all processes must share run.dir"):
        checkpoint.save_state(tmp_path, 2, 0, 2, tensors, {})


def test_a_manifest_that_was_touched_or_renamed_is_no_state(tmp_path):
    train.fit(tiny(tmp_path))
    old, new = sorted(tmp_path.glob("state-*.json"))
    shutil.copy(old, tmp_path / "state-00000009.json")
    new.write_text(new.read_text().replace('"waited": ', '"waited": 1'))
    manifest, _, skipped = checkpoint.load_state(tmp_path)
    assert (
        manifest["step"] == 3
        and len(skipped) == 2
        and {line.split(":")[0] for line in skipped} == {"state-00000009.json", new.name}
    )


def test_the_checksum_covers_names_and_words_and_the_format_is_known(tmp_path):
    train.fit(tiny(tmp_path, train__steps=1))
    tensors, raw = checkpoint.read_file(tmp_path / "last.safetensors")
    file, said = tmp_path / "changed.safetensors", json.loads(raw["etrm"])
    renamed = {f"{k}x" if k == "params.core.embed" else k: v for k, v in tensors.items()}
    later = json.dumps({**said, "format": 2})
    for changed, words, why in (
        (renamed, raw, "differs from its checksum"),
        (tensors, {**raw, "etrm": json.dumps({**said, "step": 7})}, "differs from its checksum"),
        (
            tensors,
            {"etrm": later, "sha256": checkpoint.digest_of(tensors, later)},
            "format 2, this version reads 1",
        ),
    ):
        checkpoint.write_file(file, changed, words)
        with pytest.raises(UserError, match=why):
            checkpoint.load(file)


def test_resuming_with_other_shards_deals_the_carry_anew(tmp_path):
    cfg = tiny(tmp_path, train__steps=3)
    train.fit(cfg)
    _, before, _ = checkpoint.load_state(tmp_path)
    more = tiny(tmp_path, train__steps=4, train__shards=3)
    s = train.setup(more)
    slots, seen = checkpoint.saved_slots(before), {}
    for mine in s.shards:
        seen |= checkpoint.carry_tensors(mine, checkpoint.carry_from(slots, mine, s.device))
    assert sorted(seen) == list(range(6))
    assert all(torch.equal(seen[i][k], slots[i][k]) for i in slots for k in slots[i])
    assert train.fit(more, resume=True)["step"] == 4


def test_a_run_that_has_ended_can_be_made_longer(tmp_path):
    train.fit(tiny(tmp_path, **SMALL, train__steps=2))
    manifest = tmp_path / "state-00000002.json"
    assert json.loads(manifest.read_text())["ended"] == "done"
    doctored = json.loads(manifest.read_text()) | {"seconds": 1000.0}
    manifest.write_text(json.dumps({**doctored, "sha256": checkpoint.signed(doctored)}))
    assert (
        train.fit(tiny(tmp_path, **SMALL, train__steps=4), limit=-1, resume=True)["seconds"] >= 1000
    )
    newest = checkpoint.load_state(tmp_path)[0]
    assert (newest["step"], newest["ended"]) == (3, "") and newest["seconds"] > 1000
    assert checkpoint.listing(tmp_path)[0]["state"] == "stopped"


def test_what_is_saved_is_of_its_step_though_training_goes_on(tmp_path, monkeypatch):
    options = {**SMALL, "train__steps": 3, "train__save_every": 1, "train__keep_every": 1}
    train.fit(tiny(tmp_path / "fast", **options))
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: time.sleep(0.3) or save(*args))
    train.fit(tiny(tmp_path / "slow", **options))
    for step in (1, 2):
        kept = [
            checkpoint.load(tmp_path / f / f"step-{step:08d}.safetensors") for f in ("fast", "slow")
        ]
        assert kept[0].meta["step"] == kept[1].meta["step"] == step
        for a, b in zip(*(leaves(c.params).values() for c in kept), strict=True):
            assert torch.equal(a, b)
    fast, slow = (
        json.loads((tmp_path / f / "state-00000002.json").read_text()) for f in ("fast", "slow")
    )
    assert fast["files"] == slow["files"]


def test_another_yardstick_starts_a_new_best(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(
            train, "watch", lambda *_: {"train/ema/own/loss": 0.0, "train/ema/own/exact": 0.0}
        )
        train.fit(tiny(tmp_path, train__steps=3))
    assert checkpoint.load_state(tmp_path)[0]["best"] == 0.0
    said = []
    train.fit(tiny(tmp_path, train__steps=6, eval__weights=["raw"]), said.append, resume=True)
    manifest = checkpoint.load_state(tmp_path)[0]
    assert manifest["best"] == said[-1]["train/raw/own/loss"] > 0


def test_another_dtype_or_training_set_is_refused(tmp_path):
    train.fit(tiny(tmp_path, train__steps=1))
    manifest = tmp_path / "state-00000001.json"
    for key in ("dtype", "data"):
        text = json.loads(manifest.read_text())
        text |= {key: "other", "step": 2}
        (tmp_path / "state-00000002.json").write_text(
            json.dumps({**text, "sha256": checkpoint.signed(text)})
        )
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

    before = signal.getsignal(signal.SIGTERM)
    last = train.fit(tiny(tmp_path, train__log_every=1), interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
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
    options = {
        **SMALL,
        "train__steps": 2,
        "eval__every": 2,
        "train__save_every": 2,
        "train__log_every": 2,
        "train__keep_every": 2,
    }
    train.fit(tiny(tmp_path / "whole", **options))
    train.fit(tiny(tmp_path / "begun", **options), limit=-1)  # a step, and its state
    points, crashes = 0, 0
    while crashes == points:
        folder, points = tmp_path / f"crash-{points}", points + 1
        shutil.copytree(tmp_path / "begun", folder)
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
        assert checkpoint.load_state(folder)[0]["step"] in (1, 2)
        train.fit(tiny(folder, **options), resume=True)
        same(outcome(tmp_path / "whole"), outcome(folder))
    assert crashes > 15


def test_a_save_is_written_in_an_order_that_a_loss_of_power_cannot_break(tmp_path, monkeypatch):
    """Content is synced before its name appears, weights and metrics before the state, files before the manifest."""
    train.fit(tiny(tmp_path, **SMALL, train__steps=2, train__save_every=1))
    done = []

    def noted(what, real, at=0):
        def call(*args, **kwargs):
            done.append((what, args[at].name))
            return real(*args, **kwargs)

        return call

    def begin(run, *args):
        real_begin(run, *args)
        done.clear()

    real_begin = checkpoint.Run.begin
    monkeypatch.setattr(checkpoint.Run, "begin", begin)
    monkeypatch.setattr(checkpoint, "save_file", noted("write", checkpoint.save_file, 1))
    monkeypatch.setattr(checkpoint, "sync", noted("sync", checkpoint.sync))
    monkeypatch.setattr(Path, "replace", noted("rename", Path.replace))
    monkeypatch.setattr(Path, "unlink", noted("unlink", Path.unlink))
    train.fit(
        tiny(tmp_path, **SMALL, train__steps=3, train__keep_every=3, eval__every=3), resume=True
    )

    def whole(name):
        aside = f".{name}.writing"
        write = [] if name.endswith(".json") else [("write", aside)]
        return [*write, ("sync", aside), ("rename", aside), ("sync", tmp_path.name)]

    weights = [
        *whole("best.safetensors"),
        *whole("step-00000003.safetensors"),
        *whole("last.safetensors"),
    ]
    state = [
        ("sync", "metrics.jsonl"),
        *whole("state-00000003-0.safetensors"),
        *whole("state-00000003.json"),
    ]
    dropped = [("unlink", "state-00000001.json"), ("unlink", "state-00000001-0.safetensors")]
    assert done == [*weights, *state, *dropped]


@forks
def test_killed_outright_again_and_again_ends_in_the_same_bits(tmp_path, monkeypatch):
    """SIGKILL at the n-th write, sync, rename, row or step of each life, what was being written torn."""
    options = {
        **SMALL,
        "train__steps": 6,
        "train__save_every": 1,
        "train__log_every": 2,
        "eval__every": 4,
    }
    train.fit(tiny(tmp_path / "whole", **options))
    cfg = tiny(tmp_path / "killed", **options)

    def life(nth):
        """In a process of its own; kills itself."""
        calls = itertools.count(1)

        def deadly(real, tear):
            def call(*args, **kwargs):
                if next(calls) == nth:
                    tear(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        def half_a_row(run, row):
            run.log.write(json.dumps(row)[:9])
            run.log.flush()

        monkeypatch.setattr(
            checkpoint,
            "save_file",
            deadly(checkpoint.save_file, lambda tensors, path: path.write_bytes(b"torn")),
        )
        monkeypatch.setattr(checkpoint.Run, "write", deadly(checkpoint.Run.write, half_a_row))
        for owner, name in ((checkpoint, "sync"), (Path, "replace"), (train, "one_step")):
            monkeypatch.setattr(owner, name, deadly(getattr(owner, name), lambda *_: None))
        train.fit(cfg, resume=bool(checkpoint.manifests(tmp_path / "killed")))

    instants = (3, 9, 21, 24, 15, 30, 27, 7, 23, 34, 20, 16, 22, 19)
    ends = [os.waitpid(forked(lambda nth=nth: life(nth)), 0)[1] for nth in (*instants, 0)]
    assert set(ends) == {0, signal.SIGKILL} and ends.count(signal.SIGKILL) >= 8 and ends[-1] == 0
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob(".*.writing"))


def forked(work):
    """Process id of a copy of this process that does the work and ends."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def spread(cfg, processes, **options):
    """`fit` in so many processes."""
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(train.free_port()),
    }

    def one(rank):
        os.environ.update(shared, RANK=str(rank))
        train.fit(cfg, **options)

    assert [
        os.waitpid(pid, 0)[1] for pid in [forked(lambda r=r: one(r)) for r in range(processes)]
    ] == [0] * processes


@forks
def test_any_number_of_processes_ends_in_the_bits_of_one(tmp_path):
    """Also when it changes on the way: weights, average, optimizer and carry to the bit, sums of metrics to rounding."""
    options = {
        **SMALL,
        "train__shards": 4,
        "train__steps": 5,
        "train__log_every": 4,
        "eval__every": 4,
    }
    train.fit(tiny(tmp_path / "one", **options))
    cfg = tiny(tmp_path / "several", **options)
    spread(cfg, 2, limit=-1)
    spread(cfg, 2, limit=-1, resume=True)
    spread(cfg, 4, limit=-1, resume=True)
    spread(cfg, 2, resume=True)
    one, several = outcome(tmp_path / "one"), outcome(tmp_path / "several")
    assert [row.keys() for row in one.rows] == [row.keys() for row in several.rows]
    for row, other in zip(one.rows, several.rows, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    same(([], one.tensors), ([], several.tensors))


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
    rows = [
        [json.loads(line)["step"] for line in (f / "metrics.jsonl").open()] for f in (whole, fork)
    ]
    assert rows[0][-2:] == rows[1][-2:]


def test_what_a_run_says_of_itself_and_an_absent_tracker(tmp_path):
    train.fit(tiny(tmp_path / "a"))
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["config"]["train"]["steps"] == 6 and about["torch"] == torch.__version__
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    found = {Path(r["run"]).name: r["state"] for r in checkpoint.listing(tmp_path)}
    assert found["a"] == "done" and found["b"].startswith("unreadable")
    with train.Run(tmp_path / "a", 0, True):
        assert checkpoint.listing(tmp_path / "a")[0]["state"] == "running"
    sys.modules["wandb"] = None
    try:
        with pytest.raises(UserError, match="the package wandb is not installed"):
            train.fit(tiny(tmp_path / "c", run__track="wandb"))
    finally:
        del sys.modules["wandb"]


def test_a_tracker_gets_every_row(tmp_path, monkeypatch):
    got, said, closed = [], [], []
    monkeypatch.setitem(
        checkpoint.TRACKERS,
        "tensorboard",
        lambda folder, cfg: checkpoint.Track(got.append, lambda: closed.append(len(got))),
    )
    train.fit(tiny(tmp_path, run__track="tensorboard"), said.append)
    assert got == said and len(got) == 5 and closed == [5]


def test_what_was_written_after_the_state_never_was(tmp_path):
    cfg = tiny(tmp_path, train__save_every=1, **SMALL)
    train.fit(cfg)
    newest = tmp_path / "state-00000006-0.safetensors"
    newest.write_bytes(b"broken")
    (tmp_path / "state-00000004-1.safetensors").write_bytes(b"of a process that was killed")
    s = train.setup(cfg)
    with train.Run(tmp_path, 0, True) as run:
        run.begin(5, tmp_path, s.meta, "")
    assert sorted(p.name for p in tmp_path.glob("state-*")) == [
        "state-00000005-0.safetensors",
        "state-00000005.json",
    ]


# ---------------------------------------------------------------- checkpoints


def saved(tmp_path):
    cfg = tiny(tmp_path)
    s = train.setup(cfg)
    checkpoint.save(
        tmp_path / "last.safetensors",
        checkpoint.copied(checkpoint.weights(s, train.fresh_state(cfg, s))),
        {**s.meta, "step": 0},
    )
    return tmp_path / "last.safetensors", rebuild(s.like, s.params)


def test_a_checkpoint_on_the_hub_is_checked(tmp_path, monkeypatch):
    file, tree = saved(tmp_path)
    asked = []
    hub = types.SimpleNamespace(hf_hub_download=lambda *args: asked.append(args) or str(file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    c = checkpoint.load(f"hf:someone/model/a/last.safetensors#{checkpoint.digest(file)}")
    assert torch.equal(c.params.core.embed, tree.core.embed) and asked == [
        ("someone/model", "a/last.safetensors")
    ]
    for name, said in (("hf:a/b/c#00", "its checksum is"), ("hf:a/b", "must look like")):
        with pytest.raises(UserError, match=said):
            checkpoint.load(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub"):
        checkpoint.load("hf:a/b/c")


def test_a_checkpoint_round_trips_bit_for_bit(tmp_path):
    file, tree = saved(tmp_path)
    for a, b in zip(
        leaves(tree).values(), leaves(checkpoint.load(file).params).values(), strict=True
    ):
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
        checkpoint.write_file(
            other, tensors, {**meta, "sha256": checkpoint.digest_of(tensors, meta["etrm"])}
        )

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


# ---------------------------------------------------------------- forks, requeues, folders without states


@pytest.mark.parametrize(
    "changed",
    [
        {"run__seed": 1},
        {"optimizer__decay_scale": {r"core\..*": 0.5}, "optimizer__lr_scale": {".*embed": 0.3}},
    ],
)
def test_a_fork_may_change_its_seed_and_its_scales(tmp_path, changed):
    cfg = tiny(tmp_path / "a", train__steps=3, model__halt_max_steps=4)
    train.fit(cfg)
    other = tiny(tmp_path / "b", train__steps=6, model__halt_max_steps=4, **changed)
    s = train.setup(other)
    state = train.fresh_state(other, s)
    checkpoint.take_up(s, state, tmp_path / "a", True, 0, 1, lambda row: None)
    _, parts, _ = checkpoint.load_state(tmp_path / "a")
    own = train.setup(cfg)
    was = checkpoint.optimizers(cfg.optimizer, own.params)
    checkpoint.load_optimizers(was, parts[0])
    saved = {id(p): fields for opt in was for p, fields in opt.state.items()}
    for opt in state.opts:
        for p, fields in opt.state.items():
            path = next(k for k, v in s.params.items() if v is p)
            for name, x in fields.items():
                assert torch.equal(x, saved[id(own.params[path])][name]), (path, name)
    assert all(c.halted.all() for c in state.carries) == ("run__seed" in changed)
    assert train.fit(other, source=tmp_path / "a")["step"] == 6
    assert (tmp_path / "b" / "best.safetensors").exists()


def test_a_table_does_not_change_the_seed_of_its_symmetries(tmp_path):
    options = {
        "model__encoder__kind": "table",
        "data__symmetries": 2,
        "eval__on": "train",
        "data__dev": (),
        "train__steps": 2,
    }
    train.fit(tiny(tmp_path / "a", **options))
    with pytest.raises(UserError, match="run.seed: it decides which symmetry"):
        train.fit(tiny(tmp_path / "b", **options, run__seed=1), source=tmp_path / "a")


def test_weights_whose_states_are_gone_are_not_overwritten(tmp_path):
    cfg = tiny(tmp_path, train__save_every=2)
    train.fit(cfg)
    for file in tmp_path.glob("state-*"):
        file.unlink()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"}
    for resume in (False, True):
        with pytest.raises(UserError, match="holds the weights of step 6, whose states are gone"):
            train.fit(cfg, resume=resume)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"} == before
