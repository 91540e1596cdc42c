"""Switches of torch's that pay for models of many lengths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


def weights_in_graphs(device: torch.device) -> AbstractContextManager[object]:
    """What ``torch.compile`` makes for a CPU in this block has the weights in it, as its products want them (freezing).

    Otherwise every call casts them (autocast) and lays them out again, which for few tokens takes longer than the
    products. For inference alone: a graph does not see what happens to the weights later.
    """
    if device.type != "cpu":
        return nullcontext()
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)
