"""The recursive core and its ACT step: pure functions of parameters, config and data.

Axes: N tokens of all slots (packed: slot after slot), B slots, M cells of all canvases, T context
tokens, D hidden, F inner width, V tokens, h heads. A chunk is b slots of s tokens and m keys each.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .config import ModelConfig
from .data import Batch, ragged

Rotary = tuple[Tensor, Tensor] | None  # cos, sin (N, 2, h, head) of queries and keys
tree_map = functools.partial(tree_map_only, Tensor)  # (f, tree): f(leaf) in each leaf's place
RUN, STEP = 512, 16  # tokens or keys of a chunk, about, whose scores stay in cache; see `step_of`


def step_of(x: Tensor) -> int:
    """STEP where each new shape costs a compilation, 0 where each call costs a launch, else 1."""
    return 0 if x.device.type != "cpu" else STEP if x.dtype == torch.bfloat16 else 1


def filled(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f of rows (N, D); where shapes cost, of at most an eighth more of them, which are cut off."""
    more = -len(x) % (1 << max(0, len(x).bit_length() - 4)) if step_of(x) > 1 else 0
    y = f(torch.cat((x, x.new_zeros(more, x.shape[1]))) if more else x)
    return y[: len(x)] if more else y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(N, D) by (F, D) gives (N, F)."""
    return filled(lambda rows: rows @ weight.T, x)


class _Rms(torch.autograd.Function):
    """A third of the memory passes of F.rms_norm with its backward on CPU in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square() / x.shape[-1] + 1e-5).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,), (y, scale) = grads, ctx.saved_tensors
        wide = torch.promote_types(y.dtype, torch.float32)
        along = (g * y).sum(-1, keepdim=True, dtype=wide) / y.shape[-1]
        return torch.addcmul(g, y, -along.to(g.dtype)).mul_(scale)


def rms(x: Tensor) -> Tensor:
    """Root-mean-square norm without gain; the mean is taken in float32."""
    return _Rms.apply(x)


class _Gate(torch.autograd.Function):
    """silu(a) * b without a second copy of either."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (a, b) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * b, a), F.silu(a).mul_(g)


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """(N, D) through gate_up (2 F, D) and down (D, F)."""
    gate, up = gate_up.chunk(2)
    return filled(lambda rows: _Gate.apply(rows @ gate.T, rows @ up.T) @ down.T, x)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # tables made while evaluating must serve training too
def waves(size: int, planes: int, device: str) -> tuple[Tensor, Tensor]:
    """cos, sin (size, planes) of positions 0..size - 1."""
    angle = torch.arange(size)[:, None] * 1e4 ** -(torch.arange(planes) / planes)
    return angle.cos().to(device), angle.sin().to(device)


def position_of(kind: str, at: Tensor, raster: int) -> Tensor | None:
    """Rotary positions of cells at (M, 2) on the raster: their number in reading order (published),
    or row and column counted from 1 (context tokens are at 0, 0); None: not rotary."""
    if kind == "rope":
        return at[:, 0] * raster + at[:, 1]
    return at + 1 if kind in ("rope2d", "both") else None


def rotary_of(cfg: ModelConfig, position: Tensor | None, dtype: torch.dtype) -> Rotary:
    """Tables of positions (N,) or (N, 2): rows turn half of a head's planes, columns the rest;
    attention's 1 / sqrt(head) is in the queries' tables. None: positions are not rotary."""
    if position is None:
        return None
    heads, head = cfg.heads, cfg.hidden // cfg.heads
    axes = position.T if position.ndim == 2 else position[None]
    tables = waves(8192 if len(axes) == 1 else 128, head // 2 // len(axes), str(position.device))
    cos, sin = (torch.cat([table[x] for x in axes], -1) for table in tables)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    scale = torch.tensor([head**-0.5, 1.0], device=position.device)[:, None, None]
    cos, sin = ((x[:, None, None] * scale).to(dtype) for x in (cos, sin))
    return cos.repeat(1, 1, heads, 1), sin.repeat(1, 1, heads, 1)


def rotate(qk: Tensor, rotary: Rotary) -> Tensor:
    """(N, 2, h, head) queries and keys turned by their positions, queries scaled by head**-0.5."""
    if rotary is None:
        return qk * qk.new_tensor([qk.shape[-1] ** -0.5, 1.0])[:, None, None]
    cos, sin = rotary
    return torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is made while evaluating must serve training too
def chunks_of(slots: tuple[Any, ...], heads: int, step: int, device: str) -> list[Any]:
    """[chunks (b, s, m); moves of tokens there; of keys]: slots are filled up to multiples of step,
    few to a chunk if large, in powers of two; step 0: to the largest, in one. A move of rows (N h):
    (P,) the row in each place, any where none is; (N h,) a row's place; (P, 1) is there a row."""
    sizes = np.array(slots, np.int64).reshape(-1, 2).T
    room = -(-sizes // step) * step if step else np.full_like(sizes, sizes.max(1, keepdims=True))
    order, chunks, moves = np.lexsort(room), list[Any](), list[Any]()
    for slot, group in itertools.groupby(room.T[order].tolist()):
        n, most = len(list(group)), max(1, 1 << (RUN // max(1, *slot)).bit_length() >> 1)
        rest = [1 << i for i in range(most.bit_length()) if n % most >> i & 1]
        chunks += [(b, *slot) for b in ([most] * (n // most) + rest if step else [n])]
    slot, head = order.repeat(heads), np.tile(np.arange(heads), len(order))
    for size, each in zip(sizes, room[:, slot], strict=True):
        unit = np.arange(len(slot)).repeat(each)
        at = np.arange(len(unit)) - (each.cumsum() - each)[unit]
        real = at < size[slot][unit]
        row = np.where(real, ((size.cumsum() - size)[slot][unit] + at) * heads + head[unit], 0)
        move = row, real.nonzero()[0][row[real].argsort()], real[:, None]
        moves.append([torch.from_numpy(x).to(device) for x in move])
    return [chunks, *moves]


class _Moved(torch.autograd.Function):
    """x[there], whose gradient is read at `back` (0 where that is not real) instead of added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, real)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back, real = ctx.saved_tensors
        g = grads[0].index_select(0, back)
        return g if real is None else g.mul_(real), None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Of scaled queries, (b h, s, head) each; bias (b h, m, 1) of keys, (b h, m, 0): none."""
    if q.device.type != "cpu":  # a third as fast on CPU
        q, k, v, mask = (x[None] for x in (q, k, v, bias.mT))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)[0]
    score = q.bmm(k.mT).add_(bias.mT) if bias.numel() else q.bmm(k.mT)
    return torch.softmax(score, -1).bmm(v)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], keys: Sequence[int], seen: Tensor | None
) -> Tensor:
    """(N, D): scaled queries (N, h, head) of each slot attend to its keys and values (M, h, head),
    of those that are seen (M,). To have no key gives 0."""
    h, step, slots = q.shape[1], step_of(q), tuple(zip(sizes, keys, strict=True))
    chunks, (row, place, token), move = chunks_of(slots, h, step, str(q.device))
    q = _Moved.apply(q.flatten(0, 1), row, place, None)
    k, v = (_Moved.apply(x.flatten(0, 1), *move[:2], None) for x in (k, v))
    real, bias = move[2], v[:, :0]
    if seen is not None or step != 1:  # else all are real and seen
        real = real if seen is None else real & seen.repeat_interleave(h)[move[0], None]
        v, bias = v * real, torch.where(real, 0.0, -1e30).to(q.dtype)
    lengths, out = [b * h * m for b, _, m in chunks], [v[:0]]
    parts = q.split([b * h * s for b, s, _ in chunks]), *(x.split(lengths) for x in (k, v, bias))
    for (b, _, _), *rows in zip(chunks, *parts, strict=True):
        out.append(attention(*(x.unflatten(0, (b * h, -1)) for x in rows)).flatten(0, 1))
    return rearrange(_Moved.apply(torch.cat(out), place, row, token), "(n h) d -> n (h d)", h=h)


def self_attention(
    p: Any, heads: int, x: Tensor, sizes: Sequence[int], rotary: Rotary, seen: Tensor | None = None
) -> Tensor:
    """Tokens (N, D) of each slot attend to each other, see `attend`; p: a block with qkv and o."""
    d = x.shape[1]
    q, k = rotate(linear(x, p.qkv[: 2 * d]).unflatten(-1, (2, heads, -1)), rotary).unbind(1)
    v = linear(x, p.qkv[2 * d :]).unflatten(-1, (heads, -1))
    return linear(attend(q, k, v, sizes, sizes, seen), p.o)


# ---------------------------------------------------------------- parameters


class Block(NamedTuple):
    qkv: Tensor  # (3 D, D)
    o: Tensor  # (D, D)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)


class Core(NamedTuple):
    embed: Tensor  # (V, D)
    blocks: tuple[Block, ...]  # shared by the L and the H update
    head: Tensor | None  # (V, D), None when tied to embed
    q_weight: Tensor  # (2, D) halt, continue (published, unused)
    q_bias: Tensor  # (2,)
    H_init: Tensor  # (D,) drawn, not trained unless a config unfreezes it
    L_init: Tensor  # (D,)
    context_gain: Tensor | None  # (D,), None: the published scale, sqrt(D)
    position: Tensor | None  # (T + raster**2, D) learned codes
    offer_head: Tensor | None = None  # (K + h, D) of what an encoder offers, see `mixed`


class Params(NamedTuple):
    encoder: Any
    core: Any  # Core, or what the argmax-feedback TRM has in its place


def normal(g: torch.Generator, *shape: int, std: float | None = None) -> Tensor:
    """Truncated normal (+-2 sigma) of the given std after truncation, by default fan_in**-0.5."""
    bound = math.erf(2 / math.sqrt(2))  # cut: std of a standard normal cut at +-2
    cut = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * bound))
    uniform = torch.rand(shape, generator=g) * 2 - 1
    return torch.erfinv(uniform * bound) * (math.sqrt(2) * (std or 1 / math.sqrt(shape[-1])) / cut)


def inner_width(hidden: int, expansion: float) -> int:
    """Two thirds of expansion * hidden, rounded up to 256 as published."""
    return -(-round(expansion * hidden * 2 / 3) // 256) * 256


def init_block(cfg: ModelConfig, g: torch.Generator) -> Block:
    """The matrices of one block."""
    d, f = cfg.hidden, inner_width(cfg.hidden, cfg.expansion)
    return Block(normal(g, 3 * d, d), normal(g, d, d), normal(g, 2 * f, d), normal(g, d, f))


def init_core(cfg: ModelConfig, g: torch.Generator, offers: int = 0) -> Core:
    """The parameters of the core, whose encoder offers so many tokens for each cell."""
    d, places = cfg.hidden, cfg.context_tokens + cfg.raster**2
    return Core(
        embed=normal(g, 12, d),
        blocks=tuple(init_block(cfg, g) for _ in range(cfg.layers)),
        head=None if cfg.tied_head else normal(g, 12, d),
        q_weight=torch.zeros(2, d),
        q_bias=torch.full((2,), -5.0),
        H_init=normal(g, d, std=1.0),
        L_init=normal(g, d, std=1.0),
        context_gain=None if cfg.published else torch.ones(d),
        position=normal(g, places, d) if cfg.positions in ("learned", "both") else None,
        offer_head=normal(g, offers, d) if offers else None,
    )


def leaves(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Path -> tensor of a tree of NamedTuples and tuples, in order of definition."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if tree is None or isinstance(tree, int):
        return {}
    names = getattr(tree, "_fields", range(len(tree)))
    parts = ((f"{path}.{n}" if path else str(n), x) for n, x in zip(names, tree, strict=True))
    return {k: v for name, x in parts for k, v in leaves(x, name).items()}


def rebuild(tree: Any, new: dict[str, Any]) -> Any:
    """The same tree with the leaves of `new`, which has every path of the tree."""
    values = iter([new[path] for path in leaves(tree)])
    return tree_map(lambda leaf: next(values), tree)


class Layout(NamedTuple):
    """Where the tokens of all slots lie: of each slot, its context tokens, then its cells."""

    tokens: tuple[int, ...]  # of each slot
    slot: Tensor  # (N,) whose token it is
    first: Tensor  # (B,) each slot's first context token
    cells: Tensor  # (M,) the tokens that are cells
    source: Tensor  # (N,) the token's row in (B * T context tokens, then M cells)


def layout_of(cfg: ModelConfig, cells: Sequence[int], device: torch.device) -> Layout:
    """The layout of slots with so many cells each."""
    t, b, m = cfg.context_tokens, len(cells), sum(cells)
    count = torch.tensor(cells, device=device)
    slot, number = ragged(count + t, b * t + m)
    token = torch.arange(b * t + m, device=device)
    cell = torch.arange(m, device=device) + t * (ragged(count, m)[0] + 1)
    first = (count + t).cumsum(0) - count - t
    source = torch.where(number < t, slot * t + number, b * t - t + token - slot * t)
    return Layout(tuple(t + c for c in cells), slot, first, cell, source)


class Context(NamedTuple):
    """What an encoder gives to the core."""

    tokens: Tensor  # (B, T, D)
    kl: Tensor | None = None  # (B,) float32: divergence of a variational encoder from its prior
    z_E: Tensor | None = None  # (B, S, T, D) states of a recurrent encoder
    cells: Tensor | None = None  # (M, D) of each cell of the test inputs
    seen: Tensor | None = None  # (M, K) tokens that an answer may be copied from, and
    copied: Tensor | None = None  # (M, h, V) distributions that it may be drawn from


def embed_input(
    p: Core, cfg: ModelConfig, context: Context, batch: Batch, layout: Layout
) -> tuple[Tensor, Rotary]:
    """The injected embedding (N, D) of context and cells, of std 1, and its rotary tables."""
    root, t, slots = math.sqrt(cfg.hidden), cfg.context_tokens, len(layout.tokens)
    scale = root if p.context_gain is None else p.context_gain
    cells, tokens = F.embedding(batch.inputs, p.embed) * root, context.tokens * scale
    if context.cells is not None:
        cells = math.sqrt(0.5) * (cells + context.cells * scale)
    if p.position is not None:
        tokens = math.sqrt(0.5) * (tokens + root * p.position[:t].expand(slots, -1, -1))
        place = batch.at[:, 0] * cfg.raster + batch.at[:, 1]
        cells = math.sqrt(0.5) * (cells + root * F.embedding(place, p.position[t:]))
    e = torch.cat((tokens.flatten(0, 1), cells))[layout.source]
    position = position_of(cfg.positions, batch.at, cfg.raster)
    if position is not None:
        origin = position.new_zeros(slots * t, *position.shape[1:])
        if position.ndim == 1:  # one line: context tokens, then cells
            origin, position = torch.arange(t, device=e.device).repeat(slots), position + t
        position = torch.cat((origin, position))[layout.source]
    return e, rotary_of(cfg, position, e.dtype)


def reason(
    p: Core,
    cfg: ModelConfig,
    z_H: Tensor,
    z_L: Tensor,
    e: Tensor,
    sizes: Sequence[int],
    rotary: Rotary,
) -> tuple[Tensor, Tensor]:
    """H_cycles of (L_cycles updates of z_L, one of z_H); only the last cycle has gradient."""

    def level(z: Tensor) -> Tensor:
        for b in p.blocks:  # post-norm
            z = rms(z + self_attention(b, cfg.heads, z, sizes, rotary))
            z = rms(z + swiglu(b.gate_up, b.down, z))
        return z

    def cycle(z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        injected = z_H + e
        for _ in range(cfg.L_cycles):
            z_L = level(z_L + injected)
        return level(z_H + z_L), z_L

    with torch.no_grad():
        for _ in range(cfg.H_cycles - 1):
            z_H, z_L = cycle(z_H, z_L)
    return cycle(z_H, z_L)


class Carry(NamedTuple):
    """What persists between ACT steps. The slot's episode is a pure function of (seed, slot, n)."""

    z_H: Tensor  # (N, D), detached
    z_L: Tensor  # (N, D), detached
    steps: Tensor  # (B,) ACT steps spent on the episode
    halted: Tensor  # (B,) bool: the next step starts an episode
    n: Tensor  # (B,) number of the slot's episode, from 0; -1: before the first
    z_E: Tensor  # (B, S, T, D) states of a recurrent encoder, detached; else (B, 1, 1, 1)
    tokens: tuple[int, ...]  # of each slot


def fresh_carry(
    cfg: ModelConfig, cells: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Carry:
    """The carry before the first step: all slots have halted, so that no state is ever read."""
    tokens = tuple(cfg.context_tokens + c for c in cells)
    zero = torch.zeros(len(cells), dtype=torch.int64, device=device)
    z = torch.zeros(sum(tokens), 10 if cfg.feedback else cfg.hidden, dtype=dtype, device=device)
    return Carry(z, z.clone(), zero, zero == 0, zero - 1, z.new_zeros(len(cells), 1, 1, 1), tokens)


def relaid(cfg: ModelConfig, carry: Carry, halted: Sequence[bool], cells: Sequence[int]) -> Carry:
    """The carry on the next canvases: slots that go on keep their states, others get room."""
    tokens = tuple(cfg.context_tokens + c for c in cells)

    def moved(z: Tensor) -> Tensor:
        rows = zip(halted, z.split(carry.tokens), tokens, strict=True)
        return torch.cat([z.new_zeros(n, z.shape[1]) if h else old for h, old, n in rows])

    return carry._replace(z_H=moved(carry.z_H), z_L=moved(carry.z_L), tokens=tokens)


# ---------------------------------------------------------------- the ACT step


class Encode(NamedTuple):
    """An encoder as ACT steps take it: what is read of a batch stays the same while slots think."""

    read: Callable[[Any, Batch], Any]  # parameters, batch -> Context, or what `recur` takes
    # recurrent, in every step: parameters, what was read, z_E, (B,) slots that begin
    recur: Callable[[Any, Any, Tensor, Tensor], Context] | None = None
    step: Callable[..., tuple[Carry, Output]] | None = None  # another core, without encoder


class Output(NamedTuple):
    logits: Tensor  # (M, V)
    q_halt: Tensor  # (B,) float32
    kl: Tensor | None = None  # (B,) float32, of a variational encoder
    context: Tensor | None = None  # (B, T, D), detached: for diagnostics


def sure(cfg: ModelConfig, q: Tensor) -> Tensor:
    """(B,) whether the logits q end episodes: at 0.5, in the argmax-feedback TRM from 0.9 on."""
    return q >= math.log(9) if cfg.feedback else q > 0


def halts(cfg: ModelConfig, q: Tensor, steps: Tensor, min_steps: Tensor | None) -> Tensor:
    """(B,) slots that end: at halt_max_steps or, unless fixed_steps, sure from min_steps on."""
    last = steps >= cfg.halt_max_steps
    if min_steps is None or cfg.fixed_steps:
        return last
    return (last | sure(cfg, q)) & (steps >= min_steps)


def mixed(own: Tensor, offered: Tensor, context: Context) -> Tensor:
    """(M, V) log-probabilities: a mixture of the core's own distribution and of what the encoder
    offers, by the weights of own (M, V) and offered (M, K + h) logits."""
    assert context.seen is not None and context.copied is not None
    sizes = [own.shape[1], context.seen.shape[1], context.copied.shape[1]]
    weights = torch.softmax(torch.cat((own, offered), -1).float(), -1).split(sizes, -1)
    p = weights[0].scatter_add(1, context.seen, weights[1])
    return (p + torch.einsum("mh,mhv->mv", weights[2], context.copied.float()) + 1e-6).log()


def act_step(
    params: Params,
    cfg: ModelConfig,
    encode: Encode,
    carry: Carry,
    batch: Batch,
    min_steps: Tensor | None,
    read: Any = None,
) -> tuple[Carry, Output]:
    """One ACT step of every slot; halted slots start from the initial states. Carries are detached.
    min_steps (B,): exploration, no slot halts before it (0: free); None, at evaluation: slots halt
    at halt_max_steps only. read: what encode.read gave before; by default it is read anew."""
    if encode.step:
        return encode.step(params, cfg, carry, batch, min_steps)
    p, layout = params.core, layout_of(cfg, batch.cells, carry.z_H.device)
    context = encode.read(params.encoder, batch) if read is None else read
    if encode.recur:
        context = encode.recur(params.encoder, context, carry.z_E.detach(), carry.halted)
    e, rotary = embed_input(p, cfg, context, batch, layout)
    begins = carry.halted[layout.slot][:, None]
    z_H = torch.where(begins, p.H_init, carry.z_H.detach())
    z_L = torch.where(begins, p.L_init, carry.z_L.detach())
    z_H, z_L = reason(p, cfg, z_H, z_L, e, layout.tokens, rotary)
    z = z_H[layout.cells]
    logits = z @ (p.embed if p.head is None else p.head).T
    if p.offer_head is not None:
        logits = mixed(logits, z @ p.offer_head.T, context)
    q = (z_H[layout.first] @ p.q_weight.T + p.q_bias).float()
    steps = torch.where(carry.halted, 0, carry.steps) + 1
    halted = halts(cfg, q[:, 0], steps, min_steps)
    z_E = carry.z_E if context.z_E is None else context.z_E.detach()
    new = Carry(z_H.detach(), z_L.detach(), steps, halted, carry.n, z_E, carry.tokens)
    return new, Output(logits, q[:, 0], context.kl, context.tokens.detach())


def log_prob(cfg: ModelConfig, logits: Tensor) -> Tensor:
    """Log-probabilities of tokens, in float32: shares of e^x, or of stablemax's s(x) = x + 1 for
    x >= 0, 1 / (1 - x) below (Prieto et al. 2025)."""
    x = logits.float()
    if cfg.loss == "stablemax":  # log s(x)
        x = torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))
    return torch.log_softmax(x, -1)


class Loss(NamedTuple):
    """Per slot (B,), float32; all but the total detached. Means and masks are the caller's."""

    total: Tensor  # on the graph: lm + q_weight * q + kl_weight * kl
    lm: Tensor  # mean over the slot's valid cells
    q: Tensor  # halting: binary cross-entropy against "all valid cells right"
    cell_accuracy: Tensor
    exact: Tensor  # bool
    q_right: Tensor  # bool: q >= 0 agrees with exact
    labelled: Tensor  # bool: has a valid cell at all
    kl: Tensor  # 0 where the encoder is not variational


def per_slot(x: Tensor, cells: Sequence[int]) -> Tensor:
    """(M,) to (B,): the float32 sum over each slot's cells."""
    lengths = torch.tensor(cells, device=x.device)
    return torch.segment_reduce(x.float(), "sum", lengths=lengths, unsafe=True)


def act_loss(cfg: ModelConfig, out: Output, labels: Tensor, cells: Sequence[int]) -> Loss:
    """Loss and scores of one ACT step; labels (M,), cells of each slot. A negative label is not
    asked for, nor is the mark of a grid's end where no logit stands for it."""
    valid = labels >= (2 if cfg.feedback else 0)
    ce = -log_prob(cfg, out.logits).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    asked = per_slot(valid, cells)
    hits = per_slot((out.logits.float().argmax(-1) == labels) & valid, cells)
    lm = per_slot(torch.where(valid, ce, 0.0), cells) / asked.clamp(min=1)
    exact, labelled = hits == asked, asked > 0
    q = F.binary_cross_entropy_with_logits(out.q_halt, exact.float(), reduction="none")
    q = q if cfg.published_faults else torch.where(labelled, q, 0.0)
    kl = torch.zeros_like(lm) if out.kl is None else out.kl
    kl_weight = cfg.encoder.kl_weight / (len(cells) if cfg.published_faults else 1)
    total, accuracy = lm + cfg.q_weight * q + kl_weight * kl, hits / asked.clamp(min=1)
    lm, q, kl = lm.detach(), q.detach(), kl.detach()
    q_right = ((out.q_halt >= 0) == exact) & labelled
    return Loss(total, lm, q, accuracy, exact & labelled, q_right, labelled, kl)


# ---------------------------------------------------------------- evaluation


def select_slots(
    batch: Batch, read: Any, carry: Carry, slots: Sequence[int]
) -> tuple[Batch, Any, Carry]:
    """Some slots alone, without their demos: what was read replaces these."""
    keep = torch.isin(torch.arange(len(batch.cells)), torch.tensor(slots))
    sizes = ((1,) * len(keep), batch.cells, carry.tokens)
    masks = [keep.repeat_interleave(torch.tensor(n)).to(batch.at.device) for n in sizes]

    def kept(x: Tensor) -> Tensor:
        """Rows of slots, of cells or of tokens: where two of them are equally many, they agree."""
        return x[next(mask for mask in masks if len(mask) == len(x))]

    cells, tokens = (tuple(n[i] for i in slots) for n in sizes[1:])
    fields: dict[str, Any] = {k: kept(getattr(batch, k)) for k in ("inputs", "labels", "at")}
    carry = tree_map(kept, carry)._replace(tokens=tokens)
    return batch._replace(**fields, cells=cells), tree_map(kept, read), carry


@torch.no_grad()
def think(
    params: Params,
    cfg: ModelConfig,
    encode: Encode,
    batch: Batch,
    dtype: torch.dtype,
    act_steps: int,
    leave: str = "never",
    look: Callable[[int, Sequence[int], Output], None] | None = None,
) -> tuple[Output, Tensor]:
    """Evaluation: (output, ACT steps spent (B,)) from the initial states; demos are read once.
    leave: "never" takes act_steps; "q" leaves when the halting head says so, see `sure`.
    look: sees each ACT step, the slots that took it and their output."""
    carry = fresh_carry(cfg, batch.cells, dtype, batch.inputs.device)
    read = encode.read(params.encoder, batch)
    slots = list(range(len(batch.cells)))  # those that still think
    answers: dict[int, tuple[Tensor, Tensor, int]] = {}
    for step in range(1, act_steps + 1):
        carry, out = act_step(params, cfg, encode, carry, batch, None, read)
        carry = carry._replace(halted=torch.zeros_like(carry.halted))  # until act_steps
        if look:
            look(step, slots, out)
        for slot, logits, q in zip(slots, out.logits.split(batch.cells), out.q_halt, strict=True):
            answers[slot] = (logits, q, step)
        if leave == "q":
            stay = torch.nonzero(~sure(cfg, out.q_halt)).flatten().tolist()
            if not stay:
                break
            batch, read, carry = select_slots(batch, read, carry, stay)
            slots = [slots[i] for i in stay]
    logits, q_halt, spent = zip(*(answers[i] for i in sorted(answers)), strict=True)
    return Output(torch.cat(logits), torch.stack(q_halt)), torch.tensor(spent)
