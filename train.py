"""Training: the slots of a batch, one pure step, what is watched, the loop of all processes.

Read `train_step` and `fit` first. Axes: B slots of a shard, T context tokens, D hidden, Q queries.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import baselines, checkpoint, data, etrm, optim, sources
from .checkpoint import Run, SavedState
from .config import Config, ModelConfig, UserError
from .encoders import encoder_of, init_params, latent_of, lookup
from .etrm import Carry, Encode, Params, act_loss, act_step, fresh_carry, leaves, rebuild, tree_map
from .optim import is_asleep, is_frozen, learning_rate, update

STOPPED = 75  # EX_TEMPFAIL, exit code of a run that was asked to stop and saved its state
STALL = datetime.timedelta(minutes=10)  # that one process may be behind the others
EVAL_TOKENS = 16384  # of an evaluation batch

# ---------------------------------------------------------------- processes


def place_of() -> tuple[int, int]:
    """(rank, number of processes), as torchrun says. Raises UserError where half of it is said."""
    rank, world, address = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if rank is None and world in (None, "1"):
        return 0, 1
    numbers = rank and world and rank.isdigit() and world.isdigit() and int(rank) < int(world)
    if not numbers or (world != "1" and not address):
        raise UserError(
            f"RANK is {rank}, WORLD_SIZE is {world}, MASTER_ADDR is {address}: "
            "start several processes with --procs or torchrun"
        )
    return int(rank or 0), int(world or 1)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `etrm ...` in so many processes through torch's launcher; the exit code of all.

    One that fails or is killed ends the others. SIGTERM and SIGINT reach all, which then save."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's own, in this process alone
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to finish and save
    # Not with -m, which searches the working folder first: a random.py there would break the run.
    code = "import sys; sys.path[:] = filter(None, sys.path); from etrm_arc.cli import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(folder, redirects={r: Std.ALL for r in range(1, processes)})
        rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "etrm"}
        local: dict[str, Any] = {**rendezvous, "local_addr": "127.0.0.1", "max_restarts": 0}
        try:
            config = LaunchConfig(1, 1, processes, logs, **local)
            elastic_launch(config, sys.executable)("-c", code, *arguments)
        except SignalException:
            return STOPPED
        except ChildFailedError as e:
            rank, failure = e.get_first_failure()
            if failure.exitcode < 0:
                words = f"etrm: process {rank} was killed by signal {-failure.exitcode}"
                print(f"{words}; the others were stopped", file=sys.stderr)
            elif rank:  # process 0 writes to the console itself
                [log] = Path(folder).glob(f"*/attempt_0/{rank}/stderr.log")
                print(log.read_text(errors="replace").strip().rpartition("\n")[2], file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 1
    return 0


@contextlib.contextmanager
def together(rank: int, world: int, device: torch.device) -> Iterator[None]:
    """Joins the other processes; says in one line that they are lost, after torch's launcher could
    say which of them failed."""
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STALL)
    try:
        yield
    except RuntimeError as e:
        if world == 1 or not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", str(e)):
            raise
        time.sleep(3 * ("TORCHELASTIC_RUN_ID" in os.environ))
        raise UserError(f"process {rank} lost the others; continue with --resume") from None


# ---------------------------------------------------------------- hardware


def device_of(wanted: str) -> torch.device:
    """Raises UserError when the wanted device is absent."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    available.append("cpu")
    name = available[0] if wanted == "auto" else wanted
    if name not in available:
        raise UserError(f"train.device: no {name} here, only {', '.join(available)}")
    index = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device(name, index) if name == "cuda" else torch.device(name)


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it natively, else fp16 on CUDA and fp32 on a CPU."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    on_cpu = device.type == "cpu"
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if on_cpu else {}
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def hardware(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where a config is computed, and in which numbers."""
    device = device_of(cfg.train.device)
    return device, dtype_of(cfg.train.dtype, device)


def keep_pages(dtype: torch.dtype) -> None:
    """Let glibc reuse freed memory instead of returning it: fresh pages cost more than the product
    written to them (20,000 x 128 x 1,024 in bf16: 17 against 7 ms; a step: 3.9 against 3.3 s).

    Memory: torch keeps 64 compiled products of a kind, not 1,024 (1.4 instead of 2.0 GB, as fast);
    in float32 all threads share freed memory (1.0 instead of 1.6 GB; in bf16 a tenth slower)."""
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        if dtype == torch.float32:
            libc.mallopt(-8, 1)  # M_ARENA_MAX
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


THREADS = torch.get_num_threads()  # of this process, before any of them were given to shards


@functools.lru_cache
def pool(workers: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "etrm", torch.set_num_threads, (threads,))


def side_by_side(f: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> list[Any]:
    """[f(x) for x in items]; on CPU several at once, each with its share of torch's threads.

    Products of this size gain less from a second thread than a second shard does (four shards of
    16 slots, two threads: 38.9 -> 50.2 samples/s), and what one thread computes depends on none."""
    items = list(items)
    n = min(THREADS, len(items)) if device.type == "cpu" else 1
    if n < 2:
        return [f(x) for x in items]
    try:
        torch.set_num_threads(THREADS // n)
        return list(pool(n, THREADS // n).map(f, items))
    finally:
        torch.set_num_threads(THREADS)


# ---------------------------------------------------------------- slots and batches


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


def undivided(cfg: ModelConfig) -> str:
    """Why a step cannot be computed in shards; "" where it can."""
    if cfg.unrolled > 1:
        return "model.unrolled ends the steps of all slots together"
    faulty = cfg.published_faults and lookup(cfg.encoder.kind).variational
    return "model.published_faults divides the KL by the whole batch" if faulty else ""


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


def next_batch(
    s: Setup, cfg: Config, slots: Tensor, carry: Carry
) -> tuple[Carry, data.Batch, Tensor]:
    """(carry whose halted slots have begun their next episode, batch, exploration (B,)).

    The wait for the device in a step: which slots have halted decides the shapes of what comes."""
    halted, steps, n = (x.cpu() for x in (carry.halted, carry.steps, carry.n))
    n, seed, step = n + halted, cfg.run.seed, torch.where(halted, 0, steps) + 1
    episodes = data.draw(s.tasks, s.deck, cfg.data, seed, slots, n)
    batch = data.batch(s.tasks, episodes, cfg.model.raster)
    least = min_steps(cfg.model, seed, slots, n, step)
    if (lanes := latent_of(cfg.model)) is not None:
        drawn = noise(lanes, batch.demos.most + 1, seed, slots, n, step)
        batch = batch._replace(noise=drawn.to(s.device))
    carry = etrm.relaid(cfg.model, carry, halted.tolist(), batch.cells)
    return carry._replace(n=n.to(s.device)), batch, least.to(s.device)


# ---------------------------------------------------------------- one step

SCORES = ("lm_loss", "q_loss", "kl", "cell_accuracy", "exact", "q_right", "steps", "explored")
METRICS = (*SCORES, "count")


class ShardStep(NamedTuple):
    """What one ACT step of a shard gives."""

    carry: Carry
    grads: list[Tensor]  # of the trained leaves in their order, the touched rows of a table last
    sums: Tensor  # (2, 9) METRICS summed over all slots, and over those that halted
    context: Tensor | None  # (B, T, D)


def train_step(
    params: dict[str, Tensor],
    like: Params,
    cfg: ModelConfig,
    encode: Encode,
    dtype: torch.dtype,
    carry: Carry,
    batch: data.Batch,
    least: Tensor,
    scale: float,
) -> ShardStep:
    """One ACT step of a shard and the gradients of scale * summed loss; nothing is changed.

    params: path -> float32 leaf of the tree `like`, cast to the compute dtype once, here."""
    params, batch = baselines.gathered(params, batch)
    tree = rebuild(like, {k: v.to(dtype) for k, v in params.items()})
    total = torch.zeros((), device=batch.inputs.device)
    for taken in range(1, cfg.unrolled + 1):
        carry, out = act_step(tree, cfg, encode, carry, batch, least)
        loss = act_loss(cfg, out, batch.labels, batch.cells)
        total = total + loss.total.sum()
        if taken == cfg.unrolled or bool(carry.halted.all()):
            break
        carry = carry._replace(halted=torch.zeros_like(carry.halted))
    if cfg.unrolled > 1:
        carry = carry._replace(halted=torch.ones_like(carry.halted))
    trained = [v for k, v in params.items() if v.requires_grad and k != baselines.TABLE]
    trained += [params[baselines.TABLE]] if baselines.TABLE in params else []
    found = torch.autograd.grad(total * (scale / taken), trained, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
    with torch.no_grad():
        scores = (loss.lm, loss.q, loss.kl, loss.cell_accuracy, loss.exact, loss.q_right)
        rows = (*scores, carry.steps, least > 0, torch.ones_like(loss.lm))
        table = torch.stack([r.float() for r in rows]) * loss.labelled
        sums = torch.stack((table.sum(-1), (table * carry.halted).sum(-1)))
    return ShardStep(carry, grads, sums, out.context)


def reduce(per_shard: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sum over all shards of all processes, in the order of shards: the same bits on 1, 2 or 8
    processes. Process r of w computes the shards r, r + w, ..."""
    flat = [torch.cat([x.flatten() for x in tensors]) for tensors in per_shard]
    if dist.is_initialized():
        gathered = []
        for part in flat:
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, part)
            gathered += parts
        flat = gathered
    total = flat[0]
    for part in flat[1:]:
        total += part
    parts = total.split([x.numel() for x in per_shard[0]])
    return [part.view_as(x) for part, x in zip(parts, per_shard[0], strict=True)]


class Step(NamedTuple):
    """What one ACT step of every slot gives; all but carries and contexts are of all processes."""

    carries: list[Carry]
    grads: list[Tensor]
    sums: Tensor  # (2, 9) METRICS
    asked: bool  # whether any process asked to stop
    contexts: list[Tensor | None]
    touched: list[Tensor]  # gradients of rows of a table and their numbers; empty without a table


def one_step(
    s: Setup, cfg: Config, carries: Sequence[Carry], scale: float = 1.0, ask: bool = False
) -> Step:
    """One ACT step of every slot, shard by shard; gradients of the mean loss.

    scale: of the loss on the way, so that small gradients do not vanish in fp16."""
    share, is_table = scale / cfg.train.batch, baselines.TABLE in s.params

    def work(shard: tuple[Tensor, Carry]) -> tuple[ShardStep, list[Tensor]]:
        carry, batch, least = next_batch(s, cfg, *shard)
        model = (s.params, s.like, cfg.model, s.encode, s.dtype)
        out = train_step(*model, carry, batch, least, share)
        rows = []
        if is_table:
            rows = baselines.spread(shard[0], batch, out.grads.pop(), cfg.train.batch)
        return out, [out.sums.new_tensor([float(ask)]), out.sums, *rows, *out.grads]

    done = side_by_side(work, zip(s.shards, carries, strict=True), s.device)
    asked, sums, *grads = reduce([tensors for _, tensors in done])
    rows, carries = 2 * is_table, [out.carry for out, _ in done]
    contexts, touched, grads = [out.context for out, _ in done], grads[:rows], grads[rows:]
    if scale != 1:
        torch._foreach_mul_([*grads, *touched[:1]], 1 / scale)
    return Step(carries, grads, sums.clone(), float(asked) > 0, contexts, touched)


# ---------------------------------------------------------------- watching a run


def metrics_row(sums: Tensor) -> dict[str, float]:
    """Means over slots, all of them and those that halted, from the sums (2, 9) of METRICS."""
    row: dict[str, float] = {}
    for which, (*values, count) in zip(("all", "halted"), sums.tolist(), strict=True):
        named = zip(SCORES, values, strict=True)  # a KL of 0: the encoder has none
        row |= {f"{which}/{k}": v / count for k, v in named if count and (k != "kl" or v)}
        row[f"{which}/count"] = count
    return row


def gradient_row(s: Setup, out: Step) -> dict[str, float]:
    """Norms of the gradients of the encoder and of the core, and their ratio."""
    names = [k for k, p in s.params.items() if p.requires_grad]
    named = [*zip(names, out.grads, strict=True), *((baselines.TABLE, x) for x in out.touched[:1])]
    norms = []
    for module in ("core.", "encoder."):
        parts = [g for k, g in named if k.startswith(module)]
        norms.append(float(torch.stack(torch._foreach_norm(parts)).norm()) if parts else 0.0)
    row = {"core/grad_norm": norms[0]}
    if any(k.startswith("encoder.") for k, _ in named):
        row |= {
            "encoder/grad_norm": norms[1],
            "encoder/grad_ratio": norms[1] / max(norms[0], 1e-30),
        }
    return row


def context_row(contexts: Sequence[Tensor | None]) -> dict[str, float]:
    """Of the contexts (B, T, D) of all slots of all processes: variance over slots (0: the encoder
    has collapsed), over the tokens of a slot, mean and standard deviation of all numbers."""
    present = [c.float() for c in contexts if c is not None]
    if not present:
        return {}
    count, total = reduce([[c.new_tensor([len(c)]), c.sum(0)] for c in present])
    mean = total / count
    centre, sums = mean.mean(), []
    for c in present:
        across, square = ((c - x).square().mean((1, 2)).sum() for x in (mean, mean.mean()))
        sums.append([across, c.var(1, unbiased=False).mean(-1).sum(), square])
    across, within, square = torch.stack(reduce(sums)) / count
    values = torch.stack((across, within, centre, square.sqrt())).tolist()
    names = ("var_across", "var_within", "mean", "std")
    return {f"encoder/context_{k}": v for k, v in zip(names, values, strict=True)}


def gaps(row: dict[str, Any], cfg: Config, trained: dict[str, float]) -> dict[str, float]:
    """Training's last row minus the dev split, and own demos minus another task's."""
    first, made = f"{cfg.eval.on}/{cfg.eval.weights[0]}", {}
    for k, name in (("loss", "lm_loss"), ("cell_accuracy", "cell_accuracy"), ("exact", "exact")):
        if cfg.eval.on == "dev" and f"all/{name}" in trained:
            made[f"gap/train_dev/{k}"] = trained[f"all/{name}"] - row[f"{first}/own/{k}"]
        if f"{first}/foreign/{k}" in row:
            made[f"gap/own_foreign/{k}"] = row[f"{first}/own/{k}"] - row[f"{first}/foreign/{k}"]
    return made


def portions(
    asked: data.Queries, cfg: ModelConfig, tokens: int, times: Tensor | None = None
) -> list[Tensor]:
    """Rows of `asked` of each evaluation batch, by size, at most `tokens` tokens each; those
    without a canvas are left out. times (Q,): canvases that each row takes, 1 by default."""
    cells = asked.canvas.prod(1)
    order = torch.argsort(cells, stable=True)
    batches: list[list[int]] = []
    room = 0
    for row in order[cells[order] > 0].tolist():
        need = (cfg.context_tokens + int(cells[row])) * (1 if times is None else int(times[row]))
        if need > room:
            batches.append([])
            room = tokens
        batches[-1].append(row)
        room -= need
    return [torch.tensor(rows) for rows in batches]


def known_queries(cfg: Config, tasks: data.Tasks, rule: str) -> data.Queries:
    """The queries whose output is known."""
    asked = data.queries(tasks, rule, cfg.data)
    return data.chosen(asked, asked.known)


def probe(
    params: Params,
    cfg: Config,
    tasks: data.Tasks,
    rule: str,
    dtype: torch.dtype,
    foreign: bool = False,
) -> dict[str, Any]:
    """Mean loss, cell accuracy and exact match of all queries, unaugmented, with their own or
    another task's demos. A query whose output does not fit is wrong and has no loss."""
    asked = known_queries(cfg, tasks, rule)
    shown = asked.pair[data.donors(asked, cfg.run.seed)] if foreign else asked.pair
    encode, cast = encoder_of(cfg.model), tree_map(lambda x: x.to(dtype), params)
    scores = torch.zeros(3, len(asked.pair))  # loss, cell accuracy, exact
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def answer(rows: Tensor) -> None:
        demos_of = data.chosen(asked, rows)._replace(pair=shown[rows])
        row = tasks.task_of[shown[rows]] * cfg.data.symmetries  # of the task as it is
        e = data.posed(tasks, cfg.data, rule, demos_of)._replace(query=asked.pair[rows], row=row)
        batch = data.batch(tasks, e, cfg.model.raster)
        out, _ = etrm.think(cast, cfg.model, encode, batch, dtype, cfg.model.halt_max_steps)
        loss = act_loss(cfg.model, out, batch.labels, batch.cells)
        scores[:, rows] = torch.stack((loss.lm, loss.cell_accuracy, loss.exact.float())).cpu()

    batches = portions(asked, cfg.model, EVAL_TOKENS)[rank::world]
    side_by_side(answer, batches, tasks.cells.device)
    if world > 1:  # each row was answered by one process; the others hold its zero
        everywhere = scores.to(tasks.cells.device)
        dist.all_reduce(everywhere)
        scores = everywhere.cpu()
    fits = asked.fits.float()
    loss, cells, exact = (scores * fits).sum(1).tolist()
    n = len(fits)
    return {
        "loss": loss / float(fits.sum()),
        "cell_accuracy": cells / n,
        "exact": exact / n,
        "n": n,
    }


def rule_of(cfg: Config) -> str:
    """Which pairs are queries: the training set's own, or the official ones of the dev split."""
    return cfg.data.query if cfg.eval.on == "train" else "test"


def watch(
    params: Params, ema: Params, cfg: Config, tasks: data.Tasks, dtype: torch.dtype
) -> dict[str, Any]:
    """All probes, e.g. dev/ema/own/loss; with foreign demos, too, where there are two tasks."""
    asked, row = known_queries(cfg, tasks, rule_of(cfg)), dict[str, Any]()
    several = len(asked.task[asked.canvas[:, 0] > 0].unique()) > 1
    for weights in cfg.eval.weights:
        tree = ema if weights == "ema" else params
        for whose in ("own", "foreign") if several else ("own",):
            found = probe(tree, cfg, tasks, rule_of(cfg), dtype, whose == "foreign")
            row |= {f"{cfg.eval.on}/{weights}/{whose}/{k}": v for k, v in found.items()}
    return row


# ---------------------------------------------------------------- what a run needs


class Setup(NamedTuple):
    """What a run is made of, from its config alone."""

    puzzles: tuple[data.Task, ...]  # training set on the host
    tasks: data.Tasks  # the same, its grids on the device
    deck: data.Deck
    watched: data.Tasks
    meta: dict[str, Any]  # what a checkpoint says of itself
    pairs: Tensor  # (N, 16) digests of the training pairs of what it was initialised from
    shards: tuple[Tensor, ...]  # slots of each shard of this process, out of cfg.train.shards
    left_out: int  # training queries whose output or demos fit no canvas
    device: torch.device
    dtype: torch.dtype
    params: dict[str, Tensor]  # path -> float32 leaf
    like: Params  # the tree's shape
    encode: Encode


def order_hash(tasks: Iterable[data.Task]) -> str:
    """Hash of the tasks by content, in the order by which rows and episodes are addressed."""
    return hashlib.blake2b(b"".join(map(data.task_digest, tasks)), digest_size=8).hexdigest()


def setup(
    cfg: Config,
    rank: int = 0,
    world: int = 1,
    resume: bool = False,
    given: Sequence[data.Task] | None = None,
) -> Setup:
    """Raises UserError when the config cannot be trained. given: train on these tasks instead.

    resume: init_from is not read again, for the state holds what came of it."""
    device, dtype = hardware(cfg)
    keep_pages(dtype)
    if given is None:
        train, dev, finding = sources.prepare(cfg.data)
    else:
        train, dev, finding = list(given), [], sources.Finding("given")
    if cfg.eval.on == "dev" and not dev:
        raise UserError("eval.on: the dev split is to be watched but data.dev is empty")
    if cfg.train.shards > 1 and (why := undivided(cfg.model)):
        raise UserError(f"train.shards: must be 1 where {why}")
    if cfg.train.shards % world:
        raise UserError(f"train.shards: {cfg.train.shards} cannot be spread over {world} processes")
    if (largest := cfg.data.canvas or cfg.data.max_side) > cfg.model.raster:
        field = "canvas" if cfg.data.canvas else "max_side"
        raise UserError(f"data.{field}: {largest} is larger than model.raster = {cfg.model.raster}")
    tasks = data.pack(train, device)
    asked = data.queries(tasks, cfg.data.query, cfg.data)
    fitting = torch.zeros(len(train), dtype=torch.bool)
    fitting[asked.task[asked.fits & asked.known]] = True
    weights = sources.weights(train, cfg.data.share, fitting) if given is None else None
    deck = data.deck(asked, cfg.train.batch, weights)
    shards = deal(deck, cfg.model, cfg.train.shards)[rank::world]
    watched = tasks if cfg.eval.on == "train" else data.pack(dev, device)
    if not known_queries(cfg, watched, rule_of(cfg)).fits.any():
        raise UserError(f"eval.on: no query of the {cfg.eval.on} set fits a canvas")
    like = baselines.with_rows(init_params(cfg.model, cfg.run.seed), cfg, train)
    drawn, pairs = leaves(like), torch.zeros(0, 16, dtype=torch.uint8)
    optim.check_patterns(cfg.optimizer, drawn)
    meta = {
        "config": json.loads(msgspec.json.encode(cfg)),
        "data": sources.set_hash(train),
        "order": order_hash(train),
        "watched": order_hash(dev),
        "tasks": len(train),
        "dtype": str(dtype),
        "finding": msgspec.to_builtins(finding),
    }
    if resume and (saved := checkpoint.newest_facts(Path(cfg.run.dir))):
        meta |= {k: saved[k] for k in ("finding", "init_from") if k in saved}
    elif cfg.init_from.path:
        source, meta["init_from"] = checkpoint.start(cfg.init_from, cfg.model, drawn)
        drawn, pairs = drawn | source.tensors, source.pairs
        meta["finding"]["started"] = source.started
    fixed = (baselines.TABLE, "encoder.keys")  # rows are trained one by one, keys not at all
    params = {
        k: v.to(device).requires_grad_(k not in fixed and not is_frozen(cfg.optimizer, k))
        for k, v in drawn.items()
    }
    left_out, encode = int((~asked.fits).sum()), encoder_of(cfg.model)
    sets = (tuple(train), tasks, deck, watched, meta, pairs, shards, left_out)
    return Setup(*sets, device, dtype, params, like, encode)


def start_carry(s: Setup, cfg: Config, slots: Tensor) -> Carry:
    """The carry of a shard before its first step."""
    return fresh_carry(cfg.model, [0] * len(slots), s.dtype, s.device)


def pair_digests(tasks: Iterable[data.Task], others: Tensor) -> Tensor:
    """(N, 16) sorted digests of the pairs of tasks whose output is known, joined with (M, 16)."""
    pairs = ((x, y) for t in tasks for x, y in (*t.demos, *t.queries) if y is not None)
    digests = {sources.pair_digest(pair) for pair in pairs} | {*map(bytes, others.tolist())}
    flat = np.frombuffer(b"".join(sorted(digests)), np.uint8)
    return torch.from_numpy(flat.copy()).view(-1, 16)


# ---------------------------------------------------------------- the state of a run


@dataclasses.dataclass
class Progress:
    """How far a run has come, beside its tensors; saved in every state."""

    scale: float = 1.0  # of the loss, in fp16
    step: int = 0
    seconds: float = 0.0
    best: float | None = None  # loss of the best evaluation
    waited: int = 0  # evaluations since then
    last: dict[str, Any] = dataclasses.field(default_factory=dict)  # row of the last evaluation
    trained: dict[str, float] = dataclasses.field(default_factory=dict)  # last row of training
    ended: str = ""  # why the run is over; "" while it is not


@dataclasses.dataclass
class State:
    """All that changes during a run, beside the parameters."""

    ema: dict[str, Tensor]
    opts: list[torch.optim.Optimizer]
    carries: list[Carry]  # of this process's shards
    sums: Tensor  # (2, 9) METRICS since the last row
    progress: Progress


def fresh_state(cfg: Config, s: Setup) -> State:
    """The state before the first step."""
    return State(
        ema={k: v.detach().clone() if v.requires_grad else v.detach() for k, v in s.params.items()},
        opts=optim.optimizers(cfg.optimizer, s.params, s.dtype),
        carries=[start_carry(s, cfg, slots) for slots in s.shards],
        sums=torch.zeros(2, len(METRICS), device=s.device),
        progress=Progress(2.0**16 if s.dtype == torch.float16 else 1.0),
    )


def carry_tensors(slots: Tensor, carry: Carry) -> dict[str, Tensor]:
    """The carry by global slot id, so that any number of shards and processes can take it up."""
    fields = {k: getattr(carry, k) for k in Carry._fields if k != "tokens"}
    rows = {k: x.split(carry.tokens) if k in ("z_H", "z_L") else x for k, x in fields.items()}
    return {f"slot.{i}.{k}": rows[k][at] for at, i in enumerate(slots.tolist()) for k in rows}


def carry_from(tensors: dict[str, Tensor], slots: Tensor, device: torch.device) -> Carry:
    """The carry of a shard from those of its slots."""
    rows = {k: [tensors[f"slot.{i}.{k}"] for i in slots.tolist()] for k in Carry._fields[:-1]}
    fields = {k: torch.cat(x) if k in ("z_H", "z_L") else torch.stack(x) for k, x in rows.items()}
    tokens = tuple(map(len, rows["z_H"]))
    return Carry(**{k: x.to(device) for k, x in fields.items()}, tokens=tokens)


def all_carries(s: Setup, state: State) -> dict[str, Tensor]:
    """The carries of all processes, copied to process 0; {} elsewhere."""
    tensors: dict[str, Tensor] = {}
    for slots, carry in zip(s.shards, state.carries, strict=True):
        tensors |= checkpoint.copied(carry_tensors(slots, carry))
    if not dist.is_initialized():
        return tensors
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(tensors, parts)
    return {k: v for part in parts or () for k, v in part.items()}


def save(run: Run, s: Setup, state: State, pairs: Tensor, names: Sequence[str], full: bool) -> None:
    """Weights under these names, then, where `full`, the state: copied now, written while training
    continues. The state comes last, so that everything it refers to is there already."""
    tensors = all_carries(s, state) if full else {}
    if run.rank or not names:
        return
    run.wait()
    weights = {f"params.{k}": v for k, v in s.params.items()}
    weights |= {f"ema.{k}": v for k, v in state.ema.items()}
    weights = checkpoint.copied({**weights, "pairs": pairs})
    tensors |= checkpoint.copied({"sums": state.sums, **optim.optimizer_tensors(state.opts)})
    facts = {**s.meta, **json.loads(json.dumps(dataclasses.asdict(state.progress)))}

    def write() -> None:
        about = {**s.meta, "step": facts["step"], "score": facts["last"]}
        for name in names:
            checkpoint.save(run.folder / f"{name}.safetensors", weights, about)
        checkpoint.sync(run.folder / "metrics.jsonl")
        if full:
            checkpoint.save_state(run.folder, weights | tensors, facts)

    run.writing = run.writer.submit(write)


CHANGEABLE: dict[str, set[str] | None] = {  # on --resume; None: the whole table
    "run": {"dir", "track"},
    "train": {"steps", "shards", "log_every", "save_every"},
    "optimizer": {"final_lr"},
    **dict.fromkeys(("eval", "solve", "fast")),
}
SAME = {
    "data": "training set",
    "order": "order of the training tasks (by the names of their files)",
}
SAME |= {"watched": "dev set", "dtype": "compute dtype"}


def check_same(saved: dict[str, Any], meta: dict[str, Any]) -> None:
    """Raises UserError when what decides the course of a run differs from the saved state."""
    for table, fields in meta["config"].items():
        free = CHANGEABLE.get(table, set())
        for key in () if free is None else fields.keys() - free:
            was = saved["config"].get(table, {}).get(key)
            if was != fields[key]:
                raise UserError(f"--resume: {table}.{key} is {fields[key]}, the run has {was}")
    for key, name in SAME.items():
        if saved[key] != meta[key]:
            raise UserError(f"--resume: the {name} is {meta[key]}, the run has {saved[key]}")


def take_up(s: Setup, state: State, saved: SavedState) -> Tensor:
    """Put a saved state in the place of a fresh one; the digests (N, 16) of its training pairs."""
    tensors, facts, now = saved.tensors, saved.facts, s.meta["config"]["eval"]
    check_same(facts, s.meta)
    s.meta.update({k: facts[k] for k in ("finding", "init_from") if k in facts})
    state.progress = progress = msgspec.convert(facts, Progress)
    progress.ended = ""
    if any(facts["config"]["eval"][k] != now[k] for k in ("on", "weights")):
        progress.best, progress.waited = None, 0  # it was measured otherwise
    with torch.no_grad():
        for k, p in s.params.items():
            p.copy_(tensors[f"params.{k}"])
            state.ema[k].copy_(tensors[f"ema.{k}"])
    optim.load_optimizers(state.opts, tensors)
    state.carries = [carry_from(tensors, slots, s.device) for slots in s.shards]
    state.sums = tensors["sums"].to(s.device)
    return tensors["pairs"]


# ---------------------------------------------------------------- the loop


def apply(cfg: Config, s: Setup, state: State, out: Step) -> float:
    """Clip, step and average, in place; the norm of the gradients before clipping.

    In fp16 an overflow of the gradients halves the scale of the loss and leaves the step out.
    Raises UserError where they, or the loss, are not finite otherwise."""
    progress, trained = state.progress, {k: p for k, p in s.params.items() if p.requires_grad}
    lr = learning_rate(cfg.optimizer, progress.step, cfg.train.steps)
    grads = dict(zip(trained, out.grads, strict=True))
    awake = [k for k in trained if not is_asleep(cfg.optimizer, k, progress.step)]
    chosen = [trained[k] for k in awake], [grads[k] for k in awake]
    finite = bool(out.sums.isfinite().all())
    norm = math.nan
    if finite:
        norm = float(update(state.opts, *chosen, lr, cfg.optimizer.clip, out.touched[:1]))
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
    return norm


def evaluate(cfg: Config, s: Setup, state: State) -> bool:
    """Watch the weights; whether they are the best so far. Notes the end of a run that has reached
    its goal or has waited for too long. A loss that is no number is never the best."""
    progress, raw = state.progress, {k: v.detach() for k, v in s.params.items()}
    params, ema = rebuild(s.like, raw), rebuild(s.like, state.ema)
    progress.last = watch(params, ema, cfg, s.watched, s.dtype)
    progress.last |= gaps(progress.last, cfg, progress.trained)
    own, best = f"{cfg.eval.on}/{cfg.eval.weights[0]}/own", progress.best
    loss = progress.last[f"{own}/loss"]
    better = math.isfinite(loss) and (best is None or best - loss > cfg.eval.min_gain)
    progress.best = loss if better else best
    progress.waited = 0 if better else progress.waited + 1
    if 0 < cfg.eval.stop_at <= progress.last[f"{own}/exact"]:
        progress.ended = "eval.stop_at"
    elif 0 < cfg.eval.patience <= progress.waited:
        progress.ended = "eval.patience"
    return better


def fit(
    cfg: Config,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
    resume: bool = False,
    limit: float = math.inf,
    s: Setup | None = None,
) -> dict[str, Any]:
    """Train as the config says; rows of metrics go to `say` and to metrics.jsonl. Returns the last
    evaluation's row.

    resume: continue from the newest whole state of the run folder, bit for bit as if never
    interrupted. SIGTERM, SIGINT and `limit` (seconds) finish the step and save; "stopped" then says
    why. Raises UserError on a loss that is not finite, naming the step; the state before it stays.
    """
    (rank, world), deadline, launcher = place_of(), time.monotonic() + limit, os.getppid()
    s = s or setup(cfg, rank, world, resume)
    with together(rank, world, s.device), Run(Path(cfg.run.dir), rank, resume) as run:
        state, lost = fresh_state(cfg, s), list[str]()
        if resume:
            saved = checkpoint.load_state(run.folder)
            pairs, lost = take_up(s, state, saved), saved.skipped
        else:
            pairs = pair_digests(s.puzzles if rank == 0 else (), s.pairs)
        progress, stopped = state.progress, ""
        if rank == 0:
            for reason in lost + run.begin(progress.step, s.meta, cfg.run.track):
                say({"skipped": reason})
        begun = time.monotonic() - progress.seconds
        since, since_step = time.monotonic(), progress.step

        def note(row: dict[str, Any]) -> None:
            place = {"step": progress.step, "samples": progress.step * cfg.train.batch}
            row = {**place, "seconds": round(time.monotonic() - begun, 3), **row}
            if rank == 0:
                run.write(row)
                say(row)

        while progress.step < cfg.train.steps and not (stopped or progress.ended):
            progress.step += 1
            step, done = progress.step, progress.step == cfg.train.steps
            reason = run.stop or ("time limit" if time.monotonic() > deadline else "")
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher:
                reason = reason or "its launcher was killed"
            out = one_step(s, cfg, state.carries, progress.scale, bool(reason))
            state.carries, logged = out.carries, step % cfg.train.log_every == 0 or done
            state.sums += out.sums
            watched = gradient_row(s, out) | context_row(out.contexts) if logged else {}
            norm = apply(cfg, s, state, out)
            progress.seconds = time.monotonic() - begun
            if out.asked and not done:
                stopped = reason or "another process was stopped"
            if logged:
                rate = (step - since_step) * cfg.train.batch / (time.monotonic() - since)
                clipped = min(norm, cfg.optimizer.clip or norm)
                row = {"lr": learning_rate(cfg.optimizer, step, cfg.train.steps), "grad_norm": norm}
                row |= {"grad_norm_clipped": clipped, "samples_per_s": rate}
                progress.trained = metrics_row(state.sums)
                state.sums.zero_()
                note({**row, **progress.trained, **watched})
                since, since_step = time.monotonic(), step
            names = []
            if step % cfg.eval.every == 0 or done:
                names = ["best"] if evaluate(cfg, s, state) else []
                note(progress.last)
                since, since_step = time.monotonic(), step
            progress.ended = progress.ended or ("done" if done else "")
            full = step % cfg.train.save_every == 0 or bool(progress.ended or stopped)
            save(run, s, state, pairs, [*names, *["last"] * full], full)
        run.wait()
        seconds, samples = round(time.monotonic() - begun, 1), progress.step * cfg.train.batch
        row = {**progress.last, "step": progress.step, "samples": samples, "seconds": seconds}
        stopped = stopped or ("" if progress.ended == "done" else progress.ended)
        return {**row, "stopped": stopped} if stopped else row


def peak_memory(device: torch.device) -> float:
    """GB that this process has used at most: of its GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plan(cfg: Config, s: Setup, timed: bool) -> dict[str, Any]:
    """What a run would take: parameters, slots by size and, where timed, seconds and peak memory of
    three real steps, which change the setup's parameters."""
    middle, slots = torch.full((cfg.train.batch,), 0.5), torch.arange(cfg.train.batch)
    sides = data.histogram(s.deck.canvas[data.dealt(s.deck, middle, slots)].amax(1))
    result = {"parameters": sum(p.numel() for p in s.params.values()), "tasks": s.meta["tasks"]}
    result |= {"slots": sides, "dtype": str(s.dtype).removeprefix("torch.")}
    finding = msgspec.convert(s.meta["finding"], sources.Finding)
    left_out = f"{s.left_out} queries left out: no canvas holds them"
    lines = [
        f"{result['tasks']} tasks ({left_out}); guard: {finding}",
        f"{result['parameters']:,} parameters, {result['dtype']} on {s.device}; slots by side of "
        f"their canvas: {', '.join(f'{k}: {v}' for k, v in sides.items())}",
        *([s.meta["init_from"]] if "init_from" in s.meta else []),
    ]
    if timed:
        state, seconds = fresh_state(cfg, s), []
        for _ in range(3):
            begun = time.perf_counter()
            state.progress.step += 1
            out = one_step(s, cfg, state.carries, state.progress.scale)
            state.carries = out.carries
            apply(cfg, s, state, out)
            seconds.append(time.perf_counter() - begun)
        fastest, memory = min(seconds), peak_memory(s.device)
        result |= {"seconds_per_step": fastest, "peak_memory_gb": memory}
        hours = f"{cfg.train.steps} steps: {fastest * cfg.train.steps / 3600:.1f} h"
        lines.append(f"{fastest:.2f} s a step, {memory:.1f} GB; {hours} without evaluations")
    return {**result, "text": "\n".join(lines)}
