"""Predictions that depend on nothing they should not see, go on where they stopped, and say what they are worth."""

import json
import re
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from etrm_arc import checkpoint, cli, config, data, etrm, score, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.data import Symmetry, Task
from etrm_arc.etrm import leaves
from etrm_arc.tests.puzzles import SET, lines, tasks_of_all, told, with_solve

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- what a prediction may depend on


def test_predictions_do_not_depend_on_hidden_outputs_or_on_the_other_tasks(run):
    s = solve.opened(run)
    tasks = tasks_of_all()
    hidden = [t._replace(queries=[(x, None) for x, _ in t.queries]) for t in tasks]
    noise = [t._replace(queries=[(x, 9 - x[:1, :1]) for x, _ in t.queries]) for t in tasks]
    full = solve.predict(s.params, s.cfg, tasks)
    assert (
        told(full)
        == told(solve.predict(s.params, s.cfg, noise))
        == told(solve.predict(s.params, s.cfg, hidden))
    )
    assert all(len(p.votes) == 3 for p in full)
    for task, p in zip(tasks[:2], full, strict=False):
        alone = solve.predict(s.params, s.cfg, task)[0]
        for a, b in zip(alone.votes, p.votes, strict=True):
            assert (a.grid is None) == (b.grid is None) and a.q == pytest.approx(b.q, abs=1e-4)


@pytest.mark.parametrize("adapted", ["none", "context", "full", "joint"])
def test_solutions_replaced_by_noise_change_no_prediction(run, tmp_path, adapted):
    """Through the command's own path, files and all: what is on disk is the same, the score is not."""
    found = []
    for name, spoil in (("true", lambda y: y), ("noise", lambda y: [[9 - y[0][0]]])):
        (tmp_path / name).mkdir()
        for file in SET.glob("*.json"):
            raw = json.loads(file.read_text())
            raw["test"] = [{"input": p["input"], "output": spoil(p["output"])} for p in raw["test"]]
            (tmp_path / name / file.name).write_text(json.dumps(raw))
        sets = [f'solve.adapt="{adapted}"', "solve.adapt_steps=2", "solve.adapt_batch=6"]
        file = tmp_path / f"{name}.jsonl"
        solve.evaluate([run], [str(tmp_path / name)], sets, predictions_file=str(file))
        found.append(lines(file))
    assert found[0] == found[1] and len(found[0]) == 6


def copying(monkeypatch, canvas_of=lambda batch: batch.inputs):
    """A model that answers with its input."""

    def think(params, cfg, encode, batch, dtype, steps, leave, look, before, stable):
        q = torch.zeros(len(batch.cells))
        out = etrm.Output(etrm.F.one_hot(canvas_of(batch), 12).float(), q, q)
        for step in range(1, steps + 1):
            look(step, range(len(q)), out)
        return out, torch.full((len(q),), steps)

    monkeypatch.setattr(etrm, "think", think)


@pytest.mark.parametrize("dihedral", [True, False])
@pytest.mark.parametrize("colours", ["fixed", "keep_black", "all"])
def test_an_oracle_scores_one_under_every_set_of_symmetries_and_a_constant_nothing(
    run, tmp_path, monkeypatch, dihedral, colours
):
    """Of tasks whose output is their input, the model that copies is the oracle."""
    same = [t._replace(queries=[(x, x) for x, _ in t.queries]) for t in tasks_of_all()]
    s = solve.opened(run)
    cfg = msgspec.structs.replace(
        s.cfg, data=msgspec.structs.replace(s.cfg.data, dihedral=dihedral, colours=colours)
    )
    copying(monkeypatch)
    made = solve.predict(s.params, cfg, same, 12)
    scored = score.score(same, made)
    assert [scored[k] for k in ("pass@1", "oracle", "exact_match", "shape_accuracy")] == [1.0] * 4
    assert all(len(p.votes) == 12 and all(v.grid is not None for v in p.votes) for p in made)
    copying(monkeypatch, lambda batch: torch.full_like(batch.inputs, 4))
    assert score.score(same, solve.predict(s.params, cfg, same, 12))["oracle"] == 0


def test_evaluation_agrees_with_what_training_watches(run):
    """One view, no symmetry: exact match and cell accuracy are those of train.probe."""
    s, tasks = solve.opened(run), tasks_of_all()
    scored = score.score(tasks, solve.predict(s.params, s.cfg, tasks, 1))
    probed = train.probe(s.params, s.cfg, data.pack(tasks), "test", torch.float32)
    assert (
        scored["cell_accuracy"] == pytest.approx(probed["cell_accuracy"], abs=1e-6)
        and probed["cell_accuracy"] > 0
    )
    assert scored["exact_match"] == probed["exact"]


def test_the_logp_of_an_answer_is_that_of_its_cells_and_border(run):
    s = solve.opened(run)
    logits = torch.randn(4 * 5, 12, generator=torch.Generator().manual_seed(0))
    label = torch.from_numpy(data.tokenise(np.full((2, 3), 7, np.uint8), (4, 5))).long().flatten()
    logits[label > 0] += 9 * etrm.F.one_hot(label[label > 0], 12)
    vote = solve.vote_of(s.cfg, logits, (4, 5), data.identity())
    assert score.written(vote.grid) == "777/777"
    want = (
        -etrm.act_loss(
            s.cfg.model,
            etrm.Output(logits, *torch.zeros(2, 1)),
            torch.where(label > 0, label, -1),
            [20],
        ).lm
        * 11
    )
    assert vote.logp == pytest.approx(float(want), abs=1e-4)
    logits[0, 9] = torch.inf  # as half precision may give: its probability is no number
    assert solve.vote_of(s.cfg, logits, (4, 5), data.identity()).grid is None


def test_symmetries_of_views_are_a_function_of_the_task_alone(run):
    s, task = solve.opened(run), tasks_of_all()[1]
    found = [score.view(task, 0, k, s.cfg.data) for k in range(20)]
    assert len({(int(sym.dihedral), tuple(sym.colours.tolist())) for sym, _ in found}) > 10
    assert isinstance(found[0][0], Symmetry) and int(found[0][0].dihedral) == 0
    spoilt = task._replace(name="x", queries=[(x, 9 - y) for x, y in task.queries])
    assert all(
        torch.equal(score.view(spoilt, 0, k, s.cfg.data)[1], lots)
        for k, (_, lots) in enumerate(found)
    )


# ---------------------------------------------------------------- steps, samples, noise


def test_votes_of_several_steps_and_noise_with_selection_by_q(run):
    s, tasks = solve.opened(run), tasks_of_all()
    head = torch.randn(
        2, 32, generator=torch.Generator().manual_seed(0)
    )  # four steps of training left it at 0
    s = s._replace(params=s.params._replace(core=s.params.core._replace(q_weight=head)))
    plain = solve.predict(s.params, s.cfg, tasks)
    both = solve.predict(s.params, with_solve(s.cfg, steps=(1, 2, 9)), tasks)
    assert [[(v.view, v.step) for v in p.votes] for p in both] == [
        [(v, t) for v in range(3) for t in (1, 2)]
    ] * 6
    assert told([p._replace(votes=[v for v in p.votes if v.step == 2]) for p in both]) == told(
        plain
    )
    assert told(solve.predict(s.params, with_solve(s.cfg, samples=4), tasks)) == told(
        plain
    )  # no noise: nothing to choose from
    noisy = solve.predict(s.params, with_solve(s.cfg, samples=4, noise=0.5), tasks)
    assert told(noisy) == told(
        solve.predict(s.params, with_solve(s.cfg, samples=4, noise=0.5), tasks)
    )
    better = [
        b.q - a.q
        for p, n in zip(plain, noisy, strict=True)
        for a, b in zip(p.votes, n.votes, strict=True)
    ]
    assert min(better) > -1e-4 and max(better) > 1e-4  # the first sample is the plain one


# ---------------------------------------------------------------- going on, sharding, merging


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(run, tmp_path, monkeypatch):
    whole, broken, sets = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl", ["eval.tokens=300"]
    solve.evaluate([run], [str(SET)], sets, predictions_file=str(whole))
    append, count = score.append, []

    def dying(path, made):
        append(path, made)
        count.append(1)
        if len(count) == 3:
            with open(path, "a") as f:
                f.write('{"task": "cut of')
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(score, "append", dying)
        solve.evaluate([run], [str(SET)], sets, predictions_file=str(broken))
    assert 0 < sum(len(p[2]) for p in lines(broken)) < 18
    solve.evaluate([run], [str(SET)], sets, predictions_file=str(broken))
    close = [[(v[0], v[1], v[4]) for v in p[2]] for p in sorted(lines(whole))]
    assert close == [[(v[0], v[1], v[4]) for v in p[2]] for p in sorted(lines(broken))]
    with monkeypatch.context() as m:
        m.setattr(etrm, "think", None)  # all is there: nothing is asked again
        again = solve.evaluate([run], [str(SET)], sets, predictions_file=str(broken))
    assert again["votes"] == 18


def test_more_views_are_added_to_those_that_are_there(run, tmp_path):
    file = str(tmp_path / "p.jsonl")
    assert (
        solve.evaluate([run], [str(SET)], ["solve.views=2"], predictions_file=file)["votes"] == 12
    )
    assert (
        solve.evaluate([run], [str(SET)], ["solve.views=5"], predictions_file=file)["votes"] == 30
    )
    assert (
        solve.evaluate([run], [str(SET)], ["solve.views=2"], predictions_file=file)["votes"] == 12
    )
    assert len([v for p in score.read(Path(file)) for v in p.votes]) == 30


def test_shards_and_checkpoints_join(run, tmp_path):
    data_ = [str(SET)]
    whole = solve.evaluate([run], data_, predictions_file=str(tmp_path / "whole.jsonl"))
    for i in (1, 2):
        solve.evaluate([run], data_, predictions_file=str(tmp_path / f"{i}.jsonl"), shard=f"{i}/2")
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    joined = solve.merge(
        files, data_, "count", str(tmp_path / "all.jsonl"), str(tmp_path / "sub.json")
    )
    assert joined["pass@2"] == whole["pass@2"] and joined["cell_accuracy"] == pytest.approx(
        whole["cell_accuracy"]
    )
    assert joined["votes"] == 18 == sum(len(p.votes) for p in score.read(tmp_path / "all.jsonl"))
    assert score.check_submission(tmp_path / "sub.json").keys() == {t.name for t in tasks_of_all()}
    more = solve.merge([*files, tmp_path / "all.jsonl", tmp_path / "sub.json"], [], "count")
    assert more["votes"] == 18 + 12 and "pass@2" not in more
    c = checkpoint.load(run)
    own = {
        f"{k}.{path}": 1.1 * v
        for k in ("params", "ema")
        for path, v in leaves(getattr(c, k)).items()
    }
    checkpoint.save(tmp_path / "other.safetensors", own, c.meta)
    both = solve.evaluate(
        [run, tmp_path / "other.safetensors"], data_, predictions_file=str(tmp_path / "whole.jsonl")
    )
    assert both["votes"] == 36 and len(both["checkpoints"]) == 2
    with pytest.raises(UserError, match="--shard 3/2"):
        solve.evaluate([run], data_, shard="3/2")
    with pytest.raises(UserError, match="name the tasks"):
        solve.merge(files, [], "count", submit=str(tmp_path / "sub.json"))


def test_a_budget_ends_the_views_and_loses_nothing(run, tmp_path, monkeypatch):
    file, sets = str(tmp_path / "p.jsonl"), ["solve.views=64", "eval.tokens=300"]
    with pytest.raises(UserError, match="not enough for a single view"):
        solve.evaluate(
            [run],
            [str(SET)],
            sets,
            predictions_file=file,
            budget=0.0,
            submit=str(tmp_path / "sub.json"),
        )
    assert score.check_submission(tmp_path / "sub.json").keys() == {
        t.name for t in tasks_of_all()
    }  # valid all the same
    think = etrm.think

    def slow(*args):
        time.sleep(0.05)
        return think(*args)

    monkeypatch.setattr(etrm, "think", slow)
    part = solve.evaluate(
        [run],
        [str(SET)],
        sets,
        predictions_file=file,
        budget=1.0,
        submit=str(tmp_path / "sub.json"),
    )
    assert 0 < part["votes"] < 64 * 6 and part["n_tasks"] == 6
    counts = [len(p.votes) for p in score.joined(tasks_of_all(), score.read(Path(file)))]
    assert max(counts) <= 2 * max(1, min(counts)) + 1  # spent on all queries alike
    assert len(score.check_submission(tmp_path / "sub.json")) == 6


def test_the_votes_of_each_way_of_answering_are_kept_apart(run, tmp_path):
    file = str(tmp_path / "p.jsonl")
    for sets in (
        [],
        ['solve.vote="demos"'],
        ['solve.leave="stable"'],
        ['solve.adapt="context"', "solve.adapt_steps=1"],
    ):
        assert solve.evaluate([run], [str(SET)], sets, predictions_file=file)["votes"] == 18
    made = score.read(Path(file))
    assert len({p.source for p in made}) == 4 and len([v for p in made for v in p.votes]) == 72
    assert (
        solve.evaluate([run], [str(SET)], ['solve.vote="probability"'], predictions_file=file)[
            "votes"
        ]
        == 18
    )
    assert len(score.read(Path(file))) == len(made)  # another rule, the same votes


# ---------------------------------------------------------------- what it is worth


def test_evaluate_says_what_was_held_out_and_counts_looks(run):
    dev = solve.evaluate([run])
    assert dev["held_out"] is True and dev["n_tasks"] == 1 and "look" not in dev
    assert solve.evaluate([run], [str(SET / "double.json")])["held_out"] is False
    looks = [solve.evaluate([run], [str(SET / "flip.json")])["look"] for _ in range(2)]
    assert looks[1] == looks[0] + 1
    assert "look" not in solve.evaluate(
        [run], [str(SET)], shard="2/2"
    )  # which is without that task
    assert solve.evaluate([run], [str(SET)])["look"] == looks[0] + 2


def test_looks_are_those_at_the_task_that_was_looked_at_most(tmp_path):
    tasks, nowhere = sources.load(["arc2:evaluation"], 6), tmp_path / "nowhere"
    look = lambda ts, *folders: solve.looked(
        set(folders) or {tmp_path}, ["no/such/source"], {"x": ts}, 0.5
    )  # noqa: E731
    assert look(tasks[::2]) == look(tasks[1::2]) == {"look": 1}  # two shards are one look
    assert (
        look(tasks) == {"look": 2}
        and look(tasks[:1]) == {"look": 3}
        and look(tasks[1:2]) == {"look": 3}
    )
    assert look(tasks, tmp_path, nowhere) == {"look": None} and look(tasks_of_all()) == {}
    made = sources.load("composed-held-out:3")
    assert solve.looked({tmp_path}, ["composed-held-out:2"], {"x": made[:1]}, 0.5) == {"look": 1}
    assert (
        solve.looked(
            {tmp_path}, ["composed-held-out:2", "composed-elsewhere"], {"x": made[2:]}, 0.5
        )
        == {}
    )
    assert {"data", "tasks", "pass@2", "time"} == json.loads(
        (tmp_path / "looks.jsonl").read_text().splitlines()[0]
    ).keys()


def test_the_second_evaluation_set_is_scored_beside_the_first_without_what_they_share():
    found = solve.wanted(["arc1:evaluation", "arc2:evaluation"], 0, True)
    assert [len(ts) for ts in found.values()] == [400, 114]


def test_where_a_checkpoint_cannot_be_written_beside_votes_lie_here(run, tmp_path, monkeypatch):
    before = sorted(run.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(solve.os, "access", lambda path, mode: Path(path) != run)
    result = solve.evaluate([run], [str(SET)])
    assert (
        result["predictions"] == "predictions.jsonl"
        and result["look"] == 1
        and sorted(run.iterdir()) == before
    )
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.jsonl", "looks.jsonl"}
    with pytest.raises(
        UserError, match="nowhere/s.json: cannot be written"
    ):  # said before anything is asked
        monkeypatch.setattr(etrm, "think", None)
        solve.evaluate([run], [str(SET)], ["solve.leave=stable"], submit="nowhere/s.json")


def test_weights_that_are_no_numbers_give_no_answer_and_whole_lines(run, tmp_path):
    c = checkpoint.load(run)
    own = {
        f"{k}.{path}": v * float("nan")
        for k in ("params", "ema")
        for path, v in leaves(getattr(c, k)).items()
    }
    checkpoint.save(tmp_path / "nan.safetensors", own, c.meta)
    result = solve.evaluate([tmp_path / "nan.safetensors"], [str(SET)])
    assert result["oracle"] == 0 and result["votes"] == 18
    assert all(v.grid is None for p in score.read(tmp_path / "predictions.jsonl") for v in p.votes)


def test_who_votes_depends_on_all_that_decides_the_answers(run, tmp_path):
    c = checkpoint.load(run)
    own = {f"{k}.{path}": v for k in ("params", "ema") for path, v in leaves(getattr(c, k)).items()}

    def source(*sets, **change):
        for key, value in change.items():
            table, _, name = key.partition("__")
            c.meta["config"][table][name] = value
        checkpoint.save(tmp_path / "c.safetensors", own, c.meta)
        return solve.opened(tmp_path / "c.safetensors", sets).source

    plain, joint = source(), source("solve.adapt=joint")
    assert plain == source("solve.views=9", "eval.tokens=50", "solve.vote=probability")
    assert (
        len(
            {
                plain,
                joint,
                source("solve.stable=2"),
                source("solve.vote=demos"),
                source(model__halt_max_steps=3),
            }
        )
        == 5
    )
    assert source() != source(data__colours="all")
    assert source() == source(optimizer__lr=0.5) and source("solve.adapt=full") != joint
    assert source("solve.adapt=full") != source("solve.adapt=full", optimizer__kind="adamw")


def test_checkpoints_that_vote_together_vote_by_the_rule_of_the_first(run, tmp_path):
    c = checkpoint.load(run)
    own = {
        f"{k}.{path}": 1.1 * v
        for k in ("params", "ema")
        for path, v in leaves(getattr(c, k)).items()
    }
    c.meta["config"]["solve"] |= {"vote": "demos", "adapt": "context", "adapt_steps": 1}
    checkpoint.save(tmp_path / "other.safetensors", own, c.meta)
    both = [tmp_path / "other.safetensors", run]
    result = solve.evaluate(both, [str(SET)], predictions_file=str(tmp_path / "p.jsonl"))
    assert (
        result["votes"] == 36
        and result["vote"] == "demos"
        and result["adaptation"] == "context search and no adaptation"
    )


def test_a_task_of_an_earlier_source_is_left_out_of_later_ones_and_another_of_its_id_is_not(
    run, tmp_path
):
    (tmp_path / "other").mkdir()
    for name in ("flip.json", "new.json", "mirror.json"):
        (tmp_path / "other" / name).write_text((SET / "mirror.json").read_text())
    chosen = [str(SET), str(tmp_path / "other")]
    result = solve.evaluate([run], chosen, predictions_file=str(tmp_path / "p.jsonl"))
    assert {k: v["n_tasks"] for k, v in result["by_source"].items()} == {chosen[0]: 6, chosen[1]: 2}
    assert result["n_tasks"] == 8
    assert [t.name for t in solve.wanted(chosen, 0, True)[chosen[1]]] == ["flip#2", "new"]
    assert [len(ts) for ts in solve.wanted(chosen, 7, True).values()] == [
        6,
        1,
    ]  # a limit of all, as in training


def test_tasks_without_solutions_are_predicted_and_not_scored(run, tmp_path):
    file = tmp_path / "arc-agi_test_challenges.json"
    hidden = {t.name: {"train": [{"input": x.tolist(), "output": y.tolist()} for x, y in t.demos], "test": [{"input": x.tolist()} for x, _ in t.queries]} for t in tasks_of_all()}  # fmt: skip # noqa: E501
    file.write_text(json.dumps(hidden))
    result = solve.evaluate(
        [run],
        [str(file)],
        predictions_file=str(tmp_path / "p.jsonl"),
        submit=str(tmp_path / "sub.json"),
    )
    assert "pass@2" not in result and result["unanswered"] == 0
    assert score.check_submission(tmp_path / "sub.json").keys() == hidden.keys()


def test_a_query_larger_than_every_canvas_is_wrong_and_said(run, tmp_path):
    s = solve.opened(run)
    big = np.ones((12, 12), np.uint8)
    task = Task("big", [(big, big)], [(big, big)])
    [p] = solve.predict(s.params, s.cfg, task, 2)
    assert p.too_large == 12 and p.votes == []
    assert score.score([task], [p])["pass@2"] == 0
    with pytest.raises(UserError, match="task none: has no query"):
        solve.predict(s.params, s.cfg, Task("none", [(big, big)], []))
    raw = {
        "train": [{"input": big.tolist(), "output": big.tolist()}],
        "test": [{"input": big.tolist(), "output": big.tolist()}],
    }
    (tmp_path / "big.json").write_text(json.dumps(raw))
    for _ in range(2):
        result = solve.evaluate(
            [run], [str(tmp_path / "big.json")], predictions_file=str(tmp_path / "p.jsonl")
        )
        assert result["unanswered"] == result["too_large"] == 1 and result["pass@1"] == 0
    assert len(score.read(tmp_path / "p.jsonl")) == 1


def test_scores_count_an_output_that_does_not_fit_its_canvas(run):
    s = solve.opened(run)
    small, tall = np.ones((3, 3), np.uint8), np.ones((9, 9), np.uint8)
    task = Task("grow", [(small, small)], [(small, tall)])
    scored = score.score([task], solve.predict(s.params, s.cfg, task))
    assert (
        scored["exact_match"] == 0 == scored["cell_accuracy"]
        and checkpoint.find(run).name == "best.safetensors"
    )


# ---------------------------------------------------------------- what the documents show


def challenges(folder):
    """The tasks as Kaggle gives them: without outputs."""
    both = lambda x, y: {"input": x.tolist(), "output": y.tolist()}  # noqa: E731
    raw = {
        t.name: {
            "train": [both(*p) for p in t.demos],
            "test": [{"input": x.tolist()} for x, _ in t.queries],
        }
        for t in tasks_of_all()
    }
    (folder / "arc-agi_test_challenges.json").write_text(json.dumps(raw))
    return raw


def test_the_notebook_runs_offline_beside_a_checkpoint_that_is_only_read(run, tmp_path, capsys):
    made, before = challenges(tmp_path), {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    cells = [
        c
        for c in json.loads((ROOT / "docs" / "kaggle.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    there: dict = {}
    exec("".join(cells[0]["source"]), there)  # noqa: S102
    there |= {
        "CHECKPOINT": run / "best.safetensors",
        "TASKS": tmp_path / "arc-agi_test_challenges.json",
        "OUT": tmp_path,
        "VIEWS": 2,
    }
    commands = []
    for cell in cells[1:]:
        text = "".join(cell["source"])
        if text.startswith("!"):
            words = text.lstrip("!").replace("\\\n", " ").format(**there).split()
            commands.append(words[0])
            if words[0] == "etrm":
                result = CliRunner().invoke(cli.app, words[1:])
                assert result.exit_code == 0, result.output
            else:
                assert words[:2] == ["pip", "install"] and "--no-index" in words
        else:
            exec(text, there)  # noqa: S102
    assert commands == ["pip", "etrm", "etrm"] and "Answer(grid" in capsys.readouterr().out
    assert score.check_submission(tmp_path / "submission.json").keys() == made.keys()
    assert {len(votes) for _, _, votes in lines(tmp_path / "predictions.jsonl")} == {2}
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before


@pytest.mark.parametrize("page", ["README.md", "docs/solving.md"])
def test_the_python_that_the_documents_show_runs(run, tmp_path, monkeypatch, capsys, page):
    [text] = [
        c
        for c in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
        if "solve.opened" in c
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cpu").symlink_to(run)
    (tmp_path / "best.safetensors").symlink_to(run / "best.safetensors")
    (tmp_path / "my_task.json").write_text((SET / "mirror.json").read_text())
    monkeypatch.chdir(tmp_path)
    exec(text.replace("solve.views=64", "solve.views=4"), {})  # noqa: S102
    assert "my_task" in capsys.readouterr().out


def test_every_option_that_the_page_on_solving_shows_is_one():
    text = (ROOT / "docs" / "solving.md").read_text()
    fields = set(config.SolveConfig.__struct_fields__)
    assert {
        x for x in re.findall(r"solve\.(\w+)", text) if x not in ("opened", "predict")
    } <= fields
    known = {
        o
        for c in typer.main.get_command(cli.app).commands.values()
        for p in c.params
        for o in (*p.opts, *p.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known <= {
        "--no-index",
        "--find-links",
        "--wheel-dir",
    }


# ---------------------------------------------------------------- files and sources beside each other


def test_a_source_without_outputs_takes_no_score_from_the_others(run, tmp_path):
    hidden = tmp_path / "x_challenges.json"
    hidden.write_text(
        json.dumps(
            {
                "x": {
                    "train": [{"input": [[1, 2]], "output": [[2, 1]]}] * 2,
                    "test": [{"input": [[3, 4]]}],
                }
            }
        )
    )
    found = solve.evaluate(
        [run], [str(SET), str(hidden)], predictions_file=str(tmp_path / "p.jsonl")
    )
    alone = solve.evaluate([run], [str(SET)], predictions_file=str(tmp_path / "q.jsonl"))
    assert (
        [*found["by_source"]] == [str(SET)]
        and found["by_source"][str(SET)]["pass@2"] == alone["pass@2"]
        and found["look"] >= 1
    )


@pytest.mark.parametrize("name", ["votes.json", "votes"])
def test_predictions_are_kept_where_they_can_be_read_again(run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"^--predictions .*{name}: must end in .jsonl"):
        solve.evaluate([run], [str(SET)], predictions_file=str(tmp_path / name))
    solve.evaluate([run], [str(SET)], predictions_file=str(tmp_path / "p.jsonl"))
    with pytest.raises(UserError, match=rf"^--output .*{name}: must end in .jsonl"):
        solve.merge([tmp_path / "p.jsonl"], [], "count", str(tmp_path / name))
    assert (tmp_path / name).read_text() == "mine"


def test_a_merge_keeps_votes_for_tasks_that_are_not_scored(run, tmp_path):
    file = tmp_path / "p.jsonl"
    solve.evaluate([run], [str(SET)], predictions_file=str(file))
    before = lines(file)
    solve.merge([file], [str(SET / "flip.json")], "count", str(file))
    assert lines(file) == before


def test_a_source_named_twice_is_asked_once(run, tmp_path):
    found = solve.evaluate(
        [run],
        [str(SET), str(SET / "flip.json"), str(SET)],
        predictions_file=str(tmp_path / "p.jsonl"),
    )
    assert found["votes"] == 18 and found["n_tasks"] == 6


def test_a_task_has_one_name_whether_its_output_is_known_or_not(run, tmp_path):
    """Challenges without solutions beside a file of the same task with them: the vote is scored by the output that is known."""
    task = sources.load([str(SET / "flip.json")])[0]
    pairs = lambda ps: [
        {"input": x.tolist()} | ({"output": y.tolist()} if y is not None else {}) for x, y in ps
    ]  # noqa: E731
    asked = [(x, None) for x, _ in task.queries]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a_challenges.json").write_text(
        json.dumps({"aa": {"train": pairs(task.demos), "test": pairs(asked)}})
    )
    (folder / "b.json").write_text(
        json.dumps({"aa": {"train": pairs(task.demos), "test": pairs(task.queries)}})
    )
    for hide in (True, False):
        [found] = sources.load([str(folder)], hide=hide)
        assert found.name == "aa" and (found.queries[0][1] is None) == hide
    assert (
        solve.evaluate([run], [str(folder)], predictions_file=str(tmp_path / "p.jsonl"))[
            "n_queries"
        ]
        == 1
    )


def test_an_answered_no_is_kept_through_a_merge(run, tmp_path):
    """A query that no canvas holds has no votes; who said so stands in the file, so that it is not asked again."""
    large = [{"input": [[1] * 12], "output": [[2] * 12]}] * 2
    (tmp_path / "large.json").write_text(json.dumps({"train": large, "test": large[:1]}))
    file = tmp_path / "p.jsonl"
    solve.evaluate([run], [str(tmp_path / "large.json")], predictions_file=str(file))
    [before] = score.read(file)
    score.append(tmp_path / "again.jsonl", score.by_source(score.union([before]).values()))
    [after] = score.read(tmp_path / "again.jsonl")
    assert before.source == after.source != "" and after.too_large == before.too_large == 12
