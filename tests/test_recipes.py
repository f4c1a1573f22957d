"""The shipped recipes: the published ones field by field, --fast, inheritance, three steps each."""

import json

import msgspec
import pytest
import torch

from etrm_arc import config, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.encoders import encoder_of, kinds
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import SET

SHIPPED = sorted(
    p.relative_to(config.SHIPPED).with_suffix("").as_posix() for p in config.SHIPPED.rglob("*.toml")
)
OURS = {"cpu", "cpu-plain", "cpu-best", "joint", "questions", "overfit", "overfit-augment"}

# The settings of the published work, as its authors describe them.
# fmt: off
TRM = {
    "model.hidden": 512, "model.heads": 8, "model.layers": 2, "model.H_cycles": 3,
    "model.L_cycles": 6, "model.halt_max_steps": 16, "model.exploration": 0.1,
    "model.fixed_steps": False, "model.context_tokens": 16, "model.loss": "stablemax",
    "model.q_weight": 0.5, "model.encoder.kind": "table", "optimizer.kind": "adam_atan2",
    "optimizer.lr": 1e-4, "optimizer.warmup": 2000, "optimizer.final_lr": 1.0,
    "optimizer.weight_decay": 0.1, "optimizer.clip": 0.0, "optimizer.lr_scale": {},
    "train.batch": 768, "train.ema": 0.999, "init_from.path": "", "data.policy": "demos",
    "data.symmetries": 1000, "data.dihedral": True, "data.colours": "keep_black",
    "data.translate": True, "data.max_train_tasks": 0,
}
ETRM = TRM | {
    "model.exploration": 0.5, "model.encoder.kind": "standard", "model.encoder.width": 0,
    "model.encoder.layers": 2, "model.encoder.set_layers": 1, "model.encoder.pooling": "mean",
    "model.encoder.norm": "post", "model.encoder.layer_scale": 0.0, "model.encoder.cached": False,
    "optimizer.clip": 1.0, "train.batch": 256, "init_from.path": "runs/trm",
    "init_from.take": (r"core\..*",), "data.policy": "drop", "data.symmetries": 0,
}
FEEDBACK = {
    "model.hidden": 512, "model.heads": 8, "model.layers": 2, "model.H_cycles": 3,
    "model.L_cycles": 6, "model.feedback": "reset", "model.loss": "softmax", "model.unrolled": 1,
    "model.halt_max_steps": 1, "optimizer.kind": "adamw", "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.01, "optimizer.clip": 1.0, "train.batch": 32, "train.ema": 0.999,
    "eval.patience": 5, "data.dihedral": False, "data.colours": "fixed", "data.translate": False,
}
HYBRID = {"layers": 4, "norm": "pre", "set_layers": 2}


def fct(steps):  # a fixed number of ACT steps in training, up to 16 by q at evaluation
    fixed = {"model.fixed_steps": True, "model.exploration": 0.0, "model.halt_max_steps": steps}
    return ETRM | fixed | {"solve.act_steps": 16, "solve.leave": "q"}


def encoder(kind, **fields):
    return {"model.encoder.kind": kind} | {f"model.encoder.{k}": v for k, v in fields.items()}


E0 = fct(1) | {"optimizer.clip": 0.0, "train.batch": 768, "init_from.path": ""}
SLOW, CLIP, GATE = {"optimizer.lr": 3e-5}, {"optimizer.clip": 1.0}, {"data.max_train_tasks": 32}
PRE = {"model.encoder.norm": "pre"}
DEEP, POOLED = {"model.encoder.layers": 4}, {"model.encoder.pooling": "attention"}
SETS, SCALED = {"model.encoder.set_layers": 2}, {"model.encoder.layer_scale": 1e-4}
CHANGES = {
    "E1": {"data.max_train_tasks": 10, "train.batch": 10, "eval.every": 100}, "E2": SLOW,
    "E3": CLIP, "E4": SLOW | CLIP, "E5": DEEP, "E6": {"model.context_tokens": 32}, "E7": POOLED,
    "E8": SETS, "E9": SCALED, "E10": PRE, "E11": {"optimizer.lr_scale": {r"encoder\..*": 0.1}},
    "combined": SLOW | CLIP | DEEP | POOLED | SETS | SCALED | PRE,
}
PUBLISHED = {
    "trm": TRM, "etrm": ETRM, "fct": fct(4), "etrm2": ETRM | encoder("recurrent"),
    "cached": ETRM | encoder("standard", cached=True),
    "published-split": ETRM | {"data.dev": (), "eval.on": "train"}, "feedback": FEEDBACK,
    "feedback-deep": FEEDBACK | {"model.unrolled": 16, "model.halt_max_steps": 16},
    "experiments/E0": E0, **{f"experiments/{k}": E0 | v for k, v in CHANGES.items()},
    **{f"experiments/A{n}": fct(n) | GATE for n in (1, 4, 8, 16)},
    **{f"experiments/H{n}": ETRM | {"model.halt_max_steps": n} for n in (8, 16, 32)},
    **{f"experiments/O{i}": ETRM | GATE | {"model.exploration": x}
       for i, x in enumerate((0.5, 0.3, 0.7), 1)},
    "experiments/enc-E1": ETRM | GATE | encoder("hybrid_standard", **HYBRID),
    "experiments/enc-E2": ETRM | GATE | encoder("hybrid_variational", **HYBRID),
    "experiments/enc-E3": ETRM | GATE | encoder("lpn_variational", layers=4),
    "experiments/scratch": ETRM | {"init_from.path": ""},
    "experiments/frozen": ETRM | {"optimizer.freeze": {r"core\.[HL]_init": 0, r"core\..*": 1000}},
    **{f"encoders/{k}": ETRM | encoder(k) for k in kinds() if k not in {*OURS, "table", "pointer"}},
    **{f"encoders/{k}": ETRM | encoder(k, layers=4) for k in ("lpn_standard", "lpn_variational")},
    **{f"encoders/{k}": ETRM | encoder(k, **HYBRID) for k in kinds() if "hybrid" in k},
}
SMALL = [
    "model.hidden=16", "model.heads=2", "model.expansion=0.5", "model.H_cycles=1",
    "model.L_cycles=1", "train.batch=4", "train.shards=1", "train.steps=3", "train.dtype=fp32",
    "eval.every=3", "optimizer.warmup=2", "data.max_train_tasks=0",
    f'data.train=["{SET}"]', f'data.held_out=["{SET / "flip.json"}"]',
]
# fmt: on


def settings(value: object, path: str = "") -> dict[str, object]:
    """Every field of a config by its dotted name, without the run's folder and the [fast] table."""
    if not isinstance(value, msgspec.Struct):
        return {path: value}
    names = [f"{path}.{name}".lstrip(".") for name in value.__struct_fields__]
    fields = zip(names, msgspec.structs.astuple(value), strict=True)
    parts = [settings(field, name) for name, field in fields if name not in ("fast", "run.dir")]
    return {k: v for part in parts for k, v in part.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_settings_of_the_publication(name):
    ours = settings(config.load_config(name))
    assert {k: ours[k] for k in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_has_a_folder_of_its_name_and_fast_keeps_what_it_is_about(name):
    """What a recipe sets otherwise than the one it extends, it sets with --fast, too."""
    assert config.load_config(name).run.dir == f"runs/{name}"
    path = config.SHIPPED / f"{name}.toml"
    raw = config.tomli.loads(path.read_text())
    if "extends" not in raw:
        return
    base, changes = str((path.parent / raw["extends"]).resolve()), []
    for fast in (False, True):
        before, after = (settings(config.load_config(n, fast=fast)) for n in (base, name))
        changes.append({k: v for k, v in after.items() if before[k] != v})
    usual, fast = changes
    kept = {k: v for k, v in usual.items() if k not in raw.get("fast", {})}
    assert kept.items() <= fast.items() and set(fast) <= {*usual, *raw.get("fast", {})}


def test_a_recipe_extends_another_table_by_table(tmp_path):
    (tmp_path / "below").mkdir()
    base, recipe = tmp_path / "a.toml", tmp_path / "below" / "b.toml"
    base.write_text(
        "model = { hidden = 64, heads = 4, encoder = { layers = 3 } }\n"
        'fast = { "train.steps" = 5, "model.heads" = 2, "model.hidden" = 32 }\n'
    )
    model = "model = { heads = 8, encoder = { set_layers = 2 } }"
    recipe.write_text(f'extends = "../a.toml"\n{model}\n')
    usual, fast = (config.load_config(recipe, fast=f) for f in (False, True))
    assert (usual.model.hidden, usual.model.heads, usual.model.encoder.layers) == (64, 8, 3)
    assert usual.model.encoder.set_layers == 2
    assert (fast.model.hidden, fast.model.heads, fast.train.steps) == (32, 8, 5)
    refused = {"below/b.toml": "extends must name one TOML file", "missing.toml": "missing.toml"}
    for name, words in refused.items():
        base.write_text(f'extends = "{name}"')
        with pytest.raises(UserError, match=words):
            config.load_config(recipe)


def small(name, folder, *sets):
    cfg = config.load_config(name)
    dev = [str(SET / f"{n}.json") for n in ("double", "mirror")] if cfg.data.dev else []
    steps, symmetries = min(2, cfg.model.halt_max_steps), 3 * bool(cfg.data.symmetries)
    sized = [f"model.halt_max_steps={steps}", f"data.symmetries={symmetries}"]
    paths = [f"data.dev={json.dumps(dev)}", f"run.dir={folder}"]
    return config.load_config(name, [*SMALL, *sized, *paths, *sets])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trm") / "run"
    train.fit(small("trm", folder))
    return folder


SYSTEMS = [name for name in SHIPPED if not name.startswith("experiments/")]
SYSTEMS += [f"experiments/{row}" for row in ("combined", "E11", "frozen")]  # others: sizes


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_takes_three_steps(name, tmp_path, decoder):
    sets = [f"init_from.path={decoder}"] if config.load_config(name).init_from.path else []
    sets += ["init_from.force=true"] * (name == "overfit-augment")  # positions are not a decoder's
    if name in ("cpu-plain", "cpu-best", "joint", "questions"):  # rearc needs a package of its own
        sets = [f'data.train=["{SET}", "composed:5"]', "data.share={ composed = 0.5 }"]
        sets.append("init_from.path=")
    assert train.fit(small(name, tmp_path, *sets))["step"] == 3
    if name == "published-split":
        scores = solve.evaluate([tmp_path], [str(SET / "flip.json")], ["solve.views=1"])
        assert "NO DEV SPLIT" in scores["guard"]


def test_two_refinements_of_etrm2_are_one_refinement_twice():
    world = puzzles.World(torch.Generator().manual_seed(0), puzzles.config("recurrent"))
    p, halted = world.params.encoder, torch.zeros(puzzles.SLOTS, dtype=torch.bool)
    read, states = world.encode.read(p, world.batch), world.start().z_E

    def refined(times, z_E):
        encoder = msgspec.structs.replace(world.cfg.encoder, H_cycles=times)
        cfg = msgspec.structs.replace(world.cfg, encoder=encoder)
        return encoder_of(cfg).recur(p, read, z_E, halted).z_E

    puzzles.close([refined(2, states)], [refined(1, refined(1, states))])
    assert not torch.allclose(refined(2, states), refined(1, states))


@pytest.mark.parametrize("name", ["cpu-plain", "cpu-best", "joint"])
def test_a_shipped_checkpoint_is_of_its_recipe_and_answers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it is found by name from any folder
    opened, recipe = solve.opened(name), config.load_config(name)
    assert opened.cfg.model == recipe.model and opened.cfg.data == recipe.data
    assert opened.path.stat().st_size < 15e6
    task = sources.load(str(SET / "mirror.json"))
    answers = list(solve.predict(opened.params, opened.cfg, task, 2))
    assert answers and all(len(p.votes) == 2 for p in answers)
