"""Are the demos read? python -m benchmarks.foreign CHECKPOINT [--data SOURCE] [--views 32] [--set solve.adapt=context] [--json]

pass@2 of a checkpoint when every task keeps its own demos and when it is shown those of another task, fixed by the seed of the
checkpoint's config, and adapts to them where adaptation is set; 95 % intervals (Wilson over tasks). A look at held-out tasks
is counted as `etrm eval` counts it.
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
    s = solve.opened(args.checkpoint, args.set)
    hidden, known = (sources.load(args.data, hide=hide) for hide in (True, False))
    asked = data.queries(data.pack(hidden), "test", s.cfg.data)
    donor = dict(
        zip(
            asked.task.tolist(),
            asked.task[data.donors(asked, s.cfg.run.seed)].tolist(),
            strict=True,
        )
    )
    # a task without a query is asked nothing, so it needs no donor
    shown = {
        "own": hidden,
        "foreign": [t._replace(demos=hidden[donor.get(i, i)].demos) for i, t in enumerate(hidden)],
    }
    found = {
        whose: score.score(
            known, solve.predict(s.params, s.cfg, tasks, args.views), s.cfg.solve.vote
        )
        for whose, tasks in shown.items()
    }
    look = solve.looked(
        {solve.place_of(s.path)}, s.cfg.data.held_out, {args.data: known}, found["own"]["pass@2"]
    )
    for whose, scores in found.items():
        low, high = scores["interval95"]["pass@2"]
        print(f"{whose} demos: pass@2 {scores['pass@2']:.1%} (n = {scores['n_tasks']}, 95 % {low:.1%} to {high:.1%}), "
              f"cells {scores['cell_accuracy']:.1%}")  # fmt: skip
    if args.json:
        kept = ("pass@2", "interval95", "exact_match", "cell_accuracy", "oracle", "n_tasks")
        print(
            json.dumps(
                {whose: {k: scores[k] for k in kept} for whose, scores in found.items()} | look
            )
        )


if __name__ == "__main__":
    main()
