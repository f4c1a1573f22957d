"""Laws of the data path: symmetries, tokens, painting, queries, bands, randomness and episodes."""

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from etrm_arc import data
from etrm_arc.config import DataConfig, UserError
from etrm_arc.data import Symmetry
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import generators

RULES = ("leave_one_out", "test")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one(s, i):
    return Symmetry(s.dihedral[i], s.colours[i])


@given(generators)
def test_symmetries_are_a_group(g):
    """Inverses undo them, in a batch as one by one; the first changes nothing."""
    a, x = puzzles.symmetry(g, 5), puzzles.grid(g)
    back = data.inverse(a)
    for i in range(5):
        assert same(one(back, i), data.inverse(one(a, i)))
        assert np.array_equal(data.apply(one(back, i), data.apply(one(a, i), x)), x)
    assert np.array_equal(data.apply(data.identity(), x), x)
    square = np.arange(4).reshape(2, 2)
    images = [data.turn(k, square).tolist() for k in range(8)]
    assert all(images.count(image) == 1 for image in images)
    assert all(data.turn(j, data.turn(i, square)).tolist() in images for i in range(8)
               for j in range(8))  # fmt: skip


@pytest.mark.parametrize(("colours", "fixed"), [("fixed", 10), ("keep_black", 1), ("all", 0)])
def test_drawn_symmetries_keep_what_they_must_and_all_occur(colours, fixed):
    u = torch.rand(1000, 11, generator=torch.Generator().manual_seed(0))
    s = data.draw_symmetry(u, True, colours)
    assert torch.equal(s.colours.sort(-1).values, torch.arange(10).expand(1000, 10))
    assert torch.equal(s.colours[:, :fixed], torch.arange(fixed).expand(1000, fixed))
    assert all(len(column.unique()) == 10 - fixed for column in s.colours[:, fixed:].T)
    assert len(s.dihedral.unique()) == 8
    assert not data.draw_symmetry(u, False, colours).dihedral.any()


@given(generators, st.integers(1, 30), st.integers(0, 6))
@example(torch.Generator(), 30, 0)
def test_untokenise_inverts_tokenise(g, side, room):
    x = puzzles.grid(g, side, side) if room == 0 else puzzles.grid(g, 1, side)
    canvas = min(30, side + room)
    assert np.array_equal(data.untokenise(data.tokenise(x, (canvas, canvas))), x)


@given(generators, st.integers(2, 8), st.booleans())
def test_a_colour_on_the_border_is_no_answer(g, side, below):
    x = puzzles.grid(g, 2, side)
    h, w = x.shape
    tokens = data.tokenise(x, (side + 1, side + 1))
    at = (h, puzzles.integer(g, 0, w - 1)) if below else (puzzles.integer(g, 0, h - 1), w)
    tokens[at] = puzzles.integer(g, 2, 11)
    assert data.untokenise(tokens) is None
    for empty in (data.PAD, data.EOS):
        assert data.untokenise(np.full((4, 4), empty, np.uint8)) is None


# The ends of the range too: the last share of the room must not leave the canvas.
shares = st.one_of(st.sampled_from([0.0, 0.5, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True))
placed = st.tuples(st.integers(6, 30), st.integers(6, 30), shares, shares)


@given(generators, st.lists(placed, min_size=8, max_size=8))
@settings(max_examples=50)
def test_painting_is_apply_then_tokenise(g, places):
    some = puzzles.tasks(g, 4, hidden=True)
    packed, pairs = data.pack(some), [p for t in some for p in (*t.demos, *t.queries)]
    pair, s = torch.randint(0, len(pairs), (8,), generator=g), puzzles.symmetry(g, 8)
    canvas, shift = torch.tensor([p[:2] for p in places]), [p[2:] for p in places]
    share = torch.tensor(shift, dtype=torch.float64)
    painted = data.paint(packed, pair, s, share, canvas, 30)
    cells = [h * w for h, w, *_ in places]
    rows = zip(*(x.split(cells) for x in painted), strict=True)
    for i, (inputs, outputs, at) in enumerate(rows):
        h, w = places[i][:2]
        grids = [None if x is None else data.apply(one(s, i), x) for x in pairs[pair[i]]]
        size = np.max([x.shape for x in grids if x is not None], axis=0)
        room = [int(c - n) for c, n in zip((h, w), size, strict=True)]
        offset = tuple(int(u * (r + 1)) for u, r in zip(shift[i], room, strict=True))
        assert all(0 <= o <= r for o, r in zip(offset, room, strict=True))
        for tokens, x in zip((inputs, outputs), grids, strict=True):
            want = np.zeros((h, w), np.uint8) if x is None else data.tokenise(x, (h, w), offset)
            assert np.array_equal(tokens.view(h, w).numpy(), want)
        origin = [int(u * (30 - c + 1)) for u, c in zip(shift[i], (h, w), strict=True)]
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        assert torch.equal(at, torch.tensor(origin) + place) and at.max() < 30


@given(generators)
@settings(max_examples=30)
def test_a_batch_paints_each_episode_on_its_canvas(g):
    packed, cfg = data.pack(puzzles.tasks(g, 6)), DataConfig()
    deck = data.deck(data.queries(packed, "leave_one_out", cfg), 8)
    e = data.draw(packed, deck, cfg, 1, torch.arange(8), torch.arange(8))
    b = data.batch(packed, e)

    def painted(pair, slot, shift, canvas):
        s = Symmetry(*(x[slot : slot + 1] for x in e.symmetry))
        return data.paint(packed, pair[None], s, shift[None], torch.tensor(canvas)[None])

    canvas_of = dict(zip(deck.pair.tolist(), deck.canvas.tolist(), strict=True))
    parts = [x.split(b.cells) for x in (b.inputs, b.labels, b.at)]
    for slot, (x, y, at) in enumerate(zip(*parts, strict=True)):
        h, w = canvas_of[int(e.query[slot])]
        canvas = [w, h] if data.SWAP[e.symmetry.dihedral[slot]] else [h, w]
        want = painted(e.query[slot], slot, e.shift[slot, 0], canvas)
        assert same((x, at), (want.inputs, want.at))
        assert torch.equal(y, want.outputs.masked_fill(want.outputs == data.PAD, data.IGNORE))
    d = b.demos
    shown = torch.stack((d.owner, d.number), 1).tolist()
    assert sorted(shown) == torch.nonzero(e.demos >= 0).tolist()
    parts = (x.split(d.cells) for x in (d.inputs, d.outputs, d.at))
    for *tokens, slot, number in zip(*parts, d.owner, d.number, strict=True):
        pair = e.demos[slot, number]
        size = data.turned_size(e.symmetry.dihedral[slot], packed.grids[pair, :, 1:].amax(0))
        assert same(tokens, painted(pair, int(slot), e.shift[slot, 1 + number], size.tolist()))
    owner = d.owner.repeat_interleave(torch.tensor(d.cells))
    assert torch.equal(owner[d.by_slot], owner.sort().values)


@given(generators, st.sampled_from(RULES), st.integers(2, 8), st.sampled_from([0, 0, 4, 7]))
def test_a_canvas_is_the_smallest_for_demos_and_input(g, rule, max_side, canvas):
    """Or, of a given side, the only one, for what is no larger than `max_side` and fits it."""
    some = puzzles.tasks(g, 5, hidden=True)
    packed = data.pack(some)
    asked = data.queries(packed, rule, DataConfig(max_side=max_side, canvas=canvas))
    pairs = [(t, p) for t in range(5) for p in (*some[t].demos, *some[t].queries)]
    expected = []
    for q, (t, (x, y)) in enumerate(pairs):
        if rule == "test":
            demos, is_query = some[t].demos, q - int(packed.first[t]) >= len(some[t].demos)
        else:
            demos = [p for i, (u, p) in enumerate(pairs) if u == t and i != q and p[1] is not None]
            is_query = y is not None
        if not is_query or not demos:
            continue
        size = np.max([z.shape for z in (x, *(z for p in demos for z in p))], axis=0)
        foretold = size.copy()
        for axis in (0, 1):  # by a ratio that all demos share
            ratios = {Fraction(b.shape[axis], a.shape[axis]) for a, b in demos}
            if len(ratios) == 1:
                want = min(30, round(float(ratios.pop() * x.shape[axis])))
                foretold[axis] = max(size[axis], want)
        largest = min(max_side, canvas or 30)
        tried = [s.tolist() for s in (foretold, size) if (s <= largest).all()]
        best = [canvas, canvas] if tried and canvas else [*tried, [0, 0]][0]
        fits = y is None or all(n <= c for n, c in zip(y.shape, best, strict=True))
        expected.append((q, t, best, best[0] > 0 and fits))
    columns = (asked.pair, asked.task, asked.canvas, asked.fits)
    assert list(zip(*(x.tolist() for x in columns), strict=True)) == expected


@given(generators, st.sampled_from(RULES), st.integers(1, 64))
def test_every_task_has_the_same_share_of_a_batch(g, rule, slots):
    """A slot draws from its own part of the deck, from small to large; together they are all."""
    packed = data.pack([*puzzles.tasks(g, 7, high=4), puzzles.task(g, high=3)])
    asked = data.queries(packed, rule, DataConfig(max_side=4))  # some outputs do not fit
    deck = data.deck(asked, slots)
    assert torch.equal(deck.pair.sort().values, asked.pair[asked.fits]) and deck.cdf[-1] == 1
    cells, weight = deck.canvas.prod(1), torch.diff(deck.cdf, prepend=torch.zeros(1))
    assert torch.equal(cells, cells.sort().values)
    share = torch.zeros(8, dtype=torch.float64).index_add_(0, packed.task_of[deck.pair], weight)
    tasks = asked.task[asked.fits].unique()
    torch.testing.assert_close(share[tasks], torch.full_like(share[tasks], 1 / len(tasks)))
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    rows = data.dealt(deck, u, torch.arange(slots)[:, None])
    assert torch.equal(rows.flatten(), rows.flatten().sort().values)
    assert rows[0, 0] == 0 and rows[-1, -1] == len(cells) - 1


@given(st.integers(-(2**62), 2**62), st.integers(0, 2**40), st.integers(1, 30), st.integers(1, 30))
def test_a_lane_ignores_how_many_there_are(seed, n, few, many):
    few, many = sorted((few, many))
    u = data.uniform(many, seed, torch.arange(4), n)
    assert torch.equal(data.uniform(few, seed, torch.arange(4), n), u[:, :few])
    assert torch.equal(data.uniform(many, seed, torch.tensor([2]), n), u[2:3])
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()


@pytest.mark.parametrize("seed", [0, 12345])
def test_uniform_is_uniform(seed):
    """Each counter, each lane and neighbouring pairs fill 64 bins evenly: chi square."""
    line = torch.arange(8192)
    for u in (
        data.uniform(1, seed, 0, line, 0)[:, 0],
        data.uniform(1, seed, 0, 0, line)[:, 0],
        data.uniform(1, line, 0, 0, 0)[:, 0],
        data.uniform(8192, seed, 0, 0, 0),
    ):
        for bins in ((u * 64).long(), (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()):
            counts, each = torch.bincount(bins, minlength=64).double(), len(bins) / 64
            assert ((counts - each) ** 2 / each).sum() < 120


def drawn(g, rule, **options):
    some = [*puzzles.tasks(g, 5, hidden=True), puzzles.task(g, "known")]
    packed, cfg = data.pack(some), DataConfig(query=rule, **options)
    deck = data.deck(data.queries(packed, rule, cfg), 36)
    return some, packed, deck, cfg, torch.arange(6) * 7, torch.randint(0, 10**9, (6,), generator=g)


@given(generators, st.sampled_from(RULES), st.integers(1, 6))
def test_an_episode_never_shows_its_query(g, rule, most):
    """Its demos are other known pairs of the task, none twice, all where `max_demos` allows."""
    some, packed, deck, cfg, slot, n = drawn(g, rule, max_demos=most)
    e = data.draw(packed, deck, cfg, 11, slot, n)
    for query, row in zip(e.query.tolist(), e.demos.tolist(), strict=True):
        shown, task = [d for d in row if d >= 0], int(packed.task_of[query])
        assert query in deck.pair.tolist()
        assert row[: len(shown)] == shown and len(set(shown)) == len(shown)
        first, t = int(packed.first[task]), some[task]
        pairs = t.demos if rule == "test" else [*t.demos, *t.queries]
        allowed = {first + i for i, p in enumerate(pairs) if p[1] is not None} - {query}
        assert set(shown) <= allowed and len(shown) == min(most, len(allowed))


@given(generators, st.sampled_from(RULES))
def test_episodes_are_a_pure_function_of_seed_slot_and_n(g, rule):
    """Whoever asks, and with whomever: the slots of two ranks are the rows of the whole."""
    _, packed, deck, cfg, slot, n = drawn(g, rule)
    whole = data.draw(packed, deck, cfg, 3, slot, n)
    order, cut = torch.randperm(6, generator=g), puzzles.integer(g, 1, 5)
    for part in (order[:cut], order[cut:]):
        e = data.draw(packed, deck, cfg, 3, slot[part], n[part])
        k = e.demos.shape[1]
        assert same((e.query, *e.symmetry), (whole.query[part], *(v[part] for v in whole.symmetry)))
        assert torch.equal(e.demos, whole.demos[part, :k]) and (whole.demos[part, k:] == -1).all()
        assert torch.equal(e.shift, whole.shift[part, : 1 + k])
    for seed, other in ((4, slot), (3, slot + 1)):
        shift = data.draw(packed, deck, cfg, seed, other, n).shift
        assert not torch.equal(shift[:, 0], whole.shift[:, 0])
    still = DataConfig(query=rule, translate=False)
    assert not data.draw(packed, deck, still, 0, slot, n).shift.any()


@given(generators)
def test_donors_are_other_tasks_that_have_a_canvas(g):
    asked = data.queries(data.pack(puzzles.tasks(g, 5)), "test", DataConfig(max_side=5))
    if len(asked.task[asked.canvas[:, 0] > 0].unique()) < 2:
        with pytest.raises(UserError, match="two tasks that fit a canvas"):
            data.donors(asked, 3)
        return
    rows = data.donors(asked, 3)
    assert (asked.task[rows] != asked.task).all() and (asked.canvas[rows] > 0).all()
    assert torch.equal(rows, data.donors(asked, 3))
