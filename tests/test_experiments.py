"""Every shipped recipe takes three steps; the book of experiments has a row for every file; recipes extend recipes."""

import json
import re
from pathlib import Path

import pytest

from etrm_arc import checkpoint, config, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.encoders import ENCODERS
from etrm_arc.etrm import leaves

SET = Path(__file__).parent / "data" / "set"
SHIPPED = sorted(
    p.relative_to(config.SHIPPED).with_suffix("").as_posix() for p in config.SHIPPED.rglob("*.toml")
)
SMALL = [
    "model.hidden=16", "model.heads=2", "model.expansion=0.5", "model.L_cycles=1", "train.batch=4", "train.shards=1", "train.steps=3",
    "train.dtype=fp32", "eval.every=3", "eval.act_steps=1", "optimizer.warmup=2", "data.max_train_tasks=0",
    f'data.train=["{SET}"]', f'data.held_out=["{SET / "flip.json"}"]',
]  # fmt: skip


def small(name, folder, *sets):
    cfg = config.load_config(name)
    two = [str(SET / f"{n}.json") for n in ("double", "mirror")]
    more = [f"data.dev={json.dumps(two)}"] if cfg.data.dev else []
    more += ["data.canvases=[10]", "model.raster=10"] if cfg.model.mixer else []
    more += ["data.symmetries=3"] if cfg.data.symmetries else []
    more += [f'data.train=["{SET}", "composed:5"]'] if cfg.data.composed else []
    return config.load_config(name, [*SMALL, *more, f"run.dir={folder}", *sets])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trm") / "run"
    train.fit(small("trm", folder))
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_takes_three_steps(name, tmp_path, decoder):
    sets = [f"init_from.path={decoder}"] if config.load_config(name).init_from.path else []
    last = train.fit(small(name, tmp_path, *sets))
    assert last["step"] == 3 and checkpoint.load(tmp_path).meta["step"] == 3
    assert config.load_config(name).run.dir == f"runs/{name}"
    if config.load_config(name).optimizer.freeze_until:  # the core sleeps
        first, now = (leaves(checkpoint.load(p).ema.core) for p in (decoder, tmp_path))
        assert all(now[k].equal(v) for k, v in first.items())


def test_what_is_watched_in_training_takes_the_steps_that_it_was_trained_for():
    for name in SHIPPED:
        cfg = config.load_config(name)
        assert cfg.eval.act_steps == cfg.model.halt_max_steps, name


def test_every_encoder_has_a_recipe_and_a_line_in_the_table():
    kinds = {n.removeprefix("encoders/") for n in SHIPPED if n.startswith("encoders/")}
    assert kinds == {k for k in ENCODERS if k != "table"}
    assert all(config.load_config(f"encoders/{k}").model.encoder.kind == k for k in kinds)
    table = (
        (config.SHIPPED.parent / "docs" / "encoders.md").read_text().split("Each has a recipe")[0]
    )
    lines = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert {k for line in lines for k in re.findall(r"`(\w+)`", line)} == kinds


def test_the_book_has_a_row_for_every_experiment_and_they_differ():
    book = (config.SHIPPED.parent / "docs" / "experiments.md").read_text()
    names = [n.removeprefix("experiments/") for n in SHIPPED if n.startswith("experiments/")]
    assert sorted(re.findall(r"^\| `([^`]+)` \|", book, re.M)) == sorted(names)
    bare = {
        n: re.sub(r"dir='[^']*'", "", repr(config.load_config(f"experiments/{n}"))) for n in names
    }
    alike = {frozenset(m for m in names if bare[m] == bare[n]) for n in names} - {
        frozenset([n]) for n in names
    }
    assert alike == {
        frozenset(("E0", "scratch", "H16"))
    }  # what they are compared with has another name there


def test_a_recipe_extends_another_table_by_table(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a.toml").write_text(
        '[model]\nhidden = 64\nheads = 4\n[model.encoder]\nlayers = 3\n[fast]\n"train.steps" = 5\n'
    )
    (tmp_path / "below" / "b.toml").write_text(
        'extends = "../a.toml"\n[model]\nheads = 8\n[model.encoder]\nset_layers = 2\n'
    )
    cfg = config.load_config(tmp_path / "below" / "b.toml", fast=True)
    assert (
        cfg.model.hidden,
        cfg.model.heads,
        cfg.model.encoder.layers,
        cfg.model.encoder.set_layers,
    ) == (64, 8, 3, 2)
    assert (cfg.train.steps, cfg.run.dir) == (5, "runs/etrm-fast")
    (tmp_path / "a.toml").write_text('extends = "below/b.toml"')
    with pytest.raises(
        UserError, match="extends must name one TOML file, none that extends this one"
    ):
        config.load_config(tmp_path / "below" / "b.toml")
    (tmp_path / "a.toml").write_text('extends = "gone.toml"')
    with pytest.raises(UserError, match="gone.toml: No such file"):
        config.load_config(tmp_path / "a.toml")


def test_the_shipped_checkpoint_is_of_its_recipe_and_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found by name wherever one is
    s, recipe = solve.opened("cpu-best"), config.load_config("cpu-best")
    assert (s.cfg.model, s.cfg.data, s.cfg.optimizer) == (
        recipe.model,
        recipe.data,
        recipe.optimizer,
    )
    finding = s.meta["finding"]
    assert finding["policy"] == "drop" and not finding["admitted"] and not finding["started"]
    assert {a for a, _ in finding["dropped"]} >= {
        t.name for t in sources.load("arc1:evaluation")
    } & {t.name for t in sources.load("arc2:training")}
    assert s.path.stat().st_size < 15e6
    made = solve.predict(s.params, s.cfg, sources.load(str(SET / "mirror.json")), 2)
    assert all(len(p.votes) == 2 for p in made)
