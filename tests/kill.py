"""Kill a training run with SIGKILL at random instants, resume it, compare it with the unbroken run.

    python -m tests.kill --kills 20 [--seed 0]

fp32 and bf16, one and two processes in turn; a state after every step. A tenth of the kills falls
at start-up, half in the middle of a write. The kills of a run are identical when each left whole
states only, and the run ends in the weights, average, state and metrics of the unbroken run, to the
bit (the clock aside). The last line is JSON.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from etrm_arc import checkpoint
from etrm_arc.tests.puzzles import SET

RECIPE = """
data = { train = ["tasks"], dev = [], held_out = [] }
model = { hidden = 16, heads = 2, H_cycles = 2, L_cycles = 1, halt_max_steps = 4 }
optimizer = { kind = "muon", warmup = 5, lr = 3e-3 }
train = { batch = 8, shards = 2, steps = 32, save_every = 1, log_every = 3, ema = 0.9 }
eval = { on = "train", every = 10 }
"""
WALL_CLOCK = ("seconds", "samples_per_s")


def start(work: Path, folder: Path, dtype: str, procs: int) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if checkpoint.states(folder) else []
    sets = ["--set", f"run.dir={folder}", "--set", f"train.dtype={dtype}", "--procs", str(procs)]
    command = [sys.executable, "-m", "etrm_arc.cli", "train", "kill.toml", *sets, *resume]
    with open(work / "stderr", "w") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=work)


def kill(run: subprocess.Popen[bytes], folder: Path) -> None:
    """The run and all processes that it has started, at once; until they are gone."""
    children = collections.defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = file.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(file.parent.name))
    family = [run.pid]
    for pid in family:
        family += children[pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    while checkpoint.is_held(folder):
        time.sleep(0.001)


def outcome(folder: Path) -> str:
    """A digest of the metrics, the clock aside, and of every tensor that is left."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows]
    tensors = dict(checkpoint.load_state(folder).tensors)
    for file in (folder / "last.safetensors", folder / "best.safetensors"):
        if file.exists():
            tensors |= {f"{file.stem}.{k}": v for k, v in checkpoint.read(file)[0].items()}
    return checkpoint.digest_of(tensors, json.dumps(rows))


def unbroken(work: Path, dtype: str, procs: int) -> tuple[str, float]:
    """The outcome of the unbroken run and the seconds that it takes."""
    folder, began = work / f"whole-{dtype}-{procs}", time.monotonic()
    assert start(work, folder, dtype, procs).wait() == 0, (work / "stderr").read_text()
    return outcome(folder), time.monotonic() - began


def writing(folder: Path) -> set[tuple[str, int]]:
    """Names and inodes of the files that are being written."""
    files = set()
    for path in folder.glob(".*.writing"):
        with contextlib.suppress(OSError):
            files.add((path.name, path.stat().st_ino))
    return files


def strike(run: subprocess.Popen[bytes], folder: Path, draw: random.Random, seconds: float) -> str:
    """Kill the run, which takes so many seconds, at a drawn instant, and say where that fell;
    nothing where it ended before."""
    old, before, seen = writing(folder), {*checkpoint.states(folder)}, set[tuple[str, int]]()
    kind = draw.choices(("start-up", "write", "training"), (1, 5, 4))[0]
    nth, delay, begins = draw.randint(1, 20), draw.random() * seconds / 5, time.monotonic()
    while run.poll() is None:
        begun = not before.issuperset(checkpoint.states(folder))
        if kind == "training" and not begun:
            begins = time.monotonic()
        seen |= writing(folder) - old
        if len(seen) >= nth if kind == "write" else time.monotonic() >= begins + delay:
            kill(run, folder)
            names = [name for name, _ in sorted(writing(folder) - old)]
            place = "between writes" if begun else "start-up"
            return f"mid-write of {names[0].split('-')[0].split('.')[1]}" if names else place
        time.sleep(0.001)
    return ""


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp())
    (work / "kill.toml").write_text(RECIPE)
    shutil.copytree(SET, work / "tasks")
    kinds, whole = [(dtype, procs) for dtype in ("fp32", "bf16") for procs in (2, 1)], {}
    kills, runs, identical, places = 0, 0, 0, collections.Counter[str]()
    while kills < args.kills:
        kind, folder, good = kinds[runs % len(kinds)], work / f"run-{runs}", []
        expected, seconds = whole[kind] = whole.get(kind) or unbroken(work, *kind)
        while True:
            run = start(work, folder, *kind)
            enough = kills + len(good) >= args.kills
            place = "" if enough else strike(run, folder, draw, seconds)
            if not place:
                break
            places[place] += 1
            states = checkpoint.states(folder)
            good.append(not states or not checkpoint.load_state(folder).skipped)
        assert run.wait() == 0, (work / "stderr").read_text()
        kills, runs = kills + len(good), runs + 1
        identical += sum(good) * (outcome(folder) == expected)
        result = {"kills": kills, "identical": identical, "runs": runs, "fell": dict(places)}
        print(json.dumps(result), file=sys.stderr, flush=True)
    if identical == kills:
        shutil.rmtree(work)
    print(json.dumps(result))
    sys.exit(0 if identical == kills else 1)


if __name__ == "__main__":
    main()
