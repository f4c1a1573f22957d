"""Do 1, 2 and 4 processes train the same model? python -m benchmarks.drift [--json]

50 steps in fp32 without warm-up. With the same shards (as shipped: 4) weights, EMA and carry must be the same bits. With
as many shards as processes only the order of summation differs: printed is the distance of the weights from those of one
process, as a share of the way these went, and whether every slot saw the same episodes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

from etrm_arc import checkpoint, config, train

SET = Path(__file__).parent.parent / "tests" / "data" / "set"
RAW = {
    "data": {"train": [str(SET)], "dev": [], "held_out": []},
    "model": {
        "hidden": 32,
        "heads": 2,
        "H_cycles": 2,
        "L_cycles": 2,
        "halt_max_steps": 4,
        "exploration": 0.1,
    },
    "train": {"steps": 50, "batch": 8, "dtype": "fp32"},
    "eval": {"on": "train", "every": 50, "act_steps": 1, "foreign": False},
}
Tensors = dict[str, torch.Tensor]


def one(rank: int, cfg: config.Config, procs: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(procs), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    train.fit(cfg)


def trained(folder: Path, kind: str, procs: int, shards: int) -> Tensors:
    """All that the run leaves, but the metric sums, of which each process has a share."""
    raw = {
        **RAW,
        "run": {"dir": str(folder)},
        "optimizer": {"kind": kind, "warmup": 0},
        "train": {**RAW["train"], "shards": shards},
    }
    start_processes(
        one,
        (config.parse_config(raw, "drift"), procs, train.free_port()),
        procs,
        start_method="fork",
    )
    return {
        k: v for part in checkpoint.load_state(folder)[1] for k, v in part.items() if k != "sums"
    }


def weights(tensors: Tensors) -> torch.Tensor:
    return torch.cat([v.detach().double().flatten() for _, v in sorted(tensors.items())])


def distance(start: Tensors, one: Tensors, other: Tensors) -> float:
    a, b = (weights({k: x[f"params.{k}"] for k in start}) for x in (one, other))
    return float((b - a).norm() / (a - weights(start)).norm())


def same(one: Tensors, other: Tensors, only: str = "") -> bool:
    return one.keys() == other.keys() and all(
        v.equal(other[k]) for k, v in one.items() if k.endswith(only)
    )


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", action="store_true")
    args, found = options.parse_args(), {}
    torch.set_num_threads(1)  # processes are copies of this one
    for kind in ("adamw", "muon", "adam_atan2"):
        with tempfile.TemporaryDirectory() as work:
            ran = {
                (n, v): trained(Path(work) / f"{n}-{v}", kind, n, v)
                for n, v in ((1, 1), (2, 2), (1, 4), (2, 4), (4, 4))
            }
            cfg = config.parse_config(
                json.loads((Path(work) / "1-1" / "run.json").read_text())["config"], "run.json"
            )
        start = train.setup(cfg).params
        found[kind] = {
            "same bits with 4 shards": {n: same(ran[1, 4], ran[n, 4]) for n in (2, 4)},
            "same episodes": {n: same(ran[1, 1], ran[n, n], ".n") for n in (2, 4)},
            "distance": {n: distance(start, ran[1, 1], ran[n, n]) for n in (2, 4)},
        }
        print(f"{kind}, by processes: {found[kind]}", flush=True)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
