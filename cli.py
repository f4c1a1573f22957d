"""The command `etrm`. Commands are thin; heavy imports stand inside them, so that --help needs neither torch nor numpy."""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(
    help="Train and evaluate an encoder-based Tiny Recursive Model on ARC-AGI.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # what draws boxes around help takes longer to import than all else
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Set = Annotated[
    Optional[list[str]],
    typer.Option("--set", help="Override a config field: a.b=value (repeatable)."),
]  # noqa: UP045


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake is one line and exit code 2; so is running out of memory."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from .config import UserError

        try:
            command(*args, **kwargs)
        except UserError as e:
            typer.echo(f"etrm: {e}", err=True)
            raise typer.Exit(2) from None
        except (MemoryError, RuntimeError) as e:
            from . import train

            rank, world = train.place_of()
            if world > 1 and re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out", str(e)):
                time.sleep(3 * (train.BEAT in os.environ))  # the launcher says whose fault it was
                typer.echo(
                    f"etrm: process {rank} lost the others; what was saved is whole: --resume",
                    err=True,
                )
                raise typer.Exit(1) from None
            if not isinstance(e, MemoryError) and not re.search(
                "out of memory|can't allocate memory", str(e)
            ):
                raise
            typer.echo(
                "etrm: out of memory: raise train.shards, or lower train.batch or model.hidden",
                err=True,
            )
            raise typer.Exit(2) from None

    return run


def last_line(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(result))


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def interval(result: dict[str, Any], key: str, n: int) -> str:
    from .score import with_interval

    return with_interval(result[key], n)


@app.command(name="data")
@friendly
def data_command(sources: list[str], as_json: Json = False) -> None:
    """Describe task sources: arc1:training, arc1:evaluation, arc1:dev, arc2:..., composed:N, folders and files."""
    from . import sources as source

    tasks = source.load(sources)
    found = source.describe(tasks)
    canvases = "; ".join(
        f"{rule}: {', '.join(f'{k}: {v}' for k, v in p.items())}"
        for rule, p in found["canvases"].items()
    )
    typer.echo(
        f"{found['tasks']} tasks, {found['pairs']} pairs, {found['queries']} queries"
        f" ({found['hidden_outputs']} outputs hidden), {found['bytes'] / len(tasks):.0f} bytes a task\n"
        f"demos per task: {', '.join(f'{k}: {v}' for k, v in found['demos_per_task'].items())}\n"
        f"largest side of a pair: median {found['side']['median']}, at most {found['side']['max']}\n"
        f"queries by side of their canvas, {canvases}\nhash {found['hash']}"
    )
    last_line(as_json, found)


def progress(total: int, warning: str) -> Callable[[dict[str, Any]], None]:
    """A live line on a terminal, a plain line per row elsewhere; the warning stands on every evaluation."""
    from rich.console import Console
    from rich.live import Live

    from .score import with_interval

    console = Console(stderr=True, markup=False)
    live = (
        Live(console=console, refresh_per_second=4, transient=False)
        if console.is_terminal
        else None
    )
    if live:
        live.start()

    def say(row: dict[str, Any]) -> None:
        if "skipped" in row:
            console.print(f"skipped {row['skipped']}", soft_wrap=True)
        elif "all/lm_loss" in row:
            rate = row["samples_per_s"]
            left = (total - row["step"]) * row["samples"] / row["step"] / rate
            text = (
                f"step {row['step']}/{total}  loss {row['all/lm_loss']:.3f}  exact {percent(row['all/exact'])}"
                f"  ACT steps {row.get('halted/steps', 0):.1f}  {rate:.1f} samples/s  {left / 60:.0f} min left"
            )
            live.update(text) if live else console.print(text, soft_wrap=True)
        else:
            n = next((int(v) for k, v in row.items() if k.endswith("/n")), 0)
            plain = lambda k: not k.endswith("/exact") or k.startswith("gap/")  # noqa: E731
            own = {
                k: f"{v:.3f}" if plain(k) else with_interval(v, n)
                for k, v in row.items()
                if "/" in k and not k.endswith("/n")
            }
            said = [
                f"step {row['step']}  n {n}",
                *(f"{k} {v}" for k, v in own.items()),
                *filter(None, [warning]),
            ]
            console.print("  ".join(said), soft_wrap=True)

    say.stop = live.stop if live else (lambda: None)  # type: ignore[attr-defined]
    return say


def seconds(text: str) -> float:
    """8h50m, 90m, 30s or a number of seconds."""
    from .config import UserError

    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or not found:
        raise UserError(f"--time-limit {text}: must look like 8h50m, 90m or 3600")
    return sum(int(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def fit_aloud(cfg: Any, s: Any = None, **options: Any) -> dict[str, Any]:
    from . import checkpoint, train

    s = s or train.setup(cfg, *train.place_of())
    say = progress(cfg.train.steps, checkpoint.warned(s.meta))
    try:
        return train.fit(cfg, say, s=s, **options)
    finally:
        say.stop()  # type: ignore[attr-defined]


@app.command(name="train")
@friendly
def train_command(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG...", help="TOML files, or names of shipped ones; one after the other."
        ),
    ],
    fast: Annotated[bool, typer.Option("--fast", help="The config's quick setting.")] = False,
    sets: Set = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Run each config with so many seeds, each in run.dir-s<seed>."),
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest whole state; runs that ended are skipped."
        ),
    ] = False,
    source: Annotated[
        str, typer.Option("--from", help="Fork: go on in run.dir from the state of this folder.")
    ] = "",
    time_limit: Annotated[
        str, typer.Option(help="Save and stop after 8h50m, 90m or seconds; exit code 75.")
    ] = "",
    procs: Annotated[
        int, typer.Option(min=1, help="Processes on this machine (torchrun for several machines).")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take, train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train from TOML recipes; a shipped one may be named without its path."""
    import msgspec

    from . import config, train

    limit = time.monotonic() + (seconds(time_limit) if time_limit else math.inf)
    if procs > 1 and "RANK" not in os.environ and not dry_run:
        sets = spread([config.load_config(r, sets or [], fast) for r in recipes], sets or [], procs)
        given = [
            *(["--fast"] if fast else []),
            *(["--resume"] if resume else []),
            *(["--json"] if as_json else []),
        ]
        given += [x for item in sets for x in ("--set", item)] + ["--seeds", str(seeds)]
        given += (["--from", source] if source else []) + (
            ["--time-limit", time_limit] if time_limit else []
        )
        raise typer.Exit(train.launch(["train", *recipes, *given], procs))
    train.beat()
    made: dict[
        tuple[str, int], str
    ] = {}  # (run.dir of an earlier recipe as it stands there, seed) -> the folder of that run here
    for recipe in recipes:
        cfg, stands = (
            config.load_config(recipe, sets or [], fast),
            config.load_config(recipe, sets or []).run.dir,
        )
        for k in range(seeds):
            run = msgspec.structs.replace(
                cfg.run,
                seed=cfg.run.seed + k,
                dir=f"{cfg.run.dir}-s{cfg.run.seed + k}" if seeds > 1 else cfg.run.dir,
            )
            path = made.get((cfg.init_from.path, k), cfg.init_from.path)
            one = msgspec.structs.replace(
                cfg, run=run, init_from=msgspec.structs.replace(cfg.init_from, path=path)
            )
            made[stands, k] = "" if dry_run and not os.path.isdir(run.dir) else run.dir
            several = len(recipes) * seeds > 1
            result = train_one(one, resume, several, source, limit - time.monotonic(), dry_run)
            last_line(as_json and train.place_of()[0] == 0, result)
            if result.get("stopped") not in (None, "eval.stop_at", "eval.patience"):
                raise typer.Exit(train.STOPPED)


def spread(configs: list[Any], sets: list[str], procs: int) -> list[str]:
    """Settings under which every process has work: as many shards as processes where the config's cannot be spread over them."""
    if all(c.train.shards % procs == 0 for c in configs):
        return sets
    return [*sets, f"train.shards={procs}"]


def train_one(
    cfg: Any, resume: bool, several: bool, source: str, limit: float, dry_run: bool
) -> dict[str, Any]:
    """One run; of several that are resumed, those that ended are left alone and those that never began begin."""
    from pathlib import Path

    from . import checkpoint, train

    rank, world = train.place_of()
    folder = Path(cfg.run.dir)
    begun = bool(checkpoint.manifests(folder))
    row = checkpoint.described(folder) if several and resume and begun else {"state": ""}
    if row["state"] in ("eval.stop_at", "eval.patience") or (
        row["state"] == "done" and row["step"] >= cfg.train.steps
    ):
        if rank == 0:
            typer.echo(f"{folder} has ended: {row['state']}")
        return row
    setup = train.setup(cfg, rank, world)
    plan = train.plan(cfg, setup, timed=dry_run) if rank == 0 else {}
    if rank == 0:
        typer.echo(plan.pop("text"))
    if dry_run:
        return plan
    # what was killed before its first state begins, or forks, anew
    go_on = resume and (begun or not (several or source or (folder / "run.json").exists()))
    forked = Path(source) if source and not go_on else None
    result = fit_aloud(cfg, resume=go_on, limit=limit, source=forked, s=setup)
    result["guard"] = checkpoint.warned(setup.meta)
    if rank == 0:
        why = f"stopped ({result['stopped']})" if "stopped" in result else "done"
        typer.echo(f"{why}: {cfg.run.dir} after {result['step']} steps, {result['seconds']:.0f} s")
    return result


@app.command(name="runs")
@friendly
def runs_command(
    folder: Annotated[str, typer.Argument(help="Looked through with all that is in it.")] = "runs",
    as_json: Json = False,
) -> None:
    """List runs: running, stopped or ended, how far, the best value of what they watch, minutes since their last row."""
    from pathlib import Path

    from .checkpoint import listing
    from .score import with_interval

    found = listing(Path(folder))
    for row in found:
        value, n = row.get("best"), row.get("n")
        best = (
            ""
            if value is None
            else f"{row['watched']} {with_interval(value, n) if n else f'{value:.4f}'}"
        )
        at = f"{row.get('step', 0):>7}/{row.get('steps', 0):<7} {best:36} {row['age_s'] / 60:.0f} min  {row.get('guard', '')}"
        typer.echo(f"{row['run']:40} {row['state']:14} {at}".rstrip())
    last_line(as_json, {"runs": found})


Views = Annotated[
    Optional[int], typer.Option(min=1, help="Symmetries and demo orders to vote over.")
]  # noqa: UP045
Adapt = Annotated[
    str, typer.Option(help="none, context or full: learn from the task's demos first.")
]
Steps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--act-steps", min=1, help="ACT steps of a view. Default: as trained."),
]


def how(
    sets: Optional[list[str]],  # noqa: UP045
    views: Optional[int],  # noqa: UP045
    act_steps: Optional[int],  # noqa: UP045
    adapt: str,
) -> list[str]:
    """Options as overrides of the config's [solve]."""
    given = {"views": views, "act_steps": act_steps, "adapt": adapt and f'"{adapt}"'}
    return [*(sets or []), *(f"solve.{k}={v}" for k, v in given.items() if v)]


@app.command(name="eval")
@friendly
def eval_command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...", help="Files or run folders; several vote together."
        ),
    ],
    sources: Annotated[
        Optional[list[str]], typer.Option("--data", help="Default: the dev split.")
    ] = None,  # noqa: UP045
    views: Views = None,
    act_steps: Steps = None,
    adapt: Adapt = "",
    budget: Annotated[
        float, typer.Option(help="Minutes: more views of all queries until they are over.")
    ] = math.inf,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th task; etrm merge joins the predictions.")
    ] = "1/1",
    submission: Annotated[
        str, typer.Option(help="Write both attempts at every query there, as Kaggle wants them.")
    ] = "",
    predictions: Annotated[
        str,
        typer.Option(
            help="Where votes are kept. Default: predictions.jsonl beside the checkpoint."
        ),
    ] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Raw weights instead of their average (EMA).")
    ] = False,
    sets: Set = None,
    as_json: Json = False,
) -> None:
    """Answer tasks and score the answers. What is on disk is not asked again: the same command goes on after an interrupt."""
    from . import solve

    given = how(sets, views, act_steps, adapt)
    try:
        result = solve.evaluate(
            checkpoints,
            sources or (),
            given,
            "raw" if raw else "ema",
            predictions,
            60 * budget,
            shard,
            submission,
            done_so_far("views"),
        )
    except KeyboardInterrupt:
        typer.echo(
            "etrm: interrupted; what was answered is kept: the same command goes on", err=True
        )
        raise typer.Exit(130) from None
    said = f"{result['views']} views, {result['adaptation']}, "
    if result["act_steps"]:
        said += f"{result['act_steps']:.1f} ACT steps a view, "
    said += f"{result['seconds_per_task']:.3g} s a task; "
    said += f"{result['votes']} votes in {result['predictions']}"
    names = ", ".join(result["data"])
    if "pass@2" in result:
        held = {True: "held out", False: "NOT held out: shares pairs with what was trained on"}
        guard = f"; guard: {result['guard']}" if result["guard"] else ""
        held_out = held[result["held_out"]] if "held_out" in result else "hand-made, no weights"
        typer.echo(f"{names}: {held_out}; {said}{guard}\n{table(result)}")
        for part, own in (
            *result.get("by_source", {}).items(),
            *result.get("by_solver", {}).items(),
        ):
            n = own["n_tasks"]
            shares = ", ".join(f"pass@{k} {interval(own, f'pass@{k}', n)}" for k in (1, 2))
            typer.echo(f"{part}: {shares}")
    else:
        typer.echo(f"{names}: no output is known, so nothing is scored; {said}")
    if result["too_large"]:
        typer.echo(
            f"{result['too_large']} queries need a larger canvas than any the model was trained on: no answer"
        )
    if left := result["unanswered"] - result["too_large"]:
        typer.echo(f"{left} queries have no answer yet: the budget ended; the same command goes on")
    last_line(as_json, result)


def done_so_far(what: str) -> Callable[[float], None]:
    """Says the share that is done and the time left: in place on a terminal, elsewhere in a line a minute."""
    begun, live = time.monotonic(), sys.stderr.isatty()
    said = begun

    def say(done: float) -> None:
        nonlocal said
        now = time.monotonic()
        if done and now - said > (0.2 if live else 60):
            said, left = now, (now - begun) * (1 / done - 1)
            typer.echo(
                f"{what} {percent(done)}, {left / 60:.0f} min left" + ("  \r" if live else ""),
                err=True,
                nl=not live,
            )

    return say


def table(result: dict[str, Any]) -> str:
    """Scores with their intervals, and by size."""
    from .score import PASS, verdicts

    n, q = result["n_tasks"], result["n_queries"]
    rows = [f"pass@{k} {interval(result, f'pass@{k}', n)}" for k in PASS]
    for key, name, of in (
        ("all_queries", "all of a task's queries", n),
        ("per_output", "per output", q),
    ):
        rows.append(
            f"{name}: "
            + ", ".join(f"pass@{k} {interval(result, f'{key}/pass@{k}', of)}" for k in (1, 2))
        )
    rows.append(f"some vote right {interval(result, 'oracle', q)}")
    names = (
        ("exact_match", "exact match"),
        ("cell_accuracy", "cell accuracy"),
        ("shape_accuracy", "shape accuracy"),
    )
    rows += [f"{name}, one view {interval(result, key, q)}" for key, name in names]
    by = (f"{k} {interval(v, 'pass@2', v['n_tasks'])}" for k, v in result["by_side"].items())
    rows.append(f"pass@2 by largest side: {', '.join(by)}")
    if "held_out_evaluation" in result:
        number = result["held_out_evaluation"]
        count = (
            "could not be counted (state folder not writable)"
            if number is None
            else f"number {number}"
        )
        rows.append(f"held-out evaluation of these tasks: {count}")
        if result.get("held_out", True):
            rows.append(verdicts(result))
    return "\n".join(rows)


@app.command()
@friendly
def inspect(checkpoint: str, as_json: Json = False) -> None:
    """What a checkpoint holds: parameters by module, config, training data, what the held-out guard found."""
    from .checkpoint import inspect as look_into

    found = look_into(checkpoint)
    for module, named in found["modules"].items():
        typer.echo(f"{module}: {found['sizes'][module]:,}")
        for name, shape in named.items():
            typer.echo(f"  {name:40} {' x '.join(map(str, shape))}")
    for table, fields in found["config"].items():
        typer.echo(f"[{table}] " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in fields.items()))
    typer.echo(
        f"{found['checkpoint']}: {found['parameters']:,} parameters, step {found['step']}, {found['dtype']}\n"
        f"trained on {found['tasks']} tasks, hash {found['data']}; guard: {found['finding']}"
    )
    last_line(as_json, found)


@app.command()
@friendly
def convert(
    source: Annotated[str, typer.Argument(help="A published checkpoint, or one of ours.")],
    target: Annotated[
        str, typer.Argument(help="To .safetensors: one of ours; else a published one.")
    ],
    recipe: Annotated[
        str, typer.Option("--config", help="Of the published model: its sizes, heads and cycles.")
    ] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Raw weights instead of their average (EMA).")
    ] = False,
    sets: Set = None,
    as_json: Json = False,
) -> None:
    """Write a published checkpoint as ours, ours as a published one, or ours lean: one set of weights in bfloat16."""
    from pathlib import Path

    from . import checkpoint, config

    cfg = config.load_config(recipe, sets or []) if recipe else None
    text = checkpoint.convert(source, Path(target), cfg, "raw" if raw else "ema")
    typer.echo(text)
    last_line(as_json, {"output": target, "text": text})


@app.command()
@friendly
def merge(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="predictions.jsonl of shards and runs; submissions of others."
        ),
    ],
    sources: Annotated[
        Optional[list[str]], typer.Option("--data", help="Tasks to score and to submit.")
    ] = None,  # noqa: UP045
    output: Annotated[str, typer.Option("--output", "-o", help="Write all votes there.")] = "",
    submission: Annotated[str, typer.Option(help="Write both attempts at every query there.")] = "",
    as_json: Json = False,
) -> None:
    """Join predictions; a vote that stands in several files counts once."""
    from pathlib import Path

    from . import solve

    result = solve.merge([Path(f) for f in files], sources or (), output, submission)
    typer.echo(
        f"{result['votes']} votes for {result['queries']} queries, {result['unanswered']} of them without any"
    )
    if "pass@2" in result:
        typer.echo(
            f"whether held out: see the solvers (etrm eval CHECKPOINT --predictions FILE)\n{table(result)}"
        )
    last_line(as_json, result)


@app.command()
@friendly
def overfit(
    groups: Annotated[int, typer.Option(min=2, help="The first tasks in order of their ids.")] = 32,
    augment: Annotated[
        bool, typer.Option("--augment", help="With symmetries and translation.")
    ] = False,
    sets: Set = None,
    as_json: Json = False,
) -> None:
    """Can the model learn a few real tasks by heart? Every pair of them is asked, raw weights are scored."""
    from . import config
    from . import solve as solver

    extra = [f"data.max_train_tasks={groups}"]
    extra += (
        ["train.steps=500"] if groups <= 10 and not augment else []
    )  # less to learn: the rate may fall sooner
    extra += (
        ["data.dihedral=true", 'data.colours="keep_black"', "data.translate=true"]
        if augment
        else []
    )
    cfg = config.load_config("overfit-augment" if augment else "overfit", [*extra, *(sets or [])])
    result = solver.overfit(cfg, fit_aloud)
    typer.echo(result.pop("text"))
    last_line(as_json, result)


@app.command()
@friendly
def solve(
    checkpoint: str,
    task: str,
    views: Views = None,
    act_steps: Steps = None,
    adapt: Adapt = "",
    sets: Set = None,
    as_json: Json = False,
) -> None:
    """Answer the queries of a task file: demos, answer and confidence in colour."""
    from rich.console import Console

    from . import solve as solver

    console, made = Console(), []
    for each, queries in solver.answers(checkpoint, task, how(sets, views, act_steps, adapt)):
        console.print(f"[bold]{each.name}[/bold]")
        for x, y in each.demos:
            console.print(beside(x, y), no_wrap=True, overflow="ignore", crop=False)
        for p, ranked in queries:
            best = ranked[0] if ranked else None
            shown = beside(each.queries[p.query][0], best.grid if best else None)
            console.print(shown, no_wrap=True, overflow="ignore", crop=False)
            if p.too_large:
                said = f"no answer: it needs a canvas of {p.too_large}, larger than any the model was trained on"
            elif best is None:
                said = f"no answer: none of {len(p.votes)} votes was a whole grid"
            else:
                said = f"{best.votes} of {len(p.votes)} votes agree, confidence {percent(best.q)}"
            console.print(f"query {p.query + 1}: {said}")
            tries = [
                {"grid": c.grid.tolist(), "votes": c.votes, "share": c.share, "confidence": c.q}
                for c in ranked[:2]
            ]
            made.append({"task": p.task, "query": p.query, "answers": tries, "votes": len(p.votes)})
    last_line(as_json, {"queries": made})


@app.command()
@friendly
def show(
    checkpoint: str,
    task: Annotated[
        Optional[str],
        typer.Option("--task", "-t", help="Its id; not needed where there is only one."),
    ] = None,  # noqa: UP045
    sources: Annotated[
        Optional[list[str]], typer.Option("--data", help="Default: dev split and training set.")
    ] = None,  # noqa: UP045
    output: Annotated[
        str, typer.Option("--output", "-o", help=".png, .svg, .pdf or .gif. Default: ID.png")
    ] = "",
    query: Annotated[int, typer.Option(help="Which of the task's queries, from 0.")] = 0,
    pair_index: Annotated[
        Optional[int], typer.Option("--pair-index", "-p", help="Ask this demo, from the others.")
    ] = None,  # noqa: UP045
    cycles: Annotated[
        bool, typer.Option("--cycles", help="Also within an ACT step: after every H cycle.")
    ] = False,
    target: Annotated[
        bool,
        typer.Option(
            "--target/--no-target", help="Show the right answer and mark right and wrong cells."
        ),
    ] = True,
    diff: Annotated[
        bool,
        typer.Option("--diff/--no-diff", help="Mark the cells that changed since the last step."),
    ] = True,
    gif: Annotated[bool, typer.Option("--gif", help="Animate.")] = False,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw it here, in colour blocks.")
    ] = False,
    dpi: Annotated[int, typer.Option(min=20, help="Dots per inch.")] = 150,
    as_json: Json = False,
) -> None:
    """Watch the answer form: a picture of every ACT step."""
    from pathlib import Path

    from rich.console import Console

    from . import show as pictures
    from . import solve as solver

    s = solver.opened(checkpoint)
    found = pictures.find_task(tuple(sources or ()) or (*s.cfg.data.dev, *s.cfg.data.train), task)
    t = pictures.timeline(s.params, s.cfg, found, query, pair_index, cycles)
    t = t if target else t._replace(target=None)
    if terminal:
        shown = [
            *(beside(x, y) for x, y in t.task.demos),
            beside(t.question, t.target),
            pictures.blocks(t, diff),
        ]
        for part in shown:
            Console().print(part, no_wrap=True, overflow="ignore", crop=False)
        return last_line(as_json, {"task": found.name, "steps": len(t.steps)})
    path = Path(output or f"{found.name.replace('/', '-')}.{'gif' if gif else 'png'}")
    moving = gif or path.suffix == ".gif"
    which = (
        f" --query {query}" * (query > 0) if pair_index is None else f" --pair-index {pair_index}"
    )
    which += " --cycles" * cycles
    caption = f"etrm show {checkpoint} --task {found.name}{which}: weights {s.source}, step {s.meta.get('step', 'unknown')}"
    panels = (
        pictures.animate(t, path, diff, dpi)
        if moving
        else pictures.draw(t, path, diff, dpi, caption)
    )
    typer.echo(
        f"{path}: {panels} {'frames' if moving else 'panels'}; checkpoint {s.path}, weights {s.source}"
    )
    last_line(
        as_json,
        {
            "task": found.name,
            "steps": len(t.steps),
            "panels": panels,
            "output": str(path),
            "weights": s.source,
        },
    )


@app.command()
@friendly
def report(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Default: report.html in the folder.")
    ] = "",
    sources: Annotated[
        Optional[list[str]],
        typer.Option("--data", help="Tasks of the gallery. Default: the dev split."),
    ] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write one HTML file, to be opened from disk: curves, known failures, config, gallery of answers, contexts."""
    from . import show as pages

    path, found = pages.report(run, output, sources or ())
    typer.echo("\n".join([*(m["said"] for m in found["marks"]), *found["notes"]]))
    typer.echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(found['curves'])} panels, {len(found['gallery'])} queries"
    )
    counts = dict(collections.Counter(e["status"] for e in found["gallery"]))
    last_line(
        as_json,
        {"output": str(path), "marks": found["marks"], "gallery": counts, "notes": found["notes"]},
    )


@app.command()
@friendly
def compare(
    folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")],
    plot: Annotated[
        str, typer.Option(help="Their curves overlaid, written there: .png, .svg or .pdf.")
    ] = "",
    csv: Annotated[str, typer.Option(help="The table, a line per run, written there.")] = "",
    as_json: Json = False,
) -> None:
    """Runs side by side: last and best values, what they took, the config keys in which they differ."""
    from pathlib import Path

    from . import show as pages

    runs, table = pages.compared(folders)
    typer.echo(pages.columns(table))
    if csv:
        pages.write_csv(table, Path(csv))
    if plot:
        typer.echo(f"{plot}: {pages.plot(runs, Path(plot))} panels")
    last_line(as_json, {"runs": table})


def beside(left: Any, right: Any) -> Any:
    """Two grids in ARC's colours with an arrow between them."""
    from rich.text import Text

    from .data import PALETTE

    text = Text()
    for r in range(max(len(left), 0 if right is None else len(right))):
        for part, gap in ((left, "  -> " if r == 0 else "     "), (right, "\n")):
            row = part[r] if part is not None and r < len(part) else []
            for cell in row:
                text.append(
                    f"{cell} ",
                    style=f"{'black' if cell in (4, 8) else 'white'} on {PALETTE[int(cell)]}",
                )
            if part is left:
                text.append(" " * 2 * (left.shape[1] - len(row)))
            text.append("  ->  ?" if part is left and right is None and r == 0 else gap)
    return text


def main() -> None:
    app()


if __name__ == "__main__":
    main()
