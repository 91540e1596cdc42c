"""A data set, its preprocessing and its metric, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "search", "validation", "test"]
"""``search`` and ``test`` are held out from the training rows, where that was asked for: what is searched on, and what
nobody looked at before."""


class Task(Protocol):
    """What training and evaluation need to know of a task.

    Attributes:
        name: Short name for titles and fingerprints: ``"glue/sst2"``.
        metric_name: The metric that people see: ``"accuracy"``, ``"f1"``. In percent, up is better.
        max_length: Longest input in tokens, special tokens included.
        tokenizer: The tokenizer that made the features.
    """

    name: str
    metric_name: str
    max_length: int
    tokenizer: PreTrainedTokenizerBase

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Features to a batch of tensors, padded to the batch's longest (labels included where there are any)."""
        ...

    def build_model(self, checkpoint: str) -> PreTrainedModel:
        """A model with this task's head on the weights of ``checkpoint`` (a hub name or a folder)."""
        ...

    def features(self, split: Split) -> datasets.Dataset:
        """Tokenised, not padded: ``input_ids``, ``attention_mask``, labels as the model's ``forward`` names them."""
        ...

    def predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """A batch of model outputs as one array an example, without padding, on the CPU in fp32."""
        ...

    def score(self, split: Split, predictions: Sequence[np.ndarray]) -> dict[str, float]:
        """Metrics in percent, ``metric_name`` first, from one prediction a feature in the order of ``features``."""
        ...

    # A task whose metric is the mean over its examples may tell it of each, as ``score_examples``; see
    # :class:`lat_optuna.tasks.text_classification.Classification`. One whose examples may have several features tells
    # whose feature is whose, as ``examples``. One that knows the right answers' probability has ``log_probs``, and one
    # whose predictions may be compared with others, feature by feature, ``agreement``.

    def fingerprint(self, split: Split) -> str:
        """Hash of the split's rows and of the preprocessing: equal where values may be compared."""
        ...
