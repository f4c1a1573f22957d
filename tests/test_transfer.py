"""What training starts from: published checkpoints and ours."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from etrm_arc import checkpoint, sources, train
from etrm_arc.config import EncoderConfig, ModelConfig, UserError
from etrm_arc.etrm import leaves
from etrm_arc.extras import published as extras
from etrm_arc.tests.published import sub
from etrm_arc.tests.test_train import tiny

MODEL = {
    "hidden": 64, "heads": 4, "H_cycles": 2, "L_cycles": 2, "raster": 30, "tied_head": False,
    "published": True, "halt_max_steps": 2,
}  # fmt: skip


def inner(golden, prefix="_orig_mod.model.inner."):
    """A published TRM checkpoint: names wrapped, initial states in bf16."""
    state = sub(golden("trm_core")[0], "sd.inner.")
    return {prefix + k: v.bfloat16() if k.endswith("_init") else v for k, v in state.items()}


def initialised(folder, path, **options):
    options = {"model": {**MODEL}, "train__steps": 1, **options}
    return tiny(folder, init_from__path=str(path), **options)


@pytest.mark.parametrize("prefix", ["_orig_mod.model.inner.", "inner."])
def test_training_starts_from_a_published_core_and_says_what_it_took(golden, tmp_path, prefix):
    state, file = inner(golden, prefix), tmp_path / "step_9"
    torch.save(state, file)
    with pytest.raises(UserError, match="does not say its cycles"):
        train.setup(initialised(tmp_path / "a", file))
    (tmp_path / "all_config.yaml").write_text("arch:\n  H_cycles: 2\n  L_cycles: 2\n")
    cfg = initialised(tmp_path / "a", file)
    s = train.setup(cfg)
    for name, v in state.items():
        path = extras.our_path(f"inner.{name.removeprefix(prefix)}")
        assert path == "encoder.table" or torch.equal(s.params[path].detach(), v.float()), name
    plan = train.plan(s, timed=False)
    text = plan["init_from"] + plan["guard"]
    assert re.search(r"taken core.embed, core.blocks \(8\).*skipped inner.puzzle_emb", text)
    assert "missing, so drawn anew: encoder." in text and "NOT strictly held out" in text
    blocks = [r"core\.blocks\..*"]
    params = train.setup(initialised(tmp_path / "a", file, init_from__take=blocks)).params
    assert not torch.equal(params["core.embed"], s.params["core.embed"])
    assert torch.equal(params["core.blocks.0.qkv"], s.params["core.blocks.0.qkv"])
    (tmp_path / "all_config.yaml").write_text("arch:\n  H_cycles: 3\n  L_cycles: 6\n")
    with pytest.raises(UserError, match="H_cycles = 3, the model 2, L_cycles = 6, the model 2"):
        train.setup(cfg)
    force = initialised(tmp_path / "a", file, init_from__force=True)
    assert "taken core.embed" in train.setup(force).meta["init_from"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    train.fit(tiny(folder, model=MODEL, train__steps=1))
    return folder


@pytest.mark.parametrize(("field", "value"), [("heads", 2), ("layers", 1), ("encoder.norm", "pre")])
def test_what_no_tensor_says_is_compared_too(ours, tmp_path, field, value):
    options = {f"model__{field}": value}
    with pytest.raises(UserError, match=rf"has {field} = .*, the model {value}"):
        train.setup(initialised(tmp_path, ours, **options))
    assert train.setup(initialised(tmp_path, ours, init_from__force=True, **options))
    recurrent = [ModelConfig(encoder=EncoderConfig("recurrent", H_cycles=n)) for n in (2, 3)]
    assert checkpoint.meaning(recurrent[0]) != checkpoint.meaning(recurrent[1])
    if "encoder" in field:  # of a core alone it does not matter
        assert train.setup(initialised(tmp_path, ours, init_from__take=[r"core\..*"], **options))


def test_other_sizes_and_patterns_without_a_match_are_refused(ours, tmp_path):
    wide = {"model": {**MODEL, "hidden": 32, "heads": 2}}
    with pytest.raises(UserError, match=r"\(12, 64\) in .*, \(12, 32\) here"):
        train.setup(initialised(tmp_path, ours, **wide))
    forced = train.setup(initialised(tmp_path, ours, init_from__force=True, **wide))
    assert "taken core.q_bias" in forced.meta["init_from"]  # whose size is the same
    tensors, meta = checkpoint.read(ours / "last.safetensors")
    broken = {k: v * float("nan") if k != "pairs" else v for k, v in tensors.items()}
    checkpoint.save(tmp_path / "nan.safetensors", broken, meta)
    with pytest.raises(UserError, match="NaN"):
        train.setup(initialised(tmp_path, tmp_path / "nan.safetensors"))
    for pattern, words in (("nothing", "matches no parameter"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=f"init_from.take: .*{words}"):
            train.setup(initialised(tmp_path, ours, init_from__take=[pattern]))


def test_an_encoder_starts_from_the_one_that_it_has_grown_from(tmp_path):
    options = {"model__encoder__kind": "matching", "train__steps": 1, "model__loss": "softmax"}
    train.fit(tiny(tmp_path / "a", **options))
    options |= {"init_from__path": str(tmp_path / "a"), "model__encoder__kind": "pointer"}
    s, trained = train.setup(tiny(tmp_path / "b", **options)), checkpoint.load(tmp_path / "a").ema
    for path, weight in leaves(trained.encoder, "encoder.matching").items():
        assert torch.equal(s.params[path].detach(), weight), path
    with pytest.raises(UserError, match="has encoder.norm = post, the model pre"):
        train.setup(tiny(tmp_path / "b", model__encoder__norm="pre", **options))


def test_rows_of_a_table_are_taken_only_for_the_same_tasks(tmp_path):
    options = {"model__encoder__kind": "table", "data__symmetries": 2, "train__steps": 1}
    train.fit(tiny(tmp_path / "a", **options))
    rows = leaves(checkpoint.load(tmp_path / "a").ema)["encoder.table"]
    options["init_from__path"] = str(tmp_path / "a")
    same = train.setup(tiny(tmp_path / "b", **options)).params["encoder.table"]
    assert rows.any() and torch.equal(same, rows)
    other = train.setup(tiny(tmp_path / "b", data__max_train_tasks=4, **options))
    assert not other.params["encoder.table"].any()
    assert "skipped encoder.table" in other.meta["init_from"]


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    "content",
    [{"x": Evil()}, {"x": 3}, {3: torch.zeros(1)}, {}, b"", {"x": torch.zeros(2, 2).to_sparse()}],
)
def test_what_is_no_state_dict_is_one_line_and_nothing_in_it_runs(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("x").write_bytes(content)
    else:
        torch.save(content, "x")
    with pytest.raises(UserError, match="^x: no |^x: 'x' is no dense") as e:
        extras.read_state(Path("x"))
    assert "\n" not in str(e.value) and not Path("ran").exists()


def test_every_checkpoint_down_the_line_knows_what_training_started_from(golden, tmp_path, ours):
    """Also after a resume where the first file is gone."""
    torch.save(inner(golden), tmp_path / "step_9")
    train.fit(initialised(tmp_path / "a", tmp_path / "step_9", init_from__force=True))
    a = checkpoint.load(tmp_path / "a")
    copied = initialised(tmp_path / "b", tmp_path / "a", train__steps=2)
    train.fit(copied, limit=-1)
    shutil.rmtree(tmp_path / "a")
    train.fit(copied, resume=True)
    options = {"data__train": ["arc1:training"], "data__max_train_tasks": 2}
    cfg = initialised(tmp_path / "c", ours, **options)
    train.fit(cfg)
    b, c = (checkpoint.load(tmp_path / name) for name in "bc")
    assert "STARTED FROM step_9: a published table" in checkpoint.warned(a.meta)
    assert checkpoint.warned(b.meta) == checkpoint.warned(a.meta)
    assert checkpoint.warned(c.meta) == ""
    before, after = ({*map(bytes, x.pairs.tolist())} for x in (checkpoint.load(ours), c))
    pairs = [p for t in sources.prepare(cfg.data)[0] for p in (*t.demos, *t.queries)]
    assert after == before | set(map(sources.pair_digest, pairs)) and after > before
