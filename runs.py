"""The folder of a run: who holds it, what it says of itself, and all that it takes to go on from it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from . import checkpoint
from .config import OptimizerConfig
from .data import UserError, parsed
from .etrm import Carry
from .optim import load_optimizers, optimizer_tensors, optimizers

if TYPE_CHECKING:
    from .train import Setup

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked
    fcntl = None  # type: ignore[assignment]


def origin() -> dict[str, Any]:
    """Versions, and the git state of the folder the command was given in."""

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()} | (
        {"git": commit, "git_changes": bool(changes)} if commit else {}
    )


# ---------------------------------------------------------------- trackers


class Track(NamedTuple):
    row: Callable[[dict[str, Any]], None]
    close: Callable[[], None]


def tensorboard(folder: Path, cfg: dict[str, Any]) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return Track(track, writer.close)


def wandb(folder: Path, cfg: dict[str, Any]) -> Track:
    import wandb as service  # type: ignore[import-not-found]

    run = service.init(project="etrm", name=folder.name, dir=str(folder), config=cfg, mode=os.environ.get("WANDB_MODE", "offline"))
    return Track(lambda row: run.log(row, step=row["step"]), run.finish)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Track]] = {"tensorboard": tensorboard, "wandb": wandb}


def tracker(kind: str, folder: Path, cfg: dict[str, Any]) -> Track:
    """Raises UserError when its package is not installed."""
    if not kind:
        return Track(lambda row: None, lambda: None)
    try:
        return TRACKERS[kind](folder, cfg)
    except ImportError:
        raise UserError(f"run.track: the package {kind} is not installed; metrics.jsonl is always written") from None


# ---------------------------------------------------------------- the folder


CARRY = Carry._fields[:-1]  # its tensors


def carry_tensors(slots: Tensor, carry: Carry) -> dict[int, dict[str, Tensor]]:
    """The carry slot by slot (global ids), so that any number of shards and processes can take it up."""
    rows = zip(carry.z_H.split(carry.tokens), carry.z_L.split(carry.tokens), carry.steps, carry.halted, carry.n, carry.z_E, strict=True)
    return {int(i): dict(zip(CARRY, row, strict=True)) for i, row in zip(slots, rows, strict=True)}


def carry_from(saved: dict[int, dict[str, Tensor]], slots: Tensor, device: torch.device) -> Carry:
    """The carry of a shard from its slots."""
    mine = [saved[int(i)] for i in slots]
    joined = {k: (torch.cat if k in ("z_H", "z_L") else torch.stack)([s[k] for s in mine]).to(device) for k in CARRY}
    return Carry(**joined, tokens=tuple(len(s["z_H"]) for s in mine))


def reached(folder: Path) -> int:
    """The step of the last weights in a run folder, 0 before those that its first state follows at once."""
    try:
        about = parsed((folder / "run.json").read_text())["config"]["train"]
        step = int(checkpoint.inspect(folder / "last.safetensors")["step"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return 0
    return step if step > about["save_every"] else 0


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
        states = checkpoint.manifests(folder)
        if not states and (step := reached(folder)):
            raise UserError(
                f"run.dir: {folder} holds the weights of step {step}, whose states are gone: choose another --set run.dir=..."
            )
        if not resume and states:
            raise UserError(f"run.dir: {folder} holds a run already: go on with --resume, or choose another --set run.dir=...")
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def begin(self, step: int, source: Path, about: dict[str, Any], track: str) -> None:
        """Rank 0: what comes after `step` never was; metrics.jsonl is that of `source` up to it."""
        checkpoint.cut_back(self.folder, step)
        kept = []
        if step and (source / "metrics.jsonl").exists():
            for line in (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                try:
                    if parsed(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # the line being written when the run was killed
        checkpoint.write_text(self.folder / "metrics.jsonl", "".join(kept))
        checkpoint.write_text(self.folder / "run.json", json.dumps({**about, **origin()}, indent=1))
        self.log = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.track = tracker(track, self.folder, about["config"])

    def write(self, row: dict[str, Any]) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        self.track.row(row)

    def wait(self) -> None:
        """Until what `save` began is written; its error is raised here."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def __enter__(self) -> Run:
        def ask(signum: int, frame: Any) -> None:
            self.stop = signal.Signals(signum).name

        main = threading.current_thread() is threading.main_thread()
        self.before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)} if main else {}
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.shutdown()
        for s, handler in self.before.items():
            signal.signal(s, handler)
        for name in ("track", "log", "lock"):
            if file := getattr(self, name, None):
                file.close()


ALWAYS: dict[str, set[str] | None] = {
    "run": {"dir", "track"},
    "train": {"steps", "shards", "log_every", "save_every", "keep_every", "non_finite"},
    "optimizer": {"final_lr"},
    "eval": None,
    "solve": None,
    "fast": None,
}
FORKED: dict[str, set[str] | None] = {  # in a folder of its own, also how it is trained from here on
    "run": None,
    "train": {*(ALWAYS["train"] or ()), "ema"},
    "optimizer": {"lr", "warmup", "final_lr", "betas", "weight_decay", "clip", "lr_scale", "decay_scale", "table_lr", "table_decay"},
}


def check_same(saved: dict[str, Any], now: dict[str, Any], forked: bool) -> None:
    """Raises UserError when a field that decides the course of a run differs from the one that is gone on from."""
    may = {**ALWAYS, **(FORKED if forked else {})}
    for table, fields in now.items():
        free = may.get(table, set())
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
    sums: Tensor  # (2, 9) metric sums since the last row, of this process
    facts: dict[str, Any]  # see `fresh_facts`


def fresh_facts(scale: float) -> dict[str, Any]:
    """Beside tensors: best value, evaluations since, last evaluation and row, scale of the loss (fp16), steps skipped, why it ended."""
    made: dict[str, Any] = {"step": 0, "best": None, "waited": 0, "last": {}, "trained": {}, "seconds": 0.0}
    return {**made, "scale": scale, "skipped": 0, "ended": ""}


def weights(s: Setup, state: State) -> dict[str, Tensor]:
    return {f"params.{k}": v for k, v in s.params.items()} | {f"ema.{k}": v for k, v in state.ema.items()}


def state_tensors(s: Setup, state: State, rank: int) -> dict[str, Tensor]:
    """What one process saves: its carries slot by slot; rank 0 also what all processes share."""
    found = {"sums": state.sums}
    for slots, carry in zip(s.shards, state.carries, strict=True):
        for slot, fields in carry_tensors(slots, carry).items():
            found |= {f"slot.{slot}.{k}": v for k, v in fields.items()}
    if rank == 0:
        found |= weights(s, state) | optimizer_tensors(state.opts)
    return found


def save(run: Run, s: Setup, state: State, world: int, names: Sequence[str], full: bool) -> None:
    """Weights under these names, then, where `full`, the state: copied here, written while training goes on.

    The state comes last, so that all which it says was reached is there already.
    """
    if not full and (run.rank or not names):
        return
    run.wait()
    tensors = checkpoint.copied(state_tensors(s, state, run.rank) if full else weights(s, state))
    facts, own = {**state.facts}, {k: v for k, v in tensors.items() if k.startswith(("params.", "ema."))}

    def write() -> None:
        if run.rank == 0:
            for name in names:
                about = {**s.meta, "step": facts["step"], "score": facts["last"]}
                checkpoint.save(run.folder / f"{name}.safetensors", own, about)
            checkpoint.sync(run.folder / "metrics.jsonl")
        if full:
            checkpoint.save_state(run.folder, facts["step"], run.rank, world, tensors, {**facts, **s.meta})

    run.writing = run.writer.submit(write)


def saved_slots(parts: Sequence[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The carries of all processes, by global slot id."""
    slots: dict[int, dict[str, Tensor]] = {}
    for part in parts:
        for key in (k for k in part if k.startswith("slot.")):
            _, slot, field = key.split(".")
            slots.setdefault(int(slot), {})[field] = part[key]
    return slots


def take_up(s: Setup, state: State, source: Path, forked: bool, rank: int, world: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Go on from the newest whole state of a run folder, in place. Raises UserError where that would not be the same run."""
    manifest, parts, skipped = checkpoint.load_state(source)
    for reason in skipped:
        say({"skipped": reason})
    if manifest is None:
        raise UserError(f"--resume: {source} holds no whole state; skipped: {'; '.join(skipped) or 'nothing'}")
    check_same(manifest["config"], s.meta["config"], forked)
    for key, name in (("data", "training set"), ("dtype", "compute dtype")):
        if manifest[key] != s.meta[key]:
            raise UserError(f"--resume: the {name} is {s.meta[key]}, that of {source} is {manifest[key]}")
    state.facts = {k: manifest.get(k, v) for k, v in state.facts.items()}
    yardstick = ("on", "weights", "act_steps", "best")
    if forked or any(manifest["config"]["eval"].get(k) != s.meta["config"]["eval"][k] for k in yardstick):
        state.facts |= {"best": None, "waited": 0}  # the best weights stay in the folder that is forked, or were measured otherwise
    state.facts["ended"] = ""
    with torch.no_grad():
        for k, p in s.params.items():
            p.copy_(parts[0][f"params.{k}"])
            state.ema[k].copy_(parts[0][f"ema.{k}"])
    was = optimizers(msgspec.convert(manifest["config"]["optimizer"], OptimizerConfig), s.params)  # grouped as they were saved
    load_optimizers(was, parts[0])
    for old, new in zip(was, state.opts, strict=True):
        new.state.update(old.state)
    slots = saved_slots(parts)
    state.carries = [carry_from(slots, mine, s.device) for mine in s.shards]
    if manifest["config"]["run"]["seed"] != s.meta["config"]["run"]["seed"]:  # its episodes are not those of the carry
        if s.meta["config"]["data"]["symmetries"]:
            raise UserError("--from: run.seed: it decides which symmetry a row of the table is of")
        state.carries = [c._replace(halted=torch.ones_like(c.halted)) for c in state.carries]
    if len(parts) == world:
        state.sums = parts[rank]["sums"].to(s.device)
    elif rank == 0:
        state.sums = torch.stack([p["sums"] for p in parts]).sum(0).to(s.device)


# ---------------------------------------------------------------- all runs of a folder


def is_held(folder: Path) -> bool:
    """Whether a live process has the run."""
    if not fcntl or not (folder / "lock").exists():
        return False
    with open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def described(folder: Path) -> dict[str, Any]:
    """A run: its state, step, best value of what it watches, and seconds since its last row."""
    try:
        about = parsed((folder / "run.json").read_text())
        cfg, guard = about["config"], checkpoint.warned(about)
        saved = checkpoint.manifests(folder)
        facts = parsed(saved[-1].read_text()) if saved else fresh_facts(1.0)
        age = time.time() - (folder / "metrics.jsonl").stat().st_mtime
        state = "running" if is_held(folder) else facts["ended"] or "stopped"
        own = f"{cfg['eval']['on']}/{cfg['eval']['weights'][0]}/own"
        row = {"step": facts["step"], "steps": cfg["train"]["steps"], "best": facts["best"], "watched": f"{own}/{cfg['eval']['best']}"}
        row |= {"guard": guard} if guard else {}
        row |= {"n": facts["last"].get(f"{own}/n")} if cfg["eval"]["best"] == "exact" else {}  # of which the best is a share
        return {"run": str(folder), "state": state, **row, "age_s": round(age)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, msgspec.ValidationError) as e:
        return {"run": str(folder), "state": f"unreadable: {e!r}", "age_s": 0}


def listing(root: Path) -> list[dict[str, Any]]:
    """Every run below a folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return [described(about.parent) for about in sorted(root.rglob("run.json"))]
