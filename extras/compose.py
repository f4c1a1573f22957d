"""Tasks composed of known transformations: any number of different small tasks as a source.

A task is a pure function of (seed, index). A scene draws its inputs, one to three rules map grid to
grid; what they share in a task (colours, sizes, densities) is its World.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import INVERSE, MAX_SIDE, Task, turn
from . import object_rules, rules, scenes
from .grids import Fn, Grid
from .rules import recoloured
from .scenes import Dice, Scene, World

MOST = 1_000_000  # tasks of a source
TRIES = 400  # compositions drawn for one task before giving up
TURNS = (0, 4, 5, 2, 1, 3, 6, 7)  # elements of D8 in the order in which they are drawn


class Made(NamedTuple):
    """A task with its making."""

    names: tuple[str, ...]
    scene: str
    task: Task


RULES, SCENES = rules.RULES | object_rules.RULES, scenes.SCENES | object_rules.SCENES
NAMES, AFTER = list(rules.RULES), [n for n, r in rules.RULES.items() if r.after]
WHOLE = NAMES[: NAMES.index("permute colours")]  # rules of the grid as a whole
OBJECTS = list(object_rules.RULES)
# one-rule: half of the tasks of WHOLE; object-rule: of rules that no other kind has
KINDS = ("composed", "composed-held-out", "one-rule", "object-rule")


def is_held_out(names: Sequence[str]) -> bool:
    """About every tenth combination of two or more rules, in any order. A rule by itself never is,
    so that only the combination is new in a held-out task."""
    key = " + ".join(sorted(names)).encode()
    return len(names) > 1 and hashlib.blake2b(key, digest_size=2).digest() < b"\x19\x99"


def composition(d: Dice, kind: str) -> tuple[str, ...]:
    if kind == "one-rule":
        return (d.pick(WHOLE if d.chance() < 0.5 else NAMES),)
    if kind == "object-rule":
        return (d.pick(OBJECTS),)
    held_out = kind == "composed-held-out"
    while True:
        names = [d.pick(NAMES)]
        more = (2 if d.chance() < 0.1 else 1) if held_out or d.chance() < 0.55 else 0
        while more and not RULES[names[-1]].last:
            names, more = [*names, d.pick(AFTER)], more - 1
        if len(set(names)) == len(names) and is_held_out(names) == held_out:
            return tuple(names)


def world(d: Dice, names: Sequence[str]) -> World:
    colours = d.some(range(1, 10), 9)
    largest = d.between(13, 18) if d.chance() < 0.12 else d.between(6, 12)
    top = min([largest, *(RULES[n].top for n in names)])
    size = (d.chance(), d.chance()) if d.chance() < 0.33 else None
    fresh = d.chance() < 0.3 and not any(RULES[n].colours for n in names)
    few = d.between(2, 3) if fresh else d.between(2, 4)
    shared, square = [d.chance() for _ in range(3)], d.chance() < 0.25
    ink, new, mark = colours[5 : 5 + few], colours[:4], colours[4]
    return World(ink, new, mark, shared, top, size, square, fresh)


def chain(steps: Sequence[Fn], x: Grid) -> list[Grid]:
    """What every step gives; [] where one has no answer or gives too large a grid."""
    grids = [x]
    for step in steps:
        grids.append(step(grids[-1]))
        if min(grids[-1].shape) == 0 or max(grids[-1].shape) > MAX_SIDE:
            return []
    return grids[1:]


def wrapped(fn: Fn, g: int) -> Fn:
    """The rule in another direction."""
    return lambda x: turn(int(INVERSE[g]), fn(turn(g, x)))


def drawn(d: Dice, names: Sequence[str], draw: Scene, name: str) -> Task | None:
    """The task of one world, or None when it has to be drawn again."""
    w = world(d, names)
    steps = [RULES[n].make(d, w) for n in names]
    steps = steps[:1] + [wrapped(s, d.pick(TURNS)) for s in steps[1:]]
    rows: list[list[Grid]] = []
    wanted = 1 + d.pick((2, 3, 3, 3, 3, 4, 4, 4, 5))
    for _ in range(4 * wanted):
        x = draw(d, w)
        is_new = (x != x[0, 0]).any() and not any(np.array_equal(x, r[0]) for r in rows)
        if max(x.shape) <= MAX_SIDE and is_new and (grids := chain(steps, x)):
            rows.append([x, *grids])
        if len(rows) == wanted:
            break
    if len(rows) < wanted or not sound(names, steps, rows, w):
        return None
    g, ground = d.pick(TURNS), d.pick((0,) * 9 + (d.between(1, 9),))
    ground_swap = recoloured((0, ground), (ground, 0))
    pairs = [(turn(g, ground_swap(r[0])), turn(g, ground_swap(r[-1]))) for r in rows]
    return Task(name, list(pairs[1:]), list(pairs[:1]))


def sound(
    names: Sequence[str], steps: Sequence[Fn], rows: Sequence[Sequence[Grid]], w: World
) -> bool:
    """Whether the demos can show what the query asks, whichever pair is the query."""
    few = len(rows) // 3
    for i in range(len(steps)):
        if sum(np.array_equal(r[i], r[i + 1]) for r in rows) > few:
            return False  # a step that does nothing
        if i + 1 < len(steps):
            others = [*steps[:i], *steps[i + 1 :]]
            without = [(chain(others, r[0])[-1:], r[-1]) for r in rows]
            if sum(bool(ys) and np.array_equal(ys[0], y) for ys, y in without) > few:
                return False  # a step that makes no difference
    if sum(np.array_equal(r[0], r[-1]) for r in rows) > few:
        return False  # nothing is changed
    if all(np.array_equal(rows[0][-1], r[-1]) for r in rows[1:]):
        return False  # all outputs are the same
    if not RULES[names[-1]].last and sum(bool((r[-1] == r[-1].flat[0]).all()) for r in rows) > few:
        return False  # outputs of one colour
    shown = [(set(r[0].tobytes()), set(r[-1].tobytes())) for r in rows]
    for i, (before, after) in enumerate(shown):
        inputs, outputs = (set().union(*x) for x in zip(*shown[:i], *shown[i + 1 :], strict=True))
        if not (w.fresh or before <= inputs) or not after <= before | outputs:
            return False  # a colour that no other pair has
    return True


def make(seed: int, index: int, kind: str = "composed") -> Made:
    """The index-th task of a seed. Raises RuntimeError if none is found, which was never seen."""
    d, name = Dice(seed, index, KINDS.index(kind)), f"{kind}:{index:06d}"
    for _ in range(TRIES):
        names = composition(d, kind)
        which = d.pick(RULES[names[0]].scenes.split())
        for _ in range(8):
            if sound_task := drawn(d, names, SCENES[which], name):
                return Made(names, which, sound_task)
    raise RuntimeError(f"seed {seed}, index {index}: no sound task in {TRIES} compositions")


def tasks(n: int, kind: str = "composed", seed: int = 0) -> list[Task]:
    """The first n tasks of a seed."""
    return [make(seed, i, kind).task for i in range(n)]


def code() -> list[Path]:
    """The files that decide what the tasks are."""
    return [
        Path(__file__).with_name(f"{x}.py")
        for x in ("compose", "rules", "object_rules", "scenes", "grids")
    ]
