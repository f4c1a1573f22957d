"""Our format: one safetensors file of weights, EMA, config, data hash and the guard's finding; beside it, the full
state of a run, from which it goes on as if it had never stopped."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .config import Config, InitConfig, ModelConfig, OptimizerConfig, UserError
from .data import parsed
from .encoders import init_params
from .etrm import Carry, Params, leaves, rebuild
from .optim import load_optimizers, matched, optimizer_tensors, optimizers
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
    """Write aside, sync, rename: a reader sees the old file or the new one, whole. Links are
    followed; a device or pipe is written as it is. Raises UserError on a full disk."""
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.writing")
    try:
        if target.exists() and not target.is_file():
            write(target)
            return
        write(aside)
        sync(aside)
        aside.replace(target)
        sync(target.parent)
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
    return x.shape == like.shape or (
        like.ndim > 0 and len(like) == 0 and x.shape[1:] == like.shape[1:]
    )


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
                is_ = (
                    "missing"
                    if got is None
                    else f"of shape {tuple(got.shape)}, must be {tuple(want.shape)}"
                )
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
    made = {
        "checkpoint": str(c.path),
        "parameters": sum(sizes.values()),
        "sizes": sizes,
        "modules": modules,
    }
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


def save_state(
    folder: Path, step: int, rank: int, world: int, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
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
            raise UserError(
                f"{folder}: {missing[0]} is not there: all processes must share run.dir"
            )
        time.sleep(0.05)
    files = {p.name: digest(p) for p in parts}
    said = {**meta, "step": step, "files": files}
    write_text(folder / f"state-{step:08d}.json", json.dumps({**said, "sha256": signed(said)}))
    for old in manifests(folder)[:-2]:
        drop(old)


def signed(said: dict[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps({k: v for k, v in said.items() if k != "sha256"}, sort_keys=True).encode()
    ).hexdigest()


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(f.read()).hexdigest()
        )


def load_state(folder: Path) -> tuple[dict[str, Any] | None, list[dict[str, Tensor]], list[str]]:
    """(manifest, tensors of each rank, what was skipped and why) of the newest whole state; None where there is none."""
    skipped: list[str] = []
    for path in reversed(manifests(folder)):
        try:
            manifest = parsed(path.read_text())
            if (
                signed(manifest) != manifest["sha256"]
                or path.stem != f"state-{manifest['step']:08d}"
            ):
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


# ---------------------------------------------------------------- transfer


# ---------------------------------------------------------------- names

CORE = {
    "embed": "embed_tokens.embedding_weight", "head": "lm_head.weight", "q_weight": "q_head.weight", "q_bias": "q_head.bias",
    "H_init": "H_init", "L_init": "L_init",
}  # fmt: skip
LAYER = {
    "qkv": "self_attn.qkv_proj.weight", "o": "self_attn.o_proj.weight", "gate_up": "mlp.gate_up_proj.weight",
    "down": "mlp.down_proj.weight", "scale_1": "gamma_1", "scale_2": "gamma_2",
    "mix_gate_up": "mlp_t.gate_up_proj.weight", "mix_down": "mlp_t.down_proj.weight",
}  # fmt: skip
SET = {
    **{k: f"{k}_proj.weight" for k in "qkvo"},
    **{k: LAYER[k] for k in ("gate_up", "down", "scale_1", "scale_2")},
}
ENCODER = {
    "input_embed": "grid_encoder.input_embed.embedding_weight", "output_embed": "grid_encoder.output_embed.embedding_weight",
    "pool_proj": "grid_encoder.pool_proj.weight", "queries": "set_encoder.query_tokens", "class_embed": "grid_encoder.cls_token",
    "row_embed": "grid_encoder.pos_row_embed.weight", "column_embed": "grid_encoder.pos_col_embed.weight",
    "side_embed": "grid_encoder.channel_embed.weight", "up": "output_proj.weight", "up_bias": "decode_proj.bias",
    "latent.mean": "mu_proj.weight", "latent.mean_bias": "mu_proj.bias", "latent.log_var": "logvar_proj.weight",
    "latent.log_var_bias": "logvar_proj.bias",
}  # fmt: skip
PAPER = ("lpn", "lpn_var")


def published_names(path: str, cfg: ModelConfig) -> tuple[str, ...]:
    """What the published code calls a leaf of ours; several where ours holds them one above the other; () where it has none."""
    kind, pooling = cfg.encoder.kind, cfg.encoder.pooling
    module, *rest = path.replace("encoder.own.", "encoder.").split(".")
    first, last, n = rest[0], rest[-1], rest[1] if len(rest) > 2 else ""
    found = ""
    if module == "core":
        found = (
            CORE.get(first, "")
            if first != "blocks"
            else f"L_level.layers.{n}.{LAYER[last]}"
            if last in LAYER
            else ""
        )
        return (f"inner.{found}",) if found else ()
    if first == "table":
        return ("inner.puzzle_emb.weights",)
    if first == "start":
        return tuple(
            f"encoder.{k}"
            for k in (("z_e_init",) if kind == "recurrent" else ("z_e_H_init", "z_e_L_init"))
        )
    if first == "cells":
        name = LAYER[last].removeprefix("self_attn." if kind.startswith(("lpn", "hybrid")) else "")
        if kind in PAPER:
            name = {"gate_up": "mlp.fc1.weight", "down": "mlp.fc2.weight"}.get(last, name)
        found = f"grid_encoder.layers.{n}.{name}"
    elif first == "level":
        found = f"L_level.layers.{n}.{LAYER[last]}"
    elif first == "sets" and kind == "recurrent":
        found = f"cross_attn.{SET[last]}" if last in "qkvo" else SET[last]
    elif first == "sets":
        found = f"set_encoder.layers.{n}.{SET[last]}"
    elif first == "pool":
        names = (
            ("pool_weight_proj.weight",)
            if pooling == "weighted"
            else ("pool_query", *(f"pool_{k}_proj.weight" for k in "qkvo"))
        )
        found = f"grid_encoder.{names[int(last)]}"
    elif kind == "lpn_var" and last.endswith("_bias"):
        return ()
    elif first == "up" and kind in ("variational", "hybrid_variational"):
        found = "decode_proj.weight"
    elif first == "input_embed" and kind in PAPER:
        found = "grid_encoder.color_embed.weight"
    else:
        found = ENCODER.get(".".join(rest), "")
    return (f"encoder.{found}",) if found and kind in PUBLISHED else ()


PUBLISHED = (
    "standard", "variational", "lpn_standard", "lpn_variational", "lpn_variational_v2", "hybrid_standard", "hybrid_variational",
    "recurrent", "trm_style", *PAPER,
)  # fmt: skip


def stripped(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as inner.* and encoder.*, whatever wrapped the published model when it was saved."""
    plain = {re.sub(r"^((_orig_mod|module|model)\.)+", "", k): v for k, v in sd.items()}
    owner = "encoder." if any(k.startswith("grid_encoder.") for k in plain) else "inner."
    return {k if k.startswith(("inner.", "encoder.")) else owner + k: v for k, v in plain.items()}


def joined(
    sd: dict[str, Tensor], like: dict[str, Tensor], cfg: ModelConfig
) -> tuple[dict[str, Tensor], set[str]]:
    """Leaves of ours, float32, as far as a stripped state dict has them (of whatever size), and the names that they took."""
    found, used = {}, set[str]()
    for path, want in like.items():
        names = published_names(path, cfg)
        if not names or any(k not in sd for k in names):
            continue
        x = torch.stack([sd[k] for k in names]) if len(names) > 1 else sd[names[0]]
        if path == "encoder.own.up" and len(x) == cfg.context_tokens * cfg.hidden:
            width = len(want) // cfg.context_tokens
            wide = F.pad(x.unflatten(0, (cfg.context_tokens, -1)), (0, 0, 0, width - cfg.hidden))
            found["encoder.out"] = torch.eye(
                cfg.hidden, width
            )  # they go to the core's width at once
            x = wide.flatten(0, 1)
        found[path] = (x.reshape(want.shape) if x.numel() == want.numel() else x).float()
        used |= set(names)
    return found, used


def split(params: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our leaves under their published names. Raises UserError on one that says something and has no place there."""
    sd: dict[str, Tensor] = {}
    for path, x in params.items():
        names = published_names(path, cfg)
        if path == "encoder.out" and cfg.encoder.kind in PAPER:
            continue
        if path == "encoder.own.up" and "encoder.out" in params:
            x = torch.einsum(
                "hw,twl->thl", params["encoder.out"], x.unflatten(0, (cfg.context_tokens, -1))
            ).flatten(0, 1)
        if not names and path != "encoder.keys" and bool((x != 0).any()):
            raise UserError(
                f"{path}: has no place in a published checkpoint (encoder {cfg.encoder.kind}, published = {cfg.published})"
            )
        if path.endswith("class_embed"):
            x = x[None]
        if path.endswith("_init") and torch.equal(x.bfloat16().float(), x):
            x = x.bfloat16()  # as published
        sd |= zip(
            names,
            x.unbind(0) if len(names) > 1 else (x[0] if path.endswith("start") else x,),
            strict=False,
        )
    if "core.head" not in params and "core.embed" in params:
        sd["inner.lm_head.weight"] = params["core.embed"].clone()
    return sd


# ---------------------------------------------------------------- files


class Found(NamedTuple):
    """A checkpoint of either kind."""

    path: Path
    tensors: dict[str, Tensor]  # leaves of ours by path, or a stripped state dict
    ours: Checkpoint | None
    says: dict[str, Any]  # as `meaning`, as far as it says so


def read_published(path: Path) -> dict[str, Tensor]:
    """A bare state dict, its names stripped. Raises UserError on anything else; nothing in it is executed."""
    try:
        sd = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as e:
        raise UserError(
            f"{path}: no state dict: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from None
    if (
        not isinstance(sd, dict)
        or not sd
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in sd.items())
    ):
        raise UserError(f"{path}: no bare state dict of names and tensors")
    return stripped(sd)


def read(path: str | Path, weights: str = "ema") -> Found:
    """A checkpoint, ours (.safetensors, a run folder, hf:...) or published (any other file)."""
    file = find(path)
    if file.suffix == ".safetensors" or not file.is_file():
        c = load(file)
        return Found(file, leaves(c.ema if weights == "ema" else c.params), c, meaning(c.model))
    beside = file.with_name("all_config.yaml")
    text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
    said = re.findall(r"^\s*(H_cycles|L_cycles|num_heads|L_layers): *(\d+)", text, re.M)
    return Found(
        file,
        read_published(file),
        None,
        {{"num_heads": "heads", "L_layers": "layers"}.get(k, k): int(v) for k, v in said},
    )


def meaning(cfg: ModelConfig) -> dict[str, Any]:
    """What no tensor says: under another value the same weights are another model."""
    e = cfg.encoder
    core = {k: getattr(cfg, k) for k in ("H_cycles", "L_cycles", "heads", "layers", "positions")}
    same = (
        "kind",
        "layers",
        "set_layers",
        "pooling",
        "norm",
    )
    encoder = {k: getattr(e, k) for k in same}
    encoder |= {"H_cycles": e.H_cycles, "L_cycles": e.L_cycles} if e.kind == "trm_style" else {}
    return core | {f"encoder.{k}": v for k, v in encoder.items()}


def other_meaning(found: Found, cfg: ModelConfig, taken: Iterable[str]) -> str:
    """In words, what the checkpoint says otherwise of the modules that are taken; "" where nothing.

    Another kind of encoder shares no more than tables of embeddings with ours."""
    here, modules = meaning(cfg), {k.split(".")[0] for k in taken}
    modules -= {"encoder"} if found.says.get("encoder.kind") != here["encoder.kind"] else set()
    other = [
        k
        for k in here
        if k in found.says
        and found.says[k] != here[k]
        and ("encoder" if "." in k else "core") in modules
    ]
    return (
        f"has {', '.join(f'{k} = {found.says[k]}, the model {here[k]}' for k in other)}"
        if other
        else ""
    )


def history(found: Found) -> tuple[dict[str, Any], str]:
    """(what the guard must know of a checkpoint that one starts from, the same in words; none where it was held out)."""
    if found.ours:
        meta = found.ours.meta
        before = msgspec.convert(meta["finding"], Finding)
        words = before.started or (
            f"{found.path.name}: trained on DEMOS of held-out tasks" if before.admitted else ""
        )
        return {k: meta.get(k, []) for k in ("config", "data", "ancestors")}, words
    if "inner.puzzle_emb.weights" in found.tensors:
        return (
            {"held_out": False},
            f"{found.path.name}: a published table, trained on demos of evaluation tasks: NOT strictly held out",
        )
    return {"held_out": None}, f"{found.path.name}: published, unknown what it was trained on"


# ---------------------------------------------------------------- starting from one


class Start(NamedTuple):
    """What a run starts from."""

    params: dict[str, Tensor]  # leaves taken
    text: str  # what was taken, skipped and missing
    ancestor: dict[str, Any]
    words: str  # for the finding


def grouped(paths: Iterable[str]) -> str:
    """core.embed, core.blocks (8), ..."""
    counts = collections.Counter(".".join(p.split(".")[:2]) for p in paths)
    return ", ".join(k if n == 1 else f"{k} ({n})" for k, n in counts.items()) or "nothing"


def start(init: InitConfig, cfg: ModelConfig, like: dict[str, Tensor]) -> Start:
    """The leaves of a checkpoint that match a pattern. Raises UserError on other cycles, heads, depths or sizes, unless init.force."""
    found = read(init.path, init.weights)
    if found.ours:
        tensors, unused = dict(found.tensors), [k for k in found.tensors if k not in like]
    else:
        tensors, used = joined(found.tensors, like, cfg)
        unused = [k for k in found.tensors if k not in used]
    skipped = dict.fromkeys(unused, "no such parameter here")
    taken: dict[str, Tensor] = {}
    take = {path for pattern in init.take for path in matched("init_from.take", pattern, like)}
    rows = torch.equal(
        tensors.get("encoder.keys", torch.zeros(0)), like.get("encoder.keys", torch.ones(0, 3))
    )
    for path, x in tensors.items():
        if path in skipped:
            continue
        if path in ("encoder.table", "encoder.keys") and not rows:
            skipped[path] = "rows of another training set's tasks"
        elif path not in take:
            skipped[path] = "init_from.take leaves it out"
        elif x.shape == like[path].shape:
            taken[path] = x
        elif init.force:
            skipped[path] = f"{tuple(x.shape)}, here {tuple(like[path].shape)}"
        else:
            raise UserError(
                f"init_from: {path} is {tuple(x.shape)} in {found.path}, {tuple(like[path].shape)} here (init_from.force)"
            )
    if not taken:
        raise UserError(
            f"init_from: nothing of {found.path} is taken; it holds {grouped(found.tensors)}"
        )
    other = other_meaning(found, cfg, taken)
    if (
        any(k.startswith("core.") for k in taken)
        and not {"H_cycles", "L_cycles"} <= found.says.keys()
    ):
        other = f"does not say its cycles, the model has {(cfg.H_cycles, cfg.L_cycles)}"
    if other and not init.force:
        raise UserError(f"init_from: {found.path} {other}; init_from.force takes it all the same")
    missing = [k for k in like if k not in taken]
    text = f"init_from {found.path}: taken {grouped(taken)}; skipped {grouped(skipped)}; missing, so drawn anew: {grouped(missing)}"
    return Start(taken, text, *history(found))


# ---------------------------------------------------------------- converting


def convert(
    source: str | Path, target: Path, cfg: Config | None = None, weights: str = "ema"
) -> str:
    """Write a published checkpoint as one of ours (to .safetensors, with the config of its model) or one of ours as a
    published one; no bit of a weight changes on the way there and back. One of ours to .safetensors becomes lean, to be
    shared: one set of weights, rounded to bfloat16. Returns what was done."""
    found = read(source, weights)
    if found.ours:
        if target.suffix == ".safetensors":
            meta = {k: v for k, v in found.ours.meta.items() if k != "format"}
            save(
                target,
                {
                    f"params.{k}": v if k == "encoder.keys" else v.bfloat16()
                    for k, v in found.tensors.items()
                },
                meta,
            )
            return f"{target}: {weights} weights of {found.path} in bfloat16, {target.stat().st_size / 1e6:.1f} MB"
        sd = {
            f"_orig_mod.model.{k}": v.contiguous()
            for k, v in split(found.tensors, found.ours.model).items()
        }
        commit(target, lambda aside: torch.save(sd, aside))
        return f"{target}: {len(sd)} tensors, {weights} weights of {found.path}"
    if target.suffix != ".safetensors":
        raise UserError(
            f"{target}: {found.path} is a published checkpoint already; ours end in .safetensors"
        )
    if cfg is None:
        raise UserError(
            f"{found.path}: a state dict does not say heads and cycles: name the config of its model with --config"
        )
    like = leaves(init_params(cfg.model, 0))
    tensors, used = joined(found.tensors, like, cfg.model)
    if cfg.model.encoder.kind == "table":
        tensors["encoder.keys"] = like["encoder.keys"]
    zero = {
        k: v
        for k, v in like.items()
        if k not in tensors and not published_names(k, cfg.model) and not v.any()
    }
    for k, want in like.items():
        got = {**zero, **tensors}.get(k)
        if got is None or not same_shape(got, want):
            raise UserError(
                f"{found.path}: {k} is {'missing' if got is None else tuple(got.shape)}, the config wants {tuple(want.shape)}"
            )
    if other := other_meaning(found, cfg.model, tensors):
        raise UserError(f"{found.path} {other}")
    ancestor, words = history(found)
    meta = {
        "config": msgspec.to_builtins(cfg),
        "step": 0,
        "data": "",
        "tasks": 0,
        "ancestors": [ancestor],
    }
    meta |= {
        "finding": msgspec.to_builtins(Finding("unknown", started=words)),
        "dtype": "torch.float32",
        "score": {},
    }
    whole = leaves(rebuild(init_params(cfg.model, 0), {**zero, **tensors}))
    own = {f"{w}.{k}": v.clone() for w in ("params", "ema") for k, v in whole.items()}
    save(target, own, meta)
    return f"{target}: {len(tensors)} parameters; left out: {grouped(k for k in found.tensors if k not in used)}"


# ---------------------------------------------------------------- runs


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
            return subprocess.run(
                ["git", *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    } | ({"git": commit, "git_changes": bool(changes)} if commit else {})


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

    run = service.init(
        project="etrm",
        name=folder.name,
        dir=str(folder),
        config=cfg,
        mode=os.environ.get("WANDB_MODE", "offline"),
    )
    return Track(lambda row: run.log(row, step=row["step"]), run.finish)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Track]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
}


def tracker(kind: str, folder: Path, cfg: dict[str, Any]) -> Track:
    """Raises UserError when its package is not installed."""
    if not kind:
        return Track(lambda row: None, lambda: None)
    try:
        return TRACKERS[kind](folder, cfg)
    except ImportError:
        raise UserError(
            f"run.track: the package {kind} is not installed; metrics.jsonl is always written"
        ) from None


# ---------------------------------------------------------------- the folder


CARRY = Carry._fields[:-1]  # its tensors


def carry_tensors(slots: Tensor, carry: Carry) -> dict[int, dict[str, Tensor]]:
    """The carry slot by slot (global ids), so that any number of shards and processes can take it up."""
    rows = zip(
        carry.z_H.split(carry.tokens),
        carry.z_L.split(carry.tokens),
        carry.steps,
        carry.halted,
        carry.n,
        carry.z_E,
        strict=True,
    )
    return {int(i): dict(zip(CARRY, row, strict=True)) for i, row in zip(slots, rows, strict=True)}


def carry_from(saved: dict[int, dict[str, Tensor]], slots: Tensor, device: torch.device) -> Carry:
    """The carry of a shard from its slots."""
    mine = [saved[int(i)] for i in slots]
    joined = {
        k: (torch.cat if k in ("z_H", "z_L") else torch.stack)([s[k] for s in mine]).to(device)
        for k in CARRY
    }
    return Carry(**joined, tokens=tuple(len(s["z_H"]) for s in mine))


def reached(folder: Path) -> int:
    """The step of the last weights in a run folder, 0 before those that its first state follows at once."""
    try:
        about = parsed((folder / "run.json").read_text())["config"]["train"]
        step = int(inspect(folder / "last.safetensors")["step"])
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
        states = manifests(folder)
        if not states and (step := reached(folder)):
            raise UserError(
                f"run.dir: {folder} holds the weights of step {step}, whose states are gone: choose another --set run.dir=..."
            )
        if not resume and states:
            raise UserError(
                f"run.dir: {folder} holds a run already: go on with --resume, or choose another --set run.dir=..."
            )
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def begin(self, step: int, source: Path, about: dict[str, Any], track: str) -> None:
        """Rank 0: what comes after `step` never was; metrics.jsonl is that of `source` up to it."""
        cut_back(self.folder, step)
        kept = []
        if step and (source / "metrics.jsonl").exists():
            for line in (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                try:
                    if parsed(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # the line being written when the run was killed
        write_text(self.folder / "metrics.jsonl", "".join(kept))
        write_text(self.folder / "run.json", json.dumps({**about, **origin()}, indent=1))
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
        self.before = (
            {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)} if main else {}
        )
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
FORKED: dict[
    str, set[str] | None
] = {  # in a folder of its own, also how it is trained from here on
    "run": None,
    "train": {*(ALWAYS["train"] or ()), "ema"},
    "optimizer": {
        "lr",
        "warmup",
        "final_lr",
        "betas",
        "weight_decay",
        "clip",
        "lr_scale",
        "decay_scale",
        "table_lr",
        "table_decay",
    },
}


def check_same(saved: dict[str, Any], now: dict[str, Any], forked: bool) -> None:
    """Raises UserError when a field that decides the course of a run differs from the one that is gone on from."""
    may = {**ALWAYS, **(FORKED if forked else {})}
    for table, fields in now.items():
        free = may.get(table, set())
        if free is not None:
            for key in fields:
                if key not in free and saved.get(table, {}).get(key) != fields[key]:
                    raise UserError(
                        f"--resume: {table}.{key} is {fields[key]}, the run has {saved.get(table, {}).get(key)}"
                    )


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
    made: dict[str, Any] = {
        "step": 0,
        "best": None,
        "waited": 0,
        "last": {},
        "trained": {},
        "seconds": 0.0,
    }
    return {**made, "scale": scale, "skipped": 0, "ended": ""}


def weights(s: Setup, state: State) -> dict[str, Tensor]:
    return {f"params.{k}": v for k, v in s.params.items()} | {
        f"ema.{k}": v for k, v in state.ema.items()
    }


def state_tensors(s: Setup, state: State, rank: int) -> dict[str, Tensor]:
    """What one process saves: its carries slot by slot; rank 0 also what all processes share."""
    found = {"sums": state.sums}
    for slots, carry in zip(s.shards, state.carries, strict=True):
        for slot, fields in carry_tensors(slots, carry).items():
            found |= {f"slot.{slot}.{k}": v for k, v in fields.items()}
    if rank == 0:
        found |= weights(s, state) | optimizer_tensors(state.opts)
    return found


def save_run(
    run: Run, s: Setup, state: State, world: int, names: Sequence[str], full: bool
) -> None:
    """Weights under these names, then, where `full`, the state: copied here, written while training goes on.

    The state comes last, so that all which it says was reached is there already.
    """
    if not full and (run.rank or not names):
        return
    run.wait()
    tensors = copied(state_tensors(s, state, run.rank) if full else weights(s, state))
    facts, own = (
        {**state.facts},
        {k: v for k, v in tensors.items() if k.startswith(("params.", "ema."))},
    )

    def write() -> None:
        if run.rank == 0:
            for name in names:
                about = {**s.meta, "step": facts["step"], "score": facts["last"]}
                save(run.folder / f"{name}.safetensors", own, about)
            sync(run.folder / "metrics.jsonl")
        if full:
            save_state(run.folder, facts["step"], run.rank, world, tensors, {**facts, **s.meta})

    run.writing = run.writer.submit(write)


def saved_slots(parts: Sequence[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The carries of all processes, by global slot id."""
    slots: dict[int, dict[str, Tensor]] = {}
    for part in parts:
        for key in (k for k in part if k.startswith("slot.")):
            _, slot, field = key.split(".")
            slots.setdefault(int(slot), {})[field] = part[key]
    return slots


def take_up(
    s: Setup,
    state: State,
    source: Path,
    forked: bool,
    rank: int,
    world: int,
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Go on from the newest whole state of a run folder, in place. Raises UserError where that would not be the same run."""
    manifest, parts, skipped = load_state(source)
    for reason in skipped:
        say({"skipped": reason})
    if manifest is None:
        raise UserError(
            f"--resume: {source} holds no whole state; skipped: {'; '.join(skipped) or 'nothing'}"
        )
    check_same(manifest["config"], s.meta["config"], forked)
    for key, name in (("data", "training set"), ("dtype", "compute dtype")):
        if manifest[key] != s.meta[key]:
            raise UserError(
                f"--resume: the {name} is {s.meta[key]}, that of {source} is {manifest[key]}"
            )
    state.facts = {k: manifest.get(k, v) for k, v in state.facts.items()}
    yardstick = ("on", "weights", "act_steps", "best")
    if forked or any(
        manifest["config"]["eval"].get(k) != s.meta["config"]["eval"][k] for k in yardstick
    ):
        state.facts |= {
            "best": None,
            "waited": 0,
        }  # the best weights stay in the folder that is forked, or were measured otherwise
    state.facts["ended"] = ""
    with torch.no_grad():
        for k, p in s.params.items():
            p.copy_(parts[0][f"params.{k}"])
            state.ema[k].copy_(parts[0][f"ema.{k}"])
    was = optimizers(
        msgspec.convert(manifest["config"]["optimizer"], OptimizerConfig), s.params
    )  # grouped as they were saved
    load_optimizers(was, parts[0])
    for old, new in zip(was, state.opts, strict=True):
        new.state.update(old.state)
    slots = saved_slots(parts)
    state.carries = [carry_from(slots, mine, s.device) for mine in s.shards]
    if (
        manifest["config"]["run"]["seed"] != s.meta["config"]["run"]["seed"]
    ):  # its episodes are not those of the carry
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
        cfg, guard = about["config"], warned(about)
        saved = manifests(folder)
        facts = parsed(saved[-1].read_text()) if saved else fresh_facts(1.0)
        age = time.time() - (folder / "metrics.jsonl").stat().st_mtime
        state = "running" if is_held(folder) else facts["ended"] or "stopped"
        own = f"{cfg['eval']['on']}/{cfg['eval']['weights'][0]}/own"
        row = {
            "step": facts["step"],
            "steps": cfg["train"]["steps"],
            "best": facts["best"],
            "watched": f"{own}/{cfg['eval']['best']}",
        }
        row |= {"guard": guard} if guard else {}
        row |= (
            {"n": facts["last"].get(f"{own}/n")} if cfg["eval"]["best"] == "exact" else {}
        )  # of which the best is a share
        return {"run": str(folder), "state": state, **row, "age_s": round(age)}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        msgspec.ValidationError,
    ) as e:
        return {"run": str(folder), "state": f"unreadable: {e!r}", "age_s": 0}


def listing(root: Path) -> list[dict[str, Any]]:
    """Every run below a folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return [described(about.parent) for about in sorted(root.rglob("run.json"))]
