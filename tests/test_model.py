"""Laws of the model: the carry, the slots' independence, halting, the loss, layers, parameters."""

import math
from unittest import mock

import hypothesis.strategies as st
import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from etrm_arc import data, etrm
from etrm_arc.config import ModelConfig
from etrm_arc.encoders import init_params
from etrm_arc.etrm import Output, act_loss, act_step, fresh_carry, leaves, tree_map
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import SLOTS, SOME, World, config, generators, total


@pytest.mark.parametrize("encoder", SOME)
@given(generators, st.integers(1, 2))
@settings(max_examples=5)
def test_no_gradient_reaches_an_earlier_step(encoder, g, H_cycles):
    """The second step's is the same whether or not the first left a graph; the carry has none."""
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
    pairs = zip(*(puzzles.gradients(x).values() for x in (together, alone)), strict=True)
    for a, b in pairs:
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
        weights = list(leaves(params.encoder).values())
        grads = torch.autograd.grad(loss[slot], weights, retain_graph=True, allow_unused=True)
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
    assert all(x is None or torch.isfinite(x).all() for x in puzzles.gradients(params).values())
    want, fresh = w.step(carry), w.step(w.start())
    for slot in range(SLOTS):
        assert all(map(torch.equal, w.of(slot, got), w.of(slot, want)))
        assert got[0].steps[slot] == (1 if halted[slot] else carry.steps[slot] + 1)
        if halted[slot]:
            puzzles.close(w.of(slot, got), w.of(slot, fresh))


@given(generators, st.sampled_from(SOME), st.sampled_from(["never", "q"]))
@settings(max_examples=30)
def test_evaluation_is_the_same_steps_with_the_demos_read_once(g, encoder, leave):
    """Each slot's output is that of the step at which it left, whoever left before."""
    positions = "both" if "matching" in encoder else "rope2d"
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
        last = every[steps[slot] - 1]
        logits = [x.logits.split(w.batch.cells)[slot] for x in (got, last)]
        puzzles.close([logits[0], got.q_halt[slot]], [logits[1], last.q_halt[slot]])


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
        alone = w.of(0, w.step(own_carry, batch=batch), batch)
        puzzles.close(alone, w.of(slot, together), 5e-5)  # rounding of float32
        puzzles.close(w.context(batch), context[slot::SLOTS])


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


@pytest.mark.parametrize("loss", ["stablemax", "softmax"])
@given(generators, st.booleans(), st.sampled_from([0.0, 1.0, 1e4]))
def test_extreme_logits_keep_the_loss_finite(loss, g, faults, size):
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
    """Scores and puzzles.gradients of a slot do not know the others; all right is exact."""
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
        puzzles.close([v[0].float() for v in alone], [v[slot].float() for v in whole])
        (grad,) = torch.autograd.grad(whole.total[slot], logits, retain_graph=True)
        assert not grad[owner != slot].any()
        assert torch.equal(grad[owner == slot].any(-1), y >= 0)


@given(generators, st.sampled_from(["rope", "rope2d"]))
def test_rotation_keeps_lengths_and_sees_distances_only(g, kind):
    at = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    cfg = ModelConfig(hidden=16, heads=1)
    rotary = etrm.rotary_of(cfg, etrm.position_of(kind, at, 30), torch.float32)
    qk = torch.randn(36, 2, 1, 16, generator=g)
    scale = torch.tensor([0.25, 1.0])
    puzzles.close([etrm.rotate(qk, rotary).norm(dim=-1)], [qk.norm(dim=-1) * scale[:, None]])
    puzzles.close([etrm.rotate(qk, None)], [qk * scale[:, None, None]])
    same = etrm.rotate(qk[:1].expand(36, -1, -1, -1), rotary)
    dot = torch.einsum("ijd,kld->ijkl", same[:, 0, 0].view(6, 6, 16), same[:, 1, 0].view(6, 6, 16))
    puzzles.close([dot[:-1, :-1, :-1, :-1]], [dot[1:, 1:, 1:, 1:]], 1e-4)
    assert (dot[0, 0] - dot[0, 0, 0, 0]).flatten()[1:].abs().min() > 0  # no two cells look alike


@given(
    generators,
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=6),
    st.sampled_from([0, 1, 4]),
)
def test_slots_attend_to_their_own_keys_that_are_seen_however_filled_up(g, slots, step):
    sizes, keys = zip(*slots, strict=True)
    qkv = [torch.randn(sum(n), 2, 8, generator=g, dtype=torch.float64) for n in (sizes, keys, keys)]
    q, k, v = (x.requires_grad_() for x in qkv)
    seen, alone = torch.rand(sum(keys), generator=g) < 0.7, []
    parts = q.split(sizes), k.split(keys), v.split(keys), seen.split(keys)
    for q1, k1, v1, mask in zip(*parts, strict=True):
        x = [y.transpose(0, 1)[None] for y in (q1, k1[mask], v1[mask])]
        alone.append(F.scaled_dot_product_attention(*x, scale=1.0)[0].transpose(0, 1).flatten(1))
    with mock.patch.object(etrm, "step_of", lambda x: step):
        got = etrm.attend(q, k, v, sizes, keys, seen)
    wanted, weight = torch.cat(alone), torch.randn(got.shape, generator=g, dtype=torch.float64)
    puzzles.close([got], [wanted], 1e-9)
    both = (torch.autograd.grad(y, (q, k, v), weight) for y in (got, wanted))
    puzzles.close(*([torch.cat([x.flatten() for x in gs])] for gs in both), 1e-9)


@given(generators, st.integers(1, 1100))
def test_products_of_rows_that_are_filled_up_are_those_of_the_rows(g, n):
    x, weight = (torch.randn(m, 8, generator=g).bfloat16() for m in (n, 3))
    puzzles.close([etrm.linear(x, weight).float()], [x.float() @ weight.float().T], 0.01)


@given(generators, st.sampled_from([1e-3, 1.0, 1e4]))
def test_norm_and_swiglu_are_their_formulas(g, size):
    """And so are their puzzles.gradients, which are written by hand."""
    x = (torch.randn(5, 32, generator=g) * size).requires_grad_()
    gate_up, down = (torch.randn(*shape, generator=g) for shape in ((12, 32), (32, 6)))
    a, b = (etrm.rms(x) @ gate_up.T).chunk(2, -1)
    norm = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gated = etrm.swiglu(gate_up, down, etrm.rms(x)), (F.silu(a) * b) @ down.T
    for got, want in ((etrm.rms(x), norm), gated):
        puzzles.close([got], [want], 1e-4)
        out = torch.randn(5, 32, generator=g)
        grads = (torch.autograd.grad(y, x, out, retain_graph=True)[0] for y in (got, want))
        puzzles.close([next(grads) * size], [next(grads) * size], 1e-3)


def test_tables_made_while_evaluating_serve_training():
    etrm.waves.cache_clear()
    w = World(torch.Generator().manual_seed(0), config())
    with torch.inference_mode():
        w.step(w.start())
    params = w.trainable()
    total(w, w.step(w.start(), params)[1]).sum().backward()
    assert params.core.blocks[0].qkv.grad.any()


def test_a_tree_survives_being_taken_apart():
    w = World(torch.Generator().manual_seed(0), config())
    again = etrm.rebuild(w.params, leaves(w.params))
    pairs = zip(leaves(again).items(), leaves(w.params).items(), strict=True)
    assert all(a == b and x is y for (a, x), (b, y) in pairs)
    assert type(again) is type(w.params) and type(again.core.blocks[0]) is etrm.Block
    moved = tree_map(lambda x: x + 1, w.batch)
    assert moved.cells == w.batch.cells and torch.equal(moved.demos.at, w.batch.demos.at + 1)


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_parameters_are_a_function_of_the_seed(seed):
    a, b, c = (leaves(init_params(config(), s)) for s in (seed, seed, seed + 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["core.embed"], c["core.embed"])
    drawn = etrm.normal(torch.Generator().manual_seed(seed), 400, 64)
    assert abs(float(drawn.std()) * 8 - 1) < 0.03 and abs(float(drawn.mean())) < 0.005


@pytest.mark.parametrize("encoder", puzzles.KINDS)
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
