"""What the demos propose for each cell of the test input by hard attention alone; nothing here is learned.

An expert looks through one sight (sights.py) and says of a cell what the demos' cells had that looked alike through it. Experts are
weighed by how well each foretells every demo from the others (a Bayesian mixture), the best few are heard, and in a second round
they start from the first round's answer instead of the input. Axes as in sights.py; d: M_d cells of all demos of the slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .data import FIRST_COLOUR, PAD, Batch
from .sights import SIGHTS, TOKENS, sights

ROUNDS, HEARD = 2, 4  # rounds; experts heard in each
SHARP = 60.0  # weight of an expert: exp(SHARP * its mean log-likelihood of a demo's cell, foretold from the other demos)
UNSEEN = 0.2  # cells' worth of doubt in every count
SLOTS = 16  # at once: a table of counts has K * 144 * 12 numbers a demo


class Kind(NamedTuple):
    """What of a cell's own token and of what it sees an expert goes by, and which classes of answers it counts."""

    keys: int
    doubt: tuple[float, ...]  # the classes' prior: a token of the class "another" is any of the rest
    key: Callable[[Tensor, Tensor], Tensor]  # own, seen -> 0 .. keys - 1
    class_of: Callable[[Tensor, Tensor, Tensor], Tensor]  # own, seen, output -> 0 .. classes - 1


def blind(x: Tensor) -> Tensor:
    """Nothing, the end, black, a colour."""
    return x.clamp(max=FIRST_COLOUR + 1)


EACH = (1 / TOKENS,) * TOKENS
KINDS = (
    Kind(2, (11 / 12, 1 / 12), lambda own, seen: (seen == PAD).long(), lambda own, seen, y: (seen == y).long()),
    Kind(TOKENS, EACH, lambda own, seen: seen, lambda own, seen, y: y.expand_as(seen)),
    Kind(TOKENS**2, EACH, lambda own, seen: own * TOKENS + seen, lambda own, seen, y: y.expand_as(seen)),
    Kind(
        32, (10 / 12, 1 / 12, 1 / 12), lambda own, seen: (blind(own) * 4 + blind(seen)) * 2 + (own == seen),
        lambda own, seen, y: torch.where(seen == y, 2, (own == y).long()),
    ),
    Kind(
        4 * TOKENS, (1 / (TOKENS + 1),) * (TOKENS + 1), lambda own, seen: blind(own) * TOKENS + seen,
        lambda own, seen, y: torch.where(own == y, TOKENS, y).expand_as(seen),
    ),
)  # fmt: skip


def told(kind: Kind, p: Tensor, own: Tensor, seen: Tensor) -> Tensor:
    """(M, classes) to (M, V): what is told of classes, told of tokens; "another" may also be those that have a class of their own."""
    if len(kind.doubt) >= TOKENS:
        return p[:, :TOKENS].scatter_add(1, own[:, None], p[:, TOKENS:]) if len(kind.doubt) > TOKENS else p
    y = (p[:, :1] / (TOKENS + 1 - len(kind.doubt))).repeat(1, TOKENS)
    for n, token in enumerate((own, seen)[3 - len(kind.doubt) :], 1):
        y.scatter_add_(1, token[:, None], p[:, n : n + 1])
    return y


class Counted(NamedTuple):
    """How often a slot's demos (and each demo alone) had a class of answers to a key: flat (slots or demos, K, keys, classes)."""

    kind: Kind
    all: Tensor
    of_demo: Tensor
    worth: Tensor  # (slots, K) mean log-likelihood of a demo's cell, foretold from the other demos


class Cells(NamedTuple):
    slot: Tensor
    own: Tensor
    seen: Tensor  # (M, K)


def row(kind: Kind, group: Tensor, cells: Cells, k: Tensor) -> Tensor:
    """(M, n) the rows of a table: groups (M,), sights k (M, n)."""
    return (group[:, None] * SIGHTS + k) * kind.keys + kind.key(cells.own[:, None], cells.seen.gather(1, k))


def counted(kind: Kind, d: Cells, demo: Tensor, y: Tensor, slots: int, demos: int) -> Counted:
    n, own = len(kind.doubt), d.own[:, None]
    keys = kind.key(own, d.seen) + torch.arange(SIGHTS, device=y.device) * kind.keys
    classes = kind.class_of(own, d.seen, y[:, None])
    whole, mine = (keys + group[:, None] * (SIGHTS * kind.keys) for group in (d.slot, demo))

    def tally(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The table, and for each cell and sight how often its key had its class, and any class."""
        at, size = rows * n + classes, groups * SIGHTS * kind.keys
        table = torch.bincount(at.flatten(), minlength=size * n)
        return table, table[at], torch.bincount(rows.flatten(), minlength=size)[rows]

    every, right, seen = tally(whole, slots)
    of_demo, own_right, own_seen = tally(mine, demos)
    doubt = torch.tensor(kind.doubt, device=y.device)[classes] * UNSEEN
    found = torch.log((right - own_right + doubt) / (seen - own_seen + UNSEEN))
    if n < TOKENS:
        found = torch.where(classes == 0, found - torch.log(found.new_tensor(TOKENS + 1.0 - n)), found)
    lengths = torch.bincount(d.slot, minlength=slots)
    worth = torch.segment_reduce(found, "sum", lengths=lengths, unsafe=True) / lengths.clamp(min=1)[:, None]
    return Counted(kind, every, of_demo, worth)


def heard(made: list[Counted], best: Tensor, weight: Tensor, cells: Cells, demo: Tensor | None) -> Tensor:
    """(M, V) what the experts `best` (slots, n) of each cell's slot say of it by their weights; of a demo, without that demo."""
    said = weight.new_zeros(len(cells.own), TOKENS)
    for place in range(best.shape[1]):
        expert, share = best[cells.slot, place], weight[cells.slot, place]
        k = expert % SIGHTS
        for n, c in enumerate(made):
            mine = torch.nonzero(expert // SIGHTS == n).flatten()
            if not len(mine):
                continue
            part, classes = Cells(*(x[mine] for x in cells)), len(c.kind.doubt)
            found = c.all.view(-1, classes)[row(c.kind, part.slot, part, k[mine, None])[:, 0]]
            if demo is not None:
                found = found - c.of_demo.view(-1, classes)[row(c.kind, demo[mine], part, k[mine, None])[:, 0]]
            doubt = torch.tensor(c.kind.doubt, device=found.device) * UNSEEN
            p = (found + doubt) / (found.sum(1, keepdim=True) + UNSEEN)
            seen = part.seen.gather(1, k[mine, None])[:, 0]
            said.index_add_(0, mine, told(c.kind, p, part.own, seen) * share[mine, None])
    return said / said.sum(1, keepdim=True)


@torch.no_grad()
def proposals(batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M_d, V) of the demos' cells, each demo's from the others, and (M, V) of the test inputs' cells.

    0 where a demo's output says nothing. Where a slot has one demo all experts are worth the same."""
    device, d = batch.inputs.device, batch.demos
    of_demos, of_queries = (torch.zeros(len(x), TOKENS, device=device) for x in (d.inputs, batch.inputs))
    if batch.inputs.is_meta:
        return of_demos, of_queries  # what is counted there are products, of which there are none here
    demo = torch.arange(len(d.cells), device=device).repeat_interleave(torch.tensor(d.cells, device=device), output_size=len(d.inputs))
    slots = torch.arange(len(batch.cells), device=device)
    slot = slots.repeat_interleave(torch.tensor(batch.cells, device=device), output_size=len(batch.inputs))
    shown, asked = sights(d.inputs, d.at, d.cells), sights(batch.inputs, batch.at, batch.cells)
    order = d.by_slot[d.outputs[d.by_slot] != PAD]
    owner = d.owner[demo[order]]
    for begin in range(0, len(batch.cells), SLOTS):
        end = min(begin + SLOTS, len(batch.cells))
        rows, asks = order[(owner >= begin) & (owner < end)], torch.nonzero((slot >= begin) & (slot < end)).flatten()
        used, local = demo[rows].unique(return_inverse=True)
        told_of = Cells(d.owner[demo[rows]] - begin, d.inputs[rows], shown[rows])
        query = Cells(slot[asks] - begin, batch.inputs[asks], asked[asks])
        made: list[Counted] = []
        for turn in range(ROUNDS):
            again = [counted(kind, told_of, local, d.outputs[rows], end - begin, len(used)) for kind in KINDS[2 * bool(turn) :]]
            made = [*made[: 2 * bool(turn)], *again]  # the first two kinds do not read a cell's own token
            worth, best = torch.cat([c.worth for c in made], 1).topk(HEARD, 1)
            weight = torch.softmax(SHARP * worth, 1)
            back, ahead = heard(made, best, weight, told_of, local), heard(made, best, weight, query, None)
            told_of, query = told_of._replace(own=back.argmax(1)), query._replace(own=ahead.argmax(1))
        of_demos[rows], of_queries[asks] = back.clamp(min=1e-4).log(), ahead.clamp(min=1e-4).log()
    return of_demos, of_queries
