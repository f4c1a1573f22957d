"""Demonstration encoders: from the demos of each slot to its context.

Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden,
L latent, h heads. Packed tokens (.., D) lie slot after slot (or demo after demo), with `sizes`.
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
from torch import Tensor

from . import baselines
from .config import ModelConfig, UserError, nearest
from .data import Batch, Demos
from .etrm import (
    Context,
    Encode,
    Params,
    Rotary,
    Runs,
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
    rotary_of,
    rotate,
    runs_of,
    self_attention,
    swiglu,
)

# ---------------------------------------------------------------- blocks


class CellBlock(NamedTuple):
    """A block in which the tokens of a demo, or of a slot, attend to each other."""

    qkv: Tensor  # (3 D, D)
    o: Tensor  # (D, D)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)
    scale_1: Tensor | None  # (D,) layer scale
    scale_2: Tensor | None  # (D,)


class SetBlock(NamedTuple):
    """A block in which tokens attend to others."""

    q: Tensor  # (D, D)
    k: Tensor  # (D, D)
    v: Tensor  # (D, D)
    o: Tensor  # (D, D)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)
    scale_1: Tensor | None  # (D,)
    scale_2: Tensor | None  # (D,)


def layer_scales(cfg: ModelConfig) -> list[Tensor | None]:
    """The two layer scales of a block, None without."""
    scale = cfg.encoder.layer_scale
    return [torch.full((cfg.hidden,), scale) if scale else None for _ in range(2)]


def init_cell_block(cfg: ModelConfig, g: torch.Generator) -> CellBlock:
    """The matrices of one cell block."""
    return CellBlock(*init_block(cfg, g), *layer_scales(cfg))


def init_set_block(cfg: ModelConfig, g: torch.Generator) -> SetBlock:
    """The matrices of one set block."""
    d, f = cfg.hidden, inner_width(cfg.hidden, cfg.expansion)
    q, k, v, o = (normal(g, d, d) for _ in range(4))
    return SetBlock(q, k, v, o, normal(g, 2 * f, d), normal(g, d, f), *layer_scales(cfg))


def residual(norm: str, x: Tensor, f: Callable[[Tensor], Tensor], scale: Tensor | None) -> Tensor:
    """x + scale * f(x), normed after ("post") or before f ("pre")."""
    y = f(x if norm == "post" else rms(x))
    x = x + (y if scale is None else scale * y)
    return rms(x) if norm == "post" else x


def cell_block(
    p: CellBlock, cfg: ModelConfig, x: Tensor, runs: Runs, rotary: Rotary, seen: Tensor | None = None,
    norm: str = "",
) -> Tensor:  # fmt: skip
    """Packed tokens (M, D); seen (M,) true where a token may be attended to."""
    norm = norm or cfg.encoder.norm

    def attend(x: Tensor) -> Tensor:
        return self_attention(p.qkv, p.o, cfg.heads, x, runs, rotary, seen)

    x = residual(norm, x, attend, p.scale_1)
    return residual(norm, x, functools.partial(swiglu, p.gate_up, p.down), p.scale_2)


class Keys(NamedTuple):
    """Packed tokens that those of the same slot attend to."""

    x: Tensor  # (M, D)
    sizes: Sequence[int]  # of each slot
    seen: Tensor | None = None  # (M,) bool, by default all
    rotary: Rotary = None


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, cfg: ModelConfig, x: Tensor, sizes: Sequence[int], keys: Keys,
    rotary: Rotary = None,
) -> Tensor:  # fmt: skip
    """Packed tokens (N, D) attend to the keys of their slot; the positions of both turn them, if
    given. q, k, v: weights (D, D). To have no key gives 0."""

    def heads(x: Tensor, weight: Tensor, rotary: Rotary, which: int) -> Tensor:
        y = (x @ weight.T).unflatten(-1, (cfg.heads, -1))
        if rotary is None:
            return y if which else y * y.shape[-1] ** -0.5
        cos, sin = (table[:, which : which + 1] for table in rotary)
        return rotate(y[:, None], (cos, sin)).squeeze(1)

    runs, out = runs_of(sizes, keys.sizes), []
    queries = heads(x, q, rotary, 0).split([b * s for b, s, _ in runs])
    lengths = [b * m for b, _, m in runs]
    shown = heads(keys.x, k, keys.rotary, 1).split(lengths)
    values = (keys.x @ v.T).unflatten(-1, (cfg.heads, -1)).split(lengths)
    masks = [None] * len(runs) if keys.seen is None else keys.seen.split(lengths)
    for (b, s, m), qs, ks, vs, seen in zip(runs, queries, shown, values, masks, strict=True):
        parts = (y.unflatten(0, (b, n)).transpose(1, 2) for y, n in ((qs, s), (ks, m), (vs, m)))
        y = attention(*parts, None if seen is None else seen.view(b, 1, 1, m))
        out.append(y.transpose(1, 2).reshape(b * s, -1))
    return torch.cat(out) if out else x


def set_block(
    p: SetBlock,
    cfg: ModelConfig,
    x: Tensor,
    sizes: Sequence[int],
    keys: Keys,
    rotary: Rotary = None,
) -> Tensor:
    """Packed tokens (N, D) attend to the keys of their slot, then SwiGLU."""
    norm = cfg.encoder.norm

    def attend(x: Tensor) -> Tensor:
        return cross_attention(p.q, p.k, p.v, cfg, x, sizes, keys, rotary) @ p.o.T

    x = residual(norm, x, attend, p.scale_1)
    return residual(norm, x, functools.partial(swiglu, p.gate_up, p.down), p.scale_2)


# ---------------------------------------------------------------- places of cells and demos


def rotary_in(cfg: ModelConfig, position: Tensor, like: Tensor) -> Rotary:
    """Rotary tables of positions in the encoder, in the dtype of `like`."""
    return rotary_of(position, cfg.heads, cfg.hidden // cfg.heads, like.dtype)


def position_in(cfg: ModelConfig, at: Tensor) -> Tensor:
    """Cells keep rotary positions in the encoder even where the core has none, as published."""
    kind = cfg.positions if cfg.positions in ("rope2d", "both", "borders") else "rope"
    position = position_of(kind, at, cfg.raster)
    assert position is not None
    return position


def to_slots(x: Tensor, demos: Demos) -> Tensor:
    """Per-demo values (N, ...) to (B, K, ...), 0 where a slot has no such demo."""
    out = x.new_zeros((len(demos.slot_cells), demos.most, *x.shape[1:]))
    return out.index_put((demos.owner, demos.number), x)  # unique pairs: no accumulation, no order


class DemoVectors(NamedTuple):
    """One vector for each demo of each slot."""

    each: Tensor  # (B, K, ...), 0 where a slot has no such demo
    seen: Tensor  # (B, K) bool


def vectors_of(x: Tensor, demos: Demos) -> DemoVectors:
    """Per-demo values (N, ...) by slot."""
    return DemoVectors(
        to_slots(x, demos), to_slots(torch.ones_like(demos.owner, dtype=torch.bool), demos)
    )


def mean_of(v: DemoVectors) -> Tensor:
    """The mean (B, ...) of a slot's demos; 0 where it has none."""
    count = v.seen.sum(1).clamp(min=1).view(-1, *[1] * (v.each.ndim - 2))
    return v.each.sum(1) / count.to(v.each.dtype)


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
    output_embed: Tensor  # (V, D)
    cells: tuple[CellBlock, ...]
    pool: tuple[Tensor, ...] = ()  # attention: query (1, D), q, k, v, o (D, D); weighted: (1, D)
    pool_proj: Tensor | None = None  # (D, D); hierarchical (D, 2 D)
    queries: Tensor | None = None  # (T, D)
    sets: tuple[SetBlock, ...] = ()
    class_embed: Tensor | None = None  # (1, D) the token that stands for its demo
    mixing: tuple[CellBlock, ...] = ()  # in which the demos of a slot attend to each other
    latent: Latent | None = None
    up: Tensor | None = None  # (T * D, L)
    up_bias: Tensor | None = None  # (T * D,)
    start: Tensor | None = None  # (S, T, D)
    level: tuple[CellBlock, ...] = ()  # shared by both states


Part = Callable[[ModelConfig, torch.Generator], dict[str, Any]]


def made_of(*parts: Part) -> Callable[[ModelConfig, torch.Generator], Standard]:
    """The init of an encoder that has these parts, drawn in this order."""

    def init(cfg: ModelConfig, g: torch.Generator) -> Standard:
        return Standard(**{k: v for part in (embeddings, *parts) for k, v in part(cfg, g).items()})

    return init


def embeddings(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    tables = {k: normal(g, 12, cfg.hidden) for k in ("input_embed", "output_embed")}
    return {**tables, "cells": tuple(init_cell_block(cfg, g) for _ in range(cfg.encoder.layers))}


def pooling(cfg: ModelConfig, g: torch.Generator, grids: int = 1) -> dict[str, Any]:
    d, kind = cfg.hidden, cfg.encoder.pooling
    pool: tuple[Tensor, ...] = (normal(g, 1, d),) if kind == "weighted" else ()
    if kind == "attention":
        pool = (normal(g, 1, d, std=0.02), *(normal(g, d, d) for _ in range(4)))
    return {"pool": pool, "pool_proj": normal(g, d, grids * d)}


def class_token(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"class_embed": normal(g, 1, cfg.hidden, std=0.02)}


def blocks(name: str, init: Callable[[ModelConfig, torch.Generator], Any]) -> Part:
    """As many blocks as there are set layers."""
    return lambda cfg, g: {name: tuple(init(cfg, g) for _ in range(cfg.encoder.set_layers))}


def queries(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"queries": normal(g, cfg.context_tokens, cfg.hidden, std=0.02)}


def unfolding(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"up": normal(g, cfg.context_tokens * cfg.hidden, cfg.hidden)}


def offset(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    return {"up_bias": torch.zeros(cfg.context_tokens * cfg.hidden)}


def drawing(cfg: ModelConfig, g: torch.Generator) -> dict[str, Any]:
    d, n = cfg.hidden, cfg.encoder.latent or cfg.hidden
    latent = Latent(normal(g, n, d), torch.zeros(n), normal(g, n, d), torch.zeros(n))
    return {"latent": latent, "up": normal(g, cfg.context_tokens * d, n)}


def states(n: int) -> Part:
    """The initial states of a recurrent encoder."""
    return lambda cfg, g: {"start": normal(g, n, cfg.context_tokens, cfg.hidden, std=1.0)}


def pooled(p: Standard, cfg: ModelConfig, x: Tensor, seen: Tensor, sizes: Sequence[int]) -> Tensor:
    """Packed cells (M, D) to a vector (n, D) each for what has these sizes."""
    kind, n = cfg.encoder.pooling, len(sizes)
    if kind == "attention":
        query, q, k, v, o = p.pool
        keys = Keys(x, sizes, seen)
        return cross_attention(q, k, v, cfg, query.expand(n, -1), (1,) * n, keys) @ o.T
    vectors = [x[:0]]
    runs = runs_of(sizes)
    lengths = [b * s for b, s, _ in runs]
    for (b, s, _), cells, mask in zip(runs, x.split(lengths), seen.split(lengths), strict=True):
        cells, mask = cells.view(b, s, -1), mask.view(b, s)
        if kind == "max":
            vectors.append(cells.masked_fill(~mask[..., None], -torch.inf).amax(1))
            continue
        if kind == "weighted":
            score = (cells @ p.pool[0].T).squeeze(-1).float()
            weight = torch.softmax(score.masked_fill(~mask, -torch.inf), -1)
        else:
            weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
        vectors.append(torch.einsum("bs,bsd->bd", weight.to(x.dtype), cells))
    return torch.cat(vectors)


def in_pairs(demos: Demos, lead: int) -> Tensor:
    """The order of (`lead` tokens of each demo, M input cells, M output cells) demo by demo."""
    cells = torch.tensor(demos.cells, dtype=torch.int64, device=demos.at.device)
    total, ahead = len(demos.at), lead * len(demos.cells)
    owner, number = ragged(lead + 2 * cells, ahead + 2 * total)
    cell = number - lead
    is_output = (cell >= cells[owner]).long()
    index = ahead + (cells.cumsum(0) - cells)[owner] + cell + is_output * (total - cells[owner])
    return torch.where(cell < 0, owner * lead + number, index)


def pair_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): input and output of a demo as one sequence; its class token, or its cells pooled."""
    lead, n = int(p.class_embed is not None), len(demos.cells)
    x, seen = embedded(p, cfg, demos)
    below = demos.at + demos.at.new_tensor([[cfg.raster, 0]])  # the output continues the raster
    position = position_in(cfg, torch.cat((demos.at, below)))
    if p.class_embed is not None:  # at the origin, so that nothing turns it
        x, seen = torch.cat((p.class_embed.expand(n, -1), x)), torch.cat((seen.new_ones(n), seen))
        position = torch.cat((position.new_zeros(n, *position.shape[1:]), position))
    order, sizes = in_pairs(demos, lead), [lead + 2 * c for c in demos.cells]
    x, seen = x[order], seen[order]
    x = through_cells(p, cfg, x, seen, position[order], sizes, "pre" if lead else "")
    if p.class_embed is not None:
        size = torch.tensor(sizes, dtype=torch.int64, device=x.device)
        return rms(x[size.cumsum(0) - size])
    assert p.pool_proj is not None
    return pooled(p, cfg, x, seen, sizes) @ p.pool_proj.T


def grid_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): every grid by itself to a vector, the two of a demo to one: its rule."""
    assert p.pool_proj is not None
    (x, seen), sizes = embedded(p, cfg, demos), demos.cells * 2
    x = through_cells(p, cfg, x, seen, position_in(cfg, demos.at.repeat(2, 1)), sizes)
    return torch.cat(pooled(p, cfg, x, seen, sizes).chunk(2), -1) @ p.pool_proj.T


def embedded(p: Standard, cfg: ModelConfig, demos: Demos) -> tuple[Tensor, Tensor]:
    """(2 M, D) all input cells, then all output cells, and which of them are not empty."""
    x = F.embedding(demos.inputs, p.input_embed), F.embedding(demos.outputs, p.output_embed)
    return torch.cat(x) * math.sqrt(cfg.hidden), torch.cat((demos.inputs, demos.outputs)) != 0


def through_cells(
    p: Standard, cfg: ModelConfig, x: Tensor, seen: Tensor, position: Tensor, sizes: Sequence[int],
    norm: str = "",
) -> Tensor:  # fmt: skip
    """Packed cells (M, D), through the cell blocks."""
    runs = runs_of(sizes, [not cfg.published_faults] * len(sizes))
    rotary = rotary_in(cfg, position, x)
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, rotary, seen, norm)
    return x


def in_sets(p: Standard, cfg: ModelConfig, v: DemoVectors, tokens: Tensor) -> Tensor:
    """Context tokens (B, T, D) attend to the demos' vectors."""
    slots, t, _ = tokens.shape
    keys = Keys(v.each.flatten(0, 1), (v.each.shape[1],) * slots, v.seen.flatten())
    x = tokens.flatten(0, 1)
    for s in p.sets:
        x = set_block(s, cfg, x, (t,) * slots, keys)
    return x.unflatten(0, (slots, t))


Vectors = Callable[[Standard, ModelConfig, Demos], Tensor]


def apply_sets(
    p: Standard, cfg: ModelConfig, batch: Batch, vectors: Vectors = pair_vectors
) -> Tensor:
    """A vector per demo, which may attend to each other; T queries attend to them."""
    assert p.queries is not None
    v = vectors_of(vectors(p, cfg, batch.demos), batch.demos)
    slots, most, _ = v.each.shape
    for b in p.mixing:
        x = cell_block(b, cfg, v.each.flatten(0, 1), ((slots, most, 1),), None, v.seen.flatten())
        v = v._replace(each=x.unflatten(0, (slots, most)))
    return rms(in_sets(p, cfg, v, p.queries.expand(slots, -1, -1)))


def drawn(p: Latent, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """(..., D) to a latent (..., L), without noise its mean, and in float32 its divergence (...)
    from the standard normal."""
    mean = F.linear(x, p.mean, p.mean_bias)
    log_var = F.linear(x, p.log_var, p.log_var_bias).clamp(-10, 10)
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
    v = vectors_of(pair_vectors(p, cfg, batch.demos), batch.demos)
    return unfolded(p, cfg, mean_of(v))


def apply_drawn(p: Standard, cfg: ModelConfig, batch: Batch, normed: bool) -> Context:
    """One latent for all demos, drawn from the mean of the context tokens, normed or not."""
    assert p.latent is not None
    x = apply_sets(p, cfg, batch).mean(1)
    noise = None if batch.noise is None else batch.noise[:, 0]
    z, kl = drawn(p.latent, rms(x) if normed else x, noise)
    return Context(unfolded(p, cfg, z), kl)


def apply_drawn_each(p: Standard, cfg: ModelConfig, batch: Batch) -> Context:
    """A latent drawn for each demo, then their mean; the KL is the mean of the slot's demos.
    Published: each demo of the batch counts the same in it."""
    assert p.latent is not None
    d = batch.demos
    noise = None if batch.noise is None else batch.noise[d.owner, d.number]
    z, kl = drawn(p.latent, pair_vectors(p, cfg, d), noise)
    by_slot = vectors_of(kl, d)
    whole = by_slot.each.sum(1) * len(d.slot_cells) / max(1, len(d.cells))
    kl = whole if cfg.published_faults else mean_of(by_slot)
    return Context(unfolded(p, cfg, mean_of(vectors_of(z, d))), kl)


def apply_vectors(p: Standard, cfg: ModelConfig, batch: Batch) -> DemoVectors:
    """What a recurrent encoder continues from in every ACT step."""
    return vectors_of(pair_vectors(p, cfg, batch.demos), batch.demos)


def settled(cfg: ModelConfig, old: Tensor, new: Tensor) -> Tensor:
    """Published: nine tenths of the old state stay, and no gradient ever reaches the encoder."""
    return (0.9 * old + 0.1 * new).detach() if cfg.published_faults else rms(new)


def recur_sets(p: Standard, cfg: ModelConfig, read: DemoVectors, z: Tensor) -> Tensor:
    """The last step's context attends to the demos again, `H_cycles` times."""
    for _ in range(cfg.encoder.H_cycles):
        z = settled(cfg, z, in_sets(p, cfg, read, z[:, 0])[:, None])
    return z


def recur_cycles(p: Standard, cfg: ModelConfig, read: DemoVectors, z: Tensor) -> Tensor:
    """The core's recursion over the context tokens, the mean of the demos injected; every cycle has
    gradient."""
    slots, _, t, _ = z.shape
    e = mean_of(read).repeat_interleave(t, 0)
    z_H, z_L = (x.flatten(0, 1) for x in z.unbind(1))
    rotary = rotary_in(cfg, torch.arange(t, device=z.device).repeat(slots), z)
    runs = runs_of([t] * slots)

    def level(x: Tensor) -> Tensor:
        for b in p.level:
            x = cell_block(b, cfg, x, runs, rotary)
        return x

    for _ in range(cfg.encoder.H_cycles):
        for _ in range(cfg.encoder.L_cycles):
            z_L = level(z_L + z_H + e)
        z_H = level(z_H + z_L)
    return settled(cfg, z, torch.stack((z_H, z_L)).unflatten(1, (slots, t)).transpose(0, 1))


# ---------------------------------------------------------------- cell by cell: all demos' cells

ASKED = 12  # the output token of a test input that is read like a demo


class Perceiver(NamedTuple):
    input_embed: Tensor  # (V, D)
    output_embed: Tensor  # (V, D); matching: (V + 1, D)
    cells: tuple[CellBlock, ...]
    queries: Tensor  # (T, D)
    sets: tuple[SetBlock, ...]
    border_embed: Tensor | None = None  # (4 (raster + 1), D) of distances to the input's borders
    point_queries: Tensor | None = None  # (T, D) set_transformer
    points: tuple[tuple[SetBlock, SetBlock], ...] = ()  # points to cells, cells to points
    mixing: tuple[CellBlock, ...] = ()  # in which the context tokens attend to each other


def init_perceiver(cfg: ModelConfig, g: torch.Generator, output_tokens: int = 12) -> Perceiver:
    d, e = cfg.hidden, cfg.encoder
    return Perceiver(
        input_embed=normal(g, 12, d),
        output_embed=normal(g, output_tokens, d),
        cells=tuple(init_cell_block(cfg, g) for _ in range(e.layers)),
        queries=normal(g, cfg.context_tokens, d, std=1.0),
        sets=tuple(init_set_block(cfg, g) for _ in range(e.set_layers)),
        border_embed=normal(g, 4 * (cfg.raster + 1), d) if cfg.positions == "borders" else None,
    )


def aligned(p: Perceiver, cfg: ModelConfig, demos: Demos) -> tuple[Tensor, Tensor]:
    """One token (M, D) per cell of input and output aligned, and which are not empty."""
    x, parts = F.embedding(demos.inputs, p.input_embed), 2
    x = x + F.embedding(demos.outputs, p.output_embed)
    if p.border_embed is not None:
        x, parts = x + codes(cfg, p.border_embed, demos.at, demos.borders), 3
    x = x * math.sqrt(cfg.hidden / parts)
    seen = (demos.inputs != 0) | (demos.outputs != 0)
    rotary = rotary_in(cfg, position_in(cfg, demos.at), x)
    runs = runs_of(demos.cells, None if cfg.published_faults else demos.gaps)
    for b in p.cells:
        x = cell_block(b, cfg, x, runs, rotary, seen)
    return x, seen


def apply_perceiver(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Tensor:
    """T queries attend to all cells of all demos."""
    d, t = batch.demos, cfg.context_tokens
    x, seen = aligned(p, cfg, d)
    slots, keys = len(d.slot_cells), Keys(x[d.by_slot], d.slot_cells, seen[d.by_slot])
    tokens = p.queries.repeat(slots, 1)
    for s in p.sets:
        tokens = set_block(s, cfg, tokens, (t,) * slots, keys)
    return rms(tokens).unflatten(0, (slots, t))


def init_set_transformer(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    n = range(cfg.encoder.set_layers)
    return init_perceiver(cfg, g)._replace(
        point_queries=normal(g, cfg.context_tokens, cfg.hidden, std=1.0),
        points=tuple((init_set_block(cfg, g), init_set_block(cfg, g)) for _ in n),
        mixing=tuple(init_cell_block(cfg, g) for _ in n),
    )


def apply_set_transformer(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Tensor:
    """Cells attend to each other across demos by way of T points (Lee et al. 2019), then queries to
    cells, then context tokens to each other."""
    assert p.point_queries is not None
    d, t = batch.demos, cfg.context_tokens
    x, seen = (y[d.by_slot] for y in aligned(p, cfg, d))
    slots, keys = len(d.slot_cells), Keys(x, d.slot_cells, seen)
    sizes = (t,) * slots
    for gather, back in p.points:
        points = set_block(gather, cfg, p.point_queries.repeat(slots, 1), sizes, keys)
        x = set_block(back, cfg, keys.x, d.slot_cells, Keys(points, sizes))
        keys = keys._replace(x=x)
    tokens = p.queries.repeat(slots, 1)
    for s in p.sets:
        tokens = set_block(s, cfg, tokens, sizes, keys)
    for b in p.mixing:
        tokens = cell_block(b, cfg, tokens, ((slots, t, 0),), None)
    return rms(tokens).unflatten(0, (slots, t))


def init_matching(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    p, n = init_perceiver(cfg, g, ASKED + 1), range(cfg.encoder.set_layers - 1)
    return p._replace(mixing=tuple(init_cell_block(cfg, g) for _ in n))


def with_queries(batch: Batch) -> Demos:
    """The cells of the demos, then those of the test inputs, each like a demo whose output is asked.
    Fields that are not about cells remain those of the demos."""
    d, asked = batch.demos, torch.where(batch.inputs == 0, 0, ASKED)
    return d._replace(
        inputs=torch.cat((d.inputs, batch.inputs)),
        outputs=torch.cat((d.outputs, asked)),
        at=torch.cat((d.at, batch.at)),
        cells=d.cells + batch.cells,
        gaps=d.gaps + (1,) * len(batch.cells),
        borders=torch.cat((d.borders, batch.borders)),
    )


def apply_matching(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Context:
    """T queries and each cell of the test input, read like one more demo, attend to all cells of
    all demos (after Vinyals et al. 2016, arXiv 1606.04080): the context has both."""
    d, t, slots = batch.demos, cfg.context_tokens, len(batch.cells)
    layout = layout_of(cfg, batch.cells, batch.at.device)
    x, seen = aligned(p, cfg, with_queries(batch))
    shown, asked = x.split((len(d.inputs), len(batch.inputs)))
    rotary = rotary_in(cfg, position_in(cfg, d.at[d.by_slot]), x)
    keys = Keys(shown[d.by_slot], d.slot_cells, seen[: len(shown)][d.by_slot], rotary)
    position = position_in(cfg, batch.at)
    position = torch.cat((position.new_zeros(slots * t, *position.shape[1:]), position))
    rotary = rotary_in(cfg, position[layout.source], x)
    tokens = torch.cat((p.queries.repeat(slots, 1), asked))[layout.source]
    for i, s in enumerate(p.sets):
        tokens = set_block(s, cfg, tokens, layout.tokens, keys, rotary)
        if i < len(p.mixing):
            tokens = cell_block(p.mixing[i], cfg, tokens, runs_of(layout.tokens), rotary)
    tokens = rms(tokens)
    context = tokens[layout.first[:, None] + torch.arange(t, device=x.device)]
    return Context(context, cells=tokens[layout.cells])


# ---------------------------------------------------------------- the table of encoders


class Encoder(NamedTuple):
    init: Callable[[ModelConfig, torch.Generator], Any]
    apply: Callable[[Any, ModelConfig, Batch], Any]  # -> context (B, T, D) or Context
    recur: Callable[[Any, ModelConfig, Any, Tensor], Tensor] | None = None
    variational: bool = False
    asks: bool = False  # reads the test input too and gives a context of its cells


SETS = (queries, blocks("sets", init_set_block))
GRIDS = functools.partial(pooling, grids=2)

ENCODERS: dict[str, Encoder] = {
    "standard": Encoder(made_of(pooling, *SETS), apply_sets),
    "variational": Encoder(
        made_of(pooling, *SETS, drawing, offset),
        functools.partial(apply_drawn, normed=False),
        variational=True,
    ),
    "lpn_standard": Encoder(made_of(class_token, unfolding), apply_mean),
    "lpn_variational": Encoder(made_of(class_token, drawing), apply_drawn_each, variational=True),
    "hybrid_standard": Encoder(made_of(class_token, *SETS), apply_sets),
    "hybrid_variational": Encoder(
        made_of(class_token, *SETS, drawing),
        functools.partial(apply_drawn, normed=True),
        variational=True,
    ),
    "recurrent": Encoder(
        made_of(pooling, blocks("sets", init_set_block), states(1)), apply_vectors, recur_sets
    ),
    "trm_style": Encoder(
        made_of(pooling, blocks("level", init_cell_block), states(2)), apply_vectors, recur_cycles
    ),
    "cross_attention": Encoder(
        made_of(pooling, blocks("mixing", init_cell_block), *SETS), apply_sets
    ),
    "hierarchical": Encoder(
        made_of(GRIDS, *SETS), functools.partial(apply_sets, vectors=grid_vectors)
    ),
    "set_transformer": Encoder(init_set_transformer, apply_set_transformer),
    "perceiver": Encoder(init_perceiver, apply_perceiver),
    "matching": Encoder(init_matching, apply_matching, asks=True),
}
TABLE = Encoder(baselines.init_table, baselines.apply_table)  # TRM's: it looks at no demo


@functools.lru_cache
def user_module(file: Path) -> Any:
    """The module in a file of the user's, imported once. Raises UserError, whatever it raises."""
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
    """The encoder of that name; "my_module:colours" is the entry `colours` of the ENCODERS, or else
    the variable, of ./my_module.py. Raises UserError on an unknown kind."""
    known = {**ENCODERS, "table": TABLE}
    module, colon, name = kind.partition(":")
    if colon and module.isidentifier():
        names = vars(user_module(Path(f"{module}.py").absolute()))
        entry = {**names, **names.get("ENCODERS", {})}.get(name)
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
    """Whether the system has an encoder: neither the table of tasks nor the argmax-feedback TRM."""
    return cfg.encoder.kind != "table" and not cfg.feedback


# ---------------------------------------------------------------- encoder and core together


class Widened(NamedTuple):
    """An encoder whose width is not the core's."""

    inner: Any
    out: Tensor  # (D of the core, D)


def inner_config(cfg: ModelConfig) -> ModelConfig:
    """The config as the encoder sees it: heads of the same size in its own width."""
    width, head = cfg.encoder.width or cfg.hidden, cfg.hidden // cfg.heads
    if cfg.hidden % cfg.heads or head % 4:
        raise UserError(
            f"model.heads: {cfg.heads} heads must divide a width of {cfg.hidden} into heads of a "
            "multiple of 4"
        )
    if width % head:
        raise UserError(f"model.encoder.width: {width} is no multiple of the head size, {head}")
    return msgspec.structs.replace(cfg, hidden=width, heads=width // head)


def latent_of(cfg: ModelConfig) -> int | None:
    """How many numbers a variational encoder draws; None: it draws none."""
    if not lookup(cfg.encoder.kind).variational:
        return None
    return cfg.encoder.latent or cfg.encoder.width or cfg.hidden


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """All parameters, float32, drawn from the seed. Raises UserError where fields contradict."""
    encoder, inner, e = lookup(cfg.encoder.kind), inner_config(cfg), cfg.encoder
    if encoder.variational and not e.kl_weight > 0:
        raise UserError(f"model.encoder.kl_weight: must be above 0, {e.kind} is variational")
    if (encoder.recur or encoder.asks) and e.cached:
        why = "continues in every step" if encoder.recur else "gives more than context tokens"
        raise UserError(f"model.encoder.cached: {e.kind} {why}, it cannot be read once")
    if cfg.context_tokens == 0 and not cfg.feedback:
        raise UserError("model.context_tokens: must be at least 1")
    if cfg.feedback and (cfg.context_tokens or cfg.loss != "softmax"):
        raise UserError('model.feedback: has no context: context_tokens = 0, loss = "softmax"')
    g = torch.Generator().manual_seed(seed)
    if cfg.feedback:
        return Params((), baselines.init_feedback(cfg, g))
    p = encoder.init(inner, g)
    if inner.hidden != cfg.hidden:
        p = Widened(p, normal(g, cfg.hidden, inner.hidden))
    return Params(p, init_core(cfg, g))


def encoder_of(cfg: ModelConfig) -> Encode:
    """The config's encoder as `act_step` takes it."""
    if cfg.feedback:
        return Encode(lambda p, batch: (), step=baselines.feedback_step)
    encoder, inner_cfg = lookup(cfg.encoder.kind), inner_config(cfg)

    def inner(p: Any) -> Any:
        return p.inner if isinstance(p, Widened) else p

    def context_of(p: Any, given: Tensor | Context) -> Context:
        context = given if isinstance(given, Context) else Context(given)
        if not isinstance(p, Widened):
            return context
        cells = None if context.cells is None else rms(context.cells @ p.out.T)
        return context._replace(tokens=rms(context.tokens @ p.out.T), cells=cells)

    def read(p: Any, batch: Batch) -> Any:
        given = encoder.apply(inner(p), inner_cfg, batch)
        return given if encoder.recur else context_of(p, given)

    def recur(p: Any, given: Any, z_E: Tensor, begins: Tensor) -> Context:
        assert encoder.recur is not None
        z_E = torch.where(begins[:, None, None, None], inner(p).start, z_E)
        z_E = encoder.recur(inner(p), inner_cfg, given, z_E)
        return context_of(p, Context(z_E[:, 0], z_E=z_E))

    def first_read(p: Any, context: Context, z_E: Tensor, begins: Tensor) -> Context:
        z_E = torch.where(begins[:, None, None, None], context.tokens[:, None], z_E)
        kl = None if context.kl is None else torch.where(begins, context.kl, 0.0)
        return Context(z_E[:, 0], kl, z_E)

    if encoder.recur:
        return Encode(read, recur)
    return Encode(read, first_read if cfg.encoder.cached else None)
