"""Rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """The rows that a layer kept, in their original order; rows beyond an example's count are filler at the end.

    Attributes:
        rows: (batch, width) indices into the rows that entered the layer. Filler points to the last of them.
        positions: (batch, width) positions in the input. Filler points one past its end.
        real: (batch, width) bool, which are no filler; ``None`` where none is.
        flat: (batch * width,) indices into the rows of all examples, where known. (Making them is two launches on a
            GPU and nothing worth mentioning elsewhere.)
    """

    rows: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor | None = None
    flat: torch.Tensor | None = None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """These rows of (batch, rows, ...) values."""
        return take_rows(values, self.rows, self.flat)


Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""``rows``, ``positions``, ``real`` and ``flat`` of a :class:`Choice`."""


def empty_choice(votes: torch.Tensor, width: int) -> Chosen:
    """What a kernel writes a choice of ``width`` rows to, for (batch, rows) votes."""
    rows = votes.new_empty((votes.size(0), width), dtype=torch.int64)
    flat = votes.new_empty(votes.size(0) * width, dtype=torch.int64)
    return rows, torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool), flat


def is_exporting() -> bool:
    """Whether a graph is made for export; ``torch.compiler.is_exporting()`` of torch 2.11 is true of compiling, too."""
    return torch.compiler._is_exporting_flag


def take_rows(values: torch.Tensor, rows: torch.Tensor, flat: torch.Tensor | None = None) -> torch.Tensor:
    """``values[b, rows[b, i]]`` for (batch, width, ...) values and (batch, kept) rows: (batch, kept, ...).

    Whole rows of a flat matrix are copied: on a CPU several times faster than ``gather`` with an expanded index.
    ``flat`` are (batch * kept,) indices of them there, where known.
    """
    if is_exporting():
        return rows_at(values, rows)
    batch, width = values.shape[:2]
    if flat is None:
        flat = (rows + torch.arange(0, batch * width, width, device=rows.device)[:, None]).reshape(-1)
    taken = values.reshape(batch * width, -1).index_select(0, flat)
    return taken.view(batch, rows.size(1), *values.shape[2:])


@torch.library.custom_op("lat_optuna::rows_at", mutates_args=())
def rows_at(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """:func:`take_rows` with any number of batch dimensions: all of ``rows`` but its last. One node of a graph.

    Args:
        values: (..., width, rest).
        rows: (..., kept).

    Returns:
        (..., kept, rest), a copy.
    """
    rest = values.shape[rows.dim() :]
    index = rows.view(*rows.shape, *(1 for _ in rest)).expand(*rows.shape, *rest)
    return values.gather(rows.dim() - 1, index)


@rows_at.register_fake
def _(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return values.new_empty(*rows.shape, *values.shape[rows.dim() :])
