"""Every benchmark runs, at toy size."""

import json
import sys

import pytest

from etrm_arc.benchmarks import evaluation, foreign
from etrm_arc.tests.puzzles import SET


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        module.main()

    return run


def test_foreign_scores_own_and_foreign_demos(call, run, capsys):
    call(foreign, run, "--data", SET, "--views", 1, "--json")
    *lines, scores = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["own", "foreign"]
    assert json.loads(scores)["own"]["n_tasks"] == json.loads(scores)["foreign"]["n_tasks"] == 6


@pytest.mark.parametrize("trained", [True, False])
def test_evaluation_measures_every_rung(call, run, tmp_path, trained):
    small = ["--data", SET, "--views", 2, "--limit", 3, "--padded", 0, "--act-steps", 2]
    small += ["--dtype", "fp32", "--repeats", 1, "--json", tmp_path / "e.json"]
    call(evaluation, *small, *(["--checkpoint", run] if trained else []))
    result = json.loads((tmp_path / "e.json").read_text())["fp32"]
    assert [*result["views_per_s"]] == list(evaluation.LADDER[1 : 4 if trained else 3])
    assert all(rate > 0 for rate in result["views_per_s"].values())
    assert ("leaving" in result) == trained
    if trained:
        assert result["leaving"]["views"] == 3 and 1 <= result["leaving"]["act_steps"] <= 2
