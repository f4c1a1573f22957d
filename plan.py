"""What a run would take, before it is started: parameters, slots, work and memory, and the time of real steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import data, sources
from .config import Config
from .encoders import encoder_of, init_params
from .etrm import fresh_carry, leaves
from .optim import is_frozen, optimizers, update
from .train import Shard, next_batch, one_step, setup, start_carry, to_device, train_step


def flops(cfg: Config, tasks: data.Tasks, shards: Sequence[Shard]) -> tuple[float, float]:
    """(GFLOP of one optimizer step, GB that autograd keeps for the largest shard), counted on the meta device."""
    meta, total, most = torch.device("meta"), 0.0, 0
    like = init_params(cfg.model, 0)
    for shard in shards:
        slots = torch.cat(shard.slots)
        carry = fresh_carry(cfg.model, [torch.empty(len(s), p.canvas**2) for p, s in zip(*shard, strict=True)], torch.float32)
        carry, batch, least = next_batch(tasks, shard, cfg, carry, torch.device("cpu"))
        p = {k: v.to(meta).requires_grad_(not is_frozen(cfg.optimizer, k)) for k, v in leaves(like).items()}
        kept: dict[int, int] = {}

        def note(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[id(x.untyped_storage())] = x.numel() * x.element_size()
            return x

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            train_step(
                p, like, cfg.model, encoder_of(cfg.model), torch.bfloat16, to_device(carry, meta),
                to_device(batch, meta), least.to(meta), torch.empty(len(slots), device=meta),
            )  # fmt: skip
        total += counter.get_total_flops()
        most = max(most, sum(kept.values()))
    return total / 1e9, most / 1e9


def plan(cfg: Config, timed: bool) -> dict[str, Any]:
    """What a run would take: parameters, slots per pool, GFLOP a step, memory, and, where timed, seconds of real steps."""
    s = setup(cfg)
    params = sum(p.numel() for p in s.params.values())
    slots: dict[int, int] = {}
    for shard in s.shards:
        for pool, mine in zip(*shard, strict=True):
            slots[pool.canvas] = slots.get(pool.canvas, 0) + len(mine)
    made = {
        "parameters": params,
        "tasks": s.meta["tasks"],
        "slots": slots,
        "dtype": str(s.dtype).removeprefix("torch."),
    }
    text = (
        f"{s.meta['tasks']} tasks ({s.left_out} queries left out: no canvas holds them); "
        f"guard: {msgspec.convert(s.meta['finding'], sources.Finding)}\n{params:,} parameters, {made['dtype']} on {s.device}; "
        f"slots per canvas: {', '.join(f'{k}: {v}' for k, v in slots.items())}"
    )
    if timed:
        made["gflop_per_step"], kept = flops(cfg, s.tasks, s.shards)
        # master weights, gradient, EMA and two moments in float32; a copy in the compute dtype; what autograd keeps
        made["memory_gb"] = params * 22 / 1e9 + kept
        opts, trained = optimizers(cfg.optimizer, s.params), [p for p in s.params.values() if p.requires_grad]
        seconds, carries = [], [start_carry(cfg, shard, s.device, s.dtype) for shard in s.shards]
        for _ in range(3):
            begun = time.perf_counter()
            carries, total, _, _ = one_step(s, cfg, carries)
            update(opts, trained, total, 0.0, cfg.optimizer.clip)
            seconds.append(time.perf_counter() - begun)
        made["seconds_per_step"] = min(seconds)
        text += (
            f"\n{made['gflop_per_step']:.0f} GFLOP and {made['seconds_per_step']:.2f} s a step, "
            f"about {made['memory_gb']:.1f} GB beside the interpreter; {cfg.train.steps} steps: "
            f"{made['seconds_per_step'] * cfg.train.steps / 3600:.1f} h without evaluations"
        )
    return {**made, "text": text}
