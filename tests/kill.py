"""Kill a training run with SIGKILL at random instants, resume it, and compare what it leaves with the unbroken run.

    python -m tests.kill --kills 20 [--seed 0] [--json]

Weights, average, state and metrics (wall-clock fields aside) must be the same bits. Prints where the kills fell.
"""

import argparse
import collections
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from etrm_arc import checkpoint

SET = Path(__file__).parent / "data" / "set"
RECIPE = f"""
data = {{ train = ["{SET}"], dev = [], held_out = [], canvases = [6, 10] }}
optimizer = {{ kind = "muon", warmup = 5, lr = 3e-3 }}
[model]
hidden = 64
heads = 2
H_cycles = 2
L_cycles = 2
halt_max_steps = 4
[train]
batch = 16
steps = 60
save_every = 2
log_every = 3
[eval]
on = "train"
every = 10
act_steps = 2
"""
WALL_CLOCK = ("seconds", "samples_per_s")


def start(recipe: Path, folder: Path, dtype: str) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if any(folder.glob("state-*.json")) else []
    sets = ["--set", f"run.dir={folder}", "--set", f"train.dtype={dtype}"]
    return subprocess.Popen(
        [sys.executable, "-m", "etrm_arc.cli", "train", str(recipe), *sets, *resume],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


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
    named = {name for m in folder.glob("state-*.json") for name in json.loads(m.read_text())["files"]}
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
    for dtype in ("fp32", "bf16"):
        begun = time.monotonic()
        assert start(recipe, work / f"whole-{dtype}", dtype).wait() == 0
        whole[dtype], seconds[dtype] = outcome(work / f"whole-{dtype}"), time.monotonic() - begun
    while kills < args.kills:
        dtype, folder = ("fp32", "bf16")[runs % 2], work / f"run-{runs}"
        while True:
            run = start(recipe, folder, dtype)
            try:
                code = run.wait(timeout=draw.uniform(0.3, 1.0) * seconds[dtype])
                assert code == 0, f"exit code {code}"
                break
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                kills += 1
                fell[where(folder) if folder.exists() else "before the folder"] += 1
        runs += 1
        rows, tensors = outcome(folder)
        same = rows == whole[dtype][0] and tensors.keys() == whole[dtype][1].keys()
        identical += same and all(torch.equal(v, whole[dtype][1][k]) for k, v in tensors.items())
        shutil.rmtree(folder)
    shutil.rmtree(work)
    result = {"kills": kills, "runs": runs, "identical": identical, "fell": dict(fell)}
    print(f"{kills} kills in {runs} runs, {identical} of {runs} identical; the kills fell: {dict(fell)}")
    if args.json:
        print(json.dumps(result))
    sys.exit(0 if identical == runs else 1)


if __name__ == "__main__":
    main()
