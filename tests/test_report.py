"""What a report shows is what the run's files hold; failures are marked where they are and nowhere else."""

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from typer.testing import CliRunner

from etrm_arc import cli, score, show, solve, sources, train
from etrm_arc.config import UserError, load_config, parse_config
from etrm_arc.data import tokenise
from etrm_arc.encoders import init_params
from etrm_arc.tests import puzzles

Image = pytest.importorskip("PIL.Image")
SET = Path(__file__).parent / "data" / "set"
SMALL = [
    "model.hidden=32", "model.expansion=1.0", "model.H_cycles=1", "model.L_cycles=1", "model.halt_max_steps=3", "train.dtype=fp32",
    "train.steps=4", "train.log_every=1", "eval.every=2", "train.batch=8", "eval.act_steps=1", f'data.train=["{SET}"]',
    f'data.dev=["{SET / "mirror.json"}"]', "data.held_out=[]", "eval.foreign=false",
    # whose pictures these tests were written for
    'model.encoder.kind="perceiver"', "model.encoder.layers=2", "model.encoder.set_layers=1", 'model.positions="learned"',
    "data.translate=true", "optimizer.warmup=200", "train.ema=0.999",
]  # fmt: skip


def made(folder, *more):
    train.fit(load_config("cpu", [*SMALL, f"run.dir={folder}", *more]))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("report") / "run")


def call(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def voted(task, *answers, source):
    """A prediction in which these answers to the first query have one vote each."""
    cast = [score.Vote(a, view=i, step=1, source=source) for i, a in enumerate(answers)]
    return score.Prediction(task.name, 0, score.task_hash(task), cast, source=source)


# ---------------------------------------------------------------- gallery


def test_the_gallery_counts_what_predictions_hold(run):
    who, tasks = solve.opened(run).source, sources.load([str(SET)])
    right = [t.queries[0][1] for t in tasks]
    wrong = [np.full((1, n), 3, np.uint8) for n in range(20, 25)]
    cast = {
        0: [right[0], right[0], wrong[0]],
        1: [wrong[0], wrong[0], right[1]],
        2: [wrong[0], wrong[0], wrong[0], wrong[1], wrong[1], right[2]],
        3: [wrong[0], None],
        4: [],
    }  # the sixth task was not asked
    lines = [voted(tasks[i], *answers, source=who) for i, answers in cast.items()]
    lines[4] = lines[4]._replace(too_large=31)
    stranger = voted(tasks[3], right[3], source="other")
    file = run / "predictions.jsonl"
    file.unlink(missing_ok=True)
    score.append(file, [*lines, stranger])
    found = show.page(run, [str(SET)])
    entries = {e["task"]: e for e in found["gallery"]}
    want = ["solved at 1", "solved at 2", "solved by some view", "unsolved", "unsolved"]
    assert [entries[t.name]["status"] for t in tasks[:5]] == want and len(entries) == len(
        found["gallery"]
    ) == 5
    on_disk = [json.loads(line) for line in file.read_text().splitlines()]
    for line in (x for x in on_disk if x["source"] == who):
        e = entries[line["task"]]
        count = Counter(v["grid"] for v in line["votes"] if v["grid"])
        assert {a["grid"]: a["votes"] for a in e["answers"]} == count and e["votes"] == len(
            line["votes"]
        )
        assert [a["grid"] == e["target"] for a in e["answers"]] == [
            a["right"] for a in e["answers"]
        ]
        assert len(e["steps"]) == 3
    note = found["notes"][0]
    assert (
        "pass@1 20.0 % (n = 5, 95 % 3.6 to 62.4), pass@2 40.0 % (n = 5, 95 % 11.8 to 76.9)" in note
    )
    assert "NOT held out" in note and "1 other voters" in note
    assert {name: len(d) for name, d in found["demos"].items()} == {
        t.name: len(t.demos) for t in tasks
    }
    drawn = show.timeline(solve.opened(run).params, solve.opened(run).cfg, tasks[0])
    assert [s["tokens"] for s in entries[tasks[0].name]["steps"]] == [
        score.signs(s.tokens) for s in drawn.steps
    ]
    assert [s["q"] for s in entries[tasks[0].name]["steps"]] == pytest.approx(
        [s.q for s in drawn.steps], abs=1e-4
    )


def test_outputs_that_are_hidden_have_no_status(run, tmp_path):
    task = sources.load([str(SET)])[0]
    hidden = {
        "train": [{"input": x.tolist(), "output": y.tolist()} for x, y in task.demos],
        "test": [{"input": [[1]]}],
    }
    (tmp_path / "h.json").write_text(json.dumps(hidden))
    asked = sources.load([str(tmp_path / "h.json")])[0]
    (run / "predictions.jsonl").unlink(missing_ok=True)
    score.append(
        run / "predictions.jsonl", [voted(asked, np.eye(2, dtype=np.uint8), source="someone")]
    )
    found = show.page(run, [str(tmp_path / "h.json")])
    assert [(e["status"], e["target"]) for e in found["gallery"]] == [("output hidden", None)]
    assert (
        "not these weights, or adapted" in found["notes"][0]
        and "no output is known" in found["notes"][0]
    )
    assert "no task of" in show.page(run)["notes"][0]  # the dev split was not asked


def test_what_is_not_there_is_said(run, tmp_path):
    (run / "predictions.jsonl").unlink(missing_ok=True)
    found = show.page(run)
    assert (
        not found["gallery"]
        and "predictions.jsonl is absent" in found["notes"][0]
        and found["space"]["points"]
    )
    young = tmp_path / "young"
    young.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (young / name).write_text((run / name).read_text())
    with open(young / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "all/lm_lo')  # being written, or cut off by a kill
    found = show.page(young)
    assert (
        "neither best.safetensors nor last.safetensors" in found["notes"][0]
        and found["curves"]
        and not found["space"]["points"]
    )
    assert show.opened(young).rows == show.opened(run).rows
    (young / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl: line 2: broken JSON"):
        show.opened(young)
    (young / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no run of ours"):
        show.opened(young)
    assert "run.json: no such file" in call("report", tmp_path, code=2).stderr


# ---------------------------------------------------------------- known failures


def healthy(n=40):
    """Rows of a run that goes well, an evaluation after every fourth."""
    rows = []
    for i in range(1, n + 1):
        row = {
            "step": 10 * i,
            "all/lm_loss": 2 * 0.95**i + 0.02 * (i % 3),
            "grad_norm": 1.0,
            "skipped_steps": 0,
            "all/kl": 2.0,
        }
        row |= {
            "encoder/context_var_across": 0.3,
            "encoder/context_mean": 0.1,
            "encoder/context_std": 1.0,
            "encoder/grad_ratio": 0.1,
        }
        rows.append(row)
        if i % 4 == 0:
            rows.append(
                {
                    "step": 10 * i,
                    "dev/ema/own/loss": 2 * 0.95**i,
                    "dev/ema/foreign/loss": 2.2 * 0.95**i,
                }
            )
    return rows


def found_in(rows):
    about = {"config": {"eval": {"on": "dev", "weights": ["ema"]}}}
    return [
        (m.kind, m.first, m.last)
        for m in show.failure_marks(show.Run(Path("x"), about, rows, "dev/ema/own"))
    ]


FAILURES = [
    ("collapse", "encoder/context_var_across", lambda r: 0.009, 3),
    ("collapse", "all/kl", lambda r: 0.004, 3),
    ("collapse", "dev/ema/foreign/loss", lambda r: 1.005 * r["dev/ema/own/loss"], 3),
    ("starvation", "encoder/grad_ratio", lambda r: 0.0, 3),
    ("divergence", "grad_norm", lambda r: math.inf, 1),
    ("divergence", "all/lm_loss", lambda r: math.nan, 1),
]


@pytest.mark.parametrize("kind, key, bad, least", FAILURES)
def test_a_failure_is_marked_where_it_is(kind, key, bad, least):
    assert found_in(healthy()) == []
    for first, length in ((8, 20), (12, 8), (20, 100)):  # rows that say it
        rows = healthy()
        hit = [r for r in rows if key in r]
        first = min(first, len(hit) - 4)
        for r in hit[first : first + length]:
            r[key] = bad(r)
        after = hit[first + length]["step"] if first + length < len(hit) else None
        assert found_in(rows) == [(kind, hit[first]["step"], after)]
    rows = healthy()
    for r in [r for r in rows if key in r][5 : 5 + least - 1]:
        r[key] = bad(r)
    assert found_in(rows) == []  # too short
    assert (
        found_in([{k: v for k, v in r.items() if k != key} for r in healthy()]) == []
    )  # a run that does not say it


def test_what_was_not_measured_is_not_said_to_be_well(run):
    whole, bare = (
        show.opened(run)._replace(rows=rows)
        for rows in (healthy(), [{"step": 1, "grad_norm": 1.0}])
    )
    assert show.clear(whole) == "No sign of collapse. No sign of starvation. No sign of divergence."
    assert (
        show.clear(bare)
        == "The rows say nothing of collapse. The rows say nothing of starvation. No sign of divergence."
    )
    assert show.page(run)["clear"] == show.clear(show.opened(run))


def test_a_loss_that_rises_is_marked_and_a_spike_is_not():
    rows = healthy()
    losses = [r for r in rows if "all/lm_loss" in r]
    losses[20]["all/lm_loss"] = losses[21]["all/lm_loss"] = 9.0
    assert found_in(rows) == []
    for r in losses[30:]:
        r["all/lm_loss"] = 1.5
    assert found_in(rows) == [
        ("divergence", losses[32]["step"], None)
    ]  # when three of five rows have risen
    rows = healthy()
    [r for r in rows if "grad_norm" in r][7]["skipped_steps"] = 1
    assert found_in(rows[:10]) == [("divergence", 80, None)]


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_spans_are_the_stretches_that_last(bad, least):
    said = list(enumerate(bad))
    found = show.spans(said, least)
    inside = {step for a, b in found for step in range(a, len(bad) if b is None else b)}
    for step, is_bad in said:
        left = next((k for k in range(step, -1, -1) if not bad[k]), -1)
        right = next((k for k in range(step, len(bad)) if not bad[k]), len(bad))
        assert (step in inside) == (is_bad and right - left - 1 >= least)


# ---------------------------------------------------------------- curves, contexts, the page


@given(st.integers(0, 3000), st.integers(0, 9))
def test_a_long_curve_is_thinned_and_keeps_its_mean(n, broken):
    rows = [{"step": i, "lr": float(i)} for i in range(n)]
    c = show.curve(rows, "lr")
    assert len(c.x) == len(c.y) <= show.POINTS and (c.x[-1:] == [n - 1] if n else not c.x)
    if n and n % len(c.y) == 0:
        assert np.mean(c.y) == pytest.approx((n - 1) / 2, rel=1e-3, abs=1e-3)
    if n <= show.POINTS:
        assert c.y == [r["lr"] for r in rows]
    for r in rows[:broken]:
        r["lr"] = math.nan
    assert (show.curve(rows, "lr").y[:1] == [None]) == (n > 0 and broken > 0)


@given(puzzles.generators)
def test_the_plane_keeps_the_distances_of_what_lies_in_one(g):
    n = int(torch.randint(3, 12, (), generator=g))
    x = (torch.randn(n, 2, generator=g) @ torch.randn(2, 20, generator=g) + 5).double().numpy()
    at, shares = show.plane(x)
    apart = [np.linalg.norm(z[:, None] - z[None], axis=-1) for z in (x, at)]
    assert (
        np.allclose(*apart, atol=1e-5)
        and sum(shares) == pytest.approx(1)
        and shares[0] >= shares[1]
    )


@pytest.mark.parametrize("kind", ["perceiver", "recurrent", "lpn_variational"])
def test_contexts_are_those_of_the_tasks_and_need_no_output(kind):
    model = {
        "hidden": 32,
        "heads": 2,
        "expansion": 1.0,
        "context_tokens": 4,
        "encoder": {"kind": kind},
    }
    cfg = parse_config(
        {"model": model, "train": {"dtype": "fp32"}, "data": {"max_side": 8}},
        "test",
    )
    params, g = init_params(cfg.model, 0), torch.Generator().manual_seed(3)
    tasks = [
        puzzles.task(g, f"t{i}", 6 - i, 6 - i) for i in range(6)
    ]  # batches go by size: not in this order
    big = tasks[2]._replace(demos=[(np.ones((9, 9), np.uint8),) * 2])
    rows, x = show.contexts(params, cfg, [*tasks[:2], big, *tasks[3:]])
    assert sorted(rows) == [0, 1, 3, 4, 5] != rows and x.shape == (
        5,
        4 * 32,
    )  # there is no canvas for the third
    for row, context in zip(rows, x, strict=True):
        alone, y = show.contexts(params, cfg, [tasks[row]._replace(queries=[])])
        assert alone == [0] and np.allclose(context, y[0], atol=1e-4)
    assert np.linalg.norm(x - x[0], axis=1)[1:].min() > 1e-3


def test_the_page_needs_nothing_but_itself(run):
    nasty = '</script><img src="http://example.com/x">&"'
    found = show.page(run) | {"title": nasty, "facts": math.nan}
    text = show.html(found)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    back = json.loads(data)
    assert (
        back["title"] == nasty
        and back["facts"] is None
        and len(back["curves"]) == len(found["curves"])
    )
    page = text.replace(data, "")
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(|<link[^>]+href=(?!\"data:)",
        page,
    )
    assert not re.search(r"<(script|img|iframe|link)[^>]+src=", page)
    rows = show.opened(run).rows
    for c in found["curves"]:
        for s in c["series"]:
            want = [(r["step"], r[s["name"]]) for r in rows if s["name"] in r]
            assert s["x"] == [x for x, _ in want] and s["y"] == pytest.approx(
                [y for _, y in want], rel=1e-4
            )
    shown = {s["name"] for c in found["curves"] for s in c["series"]}
    assert {
        "all/lm_loss",
        "dev/ema/own/loss",
        "halted/steps",
        "samples_per_s",
        "grad_norm",
        "lr",
    } <= shown


# ---------------------------------------------------------------- runs side by side


def test_runs_side_by_side(run, tmp_path):
    other = made(
        tmp_path / "other",
        "train.batch=4",
        "model.L_cycles=2",
        "eval.foreign=true",
        "data.dev=[]",
        "eval.on=train",
    )
    result = call(
        "compare", run, other, "--csv", tmp_path / "t.csv", "--plot", tmp_path / "p.png", "--json"
    )
    one, two = json.loads(result.stdout.splitlines()[-1])["runs"]
    losses = [r["dev/ema/own/loss"] for r in show.opened(run).rows if "dev/ema/own/loss" in r]
    assert len(losses) == 2 and (one["loss"], one["best_loss"]) == (losses[-1], min(losses))
    assert (one["step"], one["samples"], two["samples"]) == (4, 32, 16) and one[
        "foreign_gap"
    ] is None
    last = show.opened(other).rows[-1]
    assert two["n"] == last["train/ema/own/n"] and two["exact95"] == list(
        score.wilson(two["exact"], two["n"])
    )
    assert (
        two["foreign_gap"] == last["train/ema/foreign/loss"] - last["train/ema/own/loss"]
        and two["watched"] == "train/ema/own"
    )
    assert two["best_cell_accuracy"] >= two["cell_accuracy"] == last["train/ema/own/cell_accuracy"]
    assert {k for k in one if "." in k} == {
        "train.batch",
        "model.L_cycles",
        "eval.foreign",
        "data.dev",
        "eval.on",
    }
    assert (one["train.batch"], two["train.batch"]) == ("8", "4")
    with open(tmp_path / "t.csv", newline="") as f:
        lines = list(csv.DictReader(f))
    assert [float(r["loss"]) for r in lines] == [one["loss"], two["loss"]] and list(
        lines[0]
    ) == list(one)
    printed = dict(
        line.split(maxsplit=1)
        for line in result.stdout.splitlines()[: len(one)]
        if len(line.split()) > 1
    )
    assert printed["train.batch"].split() == ["8", "4"] and printed["samples"].split() == [
        "32",
        "16",
    ]
    panels = len({c["title"] for r in (run, other) for c in show.curves(show.opened(r).rows)})
    assert f"p.png: {panels} panels" in result.stdout
    image = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    image = image[: len(image) * 9 // 10].reshape(-1, 3)  # the names of the runs stand below
    for colour in ((31, 119, 180), (255, 127, 14)):  # of the first and of the second run
        assert (image == colour).all(1).sum() > 50
    assert (
        "cannot be written"
        in call("compare", run, "--plot", tmp_path / "no" / "p.png", code=2).stderr
    )


def test_the_commands_write_where_they_are_told(run, tmp_path):
    result = call("report", run, "-o", tmp_path / "r.html", "--json")
    said = json.loads(result.stdout.splitlines()[-1])
    assert (
        said["output"] == str(tmp_path / "r.html") and said["gallery"] == {} and said["marks"] == []
    )
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    call("report", run, "--data", SET)
    assert (run / "report.html").exists()
    assert (
        "cannot be written" in call("report", run, "-o", tmp_path / "no" / "r.html", code=2).stderr
    )


# ---------------------------------------------------------------- the picture of a real run


def test_borders_of_a_real_run_are_read_back_from_its_picture(run, tmp_path):
    """Every cell of every step, where the panel lies in the whole picture."""
    s, task = solve.opened(run), show.find_task([str(SET)], "flip")
    t = show.timeline(s.params, s.cfg, task)
    figure, panels = show.picture(t)
    assert call("show", run, "-t", task.name, "-o", tmp_path / "a.png").exit_code == 0
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    figure.set_dpi(150)
    assert image.shape[:2] == tuple(round(float(x) * 150) for x in figure.get_size_inches()[::-1])
    label = tokenise(t.target, t.steps[0].tokens.shape)
    seen = Counter()
    for step, axis in zip(t.steps, panels[-3:], strict=True):
        for (r, c), token in np.ndenumerate(step.tokens):
            x, y = axis.transData.transform((c - 0.43, r))
            pixel = tuple(image[image.shape[0] - 1 - int(y), int(x)].tolist())
            want = show.RIGHT if token == label[r, c] else show.WRONG
            if label[r, c] >= 2 or token >= 2:
                assert pixel == tuple(int(want[i : i + 2], 16) for i in (1, 3, 5)), (
                    step.number,
                    r,
                    c,
                )
                seen[want] += 1
    assert seen[show.RIGHT] > 3 and seen[show.WRONG] > 3
