"""Rankings, scores with their intervals, lines on disk, submissions: whatever the votes, from wherever."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etrm_arc import cli, score, sources
from etrm_arc.config import UserError
from etrm_arc.data import Task, tokenise
from etrm_arc.score import Prediction, Vote

SET = Path(__file__).parent / "data" / "set"
GRIDS = st.sampled_from([np.full(s, c, np.uint8) for s in ((1, 2), (2, 1), (2, 2)) for c in (0, 1)])
VOTES = st.lists(
    st.builds(Vote, st.none() | GRIDS, st.floats(-9, 9), st.floats(-900, 0), st.floats(-9, 0)), max_size=12
).map(lambda vs: [v._replace(view=i, source="s") for i, v in enumerate(vs)])  # fmt: skip
ONE, TWO = np.ones((2, 2), np.uint8), np.zeros((2, 2), np.uint8)


def of(task, *grids, query=0):
    return Prediction(task, query, "", [Vote(g, view=i) for i, g in enumerate(grids)])


@given(VOTES, st.randoms(use_true_random=False), st.sampled_from([*score.RULES]))
def test_ranking_ignores_the_order_of_votes(made, random, rule):
    ranked = score.rank(made, rule)
    shuffled = list(made)
    random.shuffle(shuffled)
    again = score.rank(shuffled, rule)
    assert [(a.views, a.q, a.grid.tolist()) for a in ranked] == [
        (a.views, a.q, a.grid.tolist()) for a in again
    ]
    assert sum(a.views for a in ranked) == sum(v.grid is not None for v in made)
    assert all(a.share == a.views / len(made) for a in ranked)
    if rule == "count":
        assert all(
            (a.views, a.q) >= (b.views, b.q) for a, b in zip(ranked, ranked[1:], strict=False)
        )


def test_each_rule_weighs_what_it_says():
    a, b = Vote(ONE, 0.0, -1.0, -3.0), Vote(TWO, 0.0, -5.0, -0.1)
    made = [a, b, b._replace(view=1, logp=-6.0, demos=-0.2)]
    first = {rule: score.rank(made, rule)[0].grid.tolist() for rule in score.RULES}
    assert first == {"count": TWO.tolist(), "probability": ONE.tolist(), "demos": TWO.tolist()}
    assert (
        score.rank([a._replace(demos=-0.01), *made[1:2]], "demos")[0].grid.tolist() == ONE.tolist()
    )
    with pytest.raises(UserError, match="hold no demos"):
        score.rank([a._replace(demos=None)], "demos")
    with pytest.raises(UserError, match="did you mean count"):
        score.rank(made, "cout")


def test_full_ties_go_by_content_whoever_came_first():
    made = [Vote(ONE), Vote(TWO), Vote(ONE[:1])]
    orders = [
        [a.grid.tolist() for a in score.rank(vs)] for vs in (made, made[::-1], made[1:] + made[:1])
    ]
    assert orders[0] == orders[1] == orders[2] == [ONE[:1].tolist(), TWO.tolist(), ONE.tolist()]


def test_tiny_probabilities_are_still_compared():
    assert (
        score.rank([Vote(ONE, 0, -5000.0), Vote(TWO, 0, -4000.0)], "probability")[0].grid.tolist()
        == TWO.tolist()
    )
    two = [Vote(ONE, 0, -4000.0), Vote(ONE, 0, -4000.0, view=1)]
    assert score.RULES["probability"](two) == pytest.approx(-4000 + math.log(2))


def test_votes_agree_with_the_published_ones():
    v = json.loads((Path(__file__).parent / "golden" / "voting_trm.json").read_text())
    checked = 0
    for name, puzzle in v["test_puzzles"].items():
        for i, pair in enumerate(puzzle["test"]):
            made = [
                Vote(np.array(w["predicted_grid_original_frame"], np.uint8), w["q_halt_logit"])
                for w in v["votes"]
                if w["identifier_index"]
                and w["identifier"].split("|||")[0] == name
                and w["test_input"] == pair["input"]
            ]
            ranked = score.rank(made)
            keys = [(a.views, a.q) for a in ranked]
            if made and len(set(keys)) == len(
                keys
            ):  # full ties: theirs by arrival, ours by content
                tries = [a.grid.tolist() for a in ranked[:2]]
                tries += tries[:1] * (2 - len(tries))
                given_ = v["submission"][name][i]
                assert tries == [given_["attempt_1"], given_["attempt_2"]]
                checked += 1
    assert checked >= 4


# ---------------------------------------------------------------- scores


def test_the_right_answer_scores_one_and_a_constant_nothing():
    tasks = sources.load([str(SET)])
    for right in (True, False):
        said = lambda y, right=right: y if right else np.zeros((1, 1), np.uint8)  # noqa: E731
        made = [
            of(t.name, said(y))._replace(canvas=tokenise(said(y), (10, 10)))
            for t in tasks
            for _, y in t.queries
        ]
        scored = score.score(tasks, made)
        names = [*(f"pass@{k}" for k in score.PASS), "exact_match", "oracle", "shape_accuracy"]
        assert [scored[k] for k in names] == [float(right)] * len(names)
        assert (
            scored["n_tasks"] == scored["n_queries"] == 6 and scored["cell_accuracy"] == 1
            if right
            else scored["cell_accuracy"] < 1
        )


def test_the_three_definitions_differ_as_they_should():
    pair, single = (
        Task("pair", [(ONE, ONE)], [(ONE, ONE), (TWO, ONE)]),
        Task("single", [(ONE, ONE)], [(ONE, ONE)]),
    )
    scored = score.score(
        [pair, single], [of("pair", ONE), of("pair", TWO, query=1), of("single", ONE)]
    )
    assert scored["pass@1"] == 0.75  # (1/2 + 1) / 2
    assert scored["all_queries/pass@1"] == 0.5
    assert scored["per_output/pass@1"] == pytest.approx(2 / 3)
    assert scored["n_tasks"] == 2 and scored["n_queries"] == 3
    assert (
        score.score([single], [of("single", ONE)])["pass@1"] == 1
    )  # a subset's score knows nothing of the rest


def test_attempts_in_order_and_what_is_not_answered_is_wrong():
    task = Task("t", [(ONE, ONE)], [(ONE, ONE), (TWO, ONE), (TWO, None)])
    scored = score.score([task], [of("t", TWO, TWO, ONE)])
    assert (scored["pass@1"], scored["pass@2"], scored["oracle"]) == (0.0, 0.5, 0.5) and scored[
        "n_queries"
    ] == 2
    assert [row["right"] for row in scored["reliability"]["share"]] == [
        0.0,
        0.0,
    ]  # right at the second attempt is not right
    sure = score.score(
        [task],
        [Prediction("t", 0, "", [Vote(ONE, 2.0), Vote(TWO, -2.0, view=1)]), of("t", ONE, query=1)],
    )
    close = lambda key: [pytest.approx(row) for row in sure["reliability"][key]]  # noqa: E731
    assert close("share") == [
        {"n": 1, "confidence": 0.5, "right": 1.0},
        {"n": 1, "confidence": 1.0, "right": 1.0},
    ]
    assert close("q") == [
        {"n": 1, "confidence": 0.5, "right": 1.0},
        {"n": 1, "confidence": 1 / (1 + math.exp(-2)), "right": 1.0},
    ]
    with pytest.raises(UserError, match="nothing to score"):
        score.score([task._replace(queries=[(ONE, None)])], [])


def test_the_first_view_is_judged_by_its_valid_cells():
    task, canvas = Task("t", [(ONE, ONE)], [(ONE, ONE)]), tokenise(ONE, (4, 4))
    canvas[3, 3] = 7  # beyond the border: not asked for
    assert score.score([task], [of("t", ONE)._replace(canvas=canvas)])["exact_match"] == 1
    canvas[0, 2] = 0  # its border
    scored = score.score([task], [of("t", TWO[:1])._replace(canvas=canvas)])
    assert scored["shape_accuracy"] == 1  # of the canvas, whatever voted
    assert scored["exact_match"] == 0 and scored["cell_accuracy"] == pytest.approx(7 / 8)
    assert (
        score.score([task], [of("t", ONE)._replace(canvas=canvas[:1])])["cell_accuracy"] == 0
    )  # the output does not fit


@given(st.lists(st.lists(st.tuples(GRIDS, GRIDS), min_size=1, max_size=3), min_size=1, max_size=6))
def test_groups_and_bins_hold_everyone_once(shape):
    tasks = [
        Task(f"t{i}", [(ONE, ONE)] * (1 + i), [(ONE, y) for y, _ in qs])
        for i, qs in enumerate(shape)
    ]
    made = [of(f"t{i}", x, query=j) for i, qs in enumerate(shape) for j, (_, x) in enumerate(qs)]
    scored = score.score(tasks, made)
    for by in ("by_side", "by_demos"):
        assert sum(row["n_tasks"] for row in scored[by].values()) == len(tasks)
    for curve in scored["reliability"].values():
        assert sum(row["n"] for row in curve) == scored["n_queries"]
        right = sum(row["n"] * row["right"] for row in curve)
        assert right / scored["n_queries"] == pytest.approx(scored["per_output/pass@1"])
    named = {f"{d}pass@{k}" for d in ("", "all_queries/", "per_output/") for k in score.PASS}
    assert scored["interval95"].keys() == named | {
        "oracle",
        "exact_match",
        "cell_accuracy",
        "shape_accuracy",
    }
    for name, (low, high) in scored["interval95"].items():
        assert 0 <= low <= scored[name] + 1e-9 and scored[name] - 1e-9 <= high <= 1


def test_a_task_is_as_large_as_its_largest_query():
    wide = np.ones((1, 20), np.uint8)
    task = Task("t", [(ONE, ONE)], [(ONE, ONE), (wide, ONE)])
    assert score.score([task], [])["by_side"] == {
        "<=20": {"n_tasks": 1, "pass@2": 0.0, "interval95": {"pass@2": score.wilson(0.0, 1)}}
    }


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 400, 0.0, 0.00951), (5, 400, 0.00535, 0.02892), (200, 400, 0.4512, 0.5488)],
)
def test_wilson(k, n, low, high):
    assert score.wilson(k / n, n) == pytest.approx((low, high), abs=2e-4)


def test_a_score_is_printed_with_its_number_and_interval():
    assert score.with_interval(6 / 86, 86) == "7.0 % (n = 86, 95 % 3.2 to 14.4)"
    assert score.with_interval(0.5, 2, (0.25, 0.75)) == "50.0 % (n = 2, 95 % 25.0 to 75.0)"


def test_held_out_scores_are_judged_by_the_published_criteria():
    single = Task("single", [(ONE, ONE)], [(ONE, ONE)])
    scored = score.score([single], [of("single", TWO)]) | {"pass@2": 0.051, "exact_match": 0.05}
    wanted = "published criteria: pass@2 above 5 % (a win): yes, exact match above 5 % (hoped for): no, pass@100 above 0 % (meaningful): no"
    assert cli.table(scored | {"look": 3}).splitlines()[-2:] == [
        "look at these held-out tasks: number 3",
        wanted,
    ]
    assert "criteria" not in cli.table(scored) + cli.table(scored | {"look": 3, "held_out": False})


def test_bootstrap_is_about_as_wide_as_it_should_be():
    half = [[1.0], [0.0]] * 100
    assert score.bootstrap(half) == pytest.approx(score.wilson(0.5, 200), abs=0.02)
    assert score.bootstrap([[0.0], [0.0, 0.0]]) == score.wilson(0.0, 2)
    twice = [
        [x[0]] * 2 for x in half
    ]  # two queries that stand and fall together are no more evidence than one
    assert score.bootstrap(twice) == pytest.approx(score.bootstrap(half))


# ---------------------------------------------------------------- on disk


@given(VOTES, st.none() | st.just(tokenise(ONE, (3, 4))), st.integers(0, 30))
def test_a_line_is_read_back(made, canvas, large):
    p = Prediction('a\n"b', 1, "ff", made, canvas, large, 1.5, "s")
    again = score.of_line(score.to_line(p), "x")
    assert "\n" not in score.to_line(p)
    assert again._replace(votes=[], canvas=None) == p._replace(votes=[], canvas=None)
    assert (again.canvas is None) if canvas is None else np.array_equal(again.canvas, canvas)
    for a, b in zip(again.votes, made, strict=True):
        assert a[1:] == b[1:] and (
            (a.grid is None and b.grid is None) or np.array_equal(a.grid, b.grid)
        )


def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path):
    file, p = tmp_path / "predictions.jsonl", of("t", ONE)._replace(source="s", hash="h")
    score.append(file, [p])
    with open(file, "a") as f:
        f.write('{"task": "t", "qu')
    assert len(score.read(file)) == 1
    score.append(file, [p._replace(query=1)])
    assert [x.query for x in score.read(file)] == [0, 1]
    for broken in (
        '{"task": 3}\n',
        "[]\n",
        "no\n",
        "[" * 200_000 + "\n",
        score.to_line(p).replace("11/11", "1x/11") + "\n",
        score.to_line(p).replace("11/11", "1/11") + "\n",
        score.to_line(p._replace(votes=[Vote(ONE, math.nan)])) + "\n",
        score.to_line(p._replace(votes=[Vote(ONE, 0.0, -math.inf)])) + "\n",
        score.to_line(p).replace('"q": 0.0, ', "") + "\n",
    ):
        file.write_text(score.to_line(p) + "\n" + broken)
        with pytest.raises(UserError, match="line 2"):
            score.read(file)


@given(VOTES, VOTES, st.randoms(use_true_random=False))
def test_joining_counts_a_vote_once_in_whatever_order(a, b, random):
    task = Task("t", [(ONE, ONE)], [(ONE, ONE)])
    own = score.task_hash(task)
    made = [Prediction("t", 0, own, [v], source="s") for v in a] + [
        Prediction("other name", 0, own, [v._replace(source="r") for v in b])
    ]
    made += [of("t", TWO)]  # another solver, by name
    twice = [*made, *made]
    random.shuffle(twice)
    canvas = tokenise(ONE, (3, 4))
    [p] = score.joined(
        [task],
        [x._replace(canvas=canvas if x.votes and x.votes[0].view == 0 else None) for x in twice],
    )
    [q] = score.joined([task], made)
    assert len(p.votes) == len(a) + len(b) + 1 and [v[1:] for v in p.votes] == [
        v[1:] for v in q.votes
    ]
    again = score.joined(
        [task], [score.of_line(score.to_line(x), "x") for x in score.by_source([p])]
    )
    assert [v[1:] for v in again[0].votes] == [v[1:] for v in p.votes] and np.array_equal(
        again[0].canvas, canvas
    )
    few = score.joined(
        [task],
        [Prediction("t", 0, own, [Vote(ONE, view=0), Vote(TWO, view=1)], seconds=3.0)],
        lambda v: v.view < 1,
    )
    assert [v.view for v in few[0].votes] == [0] and few[
        0
    ].seconds == 1.5  # of the vote that counts
    other = score.joined(
        [task._replace(demos=[(TWO, ONE)])], made
    )  # of the same name: only the solver that gave no hash
    assert [v.source for v in other[0].votes] == [""]


def test_what_files_disagree_about_does_not_go_by_their_order():
    """Two machines that gave the same vote other numbers; two checkpoints with a first view each."""
    task = Task("t", [(ONE, ONE)], [(ONE, ONE)])
    own, canvases = score.task_hash(task), [tokenise(x, (3, 3)) for x in (ONE, TWO)]
    one, two = (
        Prediction("t", 0, own, [Vote(ONE, 0.1, source="a")], canvases[0], source="a"),
        Vote(TWO, 0.2, source="a"),
    )
    other = Prediction("t", 0, own, [two, Vote(TWO, 0.3, source="b")], canvases[1], source="b")
    found = [score.joined([task], made)[0] for made in ([one, other], [other, one])]
    assert [[v.q for v in p.votes] for p in found] == [[0.1, 0.3]] * 2
    assert all(np.array_equal(p.canvas, canvases[0]) for p in found)


# ---------------------------------------------------------------- submissions


@given(VOTES, st.sampled_from([*score.RULES]))
def test_a_submission_is_always_valid_and_complete(tmp_path_factory, made, rule):
    file, solutions = (
        tmp_path_factory.mktemp("s") / n for n in ("submission.json", "solutions.json")
    )
    tasks = [
        Task("b", [(ONE, ONE)], [(TWO, None), (ONE, ONE)]),
        Task("a", [(ONE, ONE)], [(ONE, ONE)]),
    ]
    asked = [Prediction("b", 1, "", made)]
    file.write_text(json.dumps(score.submission(tasks, asked, rule)))
    solutions.write_text(json.dumps({t.name: [ONE.tolist()] * len(t.queries) for t in tasks}))
    sent = score.check_submission(file, solutions)
    assert [len(sent[t.name]) for t in tasks] == [2, 1]
    ranked = [a.grid.tolist() for a in score.rank(made, rule)] or [ONE.tolist()]
    assert [sent["b"][1][k] for k in score.ATTEMPTS] == [ranked[0], ranked[min(1, len(ranked) - 1)]]
    scored = score.score_submission(file, solutions)
    assert scored["queries"] == 3 and scored["per_output/pass@2"] <= 1
    assert score.read(file)[0].votes[1].source == str(file)


def test_a_submission_is_scored_as_kaggle_and_as_published(tmp_path):
    file, solutions = tmp_path / "submission.json", tmp_path / "solutions.json"
    right, wrong = (
        {"attempt_1": g, "attempt_2": ONE.tolist()} for g in (ONE.tolist(), TWO.tolist())
    )
    file.write_text(
        json.dumps({"a": [right, wrong], "b": [{"attempt_1": [[3]], "attempt_2": [[4]]}]})
    )
    solutions.write_text(json.dumps({"a": [ONE.tolist()] * 2, "b": [ONE.tolist()]}))
    scored = score.score_submission(file, solutions)
    assert (scored["pass@1"], scored["pass@2"]) == (0.25, 0.5)
    assert (scored["per_output/pass@1"], scored["per_output/pass@2"]) == pytest.approx(
        (1 / 3, 2 / 3)
    )
    tasks = [Task("a", [(ONE, ONE)], [(ONE, ONE)] * 2), Task("b", [(ONE, ONE)], [(ONE, ONE)])]
    voted = score.score(
        tasks, score.joined(tasks, score.read(file))
    )  # its attempts as votes, the first as the first view
    assert all(
        voted[k] == scored[k] and voted["interval95"][k] == scored["interval95"][k]
        for k in scored["interval95"]
    )
    assert (voted["exact_match"], voted["shape_accuracy"]) == pytest.approx((1 / 3, 2 / 3))
    with pytest.raises(
        UserError, match="hold no logp, as a submission's do"
    ):  # they are not certain of anything
        score.score(tasks, score.read(file), "probability")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "maps task ids"),
        ({"a": []}, "task a: needs a list"),
        ({"a": [{"attempt_1": [[1]]}]}, "task a, query 0: needs exactly"),
        ({"a": [{"attempt_1": [[1]], "attempt_2": [[1, 2], [3]]}]}, "query 0, attempt_2: ragged"),
        ({"a": [{"attempt_1": [[12]], "attempt_2": [[1]]}]}, "attempt_1: colour 12"),
        ({"b": [{"attempt_1": [[1]], "attempt_2": [[1]]}]}, "task a is missing"),
        ({"a": [{"attempt_1": [[1]], "attempt_2": [[1]]}] * 2}, "has 2 queries, must have 1"),
        ({k: [{"attempt_1": [[1]], "attempt_2": [[1]]}] for k in "ac"}, "task c is not among"),
    ],
)
def test_a_malformed_submission_is_named(tmp_path, raw, said):
    file, solutions = tmp_path / "submission.json", tmp_path / "solutions.json"
    file.write_text(json.dumps(raw))
    solutions.write_text(json.dumps({"a": [[[1]]]}))
    with pytest.raises(UserError, match=said):
        score.check_submission(file, solutions)
