"""Random tasks and small models, from a torch.Generator alone; the tasks of tests/data/set."""

import json
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import numpy as np
import torch

from etrm_arc import data, encoders, score, sources, train
from etrm_arc.config import DataConfig, EncoderConfig, ModelConfig
from etrm_arc.data import Symmetry, Task
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.etrm import act_loss, act_step, fresh_carry, leaves, tree_map

generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def integer(g: torch.Generator, low: int, high: int) -> int:
    """Both ends included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def grid(g: torch.Generator, low: int = 1, high: int = 6, colours: int = 10) -> np.ndarray:
    size = (integer(g, low, high), integer(g, low, high))
    return torch.randint(0, colours, size, generator=g).to(torch.uint8).numpy()


def pair(g: torch.Generator, low=1, high=6, colours=10) -> tuple[np.ndarray, np.ndarray]:
    return grid(g, low, high, colours), grid(g, low, high, colours)


def task(g: torch.Generator, name: str = "t", low=1, high=6, hidden=False) -> Task:
    """1..5 demos and 1..2 queries; with `hidden` about half of the queries have no output."""
    demos = [pair(g, low, high) for _ in range(integer(g, 1, 5))]
    asked = [pair(g, low, high) for _ in range(integer(g, 1, 2))]
    return Task(name, demos, [(x, None if hidden and integer(g, 0, 1) else y) for x, y in asked])


def tasks(g: torch.Generator, n: int, low=1, high=6, hidden=False) -> list[Task]:
    return [task(g, f"t{i}", low, high, hidden) for i in range(n)]


def symmetry(g: torch.Generator, *shape: int) -> Symmetry:
    """Uniform over the group; a single one or a batch."""
    s = data.draw_symmetry(torch.rand(max(1, *shape, 1), 11, generator=g), True, "all")
    return s if shape else Symmetry(s.dihedral[0], s.colours[0])


def moved(s: Symmetry, pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return data.apply(s, pair[0]), data.apply(s, pair[1])


SLOTS = 5
KINDS = [kind for kind in encoders.kinds() if kind != "table"]
VARIANTS = {
    "standard, attention": {"kind": "standard", "pooling": "attention", "set_layers": 2},
    "standard, max, pre": {"kind": "standard", "pooling": "max", "norm": "pre", "layer_scale": 0.5},
    "standard, weighted": {"kind": "standard", "pooling": "weighted"},
    "matching, wide": {"kind": "matching", "width": 48, "set_layers": 2},
    "lpn_variational, wide": {"kind": "lpn_variational", "width": 16, "latent": 8},
    "recurrent, wide": {"kind": "recurrent", "width": 16, "norm": "pre", "set_layers": 2},
}
# one of each family: what holds for encoders in general is tested on these
SOME = ["standard, attention", "lpn_variational, wide", "hybrid_variational", "hierarchical"]
SOME += ["recurrent, wide", "trm_style", "pointer", "matching, wide"]
RECURRENT = [kind for kind, e in encoders.kinds().items() if e.recur]


def config(encoder="perceiver", **options):
    e = EncoderConfig(**{"layers": 1, **VARIANTS.get(encoder, {"kind": encoder})})
    options = {"loss": "softmax", **options} if encoder == "pointer" else options
    small = dict(hidden=32, heads=2, expansion=1.0, layers=1, H_cycles=2, L_cycles=1)
    return ModelConfig(**{**small, "context_tokens": 4, "halt_max_steps": 4, **options}, encoder=e)


class World:
    """Random parameters and a batch of random tasks on canvases of several sizes."""

    def __init__(self, g, cfg, **options):
        self.cfg, self.encode = cfg, encoder_of(cfg)
        self.params = init_params(cfg, integer(g, 0, 10**6))
        # Some demos and queries small, some large; no output larger than what its task shows.
        some = [task(g, low=high - 1, high=high) for high in (2, 3, 4, 6, 7, 7)]
        self.packed, self.data = data.pack(some), DataConfig(**options)
        self.deck = data.deck(data.queries(self.packed, "leave_one_out", self.data), SLOTS)
        zeros = torch.zeros(SLOTS, dtype=torch.int64)
        self.episodes = data.draw(self.packed, self.deck, self.data, 7, torch.arange(SLOTS), zeros)
        self.batch = self.paint(self.episodes)

    def paint(self, episodes):
        return data.batch(self.packed, episodes, self.cfg.raster)

    def roomy(self, side):
        """The batch, every demo of it on a canvas of that side."""
        e, d = self.episodes, self.batch.demos
        sym = Symmetry(*(x[d.owner] for x in e.symmetry))
        canvas = torch.full((len(d.owner), 2), side)
        shift, pair = e.shift[d.owner, 1 + d.number], e.demos[d.owner, d.number]
        shown = data.paint(self.packed, pair, sym, shift, canvas, self.cfg.raster)
        fields = shown._asdict() | {"cells": (side**2,) * len(pair)}
        fields["by_slot"] = torch.argsort(d.owner.repeat_interleave(side**2), stable=True)
        count = torch.bincount(d.owner, minlength=SLOTS) * side**2
        demos = d._replace(**fields, slot_cells=tuple(count.tolist()))
        return self.batch._replace(demos=demos)

    def context(self, batch=None, params=None):
        """Of slots that begin, the context tokens (T, D), then, if any, those of cells (c, D)."""
        p, batch = (params or self.params).encoder, batch or self.batch
        context, carry = self.encode.read(p, batch), self.start(batch)
        if self.encode.recur:
            context = self.encode.recur(p, context, carry.z_E, carry.halted)
        cells = () if context.cells is None else context.cells.split(batch.cells)
        return [*context.tokens, *cells]

    def trainable(self):
        return tree_map(lambda x: x.clone().requires_grad_(), self.params)

    def start(self, batch=None):
        return fresh_carry(self.cfg, (batch or self.batch).cells, torch.float32)

    def step(self, carry, params=None, batch=None, min_steps=None):
        p, batch = params or self.params, batch or self.batch
        return act_step(p, self.cfg, self.encode, carry, batch, min_steps)

    def noise(self, step):
        lanes, zeros = encoders.latent_of(self.cfg), torch.zeros(SLOTS, dtype=torch.int64)
        most, slots = self.batch.demos.most, torch.arange(SLOTS)
        return None if lanes is None else train.noise(lanes, most, 7, slots, zeros, zeros + step)

    def owner(self, batch=None):
        """(N,) whose token it is."""
        tokens = torch.tensor((batch or self.batch).cells) + self.cfg.context_tokens
        return torch.arange(len(tokens)).repeat_interleave(tokens)

    def running(self, g):
        """A carry in which some slots have halted, some not."""
        fresh = self.start()
        z = torch.randn(2, *fresh.z_H.shape, generator=g)
        steps = torch.randint(1, self.cfg.halt_max_steps, (SLOTS,), generator=g)
        halted = torch.rand(SLOTS, generator=g) < 0.5
        encoder = self.params.encoder
        start = getattr(getattr(encoder, "inner", encoder), "start", None)
        z_E = fresh.z_E if start is None else torch.randn(SLOTS, *start.shape, generator=g)
        zeros = torch.zeros_like(steps)
        return fresh._replace(z_H=z[0], z_L=z[1], steps=steps, halted=halted, n=zeros, z_E=z_E)

    def of(self, slot, result, batch=None):
        """One slot's logits, q and KL, and its states."""
        (carry, out), batch = result, batch or self.batch
        token = self.owner(batch) == slot
        kl = () if out.kl is None else (out.kl[slot],)
        states = carry.z_H[token], carry.z_L[token], carry.z_E[slot]
        return out.logits.split(batch.cells)[slot], out.q_halt[slot], *kl, *states


def close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert ((x - y).abs() / (1 + y.abs())).max() <= tolerance


def apart(a, b):
    """(1 or 2, B) distance of two contexts, slot by slot: of their tokens and, if any, cells."""
    return torch.stack([(x - y).norm() for x, y in zip(a, b, strict=True)]).view(-1, SLOTS)


def gradients(params):
    return {k: v.grad for k, v in leaves(params).items()}


def total(world, out):
    return act_loss(world.cfg, out, world.batch.labels, world.batch.cells).total


SET = Path(__file__).parent / "data" / "set"


def raw_pair(pair):
    return {"input": pair[0].tolist()} | ({} if pair[1] is None else {"output": pair[1].tolist()})


def raw_task(t):
    return {"train": [raw_pair(p) for p in t.demos], "test": [raw_pair(p) for p in t.queries]}


def write(path, content):
    """The file of that text, or of that value as JSON, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def as_folder(folder, some):
    for t in some:
        write(folder / f"{t.name}.json", raw_task(t))
    return folder


def tasks_of_all():
    return sources.load([str(SET)])


def with_solve(cfg, **fields):
    return msgspec.structs.replace(cfg, solve=msgspec.structs.replace(cfg.solve, **fields))


def told(predictions):
    return [
        (p.task, p.query, [(v.view, v.step, v.q, score.grid_text(v.grid)) for v in p.votes])
        for p in predictions
    ]


def lines(file):
    """What stands in a file of predictions, the clock aside."""
    return told(score.unions(score.read(file)))
