"""Agreement with the published code: |a - b| <= 2e-5 (1 + |b|) in float32, integers exact."""

import json
import math

import numpy as np
import pytest
import torch

from etrm_arc import data, etrm
from etrm_arc.config import EncoderConfig
from etrm_arc.data import Batch, Demos
from etrm_arc.encoders import encoder_of
from etrm_arc.etrm import Context, Encode, Output, Params, act_loss, act_step, leaves, tree_map
from etrm_arc.tests.published import by_path, config, core, encoder, sub, tree


def close(ours, theirs, tolerance=2e-5):
    a, b = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
    assert a.shape == b.shape
    assert ((a - b).abs() / (1 + b.abs())).max() <= tolerance


def places(n, cells):
    """(n * cells, 2) row and column of every cell of n square canvases."""
    side = torch.arange(math.isqrt(cells))
    return torch.cartesian_prod(side, side).repeat(n, 1)


def batch_of(inputs, labels, demos=None):
    n, cells = inputs.shape
    x, y = inputs.long().flatten(), labels.long().flatten()
    return Batch(x, y, places(n, cells), (cells,) * n, demos)


def all_demos(inputs, outputs, mask):
    """Demos (B, K, cells) of which those of the mask (B, K) are there."""
    owner, number = torch.nonzero(mask, as_tuple=True)
    n, cells = len(owner), inputs.shape[-1]
    x, y = (t[owner, number].long().flatten() for t in (inputs, outputs))
    return Demos(x, y, places(n, cells), (cells,) * n, owner, number, mask.shape[1],
                 torch.arange(len(x)), tuple((mask.sum(1) * cells).tolist()))  # fmt: skip


def rows_loss(cfg, logits, q, labels, kl=None):
    out, cells = Output(logits.flatten(0, 1), q, kl), [labels.shape[1]] * len(labels)
    return act_loss(cfg, out, labels.long().flatten(), cells)


def taken(p, cfg, context, carry, batch, least=None):
    encode = Encode(lambda *_: Context(context))
    return act_step(Params((), p), cfg, encode, carry, batch, least)


def grad_tree(tree):
    return tree_map(lambda x: x.clone().requires_grad_(), tree)


def published_sums(loss, steps, v):
    means = {"accuracy": loss.cell_accuracy, "exact_accuracy": loss.exact}
    means |= {"q_halt_accuracy": loss.q_right, "steps": steps}
    sums = {"total_loss": loss.total, "lm_loss": loss.lm, "q_halt_loss": loss.q, "count": v}
    return {k: x.sum() for k, x in (sums | {k: x[v] for k, x in means.items()}).items()}


def test_core(golden):
    t, _ = golden("trm_core")
    sd, cfg, context = sub(t, "sd.inner."), config(), t["context"].clone().requires_grad_()
    p, batch = grad_tree(core(sd)), batch_of(t["batch.inputs"], t["batch.labels"])
    layout = etrm.layout_of(cfg, batch.cells, context.device)
    embedded = etrm.embed_input(p, cfg, Context(context), batch, layout)[0]
    close(embedded, t["input_embeddings"].flatten(0, 1))
    carry = etrm.fresh_carry(cfg, batch.cells, torch.float32)
    for step in (1, 2, 3):
        carry, out = taken(p, cfg, context, carry, batch)
        close(carry.z_H.view(4, 52, 64), t[f"step{step}.z_H"])
        close(carry.z_L.view(4, 52, 64), t[f"step{step}.z_L"])
        close(out.logits, t[f"step{step}.logits"].flatten(0, 1))
        close(out.q_halt, t[f"step{step}.q_halt_logits"])
        q = carry.z_H.view(4, 52, 64)[:, 0] @ p.q_weight.T + p.q_bias
        close(q[:, 1], t[f"step{step}.q_continue_logits"])
        if step == 1:
            loss = act_loss(cfg, out, batch.labels, batch.cells).total.sum()
            close(loss, t["loss.total"])
            (loss / 4).backward()
    norms, grads = (by_path(sub(t, f"{k}.inner."), "inner.") for k in ("gradnorm", "grad"))
    checked = {k: x for k, x in leaves(p, "core").items() if k in norms}
    assert len(checked) == 12
    for path, leaf in checked.items():
        close(leaf.grad.norm(), norms[path])
        if path in grads:
            close(leaf.grad, grads[path])
    close(context.grad.flatten(1), t["grad.inner.puzzle_emb.local_weights"])


@pytest.mark.parametrize("name", ["trm", "etrm_train", "etrm_train_kl", "etrm_eval"])
def test_act_loss(golden, name):
    t, _ = golden("act_loss")
    logits, q = t["logits"].clone().requires_grad_(), t["q_halt_logits"].clone().requires_grad_()
    kl = torch.full((len(q),), 7.25, requires_grad=True) if name == "etrm_train_kl" else None
    cfg = config(encoder=EncoderConfig(kl_weight=0.01))
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


def test_softmax_loss(golden):
    t, _ = golden("act_loss")
    mean = t["softmax_ce_per_token"].sum(-1) / t["row.loss_counts"].clamp(min=1)
    close(rows_loss(config(loss="softmax"), t["logits"], t["q_halt_logits"], t["labels"]).lm, mean)


def test_act_trace(golden):
    """Carry, reset, exploration and halting over eight steps, a new batch offered at each."""
    t, _ = golden("trm_act_trace")
    weights = golden("trm_core")[0]
    cfg = config()
    sd = sub(weights, "sd.inner.")
    p = core({**sd, "q_head.bias": t["sd_override.inner.q_head.bias"]})
    table, carry, data_now = sd["puzzle_emb.weights"], None, None
    for i in range(8):
        offered = sub(t, f"t{i}.batch.")
        carry = carry or etrm.fresh_carry(cfg, [36] * len(offered["inputs"]), torch.float32)
        data_now = data_now or offered
        data_now = {
            k: torch.where(carry.halted.view(-1, *[1] * (v.ndim - 1)), v, data_now[k])
            for k, v in offered.items()
        }
        assert torch.equal(data_now["puzzle_identifiers"], t[f"t{i}.used.puzzle_identifiers"])
        context = table[data_now["puzzle_identifiers"].long()].view(-1, 16, 64)
        least = (t[f"t{i}.rand"] < cfg.exploration) * t[f"t{i}.randint"]
        batch = batch_of(data_now["inputs"], data_now["labels"])
        carry, out = taken(p, cfg, context, carry, batch, least)
        assert torch.equal(carry.halted, t[f"t{i}.halted"])
        assert torch.equal(carry.steps.int(), t[f"t{i}.steps"].int())
        close(out.logits, t[f"t{i}.logits"].flatten(0, 1))
        close(out.q_halt, t[f"t{i}.q_halt_logits"])
        loss = act_loss(cfg, out, batch.labels, batch.cells)
        for key, value in published_sums(loss, carry.steps, loss.labelled & carry.halted).items():
            close(value, t[f"t{i}.loss." + ("total" if key == "total_loss" else key)])
    close(carry.z_H.view_as(t["final.z_H"]), t["final.z_H"])
    batch = batch_of(t["t0.batch.inputs"], t["t0.batch.labels"])
    context = Context(table[t["t0.batch.puzzle_identifiers"].long()].view(-1, 16, 64))
    out, _ = etrm.think(Params((), p), cfg, Encode(lambda *_: context), batch, torch.float32, 4)
    close(out.q_halt, t["eval.s4.q_halt_logits"])
    close(out.logits, t["eval.logits"].flatten(0, 1))


def encoder_config(kind="standard", **options):
    return config(hidden=32, H_cycles=1, encoder=EncoderConfig(kind=kind, **options))


def context_of(p, cfg, demos, noise=None):
    batch = batch_of(demos[0][:, 0], demos[1][:, 0], all_demos(*demos))
    return encoder_of(cfg).read(p, batch._replace(noise=noise))


def golden_demos(golden):
    inputs = golden("enc_inputs")[0]
    return [inputs[k] for k in ("demo_inputs", "demo_labels", "demo_mask")]


@pytest.mark.parametrize("pooling", ["", "lpn_", "hybrid_"])
@pytest.mark.parametrize("latent", ["standard", "variational"])
def test_encoders(golden, pooling, latent):
    """Context, KL and gradients at evaluation; the same with the noise drawn in training."""
    (t, _), cfg = golden(f"enc_{pooling}{latent}"), encoder_config(pooling + latent)
    p, demos = grad_tree(encoder(sub(t, "sd."), cfg)), golden_demos(golden)
    context = context_of(p, cfg, demos)
    close(context.tokens, t["eval.context"])
    loss = (context.tokens * t["gradprobe.W"]).sum()
    if context.kl is not None:
        close(context.kl.mean(), t["eval.kl_loss"])
        loss = loss + 0.01 * context.kl.mean()
    close(loss, t["gradprobe.scalar"])
    loss.backward()
    norms = sub(t, "gradprobe.norm.")
    for path, norm in by_path(norms, "encoder.").items():
        close(leaves(p, "encoder")[path].grad.norm(), norm)
    if "train.eps" in t:
        noise = t["train.eps"] if t["train.eps"].ndim == 3 else t["train.eps"][:, None]
        context = context_of(p, cfg, demos, noise)
        close(context.tokens, t["train.context"])
        close(context.kl.mean(), t["train.kl_loss"])


@pytest.mark.parametrize(
    "variant", ["pre", "layerscale", "pre_layerscale", "attnpool", "set2", "weightedpool"]
)
def test_standard_options(golden, variant):
    t, meta = golden("enc_standard_options")
    names = dict(norm_style="norm", layer_scale_init="layer_scale", pooling_method="pooling",
                 set_encoder_layers="set_layers")  # fmt: skip
    options = {names[k]: v for k, v in json.loads(meta["variants"])[variant].items()}
    sd = {**sub(golden("enc_standard")[0], "sd."), **sub(t, f"{variant}.sd.")}
    cfg, demos = encoder_config(**options), golden_demos(golden)
    want = t[f"{variant}.eval.context"]
    if variant == "weightedpool":  # published: NaN wherever a demo is padded, so one demo each
        demos = [x[:, :1] for x in demos]
        want = t["weightedpool.eval.context_first_demo_only"]
    close(context_of(encoder(sd, cfg), cfg, demos).tokens, want)


@pytest.mark.parametrize("kind", ["recurrent", "trm_style"])
def test_recurrent_encoders(golden, kind):
    """Three ACT steps; one slot begins anew in the third."""
    t, _ = golden("enc_recurrent_standard" if kind == "recurrent" else "enc_trm_style")
    states = ("z_e",) if kind == "recurrent" else ("z_e_H", "z_e_L")
    cfg = encoder_config(kind, set_layers=len(states), H_cycles=len(states))
    p, encode = encoder(sub(t, "sd."), cfg), encoder_of(cfg)
    read = context_of(p, cfg, golden_demos(golden))
    z_E = torch.stack([t[f"carry0.{k}"] for k in states], 1)
    for step in (1, 2, 3):
        context = encode.recur(p, read, z_E, t[f"step{step}.reset_in"])
        z_E = context.z_E
        close(context.tokens, t[f"step{step}.context"])
        close(z_E, torch.stack([t[f"step{step}.{k}"] for k in states], 1))


def test_gradients_of_the_whole(golden):
    t, _ = golden("etrm_grad")
    cfg = config(encoder=EncoderConfig(kind="standard"))
    demos = all_demos(t["batch.demo_inputs"], t["batch.demo_labels"], t["batch.demo_mask"])
    batch = batch_of(t["batch.inputs"], t["batch.labels"], demos)
    carry, sd = etrm.fresh_carry(cfg, batch.cells, torch.float32), sub(t, "sd.")
    for step in (1, 2):
        p = grad_tree(tree(sd, cfg))
        least = (t[f"step{step}.rand"] < cfg.exploration) * t[f"step{step}.randint"]
        carry, out = act_step(p, cfg, encoder_of(cfg), carry, batch, least)
        loss = act_loss(cfg, out, batch.labels, batch.cells).total.sum()
        close(loss, t[f"step{step}.total_loss"])
        (loss / 4).backward()
        assert torch.equal(carry.halted, t[f"step{step}.halted"])
        close(out.logits, t[f"step{step}.logits"].flatten(0, 1))
        norms = by_path(sub(t, f"step{step}.gradnorm."))
        assert len(norms) == len(leaves(p)) - 2
        for path, norm in norms.items():
            close(leaves(p)[path].grad.norm(), norm)
        grads = by_path(sub(t, f"step{step}.grad."))
        assert len(grads) == (len(sub(t, "step1.grad.")) if step == 1 else 0)
        for path, grad in grads.items():
            close(leaves(p)[path].grad, grad)


def test_tokens_offsets_and_crops(golden):
    t, _ = golden("data")
    keys = [k.removesuffix(".input") for k in t if k.startswith("task.") and k.endswith(".input")]
    assert len(keys) > 8
    for key in keys:
        pair = tuple(t[f"{key}.{side}"].numpy() for side in ("input", "output"))
        offset = tuple(t[f"{key}.shift_rc"].tolist())
        room = t[f"{key}.shift_rc_exclusive_max"].double()
        shift, canvas = (t[f"{key}.shift_rc"] + 0.5) / room, torch.tensor([[30, 30]])
        packed = data.pack([data.Task("x", [pair], [])])
        painted = data.paint(packed, torch.tensor([0]), data.identity(1), shift[None], canvas)
        for grid, side, tokens in zip(pair, ("in", "out"), painted[:2], strict=True):
            plain, moved = (t[f"{key}.{name}_{side}"] for name in ("seq", "shifted_seq"))
            assert np.array_equal(data.tokenise(grid, (30, 30)).ravel(), plain)
            assert np.array_equal(data.tokenise(grid, (30, 30), offset).ravel(), moved)
            assert torch.equal(tokens, moved.long())
        cropped = data.crop(t[f"{key}.seq_in"].view(30, 30).numpy())
        assert np.array_equal(cropped, t[f"{key}.crop_seq_in"])
    for i in range(7):
        got, shape = data.crop(t[f"crop{i}.seq"].view(30, 30).numpy()), t[f"crop{i}.shape"].tolist()
        assert got.size == math.prod(shape)
        if got.size:
            assert np.array_equal(got, t[f"crop{i}.grid"])


def test_symmetries(golden):
    t, meta = golden("data")
    grid = t["dihedral.grid"].numpy()
    for k in range(8):
        assert np.array_equal(data.turn(k, grid), t[f"dihedral.t{k}"])
    assert torch.equal(data.INVERSE, t["dihedral.inverse"].long())
    for i, name in enumerate(json.loads(meta["aug.names"])):
        _, turn, colours, *_ = f"{name}|||t0|||0123456789".split("|||")  # task|||t3|||0213456789
        s = data.Symmetry(torch.tensor(int(turn[1:])), torch.tensor([int(c) for c in colours]))
        assert np.array_equal(data.apply(s, t["aug.grid"].numpy()), t[f"aug{i}.result"])
