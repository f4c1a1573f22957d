"""The demonstration encoders: a table kind -> (init, apply). To add one, write the two functions and its entry.

init(cfg, generator) -> parameters; apply(parameters, cfg, demos) -> context (B, T, D) with rms 1.
Demos are ragged: each has a canvas of its own size, its owner (slot) and its place among the owner's demos.
Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden, h heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .data import Demos, UserError, nearest
from .etrm import (
    Encode,
    ModelConfig,
    Params,
    Runs,
    Turn,
    attention,
    init_block,
    init_core,
    inner_width,
    normal,
    position_of,
    ragged,
    rms,
    runs_of,
    self_attention,
    swiglu,
    turn_of,
)


class CellBlock(NamedTuple):
    """A block over the cells of one demo."""

    qkv: Tensor  # (3 D, D)
    o: Tensor  # (D, D)
    gate_up: Tensor  # (2 F, D)
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
    return torch.full((cfg.hidden,), cfg.encoder.layer_scale), torch.full((cfg.hidden,), cfg.encoder.layer_scale)


def init_cell_block(cfg: ModelConfig, g: torch.Generator) -> CellBlock:
    return CellBlock(*init_block(cfg, g), *_scales(cfg))


def init_set_block(cfg: ModelConfig, g: torch.Generator) -> SetBlock:
    d, f = cfg.hidden, inner_width(cfg.hidden, cfg.expansion)
    q, k, v, o = (normal(g, d, d) for _ in range(4))
    return SetBlock(q, k, v, o, normal(g, 2 * f, d), normal(g, d, f), *_scales(cfg))


def residual(cfg: ModelConfig, x: Tensor, f: Callable[[Tensor], Tensor], scale: Tensor | None) -> Tensor:
    """x + scale * f(x), normed after (post) or before f (pre)."""
    pre = cfg.encoder.norm == "pre"
    y = f(rms(x) if pre else x)
    x = x + (y if scale is None else scale * y)
    return x if pre else rms(x)


def cell_block(p: CellBlock, cfg: ModelConfig, x: Tensor, runs: Runs, turn: Turn, seen: Tensor) -> Tensor:
    """Packed cells (M, D), each demo by itself; seen (M,) true where a cell may be attended to."""
    x = residual(cfg, x, lambda x: self_attention(p.qkv, p.o, cfg.heads, x, runs, turn, seen), p.scale_1)
    return residual(cfg, x, lambda x: swiglu(p.gate_up, p.down, x), p.scale_2)


def position_in(cfg: ModelConfig, at: Tensor) -> Tensor:
    """Cells keep rotary positions in the encoder even where the core has learned ones or none, as published."""
    found = position_of("rope2d" if cfg.positions == "rope2d" else "rope", at, cfg.raster)
    assert found is not None
    return found


def to_slots(x: Tensor, demos: Demos, fill: float = 0.0) -> Tensor:
    """Per-demo values (N, ...) to (B, K, ...): each demo at its owner and place, `fill` elsewhere."""
    out = x.new_full((len(demos.cells_of), demos.most, *x.shape[1:]), fill)
    return out.index_put((demos.owner, demos.place), x)  # (owner, place) is unique: no accumulation, no order


# ---------------------------------------------------------------- standard: one vector per demo (published)


class Standard(NamedTuple):
    input_embed: Tensor  # (V, D)
    output_embed: Tensor  # (V, D)
    cells: tuple[CellBlock, ...]
    pool: tuple[Tensor, ...]  # attention: query (1, D), q, k, v, o (D, D); weighted: (1, D)
    pool_proj: Tensor  # (D, D)
    queries: Tensor  # (T, D)
    sets: tuple[SetBlock, ...]


def init_standard(cfg: ModelConfig, g: torch.Generator) -> Standard:
    d, e = cfg.hidden, cfg.encoder
    pool: tuple[Tensor, ...] = ()
    if e.pooling == "attention":
        pool = (normal(g, 1, d, std=0.02), *(normal(g, d, d) for _ in range(4)))
    elif e.pooling == "weighted":
        pool = (normal(g, 1, d),)
    return Standard(
        input_embed=normal(g, 12, d),
        output_embed=normal(g, 12, d),
        cells=tuple(init_cell_block(cfg, g) for _ in range(e.layers)),
        pool=pool,
        pool_proj=normal(g, d, d),
        queries=normal(g, cfg.context_tokens, d, std=0.02),
        sets=tuple(init_set_block(cfg, g) for _ in range(e.set_layers)),
    )


def pool_cells(pool: Sequence[Tensor], cfg: ModelConfig, x: Tensor, mask: Tensor) -> Tensor:
    """(n, S, D) to (n, D) over the cells of the mask (n, S)."""
    kind = cfg.encoder.pooling
    if kind == "attention":
        query, wq, wk, wv, wo = pool
        q, k, v = (query @ wq.T).expand(len(x), 1, -1), x @ wk.T, x @ wv.T
        q, k, v = (rearrange(t, "n s (h d) -> n h s d", h=cfg.heads) for t in (q, k, v))
        return rearrange(attention(q * q.shape[-1] ** -0.5, k, v, mask[:, None, None]), "n h 1 d -> n (h d)") @ wo.T
    if kind == "weighted":
        weight = torch.softmax((x @ pool[0].T).squeeze(-1).float().masked_fill(~mask, -torch.inf), -1)
        return torch.einsum("ns,nsd->nd", weight.to(x.dtype), x)
    if kind == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("ns,nsd->nd", share.to(x.dtype), x)


def in_pairs(demos: Demos) -> Tensor:
    """(2 M,) order of (M input cells, M output cells) in which each demo's inputs stand before its outputs."""
    cells = torch.tensor(demos.cells, dtype=torch.int64, device=demos.at.device)
    whole = len(demos.at)
    owner, place = ragged(2 * cells, 2 * whole)
    second = (place >= cells[owner]).long()
    return (cells.cumsum(0) - cells)[owner] + place + second * (whole - cells[owner])


def apply_standard(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """Input and output cells of a demo one after the other, pooled to a vector; T queries attend to the vectors."""
    order = in_pairs(demos)
    x = torch.cat((F.embedding(demos.inputs, p.input_embed), F.embedding(demos.outputs, p.output_embed)))[order]
    x, seen = x * math.sqrt(cfg.hidden), torch.cat((demos.inputs, demos.outputs))[order] != 0
    after = torch.tensor([[cfg.raster, 0]], device=demos.at.device)  # the output's grid continues the input's raster
    turn = turn_of(position_in(cfg, torch.cat((demos.at, demos.at + after)))[order], cfg.heads, cfg.hidden // cfg.heads, x.dtype)
    runs = runs_of([2 * c for c in demos.cells], [not cfg.encoder.attend_padding] * len(demos.cells))
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, turn, seen)
    cells, masks = ([*t.split([n * s for n, s, _ in runs])] if runs else [] for t in (x, seen))
    parts = zip(runs, cells, masks, strict=True)
    vectors = [pool_cells(p.pool, cfg, c.view(n, s, -1), m.view(n, s)) for (n, s, _), c, m in parts]
    each = to_slots(torch.cat([x[:0], *vectors]) @ p.pool_proj.T, demos)
    there = to_slots(torch.ones_like(demos.owner, dtype=torch.bool), demos)
    context = p.queries.expand(len(demos.cells_of), -1, -1)
    for s in p.sets:
        context = set_block(s, cfg, context, functools.partial(attend_vectors, s, cfg, each, there))
    return rms(context)


def attend_vectors(p: SetBlock, cfg: ModelConfig, each: Tensor, seen: Tensor, context: Tensor) -> Tensor:
    q, k, v = context @ p.q.T, each @ p.k.T, each @ p.v.T
    q, k, v = (rearrange(t, "b s (h d) -> b h s d", h=cfg.heads) for t in (q, k, v))
    return rearrange(attention(q * q.shape[-1] ** -0.5, k, v, seen[:, None, None]), "b h t d -> b t (h d)")


def set_block(p: SetBlock, cfg: ModelConfig, context: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, T, D): context tokens attend to the demos, each in its own way, then SwiGLU."""
    context = residual(cfg, context, lambda c: attend(c) @ p.o.T, p.scale_1)
    return residual(cfg, context, lambda c: swiglu(p.gate_up, p.down, c), p.scale_2)


# ---------------------------------------------------------------- perceiver: queries see every cell of every demo


class Perceiver(NamedTuple):
    input_embed: Tensor  # (V, D)
    output_embed: Tensor  # (V, D)
    cells: tuple[CellBlock, ...]
    queries: Tensor  # (T, D)
    sets: tuple[SetBlock, ...]


def init_perceiver(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    d, e = cfg.hidden, cfg.encoder
    return Perceiver(
        input_embed=normal(g, 12, d),
        output_embed=normal(g, 12, d),
        cells=tuple(init_cell_block(cfg, g) for _ in range(e.layers)),
        queries=normal(g, cfg.context_tokens, d, std=1.0),
        sets=tuple(init_set_block(cfg, g) for _ in range(e.set_layers)),
    )


def apply_perceiver(p: Perceiver, cfg: ModelConfig, demos: Demos) -> Tensor:
    """Input and output of a demo aligned cell by cell, one token per cell; T queries attend to all demos' tokens."""
    x = (F.embedding(demos.inputs, p.input_embed) + F.embedding(demos.outputs, p.output_embed)) * math.sqrt(cfg.hidden / 2)
    seen = (demos.inputs != 0) | (demos.outputs != 0)
    turn = turn_of(position_in(cfg, demos.at), cfg.heads, cfg.hidden // cfg.heads, x.dtype)
    runs = runs_of(demos.cells, None if cfg.encoder.attend_padding else demos.gaps)
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, turn, seen)
    x, seen = x[demos.by_slot], seen[demos.by_slot]
    context = p.queries.expand(len(demos.cells_of), -1, -1)
    for s in p.sets:
        context = set_block(s, cfg, context, functools.partial(attend_cells, s, cfg, x, seen, demos.cells_of))
    return rms(context)


def attend_cells(p: SetBlock, cfg: ModelConfig, x: Tensor, seen: Tensor, cells_of: Sequence[int], context: Tensor) -> Tensor:
    """Each slot's context tokens attend to all cells (M, D), ordered by slot, of all its demos."""
    q = rearrange(context @ p.q.T, "b t (h d) -> b h t d", h=cfg.heads)
    k, v = (rearrange(x @ w.T, "m (h d) -> 1 h m d", h=cfg.heads).split(list(cells_of), 2) for w in (p.k, p.v))
    masks = seen.view(1, 1, 1, -1).split(list(cells_of), 3)
    mixed = [attention(*each) for each in zip((q * q.shape[-1] ** -0.5).split(1), k, v, masks, strict=True)]
    return rearrange(torch.cat(mixed), "b h t d -> b t (h d)")


# ---------------------------------------------------------------- the table

ENCODERS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "standard": (init_standard, apply_standard),
    "perceiver": (init_perceiver, apply_perceiver),
}


def lookup(kind: str) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """(init, apply) of an encoder. Raises UserError on an unknown kind."""
    if kind not in ENCODERS:
        raise UserError(f"model.encoder.kind: unknown {kind!r}{nearest(kind, ENCODERS)}; known: {', '.join(ENCODERS)}")
    return ENCODERS[kind]


# ---------------------------------------------------------------- encoder and core together


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """All parameters, float32, drawn from the seed."""
    if cfg.hidden % cfg.heads or cfg.hidden // cfg.heads % 4:
        raise UserError(f"model.heads: {cfg.heads} heads must divide hidden {cfg.hidden} into heads of a multiple of 4")
    g = torch.Generator().manual_seed(seed)
    return Params(lookup(cfg.encoder.kind)[0](cfg, g), init_core(cfg, g))


def encoder_of(cfg: ModelConfig) -> Encode:
    """The config's encoder as `act_step` takes it."""
    apply = lookup(cfg.encoder.kind)[1]
    return lambda p, batch: apply(p, cfg, batch.demos)
