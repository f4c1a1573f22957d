"""What encoders are built of: blocks, ways to attend, places of cells and demos.

Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden, h heads.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import baselines
from .config import ModelConfig, UserError, nearest
from .data import Batch, Demos
from .etrm import (
    Context,
    Encode,
    Params,
    Runs,
    Turn,
    attention,
    codes,
    init_block,
    init_core,
    inner_width,
    layout_of,
    normal,
    position_of,
    ragged,
    rms,
    rotate,
    runs_of,
    self_attention,
    swiglu,
    turn_of,
)

# ---------------------------------------------------------------- blocks


class CellBlock(NamedTuple):
    """A block over the cells of one demo."""

    qkv: Tensor  # (3 D, D)
    o: Tensor  # (D, D)
    gate_up: Tensor  # (2 F, D); lpn, lpn_var: (F, D), nothing gates
    down: Tensor  # (D, F)
    scale_1: Tensor | None  # (D,) layer scale
    scale_2: Tensor | None  # (D,)


class SetBlock(NamedTuple):
    """A block in which context tokens attend to demos."""

    q: Tensor  # (D, D)
    k: Tensor  # (D, D)
    v: Tensor  # (D, D)
    o: Tensor  # (D, D)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)
    scale_1: Tensor | None  # (D,)
    scale_2: Tensor | None  # (D,)


def _scales(cfg: ModelConfig) -> tuple[Tensor | None, Tensor | None]:
    if not cfg.encoder.layer_scale:
        return None, None
    return torch.full((cfg.hidden,), cfg.encoder.layer_scale), torch.full(
        (cfg.hidden,), cfg.encoder.layer_scale
    )


def init_cell_block(cfg: ModelConfig, g: torch.Generator) -> CellBlock:
    return CellBlock(*init_block(cfg, g), *_scales(cfg))


def init_set_block(cfg: ModelConfig, g: torch.Generator) -> SetBlock:
    d, f = cfg.hidden, inner_width(cfg.hidden, cfg.expansion)
    q, k, v, o = (normal(g, d, d) for _ in range(4))
    return SetBlock(q, k, v, o, normal(g, 2 * f, d), normal(g, d, f), *_scales(cfg))


def norm(x: Tensor, kind: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) if kind == "layer" else rms(x)


def residual(kind: str, x: Tensor, f: Callable[[Tensor], Tensor], scale: Tensor | None) -> Tensor:
    """x + scale * f(x), normed after ("post") or before f ("pre", "layer")."""
    y = f(x if kind == "post" else norm(x, kind))
    x = x + (y if scale is None else scale * y)
    return rms(x) if kind == "post" else x


def mlp(p: CellBlock | SetBlock, x: Tensor) -> Tensor:
    if len(p.gate_up) == p.down.shape[1]:
        return F.silu(x @ p.gate_up.T) @ p.down.T
    return swiglu(p.gate_up, p.down, x)


def cell_block(
    p: CellBlock,
    cfg: ModelConfig,
    x: Tensor,
    runs: Runs,
    turn: Turn,
    seen: Tensor | None,
    kind: str = "",
) -> Tensor:
    """Packed cells (M, D), each demo by itself; seen (M,) true where a cell may be attended to."""
    kind = kind or cfg.encoder.norm
    x = residual(
        kind,
        x,
        lambda x: self_attention(p.qkv, p.o, cfg.heads, x, runs, turn, seen),
        p.scale_1,
    )
    return residual(kind, x, lambda x: mlp(p, x), p.scale_2)


def set_block(
    p: SetBlock, cfg: ModelConfig, x: Tensor, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    """Tokens (..., D) attend in some way to what is not among them, then SwiGLU."""
    x = residual(cfg.encoder.norm, x, lambda x: attend(x) @ p.o.T, p.scale_1)
    return residual(cfg.encoder.norm, x, lambda x: mlp(p, x), p.scale_2)


def in_heads(cfg: ModelConfig, x: Tensor, weight: Tensor, normed: bool = True) -> Tensor:
    """(..., s, D) to (..., h, s, head): queries and keys, or values, which are never normed."""
    return rearrange(x @ weight.T, "... s (h d) -> ... h s d", h=cfg.heads)


def projected(
    p: SetBlock, cfg: ModelConfig, x: Tensor, of: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries of x, keys and values of what it attends to."""
    q = in_heads(cfg, x, p.q) * (cfg.hidden // cfg.heads) ** -0.5
    return q, in_heads(cfg, of, p.k), in_heads(cfg, of, p.v, normed=False)


def attend_vectors(
    p: SetBlock, cfg: ModelConfig, each: Tensor, seen: Tensor, context: Tensor
) -> Tensor:
    """Each slot's context tokens attend to the vectors (B, K, D) of its demos."""
    return rearrange(
        attention(*projected(p, cfg, context, each), seen[:, None, None]), "b h t d -> b t (h d)"
    )


def attend_cells(
    p: SetBlock,
    cfg: ModelConfig,
    x: Tensor,
    seen: Tensor,
    slot_cells: Sequence[int],
    context: Tensor,
) -> Tensor:
    """Each slot's context tokens attend to all cells (M, D), ordered by slot, of all its demos."""
    q, k, v = projected(p, cfg, context, x[None])
    masks = seen.view(1, 1, 1, -1).split(list(slot_cells), 3)
    each = zip(
        q.split(1), k.split(list(slot_cells), 2), v.split(list(slot_cells), 2), masks, strict=True
    )
    return rearrange(torch.cat([attention(*parts) for parts in each]), "b h t d -> b t (h d)")


def attend_tokens(
    p: SetBlock, cfg: ModelConfig, tokens: Tensor, slot_cells: Sequence[int], x: Tensor
) -> Tensor:
    """All cells (M, D), ordered by slot, attend to their slot's tokens (B, t, D)."""
    q, k, v = projected(p, cfg, x[None], tokens)
    each = zip(q.split(list(slot_cells), 2), k.split(1), v.split(1), strict=True)
    return rearrange(torch.cat([attention(*parts) for parts in each], 2), "1 h m d -> m (h d)")


class Shown(NamedTuple):
    """What tokens may attend to: cells of the demos, slot by slot."""

    x: Tensor  # (M, D)
    seen: Tensor  # (M,) bool
    turn: Turn
    slot_cells: Sequence[int]  # of each slot


def attend_across(
    p: SetBlock, cfg: ModelConfig, to: Shown, turn: Turn, sizes: Sequence[int], x: Tensor
) -> Tensor:
    """Packed tokens (N, D), so many of each slot, attend to what is shown to their slot; both turned by their positions."""

    def heads(x: Tensor, weight: Tensor, turn: Turn, which: int) -> Tensor:
        y = (x @ weight.T).unflatten(-1, (cfg.heads, -1))
        assert turn is not None
        of = slice(which, which + 1)
        return rotate(y[:, None], (turn[0][:, of], turn[1][:, of])).permute(1, 2, 0, 3)

    q, k, v = (
        heads(x, p.q, turn, 0),
        heads(to.x, p.k, to.turn, 1),
        in_heads(cfg, to.x[None], p.v, normed=False),
    )
    cells = list(to.slot_cells)
    masks = to.seen.view(1, 1, 1, -1).split(cells, 3)
    each = zip(q.split(list(sizes), 2), k.split(cells, 2), v.split(cells, 2), masks, strict=True)
    return rearrange(torch.cat([attention(*parts) for parts in each], 2), "1 h n d -> n (h d)")


# ---------------------------------------------------------------- places of cells and demos


def position_in(cfg: ModelConfig, at: Tensor) -> Tensor:
    """Cells keep rotary positions in the encoder even where the core has learned ones or none, as published."""
    found = position_of(
        "rope2d" if cfg.positions in ("rope2d", "both", "borders") else "rope", at, cfg.raster
    )
    assert found is not None
    return found


def turn_in(cfg: ModelConfig, position: Tensor, like: Tensor) -> Turn:
    return turn_of(position, cfg.heads, cfg.hidden // cfg.heads, like.dtype)


def to_slots(x: Tensor, demos: Demos) -> Tensor:
    """Per-demo values (N, ...) to (B, K, ...): each demo at its owner and place, 0 elsewhere."""
    out = x.new_zeros((len(demos.slot_cells), demos.most, *x.shape[1:]))
    return out.index_put(
        (demos.owner, demos.number), x
    )  # (owner, place) is unique: no accumulation, no order


def there(demos: Demos) -> Tensor:
    """(B, K) bool: whether a slot has a demo at a place."""
    return to_slots(torch.ones_like(demos.owner, dtype=torch.bool), demos)


def mean_seen(each: Tensor, seen: Tensor) -> Tensor:
    """(B, K, ...), 0 where no demo is seen, to the mean (B, ...) of a slot's demos; 0 where it has none."""
    return each.sum(1) / seen.sum(1).clamp(min=1).view(-1, *[1] * (each.ndim - 2)).to(each.dtype)


def mean_of(x: Tensor, demos: Demos) -> Tensor:
    """Per-demo values (N, ...) to the mean (B, ...) of a slot's demos."""
    return mean_seen(to_slots(x, demos), there(demos))


ASKED = 12  # the output token of a test input that is read as one more demo


def with_query(batch: Batch) -> Demos:
    """The demos, and before them each slot's test input as one more, its output to be asked."""
    d, slots = batch.demos, len(batch.cells)
    of = torch.arange(slots, device=batch.inputs.device)
    owner, cells = torch.cat((d.owner, of)), d.cells + batch.cells
    inputs, outputs = (
        torch.cat((d.inputs, batch.inputs)),
        torch.cat((d.outputs, torch.where(batch.inputs == 0, 0, ASKED))),
    )
    of_cell = owner[ragged(torch.tensor(cells, device=owner.device), len(inputs))[0]]
    return Demos(
        inputs, outputs, torch.cat((d.at, batch.at)), cells, d.gaps + (1,) * slots, owner, torch.cat((d.number + 1, of * 0)),
        d.most + 1, torch.argsort(of_cell, stable=True), tuple(a + b for a, b in zip(d.slot_cells, batch.cells, strict=True)),
        torch.cat((d.borders, batch.borders)),
    )  # fmt: skip


# ---------------------------------------------------------------- encoders


# ---------------------------------------------------------------- demo by demo, as published


class Latent(NamedTuple):
    """A normal distribution over programs."""

    mean: Tensor  # (L, D)
    mean_bias: Tensor | None  # (L,)
    log_var: Tensor  # (L, D)
    log_var_bias: Tensor | None  # (L,)


class Standard(NamedTuple):
    """The parts that the published encoders are made of; None or () where one does without."""

    input_embed: Tensor  # (V, D)
    output_embed: Tensor | None  # (V, D), None: the same
    cells: tuple[CellBlock, ...]
    pool: tuple[Tensor, ...] = ()  # attention: query (1, D), q, k, v, o (D, D); weighted: (1, D)
    pool_proj: Tensor | None = None  # (D, D); hierarchical (D, 2 D)
    queries: Tensor | None = None  # (T, D)
    sets: tuple[SetBlock, ...] = ()
    class_embed: Tensor | None = None  # (1, D) the token that stands for its demo
    row_embed: Tensor | None = None  # (raster, D) instead of rotary positions
    column_embed: Tensor | None = None  # (raster, D)
    side_embed: Tensor | None = None  # (2, D) input, output
    mixing: tuple[CellBlock, ...] = ()  # in which the demos of a slot attend to each other
    latent: Latent | None = None
    up: Tensor | None = None  # (T * D, L)
    up_bias: Tensor | None = None  # (T * D,)
    start: Tensor | None = None  # (S, T, D)
    level: tuple[CellBlock, ...] = ()  # shared by both states


Part = Callable[[ModelConfig, torch.Generator], dict[str, Any]]


def made_of(*parts: Part) -> Callable[[ModelConfig, torch.Generator], Standard]:
    return lambda cfg, g: Standard(**{k: v for part in parts for k, v in part(cfg, g).items()})


def embeddings(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    d, e = cfg.hidden, cfg.encoder
    tables = {"input_embed": normal(g, 12, d), "output_embed": normal(g, 12, d)}
    return {**tables, "cells": tuple(init_cell_block(cfg, g) for _ in range(e.layers))}


def pooling(cfg: ModelConfig, g: torch.Generator, grids: int = 1) -> dict[str, Any]:
    d, kind = cfg.hidden, cfg.encoder.pooling
    pool: tuple[Tensor, ...] = (normal(g, 1, d),) if kind == "weighted" else ()
    if kind == "attention":
        pool = (normal(g, 1, d, std=0.02), *(normal(g, d, d) for _ in range(4)))
    return {"pool": pool, "pool_proj": normal(g, d, grids * d)}


def class_token(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"class_embed": normal(g, 1, cfg.hidden, std=0.02)}


def paper(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    d, r = cfg.hidden, cfg.raster
    wide = round(cfg.expansion * d)
    plain = lambda b: b._replace(gate_up=normal(g, wide, d), down=normal(g, d, wide))  # noqa: E731
    row, column, side = (normal(g, n, d, std=0.02) for n in (r, r, 2))
    found = {
        "input_embed": normal(g, 12 + cfg.encoder.query, d, std=1.0),
        "output_embed": None,
        **class_token(cfg, g),
    }
    cells = tuple(plain(init_cell_block(cfg, g)) for _ in range(cfg.encoder.layers))
    return {**found, "cells": cells, "row_embed": row, "column_embed": column, "side_embed": side}


def some(name: str, init: Callable[[ModelConfig, torch.Generator], Any]) -> Part:
    """As many blocks as there are set layers."""
    return lambda cfg, g: {name: tuple(init(cfg, g) for _ in range(cfg.encoder.set_layers))}


def seeds(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"queries": normal(g, cfg.context_tokens, cfg.hidden, std=0.02)}


def unfolding(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"up": normal(g, cfg.context_tokens * cfg.hidden, cfg.hidden)}


def offset(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"up_bias": torch.zeros(cfg.context_tokens * cfg.hidden)}


def drawing(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    d = cfg.hidden
    n = cfg.encoder.latent or d
    latent = Latent(normal(g, n, d), torch.zeros(n), normal(g, n, d), torch.zeros(n))
    return {"latent": latent, "up": normal(g, cfg.context_tokens * d, n)}


def states(n: int) -> Part:
    return lambda cfg, g: {"start": normal(g, n, cfg.context_tokens, cfg.hidden, std=1.0)}


def pool_cells(pool: Sequence[Tensor], cfg: ModelConfig, x: Tensor, mask: Tensor) -> Tensor:
    """(n, S, D) to (n, D) over the cells of the mask (n, S)."""
    kind = cfg.encoder.pooling
    if kind == "attention":
        query, wq, wk, wv, wo = pool
        q = (in_heads(cfg, query, wq) * (cfg.hidden // cfg.heads) ** -0.5).expand(
            len(x), -1, -1, -1
        )
        mixed = attention(
            q, in_heads(cfg, x, wk), in_heads(cfg, x, wv, normed=False), mask[:, None, None]
        )
        return rearrange(mixed, "n h 1 d -> n (h d)") @ wo.T
    if kind == "weighted":
        weight = torch.softmax(
            (x @ pool[0].T).squeeze(-1).float().masked_fill(~mask, -torch.inf), -1
        )
        return torch.einsum("ns,nsd->nd", weight.to(x.dtype), x)
    if kind == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("ns,nsd->nd", share.to(x.dtype), x)


def pooled(p: Standard, cfg: ModelConfig, x: Tensor, seen: Tensor, runs: Runs) -> Tensor:
    """Packed cells (M, D) to a vector (n, D) each for what lies in the runs."""
    cells, masks = ([*t.split([n * s for n, s, _ in runs])] if runs else [] for t in (x, seen))
    parts = zip(runs, cells, masks, strict=True)
    vectors = [pool_cells(p.pool, cfg, c.view(n, s, -1), m.view(n, s)) for (n, s, _), c, m in parts]
    return torch.cat([x[:0], *vectors])


def in_pairs(demos: Demos, lead: int = 0) -> Tensor:
    """Order of (`lead` tokens of each demo, M input cells, M output cells) in which they stand demo by demo."""
    cells = torch.tensor(demos.cells, dtype=torch.int64, device=demos.at.device)
    whole, ahead = len(demos.at), lead * len(demos.cells)
    owner, place = ragged(lead + 2 * cells, ahead + 2 * whole)
    cell = place - lead
    second = (cell >= cells[owner]).long()
    index = ahead + (cells.cumsum(0) - cells)[owner] + cell + second * (whole - cells[owner])
    return torch.where(cell < 0, owner * lead + place, index)


def pair_cells(p: Standard, cfg: ModelConfig, demos: Demos) -> tuple[Tensor, Tensor, Runs]:
    """(tokens, whether they may be seen, runs): class token if any, input cells, output cells, demo by demo, through the blocks."""
    at, lead = demos.at, int(p.class_embed is not None)
    output_embed = p.input_embed if p.output_embed is None else p.output_embed
    x = torch.cat(
        (F.embedding(demos.inputs, p.input_embed), F.embedding(demos.outputs, output_embed))
    )
    seen, turn, kind = torch.cat((demos.inputs, demos.outputs)) != 0, None, ""
    after = torch.tensor(
        [[cfg.raster, 0]], device=at.device
    )  # the output's grid continues the input's raster
    position = position_in(cfg, torch.cat((at, at + after)))
    if p.row_embed is None or p.column_embed is None or p.side_embed is None:
        x = x * math.sqrt(cfg.hidden)
    else:
        place = F.embedding(at[:, 0], p.row_embed) + F.embedding(at[:, 1], p.column_embed)
        x = x + torch.cat([place + side for side in p.side_embed])
    if p.class_embed is not None:  # it stands at the origin, so that nothing turns it
        n, kind = len(demos.cells), "pre" if p.row_embed is None else "layer"
        x, seen = torch.cat((p.class_embed.expand(n, -1), x)), torch.cat((seen.new_ones(n), seen))
        position = torch.cat((position.new_zeros(n, *position.shape[1:]), position))
    order = in_pairs(demos, lead)
    x, seen = x[order], seen[order]
    if p.row_embed is None:
        turn = turn_in(cfg, position[order], x)
    runs = runs_of(
        [lead + 2 * c for c in demos.cells], [not cfg.published_faults] * len(demos.cells)
    )
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, turn, seen, kind)
    return x, seen, runs


def pair_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): of each demo its class token, or else its cells pooled."""
    x, seen, runs = pair_cells(p, cfg, demos)
    if p.class_embed is not None:
        size = torch.tensor(demos.cells, dtype=torch.int64, device=x.device) * 2 + 1
        return norm(x[size.cumsum(0) - size], "rms" if p.row_embed is None else "layer")
    assert p.pool_proj is not None
    return pooled(p, cfg, x, seen, runs) @ p.pool_proj.T


def grid_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): every grid by itself to a vector, the two of a demo to one: its rule."""
    assert p.output_embed is not None and p.pool_proj is not None
    x = torch.cat(
        (F.embedding(demos.inputs, p.input_embed), F.embedding(demos.outputs, p.output_embed))
    ) * math.sqrt(cfg.hidden)
    seen, cells = torch.cat((demos.inputs, demos.outputs)) != 0, demos.cells * 2
    turn = turn_in(cfg, position_in(cfg, demos.at.repeat(2, 1)), x)
    runs = runs_of(cells, [not cfg.published_faults] * len(cells))
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, turn, seen)
    return torch.cat(pooled(p, cfg, x, seen, runs).chunk(2), -1) @ p.pool_proj.T


Vectors = Callable[[Standard, ModelConfig, Demos], Tensor]


def in_sets(p: Standard, cfg: ModelConfig, each: Tensor, seen: Tensor, context: Tensor) -> Tensor:
    """Context tokens (B, T, D) attend to the demos' vectors (B, K, D)."""
    for s in p.sets:
        context = set_block(s, cfg, context, functools.partial(attend_vectors, s, cfg, each, seen))
    return context


def apply_sets(
    p: Standard, cfg: ModelConfig, batch: Batch, vectors: Vectors = pair_vectors
) -> Tensor:
    """A vector per demo, which may attend to each other; T queries attend to them."""
    assert p.queries is not None
    each, seen = to_slots(vectors(p, cfg, batch.demos), batch.demos), there(batch.demos)
    for b in p.mixing:
        slots, most, _ = each.shape
        each = cell_block(
            b, cfg, each.flatten(0, 1), ((slots, most, True),), None, seen.flatten()
        ).unflatten(0, (slots, most))
    return rms(in_sets(p, cfg, each, seen, p.queries.expand(len(each), -1, -1)))


def drawn(p: Latent, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """(..., D) to a latent (..., L) and, in float32, its divergence (...) from the standard normal."""
    mean, log_var = (
        F.linear(x, p.mean, p.mean_bias),
        F.linear(x, p.log_var, p.log_var_bias).clamp(-10, 10),
    )
    z = mean if noise is None else mean + noise.to(mean.dtype) * torch.exp(0.5 * log_var)
    m, v = mean.float(), log_var.float()
    return z, -0.5 * (1 + v - m.square() - v.exp()).sum(-1)


def unfolded(p: Standard, cfg: ModelConfig, z: Tensor) -> Tensor:
    """(B, L) to context (B, T, D)."""
    assert p.up is not None
    context = F.linear(z, p.up, p.up_bias).unflatten(-1, (cfg.context_tokens, -1))
    return context if cfg.published_faults else rms(context)


def apply_mean(p: Standard, cfg: ModelConfig, batch: Batch) -> Tensor:
    """The mean of the demos' vectors, unfolded to the context."""
    return unfolded(p, cfg, mean_of(pair_vectors(p, cfg, batch.demos), batch.demos))


def apply_drawn(p: Standard, cfg: ModelConfig, batch: Batch, one: str) -> Context:
    """One vector for all demos, a latent drawn from it: the mean of the demos' vectors, or of the context tokens, normed or not."""
    assert p.latent is not None
    d = batch.demos
    x = mean_of(pair_vectors(p, cfg, d), d) if one == "mean" else apply_sets(p, cfg, batch).mean(1)
    z, kl = drawn(
        p.latent,
        rms(x) if one == "normed" else x,
        None if batch.noise is None else batch.noise[:, 0],
    )
    return Context(unfolded(p, cfg, z), kl)


def apply_drawn_each(p: Standard, cfg: ModelConfig, batch: Batch) -> Context:
    """A latent drawn for each demo, then their mean; published: each demo of the batch counts the same in the KL."""
    assert p.latent is not None
    d = batch.demos
    z, kl = drawn(
        p.latent,
        pair_vectors(p, cfg, d),
        None if batch.noise is None else batch.noise[d.owner, d.number],
    )
    whole = to_slots(kl, d).sum(1) * len(d.slot_cells) / max(1, len(d.cells))
    return Context(
        unfolded(p, cfg, mean_of(z, d)), whole if cfg.published_faults else mean_of(kl, d)
    )


class Vector(NamedTuple):
    """What a recurrent encoder goes on from."""

    each: Tensor  # (B, K, D)
    seen: Tensor  # (B, K) bool


def apply_vectors(p: Standard, cfg: ModelConfig, batch: Batch) -> Vector:
    return Vector(to_slots(pair_vectors(p, cfg, batch.demos), batch.demos), there(batch.demos))


def settled(cfg: ModelConfig, old: Tensor, new: Tensor) -> Tensor:
    """Published: nine tenths of the old state stay, and no gradient ever reaches the encoder."""
    return (0.9 * old + 0.1 * new).detach() if cfg.published_faults else rms(new)


def recur_sets(p: Standard, cfg: ModelConfig, read: Vector, z: Tensor) -> Tensor:
    """The context of the step before attends to the demos again, H_cycles times."""
    for _ in range(cfg.encoder.H_cycles):
        z = settled(cfg, z, in_sets(p, cfg, read.each, read.seen, z[:, 0])[:, None])
    return z


def recur_cycles(p: Standard, cfg: ModelConfig, read: Vector, z: Tensor) -> Tensor:
    """The core's recursion over the context tokens, the mean of the demos injected; every cycle has gradient."""
    slots, _, t, _ = z.shape
    e, (z_H, z_L) = (
        mean_seen(read.each, read.seen).repeat_interleave(t, 0),
        (x.flatten(0, 1) for x in z.unbind(1)),
    )
    turn, runs = (
        turn_in(cfg, torch.arange(t, device=z.device).repeat(slots), z),
        runs_of([t] * slots),
    )

    def level(z: Tensor) -> Tensor:
        for b in p.level:
            z = cell_block(b, cfg, z, runs, turn, None)
        return z

    for _ in range(cfg.encoder.H_cycles):
        for _ in range(cfg.encoder.L_cycles):
            z_L = level(z_L + z_H + e)
        z_H = level(z_H + z_L)
    return settled(cfg, z, torch.stack((z_H, z_L)).unflatten(1, (slots, t)).transpose(0, 1))


# ---------------------------------------------------------------- cell by cell: all cells of all demos are there to be seen


class Perceiver(NamedTuple):
    input_embed: Tensor  # (V, D)
    output_embed: Tensor  # (V, D)
    cells: tuple[CellBlock, ...]
    queries: Tensor  # (T, D)
    sets: tuple[SetBlock, ...]
    border_embed: Tensor | None = (
        None  # (4 (raster + 1), D) of their distances to the input's borders
    )
    point_queries: Tensor | None = None  # (T, D) set_transformer
    points: tuple[tuple[SetBlock, SetBlock], ...] = ()  # cells to points, points to cells
    mixing: tuple[CellBlock, ...] = ()  # in which the context tokens attend to each other


def init_perceiver(cfg: ModelConfig, g: torch.Generator, query: bool = False) -> Perceiver:
    d, e = cfg.hidden, cfg.encoder
    return Perceiver(
        input_embed=normal(g, 12, d),
        output_embed=normal(g, 12 + query, d),
        cells=tuple(init_cell_block(cfg, g) for _ in range(e.layers)),
        queries=normal(g, cfg.context_tokens, d, std=1.0),
        sets=tuple(init_set_block(cfg, g) for _ in range(e.set_layers)),
        border_embed=normal(g, 4 * (cfg.raster + 1), d) if cfg.positions == "borders" else None,
    )


def aligned(p: Perceiver, cfg: ModelConfig, demos: Demos) -> tuple[Tensor, Tensor]:
    """Input and output of a demo aligned cell by cell, one token per cell: (M, D), and which may be seen; proposed (M, V)."""
    said = [F.embedding(demos.inputs, p.input_embed), F.embedding(demos.outputs, p.output_embed)]
    if p.border_embed is not None:
        said.append(codes(cfg, p.border_embed, demos.at, demos.borders))
    x, seen = (
        functools.reduce(torch.add, said) * math.sqrt(cfg.hidden / len(said)),
        (demos.inputs != 0) | (demos.outputs != 0),
    )
    turn = turn_in(cfg, position_in(cfg, demos.at), x)
    runs = runs_of(demos.cells, None if cfg.published_faults else demos.gaps)
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, turn, seen)
    return x, seen


def slot_by_slot(p: Perceiver, cfg: ModelConfig, demos: Demos) -> tuple[Tensor, Tensor]:
    x, seen = aligned(p, cfg, demos)
    return x[demos.by_slot], seen[demos.by_slot]


def in_cells(
    p: Perceiver, cfg: ModelConfig, x: Tensor, seen: Tensor, slot_cells: Sequence[int]
) -> Tensor:
    """T queries attend to all demos' cells (M, D)."""
    context = p.queries.expand(len(slot_cells), -1, -1)
    for s in p.sets:
        context = set_block(
            s, cfg, context, functools.partial(attend_cells, s, cfg, x, seen, slot_cells)
        )
    return context


def apply_perceiver(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Tensor:
    return rms(in_cells(p, cfg, *slot_by_slot(p, cfg, batch.demos), batch.demos.slot_cells))


def apply_matching(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Context:
    """The test input is read as one more demo, and T queries and each of its cells attend to all cells of all demos (after
    Vinyals et al. 2016, arXiv 1606.04080): what a cell finds there is said beside the context tokens."""
    d, t, slots, layout = (
        batch.demos,
        cfg.context_tokens,
        len(batch.cells),
        layout_of(cfg, batch.cells, batch.at.device),
    )
    x, seen = aligned(p, cfg, with_query(batch))
    shown, here = len(d.inputs), position_in(cfg, batch.at)
    to = Shown(
        x[:shown][d.by_slot],
        seen[:shown][d.by_slot],
        turn_in(cfg, position_in(cfg, d.at[d.by_slot]), x),
        d.slot_cells,
    )
    turn = turn_in(
        cfg, torch.cat((here.new_zeros(slots * t, *here.shape[1:]), here))[layout.source], x
    )
    asked = torch.cat((p.queries.repeat(slots, 1), x[shown:]))[layout.source]
    for i, s in enumerate(p.sets):
        asked = set_block(
            s, cfg, asked, functools.partial(attend_across, s, cfg, to, turn, layout.tokens)
        )
        if i < len(p.mixing):
            asked = cell_block(p.mixing[i], cfg, asked, runs_of(layout.tokens), turn, None)
    asked = rms(asked)
    tokens = asked[layout.first[:, None] + torch.arange(t, device=x.device)]
    return Context(tokens, cells=asked[layout.cells])


def init_matching(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    n = range(cfg.encoder.set_layers - 1)
    return init_perceiver(cfg, g, query=True)._replace(
        mixing=tuple(init_cell_block(cfg, g) for _ in n)
    )


def init_set_transformer(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    n = range(cfg.encoder.set_layers)
    return init_perceiver(cfg, g)._replace(
        point_queries=normal(g, cfg.context_tokens, cfg.hidden, std=1.0),
        points=tuple((init_set_block(cfg, g), init_set_block(cfg, g)) for _ in n),
        mixing=tuple(init_cell_block(cfg, g) for _ in n),
    )


def apply_set_transformer(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Tensor:
    """Cells attend to each other across demos by way of T points (Lee et al. 2019), queries to cells, context tokens to
    each other."""
    assert p.point_queries is not None
    (x, seen), slot_cells = slot_by_slot(p, cfg, batch.demos), batch.demos.slot_cells
    slots, t = len(slot_cells), cfg.context_tokens
    for gather, back in p.points:
        points = p.point_queries.expand(slots, -1, -1)
        points = set_block(
            gather, cfg, points, functools.partial(attend_cells, gather, cfg, x, seen, slot_cells)
        )
        x = set_block(back, cfg, x, functools.partial(attend_tokens, back, cfg, points, slot_cells))
    packed = in_cells(p, cfg, x, seen, slot_cells).flatten(0, 1)
    for b in p.mixing:
        packed = cell_block(b, cfg, packed, ((slots, t, False),), None, None)
    return rms(packed).unflatten(0, (slots, t))


# ---------------------------------------------------------------- the table


class Encoder(NamedTuple):
    init: Callable[[ModelConfig, torch.Generator], Any]
    apply: Callable[[Any, ModelConfig, Batch], Any]
    recur: Callable[[Any, ModelConfig, Any, Tensor], Tensor] | None = None
    variational: bool = False
    asks: bool = False  # reads the test input, too: what it says of one says nothing of another


POOL, TOKEN, SETS = (
    (embeddings, pooling),
    (embeddings, class_token),
    (seeds, some("sets", init_set_block)),
)
partial = functools.partial

ENCODERS: dict[str, Encoder] = {
    "standard": Encoder(made_of(*POOL, *SETS), apply_sets),
    "variational": Encoder(
        made_of(*POOL, *SETS, drawing, offset), partial(apply_drawn, one="tokens"), variational=True
    ),
    "lpn_standard": Encoder(made_of(*TOKEN, unfolding), apply_mean),
    "lpn_variational": Encoder(made_of(*TOKEN, drawing), apply_drawn_each, variational=True),
    "hybrid_standard": Encoder(made_of(*TOKEN, *SETS), apply_sets),
    "hybrid_variational": Encoder(
        made_of(*TOKEN, *SETS, drawing), partial(apply_drawn, one="normed"), variational=True
    ),
    "recurrent": Encoder(
        made_of(*POOL, some("sets", init_set_block), states(1)), apply_vectors, recur_sets
    ),
    "trm_style": Encoder(
        made_of(*POOL, some("level", init_cell_block), states(2)), apply_vectors, recur_cycles
    ),
    "cross_attention": Encoder(made_of(*POOL, some("mixing", init_cell_block), *SETS), apply_sets),
    "hierarchical": Encoder(
        made_of(embeddings, partial(pooling, grids=2), *SETS),
        partial(apply_sets, vectors=grid_vectors),
    ),
    "set_transformer": Encoder(init_set_transformer, apply_set_transformer),
    "perceiver": Encoder(init_perceiver, apply_perceiver),
    "matching": Encoder(init_matching, apply_matching, asks=True),
}


TABLE = Encoder(
    baselines.init_table, baselines.apply_table
)  # TRM's, in the place of one; it looks at no demo


@functools.lru_cache
def user_module(file: Path) -> Any:
    """The module in a file of the user's, imported once. Raises UserError, whatever its code raises."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"model.encoder.kind: {file}: no such module in the working directory")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"model.encoder.kind: {file}: {type(e).__name__}: {e}") from None
    return module


def lookup(kind: str) -> Encoder:
    """The encoder of that name, "my_module:colours" for the entry `colours` of the ENCODERS, or else for the variable, of
    ./my_module.py. Raises UserError on an unknown kind."""
    known = {**ENCODERS, "table": TABLE}
    module, colon, name = kind.partition(":")
    if colon and module.isidentifier():
        own = user_module(Path(f"{module}.py").absolute())
        entry = {**vars(own), **vars(own).get("ENCODERS", {})}.get(name)
        if not isinstance(entry, tuple) or not 2 <= len(entry) <= len(Encoder._fields):
            raise UserError(f"model.encoder.kind: {module}.py has no encoder {name!r}")
        return Encoder(*entry)
    if kind not in known:
        raise UserError(
            f"model.encoder.kind: unknown {kind!r}{nearest(kind, known)}; known: "
            f"{', '.join(known)}, and MODULE:NAME of MODULE.py in the working directory"
        )
    return known[kind]


def reads_demos(cfg: ModelConfig) -> bool:
    """Not so a table of tasks and the argmax-feedback TRM."""
    return cfg.encoder.kind != "table" and not cfg.feedback


# ---------------------------------------------------------------- encoder and core together


class Widened(NamedTuple):
    """An encoder whose width is not the core's."""

    own: Any
    out: Tensor  # (D of the core, D)


def own_config(cfg: ModelConfig) -> ModelConfig:
    """The config as the encoder sees it."""
    e = cfg.encoder
    width = e.width or cfg.hidden
    return msgspec.structs.replace(cfg, hidden=width, heads=max(1, width * cfg.heads // cfg.hidden))


def latent_of(cfg: ModelConfig) -> int | None:
    """Numbers that a variational encoder draws; None: it draws none."""
    return (
        cfg.encoder.latent or own_config(cfg).hidden
        if lookup(cfg.encoder.kind).variational
        else None
    )


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """All parameters, float32, drawn from the seed."""
    encoder, own = lookup(cfg.encoder.kind), own_config(cfg)
    for at, c in (("model", cfg), ("model.encoder", own)):
        if c.hidden % c.heads or c.hidden // c.heads % 4:
            raise UserError(
                f"{at}.heads: {c.heads} heads must divide a width of {c.hidden} into heads of a multiple of 4"
            )
    if encoder.variational and not cfg.encoder.kl_weight > 0:
        raise UserError(
            f"model.encoder.kl_weight: {cfg.encoder.kl_weight} must be above 0, {cfg.encoder.kind} is variational"
        )
    if (encoder.recur or encoder.asks) and cfg.encoder.cached:
        why = "goes on in every step" if encoder.recur else "says more than context tokens"
        raise UserError(f"model.encoder.cached: {cfg.encoder.kind} {why}, it cannot be read once")
    if cfg.context_tokens == 0 and not cfg.feedback:
        raise UserError("model.context_tokens: must be at least 1")
    if cfg.feedback and (cfg.context_tokens or cfg.loss != "softmax"):
        raise UserError('model.feedback: has no context: context_tokens = 0, loss = "softmax"')
    g = torch.Generator().manual_seed(seed)
    if cfg.feedback:
        return Params((), baselines.init_feedback(cfg, g))
    p = encoder.init(own, g)
    if own.hidden != cfg.hidden:
        p = Widened(p, normal(g, cfg.hidden, own.hidden))
    return Params(p, init_core(cfg, g))


def encoder_of(cfg: ModelConfig) -> Encode:
    """The config's encoder as `act_step` takes it."""
    encoder, own = lookup(cfg.encoder.kind), own_config(cfg)
    if cfg.feedback:
        return Encode(lambda p, batch: (), step=baselines.feedback_step)

    def said(p: Any, found: Tensor | Context) -> Context:
        context = found if isinstance(found, Context) else Context(found)
        if not isinstance(p, Widened):
            return context
        normed = (lambda x: x) if cfg.published_faults else rms
        cells = None if context.cells is None else normed(context.cells @ p.out.T)
        return context._replace(tokens=normed(context.tokens @ p.out.T), cells=cells)

    def read(p: Any, batch: Batch) -> Any:
        found = encoder.apply(p.own if isinstance(p, Widened) else p, own, batch)
        return found if encoder.recur else said(p, found)

    def recur(p: Any, found: Any, z_E: Tensor, begin: Tensor) -> Context:
        mine = p.own if isinstance(p, Widened) else p
        assert encoder.recur is not None
        z_E = encoder.recur(
            mine, own, found, torch.where(begin[:, None, None, None], mine.start, z_E)
        )
        return said(p, Context(z_E[:, 0], z_E=z_E))

    def keep(p: Any, found: Context, z_E: Tensor, begin: Tensor) -> Context:
        first = begin[:, None, None, None]
        kept = torch.where(first, found.tokens[:, None], z_E)
        return Context(
            kept[:, 0], None if found.kl is None else torch.where(begin, found.kl, 0.0), kept
        )

    return Encode(read, recur if encoder.recur else keep if cfg.encoder.cached else None)
