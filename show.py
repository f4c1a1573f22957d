"""Timelines: the answer after every ACT step, as data and as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from . import checkpoint, data, encoders, etrm, optim, solve, sources, train
from .config import Config, DataConfig, UserError, nearest
from .data import EOS, FIRST_COLOUR, PAD, PALETTE, Task, tokenise

# ---------------------------------------------------------------- timelines


class Step(NamedTuple):
    tokens: np.ndarray  # (height, width): the answer and its border; no answer: the whole canvas
    answer: np.ndarray | None
    q: float  # sigmoid of the halting head
    entropy: float  # bits, mean over the cells of `tokens` that are not blank
    number: float  # ACT steps taken; of the argmax-feedback TRM, whose cycles are shown, a fraction
    context: np.ndarray | None = None  # (T * D,) of the first ACT step


class Timeline(NamedTuple):
    task: Task  # its demos and one query
    steps: list[Step]  # none where the query has no canvas


def step_of(cfg: Config, logits: torch.Tensor, shape: Sequence[int], q: float, at: float) -> Step:
    """What the logits (height * width, 12) of one slot say."""
    log_p = etrm.log_prob(cfg.model, logits)
    tokens = log_p.argmax(-1).view(*shape).cpu().numpy()
    bits = torch.special.entr(log_p.exp()).sum(-1).cpu().numpy() / math.log(2)
    answer = data.untokenise(tokens)
    if answer is not None:  # beyond its border nothing is trained or judged
        tokens = tokenise(answer.astype(np.uint8), tokens.shape)
        bits = bits[tokens.flatten() != PAD]
    return Step(tokens, answer, q, float(bits.mean()), at)


def timelines(solver: solve.Solver, tasks: Sequence[Task]) -> list[Timeline]:
    """Of every query of the tasks: the answer after every ACT step; of the argmax-feedback TRM
    after every cycle, until it is sure."""
    cfg, (device, dtype) = solver.cfg, optim.hardware(solver.cfg)
    params = etrm.tree_map(lambda x: x.to(device, dtype), solver.params)
    cycles, leave = (cfg.model.H_cycles, "q") if cfg.model.feedback else (1, "never")
    model = msgspec.structs.replace(cfg.model, H_cycles=cfg.model.H_cycles // cycles)
    encode, last = encoders.encoder_of(model), cfg.model.halt_max_steps * cycles
    shown = [Timeline(t._replace(queries=[pair]), []) for t in tasks for pair in t.queries]
    questions = solve.questions_of(solver.params, cfg, tasks, 1)
    outputs: list[tuple[int, Sequence[int], etrm.Output]] = []
    for portion in train.portions(questions.queries, cfg.model):
        rows, look = portion.tolist(), lambda *output: outputs.append(output)
        posed = solve.pose(questions, cfg, [(row, 0) for row in rows])
        outputs.clear()
        etrm.think(params, model, encode, posed.batch, dtype, last, leave, look)
        for number, slots, out in outputs:
            logits = out.logits.split([posed.batch.cells[slot] for slot in slots])
            for i, slot in enumerate(slots):
                q = float(out.q_halt[i].sigmoid())
                step = step_of(cfg, logits[i], posed.canvas[slot], q, number / cycles)
                if number == 1 and out.context is not None:
                    step = step._replace(context=out.context[i].flatten().double().cpu().numpy())
                shown[rows[slot]].steps.append(step)
    return shown


def timeline(solver: solve.Solver, task: Task, query: int) -> Timeline:
    """That of one query. Raises UserError where there is no such query or no canvas for it."""
    if not 0 <= query < len(task.queries):
        raise UserError(f"--query {query}: {task.name} has {len(task.queries)} queries, from 0")
    shown = timelines(solver, [task])[query]
    if not shown.steps:
        raise UserError(f"task {task.name}: needs a canvas larger than data.max_side")
    return shown


def places(cfg: DataConfig) -> list[str]:
    """The sources of the dev split and of the training set that hold tasks, not generators."""
    named = (*cfg.dev, *cfg.train)
    return [s for s in named if s.partition(":")[0] not in sources.GENERATORS]


def find_task(places: Sequence[str], name: str) -> Task:
    """The task of that id among sources, or the first. Raises UserError with the nearest id."""
    tasks: dict[str, Task] = {}
    for source in places:
        tasks |= {t.name: t for t in sources.load([source])}
        if name in tasks or not name:
            return tasks[name or min(tasks)]
    where = f"one of {len(tasks)} tasks of {', '.join(places)}"
    raise UserError(f"--task {name}: must name {where}{nearest(name, tasks)}")


def marks(t: Timeline, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(1 right, -1 wrong, 0 not judged; whether it changed since the step before) (height, width).
    Judged are the target's cells, a colour on its border, and what an answer has beyond."""
    step, target = t.steps[i], t.task.queries[0][1]
    changed = step.tokens != t.steps[max(i - 1, 0)].tokens
    height, width = step.tokens.shape
    if target is None:
        return np.zeros((height, width), int), changed
    label = tokenise(target[:height, :width], step.tokens.shape)
    coloured, beyond = step.tokens >= FIRST_COLOUR, (label == EOS) | (step.answer is not None)
    judged = (label >= FIRST_COLOUR) | coloured & beyond
    return np.where(judged, np.where(step.tokens == label, 1, -1), 0), changed


# ---------------------------------------------------------------- pictures

RIGHT, WRONG, CHANGED, DARK, LINE = "#00B050", "#E00000", "#FFE600", "#222222", "#666666"
TOKENS = ("#F4F4F4", "#D8D8D8", *PALETTE)  # blank, end of the grid, the colours
CELL = 32  # pixels
Frame = tuple[np.ndarray, str, int]  # cells to be framed, colour, pixels from the cell's edge


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def painted(tokens: np.ndarray, *frames: Frame) -> np.ndarray:
    """Cells as an image (height * CELL, width * CELL, 3); dark edges show green frames on green."""
    image = np.array([rgb(c) for c in TOKENS], np.uint8)[tokens].repeat(CELL, 0).repeat(CELL, 1)
    y, x = np.indices(image.shape[:2]) % CELL
    depth = np.minimum(np.minimum(x, CELL - 1 - x), np.minimum(y, CELL - 1 - y))
    image[depth == 0] = rgb(LINE)
    for mask, colour, inset in frames:
        inner = np.where(mask.repeat(CELL, 0).repeat(CELL, 1), depth - inset, -9)
        image[(inner >= -1) & (inner <= 4)] = rgb(DARK)
        image[(inner >= 0) & (inner <= 3)] = rgb(colour)
    return image


def new_figure(width: float, height: float) -> Any:
    """Inches; it needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'etrm-arc[show]'") from None
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    try:
        figure.savefig(image, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as e:
        raise UserError(f"{path}: cannot be written: {e}") from None
    checkpoint.commit(path, lambda aside: aside.write_bytes(image.getvalue()))


def picture(t: Timeline, caption: str = "") -> Any:
    """A figure: demos and the query above their outputs, then each step with its q and entropy,
    where green frames are right, red wrong, yellow changed."""
    pairs, steps = [*t.task.demos, *t.task.queries], t.steps
    across = max(len(pairs), min(8, len(steps)))
    rows = 2 + math.ceil(len(steps) / across)
    side = 2.4 if max(steps[0].tokens.shape) > 15 else 1.5  # inches
    figure = new_figure(across * side, rows * (side + 0.2))

    def panel(row: int, column: int, title: str, tokens: np.ndarray, *frames: Frame) -> None:
        axis = figure.add_subplot(rows, across, row * across + column + 1)
        axis.imshow(painted(tokens, *frames))
        axis.set_axis_off()
        axis.set_title(title, fontsize=8, pad=3, parse_math=False)

    for i, (x, y) in enumerate(pairs):
        name = f"demo {i}" if i < len(t.task.demos) else t.task.name
        panel(0, i, f"{name}: input", x + FIRST_COLOUR)
        if y is not None:
            panel(1, i, f"{name}: output", y + FIRST_COLOUR)
    for i, step in enumerate(steps):
        state, changed = marks(t, i)
        frames = (state > 0, RIGHT, 2), (state < 0, WRONG, 2), (changed, CHANGED, 9)
        title = f"step {step.number:.3g}, q {step.q:.2f}, {step.entropy:.2f} bits"
        panel(2 + i // across, i % across, title, step.tokens, *frames)
    figure.supxlabel(caption, fontsize=6, color=LINE, parse_math=False)
    return figure


def beside(left: np.ndarray, right: np.ndarray | None) -> Any:
    """Two grids in ARC's colours with an arrow between them, as text for a terminal."""
    from rich.text import Text

    text, right = Text(), left[:0] if right is None else right
    for r in range(max(len(left), len(right))):
        for grid, gap in ((left, "      " if r else "  ->  "), (right, "\n")):
            for cell in grid[r].tolist() if r < len(grid) else ():
                style = f"{'black' if cell in (4, 8) else 'white'} on {PALETTE[cell]}"
                text.append(f"{cell} ", style=style)
            text.append(gap if r < len(grid) else "  " * grid.shape[1] + gap)
    return text
