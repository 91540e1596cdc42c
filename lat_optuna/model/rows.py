"""Rows of a batch."""

from __future__ import annotations

import torch


def take_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``values[b, rows[b, i]]`` for (batch, width, ...) values and (batch, kept) rows: (batch, kept, ...).

    Whole rows of a flat matrix are copied: on a CPU several times faster than ``gather`` with an expanded index.
    """
    batch, width = values.shape[:2]
    flat = rows + torch.arange(0, batch * width, width, device=rows.device)[:, None]
    taken = values.reshape(batch * width, -1).index_select(0, flat.reshape(-1))
    return taken.view(batch, rows.size(1), *values.shape[2:])
