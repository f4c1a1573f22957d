"""Test-time adaptation, from demos alone: a search over the context, or a copy of the weights trained on.

Axes: B rows = views of queries, R demos asked one by one (leave-one-out), T context tokens, D hidden.
After Bonnet & Macfarlane, "Searching Latent Program Spaces" (arXiv 2411.08706) and Akyürek et al., "The Surprising
Effectiveness of Test-Time Training for Abstract Reasoning" (arXiv 2411.07279).
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from . import baselines, checkpoint, config, data, etrm, score, sources, train
from .checkpoint import described
from .config import Config, InitConfig, UserError
from .data import Symmetry, Task
from .encoders import encoder_of
from .etrm import Context, Encode, Params, tree_map
from .optim import learning_rate, matched, update
from .score import Answer, Prediction, Vote, rank

COPIES = 3  # of a single demo, under symmetries
SCALE = 2.0**12  # of a loss in fp16, whose gradients would vanish


def several(task: Task) -> Task:
    """The demos alone, at least two: a single one is joined by copies of it under symmetries fixed by the task's content."""
    demos = list(task.demos)
    if len(demos) == 1:
        key = int.from_bytes(sources.task_digest(Task("", demos, []))[:7], "little")
        drawn = data.draw_symmetry(
            data.uniform(11, key, data.VIEW, torch.arange(COPIES)), True, "keep_black"
        )
        turns = [Symmetry(*(x[i] for x in drawn)) for i in range(COPIES)]
        demos += [(data.apply(s, demos[0][0]), data.apply(s, demos[0][1])) for s in turns]
    return Task(task.name, demos, [])


class Asked(NamedTuple):
    """Demos as questions, under the view of the row that they belong to."""

    batch: data.Batch
    owner: Tensor  # (R,) the row


def fixed(encode: Encode) -> Encode:
    """The encoder itself. Raises UserError where there is no one context that could be searched."""
    if encode.recur or encode.step:
        raise UserError(
            "solve: there is no one context to search (states in the carry, or no encoder): no --adapt context, no --vote demos"
        )
    return encode


def given(said: Context) -> Encode:
    """An encoder that has said it already."""
    return Encode(lambda *_: said)


def ask_demos(
    tasks: Sequence[Task],
    rows: Sequence[int],
    view: tuple[Symmetry, Tensor],
    cfg: Config,
    device: torch.device,
) -> Asked:
    """Every demo of the tasks of some rows, asked from the others, on a canvas that holds all of them."""
    order = sorted(set(rows))
    packed = data.pack([several(tasks[t]) for t in order], device)
    first = packed.first.tolist()
    size = torch.stack(
        [packed.grids[a:b, :, 1:].amax((0, 1)) for a, b in zip(first, first[1:], strict=False)]
    )
    canvas = data.snug(size, cfg.data)
    owner: list[int] = []
    pair: list[int] = []
    for b, t in enumerate(rows):
        if canvas[(k := order.index(t)), 0]:
            pair += range(first[k], first[k + 1])
            owner += [b] * (first[k + 1] - first[k])
    of, at = torch.tensor(owner, dtype=torch.int64), torch.tensor(pair, dtype=torch.int64)
    there = torch.ones_like(at, dtype=torch.bool)
    asked = data.Queries(at, packed.task_of[at], there, canvas[packed.task_of[at]], there)
    lots = torch.nn.functional.pad(view[1], (0, 99))[of, : 1 + int(packed.first.diff().max())]
    turned = Symmetry(view[0].dihedral[of], view[0].colours[of])
    episodes = data.posed(packed, cfg.data, "leave_one_out", asked, view=(turned, lots))
    return Asked(data.batch(packed, episodes, cfg.model.raster), of.to(device))


def likelihood(
    params: Params, cfg: Config, asked: Asked, said: Context, rows: int
) -> tuple[Tensor, Tensor]:
    """(gradient of the summed loss of all ACT steps by the context tokens (R, T, D), where that is wanted, else zeros; (rows,)
    mean log-probability of a demo's cell after the last step, 0 without demos). One step's graph is there at a time."""
    context = said.tokens
    model, grad = (
        msgspec.structs.replace(cfg.model, q_weight=0.0),
        torch.zeros(context.shape, device=context.device),
    )
    carry = etrm.fresh_carry(model, asked.batch.cells, context.dtype, context.device)
    scale = SCALE if context.dtype == torch.float16 else 1.0
    for _ in range(cfg.model.halt_max_steps):
        carry, out = etrm.act_step(params, model, given(said), carry, asked.batch, None)
        loss = etrm.act_loss(model, out, asked.batch.labels, asked.batch.cells)
        if context.requires_grad:
            grad += torch.autograd.grad(loss.total.sum() * scale, [context])[0].float() / scale
    sums = torch.zeros(2, rows, device=context.device)
    sums.index_add_(1, asked.owner, torch.stack((loss.lm, torch.ones_like(loss.lm))))
    return grad, -sums[0] / sums[1].clamp(min=1)


def explained(params: Params, cfg: Config, encode: Encode, asked: Asked, said: Context) -> Tensor:
    """(B,) how well each row's own context tokens explain its demos; what an encoder says of cells it says of the demos' own."""
    with torch.no_grad():
        if not len(asked.owner):
            return torch.zeros(len(said.tokens))
        own = said._replace(tokens=said.tokens[asked.owner])
        if said.cells is not None:
            own = encode.read(params.encoder, asked.batch)._replace(tokens=own.tokens)
        found = likelihood(params, cfg, asked, own, len(said.tokens))[1]
        return found.nan_to_num(-1e9)


def search(
    params: Params, cfg: Config, encode: Encode, asked: Asked, said: Context, until: float
) -> Context:
    """The context with, on its tokens (B, T, D), what, added to the contexts of the *other* demos, makes each demo likeliest.

    Gradient steps from nothing added, the best kept row by row, so no row's demos become less likely; rows do not
    depend on each other."""
    if not len(asked.owner):  # their canvas is too large
        return said
    with torch.no_grad():
        base, context = encode.read(params.encoder, asked.batch), said.tokens
    added = torch.zeros(context.shape, device=context.device)
    best, kept = (
        torch.full((len(context),), -torch.inf, device=context.device),
        torch.zeros_like(added),
    )
    opt = torch.optim.Adam([added], lr=cfg.solve.adapt_lr or 0.1)
    for step in range(cfg.solve.adapt_steps + 1):
        last = step == cfg.solve.adapt_steps or time.monotonic() > until
        tried = (base.tokens + added.to(context.dtype)[asked.owner]).requires_grad_(not last)
        with torch.enable_grad():
            grad, score = likelihood(params, cfg, asked, base._replace(tokens=tried), len(context))
        better = score > best
        best, kept = (
            torch.where(better, score, best),
            torch.where(better[:, None, None], added, kept),
        )
        if last:
            break
        added.grad = torch.zeros_like(added).index_add_(
            0, asked.owner, grad.nan_to_num(0.0, 0.0, 0.0)
        )
        opt.step()
    return said._replace(tokens=context + kept.to(context.dtype))


def recipe(cfg: Config, folder: str = "") -> Config:
    """The run of a full or joint adaptation: training's own, on leave-one-out episodes of the demos."""
    if cfg.model.encoder.kind == "table":
        raise UserError("solve.adapt: a table's rows are its tasks': there is nothing to adapt")
    replace, how = msgspec.structs.replace, cfg.solve
    shards = 1 if train.undivided(cfg.model) else min(4, how.adapt_batch)
    rest = () if how.adapt_weights == ".*" else (rf"(?!(?:{how.adapt_weights})$).*",)
    return replace(
        cfg,
        run=replace(cfg.run, dir=folder, track=""),
        init_from=InitConfig(),
        data=replace(cfg.data, query="leave_one_out"),
        optimizer=replace(
            cfg.optimizer,
            lr=how.adapt_lr or 1e-3,
            warmup=0,
            final_lr=0.1,
            freeze=(*cfg.optimizer.freeze, *rest),
            freeze_until={},
        ),
        train=replace(
            cfg.train,
            batch=how.adapt_batch,
            shards=shards,
            steps=how.adapt_steps,
            save_every=100,
            keep_every=0,
        ),
        eval=replace(
            cfg.eval,
            on="train",
            foreign=False,
            every=500,
            weights=("raw",),
            patience=0,
            stop_at=1.0,
        ),
    )


def prepared(params: Params, cfg: Config, tasks: Sequence[Task]) -> train.Setup:
    """A setup whose weights are a copy of these and whose tasks have nothing but demos. Raises UserError on a pattern of no weights."""
    matched("solve.adapt_weights", cfg.solve.adapt_weights, etrm.leaves(params))
    s = train.setup(cfg, given=tasks)
    own = {
        k: v.detach().to(s.device, torch.float32).clone() for k, v in etrm.leaves(params).items()
    }
    return s._replace(
        params={k: v.requires_grad_(s.params[k].requires_grad) for k, v in own.items()}
    )


def tuned(params: Params, cfg: Config, task: Task, until: float) -> Params:
    """Weights trained on the task's demos until all slots were right three steps on end, or the steps or the time are over;
    the same weights where no demo can be asked, for none fits the canvas of the others."""
    cfg, task = recipe(cfg), several(task)
    asked = data.queries(data.pack([task]), cfg.data.query, cfg.data)
    if not asked.fits.any() or time.monotonic() > until:
        return params
    s = prepared(params, cfg, [task])
    state, trained, solved = (
        train.fresh_state(cfg, s),
        [p for p in s.params.values() if p.requires_grad],
        0,
    )
    for step in range(1, cfg.train.steps + 1):
        scale = state.facts["scale"]
        state.carries, grads, sums, *_ = train.one_step(s, cfg, state.carries, scale)
        torch._foreach_mul_(grads, 1 / scale)
        norm = update(
            state.opts,
            trained,
            grads,
            learning_rate(cfg.optimizer, step, cfg.train.steps),
            cfg.optimizer.clip,
        )
        state.facts["scale"] = scale if norm.isfinite() else max(1.0, scale / 2)
        row = train.metrics_row(sums)
        solved = solved + 1 if row["all/exact"] == 1 else 0
        if solved == 3 or time.monotonic() > until:
            break
    return etrm.rebuild(s.like, {k: v.detach() for k, v in s.params.items()})


def tuned_jointly(
    params: Params, cfg: Config, tasks: Sequence[Task], folder: Path, limit: float
) -> tuple[Params, float]:
    """(weights trained on the demos of all tasks together, seconds that took): a run of its own, which goes on where it was
    interrupted and ends early when all demos are solved or after `limit` seconds. limit 0: what it has so far."""
    cfg, last = recipe(cfg, str(folder)), folder / "last.safetensors"
    if limit <= 0 and not last.exists():
        raise UserError(
            f"{folder}: absent, though weights that it had have voted: put it there, or start another --predictions file"
        )
    if not (
        last.exists() and (limit <= 0 or described(folder)["state"] in ("done", "eval.stop_at"))
    ):
        s = prepared(params, cfg, [several(t) for t in tasks])
        ran = train.fit(cfg, resume=bool(checkpoint.manifests(folder)), limit=limit, s=s)
        if ran.get("stopped") not in (None, "eval.stop_at", "time limit"):
            raise KeyboardInterrupt
    return checkpoint.load(last).params, json.loads(checkpoint.manifests(folder)[-1].read_text())[
        "seconds"
    ]


# ---------------------------------------------------------------- solve


Key = tuple[str, int, int]  # (hash of a task, query, view)


def jitter(
    std: float, keys: Sequence[tuple[int, ...]]
) -> Callable[[int, Sequence[int], etrm.Carry], etrm.Carry]:
    """For `think`: before each step but the first, noise drawn from (key of the slot, step); a key that ends in 0 gets none."""

    def stir(step: int, slots: Sequence[int], carry: etrm.Carry) -> etrm.Carry:
        noise = []
        for slot, n in zip(slots, carry.tokens, strict=True):
            u = data.uniform(
                1, *keys[slot], data.NOISE, step, torch.arange(2 * n * carry.z_H.shape[1])
            ).squeeze(-1)
            gauss = torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12)) * math.sqrt(2)
            noise.append((gauss * (std if keys[slot][-1] else 0.0)).view(2, n, -1))
        added = torch.cat(noise, 1).to(carry.z_H)
        return carry._replace(z_H=carry.z_H + added[0], z_L=carry.z_L + added[1])

    return stir if std else lambda step, slots, carry: carry


def vote_of(cfg: Config, logits: Tensor, canvas: tuple[int, int], back: Symmetry) -> Vote:
    """The answer on a canvas, in the task's own frame, and its log-probability: of its cells and of its border. No answer
    where no whole grid was given, or something else than numbers (but -inf, for a token that a model cannot say)."""
    tokens = logits.float().argmax(-1).view(*canvas).cpu().numpy()
    numbers = bool(logits.amax(-1).isfinite().all())  # the maximum of a row with a NaN is NaN
    grid = data.untokenise(tokens) if numbers else None
    if grid is None:
        return Vote(None)
    label = (
        torch.from_numpy(data.tokenise(grid.astype("uint8"), canvas))
        .long()
        .flatten()
        .to(logits.device)
    )
    log_p = etrm.log_prob(cfg.model, logits).gather(-1, label[:, None]).squeeze(-1)
    return Vote(data.apply(back, grid), logp=float(log_p[label != data.PAD].sum()))


Said = dict[tuple[int, int], tuple[Tensor, float]]  # (row, ACT step): logits, q


def thoughts(
    params: Params,
    cfg: Config,
    encode: etrm.Encode,
    batch: data.Batch,
    dtype: torch.dtype,
    keys: Sequence[tuple[int, ...]],
) -> tuple[Said, list[int]]:
    """What each row says after each ACT step, and after how many it is done; keys of the rows' noise."""
    said: Said = {}

    def look(step: int, slots: Sequence[int], out: etrm.Output) -> None:
        cells = [batch.cells[s] for s in slots]
        for slot, logits, q in zip(
            slots, out.logits.split(cells), out.q_halt.nan_to_num(-1e9).tolist(), strict=True
        ):
            said[slot, step] = logits, q

    stir = jitter(cfg.solve.noise if cfg.solve.samples > 1 else 0.0, keys)
    how, steps = cfg.solve, cfg.model.halt_max_steps
    _, spent = etrm.think(
        params, cfg.model, encode, batch, dtype, steps, how.leave, look, stir, how.stable
    )
    return said, spent.tolist()


def from_demos(
    params: Params, cfg: Config, encode: etrm.Encode, batch: data.Batch, tasks: Sequence[Task], rows: Sequence[int],
    view: tuple[Symmetry, Tensor], until: float,
) -> tuple[etrm.Encode, list[float | None]]:  # fmt: skip
    """(encoder to answer with, how well its context explains the demos of each row), where the config asks for either."""
    how, explains = cfg.solve, [None] * len(rows)
    if how.adapt != "context" and how.vote != "demos":
        return encode, [*explains]
    with torch.no_grad():
        said = fixed(encode).read(params.encoder, batch)
    questions = ask_demos(tasks, rows, view, cfg, said.tokens.device)
    if how.adapt == "context":
        said = search(params, cfg, encode, questions, said, until)
    if how.vote == "demos":
        explains = explained(params, cfg, encode, questions, said).tolist()
    return given(said), [*explains]


def predictions(
    params: Params, cfg: Config, tasks: Sequence[Task], views: Sequence[int], source: str = "",
    done: Collection[Key] = (), until: float = math.inf,
) -> Iterator[tuple[list[Prediction], float]]:  # fmt: skip
    """Batch by batch, what these views say of every query of the tasks, and the share of the work that is done.

    Views in `done` are left out; after `until` (time.monotonic) no batch begins. Outputs of queries are not looked at.
    Small canvases come first. Raises UserError when a task has no query.
    """
    for task in tasks:
        if not task.queries:
            raise UserError(f"task {task.name}: has no query (no test pair) to answer")
    tasks = [t._replace(queries=[(x, None) for x, _ in t.queries]) for t in tasks]
    device, dtype = train.hardware(cfg)
    own = baselines.numbers(params, cfg, tasks, max(views, default=-1) + 1)
    cast, encode = tree_map(lambda x: x.to(device, dtype), params), encoder_of(cfg.model)
    packed, hashes = data.pack(tasks, device), [score.task_hash(t) for t in tasks]
    asked = data.queries(packed, "test", cfg.data)
    number = (asked.pair - packed.first[asked.task] - packed.n_demos[asked.task]).tolist()
    of = asked.task.tolist()
    nothing = [
        Prediction(tasks[t].name, n, hashes[t], [], source=source)
        for t, n in zip(of, number, strict=True)
    ]
    todo = [
        (r, v) for r, p in enumerate(nothing) for v in views if (p.hash, p.query, v) not in done
    ]
    units = [(r, v) for r, v in todo if asked.canvas[r, 0]]
    if lost := sorted({r for r, _ in todo} - {r for r, _ in units}):
        yield (
            [nothing[r]._replace(too_large=canvas_for(tasks[of[r]], number[r])) for r in lost],
            0.0,
        )
    samples = cfg.solve.samples if cfg.solve.noise else 1
    asks = cfg.solve.adapt == "context" or cfg.solve.vote == "demos"  # each demo, too
    copies = torch.tensor([samples * (1 + asks * len(tasks[of[r]].demos)) for r, _ in units])
    each_row = data.chosen(asked, torch.tensor([r for r, _ in units]).long())
    work = copies * (cfg.model.context_tokens + each_row.canvas.prod(1))
    parts, finished, whole = (
        train.portions(each_row, cfg.model, cfg.eval.tokens, copies),
        0,
        int(work.sum()),
    )

    def ask(part: Tensor, share: float) -> tuple[dict[int, list[Vote]], dict[int, np.ndarray]]:
        """By row, the votes, and the canvas of view 0."""
        mine = [units[i] for i in part.tolist()]
        rows = [r for r, _ in mine for _ in range(samples)]
        seen = [
            score.view(tasks[of[r]], number[r], v, cfg.data)
            for r, v in mine
            for _ in range(samples)
        ]
        symmetry = Symmetry(*(torch.stack([s[i] for s, _ in seen]) for i in range(2)))
        if own is not None:
            owner, k = (
                own[[of[r] for r in rows]],
                torch.tensor([v for _, v in mine for _ in range(samples)]),
            )
            symmetry = data.row_symmetry(cfg.data, cfg.run.seed, owner, k)
        turn = symmetry, torch.nn.utils.rnn.pad_sequence([u for _, u in seen], batch_first=True)
        episodes = data.posed(
            packed, cfg.data, "test", data.chosen(asked, torch.tensor(rows)), view=turn
        )
        episodes = (
            episodes if own is None else episodes._replace(row=owner * cfg.data.symmetries + k)
        )
        batch = data.batch(packed, episodes, cfg.model.raster)
        answering, explains = from_demos(
            cast, cfg, encode, batch, tasks, [of[r] for r in rows], turn, share
        )
        keys = [
            (int(hashes[of[r]][:13], 16), number[r], v, k) for r, v in mine for k in range(samples)
        ]
        said, spent = thoughts(cast, cfg, answering, batch, dtype, keys)
        back, found, first = data.inverse(symmetry), {r: list[Vote]() for r, _ in mine}, {}
        for i, (r, v) in enumerate(mine):
            b = max(range(i * samples, (i + 1) * samples), key=lambda j: (said[j, spent[j]][1], -j))
            canvas = tuple(episodes.canvas[b].tolist())
            for step in sorted({min(s, spent[b]) for s in cfg.solve.steps} or {spent[b]}):
                logits, q = said[b, step]
                vote = vote_of(cfg, logits, canvas, Symmetry(back.dihedral[b], back.colours[b]))
                found[r].append(
                    vote._replace(q=q, demos=explains[b], view=v, step=step, source=source)
                )
            if v == 0:
                first[r] = said[b, spent[b]][0].argmax(-1).view(*canvas).cpu().numpy()
        return found, first

    for now in (parts[i : i + train.THREADS] for i in range(0, len(parts), train.THREADS)):
        if time.monotonic() > until:
            return
        begun, due = time.monotonic(), sum(int(work[part].sum()) for part in now)
        share = begun + (until - begun) * due / (whole - finished)
        said = train.side_by_side(functools.partial(ask, share=share), now, device)
        finished += due
        each = (time.monotonic() - begun) / sum(map(len, now))
        for found, first in said:
            made = [(r, vs, each * len({v.view for v in vs})) for r, vs in found.items()]
            yield (
                [
                    nothing[r]._replace(votes=vs, canvas=first.get(r), seconds=t)
                    for r, vs, t in made
                ],
                finished / whole,
            )


def canvas_for(task: Task, query: int) -> int:
    """The side that the task's demos and the query's input would take."""
    return max(
        max(x.shape) for x in (*(x for pair in task.demos for x in pair), task.queries[query][0])
    )


def predict(
    params: Params, cfg: Config, tasks: Task | Sequence[Task], views: int | None = None
) -> list[Prediction]:
    """Answers to every query of the tasks under so many views each, adapted as the config says, in order of tasks and queries."""
    given = [tasks] if isinstance(tasks, Task) else list(tasks)
    numbers, made = range(views or cfg.solve.views), []
    if cfg.solve.adapt == "joint":
        raise UserError(
            "solve.adapt: joint adaptation is a run of its own: etrm eval --adapt joint"
        )
    if cfg.solve.adapt == "full":
        for task in given:
            for part, _ in predictions(tuned(params, cfg, task, math.inf), cfg, [task], numbers):
                made += part
    else:
        for part, _ in predictions(params, cfg, given, numbers):
            made += part
    return score.joined(given, made)


# ---------------------------------------------------------------- a checkpoint against a set of tasks


class Solver(NamedTuple):
    """A checkpoint and how it is asked: who casts a vote."""

    path: Path
    params: Params
    cfg: Config
    meta: dict[str, Any]
    source: str  # hash of the weights and of all that its answers depend on
    spent: float = 0.0  # seconds of joint adaptation for each query


FREE = ("train.device", "train.dtype", "eval.tokens", "solve.")


def opened(path: str | Path, sets: Sequence[str] = (), weights: str = "ema") -> Solver:
    """A checkpoint with the config it was trained with; `sets` may change where and how tasks are answered."""
    c = checkpoint.load(path)
    raw = c.meta["config"]
    for item in sets:
        if not item.partition("=")[0].strip().startswith(FREE):
            raise UserError(
                f"--set {item}: of a checkpoint's config train.device, train.dtype, eval.tokens and solve.* may change"
            )
        config.set_item(raw, item)
    cfg = config.parse_config(raw, str(c.path))
    if (cfg.solve.noise > 0) != (cfg.solve.samples > 1):
        raise UserError(
            "solve.noise, solve.samples: noise is for samples to differ in, one does nothing without the other"
        )
    params = c.ema if weights == "ema" else c.params
    how = {k: v for k, v in msgspec.to_builtins(cfg.solve).items() if k not in ("views", "vote")}
    learns = [cfg.optimizer, cfg.run.seed] if cfg.solve.adapt in ("full", "joint") else []
    rest = [cfg.solve.vote == "demos", cfg.model, cfg.data, *learns]
    said = json.dumps([how, *msgspec.to_builtins(rest), str(train.hardware(cfg)[1])])
    return Solver(
        c.path, params, cfg, c.meta, short(checkpoint.digest_of(etrm.leaves(params), said))
    )


def short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


ADAPTED = {
    "none": "no adaptation",
    "context": "context search",
    "full": "full adaptation task by task",
    "joint": "joint adaptation, TRANSDUCTIVE",
}


class Question(NamedTuple):
    """What `answer` is to find out, and where it puts it."""

    tasks: list[Task]  # their outputs hidden
    views: range
    file: Path  # predictions.jsonl
    made: list[Prediction]  # what stands in it
    deadline: float = math.inf  # time.monotonic


def missing(solver: Solver, ask: Question) -> tuple[list[Task], set[Key]]:
    """(tasks of which some view was not asked yet, the views that were)."""
    own = [p for p in ask.made if p.source == solver.source]
    done = {
        (p.hash, p.query, v)
        for p in own
        for v in (ask.views if p.too_large else {x.view for x in p.votes})
    }
    wanting = lambda t, key: any(
        (key, i, v) not in done for i in range(len(t.queries)) for v in ask.views
    )  # noqa: E731
    return [t for t in ask.tasks if wanting(t, score.task_hash(t))], done


def jointly(solver: Solver, ask: Question, everyone: Sequence[Task]) -> Solver:
    """The solver after joint adaptation to everyone's demos, in at most 0.8 of the time; as it was where nothing is to be asked.

    Who votes also depends on these tasks. Once there are votes the weights stay as they are."""
    solver = solver._replace(source=short(solver.source + sources.set_hash(everyone)))
    if not missing(solver, ask)[0]:
        return solver
    begun = any(p.source == solver.source for p in ask.made)
    limit = 0.0 if begun else max(1e-3, 0.8 * (ask.deadline - time.monotonic()))
    folder = ask.file.with_name(f"joint-{solver.source}")
    params, seconds = tuned_jointly(solver.params, solver.cfg, everyone, folder, limit)
    return solver._replace(params=params, spent=seconds / sum(len(t.queries) for t in everyone))


def answer(solver: Solver, ask: Question, say: Callable[[float], None]) -> None:
    """Ask for the views that are not in the file yet; each batch is on disk before the next begins."""
    todo, done = missing(solver, ask)
    alone = solver.cfg.solve.adapt == "full"
    groups = [[t] for t in todo] if alone else [todo] if todo else []
    cells = [
        max(x.size for pair in (*g[0].demos, *g[0].queries) for x in pair if x is not None)
        for g in groups
    ]
    met: set[tuple[str, int]] = set()
    for n, group in enumerate(groups):
        begun, params, spent, until = time.monotonic(), solver.params, solver.spent, ask.deadline
        if alone and data.queries(data.pack(group), "test", solver.cfg.data).canvas[:, 0].any():
            # each task has its share of the time, by the cells of its largest grid, and learns at most four fifths of that
            share_of = (until - begun) * cells[n] / sum(cells[n:])
            params = tuned(params, solver.cfg, group[0], begun + 0.8 * share_of)
            spent = (time.monotonic() - begun) / len(group[0].queries)
        for part, share in predictions(
            params, solver.cfg, group, ask.views, solver.source, done, until
        ):
            # once a query: what all tasks had together, with its first view; what it had alone, whenever it is asked again
            first = [(p.task, p.query) not in met if alone else p.canvas is not None for p in part]
            met |= {(p.task, p.query) for p in part}
            part = [
                p._replace(seconds=p.seconds + spent * now)
                for p, now in zip(part, first, strict=True)
            ]
            score.append(ask.file, part)
            ask.made.extend(part)
            say((n + share) / len(groups))


def wanted(chosen: Sequence[str], limit: int, hide: bool) -> dict[str, list[Task]]:
    """The first `limit` tasks (0: all), source by source. A task of which an earlier source has a demo under the same id is left
    out (ARC-2 repeats six of ARC-1's, changed); a wholly other one gets a name of its own, as in `sources.load`."""
    found: dict[str, list[Task]] = {}
    seen: dict[str, Task] = {}
    for source in dict.fromkeys(chosen):
        found[source] = []
        for task in sources.load([source], hide=hide):
            name, twin = sources.free_name(task, seen), seen.get(task.name)
            if (
                name not in seen
                and not (twin and sources.akin(twin, task))
                and len(seen) < (limit or math.inf)
            ):
                seen[name] = task._replace(name=name)
                found[source].append(seen[name])
    return found


def shard_of(tasks: Sequence[Task], shard: str) -> list[Task]:
    """Every n-th task, for "i/n" with i from 1."""
    i, _, n = shard.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise UserError(f"--shard {shard}: must look like 1/4")
    return list(tasks[int(i) - 1 :: int(n)])


def place_of(path: Path) -> Path:
    """The folder of a checkpoint, or this one where nothing can be written there."""
    return path.parent if os.access(path.parent, os.W_OK) else Path()


def lines_file(option: str, path: str | Path) -> Path:
    """Where predictions can be kept: what has another ending is read as a submission."""
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{option} {path}: must end in .jsonl")
    return Path(path)


def evaluate(
    paths: Sequence[str | Path], data_sources: Sequence[str] = (), sets: Sequence[str] = (), weights: str = "ema",
    predictions_file: str = "", budget: float = math.inf, shard: str = "1/1", submit: str = "",
    say: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Ask checkpoints (which vote together), then score: what was on disk before any output of a query was looked at.

    The default data is the dev split of the first, whose rule of voting is that of all. budget: seconds, after which no
    batch begins. Predictions that the file holds already are not made again. Without any known output there are
    predictions but no scores. `submit` is written first of all, and again whenever there is more to say.
    """
    deadline, first = time.monotonic() + budget, opened(paths[0], sets, weights)
    how = first.cfg.solve
    solvers = [first, *(opened(p, [*sets, f"solve.vote={how.vote}"], weights) for p in paths[1:])]
    chosen = tuple(data_sources) or first.cfg.data.dev
    if not chosen:
        raise UserError(
            f"{first.path}: was trained without a dev split; name the tasks with --data"
        )
    load = functools.partial(wanted, chosen, 0 if data_sources else first.cfg.data.max_eval_tasks)
    named = load(hide=True)
    tasks = [t for ts in named.values() for t in shard_of(ts, shard)]
    if not tasks:
        raise UserError(f"--shard {shard}: no task is left")
    file = lines_file(
        "--predictions", predictions_file or place_of(first.path) / "predictions.jsonl"
    )
    ask = Question(
        tasks, range(how.views), file, score.read(file) if file.exists() else [], deadline
    )

    def heard() -> list[Prediction]:
        by = {s.source for s in solvers}
        here = score.joined(tasks, ask.made, lambda v: v.source in by and v.view < how.views)
        if submit:
            checkpoint.write_text(Path(submit), json.dumps(score.submission(tasks, here, how.vote)))
        return here

    heard()  # what cannot be written is said before hours have gone by
    everyone = [t for ts in named.values() for t in ts]
    solvers = [jointly(s, ask, everyone) if s.cfg.solve.adapt == "joint" else s for s in solvers]
    for views in (
        [ask.views]
        if budget == math.inf or any(s.cfg.solve.adapt == "full" for s in solvers)
        else rounds_of(how.views)
    ):
        for k, solver in enumerate(solvers):
            before, part = views.start + k * len(views) / len(solvers), len(views) / len(solvers)
            if time.monotonic() < deadline:
                answer(
                    solver,
                    ask._replace(views=views),
                    lambda done, a=before, b=part: say((a + b * done) / how.views),
                )  # type: ignore[misc]
        here = heard()
    if not any(p.votes or p.too_large for p in here):
        raise UserError(f"--budget: {budget / 60:g} minutes are not enough for a single view")
    adapted = " and ".join(sorted({ADAPTED[s.cfg.solve.adapt] for s in solvers}))
    result: dict[str, Any] = {
        "data": list(chosen),
        "views": how.views,
        "weights": weights,
        "adaptation": adapted,
    }
    result |= {
        "checkpoints": [str(s.path) for s in solvers],
        "step": first.meta.get("step"),
        "predictions": str(file),
    }
    result |= {
        "votes": sum(len(p.votes) for p in here),
        "seconds_per_task": sum(p.seconds for p in here) / len(tasks),
    }
    result["too_large"] = sum(p.too_large > 0 for p in here)
    result["guard"] = "; ".join(
        sorted({str(msgspec.convert(s.meta["finding"], sources.Finding)) for s in solvers})
    )
    result |= {"submission": submit} if submit else {}
    return result | judged(
        solvers, {k: shard_of(ts, shard) for k, ts in load(hide=False).items()}, here, how.vote
    )


def rounds_of(views: int) -> list[range]:
    """1, 1, 2, 4 ... more views each, so that a budget that ends early was spent on all queries alike."""
    edges = [0, *(1 << i for i in range(views.bit_length()) if 1 << i < views), views]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def judged(
    solvers: Sequence[Solver], known: dict[str, list[Task]], here: Sequence[Prediction], rule: str
) -> dict[str, Any]:
    """Scores of predictions, of each source where there are several, and what they are worth; {} without known outputs."""
    tasks = [t for ts in known.values() for t in ts]
    if not any(y is not None for t in tasks for _, y in t.queries):
        return {"unanswered": sum(not p.votes for p in here)}
    result = score.score(tasks, here, rule)
    if len(known) > 1:
        names = {k: {t.name for t in ts} for k, ts in known.items()}
        own = {k: [p for p in here if p.task in names[k]] for k in known}
        scored = [
            k for k, ts in known.items() if any(y is not None for t in ts for _, y in t.queries)
        ]
        result["by_source"] = {k: score.score(known[k], own[k], rule) for k in scored}
    clean = [held_out(s.cfg, s.meta, tasks) for s in solvers]
    result["held_out"] = False if False in clean else None if None in clean else True
    kept_out = [x for s in solvers for x in s.cfg.data.held_out]
    return result | looked({place_of(s.path) for s in solvers}, kept_out, known, result["pass@2"])


def held_out(cfg: Config, meta: dict[str, Any], tasks: Sequence[Task]) -> bool | None:
    """Whether no evaluated task shares a pair with what was trained on, now or in what training started from; None where
    the training data is not here."""
    found = [unseen(cfg, meta, tasks)]
    for a in meta.get("ancestors", ()):
        found.append(
            a["held_out"]
            if "held_out" in a
            else held_out(config.parse_config(a["config"], ""), a, tasks)
        )
    return False if False in found else None if None in found else True


def unseen(cfg: Config, meta: dict[str, Any], tasks: Sequence[Task]) -> bool | None:
    """As `held_out`, of the training set alone."""
    try:
        trained, _, _ = sources.prepare(cfg.data)
    except UserError:
        return None
    if sources.set_hash(trained) != meta["data"]:
        return None
    try:
        sources.guard(trained, [], tasks, "refuse", sources.MIN_SHARED_CELLS)
    except UserError:
        return False
    return True


@functools.cache
def hashes_of(source: str) -> frozenset[str]:
    return frozenset(score.task_hash(t) for t in sources.load([source], hide=True))


def looked(
    folders: Collection[Path], kept_out: Sequence[str], known: dict[str, list[Task]], value: float
) -> dict[str, int | None]:
    """Count a look at held-out tasks (ARC's two evaluation sets and a config's own) in looks.jsonl of each folder.

    "look": how often the task seen most often was looked at by now; None where that could not be counted; {} where none
    of the tasks is held out."""
    every = ("arc1:evaluation", "arc2:evaluation", *kept_out)
    there = [
        x
        for x in every
        if x in sources.EMBEDDED or x.startswith(sources.GENERATED) or Path(x).exists()
    ]
    held = frozenset().union(*map(hashes_of, there))
    seen = sorted(
        {short(key) for ts in known.values() for t in ts if (key := score.task_hash(t)) in held}
    )
    row = {
        "data": list(known),
        "pass@2": value,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    counts = []
    for folder in folders if seen else ():
        try:
            with open(folder / "looks.jsonl", "a+", encoding="utf-8") as f:
                f.write(json.dumps(row | {"tasks": seen}) + "\n")
                f.seek(0)
                so_far = Counter(key for line in f for key in data.parsed(line)["tasks"])
            counts.append(max(so_far[key] for key in seen))
        except (OSError, ValueError, KeyError):
            return {"look": None}
    return {"look": max(counts)} if counts else {}


def merge(
    files: Sequence[Path], chosen: Sequence[str], rule: str, out: str = "", submit: str = ""
) -> dict[str, Any]:
    """Join predictions and submissions into one file; for tasks of the sources given, into a submission and scores."""
    if submit and not chosen:
        raise UserError("--submission: name the tasks with --data")
    target = lines_file("--output", out) if out else None
    made = [p for f in files for p in score.read(f)]
    hidden = [t for ts in wanted(chosen, 0, True).values() for t in ts]
    here = score.joined(hidden, made) if chosen else list(score.union(made).values())
    if not any(p.votes for p in here):
        raise UserError(f"{', '.join(map(str, files))}: no vote for any of the tasks")
    result: dict[str, Any] = {
        "files": [str(f) for f in files],
        "votes": sum(len(p.votes) for p in here),
        "queries": len(here),
    }
    result["unanswered"] = sum(not p.votes for p in here)
    if target:
        checkpoint.write_text(
            target,
            "".join(score.to_line(p) + "\n" for p in score.by_source(score.union(made).values())),
        )
    if submit:
        checkpoint.write_text(Path(submit), json.dumps(score.submission(hidden, here, rule)))
    known = wanted(chosen, 0, False)
    if not any(y is not None for ts in known.values() for t in ts for _, y in t.queries):
        return result
    result |= score.score([t for ts in known.values() for t in ts], here, rule)
    return result | looked({place_of(files[0])}, (), known, result["pass@2"])


def answers(
    path: str | Path, task_file: str, sets: Sequence[str] = ()
) -> list[tuple[Task, list[tuple[Prediction, list[Answer]]]]]:
    """Each task of a file with, per query, the ranked answers."""
    solver = opened(path, sets)
    tasks = sources.load([task_file], hide=True)
    by_task: dict[str, list[tuple[Prediction, list[Answer]]]] = {}
    for p in predict(solver.params, solver.cfg, tasks):
        by_task.setdefault(p.task, []).append((p, rank(p.votes, solver.cfg.solve.vote)))
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
    device, dtype = train.hardware(cfg)
    packed = data.pack(tasks, device)
    asked = data.queries(packed, cfg.data.query, cfg.data)
    here = (tree_map(lambda x: x.to(device), p) for p in (c.params, c.ema))
    raw, ema = (train.probe(p, cfg, packed, cfg.data.query, dtype) for p in here)
    wrong = [
        f"{tasks[t].name}[{p - int(packed.first[t])}]"
        for p, t in ((p, int(packed.task_of[p])) for p in raw["wrong"])
    ]
    sizes, guard = data.histogram(asked.canvas.amax(1)), checkpoint.warned(c.meta)
    text = (
        f"{len(tasks)} tasks, {raw['n']} pairs asked, canvases {', '.join(f'{k}: {v}' for k, v in sizes.items())}\n"
        f"raw weights: exact match {score.with_interval(raw['exact'], raw['n'])}, cells {100 * raw['cell_accuracy']:.2f} %; "
        f"EMA: {score.with_interval(ema['exact'], ema['n'])}, {100 * ema['cell_accuracy']:.2f} %\n"
        f"{ran['step']} steps, {ran['samples']:,} sample-steps, {ran['seconds']:.0f} s\n"
        f"wrong: {', '.join(wrong) or 'none'}\n{PUBLISHED}"
    ) + (f"\nguard: {guard}" if guard else "")
    return {
        "exact_match": raw["exact"], "cell_accuracy": raw["cell_accuracy"], "steps": ran["step"],
        "interval95": {"exact_match": score.wilson(raw["exact"], raw["n"])},
        "seconds": ran["seconds"], "samples": ran["samples"], "pairs": raw["n"], "wrong": wrong,
        "ema": {"exact_match": ema["exact"], "cell_accuracy": ema["cell_accuracy"]}, "text": text,
    }  # fmt: skip
