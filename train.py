"""Processes of one run on one machine: start them, watch them, and bring all down when one dies or stalls."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import baselines, checkpoint, data, etrm, sources
from .checkpoint import Run, State, fresh_facts, save_run, take_up
from .config import Config, ModelConfig, UserError
from .encoders import encoder_of, init_params, latent_of, lookup
from .etrm import Carry, Encode, Params, act_loss, act_step, fresh_carry, leaves, rebuild, tree_map
from .optim import check_patterns, is_asleep, is_frozen, learning_rate, optimizers, update

BEAT = "ETRM_BEAT"  # folder in which each process shows that it lives
STALLED = 20.0  # seconds without a sign of life
POLL = 0.1  # seconds between two looks at the processes
STOPPED = (
    75  # EX_TEMPFAIL, exit code of a run that was asked to stop and saved: go on with --resume
)


def place_of() -> tuple[int, int]:
    """(rank, number of processes), as torchrun and our own launcher say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def beat() -> None:
    """From now on, show every second that this process lives, and stop when its launcher does not; without one, nothing."""
    folder, parent, rank = os.environ.get(BEAT), os.getppid(), place_of()[0]
    if not folder:
        return

    def show() -> None:
        while os.getppid() == parent:
            with contextlib.suppress(OSError):
                (Path(folder) / str(rank)).touch()
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # killed outright: save and end

    threading.Thread(target=show, daemon=True).start()


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run the command in so many processes; the exit code of all.

    The first one that fails is reported with its own words and the others are killed: what is saved is whole at any
    instant. SIGTERM and SIGINT are passed on, so that the processes agree on a step, save and stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        threads = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (os.cpu_count() or 1) // processes)
        )
        shared = {
            **os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": threads, BEAT: folder,
        }  # fmt: skip
        words = [
            open(Path(folder) / f"words-{r}", "w+", encoding="utf-8") for r in range(processes)
        ]  # noqa: SIM115
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "etrm_arc.cli", *arguments], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=None if r == 0 else subprocess.DEVNULL, stderr=None if r == 0 else words[r],
            )
            for r in range(processes)
        ]  # fmt: skip

        def pass_on(signum: int, frame: Any) -> None:
            for p in ranks:
                p.send_signal(signal.SIGTERM)

        before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            return wait_for(ranks, Path(folder), words)
        finally:
            for p in ranks:
                p.kill()
                p.wait()
            for s, handler in before.items():
                signal.signal(s, handler)
            for file in words:
                file.close()


def wait_for(ranks: Sequence[subprocess.Popen[bytes]], folder: Path, words: Sequence[Any]) -> int:
    """Wait for all to end well, or for the first that does not: its exit code.

    Silence is counted in our own looks, not by the clock: a machine that slept, or is overloaded, is not taken for a stall.
    """
    last: list[float | None] = [None] * len(ranks)
    silent = [0] * len(ranks)
    while True:
        codes = [p.poll() for p in ranks]
        for r, code in enumerate(codes):
            if code not in (None, 0, STOPPED):
                words[r].seek(0)
                said = words[r].read().strip().splitlines()
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                if said or code < 0 or r:  # process 0 writes here itself
                    print(
                        said[-1] if said else f"etrm: process {r} {how}; the others were stopped",
                        file=sys.stderr,
                    )
                return code if code > 0 else 1
            sign = folder / str(r)
            now = sign.stat().st_mtime if code is None and sign.exists() else None
            last[r], silent[r] = now, silent[r] + 1 if now is not None and now == last[r] else 0
            if silent[r] * POLL > STALLED:
                print(
                    f"etrm: process {r} gave no sign of life for {STALLED:.0f} s; all were stopped",
                    file=sys.stderr,
                )
                return 1
        if all(code is not None for code in codes):
            return STOPPED if STOPPED in codes else 0
        time.sleep(POLL)


# ---------------------------------------------------------------- train


# ---------------------------------------------------------------- where and in what numbers


def device_of(wanted: str) -> torch.device:
    """Raises UserError when the wanted device is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = next(k for k, v in there.items() if v) if wanted == "auto" else wanted
    if not there[name]:
        raise UserError(
            f"train.device: {name} is not available here; there is {', '.join(k for k in there if there[k])}"
        )
    return (
        torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        if name == "cuda"
        else torch.device(name)
    )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it natively (on a CPU without that it is slower than fp32), else fp16 on CUDA."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    able: dict[str, Any] = (
        getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    )
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def hardware(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where a config is worked on, and in which numbers."""
    device = device_of(cfg.train.device)
    return device, dtype_of(cfg.train.dtype, device)


# ---------------------------------------------------------------- slots, shards, batches


def cost_of(d: data.Deck, cfg: ModelConfig) -> Tensor:
    """(B,) tokens that each slot's canvas has on average over its band."""
    points = (torch.arange(16) + 0.5) / 16
    canvas = d.canvas[data.dealt(d, points, torch.arange(d.slots)[:, None])]
    return cfg.context_tokens + canvas.prod(-1).double().mean(-1)


def deal(d: data.Deck, cfg: ModelConfig, parts: int) -> tuple[Tensor, ...]:
    """Global ids of the slots of each shard, ascending: the costliest slot first, each to the shard with least work."""
    cost, load = cost_of(d, cfg).tolist(), [0.0] * parts
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for slot in sorted(range(d.slots), key=lambda i: (-cost[i], i)):
        to = min(range(parts), key=lambda r: (load[r], r))
        load[to] += cost[slot]
        dealt[to].append(slot)
    if not all(load):
        raise UserError(f"train.batch: {d.slots} slots cannot fill {parts} shards")
    return tuple(torch.tensor(sorted(mine)) for mine in dealt)


def undivided(cfg: ModelConfig) -> str:
    """Why a step cannot be worked on in shards; "" where it can."""
    if cfg.unrolled > 1:
        return "model.unrolled ends the steps of all slots together"
    faulty = cfg.published_faults and lookup(cfg.encoder.kind).variational
    return "model.published_faults divides the KL by the whole batch" if faulty else ""


def min_steps(cfg: ModelConfig, seed: int, slots: Tensor, n: Tensor, step: Tensor) -> Tensor:
    """Exploration (B,): with its probability an ACT step may not halt before a number drawn from 2..halt_max_steps.

    Drawn anew in every optimizer step, as published."""
    u = data.uniform(2, seed, data.EXPLORE, slots, n, step)
    least = (2 + (u[:, 1] * (cfg.halt_max_steps - 1)).long()).clamp(max=cfg.halt_max_steps)
    return torch.where(u[:, 0] < (0.0 if cfg.fixed_steps else cfg.exploration), least, 0)


def noise(lanes: int, demos: int, seed: int, slots: Tensor, n: Tensor, step: Tensor) -> Tensor:
    """Standard normal (B, demos, lanes) for a variational encoder, drawn anew in every optimizer step, as published."""
    u = data.uniform(demos * lanes, seed, data.NOISE, slots, n, step)
    return (math.sqrt(2) * torch.erfinv(2 * u - 1 + 2.0**-53)).float().unflatten(-1, (demos, lanes))


def keep_pages(dtype: torch.dtype) -> None:
    """Let glibc reuse freed memory instead of returning it: fresh pages cost more than the product written to them
    (20,000 x 128 x 1,024 in bf16: 17 against 7 ms; a training step: 3.9 against 3.3 s).

    Memory of a step of 16 slots: torch keeps 64 compiled products of a kind instead of 1,024 (bf16: 1.4 instead of 2.0 GB, as
    fast), and in float32 all threads share what was freed (1.0 instead of 1.6 GB, as fast; in bf16 a tenth slower)."""
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    try:
        libc = ctypes.CDLL("libc.so.6")
        if dtype == torch.float32:
            libc.mallopt(-8, 1)  # M_ARENA_MAX
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc


THREADS = torch.get_num_threads()  # of this process, before any of them were given to shards
One = TypeVar("One")
Other = TypeVar("Other")


@functools.lru_cache
def hands(n: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "etrm", lambda: torch.set_num_threads(threads))


def side_by_side(
    f: Callable[[One], Other], items: Iterable[One], device: torch.device
) -> list[Other]:
    """[f(x) for x in items]; on CPU several at once, each with its share of torch's threads.

    Products of this size gain less from a second thread than a second shard does (bf16, four shards of 16 slots on two
    threads: 38.9 -> 50.2 samples/s; float32 the same), and what one thread works out depends on no other."""
    items = list(items)
    n = min(THREADS, len(items)) if device.type == "cpu" else 1
    if n < 2:
        return [f(x) for x in items]
    try:
        torch.set_num_threads(THREADS // n)
        return list(hands(n, THREADS // n).map(f, items))
    finally:
        torch.set_num_threads(THREADS)


def next_batch(
    s: Setup, cfg: Config, slots: Tensor, carry: Carry
) -> tuple[Carry, data.Batch, Tensor]:
    """Halted slots go on to their next episode; the batch of all slots, and their exploration.

    The wait for the device in a step: which slots have halted decides the shapes of what comes.
    """
    halted, steps, n = (x.cpu() for x in (carry.halted, carry.steps, carry.n))
    n = n + halted
    episodes = data.draw(s.tasks, s.deck, cfg.data, cfg.run.seed, slots, n)
    batch = data.batch(s.tasks, episodes, cfg.model.raster)
    least = min_steps(cfg.model, cfg.run.seed, slots, n, torch.where(halted, 0, steps) + 1)
    if (lanes := latent_of(cfg.model)) is not None:
        drawn = noise(
            lanes, batch.demos.most + 1, cfg.run.seed, slots, n, torch.where(halted, 0, steps) + 1
        )
        batch = batch._replace(noise=drawn.to(s.device))
    carry = etrm.relaid(cfg.model, carry, halted.tolist(), batch.cells)
    return carry._replace(n=n.to(s.device)), batch, least.to(s.device)


# ---------------------------------------------------------------- one step

SUMS = (
    "lm_loss",
    "q_loss",
    "kl",
    "cell_accuracy",
    "exact",
    "q_right",
    "steps",
    "explored",
    "count",
)


def train_step(
    params: dict[str, Tensor], like: Params, cfg: ModelConfig, encode: Encode, dtype: torch.dtype, carry: Carry,
    batch: data.Batch, least: Tensor, scale: float,
) -> tuple[Carry, list[Tensor], Tensor, Tensor | None]:  # fmt: skip
    """One ACT step of a shard: (new carry, gradients of scale * summed loss, sums (2, 9) over all and halted slots, context).

    params: path -> float32 leaf, in the order of the gradients, the touched rows of a table after all; cast to the compute
    dtype once, here.
    """
    params, batch = baselines.gathered(params, batch)
    cast = rebuild(like, {k: v.to(dtype) for k, v in params.items()})
    total = torch.zeros((), device=batch.inputs.device)
    for taken in range(1, cfg.unrolled + 1):
        carry, out = act_step(cast, cfg, encode, carry, batch, least)
        loss = act_loss(cfg, out, batch.labels, batch.cells)
        total = total + loss.total.sum()
        if taken == cfg.unrolled or (not total.is_meta and bool(carry.halted.all())):
            break
        carry = carry._replace(halted=torch.zeros_like(carry.halted))
    if cfg.unrolled > 1:
        carry = carry._replace(halted=torch.ones_like(carry.halted))
    trained = [v for k, v in params.items() if v.requires_grad and k != baselines.TABLE]
    trained += [params[baselines.TABLE]] if baselines.TABLE in params else []
    grads = torch.autograd.grad(total * (scale / taken), trained, allow_unused=True)
    with torch.no_grad():
        rows = (
            loss.lm,
            loss.q,
            loss.kl,
            loss.cell_accuracy,
            loss.exact,
            loss.q_right,
            carry.steps,
            least > 0,
            torch.ones_like(loss.lm),
        )
        table = torch.stack([r.float() for r in rows]) * loss.labelled
        sums = torch.stack((table.sum(-1), (table * carry.halted).sum(-1)))
    return (
        carry,
        [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)],
        sums,
        out.context,
    )


def reduce(per_shard: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sum over all shards of all processes, always in the order of shards: the same bits on 1, 2 or 8 processes.

    Process r of w works on the shards r, r + w, ...
    """
    flat = [torch.cat([g.flatten() for g in grads]) for grads in per_shard]
    if dist.is_initialized():
        world = dist.get_world_size()
        everyone = []
        for mine in flat:
            theirs = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(theirs, mine)
            everyone += theirs
        flat = everyone
    total = flat[0]
    for part in flat[1:]:
        total += part
    shapes = per_shard[0]
    return [
        x.view_as(g) for x, g in zip(total.split([g.numel() for g in shapes]), shapes, strict=True)
    ]


# ---------------------------------------------------------------- watching a run


def gradient_row(names: Sequence[str], grads: Sequence[Tensor]) -> dict[str, float]:
    """Norms of the gradients of the encoder and of the core, and the one divided by the other."""
    parts = {
        k: [g for n, g in zip(names, grads, strict=True) if n.startswith(f"{k}.")]
        for k in ("encoder", "core")
    }
    norms = [
        torch.stack(torch._foreach_norm(p)).norm() if p else torch.zeros(()) for p in parts.values()
    ]
    encoder, core = torch.stack([n.float().cpu() for n in norms]).tolist()
    return {"core/grad_norm": core} | (
        {"encoder/grad_norm": encoder, "encoder/grad_ratio": encoder / max(core, 1e-30)}
        if parts["encoder"]
        else {}
    )


def context_row(contexts: Sequence[Tensor | None]) -> dict[str, float]:
    """Of the contexts (B, T, D) of all slots of all processes: variance over slots (0: the encoder has collapsed), over the
    tokens of a slot, mean and standard deviation of all numbers; {} where there are none."""
    own = [c.float() for c in contexts if c is not None]
    if not own:
        return {}
    count, total = reduce([[c.new_tensor([len(c)]), c.sum(0)] for c in own])
    mean = total / count
    centre = mean.mean()
    parts = [
        (
            (c - mean).square().mean((1, 2)),
            c.var(1, unbiased=False).mean(-1),
            (c - centre).square().mean((1, 2)),
        )
        for c in own
    ]
    across, within, square = torch.stack(reduce([[x.sum() for x in p] for p in parts])) / count
    said = torch.stack((across, within, centre, square.sqrt())).tolist()
    return dict(
        zip(
            (f"encoder/context_{k}" for k in ("var_across", "var_within", "mean", "std")),
            said,
            strict=True,
        )
    )


def gaps(found: dict[str, float], cfg: Config, trained: dict[str, float]) -> dict[str, float]:
    """What training's last row says less what the dev split does, and what own demos give less what foreign ones do."""
    first, names = (
        f"{cfg.eval.on}/{cfg.eval.weights[0]}",
        {"loss": "lm_loss", "cell_accuracy": "cell_accuracy", "exact": "exact"},
    )
    row: dict[str, float] = {}
    for k, name in names.items():
        if cfg.eval.on == "dev" and f"all/{name}" in trained:
            row[f"gap/train_dev/{k}"] = trained[f"all/{name}"] - found[f"{first}/own/{k}"]
        if f"{first}/foreign/{k}" in found:
            row[f"gap/own_foreign/{k}"] = found[f"{first}/own/{k}"] - found[f"{first}/foreign/{k}"]
    return row


EVAL_TOKENS = 16384  # of an evaluation batch


def portions(
    asked: data.Queries, cfg: ModelConfig, tokens: int, times: Tensor | None = None
) -> list[Tensor]:
    """Rows of `asked` of each evaluation batch, by size, at most `tokens` tokens each; those without a canvas are left out.

    times (Q,): canvases of that size that each row takes, 1 by default."""
    cells = asked.canvas.prod(1)
    order = torch.argsort(cells, stable=True)
    made: list[list[int]] = []
    room = 0
    for row in order[cells[order] > 0].tolist():
        need = (cfg.context_tokens + int(cells[row])) * (1 if times is None else int(times[row]))
        if need > room:
            made.append([])
            room = tokens
        made[-1].append(row)
        room -= need
    return [torch.tensor(rows) for rows in made]


def probe(
    params: Params,
    cfg: Config,
    tasks: data.Tasks,
    rule: str,
    dtype: torch.dtype,
    foreign: bool = False,
) -> dict[str, Any]:
    """Loss, cell accuracy and exact match over all queries, unaugmented, with their own or another task's demos.

    Means over queries; one whose output does not fit its canvas counts as wrong and has no loss. `wrong`: their pairs.
    """
    asked = data.queries(tasks, rule, cfg.data)
    asked = data.chosen(asked, asked.known)
    shown = asked.pair[data.donors(asked, cfg.run.seed)] if foreign else asked.pair
    encode, cast = encoder_of(cfg.model), tree_map(lambda x: x.to(dtype), params)
    lm, cells, exact = (torch.zeros(len(asked.pair)) for _ in range(3))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def answer(rows: Tensor) -> None:
        e = data.posed(tasks, cfg.data, rule, data.chosen(asked, rows), shown[rows])
        e = e._replace(row=tasks.task_of[shown[rows]] * cfg.data.symmetries)  # of the task as it is
        batch = data.batch(tasks, e, cfg.model.raster)
        out, _ = etrm.think(cast, cfg.model, encode, batch, dtype, cfg.eval.act_steps)
        loss = act_loss(cfg.model, out, batch.labels, batch.cells)
        lm[rows], cells[rows], exact[rows] = (
            loss.lm.cpu(),
            loss.cell_accuracy.cpu(),
            loss.exact.float().cpu(),
        )

    side_by_side(
        answer, portions(asked, cfg.model, EVAL_TOKENS)[rank::world], tasks.cells.device
    )
    if world > 1:  # each row was answered by one process, all others hold its zero
        every = torch.stack((lm, cells, exact)).to(tasks.cells.device)
        dist.all_reduce(every)
        lm, cells, exact = every.cpu()
    fits = asked.fits.float()
    return {
        "loss": float((lm * fits).sum() / fits.sum()),
        "cell_accuracy": float((cells * fits).mean()),
        "exact": float((exact * fits).mean()),
        "n": len(fits),
        "wrong": asked.pair[exact * fits == 0].tolist(),
    }


def rule_of(cfg: Config) -> str:
    """Which pairs are asked: the training set by its own rule, the dev split by its official queries."""
    return cfg.data.query if cfg.eval.on == "train" else "test"


def watch(
    params: Params, ema: Params, cfg: Config, tasks: data.Tasks, dtype: torch.dtype
) -> dict[str, float]:
    """All probes of the config, e.g. dev/ema/own/loss."""
    rule = rule_of(cfg)
    found: dict[str, float] = {}
    for weights in cfg.eval.weights:
        tree = ema if weights == "ema" else params
        for whose in ("own", "foreign") if cfg.eval.foreign else ("own",):
            row = probe(tree, cfg, tasks, rule, dtype, whose == "foreign")
            found |= {
                f"{cfg.eval.on}/{weights}/{whose}/{k}": row[k]
                for k in ("loss", "cell_accuracy", "exact", "n")
            }
    return found


# ---------------------------------------------------------------- the loop


class Setup(NamedTuple):
    """Everything a run stands on, made from its config alone."""

    tasks: data.Tasks  # training set, its grids on the device
    names: tuple[str, ...]  # of its tasks
    deck: data.Deck
    watched: data.Tasks
    meta: dict[str, Any]  # what a checkpoint says of itself
    shards: tuple[Tensor, ...]  # slots of each shard of this process, out of cfg.train.shards
    left_out: int  # training queries whose output or demos fit no canvas
    device: torch.device
    dtype: torch.dtype
    params: dict[str, Tensor]  # path -> float32 leaf
    like: Params  # the tree's shape
    encode: Encode


def setup(
    cfg: Config, rank: int = 0, world: int = 1, given: Sequence[data.Task] | None = None
) -> Setup:
    """Raises UserError when the config cannot be trained. given: train on these tasks, not on those of the config."""
    device, dtype = hardware(cfg)
    keep_pages(dtype)
    train, dev, finding = (
        sources.prepare(cfg.data) if given is None else (list(given), [], sources.Finding("given"))
    )
    tasks = data.pack(train, device)
    if cfg.eval.on == "dev" and not dev:
        raise UserError("eval.on: the dev split is to be watched but data.dev is empty")
    if cfg.train.shards > 1 and (why := undivided(cfg.model)):
        raise UserError(f"train.shards: must be 1 where {why}")
    if cfg.train.shards % world:
        raise UserError(
            f"train.shards: {cfg.train.shards} shards cannot be spread over {world} processes"
        )
    asked = data.queries(tasks, cfg.data.query, cfg.data)
    some = torch.zeros(len(train), dtype=torch.bool).index_fill_(
        0, asked.task[asked.fits & asked.known], True
    )
    deck = data.deck(
        asked,
        cfg.train.batch,
        sources.weights(train, cfg.data.share, some) if given is None else None,
    )
    shards = deal(deck, cfg.model, cfg.train.shards)
    watched = tasks if cfg.eval.on == "train" else data.pack(dev, device)
    questions = data.queries(watched, rule_of(cfg), cfg.data)
    if not (questions.known & questions.fits).any():
        raise UserError(
            f"eval.on: no task of the {cfg.eval.on} set has a query with a known output that fits a canvas"
        )
    if cfg.eval.foreign:
        data.donors(
            data.chosen(questions, questions.known), cfg.run.seed
        )  # before an hour has gone by
    if (largest := cfg.data.canvas or cfg.data.max_side) > cfg.model.raster:
        field = "canvas" if cfg.data.canvas else "max_side"
        raise UserError(f"data.{field}: {largest} is larger than model.raster = {cfg.model.raster}")
    like = baselines.with_rows(init_params(cfg.model, cfg.run.seed), cfg, train)
    check_patterns(cfg.optimizer, leaves(like))
    meta = {
        "config": json.loads(msgspec.json.encode(cfg)),
        "data": sources.set_hash(train),
        "tasks": len(train),
        "dtype": str(dtype),
    }
    drawn = leaves(like)
    if cfg.init_from.path:
        begun = checkpoint.start(cfg.init_from, cfg.model, drawn)
        drawn, finding = drawn | begun.params, msgspec.structs.replace(finding, started=begun.words)
        meta |= {"ancestors": [begun.ancestor], "init_from": begun.text}
    meta["finding"] = msgspec.to_builtins(finding)
    still = (
        baselines.TABLE,
        "encoder.keys",
    )  # no optimizer's: rows are trained one by one, or not at all
    params = {
        k: v.to(device).requires_grad_(k not in still and not is_frozen(cfg.optimizer, k))
        for k, v in drawn.items()
    }
    return Setup(
        tasks, tuple(t.name for t in train), deck, watched, meta, shards[rank::world],
        int((~asked.fits).sum()), device, dtype, params, like, encoder_of(cfg.model),
    )  # fmt: skip


def start_carry(s: Setup, cfg: Config, slots: Tensor) -> Carry:
    return fresh_carry(cfg.model, [0] * len(slots), s.dtype, s.device)


class Step(NamedTuple):
    carries: list[Carry]
    grads: list[Tensor]  # of all processes
    sums: Tensor  # of this one
    asked: bool  # did any process ask to stop?
    contexts: list[Tensor | None]  # of the shards of this one
    touched: list[
        Tensor
    ]  # of all processes: gradients of rows of a table and whose they are, or nothing


def one_step(
    s: Setup, cfg: Config, carries: Sequence[Carry], scale: float = 1.0, ask: bool = False
) -> Step:
    """One ACT step of every slot."""

    def work(shard: tuple[Tensor, Carry]) -> tuple[Carry, list[Tensor], Tensor, Tensor | None]:
        carry, batch, least = next_batch(s, cfg, *shard)
        share = scale / cfg.train.batch
        carry, g, sums, context = train_step(
            s.params, s.like, cfg.model, s.encode, s.dtype, carry, batch, least, share
        )
        rows = (
            baselines.spread(shard[0], batch, g.pop(), cfg.train.batch)
            if baselines.TABLE in s.params
            else []
        )
        return (
            carry,
            [sums.new_tensor([float(ask)]), *rows, *g],
            sums,
            context,
        )  # the vote travels with the gradients

    new, grads, sums, contexts = zip(
        *side_by_side(work, zip(s.shards, carries, strict=True), s.device), strict=True
    )
    vote, *total = reduce(grads)
    rows = 2 if baselines.TABLE in s.params else 0
    return Step(
        list(new),
        total[rows:],
        torch.stack(sums).sum(0),
        float(vote) > 0,
        list(contexts),
        total[:rows],
    )


def metrics_row(sums: Tensor) -> dict[str, float]:
    """Means over slots, all of them and those that halted, from the sums (2, 9) of all processes."""
    row: dict[str, float] = {}
    for which, values in zip(("all", "halted"), sums.tolist(), strict=True):
        said = zip(SUMS[:-1], values, strict=False)  # a KL of 0 is that of an encoder without one
        row |= {f"{which}/{k}": v / values[-1] for k, v in said if values[-1] and (k != "kl" or v)}
        row[f"{which}/count"] = values[-1]
    return row


def fresh_state(cfg: Config, s: Setup) -> State:
    return State(
        ema={k: v.detach().clone() if v.requires_grad else v.detach() for k, v in s.params.items()},
        opts=optimizers(cfg.optimizer, s.params, s.dtype),
        carries=[start_carry(s, cfg, slots) for slots in s.shards],
        sums=torch.zeros(2, len(SUMS), device=s.device),
        facts=fresh_facts(2.0**16 if s.dtype == torch.float16 else 1.0),
    )


STALL = datetime.timedelta(minutes=10)  # that one process may be behind the others


def fit(
    cfg: Config, say: Callable[[dict[str, Any]], None] = lambda row: None, resume: bool = False, limit: float = math.inf,
    source: Path | None = None, s: Setup | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train as the config says; rows of metrics go to `say` and to metrics.jsonl. Returns the last evaluation's row.

    resume: go on from the newest whole state of the run folder, to the same bits as if never interrupted; `source`: of
    another folder, which is only read (a fork). SIGTERM, SIGINT and `limit` (seconds) finish the step and save;
    "stopped" then says why. Raises UserError on a non-finite gradient, naming the step; the state before it stays.
    """
    rank, world = place_of()
    s = s or setup(cfg, rank, world)
    if world > 1 and not dist.is_initialized():
        if s.device.type == "cuda":
            torch.cuda.set_device(s.device)
        dist.init_process_group("nccl" if s.device.type == "cuda" else "gloo", timeout=STALL)
    with Run(Path(cfg.run.dir), rank, resume) as run:
        state, show = fresh_state(cfg, s), say if rank == 0 else lambda row: None
        if resume or source:
            take_up(s, state, source or run.folder, source is not None, rank, world, show)
        if rank == 0:
            run.begin(state.facts["step"], source or run.folder, s.meta, cfg.run.track)
        return loop(cfg, s, state, run, show, time.monotonic() + limit, world)


def culprits(s: Setup, cfg: Config, carries: Sequence[Carry]) -> str:
    """The tasks, and their canvases, of the slots of all processes whose states are not finite."""
    said: list[str] = []
    for slots, carry in zip(s.shards, carries, strict=True):
        e = data.draw(s.tasks, s.deck, cfg.data, cfg.run.seed, slots, carry.n.cpu())
        for i, z in enumerate(carry.z_H.split(carry.tokens)):
            if not bool(z.isfinite().all()):
                h, w = e.canvas[i].tolist()
                said.append(f"{s.names[int(s.tasks.task_of[e.query[i]])]} on {h} x {w}")
    if dist.is_initialized():
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, said)
        said = [x for each in everyone for x in each]
    return (
        f"tasks {', '.join(said[:3])}{f' and {len(said) - 3} more' if said[3:] else ''}"
        if said
        else "every state is"
    )


def loop(
    cfg: Config,
    s: Setup,
    state: State,
    run: Run,
    say: Callable[[dict[str, Any]], None],
    deadline: float,
    world: int,
) -> dict[str, Any]:
    """Steps until the last one, a wish to stop, or the wanted score; after each, what is due: row, evaluation, checkpoint."""
    facts, names = state.facts, [k for k, p in s.params.items() if p.requires_grad]
    trained = [s.params[k] for k in names]
    begun = time.monotonic() - facts["seconds"]
    step, stopped, since, since_step = facts["step"], "", time.monotonic(), facts["step"]
    watched = f"{cfg.eval.on}/{cfg.eval.weights[0]}/own"

    def note(row: dict[str, Any]) -> None:
        row = {
            "step": step,
            "samples": step * cfg.train.batch,
            "seconds": round(time.monotonic() - begun, 3),
            **row,
        }
        if run.rank == 0:
            run.write(row)
        say(row)

    while step < cfg.train.steps and not stopped:
        step += 1
        due = []  # names of the weights to be saved after this step
        ask = bool(run.stop) or time.monotonic() > deadline
        state.carries, grads, part, asked, contexts, touched = one_step(
            s, cfg, state.carries, facts["scale"], ask
        )
        state.sums += part
        logged, done = (
            step % cfg.train.log_every == 0 or step == cfg.train.steps,
            step == cfg.train.steps,
        )
        if facts["scale"] != 1:
            torch._foreach_mul_([*grads, *touched[:1]], 1 / facts["scale"])
        named = [*names, baselines.TABLE] if touched else names
        watching = (
            gradient_row(named, [*grads, *touched[:1]]) | context_row(contexts) if logged else {}
        )
        lr = learning_rate(cfg.optimizer, step, cfg.train.steps)
        awake = [i for i, k in enumerate(names) if not is_asleep(cfg.optimizer, k, step)]
        awake_grads = [grads[i] for i in awake]
        norm = float(
            update(
                state.opts,
                [trained[i] for i in awake],
                awake_grads,
                lr,
                cfg.optimizer.clip,
                touched[:1],
            )
        )
        if math.isfinite(norm):
            if trained:  # not where rows of a table alone are
                torch._foreach_lerp_([state.ema[k] for k in names], trained, 1 - cfg.train.ema)
            if touched:
                (rows, ids), share = touched, lr / (cfg.optimizer.lr or 1.0)
                baselines.sign_step(
                    s.params[baselines.TABLE],
                    rows,
                    ids,
                    share * cfg.optimizer.table_lr,
                    cfg.optimizer.table_decay,
                )
        elif facts["scale"] > 1:
            facts["scale"] /= 2
        elif cfg.train.non_finite == "skip":
            facts["skipped"] += 1
        else:
            who = culprits(s, cfg, state.carries)
            raise UserError(
                f"step {step}: the gradient is not finite ({who}); {run.folder} keeps the state before it"
            )

        facts |= {"step": step, "seconds": time.monotonic() - begun}
        if asked and not done:
            stopped = run.stop or (
                "time limit" if time.monotonic() > deadline else "another process was stopped"
            )
        if logged:
            every = state.sums.clone()
            if world > 1:
                dist.all_reduce(every)
            now = time.monotonic()
            norms = {"grad_norm": norm, "grad_norm_clipped": min(norm, cfg.optimizer.clip or norm)}
            rate = (step - since_step) * cfg.train.batch / (now - since)
            facts["trained"] = metrics_row(every)
            note(
                {
                    "lr": lr,
                    **norms,
                    "skipped_steps": facts["skipped"],
                    "samples_per_s": rate,
                    **facts["trained"],
                    **watching,
                }
            )
            state.sums.zero_()
            since, since_step = now, step
        if step % cfg.eval.every == 0 or done:
            raw, mean = (
                rebuild(s.like, {k: v.detach() for k, v in x.items()})
                for x in (s.params, state.ema)
            )
            facts["last"] = watch(raw, mean, cfg, s.watched, s.dtype)
            facts["last"] |= gaps(facts["last"], cfg, facts["trained"])
            note(facts["last"])
            value, best = facts["last"][f"{watched}/{cfg.eval.best}"], facts["best"]
            gain = (
                math.inf
                if best is None
                else (best - value if cfg.eval.best == "loss" else value - best)
            )
            facts["waited"] += 1
            if gain > cfg.eval.min_gain:
                facts |= {"best": value, "waited": 0}
                due.append("best")
            if 0 < cfg.eval.stop_at <= facts["last"][f"{watched}/exact"]:
                stopped = facts["ended"] = "eval.stop_at"
            elif 0 < cfg.eval.patience <= facts["waited"]:
                stopped = facts["ended"] = "eval.patience"
            since, since_step = time.monotonic(), step
        if done and not facts["ended"]:
            facts["ended"] = "done"
        if cfg.train.keep_every and step % cfg.train.keep_every == 0:
            due.append(f"step-{step:08d}")
        if full := step % cfg.train.save_every == 0 or done or bool(stopped):
            due.append("last")
        save_run(run, s, state, world, due, full)
    run.wait()
    result = {
        "step": step,
        "samples": step * cfg.train.batch,
        "seconds": round(time.monotonic() - begun, 1),
    }
    return {**facts["last"], **result, **({"stopped": stopped} if stopped else {})}


# ---------------------------------------------------------------- plan


def to_meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta"), tree)


def flops(s: Setup, cfg: Config) -> tuple[float, float]:
    """(GFLOP of the first optimizer step, GB that autograd keeps for the largest of the shards that are worked on at once),
    counted on the meta device."""
    total, sizes = 0.0, []
    for slots in s.shards:
        carry, batch, least = next_batch(s, cfg, slots, start_carry(s, cfg, slots))
        p = {k: v.detach().to("meta").requires_grad_(v.requires_grad) for k, v in s.params.items()}
        kept: dict[int, int] = {}

        def note(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[id(x.untyped_storage())] = x.numel() * x.element_size()
            return x

        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
        ):
            train_step(
                p,
                s.like,
                cfg.model,
                s.encode,
                s.dtype,
                to_meta(carry),
                to_meta(batch),
                to_meta(least),
                1.0,
            )
        total += counter.get_total_flops()
        sizes.append(sum(kept.values()))
    at_once = THREADS if s.device.type == "cpu" else 1
    return total / 1e9, sum(sorted(sizes)[-at_once:]) / 1e9


def plan(cfg: Config, s: Setup, timed: bool) -> dict[str, Any]:
    """What a run would take: parameters, slots by size, GFLOP a step, memory, and, where timed, seconds of real steps."""
    params = sum(p.numel() for p in s.params.values())
    sides = s.deck.canvas[
        data.dealt(s.deck, torch.full((cfg.train.batch,), 0.5), torch.arange(cfg.train.batch))
    ].amax(1)
    slots = data.histogram(sides)
    made = {
        "parameters": params,
        "tasks": s.meta["tasks"],
        "slots": slots,
        "dtype": str(s.dtype).removeprefix("torch."),
    }
    text = (
        f"{s.meta['tasks']} tasks ({s.left_out} queries left out: no canvas holds them); "
        f"guard: {msgspec.convert(s.meta['finding'], sources.Finding)}\n{params:,} parameters, {made['dtype']} on {s.device}; "
        f"slots by side of their canvas: {', '.join(f'{k}: {v}' for k, v in slots.items())}"
        + (f"\n{s.meta['init_from']}" if "init_from" in s.meta else "")
    )
    if timed:
        made["gflop_per_step"], kept = flops(s, cfg)
        # master weights, EMA and two moments in float32; a copy in the compute dtype; gradients of each shard, and laid flat; what
        # autograd keeps
        learned = sum(p.numel() for p in s.params.values() if p.requires_grad)
        made["memory_gb"] = (
            learned * (16 + s.dtype.itemsize + 8 * len(s.shards)) + (params - learned) * 4
        ) / 1e9 + kept
        opts, trained = (
            optimizers(cfg.optimizer, s.params, s.dtype),
            [p for p in s.params.values() if p.requires_grad],
        )
        seconds, carries = [], [start_carry(s, cfg, slots) for slots in s.shards]
        for _ in range(3):
            begun = time.perf_counter()
            carries, total, *_ = one_step(s, cfg, carries)
            update(opts, trained, total, 0.0, cfg.optimizer.clip)
            seconds.append(time.perf_counter() - begun)
        made["seconds_per_step"] = min(seconds)
        text += (
            f"\n{made['gflop_per_step']:.0f} GFLOP and {made['seconds_per_step']:.2f} s a step, "
            f"about {made['memory_gb']:.1f} GB beside the interpreter; {cfg.train.steps} steps: "
            f"{made['seconds_per_step'] * cfg.train.steps / 3600:.1f} h without evaluations"
        )
    return {**made, "text": text}
