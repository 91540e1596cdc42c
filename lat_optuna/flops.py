"""FLOPs of a length configuration, by arithmetic: 2 x multiply-adds, significance included.

The numbers equal what ``torch.utils.flop_counter.FlopCounterMode`` counts on the adapted model under
``sdpa_kernel(SDPBackend.MATH)`` with dropout off. Significance sums probabilities that the layer computes anyway: it
adds numbers, but multiplies none. What it does cost is counted: a layer that drops projects and scores all rows that
enter it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lat_optuna.length_config import LengthConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Multiply-adds of a model, part by part.

    Attributes:
        layers: Layers that an input passes.
        per_row_in: Per row that enters a layer: the projections to query, key and value.
        per_pair: Per pair of a query and a key, for each of the two products: heads x head size.
        per_row_out: Per row that leaves a layer: the output projection and the feed-forward network.
        per_token: Per token of the input outside the layers: embedding projections, heads with a result per token.
        per_example: Per input: poolers, classifiers. Less than 0 where ``per_token`` covers tokens that it should
            not (the [CLS] of images comes from no patch).
    """

    layers: int
    per_row_in: int
    per_pair: int
    per_row_out: int
    per_token: int
    per_example: int

    @classmethod
    def of(cls, model: PreTrainedModel | PreTrainedConfig) -> Architecture:
        """Read the architecture off a model, adapted or not.

        Args:
            model: The model; or its transformers configuration, which names the head in ``architectures`` (without
                it, the bare encoder is counted). No weights are made for a configuration.

        Raises:
            ValueError: No family covers the architecture.
        """
        import torch
        from torch import nn
        from transformers import PreTrainedConfig

        from lat_optuna.model.adapted import num_layers
        from lat_optuna.model.families import family_of, head_kind

        if isinstance(model, PreTrainedConfig):
            family_of(model)
            with torch.device("meta"):
                model = _class_of(model)(model)
        base: Any = model.base_model
        family = family_of(base.config)
        groups = list(family.groups(base)) if family.groups else [base]
        layers = [layer for group in groups for layer in family.layers(group)]
        inside = {id(module) for layer in layers for module in layer.modules()}
        in_base = {id(module) for module in base.modules()}
        per_token = per_example = 0
        for name, module in model.named_modules():
            if id(module) in inside:
                continue
            if isinstance(module, nn.Conv2d):
                per_token += module.weight.numel()
                per_example -= family.protected * module.weight.numel()
            elif isinstance(module, nn.Linear):
                by_token = head_kind(model) == "token" or id(module) in in_base
                if by_token and not any(part in name for part in _ONCE):
                    per_token += module.weight.numel()
                else:
                    per_example += module.weight.numel()

        config = base.config
        heads = config.num_attention_heads
        per_pair = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        per_row_in = 3 * config.hidden_size * per_pair
        in_layer = sum(module.weight.numel() for module in layers[0].modules() if isinstance(module, nn.Linear))
        return cls(num_layers(model), per_row_in, per_pair, in_layer - per_row_in, per_token, per_example)

    def example_flops(self, config: LengthConfig | None, n: int) -> int:
        """One example of ``n`` real tokens by itself: the definition of cost.

        Args:
            config: The length configuration; ``None`` is dense.
            n: Real tokens (of images: patches and special tokens).

        Raises:
            ValueError: The configuration has another number of layers, or ``n`` is less than 1.
        """
        if config is not None and config.num_layers != self.layers:
            raise ValueError(f"the configuration {config} has {config.num_layers} layers, the model has {self.layers}")
        if n < 1:
            raise ValueError(f"an input has at least 1 token, not {n}")
        total = self.per_token * n + self.per_example
        rows = n
        for kept in (n,) * self.layers if config is None else config.at_length(n):
            total += rows * self.per_row_in + (rows + kept) * rows * self.per_pair + kept * self.per_row_out
            rows = kept
        return 2 * total

    def batch_flops(self, config: LengthConfig | None, ns: Sequence[int]) -> int:
        """What a batch really runs: every example is as wide as the longest one.

        Args:
            config: The length configuration; ``None`` is dense.
            ns: Real tokens of each example (of multiple choice: of each choice).
        """
        if not ns:
            return 0
        # A longer example keeps at least as many rows in every layer, so the longest sets the width everywhere.
        return len(ns) * self.example_flops(config, max(ns))

    def mean_flops(self, config: LengthConfig | None, lengths: Iterable[int]) -> float:
        """Mean of :meth:`example_flops`: the cost of a configuration on a task.

        Args:
            config: The length configuration; ``None`` is dense.
            lengths: Real tokens of each example.

        Raises:
            ValueError: There are no lengths.
        """
        counts = Counter(int(n) for n in lengths)
        if not counts:
            raise ValueError("the mean over no examples is not defined; give at least one length")
        return sum(times * self.example_flops(config, n) for n, times in counts.items()) / counts.total()


# Parts of a model that run once per input, even where the head has a result per token.
_ONCE = ("pooler", "seq_relationship", "sop_classifier")


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return cast(Any, transformers.MODEL_MAPPING[type(config)])
