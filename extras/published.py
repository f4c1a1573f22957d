"""Checkpoints of the published TRM and ETRM: their names, and reading them without running them."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import UserError, check_regular

KINDS = {  # of encoders whose leaves are the published ones
    "standard", "variational", "lpn_standard", "lpn_variational", "hybrid_standard",
    "hybrid_variational", "recurrent", "trm_style",
}  # fmt: skip
NAMES = (  # regex of a published name, ours in its place; applied one after the other
    (r"^inner\.puzzle_emb\.", "encoder.table."),
    (r"^inner\.embed_tokens\.", "core.embed."),
    (r"^inner\.lm_head\.", "core.head."),
    (r"^inner\.q_head\.(weight|bias)", r"core.q_\1"),
    (r"^inner\.L_level\.layers\.", "core.blocks."),
    (r"^inner\.(?=[HL]_init)", "core."),
    (r"^encoder\.L_level\.layers\.", "encoder.level."),
    (r"^encoder\.set_encoder\.layers\.", "encoder.sets."),
    (r"^encoder\.(cross_attn\.|(?=mlp\.|gamma_))", "encoder.sets.0."),  # recurrent: one block
    (r"^encoder\.set_encoder\.query_tokens", "encoder.queries"),
    (r"^encoder\.z_e_([HL]_)?init", "encoder.start"),  # trm_style: both, stacked
    (r"^encoder\.(output|decode)_proj\.", "encoder.up."),
    (r"^encoder\.mu_proj\.", "encoder.latent.mean."),
    (r"^encoder\.logvar_proj\.", "encoder.latent.log_var."),
    (r"\.grid_encoder\.layers\.", ".cells."),
    (r"\.grid_encoder\.cls_token", ".class_embed"),
    (r"\.grid_encoder\.pool_(query|weight_proj)", ".pool.0"),
    *((rf"\.grid_encoder\.pool_{k}_proj\.", f".pool.{i}.") for i, k in enumerate("qkvo", 1)),
    (r"\.grid_encoder\.", "."),  # input_embed, output_embed, pool_proj
    (r"\.(?:self_attn\.)?(qkv|[qkvo])_proj\.", r".\1."),
    (r"\.mlp\.(gate_up|down)_proj\.", r".\1."),
    (r"\.gamma_(?=[12]$)", ".scale_"),
    (r"\.(embedding_)?weights?$", ""),
    (r"\.bias$", "_bias"),
)


class Published(NamedTuple):
    tensors: dict[str, Tensor]  # by paths of ours; what the model lacks, by its published name
    meaning: dict[str, Any]  # the fields of the model that the config beside the file states
    started: str  # what is known of its training tasks


def our_path(name: str) -> str:
    """The path of the leaf of ours that a published tensor is, or is a part of."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def read_state(path: Path) -> dict[str, Tensor]:
    """A bare state dict with names inner.* and encoder.*, whatever wrapped the model.

    Nothing in the file is executed. Raises UserError on anything but a dict of dense real tensors.
    """
    check_regular(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # of many kinds, for a file may hold anything
        raise UserError(f"{path}: no checkpoint ({type(e).__name__})") from None
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


def leaves_of(state: dict[str, Tensor], kind: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves (float32) that a published state dict has of a model with this kind of encoder;
    what the model lacks keeps its name."""
    parts = collections.defaultdict[str, list[Tensor]](list)
    for name in sorted(state):  # H before L, as they are stacked
        ours = our_path(name)
        known = ours in like and (kind in KINDS or ours.startswith(("core.", "encoder.table")))
        parts[ours if known else name].append(state[name].detach().float())
    leaves = {}
    for name, xs in parts.items():
        x = xs[0] if len(xs) == 1 else torch.cat([x.flatten() for x in xs])
        fits = name in like and x.numel() == like[name].numel()
        leaves[name] = x.reshape(like[name].shape) if fits else x
    return leaves


def read(path: Path, kind: str, like: dict[str, Tensor]) -> Published:
    """A published checkpoint, as far as it fits a model of ours."""
    state = read_state(path)
    beside = path.with_name("all_config.yaml")
    text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
    fields = re.findall(r"^\s*(H_cycles|L_cycles|num_heads|L_layers): *(\d{1,9})\b", text, re.M)
    ours_of = {"num_heads": "heads", "L_layers": "layers"}
    about = "published, unknown what it was trained on"
    if "inner.puzzle_emb.weights" in state:
        about = "a published table, trained on demos of evaluation tasks: NOT strictly held out"
    meaning = {ours_of.get(k, k): int(v) for k, v in fields}
    return Published(leaves_of(state, kind, like), meaning, f"{path.name}: {about}")
