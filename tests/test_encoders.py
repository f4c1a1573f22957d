"""Laws of the encoders: what a context depends on, what trains them, and what the published ones break."""

import re
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings

from etrm_arc import data, encoders
from etrm_arc.config import DataConfig, EncoderConfig, ModelConfig
from etrm_arc.encoders import attend_cells, init_params, lookup
from etrm_arc.etrm import act_loss
from etrm_arc.tests import puzzles, test_model
from etrm_arc.tests.puzzles import (
    ENCODERS,
    KINDS,
    RECURRENT,
    SLOTS,
    VARIATIONAL,
    World,
    close,
    config,
    generators,
    gradients,
    total,
)


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_the_order_of_demos_does_not_matter(encoder, g):
    w = World(g, config(encoder))
    e, k = w.episodes, w.episodes.demos.shape[1]
    order = torch.rand(SLOTS, k, generator=g).argsort(
        -1
    )  # also moves the empty places to the front
    shift = torch.cat(
        (e.shift[:, :1], e.shift[:, 1:].gather(1, order[..., None].expand(-1, -1, 2))), 1
    )
    other = w.paint(e._replace(demos=e.demos.gather(1, order), shift=shift))
    close(w.context(other), w.context())


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators, st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=2)
def test_empty_places_do_not_matter(encoder, g, stride, more):
    w = World(g, config(encoder))
    d = w.batch.demos
    other = w.batch._replace(demos=d._replace(place=d.place * stride, most=d.most * stride + more))
    close(w.context(other), w.context())
    if encoders.latent_of(w.cfg):
        close(
            [w.encode.read(w.params.encoder, other).kl],
            [w.encode.read(w.params.encoder, w.batch).kl],
        )


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators, st.sampled_from(["rope", "rope2d", "borders"]))
@settings(max_examples=2)
def test_the_canvas_of_a_demo_does_not_matter(encoder, g, positions):
    """Where padding does not attend, and there is room for the end-of-grid marks (grids here are 7 a side at most)."""
    w = World(g, config(encoder, positions=positions), translate=False, demo_canvases=(8, 30))
    assert w.packed.grids[:, :, 1:].amax() <= 7
    large = data.batch(w.packed, w.episodes, DataConfig(demo_canvases=(11, 30)), 30).demos
    close(w.context(w.batch._replace(demos=large)), w.context())


@pytest.mark.parametrize(
    "kind", ["standard", "hybrid_standard", "lpn_standard", "lpn", "recurrent", "trm_style"]
)
def test_laws_that_the_published_encoders_break(kind):
    """The empty cells of a canvas are seen, so that its size matters; unfolded contexts and smoothed states have any rms."""
    cfg = config(kind, published=True, raster=30)
    cfg = msgspec.structs.replace(
        cfg, encoder=msgspec.structs.replace(cfg.encoder, attend_padding=True)
    )
    w = World(torch.Generator().manual_seed(0), cfg, translate=False, demo_canvases=(8, 30))
    large = data.batch(w.packed, w.episodes, DataConfig(demo_canvases=(11, 30)), 30).demos
    assert puzzles.apart(w.context(w.batch._replace(demos=large)), w.context()).max() > 1e-3
    off = (torch.stack(w.context()).square().mean(-1) - 1).abs().max()
    assert (off < 1e-3) == (kind in ("standard", "hybrid_standard"))


@given(generators)
@settings(max_examples=25)
def test_context_tokens_attend_to_all_cells_of_their_slot(g):
    w = World(g, config())
    p, d = w.params.encoder.sets[0], w.batch.demos
    context, x = (
        torch.randn(SLOTS, 4, 32, generator=g),
        torch.randn(len(d.inputs), 32, generator=g) * 10,
    )
    seen, owner = d.inputs != data.PAD, d.owner.repeat_interleave(torch.tensor(d.cells))
    got = attend_cells(p, w.cfg, x[d.by_slot], seen[d.by_slot], d.cells_of, context)
    heads = lambda x: x.unflatten(-1, (2, 16)).transpose(0, 1)  # noqa: E731
    for slot in range(SLOTS):
        q, k, v = (
            heads(t @ weight.T)
            for t, weight in (
                (context[slot], p.q),
                *[(x[(owner == slot) & seen], m) for m in (p.k, p.v)],
            )
        )
        want = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        close([got[slot]], [want.transpose(0, 1).flatten(1)], 1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_the_context_depends_on_every_demo(encoder, g):
    w = World(g, config(encoder))
    before = w.context()
    d = w.batch.demos
    of = torch.arange(len(d.owner)).repeat_interleave(torch.tensor(d.cells))
    for i in range(len(d.owner)):
        outputs = torch.where(
            (of == i) & (d.outputs >= data.FIRST_COLOUR), 13 - d.outputs, d.outputs
        )
        changed = puzzles.apart(
            w.context(w.batch._replace(demos=d._replace(outputs=outputs))), before
        )
        assert (changed[:, d.owner[i]] > 1e-4).all()
        assert changed[:, torch.arange(SLOTS) != d.owner[i]].max() < 1e-4


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_the_context_has_rms_one(encoder, g):
    w = World(g, config(encoder))
    said = w.context()
    assert [len(x) for x in said] in ([4] * SLOTS, [4] * SLOTS + list(w.batch.cells))
    close([x.square().mean(-1) for x in said], [torch.ones(len(x)) for x in said], 1e-3)


def test_an_unknown_encoder_names_the_nearest():
    with pytest.raises(
        data.UserError,
        match="did you mean perceiver.*known: standard, variational, .*perceiver, matching, table$",
    ):
        lookup("percever")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_of_every_encoder_gets_a_gradient(encoder):
    w = World(torch.Generator().manual_seed(3), config(encoder))
    params, carry, loss = w.trainable(), w.start(), 0.0
    for step in range(2):
        carry, out = w.step(carry, params, w.batch._replace(noise=w.noise(step)))
        loss = loss + total(w, out).sum()
    loss.backward()
    still = [k for k, v in gradients(params).items() if v is None or not v.any()]
    assert still == ["core.H_init", "core.L_init"]  # drawn, not trained, as published


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_published_recurrent_encoders_never_learn(kind):
    """Their states come back detached, so that no parameter of theirs ever gets a gradient; the core learns all the same."""
    w = World(torch.Generator().manual_seed(3), config(kind, published=True))
    params = w.trainable()
    total(w, w.step(w.start(), params)[1]).sum().backward()
    assert (
        all(v is None for v in gradients(params.encoder).values())
        and params.core.blocks[0].qkv.grad.any()
    )


@pytest.mark.parametrize("kind", RECURRENT)
@given(generators)
@settings(max_examples=3)
def test_a_recurrent_encoder_goes_on_from_its_states(kind, g):
    """The context of a slot that goes on depends on its own states only, that of one which begins on none."""
    w = World(g, config(kind))
    carry, read = w.running(g), w.encode.read(w.params.encoder, w.batch)
    recur = lambda z_E: w.encode.recur(w.params.encoder, read, z_E, carry.halted).tokens  # noqa: E731
    slot = puzzles.integer(g, 0, SLOTS - 1)
    changed = torch.where(torch.arange(SLOTS)[:, None, None, None] == slot, -carry.z_E, carry.z_E)
    moved = (recur(changed) - recur(carry.z_E)).flatten(1).norm(dim=1)
    assert (moved[slot] > 1e-3) == (not carry.halted[slot])
    assert not moved[torch.arange(SLOTS) != slot].any()


@pytest.mark.parametrize("kind", VARIATIONAL)
@given(generators)
@settings(max_examples=2)
def test_a_variational_encoder_draws_around_its_mean(kind, g):
    """No noise is noise of zero; a slot's noise moves its own context alone, in proportion while it is small."""
    w = World(g, config(kind, published=True))
    noise = w.noise(0)
    said = lambda noise=None: torch.stack(w.context(w.batch._replace(noise=noise)))  # noqa: E731
    mean = said()
    close([said(torch.zeros_like(noise))], [mean])
    slot = puzzles.integer(g, 0, SLOTS - 1)
    mine = noise * (torch.arange(SLOTS)[:, None, None] == slot)
    moved = said(mine) - mean
    assert moved[slot].norm() > 1e-3 and moved[torch.arange(SLOTS) != slot].abs().max() < 1e-5
    close([said(-mine) - mean], [-moved], 1e-4)


@given(generators)
@settings(max_examples=20)
def test_the_divergence_is_that_of_a_normal_from_the_standard_normal(g):
    latent = encoders.Latent(
        *(torch.randn(*shape, generator=g) / 3 for shape in ((6, 4), (6,), (6, 4), (6,)))
    )
    x = torch.randn(5, 4, generator=g)
    z, kl = encoders.drawn(latent, x, None)
    spread = (0.5 * (x @ latent.log_var.T + latent.log_var_bias)).exp()
    normal = torch.distributions.Normal
    close([kl], [torch.distributions.kl_divergence(normal(z, spread), normal(0.0, 1.0)).sum(-1)])
    close([encoders.drawn(latent, x, torch.ones_like(z))[0] - z], [spread])


@pytest.mark.parametrize("kind", ["variational", "lpn_variational"])
def test_the_divergence_of_each_slot_is_in_the_loss(kind):
    w = World(torch.Generator().manual_seed(5), config(kind))
    _, out = w.step(w.start())
    loss = act_loss(w.cfg, out, w.batch.labels, w.batch.cells)
    assert (loss.kl > 0).all() and len(loss.kl) == SLOTS
    close(
        [loss.total], [loss.lm + w.cfg.q_weight * loss.q + w.cfg.encoder.kl_weight * loss.kl], 1e-6
    )
    published = config(kind, published=True)
    mean = (
        act_loss(published, out, w.batch.labels, w.batch.cells).total
        - loss.lm
        - w.cfg.q_weight * loss.q
    )
    close([mean.sum()], [w.cfg.encoder.kl_weight * loss.kl.mean()], 1e-6)
    assert not act_loss(w.cfg, out._replace(kl=None), w.batch.labels, w.batch.cells).kl.any()


@given(generators)
@settings(max_examples=10)
def test_a_test_input_stands_before_the_demos_without_an_output(g):
    batch = World(g, config()).batch
    d, both = batch.demos, encoders.with_query(batch)
    slots = both.owner.repeat_interleave(torch.tensor(both.cells))
    assert torch.equal(slots[both.by_slot], slots.sort().values)
    assert torch.bincount(slots, minlength=SLOTS).tolist() == list(both.cells_of)
    asked = both.place.repeat_interleave(torch.tensor(both.cells)) == 0
    assert torch.equal(both.inputs[asked], batch.inputs) and torch.equal(both.at[asked], batch.at)
    assert (
        torch.equal(both.outputs[asked], (batch.inputs != data.PAD) * encoders.ASKED)
        and (both.outputs[~asked] < encoders.ASKED).all()
    )
    assert torch.equal(both.place[: len(d.place)], d.place + 1) and both.most == d.most + 1


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("tokens", [16, 64])
def test_any_number_of_context_tokens(kind, tokens):
    w = World(torch.Generator().manual_seed(0), config(kind, context_tokens=tokens))
    assert [x.shape for x in w.context()[:SLOTS]] == [(tokens, 32)] * SLOTS


@given(generators)
@settings(max_examples=1)
def test_the_readme_adds_an_encoder_in_twenty_lines(g):
    code = next(
        c
        for c in re.findall(
            r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S
        )
        if "ENCODERS" in c
    )
    assert len([line for line in code.splitlines() if line]) <= 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "colours", {"kind": "colours"})
        patch.setitem(encoders.ENCODERS, "colours", None)  # so that it is taken out again
        exec(code, {"__name__": "readme"})
        for law, *more in (
            (test_model.test_no_gradient_reaches_an_earlier_step, 2),
            (test_model.test_every_slot_trains_the_encoder_in_every_step,),
            (test_model.test_evaluation_is_the_same_steps_with_the_context_computed_once,),
            (test_model.test_a_slot_is_untouched_by_what_others_hold,),
            (test_model.test_a_row_alone_is_the_row_in_the_batch,),
            (test_the_order_of_demos_does_not_matter,),
            (test_empty_places_do_not_matter, 2, 1),
            (test_the_canvas_of_a_demo_does_not_matter, "rope2d"),
            (test_the_context_depends_on_every_demo,),
            (test_the_context_has_rms_one,),
        ):
            law.hypothesis.inner_test("colours", g, *more)
        test_every_parameter_of_every_encoder_gets_a_gradient("colours")
        test_any_number_of_context_tokens("colours", 64)


def test_a_variational_encoder_needs_a_weight_for_its_divergence():
    for kind in VARIATIONAL:
        with pytest.raises(
            data.UserError, match=f"kl_weight: 0.0 must be above 0, {kind} is variational"
        ):
            init_params(ModelConfig(encoder=EncoderConfig(kind=kind, kl_weight=0.0)), 0)
