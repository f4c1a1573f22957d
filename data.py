"""Tasks, symmetries, tokens and episodes: everything between a file of puzzles and a painted batch.

Axes: T tasks, P pairs, Q queries, B slots, K demos of a slot, N demos of all slots, M cells of all
canvases. Tokens as published: 0 PAD, 1 end of grid, 2..11 the colours 0..9.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, UserError

PAD, EOS, FIRST_COLOUR, MAX_SIDE = 0, 1, 2, 30
IGNORE = -100  # label of a cell that is not asked for
PALETTE = ("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00",
           "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")  # fmt: skip


def parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError alone, also where it is nested too deep, names a
    key twice or holds half a character, which could be written nowhere."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as e:
        raise ValueError(str(e)) from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(k for k, _ in pairs)[:200]!r}")
    return value


class Task(NamedTuple):
    """A puzzle on the host: demos and queries as (input, output); a hidden output is None."""

    name: str
    demos: list[tuple[np.ndarray, np.ndarray]]
    queries: list[tuple[np.ndarray, np.ndarray | None]]


def task_digest(task: Task) -> bytes:
    """16 bytes of a task's content, whatever its name."""
    h = hashlib.blake2b(digest_size=16)
    for pairs in (task.demos, task.queries):
        h.update(b"|")
        for grid in itertools.chain(*pairs):
            h.update(b"?" if grid is None else bytes(grid.shape) + grid.astype("uint8").tobytes())
    return h.digest()


# ---------------------------------------------------------------- the symmetry group

# out[i, j] = x[r, c] with (a, b) = (j, i) if swap else (i, j);
# r = h-1-a if flip_r else a; c = w-1-b if flip_c else b.
# Order as published: 0 identity, 1..3 rot90 counter-clockwise, 4 fliplr, 5 flipud, 6 transpose,
# 7 anti-transpose.
SWAP = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
FLIP_R = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
FLIP_C = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
INVERSE = torch.tensor([0, 3, 2, 1, 4, 5, 6, 7])
TURNS = tuple(zip(SWAP.tolist(), FLIP_R.tolist(), FLIP_C.tolist(), strict=True))


def turn(k: int, grid: np.ndarray) -> np.ndarray:
    """The k-th element of D8 applied to one grid (h, w)."""
    swap, flip_r, flip_c = TURNS[k]
    x = grid[::-1] if flip_r else grid
    x = x[:, ::-1] if flip_c else x
    return np.ascontiguousarray(x.T if swap else x)


class Symmetry(NamedTuple):
    """An element of D8 x colour permutations, or a batch of them."""

    dihedral: Tensor  # (...) 0..7
    colours: Tensor  # (..., 10) colour c becomes colours[c]


def identity(*shape: int) -> Symmetry:
    """The element that changes nothing, of any batch shape."""
    colours = torch.arange(10).expand(*shape, 10).contiguous()
    return Symmetry(torch.zeros(shape, dtype=torch.int64), colours)


def inverse(s: Symmetry) -> Symmetry:
    """apply(inverse(s), apply(s, x)) is x."""
    return Symmetry(INVERSE[s.dihedral], s.colours.argsort(-1))


def apply(s: Symmetry, grid: np.ndarray) -> np.ndarray:
    """One symmetry applied to one grid (h, w)."""
    return turn(int(s.dihedral), s.colours.numpy().astype(np.uint8)[grid])


def turned_size(dihedral: Tensor, size: Tensor) -> Tensor:
    """Heights and widths (..., 2) under elements (...) of D8."""
    return torch.where(SWAP[dihedral][..., None], size.flip(-1), size)


# ---------------------------------------------------------------- packed tasks and queries


class Tasks(NamedTuple):
    """A set of tasks as tensors, on the host but for the cells, so that it knows every shape."""

    cells: Tensor  # (n,) u8, every grid once, row by row
    grids: Tensor  # (P, 2, 3) offset, height, width of input and output; height 0: hidden
    first: Tensor  # (T + 1,) first pair of each task; its demos come first, then its queries
    n_demos: Tensor  # (T,)
    task_of: Tensor  # (P,)


def pack(tasks: Sequence[Task], device: torch.device | str = "cpu") -> Tasks:
    """Tasks as tensors, their cells on the device."""
    grids, flat, offset = [], [], 0
    for task in tasks:
        for pair in (*task.demos, *task.queries):
            for grid in pair:
                cells = np.zeros((0, 0), np.uint8) if grid is None else grid.astype(np.uint8)
                grids.append((offset, *cells.shape))
                flat.append(cells.reshape(-1))
                offset += cells.size
    counts = torch.tensor([0] + [len(t.demos) + len(t.queries) for t in tasks])
    n_demos = torch.tensor([len(t.demos) for t in tasks])
    task_of = torch.arange(len(tasks)).repeat_interleave(counts[1:])
    every_cell = torch.from_numpy(np.concatenate(flat)).to(device)
    return Tasks(every_cell, torch.tensor(grids).view(-1, 2, 3), counts.cumsum(0), n_demos, task_of)


class Queries(NamedTuple):
    """The pairs that can be asked, each with a canvas that never depends on its own output."""

    pair: Tensor  # (Q,)
    task: Tensor  # (Q,)
    fits: Tensor  # (Q,) bool: there is a canvas, and the output, if known, fits it
    canvas: Tensor  # (Q, 2) height and width; 0, 0 where none holds its demos and input
    known: Tensor  # (Q,) bool: the output is known


def snug(size: Tensor, cfg: DataConfig) -> Tensor:
    """(..., 2) canvases for contents of these heights and widths; 0, 0 for what is too large."""
    largest = min(cfg.max_side, cfg.canvas or MAX_SIDE)
    canvas = torch.full_like(size, cfg.canvas) if cfg.canvas else size
    return torch.where((size <= largest).all(-1, keepdim=True), canvas, 0)


def queries(tasks: Tasks, rule: str, cfg: DataConfig) -> Queries:
    """Every query that has a demo, and its canvas: the smallest that holds all its demos and its
    input, and the output that the demos foretell where all of them multiply the input's height or
    width by the same number.
    leave_one_out: any pair with a known output is a query, the task's other such pairs its demos.
    test: the official test pairs are the queries, the task's demos their demos."""
    size = tasks.grids[:, :, 1:]  # (P, 2, 2)
    known = size[:, 1, 0] > 0
    number = torch.arange(len(size)) - tasks.first[tasks.task_of]
    is_query = known if rule == "leave_one_out" else number >= tasks.n_demos[tasks.task_of]
    pair = torch.nonzero(is_query).flatten()
    demos = candidates(tasks, pair, rule)
    pair, demos = (x[(demos >= 0).any(1)] for x in (pair, demos))
    is_demo = (demos >= 0)[..., None]
    shown = torch.where(is_demo, size.amax(1)[demos], 0).amax(1)
    shown = torch.maximum(shown, size[pair, 0])  # (Q, 2) as all below
    ratio = (size[:, 1] / size[:, 0].double())[demos]  # of output to input
    largest = torch.where(is_demo, ratio, 0.0).amax(1)
    agree = largest == torch.where(is_demo, ratio, math.inf).amin(1)
    foretold = torch.where(agree, (largest * size[pair, 0]).round(), 0).long()
    canvas = snug(torch.maximum(shown, foretold.clamp(max=MAX_SIDE)), cfg)
    canvas = torch.where(canvas > 0, canvas, snug(shown, cfg))
    fits = (size[pair, 1] <= canvas).all(-1) & (canvas[:, 0] > 0)
    return Queries(pair, tasks.task_of[pair], fits, canvas, known[pair])


def candidates(tasks: Tasks, query: Tensor, rule: str) -> Tensor:
    """(B, M) the pairs that may be demos of each query, -1 beyond their number."""
    task = tasks.task_of[query]
    first, any_pair = tasks.first[task][:, None], rule == "leave_one_out"
    count = tasks.first.diff()[task] if any_pair else tasks.n_demos[task]
    pair = first + torch.arange(max(count.tolist(), default=1))
    may = (pair < first + count[:, None]) & (pair != query[:, None])
    if any_pair:
        may &= tasks.grids[pair.clamp(max=len(tasks.grids) - 1), 1, 1] > 0
    return torch.where(may, pair, -1)


def chosen(asked: Queries, rows: Tensor) -> Queries:
    """Some of the queries, by index or mask."""
    return Queries(*(x[rows] for x in asked))


def donors(asked: Queries, seed: int) -> Tensor:
    """(Q,) for each query the row of another task's, whose demos it is shown instead, fixed by the
    seed. Raises UserError where fewer than two tasks have a canvas, which donors need."""
    rows = torch.nonzero(asked.canvas[:, 0] > 0).flatten()
    tasks = asked.task[rows].unique()
    if len(tasks) < 2:
        raise UserError("data: foreign demos need two tasks that fit a canvas")
    order = tasks[uniform(len(tasks), seed, DONOR).argsort()].tolist()
    next_task = dict(zip(order, order[-1:] + order[:-1], strict=True))
    row_of = dict(zip(asked.task[rows].tolist(), rows.tolist(), strict=True))
    return torch.tensor([row_of[next_task.get(t, order[0])] for t in asked.task.tolist()])


def histogram(sides: Tensor) -> dict[str, int]:
    """How many sides are at most 5, 10, ... 30, each counted once; 0 is none."""
    counts = {n: int(((sides > n - 5) & (sides <= n)).sum()) for n in range(5, MAX_SIDE + 1, 5)}
    return {f"<={n}": count for n, count in counts.items() if count}


class Deck(NamedTuple):
    """What slots draw from: queries from the smallest canvas to the largest. Slot i of B draws from
    the i-th of B equal parts of the weight, so that every batch has the same mixture of sizes."""

    slots: int
    pair: Tensor  # (Q,)
    canvas: Tensor  # (Q, 2)
    cdf: Tensor  # (Q,) f64, ends at 1; a task's weight is spread evenly over its queries


def deck(asked: Queries, slots: int, weight: Tensor | None = None) -> Deck:
    """weight (T,) f64 of each task, by default all the same. Raises UserError without a query."""
    asked = chosen(asked, asked.fits & asked.known)
    if not len(asked.pair):
        raise UserError("data: no query to train on: none with a demo and an output that fits")
    h, w = asked.canvas.T
    asked = chosen(asked, torch.argsort(h * w * 1000 + torch.maximum(h, w), stable=True))
    each = 1.0 / torch.bincount(asked.task).double()
    cdf = (each if weight is None else each * weight[: len(each)])[asked.task].cumsum(0)
    return Deck(slots, asked.pair, asked.canvas, cdf / cdf[-1])


def dealt(d: Deck, u: Tensor, slot: Tensor) -> Tensor:
    """(...) rows of the deck, for uniform numbers in the bands of the slots."""
    share = (slot + u) / d.slots
    return torch.searchsorted(d.cdf, share.contiguous(), right=True).clamp(max=len(d.pair) - 1)


# ---------------------------------------------------------------- counter-based randomness


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) in wrapping int64 arithmetic."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(lanes: int, *counters: Tensor | int) -> Tensor:
    """(..., lanes) float64 in [0, 1): a pure function of the counters (they broadcast) and lane."""
    x = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        x = _mix((x ^ counter) - 7046029254386353131)
    x = _mix(x[..., None] + torch.arange(1, lanes + 1) * -7046029254386353131)
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


EPISODE, EXPLORE, VIEW, DONOR, NOISE, ROW = range(6)  # what a counter is for


# ---------------------------------------------------------------- episodes


class Episodes(NamedTuple):
    """One query with its demos under one symmetry, for each slot: a few dozen integers."""

    query: Tensor  # (B,) pair
    demos: Tensor  # (B, K) pairs, -1 where there is none
    symmetry: Symmetry  # (B,)
    shift: Tensor  # (B, 1 + K, 2) where query and demos lie, as a share of the room left
    canvas: Tensor  # (B, 2) of the query, under the symmetry
    row: Tensor | None = None  # (B,) task * symmetries + k, where each task has so many


def draw_symmetry(u: Tensor, dihedral: bool, colours: str) -> Symmetry:
    """(B, 11) uniform numbers to B symmetries."""
    base = identity(len(u))
    palette = base.colours
    if colours == "all":
        palette = u[:, 1:].argsort(-1)
    elif colours == "keep_black":
        palette = torch.cat((palette[:, :1], u[:, 2:].argsort(-1) + 1), -1)
    return Symmetry((u[:, 0] * 8).long() if dihedral else base.dihedral, palette)


def row_symmetry(cfg: DataConfig, seed: int, task: Tensor, k: Tensor) -> Symmetry:
    """The k-th symmetry (B,) of each task (B,), whoever asks; the first changes nothing."""
    base = identity(len(task))
    s = draw_symmetry(uniform(11, seed, ROW, task, k), cfg.dihedral, cfg.colours)
    colours = torch.where((k == 0)[:, None], base.colours, s.colours)
    return Symmetry(torch.where(k == 0, base.dihedral, s.dihedral), colours)


def choose_demos(possible: Tensor, u: Tensor, k: int) -> Tensor:
    """(B, M) candidates to (B, <= k) demos in an order given by numbers u (B, M) below 2."""
    order = torch.where(possible >= 0, u, 2.0).argsort(-1)[:, :k]
    return possible.gather(-1, order)


def draw(tasks: Tasks, d: Deck, cfg: DataConfig, seed: int, slot: Tensor, n: Tensor) -> Episodes:
    """The n-th episode of each slot (global ids): a pure function of (seed, slot, n)."""
    u = uniform(16, seed, EPISODE, slot, n)
    asked = dealt(d, u[:, 0], slot)
    query = d.pair[asked]
    possible = candidates(tasks, query, cfg.query)
    lots = uniform(1 + possible.shape[1], seed, EPISODE, slot, n, 1)
    demos = choose_demos(possible, lots[:, 1:], cfg.max_demos)
    shift = uniform(2 * (1 + demos.shape[1]), seed, EPISODE, slot, n, 2).view(len(query), -1, 2)
    symmetry, row = draw_symmetry(u[:, 1:12], cfg.dihedral, cfg.colours), None
    if cfg.symmetries:
        task, k = tasks.task_of[query], (u[:, 12] * cfg.symmetries).long()
        symmetry, row = row_symmetry(cfg, seed, task, k), task * cfg.symmetries + k
    canvas = turned_size(symmetry.dihedral, d.canvas[asked])
    return Episodes(query, demos, symmetry, shift if cfg.translate else shift * 0, canvas, row)


View = tuple[Symmetry, Tensor]  # (B,), and (B, M) numbers that order the demos


def posed(
    tasks: Tasks, cfg: DataConfig, rule: str, asked: Queries, view: View | None = None
) -> Episodes:
    """Queries as evaluation asks them: no offset, by default no symmetry and demos in order."""
    possible = candidates(tasks, asked.pair, rule)
    slots, most = possible.shape
    symmetry, lots = view or (identity(slots), torch.arange(most).expand(slots, -1) / 1e4)
    demos = choose_demos(possible, lots, cfg.max_demos)
    shift = torch.zeros(slots, 1 + demos.shape[1], 2, dtype=torch.float64)
    canvas = turned_size(symmetry.dihedral, asked.canvas)
    return Episodes(asked.pair, demos, symmetry, shift, canvas)


# ---------------------------------------------------------------- painting


class Demos(NamedTuple):
    """The demo pairs of all slots, from small to large; each on its own canvas, row by row."""

    inputs: Tensor  # (M,) tokens
    outputs: Tensor  # (M,) tokens
    at: Tensor  # (M, 2) row and column of each cell on the raster
    cells: tuple[int, ...]  # of each demo
    owner: Tensor  # (N,) the slot
    number: Tensor  # (N,) of the demo among its slot's
    most: int  # K, places for the demos of a slot; with leave-one-out one is empty
    by_slot: Tensor  # (M,) cells ordered by slot
    slot_cells: tuple[int, ...]  # of all demos of each slot


class Batch(NamedTuple):
    """What the model sees: the canvases of all slots, row by row, slot after slot."""

    inputs: Tensor  # (M,) tokens
    labels: Tensor  # (M,) tokens, IGNORE where nothing is asked
    at: Tensor  # (M, 2) row and column of each cell on the raster
    cells: tuple[int, ...]  # of each slot
    demos: Demos
    noise: Tensor | None = None  # (B, K, latent) standard normal, for a variational encoder
    rows: Tensor | None = None  # (B,) each slot's row of a table of tasks


class Painted(NamedTuple):
    """Pairs on canvases, row by row, one after the other."""

    inputs: Tensor  # (M,) tokens
    outputs: Tensor  # (M,) tokens
    at: Tensor  # (M, 2) row and column of each cell on the raster


def ragged(sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(total,) the owner of each item of owners of these sizes, and the item's number in it."""
    owner = torch.repeat_interleave(sizes, output_size=total)
    return owner, torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes)[owner]


def paint(
    tasks: Tasks, pair: Tensor, sym: Symmetry, shift: Tensor, canvas: Tensor, raster: int = MAX_SIDE
) -> Painted:
    """Pairs (m,) under symmetries (m,), shifted (m, 2) on canvases (m, 2).
    As published: a row of EOS right below the grid and a column right of it, no corner, none
    beyond the canvas; input and output share an offset, floor(shift * (room + 1)) with the room
    that the larger of both leaves. The canvas lies on the raster by the same rule."""
    dihedral = sym.dihedral[:, None]
    swap, flip_r, flip_c = SWAP[dihedral], FLIP_R[dihedral], FLIP_C[dihedral]
    start, height, width = tasks.grids[pair].unbind(-1)  # (m, 2): input, output
    size = turned_size(dihedral, tasks.grids[pair, :, 1:])  # (m, 2, 2)
    offset = (shift * ((canvas - size.amax(1)).clamp(min=0) + 1)).long()
    origin = (shift * (raster - canvas + 1).clamp(min=1)).long()
    down, along = torch.where(flip_r, -width, width), torch.where(flip_c, -1, 1)
    per_row, per_column = torch.where(swap, along, down), torch.where(swap, down, along)
    corner = torch.where(flip_r, (height - 1) * width, 0) + torch.where(flip_c, width - 1, 0)
    source = start + corner - per_row * offset[:, :1] - per_column * offset[:, 1:]
    end = (size + offset[:, None]).flatten(1)
    # A cell's colour is one gather from the packed grids, affine in its row and column. From here
    # on the device: facts (m, 14) become those of every cell, (14, M).
    facts = torch.cat((offset, origin, source, per_row, per_column, end), 1)
    device, area = tasks.cells.device, canvas.prod(1)
    of, number = ragged(area.to(device), int(area.sum()))
    side = canvas[:, 1].to(device)[of]
    i, j = number // side, number % side
    top, left, row_0, column_0, *rest = facts.to(device).T.contiguous()[:, of]
    palette, tokens = (sym.colours + FIRST_COLOUR).flatten().to(device), []
    for k in range(2):
        first, step_i, step_j, bottom, right = (*rest[k:6:2], *rest[6 + 2 * k : 8 + 2 * k])
        in_rows, in_columns = (i >= top) & (i < bottom), (j >= left) & (j < right)
        inside = in_rows & in_columns
        colour = tasks.cells[torch.where(inside, first + step_i * i + step_j * j, 0)]
        mark = ((i == bottom) & in_columns) | ((j == right) & in_rows)
        tokens.append(torch.where(inside, palette[of * 10 + colour], mark.long() * EOS))
    return Painted(tokens[0], tokens[1], torch.stack((row_0 + i, column_0 + j), 1))


def batch(tasks: Tasks, e: Episodes, raster: int = MAX_SIDE) -> Batch:
    """Episodes painted; each demo on the smallest canvas that holds it."""
    asked = paint(tasks, e.query, e.symmetry, e.shift[:, 0], e.canvas, raster)
    owner, number = torch.nonzero(e.demos >= 0, as_tuple=True)
    dihedral = e.symmetry.dihedral[owner]
    size = turned_size(dihedral[:, None], tasks.grids[e.demos[owner, number], :, 1:])  # (N, 2, 2)
    canvas = size.amax(1)
    gaps = ~(size == canvas[:, None]).all(-1).any(1)  # cells that hold neither input nor output
    order = torch.argsort(canvas.prod(1) * 2 + gaps, stable=True)
    owner, number, canvas = owner[order], number[order], canvas[order]
    sym = Symmetry(dihedral[order], e.symmetry.colours[owner])
    shift = e.shift[owner, 1 + number]
    shown = paint(tasks, e.demos[owner, number], sym, shift, canvas, raster)
    area = canvas.prod(1)
    by_slot = torch.argsort(owner.repeat_interleave(area), stable=True)
    orders = {"owner": owner, "number": number, "by_slot": by_slot}
    slot_cells = torch.zeros(len(e.query), dtype=torch.int64).index_add_(0, owner, area)
    demos = Demos(
        **shown._asdict(),
        **{k: x.to(shown.at.device) for k, x in orders.items()},
        cells=tuple(area.tolist()),
        most=e.demos.shape[1],
        slot_cells=tuple(slot_cells.tolist()),
    )
    labels = asked.outputs.masked_fill(asked.outputs == PAD, IGNORE)
    cells = tuple(e.canvas.prod(1).tolist())
    rows = None if e.row is None else e.row.to(labels.device)
    return Batch(asked.inputs, labels, asked.at, cells, demos, rows=rows)


def tokenise(grid: np.ndarray, canvas: Sequence[int], offset: Sequence[int] = (0, 0)) -> np.ndarray:
    """One grid as tokens of a canvas, the plain way; `paint` is tested against it."""
    (h, w), (r, c) = grid.shape, offset
    out = np.zeros(canvas, np.uint8)
    out[r : r + h, c : c + w] = grid + FIRST_COLOUR
    out[r + h : r + h + 1, c : c + w] = EOS
    out[r : r + h, c + w : c + w + 1] = EOS
    return out


def crop(tokens: np.ndarray) -> np.ndarray:
    """The largest all-colour rectangle anchored at the top left, the first of several equally large
    ones; may be empty. As published."""
    width = np.minimum.accumulate(np.logical_and.accumulate(tokens >= FIRST_COLOUR, axis=1).sum(1))
    rows = int(np.argmax(width * np.arange(1, len(tokens) + 1))) + 1
    columns = width[rows - 1]
    return tokens[:rows, :columns] - FIRST_COLOUR if columns else tokens[:0, :0]


def untokenise(tokens: np.ndarray) -> np.ndarray | None:
    """The grid on a canvas; None where it is empty or a colour lies where its border must be."""
    grid = crop(tokens)
    h, w = grid.shape
    border = np.concatenate((tokens[h : h + 1, :w].ravel(), tokens[:h, w : w + 1].ravel()))
    return None if grid.size == 0 or (border >= FIRST_COLOUR).any() else grid
