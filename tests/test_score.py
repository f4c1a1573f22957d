"""Rankings, scores with their intervals, lines on disk, submissions: whatever the votes."""

import collections
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etrm_arc import score, sources
from etrm_arc.config import UserError
from etrm_arc.data import Task, tokenise
from etrm_arc.extras import report, submissions
from etrm_arc.score import Prediction, Vote
from etrm_arc.tests.puzzles import SET

GRIDS = st.sampled_from([np.full(s, c, np.uint8) for s in ((1, 2), (2, 1), (2, 2)) for c in (0, 1)])
VOTES = st.lists(st.builds(Vote, st.none() | GRIDS, st.floats(-9, 9)), max_size=12).map(
    lambda votes: [v._replace(view=i, source="s") for i, v in enumerate(votes)]
)
SHUFFLE = st.randoms(use_true_random=False)
ONE, TWO = np.ones((2, 2), np.uint8), np.zeros((2, 2), np.uint8)
SINGLE = Task("t", [(ONE, ONE)], [(ONE, ONE)])


def prediction(task, *grids, query=0, hash="h"):
    return Prediction(task, query, hash, [Vote(g, view=i) for i, g in enumerate(grids)])


def by_content(ranked):
    return [(a.votes, a.q, a.grid.tolist()) for a in ranked]


@given(VOTES, SHUFFLE)
def test_ranking_goes_by_votes_whatever_their_order(votes, random):
    ranked, shuffled = score.rank(votes), list(votes)
    random.shuffle(shuffled)
    assert by_content(ranked) == by_content(score.rank(shuffled))
    assert sum(a.votes for a in ranked) == sum(v.grid is not None for v in votes)
    grids = [None if v.grid is None else v.grid.tolist() for v in votes]
    keys = [(a.votes, a.q, -grids.index(a.grid.tolist())) for a in ranked]
    assert keys == sorted(keys, reverse=True)  # full ties go by the earliest view


def test_votes_agree_with_the_published_ones():
    golden = json.loads((Path(__file__).parent / "golden" / "voting_trm.json").read_text())
    votes, checked = collections.defaultdict(list), 0
    for w in golden["votes"]:
        if w["identifier_index"]:
            grid = np.array(w["predicted_grid_original_frame"], np.uint8)
            query = w["identifier"].split("|||")[0], str(w["test_input"])
            votes[query].append(Vote(grid, w["q_halt_logit"]))
    for name, puzzle in golden["test_puzzles"].items():
        for pair, attempts in zip(puzzle["test"], golden["submission"][name], strict=False):
            ranked = score.rank(votes[name, str(pair["input"])])
            if ranked and len({(a.votes, a.q) for a in ranked}) == len(ranked):
                two = [ranked[0].grid.tolist(), ranked[min(1, len(ranked) - 1)].grid.tolist()]
                assert two == [attempts["attempt_1"], attempts["attempt_2"]]
                checked += 1  # full ties are not: theirs go by arrival
    assert checked >= 4


@pytest.mark.parametrize("right", [True, False])
def test_the_right_answer_scores_one_and_a_constant_nothing(right):
    tasks, predictions = sources.load([str(SET)]), []
    for t in tasks:  # of one query each
        grid = t.queries[0][1] if right else TWO[:1, :1]
        predictions.append(prediction(t.name, grid)._replace(canvas=tokenise(grid, (10, 10))))
    scores = score.score(tasks, predictions)
    names = [*(f"pass@{k}" for k in score.PASS), "exact_match", "oracle"]
    assert [scores[k] for k in names] == [float(right)] * len(names)
    assert scores["n_tasks"] == scores["n_queries"] == 6
    assert (scores["cell_accuracy"] == 1) == right


def test_the_definitions_of_pass_differ_and_count_attempts_in_order():
    pair = Task("pair", [(ONE, ONE)], [(ONE, ONE), (TWO, ONE)])
    votes = [prediction("pair", ONE), prediction("pair", TWO, query=1), prediction("t", ONE)]
    scores = score.score([pair, SINGLE], votes)
    assert scores["pass@1"] == 0.75  # (1/2 + 1) / 2
    assert scores["all_queries/pass@1"] == 0.5
    assert scores["per_output/pass@1"] == pytest.approx(2 / 3)
    assert score.score([SINGLE], votes)["pass@1"] == 1  # a subset knows nothing of the rest
    # attempts count in order; an unanswered query is wrong
    task = SINGLE._replace(queries=[(ONE, ONE), (TWO, ONE), (TWO, None)])
    scores = score.score([task], [prediction("t", TWO, TWO, ONE)])
    assert (scores["pass@1"], scores["pass@2"], scores["oracle"]) == (0.0, 0.5, 0.5)
    assert scores["n_queries"] == 2
    assert score.score([task._replace(queries=[(ONE, None)])], []) == {}


def test_the_first_view_is_judged_by_its_valid_cells():
    canvas, vote = tokenise(ONE, (4, 4)), prediction("t", ONE)
    canvas[3, 3] = 7  # beyond the border: not asked for
    assert score.score([SINGLE], [vote._replace(canvas=canvas)])["exact_match"] == 1
    canvas[0, 2] = 0  # its border
    scores = score.score([SINGLE], [prediction("t", TWO[:1])._replace(canvas=canvas)])
    assert scores["exact_match"] == 0 and scores["cell_accuracy"] == pytest.approx(7 / 8)
    small = score.score([SINGLE], [vote._replace(canvas=canvas[:1])])
    assert small["cell_accuracy"] == 0  # the output does not fit


def test_scores_come_with_wilsons_interval_and_are_judged_by_the_published_criteria():
    for k, interval in (0, (0.0, 0.00951)), (5, (0.00535, 0.02892)), (200, (0.4512, 0.5488)):
        assert score.wilson(k / 400, 400) == pytest.approx(interval, abs=2e-4)
    assert score.with_interval(6 / 86, 86) == "7.0 % (n = 86, 95 % 3.2 to 14.4)"
    scores = score.score([SINGLE], [prediction("t", TWO)])
    line = report.verdicts(scores | {"pass@2": 0.051, "exact_match": 0.05})
    assert [part.rpartition(": ")[2] for part in line.split(", ")] == ["yes", "no", "no"]


@given(VOTES, st.none() | st.just(tokenise(ONE, (3, 4))))
def test_a_line_is_read_back(votes, canvas):
    p = Prediction('a\n"b', 1, "ff", votes, canvas, 1.5, "s")
    again = score.from_line(score.to_line(p), "x")
    assert "\n" not in score.to_line(p) and score.to_line(again) == score.to_line(p)
    assert again._replace(votes=[], canvas=None) == p._replace(votes=[], canvas=None)
    for a, b in zip(again.votes, votes, strict=True):
        assert a[1:] == b[1:] and np.array_equal(a.grid, b.grid)


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    file, p = tmp_path / "predictions.jsonl", prediction("t", ONE)._replace(source="s")
    score.append(file, [score.to_line(p)])
    with open(file, "a") as f:
        f.write('{"task": "t", "qu')
    assert len(score.read(file)) == 1
    score.append(file, [score.to_line(p._replace(query=1))])
    assert [x.query for x in score.read(file)] == [0, 1]
    line = score.to_line(p)
    changes = {"11/11": "1/11", '"q": 0.0, ': "", "0.0": "NaN", '"query": 0': '"query": -1'}
    for text in ("[]", "no", "[" * 200_000, *(line.replace(*c) for c in changes.items())):
        file.write_text(f"{line}\n{text}\n")
        with pytest.raises(UserError, match="line 2"):
            score.read(file)


@pytest.mark.skipif(not score.fcntl, reason="no locks on this system")
def test_two_writers_wait_for_each_other(tmp_path):
    file, p = tmp_path / "predictions.jsonl", prediction("t", ONE)._replace(source="s")
    score.append(file, [score.to_line(p)])
    writer = threading.Thread(target=score.append, args=(file, [score.to_line(p)]))
    with open(file, "a") as f:
        score.fcntl.flock(f, score.fcntl.LOCK_EX)
        f.write('{"half a line that its writer is about to end')
        f.flush()
        writer.start()
        writer.join(0.1)
        assert writer.is_alive()
    writer.join()
    assert len(score.read(file)) == 2


@given(VOTES, VOTES, SHUFFLE)
def test_joining_counts_a_vote_once_whatever_the_order(a, b, random):
    key, canvas = sources.task_hash(SINGLE), tokenise(ONE, (3, 4))
    parts = [Prediction("t", 0, key, [v], source="s") for v in a]
    parts += [Prediction("other", 0, key, [v._replace(source="r")]) for v in b]
    parts += [prediction("t", TWO, hash="")]  # a submission, by name
    parts = [p._replace(canvas=canvas) if p.votes[0].view == 0 else p for p in parts]
    twice = [*parts, *parts]
    random.shuffle(twice)
    [p], [q] = score.joined([SINGLE], twice), score.joined([SINGLE], parts)
    assert len(p.votes) == len(a) + len(b) + 1
    assert [v[1:] for v in p.votes] == [v[1:] for v in q.votes]
    assert np.array_equal(p.canvas, canvas)
    [other] = score.joined([SINGLE._replace(demos=[(TWO, ONE)])], parts)  # of the same name
    assert [v.source for v in other.votes] == [""]


def test_what_machines_disagree_about_does_not_go_by_their_order():
    key, canvases = sources.task_hash(SINGLE), [tokenise(x, (3, 3)) for x in (ONE, TWO)]
    one = Prediction("t", 0, key, [Vote(ONE, 0.1, source="a")], canvases[0], source="a")
    votes = [Vote(TWO, 0.2, source="a"), Vote(TWO, 0.3, source="b")]
    other = Prediction("t", 0, key, votes, canvases[1], source="b")
    for parts in ([one, other], [other, one]):
        [p] = score.joined([SINGLE], parts)
        assert [v.q for v in p.votes] == [0.1, 0.3] and np.array_equal(p.canvas, canvases[0])


def test_held_out_evaluations_are_counted_by_the_content_of_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(SET.parent))
    tasks = sources.load(["arc2:evaluation"])[:6]

    def count(some, held_out=("no/such/source",)):
        return score.count_evaluation({"x": some}, held_out, 0.5).get("held_out_evaluation", 0)

    assert count(tasks[::2]) == count(tasks[1::2]) == 1  # two shards are one evaluation
    assert count(tasks) == 2 and count(tasks[:1]) == 3 and count(tasks[1:2]) == 3
    ours = sources.load([str(SET)])
    assert count(ours) == 0 and count(ours, [f"~/{SET.name}/flip.json"]) == 1
    [file] = (tmp_path / "etrm-arc").iterdir()
    with open(file, "a") as f:
        f.write('[1]\n{"tasks": 3}\nno json\n{"tasks": [[1]]}\n\xff\n')
    assert count(tasks[:1]) == 4
    file.unlink()
    file.mkdir()
    assert count(tasks) is None


@given(VOTES)
def test_a_submission_is_complete_and_read_back_as_it_was(tmp_path_factory, votes):
    tasks = [SINGLE._replace(name="b", queries=[(TWO, None), (TWO, ONE)]), SINGLE]
    votes = [v for v in votes if not np.array_equal(v.grid, TWO)]  # which stands for no answer
    answered = [prediction("b"), Prediction("b", 1, "", votes), prediction("t")]
    written = submissions.submission(answered)
    assert {name: len(queries) for name, queries in written.items()} == {"b": 2, "t": 1}
    ranked = [a.grid.tolist() for a in score.rank(votes)] or [TWO.tolist()]
    attempts = [written["b"][1][k] for k in submissions.ATTEMPTS]
    assert attempts == [ranked[0], ranked[min(1, len(ranked) - 1)]]
    file = tmp_path_factory.getbasetemp() / "submission.json"
    file.write_text(json.dumps(written))
    joint = score.joined(tasks, submissions.read_votes(file))
    assert submissions.submission(joint) == written  # its attempts in order
    assert joint[0].votes == joint[2].votes == []  # no answer is no vote


def test_what_stands_for_no_answer_is_no_vote_and_a_file_is_one_source(tmp_path):
    file = tmp_path / "submission.json"
    for empty in ([[0, 0], [0, 0]], [], None):
        file.write_text(json.dumps({"t": [{"attempt_1": empty, "attempt_2": ONE.tolist()}]}))
        assert [len(p.votes) for p in submissions.read_votes(file)] == [1]
    assert submissions.merge([file, tmp_path / ".." / tmp_path.name / file.name], [])["votes"] == 1


def test_a_malformed_submission_is_named(tmp_path):
    for phrase, raw in {
        "maps task ids": [],
        "task a: needs a list": {"a": []},
        "task a, query 0: needs exactly": {"a": [{"attempt_1": [[1]]}]},
        "query 0, attempt_2": {"a": [{"attempt_1": [[1]], "attempt_2": [[1, 2], [3]]}]},
    }.items():
        (tmp_path / "submission.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=phrase):
            submissions.read_votes(tmp_path / "submission.json")
