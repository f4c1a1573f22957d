"""Demonstration encoders: from the demos of each slot to its context.

Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden,
L latent, h heads. Packed tokens (.., D) lie slot after slot (or demo after demo), with `sizes`.
"""

from __future__ import annotations

import functools
import math
import runpy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from . import baselines, etrm
from .config import ModelConfig, UserError, nearest
from .data import Batch, Demos
from .etrm import Context, Encode, Params, Rotary, normal, rms, runs_of, swiglu

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


def layer_scale(cfg: ModelConfig) -> Tensor | None:
    """(D,) or None without."""
    scale = cfg.encoder.layer_scale
    return torch.full((cfg.hidden,), scale) if scale else None


def init_cell_block(cfg: ModelConfig, g: torch.Generator) -> CellBlock:
    """The matrices of one cell block."""
    return CellBlock(*etrm.init_block(cfg, g), *[layer_scale(cfg)] * 2)


def init_set_block(cfg: ModelConfig, g: torch.Generator) -> SetBlock:
    """The matrices of one set block."""
    d, f = cfg.hidden, etrm.inner_width(cfg.hidden, cfg.expansion)
    q, k, v, o = (normal(g, d, d) for _ in range(4))
    return SetBlock(q, k, v, o, normal(g, 2 * f, d), normal(g, d, f), *[layer_scale(cfg)] * 2)


class Packed(NamedTuple):
    """Tokens of all slots, or of all demos, one after the other."""

    x: Tensor  # (N, D)
    sizes: Sequence[int]  # of each slot
    seen: Any = None  # (N,) bool: may be attended to; None: all
    rotary: Rotary = None


def block(
    p: CellBlock | SetBlock, cfg: ModelConfig, x: Tensor, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    """Tokens (N, D) attend, then SwiGLU: each is added, scaled, with a norm before or after."""
    post = cfg.encoder.norm == "post"
    for f, scale in ((attend, p.scale_1), (partial(swiglu, p.gate_up, p.down), p.scale_2)):
        y = f(x if post else rms(x))
        x = x + (y if scale is None else scale * y)
        x = rms(x) if post else x
    return x


def cell_block(
    p: CellBlock, cfg: ModelConfig, t: Packed, masked: Sequence[int] | None = None
) -> Packed:
    """The tokens of a slot attend to each other; masked: of each, whether some are not seen."""
    runs = runs_of(t.sizes, masked or [t.seen is not None] * len(t.sizes))

    def attend(x: Tensor) -> Tensor:
        return etrm.self_attention(p.qkv, p.o, cfg.heads, x, runs, t.rotary, t.seen)

    return t._replace(x=block(p, cfg, t.x, attend))


def set_block(p: SetBlock, cfg: ModelConfig, t: Packed, keys: Packed) -> Packed:
    """The tokens of a slot attend to its keys."""

    def attend(x: Tensor) -> Tensor:
        return cross_attention((p.q, p.k, p.v), cfg.heads, t._replace(x=x), keys) @ p.o.T

    return t._replace(x=block(p, cfg, t.x, attend))


def cross_attention(weights: Sequence[Tensor], heads: int, t: Packed, keys: Packed) -> Tensor:
    """(N, D): the tokens of a slot attend to its keys, both turned by their positions, if given.

    weights (D, D) of queries, keys, values. To have no key gives 0."""

    def turned(x: Tensor, weight: Tensor, rotary: Rotary, which: int) -> Tensor:
        y = (x @ weight.T).unflatten(-1, (heads, -1))
        if rotary is None:
            return y if which else y * y.shape[-1] ** -0.5
        cos, sin = (table[:, which : which + 1] for table in rotary)
        return etrm.rotate(y[:, None], (cos, sin)).squeeze(1)

    runs, out = runs_of(t.sizes, keys.sizes), [t.x[:0]]
    lengths = [b * m for b, _, m in runs]
    parts = (
        turned(t.x, weights[0], t.rotary, 0).split([b * s for b, s, _ in runs]),
        turned(keys.x, weights[1], keys.rotary, 1).split(lengths),
        (keys.x @ weights[2].T).unflatten(-1, (heads, -1)).split(lengths),
        [None] * len(runs) if keys.seen is None else keys.seen.split(lengths),
    )
    for (b, s, m), q, k, v, seen in zip(runs, *parts, strict=True):
        q, k, v = (y.unflatten(0, (b, n)).transpose(1, 2) for y, n in ((q, s), (k, m), (v, m)))
        y = etrm.attention(q, k, v, None if seen is None else seen.view(b, 1, 1, m))
        out.append(y.transpose(1, 2).reshape(b * s, -1))
    return torch.cat(out)


def rotary_in(cfg: ModelConfig, position: Tensor, like: Tensor) -> Rotary:
    """Rotary tables of positions in the encoder, in the dtype of `like`."""
    return etrm.rotary_of(position, cfg.heads, cfg.hidden // cfg.heads, like.dtype)


def position_in(cfg: ModelConfig, at: Tensor, origins: int = 0) -> Tensor:
    """Positions of `origins` tokens at the origin, then of cells at (M, 2), which keep rotary
    positions in the encoder even where the core has none, as published."""
    kind = cfg.positions if cfg.positions in ("rope2d", "both", "borders") else "rope"
    position = etrm.position_of(kind, at, cfg.raster)
    assert position is not None
    return torch.cat((position.new_zeros(origins, *position.shape[1:]), position))


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
    kind, n, vectors = cfg.encoder.pooling, len(t.sizes), [t.x[:0]]
    if kind == "attention":
        query, q, k, v, o = p.pool
        asking = Packed(query.expand(n, -1), (1,) * n)
        return cross_attention((q, k, v), cfg.heads, asking, Packed(t.x, t.sizes, seen)) @ o.T
    runs = runs_of(t.sizes)
    lengths = [b * s for b, s, _ in runs]
    for (b, s, _), x, mask in zip(runs, t.x.split(lengths), seen.split(lengths), strict=True):
        x, mask = x.view(b, s, -1), mask.view(b, s)
        if kind == "max":
            vectors.append(x.masked_fill(~mask[..., None], -torch.inf).amax(1))
            continue
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
        if kind == "weighted":
            score = (x @ p.pool[0].T).squeeze(-1).float()
            weight = torch.softmax(score.masked_fill(~mask, -torch.inf), -1)
        vectors.append(torch.einsum("bs,bsd->bd", weight.to(x.dtype), x))
    return torch.cat(vectors)


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
    rotary, seen = rotary_in(cfg, position[order], x), seen[order]
    t = through_cells(p, cfg, Packed(x[order], sizes, seen, rotary))
    if lead:
        size = torch.tensor(sizes, dtype=torch.int64, device=x.device)
        return rms(t.x[size.cumsum(0) - size])
    return pooled(p, cfg, t, seen) @ p.pool_proj.T


def grid_vectors(p: Standard, cfg: ModelConfig, demos: Demos) -> Tensor:
    """(N, D): every grid by itself to a vector, the two of a demo to one: its rule."""
    x, seen = embedded(p, cfg, demos)
    rotary = rotary_in(cfg, position_in(cfg, demos.at.repeat(2, 1)), x)
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
    rotary = rotary_in(cfg, torch.arange(t, device=z.device).repeat(slots), z)

    def level(x: Tensor) -> Tensor:
        tokens = Packed(x, (t,) * slots, None, rotary)
        for b in p.level:
            tokens = cell_block(b, cfg, tokens)
        return tokens.x

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
    point_queries: Any = None  # (T, D) set_transformer
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


def aligned(p: Perceiver, cfg: ModelConfig, demos: Demos) -> Packed:
    """Input and output of a demo aligned, one token per cell, through the cell blocks."""
    x, parts = F.embedding(demos.inputs, p.input_embed), 2
    x = x + F.embedding(demos.outputs, p.output_embed)
    if p.border_embed is not None:
        x, parts = x + etrm.codes(cfg, p.border_embed, demos.at, demos.borders), 3
    x = x * math.sqrt(cfg.hidden / parts)
    seen = (demos.inputs != 0) | (demos.outputs != 0)
    t = Packed(x, demos.cells, seen, rotary_in(cfg, position_in(cfg, demos.at), x))
    for b in p.cells:
        if cfg.published_faults:
            t = cell_block(b, cfg, t._replace(seen=None))._replace(seen=seen)
        else:
            t = cell_block(b, cfg, t, demos.gaps)
    return t


def cells_of_slots(p: Perceiver, cfg: ModelConfig, demos: Demos) -> Packed:
    """The aligned cells of all demos of each slot, without positions."""
    t = aligned(p, cfg, demos)
    return Packed(t.x[demos.by_slot], demos.slot_cells, t.seen[demos.by_slot])


def repeated(queries: Tensor, slots: int) -> Packed:
    """The same tokens (T, D) for every slot."""
    return Packed(queries.repeat(slots, 1), (len(queries),) * slots)


def apply_perceiver(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Tensor:
    """T queries attend to all cells of all demos."""
    keys = cells_of_slots(p, cfg, batch.demos)
    t = repeated(p.queries, len(keys.sizes))
    for s in p.sets:
        t = set_block(s, cfg, t, keys)
    return rms(t.x).unflatten(0, (len(keys.sizes), -1))


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


def init_matching(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    p, n = init_perceiver(cfg, g, ASKED + 1), range(cfg.encoder.set_layers - 1)
    return p._replace(mixing=tuple(init_cell_block(cfg, g) for _ in n))


def with_queries(batch: Batch) -> Demos:
    """The cells of the demos, then those of the test inputs as if of demos whose output is asked;
    the other fields remain those of the demos."""
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
    layout = etrm.layout_of(cfg, batch.cells, batch.at.device)
    cells = aligned(p, cfg, with_queries(batch))
    shown, asked = cells.x.split((len(d.inputs), len(batch.inputs)))
    rotary = rotary_in(cfg, position_in(cfg, d.at[d.by_slot]), shown)
    keys = Packed(shown[d.by_slot], d.slot_cells, cells.seen[: len(shown)][d.by_slot], rotary)
    position = position_in(cfg, batch.at, origins=slots * t)
    rotary = rotary_in(cfg, position[layout.source], shown)
    x = torch.cat((p.queries.repeat(slots, 1), asked))[layout.source]
    tokens = Packed(x, layout.tokens, None, rotary)
    for i, s in enumerate(p.sets):
        tokens = set_block(s, cfg, tokens, keys)
        if i < len(p.mixing):
            tokens = cell_block(p.mixing[i], cfg, tokens)
    x = rms(tokens.x)
    first = layout.first[:, None] + torch.arange(t, device=x.device)
    return Context(x[first], cells=x[layout.cells])


# ---------------------------------------------------------------- the table of encoders


class Encoder(NamedTuple):
    init: Callable[[ModelConfig, torch.Generator], Any]
    apply: Callable[[Any, ModelConfig, Batch], Any]  # -> context (B, T, D) or Context
    recur: Callable[[Any, ModelConfig, Any, Tensor], Tensor] | None = None
    variational: bool = False
    asks: bool = False  # reads the test input too and gives a context of its cells


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
    "perceiver": Encoder(init_perceiver, apply_perceiver),
    "matching": Encoder(init_matching, apply_matching, asks=True),
}
TABLE = Encoder(baselines.init_table, baselines.apply_table)  # TRM's: it looks at no demo


@functools.lru_cache
def user_module(file: Path) -> dict[str, Any]:
    """The names in a Python file of the user's, run once. Raises UserError, whatever it raises."""
    if not file.is_file():
        raise UserError(f"model.encoder.kind: {file}: no such module in the working directory")
    try:
        return runpy.run_path(str(file))
    except Exception as e:
        raise UserError(f"model.encoder.kind: {file}: {type(e).__name__}: {e}") from None


def lookup(kind: str) -> Encoder:
    """The encoder of that name; "my_module:colours" is the entry `colours` of the ENCODERS, or else
    the variable, of ./my_module.py. Raises UserError on an unknown kind."""
    known = {**ENCODERS, "table": TABLE}
    module, colon, name = kind.partition(":")
    if colon and module.isidentifier():
        names = user_module(Path(f"{module}.py").absolute())
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


class Widened(NamedTuple):
    """An encoder whose width is not the core's."""

    inner: Any
    out: Tensor  # (D of the core, D)


def inner_config(cfg: ModelConfig) -> ModelConfig:
    """The config as the encoder sees it: heads of the same size in its own width. Raises UserError
    where heads do not divide a width."""
    width, head = cfg.encoder.width or cfg.hidden, cfg.hidden // cfg.heads
    if cfg.hidden % cfg.heads or head % 4:
        raise UserError(
            f"model.heads: must divide model.hidden = {cfg.hidden} into heads of a multiple of 4"
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
    return Params(p, etrm.init_core(cfg, g))


def encoder_of(cfg: ModelConfig) -> Encode:
    """The config's encoder as `act_step` takes it."""
    if cfg.feedback:
        return Encode(lambda p, batch: (), step=baselines.feedback_step)
    encoder, own_cfg = lookup(cfg.encoder.kind), inner_config(cfg)

    def inner(p: Any) -> Any:
        return p.inner if isinstance(p, Widened) else p

    def widened(p: Any, result: Tensor | Context) -> Context:
        context = result if isinstance(result, Context) else Context(result)
        if not isinstance(p, Widened):
            return context
        cells = None if context.cells is None else rms(context.cells @ p.out.T)
        return context._replace(tokens=rms(context.tokens @ p.out.T), cells=cells)

    def read(p: Any, batch: Batch) -> Any:
        result = encoder.apply(inner(p), own_cfg, batch)
        return result if encoder.recur else widened(p, result)

    def recur(p: Any, read: Any, z_E: Tensor, begins: Tensor) -> Context:
        z_E = torch.where(begins[:, None, None, None], inner(p).start, z_E)
        assert encoder.recur is not None
        z_E = encoder.recur(inner(p), own_cfg, read, z_E)
        return widened(p, Context(z_E[:, 0], z_E=z_E))

    def first_read(p: Any, read: Context, z_E: Tensor, begins: Tensor) -> Context:
        z_E = torch.where(begins[:, None, None, None], read.tokens[:, None], z_E)
        kl = None if read.kl is None else torch.where(begins, read.kl, 0.0)
        return Context(z_E[:, 0], kl, z_E)

    if encoder.recur:
        return Encode(read, recur)
    return Encode(read, first_read if cfg.encoder.cached else None)
