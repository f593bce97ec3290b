"""For loops that deal with one column of all rows at a time: columns lie as lines, [matrices, columns, rows]."""

import torch
from torch import Tensor


def picked(lines: Tensor, order: Tensor) -> Tensor:
    """Some lines of [matrices, lines, …]: of each matrix those in order [matrices, count]."""
    found = lines.new_empty(*order.shape, *lines.shape[2:])
    for out, each, own in zip(found, lines, order, strict=True):
        torch.index_select(each, 0, own, out=out)
    return found


def place(lines: Tensor, order: Tensor, changed: Tensor) -> None:
    """Puts others in the place of those that `picked` gives."""
    for each, own, new in zip(lines, order, changed, strict=True):
        each[own] = new


def take(lines: Tensor, order: Tensor, amount: Tensor) -> None:
    """Takes away from those that `picked` gives, each of them named once."""
    for each, own, less in zip(lines, order, amount, strict=True):
        each.index_add_(0, own, less, alpha=-1)


_CACHED = 1 << 20  # numbers that a processor's cache holds


def block(like: Tensor) -> int:
    """How many lines of such a size to take one by one before all others hear of them, in one product.

    More make the products larger, which pays where these do nothing but wait for memory.
    """
    return 64 if like.numel() <= _CACHED * len(like) else 128


class Lines:
    """Room for some lines of [matrices, columns, rows], one after the other [matrices, rows] in `each`.

    Views take as long to make as small operations take to run, so loops over columns make theirs once.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        """For at most `size` lines of what looks like this."""
        self.all = like.new_empty(len(like), size, like.shape[2])
        self.each = self.all.unbind(1)

    def fill(self, lines: Tensor) -> tuple[Tensor, ...]:
        """Puts lines [matrices, count, rows] in. Returns `each`."""
        self.all[:, : lines.shape[1]] = lines
        return self.each


class Backlog:
    """What the columns of a block owe to those before them, for loops that deal with one column of all rows at a time.

    Column i is first reduced by Σ_{j<i} share_ij · line_j, j being the earlier columns of the block: one product for
    each, instead of one for every pair. lines: of all columns, which the loop fills one by one. columns: what is left
    of the block's own.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        """For blocks of at most `size` columns of [matrices, columns, rows]."""
        self.lines, self.columns = Lines(like, size), Lines(like, size)
        self._shares = like.new_empty(len(like), size, size)
        columns = self.columns.all.split(1, 1)
        self._terms = [(columns[i], self._shares[:, i : i + 1, :i], self.lines.all[:, :i]) for i in range(size)]

    def begin(self, columns: Tensor, shares: Tensor) -> None:
        """A block of columns [matrices, count, rows], whose shares are the lower triangle of [matrices, count, count].

        They are copied.
        """
        self.columns.fill(columns)
        count = shares.shape[1]
        self._shares[:, :count, :count] = shares

    def settle(self, i: int) -> Tensor:
        """Column i less what it owes: [matrices, rows]."""
        column, shares, lines = self._terms[i]
        column.baddbmm_(shares, lines, alpha=-1)
        return self.columns.each[i]
