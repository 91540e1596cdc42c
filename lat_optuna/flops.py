"""FLOPs of a length configuration, by arithmetic: 2 x multiply-adds, significance included.

The numbers equal what ``torch.utils.flop_counter.FlopCounterMode`` counts on the adapted model under
``sdpa_kernel(SDPBackend.MATH)`` with dropout off. Significance sums probabilities that the layer computes anyway: it
adds numbers, but multiplies none. What it does cost is counted: a layer that drops projects and scores all rows that
enter it; by [CLS] alone (``adapt(..., significance="cls")``), its one query and one row of scores more.

Where the last layer gives [CLS] alone (``last_layer="cls"``), the dense model saves as well. Its FLOPs are counted with
the same economy then: the ratio of a configuration to the dense model tells what dropping saves, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from lat_optuna.length_config import LengthConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Rows = TypeVar("Rows", int, np.ndarray)
"""Numbers of rows, one or many."""


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
        protected: Rows that always stay: [CLS], DeiT's distillation token.
        fused: Whether one matrix makes query, key and value: of rows that go, the query is made all the same.
        significance: As the model was adapted.
        last_layer: As the model was adapted.
    """

    layers: int
    per_row_in: int
    per_pair: int
    per_row_out: int
    per_token: int
    per_example: int
    protected: int = 1
    fused: bool = False
    significance: Literal["all", "cls"] = "all"
    last_layer: Literal["all", "cls"] = "all"

    @classmethod
    def of(cls, model: PreTrainedModel | PreTrainedConfig) -> Architecture:
        """Read the architecture off a model, adapted or not.

        Args:
            model: The model; or its transformers configuration, which names the head in ``architectures`` (without
                it, the bare encoder is counted). No weights are made for a configuration. The options of ``adapt``
                are read off an adapted model; else they are its defaults.

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
        return cls(
            num_layers(model),
            per_row_in,
            per_pair,
            in_layer - per_row_in,
            per_token,
            per_example,
            family.protected,
            family.fused,
            getattr(base, "_length_significance", "all"),
            getattr(base, "_length_last_layer", "all"),
        )

    def example_flops(self, config: LengthConfig | None, n: int) -> int:
        """One example of ``n`` real tokens by itself: the definition of cost.

        Args:
            config: The length configuration; ``None`` is dense.
            n: Real tokens (of images: patches and special tokens).

        Raises:
            ValueError: The configuration has another number of layers, or ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError(f"an input has at least 1 token, not {n}")
        return self._widest(config, [n])

    def batch_flops(self, config: LengthConfig | None, ns: Sequence[int]) -> int:
        """What a batch really runs: every example is as wide as the longest one.

        Args:
            config: The length configuration; ``None`` is dense.
            ns: Real tokens of each example (of multiple choice: of each choice), padded on the right.
        """
        return len(ns) * self._widest(config, ns) if ns else 0

    def _widest(self, config: LengthConfig | None, ns: Sequence[int]) -> int:
        """FLOPs of one example of a batch, each being as wide as the longest."""
        self._check(config)
        rows = max(ns)
        total = self.per_token * rows + self.per_example
        # A longer example keeps at least as many rows in every layer, so the longest sets the width everywhere. In a
        # layer where it drops nothing, a shorter one may all the same.
        kept = [(n,) * self.layers if config is None else config.at_length(n) for n in set(ns)]
        before = tuple(set(ns))
        for layer in range(self.layers):
            after = tuple(lengths[layer] for lengths in kept)
            if layer == self.layers - 1 and self.last_layer == "cls":
                total += self._known(rows, self.protected)
            else:
                total += self._layer(rows, max(after), after != before)
            rows, before = max(after), after
        return 2 * total

    def _layer(self, rows: Rows, kept: Rows, drops: bool) -> Rows:
        """Multiply-adds of a layer, which drops or does not."""
        if drops and self.significance == "cls":
            votes = (0 if self.fused else self.per_row_in // 3) + rows * self.per_pair
            return self._known(rows, kept) + self.protected * votes
        return rows * self.per_row_in + (rows + kept) * rows * self.per_pair + kept * self.per_row_out

    def _known(self, rows: Rows, kept: Rows) -> Rows:
        """Multiply-adds of a layer of whose ``rows`` it is known before attention that ``kept`` stay."""
        query = self.per_row_in // 3 * (rows if self.fused else kept)
        return 2 * (self.per_row_in // 3) * rows + query + 2 * kept * rows * self.per_pair + kept * self.per_row_out

    def mean_flops(self, config: LengthConfig | None, lengths: Iterable[int] | Mapping[int, int]) -> float:
        """Mean of :meth:`example_flops`: the cost of a configuration on a task.

        Args:
            config: The length configuration; ``None`` is dense.
            lengths: Real tokens of each example; or how many examples there are of each length.

        Raises:
            ValueError: The configuration has another number of layers, or there are no lengths.
        """
        counts = lengths if isinstance(lengths, Mapping) else Counter(int(n) for n in lengths)
        if not counts:
            raise ValueError("the mean over no examples is not defined; give at least one length")
        self._check(config)
        # All layers and lengths at once: a search asks for the cost of hundreds of candidates a trial.
        ns, times = np.array(list(counts)), np.array(list(counts.values()))
        kept = np.broadcast_to(ns, (self.layers, len(ns))) if config is None else config.at_lengths(ns)
        rows = np.concatenate([ns[None], kept[:-1]])
        layers = self._layer(rows, kept, False)
        if self.significance == "cls":
            layers = np.where(kept < rows, self._layer(rows, kept, True), layers)
        if self.last_layer == "cls":
            layers[-1] = self._known(rows[-1], np.array(self.protected))
        each = self.per_token * ns + self.per_example + layers.sum(0)
        return 2 * int(each @ times) / int(times.sum())

    def _check(self, config: LengthConfig | None) -> None:
        if config is not None and config.num_layers != self.layers:
            raise ValueError(f"the configuration {config} has {config.num_layers} layers, the model has {self.layers}")


# Parts of a model that run once per input, even where the head has a result per token.
_ONCE = ("pooler", "seq_relationship", "sop_classifier")


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return cast(Any, transformers.MODEL_MAPPING[type(config)])
