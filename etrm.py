"""The model: parameters, block, recursive core, one ACT step, its loss. Pure functions; the last ones are the model.

Axes: B slots (all pools), b slots of one pool, S tokens of a slot = T context tokens + C * C cells, N all tokens of
all slots (packed, ordered by pool, then slot), D hidden, F inner width, h heads, V vocabulary.
After Jolicoeur-Martineau, "Less is More: Recursive Reasoning with Tiny Networks" (arXiv 2510.04871).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from .data import Batch


Count = Annotated[int, msgspec.Meta(ge=1)]


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which demonstration encoder, and its shape. Width and heads are the core's."""

    kind: str = "perceiver"
    layers: int = 2  # blocks over the cells of one demo
    set_layers: int = 1  # blocks in which the context tokens attend to the demos
    pooling: Literal["mean", "max", "attention", "weighted"] = "mean"  # standard: one vector per demo
    norm: Literal["post", "pre"] = "post"
    layer_scale: float = 0.0  # 0: none
    attend_padding: bool = False  # published: the empty cells of a canvas attend and are attended


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and behaviour of the model. Each switch named `published` reproduces the published code."""

    hidden: Count = 128
    heads: Count = 2
    expansion: float = 4.0
    layers: Count = 2
    H_cycles: Count = 3
    L_cycles: Count = 4
    context_tokens: Count = 16
    positions: Literal["rope", "rope2d", "learned", "none"] = "rope2d"
    raster: Count = 30  # position codes are those of a raster x raster canvas, whatever the pool
    tied_head: bool = True  # logits from the query's own token embedding
    context_scale: Literal["gain", "published"] = "gain"
    halt_max_steps: Count = 16
    exploration: float = 0.1
    loss: Literal["stablemax", "softmax"] = "stablemax"
    q_weight: float = 0.5
    published_halting: bool = False  # a row without a valid label counts as correct and trains the halting head
    encoder: EncoderConfig = EncoderConfig()


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
    position: Tensor | None  # (T + raster * raster, D) learned positions


class Params(NamedTuple):
    encoder: Any
    core: Core


def normal(g: torch.Generator, *shape: int, std: float | None = None) -> Tensor:
    """Truncated normal (+-2 sigma) with the given std after truncation, 1/sqrt(fan in) by default."""
    std = 1 / math.sqrt(shape[-1]) if std is None else std
    bound = math.erf(2 / math.sqrt(2))
    # std of a standard normal cut at +-2
    cut = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * bound))
    return torch.erfinv((torch.rand(shape, generator=g) * 2 - 1) * bound) * (math.sqrt(2) * std / cut)


def inner_width(hidden: int, expansion: float) -> int:
    """Two thirds of expansion * hidden, rounded up to 256 as published."""
    return -(-round(expansion * hidden * 2 / 3) // 256) * 256


def init_block(cfg: ModelConfig, g: torch.Generator) -> Block:
    d, f = cfg.hidden, inner_width(cfg.hidden, cfg.expansion)
    return Block(normal(g, 3 * d, d), normal(g, d, d), normal(g, 2 * f, d), normal(g, d, f))


def init_core(cfg: ModelConfig, g: torch.Generator, vocab: int = 12) -> Core:
    d = cfg.hidden
    return Core(
        embed=normal(g, vocab, d),
        blocks=tuple(init_block(cfg, g) for _ in range(cfg.layers)),
        head=None if cfg.tied_head else normal(g, vocab, d),
        q_weight=torch.zeros(2, d),
        q_bias=torch.full((2,), -5.0),
        H_init=normal(g, d, std=1.0),
        L_init=normal(g, d, std=1.0),
        context_gain=torch.ones(d) if cfg.context_scale == "gain" else None,
        position=normal(g, cfg.context_tokens + cfg.raster**2, d) if cfg.positions == "learned" else None,
    )


def leaves(tree: Any, path: str = "") -> dict[str, Tensor]:
    """Path -> tensor of a tree of NamedTuples, tuples and tensors, in order of definition; None and int are no leaves."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if tree is None or isinstance(tree, int):
        return {}
    names = getattr(tree, "_fields", range(len(tree)))
    return {k: v for n, sub in zip(names, tree, strict=True) for k, v in leaves(sub, f"{path}.{n}" if path else str(n)).items()}


def rebuild(tree: Any, new: dict[str, Any], path: str = "") -> Any:
    """The same tree with the leaves of `new`."""
    if isinstance(tree, Tensor):
        return new[path]
    if tree is None or isinstance(tree, int):
        return tree
    names = getattr(tree, "_fields", range(len(tree)))
    parts = [rebuild(s, new, f"{path}.{n}" if path else str(n)) for n, s in zip(names, tree, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def tree_map(f: Callable[[Tensor], Any], tree: Any) -> Any:
    return rebuild(tree, {k: f(v) for k, v in leaves(tree).items()})


# ---------------------------------------------------------------- layers


def rms(x: Tensor) -> Tensor:
    """Root-mean-square norm without gain; the mean is taken in float32."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def rotary(position: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """cos, sin (S, head) of positions (S,), or (S, 2): rows turn one half of a head's planes, columns the other."""
    axes = position.shape[1] if position.ndim == 2 else 1
    planes = head // 2 // axes
    rate = 1e4 ** -(torch.arange(planes, dtype=torch.float32) / planes)
    angle = (position.reshape(len(position), axes, 1).float() * rate).flatten(1)
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # tables made while evaluating must serve training too
def rotation(
    kind: str, context: int, canvas: int, raster: int, head: int, copies: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor] | None:
    """Rotary tables of `context` tokens followed by `copies` canvases, each continuing the raster of the one before."""
    if kind in ("learned", "none"):
        return None
    r, c = torch.meshgrid(torch.arange(canvas), torch.arange(canvas), indexing="ij")
    r, c = r.flatten(), c.flatten()
    if kind == "rope":
        line = torch.cat([r * raster + c + k * raster**2 for k in range(copies)])
        position = torch.cat((torch.arange(context), context + line))
    else:  # context tokens stand at the origin, cells count from 1
        cells = torch.cat([torch.stack((1 + r + k * raster, 1 + c), -1) for k in range(copies)])
        position = torch.cat((cells.new_zeros(context, 2), cells))
    cos, sin = rotary(position, head)
    sin[:, : head // 2] *= -1
    return cos.to(device, dtype), sin.to(device, dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """(..., S, head) turned by its positions; the sine's first half comes negated, so that a roll serves both halves."""
    return x if table is None else torch.addcmul(x * table[0], x.roll(x.shape[-1] // 2, -1), table[1])


SCORES = 4_000_000  # numbers in the score matrices that attention makes at once


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, (b, h, S, head) each; mask (b, 1, 1, S) true where a key may be seen; no key seen gives 0.

    On CPU plain products, a few slots at a time so that their scores stay in cache: torch's fused kernel is slower
    there in bf16, 2.5 times at 10 x 2 x 416 x 64 and 2 times at 10 x 2 x 916 x 64, forward and backward, and its
    backward 5 times at 48 x 2 x 116 x 64; in float32 it is no better.
    """
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    at_once = max(1, SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    q = q * q.shape[-1] ** -0.5
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


def split_heads(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(b, S, 3 D) to q, k, v of (b, h, S, D / h)."""
    return tuple(rearrange(x, "b s (n h d) -> n b h s d", n=3, h=heads))


Layout = Sequence[tuple[int, int]]  # (slots, tokens of a slot) of each pool
Tables = Sequence[tuple[Tensor, Tensor] | None]


def self_attention(p: Block, heads: int, x: Tensor, layout: Layout, tables: Tables) -> Tensor:
    """(N, D): one product for all tokens, attention within each slot, pool by pool."""
    out = []
    for (b, s), table, part in zip(layout, tables, (x @ p.qkv.T).split([b * s for b, s in layout]), strict=True):
        q, k, v = split_heads(part.view(b, s, -1), heads)
        y = attention(rotate(q, table), rotate(k, table), v)
        out.append(rearrange(y, "b h s d -> (b s) (h d)"))
    return torch.cat(out) @ p.o.T


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def block(p: Block, heads: int, x: Tensor, layout: Layout, tables: Tables) -> Tensor:
    """Post-norm transformer block on packed tokens (N, D)."""
    x = rms(x + self_attention(p, heads, x, layout, tables))
    return rms(x + swiglu(p.gate_up, p.down, x))


# ---------------------------------------------------------------- the recursive core


def reason(p: Core, cfg: ModelConfig, z_H: Tensor, z_L: Tensor, e: Tensor, layout: Layout, tables: Tables) -> tuple[Tensor, Tensor]:
    """H_cycles of (L_cycles updates of z_L, one of z_H), all by the same blocks; only the last cycle has gradient."""

    def level(z: Tensor) -> Tensor:
        for b in p.blocks:
            z = block(b, cfg.heads, z, layout, tables)
        return z

    def cycle(z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(cfg.L_cycles):
            z_L = level(z_L + z_H + e)
        return level(z_H + z_L), z_L

    with torch.no_grad():
        for _ in range(cfg.H_cycles - 1):
            z_H, z_L = cycle(z_H, z_L)
    return cycle(z_H, z_L)


def place(p: Core, cfg: ModelConfig, context: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Context (B, T, D) and tokens per pool (b, C * C) to the injected embedding (N, D); tokens enter with std 1."""
    root = math.sqrt(cfg.hidden)
    scale = root if p.context_gain is None else p.context_gain
    parts = []
    for tokens, ctx in zip(inputs, (context * scale).split([len(t) for t in inputs]), strict=True):
        x = torch.cat((ctx, F.embedding(tokens, p.embed) * root), 1)
        if p.position is not None:
            side = math.isqrt(tokens.shape[1])
            at = torch.arange(side, device=tokens.device)
            cells = cfg.context_tokens + (at[:, None] * cfg.raster + at).flatten()
            ours = torch.cat((p.position[: cfg.context_tokens], p.position[cells]))
            x = math.sqrt(0.5) * (x + root * ours)
        parts.append(x.flatten(0, 1))
    return torch.cat(parts)


class Carry(NamedTuple):
    """What persists between ACT steps. The slot's episode is a pure function of (seed, slot, n)."""

    z_H: Tensor  # (N, D), detached
    z_L: Tensor  # (N, D), detached
    steps: Tensor  # (B,) ACT steps spent on the episode
    halted: Tensor  # (B,) bool: the next step starts an episode
    n: Tensor  # (B,) episodes the slot has finished or begun


class Output(NamedTuple):
    logits: tuple[Tensor, ...]  # per pool (b, C * C, V)
    q_halt: Tensor  # (B,) float32
    q_continue: Tensor  # (B,) float32


def layout_of(cfg: ModelConfig, inputs: Sequence[Tensor]) -> Layout:
    return [(len(t), cfg.context_tokens + t.shape[1]) for t in inputs]


def fresh_carry(cfg: ModelConfig, inputs: Sequence[Tensor], dtype: torch.dtype) -> Carry:
    """The carry before the first step: all halted, so that nothing in it is ever read."""
    size, slots = sum(b * s for b, s in layout_of(cfg, inputs)), sum(len(t) for t in inputs)
    device = inputs[0].device
    zeros = torch.zeros(slots, dtype=torch.int64, device=device)
    z = torch.zeros(size, cfg.hidden, dtype=dtype, device=device)
    return Carry(z, z.clone(), zeros, torch.ones(slots, dtype=torch.bool, device=device), zeros - 1)


Encode = Callable[[Any, "Batch", int], Tensor]  # (encoder parameters, batch, slots) -> context (B, T, D)


def act_step(
    params: Params, cfg: ModelConfig, encode: Encode, carry: Carry, batch: Batch, min_steps: Tensor | None
) -> tuple[Carry, Output]:
    """One ACT step of every slot; halted slots start from the initial states.

    min_steps (B,): exploration, no slot halts before it (0: free); None at evaluation: halts at halt_max_steps only.
    No gradient reaches the carry that came in; the one returned is detached.
    """
    layout, p = layout_of(cfg, batch.inputs), params.core
    slots, dtype = len(carry.steps), carry.z_H.dtype
    context = encode(params.encoder, batch, slots)
    e = place(p, cfg, context, batch.inputs)
    tables = [
        rotation(cfg.positions, cfg.context_tokens, math.isqrt(t.shape[1]), cfg.raster, cfg.hidden // cfg.heads, 1, dtype,
                 str(e.device))
        for t in batch.inputs
    ]  # fmt: skip
    reset = per_token(carry.halted, layout)[:, None]
    z_H = torch.where(reset, p.H_init.to(dtype), carry.z_H.detach())
    z_L = torch.where(reset, p.L_init.to(dtype), carry.z_L.detach())
    z_H, z_L = reason(p, cfg, z_H, z_L, e, layout, tables)

    pools = [z.view(b, s, -1) for z, (b, s) in zip(z_H.split([b * s for b, s in layout]), layout, strict=True)]
    head = p.embed if p.head is None else p.head
    logits = tuple(z[:, cfg.context_tokens :] @ head.T for z in pools)
    q = (torch.cat([z[:, 0] for z in pools]) @ p.q_weight.T + p.q_bias).float()
    steps = torch.where(carry.halted, 0, carry.steps) + 1
    halted = steps >= cfg.halt_max_steps
    if min_steps is not None:
        halted = (halted | (q[:, 0] > 0)) & (steps >= min_steps)
    new = Carry(z_H.detach(), z_L.detach(), steps, halted, carry.n)
    return new, Output(logits, q[:, 0], q[:, 1])


def per_token(x: Tensor, layout: Layout) -> Tensor:
    """(B,) to (N,): a slot's value at each of its tokens."""
    parts = x.split([b for b, _ in layout])
    return torch.cat([v[:, None].expand(b, s).reshape(-1) for v, (b, s) in zip(parts, layout, strict=True)])


# ---------------------------------------------------------------- the ACT loss


def log_stable(x: Tensor) -> Tensor:
    """log s(x) with s(x) = x + 1 for x >= 0, 1 / (1 - x) below (stablemax, Prieto et al. 2025), through log1p."""
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


class Loss(NamedTuple):
    """Per slot (B,), float32 and on the graph where it says so; means and masks are the caller's."""

    total: Tensor  # on the graph: lm + q_weight * q
    lm: Tensor  # mean over the slot's valid cells
    q: Tensor  # halting: binary cross-entropy against "all valid cells right"
    cell_accuracy: Tensor
    exact: Tensor  # bool
    q_right: Tensor  # bool: q >= 0 agrees with exact
    labelled: Tensor  # bool: has a valid cell at all


def act_loss(cfg: ModelConfig, out: Output, labels: Sequence[Tensor]) -> Loss:
    """Loss and scores of one ACT step, per slot, in float32. A negative label is not asked for."""
    lm, right, count = [], [], []
    for logits, label in zip(out.logits, labels, strict=True):
        valid = label >= 0
        n = valid.sum(-1)
        x = logits.float()
        log_p = torch.log_softmax(log_stable(x) if cfg.loss == "stablemax" else x, -1)
        ce = -log_p.gather(-1, label.clamp(min=0)[..., None]).squeeze(-1)
        lm.append(torch.where(valid, ce, 0.0).sum(-1) / n.clamp(min=1))
        right.append(((x.argmax(-1) == label) & valid).sum(-1))
        count.append(n)
    cells, hits, loss = torch.cat(count), torch.cat(right), torch.cat(lm)
    exact, labelled = hits == cells, cells > 0
    q = F.binary_cross_entropy_with_logits(out.q_halt, exact.float(), reduction="none")
    if not cfg.published_halting:
        q = torch.where(labelled, q, 0.0)
    return Loss(
        total=loss + cfg.q_weight * q,
        lm=loss.detach(),
        q=q.detach(),
        cell_accuracy=hits / cells.clamp(min=1),
        exact=exact & labelled,
        q_right=((out.q_halt >= 0) == exact) & labelled,
        labelled=labelled,
    )


def think(params: Params, cfg: ModelConfig, encode: Encode, batch: Batch, dtype: torch.dtype, act_steps: int) -> Output:
    """Evaluation: every slot for `act_steps` ACT steps from the initial states; the context is computed once."""
    with torch.no_grad():
        carry = fresh_carry(cfg, batch.inputs, dtype)
        context = encode(params.encoder, batch, len(carry.steps))
        for _ in range(act_steps):
            carry, out = act_step(params, cfg, lambda *_: context, carry, batch, None)
        return out
