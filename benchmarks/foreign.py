"""Are the demos read? pass@2 with a task's own demos and with those of another task.

    python -m benchmarks.foreign CHECKPOINT [--data SOURCE] [--views 32] [--set solve.adapt=context]

The other task is fixed by the seed of the checkpoint's config; adaptation, where set, is to the
demos shown. Intervals are Wilson's over tasks. An evaluation of held-out tasks is counted, as by
`etrm eval`.
"""

from __future__ import annotations

import argparse
import json

from etrm_arc import data, score, solve, sources


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint")
    options.add_argument("--data", default="arc1:dev")
    options.add_argument("--views", type=int, default=32)
    options.add_argument("--set", action="append", default=[], help="as of etrm eval")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    solver = solve.opened(args.checkpoint, args.set)
    hidden, known = (sources.load(args.data, hide=hide) for hide in (True, False))
    queries = data.queries(data.pack(hidden), "test", solver.cfg.data)
    donors = queries.task[data.donors(queries, solver.cfg.run.seed)].tolist()
    donor = dict(zip(queries.task.tolist(), donors, strict=True))
    shown = {"own": hidden, "foreign": list(hidden)}
    for i, other in donor.items():
        shown["foreign"][i] = hidden[i]._replace(demos=hidden[other].demos)
    scores = {}
    for whose, tasks in shown.items():
        votes = solve.predict(solver.params, solver.cfg, tasks, args.views)
        scores[whose] = score.score(known, votes)
        n, cells = scores[whose]["n_tasks"], scores[whose]["cell_accuracy"]
        shares = score.with_interval(scores[whose]["pass@2"], n)
        print(f"{whose} demos: pass@2 {shares}, cells {cells:.1%}")
    count = score.count_evaluation(
        {args.data: known}, solver.cfg.data.held_out, scores["own"]["pass@2"]
    )
    if args.json:
        print(json.dumps(scores | count))


if __name__ == "__main__":
    main()
