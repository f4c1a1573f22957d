"""Trees of ours from state dicts of the published code, for parity tests."""

import torch

from etrm_arc.config import ModelConfig
from etrm_arc.encoders import CellBlock, Latent, SetBlock, Standard
from etrm_arc.etrm import Block, Core


def sub(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def block(sd, p, kind=Block):
    names = ["qkv_proj", "o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    if f"{p}mlp.fc1.weight" in sd:
        names[2:] = ["mlp.fc1", "mlp.fc2"]
    attention = p if f"{p}qkv_proj.weight" in sd else f"{p}self_attn."
    tensors = [sd[f"{p if n.startswith('mlp') else attention}{n}.weight"] for n in names]
    return kind(
        *tensors, *((sd.get(p + "gamma_1"), sd.get(p + "gamma_2")) if kind is CellBlock else ())
    )


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


def set_block(sd, p):
    """The blocks of a set encoder, or the two halves of the only one of a recurrent encoder."""
    attention = p if p else "cross_attn."
    names = [*(f"{attention}{n}_proj" for n in "qkvo"), f"{p}mlp.gate_up_proj", f"{p}mlp.down_proj"]
    return SetBlock(
        *(sd[f"{n}.weight"] for n in names), sd.get(p + "gamma_1"), sd.get(p + "gamma_2")
    )


def latent(sd):
    return Latent(*(sd.get(f"{n}_proj.{k}") for n in ("mu", "logvar") for k in ("weight", "bias")))


def either(sd, *names):
    return next((sd[n] for n in names if n in sd), None)


def shaped(x, *shape):
    """Norms of gradients stand in trees of their own and have no shape."""
    return x if x is None or x.ndim == 0 else x.reshape(shape)


def standard(sd, sets=1):
    """Any published encoder."""
    g, s = "grid_encoder.", "set_encoder."
    pool = [g + "pool_query", *(f"{g}pool_{n}_proj.weight" for n in "qkvo")]
    weighted = g + "pool_weight_proj.weight"
    blocks = (
        [f"{s}layers.{i}." for i in range(sets)]
        if f"{s}query_tokens" in sd
        else [""] * ("cross_attn.q_proj.weight" in sd)
    )
    start = [sd[n] for n in ("z_e_init", "z_e_H_init", "z_e_L_init") if n in sd]
    level = (
        [f"L_level.layers.{i}." for i in range(2)]
        if "L_level.layers.0.mlp.down_proj.weight" in sd
        else []
    )
    return Standard(
        input_embed=either(sd, g + "input_embed.embedding_weight", g + "color_embed.weight"),
        output_embed=sd.get(g + "output_embed.embedding_weight"),
        cells=tuple(block(sd, f"{g}layers.{i}.", CellBlock) for i in range(2)),
        pool=tuple(sd[n] for n in pool)
        if pool[0] in sd
        else ((sd[weighted],) if weighted in sd else ()),
        pool_proj=sd.get(g + "pool_proj.weight"),
        queries=sd.get(s + "query_tokens"),
        sets=tuple(set_block(sd, b) for b in blocks),
        class_embed=shaped(sd.get(g + "cls_token"), 1, -1),
        latent=latent(sd) if "mu_proj.weight" in sd else None,
        up=either(sd, "decode_proj.weight", "output_proj.weight"),
        up_bias=sd.get("decode_proj.bias"),
        start=torch.stack(start) if start else None,
        level=tuple(block(sd, b, CellBlock) for b in level),
    )


def config(**changes):
    base = dict(
        hidden=64,
        heads=4,
        H_cycles=2,
        L_cycles=2,
        halt_max_steps=4,
        exploration=0.5,
        positions="rope",
        raster=6,
    )
    return ModelConfig(
        **{
            **base,
            "tied_head": False,
            "published": True,
            "published_faults": True,
            **changes,
        }
    )
