"""Trees of ours from state dicts of the published code, for parity tests."""

import torch

from etrm_arc.config import ModelConfig
from etrm_arc.encoders import CellBlock, SetBlock
from etrm_arc.etrm import Block, Core
from etrm_arc.extras.encoders import Latent, Standard


def sub(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def block(sd, p):
    attention = p if f"{p}qkv_proj.weight" in sd else f"{p}self_attn."
    names = (
        f"{attention}qkv_proj",
        f"{attention}o_proj",
        f"{p}mlp.gate_up_proj",
        f"{p}mlp.down_proj",
    )
    return Block(*(sd[f"{n}.weight"] for n in names))


def cell_block(sd, p):
    return CellBlock(*block(sd, p), sd.get(p + "gamma_1"), sd.get(p + "gamma_2"))


def set_block(sd, p):
    """A block of a set encoder, or the two halves of the only one of a recurrent encoder."""
    attention = p if p else "cross_attn."
    names = [*(f"{attention}{n}_proj" for n in "qkvo"), f"{p}mlp.gate_up_proj", f"{p}mlp.down_proj"]
    tensors = [sd[f"{n}.weight"] for n in names]
    return SetBlock(*tensors, sd.get(p + "gamma_1"), sd.get(p + "gamma_2"))


def core(sd):
    return Core(
        embed=sd["embed_tokens.embedding_weight"],
        blocks=tuple(block(sd, f"L_level.layers.{i}.") for i in range(2)),
        head=sd["lm_head.weight"],
        q_weight=sd["q_head.weight"],
        q_bias=sd["q_head.bias"],
        H_init=sd["H_init"],
        L_init=sd["L_init"],
        context_gain=None,
        position=None,
    )


def standard(sd, sets=1):
    """Any published encoder; also the norms of its gradients, which have no shape."""
    g, s = "grid_encoder.", "set_encoder."
    pool = [g + "pool_query", *(f"{g}pool_{n}_proj.weight" for n in "qkvo")]
    pool = pool if pool[0] in sd else [g + "pool_weight_proj.weight"]
    blocks = [f"{s}layers.{i}." for i in range(sets)] if f"{s}query_tokens" in sd else []
    blocks += [""] * ("cross_attn.q_proj.weight" in sd)
    level = [f"L_level.layers.{i}." for i in range(2)]
    level = level if f"{level[0]}mlp.down_proj.weight" in sd else []
    latent = [f"{n}_proj.{k}" for n in ("mu", "logvar") for k in ("weight", "bias")]
    start = [sd[n] for n in ("z_e_init", "z_e_H_init", "z_e_L_init") if n in sd]
    token = sd.get(g + "cls_token")
    return Standard(
        input_embed=sd.get(g + "input_embed.embedding_weight"),
        output_embed=sd.get(g + "output_embed.embedding_weight"),
        cells=tuple(cell_block(sd, f"{g}layers.{i}.") for i in range(2)),
        pool=tuple(sd[n] for n in pool if n in sd),
        pool_proj=sd.get(g + "pool_proj.weight"),
        queries=sd.get(s + "query_tokens"),
        sets=tuple(set_block(sd, b) for b in blocks),
        class_embed=token if token is None or token.ndim == 0 else token.reshape(1, -1),
        latent=Latent(*map(sd.get, latent)) if latent[0] in sd else None,
        up=sd.get("decode_proj.weight", sd.get("output_proj.weight")),
        up_bias=sd.get("decode_proj.bias"),
        start=torch.stack(start) if start else None,
        level=tuple(cell_block(sd, b) for b in level),
    )


def config(**changes):
    base = dict(hidden=64, heads=4, H_cycles=2, L_cycles=2, halt_max_steps=4, exploration=0.5)
    base |= dict(positions="rope", raster=6, tied_head=False, published=True, published_faults=True)
    return ModelConfig(**{**base, **changes})
