"""The rules of composed tasks: functions from grid to grid whose parameters a task draws.

A rule knows one direction and a black background; compose.py turns and recolours whole tasks. It
gives NONE where an input does not suit it (a tie, nothing to crop), which is then drawn again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import grids
from .grids import NONE, Fn, Grid, around, box, crop, painted, parts, where
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


def plain(scenes: str, fn: Fn, after: bool = False, **traits: Any) -> Rule:
    """A rule without parameters."""
    return Rule(scenes, lambda d, w: fn, after, **traits)


def of(scenes: str, fn: Callable[[World, Grid], Grid], after: bool = False, **traits: Any) -> Rule:
    """A rule whose parameters are those of the task's world."""
    return Rule(scenes, lambda d, w: lambda x: fn(w, x), after, **traits)


def new(scenes: str, mask: Fn, after: bool = False, number: int = 0) -> Rule:
    """The cells under the mask get a colour that the rule brings in."""
    return of(scenes, lambda w, x: where(mask(x), w.new[number], x), after)


def recoloured(old: Sequence[int], to: Sequence[int]) -> Fn:
    table = np.arange(10, dtype=np.uint8)
    table[list(old)] = to
    return lambda x: table[x]


def permuted(d: Dice, w: World) -> Fn:
    order = d.some(w.ink, len(w.ink))
    return recoloured(order, [*order[1:], d.pick((order[0], w.new[0]))])


def chosen(scenes: str, do: str, at: At, after: bool) -> Rule:
    """One object is recoloured, or stays alone, or is cropped."""

    def fn(w: World, x: Grid) -> Grid:
        i = at(x, objects := parts(x))
        if i < 0 or do == "mark":
            return painted(x, [objects[i]], [w.new[0]]) if i >= 0 else NONE
        y = painted(np.zeros_like(x), [objects[i]], [int(x.flat[objects[i][0]])])
        return y if do == "keep" else y[box(objects[i], x.shape[1])]

    return of(scenes, fn, after)


def sorted_out(do: str, holds: Holds) -> Make:
    """Objects with a property are recoloured (the others, too, in some tasks), or stay alone."""

    def make(d: Dice, w: World) -> Fn:
        other = d.pick((0, w.new[1]))

        def fn(x: Grid) -> Grid:
            suited = [p for p in parts(x) if holds(x, p)]
            others = [p for p in parts(x) if p not in suited]
            if do == "keep":
                return painted(x, others, [0] * len(others)) if suited else NONE
            x = painted(x, suited, [w.new[0]] * len(suited))
            return painted(x, others, [other] * len(others)) if other else x

        return fn

    return make


def neighbours(x: Grid) -> Grid:
    return np.sum([n > 0 for n in around(x)], 0)


def inside(x: Grid) -> Grid:
    return np.min(around(x, True), 0) > 0


def outline(part: Sequence[int], w: int) -> tuple[int, ...]:
    """The shape of an object, wherever it is."""
    rows, columns = box(part, w)
    return tuple(sorted(i - rows.start * w - columns.start for i in part))


def on_border(x: Grid, p: list[int]) -> bool:
    return bool(grids.border(x).flat[p].any())


def has_hole(x: Grid, p: list[int]) -> bool:
    return bool(grids.enclosed(painted(np.zeros_like(x), [p], [1])).any())


def is_tall(x: Grid, p: list[int]) -> bool:
    r, c = box(p, x.shape[1])
    return r.stop - r.start > c.stop - c.start


def single(keys: list[int], best: Callable[[list[int]], int] = max) -> int:
    """Where the largest key is; -1 on a tie or without keys."""
    return keys.index(best(keys)) if len(keys) > 1 and keys.count(best(keys)) == 1 else -1


def ranked(x: Grid) -> list[int]:
    """The colours but the background, from the most cells to the fewest; [] on a tie."""
    counts = np.bincount(x.reshape(-1), minlength=10).tolist()
    order = sorted((c for c in range(1, 10) if counts[c]), key=lambda c: -counts[c])
    return order if len({counts[c] for c in order}) == len(order) else []


def odd_one(keys: Sequence[object]) -> int:
    """Where the one is that differs from all others; -1 without."""
    counts = Counter(keys)
    lone = [k for k in counts if counts[k] == 1]
    return keys.index(lone[0]) if len(lone) == 1 and len(counts) == 2 and len(keys) > 2 else -1


def colours_by_rank(w: World, x: Grid) -> Grid:
    """The largest, second, ... object."""
    objects = sorted(parts(x), key=len, reverse=True)
    suits = 2 <= len(objects) <= 4 and len(set(map(len, objects))) == len(objects)
    return painted(x, objects, w.new[: len(objects)]) if suits else NONE


def colours_by_size(d: Dice, w: World) -> Fn:
    """Small or large, with nothing between."""
    small = d.between(1, 4)

    def fn(x: Grid) -> Grid:
        objects = parts(x)
        unclear = {small + 1, small + 2} & set(map(len, objects))
        return NONE if unclear else painted(x, objects, [w.new[len(p) > small] for p in objects])

    return fn


def boxed(w: World, x: Grid) -> Grid:
    """The background in every object's bounding box is painted."""
    y = x.copy()
    for p in parts(x):
        at = box(p, x.shape[1])
        y[at] = where(x[at] == 0, w.new[0], x[at])
    return y


def fill_seeded(x: Grid) -> Grid:
    """The inside of every box in the colour of the cell order."""
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
    objects, n = parts(x), x.shape[1]
    colour_of = {outline(p, n): int(x.flat[p[0]]) for p in objects if x.flat[p[0]] != w.mark}
    grey = [p for p in objects if x.flat[p[0]] == w.mark]
    if len(colour_of) + len(grey) < len(objects) or any(
        outline(p, n) not in colour_of for p in grey
    ):
        return NONE
    return painted(x, grey, [colour_of[outline(p, n)] for p in grey])


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
    is_own_colour = d.chance() < 0.6

    def fn(x: Grid) -> Grid:
        y = x.copy()
        for r, row in enumerate(x.tolist()):
            at = [c for c, v in enumerate(row) if v]
            if len(at) == 2 and row[at[0]] == row[at[1]]:
                y[r, at[0] + 1 : at[1]] = row[at[0]] if is_own_colour else w.new[0]
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


def overlay(how: Callable[[Grid, Grid], Grid]) -> Rule:
    """Where two halves are both / either / ... coloured."""

    def fn(w: World, x: Grid) -> Grid:
        halves = panels_of(w, x, 2)
        return where(how(halves[0] > 0, halves[1] > 0), w.new[0], halves[0] * 0) if halves else NONE

    return of("halves", fn)


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


def patch(scene: str, fill: Callable[[World, Grid], Grid]) -> Rule:
    return of(scene, lambda w, x: crop(y, x == w.mark) if (y := fill(w, x)).size else NONE)


def condensed(colour: Callable[[World, int], int]) -> Rule:
    """One cell for each cell of a lattice, by how many cells of it are coloured."""

    def fn(w: World, x: Grid) -> Grid:
        colours = [colour(w, filled(y)) for y in cells_of(w, x)]
        return np.array(colours, np.uint8).reshape((len(x) + 1) // (w.k + 1), -1)

    return of("lattice", fn)


def filled(x: Grid) -> int:
    return int(np.count_nonzero(x))


def one_part(
    scene: str, split: Callable[[World, Grid], list[Grid]], at: Callable[[list[Grid]], int]
) -> Rule:
    """One panel or cell of a lattice."""
    return of(scene, lambda w, x: ys[i] if (ys := split(w, x)) and (i := at(ys)) >= 0 else NONE)


def histogram(x: Grid) -> Grid:
    """A bar for every colour, as long as it has cells, the longest first."""
    order = np.array(ranked(x), np.uint8)[:, None]
    counts = np.count_nonzero(x.reshape(-1) == order, 1)
    return where(np.arange(counts[0]) >= counts[:, None], 0, order) if len(order) > 1 else NONE


def counted(colour: int, n: int, total: int) -> Grid:
    return where(np.arange(max(n, total))[None] < n, colour, np.zeros((1, 1), np.uint8))


def to_new(x: Grid, rank: int, colour: int) -> Grid:
    order = ranked(x)
    return where(x == order[rank], colour, x) if len(order) > 1 else NONE


def listed(x: Grid, part: slice) -> Grid:
    """A row of the colours of these ranks."""
    order = ranked(x)
    return np.array([order[part]], np.uint8) if len(order) > 1 else NONE


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
ROW, COLUMN = [(0, 1), (0, -1)], [(1, 0), (-1, 0)]
DIAGONAL, OTHER = [(1, 1), (-1, -1)], [(1, -1), (-1, 1)]
RAYS = {
    "ray": ROW[:1],
    "row": ROW,
    "cross": ROW + COLUMN,
    "diagonal ray": DIAGONAL[:1],
    "diagonals": DIAGONAL + OTHER,
}
ANY, MIXED = "noise sprite shapes full blocks", "noise full shapes"
RULES: dict[str, Rule] = {
    # the grid as a whole
    "mirror": plain(ANY, lambda x: x[:, ::-1], True),
    "half turn": plain(ANY, lambda x: x[::-1, ::-1], True),
    "quarter turn": plain(ANY, lambda x: x.T[::-1], True),
    "transpose": plain(ANY, lambda x: x.T, True),
    "enlarge": of(ANY, lambda w, x: grids.enlarged(x, w.k), True, top=9),
    "stretch": of(ANY, lambda w, x: x.repeat(w.k, 1), True, top=10),
    "shrink": of("coarse", lambda w, x: x[:: w.k, :: w.k]),
    "enlarge by colours": plain("full noise",
        lambda x: grids.enlarged(x, len(set(x.tobytes()) - {0})), top=6),
    "tile": of("noise full", lambda w, x: np.tile(x, (w.number - 1, w.k)), True, top=8),
    "tile mirrored": plain("noise full sprite", grids.mirror_tiled, True, top=10),
    "tile alternating": plain("noise full",
        lambda x: np.vstack([np.tile(y, 3) for y in (x, x[:, ::-1], x)]), top=5),
    "append mirror": plain(MIXED, lambda x: np.hstack([x, x[:, ::-1]]), True, top=12),
    "append turned": plain(MIXED, lambda x: np.hstack([x, x[::-1, ::-1]]), True, top=12),
    "self-similar": plain("mono noise", lambda x: np.kron(x > 0, x), top=5),
    "self-similar inverse": plain("mono", lambda x: np.kron(x == 0, x), top=5),
    "self-similar by colour": of("full noise",
        lambda w, x: np.kron(x == w.ink[0], x), top=5, colours=True),
    "roll": of(MIXED, lambda w, x: np.roll(x, w.k - 1, 1), True),
    "shift": of("shapes noise blocks",
        lambda w, x: np.pad(x, ((0, 0), (w.k - 1, 0)))[:, : x.shape[1]], True),
    "shear": plain("bars full coarse bands blocks",
        lambda x: np.array([np.roll(r, i) for i, r in enumerate(x)]), top=10),
    "swap halves": plain(MIXED,
        lambda x: NONE if len(x.T) % 2 else np.roll(x, len(x.T) // 2, 1), True),
    "left half": plain(MIXED, lambda x: x[:, : (x.shape[1] + 1) // 2], True),
    "corner quarter": plain("noise full",
        lambda x: x[: (len(x) + 1) // 2, : (x.shape[1] + 1) // 2], True),
    "mirror half": plain(MIXED,
        lambda x: np.hstack([x[:, : (len(x.T) + 1) // 2], x[:, : len(x.T) // 2][:, ::-1]]), True),
    "overlay mirror": plain("noise shapes blocks", lambda x: np.where(x > 0, x, x[:, ::-1]), True),
    "every other row": plain("noise full blocks", lambda x: x[::2], True),
    "drop doubles": plain("bands coarse", deduped),
    "drop empty lines": plain("dots shapes links", lambda x: x[x.any(1)][:, x.any(0)], True),
    "columns by height": plain("bars",
        lambda x: x[:, np.argsort(np.count_nonzero(x, 0), kind="stable")], True),
    "columns by depth": plain("bars",
        lambda x: x[:, np.argsort(-np.count_nonzero(x, 0), kind="stable")]),
    "unframe": of("framed",
        lambda w, x: y[1:-1, 1:-1] if min((y := crop(x, x == w.mark)).shape) > 2 else NONE),
    "frame outside": of(ANY, lambda w, x: np.pad(x, 1, constant_values=w.new[1]), True, top=16),
    "frame inside": new(MIXED, grids.border, True, number=1),
    # colours
    "permute colours": Rule("noise full shapes blocks", permuted, True, colours=True),
    "swap colours": Rule(MIXED,
        lambda d, w: recoloured(a := d.some(w.ink, 2), a[::-1]), True, colours=True),
    "replace a colour": Rule("noise full blocks",
        lambda d, w: recoloured([d.pick(w.ink)], w.new[:1]), True, colours=True),
    "erase a colour": Rule("noise full blocks",
        lambda d, w: recoloured([d.pick(w.ink)], [0]), True, colours=True),
    "one colour": new("noise shapes sprite", lambda x: x > 0, True),
    "negative": of("mono noise blocks",
        lambda w, x: where(x > 0, 0, where(x == 0, w.new[0], x)), True),
    "exchange": plain("mono", lambda x: where(x > 0, 0, np.full_like(x, x.max()))),
    "paint background": new("noise shapes blocks", lambda x: x == 0, True, number=2),
    "checkerboard": new("mono blocks solids",
        lambda x: (x > 0) & (np.indices(x.shape).sum(0) % 2 == 1), True),
    "alternate columns": new("mono blocks bars solids",
        lambda x: (x > 0) & (np.arange(x.shape[1]) % 2 == 1), True),
    "commonest to new": of(MIXED, lambda w, x: to_new(x, 0, w.new[0]), True),
    "rarest to new": of(MIXED, lambda w, x: to_new(x, -1, w.new[0]), True),
    "keep commonest": plain("noise shapes blocks",
        lambda x: where(x != o[0], 0, x) if (o := ranked(x))[1:] else NONE),
    "column colours": plain("keyed_columns", lambda x: where(x == 0, 0, x[:1].repeat(len(x), 0))),
    "corner colour": plain("keyed_corner", lambda x: where(x > 0, int(x[0, 0]), x)),
    # objects
    **{f"{do} {k}": chosen(s, do, at, k == "largest")
        for do in ("mark", "keep", "crop") for k, (s, at) in CHOICES.items()},
    **{f"{do} {k}": Rule(s, sorted_out(do, h), "off" in k)
        for do in ("colour", "keep") for k, (s, h) in PROPERTIES.items()},
    "colours by rank": of("shapes blocks", colours_by_rank),
    "colours by size": Rule("shapes blocks", colours_by_size),
    "crop to all": plain("sprite shapes", lambda x: crop(x, x > 0), True),
    "hollow": plain("solids", lambda x: where(inside(x), 0, x), True),
    "core": new("solids", inside, True),
    "outline": new("shapes blocks boxes",
        lambda x: (x == 0) & (np.max(around(x, True), 0) > 0), True),
    "halo": new("dots shapes", lambda x: (x == 0) & (np.max(around(x), 0) > 0), True),
    "fill enclosed": new("boxes", grids.enclosed, True),
    "fill outside": new("boxes", lambda x: (x == 0) & ~grids.enclosed(x)),
    "fill by seed": plain("seeds", fill_seeded),
    "fill bounding boxes": of("shapes", boxed, True),
    "like twins": of("twins", like_twins),
    "stamp": of("stamps", stamped),
    # motion, lines, neighbourhoods
    "cells fall": plain("noise dots sprite mono", cells_fall, True),
    "objects fall": plain("shapes walled", objects_fall, True),
    **{name: plain("dots", rays(steps), name == "ray") for name, steps in RAYS.items()},
    "link": Rule("links", linked),
    "lines only": plain("ruled", lines_only),
    "mark crowded": new("mono noise", lambda x: (x > 0) & (neighbours(x) >= 2), True),
    "mark lonely": new("mono noise", lambda x: (x > 0) & (neighbours(x) == 0)),
    "remove lonely": plain("mono noise", lambda x: where(neighbours(x) == 0, 0, x), True),
    "fill crowded": new("mono noise", lambda x: (x == 0) & (neighbours(x) >= 3)),
    # panels, patterns, lattices
    **{name: overlay(how) for name, how in OVERLAYS.items()},
    "stack panels": Rule("panels", stacked),
    "odd panel": one_part("odd_panels", panels_of, lambda ys: odd_one([y.tobytes() for y in ys])),
    "symmetric panel": one_part("even_panels",
        panels_of, lambda ys: single([int((y == y[:, ::-1]).all()) for y in ys])),
    "fullest panel": one_part("panels", panels_of, lambda ys: single([filled(y) for y in ys])),
    "complete symmetry": of("mirrored", uncovered),
    "symmetric patch": patch("mirrored", uncovered),
    "complete period": of("periodic", continued),
    "periodic patch": patch("periodic", continued),
    "continue rows": of("strips",
        lambda w, x: np.tile(x[:, : w.period[0]], x.shape[1])[:, : x.shape[1]]),
    "lattice majority": condensed(lambda w, n: w.new[0] if 2 * n > w.k**2 else 0),
    "lattice counts": condensed(lambda w, n: w.new[min(n, 3)]),
    "fullest cell": one_part("lattice", cells_of, lambda ys: single([filled(y) for y in ys])),
    "emptiest cell": one_part("lattice", cells_of, lambda ys: single([filled(y) for y in ys], min)),
    "overlay lattice": of("lattice",
        lambda w, x: np.max(cells_of(w, x), 0) if w.p[2] < 0.5 else NONE),
    # counts
    "commonest colour": plain("noise full", lambda x: listed(x, slice(1)), last=True),
    "rarest colour": plain("noise full", lambda x: listed(x, slice(-1, None)), last=True),
    "colours by frequency": plain("noise shapes blocks", lambda x: listed(x, slice(9)), last=True),
    "histogram": plain("dots shapes noise", histogram, last=True, top=7),
    "count objects": of("shapes dots boxes",
        lambda w, x: counted(w.new[0], len(parts(x)), 6), last=True),
    "count diagonal": of("shapes blocks",
        lambda w, x: np.eye(len(parts(x)), dtype=np.uint8) * np.uint8(w.new[0]), last=True),
    "count cells": of("mono dots", lambda w, x: counted(w.new[0], filled(x), 0), last=True, top=6),
    "order of bands": plain("bands", lambda x: deduped(x)[:, :1], last=True),
}  # fmt: skip
