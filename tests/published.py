"""Trees of ours from state dicts of the published code, for parity tests."""

from etrm_arc.config import ModelConfig
from etrm_arc.encoders import init_params
from etrm_arc.etrm import leaves, rebuild
from etrm_arc.extras.published import leaves_of, our_path


def sub(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def by_path(tensors, module=""):
    """Tensors by our paths instead of published names within a module, "inner." or "encoder."."""
    return {our_path(module + k): v for k, v in tensors.items()}


def tree(sd, cfg):
    """Parameters of ours with the tensors of a state dict, whose names begin with the module."""
    like = init_params(cfg, 0)
    return rebuild(like, {**leaves(like), **leaves_of(sd, cfg.encoder.kind, leaves(like))})


def core(sd):
    return tree({f"inner.{k}": v for k, v in sd.items()}, config()).core


def encoder(sd, cfg):
    return tree({f"encoder.{k}": v for k, v in sd.items()}, cfg).encoder


def config(**changes):
    base = dict(hidden=64, heads=4, H_cycles=2, L_cycles=2, halt_max_steps=4, exploration=0.5)
    base |= dict(positions="rope", raster=6, tied_head=False, published=True, published_faults=True)
    return ModelConfig(**{**base, **changes})
