"""Tasks to predictions: votes of views, adaptation to the demos at test time, evaluation.

Axes: B rows = views of queries, R demos asked from the others, T context tokens, D hidden.
Adaptation is after Bonnet & Macfarlane, "Searching Latent Program Spaces" (arXiv 2411.08706: search
over the context) and Akyürek et al., "The Surprising Effectiveness of Test-Time Training for
Abstract Reasoning" (arXiv 2411.07279: train a copy of the weights).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from . import baselines, checkpoint, config, data, etrm, optim, score, sources, train
from .config import Config, InitConfig, UserError
from .data import Symmetry, Task
from .encoders import encoder_of
from .etrm import Context, Encode, Params, tree_map
from .optim import learning_rate, update
from .score import Prediction, Vote

# ---------------------------------------------------------------- demos as questions

Asked = tuple[data.Batch, Tensor]  # demos as queries; (R,) the row that each belongs to


def ask_demos(
    tasks: Sequence[Task], view: tuple[Symmetry, Tensor], cfg: Config, device: torch.device
) -> Asked | None:
    """Every demo of each row's task, asked from the others under the row's view, and its row (R,).

    It lies on a canvas that holds all demos. None where each task has a single one."""
    unique = list({id(t): t for t in tasks}.values())
    packed = data.pack([t._replace(queries=[]) for t in unique], device)
    first = packed.first.tolist()
    size = [packed.grids[a:b, :, 1:].amax((0, 1)) for a, b in zip(first, first[1:], strict=False)]
    canvas = data.snug(torch.stack(size), cfg.data)
    spans = {id(t): range(*first[k : k + 2]) for k, t in enumerate(unique) if len(t.demos) > 1}
    asked = [(row, pair) for row, t in enumerate(tasks) for pair in spans.get(id(t), ())]
    if not asked:
        return None
    row, pair = torch.tensor(asked).T
    task_of, true = packed.task_of[pair], torch.ones_like(pair, dtype=torch.bool)
    queries = data.Queries(pair, task_of, true, canvas[task_of], true)
    lots = pad(view[1], (0, 99))[row, : 1 + int(packed.first.diff().max())]
    turned = Symmetry(view[0].dihedral[row], view[0].colours[row])
    episodes = data.posed(packed, cfg.data, "leave_one_out", queries, view=(turned, lots))
    return data.batch(packed, episodes, cfg.model.raster), row.to(device)


# ---------------------------------------------------------------- a search over the context

FP16_SCALE = 2.0**12  # of a loss in fp16, whose gradients would vanish


def constant(context: Context) -> Encode:
    """An encoder that gives this context whatever it reads."""
    return Encode(lambda *_: context)


def likelihood(
    params: Params, cfg: Config, demos: Asked, context: Context, rows: int
) -> tuple[Tensor, Tensor]:
    """(gradient (R, T, D) of the summed loss of all ACT steps by the context tokens, zeros where
    that is not wanted; (rows,) mean log-probability of a demo's cell after the last step, 0 without
    demos). One step's graph is alive at a time."""
    tokens, (batch, row) = context.tokens, demos
    model = msgspec.structs.replace(cfg.model, q_weight=0.0)
    grad = torch.zeros(tokens.shape, device=tokens.device)
    carry = etrm.fresh_carry(model, batch.cells, tokens.dtype, tokens.device)
    scale = FP16_SCALE if tokens.dtype == torch.float16 else 1.0
    for _ in range(cfg.model.halt_max_steps):
        carry, out = etrm.act_step(params, model, constant(context), carry, batch, None)
        loss = etrm.act_loss(model, out, batch.labels, batch.cells)
        if tokens.requires_grad:
            grad += torch.autograd.grad(loss.total.sum() * scale, [tokens])[0].float() / scale
    sums = torch.zeros(2, rows, device=tokens.device)
    sums.index_add_(1, row, torch.stack((loss.lm, torch.ones_like(loss.lm))))
    return grad, -sums[0] / sums[1].clamp(min=1)


def search_context(
    params: Params, cfg: Config, encode: Encode, demos: Asked, context: Context,
    deadline: float,
) -> Context:  # fmt: skip
    """The context plus the (B, T, D) that, added to the contexts of the *other* demos, makes each
    demo likeliest: gradient steps from zero, the best kept row by row, so that no row's demos get
    less likely. Rows do not depend on each other."""
    tokens, (batch, row) = context.tokens, demos
    with torch.no_grad():
        base = encode.read(params.encoder, batch)
    added = torch.zeros(tokens.shape, device=tokens.device)
    best_added = torch.zeros_like(added)
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


# ---------------------------------------------------------------- a copy of the weights trained on


def adaptation_config(cfg: Config) -> Config:
    """The training run of a full adaptation: training's own, leave-one-out, on the task's demos."""
    if cfg.model.encoder.kind == "table":
        raise UserError("solve.adapt: a table's rows are its tasks': there is nothing to adapt")
    replace, solve = msgspec.structs.replace, cfg.solve
    shards = 1 if train.undivided(cfg.model) else 4
    optimizer: dict[str, Any] = {"lr": solve.adapt_lr or 1e-3, "warmup": 0, "final_lr": 0.1}
    optimizer["freeze"] = {k: n for k, n in cfg.optimizer.freeze.items() if n == 0}  # for ever
    steps = {"batch": ADAPT_BATCH, "shards": shards, "steps": solve.adapt_steps}
    return replace(
        cfg,
        init_from=InitConfig(),
        data=replace(cfg.data, query="leave_one_out", share={}),
        optimizer=replace(cfg.optimizer, **optimizer),
        train=replace(cfg.train, **steps),
        eval=replace(cfg.eval, on="train"),
    )


def adapt_weights(params: Params, cfg: Config, task: Task, deadline: float) -> Params:
    """Weights trained on the task's demos until all slots were right in three steps running, or the
    steps or the time are over. The same weights where no demo fits the canvas of the others."""
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
    state, trained = train.fresh_state(setup), [p for p in copy.values() if p.requires_grad]
    right = 0  # steps running in which all slots were
    for step in range(1, cfg.train.steps + 1):
        scale = state.progress.scale
        state.carries, grads, sums, *_ = train.one_step(setup, state.carries, scale)
        lr = learning_rate(cfg.optimizer, step, cfg.train.steps)
        norm = update(state.opts, trained, grads, lr, cfg.optimizer.clip)
        state.progress.scale = scale if norm.isfinite() else max(1.0, scale / 2)
        right = right + 1 if train.metrics_row(sums)["all/exact"] == 1 else 0
        if right == 3 or time.monotonic() > deadline:
            break
    return etrm.rebuild(setup.like, {k: v.detach() for k, v in copy.items()})


# ---------------------------------------------------------------- views of queries to votes


class Solver(NamedTuple):
    """A checkpoint and how it is asked."""

    path: Path
    cfg: Config
    source: str  # hash of the weights and of all else that its answers depend on
    params: Params
    meta: dict[str, Any]
    pairs: Tensor  # (N, 16) uint8 digests of the pairs that it was trained on


class HandMade(NamedTuple):
    """A solver without weights; votes as a checkpoint does."""

    path: Path  # its name
    cfg: Config
    source: str
    predict: Callable[[Sequence[Task], Sequence[int]], Iterator[list[Prediction]]]


def grids_of(task: Task) -> list[np.ndarray]:
    return [x for pair in (*task.demos, *task.queries) for x in pair if x is not None]


class Questions(NamedTuple):
    """Every query of some tasks, a row each; outputs are hidden."""

    tasks: Sequence[Task]
    packed: data.Tasks  # on the device
    queries: data.Queries
    number: list[int]  # of the query among those of its task
    table_row: Tensor | None  # (tasks,) of each task in a table of tasks

    def task(self, row: int) -> Task:
        return self.tasks[int(self.queries.task[row])]


def questions_of(params: Params, cfg: Config, tasks: Sequence[Task], views: int) -> Questions:
    """All queries of tasks, on the device."""
    hidden = [t._replace(queries=[(x, None) for x, _ in t.queries]) for t in tasks]
    packed = data.pack(hidden, optim.hardware(cfg)[0])
    queries = data.queries(packed, "test", cfg.data)
    number = queries.pair - packed.first[queries.task] - packed.n_demos[queries.task]
    table_row = baselines.numbers(params, cfg, hidden, views)
    return Questions(hidden, packed, queries, number.tolist(), table_row)


class Posed(NamedTuple):
    """Some views of queries as the model is asked them."""

    batch: data.Batch
    symmetry: Symmetry  # (B,)
    lots: Tensor  # (B, 1 + M) that order the demos
    canvas: list[tuple[int, int]]


def pose(questions: Questions, cfg: Config, units: Sequence[tuple[int, int]]) -> Posed:
    """The batch of some (row of the questions, view)."""
    drawn = [score.view(questions.task(r), questions.number[r], v, cfg.data) for r, v in units]
    symmetry = Symmetry(*(torch.stack([s[i] for s, _ in drawn]) for i in range(2)))
    lots = pad_sequence([u for _, u in drawn], batch_first=True)
    queries = data.chosen(questions.queries, torch.tensor([r for r, _ in units]))
    table_row = None
    if questions.table_row is not None:
        view = torch.tensor([v for _, v in units])
        owner = questions.table_row[queries.task]
        symmetry = data.row_symmetry(cfg.data, cfg.run.seed, owner, view)
        table_row = owner * cfg.data.symmetries + view
    episodes = data.posed(questions.packed, cfg.data, "test", queries, view=(symmetry, lots))
    episodes = episodes._replace(row=table_row)
    batch = data.batch(questions.packed, episodes, cfg.model.raster)
    return Posed(batch, symmetry, lots, [(h, w) for h, w in episodes.canvas.tolist()])


def answer_batch(
    params: Params, cfg: Config, questions: Questions, deadline: float,
    units: Sequence[tuple[int, int]],
) -> list[tuple[Vote, np.ndarray]]:  # fmt: skip
    """Each (row, view)'s vote and canvas of tokens; params are in the compute dtype."""
    posed, encode = pose(questions, cfg, units), encoder_of(cfg.model)
    device, dtype = optim.hardware(cfg)
    if cfg.solve.adapt == "context":
        if encode.recur or encode.step:
            raise UserError("solve.adapt: this model has no single context to search")
        with torch.no_grad():
            context = encode.read(params.encoder, posed.batch)
        tasks, view = [questions.task(r) for r, _ in units], (posed.symmetry, posed.lots)
        demos = ask_demos(tasks, view, cfg, device)
        if demos:
            context = search_context(params, cfg, encode, demos, context, deadline)
        encode = constant(context)
    steps = cfg.solve.act_steps or cfg.model.halt_max_steps
    out, spent = etrm.think(params, cfg.model, encode, posed.batch, dtype, steps, cfg.solve.leave)
    back, answers = data.inverse(posed.symmetry), []
    q = out.q_halt.float().nan_to_num(-1e9).tolist()
    for b, logits in enumerate(out.logits.float().split(posed.batch.cells)):
        canvas = logits.argmax(-1).view(posed.canvas[b]).cpu().numpy()
        numbers = logits.amax(-1).isfinite().all()  # the maximum of a row with a NaN is NaN
        grid = data.untokenise(canvas) if numbers else None  # None: no whole grid
        if grid is not None:
            grid = data.apply(Symmetry(back.dihedral[b], back.colours[b]), grid)
        answers.append((Vote(grid, q[b], units[b][1], int(spent[b])), canvas))
    return answers


Key = tuple[str, int, int]  # (hash of a task, query, view)


def predictions(
    solver: Solver, tasks: Sequence[Task], views: Sequence[int], done: Collection[Key],
    deadline: float,
) -> Iterator[list[Prediction]]:  # fmt: skip
    """Batch by batch, the votes of these views for every query of the tasks, small canvases first.

    Views in `done` are left out; after `deadline` (time.monotonic) no batch begins. Outputs of
    queries are not looked at."""
    params, cfg, source = solver.params, solver.cfg, solver.source
    device, dtype = optim.hardware(cfg)
    questions = questions_of(params, cfg, tasks, max(views, default=-1) + 1)
    blank = [
        Prediction((t := questions.task(r)).name, n, score.task_hash(t), [], source=source)
        for r, n in enumerate(questions.number)
    ]
    todo = [(r, v) for r, p in enumerate(blank) for v in views if (p.hash, p.query, v) not in done]
    units = [(r, v) for r, v in todo if questions.queries.canvas[r, 0]]
    if lost := {r for r, _ in todo} - {r for r, _ in units}:
        sides = {r: max(max(x.shape) for x in grids_of(questions.task(r))) for r in lost}
        yield [blank[r]._replace(too_large=side) for r, side in sorted(sides.items())]
    searched = cfg.solve.adapt == "context"  # then each demo is asked, too
    copies = torch.tensor([1 + searched * len(questions.task(r).demos) for r, _ in units])
    rows = torch.tensor([r for r, _ in units]).long()
    parts = train.portions(data.chosen(questions.queries, rows), cfg.model, copies)
    batches = [[units[i] for i in part.tolist()] for part in parts]
    cast = tree_map(lambda x: x.to(device, dtype), params)
    vote_on = functools.partial(answer_batch, cast, cfg, questions, deadline)
    for first in range(0, len(batches), optim.THREADS):
        group, begun = batches[first : first + optim.THREADS], time.monotonic()
        if begun > deadline:
            return
        answers = optim.side_by_side(vote_on, group, device)
        seconds = (time.monotonic() - begun) / sum(map(len, group))
        for batch, votes in zip(group, answers, strict=True):
            by_row: dict[int, Prediction] = {}
            for (row, _), (vote, canvas) in zip(batch, votes, strict=True):
                p = by_row.get(row, blank[row])
                by_row[row] = p._replace(
                    votes=[*p.votes, vote._replace(source=source)],
                    canvas=canvas if vote.view == 0 else p.canvas,
                    seconds=p.seconds + seconds,
                )
            yield list(by_row.values())


# ---------------------------------------------------------------- solvers


SOLVERS = {"experts": "etrm_arc.extras.experts"}  # name: a module with `predict`
ADAPT_BATCH = 16  # slots of a step of full adaptation
FREE = ("train.device", "train.dtype", "solve.")  # of a checkpoint's config


def opened(path: str | Path, sets: Sequence[str] = ()) -> Solver:
    """A checkpoint's EMA with the config it was trained with; `sets` may change FREE fields."""
    c = checkpoint.load(path)
    raw = c.meta["config"]
    for item in sets:
        if not item.partition("=")[0].strip().startswith(FREE):
            raise UserError(
                f"--set {item}: of a checkpoint's config only {', '.join(FREE)}* may change"
            )
        config.set_item(raw, item)
    cfg = config.parse_config(raw, str(c.path))
    how = {k: v for k, v in msgspec.to_builtins(cfg.solve).items() if k != "views"}
    learns = [cfg.optimizer, cfg.run.seed] if cfg.solve.adapt == "full" else []
    rest = msgspec.to_builtins([cfg.model, cfg.data, *learns])
    text = json.dumps([how, *rest, str(optim.hardware(cfg)[1])])
    content = checkpoint.digest_of(etrm.leaves(c.ema), text)
    source = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    return Solver(c.path, cfg, source, c.ema, c.meta, c.pairs)


def solver_of(name: str | Path, sets: Sequence[str] = ()) -> Solver | HandMade:
    """A checkpoint that can be asked, or a hand-made solver by its name."""
    if str(name) in SOLVERS and not Path(name).exists():
        module = importlib.import_module(SOLVERS[str(name)])
        raw: dict[str, Any] = {}
        for item in sets:
            config.set_item(raw, item)
        cfg = config.parse_config(raw, str(name))
        return HandMade(Path(name), cfg, module.SOURCE, module.predict)
    solver = opened(name, sets)
    if not all(x.isfinite().all() for x in etrm.leaves(solver.params).values()):
        raise UserError(f"{solver.path}: its weights are no numbers (NaN): the run diverged")
    return solver


def answer(
    solver: Solver | HandMade, tasks: Sequence[Task], views: Sequence[int],
    lines: Sequence[Prediction] = (), deadline: float = math.inf,
) -> Iterator[list[Prediction]]:  # fmt: skip
    """Batch by batch, the solver's predictions that are not among the lines yet.

    With full adaptation task by task: each has its share of the time, by the cells of its largest
    grid, and learns in at most four fifths of that."""
    done = {
        (p.hash, p.query, v)
        for p in lines
        if p.source == solver.source
        for v in (views if p.too_large else [x.view for x in p.votes])
    }
    todo = []
    for t in tasks:
        key, queries = score.task_hash(t), range(len(score.with_query(t).queries))
        if any((key, i, v) not in done for i in queries for v in views):
            todo.append(t)
    if not todo or time.monotonic() > deadline:
        return
    if isinstance(solver, HandMade):
        for part in solver.predict(todo, views):
            yield part
            if time.monotonic() > deadline:
                return
    elif solver.cfg.solve.adapt != "full":
        yield from predictions(solver, todo, views, done, deadline)
    else:
        cells = [max(x.size for x in grids_of(t)) for t in todo]
        for n, task in enumerate(todo):
            if (begun := time.monotonic()) > deadline:
                return
            learn_until = begun + 0.8 * (deadline - begun) * cells[n] / sum(cells[n:])
            params = adapt_weights(solver.params, solver.cfg, task, learn_until)
            seconds = (time.monotonic() - begun) / len(task.queries)
            spent = dict.fromkeys(range(len(task.queries)), seconds)
            adapted = solver._replace(params=params)
            for part in predictions(adapted, [task], views, done, deadline):
                yield [p._replace(seconds=p.seconds + spent.pop(p.query, 0.0)) for p in part]


def ask(solver: Solver | HandMade, tasks: Sequence[Task], views: int = 0) -> list[Prediction]:
    """Votes for every query of the tasks, in order, under so many views each (0: as configured)."""
    parts = answer(solver, tasks, range(views or solver.cfg.solve.views))
    return score.joined(tasks, [p for part in parts for p in part])


def predict(
    params: Params, cfg: Config, tasks: Task | Sequence[Task], views: int = 0
) -> list[Prediction]:
    """`ask` of weights, for tasks made in Python. Raises UserError on grids that are none."""
    tasks = [sources.check(t) for t in ([tasks] if isinstance(tasks, Task) else tasks)]
    nothing = torch.zeros(0, 16, dtype=torch.uint8)
    return ask(Solver(Path(), cfg, "", params, {}, nothing), tasks, views)


def answers(
    name: str | Path, task_file: str, sets: Sequence[str] = ()
) -> list[tuple[Task, list[tuple[Prediction, list[score.Answer]]]]]:
    """Each task of a file with, per query, the votes and the ranked answers."""
    solver, tasks = solver_of(name, sets), sources.load([task_file], hide=True)
    joint = ask(solver, tasks)
    return [(t, [(p, score.rank(p.votes)) for p in joint if p.task == t.name]) for t in tasks]


# ---------------------------------------------------------------- evaluation


def predictions_path(solver: Solver | HandMade) -> Path:
    """predictions.jsonl in the solver's run folder; runs/<name> here where it has none."""
    folder = solver.path.parent
    if not ((folder / "run.json").is_file() and os.access(folder, os.W_OK)):
        folder = Path("runs") / solver.path.stem
    return folder / "predictions.jsonl"


def rounds_of(views: int) -> list[range]:
    """1, 1, 2, 4 ... more views each: a budget that ends early was spent on all queries alike."""
    edges = [0, *(1 << i for i in range(views.bit_length()) if 1 << i < views), views]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def votes_of(
    lines: Sequence[Prediction], solvers: Sequence[Solver | HandMade], views: int
) -> list[Prediction]:
    """The lines of some solvers, with the votes of the first views."""
    chosen = []
    for p in lines:
        votes = [v for v in p.votes if v.view < views]
        if p.source in {s.source for s in solvers} and (votes or not p.votes):
            seconds = p.seconds * len(votes) / max(1, len(p.votes))
            chosen.append(p._replace(votes=votes, seconds=seconds))
    return chosen


ADAPTED = {"none": "no adaptation", "context": "context search", "full": "full adaptation"}


def evaluate(
    names: Sequence[str | Path], data_sources: Sequence[str] = (), sets: Sequence[str] = (),
    predictions_file: str = "", budget: float = math.inf, shard: str = "1/1", submit: str = "",
    say: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:  # fmt: skip
    """Ask solvers, which vote together, then score what is on disk: no output is seen before that.

    The default data is the dev split of the first, whose number of views is that of all. budget:
    seconds, after which no batch begins. Predictions that the file holds are not made again.
    Without any known output there are predictions but no scores. `submit` is written first of all,
    and again whenever there is more to say."""
    deadline = time.monotonic() + budget
    solvers = [solver_of(name, sets) for name in names]
    first, views = solvers[0], solvers[0].cfg.solve.views
    chosen = tuple(data_sources) or first.cfg.data.dev
    if not chosen:
        raise UserError(f"{first.path}: trained without a dev split; name the tasks with --data")
    limit = 0 if data_sources else first.cfg.data.max_eval_tasks
    load = functools.partial(score.load_by_source, chosen, limit, shard)
    tasks = [t for ts in load(hide=True).values() for t in ts]
    if not tasks:
        raise UserError(f"--shard {shard}: no task is left")
    file = score.jsonl("--predictions", predictions_file or predictions_path(first))
    lines = score.read(file) if file.exists() else []

    def joint() -> list[Prediction]:
        """One prediction per query from what is on disk; the submission follows it."""
        predictions = score.joined(tasks, votes_of(lines, solvers, views))
        if submit:
            checkpoint.write_text(Path(submit), json.dumps(score.submission(tasks, predictions)))
        return predictions

    wanted = len(solvers) * views * sum(len(t.queries) for t in tasks)
    votes = sum(len(p.votes) for p in joint())  # a submission that cannot be written is found now
    together = budget == math.inf or any(s.cfg.solve.adapt == "full" for s in solvers)
    for part in [range(views)] if together else rounds_of(views):
        for solver in solvers:
            for batch in answer(solver, tasks, part, lines, deadline):
                score.append(file, batch)
                lines += batch
                votes += sum(len(p.votes) or len(part) for p in batch)
                say(min(1.0, votes / wanted))
        predictions = joint()
    if not any(p.votes or p.too_large for p in predictions):
        raise UserError(f"--budget: {budget / 60:g} minutes are not enough for a single view")
    known = load(hide=False)
    learned = [s for s in solvers if isinstance(s, Solver)]
    kept_out = [x for s in learned for x in s.cfg.data.held_out]
    scores = score.judged(known, predictions, [s.pairs for s in learned], kept_out)
    if "pass@2" in scores and len({type(s) for s in solvers}) > 1:
        everything = [t for ts in known.values() for t in ts]
        scores["by_solver"] = {
            str(s.path): score.score(everything, score.joined(tasks, votes_of(lines, [s], views)))
            for s in solvers
        }
    steps = [v.step for p in predictions for v in p.votes if v.step]
    ways = {ADAPTED[s.cfg.solve.adapt] if isinstance(s, Solver) else "hand-made" for s in solvers}
    return {
        "data": list(chosen), "views": views, "predictions": str(file),
        "checkpoints": [str(s.path) for s in solvers], "adaptation": " and ".join(sorted(ways)),
        "guard": "; ".join(sorted({guard_of(s) for s in learned})),
        "votes": sum(len(p.votes) for p in predictions),
        "act_steps": sum(steps) / len(steps) if steps else None,
        "seconds_per_task": sum(p.seconds for p in predictions) / len(tasks),
        "too_large": sum(p.too_large > 0 for p in predictions),
        **scores,
    }  # fmt: skip


def guard_of(solver: Solver) -> str:
    """What the guard found in training, and whether there was a dev split to choose by."""
    finding = str(msgspec.convert(solver.meta["finding"], sources.Finding))
    return finding if solver.cfg.data.dev else f"{finding}; NO DEV SPLIT was held out"


# ---------------------------------------------------------------- the overfit gate

PUBLISHED = "published, 32 tasks, augmented, from a pretrained decoder: 86 % of cells, not of grids"


def overfit(cfg: Config, fit: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Train as the config says; the last evaluation of the training set itself, as text too."""
    folder, again = Path(cfg.run.dir), 1
    while (folder / "run.json").exists():  # a measurement starts anew and overwrites nothing
        again += 1
        folder = Path(f"{cfg.run.dir}-{again}")
    cfg = msgspec.structs.replace(cfg, run=msgspec.structs.replace(cfg.run, dir=str(folder)))
    row = fit(cfg)
    lines = [f"{row['step']} steps, {row['samples']:,} sample-steps, {row['seconds']:.0f} s"]
    result: dict[str, Any] = {k: row[k] for k in ("samples", "seconds")} | {"steps": row["step"]}
    for weights in cfg.eval.weights:
        exact, cells, n = (row[f"train/{weights}/own/{k}"] for k in ("exact", "cell_accuracy", "n"))
        result[weights] = {"exact_match": exact, "cell_accuracy": cells, "pairs": int(n)}
        shares = f"exact match {score.with_interval(exact, int(n))}, cells {100 * cells:.2f} %"
        lines.append(f"{weights} weights: {shares}")
    return {**result, **result[cfg.eval.weights[0]], "text": "\n".join([*lines, PUBLISHED])}
