"""EMA and the hand-written loop. The step is pure and importable; only `fit` knows clocks and files.

One optimizer step is one ACT step of every slot of the global batch. Slots are dealt to shards by cost; a process works
on its shards one after the other, each with a carry of its own, and gradients are summed in the order of shards.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, data, etrm, sources
from .config import Config
from .data import UserError
from .encoders import encoder_of, init_params
from .etrm import Carry, Encode, ModelConfig, Params, act_loss, act_step, fresh_carry, leaves, rebuild, tree_map
from .optim import check_patterns, is_frozen, learning_rate, load_optimizers, optimizer_tensors, optimizers, update

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked
    fcntl = None  # type: ignore[assignment]

# ---------------------------------------------------------------- where and in what numbers


def device_of(wanted: str) -> torch.device:
    """Raises UserError when the wanted device is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(k for k, v in there.items() if v) if wanted == "auto" else wanted
    if not there[name]:
        raise UserError(f"train.device: {name} is not available here; there is {', '.join(k for k in there if there[k])}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it natively (on a CPU without that it is slower than fp32), else fp16 on CUDA."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


# ---------------------------------------------------------------- slots, shards, batches


def cost_of(d: data.Deck, cfg: ModelConfig) -> Tensor:
    """(B,) tokens that each slot's canvas has on average over its band."""
    points = (torch.arange(16) + 0.5) / 16
    canvas = d.canvas[data.dealt(d, points, torch.arange(d.slots)[:, None])]
    return cfg.context_tokens + canvas.prod(-1).double().mean(-1)


def deal(d: data.Deck, cfg: ModelConfig, parts: int) -> tuple[Tensor, ...]:
    """Global ids of the slots of each shard, ascending: the costliest slot first, each to the shard with least work."""
    cost, load, dealt = cost_of(d, cfg).tolist(), [0.0] * parts, [[] for _ in range(parts)]  # type: list[float], list[float], list[list[int]]
    for slot in sorted(range(d.slots), key=lambda i: (-cost[i], i)):
        to = min(range(parts), key=lambda r: (load[r], r))
        load[to] += cost[slot]
        dealt[to].append(slot)
    if not all(load):
        raise UserError(f"train.batch: {d.slots} slots cannot fill {parts} shards")
    return tuple(torch.tensor(sorted(mine)) for mine in dealt)


def min_steps(cfg: ModelConfig, seed: int, slots: Tensor, n: Tensor, step: Tensor) -> Tensor:
    """Exploration (B,): with its probability an ACT step may not halt before a number drawn from 2..halt_max_steps.

    Drawn anew at every ACT step, as published."""
    u = data.uniform(2, seed, data.EXPLORE, slots, n, step)
    least = (2 + (u[:, 1] * (cfg.halt_max_steps - 1)).long()).clamp(max=cfg.halt_max_steps)
    return torch.where(u[:, 0] < cfg.exploration, least, 0)


def keep_pages() -> None:
    """Let glibc reuse freed memory instead of returning it: fresh pages cost more than the product written to them
    (20,000 x 128 x 1,024 in bf16: 17 against 7 ms; a training step: 3.9 against 3.3 s)."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32768")  # canvases come in hundreds of shapes
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc


def next_batch(s: Setup, cfg: Config, slots: Tensor, carry: Carry) -> tuple[Carry, data.Batch, Tensor]:
    """Halted slots go on to their next episode; the batch of all slots, and their exploration.

    The one wait for the device in a step: which slots have halted decides the shapes of what comes.
    """
    halted, steps, n = (x.cpu() for x in (carry.halted, carry.steps, carry.n))
    n = n + halted
    episodes = data.draw(s.tasks, s.deck, cfg.data, cfg.run.seed, slots, n)
    batch = data.batch(s.tasks, episodes, cfg.data, cfg.model.raster)
    least = min_steps(cfg.model, cfg.run.seed, slots, n, torch.where(halted, 0, steps) + 1)
    carry = etrm.relaid(cfg.model, carry, halted.tolist(), batch.cells)
    return carry._replace(n=n.to(s.device)), batch, least.to(s.device)


# ---------------------------------------------------------------- one step

SUMS = ("lm_loss", "q_loss", "cell_accuracy", "exact", "q_right", "steps", "count")


def train_step(
    params: dict[str, Tensor], like: Params, cfg: ModelConfig, encode: Encode, dtype: torch.dtype, carry: Carry,
    batch: data.Batch, least: Tensor, scale: float,
) -> tuple[Carry, list[Tensor], Tensor]:  # fmt: skip
    """One ACT step of a shard: (new carry, gradients of scale * summed loss, sums (2, 7) over all and halted slots).

    params: path -> float32 leaf, in the order of the gradients; cast to the compute dtype once, here.
    """
    cast = rebuild(like, {k: v.to(dtype) for k, v in params.items()})
    carry, out = act_step(cast, cfg, encode, carry, batch, least)
    loss = act_loss(cfg, out, batch.labels, batch.cells)
    trained = [v for v in params.values() if v.requires_grad]
    grads = torch.autograd.grad(loss.total.sum() * scale, trained, allow_unused=True)
    with torch.no_grad():
        rows = (loss.lm, loss.q, loss.cell_accuracy, loss.exact, loss.q_right, carry.steps, torch.ones_like(loss.lm))
        table = torch.stack([r.float() for r in rows]) * loss.labelled
        sums = torch.stack((table.sum(-1), (table * carry.halted).sum(-1)))
    return carry, [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)], sums


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
    return [x.view_as(g) for x, g in zip(total.split([g.numel() for g in shapes]), shapes, strict=True)]


# ---------------------------------------------------------------- watching a run


def portions(asked: data.Queries, cfg: ModelConfig, tokens: int) -> list[Tensor]:
    """Rows of `asked` of each evaluation batch, by size, at most `tokens` tokens each; those without a canvas are left out."""
    cells = asked.canvas.prod(1)
    order = torch.argsort(cells, stable=True)
    made: list[list[int]] = []
    room = 0
    for row in order[cells[order] > 0].tolist():
        need = cfg.context_tokens + int(cells[row])
        if need > room:
            made.append([])
            room = tokens
        made[-1].append(row)
        room -= need
    return [torch.tensor(rows) for rows in made]


def donors(task: Tensor, seed: int) -> Tensor:
    """(Q,) for each query a row whose task is another one, fixed by the seed: whose demos it is shown instead."""
    tasks = task.unique()
    if len(tasks) < 2:
        raise UserError("eval.foreign: needs two tasks, there is one")
    order = tasks[data.uniform(len(tasks), seed, data.DONOR).argsort()]
    other = dict(zip(order.tolist(), order.roll(1).tolist(), strict=True))
    rows = {int(t): i for i, t in enumerate(task.tolist())}
    return torch.tensor([rows[other[t]] for t in task.tolist()])


def probe(params: Params, cfg: Config, tasks: data.Tasks, rule: str, dtype: torch.dtype, foreign: bool = False) -> dict[str, Any]:
    """Loss, cell accuracy and exact match over all queries, unaugmented, with their own or another task's demos.

    Means over queries; one whose output does not fit its canvas counts as wrong and has no loss. `wrong`: their pairs.
    """
    tasks = tasks._replace(cells=tasks.cells.to(leaves(params)["core.embed"].device))
    asked = data.queries(tasks, rule, cfg.data.canvases)
    asked = data.chosen(asked, asked.known)
    shown = asked.pair[donors(asked.task, cfg.run.seed)] if foreign else asked.pair
    encode, cast = encoder_of(cfg.model), tree_map(lambda x: x.to(dtype), params)
    lm, cells, exact = (torch.zeros(len(asked.pair)) for _ in range(3))
    for rows in portions(asked, cfg.model, cfg.eval.tokens):
        e = data.posed(tasks, cfg.data, rule, data.chosen(asked, rows), shown[rows])
        batch = data.batch(tasks, e, cfg.data, cfg.model.raster)
        out = etrm.think(cast, cfg.model, encode, batch, dtype, cfg.eval.act_steps)
        loss = act_loss(cfg.model, out, batch.labels, batch.cells)
        lm[rows], cells[rows], exact[rows] = loss.lm.cpu(), loss.cell_accuracy.cpu(), loss.exact.float().cpu()
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


def watch(params: Params, ema: Params, cfg: Config, tasks: data.Tasks, dtype: torch.dtype) -> dict[str, float]:
    """All probes of the config, e.g. dev/ema/own/loss."""
    rule = rule_of(cfg)
    found: dict[str, float] = {}
    for weights in cfg.eval.weights:
        tree = ema if weights == "ema" else params
        for whose in ("own", "foreign") if cfg.eval.foreign else ("own",):
            row = probe(tree, cfg, tasks, rule, dtype, whose == "foreign")
            found |= {f"{cfg.eval.on}/{weights}/{whose}/{k}": row[k] for k in ("loss", "cell_accuracy", "exact", "n")}
    return found


# ---------------------------------------------------------------- the loop


class Setup(NamedTuple):
    """Everything a run stands on, made from its config alone."""

    tasks: data.Tasks  # training set, its grids on the device
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


def setup(cfg: Config, rank: int = 0, world: int = 1) -> Setup:
    keep_pages()
    device = device_of(cfg.train.device)
    dtype = dtype_of(cfg.train.dtype, device)
    train, dev, finding = sources.prepare(cfg.data)
    tasks = data.pack(train)
    if cfg.eval.on == "dev" and not dev:
        raise UserError("eval.on: the dev split is to be watched but data.dev is empty")
    if cfg.train.shards % world:
        raise UserError(f"train.shards: {cfg.train.shards} shards cannot be spread over {world} processes")
    asked = data.queries(tasks, cfg.data.query, cfg.data.canvases)
    deck = data.deck(asked, cfg.train.batch)
    shards = deal(deck, cfg.model, cfg.train.shards)
    watched = tasks if cfg.eval.on == "train" else data.pack(dev)
    questions = data.queries(watched, rule_of(cfg), cfg.data.canvases)
    if not questions.known.any():
        raise UserError(f"eval.on: no task of the {cfg.eval.on} set has a query with a known output")
    if cfg.eval.foreign:
        donors(questions.task[questions.known], cfg.run.seed)  # before an hour has gone by
    if (largest := max(cfg.data.canvases or (data.MAX_SIDE,))) > cfg.model.raster:
        raise UserError(f"data.canvases: {largest} is larger than model.raster = {cfg.model.raster}")
    like = init_params(cfg.model, cfg.run.seed)
    check_patterns(cfg.optimizer, leaves(like))
    params = {k: v.to(device).requires_grad_(not is_frozen(cfg.optimizer, k)) for k, v in leaves(like).items()}
    meta = {"config": json.loads(msgspec.json.encode(cfg)), "data": sources.set_hash(train), "finding": msgspec.to_builtins(finding)}
    return Setup(
        tasks._replace(cells=tasks.cells.to(device)), deck, watched, {**meta, "tasks": len(train), "dtype": str(dtype)},
        shards[rank::world], int((~asked.fits).sum()), device, dtype, params, like,
        encoder_of(cfg.model),
    )  # fmt: skip


def start_carry(s: Setup, cfg: Config, slots: Tensor) -> Carry:
    return fresh_carry(cfg.model, [0] * len(slots), s.dtype, s.device)


def one_step(
    s: Setup, cfg: Config, carries: Sequence[Carry], scale: float = 1.0, ask: bool = False
) -> tuple[list[Carry], list[Tensor], Tensor, bool]:
    """One ACT step of every slot: (carries, gradients of all processes, sums of this one, did any process ask to stop)."""
    new, grads, sums = [], [], torch.zeros(2, len(SUMS), device=s.device)
    for slots, carry in zip(s.shards, carries, strict=True):
        carry, batch, least = next_batch(s, cfg, slots, carry)
        carry, g, part = train_step(s.params, s.like, cfg.model, s.encode, s.dtype, carry, batch, least, scale / cfg.train.batch)
        new.append(carry)
        grads.append([*g, g[0].new_tensor([float(ask)])])  # the vote travels with the gradients
        sums += part
    *total, vote = reduce(grads)
    return new, total, sums, float(vote) > 0


CARRY = Carry._fields[:-1]  # its tensors


def carry_tensors(slots: Tensor, carry: Carry) -> dict[int, dict[str, Tensor]]:
    """The carry slot by slot (global ids), so that any number of shards and processes can take it up."""
    rows = zip(carry.z_H.split(carry.tokens), carry.z_L.split(carry.tokens), carry.steps, carry.halted, carry.n, strict=True)
    return {int(i): dict(zip(CARRY, row, strict=True)) for i, row in zip(slots, rows, strict=True)}


def carry_from(saved: dict[int, dict[str, Tensor]], slots: Tensor, device: torch.device) -> Carry:
    """The carry of a shard from its slots."""
    mine = [saved[int(i)] for i in slots]
    joined = {k: (torch.cat if k in ("z_H", "z_L") else torch.stack)([s[k] for s in mine]).to(device) for k in CARRY}
    return Carry(**joined, tokens=tuple(len(s["z_H"]) for s in mine))


class Run:
    """A run folder held by one process (or one group of processes): its lock, its metrics, what ends it early."""

    def __init__(self, folder: Path, rank: int, resume: bool) -> None:
        self.folder, self.rank, self.stop = folder, rank, ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                self.lock = open(folder / "lock", "w")  # noqa: SIM115 (held for the life of the run)
                if fcntl:
                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run.dir: {folder} is held by a live process") from None
        except OSError as e:
            raise UserError(f"run.dir: {folder}: {e.strerror}") from None
        if not resume and any(folder.glob("state-*.json")):
            raise UserError(f"run.dir: {folder} holds a run already: go on with --resume, or choose another --set run.dir=...")

    def open_log(self, step: int) -> None:
        """metrics.jsonl, cut back to the rows of steps up to `step`."""
        path = self.folder / "metrics.jsonl"
        kept = []
        if step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # the line being written when the run was killed
        checkpoint.write_text(path, "".join(kept))
        self.log = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()

    def __enter__(self) -> Run:
        def ask(signum: int, frame: Any) -> None:
            self.stop = signal.Signals(signum).name

        main = threading.current_thread() is threading.main_thread()
        self.before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)} if main else {}
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)
        for name in ("log", "lock"):
            if file := getattr(self, name, None):
                file.close()


MAY_CHANGE = {"run": {"dir"}, "train": {"steps", "shards", "log_every", "save_every"}, "eval": None, "fast": None}


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError when a field that decides the course of a run differs from the one that is resumed."""
    for table, fields in now.items():
        free = MAY_CHANGE.get(table, set())
        if free is not None:
            for key in fields:
                if key not in free and saved.get(table, {}).get(key) != fields[key]:
                    raise UserError(f"--resume: {table}.{key} is {fields[key]}, the run has {saved.get(table, {}).get(key)}")


@dataclasses.dataclass
class State:
    """All that changes during a run, beside the parameters: what is saved and taken up again."""

    ema: dict[str, Tensor]
    opts: list[torch.optim.Optimizer]
    carries: list[Carry]  # of this process's shards
    sums: Tensor  # (2, 7) metric sums since the last row, of this process
    facts: dict[str, Any]  # step, best, last evaluation, seconds, scale of the loss (fp16)


def fresh_state(cfg: Config, s: Setup) -> State:
    return State(
        ema={k: v.detach().clone() for k, v in s.params.items()},
        opts=optimizers(cfg.optimizer, s.params),
        carries=[start_carry(s, cfg, slots) for slots in s.shards],
        sums=torch.zeros(2, len(SUMS), device=s.device),
        facts={"step": 0, "best": math.inf, "last": {}, "seconds": 0.0, "scale": 2.0**16 if s.dtype == torch.float16 else 1.0},
    )


def state_tensors(s: Setup, state: State, rank: int) -> dict[str, Tensor]:
    """What one process saves: its carries slot by slot; rank 0 also what all processes share."""
    found = {"sums": state.sums}
    for slots, carry in zip(s.shards, state.carries, strict=True):
        for slot, fields in carry_tensors(slots, carry).items():
            found |= {f"slot.{slot}.{k}": v for k, v in fields.items()}
    if rank == 0:
        found |= {f"params.{k}": v for k, v in s.params.items()} | {f"ema.{k}": v for k, v in state.ema.items()}
        found |= optimizer_tensors(state.opts)
    return found


def saved_slots(parts: Sequence[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The carries of all processes, by global slot id."""
    slots: dict[int, dict[str, Tensor]] = {}
    for part in parts:
        for key in (k for k in part if k.startswith("slot.")):
            _, slot, field = key.split(".")
            slots.setdefault(int(slot), {})[field] = part[key]
    return slots


def take_up(s: Setup, state: State, run: Run, world: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Go on from the newest whole state of the run folder, in place. Raises UserError where that would not be the same run."""
    manifest, parts, skipped = checkpoint.load_state(run.folder)
    for reason in skipped:
        say({"skipped": reason})
    if manifest is None:
        raise UserError(f"--resume: {run.folder} holds no whole state; skipped: {'; '.join(skipped) or 'nothing'}")
    check_same(manifest["config"], s.meta["config"])
    for key, name in (("data", "training set"), ("dtype", "compute dtype")):
        if manifest[key] != s.meta[key]:
            raise UserError(f"--resume: the {name} is {s.meta[key]}, that of {run.folder} is {manifest[key]}")
    state.facts = {k: manifest[k] for k in state.facts}
    if any(manifest["config"]["eval"][k] != s.meta["config"]["eval"][k] for k in ("on", "weights", "act_steps")):
        state.facts["best"] = math.inf  # measured by another yardstick
    with torch.no_grad():
        for k, p in s.params.items():
            p.copy_(parts[0][f"params.{k}"])
            state.ema[k].copy_(parts[0][f"ema.{k}"])
    load_optimizers(state.opts, parts[0])
    slots = saved_slots(parts)
    state.carries = [carry_from(slots, mine, s.device) for mine in s.shards]
    if len(parts) == world:
        state.sums = parts[run.rank]["sums"].to(s.device)
    elif run.rank == 0:
        state.sums = torch.stack([p["sums"] for p in parts]).sum(0).to(s.device)


def metrics_row(sums: Tensor) -> dict[str, float]:
    """Means over slots, all of them and those that halted, from the sums (2, 7) of all processes."""
    row: dict[str, float] = {}
    for which, values in zip(("all", "halted"), sums.tolist(), strict=True):
        row |= {f"{which}/{k}": v / values[-1] for k, v in zip(SUMS[:-1], values, strict=False) if values[-1]}
        row[f"{which}/count"] = values[-1]
    return row


def fit(
    cfg: Config, say: Callable[[dict[str, Any]], None] = lambda row: None, resume: bool = False, limit: float = math.inf
) -> dict[str, Any]:
    """Train as the config says; rows of metrics go to `say` and to metrics.jsonl. Returns the last evaluation's row.

    resume: go on from the newest whole state of the run folder, to the same bits as if never interrupted. SIGTERM,
    SIGINT and `limit` (seconds) finish the step and save; "stopped" then says why. Raises UserError on a non-finite
    gradient, naming the step; the state before it stays.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    s = setup(cfg, rank, world)
    if world > 1 and not dist.is_initialized():
        if s.device.type == "cuda":
            torch.cuda.set_device(s.device)
        dist.init_process_group("nccl" if s.device.type == "cuda" else "gloo")
    with Run(Path(cfg.run.dir), rank, resume) as run:
        state, show = fresh_state(cfg, s), say if rank == 0 else lambda row: None
        if resume:
            take_up(s, state, run, world, show)
        if rank == 0:
            run.open_log(state.facts["step"])
        return loop(cfg, s, state, run, show, time.monotonic() + limit, world)


def loop(
    cfg: Config, s: Setup, state: State, run: Run, say: Callable[[dict[str, Any]], None], deadline: float, world: int
) -> dict[str, Any]:
    """Steps until the last one, a wish to stop, or the wanted score; after each, what is due: row, evaluation, checkpoint."""
    facts, trained = state.facts, [p for p in s.params.values() if p.requires_grad]
    begun = time.monotonic() - facts["seconds"]
    step, stopped, since, since_step = facts["step"], "", time.monotonic(), facts["step"]

    def note(row: dict[str, Any]) -> None:
        row = {"step": step, "samples": step * cfg.train.batch, "seconds": round(time.monotonic() - begun, 3), **row}
        if run.rank == 0:
            run.write(row)
        say(row)

    def save_weights(name: str) -> None:
        if run.rank == 0:
            raw, mean = rebuild(s.like, s.params), rebuild(s.like, state.ema)
            checkpoint.save(run.folder / f"{name}.safetensors", raw, mean, {**s.meta, "step": step, "score": facts["last"]})

    while step < cfg.train.steps and not stopped:
        step += 1
        ask = bool(run.stop) or time.monotonic() > deadline
        state.carries, grads, part, asked = one_step(s, cfg, state.carries, facts["scale"], ask)
        state.sums += part
        if facts["scale"] != 1:
            torch._foreach_mul_(grads, 1 / facts["scale"])
        lr = learning_rate(cfg.optimizer, step, cfg.train.steps)
        norm = float(update(state.opts, trained, grads, lr, cfg.optimizer.clip))
        if math.isfinite(norm):
            torch._foreach_lerp_(list(state.ema.values()), list(s.params.values()), 1 - cfg.train.ema)
        elif facts["scale"] > 1:
            facts["scale"] /= 2
        else:
            raise UserError(f"step {step}: the gradient is not finite; {run.folder} keeps the state before it")

        facts["step"], done = step, step == cfg.train.steps
        if asked and not done:
            stopped = run.stop or ("time limit" if time.monotonic() > deadline else "another process was stopped")
        if step % cfg.train.log_every == 0 or done:
            every = state.sums.clone()
            if world > 1:
                dist.all_reduce(every)
            now = time.monotonic()
            norms = {"grad_norm": norm, "grad_norm_clipped": min(norm, cfg.optimizer.clip or norm)}
            rate = (step - since_step) * cfg.train.batch / (now - since)
            note({"lr": lr, **norms, "samples_per_s": rate, **metrics_row(every)})
            state.sums.zero_()
            since, since_step = now, step
        if step % cfg.eval.every == 0 or done:
            raw, mean = (rebuild(s.like, {k: v.detach() for k, v in x.items()}) for x in (s.params, state.ema))
            found = [watch(raw, mean, cfg, s.watched, s.dtype) if run.rank == 0 else {}]
            if world > 1:  # one answer for all, or they might part ways over its last bit
                dist.broadcast_object_list(found, device=s.device)
            facts["last"] = found[0]
            note(facts["last"])
            first = f"{cfg.eval.on}/{cfg.eval.weights[0]}/own"
            if facts["last"][f"{first}/loss"] < facts["best"]:
                facts["best"] = facts["last"][f"{first}/loss"]
                save_weights("best")
            if 0 < cfg.eval.stop_at <= facts["last"][f"{first}/exact"]:
                stopped = "eval.stop_at"
            since, since_step = time.monotonic(), step
        if step % cfg.train.save_every == 0 or done or stopped:
            save_weights("last")
            if run.rank == 0:
                checkpoint.sync(run.folder / "metrics.jsonl")
            tensors, meta = state_tensors(s, state, run.rank), {**facts, "seconds": time.monotonic() - begun, **s.meta}
            checkpoint.save_state(run.folder, step, run.rank, world, tensors, dist.barrier if world > 1 else lambda: None, meta)
    result = {"step": step, "samples": step * cfg.train.batch, "seconds": round(time.monotonic() - begun, 1)}
    return {**facts["last"], **result, **({"stopped": stopped} if stopped else {})}
