"""Sights are what a plain reading of the grid gives; proposals are what the demos of a task that one sight explains show."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etrm_arc import config, data
from etrm_arc.data import Task
from etrm_arc.extras import compose, experts, scenes

N, FITTED = len(experts.GRIDS), experts.FITTED
AFTER = N + 8  # neighbours begin here, looks 8 later, what lies between 16 later, numbers 20 later


@st.composite
def grids(draw: st.DrawFn, most: int = 7) -> np.ndarray:
    h, w, colours = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(2, 5))
    cells = draw(st.lists(st.integers(0, colours - 1), min_size=h * w, max_size=h * w))
    return np.array(cells, np.uint8).reshape(h, w)


def seen(*shown: np.ndarray, side: int = 16, offset: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """(grids, side, side, K) of grids on canvases of one side, packed together."""
    tokens = torch.cat(
        [torch.from_numpy(data.tokenise(x, (side, side), offset)).flatten().long() for x in shown]
    )
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).repeat(len(shown), 1)
    return experts.sights(tokens, at, (side * side,) * len(shown)).view(len(shown), side, side, -1)


def canvas(x: np.ndarray, side: int = 16) -> torch.Tensor:
    return torch.from_numpy(data.tokenise(x, (side, side))).long()


@given(grids())
def test_sights_that_are_grids_are_whole_grids_with_their_ends(x):
    s, (h, w) = seen(x)[0], x.shape
    mirrored, double = np.concatenate((x, x[::-1])), np.concatenate((x, x[:, ::-1]), 1)
    wanted = {
        0: x, 1: x[::-1], 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x.T, 5: x[::-1, ::-1].T, 6: x[::-1].T, 7: x.T[::-1],
        12: np.tile(x, (2, 2)), 15: np.tile(x, (2, 1)), 16: np.tile(x, (1, 2)),
        18: np.concatenate((mirrored, mirrored[:, ::-1]), 1), 19: mirrored, 20: np.concatenate((x[::-1], x)),
        21: double, 22: np.concatenate((x[:, ::-1], x), 1),
        23: x.repeat(2, 0).repeat(2, 1), 26: x.repeat(2, 0), 27: x.repeat(2, 1),
        31: x[: h // 2], 32: x[(h + 1) // 2 :], 33: x[:, : w // 2], 34: x[:, (w + 1) // 2 :],
    }  # fmt: skip
    for k, y in wanted.items():
        if y.size and max(y.shape) <= 14:
            assert torch.equal(s[..., k], canvas(y)), k
    if x.any():
        rows, columns = np.nonzero(x.any(1))[0], np.nonzero(x.any(0))[0]
        assert torch.equal(
            s[..., 30], canvas(x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        )


@given(grids(), grids(), st.integers(0, 5))
def test_a_grid_sees_nothing_of_another_nor_of_where_it_lies(x, y, offset):
    alone, beside = seen(x)[0], seen(y, x)[1]
    assert torch.equal(alone, beside)
    moved = seen(x, offset=(offset, offset))[
        0, offset : offset + x.shape[0], offset : offset + x.shape[1]
    ]
    assert torch.equal(moved, alone[: x.shape[0], : x.shape[1]])


@given(grids())
def test_looks_meet_the_first_colour_and_objects_are_those_of_the_scenes(x):
    s, (h, w) = seen(x)[0], x.shape
    parts = scenes.parts(x)
    size = np.zeros(h * w, int)
    for p in parts:
        size[p] = len(p)
    numbers = s[:h, :w, AFTER + 20 :]
    assert torch.equal(numbers[..., 10].flatten() - 1, torch.from_numpy(size).clamp(max=10))
    assert torch.equal(
        numbers[..., 9].bool() & (numbers[..., 9] == 2), torch.from_numpy(scenes.enclosed(x))
    )
    for k, (di, dj) in enumerate(experts.AROUND):
        for i in range(h):
            for j in range(w):
                line = [(i + n * di, j + n * dj) for n in range(1, 31)]
                found = [int(x[r, c]) for r, c in line if 0 <= r < h and 0 <= c < w]
                assert s[i, j, AFTER + k] == (found[0] + 2 if found else 0)
                assert s[i, j, AFTER + 8 + k] == next((c + 2 for c in found if c), 0)
    assert not s[h + 1 :, :, N + 4 : -FITTED].any() and not s[:, w + 1 :, N + 4 : -FITTED].any()


@given(grids())
def test_what_falls_keeps_its_order(x):
    s, (h, w) = seen(x)[0], x.shape
    down = np.stack([np.concatenate((c[c == 0], c[c > 0])) for c in x.T], 1)
    up = np.stack([np.concatenate((c[c > 0], c[c == 0])) for c in x.T], 1)
    right = np.stack([np.concatenate((r[r == 0], r[r > 0])) for r in x])
    left = np.stack([np.concatenate((r[r > 0], r[r == 0])) for r in x])
    for k, y in enumerate((down, up, right, left), N + 4):
        assert torch.equal(s[:h, :w, k] - 2, torch.from_numpy(y).long())


@given(
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(9, 12),
    st.integers(9, 12),
    st.integers(0, 7),
    st.booleans(),
)
def test_a_grid_continues_at_its_periods(p, q, h, w, corner, turned):
    whole = np.tile(1 + np.arange(p * q, dtype=np.uint8).reshape(p, q), (13, 13))[: h + 1, : w + 1]
    x = whole[:h, :w].copy()
    x[corner : corner + 2, 7 - corner : 9 - corner] = 0
    if turned:
        x, whole, p, q, h, w = x.T, whole.T, q, p, w, h
    s, wanted = seen(x)[0][..., -FITTED:] - 2, torch.from_numpy(whole.copy()).long()
    assert torch.equal(s[:h, :w, 3], wanted[:h, :w]) and torch.equal(
        s[h, :w, 3], wanted[h, :w]
    )  # beyond its end, too
    if q == 1:
        assert torch.equal(s[:h, :w, 5], wanted[:h, :w])
    if p == 1:
        assert torch.equal(s[:h, :w, 4], wanted[:h, :w])
    x = whole[:h, :w].copy()
    x[0, 0] = x[-1, -1] = 9  # at the ends, where fewest cells meet them
    s = seen(x)[0][..., -FITTED:] - 2
    assert torch.equal(s[: h - p, : w - q, 6], torch.from_numpy(x[p:, q:].copy()).long())
    assert torch.equal(s[p:h, q:w, 7], torch.from_numpy(x[: h - p, : w - q].copy()).long())


@given(st.integers(-1, 3), st.integers(-1, 3), st.integers(0, 9))
def test_a_grid_is_mirrored_where_it_is_symmetric_and_cut_to_its_patch(up, across, seed):
    d = np.random.default_rng(seed)
    quarter = d.integers(1, 9, (8, 8), dtype=np.uint8)
    whole = np.concatenate((quarter, quarter[::-1]))
    whole = np.concatenate((whole, whole[:, ::-1]), 1)
    whole = whole[max(up, 0) : 16 + min(up, 0), max(across, 0) : 16 + min(across, 0)]
    x, (h, w) = whole.copy(), whole.shape
    x[1:5, 2:6] = 0
    s = seen(x, side=17)[0]
    for k, (r, c) in enumerate(
        ((h - 1 - up, None), (None, w - 1 - across), (h - 1 - up, w - 1 - across))
    ):
        for i in range(h):
            for j in range(w):
                a, b = i if r is None else r - i, j if c is None else c - j
                assert s[i, j, k - FITTED] == (int(x[a, b]) + 2 if 0 <= a < h and 0 <= b < w else 0)
    patch = s[:5, :5, 8 - FITTED + 2]
    assert torch.equal(patch[:4, :4] - 2, torch.from_numpy(whole[1:5, 2:6]).long())
    assert (patch[4, :4] == 1).all() and (patch[:4, 4] == 1).all()


def test_black_is_what_hides_a_pattern_however_much_there_is_of_it():
    d = np.random.default_rng(0)
    whole = np.tile(d.integers(1, 9, (9, 4), dtype=np.uint8), (1, 6))
    x = whole.copy()
    x[:, :16] = 0  # four of six
    s = seen(x, side=25)[0][:9, :24, 5 - FITTED] - 2
    assert torch.equal(s, torch.from_numpy(whole).long())


# ---------------------------------------------------------------- proposals


def cornered(x: np.ndarray) -> np.ndarray:
    y = x.copy()
    y[np.ix_((0, -1), (0, -1))] = 8
    return y


RULES = {
    "mirror": lambda x: x[:, ::-1],
    "enlarge": lambda x: x.repeat(2, 0).repeat(2, 1),
    "recolour": lambda x: np.array([0, 5, 1, 7, 9, 2, 3, 4, 6, 8], np.uint8)[x],
    "fill what is enclosed": lambda x: np.where(scenes.enclosed(x), 4, x).astype(np.uint8),
    "mirror, then frame": lambda x: np.pad(x[1:-1, -2:0:-1], 1, constant_values=8),
    "turn, then mark the corners": lambda x: cornered(x.T),
    "mirror and recolour": lambda x: np.array([0, 5, 1, 7, 9, 2, 3, 4, 6, 8], np.uint8)[x[::-1]],
}


def batch_of(tasks: list[Task], max_side: int = 20) -> data.Batch:
    cfg = config.parse_config({"data": {"max_side": max_side}}, "").data
    packed = data.pack(tasks)
    return data.batch(packed, data.posed(packed, cfg, "test", data.queries(packed, "test", cfg)))


def task_of(rule: str, seed: int) -> Task:
    drawn, f = np.random.default_rng(seed), RULES[rule]
    ring = np.pad(np.zeros((2, 2), np.uint8), 1, constant_values=3)

    def pair() -> tuple[np.ndarray, np.ndarray]:
        x = (drawn.random((6, 7)) < 0.4).astype(np.uint8) * drawn.integers(
            1, 4, (6, 7), dtype=np.uint8
        )
        if rule.startswith("fill"):
            x = np.zeros((8, 8), np.uint8)
            i, j = drawn.integers(0, 5, 2)
            x[i : i + 4, j : j + 4] = ring
        return x, np.ascontiguousarray(f(x))

    return Task(f"{rule}-{seed}", [pair(), pair(), pair()], [pair()])


@pytest.mark.parametrize("rule", RULES)
def test_a_task_that_sights_explain_is_solved_by_its_proposals(rule):
    batch = batch_of([task_of(rule, s) for s in range(4)])
    of_demos, asked = experts.proposals(batch)
    assert torch.equal(torch.where(batch.labels < 0, batch.labels, asked.argmax(1)), batch.labels)
    known = batch.demos.outputs != 0
    assert (of_demos.argmax(1) == batch.demos.outputs)[known].float().mean() > 0.97
    assert not of_demos[~known].any()
    assert torch.allclose(asked.exp().sum(1), torch.ones(len(asked)), atol=2e-3)


def test_proposals_know_neither_labels_nor_other_slots():
    tasks = [task_of(rule, 7) for rule in RULES]
    batch = batch_of(tasks)
    of_demos, asked = experts.proposals(batch)
    assert torch.equal(
        experts.proposals(batch._replace(labels=torch.zeros_like(batch.labels)))[1], asked
    )
    alone = torch.cat(
        [experts.proposals(batch_of([t]))[1] for t in sorted(tasks, key=lambda t: tasks.index(t))]
    )
    assert torch.allclose(alone, asked, atol=1e-5)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(experts, "SLOTS", 2)
        assert torch.allclose(experts.proposals(batch)[1], asked, atol=1e-5)


def test_colours_that_demos_never_had_are_copied():
    d = np.random.default_rng(0)
    pairs = [
        (x, np.ascontiguousarray(x[::-1]))
        for x in (d.integers(0, 4, (5, 5), dtype=np.uint8) for _ in range(3))
    ]
    x = d.integers(6, 9, (5, 5), dtype=np.uint8)
    batch = batch_of([Task("new", pairs, [(x, np.ascontiguousarray(x[::-1]))])])
    asked = experts.proposals(batch)[1].argmax(1)
    assert torch.equal(torch.where(batch.labels < 0, batch.labels, asked), batch.labels)


@pytest.fixture(scope="module")
def solved() -> Callable[..., int]:
    batch = batch_of(compose.tasks(16, seed=5))

    def count(**constants: object) -> int:
        with pytest.MonkeyPatch.context() as m:
            for k, v in constants.items():
                m.setattr(experts, k, v)
            right = (experts.proposals(batch)[1].argmax(1) == batch.labels) | (batch.labels < 0)
        return sum(bool(x.all()) for x in right.split(batch.cells))

    return count


WORSE = [
    {"HEARD": 1},
    *({"LESS": x} for x in ((0.0, 0.0), (0.0, 0.02), (0.01, 0.0), (-0.01, 0.02), (0.01, -0.02))),
]


@pytest.mark.parametrize("other", WORSE, ids=str)
def test_more_composed_tasks_are_solved_when_several_experts_are_heard_and_plain_sights_are_preferred(
    solved, other
):
    assert solved() > solved(**other)


def either(seed: int, black: int = 0) -> tuple[Task, np.ndarray, np.ndarray]:
    """Demos that do not say whether grids are turned upside down or by a quarter, and both answers to the query."""
    d = np.random.default_rng(seed)
    drawn = d.integers(0, 4, (3, 6, 6), dtype=np.uint8)
    shown = [np.triu(x) + np.triu(x, 1).T for x in drawn]
    x = d.integers(0, 4, (6, 6), dtype=np.uint8)
    x[:black] = 0
    flipped, turned = np.ascontiguousarray(x[::-1]), np.ascontiguousarray(x.T[::-1])
    return (
        Task(f"either-{seed}", [(y, np.ascontiguousarray(y[::-1])) for y in shown], [(x, flipped)]),
        flipped,
        turned,
    )


# beyond a grid's end answers say anything, they may also be larger grids; to some experts a query with much black has no grid
