"""The command as a user meets it: quick help, one JSON line, one clear line for each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from etrm_arc import cli, train

HERE = Path(__file__).parent / "data"
PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
SMALL = [
    "model.hidden=32", "model.expansion=1.0", "model.H_cycles=1", "model.L_cycles=1", "model.halt_max_steps=2",
    "train.dtype=fp32", "train.steps=3", "eval.every=3", "train.batch=8", "eval.act_steps=1",
]  # fmt: skip
SETS = [x for item in SMALL for x in ("--set", item)]


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def last_json(result):
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    sources = [
        f'data.train=["{HERE / "set"}"]',
        f'data.dev=["{HERE / "set" / "mirror.json"}"]',
        "data.held_out=[]",
    ]
    more = [
        x
        for item in [*sources, f"run.dir={folder}", "data.max_side=10", "eval.foreign=false"]
        for x in ("--set", item)
    ]
    out = last_json(call("train", "cpu", *SETS, *more, "--json"))
    assert out["step"] == 3 and "dev/ema/own/loss" in out
    return folder


def test_help_needs_neither_torch_nor_numpy():
    probe = (
        "import sys; from etrm_arc import cli; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=os.sep)


def test_every_command_takes_json():
    named = typer.main.get_command(cli.app).commands
    assert len(named) == len(cli.app.registered_commands) > 10
    for name, command in named.items():
        assert "--json" in {o for p in command.params for o in p.opts}, name


def words(folder, *more):
    sources = [
        f'data.train=["{HERE / "set"}"]',
        "data.dev=[]",
        "data.held_out=[]",
        "eval.on=train",
        f"run.dir={folder}",
        *more,
    ]
    return [*SETS, *(x for item in sources for x in ("--set", item))]


def test_inspect_says_what_a_checkpoint_holds(run):
    from etrm_arc import checkpoint, etrm

    out = call("inspect", run, "--json")
    found, c = last_json(out), checkpoint.load(run)
    shapes = {name: list(x.shape) for name, x in etrm.leaves(c.params).items()}
    assert {k: v for named in found["modules"].values() for k, v in named.items()} == shapes
    assert (
        found["parameters"]
        == sum(x.numel() for x in etrm.leaves(c.params).values())
        == sum(found["sizes"].values())
    )
    assert (found["data"], found["step"], found["config"]) == (c.meta["data"], 3, c.meta["config"])
    assert (
        "1 dev tasks set aside" in found["finding"]
        and found["finding"] in out.stdout
        and "core.embed" in out.stdout
    )
    assert "no such checkpoint" in call("inspect", "nowhere.safetensors", code=2).output


def test_convert_writes_either_format(tmp_path):
    import torch

    from etrm_arc import checkpoint, etrm

    shape = [
        "model.tied_head=false",
        "model.published=true",
        "model.encoder.kind=standard",
        "model.positions=rope",
    ]
    call("train", "cpu", *words(tmp_path / "run", *shape, "eval.foreign=false"))
    said = call("convert", tmp_path / "run", tmp_path / "step_3", "--raw", "--json")
    assert (
        last_json(said) == {"output": str(tmp_path / "step_3"), "text": said.stdout.splitlines()[0]}
        and "step_3: " in said.stdout
    )
    sets = [x for item in [*SMALL, *shape] for x in ("--set", item)]
    call("convert", tmp_path / "step_3", tmp_path / "a.safetensors", "--config", "cpu", *sets)
    ours, back = checkpoint.load(tmp_path / "run"), checkpoint.load(tmp_path / "a.safetensors")
    for k, v in etrm.leaves(ours.params).items():
        assert torch.equal(v, etrm.leaves(back.params)[k]), k
    assert (
        "STARTED FROM step_3: published, unknown"
        in call("inspect", tmp_path / "a.safetensors").output
    )
    assert (
        "name the config"
        in call("convert", tmp_path / "step_3", tmp_path / "b.safetensors", code=2).output
    )
    assert (
        "raw weights"
        in call("convert", tmp_path / "run", tmp_path / "b.safetensors", "--raw").output
    )  # a lean one
    lean, whole = (tmp_path / x for x in ("b.safetensors", "run/last.safetensors"))
    assert (
        3.5 * lean.stat().st_size < whole.stat().st_size + 3e4
    )  # two sets in float32 against one in bfloat16, and a header
    for k, v in etrm.leaves(ours.params).items():
        assert all(
            torch.equal(v.bfloat16().float(), etrm.leaves(x)[k]) for x in checkpoint.load(lean)[1:3]
        ), k
    assert checkpoint.load(lean).meta == ours.meta


def test_several_seeds_are_resumable_as_a_whole(tmp_path):
    args = ["train", "cpu", *words(tmp_path / "run"), "--seeds", "2"]
    call(
        *args, "--time-limit", "0", code=75
    )  # the first seed stops after a step, the second never begins
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-s0"]
    call(*args, "--resume")
    found = last_json(call("runs", tmp_path, "--json"))["runs"]
    assert [(Path(r["run"]).name, r["state"], r["step"]) for r in found] == [
        ("run-s0", "done", 3),
        ("run-s1", "done", 3),
    ]
    assert call(*args, "--resume").stdout.count("has ended: done") == 2
    assert json.loads((tmp_path / "run-s1" / "run.json").read_text())["config"]["run"]["seed"] == 1


def test_a_recipe_goes_on_from_what_the_one_before_it_left_in_the_same_command(tmp_path):
    from etrm_arc import checkpoint

    sets = [
        x
        for item in (*SMALL, f'data.train=["{HERE / "set"}"]', "data.dev=[]", "eval.on=train")
        for x in ("--set", item)
    ]
    more = "held_out = []\nmax_side = 10\n[eval]\nforeign = false\n[fast]\n'train.batch' = 4\n"
    first, then = tmp_path / "first.toml", tmp_path / "then.toml"
    first.write_text(
        f'extends = "{HERE.parents[1] / "configs" / "cpu.toml"}"\n[run]\ndir = "{tmp_path}/a"\n[data]\n{more}'
    )
    then.write_text(
        f'extends = "first.toml"\n[run]\ndir = "{tmp_path}/b"\n[init_from]\npath = "{tmp_path}/a"\n'
    )
    assert "no such" in call("train", then, "--dry-run", *sets, code=2).output
    call("train", first, then, "--dry-run", *sets)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.toml", "then.toml"]
    call("train", first, then, "--fast", "--seeds", 2, *sets)
    for k in range(2):
        begun = checkpoint.load(tmp_path / f"b-fast-s{k}").meta["ancestors"][0]["config"]["run"]
        assert (begun["dir"], begun["seed"]) == (f"{tmp_path}/a-fast-s{k}", k)


def started(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "etrm_arc.cli", "train", "cpu", *args, "--procs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("more", [(), ("model.encoder.kind=table", "data.symmetries=3")])
def test_processes_of_one_command_end_in_the_bits_of_one(tmp_path, more):
    from etrm_arc.tests.kill import outcome

    call("train", "cpu", *words(tmp_path / "one", *more))
    run = started(*words(tmp_path / "two", *more))
    assert run.wait(120) == 0, run.stderr.read()
    (rows, one), (others, two) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for part in (one, two):
        part.pop("sums")  # each process has its own share of these
    assert [r["step"] for r in rows] == [r["step"] for r in others]
    assert one.keys() == two.keys() and all(v.equal(two[k]) for k, v in one.items())


def until_first_row(run, folder):
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert run.poll() is None
        time.sleep(0.05)


def ranks_of(run):
    """Process ids of the ranks, once both show that they live."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True
        ).stdout.split()
        if len(found) == 2 and (Path(f"/proc/{run.pid}/task")).exists():
            return sorted(map(int, found))
        time.sleep(0.05)
    raise AssertionError("no processes")


def test_a_dead_process_brings_the_others_down(tmp_path):
    run = started(*words(tmp_path / "run", "train.steps=100000"))
    ranks = ranks_of(run)
    until_first_row(run, tmp_path / "run")
    os.kill(ranks[1], signal.SIGKILL)
    assert run.wait(20) == 1
    said = run.stderr.read()
    assert "process 1 was killed by signal 9" in said and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_processes_do_not_outlive_their_launcher(tmp_path):
    run = started(*words(tmp_path / "run", "train.steps=100000"))
    ranks = ranks_of(run)
    until_first_row(run, tmp_path / "run")
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    alive = lambda pid: (
        Path(f"/proc/{pid}").exists()
        and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    )  # noqa: E731
    while any(alive(pid) for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert last_json(call("runs", tmp_path, "--json"))["runs"][0]["state"] == "stopped"


def test_a_stalled_process_brings_the_others_down(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STALLED", 1.0)
    words_ = [open(tmp_path / f"w{i}", "w+") for i in range(2)]  # noqa: SIM115
    ranks = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)
    ]
    (tmp_path / "0").touch()
    os.utime(tmp_path / "0", (0, 0))
    try:
        assert train.wait_for(ranks, tmp_path, words_) == 1
    finally:
        for p in ranks:
            p.kill()
            p.wait()


def test_a_signal_stops_all_processes_at_one_step(tmp_path):
    run = started(*words(tmp_path / "run", "train.steps=100000"))
    until_first_row(run, tmp_path / "run")
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 75, run.stderr.read()
    assert last_json(call("runs", tmp_path, "--json"))["runs"][0]["state"] == "stopped"


def test_data_describes_a_set():
    out = last_json(call("data", HERE / "set", "--json"))
    assert (out["tasks"], out["pairs"]) == (6, 24) and len(out["hash"]) == 16
    assert (
        out["hash"] == last_json(call("data", *sorted((HERE / "set").iterdir()), "--json"))["hash"]
    )


def test_dry_run_trains_nothing(tmp_path):
    out = last_json(call("train", "overfit", "--dry-run", "--json", *SETS, "--set", f"run.dir={tmp_path / 'no'}",
                         "--set", f'data.train=["{HERE / "set"}"]'))  # fmt: skip
    assert {"parameters", "slots", "gflop_per_step", "memory_gb", "seconds_per_step"} <= out.keys()
    assert not (tmp_path / "no").exists()


def test_eval_prints_scores_with_intervals(run):
    result = call("eval", run, "--views", 2, "--json")
    keys = {"pass@1", "pass@2", "exact_match", "cell_accuracy", "n_tasks", "n_queries", "held_out"}
    out = last_json(result)
    assert keys <= out.keys() and out["held_out"] is True and out["n_tasks"] == 1
    assert "pass@2" in result.stdout and "95 %" in result.stdout and "held out" in result.stdout
    assert "no adaptation" in result.stdout and "predictions.jsonl" in result.stdout


SCORE = r"\d+\.\d % \(n = \d+, 95 % \d+\.\d to \d+\.\d\)"


def test_every_score_has_its_interval_and_says_whether_held_out_demos_were_trained_on(tmp_path):
    own = [
        f'data.held_out=["{HERE / "set" / "flip.json"}"]',
        "data.policy=demos",
        "eval.foreign=false",
        "eval.best=exact",
    ]
    warned = "DEMOS of 1 held-out tasks TRAINED ON"
    trained = call(
        "train", "cpu", *words(tmp_path / "run", *own, "train.log_every=1")
    ).stderr.splitlines()
    [row] = [line for line in trained if "own/exact" in line]
    assert re.search(f"train/ema/own/exact {SCORE}", row) and warned in row
    said = call("eval", tmp_path / "run", "--data", HERE / "set", "--views", 2).stdout
    assert warned in said and all(
        re.search(f"^pass@{k} {SCORE}$", said, re.M) for k in (1, 2, 5, 10, 100, 1000)
    )
    assert len(re.findall(f"<=\\d+ {SCORE}", said)) == said.count("<=") > 1
    shown = call("report", tmp_path / "run", "--data", HERE / "set").stdout
    assert (
        re.search(f"{warned}: pass@1 {SCORE}, pass@2 {SCORE}", shown)
        and warned in (tmp_path / "run" / "report.html").read_text()
    )
    beside = call("compare", tmp_path / "run").stdout
    assert (
        all(re.search(f"^{k} +{SCORE}$", beside, re.M) for k in ("exact", "best_exact"))
        and warned in beside
    )
    assert re.search(f"own/exact {SCORE}.*{warned}", call("runs", tmp_path).stdout)


def test_submissions_are_written_checked_and_merged(run, tmp_path):
    challenges, solutions = tmp_path / "arc_challenges.json", tmp_path / "arc_solutions.json"
    raw = {p.stem: json.loads(p.read_text()) for p in (HERE / "set").glob("*.json")}
    solutions.write_text(
        json.dumps({k: [pair.pop("output") for pair in t["test"]] for k, t in raw.items()})
    )
    challenges.write_text(json.dumps(raw))
    sent, kept = tmp_path / "submission.json", tmp_path / "p.jsonl"
    args = [
        "eval",
        run,
        "--data",
        challenges,
        "--views",
        2,
        "--vote",
        "demos",
        "--submission",
        sent,
        "--predictions",
        kept,
    ]
    scored = last_json(call(*args, "--json"))
    checked = last_json(call("check-submission", sent, "--solutions", solutions, "--json"))
    assert checked["tasks"] == checked["queries"] == 6 and checked["pass@2"] == scored["pass@2"]
    assert "valid, 6 tasks" in call("check-submission", sent).stdout
    merged = last_json(
        call(
            "merge", kept, sent, "--data", challenges, "--output", tmp_path / "all.jsonl", "--json"
        )
    )
    assert merged["votes"] == 24 and merged["n_tasks"] == 6
    assert last_json(call("merge", tmp_path / "all.jsonl", "--json"))["votes"] == 24
    solutions.unlink()
    assert "nothing is scored" in call(*args).stdout
    fewer = bad(tmp_path, {"mirror": [[[1]]]})
    assert (
        "is not among those of"
        in call("check-submission", sent, "--solutions", fewer, code=2).stderr
    )


def test_solve_shows_and_returns_an_answer(run):
    result = call("solve", run, HERE / "task.json", "--views", 2, "--json")
    out = last_json(result)
    assert [q["query"] for q in out["queries"]] == [0] and len(out["queries"][0]["answers"]) <= 2
    assert "query 1:" in result.stdout


def test_overfit_reports_what_is_wrong(tmp_path):
    result = call("overfit", "--groups", 2, *SETS, "--set", f"run.dir={tmp_path}", "--json")
    out = last_json(result)
    assert {"exact_match", "cell_accuracy", "steps", "seconds"} <= out.keys()
    assert re.search(f"raw weights: exact match {SCORE}, cells .*; EMA: {SCORE}", result.stdout)
    assert (
        len(out["wrong"]) == round((1 - out["exact_match"]) * out["pairs"])
        and "published" in result.stdout
    )


def test_overfit_under_symmetries_and_translation(tmp_path):
    call(
        "overfit",
        "--groups",
        2,
        "--augment",
        *SETS,
        "--set",
        "init_from.path=",
        "--set",
        f"run.dir={tmp_path}",
    )
    drawn = json.loads((tmp_path / "run.json").read_text())["config"]["data"]
    assert (drawn["dihedral"], drawn["colours"], drawn["translate"], drawn["max_train_tasks"]) == (
        True,
        "keep_black",
        True,
        2,
    )


def test_a_fork_goes_on_where_another_run_stopped(run, tmp_path):
    sources = [
        f'data.train=["{HERE / "set"}"]',
        f'data.dev=["{HERE / "set" / "mirror.json"}"]',
        "data.held_out=[]",
    ]
    more = [
        *sources,
        f"run.dir={tmp_path}",
        "data.max_side=10",
        "eval.foreign=false",
        "train.steps=5",
    ]
    args = [
        "train",
        "cpu",
        *SETS,
        *(x for item in more for x in ("--set", item)),
        "--from",
        run,
        "--resume",
    ]
    call(*args)  # as a job that may be put back: there is nothing to go on from yet
    assert last_json(call(*args, "--json"))["step"] == 5
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [3, 3, 5, 5] and len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_show_draws_in_the_terminal_and_moves(run, tmp_path):
    shown = call("show", run, "--task", "mirror", "--terminal", "--json")
    assert (
        last_json(shown) == {"task": "mirror", "steps": 2} and len(shown.stdout.splitlines()) > 10
    )
    pytest.importorskip("matplotlib")
    said = last_json(
        call(
            "show", run, "--task", "mirror", "--cycles", "--gif", "-o", tmp_path / "a.gif", "--json"
        )
    )
    assert said["panels"] == 2 and (tmp_path / "a.gif").read_bytes().startswith(b"GIF8")


def bad(tmp_path, text, name="bad.json"):
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return tmp_path / name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"train": [', "broken JSON"),
        ("[" * 200_000, "broken JSON"),
        (
            {"train": [{"input": [[1], [1, 2]], "output": [[1]]}]},
            "task bad, train[0].input: ragged grid",
        ),
        (
            {"train": [PAIR, {"input": [[12]], "output": [[1]]}]},
            "train[1].input: colour 12 outside 0..9",
        ),
        ({"train": [{"input": [[0] * 31] * 31, "output": [[1]]}]}, "grid of 31 x 31"),
        ({"train": []}, "has no demos"),
        ("[1, 2]", "train[0]: a pair needs"),
        ("3", "neither a task"),
    ],
)
def test_a_bad_task_file_is_one_line(tmp_path, content, said):
    result = call("data", bad(tmp_path, content), code=2)
    assert (
        said in result.stderr and str(tmp_path) in result.stderr and result.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["data", "nowhere.json"], "nowhere.json: no such file"),
        (["data", "arc1:trainin"], "did you mean arc1:training?"),
        (["train", "nowhere.toml"], "shipped configs: "),
        (["train", "cpu", "--set", "train.bach=3"], "unknown key train.bach (did you mean batch?)"),
        (["train", "cpu", "--set", "train.batch=many"], "train.batch: expected `int`, got `str`"),
        (["train", "cpu", "--set", "model.encoder.kind=perciever"], "did you mean perceiver?"),
        (
            [
                "train",
                "cpu",
                "--set",
                "model.encoder.kind=lpn_var",
                "--set",
                "model.encoder.kl_weight=0.0",
            ],
            "lpn_var is variational",
        ),
        (
            ["train", "cpu", "--set", "model.encoder.kind=mine"],
            "known: standard, variational, lpn_standard, ",
        ),
        (
            ["train", "cpu", "--set", "train.device=cuda"],
            "train.device: cuda is not available here",
        ),
        (["train", "cpu", "--set", "model.heads=5"], "model.heads"),
        (["train", "cpu", "--set", "data.demo_canvases=[10]"], "data.demo_canvases"),
        (["train", "cpu", "--set", "data.policy=demos", "--set", "data.query=test"], "data.policy"),
        (
            ["train", "cpu", "--set", "train.batch=2", "--set", "train.shards=3"],
            "2 slots cannot fill 3 shards",
        ),
        (["train", "cpu", "--set", "optimizer.freeze=['nothing']"], "matches no parameter"),
        (["train", "cpu", "--set", "optimizer.freeze=['[']"], "is no regular expression"),
        (["train", "cpu", "--set", "optimizer.freeze=['.*']"], "nothing is left to train"),
        (["train", "cpu", "--set", "eval.every=0"], "eval.every: expected `int` >= 1"),
        (["train", "cpu", "--set", "model.heads=0"], "model.heads: expected `int` >= 1"),
        (
            ["train", "cpu", "--set", "eval.weights=[]"],
            "eval.weights: expected `array` of length >= 1",
        ),
        (
            ["train", "cpu", "--set", "model.raster=10"],
            "data.max_side: 30 is larger than model.raster = 10",
        ),
        (
            ["train", "cpu", "--set", f'data.dev=["{HERE / "task.json"}"]'],
            "eval.foreign: needs two tasks",
        ),
        (["train", "cpu", "--time-limit", "soon"], "--time-limit soon: must look like 8h50m"),
        (["train", "overfit", "--fast"], "has no [fast] table"),
        (["train", "cpu", "--set", "data.train=[]"], "data.train: names no source"),
        (
            [
                "train",
                "cpu",
                "--set",
                "model.encoder.kind=variational",
                "--set",
                "model.encoder.published=true",
            ],
            "train.shards: must be 1",
        ),
        (
            ["train", "feedback-deep", "--set", "train.shards=2"],
            "train.shards: must be 1 where model.unrolled",
        ),
        (
            [
                "train",
                "cpu",
                "--set",
                'data.train=["arc1:evaluation"]',
                "--set",
                "data.policy=refuse",
            ],
            "shares a pair with",
        ),
        (["eval", "nowhere"], "no such checkpoint"),
        (["eval", __file__], "truncated or no safetensors file"),
        (["merge", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["check-submission", "nowhere.json"], "nowhere.json: no such file"),
        (
            ["check-submission", str(HERE / "task.json")],
            "task train, query 0: needs exactly attempt_1 and attempt_2",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(args, said):
    result = call(*args, code=2)
    assert (
        said in result.stderr
        and result.stderr.count("\n") == 1
        and "Traceback" not in result.stderr
    )


def test_a_misspelt_key_of_the_quick_setting_is_said_before_it_is_asked_for(tmp_path):
    said = call(
        "train", bad(tmp_path, '[fast]\n"train.bach" = 3', "c.toml"), "--dry-run", code=2
    ).stderr
    assert "c.toml, [fast]" in said and "train.bach" in said and "batch" in said
    said = call(
        "train", bad(tmp_path, 'run = 3\n[fast]\n"train.batch" = 3', "c.toml"), code=2
    ).stderr
    assert "c.toml: run: " in said
    said = call(
        "train",
        bad(tmp_path, '[fast]\n"fast.x.y" = 3\n"fast.x" = 3\n"fast.x.z" = 3', "c.toml"),
        code=2,
    ).stderr
    assert "c.toml, [fast], fast.x.z: x is not a table" in said


def test_outputs_that_fit_no_canvas_cannot_be_watched(tmp_path):
    large = [{"input": [[1] * 5] * 5, "output": [[k] * 20] * 20} for k in (1, 2)]
    for name in "ab":
        bad(tmp_path, {"train": large, "test": large[:1]}, f"{name}.json")
    sets = [
        f'data.train=["{HERE / "set"}"]',
        f'data.dev=["{tmp_path}"]',
        "data.held_out=[]",
        "data.canvas=10",
    ]
    result = call(
        "train", "cpu", *SETS, *(x for item in sets for x in ("--set", item)), "--dry-run", code=2
    )
    assert (
        "eval.on: no task of the dev set has a query with a known output that fits a canvas"
        in result.stderr
    )


def test_a_checkpoint_of_an_unknown_encoder_is_named(tmp_path, monkeypatch):
    from etrm_arc import encoders

    monkeypatch.setitem(encoders.ENCODERS, "mine", encoders.ENCODERS["matching"])
    call("train", "cpu", *words(tmp_path, "eval.foreign=false", "model.encoder.kind=mine"))
    monkeypatch.delitem(encoders.ENCODERS, "mine")
    said = call("inspect", tmp_path, code=2).stderr
    assert (
        f"{tmp_path}/best.safetensors: its config cannot be read: model.encoder.kind: unknown 'mine'"
        in said
    )


def test_what_is_nested_too_deeply_is_one_line_that_names_it(run, tmp_path):
    deep, copy = "[" * 200_000, tmp_path / "run"
    shutil.copytree(run, copy)
    one = lambda *args: call(*args, code=2).stderr  # noqa: E731
    said = [(one("train", bad(tmp_path, f"x = {deep}", "c.toml")), "c.toml: broken TOML")]
    said.append((one("train", "cpu", "--set", f"train.steps={deep}"), "--set train.steps: "))
    said.append(
        (
            one("merge", bad(tmp_path, deep + "\n", "p.jsonl")),
            "p.jsonl: line 1: no line of predictions",
        )
    )
    said.append((one("check-submission", bad(tmp_path, deep, "s.json")), "s.json: broken JSON"))
    bad(copy, deep + "\n", "metrics.jsonl")
    said.append((one("compare", copy), "metrics.jsonl: line 1: broken JSON"))
    bad(copy, deep, next(copy.glob("state-*.json")).name)
    args = ["train", "cpu", *words(copy, "eval.foreign=false"), "--resume"]
    skipped, line = one(*args).splitlines(True)
    assert skipped.startswith("skipped state-")
    said.append((line, "holds no whole state; skipped: state-"))
    assert "unreadable: ValueError" in call("runs", tmp_path).stdout
    bad(copy, deep, "run.json")
    said.append((one("report", copy), "run.json: broken JSON"))
    assert "unreadable: ValueError" in call("runs", tmp_path).stdout
    for line, words_ in said:
        assert words_ in line and line.count("\n") == 1 and len(line) < 1000, words_


def test_only_where_a_checkpoint_runs_can_be_set(run):
    assert "n_tasks" in last_json(
        call("eval", run, "--set", "eval.tokens=100", "--set", "train.dtype=bf16", "--json")
    )
    assert "may change" in call("eval", run, "--set", "model.hidden=3", code=2).stderr
    said = lambda *args: call("eval", run, "--predictions", run / "new.jsonl", *args, code=2).stderr  # noqa: E731
    for args in (
        ["--vote", "cout"],
        ["--adapt", "all"],
        ["--budget", "0"],
        ["--shard", "0/2"],
        ["--shard", "2/2"],
    ):
        assert said(*args).count("\n") == 1
    for item in (
        "solve.noise=-1",
        "solve.noise=nan",
        "solve.noise=0.1",
        "solve.samples=2",
        "solve.adapt_lr=nan",
    ):
        text = said("--set", item, "--adapt", "context")
        assert item.partition("=")[0] in text and text.count("\n") == 1
    for pattern in ("nothing", "["):
        text = said("--set", f"solve.adapt_weights='{pattern}'", "--adapt", "full")
        assert text.startswith("etrm: solve.adapt_weights: ") and text.count("\n") == 1


def test_an_interrupt_is_one_line_and_says_what_is_kept(run, monkeypatch):
    from etrm_arc import solve

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(solve, "answer", stop)
    result = call("eval", run, "--predictions", run / "new.jsonl", code=130)
    assert result.stderr.count("\n") == 1 and "the same command goes on" in result.stderr


def test_without_a_terminal_progress_is_a_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    say = cli.done_so_far("views")
    for i in range(1, 10):
        now[0] += 40
        say(i / 10)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "views 20.0 %, 5 min left",
        "views 40.0 %, 4 min left",
    ]


def test_a_time_limit_exits_with_75_and_resume_ends_the_run(tmp_path):
    sets = [
        f"run.dir={tmp_path}",
        f'data.train=["{HERE / "set"}"]',
        f'data.dev=["{HERE / "set" / "mirror.json"}"]',
    ]
    more = [
        x for item in [*sets, "data.held_out=[]", "eval.foreign=false"] for x in ("--set", item)
    ]
    args = ["train", "cpu", *SETS, *more]
    assert "stopped (time limit)" in call(*args, "--time-limit", "0s", code=75).stdout
    assert last_json(call(*args, "--resume", "--json"))["step"] == 3


def test_out_of_memory_says_which_knob_to_turn(run, monkeypatch):
    from etrm_arc import solve

    def full(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(solve, "evaluate", full)
    assert "raise train.shards" in call("eval", run, code=2).stderr


def test_an_unwritable_run_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    result = call("train", "cpu", *SETS, "--set", f"run.dir={tmp_path / 'file' / 'run'}", code=2)
    assert "run.dir" in result.stderr


def test_a_run_killed_before_its_first_state_begins_and_ended_ones_may_be_prolonged(tmp_path):
    sources = [
        f'data.train=["{HERE / "set"}"]',
        f'data.dev=["{HERE / "set" / "mirror.json"}"]',
        "data.held_out=[]",
    ]
    items = [*sources, f"run.dir={tmp_path / 'a'}", "data.max_side=10", "eval.foreign=false"]
    more = [x for item in items for x in ("--set", item)]
    assert "holds no whole state" in call("train", "cpu", *SETS, *more, "--resume", code=2).stderr
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "run.json").write_text("{}")  # what is there from a run's first moment
    assert last_json(call("train", "cpu", *SETS, *more, "--resume", "--json"))["step"] == 3
    several = ["train", "cpu", *SETS, *more, "--seeds", "2", "--resume"]
    call(*several)
    assert call(*several).stdout.count("has ended: done") == 2
    assert call(*several, "--set", "train.steps=4").stdout.count("after 4 steps") == 2


@pytest.mark.parametrize(
    "item",
    ["model.expansion=0", "run.seed=-1", "run.seed=1e30", "optimizer.betas=[0.9, 1.0]", "optimizer.lr=-1", "optimizer.weight_decay=-1",
     "data.max_train_tasks=-3", "model.expansion=0.001", "model.expansion=inf", "model.context_tokens=5000",
     "model.raster=65", "model.exploration=7", "model.encoder.layers=-1", "model.encoder.set_layers=0", "model.encoder.kl_weight=-1",
     "model.encoder.layer_scale=-1", "model.q_weight=-1", "train.ema=5", "train.ema=1.0", "train.keep_every=-1",
     "optimizer.warmup=-5", "optimizer.clip=-1", "optimizer.final_lr=-1", "optimizer.table_lr=-1", "optimizer.table_decay=-1",
     "optimizer.lr_scale={'.*' = -1}", "optimizer.decay_scale={'.*' = -1}", "optimizer.freeze_until={'.*' = -1}", "eval.patience=-1",
     "eval.min_gain=-1", "eval.stop_at=-1", "eval.stop_at=2", "data.max_side=0", "data.canvas=-1",
     "train.batch=100000000000000000000", "train.shards=10000000000", "model.halt_max_steps=1e20",
     "data.max_side=99999999999999999999", "data.max_side=31", "solve.views=100000000000000000000000"],
)  # fmt: skip
def test_a_number_out_of_bounds_is_one_line(item):
    said = call("train", "cpu", "--set", item, "--dry-run", code=2).stderr
    assert item.partition("=")[0] in said and said.count("\n") == 1
