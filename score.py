"""Votes on disk, the rules that rank them, and what a ranking is worth: scores, intervals, submissions.

A line of predictions.jsonl holds some votes for one query: {"task", "query", "hash", "source", "seconds", "votes",
"canvas", "too_large"}. `hash` is the task's content without the outputs asked for, `source` says who voted. A vote is {"view",
"step", "q", "logp", "demos", "grid"}: a grid's rows are joined by "/", null is no answer; "logp" and "demos" stand there
where the solver gave them. `canvas` is all that the first view said: blank where nothing is, "|" at the end of the grid.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import sources
from .config import DataConfig, UserError, nearest
from .data import (
    MAX_SIDE,
    PAD,
    VIEW,
    Symmetry,
    Task,
    draw_symmetry,
    identity,
    parsed,
    tokenise,
    uniform,
    untokenise,
)

SIGNS = " |0123456789"  # a token each


def signs(tokens: np.ndarray) -> str:
    """A canvas as predictions.jsonl has it."""
    return "/".join("".join(SIGNS[t] for t in row) for row in tokens.tolist())


class Vote(NamedTuple):
    """A view's answer, in the task's own frame."""

    grid: np.ndarray | None  # None: no whole grid was given
    q: float = 0.0  # the halting head's logit
    logp: float | None = None  # log-probability of the whole answer
    demos: float | None = (
        None  # mean log-probability of a demo's cell under the same context, where that was asked
    )
    view: int = 0
    step: int = 0  # ACT step of the answer
    source: str = ""


class Prediction(NamedTuple):
    """What is known of one query."""

    task: str
    query: int
    hash: str  # of the task, "" where the solver did not say
    votes: list[Vote]
    canvas: np.ndarray | None = None  # tokens (height, width) of the first view
    too_large: int = 0  # canvas that the query would need, 0 where it has one
    seconds: float = 0.0  # that its votes took
    source: str = ""  # of all its votes, where that is one


# ---------------------------------------------------------------- on disk


def written(grid: np.ndarray | None) -> str | None:
    return None if grid is None else "/".join("".join(map(str, row)) for row in grid.tolist())


def to_line(p: Prediction) -> str:
    """One prediction as a line of JSON; its votes all have one source."""
    votes = []
    for v in p.votes:
        known = {k: getattr(v, k) for k in ("logp", "demos") if getattr(v, k) is not None}
        votes.append({"view": v.view, "step": v.step, "q": v.q, **known, "grid": written(v.grid)})
    line: dict[str, Any] = {"task": p.task, "query": p.query, "hash": p.hash, "source": p.source}
    line["seconds"] = round(p.seconds, 3)
    if p.canvas is not None:
        line["canvas"] = signs(p.canvas)
    return json.dumps(line | {"votes": votes} | ({"too_large": p.too_large} if p.too_large else {}))


def of_line(text: str, where: str) -> Prediction:
    """What `to_line` wrote. Raises UserError on anything else."""
    try:
        line = parsed(text)
        votes = []
        for v in line["votes"]:
            grid = (
                None
                if v["grid"] is None
                else sources.check_grid([[int(c) for c in r] for r in v["grid"].split("/")], where)
            )
            q, (logp, demos) = (
                float(v["q"]),
                (float(v[k]) if k in v else None for k in ("logp", "demos")),
            )
            if not all(x is None or math.isfinite(x) for x in (q, logp, demos)):
                raise ValueError(f"q, logp and demos are {q}, {logp} and {demos}")
            votes.append(
                Vote(grid, q, logp, demos, int(v["view"]), int(v["step"]), str(line["source"]))
            )
        rows = line["canvas"].split("/") if "canvas" in line else None
        canvas = (
            None
            if rows is None
            else np.array([[SIGNS.index(c) for c in row] for row in rows], np.uint8)
        )
        rest = int(line.get("too_large", 0)), float(line.get("seconds", 0)), str(line["source"])
        return Prediction(
            str(line["task"]), int(line["query"]), str(line["hash"]), votes, canvas, *rest
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(f"{where}: no line of predictions: {type(e).__name__}: {e}") from None


def read(path: Path) -> list[Prediction]:
    """All lines of a predictions.jsonl, or the attempts of a submission. A last line cut off by a kill is left out."""
    if path.suffix != ".jsonl":
        made = []
        for name, tries in check_submission(path).items():
            for i, both in enumerate(tries):
                grids = [np.array(both[k], np.uint8) for k in ATTEMPTS]
                attempts = [Vote(grid, view=v, source=str(path)) for v, grid in enumerate(grids)]
                made.append(
                    Prediction(
                        name,
                        i,
                        "",
                        attempts,
                        tokenise(grids[0], (MAX_SIDE, MAX_SIDE)),
                        source=str(path),
                    )
                )
        return made
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    return [of_line(line, f"{path}: line {n}") for n, line in enumerate(text.split("\n")[:-1], 1)]


def append(path: Path, made: Iterable[Prediction]) -> None:
    """Add lines at once; what a kill left of a last line is cut off first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as f:
            f.seek(max(0, f.tell() - 1))
            if f.read() not in (b"", b"\n"):
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
            f.write("".join(to_line(p) + "\n" for p in made).encode())
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None


def task_hash(task: Task) -> str:
    """Content of a task but for the outputs of its queries."""
    return sources.asked_digest(task).hex()


def view(task: Task, query: int, number: int, cfg: DataConfig) -> tuple[Symmetry, Tensor]:
    """Symmetry () and uniform numbers for the order of demos of a view; view 0 is the task as it is.

    Drawn from the content of the task, so that neither the other tasks nor their order matter, nor any hidden output."""
    lots = 1 + len(task.demos)
    u = uniform(11 + lots, int(task_hash(task)[:13], 16), VIEW, query, number)
    if number == 0:
        return identity(), torch.arange(lots).double() / lots
    s = draw_symmetry(u[None, :11], cfg.dihedral, cfg.colours)
    return Symmetry(s.dihedral[0], s.colours[0]), u[11:]


def union(
    made: Iterable[Prediction], keep: Callable[[Vote], bool] = lambda v: True
) -> dict[tuple[str, int], Prediction]:
    """One prediction for each (hash or name of a task, query): a vote (source, view, step) counts once, however often read."""
    parts: dict[tuple[str, int], list[Prediction]] = defaultdict(list)
    for p in made:
        if not p.votes or any(map(keep, p.votes)):
            parts[p.hash or p.task, p.query].append(p)
    found = {}
    for key, ps in parts.items():
        votes: dict[tuple[str, int, int], Vote] = {}
        for v in filter(keep, (v for p in ps for v in p.votes)):
            same = votes.setdefault((v.source, v.view, v.step), v)
            if same is not v:  # asked twice: the same, or nearly, on another machine
                votes[v.source, v.view, v.step] = min(
                    same, v, key=lambda x: (x.q, written(x.grid) or "")
                )
        shown = [p for p in ps if p.canvas is not None]
        canvas = min(shown, key=lambda p: p.source).canvas if shown else None
        large = 0 if votes else max(p.too_large for p in ps)
        spent = math.fsum(p.seconds * sum(map(keep, p.votes)) / len(p.votes) for p in ps if p.votes)
        who = "" if votes else min(p.source for p in ps)
        found[key] = Prediction(
            ps[0].task,
            ps[0].query,
            ps[0].hash,
            [votes[k] for k in sorted(votes)],
            canvas,
            large,
            spent,
            who,
        )
    return found


def joined(
    tasks: Sequence[Task], made: Iterable[Prediction], keep: Callable[[Vote], bool] = lambda v: True
) -> list[Prediction]:
    """One prediction for every query of the tasks, in order; solvers that gave no hash are matched by the task's name."""
    all_, found = union(made, keep), []
    for task in tasks:
        own = task_hash(task)
        for i in range(len(task.queries)):
            parts = [
                all_[key]._replace(hash=own) for key in ((own, i), (task.name, i)) if key in all_
            ]
            found.append(
                union(parts)[own, i]._replace(task=task.name)
                if parts
                else Prediction(task.name, i, own, [])
            )
    return found


def by_source(made: Iterable[Prediction]) -> list[Prediction]:
    """As lines on disk: each of one source."""
    found = []
    for p in made:
        for n, source in enumerate(sorted({v.source for v in p.votes}) or [p.source]):
            votes = [v for v in p.votes if v.source == source]
            found.append(
                p._replace(
                    votes=votes,
                    source=source,
                    canvas=None if n else p.canvas,
                    seconds=0.0 if n else p.seconds,
                )
            )
    return found


# ---------------------------------------------------------------- ranking


class Answer(NamedTuple):
    grid: np.ndarray
    views: int  # votes for it
    q: float  # their mean sigmoid(q)
    share: float  # of all votes, those without an answer too


def log_sum(xs: Sequence[float]) -> float:
    top = max(xs)
    return top + math.log(math.fsum(math.exp(x - top) for x in xs)) if top > -math.inf else top


def summed(field: str, votes: Sequence[Vote]) -> float:
    weights = [getattr(v, field) for v in votes]
    if None in weights:
        hint = " (etrm eval --vote demos makes them)" if field == "demos" else ""
        raise UserError(
            f"vote: some of these votes hold no {field}, as a submission's do{hint}: only count can rank them"
        )
    return log_sum(weights)


# How much the votes for one answer weigh together; ties go by mean sigmoid(q), then by the grid itself.
RULES: dict[str, Callable[[Sequence[Vote]], float]] = {
    "count": len,  # as published
    "probability": functools.partial(summed, "logp"),
    "demos": functools.partial(
        summed, "demos"
    ),  # each vote weighs as much as its context explains the demos
}


def rank(votes: Sequence[Vote], rule: str = "count") -> list[Answer]:
    """Different answers, the best first; the order of votes does not matter. Raises UserError on an unknown rule."""
    if rule not in RULES:
        raise UserError(
            f"vote: unknown rule {rule!r}{nearest(rule, RULES)}; known: {', '.join(RULES)}"
        )
    found: dict[tuple[tuple[int, ...], bytes], list[Vote]] = defaultdict(list)
    for v in votes:
        if v.grid is not None:
            found[v.grid.shape, np.ascontiguousarray(v.grid, np.uint8).tobytes()].append(v)
    ranked = []  # sums are those of fsum, which no order changes
    for (shape, cells), mine in found.items():
        q = math.fsum(1 / (1 + math.exp(-max(-500.0, v.q))) for v in mine) / len(mine)
        answer = Answer(
            np.frombuffer(cells, np.uint8).reshape(shape), len(mine), q, len(mine) / len(votes)
        )
        ranked.append(((-RULES[rule](mine), -q, shape, cells), answer))
    return [answer for _, answer in sorted(ranked, key=lambda pair: pair[0])]


# ---------------------------------------------------------------- scores

PASS = (1, 2, 5, 10, 100, 1000)
SIDES, DEMOS = (10, 15, 20, 30), (1, 2, 3, 4, 10)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n trials (Wilson 1927). Of a mean of n shares it is too wide rather than too narrow."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def with_interval(share: float, n: int, sure: Sequence[float] | None = None) -> str:
    """A share of n as it is printed: 7.0 % (n = 86, 95 % 3.2 to 14.4); Wilson's interval where no other is given."""
    low, high = sure or wilson(share, n)
    return f"{100 * share:.1f} % (n = {n}, 95 % {100 * low:.1f} to {100 * high:.1f})"


def bootstrap(per_task: Sequence[Sequence[float]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean over all queries when tasks are drawn anew (fixed seed); Wilson's where all are 0 or all 1,
    for drawing those anew tells nothing."""
    if (seen := {x for task in per_task for x in task}) in ({0.0}, {1.0}):
        return wilson(seen.pop(), len(per_task))
    total, count = (np.array([f(x) for x in per_task], np.float64) for f in (sum, len))
    rows = np.random.default_rng(0).integers(len(count), size=(draws, len(count)))
    low, high = np.quantile(total[rows].sum(1) / count[rows].sum(1), (0.025, 0.975))
    return float(low), float(high)


class Judged(NamedTuple):
    """One query with a known output."""

    place: int  # of the right answer in the ranking, from 1; 0 where it is not there
    oracle: bool  # some view gave it
    exact: bool  # of the first view: every valid cell of the canvas
    cells: float  # of the first view: share of the valid cells
    shape: bool  # of the first view
    share: float  # of the votes, that the first answer has
    q: float  # mean sigmoid(q) of the first answer
    side: int  # largest side of the demos, the query and the right output
    demos: int


def judge(task: Task, p: Prediction, want: np.ndarray, rule: str) -> Judged:
    ranked = rank(p.votes, rule)
    place = next((i for i, a in enumerate(ranked, 1) if np.array_equal(a.grid, want)), 0)
    exact, cells, shape = False, 0.0, False
    if p.canvas is not None and all(
        a <= b for a, b in zip(want.shape, p.canvas.shape, strict=True)
    ):
        label, first = tokenise(want, p.canvas.shape), untokenise(p.canvas)
        right = (p.canvas == label)[label != PAD]
        exact, cells, shape = (
            bool(right.all()),
            float(right.mean()),
            first is not None and first.shape == want.shape,
        )
    grids = [x for pair in task.demos for x in pair] + [task.queries[p.query][0], want]
    share, q = (ranked[0].share, ranked[0].q) if ranked else (0.0, 0.0)
    return Judged(
        place,
        place > 0,
        exact,
        cells,
        shape,
        share,
        q,
        max(max(x.shape) for x in grids),
        len(task.demos),
    )


def solved(task: Sequence[Judged], k: int) -> list[float]:
    """1 for each query of a task whose right answer is among the first k, else 0."""
    return [float(0 < j.place <= k) for j in task]


def passed(rows: Sequence[Sequence[Judged]], k: int) -> float:
    """Mean over tasks of the share of their queries that are solved."""
    return math.fsum(sum(solved(task, k)) / len(task) for task in rows) / len(rows)


def groups(
    rows: Sequence[Sequence[Judged]], of: Callable[[Judged], int], edges: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """pass@2 with its interval and number of tasks up to each edge, each counted once."""
    found, low = {}, 0
    for edge in edges:
        here = [task for task in rows if low < max(map(of, task)) <= edge]
        if here:
            share = passed(here, 2)
            found[f"<={edge}"] = {
                "n_tasks": len(here),
                "pass@2": share,
                "interval95": {"pass@2": wilson(share, len(here))},
            }
        low = edge
    return found


def reliability(
    judged: Sequence[Judged], of: Callable[[Judged], float], bins: int = 5
) -> list[dict[str, float]]:
    """In bins of a confidence: how many, their mean confidence, the share that is right at the first attempt."""
    found: dict[int, list[Judged]] = defaultdict(list)
    for j in judged:
        found[min(bins - 1, int(of(j) * bins))].append(j)
    mean = lambda xs: math.fsum(xs) / len(xs)  # noqa: E731
    return [
        {
            "n": len(js),
            "confidence": mean([*map(of, js)]),
            "right": mean([j.place == 1 for j in js]),
        }
        for _, js in sorted(found.items())
    ]


def score(
    tasks: Sequence[Task], predictions: Sequence[Prediction], rule: str = "count"
) -> dict[str, Any]:
    """Scores over the queries with a known output; an unanswered one is wrong. Three definitions of pass@k are in use:

    pass@k (the headline, as published): mean over tasks of the share of their queries solved; all_queries/pass@k: share of
    the tasks all of whose queries are solved; per_output/pass@k: share of queries. interval95: Wilson over tasks for the
    first two, a bootstrap over tasks for what is a mean over queries.
    """
    asked = {(p.task, p.query): p for p in predictions}
    rows: list[list[Judged]] = []
    for task in tasks:
        nothing = Prediction(task.name, 0, "", [])
        known = [(i, y) for i, (_, y) in enumerate(task.queries) if y is not None]
        if known:
            rows.append(
                [
                    judge(task, asked.get((task.name, i), nothing._replace(query=i)), y, rule)
                    for i, y in known
                ]
            )
    if not rows:
        raise UserError("no query has a known output: there is nothing to score")
    n, flat = len(rows), [j for task in rows for j in task]
    found: dict[str, Any] = {"n_tasks": n, "n_queries": len(flat), "vote": rule}
    sure: dict[str, tuple[float, float]] = {}
    for k in PASS:
        for name, share in (
            (f"pass@{k}", passed(rows, k)),
            (f"all_queries/pass@{k}", sum(min(solved(t, k)) for t in rows) / n),
        ):
            found[name], sure[name] = share, wilson(share, n)
    means: dict[str, Callable[[Sequence[Judged]], list[float]]] = {
        f"per_output/pass@{k}": functools.partial(solved, k=k) for k in PASS
    }
    for name, of in (
        ("oracle", "oracle"),
        ("exact_match", "exact"),
        ("cell_accuracy", "cells"),
        ("shape_accuracy", "shape"),
    ):
        means[name] = lambda task, of=of: [float(getattr(j, of)) for j in task]  # type: ignore[misc]
    for name, values_of in means.items():
        values = [values_of(task) for task in rows]
        found[name] = math.fsum(x for task in values for x in task) / len(flat)
        sure[name] = bootstrap(values)
    return found | {
        "interval95": sure,
        "by_side": groups(rows, lambda j: j.side, SIDES),
        "by_demos": groups(rows, lambda j: j.demos, DEMOS),
        "reliability": {
            "share": reliability(flat, lambda j: j.share),
            "q": reliability(flat, lambda j: j.q),
        },
        "unanswered": sum(not asked[p.task, p.query].votes for p in predictions),
    }


# What the published encoder's authors called success on tasks held out: above so much.
CRITERIA = (
    ("pass@2", 0.05, "a win"),
    ("exact_match", 0.05, "hoped for"),
    ("pass@100", 0.0, "meaningful"),
)


def verdicts(scores: dict[str, Any]) -> str:
    """A line: which of CRITERIA the scores meet."""
    said = (
        f"{name.replace('_', ' ')} above {100 * least:g} % ({what}): {'yes' if scores[name] > least else 'no'}"
        for name, least, what in CRITERIA
    )
    return f"published criteria: {', '.join(said)}"


# ---------------------------------------------------------------- submissions

ATTEMPTS = ("attempt_1", "attempt_2")


def submission(
    tasks: Sequence[Task], predictions: Sequence[Prediction], rule: str = "count"
) -> dict[str, list[dict[str, Any]]]:
    """Kaggle's format: both attempts at every query of every task. One answer alone is given twice; where there is none,
    the query's input stands for it, so that the file is always valid."""
    asked = {(p.task, p.query): p.votes for p in predictions}
    made: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        made[task.name] = []
        for i, (x, _) in enumerate(task.queries):
            tries = [a.grid for a in rank(asked.get((task.name, i), []), rule)[:2]] or [x]
            made[task.name].append(
                {k: g.tolist() for k, g in zip(ATTEMPTS, (tries[0], tries[-1]), strict=True)}
            )
    return made


def check_submission(path: Path, solutions: Path | None = None) -> dict[str, Any]:
    """A submission as read, every grid of it checked; with a solutions file it must answer just its tasks and queries.

    Raises UserError naming task, query and attempt."""
    raw = sources.read_json(path)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{path}: a submission maps task ids to lists of attempts")
    for name, tries in raw.items():
        if not isinstance(tries, list) or not tries:
            raise UserError(f"{path}: task {name}: needs a list with one entry per query")
        for i, both in enumerate(tries):
            if not isinstance(both, dict) or set(both) != set(ATTEMPTS):
                raise UserError(
                    f"{path}: task {name}, query {i}: needs exactly attempt_1 and attempt_2"
                )
            for key in ATTEMPTS:
                sources.check_grid(both[key], f"{path}: task {name}, query {i}, {key}")
    if solutions:
        wanted = solutions_of(solutions)
        for name, outputs in wanted.items():
            if name not in raw:
                raise UserError(f"{path}: task {name} is missing")
            if len(raw[name]) != len(outputs):
                raise UserError(
                    f"{path}: task {name}: has {len(raw[name])} queries, must have {len(outputs)}"
                )
        if extra := sorted(raw.keys() - wanted.keys()):
            raise UserError(f"{path}: task {extra[0]} is not among those of {solutions}")
    return raw


def solutions_of(path: Path) -> dict[str, list[np.ndarray]]:
    raw = sources.read_json(path)
    if not isinstance(raw, dict) or not all(isinstance(v, list) and v for v in raw.values()):
        raise UserError(f"{path}: must map task ids to lists of grids")
    return {
        k: [sources.check_grid(g, f"{path}: task {k}, query {i}") for i, g in enumerate(v)]
        for k, v in raw.items()
    }


def score_submission(path: Path, solutions: Path) -> dict[str, Any]:
    """pass@1 and pass@2 of a submission against its solutions: mean over tasks, and over outputs (Kaggle's own score)."""
    made, wanted = check_submission(path, solutions), solutions_of(solutions)
    found: dict[str, Any] = {
        "tasks": len(wanted),
        "queries": sum(map(len, wanted.values())),
        "interval95": {},
    }
    for k in (1, 2):
        hits = [
            [
                float(any(both[a] == y.tolist() for a in ATTEMPTS[:k]))
                for both, y in zip(made[t], ys, strict=True)
            ]
            for t, ys in wanted.items()
        ]
        share = found[f"pass@{k}"] = math.fsum(sum(h) / len(h) for h in hits) / len(hits)
        found[f"per_output/pass@{k}"] = sum(map(sum, hits)) / found["queries"]
        found["interval95"] |= {
            f"pass@{k}": wilson(share, len(hits)),
            f"per_output/pass@{k}": bootstrap(hits),
        }
    return found
