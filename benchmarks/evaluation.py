"""How many views a second are answered, what each saving brings, and whether answers that leave early are the full run's.

    python -m benchmarks.evaluation [--checkpoint RUN] [--data SOURCE] [--views 8] [--act-steps 16] [--json FILE]

The ladder, one saving after the other, on the same queries and weights: the published layout (every grid 900 tokens, every
task ten demos, read anew in each ACT step), true tokens, demos read once, answers that are stable leave. Without a
checkpoint the model is an untrained one of the published sizes (hidden 128, 4 heads, H 3, L 4, its `standard` encoder, 16
ACT steps): good for seconds, not for what leaves when. Agreement wants a trained checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks import throughput
from etrm_arc import config, data, encoders, etrm, score, solve, sources, train

WAYS = {
    "stable 2": ("stable", 2),
    "stable 3": ("stable", 3),
    "stable 4": ("stable", 4),
    "q": ("q", 0),
}
LADDER = ("published layout", "true tokens", "demos read once", "stable answers leave")


def model_of(checkpoint: str, act_steps: int) -> tuple[etrm.Params, config.Config, config.Config]:
    """(weights, config, the same in the published layout)."""
    published = {
        k: v for k, v in throughput.LAYOUT.items() if not checkpoint or k.startswith("data__")
    }
    if checkpoint:
        s = solve.opened(checkpoint)
        params, cfg = s.params, s.cfg
        wide = msgspec.structs.replace(
            cfg.data, **{k.removeprefix("data__"): tuple(v) for k, v in published.items()}
        )
        padded = msgspec.structs.replace(cfg, data=wide)
    else:
        own = {k: v for k, v in published.items() if k.startswith("model__") and "padding" not in k}
        cfg, padded = throughput.recipe([], **own), throughput.recipe([], **published)
        params = encoders.init_params(cfg.model, 0)
    longer = lambda c: msgspec.structs.replace(
        c, model=msgspec.structs.replace(c.model, halt_max_steps=act_steps)
    )  # noqa: E731
    return params, *((longer(cfg), longer(padded)) if act_steps else (cfg, padded))


def batches(
    cfg: config.Config, tasks: Sequence[data.Task], views: int, limit: int = 0
) -> list[tuple[data.Batch, list[list[int]]]]:
    """Every query of the tasks under so many views each, as `etrm eval` asks them, and their canvases; limit: so many."""
    packed = data.pack(tasks)
    asked = data.queries(packed, "test", cfg.data)
    units = [
        (r, v) for r in torch.nonzero(asked.canvas[:, 0]).flatten().tolist() for v in range(views)
    ]
    units = units[:: max(1, len(units) // limit)][:limit] if limit else units
    rows, made = torch.tensor([r for r, _ in units]), []
    for part in train.portions(data.chosen(asked, rows), cfg.model, train.EVAL_TOKENS):
        seen = []
        for r, v in (units[i] for i in part.tolist()):
            t = int(asked.task[r])
            seen.append(
                score.view(
                    tasks[t], int(asked.pair[r] - packed.first[t] - packed.n_demos[t]), v, cfg.data
                )
            )
        symmetry = data.Symmetry(*(torch.stack([s[i] for s, _ in seen]) for i in range(2)))
        turn = symmetry, torch.nn.utils.rnn.pad_sequence([u for _, u in seen], batch_first=True)
        episodes = data.posed(packed, cfg.data, "test", data.chosen(asked, rows[part]), view=turn)
        made.append((data.batch(packed, episodes, cfg.model.raster), episodes.canvas.tolist()))
    return made


def again(
    params: etrm.Params,
    cfg: config.Config,
    encode: etrm.Encode,
    batch: data.Batch,
    dtype: torch.dtype,
) -> None:
    """The published loop: demos are read anew in each ACT step, and no view leaves."""
    with torch.no_grad():
        carry = etrm.fresh_carry(cfg.model, batch.cells, dtype)
        for _ in range(cfg.model.halt_max_steps):
            carry, _ = etrm.act_step(params, cfg.model, encode, carry, batch, None)
            carry = carry._replace(halted=torch.zeros_like(carry.halted))


def rates(
    checkpoint: str,
    tasks: Sequence[data.Task],
    views: int,
    act_steps: int,
    dtype: str,
    limit: int,
    slow: int,
    repeats: int,
) -> dict[str, float]:
    """Views/s of each rung of the ladder, the median of the repeats; slow: views in the published layout (0: none)."""
    params, cfg, padded = model_of(checkpoint, act_steps)
    kind = train.dtype_of(dtype, torch.device("cpu"))
    train.keep_pages(kind)
    cast, encode = etrm.tree_map(lambda x: x.to(kind), params), encoders.encoder_of(cfg.model)
    steps = cfg.model.halt_max_steps
    ours = [b for b, _ in batches(cfg, tasks, views, limit)]
    asked: list[tuple[str, list[data.Batch], Callable[[data.Batch], Any]]] = [
        (LADDER[1], ours, lambda b: again(cast, cfg, encode, b, kind)),
        (LADDER[2], ours, lambda b: etrm.think(cast, cfg.model, encode, b, kind, steps)),
        (LADDER[3], ours, lambda b: etrm.think(cast, cfg.model, encode, b, kind, steps, "stable")),
    ]
    if slow:
        with throughput.published_layout():
            few = [b for b, _ in batches(padded, tasks, 1, slow)]
        wide = encoders.encoder_of(padded.model)
        asked.insert(
            0,
            (LADDER[0], few, lambda b: again(published_cast(params, kind), padded, wide, b, kind)),
        )
    found = {}
    for name, some, run in asked:
        seconds = []
        with throughput.published_layout() if name == LADDER[0] else contextlib.nullcontext():
            for _ in range(repeats):
                begun = time.perf_counter()
                for b in some:
                    run(b)
                seconds.append(time.perf_counter() - begun)
        found[name] = sum(len(b.cells) for b in some) / statistics.median(seconds)
    return found


def published_cast(params: etrm.Params, dtype: torch.dtype) -> etrm.Params:
    """Under `throughput.published_layout`: the weights of blocks stay in float32 and are cast where they are used."""
    return train.rebuild(params, {k: v.to(dtype) for k, v in etrm.leaves(params).items()})


def agreement(
    checkpoint: str, tasks: Sequence[data.Task], views: int, act_steps: int, dtype: str
) -> dict[str, dict[str, float]]:
    """For each way of leaving: share of views whose answer is that of the full run, and the ACT steps that a view takes."""
    params, cfg, _ = model_of(checkpoint, act_steps)
    kind = train.dtype_of(dtype, torch.device("cpu"))
    cast, encode, steps = (
        etrm.tree_map(lambda x: x.to(kind), params),
        encoders.encoder_of(cfg.model),
        cfg.model.halt_max_steps,
    )
    same, spent, n = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0), 0

    def answers(out: etrm.Output, b: data.Batch, canvas: list[list[int]]) -> list[str | None]:
        tokens = [
            x.view(*c).numpy()
            for x, c in zip(out.logits.argmax(-1).split(b.cells), canvas, strict=True)
        ]
        return [score.written(data.untokenise(x)) for x in tokens]

    for b, canvas in batches(cfg, tasks, views):
        full = answers(etrm.think(cast, cfg.model, encode, b, kind, steps)[0], b, canvas)
        n += len(full)
        for name, (leave, stable) in WAYS.items():
            out, took = etrm.think(cast, cfg.model, encode, b, kind, steps, leave, stable=stable)
            same[name] += sum(x == y for x, y in zip(answers(out, b, canvas), full, strict=True))
            spent[name] += int(took.sum())
    return {name: {"agree": same[name] / n, "act_steps": spent[name] / n, "n": n} for name in WAYS}


def report(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Each saving as a factor, and all of them; prints what it returns."""
    said: dict[str, Any] = {}
    for dtype, rate in found.items():
        rungs = [r for r in LADDER if r in rate]
        factors = {b: rate[b] / rate[a] for a, b in zip(rungs, rungs[1:], strict=False)}
        said[dtype] = {"views_per_s": rate, "factors": factors, "all": math.prod(factors.values())}
        print(f"{dtype}, views/s: " + ", ".join(f"{k} {v:.3g}" for k, v in rate.items()))
        print(
            f"{dtype}, factors: "
            + ", ".join(f"{k} {v:.2f}" for k, v in factors.items())
            + f"; together {said[dtype]['all']:.1f}"
        )
    if {"bf16", "fp32"} <= found.keys():
        said["dtype"] = found["bf16"][LADDER[-1]] / found["fp32"][LADDER[-1]]
        print(f"dtype: bf16 is {said['dtype']:.2f} times as fast as fp32", flush=True)
    return said


def measured(
    dtypes: Sequence[str], checkpoint: str = "", source: str = "arc1:dev", views: int = 8, act_steps: int = 0, slow: int = 4,
    limit: int = 64, repeats: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """All of it, printed and returned."""
    tasks = sources.load([source], hide=True)
    said = report(
        {d: rates(checkpoint, tasks, views, act_steps, d, limit, slow, repeats) for d in dtypes}
    )
    if checkpoint:
        said["agreement"] = agreement(checkpoint, tasks, views, act_steps, dtypes[0])
        for name, row in said["agreement"].items():
            print(
                f"leaving by {name}: {100 * row['agree']:.2f} % of {row['n']} views as in the full run, {row['act_steps']:.1f} steps"
            )
    return said


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--checkpoint",
        default="",
        help="a trained one: its own model, and whether leaving changes its answers",
    )
    options.add_argument("--data", default="arc1:dev")
    options.add_argument("--views", type=int, default=8)
    options.add_argument("--act-steps", type=int, default=0, help="default: those of the model")
    options.add_argument("--limit", type=int, default=64, help="views that are timed; 0: all")
    options.add_argument(
        "--slow", type=int, default=4, help="views in the published layout; 0: none"
    )
    options.add_argument("--dtype", choices=throughput.DTYPES, action="append")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path)
    a = options.parse_args()
    said = measured(
        a.dtype or throughput.DTYPES,
        a.checkpoint,
        a.data,
        a.views,
        a.act_steps,
        a.slow,
        a.limit,
        a.repeats,
    )
    if a.json:
        a.json.write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
