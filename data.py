"""Tasks, symmetries, tokens and episodes: everything between a file of puzzles and a painted batch.

Axes: T tasks, P pairs, Q queries, B slots, K demos of a slot, N demos of all slots, M cells of all canvases.
Tokens as published: 0 PAD, 1 end of grid, 2..11 the colours 0..9.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, UserError

PAD, EOS, FIRST_COLOUR, MAX_SIDE = 0, 1, 2, 30
IGNORE = -100  # label of a cell that is not asked for
PALETTE = (
    "#000000",
    "#0074D9",
    "#FF4136",
    "#2ECC40",
    "#FFDC00",
    "#AAAAAA",
    "#F012BE",
    "#FF851B",
    "#7FDBFF",
    "#870C25",
)  # ARC's


def parsed(text: str | bytes) -> Any:
    """What JSON says, NaN too. Raises ValueError alone: also where it is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError(str(e)) from None


class Task(NamedTuple):
    """A puzzle on the host: its demos and queries as (input, output) grids; a hidden output is None."""

    name: str
    demos: list[tuple[np.ndarray, np.ndarray]]
    queries: list[tuple[np.ndarray, np.ndarray | None]]


# ---------------------------------------------------------------- the symmetry group

# out[i, j] = x[r, c] with (a, b) = (j, i) if swap else (i, j); r = h-1-a if flip_r else a; c = w-1-b if flip_c else b.
# Order as published: 0 identity, 1..3 rot90 counter-clockwise, 4 fliplr, 5 flipud, 6 transpose, 7 anti-transpose.
SWAP = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
FLIP_R = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
FLIP_C = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
INVERSE = torch.tensor([0, 3, 2, 1, 4, 5, 6, 7])


def _compose_table() -> Tensor:
    """COMPOSE[i, j] is the element 'first i, then j', found from where two distinct corners of a square go."""
    probe = torch.arange(4).view(2, 2)

    def act(k: int, x: Tensor) -> Tensor:
        x = x.flip(0) if FLIP_R[k] else x
        x = x.flip(1) if FLIP_C[k] else x
        return x.T if SWAP[k] else x

    images = {tuple(act(k, probe).flatten().tolist()): k for k in range(8)}
    return torch.tensor(
        [
            [images[tuple(act(j, act(i, probe)).flatten().tolist())] for j in range(8)]
            for i in range(8)
        ]
    )


COMPOSE = _compose_table()


class Symmetry(NamedTuple):
    """An element of D8 x colour permutations, or a batch of them."""

    dihedral: Tensor  # (...) 0..7
    colours: Tensor  # (..., 10) colour c becomes colours[c]


def identity(*shape: int) -> Symmetry:
    return Symmetry(
        torch.zeros(shape, dtype=torch.int64), torch.arange(10).expand(*shape, 10).contiguous()
    )


def compose(first: Symmetry, then: Symmetry) -> Symmetry:
    """apply(compose(a, b), x) == apply(b, apply(a, x))"""
    return Symmetry(COMPOSE[first.dihedral, then.dihedral], then.colours.gather(-1, first.colours))


def inverse(s: Symmetry) -> Symmetry:
    return Symmetry(INVERSE[s.dihedral], s.colours.argsort(-1))


def apply(s: Symmetry, grid: np.ndarray) -> np.ndarray:
    """One symmetry applied to one grid (h, w)."""
    return turn(int(s.dihedral), s.colours.numpy().astype(np.uint8)[grid])


TURNS = tuple(zip(SWAP.tolist(), FLIP_R.tolist(), FLIP_C.tolist(), strict=True))


def turn(k: int, grid: np.ndarray) -> np.ndarray:
    """The k-th element of D8 applied to one grid (h, w)."""
    swap, flip_r, flip_c = TURNS[k]
    x = grid[::-1] if flip_r else grid
    x = x[:, ::-1] if flip_c else x
    return np.ascontiguousarray(x.T if swap else x)


# ---------------------------------------------------------------- packed tasks and queries


class Tasks(NamedTuple):
    """A set of tasks as tensors: every grid once, row by row, in one flat array."""

    cells: Tensor  # (n,) u8
    grids: Tensor  # (P, 2, 3) offset, height, width of a pair's input and output; a hidden output has height 0
    first: Tensor  # (T + 1,) first pair of each task; its demos come first, then its queries
    n_demos: Tensor  # (T,)
    task_of: Tensor  # (P,)


def pack(tasks: Sequence[Task], device: torch.device | str = "cpu") -> Tasks:
    """The cells on the device, for they are read where they are painted; the rest on the host, which so knows every shape."""
    grids, flat, offset = [], [], 0
    for task in tasks:
        for pair in (*task.demos, *task.queries):
            for grid in pair:
                h, w = (0, 0) if grid is None else grid.shape
                grids.append((offset, h, w))
                offset += h * w
                if grid is not None:
                    flat.append(grid.reshape(-1))
    counts = torch.tensor([0] + [len(t.demos) + len(t.queries) for t in tasks])
    return Tasks(
        torch.from_numpy(np.concatenate(flat)).to(device),
        torch.tensor(grids).view(-1, 2, 3),
        counts.cumsum(0),
        torch.tensor([len(t.demos) for t in tasks]),
        torch.arange(len(tasks)).repeat_interleave(counts[1:]),
    )


class Queries(NamedTuple):
    """What can be asked: pairs, each with its canvas, which never depends on the pair's own output."""

    pair: Tensor  # (Q,)
    task: Tensor  # (Q,)
    fits: Tensor  # (Q,) bool, whether the output (known or hidden: height 0) fits the canvas; false where there is none
    canvas: Tensor  # (Q, 2) height and width, 0 where none holds its demos and input
    known: Tensor  # (Q,) bool, whether the output is known


def snug(size: Tensor, sides: Sequence[int]) -> Tensor:
    """(..., 2) heights and widths rounded up to the sides a canvas may have (none given: 1..30); 0, 0 where too large."""
    there = torch.tensor([*(sorted(sides) or range(1, MAX_SIDE + 1)), 0])
    canvas = there[torch.searchsorted(there[:-1], size.contiguous())]
    return torch.where((canvas > 0).all(-1, keepdim=True), canvas, 0)


def queries(tasks: Tasks, rule: str, canvases: Sequence[int]) -> Queries:
    """Every (task, query) and its canvas: the smallest height and width that hold all its demos and the query's input,
    and the output that the demos foretell where all of them multiply the input's height or width by the same number.

    leave_one_out: any pair with a known output is a query, all other such pairs of the task are its demos.
    test: the official test pairs are the queries, the task's demos their demos.
    A query that has no demo is left out.
    """
    size = tasks.grids[:, :, 1:]  # (P, 2, 2)
    known = size[:, 1, 0] > 0
    place = torch.arange(len(size)) - tasks.first[tasks.task_of]
    is_demo = known if rule == "leave_one_out" else place < tasks.n_demos[tasks.task_of]
    asked = known if rule == "leave_one_out" else ~is_demo
    others = torch.stack(
        [_largest_other(tasks, torch.where(is_demo, size[:, :, i].amax(1), 0)) for i in (0, 1)], -1
    )
    ratio = torch.where(is_demo[:, None], size[:, 1] / size[:, 0].double(), 0.0)
    grows = torch.stack([_largest_other(tasks, ratio[:, i]) for i in (0, 1)], -1)
    shrinks = torch.stack(
        [_largest_other(tasks, (1 / ratio[:, i]).nan_to_num(posinf=0.0)) for i in (0, 1)], -1
    )
    foretold = (
        torch.where((grows * shrinks - 1).abs() < 1e-9, (grows * size[:, 0]).round(), 0)
        .long()
        .clamp(max=MAX_SIDE)
    )
    pair = torch.nonzero(asked & (others[:, 0] > 0)).flatten()
    shown = torch.maximum(others[pair], size[pair, 0])
    canvas = snug(torch.maximum(shown, foretold[pair]), canvases)
    canvas = torch.where(canvas > 0, canvas, snug(shown, canvases))
    fits = (size[pair, 1] <= canvas).all(-1) & (canvas[:, 0] > 0)
    return Queries(pair, tasks.task_of[pair], fits, canvas, known[pair])


def _largest_other(tasks: Tasks, value: Tensor) -> Tensor:
    """(P,) the largest value among the *other* pairs of each pair's task: the largest, or the second for the largest."""
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(tasks.task_of[order], stable=True)]
    top = order[tasks.first[:-1]]
    rest = value.clone()
    rest[top] = 0
    second = torch.zeros(len(tasks.n_demos), dtype=value.dtype).scatter_reduce(
        0, tasks.task_of, rest, "amax"
    )
    return torch.where(
        top[tasks.task_of] == torch.arange(len(value)),
        second[tasks.task_of],
        value[top][tasks.task_of],
    )


def donors(asked: Queries, seed: int) -> Tensor:
    """(Q,) for each query a row whose task is another one, fixed by the seed: whose demos it is shown instead. Only those of
    queries that have a canvas are: what the model never saw the size of says nothing of whether it reads."""
    fit = asked.canvas[:, 0] > 0
    tasks = asked.task[fit].unique()
    if len(tasks) < 2:
        raise UserError(
            f"eval.foreign: needs two tasks that fit a canvas, there is {('none', 'one')[len(tasks)]}"
        )
    order = tasks[uniform(len(tasks), seed, DONOR).argsort()]
    other = dict(zip(order.tolist(), order.roll(1).tolist(), strict=True))
    rows = {
        t: i
        for i, (t, fits) in enumerate(zip(asked.task.tolist(), fit.tolist(), strict=True))
        if fits
    }
    return torch.tensor([rows[other.get(t, int(order[0]))] for t in asked.task.tolist()])


def histogram(sides: Tensor) -> dict[str, int]:
    """How many sides are at most 5, 10, ... 30, each counted once; 0 is none."""
    found = {
        f"<={n}": int(((sides > n - 5) & (sides <= n)).sum()) for n in range(5, MAX_SIDE + 1, 5)
    }
    return {k: n for k, n in found.items() if n}


def chosen(asked: Queries, rows: Tensor) -> Queries:
    """Some of them, by index or mask."""
    return Queries(*(x[rows] for x in asked))


class Deck(NamedTuple):
    """What the slots of a batch draw from: queries from the smallest canvas to the largest. Slot i of B draws from its
    band, the i-th of B equal parts of their weight, so that every batch has the same mixture of sizes and of cost."""

    slots: int
    pair: Tensor  # (Q,)
    canvas: Tensor  # (Q, 2)
    cdf: Tensor  # (Q,) f64, ends at 1; the weight of a task is spread evenly over its queries


def deck(asked: Queries, slots: int, weight: Tensor | None = None) -> Deck:
    """weight (T,) f64 of each task, the same for all by default. Raises UserError when nothing can be trained on."""
    asked = chosen(asked, asked.fits & asked.known)
    if not len(asked.pair):
        raise UserError(
            "data: no query to train on: every task needs two pairs and an output that fits its canvas"
        )
    h, w = asked.canvas.T
    asked = chosen(asked, torch.argsort(h * w * 1000 + torch.maximum(h, w), stable=True))
    each = 1.0 / torch.bincount(asked.task).double()
    cdf = (each if weight is None else each * weight[: len(each)])[asked.task].cumsum(0)
    return Deck(slots, asked.pair, asked.canvas, cdf / cdf[-1])


def dealt(d: Deck, u: Tensor, slot: Tensor) -> Tensor:
    """(...) rows of the deck, for uniform numbers in the bands of the slots."""
    at = (slot + u) / d.slots
    return torch.searchsorted(d.cdf, at.contiguous(), right=True).clamp(max=len(d.pair) - 1)


# ---------------------------------------------------------------- counter-based randomness


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) in wrapping int64 arithmetic."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(lanes: int, *counters: Tensor | int) -> Tensor:
    """(..., lanes) float64 in [0, 1): a pure function of the counters, which broadcast; lane i ignores `lanes`."""
    x = torch.zeros((), dtype=torch.int64)
    for c in counters:
        x = _mix((x ^ c) - 7046029254386353131)
    x = _mix(x[..., None] + torch.arange(1, lanes + 1) * -7046029254386353131)
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


EPISODE, EXPLORE, VIEW, DONOR, NOISE, ROW = range(6)  # what a counter is for


# ---------------------------------------------------------------- episodes


class Episodes(NamedTuple):
    """One query with its demos under one symmetry, for each slot: a few dozen integers."""

    query: Tensor  # (B,) pair
    demos: Tensor  # (B, K) pairs, -1 where there is none
    symmetry: Symmetry  # (B,)
    shift: Tensor  # (B, 1 + K, 2) where the query and each demo lie, as a share of the room left
    canvas: Tensor  # (B, 2) of the query, under the symmetry
    row: Tensor | None = None  # (B,) task * symmetries + k, where each task has so many
    further: Tensor | None = None  # (B,) the element of D8 that turns outputs once more


def candidates(tasks: Tasks, query: Tensor, rule: str) -> Tensor:
    """(B, M) the pairs that may be demos of each query, -1 beyond their number."""
    task = tasks.task_of[query]
    count = (
        tasks.first[task + 1] - tasks.first[task]
        if rule == "leave_one_out"
        else tasks.n_demos[task]
    )
    pair = tasks.first[task][:, None] + torch.arange(int(count.max()))
    shown = (pair < (tasks.first[task] + count)[:, None]) & (pair != query[:, None])
    if rule == "leave_one_out":
        shown &= tasks.grids[pair.clamp(max=len(tasks.grids) - 1), 1, 1] > 0
    return torch.where(shown, pair, -1)


def draw_symmetry(u: Tensor, dihedral: bool, colours: str) -> Symmetry:
    """(B, 11) uniform numbers to B symmetries."""
    base = identity(len(u))
    if colours == "all":
        palette = u[:, 1:].argsort(-1)
    elif colours == "keep_black":
        palette = torch.cat((base.colours[:, :1], u[:, 2:].argsort(-1) + 1), -1)
    else:
        palette = base.colours
    return Symmetry((u[:, 0] * 8).long() if dihedral else base.dihedral, palette)


def row_symmetry(cfg: DataConfig, seed: int, task: Tensor, k: Tensor) -> Symmetry:
    """The k-th symmetry of each task (B,), whoever asks; the first changes nothing."""
    s, none = (
        draw_symmetry(uniform(11, seed, ROW, task, k), cfg.dihedral, cfg.colours),
        identity(len(task)),
    )
    return Symmetry(
        torch.where(k == 0, none.dihedral, s.dihedral),
        torch.where((k == 0)[:, None], none.colours, s.colours),
    )


def choose_demos(possible: Tensor, u: Tensor, k: int, least: int = 0) -> Tensor:
    """(B, M) candidates to (B, <= k) demos in random order; u (B, 1 + M). With `least`, a random number of them."""
    there = possible >= 0
    order = torch.where(there, u[:, 1:], 2.0).argsort(-1)[:, :k]
    chosen = possible.gather(-1, order)
    if least:
        most = there.sum(-1).clamp(max=k)
        fewest = most.clamp(max=least)
        count = fewest + (u[:, 0] * (most - fewest + 1)).long()
        chosen = torch.where(torch.arange(chosen.shape[1]) < count[:, None], chosen, -1)
    return chosen


def turned(dihedral: Tensor, size: Tensor) -> Tensor:
    """Heights and widths (..., 2) under elements (...) of D8."""
    return torch.where(SWAP[dihedral][..., None], size.flip(-1), size)


def draw(tasks: Tasks, d: Deck, cfg: DataConfig, seed: int, slot: Tensor, n: Tensor) -> Episodes:
    """The n-th episode of each slot (global ids): a pure function of (seed, slot, n), whoever asks."""
    u = uniform(16, seed, EPISODE, slot, n)
    row = dealt(d, u[:, 0], slot)
    query = d.pair[row]
    possible = candidates(tasks, query, cfg.query)
    lots = uniform(1 + possible.shape[1], seed, EPISODE, slot, n, 1)
    demos = choose_demos(possible, lots, cfg.max_demos, cfg.min_demos)
    shift = uniform(2 * (1 + demos.shape[1]), seed, EPISODE, slot, n, 2).view(len(query), -1, 2)
    symmetry, drawn = draw_symmetry(u[:, 1:12], cfg.dihedral, cfg.colours), None
    if cfg.symmetries:
        task, k = tasks.task_of[query], (u[:, 12] * cfg.symmetries).long()
        symmetry, drawn = row_symmetry(cfg, seed, task, k), task * cfg.symmetries + k
    shift = shift if cfg.translate else shift * 0
    canvas, further = turned(symmetry.dihedral, d.canvas[row]), None
    if cfg.turn_outputs:
        w = uniform(2, seed, EPISODE, slot, n, 3)
        further = torch.where(w[:, 0] < cfg.turn_outputs, (w[:, 1] * 8).long(), 0)
        canvas = torch.where(SWAP[further][:, None], canvas.amax(1, keepdim=True), canvas)
    return Episodes(query, demos, symmetry, shift, canvas, drawn, further)


def posed(
    tasks: Tasks,
    cfg: DataConfig,
    rule: str,
    asked: Queries,
    shown: Tensor | None = None,
    view: tuple[Symmetry, Tensor] | None = None,
) -> Episodes:
    """Queries as evaluation asks them: no offset; a view gives symmetries and lots (B, 1 + M) for the order of demos,
    else the task is as it is. `shown`: pairs whose task's demos are shown instead."""
    demos = candidates(tasks, asked.pair if shown is None else shown, rule)
    symmetry, lots = view or (
        identity(len(asked.pair)),
        torch.arange(demos.shape[1] + 1).expand(len(asked.pair), -1) / 1e4,
    )
    demos = choose_demos(demos, lots, cfg.max_demos)
    shift = torch.zeros(len(asked.pair), 1 + demos.shape[1], 2, dtype=torch.float64)
    return Episodes(asked.pair, demos, symmetry, shift, turned(symmetry.dihedral, asked.canvas))


# ---------------------------------------------------------------- painting


class Demos(NamedTuple):
    """The demo pairs of all slots, by size; each lies on a canvas of its own, row by row."""

    inputs: Tensor  # (M,) tokens
    outputs: Tensor  # (M,) tokens
    at: Tensor  # (M, 2) row and column of each cell
    cells: tuple[int, ...]  # of each demo
    gaps: tuple[int, ...]  # of each demo, whether some of its cells hold neither input nor output
    owner: Tensor  # (N,) the slot
    place: Tensor  # (N,) its place among the slot's demos
    most: int  # K, the most demos of any slot of the batch
    by_slot: Tensor  # (M,) cells ordered by slot
    cells_of: tuple[int, ...]  # of all demos of each slot
    borders: Tensor  # (M, 4) as those of a batch


class Batch(NamedTuple):
    """What the model sees: the canvases of all slots, row by row, slot after slot."""

    inputs: Tensor  # (M,) tokens
    labels: Tensor  # (M,) tokens, IGNORE where nothing is asked
    at: Tensor  # (M, 2) row and column of each cell on the raster
    cells: tuple[int, ...]  # of each slot
    demos: Demos
    borders: Tensor  # (M, 4) of each cell, 1 + the input's cells above, left of, below and right of it; 0: it lies beyond
    noise: Tensor | None = (
        None  # (B, demos, latent) standard normal, for a variational encoder; None: the mean
    )
    rows: Tensor | None = None  # (B,) each slot's row of a table of tasks
    other: Tensor | None = None  # (B,) bool: proposals are to be the demos' second answer


def both_sides(sym: Symmetry, further: Tensor | None) -> Tensor:
    """(m, 2) the elements of D8 that turn inputs and outputs."""
    return torch.stack(
        (sym.dihedral, sym.dihedral if further is None else COMPOSE[sym.dihedral, further]), 1
    )


def paint(
    tasks: Tasks,
    pair: Tensor,
    sym: Symmetry,
    shift: Tensor,
    canvas: Tensor,
    raster: int = MAX_SIDE,
    further: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs (m,) under symmetries (m,) on canvases (m, 2): tokens (M,) of inputs, of outputs, their raster positions and how
    far they are from the borders of the input.

    Grid and marks as published: a row of EOS right below the grid and a column right of it, no corner, none beyond
    the canvas; input and output share an offset, floor(shift * (room + 1)) with the room left by the larger of both.
    The canvas itself lies on the raster by the same rule. A cell's colour is one gather from the packed grids: where
    it is read is affine in the cell's row and column.
    """
    dihedral = both_sides(sym, further)  # (m, 2) as all that follows: input, output
    swap, flips = SWAP[dihedral], (FLIP_R[dihedral], FLIP_C[dihedral])
    start, h, w = tasks.grids[pair].unbind(-1)
    size = turned(dihedral, tasks.grids[pair, :, 1:])  # (m, 2, 2)
    offset = (shift * ((canvas - size.amax(1)).clamp(min=0) + 1)).long()
    origin = (shift * (raster - canvas + 1).clamp(min=1)).long()
    down, along = torch.where(flips[0], -w, w), torch.where(flips[1], -1, 1)
    base = start + torch.where(flips[0], (h - 1) * w, 0) + torch.where(flips[1], w - 1, 0)
    per_row, per_column = torch.where(swap, along, down), torch.where(swap, down, along)
    base = base - per_row * offset[:, :1] - per_column * offset[:, 1:]
    end = size + offset[:, None]
    facts = torch.cat((offset, origin, base, per_row, per_column, end.flatten(1)), 1)
    device, total, area = tasks.cells.device, int(canvas.prod(1).sum()), canvas.prod(1)
    of = torch.arange(len(pair)).repeat_interleave(area, output_size=total).to(device)
    cell = torch.arange(total, device=device) - (area.cumsum(0) - area).to(device)[of]
    top, left, r0, c0, *rest = facts.to(device).T.contiguous()[:, of]
    width = canvas[:, 1].to(device)[of]
    i, j = cell // width, cell % width
    palette, painted = (sym.colours + FIRST_COLOUR).flatten().to(device), []
    in_rows, in_columns = i >= top, j >= left
    for side in range(2):
        first, step_i, step_j, bottom, right = (
            rest[side],
            rest[2 + side],
            rest[4 + side],
            rest[6 + 2 * side],
            rest[7 + 2 * side],
        )
        in_row, in_column = in_rows & (i < bottom), in_columns & (j < right)
        inside = in_row & in_column
        colour = tasks.cells[torch.where(inside, first + step_i * i + step_j * j, 0)]
        mark = ((i == bottom) & in_column) | ((j == right) & in_row)
        painted.append(torch.where(inside, palette[of * 10 + colour], mark.long() * EOS))
    borders = (
        torch.stack((i - top, j - left, rest[6] - 1 - i, rest[7] - 1 - j), 1).clamp(-1, raster - 1)
        + 1
    )
    return painted[0], painted[1], torch.stack((r0 + i, c0 + j), 1), borders


def batch(tasks: Tasks, e: Episodes, cfg: DataConfig, raster: int = MAX_SIDE) -> Batch:
    """Paint episodes; the cells of grids lie where they are painted, all else on the host, which so knows every shape."""
    x, y, at, borders = paint(
        tasks, e.query, e.symmetry, e.shift[:, 0], e.canvas, raster, e.further
    )
    owner, place = torch.nonzero(e.demos >= 0, as_tuple=True)
    size = turned(
        both_sides(e.symmetry, e.further)[owner], tasks.grids[e.demos[owner, place], :, 1:]
    )  # (N, 2, 2)
    canvas = snug(size.amax(1), cfg.demo_canvases)
    gaps = ~(size == canvas[:, None]).all(-1).any(1)
    order = torch.argsort(canvas.prod(1) * 2 + gaps, stable=True)
    owner, place, canvas, gaps = owner[order], place[order], canvas[order], gaps[order]
    sym = Symmetry(e.symmetry.dihedral[owner], e.symmetry.colours[owner])
    further = None if e.further is None else e.further[owner]
    shown_in, shown_out, shown_at, far = paint(
        tasks, e.demos[owner, place], sym, e.shift[owner, 1 + place], canvas, raster, further
    )
    area = canvas.prod(1)
    by_slot = torch.argsort(owner.repeat_interleave(area), stable=True)
    cells_of = torch.zeros(len(e.query), dtype=torch.int64).index_add_(0, owner, area)
    device = x.device
    return Batch(
        x, y.masked_fill(y == PAD, IGNORE), at, tuple(e.canvas.prod(1).tolist()),
        Demos(
            shown_in, shown_out, shown_at, tuple(area.tolist()), tuple(gaps.int().tolist()), owner.to(device), place.to(device),
            e.demos.shape[1], by_slot.to(device), tuple(cells_of.tolist()), far,
        ),
        borders,
        rows=None if e.row is None else e.row.to(device),
    )  # fmt: skip


def tokenise(
    grid: np.ndarray, canvas: tuple[int, int], offset: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """One grid as tokens of a canvas, the plain way; `paint` is tested against it."""
    (h, w), (r, c) = grid.shape, offset
    out = np.zeros(canvas, np.uint8)
    out[r : r + h, c : c + w] = grid + FIRST_COLOUR
    out[r + h : r + h + 1, c : c + w] = EOS
    out[r : r + h, c + w : c + w + 1] = EOS
    return out


def crop(tokens: np.ndarray) -> np.ndarray:
    """As published: the largest all-colour rectangle anchored at the top left, columns shrinking row by row; may be empty."""
    width = np.minimum.accumulate(np.logical_and.accumulate(tokens >= FIRST_COLOUR, axis=1).sum(1))
    rows = int(np.argmax(width * np.arange(1, len(tokens) + 1))) + 1
    return (
        tokens[:rows, : width[rows - 1]] - FIRST_COLOUR
        if width[rows - 1]
        else np.zeros((0, 0), tokens.dtype)
    )


def untokenise(tokens: np.ndarray) -> np.ndarray | None:
    """The grid on a canvas (height, width), or None (no answer) when it is empty or a colour stands where its border must be."""
    grid = crop(tokens)
    h, w = grid.shape
    border = np.concatenate((tokens[h : h + 1, :w].ravel(), tokens[:h, w : w + 1].ravel()))
    return None if grid.size == 0 or (border >= FIRST_COLOUR).any() else grid
