"""Layers as pure functions: norms, positions, attention over packed tokens, SwiGLU.

Axes: N tokens of all slots (packed: slot after slot), B slots, D hidden, F inner width, h heads. A run is some consecutive
slots (b) with equally many tokens (s): only attention goes run by run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ModelConfig
from .data import Batch


class _Rms(torch.autograd.Function):
    """A third of the passes over memory that F.rms_norm and its backward take on CPU in bf16 (5.6 -> 2.4 ms together)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(
            x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        scale = (norm.square() / x.shape[-1] + 1e-5).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (g,), (y, scale) = grads, ctx.saved_tensors
        along = (g * y).sum(
            -1, keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32)
        ) / y.shape[-1]
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


Turn = (
    tuple[Tensor, Tensor] | None
)  # cos, sin (N, 2, h, head) of queries and keys; None: positions are not rotary


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
    wide = [
        (x[:, None, None] * scale).to(dtype).expand(-1, -1, heads, -1).contiguous()
        for x in (cos, sin)
    ]
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


Runs = Sequence[
    tuple[int, int, bool]
]  # (slots, tokens of a slot, whether some may not be seen), in packed order


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
    for i, ((b, s, masked), qk, v) in enumerate(
        zip(runs, queries_keys.split(sizes), values.split(sizes), strict=True)
    ):
        q, k = qk.unflatten(0, (b, s)).permute(2, 0, 3, 1, 4)
        mask = masks[i].view(b, 1, 1, s) if masked and masks else None
        y = attention(q, k, v.unflatten(0, (b, s)).transpose(1, 2), mask)
        out.append(y.transpose(1, 2).reshape(b * s, d))
    return torch.cat(out) @ o.T


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return _Gate.apply(x @ gate.T, x @ up.T) @ down.T


# ---------------------------------------------------------------- etrm


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
    q_weight: Tensor  # (2, D) halt, continue
    q_bias: Tensor  # (2,)
    H_init: Tensor  # (D,) drawn, not trained unless a config unfreezes it
    L_init: Tensor  # (D,)
    context_gain: Tensor | None  # (D,) None: published scale, sqrt(D)
    position: (
        Tensor | None
    )  # (T + raster * raster, D) learned positions, or (T + 4 (raster + 1), D): borders


class Params(NamedTuple):
    encoder: Any
    core: Any  # Core, or what a regime has in its place


def normal(g: torch.Generator, *shape: int, std: float | None = None) -> Tensor:
    """Truncated normal (+-2 sigma) with the given std after truncation, 1/sqrt(fan in) by default."""
    std = 1 / math.sqrt(shape[-1]) if std is None else std
    bound = math.erf(2 / math.sqrt(2))
    # std of a standard normal cut at +-2
    cut = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * bound))
    return torch.erfinv((torch.rand(shape, generator=g) * 2 - 1) * bound) * (
        math.sqrt(2) * std / cut
    )


def inner_width(hidden: int, expansion: float) -> int:
    """Two thirds of expansion * hidden, rounded up to 256 as published."""
    return -(-round(expansion * hidden * 2 / 3) // 256) * 256


def init_block(cfg: ModelConfig, g: torch.Generator) -> Block:
    d, f = cfg.hidden, inner_width(cfg.hidden, cfg.expansion)
    return Block(normal(g, 3 * d, d), normal(g, d, d), normal(g, 2 * f, d), normal(g, d, f))


def init_core(cfg: ModelConfig, g: torch.Generator, vocab: int = 12) -> Core:
    d, places = (
        cfg.hidden,
        {"learned": cfg.raster**2, "both": cfg.raster**2, "borders": 4 * (cfg.raster + 1)}.get(
            cfg.positions, 0
        ),
    )
    return Core(
        embed=normal(g, vocab, d),
        blocks=tuple(init_block(cfg, g) for _ in range(cfg.layers)),
        head=None if cfg.tied_head else normal(g, vocab, d),
        q_weight=torch.zeros(2, d),
        q_bias=torch.full((2,), -5.0),
        H_init=normal(g, d, std=1.0),
        L_init=normal(g, d, std=1.0),
        context_gain=None if cfg.published else torch.ones(d),
        position=normal(g, cfg.context_tokens + places, d) if places else None,
    )


def leaves(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Path -> tensor of a tree of NamedTuples, tuples and tensors, in order of definition; None and int are no leaves."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if tree is None or isinstance(tree, int):
        return {}
    names = getattr(tree, "_fields", range(len(tree)))
    return {
        k: v
        for n, sub in zip(names, tree, strict=True)
        for k, v in leaves(sub, f"{path}.{n}" if path else str(n)).items()
    }


def rebuild(tree: Any, new: dict[str, Any], path: str = "") -> Any:
    """The same tree with the leaves of `new`."""
    if isinstance(tree, Tensor):
        return new[path]
    if tree is None or isinstance(tree, int):
        return tree
    names = getattr(tree, "_fields", range(len(tree)))
    parts = [
        rebuild(s, new, f"{path}.{n}" if path else str(n)) for n, s in zip(names, tree, strict=True)
    ]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def tree_map(f: Callable[[Tensor], Any], tree: Any) -> Any:
    return rebuild(tree, {k: f(v) for k, v in leaves(tree).items()})


# ---------------------------------------------------------------- the block


def block(
    p: Block,
    heads: int,
    x: Tensor,
    runs: Runs,
    turn: Turn,
    gains: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Post-norm transformer block on packed tokens (N, D); gains (D,) of its two norms."""
    x = rms(x + self_attention(p.qkv, p.o, heads, x, runs, turn))
    x = x if gains is None else x * gains[0]
    x = rms(x + swiglu(p.gate_up, p.down, x))
    return x if gains is None else x * gains[1]


# ---------------------------------------------------------------- the recursive core


def reason(
    p: Core, cfg: ModelConfig, z_H: Tensor, z_L: Tensor, e: Tensor, runs: Runs, turn: Turn
) -> tuple[Tensor, Tensor]:
    """H_cycles of (L_cycles updates of z_L, one of z_H), all by the same blocks; only the last cycle has gradient."""

    def level(z: Tensor) -> Tensor:
        for b in p.blocks:
            z = block(b, cfg.heads, z, runs, turn)
        return z

    def cycle(z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        given = z_H + e
        for _ in range(cfg.L_cycles):
            z_L = level(z_L + given)
        return level(z_H + z_L), z_L

    with torch.no_grad():
        for _ in range(cfg.H_cycles - 1):
            z_H, z_L = cycle(z_H, z_L)
    return cycle(z_H, z_L)


def ragged(sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(total,) the owner of each place where owners of these sizes lie one after the other, and the place's number within it."""
    owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(
        sizes, output_size=total
    )
    return owner, torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes)[owner]


class Layout(NamedTuple):
    """Where the tokens of all slots lie."""

    tokens: tuple[int, ...]  # of each slot
    slot: Tensor  # (N,) whose token it is
    first: Tensor  # (B,) each slot's first context token
    cells: Tensor  # (M,) the tokens that are cells
    source: Tensor  # (N,) row in (B * T context tokens, then M cells) that stands there


def layout_of(cfg: ModelConfig, cells: Sequence[int], device: torch.device) -> Layout:
    t, b, m = cfg.context_tokens, len(cells), sum(cells)
    tokens = tuple(t + c for c in cells)
    count = torch.tensor(cells, device=device)
    slot, place = ragged(count + t, b * t + m)
    source = torch.where(
        place < t, slot * t + place, b * t - t + torch.arange(b * t + m, device=device) - slot * t
    )
    of_cell, _ = ragged(count, m)
    return Layout(
        tokens,
        slot,
        (count + t).cumsum(0) - count - t,
        torch.arange(m, device=device) + t * (of_cell + 1),
        source,
    )


def codes(cfg: ModelConfig, table: Tensor, at: Tensor, borders: Tensor) -> Tensor:
    """(M, D) learned codes of cells: of their places on the raster or, "borders", half the sum of those of their distances to
    the input's four borders, by which a mirrored place is found in a grid of any size."""
    if cfg.positions == "borders":
        return 0.5 * F.embedding(
            borders + torch.arange(4, device=at.device) * (cfg.raster + 1), table
        ).sum(1)
    return F.embedding(at[:, 0] * cfg.raster + at[:, 1], table)


def place(
    p: Core, cfg: ModelConfig, said: Context, batch: Batch, layout: Layout
) -> tuple[Tensor, Turn]:
    """Context (B, T, D) and the cells' tokens to the injected embedding (N, D), and its rotary tables; tokens enter with std 1."""
    root, t, context = math.sqrt(cfg.hidden), cfg.context_tokens, said.tokens
    scale = root if p.context_gain is None else p.context_gain
    cells = F.embedding(batch.inputs, p.embed) * root
    if said.cells is not None:
        cells = math.sqrt(0.5) * (cells + said.cells * scale)
    slots = len(layout.tokens)
    if p.position is not None:
        ours = p.position[:t].expand(slots, -1, -1)
        context = math.sqrt(0.5) * (context * scale + root * ours)
        cells = math.sqrt(0.5) * (
            cells + root * codes(cfg, p.position[t:], batch.at, batch.borders)
        )
    else:
        context = context * scale
    e = torch.cat((context.flatten(0, 1), cells))[layout.source]
    position = position_of(cfg.positions, batch.at, cfg.raster)
    if position is not None:
        start = (
            torch.arange(t, device=position.device).repeat(slots)
            if position.ndim == 1
            else position.new_zeros(slots * t, 2)
        )
        position = torch.cat((start, position + (t if position.ndim == 1 else 0)))[layout.source]
    return e, turn_of(position, cfg.heads, cfg.hidden // cfg.heads, e.dtype)


class Carry(NamedTuple):
    """What persists between ACT steps. The slot's episode is a pure function of (seed, slot, n)."""

    z_H: Tensor  # (N, D), detached
    z_L: Tensor  # (N, D), detached
    steps: Tensor  # (B,) ACT steps spent on the episode
    halted: Tensor  # (B,) bool: the next step starts an episode
    n: Tensor  # (B,) episodes the slot has finished or begun
    z_E: Tensor  # (B, S, T, D) states of a recurrent encoder, detached; (B, 1, 1, 1) where there is none
    tokens: tuple[int, ...]  # of each slot


class Output(NamedTuple):
    logits: Tensor  # (M, V)
    q_halt: Tensor  # (B,) float32
    q_continue: Tensor  # (B,) float32
    kl: Tensor | None = None  # (B,) float32, of a variational encoder
    context: Tensor | None = None  # (B, T, D), to be watched


def fresh_carry(
    cfg: ModelConfig, cells: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Carry:
    """The carry before the first step on canvases of so many cells: all halted, so that nothing in it is ever read."""
    tokens = tuple(cfg.context_tokens + c for c in cells)
    zeros = torch.zeros(len(cells), dtype=torch.int64, device=device)
    z = torch.zeros(sum(tokens), 10 if cfg.feedback else cfg.hidden, dtype=dtype, device=device)
    halted = torch.ones(len(cells), dtype=torch.bool, device=device)
    return Carry(z, z.clone(), zeros, halted, zeros - 1, z.new_zeros(len(cells), 1, 1, 1), tokens)


def relaid(cfg: ModelConfig, carry: Carry, halted: Sequence[bool], cells: Sequence[int]) -> Carry:
    """The carry on the canvases to come: slots that go on keep their states, those that halted get room."""
    tokens = tuple(cfg.context_tokens + c for c in cells)
    if tokens == carry.tokens:
        return carry
    states = []
    for z in (carry.z_H, carry.z_L):
        rows = zip(halted, z.split(carry.tokens), tokens, strict=True)
        states.append(torch.cat([z.new_zeros(n, z.shape[1]) if h else old for h, old, n in rows]))
    return carry._replace(z_H=states[0], z_L=states[1], tokens=tokens)


class Context(NamedTuple):
    """What an encoder says to the core."""

    tokens: Tensor  # (B, T, D)
    kl: Tensor | None = None  # (B,) float32: how far a variational encoder is from its prior
    z_E: Tensor | None = None  # (B, S, T, D) states of a recurrent encoder
    cells: Tensor | None = None  # (M, D) what it says of each cell of the test inputs


class Encode(NamedTuple):
    """An encoder as ACT steps take it. What is read of a batch stays the same while its slots think; a recurrent encoder goes
    on from that, and its states, in every step."""

    read: Callable[
        [Any, Batch], Any
    ]  # encoder parameters, batch -> Context, or what `recur` is given; slot by slot
    recur: Callable[[Any, Any, Tensor, Tensor], Context] | None = (
        None  # its parameters, what was read, z_E, slots that begin
    )
    step: Callable[..., tuple[Carry, Output]] | None = (
        None  # another core, as `act_step` without encoder
    )


SURE = math.log(9)  # the logit of 0.9


def sure(cfg: ModelConfig, q: Tensor) -> Tensor:
    """Whether the halting head ends a slot's thought: above 0, in the argmax-feedback TRM from 0.9 on."""
    return q >= SURE if cfg.feedback else q > 0


def halts(cfg: ModelConfig, q: Tensor, steps: Tensor, min_steps: Tensor | None) -> Tensor:
    """(B,) bool: slots that end here, by their number of steps or by q; without `min_steps`, and in FCT, never by q."""
    last = steps >= cfg.halt_max_steps
    return (
        last
        if min_steps is None or cfg.fixed_steps
        else (last | sure(cfg, q)) & (steps >= min_steps)
    )


def act_step(
    params: Params,
    cfg: ModelConfig,
    encode: Encode,
    carry: Carry,
    batch: Batch,
    min_steps: Tensor | None,
) -> tuple[Carry, Output]:
    """One ACT step of every slot; halted slots start from the initial states.

    min_steps (B,): exploration, no slot halts before it (0: free); None at evaluation: halts at halt_max_steps only.
    No gradient reaches the carry that came in; the one returned is detached.
    """
    if encode.step:
        return encode.step(params, cfg, carry, batch, min_steps)
    p, layout = params.core, layout_of(cfg, batch.cells, carry.z_H.device)
    context = encode.read(params.encoder, batch)
    if encode.recur:
        context = encode.recur(params.encoder, context, carry.z_E.detach(), carry.halted)
    e, turn = place(p, cfg, context, batch, layout)
    reset = carry.halted[layout.slot][:, None]
    z_H = torch.where(reset, p.H_init, carry.z_H.detach())
    z_L = torch.where(reset, p.L_init, carry.z_L.detach())
    z_H, z_L = reason(p, cfg, z_H, z_L, e, runs_of(layout.tokens), turn)

    z = z_H[layout.cells]
    logits = z @ (p.embed if p.head is None else p.head).T
    q = (z_H[layout.first] @ p.q_weight.T + p.q_bias).float()
    steps = torch.where(carry.halted, 0, carry.steps) + 1
    halted = halts(cfg, q[:, 0], steps, min_steps)
    z_E = carry.z_E if context.z_E is None else context.z_E.detach()
    new = Carry(z_H.detach(), z_L.detach(), steps, halted, carry.n, z_E, carry.tokens)
    return new, Output(logits, q[:, 0], q[:, 1], context.kl, context.tokens.detach())


# ---------------------------------------------------------------- the ACT loss


def log_stable(x: Tensor) -> Tensor:
    """log s(x) with s(x) = x + 1 for x >= 0, 1 / (1 - x) below (stablemax, Prieto et al. 2025), through log1p."""
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


def log_prob(cfg: ModelConfig, logits: Tensor) -> Tensor:
    """Log-probabilities of tokens, in float32."""
    x = logits.float()
    return torch.log_softmax(log_stable(x) if cfg.loss == "stablemax" else x, -1)


class Loss(NamedTuple):
    """Per slot (B,), float32 and on the graph where it says so; means and masks are the caller's."""

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
    return torch.segment_reduce(
        x.float(), "sum", lengths=torch.tensor(cells, device=x.device), unsafe=True
    )


def act_loss(cfg: ModelConfig, out: Output, labels: Tensor, cells: Sequence[int]) -> Loss:
    """Loss and scores of one ACT step, per slot, in float32; labels (M,), cells of each slot. A negative label is not
    asked for, nor is the mark of a grid's end where no logit stands for it."""
    valid, x, log_p = (
        labels >= (2 if cfg.feedback else 0),
        out.logits.float(),
        log_prob(cfg, out.logits),
    )
    ce = -log_p.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    asked = per_slot(valid, cells)
    hits = per_slot((x.argmax(-1) == labels) & valid, cells)
    lm = per_slot(torch.where(valid, ce, 0.0), cells) / asked.clamp(min=1)
    exact, labelled = hits == asked, asked > 0
    q = F.binary_cross_entropy_with_logits(out.q_halt, exact.float(), reduction="none")
    if not cfg.published_faults:
        q = torch.where(labelled, q, 0.0)
    kl = torch.zeros_like(lm) if out.kl is None else out.kl
    each = cfg.encoder.kl_weight / (len(cells) if cfg.published_faults else 1)
    return Loss(
        total=lm + cfg.q_weight * q + each * kl,
        lm=lm.detach(),
        q=q.detach(),
        cell_accuracy=hits / asked.clamp(min=1),
        exact=exact & labelled,
        q_right=((out.q_halt >= 0) == exact) & labelled,
        labelled=labelled,
        kl=kl.detach(),
    )


# ---------------------------------------------------------------- evaluation


def part_of(x: Tensor, sizes: Sequence[int], slots: Sequence[int]) -> Tensor:
    """The rows of some slots, of x in which slots of these sizes lie one after the other."""
    pieces = x.split(list(sizes))
    return torch.cat([pieces[i] for i in slots])


def only(batch: Batch, read: Any, carry: Carry, slots: Sequence[int]) -> tuple[Batch, Any, Carry]:
    """Some slots alone, as if the others had never been there; demos are not taken along, what was read stands for them."""
    rows = torch.tensor(slots, device=batch.inputs.device)
    cells, tokens = [batch.cells[i] for i in slots], [carry.tokens[i] for i in slots]
    inputs, labels, at, borders = (
        part_of(x, batch.cells, slots)
        for x in (batch.inputs, batch.labels, batch.at, batch.borders)
    )
    own = batch._replace(inputs=inputs, labels=labels, at=at, borders=borders, cells=tuple(cells))
    said: dict[str, Tensor] = {}
    if isinstance(read, Context):
        each = {k: x for k in ("cells",) if (x := getattr(read, k)) is not None}
        said, read = (
            {k: part_of(x, batch.cells, slots) for k, x in each.items()},
            read._replace(cells=None),
        )
    states = {k: part_of(getattr(carry, k), carry.tokens, slots) for k in ("z_H", "z_L")}
    kept = carry._replace(
        **states,
        **{k: getattr(carry, k)[rows] for k in ("steps", "halted", "n", "z_E")},
        tokens=tuple(tokens),
    )
    read = tree_map(lambda x: x[rows], read)
    return own, read._replace(**said) if said else read, kept


Look = Callable[[int, Sequence[int], Output], None]  # (ACT step, slots that took it, their output)


def think(
    params: Params, cfg: ModelConfig, encode: Encode, batch: Batch, dtype: torch.dtype, act_steps: int, leave: str = "never",
    look: Look = lambda step, slots, out: None, before: Callable[[int, Sequence[int], Carry], Carry] = lambda step, slots, carry: carry,
    stable: int = 3,
) -> tuple[Output, Tensor]:  # fmt: skip
    """Evaluation: (output, ACT steps spent (B,)) from the initial states; the demos are read once.

    leave: "never" takes act_steps (published); "q" leaves when the halting head says so; "stable" when the answer was the
    same after so many steps on end. What has left is computed no more. `look` sees each step; `before` may change its carry.
    """
    with torch.no_grad():
        carry = fresh_carry(cfg, batch.cells, dtype, batch.inputs.device)
        read, here, device = (
            encode.read(params.encoder, batch),
            list(range(len(batch.cells))),
            batch.inputs.device,
        )
        found: list[tuple[Tensor, Tensor, Tensor, int]] = [
            (batch.inputs, batch.inputs, batch.inputs, 0)
        ] * len(here)
        last, same = (
            torch.zeros_like(batch.inputs),
            torch.zeros(len(here), dtype=torch.int64, device=device),
        )
        for step in range(1, act_steps + 1):
            given = encode._replace(read=lambda *_, r=read: r)
            carry, out = act_step(params, cfg, given, before(step, here, carry), batch, None)
            carry = carry._replace(
                halted=torch.zeros_like(carry.halted)
            )  # also beyond halt_max_steps it thinks on
            look(step, here, out)
            going = torch.zeros(len(here), dtype=torch.bool, device=device)
            if leave == "q":
                going = sure(cfg, out.q_halt)
            elif leave == "stable":
                answer = out.logits.argmax(-1)
                changed = per_slot(answer != last, batch.cells) > 0
                last, same = answer, torch.where(changed, 0, same) + 1
                going = same >= stable
            gone = [
                step == act_steps or g
                for g in (going.tolist() if leave != "never" else [False] * len(here))
            ]
            logits = out.logits.split(batch.cells)
            for i, slot in enumerate(here):
                if gone[i]:
                    found[slot] = (logits[i], out.q_halt[i], out.q_continue[i], step)
            stay = [i for i, g in enumerate(gone) if not g]
            if not stay:
                break
            if len(stay) < len(here):
                last, same = (
                    part_of(last, batch.cells, stay),
                    same[torch.tensor(stay, device=device)],
                )
                batch, read, carry = only(batch, read, carry, stay)
                here = [here[i] for i in stay]
        logits, q_halt, q_continue, spent = zip(*found, strict=True)
        return Output(
            torch.cat(logits), torch.stack(q_halt), torch.stack(q_continue)
        ), torch.tensor(spent)
