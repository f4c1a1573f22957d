"""Laws of the model: the carry, the slots' independence, the encoders, halting, the loss."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from etrm_arc import data, etrm
from etrm_arc.data import DataConfig
from etrm_arc.encoders import attend_tokens, encoder_of, init_params, lookup
from etrm_arc.etrm import Carry, EncoderConfig, ModelConfig, Output, act_loss, act_step, fresh_carry, leaves, tree_map
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import generators

CANVASES, DEMO_CANVASES, SLOTS = (4, 8), (3, 5, 8), 5
POOLINGS, NORMS = ("mean", "max", "attention", "weighted"), ("post", "pre")
ENCODERS = [("standard", p, n) for p in POOLINGS for n in NORMS] + [("perceiver", "mean", n) for n in NORMS]


def config(encoder=("perceiver", "mean", "post"), **options):
    kind, pooling, norm = encoder
    layer_scale = 0.5 if norm == "pre" else 0.0
    e = EncoderConfig(kind=kind, pooling=pooling, norm=norm, layers=1, layer_scale=layer_scale)
    small = {"hidden": 32, "heads": 2, "expansion": 1.0, "layers": 1, "H_cycles": 2, "L_cycles": 1, "context_tokens": 4}
    return ModelConfig(**{**small, "halt_max_steps": 4, "encoder": e, **options})


cycles = st.integers(1, 2)


class World:
    """Random parameters and a batch of random tasks in two pools."""

    def __init__(self, g, cfg, **options):
        self.cfg, self.encode = cfg, encoder_of(cfg)
        self.params = init_params(cfg, puzzles.integer(g, 0, 10**6))
        # Some demos and queries small, some large; no output larger than what its task shows.
        some = [puzzles.task(g, low=high - 1, high=high) for high in (2, 3, 4, 6, 7, 7)]
        self.packed = data.pack(some)
        self.data = DataConfig(canvases=CANVASES, demo_canvases=DEMO_CANVASES, min_demos=1, **options)
        self.pools = data.pools(data.queries(self.packed, "leave_one_out", CANVASES), SLOTS)
        self.canvases = [(p.canvas, p.slots) for p in self.pools]
        assert [c for c, _ in self.canvases] == [4, 8]
        self.episodes = self.draw(torch.zeros(SLOTS, dtype=torch.int64))
        self.batch = self.paint(self.episodes)

    def draw(self, n):
        return puzzles.episodes(self.packed, self.pools, self.data, 7, n)

    def paint(self, episodes):
        return data.batch(self.packed, episodes, self.canvases, DEMO_CANVASES)

    def context(self, batch=None, params=None):
        return self.encode((params or self.params).encoder, batch or self.batch, SLOTS)

    def trainable(self):
        return tree_map(lambda x: x.clone().requires_grad_(), self.params)

    def start(self, batch=None):
        return fresh_carry(self.cfg, (batch or self.batch).inputs, torch.float32)

    def step(self, carry, params=None, batch=None, min_steps=None):
        return act_step(params or self.params, self.cfg, self.encode, carry, batch or self.batch, min_steps)

    def running(self, g):
        """A carry in the midst of things: some slots halted, some not."""
        layout = etrm.layout_of(self.cfg, self.batch.inputs)
        z = torch.randn(2, sum(b * s for b, s in layout), self.cfg.hidden, generator=g)
        steps = torch.randint(1, self.cfg.halt_max_steps, (SLOTS,), generator=g)
        halted = torch.rand(SLOTS, generator=g) < 0.5
        return Carry(z[0], z[1], steps, halted, torch.zeros_like(steps))

    def of(self, slot, out):
        """What one slot gets: its logits and q, its part of z_H and z_L."""
        (carry, out), pool, first = out, 0, 0
        while slot - first >= self.canvases[pool][1]:
            first += self.canvases[pool][1]
            pool += 1
        token = etrm.per_token(torch.arange(SLOTS), etrm.layout_of(self.cfg, self.batch.inputs)) == slot
        return (
            out.logits[pool][slot - first],
            out.q_halt[slot],
            out.q_continue[slot],
            carry.z_H[token],
            carry.z_L[token],
        )


def close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert ((x - y).abs() / (1 + y.abs())).max() <= tolerance


def gradients(params):
    return {k: v.grad for k, v in leaves(params).items()}


def total(world, out, batch=None):
    return act_loss(world.cfg, out, (batch or world.batch).labels).total


# ---------------------------------------------------------------- the carry


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators, cycles)
@settings(max_examples=3)
def test_no_gradient_reaches_an_earlier_step(encoder, g, H_cycles):
    """The gradient of a second step is the same whether or not the first left a graph behind."""
    w = World(g, config(encoder, H_cycles=H_cycles))
    together, alone, carry = w.trainable(), w.trainable(), w.running(g)
    second, _ = w.step(carry, together)
    assert not second.z_H.requires_grad and not second.z_L.requires_grad
    total(w, w.step(second, together)[1]).sum().backward()
    with torch.no_grad():
        second, _ = w.step(carry, alone)
    total(w, w.step(second, alone)[1]).sum().backward()
    for a, b in zip(gradients(together).values(), gradients(alone).values(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@given(generators, cycles)
@settings(max_examples=15)
def test_no_gradient_reaches_the_carry_given(g, H_cycles):
    w = World(g, config(H_cycles=H_cycles))
    carry = w.running(g)
    carry = carry._replace(z_H=carry.z_H.requires_grad_(), z_L=carry.z_L.requires_grad_())
    total(w, w.step(carry, w.trainable())[1]).sum().backward()
    assert carry.z_H.grad is None and carry.z_L.grad is None


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_every_slot_trains_the_encoder_in_every_step(encoder, g):
    w = World(g, config(encoder))
    params, carry, contexts = w.trainable(), w.start(), []

    def encode(p, batch, slots):
        context = w.encode(p, batch, slots)
        context.retain_grad()
        contexts.append(context)
        return context

    for _ in range(3):
        carry, out = act_step(params, w.cfg, encode, carry, w.batch, None)
        assert not carry.halted.any()
        loss = total(w, out)
        loss.sum().backward(retain_graph=True)
        assert (contexts[-1].grad.flatten(1).norm(dim=1) > 0).all()
        for slot in range(SLOTS):
            mine = torch.autograd.grad(loss[slot], leaves(params.encoder).values(), retain_graph=True)
            assert all(torch.isfinite(x).all() for x in mine)
            assert sum(float(x.abs().sum()) for x in mine) > 0


@given(generators, st.sampled_from([math.nan, math.inf, 1e30, 1.0]))
@settings(max_examples=15)
def test_a_halted_slot_forgets(g, garbage):
    w = World(g, config())
    carry, fresh = w.running(g), w.start()
    halted = etrm.per_token(carry.halted, etrm.layout_of(w.cfg, w.batch.inputs))[:, None]
    spoilt = carry._replace(
        z_H=torch.where(halted, garbage, carry.z_H),
        z_L=torch.where(halted, -garbage, carry.z_L),
        steps=torch.where(carry.halted, 1000, carry.steps),
    )
    params = w.trainable()
    got, out = w.step(spoilt, params)
    total(w, out).sum().backward()
    assert all(x is None or torch.isfinite(x).all() for x in gradients(params).values())
    want, expected = w.step(carry), w.step(fresh)
    for slot in range(SLOTS):
        if carry.halted[slot]:
            assert all(map(torch.equal, w.of(slot, (got, out)), w.of(slot, want)))
            close(w.of(slot, (got, out)), w.of(slot, expected))
            assert got.steps[slot] == 1
        else:
            assert all(map(torch.equal, w.of(slot, (got, out)), w.of(slot, want)))
            assert got.steps[slot] == carry.steps[slot] + 1


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_evaluation_is_the_same_steps_with_the_context_computed_once(encoder, g):
    w = World(g, config(encoder))
    carry = w.start()
    for _ in range(3):
        carry, out = w.step(carry)
    got = etrm.think(w.params, w.cfg, w.encode, w.batch, torch.float32, 3)
    close([*got.logits, got.q_halt, got.q_continue], [*out.logits, out.q_halt, out.q_continue])


# ---------------------------------------------------------------- slots do not see each other


def mix(slot, mine, others):
    """Episodes: one slot's from `mine`, the others' from `others`."""
    own = torch.arange(SLOTS) == slot
    k = max(mine.demos.shape[1], others.demos.shape[1])
    both = data.join([mine, others])
    row = torch.where(own, torch.arange(SLOTS), SLOTS + torch.arange(SLOTS))
    assert both.demos.shape[1] == k
    return data.Episodes(both.query[row], both.demos[row], data.Symmetry(*(x[row] for x in both.symmetry)), both.shift[row])


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_a_slot_is_untouched_by_what_others_hold(encoder, g):
    w = World(g, config(encoder))
    carry, others = w.running(g), w.draw(torch.arange(1, 1 + SLOTS))
    before = w.step(carry)
    for slot in range(SLOTS):
        batch = w.paint(mix(slot, w.episodes, others))
        noise = torch.randn(carry.z_H.shape, generator=g)
        own = (etrm.per_token(torch.arange(SLOTS), etrm.layout_of(w.cfg, batch.inputs)) == slot)[:, None]
        changed = carry._replace(z_H=torch.where(own, carry.z_H, noise), z_L=torch.where(own, carry.z_L, -noise))
        close(w.of(slot, w.step(changed, batch=batch)), w.of(slot, before))


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_a_row_alone_is_the_row_in_the_batch(encoder, g):
    w = World(g, config(encoder))
    together, slot = w.step(w.start()), 0
    for canvas, slots in w.canvases:
        for _ in range(slots):
            e = data.Episodes(*(
                data.Symmetry(*(y[slot : slot + 1] for y in x)) if isinstance(x, tuple) else x[slot : slot + 1]
                for x in w.episodes
            ))  # fmt: skip
            batch = data.batch(w.packed, e, [(canvas, 1)], DEMO_CANVASES)
            carry, out = w.step(w.start(batch), batch=batch)
            close((out.logits[0][0], out.q_halt[0], out.q_continue[0], carry.z_H, carry.z_L), w.of(slot, together))
            slot += 1


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_the_demos_of_others_get_exactly_no_gradient(encoder, g):
    """One slot's demos are written in colours of their own: only its loss may move the embeddings of these."""
    w = World(g, config(encoder))
    e = w.params.encoder
    params = w.params._replace(encoder=e._replace(input_embed=e.input_embed.repeat(2, 1), output_embed=e.output_embed.repeat(2, 1)))
    other = puzzles.integer(g, 0, SLOTS - 1)

    def own(d, tokens):
        return tokens + 12 * ((d.owner[:, None] == other) & (tokens != data.PAD))

    demos = tuple(d._replace(inputs=own(d, d.inputs), outputs=own(d, d.outputs)) for d in w.batch.demos)
    params = tree_map(lambda x: x.clone().requires_grad_(), params)
    loss = total(w, w.step(w.start(), params, w.batch._replace(demos=demos))[1])
    tables = (params.encoder.input_embed, params.encoder.output_embed)
    for slot in range(SLOTS):
        for grad in torch.autograd.grad(loss[slot], tables, retain_graph=True):
            assert grad[12:].any() if slot == other else grad[:12].any()
            assert not (grad[2:12] if slot == other else grad[12:]).any()


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_the_order_of_demos_does_not_matter(encoder, g):
    w = World(g, config(encoder))
    e, k = w.episodes, w.episodes.demos.shape[1]
    order = torch.rand(SLOTS, k, generator=g).argsort(-1)  # also moves the empty places to the front
    shift = torch.cat((e.shift[:, :1], e.shift[:, 1:].gather(1, order[..., None].expand(-1, -1, 2))), 1)
    other = w.paint(e._replace(demos=e.demos.gather(1, order), shift=shift))
    close([w.context(other)], [w.context()])


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators, st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=6)
def test_empty_places_do_not_matter(encoder, g, stride, more):
    w = World(g, config(encoder))
    demos = tuple(d._replace(place=d.place * stride, most=d.most * stride + more) for d in w.batch.demos)
    close([w.context(w.batch._replace(demos=demos))], [w.context()])


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators, st.sampled_from(["rope", "rope2d"]))
@settings(max_examples=6)
def test_the_canvas_of_a_demo_does_not_matter(encoder, g, positions):
    """Where padding does not attend, and there is room for the end-of-grid marks (grids here are 7 a side at most)."""
    w = World(g, config(encoder, positions=positions), translate=False)
    pair_sides = w.packed.grids[:, :, 1:].amax()
    assert pair_sides <= 7
    small, large = (data.batch(w.packed, w.episodes, w.canvases, sizes).demos for sizes in ((8,), (11,)))
    close([w.context(w.batch._replace(demos=small))], [w.context(w.batch._replace(demos=large))])


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_the_groups_of_demos_do_not_matter(encoder, g):
    """Grouped by size or one by one, in any order of groups."""
    w = World(g, config(encoder))
    singles = [data.Demos(*(x[i : i + 1] for x in d[:4]), d.most) for d in w.batch.demos for i in range(len(d.owner))]
    order = torch.randperm(len(singles), generator=g).tolist()
    close([w.context(w.batch._replace(demos=tuple(singles[i] for i in order)))], [w.context()])


@given(generators)
@settings(max_examples=25)
def test_merged_attention_is_one_softmax_over_all_cells_of_a_slot(g):
    w = World(g, config())
    p, demos = w.params.encoder.sets[0], w.batch.demos
    context = torch.randn(SLOTS, 4, 32, generator=g)
    tokens = [torch.randn(*d.inputs.shape, 32, generator=g) * 10 for d in demos]
    masks = [d.inputs != data.PAD for d in demos]
    got = attend_tokens(p, w.cfg, tokens, masks, demos, context)
    heads = lambda x: x.unflatten(-1, (2, 16)).transpose(0, 1)  # noqa: E731
    for slot in range(SLOTS):
        cells = torch.cat([x[d.owner == slot][m[d.owner == slot]] for x, m, d in zip(tokens, masks, demos, strict=True)])
        q, k, v = (heads(x @ weight.T) for x, weight in ((context[slot], p.q), (cells, p.k), (cells, p.v)))
        want = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
        close([got[slot]], [want.transpose(0, 1).flatten(1)], 1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_the_context_depends_on_every_demo(encoder, g):
    w = World(g, config(encoder))
    before = w.context()
    for d in range(len(w.batch.demos)):
        group = w.batch.demos[d]
        i = puzzles.integer(g, 0, len(group.owner) - 1)
        outputs = group.outputs.clone()
        outputs[i] = torch.where(outputs[i] >= data.FIRST_COLOUR, 13 - outputs[i], outputs[i])
        demos = (*w.batch.demos[:d], group._replace(outputs=outputs), *w.batch.demos[d + 1 :])
        changed = (w.context(w.batch._replace(demos=demos)) - before).flatten(1).norm(dim=1)
        assert changed[group.owner[i]] > 1e-4
        assert changed[torch.arange(SLOTS) != group.owner[i]].max() < 1e-4


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=4)
def test_the_context_has_rms_one(encoder, g):
    context = World(g, config(encoder)).context()
    assert context.shape == (SLOTS, 4, 32)
    close([context.square().mean(-1)], [torch.ones(SLOTS, 4)], 1e-3)


def test_an_unknown_encoder_names_the_nearest():
    with pytest.raises(data.UserError, match="did you mean perceiver"):
        lookup("percever")


# ---------------------------------------------------------------- halting


@given(generators, st.booleans())
@settings(max_examples=30)
def test_halting(g, exploring):
    cfg = config(halt_max_steps=puzzles.integer(g, 1, 4))
    w = World(g, cfg)
    q_weight, bias = torch.randn(2, 32, generator=g), torch.randn(2, generator=g)
    params = w.params._replace(core=w.params.core._replace(q_weight=q_weight, q_bias=bias))
    carry = w.start()
    for _ in range(6):
        least = torch.randint(0, cfg.halt_max_steps + 1, (SLOTS,), generator=g) if exploring else None
        before, (carry, out) = carry, w.step(carry, params, min_steps=least)
        assert torch.equal(carry.steps, torch.where(before.halted, 1, before.steps + 1))
        assert (carry.steps <= cfg.halt_max_steps).all() and carry.halted[carry.steps == cfg.halt_max_steps].all()
        early = carry.halted & (carry.steps < cfg.halt_max_steps)
        if least is None:
            assert not early.any()
        else:
            assert (carry.steps >= least)[carry.halted].all()
            assert torch.equal(early, (out.q_halt > 0) & (carry.steps >= least) & (carry.steps < cfg.halt_max_steps))


# ---------------------------------------------------------------- the loss


@given(generators, st.sampled_from(["stablemax", "softmax"]), st.booleans(), st.sampled_from([0.0, 1.0, 1e4]))
def test_extreme_logits_keep_the_loss_finite(g, loss, published, size):
    labels = torch.randint(0, 12, (4, 9), generator=g)
    labels[torch.rand(4, 9, generator=g) < 0.3] = data.IGNORE
    labels[0] = data.IGNORE
    logits = torch.randint(-1, 2, (4, 9, 12), generator=g) * size
    q = torch.randint(-1, 2, (4,), generator=g) * size
    logits.requires_grad_()
    q.requires_grad_()
    found = act_loss(config(loss=loss, published_halting=published), Output((logits,), q, q.detach()), (labels,))
    found.total.sum().backward()
    assert all(torch.isfinite(x.float()).all() for x in (*found, logits.grad, q.grad))
    assert (found.lm >= 0).all() and found.lm[0] == 0
    assert not logits.grad[labels == data.IGNORE].any()
    assert not found.exact[0] and not found.labelled[0]
    assert published or q.grad[0] == 0


@given(generators)
@settings(max_examples=25)
def test_the_loss_of_a_slot_is_its_own(g):
    """Scores and gradients of a slot neither know its pool nor the others; all right is exact."""
    labels = [torch.randint(-1, 12, (n, c * c), generator=g) for n, c in ((2, 3), (3, 2))]
    labels = [torch.where(y < 0, data.IGNORE, y) for y in labels]
    logits = tuple(torch.randn(*y.shape, 12, generator=g).requires_grad_() for y in labels)
    logits[0].data[0] = torch.nn.functional.one_hot(labels[0][0].clamp(min=0), 12) * 9.0
    q = torch.randn(5, generator=g)
    whole = act_loss(config(), Output(logits, q, q), labels)
    assert bool(whole.exact[0]) == bool((labels[0][0] >= 0).any())
    slot = 0
    for x, y in zip(logits, labels, strict=True):
        for i in range(len(y)):
            one = act_loss(config(), Output((x[i : i + 1],), q[slot : slot + 1], q), (y[i : i + 1],))
            close([v[0].float() for v in one], [v[slot].float() for v in whole])
            grads = torch.autograd.grad(whole.total[slot], logits, retain_graph=True, allow_unused=True)
            touched = torch.cat([v.flatten(1).abs().sum(1) for v in grads]) > 0
            assert not touched[torch.arange(5) != slot].any()
            slot += 1


# ---------------------------------------------------------------- positions and layers


@given(generators, st.sampled_from(["rope", "rope2d"]), st.integers(1, 30), st.integers(0, 4), st.integers(1, 2))
def test_a_canvas_is_a_corner_of_the_raster(g, kind, canvas, context, copies):
    make = lambda side: etrm.rotation(kind, context, side, 30, 16, copies, torch.float32, "cpu")  # noqa: E731
    at = torch.arange(canvas)
    cells = torch.cat([context + k * 900 + (at[:, None] * 30 + at).flatten() for k in range(copies)])
    rows = torch.cat((torch.arange(context), cells))
    for small, large in zip(make(canvas), make(30), strict=True):
        assert torch.equal(small, large[rows])


@given(generators, st.integers(1, 6))
@settings(max_examples=20)
def test_learned_positions_are_a_corner_of_the_raster(g, canvas):
    """The same tokens and the same codes, whether the canvas is small or the whole raster."""
    cfg = config(positions="learned", raster=6)
    p = etrm.init_core(cfg, g)
    context, tokens = torch.randn(1, 4, 32, generator=g), torch.randint(0, 12, (1, 6, 6), generator=g)
    small = etrm.place(p, cfg, context, (tokens[:, :canvas, :canvas].flatten(1),))
    large = etrm.place(p, cfg, context, (tokens.flatten(1),))
    assert torch.equal(small[:4], large[:4])
    assert torch.equal(small[4:].view(canvas, canvas, -1), large[4:].view(6, 6, -1)[:canvas, :canvas])


@given(generators, st.sampled_from(["rope", "rope2d"]))
def test_rotation_keeps_lengths_and_sees_distances_only(g, kind):
    table = etrm.rotation(kind, 3, 6, 30, 16, 1, torch.float32, "cpu")
    x = torch.randn(2, 39, 16, generator=g)
    close([etrm.rotate(x, table).norm(dim=-1)], [x.norm(dim=-1)])
    assert torch.equal(etrm.rotate(x, None), x)
    a, b = x[0, :1].expand(39, -1), x[1, :1].expand(39, -1)
    cells = [etrm.rotate(y, table)[3:].view(6, 6, 16) for y in (a, b)]
    dot = torch.einsum("ijd,kld->ijkl", *cells)
    close([dot[:-1, :-1, :-1, :-1]], [dot[1:, 1:, 1:, 1:]], 1e-4)
    assert (dot[0, 0] - dot[0, 0, 0, 0]).flatten()[1:].abs().min() > 0  # no two cells look alike


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tables_made_while_evaluating_serve_training(mode):
    etrm.rotation.cache_clear()
    w = World(torch.Generator().manual_seed(0), config())
    with mode():
        w.step(w.start())
    params = w.trainable()
    total(w, w.step(w.start(), params)[1]).sum().backward()
    assert leaves(params)["core.blocks.0.qkv"].grad.any()


@given(generators, st.sampled_from([1e-3, 1.0, 1e4]))
def test_rms_norm(g, size):
    x = torch.randn(5, 32, generator=g) * size
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close([etrm.rms(x)], [want])


@given(generators, st.integers(1, 5), st.integers(1, 20))
@settings(max_examples=50)
def test_attention_is_the_same_however_many_slots_at_once(g, queries, keys):
    q = torch.randn(4, 2, queries, 8, generator=g)
    k, v = torch.randn(2, 4, 2, keys, 8, generator=g)
    mask = torch.rand(4, 1, 1, keys, generator=g) < 0.5
    for seen in (None, mask):
        whole = etrm.attention(q, k, v, seen)
        for slots in (0, 1, 2, 3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(etrm, "SCORES", slots * 2 * queries * keys)
                close([etrm.attention(q, k, v, seen)], [whole])


@given(generators, st.integers(1, 5), st.integers(1, 40))
def test_attention_is_a_mean_over_what_may_be_seen(g, queries, keys):
    q = torch.randn(3, 2, queries, 8, generator=g)
    k, v = torch.randn(2, 3, 2, keys, 8, generator=g)
    mask = torch.rand(3, 1, 1, keys, generator=g) < 0.5
    mask[0] = False
    got = etrm.attention(q, k, v, mask)
    assert not got[0].any()
    for b in (1, 2):
        seen = mask[b, 0, 0]
        if seen.any():
            close([got[b : b + 1]], [etrm.attention(q[b : b + 1], k[b : b + 1, :, seen], v[b : b + 1, :, seen])])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    close([etrm.attention(q, k, v)], [want])


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("positions", ["rope2d", "learned"])
def test_a_tree_survives_being_taken_apart(encoder, positions):
    cfg = config(encoder, positions=positions, tied_head=positions == "learned", raster=8)
    params = init_params(cfg, 0)
    found = leaves(params)
    again = etrm.rebuild(params, found)
    assert list(leaves(again)) == list(found) and all(a is b for a, b in zip(leaves(again).values(), found.values(), strict=True))
    assert type(again) is type(params) and type(again.core.blocks[0]) is etrm.Block
    assert (again.core.head is None) == cfg.tied_head and (again.core.position is None) == (positions == "rope2d")
    twice = etrm.tree_map(lambda x: 2 * x, params)
    assert torch.equal(leaves(twice)["core.blocks.0.qkv"], 2 * params.core.blocks[0].qkv)
    assert leaves(params)["encoder.queries"] is params.encoder.queries
    demos = data.Demos(*torch.arange(4), 7)
    assert list(leaves(demos)) == ["inputs", "outputs", "owner", "place"]
    assert etrm.tree_map(lambda x: x + 1, demos) == data.Demos(*torch.arange(1, 5), 7)


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_parameters_are_a_function_of_the_seed(seed):
    a, b, c = (leaves(init_params(config(), s)) for s in (seed, seed, seed + 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["core.embed"], c["core.embed"])
    drawn = etrm.normal(torch.Generator().manual_seed(seed), 400, 64)
    assert abs(float(drawn.std()) * 8 - 1) < 0.03 and abs(float(drawn.mean())) < 0.005


@pytest.mark.parametrize("positions", ["rope", "rope2d", "learned", "none"])
@pytest.mark.parametrize("context_scale", ["gain", "published"])
def test_every_leaf_that_should_learn_gets_a_gradient(positions, context_scale):
    w = World(
        torch.Generator().manual_seed(1),
        config(positions=positions, context_scale=context_scale, raster=8, tied_head=positions == "none"),
    )
    params, carry = w.trainable(), w.start()
    for _ in range(2):
        carry, out = w.step(carry, params)
    total(w, out).sum().backward()
    still = {k for k, v in gradients(params).items() if v is None or not v.any()}
    assert still == {"core.H_init", "core.L_init"}


# ---------------------------------------------------------------- without data


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_whole_step_runs_on_the_meta_device(encoder):
    """So nothing in it asks a tensor for a value: no device has to wait for the host."""
    w = World(torch.Generator().manual_seed(0), config(encoder))
    batch = tree_map(lambda x: x.to("meta"), w.batch)
    params = tree_map(lambda x: x.to("meta").requires_grad_(), w.params)
    carry = w.start(batch)
    assert carry.z_H.device.type == "meta"
    least = torch.zeros(SLOTS, dtype=torch.int64, device="meta")
    for _ in range(2):
        carry, out = w.step(carry, params, batch, least)
    act_loss(w.cfg, out, batch.labels).total.sum().backward()
    assert [x.shape for x in out.logits] == [(s, c * c, 12) for c, s in w.canvases]
    assert leaves(params)["encoder.queries"].grad.shape == (4, 32)
