"""Pictures and pages: an answer after every ACT step, the report of a run, runs side by side.

A picture is made from a `Timeline`, a page from a `Run`; nothing is computed while drawing.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from . import checkpoint, data, etrm, score, solve, sources, train
from .config import Config, UserError
from .data import EOS, FIRST_COLOUR, PAD, PALETTE, Task, tokenise
from .encoders import encoder_of, reads_demos
from .etrm import Params, tree_map

# ---------------------------------------------------------------- timelines


class Step(NamedTuple):
    tokens: np.ndarray  # (height, width): the answer and its border; no answer: the whole canvas
    answer: np.ndarray | None
    q: float  # sigmoid of the halting head
    entropy: float  # bits, mean over the cells of `tokens` that are not blank
    number: float  # ACT steps taken; of the argmax-feedback TRM, whose cycles are shown, a fraction


class Timeline(NamedTuple):
    task: Task  # its demos and the one query
    target: np.ndarray | None
    steps: list[Step]


def query_of(task: Task, query: int, demo: int | None = None) -> tuple[Task, np.ndarray | None]:
    """(the task with that one query, its output hidden; that output). demo: the query is this demo,
    from the others. Raises UserError where there is no such pair."""
    pairs, at = (task.queries, query) if demo is None else (task.demos, demo)
    demos = [pair for i, pair in enumerate(task.demos) if i != demo]
    if not (0 <= at < len(pairs) and demos):
        option = f"--query {at}" if demo is None else f"--pair-index {at}"
        size = f"{len(task.demos)} demos and {len(task.queries)} queries, counted from 0"
        raise UserError(f"{option}: task {task.name} has {size}")
    return Task(task.name, demos, [(pairs[at][0], None)]), pairs[at][1]


def batches(cfg: Config, tasks: Sequence[Task]) -> Iterator[tuple[list[int], Any, data.Batch]]:
    """(numbers of tasks, canvases, batch): the first query of every task that has a canvas, or its
    first demo where it has no query."""
    device, _ = train.hardware(cfg)
    hidden = [t._replace(queries=[((t.queries or t.demos)[0][0], None)]) for t in tasks]
    packed = data.pack(hidden, device)
    queries = data.queries(packed, "test", cfg.data)
    for rows in train.portions(queries, cfg.model, train.EVAL_TOKENS):
        episodes = data.posed(packed, cfg.data, "test", data.chosen(queries, rows))
        batch = data.batch(packed, episodes, cfg.model.raster)
        yield queries.task[rows].tolist(), queries.canvas[rows].tolist(), batch


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


def timelines(params: Params, cfg: Config, tasks: Sequence[Task]) -> list[list[Step]]:
    """The answer to each task's first query after every ACT step, unaugmented; [] for a task that
    has no canvas. Of the argmax-feedback TRM: after every cycle, until it is sure."""
    device, dtype = train.hardware(cfg)
    cast = tree_map(lambda x: x.to(device, dtype), params)
    cycles, leave = (cfg.model.H_cycles, "q") if cfg.model.feedback else (1, "never")
    model = msgspec.structs.replace(cfg.model, H_cycles=cfg.model.H_cycles // cycles)
    last = cfg.model.halt_max_steps * cycles
    steps: list[list[Step]] = [[] for _ in tasks]
    outputs: list[tuple[int, Sequence[int], etrm.Output]] = []

    def keep(*output: Any) -> None:
        outputs.append(output)

    for numbers, shapes, batch in batches(cfg, tasks):
        outputs.clear()
        etrm.think(cast, model, encoder_of(model), batch, dtype, last, leave, look=keep)
        for number, slots, out in outputs:
            logits = out.logits.split([batch.cells[slot] for slot in slots])
            for slot, part, q in zip(slots, logits, out.q_halt.sigmoid().tolist(), strict=True):
                step = step_of(cfg, part, shapes[slot], q, number / cycles)
                steps[numbers[slot]].append(step)
    return steps


def timeline(
    params: Params, cfg: Config, task: Task, query: int = 0, demo: int | None = None
) -> Timeline:
    """That of one query, or of one demo. Raises UserError where there is no such pair or canvas."""
    shown, target = query_of(task, query, demo)
    (steps,) = timelines(params, cfg, [shown])
    if not steps:
        raise UserError(f"task {task.name}: needs a canvas larger than any trained on")
    return Timeline(shown, target, steps)


def find_task(places: Sequence[str], name: str | None) -> Task:
    """The task of that id among sources, or the only one. Raises UserError with the nearest id."""
    tasks: dict[str, Task] = {}
    for source in sorted(places, key=lambda s: s.startswith("composed")):  # slow ones last
        tasks |= {t.name: t for t in sources.load([source])}
        if name in tasks:
            return tasks[name]
    if name is None and len(tasks) == 1:
        return next(iter(tasks.values()))
    where = f"the {len(tasks)} tasks of {', '.join(places)}"
    close = difflib.get_close_matches(name or "", tasks, n=1, cutoff=0)[0]
    raise UserError(f"--task {name or ''}: must name one of {where}, for instance {close}")


def marks(t: Timeline, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(1 right, -1 wrong, 0 not judged; whether it changed since the step before) (height, width).

    Judged are the target's cells, a colour in the place of its border, and what an answer has
    beyond: an answer is right where no cell is wrong."""
    tokens = t.steps[i].tokens
    label = np.full(tokens.shape, PAD)
    if t.target is not None:
        h, w = np.minimum(t.target.shape, tokens.shape)
        label = tokenise(t.target[:h, :w], tokens.shape)
    state = np.where(label < FIRST_COLOUR, 0, np.where(tokens == label, 1, -1))
    beyond = label == EOS if t.steps[i].answer is None else label < FIRST_COLOUR
    state[beyond & (tokens >= FIRST_COLOUR) & (t.target is not None)] = -1
    return state, tokens != t.steps[max(i - 1, 0)].tokens


# ---------------------------------------------------------------- pictures

RIGHT, WRONG, CHANGED, DARK, LINE = "#00B050", "#E00000", "#FFE600", "#222222", "#666666"
TOKENS = ("#F4F4F4", "#D8D8D8", *PALETTE)  # blank, end of the grid, the colours
CELL = 32  # pixels


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def painted(tokens: np.ndarray, *masks: tuple[np.ndarray, str, int]) -> np.ndarray:
    """Cells as an image (height * CELL, width * CELL, 3). A mask draws a frame of that colour, so
    many pixels inside its cells, with dark edges, so that green is seen on green."""
    image = np.array([rgb(c) for c in TOKENS], np.uint8)[tokens].repeat(CELL, 0).repeat(CELL, 1)
    y, x = np.indices(image.shape[:2]) % CELL
    depth = np.minimum(np.minimum(x, CELL - 1 - x), np.minimum(y, CELL - 1 - y))
    image[depth == 0] = rgb(LINE)
    for mask, colour, inset in masks:
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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise UserError(f"{path}: cannot be written: {reason}") from None


def picture(t: Timeline, caption: str = "") -> Any:
    """A figure: curves of q and entropy, then panels: demos, query, target, and each step, where
    green frames are right, red wrong, yellow changed."""
    demos, steps = t.task.demos, t.steps
    across = min(8, max(len(steps), len(demos), 4))
    middle = 2 * math.ceil(len(demos) / across)  # row of the query
    rows = middle + 1 + math.ceil(len(steps) / across)
    side = 2.4 if max(steps[0].tokens.shape) > 15 else 1.5  # inches
    figure = new_figure(across * side, rows * (side + 0.2))
    axis = figure.add_subplot(rows, across, (middle * across + 3, middle * across + 4))
    x = [step.number for step in steps]
    axis.plot(x, [step.q for step in steps], ".-", label="q")
    axis.plot(x, [step.entropy for step in steps], ".-", label="entropy (bits)")
    axis.set_xlim(0)
    axis.set_xlabel("ACT steps", fontsize=7)
    axis.legend(fontsize=6)

    def panel(row: int, column: int, image: np.ndarray, title: str) -> None:
        axis = figure.add_subplot(rows, across, row * across + column + 1)
        axis.imshow(image)
        axis.set_axis_off()
        axis.set_title(title, fontsize=8, pad=3, parse_math=False)

    for i, pair in enumerate(demos):
        for k, name in enumerate(("input", "output")):
            image = painted(pair[k] + FIRST_COLOUR)
            panel(2 * (i // across) + k, i % across, image, f"demo {i} {name}")
    panel(middle, 0, painted(t.task.queries[0][0] + FIRST_COLOUR), f"{t.task.name}: query")
    if t.target is not None:
        panel(middle, 1, painted(t.target + FIRST_COLOUR), "target")
    for i, step in enumerate(steps):
        state, changed = marks(t, i)
        frames = (state > 0, RIGHT, 2), (state < 0, WRONG, 2), (changed, CHANGED, 9)
        title = f"step {step.number:.3g}, q {step.q:.2f}"
        panel(middle + 1 + i // across, i % across, painted(step.tokens, *frames), title)
    figure.supxlabel(caption, fontsize=6, color=LINE, parse_math=False)
    return figure


def beside(left: np.ndarray, right: np.ndarray | None) -> Any:
    """Two grids in ARC's colours with an arrow between them, as text for a terminal."""
    from rich.text import Text

    text = Text()
    for r in range(max(len(left), 0 if right is None else len(right))):
        for grid, arrow in ((left, "  ->  " if r == 0 else "      "), (right, "\n")):
            row = grid[r].tolist() if grid is not None and r < len(grid) else []
            for cell in row:
                style = f"{'black' if cell in (4, 8) else 'white'} on {PALETTE[cell]}"
                text.append(f"{cell} ", style=style)
            text.append("  " * (left.shape[1] - len(row)) * (grid is left) + arrow)
    return text


# ---------------------------------------------------------------- a run, its curves and failures

Row = dict[str, float]  # a line of metrics.jsonl: its numbers, NaN for null


class Run(NamedTuple):
    folder: Path
    about: dict[str, Any]  # run.json, and "guard": see checkpoint.warned
    rows: list[Row]
    odd: int  # lines of metrics.jsonl that are no rows
    watched: str  # the evaluation that decides what is best, e.g. "dev/ema"


def row_of(line: str) -> Row | None:
    """The numbers of a line of metrics.jsonl; None where it has no step."""
    try:
        values = {k: math.nan if v is None else v for k, v in data.parsed(line).items()}
        row = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
        return row | {"step": int(row["step"])}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
        return None


def opened(folder: str | Path) -> Run:
    """What a run folder says of itself; a last line that is being written is left out.

    Raises UserError where the folder is no run."""
    folder = Path(folder)
    about = sources.read_json(folder / "run.json")
    try:
        about["guard"] = checkpoint.warned(about)
        watched = f"{about['config']['eval']['on']}/{about['config']['eval']['weights'][0]}"
    except (KeyError, TypeError, IndexError, AttributeError, msgspec.ValidationError) as e:
        raise UserError(f"{folder / 'run.json'}: no run of ours: {e!r}") from None
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    rows = [row_of(line) for line in text.split("\n")[:-1]]
    return Run(folder, about, [r for r in rows if r is not None], rows.count(None), watched)


def flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A config as {"train.steps": 2000, ...}."""
    fields: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and value
        fields |= flat(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return fields


LEAST = {"collapse": 3, "starvation": 3, "divergence": 1}  # bad rows on end that are a failure


def signs_of(run: Run) -> dict[str, list[tuple[float, bool]]]:
    """Failure and reason -> (step, is it bad?) of the rows that can tell."""

    def rows(*keys: str) -> list[list[float]]:
        return [[r[k] for k in ("step", *keys)] for r in run.rows if set(keys) <= r.keys()]

    parts = (f"encoder/context_{k}" for k in ("var_across", "mean", "std"))
    losses = [(step, loss) for step, loss in rows("all/lm_loss") if math.isfinite(loss)]
    medians = [median(x for _, x in losses[i - 4 : i + 1]) for i in range(4, len(losses))]
    lowest = [math.inf, *itertools.accumulate(medians, min)]
    rising = [now > 1.5 * low + 0.1 for now, low in zip(medians, lowest, strict=False)]
    evaluated = rows(f"{run.watched}/own/loss", f"{run.watched}/foreign/loss")
    training = [r for r in run.rows if {"all/lm_loss", "grad_norm"} & r.keys()]
    sums = [(r["step"], r.get("all/lm_loss", 0) + r.get("grad_norm", 0)) for r in training]
    return {
        "collapse: contexts of different tasks differ by less than 1 % of their mean square": [
            (s, across < 0.01 * (mean**2 + std**2)) for s, across, mean, std in rows(*parts)
        ],
        "collapse: another task's demos serve as well as the task's own": [
            (s, foreign < 1.01 * own) for s, own, foreign in evaluated
        ],
        "collapse: KL below 0.01 nats": [(s, kl < 0.01) for s, kl in rows("all/kl")],
        "starvation: the encoder's gradient is below 1 % of the core's": [
            (s, not ratio >= 0.01) for s, ratio in rows("encoder/grad_ratio")
        ],
        "divergence: the loss rose by half above its lowest (medians of five rows)": [
            (step, bad) for (step, _), bad in zip(losses[4:], rising, strict=True)
        ],
        "divergence: a loss or gradient was not finite": [
            (step, not math.isfinite(value)) for step, value in sums
        ],
    }


def failure_marks(run: Run) -> list[dict[str, Any]]:
    """Spans of steps in which a run shows signs of a failure; "last" is None where one lasts."""
    spans = []
    for reason, signs in signs_of(run).items():
        kind, _, why = reason.partition(": ")
        groups = [list(group) for _, group in itertools.groupby(signs, lambda sign: sign[1])]
        for i, group in enumerate(groups):
            (first, bad), last = group[0], groups[i + 1][0][0] if groups[i + 1 :] else None
            if bad and len(group) >= LEAST[kind]:
                text = f"{kind} from step {first}{f' to {last}' if last else ''}: {why}"
                spans.append({"kind": kind, "first": first, "last": last, "text": text})
    return spans


SILENT = {"step", "samples", "seconds", "n", "count"}  # keys that are no curve
POINTS = 600  # of a curve; beyond that, means of neighbouring rows


def curve(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """{"name", "x": steps, "y": values or means of several}."""
    points = [(r["step"], r[key]) for r in rows if key in r]
    size = math.ceil(len(points) / POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    means = [sum(y for _, y in part) / len(part) for part in parts]
    return {"name": key, "x": [p[-1][0] for p in parts], "y": [float(f"{m:.5g}") for m in means]}


def curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A panel for each measure: all/lm_loss is drawn with dev/ema/own/loss."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for key in dict.fromkeys(k for r in rows for k in r):
        measure = key.rpartition("/")[2].removeprefix("lm_")
        measure = f"gap: {measure}" if key.startswith("gap/") else measure
        if measure not in SILENT:
            panels.setdefault(measure, []).append(curve(rows, key))
    return [{"title": title, "series": series} for title, series in panels.items()]


# ---------------------------------------------------------------- the report


def entry(task: Task, p: score.Prediction, steps: Sequence[Step]) -> dict[str, Any]:
    """One query of the gallery: its answers by votes, and how the answer formed, unadapted."""
    (x, y), ranked = task.queries[p.query], score.rank(p.votes)
    want, grids = score.grid_text(y), [score.grid_text(a.grid) for a in ranked]
    place = grids.index(want) + 1 if want in grids else 0
    names = {0: "unsolved", 1: "solved at 1", 2: "solved at 2"}
    status = "output hidden" if y is None else names.get(place, "solved by some view")
    about = {"task": task.name, "query": p.query, "status": status, "votes": len(p.votes)}
    about |= {"input": score.grid_text(x), "target": want, "too_large": p.too_large}
    answers = [
        {"grid": grid, "votes": a.votes, "q": a.q, "right": grid == want}
        for grid, a in zip(grids[: max(8, place)], ranked, strict=False)
    ]
    timeline = []
    for step in steps:
        row = {"n": step.number, "q": step.q, "entropy": step.entropy}
        tokens = score.canvas_text(step.tokens)
        timeline.append(row | {"tokens": tokens, "whole": step.answer is not None})
    return about | {"answers": answers, "steps": timeline}


def gallery(solver: solve.Solver, file: Path, known: dict[str, list[Task]]) -> tuple[list, str]:
    """(the queries in predictions.jsonl, what is to be said of them), with the votes of these
    weights, or else of the last voter."""
    votes = score.read(file) if file.exists() else []
    voters = [p.source for p in votes]
    voter = solver.source if solver.source in voters else voters[-1] if voters else ""
    tasks = {t.name: t for ts in known.values() for t in ts}
    cast = score.joined(list(tasks.values()), [p for p in votes if p.source == voter])
    cast = [p for p in cast if p.votes or p.too_large]
    where = ", ".join(known) or "a dev split"
    if not cast:
        return [], f"no gallery: {file.name} has no vote for a task of {where} (etrm eval, --data)"
    lines: list[list[Step]] = [[] for _ in cast]
    if solver.cfg.model.encoder.kind != "table":  # which has no row of a task as it is
        queries = [query_of(tasks[p.task], p.query)[0] for p in cast]
        lines = timelines(solver.params, solver.cfg, queries)
    entries = [entry(tasks[p.task], p, steps) for p, steps in zip(cast, lines, strict=True)]
    names = {p.task for p in cast}
    asked = {source: [t for t in ts if t.name in names] for source, ts in known.items()}
    scores = score.judged(asked, cast, [solver.pairs], solver.cfg.data.held_out)
    note = f"{len(names)} tasks of {where}, votes of {voter}"
    note += " (not these weights, or adapted)" * (voter != solver.source)
    for key in ("pass@1", "pass@2") if "pass@2" in scores else ():
        note += f"; {key} {score.with_interval(scores[key], scores['n_tasks'])}"
    return entries, note + ("" if scores.get("held_out", True) else "; NOT held out")


def contexts(params: Params, cfg: Config, tasks: Sequence[Task]) -> dict[int, np.ndarray]:
    """Numbers of tasks -> finite contexts (T * D) in the first ACT step."""
    device, dtype = train.hardware(cfg)
    encode, cast = encoder_of(cfg.model), tree_map(lambda x: x.to(device, dtype), params.encoder)
    vectors: dict[int, np.ndarray] = {}
    for numbers, _, batch in batches(cfg, tasks):
        with torch.no_grad():
            context = encode.read(cast, batch)
            if encode.recur:
                start = etrm.fresh_carry(cfg.model, batch.cells, dtype, device)
                context = encode.recur(cast, context, start.z_E, start.halted)
        rows = context.tokens.flatten(1).double().cpu().numpy()
        vectors |= {n: x for n, x in zip(numbers, rows, strict=True) if np.isfinite(x).all()}
    return vectors


def space(vectors: dict[int, np.ndarray], tasks: Sequence[Task]) -> dict[str, Any]:
    """The contexts of tasks on their two principal components."""
    text = f"{len(vectors)} of {len(tasks)} tasks have a canvas and a finite context"
    if len(vectors) < 3:
        return {"points": [], "text": text}
    x = np.stack(list(vectors.values()))
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    shares, spread = s**2 / max((s**2).sum(), 1e-30), x.var(0).mean() / np.square(x).mean()
    text += f"; the two components have {shares[0]:.0%} and {shares[1]:.0%} of their variance"
    points = zip(vectors, (u * s)[:, :2].tolist(), strict=True)
    return {
        "points": [{"task": tasks[n].name, "x": a, "y": b} for n, (a, b) in points],
        "text": f"{text}, which is {spread:.2%} of their mean square",
    }


def page(folder: str | Path, places: Sequence[str] = ()) -> dict[str, Any]:
    """All that a report shows. places: sources of the gallery's tasks, the dev split by default.

    What cannot be shown (no checkpoint yet, no predictions) is said instead."""
    run = opened(folder)
    usual, fields = flat(msgspec.to_builtins(Config())), flat(run.about["config"]).items()
    last = run.rows[-1] if run.rows else {"step": 0}
    facts = f"step {last['step']:,}, {last.get('samples', 0):,.0f} sample-steps"
    facts += f", {last.get('seconds', 0) / 60:.0f} min; {run.about.get('tasks')} training tasks"
    shown: dict[str, Any] = {
        "title": run.folder.resolve().name,
        "facts": f"{facts}; {run.about['guard']}" if run.about["guard"] else facts,
        "notes": [f"{run.odd} lines of metrics.jsonl are no rows"] * (run.odd > 0),
        "palette": PALETTE,
        "marks": failure_marks(run),
        "curves": curves(run.rows),
        "config": [[k, json.dumps(v), k in usual and usual[k] == v] for k, v in fields],
        "gallery": [],
        "space": {"points": [], "text": "no contexts: no weights, or none that read demos"},
        "demos": {},
    }
    try:
        solver = solve.opened(run.folder)
        chosen = solver.cfg.data
        limit = 0 if places else chosen.max_eval_tasks
        known = score.load_by_source(tuple(places) or chosen.dev, limit, hide=False)
        shown["gallery"], note = gallery(solver, run.folder / "predictions.jsonl", known)
    except UserError as e:
        shown["notes"].append(f"neither gallery nor contexts: {e}")
        return shown
    tasks = [t for ts in known.values() for t in ts]
    if reads_demos(solver.cfg.model):
        shown["space"] = space(contexts(solver.params, solver.cfg, tasks), tasks)
    shown["notes"].append(f"{note}; weights {solver.source} of {solver.path.name}")
    demos = {t.name: [[score.grid_text(grid) for grid in pair] for pair in t.demos] for t in tasks}
    return shown | {"demos": demos}


def report(folder: str | Path, output: str, places: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Write the page as one file that needs no network; (where, what it shows)."""
    shown = page(folder, places)
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # no tag ends within the data; a number that is not finite is null
    text = msgspec.json.encode(shown).decode().replace("<", "\\u003c")
    path = Path(output or Path(folder) / "report.html")
    checkpoint.write_text(path, template.replace("{{DATA}}", text))
    return path, shown


# ---------------------------------------------------------------- runs side by side


def compared(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each run: last and best values with the task's own demos, by how much the loss is
    higher with another task's, steps, failures, and the config keys in which they differ."""
    configs = [flat(r.about["config"]) for r in runs]
    keys = dict.fromkeys(k for c in configs for k in c if k != "run.dir")
    differ = [k for k in keys if len({json.dumps(c.get(k)) for c in configs}) > 1]
    table = []
    for run, config in zip(runs, configs, strict=True):
        own = f"{run.watched}/own"
        evaluated = [r for r in run.rows if f"{own}/loss" in r]
        last, end = (evaluated or [{}])[-1], (run.rows or [{}])[-1]
        row: dict[str, Any] = {"run": str(run.folder), "watched": own, "n": last.get(f"{own}/n")}
        row |= {k: end.get(k) for k in ("step", "samples", "seconds")}
        for name, best in (("loss", min), ("cell_accuracy", max), ("exact", max)):
            values = [r.get(f"{own}/{name}", math.nan) for r in evaluated]
            row[name] = values[-1] if values else None
            row[f"best_{name}"] = best(filter(math.isfinite, values), default=None)
        row["gap_own_foreign"] = last.get("gap/own_foreign/loss")
        row["failures"] = ", ".join(dict.fromkeys(m["kind"] for m in failure_marks(run)))
        row["guard"] = run.about["guard"]
        table.append(row | {k: json.dumps(config.get(k)) for k in differ})
    return table


def columns(table: Sequence[dict[str, Any]]) -> list[str]:
    """The table as lines, one for each value, with a column for each run."""

    def cell(row: dict[str, Any], key: str) -> str:
        value = row[key]
        if key in ("exact", "best_exact") and value is not None and row["n"]:
            return score.with_interval(value, int(row["n"]))
        return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = [[key, *(cell(row, key) for row in table)] for key in table[0]]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return ["".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def csv_of(table: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table[0], *(row.values() for row in table)])
    return text.getvalue()


def plotted(runs: Sequence[Run]) -> Any:
    """A figure: the curves of several runs overlaid, a colour for each run."""
    panels: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, run in enumerate(runs):
        for panel in curves(run.rows):
            panels.setdefault(panel["title"], []).extend((number, s) for s in panel["series"])
    figure = new_figure(15, 3.2 * (math.ceil(len(panels) / 3) or 1))
    for i, (title, series) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(math.ceil(len(panels) / 3), 3, i)
        axis.set_title(title, fontsize=9, parse_math=False)
        names = list(dict.fromkeys(s["name"] for _, s in series))
        for number, s in series:
            style = ("-", "--", ":", "-.")[names.index(s["name"]) % 4]
            label = f"{number + 1} {runs[number].folder}: {s['name']}"
            axis.plot(s["x"], s["y"], style, marker=".", ms=2, color=f"C{number}", label=label)
        for text in axis.legend(fontsize=5).get_texts():
            text.set_parse_math(False)
    return figure
