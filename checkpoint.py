"""Files: checkpoints, full states, the run folder, and weights that training starts from.

A checkpoint (best, last) is what users share: weights, their average and the digests of the
training pairs; its metadata holds the config and the held-out guard's finding. A state is all that
a run needs to continue bit for bit. Both are whole or absent: written aside, synced, renamed, with
a checksum.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import InitConfig, ModelConfig, UserError
from .data import parsed
from .encoders import init_params
from .etrm import Params, leaves, rebuild
from .optim import matched
from .sources import Finding

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
SHIPPED = Path(__file__).parent / "checkpoints"
LONGEST = 1000  # cycles and ACT steps that a checkpoint may ask for

# ---------------------------------------------------------------- writing

# Network mounts and Windows cannot sync a folder; the file in it was synced all the same.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


def sync(path: Path) -> None:
    """Let the content of a file, or the names in a folder, survive a loss of power."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        if not folder or e.errno not in NO_FOLDER_SYNC:
            raise


def commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Write aside, sync, rename: a reader sees the old file or the new one, whole. Links are
    followed; a device or a pipe is written to directly. Raises UserError where that fails."""
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.writing")
    try:
        if path.exists() and not path.is_file():
            write(path)
            return
        aside.touch()
        mode = aside.stat().st_mode  # as the umask has it; safetensors creates its files 0600
        write(aside)
        aside.chmod(mode)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        with contextlib.suppress(OSError):
            aside.unlink()
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be written: {reason}") from None


def write_text(path: Path, text: str) -> None:
    """As `commit`, of a text in UTF-8."""
    commit(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host that share no memory with each other or with the originals."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def digest_of(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of a text."""
    h = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        h.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        h.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors that share no memory, and their metadata, so that `read` gives both back."""
    text = json.dumps({"format": FORMAT, **meta})
    about = {"etrm": text, "sha256": digest_of(tensors, text)}
    commit(path, lambda aside: save_file(tensors, aside, metadata=about))


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(safetensors file, metadata, its text). Raises UserError when absent, cut or not ours."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            if "etrm" not in raw:
                raise UserError(f"{path}: a safetensors file, but not a checkpoint of ETRM")
            meta = parsed(raw["etrm"])
            if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                kind = meta.get("format") if isinstance(meta, dict) else None
                raise UserError(f"{path}: format {kind}, this version reads {FORMAT}")
            yield file, meta, raw["etrm"]
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: {unreadable(path) or f'truncated or damaged: {e}'}") from None


def unreadable(path: Path) -> str:
    """What a file is that is no safetensors file, where its first bytes say so."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(2) in (b"PK", b"\x80\x02"):  # torch.save: a zip archive, or a bare pickle
            return "a state dict of PyTorch, not a checkpoint of ETRM; init_from.path can read it"
    return ""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) that `save` wrote. Raises UserError unless the file is ours and whole."""
    with opened(path) as (file, meta, text):
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
        if digest_of(tensors, text) != file.metadata().get("sha256"):
            raise UserError(f"{path}: differs from its checksum")
        return tensors, meta


class About(msgspec.Struct):
    """What the metadata of a checkpoint must hold."""

    config: dict[str, Any]
    step: int
    tasks: int
    data: str  # content hash of the training set
    dtype: str
    finding: Finding
    score: dict[str, Any]


class Checkpoint(NamedTuple):
    path: Path
    params: Params
    ema: Params
    model: ModelConfig
    meta: dict[str, Any]  # see About
    pairs: Tensor  # (N, 16) uint8 digests of its training pairs, and of those it started from


class WithoutDraws(TorchFunctionMode):
    """Lets factories ignore their random generator, so that they work on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "generator"})


def shapes_of(cfg: ModelConfig, tensors: int) -> Params:
    """The tree of parameters, on no device. Raises UserError on more layers than tensors."""
    layers = max(cfg.layers, cfg.encoder.layers, cfg.encoder.set_layers)
    if layers > max(tensors, 2) or max(cfg.H_cycles, cfg.L_cycles, cfg.halt_max_steps) > LONGEST:
        raise UserError("a model of that depth is not in this file")
    with torch.device("meta"), WithoutDraws():
        return init_params(cfg, 0)


def same_shape(shape: Iterable[int], like: Tensor) -> bool:
    """Whether the shapes agree; a table without rows agrees with any number of rows."""
    shape = tuple(shape)
    rows = like.ndim > 0 and len(like) == 0 and shape[:1] + like.shape[1:] == shape
    return shape == like.shape or rows


def find(path: str | Path) -> Path:
    """The checkpoint of a file, a run folder (its best, else its last) or a shipped one's name."""
    shipped = SHIPPED / f"{path}.safetensors"
    path = shipped if not Path(path).exists() and shipped.is_file() else Path(path)
    if not path.is_dir():
        return path
    files = [p for p in (path / "best.safetensors", path / "last.safetensors") if p.is_file()]
    if not files:
        raise UserError(f"{path}: holds neither best.safetensors nor last.safetensors")
    return files[0]


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run folder. A lean one has a single set of weights.

    Shapes are compared with the config before anything of that size is allocated."""
    file = find(path)
    with opened(file) as (header, meta, _):
        try:
            msgspec.convert(meta, About)
            model = msgspec.convert(meta["config"]["model"], ModelConfig)
            shapes = {k: tuple(header.get_slice(k).get_shape()) for k in header.keys()}  # noqa: SIM118
            like = shapes_of(model, len(shapes))
        except (UserError, ValueError, KeyError, TypeError, msgspec.ValidationError) as e:
            raise UserError(f"{file}: its metadata cannot be read: {e}") from None
    lean = not any(k.startswith("ema.") for k in shapes)
    trees = ("params",) if lean else ("params", "ema")
    expected = {f"{tree}.{k}": x for tree in trees for k, x in leaves(like).items()}
    pairs_shape = shapes.pop("pairs", ())
    if len(pairs_shape) != 2 or pairs_shape[1] != 16:
        raise UserError(f"{file}: has no digests of its training pairs")
    for name, x in expected.items():
        if name not in shapes:
            raise UserError(f"{file}: {name} is missing")
        if not same_shape(shapes[name], x):
            wanted = tuple(x.shape)
            raise UserError(f"{file}: {name} is of shape {shapes[name]}, must be {wanted}")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise UserError(f"{file}: unknown tensor {unknown[0]}")
    tensors, meta = read(file)
    params, ema = (
        rebuild(like, {k: tensors[f"{tree}.{k}"].float() for k in leaves(like)})
        for tree in (trees[0], trees[-1])
    )
    return Checkpoint(file, params, ema, model, meta, tensors["pairs"].to(torch.uint8))


def warned(meta: dict[str, Any]) -> str:
    """The warning of the guard's finding in the metadata of a run or checkpoint; "" for none."""
    return msgspec.convert(meta["finding"], Finding).warning if meta.get("finding") else ""


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: shapes and numbers of its parameters by module, and its metadata."""
    c = load(path)
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, x in leaves(c.params).items():
        modules.setdefault(name.partition(".")[0], {})[name] = tuple(x.shape)
    sizes = {m: sum(math.prod(shape) for shape in named.values()) for m, named in modules.items()}
    about = {k: c.meta[k] for k in ("step", "data", "tasks", "dtype", "config", "score")}
    finding = str(msgspec.convert(c.meta["finding"], Finding))
    about |= {"checkpoint": str(c.path), "parameters": sum(sizes.values()), "finding": finding}
    return {**about, "sizes": sizes, "modules": modules, "pairs": len(c.pairs)}


# ---------------------------------------------------------------- full states


def states(folder: Path) -> list[Path]:
    """The states of a run folder, oldest first."""
    files = (
        p for p in folder.glob("state-*") if re.fullmatch(r"state-\d{8,}\.safetensors", p.name)
    )
    return sorted(files, key=step_of)


def step_of(state: Path) -> int:
    return int(state.stem.partition("-")[2])


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write the state of facts["step"]; of those before it the last one is kept."""
    save(folder / f"state-{facts['step']:08d}.safetensors", tensors, facts)
    for old in states(folder)[:-2]:
        old.unlink()


class SavedState(NamedTuple):
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    skipped: list[str]  # newer states that are not whole, and why


def load_state(folder: Path) -> SavedState:
    """The newest whole state. Raises UserError where there is none."""
    skipped: list[str] = []
    for path in reversed(states(folder)):
        try:
            tensors, facts = read(path)
            if facts.get("step") != step_of(path):
                raise UserError(f"{path}: is of step {facts.get('step')}")
            return SavedState(facts, tensors, skipped)
        except UserError as e:
            skipped.append(str(e))
    reasons = "; ".join(skipped) or "none at all"
    raise UserError(f"--resume: {folder} holds no whole state: {reasons}")


def newest_facts(folder: Path) -> dict[str, Any]:
    """The facts of the newest state that can be opened; its tensors are not read. {} for none."""
    for path in reversed(states(folder)):
        with contextlib.suppress(UserError), opened(path) as (_, facts, _):
            return facts
    return {}


# ---------------------------------------------------------------- the run folder


def origin() -> dict[str, Any]:
    """Versions, and the git state of the folder in which the command was given."""

    def git(*words: str) -> str | None:
        command = ["git", *words]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10}
        try:
            return str(subprocess.run(command, check=True, **options).stdout).strip()
        except (OSError, subprocess.SubprocessError):
            return None

    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    repository = {"git": head, "git_changes": bool(changes)} if head else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "threads": torch.get_num_threads(), **repository}


class Track(NamedTuple):
    """Where rows of metrics go, beside metrics.jsonl."""

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

    mode = os.environ.get("WANDB_MODE", "offline")
    run = service.init(project="etrm", name=folder.name, dir=str(folder), config=cfg, mode=mode)
    return Track(lambda row: run.log(row, step=row["step"]), run.finish)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Track]] = {
    "": lambda folder, cfg: Track(lambda row: None, lambda: None),
    "tensorboard": tensorboard,
    "wandb": wandb,
}


def rows_of(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows of a metrics file, numbers of the lines that are no row)."""
    rows, broken = [], []
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            try:
                row = parsed(line) if line else {}
                if isinstance(row["step"], int):
                    rows.append(row)
                    continue
            except (ValueError, KeyError, TypeError):
                pass
            if line:
                broken.append(number)
    return rows, broken


def reached(folder: Path) -> int:
    """The step that a run without states has reached; 0 where it may have ended before any."""
    steps = [row["step"] for row in rows_of(folder / "metrics.jsonl")[0]]
    every = 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        every = int(parsed((folder / "run.json").read_text())["config"]["train"]["save_every"])
    with contextlib.suppress(UserError), opened(folder / "last.safetensors") as (_, meta, _):
        steps.append(int(meta.get("step", 0)) + every)  # its state follows at once
    last = max(steps, default=0)
    return last if last > 2 * every else 0  # a state is written while training goes on


class Run:
    """A run folder held by one group of processes: its lock, its metrics, what ends it early."""

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
        begun = bool(states(folder))
        if not begun and (step := reached(folder)):
            raise UserError(f"run.dir: {folder} was at step {step}, but its states are gone")
        if begun and not resume:
            raise UserError(f"run.dir: {folder} holds a run already: --resume, or another run.dir")
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def begin(self, step: int, about: dict[str, Any], track: str) -> list[str]:
        """Drop what was written after `step`; in words, what is lost of the metrics up to it."""
        for aside in self.folder.glob(".*.writing"):
            aside.unlink()
        for state in states(self.folder):
            if step_of(state) > step:
                state.unlink()
        log = self.folder / "metrics.jsonl"
        lost = [f"{log}: is missing"] if step and not log.exists() else []
        rows, broken = rows_of(log)
        if broken and step:
            lost.append(f"{log}: line {', '.join(map(str, broken[:5]))}: no row of metrics")
        text = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        write_text(log, text)
        write_text(self.folder / "run.json", json.dumps({**about, **origin()}, indent=1))
        self.log = open(log, "a", encoding="utf-8")  # noqa: SIM115
        try:
            self.track = TRACKERS[track](self.folder, about["config"])
        except ImportError:
            raise UserError(f"run.track: the package {track} is not installed") from None
        return lost

    def write(self, row: dict[str, Any]) -> None:
        """One row of metrics; a number that is not finite is null there."""
        try:
            self.log.write(json.dumps(finite(row)) + "\n")
            self.log.flush()
        except OSError as e:
            raise UserError(f"{self.folder}/metrics.jsonl: {e.strerror}") from None
        self.track.row(row)

    def wait(self) -> None:
        """Until what was given to the writer is on disk; its error is raised here."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def __enter__(self) -> Run:
        def ask(signum: int, frame: Any) -> None:
            self.stop = signal.Signals(signum).name

        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        self.handlers = {s: signal.signal(s, ask) for s in signals}
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.shutdown()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        for name in ("track", "log", "lock"):
            if file := getattr(self, name, None):
                file.close()


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with null in the place of NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


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
        about, facts = parsed((folder / "run.json").read_text()), newest_facts(folder)
        cfg, guard = about["config"], warned(about)
        age = time.time() - (folder / "metrics.jsonl").stat().st_mtime
        return {
            "run": str(folder),
            "state": "running" if is_held(folder) else facts.get("ended") or "stopped",
            "step": facts.get("step", 0),
            "steps": cfg["train"]["steps"],
            "best": facts.get("best"),
            "watched": f"{cfg['eval']['on']}/{cfg['eval']['weights'][0]}/own/loss",
            **({"guard": guard} if guard else {}),
            "age_s": round(age),
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        return {"run": str(folder), "state": f"unreadable: {e!r}", "age_s": 0}


def listing(root: Path) -> list[dict[str, Any]]:
    """Every run below a folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return [described(about.parent) for about in sorted(root.rglob("run.json"))]


# ---------------------------------------------------------------- names of the published code

CORE = {
    "embed": "embed_tokens.embedding_weight", "head": "lm_head.weight", "q_weight": "q_head.weight",
    "q_bias": "q_head.bias", "H_init": "H_init", "L_init": "L_init",
}  # fmt: skip
LAYER = {
    "qkv": "self_attn.qkv_proj.weight", "o": "self_attn.o_proj.weight",
    "gate_up": "mlp.gate_up_proj.weight", "down": "mlp.down_proj.weight",
    "scale_1": "gamma_1", "scale_2": "gamma_2",
}  # fmt: skip
SET = {**LAYER, **{k: f"{k}_proj.weight" for k in "qkvo"}}
ENCODER = {
    "input_embed": "grid_encoder.input_embed.embedding_weight",
    "output_embed": "grid_encoder.output_embed.embedding_weight",
    "pool_proj": "grid_encoder.pool_proj.weight", "class_embed": "grid_encoder.cls_token",
    "row_embed": "grid_encoder.pos_row_embed.weight",
    "column_embed": "grid_encoder.pos_col_embed.weight",
    "side_embed": "grid_encoder.channel_embed.weight", "queries": "set_encoder.query_tokens",
    "up": "output_proj.weight", "up_bias": "decode_proj.bias",
    "latent.mean": "mu_proj.weight", "latent.mean_bias": "mu_proj.bias",
    "latent.log_var": "logvar_proj.weight", "latent.log_var_bias": "logvar_proj.bias",
}  # fmt: skip
POOL = ("pool_query", *(f"pool_{k}_proj.weight" for k in "qkvo"))
PUBLISHED = (
    "standard", "variational", "lpn_standard", "lpn_variational", "hybrid_standard",
    "hybrid_variational", "recurrent", "trm_style",
)  # fmt: skip


def published_names(path: str, cfg: ModelConfig) -> tuple[str, ...]:
    """The names of one leaf of ours in a published checkpoint; several are stacked in ours."""
    kind, (module, *rest) = cfg.encoder.kind, path.split(".")
    first, last, number = rest[0], rest[-1], rest[1] if len(rest) > 2 else ""
    if module == "core":
        if first == "blocks":
            return (f"inner.L_level.layers.{number}.{LAYER[last]}",) if last in LAYER else ()
        return (f"inner.{CORE[first]}",) if first in CORE else ()
    if first == "table":
        return ("inner.puzzle_emb.weights",)
    if kind not in PUBLISHED:
        return ()
    if first == "start":
        levels = ("z_e_init",) if kind == "recurrent" else ("z_e_H_init", "z_e_L_init")
        return tuple(f"encoder.{k}" for k in levels)
    if first == "cells":
        wrapped = not kind.startswith(("lpn", "hybrid"))
        layer = LAYER[last] if wrapped else LAYER[last].removeprefix("self_attn.")
        name = f"grid_encoder.layers.{number}.{layer}"
    elif first == "level":
        name = f"L_level.layers.{number}.{LAYER[last]}"
    elif first == "sets" and kind == "recurrent":
        name = f"cross_attn.{SET[last]}" if last in "qkvo" else SET[last]
    elif first == "sets":
        name = f"set_encoder.layers.{number}.{SET[last]}"
    elif first == "pool" and cfg.encoder.pooling == "weighted":
        name = "grid_encoder.pool_weight_proj.weight"
    elif first == "pool":
        name = f"grid_encoder.{POOL[int(last)]}"
    elif first == "up" and kind in ("variational", "hybrid_variational"):
        name = "decode_proj.weight"
    else:
        name = ENCODER.get(".".join(rest), "")
    return (f"encoder.{name}",) if name else ()


def read_published(path: Path) -> dict[str, Tensor]:
    """A bare state dict with names inner.* and encoder.*, whatever wrapped the model.

    Nothing in the file is executed. Raises UserError on anything but a dict of dense real tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # of many kinds, for a file may hold anything
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise UserError(f"{path}: no state dict: {reason}") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: no bare state dict of names and tensors")
    for name, x in state.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise UserError(f"{path}: no bare state dict of names and tensors")
        dense = x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested
        if not dense or x.is_quantized or x.is_complex():
            raise UserError(f"{path}: {name[:80]!r} is no dense tensor of real numbers")
    plain = {re.sub(r"^((_orig_mod|module|model)\.)+", "", k): v for k, v in state.items()}
    owner = "encoder." if any(k.startswith("grid_encoder.") for k in plain) else "inner."
    return {k if k.startswith(("inner.", "encoder.")) else owner + k: v for k, v in plain.items()}


def joined(
    state: dict[str, Tensor], like: dict[str, Tensor], cfg: ModelConfig
) -> tuple[dict[str, Tensor], set[str]]:
    """(leaves of ours, float32, as far as a published state dict has them; names they took)."""
    taken, used = {}, set[str]()
    for path, leaf in like.items():
        names = published_names(path, cfg)
        if names and all(k in state for k in names):
            x = torch.stack([state[k] for k in names]) if len(names) > 1 else state[names[0]]
            x = x.reshape(leaf.shape) if x.numel() == leaf.numel() else x
            taken[path] = x.detach().float()
            used |= set(names)
    return taken, used


# ---------------------------------------------------------------- what training starts from


class Source(NamedTuple):
    """A checkpoint of ours or a published one, as training starts from it."""

    path: Path
    tensors: dict[str, Tensor]  # leaves of ours by path
    unused: list[str]  # names in the file that are no leaf of the model
    meaning: dict[str, Any]  # see `meaning`, as far as the file says it
    started: str  # what is known of held-out tasks in its training; "" where it was held out
    pairs: Tensor  # (N, 16) digests of its training pairs


class Start(NamedTuple):
    params: dict[str, Tensor]  # the leaves that are taken
    text: str  # what was taken, skipped and missing
    started: str  # for the finding
    pairs: Tensor  # (N, 16)


def meaning(cfg: ModelConfig) -> dict[str, Any]:
    """What no tensor says: under another value the same weights are another model."""
    core = {k: getattr(cfg, k) for k in ("H_cycles", "L_cycles", "heads", "layers", "positions")}
    free = {"kl_weight", "cached", "width", "latent"}
    free |= set() if cfg.encoder.kind == "trm_style" else {"H_cycles", "L_cycles"}
    encoder = msgspec.structs.asdict(cfg.encoder)
    return core | {f"encoder.{k}": v for k, v in encoder.items() if k not in free}


def source_of(path: str | Path, cfg: ModelConfig, like: dict[str, Tensor]) -> Source:
    """A checkpoint of ours (the average of its weights) or a published one (any other suffix)."""
    file = find(path)
    if not file.exists():
        raise UserError(f"init_from.path: {path}: no such checkpoint; an empty path: from scratch")
    if file.suffix == ".safetensors":
        c = load(file)
        tensors, finding = leaves(c.ema), msgspec.convert(c.meta["finding"], Finding)
        demos = f"{file.name}: trained on DEMOS of held-out tasks" if finding.admitted else ""
        unused = [k for k in tensors if k not in like]
        return Source(file, tensors, unused, meaning(c.model), finding.started or demos, c.pairs)
    state, beside = read_published(file), file.with_name("all_config.yaml")
    text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
    fields = re.findall(r"^\s*(H_cycles|L_cycles|num_heads|L_layers): *(\d{1,9})\b", text, re.M)
    ours = {"num_heads": "heads", "L_layers": "layers"}
    tensors, used = joined(state, like, cfg)
    unused = [k for k in state if k not in used]
    about = "published, unknown what it was trained on"
    if "inner.puzzle_emb.weights" in state:
        about = "a published table, trained on demos of evaluation tasks: NOT strictly held out"
    started = f"{file.name}: {about}"
    known = {ours.get(k, k): int(v) for k, v in fields}
    return Source(file, tensors, unused, known, started, torch.zeros(0, 16, dtype=torch.uint8))


def other_meaning(source: Source, cfg: ModelConfig, taken: Iterable[str]) -> str:
    """What the checkpoint says otherwise of the modules that are taken; "" where nothing.

    Another kind of encoder shares no more than tables of embeddings with ours."""
    ours, modules = meaning(cfg), {k.split(".")[0] for k in taken}
    if source.meaning.get("encoder.kind") != cfg.encoder.kind:
        modules -= {"encoder"}
    if "core" in modules and not {"H_cycles", "L_cycles"} <= source.meaning.keys():
        return f"does not say its cycles, the model has {(cfg.H_cycles, cfg.L_cycles)}"
    other = [
        f"{k} = {source.meaning[k]}, the model {value}"
        for k, value in ours.items()
        if ("encoder" if "." in k else "core") in modules and source.meaning.get(k, value) != value
    ]
    return f"has {', '.join(other)}" if other else ""


def grouped(paths: Iterable[str]) -> str:
    """core.embed, core.blocks (8), ..."""
    counts = collections.Counter(".".join(p.split(".")[:2]) for p in paths)
    return ", ".join(k if n == 1 else f"{k} ({n})" for k, n in counts.items()) or "nothing"


def start(init: InitConfig, cfg: ModelConfig, like: dict[str, Tensor]) -> Start:
    """The leaves of a checkpoint that match a pattern; rows of a table only for the same tasks.

    Raises UserError on other cycles, heads, depths or sizes, unless init.force."""
    source = source_of(init.path, cfg, like)
    skipped = dict.fromkeys(source.unused, "no such parameter here")
    wanted = {path for pattern in init.take for path in matched("init_from.take", pattern, like)}
    rows, keys = source.tensors.get("encoder.keys"), like.get("encoder.keys")
    same_rows = rows is not None and keys is not None and torch.equal(rows, keys)
    taken: dict[str, Tensor] = {}
    for path, x in source.tensors.items():
        if path in skipped:
            continue
        if path in ("encoder.table", "encoder.keys") and not same_rows:
            skipped[path] = "rows of another training set's tasks"
        elif path not in wanted:
            skipped[path] = "init_from.take leaves it out"
        elif x.shape == like[path].shape:
            taken[path] = x
        elif init.force:
            skipped[path] = f"{tuple(x.shape)}, here {tuple(like[path].shape)}"
        else:
            sizes = f"{tuple(x.shape)} in {source.path}, {tuple(like[path].shape)} here"
            raise UserError(f"init_from: {path} is {sizes} (init_from.force leaves it out)")
    if not taken:
        names = grouped((*source.tensors, *source.unused))
        raise UserError(f"init_from: nothing of {source.path} is taken; it holds {names}")
    if (other := other_meaning(source, cfg, taken)) and not init.force:
        raise UserError(f"init_from: {source.path} {other}; init_from.force takes it all the same")
    drawn = [k for k in like if k not in taken]
    text = (
        f"init_from {source.path}: taken {grouped(taken)}; skipped {grouped(skipped)}; "
        f"missing, so drawn anew: {grouped(drawn)}"
    )
    return Start(taken, text, source.started, source.pairs)
