"""Kill a training run with SIGKILL at random instants, resume it, and compare what it leaves with the unbroken run.

    python -m tests.kill --kills 20 [--seed 0] [--json]

fp32 and bf16, one and two processes in turn; Muon and EMA; canvases from 1 x 1 to a side of 30; a state after every step.
A tenth of the kills falls at start-up, half in the middle of a write, the others at any instant of training. A kill is
identical when the newest whole state that it left, and the metrics up to it, were to the bit the unbroken run's at that
step, and its run in the end left the same weights, average, state and metrics (the clock aside). OMP_NUM_THREADS is inherited.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from etrm_arc import checkpoint
from etrm_arc.checkpoint import is_held

STEPS = 32
RECIPE = f"""
data = {{ train = ["tasks"], dev = [], held_out = [] }}
model = {{ hidden = 16, heads = 2, expansion = 1.0, H_cycles = 2, L_cycles = 1, halt_max_steps = 4 }}
optimizer = {{ kind = "muon", warmup = 5, lr = 3e-3 }}
train = {{ batch = 8, shards = 2, steps = {STEPS}, save_every = 1, log_every = 3, ema = 0.9 }}
eval = {{ on = "train", every = 10, act_steps = 1 }}
"""
SIZES = ((1, 1), (3, 2), (4, 4), (10, 10), (30, 2), (2, 30), (15, 6))
WALL_CLOCK = ("seconds", "samples_per_s")


class Outcome(NamedTuple):
    rows: list[dict[str, Any]]  # of metrics, without the clock
    tensors: dict[str, torch.Tensor]


class Whole(NamedTuple):
    """The unbroken run."""

    states: dict[int, dict[str, str]]
    outcome: Outcome
    begins: float  # seconds until its first state
    trains: float  # seconds from there to its end


def prepare(work: Path) -> None:
    draw = random.Random(0)
    (work / "kill.toml").write_text(RECIPE)
    (work / "tasks").mkdir()
    for h, w in SIZES:
        grids = [[[draw.randrange(10) for _ in range(w)] for _ in range(h)] for _ in range(3)]
        demo, other, query = ({"input": x, "output": x[::-1]} for x in grids)
        (work / "tasks" / f"{h}x{w}.json").write_text(
            json.dumps({"train": [demo, other], "test": [query]})
        )


def start(work: Path, folder: Path, dtype: str, procs: int) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if checkpoint.manifests(folder) else []
    sets = ["--set", f"run.dir={folder}", "--set", f"train.dtype={dtype}", "--procs", str(procs)]
    command = [sys.executable, "-m", "etrm_arc.cli", "train", "kill.toml", *sets, *resume]
    with open(work / "stderr", "w") as said:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True, cwd=work
        )


def kill(run: subprocess.Popen[bytes], folder: Path) -> None:
    """All processes of the run at once, without a word; until they are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    while is_held(folder):
        time.sleep(0.001)


def outcome(folder: Path, step: float = math.inf) -> Outcome:
    """Metrics up to a step (a line that a kill has cut off is after it), and every tensor that the run leaves."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    files = [p for n in ("last", "best") if (p := folder / f"{n}.safetensors").exists()]
    found = {f"{p.stem}.{k}": v for p in files for k, v in checkpoint.read_file(p)[0].items()}
    for part in checkpoint.load_state(folder)[1]:
        found |= part
    return Outcome(
        [
            {k: v for k, v in row.items() if k not in WALL_CLOCK}
            for row in rows
            if row["step"] <= step
        ],
        found,
    )


def equal(one: Outcome, other: Outcome) -> bool:
    same = one.rows == other.rows and one.tensors.keys() == other.tensors.keys()
    return same and all(torch.equal(v, other.tensors[k]) for k, v in one.tensors.items())


def states(folder: Path) -> dict[int, dict[str, str]]:
    """Checksums of each process's file, of the states that are there."""
    found = {}
    for manifest in checkpoint.manifests(folder):
        with contextlib.suppress(OSError):
            said = json.loads(manifest.read_text())
            found[said["step"]] = said["files"]
    return found


def left_whole(folder: Path, whole: Whole) -> bool:
    """Whether the newest whole state, and the metrics up to it, are those of the unbroken run at that step."""
    manifest = checkpoint.load_state(folder)[0]
    if manifest is None:
        return not checkpoint.manifests(folder)
    rows = [row for row in whole.outcome.rows if row["step"] <= manifest["step"]]
    return (
        manifest["files"] == whole.states[manifest["step"]]
        and outcome(folder, manifest["step"]).rows == rows
    )


def unbroken(work: Path, dtype: str, procs: int) -> Whole:
    folder, began, first, seen = work / f"whole-{dtype}-{procs}", time.monotonic(), math.inf, {}
    run = start(work, folder, dtype, procs)
    while run.poll() is None:
        seen |= states(folder)
        first = min(first, time.monotonic()) if seen else math.inf
        time.sleep(0.002)
    assert run.returncode == 0, (work / "stderr").read_text()
    seen |= states(folder)
    assert sorted(seen) == list(range(1, STEPS + 1)), "a state came and went unseen"
    return Whole(seen, outcome(folder), first - began, time.monotonic() - first)


def writing(folder: Path, since: float) -> set[tuple[str, int]]:
    """Names and inodes of the files whose writing began after an instant and was not finished."""
    found = set()
    for path in folder.glob(".*.writing"):
        with contextlib.suppress(OSError):
            if (about := path.stat()).st_mtime >= since:
                found.add((path.name, about.st_ino))
    return found


def strike(run: subprocess.Popen[bytes], folder: Path, draw: random.Random, whole: Whole) -> str:
    """Kill the run at a drawn instant, and say where that fell; nothing where it ended before."""
    since, before, seen, deadline = (
        time.time(),
        states(folder).keys(),
        set[tuple[str, int]](),
        math.inf,
    )
    kind, nth, share = (
        draw.choices(("start-up", "write", "training"), (1, 5, 4))[0],
        draw.randint(1, 20),
        draw.random(),
    )
    if kind == "start-up":
        deadline = time.monotonic() + share * whole.begins
    while run.poll() is None:
        if kind == "write":
            seen |= writing(folder, since)
        elif deadline == math.inf and states(folder).keys() - before:
            deadline = time.monotonic() + share * whole.trains / 5
        if time.monotonic() >= deadline or len(seen) >= nth:
            kill(run, folder)
            return where(folder, since)
        time.sleep(0.001)
    return ""


def where(folder: Path, since: float) -> str:
    """Where a kill fell, of a process started at `since`."""
    about, log = folder / "run.json", folder / "metrics.jsonl"
    if not about.exists() or about.stat().st_mtime < since:
        return "start-up"
    if at := writing(folder, since):
        return f"mid-write of {re.split('[-.]', min(at)[0])[1]}"
    if {p.name for p in folder.glob("state-*-*.safetensors")} - {
        name for files in states(folder).values() for name in files
    }:
        return "before the manifest"
    return "mid-line" if log.read_text()[-1:] not in ("", "\n") else "between writes"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp())
    prepare(work)
    kinds, whole = [(dtype, procs) for procs in (1, 2) for dtype in ("fp32", "bf16")], {}
    kills, runs, identical, fell = 0, 0, 0, collections.Counter[str]()
    with contextlib.suppress(KeyboardInterrupt):  # what was found until then is said
        while kills < args.kills:
            kind, folder, at, good = kinds[runs % len(kinds)], work / f"run-{runs}", [], []
            whole[kind] = whole.get(kind) or unbroken(work, *kind)
            while True:
                run = start(work, folder, *kind)
                fallen = (
                    strike(run, folder, draw, whole[kind]) if kills + len(good) < args.kills else ""
                )
                if not fallen:
                    break
                at.append(fallen)
                good.append(left_whole(folder, whole[kind]))
            assert run.wait() == 0, (work / "stderr").read_text()
            fell.update(at)
            kills, runs = kills + len(good), runs + 1
            identical += sum(good) * equal(outcome(folder), whole[kind].outcome)
            print(
                f"{kills} kills in {runs} runs, {identical} identical; they fell: {dict(fell)}",
                file=sys.stderr,
                flush=True,
            )
            if identical == kills:
                shutil.rmtree(folder)
    if run.poll() is None:
        kill(run, folder)
    if identical == kills:
        shutil.rmtree(work)
    found = {"kills": kills, "identical": identical, "runs": runs, "fell": dict(fell)}
    print(
        json.dumps(found)
        if args.json
        else f"{identical} of {kills} kills identical, in {runs} runs; they fell: {dict(fell)}"
    )
    sys.exit(0 if identical == kills else 1)


if __name__ == "__main__":
    main()
