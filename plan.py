"""What a run would take, before it is started: parameters, slots, work and memory, and the time of real steps."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import data, sources
from .config import Config
from .etrm import tree_map
from .optim import optimizers, update
from .train import THREADS, Setup, next_batch, one_step, start_carry, train_step


def to_meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta"), tree)


def flops(s: Setup, cfg: Config) -> tuple[float, float]:
    """(GFLOP of the first optimizer step, GB that autograd keeps for the largest of the shards that are worked on at once),
    counted on the meta device."""
    total, sizes = 0.0, []
    for slots in s.shards:
        carry, batch, least = next_batch(s, cfg, slots, start_carry(s, cfg, slots))
        p = {k: v.detach().to("meta").requires_grad_(v.requires_grad) for k, v in s.params.items()}
        kept: dict[int, int] = {}

        def note(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[id(x.untyped_storage())] = x.numel() * x.element_size()
            return x

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            train_step(p, s.like, cfg.model, s.encode, s.dtype, to_meta(carry), to_meta(batch), to_meta(least), 1.0)
        total += counter.get_total_flops()
        sizes.append(sum(kept.values()))
    at_once = THREADS if s.device.type == "cpu" else 1
    return total / 1e9, sum(sorted(sizes)[-at_once:]) / 1e9


def plan(cfg: Config, s: Setup, timed: bool) -> dict[str, Any]:
    """What a run would take: parameters, slots by size, GFLOP a step, memory, and, where timed, seconds of real steps."""
    params = sum(p.numel() for p in s.params.values())
    sides = s.deck.canvas[data.dealt(s.deck, torch.full((cfg.train.batch,), 0.5), torch.arange(cfg.train.batch))].amax(1)
    slots = data.histogram(sides)
    made = {
        "parameters": params,
        "tasks": s.meta["tasks"],
        "slots": slots,
        "dtype": str(s.dtype).removeprefix("torch."),
    }
    text = (
        f"{s.meta['tasks']} tasks ({s.left_out} queries left out: no canvas holds them); "
        f"guard: {msgspec.convert(s.meta['finding'], sources.Finding)}\n{params:,} parameters, {made['dtype']} on {s.device}; "
        f"slots by side of their canvas: {', '.join(f'{k}: {v}' for k, v in slots.items())}"
        + (f"\n{s.meta['init_from']}" if "init_from" in s.meta else "")
    )
    if timed:
        made["gflop_per_step"], kept = flops(s, cfg)
        # master weights, EMA and two moments in float32; a copy in the compute dtype; gradients of each shard, and laid flat; what
        # autograd keeps
        learned = sum(p.numel() for p in s.params.values() if p.requires_grad)
        made["memory_gb"] = (learned * (16 + s.dtype.itemsize + 8 * len(s.shards)) + (params - learned) * 4) / 1e9 + kept
        opts, trained = optimizers(cfg.optimizer, s.params, s.dtype), [p for p in s.params.values() if p.requires_grad]
        seconds, carries = [], [start_carry(s, cfg, slots) for slots in s.shards]
        for _ in range(3):
            begun = time.perf_counter()
            carries, total, *_ = one_step(s, cfg, carries)
            update(opts, trained, total, 0.0, cfg.optimizer.clip)
            seconds.append(time.perf_counter() - begun)
        made["seconds_per_step"] = min(seconds)
        text += (
            f"\n{made['gflop_per_step']:.0f} GFLOP and {made['seconds_per_step']:.2f} s a step, "
            f"about {made['memory_gb']:.1f} GB beside the interpreter; {cfg.train.steps} steps: "
            f"{made['seconds_per_step'] * cfg.train.steps / 3600:.1f} h without evaluations"
        )
    return {**made, "text": text}
