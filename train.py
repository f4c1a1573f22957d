"""Optimizer, EMA and the hand-written loop. The step is pure and importable; only `fit` knows clocks and files.

One optimizer step is one ACT step of every slot of the global batch. Slots are dealt to shards by cost; a process works
on its shards one after the other, each with a carry of its own, and gradients are summed in the order of shards.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, data, etrm, sources
from .config import Config, OptimizerConfig
from .data import DataConfig, UserError
from .encoders import encoder_of, init_params
from .etrm import Carry, Encode, ModelConfig, Params, act_loss, act_step, fresh_carry, leaves, rebuild, tree_map

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


class Shard(NamedTuple):
    """A part of the global batch: for each pool with slots here, their global ids."""

    pools: tuple[data.Pool, ...]
    slots: tuple[Tensor, ...]


def deal(pools: Sequence[data.Pool], cfg: ModelConfig, parts: int) -> tuple[Shard, ...]:
    """Deal all slots to shards, the costliest first, each to the shard with least work: every slot exactly once."""
    cost = [cfg.context_tokens + p.canvas**2 for p in pools]
    first = [sum(p.slots for p in pools[:i]) for i in range(len(pools))]
    load, dealt = [0] * parts, [[[] for _ in pools] for _ in range(parts)]  # type: list[int], list[list[list[int]]]
    for i in sorted(range(len(pools)), key=lambda i: -cost[i]):
        for slot in range(first[i], first[i] + pools[i].slots):
            to = min(range(parts), key=lambda r: (load[r], r))
            load[to] += cost[i]
            dealt[to][i].append(slot)
    if not all(load):
        raise UserError(f"train.batch: {sum(p.slots for p in pools)} slots cannot fill {parts} shards")
    return tuple(
        Shard(tuple(p for p, s in zip(pools, mine, strict=True) if s), tuple(torch.tensor(s) for s in mine if s)) for mine in dealt
    )


def episodes_of(tasks: data.Tasks, shard: Shard, cfg: DataConfig, seed: int, n: Tensor) -> data.Episodes:
    """The n-th episode (B,) of each slot of the shard."""
    parts = n.split([len(s) for s in shard.slots])
    return data.join([data.draw(tasks, p, cfg, seed, s, k) for p, s, k in zip(shard.pools, shard.slots, parts, strict=True)])


def min_steps(cfg: ModelConfig, seed: int, slots: Tensor, n: Tensor, step: Tensor) -> Tensor:
    """Exploration (B,): with its probability an ACT step may not halt before a number drawn from 2..halt_max_steps.

    Drawn anew at every ACT step, as published."""
    u = data.uniform(2, seed, data.EXPLORE, slots, n, step)
    least = 2 + (u[:, 1] * (cfg.halt_max_steps - 1)).long()
    return torch.where(u[:, 0] < cfg.exploration, least, 0)


def keep_pages() -> None:
    """Let glibc reuse freed memory instead of returning it: fresh pages cost more than the product written to them
    (20,000 x 128 x 1,024 in bf16: 17 against 7 ms; a training step: 3.9 against 3.3 s)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc


def to_device(tree: Any, device: torch.device) -> Any:
    return tree if device.type == "cpu" else tree_map(lambda x: x.to(device, non_blocking=True), tree)


def next_batch(tasks: data.Tasks, shard: Shard, cfg: Config, carry: Carry, device: torch.device) -> tuple[Carry, data.Batch, Tensor]:
    """Halted slots go on to their next episode; the batch of all slots, and their exploration.

    The one wait for the device in a step: which slots have halted decides the shapes of the ragged demos.
    """
    halted, steps = carry.halted.cpu(), carry.steps.cpu()
    n = carry.n.cpu() + halted
    ids = torch.cat(shard.slots)
    episodes = episodes_of(tasks, shard, cfg.data, cfg.run.seed, n)
    pools = [(p.canvas, len(s)) for p, s in zip(shard.pools, shard.slots, strict=True)]
    batch = data.batch(tasks, episodes, pools, cfg.data.demo_canvases)
    least = min_steps(cfg.model, cfg.run.seed, ids, n, torch.where(halted, 0, steps) + 1)
    return carry._replace(n=n.to(device)), to_device(batch, device), least.to(device)


def slot_weights(shard: Shard, batch: int) -> Tensor:
    """(B,) so that the weighted sum over all slots is the mean over tasks."""
    return torch.cat([torch.full((len(s),), p.weight / batch) for p, s in zip(shard.pools, shard.slots, strict=True)])


# ---------------------------------------------------------------- one step

SUMS = ("lm_loss", "q_loss", "cell_accuracy", "exact", "q_right", "steps", "count")


def train_step(
    params: dict[str, Tensor], like: Params, cfg: ModelConfig, encode: Encode, dtype: torch.dtype, carry: Carry,
    batch: data.Batch, least: Tensor, weight: Tensor, scale: float = 1.0,
) -> tuple[Carry, list[Tensor], Tensor]:  # fmt: skip
    """One ACT step of a shard: (new carry, gradients of scale * weighted loss, sums (2, 7) over all and halted slots).

    params: path -> float32 leaf, in the order of the gradients; cast to the compute dtype once, here.
    """
    cast = rebuild(like, {k: v.to(dtype) for k, v in params.items()})
    carry, out = act_step(cast, cfg, encode, carry, batch, least)
    loss = act_loss(cfg, out, batch.labels)
    trained = [v for v in params.values() if v.requires_grad]
    grads = torch.autograd.grad((loss.total * weight).sum() * scale, trained, allow_unused=True)
    with torch.no_grad():
        rows = (loss.lm, loss.q, loss.cell_accuracy, loss.exact, loss.q_right, carry.steps, torch.ones_like(loss.lm))
        table = torch.stack([r.float() for r in rows]) * loss.labelled
        sums = torch.stack((table.sum(-1), (table * carry.halted).sum(-1)))
    return carry, [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)], sums


def learning_rate(cfg: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to final_lr of it. The first step is 1 and already counts, as published."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    done = min(1.0, (step - cfg.warmup) / max(1, steps - cfg.warmup))
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class AdamAtan2(torch.optim.Optimizer):
    """Adam-atan2 as adam-atan2 0.0.3 has it: p -= lr / (1 - b1^t) * atan2(m, sqrt(v / (1 - b2^t))), decoupled decay.

    The bias correction of the first moment scales the step instead of m inside the arctangent; there is no epsilon.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                s = self.state[p] or {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                self.state[p] = s
                s["step"] += 1
                p.mul_(1 - lr * group["weight_decay"])
                s["m"].lerp_(p.grad, 1 - b1)
                s["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                t = int(s["step"])
                p.sub_(torch.atan2(s["m"], (s["v"] / (1 - b2**t)).sqrt()), alpha=lr / (1 - b1**t))


def first_match(rules: dict[str, float], path: str) -> float:
    return next((v for pattern, v in rules.items() if re.fullmatch(pattern, path)), 1.0)


def is_frozen(cfg: OptimizerConfig, path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in cfg.freeze)


def is_matrix(path: str, p: Tensor) -> bool:
    """What Muon orthogonalises: products inside blocks; not embeddings, queries, heads and positions."""
    return p.ndim == 2 and not re.search(r"embed|queries|head|q_weight|position|pool\.0$", path)


def optimizers(cfg: OptimizerConfig, params: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """Optimizers over the trained leaves; each group carries `scale`, its share of the learning rate."""
    for pattern in (*cfg.freeze, *cfg.lr_scale, *cfg.decay_scale):
        try:
            if not any(re.fullmatch(pattern, path) for path in params):
                raise UserError(f"optimizer: pattern {pattern!r} matches no parameter; paths look like {min(params)}")
        except re.error as e:
            raise UserError(f"optimizer: pattern {pattern!r} is no regular expression: {e}") from None
    groups: dict[tuple[bool, float, float], list[Tensor]] = {}
    for path, p in params.items():
        if p.requires_grad:
            muon = cfg.kind == "muon" and is_matrix(path, p)
            key = (muon, first_match(cfg.lr_scale, path), first_match(cfg.decay_scale, path))
            groups.setdefault(key, []).append(p)
    made: list[torch.optim.Optimizer] = []
    for muon in (True, False):
        own = [
            {"params": ps, "scale": lr, "weight_decay": cfg.weight_decay * decay} for (m, lr, decay), ps in groups.items() if m == muon
        ]
        if not own:
            continue
        if muon:
            made.append(torch.optim.Muon(own, lr=cfg.lr, adjust_lr_fn="match_rms_adamw"))
        elif cfg.kind == "adam_atan2":
            made.append(AdamAtan2(own, cfg.lr, cfg.betas, cfg.weight_decay))
        else:
            made.append(torch.optim.AdamW(own, lr=cfg.lr, betas=cfg.betas, foreach=True))
    return made


def update(
    opts: Sequence[torch.optim.Optimizer], trained: Sequence[Tensor], grads: Sequence[Tensor], lr: float, clip: float,
) -> Tensor:  # fmt: skip
    """Clip by the global norm, then step, in place; the norm before clipping. A non-finite norm changes nothing."""
    norm = torch.stack(torch._foreach_norm(list(grads))).norm()
    if not math.isfinite(float(norm)):
        return norm
    if clip:
        torch._foreach_mul_(list(grads), (clip / (norm + 1e-6)).clamp(max=1.0))
    for p, g in zip(trained, grads, strict=True):
        p.grad = g
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr * group["scale"]
        opt.step()
        opt.zero_grad(set_to_none=True)
    return norm


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


def by_pool(asked: data.Queries, cfg: ModelConfig, tokens: int) -> list[tuple[int, Tensor]]:
    """(canvas, rows of `asked`) of each evaluation batch: one pool, at most `tokens` tokens."""
    made = []
    for canvas in asked.canvas[asked.canvas > 0].unique().tolist():
        rows = torch.nonzero(asked.canvas == canvas).flatten()
        made += [(canvas, part) for part in rows.split(max(1, tokens // (cfg.context_tokens + canvas**2)))]
    return made


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
    device = leaves(params)["core.embed"].device
    asked = data.queries(tasks, rule, cfg.data.canvases)
    shown = asked.pair[donors(asked.task, cfg.run.seed)] if foreign else asked.pair
    encode, cast = encoder_of(cfg.model), tree_map(lambda x: x.to(dtype), params)
    lm, cells, exact = (torch.zeros(len(asked.pair)) for _ in range(3))
    for canvas, rows in by_pool(asked, cfg.model, cfg.eval.tokens):
        demos = data.candidates(tasks, shown[rows], rule)
        demos = data.choose_demos(demos, torch.arange(demos.shape[1] + 1).expand(len(rows), -1) / 1e4, cfg.data.max_demos)
        shift = torch.zeros(len(rows), 1 + demos.shape[1], 2, dtype=torch.float64)
        e = data.Episodes(asked.pair[rows], demos, data.identity(len(rows)), shift)
        batch = to_device(data.batch(tasks, e, [(canvas, len(rows))], cfg.data.demo_canvases), device)
        loss = act_loss(cfg.model, etrm.think(cast, cfg.model, encode, batch, dtype, cfg.eval.act_steps), batch.labels)
        lm[rows], cells[rows], exact[rows] = loss.lm.cpu(), loss.cell_accuracy.cpu(), loss.exact.float().cpu()
    fits = asked.fits.float()
    return {
        "loss": float((lm * fits).sum() / fits.sum()),
        "cell_accuracy": float((cells * fits).mean()),
        "exact": float((exact * fits).mean()),
        "n": len(fits),
        "wrong": asked.pair[exact * fits == 0].tolist(),
    }


def watch(params: Params, ema: Params, cfg: Config, tasks: data.Tasks, dtype: torch.dtype) -> dict[str, float]:
    """All probes of the config, e.g. dev/ema/own/loss."""
    rule = cfg.data.query if cfg.eval.on == "train" else "test"
    found: dict[str, float] = {}
    for weights in cfg.eval.weights:
        tree = ema if weights == "ema" else params
        for whose in ("own", "foreign") if cfg.eval.foreign else ("own",):
            row = probe(tree, cfg, tasks, rule, dtype, whose == "foreign")
            found |= {f"{cfg.eval.on}/{weights}/{whose}/{k}": row[k] for k in ("loss", "cell_accuracy", "exact")}
    return found


def flops(cfg: Config, tasks: data.Tasks, shards: Sequence[Shard]) -> tuple[float, float]:
    """(GFLOP of one optimizer step, GB that autograd keeps for the largest shard), counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    meta, total, most = torch.device("meta"), 0.0, 0
    like = init_params(cfg.model, 0)
    for shard in shards:
        slots = torch.cat(shard.slots)
        carry = fresh_carry(cfg.model, [torch.empty(len(s), p.canvas**2) for p, s in zip(*shard, strict=True)], torch.float32)
        carry, batch, least = next_batch(tasks, shard, cfg, carry, torch.device("cpu"))
        p = {k: v.to(meta).requires_grad_(not is_frozen(cfg.optimizer, k)) for k, v in leaves(like).items()}
        kept: dict[int, int] = {}

        def note(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[id(x.untyped_storage())] = x.numel() * x.element_size()
            return x

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            train_step(
                p, like, cfg.model, encoder_of(cfg.model), torch.bfloat16, to_device(carry, meta),
                to_device(batch, meta), least.to(meta), torch.empty(len(slots), device=meta),
            )  # fmt: skip
        total += counter.get_total_flops()
        most = max(most, sum(kept.values()))
    return total / 1e9, most / 1e9


# ---------------------------------------------------------------- the loop


class Setup(NamedTuple):
    """Everything a run stands on, made from its config alone."""

    tasks: data.Tasks  # training set, on the host
    watched: data.Tasks
    meta: dict[str, Any]  # what a checkpoint says of itself
    shards: tuple[Shard, ...]  # of this process, out of cfg.train.shards
    left_out: int  # training queries whose output or demos fit no canvas
    device: torch.device
    dtype: torch.dtype
    params: dict[str, Tensor]  # path -> float32 leaf
    like: Params  # the tree's shape
    encode: Encode


def setup(cfg: Config, rank: int = 0, world: int = 1) -> Setup:
    keep_pages()
    device = device_of(cfg.train.device)
    train, dev, finding = sources.prepare(cfg.data)
    tasks = data.pack(train)
    if cfg.eval.on == "dev" and not dev:
        raise UserError("eval.on: the dev split is to be watched but data.dev is empty")
    if cfg.train.shards % world:
        raise UserError(f"train.shards: {cfg.train.shards} shards cannot be spread over {world} processes")
    asked = data.queries(tasks, cfg.data.query, cfg.data.canvases)
    shards = deal(data.pools(asked, cfg.train.batch), cfg.model, cfg.train.shards)
    like = init_params(cfg.model, cfg.run.seed)
    params = {k: v.to(device).requires_grad_(not is_frozen(cfg.optimizer, k)) for k, v in leaves(like).items()}
    meta = {"config": msgspec.to_builtins(cfg), "data": sources.set_hash(train), "finding": msgspec.to_builtins(finding)}
    return Setup(
        tasks, tasks if cfg.eval.on == "train" else data.pack(dev), {**meta, "tasks": len(train)},
        shards[rank::world], int((~asked.fits).sum()), device, dtype_of(cfg.train.dtype, device), params, like,
        encoder_of(cfg.model),
    )  # fmt: skip


def start_carry(cfg: Config, shard: Shard, device: torch.device, dtype: torch.dtype) -> Carry:
    shapes = [torch.empty(len(s), p.canvas**2, device=device) for p, s in zip(*shard, strict=True)]
    return fresh_carry(cfg.model, shapes, dtype)


def fit(cfg: Config, say: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Train as the config says; rows of metrics go to `say` and to metrics.jsonl. Returns the last evaluation's row.

    Raises UserError on a non-finite loss or gradient, naming the step; the last checkpoint stays.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    s = setup(cfg, rank, world)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if s.device.type == "cuda" else "gloo")
    folder = Path(cfg.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "metrics.jsonl", "w", encoding="utf-8") if rank == 0 else None  # noqa: SIM115
    except OSError as e:
        raise UserError(f"run.dir: {folder}: {e.strerror}") from None

    trained = [p for p in s.params.values() if p.requires_grad]
    opts = optimizers(cfg.optimizer, s.params)
    ema = {k: v.detach().clone() for k, v in s.params.items()}
    carries = [start_carry(cfg, shard, s.device, s.dtype) for shard in s.shards]
    weights = [slot_weights(shard, cfg.train.batch).to(s.device) for shard in s.shards]
    sums = torch.zeros(2, len(SUMS), device=s.device)
    scale = 2.0**16 if s.dtype == torch.float16 else 1.0  # of the loss; halved when gradients overflow
    best, last = math.inf, dict[str, float]()
    since = begun = time.monotonic()

    def write(row: dict[str, Any]) -> None:
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
        say(row)

    def save(name: str, step: int) -> None:
        if rank == 0:
            raw, mean = rebuild(s.like, s.params), rebuild(s.like, ema)
            checkpoint.save(folder / f"{name}.safetensors", raw, mean, {**s.meta, "step": step, "score": last})

    for step in range(1, cfg.train.steps + 1):
        grads = []
        for i, shard in enumerate(s.shards):
            carries[i], batch, least = next_batch(s.tasks, shard, cfg, carries[i], s.device)
            carries[i], g, part = train_step(
                s.params, s.like, cfg.model, s.encode, s.dtype, carries[i], batch, least, weights[i], scale
            )
            grads.append(g)
            sums += part
        total = reduce(grads)
        if scale != 1:
            torch._foreach_mul_(total, 1 / scale)
        lr = learning_rate(cfg.optimizer, step, cfg.train.steps)
        norm = float(update(opts, trained, total, lr, cfg.optimizer.clip))
        if not math.isfinite(norm):
            if scale > 1:
                scale /= 2
                continue
            raise UserError(f"step {step}: the gradient is not finite; {folder} keeps the checkpoint before it")
        torch._foreach_lerp_(list(ema.values()), list(s.params.values()), 1 - cfg.train.ema)

        done = step == cfg.train.steps
        if step % cfg.train.log_every == 0 or done:
            now = time.monotonic()
            every = sums.clone()
            if world > 1:
                dist.all_reduce(every)
            steps_since = step % cfg.train.log_every or cfg.train.log_every
            row = {"step": step, "samples": step * cfg.train.batch, "seconds": round(now - begun, 3), "lr": lr,
                   "grad_norm": norm, "samples_per_s": steps_since * cfg.train.batch / (now - since)}  # fmt: skip
            for which, values in zip(("all", "halted"), every.tolist(), strict=True):
                count = values[-1]
                row |= {f"{which}/{k}": v / count for k, v in zip(SUMS[:-1], values, strict=False) if count}
                row[f"{which}/count"] = count
            write(row)
            sums.zero_()
            since = now
        if step % cfg.eval.every == 0 or done:
            raw, mean = (rebuild(s.like, {k: v.detach() for k, v in x.items()}) for x in (s.params, ema))
            last = watch(raw, mean, cfg, s.watched, s.dtype)
            write({"step": step, "samples": step * cfg.train.batch, "seconds": round(time.monotonic() - begun, 3), **last})
            first = f"{cfg.eval.on}/{cfg.eval.weights[0]}/own"
            if last[f"{first}/loss"] < best:
                best = last[f"{first}/loss"]
                save("best", step)
            done |= cfg.eval.stop_at > 0 and last[f"{first}/exact"] >= cfg.eval.stop_at
            since = time.monotonic()
        if step % cfg.train.save_every == 0 or done:
            save("last", step)
        if done:
            break
    if log:
        log.close()
    return {**last, "step": step, "samples": step * cfg.train.batch, "seconds": round(time.monotonic() - begun, 1)}


def plan(cfg: Config, timed: bool) -> dict[str, Any]:
    """What a run would take: parameters, slots per pool, GFLOP a step, memory, and, where timed, seconds of real steps."""
    s = setup(cfg)
    params = sum(p.numel() for p in s.params.values())
    slots: dict[int, int] = {}
    for shard in s.shards:
        for pool, mine in zip(*shard, strict=True):
            slots[pool.canvas] = slots.get(pool.canvas, 0) + len(mine)
    made = {
        "parameters": params,
        "tasks": s.meta["tasks"],
        "slots": slots,
        "dtype": str(s.dtype).removeprefix("torch."),
    }
    text = (
        f"{s.meta['tasks']} tasks ({s.left_out} queries left out: no canvas holds them); "
        f"guard: {msgspec.convert(s.meta['finding'], sources.Finding)}\n{params:,} parameters, {made['dtype']} on {s.device}; "
        f"slots per canvas: {', '.join(f'{k}: {v}' for k, v in slots.items())}"
    )
    if timed:
        made["gflop_per_step"], kept = flops(cfg, s.tasks, s.shards)
        # master weights, gradient, EMA and two moments in float32; a copy in the compute dtype; what autograd keeps
        made["memory_gb"] = params * 22 / 1e9 + kept
        opts, trained = optimizers(cfg.optimizer, s.params), [p for p in s.params.values() if p.requires_grad]
        seconds = []
        carries = [start_carry(cfg, shard, s.device, s.dtype) for shard in s.shards]
        for _ in range(3):
            begun, grads = time.perf_counter(), []
            for i, shard in enumerate(s.shards):
                carries[i], batch, least = next_batch(s.tasks, shard, cfg, carries[i], s.device)
                weight = slot_weights(shard, cfg.train.batch).to(s.device)
                grads.append(train_step(s.params, s.like, cfg.model, s.encode, s.dtype, carries[i], batch, least, weight)[1])
            update(opts, trained, reduce(grads), 0.0, cfg.optimizer.clip)
            seconds.append(time.perf_counter() - begun)
        made["seconds_per_step"] = min(seconds)
        text += (
            f"\n{made['gflop_per_step']:.0f} GFLOP and {made['seconds_per_step']:.2f} s a step, "
            f"about {made['memory_gb']:.1f} GB beside the interpreter; {cfg.train.steps} steps: "
            f"{made['seconds_per_step'] * cfg.train.steps / 3600:.1f} h without evaluations"
        )
    return {**made, "text": text}
