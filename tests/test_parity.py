"""Agreement with the published code: |a - b| <= 2e-5 (1 + |b|) in float32, integers exact."""

import math

import numpy as np
import pytest
import torch

from etrm_arc import data, etrm
from etrm_arc.config import EncoderConfig
from etrm_arc.data import Batch, Demos
from etrm_arc.encoders import encoder_of
from etrm_arc.etrm import (
    Context,
    Encode,
    Output,
    Params,
    act_loss,
    act_step,
    fresh_carry,
    leaves,
    tree_map,
)
from etrm_arc.tests.published import config, core, standard, sub


def close(ours, theirs, tolerance=2e-5):
    a, b = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
    assert a.shape == b.shape
    assert ((a - b).abs() / (1 + b.abs())).max() <= tolerance


def places(n, side=6):
    """(n * side * side, 2) row and column of every cell of n square canvases."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).repeat(n, 1)


def batch_of(inputs, labels, demos=None):
    return Batch(
        inputs.long().flatten(),
        labels.long().flatten(),
        places(len(inputs), math.isqrt(inputs.shape[1])),
        (inputs.shape[1],) * len(inputs),
        demos,
        torch.zeros(inputs.numel(), 4, dtype=torch.int64),
    )


def all_demos(inputs, outputs, mask):
    owner, place = torch.nonzero(mask, as_tuple=True)
    x, y, cells = inputs[owner, place].long(), outputs[owner, place].long(), inputs.shape[-1]
    return Demos(
        x.flatten(), y.flatten(), places(len(x), math.isqrt(cells)), (cells,) * len(x), (1,) * len(x), owner, place, mask.shape[1],
        torch.arange(x.numel()), tuple((mask.sum(1) * cells).tolist()), torch.zeros(x.numel(), 4, dtype=torch.int64),
    )  # fmt: skip


def rows_loss(cfg, logits, q, labels, kl=None):
    """Of a table of equally long rows."""
    return act_loss(
        cfg,
        Output(logits.flatten(0, 1), q, q, kl),
        labels.long().flatten(),
        [labels.shape[1]] * len(labels),
    )


def published_sums(loss, steps, counted):
    v = counted
    return {
        "total_loss": loss.total.sum(),
        "lm_loss": loss.lm.sum(),
        "q_halt_loss": loss.q.sum(),
        "count": v.sum(),
        "accuracy": loss.cell_accuracy[v].sum(),
        "exact_accuracy": loss.exact[v].sum(),
        "q_halt_accuracy": loss.q_right[v].sum(),
        "steps": steps[v].sum(),
    }


def test_core(golden):
    t, _ = golden("trm_core")
    cfg, p = config(), tree_map(lambda x: x.clone().requires_grad_(), core(sub(t, "sd.inner.")))
    context = t["context"].clone().requires_grad_()
    batch = batch_of(t["batch.inputs"], t["batch.labels"])
    layout = etrm.layout_of(cfg, batch.cells, context.device)
    close(
        etrm.embed_input(p, cfg, etrm.Context(context), batch, layout)[0],
        t["input_embeddings"].flatten(0, 1),
    )
    carry = fresh_carry(cfg, batch.cells, torch.float32)
    for step in (1, 2, 3):
        carry, out = act_step(
            Params((), p), cfg, Encode(lambda *_: Context(context)), carry, batch, None
        )
        close(carry.z_H.view(4, 52, 64), t[f"step{step}.z_H"])
        close(carry.z_L.view(4, 52, 64), t[f"step{step}.z_L"])
        close(out.logits, t[f"step{step}.logits"].flatten(0, 1))
        close(out.q_halt, t[f"step{step}.q_halt_logits"])
        close(out.q_continue, t[f"step{step}.q_continue_logits"])
        if step == 1:
            loss = act_loss(cfg, out, batch.labels, batch.cells).total.sum()
            close(loss, t["loss.total"])
            (loss / 4).backward()
    ours = {k.replace("blocks", "L_level.layers"): v.grad for k, v in leaves(p).items()}
    names = {
        "qkv": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    }
    checked = 0
    for name, grad in ours.items():
        head, _, last = name.rpartition(".")
        theirs = f"{head}.{names[last]}.weight" if last in names else {
            "embed": "embed_tokens.embedding_weight", "head": "lm_head.weight",
            "q_weight": "q_head.weight", "q_bias": "q_head.bias"}.get(last)  # fmt: skip
        if theirs:
            close(grad.norm(), t[f"gradnorm.inner.{theirs}"])
            checked += 1
            if f"grad.inner.{theirs}" in t:
                close(grad, t[f"grad.inner.{theirs}"])
    assert checked == 12
    close(context.grad.flatten(1), t["grad.inner.puzzle_emb.local_weights"])


@pytest.mark.parametrize("name", ["trm", "etrm_train", "etrm_train_kl", "etrm_eval"])
def test_act_loss(golden, name):
    t, _ = golden("act_loss")
    logits, q = t["logits"].clone().requires_grad_(), t["q_halt_logits"].clone().requires_grad_()
    kl = torch.full((len(q),), 7.25, requires_grad=True) if name == "etrm_train_kl" else None
    cfg = config(encoder=EncoderConfig(kind="variational", kl_weight=0.01))
    loss = rows_loss(cfg, logits, q, t["labels"], kl)
    counted = loss.labelled if "train" in name else loss.labelled & t["halted"]
    steps = t["steps"]
    for key, value in published_sums(loss, steps, counted).items():
        if key == "steps" and "train" in name:
            value = steps.sum()  # published: also of rows without a label
        close(value, t[f"{name}.{key}"])
    loss.total.sum().backward()
    close(logits.grad, t[f"{name}.grad_logits"])
    close(q.grad, t[f"{name}.grad_q_halt_logits"])
    if kl is not None:  # published: a mean over the batch already, here a number for each row
        close(loss.kl.mean(), t[f"{name}.kl_loss"])
        close(kl.grad.sum(), t[f"{name}.grad_kl"])


def test_unlabelled_row_trains_no_head_by_default(golden):
    t, _ = golden("act_loss")
    q = t["q_halt_logits"].clone().requires_grad_()
    cfg = config(published_faults=False)
    loss = rows_loss(cfg, t["logits"], q, t["labels"])
    loss.total.sum().backward()
    assert q.grad[2] == 0 and (q.grad[[0, 1, 3, 4, 5, 6]] != 0).all()


def test_loss_pieces(golden):
    t, _ = golden("act_loss")
    close(
        torch.log_softmax(etrm.log_stable(t["log_stablemax.x"].float()), -1), t["log_stablemax.y"]
    )
    close(etrm.log_stable(t["s.x"].float()).exp(), t["s.y"])
    mean = t["softmax_ce_per_token"].sum(-1) / t["row.loss_counts"].clamp(min=1)
    close(rows_loss(config(loss="softmax"), t["logits"], t["q_halt_logits"], t["labels"]).lm, mean)


def test_act_trace(golden):
    """Carry, reset, exploration and halting over eight steps in which a new batch is offered at each."""
    t, _ = golden("trm_act_trace")
    weights = golden("trm_core")[0]
    cfg = config()
    sd = sub(weights, "sd.inner.")
    p = core({**sd, "q_head.bias": t["sd_override.inner.q_head.bias"]})
    table, carry, data_now = sd["puzzle_emb.weights"], None, None
    for i in range(8):
        offered = sub(t, f"t{i}.batch.")
        carry = carry or fresh_carry(cfg, [36] * len(offered["inputs"]), torch.float32)
        data_now = data_now or offered
        data_now = {
            k: torch.where(carry.halted.view(-1, *[1] * (v.ndim - 1)), v, data_now[k])
            for k, v in offered.items()
        }
        assert torch.equal(data_now["puzzle_identifiers"], t[f"t{i}.used.puzzle_identifiers"])
        context = table[data_now["puzzle_identifiers"].long()].view(-1, 16, 64)
        least = (t[f"t{i}.rand"] < cfg.exploration) * t[f"t{i}.randint"]
        batch = batch_of(data_now["inputs"], data_now["labels"])
        carry, out = act_step(
            Params((), p), cfg, Encode(lambda *_, c=context: Context(c)), carry, batch, least
        )
        assert torch.equal(carry.halted, t[f"t{i}.halted"])
        assert torch.equal(carry.steps.int(), t[f"t{i}.steps"].int())
        close(out.logits, t[f"t{i}.logits"].flatten(0, 1))
        close(out.q_halt, t[f"t{i}.q_halt_logits"])
        loss = act_loss(cfg, out, batch.labels, batch.cells)
        for key, value in published_sums(loss, carry.steps, loss.labelled & carry.halted).items():
            close(value, t[f"t{i}.loss." + ("total" if key == "total_loss" else key)])
    close(carry.z_H.view_as(t["final.z_H"]), t["final.z_H"])

    batch = batch_of(t["t0.batch.inputs"], t["t0.batch.labels"])
    context = table[t["t0.batch.puzzle_identifiers"].long()].view(-1, 16, 64)
    carry = fresh_carry(cfg, batch.cells, torch.float32)
    for n in range(1, 5):
        carry, out = act_step(
            Params((), p), cfg, Encode(lambda *_: Context(context)), carry, batch, None
        )
        close(out.q_halt, t[f"eval.s{n}.q_halt_logits"])
        assert bool(carry.halted.all()) == (n == 4)
    close(out.logits, t["eval.logits"].flatten(0, 1))


def encoder_config(kind="standard", **options):
    return config(hidden=32, H_cycles=1, encoder=EncoderConfig(kind=kind, **options))


def asked(inputs, outputs, mask, noise=None):
    """A batch of demos alone."""
    return batch_of(inputs[:, 0], outputs[:, 0], all_demos(inputs, outputs, mask))._replace(
        noise=noise
    )


def context_of(p, cfg, batch):
    return encoder_of(cfg).read(p, batch)


def published_encoder(golden, name):
    """(golden, kind, config, our tree, demos)"""
    t, inputs = golden(f"enc_{name}")[0], golden("enc_inputs")[0]
    demos = [inputs[k] for k in ("demo_inputs", "demo_labels", "demo_mask")]
    return t, encoder_config(name), standard(sub(t, "sd.")), demos


VARIATIONAL = ["variational", "lpn_variational", "hybrid_variational"]


@pytest.mark.parametrize("name", ["standard", "lpn_standard", "hybrid_standard", *VARIATIONAL])
def test_encoders(golden, name):
    """Context, KL and gradients at evaluation; the same with the noise that was drawn in training."""
    t, cfg, tree, demos = published_encoder(golden, name)
    p = tree_map(lambda x: x.clone().requires_grad_(), tree)
    found = context_of(p, cfg, asked(*demos))
    close(found.tokens, t["eval.context"])
    loss = (found.tokens * t["gradprobe.W"]).sum()
    if found.kl is not None:
        close(found.kl.mean(), t["eval.kl_loss"])
        loss = loss + 0.01 * found.kl.mean()
    close(loss, t["gradprobe.scalar"])
    loss.backward()
    norms = sub(t, "gradprobe.norm.")
    ours, theirs = leaves(p), leaves(standard(norms))
    assert len(theirs) == len(norms)
    for leaf, norm in theirs.items():
        close(ours[leaf].grad.norm(), norm)
    if "train.eps" in t:
        eps = t["train.eps"] if t["train.eps"].ndim == 3 else t["train.eps"][:, None]
        with torch.no_grad():
            found = context_of(p, cfg, asked(*demos, noise=eps))
        close(found.tokens, t["train.context"])
        close(found.kl.mean(), t["train.kl_loss"])


@pytest.mark.parametrize(
    "variant", ["pre", "layerscale", "pre_layerscale", "attnpool", "set2", "weightedpool"]
)
def test_standard_options(golden, variant):
    t, meta = golden("enc_standard_options")
    names = {
        "norm_style": "norm",
        "layer_scale_init": "layer_scale",
        "pooling_method": "pooling",
        "set_encoder_layers": "set_layers",
    }
    options = {names[k]: v for k, v in meta["variants"][variant].items()}
    sd = {**sub(golden("enc_standard")[0], "sd."), **sub(t, f"{variant}.sd.")}
    p = standard(sd, options.get("set_layers", 1))
    inputs, outputs, mask = golden("enc_inputs")[0].values()
    want = t[f"{variant}.eval.context"]
    if variant == "weightedpool":  # published: NaN wherever a demo is padded, so one demo each
        inputs, outputs, mask = inputs[:, :1], outputs[:, :1], mask[:, :1]
        want = t["weightedpool.eval.context_first_demo_only"]
    close(context_of(p, encoder_config(**options), asked(inputs, outputs, mask)).tokens, want)


def test_no_demo_gives_the_published_context(golden):
    p = standard(sub(golden("enc_standard")[0], "sd."))
    context = context_of(
        p, encoder_config(), asked(*(x[:1] * 0 for x in golden("enc_inputs")[0].values()))
    ).tokens
    close(context, golden("enc_standard_options")[0]["nodemos.standard.context"])


@pytest.mark.parametrize("kind", ["recurrent", "trm_style"])
def test_recurrent_encoders(golden, kind):
    """Three ACT steps; one slot begins anew in the third. Published: no parameter gets a gradient, by default: every one."""
    t, _ = golden("enc_recurrent_standard" if kind == "recurrent" else "enc_trm_style")
    batch = asked(*golden("enc_inputs")[0].values())
    states = ("z_e",) if kind == "recurrent" else ("z_e_H", "z_e_L")
    for published in (True, False):
        e = EncoderConfig(kind=kind, set_layers=len(states), H_cycles=len(states))
        encode = encoder_of(config(hidden=32, encoder=e, published_faults=published))
        p = tree_map(lambda x: x.clone().requires_grad_(), standard(sub(t, "sd.")))
        z_E = torch.stack([t[f"carry0.{k}"] for k in states], 1)
        for step in (1, 2, 3):
            context = encode.recur(
                p, encode.read(p, batch), z_E.detach(), t[f"step{step}.reset_in"]
            )
            z_E = context.z_E
            if published:
                close(context.tokens, t[f"step{step}.context"])
                close(z_E, torch.stack([t[f"step{step}.{k}"] for k in states], 1))
        assert context.tokens.requires_grad != published
    (context.tokens * torch.randn(context.tokens.shape)).sum().backward()
    assert all(v.grad.any() for v in leaves(p).values())


def test_gradients_of_the_whole(golden):
    t, _ = golden("etrm_grad")
    cfg = config(encoder=EncoderConfig(kind="standard"))
    demos = all_demos(t["batch.demo_inputs"], t["batch.demo_labels"], t["batch.demo_mask"])
    batch = batch_of(t["batch.inputs"], t["batch.labels"], demos)
    build = lambda sd: Params(standard(sub(sd, "encoder.")), core(sub(sd, "inner.")))  # noqa: E731
    carry = fresh_carry(cfg, batch.cells, torch.float32)
    for step in (1, 2):
        p = tree_map(lambda x: x.clone().requires_grad_(), build(sub(t, "sd.")))
        least = (t[f"step{step}.rand"] < cfg.exploration) * t[f"step{step}.randint"]
        carry, out = act_step(p, cfg, encoder_of(cfg), carry, batch, least)
        loss = act_loss(cfg, out, batch.labels, batch.cells).total.sum()
        close(loss, t[f"step{step}.total_loss"])
        (loss / 4).backward()
        assert torch.equal(carry.halted, t[f"step{step}.halted"])
        close(out.logits, t[f"step{step}.logits"].flatten(0, 1))
        wanted = sub(t, f"step{step}.gradnorm.")
        norms = build({**dict.fromkeys(("inner.H_init", "inner.L_init"), None), **wanted})
        for path, leaf in leaves(p).items():
            if path in leaves(norms):
                close(leaf.grad.norm(), leaves(norms)[path])
        assert len(leaves(norms)) == len(leaves(p)) - 2
        if step == 1:
            given = sub(t, "step1.grad.")
            names = dict.fromkeys(sub(t, "sd."))
            grads = leaves(build({**names, **given}))
            assert len(grads) == len(given)
            for path, grad in grads.items():
                close(leaves(p)[path].grad, grad)


def test_tokens_and_offsets(golden):
    t, _ = golden("data")
    checked = 0
    for key in [
        k.removesuffix(".input") for k in t if k.startswith("task.") and k.endswith(".input")
    ]:
        pair = [t[f"{key}.{side}"].numpy() for side in ("input", "output")]
        for grid, side in zip(pair, ("in", "out"), strict=True):
            assert np.array_equal(data.tokenise(grid, (30, 30)).ravel(), t[f"{key}.seq_{side}"])
            offset = tuple(t[f"{key}.shift_rc"].tolist())
            assert np.array_equal(
                data.tokenise(grid, (30, 30), offset).ravel(), t[f"{key}.shifted_seq_{side}"]
            )
        assert np.array_equal(
            data.crop(t[f"{key}.seq_in"].view(30, 30).numpy()), t[f"{key}.crop_seq_in"]
        )
        packed = data.pack([data.Task("x", [tuple(pair)], [])])
        room = t[f"{key}.shift_rc_exclusive_max"].double()
        shift = (t[f"{key}.shift_rc"].double() + 0.5) / room
        painted = data.paint(
            packed, torch.tensor([0]), data.identity(1), shift[None], torch.tensor([[30, 30]])
        )[:2]
        for tokens, side in zip(painted, ("in", "out"), strict=True):
            assert torch.equal(tokens, t[f"{key}.shifted_seq_{side}"].long())
        checked += 1
    assert checked > 8


def test_symmetries(golden):
    t, meta = golden("data")
    grid = t["dihedral.grid"].numpy()
    for k in range(8):
        s = data.identity()._replace(dihedral=torch.tensor(k))
        assert np.array_equal(data.apply(s, grid), t[f"dihedral.t{k}"])
    assert torch.equal(data.INVERSE, t["dihedral.inverse"].long())
    assert torch.equal(data.COMPOSE, t["dihedral.compose_i_then_j"].long())
    for i, name in enumerate(meta["aug.names"]):
        _, turn, colours = name.split("|||")
        s = data.Symmetry(torch.tensor(int(turn[1:])), torch.tensor([int(c) for c in colours]))
        assert np.array_equal(data.apply(s, t["aug.grid"].numpy()), t[f"aug{i}.result"])


def test_a_built_data_set(golden):
    """Three tasks with three augmentations each: every example painted where it lies, under the symmetry of its identifier."""
    t, meta = golden("data")
    names, seen = ["007bbfb7", "0934a4d8", "AboveBelow1"], []

    def pairs(start):
        keys = sorted(k[:-6] for k in t if k.startswith(start) and k.endswith(".input"))
        return [(t[f"{k}.input"].numpy(), t[f"{k}.output"].numpy()) for k in keys]

    tasks = data.pack(
        [data.Task(n, pairs(f"task.{n}.train"), pairs(f"task.{n}.test")) for n in names]
    )
    for split in ("train", "test"):
        built = sub(t, f"built.{split}.")
        for i, (start, end) in zip(
            built["puzzle_identifiers"],
            built["puzzle_indices"].unfold(0, 2, 1).tolist(),
            strict=True,
        ):
            name, turn, colours, *_ = (
                f"{meta['built.identifiers.json'][i]}|||t0|||0123456789".split("|||")
            )
            k, n = names.index(name), end - start
            pair = torch.arange(tasks.first[k], tasks.first[k + 1])
            if meta[name] == "evaluation":  # its demos are trained on, the others are asked
                pair = pair.tensor_split([tasks.n_demos[k]])[split == "test"]
            s = data.Symmetry(
                torch.tensor([int(turn[1:])] * n), torch.tensor([[int(c) for c in colours]] * n)
            )
            inputs, labels = (built[side][start:end].long() for side in ("inputs", "labels"))
            grid = inputs.view(n, 30, 30) >= data.FIRST_COLOUR
            corner = torch.stack([grid.any(axis).int().argmax(1) for axis in (2, 1)], 1)
            room = 31 - data.turned_size(s.dihedral[:, None], tasks.grids[pair, :, 1:]).amax(1)
            painted = data.paint(
                tasks, pair, s, (corner + 0.5).double() / room, torch.full((n, 2), 30)
            )
            assert torch.equal(painted[0], inputs.flatten()) and torch.equal(
                painted[1], labels.flatten()
            )
            seen += [int(i)] * n
    assert len(seen) == 68 and set(seen) == set(range(1, 13))


def test_crop(golden):
    t, _ = golden("data")
    for i in range(7):
        got = data.crop(t[f"crop{i}.seq"].view(30, 30).numpy())
        assert list(got.shape) == t[f"crop{i}.shape"].tolist() or got.size == 0 == math.prod(
            t[f"crop{i}.shape"].tolist()
        )
        if got.size:
            assert np.array_equal(got, t[f"crop{i}.grid"])
