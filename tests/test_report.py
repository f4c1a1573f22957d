"""A report shows what the run's files hold; failures are marked where they are, nowhere else."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given

from etrm_arc import checkpoint, score, show, solve, sources
from etrm_arc.config import UserError
from etrm_arc.extras import report
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import SET, tasks_of_all


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def vote(folder, task, *answers, source=""):
    """Answers to the first query of a task, one vote each, in the run's predictions."""
    source = source or solve.opened(folder).source
    votes = [score.Vote(a, view=i, step=1, source=source) for i, a in enumerate(answers)]
    prediction = score.Prediction(task.name, 0, sources.task_hash(task), votes, source=source)
    score.append(folder / "predictions.jsonl", [score.to_line(prediction)])


def test_the_gallery_shows_what_predictions_hold(copy):
    tasks = sources.load([str(SET)])
    right = [t.queries[0][1] for t in tasks]
    wrong = [np.full((1, n), 3, np.uint8) for n in range(20, 25)]
    vote(copy, tasks[0], right[0], right[0], wrong[0])
    vote(copy, tasks[1], wrong[0], wrong[0], right[1])
    vote(copy, tasks[2], *wrong[:1] * 3, *wrong[1:2] * 2, right[2])
    vote(copy, tasks[3], wrong[0], None)
    vote(copy, tasks[3], right[3], source="another solver")
    page = report.page(copy, [str(SET)])
    entries = {e["task"]: e for e in page["gallery"]}
    statuses = ["solved at 1", "solved at 2", "solved by some view", "unsolved"]
    assert [entries[t.name]["status"] for t in tasks[:4]] == statuses and len(entries) == 4
    counts = [[a["votes"] for a in entries[t.name]["answers"]] for t in tasks[:4]]
    assert counts == [[2, 1], [2, 1], [3, 2, 1], [1]] and entries[tasks[3].name]["votes"] == 2
    assert "NOT held out" in page["note"]  # among them are tasks of the training set
    steps = show.timeline(solve.opened(copy), tasks[0], 0).steps
    tokens = [x["tokens"] for x in entries[tasks[0].name]["steps"]]
    assert tokens == [score.canvas_text(x.tokens) for x in steps]


def test_hidden_outputs_and_absent_files_are_said(copy, tmp_path):
    task = json.loads((SET / "mirror.json").read_text())
    task["test"] = [{"input": [[1, 2]]}]
    (tmp_path / "h.json").write_text(json.dumps(task))
    assert "0 queries" in report.page(copy)["note"]
    vote(copy, sources.load([str(tmp_path / "h.json")])[0], np.eye(2, dtype=np.uint8), source="x")
    (tmp_path / "demos.json").write_text(json.dumps({"train": task["train"]}))  # no query
    page = report.page(copy, [str(tmp_path / "h.json"), str(tmp_path / "demos.json")])
    assert [(e["status"], e["target"]) for e in page["gallery"]] == [("output hidden", None)]
    assert "not these weights" in page["note"]
    with pytest.raises(UserError, match="nowhere"):
        report.report(copy, ["nowhere"])
    for weights in copy.glob("*.safetensors"):
        weights.unlink()
    page = report.page(copy)
    assert "neither gallery nor contexts" in page["note"] and page["curves"]


def test_a_run_that_diverged_is_reported_and_shown(copy):
    """Weights, metrics and answers that are not finite: each is drawn as absent."""
    file = copy / "best.safetensors"
    tensors, meta = checkpoint.read(file)
    broken = {k: v * math.nan if v.is_floating_point() else v for k, v in tensors.items()}
    checkpoint.save(file, broken, meta)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "all/lm_loss": null, "grad_norm": null}\n')
    vote(copy, sources.load([str(SET / "mirror.json")])[0], np.eye(2, dtype=np.uint8))
    path, page = report.report(copy, [str(SET)])
    assert "NaN" not in path.read_text() and page["gallery"][0]["steps"]
    assert page["space"] == []


@given(puzzles.generators)
def test_contexts_in_a_plane_keep_their_distances(g):
    n = puzzles.integer(g, 3, 11)
    x = (torch.randn(n, 2, generator=g) @ torch.randn(2, 20, generator=g) + 5).double().numpy()
    points = report.plane({f"t{i}": v for i, v in enumerate(x)})
    at = np.array([(p["x"], p["y"]) for p in points])
    distances = [np.linalg.norm(z[:, None] - z[None], axis=-1) for z in (x, at)]
    assert np.allclose(*distances, atol=1e-5)
    assert [p["task"] for p in points] == [f"t{i}" for i in range(n)]


def test_what_is_no_row_is_left_out(copy):
    good = report.opened(copy).rows
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'\xfe\nnull\n{"lr": 1}\n{"step": 1e999}\n' + b"[" * 100_000 + b"\n\n")
        file.write(b'{"step": 2, "lr": "x"}\n{"step": true}\n')
        file.write(b'{"step": 9, "all/lm_loss": null}\n{"step": 10, "all/lm_lo')  # being written
    run = report.opened(copy)
    assert run.rows[:-1] == good and run.rows[-1]["step"] == 9
    assert report.page(copy)["curves"] and report.compared([run, run])[0]["step"] == 9
    for text in ("[]", '{"config": {"eval": {"on": "dev", "weights": []}}}'):
        (copy / "run.json").write_text(text)
        with pytest.raises(UserError, match="no run of ours"):
            report.opened(copy)


def healthy(n=40):
    """Rows of a run that goes well, an evaluation after every fourth."""
    rows = []
    for i in range(1, n + 1):
        row = {"step": 10 * i, "all/lm_loss": 2 * 0.95**i + 0.02 * (i % 3), "all/kl": 2.0}
        row |= {"encoder/context_var_across": 0.3, "encoder/context_var_within": 0.7}
        rows.append(row | {"encoder/grad_ratio": 0.1})
        if i % 4 == 0:
            losses = {"dev/ema/own/loss": 2 * 0.95**i, "dev/ema/foreign/loss": 2.2 * 0.95**i}
            rows.append({"step": 10 * i} | losses)
    return rows


def marks_of(rows):
    run = report.Run(Path("x"), {}, rows, "dev/ema")
    return [(m["kind"], m["first"], m["last"]) for m in report.failure_marks(run)]


@pytest.mark.parametrize(
    ("kind", "key", "bad"),
    [
        ("collapse", "encoder/context_var_across", 0.006),
        ("collapse", "all/kl", 0.004),
        ("collapse", "dev/ema/foreign/loss", 0.0),
        ("starvation", "encoder/grad_ratio", 0.0),
    ],
)
def test_a_failure_is_marked_where_it_is(kind, key, bad):
    assert marks_of(healthy()) == []
    for first, length in ((2, 5), (6, 100), (5, 2)):
        rows = healthy()
        hit = [r for r in rows if key in r][first : first + length]
        for r in hit:
            r[key] = bad
        marks = [(kind, hit[0]["step"], hit[-1]["step"])]
        assert marks_of(rows) == (marks if length >= report.LEAST else [])


def test_a_loss_that_rises_is_marked_and_a_spike_is_not():
    rows = healthy()
    losses = [r for r in rows if "all/lm_loss" in r]
    losses[20]["all/lm_loss"] = losses[21]["all/lm_loss"] = 9.0
    for r in losses[30:]:  # from 32 on, three of five rows are high
        r["all/lm_loss"] = 1.5
    assert marks_of(rows) == [("divergence", losses[32]["step"], losses[-1]["step"])]


def test_the_page_needs_nothing_but_itself(copy, monkeypatch):
    page = {"title": '</script><img src="http://example.com/x">&"', "facts": math.nan}
    monkeypatch.setattr(report, "page", lambda *_: page)
    text = report.report(copy, ())[0].read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(data) == page | {"facts": None}
    rest = text.replace(data, "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|import\(", rest)
    assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=(?!\"data:)", rest)


def test_curves_show_every_row_and_long_ones_are_thinned(copy):
    rows = report.opened(copy).rows
    for series in (s for panel in report.curves(rows).values() for s in panel):
        points = [(r["step"], r[series["name"]]) for r in rows if series["name"] in r]
        assert list(zip(series["x"], series["y"], strict=True)) == points
    [c] = report.curves([{"step": i, "lr": i / 2} for i in range(3000)])["lr"]
    assert report.POINTS // 2 <= len(c["x"]) <= report.POINTS
    assert list(c["y"]) == [x / 2 for x in c["x"]]


def test_runs_side_by_side(run, copy, tmp_path, monkeypatch):
    about = (copy / "run.json").read_text()
    (copy / "run.json").write_text(about.replace('"batch": 6', '"batch": 4'))
    scores = {"loss": 7.0, "exact": 1.0, "cell_accuracy": 0.5, "n": 2}
    with open(copy / "metrics.jsonl", "a") as file:
        row = {"step": 9} | {f"dev/ema/own/{k}": v for k, v in scores.items()}
        file.write(f"{json.dumps(row)}\n")
    runs = [report.opened(run), report.opened(copy)]
    one, two = report.compared(runs)
    losses = [r["dev/ema/own/loss"] for r in runs[0].rows if "dev/ema/own/loss" in r]
    assert (one["loss"], one["best_loss"]) == (losses[-1], min(losses))
    assert (two["step"], two["loss"], two["best_loss"], two["exact"]) == (9, 7.0, min(losses), 1.0)
    assert {k: (one[k], two[k]) for k in one if "." in k} == {"train.batch": ("6", "4")}
    assert score.with_interval(1.0, 2) in "".join(report.columns([one, two | {"n": math.nan}, two]))
    with pytest.raises(UserError, match="cannot be written"):
        report.save_comparison(runs, [one, two], str(tmp_path / "no" / "t.csv"), "")
    titles = list(report.curves(runs[0].rows))
    assert [a.get_title() for a in report.plotted(runs).axes] == titles
    report.plotted([runs[0]._replace(folder=Path("$\\frac$"))]).draw_without_rendering()
    assert not report.plotted([runs[0]._replace(rows=[])]).axes
    monkeypatch.setattr(score, "load_by_source", lambda *_: {})  # trained without a dev split
    assert len(report.plotted(runs).axes) == len(titles)
    monkeypatch.setattr(score, "load_by_source", lambda *_: {"all": tasks_of_all()})
    fake = SimpleNamespace(TSNE=lambda **_: SimpleNamespace(fit_transform=lambda x: x[:, :2]))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", fake)
    titles += [f"contexts, {how}: {r.folder}" for how in ("PCA", "t-SNE") for r in runs]
    assert [a.get_title() for a in report.plotted(runs).axes] == titles
