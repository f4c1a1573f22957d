"""The house has one direction: each module imports only those above it, extras by name alone."""

import ast
import importlib
from pathlib import Path

import pytest

from etrm_arc import cli, encoders, solve, sources

ROOT = Path(__file__).parent.parent
HOUSE = ["config", "data", "sources", "etrm", "baselines", "encoders", "optim", "checkpoint"]
HOUSE += ["train", "score", "solve", "show", "cli"]
EXTRAS = sorted(path.stem for path in (ROOT / "extras").glob("*.py") if path.stem != "__init__")


def imports_of(path):
    """Names of our own modules that a file imports, wherever in it: "data", "extras.compose"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or "etrm_arc" in (node.module or "")):
            up = "extras." if node.level == 1 and path.parent.name == "extras" else ""
            module = (node.module or "").removeprefix("etrm_arc").strip(".")
            names |= {up + (module or alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {a.name.removeprefix("etrm_arc.") for a in node.names if "etrm_arc" in a.name}
    return names


def test_these_are_all_modules_and_every_name_of_an_extra_is_that_of_a_module():
    assert sorted(HOUSE) == sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "__init__")
    named = encoders.PUBLISHED, encoders.FEEDBACK, cli.REPORT, solve.SUBMISSIONS
    for module in (*solve.SOLVERS.values(), *named):
        assert importlib.import_module(module)
    assert {*sources.GENERATORS.values()} <= {*EXTRAS}


@pytest.mark.parametrize("name", HOUSE)
def test_a_module_imports_only_those_above_it(name):
    assert imports_of(ROOT / f"{name}.py") <= set(HOUSE[: HOUSE.index(name)])


@pytest.mark.parametrize("name", EXTRAS)
def test_extras_know_puzzles_and_scores_alone_and_encoders_the_model(name):
    allowed = {"config", "data", "sources", "score", *(f"extras.{other}" for other in EXTRAS)}
    allowed |= {"etrm", "encoders"} if name in ("encoders", "feedback") else set()
    allowed |= {"checkpoint", "etrm", "show", "solve"} if name == "report" else set()
    allowed |= {"checkpoint"} if name == "submissions" else set()
    assert imports_of(ROOT / "extras" / f"{name}.py") <= allowed
