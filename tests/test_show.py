"""What a picture shows is what the model said: colours read back from its pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given

from etrm_arc import data, etrm, show, sources
from etrm_arc.config import UserError, parse_config
from etrm_arc.data import PAD, PALETTE, Task, tokenise
from etrm_arc.encoders import init_params
from etrm_arc.show import Step, Timeline
from etrm_arc.tests import puzzles

Image = pytest.importorskip("PIL.Image")
SMALL = {
    "hidden": 32,
    "heads": 2,
    "expansion": 1.0,
    "H_cycles": 3,
    "L_cycles": 1,
    "context_tokens": 4,
    "halt_max_steps": 4,
}
CFG = parse_config({"model": SMALL, "train": {"dtype": "fp32"}, "data": {"max_side": 10}}, "test")
PARAMS = init_params(CFG.model, 0)
TASK = Task(
    "t",
    [(np.full((3, 4), c, np.uint8), np.full((3, 4), c + 1, np.uint8)) for c in (1, 3)],
    [(np.eye(4, 5, dtype=np.uint8), None)],
)


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def line(*answers, target):
    """A timeline of these answers, each on a canvas one larger than the target."""
    shape = (target.shape[0] + 1, target.shape[1] + 1)
    steps = [Step(tokenise(a, shape), a, 0.5, 1.0, i + 1.0) for i, a in enumerate(answers)]
    return Timeline(TASK, target, target, steps)


def test_a_timeline_is_what_thinking_gives():
    t = show.timeline(PARAMS, CFG, TASK)
    assert len(t.steps) == 4 and t.target is None and t.question is TASK.queries[0][0]
    packed = data.pack([TASK])
    asked = data.queries(packed, "test", CFG.data)
    batch = data.batch(packed, data.posed(packed, CFG.data, "test", asked), CFG.model.raster)
    out, _ = etrm.think(PARAMS, CFG.model, show.encoder_of(CFG.model), batch, torch.float32, 4)
    tokens, grid = show.decoded(out.logits.argmax(-1).view(*asked.canvas[0]).numpy())
    assert np.array_equal(tokens, t.steps[-1].tokens) and (grid is None) == (
        t.steps[-1].grid is None
    )
    p = etrm.log_prob(CFG.model, out.logits).exp()[
        torch.from_numpy(tokens != PAD).flatten() | (grid is None)
    ]
    assert t.steps[-1].entropy == pytest.approx(float(-(p * p.log2()).sum(-1).mean()), rel=1e-3)
    assert t.steps[-1].q == pytest.approx(float(out.q_halt.sigmoid())) and 0 < t.steps[
        -1
    ].entropy < np.log2(12)


@pytest.mark.parametrize(
    "kind", ["perceiver", "recurrent", "trm_style"]
)  # the states of the last two go on once a step
def test_the_cycles_of_a_step_end_where_the_step_does(kind):
    cfg = parse_config(
        {"model": SMALL | {"encoder": {"kind": kind}}, "train": {"dtype": "fp32"}}, "test"
    )
    params = init_params(cfg.model, 0)
    whole, fine = show.timeline(params, cfg, TASK), show.timeline(params, cfg, TASK, cycles=True)
    assert [s.number for s in fine.steps] == pytest.approx([k / 3 for k in range(1, 13)])
    for a, b in zip(whole.steps, fine.steps[2::3], strict=True):
        assert (
            np.array_equal(a.tokens, b.tokens)
            and a.q == pytest.approx(b.q, abs=1e-5)
            and a.entropy == pytest.approx(b.entropy, abs=1e-4)
        )


@pytest.mark.parametrize("kind", ["perceiver", "recurrent"])
@pytest.mark.parametrize("cycles", [False, True])
def test_timelines_of_many_are_those_of_each(kind, cycles):
    cfg = parse_config(
        {
            "model": SMALL | {"encoder": {"kind": kind}},
            "train": {"dtype": "fp32"},
            "data": {"max_side": 6},
        },
        "test",
    )
    params, g = init_params(cfg.model, 0), torch.Generator().manual_seed(1)
    asked = [
        show.asked_pair(puzzles.task(g, f"t{i}", n, n), 0, None) for i, n in enumerate((6, 3, 9, 5))
    ]
    together = show.timelines(params, cfg, asked, cycles)
    assert together[2] is None  # there is no canvas for it
    for many, (task, target) in zip(together, asked, strict=True):
        if many:
            alone = show.timeline(params, cfg, task, cycles=cycles)
            assert (
                many.task is task and many.question is task.queries[0][0] and many.target is target
            )
            for a, b in zip(alone.steps, many.steps, strict=True):
                assert a.number == b.number and np.array_equal(a.tokens, b.tokens)
                assert (a.q, a.entropy) == pytest.approx((b.q, b.entropy), abs=1e-4)


def test_a_demo_is_asked_from_the_others():
    t = show.timeline(PARAMS, CFG, TASK, demo=1)
    assert (
        np.array_equal(t.question, TASK.demos[1][0])
        and np.array_equal(t.target, TASK.demos[1][1])
        and len(t.task.demos) == 1
    )
    with pytest.raises(UserError, match="no --query 1"):
        show.timeline(PARAMS, CFG, TASK, query=1)
    for demo in (2, -1):
        with pytest.raises(UserError, match=f"--pair-index {demo} cannot be asked"):
            show.timeline(PARAMS, CFG, TASK, demo=demo)
    big = np.ones((12, 12), np.uint8)
    with pytest.raises(UserError, match="task b: needs a canvas larger"):
        show.timeline(PARAMS, CFG, Task("b", [(big, big)], [(big, None)]))


def test_marks_say_right_wrong_and_changed():
    target = np.array([[1, 2], [3, 4]], np.uint8)
    other = np.array([[1, 2], [3, 5]], np.uint8)
    t = line(other, target, np.array([[1, 2, 9]], np.uint8), target=target)
    state, changed = show.marks(t, 0)
    assert state.tolist() == [[1, 1, 0], [1, -1, 0], [0, 0, 0]] and not changed.any()
    state, changed = show.marks(t, 1)
    assert state.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]] and np.argwhere(
        changed
    ).tolist() == [[1, 1]]
    state, changed = show.marks(t, 2)
    assert (
        state.tolist() == [[1, 1, -1], [-1, -1, 0], [0, 0, 0]]
        and changed[0, 2]
        and not changed[0, 0]
    )
    assert not show.marks(t._replace(target=None), 2)[0].any()


@given(puzzles.generators)
def test_an_answer_is_right_where_no_cell_is_marked_wrong(g):
    """Whatever stands beyond the border, where nothing is asked and training looks at nothing."""
    target = puzzles.grid(g, 1, 4, 3)
    shape = tuple(n + puzzles.integer(g, 0, 3) for n in target.shape)
    said, noise = (
        tokenise(target, shape),
        torch.randint(0, 5, shape, generator=g).to(torch.uint8).numpy(),
    )
    h, w = target.shape
    beyond = tokenise(target, shape) == PAD
    said[beyond] = noise[beyond]
    for _ in range(puzzles.integer(g, 0, 2)):
        r, c = (puzzles.integer(g, 0, n - 1) for n in shape)
        said[r, c] = noise[r, c]
    tokens, grid = show.decoded(said)
    state, _ = show.marks(Timeline(TASK, target, target, [Step(tokens, grid, 0.5, 1.0, 1.0)]), 0)
    assert (state < 0).any() == (grid is None or not np.array_equal(grid, target))
    assert (state[:h, :w] != 0).all() and (grid is not None or (tokens == said).all())


def pixels(t, i, tmp_path, diff=True):
    """The pixels of a panel, cell by cell, drawn alone in a figure of one inch a cell."""
    h, w = t.steps[i].tokens.shape
    figure = show.new_figure(w, h)
    show.answer_on(figure.add_axes((0, 0, 1, 1)), t, i, diff)
    show.save(figure, tmp_path / "p.png", 100)
    image = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert image.shape == (100 * h, 100 * w, 3)
    return lambda r, c: image[100 * r : 100 * r + 100, 100 * c : 100 * c + 100]


def colours_of(cell):
    """(at the outer border, at the inner mark, in the middle)."""
    return (
        tuple(map(int, cell[8, 50])),
        tuple(map(int, cell[29, 50])),
        tuple(map(int, cell[50, 50])),
    )


def test_borders_and_colours_are_read_back_from_the_pixels(tmp_path):
    target = np.array([[1, 2, 7], [3, 4, 0]], np.uint8)
    first, second = target.copy(), target.copy()
    first[0, 0], second[1, 2] = 5, 8
    t = line(first, second, target=target)
    cell = pixels(t, 1, tmp_path)
    want = {
        (0, 0): (show.RIGHT, show.CHANGED),
        (1, 2): (show.WRONG, show.CHANGED),
        (0, 1): (show.RIGHT, None),
    }
    for (r, c), (outer, inner) in want.items():
        fill = PALETTE[second[r, c]]
        assert colours_of(cell(r, c)) == (rgb(outer), rgb(inner or fill), rgb(fill)), (r, c)
    assert colours_of(cell(2, 3))[0] not in (
        rgb(show.RIGHT),
        rgb(show.WRONG),
    )  # beyond the border nothing is asked
    plain = pixels(t._replace(target=None), 1, tmp_path, diff=False)
    assert colours_of(plain(0, 0)) == (rgb(PALETTE[1]),) * 3


def test_marks_are_told_from_cells_of_their_own_colour(tmp_path):
    """A dark edge lies between a yellow mark and a yellow cell, a green border and a green cell."""
    target = np.array([[4, 3]], np.uint8)
    cell = pixels(line(1 - target % 2, target, target=target), 1, tmp_path)
    for c in (0, 1):
        column = cell(0, c)[:50, 50].astype(int).max(-1)
        edges = [int(i) for i in np.flatnonzero(np.diff((column < 64).astype(int), prepend=0) == 1)]
        assert len(edges) == 4, edges  # without and within each of the two


@pytest.mark.parametrize("size", [3, 30])
def test_a_picture_has_its_panels_and_is_legible(tmp_path, size):
    target = np.random.default_rng(0).integers(0, 10, (size, size)).astype(np.uint8)
    other = target.copy()
    other[0] = (other[0] + 1) % 10
    t = line(*[other] * 8, target, target=target)
    assert show.draw(t, tmp_path / "a.png", caption="$\\frac$") == 4 + 2 + 9
    seen = counts(tmp_path / "a.png")
    assert all(
        seen.get(rgb(colour), 0) > 20 for colour in (show.RIGHT, show.WRONG, show.CHANGED, *PALETTE)
    )
    assert show.draw(t._replace(target=None), tmp_path / "b.png", diff=False, dpi=60) == 4 + 1 + 9
    seen = counts(tmp_path / "b.png")
    assert not any(rgb(colour) in seen for colour in (show.RIGHT, show.WRONG, show.CHANGED))


def test_no_demo_is_left_out():
    target = np.array([[1, 2], [3, 4]], np.uint8)
    t = line(target.T, target, target=target)
    _, panels = show.picture(t._replace(task=TASK._replace(demos=TASK.demos * 5)))
    titles = [axis.get_title() for axis in panels]
    assert [f"demo {i} {what}" for i in range(10) for what in ("input", "output")] == titles[
        :20
    ] and len(titles) == 24
    boxes = [tuple(np.round(axis.get_position().bounds, 6)) for axis in panels]
    assert len(set(boxes)) == 24 and min(b[1] for b in boxes) > 0


def counts(path):
    """How many pixels have which colour."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(np.int32)
    found, n = np.unique(
        image[..., 0] << 16 | image[..., 1] << 8 | image[..., 2], return_counts=True
    )
    return {
        (c >> 16, c >> 8 & 255, c & 255): k for c, k in zip(found.tolist(), n.tolist(), strict=True)
    }


def test_other_formats_and_places_that_cannot_be_written(tmp_path):
    target = np.array([[1, 2], [3, 4]], np.uint8)
    t = line(target.T, target, target=target)
    show.draw(t, tmp_path / "a.svg")
    assert show.RIGHT.lower() in (tmp_path / "a.svg").read_text()
    for name in ("nowhere/a.png", "a.doc"):
        with pytest.raises(UserError, match="cannot be written"):
            show.draw(t, tmp_path / name, dpi=30)


def test_an_animation_has_a_frame_for_each_step(tmp_path):
    target = np.array([[1, 2], [3, 4]], np.uint8)
    t = line(target.T, target, target.T, target=target)
    assert show.animate(t, tmp_path / "a.gif") == 3
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
        first = np.asarray(film.convert("RGB")).copy()
        film.seek(1)
        assert (np.asarray(film.convert("RGB")) != first).any()


def test_blocks_for_a_terminal():
    target = np.array([[1, 2], [3, 4]], np.uint8)
    text = show.blocks(line(target.T, target, target=target)).plain.splitlines()
    assert text[1] == "  x | " and text[2] == "x   | " and text[3] == "| | . "
    assert text[5] == "   !| " and text[6] == " !  | " and "step 2" in text[4]


def test_an_unknown_task_names_the_nearest():
    where = str(sources.Path(__file__).parent / "data" / "set")
    assert show.find_task([where], "flip").name == "flip"
    with pytest.raises(
        UserError, match="--task flop: not among the 6 tasks .*; the nearest: flip, "
    ):
        show.find_task([where], "flop")
    with pytest.raises(UserError, match="--task: which of the 6 tasks"):
        show.find_task([where], None)
