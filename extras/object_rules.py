"""Rules about objects, lines, keys and coarse cells, and their scenes: the source `object-rule`.

They are a table of their own, so that composed tasks stay the ones checkpoints were trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from . import grids
from .grids import NONE, Fn, Grid, box, crop, enlarged, painted, parts, where
from .rules import (
    RAYS,
    Rule,
    cells_fall,
    has_hole,
    inside,
    listed,
    neighbours,
    objects_fall,
    of,
    on_border,
    outline,
    plain,
    rays,
    recoloured,
    single,
)
from .scenes import (
    Dice,
    Scene,
    World,
    blob,
    block,
    laid,
    panels_of,
    place,
    placed,
    row_of,
    scatter,
    several,
)

# ---------------------------------------------------------------- scenes


def cored(d: Dice, w: World) -> Grid:
    """Blocks of two colours, the outer and the inner."""
    things = []
    for _ in range(d.between(1, 4)):
        outer, inner = d.some(w.colours(d), 2)
        things.append(where(inside(y := block(d, 3, 6, outer)), inner, y))
    return laid(d, w, things, 7)


def gaps(d: Dice, w: World) -> Grid:
    """Blocks with a cell or two missing."""
    things = [block(d, 3, 6, d.pick(w.colours(d))) for _ in range(d.between(2, 4))]
    for y in things:
        for _ in range(d.between(0, 2)):
            y[d.between(0, y.shape[0] - 1), d.between(0, y.shape[1] - 1)] = 0
    return laid(d, w, things, 7)


def broken(d: Dice, w: World) -> Grid:
    """Frames with a cell missing."""
    things = [block(d, 3, 6, d.pick(w.colours(d)), hollow=True) for _ in range(d.between(2, 4))]
    for y in things:
        y[d.pick((0, -1)), d.between(1, y.shape[1] - 2)] = 0
    return laid(d, w, things, 7)


def specks(d: Dice, w: World) -> Grid:
    """Blocks under specks of the mark."""
    x = several(d, w, (1, 4), lambda c: block(d, 3, 6, c), 7)
    return np.where(scatter(d, x.shape, [1], 0.08 + 0.1 * w.p[0]) > 0, np.uint8(w.mark), x)


def middle_wall(d: Dice, w: World) -> Grid:
    """Objects above and below a wall."""
    x = np.zeros(w.size(d, 8), np.uint8)
    at = d.between(3, len(x) - 4)
    x[at] = w.mark
    for half in (x[: at - 1], x[at + 2 :]):
        placed(d, half, [blob(d, d.between(1, 4), c, 3) for c in w.colours(d)[:2]])
    return x


def facing(d: Dice, w: World) -> Grid:
    """Cells before obstacles."""
    x = np.zeros(w.size(d, 6), np.uint8)
    for r in d.some(range(len(x)), d.between(2, max(2, len(x) // 2))):
        x[r, d.between(0, x.shape[1] // 2 - 1)] = d.pick(w.colours(d))
        if d.chance() < 0.75:
            x[r, d.between(x.shape[1] // 2 + 1, x.shape[1] - 1)] = w.mark
    return x


def marked_noise(d: Dice, w: World) -> Grid:
    """Scattered cells and one to three of the mark."""
    x = scatter(d, w.size(d, 5), w.colours(d)[:2], 0.25 + 0.25 * w.p[0])
    for _ in range(1 + int(w.p[2] * 3)):
        x[d.between(0, x.shape[0] - 1), d.between(0, x.shape[1] - 1)] = w.mark
    return x


def cornered(d: Dice, w: World) -> Grid:
    """Four cells of the mark at the corners of a rectangle among scattered cells."""
    x = scatter(d, w.size(d, 7), w.colours(d), 0.2 + 0.5 * w.p[0])
    starts = [d.between(0, n - 4) for n in x.shape]
    ends = [d.between(a + 3, n - 1) for a, n in zip(starts, x.shape, strict=True)]
    x[np.ix_(*zip(starts, ends, strict=True))] = w.mark
    return x


def legend(d: Dice, w: World) -> Grid:
    """Objects, and in the first two columns what their colours become."""
    ink = w.colours(d)
    x = np.zeros(w.size(d, 7), np.uint8)
    placed(d, x[:, 3:], [blob(d, d.between(2, 8), d.pick(ink)) for _ in range(d.between(2, 5))])
    free = [c for c in range(1, 10) if c not in ink and c != w.mark]
    to = d.some(free, len(ink)) if len(free) >= len(ink) else ink[1:] + ink[:1]
    x[: len(ink), 0], x[: len(ink), 1] = ink, to
    x[:, 2] = w.mark
    return x


def lone_key(d: Dice, w: World) -> Grid:
    """Objects of the mark and one cell of another colour."""
    x = laid(d, w, [blob(d, d.between(4, 9), w.mark) for _ in range(d.between(1, 4))], 6)
    return placed(d, x, [np.array([[d.pick(w.colours(d))]], np.uint8)])


def target(d: Dice, w: World) -> Grid:
    """A figure of 3 x 3 and a cell of the mark."""
    x = np.zeros(w.size(d, 8), np.uint8)
    figure = scatter(d, (3, 3), w.colours(d)[:2], 0.7)
    figure[1, 1] = figure[0, 1] = figure[1, 0] = figure[2, 1] = figure[1, 2] = w.colours(d)[0]
    place(d, x[:, : x.shape[1] // 2], figure)
    spot = np.full((3, 3), 10, np.uint8)
    spot[1, 1] = w.mark
    return where((y := placed(d, x, [spot])) == 10, 0, y)


def two_dots(d: Dice, w: World) -> Grid:
    """A cell of the mark and one of another colour."""
    x = np.zeros(w.size(d, 5), np.uint8)
    rows, columns = d.some(range(len(x)), 2), d.some(range(x.shape[1]), 2)
    x[rows, columns] = w.ink[0], w.mark
    return x


def beside_line(d: Dice, w: World) -> Grid:
    """Scattered cells on one side of a line."""
    h, n = w.size(d, 4, 0.55)
    left = scatter(d, (h, n), w.colours(d), 0.3 + 0.3 * w.p[0])
    line = np.full((h, 1), w.mark, np.uint8)
    return np.hstack([left, line, np.zeros_like(left)])


def coarse_lattice(d: Dice, w: World) -> Grid:
    """Few filled cells of k x k between lines."""
    a, b = (min(6, s) for s in w.size(d, 3, 0.45))
    x = scatter(d, (a, b), w.colours(d), 0.1 + 0.25 * w.p[2])
    return from_cells(w, x)


def coarse_dots(d: Dice, w: World) -> Grid:
    a, b = (min(6, s) for s in w.size(d, 3, 0.55))
    return enlarged(scatter(d, (a, b), w.colours(d), 0.1 + 0.25 * w.p[2]), w.k)


def first_row(d: Dice, w: World) -> Grid:
    """One row, coloured at its start."""
    n = d.between(3, 8)
    filled = n if w.p[0] < 0.3 else d.between(1, n - 1)
    x = np.zeros((1, n), np.uint8)
    x[0, :filled] = [d.pick(w.colours(d)) for _ in range(filled)]
    return x


def started(d: Dice, w: World) -> Grid:
    """A tile in the corner of an empty grid."""
    x = np.zeros(w.size(d, 6), np.uint8)
    a, b = w.period
    x[:a, :b] = scatter(d, (a, b), w.colours(d))
    return x


def masked(d: Dice, w: World) -> Grid:
    """Left a pattern, right which of it counts."""
    size = w.size(d, 3, 0.5)
    return row_of(w, [scatter(d, size, w.colours(d), 0.9), scatter(d, size, [w.mark], 0.5)])


def among_blobs(d: Dice, w: World, thing: Grid) -> Grid:
    blobs = [blob(d, d.between(4, 9), d.pick(w.colours(d)), 3) for _ in range(d.between(1, 4))]
    return laid(d, w, [thing, *blobs], 8)


def mixed_boxes(d: Dice, w: World) -> Grid:
    """One box among blobs."""
    return among_blobs(d, w, block(d, 3, 6, d.pick(w.colours(d)), hollow=True))


def mixed_blocks(d: Dice, w: World) -> Grid:
    """One block among blobs."""
    return among_blobs(d, w, block(d, 2, 5, d.pick(w.colours(d))))


SCENES: dict[str, Scene] = {
    draw.__name__: draw
    for draw in (
        cored, gaps, broken, specks, middle_wall, facing, marked_noise, cornered, legend, lone_key,
        target, two_dots, beside_line, coarse_lattice, coarse_dots, first_row, started, masked,
        mixed_boxes, mixed_blocks,
    )
}  # fmt: skip

# ---------------------------------------------------------------- rules


def each(fn: Callable[[Grid], Grid], mixed: bool = False) -> Fn:
    """Every object's bounding box, changed where it is; of one colour only, unless mixed."""

    def changed(x: Grid) -> Grid:
        y = np.zeros_like(x)
        for p in parts(x, mixed):
            at = box(p, x.shape[1])
            own = painted(np.zeros_like(x), [p], [1])[at]
            y[at] = np.where((z := fn(x[at] * own)) > 0, z, y[at])
        return y

    return changed


def lower_half(y: Grid) -> Grid:
    return where(np.arange(len(y))[:, None] < len(y) // 2, 0, y)


def first_row_only(y: Grid) -> Grid:
    return where(np.arange(len(y))[:, None] > 0, 0, y)


def checked(y: Grid) -> Grid:
    return where(np.indices(y.shape).sum(0) % 2 > 0, 0, y)


def striped(y: Grid) -> Grid:
    return where(np.arange(y.shape[1]) % 2 > 0, 0, y)


def as_core(y: Grid) -> Grid:
    return where(y > 0, int(y[len(y) // 2, y.shape[1] // 2]), y)


def swapped_layers(x: Grid) -> Grid:
    a, b = int(x[0, 0]), int(x[len(x) // 2, x.shape[1] // 2])
    return where(x == a, b, where(x == b, a, x))


def by(number: Callable[[Grid, list[int]], int]) -> Callable[[World, Grid], Grid]:
    """Objects get colours by a number that each has."""

    def fn(w: World, x: Grid) -> Grid:
        objects = parts(x)
        return painted(x, objects, [w.new[min(3, int(number(x, p)))] for p in objects])

    return fn


def width_of(x: Grid, p: list[int]) -> int:
    columns = box(p, x.shape[1])[1]
    return columns.stop - columns.start - 1


def likes(x: Grid, p: list[int]) -> int:
    """How many objects have its shape, but for itself."""
    return sum(outline(q, x.shape[1]) == outline(p, x.shape[1]) for q in parts(x)) - 1


def holes_by_size(w: World, x: Grid) -> Grid:
    hole, small = grids.enclosed(x).astype(np.uint8), 1 + int(w.p[0] * 3)
    y = x.copy()
    for p in parts(hole):
        y.flat[p] = w.new[len(p) > small]
    return y if hole.any() else NONE


def attracted(x: Grid) -> Grid:
    """Objects on both sides move as far as the wall."""
    wall = [r for r, row in enumerate(x.tolist()) if row[0] and len(set(row)) == 1]
    if len(wall) != 1:
        return NONE
    above, below = objects_fall(x[: wall[0]]), objects_fall(x[wall[0] + 1 :][::-1])
    ok = above.size and below.size
    return np.vstack([above, x[wall[0]][None], below[::-1]]) if ok else NONE


def reaching(stops: bool, w: World, x: Grid) -> Grid:
    """To the right of each cell up to the mark, or only where there is one."""
    y = x.copy()
    for r, row in enumerate(x.tolist()):
        c = next((c for c, v in enumerate(row) if v and v != w.mark), -1)
        end = row.index(w.mark) if w.mark in row else len(row)
        if c >= 0 and (end < len(row) or not stops):
            y[r, c + 1 : end] = row[c]
    return y


def in_line(across: bool, w: World, x: Grid) -> Grid:
    """The coloured cells of the mark's rows (or columns)."""
    row = (x == w.mark).any(int(not across), keepdims=True)
    return where((x > 0) & (x != w.mark) & row, w.new[0], x)


def between_marks(do: str, w: World, x: Grid) -> Grid:
    r, c = np.nonzero(x == w.mark)
    if len(r) != 4 or r[-1] - r[0] < 2 or c.max() - c.min() < 2:
        return NONE
    at = slice(r[0] + 1, r[-1]), slice(c.min() + 1, c.max())
    if do == "crop":
        return x[at]
    y = x.copy() if do == "paint" else np.zeros_like(x)
    y[at] = where(x[at] == 0, w.new[0], x[at]) if do == "paint" else x[at]
    return y


def by_legend(keep: bool, x: Grid) -> Grid:
    """The objects in the legend's colours, beside it or alone."""
    old, new = x[x[:, 0] > 0, :2].T
    y = recoloured(old, new)(x[:, 3:])
    return np.hstack([x[:, :3], y]) if keep else y


def recoloured_by_lone(x: Grid) -> Grid:
    """All objects in the colour of the only one of one cell, which goes."""
    lone = [p for p in parts(x) if len(p) == 1]
    return painted(where(x > 0, int(x.flat[lone[0][0]]), x), lone, [0]) if len(lone) == 1 else NONE


def moved_to_mark(stays: bool, w: World, x: Grid) -> Grid:
    marks, cells = np.argwhere(x == w.mark), (x > 0) & (x != w.mark)
    figure = crop(x, cells)
    if len(marks) != 1 or figure.shape != (3, 3):
        return NONE
    r, c = marks[0].tolist()
    y = x.copy() if stays else np.zeros_like(x)
    if not (0 < r < len(x) - 1 and 0 < c < x.shape[1] - 1):
        return NONE
    y[r - 1 : r + 2, c - 1 : c + 2] = figure
    return y


def path(first: int, w: World, x: Grid) -> Grid:
    """From the cell to the mark, along the row and then the column, or the other way."""
    (r, c), (i, j) = np.argwhere((x > 0) & (x != w.mark))[0], np.argwhere(x == w.mark)[0]
    y, corner = x.copy(), ((r, j), (i, c))[first]
    for a, b in (((r, c), corner), (corner, (i, j))):
        at = (
            slice(min(a[0], b[0]), max(a[0], b[0]) + 1),
            slice(min(a[1], b[1]), max(a[1], b[1]) + 1),
        )
        y[at] = where(x[at] == 0, w.new[0], x[at])
    return y


def reflected(turned: bool, x: Grid) -> Grid:
    """What is on the one side of a line appears on the other."""
    n = (x.shape[1] - 1) // 2
    left = x[:, :n]
    return np.hstack([left, x[:, n : n + 1], left[::-1, ::-1] if turned else left[:, ::-1]])


def to_cells(w: World, x: Grid) -> Grid:
    return x[:: w.k + 1, :: w.k + 1]


def from_cells(w: World, x: Grid) -> Grid:
    """Cells of k x k with lines of the mark between."""
    y = enlarged(np.full(x.shape, 10, np.uint8), w.k + 1)
    y[w.k :: w.k + 1], y[:, w.k :: w.k + 1] = w.mark, w.mark
    return np.where(y == w.mark, y, enlarged(x, w.k + 1))[:-1, :-1]


def framed_objects(w: World, x: Grid) -> Grid:
    """A ring around each object's bounding box."""
    y = np.zeros((len(x) + 2, x.shape[1] + 2), np.uint8)
    for p in parts(x):
        rows, columns = box(p, x.shape[1])
        ring = y[rows.start : rows.stop + 2, columns.start : columns.stop + 2]
        ring[:] = where(grids.border(ring), w.new[0], ring)
    return np.where(x > 0, x, y[1:-1, 1:-1])


def crossed_objects(w: World, x: Grid) -> Grid:
    """Lines along the rows of every object of one cell."""
    y = x.copy()
    for p in parts(x):
        if len(p) == 1:
            r = p[0] // x.shape[1]
            y[r] = where(x[r] == 0, w.new[0], x[r])
    return y


def repeated(w: World, x: Grid) -> Grid:
    """The object again and again to the right, with a gap."""
    if len(found := parts(x, mixed=True)) != 1:
        return NONE
    (rows, columns), y = box(found[0], x.shape[1]), x.copy()
    figure = x[rows, columns]
    step = figure.shape[1] + w.k - 2
    for c in range(columns.start + step, x.shape[1], step):
        y[rows, c : c + figure.shape[1]] = figure[:, : x.shape[1] - c]
    return y


def halo_by_colour(w: World, x: Grid) -> Grid:
    """A cross around one colour, diagonal cells around another."""
    near, y = grids.around(x, True), x.copy()
    for colour, new, at in ((w.ink[0], 0, near[:4]), (w.ink[1], 1, near[4:])):
        y = where((y == 0) & np.any([n == colour for n in at], 0), w.new[new], y)
    return y


def one_colour_shifted(w: World, x: Grid) -> Grid:
    """The cells of one colour move right by one."""
    rest, y = where(x == w.ink[0], 0, x), np.zeros_like(x)
    y[:, 1:] = where(x != w.ink[0], 0, x)[:, :-1]
    return NONE if ((rest > 0) & (y > 0)).any() or (x[:, -1] == w.ink[0]).any() else rest + y


def tallest(best: Callable[[list[int]], int], w: World, x: Grid) -> Grid:
    i = single(np.count_nonzero(x, 0).tolist(), best)
    y = x.copy()
    y[:, i] = where(x[:, i] > 0, w.new[0], x[:, i])
    return y if i >= 0 and x[:, i].any() else NONE


def halves_folded(x: Grid) -> Grid:
    left, right = x[:, : x.shape[1] // 2], x[:, (x.shape[1] + 1) // 2 :][:, ::-1]
    return np.where(left > 0, left, right)


def shown_by_mask(w: World, x: Grid) -> Grid:
    halves = panels_of(w, x, 2)
    return where(halves[1] == 0, 0, halves[0]) if halves else NONE


def rings(x: Grid) -> Grid:
    """The row's colours from the middle outwards."""
    if (x == 0).any():
        return NONE
    far = np.abs(np.arange(1 - x.shape[1], x.shape[1]))
    return x[0][np.maximum(far[:, None], far)]


def staircase(x: Grid) -> Grid:
    """Every row has a cell more than the one above."""
    n, k = x.shape[1], int(np.count_nonzero(x))
    if len(set(x[0, :k].tolist())) > 1:
        return NONE
    return where(np.arange(n) >= k + np.arange(n - k + 1)[:, None], 0, x[:, :1].repeat(n, 1))


def bars_of_sizes(x: Grid) -> Grid:
    """The objects in the order of their sizes, as bars."""
    objects = sorted(parts(x), key=len, reverse=True)
    sizes = [len(p) for p in objects]
    if len(set(sizes)) < len(sizes) or len(sizes) < 2:
        return NONE
    colours = np.array([x.flat[p[0]] for p in objects], np.uint8)[:, None]
    return where(np.arange(sizes[0]) >= np.array(sizes)[:, None], 0, colours)


def tiled_turned(x: Grid) -> Grid:
    """A square in four turns."""
    if x.shape[0] != x.shape[1]:
        return NONE
    above, below = (x, np.rot90(x, -1)), (np.rot90(x), np.rot90(x, 2))
    return np.vstack([np.hstack(above), np.hstack(below)])


def tile_continued(w: World, x: Grid) -> Grid:
    (a, b), (h, n) = w.period, x.shape
    return np.tile(x[:a, :b], (h, n))[:h, :n]


def cropped_if(holds: Callable[[Grid, list[int]], bool]) -> Fn:
    def fn(x: Grid) -> Grid:
        found = [p for p in parts(x) if holds(x, p)]
        return x[box(found[0], x.shape[1])] if len(found) == 1 else NONE

    return fn


def is_rectangle(x: Grid, p: list[int]) -> bool:
    return len(p) == x[box(p, x.shape[1])].size


def coarse(fn: Fn) -> Rule:
    return of(
        "coarse_dots", lambda w, x: enlarged(y, w.k) if (y := fn(x[:: w.k, :: w.k])).size else y
    )


def in_cells(fn: Fn) -> Rule:
    """In the cells of a lattice as if they were cells of a grid."""

    def lattice(w: World, x: Grid) -> Grid:
        return from_cells(w, y) if (y := fn(to_cells(w, x))).size else y

    return of("coarse_lattice", lattice)


SMALL: dict[str, Fn] = {
    **{name: rays(RAYS[name]) for name in ("ray", "row", "cross", "diagonal ray")},
    "mirrored": lambda x: x[:, ::-1],
    "half turned": lambda x: x[::-1, ::-1],
    "fallen": cells_fall,
    "rolled": lambda x: np.roll(x, 1, 1),
    "made symmetric": lambda x: np.where(x > 0, x, x[:, ::-1]),
}
ANY = "shapes blocks boxes"
RULES: dict[str, Rule] = {
    # objects where they are
    "mirror objects": plain("shapes mixed_boxes", each(lambda y: y[:, ::-1])),
    "turn objects": plain("shapes mixed_boxes", each(lambda y: y[::-1, ::-1])),
    "make objects symmetric": plain("shapes", each(lambda y: np.maximum(y, y[:, ::-1]))),
    "fill boxes of objects": plain("shapes gaps", each(lambda y: np.full_like(y, y.max()))),
    "frames of objects": plain(
        "shapes broken gaps", each(lambda y: where(~grids.border(y), 0, np.full_like(y, y.max())))
    ),
    "lower halves": plain("shapes blocks", each(lower_half)),
    "first row of objects": plain("blocks solids shapes", each(first_row_only)),
    "checked objects": plain("blocks solids", each(checked)),
    "striped objects": plain("blocks solids", each(striped)),
    "swap layers": plain("cored", each(swapped_layers, mixed=True)),
    "outer to inner": plain("cored", each(as_core, mixed=True)),
    "inner to outer": plain("cored", each(lambda y: where(y > 0, int(y[0, 0]), y), mixed=True)),
    "peel": plain("cored solids", each(lambda y: where(~inside(y), 0, y), mixed=True)),
    "erase cores": plain("cored", each(lambda y: where(inside(y), 0, y), mixed=True)),
    "mend frames": plain("broken", each(lambda y: where(grids.border(y), y.max(), y))),
    "remove specks": of("specks", lambda w, x: where((x == w.mark) & (neighbours(x) < 2), 0, x)),
    "frame objects": of("dots shapes", framed_objects),
    "rows of lone cells": of("dots shapes", crossed_objects),
    # colours of objects
    "colours by width": of("blocks shapes", by(width_of)),
    "colours by likes": of("odd_shapes twins", by(likes)),
    "colours by holes": of("mixed_boxes boxes", by(has_hole)),
    "colours by rectangle": of("shapes mixed_blocks gaps", by(is_rectangle)),
    "colours by border": of(ANY, by(on_border)),
    "fill holes by size": of("boxes mixed_boxes", holes_by_size),
    "recolour by lone": plain("lone_key", recoloured_by_lone),
    "by legend": plain("legend", partial(by_legend, True)),
    "by legend, cropped": plain("legend", partial(by_legend, False)),
    "mark's rows": of("marked_noise", partial(in_line, True)),
    "mark's columns": of("marked_noise", partial(in_line, False)),
    "tallest to new": of("bars", partial(tallest, max)),
    "shortest to new": of("bars", partial(tallest, min)),
    "halo by colour": of("dots", halo_by_colour, colours=True),
    # motion
    "fall to the wall": plain("middle_wall", attracted),
    "move to the mark": of("target", partial(moved_to_mark, False)),
    "copy to the mark": of("target", partial(moved_to_mark, True)),
    "shift one colour": of("noise shapes blocks", one_colour_shifted, colours=True),
    "repeat the object": of("sprite", repeated),
    "reflect": plain("beside_line", partial(reflected, False)),
    "turn across": plain("beside_line", partial(reflected, True)),
    # lines
    "reach the obstacle": of("facing", partial(reaching, False)),
    "reach obstacles only": of("facing", partial(reaching, True)),
    "path along the row": of("two_dots", partial(path, 0)),
    "path along the column": of("two_dots", partial(path, 1)),
    # crops
    "crop the holed": plain("mixed_boxes", cropped_if(has_hole)),
    "crop the rectangle": plain("mixed_blocks", cropped_if(is_rectangle), last=True),
    **{f"{do} between marks": of("cornered", partial(between_marks, do))
        for do in ("crop", "keep", "paint")},
    # coarse cells
    **{f"coarse {name}": coarse(fn) for name, fn in SMALL.items()},
    **{f"lattice {name}": in_cells(fn) for name, fn in SMALL.items()},
    "lattice to cells": of("coarse_lattice", to_cells),
    # patterns and panels
    "fold halves": plain("noise shapes dots", halves_folded),
    "tile turned": plain("full noise", tiled_turned, top=8),
    "shown by mask": of("masked", shown_by_mask),
    "continue the tile": of("started", tile_continued),
    "rings": plain("first_row", rings),
    "staircase": plain("first_row", staircase),
    "bars of sizes": plain("shapes blocks", bars_of_sizes, last=True),
    "colours in order": plain("noise shapes", lambda x: listed(x, slice(9)).T, last=True),
}  # fmt: skip
