"""Laws of the model: the carry, the slots' independence, halting, the loss, layers, parameters."""

import math

import hypothesis.strategies as st
import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from etrm_arc import data, etrm
from etrm_arc.encoders import Widened, encoder_of, init_params
from etrm_arc.etrm import Output, act_loss, act_step, fresh_carry, leaves, tree_map
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import (
    KINDS,
    SLOTS,
    SOME,
    World,
    close,
    config,
    generators,
    gradients,
    inner,
    total,
)

# ---------------------------------------------------------------- the carry


@pytest.mark.parametrize("encoder", SOME)
@given(generators, st.integers(1, 2))
@settings(max_examples=5)
def test_no_gradient_reaches_an_earlier_step(encoder, g, H_cycles):
    """A second step's gradient is the same whether or not the first left a graph, and there is
    none for the carry that came in."""
    w = World(g, config(encoder, H_cycles=H_cycles))
    together, alone, carry = w.trainable(), w.trainable(), w.running(g)
    names = ("z_H", "z_L", "z_E") if w.encode.recur else ("z_H", "z_L")
    states = {k: getattr(carry, k).requires_grad_() for k in names}
    second, _ = w.step(carry._replace(**states), together)
    assert not any(getattr(second, k).requires_grad for k in states)
    total(w, w.step(second, together)[1]).sum().backward()
    with torch.no_grad():
        second, _ = w.step(carry, alone)
    total(w, w.step(second, alone)[1]).sum().backward()
    for a, b in zip(gradients(together).values(), gradients(alone).values(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    total(w, w.step(carry._replace(**states), together)[1]).sum().backward()
    assert all(x.grad is None for x in states.values())


@pytest.mark.parametrize("encoder", SOME)
@given(generators)
@settings(max_examples=5)
def test_every_slot_trains_the_encoder_in_every_step(encoder, g):
    """Its context tokens and, if any, its cells get a gradient, and through them the encoder."""
    w = World(g, config(encoder))
    params, carry, contexts = w.trainable(), w.start(), []

    def kept(f):
        def wrapped(*args):
            context = f(*args)
            contexts.append([x for x in (context.tokens, context.cells) if x is not None])
            return context

        return wrapped

    which = "recur" if w.encode.recur else "read"
    encode = w.encode._replace(**{which: kept(getattr(w.encode, which))})
    for _ in range(3):
        carry, out = act_step(params, w.cfg, encode, carry, w.batch, None)
        assert not carry.halted.any()
        loss = total(w, out)
        tokens, *cells = torch.autograd.grad(loss.sum(), contexts[-1], retain_graph=True)
        assert all(x.any() for x in (*tokens, *(y for x in cells for y in x.split(w.batch.cells))))
        slot = puzzles.integer(g, 0, SLOTS - 1)
        encoder_leaves = list(leaves(params.encoder).values())
        grads = torch.autograd.grad(
            loss[slot], encoder_leaves, retain_graph=True, allow_unused=True
        )
        assert all(torch.isfinite(x).all() for x in grads if x is not None)
        assert any(x.any() for x in grads if x is not None)


@given(generators)
@settings(max_examples=10)
def test_a_context_read_once_starves_the_encoder(g):
    """The published failing baseline: only slots that begin an episode train the encoder."""
    encoder = msgspec.structs.replace(config().encoder, cached=True)
    w = World(g, msgspec.structs.replace(config(), encoder=encoder))
    params, carry = w.trainable(), w.start()
    for _ in range(3):
        begins = carry.halted.tolist()
        carry, out = w.step(carry, params)
        embed = params.encoder.input_embed
        grads = [torch.autograd.grad(x, embed, retain_graph=True, allow_unused=True)[0]
                 for x in total(w, out)]  # fmt: skip
        assert [x is not None and bool(x.any()) for x in grads] == begins
        carry = carry._replace(halted=torch.arange(SLOTS) < puzzles.integer(g, 0, SLOTS))
    answers = [
        etrm.think(w.params, cfg, encoder_of(cfg), w.batch, torch.float32, 3)[0].logits
        for cfg in (config(), w.cfg)
    ]
    assert torch.equal(*answers)  # evaluated, it is the same model


@given(generators, st.sampled_from([math.nan, math.inf, 1e30]), st.sampled_from(SOME))
@settings(max_examples=20)
def test_a_halted_slot_forgets(g, garbage, encoder):
    """It starts as a new one does; the others go on, whatever its states were."""
    w = World(g, config(encoder))
    carry, halted = w.running(g), w.running(g).halted
    carry = carry._replace(halted=halted)
    of_token = halted[w.owner()][:, None]
    spoilt = carry._replace(
        z_H=torch.where(of_token, garbage, carry.z_H),
        z_L=torch.where(of_token, -garbage, carry.z_L),
        steps=torch.where(halted, 1000, carry.steps),
    )
    if w.encode.recur:
        spoilt = spoilt._replace(z_E=torch.where(halted[:, None, None, None], garbage, carry.z_E))
    params = w.trainable()
    got = w.step(spoilt, params)
    total(w, got[1]).sum().backward()
    assert all(x is None or torch.isfinite(x).all() for x in gradients(params).values())
    want, fresh = w.step(carry), w.step(w.start())
    for slot in range(SLOTS):
        assert all(map(torch.equal, w.of(slot, got), w.of(slot, want)))
        assert got[0].steps[slot] == (1 if halted[slot] else carry.steps[slot] + 1)
        if halted[slot]:
            close(w.of(slot, got), w.of(slot, fresh))


@given(generators, st.sampled_from(SOME), st.sampled_from(["never", "q"]))
@settings(max_examples=30)
def test_evaluation_is_the_same_steps_with_the_demos_read_once(g, encoder, leave):
    """Each slot's output is that of the step at which it left, whoever left before."""
    positions = "borders" if "matching" in encoder else "rope2d"
    w = World(g, config(encoder, halt_max_steps=3, positions=positions))
    q = {"q_weight": torch.randn(2, 32, generator=g), "q_bias": torch.zeros(2)}
    params = w.params._replace(core=w.params.core._replace(**q))
    carry, every = w.start(), []
    for _ in range(6):  # also beyond halt_max_steps
        carry, out = w.step(carry, params)
        carry = carry._replace(halted=torch.zeros_like(carry.halted))
        every.append(out)
    got, steps = etrm.think(params, w.cfg, w.encode, w.batch, torch.float32, 6, leave)
    for slot in range(SLOTS):
        surely = [i + 1 for i, out in enumerate(every) if out.q_halt[slot] > 0]
        assert steps[slot] == ([*surely, 6][0] if leave == "q" else 6)
        answers = [
            (out.logits.split(w.batch.cells)[slot], out.q_halt[slot])
            for out in (got, every[steps[slot] - 1])
        ]
        close(*answers)


# ---------------------------------------------------------------- slots do not see each other


@pytest.mark.parametrize("encoder", SOME)
@given(generators)
@settings(max_examples=5)
def test_a_slot_alone_is_the_slot_in_the_batch(encoder, g):
    w = World(g, config(encoder))
    carry, context = w.running(g), w.context()
    together = w.step(carry)
    for slot in range(SLOTS):
        row = slice(slot, slot + 1)
        fields = {k: x[row] for k, x in w.episodes._asdict().items() if isinstance(x, torch.Tensor)}
        symmetry = data.Symmetry(*(x[row] for x in w.episodes.symmetry))
        batch = w.paint(w.episodes._replace(**fields, symmetry=symmetry))
        _, _, own_carry = etrm.select_slots(w.batch, None, carry, [slot])
        close(w.of(0, w.step(own_carry, batch=batch), batch), w.of(slot, together))
        close(w.context(batch), context[slot::SLOTS])


@given(generators)
@settings(max_examples=10)
def test_a_slot_that_goes_on_keeps_its_states_on_whatever_the_others_get(g):
    w = World(g, config())
    carry = w.running(g)
    fresh = torch.randint(1, 50, (SLOTS,), generator=g)
    cells = torch.where(carry.halted, fresh, torch.tensor(w.batch.cells)).tolist()
    got = etrm.relaid(w.cfg, carry, carry.halted.tolist(), cells)
    assert got.tokens == tuple(c + w.cfg.context_tokens for c in cells)
    for name in ("z_H", "z_L"):
        old, new = (getattr(c, name).split(c.tokens) for c in (carry, got))
        for slot in range(SLOTS):
            assert len(new[slot]) == got.tokens[slot]
            assert carry.halted[slot] or torch.equal(new[slot], old[slot])


@pytest.mark.parametrize("encoder", [e for e in SOME if e != "pointer"])  # of twelve tokens
@given(generators)
@settings(max_examples=5)
def test_the_demos_of_others_get_exactly_no_gradient(encoder, g):
    """One slot's demos, and its test input as the encoder reads it, are written in colours of their
    own: only its loss may move the embeddings of these."""
    w = World(g, config(encoder))
    other = puzzles.integer(g, 0, SLOTS - 1)

    def doubled(e):
        if isinstance(e, Widened):
            return e._replace(inner=doubled(e.inner))
        names = ("input_embed", "output_embed")
        return e._replace(**{k: getattr(e, k).repeat(2, 1) for k in names})

    def recoloured(tokens, owner, cells):  # 13 and more: 12 asks for the output of any slot
        owner = owner.repeat_interleave(torch.tensor(cells))
        return tokens + 12 * ((owner == other) & (tokens != data.PAD))

    def read(p, batch):
        d = batch.demos
        new = {k: recoloured(getattr(d, k), d.owner, d.cells) for k in ("inputs", "outputs")}
        inputs = recoloured(batch.inputs, torch.arange(SLOTS), batch.cells)
        return w.encode.read(p, batch._replace(inputs=inputs, demos=d._replace(**new)))

    params = w.params._replace(encoder=doubled(w.params.encoder))
    params = tree_map(lambda x: x.clone().requires_grad_(), params)
    _, out = act_step(params, w.cfg, w.encode._replace(read=read), w.start(), w.batch, None)
    loss, e = total(w, out), inner(params.encoder)
    for slot in range(SLOTS):
        tables = e.input_embed, e.output_embed
        for grad in torch.autograd.grad(loss[slot], tables, retain_graph=True):
            assert (grad[13:] if slot == other else grad[:12]).any()
            assert not (grad[1:12] if slot == other else grad[13:]).any()


# ---------------------------------------------------------------- halting and the loss


@given(generators, st.booleans(), st.booleans())
@settings(max_examples=30)
def test_halting(g, exploring, fixed):
    """By steps always; by q only when training, after `min_steps`, unless steps are fixed (FCT)."""
    cfg = config(halt_max_steps=puzzles.integer(g, 1, 4), fixed_steps=fixed)
    w, last = World(g, cfg), cfg.halt_max_steps
    q = {"q_weight": torch.randn(2, 32, generator=g), "q_bias": torch.randn(2, generator=g)}
    params, carry = w.params._replace(core=w.params.core._replace(**q)), w.start()
    for _ in range(6):
        least = torch.randint(0, last + 1, (SLOTS,), generator=g) if exploring else None
        before, (carry, out) = carry, w.step(carry, params, min_steps=least)
        assert torch.equal(carry.steps, torch.where(before.halted, 1, before.steps + 1))
        want = carry.steps == last
        if least is not None and not fixed:
            want = want | ((out.q_halt > 0) & (carry.steps >= least))
        assert torch.equal(carry.halted, want)
    surely, steps = torch.full((2,), 9.0), torch.tensor([1, 4])
    feedback = config(feedback="kept", fixed_steps=fixed)  # the same rule
    assert etrm.halts(feedback, surely, steps, torch.zeros(2)).tolist() == [not fixed, True]


@given(
    generators,
    st.sampled_from(["stablemax", "softmax"]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1e4]),
)
def test_extreme_logits_keep_the_loss_finite(g, loss, faults, size):
    labels = torch.randint(0, 12, (4, 9), generator=g)
    labels[torch.rand(4, 9, generator=g) < 0.3] = data.IGNORE
    labels[0] = data.IGNORE
    logits = (torch.randint(-1, 2, (4, 9, 12), generator=g) * size).requires_grad_()
    q = (torch.randint(-1, 2, (4,), generator=g) * size).requires_grad_()
    cfg = config(loss=loss, published_faults=faults)
    scores = act_loss(cfg, Output(logits.flatten(0, 1), q), labels.flatten(), [9] * 4)
    scores.total.sum().backward()
    assert all(torch.isfinite(x.float()).all() for x in (*scores, logits.grad, q.grad))
    assert (scores.lm >= 0).all() and scores.lm[0] == 0
    assert not logits.grad[labels == data.IGNORE].any()
    assert not scores.exact[0] and not scores.labelled[0]
    assert faults or q.grad[0] == 0  # a row without a label trains no head


@given(generators)
@settings(max_examples=25)
def test_the_loss_of_a_slot_is_its_own(g):
    """Scores and gradients of a slot do not know the others; all right is exact."""
    cells = [9, 9, 4, 0, 4]
    labels = torch.randint(-1, 12, (26,), generator=g)
    labels = torch.where(labels < 0, data.IGNORE, labels)
    logits = torch.randn(26, 12, generator=g)
    logits[:9] = F.one_hot(labels[:9].clamp(min=0), 12) * 9.0
    logits.requires_grad_()
    q = torch.randn(5, generator=g)
    whole = act_loss(config(), Output(logits, q), labels, cells)
    assert bool(whole.exact[0]) == bool((labels[:9] >= 0).any())
    owner = torch.arange(5).repeat_interleave(torch.tensor(cells))
    for slot, (x, y) in enumerate(zip(logits.split(cells), labels.split(cells), strict=True)):
        alone = act_loss(config(), Output(x, q[slot : slot + 1]), y, [len(y)])
        close([v[0].float() for v in alone], [v[slot].float() for v in whole])
        (grad,) = torch.autograd.grad(whole.total[slot], logits, retain_graph=True)
        assert not grad[owner != slot].any()
        assert torch.equal(grad[owner == slot].any(-1), y >= 0)


# ---------------------------------------------------------------- positions and layers


def cells_at(side):
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


@given(generators)
@settings(max_examples=20)
def test_a_code_of_borders_is_that_of_all_four_distances_and_of_nothing_else(g):
    cfg = config(positions="borders")
    table, at = etrm.init_core(cfg, g).position[cfg.context_tokens :], cells_at(6)
    borders = torch.randint(0, 31, (36, 4), generator=g)
    batch = data.Batch(at, at, at, (36,), None, borders)
    codes = etrm.codes(cfg, table, batch)
    assert torch.equal(codes, etrm.codes(cfg, table, batch._replace(at=at + 3)))
    for k in range(4):
        other = borders.clone()
        other[:, k] = (other[:, k] + 1 + torch.randint(0, 30, (36,), generator=g)) % 31
        assert (
            (etrm.codes(cfg, table, batch._replace(borders=other)) - codes).abs().amax(1) > 1e-3
        ).all()


@given(generators, st.sampled_from(["rope", "rope2d", "learned"]), st.integers(0, 20))
@settings(max_examples=20)
def test_a_position_is_that_of_the_raster(g, kind, top):
    """Whatever the canvas, a token's code is that of its place on the raster, that of a context
    token its own."""
    cfg, left = config(positions=kind), puzzles.integer(g, 0, 20)
    p, context = etrm.init_core(cfg, g), torch.randn(1, 4, 32, generator=g)
    codes = {}
    for name, at in (("raster", cells_at(30)), ("canvas", cells_at(6) + torch.tensor([top, left]))):
        n = len(at)
        batch = data.Batch(torch.full((n,), 5), torch.zeros(n), at, (n,), None, at)
        layout = etrm.layout_of(cfg, batch.cells, at.device)
        e, rotary = etrm.embed_input(p, cfg, etrm.Context(context), batch, layout)
        codes[name] = e if rotary is None else torch.cat([x.flatten(1) for x in rotary], 1)
    rows = 4 + (cells_at(6) + torch.tensor([top, left])) @ torch.tensor([30, 1])
    assert torch.equal(codes["canvas"], codes["raster"][torch.cat((torch.arange(4), rows))])
    assert len(codes["canvas"].unique(dim=0)) == (40 if kind != "rope2d" else 37)


@given(generators, st.sampled_from(["rope", "rope2d"]))
def test_rotation_keeps_lengths_and_sees_distances_only(g, kind):
    rotary = etrm.rotary_of(etrm.position_of(kind, cells_at(6), 30), 1, 16, torch.float32)
    qk = torch.randn(36, 2, 1, 16, generator=g)
    scale = torch.tensor([0.25, 1.0])
    close([etrm.rotate(qk, rotary).norm(dim=-1)], [qk.norm(dim=-1) * scale[:, None]])
    close([etrm.rotate(qk, None)], [qk * scale[:, None, None]])
    same = etrm.rotate(qk[:1].expand(36, -1, -1, -1), rotary)
    dot = torch.einsum("ijd,kld->ijkl", same[:, 0, 0].view(6, 6, 16), same[:, 1, 0].view(6, 6, 16))
    close([dot[:-1, :-1, :-1, :-1]], [dot[1:, 1:, 1:, 1:]], 1e-4)
    assert (dot[0, 0] - dot[0, 0, 0, 0]).flatten()[1:].abs().min() > 0  # no two cells look alike


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=30))
def test_runs_are_the_slots_in_order(slots):
    runs = etrm.runs_of([s for s, _ in slots], [m for _, m in slots])
    assert [(s, m) for b, s, m in runs for _ in range(b)] == slots
    assert all(b == 1 << (b.bit_length() - 1) and b * s <= max(s, etrm.RUN) for b, s, _ in runs)


@given(generators, st.integers(2, 6))
@settings(max_examples=20)
def test_attention_stays_within_a_slot(g, slots):
    """Packed and run by run, masked or not, it is what each slot gives alone."""
    tokens = torch.randint(1, 5, (slots,), generator=g).sort().values.tolist()
    n, masked = sum(tokens), [s % 2 for s in tokens]
    x, qkv, o = (torch.randn(m, 32, generator=g) / 6 for m in (n, 96, 32))
    block = etrm.Block(qkv, o, qkv, o)
    cos, sin = etrm.rotary_of(torch.arange(n), 2, 16, torch.float32)
    seen = torch.rand(n, generator=g) < 0.7
    got = etrm.self_attention(block, 2, x, etrm.runs_of(tokens, masked), (cos, sin), seen)
    parts = zip(tokens, masked, *(t.split(tokens) for t in (x, cos, sin, seen, got)), strict=True)
    for s, m, own, c, d, visible, ours in parts:
        close([ours], [etrm.self_attention(block, 2, own, [(1, s, m)], (c, d), visible)])


@given(generators, st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=50)
def test_attention_is_a_mean_over_what_may_be_seen(g, queries, keys):
    """However many slots at once; where no key may be seen it is 0."""
    q = torch.randn(3, 2, queries, 8, generator=g)
    k, v = torch.randn(2, 3, 2, keys, 8, generator=g)
    mask = torch.rand(3, 1, 1, keys, generator=g) < 0.5
    mask[0] = False
    got = etrm.attention(q, k, v, mask)
    assert not got[0].any()
    for b in (1, 2):
        seen, one = mask[b, 0, 0], slice(b, b + 1)
        if seen.any():
            close([got[one]], [etrm.attention(q[one], k[one, :, seen], v[one, :, seen])])
    close([etrm.attention(q, k, v)], [F.scaled_dot_product_attention(q, k, v, scale=1.0)])
    for slots in (0, 1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(etrm, "SCORES", slots * 2 * queries * keys)
            close([etrm.attention(q, k, v, mask)], [got])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tables_made_while_evaluating_serve_training(mode):
    etrm.waves.cache_clear()
    w = World(torch.Generator().manual_seed(0), config())
    with mode():
        w.step(w.start())
    params = w.trainable()
    total(w, w.step(w.start(), params)[1]).sum().backward()
    assert params.core.blocks[0].qkv.grad.any()


@given(generators, st.sampled_from([1e-3, 1.0, 1e4]))
def test_rms_norm(g, size):
    x, out = torch.randn(5, 32, generator=g) * size, torch.randn(5, 32, generator=g)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close([etrm.rms(ours)], [want])
    grads = torch.autograd.grad(etrm.rms(ours), ours, out), torch.autograd.grad(want, plain, out)
    close([grads[0][0] * size], [grads[1][0] * size], 1e-4)


@given(generators)
def test_swiglu(g):
    shapes = (5, 8), (12, 8), (8, 6)
    x, gate_up, down = (torch.randn(*s, generator=g).requires_grad_() for s in shapes)
    a, b = (x @ gate_up.T).chunk(2, -1)
    want, got = (F.silu(a) * b) @ down.T, etrm.swiglu(gate_up, down, x)
    close([got], [want], 1e-4)
    out = torch.randn(5, 8, generator=g)
    close(*(torch.autograd.grad(y, (x, gate_up, down), out) for y in (got, want)), 1e-4)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("encoder", ["matching, wide", "variational"])
@pytest.mark.parametrize("positions", ["rope2d", "learned"])
def test_a_tree_survives_being_taken_apart(encoder, positions):
    cfg = config(encoder, positions=positions, tied_head=positions == "learned", raster=8)
    params = init_params(cfg, 0)
    by_path = leaves(params)
    again = etrm.rebuild(params, by_path)
    pairs = zip(leaves(again).items(), by_path.items(), strict=True)
    assert all(a == b and x is y for (a, x), (b, y) in pairs)
    assert type(again) is type(params) and type(again.core.blocks[0]) is etrm.Block
    assert (again.core.head is None) == cfg.tied_head
    assert (again.core.position is None) == (positions == "rope2d")
    twice = tree_map(lambda x: 2 * x, params)
    assert torch.equal(leaves(twice)["core.blocks.0.qkv"], 2 * params.core.blocks[0].qkv)
    batch = World(torch.Generator().manual_seed(0), config()).batch
    moved = tree_map(lambda x: x + 1, batch)
    assert moved.cells == batch.cells and torch.equal(moved.demos.at, batch.demos.at + 1)


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_parameters_are_a_function_of_the_seed(seed):
    a, b, c = (leaves(init_params(config(), s)) for s in (seed, seed, seed + 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["core.embed"], c["core.embed"])
    drawn = etrm.normal(torch.Generator().manual_seed(seed), 400, 64)
    assert abs(float(drawn.std()) * 8 - 1) < 0.03 and abs(float(drawn.mean())) < 0.005


@pytest.mark.parametrize("positions", ["rope", "rope2d", "learned", "both", "borders", "none"])
@pytest.mark.parametrize("published", [False, True])
def test_every_leaf_that_should_learn_gets_a_gradient(positions, published):
    tied = positions == "none"
    cfg = config(positions=positions, published=published, raster=8, tied_head=tied)
    w = World(torch.Generator().manual_seed(1), cfg)
    params, carry = w.trainable(), w.start()
    for _ in range(2):
        carry, out = w.step(carry, params)
    total(w, out).sum().backward()
    still = {k for k, v in gradients(params).items() if v is None or not v.any()}
    assert still == {"core.H_init", "core.L_init"}


@pytest.mark.parametrize("encoder", KINDS)
def test_a_whole_step_runs_on_the_meta_device(encoder):
    """So nothing in it asks a tensor for a value: no device has to wait for the host."""
    w = World(torch.Generator().manual_seed(0), config(encoder))
    batch = tree_map(lambda x: x.to("meta"), w.batch)
    params = tree_map(lambda x: x.to("meta").requires_grad_(), w.params)
    carry = fresh_carry(w.cfg, batch.cells, torch.float32, "meta")
    least = torch.zeros(SLOTS, dtype=torch.int64, device="meta")
    for _ in range(2):
        carry, out = w.step(carry, params, batch, least)
    act_loss(w.cfg, out, batch.labels, batch.cells).total.sum().backward()
    assert out.logits.shape == (len(w.batch.inputs), 12)
    assert sum(x.grad is not None for x in leaves(params.encoder).values()) > 5
