"""Which change helps an encoder to generalise? python -m benchmarks.screen [--rows base,standard] [--seeds 3] [--dir runs/screen]

Every row is configs/cpu.toml, small (hidden 64, canvases up to 15, what the guard leaves of ARC-AGI-2's training set), with one
change: 100 steps of 64 slots from scratch, then the loss over the dev split's cells with a task's own demos and with another
task's. Runs that ended are not run again, others go on where they were; the table is printed at the end, and at once where
all have ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple
from unittest import mock

import torch

from etrm_arc import checkpoint, config, data, etrm, sources, train
from etrm_arc.config import ModelConfig
from etrm_arc.encoders import ENCODERS, Encoder, Perceiver, apply_matching, init_matching
from etrm_arc.etrm import Batch, Context

SMALL = [
    "model.hidden=64", 'data.train=["arc2:training"]', "data.canvases=[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]", "train.steps=100",
    "train.ema=0.95", "train.save_every=20", "optimizer.warmup=20", "eval.every=100",
]  # fmt: skip


class Row(NamedTuple):
    hypothesis: str
    sets: list[str]
    before: list[str] = []  # of a first half, whose weights the row goes on from


ROWS = {
    "base": Row("start: `matching`", []),
    "fixed-query": Row(
        "the published query, a task's test pair, makes fewer episodes of a task",
        ['data.query="test"'],
    ),
    "published-scale": Row(
        "a context at the published scale drowns the cells", ['model.context_scale="published"']
    ),
    "standard": Row(
        "a pooled vector per demo loses what many tokens keep", ['model.encoder.kind="standard"']
    ),
    "perceiver": Row(
        "the test input must be asked with: without it",
        ['model.encoder.kind="perceiver"', "model.encoder.set_layers=1"],
    ),
    "perceiver-query": Row(
        "and with it as one more demo, through 16 tokens",
        [
            'model.encoder.kind="perceiver"',
            "model.encoder.set_layers=1",
            "model.encoder.query=true",
        ],
    ),
    "concat": Row(
        "input and output one after the other: correspondence must be learned",
        ['model.encoder.kind="concat"'],
    ),
    "one-demo": Row("one demo says little", ["data.max_demos=1"]),
    "two-demos": Row("two demos say most", ["data.max_demos=2"]),
    "demo-subsets": Row("random subsets of the demos are more episodes", ["data.min_demos=1"]),
    "no-dihedral": Row("without D8 there are too few tasks", ["data.dihedral=false"]),
    "colours-fixed": Row(
        "without permuted colours there are too few tasks", ['data.colours="fixed"']
    ),
    "colours-all": Row("black is special: permuted too", ['data.colours="all"']),
    "untied": Row("a free head can say more", ["model.tied_head=false"]),
    "adamw": Row("Muon learns faster than AdamW", ['optimizer.kind="adamw"', "optimizer.lr=1e-3"]),
    "deep": Row("equal time: depth for width", ["model.hidden=48", "model.L_cycles=5"]),
    "wide": Row("equal time: width for depth", ["model.hidden=80", "model.L_cycles=1"]),
    "act": Row(
        "up to four ACT steps an episode",
        ["model.halt_max_steps=4", "model.exploration=0.1", "eval.act_steps=4"],
    ),
    "curriculum": Row(
        "small canvases first: half of the steps up to 8",
        ["optimizer.warmup=5"],
        ["data.canvases=[1,2,3,4,5,6,7,8]"],
    ),
    "arc1": Row("fewer real tasks: ARC-AGI-1 alone", ['data.train=["arc1:training"]']),
    "composed": Row(
        "composed tasks, at half of the steps",
        ['data.train=["arc2:training","composed:6000"]', "data.composed=0.5"],
    ),
    "swapped": Row(
        "every task backwards is a task more", ['data.train=["arc2:training","{dir}/swapped"]']
    ),
    "agree": Row(
        "auxiliary: contexts of all demos and of all but one agree",
        ['model.encoder.kind="agree"', "model.encoder.kl_weight=0.1"],
    ),
    "proposals": Row(
        "what hard attention to the demos proposes is read and corrected", ["model.proposals=true"]
    ),
    "reconstruct": Row("auxiliary: in 0.3 of the episodes a demo is asked for that is shown", []),
}


def agree(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Context:
    """`matching`; what joins the loss as a KL does is the squared distance from the context without the slot's first demo."""
    full, d = apply_matching(p, cfg, batch), batch.demos
    shown = torch.bincount(d.owner, minlength=len(batch.cells))
    gone = (d.place == 0).repeat_interleave(torch.tensor(d.cells), output_size=len(d.inputs))
    less = d._replace(inputs=d.inputs.masked_fill(gone, 0), outputs=d.outputs.masked_fill(gone, 0))
    part = apply_matching(p, cfg, batch._replace(demos=less))
    assert full.cells is not None and part.cells is not None
    tokens = (full.tokens - part.tokens).float().square().mean((1, 2))
    cells = etrm.per_slot(
        (full.cells - part.cells).float().square().mean(-1), batch.cells
    ) / torch.tensor(batch.cells)
    return full._replace(kl=torch.where(shown > 1, tokens + cells, 0.0))


def concat(p: Perceiver, cfg: ModelConfig, batch: Batch) -> Context:
    """`matching` whose demos are their input's cells and then their output's, instead of both in each cell."""
    d = batch.demos
    pieces = torch.arange(len(d.inputs)).split(list(d.cells))
    order = torch.cat([torch.cat((i, i)) for i in pieces])
    first = torch.cat([torch.arange(2 * len(i)) < len(i) for i in pieces])
    cells = tuple(2 * c for c in d.cells)
    slots = d.owner.repeat_interleave(torch.tensor(cells))
    twice = d._replace(
        inputs=torch.where(first, d.inputs[order], 0), outputs=torch.where(first, 0, d.outputs[order]), at=d.at[order],
        borders=d.borders[order], cells=cells, gaps=(1,) * len(cells), by_slot=torch.argsort(slots, stable=True),
        cells_of=tuple(2 * c for c in d.cells_of),
    )  # fmt: skip
    return apply_matching(p, cfg, batch._replace(demos=twice))


ENCODERS["agree"] = Encoder(init_matching, agree, asks=True)
ENCODERS["concat"] = Encoder(init_matching, concat, asks=True)


@contextlib.contextmanager
def asked_for_what_is_shown(share: float) -> Iterator[None]:
    """In this share of the episodes the query is the first of the demos."""
    plain = data.draw

    def draw(
        tasks: data.Tasks,
        d: data.Deck,
        cfg: data.DataConfig,
        seed: int,
        slot: torch.Tensor,
        n: torch.Tensor,
    ) -> data.Episodes:
        e = plain(tasks, d, cfg, seed, slot, n)
        demos, known = (
            e.demos.clone(),
            data.uniform(1, seed, data.EPISODE, slot, n, 9)[:, 0] < share,
        )
        demos[:, 0] = torch.where(known, e.query, demos[:, 0])
        return e._replace(demos=demos)

    with mock.patch.object(data, "draw", draw):
        yield


def swap_tasks(folder: Path, cfg: config.Config) -> None:
    """Input and output swapped in all that the guard leaves to train on; what it set aside or dropped is not among them."""
    (left, _, _), part = sources.prepare(cfg.data), folder.with_name("swapped.part")
    part.mkdir(parents=True, exist_ok=True)
    for task in left:
        pairs = [
            {"input": y.tolist(), "output": x.tolist()}
            for x, y in (*task.demos, *task.queries)
            if y is not None
        ]
        n = len(task.demos)
        (part / f"{task.name}-swapped.json").write_text(
            json.dumps({"train": pairs[:n], "test": pairs[n:]})
        )
    part.rename(folder)


def run(name: str, row: Row, seed: int, root: Path) -> dict[str, float]:
    """The last evaluation of a row's run, which is trained where it has not ended."""
    folder = root / f"{name}-{seed}"

    def trained(sets: list[str], folder: Path) -> None:
        given = [s.replace("{dir}", str(root)) for s in sets]
        cfg = config.load_config("cpu", [*SMALL, *given, f"run.seed={seed}", f"run.dir={folder}"])
        with asked_for_what_is_shown(0.3) if name == "reconstruct" else contextlib.nullcontext():
            train.fit(cfg, resume=bool(checkpoint.manifests(folder)))

    if name == "swapped" and not (root / "swapped").exists():
        swap_tasks(root / "swapped", config.load_config("cpu", SMALL))
    if row.before:
        first = root / f"{name}-{seed}-before"
        trained([*row.before, "train.steps=50", "eval.every=50", "optimizer.final_lr=1.0"], first)
        row = row._replace(
            sets=[*row.sets, "train.steps=50", "eval.every=50", f"init_from.path={first}"]
        )
    trained(row.sets, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss = [r["all/lm_loss"] for r in rows if "all/lm_loss" in r][-1]
    last = next(r for r in reversed(rows) if "dev/ema/own/loss" in r)
    said = {whose: last[f"dev/ema/{whose}/loss"] for whose in ("own", "foreign")}
    return {
        "train": loss,
        **said,
        "cells": 100 * last["dev/ema/own/cell_accuracy"],
        "minutes": last["seconds"] / 60,
    }


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if values[1:] else "")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", default=",".join(ROWS))
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--dir", type=Path, default=Path("runs/screen"))
    args = options.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    found = {
        name: [run(name, ROWS[name], seed, args.dir) for seed in seeds]
        for name in args.rows.split(",")
    }
    print(
        "| hypothesis | row | training loss | loss, own demos | foreign demos | cells, % | minutes |\n|---|---|---|---|---|---|---|"
    )
    for name, runs in found.items():
        said = {
            k: spread([r[k] for r in runs], 1 if k in ("cells", "minutes") else 3) for k in runs[0]
        }
        print(f"| {ROWS[name].hypothesis} | `{name}` | {' | '.join(said.values())} |")


if __name__ == "__main__":
    main()
