"""Kill a training run with SIGKILL at random instants, resume it, and compare what it leaves with the unbroken run.

    python -m tests.kill --kills 20 [--seed 0] [--json]

Weights, average, state and metrics (wall-clock fields aside) must be the same bits. Prints where the kills fell.
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

import torch

from etrm_arc import checkpoint

SET = Path(__file__).parent / "data" / "set"
RECIPE = f"""
data = {{ train = ["{SET}"], dev = [], held_out = [] }}
optimizer = {{ kind = "muon", warmup = 5, lr = 3e-3 }}
[model]
hidden = 64
heads = 2
H_cycles = 2
L_cycles = 2
halt_max_steps = 4
[train]
batch = 16
shards = 2
steps = 60
save_every = 2
log_every = 3
[eval]
on = "train"
every = 10
act_steps = 2
"""
WALL_CLOCK = ("seconds", "samples_per_s")


def start(recipe: Path, folder: Path, dtype: str, procs: int) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if checkpoint.manifests(folder) else []
    sets = ["--set", f"run.dir={folder}", "--set", f"train.dtype={dtype}", "--procs", str(procs)]
    return subprocess.Popen(
        [sys.executable, "-m", "etrm_arc.cli", "train", str(recipe), *sets, *resume],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def kill(run: subprocess.Popen[bytes]) -> None:
    """All processes of the run at once, without a word."""
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def aimed(run: subprocess.Popen[bytes], folder: Path, sightings: int) -> bool:
    """Kill in the middle of the n-th write that is seen; whether the run lived to see it."""
    seen: set[tuple[str, int]] = set()
    while run.poll() is None:
        for path in folder.glob(".*.writing"):
            with contextlib.suppress(OSError):
                seen.add((path.name, path.stat().st_ino))
        if len(seen) >= sightings:
            kill(run)
            return True
    return False


def outcome(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Rows of metrics without the clock, and every tensor that the run leaves."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {f"{n}.{k}": v for n in ("last", "best") for k, v in checkpoint.read_file(folder / f"{n}.safetensors")[0].items()}
    for part in checkpoint.load_state(folder)[1]:
        found |= part
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows], found


def where(folder: Path) -> str:
    """Where the last kill fell: in the middle of a write, in a line of metrics, or between them."""
    if any(folder.glob(".*.writing")):
        return "mid-write"
    named = {name for m in checkpoint.manifests(folder) for name in json.loads(m.read_text())["files"]}
    if {p.name for p in folder.glob("state-*-*.safetensors")} - named:
        return "before the manifest"
    log = folder / "metrics.jsonl"
    if not log.exists():
        return "before the first row"
    return "mid-line" if not log.read_text().endswith("\n") and log.read_text() else "between writes"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp())
    recipe = work / "kill.toml"
    recipe.write_text(RECIPE)
    kills, runs, identical, fell = 0, 0, 0, collections.Counter[str]()
    whole, seconds = {}, {}
    kinds = [(dtype, procs) for procs in (1, 2) for dtype in ("fp32", "bf16")]
    for kind in kinds:
        begun = time.monotonic()
        folder = work / f"whole-{kind[0]}-{kind[1]}"
        assert start(recipe, folder, *kind).wait() == 0
        whole[kind], seconds[kind] = outcome(folder), time.monotonic() - begun
    with contextlib.suppress(KeyboardInterrupt):  # what was found until then is said
        while kills < args.kills:
            kind, folder = kinds[runs % len(kinds)], work / f"run-{runs}"
            while True:
                run = start(recipe, folder, *kind)
                if draw.random() < 0.5:
                    killed = aimed(run, folder, draw.randint(1, 30))
                else:
                    try:
                        run.wait(timeout=draw.uniform(0.2, 1.0) * seconds[kind])
                        killed = False
                    except subprocess.TimeoutExpired:
                        kill(run)
                        killed = True
                if not killed:
                    assert run.returncode == 0, f"exit code {run.returncode}"
                    break
                kills += 1
                fell[where(folder) if folder.exists() else "before the folder"] += 1
            runs += 1
            print(f"{kills} kills, {runs} runs", file=sys.stderr, flush=True)
            rows, tensors = outcome(folder)
            same = rows == whole[kind][0] and tensors.keys() == whole[kind][1].keys()
            identical += same and all(torch.equal(v, whole[kind][1][k]) for k, v in tensors.items())
            shutil.rmtree(folder)
    if run.poll() is None:
        kill(run)
    shutil.rmtree(work, ignore_errors=True)
    result = {"kills": kills, "runs": runs, "identical": identical, "fell": dict(fell)}
    print(f"{kills} kills in {runs} runs, {identical} of {runs} identical; the kills fell: {dict(fell)}")
    if args.json:
        print(json.dumps(result))
    sys.exit(0 if identical == runs else 1)


if __name__ == "__main__":
    main()
