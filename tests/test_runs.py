"""Runs that stop, crash and resume to the same bits; checkpoints and their damage."""

import json
import math
import os
import shutil
import signal
import socket
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import multiprocessing

from etrm_arc import checkpoint, train
from etrm_arc.config import UserError
from etrm_arc.extras import report, trackers
from etrm_arc.tests.kill import outcome
from etrm_arc.tests.test_train import FEEDBACK, SET, tiny

SMALL = {"model__hidden": 16, "model__layers": 1, "model__H_cycles": 1, "train__shards": 1}
TINIEST = {**SMALL, "data__max_train_tasks": 2, "train__batch": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"train__dtype": "bf16", "data__canvas": 10, "train__shards": 2},
        {"optimizer__kind": "adamw", "eval__weights": ["raw", "ema"]},
        {"optimizer__kind": "adam_atan2"},
        {"model__encoder": {"kind": "recurrent", "layers": 1}},  # states of an encoder
        {"model__encoder": {"kind": "variational", "layers": 1}},  # noise
        {"model__encoder": {"kind": "table"}, "data__symmetries": 2},
        FEEDBACK,
    ],
)
def test_a_run_stopped_after_every_step_ends_in_the_same_bits(tmp_path, options):
    options = {"train__log_every": 3, "eval__every": 2, "train__steps": 4, **SMALL, **options}
    train.fit(tiny(tmp_path / "whole", **options))
    for step in (1, 2, 3, 4):
        last = train.fit(tiny(tmp_path / "pieces", **options), resume=step > 1, limit=-1)
        assert (last["step"], "stopped" in last) == (step, step < 4)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "pieces")


def test_a_signal_finishes_the_step_and_saves(tmp_path):
    def interrupt(row):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    last = train.fit(tiny(tmp_path, train__log_every=1), interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    assert last["stopped"] == "SIGTERM" and last["step"] == 2
    assert checkpoint.load_state(tmp_path).facts["step"] == 2


def test_what_decides_the_course_of_a_run_may_not_change_on_resume(tmp_path):
    """Episodes and rows of a table are addressed by the order of tasks, which their names give."""
    folder, tasks, dev = tmp_path / "run", tmp_path / "train", tmp_path / "dev"
    shutil.copytree(SET, tasks)
    dev.mkdir()
    shutil.move(tasks / "flip.json", dev)
    options = {**SMALL, "data__train": [str(tasks)], "data__dev": [str(dev)], "eval__on": "dev"}
    train.fit(tiny(folder, **options), limit=-1)
    with pytest.raises(UserError, match="holds a run already"):
        train.fit(tiny(folder, **options))

    def refused(words, **changes):
        with pytest.raises(UserError, match=f"--resume: {words}"):
            train.fit(tiny(folder, **options | changes), resume=True)

    refused("optimizer.lr is 0.5", optimizer__lr=0.5)
    refused("run.seed", run__seed=1)
    first = tasks / "border.json"
    text = first.read_text()
    renamed = first.rename(tasks / "zzz.json")
    refused("the order of the training tasks")
    renamed.rename(first).write_text(text.replace("1", "2"))
    refused("the training set is")
    first.write_text(text)
    shutil.copy(first, dev)
    refused("the (dev|training) set is")
    (dev / first.name).unlink()
    assert train.fit(tiny(folder, **options | {"train__steps": 2}), resume=True)["step"] == 2


def test_resume_skips_a_broken_state_and_says_so(tmp_path):
    cfg, rows = tiny(tmp_path, **TINIEST), []
    train.fit(cfg)
    newest = checkpoint.states(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    shutil.copy(newest, tmp_path / "state-9 (copy).safetensors")
    (tmp_path / ".last.safetensors.writing").write_bytes(b"half")
    assert train.fit(cfg, rows.append, resume=True)["step"] == 6
    assert "checksum" in rows[0]["skipped"] and "skipped" not in rows[1]
    assert not list(tmp_path.glob(".*.writing"))
    for file in checkpoint.states(tmp_path):
        file.write_bytes(b"{")
    with pytest.raises(UserError, match="holds no whole state"):
        train.fit(cfg, resume=True)


def test_metrics_survive_damage_on_resume_and_losses_are_told(tmp_path):
    cfg, rows, log = tiny(tmp_path, train__log_every=1), [], tmp_path / "metrics.jsonl"
    train.fit(cfg)
    first, *others = log.read_bytes().splitlines()
    odd = [b"\xff", b'{"loss": 1}', b"[1]", b'{"step": "x"}']
    log.write_bytes(b"\n".join([first, *odd, *others, b'{"step": 7, "lr"']))
    train.fit(cfg, rows.append, resume=True)
    assert "line 2, 3, 4, 5" in rows[0]["skipped"]
    assert list(checkpoint.rows_of(log)[0]) == [json.loads(line) for line in (first, *others)]
    log.write_bytes(first + b"\n")
    train.fit(cfg, rows.append, resume=True)
    assert f"{len(others)} of {1 + len(others)} rows are missing" in rows[1]["skipped"]
    for name in ("metrics.jsonl", "lock"):  # a pipe would be waited for
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            train.fit(cfg, resume=True)


def test_a_folder_whose_states_are_gone_is_not_overwritten(tmp_path):
    cfg = tiny(tmp_path, train__save_every=2)
    train.fit(cfg)
    for file in checkpoint.states(tmp_path):
        file.unlink()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for resume in (False, True):
        with pytest.raises(UserError, match="states are gone"):
            train.fit(cfg, resume=resume)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for name in ("lock/run", "a\0b"):  # below a file; no name of a file
        with pytest.raises(UserError, match="^run.dir: "):
            train.fit(tiny(tmp_path / name))


def failing(function, countdown):
    def call(*args, **kwargs):
        if next(countdown, None) == 0:
            raise OSError(5, "Input/output error")
        return function(*args, **kwargs)

    return call


def test_a_crash_at_any_point_of_a_write_leaves_a_whole_state(tmp_path, monkeypatch):
    """Every write, sync and rename of a save fails once; what is left resumes."""
    options = {**TINIEST, "train__steps": 2, "eval__every": 2, "train__log_every": 2}
    train.fit(tiny(tmp_path / "whole", **options))
    train.fit(tiny(tmp_path / "begun", **options), limit=-1)
    expected, points, crashes = outcome(tmp_path / "whole"), 0, 0
    while crashes == points:
        folder, points = tmp_path / f"crash-{points}", points + 1
        shutil.copytree(tmp_path / "begun", folder)
        countdown = iter(range(points - 1, -1, -1))
        with monkeypatch.context() as patch:
            for owner, name in (checkpoint, "sync"), (checkpoint, "save_file"), (Path, "replace"):
                patch.setattr(owner, name, failing(getattr(owner, name), countdown))
            try:
                train.fit(tiny(folder, **options), resume=True)
            except (UserError, OSError):
                crashes += 1
        assert checkpoint.load_state(folder).facts["step"] in (1, 2)
        train.fit(tiny(folder, **options), resume=True)
        assert expected == outcome(folder)
    assert crashes > 12


def run_rank(rank, processes, port, cfg, resume, limit):
    os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.fit(cfg, resume=resume, limit=limit)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_any_number_of_processes_ends_in_the_bits_of_one(tmp_path):
    """Also when it changes on the way; metrics, too."""
    options = {**SMALL, "train__shards": 4, "train__steps": 5, "train__log_every": 4}
    options["eval__every"] = 4
    train.fit(tiny(tmp_path / "one", **options))
    cfg = tiny(tmp_path / "several", **options)
    for processes, resume, limit in ((2, False, -1), (4, True, -1), (2, True, math.inf)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            arguments = (processes, free.getsockname()[1], cfg, resume, limit)
        multiprocessing.start_processes(run_rank, arguments, processes, start_method="fork")
    assert outcome(tmp_path / "one") == outcome(tmp_path / "several")


def test_what_a_run_folder_says_and_that_a_run_can_be_made_longer(tmp_path, monkeypatch):
    tracked, rows = [], []
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, cfg: tracked.append)
    options = {**TINIEST, "run__track": "tensorboard"}
    seconds = train.fit(tiny(tmp_path / "a", **options, train__steps=2), rows.append)["seconds"]
    assert tracked == rows
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["config"]["train"]["steps"] == 2 and about["torch"] == torch.__version__
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    a, b = report.listing(tmp_path)
    assert a["state"] == "done" and b["state"].startswith("unreadable")
    cfg = tiny(tmp_path / "a", **options, train__steps=4)
    with checkpoint.Run(tmp_path / "a", 0, True):
        assert report.listing(tmp_path / "a")[0]["state"] == "running"
        with pytest.raises(UserError, match="held by a live"):
            train.fit(cfg, resume=True)
    longer = train.fit(cfg, limit=-1, resume=True)
    assert longer["step"] == 3 and longer["seconds"] >= seconds
    assert report.listing(tmp_path / "a")[0]["state"] == "stopped"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train.fit(tiny(tmp_path / "c", run__track="wandb"))


def test_files_follow_the_umask_and_links_and_devices_stay(tmp_path, monkeypatch):
    """Also in a folder that cannot be synced."""
    sync, real, link = os.fsync, tmp_path / "real", tmp_path / "link"

    def sync_of_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", sync_of_files)
    old = os.umask(0o027)
    checkpoint.write_text(real, "old")
    os.umask(old)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    link.symlink_to(real)
    checkpoint.write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    checkpoint.write_text(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "absent" / "x", tmp_path, tmp_path / "loop"):
        with pytest.raises(UserError, match="cannot be written"):
            checkpoint.write_text(path, "")


@pytest.mark.parametrize(
    ("tensors", "meta", "text"),
    [
        ({"params.core.embed": torch.zeros(3, 3)}, {}, "must be"),
        ({"params.more": torch.zeros(1)}, {}, "unknown"),
        ({"pairs": None}, {}, "missing"),
        ({}, {"finding": 5}, "metadata"),
        ({}, {"config": {"model": {"hidden": 20000}}}, "must be"),
        ({}, {"config": {"model": {"encoder": {"layers": 2**30}}}}, "depth"),
        ({}, {"config": {"model": {}, "solve": {"views": 2**30}}}, "10000"),
        ({}, {"ended": 5}, "metadata"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(run, tmp_path, tensors, meta, text):
    """Before anything of the size that it claims is allocated."""
    before, about = checkpoint.read(run / "last.safetensors")
    changed = {k: v for k, v in {**before, **tensors}.items() if v is not None}
    file, begun = tmp_path / "x.safetensors", time.monotonic()
    checkpoint.save(file, changed, {**about, **meta})
    with pytest.raises(UserError, match=text):
        checkpoint.load(file)
    assert time.monotonic() - begun < 20


def test_a_checkpoint_is_found_and_its_checksum_covers_names_values_and_metadata(run, tmp_path):
    saved, other, name = run / "last.safetensors", tmp_path / "x.safetensors", "params.core.q_bias"
    tensors, about = checkpoint.read(saved)
    with checkpoint.opened(saved) as (file, _):
        metadata = file.metadata()
    values = {**tensors, name: tensors[name] + 1}
    renamed = {f"{k}x": v for k, v in tensors.items()}
    changed = metadata | {"etrm": json.dumps({**about, "step": 7})}
    for x, y in ((values, metadata), (renamed, metadata), (tensors, changed)):
        save_file(x, other, metadata=y)
        with pytest.raises(UserError, match="checksum"):
            checkpoint.read(other)
    save_file(tensors, other, metadata=metadata)
    assert checkpoint.load(other).meta["step"] == 4
    for odd in ({"etrm": json.dumps({**about, "format": 9})}, {"etrm": "[]"}, None):
        save_file(tensors, other, metadata=odd)
        with pytest.raises(UserError, match="not a checkpoint of ETRM in format"):
            checkpoint.load(other)
    for cut in (0, 5, 4000, -1):
        other.write_bytes(saved.read_bytes()[:cut])
        with pytest.raises(UserError, match="truncated"):
            checkpoint.load(other)
    torch.save(tensors, other)
    with pytest.raises(UserError, match="init_from.path"):
        checkpoint.load(other)
    assert checkpoint.load(run).path.name == "best.safetensors"
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nothing")
