"""Watching a model think: the answer after every ACT step, drawn as a picture, an animation or blocks in a terminal.

Every picture is made from a `Timeline`; nothing is computed while drawing.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from . import checkpoint, data, etrm, score, solve, sources, train
from .config import Config, UserError
from .data import EOS, FIRST_COLOUR, PAD, PALETTE, Task, parsed, tokenise
from .encoders import encoder_of, reads_demos
from .etrm import Params, fresh_carry, tree_map

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
            raise UserError(
                f"task {task.name}: has {len(task.demos)} demos, so --pair-index {demo} cannot be asked from the others"
            )
        x, y = task.demos[demo]
        return Task(task.name, [p for i, p in enumerate(task.demos) if i != demo], [(x, None)]), y
    if not 0 <= query < len(task.queries):
        raise UserError(
            f"task {task.name}: has {len(task.queries)} queries, so there is no --query {query}"
        )
    x, known = task.queries[query]
    return Task(task.name, task.demos, [(x, None)]), known


def watched(
    params: Params,
    cfg: Config,
    batch: data.Batch,
    sizes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    cycles: bool,
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
            steps[i].append(
                Step(tokens, grid, float(out.q_halt[i].sigmoid()), float(here.mean()), step * each)
            )

    once = encode._replace(recur=recur) if encode.recur else encode
    etrm.think(params, model, once, batch, dtype, round(cfg.model.halt_max_steps / each), look=look)
    return steps


def timelines(
    params: Params,
    cfg: Config,
    asked: Sequence[tuple[Task, np.ndarray | None]],
    cycles: bool = False,
) -> list[Timeline | None]:
    """The answer after every ACT step (`cycles`: after every H cycle) to tasks as they are, each with one query and, apart
    from it, its output, as `asked_pair` gives them; None for a task that has no canvas."""
    device, dtype = train.hardware(cfg)
    packed, cast = (
        data.pack([task for task, _ in asked], device),
        tree_map(lambda x: x.to(device, dtype), params),
    )
    queries, made = data.queries(packed, "test", cfg.data), dict[int, list[Step]]()
    for part in train.portions(queries, cfg.model, train.EVAL_TOKENS):
        batch = data.batch(
            packed,
            data.posed(packed, cfg.data, "test", data.chosen(queries, part)),
            cfg.model.raster,
        )
        steps = watched(cast, cfg, batch, queries.canvas[part].tolist(), dtype, cycles)
        made |= zip(queries.task[part].tolist(), steps, strict=True)
    return [
        Timeline(t, t.queries[0][0], y, made[i]) if i in made else None
        for i, (t, y) in enumerate(asked)
    ]


def timeline(
    params: Params,
    cfg: Config,
    task: Task,
    query: int = 0,
    demo: int | None = None,
    cycles: bool = False,
) -> Timeline:
    """The one of a query of a task, or of a demo asked from the others. Raises UserError where there is no such pair or canvas."""
    (found,) = timelines(params, cfg, [asked_pair(task, query, demo)], cycles)
    if found is None:
        raise UserError(
            f"task {task.name}: needs a canvas larger than any the model was trained on"
        )
    return found


def find_task(chosen: Sequence[str], name: str | None) -> Task:
    """The task of that id among the sources, or their only one. Raises UserError naming the nearest ids."""
    tasks: dict[str, Task] = {}
    for source in sorted(
        chosen, key=lambda s: s.startswith("composed")
    ):  # what takes long comes last
        tasks |= {t.name: t for t in sources.load([source])}
        if name in tasks:
            return tasks[name]
    if name is None and len(tasks) == 1:
        return next(iter(tasks.values()))
    if name is None:
        raise UserError(
            f"--task: which of the {len(tasks)} tasks of {', '.join(chosen)}? For instance {min(tasks)}"
        )
    close = ", ".join(difflib.get_close_matches(name or "", tasks, cutoff=0))
    raise UserError(
        f"--task {name}: not among the {len(tasks)} tasks of {', '.join(chosen)}; the nearest: {close}"
    )


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
    axis.imshow(
        tokens,
        cmap=ListedColormap([BLANK, "#D8D8D8", *PALETTE]),
        vmin=0,
        vmax=11,
        interpolation="nearest",
    )
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
        outline = Outline(
            (cells[:, None, ::-1] + corners).reshape(-1, 2), [1, 2, 2, 2, 79] * len(cells)
        )
        axis.add_patch(
            PathPatch(
                outline,
                facecolor="none",
                edgecolor=colour,
                linewidth=width,
                antialiased=False,
                joinstyle="miter",
            )
        )


def answer_on(axis: Any, t: Timeline, i: int, diff: bool) -> None:
    """One step: green borders for right cells, red for wrong ones, a yellow mark within for what changed."""
    step = t.steps[i]
    number = f"{step.number:.3g}"
    grid_on(axis, step.tokens, f"step {number}, q {step.q:.2f}")
    box = axis.get_position()
    fig_w, fig_h = axis.figure.get_size_inches()
    cell = 72 * min(
        box.width * fig_w / step.tokens.shape[1], box.height * fig_h / step.tokens.shape[0]
    )  # in points
    width = max(0.6, 0.09 * cell)
    state, changed = marks(t, i)
    frames = [
        (state == 1, RIGHT, 0.07),
        (state == -1, WRONG, 0.07),
        (changed & diff, CHANGED, 0.28),
    ]
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
        return figure.add_axes(
            (left / width, 1 - (top + high) / height, wide / width, high / height)
        )

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
    figure.text(
        0.5, 0.05 / height, caption, fontsize=6, color="#666666", ha="center", parse_math=False
    )
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
        raise UserError(
            f"--output {path}: cannot be written: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}"
        ) from None


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
                grid_on(
                    axis,
                    (t.question if what == "query" or t.target is None else t.target)
                    + FIRST_COLOUR,
                    what,
                )
        curves_on(figure.add_axes((0.08, 0.11, 0.84, 0.16)), t, i + 1)
        figure.set_dpi(dpi)
        figure.canvas.draw()
        frames.append(
            Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64)
        )
    try:
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            duration=[400] * (len(frames) - 1) + [2500],
            loop=0,
        )
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
                        sign,
                        style=f"{'black' if token - FIRST_COLOUR in (4, 8) else 'white'} on {PALETTE[token - FIRST_COLOUR]}",
                    )
                else:
                    text.append(
                        sign if sign.strip() else ("| " if token == EOS else ". "), style="dim"
                    )
            text.append("\n")
    return text


# ---------------------------------------------------------------- report


Row = dict[str, Any]  # a line of metrics.jsonl


class Run(NamedTuple):
    folder: Path
    about: dict[str, Any]  # run.json
    rows: list[Row]
    own: str  # the evaluation that decides what is best, e.g. "dev/ema/own"
    guard: str = ""  # see checkpoint.warned


def opened(folder: str | Path) -> Run:
    """What a run folder says of itself; a last row cut off by a kill is left out. Raises UserError where it is no run."""
    folder = Path(folder)
    about = sources.read_json(folder / "run.json")
    try:
        watched = about["config"]["eval"]
        own, guard = f"{watched['on']}/{watched['weights'][0]}/own", checkpoint.warned(about)
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except (KeyError, TypeError, IndexError, msgspec.ValidationError) as e:
        raise UserError(f"{folder / 'run.json'}: no run of ours: {e!r}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{folder / 'metrics.jsonl'}: {getattr(e, 'strerror', None) or e}"
        ) from None
    rows = []
    for n, line in enumerate(text.split("\n")[:-1], 1):
        try:
            rows.append({"step": 0} | parsed(line))
        except (ValueError, TypeError):
            raise UserError(f"{folder / 'metrics.jsonl'}: line {n}: broken JSON") from None
    return Run(folder, about, rows, own, guard)


def flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A config as {"train.steps": 2000, ...}."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= (
            flat(value, f"{path}{key}.")
            if isinstance(value, dict) and value
            else {f"{path}{key}": value}
        )
    return found


# ---------------------------------------------------------------- known failures


class Mark(NamedTuple):
    kind: str
    first: int  # step
    last: int | None  # first step at which it was over; None: it lasts
    why: str

    def __str__(self) -> str:
        return f"{self.kind} from step {self.first}{'' if self.last is None else f' to {self.last}'}: {self.why}"


Said = Iterable[tuple[int, bool]]  # (step, whether this row is bad), of the rows that say anything


def alike(run: Run) -> Said:
    """Variance over slots below 1 % of the contexts' mean square; encoders begin at 20 to 40 %."""
    across, mean, std = (f"encoder/context_{k}" for k in ("var_across", "mean", "std"))
    return [
        (r["step"], r[across] < 0.01 * (r[mean] ** 2 + r[std] ** 2))
        for r in run.rows
        if {across, mean, std} <= r.keys()
    ]


def unused(run: Run) -> Said:
    """Another task's demos serve as well as the task's own: less than 1 % between the losses."""
    own, foreign = f"{run.own}/loss", f"{run.own.removesuffix('own')}foreign/loss"
    return [(r["step"], r[foreign] < 1.01 * r[own]) for r in run.rows if {own, foreign} <= r.keys()]


def silent(run: Run) -> Said:
    """A KL below 0.01 nats carries less than 0.015 bits of the demos."""
    return [(r["step"], r["all/kl"] < 0.01) for r in run.rows if "all/kl" in r]


def starved(run: Run) -> Said:
    """Encoder's gradient below 1 % of the core's; encoders begin at 4 to 10 %, one that is used has a third."""
    return [
        (r["step"], not r["encoder/grad_ratio"] >= 0.01)
        for r in run.rows
        if "encoder/grad_ratio" in r
    ]


def rising(run: Run) -> Said:
    """The median loss of five rows lies by half above the lowest such median before it (and by 0.1: none is at zero)."""
    seen = [
        (r["step"], r["all/lm_loss"])
        for r in run.rows
        if math.isfinite(r.get("all/lm_loss", math.nan))
    ]
    lowest = math.inf
    for i in range(4, len(seen)):
        now = median(loss for _, loss in seen[i - 4 : i + 1])
        yield seen[i][0], now > 1.5 * lowest + 0.1
        lowest = min(lowest, now)


def infinite(run: Run) -> Said:
    """A loss or gradient that is not finite, or a step skipped for one since the row before."""
    skipped = 0
    for r in run.rows:
        if "all/lm_loss" in r or "grad_norm" in r:
            before, skipped = skipped, r.get("skipped_steps", 0)
            yield (
                r["step"],
                skipped > before
                or not all(math.isfinite(r.get(k, 0.0)) for k in ("all/lm_loss", "grad_norm")),
            )


RULES: tuple[
    tuple[str, Callable[[Run], Said], int, str], ...
] = (  # kind, rule, rows on end that it takes, in words
    (
        "collapse",
        alike,
        3,
        "contexts of different tasks are alike: they differ by less than 1 % of their mean square",
    ),
    (
        "collapse",
        unused,
        3,
        "another task's demos serve as well as the task's own: the demos are not used",
    ),
    ("collapse", silent, 3, "KL below 0.01 nats: the latent says nothing of the demos"),
    ("starvation", starved, 3, "the encoder's gradient is below 1 % of the core's"),
    ("divergence", rising, 1, "the loss rose by half above its lowest (medians of five rows)"),
    ("divergence", infinite, 1, "a loss or gradient was not finite"),
)


def spans(said: Said, least: int) -> list[tuple[int, int | None]]:
    """Stretches of at least so many bad rows on end: step of the first one, and of the first good one after it, if any."""
    found: list[tuple[int, int | None]] = []
    stretch: list[int] = []
    for step, bad in said:
        if bad:
            stretch.append(step)
            continue
        found += [(stretch[0], step)] if len(stretch) >= least else []
        stretch = []
    return found + ([(stretch[0], None)] if len(stretch) >= least else [])


def failure_marks(run: Run) -> list[Mark]:
    return [
        Mark(kind, *span, why)
        for kind, rule, least, why in RULES
        for span in spans(rule(run), least)
    ]


def clear(run: Run) -> str:
    """What there is no sign of, and what the run's rows say nothing of."""
    kinds, bad = dict.fromkeys(kind for kind, *_ in RULES), {m.kind for m in failure_marks(run)}
    seen = {kind for kind, rule, _, _ in RULES if list(rule(run))}
    said = [
        f"No sign of {k}." if k in seen else f"The rows say nothing of {k}."
        for k in kinds
        if k not in bad
    ]
    return " ".join(said)


# ---------------------------------------------------------------- curves


BOTH = "(own|foreign)"
PANELS: tuple[
    tuple[str, str, bool], ...
] = (  # title, pattern of the keys of metrics.jsonl, logarithmic
    ("loss", rf"all/lm_loss|.*/{BOTH}/loss", False),
    ("cell accuracy", rf"all/cell_accuracy|.*/{BOTH}/cell_accuracy", False),
    ("exact match", rf"all/exact|.*/{BOTH}/exact", False),
    ("halting: ACT steps", "halted/steps", False),
    ("halting head: right, loss, explored", "all/(q_right|q_loss|explored)", False),
    ("samples/s", "samples_per_s", False),
    ("gradient norms", "grad_norm|(encoder|core)/grad_norm", True),
    ("encoder / core gradient", "encoder/grad_ratio", True),
    ("context variance: across tasks, within", "encoder/context_var_.*", True),
    ("context mean and std", "encoder/context_(mean|std)", False),
    ("KL (nats)", "all/kl", True),
    ("learning rate", "lr", False),
)
POINTS = 600  # of a curve; beyond that, means of rows on end


class Curve(NamedTuple):
    name: str
    x: list[int]
    y: list[float | None]  # None: not finite


def curve(rows: Sequence[Row], key: str) -> Curve:
    found = [(r["step"], float(r[key])) for r in rows if isinstance(r.get(key), (int, float))]
    size = math.ceil(len(found) / POINTS)
    parts = [found[i : i + size] for i in range(0, len(found), size or 1)]
    means = [
        math.fsum(y for _, y in part) / len(part)
        if all(math.isfinite(y) for _, y in part)
        else None
        for part in parts
    ]
    return Curve(
        key,
        [part[-1][0] for part in parts],
        [None if m is None else float(f"{m:.5g}") for m in means],
    )


def curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The panels that have anything to show."""
    keys = list(dict.fromkeys(k for r in rows for k in r))
    found = [
        (title, log, [curve(rows, k) for k in keys if re.fullmatch(pattern, k)])
        for title, pattern, log in PANELS
    ]
    return [
        {"title": title, "log": log, "series": [c._asdict() for c in series]}
        for title, log, series in found
        if series
    ]


# ---------------------------------------------------------------- answers


def status(place: int | None) -> str:
    """Of a query, by the place of the right answer among its votes (0: not there; None: not known)."""
    return (
        "output hidden"
        if place is None
        else {0: "unsolved", 1: "solved at 1", 2: "solved at 2"}.get(place, "solved by some view")
    )


def entry(task: Task, p: score.Prediction, line: Sequence[Step]) -> dict[str, Any]:
    """One query of the gallery: what was voted for, and how the answer formed (the task as it is, nothing adapted)."""
    x, y = task.queries[p.query]
    place = None if y is None else score.judge(task, p, y).place
    ranked = [
        {
            "grid": score.grid_text(a.grid),
            "votes": a.votes,
            "share": round(a.share, 4),
            "q": round(a.q, 4),
            "right": n == place,
        }
        for n, a in enumerate(score.rank(p.votes), 1)
        if n <= 8 or n == place
    ]
    steps = []
    for s in line:
        said = {
            "n": s.number,
            "q": round(s.q, 4),
            "entropy": round(s.entropy, 4),
            "tokens": score.canvas_text(s.tokens),
        }
        steps.append(said | {"whole": s.grid is not None})
    found = {
        "task": task.name,
        "query": p.query,
        "status": status(place),
        "votes": len(p.votes),
        "too_large": p.too_large,
    }
    return found | {
        "input": score.grid_text(x),
        "target": score.grid_text(y),
        "answers": ranked,
        "steps": steps,
    }


def voters(solver: solve.Solver, made: Sequence[score.Prediction]) -> str:
    """Whose votes are shown: this checkpoint's where there are any, else those that were cast last."""
    return solver.source if any(p.source == solver.source for p in made) else made[-1].source


def gallery(
    solver: solve.Solver, file: Path, known: dict[str, list[Task]]
) -> tuple[list[dict[str, Any]], str]:
    """(entries of the queries that stand in predictions.jsonl, what is to be said of them)."""
    if not file.exists():
        return [], f"no gallery: {file.name} is absent (etrm eval makes it)"
    made = score.read(file)
    if not made:
        return [], f"no gallery: {file.name} is empty"
    who = voters(solver, made)
    tasks = [t for ts in known.values() for t in ts]
    own = [p for p in made if p.source == who]
    here = [p for p in score.joined(tasks, own) if p.votes or p.too_large]
    if not here:
        return (
            [],
            f"no gallery: no task of {', '.join(known) or 'a dev split'} stands in {file.name}; name their source with --data",
        )
    of = {t.name: t for t in tasks}
    asking = [asked_pair(of[p.task], p.query, None) for p in here]
    table = (
        solver.cfg.model.encoder.kind == "table"
    )  # says nothing of a task that is shown as it is
    lines = [None] * len(here) if table else timelines(solver.params, solver.cfg, asking)
    found = [
        entry(of[p.task], p, line.steps if line else ())
        for p, line in zip(here, lines, strict=True)
    ]
    cast = f"votes of {who}{'' if who == solver.source else ' (not these weights, or adapted)'}"
    others = len({p.source for p in made}) - 1
    asked = {p.task for p in here}
    if not any(y is not None for name in asked for _, y in of[name].queries):
        return found, f"{cast}; no output is known"
    scored = solve.judged(
        [solver], {k: [t for t in ts if t.name in asked] for k, ts in known.items()}, here
    )
    held = "held out" if scored["held_out"] else "NOT held out"
    guard, n = checkpoint.warned(solver.meta), scored["n_tasks"]
    shares = ", ".join(f"pass@{k} {score.with_interval(scored[f'pass@{k}'], n)}" for k in (1, 2))
    said = (
        f"{len(asked)} tasks of {', '.join(known)}, {held}{f'; {guard}' if guard else ''}: {shares}"
    )
    return found, f"{said}; {cast}" + (f"; {others} other voters in the file" if others else "")


# ---------------------------------------------------------------- contexts


def contexts(params: Params, cfg: Config, tasks: Sequence[Task]) -> tuple[list[int], np.ndarray]:
    """(tasks that have a canvas (N), (N, T * D) what the encoder says of the demos of each, in its first ACT step)."""
    hidden = [t._replace(queries=[((t.queries or t.demos)[0][0], None)]) for t in tasks]
    device, dtype = train.hardware(cfg)
    encode, packed = encoder_of(cfg.model), data.pack(hidden, device)
    asked, cast = (
        data.queries(packed, "test", cfg.data),
        tree_map(lambda x: x.to(device, dtype), params.encoder),
    )
    rows, found = [], []
    for part in train.portions(asked, cfg.model, train.EVAL_TOKENS):
        batch = data.batch(
            packed,
            data.posed(packed, cfg.data, "test", data.chosen(asked, part)),
            cfg.model.raster,
        )
        with torch.no_grad():
            context = encode.read(cast, batch)
            if encode.recur:
                start = fresh_carry(cfg.model, batch.cells, dtype, device)
                context = encode.recur(cast, context, start.z_E, start.halted)
        rows += asked.task[part].tolist()
        found.append(context.tokens.flatten(1).float().cpu().numpy())
    return rows, np.concatenate(found) if found else np.zeros((0, 2), np.float32)


def plane(x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(N, D) to their two principal components (N, 2), and the share of the variance of each; signs are fixed."""
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(
        x.astype(np.float64) @ x.T.astype(np.float64)
    )  # N x N: D is larger
    values = np.maximum(values, 0)
    at = vectors[:, :-3:-1] * np.sqrt(values[:-3:-1])
    at *= np.where(at[np.abs(at).argmax(0), np.arange(at.shape[1])] < 0, -1, 1)
    return at, (values[:-3:-1] / max(values.sum(), 1e-30)).tolist()


MOST = 300  # tasks in the space of contexts beside those of the gallery


def space(solver: solve.Solver, tasks: Sequence[Task], trained: Sequence[Task]) -> dict[str, Any]:
    """The contexts of tasks, and of the first training tasks beside them, on their principal plane."""
    if not reads_demos(solver.cfg.model):
        return {"points": [], "said": "this system reads no demos: no contexts"}
    every = [*tasks, *trained[:MOST]]
    rows, x = contexts(solver.params, solver.cfg, every)
    if len(rows) < 3:
        return {"points": [], "said": f"{len(rows)} tasks with a canvas: no plane"}
    at, shares = plane(x)
    spread = float(x.var(0).mean() / max(np.square(x).mean(), 1e-30))
    points = [
        {
            "task": every[r].name,
            "held": r < len(tasks),
            "x": float(f"{a:.4g}"),
            "y": float(f"{b:.4g}"),
        }
        for r, (a, b) in zip(rows, at.tolist(), strict=True)
    ]
    said = f"{len(rows)} tasks; the two components hold {shares[0]:.0%} and {shares[1]:.0%} of the variance between tasks,"
    return {"points": points, "said": f"{said} which is {spread:.2%} of the contexts' mean square"}


# ---------------------------------------------------------------- the page


def facts(run: Run) -> str:
    last = run.rows[-1] if run.rows else {}
    said = f"step {last.get('step', 0):,} of {run.about['config']['train']['steps']:,}, {last.get('samples', 0):,} sample-steps"
    said += f", {last.get('seconds', 0) / 60:.0f} min; {run.about.get('tasks', '?')} training tasks, {run.about.get('dtype', '')}"
    return said + (f"; {run.guard}" if run.guard else "")


def page(folder: str | Path, chosen: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that a report shows. chosen: sources of the gallery's tasks, the dev split by default.

    What cannot be shown (no checkpoint yet, no predictions, no training data here) is said instead."""
    run = opened(folder)
    usual = flat(json.loads(msgspec.json.encode(Config())))
    config = [
        [k, json.dumps(v), k in usual and usual[k] == v]
        for k, v in flat(run.about["config"]).items()
    ]
    found: dict[str, Any] = {
        "title": run.folder.resolve().name,
        "facts": facts(run),
        "notes": [],
        "palette": PALETTE,
    }
    found |= {
        "marks": [m._asdict() | {"said": str(m)} for m in failure_marks(run)],
        "clear": clear(run),
        "curves": curves(run.rows),
        "config": config,
    }
    found |= {"gallery": [], "space": {"points": [], "said": ""}, "demos": {}}
    notes = found["notes"]
    try:
        solver = solve.opened(run.folder)
    except UserError as e:
        notes.append(f"neither gallery nor contexts: {e}")
        return found
    found["facts"] += (
        f"; weights {solver.source} ({solver.path.name}, step {solver.meta.get('step', '?')})"
    )
    which = solver.cfg.data
    known = solve.load_by_source(
        tuple(chosen) or which.dev, 0 if chosen else which.max_eval_tasks, hide=False
    )
    found["gallery"], said = gallery(solver, run.folder / "predictions.jsonl", known)
    notes.append(said)
    try:
        trained = sources.prepare(which)[0]
    except UserError as e:
        trained = []
        notes.append(f"training tasks are not among the contexts: {e}")
    tasks = [t for ts in known.values() for t in ts]
    found["space"] = space(solver, tasks, trained)
    drawn = {p["task"] for p in found["space"]["points"]} | {e["task"] for e in found["gallery"]}
    found["demos"] = {
        t.name: [[score.grid_text(g) for g in pair] for pair in t.demos]
        for t in (*trained, *tasks)
        if t.name in drawn
    }
    return found


def html(found: dict[str, Any]) -> str:
    """One file that needs no network: the template with the data in it."""
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    said = (
        msgspec.json.encode(found).decode().replace("<", "\\u003c")
    )  # so that no tag ends in it; what is not finite is null
    return template.replace("{{DATA}}", said)


def report(
    folder: str | Path, output: str = "", chosen: Sequence[str] = ()
) -> tuple[Path, dict[str, Any]]:
    """Write the page; (where, what it shows)."""
    found = page(folder, chosen)
    path = Path(output or Path(folder) / "report.html")
    checkpoint.write_text(path, html(found))
    return path, found


# ---------------------------------------------------------------- runs side by side


def compared(folders: Sequence[str | Path]) -> tuple[list[Run], list[dict[str, Any]]]:
    """Of each run: last and best values with the task's own demos, how much worse another task's demos are, what it took,
    and the config keys in which the runs differ (but for run.dir and what --fast would set)."""
    runs = [opened(f) for f in folders]
    configs = [flat(r.about["config"]) for r in runs]
    keys = [
        k
        for k in dict.fromkeys(k for c in configs for k in c)
        if k != "run.dir" and not k.startswith("fast")
    ]
    changed = [k for k in keys if len({json.dumps(c.get(k)) for c in configs}) > 1]
    table = []
    for run, config in zip(runs, configs, strict=True):
        evaluated = [r for r in run.rows if f"{run.own}/loss" in r]
        end = run.rows[-1] if run.rows else {}
        row: dict[str, Any] = {"run": str(run.folder), "watched": run.own}
        row |= {k: end.get(k, 0) for k in ("step", "samples", "seconds")}
        for name, best in (("loss", min), ("cell_accuracy", max), ("exact", max)):
            values = [r[f"{run.own}/{name}"] for r in evaluated]
            row |= {
                name: values[-1] if values else None,
                f"best_{name}": best(values, default=None),
            }
        row["n"] = n = (evaluated[-1] if evaluated else {}).get(f"{run.own}/n")
        row |= {
            f"{k}95": list(score.wilson(row[k], n)) if n else None for k in ("exact", "best_exact")
        }
        foreign = (evaluated[-1] if evaluated else {}).get(
            f"{run.own.removesuffix('own')}foreign/loss"
        )
        row["foreign_gap"] = None if foreign is None else foreign - row["loss"]
        row["guard"] = run.guard
        row["marks"] = ", ".join(dict.fromkeys(m.kind for m in failure_marks(run)))
        table.append(row | {k: json.dumps(config[k]) if k in config else None for k in changed})
    return runs, table


def plot(runs: Sequence[Run], path: Path, dpi: int = 100) -> int:
    """The curves of several runs overlaid, a colour for each run; how many panels."""
    needs_matplotlib()
    drawn = [{c["title"]: c for c in curves(r.rows)} for r in runs]
    titles = [(title, log) for title, _, log in PANELS if any(title in d for d in drawn)]
    if not titles:
        raise UserError(f"--plot {path}: no run has a row yet")
    rows = math.ceil(len(titles) / 3)
    figure = new_figure(15, 3.2 * rows + 0.3 * len(runs))
    for i, (title, log) in enumerate(titles, 1):
        axis = figure.add_subplot(rows, 3, i)
        names = list(
            dict.fromkeys(s["name"] for d in drawn for s in d.get(title, {"series": []})["series"])
        )
        for k, d in enumerate(drawn):
            for s in d.get(title, {"series": []})["series"]:
                style = ("-", "--", ":", "-.")[names.index(s["name"]) % 4]
                y, dot = [math.nan if v is None else v for v in s["y"]], "." * (len(s["x"]) < 20)
                axis.plot(s["x"], y, style, marker=dot, color=f"C{k}", lw=1, label=s["name"])
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        if log:
            axis.set_yscale("log")
        lines = {line.get_label(): line for line in axis.lines}
        axis.legend([lines[n] for n in names], names, fontsize=6)
    figure.tight_layout(rect=(0, 0.3 * len(runs) / figure.get_figheight(), 1, 1))
    for k, r in enumerate(runs):
        below = (0.1 + 0.25 * (len(runs) - 1 - k)) / figure.get_figheight()
        figure.text(0.02, below, f"— {r.folder}", color=f"C{k}", fontsize=9, parse_math=False)
    save(figure, path, dpi)
    return len(titles)


def columns(table: Sequence[dict[str, Any]]) -> str:
    """The table as text: a line for each value, a column for each run."""

    def said(row: dict[str, Any], key: str) -> str:
        value: Any = row.get(key)
        if f"{key}95" in row:
            return score.with_interval(value, row["n"])
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [
        [key, *(said(row, key) for row in table)]
        for key in table[0]
        if key not in ("exact95", "best_exact95")
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_csv(table: Sequence[dict[str, Any]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    checkpoint.write_text(path, text.getvalue())
