"""Mutated files: python -m tests.fuzz --mutations 1000 [--json]

Bytes of checkpoints, states, manifests, configs, task files, predictions and submissions are changed, cut out, doubled,
nested deeply or cut off at random. A mutated checkpoint or state must be refused (or be, byte for byte, what it was); the others are
refused or valid. Anything but a UserError is a finding.
"""

from __future__ import annotations

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

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three changes."""
    made = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(max(1, len(made)))
        kind = draw.choice(("flip", "set", "cut", "double", "end", "digit", "nest"))
        if kind == "flip":
            made[at : at + 1] = bytes([made[at] ^ (1 << draw.randrange(8))]) if made else b"x"
        elif kind == "set":
            made[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == "cut":
            del made[at : at + draw.randint(1, 40)]
        elif kind == "double":
            made[at:at] = made[at : at + draw.randint(1, 40)]
        elif kind == "end":
            del made[at:]
        elif kind == "nest":
            made[at:at] = draw.choice((b"[", b'{"a":', b"{a=")) * 100_000
        else:
            digits = [i for i, b in enumerate(made[at : at + 4000], at) if chr(b).isdigit()]
            if digits:
                made[draw.choice(digits)] = ord(draw.choice("0123456789"))
    return bytes(made)


def run_of(folder: Path) -> None:
    """A finished run of a few steps."""
    raw = {
        "run": {"dir": str(folder)},
        "data": {"train": [str(HERE / "data" / "set")], "dev": [], "held_out": []},
        "model": {
            "hidden": 16,
            "heads": 2,
            "expansion": 1.0,
            "layers": 1,
            "H_cycles": 1,
            "L_cycles": 1,
            "context_tokens": 2,
        },
        "train": {"batch": 4, "steps": 4, "save_every": 2, "dtype": "fp32"},
        "eval": {"on": "train"},
    }
    train.fit(config.parse_config(raw, "fuzz"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mutations", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp())
    run_of(work / "run")
    newest = sorted((work / "run").glob("state-*.json"))[-1]
    whole, parts, _ = checkpoint.load_state(work / "run")

    asked, sent = work / "predictions.jsonl", work / "submission.json"
    solve.evaluate(
        [work / "run"], [str(HERE / "data" / "set")], predictions_file=str(asked), submit=str(sent)
    )

    def state(path: Path) -> str:
        """What is taken up when one file of the newest state is mutated: the state before it, or the same bits."""
        manifest, found, _ = checkpoint.load_state(path.parent)
        assert manifest is not None
        if manifest["step"] < whole["step"]:
            return "refused"
        same = manifest == whole and all(torch.equal(v, parts[0][k]) for k, v in found[0].items())
        assert same, "a wrong resume"
        return "valid"

    def weights(path: Path) -> str:
        checkpoint.load(path)
        raise AssertionError("a mutated checkpoint was read")

    def task(path: Path) -> str:
        return "valid" if sources.load([str(path)]) else "refused"

    def votes_of(path: Path) -> str:
        found = score.union(score.read(path))
        return (
            "valid" if all(score.rank(p.votes) is not None for p in found.values()) else "refused"
        )

    def recipe(path: Path) -> str:
        config.load_config(path)
        return "valid"

    kinds: dict[str, tuple[list[Path], Callable[[Path], str]]] = {
        "checkpoint": ([work / "run" / "last.safetensors"], weights),
        "state": ([*(work / "run").glob(f"{newest.stem}-*.safetensors"), newest], state),
        "config": (sorted(CONFIGS.glob("*.toml")), recipe),
        "predictions": ([asked], votes_of),
        "submission": ([sent], votes_of),
        "task": (
            [HERE / "data" / "task.json", *sorted((HERE / "data" / "set").glob("*.json"))],
            task,
        ),
    }
    counts: dict[str, collections.Counter[str]] = {k: collections.Counter() for k in kinds}
    for name, (files, judge) in kinds.items():
        for i in range(args.mutations):
            original = draw.choice(files)
            content = original.read_bytes()
            changed = mutate(content, draw)
            folder = work / "mutated"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original.parent if name == "state" else HERE / "data" / "set", folder)
            path = folder / original.name
            path.write_bytes(changed)
            try:
                said = judge(path) if changed != content else "unchanged"
            except UserError as e:
                said = "refused" if str(e).count("\n") == 0 else "more than one line"
            except Exception:
                said = "traceback"
                print(f"{name} {i}:\n{traceback.format_exc()}", file=sys.stderr)
            counts[name][said] += 1
    shutil.rmtree(work)
    for name, found in counts.items():
        print(f"{name}: {', '.join(f'{n} {k}' for k, n in sorted(found.items()))}")
    if args.json:
        print(json.dumps(counts))
    sys.exit(1 if any(c["traceback"] or c["more than one line"] for c in counts.values()) else 0)


if __name__ == "__main__":
    main()
