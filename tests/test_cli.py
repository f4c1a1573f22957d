"""The command as a user meets it: quick help, one JSON line, one clear line for each mistake."""

import csv
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner

from etrm_arc import checkpoint, cli, etrm, solve
from etrm_arc.tests.puzzles import SET, write

PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
FIELDS = {
    "model.hidden": 32, "model.expansion": 1.0, "model.H_cycles": 1, "model.L_cycles": 1,
    "model.halt_max_steps": 2, "model.context_tokens": 4, "train.dtype": "fp32", "train.steps": 3,
    "train.batch": 8, "eval.every": 3, "data.train": [str(SET)],
    "data.dev": [str(SET / name) for name in ("mirror.json", "flip.json")], "data.held_out": [],
}  # fmt: skip
SCORE = r"\d+\.\d % \(n = \d+, 95 % \d+\.\d to \d+\.\d\)"


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def sets(**fields):
    """--set a.b=value of a tiny model on the six tasks; a__b in the place of a.b."""
    fields = {k.replace("__", "."): v for k, v in fields.items()}
    items = (f"{k}={json.dumps(v)}" for k, v in {**FIELDS, **fields}.items())
    return [word for item in items for word in ("--set", item)]


def last_json(result):
    return json.loads(result.stdout.splitlines()[-1])


def mistake(*args):
    result = call(*args, code=2)
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1000, result.stderr
    return result.stderr


def test_help_is_quick_and_there_are_nine_commands_that_take_json():
    probe = (
        "import sys; from etrm_arc import cli; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=os.sep)
    commands = typer.main.get_command(cli.app).commands
    names = "train eval overfit solve show report runs data merge"
    assert sorted(commands) == sorted(names.split())
    for name, command in commands.items():
        assert "--json" in {o for p in command.params for o in p.opts}, name
    assert re.fullmatch(r"etrm \d+\.\d+.*", call("--version").stdout.strip())


def test_training_says_what_it_does_and_can_be_resumed(tmp_path):
    words = ["train", "cpu", *sets(run__dir=str(tmp_path / "a"))]
    assert "stopped (time limit)" in call(*words, "--time-limit", "0s", code=75).stdout
    result = call(*words, "--resume", "--json")
    assert last_json(result)["step"] == 3 and "dev/ema/own/loss" in last_json(result)
    assert re.search(f"own/exact {SCORE}", result.stderr) and "done: " in result.stdout
    [row] = last_json(call("runs", tmp_path, "--json"))["runs"]
    assert (row["state"], row["step"]) == ("done", 3)
    plan = last_json(call(*words, "--set", f"run.dir={tmp_path / 'b'}", "--dry-run", "--json"))
    assert plan["parameters"] > 1e4 and sum(plan["slots"].values()) == 8
    assert 0 < plan["seconds_per_step"] < 60 and 0.01 < plan["peak_memory_gb"] < 64
    assert not (tmp_path / "b").exists()


def test_evaluation_scores_with_intervals_and_submits(run, tmp_path):
    raw = {p.stem: json.loads(p.read_text()) for p in SET.glob("*.json")}
    outputs = {k: [pair.pop("output") for pair in t["test"]] for k, t in raw.items()}
    write(tmp_path / "arc_solutions.json", outputs)
    tasks, sent = write(tmp_path / "arc_challenges.json", raw), tmp_path / "submission.json"
    votes = tmp_path / "votes.jsonl"
    words = ["eval", run, "--data", tasks, "--views", 2, "--predictions", votes]
    scores = last_json(result := call(*words, "--submission", sent, "--json"))
    assert scores["n_tasks"] == 6 and not scores["held_out"] and "NOT held out" in result.stdout
    for k in (1, 2, 5, 10, 100, 1000):
        assert re.search(f"^pass@{k} {SCORE}$", result.stdout, re.M)
    merged = last_json(call("merge", votes, "--data", tasks, "-o", tmp_path / "m.jsonl", "--json"))
    assert merged["votes"] == 12 and merged["pass@2"] == scores["pass@2"]
    joined = last_json(call("merge", sent, "--data", tasks, "--json"))
    assert joined["pass@2"] == scores["pass@2"]
    (tmp_path / "arc_solutions.json").unlink()
    assert "no scores" in call(*words).stdout


def test_solve_shows_and_returns_an_answer(run, tmp_path):
    task = write(tmp_path / "x[red].json", {"train": [PAIR], "test": [PAIR]})
    result = call("solve", run, task, "--set", "solve.views=2", "--json")
    (query,) = last_json(result)["queries"]
    assert query["query"] == 0 and query["votes"] == 2 and len(query["answers"]) <= 2
    assert "x[red]\n" in result.stdout and "query 1:" in result.stdout


def test_overfit_reports_exact_match_and_cells(tmp_path):
    words = ["overfit", "--groups", 2, *sets(), "--set", f"run.dir={tmp_path / 'r'}"]
    facts = last_json(result := call(*words, "--json"))
    assert 0 <= facts["exact_match"] <= facts["cell_accuracy"] <= 1 and facts["steps"] == 3
    assert re.search(f"exact match {SCORE}", result.stdout)
    with mock.patch("etrm_arc.train.fit", lambda *_, **__: {"step": 1}):  # an interrupt
        assert "before its first evaluation" in call(*words, code=2).stderr


def test_show_and_report_write_where_they_are_told(run, tmp_path):
    facts = last_json(call("show", run, "-t", "mirror", "-o", tmp_path / "a.svg", "--json"))
    assert (facts["task"], facts["steps"]) == ("mirror", 2)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    copy = shutil.copytree(run, tmp_path / "copy")
    facts = last_json(call("report", copy, "--data", SET / "mirror.json", "--json"))
    assert facts["output"] == str(copy / "report.html") and facts["marks"] == []
    page = (copy / "report.html").read_text()
    assert page.startswith("<!doctype html>") and '"mirror":' in page


def test_data_and_runs_describe_and_compare(run, tmp_path):
    unasked = write(tmp_path / "unasked.json", [PAIR, PAIR])
    assert {("tasks", 7), ("pairs", 26)} <= last_json(call("data", SET, unasked, "--json")).items()
    assert last_json(call("data", unasked, "--json"))["queries"] == 0
    assert f"{run} " in call("runs", run.parent).stdout
    result = call("runs", run, "--json")
    facts, leaves = last_json(result), etrm.leaves(checkpoint.load(run).params)
    assert facts["shapes"] == {k: list(x.shape) for k, x in leaves.items()}
    assert facts["parameters"] == sum(x.numel() for x in leaves.values())
    assert facts["finding"] in result.stdout and "core.embed" in result.stdout
    other = shutil.copytree(run, tmp_path / "other")
    result = call("runs", run, other, "--csv", tmp_path / "t.csv", "--json")
    rows = last_json(result)["runs"]
    assert [r["run"] for r in rows] == [str(run), str(other)]
    table = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [float(r["loss"]) for r in table] == [r["loss"] for r in rows]
    assert re.search(f"^exact +{SCORE} +{SCORE}$", result.stdout, re.M)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["train", "nowhere.toml"], "shipped configs: "),
        (["train", "cpu", "--set", "train.bach=3"], "--set: unknown key train.bach (did you"),
        (["train", "cpu", "--set", "train.batch=2", "--set", "train.shards=3"], "3 shards"),
        (["train", "cpu", "--time-limit", "1h١m"], "--time-limit"),
        (["train", "cpu", "--set", "run.dir=\udcff"], "not UTF-8"),
        (["train", "/dev/null"], "not a regular file"),
        (["train", "cpu", "--set", "train.batch=1e20"], "--set: train.batch"),
        (["train", "overfit", "--fast"], "has no [fast] table"),
        (["train", "cpu", "--set", 'data.train=["a\\.b"]'], "--set data.train: broken TOML"),
        (["train", "cpu", "--set", "init_from.path=runs/a"], "runs/a: no such checkpoint"),
        (["eval", "nowhere"], "no such checkpoint; shipped: cpu-best, cpu-plain"),
        (["eval", "cpu-plain", "--views", "-1"], "--set: solve.views: expected"),
        (["eval", "experts", "--set", "train.batch=7"], "only train.device"),
        (["train", "cpu", "--set", "run.dir="], "run.dir: expected"),
        (["eval", "cpu-plain", "task.json"], "--data task.json"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(args, text):
    small = sets() if args[:2] == ["train", "cpu"] else ()
    assert text in mistake(*args[:2], *small, *args[2:])


def test_a_mistake_in_a_file_is_one_line_that_names_it(run, tmp_path):
    marked = write(tmp_path / "c.toml", '\ufeff[run]\ndir = "~/r"')
    assert cli.load_config(marked).run.dir == os.path.expanduser("~/r")
    deep = "[" * 200_000
    text = mistake("train", write(tmp_path / "c.toml", '[fast]\n"train.bach" = 3'), "--dry-run")
    assert "c.toml, [fast]" in text and "train.bach" in text
    assert "c.toml: broken TOML" in mistake("train", write(tmp_path / "c.toml", f"x = {deep}"))
    assert "--set train.steps: " in mistake("train", "cpu", "--set", f"train.steps={deep}")
    assert "t.json" in mistake("data", write(tmp_path / "t.json", deep))
    write(shutil.copytree(run, tmp_path / "run") / "run.json", deep)
    assert "run.json: broken JSON" in mistake("report", tmp_path / "run")
    assert "unreadable" in call("runs", tmp_path).stdout


def test_names_from_files_do_not_act_on_the_terminal_and_json_has_no_nan(tmp_path, capsys):
    text = mistake("data", write(tmp_path / "a\x1bc\nb.json", "3"))
    assert "\x1b" not in text and "\\x1bc\\nb.json" in text
    cli.last_line(True, {"a": [math.nan, 1.5], "b": -math.inf})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": None}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "runs/x: No space left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "raise train.shards"),
    ],
)
def test_what_the_machine_refuses_is_one_line(run, monkeypatch, error, code, text):
    monkeypatch.setattr(solve, "evaluate", mock.Mock(side_effect=error))
    result = call("eval", run, code=code)
    assert text in result.stderr and result.stderr.count("\n") == 1


def test_an_encoder_of_a_module_beside_the_config_is_known_to_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "from etrm_arc.encoders import apply_perceiver, init_perceiver"
    write(tmp_path / "own_encoders.py", f"{names}\nmine = (init_perceiver, apply_perceiver)")
    fields = sets(model__encoder__kind="own_encoders:mine", run__dir="r")
    call("train", "cpu", *fields)
    assert last_json(call("eval", "r", "--views", 1, "--json"))["n_tasks"] == 2
    assert "own_encoders:mine" in call("runs", "r").stdout and call("report", "r")
    write(tmp_path / "broken.py", "1 / 0")
    for kind, text in {"broken:x": "ZeroDivisionError", "own_encoders:x": "encoder 'x'"}.items():
        assert text in mistake("train", "cpu", *sets(model__encoder__kind=kind, run__dir="s"))
