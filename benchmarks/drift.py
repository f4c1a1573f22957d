"""Do 1, 2 and 4 processes train the same model? python -m benchmarks.drift [--json]

50 steps in fp32 without warm-up. With the same shards the weights must be the same bits; with as many shards as
processes only the order of summation differs: printed is the distance of the weights from those of one process, as a
share of the way these went.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from etrm_arc import checkpoint, config, train

SET = Path(__file__).parent.parent / "tests" / "data" / "set"


def trained(folder: Path, kind: str, procs: int, shards: int) -> torch.Tensor:
    sets = {
        "run.dir": str(folder), "data.train": [str(SET)], "data.dev": [], "data.held_out": [],
        "model.hidden": 64, "model.H_cycles": 2, "model.L_cycles": 2, "optimizer.kind": kind, "optimizer.warmup": 0,
        "train.steps": 50, "train.batch": 16, "train.dtype": "fp32", "train.shards": shards,
        "eval.on": "train", "eval.every": 50, "eval.act_steps": 1,
    }  # fmt: skip
    words = [w for k, v in sets.items() for w in ("--set", f"{k}={json.dumps(v)}")]
    command = [sys.executable, "-m", "etrm_arc.cli", "train", "cpu", "--procs", str(procs), *words]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    tensors, _ = checkpoint.read_file(folder / "last.safetensors")
    return torch.cat([v.double().flatten() for k, v in sorted(tensors.items()) if k.startswith("params.")])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true")
    args, found = options.parse_args(), {}
    for kind in ("adamw", "muon", "adam_atan2"):
        with tempfile.TemporaryDirectory() as work:
            one = trained(Path(work) / "1", kind, 1, 1)
            cfg = config.parse_config(json.loads((Path(work) / "1" / "run.json").read_text())["config"], "run.json")
            start = torch.cat([v.detach().double().flatten() for _, v in sorted(train.setup(cfg).params.items())])
            way = (one - start).norm()
            row = {f"{n} processes": float((trained(Path(work) / f"{n}", kind, n, n) - one).norm() / way) for n in (2, 4)}
            alone = trained(Path(work) / "1-of-4", kind, 1, 4)
            same = {f"{n} processes, 4 shards": bool(trained(Path(work) / f"{n}-of-4", kind, n, 4).equal(alone)) for n in (2, 4)}
        found[kind] = {**row, **same}
        print(f"{kind}: " + ", ".join(f"{k} {'the same bits' if v is True else v}" for k, v in found[kind].items()), flush=True)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
