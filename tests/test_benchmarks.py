"""Every benchmark runs, at toy size."""

import json
import sys

import pytest

from etrm_arc.benchmarks import evaluation, gpu, ladder, size, throughput
from etrm_arc.tests.puzzles import SET

ONES = "model.heads model.H_cycles model.L_cycles model.context_tokens model.encoder.layers"
FIELDS = [f'data.train=["{SET}"]', "data.held_out=[]", "model.hidden=16"]
FIELDS += [f"{name}=1" for name in f"{ONES} train.batch train.shards".split()]
SMALLEST = [word for field in FIELDS for word in ("--set", field)]


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        module.main()

    return run


def test_ladder_scores_own_and_foreign_demos_of_fresh_tasks(call, run, capsys):
    call(ladder, run, "--data", SET, "--views", 1, "--json")
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])[str(SET)]
    assert scores["own"]["n_tasks"] == scores["foreign"]["n_tasks"] == 6
    call(ladder, run, "--tasks", 2, "--views", 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == list(ladder.RUNGS)


@pytest.mark.parametrize("trained", [True, False])
def test_evaluation_measures_every_rung(call, run, tmp_path, trained):
    small = ["--data", SET, "--views", 2, "--limit", 3, "--padded", 1, "--act-steps", 2]
    small += ["--dtype", "fp32", "--repeats", 1, "--json", tmp_path / "e.json"]
    call(evaluation, *small, *(["--checkpoint", run] if trained else []))
    result = json.loads((tmp_path / "e.json").read_text())["fp32"]
    assert [*result["views_per_s"]] == list(evaluation.LADDER[: 4 if trained else 3])
    assert min(result["views_per_s"].values()) > 0 and ("leaving" in result) == trained
    if trained:
        assert result["leaving"]["views"] == 3 and 1 <= result["leaving"]["act_steps"] <= 2


def test_throughput_measures_steps_stand_in_and_growth(call, tmp_path, monkeypatch):
    growth = {"tasks": (3, 9), "data.canvas": (8,), "data.max_demos": (1,), "model.layers": (1,)}
    monkeypatch.setattr(throughput, "GROWTH", growth)
    outputs = ["--json", tmp_path / "t.json", "--plot", tmp_path / "t.png"]
    call(throughput, "--dtype", "fp32", "--repeats", 1, *SMALLEST, *outputs)
    result = json.loads((tmp_path / "t.json").read_text())
    row = result["fp32"]
    assert row["samples_per_s"] > row["stand_in"] > 0 and row["parts"]["core"]["operations"] > 99
    assert row["stand_in_without_encoder"] > 0 and row["ratio_without_encoder"] > 0
    assert {k: tuple(map(int, v)) for k, v in result["growth"].items()} == growth
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_device_is_compared_with_the_cpu(call, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "WITHOUT", {"cpu": []})
    call(gpu, "--device", "cpu", "--seconds", 0, *SMALLEST)
    text = capsys.readouterr().out
    assert text.count("agree") == 2 and "operations a step" in text


def test_size_is_one_line_of_json(call, capsys):
    call(size)
    (line,) = capsys.readouterr().out.splitlines()
    counts = json.loads(line)
    assert counts["files"] <= 13 and counts["commands"] == 9
    assert counts["bytes"] > counts["lines"] > counts["fields"] > counts["commands"]
