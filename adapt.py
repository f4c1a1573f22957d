"""Test-time adaptation, from demos alone: a search over the context, or a copy of the weights trained on.

Axes: B rows = views of queries, R demos asked one by one (leave-one-out), T context tokens, D hidden.
After Bonnet & Macfarlane, "Searching Latent Program Spaces" (arXiv 2411.08706) and Akyürek et al., "The Surprising
Effectiveness of Test-Time Training for Abstract Reasoning" (arXiv 2411.07279).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from . import checkpoint, data, etrm, sources, train
from .config import Config, InitConfig
from .data import Symmetry, Task, UserError
from .etrm import Context, Encode, Params
from .optim import learning_rate, matched, update
from .runs import described

COPIES = 3  # of a single demo, under symmetries
SCALE = 2.0**12  # of a loss in fp16, whose gradients would vanish


def several(task: Task) -> Task:
    """The demos alone, at least two: a single one is joined by copies of it under symmetries fixed by the task's content."""
    demos = list(task.demos)
    if len(demos) == 1:
        key = int.from_bytes(sources.task_digest(Task("", demos, []))[:7], "little")
        drawn = data.draw_symmetry(data.uniform(11, key, data.VIEW, torch.arange(COPIES)), True, "keep_black")
        turns = [Symmetry(*(x[i] for x in drawn)) for i in range(COPIES)]
        demos += [(data.apply(s, demos[0][0]), data.apply(s, demos[0][1])) for s in turns]
    return Task(task.name, demos, [])


class Asked(NamedTuple):
    """Demos as questions, under the view of the row that they belong to."""

    batch: data.Batch
    owner: Tensor  # (R,) the row


def fixed(encode: Encode) -> Encode:
    """The encoder itself. Raises UserError where there is no one context that could be searched."""
    if encode.recur or encode.step:
        raise UserError(
            "solve: there is no one context to search (states in the carry, or no encoder): no --adapt context, no --vote demos"
        )
    return encode


def given(said: Context) -> Encode:
    """An encoder that has said it already."""
    return Encode(lambda *_: said)


def ask_demos(tasks: Sequence[Task], rows: Sequence[int], view: tuple[Symmetry, Tensor], cfg: Config, device: torch.device) -> Asked:
    """Every demo of the tasks of some rows, asked from the others, on a canvas that holds all of them."""
    order = sorted(set(rows))
    packed = data.pack([several(tasks[t]) for t in order], device)
    first = packed.first.tolist()
    size = torch.stack([packed.grids[a:b, :, 1:].amax((0, 1)) for a, b in zip(first, first[1:], strict=False)])
    canvas = data.snug(size, cfg.data.canvases)
    owner: list[int] = []
    pair: list[int] = []
    for b, t in enumerate(rows):
        if canvas[(k := order.index(t)), 0]:
            pair += range(first[k], first[k + 1])
            owner += [b] * (first[k + 1] - first[k])
    of, at = torch.tensor(owner, dtype=torch.int64), torch.tensor(pair, dtype=torch.int64)
    there = torch.ones_like(at, dtype=torch.bool)
    asked = data.Queries(at, packed.task_of[at], there, canvas[packed.task_of[at]], there)
    lots = torch.nn.functional.pad(view[1], (0, 99))[of, : 1 + int(packed.first.diff().max())]
    turned = Symmetry(view[0].dihedral[of], view[0].colours[of])
    episodes = data.posed(packed, cfg.data, "leave_one_out", asked, view=(turned, lots))
    return Asked(data.batch(packed, episodes, cfg.data, cfg.model.raster), of.to(device))


def likelihood(params: Params, cfg: Config, asked: Asked, said: Context, rows: int) -> tuple[Tensor, Tensor]:
    """(gradient of the summed loss of all ACT steps by the context tokens (R, T, D), where that is wanted, else zeros; (rows,)
    mean log-probability of a demo's cell after the last step, 0 without demos). One step's graph is there at a time."""
    context = said.tokens
    model, grad = msgspec.structs.replace(cfg.model, q_weight=0.0), torch.zeros(context.shape, device=context.device)
    carry = etrm.fresh_carry(model, asked.batch.cells, context.dtype, context.device)
    scale = SCALE if context.dtype == torch.float16 else 1.0
    for _ in range(cfg.model.halt_max_steps):
        carry, out = etrm.act_step(params, model, given(said), carry, asked.batch, None)
        loss = etrm.act_loss(model, out, asked.batch.labels, asked.batch.cells)
        if context.requires_grad:
            grad += torch.autograd.grad(loss.total.sum() * scale, [context])[0].float() / scale
    sums = torch.zeros(2, rows, device=context.device)
    sums.index_add_(1, asked.owner, torch.stack((loss.lm, torch.ones_like(loss.lm))))
    return grad, -sums[0] / sums[1].clamp(min=1)


def explained(params: Params, cfg: Config, encode: Encode, asked: Asked, said: Context) -> Tensor:
    """(B,) how well each row's own context tokens explain its demos; what an encoder says of cells it says of the demos' own."""
    with torch.no_grad():
        if not len(asked.owner):
            return torch.zeros(len(said.tokens))
        own = said._replace(tokens=said.tokens[asked.owner])
        if said.cells is not None:
            own = encode.read(params.encoder, asked.batch)._replace(tokens=own.tokens)
        found = likelihood(params, cfg, asked, own, len(said.tokens))[1]
        return found.nan_to_num(-1e9)


def search(params: Params, cfg: Config, encode: Encode, asked: Asked, said: Context, until: float) -> Context:
    """The context with, on its tokens (B, T, D), what, added to the contexts of the *other* demos, makes each demo likeliest.

    Gradient steps from nothing added, the best kept row by row, so no row's demos become less likely; rows do not
    depend on each other."""
    if not len(asked.owner):  # their canvas is too large
        return said
    with torch.no_grad():
        base, context = encode.read(params.encoder, asked.batch), said.tokens
    added = torch.zeros(context.shape, device=context.device)
    best, kept = torch.full((len(context),), -torch.inf, device=context.device), torch.zeros_like(added)
    opt = torch.optim.Adam([added], lr=cfg.solve.adapt_lr or 0.1)
    for step in range(cfg.solve.adapt_steps + 1):
        last = step == cfg.solve.adapt_steps or time.monotonic() > until
        tried = (base.tokens + added.to(context.dtype)[asked.owner]).requires_grad_(not last)
        with torch.enable_grad():
            grad, score = likelihood(params, cfg, asked, base._replace(tokens=tried), len(context))
        better = score > best
        best, kept = torch.where(better, score, best), torch.where(better[:, None, None], added, kept)
        if last:
            break
        added.grad = torch.zeros_like(added).index_add_(0, asked.owner, grad.nan_to_num(0.0, 0.0, 0.0))
        opt.step()
    return said._replace(tokens=context + kept.to(context.dtype))


def recipe(cfg: Config, folder: str = "") -> Config:
    """The run of a full or joint adaptation: training's own, on leave-one-out episodes of the demos."""
    if cfg.model.encoder.kind == "table":
        raise UserError("solve.adapt: a table's rows are its tasks': there is nothing to adapt")
    replace, how = msgspec.structs.replace, cfg.solve
    shards = 1 if train.undivided(cfg.model) else min(4, how.adapt_batch)
    rest = () if how.adapt_weights == ".*" else (rf"(?!(?:{how.adapt_weights})$).*",)
    return replace(
        cfg,
        run=replace(cfg.run, dir=folder, track=""),
        init_from=InitConfig(),
        data=replace(cfg.data, query="leave_one_out", min_demos=0, turn_outputs=0.0),
        optimizer=replace(
            cfg.optimizer, lr=how.adapt_lr or 1e-3, warmup=0, final_lr=0.1, freeze=(*cfg.optimizer.freeze, *rest), freeze_until={}
        ),
        train=replace(cfg.train, batch=how.adapt_batch, shards=shards, steps=how.adapt_steps, save_every=100, keep_every=0),
        eval=replace(cfg.eval, on="train", foreign=False, every=500, weights=("raw",), patience=0, stop_at=1.0),
    )


def prepared(params: Params, cfg: Config, tasks: Sequence[Task]) -> train.Setup:
    """A setup whose weights are a copy of these and whose tasks have nothing but demos. Raises UserError on a pattern of no weights."""
    matched("solve.adapt_weights", cfg.solve.adapt_weights, etrm.leaves(params))
    s = train.setup(cfg, given=tasks)
    own = {k: v.detach().to(s.device, torch.float32).clone() for k, v in etrm.leaves(params).items()}
    return s._replace(params={k: v.requires_grad_(s.params[k].requires_grad) for k, v in own.items()})


def tuned(params: Params, cfg: Config, task: Task, until: float) -> Params:
    """Weights trained on the task's demos until all slots were right three steps on end, or the steps or the time are over;
    the same weights where no demo can be asked, for none fits the canvas of the others."""
    cfg, task = recipe(cfg), several(task)
    asked = data.queries(data.pack([task]), cfg.data.query, cfg.data.canvases)
    if not asked.fits.any() or time.monotonic() > until:
        return params
    s = prepared(params, cfg, [task])
    state, trained, solved = train.fresh_state(cfg, s), [p for p in s.params.values() if p.requires_grad], 0
    for step in range(1, cfg.train.steps + 1):
        scale = state.facts["scale"]
        state.carries, grads, sums, *_ = train.one_step(s, cfg, state.carries, scale)
        torch._foreach_mul_(grads, 1 / scale)
        norm = update(state.opts, trained, grads, learning_rate(cfg.optimizer, step, cfg.train.steps), cfg.optimizer.clip)
        state.facts["scale"] = scale if norm.isfinite() else max(1.0, scale / 2)
        row = train.metrics_row(sums)
        solved = solved + 1 if row["all/exact"] == 1 else 0
        if solved == 3 or time.monotonic() > until:
            break
    return etrm.rebuild(s.like, {k: v.detach() for k, v in s.params.items()})


def tuned_jointly(params: Params, cfg: Config, tasks: Sequence[Task], folder: Path, limit: float) -> tuple[Params, float]:
    """(weights trained on the demos of all tasks together, seconds that took): a run of its own, which goes on where it was
    interrupted and ends early when all demos are solved or after `limit` seconds. limit 0: what it has so far."""
    cfg, last = recipe(cfg, str(folder)), folder / "last.safetensors"
    if limit <= 0 and not last.exists():
        raise UserError(f"{folder}: absent, though weights that it had have voted: put it there, or start another --predictions file")
    if not (last.exists() and (limit <= 0 or described(folder)["state"] in ("done", "eval.stop_at"))):
        s = prepared(params, cfg, [several(t) for t in tasks])
        ran = train.fit(cfg, resume=bool(checkpoint.manifests(folder)), limit=limit, s=s)
        if ran.get("stopped") not in (None, "eval.stop_at", "time limit"):
            raise KeyboardInterrupt
    return checkpoint.load(last).params, json.loads(checkpoint.manifests(folder)[-1].read_text())["seconds"]
