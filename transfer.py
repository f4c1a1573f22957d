"""Weights from elsewhere: published checkpoints and ours to start from, and either format written from the other.

A published checkpoint is a bare state dict; ours name the same tensors by their place in the tree of parameters.
"""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint
from .config import Config, InitConfig
from .data import UserError
from .encoders import init_params
from .etrm import ModelConfig, leaves, rebuild
from .optim import matched
from .sources import Finding

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
SET = {**{k: f"{k}_proj.weight" for k in "qkvo"}, **{k: LAYER[k] for k in ("gate_up", "down", "scale_1", "scale_2")}}
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
        found = CORE.get(first, "") if first != "blocks" else f"L_level.layers.{n}.{LAYER[last]}" if last in LAYER else ""
        return (f"inner.{found}",) if found else ()
    if first == "table":
        return ("inner.puzzle_emb.weights",)
    if first == "start":
        return tuple(f"encoder.{k}" for k in (("z_e_init",) if kind == "recurrent" else ("z_e_H_init", "z_e_L_init")))
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
        names = ("pool_weight_proj.weight",) if pooling == "weighted" else ("pool_query", *(f"pool_{k}_proj.weight" for k in "qkvo"))
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


def joined(sd: dict[str, Tensor], like: dict[str, Tensor], cfg: ModelConfig) -> tuple[dict[str, Tensor], set[str]]:
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
            found["encoder.out"] = torch.eye(cfg.hidden, width)  # they go to the core's width at once
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
            x = torch.einsum("hw,twl->thl", params["encoder.out"], x.unflatten(0, (cfg.context_tokens, -1))).flatten(0, 1)
        if not names and path != "encoder.keys" and bool((x != 0).any()):
            raise UserError(f"{path}: has no place in a published checkpoint (encoder {cfg.encoder.kind}, {cfg.context_scale} scale)")
        if path.endswith("class_embed"):
            x = x[None]
        if path.endswith("_init") and torch.equal(x.bfloat16().float(), x):
            x = x.bfloat16()  # as published
        sd |= zip(names, x.unbind(0) if len(names) > 1 else (x[0] if path.endswith("start") else x,), strict=False)
    if "core.head" not in params and "core.embed" in params:
        sd["inner.lm_head.weight"] = params["core.embed"].clone()
    return sd


# ---------------------------------------------------------------- files


class Found(NamedTuple):
    """A checkpoint of either kind."""

    path: Path
    tensors: dict[str, Tensor]  # leaves of ours by path, or a stripped state dict
    ours: checkpoint.Checkpoint | None
    says: dict[str, Any]  # as `meaning`, as far as it says so


def read_published(path: Path) -> dict[str, Tensor]:
    """A bare state dict, its names stripped. Raises UserError on anything else; nothing in it is executed."""
    try:
        sd = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as e:
        raise UserError(f"{path}: no state dict: {str(e).splitlines()[0] if str(e) else e!r}") from None
    if not isinstance(sd, dict) or not sd or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in sd.items()):
        raise UserError(f"{path}: no bare state dict of names and tensors")
    return stripped(sd)


def read(path: str | Path, weights: str = "ema") -> Found:
    """A checkpoint, ours (.safetensors, a run folder, hf:...) or published (any other file)."""
    file = checkpoint.find(path)
    if file.suffix == ".safetensors" or not file.is_file():
        c = checkpoint.load(file)
        return Found(file, leaves(c.ema if weights == "ema" else c.params), c, meaning(c.model))
    beside = file.with_name("all_config.yaml")
    text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
    said = re.findall(r"^\s*(H_cycles|L_cycles|num_heads|L_layers): *(\d+)", text, re.M)
    return Found(file, read_published(file), None, {{"num_heads": "heads", "L_layers": "layers"}.get(k, k): int(v) for k, v in said})


def meaning(cfg: ModelConfig) -> dict[str, Any]:
    """What no tensor says: under another value the same weights are another model."""
    e = cfg.encoder
    core = {k: getattr(cfg, k) for k in ("H_cycles", "L_cycles", "heads", "layers", "positions")}
    same = ("kind", "layers", "set_layers", "pooling", "norm", "qk_norm", "attend_padding", "query", "difference", "published")
    encoder = {k: getattr(e, k) for k in same} | {"heads": e.heads or cfg.heads}
    encoder |= {"H_cycles": e.H_cycles, "L_cycles": e.L_cycles} if e.kind == "trm_style" else {}
    return core | {f"encoder.{k}": v for k, v in encoder.items()}


def other_meaning(found: Found, cfg: ModelConfig, taken: Iterable[str]) -> str:
    """In words, what the checkpoint says otherwise of the modules that are taken; "" where nothing.

    Another kind of encoder shares no more than tables of embeddings with ours."""
    here, modules = meaning(cfg), {k.split(".")[0] for k in taken}
    modules -= {"encoder"} if found.says.get("encoder.kind") != here["encoder.kind"] else set()
    other = [k for k in here if k in found.says and found.says[k] != here[k] and ("encoder" if "." in k else "core") in modules]
    return f"has {', '.join(f'{k} = {found.says[k]}, the model {here[k]}' for k in other)}" if other else ""


def history(found: Found) -> tuple[dict[str, Any], str]:
    """(what the guard must know of a checkpoint that one starts from, the same in words; none where it was held out)."""
    if found.ours:
        meta = found.ours.meta
        before = msgspec.convert(meta["finding"], Finding)
        words = before.started or (f"{found.path.name}: trained on DEMOS of held-out tasks" if before.admitted else "")
        return {k: meta.get(k, []) for k in ("config", "data", "ancestors")}, words
    if "inner.puzzle_emb.weights" in found.tensors:
        return {"held_out": False}, f"{found.path.name}: a published table, trained on demos of evaluation tasks: NOT strictly held out"
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
    rows = torch.equal(tensors.get("encoder.keys", torch.zeros(0)), like.get("encoder.keys", torch.ones(0, 3)))
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
            raise UserError(f"init_from: {path} is {tuple(x.shape)} in {found.path}, {tuple(like[path].shape)} here (init_from.force)")
    if not taken:
        raise UserError(f"init_from: nothing of {found.path} is taken; it holds {grouped(found.tensors)}")
    other = other_meaning(found, cfg, taken)
    if any(k.startswith("core.") for k in taken) and not {"H_cycles", "L_cycles"} <= found.says.keys():
        other = f"does not say its cycles, the model has {(cfg.H_cycles, cfg.L_cycles)}"
    if other and not init.force:
        raise UserError(f"init_from: {found.path} {other}; init_from.force takes it all the same")
    missing = [k for k in like if k not in taken]
    text = f"init_from {found.path}: taken {grouped(taken)}; skipped {grouped(skipped)}; missing, so drawn anew: {grouped(missing)}"
    return Start(taken, text, *history(found))


# ---------------------------------------------------------------- converting


def convert(source: str | Path, target: Path, cfg: Config | None = None, weights: str = "ema") -> str:
    """Write a published checkpoint as one of ours (to .safetensors, with the config of its model) or one of ours as a
    published one; no bit of a weight changes on the way there and back. One of ours to .safetensors becomes lean, to be
    shared: one set of weights, rounded to bfloat16. Returns what was done."""
    found = read(source, weights)
    if found.ours:
        if target.suffix == ".safetensors":
            meta = {k: v for k, v in found.ours.meta.items() if k != "format"}
            checkpoint.save(target, {f"params.{k}": v if k == "encoder.keys" else v.bfloat16() for k, v in found.tensors.items()}, meta)
            return f"{target}: {weights} weights of {found.path} in bfloat16, {target.stat().st_size / 1e6:.1f} MB"
        sd = {f"_orig_mod.model.{k}": v.contiguous() for k, v in split(found.tensors, found.ours.model).items()}
        checkpoint.commit(target, lambda aside: torch.save(sd, aside))
        return f"{target}: {len(sd)} tensors, {weights} weights of {found.path}"
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: {found.path} is a published checkpoint already; ours end in .safetensors")
    if cfg is None:
        raise UserError(f"{found.path}: a state dict does not say heads and cycles: name the config of its model with --config")
    like = leaves(init_params(cfg.model, 0))
    tensors, used = joined(found.tensors, like, cfg.model)
    if cfg.model.encoder.kind == "table":
        tensors["encoder.keys"] = like["encoder.keys"]
    zero = {k: v for k, v in like.items() if k not in tensors and not published_names(k, cfg.model) and not v.any()}
    for k, want in like.items():
        got = {**zero, **tensors}.get(k)
        if got is None or not checkpoint.same_shape(got, want):
            raise UserError(
                f"{found.path}: {k} is {'missing' if got is None else tuple(got.shape)}, the config wants {tuple(want.shape)}"
            )
    if other := other_meaning(found, cfg.model, tensors):
        raise UserError(f"{found.path} {other}")
    ancestor, words = history(found)
    meta = {"config": msgspec.to_builtins(cfg), "step": 0, "data": "", "tasks": 0, "ancestors": [ancestor]}
    meta |= {"finding": msgspec.to_builtins(Finding("unknown", started=words)), "dtype": "torch.float32", "score": {}}
    whole = leaves(rebuild(init_params(cfg.model, 0), {**zero, **tensors}))
    own = {f"{w}.{k}": v.clone() for w in ("params", "ema") for k, v in whole.items()}
    checkpoint.save(target, own, meta)
    return f"{target}: {len(tensors)} parameters; left out: {grouped(k for k in found.tensors if k not in used)}"
