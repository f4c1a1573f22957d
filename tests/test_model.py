"""Laws of the model: the carry, the slots' independence, halting, the loss, its layers and parameters."""

import math

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings

from etrm_arc import data, etrm
from etrm_arc.encoders import Widened, encoder_of, init_params
from etrm_arc.etrm import Output, act_loss, act_step, fresh_carry, leaves, tree_map
from etrm_arc.tests import puzzles
from etrm_arc.tests.puzzles import (
    ENCODERS,
    RECURRENT,
    SLOTS,
    World,
    close,
    config,
    generators,
    gradients,
    own,
    total,
)

cycles = st.integers(1, 2)


# ---------------------------------------------------------------- the carry


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators, cycles)
@settings(max_examples=2)
def test_no_gradient_reaches_an_earlier_step(encoder, g, H_cycles):
    """The gradient of a second step is the same whether or not the first left a graph behind."""
    w = World(g, config(encoder, H_cycles=H_cycles))
    together, alone, carry = w.trainable(), w.trainable(), w.running(g)
    second, _ = w.step(carry, together)
    assert (
        not second.z_H.requires_grad
        and not second.z_L.requires_grad
        and not second.z_E.requires_grad
    )
    total(w, w.step(second, together)[1]).sum().backward()
    with torch.no_grad():
        second, _ = w.step(carry, alone)
    total(w, w.step(second, alone)[1]).sum().backward()
    for a, b in zip(gradients(together).values(), gradients(alone).values(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@given(generators, cycles, st.sampled_from(["perceiver", *RECURRENT]))
@settings(max_examples=15)
def test_no_gradient_reaches_the_carry_given(g, H_cycles, encoder):
    w = World(g, config(encoder, H_cycles=H_cycles))
    carry = w.running(g)
    carry = carry._replace(**{k: getattr(carry, k).requires_grad_() for k in ("z_H", "z_L", "z_E")})
    total(w, w.step(carry, w.trainable())[1]).sum().backward()
    assert carry.z_H.grad is None and carry.z_L.grad is None and carry.z_E.grad is None


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_every_slot_trains_the_encoder_in_every_step(encoder, g):
    w = World(g, config(encoder))
    params, carry, contexts = w.trainable(), w.start(), []

    def kept(f):
        def wrapped(*given):
            context = f(*given)
            contexts.append([x for x in (context.tokens, context.cells) if x is not None])
            for x in contexts[-1]:
                x.retain_grad()
            return context

        return wrapped

    which = "recur" if w.encode.recur else "read"
    encode = w.encode._replace(**{which: kept(getattr(w.encode, which))})
    for _ in range(3):
        carry, out = act_step(params, w.cfg, encode, carry, w.batch, None)
        assert not carry.halted.any()
        loss = total(w, out)
        loss.sum().backward(retain_graph=True)
        tokens, *cells = (x.grad for x in contexts[-1])
        assert all(
            x.any() for x in (*tokens, *(of for x in cells for of in x.split(w.batch.cells)))
        )
        slot = puzzles.integer(g, 0, SLOTS - 1)
        mine = torch.autograd.grad(
            loss[slot], leaves(params.encoder).values(), retain_graph=True, allow_unused=True
        )
        assert all(torch.isfinite(x).all() for x in mine if x is not None)
        assert sum(float(x.abs().sum()) for x in mine if x is not None) > 0


@given(generators)
@settings(max_examples=20)
def test_a_context_read_once_starves_the_encoder(g):
    """The published failing baseline: only slots that begin an episode train the encoder, against all of them in ours."""
    once = msgspec.structs.replace(
        config(), encoder=msgspec.structs.replace(config().encoder, cached=True)
    )
    w = World(g, once)
    params, carry, shares = w.trainable(), w.start(), []
    for _ in range(3):
        begins = carry.halted.tolist()
        carry, out = act_step(params, w.cfg, w.encode, carry, w.batch, None)
        loss, fed = total(w, out), []
        for slot in range(SLOTS):
            mine = torch.autograd.grad(
                loss[slot], leaves(params.encoder).values(), retain_graph=True, allow_unused=True
            )
            fed.append(any(x is not None and bool(x.any()) for x in mine))
        assert fed == begins
        shares.append(sum(fed) / SLOTS)
        carry = carry._replace(halted=torch.arange(SLOTS) < puzzles.integer(g, 0, SLOTS))
    assert shares[0] == 1.0
    thought = [
        etrm.think(w.params, c, encoder_of(c), w.batch, torch.float32, 3)[0].logits
        for c in (config(), once)
    ]
    assert torch.equal(*thought)  # evaluated, it is the same model


@given(generators, st.integers(1, 5), st.floats(-9, 9))
@settings(max_examples=30)
def test_a_fixed_number_of_steps_is_what_every_episode_takes(g, steps, bias):
    """Whatever q and exploration say: all slots begin and end together, so the carry is reset batch by batch (ETRM-FCT)."""
    w = World(g, msgspec.structs.replace(config(), halt_max_steps=steps, fixed_steps=True))
    params = w.params._replace(core=w.params.core._replace(q_bias=torch.tensor([bias, 0.0])))
    carry = w.start()
    for k in range(2 * steps):
        least = torch.randint(0, steps + 1, (SLOTS,), generator=g)
        carry, _ = w.step(carry, params, min_steps=least)
        assert (
            carry.halted.tolist() == [(k + 1) % steps == 0] * SLOTS
            and carry.steps.tolist() == [k % steps + 1] * SLOTS
        )
    surely, last = torch.full((2,), 9.0), torch.tensor([1, 4])
    for fixed in (False, True):  # the argmax-feedback TRM has the same rule
        cfg = config(halt_max_steps=4, fixed_steps=fixed, feedback="kept")
        assert etrm.halts(cfg, surely, last, torch.zeros(2)).tolist() == [not fixed, True]


@given(
    generators,
    st.sampled_from([math.nan, math.inf, 1e30, 1.0]),
    st.sampled_from(["perceiver", *RECURRENT]),
)
@settings(max_examples=20)
def test_a_halted_slot_forgets(g, garbage, encoder):
    w = World(g, config(encoder))
    carry, fresh = w.running(g), w.start()
    halted = carry.halted[w.owner()][:, None]
    spoilt = carry._replace(
        z_H=torch.where(halted, garbage, carry.z_H),
        z_L=torch.where(halted, -garbage, carry.z_L),
        z_E=torch.where(carry.halted[:, None, None, None], garbage, carry.z_E)
        if w.encode.recur
        else carry.z_E,
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
@settings(max_examples=2)
def test_evaluation_is_the_same_steps_with_the_context_computed_once(encoder, g):
    w = World(g, config(encoder))
    carry = w.start()
    for _ in range(3):
        carry, out = w.step(carry)
    got, steps = etrm.think(w.params, w.cfg, w.encode, w.batch, torch.float32, 3)
    close(got[:3], out[:3])
    assert steps.tolist() == [3] * SLOTS


@given(
    generators,
    st.sampled_from(["q", "stable"]),
    st.sampled_from(["perceiver", "matching", *RECURRENT]),
    st.integers(1, 4),
)
@settings(max_examples=15)
def test_a_view_leaves_with_the_answer_it_had(g, leave, encoder, stable):
    """Each slot's output is that of the step at which it left, whoever left before."""
    w = World(
        g,
        config(
            encoder, halt_max_steps=6, positions="borders" if encoder == "matching" else "rope2d"
        ),
    )
    core = w.params.core
    params = w.params._replace(
        core=core._replace(q_weight=torch.randn(2, 32, generator=g), q_bias=torch.zeros(2))
    )
    carry, every = w.start(), []
    for _ in range(6):
        carry, out = w.step(carry, params)
        every.append(out)
    got, steps = etrm.think(
        params, w.cfg, w.encode, w.batch, torch.float32, 6, leave, stable=stable
    )
    answers = [out.logits.argmax(-1).split(w.batch.cells) for out in every]
    for slot in range(SLOTS):
        if leave == "q":
            due = next((i + 1 for i, out in enumerate(every) if out.q_halt[slot] > 0), 6)
        else:
            calm = lambda i, slot=slot: all(
                torch.equal(answers[i - k][slot], answers[i][slot]) for k in range(stable)
            )  # noqa: E731
            due = next((i + 1 for i in range(stable - 1, 6) if calm(i)), 6)
        assert steps[slot] == due
        close(
            [got.logits.split(w.batch.cells)[slot], got.q_halt[slot]],
            [every[due - 1].logits.split(w.batch.cells)[slot], every[due - 1].q_halt[slot]],
        )


def test_an_empty_answer_is_no_older_than_the_first_step():
    w = World(torch.Generator().manual_seed(0), config(halt_max_steps=6))
    params = w.params._replace(
        core=w.params.core._replace(embed=torch.zeros_like(w.params.core.embed))
    )  # says PAD at once
    assert (
        etrm.think(params, w.cfg, w.encode, w.batch, torch.float32, 6, "stable")[1].tolist()
        == [3] * SLOTS
    )


# ---------------------------------------------------------------- slots do not see each other


def mix(slot, mine, others):
    """Episodes: one slot's from `mine`, the others' from `others`."""
    own, k = torch.arange(SLOTS) == slot, max(mine.demos.shape[1], others.demos.shape[1])

    def joined(a, b, n=None, value=0):
        wide = lambda x: (
            x
            if n is None
            else torch.cat((x, x.new_full((SLOTS, n - x.shape[1], *x.shape[2:]), value)), 1)
        )  # noqa: E731
        return torch.cat((wide(a), wide(b)))

    both = data.Episodes(
        joined(mine.query, others.query), joined(mine.demos, others.demos, k, -1),
        data.Symmetry(*(joined(*x) for x in zip(mine.symmetry, others.symmetry, strict=True))),
        joined(mine.shift, others.shift, k + 1), joined(mine.canvas, others.canvas),
    )  # fmt: skip
    row = torch.where(own, torch.arange(SLOTS), SLOTS + torch.arange(SLOTS))
    assert both.demos.shape[1] == k
    return rows_of(both, row)


def rows_of(e, rows):
    return data.Episodes(
        *(data.Symmetry(*(y[rows] for y in x)) if isinstance(x, tuple) else x[rows] for x in e[:-1])
    )


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_a_slot_is_untouched_by_what_others_hold(encoder, g):
    w = World(g, config(encoder))
    carry, others = w.running(g), w.draw(torch.arange(1, 1 + SLOTS))
    before = w.step(carry)
    for slot in range(SLOTS):
        batch = w.paint(mix(slot, w.episodes, others))
        noise = torch.randn(2, len(w.owner(batch)), w.cfg.hidden, generator=g)
        noise[:, w.owner(batch) == slot] = torch.stack((carry.z_H, carry.z_L))[:, w.owner() == slot]
        z_E = torch.where(
            torch.arange(SLOTS)[:, None, None, None] == slot,
            carry.z_E,
            torch.randn(carry.z_E.shape, generator=g),
        )
        changed = carry._replace(z_H=noise[0], z_L=noise[1], z_E=z_E, tokens=w.start(batch).tokens)
        close(w.of(slot, w.step(changed, batch=batch), batch), w.of(slot, before))


@given(generators)
@settings(max_examples=25)
def test_a_slot_that_goes_on_keeps_its_states_on_whatever_the_others_get(g):
    w = World(g, config())
    carry, others = w.running(g), w.draw(torch.arange(1, 1 + SLOTS))
    rows = torch.where(carry.halted, SLOTS + torch.arange(SLOTS), torch.arange(SLOTS))
    cells = [(*w.batch.cells, *w.paint(others).cells)[r] for r in rows]
    got = etrm.relaid(w.cfg, carry, carry.halted.tolist(), cells)
    assert got.tokens == tuple(c + w.cfg.context_tokens for c in cells)
    for name in ("z_H", "z_L"):
        for slot, (new, old) in enumerate(
            zip(
                getattr(got, name).split(got.tokens),
                getattr(carry, name).split(carry.tokens),
                strict=True,
            )
        ):
            assert len(new) == got.tokens[slot] and (carry.halted[slot] or torch.equal(new, old))


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_a_row_alone_is_the_row_in_the_batch(encoder, g):
    w = World(g, config(encoder))
    together, said = w.step(w.start()), w.context()
    for slot in range(SLOTS):
        batch = w.paint(rows_of(w.episodes, slice(slot, slot + 1)))
        carry, out = w.step(w.start(batch), batch=batch)
        close(w.of(0, (carry, out), batch), w.of(slot, together))
        close(w.context(batch), said[slot::SLOTS])


@pytest.mark.parametrize("encoder", ENCODERS)
@given(generators)
@settings(max_examples=2)
def test_the_demos_of_others_get_exactly_no_gradient(encoder, g):
    """One slot's demos, and its test input as the encoder reads it, are written in colours of their own: only its loss may move
    the embeddings of these."""
    w = World(g, config(encoder))
    names = {
        k for k in ("input_embed", "output_embed") if getattr(own(w.params.encoder), k) is not None
    }

    def replaced(e):
        if isinstance(e, Widened):
            return e._replace(own=replaced(e.own))
        return e._replace(**{k: getattr(e, k).repeat(2, 1) for k in names})

    params = w.params._replace(encoder=replaced(w.params.encoder))
    other = puzzles.integer(g, 0, SLOTS - 1)

    def recoloured(
        tokens, owner, cells
    ):  # 13 and more; 12 stands for the output that is asked of any slot
        return tokens + 12 * (
            (owner.repeat_interleave(torch.tensor(cells)) == other) & (tokens != data.PAD)
        )

    def read(p, batch):
        d = batch.demos
        demos = d._replace(
            **{k: recoloured(getattr(d, k), d.owner, d.cells) for k in ("inputs", "outputs")}
        )
        return w.encode.read(
            p,
            batch._replace(
                inputs=recoloured(batch.inputs, torch.arange(SLOTS), batch.cells), demos=demos
            ),
        )

    params = tree_map(lambda x: x.clone().requires_grad_(), params)
    loss = total(
        w, act_step(params, w.cfg, w.encode._replace(read=read), w.start(), w.batch, None)[1]
    )
    tables = [getattr(own(params.encoder), k) for k in names]
    for slot in range(SLOTS):
        for grad in torch.autograd.grad(loss[slot], tables, retain_graph=True):
            assert (grad[13:] if slot == other else grad[:12]).any()
            assert not (grad[1:12] if slot == other else grad[13:]).any()


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
        least = (
            torch.randint(0, cfg.halt_max_steps + 1, (SLOTS,), generator=g) if exploring else None
        )
        before, (carry, out) = carry, w.step(carry, params, min_steps=least)
        assert torch.equal(carry.steps, torch.where(before.halted, 1, before.steps + 1))
        assert (carry.steps <= cfg.halt_max_steps).all() and carry.halted[
            carry.steps == cfg.halt_max_steps
        ].all()
        early = carry.halted & (carry.steps < cfg.halt_max_steps)
        if least is None:
            assert not early.any()
        else:
            assert (carry.steps >= least)[carry.halted].all()
            assert torch.equal(
                early,
                (out.q_halt > 0) & (carry.steps >= least) & (carry.steps < cfg.halt_max_steps),
            )


# ---------------------------------------------------------------- the loss


@given(
    generators,
    st.sampled_from(["stablemax", "softmax"]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1e4]),
)
def test_extreme_logits_keep_the_loss_finite(g, loss, published, size):
    labels = torch.randint(0, 12, (4, 9), generator=g)
    labels[torch.rand(4, 9, generator=g) < 0.3] = data.IGNORE
    labels[0] = data.IGNORE
    logits = torch.randint(-1, 2, (4, 9, 12), generator=g) * size
    q = torch.randint(-1, 2, (4,), generator=g) * size
    logits.requires_grad_()
    q.requires_grad_()
    cfg = config(loss=loss, published_halting=published)
    found = act_loss(cfg, Output(logits.flatten(0, 1), q, q.detach()), labels.flatten(), [9] * 4)
    found.total.sum().backward()
    assert all(torch.isfinite(x.float()).all() for x in (*found, logits.grad, q.grad))
    assert (found.lm >= 0).all() and found.lm[0] == 0
    assert not logits.grad[labels == data.IGNORE].any()
    assert not found.exact[0] and not found.labelled[0]
    assert published or q.grad[0] == 0


@given(generators)
@settings(max_examples=25)
def test_the_loss_of_a_slot_is_its_own(g):
    """Scores and gradients of a slot do not know the others; all right is exact."""
    cells = [9, 9, 4, 0, 4]
    labels = torch.randint(-1, 12, (26,), generator=g)
    labels = torch.where(labels < 0, data.IGNORE, labels)
    logits = torch.randn(26, 12, generator=g)
    logits[:9] = torch.nn.functional.one_hot(labels[:9].clamp(min=0), 12) * 9.0
    logits.requires_grad_()
    q = torch.randn(5, generator=g)
    whole = act_loss(config(), Output(logits, q, q), labels, cells)
    assert bool(whole.exact[0]) == bool((labels[:9] >= 0).any())
    owner = torch.arange(5).repeat_interleave(torch.tensor(cells))
    for slot, (x, y) in enumerate(zip(logits.split(cells), labels.split(cells), strict=True)):
        alone = act_loss(config(), Output(x, q[slot : slot + 1], q), y, [len(y)])
        close([v[0].float() for v in alone], [v[slot].float() for v in whole])
        (grad,) = torch.autograd.grad(whole.total[slot], logits, retain_graph=True)
        assert not grad[owner != slot].any()
        assert torch.equal(grad[owner == slot].any(-1), y >= 0)


# ---------------------------------------------------------------- positions and layers


@given(generators)
@settings(max_examples=20)
def test_a_code_of_borders_is_that_of_all_four_distances_and_of_nothing_else(g):
    cfg = config(positions="borders")
    table, at, borders = (
        etrm.init_core(cfg, g).position[cfg.context_tokens :],
        cells_at(6),
        torch.randint(0, 31, (36, 4), generator=g),
    )
    codes = etrm.codes(cfg, table, at, borders)
    assert torch.equal(codes, etrm.codes(cfg, table, at + 3, borders))
    for k in range(4):
        other = borders.clone()
        other[:, k] = (other[:, k] + 1 + torch.randint(0, 30, (36,), generator=g)) % 31
        assert ((etrm.codes(cfg, table, at, other) - codes).abs().amax(1) > 1e-3).all()
    mirrored = etrm.codes(cfg, table, at, borders[:, [0, 3, 2, 1]])
    assert ((mirrored - codes).abs().amax(1) > 1e-3).equal(borders[:, 1] != borders[:, 3])


def cells_at(side):
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


@given(
    generators,
    st.sampled_from(["rope", "rope2d", "learned"]),
    st.integers(0, 20),
    st.integers(0, 20),
)
@settings(max_examples=20)
def test_a_position_is_that_of_the_raster(g, kind, top, left):
    """Whatever the canvas, a token's code is that of its place on the raster, that of a context token its own."""
    cfg = config(positions=kind)
    p, context = etrm.init_core(cfg, g), torch.randn(1, 4, 32, generator=g)
    codes = {}
    for name, at in (("raster", cells_at(30)), ("canvas", cells_at(6) + torch.tensor([top, left]))):
        batch = data.Batch(
            torch.full((len(at),), 5), torch.zeros(len(at)), at, (len(at),), None, at
        )
        e, turn = etrm.place(
            p, cfg, etrm.Context(context), batch, etrm.layout_of(cfg, batch.cells, at.device)
        )
        codes[name] = e if turn is None else torch.cat([x.flatten(1) for x in turn], 1)
    rows = 4 + (cells_at(6) + torch.tensor([top, left])) @ torch.tensor([30, 1])
    assert torch.equal(codes["canvas"], codes["raster"][torch.cat((torch.arange(4), rows))])
    assert len(codes["canvas"].unique(dim=0)) == (40 if kind != "rope2d" else 37)


@given(generators, st.sampled_from(["rope", "rope2d"]))
def test_rotation_keeps_lengths_and_sees_distances_only(g, kind):
    turn = etrm.turn_of(etrm.position_of(kind, cells_at(6), 30), 1, 16, torch.float32)
    qk = torch.randn(36, 2, 1, 16, generator=g)
    scale = torch.tensor([0.25, 1.0])
    close([etrm.rotate(qk, turn).norm(dim=-1)], [qk.norm(dim=-1) * scale[:, None]])
    close([etrm.rotate(qk, None)], [qk * scale[:, None, None]])
    same = etrm.rotate(qk[:1].expand(36, -1, -1, -1), turn)
    dot = torch.einsum("ijd,kld->ijkl", same[:, 0, 0].view(6, 6, 16), same[:, 1, 0].view(6, 6, 16))
    close([dot[:-1, :-1, :-1, :-1]], [dot[1:, 1:, 1:, 1:]], 1e-4)
    assert (dot[0, 0] - dot[0, 0, 0, 0]).flatten()[1:].abs().min() > 0  # no two cells look alike


@given(generators, st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=30))
def test_runs_are_the_slots_in_order(g, slots):
    tokens, masked = [s for s, _ in slots], [int(m) for _, m in slots]
    runs = etrm.runs_of(tokens, masked)
    assert [(s, m) for b, s, m in runs for _ in range(b)] == slots
    assert all(b == 1 << (b.bit_length() - 1) and b * s <= max(s, etrm.RUN) for b, s, _ in runs)


@given(generators, st.integers(2, 6))
@settings(max_examples=20)
def test_attention_stays_within_a_slot(g, slots):
    """Packed and run by run, masked or not, it is what each slot gives alone."""
    tokens = sorted(torch.randint(1, 5, (slots,), generator=g).tolist())
    x, qkv, o = (torch.randn(n, 32, generator=g) / 6 for n in (6 * sum(tokens), 96, 32))
    x = x[: sum(tokens)]
    turn = etrm.turn_of(torch.arange(sum(tokens)), 2, 16, torch.float32)
    seen, masked = torch.rand(sum(tokens), generator=g) < 0.7, [s % 2 for s in tokens]
    got = etrm.self_attention(qkv, o, 2, x, etrm.runs_of(tokens, masked), turn, seen)
    at = 0
    for s, m in zip(tokens, masked, strict=True):
        part = slice(at, at + s)
        alone = etrm.self_attention(
            qkv, o, 2, x[part], [(1, s, bool(m))], (turn[0][part], turn[1][part]), seen[part]
        )
        close([got[part]], [alone])
        at += s


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tables_made_while_evaluating_serve_training(mode):
    etrm.waves.cache_clear()
    w = World(torch.Generator().manual_seed(0), config())
    with mode():
        w.step(w.start())
    params = w.trainable()
    total(w, w.step(w.start(), params)[1]).sum().backward()
    assert leaves(params)["core.blocks.0.qkv"].grad.any()


@given(generators, st.sampled_from([1e-3, 1.0, 1e4]))
def test_rms_norm(g, size):
    x = torch.randn(5, 32, generator=g) * size
    ours, plain, g_out = (
        x.clone().requires_grad_(),
        x.clone().requires_grad_(),
        torch.randn(5, 32, generator=g),
    )
    want = plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close([etrm.rms(ours)], [want])
    got, expected = (
        torch.autograd.grad(etrm.rms(ours), ours, g_out),
        torch.autograd.grad(want, plain, g_out),
    )
    close([got[0] * size], [expected[0] * size], 1e-4)


@given(generators)
def test_swiglu(g):
    x, gate_up, down = (
        torch.randn(*shape, generator=g).requires_grad_() for shape in ((5, 8), (12, 8), (8, 6))
    )
    a, b = (x @ gate_up.T).chunk(2, -1)
    want, got = (torch.nn.functional.silu(a) * b) @ down.T, etrm.swiglu(gate_up, down, x)
    close([got], [want], 1e-4)
    g_out = torch.randn(5, 8, generator=g)
    close(*(torch.autograd.grad(y, (x, gate_up, down), g_out) for y in (got, want)), 1e-4)


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
            close(
                [got[b : b + 1]],
                [etrm.attention(q[b : b + 1], k[b : b + 1, :, seen], v[b : b + 1, :, seen])],
            )
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    close([etrm.attention(q, k, v)], [want])


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("positions", ["rope2d", "learned"])
def test_a_tree_survives_being_taken_apart(encoder, positions):
    cfg = config(encoder, positions=positions, tied_head=positions == "learned", raster=8)
    params = init_params(cfg, 0)
    found = leaves(params)
    again = etrm.rebuild(params, found)
    assert list(leaves(again)) == list(found) and all(
        a is b for a, b in zip(leaves(again).values(), found.values(), strict=True)
    )
    assert type(again) is type(params) and type(again.core.blocks[0]) is etrm.Block
    assert (again.core.head is None) == cfg.tied_head and (again.core.position is None) == (
        positions == "rope2d"
    )
    twice = etrm.tree_map(lambda x: 2 * x, params)
    assert torch.equal(leaves(twice)["core.blocks.0.qkv"], 2 * params.core.blocks[0].qkv)
    assert (
        leaves(params)["encoder.own.input_embed" if "wide" in encoder else "encoder.input_embed"]
        is own(params.encoder).input_embed
    )
    batch = World(torch.Generator().manual_seed(0), config()).batch
    of_demos = [
        f"demos.{k}" for k in ("inputs", "outputs", "at", "owner", "number", "by_slot", "borders")
    ]
    names = ["inputs", "labels", "at", *of_demos, "borders"]
    assert list(leaves(batch)) == names
    moved = etrm.tree_map(lambda x: x + 1, batch)
    assert moved.cells == batch.cells and torch.equal(moved.demos.at, batch.demos.at + 1)


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_parameters_are_a_function_of_the_seed(seed):
    a, b, c = (leaves(init_params(config(), s)) for s in (seed, seed, seed + 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["core.embed"], c["core.embed"])
    drawn = etrm.normal(torch.Generator().manual_seed(seed), 400, 64)
    assert abs(float(drawn.std()) * 8 - 1) < 0.03 and abs(float(drawn.mean())) < 0.005


@pytest.mark.parametrize("positions", ["rope", "rope2d", "learned", "borders", "none"])
@pytest.mark.parametrize("published", [False, True])
def test_every_leaf_that_should_learn_gets_a_gradient(positions, published):
    w = World(
        torch.Generator().manual_seed(1),
        config(
            positions=positions,
            published=published,
            raster=8,
            tied_head=positions == "none",
        ),
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
    carry = fresh_carry(w.cfg, batch.cells, torch.float32, "meta")
    least = torch.zeros(SLOTS, dtype=torch.int64, device="meta")
    for _ in range(2):
        carry, out = w.step(carry, params, batch, least)
    act_loss(w.cfg, out, batch.labels, batch.cells).total.sum().backward()
    assert out.logits.shape == (len(w.batch.inputs), 12)
    assert all(
        x.grad.shape == x.shape for k, x in leaves(params.encoder).items() if x.grad is not None
    )
    assert sum(x.grad is not None for x in leaves(params.encoder).values()) > 5
