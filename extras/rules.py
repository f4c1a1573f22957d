"""The rules of composed tasks: functions from grid to grid whose parameters a task draws.

A rule knows one direction and a black background; compose.py turns and recolours whole tasks. It
gives NONE where an input does not suit it (a tie, nothing to crop), which is then drawn again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .grids import (
    NONE,
    Fn,
    Grid,
    around,
    border,
    box,
    crop,
    enclosed,
    enlarged,
    has_hole,
    inside,
    is_tall,
    mirror_tiled,
    neighbours,
    on_border,
    outline,
    painted,
    parts,
    where,
)
from .scenes import Dice, World, cells_of, panels_of

Make = Callable[[Dice, World], Fn]
At = Callable[[Grid, list[list[int]]], int]  # which object; -1: none
Holds = Callable[[Grid, list[int]], bool]  # whether an object has a property


class Rule(NamedTuple):
    scenes: str  # which suit it
    make: Make  # draws its parameters
    after: bool = False  # suits what other rules give
    last: bool = False  # leaves nothing for another rule
    top: int = 18  # the largest side of an input
    colours: bool = False  # reads colours, so every input has those that the others show


def plain(fn: Fn) -> Make:
    return lambda d, w: fn


def of(fn: Callable[[World, Grid], Grid]) -> Make:
    return lambda d, w: lambda x: fn(w, x)


def new(mask: Callable[[Grid], Grid], i: int = 0) -> Make:
    """The cells under the mask get a colour that the rule brings in."""
    return lambda d, w: lambda x: where(mask(x), w.new[i], x)


def recoloured(old: Sequence[int], to: Sequence[int]) -> Fn:
    table = np.arange(10, dtype=np.uint8)
    table[list(old)] = to
    return lambda x: table[x]


def permuted(d: Dice, w: World) -> Fn:
    order = d.some(w.ink, len(w.ink))
    return recoloured(order, [*order[1:], d.pick((order[0], w.new[0]))])


def by_rank(i: int) -> Make:
    """The commonest or rarest colour becomes a new one."""
    return lambda d, w: lambda x: where(x == o[i], w.new[0], x) if (o := ranked(x))[1:] else NONE


def chosen(do: str, at: At) -> Make:
    """One object is recoloured, or stays alone, or is cropped."""

    def make(d: Dice, w: World) -> Fn:
        def fn(x: Grid) -> Grid:
            i = at(x, found := parts(x))
            if i < 0 or do == "mark":
                return painted(x, [found[i]], [w.new[0]]) if i >= 0 else NONE
            y = painted(np.zeros_like(x), [found[i]], [int(x.flat[found[i][0]])])
            return y if do == "keep" else y[box(found[i], x.shape[1])]

        return fn

    return make


def sorted_out(do: str, holds: Holds) -> Make:
    """Objects with a property are recoloured (the others, too, in some tasks), or stay alone."""

    def make(d: Dice, w: World) -> Fn:
        other = d.pick((0, w.new[1]))

        def fn(x: Grid) -> Grid:
            found = parts(x)
            split = [p for p in found if holds(x, p)], [p for p in found if not holds(x, p)]
            if do == "keep":
                return painted(x, split[1], [0] * len(split[1])) if split[0] else NONE
            x = painted(x, split[0], [w.new[0]] * len(split[0]))
            return painted(x, split[1], [other] * len(split[1])) if other else x

        return fn

    return make


def single(keys: list[int], best: Callable[[list[int]], int] = max) -> int:
    """Where the largest key is; -1 on a tie or without keys."""
    return keys.index(best(keys)) if len(keys) > 1 and keys.count(best(keys)) == 1 else -1


def ranked(x: Grid) -> list[int]:
    """The colours but the background, from the most cells to the fewest; [] on a tie."""
    counts = np.bincount(x.reshape(-1), minlength=10).tolist()
    there = sorted((c for c in range(1, 10) if counts[c]), key=lambda c: -counts[c])
    return there if len({counts[c] for c in there}) == len(there) else []


def odd_one(keys: Sequence[object]) -> int:
    """Where the one is that differs from all others; -1 without."""
    counts = Counter(keys)
    lone = [k for k in counts if counts[k] == 1]
    return keys.index(lone[0]) if len(lone) == 1 and len(counts) == 2 and len(keys) > 2 else -1


def colours_by_rank(w: World, x: Grid) -> Grid:
    """The largest, second, ... object."""
    found = sorted(parts(x), key=len, reverse=True)
    suits = 2 <= len(found) <= 4 and len(set(map(len, found))) == len(found)
    return painted(x, found, w.new[: len(found)]) if suits else NONE


def colours_by_size(d: Dice, w: World) -> Fn:
    """Small or large, with nothing between."""
    small = d.between(1, 4)

    def fn(x: Grid) -> Grid:
        found = parts(x)
        unclear = {small + 1, small + 2} & set(map(len, found))
        return NONE if unclear else painted(x, found, [w.new[len(p) > small] for p in found])

    return fn


def boxed(w: World, x: Grid) -> Grid:
    """The background in every object's bounding box is painted."""
    y = x.copy()
    for p in parts(x):
        at = box(p, x.shape[1])
        y[at] = where(x[at] == 0, w.new[0], x[at])
    return y


def fill_seeded(x: Grid) -> Grid:
    """The inside of every box in the colour of the cell there."""
    y = x.copy()
    for p in parts(x, mixed=True):
        y[box(p, x.shape[1])][1:-1, 1:-1] = y[box(p, x.shape[1])][1:-1, 1:-1].max(initial=0)
    return y


def stamped(w: World, x: Grid) -> Grid:
    """The figure around every cell of the mark."""
    marks = np.argwhere(x == w.mark).tolist()
    spots = [(slice(r - 1, r + 2), slice(c - 1, c + 2)) for r, c in marks]
    figure, y = max((x[s] for s in spots), key=np.count_nonzero, default=NONE), x.copy()
    if len(spots) < 2 or np.count_nonzero(figure) < 3:
        return NONE
    for s in spots:
        y[s] = figure
    return y


def like_twins(w: World, x: Grid) -> Grid:
    """Objects of the mark get the colour of their like."""
    found, n = parts(x), x.shape[1]
    own = {outline(p, n): int(x.flat[p[0]]) for p in found if x.flat[p[0]] != w.mark}
    grey = [p for p in found if x.flat[p[0]] == w.mark]
    known = len(own) + len(grey) == len(found) and all(outline(p, n) in own for p in grey)
    return painted(x, grey, [own[outline(p, n)] for p in grey]) if known else NONE


def objects_fall(x: Grid) -> Grid:
    """Each as a whole, the lowest first, until it lies on the floor or on another."""
    (h, w), y = x.shape, np.zeros_like(x)
    flat = y.reshape(-1)
    for p in sorted(parts(x), key=max, reverse=True):
        down = 0
        while all(i + down < h * w - w and flat[i + down + w] == 0 for i in p):
            down += w
        flat[[i + down for i in p]] = x.flat[p[0]]
    return y if np.count_nonzero(y) == np.count_nonzero(x) else NONE


def rays(steps: Sequence[tuple[int, int]]) -> Fn:
    """From every coloured cell in these directions to the border; NONE where cells are many."""

    def fn(x: Grid) -> Grid:
        y, (h, w), cells = x.copy(), x.shape, np.argwhere(x).tolist()
        for r, c in cells:
            for dr, dc in steps:
                i, j = r + dr, c + dc
                while 0 <= i < h and 0 <= j < w:
                    y[i, j] = x[i, j] or x[r, c]
                    i, j = i + dr, j + dc
        return y if len(cells) <= 0.2 * x.size else NONE

    return fn


def linked(d: Dice, w: World) -> Fn:
    """Cells of equal colour in a row are joined."""
    own = d.chance() < 0.6

    def fn(x: Grid) -> Grid:
        y = x.copy()
        for r, row in enumerate(x.tolist()):
            at = [c for c, v in enumerate(row) if v]
            if len(at) == 2 and row[at[0]] == row[at[1]]:
                y[r, at[0] + 1 : at[1]] = row[at[0]] if own else w.new[0]
        return y

    return fn


def lines_only(x: Grid) -> Grid:
    rows, columns = (x == x[:, :1]).all(1) & (x[:, 0] > 0), (x == x[:1]).all(0) & (x[0] > 0)
    return where(~(rows[:, None] | columns), 0, x)


def deduped(x: Grid) -> Grid:
    """Rows and columns that are like the one before fall away."""
    x = x[[True, *(x[1:] != x[:-1]).any(1).tolist()]]
    return x[:, [True, *(x[:, 1:] != x[:, :-1]).any(0).tolist()]]


def cells_fall(x: Grid) -> Grid:
    return np.take_along_axis(x, np.argsort(x > 0, 0, kind="stable"), 0)


def overlay(how: Callable[[Grid, Grid], Grid]) -> Make:
    """Where two halves are both / either / ... coloured."""

    def fn(w: World, x: Grid) -> Grid:
        halves = panels_of(w, x, 2)
        return where(how(halves[0] > 0, halves[1] > 0), w.new[0], halves[0] * 0) if halves else NONE

    return of(fn)


def stacked(d: Dice, w: World) -> Fn:
    """Panels over each other, in an order that the task has."""
    order = d.some(range(w.number), w.number)

    def fn(x: Grid) -> Grid:
        row, y = panels_of(w, x, w.number), NONE
        for p in (row[i] for i in order if row):
            y = np.where(p > 0, p, y) if y.size else p
        return y

    return fn


def uncovered(w: World, x: Grid) -> Grid:
    for y in (x[::-1], x[:, ::-1], x[::-1, ::-1]):
        x = np.where(x == w.mark, y, x)
    return NONE if (x == w.mark).any() else x


def continued(w: World, x: Grid) -> Grid:
    (a, b), y = w.period, x.copy()
    for i, j in np.ndindex(a, b):
        seen = set(x[i::a, j::b].tobytes()) - {w.mark}
        if len(seen) != 1:
            return NONE
        y[i::a, j::b] = seen.pop()
    return y


def patch(fill: Callable[[World, Grid], Grid]) -> Make:
    return of(lambda w, x: crop(y, x == w.mark) if (y := fill(w, x)).size else NONE)


def condensed(colour: Callable[[World, Grid], int]) -> Make:
    """One cell for each cell of a lattice."""
    return of(
        lambda w, x: np.array([[colour(w, y) for y in row] for row in cells_of(w, x)], np.uint8)
    )


def panels_in(w: World, x: Grid) -> list[Grid]:
    return panels_of(w, x, w.number)


def cells_in(w: World, x: Grid) -> list[Grid]:
    return [y for row in cells_of(w, x) for y in row]


def one_part(split: Callable[[World, Grid], list[Grid]], at: Callable[[list[Grid]], int]) -> Make:
    """One panel or cell of a lattice."""
    return of(lambda w, x: ys[i] if (ys := split(w, x)) and (i := at(ys)) >= 0 else NONE)


def histogram(x: Grid) -> Grid:
    """A bar for every colour, as long as it has cells, the longest first."""
    order = np.array(ranked(x), np.uint8)[:, None]
    counts = np.count_nonzero(x.reshape(-1) == order, 1)
    return where(np.arange(counts[0]) >= counts[:, None], 0, order) if len(order) > 1 else NONE


def counted(colour: int, n: int, total: int) -> Grid:
    return where(np.arange(max(n, total))[None] < n, colour, np.zeros((1, 1), np.uint8))


def ranking(part: slice) -> Make:
    return plain(lambda x: np.array([o[part]], np.uint8) if (o := ranked(x))[1:] else NONE)


CHOICES: dict[str, tuple[str, At]] = {
    "largest": ("shapes blocks boxes", lambda x, f: single([len(p) for p in f])),
    "smallest": ("shapes blocks boxes", lambda x, f: single([len(p) for p in f], min)),
    "odd shape": ("odd_shapes", lambda x, f: odd_one([outline(p, x.shape[1]) for p in f])),
    "odd colour": ("shapes blocks", lambda x, f: odd_one([int(x.flat[p[0]]) for p in f])),
}
PROPERTIES: dict[str, tuple[str, Holds]] = {
    "on the border": ("shapes blocks boxes", on_border),
    "off the border": ("shapes blocks boxes", lambda x, p: not on_border(x, p)),
    "with a hole": ("boxes", has_hole),
    "without a hole": ("boxes", lambda x, p: not has_hole(x, p)),
    "taller than wide": ("blocks shapes", is_tall),
}
OVERLAYS: dict[str, Callable[[Grid, Grid], Grid]] = {
    "both halves": np.logical_and,
    "either half": np.logical_or,
    "one half alone": np.logical_xor,
    "neither half": lambda a, b: ~(a | b),
    "first half without second": lambda a, b: a & ~b,
    "halves agree": np.equal,
}
ROW, COLUMN, DIAGONAL, OTHER = (
    [(0, 1), (0, -1)],
    [(1, 0), (-1, 0)],
    [(1, 1), (-1, -1)],
    [(1, -1), (-1, 1)],
)
RAYS = {
    "ray": ROW[:1],
    "row": ROW,
    "cross": ROW + COLUMN,
    "diagonal ray": DIAGONAL[:1],
    "diagonals": DIAGONAL + OTHER,
}
ANY = "noise sprite shapes full blocks"
RULES: dict[str, Rule] = {
    # the grid as a whole
    "mirror": Rule(ANY, plain(lambda x: x[:, ::-1]), True),
    "half turn": Rule(ANY, plain(lambda x: x[::-1, ::-1]), True),
    "quarter turn": Rule(ANY, plain(lambda x: x.T[::-1]), True),
    "transpose": Rule(ANY, plain(lambda x: x.T), True),
    "enlarge": Rule(ANY, of(lambda w, x: enlarged(x, w.k)), True, top=9),
    "stretch": Rule(ANY, of(lambda w, x: x.repeat(w.k, 1)), True, top=10),
    "shrink": Rule("coarse", of(lambda w, x: x[:: w.k, :: w.k])),
    "enlarge by colours": Rule("full noise",
        plain(lambda x: enlarged(x, len(set(x.tobytes()) - {0}))), top=6),
    "tile": Rule("noise full", of(lambda w, x: np.tile(x, (w.number - 1, w.k))), True, top=8),
    "tile mirrored": Rule("noise full sprite", plain(mirror_tiled), True, top=10),
    "tile alternating": Rule("noise full",
        plain(lambda x: np.vstack([np.tile(y, 3) for y in (x, x[:, ::-1], x)])), top=5),
    "append mirror": Rule("noise full shapes", plain(lambda x: np.hstack([x, x[:, ::-1]])), True,
        top=12),
    "append turned": Rule("noise full shapes", plain(lambda x: np.hstack([x, x[::-1, ::-1]])), True,
        top=12),
    "self-similar": Rule("mono noise", plain(lambda x: np.kron(x > 0, x)), top=5),
    "self-similar inverse": Rule("mono", plain(lambda x: np.kron(x == 0, x)), top=5),
    "self-similar by colour": Rule("full noise", of(lambda w, x: np.kron(x == w.ink[0], x)), top=5,
        colours=True),
    "roll": Rule("noise full shapes", of(lambda w, x: np.roll(x, w.k - 1, 1)), True),
    "shift": Rule("shapes noise blocks",
        of(lambda w, x: np.pad(x, ((0, 0), (w.k - 1, 0)))[:, : x.shape[1]]), True),
    "shear": Rule("bars full coarse bands blocks",
        plain(lambda x: np.array([np.roll(r, i) for i, r in enumerate(x)])), top=10),
    "swap halves": Rule("noise full shapes",
        plain(lambda x: NONE if len(x.T) % 2 else np.roll(x, len(x.T) // 2, 1)), True),
    "left half": Rule("noise full shapes", plain(lambda x: x[:, : (x.shape[1] + 1) // 2]), True),
    "corner quarter": Rule("noise full",
        plain(lambda x: x[: (len(x) + 1) // 2, : (x.shape[1] + 1) // 2]), True),
    "mirror half": Rule("noise full shapes",
        plain(lambda x: np.hstack([x[:, : (len(x.T) + 1) // 2], x[:, : len(x.T) // 2][:, ::-1]])),
        True),
    "overlay mirror": Rule("noise shapes blocks", plain(lambda x: np.where(x > 0, x, x[:, ::-1])),
        True),
    "every other row": Rule("noise full blocks", plain(lambda x: x[::2]), True),
    "drop doubles": Rule("bands coarse", plain(deduped)),
    "drop empty lines": Rule("dots shapes links", plain(lambda x: x[x.any(1)][:, x.any(0)]), True),
    "columns by height": Rule("bars",
        plain(lambda x: x[:, np.argsort(np.count_nonzero(x, 0), kind="stable")]), True),
    "columns by depth": Rule("bars",
        plain(lambda x: x[:, np.argsort(-np.count_nonzero(x, 0), kind="stable")])),
    "unframe": Rule("framed",
        of(lambda w, x: y[1:-1, 1:-1] if min((y := crop(x, x == w.mark)).shape) > 2 else NONE)),
    "frame outside": Rule(ANY, of(lambda w, x: np.pad(x, 1, constant_values=w.new[1])), True,
        top=16),
    "frame inside": Rule("noise full shapes", new(border, 1), True),
    # colours
    "permute colours": Rule("noise full shapes blocks", permuted, True, colours=True),
    "swap colours": Rule("noise full shapes", lambda d,
        w: recoloured(a := d.some(w.ink, 2), a[::-1]), True, colours=True),
    "replace a colour": Rule("noise full blocks", lambda d,
        w: recoloured([d.pick(w.ink)], w.new[:1]), True, colours=True),
    "erase a colour": Rule("noise full blocks", lambda d, w: recoloured([d.pick(w.ink)], [0]), True,
        colours=True),
    "one colour": Rule("noise shapes sprite", new(lambda x: x > 0), True),
    "negative": Rule("mono noise blocks",
        of(lambda w, x: where(x > 0, 0, where(x == 0, w.new[0], x))), True),
    "exchange": Rule("mono", plain(lambda x: where(x > 0, 0, np.full_like(x, x.max())))),
    "paint background": Rule("noise shapes blocks", new(lambda x: x == 0, 2), True),
    "checkerboard": Rule("mono blocks solids",
        new(lambda x: (x > 0) & (np.indices(x.shape).sum(0) % 2 == 1)), True),
    "alternate columns": Rule("mono blocks bars solids",
        new(lambda x: (x > 0) & (np.arange(x.shape[1]) % 2 == 1)), True),
    "commonest to new": Rule("noise full shapes", by_rank(0), True),
    "rarest to new": Rule("noise full shapes", by_rank(-1), True),
    "keep commonest": Rule("noise shapes blocks",
        plain(lambda x: where(x != o[0], 0, x) if (o := ranked(x))[1:] else NONE)),
    "column colours": Rule("keyed_columns",
        plain(lambda x: where(x == 0, 0, x[:1].repeat(len(x), 0)))),
    "corner colour": Rule("keyed_corner", plain(lambda x: where(x > 0, int(x[0, 0]), x))),
    # objects
    **{f"{do} {k}": Rule(s, chosen(do, at), k == "largest")
        for do in ("mark", "keep", "crop") for k, (s, at) in CHOICES.items()},
    **{f"{do} {k}": Rule(s, sorted_out(do, h), "off" in k)
        for do in ("colour", "keep") for k, (s, h) in PROPERTIES.items()},
    "colours by rank": Rule("shapes blocks", of(colours_by_rank)),
    "colours by size": Rule("shapes blocks", colours_by_size),
    "crop to all": Rule("sprite shapes", plain(lambda x: crop(x, x > 0)), True),
    "hollow": Rule("solids", plain(lambda x: where(inside(x), 0, x)), True),
    "core": Rule("solids", new(inside), True),
    "outline": Rule("shapes blocks boxes",
        new(lambda x: (x == 0) & (np.max(around(x, True), 0) > 0)), True),
    "halo": Rule("dots shapes", new(lambda x: (x == 0) & (np.max(around(x), 0) > 0)), True),
    "fill enclosed": Rule("boxes", new(enclosed), True),
    "fill outside": Rule("boxes", new(lambda x: (x == 0) & ~enclosed(x))),
    "fill by seed": Rule("seeds", plain(fill_seeded)),
    "fill bounding boxes": Rule("shapes", of(boxed), True),
    "like twins": Rule("twins", of(like_twins)),
    "stamp": Rule("stamps", of(stamped)),
    # motion, lines, neighbourhoods
    "cells fall": Rule("noise dots sprite mono", plain(cells_fall), True),
    "objects fall": Rule("shapes walled", plain(objects_fall), True),
    **{name: Rule("dots", plain(rays(steps)), name == "ray") for name, steps in RAYS.items()},
    "link": Rule("links", linked),
    "lines only": Rule("ruled", plain(lines_only)),
    "mark crowded": Rule("mono noise", new(lambda x: (x > 0) & (neighbours(x) >= 2)), True),
    "mark lonely": Rule("mono noise", new(lambda x: (x > 0) & (neighbours(x) == 0))),
    "remove lonely": Rule("mono noise", plain(lambda x: where(neighbours(x) == 0, 0, x)), True),
    "fill crowded": Rule("mono noise", new(lambda x: (x == 0) & (neighbours(x) >= 3))),
    # panels, patterns, lattices
    **{name: Rule("halves", overlay(how)) for name, how in OVERLAYS.items()},
    "stack panels": Rule("panels", stacked),
    "odd panel": Rule("odd_panels",
        one_part(panels_in, lambda ys: odd_one([y.tobytes() for y in ys]))),
    "symmetric panel": Rule("even_panels",
        one_part(panels_in, lambda ys: single([int((y == y[:, ::-1]).all()) for y in ys]))),
    "fullest panel": Rule("panels",
        one_part(panels_in, lambda ys: single([int(np.count_nonzero(y)) for y in ys]))),
    "complete symmetry": Rule("mirrored", of(uncovered)),
    "symmetric patch": Rule("mirrored", patch(uncovered)),
    "complete period": Rule("periodic", of(continued)),
    "periodic patch": Rule("periodic", patch(continued)),
    "continue rows": Rule("strips",
        of(lambda w, x: np.tile(x[:, : w.period[0]], x.shape[1])[:, : x.shape[1]])),
    "lattice majority": Rule("lattice",
        condensed(lambda w, y: w.new[0] if 2 * np.count_nonzero(y) > y.size else 0)),
    "lattice counts": Rule("lattice",
        condensed(lambda w, y: w.new[min(int(np.count_nonzero(y)), 3)])),
    "fullest cell": Rule("lattice",
        one_part(cells_in, lambda ys: single([int(np.count_nonzero(y)) for y in ys]))),
    "emptiest cell": Rule("lattice",
        one_part(cells_in, lambda ys: single([int(np.count_nonzero(y)) for y in ys], min))),
    "overlay lattice": Rule("lattice",
        of(lambda w, x: np.max(cells_in(w, x), 0) if w.p[2] < 0.5 else NONE)),
    # counts
    "commonest colour": Rule("noise full", ranking(slice(1)), last=True),
    "rarest colour": Rule("noise full", ranking(slice(-1, None)), last=True),
    "colours by frequency": Rule("noise shapes blocks", ranking(slice(None)), last=True),
    "histogram": Rule("dots shapes noise", plain(histogram), last=True, top=7),
    "count objects": Rule("shapes dots boxes", of(lambda w, x: counted(w.new[0], len(parts(x)), 6)),
        last=True),
    "count diagonal": Rule("shapes blocks",
        of(lambda w, x: np.eye(len(parts(x)), dtype=np.uint8) * np.uint8(w.new[0])), last=True),
    "count cells": Rule("mono dots",
        of(lambda w, x: counted(w.new[0], int(np.count_nonzero(x)), 0)), last=True, top=6),
    "order of bands": Rule("bands", plain(lambda x: deduped(x)[:, :1]), last=True),
}  # fmt: skip
