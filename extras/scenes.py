"""What composed tasks are made on: the draws and traits of a task, and the scenes of its inputs.

Black (0) is the background here; compose.py recolours it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from .grids import Grid, border, crop, enlarged, mirror_tiled, where

T = TypeVar("T")


class Dice:
    """All draws of one task, named by its key, made of numpy's uniform floats alone."""

    def __init__(self, *key: int) -> None:
        self.rng = np.random.default_rng(key)
        self.ahead: list[float] = []

    def chance(self) -> float:
        if not self.ahead:
            self.ahead = self.rng.random(256).tolist()
        return self.ahead.pop()

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + int(self.chance() * (high - low + 1))

    def pick(self, among: Sequence[T]) -> T:
        return among[int(self.chance() * len(among))]

    def some(self, among: Sequence[T], n: int) -> list[T]:
        """n different ones in random order."""
        left = list(among)
        return [left.pop(int(self.chance() * len(left))) for _ in range(n)]


class World(NamedTuple):
    """What the pairs of a task have in common."""

    ink: list[int]  # 2..4 colours of inputs
    new: list[int]  # 4 colours that rules may bring in
    mark: int  # the colour of separators, walls and markers
    p: list[float]  # parameters that a scene and a rule agree on, 0..1
    top: int  # the largest side
    fixed: tuple[float, float] | None  # the size, where all inputs have the same
    square: bool
    fresh: bool  # every input has colours of its own

    @property
    def k(self) -> int:
        """A factor or the side of a lattice's cells: 2 or 3."""
        return 2 + int(self.p[0] * 2)

    @property
    def number(self) -> int:
        """How many panels a row has: 2..4."""
        return 2 + int(self.p[2] * 3)

    @property
    def period(self) -> tuple[int, int]:
        return 2 + int(self.p[0] * 3), 2 + int(self.p[2] * 3)

    def size(self, d: Dice, low: int = 3, share: float = 1.0) -> tuple[int, int]:
        """(h, w) from low to share * top."""
        u, v = self.fixed or (d.chance(), d.chance())
        span = max(1, int(self.top * share) - low + 1)
        return low + int(u * span), low + int((u if self.square else v) * span)

    def colours(self, d: Dice) -> list[int]:
        free = [c for c in range(1, 10) if c not in (*self.new, self.mark)]
        return d.some(free if self.fresh else self.ink, len(self.ink))


def scatter(d: Dice, size: tuple[int, int], ink: Sequence[int], density: float = 1.0) -> Grid:
    u = d.rng.random(size) * (len(ink) / density)
    return np.array([*ink, 0], np.uint8)[np.minimum(u.astype(np.int64), len(ink))]


def blob(d: Dice, steps: int, colour: int, side: int = 4) -> Grid:
    """A random walk, cropped: a 4-connected shape of one colour."""
    y, at = np.zeros((side, side), np.uint8), [side // 2, side // 2]
    for _ in range(steps + 1):
        y[at[0], at[1]] = colour
        i = d.between(0, 1)
        at[i] = min(max(at[i] + d.pick((-1, 1)), 0), side - 1)
    return crop(y, y > 0)


def block(d: Dice, low: int, top: int, colour: int, hollow: bool = False) -> Grid:
    y = np.full((d.between(low, top), d.between(low, top)), colour, np.uint8)
    y[1:-1, 1:-1] *= not hollow
    return y


def place(d: Dice, x: Grid, y: Grid) -> None:
    """Lay y on a spot of x where it touches nothing, if one is found."""
    (h, w), (a, b) = x.shape, y.shape
    for _ in range(6 if a <= h and b <= w else 0):
        r, c = d.between(0, h - a), d.between(0, w - b)
        if not x[max(r - 1, 0) : r + a + 1, max(c - 1, 0) : c + b + 1].any():
            x[r : r + a, c : c + b] = y
            return


def placed(d: Dice, x: Grid, things: Sequence[Grid]) -> Grid:
    """x, on which as many of the things are laid as find room."""
    for thing in things:
        place(d, x, thing)
    return x


def laid(d: Dice, w: World, things: Sequence[Grid], low: int = 6) -> Grid:
    """The things on an empty grid."""
    return placed(d, np.zeros(w.size(d, low), np.uint8), things)


def several(
    d: Dice, w: World, things: tuple[int, int], thing: Callable[[int], Grid], side: int = 6
) -> Grid:
    """From .. to so many things, each in a colour of the input's."""
    ink = w.colours(d)
    return laid(d, w, [thing(d.pick(ink)) for _ in range(d.between(*things))], side)


def row_of(w: World, panels: Sequence[Grid]) -> Grid:
    """Panels side by side, with a line between them where the task has lines."""
    line = np.full((len(panels[0]), 1), w.mark, np.uint8)
    return np.hstack([y for p in panels for y in (line, p)][1:] if w.p[1] < 0.6 else panels)


def panels_of(w: World, x: Grid, n: int = 0) -> list[Grid]:
    """The n panels of a row, as many as the task has; [] unless n of a width fit."""
    n, line = n or w.number, int(w.p[1] < 0.6)
    k, rest = divmod(x.shape[1] - line * (n - 1), n)
    return [x[:, i * (k + line) :][:, :k] for i in range(n)] if k > 0 and rest == 0 else []


def boxes(d: Dice, w: World) -> Grid:
    ink = w.colours(d)[: 1 + int(w.p[2] * 2)]
    things = []
    for i in range(d.between(2, 6)):
        if i % 2:
            things.append(blob(d, d.between(2, 6), d.pick(ink)))
        else:
            things.append(block(d, 3, 6, d.pick(ink), hollow=True))
    return laid(d, w, things, 7)


def seeds(d: Dice, w: World) -> Grid:
    """Boxes with one coloured cell inside."""
    things = [block(d, 3, 6, w.mark, True) for _ in range(d.between(2, 4))]
    for y in things:
        y[d.between(1, y.shape[0] - 2), d.between(1, y.shape[1] - 2)] = d.pick(w.colours(d))
    return laid(d, w, things, 8)


def dots(d: Dice, w: World) -> Grid:
    """Single cells, no two in a row or column."""
    x, ink = np.zeros(w.size(d, 5), np.uint8), w.colours(d)
    n = d.between(1, min(4, min(x.shape) // 2))
    x[d.some(range(x.shape[0]), n), d.some(range(x.shape[1]), n)] = [d.pick(ink) for _ in range(n)]
    return x


def links(d: Dice, w: World) -> Grid:
    """Pairs of cells of a colour in one row; some cells stand alone."""
    x, ink = np.zeros(w.size(d, 5), np.uint8), w.colours(d)
    for r in d.some(range(x.shape[0]), d.between(2, x.shape[0] // 2)):
        x[r, d.some(range(x.shape[1]), 2 if d.chance() < 0.8 else 1)] = d.pick(ink)
    return x


def panels(d: Dice, w: World, n: int = 0) -> Grid:
    n = n or w.number
    size = w.size(d, 2, 1.2 / n)
    return row_of(w, [scatter(d, size, [c], 0.3 + 0.35 * w.p[0]) for c in (w.ink * 2)[:n]])


def odd_panels(d: Dice, w: World) -> Grid:
    """All equal but one; a row of two shows no odd one."""
    size, ink = w.size(d, 2, 0.4), w.colours(d)
    row = [scatter(d, size, ink, 0.6)] * w.number
    row[d.between(0, len(row) - 1)] = scatter(d, size, ink, 0.6)
    return row_of(w, row)


def even_panels(d: Dice, w: World) -> Grid:
    """One of them is symmetric."""
    (h, n), ink = w.size(d, 3, 0.45), w.colours(d)
    row = [scatter(d, (h, n), ink, 0.6) for _ in range(w.number)]
    even = d.pick(row)
    even[:, n - n // 2 :] = even[:, : n // 2][:, ::-1]
    return row_of(w, row)


def covered(d: Dice, w: World, x: Grid) -> Grid:
    """With a rectangle hidden under the mark."""
    h, n = (d.between(2, max(2, s // 3)) for s in x.shape)
    r, c = d.between(0, x.shape[0] - h), d.between(0, x.shape[1] - n)
    x[r : r + h, c : c + n] = w.mark
    return x


def periodic(d: Dice, w: World) -> Grid:
    h, n = w.size(d, 8)
    return covered(d, w, np.tile(scatter(d, w.period, w.colours(d), 0.9), (h, n))[:h, :n])


def strips(d: Dice, w: World) -> Grid:
    """Rows that repeat, given only at their start."""
    (h, n), period = w.size(d, 3), w.period[0]
    start = np.tile(scatter(d, (h, period), w.colours(d)), 2)
    return np.pad(start, ((0, 0), (0, max(2, n - 2 * period))))


def bars(d: Dice, w: World) -> Grid:
    (h, n), ink = w.size(d, 4), w.colours(d)
    row = np.array([ink[0] if w.p[0] < 0.4 else d.pick(ink) for _ in range(n)], np.uint8)
    return np.where(np.arange(h)[:, None] >= [d.between(0, h) for _ in range(n)], row, np.uint8(0))


def cells_of(w: World, x: Grid) -> list[Grid]:
    """The cells of a lattice, row by row."""
    rows, columns = (range(0, n, w.k + 1) for n in x.shape)
    return [x[i : i + w.k, j : j + w.k] for i in rows for j in columns]


def lattice(d: Dice, w: World) -> Grid:
    """Cells of k x k between lines, all of one colour where the task says so."""
    k, ink = w.k, w.colours(d)[: 1 + int(w.p[2] * 2)]
    a, b = (min(4, s) for s in w.size(d, 2, 0.35))
    x = np.full((a * (k + 1) - 1, b * (k + 1) - 1), w.mark, np.uint8)
    for y in cells_of(w, x):
        y[:] = scatter(d, (k, k), ink, 0.1 + 0.55 * d.chance() ** 1.5)
    return x


def ruled(d: Dice, w: World) -> Grid:
    """Full rows and columns of one colour over scattered cells."""
    x, ink = scatter(d, w.size(d, 5), w.colours(d), 0.15), w.colours(d)
    x[d.some(range(1, len(x) - 1), d.between(1, 2))] = ink[0]
    x[:, d.some(range(1, x.shape[1] - 1), d.between(0, 1))] = ink[0]
    return x


def keyed_columns(d: Dice, w: World) -> Grid:
    """A coloured row over cells of the mark."""
    x = scatter(d, w.size(d, 3), [w.mark], 0.5)
    x[0] = scatter(d, (1, x.shape[1]), w.colours(d))[0]
    return x


def keyed_corner(d: Dice, w: World) -> Grid:
    """Objects of the mark; the first cell has another colour."""
    x = laid(d, w, [blob(d, d.between(1, 8), w.mark) for _ in range(d.between(1, 5))], 5)
    x[:2, :2] = 0
    x[0, 0] = d.pick(w.colours(d))
    return x


def framed(d: Dice, w: World) -> Grid:
    """Scattered cells, and a frame of the mark somewhere among them."""
    x = scatter(d, w.size(d, 6), w.colours(d), 0.25 + 0.4 * w.p[0])
    h, n = (d.between(3, s - 1) for s in x.shape)
    r, c = d.between(0, x.shape[0] - h), d.between(0, x.shape[1] - n)
    y = x[r : r + h, c : c + n]
    y[:] = where(border(y), w.mark, y)
    return x


def walled(d: Dice, w: World) -> Grid:
    """Objects over a wall along or near the border."""
    x, ink = np.zeros(w.size(d, 6), np.uint8), w.colours(d)
    x[len(x) - 1 - d.between(0, 1)] = w.mark
    for _ in range(d.between(1, 3)):
        place(d, x[: len(x) - 3], blob(d, d.between(1, 5), d.pick(ink), 3))
    return x


def stamps(d: Dice, w: World) -> Grid:
    """A figure around a cell of the mark, and such cells alone."""
    figure, spot = scatter(d, (3, 3), w.colours(d)[:2], 0.5), np.full((3, 3), 10, np.uint8)
    figure[1, 1] = spot[1, 1] = w.mark
    x = laid(d, w, [np.where(figure > 0, figure, 10), *[spot] * d.between(1, 3)], 8)
    return where(x == 10, 0, x)


def twins(d: Dice, w: World) -> Grid:
    """Coloured shapes, and their like in the mark."""
    kinds = [blob(d, 2 + 2 * i, c, 3) for i, c in enumerate(w.colours(d)[: d.between(1, 3)])]
    sets = [[kind, *[where(kind > 0, w.mark, kind)] * d.between(1, 2)] for kind in kinds]
    return laid(d, w, [y for each in sets for y in each], 8)


def odd_shapes(d: Dice, w: World) -> Grid:
    """All of one shape but one."""
    ink = w.colours(d)[: 1 if w.p[0] < 0.5 else 4]
    kind, odd = blob(d, d.between(2, 6), 1, 3), blob(d, d.between(2, 7), 1, 3)
    return laid(d, w, [y * np.uint8(d.pick(ink)) for y in (odd, *[kind] * d.between(2, 4))], 8)


def bands(d: Dice, w: World) -> Grid:
    ink = w.colours(d)
    rows = [ink[i % len(ink)] for i in range(d.between(2, 5)) for _ in range(d.between(1, 3))]
    return np.array(rows, np.uint8)[:, None].repeat(w.size(d)[1], 1)


Scene = Callable[[Dice, World], Grid]
NAMED: tuple[Scene, ...] = (
    boxes, seeds, dots, links, walled, stamps, twins, odd_shapes, keyed_corner, framed, panels,
    odd_panels, even_panels, lattice, periodic, strips, bars, bands, ruled, keyed_columns,
)  # fmt: skip
SCENES: dict[str, Scene] = {
    "noise": lambda d, w: scatter(d, w.size(d), w.colours(d), 0.2 + 0.5 * w.p[0]),
    "mono": lambda d, w: scatter(d, w.size(d), w.colours(d)[:1], 0.3 + 0.35 * w.p[0]),
    "full": lambda d, w: scatter(d, w.size(d), w.colours(d)),
    "coarse": lambda d, w: enlarged(scatter(d, w.size(d, 2, 1.2 / w.k), w.colours(d), 0.8), w.k),
    "sprite": lambda d, w: laid(
        d, w, [scatter(d, (d.between(2, 5), d.between(2, 5)), w.colours(d), 0.75)], 5
    ),
    "shapes": lambda d, w: several(d, w, (2, 6), lambda c: blob(d, d.between(1, 9), c)),
    "blocks": lambda d, w: several(d, w, (2, 5), lambda c: block(d, 1, 5, c)),
    "solids": lambda d, w: several(d, w, (1, 4), lambda c: block(d, 3, 6, c), 7),
    "halves": lambda d, w: panels(d, w, 2),
    "mirrored": lambda d, w: covered(
        d, w, mirror_tiled(scatter(d, w.size(d, 3, 0.6), w.colours(d), 0.8))
    ),
    **{draw.__name__: draw for draw in NAMED},
}
