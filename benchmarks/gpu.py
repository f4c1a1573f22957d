"""Does a GPU train as the CPU does, and how fast? One page, to be pasted into a report.

    make gpu        (python -m benchmarks.gpu [--seconds 60] [--set a.b=value])

First ten steps of cpu.toml and of a small etrm.toml, with the same weights and episodes, on CPU and
GPU: their losses must agree. Then both recipes at their own size train for a minute each. The
stand-in is the published layout, see benchmarks.throughput; a share of the matrix rate counts the
products of a step alone. A machine without a GPU says so.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from etrm_arc import config, optim, train

from . import throughput

APART = {"fp32": 1e-3, "bf16": 0.03}  # how far losses may be apart, of the larger one
SMALL = ["model.hidden=64", "model.heads=2", "train.batch=16", "data.max_train_tasks=40"]
WITHOUT = {"cpu": [], "etrm": ["init_from.path="]}  # a decoder to start from


def recipe(name: str, device: str, dtype: str, sets: list[str]) -> config.Config:
    """A shipped recipe on a device, without files."""
    fields = [f"train.device={device}", f"train.dtype={dtype}", "eval.on=train", "data.dev=[]"]
    return config.load_config(name, [*WITHOUT[name], *fields, *sets])


def losses(cfg: config.Config, steps: int = 10) -> list[float]:
    """Of the first steps of a run."""
    t = throughput.Trainer(cfg)
    rows = [train.advance(t.s, t.state)[0].sums for _ in range(steps)]
    return [train.metrics_row(row)["all/lm_loss"] for row in rows]


def apart(name: str, device: str, dtype: str, sets: list[str]) -> float:
    """The largest relative difference between the losses on CPU and on the device."""
    there, here = (losses(recipe(name, d, dtype, [*SMALL, *sets])) for d in (device, "cpu"))
    return max(abs(a - b) / max(a, b) for a, b in zip(there, here, strict=True))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large product."""
    side = 8192 if device.type == "cuda" else 512
    x = torch.randn(side, side, device=device, dtype=dtype)
    for repeats in (3, 20):  # the first ones warm up
        begun = time.perf_counter()
        for _ in range(repeats):
            y = x @ x
        float(y[0, 0])
    return repeats * 2 * side**3 / (time.perf_counter() - begun)


def measured(cfg: config.Config, seconds: float) -> dict[str, float]:
    """Rates of training for so many seconds, and what one step takes."""
    t, (device, dtype) = throughput.Trainer(cfg), optim.hardware(cfg)
    for _ in range(3):
        t.step()
    begun, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - begun < seconds:
        t.step()
        steps += 1
    rate = steps * cfg.train.batch / (time.perf_counter() - begun)
    with FlopCounterMode(display=False) as flops:
        t.step()
    with throughput.Counter() as counter:
        t.step()
    products = flops.get_total_flops() * rate / cfg.train.batch
    return {
        "samples/s": rate,
        "share of the matrix rate": products / matrix_rate(device, dtype),
        "operations a step": counter.operations,
        "waits a step": counter.syncs,
        "GB at most": optim.peak_memory(device),
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda")
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--set", action="append", default=[], help="override a config field")
    args = options.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"torch {torch.__version__}, {name}", flush=True)
    for dtype, bound in APART.items():
        for recipe_name in WITHOUT:
            found = apart(recipe_name, args.device, dtype, args.set)
            verdict = "agree" if math.isfinite(found) and found <= bound else "DISAGREE"
            print(f"{recipe_name} {dtype}: losses of ten steps {verdict}: {found:.1e} of {bound:g}")
    sets = ["train.shards=1", *args.set]
    for recipe_name in WITHOUT:
        row = measured(recipe(recipe_name, args.device, "bf16", sets), args.seconds)
        text = ", ".join(f"{k} {v:.3g}" for k, v in row.items())
        with throughput.published_layout():
            layout = [
                f"{k.replace('__', '.')}={str(v).lower()}" for k, v in throughput.LAYOUT.items()
            ]
            if recipe_name == "etrm":
                slow = recipe(recipe_name, args.device, "bf16", [*sets, *layout])
                text += f", stand-in {throughput.Trainer(slow).rate(1, 1):.3g} samples/s"
        print(f"{recipe_name} bf16: {text}", flush=True)


if __name__ == "__main__":
    main()
