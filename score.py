"""Votes on disk, their ranking, and what a ranking is worth: scores and intervals.

A line of predictions.jsonl holds the votes of one solver, "source", for one query of a task with
the content "hash", outputs of queries left out. Rows of a vote's grid are joined by "/", null is no
answer. "canvas" is that of view 0: a blank for an empty cell, "|" for the mark at a grid's end.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import data, sources
from .checkpoint import fcntl
from .config import DataConfig, UserError
from .data import FIRST_COLOUR, PAD, Symmetry, Task, parsed, tokenise

SIGNS = " |0123456789"  # a token each


class Vote(NamedTuple):
    """A view's answer, in the task's own frame."""

    grid: np.ndarray | None  # None: no whole grid was given
    q: float = 0.0  # the halting head's logit
    view: int = 0
    step: int = 0  # ACT steps taken, 0 for a solver without them
    source: str = ""


class Prediction(NamedTuple):
    """The votes for one query."""

    task: str
    query: int
    hash: str  # of the task; "" in a submission
    votes: list[Vote]
    canvas: np.ndarray | None = None  # (height, width) tokens of view 0
    seconds: float = 0.0  # spent on its votes
    source: str = ""  # of all its votes, where they have one


# ---------------------------------------------------------------- on disk


def canvas_text(tokens: np.ndarray) -> str:
    """A canvas (height, width) as predictions.jsonl has it."""
    return "/".join("".join(SIGNS[t] for t in row) for row in tokens.tolist())


def grid_text(grid: np.ndarray | None) -> str | None:
    """A grid as predictions.jsonl has it."""
    return None if grid is None else canvas_text(grid + FIRST_COLOUR)


def rows_of(text: str, first: int) -> list[list[int]]:
    """The rows of such a text, its tokens counted from `first`."""
    return [[SIGNS.index(c) - first for c in row] for row in text.split("/")]


def to_line(p: Prediction) -> str:
    """One prediction as a line of JSON; its votes have one source."""
    keys = ("view", "step", "q")
    votes = [{k: getattr(v, k) for k in keys} | {"grid": grid_text(v.grid)} for v in p.votes]
    line = {k: getattr(p, k) for k in ("task", "query", "hash", "source")}
    canvas = None if p.canvas is None else canvas_text(p.canvas)
    return json.dumps({**line, "seconds": round(p.seconds, 3), "canvas": canvas, "votes": votes})


def from_line(text: str, where: str) -> Prediction:
    """What `to_line` wrote. Raises UserError on anything else."""
    try:
        line = parsed(text)
        source, seconds, votes = str(line["source"]), float(line["seconds"]), []
        for v in line["votes"]:
            rows = None if v["grid"] is None else rows_of(v["grid"], FIRST_COLOUR)
            grid = None if rows is None else sources.check_grid(rows, where)
            votes.append(Vote(grid, float(v["q"]), int(v["view"]), int(v["step"]), source))
        text = line.get("canvas")
        canvas = None if text is None else np.array(rows_of(text, 0), np.uint8)
        if not all(map(math.isfinite, [seconds, *(v.q for v in votes)])):
            raise ValueError("a number is not finite")
        counts = [line["query"], *(v["view"] for v in line["votes"])]
        if not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError("query and view must be whole numbers from 0")
        task, query, key = str(line["task"]), line["query"], str(line["hash"])
        return Prediction(task, query, key, votes, canvas, seconds, source)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: no line of predictions: {type(e).__name__}: {e}") from None


def read(path: Path) -> list[Prediction]:
    """All lines of a predictions.jsonl but a last one cut off by a kill."""
    lines = sources.read_text(path).split("\n")[:-1]
    return [from_line(line, f"{path}: line {n}") for n, line in enumerate(lines, 1)]


def append(path: Path, lines: Iterable[str]) -> None:
    """Add whole lines under a lock; what a kill left of a last line is cut off first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as f:
            if fcntl:
                with contextlib.suppress(OSError):  # some network mounts have no locks
                    fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
            if f.read() not in (b"", b"\n"):
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
            f.write("".join(line + "\n" for line in lines).encode())
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None


# ---------------------------------------------------------------- the votes for a query


def view(task: Task, query: int, number: int, cfg: DataConfig) -> tuple[Symmetry, Tensor]:
    """Symmetry () and uniform numbers that order the demos, drawn from the task's content without
    hidden outputs; view 0 is the task as it is."""
    n, key = len(task.demos), int(sources.task_hash(task)[:13], 16)
    u = data.uniform(12 + n, key, data.VIEW, query, number)
    if number == 0:
        return data.identity(), torch.arange(n).double() / n
    s = data.draw_symmetry(u[None, :11], cfg.dihedral, cfg.colours)
    return Symmetry(s.dihedral[0], s.colours[0]), u[12:]


def by_query(predictions: Iterable[Prediction]) -> dict[tuple[str, int], list[Prediction]]:
    """The predictions for each (hash of a task, or name in a submission; query)."""
    groups: dict[tuple[str, int], list[Prediction]] = defaultdict(list)
    for p in predictions:
        groups[p.hash or p.task, p.query].append(p)
    return groups


def union(blank: Prediction, parts: Sequence[Prediction]) -> Prediction:
    """A prediction with the votes of all parts, whatever their order; (source, view) votes once."""
    votes: dict[tuple[str, int], Vote] = {}
    everyone = [v for p in parts for v in p.votes]  # two machines may differ by rounding
    for v in sorted(everyone, key=lambda v: (v.source, v.view, v.q, grid_text(v.grid) or "")):
        votes.setdefault((v.source, v.view), v)
    drawn = [p for p in parts if p.canvas is not None]
    canvas = min(drawn, key=lambda p: p.source, default=blank).canvas
    seconds = math.fsum(p.seconds for p in parts)
    return blank._replace(votes=list(votes.values()), canvas=canvas, seconds=seconds)


def unions(predictions: Iterable[Prediction]) -> list[Prediction]:
    """One prediction for each query that there are any for."""
    return [union(parts[0], parts) for parts in by_query(predictions).values()]


def joined(tasks: Sequence[Task], predictions: Iterable[Prediction]) -> list[Prediction]:
    """One prediction for every query of the tasks, in order; submissions are matched by name."""
    groups, joint = by_query(predictions), []
    for task in tasks:
        key = sources.task_hash(task)
        for i in range(len(task.queries)):
            parts = groups.get((key, i), []) + groups.get((task.name, i), [])
            joint.append(union(Prediction(task.name, i, key, []), parts))
    return joint


class Answer(NamedTuple):
    grid: np.ndarray
    votes: int
    q: float  # mean sigmoid(q) of its votes


def rank(votes: Sequence[Vote]) -> list[Answer]:
    """Different answers by their number of votes, as published; ties by mean sigmoid(q), then by
    the earliest view, then by content."""
    groups: dict[Any, list[Vote]] = defaultdict(list)  # by content
    for v in votes:
        if v.grid is not None:
            groups[v.grid.shape, v.grid.tobytes()].append(v)
    ranked = []
    for content, group in groups.items():  # fsum: no order changes a mean
        q = math.fsum(1 / (1 + math.exp(-max(-500.0, v.q))) for v in group) / len(group)
        order = (-len(group), -q, min(v.view for v in group), content)
        ranked.append((order, Answer(np.asarray(group[0].grid), len(group), q)))
    return [answer for _, answer in sorted(ranked)]


# ---------------------------------------------------------------- scores

PASS = (1, 2, 5, 10, 100, 1000)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n trials (Wilson 1927); too wide for a mean of n shares."""
    z = 1.959964
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def with_interval(share: float, n: int) -> str:
    """A share of n as it is printed: 7.0 % (n = 86, 95 % 3.2 to 14.4)."""
    low, high = wilson(share, n)
    return f"{100 * share:.1f} % (n = {n}, 95 % {100 * low:.1f} to {100 * high:.1f})"


class Judged(NamedTuple):
    """One query with a known output; exact and cells are of view 0."""

    place: int  # of the right answer in the ranking, from 1; 0 where no vote gave it
    exact: bool  # every valid cell of the canvas is right
    cells: float  # share of the valid cells that are


def judge(p: Prediction, output: np.ndarray) -> Judged:
    """What the votes for a query are worth, given its output."""
    ranked = enumerate(rank(p.votes), 1)
    place = next((i for i, a in ranked if np.array_equal(a.grid, output)), 0)
    if p.canvas is None or any(a > b for a, b in zip(output.shape, p.canvas.shape, strict=True)):
        return Judged(place, False, 0.0)
    label = tokenise(output, p.canvas.shape)
    right = (p.canvas == label)[label != PAD]
    return Judged(place, bool(right.all()), float(right.mean()))


def score(tasks: Sequence[Task], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Scores over the queries with a known output; an unanswered one is wrong. {} without any.
    pass@k (as published): mean over tasks of the share of their queries solved; all_queries/: share
    of tasks with all queries solved; per_output/: share of queries."""
    by_name, rows = {(p.task, p.query): p for p in predictions}, []  # a row for each task
    for task in tasks:
        known = [(i, y) for i, (_, y) in enumerate(task.queries) if y is not None]
        blank = Prediction(task.name, 0, "", [])
        if known:
            rows.append([judge(by_name.get((task.name, i), blank), y) for i, y in known])
    flat = [j for row in rows for j in row]
    if not flat:
        return {}
    scores: dict[str, Any] = {"n_tasks": len(rows), "n_queries": len(flat)}
    for k in PASS:
        solved = [[0 < j.place <= k for j in row] for row in rows]
        scores[f"pass@{k}"] = fmean(map(fmean, solved))
        scores[f"all_queries/pass@{k}"] = fmean(map(all, solved))
        scores[f"per_output/pass@{k}"] = fmean(x for row in solved for x in row)
    scores["oracle"] = fmean(j.place > 0 for j in flat)
    scores["exact_match"] = fmean(j.exact for j in flat)
    scores["cell_accuracy"] = fmean(j.cells for j in flat)
    return scores


# ---------------------------------------------------------------- held-out evaluations


@functools.cache
def contents(source: str) -> frozenset[str]:
    """Hashes of the tasks of a source."""
    return frozenset(sources.task_hash(t)[:16] for t in sources.load([source], hide=True))


def count_evaluation(
    known: dict[str, list[Task]], held_out: Sequence[str], value: float
) -> dict[str, int | None]:
    """Count an evaluation of held-out tasks, by content: ARC's evaluation sets and a config's own.
    The number, kept in the user's state folder, is that of the task evaluated most often; None
    where it cannot be written, {} where no task is held out."""
    named = [s for s in held_out if s in known or os.path.exists(os.path.expanduser(s))]
    held = frozenset().union(*map(contents, ("arc1:evaluation", "arc2:evaluation", *named)))
    tasks = sorted({sources.task_hash(t)[:16] for t in sum(known.values(), [])} & held)
    if not tasks:
        return {}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    row = json.dumps({"time": now, "data": list(known), "pass@2": value, "tasks": tasks})
    root = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(root) / "etrm-arc" / "held-out-evaluations.jsonl"
    try:
        append(file, [row])
        rows = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, UserError):
        return {"held_out_evaluation": None}
    return {"held_out_evaluation": max(sum(key in row for row in rows) for key in tasks)}


def held_out(pairs: Tensor, tasks: Sequence[Task]) -> bool:
    """Whether none of the tasks has a pair of 20 cells or more, or all its demos, among the pairs
    (N, 16) that were trained on."""
    trained = {bytes(row) for row in pairs.numpy()}
    for task in tasks:
        shared = [p for p in sources.known_pairs(task) if sources.pair_digest(p) in trained]
        large = any(x.size + y.size >= sources.MIN_SHARED_CELLS for x, y in shared)
        if large or all(sources.pair_digest(demo) in trained for demo in task.demos):
            return False
    return True


def judged(
    known: dict[str, list[Task]], predictions: Sequence[Prediction], held_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Scores of predictions, of each source where there are several, and the number of this
    evaluation of held-out tasks; nothing of it without known outputs."""
    scores = score(sum(known.values(), []), predictions)
    if scores:
        if len(known) > 1:
            by_source = {source: score(tasks, predictions) for source, tasks in known.items()}
            scores["by_source"] = {source: row for source, row in by_source.items() if row}
        scores |= count_evaluation(known, held_out, scores["pass@2"])
    return {"unanswered": sum(not p.votes for p in predictions), **scores}


# ---------------------------------------------------------------- files to evaluate


def load_by_source(
    names: Sequence[str], limit: int = 0, shard: str = "1/1", hide: bool = False
) -> dict[str, list[Task]]:
    """The first `limit` tasks (0: all), source by source; every n-th of each for the shard "i/n".
    A task that an earlier source has is left out; another of its id gets a name of its own."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--shard {shard}: must look like 1/4")
    tasks: dict[str, list[Task]] = {source: [] for source in names}
    seen: dict[str, Task] = {}
    for source in tasks:
        for task in sources.load([source], hide=hide):
            name = sources.free_name(task, seen)
            if name not in seen and len(seen) < (limit or math.inf):
                seen[name] = task._replace(name=name)
                tasks[source].append(seen[name])
    return {source: ts[part - 1 :: parts] for source, ts in tasks.items()}


def jsonl(option: str, path: str | Path) -> Path:
    """Where predictions can be kept: `etrm merge` takes another ending for a submission."""
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{option} {path}: must end in .jsonl")
    return Path(path).expanduser()
