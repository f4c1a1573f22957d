"""A TOML file is a recipe: read, overridden and checked strictly; one place for every default."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import tomli


class UserError(Exception):
    """A mistake of the user's, said in one line that names the file, task, key or step."""


def check_regular(path: Path) -> None:
    """Raises UserError at what is no regular file: a pipe or a device might be read for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Some = Annotated[int, msgspec.Meta(ge=1, le=10_000)]  # views or steps, for each task
Side = Annotated[int, msgspec.Meta(ge=1, le=30)]  # of a canvas
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Weights = Annotated[tuple[Literal["ema", "raw"], ...], msgspec.Meta(min_length=1)]
Beta = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dir: Annotated[str, msgspec.Meta(min_length=1)] = "runs/etrm"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    track: Literal["", "tensorboard", "wandb"] = ""  # beside metrics.jsonl, offline


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where tasks come from and how episodes are drawn from them."""

    train: tuple[str, ...] = ("arc1:training",)
    dev: tuple[str, ...] = ("arc1:dev",)  # all choices are made on it; never trained on
    held_out: tuple[str, ...] = ("arc1:evaluation",)  # for the final score; never trained on
    policy: Literal["refuse", "drop", "demos"] = "drop"  # training tasks that share a held-out pair
    query: Literal["leave_one_out", "test"] = "leave_one_out"
    max_demos: Count = 10
    max_side: Side = 30  # of a canvas; a query whose grids need more is left out
    canvas: Annotated[int, msgspec.Meta(ge=0, le=30)] = 0  # its side; 0: the smallest for its task
    dihedral: bool = True
    colours: Literal["fixed", "keep_black", "all"] = "keep_black"
    translate: bool = True
    symmetries: CountOrZero = 0  # of a task, fixed by the seed; 0: every episode draws anew
    share: dict[str, Share] = {}  # source, e.g. "composed" -> its share of the sample-steps
    max_train_tasks: CountOrZero = 0  # 0: all
    max_eval_tasks: CountOrZero = 0


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which demonstration encoder, and its shape."""

    kind: str = "perceiver"
    width: CountOrZero = 0  # of its tokens, a multiple of the core's head size; 0: the core's
    layers: CountOrZero = 2  # blocks over the cells of one demo
    set_layers: Count = 1  # blocks in which context tokens attend to demos, or demos to each other
    pooling: Literal["mean", "max", "attention", "weighted"] = "mean"  # cells to a vector
    norm: Literal["post", "pre"] = "post"  # where a class token is read, cells are always "pre"
    layer_scale: NonNegative = 0.0  # initial value of a branch's learned gain; 0: none
    cached: bool = False  # published: read at an episode's first step alone, which starves it
    H_cycles: Count = 2  # of trm_style; refinements in each forward of recurrent
    latent: CountOrZero = 0  # numbers that a variational encoder draws, or of a table's row
    kl_weight: NonNegative = 1e-3


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and behaviour of the model.
    published_faults, for parity tests alone: empty cells attend, rows without labels train the
    halting head, contexts are not normed, states of recurrent encoders are smoothed and detached,
    the KL is divided by the batch twice."""

    hidden: Count = 128
    heads: Count = 2
    expansion: Annotated[float, msgspec.Meta(ge=0.25, le=100)] = 4.0
    layers: Count = 2
    H_cycles: Count = 3
    L_cycles: Count = 4
    context_tokens: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 16
    positions: Literal["rope", "rope2d", "learned", "both", "none"] = "rope2d"
    raster: Annotated[int, msgspec.Meta(ge=1, le=50)] = 30  # side of the field that positions count
    tied_head: bool = True  # logits from the query's own token embedding
    published: bool = False  # the context enters sqrt(hidden) times as large, without a gain
    published_faults: bool = False
    halt_max_steps: Count = 16
    exploration: Share = 0.1
    fixed_steps: bool = False  # every episode takes halt_max_steps (ETRM-FCT): no q, no exploration
    loss: Literal["stablemax", "softmax"] = "stablemax"
    q_weight: NonNegative = 0.5
    feedback: Literal["", "reset", "kept"] = ""  # argmax-feedback TRM: z begins anew each H cycle
    unrolled: Count = 1  # ACT steps of one optimizer step; the loss is their mean
    encoder: EncoderConfig = EncoderConfig()


UNTRAINED = {r"core\.[HL]_init": 0}  # the initial states are drawn and stay


class OptimizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Patterns match a whole parameter path, e.g. "encoder\\..*"; the first match counts."""

    kind: Literal["adamw", "muon", "adam_atan2"] = "muon"  # muon: matrices only, AdamW beside it
    lr: Rate = 1e-3
    warmup: CountOrZero = 100
    final_lr: Share = 0.1  # share of lr at the last step, reached by a cosine
    weight_decay: NonNegative = 0.1
    clip: NonNegative = 1.0  # of the global norm, after the all-reduce; 0: none
    lr_scale: dict[str, Rate] = {}
    freeze: dict[str, CountOrZero] = msgspec.field(default_factory=UNTRAINED.copy)  # steps; 0: all


class InitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint whose averaged weights training starts from, instead of drawn ones."""

    path: str = ""  # a checkpoint of ours, a run folder, or a published one
    take: tuple[str, ...] = (".*",)  # patterns of our parameter paths
    force: bool = False  # also from another depth or size; leaves of another size are left out


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    batch: Count = 64  # slots of all processes together
    steps: Count = 2000
    shards: Count = 4  # parts of a step, one after the other or by 1, 2 or 4 processes: same bits
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ema: Beta = 0.999
    log_every: Count = 10
    save_every: Count = 200


class EvalConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is watched in training: the dev split (official queries) or the training set."""

    every: Count = 500
    on: Literal["dev", "train"] = "dev"
    weights: Weights = ("ema",)  # the first decides what is best
    min_gain: NonNegative = 0.0  # by which the best must be beaten
    patience: CountOrZero = 0  # evaluations without such a gain after which training ends; 0: never
    stop_at: Share = 0.0  # exact match with the task's own demos at which training ends; 0: never


class SolveConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tasks are answered: by `etrm eval` and `etrm solve`, whose options override it."""

    views: Some = 8  # symmetries and demo orders that vote
    act_steps: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0  # of a view; 0: as trained
    leave: Literal["never", "q"] = "never"  # q: a view ends when the halting head says so
    adapt: Literal["none", "context", "full"] = "none"  # to the demos alone, see solve.py
    adapt_steps: Some = 60
    adapt_lr: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0  # 0: context 0.1, full 1e-3


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    init_from: InitConfig = InitConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    solve: SolveConfig = SolveConfig()
    fast: dict[str, Any] = {}  # overrides (as --set has them) that --fast applies


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """A strict config. Raises UserError naming an unknown key (and the nearest) or a wrong type."""
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as e:
        text = str(e)
    at = re.search(r"`\$\.?([^`]*)`$", text)
    path = at[1] if at else ""
    hint: Any = Config  # type of the table or field at fault
    for name in filter(None, path.partition("[")[0].split(".")):
        hint = {f.name: f.type for f in msgspec.structs.fields(hint)}[name]
    if unknown := re.search(r"unknown field `([^`]*)`", text):
        close = nearest(unknown[1], hint.__struct_fields__)
        raise UserError(f"{where}: unknown key {'.'.join(filter(None, (path, unknown[1])))}{close}")
    reason = text.split(" - at ")[0].lower()
    if "enum" in reason:
        while get_origin(hint) is not Literal:
            hint = get_args(hint)[0]
        reason += f"; known: {', '.join(name or repr('') for name in get_args(hint))}"
    raise UserError(f"{where}: {path or 'config'}: {reason}")


def override(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            raise UserError(f"{where}: {name} is not a table")
    raw[last] = value


def set_item(raw: dict[str, Any], item: str) -> None:
    """Apply one 'a.b=value', the value in TOML's notation or else a plain string."""
    key, equals, text = item.partition("=")
    if item != item.encode(errors="replace").decode():
        raise UserError(f"--set {item}: not UTF-8")
    if not equals:
        raise UserError(f"--set {item}: must be key=value, for instance train.steps=100")
    try:
        value = tomli.loads(f"x = {text}")["x"]
    except (tomli.TOMLDecodeError, RecursionError) as e:
        if text.lstrip().startswith(("[", "{", '"', "'")):
            raise UserError(f"--set {key}: broken TOML: {e}") from None
        value = text
    override(raw, key.strip(), value, f"--set {key}")


SHIPPED = Path(__file__).parent / "configs"


def joined(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key, all else from `over`."""
    both = [k for k in over if isinstance(over[k], dict) and isinstance(base.get(k), dict)]
    return {**base, **over, **{k: joined(base[k], over[k]) for k in both}}


def is_set(raw: Any, key: str) -> bool:
    """Whether the tables of a recipe set the dotted key."""
    name, _, rest = key.partition(".")
    return isinstance(raw, dict) and name in raw and (not rest or is_set(raw[name], rest))


def read_recipe(path: Path, names: Sequence[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a TOML file on top of those of the file that it extends (a relative path).
    What a file sets wins over an inherited [fast] table: --fast keeps what the file is about."""
    check_regular(path)
    try:
        raw = tomli.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; shipped configs: {', '.join(names)}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: broken TOML: {e}") from None
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str) or path.resolve() in above:
        raise UserError(f"{path}: extends must name one TOML file, none that extends this one")
    inherited = read_recipe(path.parent / base, names, (*above, path.resolve()))
    if isinstance(fast := inherited.get("fast"), dict):
        inherited["fast"] = {k: v for k, v in fast.items() if not is_set(raw, k)}
    return joined(inherited, raw)


def load_config(path: str | Path, sets: Sequence[str] = (), fast: bool = False) -> Config:
    """A TOML recipe, ours by name, then its [fast] table if asked for, then each 'a.b=value'."""
    files = sorted(SHIPPED.rglob("*.toml"))
    shipped = {p.relative_to(SHIPPED).with_suffix("").as_posix(): p for p in files}
    path = Path(path)
    if not path.is_file():
        path = shipped.get(path.as_posix().removesuffix(".toml").removeprefix("configs/"), path)
    raw = read_recipe(path, [k for k in shipped if "/" not in k])
    quick = raw.get("fast")
    if isinstance(quick, dict):
        quick_raw, folder = copy.deepcopy(raw), parse_config(raw, str(path)).run.dir
        for key, value in {"run.dir": f"{folder}-fast", **quick}.items():
            override(quick_raw, key, value, f"{path}, [fast], {key}")
        parse_config(quick_raw, f"{path}, [fast]")  # a mistake there is found without --fast, too
        raw = quick_raw if fast else raw
    elif fast:
        raise UserError(f"{path}: has no [fast] table, so --fast means nothing")
    cfg = parse_config(raw, str(path))
    for item in sets:
        set_item(raw, item)
        cfg = parse_config(raw, "--set")
    run = msgspec.structs.replace(cfg.run, dir=os.path.expanduser(cfg.run.dir))  # as shells do
    return msgspec.structs.replace(cfg, run=run)
