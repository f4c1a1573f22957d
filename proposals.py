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
from .sights import FITTED, SIGHTS, TOKENS, sights

ROUNDS, HEARD = 2, 4  # rounds; experts heard in each
SHARP = 60.0  # weight of an expert: exp(SHARP * its mean log-likelihood of a demo's cell, foretold from the other demos)
UNSEEN = 0.2  # cells' worth of doubt in every count
LESS = (0.01, 0.02)  # worth less: an expert whose sight is fitted to each grid; one that looks at the first round's answer
RIVALS = 16  # the best experts, among which a second answer is looked for
FAR = 1 << 16  # from any place on a canvas
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
    return (group[:, None] * cells.seen.shape[1] + k) * kind.keys + kind.key(cells.own[:, None], cells.seen.gather(1, k))


def counted(kind: Kind, d: Cells, demo: Tensor, y: Tensor, slots: int, demos: int) -> Counted:
    n, own, many = len(kind.doubt), d.own[:, None], d.seen.shape[1]
    keys = kind.key(own, d.seen) + torch.arange(many, device=y.device) * kind.keys
    classes = kind.class_of(own, d.seen, y[:, None])
    whole, mine = (keys + group[:, None] * (many * kind.keys) for group in (d.slot, demo))

    def tally(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The table, and for each cell and sight how often its key had its class, and any class."""
        at, size = rows * n + classes, groups * many * kind.keys
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
        k = expert % cells.seen.shape[1]
        for n, c in enumerate(made):
            mine = torch.nonzero(expert // cells.seen.shape[1] == n).flatten()
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


def second(made: list[Counted], worth: Tensor, query: Cells, at: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(slots, HEARD) experts and their weights for the best answer that is not `first` (M,): what the RIVALS best experts
    answer alone is weighed as all of those who answer the same; where nobody answers anything else, the first's."""
    worth, best = worth.topk(RIVALS, 1)
    share, slots = torch.softmax(SHARP * worth, 1), len(worth)
    alone = [heard(made, best[:, n : n + 1], torch.ones_like(share[:, :1]), query, None).argmax(1) for n in range(RIVALS)]
    corner = at.new_full((slots, 2), FAR).scatter_reduce(0, query.slot[:, None].expand_as(at), at, "amin")
    i, j = (at - corner[query.slot]).unbind(1)

    def end(x: Tensor, along: Tensor, across: Tensor) -> Tensor:
        """(M,) where the grid of an answer ends, on its first row or column."""
        over = torch.where((across == 0) & (x < FIRST_COLOUR), along, FAR)
        return over.new_full((slots,), FAR).scatter_reduce(0, query.slot, over, "amin")[query.slot]

    def same(x: Tensor) -> Tensor:
        """(slots, RIVALS) whose answer it is: the same grid of colours alone, and none right beyond its end (`data.untokenise`)."""
        h, w = end(x, i, j), end(x, j, i)
        inside, beyond = (i < h) & (j < w), ((i == h) & (j < w)) | ((j == w) & (i < h))
        no_grid = (inside & (x < FIRST_COLOUR)) | (h == 0) | (w == 0)
        wrong = torch.stack([no_grid | (inside & (a != x)) | (beyond & (a >= FIRST_COLOUR)) for a in alone], 1).long()
        return wrong.new_zeros(slots, RIVALS).index_add_(0, query.slot, wrong) == 0

    together = torch.stack([same(a) for a in alone], 1)  # (slots, RIVALS, RIVALS) who answers like whom
    most, which = torch.where(same(first), 0, (together * share[:, None]).sum(-1)).max(1)  # who gives no grid agrees with nobody
    mine = together[torch.arange(slots, device=which.device), which] | (most == 0)[:, None]
    worth, place = torch.where(mine, worth, -torch.inf).topk(HEARD, 1)
    return best.gather(1, place), torch.softmax(SHARP * worth, 1)


@torch.no_grad()
def proposals(batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M_d, V) of the demos' cells, each demo's from the others, and (M, V) of the test inputs' cells.

    0 where a demo's output says nothing. Of one demo nothing is left to foretell it from, so experts of one kind are all worth
    the same to a slot with one, but for what LESS takes. Slots of `batch.other` get the second answer of the last round."""
    device, d = batch.inputs.device, batch.demos
    of_demos, of_queries = (torch.zeros(len(x), TOKENS, device=device) for x in (d.inputs, batch.inputs))
    if batch.inputs.is_meta:
        return of_demos, of_queries  # what is counted there are products, of which there are none here
    demo = torch.arange(len(d.cells), device=device).repeat_interleave(torch.tensor(d.cells, device=device), output_size=len(d.inputs))
    slots = torch.arange(len(batch.cells), device=device)
    slot = slots.repeat_interleave(torch.tensor(batch.cells, device=device), output_size=len(batch.inputs))
    order = d.by_slot[d.outputs[d.by_slot] != PAD]
    owner = d.owner[demo[order]]
    mine, ours, shown, asked = d.inputs, batch.inputs, d.inputs.new_zeros(len(d.inputs), 0), d.inputs.new_zeros(len(slot), 0)
    less = LESS[0] * (torch.arange(SIGHTS, device=device) >= SIGHTS - FITTED)
    less = torch.cat((less, less + LESS[1]))
    for rounds in range(1, ROUNDS + 1):
        shown = torch.cat((shown[:, :SIGHTS], sights(mine, d.at, d.cells)), 1)
        asked = torch.cat((asked[:, :SIGHTS], sights(ours, batch.at, batch.cells)), 1)
        for begin in range(0, len(batch.cells), SLOTS):
            end = min(begin + SLOTS, len(batch.cells))
            rows, asks = order[(owner >= begin) & (owner < end)], torch.nonzero((slot >= begin) & (slot < end)).flatten()
            used, local = demo[rows].unique(return_inverse=True)
            told_of = Cells(d.owner[demo[rows]] - begin, mine[rows], shown[rows])
            query = Cells(slot[asks] - begin, ours[asks], asked[asks])
            made = [counted(kind, told_of, local, d.outputs[rows], end - begin, len(used)) for kind in KINDS]
            each = torch.cat([c.worth - less[: shown.shape[1]] for c in made], 1)
            worth, best = each.topk(HEARD, 1)
            weight = torch.softmax(SHARP * worth, 1)
            if rounds == ROUNDS and batch.other is not None and bool((turn := batch.other[begin:end]).any()):
                here = turn[query.slot]
                theirs = Cells(*(x[here] for x in query))
                first = heard(made, best, weight, theirs, None).argmax(1)
                others = second(made, each, theirs, batch.at[asks][here], first)
                best, weight = (torch.where(turn[:, None], *x) for x in zip(others, (best, weight), strict=True))
            of_demos[rows] = heard(made, best, weight, told_of, local).clamp(min=1e-4).log()
            of_queries[asks] = heard(made, best, weight, query, None).clamp(min=1e-4).log()
        mine, ours = of_demos.argmax(1), of_queries.argmax(1)
    return of_demos, of_queries
