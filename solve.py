"""Tasks to predictions: votes of views, adaptation to the demos at test time, evaluation.

Axes: B rows = views of queries, R demos asked from the others, T context tokens, D hidden.
Adaptation: arXiv 2411.08706 (search over the context), 2411.07279 (a copy of the weights learns).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import baselines, checkpoint, config, data, etrm, optim, score, sources, train
from .config import Config, InitConfig, UserError
from .data import Symmetry, Task
from .encoders import encoder_of
from .etrm import Context, Encode, Params, tree_map
from .score import Prediction, Vote

# ---------------------------------------------------------------- adaptation to demos

Asked = tuple[data.Batch, Tensor]  # demos as queries; (R,) the row that each belongs to


def ask_demos(
    packed: data.Tasks, cfg: Config, task: Tensor, symmetry: Symmetry, lots: Tensor
) -> Asked | None:
    """Every demo of each row's task (B,), asked from the others under the row's view, on a canvas
    that holds all demos. None where each task has a single one."""
    count = torch.where(packed.n_demos > 1, packed.n_demos, 0)[task]
    if not count.any():
        return None
    row, number = etrm.ragged(count, int(count.sum()))
    pair = packed.first[task][row] + number
    size, to = packed.grids[pair, :, 1:].amax(1), row[:, None].expand(-1, 2)
    size = torch.zeros(len(task), 2, dtype=size.dtype).scatter_reduce(0, to, size, "amax")
    canvas, known = data.snug(size, cfg.data)[row], torch.ones_like(pair, dtype=torch.bool)
    queries = data.Queries(pair, packed.task_of[pair], known, canvas, known)
    view = Symmetry(symmetry.dihedral[row], symmetry.colours[row]), lots[row]
    episodes = data.posed(packed, cfg.data, "test", queries, view=view)
    return data.batch(packed, episodes, cfg.model.raster), row.to(packed.cells.device)


def likelihood(
    params: Params, cfg: Config, demos: Asked, context: Context, rows: int
) -> tuple[Tensor, Tensor]:
    """(gradient (R, T, D) of the summed loss of all ACT steps by the context tokens, zeros where
    they need none; (rows,) mean log-probability of a demo's cell at last, 0 without demos)."""
    tokens, (batch, row), encode = context.tokens, demos, Encode(lambda *_: context)
    model = msgspec.structs.replace(cfg.model, q_weight=0.0)
    grad = torch.zeros(tokens.shape, device=tokens.device)
    carry = etrm.fresh_carry(model, batch.cells, tokens.dtype, tokens.device)
    scale = 2.0**12 if tokens.dtype == torch.float16 else 1.0  # gradients in fp16 would vanish
    for _ in range(cfg.model.halt_max_steps):
        carry, out = etrm.act_step(params, model, encode, carry, batch, None)
        loss = etrm.act_loss(model, out, batch.labels, batch.cells)
        if tokens.requires_grad:
            grad += torch.autograd.grad(loss.total.sum() * scale, [tokens])[0].float() / scale
    value = torch.zeros(rows, device=tokens.device).index_add_(0, row, -loss.lm)
    return grad, value / row.bincount(minlength=rows).clamp(min=1)


def search_context(
    params: Params, cfg: Config, encode: Encode, demos: Asked, context: Context, deadline: float
) -> Context:
    """The context plus the (B, T, D) that, added to the contexts of the *other* demos, makes each
    demo likeliest: gradient steps from zero, the best kept for each row by itself."""
    tokens, (batch, row) = context.tokens, demos
    with torch.no_grad():
        base = encode.read(params.encoder, batch)
    added, best_added = torch.zeros(2, *tokens.shape, device=tokens.device)
    best = torch.full((len(tokens),), -torch.inf, device=tokens.device)
    opt = torch.optim.Adam([added], lr=cfg.solve.adapt_lr or 0.1)
    for step in range(cfg.solve.adapt_steps + 1):
        last = step == cfg.solve.adapt_steps or time.monotonic() > deadline
        moved = (base.tokens + added.to(tokens.dtype)[row]).requires_grad_(not last)
        with torch.enable_grad():
            changed = base._replace(tokens=moved)
            grad, value = likelihood(params, cfg, demos, changed, len(tokens))
        better = value > best
        best = torch.where(better, value, best)
        best_added = torch.where(better[:, None, None], added, best_added)
        if last:
            break
        finite = grad.nan_to_num(0.0, 0.0, 0.0)
        added.grad = torch.zeros_like(added).index_add_(0, row, finite)
        opt.step()
    return context._replace(tokens=tokens + best_added.to(tokens.dtype))


def adaptation_config(cfg: Config) -> Config:
    """The training run of a full adaptation: training's own, leave-one-out, on the task's demos."""
    if cfg.model.encoder.kind == "table":
        raise UserError("solve.adapt: a table's rows are its tasks': there is nothing to adapt")
    replace, solve = msgspec.structs.replace, cfg.solve
    shards = 1 if train.undivided(cfg.model) else 2
    steps = replace(cfg.train, batch=16, shards=shards, steps=solve.adapt_steps)
    frozen = {k: n for k, n in cfg.optimizer.freeze.items() if n == 0}  # for ever
    rate = {"lr": solve.adapt_lr or 1e-3, "warmup": 0, "final_lr": 0.1}
    optimizer = replace(cfg.optimizer, freeze=frozen, **rate)
    cfg = replace(cfg, init_from=InitConfig(), eval=replace(cfg.eval, on="train"))
    drawn = replace(cfg.data, query="leave_one_out", share={})
    return replace(cfg, data=drawn, optimizer=optimizer, train=steps)


def adapt_weights(params: Params, cfg: Config, task: Task, deadline: float) -> Params:
    """Weights trained on the task's demos until all slots are right in three steps running, or the
    steps or the time are over; unchanged where no demo fits the canvas of the others."""
    cfg, task = adaptation_config(cfg), task._replace(queries=[])
    queries = data.queries(data.pack([task]), cfg.data.query, cfg.data)
    if not queries.fits.any() or time.monotonic() > deadline:
        return params
    setup = train.setup(cfg, given=[task])
    copy = {}
    for path, weight in etrm.leaves(params).items():
        copy[path] = weight.detach().to(setup.device, torch.float32).clone()
        copy[path].requires_grad_(setup.params[path].requires_grad)
    setup = setup._replace(params=copy)
    state, begun = train.fresh_state(setup), time.monotonic()
    right, steps = 0, cfg.train.steps  # right: steps running in which all slots were
    while (taken := state.progress.step) < steps and right < 3:
        try:
            step, _ = train.advance(setup, state)
        except UserError:  # a loss or gradient that is not finite: the weights stay as they were
            break
        right = right + 1 if train.metrics_row(step.sums)["all/exact"] == 1 else 0
        pace = max(time.monotonic() - begun, 1e-9) / (taken + 1)
        steps = int(min(cfg.train.steps, max(deadline - begun, 0.0) / pace))
        shorter = msgspec.structs.replace(cfg.train, steps=max(steps, 1))  # the rate falls in time
        setup = setup._replace(cfg=msgspec.structs.replace(cfg, train=shorter))
    return etrm.rebuild(setup.like, {k: v.detach() for k, v in copy.items()})


# ---------------------------------------------------------------- views of queries to votes


class Solver(NamedTuple):
    """A checkpoint and how it is asked; or a solver without weights, made by hand."""

    path: Path  # a hand-made one's name
    cfg: Config
    source: str  # hash of the weights and of all else that its answers depend on
    params: Params
    meta: dict[str, Any]
    pairs: Tensor  # (N, 16) uint8 digests of the pairs that it was trained on
    predict: Callable[[Sequence[Task], Sequence[int]], Iterator[list[Prediction]]] | None = None


class Questions(NamedTuple):
    """Every query of some tasks, a row each; outputs are hidden."""

    tasks: Sequence[Task]
    packed: data.Tasks  # on the device
    queries: data.Queries
    blank: list[Prediction]  # of each row, without votes
    table_row: Tensor | None  # (tasks,) of each task in a table of tasks


def questions_of(
    params: Params, cfg: Config, tasks: Sequence[Task], views: int, source: str = ""
) -> Questions:
    """All queries of tasks, on the device. Raises UserError on a task without one."""
    if empty := [t.name for t in tasks if not t.queries]:
        raise UserError(f"task {empty[0]}: has no query (no test pair) to answer")
    hidden = [sources.hidden(t) for t in tasks]
    packed = data.pack(hidden, optim.hardware(cfg)[0])
    queries = data.queries(packed, "test", cfg.data)
    blank = [p._replace(source=source) for p in score.joined(hidden, [])]
    return Questions(hidden, packed, queries, blank, baselines.numbers(params, cfg, hidden, views))


Units = Sequence[tuple[int, int]]  # rows of the questions, and the view of each


class Posed(NamedTuple):
    """Some views of queries as the model is asked them."""

    batch: data.Batch
    symmetry: Symmetry  # (B,)
    lots: Tensor  # (B, M) that order the demos
    canvas: list[tuple[int, int]]


def pose(questions: Questions, cfg: Config, units: Units) -> Posed:
    """The batch that asks these views of queries."""
    rows, view = torch.tensor(units).T
    queries, table_row, drawn = data.chosen(questions.queries, rows), None, []
    for (row, number), t in zip(units, queries.task.tolist(), strict=True):
        query = questions.blank[row].query
        drawn.append(score.view(questions.tasks[t], query, number, cfg.data))
    symmetry = Symmetry(*(torch.stack([s[i] for s, _ in drawn]) for i in range(2)))
    lots = pad_sequence([u for _, u in drawn], batch_first=True)
    if questions.table_row is not None:
        owner = questions.table_row[queries.task]
        symmetry = data.row_symmetry(cfg.data, cfg.run.seed, owner, view)
        table_row = owner * cfg.data.symmetries + view
    episodes = data.posed(questions.packed, cfg.data, "test", queries, view=(symmetry, lots))
    episodes = episodes._replace(row=table_row)
    batch = data.batch(questions.packed, episodes, cfg.model.raster)
    return Posed(batch, symmetry, lots, [(h, w) for h, w in episodes.canvas.tolist()])


def answer_batch(
    params: Params, cfg: Config, questions: Questions, deadline: float, units: Units
) -> list[Prediction]:
    """The vote of each (row, view), a prediction each; params are in the compute dtype."""
    posed, encode = pose(questions, cfg, units), encoder_of(cfg.model)
    if cfg.solve.adapt == "context":
        if encode.recur or encode.step:
            raise UserError("solve.adapt: this model has no single context to search")
        with torch.no_grad():
            context = encode.read(params.encoder, posed.batch)
        task = questions.queries.task[[r for r, _ in units]]
        if demos := ask_demos(questions.packed, cfg, task, posed.symmetry, posed.lots):
            context = search_context(params, cfg, encode, demos, context, deadline)
        encode = Encode(lambda *_: context)  # whatever it reads
    steps, dtype = cfg.solve.act_steps or cfg.model.halt_max_steps, optim.hardware(cfg)[1]
    out, spent = etrm.think(params, cfg.model, encode, posed.batch, dtype, steps, cfg.solve.leave)
    back, answers = data.inverse(posed.symmetry), []
    q = out.q_halt.float().nan_to_num(-1e9).tolist()
    for b, logits in enumerate(out.logits.float().split(posed.batch.cells)):
        p, view = questions.blank[units[b][0]], units[b][1]
        canvas = logits.argmax(-1).view(posed.canvas[b]).cpu().numpy()
        finite = logits.amax(-1).isfinite().all()  # the maximum of a row with a NaN is NaN
        grid = data.untokenise(canvas) if finite else None
        if grid is not None:
            grid = data.apply(Symmetry(back.dihedral[b], back.colours[b]), grid)
        vote = Vote(grid, q[b], view, int(spent[b]), p.source)
        answers.append(p._replace(votes=[vote], canvas=None if view else canvas))
    return answers


def predictions(
    solver: Solver, questions: Questions, units: Units, deadline: float
) -> Iterator[list[Prediction]]:
    """Batch by batch, the votes of these (row, view), small canvases first; after `deadline`
    (time.monotonic) no batch begins."""
    cfg, (device, dtype) = solver.cfg, optim.hardware(solver.cfg)
    asked = data.chosen(questions.queries, torch.tensor([row for row, _ in units]).long())
    demos = questions.packed.n_demos[asked.task]  # each is asked in a search over the context, too
    parts = train.portions(asked, cfg.model, 1 + demos * (cfg.solve.adapt == "context"))
    batches = [[units[i] for i in part.tolist()] for part in parts]
    cast = tree_map(lambda x: x.to(device, dtype), solver.params)
    vote_on = functools.partial(answer_batch, cast, cfg, questions, deadline)
    for first in range(0, len(batches), optim.THREADS):
        group, begun = batches[first : first + optim.THREADS], time.monotonic()
        if begun > deadline:
            return
        answers = optim.side_by_side(vote_on, group, device)
        seconds = (time.monotonic() - begun) / sum(map(len, group))
        for votes in answers:
            yield score.unions(p._replace(seconds=seconds) for p in votes)


NO_PAIRS = torch.zeros(0, 16, dtype=torch.uint8)
SUBMISSIONS = "etrm_arc.extras.submissions"  # the module that writes them
SOLVERS = {"experts": "etrm_arc.extras.experts"}  # name: a module with `predict`
FREE = ("train.device", "train.dtype", "data.max_side", "solve.")  # of a checkpoint's config


def changed(raw: dict[str, Any], sets: Sequence[str], where: str) -> Config:
    """The config of `raw`, of which `sets` change FREE fields."""
    for item in sets:
        if not item.partition("=")[0].strip().startswith(FREE):
            raise UserError(f"--set {item}: only {', '.join(FREE)}* may change here")
        config.set_item(raw, item)
    return config.parse_config(raw, "--set" if sets else where)


def opened(path: str | Path, sets: Sequence[str] = ()) -> Solver:
    """A checkpoint's EMA with the config it was trained with; `sets` may change FREE fields."""
    c = checkpoint.load(path)
    cfg = changed(c.meta["config"], sets, str(c.path))
    if (cfg.data.canvas or cfg.data.max_side) > (largest := cfg.model.raster):
        raise UserError(f"data.max_side: must be at most model.raster = {largest}")
    how = {k: v for k, v in msgspec.to_builtins(cfg.solve).items() if k != "views"}
    learns = [cfg.optimizer, cfg.run.seed] if cfg.solve.adapt == "full" else []
    dtype = str(optim.hardware(cfg)[1])
    decides = msgspec.to_builtins([how, cfg.model, cfg.data, *learns, dtype])
    content = checkpoint.digest_of(etrm.leaves(c.ema), json.dumps(decides))
    source = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    return Solver(c.path, cfg, source, c.ema, c.meta, c.pairs)


def solver_of(name: str | Path, sets: Sequence[str] = ()) -> Solver:
    """A checkpoint that can be asked, or a hand-made solver by its name."""
    if str(name) in SOLVERS and not Path(name).exists():
        module = importlib.import_module(SOLVERS[str(name)])
        cfg = changed({}, sets, str(name))
        return Solver(Path(name), cfg, module.SOURCE, Params((), ()), {}, NO_PAIRS, module.predict)
    solver = opened(name, sets)
    if not all(x.isfinite().all() for x in etrm.leaves(solver.params).values()):
        raise UserError(f"{solver.path}: its weights are no numbers (NaN): the run diverged")
    return solver


def answer(
    solver: Solver, tasks: Sequence[Task], views: range, lines: list[Prediction], deadline: float
) -> Iterator[list[Prediction]]:
    """Batch by batch, the solver's predictions that are not among the lines yet. With full
    adaptation each task has a share of the time, by the cells of its largest demo grid."""
    questions = questions_of(solver.params, solver.cfg, tasks, views.stop, solver.source)
    done = {(p.hash, p.query, v.view) for p in lines if p.source == solver.source for v in p.votes}
    by_task: dict[int, list[tuple[int, int]]] = {}
    for row, p in enumerate(questions.blank):
        units = [(row, v) for v in views if (p.hash, p.query, v) not in done]
        if units and questions.queries.canvas[row, 0]:
            by_task.setdefault(int(questions.queries.task[row]), []).extend(units)
    if not solver.predict and solver.cfg.solve.adapt != "full":
        every_unit = [unit for units in by_task.values() for unit in units]
        yield from predictions(solver, questions, every_unit, deadline)
        return
    pairs = {t: questions.tasks[t].demos for t in by_task}
    largest = {t: max(max(x.size, y.size) for x, y in demos) for t, demos in pairs.items()}
    left = sum(largest.values())
    for t, units in by_task.items():
        if (begun := time.monotonic()) > deadline:
            return
        if solver.predict:
            yield from solver.predict([questions.tasks[t]], sorted({v for _, v in units}))
            continue
        learn_until = begun + 0.8 * (deadline - begun) * largest[t] / left  # 0.2: to answer
        params = adapt_weights(solver.params, solver.cfg, questions.tasks[t], learn_until)
        learning = time.monotonic() - begun  # counted with the task's first votes
        for part in predictions(solver._replace(params=params), questions, units, deadline):
            yield [part[0]._replace(seconds=part[0].seconds + learning), *part[1:]]
            learning = 0.0
        left -= largest[t]


def ask(solver: Solver, tasks: Sequence[Task], views: int = 0) -> list[Prediction]:
    """Votes for every query of the tasks, in order; views of each, 0: as configured."""
    parts = answer(solver, tasks, range(views or solver.cfg.solve.views), [], math.inf)
    return score.joined(tasks, [p for part in parts for p in part])


def predict(
    params: Params, cfg: Config, tasks: Task | Sequence[Task], views: int = 0
) -> list[Prediction]:
    """`ask` of weights, for tasks made in Python. Raises UserError on grids that are none."""
    tasks = [sources.check(t) for t in ([tasks] if isinstance(tasks, Task) else tasks)]
    return ask(Solver(Path(), cfg, "", params, {}, NO_PAIRS), tasks, views)


# ---------------------------------------------------------------- evaluation


def predictions_path(solver: Solver) -> Path:
    """predictions.jsonl in the solver's run folder; runs/<name> here where it has none."""
    folder = solver.path.parent
    is_run = (folder / "run.json").is_file() and os.access(folder, os.W_OK)
    return (folder if is_run else Path("runs") / solver.path.stem) / "predictions.jsonl"


def joint(
    tasks: Sequence[Task], lines: Sequence[Prediction], voters: Sequence[Solver], views: int
) -> list[Prediction]:
    """One prediction for each query of the tasks: the first views of some solvers' lines."""
    chosen, names = [], {s.source for s in voters}
    for p in (p for p in lines if p.source in names and p.votes):
        votes = [v for v in p.votes if v.view < views]
        chosen.append(p._replace(votes=votes, seconds=p.seconds * len(votes) / len(p.votes)))
    return score.joined(tasks, chosen)


def facts_of(solvers: Sequence[Solver], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How the solvers were asked, what is known of their training, and what it took."""
    steps = [v.step for p in predictions for v in p.votes if v.step]
    ways = {f"adaptation {s.cfg.solve.adapt}" if s.meta else "hand-made" for s in solvers}
    guards = set()
    for s in (s for s in solvers if s.meta):
        finding = str(msgspec.convert(s.meta["finding"], sources.Finding))
        guards.add(finding if s.cfg.data.dev else f"{finding}; NO DEV SPLIT was held out")
    n_tasks, n_votes = len({p.task for p in predictions}), sum(len(p.votes) for p in predictions)
    facts: dict[str, Any] = {"checkpoints": [str(s.path) for s in solvers], "votes": n_votes}
    facts |= {"adaptation": " and ".join(sorted(ways)), "guard": "; ".join(sorted(guards))}
    facts["act_steps"] = sum(steps) / len(steps) if steps else None
    return facts | {"seconds_per_task": sum(p.seconds for p in predictions) / n_tasks}


def evaluate(
    names: Sequence[str | Path], data_sources: Sequence[str] = (), sets: Sequence[str] = (),
    predictions_file: str = "", budget: float = math.inf, shard: str = "1/1", submit: str = "",
    say: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:  # fmt: skip
    """Ask solvers, which vote together, then score what is on disk: no output is seen before that.
    The default data is the dev split of the first, whose number of views is that of all. budget:
    seconds, after which no batch begins. `submit` is written after every round of views."""
    deadline = time.monotonic() + budget
    solvers = [solver_of(name, sets) for name in names]
    first, views = solvers[0], solvers[0].cfg.solve.views
    chosen = tuple(data_sources) or first.cfg.data.dev
    if not chosen:
        raise UserError(f"{first.path}: trained without a dev split; name the tasks with --data")
    limit = 0 if data_sources else first.cfg.data.max_eval_tasks
    loaded = sum(score.load_by_source(chosen, limit, shard, hide=True).values(), [])
    tasks = [task for task in loaded if task.queries]
    if not tasks:
        raise UserError(f"{', '.join(chosen)}: no query (no test pair) in shard {shard}")
    file = score.jsonl("--predictions", predictions_file or predictions_path(first))
    lines = score.read(file) if file.exists() else []

    is_stream = Path(submit).exists() and not Path(submit).is_file()  # written to once
    wanted, votes = len(solvers) * views * sum(len(t.queries) for t in tasks), 0
    edges = [0, 0, views]  # of rounds of views; in the first only a submission: can it be written?
    if budget < math.inf and all(s.cfg.solve.adapt != "full" for s in solvers):
        edges[2:2] = [2**i for i in range(views) if 2**i < views]  # all queries alike get views
    for part in map(range, edges, edges[1:]):
        for solver in solvers:
            for batch in answer(solver, tasks, part, lines, deadline):
                score.append(file, map(score.to_line, batch))
                lines += batch
                votes += sum(len(p.votes) for p in batch)
                say(min(1.0, votes / wanted))
        predictions = joint(tasks, lines, solvers, views)
        votes = sum(len(p.votes) for p in predictions)
        if submit and (part.stop == views or not is_stream):
            submissions = importlib.import_module(SUBMISSIONS)
            checkpoint.write_text(Path(submit), json.dumps(submissions.submission(predictions)))
    if budget < math.inf and not votes:
        raise UserError(f"--budget: {budget / 60:g} minutes are not enough for a single view")
    known, learned = score.load_by_source(chosen, limit, shard), [s for s in solvers if s.meta]
    held_out = [source for s in learned for source in s.cfg.data.held_out]
    scores = score.judged(known, predictions, held_out)
    if "pass@2" in scores:
        everything = sum(known.values(), [])
        if learned:
            scores["held_out"] = all(score.held_out(s.pairs, everything) for s in learned)
        if 0 < len(learned) < len(solvers):
            alone = {str(s.path): joint(tasks, lines, [s], views) for s in solvers}
            scores["by_solver"] = {k: score.score(everything, ps) for k, ps in alone.items()}
    facts = {"data": list(chosen), "views": views, "predictions": str(file)}
    facts["without_query"] = len(loaded) - len(tasks)
    return facts | facts_of(solvers, predictions) | scores


def overfit(cfg: Config, fit: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Train as the config says; the last evaluation of the training set itself, as text too."""
    folder, again = cfg.run.dir, 1
    while Path(folder, "run.json").exists():  # a measurement starts anew and overwrites nothing
        again += 1
        folder = f"{cfg.run.dir}-{again}"
    run = msgspec.structs.replace(cfg.run, dir=folder)
    row, weights = fit(msgspec.structs.replace(cfg, run=run)), cfg.eval.weights[0]
    if f"train/{weights}/own/exact" not in row:
        raise UserError(f"{folder}: stopped before its first evaluation")
    exact, cells, n = (row[f"train/{weights}/own/{k}"] for k in ("exact", "cell_accuracy", "n"))
    text = f"{row['step']} steps, {row['samples']:,} sample-steps, {row['seconds']:.0f} s\n"
    text += f"{weights} weights: exact match {score.with_interval(exact, int(n))}"
    text += f", cells {100 * cells:.2f} %"
    result = {"exact_match": exact, "cell_accuracy": cells, "pairs": int(n), "text": text}
    return result | {"steps": row["step"], "samples": row["samples"], "seconds": row["seconds"]}
