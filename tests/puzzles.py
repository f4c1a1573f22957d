"""Random tasks for the property tests: everything is made from a torch.Generator, so a seed says it all."""

import hypothesis.strategies as st
import numpy as np
import torch

from etrm_arc import data
from etrm_arc.data import Symmetry, Task

generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def integer(g: torch.Generator, low: int, high: int) -> int:
    """Both ends included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def grid(g: torch.Generator, low: int = 1, high: int = 6, colours: int = 10) -> np.ndarray:
    size = (integer(g, low, high), integer(g, low, high))
    return torch.randint(0, colours, size, generator=g).to(torch.uint8).numpy()


def pair(g: torch.Generator, low: int = 1, high: int = 6, colours: int = 10) -> tuple[np.ndarray, np.ndarray]:
    return grid(g, low, high, colours), grid(g, low, high, colours)


def task(g: torch.Generator, name: str = "t", low: int = 1, high: int = 6, hidden: bool = False) -> Task:
    """1..5 demos and 1..2 queries; with `hidden` about half of the queries have no output."""
    demos = [pair(g, low, high) for _ in range(integer(g, 1, 5))]
    asked = [pair(g, low, high) for _ in range(integer(g, 1, 2))]
    return Task(name, demos, [(x, None if hidden and integer(g, 0, 1) else y) for x, y in asked])


def tasks(g: torch.Generator, n: int, low: int = 1, high: int = 6, hidden: bool = False) -> list[Task]:
    return [task(g, f"t{i}", low, high, hidden) for i in range(n)]


def symmetry(g: torch.Generator, *shape: int) -> Symmetry:
    """Uniform over the group; a single one or a batch."""
    drawn = data.draw_symmetry(torch.rand(max(1, *shape, 1), 11, generator=g), True, "all")
    return drawn if shape else Symmetry(drawn.dihedral[0], drawn.colours[0])


def moved(s: Symmetry, pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return data.apply(s, pair[0]), data.apply(s, pair[1])
