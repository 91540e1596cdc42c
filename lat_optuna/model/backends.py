"""torch's kernels of attention, where every input has another shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention to others for a block of code, in this process.

    On GPUs since Hopper torch gives ``scaled_dot_product_attention`` to cuDNN first, which builds a plan for every new
    shape: half a second forwards, as long backwards. Of ever new shapes are a training step's sub-models and a search's
    configurations; with shapes that come back it is the fastest.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
