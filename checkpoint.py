"""Our format: one safetensors file of weights, EMA, config, data hash and the guard's finding; beside it, the full
state of a run, from which it goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .data import UserError, parsed
from .encoders import init_params
from .etrm import ModelConfig, Params, leaves, rebuild
from .sources import Finding

FORMAT = 1


class Checkpoint(NamedTuple):
    path: Path
    params: Params
    ema: Params
    model: ModelConfig
    meta: dict[str, Any]  # config, step, data (hash of the training set), finding, score


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the host, each in memory of its own: safetensors refuses shared memory, and training may go on."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def write_file(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """As `commit`, of tensors that share no memory."""
    commit(path, lambda aside: save_file(tensors, aside, metadata=meta))


def write_text(path: Path, text: str) -> None:
    commit(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Written aside, synced, renamed: a reader sees the old file or the new one, whole. Raises UserError on a full disk."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        write(aside)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:  # torch.save: RuntimeError
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written: {getattr(e, 'strerror', None) or e}") from None


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path: Path, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write params.* and ema.* so that `load` reads them back bit for bit. `meta` must hold the config (as a dict)."""
    said = json.dumps({"format": FORMAT, **meta})
    write_file(path, weights, {"etrm": said, "sha256": digest_of(weights, said)})


def digest_of(tensors: dict[str, Tensor], said: str) -> str:
    """Of all that a checkpoint says: names, types, shapes and bytes of its tensors, and its metadata."""
    h = hashlib.sha256(said.encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        h.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        h.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises UserError when the file is missing, truncated or no safetensors file."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: truncated or no safetensors file: {e}") from None


HUB, SHIPPED = "hf:", Path(__file__).parent / "checkpoints"


def fetched(name: str) -> Path:
    """hf:OWNER/NAME/FILE[#SHA256] from the Hugging Face hub, or from its cache where there is no network."""
    place, _, wanted = name.removeprefix(HUB).partition("#")
    try:
        from huggingface_hub import hf_hub_download  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(f"{name}: needs the package huggingface_hub") from None
    parts = place.split("/")
    if len(parts) < 3:
        raise UserError(f"{name}: must look like {HUB}OWNER/NAME/FILE")
    try:
        file = Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as e:  # of many kinds, by way of the network
        raise UserError(f"{name}: cannot be fetched: {str(e).strip().splitlines()[0]}") from None
    if wanted and digest(file) != wanted:
        raise UserError(f"{name}: its checksum is {digest(file)}")
    return file


def find(path: str | Path) -> Path:
    """The checkpoint meant by a file, a run folder (its best, else its last), the name of a shipped one or one on the hub."""
    if str(path).startswith(HUB):
        return fetched(str(path))
    shipped = SHIPPED / f"{path}.safetensors"
    path = shipped if not Path(path).exists() and shipped.is_file() else Path(path)
    if not path.is_dir():
        return path
    found = [p for p in (path / "best.safetensors", path / "last.safetensors") if p.is_file()]
    if not found:
        raise UserError(f"{path}: holds neither best.safetensors nor last.safetensors")
    return found[0]


def same_shape(x: Tensor, like: Tensor) -> bool:
    """Also where `like` has no row: of a table, whose rows a config does not know."""
    return x.shape == like.shape or (like.ndim > 0 and len(like) == 0 and x.shape[1:] == like.shape[1:])


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run folder; a lean one's only weights are its EMA, too. Raises UserError on
    anything that is not ours and whole."""
    file = find(path)
    tensors, raw = read_file(file)
    if "etrm" not in raw:
        raise UserError(f"{file}: a safetensors file, but not a checkpoint of ETRM")
    if digest_of(tensors, raw["etrm"]) != raw.get("sha256"):
        raise UserError(f"{file}: differs from its checksum")
    try:
        meta = parsed(raw["etrm"])
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        model = msgspec.convert(meta["config"]["model"], ModelConfig)
        msgspec.convert(meta["finding"], Finding)
        like = init_params(model, 0)
    except (UserError, ValueError, KeyError, TypeError, msgspec.ValidationError) as e:
        raise UserError(f"{file}: its config cannot be read: {e}") from None
    trees: list[Params] = []
    lean = not any(k.startswith("ema.") for k in tensors)
    for name in ("params",) if lean else ("params", "ema"):
        found: dict[str, Tensor] = {}
        for key, want in leaves(like).items():
            got = tensors.pop(f"{name}.{key}", None)
            if got is None or not same_shape(got, want):
                is_ = "missing" if got is None else f"of shape {tuple(got.shape)}, must be {tuple(want.shape)}"
                raise UserError(f"{file}: {name}.{key} is {is_}")
            found[key] = got.float()
        trees.append(rebuild(like, found))
    if tensors:
        raise UserError(f"{file}: unknown tensor {min(tensors)}")
    return Checkpoint(file, trees[0], trees[-1], model, meta)


def warned(meta: dict[str, Any]) -> str:
    """The warning of the guard's finding in what a run or checkpoint says of itself; "" where there is no finding."""
    return msgspec.convert(meta["finding"], Finding).warning if meta.get("finding") else ""


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds and says of itself: shapes and numbers of its parameters by module, config, data, finding."""
    c = load(path)
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, x in leaves(c.params).items():
        modules.setdefault(name.partition(".")[0], {})[name] = tuple(x.shape)
    sizes = {m: sum(math.prod(shape) for shape in named.values()) for m, named in modules.items()}
    said = {k: c.meta.get(k) for k in ("step", "data", "tasks", "dtype", "config", "score")}
    finding = str(msgspec.convert(c.meta["finding"], Finding))
    made = {"checkpoint": str(c.path), "parameters": sum(sizes.values()), "sizes": sizes, "modules": modules}
    return {**made, **said, "finding": finding}


# ---------------------------------------------------------------- the full state of a run


def manifests(folder: Path) -> list[Path]:
    """Of the states of a run folder, oldest first; none where nothing was saved."""
    return sorted(folder.glob("state-*.json"))


def drop(manifest: Path) -> None:
    manifest.unlink()
    for part in manifest.parent.glob(f"{manifest.stem}-*.safetensors"):
        part.unlink()


def cut_back(folder: Path, step: int) -> None:
    """What was saved after `step`, or left half saved, never was."""
    for aside in folder.glob(".*.writing"):
        aside.unlink()
    for manifest in manifests(folder):
        if int(manifest.stem.split("-")[1]) > step:
            drop(manifest)
    whole = {m.stem for m in manifests(folder)}
    for part in folder.glob("state-*-*.safetensors"):
        if part.name.rpartition("-")[0] not in whole:
            part.unlink()


PATIENCE = 600  # seconds that rank 0 waits for the files of the others


def save_state(folder: Path, step: int, rank: int, world: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Each process writes its file; when all are there, rank 0 commits them by a manifest and drops all but two states.

    A state without its manifest does not exist; one whose files differ from the manifest's checksums is not whole.
    """
    write_file(folder / f"state-{step:08d}-{rank}.safetensors", tensors, {})
    if rank:
        return
    parts = [folder / f"state-{step:08d}-{r}.safetensors" for r in range(world)]
    deadline = time.monotonic() + PATIENCE
    while missing := [p.name for p in parts if not p.is_file()]:
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: {missing[0]} is not there: all processes must share run.dir")
        time.sleep(0.05)
    files = {p.name: digest(p) for p in parts}
    said = {**meta, "step": step, "files": files}
    write_text(folder / f"state-{step:08d}.json", json.dumps({**said, "sha256": signed(said)}))
    for old in manifests(folder)[:-2]:
        drop(old)


def signed(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps({k: v for k, v in said.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()


def load_state(folder: Path) -> tuple[dict[str, Any] | None, list[dict[str, Tensor]], list[str]]:
    """(manifest, tensors of each rank, what was skipped and why) of the newest whole state; None where there is none."""
    skipped: list[str] = []
    for path in reversed(manifests(folder)):
        try:
            manifest = parsed(path.read_text())
            if signed(manifest) != manifest["sha256"] or path.stem != f"state-{manifest['step']:08d}":
                raise UserError("differs from its checksum")
            for name, want in manifest["files"].items():
                if not (folder / name).is_file():
                    raise UserError(f"{name} is missing")
                if digest(folder / name) != want:
                    raise UserError(f"{name} differs from its checksum")
            return manifest, [read_file(folder / name)[0] for name in manifest["files"]], skipped
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            skipped.append(f"{path.name}: {e}")
    return None, [], skipped
