"""What has a checkpoint learned? Tasks solved with their own demos, and with another task's.

    python -m benchmarks.ladder CHECKPOINT [--tasks 40] [--views 8] [--set solve.adapt=context]
    python -m benchmarks.ladder CHECKPOINT --data arc1:dev

The rungs are fresh tasks, composed from a seed of their own, of one rule each (but "compose two"),
that fit the checkpoint's canvases; with --data a source is the only rung. pass@2, Wilson's 95 %
over tasks. Whose demos are shown instead is fixed by the seed of the checkpoint's config;
adaptation, where set, is to the demos shown. Held-out tasks are counted, as by `etrm eval`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

from etrm_arc import data, score, solve, sources
from etrm_arc.data import Task
from etrm_arc.extras import compose

RUNGS = {
    "move": "mirror, half turn, quarter turn, transpose, roll, shift, shear, swap halves, "
    "columns by height, cells fall, objects fall",
    "scale": "enlarge, stretch, shrink",
    "crop": "left half, corner quarter, every other row, unframe, crop to all",
    "tile": "tile, tile mirrored, tile alternating, append mirror, append turned, self-similar",
    "complete": "mirror half, overlay mirror, complete symmetry, complete period, continue rows",
    "recolour": "swap colours, replace a colour, erase a colour, one colour, negative, exchange, "
    "paint background, commonest to new",
    "bind n colours": "permute colours, column colours, colours by rank, like twins",
    "count": "count objects, count diagonal, count cells, histogram, colours by frequency",
    "value not shown": "enlarge by colours, count objects, count diagonal, count cells",
    "compose two": "",  # combinations that training never draws
}
SEED = 1  # training's composed tasks have 0


def value(x: Any, y: Any) -> Any:
    """What a rule with a parameter made of a grid: its factor, or the answer."""
    return len(y) / len(x) if y.size > x.size else y.tobytes()


def fresh(rung: str, n: int, side: int) -> list[Task]:
    """The first n tasks of a rung with sides of at most `side`."""
    rules, tasks = RUNGS[rung].split(", "), []
    for index in itertools.count():
        d = compose.Dice(SEED, index, *rung.encode())
        names = (d.pick(rules),) if RUNGS[rung] else compose.composition(d, "composed-held-out")
        scene = compose.SCENES[d.pick(compose.RULES[names[0]].scenes.split())]
        task = compose.drawn(d, names, scene, f"{rung} {index}") if len(names) < 3 else None
        pairs = (*task.demos, *task.queries) if task else ()
        if task is None or max(max(g.shape) for pair in pairs for g in pair) > side:
            continue
        shown = [value(*pair) for pair in task.demos]
        if rung != "value not shown" or value(*pairs[-1]) not in shown:
            tasks.append(task)
        if len(tasks) == n:
            return tasks


def scores(solver: solve.Solver, known: list[Task], views: int) -> dict[str, dict[str, Any]]:
    """Scores of tasks with their own demos and with those of other tasks among them."""
    hidden = [sources.hidden(t) for t in known]
    queries = data.queries(data.pack(hidden), "test", solver.cfg.data)
    donors = queries.task[data.donors(queries, solver.cfg.run.seed)].tolist()
    shown = {"own": hidden, "foreign": list(hidden)}
    for i, other in dict(zip(queries.task.tolist(), donors, strict=True)).items():
        shown["foreign"][i] = hidden[i]._replace(demos=hidden[other].demos)
    return {
        whose: score.score(known, solve.ask(solver, tasks, views)) for whose, tasks in shown.items()
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint")
    options.add_argument("--data", help="a source, in place of fresh tasks")
    options.add_argument("--tasks", type=int, default=40, help="of each rung")
    options.add_argument("--views", type=int, default=8)
    options.add_argument("--set", action="append", default=[], help="as of etrm eval")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    solver, results = solve.solver_of(args.checkpoint, args.set), {}
    for rung in [args.data] if args.data else RUNGS:
        side = solver.cfg.data.canvas or solver.cfg.data.max_side
        tasks = sources.load(rung) if args.data else fresh(rung, args.tasks, side)
        result = results[rung] = scores(solver, tasks, args.views)
        own, foreign = (result[whose]["pass@2"] for whose in ("own", "foreign"))
        print(f"{rung:16}{score.with_interval(own, len(tasks))}, foreign demos {foreign:.1%}")
    count: dict[str, Any] = {}
    if args.data:
        held_out = solver.cfg.data.held_out
        count = score.count_evaluation({args.data: tasks}, held_out, own)
    if args.json:
        print(json.dumps(results | count))


if __name__ == "__main__":
    main()
