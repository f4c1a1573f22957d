"""The argmax-feedback TRM in the core's place: states are logits, read again as the colours that
they make likeliest. `encoders` loads it by name.

Axes: B slots, M cells of all slots, D hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import etrm
from ..config import ModelConfig
from ..data import FIRST_COLOUR, Batch
from ..etrm import Block, Carry, Output, Params, normal, rms

COLOURS = 10


class Gains(NamedTuple):
    """A block with the gains of its two norms."""

    block: Block
    norm_1: Tensor  # (D,)
    norm_2: Tensor  # (D,)


class Feedback(NamedTuple):
    embed: Tensor  # (11, D) ten colours, then everything that is no cell of the grid
    blocks: tuple[Gains, ...]
    head: Tensor  # (10, D)
    halt: Tensor  # (1, D)


def init(cfg: ModelConfig, g: torch.Generator) -> Feedback:
    """Inner width 2 * 8 / 3 * D, no biases."""
    d, f, blocks = cfg.hidden, round(16 / 3 * cfg.hidden), []
    for _ in range(cfg.layers):
        block = Block(normal(g, 3 * d, d), normal(g, d, d), normal(g, 2 * f, d), normal(g, d, f))
        blocks.append(Gains(block, torch.ones(d), torch.ones(d)))
    embed = normal(g, COLOURS + 1, d, std=1.0)
    return Feedback(embed, tuple(blocks), normal(g, COLOURS, d), normal(g, 1, d))


def step(
    params: Params, cfg: ModelConfig, carry: Carry, batch: Batch, min_steps: Tensor | None
) -> tuple[Carry, Output]:
    """One supervision step, as etrm.act_step: H_cycles of (L_cycles updates of z, one of y).

    z <- net(x + y + z), y <- net(y + z), each read as the embedding of its likeliest colour: no
    gradient passes from one call to the next, only the last has any. States begin as the first
    colour; z begins anew in each cycle ("reset") or is kept. Described: the cycles end when all
    grids are surer than 0.9. Here a slot's own cycles end there, so that no answer depends on the
    rest of the batch; of a grid alone it is the same."""
    p: Feedback = params.core
    x = torch.where(batch.inputs >= FIRST_COLOUR, batch.inputs - FIRST_COLOUR, COLOURS)
    position = etrm.position_of("rope2d", batch.at, cfg.raster)
    rotary = etrm.rotary_of(cfg, position, p.embed.dtype)
    slot_of = etrm.ragged(torch.tensor(batch.cells, device=x.device), len(x))[0]
    begins = carry.halted[slot_of][:, None]
    start = torch.eye(1, COLOURS, dtype=carry.z_H.dtype, device=x.device)  # the first colour
    y, z = (torch.where(begins, start, state.detach()) for state in (carry.z_H, carry.z_L))
    q = torch.full(carry.steps.shape, -math.inf, device=x.device)

    def net(*colours: Tensor) -> Tensor:
        h = torch.stack([F.embedding(c, p.embed) for c in colours]).sum(0)
        for b in p.blocks:
            attended = etrm.self_attention(b.block, cfg.heads, h, batch.cells, rotary)
            h = rms(h + attended) * b.norm_1
            h = rms(h + etrm.swiglu(b.block.gate_up, b.block.down, h)) * b.norm_2
        return h

    for cycle in range(cfg.H_cycles):
        before, ended = (y, z, q), etrm.sure(cfg, q)
        any_ended = cycle > 0 and not q.is_meta and bool(ended.any())
        if any_ended and bool(ended.all()):
            break
        z = start.expand_as(z) if cfg.feedback == "reset" else z
        with torch.no_grad():
            for _ in range(cfg.L_cycles):
                z = net(x, y.argmax(-1), z.argmax(-1)) @ p.head.T
        h = net(y.argmax(-1), z.argmax(-1))
        y = h @ p.head.T
        mean = torch.stack([cells.float().mean(0) for cells in h.split(batch.cells)])
        q = (mean @ p.halt.float().T).squeeze(-1)
        if any_ended:
            cells = ended[slot_of][:, None]
            y, z = torch.where(cells, before[0], y), torch.where(cells, before[1], z)
            q = torch.where(ended, before[2], q)
    steps = torch.where(carry.halted, 0, carry.steps) + 1
    halted = etrm.halts(cfg, q, steps, min_steps)
    logits = F.pad(y, (FIRST_COLOUR, 0), value=-math.inf)  # it cannot say where a grid ends
    carry = carry._replace(z_H=y.detach(), z_L=z.detach(), steps=steps, halted=halted)
    return carry, Output(logits, q)
