"""TRM's table of tasks, in the encoder's place: a row for every task under each of its symmetries.

Published: rows start at 0 and are trained by the sign of their gradient, with their own rate. Only
rows that a step touched move between processes.
Axes: B slots, D hidden, W numbers of a row, T context tokens, N tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config, ModelConfig, UserError
from .data import Batch, Task, task_digest
from .etrm import Params

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
