"""Layers as pure functions: norms, positions, attention over packed tokens, SwiGLU.

Axes: N tokens of all slots (packed: slot after slot), B slots, D hidden, F inner width, h heads. A run is some consecutive
slots (b) with equally many tokens (s): only attention goes run by run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Rms(torch.autograd.Function):
    """A third of the passes over memory that F.rms_norm and its backward take on CPU in bf16 (5.6 -> 2.4 ms together)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (norm.square() / x.shape[-1] + 1e-5).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,), (y, scale) = grads, ctx.saved_tensors
        along = (g * y).sum(-1, keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32)) / y.shape[-1]
        return torch.addcmul(g, y, -along.to(g.dtype)).mul_(scale)


def rms(x: Tensor) -> Tensor:
    """Root-mean-square norm without gain; the mean is taken in float32."""
    return _Rms.apply(x)


class _Gate(torch.autograd.Function):
    """silu(a) * b without a second copy of either (forward and backward of a SwiGLU layer: 43 -> 40 ms)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (a, b) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * b, a), F.silu(a).mul_(g)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # tables made while evaluating must serve training too
def waves(size: int, planes: int, device: str) -> tuple[Tensor, Tensor]:
    """cos, sin (size, planes) of positions 0..size - 1."""
    rate = 1e4 ** -(torch.arange(planes, dtype=torch.float32) / planes)
    angle = torch.arange(size)[:, None] * rate
    return angle.cos().to(device), angle.sin().to(device)


Turn = tuple[Tensor, Tensor] | None  # cos, sin (N, 2, h, head) of queries and keys; None: positions are not rotary


def turn_of(position: Tensor | None, heads: int, head: int, dtype: torch.dtype) -> Turn:
    """Rotary tables of positions (N,), or (N, 2): rows turn one half of a head's planes, columns the other.

    Attention's 1 / sqrt(head) is part of the queries' tables."""
    if position is None:
        return None
    axes = position.T if position.ndim == 2 else position[None]
    tables = waves(8192 if len(axes) == 1 else 128, head // 2 // len(axes), str(position.device))
    cos, sin = (torch.cat([t[x] for x in axes], -1) for t in tables)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    scale = torch.tensor([head**-0.5, 1.0], device=position.device)[:, None, None]
    wide = [(x[:, None, None] * scale).to(dtype).expand(-1, -1, heads, -1).contiguous() for x in (cos, sin)]
    return wide[0], wide[1]


def position_of(kind: str, at: Tensor, raster: int) -> Tensor | None:
    """Cells on the raster, at (M, 2), to rotary positions: their number in reading order (published), or row and column
    counted from 1, for context tokens stand at the origin. None: positions are not rotary."""
    if kind == "rope":
        return at[:, 0] * raster + at[:, 1]
    return at + 1 if kind in ("rope2d", "both", "borders") else None


def rotate(qk: Tensor, turn: Turn) -> Tensor:
    """(N, 2, h, head) queries and keys turned by their positions, queries scaled by 1 / sqrt(head)."""
    if turn is None:
        return qk * qk.new_tensor([qk.shape[-1] ** -0.5, 1.0])[:, None, None]
    return torch.addcmul(qk * turn[0], qk.roll(qk.shape[-1] // 2, -1), turn[1])


RUN = 512  # tokens of a run, about
SCORES = 4_000_000  # numbers in the score matrices that attention makes at once


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of scaled queries, (b, h, s, head) each; mask (b, 1, 1, s) true where a key may be seen; no key
    seen gives 0.

    On CPU plain products, a few slots at a time so that their scores stay in cache: torch's fused kernel is slower
    there in bf16, 2.5 times at 10 x 2 x 416 x 64 and 2 times at 10 x 2 x 916 x 64, forward and backward, and its
    backward 5 times at 48 x 2 x 116 x 64; in float32 it is no better.
    """
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    at_once = max(1, SCORES // (q.shape[1] * q.shape[2] * max(1, k.shape[2])))
    out = []
    for i in range(0, max(1, len(q)), at_once):
        part = slice(i, i + at_once)
        score = q[part] @ k[part].transpose(-1, -2)
        if mask is None:
            out.append(torch.softmax(score, -1) @ v[part])
        else:
            seen = mask[part]
            score = score.masked_fill(~seen, torch.finfo(score.dtype).min)
            out.append(torch.softmax(score, -1) @ (v[part] * seen.transpose(-1, -2).to(v.dtype)))
    return out[0] if len(out) == 1 else torch.cat(out)


Runs = Sequence[tuple[int, int, bool]]  # (slots, tokens of a slot, whether some may not be seen), in packed order


def runs_of(tokens: Sequence[int], masked: Sequence[int] | None = None) -> Runs:
    """Neighbours of equal size and kind together, in powers of two and few if they are large: a shape that was not seen
    before costs a kernel's compilation on CPU (bf16, every canvas new: 3.0 instead of 2.5 s a step)."""
    found: list[tuple[int, int, bool]] = []
    for (s, m), same in itertools.groupby(zip(tokens, masked or [0] * len(tokens), strict=True)):
        left, most = len(list(same)), 1 << (RUN // max(1, s)).bit_length() >> 1
        while left:
            b = min(max(1, most), 1 << left.bit_length() >> 1)
            found.append((b, s, bool(m)))
            left -= b
    return found


def self_attention(
    qkv: Tensor, o: Tensor, heads: int, x: Tensor, runs: Runs, turn: Turn, seen: Tensor | None = None, norm: bool = False
) -> Tensor:  # fmt: skip
    """(N, D): products and positions for all tokens at once, attention within each slot, run by run; seen (N,) bool; norm:
    queries and keys have rms 1 before they turn."""
    if not runs:
        return x
    d, sizes = x.shape[1], [b * s for b, s, _ in runs]
    queries_keys = (x @ qkv[: 2 * d].T).unflatten(-1, (2, heads, -1))
    queries_keys = rotate(rms(queries_keys) if norm else queries_keys, turn)
    values = (x @ qkv[2 * d :].T).unflatten(-1, (heads, -1))
    masks = None if seen is None else seen.split(sizes)
    out = []
    for i, ((b, s, masked), qk, v) in enumerate(zip(runs, queries_keys.split(sizes), values.split(sizes), strict=True)):
        q, k = qk.unflatten(0, (b, s)).permute(2, 0, 3, 1, 4)
        mask = masks[i].view(b, 1, 1, s) if masked and masks else None
        y = attention(q, k, v.unflatten(0, (b, s)).transpose(1, 2), mask)
        out.append(y.transpose(1, 2).reshape(b * s, d))
    return torch.cat(out) @ o.T


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return _Gate.apply(x @ gate.T, x @ up.T) @ down.T
