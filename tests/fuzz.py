"""Mutated files: python -m tests.fuzz --mutations 1000 [--seed 0]

Bytes of every kind of file are changed, cut out, doubled, nested deeply or cut off at random. A
mutated checkpoint or state must be refused (or hold what it held); the others are refused or valid.
Anything but a UserError of one line is a finding.
"""

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from etrm_arc import checkpoint, config, score, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.extras import published
from etrm_arc.tests.test_train import SET, tiny

DATA = Path(__file__).parent / "data"


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three changes."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(changed) + 1), draw.randint(1, 40)
        digits = [i for i, b in enumerate(changed[at : at + 4000], at) if chr(b).isdigit()]
        kind = draw.choice(("flip", "cut", "double", "digit", "nest"))
        if kind == "flip":
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == "cut":
            del changed[at : draw.choice((at + length, len(changed)))]
        elif kind == "double":
            changed[at:at] = changed[at : at + length]
        elif kind == "nest":
            changed[at:at] = draw.choice((b"[", b'{"a":', b"{a=")) * 100_000
        elif digits:
            changed[draw.choice(digits)] = ord(draw.choice("0123456789"))
    return bytes(changed)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--mutations", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp())
    run, votes, sent = work / "run", work / "predictions.jsonl", work / "submission.json"
    train.fit(tiny(run, model__hidden=16))
    solve.evaluate([run], [SET], predictions_file=str(votes), submit=str(sent))
    torch.save(checkpoint.read(run / "last.safetensors")[0], work / "step_1")
    whole = checkpoint.load_state(run)

    def state(path: Path) -> bool:
        saved = checkpoint.load_state(path.parent)
        if newest := saved.facts["step"] == whole.facts["step"]:
            equal = all(torch.equal(v, saved.tensors[k]) for k, v in whole.tensors.items())
            assert equal and saved.facts == whole.facts, "a wrong resume"
        return newest

    def weights(path: Path) -> bool:
        checkpoint.load(path)
        raise AssertionError("a mutated checkpoint was read")

    def predictions(path: Path) -> bool:
        return all(score.rank(p.votes) is not None for p in score.read(path))

    kinds: dict[str, tuple[list[Path], Callable[[Path], object]]] = {
        "checkpoint": ([run / "last.safetensors"], weights),
        "state": ([checkpoint.states(run)[-1]], state),
        "metrics": ([run / "metrics.jsonl"], checkpoint.rows_of),
        "published": ([work / "step_1"], published.read_state),
        "config": (sorted(config.SHIPPED.glob("*.toml")), config.load_config),
        "predictions": ([votes, sent], predictions),
        "task": (sorted(DATA.glob("**/*.json")), sources.load),
    }
    counts: dict[str, collections.Counter[str]] = {k: collections.Counter() for k in kinds}
    for name, (files, judge) in kinds.items():
        for i in range(args.mutations):
            original = draw.choice(files)
            content, folder = original.read_bytes(), work / "mutated"
            changed = mutate(content, draw)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(run if name == "state" else SET, folder)
            path = folder / original.name
            path.write_bytes(changed)
            try:
                valid = judge(path) if changed != content else True
                verdict = "valid" if valid else "refused"
            except UserError as e:
                verdict = "refused" if str(e).count("\n") == 0 else "more than one line"
            except Exception:
                verdict = "traceback"
                print(f"{name} {i}:\n{traceback.format_exc()}", file=sys.stderr)
            counts[name][verdict] += 1
    shutil.rmtree(work)
    print(json.dumps(counts))
    sys.exit(1 if any(c["traceback"] or c["more than one line"] for c in counts.values()) else 0)


if __name__ == "__main__":
    main()
