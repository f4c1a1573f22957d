"""Tools for small grids with a black background: objects, boxes, neighbours, tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Grid = np.ndarray
Fn = Callable[[Grid], Grid]
NONE = np.zeros((0, 0), np.uint8)  # no answer


def padded(x: Grid) -> Grid:
    """With a border of background."""
    y = np.zeros((x.shape[0] + 2, x.shape[1] + 2), np.uint8)
    y[1:-1, 1:-1] = x
    return y


def parts(x: Grid, mixed: bool = False) -> list[list[int]]:
    """The objects: flat indices of 8-connected cells of one colour (mixed: of any but black)."""
    flat, n, found = padded(x > 0 if mixed else x).reshape(-1).tolist(), x.shape[1] + 2, []
    for start, colour in enumerate(flat):
        if colour:
            flat[start], stack, part = 0, [start], []
            while stack:
                i = stack.pop()
                part.append(i - n - 1 - 2 * (i // n - 1))
                for j in (i - n - 1, i - n, i - n + 1, i - 1, i + 1, i + n - 1, i + n, i + n + 1):
                    if flat[j] == colour:
                        flat[j] = 0
                        stack.append(j)
            found.append(part)
    return found


def enclosed(x: Grid) -> Grid:
    """(h, w) bool: the background that no 4-connected way over background joins to the border."""
    flat, n, stack = padded(x).reshape(-1).tolist(), x.shape[1] + 2, [0]
    while stack:
        i = stack.pop()
        for j in (i - n, i - 1, i + 1, i + n):
            if 0 <= j < len(flat) and flat[j] == 0:
                flat[j] = 255
                stack.append(j)
    return np.array(flat, np.uint8).reshape(-1, n)[1:-1, 1:-1] == 0


def around(x: Grid, diagonal: bool = False) -> list[Grid]:
    """Each cell's 4 or 8 neighbours, background beyond the border."""
    (h, w), p = x.shape, padded(x)
    steps = [(0, 1), (1, 0), (1, 2), (2, 1)] + [(0, 0), (0, 2), (2, 0), (2, 2)] * diagonal
    return [p[r : r + h, c : c + w] for r, c in steps]


def painted(x: Grid, found: Sequence[list[int]], colours: Sequence[int]) -> Grid:
    """A copy whose objects have these colours."""
    y = x.copy()
    flat = y.reshape(-1)
    for part, colour in zip(found, colours, strict=True):
        flat[part] = colour
    return y


def box(part: Sequence[int], w: int) -> tuple[slice, slice]:
    """The bounding box of an object in a grid of width w."""
    rows, columns = [i // w for i in part], [i % w for i in part]
    return slice(min(rows), max(rows) + 1), slice(min(columns), max(columns) + 1)


def crop(x: Grid, mask: Grid) -> Grid:
    """To the bounding box of a mask."""
    cells = np.flatnonzero(mask).tolist()
    return x[box(cells, x.shape[1])] if cells else NONE


def where(mask: Grid, colour: int, x: Grid) -> Grid:
    return np.where(mask, np.uint8(colour), x)


def border(x: Grid) -> Grid:
    y = np.ones(x.shape, bool)
    y[1:-1, 1:-1] = False
    return y


def enlarged(x: Grid, k: int) -> Grid:
    return x.repeat(k, 0).repeat(k, 1)


def mirror_tiled(x: Grid) -> Grid:
    x = np.hstack([x, x[:, ::-1]])
    return np.vstack([x, x[::-1]])
