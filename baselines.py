"""What other systems have in the place of an encoder or of the core.

TRM's table of tasks, in the encoder's place: a row for every task under each of its symmetries.
Published: rows start at 0 and are trained by the sign of their gradient, with their own rate. Only
rows that a step touched move between processes. The argmax-feedback TRM, in the core's place:
states are logits, read again as the colours that they make likeliest.

Axes: B slots, M cells of all slots, D hidden, W numbers of a row, T context tokens, N tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import etrm
from .config import Config, ModelConfig, UserError
from .data import FIRST_COLOUR, Batch, Task, task_digest
from .etrm import Block, Carry, Output, Params, normal, rms

# ---------------------------------------------------------------- the table of tasks

TABLE = "encoder.table"
TABLE_LR = 1e-2  # of its rows, as published, with the schedule of optimizer.lr


class Table(NamedTuple):
    table: Tensor  # (N * symmetries, W) row of a task's k-th symmetry: task * symmetries + k
    keys: Tensor  # (N, 3) 48 bits of a digest of each task's demos, 16 at a time: exact in float32


def init_table(cfg: ModelConfig, g: torch.Generator) -> Table:
    """Without rows: training makes them, a checkpoint has them."""
    width, most = cfg.encoder.latent or cfg.hidden, cfg.context_tokens * cfg.hidden
    if width > most or cfg.encoder.width:
        reason = f"a table has rows of latent = {width} numbers, at most {most}, and no width"
        raise UserError(f"model.encoder: {reason}")
    return Table(torch.zeros(0, width), torch.zeros(0, 3))


def apply_table(p: Table, cfg: ModelConfig, batch: Batch) -> Tensor:
    """Context (B, T, D): the row of each slot's task and symmetry, then zeros."""
    if batch.rows is None:
        raise UserError("a table of tasks has no context for demos alone: use train, eval or solve")
    rows = p.table[batch.rows]
    rows = F.pad(rows, (0, cfg.context_tokens * cfg.hidden - rows.shape[1]))
    return rows.unflatten(1, (cfg.context_tokens, -1))


def keys_of(tasks: Sequence[Task]) -> Tensor:
    """(N, 3) by content of the demos."""
    digests = [task_digest(Task("", t.demos, [])) for t in tasks]
    keys = [[int.from_bytes(d[i : i + 2], "little") for i in (0, 2, 4)] for d in digests]
    return torch.tensor(keys).float()


def with_rows(params: Params, cfg: Config, tasks: Sequence[Task]) -> Params:
    """Parameters with a row of zeros for every task under every symmetry, if they have a table."""
    if cfg.model.encoder.kind != "table":
        return params
    if not cfg.data.symmetries:
        raise UserError("data.symmetries: a table needs so many for each task (published: 1000)")
    if cfg.eval.on == "dev":
        raise UserError('eval.on: must be "train": a table has no rows for the dev split')
    rows = torch.zeros(len(tasks) * cfg.data.symmetries, params.encoder.table.shape[1])
    return params._replace(encoder=Table(rows, keys_of(tasks)))


def numbers(params: Params, cfg: Config, tasks: Sequence[Task], views: int) -> Tensor | None:
    """(len(tasks),) numbers of tasks in the table; None without a table. Raises UserError on a task
    that the table does not have."""
    if cfg.model.encoder.kind != "table":
        return None
    if views > cfg.data.symmetries:
        have = f"the table has rows for {cfg.data.symmetries} symmetries of a task"
        raise UserError(f"--views {views}: {have}")
    keys = params.encoder.keys.cpu()
    if not len(keys):
        raise UserError("this table was converted: which tasks its rows belong to is not known")
    equal = (keys_of(tasks)[:, None] == keys).all(-1)
    for task, row in zip(tasks, equal, strict=True):
        if not row.any():
            have = f"the table has rows for the {len(keys)} tasks trained on"
            raise UserError(f"task {task.name}: unseen: {have}")
    return equal.float().argmax(1)


def gathered(params: dict[str, Tensor], batch: Batch) -> tuple[dict[str, Tensor], Batch]:
    """The table, now last, cut down to this batch's rows, one for each slot, with gradient."""
    if TABLE not in params or batch.rows is None:
        return params, batch
    rows = params[TABLE][batch.rows].detach().requires_grad_()
    params = {**{k: p for k, p in params.items() if k != TABLE}, TABLE: rows}
    return params, batch._replace(rows=torch.arange(len(rows), device=rows.device))


def spread(slots: Tensor, batch: Batch, grads: Tensor, of: int) -> list[Tensor]:
    """Of one shard's slots (B,): gradients (of, W) and row numbers (of, 2), zero elsewhere, so that
    sums over shards hold those of all; a row number is split so that float32 holds it."""
    assert batch.rows is not None
    wide, ids = grads.new_zeros(of, grads.shape[1]), grads.new_zeros(of, 2)
    slots = slots.to(grads.device)
    wide[slots] = grads
    ids[slots] = torch.stack((batch.rows // 4096, batch.rows % 4096), 1).to(grads)
    return [wide, ids]


def sign_step(table: Tensor, grads: Tensor, ids: Tensor, lr: float, decay: float) -> None:
    """Sign-SGD of the touched rows, in place: gradients (B, W) of equal rows are summed first; ids
    (B, 2) as in `spread`."""
    touched, index = (ids[:, 0].long() * 4096 + ids[:, 1].long()).unique(return_inverse=True)
    total = grads.new_zeros(len(touched), grads.shape[1]).index_add_(0, index, grads)
    table[touched] = table[touched] * (1 - lr * decay) - lr * total.sign()


# ---------------------------------------------------------------- the argmax-feedback TRM

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


def init_feedback(cfg: ModelConfig, g: torch.Generator) -> Feedback:
    """Inner width 2 * 8 / 3 * D, no biases."""
    d, f, blocks = cfg.hidden, round(16 / 3 * cfg.hidden), []
    for _ in range(cfg.layers):
        block = Block(normal(g, 3 * d, d), normal(g, d, d), normal(g, 2 * f, d), normal(g, d, f))
        blocks.append(Gains(block, torch.ones(d), torch.ones(d)))
    embed = normal(g, COLOURS + 1, d, std=1.0)
    return Feedback(embed, tuple(blocks), normal(g, COLOURS, d), normal(g, 1, d))


def feedback_step(
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
    position, head = etrm.position_of("rope2d", batch.at, cfg.raster), cfg.hidden // cfg.heads
    rotary = etrm.rotary_of(position, cfg.heads, head, p.embed.dtype)
    runs = etrm.runs_of(batch.cells)
    slot_of = etrm.ragged(torch.tensor(batch.cells, device=x.device), len(x))[0]
    begins = carry.halted[slot_of][:, None]
    start = torch.eye(1, COLOURS, dtype=carry.z_H.dtype, device=x.device)  # the first colour
    y, z = (torch.where(begins, start, state.detach()) for state in (carry.z_H, carry.z_L))
    q = torch.full(carry.steps.shape, -math.inf, device=x.device)

    def net(*colours: Tensor) -> Tensor:
        h = torch.stack([F.embedding(c, p.embed) for c in colours]).sum(0)
        for b in p.blocks:
            attended = etrm.self_attention(b.block, cfg.heads, h, runs, rotary)
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
