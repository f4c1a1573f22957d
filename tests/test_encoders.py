"""Laws of the encoders: what a context depends on, what trains them, what the published break."""

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings

from etrm_arc import data, encoders, etrm
from etrm_arc.config import EncoderConfig, UserError
from etrm_arc.encoders import encoder_of, init_params
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import RECURRENT, SLOTS, SOME, World, close, config, generators, total

EVERY = [*puzzles.KINDS, *puzzles.VARIANTS]
VARIATIONAL = [kind for kind, e in encoders.kinds().items() if e.variational]


@pytest.mark.parametrize("encoder", SOME)
@given(generators, st.sampled_from(["rope", "rope2d", "both"]))
@settings(max_examples=5)
def test_the_order_and_the_room_of_demos_do_not_matter(encoder, g, positions):
    """Nor empty places between them, nor, where there is room for the end marks, the canvas."""
    w = World(g, config(encoder, positions=positions), translate=False)
    e, d = w.episodes, w.batch.demos
    order = torch.rand(e.demos.shape, generator=g).argsort(-1)  # also moves empty places to front
    context = w.context()
    close(w.context(w.paint(e._replace(demos=e.demos.gather(1, order)))), context)
    sparse = w.batch._replace(demos=d._replace(number=d.number * 2, most=d.most * 2 + 1))
    close(w.context(sparse), context)
    if encoders.latent_of(w.cfg):
        kl = [w.encode.read(w.params.encoder, batch).kl for batch in (sparse, w.batch)]
        close(kl[:1], kl[1:])
    close(w.context(w.roomy(11)), w.context(w.roomy(8)))


@pytest.mark.parametrize("encoder", SOME)
@given(generators)
@settings(max_examples=5)
def test_a_context_depends_on_every_demo_of_its_slot_alone(encoder, g):
    w = World(g, config(encoder))
    before, d = w.context(), w.batch.demos
    demo = torch.arange(len(d.owner)).repeat_interleave(torch.tensor(d.cells))
    for i, owner in enumerate(d.owner.tolist()):
        recoloured = (demo == i) & (d.outputs >= data.FIRST_COLOUR)
        outputs = torch.where(recoloured, 13 - d.outputs, d.outputs)
        after = w.context(w.batch._replace(demos=d._replace(outputs=outputs)))
        changed = puzzles.apart(after, before)
        assert (changed[:, owner] > 1e-4).all()
        assert changed[:, torch.arange(SLOTS) != owner].max() < 1e-4


@pytest.mark.parametrize("encoder", EVERY)
def test_every_encoder_learns_and_gives_contexts_of_rms_one(encoder):
    """Of any number of tokens; every parameter gets a gradient."""
    for tokens in (4, 33):
        w = World(torch.Generator().manual_seed(3), config(encoder, context_tokens=tokens))
        context = w.context()
        sizes = [tokens] * SLOTS
        assert [len(x) for x in context] in (sizes, sizes + list(w.batch.cells))
        close([x.square().mean(-1) for x in context], [torch.ones(len(x)) for x in context], 1e-3)
    w = World(torch.Generator().manual_seed(3), config(encoder))
    params, carry, loss = w.trainable(), w.start(), 0.0
    for step in range(2):
        carry, out = w.step(carry, params, w.batch._replace(noise=w.noise(step)))
        loss = loss + total(w, out).sum()
    loss.backward()
    still = [k for k, v in puzzles.gradients(params).items() if v is None or not v.any()]
    assert still == ["core.H_init", "core.L_init"]  # drawn, not trained, as published


@pytest.mark.parametrize("kind", ["standard", "hybrid_standard", "lpn_standard", *RECURRENT])
def test_laws_that_the_published_encoders_break(kind):
    """Empty cells are seen, so that the canvas of a demo matters; unfolded contexts and smoothed
    states have any rms; recurrent encoders never learn, though the core does."""
    w = World(torch.Generator().manual_seed(0), config(kind, published_faults=True))
    assert puzzles.apart(w.context(w.roomy(11)), w.context(w.roomy(8))).max() > 1e-3
    off = (torch.stack(w.context()).square().mean(-1) - 1).abs().max()
    assert (off < 1e-3) == (kind in ("standard", "hybrid_standard"))
    params = w.trainable()
    total(w, w.step(w.start(), params)[1]).sum().backward()
    learns = any(v is not None for v in puzzles.gradients(params.encoder).values())
    assert params.core.blocks[0].qkv.grad.any() and learns == (kind not in RECURRENT)


# ---------------------------------------------------------------- their parts, and what is refused


@pytest.mark.parametrize("kind", RECURRENT)
@given(generators)
@settings(max_examples=5)
def test_a_recurrent_encoder_continues_from_its_states(kind, g):
    """The context of a slot that goes on depends on its own states only, of a new one on none."""
    w = World(g, config(kind))
    carry, read = w.running(g), w.encode.read(w.params.encoder, w.batch)
    slot = torch.arange(SLOTS) == puzzles.integer(g, 0, SLOTS - 1)
    states = carry.z_E, torch.where(slot[:, None, None, None], -carry.z_E, carry.z_E)
    a, b = (w.encode.recur(w.params.encoder, read, z, carry.halted).tokens for z in states)
    moved = (a - b).flatten(1).norm(dim=1)
    assert (moved[slot] > 1e-3) == (not carry.halted[slot]) and not moved[~slot].any()


@pytest.mark.parametrize("kind", VARIATIONAL)
@given(generators)
@settings(max_examples=5)
def test_a_variational_encoder_draws_around_its_mean(kind, g):
    """No noise is noise of zero; a slot's noise moves its own context alone, both ways alike."""
    w = World(g, config(kind, published_faults=True))
    noise = w.noise(0)
    slot = torch.arange(SLOTS) == puzzles.integer(g, 0, SLOTS - 1)
    one = noise * slot[:, None, None]
    noises = (None, noise * 0, one, -one)
    mean, zero, plus, minus = (torch.stack(w.context(w.batch._replace(noise=n))) for n in noises)
    assert torch.equal(mean, zero)
    assert (plus - mean)[slot].norm() > 1e-3 and (plus - mean)[~slot].abs().max() < 1e-5
    close([minus - mean], [mean - plus], 1e-4)


@pytest.mark.parametrize(
    ("encoder", "options", "field"),
    [
        ({"kind": "lpn_variational", "kl_weight": 0.0}, {}, "kl_weight"),
        ({"kind": "recurrent", "cached": True}, {}, "cached"),
        ({"kind": "perceiver", "width": 40}, {}, "encoder.width"),
        ({"kind": "perceiver"}, {"heads": 5}, "model.heads"),
        ({"kind": "perceiver"}, {"context_tokens": 0}, "context_tokens"),
        ({"kind": "perceiver"}, {"feedback": "kept"}, "model.feedback"),
        ({"kind": "percever"}, {}, "did you mean perceiver"),
        ({"kind": "a:b"}, {}, "a.py: FileNotFound"),
    ],
)
def test_what_an_encoder_cannot_be_is_one_line(encoder, options, field):
    with pytest.raises(UserError, match=field) as e:
        cfg = msgspec.structs.replace(config(), encoder=EncoderConfig(**encoder), **options)
        init_params(cfg, 0)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- the pointer


def answers_of(offer, tasks):
    """What the pointer answers when its head weighs nothing but one offer, for each query."""
    cfg = config("pointer")
    params = init_params(cfg, 0)
    head = torch.zeros_like(params.core.offer_head)
    z = torch.eye(1, cfg.hidden)[0]  # a direction that every cell's state is given below
    head[offer] = 1e4 * z
    core = params.core._replace(offer_head=head, embed=params.core.embed * 0)
    packed = data.pack(tasks)
    asked = data.queries(packed, "test", data.DataConfig())
    batch = data.batch(packed, data.posed(packed, data.DataConfig(), "test", asked), 30)
    context = encoder_of(cfg).read(params.encoder, batch)
    states = z.expand(len(batch.inputs), -1)
    mixture = etrm.mixed(states @ core.embed.T, states @ core.offer_head.T, context)
    tokens = mixture.argmax(-1).split(batch.cells)
    canvases = zip(tokens, asked.canvas.tolist(), strict=True)
    return [data.untokenise(t.view(*size).numpy().astype("uint8")) for t, size in canvases]


@given(generators)
@settings(max_examples=10)
def test_a_frame_of_d8_answers_with_the_turned_input(g):
    """Also where the turned grid is wider than the input, for a demo shows how large it is."""
    frames = {frame: k for k, frame in enumerate(encoders.FRAMES[:8])}
    turns = {0: ("same", "same", False), 2: ("flip", "flip", False), 4: ("same", "flip", False)}
    turns |= {5: ("flip", "same", False), 6: ("same", "same", True), 7: ("flip", "flip", True)}
    turns |= {1: ("same", "flip", True), 3: ("flip", "same", True)}
    x, demo = puzzles.grid(g, 2, 6), puzzles.grid(g, 6, 6)
    task = data.Task("t", [(demo, demo)], [(x, None)])
    for turn, frame in turns.items():
        (answer,) = answers_of(frames[frame], [task])
        assert (answer == data.turn(turn, x)).all()


@given(generators)
@settings(max_examples=5)
def test_a_view_has_nothing_beyond_its_end(g):
    """Beyond the marks of its end a view is empty; tiled twice it has twice the sides."""
    x = torch.from_numpy(puzzles.grid(g, 2, 4)).long()
    h, w = x.shape
    canvas = torch.from_numpy(data.tokenise(x.numpy(), (12, 12))).long()
    at = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    views = encoders.views_of(canvas.flatten(), at, [144]).seen.view(12, 12, -1)
    tiled = views[..., encoders.FRAMES.index(("tile 2", "tile 2", False))]
    expected = data.tokenise(x.repeat(2, 2).numpy(), (12, 12))
    assert (tiled.numpy() == expected).all()
    ends = {frame: views[..., k] for k, frame in enumerate(encoders.FRAMES)}
    assert not ends["half 1", "same", False][h // 2 + 1 :].any()
    assert not ends["same", "same", False][:, w + 1 :].any()


@given(generators)
@settings(max_examples=5)
def test_what_is_copied_are_outputs_of_the_slots_own_demos(g):
    w = World(g, config("pointer"))
    context, d = w.encode.read(w.params.encoder, w.batch), w.batch.demos
    outputs = d.outputs[d.by_slot].split(d.slot_cells)
    for copied, shown in zip(context.copied.split(w.batch.cells), outputs, strict=True):
        assert set(copied.sum((0, 1)).nonzero().flatten().tolist()) <= set(shown.tolist()) - {0}
        assert (copied.sum(-1) - 1).abs().max() < 1e-5
