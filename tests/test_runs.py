"""Runs that stop, crash and resume to the same bits; checkpoints and their damage."""

import itertools
import json
import os
import shutil
import signal
import socket
import stat
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from etrm_arc import checkpoint, train
from etrm_arc.config import UserError
from etrm_arc.etrm import leaves
from etrm_arc.extras import trackers
from etrm_arc.tests.kill import outcome
from etrm_arc.tests.test_train import SET, tiny

SMALL = {"model__hidden": 16, "model__layers": 1, "model__H_cycles": 1, "train__shards": 1}
TINIEST = {**SMALL, "data__max_train_tasks": 2, "train__batch": 2}
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for k, v in a[1].items():
        assert torch.equal(v, b[1][k]), k


def in_pieces(cfg):
    """Run a config one step at a time; how often it was started."""
    for starts in itertools.count(1):
        last = train.fit(cfg, resume=starts > 1, limit=-1)
        assert last["step"] == starts
        if "stopped" not in last:
            return starts


# ---------------------------------------------------------------- stopping and resuming


@pytest.mark.parametrize(
    "options",
    [
        {"train__dtype": "bf16", "data__canvas": 10, "train__shards": 2},
        {"optimizer__kind": "adamw", "eval__weights": ["raw", "ema"]},
        {"optimizer__kind": "adam_atan2"},
        {"model__encoder": {"kind": "recurrent", "layers": 1}},  # states of an encoder
        {"model__encoder": {"kind": "variational", "layers": 1}},  # noise
        {"model__encoder": {"kind": "table"}, "data__symmetries": 2},
    ],
)
def test_a_run_stopped_after_every_step_ends_in_the_same_bits(tmp_path, options):
    options = {"train__log_every": 3, "eval__every": 2, "train__steps": 4, **SMALL, **options}
    train.fit(tiny(tmp_path / "whole", **options))
    assert in_pieces(tiny(tmp_path / "pieces", **options)) == 4
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "pieces"))


def test_a_signal_finishes_the_step_and_saves(tmp_path):
    def interrupt(row):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    last = train.fit(tiny(tmp_path, train__log_every=1), interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    assert last["stopped"] == "SIGTERM" and last["step"] == 2
    assert checkpoint.load_state(tmp_path).facts["step"] == 2


def test_a_run_that_has_ended_can_be_made_longer(tmp_path, monkeypatch):
    train.fit(tiny(tmp_path, **SMALL, train__steps=2))
    assert checkpoint.listing(tmp_path)[0]["state"] == "done"
    saved = checkpoint.load_state(tmp_path)
    checkpoint.save_state(tmp_path, saved.tensors, {**saved.facts, "seconds": 1000.0})
    longer = train.fit(tiny(tmp_path, **SMALL, train__steps=4), limit=-1, resume=True)
    facts = checkpoint.load_state(tmp_path).facts
    assert (facts["step"], facts["ended"]) == (3, "") and longer["seconds"] >= 1000
    assert checkpoint.listing(tmp_path)[0]["state"] == "stopped"


def test_another_yardstick_starts_a_new_best(tmp_path, monkeypatch):
    def watch(*args):
        return {"train/ema/own/loss": 0.0, "train/ema/own/exact": 0.0}

    with monkeypatch.context() as patch:
        patch.setattr(train, "watch", watch)
        train.fit(tiny(tmp_path, train__steps=3))
    assert checkpoint.load_state(tmp_path).facts["best"] == 0.0
    last = train.fit(tiny(tmp_path, train__steps=6, eval__weights=["raw"]), resume=True)
    assert checkpoint.load_state(tmp_path).facts["best"] == last["train/raw/own/loss"] > 0


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of a few tasks, stopped after a step: (folder, options of its config)."""
    base = tmp_path_factory.mktemp("stopped")
    shutil.copytree(SET, base / "tasks")
    shutil.copytree(SET, base / "dev")
    for file in (base / "dev").glob("*.json"):
        if file.stem not in ("border", "mirror"):
            file.unlink()
    options = {"data__train": [str(base / "tasks")], **SMALL}
    train.fit(tiny(base / "run", **options), limit=-1)
    return base, options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__lr": 0.5}, "optimizer.lr is 0.5"),
        ({"train__dtype": "bf16"}, "train.dtype"),
        ({"run__seed": 1}, "run.seed"),
        ({"data__dihedral": False}, "data.dihedral"),
    ],
)
def test_what_may_not_change_on_resume_is_refused(stopped, changes, words):
    base, options = stopped
    with pytest.raises(UserError, match=f"--resume: {words}"):
        train.fit(tiny(base / "run", **options, **changes), resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        train.fit(tiny(base / "run", **options))


def test_a_renamed_or_changed_training_task_is_refused_on_resume(stopped, tmp_path):
    """Episodes and rows of a table are addressed by the order of tasks, which their names give."""
    base, options = stopped
    shutil.copytree(base / "run", tmp_path / "run")
    first = sorted((base / "tasks").glob("*.json"))[0]
    first.rename(last := base / "tasks" / "zzz.json")
    with pytest.raises(UserError, match="order of the training tasks"):
        train.fit(tiny(tmp_path / "run", **options), resume=True)
    text = last.read_text()
    last.write_text(text.replace("1", "2"))
    with pytest.raises(UserError, match="the training set is"):
        train.fit(tiny(tmp_path / "run", **options), resume=True)
    last.write_text(text)
    last.rename(first)
    assert train.fit(tiny(tmp_path / "run", **options, train__steps=2), resume=True)["step"] == 2


def test_changed_dev_tasks_are_refused_on_resume(tmp_path):
    shutil.copytree(SET, tmp_path / "dev")
    options = {"data__train": ["arc1:training"], "data__max_train_tasks": 2, "eval__on": "dev"}
    options |= {"data__dev": [str(tmp_path / "dev")], "train__steps": 1, **SMALL}
    train.fit(tiny(tmp_path / "run", **options))
    next((tmp_path / "dev").glob("*.json")).unlink()
    with pytest.raises(UserError, match="the dev set is"):
        train.fit(tiny(tmp_path / "run", **options | {"train__steps": 2}), resume=True)


def test_a_state_remembers_what_it_was_initialised_from(tmp_path):
    """Also where the file is another one by now, or gone."""
    train.fit(tiny(tmp_path / "a", train__steps=1))
    c = checkpoint.load(tmp_path / "a" / "last.safetensors")
    source, pair = tmp_path / "demos.safetensors", torch.arange(16, dtype=torch.uint8)[None]
    weights = {f"params.{k}": v for k, v in leaves(c.params).items()}
    finding = {**c.meta["finding"], "admitted": 3}
    checkpoint.save(source, {**weights, "pairs": pair}, {**c.meta, "finding": finding})
    options = {"init_from__path": str(source), "train__steps": 4}
    train.fit(tiny(tmp_path / "b", **options), limit=-1)
    source.unlink()
    train.fit(tiny(tmp_path / "b", **options), resume=True)
    resumed = checkpoint.load(tmp_path / "b" / "last.safetensors")
    assert "DEMOS of held-out tasks" in checkpoint.warned(resumed.meta)
    assert {*map(bytes, resumed.pairs.tolist())} == {
        *map(bytes, c.pairs.tolist()),
        bytes(range(16)),
    }


# ---------------------------------------------------------------- crashes


def test_resume_skips_a_broken_state_and_says_so(tmp_path):
    cfg, rows = tiny(tmp_path), []
    train.fit(cfg)
    newest = tmp_path / "state-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    shutil.copy(tmp_path / "state-00000003.safetensors", tmp_path / "state-00000009.safetensors")
    shutil.copy(newest, tmp_path / "state-00000009 (copy).safetensors")
    (tmp_path / ".last.safetensors.writing").write_bytes(b"half")
    assert train.fit(cfg, rows.append, resume=True)["step"] == 6
    reasons = [row["skipped"] for row in rows[:2]]
    assert "is of step 3" in reasons[0] and "checksum" in reasons[1]
    assert not list(tmp_path.glob(".*.writing"))
    for file in checkpoint.states(tmp_path):
        file.write_bytes(b"{")
    with pytest.raises(UserError, match="holds no whole state"):
        train.fit(cfg, resume=True)


def test_metrics_survive_damage_on_resume_and_losses_are_told(tmp_path):
    cfg, rows = tiny(tmp_path, train__log_every=1, eval__every=6), []
    train.fit(cfg)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    odd = [b"\xff", b'{"loss": 1}', b"[1]", b'{"step": "x"}']
    log.write_bytes(b"\n".join([lines[0], *odd, *lines[1:-1], b'{"step": 7, "lr"']))
    train.fit(cfg, rows.append, resume=True)
    assert "line 2, 3, 4, 5" in rows[0]["skipped"]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 6
    log.unlink()
    rows.clear()
    train.fit(tiny(tmp_path, train__log_every=1, train__steps=7), rows.append, resume=True)
    assert "missing" in rows[0]["skipped"]


def test_weights_or_metrics_whose_states_are_gone_are_not_overwritten(tmp_path):
    cfg = tiny(tmp_path, train__save_every=2)
    train.fit(cfg)
    for file in checkpoint.states(tmp_path):
        file.unlink()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"}
    for resume in (False, True):
        with pytest.raises(UserError, match="states are gone"):
            train.fit(cfg, resume=resume)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "lock"} == before


def failing(real, left):
    """The function, which fails at one call."""

    def call(*args, **kwargs):
        if next(left, None) == 0:
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    return call


def test_a_crash_at_any_point_of_a_write_leaves_a_whole_state(tmp_path, monkeypatch):
    """Every write, sync, rename and removal of a save fails once; what is left resumes."""
    options = {**TINIEST, "train__steps": 2, "eval__every": 2, "train__log_every": 2}
    train.fit(tiny(tmp_path / "whole", **options))
    train.fit(tiny(tmp_path / "begun", **options), limit=-1)
    expected, points, crashes = outcome(tmp_path / "whole"), 0, 0
    while crashes == points:
        folder, points = tmp_path / f"crash-{points}", points + 1
        shutil.copytree(tmp_path / "begun", folder)
        left = iter(range(points - 1, -1, -1))
        with monkeypatch.context() as patch:
            for owner, name in (
                (checkpoint, "sync"), (checkpoint, "save_file"), (Path, "replace"),
                (Path, "unlink"),
            ):  # fmt: skip
                patch.setattr(owner, name, failing(getattr(owner, name), left))
            try:
                train.fit(tiny(folder, **options), resume=True)
            except (UserError, OSError):
                crashes += 1
        assert checkpoint.load_state(folder).facts["step"] in (1, 2)
        train.fit(tiny(folder, **options), resume=True)
        same(expected, outcome(folder))
    assert crashes > 12


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train.fit(cfg, **options)

    pids = [forked(lambda r=r: one(r)) for r in range(processes)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * processes


@forks
def test_any_number_of_processes_ends_in_the_bits_of_one(tmp_path):
    """Also when it changes on the way; metrics, too."""
    options = {**SMALL, "train__shards": 4, "train__steps": 5, "train__log_every": 4}
    options["eval__every"] = 4
    train.fit(tiny(tmp_path / "one", **options))
    cfg = tiny(tmp_path / "several", **options)
    spread(cfg, 2, limit=-1)
    spread(cfg, 4, limit=-1, resume=True)
    spread(cfg, 2, resume=True)
    same(outcome(tmp_path / "one"), outcome(tmp_path / "several"))


# ---------------------------------------------------------------- the folder


def test_a_folder_held_by_a_live_run_is_refused(tmp_path):
    with checkpoint.Run(tmp_path, 0, False), pytest.raises(UserError, match="held by a live"):
        train.fit(tiny(tmp_path))


def test_what_a_run_says_of_itself_and_an_absent_tracker(tmp_path, monkeypatch):
    train.fit(tiny(tmp_path / "a", **TINIEST))
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["config"]["train"]["steps"] == 6 and about["torch"] == torch.__version__
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    states = {Path(r["run"]).name: r["state"] for r in checkpoint.listing(tmp_path)}
    assert states["a"] == "done" and states["b"].startswith("unreadable")
    with checkpoint.Run(tmp_path / "a", 0, True):
        assert checkpoint.listing(tmp_path / "a")[0]["state"] == "running"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train.fit(tiny(tmp_path / "c", run__track="wandb"))


def test_a_tracker_gets_every_row(tmp_path, monkeypatch):
    tracked, rows = [], []
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, cfg: tracked.append)
    train.fit(tiny(tmp_path, run__track="tensorboard"), rows.append)
    assert tracked == rows


def test_files_follow_the_umask_and_links_and_devices_stay(tmp_path):
    old = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    checkpoint.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    checkpoint.write_text(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    for path in (tmp_path / "absent" / "x", tmp_path / "real" / "x", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            checkpoint.write_text(path, "")


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def picky(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", picky)
    checkpoint.write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write_text(tmp_path / "y", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a run that took a step."""
    folder = tmp_path_factory.mktemp("saved")
    train.fit(tiny(folder, **SMALL, train__steps=1))
    return folder / "last.safetensors"


@pytest.mark.parametrize("cut", [0, 5, 100, 4000, -1])
def test_a_truncated_checkpoint_is_refused(saved, tmp_path, cut):
    file = tmp_path / "x.safetensors"
    file.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated"):
        checkpoint.load(file)


@pytest.mark.parametrize(
    ("tensors", "meta", "words"),
    [
        ({"params.core.embed": torch.zeros(3, 3)}, {}, "must be"),
        ({"params.more": torch.zeros(1)}, {}, "unknown"),
        ({"ema.core.q_bias": None}, {}, "missing"),
        ({"pairs": None}, {}, "missing"),
        ({}, {"data": None}, "metadata"),
        ({}, {"finding": 5}, "metadata"),
        ({}, {"config": {"model": {"hidden": 20000}}}, "missing"),
        ({}, {"config": {"model": {"layers": 2**30}}}, "depth"),
        ({}, {"config": {"model": {"encoder": {"layers": 2**30}}}}, "depth"),
        ({}, {"config": {"model": {"L_cycles": 2**30}}}, "depth"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    saved, tmp_path, tensors, meta, words
):
    """Before anything of the size that it claims is allocated."""
    before, about = checkpoint.read(saved)
    changed = {k: v for k, v in {**before, **tensors}.items() if v is not None}
    changed_about = {k: v for k, v in {**about, **meta}.items() if v is not None}
    file = tmp_path / "x.safetensors"
    checkpoint.save(file, changed, changed_about)
    begun = time.monotonic()
    with pytest.raises(UserError, match=words):
        checkpoint.load(file)
    assert time.monotonic() - begun < 20


def test_the_checksum_covers_names_values_and_metadata(saved, tmp_path):
    tensors, about = checkpoint.read(saved)
    with checkpoint.opened(saved) as (file, _):
        text, checksum = (file.metadata()[k] for k in ("etrm", "sha256"))
    other = tmp_path / "x.safetensors"
    values = {**tensors, "params.core.q_bias": tensors["params.core.q_bias"] + 1}
    renamed = {f"{k}x" if k == "params.core.q_bias" else k: v for k, v in tensors.items()}
    words = json.dumps({**about, "step": 7})
    for changed, said in ((values, text), (renamed, text), (tensors, words)):
        save_file(changed, other, metadata={"etrm": said, "sha256": checksum})
        with pytest.raises(UserError, match="checksum"):
            checkpoint.read(other)
    save_file(tensors, other, metadata={"etrm": text, "sha256": checksum})
    assert checkpoint.load(other).meta["step"] == 1
    save_file(tensors, other, metadata={"etrm": json.dumps({**about, "format": 9})})
    with pytest.raises(UserError, match="not a checkpoint of ETRM in format"):
        checkpoint.load(other)
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(UserError, match="not a checkpoint of ETRM in format"):
        checkpoint.load(other)


def test_a_checkpoint_is_found_by_file_folder_and_name(saved, tmp_path):
    assert checkpoint.load(saved.parent).path.name == "best.safetensors"
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="neither best"):
        checkpoint.load(tmp_path)
    torch.save({"x": torch.zeros(2)}, tmp_path / "step_9")
    with pytest.raises(UserError, match="no safetensors file"):
        checkpoint.load(tmp_path / "step_9")
    facts = checkpoint.inspect(saved)
    assert facts["shapes"]["core.q_bias"] == (2,) and facts["step"] == 1
