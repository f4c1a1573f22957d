"""Laws of the data path: symmetries, tokens, painting, queries, bands, randomness and episodes."""

from fractions import Fraction

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from etrm_arc import data
from etrm_arc.config import DataConfig, UserError
from etrm_arc.data import Symmetry, Task
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import generators

RULES = ("leave_one_out", "test")
CANVASES = (3, 4, 6)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one(s, i):
    return Symmetry(s.dihedral[i], s.colours[i])


# ---------------------------------------------------------------- symmetries


@given(generators)
def test_symmetries_are_a_group(g):
    a, b, c = (puzzles.symmetry(g, 16) for _ in range(3))
    e = data.identity(16)
    assert same(data.compose(e, a), a) and same(data.compose(a, e), a)
    assert same(data.compose(a, data.inverse(a)), e) and same(data.compose(data.inverse(a), a), e)
    assert same(data.compose(data.compose(a, b), c), data.compose(a, data.compose(b, c)))


@given(generators)
def test_compose_is_apply_after_apply(g):
    a, b, x = puzzles.symmetry(g), puzzles.symmetry(g), puzzles.grid(g)
    assert np.array_equal(data.apply(data.compose(a, b), x), data.apply(b, data.apply(a, x)))
    assert np.array_equal(data.apply(data.inverse(a), data.apply(a, x)), x)
    assert np.array_equal(data.apply(data.identity(), x), x)


@given(generators)
def test_batched_symmetries_are_single_ones(g):
    a, b = puzzles.symmetry(g, 5), puzzles.symmetry(g, 5)
    both, back = data.compose(a, b), data.inverse(a)
    for i in range(5):
        assert same(one(both, i), data.compose(one(a, i), one(b, i)))
        assert same(one(back, i), data.inverse(one(a, i)))


@given(generators, st.booleans(), st.sampled_from(["fixed", "keep_black", "all"]))
def test_drawn_symmetries_keep_what_they_must(g, dihedral, colours):
    s = data.draw_symmetry(torch.rand(64, 11, generator=g, dtype=torch.float64), dihedral, colours)
    assert torch.equal(s.colours.sort(-1).values, torch.arange(10).expand(64, 10))
    assert set(s.dihedral.tolist()) <= (set(range(8)) if dihedral else {0})
    kept = {"fixed": 10, "keep_black": 1, "all": 0}[colours]
    assert torch.equal(s.colours[:, :kept], torch.arange(kept).expand(64, kept))


def test_every_symmetry_is_drawn():
    u = torch.rand(1000, 11, generator=torch.Generator().manual_seed(0))
    s = data.draw_symmetry(u, True, "keep_black")
    assert len(s.dihedral.unique()) == 8
    for colour in range(1, 10):
        assert len(s.colours[:, colour].unique()) == 9
    assert len(data.draw_symmetry(u, True, "all").colours[:, 0].unique()) == 10


# ---------------------------------------------------------------- tokens and painting


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


def test_an_empty_canvas_is_no_answer():
    for token in (data.PAD, data.EOS):
        assert data.untokenise(np.full((4, 4), token, np.uint8)) is None


# The ends of the range too: the last share of the room must not leave the canvas.
shares = st.one_of(st.sampled_from([0.0, 0.5, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True))


sizes = st.tuples(st.integers(6, 30), st.integers(6, 30))


@given(
    generators,
    st.lists(sizes, min_size=8, max_size=8),
    st.lists(st.tuples(shares, shares), min_size=8, max_size=8),
)
@settings(max_examples=50)
def test_painting_is_apply_then_tokenise(g, canvas, shift):
    some = puzzles.tasks(g, 4, hidden=True)
    packed, pairs = data.pack(some), [p for t in some for p in (*t.demos, *t.queries)]
    pair = torch.randint(0, len(pairs), (8,), generator=g)
    s = puzzles.symmetry(g, 8)
    share = torch.tensor(shift, dtype=torch.float64)
    further = torch.randint(0, 8, (8,), generator=g) if puzzles.integer(g, 0, 1) else None
    *painted, at, borders = data.paint(packed, pair, s, share, torch.tensor(canvas), 30, further)
    cells = [h * w for h, w in canvas]
    for i, (h, w) in enumerate(canvas):
        grids = [None if x is None else data.apply(one(s, i), x) for x in pairs[pair[i]]]
        if further is not None and grids[1] is not None:
            grids[1] = data.apply(data.identity()._replace(dihedral=further[i]), grids[1])
        size = np.max([x.shape for x in grids if x is not None], axis=0)
        room = [int(c - n) for c, n in zip((h, w), size, strict=True)]
        offset = tuple(int(u * (r + 1)) for u, r in zip(shift[i], room, strict=True))
        assert all(0 <= o <= r for o, r in zip(offset, room, strict=True))
        for tokens, x in zip(painted, grids, strict=True):
            want = np.zeros((h, w), np.uint8) if x is None else data.tokenise(x, (h, w), offset)
            mine = tokens.split(cells)[i]
            assert np.array_equal(mine.view(h, w).numpy(), want)
            assert (mine >= data.FIRST_COLOUR).sum() == (0 if x is None else x.size)
        origin = torch.tensor(
            [int(u * (30 - c + 1)) for u, c in zip(shift[i], (h, w), strict=True)]
        )
        places = torch.stack(
            torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1
        ).flatten(0, 1)
        assert torch.equal(at.split(cells)[i], origin + places) and at.max() < 30
        ends = torch.tensor(offset) + torch.tensor(grids[0].shape)
        want = torch.cat(
            (places - torch.tensor(offset) + 1, ends - places), 1
        )  # 1 where a cell touches that border from within
        assert torch.equal(borders.split(cells)[i], want.clamp(0, 30))


@given(generators)
@settings(max_examples=50)
def test_a_batch_paints_each_episode_on_its_canvas(g):
    packed = data.pack(puzzles.tasks(g, 6))
    cfg = DataConfig(demo_canvases=(3, 6), canvases=CANVASES, turn_outputs=puzzles.integer(g, 0, 1))
    made = data.deck(data.queries(packed, "leave_one_out", CANVASES), 8)
    e = data.draw(packed, made, cfg, 1, torch.arange(8), torch.arange(8))
    b = data.batch(packed, e, cfg)
    canvas = dict(zip(made.pair.tolist(), made.canvas.tolist(), strict=True))
    assert len(b.cells) == 8 and sum(b.cells) == len(b.inputs) == len(b.labels)
    for slot, (x, y) in enumerate(
        zip(b.inputs.split(b.cells), b.labels.split(b.cells), strict=True)
    ):
        s, at = Symmetry(*(v[slot : slot + 1] for v in e.symmetry)), e.shift[slot : slot + 1, 0]
        further = None if e.further is None else e.further[slot : slot + 1]
        h, w = canvas[int(e.query[slot])]
        square = further is not None and data.SWAP[further]
        assert e.canvas[slot].tolist() == (
            [max(h, w)] * 2 if square else [w, h] if data.SWAP[s.dihedral] else [h, w]
        )
        want = data.paint(
            packed, e.query[slot : slot + 1], s, at, e.canvas[slot : slot + 1], further=further
        )
        assert torch.equal(x, want[0])
        assert torch.equal(y, torch.where(want[1] == data.PAD, data.IGNORE, want[1]))
    d, seen = b.demos, set()
    assert (
        list(d.cells) == sorted(d.cells)
        and sum(d.cells) == len(d.inputs)
        and d.most == e.demos.shape[1]
    )
    rows = zip(
        d.inputs.split(d.cells),
        d.outputs.split(d.cells),
        d.gaps,
        d.owner.tolist(),
        d.place.tolist(),
        strict=True,
    )
    for x, y, gap, owner, place in rows:
        pair = e.demos[owner, place]
        s, at = (
            Symmetry(*(v[owner : owner + 1] for v in e.symmetry)),
            e.shift[owner : owner + 1, 1 + place],
        )
        further = None if e.further is None else e.further[owner : owner + 1]
        sizes = data.turned_size(data.both_sides(s, further), packed.grids[pair[None], :, 1:])
        size = torch.tensor([[3 if n <= 3 else 6 for n in sizes[0].amax(0)]])
        assert same((x, y), data.paint(packed, pair[None], s, at, size, further=further)[:2])
        assert gap or bool(((x != data.PAD) | (y != data.PAD)).all())
        seen.add((owner, place))
    assert seen == {tuple(at) for at in torch.nonzero(e.demos >= 0).tolist()}
    owner = d.owner.repeat_interleave(torch.tensor(d.cells))
    assert torch.equal(owner[d.by_slot], owner.sort().values)
    assert list(d.cells_of) == torch.bincount(owner, minlength=8).tolist()


# ---------------------------------------------------------------- queries and bands


@given(generators, st.sampled_from(RULES), st.sampled_from([(3, 4, 6), (4,), (2, 5), (6,), ()]))
def test_a_canvas_is_the_smallest_for_demos_and_input(g, rule, canvases):
    some = puzzles.tasks(g, 5, hidden=True)
    packed = data.pack(some)
    asked = data.queries(packed, rule, canvases)
    pairs = [(t, p) for t in range(5) for p in (*some[t].demos, *some[t].queries)]
    expected = []
    for q, (t, (x, y)) in enumerate(pairs):
        if rule == "test":
            demos, is_query = some[t].demos, q - int(packed.first[t]) >= len(some[t].demos)
        else:
            demos = [p for i, (u, p) in enumerate(pairs) if u == t and i != q and p[1] is not None]
            is_query = y is not None
        if is_query and demos:
            size = np.max(
                [grid.shape for grid in (x, *(grid for p in demos for grid in p))], axis=0
            )
            foretold = size.copy()
            for axis in (0, 1):  # by a ratio that all demos share
                ratios = {Fraction(b.shape[axis], a.shape[axis]) for a, b in demos}
                if len(ratios) == 1:
                    foretold[axis] = max(
                        size[axis], min(30, round(float(ratios.pop() * x.shape[axis])))
                    )
            tried = [
                [min((c for c in canvases or range(31) if c >= n), default=0) for n in s]
                for s in (foretold, size)
            ]
            canvas = next((c for c in tried if all(c)), [0, 0])
            fits = y is None or all(n <= c for n, c in zip(y.shape, canvas, strict=True))
            expected.append((q, t, canvas, canvas[0] > 0 and fits))
    found = zip(
        *(v.tolist() for v in (asked.pair, asked.task, asked.canvas, asked.fits)), strict=True
    )
    assert list(found) == expected


@given(generators, st.sampled_from(RULES))
def test_a_canvas_knows_nothing_of_the_output(g, rule):
    some = puzzles.tasks(g, 4)
    before = data.queries(data.pack(some), rule, CANVASES)
    which = puzzles.integer(g, 0, len(before.pair) - 1)
    t = int(before.task[which])
    place = int(before.pair[which] - data.pack(some).first[t])
    pairs = [*some[t].demos, *some[t].queries]
    others = [puzzles.grid(g, 1, 2), puzzles.grid(g, 1, 30)] + [None] * (rule == "test")
    for output in others:
        changed = [*pairs[:place], (pairs[place][0], output), *pairs[place + 1 :]]
        n = len(some[t].demos)
        after = data.queries(
            data.pack([*some[:t], Task("t", changed[:n], changed[n:]), *some[t + 1 :]]),
            rule,
            CANVASES,
        )
        assert torch.equal(after.pair, before.pair)
        assert torch.equal(after.canvas[which], before.canvas[which])
        size = [0, 0] if output is None else output.shape
        fits = all(n <= int(c) for n, c in zip(size, after.canvas[which], strict=True))
        assert bool(after.fits[which]) == (bool(after.canvas[which].all()) and fits)


@given(generators, st.sampled_from(RULES), st.integers(1, 64))
def test_every_task_has_the_same_share_of_a_batch(g, rule, slots):
    """Bands: a slot draws from its own part of the deck, from small to large; together they are the whole deck."""
    packed = data.pack([*puzzles.tasks(g, 7, high=4), puzzles.task(g, high=3)])
    asked = data.queries(packed, rule, CANVASES[:2])  # 3 and 4: some outputs do not fit
    made = data.deck(asked, slots)
    assert torch.equal(made.pair.sort().values, asked.pair[asked.fits]) and made.cdf[-1] == 1
    cells = made.canvas.prod(1)
    assert torch.equal(cells, cells.sort().values)
    share = torch.zeros(8, dtype=torch.float64).scatter_add_(
        0, packed.task_of[made.pair], torch.diff(made.cdf, prepend=torch.zeros(1))
    )
    there = asked.task[asked.fits].unique()
    torch.testing.assert_close(share[there], torch.full_like(share[there], 1 / len(there)))
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    rows = data.dealt(made, u, torch.arange(slots)[:, None])
    assert torch.equal(rows.flatten(), rows.flatten().sort().values)
    last = torch.searchsorted(made.cdf, (torch.arange(slots) + 1.0) / slots - 1e-12, right=True)
    assert (
        (rows[:, -1] <= last.clamp(max=len(cells) - 1) + 1).all()
        and rows[0, 0] == 0
        and rows[-1, -1] == len(cells) - 1
    )


def test_a_deck_without_a_query_is_refused():
    g = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match="no query to train on"):
        data.deck(data.queries(data.pack([puzzles.task(g, low=5)]), "test", (3,)), 3)


def chi_square(counts, expected):
    counts, expected = counts.double(), expected.double()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("rule", RULES)
def test_queries_are_drawn_task_by_task(rule):
    g = torch.Generator().manual_seed(3)
    packed = data.pack(puzzles.tasks(g, 6))
    made = data.deck(data.queries(packed, rule, (6,)), 3)
    n = torch.arange(6000)
    query = data.draw(packed, made, DataConfig(query=rule), 5, n % 3, n // 3).query
    assert (
        chi_square(torch.bincount(packed.task_of[query], minlength=6), torch.full((6,), 1000)) < 25
    )  # 5 degrees
    asked = torch.bincount(query, minlength=len(packed.task_of))[made.pair]
    each = torch.diff(made.cdf, prepend=torch.zeros(1)) * 6000
    assert chi_square(asked, each) < 3 * len(asked) + 15


# ---------------------------------------------------------------- randomness


@given(st.integers(-(2**62), 2**62), st.integers(0, 2**40), st.integers(1, 30), st.integers(1, 30))
def test_a_lane_ignores_how_many_there_are(seed, n, few, many):
    few, many = sorted((few, many))
    u = data.uniform(many, seed, torch.arange(4), n)
    assert torch.equal(data.uniform(few, seed, torch.arange(4), n), u[:, :few])
    assert torch.equal(data.uniform(many, seed, torch.tensor([2]), n), u[2:3])
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_uniform_is_uniform(seed):
    """Each counter, each lane and neighbouring pairs fill their bins evenly: 15 or 63 degrees of freedom."""
    line = torch.arange(8192)
    for u in (
        data.uniform(1, seed, 0, line, 0)[:, 0],
        data.uniform(1, seed, 0, 0, line)[:, 0],
        data.uniform(1, line, 0, 0, 0)[:, 0],
        data.uniform(8192, seed, 0, 0, 0),
    ):
        assert (
            chi_square(torch.bincount((u * 16).long(), minlength=16), torch.full((16,), 512)) < 50
        )
        both = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()
        assert chi_square(torch.bincount(both, minlength=64), torch.full((64,), 8191 / 64)) < 120


# ---------------------------------------------------------------- episodes


def drawn(g, rule, **options):
    """Tasks and six episodes of a batch of 36."""
    some = [*puzzles.tasks(g, 5, hidden=True), puzzles.task(g, "known")]
    packed, cfg = data.pack(some), DataConfig(query=rule, canvases=CANVASES, **options)
    asked = data.queries(packed, rule, (6,))
    deck = data.deck(asked, 36)
    slot, n = torch.arange(6) * 7, torch.randint(0, 10**9, (6,), generator=g)
    return some, packed, deck, cfg, slot, n


@given(generators, st.sampled_from(RULES), st.integers(1, 6))
def test_an_episode_never_shows_its_query(g, rule, most):
    """Its demos are other pairs of the task, known, none twice, and all of them where `max_demos` allows."""
    some, packed, deck, cfg, slot, n = drawn(g, rule, max_demos=most)
    e = data.draw(packed, deck, cfg, 11, slot, n)
    for query, row in zip(e.query.tolist(), e.demos.tolist(), strict=True):
        shown = [d for d in row if d >= 0]
        task = int(packed.task_of[query])
        assert query in deck.pair.tolist()
        assert row[: len(shown)] == shown and len(set(shown)) == len(shown)
        first, t = int(packed.first[task]), some[task]
        pairs = [*t.demos, *t.queries]
        allowed = (
            range(len(t.demos))
            if rule == "test"
            else [i for i, p in enumerate(pairs) if p[1] is not None]
        )
        allowed = {first + i for i in allowed} - {query}
        assert set(shown) <= allowed and len(shown) == min(most, len(allowed))


@given(generators, st.sampled_from(RULES), st.integers(1, 4), st.integers(1, 4))
def test_demo_subsets_have_the_size_asked_for(g, rule, least, most):
    least, most = sorted((least, most))
    _, packed, deck, cfg, slot, n = drawn(g, rule, max_demos=most, min_demos=least)
    e = data.draw(packed, deck, cfg, 2, slot, n)
    there = (data.candidates(packed, e.query, rule) >= 0).sum(-1).clamp(max=most)
    shown = (e.demos >= 0).sum(-1)
    assert (shown <= there).all() and (shown >= there.clamp(max=least)).all()


def test_every_size_order_and_demo_occurs():
    possible = torch.tensor([[10, 11, 12, -1]]).expand(600, 4)
    u = data.uniform(5, 1, torch.arange(600))
    subsets = {
        tuple(d for d in row if d >= 0) for row in data.choose_demos(possible, u, 10, 1).tolist()
    }
    assert len(subsets) == 3 + 6 + 6  # ordered choices of one, two and three of three
    assert len({tuple(row) for row in data.choose_demos(possible, u, 2).tolist()}) == 6


@given(generators, st.sampled_from(RULES))
def test_episodes_are_a_pure_function_of_seed_slot_and_n(g, rule):
    """Whoever asks, and with whomever: the slots of two ranks are the rows of the whole."""
    _, packed, deck, cfg, slot, n = drawn(g, rule, min_demos=1)
    whole = data.draw(packed, deck, cfg, 3, slot, n)
    order = torch.randperm(6, generator=g)
    cut = puzzles.integer(g, 1, 5)
    for part in (order[:cut], order[cut:]):
        e = data.draw(packed, deck, cfg, 3, slot[part], n[part])
        k = e.demos.shape[1]
        assert same((e.query, *e.symmetry), (whole.query[part], *(v[part] for v in whole.symmetry)))
        assert torch.equal(e.demos, whole.demos[part, :k]) and (whole.demos[part, k:] == -1).all()
        assert torch.equal(e.shift, whole.shift[part, : 1 + k])
    for other in (
        data.draw(packed, deck, cfg, 4, slot, n),
        data.draw(packed, deck, cfg, 3, slot + 1, n),
    ):
        assert not torch.equal(other.shift[:, 0], whole.shift[:, 0])


@pytest.mark.parametrize("rule", RULES)
def test_one_demo_and_one_query_are_enough(rule):
    g = torch.Generator().manual_seed(0)
    packed = data.pack([Task("t", [puzzles.pair(g)], [puzzles.pair(g)])])
    made = data.deck(data.queries(packed, rule, (6,)), 20)
    e = data.draw(
        packed,
        made,
        DataConfig(query=rule),
        0,
        torch.arange(20),
        torch.zeros(20, dtype=torch.int64),
    )
    assert set(e.query.tolist()) == ({0, 1} if rule == "leave_one_out" else {1})
    assert [[d for d in row if d >= 0] for row in e.demos.tolist()] == (
        1 - e.query[:, None]
    ).tolist()
    assert len(data.batch(packed, e, DataConfig()).demos.owner) == 20


@given(generators)
@settings(max_examples=20)
def test_outputs_alone_are_turned_further_and_all_of_an_episode_alike(g):
    some, packed, deck, cfg, _, _ = drawn(g, "leave_one_out", translate=False)
    pairs = [p for t in some for p in (*t.demos, *t.queries)]
    slot, n = torch.arange(6).repeat(100), torch.arange(100).repeat_interleave(6)
    plain, e = (
        data.draw(packed, deck, msgspec.structs.replace(cfg, turn_outputs=x), 0, slot, n)
        for x in (0.0, 0.5)
    )
    assert plain.further is None and 0.3 < float((e.further > 0).double().mean()) < 0.6  # 7 of 16
    assert same(
        (plain.query, plain.demos, plain.shift, *plain.symmetry),
        (e.query, e.demos, e.shift, *e.symmetry),
    )
    first = data.Episodes(
        *(
            data.Symmetry(*(y[:8] for y in x))
            if isinstance(x, tuple)
            else x
            if x is None
            else x[:8]
            for x in e
        )
    )
    b = data.batch(packed, first, cfg)
    for i, (x, y) in enumerate(
        zip(b.demos.inputs.split(b.demos.cells), b.demos.outputs.split(b.demos.cells), strict=True)
    ):
        owner = int(b.demos.owner[i])
        x_in, x_out = pairs[int(first.demos[owner, b.demos.place[i]])]
        s = Symmetry(first.symmetry.dihedral[owner], first.symmetry.colours[owner])
        want = (
            data.apply(s, x_in),
            data.apply(
                data.identity()._replace(dihedral=first.further[owner]), data.apply(s, x_out)
            ),
        )
        canvas = tuple(np.max([grid.shape for grid in want], axis=0))
        for tokens, grid in zip((x, y), want, strict=True):
            assert np.array_equal(tokens.view(*canvas).numpy(), data.tokenise(grid, canvas))


def test_without_translation_grids_lie_at_the_corner():
    _, packed, deck, cfg, slot, n = drawn(torch.Generator().manual_seed(0), "test", translate=False)
    assert not data.draw(packed, deck, cfg, 0, slot, n).shift.any()
