"""Weights from published checkpoints and back, what training starts from, and what is frozen for a while."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from etrm_arc import checkpoint, config, solve, sources, train
from etrm_arc.config import EncoderConfig, UserError
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.etrm import leaves
from etrm_arc.tests import published
from etrm_arc.tests.published import sub
from etrm_arc.tests.test_parity import asked, close, encoder_config, published_encoder
from etrm_arc.tests.test_train import tiny

SET = str(Path(__file__).parent / "data" / "set")


def inner(golden, prefix="_orig_mod.model.inner."):
    """A published TRM checkpoint: names wrapped, initial states in bf16."""
    sd = sub(golden("trm_core")[0], "sd.inner.")
    return {prefix + k: v.bfloat16() if k.endswith("_init") else v for k, v in sd.items()}


def written(path, sd):
    torch.save(sd, path)
    return path


def whole(model):
    return config.Config(model=model)


def same(a, b):
    assert a.keys() == b.keys()
    for k, v in a.items():
        assert v.dtype == b[k].dtype and torch.equal(v, b[k]), k


def there_and_back(tmp_path, sd, model):
    """published -> ours -> published -> ours"""
    file = written(tmp_path / "step_1", sd)
    checkpoint.convert(file, tmp_path / "a.safetensors", whole(model))
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "b")
    checkpoint.convert(tmp_path / "b", tmp_path / "c.safetensors", whole(model))
    first, last = (checkpoint.load(tmp_path / f"{n}.safetensors") for n in "ac")
    same(leaves(first.params), leaves(last.params))
    same(leaves(first.params), leaves(first.ema))
    return first, torch.load(tmp_path / "b", weights_only=True)


ENCODERS = [
    "standard",
    "variational",
    "lpn_standard",
    "lpn_variational",
    "lpn_variational_v2",
    "hybrid_standard",
    "hybrid_variational",
]


@pytest.mark.parametrize(
    "name", [*ENCODERS, "recurrent_standard", "trm_style", "lpn_paper", "lpn_var_paper"]
)
def test_no_bit_changes_on_the_way_to_our_format_and_back(golden, tmp_path, name):
    own = sub(golden(f"enc_{name}")[0], "sd.")
    if name == "lpn_var_paper":
        own = {
            k: v for k, v in sub(golden("enc_lpn_paper")[0], "sd.").items() if k.startswith("grid")
        } | own
    kind = {"recurrent_standard": "recurrent", "lpn_paper": "lpn", "lpn_var_paper": "lpn_var"}.get(
        name, name
    )
    options = (
        {"width": 128, "heads": 8, "latent": 32}
        if "paper" in name
        else {"set_layers": 2}
        if kind == "trm_style"
        else {}
    )
    model = encoder_config(kind, **options)
    core = leaves(init_params(model, 1).core, "core")
    sd = {f"_orig_mod.model.encoder.{k}": v for k, v in own.items()}
    sd |= {
        f"_orig_mod.model.{k}": v.bfloat16() if "_init" in k else v
        for k, v in checkpoint.split(core, model).items()
    }
    c, back = there_and_back(tmp_path, sd, model)
    same(sd, back)
    tree = published.standard(own)
    ours = published.widened(tree, 128, 32) if "paper" in name else tree
    for k, v in leaves(ours).items():
        assert torch.equal(leaves(c.params.encoder)[k], v), k


def test_a_published_encoder_says_the_same_as_ours_from_a_file(golden, tmp_path):
    t, model, _, demos = published_encoder(golden, "standard")
    core = checkpoint.split(leaves(init_params(model, 1).core, "core"), model)
    file = written(
        tmp_path / "x", {**{f"module.encoder.{k}": v for k, v in sub(t, "sd.").items()}, **core}
    )
    checkpoint.convert(file, tmp_path / "x.safetensors", whole(model))
    p = checkpoint.load(tmp_path / "x.safetensors").params.encoder
    close(encoder_of(model).read(p, asked(*demos)).tokens, t["eval.context"])


def test_our_weights_survive_the_published_format(tmp_path):
    model = published.config(hidden=32, heads=2, encoder=EncoderConfig(kind="hybrid_variational"))
    p = leaves(init_params(model, 3))
    stripped = checkpoint.stripped(
        {f"module.{k}": v for k, v in checkpoint.split(p, model).items()}
    )
    found, used = checkpoint.joined(stripped, p, model)
    same(found, p)
    assert used == set(stripped)


@pytest.mark.parametrize(
    ("change", "leaf"),
    [({"context_scale": "gain"}, "core.context_gain"), ({"kind": "perceiver"}, "encoder.")],
)
def test_what_the_published_format_cannot_hold_is_refused(change, leaf):
    kind = change.pop("kind", "standard")
    model = published.config(hidden=32, heads=2, encoder=EncoderConfig(kind=kind), **change)
    with pytest.raises(UserError, match=f"{leaf}.*has no place"):
        checkpoint.split(leaves(init_params(model, 0)), model)


MODEL = {
    "hidden": 64,
    "heads": 4,
    "H_cycles": 2,
    "L_cycles": 2,
    "raster": 30,
    "tied_head": False,
    "context_scale": "published",
}


def trained(folder, **options):
    options = {
        "model": {**MODEL, "halt_max_steps": 2},
        "train__steps": 2,
        "eval__every": 2,
    } | options
    return tiny(folder, **options)


def start(folder, path, *, s=None, **options):
    return train.setup(trained(folder, init_from__path=str(path), **options))


@pytest.mark.parametrize("prefix", ["_orig_mod.model.inner.", "module.model.inner.", "inner.", ""])
def test_training_starts_from_a_published_core_and_says_what_it_took(golden, tmp_path, prefix):
    sd = inner(golden, prefix)
    file = written(tmp_path / "step_9", sd)
    with pytest.raises(UserError, match=r"does not say its cycles, the model has \(2, 2\)"):
        start(tmp_path / "a", file)
    (tmp_path / "all_config.yaml").write_text("arch:\n  H_cycles: 2\n  L_cycles: 2\n")
    s = start(tmp_path / "a", file)
    for k, v in s.params.items():
        if k.startswith("core."):
            [name] = checkpoint.published_names(k, trained(tmp_path).model)
            assert torch.equal(v.detach(), sd[prefix + name.removeprefix("inner.")].float()), k
    said = train.plan(trained(tmp_path), s, timed=False)["text"]
    assert (
        "taken core.embed, core.blocks (8)" in said
        and "skipped inner.puzzle_emb" in said
        and "missing, so drawn anew: encoder." in said
    )
    assert not s.params["core.H_init"].requires_grad and s.params["core.embed"].requires_grad
    (tmp_path / "all_config.yaml").write_text("arch:\n  H_cycles: 3\n  L_cycles: 6\n")
    with pytest.raises(
        UserError, match=r"has H_cycles = 3, the model 2, L_cycles = 6, the model 2;"
    ):
        start(tmp_path / "a", file)
    assert "core.embed" in start(tmp_path / "a", file, init_from__force=True).meta["init_from"]
    one = start(tmp_path / "a", file, init_from__force=True, init_from__take=[r"core\.blocks\..*"])
    assert not torch.equal(one.params["core.embed"], s.params["core.embed"])
    assert torch.equal(one.params["core.blocks.0.qkv"], s.params["core.blocks.0.qkv"])


@pytest.mark.parametrize("change, said", [
    ({"heads": 2}, "has heads = 4, the model 2, encoder.heads = 4, the model 2"),
    ({"layers": 1}, "has layers = 2, the model 1"),
    ({"positions": "rope"}, "has positions = rope2d, the model rope"),
    ({"encoder": {"heads": 2}}, "has encoder.heads = 4, the model 2"),
    ({"encoder": {"layers": 1}}, "has encoder.layers = 2, the model 1"),
    ({"encoder": {"set_layers": 2}}, "has encoder.set_layers = 1, the model 2"),
    ({"encoder": {"norm": "pre"}}, "has encoder.norm = post, the model pre"),
    ({"encoder": {"pooling": "max"}}, "has encoder.pooling = mean, the model max"),
    ({"encoder": {"qk_norm": True}}, "has encoder.qk_norm = False, the model True"),
    ({"encoder": {"attend_padding": True}}, "has encoder.attend_padding = False, the model True"),
    ({"encoder": {"published": True}}, "has encoder.published = False, the model True"),
])  # fmt: skip
def test_what_no_tensor_says_is_compared_too(tmp_path, change, said):
    train.fit(trained(tmp_path / "a"))
    model = {**MODEL, **change}
    with pytest.raises(UserError, match=said):
        start(tmp_path / "b", tmp_path / "a", model=model)
    assert start(tmp_path / "b", tmp_path / "a", model=model, init_from__force=True)
    if "encoder" in change:  # of a core alone it does not matter
        assert start(tmp_path / "b", tmp_path / "a", model=model, init_from__take=[r"core\..*"])


def test_other_sizes_are_refused_unless_told(golden, tmp_path):
    file = written(tmp_path / "step_9", inner(golden))
    (tmp_path / "all_config.yaml").write_text("H_cycles: 2\nL_cycles: 2\n")
    wide = {"hidden": 32, "heads": 2, "H_cycles": 2, "L_cycles": 2, "tied_head": False}
    with pytest.raises(UserError, match=r"core\.embed is \(12, 64\) in .*step_9, \(12, 32\) here"):
        start(tmp_path / "a", file, model=wide)
    text = start(tmp_path / "a", file, model=wide, init_from__force=True).meta["init_from"]
    assert "taken core.q_bias;" in text  # whose size is the same
    with pytest.raises(UserError, match="init_from.take: 'nothing' matches no parameter"):
        start(tmp_path / "a", file, init_from__take=["nothing"])


def test_no_code_in_a_checkpoint_runs_and_other_files_are_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for content in ({"x": Evil()}, {"x": 3}, [torch.zeros(1)]):
        with pytest.raises(UserError, match=r"step_9: no (bare )?state dict"):
            checkpoint.read(written(tmp_path / "step_9", content))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="text: no state dict"):
        checkpoint.read(tmp_path / "text")
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "missing")


def test_the_guard_knows_what_training_started_from(golden, tmp_path):
    """A published table has seen held-out demos: every checkpoint down the line says so."""
    file = written(tmp_path / "step_9", inner(golden))
    train.fit(trained(tmp_path / "a", init_from__path=str(file), init_from__force=True))
    train.fit(trained(tmp_path / "b", init_from__path=str(tmp_path / "a")))
    train.fit(trained(tmp_path / "c"))
    train.fit(trained(tmp_path / "d", init_from__path=str(tmp_path / "c")))
    other = sources.load(["arc1:dev"])[:2]
    for name, clean in (("a", False), ("b", False), ("c", True), ("d", True)):
        c = checkpoint.load(tmp_path / name)
        cfg = config.parse_config(c.meta["config"], "")
        assert solve.held_out(cfg, c.meta, other) is clean
        words = str(msgspec.convert(c.meta["finding"], sources.Finding))
        assert (
            "STARTED FROM step_9: a published table" in words and "NOT strictly held out" in words
        ) is not clean
    assert solve.held_out(cfg, c.meta, sources.load([SET])) is False
    off = written(
        tmp_path / "step_8", {k: v for k, v in inner(golden).items() if "puzzle" not in k}
    )
    assert checkpoint.history(checkpoint.read(off))[0] == {"held_out": None}


def test_what_sleeps_is_not_trained_until_it_wakes(tmp_path):
    rows = {k: v.detach().clone() for k, v in train.setup(trained(tmp_path)).params.items()}
    asleep = {"optimizer__freeze_until": {r"encoder\..*": 2}, "optimizer__kind": "adamw"}
    train.fit(trained(tmp_path / "a", **asleep))
    for k, v in leaves(checkpoint.load(tmp_path / "a" / "last.safetensors").params).items():
        assert torch.equal(v, rows[k]) == (k.startswith("encoder.") or k.endswith("_init")), k
    train.fit(trained(tmp_path / "a", **asleep, train__steps=3), resume=True)
    for k, v in leaves(checkpoint.load(tmp_path / "a" / "last.safetensors").params).items():
        assert torch.equal(v, rows[k]) == k.endswith("_init"), k
    with pytest.raises(UserError, match="nothing is left to train"):
        train.setup(trained(tmp_path, optimizer__freeze_until={".*": 2}))
    assert (
        json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])[
            "encoder/grad_norm"
        ]
        > 0
    )


def test_what_was_never_published_has_no_published_name(tmp_path):
    for kind in ("matching", "perceiver"):
        cfg = tiny(tmp_path, model__encoder__kind=kind)
        params = leaves(init_params(cfg.model, 0))
        assert not any(
            checkpoint.published_names(k, cfg.model) for k in params if k.startswith("encoder.")
        )
    feedback = tiny(
        tmp_path, model__feedback="reset", model__context_tokens=0, model__loss="softmax"
    ).model
    with pytest.raises(UserError, match="has no place in a published checkpoint"):
        checkpoint.split(leaves(init_params(feedback, 0)), feedback)


def test_a_malformed_pattern_and_an_absent_folder_are_one_line(tmp_path):
    train.fit(tiny(tmp_path / "a"))
    for pattern in ("core[.*", "("):
        with pytest.raises(UserError, match="^init_from.take: .*no regular expression"):
            train.setup(
                tiny(tmp_path / "b", init_from__path=str(tmp_path / "a"), init_from__take=[pattern])
            )
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.commit(tmp_path / "absent" / "step_1", lambda aside: torch.save({}, aside))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.write_text(tmp_path / "file" / "x.html", "")
