"""Shared by all tests: profiles of hypothesis, golden vectors, a run of a few steps."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor

# before `train` counts them: tensors are tiny, and a forked copy of a pool of threads hangs
torch.set_num_threads(1)
pytest.register_assert_rewrite("etrm_arc.tests.puzzles")  # its `close` says both values
from etrm_arc import config, train  # noqa: E402
from etrm_arc.tests.puzzles import SET  # noqa: E402

Golden = tuple[dict[str, Tensor], dict[str, str]]

# No deadline: the first call of a torch function can take seconds.
settings.register_profile("same", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None)
# EXPLORE=1 pytest: new examples each time
settings.load_profile("explore" if os.environ.get("EXPLORE") else "same")


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Counts of held-out evaluations are not the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """name -> (tensors, metadata) of tests/golden/<name>.safetensors, read anew at each call."""

    def load(name: str) -> Golden:
        path = Path(__file__).parent / "golden" / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, file.metadata()

    return load


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on five tasks; the sixth is held out."""
    folder = tmp_path_factory.mktemp("run") / "run"
    chosen, dev, held_out = ([str(file)] for file in (SET, SET / "mirror.json", SET / "flip.json"))
    raw = {
        "run": {"dir": str(folder)},
        "data": dict(train=chosen, dev=dev, held_out=held_out, max_side=10),
        "model": dict(hidden=32, heads=2, expansion=1.0, H_cycles=1, L_cycles=1)
        | dict(context_tokens=4, halt_max_steps=2),
        "train": dict(batch=6, steps=4, dtype="fp32"),
        "eval": dict(every=2),
        "solve": dict(views=3),
    }
    train.fit(config.parse_config(raw, "test"))
    return folder
