"""Device, dtype and threads; AdamW, Muon and Adam-atan2, schedule and clipping."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .config import Config, OptimizerConfig, UserError

Optimizers = Sequence[torch.optim.Optimizer]

# ---------------------------------------------------------------- hardware


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it natively, else fp16 on CUDA and fp32 on a CPU."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def hardware(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where a config is computed, and in which numbers. Raises UserError on an absent device."""
    available = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    name = available[0] if cfg.train.device == "auto" else cfg.train.device
    if name not in available:
        raise UserError(f"train.device: no {name} here, only {', '.join(available)}")
    index = int(re.sub(r"\D", "", os.environ.get("LOCAL_RANK", "")) or 0)
    device = torch.device(name, index) if name == "cuda" else torch.device(name)
    return device, dtype_of(cfg.train.dtype, device)


def peak_memory(device: torch.device) -> float:
    """GB that this process has used at most: of its GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_pages(dtype: torch.dtype) -> None:
    """Let glibc reuse freed memory: fresh pages cost more than the product written to them (a step
    in bf16: 3.9 against 3.3 s)."""
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # of compiled products: saves 0.6 GB
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        if dtype == torch.float32:  # saves 0.6 GB; in bf16 a tenth slower
            libc.mallopt(-8, 1)  # M_ARENA_MAX
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


THREADS = torch.get_num_threads()  # of this process, before any of them were given to shards


@functools.lru_cache
def pool(workers: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "etrm", torch.set_num_threads, (threads,))


def side_by_side(f: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> list[Any]:
    """[f(x) for x in items]; on CPU several at once, each with its share of torch's threads: four
    shards of 16 slots on two threads make 50.2 samples/s, one after the other 38.9."""
    items = list(items)
    n = min(THREADS, len(items)) if device.type == "cpu" else 1
    if n < 2:
        return [f(x) for x in items]
    try:
        torch.set_num_threads(THREADS // n)
        return list(pool(n, THREADS // n).map(f, items))
    finally:
        torch.set_num_threads(THREADS)


# ---------------------------------------------------------------- optimizers


def learning_rate(cfg: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to final_lr of it. The first step is 1, as published."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    done = min(1.0, (step - cfg.warmup) / max(1, steps - cfg.warmup))
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


BETAS = (0.9, 0.95)  # decay of both moments, in every published system


class AdamAtan2(torch.optim.Optimizer):
    """As adam-atan2 0.0.3: the bias correction of m scales the step, outside the arctangent:
    p -= lr / (1 - b1^t) * atan2(m, sqrt(v / (1 - b2^t))), with decoupled decay."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": BETAS})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not (s := self.state[p]):
                    s.update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
                s["step"] += 1
                p.mul_(1 - lr * group["weight_decay"])
                s["m"].lerp_(p.grad, 1 - b1)
                s["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                t = int(s["step"])
                p.sub_(torch.atan2(s["m"], (s["v"] / (1 - b2**t)).sqrt()), alpha=lr / (1 - b1**t))


def orthogonal(m: Tensor, dtype: torch.dtype) -> Tensor:
    """Five Newton-Schulz steps towards U V^T of each matrix of (n, a, b) (Jordan et al. 2024)."""
    wide = m.shape[1] <= m.shape[2]
    x = (m if wide else m.mT).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x if wide else x.mT).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov Muon with steps of AdamW's size (0.2 sqrt(max(a, b)), arXiv 2502.16982).
    torch.optim.Muon always multiplies in bf16, which a CPU without such products does at a
    twentieth of its speed; here it is the dtype of the run, and equal shapes are taken together."""

    def __init__(self, params: Any, lr: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            lr, momentum = group["lr"], group["momentum"]
            for shape, ps in by_shape.items():
                for p in ps:
                    self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
                grads = [p.grad for p in ps if p.grad is not None]
                buffers = [self.state[p]["momentum_buffer"] for p in ps]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                ahead = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
                steps = list(orthogonal(ahead, self.dtype).unbind())
                torch._foreach_mul_(ps, 1 - lr * group["weight_decay"])
                torch._foreach_add_(ps, steps, alpha=-lr * 0.2 * math.sqrt(max(shape)))


# ---------------------------------------------------------------- patterns of parameter paths


def matched(where: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches as a whole. Raises UserError where it is malformed, matches
    none, or may backtrack for ever (patterns come from checkpoints, too)."""
    paths = list(paths)
    if len(re.findall(r"[*+{]", pattern)) > 6 or re.search(r"\)[*+{]", pattern):
        raise UserError(f"{where}: {pattern[:80]!r} has too many repetitions")
    try:
        matches = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as e:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {e}") from None
    if not matches:
        raise UserError(f"{where}: {pattern!r} matches no parameter; paths look like {min(paths)}")
    return matches


def first_match(rules: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the whole path."""
    return next((v for pattern, v in rules.items() if re.fullmatch(pattern, path)), default)


def is_asleep(cfg: OptimizerConfig, path: str, step: float) -> bool:
    """Whether a parameter is not trained in this step; in step infinity: whether it never is."""
    return step <= (first_match(cfg.freeze, path, -1) or math.inf)


def check_patterns(cfg: OptimizerConfig, params: Collection[str]) -> None:
    """Raises UserError when a pattern matches no parameter, or when everything is frozen."""
    for name in ("freeze", "lr_scale"):
        for pattern in getattr(cfg, name):
            matched(f"optimizer.{name}", pattern, params)
    if all(is_asleep(cfg, path, 1) for path in params):
        raise UserError("optimizer.freeze: nothing is left to train")


# ---------------------------------------------------------------- a step of all optimizers

VECTORS = r"embed|queries|head|halt|q_weight|position|pool\.0$"  # matrices made of vectors


def optimizers(
    cfg: OptimizerConfig, params: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Optimizers over the trained leaves; each group carries `scale`, its share of the rate.
    Muon has the products inside blocks and multiplies in bf16 where that is the run's dtype."""
    matrices: dict[float, dict[str, Any]] = {}  # groups by their scale
    others: dict[float, dict[str, Any]] = {}
    for path, p in params.items():
        if p.requires_grad:
            muon = cfg.kind == "muon" and p.ndim == 2 and not re.search(VECTORS, path)
            scale, groups = first_match(cfg.lr_scale, path, 1.0), matrices if muon else others
            group = {"params": [], "scale": scale, "weight_decay": cfg.weight_decay}
            groups.setdefault(scale, group)["params"].append(p)
    opts: list[torch.optim.Optimizer] = []
    if matrices:
        product = dtype if dtype == torch.bfloat16 else torch.float32
        opts.append(Muon(list(matrices.values()), cfg.lr, product))
    if others and cfg.kind == "adam_atan2":
        opts.append(AdamAtan2(list(others.values()), cfg.lr))
    elif others:
        opts.append(torch.optim.AdamW(list(others.values()), cfg.lr, BETAS, foreach=True))
    return opts


def update(
    opts: Optimizers, trained: Sequence[Tensor], grads: Sequence[Tensor], lr: float, clip: float
) -> Tensor:
    """Clip by the global norm, then step, in place; the norm before clipping. Nothing changes where
    it is not finite. The gradients stay as they are."""
    if not grads:
        return torch.zeros(())
    norm = torch.stack(torch._foreach_norm(list(grads))).norm()
    if not math.isfinite(float(norm)):
        return norm
    if clip:
        grads = torch._foreach_mul(list(grads), (clip / (norm + 1e-6)).clamp(max=1.0))
    for p, g in zip(trained, grads, strict=True):
        p.grad = g
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr * group["scale"]
        opt.step()
        opt.zero_grad(set_to_none=True)
    return norm


def optimizer_tensors(opts: Optimizers) -> dict[str, Tensor]:
    """All state of the optimizers, by optimizer, parameter and name."""
    return {
        f"opt.{i}.{k}.{name}": v
        for i, opt in enumerate(opts)
        for k, fields in opt.state_dict()["state"].items()
        for name, v in fields.items()
    }


def load_optimizers(opts: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, on optimizers built from the same config."""
    for i, opt in enumerate(opts):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, k, name = key.split(".")
                state.setdefault(int(k), {})[name] = value
        opt.load_state_dict({**opt.state_dict(), "state": state})
