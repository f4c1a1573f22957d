"""Votes on disk, how they are ranked, and what a ranking is worth: scores, intervals, submissions.

A line of predictions.jsonl holds the votes of one solver for one query: {"task", "query", "hash",
"source", "seconds", "votes", "canvas", "too_large"}. `hash` is the task's content without the
outputs of its queries, `source` names the solver. A vote is {"view", "step", "q", "grid"}: rows of
a grid are joined by "/", null is no answer. `canvas` is the whole canvas of view 0: a blank for an
empty cell, "|" for the mark at a grid's end.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, data, sources
from .config import DataConfig, UserError
from .data import MAX_SIDE, PAD, Symmetry, Task, parsed, tokenise, untokenise

try:
    import fcntl
except ImportError:  # Windows: two writers are not kept apart
    fcntl = None  # type: ignore[assignment]

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
    too_large: int = 0  # side of the canvas that the query needs, 0 where it has one
    seconds: float = 0.0  # spent on its votes
    source: str = ""  # of all its votes, where they have one


# ---------------------------------------------------------------- on disk


def grid_text(grid: np.ndarray | None) -> str | None:
    """A grid as predictions.jsonl has it."""
    return None if grid is None else "/".join("".join(map(str, row)) for row in grid.tolist())


def canvas_text(tokens: np.ndarray) -> str:
    """A canvas (height, width) as predictions.jsonl has it."""
    return "/".join("".join(SIGNS[t] for t in row) for row in tokens.tolist())


def to_line(p: Prediction) -> str:
    """One prediction as a line of JSON; its votes have one source."""
    line: dict[str, Any] = {k: getattr(p, k) for k in ("task", "query", "hash", "source")}
    line["seconds"] = round(p.seconds, 3)
    if p.canvas is not None:
        line["canvas"] = canvas_text(p.canvas)
    line["votes"] = [
        {"view": v.view, "step": v.step, "q": v.q, "grid": grid_text(v.grid)} for v in p.votes
    ]
    return json.dumps(line | ({"too_large": p.too_large} if p.too_large else {}))


def from_line(text: str, where: str) -> Prediction:
    """What `to_line` wrote. Raises UserError on anything else."""
    try:
        line = parsed(text)
        source, votes = str(line["source"]), []
        for v in line["votes"]:
            rows = (
                None if v["grid"] is None else [[int(c) for c in r] for r in v["grid"].split("/")]
            )
            grid = None if rows is None else sources.check_grid(rows, where)
            if not math.isfinite(q := float(v["q"])):
                raise ValueError(f"q is {q}")
            votes.append(Vote(grid, q, int(v["view"]), int(v["step"]), source))
        canvas = None
        if "canvas" in line:
            rows = [[SIGNS.index(c) for c in row] for row in line["canvas"].split("/")]
            canvas = np.array(rows, np.uint8)
        seconds = float(line.get("seconds", 0))
        return Prediction(
            str(line["task"]), int(line["query"]), str(line["hash"]), votes, canvas,
            int(line.get("too_large", 0)), seconds if math.isfinite(seconds) else 0.0, source,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: no line of predictions: {type(e).__name__}: {e}") from None


def read(path: Path) -> list[Prediction]:
    """All lines of a predictions.jsonl but a last one cut off by a kill, or all of a submission."""
    if path.suffix != ".jsonl":
        return read_submission(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    lines = text.split("\n")[:-1]
    return [from_line(line, f"{path}: line {n}") for n, line in enumerate(lines, 1)]


def append_lines(path: Path, lines: Iterable[str]) -> None:
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


def append(path: Path, predictions: Iterable[Prediction]) -> None:
    """Add predictions to a file at once, whoever else writes it."""
    append_lines(path, map(to_line, predictions))


# ---------------------------------------------------------------- joining


def task_hash(task: Task) -> str:
    """Content of a task but for the outputs of its queries."""
    return sources.asked_digest(task).hex()


def view(task: Task, query: int, number: int, cfg: DataConfig) -> tuple[Symmetry, Tensor]:
    """Symmetry () and uniform numbers that order the demos; view 0 is the task as it is.

    Drawn from the task's content: other tasks, their order and hidden outputs are no matter."""
    lots = 1 + len(task.demos)
    u = data.uniform(11 + lots, int(task_hash(task)[:13], 16), data.VIEW, query, number)
    if number == 0:
        return data.identity(), torch.arange(lots).double() / lots
    s = data.draw_symmetry(u[None, :11], cfg.dihedral, cfg.colours)
    return Symmetry(s.dihedral[0], s.colours[0]), u[11:]


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
    shown = [p for p in parts if p.canvas is not None]
    return blank._replace(
        votes=list(votes.values()),
        canvas=min(shown, key=lambda p: p.source).canvas if shown else None,
        too_large=0 if votes else max((p.too_large for p in parts), default=0),
        seconds=math.fsum(p.seconds for p in parts),
    )


def joined(tasks: Sequence[Task], predictions: Iterable[Prediction]) -> list[Prediction]:
    """One prediction for every query of the tasks, in order; submissions are matched by name.

    A submission's only answer that copies the query is no answer: `submission` writes it so."""
    groups, joint = by_query(predictions), []
    for task in tasks:
        key = task_hash(task)
        for i, (x, _) in enumerate(task.queries):
            parts = list(groups.get((key, i), ()))
            for p in groups.get((task.name, i), ()):
                only = p.votes[0].grid if len(p.votes) == 1 else None
                if only is None or not np.array_equal(only, x):
                    parts.append(p)
            joint.append(union(Prediction(task.name, i, key, []), parts))
    return joint


# ---------------------------------------------------------------- ranking


class Answer(NamedTuple):
    grid: np.ndarray
    votes: int
    q: float  # mean sigmoid(q) of its votes
    share: float  # of all votes, those without an answer too


def rank(votes: Sequence[Vote]) -> list[Answer]:
    """Different answers by their number of votes, as published; the order of votes is no matter.

    Ties go by mean sigmoid(q), then by the earliest view, then by content."""
    by_grid: dict[tuple[tuple[int, ...], bytes], list[Vote]] = defaultdict(list)
    for v in votes:
        if v.grid is not None:
            by_grid[v.grid.shape, np.ascontiguousarray(v.grid, np.uint8).tobytes()].append(v)
    ranked = []
    for (shape, cells), group in by_grid.items():  # fsum: no order changes a mean
        q = math.fsum(1 / (1 + math.exp(-max(-500.0, v.q))) for v in group) / len(group)
        grid = np.frombuffer(cells, np.uint8).reshape(shape)
        answer = Answer(grid, len(group), q, len(group) / len(votes))
        ranked.append(((-len(group), -q, min(v.view for v in group), shape, cells), answer))
    return [answer for _, answer in sorted(ranked, key=lambda pair: pair[0])]


# ---------------------------------------------------------------- scores

PASS = (1, 2, 5, 10, 100, 1000)
SIDES = (10, 15, 20, 30)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n trials (Wilson 1927); too wide for a mean of n shares."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def with_interval(share: float, n: int) -> str:
    """A share of n as it is printed: 7.0 % (n = 86, 95 % 3.2 to 14.4)."""
    low, high = wilson(share, n)
    return f"{100 * share:.1f} % (n = {n}, 95 % {100 * low:.1f} to {100 * high:.1f})"


class Judged(NamedTuple):
    """One query with a known output; exact, cells and shape are of view 0."""

    place: int  # of the right answer in the ranking, from 1; 0 where no vote gave it
    exact: bool  # every valid cell of the canvas is right
    cells: float  # share of the valid cells that are
    shape: bool
    side: int  # largest side of the demos, the query and the right output


def judge(task: Task, p: Prediction, output: np.ndarray) -> Judged:
    """What the votes for a query are worth, given its output."""
    ranked = rank(p.votes)
    place = next((i for i, a in enumerate(ranked, 1) if np.array_equal(a.grid, output)), 0)
    grids = [x for pair in task.demos for x in pair] + [task.queries[p.query][0], output]
    side = max(max(x.shape) for x in grids)
    if p.canvas is None or any(a > b for a, b in zip(output.shape, p.canvas.shape, strict=True)):
        return Judged(place, False, 0.0, False, side)
    label, first = tokenise(output, p.canvas.shape), untokenise(p.canvas)
    right = (p.canvas == label)[label != PAD]
    shape = first is not None and first.shape == output.shape
    return Judged(place, bool(right.all()), float(right.mean()), shape, side)


def passed(rows: Sequence[Sequence[Judged]], k: int) -> float:
    """Mean over tasks of the share of their queries whose right answer is among the first k."""
    return fmean(fmean(0 < j.place <= k for j in task) for task in rows)


def score(tasks: Sequence[Task], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Scores over the queries with a known output; an unanswered one is wrong.

    pass@k (the headline, as published): mean over tasks of the share of their queries solved;
    all_queries/pass@k: share of the tasks all of whose queries are solved; per_output/pass@k: share
    of queries. interval95: Wilson's. Raises UserError where no output is known."""
    given = {(p.task, p.query): p for p in predictions}
    rows: list[list[Judged]] = []
    for task in tasks:
        blank = Prediction(task.name, 0, "", [])
        judged = [
            judge(task, given.get((task.name, i), blank._replace(query=i)), y)
            for i, (_, y) in enumerate(task.queries)
            if y is not None
        ]
        rows += [judged] if judged else []
    if not rows:
        raise UserError("no query has a known output: there is nothing to score")
    n, flat = len(rows), [j for task in rows for j in task]
    shares: dict[str, tuple[float, int]] = {}
    for k in PASS:
        shares[f"pass@{k}"] = passed(rows, k), n
        shares[f"all_queries/pass@{k}"] = fmean(all(0 < j.place <= k for j in t) for t in rows), n
        shares[f"per_output/pass@{k}"] = fmean(0 < j.place <= k for j in flat), len(flat)
    shares["oracle"] = fmean(j.place > 0 for j in flat), len(flat)
    shares["exact_match"] = fmean(j.exact for j in flat), len(flat)
    shares["cell_accuracy"] = fmean(j.cells for j in flat), len(flat)
    shares["shape_accuracy"] = fmean(j.shape for j in flat), len(flat)
    by_side, low = {}, 0
    for high in SIDES:
        band = [task for task in rows if low < max(j.side for j in task) <= high]
        if band:
            by_side[f"<={high}"] = {"n_tasks": len(band), "pass@2": passed(band, 2)}
        low = high
    return {
        "n_tasks": n,
        "n_queries": len(flat),
        **{name: share for name, (share, _) in shares.items()},
        "interval95": {name: wilson(*share) for name, share in shares.items()},
        "by_side": by_side,
        "unanswered": sum(not p.votes for p in predictions),
    }


# What the published encoder's authors called success on held-out tasks: above so much.
CRITERIA = {
    "pass@2": (0.05, "a win"),
    "exact_match": (0.05, "hoped for"),
    "pass@100": (0, "meaningful"),
}


def verdicts(scores: dict[str, Any]) -> str:
    """A line: which of CRITERIA the scores meet."""
    words = []
    for name, (least, meaning) in CRITERIA.items():
        verdict = "yes" if scores[name] > least else "no"
        words.append(f"{name.replace('_', ' ')} above {100 * least:g} % ({meaning}): {verdict}")
    return f"published criteria: {', '.join(words)}"


# ---------------------------------------------------------------- counted held-out evaluations


@functools.cache
def contents(source: str) -> frozenset[str]:
    """Hashes of the tasks of a source."""
    return frozenset(task_hash(t)[:16] for t in sources.load([source], hide=True))


def count_evaluation(
    known: dict[str, list[Task]], held_out: Sequence[str], value: float
) -> dict[str, int | None]:
    """Count an evaluation of held-out tasks, by content: ARC's evaluation sets and a config's own.

    {"held_out_evaluation": number of this one, for the task evaluated most often}, kept in the
    user's state folder; None where that cannot be written, {} where no task is held out."""
    named = [s for s in held_out if s in known or Path(s).exists()]
    held = frozenset().union(*map(contents, ("arc1:evaluation", "arc2:evaluation", *named)))
    tasks = sorted({task_hash(t)[:16] for ts in known.values() for t in ts} & held)
    if not tasks:
        return {}
    row = {"data": list(known), "pass@2": value, "tasks": tasks}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    root = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file, counts = Path(root) / "etrm-arc" / "held-out-evaluations.jsonl", Counter[str]()
    try:
        append_lines(file, [json.dumps({"time": now, **row})])
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, UserError):
        return {"held_out_evaluation": None}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line edited by hand
            counts.update(set(map(str, parsed(line)["tasks"])))
    return {"held_out_evaluation": max(counts[key] for key in tasks)}


def held_out(pairs: Tensor, tasks: Sequence[Task]) -> bool:
    """Whether none of the tasks has a pair of 20 cells or more, or all its demos, among the pairs
    (N, 16) that were trained on."""
    trained = {bytes(row) for row in pairs.numpy()}
    for task in tasks:
        known = [(x, y) for x, y in (*task.demos, *task.queries) if y is not None]
        shared = [sources.pair_digest(pair) in trained for pair in known]
        cells = [x.size + y.size for (x, y), same in zip(known, shared, strict=True) if same]
        if max(cells, default=0) >= sources.MIN_SHARED_CELLS or all(shared[: len(task.demos)]):
            return False
    return True


def judged(
    known: dict[str, list[Task]], predictions: Sequence[Prediction],
    pairs: Sequence[Tensor] = (), kept_out: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Scores of predictions, of each source where there are several, whether the tasks were held
    out from solvers trained on these pairs, and the number of this held-out evaluation; kept_out:
    sources that were to be. Nothing of it without known outputs."""
    tasks = [t for ts in known.values() for t in ts]
    scored = [k for k, ts in known.items() if any(y is not None for t in ts for _, y in t.queries)]
    if not scored:
        return {"unanswered": sum(not p.votes for p in predictions)}
    result = score(tasks, predictions)
    if len(known) > 1:
        names = {k: {t.name for t in known[k]} for k in scored}
        parts = {k: [p for p in predictions if p.task in names[k]] for k in scored}
        result["by_source"] = {k: score(known[k], parts[k]) for k in scored}
    if pairs:
        result["held_out"] = all(held_out(digests, tasks) for digests in pairs)
    return result | count_evaluation(known, kept_out, result["pass@2"])


# ---------------------------------------------------------------- submissions

ATTEMPTS = ("attempt_1", "attempt_2")
PLACEHOLDER = np.zeros((2, 2), np.uint8)  # twice in Kaggle's sample: no answer


def submission(
    tasks: Sequence[Task], predictions: Sequence[Prediction]
) -> dict[str, list[dict[str, Any]]]:
    """Kaggle's format: both attempts at every query of every task. One answer alone is given twice;
    where there is none, the query's input stands for it, so that the file is always valid."""
    votes = {(p.task, p.query): p.votes for p in predictions}
    attempts: dict[str, list[dict[str, Any]]] = {task.name: [] for task in tasks}
    for task in tasks:
        for i, (x, _) in enumerate(task.queries):
            grids = [a.grid for a in rank(votes.get((task.name, i), []))[:2]] or [x]
            both = (grids[0].tolist(), grids[-1].tolist())
            attempts[task.name].append(dict(zip(ATTEMPTS, both, strict=True)))
    return attempts


def read_submission(path: Path) -> list[Prediction]:
    """A submission's attempts as votes: equal ones are one, a placeholder is none.

    Raises UserError naming task, query and attempt."""
    raw, predictions = sources.read_json(path), []
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{path}: a submission maps task ids to lists of attempts")
    for name, queries in raw.items():
        if not isinstance(queries, list) or not queries:
            raise UserError(f"{path}: task {name}: needs a list with one entry per query")
        for i, both in enumerate(queries):
            where = f"{path}: task {name}, query {i}"
            if not isinstance(both, dict) or set(both) != set(ATTEMPTS):
                raise UserError(f"{where}: needs exactly attempt_1 and attempt_2")
            first, second = (sources.check_grid(both[k], f"{where}, {k}") for k in ATTEMPTS)
            votes = [Vote(x, view=n, source=str(path)) for n, x in enumerate((first, second))]
            if np.array_equal(first, second):
                votes = [] if np.array_equal(first, PLACEHOLDER) else votes[:1]
            canvas = tokenise(first, (MAX_SIDE, MAX_SIDE)) if votes else None
            predictions.append(Prediction(name, i, "", votes, canvas, source=str(path)))
    return predictions


# ---------------------------------------------------------------- files of votes and tasks


def with_query(task: Task) -> Task:
    """The task. Raises UserError where it has no query."""
    if not task.queries:
        raise UserError(f"task {task.name}: has no query (no test pair) to answer")
    return task


def load_by_source(
    names: Sequence[str], limit: int = 0, shard: str = "1/1", hide: bool = False
) -> dict[str, list[Task]]:
    """The first `limit` tasks (0: all), source by source; every n-th of each for the shard "i/n".

    A task of which an earlier source has a demo under the same id is left out (ARC-2 repeats six of
    ARC-1's, changed); another task of that id gets a name of its own, as in `sources.load`.
    Raises UserError on a task without a query."""
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard {shard}: must look like 1/4")
    tasks: dict[str, list[Task]] = {}
    seen: dict[str, Task] = {}
    for source in dict.fromkeys(names):
        fresh = []
        for task in sources.load([source], hide=hide):
            name, twin = sources.free_name(task, seen), seen.get(task.name)
            repeated = name in seen or (twin is not None and sources.akin(twin, task))
            if not repeated and len(seen) < (limit or math.inf):
                seen[name] = with_query(task._replace(name=name))
                fresh.append(seen[name])
        tasks[source] = fresh[int(part) - 1 :: int(parts)]
    return tasks


def jsonl(option: str, path: str | Path) -> Path:
    """Where predictions can be kept: what has another ending is read as a submission."""
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{option} {path}: must end in .jsonl")
    return Path(path)


def merge(
    files: Sequence[Path], chosen: Sequence[str], out: str = "", submit: str = ""
) -> dict[str, Any]:
    """Join predictions and submissions into one file; for tasks of the sources given, into a
    submission and scores."""
    if submit and not chosen:
        raise UserError("--submission: name the tasks with --data")
    target = jsonl("--output", out) if out else None
    known = load_by_source(chosen)
    hidden = [t for ts in load_by_source(chosen, hide=True).values() for t in ts]
    lines = [p for file in files for p in read(file)]
    joint = joined(hidden, lines)
    if not chosen:
        joint = [union(group[0], group) for group in by_query(lines).values()]
    if not any(p.votes for p in joint):
        raise UserError(f"{', '.join(map(str, files))}: no vote for any of the tasks")
    if target:
        texts = dict.fromkeys(to_line(p) + "\n" for p in lines)
        checkpoint.write_text(target, "".join(texts))
    if submit:
        checkpoint.write_text(Path(submit), json.dumps(submission(hidden, joint)))
    return {
        "files": [str(f) for f in files],
        "votes": sum(len(p.votes) for p in joint),
        "queries": len(joint),
        **judged(known, joint),
    }
