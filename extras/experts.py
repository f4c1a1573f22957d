"""Hand-made experts: a solver without weights that answers each cell from itself and one feature.

A feature gives each cell of a canvas a token or a small number: its mirror image, its neighbour,
the size of its object (Chollet 2019, arXiv 1911.01547, "core knowledge"). An expert is a feature
and a rule. Each demo is predicted from the other demos, and the experts that do this best are
mixed. There are two rounds: the second also has the features of the first round's answer.
Axes: H x W a canvas, h x w the grid on it, M cells of all demos, N demos, K features, C classes,
V = 12 tokens (0 nothing, 1 end of the grid, 2 black, 3 to 11 the other colours).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import data, score, sources
from ..config import DataConfig
from ..data import EOS, Task
from .grids import Grid, crop, enclosed, enlarged, mirror_tiled, parts

SOURCE = "experts-" + hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()
TOKENS, BLACK = 12, data.FIRST_COLOUR
EVEN = (1 / TOKENS,) * TOKENS  # the prior of a token
ROUNDS, MIXED = 2, 4  # MIXED experts answer in each round
SHARPNESS = 60.0  # an expert weighs exp(SHARPNESS * its mean log-likelihood of a demo's cell)
PRIOR = 0.2  # weight of the prior in every count, in cells
ROUND_COST = 0.02  # taken off the log-likelihood of an expert with a feature of round 2

# ---------------------------------------------------------------- features


def take(x: Grid, rows: np.ndarray, columns: np.ndarray) -> Grid:
    """x[rows][:, columns], 0 where an index lies beyond the grid."""
    (h, w), padded = x.shape, np.pad(x, ((0, 1), (0, 1)))
    rows = np.where((rows >= 0) & (rows < h), rows, h)
    return padded[rows[:, None], np.where((columns >= 0) & (columns < w), columns, w)]


def laid(y: Grid, canvas: tuple[int, int], end: int = EOS) -> Grid:
    """A grid of tokens on a canvas, cut where it is too large, with the marks of its end."""
    (h, w), out = y.shape, np.zeros(canvas, np.uint8)
    out[:h, :w] = y[: canvas[0], : canvas[1]]
    out[h : h + 1, :w] = out[:h, w : w + 1] = end
    return out


def piece(x: Grid, axis: int, number: int, of: int) -> Grid:
    """The number-th of 2 or 3 equal parts along an axis, which may have lines between them."""
    n = x.shape[axis]
    start, size = number * ((n + 1) // of), (n - (of - 1) * (n % of == of - 1)) // of
    return x.take(range(start, start + size), axis)


def fallen(x: Grid) -> Grid:
    """All that is not black falls to the bottom of its column."""
    order = np.argsort(x > BLACK, 0, kind="stable")
    y = np.take_along_axis(np.where(x > BLACK, x, BLACK), order, 0)
    return np.where(x > 0, y, 0)


FRAMES: dict[str, Callable[[Grid], Grid]] = {
    **{f"turned by D8's {k}": partial(data.turn, k) for k in range(8)},
    "2 x 2 tiles": lambda x: np.tile(x, (2, 2)),
    "3 x 3 tiles": lambda x: np.tile(x, (3, 3)),
    "h x w tiles": lambda x: np.tile(x, x.shape),
    "2 x 1 tiles": lambda x: np.tile(x, (2, 1)),
    "1 x 2 tiles": lambda x: np.tile(x, (1, 2)),
    "2 x 2 mirror tiles": mirror_tiled,
    "mirror below": lambda x: np.vstack((x, x[::-1])),
    "mirror above": lambda x: np.vstack((x[::-1], x)),
    "mirror right": lambda x: np.hstack((x, x[:, ::-1])),
    "mirror left": lambda x: np.hstack((x[:, ::-1], x)),
    "enlarged 2": lambda x: enlarged(x, 2),
    "enlarged 3": lambda x: enlarged(x, 3),
    "enlarged h x w": lambda x: x.repeat(x.shape[0], 0).repeat(x.shape[1], 1),
    "stretched down": lambda x: x.repeat(2, 0),
    "stretched across": lambda x: x.repeat(2, 1),
    "box": lambda x: crop(x, x > BLACK),
    **{f"half {n} down": partial(piece, axis=0, number=n, of=2) for n in range(2)},
    **{f"half {n} across": partial(piece, axis=1, number=n, of=2) for n in range(2)},
    **{f"third {n} across": partial(piece, axis=1, number=n, of=3) for n in range(3)},
    **{f"third {n} down": partial(piece, axis=0, number=n, of=3) for n in range(3)},
    "start of the row": lambda x: x[:, :1].repeat(x.shape[1], 1),
    "end of the row": lambda x: x[:, -1:].repeat(x.shape[1], 1),
    "start of the column": lambda x: x[:1].repeat(len(x), 0),
    "end of the column": lambda x: x[-1:].repeat(len(x), 0),
    "fallen down": fallen,
    "fallen up": lambda x: fallen(x[::-1])[::-1],
    "fallen right": lambda x: fallen(x.T).T,
    "fallen left": lambda x: fallen(x.T[::-1])[::-1].T,
}
DIRECTIONS = {
    "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1),
    "up left": (-1, -1), "up right": (-1, 1), "down left": (1, -1), "down right": (1, 1),
}  # fmt: skip
OPPOSITE = [("up", "down"), ("left", "right"), ("up left", "down right"), ("up right", "down left")]


def first_met(x: Grid, step: tuple[int, int]) -> Grid:
    """(h, w) the first colour but black that a look in a direction meets, 0 if there is none."""
    (i, j), met = map(np.arange, x.shape), np.zeros_like(x)
    for n in range(max(x.shape), 0, -1):
        y = take(x, i + n * step[0], j + n * step[1])
        met = np.where(y > BLACK, y, met)
    return met


def facts(x: Grid, near: dict[str, Grid], met: dict[str, Grid]) -> dict[str, np.ndarray]:
    """Small numbers, or colours, that say what each cell (h, w) is in its grid."""
    (h, w), drawn = x.shape, x > BLACK
    i, j = np.arange(h)[:, None], np.arange(w)[None]
    edge = (i == 0) | (j == 0) | (i == h - 1) | (j == w - 1)
    size, at_edge = np.zeros(x.shape, np.int64), np.zeros(x.shape, bool)
    for part in parts(np.where(drawn, x, 0)):
        size.flat[part], at_edge.flat[part] = len(part), edge.flat[part].any()
    count = np.bincount(x.reshape(-1), minlength=TOKENS)
    count[: BLACK + 1] = 0
    rank = (count[None] > count[:, None]).sum(1)
    colours, looks = (np.array([*y.values()]) > BLACK for y in (near, met))
    smallest = size[drawn].min(initial=x.size)
    return {
        "parity": 1 + i % 2 * 2 + j % 2,
        "place in three": 1 + i % 3 * 3 + j % 3,
        "edges": 1 + ((i == 0) | (i == h - 1)) + ((j == 0) | (j == w - 1)),
        "diagonals": 1 + (i == j) + 2 * (i + j == w - 1),
        "neighbours": 1 + colours.sum(0),
        "straight neighbours": 1 + colours[:4].sum(0),
        "like neighbours": 1 + np.sum([y == x for y in near.values()], 0),
        "straight looks": 1 + looks[:4].sum(0),
        "looks": 1 + looks.sum(0),
        "enclosed": 1 + enclosed(np.where(x == BLACK, 0, 1)),
        "size": 1 + size.clip(max=10),
        "largest or smallest": 1 + drawn * ((size == size.max()) + 2 * (size == smallest)),
        "object at the edge": 1 + at_edge,
        "rank of the colour": 1 + rank[x] * drawn,
        "commonest colour": np.full((h, w), count.argmax()),
        "rarest colour": np.full((h, w), np.where(count > 0, count, x.size + 1).argmin()),
        "drawn in the row": np.broadcast_to(1 + drawn.sum(1, keepdims=True).clip(max=10), (h, w)),
        "drawn in the column": np.broadcast_to(1 + drawn.sum(0).clip(max=10), (h, w)),
    }


def features(tokens: Grid) -> dict[str, np.ndarray]:
    """All features (H, W) of the grid whose tokens lie on a canvas (H, W)."""
    canvas, coloured = tokens.shape, np.nonzero(tokens >= BLACK)
    h, w = (1 + n.max(initial=0) for n in coloured)
    x = np.where(tokens >= BLACK, tokens, 0).astype(np.uint8)[:h, :w]
    (i, j), (down, across) = map(np.arange, x.shape), map(np.arange, canvas)
    near = {name: take(x, i + di, j + dj) for name, (di, dj) in DIRECTIONS.items()}
    met = {name: first_met(x, step) for name, step in DIRECTIONS.items()}
    known = facts(x, near, met)
    extreme, drawn = known["largest or smallest"], x > BLACK
    boxes = {
        "largest object": drawn & (extreme % 2 == 0),
        "smallest object": drawn & (extreme > 2),
        "commonest colour": drawn & (x == known["commonest colour"]),
        "rarest colour": drawn & (x == known["rarest colour"]),
    }
    images = {name: laid(frame(x), canvas) for name, frame in FRAMES.items()}
    images |= {f"box of the {k}": laid(crop(x, mask), canvas) for k, mask in boxes.items()}
    for name, y in (("tiles", x), ("mirror tiles", mirror_tiled(x))):
        images[name] = take(y, down % len(y), across % y.shape[1])
    cells = {f"next {k}": y for k, y in near.items()} | {f"met {k}": y for k, y in met.items()}
    cells |= {f"between {a} and {b}": met[a] * (met[a] == met[b]) for a, b in OPPOSITE} | known
    return images | {k: laid(np.where(x > 0, y, 0), canvas, end=0) for k, y in cells.items()}


# ---------------------------------------------------------------- experts


class Rule(NamedTuple):
    """How a feature is used: each key has a count of the answers of each class."""

    keys: int
    prior: tuple[float, ...]  # of the C classes; where C < V, class 0 means any other token
    key: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (own token, feature) -> 0 .. keys - 1
    classed: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (own, feature, output)


def brief(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, BLACK + 1)  # nothing, the end, black, a colour


RULES = {
    "copy the feature": Rule(2, (11 / 12, 1 / 12), lambda own, f: f == 0, lambda own, f, y: f == y),
    "look up the feature": Rule(TOKENS, EVEN, lambda own, f: f, lambda own, f, y: y),
    "look up both": Rule(TOKENS**2, EVEN, lambda own, f: own * TOKENS + f, lambda own, f, y: y),
    "copy either": Rule(
        32, (10 / 12, 1 / 12, 1 / 12), lambda own, f: (brief(own) * 4 + brief(f)) * 2 + (own == f),
        lambda own, f, y: np.where(f == y, 2, own == y),
    ),
    "stay or look up": Rule(
        4 * TOKENS, (1 / (TOKENS + 1),) * (TOKENS + 1), lambda own, f: brief(own) * TOKENS + f,
        lambda own, f, y: np.where(own == y, TOKENS, y),
    ),
}  # fmt: skip


def learn(
    rule: Rule, own: np.ndarray, seen: np.ndarray, demo: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, K, keys, C) how often each demo had a class of answers, and (K,) the mean log-likelihood
    of a demo's cell, predicted from the other demos. own, demo, y: (M,), seen: (M, K)."""
    n, k, c, prior = demo.max() + 1, seen.shape[1], len(rule.prior), np.array(rule.prior)
    key = rule.key(own[:, None], seen) + np.arange(k) * rule.keys
    answer = np.zeros_like(key) + rule.classed(own[:, None], seen, y[:, None])
    at = demo[:, None], key, answer
    shape = n, k * rule.keys, c
    flat = np.ravel_multi_index(at, shape).ravel()
    count = np.bincount(flat, minlength=math.prod(shape)).reshape(shape)
    total = count.sum(2)
    right = count.sum(0)[key, answer] - count[at]
    p = (right + prior[answer] * PRIOR) / (total.sum(0)[key] - total[at[:2]] + PRIOR)
    if c < TOKENS:
        p = np.where(answer == 0, p / (TOKENS + 1 - c), p)
    return count.reshape(n, k, rule.keys, c), np.log(p).mean(0)


def mixture(
    counts: Sequence[np.ndarray], worth: np.ndarray, own: np.ndarray, seen: np.ndarray, demo: Any
) -> np.ndarray:
    """(M, V) scores by the experts of most worth (rules * K,), without the counts of demo (M,)."""
    best = np.argsort(-worth, kind="stable")[:MIXED]
    weight = np.exp(SHARPNESS * (worth[best] - worth[best[0]]))
    mixed, m = np.zeros((len(own), TOKENS)), np.arange(len(own))
    for expert, share in zip(best, weight / weight.sum(), strict=True):
        number, k = divmod(expert, seen.shape[1])
        rule, count, feature = [*RULES.values()][number], counts[number][:, k], seen[:, k]
        key, prior = rule.key(own, feature) + 0, np.array(rule.prior)
        right = count.sum(0)[key] - (0 if demo is None else count[demo, key])
        p = share * (right + prior * PRIOR) / (right.sum(1, keepdims=True) + PRIOR)
        if len(prior) >= TOKENS:
            mixed += p[:, :TOKENS]
            mixed[m, own] += p[:, TOKENS:].sum(1)
        else:
            mixed += p[:, :1] / (TOKENS + 1 - len(prior))
            mixed[m, own] += p[:, 1:-1].sum(1)
            mixed[m, feature] += p[:, -1]
    return mixed


def answer(
    demos: Sequence[tuple[Grid, Grid]], query: Grid, canvas: tuple[int, int]
) -> tuple[Grid, float]:
    """(tokens (H, W) of the answer, mean log-likelihood of a demo's cell under the best expert).

    The canvas of a demo is as large as its grids."""
    sizes = [tuple(np.maximum(x.shape, y.shape).tolist()) for x, y in demos] + [canvas]
    inputs, outputs = [*(x for x, _ in demos), query], [*(y for _, y in demos), query]
    grids = [data.tokenise(x, size) for x, size in zip(inputs, sizes, strict=True)]
    labels = [data.tokenise(y, size).ravel() for y, size in zip(outputs, sizes, strict=True)]
    y, demo = np.concatenate(labels), np.repeat(np.arange(len(grids)), [x.size for x in grids])
    asked = demo == len(demos)
    shown = (y > 0) & ~asked
    seen, cost = np.zeros((len(y), 0), np.uint8), np.zeros(0)
    for number in range(ROUNDS):
        new = [np.stack([*features(x).values()], -1).reshape(x.size, -1) for x in grids]
        seen = np.hstack((seen, np.concatenate(new).astype(np.uint8)))
        cost = np.append(cost, np.full(new[0].shape[1], ROUND_COST * number))
        own = np.concatenate([x.ravel() for x in grids])
        of_demos = own[shown], seen[shown], demo[shown]
        counts, worths = zip(*(learn(r, *of_demos, y[shown]) for r in RULES.values()), strict=True)
        worth = np.concatenate([w - cost for w in worths])
        tokens = np.zeros_like(own)
        tokens[shown] = mixture(counts, worth, *of_demos).argmax(1)
        tokens[asked] = mixture(counts, worth, own[asked], seen[asked], None).argmax(1)
        grids = [tokens[demo == n].reshape(size) for n, size in enumerate(sizes)]
    return grids[-1], float(worth.max())


def predict(tasks: Sequence[Task], views: Sequence[int]) -> Iterator[list[score.Prediction]]:
    """Task by task, the votes of these views for every query; q: log-odds of a demo's cell."""
    cfg = DataConfig()
    for task, query in ((t, q) for t in tasks for q in range(len(t.queries))):
        begun, votes, first, key = time.monotonic(), [], None, sources.task_hash(task)
        if max(task.queries[query][0].shape) > data.MAX_SIDE:
            continue
        for number in views:
            symmetry, lots = score.view(task, query, number, cfg)
            pairs = [task.demos[i] for i in lots.argsort()[: cfg.max_demos]]
            demos = [(data.apply(symmetry, x), data.apply(symmetry, y)) for x, y in pairs]
            asked = data.apply(symmetry, task.queries[query][0])
            packed = data.pack([Task("", demos, [(asked, None)])])
            canvas = data.queries(packed, "test", cfg).canvas[0].tolist()
            tokens, worth = answer(demos, asked, tuple(canvas))
            first = tokens if number == 0 else first
            grid, p = data.untokenise(tokens), min(math.exp(worth), 1 - 1e-6)
            grid = None if grid is None else data.apply(data.inverse(symmetry), grid)
            votes.append(score.Vote(grid, math.log(p / (1 - p)), number, source=SOURCE))
        seconds = time.monotonic() - begun
        yield [score.Prediction(task.name, query, key, votes, first, seconds, SOURCE)]
