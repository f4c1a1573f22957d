"""RE-ARC as a source: new pairs of the 400 training tasks of ARC-AGI-1 (Hodel, arXiv 2404.07353).

The generators are those of the package reasoning-gym, of which one folder of plain code is loaded.
Families of the dev split are left out; the guard compares the pairs of all others.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import sources
from ..config import UserError
from ..data import Task

MOST = 10_000  # tasks of each family
PAIRS = (3, 5)  # fewest and most of a task; the last one is its query
SPREAD = 0.2  # of difficulty, of 0..1, within a task: some tasks are small, as many of ARC's are
TRIES = 100  # pairs drawn for one that is a grid of at most 30 a side
INSTALL = "pip install --no-deps reasoning-gym==0.1.25"
MODULE = "etrm_arc_rearc_utils"

Pair = tuple[np.ndarray, np.ndarray]
Generator = Callable[[random.Random, float, float], dict[str, Any]]


def folder() -> Path:
    """Where the generators are. Raises UserError if the package is absent."""
    package = importlib.util.find_spec("reasoning_gym")
    found = (
        Path(package.origin).parent / "arc" / "rearc_utils" if package and package.origin else None
    )
    if found is None or not (found / "__init__.py").is_file():
        raise UserError(f"rearc: needs the package reasoning-gym: {INSTALL}")
    return found


def generators() -> dict[str, Generator]:
    """By task id. Loaded by path: the package itself imports much that is not needed here."""
    if MODULE not in sys.modules:
        path = folder()
        spec = importlib.util.spec_from_file_location(
            MODULE, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec and spec.loader, "the file exists"
        sys.modules[MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[MODULE])
    found = vars(importlib.import_module(f"{MODULE}.generators"))
    prefix = "generate_"
    return {k.removeprefix(prefix): f for k, f in sorted(found.items()) if k.startswith(prefix)}


def pair(generate: Generator, rng: random.Random, low: float, where: str) -> Pair:
    """The next pair of valid grids of a difficulty from low to low + SPREAD; of any difficulty
    where these are all too large."""
    for bounds in [(low, low + SPREAD)] * TRIES + [(0.0, 1.0)] * TRIES:
        drawn = generate(rng, *bounds)
        try:
            x, y = (sources.check_grid(drawn[key], where) for key in ("input", "output"))
        except UserError:
            continue
        return x, y
    raise UserError(f"{where}: no valid pair in {2 * TRIES}")


def task(family: str, generate: Generator, index: int, seed: int = 0) -> Task:
    """The index-th task of a family: a pure function of (seed, family, index)."""
    name = f"rearc:{family}:{index:04d}"
    rng = random.Random(f"{seed}:{family}:{index}")  # a string seeds alike on every Python
    low = rng.random() ** 2 * (1 - SPREAD)
    pairs = [pair(generate, rng, low, name) for _ in range(rng.randint(*PAIRS))]
    return Task(name, pairs[:-1], [pairs[-1]])  # type: ignore[list-item]


def tasks(n: int, kind: str = "rearc") -> list[Task]:
    """n tasks of each family that is not in the dev split."""
    left_out = {t.name for t in sources.load("arc1:dev")}
    families = {name: f for name, f in generators().items() if name not in left_out}
    return [task(name, f, i) for name, f in families.items() for i in range(n)]


def code() -> list[Path]:
    """The files that decide what the tasks are."""
    return [Path(__file__), *sorted(folder().rglob("*.py"))]
