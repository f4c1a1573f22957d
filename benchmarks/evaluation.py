"""How many views a second are answered, and what each saving brings.

    python -m benchmarks.evaluation [--checkpoint RUN] [--data SOURCE] [--views 8] [--json FILE]

The ladder, one saving after the other, on the same queries and weights: the published layout
(every grid 900 tokens, every task ten demos, read anew in each ACT step), true tokens, demos read
once, views that leave when the halting head says so. Without a checkpoint the model is an untrained
one of the published sizes (hidden 128, 4 heads, H 3, L 4, `standard` encoder, 16 ACT steps), whose
halting head says nothing. Of a trained one also: the share of views that leave with that answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from etrm_arc import config, data, encoders, etrm, optim, solve, sources, train

from . import throughput

LADDER = ("published layout", "true tokens", "demos read once", "sure views leave")


def model_of(checkpoint: str, act_steps: int) -> tuple[etrm.Params, config.Config, config.Config]:
    """(weights, config, the same in the published layout)."""
    if checkpoint:
        solver = solve.opened(checkpoint)
        params, cfg = solver.params, solver.cfg
        wide = msgspec.structs.replace(cfg.data, max_side=30, canvas=30)
        padded = msgspec.structs.replace(cfg, data=wide)
    else:
        shape = {k: v for k, v in throughput.LAYOUT.items() if k.startswith("model__")}
        shape.pop("model__published_faults", None)
        cfg, padded = throughput.recipe([], **shape), throughput.recipe([], **throughput.LAYOUT)
        params = encoders.init_params(cfg.model, 0)
    steps = act_steps or cfg.model.halt_max_steps
    cfg, padded = (
        msgspec.structs.replace(c, model=msgspec.structs.replace(c.model, halt_max_steps=steps))
        for c in (cfg, padded)
    )
    return params, cfg, padded


def batches(
    params: etrm.Params, cfg: config.Config, tasks: Sequence[data.Task], views: int, limit: int
) -> list[solve.Posed]:
    """Every query of the tasks under so many views each, as `etrm eval` asks them; limit 0: all."""
    questions = solve.questions_of(params, cfg, tasks, views)
    rows = torch.nonzero(questions.queries.canvas[:, 0]).flatten().tolist()
    units = [(r, v) for r in rows for v in range(views)]
    units = units[:: max(1, len(units) // limit)][:limit] if limit else units
    each = data.chosen(questions.queries, torch.tensor([r for r, _ in units]))
    parts = train.portions(each, cfg.model)
    return [solve.pose(questions, cfg, [units[i] for i in part.tolist()]) for part in parts]


def read_anew(
    params: etrm.Params,
    cfg: config.Config,
    encode: etrm.Encode,
    batch: data.Batch,
    dtype: torch.dtype,
) -> None:
    """The published loop: demos are read in each ACT step, and no view leaves."""
    with torch.no_grad():
        carry = etrm.fresh_carry(cfg.model, batch.cells, dtype)
        for _ in range(cfg.model.halt_max_steps):
            carry, _ = etrm.act_step(params, cfg.model, encode, carry, batch, None)
            carry = carry._replace(halted=torch.zeros_like(carry.halted))


def median_rate(
    posed: Sequence[solve.Posed], run: Callable[[data.Batch], Any], repeats: int
) -> float:
    """Views/s, the median of the repeats."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for p in posed:
            run(p.batch)
        seconds.append(time.perf_counter() - begun)
    return sum(len(p.batch.cells) for p in posed) / statistics.median(seconds)


def measured(
    checkpoint: str, tasks: Sequence[data.Task], views: int, act_steps: int, dtype: str, limit: int,
    padded_views: int, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Views/s of each rung of the ladder; padded_views: of the published layout, 0: without it."""
    params, cfg, padded = model_of(checkpoint, act_steps)
    kind = optim.dtype_of(dtype, torch.device("cpu"))
    optim.keep_pages(kind)
    cast, encode = etrm.tree_map(lambda x: x.to(kind), params), encoders.encoder_of(cfg.model)
    steps, posed = cfg.model.halt_max_steps, batches(params, cfg, tasks, views, limit)

    def think(batch: data.Batch, leave: str = "never") -> tuple[etrm.Output, torch.Tensor]:
        return etrm.think(cast, cfg.model, encode, batch, kind, steps, leave)

    rates = {}
    if padded_views:
        with throughput.published_layout():
            few = batches(params, padded, tasks, 1, padded_views)
            late = train.rebuild(params, {k: v.to(kind) for k, v in etrm.leaves(params).items()})
            reader = encoders.encoder_of(padded.model)
            rates[LADDER[0]] = median_rate(
                few, lambda b: read_anew(late, padded, reader, b, kind), repeats
            )
    rates[LADDER[1]] = median_rate(posed, lambda b: read_anew(cast, cfg, encode, b, kind), repeats)
    rates[LADDER[2]] = median_rate(posed, think, repeats)
    if not checkpoint:
        return {"views_per_s": rates}
    rates[LADDER[3]] = median_rate(posed, lambda b: think(b, "q"), repeats)
    same, spent = [], []
    for p in posed:
        (full, _), (early, steps_taken) = think(p.batch), think(p.batch, "q")
        pairs = zip(
            full.logits.split(p.batch.cells), early.logits.split(p.batch.cells), strict=True
        )
        same += [bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs]
        spent += steps_taken.tolist()
    left = {"agree": statistics.mean(same), "act_steps": statistics.mean(spent), "views": len(same)}
    return {"views_per_s": rates, "leaving": left}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--checkpoint", default="", help="a trained one: its own model")
    options.add_argument("--data", default="arc1:dev")
    options.add_argument("--views", type=int, default=8)
    options.add_argument("--act-steps", type=int, default=0, help="default: those of the model")
    options.add_argument("--limit", type=int, default=64, help="views that are timed; 0: all")
    options.add_argument("--padded", type=int, default=4, help="views in the published layout")
    options.add_argument("--dtype", choices=throughput.DTYPES, action="append")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path)
    a = options.parse_args()
    tasks, results = sources.load([a.data], hide=True), {}
    for dtype in a.dtype or throughput.DTYPES:
        results[dtype] = measured(
            a.checkpoint, tasks, a.views, a.act_steps, dtype, a.limit, a.padded, a.repeats
        )
        rates, before = results[dtype]["views_per_s"], 0.0
        for name, rate in rates.items():
            factor = f" ({rate / before:.2f} times the one above)" if before else ""
            print(f"{dtype}, {name}: {rate:.3g} views/s{factor}", flush=True)
            before = rate
        if leaving := results[dtype].get("leaving"):
            print(f"{dtype}, {LADDER[3]}: {leaving}")
    if a.json:
        a.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
