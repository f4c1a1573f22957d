"""What do proposals solve alone? python -m benchmarks.alone CHECKPOINT OUT.safetensors, then etrm eval OUT.safetensors

Writes the checkpoint again with a network that says nothing: every answer is what hard attention to the demos proposes, so that
what was learned is the difference of the two scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from etrm_arc import checkpoint, etrm


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint")
    options.add_argument("out", type=Path)
    args = options.parse_args()
    found = checkpoint.load(args.checkpoint)
    silent = {
        "core.embed",
        "core.head",
        "core.trust_head",
    }  # logits are products with these, and proposals
    weights = {
        f"params.{k}": torch.zeros_like(v) if k in silent else v
        for k, v in etrm.leaves(found.ema).items()
    }
    checkpoint.save(args.out, weights, found.meta)


if __name__ == "__main__":
    main()
