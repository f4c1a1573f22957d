"""The published encoders: each demo becomes a vector, T context tokens come of the vectors; and the
set transformer. `encoders.lookup` loads this table by name.

Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden,
L latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import etrm
from ..config import ModelConfig
from ..data import Batch, Demos
from ..encoders import (
    CellBlock,
    Encoder,
    Packed,
    Perceiver,
    SetBlock,
    cell_block,
    cells_of_slots,
    cross_attention,
    init_cell_block,
    init_perceiver,
    init_set_block,
    position_in,
    repeated,
    set_block,
)
from ..etrm import Context, normal, rms


class DemoVectors(NamedTuple):
    """Values of the demos of each slot."""

    each: Tensor  # (B, K, ...), 0 where a slot has no such demo
    seen: Tensor  # (B, K) bool


def by_slot(x: Tensor, demos: Demos) -> DemoVectors:
    """Per-demo values (N, ...) by slot."""
    size, index = (len(demos.slot_cells), demos.most), (demos.owner, demos.number)
    each = x.new_zeros(*size, *x.shape[1:]).index_put(index, x)  # unique: nothing to accumulate
    seen = torch.zeros(size, dtype=torch.bool, device=x.device)
    return DemoVectors(each, seen.index_put(index, seen.new_ones(())))


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
    """The parts that the published encoders are made of; None or () where one does without
    (typed Any, for an encoder knows which it has)."""

    input_embed: Tensor  # (V, D)
    output_embed: Tensor  # (V, D)
    cells: tuple[CellBlock, ...]
    pool: tuple[Tensor, ...] = ()  # attention: query (1, D), q, k, v, o (D, D); weighted: (1, D)
    pool_proj: Any = None  # (D, D); hierarchical (D, 2 D)
    queries: Any = None  # (T, D)
    sets: tuple[SetBlock, ...] = ()
    class_embed: Any = None  # (1, D) the token that stands for its demo
    mixing: tuple[CellBlock, ...] = ()  # in which the demos of a slot attend to each other
    latent: Any = None  # Latent
    up: Any = None  # (T * D, L)
    up_bias: Any = None  # (T * D,)
    start: Any = None  # (S, T, D)
    level: tuple[CellBlock, ...] = ()  # shared by both states


def init_standard(cfg: ModelConfig, g: torch.Generator, parts: Sequence[str]) -> Standard:
    """The published encoder that has these parts, beside embeddings and cell blocks."""
    d, t, e = cfg.hidden, cfg.context_tokens, cfg.encoder
    p: dict[str, Any] = {k: normal(g, 12, d) for k in ("input_embed", "output_embed")}
    p["cells"] = tuple(init_cell_block(cfg, g) for _ in range(e.layers))
    for part in parts:
        if part in ("pool", "pool_grids"):
            if e.pooling == "attention":
                p["pool"] = (normal(g, 1, d, std=0.02), *(normal(g, d, d) for _ in range(4)))
            elif e.pooling == "weighted":
                p["pool"] = (normal(g, 1, d),)
            p["pool_proj"] = normal(g, d, d * (1 + (part == "pool_grids")))
        elif part in ("class_embed", "queries"):
            p[part] = normal(g, t if part == "queries" else 1, d, std=0.02)
        elif part in ("sets", "mixing", "level"):
            init = init_set_block if part == "sets" else init_cell_block
            p[part] = tuple(init(cfg, g) for _ in range(e.set_layers))
        elif part == "latent":
            n = e.latent or d
            p[part] = Latent(normal(g, n, d), torch.zeros(n), normal(g, n, d), torch.zeros(n))
            p["up"] = normal(g, t * d, n)
        elif part == "up":
            p[part] = normal(g, t * d, d)
        elif part == "up_bias":
            p[part] = torch.zeros(t * d)
        elif part in ("state", "states"):
            p["start"] = normal(g, 1 + (part == "states"), t, d, std=1.0)
    return Standard(**p)


def pooled(p: Standard, cfg: ModelConfig, t: Packed, seen: Tensor) -> Tensor:
    """A vector (n, D) for the cells of each of n demos or grids, of those that are seen (M,)."""
    kind, n = cfg.encoder.pooling, len(t.sizes)
    if kind == "attention":
        query, q, k, v, o = p.pool
        asking = Packed(query.expand(n, -1), (1,) * n)
        return cross_attention((q, k, v), cfg.heads, asking, Packed(t.x, t.sizes, seen)) @ o.T
    if n == 0:
        return t.x
    x, mask = (pad_sequence(y.split(t.sizes), batch_first=True) for y in (t.x, seen))
    if kind == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
    if kind == "weighted":
        score = (x @ p.pool[0].T).squeeze(-1).float()
        weight = torch.softmax(score.masked_fill(~mask, -torch.inf), -1)
    return torch.einsum("bs,bsd->bd", weight.to(x.dtype), x)


def in_pairs(demos: Demos, lead: int) -> Tensor:
    """The order of (`lead` tokens of each demo, M input cells, M output cells) demo by demo."""
    cells = torch.tensor(demos.cells, dtype=torch.int64, device=demos.at.device)
    total, ahead = len(demos.at), lead * len(demos.cells)
    owner, number = etrm.ragged(lead + 2 * cells, ahead + 2 * total)
    cell = number - lead
    is_output = (cell >= cells[owner]).long()
    index = ahead + (cells.cumsum(0) - cells)[owner] + cell + is_output * (total - cells[owner])
    return torch.where(cell < 0, owner * lead + number, index)


def embedded(p: Standard, cfg: ModelConfig, demos: Demos) -> tuple[Tensor, Tensor]:
    """(2 M, D) all input cells, then all output cells, and which of them are not empty."""
    x = F.embedding(demos.inputs, p.input_embed), F.embedding(demos.outputs, p.output_embed)
    return torch.cat(x) * math.sqrt(cfg.hidden), torch.cat((demos.inputs, demos.outputs)) != 0


def through_cells(p: Standard, cfg: ModelConfig, t: Packed) -> Packed:
    """The cell blocks, in which cells that are not seen attend to the others, not they to them."""
    t = t._replace(seen=None) if cfg.published_faults else t
    for b in p.cells:
        t = cell_block(b, cfg, t)
    return t


def pair_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): input and output of a demo as one sequence; its class token, or its cells pooled."""
    x, seen = embedded(p, cfg, demos)
    lead, n = int(p.class_embed is not None), len(demos.cells)
    if lead:
        x, seen = torch.cat((p.class_embed.expand(n, -1), x)), torch.cat((seen.new_ones(n), seen))
        e = msgspec.structs.replace(cfg.encoder, norm="pre")
        cfg = msgspec.structs.replace(cfg, encoder=e)
    below = demos.at + demos.at.new_tensor([[cfg.raster, 0]])  # the output continues the raster
    position = position_in(cfg, torch.cat((demos.at, below)), origins=lead * n)
    order, sizes = in_pairs(demos, lead), [lead + 2 * c for c in demos.cells]
    rotary, seen = etrm.rotary_of(cfg, position[order], x.dtype), seen[order]
    t = through_cells(p, cfg, Packed(x[order], sizes, seen, rotary))
    if lead:
        size = torch.tensor(sizes, dtype=torch.int64, device=x.device)
        return rms(t.x[size.cumsum(0) - size])
    return pooled(p, cfg, t, seen) @ p.pool_proj.T


def grid_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): every grid by itself to a vector, the two of a demo to one: its rule."""
    x, seen = embedded(p, cfg, demos)
    rotary = etrm.rotary_of(cfg, position_in(cfg, demos.at.repeat(2, 1)), x.dtype)
    t = through_cells(p, cfg, Packed(x, demos.cells * 2, seen, rotary))
    return torch.cat(pooled(p, cfg, t, seen).chunk(2), -1) @ p.pool_proj.T


def in_sets(p: Standard, cfg: ModelConfig, v: DemoVectors, tokens: Tensor) -> Tensor:
    """Context tokens (B, T, D) attend to the demos' vectors."""
    slots, most = v.seen.shape
    keys = Packed(v.each.flatten(0, 1), (most,) * slots, v.seen.flatten())
    t = Packed(tokens.flatten(0, 1), (tokens.shape[1],) * slots)
    for s in p.sets:
        t = set_block(s, cfg, t, keys)
    return t.x.view_as(tokens)


def apply_sets(
    p: Standard, cfg: ModelConfig, batch: Batch, vectors: Callable[..., Tensor] = pair_vectors
) -> Tensor:
    """A vector per demo, which may attend to each other; T queries attend to them."""
    v = by_slot(vectors(p, cfg, batch.demos), batch.demos)
    slots, most = v.seen.shape
    for b in p.mixing:
        t = cell_block(b, cfg, Packed(v.each.flatten(0, 1), (most,) * slots, v.seen.flatten()))
        v = v._replace(each=t.x.view_as(v.each))
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
    context = F.linear(z, p.up, p.up_bias).unflatten(-1, (cfg.context_tokens, -1))
    return context if cfg.published_faults else rms(context)


def apply_mean(p: Standard, cfg: ModelConfig, batch: Batch) -> Tensor:
    """The mean of the demos' vectors, unfolded to the context."""
    v = by_slot(pair_vectors(p, cfg, batch.demos), batch.demos)
    return unfolded(p, cfg, mean_of(v))


def apply_drawn(p: Standard, cfg: ModelConfig, batch: Batch, normed: bool = False) -> Context:
    """One latent for all demos, drawn from the mean of the context tokens, normed or not."""
    x = apply_sets(p, cfg, batch).mean(1)
    noise = None if batch.noise is None else batch.noise[:, 0]
    z, kl = drawn(p.latent, rms(x) if normed else x, noise)
    return Context(unfolded(p, cfg, z), kl)


def apply_drawn_each(p: Standard, cfg: ModelConfig, batch: Batch) -> Context:
    """A latent drawn for each demo, then their mean; the KL is the mean of the slot's demos.
    Published: each demo of the batch counts the same in it."""
    d = batch.demos
    noise = None if batch.noise is None else batch.noise[d.owner, d.number]
    z, kl = drawn(p.latent, pair_vectors(p, cfg, d), noise)
    kl_of = by_slot(kl, d)
    whole = kl_of.each.sum(1) * len(d.slot_cells) / max(1, len(d.cells))
    kl = whole if cfg.published_faults else mean_of(kl_of)
    return Context(unfolded(p, cfg, mean_of(by_slot(z, d))), kl)


def apply_vectors(p: Standard, cfg: ModelConfig, batch: Batch) -> DemoVectors:
    """What a recurrent encoder continues from in every ACT step."""
    return by_slot(pair_vectors(p, cfg, batch.demos), batch.demos)


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
    rotary = etrm.rotary_of(cfg, torch.arange(t, device=z.device).repeat(slots), z.dtype)

    def level(x: Tensor) -> Tensor:
        tokens = Packed(x, (t,) * slots, None, rotary)
        for b in p.level:
            tokens = cell_block(b, cfg, tokens)
        return tokens.x

    for _ in range(cfg.encoder.H_cycles):
        for _ in range(3):  # as published
            z_L = level(z_L + z_H + e)
        z_H = level(z_H + z_L)
    return settled(cfg, z, torch.stack((z_H, z_L)).unflatten(1, (slots, t)).transpose(0, 1))


# ---------------------------------------------------------------- set transformer


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
    keys = cells_of_slots(p, cfg, batch.demos)
    slots = len(keys.sizes)
    for gather, back in p.points:
        points = set_block(gather, cfg, repeated(p.point_queries, slots), keys)
        keys = set_block(back, cfg, keys, points)
    t = repeated(p.queries, slots)
    for s in p.sets:
        t = set_block(s, cfg, t, keys)
    for b in p.mixing:
        t = cell_block(b, cfg, t)
    return rms(t.x).unflatten(0, (slots, -1))


# ---------------------------------------------------------------- the table


def published(parts: str, apply: Callable[..., Any], **more: Any) -> Encoder:
    """An encoder of the published parts, drawn in this order."""
    return Encoder(partial(init_standard, parts=parts.split()), apply, **more)


apply_grids = partial(apply_sets, vectors=grid_vectors)
apply_normed = partial(apply_drawn, normed=True)

ENCODERS: dict[str, Encoder] = {
    "standard": published("pool queries sets", apply_sets),
    "variational": published("pool queries sets latent up_bias", apply_drawn, variational=True),
    "lpn_standard": published("class_embed up", apply_mean),
    "lpn_variational": published("class_embed latent", apply_drawn_each, variational=True),
    "hybrid_standard": published("class_embed queries sets", apply_sets),
    "hybrid_variational": published(
        "class_embed queries sets latent", apply_normed, variational=True
    ),
    "recurrent": published("pool sets state", apply_vectors, recur=recur_sets),
    "trm_style": published("pool level states", apply_vectors, recur=recur_cycles),
    "cross_attention": published("pool mixing queries sets", apply_sets),
    "hierarchical": published("pool_grids queries sets", apply_grids),
    "set_transformer": Encoder(init_set_transformer, apply_set_transformer),
}
