"""What encoders are built of: blocks, ways to attend, places of cells and demos.

Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .data import Batch, Demos
from .etrm import ModelConfig, init_block, inner_width, normal, ragged
from .layers import Runs, Turn, attention, position_of, rms, rotate, self_attention, swiglu, turn_of

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
    return torch.full((cfg.hidden,), cfg.encoder.layer_scale), torch.full((cfg.hidden,), cfg.encoder.layer_scale)


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


def cell_block(p: CellBlock, cfg: ModelConfig, x: Tensor, runs: Runs, turn: Turn, seen: Tensor | None, kind: str = "") -> Tensor:
    """Packed cells (M, D), each demo by itself; seen (M,) true where a cell may be attended to."""
    kind, e = kind or cfg.encoder.norm, cfg.encoder
    x = residual(kind, x, lambda x: self_attention(p.qkv, p.o, cfg.heads, x, runs, turn, seen, e.qk_norm), p.scale_1)
    return residual(kind, x, lambda x: mlp(p, x), p.scale_2)


def set_block(p: SetBlock, cfg: ModelConfig, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Tokens (..., D) attend in some way to what is not among them, then SwiGLU."""
    x = residual(cfg.encoder.norm, x, lambda x: attend(x) @ p.o.T, p.scale_1)
    return residual(cfg.encoder.norm, x, lambda x: mlp(p, x), p.scale_2)


def in_heads(cfg: ModelConfig, x: Tensor, weight: Tensor, normed: bool = True) -> Tensor:
    """(..., s, D) to (..., h, s, head): queries and keys, or values, which are never normed."""
    y = rearrange(x @ weight.T, "... s (h d) -> ... h s d", h=cfg.heads)
    return rms(y) if cfg.encoder.qk_norm and normed else y


def projected(p: SetBlock, cfg: ModelConfig, x: Tensor, of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries of x, keys and values of what it attends to."""
    q = in_heads(cfg, x, p.q) * (cfg.hidden // cfg.heads) ** -0.5
    return q, in_heads(cfg, of, p.k), in_heads(cfg, of, p.v, normed=False)


def attend_vectors(p: SetBlock, cfg: ModelConfig, each: Tensor, seen: Tensor, context: Tensor) -> Tensor:
    """Each slot's context tokens attend to the vectors (B, K, D) of its demos."""
    return rearrange(attention(*projected(p, cfg, context, each), seen[:, None, None]), "b h t d -> b t (h d)")


def attend_cells(p: SetBlock, cfg: ModelConfig, x: Tensor, seen: Tensor, cells_of: Sequence[int], context: Tensor) -> Tensor:
    """Each slot's context tokens attend to all cells (M, D), ordered by slot, of all its demos."""
    q, k, v = projected(p, cfg, context, x[None])
    masks = seen.view(1, 1, 1, -1).split(list(cells_of), 3)
    each = zip(q.split(1), k.split(list(cells_of), 2), v.split(list(cells_of), 2), masks, strict=True)
    return rearrange(torch.cat([attention(*parts) for parts in each]), "b h t d -> b t (h d)")


def attend_tokens(p: SetBlock, cfg: ModelConfig, tokens: Tensor, cells_of: Sequence[int], x: Tensor) -> Tensor:
    """All cells (M, D), ordered by slot, attend to their slot's tokens (B, t, D)."""
    q, k, v = projected(p, cfg, x[None], tokens)
    each = zip(q.split(list(cells_of), 2), k.split(1), v.split(1), strict=True)
    return rearrange(torch.cat([attention(*parts) for parts in each], 2), "1 h m d -> m (h d)")


class Shown(NamedTuple):
    """What tokens may attend to: cells of the demos, slot by slot."""

    x: Tensor  # (M, D)
    seen: Tensor  # (M,) bool
    turn: Turn
    cells_of: Sequence[int]  # of each slot


def attend_across(p: SetBlock, cfg: ModelConfig, to: Shown, turn: Turn, sizes: Sequence[int], x: Tensor) -> Tensor:
    """Packed tokens (N, D), so many of each slot, attend to what is shown to their slot; both turned by their positions."""

    def heads(x: Tensor, weight: Tensor, turn: Turn, which: int) -> Tensor:
        y = (x @ weight.T).unflatten(-1, (cfg.heads, -1))
        y = rms(y) if cfg.encoder.qk_norm else y
        assert turn is not None
        of = slice(which, which + 1)
        return rotate(y[:, None], (turn[0][:, of], turn[1][:, of])).permute(1, 2, 0, 3)

    q, k, v = heads(x, p.q, turn, 0), heads(to.x, p.k, to.turn, 1), in_heads(cfg, to.x[None], p.v, normed=False)
    cells = list(to.cells_of)
    masks = to.seen.view(1, 1, 1, -1).split(cells, 3)
    each = zip(q.split(list(sizes), 2), k.split(cells, 2), v.split(cells, 2), masks, strict=True)
    return rearrange(torch.cat([attention(*parts) for parts in each], 2), "1 h n d -> n (h d)")


# ---------------------------------------------------------------- places of cells and demos


def position_in(cfg: ModelConfig, at: Tensor) -> Tensor:
    """Cells keep rotary positions in the encoder even where the core has learned ones or none, as published."""
    found = position_of("rope2d" if cfg.positions in ("rope2d", "both", "borders") else "rope", at, cfg.raster)
    assert found is not None
    return found


def turn_in(cfg: ModelConfig, position: Tensor, like: Tensor) -> Turn:
    return turn_of(position, cfg.heads, cfg.hidden // cfg.heads, like.dtype)


def to_slots(x: Tensor, demos: Demos) -> Tensor:
    """Per-demo values (N, ...) to (B, K, ...): each demo at its owner and place, 0 elsewhere."""
    out = x.new_zeros((len(demos.cells_of), demos.most, *x.shape[1:]))
    return out.index_put((demos.owner, demos.place), x)  # (owner, place) is unique: no accumulation, no order


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
    inputs, outputs = torch.cat((d.inputs, batch.inputs)), torch.cat((d.outputs, torch.where(batch.inputs == 0, 0, ASKED)))
    of_cell = owner[ragged(torch.tensor(cells, device=owner.device), len(inputs))[0]]
    return Demos(
        inputs, outputs, torch.cat((d.at, batch.at)), cells, d.gaps + (1,) * slots, owner, torch.cat((d.place + 1, of * 0)),
        d.most + 1, torch.argsort(of_cell, stable=True), tuple(a + b for a, b in zip(d.cells_of, batch.cells, strict=True)),
        torch.cat((d.borders, batch.borders)),
    )  # fmt: skip
