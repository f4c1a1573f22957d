"""Submissions in Kaggle's format, and `etrm merge`: joins files of predictions and submissions.

Loaded by name from the commands eval and merge.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import checkpoint, score, sources
from ..config import UserError
from ..data import MAX_SIDE, tokenise
from ..score import Prediction, Vote

ATTEMPTS = ("attempt_1", "attempt_2")
PLACEHOLDER = np.zeros((2, 2), np.uint8)  # twice in Kaggle's sample: no answer


def submission(predictions: Iterable[Prediction]) -> dict[str, list[dict[str, Any]]]:
    """Kaggle's format, of one prediction for every query in order. One answer alone is given twice,
    none as Kaggle's placeholder."""
    attempts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for p in predictions:
        grids = [a.grid.tolist() for a in score.rank(p.votes)[:2]] or [PLACEHOLDER.tolist()]
        attempts[p.task].append(dict(zip(ATTEMPTS, (grids[0], grids[-1]), strict=True)))
    return attempts


def read_submission(path: Path) -> list[Prediction]:
    """A submission's attempts as votes: equal ones are one; a placeholder, null and [] are none."""
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
            given = [k for k in ATTEMPTS if both[k] not in (None, [])]
            grids = [sources.check_grid(both[k], f"{where}, {k}") for k in given]
            grids = [x for x in grids if not np.array_equal(x, PLACEHOLDER)]
            grids = grids[: 1 if len(grids) == 2 and np.array_equal(grids[0], grids[1]) else 2]
            votes = [Vote(x, view=n, source=str(path)) for n, x in enumerate(grids)]
            canvas = tokenise(grids[0], (MAX_SIDE, MAX_SIDE)) if grids else None
            predictions.append(Prediction(name, i, "", votes, canvas, source=str(path)))
    return predictions


def read_votes(path: Path) -> list[Prediction]:
    """The predictions of a .jsonl file, or of a submission."""
    return score.read(path) if path.suffix == ".jsonl" else read_submission(path)


def merge(
    files: Sequence[Path], chosen: Sequence[str], out: str = "", submit: str = ""
) -> dict[str, Any]:
    """Join predictions and submissions into one file; for tasks of the sources, also score them."""
    if submit and not chosen:
        raise UserError("--submission: name the tasks with --data")
    once = {file.resolve(): file for file in files}.values()
    known, lines = score.load_by_source(chosen), [p for file in once for p in read_votes(file)]
    tasks = sum(known.values(), [])
    joint = score.joined(tasks, lines) if chosen else score.unions(lines)
    if not any(p.votes for p in joint):
        raise UserError(f"{', '.join(map(str, files))}: no vote for any of the tasks")
    if out:
        texts = dict.fromkeys(score.to_line(p) + "\n" for p in lines)
        checkpoint.write_text(score.jsonl("--output", out), "".join(texts))
    if submit:
        checkpoint.write_text(Path(submit), json.dumps(submission(joint)))
    votes = sum(len(p.votes) for p in joint)
    return {"votes": votes, "queries": len(joint), **score.judged(known, joint)}
