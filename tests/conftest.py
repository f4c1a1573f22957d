"""Shared by all tests: the profiles of hypothesis and the golden vectors of the published code."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor

Golden = tuple[dict[str, Tensor], dict[str, Any]]

# No deadline: the first call of a torch function can take seconds.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
torch.set_num_threads(1)  # tensors are tiny here; two threads would only wait for each other
settings.load_profile("ci" if os.environ.get("CI") else "local")


def decode(value: str) -> Any:
    """The JSON value where it is JSON, the text itself where it is not."""
    try:
        return json.loads(value)
    except ValueError:
        return value


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """name -> (tensors, metadata) of tests/golden/<name>.safetensors, read anew at each call."""

    def load(name: str) -> Golden:
        with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, {key: decode(value) for key, value in file.metadata().items()}

    return load
