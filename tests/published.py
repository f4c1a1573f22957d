"""Trees of ours from state dicts of the published code, for parity tests."""

from etrm_arc.encoders import CellBlock, SetBlock, Standard
from etrm_arc.etrm import Block, Core, ModelConfig


def sub(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def block(sd, p, kind=Block):
    names = [
        p + n
        for n in (
            "self_attn.qkv_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.gate_up_proj.weight",
            "mlp.down_proj.weight",
        )
    ]
    scales = (sd.get(p + "gamma_1"), sd.get(p + "gamma_2")) if kind is CellBlock else ()
    return kind(*(sd[n] for n in names), *scales)


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
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return SetBlock(*(sd[f"{p}{n}.weight"] for n in names), sd.get(p + "gamma_1"), sd.get(p + "gamma_2"))


def standard(sd, sets=1):
    g, s = "grid_encoder.", "set_encoder."
    pool = [g + "pool_query", *(f"{g}pool_{n}_proj.weight" for n in "qkvo")]
    weighted = g + "pool_weight_proj.weight"
    return Standard(
        input_embed=sd[g + "input_embed.embedding_weight"],
        output_embed=sd[g + "output_embed.embedding_weight"],
        cells=tuple(block(sd, f"{g}layers.{i}.", CellBlock) for i in range(2)),
        pool=tuple(sd[n] for n in pool) if pool[0] in sd else ((sd[weighted],) if weighted in sd else ()),
        pool_proj=sd[g + "pool_proj.weight"],
        queries=sd[s + "query_tokens"],
        sets=tuple(set_block(sd, f"{s}layers.{i}.") for i in range(sets)),
    )


def config(**changes):
    base = dict(hidden=64, heads=4, H_cycles=2, L_cycles=2, halt_max_steps=4, exploration=0.5, positions="rope", raster=6)
    return ModelConfig(**{**base, "tied_head": False, "context_scale": "published", "published_halting": True, **changes})
