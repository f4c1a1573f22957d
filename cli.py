"""The command `etrm`. Commands are thin; heavy imports stand inside them: --help needs no torch."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import UserError, load_config

REPORT = "etrm_arc.extras.report"  # behind the commands report and runs; lines of text


class Commands(typer.core.TyperGroup):
    """A mistake of the user's, or of the machine's, is one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
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
                raise stop(2, "out of memory: raise train.shards, or lower train.batch") from None
            raise


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
Recipe = Annotated[str, argument(metavar="CONFIG", help="A TOML file, or a shipped one's name.")]


def printable(text: object) -> str:
    """One line; control characters are escaped, so that no name from a file acts on a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def echo(*lines: object, err: bool = False) -> None:
    for line in lines:
        typer.echo(printable(line), err=err)


def last_line(as_json: bool, result: dict[str, Any]) -> None:
    """JSON, where it was asked for; a number that is not finite is null."""
    if as_json:
        finite = json.loads(json.dumps(result), parse_constant=lambda name: None)
        typer.echo(json.dumps(finite))


def stop(code: int, reason: object) -> typer.Exit:
    """An exit with this code, its reason printed in one line."""
    echo(f"etrm: {reason}", err=True)
    return typer.Exit(code)


def paced(seconds: float = 30) -> Callable[[str], None]:
    """Prints a line of progress unless there was one less than so many seconds ago."""
    last = -math.inf

    def say(line: str) -> None:
        nonlocal last
        if time.monotonic() >= last + seconds:
            last = time.monotonic()
            echo(line, err=True)

    return say


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, option("--version", help="Print the version.")] = False) -> None:
    if version:
        echo(f"etrm {importlib.metadata.version('etrm-arc')}")
        raise typer.Exit()


@app.command()
def data(sources: list[str], as_json: Json = False) -> None:
    """Describe sources: arc1:training, arc1:dev, arc2:..., composed:N, rearc:N, folders, files."""
    from . import sources as source

    facts = importlib.import_module(REPORT).describe(source.load(sources))
    echo(*(f"{name.replace('_', ' ')}: {json.dumps(fact)}" for name, fact in facts.items()))
    last_line(as_json, facts)


# ---------------------------------------------------------------- train


def fit_aloud(cfg: Any, setup: Any = None, **options: Any) -> dict[str, Any]:
    """Train, and print rows of metrics on the way."""
    from . import checkpoint, train

    setup, text = setup or train.setup(cfg), importlib.import_module(REPORT)
    warning, progress = checkpoint.warned(setup.meta), paced()

    def say(row: dict[str, Any]) -> None:
        if "all/lm_loss" in row:
            progress(text.training_line(row, cfg.train.steps))
        else:
            line = f"skipped {row['skipped']}" if "skipped" in row else text.evaluation_line(row)
            echo(f"{line}  {warning}".rstrip(), err=True)

    return train.fit(cfg, say, s=setup, **options)


def seconds(text: str) -> float:
    """8h50m, 90m, 30s or a number of seconds; no limit where there is no text."""
    parts = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text, re.ASCII)
    if not parts:
        raise UserError(f"--time-limit {text}: must look like 8h50m, 90m or 3600")
    hours, minutes, rest = (int(n or 0) for n in parts.groups())
    return 3600 * hours + 60 * minutes + rest if text else math.inf


@app.command()
def train(
    recipe: Recipe,
    fast: Annotated[bool, option("--fast", help="The config's quick setting.")] = False,
    sets: Set = [],  # noqa: B006 (typer copies it)
    resume: Annotated[bool, option("--resume", help="Go on from the newest whole state.")] = False,
    time_limit: Annotated[str, option(help="Save and stop after 8h50m; exit code 75.")] = "",
    procs: Annotated[int, option(min=1, help="Processes (torchrun for several machines).")] = 1,
    dry_run: Annotated[bool, option("--dry-run", help="Say what it takes, train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train as a TOML recipe says."""
    from . import checkpoint
    from . import train as trainer

    deadline = time.monotonic() + seconds(time_limit)
    cfg = load_config(recipe, sets, fast)
    if procs > 1 and "RANK" not in os.environ and not dry_run:
        shards = ["--set", f"train.shards={procs}"] if cfg.train.shards % procs else []
        launcher = importlib.import_module(f"{__package__}.extras.launch")
        raise typer.Exit(launcher.launch([*sys.argv[1:], *shards], procs))
    rank, _ = trainer.place_of()
    folder = Path(cfg.run.dir)
    # a run that was killed before its first state begins anew
    resume = resume and (bool(checkpoint.states(folder)) or not (folder / "run.json").exists())
    setup = trainer.setup(cfg, resume)
    if rank == 0:
        plan = trainer.plan(setup, timed=dry_run)
        echo(*(f"{name}: {value}" for name, value in plan.items()))
        last_line(as_json and dry_run, plan)
    if dry_run:
        return
    result = fit_aloud(cfg, setup, resume=resume, limit=deadline - time.monotonic())
    if rank == 0:
        state = f"stopped ({result['stopped']})" if "stopped" in result else "done"
        echo(f"{state}: {folder} after {result['step']} steps, {result['seconds']:.0f} s")
        last_line(as_json, result | {"guard": checkpoint.warned(setup.meta)})
        if result.get("stopped") not in (None, "eval.stop_at", "eval.patience"):
            raise typer.Exit(trainer.STOPPED)


@app.command()
def overfit(
    recipe: Recipe = "overfit",
    groups: Annotated[int, option(min=2, help="The first tasks in order of their ids.")] = 32,
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Can the model memorise a few real tasks? All their pairs are queries, weights are raw."""
    from . import solve

    cfg = load_config(recipe, [f"data.max_train_tasks={groups}", "eval.on=train", *sets])
    result = solve.overfit(cfg, fit_aloud)
    echo(*result.pop("text").split("\n"))
    last_line(as_json, result)


# ---------------------------------------------------------------- eval, merge


@app.command(name="eval")
def evaluate(
    checkpoints: Annotated[list[str], argument(help="Files, run folders; all vote together.")],
    sources: Data = [],  # noqa: B006
    views: Annotated[int, option(help="Symmetries and demo orders; 0: as configured.")] = 0,
    adapt: Annotated[str, option(help="none, context or full: learn from the demos first.")] = "",
    act_steps: Annotated[int, option(help="ACT steps of a view; 0: as configured.")] = 0,
    budget: Annotated[float, option(min=0, help="Minutes; views until they end.")] = math.inf,
    shard: Annotated[str, option(help="i/n: every n-th task; etrm merge joins them.")] = "1/1",
    submission: Submission = "",
    predictions: Annotated[str, option(help="The .jsonl file in which votes are kept.")] = "",
    sets: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Answer and score the dev split, or --data; after an interrupt the same command goes on."""
    from . import solve

    for path in checkpoints:
        if path.endswith((".json", ".jsonl")):
            raise UserError(f"{path}: is no checkpoint; name tasks with --data {path}")
    given = {"views": views, "adapt": adapt, "act_steps": act_steps}
    sets = [*sets, *(f"solve.{k}={v}" for k, v in given.items() if v)]
    begun, progress = time.monotonic(), paced()

    def say(done: float) -> None:
        left = (time.monotonic() - begun) * (1 / done - 1)
        progress(f"views {100 * done:.1f} %, {left / 60:.0f} min left")

    files = predictions, 60 * budget, shard, submission
    result = solve.evaluate(checkpoints, sources, sets, *files, say)
    echo(*importlib.import_module(REPORT).evaluated_lines(result))
    last_line(as_json, result)


@app.command()
def merge(
    files: Annotated[list[str], argument(help="predictions.jsonl; submissions of other solvers.")],
    sources: Data = [],  # noqa: B006
    output: Output = "",
    submission: Submission = "",
    as_json: Json = False,
) -> None:
    """Join predictions, and score them on --data; a vote that is in several files counts once."""
    from .solve import SUBMISSIONS

    join = importlib.import_module(SUBMISSIONS).merge
    result = join([Path(f) for f in files], sources, output, submission)
    counts = f"{result['votes']} votes for {result['queries']} queries"
    scores = importlib.import_module(REPORT).score_lines(result)
    echo(f"{counts}, {result['unanswered']} without any", *scores)
    last_line(as_json, result)


# ---------------------------------------------------------------- solve, show, report, runs


@app.command()
def solve(checkpoint: str, task: str, sets: Set = [], as_json: Json = False) -> None:  # noqa: B006
    """Answer the queries of a task file: demos, answer and confidence in colour."""
    from rich.console import Console

    from . import score, sources
    from . import show as pictures
    from . import solve as solver

    console, queries = Console(markup=False, highlight=False), []
    tasks = sources.load([task], hide=True)
    predictions = solver.ask(solver.solver_of(checkpoint, sets), tasks)
    for each in tasks:
        echo(each.name)
        for x, y in each.demos:
            console.print(pictures.beside(x, y), soft_wrap=True)
        for p in (p for p in predictions if p.task == each.name):
            ranked = score.rank(p.votes)
            query, best = each.queries[p.query][0], ranked[0].grid if ranked else None
            console.print(pictures.beside(query, best), soft_wrap=True)
            if ranked:
                votes, confidence = ranked[0].votes, f"{100 * ranked[0].q:.1f} %"
                text = f"{votes} of {len(p.votes)} votes agree, confidence {confidence}"
            else:
                text = "no answer: no whole grid among the votes, or data.max_side is too small"
            echo(f"query {p.query + 1}: {text}")
            answers = [a._asdict() | {"grid": a.grid.tolist()} for a in ranked[:2]]
            about = {"task": p.task, "query": p.query, "votes": len(p.votes)}
            queries.append(about | {"answers": answers})
    last_line(as_json, {"queries": queries})


@app.command()
def show(
    checkpoint: str,
    task: Annotated[str, option("--task", "-t", help="Its id; by default the first one.")] = "",
    sources: Data = [],  # noqa: B006
    output: Output = "",
    query: Annotated[int, option(help="Which of the task's queries, from 0.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw the answer after every ACT step, as .png, .svg or .pdf. Default: ID.png."""
    from . import show as pictures
    from . import solve as solver

    s = solver.opened(checkpoint)
    chosen = pictures.find_task(sources or pictures.places(s.cfg.data), task)
    timeline = pictures.timeline(s, chosen, query)
    path, n = output or f"{chosen.name.replace('/', '-')}.png", len(timeline.steps)
    caption = f"{checkpoint}, step {s.meta['step']}, weights {s.source}"
    pictures.save(pictures.picture(timeline, printable(caption)), Path(path))
    echo(f"{path}: {n} steps; checkpoint {s.path}, weights {s.source}")
    last_line(as_json, {"task": chosen.name, "steps": n, "weights": s.source, "output": path})


@app.command()
def report(
    run: Annotated[str, argument(help="A run folder.")],
    sources: Data = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Write RUN/report.html: curves, failures, config, a gallery of dev or --data, contexts."""
    path, page = importlib.import_module(REPORT).report(run, sources)
    echo(*(mark["text"] for mark in page["marks"]), page["note"], path)
    last_line(as_json, {"output": str(path), "marks": page["marks"], "note": page["note"]})


@app.command()
def runs(
    paths: Annotated[list[str], argument(metavar="[PATH...]")] = ["runs"],  # noqa: B006
    plot: Annotated[str, option(help="Draw the runs' curves: .png, .svg or .pdf.")] = "",
    table: Annotated[str, option("--csv", help="Write the comparison, a line for each run.")] = "",
    as_json: Json = False,
) -> None:
    """List the runs below a folder (default: runs), describe one checkpoint, or compare runs."""
    folder, pages = Path(paths[0]), importlib.import_module(REPORT)
    if len(paths) > 1 or plot or table:
        compared = [pages.opened(path) for path in paths]
        rows = pages.compared(compared)
        echo(*pages.columns(rows))
        pages.save_comparison(compared, rows, table, plot)
        return last_line(as_json, {"runs": rows})
    if folder == Path("runs") or (folder.is_dir() and not (folder / "run.json").exists()):
        rows = pages.listing(folder)
        echo(*(map(pages.run_line, rows) if rows else [f"no run below {folder}"]))
        return last_line(as_json, {"runs": rows})
    facts = pages.inspect(paths[0])
    echo(*pages.inspection_lines(facts))
    last_line(as_json, facts)


main = app  # the console script

if __name__ == "__main__":
    main()
