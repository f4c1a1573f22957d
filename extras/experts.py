"""What a cell sees of the rest of its grid, and the answer that this alone proposes: priors, none of them learned.

A sight gives each cell a colour or a small number: its mirror image, its neighbour, the first thing that a look to the left meets,
the size of its object (Chollet 2019, arXiv 1911.01547, "core knowledge"), the cell a period away.
Axes: M cells of all grids, packed, G grids, K sights, V = 12 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import EOS, FIRST_COLOUR, PAD, Batch

TOKENS = 12

# ---------------------------------------------------------------- sights that are grids


class Frame(NamedTuple):
    """Cells (M,): where they lie in their grid's own frame, its size, and the box around all that is not black."""

    i: Tensor
    j: Tensor
    h: Tensor
    w: Tensor
    top: Tensor
    left: Tensor
    high: Tensor
    wide: Tensor


def folded(i: Tensor, n: Tensor) -> Tensor:
    """There and back again: 0 .. n - 1, n - 1 .. 0 and so on."""
    return torch.minimum(i % (2 * n), 2 * n - 1 - i % (2 * n))


def third(n: Tensor) -> Tensor:
    """The side of a panel of three, which may have lines between them."""
    return (n - 2 * (n % 3 == 2)) // 3


# The row and column that is seen; and, where the whole sight is a grid with an end, its height and width.
Seen = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]

GRIDS: tuple[Callable[[Frame], Seen], ...] = (
    lambda f: (f.i, f.j, f.h, f.w),  # itself, and the seven other elements of D8
    lambda f: (f.h - 1 - f.i, f.j, f.h, f.w),
    lambda f: (f.i, f.w - 1 - f.j, f.h, f.w),
    lambda f: (f.h - 1 - f.i, f.w - 1 - f.j, f.h, f.w),
    lambda f: (f.j, f.i, f.w, f.h),
    lambda f: (f.h - 1 - f.j, f.w - 1 - f.i, f.w, f.h),
    lambda f: (f.h - 1 - f.j, f.i, f.w, f.h),
    lambda f: (f.j, f.w - 1 - f.i, f.w, f.h),
    lambda f: (2 * f.top + f.high - 1 - f.i, f.j, f.h, f.w),  # mirrored within the box
    lambda f: (f.i, 2 * f.left + f.wide - 1 - f.j, f.h, f.w),
    lambda f: (2 * f.top + f.high - 1 - f.i, 2 * f.left + f.wide - 1 - f.j, f.h, f.w),
    lambda f: (f.i % f.h, f.j % f.w),  # tiled, straight and in mirrors
    lambda f: (f.i % f.h, f.j % f.w, 2 * f.h, 2 * f.w),
    lambda f: (f.i % f.h, f.j % f.w, 3 * f.h, 3 * f.w),
    lambda f: (f.i % f.h, f.j % f.w, f.h * f.h, f.w * f.w),
    lambda f: (f.i % f.h, f.j, 2 * f.h, f.w),
    lambda f: (f.i, f.j % f.w, f.h, 2 * f.w),
    lambda f: (folded(f.i, f.h), folded(f.j, f.w)),
    lambda f: (folded(f.i, f.h), folded(f.j, f.w), 2 * f.h, 2 * f.w),
    lambda f: (folded(f.i, f.h), f.j, 2 * f.h, f.w),
    lambda f: (folded(f.i + f.h, f.h), f.j, 2 * f.h, f.w),
    lambda f: (f.i, folded(f.j, f.w), f.h, 2 * f.w),
    lambda f: (f.i, folded(f.j + f.w, f.w), f.h, 2 * f.w),
    lambda f: (f.i // 2, f.j // 2, 2 * f.h, 2 * f.w),  # larger and smaller
    lambda f: (f.i // 3, f.j // 3, 3 * f.h, 3 * f.w),
    lambda f: (f.i // f.h, f.j // f.w, f.h * f.h, f.w * f.w),
    lambda f: (f.i // 2, f.j, 2 * f.h, f.w),
    lambda f: (f.i, f.j // 2, f.h, 2 * f.w),
    lambda f: (2 * f.i, 2 * f.j, f.h // 2, f.w // 2),
    lambda f: (3 * f.i, 3 * f.j, f.h // 3, f.w // 3),
    lambda f: (f.i + f.top, f.j + f.left, f.high, f.wide),  # the box, halves, quarters, thirds
    lambda f: (f.i, f.j, f.h // 2, f.w),
    lambda f: (f.i + (f.h + 1) // 2, f.j, f.h // 2, f.w),
    lambda f: (f.i, f.j, f.h, f.w // 2),
    lambda f: (f.i, f.j + (f.w + 1) // 2, f.h, f.w // 2),
    lambda f: (f.i, f.j, f.h // 2, f.w // 2),
    lambda f: (f.i, f.j + (f.w + 1) // 2, f.h // 2, f.w // 2),
    lambda f: (f.i + (f.h + 1) // 2, f.j, f.h // 2, f.w // 2),
    lambda f: (f.i + (f.h + 1) // 2, f.j + (f.w + 1) // 2, f.h // 2, f.w // 2),
    lambda f: (f.i, f.j, f.h, third(f.w)),
    lambda f: (f.i, f.j + (f.w + 1) // 3, f.h, third(f.w)),
    lambda f: (f.i, f.j + 2 * ((f.w + 1) // 3), f.h, third(f.w)),
    lambda f: (f.i, f.j, third(f.h), f.w),
    lambda f: (f.i + (f.h + 1) // 3, f.j, third(f.h), f.w),
    lambda f: (f.i + 2 * ((f.h + 1) // 3), f.j, third(f.h), f.w),
    lambda f: (f.i, f.j * 0, f.h, f.w),  # the ends of its row and column
    lambda f: (f.i, f.w - 1, f.h, f.w),
    lambda f: (f.i * 0, f.j, f.h, f.w),
    lambda f: (f.h - 1, f.j, f.h, f.w),
)
AROUND = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
REACH = 9  # a mirror's distance from the middle, in half cells, and a period, at most
FITTED = 12  # sights that a grid fits to itself: they come last
SIGHTS = (
    len(GRIDS) + 4 + 4 + 2 * len(AROUND) + 4 + 18 + FITTED
)  # boxes, falls, neighbours and looks, what lies between, numbers


class Where(NamedTuple):
    """Packed grids: facts about cells (M,), and who lies next to whom (M, 8), M standing for nobody."""

    tokens: Tensor
    known: Tensor  # (M + 1,) and what nobody has
    owner: Tensor  # the grid
    grids: int
    inside: Tensor  # bool, whether the cell belongs to its grid at all
    frame: Frame
    place: Callable[
        [Tensor, Tensor], Tensor
    ]  # row and column in the own grid -> (M,) the cell there
    row: Tensor  # the first cell of its row, of its column: their names
    column: Tensor
    next_to: Tensor


def extremes(x: Tensor, chosen: Tensor, owner: Tensor, grids: int) -> tuple[Tensor, Tensor]:
    """Least and greatest x (M,) of the chosen cells of each grid (G,): 0 and -1 where there is none."""
    low = x.new_full((grids,), 1 << 20).scatter_reduce(
        0, owner, torch.where(chosen, x, 1 << 20), "amin"
    )
    high = x.new_full((grids,), -1).scatter_reduce(0, owner, torch.where(chosen, x, -1), "amax")
    return torch.where(high < 0, 0, low), high


def box(i: Tensor, j: Tensor, chosen: Tensor, owner: Tensor, grids: int) -> tuple[Tensor, ...]:
    """Top, left, height and width, (M,) each, of the box around the chosen cells of each cell's grid; 0 high where there is none."""
    (t0, t1), (l0, l1) = (extremes(x, chosen, owner, grids) for x in (i, j))
    return torch.stack((t0, l0, t1 - t0 + (t1 >= 0), l1 - l0 + (l1 >= 0)))[:, owner].unbind()


def whereabouts(tokens: Tensor, at: Tensor, cells: Sequence[int]) -> Where:
    device, grids, total = tokens.device, len(cells), len(tokens)
    area = torch.tensor(cells, device=device)
    owner = torch.arange(grids, device=device).repeat_interleave(area, output_size=total)
    last = area.cumsum(0) - 1
    first = last + 1 - area
    width = (at[last, 1] - at[first, 1] + 1)[owner]
    row, column = (at - at[first][owner]).unbind(1)  # on the canvas
    inside, start = tokens >= FIRST_COLOUR, first[owner]
    (r0, r1), (c0, c1) = (extremes(x, inside, owner, grids) for x in (row, column))
    r0, c0, h, w = torch.stack((r0, c0, (r1 - r0 + 1).clamp(min=1), (c1 - c0 + 1).clamp(min=1)))[
        :, owner
    ]
    i, j = row - r0, column - c0
    nowhere = torch.full_like(row, total)

    def place(r: Tensor, c: Tensor) -> Tensor:
        """(M,) which cell lies there in the same grid."""
        return torch.where(
            (r >= 0) & (r < h) & (c >= 0) & (c < w), start + (r0 + r) * width + c0 + c, nowhere
        )

    frame = Frame(i, j, h, w, *box(i, j, tokens > FIRST_COLOUR, owner, grids))
    next_to = torch.stack(
        [torch.where(inside, place(i + di, j + dj), nowhere) for di, dj in AROUND], 1
    )
    by_row, by_column = (
        torch.where(inside, x, nowhere) for x in (start + row * width, start + column)
    )
    known = torch.cat((tokens, tokens.new_tensor([PAD])))
    return Where(tokens, known, owner, grids, inside, frame, place, by_row, by_column, next_to)


def through(f: Where, seen: Seen) -> Tensor:
    """(M,) what each cell sees, with the marks of the sight's end as `data.paint` makes those of a grid."""
    (i, j, *_), (r, c, *size) = f.frame, seen
    here = (i >= 0) & (j >= 0)
    found = f.known[torch.where(here, f.place(r, c), len(f.tokens))]
    if not size:
        return found
    in_rows, in_columns = here & (i < size[0]), here & (j < size[1])
    mark = ((i == size[0]) & in_columns) | ((j == size[1]) & in_rows)
    return torch.where(in_rows & in_columns, found, torch.where(mark, EOS, PAD))


def crop(f: Where, chosen: Tensor) -> Tensor:
    """(M,) the sight that is cut to the box around chosen cells."""
    top, left, high, wide = box(f.frame.i, f.frame.j, chosen, f.owner, f.grids)
    return through(f, (f.frame.i + top, f.frame.j + left, high, wide))


def fallen(
    f: Where, drawn: Tensor, line: Tensor, order: Tensor, length: Tensor, back: bool
) -> Tensor:
    """(M,) what each cell gets when all that is drawn falls to the end of its line (its start: back), `order` the place in it."""
    total = len(f.tokens)
    at = torch.argsort(torch.where(drawn, line * 64 + order, 1 << 40), stable=True)
    on = torch.zeros(total + 1, dtype=torch.int64, device=at.device).index_add_(
        0, line, drawn.long()
    )
    first, on, turn = (on.cumsum(0) - on)[line], on[line], order if back else length - 1 - order
    nth = (first + (turn if back else on - 1 - turn)).clamp(0, total - 1)
    return torch.where(f.inside, torch.where(turn < on, f.tokens[at[nth]], FIRST_COLOUR), PAD)


# ---------------------------------------------------------------- sights along lines, of objects


def objects(f: Where, least: int = FIRST_COLOUR + 1) -> Tensor:
    """(M,) the name of each cell's object: the 8-connected cells of its colour; of colours below `least` each is its own."""
    total = len(f.tokens)
    name, beside = (
        torch.arange(total + 1, device=f.tokens.device),
        torch.cat((f.next_to, f.next_to.new_full((1, 8), total))),
    )
    same = (f.known[beside] == f.known[:, None]) & (f.known >= least)[:, None]
    while True:
        new = torch.minimum(name, torch.where(same, name[beside], total + 1).amin(1))
        new = new[new]
        if bool((new == name).all()):
            return name[:-1]
        name = new


def enclosed(f: Where) -> Tensor:
    """(M,) bool: black cells that no 4-connected way over black joins to the border."""
    black = f.tokens == FIRST_COLOUR
    beyond = black.new_ones(1)
    reached = torch.cat((torch.zeros_like(black), beyond))
    while True:
        new = torch.cat((black & (reached[:-1] | reached[f.next_to[:, :4]].any(1)), beyond))
        if bool((new == reached).all()):
            return black & ~reached[:-1]
        reached = new


def agreement(f: Where, there: Tensor) -> Tensor:
    """(G,) of the cells that see another one there (M,), the share that have its colour; 0 where fewer than half of a grid do."""
    sees = (
        f.inside & (there < len(there)) & (there != torch.arange(len(there), device=there.device))
    )
    found = torch.stack((sees & (f.known[there] == f.tokens), sees, f.inside)).float()
    same, seen, cells = torch.zeros(3, f.grids, device=there.device).index_add_(1, f.owner, found)
    return torch.where(2 * seen >= cells, same / seen.clamp(min=1), 0)


def fitted(f: Where, patch: Tensor) -> list[Tensor]:
    """What each grid repeats: its images in the mirrors that suit it best; the commonest colour, black last, of all cells that lie
    whole periods apart, in both directions, down, across; the cell a period ahead, behind; and the first four, cut to the patch."""
    (i, j, h, w, *_), total = f.frame, len(f.tokens)

    def best(offers: Sequence[int], there: Callable[[int], Tensor]) -> Tensor:
        """(M,) the offer with which the grid agrees best, the nearest of equals."""
        score = torch.stack([agreement(f, there(n)) - 0.002 * abs(n) for n in offers], 1)
        return torch.tensor(offers, device=i.device)[score.argmax(1)][f.owner]

    mirrors, periods = sorted(range(1 - REACH, REACH), key=abs), range(1, REACH + 1)
    up = h - 1 - i + best(mirrors, lambda n: f.place(h - 1 - i + n, j))
    across = w - 1 - j + best(mirrors, lambda n: f.place(i, w - 1 - j + n))
    p, q = best(periods, lambda n: f.place(i + n, j)), best(periods, lambda n: f.place(i, j + n))
    found = [through(f, seen) for seen in ((up, j), (i, across), (up, across))]
    for r, c in ((i % p, j % q), (i % p, j), (i, j % q)):
        count = torch.zeros((total + 1) * TOKENS, dtype=torch.int64, device=i.device)
        count = count.index_add_(0, f.place(r, c) * TOKENS + f.tokens, f.inside.long()).view(
            -1, TOKENS
        )
        count[:, FIRST_COLOUR + 1 :] *= 1 << 10
        found.append(through(f._replace(known=count.argmax(1)), (r, c)))
    found += [through(f, (i + p, j + q)), through(f, (i - p, j - q))]
    return found + [
        crop(f._replace(known=torch.cat((x, x.new_tensor([PAD])))), patch) for x in found[:4]
    ]


def sights(tokens: Tensor, at: Tensor, cells: Sequence[int]) -> Tensor:
    """(M,) tokens at places (M, 2) of canvases of so many cells each, row by row, to (M, K) tokens or numbers below 12."""
    if not len(tokens):
        return tokens.new_zeros(0, SIGHTS)
    f = whereabouts(tokens, at, cells)
    total, inside, (i, j, h, w, *_) = len(tokens), f.inside, f.frame
    near = f.known[f.next_to]
    met = torch.cat((torch.where(near > FIRST_COLOUR, near, PAD), near.new_full((1, 8), PAD)))
    jump = torch.cat((f.next_to, f.next_to.new_full((1, 8), total)))
    for _ in range(5):  # a look goes twice as far each time: 32 cells
        met, jump = torch.where(met != PAD, met, met.gather(0, jump)), jump.gather(0, jump)
    met, drawn = met[:-1], inside & (tokens > FIRST_COLOUR)

    def sums(name: Tensor, x: Tensor) -> Tensor:
        return torch.zeros(total + 1, dtype=torch.int64, device=x.device).index_add_(
            0, name, x.long()
        )[name]

    name = objects(f)
    size, edge = (
        torch.where(drawn, sums(name, drawn), 0),
        (i == 0) | (j == 0) | (i == h - 1) | (j == w - 1),
    )
    least, most = (x[f.owner] for x in extremes(size, drawn, f.owner, f.grids))
    share = (
        tokens.new_zeros(f.grids * TOKENS)
        .index_add_(0, f.owner * TOKENS + tokens, torch.ones_like(tokens))
        .view(-1, TOKENS)
    )
    share[:, : FIRST_COLOUR + 1] = 0
    rank = (share[:, None] > share[:, :, None]).sum(
        -1
    )  # of colours by their number of cells, black left out
    numbers = [
        1 + i % 2 * 2 + j % 2,
        1 + i % 3 * 3 + j % 3,
        1 + ((i == 0) | (i == h - 1)).long() + ((j == 0) | (j == w - 1)).long(),
        1 + (i == j).long() + 2 * (i + j == w - 1).long(),
        1 + (near > FIRST_COLOUR).sum(1),
        1 + (near[:, :4] > FIRST_COLOUR).sum(1),
        1 + (near == tokens[:, None]).sum(1),
        1 + (met[:, :4] != PAD).sum(1),
        1 + (met != PAD).sum(1),
        1 + enclosed(f).long(),
        1 + size.clamp(max=10),
        1 + (drawn & (size == most)).long() + 2 * (drawn & (size == least)).long(),
        1 + (sums(name, drawn & edge) > 0).long(),
        1 + torch.where(drawn, rank[f.owner, tokens], 0),
        share.argmax(1)[f.owner],
        torch.where(share > 0, share, 1 << 20).argmin(1)[f.owner],
        1 + sums(f.row, drawn).clamp(max=10),
        1 + sums(f.column, drawn).clamp(max=10),
    ]
    common, rare = numbers[14], numbers[15]
    grids = [through(f, sight(f.frame)) for sight in GRIDS]
    boxes = [
        drawn & (size == most),
        drawn & (size == least),
        drawn & (tokens == common),
        drawn & (tokens == rare),
    ]
    grids += [crop(f, x) for x in boxes]
    lines = ((f.column, i, h), (f.row, j, w))
    grids += [fallen(f, drawn, *line, back) for line in lines for back in (False, True)]
    whole = objects(f, FIRST_COLOUR)
    area, (_, _, high, wide) = sums(whole, inside), box(i, j, inside, whole, total)
    solid = inside & (area == high * wide) & (high > 1) & (wide > 1)
    patch = solid & (area == extremes(area, solid, f.owner, f.grids)[1][f.owner])
    between = [
        torch.where(met[:, a] == met[:, b], met[:, a], PAD)
        for a, b in ((0, 1), (2, 3), (4, 7), (5, 6))
    ]
    of_cells = torch.where(inside[:, None], torch.stack(numbers, 1), PAD)
    return torch.cat(
        (
            torch.stack(grids, 1),
            near,
            met,
            torch.stack(between, 1),
            of_cells,
            torch.stack(fitted(f, patch), 1),
        ),
        1,
    )


# ---------------------------------------------------------------- proposals


ROUNDS, HEARD = 2, 4  # rounds; experts heard in each
SHARP = 60.0  # weight of an expert: exp(SHARP * its mean log-likelihood of a demo's cell, foretold from the other demos)
UNSEEN = 0.2  # cells' worth of doubt in every count
LESS = (
    0.01,
    0.02,
)  # worth less: an expert whose sight is fitted to each grid; one that looks at the first round's answer
RIVALS = 16  # the best experts, among which a second answer is looked for
FAR = 1 << 16  # from any place on a canvas
SLOTS = 16  # at once: a table of counts has K * 144 * 12 numbers a demo


class Kind(NamedTuple):
    """What of a cell's own token and of what it sees an expert goes by, and which classes of answers it counts."""

    keys: int
    doubt: tuple[
        float, ...
    ]  # the classes' prior: a token of the class "another" is any of the rest
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
        return (
            p[:, :TOKENS].scatter_add(1, own[:, None], p[:, TOKENS:])
            if len(kind.doubt) > TOKENS
            else p
        )
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
    return (group[:, None] * cells.seen.shape[1] + k) * kind.keys + kind.key(
        cells.own[:, None], cells.seen.gather(1, k)
    )


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
        found = torch.where(
            classes == 0, found - torch.log(found.new_tensor(TOKENS + 1.0 - n)), found
        )
    lengths = torch.bincount(d.slot, minlength=slots)
    worth = (
        torch.segment_reduce(found, "sum", lengths=lengths, unsafe=True)
        / lengths.clamp(min=1)[:, None]
    )
    return Counted(kind, every, of_demo, worth)


def heard(
    made: list[Counted], best: Tensor, weight: Tensor, cells: Cells, demo: Tensor | None
) -> Tensor:
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
                found = (
                    found
                    - c.of_demo.view(-1, classes)[
                        row(c.kind, demo[mine], part, k[mine, None])[:, 0]
                    ]
                )
            doubt = torch.tensor(c.kind.doubt, device=found.device) * UNSEEN
            p = (found + doubt) / (found.sum(1, keepdim=True) + UNSEEN)
            seen = part.seen.gather(1, k[mine, None])[:, 0]
            said.index_add_(0, mine, told(c.kind, p, part.own, seen) * share[mine, None])
    return said / said.sum(1, keepdim=True)


def second(
    made: list[Counted], worth: Tensor, query: Cells, at: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """(slots, HEARD) experts and their weights for the best answer that is not `first` (M,): what the RIVALS best experts
    answer alone is weighed as all of those who answer the same; where nobody answers anything else, the first's."""
    worth, best = worth.topk(RIVALS, 1)
    share, slots = torch.softmax(SHARP * worth, 1), len(worth)
    alone = [
        heard(made, best[:, n : n + 1], torch.ones_like(share[:, :1]), query, None).argmax(1)
        for n in range(RIVALS)
    ]
    corner = at.new_full((slots, 2), FAR).scatter_reduce(
        0, query.slot[:, None].expand_as(at), at, "amin"
    )
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
        wrong = torch.stack(
            [no_grid | (inside & (a != x)) | (beyond & (a >= FIRST_COLOUR)) for a in alone], 1
        ).long()
        return wrong.new_zeros(slots, RIVALS).index_add_(0, query.slot, wrong) == 0

    together = torch.stack(
        [same(a) for a in alone], 1
    )  # (slots, RIVALS, RIVALS) who answers like whom
    most, which = torch.where(same(first), 0, (together * share[:, None]).sum(-1)).max(
        1
    )  # who gives no grid agrees with nobody
    mine = together[torch.arange(slots, device=which.device), which] | (most == 0)[:, None]
    worth, place = torch.where(mine, worth, -torch.inf).topk(HEARD, 1)
    return best.gather(1, place), torch.softmax(SHARP * worth, 1)


@torch.no_grad()
def proposals(batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M_d, V) of the demos' cells, each demo's from the others, and (M, V) of the test inputs' cells.

    0 where a demo's output says nothing. Of one demo nothing is left to foretell it from, so experts of one kind are all worth
    the same to a slot with one, but for what LESS takes. Slots of `getattr(batch, "other", None)` get the second answer of the last round."""
    device, d = batch.inputs.device, batch.demos
    of_demos, of_queries = (
        torch.zeros(len(x), TOKENS, device=device) for x in (d.inputs, batch.inputs)
    )
    if batch.inputs.is_meta:
        return (
            of_demos,
            of_queries,
        )  # what is counted there are products, of which there are none here
    demo = torch.arange(len(d.cells), device=device).repeat_interleave(
        torch.tensor(d.cells, device=device), output_size=len(d.inputs)
    )
    slots = torch.arange(len(batch.cells), device=device)
    slot = slots.repeat_interleave(
        torch.tensor(batch.cells, device=device), output_size=len(batch.inputs)
    )
    order = d.by_slot[d.outputs[d.by_slot] != PAD]
    owner = d.owner[demo[order]]
    mine, ours, shown, asked = (
        d.inputs,
        batch.inputs,
        d.inputs.new_zeros(len(d.inputs), 0),
        d.inputs.new_zeros(len(slot), 0),
    )
    less = LESS[0] * (torch.arange(SIGHTS, device=device) >= SIGHTS - FITTED)
    less = torch.cat((less, less + LESS[1]))
    for rounds in range(1, ROUNDS + 1):
        shown = torch.cat((shown[:, :SIGHTS], sights(mine, d.at, d.cells)), 1)
        asked = torch.cat((asked[:, :SIGHTS], sights(ours, batch.at, batch.cells)), 1)
        for begin in range(0, len(batch.cells), SLOTS):
            end = min(begin + SLOTS, len(batch.cells))
            rows, asks = (
                order[(owner >= begin) & (owner < end)],
                torch.nonzero((slot >= begin) & (slot < end)).flatten(),
            )
            used, local = demo[rows].unique(return_inverse=True)
            told_of = Cells(d.owner[demo[rows]] - begin, mine[rows], shown[rows])
            query = Cells(slot[asks] - begin, ours[asks], asked[asks])
            made = [
                counted(kind, told_of, local, d.outputs[rows], end - begin, len(used))
                for kind in KINDS
            ]
            each = torch.cat([c.worth - less[: shown.shape[1]] for c in made], 1)
            worth, best = each.topk(HEARD, 1)
            weight = torch.softmax(SHARP * worth, 1)
            if (
                rounds == ROUNDS
                and getattr(batch, "other", None) is not None
                and bool((turn := getattr(batch, "other", None)[begin:end]).any())
            ):
                here = turn[query.slot]
                theirs = Cells(*(x[here] for x in query))
                first = heard(made, best, weight, theirs, None).argmax(1)
                others = second(made, each, theirs, batch.at[asks][here], first)
                best, weight = (
                    torch.where(turn[:, None], *x) for x in zip(others, (best, weight), strict=True)
                )
            of_demos[rows] = heard(made, best, weight, told_of, local).clamp(min=1e-4).log()
            of_queries[asks] = heard(made, best, weight, query, None).clamp(min=1e-4).log()
        mine, ours = of_demos.argmax(1), of_queries.argmax(1)
    return of_demos, of_queries
