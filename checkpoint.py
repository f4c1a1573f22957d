"""Files: checkpoints, full states, the run folder, and weights that training starts from.

A checkpoint (best, last) is what users share: weights, their average, digests of the training pairs
and, as metadata, the config and the held-out guard's finding. A state is all that a run needs to
continue bit for bit. Both are whole or absent: written aside, synced, renamed, with a checksum.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib
import json
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .config import InitConfig, ModelConfig, SolveConfig, UserError, check_regular
from .data import Task, parsed
from .encoders import init_params
from .etrm import Carry, Params, leaves, rebuild
from .optim import matched
from .sources import Finding, known_pairs, pair_digest, read_json, read_text

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None  # Windows: no locks
FORMAT = 2
SHIPPED = Path(__file__).parent / "checkpoints"
LONGEST = 1000  # cycles and ACT steps that a checkpoint may ask for
Tensors = dict[str, Tensor]

# ---------------------------------------------------------------- writing


def sync(path: Path) -> None:
    """Let the content of a file, or the names in a folder, survive a loss of power."""
    is_folder = path.is_dir()
    with contextlib.suppress(*[OSError] * is_folder):  # network mounts and Windows sync no folders
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Write aside, sync, rename: a reader sees the old file or the new one, whole. Links are
    followed; a device or a pipe is written to directly. Raises UserError where that fails."""
    given = Path(os.path.expanduser(path))
    path = Path(os.path.realpath(given))
    aside = path.with_name(f".{path.name}.writing")
    try:
        if path.is_symlink() or (given.exists() and not given.is_file()):  # a link to itself
            write(given)
            return
        aside.touch()
        mode = aside.stat().st_mode  # as the umask has it; safetensors creates its files 0600
        write(aside)
        aside.chmod(mode)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as e:
        with contextlib.suppress(OSError):
            aside.unlink()
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be written: {reason}") from None


def write_text(path: Path, text: str) -> None:
    """Commit a text in UTF-8."""
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
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(safetensors file, metadata). Raises UserError when absent, unreadable, cut or not ours."""
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.safetensors")))
        raise UserError(f"{path}: no such checkpoint; shipped: {shipped}")
    try:
        with open(path, "rb") as raw:
            if raw.read(2) in (b"PK", b"\x80\x02"):
                raise UserError(f"{path}: written by torch.save: to be imported, as init_from.path")
        with safetensors.safe_open(path, framework="pt") as file:
            meta = parsed((file.metadata() or {}).get("etrm", "null"))
            if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                raise UserError(f"{path}: not a checkpoint of ETRM in format {FORMAT}")
            msgspec.convert(meta, About)
            yield file, meta
    except (safetensors.SafetensorError, ValueError, RuntimeError) as e:
        odd = "metadata" if isinstance(e, msgspec.ValidationError) else "truncated or not ours"
        raise UserError(f"{path}: damaged ({odd}): {e}") from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) that `save` wrote. Raises UserError unless the file is ours and whole."""
    with opened(path) as (file, meta):
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
        if digest_of(tensors, file.metadata()["etrm"]) != file.metadata().get("sha256"):
            raise UserError(f"{path}: differs from its checksum")
        return tensors, meta


class About(msgspec.Struct):
    """What the metadata of a checkpoint or a state must hold."""

    config: dict[str, dict[str, Any]]
    step: int
    tasks: int
    data: str  # content hash of the training set
    dtype: str
    finding: Finding
    score: dict[str, Any]
    best: float | None = None
    ended: str = ""


class Checkpoint(NamedTuple):
    path: Path
    params: Params
    ema: Params
    model: ModelConfig
    meta: dict[str, Any]  # see About
    pairs: Tensor  # (N, 16) uint8 digests of its training pairs, and of those it started from


def shapes_of(cfg: ModelConfig, tensors: int) -> Params:
    """The tree of parameters, without memory. Raises UserError on more layers than tensors."""
    layers = max(cfg.layers, cfg.encoder.layers, cfg.encoder.set_layers)
    cycles = max(cfg.H_cycles, cfg.L_cycles, cfg.halt_max_steps, cfg.encoder.H_cycles)
    if layers > max(tensors, 2) or cycles > LONGEST:
        raise UserError("a model of that depth is not in this file")
    with FakeTensorMode():
        return init_params(cfg, 0)


def find(path: str | Path) -> Path:
    """The checkpoint of a file, a run folder (its best, else its last) or a shipped one's name."""
    shipped = SHIPPED / f"{path}.safetensors"
    path = Path(path).expanduser()
    path = shipped if not path.exists() and shipped.is_file() else path
    if not path.is_dir():
        return path
    best, last = path / "best.safetensors", path / "last.safetensors"
    return best if best.is_file() else last


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run folder. A lean one has a single set of weights.
    Shapes are compared with the config before anything of that size is allocated."""
    file = find(path)
    with opened(file) as (content, meta):
        try:
            model = msgspec.convert(meta["config"]["model"], ModelConfig)
            msgspec.convert(meta["config"].get("solve", {}), SolveConfig)
            shapes = {k: tuple(content.get_slice(k).get_shape()) for k in list(content.keys())}
            like = shapes_of(model, len(shapes))
        except (UserError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file}: its metadata cannot be read: {e}") from None
    trees = ["params", *["ema"] * any(k.startswith("ema.") for k in shapes)]
    expected = {f"{tree}.{k}": x for tree in trees for k, x in leaves(like).items()}
    expected["pairs"] = torch.empty(0, 16)
    if odd := sorted(expected.keys() ^ shapes.keys()):
        raise UserError(f"{file}: {odd[0]} is {'missing' if odd[0] in expected else 'unknown'}")
    for name, x in expected.items():
        shape, wanted = shapes[name], tuple(x.shape)
        if 0 in wanted:  # a table: how many rows it has, the config does not say
            wanted = shape[:1] + wanted[1:]
        if shape != wanted:
            raise UserError(f"{file}: {name} is of shape {shape}, must be {wanted}")
    tensors, meta = read(file)
    params, ema = (
        rebuild(like, {k: tensors[f"{tree}.{k}"].float() for k in leaves(like)})
        for tree in (trees[0], trees[-1])
    )
    return Checkpoint(file, params, ema, model, meta, tensors["pairs"].to(torch.uint8))


def warned(meta: dict[str, Any]) -> str:
    """The warning of the guard's finding in the metadata of a run or checkpoint; "" for none."""
    return msgspec.convert(meta["finding"], Finding).warning


def pair_digests(tasks: Iterable[Task], others: Tensor) -> Tensor:
    """(N, 16) sorted digests of the pairs of tasks whose output is known, joined with (M, 16)."""
    digests = {pair_digest(pair) for task in tasks for pair in known_pairs(task)}
    digests |= {*map(bytes, others.tolist())}
    flat = np.frombuffer(b"".join(sorted(digests)), np.uint8)
    return torch.from_numpy(flat.copy()).view(-1, 16)


# ---------------------------------------------------------------- full states


def states(folder: Path) -> list[Path]:
    """The states of a run folder, oldest first."""
    files = folder.glob("state-*.safetensors")
    return sorted((p for p in files if p.stem[6:].isdecimal()), key=step_of)


def step_of(state: Path) -> int:
    return int(state.stem.partition("-")[2])


def carry_tensors(slots: Iterable[Tensor], carries: Iterable[Carry]) -> dict[str, Tensor]:
    """Copies of carries by global slot id, so that any number of shards can take them up."""
    tensors: dict[str, Tensor] = {}
    for ids, carry in zip(slots, carries, strict=True):
        fields = {k: getattr(carry, k) for k in Carry._fields[:-1]}
        fields |= {k: fields[k].split(carry.tokens) for k in ("z_H", "z_L")}
        for at, slot in enumerate(ids.tolist()):
            tensors |= {f"slot.{slot}.{k}": rows[at] for k, rows in fields.items()}
    return copied(tensors)


def carry_from(tensors: dict[str, Tensor], slots: Tensor, device: torch.device) -> Carry:
    """The carry of a shard from those of its slots."""
    rows = {k: [tensors[f"slot.{i}.{k}"] for i in slots.tolist()] for k in Carry._fields[:-1]}
    fields = {k: torch.cat(x) if k in ("z_H", "z_L") else torch.stack(x) for k, x in rows.items()}
    tokens = tuple(map(len, rows["z_H"]))
    return Carry(**{k: x.to(device) for k, x in fields.items()}, tokens=tokens)


CHANGEABLE = (  # on --resume, all that begins with these
    "run.dir", "run.track", "train.steps", "train.shards", "train.log_every", "train.save_every",
    "optimizer.final_lr", "eval.", "solve.", "fast.",
)  # fmt: skip
SAME = {"data": "training set", "order": "order of the training tasks", "watched": "dev set"}


def check_same(saved: dict[str, Any], meta: dict[str, Any]) -> None:
    """Raises UserError when what decides the course of a run differs from the saved state."""
    for table, fields in meta["config"].items():
        for key, value in fields.items():
            was, name = saved["config"].get(table, {}).get(key), f"{table}.{key}"
            if was != value and not name.startswith(CHANGEABLE):
                raise UserError(f"--resume: {name} is {value}, the run has {was}")
    for key, name in {**SAME, "dtype": "compute dtype"}.items():
        if saved[key] != meta[key]:
            raise UserError(f"--resume: the {name} is {meta[key]}, the run has {saved[key]}")


class SavedState(NamedTuple):
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    skipped: list[str]  # newer states that are not whole, and why


def load_state(folder: Path) -> SavedState:
    """The newest whole state. Raises UserError where there is none."""
    skipped: list[str] = []
    for path in reversed(states(folder)):
        try:
            return SavedState(*read(path), skipped)
        except UserError as e:
            skipped.append(str(e))
    reasons = "; ".join(skipped) or "none at all"
    raise UserError(f"--resume: {folder} holds no whole state: {reasons}")


def newest_facts(folder: Path) -> dict[str, Any]:
    """The facts of the newest state that can be opened; its tensors are not read. {} for none."""
    for path in reversed(states(folder)):
        with contextlib.suppress(UserError), opened(path) as (_, facts):
            return facts
    return {}


# ---------------------------------------------------------------- the run folder


def origin() -> dict[str, Any]:
    """Versions, and the git commit of the working folder, where it has one."""
    about = {"python": platform.python_version(), "torch": torch.__version__}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        about["git"] = run.stdout.strip()
    return {**about, "threads": torch.get_num_threads()}


def rows_of(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows of a metrics file, numbers of the lines that are none), without a cut-off last line."""
    rows, broken = [], []
    text = read_text(path, errors="replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = msgspec.convert(parsed(line), dict[str, int | float | None])
            if not isinstance(row.get("step"), int):
                raise ValueError
            rows.append(row)
        except ValueError:
            broken.append(number)
    return rows, broken


def reached(folder: Path) -> int:
    """The step that a run without states has reached; 0 where it may have ended before any."""
    every, last = 0, max((row["step"] for row in rows_of(folder / "metrics.jsonl")[0]), default=0)
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
        every = int(read_json(folder / "run.json")["config"]["train"]["save_every"])
    return last if last > 2 * every else 0  # a state is written while training goes on


class Run(contextlib.ExitStack):
    """A run folder held by one group of processes: its lock, its metrics, what ends it early."""

    def __init__(self, folder: Path, rank: int, resume: bool) -> None:
        super().__init__()
        self.folder, self.rank, self.stop = folder, rank, ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                check_regular(folder / "lock")
                lock = self.enter_context(open(folder / "lock", "w"))  # noqa: SIM115
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run.dir: {folder} is held by a live process") from None
        except (OSError, ValueError) as e:
            raise UserError(f"run.dir: {folder}: {getattr(e, 'strerror', e)}") from None
        begun = bool(states(folder))
        if not begun and (step := reached(folder)):
            raise UserError(f"run.dir: {folder} was at step {step}, but its states are gone")
        if begun and not resume:
            raise UserError(f"run.dir: {folder} holds a run already: --resume, or another run.dir")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.callback(signal.signal, number, signal.signal(number, self.interrupt))
        self.writer = self.enter_context(ThreadPoolExecutor(1))
        self.writing: Future[None] | None = None

    def interrupt(self, number: int, frame: Any) -> None:
        """Handle a signal: the run ends after this step."""
        self.stop = signal.Signals(number).name

    def begin(self, step: int, rows: int, about: dict[str, Any], track: str) -> list[str]:
        """Drop what was written after `step`; in words, what is lost of the metrics up to it, of
        which there were so many rows."""
        later = (state for state in states(self.folder) if step_of(state) > step)
        for file in (*self.folder.glob(".*.writing"), *later):
            file.unlink()
        log = self.folder / "metrics.jsonl"
        whole, broken = rows_of(log)
        whole, lost = [row for row in whole if row["step"] <= step], []
        if broken and step:
            lost.append(f"{log}: line {', '.join(map(str, broken[:5]))}: no row of metrics")
        if len(whole) < rows:
            lost.append(f"{log}: {rows - len(whole)} of {rows} rows are missing")
        write_text(log, "".join(json.dumps(row) + "\n" for row in whole))
        write_text(self.folder / "run.json", json.dumps({**about, **origin()}, indent=1))
        self.log = self.enter_context(open(log, "ab"))  # noqa: SIM115
        try:
            trackers = importlib.import_module(f"{__package__}.extras.trackers")
            self.track = trackers.TRACKERS[track](self.folder, about["config"])
        except ImportError:
            raise UserError(f"run.track: the package {track} is not installed") from None
        return lost

    def write(self, row: dict[str, Any]) -> None:
        """One row of metrics; a number that is not finite is null there."""
        try:
            self.log.write(msgspec.json.encode(row) + b"\n")
            self.log.flush()
        except OSError as e:
            raise UserError(f"{self.folder}/metrics.jsonl: {e.strerror}") from None
        self.track(row)

    def save(
        self, names: Sequence[str], weights: Tensors, state: Tensors, facts: dict[str, Any]
    ) -> None:
        """Write the weights under these names, then the state, if any, while training continues.
        The state comes last, so that everything it refers to is there already."""

        def write() -> None:
            for name in names:
                save(self.folder / f"{name}.safetensors", weights, facts)
            sync(self.folder / "metrics.jsonl")
            if state:
                file = self.folder / f"state-{facts['step']:08d}.safetensors"
                save(file, weights | state, facts)
                for old in states(self.folder)[:-2]:  # of those before it the last one is kept
                    old.unlink()

        self.writing = self.writer.submit(write)

    def wait(self) -> None:
        """Until what was given to the writer is on disk; its error is raised here."""
        if self.writing:
            self.writing.result()


def is_held(folder: Path) -> bool:
    """Whether a live process has the run."""
    if not fcntl or not (folder / "lock").is_file():
        return False
    with open(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# ---------------------------------------------------------------- what training starts from


class Source(NamedTuple):
    """A checkpoint of ours or a published one, as training starts from it."""

    path: Path
    tensors: dict[str, Tensor]  # by paths of ours; what the model lacks, by names of the file
    meaning: dict[str, Any]  # see `meaning`, as far as the file says it
    started: str  # what is known of held-out tasks in its training; "" where it was held out
    pairs: Tensor  # (N, 16) digests of its training pairs


def meaning(cfg: ModelConfig) -> dict[str, Any]:
    """What no tensor says: under another value the same weights are another model."""
    core = {k: getattr(cfg, k) for k in ("H_cycles", "L_cycles", "heads", "layers", "positions")}
    free = {"kl_weight", "cached", "width", "latent"}
    free |= set() if cfg.encoder.kind in ("trm_style", "recurrent") else {"H_cycles"}
    encoder = msgspec.structs.asdict(cfg.encoder)
    return core | {f"encoder.{k}": v for k, v in encoder.items() if k not in free}


def source_of(path: str, cfg: ModelConfig, like: dict[str, Tensor]) -> Source:
    """A checkpoint of ours (the average of its weights) or a published one (any other suffix)."""
    file = find(path)
    if not file.exists():
        raise UserError(f"init_from.path: {path}: no such checkpoint; train it first")
    if file.suffix != ".safetensors":
        published = importlib.import_module(f"{__package__}.extras.published")
        tensors, stated, started = published.read(file, cfg.encoder.kind, like)
        return Source(file, tensors, stated, started, torch.zeros(0, 16, dtype=torch.uint8))
    c = load(file)
    finding = msgspec.convert(c.meta["finding"], Finding)
    demos = f"{file.name}: trained on DEMOS of held-out tasks" if finding.admitted else ""
    tensors, stated, kind = leaves(c.ema), meaning(c.model), c.model.encoder.kind
    if any(k.startswith(f"encoder.{kind}.") for k in like):  # an encoder that has grown from it
        tensors = {k.replace("encoder.", f"encoder.{kind}.", 1): x for k, x in tensors.items()}
        stated["encoder.kind"] = cfg.encoder.kind
    return Source(file, tensors, stated, finding.started or demos, c.pairs)


def other_meaning(source: Source, cfg: ModelConfig, taken: Iterable[str]) -> str:
    """What the checkpoint says otherwise of the modules that are taken; "" where nothing."""
    ours, modules = meaning(cfg), {k.split(".")[0] for k in taken}
    if source.meaning.get("encoder.kind") != cfg.encoder.kind:
        modules -= {"encoder"}  # another kind shares no more than tables of embeddings
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


def start(init: InitConfig, cfg: ModelConfig, like: dict[str, Tensor]) -> tuple[Source, str]:
    """(source with the leaves that match a pattern; what was taken, skipped and missing). Rows of a
    table only for the same tasks. Other cycles, heads, depths, sizes need init.force."""
    source = source_of(init.path, cfg, like)
    wanted = {path for pattern in init.take for path in matched("init_from.take", pattern, like)}
    keys = [tensors.get("encoder.keys", torch.empty(0)) for tensors in (source.tensors, like)]
    if not (len(keys[0]) and torch.equal(*keys)):  # rows of other tasks
        wanted -= {"encoder.table", "encoder.keys"}
    taken = {k: source.tensors[k] for k in like if k in wanted and k in source.tensors}
    for k, x in list(taken.items()):
        if x.shape != like[k].shape and not init.force:
            sizes = f"{tuple(x.shape)} in {source.path}, {tuple(like[k].shape)} here"
            raise UserError(f"init_from: {k} is {sizes} (init_from.force leaves it out)")
    taken = {k: x for k, x in taken.items() if x.shape == like[k].shape}
    if not taken:
        names = grouped(source.tensors)
        raise UserError(f"init_from: nothing of {source.path} is taken; it holds {names}")
    if not all(bool(x.isfinite().all()) for x in taken.values()):
        raise UserError(f"init_from: {source.path}: its weights are no numbers (NaN): it diverged")
    if (other := other_meaning(source, cfg, taken)) and not init.force:
        raise UserError(f"init_from: {source.path} {other}; init_from.force takes it all the same")
    skipped, drawn = (grouped(k for k in tree if k not in taken) for tree in (source.tensors, like))
    text = f"{source.path}: taken {grouped(taken)}; skipped {skipped}"
    return source._replace(tensors=taken), f"{text}; missing, so drawn anew: {drawn}"
