"""How fast does a step train, what does it spend its time on, and how does that grow?

    python -m benchmarks.throughput [--quick] [--dtype fp32] [--json FILE] [--set a.b=value]

The work is that of the published measurement: ARC-AGI-1 training, every task alike, the official
query, all demos, hidden 128, 4 heads, H 3, L 4, two layers, 16 slots; a sample is one slot in one
optimizer step, from drawing to update. The stand-in is our own model forced into the published
layout: a canvas of 900 tokens, ten demo slots, empty ones computed too, nothing masked, torch's
attention, norm and gate, weights cast at each use. Seconds depend on the machine; compare two
versions of the code in one run of each, side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from etrm_arc import config, data, encoders, etrm, optim, sources, train
from etrm_arc.extras import encoders as published

DTYPES = ("bf16", "fp32")
PUBLISHED = {"fp32": 0.37, "bf16": 0.52}  # samples/s of the published trainer, two cores with AMX
GROWTH: dict[str, tuple[int, ...]] = {
    "tasks": (100, 1_000, 10_000, 100_000),
    "data.canvas": (5, 10, 15, 20, 30),
    "data.max_demos": (1, 2, 3, 10),
    "model.hidden": (64, 128, 256),
}
LAYOUT: dict[str, Any] = {
    "data__canvas": 30,
    "model__encoder__kind": "standard",
    "model__published_faults": True,
    "model__positions": "rope",
    "model__tied_head": False,
}


def recipe(sets: list[str], **changes: Any) -> config.Config:
    """The published setting, with changes as a__b=value, then with 'a.b=value' of the user's."""
    raw: dict[str, Any] = {
        "data": {"train": ["arc1:training"], "dev": [], "held_out": [], "query": "test"},
        "model": {"hidden": 128, "heads": 4, "H_cycles": 3, "L_cycles": 4},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "train": {"batch": 16},
        "eval": {"on": "train"},
    }
    for key, value in changes.items():
        config.override(raw, key.replace("__", "."), value, "throughput")
    for item in sets:
        config.set_item(raw, item)
    return config.parse_config(raw, "throughput")


class Trainer:
    """A run without files."""

    def __init__(self, cfg: config.Config) -> None:
        begun = time.perf_counter()
        self.cfg, self.s = cfg, train.setup(cfg)
        self.state = train.fresh_state(self.s)
        self.start = time.perf_counter() - begun

    def step(self) -> float:
        """Seconds of one optimizer step."""
        begun = time.perf_counter()
        train.advance(self.s, self.state)
        return time.perf_counter() - begun

    def rate(self, repeats: int, warm: int = 3, life: int = 1) -> float:
        """Median samples/s over so many lives of an episode, of `life` steps each."""
        for _ in range(warm):
            self.step()
        lives = [sum(self.step() for _ in range(life)) for _ in range(repeats)]
        return self.cfg.train.batch * life / statistics.median(lives)


# ---------------------------------------------------------------- the published layout


def ten_demos(d: data.Demos) -> data.Demos:
    """Every slot has ten demos on 30 x 30; those it lacks are empty and computed all the same."""
    slots, cells = len(d.slot_cells), 900
    inputs, outputs = (x.new_zeros(slots, 10, cells) for x in (d.inputs, d.outputs))
    sizes = torch.tensor(d.cells)
    owner, number = (x.repeat_interleave(sizes) for x in (d.owner, d.number))
    place = d.at[:, 0] * 30 + d.at[:, 1]
    inputs[owner, number, place], outputs[owner, number, place] = d.inputs, d.outputs
    n, side = slots * 10, torch.arange(30)
    return d._replace(
        inputs=inputs.flatten(),
        outputs=outputs.flatten(),
        at=torch.cartesian_prod(side, side).repeat(n, 1),
        cells=(cells,) * n,
        owner=torch.arange(slots).repeat_interleave(10),
        number=torch.arange(10).repeat(slots),
        most=10,
        by_slot=torch.arange(n * cells),
        slot_cells=(10 * cells,) * slots,
    )


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    mask = bias.mT[None] if bool(bias.any()) else None
    q, k, v = (x[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)[0]


def plain_swiglu(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.to(x.dtype).T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.to(x.dtype).T


def plain_rms(x: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@contextlib.contextmanager
def published_layout() -> Iterator[None]:
    """Within it, models are computed as the published code does."""
    batch, attend, rebuild = data.batch, etrm.self_attention, train.rebuild

    def padded(*args: Any) -> data.Batch:
        real = batch(*args)
        return real._replace(demos=ten_demos(real.demos))

    def self_attention(
        p: Any, heads: int, x: torch.Tensor, *rest: Any, **named: Any
    ) -> torch.Tensor:
        p = p._replace(qkv=p.qkv.to(x.dtype), o=p.o.to(x.dtype))
        return attend(p, heads, x, *rest, **named)

    def cast_late(like: Any, leaves: dict[str, torch.Tensor]) -> Any:
        """Weights of blocks stay in float32: they are cast where they are used."""
        blocks = (".qkv", ".o", ".gate_up", ".down")
        late = (k for k in leaves if k.endswith(blocks) and ".sets." not in k)
        return rebuild(like, {**leaves, **{k: leaves[k].float() for k in late}})

    plain = {
        "attention": plain_attention,
        "self_attention": self_attention,
        "swiglu": plain_swiglu,
        "rms": plain_rms,
    }
    with contextlib.ExitStack() as stack:
        for module in (etrm, encoders, published):
            for name, function in plain.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        stack.enter_context(mock.patch.object(etrm, "RUN", 1 << 40))
        stack.enter_context(mock.patch.object(etrm, "step_of", lambda x: 1))
        stack.callback(etrm.chunks_of.cache_clear)  # chunks depend on RUN
        etrm.chunks_of.cache_clear()
        stack.enter_context(mock.patch.object(data, "batch", padded))
        stack.enter_context(mock.patch.object(train, "rebuild", cast_late))
        yield


# ---------------------------------------------------------------- where the time goes


def seconds_of(f: Callable[[], Any], repeats: int) -> float:
    f()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        f()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class Counter(TorchDispatchMode):
    """Counts the operations within it, and those whose result the host has to know."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.syncs = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        masks = args[1] if name == "index" else ()
        is_mask = any(x is not None and x.dtype == torch.bool for x in masks)
        self.syncs += name in self.SYNCS or is_mask
        return func(*args, **(kwargs or {}))


def counted(f: Callable[[], Any]) -> dict[str, int]:
    """Operations and waits of one call."""
    f()
    with Counter() as counter:
        f()
    return {"operations": counter.operations, "syncs": counter.syncs}


def parts(t: Trainer, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, operations and waits of the parts of a step in one shard."""
    s, cfg, slots = t.s, t.cfg, t.s.shards[0]
    start = t.state.carries[0]
    carry, batch, least = train.next_batch(s, slots, start)
    cast = etrm.rebuild(s.like, {k: v.to(s.dtype) for k, v in s.params.items()})
    trained = [p for p in s.params.values() if p.requires_grad]
    context = s.encode.read(cast.encoder, batch).tokens.detach()
    given = etrm.Encode(lambda *_: etrm.Context(context))
    toward = torch.randn_like(context)

    def draw() -> None:
        train.next_batch(s, slots, start)

    def encode() -> None:
        tokens = s.encode.read(cast.encoder, batch).tokens
        torch.autograd.grad(tokens, trained, toward, allow_unused=True, retain_graph=True)

    def core() -> None:
        _, out = etrm.act_step(cast, cfg.model, given, carry, batch, least)
        loss = etrm.act_loss(cfg.model, out, batch.labels, batch.cells).total.sum()
        torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=True)

    def update() -> None:
        optim.update(t.state.opts, trained, [torch.zeros_like(p) for p in trained], 0.0, 1.0)

    named = {"drawing and painting": draw, "encoder": encode, "core": core, "optimizer": update}
    return {name: {"seconds": seconds_of(f, repeats), **counted(f)} for name, f in named.items()}


# ---------------------------------------------------------------- growth


def grown(base: list[data.Task], count: int) -> list[data.Task]:
    """So many tasks: those of the base under symmetries of their own."""
    u = torch.rand(count, 11, generator=torch.Generator().manual_seed(0))
    symmetries = data.draw_symmetry(u, True, "keep_black")
    tasks = []
    for i in range(count):
        task = base[i % len(base)]
        one = data.Symmetry(symmetries.dihedral[i], symmetries.colours[i])
        demos, queries = (
            [tuple(data.apply(one, x) for x in pair) for pair in pairs]
            for pairs in (task.demos, task.queries)
        )
        tasks.append(data.Task(f"{task.name}-{i}", demos, queries))  # type: ignore[arg-type]
    return tasks


def growth(sets: list[str], repeats: int) -> dict[str, dict[int, float]]:
    """Samples/s by number of tasks, side of the canvas, demos, hidden size."""
    base, rates = sources.load(recipe(sets).data.train), dict[str, dict[int, float]]()
    for kind, sizes in GROWTH.items():
        rates[kind] = {}
        for size in sizes:
            fields = {} if kind == "tasks" else {kind.replace(".", "__"): size}
            tasks = grown(base, size) if kind == "tasks" else base
            with mock.patch.object(sources, "load", lambda *_, tasks=tasks, **__: tasks):
                rates[kind][size] = Trainer(recipe(sets, **fields)).rate(repeats)
        shown = ", ".join(f"{size}: {rate:.1f}" for size, rate in rates[kind].items())
        print(f"samples/s by {kind}: {shown}", flush=True)
    return rates


def plot(result: dict[str, Any], path: Path) -> None:
    """Samples/s beside the stand-in, and against each kind of growth."""
    from matplotlib.figure import Figure

    kinds = result["growth"]
    figure = Figure(figsize=(3.2 * (1 + len(kinds)), 3), layout="constrained")
    axes = figure.subplots(1, 1 + len(kinds), squeeze=False)[0]
    for dtype in (d for d in DTYPES if d in result):
        axes[0].bar(f"{dtype}\nstand-in", result[dtype].get("stand_in", 0.0), color="#AAAAAA")
        axes[0].bar(dtype, result[dtype]["samples_per_s"], color="#0074D9")
    axes[0].set(title="samples/s", yscale="log")
    for axis, (kind, rates) in zip(axes[1:], kinds.items(), strict=True):
        axis.plot(list(rates), list(rates.values()), "o-", color="#0074D9")
        scale = "log" if kind == "tasks" else "linear"
        axis.set(title=f"samples/s against {kind}", ylim=(0, None), xscale=scale)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the run


def without_encoder(cfg: config.Config) -> Trainer:
    """A run of TRM's work alone: its context is given, not read from the demos."""
    t = Trainer(cfg)
    size = cfg.train.batch, cfg.model.context_tokens, cfg.model.hidden
    context = etrm.Context(torch.zeros(size, dtype=t.s.dtype))
    t.s = t.s._replace(encode=etrm.Encode(lambda *_: context))
    return t


def one_dtype(dtype: str, sets: list[str], repeats: int, stand_in: bool) -> dict[str, Any]:
    """All rates in samples/s, start and parts in seconds."""
    t = Trainer(recipe(sets, train__dtype=dtype))
    first = t.start + t.step()
    rate = t.rate(repeats, 4, 16)
    whole = Trainer(recipe(sets, train__dtype=dtype, train__shards=1))
    whole.rate(1, 1)
    result: dict[str, Any] = {
        "samples_per_s": rate,
        "ratio_to_published": rate / PUBLISHED[dtype],
        "start_to_first_step_s": first,
        "parts": parts(whole, repeats),
    }
    fields = {"train__dtype": dtype, "train__shards": 1}
    bare = without_encoder(recipe(sets, **fields, data__canvas=30, model__positions="rope"))
    result["full_canvas_without_encoder"] = bare.rate(repeats, 1)
    if stand_in:
        parted = {**fields, "train__shards": 4}  # four slots at once take 4 GB, sixteen over 22
        with published_layout():
            slow = Trainer(recipe(sets, **parted, **LAYOUT)).rate(repeats, 1)
            bare = without_encoder(recipe(sets, **fields, **LAYOUT))
            result |= {"stand_in": slow, "stand_in_without_encoder": bare.rate(repeats, 1)}
        result["ratio"] = rate / slow
        alone = result["full_canvas_without_encoder"] / result["stand_in_without_encoder"]
        result["ratio_without_encoder"] = alone
    return result


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="neither stand-in nor growth")
    options.add_argument("--dtype", choices=DTYPES, action="append", help="only this one")
    options.add_argument("--json", type=Path, help="write all numbers there")
    options.add_argument("--plot", type=Path, help="write a figure there (needs matplotlib)")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--set", action="append", default=[], help="override a config field")
    args = options.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    result |= {"torch": torch.__version__, "growth": {}}
    for dtype in args.dtype or DTYPES:
        row = result[dtype] = one_dtype(dtype, args.set, args.repeats, not args.quick)
        rates = {k: v for k, v in row.items() if k != "parts"}
        print(f"{dtype}: " + ", ".join(f"{k} {v:.3g}" for k, v in rates.items()))
        for name, part in row["parts"].items():
            work = f"{part['operations']:,} operations, {part['syncs']} waits"
            print(f"  {name}: {1e3 * part['seconds']:.0f} ms, {work}", flush=True)
    if not args.quick:
        result["growth"] = growth(args.set, 3)
    if args.plot:
        plot(result, args.plot)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
