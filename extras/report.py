"""What runs left: curves, signs of failure, one HTML page per run, runs side by side. The commands
`report` and `runs` load it by name."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np

from .. import checkpoint, data, etrm, score, show, solve, sources
from ..config import Config, DataConfig, UserError
from ..data import PALETTE, Task

# ---------------------------------------------------------------- a run, its curves and failures


class Run(NamedTuple):
    folder: Path
    about: dict[str, Any]  # run.json, and "guard": see checkpoint.warned
    rows: list[dict[str, float]]  # of metrics.jsonl; NaN for null
    watched: str  # the evaluation that decides what is best, e.g. "dev/ema"


def opened(folder: str | Path) -> Run:
    """What a run folder says of itself. Raises UserError where it is no run."""
    folder = Path(folder)
    about = sources.read_json(folder / "run.json")
    try:
        str(folder).encode()  # a name in other bytes stands in no page
        about["guard"] = checkpoint.warned(about)
        watched = f"{about['config']['eval']['on']}/{about['config']['eval']['weights'][0]}"
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise UserError(f"{folder / 'run.json'}: no run of ours: {e!r}") from None
    lines, _ = checkpoint.rows_of(folder / "metrics.jsonl")
    rows = [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]
    return Run(folder, about, rows, watched)


def flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A config as {"train.steps": 2000, ...}."""
    fields: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and value
        fields |= flat(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return fields


LEAST = 3  # rows on end with the sign of a failure


def failure_marks(run: Run) -> list[dict[str, Any]]:
    """Spans of steps in which a run shows signs of a failure."""

    def rows(*keys: str) -> list[list[float]]:
        return [[r[k] for k in ("step", *keys)] for r in run.rows if set(keys) <= r.keys()]

    contexts = rows("encoder/context_var_across", "encoder/context_var_within")
    evaluated = rows(f"{run.watched}/own/loss", f"{run.watched}/foreign/loss")
    losses = [(step, loss) for step, loss in rows("all/lm_loss") if math.isfinite(loss)]
    medians = [median(x for _, x in losses[i - 4 : i + 1]) for i in range(4, len(losses))]
    recent = zip(losses[4:], medians, itertools.accumulate(medians, min), strict=True)
    signs = {
        "collapse: contexts vary over slots by less than 1 % of what they vary over tokens": [
            (step, across < 0.01 * within) for step, across, within in contexts
        ],
        "collapse: another task's demos serve as well as the task's own": [
            (step, foreign < 1.01 * own) for step, own, foreign in evaluated
        ],
        "collapse: KL below 0.01 nats": [(step, kl < 0.01) for step, kl in rows("all/kl")],
        "starvation: the encoder's gradient is below 1 % of the core's": [
            (step, ratio < 0.01) for step, ratio in rows("encoder/grad_ratio")
        ],
        "divergence: the loss rose by half above its lowest (medians of five rows)": [
            (step, now > 1.5 * low + 0.1) for (step, _), now, low in recent
        ],
    }
    spans = []
    for reason, points in signs.items():
        kind, _, why = reason.partition(": ")
        for bad, group in itertools.groupby(points, lambda point: point[1]):
            steps = [step for step, _ in group]
            if bad and len(steps) >= LEAST:
                text = f"{kind} from step {steps[0]} to {steps[-1]}: {why}"
                spans.append({"kind": kind, "first": steps[0], "last": steps[-1], "text": text})
    return spans


SILENT = {"step", "samples", "seconds", "n", "count"}  # keys that are no curve
POINTS = 600  # about the most of a curve


def curves(rows: Sequence[dict[str, float]]) -> dict[str, list[dict[str, Any]]]:
    """A panel for each measure: title -> curves {"name", "x": steps, "y": values}; all/lm_loss is
    drawn with dev/ema/own/loss. Of a long curve every n-th point."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for key in dict.fromkeys(k for r in rows for k in r):
        measure = key.rpartition("/")[2].removeprefix("lm_")
        if measure not in SILENT:
            points = [(r["step"], r[key]) for r in rows if key in r]
            x, y = zip(*points[:: len(points) // POINTS + 1], strict=True)
            title = f"gap: {measure}" if key.startswith("gap/") else measure
            panels.setdefault(title, []).append({"name": key, "x": x, "y": y})
    return panels


# ---------------------------------------------------------------- the report


def entry(p: score.Prediction, t: show.Timeline) -> dict[str, Any]:
    """One query of the gallery: its answers by votes, and how the answer formed, unadapted."""
    (x, y), ranked = t.task.queries[0], score.rank(p.votes)
    right = [y is not None and np.array_equal(a.grid, y) for a in ranked]
    names = ("solved at 1", "solved at 2", "solved by some view")
    solved = names[min(right.index(True), 2)] if any(right) else "unsolved"
    status = "output hidden" if y is None else solved
    about = {"task": p.task, "query": p.query, "status": status, "votes": len(p.votes)}
    about |= {"input": score.grid_text(x), "target": score.grid_text(y)}
    answers = [{"grid": score.grid_text(a.grid), "votes": a.votes, "q": a.q} for a in ranked[:8]]
    steps = []
    for s in t.steps:
        row = {"n": s.number, "q": s.q, "entropy": s.entropy, "whole": s.answer is not None}
        steps.append(row | {"tokens": score.canvas_text(s.tokens)})
    return about | {"answers": answers, "steps": steps}


def plane(contexts: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The finite contexts of tasks on their two principal components; of fewer than three none."""
    names = [name for name, x in contexts.items() if np.isfinite(x).all()]
    if len(names) < 3:
        return []
    x = np.stack([contexts[name] for name in names])
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    places = zip(names, (u * s)[:, :2].tolist(), strict=True)
    return [{"task": name, "x": a, "y": b} for name, (a, b) in places]


def embedded(contexts: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """`plane` by method: the principal components and, where scikit-learn is installed, t-SNE."""
    planes = {"PCA": plane(contexts)}
    names = [p["task"] for p in planes["PCA"]]
    with contextlib.suppress(ImportError):
        how = importlib.import_module("sklearn.manifold").TSNE
        tsne = how(perplexity=min(30.0, (len(names) - 1) / 3), init="pca", random_state=0)
        if names:
            places = tsne.fit_transform(np.stack([contexts[name] for name in names])).tolist()
            pairs = zip(names, places, strict=True)
            planes["t-SNE"] = [{"task": name, "x": a, "y": b} for name, (a, b) in pairs]
    return planes


def contexts_of(shown: Sequence[show.Timeline]) -> dict[str, np.ndarray]:
    """Task -> its context, where the encoder gives one."""
    first = {t.task.name: t.steps[0].context for t in shown if t.steps}
    return {name: x for name, x in first.items() if x is not None}


def asked_by(
    folder: Path, places: Sequence[str] = ()
) -> tuple[solve.Solver, list[str], list[Task]]:
    """A run's solver, and what to ask it: tasks of the sources, by default of the dev split."""
    solver = solve.opened(folder)
    chosen = solver.cfg.data
    known = score.load_by_source(places or chosen.dev, 0 if places else chosen.max_eval_tasks)
    if not (tasks := [t for ts in known.values() for t in ts if t.queries]):
        raise UserError("trained without a dev split; name tasks with --data")
    return solver, list(known), tasks


def gallery(folder: Path, places: Sequence[str]) -> dict[str, Any]:
    """What the weights make of tasks (the dev split by default), and the queries of them that are
    in predictions.jsonl, with the votes of these weights, or else of the last voter."""
    (solver, sources, tasks), file = asked_by(folder, places), folder / "predictions.jsonl"
    lines = score.read(file) if file.exists() else []
    voters = [p.source for p in lines]
    voter = solver.source if solver.source in voters else "".join(voters[-1:])
    votes = score.joined(tasks, [p for p in lines if p.source == voter])
    shown = show.timelines(solver, tasks)
    asked = zip(votes, shown, strict=True)
    entries = [entry(p, t) for p, t in asked if p.votes]
    note = f"{len(entries)} queries of {', '.join(sources)} have votes of {voter or 'any solver'}"
    note += " (not these weights, or adapted)" if voter not in ("", solver.source) else ""
    note += "" if score.held_out(solver.pairs, tasks) else "; NOT held out"
    return {
        "note": f"{note}; weights {solver.source} of {solver.path.name}",
        "gallery": entries,
        "space": plane(contexts_of(shown)),
        "demos": {t.name: [list(map(score.grid_text, pair)) for pair in t.demos] for t in tasks},
    }


def page(folder: str | Path, places: Sequence[str] = ()) -> dict[str, Any]:
    """All that a report shows; of a run without a checkpoint there are only curves."""
    run = opened(folder)
    usual, fields = flat(msgspec.to_builtins(Config())), flat(run.about["config"])
    last = run.rows[-1] if run.rows else {}
    facts = [f"{k} {last[k]:,.0f}" for k in ("step", "samples", "seconds") if k in last]
    try:
        solved = gallery(run.folder, places)
    except UserError as e:
        note = f"neither gallery nor contexts: {e}"
        solved = {"note": note, "gallery": [], "space": [], "demos": {}}
    return solved | {
        "title": run.folder.resolve().name,
        "facts": f"{', '.join(facts)}; {run.about['guard']}".rstrip("; "),
        "palette": PALETTE,
        "marks": failure_marks(run),
        "curves": curves(run.rows),
        "config": [[k, json.dumps(v), usual.get(k, ...) == v] for k, v in fields.items()],
    }


def report(folder: str | Path, places: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Write the page as one file that needs no network; (where, what it shows)."""
    if places:
        sources.load(places)  # a mistake there is the user's
    shown, path = page(folder, places), Path(folder) / "report.html"
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # no tag ends within the data; a number that is not finite is null
    text = msgspec.json.encode(shown).decode().replace("<", "\\u003c")
    checkpoint.write_text(path, template.replace("{{DATA}}", text))
    return path, shown


# ---------------------------------------------------------------- runs side by side


def compared(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each run: last values and lowest loss with the task's own demos, by how much the
    loss is higher with another task's, failures, and the config keys in which the runs differ."""
    configs = [flat(r.about["config"]) for r in runs]
    keys = dict.fromkeys(k for c in configs for k in c if k != "run.dir")
    differ = [k for k in keys if len({json.dumps(c.get(k)) for c in configs}) > 1]
    table = []
    for run, config in zip(runs, configs, strict=True):
        own = f"{run.watched}/own"
        evaluated = [r for r in run.rows if f"{own}/loss" in r]
        losses = [r[f"{own}/loss"] for r in evaluated if math.isfinite(r[f"{own}/loss"])]
        last, end = (evaluated or [{}])[-1], (run.rows or [{}])[-1]
        row: dict[str, Any] = {"run": str(run.folder)}
        row |= {k: end.get(k) for k in ("step", "samples", "seconds")}
        row |= {k: last.get(f"{own}/{k}") for k in ("n", "loss", "cell_accuracy", "exact")}
        row["best_loss"] = min(losses, default=None)
        row["gap_own_foreign"] = last.get("gap/own_foreign/loss")
        row["failures"] = ", ".join(dict.fromkeys(m["kind"] for m in failure_marks(run)))
        row["guard"] = run.about["guard"]
        table.append(row | {k: json.dumps(config.get(k)) for k in differ})
    return table


def columns(table: Sequence[dict[str, Any]]) -> list[str]:
    """The table as lines, one for each value, with a column for each run."""

    def cell(row: dict[str, Any], key: str) -> str:
        value = row[key]
        if key == "exact" and value is not None and 0 <= value <= 1 <= (row["n"] or 0):
            return score.with_interval(value, int(row["n"]))
        return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    lines = [[key, *(cell(row, key) for row in table)] for key in table[0]]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return ["".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def dev_contexts(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The contexts of the run's dev tasks, `embedded`; {} where its checkpoint shows none."""
    try:
        solver, _, tasks = asked_by(run.folder)
        return {k: x for k, x in embedded(contexts_of(show.timelines(solver, tasks))).items() if x}
    except UserError:
        return {}


def plotted(runs: Sequence[Run]) -> Any:
    """A figure: the curves of several runs overlaid, a colour for each run; then, side by side, the
    contexts of each run's dev tasks, where a task has the same colour in each."""
    panels = [curves(run.rows) for run in runs]
    titles = dict.fromkeys(title for panel in panels for title in panel)
    planes = [(run, how, ps) for run in runs for how, ps in dev_contexts(run).items()]
    planes.sort(key=lambda plane: plane[1])
    rows = math.ceil((len(titles) + len(planes)) / 3) or 1
    figure = show.new_figure(15, 3.2 * rows)
    for i, title in enumerate(titles, 1):
        axis = figure.add_subplot(rows, 3, i)
        axis.set_title(title, fontsize=9, parse_math=False)
        for number, run in enumerate(runs):
            for s, style in zip(panels[number].get(title, ()), itertools.cycle(("-", "--", ":"))):
                label = f"{number + 1} {run.folder}: {s['name']}"
                axis.plot(s["x"], s["y"], style, marker=".", ms=2, color=f"C{number}", label=label)
        for text in axis.legend(fontsize=5).get_texts():
            text.set_parse_math(False)
    tasks = {p["task"]: i for i, p in enumerate(p for *_, ps in planes[::-1] for p in ps)}
    for i, (run, how, ps) in enumerate(planes, len(titles) + 1):
        axis = figure.add_subplot(rows, 3, i)
        axis.set_title(f"contexts, {how}: {run.folder}", fontsize=9, parse_math=False)
        x, y, colour = zip(*((p["x"], p["y"], tasks[p["task"]]) for p in ps), strict=True)
        axis.scatter(x, y, s=12, c=colour, cmap="turbo")
    return figure


def save_comparison(
    runs: Sequence[Run], table: Sequence[dict[str, Any]], csv_path: str, plot_path: str
) -> None:
    """Write the table as CSV, with a line for each run, and the curves; "" for neither."""
    if csv_path:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([table[0], *(row.values() for row in table)])
        encoded = text.getvalue().encode(errors="backslashreplace")
        checkpoint.commit(Path(csv_path), lambda aside: aside.write_bytes(encoded))
    if plot_path:
        show.save(plotted(runs), Path(plot_path))


# ---------------------------------------------------------------- lines of text


def training_line(row: dict[str, Any], total: int) -> str:
    rate, steps = row["samples_per_s"], row.get("halted/steps", 0)
    minutes = (total - row["step"]) * row["samples"] / row["step"] / rate / 60
    shares = f"loss {row['all/lm_loss']:.3f}  exact {100 * row['all/exact']:.1f} %"
    speed = f"ACT steps {steps:.1f}  {rate:.1f} samples/s  {minutes:.0f} min left"
    return f"step {row['step']}/{total}  {shares}  {speed}"


def evaluation_line(row: dict[str, Any]) -> str:
    """Every measure of an evaluation; exact match with its interval."""
    parts = [f"step {row['step']}"]
    for key, value in row.items():
        group, _, name = key.rpartition("/")
        if group and name != "n":
            n = row.get(f"{group}/n") if name == "exact" else None
            parts.append(f"{key} {score.with_interval(value, int(n)) if n else f'{value:.3f}'}")
    return "  ".join(parts)


def verdicts(scores: dict[str, Any]) -> str:
    """A line: which held-out scores are as high as the published encoder's authors hoped for."""
    criteria, words = {"pass@2": 0.05, "exact_match": 0.05, "pass@100": 0.0}, []
    for name, least in criteria.items():
        words.append(f"{name} above {100 * least:g} %: {'yes' if scores[name] > least else 'no'}")
    return f"published criteria: {', '.join(words)}"


def score_lines(result: dict[str, Any]) -> list[str]:
    """Every score with its interval, by source and solver; held-out evaluations so far."""
    if "pass@2" not in result:  # no output is known
        return []
    per_task = (*(f"pass@{k}" for k in score.PASS), "all_queries/pass@2")
    sizes = dict.fromkeys(per_task, result["n_tasks"])
    per_query = ("per_output/pass@2", "oracle", "exact_match", "cell_accuracy")
    sizes |= dict.fromkeys(per_query, result["n_queries"])
    lines = [f"{key} {score.with_interval(result[key], n)}" for key, n in sizes.items()]
    for kind in ("by_source", "by_solver"):
        for name, row in result.get(kind, {}).items():
            interval = score.with_interval(row["pass@2"], row["n_tasks"])
            lines.append(f"{kind} {name}: pass@2 {interval}")
    if "held_out_evaluation" in result:
        count = result["held_out_evaluation"]
        number = "not counted (state folder not writable)" if count is None else f"number {count}"
        lines.append(f"held-out evaluation of these tasks: {number}")
        lines += [verdicts(result)] if result.get("held_out", True) else []
    return lines


def evaluated_lines(result: dict[str, Any]) -> list[str]:
    """How tasks were answered, every score, and what has no answer."""
    facts = f"{result['views']} views, {result['adaptation']}, {result['votes']} votes"
    if result["act_steps"]:  # not where all solvers are made by hand
        facts += f", {result['act_steps']:.1f} ACT steps a view"
    facts += f", {result['seconds_per_task']:.3g} s a task; in {result['predictions']}"
    facts += f"; guard: {result['guard']}" if result["guard"] else ""
    what = "hand-made, no weights" if "pass@2" in result else "no output is known: no scores"
    if "held_out" in result:
        what = "held out" if result["held_out"] else "NOT held out: shares pairs with training"
    lines = [f"{', '.join(result['data'])}: {what}; {facts}", *score_lines(result)]
    if left := result["unanswered"]:
        reasons = "larger than data.max_side, or no time was left"
        lines.append(f"{left} queries have no answer: {reasons}")
    if left := result["without_query"]:
        lines.append(f"{left} tasks have no query (no test pair) and are left out")
    return lines


# ---------------------------------------------------------------- lists and facts


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: the shapes of its parameters, their number, and its metadata."""
    c = checkpoint.load(path)
    shapes = {name: tuple(x.shape) for name, x in etrm.leaves(c.params).items()}
    facts = {k: c.meta[k] for k in ("step", "data", "tasks", "dtype", "config", "score")}
    facts |= {"checkpoint": str(c.path), "shapes": shapes, "pairs": len(c.pairs)}
    facts["finding"] = str(msgspec.convert(c.meta["finding"], sources.Finding))
    return facts | {"parameters": sum(map(math.prod, shapes.values()))}


def inspection_lines(facts: dict[str, Any]) -> list[str]:
    """What `inspect` returns, as text."""
    lines = [f"{k:42} {' x '.join(map(str, shape))}" for k, shape in facts["shapes"].items()]
    lines += [f"[{k}] {json.dumps(fields)[1:-1]}" for k, fields in facts["config"].items()]
    size = f"{facts['parameters']:,} parameters, step {facts['step']}, {facts['dtype']}"
    trained = f"trained on {facts['tasks']} tasks, hash {facts['data']}; guard: {facts['finding']}"
    return [*lines, f"{facts['checkpoint']}: {size}", trained]


def described(folder: Path) -> dict[str, Any]:
    """A run: its state, step, best value of what it watches, and seconds since its last row."""
    try:
        about, facts = sources.read_json(folder / "run.json"), checkpoint.newest_facts(folder)
        cfg, age = about["config"], time.time() - (folder / "metrics.jsonl").stat().st_mtime
        state = "running" if checkpoint.is_held(folder) else facts.get("ended") or "stopped"
        row = {"run": str(folder), "state": state, "step": facts.get("step", 0)}
        row |= {"steps": int(cfg["train"]["steps"]), "best": facts.get("best"), "age_s": round(age)}
        watched = f"{cfg['eval']['on']}/{cfg['eval']['weights'][0]}/own/loss"
        return {**row, "watched": watched, "guard": checkpoint.warned(about)}
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return {"run": str(folder), "state": f"unreadable: {e!r}", "age_s": 0}


def run_line(row: dict[str, Any]) -> str:
    """A run's state, steps, best value of what it watches, minutes since its last row."""
    best = f"{row['watched']} {row['best']:.4f}" if row.get("best") is not None else ""
    steps = f"{row.get('step', 0):>7}/{row.get('steps', 0):<7}"
    age = f"{row['age_s'] / 60:.0f} min  {row.get('guard', '')}"
    return f"{row['run']:40} {row['state']:14} {steps} {best:36} {age}".rstrip()


def listing(root: Path) -> list[dict[str, Any]]:
    """Every run below a folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return [described(about.parent) for about in sorted(root.rglob("run.json"))]


def describe(tasks: Sequence[data.Task]) -> dict[str, Any]:
    """Counts, sizes and content hash of a set of tasks, as `etrm data` prints them."""
    packed, canvases = data.pack(tasks), {}
    for rule in ("leave_one_out", "test"):
        asked = data.queries(packed, rule, DataConfig())
        too_large = {"too_large": int((~asked.fits).sum())}
        canvases[rule] = data.histogram(asked.canvas[asked.fits].amax(1)) | too_large
    counts = {"tasks": len(tasks), "pairs": len(packed.task_of)}
    counts["queries"] = sum(len(t.queries) for t in tasks)
    counts["hidden_outputs"] = int((packed.grids[:, 1, 1] == 0).sum())
    demos = dict(sorted(Counter(packed.n_demos.tolist()).items()))
    return {
        **counts,
        "demos_per_task": demos,
        "canvases": canvases,
        "hash": sources.set_hash(tasks),
    }
