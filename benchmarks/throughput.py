"""How fast does a step train, and what bounds it? One run over real tasks, everything side by side.

    python -m benchmarks.throughput [--json FILE] [--quick] [--conceptarc FOLDER]

The work is that of the published measurement: ARC-AGI-1 training (and ConceptARC where given), every task alike, the
official query, all demos, hidden 128, 4 heads, H 3, L 4, two layers, 16 slots; a sample is one slot in one optimizer
step, from drawing to update. The stand-in is our own model forced into the published layout: a canvas of 900 tokens,
ten demo slots, empty ones computed too, nothing masked, torch's attention, norm and gate, weights cast at each use.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import socket
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from etrm_arc import config, data, encoders, etrm, sources, train
from etrm_arc.optim import optimizers, update

DTYPES = ("bf16", "fp32")
PUBLISHED = {"fp32": 0.37, "bf16": 0.52}  # samples/s of the published trainer on two cores with AMX


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def recipe(sets: list[str], **changes: Any) -> config.Config:
    raw: dict[str, Any] = {
        "data": {"train": ["arc1:training", *sets], "dev": [], "held_out": [], "query": "test"},
        "model": {"hidden": 128, "heads": 4, "H_cycles": 3, "L_cycles": 4},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "train": {"batch": 16},
        "eval": {"on": "train"},
    }
    for key, value in changes.items():
        config.override(raw, key.replace("__", "."), value)
    return config.parse_config(raw, "throughput")


class Trainer:
    """A run without files. Episodes are held for 16 ACT steps at most, as published."""

    def __init__(self, cfg: config.Config) -> None:
        begun = time.perf_counter()
        self.cfg, self.s = cfg, train.setup(cfg)
        self.opts = optimizers(cfg.optimizer, self.s.params, self.s.dtype)
        self.trained = [p for p in self.s.params.values() if p.requires_grad]
        self.ema = {k: v.detach().clone() for k, v in self.s.params.items()}
        self.carries = [train.start_carry(self.s, cfg, slots) for slots in self.s.shards]
        self.start = time.perf_counter() - begun

    def step(self) -> float:
        begun = time.perf_counter()
        self.carries, grads, *_ = train.one_step(self.s, self.cfg, self.carries)
        update(self.opts, self.trained, grads, 1e-4, 1.0)
        torch._foreach_lerp_(list(self.ema.values()), list(self.s.params.values()), 1e-3)
        return time.perf_counter() - begun

    def rate(self, repeats: int, warm: int = 3, life: int = 1) -> float:
        """Median samples/s over so many lives of an episode (`life` steps, in one of which all slots draw anew)."""
        for _ in range(warm):
            self.step()
        return (
            self.cfg.train.batch
            * life
            / statistics.median(sum(self.step() for _ in range(life)) for _ in range(repeats))
        )


# ---------------------------------------------------------------- the published layout, by our own means


def ten_demos(d: data.Demos) -> data.Demos:
    """Every slot has ten demos on 30 x 30; those it lacks are empty and computed all the same."""
    slots, cells = len(d.cells_of), 900
    inputs, outputs = (x.new_zeros(slots, 10, cells) for x in (d.inputs, d.outputs))
    for i, (owner, place) in enumerate(zip(d.owner.tolist(), d.place.tolist(), strict=True)):
        inputs[owner, place], outputs[owner, place] = (
            x[i * cells : (i + 1) * cells] for x in (d.inputs, d.outputs)
        )
    n = slots * 10
    owner, place = torch.arange(slots).repeat_interleave(10), torch.arange(10).repeat(slots)
    at = torch.cartesian_prod(torch.arange(30), torch.arange(30)).repeat(n, 1)
    return data.Demos(
        inputs.flatten(),
        outputs.flatten(),
        at,
        (cells,) * n,
        (0,) * n,
        owner,
        place,
        10,
        torch.arange(n * cells),
        (10 * cells,) * slots,
        torch.zeros(n * cells, 4, dtype=torch.int64),
    )


@contextlib.contextmanager
def published_layout() -> Iterator[None]:
    batch, attend = data.batch, etrm.self_attention

    def padded(*args: Any) -> data.Batch:
        made = batch(*args)
        return made._replace(demos=ten_demos(made.demos))

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    def self_attention(
        qkv: torch.Tensor, o: torch.Tensor, heads: int, x: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        return attend(qkv.to(x.dtype), o.to(x.dtype), heads, x, *rest)

    def swiglu(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ gate_up.to(x.dtype).T).chunk(2, -1)
        return (F.silu(gate) * up) @ down.to(x.dtype).T

    def rms(x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    rebuild = train.rebuild

    def cast_late(like: Any, leaves: dict[str, torch.Tensor]) -> Any:
        blocks = (".qkv", ".o", ".gate_up", ".down")
        return rebuild(
            like,
            {
                k: v.float() if k.endswith(blocks) and ".sets." not in k else v
                for k, v in leaves.items()
            },
        )

    with contextlib.ExitStack() as stack:
        for module in (etrm, etrm, encoders, encoders):
            for name, new in (
                ("attention", attention),
                ("self_attention", self_attention),
                ("swiglu", swiglu),
                ("rms", rms),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, new))
        stack.enter_context(mock.patch.object(etrm, "RUN", 1 << 40))
        stack.enter_context(mock.patch.object(data, "batch", padded))
        stack.enter_context(mock.patch.object(train, "rebuild", cast_late))
        yield


LAYOUT: dict[str, Any] = {
    "data__canvas": 30, "model__encoder__kind": "standard", "model__published_faults": True,
    "model__positions": "rope", "model__tied_head": False,
}  # fmt: skip


# ---------------------------------------------------------------- what matrix products alone would take


class Products(TorchDispatchMode):
    """Counts every matrix product of a step by shapes, strides and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            key = tuple((tuple(x.shape), x.stride(), x.dtype) for x in args[:2])
            self.found[(func, *key)] += 1
        return func(*args, **(kwargs or {}))


def attainable(t: Trainer) -> tuple[float, float]:
    """(seconds that the matrix products of one step take by themselves, GFLOP of these)."""
    with Products() as seen:
        t.carries, *_ = train.one_step(t.s, t.cfg, t.carries)
    seconds = gflop = 0.0
    for (func, *operands), count in seen.found.items():
        made = []
        for shape, stride, dtype in operands:
            x = torch.empty_strided(shape, stride, dtype=dtype)
            made.append(x.normal_())
        func(*made)
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            func(*made)
            times.append(time.perf_counter() - begun)
        seconds += count * statistics.median(times)
        a, b = made
        gflop += count * 2e-9 * a.numel() * b.shape[-1]
    return seconds, gflop


def parts(t: Trainer, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and GFLOP of a step by part."""
    s, cfg, found = t.s, t.cfg, {}

    def timed(name: str, f: Callable[[], Any]) -> Any:
        f()
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            result = f()
            seconds.append(time.perf_counter() - begun)
        with FlopCounterMode(display=False) as counter:
            f()
        found[name] = {
            "seconds": statistics.median(seconds),
            "gflop": counter.get_total_flops() / 1e9,
        }
        return result

    carry, batch, least = timed(
        "drawing and painting", lambda: train.next_batch(s, cfg, s.shards[0], t.carries[0])
    )
    cast = etrm.rebuild(s.like, {k: v.to(s.dtype) for k, v in s.params.items()})
    wanted = [v for v in s.params.values() if v.requires_grad]
    context = s.encode.read(cast.encoder, batch).tokens.detach()
    said = etrm.Encode(lambda *_: etrm.Context(context))
    toward = torch.randn_like(context)

    def encode() -> None:
        out = s.encode.read(cast.encoder, batch).tokens
        torch.autograd.grad(out, wanted, toward, allow_unused=True, retain_graph=True)

    timed("encoder", encode)
    _, out = etrm.act_step(cast, cfg.model, said, carry, batch, least)
    out = out._replace(
        logits=out.logits.detach().requires_grad_(), q_halt=out.q_halt.detach().requires_grad_()
    )

    def loss() -> tuple[torch.Tensor, ...]:
        total = etrm.act_loss(cfg.model, out, batch.labels, batch.cells).total.sum()
        return torch.autograd.grad(total, (out.logits, out.q_halt))

    g_logits, g_q = timed("loss", loss)

    def core() -> None:
        _, made = etrm.act_step(cast, cfg.model, said, carry, batch, least)
        torch.autograd.grad(
            (made.logits, made.q_halt),
            wanted,
            (g_logits, g_q),
            allow_unused=True,
            retain_graph=True,
        )

    timed("core", core)
    grads = [torch.zeros_like(p) for p in t.trained]
    timed("optimizer", lambda: update(t.opts, t.trained, [g.clone() for g in grads], 0.0, 1.0))
    return found


# ---------------------------------------------------------------- growth


def grown(tasks: int) -> list[data.Task]:
    """ARC-AGI-1 training under symmetries of its own until there are so many."""
    base, made = sources.load(("arc1:training",)), []
    g = torch.Generator().manual_seed(0)
    for i in range(tasks):
        task, s = (
            base[i % len(base)],
            data.draw_symmetry(torch.rand(1, 11, generator=g), True, "keep_black"),
        )
        one = data.Symmetry(s.dihedral[0], s.colours[0])
        turn = lambda pairs, one=one: [tuple(data.apply(one, x) for x in pair) for pair in pairs]  # noqa: E731
        made.append(data.Task(f"{task.name}-{i}", turn(task.demos), turn(task.queries)))
    return made


def with_tasks(n: int, repeats: int) -> dict[str, float]:
    some = grown(n)
    begun = time.perf_counter()
    with mock.patch.object(sources, "load", lambda *_: some):
        t = Trainer(recipe([]))
    load = time.perf_counter() - begun
    kilobytes = sum(x.numel() * x.element_size() for x in t.s.tasks) / n / 1e3
    return {"load_s": load, "kb_per_task": kilobytes, "samples_per_s": t.rate(repeats)}


def with_processes(n: int, repeats: int) -> float:
    """Samples/s of n processes on this machine, each with its share of the threads."""
    threads = str(max(1, (os.cpu_count() or 1) // n))
    shared = {
        **os.environ,
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": threads,
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.throughput",
        "--worker",
        str(n),
        "--repeats",
        str(repeats),
    ]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(n)
    ]
    said = [r.communicate()[0] for r in ranks]
    return float(said[0].splitlines()[-1])


def worker(n: int, repeats: int) -> None:
    rank = int(os.environ["RANK"])
    if n > 1:
        torch.distributed.init_process_group("gloo")
    cfg = recipe([], train__shards=2)
    setup = train.setup
    with mock.patch.object(train, "setup", functools.partial(setup, rank=rank, world=n)):
        print(Trainer(cfg).rate(repeats))


# ---------------------------------------------------------------- the run


def one_dtype(dtype: str, sets: list[str], repeats: int, stand_in: int) -> dict[str, Any]:
    t = Trainer(recipe(sets, train__dtype=dtype))
    begun = time.perf_counter()
    t.step()
    first = t.start + time.perf_counter() - begun
    rate = t.rate(repeats, 4, 16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    t = Trainer(
        recipe(sets, train__dtype=dtype, train__shards=1)
    )  # in one piece, to be taken apart
    t.rate(1, 4)
    seconds, gflop = attainable(t)
    found: dict[str, Any] = {
        "samples_per_s": rate, "gflop_per_sample": gflop / t.cfg.train.batch, "start_to_first_step_s": first,
        "gflop_per_s": gflop * rate / t.cfg.train.batch, "products_gflop_per_s": gflop / seconds,
        "fraction_of_attainable": seconds * rate / t.cfg.train.batch, "parts": parts(t, repeats),
        "peak_memory_gb": peak,
        "ratio_to_published": rate / PUBLISHED[dtype],
    }  # fmt: skip
    trm = Trainer(
        recipe(sets, train__dtype=dtype, data__canvas=30, train__shards=1, model__positions="rope")
    )
    context = torch.zeros(t.cfg.train.batch, 16, 128, dtype=trm.s.dtype)
    trm.s = trm.s._replace(encode=etrm.Encode(lambda *_: etrm.Context(context)))
    found["full_canvas_without_encoder_samples_per_s"] = trm.rate(repeats, 1)
    if stand_in:
        with published_layout():
            slow = Trainer(recipe(sets, train__dtype=dtype, train__shards=1, **LAYOUT))
            found["stand_in_samples_per_s"] = slow.rate(stand_in, 1)
        found["ratio"] = rate / found["stand_in_samples_per_s"]
        found["stand_in_of_published"] = found["stand_in_samples_per_s"] / PUBLISHED[dtype]
    return found


def growth(sets: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    rate = lambda **changes: Trainer(recipe(sets, **changes)).rate(repeats)  # noqa: E731
    return {
        "tasks": {str(n): with_tasks(n, repeats) for n in (100, 1_000, 10_000, 50_000, 100_000)},
        "canvas": {str(n): rate(data__canvas=n) for n in (5, 10, 15, 20, 30)},
        "demos": {str(n): rate(data__max_demos=n) for n in (1, 2, 3, 10)},
        "hidden": {str(n): rate(model__hidden=n) for n in (64, 128, 256)},
        "processes": {str(n): with_processes(n, repeats) for n in (1, 2)},
    }


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = [k for k in ("tasks", "canvas", "demos", "hidden") if k in found["growth"]]
    figure, axes = plt.subplots(
        1,
        1 + len(kinds),
        figsize=(3.2 * (1 + len(kinds)), 3),
        squeeze=False,
        constrained_layout=True,
    )
    axes = axes[0]
    names, bars = [], []
    for dtype in (d for d in DTYPES if d in found):
        row = found[dtype]
        names += [f"{dtype}\nstand-in", dtype]
        bars += [row.get("stand_in_samples_per_s", 0.0), row["samples_per_s"]]
    axes[0].bar(names, bars, color=["#AAAAAA", "#0074D9"] * (len(names) // 2))
    axes[0].set(title="samples/s", yscale="log")
    for axis, kind in zip(axes[1:], kinds, strict=True):
        rows = found["growth"][kind]
        values = [v["samples_per_s"] if isinstance(v, dict) else v for v in rows.values()]
        axis.plot([int(k) for k in rows], values, "o-", color="#0074D9")
        axis.set(
            title=f"samples/s against {kind}",
            ylim=(0, 1.1 * max(values)),
            xscale="log" if kind == "tasks" else "linear",
        )
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, help="write all numbers there")
    options.add_argument("--plot", type=Path, help="write a figure there (needs matplotlib)")
    options.add_argument("--quick", action="store_true", help="neither stand-in nor growth")
    options.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="only this one (a CPU without bf16 takes hours for it)",
    )
    options.add_argument("--conceptarc", help="folder of ConceptARC, added to the training tasks")
    options.add_argument(
        "--checkpoint", default="", help="a trained one, for evaluation (benchmarks/evaluation.py)"
    )
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        return worker(args.worker, args.repeats)
    sets = [args.conceptarc] if args.conceptarc else []
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    dtypes = args.dtype or DTYPES

    def keep() -> None:
        """What is known by now: the whole takes some 20 minutes."""
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))

    for dtype in dtypes:
        with ProcessPoolExecutor(
            1, get_context("spawn")
        ) as alone:  # memory is counted from nothing
            row = found[dtype] = alone.submit(
                one_dtype, dtype, sets, args.repeats, 0 if args.quick else args.repeats
            ).result()
        print(
            f"{dtype}: {row['samples_per_s']:.2f} samples/s, {row['gflop_per_sample']:.1f} GFLOP a sample, "
            f"{row['gflop_per_s']:.0f} GFLOP/s; its matrix products alone run at {row['products_gflop_per_s']:.0f} and take "
            f"{100 * row['fraction_of_attainable']:.0f} % of a step; 30 x 30 without encoder "
            f"{row['full_canvas_without_encoder_samples_per_s']:.2f} samples/s; "
            f"start to first step {row['start_to_first_step_s']:.1f} s; peak {row['peak_memory_gb']:.2f} GB",
            flush=True,
        )
        for name, part in row["parts"].items():
            print(f"  {name:22} {1e3 * part['seconds']:8.1f} ms {part['gflop']:8.1f} GFLOP")
        if "ratio" in row:
            print(
                f"  stand-in in the published layout {row['stand_in_samples_per_s']:.3f} samples/s: ratio {row['ratio']:.1f}",
                flush=True,
            )
        keep()
    found["peak_memory_gb"] = max(found[d]["peak_memory_gb"] for d in dtypes)
    found["growth"] = {} if args.quick else growth(sets, 3)
    for kind, rows in found["growth"].items():
        said = (
            f"{k}: {v['samples_per_s'] if isinstance(v, dict) else v:.1f}" for k, v in rows.items()
        )
        print(f"samples/s by {kind}: {', '.join(said)}", flush=True)
    keep()
    if args.plot:
        plot(found, args.plot)
    from benchmarks import evaluation

    found["evaluation"] = evaluation.measured(
        dtypes, args.checkpoint, slow=0 if args.quick else 2, limit=16
    )
    keep()


if __name__ == "__main__":
    main()
