"""The command `etrm`. Commands are thin; heavy imports stand inside them: --help needs no torch."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


class Commands(typer.core.TyperGroup):
    """All commands take `--data dir/*.json`, of which the shell makes several words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_data(args))


def spread_data(arguments: list[str]) -> list[str]:
    """Each of several .json files that follow one --data gets a --data of its own."""
    words: list[str] = []
    in_data = False
    for word in arguments:
        if word.startswith("-"):
            in_data = word == "--data"
        elif in_data and words[-1] != "--data":
            in_data = word.endswith(".json") and os.path.isfile(word)
            words += ["--data"] * in_data
        words.append(word)
    return words


app = typer.Typer(
    cls=Commands,
    help="Train and evaluate an encoder-based Tiny Recursive Model on ARC-AGI.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # what draws boxes around help takes longer to import than all else
    pretty_exceptions_enable=False,
)
option, argument = typer.Option, typer.Argument
Json = Annotated[bool, option("--json", help="Print one JSON object as the last line.")]
Set = Annotated[list[str], option("--set", help="Override a config field: a.b=value (repeatable).")]
Data = Annotated[list[str], option("--data", help="Sources of tasks, folders, files (repeatable).")]
Output = Annotated[str, option("--output", "-o", help="The file to write.")]
Submission = Annotated[str, option(help="Write both attempts at every query there, as Kaggle's.")]


def printable(text: object) -> str:
    """One line; control characters are escaped, so that no name from a file acts on a terminal."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(escaped)


def echo(*lines: object, err: bool = False) -> None:
    for line in lines:
        typer.echo(printable(line), err=err)


def to_json(value: Any) -> str:
    """JSON text; a number that is not finite is null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


def last_line(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        typer.echo(to_json(result))


def stop(code: int, reason: object) -> typer.Exit:
    """An exit with this code, its reason printed in one line."""
    echo(f"etrm: {reason}", err=True)
    return typer.Exit(code)


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """A mistake of the user's, or of the machine's, is one line and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from .config import UserError

        try:
            command(*args, **kwargs)
        except UserError as e:
            time.sleep(os.environ.get("RANK", "0") != "0")  # process 0 reports what all have
            raise stop(2, e) from None
        except KeyboardInterrupt:
            raise stop(130, "interrupted; the same command goes on, train with --resume") from None
        except BrokenPipeError:
            raise  # whoever reads the output has seen enough: typer's own business
        except OSError as e:
            raise stop(2, f"{e.filename or 'file system'}: {e.strerror or e}") from None
        except (MemoryError, RuntimeError) as e:
            if isinstance(e, MemoryError) or re.search("out of memory|t allocate memory", str(e)):
                hint = "raise train.shards, or lower train.batch or model.hidden"
                raise stop(2, f"out of memory: {hint}") from None
            raise

    return run


def show_version(wanted: bool) -> None:
    if wanted:
        echo(f"etrm {importlib.metadata.version('etrm-arc')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, option("--version", is_eager=True, callback=show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(name="data")
@friendly
def data_command(sources: list[str], as_json: Json = False) -> None:
    """Describe sources: arc1:training, arc1:dev, arc2:..., composed:N, rearc:N, folders, files."""
    from . import sources as source

    facts = source.describe(source.load(sources))
    tables = {"demos per task": facts["demos_per_task"]}
    tables |= {f"queries by side, {rule}": row for rule, row in facts["canvases"].items()}
    side = facts["side"]
    echo(
        f"{facts['tasks']} tasks, {facts['pairs']} pairs, {facts['queries']} queries"
        f" ({facts['hidden_outputs']} outputs hidden), {facts['bytes'] / 1e3:.1f} kB",
        *(f"{name}: {json.dumps(table).strip('{}')}" for name, table in tables.items()),
        f"largest side of a pair: median {side['median']}, at most {side['max']}",
        f"hash {facts['hash']}",
    )
    last_line(as_json, facts)


# ---------------------------------------------------------------- train


def training_line(row: dict[str, Any], total: int) -> str:
    rate = row["samples_per_s"]
    left = (total - row["step"]) * row["samples"] / row["step"] / rate
    return (
        f"step {row['step']}/{total}  loss {row['all/lm_loss']:.3f}"
        f"  exact {100 * row['all/exact']:.1f} %  ACT steps {row.get('halted/steps', 0):.1f}"
        f"  {rate:.1f} samples/s  {left / 60:.0f} min left"
    )


def evaluation_line(row: dict[str, Any], warning: str) -> str:
    """Every measure of an evaluation; shares of queries have their interval."""
    from .score import with_interval

    n = next((int(v) for k, v in row.items() if k.endswith("/n")), 0)
    parts = [f"step {row['step']}  n {n}"]
    for key, value in row.items():
        if "/" in key and not key.endswith("/n"):
            share = key.endswith("/exact") and not key.startswith("gap/")
            parts.append(f"{key} {with_interval(value, n) if share else f'{value:.3f}'}")
    return "  ".join([*parts, *filter(None, [warning])])


@contextlib.contextmanager
def progress(total: int, warning: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows rows of metrics: training's as a live line on a terminal, each as a line elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False)
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def say(row: dict[str, Any]) -> None:
        if live and "all/lm_loss" in row:
            return live.update(training_line(row, total))
        line = f"skipped {row['skipped']}" if "skipped" in row else evaluation_line(row, warning)
        line = training_line(row, total) if "all/lm_loss" in row else line
        console.print(printable(line), soft_wrap=True)

    with live or contextlib.nullcontext():
        yield say


def fit_aloud(cfg: Any, s: Any = None, **options: Any) -> dict[str, Any]:
    from . import checkpoint, train

    s = s or train.setup(cfg, *train.place_of())
    with progress(cfg.train.steps, checkpoint.warned(s.meta)) as say:
        return train.fit(cfg, say, s=s, **options)


def seconds(text: str) -> float:
    """8h50m, 90m, 30s or a number of seconds; no limit where there is no text."""
    from .config import UserError

    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text, re.ASCII)
    if not parts:
        raise UserError(f"--time-limit {text}: must look like 8h50m, 90m or 3600")
    units = zip(parts.groups(), (3600, 60, 1), strict=True)
    return sum(int(n or 0) * unit for n, unit in units) if text else math.inf


@app.command(name="train")
@friendly
def train_command(
    recipe: Annotated[
        str, argument(metavar="CONFIG", help="A TOML file, or a shipped one's name.")
    ],
    fast: Annotated[bool, option("--fast", help="The config's quick setting.")] = False,
    sets: Set = [],  # noqa: B006 (typer copies it)
    resume: Annotated[bool, option("--resume", help="Go on from the newest whole state.")] = False,
    time_limit: Annotated[str, option(help="Save and stop after 8h50m; exit code 75.")] = "",
    procs: Annotated[int, option(min=1, help="Processes (torchrun for several machines).")] = 1,
    dry_run: Annotated[bool, option("--dry-run", help="Say what it takes, train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train as a TOML recipe says."""
    from . import checkpoint, config, train

    deadline = time.monotonic() + seconds(time_limit)
    cfg = config.load_config(recipe, sets, fast)
    if procs > 1 and "RANK" not in os.environ and not dry_run:
        shards = [f"train.shards={procs}"] * (cfg.train.shards % procs > 0)
        words = ["train", recipe, *(w for item in [*sets, *shards] for w in ("--set", item))]
        words += ["--fast"] * fast + ["--resume"] * resume + ["--json"] * as_json
        words += ["--time-limit", time_limit] * bool(time_limit)
        raise typer.Exit(train.launch(words, procs))
    rank, world = train.place_of()
    folder = Path(cfg.run.dir)
    # a run that was killed before its first state begins anew
    resume = resume and (bool(checkpoint.states(folder)) or not (folder / "run.json").exists())
    setup = train.setup(cfg, rank, world, resume)
    if rank == 0:
        plan = train.plan(cfg, setup, timed=dry_run)
        echo(*plan.pop("text").split("\n"))
    if dry_run:
        return last_line(as_json, plan)
    result = fit_aloud(cfg, resume=resume, limit=deadline - time.monotonic(), s=setup)
    result["guard"] = checkpoint.warned(setup.meta)
    if rank == 0:
        state = f"stopped ({result['stopped']})" if "stopped" in result else "done"
        echo(f"{state}: {folder} after {result['step']} steps, {result['seconds']:.0f} s")
        last_line(as_json, result)
    if rank == 0 and result.get("stopped") not in (None, "eval.stop_at", "eval.patience"):
        raise typer.Exit(train.STOPPED)


@app.command()
@friendly
def overfit(
    groups: Annotated[int, option(min=2, help="The first tasks in order of their ids.")] = 32,
    augment: Annotated[bool, option("--augment", help="With symmetries, translation.")] = False,
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Can the model memorise a few real tasks? All their pairs are queries, weights are raw."""
    from . import config, solve

    extra = [f"data.max_train_tasks={groups}"]
    if augment:
        extra += ["data.dihedral=true", "data.colours=keep_black", "data.translate=true"]
    elif groups <= 10:
        extra += ["train.steps=500"]  # less to learn: the rate may fall sooner
    cfg = config.load_config("overfit-augment" if augment else "overfit", [*extra, *sets])
    result = solve.overfit(cfg, fit_aloud)
    echo(*result.pop("text").split("\n"))
    last_line(as_json, result)


# ---------------------------------------------------------------- eval, merge


def percents(row: dict[str, Any], keys: Iterable[str], n: int) -> str:
    """Shares of n, each with its name and interval."""
    from .score import with_interval

    return ", ".join(f"{key.rpartition('/')[2]} {with_interval(row[key], n)}" for key in keys)


def scores(result: dict[str, Any]) -> list[str]:
    """Lines: scores with their intervals, by size, and held-out evaluations so far."""
    from .score import PASS, verdicts

    tasks, queries = result["n_tasks"], result["n_queries"]
    lines = [percents(result, [f"pass@{k}"], tasks) for k in PASS]
    for name, n in (("all_queries", tasks), ("per_output", queries)):
        lines.append(f"{name}: {percents(result, [f'{name}/pass@1', f'{name}/pass@2'], n)}")
    views = percents(result, ("exact_match", "cell_accuracy", "shape_accuracy"), queries)
    lines += [f"some vote right: {percents(result, ['oracle'], queries)}", f"one view: {views}"]
    for kind in ("by_side", "by_source", "by_solver"):
        for name, row in result.get(kind, {}).items():
            keys = [key for key in ("pass@1", "pass@2") if key in row]
            lines.append(f"{kind} {name}: {percents(row, keys, row['n_tasks'])}")
    if "held_out_evaluation" in result:
        count = result["held_out_evaluation"]
        number = "not counted (state folder not writable)" if count is None else f"number {count}"
        lines.append(f"held-out evaluation of these tasks: {number}")
        lines += [verdicts(result)] if result.get("held_out", True) else []
    return lines


def share_done(noun: str) -> Callable[[float], None]:
    """Shows the share that is done and the time left: in place, or in a line a minute."""
    begun, live = time.monotonic(), sys.stderr.isatty()
    shown = begun

    def say(done: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if done and now - shown > (0.2 if live else 60):
            shown, left = now, (now - begun) * (1 / done - 1)
            line = f"{noun} {100 * done:.1f} %, {left / 60:.0f} min left"
            typer.echo(line + ("  \r" if live else ""), err=True, nl=not live)

    return say


@app.command(name="eval")
@friendly
def eval_command(
    checkpoints: Annotated[
        list[str], argument(metavar="CHECKPOINT...", help="Files, run folders; all vote together.")
    ],
    sources: Data = [],  # noqa: B006
    views: Annotated[int, option(help="Symmetries and demo orders; 0: as configured.")] = 0,
    adapt: Annotated[str, option(help="none, context or full: learn from the demos first.")] = "",
    act_steps: Annotated[int, option(help="ACT steps of a view; 0: as configured.")] = 0,
    budget: Annotated[float, option(help="Minutes: more views until they are over.")] = math.inf,
    shard: Annotated[str, option(help="i/n: every n-th task; etrm merge joins them.")] = "1/1",
    submission: Submission = "",
    predictions: Annotated[str, option(help="The .jsonl file in which votes are kept.")] = "",
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Answer tasks and score the answers: the dev split, or --data. Votes on disk are kept:
    after an interrupt the same command goes on."""
    from . import config, solve

    for path in checkpoints:
        if path.endswith((".json", ".jsonl")):
            raise config.UserError(f"{path}: is no checkpoint; name tasks with --data {path}")
    given = {"views": views, "adapt": adapt, "act_steps": act_steps}
    result = solve.evaluate(
        checkpoints,
        sources,
        [*sets, *(f"solve.{k}={v}" for k, v in given.items() if v)],
        predictions_file=predictions,
        budget=60 * budget,
        shard=shard,
        submit=submission,
        say=share_done("views"),
    )
    names = ", ".join(result["data"])
    facts = f"{result['views']} views, {result['adaptation']}, {result['votes']} votes"
    if result["act_steps"]:  # not where all solvers are made by hand
        facts += f", {result['act_steps']:.1f} ACT steps a view"
    facts += f", {result['seconds_per_task']:.3g} s a task; in {result['predictions']}"
    held_out = "hand-made, no weights"
    if "held_out" in result:
        shared = "NOT held out: shares pairs with the training data"
        held_out = "held out" if result["held_out"] else shared
    if "pass@2" in result:
        guard = f"; guard: {result['guard']}" if result["guard"] else ""
        echo(f"{names}: {held_out}; {facts}{guard}", *scores(result))
    else:
        echo(f"{names}: no output is known, so nothing is scored; {facts}")
    if result["too_large"]:
        echo(f"{result['too_large']} queries need a canvas larger than any trained on: no answer")
    if left := result["unanswered"] - result["too_large"]:
        echo(f"{left} queries have no answer yet: the budget ended; the same command goes on")
    last_line(as_json, result)


@app.command()
@friendly
def merge(
    files: Annotated[list[str], argument(help="predictions.jsonl; submissions of other solvers.")],
    sources: Data = [],  # noqa: B006
    output: Output = "",
    submission: Submission = "",
    as_json: Json = False,
) -> None:
    """Join predictions, and score them on --data; a vote that is in several files counts once."""
    from . import score

    result = score.merge([Path(f) for f in files], sources, output, submission)
    counts = f"{result['votes']} votes for {result['queries']} queries"
    echo(f"{counts}, {result['unanswered']} of them without any")
    if "pass@2" in result:
        echo("whether held out: etrm eval CHECKPOINT --predictions FILE says it", *scores(result))
    last_line(as_json, result)


# ---------------------------------------------------------------- solve, show, report, runs


@app.command()
@friendly
def solve(checkpoint: str, task: str, sets: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Answer the queries of a task file: demos, answer and confidence in colour."""
    from rich.console import Console

    from . import show as pictures
    from . import solve as solver

    console, queries = Console(markup=False, highlight=False), []

    def draw(left: Any, right: Any) -> None:
        console.print(pictures.beside(left, right), no_wrap=True, overflow="ignore", crop=False)

    for each, answered in solver.answers(checkpoint, task, sets):
        console.print(printable(each.name), style="bold")
        for x, y in each.demos:
            draw(x, y)
        for p, ranked in answered:
            draw(each.queries[p.query][0], ranked[0].grid if ranked else None)
            reason = f"no answer: none of {len(p.votes)} votes was a whole grid"
            if p.too_large:
                reason = f"no answer: needs a canvas of {p.too_large}, larger than any trained on"
            elif ranked:
                reason = f"{ranked[0].votes} of {len(p.votes)} votes agree"
                reason += f", confidence {100 * ranked[0].q:.1f} %"
            console.print(f"query {p.query + 1}: {reason}")
            answers = [
                {"grid": a.grid.tolist(), "votes": a.votes, "share": a.share, "confidence": a.q}
                for a in ranked[:2]
            ]
            about = {"task": p.task, "query": p.query, "votes": len(p.votes)}
            queries.append(about | {"answers": answers})
    last_line(as_json, {"queries": queries})


@app.command()
@friendly
def show(
    checkpoint: str,
    task: Annotated[str, option("--task", "-t", help="Its id, where there are several.")] = "",
    sources: Data = [],  # noqa: B006
    output: Output = "",
    query: Annotated[int, option(help="Which of the task's queries, from 0.")] = 0,
    pair_index: Annotated[
        int | None, option("--pair-index", "-p", help="Use this demo as the query of the others.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the answer after every ACT step, as .png, .svg or .pdf. Default: ID.png."""
    from . import show as pictures
    from . import solve as solver

    s = solver.opened(checkpoint)
    chosen = pictures.find_task(sources or [*s.cfg.data.dev, *s.cfg.data.train], task or None)
    timeline = pictures.timeline(s.params, s.cfg, chosen, query, pair_index)
    path = Path(output or f"{chosen.name.replace('/', '-')}.png")
    caption = f"{checkpoint}, step {s.meta.get('step', 'unknown')}, weights {s.source}"
    pictures.save(pictures.picture(timeline, printable(caption)), path)
    echo(f"{path}: {len(timeline.steps)} steps; checkpoint {s.path}, weights {s.source}")
    facts = {"task": chosen.name, "steps": len(timeline.steps), "output": str(path)}
    last_line(as_json, facts | {"weights": s.source})


@app.command()
@friendly
def report(
    run: Annotated[str, argument(help="A run folder.")],
    output: Output = "",
    sources: Data = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Write one HTML file, RUN/report.html: curves, known failures, config, gallery, contexts.
    The gallery shows tasks of the dev split, or of --data."""
    from . import show as pages

    path, page = pages.report(run, output, sources)
    echo(*(mark["text"] for mark in page["marks"]), *page["notes"])
    size = path.stat().st_size / 1e6
    echo(f"{path}: {size:.1f} MB, {len(page['curves'])} panels, {len(page['gallery'])} queries")
    counts = collections.Counter(query["status"] for query in page["gallery"])
    facts = {"output": str(path), "marks": page["marks"], "notes": page["notes"]}
    last_line(as_json, facts | {"gallery": counts})


def run_line(row: dict[str, Any]) -> str:
    """A run's state, steps, best value of what it watches, minutes since its last row."""
    best = f"{row['watched']} {row['best']:.4f}" if row.get("best") is not None else ""
    steps = f"{row.get('step', 0):>7}/{row.get('steps', 0):<7}"
    age = f"{row['age_s'] / 60:.0f} min  {row.get('guard', '')}"
    return f"{row['run']:40} {row['state']:14} {steps} {best:36} {age}".rstrip()


@app.command(name="runs")
@friendly
def runs_command(
    paths: Annotated[list[str], argument(metavar="[FOLDER | CHECKPOINT | RUN RUN...]")] = ["runs"],  # noqa: B006
    plot: Annotated[str, option(help="Draw the runs' curves: .png, .svg or .pdf.")] = "",
    csv: Annotated[str, option(help="Write the comparison, a line for each run.")] = "",
    as_json: Json = False,
) -> None:
    """List the runs below a folder (default: runs), describe one checkpoint, or compare runs."""
    from . import checkpoint
    from . import show as pages

    folder = Path(paths[0])
    if len(paths) > 1 or plot or csv:
        runs = [pages.opened(path) for path in paths]
        table = pages.compared(runs)
        echo(*pages.columns(table))
        if csv:
            checkpoint.write_text(Path(csv), pages.csv_of(table))
        if plot:
            pages.save(pages.plotted(runs), Path(plot))
        return last_line(as_json, {"runs": table})
    if folder == Path("runs") or (folder.is_dir() and not (folder / "run.json").exists()):
        rows = checkpoint.listing(folder)
        echo(*map(run_line, rows))
        return last_line(as_json, {"runs": rows})
    facts = checkpoint.inspect(paths[0])
    echo(*(f"{name:42} {' x '.join(map(str, shape))}" for name, shape in facts["shapes"].items()))
    echo(*(f"[{name}] {json.dumps(fields)[1:-1]}" for name, fields in facts["config"].items()))
    size = f"{facts['parameters']:,} parameters, step {facts['step']}, {facts['dtype']}"
    trained = f"trained on {facts['tasks']} tasks, hash {facts['data']}; guard: {facts['finding']}"
    echo(f"{facts['checkpoint']}: {size}", trained)
    last_line(as_json, facts)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
