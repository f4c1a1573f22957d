"""Tasks, symmetries, tokens and episodes: everything between a file of puzzles and a painted batch.

Axes: T tasks, P pairs, Q queries, B slots, K demos of a slot, N demos of all slots, C side of a canvas.
Tokens as published: 0 PAD, 1 end of grid, 2..11 the colours 0..9.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

PAD, EOS, FIRST_COLOUR, MAX_SIDE = 0, 1, 2, 30
IGNORE = -100  # label of a cell that is not asked for


class UserError(Exception):
    """A mistake of the user's, said in one line that names the file, task, key or step."""


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where tasks come from and how episodes are drawn from them."""

    train: tuple[str, ...] = ("arc1:training",)
    dev: tuple[str, ...] = ("arc1:dev",)  # all choices are made on it; never trained on
    held_out: tuple[str, ...] = ("arc1:evaluation",)  # for the final word; never trained on
    policy: Literal["refuse", "drop", "demos"] = "drop"
    guard_min_cells: int = 20  # fewer cells in the pairs that two tasks share are taken for chance
    query: Literal["leave_one_out", "test"] = "leave_one_out"
    max_demos: Annotated[int, msgspec.Meta(ge=1)] = 10
    min_demos: int = 0  # 0: all demos; else each episode draws a subset of at least that many
    canvases: tuple[int, ...] = (10, 15, 20, 30)
    demo_canvases: tuple[int, ...] = (6, 10, 13, 16, 20, 25, 30)
    dihedral: bool = True
    colours: Literal["fixed", "keep_black", "all"] = "keep_black"
    translate: bool = True
    max_train_tasks: int = 0  # 0: all
    max_eval_tasks: int = 0


class Task(NamedTuple):
    """A puzzle on the host: its demos and queries as (input, output) grids; a hidden output is None."""

    name: str
    demos: list[tuple[np.ndarray, np.ndarray]]
    queries: list[tuple[np.ndarray, np.ndarray | None]]


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


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
    return torch.tensor([[images[tuple(act(j, act(i, probe)).flatten().tolist())] for j in range(8)] for i in range(8)])


COMPOSE = _compose_table()


class Symmetry(NamedTuple):
    """An element of D8 x colour permutations, or a batch of them."""

    dihedral: Tensor  # (...) 0..7
    colours: Tensor  # (..., 10) colour c becomes colours[c]


def identity(*shape: int) -> Symmetry:
    return Symmetry(torch.zeros(shape, dtype=torch.int64), torch.arange(10).expand(*shape, 10).contiguous())


def compose(first: Symmetry, then: Symmetry) -> Symmetry:
    """apply(compose(a, b), x) == apply(b, apply(a, x))"""
    return Symmetry(COMPOSE[first.dihedral, then.dihedral], then.colours.gather(-1, first.colours))


def inverse(s: Symmetry) -> Symmetry:
    return Symmetry(INVERSE[s.dihedral], s.colours.argsort(-1))


def apply(s: Symmetry, grid: np.ndarray) -> np.ndarray:
    """One symmetry applied to one grid (h, w)."""
    k, x = int(s.dihedral), s.colours.numpy().astype(np.uint8)[grid]
    x = x[::-1] if FLIP_R[k] else x
    x = x[:, ::-1] if FLIP_C[k] else x
    return np.ascontiguousarray(x.T if SWAP[k] else x)


# ---------------------------------------------------------------- packed tasks and queries


class Tasks(NamedTuple):
    """A set of tasks as tensors: every grid once, row by row, in one flat array."""

    cells: Tensor  # (n,) u8
    grids: Tensor  # (P, 2, 3) offset, height, width of a pair's input and output; a hidden output has height 0
    first: Tensor  # (T + 1,) first pair of each task; its demos come first, then its queries
    n_demos: Tensor  # (T,)
    task_of: Tensor  # (P,)


def pack(tasks: Sequence[Task]) -> Tasks:
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
        torch.from_numpy(np.concatenate(flat)),
        torch.tensor(grids).view(-1, 2, 3),
        counts.cumsum(0),
        torch.tensor([len(t.demos) for t in tasks]),
        torch.arange(len(tasks)).repeat_interleave(counts[1:]),
    )


class Queries(NamedTuple):
    """What can be asked: pairs, each with its pool, which never depends on the pair's own output."""

    pair: Tensor  # (Q,)
    task: Tensor  # (Q,)
    fits: Tensor  # (Q,) bool, whether the output (known or hidden: height 0) fits the canvas; false where there is none
    canvas: Tensor  # (Q,) side of the pool, 0 where no pool holds its demos and input
    known: Tensor  # (Q,) bool, whether the output is known


def queries(tasks: Tasks, rule: str, canvases: Sequence[int]) -> Queries:
    """Every (task, query) and its pool: the smallest canvas that holds all its demos and the query's input.

    leave_one_out: any pair with a known output is a query, all other such pairs of the task are its demos.
    test: the official test pairs are the queries, the task's demos their demos.
    A query that has no demo is left out.
    """
    sides = tasks.grids[:, :, 1:].amax(-1)  # (P, 2)
    known = sides[:, 1] > 0
    place = torch.arange(len(sides)) - tasks.first[tasks.task_of]
    is_demo = known if rule == "leave_one_out" else place < tasks.n_demos[tasks.task_of]
    both = torch.where(is_demo, sides.amax(-1), 0)
    # the largest side among a task's *other* demos: the largest, or the second where the query is the largest itself
    order = torch.argsort(both, descending=True, stable=True)
    order = order[torch.argsort(tasks.task_of[order], stable=True)]
    top = order[tasks.first[:-1]]
    rest = both.clone()
    rest[top] = 0
    second = torch.zeros(len(tasks.n_demos), dtype=both.dtype).scatter_reduce(0, tasks.task_of, rest, "amax")
    others = torch.where(top[tasks.task_of] == torch.arange(len(both)), second[tasks.task_of], both[top][tasks.task_of])
    asked = known if rule == "leave_one_out" else ~is_demo
    pair = torch.nonzero(asked & (others > 0)).flatten()
    side = torch.maximum(others[pair], sides[pair, 0])
    sizes = torch.tensor([*sorted(canvases), 0])  # 0: larger than every pool, never fits
    canvas = sizes[torch.searchsorted(sizes[:-1], side)]
    return Queries(pair, tasks.task_of[pair], (sides[pair, 1] <= canvas) & (canvas > 0), canvas, known[pair])


def known_only(asked: Queries) -> Queries:
    """Those whose output is known."""
    return Queries(*(x[asked.known] for x in asked))


class Pool(NamedTuple):
    """Slots that share a canvas. A task's chance to be drawn is 1, spread evenly over its queries."""

    canvas: int
    slots: int
    pair: Tensor  # (Q,) queries
    cdf: Tensor  # (Q,) f64, ends at 1
    weight: float  # of a slot in the loss: what the pool is owed of the batch / what it has


def pools(asked: Queries, batch: int) -> tuple[Pool, ...]:
    """Deal the slots of a batch to the pools by their share of tasks, at least one each; weights correct the rounding."""
    keep = asked.fits & asked.known
    pair, task, canvas = asked.pair[keep], asked.task[keep], asked.canvas[keep]
    if not len(pair):
        raise UserError("data: no query to train on: every task needs two pairs and an output that fits its canvas")
    weight = 1.0 / torch.bincount(task).double()[task]
    found = [int(c) for c in canvas.unique()]
    if batch < len(found):
        raise UserError(f"train.batch: {batch} slots cannot serve {len(found)} pools (data.canvases), one slot each")
    owed = [float(weight[canvas == c].sum() / weight.sum()) * batch for c in found]
    slots = [max(1, int(o)) for o in owed]
    while sum(slots) != batch:  # the most underserved pool gains a slot, or the most overserved gives one up
        gap = [o - s for o, s in zip(owed, slots, strict=True)]
        if sum(slots) < batch:
            slots[max(range(len(gap)), key=gap.__getitem__)] += 1
        else:
            slots[min((i for i in range(len(gap)) if slots[i] > 1), key=gap.__getitem__)] -= 1
    made = []
    for c, o, s in zip(found, owed, slots, strict=True):
        cdf = weight[canvas == c].cumsum(0)
        made.append(Pool(c, s, pair[canvas == c], cdf / cdf[-1], o / s))
    return tuple(made)


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


EPISODE, EXPLORE, VIEW, DONOR = range(4)  # what a counter is for


# ---------------------------------------------------------------- episodes


class Episodes(NamedTuple):
    """One query with its demos under one symmetry, for each slot: a few dozen integers."""

    query: Tensor  # (B,) pair
    demos: Tensor  # (B, K) pairs, -1 where there is none
    symmetry: Symmetry  # (B,)
    shift: Tensor  # (B, 1 + K, 2) where on its canvas the query and each demo lie, as a share of the room left


def candidates(tasks: Tasks, query: Tensor, rule: str) -> Tensor:
    """(B, M) the pairs that may be demos of each query, -1 beyond their number."""
    task = tasks.task_of[query]
    count = tasks.first[task + 1] - tasks.first[task] if rule == "leave_one_out" else tasks.n_demos[task]
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


def draw(tasks: Tasks, pool: Pool, cfg: DataConfig, seed: int, slot: Tensor, n: Tensor) -> Episodes:
    """The n-th episode of each slot (global ids): a pure function of (seed, slot, n), whoever asks."""
    u = uniform(16, seed, EPISODE, slot, n)
    query = pool.pair[torch.searchsorted(pool.cdf, u[:, 0].contiguous(), right=True).clamp(max=len(pool.pair) - 1)]
    possible = candidates(tasks, query, cfg.query)
    lots = uniform(1 + possible.shape[1], seed, EPISODE, slot, n, 1)
    demos = choose_demos(possible, lots, cfg.max_demos, cfg.min_demos)
    shift = uniform(2 * (1 + demos.shape[1]), seed, EPISODE, slot, n, 2).view(len(query), -1, 2)
    return Episodes(query, demos, draw_symmetry(u[:, 1:12], cfg.dihedral, cfg.colours), shift if cfg.translate else shift * 0)


def join(parts: Sequence[Episodes]) -> Episodes:
    """Episodes of several pools as one, demos padded to the same K."""
    k = max(p.demos.shape[1] for p in parts)

    def wide(x: Tensor, n: int, value: int) -> Tensor:
        return torch.cat((x, x.new_full((len(x), n - x.shape[1], *x.shape[2:]), value)), 1)

    return Episodes(
        torch.cat([p.query for p in parts]),
        torch.cat([wide(p.demos, k, -1) for p in parts]),
        Symmetry(*(torch.cat([p.symmetry[i] for p in parts]) for i in range(2))),
        torch.cat([wide(p.shift, k + 1, 0) for p in parts]),
    )


# ---------------------------------------------------------------- painting


class Demos(NamedTuple):
    """Demo pairs of one size, whoever owns them."""

    inputs: Tensor  # (N, C * C) tokens
    outputs: Tensor  # (N, C * C) tokens
    owner: Tensor  # (N,) the slot
    place: Tensor  # (N,) its place among the slot's demos
    most: int  # K, the most demos of any slot of the batch


class Batch(NamedTuple):
    """What the model sees. Slots are ordered by pool; demos are ragged, grouped by their own size."""

    inputs: tuple[Tensor, ...]  # per pool (B_pool, C * C) tokens
    labels: tuple[Tensor, ...]  # per pool (B_pool, C * C) tokens, IGNORE where nothing is asked
    demos: tuple[Demos, ...]


def paint(tasks: Tasks, pair: Tensor, sym: Symmetry, shift: Tensor, canvas: int) -> tuple[Tensor, Tensor]:
    """Pairs (M,) under symmetries (M,) as tokens (M, C * C) of inputs and outputs: one gather for each.

    Grid and marks as published: a row of EOS right below the grid and a column right of it, no corner, none beyond
    the canvas; input and output share an offset, floor(shift * (room + 1)) with the room left by the larger of both.
    """
    k, swap = sym.dihedral, SWAP[sym.dihedral]
    size = tasks.grids[pair][:, :, 1:]  # (M, 2, 2)
    turned = torch.where(swap[:, None, None], size.flip(-1), size)
    room = (canvas - turned.amax(1)).clamp(min=0)  # (M, 2)
    offset = (shift * (room + 1)).long()
    palette = sym.colours + FIRST_COLOUR
    line = torch.arange(canvas)
    i = line[None, :, None] - offset[:, 0, None, None]  # (M, C, 1)
    j = line[None, None, :] - offset[:, 1, None, None]  # (M, 1, C)
    painted = []
    for side in range(2):
        start, (h, w) = tasks.grids[pair, side, 0, None, None], size[:, side].T[..., None, None]
        th, tw = turned[:, side].T[..., None, None]
        a, b = torch.where(swap[:, None, None], j, i), torch.where(swap[:, None, None], i, j)
        r = torch.where(FLIP_R[k, None, None], h - 1 - a, a)
        c = torch.where(FLIP_C[k, None, None], w - 1 - b, b)
        in_row, in_col = (i >= 0) & (i < th), (j >= 0) & (j < tw)
        inside = in_row & in_col
        colour = tasks.cells[torch.where(inside, start + r * w + c, 0)].long()
        token = palette.gather(-1, colour.flatten(1)).view_as(colour)
        mark = ((i == th) & in_col) | ((j == tw) & in_row)
        painted.append(torch.where(inside, token, mark.long() * EOS).flatten(1))
    return painted[0], painted[1]


def batch(tasks: Tasks, e: Episodes, canvases: Sequence[tuple[int, int]], demo_canvases: Sequence[int]) -> Batch:
    """Paint episodes whose slots are ordered by pool: canvases = ((canvas, slots), ...)."""
    inputs, labels, at = [], [], 0
    for canvas, slots in canvases:
        part = slice(at, at + slots)
        sym = Symmetry(e.symmetry.dihedral[part], e.symmetry.colours[part])
        x, y = paint(tasks, e.query[part], sym, e.shift[part, 0], canvas)
        inputs.append(x)
        labels.append(y.masked_fill(y == PAD, IGNORE))
        at += slots
    owner, place = torch.nonzero(e.demos >= 0, as_tuple=True)
    pair = e.demos[owner, place]
    sizes = torch.tensor(sorted(demo_canvases))
    side = tasks.grids[pair][:, :, 1:].amax((1, 2))
    size = sizes[torch.searchsorted(sizes, side).clamp(max=len(sizes) - 1)]
    groups = []
    for canvas in size.unique().tolist():
        own, at_place, which = (x[size == canvas] for x in (owner, place, pair))
        sym = Symmetry(e.symmetry.dihedral[own], e.symmetry.colours[own])
        groups.append(Demos(*paint(tasks, which, sym, e.shift[own, 1 + at_place], canvas), own, at_place, e.demos.shape[1]))
    return Batch(tuple(inputs), tuple(labels), tuple(groups))


def tokenise(grid: np.ndarray, canvas: int, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """One grid as tokens (C, C), the plain way; `paint` is tested against it."""
    (h, w), (r, c) = grid.shape, offset
    out = np.zeros((canvas, canvas), np.uint8)
    out[r : r + h, c : c + w] = grid + FIRST_COLOUR
    out[r + h : r + h + 1, c : c + w] = EOS
    out[r : r + h, c + w : c + w + 1] = EOS
    return out


def crop(tokens: np.ndarray) -> np.ndarray:
    """As published: the largest all-colour rectangle anchored at the top left, columns shrinking row by row; may be empty."""
    width = np.minimum.accumulate(np.logical_and.accumulate(tokens >= FIRST_COLOUR, axis=1).sum(1))
    rows = int(np.argmax(width * np.arange(1, len(tokens) + 1))) + 1
    return tokens[:rows, : width[rows - 1]] - FIRST_COLOUR if width[rows - 1] else np.zeros((0, 0), tokens.dtype)


def untokenise(tokens: np.ndarray) -> np.ndarray | None:
    """The grid on a canvas (C, C), or None (no answer) when it is empty or a colour stands where its border must be."""
    grid = crop(tokens)
    h, w = grid.shape
    border = np.concatenate((tokens[h : h + 1, :w].ravel(), tokens[:h, w : w + 1].ravel()))
    return None if grid.size == 0 or (border >= FIRST_COLOUR).any() else grid
