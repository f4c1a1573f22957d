"""What does saving cost? python -m benchmarks.saving [CONFIG] [--repeats 20] [--json]

Weights and full state of a recipe (default: cpu), saved after a real step. `waits`: seconds that the loop stands still;
`work`: CPU seconds of the whole save, which the loop loses where no core is idle; `written`: seconds until all is on disk.
`share`: (waits + work) / 60, the most that saving once a minute can take of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from etrm_arc import checkpoint, config, optim, train


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("config", nargs="?", default="cpu")
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        cfg = config.load_config(args.config, [f"run.dir={work}/run"])
        s = train.setup(cfg)
        state = train.fresh_state(cfg, s)
        began = time.perf_counter()
        state.carries, grads, *_ = train.one_step(s, cfg, state.carries)
        optim.update(state.opts, [p for p in s.params.values() if p.requires_grad], grads, 0.0, 1.0)
        found: dict[str, float] = {"step": time.perf_counter() - began}
        times: dict[str, list[float]] = {"waits": [], "work": [], "written": []}
        with train.Run(Path(cfg.run.dir), 0, False) as run:
            run.begin(0, run.folder, s.meta, "")
            for n in range(args.repeats):
                state.facts["step"] = n + 1
                began, used = time.perf_counter(), time.process_time()
                checkpoint.save(run, s, state, 1, ("last",), True)
                times["waits"].append(time.perf_counter() - began)
                run.wait()
                times["written"].append(time.perf_counter() - began)
                times["work"].append(time.process_time() - used)
            found["mb"] = (
                sum(p.stat().st_size for p in run.folder.glob(f"*{args.repeats:08d}*")) / 1e6
            )
    found |= {k: statistics.median(v) for k, v in times.items()}
    found["share"] = (found["waits"] + found["work"]) / 60
    print(json.dumps(found) if args.json else ", ".join(f"{k} {v:.4f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
