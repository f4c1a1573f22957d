"""Demonstration encoders: from the demos of each slot to its context.

Axes: N demos, M cells of all demos, B slots, K most demos of a slot, T context tokens, D hidden,
L latent, h heads. Packed tokens (.., D) lie slot after slot (or demo after demo), with `sizes`.
"""

from __future__ import annotations

import importlib
import math
import runpy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from . import baselines, etrm
from .config import ModelConfig, UserError, nearest
from .data import EOS, FIRST_COLOUR, PAD, Batch, Demos
from .etrm import Context, Encode, Params, Rotary, normal, rms, swiglu

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
    """(D,) of both halves of a block, or None without."""
    scale = cfg.encoder.layer_scale
    return [torch.full((cfg.hidden,), scale) if scale else None for _ in range(2)]


def init_cell_block(cfg: ModelConfig, g: torch.Generator) -> CellBlock:
    """The matrices of one cell block."""
    return CellBlock(*etrm.init_block(cfg, g), *layer_scales(cfg))


def init_set_block(cfg: ModelConfig, g: torch.Generator) -> SetBlock:
    """The matrices of one set block."""
    d, f = cfg.hidden, etrm.inner_width(cfg.hidden, cfg.expansion)
    q, k, v, o = (normal(g, d, d) for _ in range(4))
    return SetBlock(q, k, v, o, normal(g, 2 * f, d), normal(g, d, f), *layer_scales(cfg))


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


def cell_block(p: CellBlock, cfg: ModelConfig, t: Packed) -> Packed:
    """The tokens of a slot attend to each other."""
    given = {"sizes": t.sizes, "rotary": t.rotary, "seen": t.seen}
    return t._replace(x=block(p, cfg, t.x, partial(etrm.self_attention, p, cfg.heads, **given)))


def set_block(p: SetBlock, cfg: ModelConfig, t: Packed, keys: Packed) -> Packed:
    """The tokens of a slot attend to its keys."""

    def attend(x: Tensor) -> Tensor:
        return etrm.linear(cross_attention((p.q, p.k, p.v), cfg.heads, t._replace(x=x), keys), p.o)

    return t._replace(x=block(p, cfg, t.x, attend))


def cross_attention(
    weights: Sequence[Any], heads: int, t: Packed, keys: Packed, values: Tensor | None = None
) -> Tensor:
    """(N, D): the tokens of a slot attend to its keys, both turned by their positions, if given.
    weights (D, D) of queries, keys, values; values: given ones. To have no key gives 0."""

    def turned(x: Tensor, weight: Tensor, rotary: Rotary, which: int) -> Tensor:
        y = etrm.linear(x, weight).unflatten(-1, (heads, -1))
        if rotary is None:
            return y if which else y * y.shape[-1] ** -0.5
        cos, sin = (table[:, which : which + 1] for table in rotary)
        return etrm.rotate(y[:, None], (cos, sin)).squeeze(1)

    values = etrm.linear(keys.x, weights[2]) if values is None else values
    q, k = turned(t.x, weights[0], t.rotary, 0), turned(keys.x, weights[1], keys.rotary, 1)
    return etrm.attend(q, k, values.unflatten(-1, (heads, -1)), t.sizes, keys.sizes, keys.seen)


def position_in(cfg: ModelConfig, at: Tensor, origins: int = 0) -> Tensor:
    """Positions of `origins` tokens at the origin, then of cells at (M, 2): rotary in any case."""
    kind = cfg.positions if cfg.positions in ("rope2d", "both") else "rope"
    position = etrm.position_of(kind, at, cfg.raster)
    assert position is not None
    return torch.cat((position.new_zeros(origins, *position.shape[1:]), position))


# ---------------------------------------------------------------- cell by cell: all demos' cells

ASKED = 12  # the output token of a test input that is read like a demo


class Perceiver(NamedTuple):
    input_embed: Tensor  # (V, D)
    output_embed: Tensor  # (V, D); matching: (V + 1, D)
    cells: tuple[CellBlock, ...]
    queries: Tensor  # (T, D)
    sets: tuple[SetBlock, ...]
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
    )


def aligned(p: Perceiver, cfg: ModelConfig, demos: Demos, extra: Tensor | None = None) -> Packed:
    """Input and output of a demo aligned, one token per cell, through the cell blocks; extra (M, D)
    is added to their embedding, as three more of them."""
    x = F.embedding(demos.inputs, p.input_embed) + F.embedding(demos.outputs, p.output_embed)
    x = x * math.sqrt(cfg.hidden / 2)
    if extra is not None:
        x = (x * math.sqrt(2) + extra) / math.sqrt(5)
    seen = (demos.inputs != 0) | (demos.outputs != 0)
    rotary = etrm.rotary_of(cfg, position_in(cfg, demos.at), x.dtype)
    t = Packed(x, demos.cells, None if cfg.published_faults else seen, rotary)
    for b in p.cells:
        t = cell_block(b, cfg, t)
    return t._replace(seen=seen)


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


def init_matching(cfg: ModelConfig, g: torch.Generator) -> Perceiver:
    p, n = init_perceiver(cfg, g, ASKED + 1), range(cfg.encoder.set_layers - 1)
    return p._replace(mixing=tuple(init_cell_block(cfg, g) for _ in n))


def with_queries(batch: Batch) -> Demos:
    """The cells of the demos, then those of the test inputs as if of demos without an output."""
    d, asked = batch.demos, torch.where(batch.inputs == 0, 0, ASKED)
    pairs = {k: (getattr(d, k), getattr(batch, k)) for k in ("inputs", "at")}
    fields: dict[str, Any] = {k: torch.cat(pair) for k, pair in pairs.items()}
    return d._replace(**fields, outputs=torch.cat((d.outputs, asked)), cells=d.cells + batch.cells)


def match(p: Perceiver, cfg: ModelConfig, batch: Batch, cells: Packed) -> tuple[Context, Packed]:
    """T queries and the cells of the test inputs attend to the cells of all demos, which come with
    the context, slot by slot; cells: those of the demos, then those of the test inputs."""
    d, t, slots = batch.demos, cfg.context_tokens, len(batch.cells)
    layout = etrm.layout_of(cfg, batch.cells, batch.at.device)
    shown, asked = cells.x.split((len(d.inputs), len(batch.inputs)))
    rotary = etrm.rotary_of(cfg, position_in(cfg, d.at[d.by_slot]), shown.dtype)
    keys = Packed(shown[d.by_slot], d.slot_cells, cells.seen[: len(shown)][d.by_slot], rotary)
    position = position_in(cfg, batch.at, origins=slots * t)[layout.source]
    x = torch.cat((p.queries.repeat(slots, 1), asked))[layout.source]
    tokens = Packed(x, layout.tokens, None, etrm.rotary_of(cfg, position, shown.dtype))
    for i, s in enumerate(p.sets):
        tokens = set_block(s, cfg, tokens, keys)
        if i < len(p.mixing):
            tokens = cell_block(p.mixing[i], cfg, tokens)
    x = rms(tokens.x)
    first = layout.first[:, None] + torch.arange(t, device=x.device)
    return Context(x[first], cells=x[layout.cells]), keys


def apply_matching(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Context:
    """The test input is read like a demo; its cells attend to all demos' (arXiv 1606.04080)."""
    return match(p, cfg, batch, aligned(p, cfg, with_queries(batch)))[0]


# ---------------------------------------------------------------- pointer: answers are copied


class Axis(NamedTuple):
    """Rows, or columns, of cells (M,) in their own grid, and the box around what is not black."""

    place: Tensor
    size: Tensor
    box_start: Tensor
    box_size: Tensor


def folded(place: Tensor, size: Tensor) -> Tensor:
    """There and back again: 0 .. size - 1, size - 1 .. 0 and so on."""
    return torch.minimum(place % (2 * size), 2 * size - 1 - place % (2 * size))


def third(size: Tensor) -> Tensor:
    """The side of one of three panels, with or without lines between them."""
    return (size - 2 * (size % 3 == 2)) // 3


# axis -> (the place that is seen, the size of the whole view)
AXES: dict[str, Callable[[Axis], tuple[Tensor, Tensor]]] = {
    "same": lambda a: (a.place, a.size),
    "flip": lambda a: (a.size - 1 - a.place, a.size),
    "next": lambda a: (a.place + 1, a.size),
    "previous": lambda a: (a.place - 1, a.size),
    "roll": lambda a: ((a.place + 1) % a.size, a.size),
    "roll back": lambda a: ((a.place - 1) % a.size, a.size),
    "start": lambda a: (a.place * 0, a.size),
    "end": lambda a: (a.size - 1, a.size),
    "tile 2": lambda a: (a.place % a.size, 2 * a.size),
    "tile 3": lambda a: (a.place % a.size, 3 * a.size),
    "tile n": lambda a: (a.place % a.size, a.size * a.size),
    "fold": lambda a: (folded(a.place, a.size), 2 * a.size),
    "fold back": lambda a: (folded(a.place + a.size, a.size), 2 * a.size),
    "scale 2": lambda a: (a.place // 2, 2 * a.size),
    "scale 3": lambda a: (a.place // 3, 3 * a.size),
    "scale n": lambda a: (a.place // a.size, a.size * a.size),
    "every 2nd": lambda a: (2 * a.place, (a.size + 1) // 2),
    "every 3rd": lambda a: (3 * a.place, (a.size + 2) // 3),
    "box": lambda a: (a.place + a.box_start, a.box_size),
    "box flip": lambda a: (2 * a.box_start + a.box_size - 1 - a.place, a.size),
    "half 1": lambda a: (a.place, a.size // 2),
    "half 2": lambda a: (a.place + (a.size + 1) // 2, a.size // 2),
    "third 1": lambda a: (a.place, third(a.size)),
    "third 2": lambda a: (a.place + (a.size + 1) // 3, third(a.size)),
    "third 3": lambda a: (a.place + 2 * ((a.size + 1) // 3), third(a.size)),
}
D8 = [(r, c, swap) for r in ("same", "flip") for c in ("same", "flip") for swap in (False, True)]
BOTH = "box, box flip, tile 2, tile 3, tile n, fold, scale 2, scale 3, scale n, every 2nd, "
BOTH += "every 3rd"
ONE = "next, previous, roll, roll back, start, end, box flip, tile 2, fold, fold back, scale 2"
ONE += ", every 2nd, half 1, half 2, third 1, third 2, third 3"
# Frames: (how rows are seen, how columns are seen, whether rows and columns change places).
FRAMES: tuple[tuple[str, str, bool], ...] = (
    *D8,
    *((a, a, False) for a in BOTH.split(", ")),
    *(frame for a in ONE.split(", ") for frame in ((a, "same", False), ("same", a, False))),
    *((a, b, False) for a in ("half 1", "half 2") for b in ("half 1", "half 2")),
    *((a, b, False) for a in ("next", "previous") for b in ("next", "previous")),
)


def span(place: Tensor, owner: Tensor, chosen: Tensor, grids: int) -> tuple[Tensor, Tensor]:
    """First place and number of places (M,) of the chosen cells of each cell's grid; else 0, 0."""
    first, last = torch.where(chosen, place, 999), torch.where(chosen, place + 1, 0)
    low = place.new_full((grids,), 999).scatter_reduce(0, owner, first, "amin")
    end = place.new_zeros(grids).scatter_reduce(0, owner, last, "amax")
    return torch.minimum(low, end)[owner], (end - low).clamp(min=0)[owner]


class Views(NamedTuple):
    seen: Tensor  # (M, K) the token that each cell sees through each frame
    facts: Tensor  # (M, 8) bool: parity, border and diagonal of the cell in its own grid


def views_of(tokens: Tensor, at: Tensor, cells: Sequence[int]) -> Views:
    """Views of input grids, tokens (M,) at places (M, 2) of canvases of so many cells. A view has
    marks at its end as a painted grid has, and nothing beyond."""
    owner, number = etrm.ragged(torch.tensor(cells, device=at.device), len(tokens))
    first = torch.arange(len(tokens), device=at.device) - number
    last = first + torch.tensor(cells, device=at.device)[owner] - 1
    inside, drawn = tokens >= FIRST_COLOUR, tokens > FIRST_COLOUR
    axes, start, stride = [], first, at[last, 1] - at[first, 1] + 1
    for place, step in zip((at - at[first]).T, (stride, torch.ones_like(stride)), strict=True):
        origin, size = span(place, owner, inside, len(cells))
        box = span(place - origin, owner, drawn, len(cells))
        axes.append(Axis(place - origin, size.clamp(min=1), *box))
        start = start + origin * step
    (rows, columns), padded = axes, torch.cat((tokens, tokens.new_zeros(1)))
    before = (rows.place < 0) | (columns.place < 0)
    seen = []
    for row, column, swap in FRAMES:
        places = (columns.place, rows.place) if swap else (rows.place, columns.place)
        (r, height), (c, width) = (
            AXES[name](axis._replace(place=place))
            for name, axis, place in zip((row, column), axes, places, strict=True)
        )
        height, width = (width, height) if swap else (height, width)
        exists = (r >= 0) & (r < rows.size) & (c >= 0) & (c < columns.size)
        token = padded[torch.where(exists, start + r * stride + c, len(tokens))]
        in_rows, in_columns = rows.place < height, columns.place < width
        end = (rows.place == height) & in_columns | (columns.place == width) & in_rows
        token = torch.where(in_rows & in_columns, token, end.long() * EOS)
        seen.append(token.masked_fill(before, PAD))
    i, j, h, w = rows.place, columns.place, rows.size, columns.size
    parity = (i % 2 == 0, j % 2 == 0, i % 3 == 0, j % 3 == 0)
    border = ((i == 0) | (i == h - 1), (j == 0) | (j == w - 1), i == j, i + j == w - 1)
    return Views(torch.stack(seen, 1), torch.stack((*parity, *border), 1))


COPIES = 2  # heads that copy from outputs of demos


class Pointer(NamedTuple):
    matching: Perceiver
    seen_embed: Tensor  # (K * 12, D) of a token seen through a frame
    fact_embed: Tensor  # (8, D)
    match_embed: Tensor  # (K, D) of a demo's cell whose output is what it sees through the frame
    copy_q: Tensor  # (D, D)
    copy_k: Tensor  # (D, D)


def init_pointer(cfg: ModelConfig, g: torch.Generator) -> Pointer:
    d, k = cfg.hidden, len(FRAMES)
    matching = init_matching(cfg, g)
    seen, facts, matches = (normal(g, n, d, std=1.0) for n in (12 * k, 8, k))
    return Pointer(matching, seen, facts, matches, normal(g, d, d), normal(g, d, d))


def apply_pointer(p: Pointer, cfg: ModelConfig, batch: Batch) -> Context:
    """`matching` whose cells also embed what they see through the frames of their own grid and, in
    demos, through which frames they see their output. The answer may be copied: from a frame, or
    from outputs of demos that the test input's cells attend to."""
    d, k, demos = batch.demos, len(FRAMES), with_queries(batch)
    views = views_of(demos.inputs, demos.at, demos.cells)
    dtype, known = p.seen_embed.dtype, (demos.outputs != PAD) & (demos.outputs != ASKED)
    matches = ((views.seen == demos.outputs[:, None]) & known[:, None]).to(dtype)
    place = views.seen + 12 * torch.arange(k, device=views.seen.device)
    seen = p.seen_embed.new_zeros(len(place), 12 * k).scatter_(1, place, 1.0)
    extra = seen @ (p.seen_embed * k**-0.5) + views.facts.to(dtype) @ (p.fact_embed * 8**-0.5)
    extra = extra + matches @ (p.match_embed * (2 * k**-0.5))
    context, keys = match(p.matching, cfg, batch, aligned(p.matching, cfg, demos, extra))
    outputs = d.outputs[d.by_slot]
    keys = keys._replace(seen=outputs != PAD, rotary=None)
    assert context.cells is not None
    t = Packed(context.cells, batch.cells)
    values = F.one_hot(outputs, 12).to(dtype).repeat(1, COPIES)
    copied = cross_attention((p.copy_q, p.copy_k, None), COPIES, t, keys, values)
    seen, copied = views.seen[len(d.inputs) :], copied.unflatten(1, (COPIES, 12))
    return context._replace(seen=seen, copied=copied)


# ---------------------------------------------------------------- the table of encoders


class Encoder(NamedTuple):
    init: Callable[[ModelConfig, torch.Generator], Any]
    apply: Callable[[Any, ModelConfig, Batch], Any]  # -> context (B, T, D) or Context
    recur: Callable[[Any, ModelConfig, Any, Tensor], Tensor] | None = None
    variational: bool = False
    asks: bool = False  # reads the test input too and gives a context of its cells
    offers: int = 0  # tokens that it offers for each cell, see etrm.mixed


ENCODERS: dict[str, Encoder] = {
    "perceiver": Encoder(init_perceiver, apply_perceiver),
    "matching": Encoder(init_matching, apply_matching, asks=True),
    "pointer": Encoder(init_pointer, apply_pointer, asks=True, offers=len(FRAMES) + COPIES),
}
PUBLISHED = "etrm_arc.extras.encoders"  # the module with the published ones
FEEDBACK = "etrm_arc.extras.feedback"  # the argmax-feedback TRM, which has none
TABLE = Encoder(baselines.init_table, baselines.apply_table)  # TRM's: it looks at no demo


def kinds() -> dict[str, Encoder]:
    """All encoders by name."""
    return {**ENCODERS, **importlib.import_module(PUBLISHED).ENCODERS, "table": TABLE}


@lru_cache
def user_module(file: Path) -> dict[str, Any]:
    """The names in a Python file of the user's, run once. Raises UserError, whatever it raises."""
    try:
        return runpy.run_path(str(file))
    except Exception as e:
        raise UserError(f"model.encoder.kind: {file}: {type(e).__name__}: {e}") from None


def lookup(kind: str) -> Encoder:
    """The encoder of that name; "my_module:colours" is the entry `colours` of the ENCODERS, or else
    the variable, of ./my_module.py. Raises UserError on an unknown kind."""
    module, colon, name = kind.partition(":")
    if colon and module.isidentifier():
        names = user_module(Path(f"{module}.py").absolute())
        entry = {**names, **names.get("ENCODERS", {})}.get(name)
        if not isinstance(entry, tuple) or not 2 <= len(entry) <= len(Encoder._fields):
            raise UserError(f"model.encoder.kind: {module}.py has no encoder {name!r}")
        return Encoder(*entry)
    known = kinds()
    if kind not in known:
        reason = f"unknown {kind!r}{nearest(kind, known)}; known: {', '.join(known)}"
        raise UserError(f"model.encoder.kind: {reason}, and MODULE:NAME of ./MODULE.py")
    return known[kind]


class Widened(NamedTuple):
    """An encoder whose width is not the core's."""

    inner: Any
    out: Tensor  # (D of the core, D)


def inner_config(cfg: ModelConfig) -> ModelConfig:
    """The config as the encoder sees it: in its own width, with heads of the core's size."""
    width, head = cfg.encoder.width or cfg.hidden, cfg.hidden // cfg.heads
    if cfg.hidden % cfg.heads or head % 4:
        raise UserError(f"model.heads: must divide hidden = {cfg.hidden} into multiples of 4")
    if width % head:
        raise UserError(f"model.encoder.width: {width} is no multiple of the head size, {head}")
    return msgspec.structs.replace(cfg, hidden=width, heads=width // head)


def latent_of(cfg: ModelConfig) -> int | None:
    """How many numbers a variational encoder draws; None: it draws none."""
    e = cfg.encoder
    return (e.latent or e.width or cfg.hidden) if lookup(e.kind).variational else None


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """All parameters, float32, drawn from the seed. Raises UserError where fields contradict."""
    encoder, inner, e = lookup(cfg.encoder.kind), inner_config(cfg), cfg.encoder
    if encoder.variational and not e.kl_weight > 0:
        raise UserError(f"model.encoder.kl_weight: must be above 0, {e.kind} is variational")
    if (encoder.recur or encoder.asks) and e.cached:
        raise UserError(f"model.encoder.cached: {e.kind} gives more than tokens to read once")
    if cfg.context_tokens == 0 and not cfg.feedback:
        raise UserError("model.context_tokens: must be at least 1")
    if encoder.offers and cfg.loss != "softmax":
        raise UserError(f'model.loss: must be "softmax", {e.kind} gives probabilities')
    if cfg.feedback and (cfg.context_tokens or cfg.loss != "softmax"):
        raise UserError('model.feedback: has no context: context_tokens = 0, loss = "softmax"')
    g = torch.Generator().manual_seed(seed)
    if cfg.feedback:
        return Params((), importlib.import_module(FEEDBACK).init(cfg, g))
    p = encoder.init(inner, g)
    if inner.hidden != cfg.hidden:
        p = Widened(p, normal(g, cfg.hidden, inner.hidden))
    return Params(p, etrm.init_core(cfg, g, encoder.offers))


def encoder_of(cfg: ModelConfig) -> Encode:
    """The config's encoder as `act_step` takes it."""
    if cfg.feedback:
        return Encode(lambda p, batch: (), step=importlib.import_module(FEEDBACK).step)
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
