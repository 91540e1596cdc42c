"""Looking into a forward pass: which tokens each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lat_optuna.length_config import LengthConfig
from lat_optuna.model.adapted import PASS, at, num_layers


def kept_tokens(model: PreTrainedModel, config: LengthConfig, input_ids: Sequence[int]) -> tuple[tuple[bool, ...], ...]:
    """Which tokens of one example each layer keeps (section 2.2).

    Args:
        model: An adapted text encoder.
        config: The configuration to look at.
        input_ids: The example's tokens, special ones included, without padding.

    Returns:
        For each layer one flag a token.
    """
    base: Any = model.base_model
    seen: list[Any] = []
    first = next(module for module in base.modules() if getattr(module, "_length_index", None) == 0)
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs[PASS]) if PASS in kwargs else None, with_kwargs=True
    )
    try:
        with torch.inference_mode(), at(model, config):
            base(input_ids=torch.tensor([list(input_ids)], device=model.device))
    finally:
        handle.remove()
    choices = seen[0].choices
    kept: list[tuple[bool, ...]] = []
    positions = set(range(len(input_ids)))
    for layer in range(num_layers(model)):
        if layer in choices:
            positions = set(choices[layer].positions[0].tolist())
        kept.append(tuple(index in positions for index in range(len(input_ids))))
    return tuple(kept)
