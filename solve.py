"""Views -> predictions -> votes -> scores. One forward path: `etrm.think`, the one that training watches itself with.

Axes: R rows = queries of one batch, M cells of their canvases.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from . import checkpoint, config, data, etrm, sources, train
from .config import Config
from .data import Symmetry, Task, UserError
from .encoders import encoder_of
from .etrm import Params, act_loss, tree_map

Vote = tuple[np.ndarray | None, float]  # a view's answer in the task's own frame (None: no answer) and its q


class Prediction(NamedTuple):
    """All views of one query."""

    task: str
    query: int
    votes: list[Vote]
    exact: bool | None  # of the first view, the task as it is; None where the output is hidden
    cell_accuracy: float | None
    too_large: int  # canvas that the query would need, 0 where it has one


def view(task: Task, query: int, number: int, cfg: data.DataConfig) -> tuple[Symmetry, torch.Tensor]:
    """Symmetry () and uniform numbers for the order of demos of a view; view 0 is the task as it is.

    Drawn from the content of the task, so that neither the other tasks nor their order matter."""
    key = int.from_bytes(sources.task_digest(task)[:7], "little")
    lots = 1 + len(task.demos)
    u = data.uniform(11 + lots, key, data.VIEW, query, number)
    if number == 0:
        return data.identity(), torch.arange(lots) / lots
    s = data.draw_symmetry(u[None, :11], cfg.dihedral, cfg.colours)
    return Symmetry(s.dihedral[0], s.colours[0]), u[11:]


def predict(
    params: Params, cfg: Config, tasks: Sequence[Task], views: int = 1, say: Callable[[float], None] = lambda done: None
) -> list[Prediction]:
    """Answers of every query of the tasks under `views` views each, in the order of tasks and queries.

    Hidden outputs are fine. Raises UserError when a task has no query.
    """
    for task in tasks:
        if not task.queries:
            raise UserError(f"task {task.name}: has no query (no test pair) to answer")
    device = train.device_of(cfg.train.device)
    dtype = train.dtype_of(cfg.train.dtype, device)
    cast, encode = tree_map(lambda x: x.to(device, dtype), params), encoder_of(cfg.model)
    packed = data.pack(tasks, device)
    asked = data.queries(packed, "test", cfg.data.canvases)
    number = asked.pair - packed.first[asked.task] - packed.n_demos[asked.task]
    votes: list[list[Vote]] = [[] for _ in asked.pair]
    first: list[tuple[bool, float] | None] = [None] * len(asked.pair)
    work = [(rows, v) for rows in train.portions(asked, cfg.model, cfg.eval.tokens) for v in range(views)]
    for done, (rows, v) in enumerate(work):
        seen = [view(tasks[int(asked.task[r])], int(number[r]), v, cfg.data) for r in rows]
        symmetry = Symmetry(*(torch.stack([s[i] for s, _ in seen]) for i in range(2)))
        lots = torch.nn.utils.rnn.pad_sequence([u for _, u in seen], batch_first=True)
        episodes = data.posed(packed, cfg.data, "test", data.chosen(asked, rows), view=(symmetry, lots))
        batch = data.batch(packed, episodes, cfg.data, cfg.model.raster)
        out, _ = etrm.think(cast, cfg.model, encode, batch, dtype, cfg.model.halt_max_steps, cfg.eval.leave)
        tokens = out.logits.float().argmax(-1).cpu().split(batch.cells)
        back = data.inverse(symmetry)
        for i, r in enumerate(rows.tolist()):
            grid = data.untokenise(tokens[i].view(*episodes.canvas[i].tolist()).numpy())
            ours = None if grid is None else data.apply(Symmetry(back.dihedral[i], back.colours[i]), grid)
            votes[r].append((ours, float(out.q_halt[i])))
        if v == 0:
            loss = act_loss(cfg.model, out, batch.labels, batch.cells)
            for i, r in enumerate(rows.tolist()):
                if loss.labelled[i]:
                    fits = bool(asked.fits[r])
                    first[r] = (bool(loss.exact[i]) and fits, float(loss.cell_accuracy[i]) * fits)
        say((done + 1) / len(work))
    sides = packed.grids[:, :, 1:].amax((1, 2))
    made = []
    for r, (pair, t) in enumerate(zip(asked.pair.tolist(), asked.task.tolist(), strict=True)):
        known = tasks[t].queries[int(number[r])][1] is not None
        exact, cells = first[r] or ((False, 0.0) if known else (None, None))
        begin = int(packed.first[t])
        need = max(int(sides[begin : begin + int(packed.n_demos[t])].max()), int(packed.grids[pair, 0, 1:].max()))
        large = 0 if asked.canvas[r, 0] else need
        made.append(Prediction(tasks[t].name, int(number[r]), votes[r], exact, cells, large))
    return made


class Answer(NamedTuple):
    grid: np.ndarray
    views: int  # that gave it
    q: float  # their mean sigmoid(q)


def rank(votes: Sequence[Vote]) -> list[Answer]:
    """Answers by (number of views, mean sigmoid(q)), as published; ties by the grid itself, so that no order matters."""
    found: dict[tuple[tuple[int, ...], bytes], list[float]] = {}
    for grid, q in votes:
        if grid is not None:
            key = (grid.shape, np.ascontiguousarray(grid, np.uint8).tobytes())
            found.setdefault(key, []).append(1 / (1 + math.exp(-max(-500.0, q))))
    order = sorted(found.items(), key=lambda kv: (-len(kv[1]), -math.fsum(kv[1]) / len(kv[1]), kv[0]))
    return [Answer(np.frombuffer(cells, np.uint8).reshape(shape), len(qs), math.fsum(qs) / len(qs)) for (shape, cells), qs in order]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n trials (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def score(tasks: Sequence[Task], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """pass@1 and pass@2: mean over tasks of the share of their queries solved; exact match, cell accuracy: over queries.

    Only queries with a known output count; an unanswered one is wrong."""
    solutions = {(t.name, i): y for t in tasks for i, (_, y) in enumerate(t.queries) if y is not None}
    per_task: dict[str, list[tuple[bool, bool]]] = {}
    exact, cells = [], []
    for p in predictions:
        if (want := solutions.get((p.task, p.query))) is None:
            continue
        tries = [np.array_equal(c.grid, want) for c in rank(p.votes)[:2]]
        per_task.setdefault(p.task, []).append((any(tries[:1]), any(tries)))
        exact.append(bool(p.exact))
        cells.append(p.cell_accuracy or 0.0)
    if not exact:
        raise UserError("no query has a known output: there is nothing to score (etrm solve answers without scoring)")
    n = len(per_task)
    means = [math.fsum(sum(s[k] for s in solved) / len(solved) for solved in per_task.values()) / n for k in (0, 1)]
    return {
        "pass@1": means[0],
        "pass@2": means[1],
        "exact_match": sum(exact) / len(exact),
        "cell_accuracy": math.fsum(cells) / len(cells),
        "n_tasks": n,
        "n_queries": len(exact),
        "wilson95": {
            "pass@1": wilson(means[0], n),
            "pass@2": wilson(means[1], n),
            "exact_match": wilson(sum(exact) / len(exact), len(exact)),
        },
    }


# ---------------------------------------------------------------- a checkpoint against a set of tasks


def opened(path: str | Path, sets: Sequence[str] = ()) -> tuple[checkpoint.Checkpoint, Config]:
    """A checkpoint and the config it was trained with; `sets` may change where and in what portions it is run."""
    c = checkpoint.load(path)
    raw = c.meta["config"]
    for item in sets:
        if item.partition("=")[0].strip() not in ("train.device", "train.dtype", "eval.tokens", "eval.leave"):
            raise UserError(f"--set {item}: of a checkpoint's config train.device, train.dtype, eval.tokens and eval.leave may change")
        config.set_item(raw, item)
    return c, config.parse_config(raw, str(c.path))


def evaluate(
    path: str | Path, data_sources: Sequence[str] = (), views: int = 1, weights: str = "ema",
    say: Callable[[float], None] = lambda done: None, sets: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Score a checkpoint on sources (its dev split by default), and say what that score is worth: was it held out?"""
    c, cfg = opened(path, sets)
    chosen = tuple(data_sources) or cfg.data.dev
    if not chosen:
        raise UserError(f"{c.path}: was trained without a dev split; name the tasks with --data")
    tasks = sources.load(chosen, 0 if data_sources else cfg.data.max_eval_tasks)
    result = score(tasks, predict(c.ema if weights == "ema" else c.params, cfg, tasks, views, say))
    finding = msgspec.convert(c.meta["finding"], sources.Finding)
    result |= {"data": list(chosen), "views": views, "weights": weights, "held_out": held_out(cfg, c.meta, tasks)}
    result |= {"guard": str(finding), "checkpoint": str(c.path), "step": c.meta.get("step")}
    kept_out = {sources.task_digest(t) for t in sources.load(("arc1:evaluation", *cfg.data.held_out))}
    if any(sources.task_digest(t) in kept_out for t in tasks):
        result["look"] = look(c.path, chosen, tasks, result)
    return result


def held_out(cfg: Config, meta: dict[str, Any], tasks: Sequence[Task]) -> bool | None:
    """Whether no evaluated task shares a pair with what was trained on; None where the training data is not here."""
    try:
        trained, _, _ = sources.prepare(cfg.data)
    except UserError:
        return None
    if sources.set_hash(trained) != meta["data"]:
        return None
    try:
        sources.guard(trained, [], tasks, "refuse", cfg.data.guard_min_cells)
    except UserError:
        return False
    return True


def look(path: Path, chosen: Sequence[str], tasks: Sequence[Task], result: dict[str, Any]) -> int | None:
    """Count this look at the held-out set beside the checkpoint; None where nothing can be written there."""
    row = {"data": list(chosen), "hash": sources.set_hash(tasks), "pass@2": result["pass@2"], "checkpoint": path.name}
    row["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    file = path.parent / "looks.jsonl"
    try:
        with open(file, "a+", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.seek(0)
            return sum(json.loads(line)["hash"] == row["hash"] for line in f)
    except (OSError, ValueError, KeyError):
        return None


def answers(
    path: str | Path, task_file: str, views: int, sets: Sequence[str] = ()
) -> list[tuple[Task, list[tuple[Prediction, list[Answer]]]]]:
    """Each task of a file with, per query, the ranked answers."""
    c, cfg = opened(path, sets)
    tasks = sources.load([task_file])
    by_task: dict[str, list[tuple[Prediction, list[Answer]]]] = {}
    for p in predict(c.ema, cfg, tasks, views):
        by_task.setdefault(p.task, []).append((p, rank(p.votes)))
    return [(t, by_task[t.name]) for t in tasks]


PUBLISHED = "published, 32 tasks, augmented, from a pretrained decoder: 86 % of cells (61,440 sample-steps); no exact match given"


def overfit(cfg: Config, fit: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Train as the config says, then ask every pair of the training set with the raw weights, and name the wrong ones."""
    folder, again = Path(cfg.run.dir), 1
    while checkpoint.manifests(folder):  # a measurement starts anew and overwrites nothing
        again += 1
        folder = Path(f"{cfg.run.dir}-{again}")
    cfg = msgspec.structs.replace(cfg, run=msgspec.structs.replace(cfg.run, dir=str(folder)))
    ran = fit(cfg)
    c = checkpoint.load(Path(cfg.run.dir) / "last.safetensors")
    tasks, _, _ = sources.prepare(cfg.data)
    packed = data.pack(tasks)
    asked = data.queries(packed, cfg.data.query, cfg.data.canvases)
    device = train.device_of(cfg.train.device)
    dtype = train.dtype_of(cfg.train.dtype, device)
    raw, ema = (train.probe(p, cfg, packed, cfg.data.query, dtype) for p in (c.params, c.ema))
    wrong = [f"{tasks[t].name}[{p - int(packed.first[t])}]" for p, t in ((p, int(packed.task_of[p])) for p in raw["wrong"])]
    sizes = data.histogram(asked.canvas.amax(1))
    text = (
        f"{len(tasks)} tasks, {raw['n']} pairs asked, canvases {', '.join(f'{k}: {v}' for k, v in sizes.items())}\n"
        f"raw weights: exact match {100 * raw['exact']:.1f} %, cells {100 * raw['cell_accuracy']:.2f} %; "
        f"EMA: {100 * ema['exact']:.1f} %, {100 * ema['cell_accuracy']:.2f} %\n"
        f"{ran['step']} steps, {ran['samples']:,} sample-steps, {ran['seconds']:.0f} s\n"
        f"wrong: {', '.join(wrong) or 'none'}\n{PUBLISHED}"
    )
    return {
        "exact_match": raw["exact"], "cell_accuracy": raw["cell_accuracy"], "steps": ran["step"],
        "seconds": ran["seconds"], "samples": ran["samples"], "pairs": raw["n"], "wrong": wrong,
        "ema": {"exact_match": ema["exact"], "cell_accuracy": ema["cell_accuracy"]}, "text": text,
    }  # fmt: skip
