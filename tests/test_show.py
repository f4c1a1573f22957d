"""A timeline is what the model says after each ACT step; a picture shows it cell by cell."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from etrm_arc import data, etrm, show, solve
from etrm_arc.config import UserError
from etrm_arc.data import PAD, PALETTE, Task, tokenise
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.show import Step, Timeline
from etrm_arc.tests import puzzles
from etrm_arc.tests.test_train import tiny

DEMOS = [(np.full((3, 4), c, np.uint8), np.full((3, 4), c + 1, np.uint8)) for c in (1, 3)]
TASK = Task("t", DEMOS, [(np.eye(4, 5, dtype=np.uint8), None)])


def solver_of(**fields):
    cfg = tiny("run", **{f"model__{k}": v for k, v in fields.items()})
    return solve.Solver(Path(), cfg, "", init_params(cfg.model, 0), {}, torch.zeros(0, 16))


def line(*answers, target):
    """A timeline of these answers, each on a canvas one larger than the target."""
    shape = (target.shape[0] + 1, target.shape[1] + 1)
    steps = [Step(tokenise(a, shape), a, 0.5, 1.0, i + 1.0) for i, a in enumerate(answers)]
    return Timeline(asking(target), steps)


def asking(target, task=TASK):
    return task._replace(queries=[(task.queries[0][0], target)])


FEEDBACK = {"feedback": "reset", "halt_max_steps": 1, "context_tokens": 0, "loss": "softmax"}


@pytest.mark.parametrize("fields", [{}, FEEDBACK])
def test_the_last_step_of_a_timeline_is_what_thinking_gives(fields):
    """Of the argmax-feedback TRM after its last cycle; those before are shown, too."""
    s = solver_of(**fields)
    cfg, t = s.cfg, show.timeline(s, TASK, 0)
    assert [x.number for x in t.steps] == ([0.5, 1.0] if fields else [1.0, 2.0, 3.0])
    packed, last = data.pack([TASK]), cfg.model.halt_max_steps
    queries = data.queries(packed, "test", cfg.data)
    batch = data.batch(packed, data.posed(packed, cfg.data, "test", queries), cfg.model.raster)
    out, _ = etrm.think(s.params, cfg.model, encoder_of(cfg.model), batch, torch.float32, last)
    step = show.step_of(cfg, out.logits, queries.canvas[0].tolist(), 0.0, 0.0)
    assert np.array_equal(step.tokens, t.steps[-1].tokens)
    assert float(out.q_halt.sigmoid()) == pytest.approx(t.steps[-1].q)
    p = etrm.log_prob(cfg.model, out.logits).exp()
    seen = p[torch.from_numpy(step.tokens != PAD).flatten() | (step.answer is None)]
    bits = -(seen * seen.clamp(min=1e-30).log2()).sum(-1).mean()
    assert t.steps[-1].entropy == pytest.approx(float(bits), rel=1e-3)


@pytest.mark.parametrize("kind", ["perceiver", "recurrent"])
def test_timelines_of_many_tasks_are_those_of_each(kind):
    s, g = solver_of(encoder={"kind": kind}), torch.Generator().manual_seed(1)
    tasks = [puzzles.task(g, f"t{i}", n, n) for i, n in enumerate((6, 3, 5))]
    shown = show.timelines(s, tasks)
    assert [t.task.name for t in shown] == [t.name for t in tasks for _ in t.queries]
    for together in shown:
        alone = show.timeline(s, together.task, 0).steps
        assert len(together.steps) == len(alone) == 3
        for a, b in zip(alone, together.steps, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert (a.q, a.entropy) == pytest.approx((b.q, b.entropy), abs=1e-4)
        assert np.allclose(alone[0].context, together.steps[0].context, atol=1e-4)
    first, *others = {t.task.name: t.steps[0].context for t in shown}.values()
    assert all(np.linalg.norm(x - first) > 1e-3 for x in others)
    for query in (1, -1):
        with pytest.raises(UserError, match=f"--query {query}"):
            show.timeline(s, TASK, query)


@given(puzzles.generators)
def test_an_answer_is_right_where_no_cell_is_marked_wrong(g):
    """Whatever is beyond the border, where nothing is judged and training looks at nothing."""
    target = puzzles.grid(g, 1, 4, 3)
    shape = tuple(n + puzzles.integer(g, 0, 3) for n in target.shape)
    tokens, noise = tokenise(target, shape), torch.randint(0, 5, shape, generator=g).numpy()
    beyond = tokens == PAD
    tokens[beyond] = noise[beyond]
    for _ in range(puzzles.integer(g, 0, 2)):
        r, c = (puzzles.integer(g, 0, n - 1) for n in shape)
        tokens[r, c] = noise[r, c]
    cfg = solver_of(loss="softmax").cfg
    logits = torch.nn.functional.one_hot(torch.from_numpy(tokens).long(), 12).float().view(-1, 12)
    step = show.step_of(cfg, 50 * logits, shape, 0.5, 1.0)
    state, _ = show.marks(Timeline(asking(target), [step]), 0)
    right = step.answer is not None and np.array_equal(step.answer, target)
    assert (state < 0).any() == (not right)
    assert (state[: target.shape[0], : target.shape[1]] != 0).all()
    if step.answer is not None:  # what is blank has no say in its entropy
        logits = 50 * logits * torch.from_numpy(step.tokens != PAD).view(-1, 1)
        assert show.step_of(cfg, logits, shape, 0.5, 1.0).entropy < 1e-3


def test_marks_are_read_back_from_the_pixels():
    target = np.array([[1, 2, 7], [3, 4, 0]], np.uint8)
    first, second = target.copy(), target.copy()
    first[0, 0], second[1, 2] = 5, 8
    t = line(first, second, target=target)
    state, changed = show.marks(t, 1)
    assert state[:2, :3].tolist() == [[1, 1, 1], [1, 1, -1]] and not state[2].any()
    assert np.argwhere(changed).tolist() == [[0, 0], [1, 2]]
    image = show.painted(t.steps[1].tokens, (state > 0, show.RIGHT, 2), (state < 0, show.WRONG, 2))
    for (r, c), colour in {(0, 0): show.RIGHT, (1, 2): show.WRONG}.items():
        cell = image[r * show.CELL :, c * show.CELL :]
        assert tuple(cell[3, show.CELL // 2]) == show.rgb(colour)
        assert tuple(cell[show.CELL // 2, show.CELL // 2]) == show.rgb(PALETTE[second[r, c]])
    assert not show.marks(t._replace(task=TASK), 1)[0].any()


def test_a_picture_has_a_panel_for_each_grid_and_none_overlap():
    target = np.random.default_rng(0).integers(0, 10, (12, 12)).astype(np.uint8)
    t = line(*[target[::-1]] * 4, target, target=target)
    figure = show.picture(t._replace(task=t.task._replace(demos=TASK.demos * 5)), "$\\frac$")
    titles = [axis.get_title() for axis in figure.axes]
    names = [*(f"demo {i}" for i in range(10)), "t"]
    assert titles[:22] == [f"{name}: {kind}" for name in names for kind in ("input", "output")]
    assert titles[22:] == [f"step {i}, q 0.50, 1.00 bits" for i in range(1, 6)]
    figure.draw_without_rendering()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    for i, box in enumerate(boxes):
        assert min(box.width, box.height) > 60 and min(box.x0, box.y0) >= 0
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_file_that_cannot_be_written_and_an_unknown_task_are_named(tmp_path):
    target = np.eye(2, dtype=np.uint8)
    for path in (tmp_path / "nowhere" / "a.png", Path("/dev/full"), tmp_path / "a.bad"):
        with pytest.raises(UserError, match="cannot be written"):
            show.save(show.picture(line(target, target=target)), path)
    assert show.find_task([str(puzzles.SET)], "flip").name == "flip"
    with pytest.raises(UserError, match="one of 6 tasks of .*did you mean flip"):
        show.find_task([str(puzzles.SET)], "flop")
