"""The demonstration encoders: a table kind -> (init, apply). To add one, write the two functions and its entry.

init(cfg, generator) -> parameters; apply(parameters, cfg, demos, slots) -> context (B, T, D) with rms 1.
Demos are ragged: groups of one canvas size, each demo with its owner (slot) and its place among the owner's demos.
Axes: n demos of one group, N demos of all groups, C side of a group's canvas, B slots, K most demos of a slot,
T context tokens, D hidden, h heads.
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
    attention,
    init_block,
    init_core,
    inner_width,
    normal,
    rms,
    rotate,
    rotation,
    split_heads,
    swiglu,
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


def cell_block(p: CellBlock, cfg: ModelConfig, x: Tensor, mask: Tensor | None, table: Any) -> Tensor:
    """(n, S, D); mask (n, S) true where a cell may be attended to."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = split_heads(x @ p.qkv.T, cfg.heads)
        y = attention(rotate(q, table), rotate(k, table), v, None if mask is None else mask[:, None, None])
        return rearrange(y, "n h s d -> n s (h d)") @ p.o.T

    x = residual(cfg, x, attend, p.scale_1)
    return residual(cfg, x, lambda x: swiglu(p.gate_up, p.down, x), p.scale_2)


def table_for(cfg: ModelConfig, canvas: int, copies: int, x: Tensor) -> Any:
    """Cells keep rotary positions in the encoder even where the core has learned ones or none, as published."""
    kind = "rope2d" if cfg.positions == "rope2d" else "rope"
    return rotation(kind, 0, canvas, cfg.raster, cfg.hidden // cfg.heads, copies, x.dtype, str(x.device))


def to_slots(x: Sequence[Tensor], demos: Sequence[Demos], slots: int, fill: float = 0.0) -> Tensor:
    """Per-demo values, group by group (n, ...), to (B, K, ...): each demo at its owner and place, `fill` elsewhere."""
    owner, place = (torch.cat([getattr(g, name) for g in demos]) for name in ("owner", "place"))
    values = torch.cat(list(x))
    out = values.new_full((slots, demos[0].most, *values.shape[1:]), fill)
    return out.index_put((owner, place), values)  # (owner, place) is unique: no accumulation, no order


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
        q, k, v = query.expand(len(x), 1, -1) @ wq.T, x @ wk.T, x @ wv.T
        q, k, v = (rearrange(t, "n s (h d) -> n h s d", h=cfg.heads) for t in (q, k, v))
        return rearrange(attention(q, k, v, mask[:, None, None]), "n h 1 d -> n (h d)") @ wo.T
    if kind == "weighted":
        weight = torch.softmax((x @ pool[0].T).squeeze(-1).float().masked_fill(~mask, -torch.inf), -1)
        return torch.einsum("ns,nsd->nd", weight.to(x.dtype), x)
    if kind == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("ns,nsd->nd", share.to(x.dtype), x)


def apply_standard(p: Standard, cfg: ModelConfig, demos: Sequence[Demos], slots: int) -> Tensor:
    """Input and output cells of a demo one after the other, pooled to a vector; T queries attend to the vectors."""
    vectors = []
    for g in demos:
        cells = torch.cat((F.embedding(g.inputs, p.input_embed), F.embedding(g.outputs, p.output_embed)), 1)
        x, mask = cells * math.sqrt(cfg.hidden), torch.cat((g.inputs, g.outputs), 1) != 0
        table = table_for(cfg, math.isqrt(g.inputs.shape[1]), 2, x)
        for b in p.cells:
            x = cell_block(b, cfg, x, None if cfg.encoder.attend_padding else mask, table)
        vectors.append(pool_cells(p.pool, cfg, x, mask) @ p.pool_proj.T)
    seen = to_slots([torch.ones_like(g.owner, dtype=torch.bool) for g in demos], demos, slots)
    each = to_slots(vectors, demos, slots)
    context = p.queries.expand(slots, -1, -1)
    for s in p.sets:
        context = set_block(s, cfg, context, functools.partial(attend_vectors, s, cfg, each, seen))
    return rms(context)


def attend_vectors(p: SetBlock, cfg: ModelConfig, each: Tensor, seen: Tensor, context: Tensor) -> Tensor:
    q, k, v = context @ p.q.T, each @ p.k.T, each @ p.v.T
    q, k, v = (rearrange(t, "b s (h d) -> b h s d", h=cfg.heads) for t in (q, k, v))
    return rearrange(attention(q, k, v, seen[:, None, None]), "b h t d -> b t (h d)")


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


def apply_perceiver(p: Perceiver, cfg: ModelConfig, demos: Sequence[Demos], slots: int) -> Tensor:
    """Input and output of a demo aligned cell by cell, one token per cell; T queries attend to all demos' tokens."""
    tokens, masks = [], []
    for g in demos:
        x = (F.embedding(g.inputs, p.input_embed) + F.embedding(g.outputs, p.output_embed)) * math.sqrt(cfg.hidden / 2)
        mask = (g.inputs != 0) | (g.outputs != 0)
        table = table_for(cfg, math.isqrt(g.inputs.shape[1]), 1, x)
        for b in p.cells:
            x = cell_block(b, cfg, x, None if cfg.encoder.attend_padding else mask, table)
        tokens.append(x)
        masks.append(mask)
    context = p.queries.expand(slots, -1, -1)
    for s in p.sets:
        context = set_block(s, cfg, context, functools.partial(attend_tokens, s, cfg, tokens, masks, demos))
    return rms(context)


def attend_tokens(
    p: SetBlock, cfg: ModelConfig, tokens: Sequence[Tensor], masks: Sequence[Tensor], demos: Sequence[Demos], context: Tensor
) -> Tensor:
    """Exact softmax over all cells of all demos of a slot, though demos lie in groups of different sizes.

    Each demo gives its running maximum, sum and weighted sum (Milakov & Gimelshein 2018), merged per slot in float32.
    """
    slots = len(context)
    q = rearrange(context @ p.q.T, "b t (h d) -> b h t d", h=cfg.heads)
    tops, sums, means = [], [], []
    for x, mask, g in zip(tokens, masks, demos, strict=True):
        k, v = (rearrange(x @ w.T, "n s (h d) -> n h s d", h=cfg.heads) for w in (p.k, p.v))
        score = (q.index_select(0, g.owner) @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        score = score.masked_fill(~mask[:, None, None], -torch.inf)
        top = score.detach().amax(-1, keepdim=True)
        weight = (score - top).exp()
        tops.append(top)
        sums.append(weight.sum(-1, keepdim=True))
        means.append((weight.to(v.dtype) @ v).float())
    top = to_slots(tops, demos, slots, -torch.inf)  # (B, K, h, T, 1)
    share = (top - top.amax(1, keepdim=True).clamp(min=-1e30)).exp()
    total = (share * to_slots(sums, demos, slots)).sum(1).clamp(min=1e-30)
    mixed = (share * to_slots(means, demos, slots)).sum(1) / total
    return rearrange(mixed, "b h t d -> b t (h d)").to(context.dtype)


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
    return lambda p, batch, slots: apply(p, cfg, batch.demos, slots)
