"""Training: the slots of a batch, one pure step, what is watched, the loop of all processes.

Read `train_step` and `fit` first. Axes: B slots of a shard, T context tokens, D hidden, Q queries.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from . import baselines, checkpoint, data, etrm, optim, sources
from .checkpoint import Run, SavedState
from .config import Config, ModelConfig, UserError
from .encoders import encoder_of, init_params, latent_of, lookup
from .etrm import Carry, Encode, Params, act_loss, act_step, fresh_carry, leaves, rebuild
from .optim import hardware, is_asleep, learning_rate, side_by_side, update

STOPPED = 75  # EX_TEMPFAIL, exit code of a run that was asked to stop and saved its state
EVAL_TOKENS = 16384  # of an evaluation batch

Row = dict[str, Any]  # of metrics

# ---------------------------------------------------------------- processes


def place_of() -> tuple[int, int]:
    """(rank, number of processes) from the environment that torchrun sets."""
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    given = {name: os.environ.get(name, "") for name in names}
    if given["RANK"] in ("", "0") and given["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    rank, world, port = (int(given[k]) if given[k].isdecimal() else -1 for k in names[:3])
    if not (0 <= rank < world and port > 0 and given["MASTER_ADDR"]):
        facts = ", ".join(f"{name} is {value or None}" for name, value in given.items())
        raise UserError(f"{facts}: start several processes with --procs or torchrun")
    return rank, world


@contextlib.contextmanager
def together(rank: int, world: int, device: torch.device) -> Iterator[None]:
    """Joins the other processes. Raises UserError when they are lost."""
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        stall = datetime.timedelta(minutes=10)  # that one process may be behind the others
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=stall)
    try:
        yield
    except RuntimeError as e:
        if world == 1 or not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", str(e)):
            raise
        time.sleep(3)  # torch's launcher first says which of them failed
        raise UserError(f"process {rank} lost the others; continue with --resume") from None


# ---------------------------------------------------------------- what a run is made of


class Setup(NamedTuple):
    """What a run is made of, from its config alone."""

    cfg: Config
    tasks: data.Tasks  # training set, its grids on the device
    deck: data.Deck
    watched: data.Tasks  # that evaluations ask
    rule: str  # by which they are asked: the training set's own, or the official queries
    meta: dict[str, Any]  # what a checkpoint says of itself
    pairs: Tensor  # (N, 16) digests of the pairs trained on, here or in what it starts from
    shards: tuple[Tensor, ...]  # slots of each shard of this process, out of cfg.train.shards
    device: torch.device
    dtype: torch.dtype
    params: dict[str, Tensor]  # path -> float32 leaf
    like: Params  # the tree's shape
    encode: Encode


def trained_of(s: Setup) -> dict[str, Tensor]:
    """The leaves that the optimizers train; rows of a table are trained one by one."""
    return {k: p for k, p in s.params.items() if p.requires_grad}


def undivided(cfg: ModelConfig) -> str:
    """Why a step cannot be computed in shards; "" where it can."""
    if cfg.unrolled > 1:
        return "model.unrolled ends the steps of all slots together"
    faulty = cfg.published_faults and lookup(cfg.encoder.kind).variational
    return "model.published_faults divides the KL by the whole batch" if faulty else ""


def cost_of(deck: data.Deck, cfg: ModelConfig) -> Tensor:
    """(slots,) tokens that each slot's canvas has on average over its band."""
    points = (torch.arange(16) + 0.5) / 16
    canvas = deck.canvas[data.dealt(deck, points, torch.arange(deck.slots)[:, None])]
    return cfg.context_tokens + canvas.prod(-1).double().mean(-1)


def deal(deck: data.Deck, cfg: ModelConfig, shards: int) -> tuple[Tensor, ...]:
    """Ids of the slots of each shard: the costliest slot first, each to the lightest shard."""
    cost, load = cost_of(deck, cfg).tolist(), [0.0] * shards
    dealt: list[list[int]] = [[] for _ in range(shards)]
    for slot in sorted(range(deck.slots), key=lambda i: (-cost[i], i)):
        lightest = load.index(min(load))
        load[lightest] += cost[slot]
        dealt[lightest].append(slot)
    if not all(load):
        raise UserError(f"train.batch: {deck.slots} slots cannot fill {shards} shards")
    return tuple(torch.tensor(sorted(slots)) for slots in dealt)


def setup(cfg: Config, resume: bool = False, given: Sequence[data.Task] = ()) -> Setup:
    """Raises UserError when the config cannot be trained. given: train on these tasks instead.
    resume: init_from is not read again, for the state holds what came of it."""
    (rank, world), (device, dtype) = (0, 1) if given else place_of(), hardware(cfg)
    optim.keep_pages(dtype)
    prepared = (list(given), [], sources.Finding("given")) if given else sources.prepare(cfg.data)
    train, dev, finding = prepared
    if cfg.eval.on == "dev" and not dev:
        raise UserError("eval.on: the dev split is to be watched but data.dev is empty")
    if cfg.train.shards > 1 and (why := undivided(cfg.model)):
        raise UserError(f"train.shards: must be 1 where {why}")
    if cfg.train.shards % world:
        raise UserError(f"train.shards: {cfg.train.shards} cannot be spread over {world} processes")
    if (side := cfg.data.canvas or cfg.data.max_side) > cfg.model.raster:
        field = "canvas" if cfg.data.canvas else "max_side"
        raise UserError(f"data.{field}: {side} is larger than model.raster = {cfg.model.raster}")
    tasks = data.pack(train, device)
    queries = data.queries(tasks, cfg.data.query, cfg.data)
    fitting = torch.zeros(len(train), dtype=torch.bool)
    fitting[queries.task[queries.fits & queries.known]] = True
    deck = data.deck(queries, cfg.train.batch, sources.weights(train, cfg.data.share, fitting))
    watched = tasks if cfg.eval.on == "train" else data.pack(dev, device)
    rule = cfg.data.query if cfg.eval.on == "train" else "test"
    asked = data.queries(watched, rule, cfg.data)
    if not (asked.fits & asked.known).any():
        raise UserError(f"eval.on: no query of the {cfg.eval.on} set fits a canvas")
    like = baselines.with_rows(init_params(cfg.model, cfg.run.seed), cfg, train)
    drawn, pairs = leaves(like), torch.zeros(0, 16, dtype=torch.uint8)
    optim.check_patterns(cfg.optimizer, drawn)
    meta: dict[str, Any] = {"config": json.loads(msgspec.json.encode(cfg)), "tasks": len(train)}
    meta |= {"data": sources.set_hash(train), "order": sources.set_hash(train, ordered=True)}
    meta |= {"watched": sources.set_hash(dev, ordered=True), "dtype": str(dtype)}
    meta["finding"] = msgspec.to_builtins(finding)
    saved = checkpoint.newest_facts(Path(cfg.run.dir)) if resume else {}
    if not saved and cfg.init_from.path:
        source, meta["init_from"] = checkpoint.start(cfg.init_from, cfg.model, drawn)
        drawn, pairs = drawn | source.tensors, source.pairs
        meta["finding"]["started"] = source.started
    meta |= {k: saved[k] for k in ("finding", "init_from") if k in saved}
    if rank == 0 and not saved:
        pairs = checkpoint.pair_digests(train, pairs)
    fixed = (baselines.TABLE, "encoder.keys")  # rows are trained one by one, keys not at all
    params = {
        k: v.to(device).requires_grad_(k not in fixed and not is_asleep(cfg.optimizer, k, math.inf))
        for k, v in drawn.items()
    }
    shards = deal(deck, cfg.model, cfg.train.shards)[rank::world]
    sets = (cfg, tasks, deck, watched, rule, meta, pairs, shards)
    return Setup(*sets, device, dtype, params, like, encoder_of(cfg.model))


def min_steps(cfg: ModelConfig, seed: int, slots: Tensor, n: Tensor, step: Tensor) -> Tensor:
    """Exploration (B,): with its probability an ACT step may not halt before a number drawn from
    2..halt_max_steps. Drawn anew in every optimizer step, as published."""
    u = data.uniform(2, seed, data.EXPLORE, slots, n, step)
    least = (2 + (u[:, 1] * (cfg.halt_max_steps - 1)).long()).clamp(max=cfg.halt_max_steps)
    return torch.where(u[:, 0] < (0.0 if cfg.fixed_steps else cfg.exploration), least, 0)


def noise(lanes: int, demos: int, seed: int, slots: Tensor, n: Tensor, step: Tensor) -> Tensor:
    """Standard normal (B, demos, lanes) for a variational encoder, drawn anew in every step."""
    u = data.uniform(demos * lanes, seed, data.NOISE, slots, n, step)
    return (math.sqrt(2) * torch.erfinv(2 * u - 1 + 2.0**-53)).float().unflatten(-1, (demos, lanes))


def next_batch(s: Setup, slots: Tensor, carry: Carry) -> tuple[Carry, data.Batch, Tensor]:
    """(carry whose halted slots have begun their next episode, batch, exploration (B,)).
    The wait for the device in a step: which slots have halted decides the shapes of what comes."""
    cfg, seed = s.cfg.model, s.cfg.run.seed
    halted, steps, n = (x.cpu() for x in (carry.halted, carry.steps, carry.n))
    n, step = n + halted, torch.where(halted, 0, steps) + 1
    batch = data.batch(s.tasks, data.draw(s.tasks, s.deck, s.cfg.data, seed, slots, n), cfg.raster)
    if (lanes := latent_of(cfg)) is not None:
        drawn = noise(lanes, batch.demos.most, seed, slots, n, step)
        batch = batch._replace(noise=drawn.to(s.device))
    carry = etrm.relaid(cfg, carry, halted.tolist(), batch.cells)._replace(n=n.to(s.device))
    return carry, batch, min_steps(cfg, seed, slots, n, step).to(s.device)


# ---------------------------------------------------------------- one step

SCORES = ("lm_loss", "q_loss", "kl", "cell_accuracy", "exact", "q_right", "steps", "explored")
METRICS = (*SCORES, "count")


class Step(NamedTuple):
    """What one ACT step gives: of a shard, or of all slots, as far as this process has them."""

    carries: list[Carry]  # of each shard of this process
    grads: list[Tensor]  # of the trained leaves in their order; of a shard, a table's rows last
    sums: Tensor  # (2, 9) METRICS summed over all slots, and over those that halted
    contexts: list[Tensor | None]  # (B, T, D) of each shard of this process
    touched: Sequence[Tensor] = ()  # with a table: gradients of rows and their numbers
    asked: bool = False  # whether any process asked to stop


def train_step(s: Setup, carry: Carry, batch: data.Batch, least: Tensor, scale: float) -> Step:
    """One ACT step of a shard and the gradients of scale * summed loss; nothing is changed.
    The float32 parameters are cast to the compute dtype once, here."""
    params, batch = baselines.gathered(s.params, batch)
    tree, cfg = rebuild(s.like, {k: p.to(s.dtype) for k, p in params.items()}), s.cfg.model
    total = torch.zeros((), device=batch.inputs.device)
    for taken in range(1, cfg.unrolled + 1):
        carry, out = act_step(tree, cfg, s.encode, carry, batch, least)
        loss = act_loss(cfg, out, batch.labels, batch.cells)
        total = total + loss.total.sum()
        if taken == cfg.unrolled or bool(carry.halted.all()):
            break
        carry = carry._replace(halted=torch.zeros_like(carry.halted))
    if cfg.unrolled > 1:
        carry = carry._replace(halted=torch.ones_like(carry.halted))
    trained = [p for p in params.values() if p.requires_grad]
    mean = total * (scale / taken)
    grads = torch.autograd.grad(mean, trained, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        scores = (loss.lm, loss.q, loss.kl, loss.cell_accuracy, loss.exact, loss.q_right)
        rows = (*scores, carry.steps, least > 0, torch.ones_like(loss.lm))
        table = torch.stack([r.float() for r in rows]) * loss.labelled
        sums = torch.stack((table.sum(-1), (table * carry.halted).sum(-1)))
    return Step([carry], list(grads), sums, [out.context])


def reduce(per_shard: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sum over all shards of all processes, in the order of shards: the same bits on 1, 2 or 8
    processes. Process r of w computes the shards r, r + w, ..."""
    shards = torch.stack([torch.cat([x.flatten() for x in tensors]) for tensors in per_shard])
    if dist.is_initialized():
        parts = [torch.empty_like(shards) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, shards)
        shards = torch.stack(parts, 1).flatten(0, 1)
    total = shards[0]
    for part in shards[1:]:
        total += part
    split = total.split([x.numel() for x in per_shard[0]])
    return [part.view_as(x) for part, x in zip(split, per_shard[0], strict=True)]


def one_step(s: Setup, carries: Sequence[Carry], scale: float = 1.0, ask: bool = False) -> Step:
    """One ACT step of every slot, shard by shard; gradients of the mean loss.
    scale: of the loss on the way, so that small gradients do not vanish in fp16."""
    slots, rows = s.cfg.train.batch, 2 * (baselines.TABLE in s.params)

    def work(shard: tuple[Tensor, Carry]) -> Step:
        carry, batch, least = next_batch(s, *shard)
        out = train_step(s, carry, batch, least, scale / slots)
        touched = baselines.spread(shard[0], batch, out.grads.pop(), slots) if rows else ()
        return out._replace(touched=touched)

    steps = side_by_side(work, zip(s.shards, carries, strict=True), s.device)
    flag = steps[0].sums.new_tensor([float(ask)])
    asked, sums, *grads = reduce([[flag, x.sums, *x.touched, *x.grads] for x in steps])
    if scale != 1:
        torch._foreach_mul_([*grads[: rows // 2], *grads[rows:]], 1 / scale)
    carries, contexts = [x.carries[0] for x in steps], [x.contexts[0] for x in steps]
    return Step(carries, grads[rows:], sums.clone(), contexts, grads[:rows], float(asked) > 0)


# ---------------------------------------------------------------- watching a run


def metrics_row(sums: Tensor) -> dict[str, float]:
    """Means over slots, all of them and those that halted, from the sums (2, 9) of METRICS."""
    row: dict[str, float] = {}
    for which, (*values, count) in zip(("all", "halted"), sums.tolist(), strict=True):
        named = zip(SCORES, values, strict=True)  # a KL of 0: the encoder has none
        row |= {f"{which}/{k}": v / count for k, v in named if count and (k != "kl" or v)}
        row[f"{which}/count"] = count
    return row


def gradient_row(s: Setup, out: Step) -> Row:
    """Norms of the gradients of the core and of the encoder before clipping, and their ratio."""
    paths = [*trained_of(s), *[baselines.TABLE] * bool(out.touched)]
    norms = torch.stack(torch._foreach_norm([*out.grads, *out.touched[:1]])).tolist()
    row = {}
    for module in ("core", "encoder"):
        if parts := [x for k, x in zip(paths, norms, strict=True) if k.startswith(module)]:
            row[f"{module}/grad_norm"] = math.hypot(*parts)
    if len(row) == 2:
        row["encoder/grad_ratio"] = row["encoder/grad_norm"] / max(row["core/grad_norm"], 1e-30)
    return row


def context_row(contexts: Sequence[Tensor | None]) -> Row:
    """Variances of the contexts (B, T, D) of all slots of all processes: over slots (0: the encoder
    has collapsed), and over the tokens of a slot."""
    present = [c.float() for c in contexts if c is not None]
    if not present:
        return {}
    count, total = reduce([[c.new_tensor([len(c)]), c.sum(0)] for c in present])
    sums = []
    for c in present:
        across = (c - total / count).square().mean((1, 2)).sum()
        sums.append([across, c.var(1, unbiased=False).mean(-1).sum()])
    names = ("encoder/context_var_across", "encoder/context_var_within")
    return {k: float(v / count) for k, v in zip(names, reduce(sums), strict=True)}


def portions(asked: data.Queries, cfg: ModelConfig, times: Tensor | int = 1) -> list[Tensor]:
    """Rows of `asked` of each evaluation batch, by size, at most EVAL_TOKENS tokens each; those
    without a canvas are left out. times: canvases that each row takes, one number or (Q,)."""
    cells = asked.canvas.prod(1)
    need, order = ((cfg.context_tokens + cells) * times).tolist(), torch.argsort(cells, stable=True)
    batches: list[list[int]] = []
    room = 0
    for row in order[cells[order] > 0].tolist():
        if need[row] > room:
            batches.append([])
            room = EVAL_TOKENS
        batches[-1].append(row)
        room -= need[row]
    return [torch.tensor(rows) for rows in batches]


def probe(params: Params, cfg: Config, tasks: data.Tasks, rule: str, foreign: bool = False) -> Row:
    """Mean loss, cell accuracy and exact match of all queries, unaugmented, with their own or, if
    any, another task's demos. An output that does not fit is wrong and has no loss."""
    (device, dtype), (rank, world) = hardware(cfg), place_of()
    asked = data.queries(tasks, rule, cfg.data)
    asked = data.chosen(asked, asked.known)
    if foreign and len(asked.task[asked.canvas[:, 0] > 0].unique()) < 2:
        return {}
    shown = asked.pair[data.donors(asked, cfg.run.seed)] if foreign else asked.pair
    encode, cast = encoder_of(cfg.model), etrm.tree_map(lambda x: x.to(dtype), params)
    scores = torch.zeros(3, len(asked.pair))  # loss, cell accuracy, exact

    def answer(rows: Tensor) -> None:
        demos_of = data.chosen(asked, rows)._replace(pair=shown[rows])
        row = tasks.task_of[shown[rows]] * cfg.data.symmetries  # of the task as it is
        e = data.posed(tasks, cfg.data, rule, demos_of)._replace(query=asked.pair[rows], row=row)
        batch = data.batch(tasks, e, cfg.model.raster)
        out, _ = etrm.think(cast, cfg.model, encode, batch, dtype, cfg.model.halt_max_steps)
        loss = act_loss(cfg.model, out, batch.labels, batch.cells)
        scores[:, rows] = torch.stack((loss.lm, loss.cell_accuracy, loss.exact.float())).cpu()

    side_by_side(answer, portions(asked, cfg.model)[rank::world], device)
    [everywhere] = reduce([[scores.to(device)]])  # each row is of one process, elsewhere 0
    fits, n = asked.fits.float(), len(asked.fits)
    loss, cells, exact = (everywhere.cpu() * fits).sum(1).tolist()
    means = {"loss": loss / float(fits.sum()), "cell_accuracy": cells / n, "exact": exact / n}
    return {**means, "n": n}


def watch(s: Setup, ema: dict[str, Tensor]) -> Row:
    """All probes, e.g. dev/ema/own/loss, and what the first weights gain by their own demos."""
    cfg, row = s.cfg, Row()
    for weights in cfg.eval.weights:
        tree = rebuild(s.like, ema if weights == "ema" else s.params)
        for whose in ("own", "foreign"):
            scores = probe(tree, cfg, s.watched, s.rule, whose == "foreign")
            row |= {f"{cfg.eval.on}/{weights}/{whose}/{k}": v for k, v in scores.items()}
    first = f"{cfg.eval.on}/{cfg.eval.weights[0]}"
    for k in ("loss", "cell_accuracy", "exact"):
        if f"{first}/foreign/{k}" in row:
            row[f"gap/own_foreign/{k}"] = row[f"{first}/own/{k}"] - row[f"{first}/foreign/{k}"]
    return row


# ---------------------------------------------------------------- the state of a run


class Progress(msgspec.Struct):
    """How far a run has come, beside its tensors; saved in every state."""

    scale: float = 1.0  # of the loss, in fp16
    step: int = 0
    seconds: float = 0.0
    best: float | None = None  # loss of the best evaluation
    waited: int = 0  # evaluations since then
    last: Row = {}  # of the last evaluation
    ended: str = ""  # why the run is over; "" while it is not
    rows: int = 0  # of metrics so far


class State(msgspec.Struct):
    """All that changes during a run, beside the parameters."""

    ema: dict[str, Tensor]
    opts: list[torch.optim.Optimizer]
    carries: list[Carry]  # of this process's shards
    sums: Tensor  # (2, 9) METRICS since the last row
    pairs: Tensor  # (N, 16) as in Setup
    progress: Progress


def fresh_state(s: Setup) -> State:
    """The state before the first step."""
    carries = [fresh_carry(s.cfg.model, [0] * len(x), s.dtype, s.device) for x in s.shards]
    ema = {k: p.detach().clone() if p.requires_grad else p.detach() for k, p in s.params.items()}
    opts = optim.optimizers(s.cfg.optimizer, s.params, s.dtype)
    sums = torch.zeros(2, len(METRICS), device=s.device)
    progress = Progress(2.0**16 if s.dtype == torch.float16 else 1.0)
    return State(ema, opts, carries, sums, s.pairs, progress)


def save(run: Run, s: Setup, state: State, names: Sequence[str], full: bool) -> None:
    """Copies of the weights under these names and, where `full`, of the state of all processes."""
    tensors = checkpoint.carry_tensors(s.shards, state.carries) if full else {}
    if full and dist.is_initialized():
        parts: list[Any] | None = None if run.rank else [None] * dist.get_world_size()
        dist.gather_object(tensors, parts)
        tensors = {k: v for part in parts or () for k, v in part.items()}
    if run.rank or not names:
        return
    run.wait()
    trees = {"params": s.params, "ema": state.ema}
    weights = {f"{tree}.{k}": v for tree, named in trees.items() for k, v in named.items()}
    weights = checkpoint.copied({**weights, "pairs": state.pairs})
    facts = {**s.meta, **msgspec.structs.asdict(state.progress), "score": state.progress.last}
    if full:
        others = {"sums": state.sums, **optim.optimizer_tensors(state.opts)}
        tensors |= checkpoint.copied(others)
    run.save(names, weights, tensors, facts)


def take_up(s: Setup, state: State, saved: SavedState) -> list[str]:
    """Put a saved state in the place of a fresh one; what was skipped to find it."""
    tensors, facts, eval_config = saved.tensors, saved.facts, s.meta["config"]["eval"]
    checkpoint.check_same(facts, s.meta)
    try:
        state.progress = progress = msgspec.convert(facts, Progress)
    except msgspec.ValidationError as e:
        raise UserError(f"--resume: the state cannot be read: {e}") from None
    progress.ended = ""
    if any(facts["config"]["eval"][k] != eval_config[k] for k in ("on", "weights")):
        progress.best, progress.waited = None, 0  # it was measured otherwise
    with torch.no_grad():
        for k, p in s.params.items():
            p.copy_(tensors[f"params.{k}"])
            state.ema[k].copy_(tensors[f"ema.{k}"])
    optim.load_optimizers(state.opts, tensors)
    state.carries = [checkpoint.carry_from(tensors, slots, s.device) for slots in s.shards]
    state.sums, state.pairs = tensors["sums"].to(s.device), tensors["pairs"]
    return saved.skipped


# ---------------------------------------------------------------- the loop


def advance(s: Setup, state: State, ask: bool = False) -> tuple[Step, float]:
    """Step, clip and average, in place: (the step, the norm of its gradients before clipping).
    In fp16 an overflow of the gradients halves the scale of the loss and leaves the step out.
    Raises UserError where they, or the loss, are not finite otherwise."""
    cfg, progress, trained = s.cfg, state.progress, trained_of(s)
    progress.step += 1
    out = one_step(s, state.carries, progress.scale, ask)
    state.carries = out.carries
    state.sums += out.sums
    lr, norm = learning_rate(cfg.optimizer, progress.step, cfg.train.steps), math.nan
    pairs = zip(trained.items(), out.grads, strict=True)
    awake = [(p, g) for (k, p), g in pairs if not is_asleep(cfg.optimizer, k, progress.step)]
    finite = bool(out.sums.isfinite().all())
    if finite and all(bool(rows.isfinite().all()) for rows in out.touched):
        params, grads = [p for p, _ in awake], [g for _, g in awake]
        norm = float(update(state.opts, params, grads, lr, cfg.optimizer.clip))
    if math.isfinite(norm):
        if trained:  # not where rows of a table are all that is trained
            averages = [state.ema[k] for k in trained]
            torch._foreach_lerp_(averages, list(trained.values()), 1 - cfg.train.ema)
        if out.touched:
            share = lr / (cfg.optimizer.lr or 1.0) * baselines.TABLE_LR
            table, (rows, ids) = s.params[baselines.TABLE], out.touched
            baselines.sign_step(table, rows, ids, share, cfg.optimizer.weight_decay)
    elif finite and progress.scale > 1:
        progress.scale /= 2
    else:
        what = f"step {progress.step}: the {'gradient' if finite else 'loss'} is not finite"
        raise UserError(f"{what}; {cfg.run.dir} keeps the state before it")
    return out, norm


def evaluate(s: Setup, state: State) -> bool:
    """Watch the weights; whether they are the best so far. Notes the end of a run that has reached
    its goal or has waited for too long. A loss that is no number is never the best."""
    cfg, progress, best = s.cfg.eval, state.progress, state.progress.best
    progress.last = row = watch(s, state.ema)
    loss, exact = (row[f"{cfg.on}/{cfg.weights[0]}/own/{k}"] for k in ("loss", "exact"))
    better = math.isfinite(loss) and (best is None or best - loss > cfg.min_gain)
    progress.best = loss if better else best
    progress.waited = 0 if better else progress.waited + 1
    if 0 < cfg.stop_at <= exact:
        progress.ended = "eval.stop_at"
    elif 0 < cfg.patience <= progress.waited:
        progress.ended = "eval.patience"
    return better


def fit(
    cfg: Config,
    say: Callable[[Row], None] = lambda row: None,
    resume: bool = False,
    limit: float = math.inf,
    s: Setup | None = None,
) -> Row:
    """Train as the config says; rows of metrics go to `say`. The last evaluation's row.
    resume: continue from the newest whole state, bit for bit as if never interrupted. SIGTERM,
    SIGINT and `limit` (seconds) finish the step and save; "stopped" then says why."""
    (rank, world), deadline, launcher = place_of(), time.monotonic() + limit, os.getppid()
    s = s or setup(cfg, resume)
    with together(rank, world, s.device), Run(Path(cfg.run.dir), rank, resume) as run:
        state = fresh_state(s)
        skipped = take_up(s, state, checkpoint.load_state(run.folder)) if resume else []
        progress, stopped, durations = state.progress, "", list[float]()
        begun = time.monotonic() - progress.seconds
        if rank == 0:
            for reason in skipped + run.begin(progress.step, progress.rows, s.meta, cfg.run.track):
                say({"skipped": reason})

        def stamped(row: Row) -> Row:
            samples, seconds = progress.step * cfg.train.batch, round(time.monotonic() - begun, 3)
            return {"step": progress.step, "samples": samples, "seconds": seconds, **row}

        def note(row: Row) -> None:
            row, progress.rows = stamped(row), progress.rows + 1
            if rank == 0:
                run.write(row)
                say(row)

        while progress.step < cfg.train.steps and not (stopped or progress.ended):
            reason = run.stop or ("time limit" if time.monotonic() > deadline else "")
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher:
                reason = reason or "its launcher was killed"
            started = time.monotonic()
            out, norm = advance(s, state, bool(reason))
            durations.append(time.monotonic() - started)
            step, done = progress.step, progress.step == cfg.train.steps
            if out.asked and not done:
                stopped = reason or "another process was stopped"
            if step % cfg.train.log_every == 0 or done:
                rate = len(durations) * cfg.train.batch / sum(durations)
                row = {"lr": learning_rate(cfg.optimizer, step, cfg.train.steps), "grad_norm": norm}
                row |= {"samples_per_s": rate, **metrics_row(state.sums)}
                note({**row, **gradient_row(s, out), **context_row(out.contexts)})
                state.sums.zero_()
                durations.clear()
            best = False
            if step % cfg.eval.every == 0 or done:
                best = evaluate(s, state)
                note(progress.last)
            progress.ended = progress.ended or ("done" if done else "")
            full = step % cfg.train.save_every == 0 or bool(progress.ended or stopped)
            progress.seconds = time.monotonic() - begun
            save(run, s, state, ["best"] * best + ["last"] * full, full)
        run.wait()
        stopped = stopped or progress.ended
        reasons = {"stopped": stopped} if stopped not in ("", "done") else {}
        return stamped(progress.last) | reasons


def plan(s: Setup, timed: bool) -> Row:
    """What a run would take: parameters, slots by size and, where timed, seconds and peak memory of
    three real steps, which change the setup's parameters."""
    cfg, slots = s.cfg, torch.arange(s.cfg.train.batch)
    middle = data.dealt(s.deck, torch.full((len(slots),), 0.5), slots)
    queries = data.queries(s.tasks, cfg.data.query, cfg.data)
    row: Row = {"tasks": s.meta["tasks"]}
    row["queries_left_out"] = int((~(queries.fits & queries.known)).sum())
    row["guard"] = str(msgspec.convert(s.meta["finding"], sources.Finding))
    row |= {k: s.meta[k] for k in ("init_from",) if k in s.meta}
    row |= {"parameters": sum(p.numel() for p in s.params.values()), "dtype": s.meta["dtype"]}
    row |= {"device": str(s.device), "slots": data.histogram(s.deck.canvas[middle].amax(1))}
    if timed:
        state, seconds = fresh_state(s), []
        for _ in range(3):
            begun = time.perf_counter()
            advance(s, state)
            seconds.append(time.perf_counter() - begun)
        row |= {"seconds_per_step": min(seconds), "peak_memory_gb": optim.peak_memory(s.device)}
        row["hours_without_evaluations"] = min(seconds) * cfg.train.steps / 3600
    return row
