"""Where rows of metrics go, beside metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Track = Callable[[dict[str, Any]], None]  # of a row


def tensorboard(folder: Path, cfg: dict[str, Any]) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(row: dict[str, Any]) -> None:
        for key in row.keys() - {"step"}:
            writer.add_scalar(key, row[key], row["step"])
        writer.flush()

    return track


def wandb(folder: Path, cfg: dict[str, Any]) -> Track:
    import wandb as service  # type: ignore[import-not-found]

    mode = os.environ.get("WANDB_MODE", "offline")
    run = service.init(project="etrm", name=folder.name, dir=str(folder), config=cfg, mode=mode)
    return lambda row: run.log(row, step=row["step"])


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Track]] = {
    "": lambda folder, cfg: lambda row: None,
    "tensorboard": tensorboard,
    "wandb": wandb,
}
