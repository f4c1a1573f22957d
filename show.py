"""Watching a model think: the answer after every ACT step, drawn as a picture, an animation or blocks in a terminal.

Every picture is made from a `Timeline`; nothing is computed while drawing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from . import data, etrm, sources, train
from .config import Config
from .data import EOS, FIRST_COLOUR, PAD, PALETTE, Task, UserError, tokenise
from .encoders import encoder_of
from .etrm import Params, tree_map

RIGHT, WRONG, CHANGED, BLANK = "#00B050", "#E00000", "#FFE600", "#F4F4F4"


class Step(NamedTuple):
    tokens: np.ndarray  # (height, width) of the canvas: the answer and its border; where there is no answer, all that was said
    grid: np.ndarray | None  # the answer
    q: float  # sigmoid of the halting head
    entropy: float  # mean over the cells of the answer and its border (without an answer, of the canvas), in bits
    number: float  # ACT steps taken, a fraction where cycles are shown


class Timeline(NamedTuple):
    task: Task  # the demos that were shown
    question: np.ndarray
    target: np.ndarray | None
    steps: list[Step]


def decoded(said: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(tokens of the answer and its border, blank beyond, for nothing is asked there; the answer). None: all that was said."""
    grid = data.untokenise(said)
    return (said, None) if grid is None else (tokenise(grid.astype(np.uint8), said.shape), grid)


def asked_pair(task: Task, query: int, demo: int | None) -> tuple[Task, np.ndarray | None]:
    """(task with one query and its output hidden, that output); a demo may be asked, from the others.

    Raises UserError where there is no such pair."""
    if demo is not None:
        if not 0 <= demo < len(task.demos) or len(task.demos) < 2:
            raise UserError(f"task {task.name}: has {len(task.demos)} demos, so --pair-index {demo} cannot be asked from the others")
        x, y = task.demos[demo]
        return Task(task.name, [p for i, p in enumerate(task.demos) if i != demo], [(x, None)]), y
    if not 0 <= query < len(task.queries):
        raise UserError(f"task {task.name}: has {len(task.queries)} queries, so there is no --query {query}")
    x, known = task.queries[query]
    return Task(task.name, task.demos, [(x, None)]), known


def watched(
    params: Params, cfg: Config, batch: data.Batch, sizes: Sequence[Sequence[int]], dtype: torch.dtype, cycles: bool
) -> list[list[Step]]:
    """Of each slot, its steps on its canvas (height, width). params: in the compute dtype."""
    # one ACT step is H cycles on end, so as many ACT steps of one cycle each pass through the same states
    model = msgspec.structs.replace(cfg.model, H_cycles=1) if cycles else cfg.model
    each, encode = 1 / cfg.model.H_cycles if cycles else 1.0, encoder_of(cfg.model)
    steps, said = [list[Step]() for _ in sizes], list[etrm.Context]()

    def recur(p: Any, read: Any, z_E: Tensor, begin: Tensor) -> etrm.Context:
        """A recurrent encoder goes on once in an ACT step, however often that is looked at."""
        if encode.recur and (not cycles or len(steps[0]) % cfg.model.H_cycles == 0):
            said[:] = [encode.recur(p, read, z_E, begin)]
        return said[0]

    def look(step: int, slots: Sequence[int], out: etrm.Output) -> None:
        for i, logits in enumerate(out.logits.split(batch.cells)):
            log_p = etrm.log_prob(cfg.model, logits)
            tokens, grid = decoded(log_p.argmax(-1).view(*sizes[i]).cpu().numpy())
            entropy = torch.special.entr(log_p.exp()).sum(-1).cpu().numpy() / math.log(2)
            here = entropy if grid is None else entropy[tokens.flatten() != PAD]
            steps[i].append(Step(tokens, grid, float(out.q_halt[i].sigmoid()), float(here.mean()), step * each))

    once = encode._replace(recur=recur) if encode.recur else encode
    etrm.think(params, model, once, batch, dtype, round(cfg.model.halt_max_steps / each), look=look)
    return steps


def timelines(
    params: Params, cfg: Config, asked: Sequence[tuple[Task, np.ndarray | None]], cycles: bool = False
) -> list[Timeline | None]:
    """The answer after every ACT step (`cycles`: after every H cycle) to tasks as they are, each with one query and, apart
    from it, its output, as `asked_pair` gives them; None for a task that has no canvas."""
    device, dtype = train.hardware(cfg)
    packed, cast = data.pack([task for task, _ in asked], device), tree_map(lambda x: x.to(device, dtype), params)
    queries, made = data.queries(packed, "test", cfg.data.canvases), dict[int, list[Step]]()
    for part in train.portions(queries, cfg.model, cfg.eval.tokens):
        batch = data.batch(packed, data.posed(packed, cfg.data, "test", data.chosen(queries, part)), cfg.data, cfg.model.raster)
        steps = watched(cast, cfg, batch, queries.canvas[part].tolist(), dtype, cycles)
        made |= zip(queries.task[part].tolist(), steps, strict=True)
    return [Timeline(t, t.queries[0][0], y, made[i]) if i in made else None for i, (t, y) in enumerate(asked)]


def timeline(params: Params, cfg: Config, task: Task, query: int = 0, demo: int | None = None, cycles: bool = False) -> Timeline:
    """The one of a query of a task, or of a demo asked from the others. Raises UserError where there is no such pair or canvas."""
    (found,) = timelines(params, cfg, [asked_pair(task, query, demo)], cycles)
    if found is None:
        raise UserError(f"task {task.name}: needs a canvas larger than any the model was trained on")
    return found


def find_task(chosen: Sequence[str], name: str | None) -> Task:
    """The task of that id among the sources, or their only one. Raises UserError naming the nearest ids."""
    tasks: dict[str, Task] = {}
    for source in sorted(chosen, key=lambda s: s.startswith("composed")):  # what takes long comes last
        tasks |= {t.name: t for t in sources.load([source])}
        if name in tasks:
            return tasks[name]
    if name is None and len(tasks) == 1:
        return next(iter(tasks.values()))
    if name is None:
        raise UserError(f"--task: which of the {len(tasks)} tasks of {', '.join(chosen)}? For instance {min(tasks)}")
    close = ", ".join(difflib.get_close_matches(name or "", tasks, cutoff=0))
    raise UserError(f"--task {name}: not among the {len(tasks)} tasks of {', '.join(chosen)}; the nearest: {close}")


def marks(t: Timeline, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(what a cell is: 1 right, -1 wrong, 0 not asked; whether it changed since the step before), on the canvas.

    Asked are the cells of the target; a colour in the place of its border is wrong, and so is all that an answer has beyond."""
    tokens = t.steps[i].tokens
    changed = tokens != t.steps[i - 1].tokens if i else np.zeros(tokens.shape, bool)
    state = np.zeros(tokens.shape, np.int8)
    if t.target is not None:
        h, w = (min(a, b) for a, b in zip(t.target.shape, tokens.shape, strict=True))
        label = tokenise(t.target[:h, :w], tokens.shape)
        state[label >= FIRST_COLOUR] = np.where(tokens == label, 1, -1)[label >= FIRST_COLOUR]
        beyond = (label == EOS) if t.steps[i].grid is None else (label < FIRST_COLOUR)
        state[beyond & (tokens >= FIRST_COLOUR)] = -1
    return state, changed


# ---------------------------------------------------------------- drawing


def grid_on(axis: Any, tokens: np.ndarray, title: str = "") -> None:
    """Tokens as coloured cells with thin lines between them; the end of the grid is grey, nothing is pale."""
    from matplotlib.colors import ListedColormap

    h, w = tokens.shape
    axis.imshow(tokens, cmap=ListedColormap([BLANK, "#D8D8D8", *PALETTE]), vmin=0, vmax=11, interpolation="nearest")
    axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    axis.set_title(title, fontsize=8, pad=3, parse_math=False)
    axis.hlines(np.arange(1, h) - 0.5, -0.5, w - 0.5, color="#666666", lw=0.3)
    axis.vlines(np.arange(1, w) - 0.5, -0.5, h - 0.5, color="#666666", lw=0.3)
    for spine in axis.spines.values():
        spine.set_linewidth(0.5)


def frame(axis: Any, cells: np.ndarray, colour: str, inset: float, width: float) -> None:
    """A border inside each of the cells (n, 2): one path, for a patch per cell takes seconds at 30 x 30."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    if len(cells):
        reach = 0.5 - inset
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) * reach
        outline = Outline((cells[:, None, ::-1] + corners).reshape(-1, 2), [1, 2, 2, 2, 79] * len(cells))
        axis.add_patch(PathPatch(outline, facecolor="none", edgecolor=colour, linewidth=width, antialiased=False, joinstyle="miter"))


def answer_on(axis: Any, t: Timeline, i: int, diff: bool) -> None:
    """One step: green borders for right cells, red for wrong ones, a yellow mark within for what changed."""
    step = t.steps[i]
    number = f"{step.number:.3g}"
    grid_on(axis, step.tokens, f"step {number}, q {step.q:.2f}")
    box = axis.get_position()
    fig_w, fig_h = axis.figure.get_size_inches()
    cell = 72 * min(box.width * fig_w / step.tokens.shape[1], box.height * fig_h / step.tokens.shape[0])  # in points
    width = max(0.6, 0.09 * cell)
    state, changed = marks(t, i)
    frames = [(state == 1, RIGHT, 0.07), (state == -1, WRONG, 0.07), (changed & diff, CHANGED, 0.28)]
    for cells, colour, inset in frames:
        if cell > 8:  # where there is room, a dark edge: green is seen on green, yellow on yellow
            frame(axis, np.argwhere(cells), "#222222", inset, 1.5 * width)
        frame(axis, np.argwhere(cells), colour, inset, width)


def curves_on(axis: Any, t: Timeline, upto: int) -> None:
    """q and entropy of the first steps."""
    at = [s.number for s in t.steps[:upto]]
    other = axis.twinx()
    axis.plot(at, [s.q for s in t.steps[:upto]], ".-", color="#0074D9", lw=1, label="q")
    other.plot(at, [s.entropy for s in t.steps[:upto]], ".-", color="#FF851B", lw=1)
    axis.set(xlim=(0, t.steps[-1].number + 0.5), ylim=(-0.03, 1.03))
    axis.set_xlabel("ACT steps", fontsize=7, labelpad=1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    other.set_ylim(0, 0.1 + 1.1 * max(s.entropy for s in t.steps))
    axis.set_ylabel("q", color="#0074D9", fontsize=7, labelpad=3)
    other.set_ylabel("entropy (bits)", color="#FF851B", fontsize=7, labelpad=3)
    for a in (axis, other):
        a.tick_params(labelsize=6)


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)  # no display is needed, whatever the user's backend
    return figure


def needs_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'etrm-arc[show]'") from None


SIDE, GAP, ACROSS = 1.5, 0.32, 8  # inches of a panel, between panels; panels in a row


def picture(t: Timeline, diff: bool = True, caption: str = "") -> tuple[Any, list[Any]]:
    """(the whole timeline as a figure, its panels): demos, then query, target and curves, then the steps."""
    side = SIDE * (1.6 if max(t.steps[0].tokens.shape) > 15 else 1.0)  # legible at 30 x 30
    across = min(ACROSS, max(len(t.steps), len(t.task.demos), 4))
    middle = 2 * math.ceil(len(t.task.demos) / across)
    rows = middle + 1 + math.ceil(len(t.steps) / across)
    width, height = across * (side + GAP) + GAP, rows * (side + GAP) + GAP
    figure, panels = new_figure(width, height), []

    def axis(row: int, column: int, wide: float = side, high: float = side) -> Any:
        left, top = GAP + column * (side + GAP), GAP + row * (side + GAP)
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def panel(place: int, first: int, grid: np.ndarray, title: str) -> None:
        panels.append(axis(first, place))
        grid_on(panels[-1], grid + FIRST_COLOUR, title)

    for i, pair in enumerate(t.task.demos):
        for k, name in enumerate(("input", "output")):
            panel(i % across, 2 * (i // across) + k, pair[k], f"demo {i} {name}")
    panel(0, middle, t.question, f"{t.task.name}: query")
    if t.target is not None:
        panel(1, middle, t.target, "target")
    for i in range(len(t.steps)):
        panels.append(axis(middle + 1 + i // across, i % across))
        answer_on(panels[-1], t, i, diff)
    curve = axis(middle, 2, min(across - 2, 3) * (side + GAP) - 3 * GAP, side - GAP)
    curve.set_position(curve.get_position().translated(1.3 * GAP / width, 0))
    curves_on(curve, t, len(t.steps))
    figure.text(0.5, 0.05 / height, caption, fontsize=6, color="#666666", ha="center", parse_math=False)
    return figure, panels


def draw(t: Timeline, path: Path, diff: bool = True, dpi: int = 150, caption: str = "") -> int:
    """The whole timeline as PNG, SVG or PDF, by the name of the file; how many panels it has."""
    needs_matplotlib()
    figure, panels = picture(t, diff, caption)
    save(figure, path, dpi)
    return len(panels)


def save(figure: Any, path: Path, dpi: int) -> None:
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as e:
        raise UserError(f"--output {path}: cannot be written: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}") from None


def animate(t: Timeline, path: Path, diff: bool = True, dpi: int = 100) -> int:
    """A GIF with a frame per step; the last one stays. How many frames it has."""
    needs_matplotlib()
    from PIL import Image

    frames = []
    for i in range(len(t.steps)):
        figure = new_figure(9, 4.6)
        places = ((0.02, "query"), (0.35, "answer"), (0.68, "target"))
        for left, what in places[: 2 + (t.target is not None)]:
            axis = figure.add_axes((left, 0.32, 0.3, 0.6))
            if what == "answer":
                answer_on(axis, t, i, diff)
            else:
                grid_on(axis, (t.question if what == "query" or t.target is None else t.target) + FIRST_COLOUR, what)
        curves_on(figure.add_axes((0.08, 0.11, 0.84, 0.16)), t, i + 1)
        figure.set_dpi(dpi)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64))
    try:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[400] * (len(frames) - 1) + [2500], loop=0)
    except (OSError, ValueError) as e:
        raise UserError(f"--output {path}: cannot be written: {e}") from None
    return len(frames)


def blocks(t: Timeline, diff: bool = True) -> Any:
    """The steps as colour blocks for a terminal: a wrong cell shows x, one that changed !, one of no grid a dot."""
    from rich.text import Text

    text = Text()
    for i, step in enumerate(t.steps):
        state, changed = marks(t, i)
        text.append(f"step {step.number:.3g}  q {step.q:.2f}  entropy {step.entropy:.2f} bits\n")
        for r, row in enumerate(step.tokens.tolist()):
            for c, token in enumerate(row):
                sign = ("x" if state[r, c] < 0 else " ") + ("!" if diff and changed[r, c] else " ")
                if token >= FIRST_COLOUR:
                    text.append(
                        sign, style=f"{'black' if token - FIRST_COLOUR in (4, 8) else 'white'} on {PALETTE[token - FIRST_COLOUR]}"
                    )
                else:
                    text.append(sign if sign.strip() else ("| " if token == EOS else ". "), style="dim")
            text.append("\n")
    return text
