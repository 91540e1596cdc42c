"""Where each architecture keeps its layers: one small entry a family. ``docs/adding-a-family.md`` adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, each (batch, heads, rows, head size)."""


def _text_size(base: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Rows of a text input."""
    given = arguments.get("input_ids")
    if given is None:
        given = arguments.get("inputs_embeds")
    if given is None:
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    return given.shape[1]


@dataclass(frozen=True)
class Family:
    """What Drop-and-Restore needs to know of an architecture.

    Attributes:
        model_types: ``config.model_type`` of the models it covers.
        layers: Base encoder (or group, see ``groups``) to its layers in order.
        project: Layer and its input (batch, rows, hidden) to query, key and value of all rows. Keyword arguments of
            the layer (rotary embeddings, say) come as the third argument.
        finish: Layer, context (batch, kept, heads * head size) and the same rows of the layer's input to its output.
        dropout: Layer to its dropout on attention probabilities.
        protected: How many of the first rows always stay.
        tokens: Base encoder and the arguments of its ``forward`` to the number of rows of its input.
        final_norm: Base encoder to what it applies after the last layer (pre-norm models).
        groups: Base encoder to modules that hold layers and are called again and again (ALBERT).
        follow: Keyword arguments of a layer and (batch, width) positions to keyword arguments for these rows only.
        window: Layer to how far it looks to either side; ``None`` is everywhere.
    """

    model_types: tuple[str, ...]
    layers: Callable[[Any], Sequence[nn.Module]]
    project: Callable[[Any, torch.Tensor, Mapping[str, Any]], Heads]
    finish: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    dropout: Callable[[Any], float]
    protected: int = 1
    tokens: Callable[[Any, Mapping[str, Any]], int] = _text_size
    final_norm: Callable[[Any], nn.Module] | None = None
    groups: Callable[[Any], Sequence[nn.Module]] | None = None
    follow: Callable[[dict[str, Any], torch.Tensor], dict[str, Any]] | None = None
    window: Callable[[Any], int | None] | None = None


def _heads(hidden: torch.Tensor, projections: Sequence[nn.Module], head_size: int) -> Heads:
    """(batch, rows, hidden) through three projections to (batch, heads, rows, head size) each."""
    query, key, value = (each(hidden).unflatten(-1, (-1, head_size)).transpose(1, 2) for each in projections)
    return query, key, value


# ---------------------------------------------------------------------------------------------- BERT and its kin


def _bert_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> Heads:
    own = layer.attention.self
    return _heads(hidden, (own.query, own.key, own.value), own.attention_head_size)


def _bert_finish(layer: Any, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return layer.feed_forward_chunk(layer.attention.output(context, residual))


BERT = Family(
    model_types=("bert", "roberta", "xlm-roberta", "electra"),
    layers=lambda base: base.encoder.layer,
    project=_bert_project,
    finish=_bert_finish,
    dropout=lambda layer: layer.attention.self.dropout.p,
)


def _distilbert_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> Heads:
    own = layer.attention
    return _heads(hidden, (own.q_lin, own.k_lin, own.v_lin), own.attention_head_size)


def _distilbert_finish(layer: Any, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + residual)
    return layer.output_layer_norm(layer.ffn(attended) + attended)


DISTILBERT = Family(
    model_types=("distilbert",),
    layers=lambda base: base.transformer.layer,
    project=_distilbert_project,
    finish=_distilbert_finish,
    dropout=lambda layer: layer.attention.dropout.p,
)

FAMILIES = (BERT, DISTILBERT)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Raises:
        ValueError: No family covers it, or it is a decoder; the message lists the families and how to add one.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            break
    else:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise ValueError(
            f"models of type {config.model_type!r} cannot be adapted; those of type {known} can. To add a family:\n"
            "1. write a Family in lat_optuna/model/families.py: where its layers are, how one projects and finishes;\n"
            "2. append it to FAMILIES;\n"
            "3. add a tiny model of it to tests/model/zoo.py, which every test runs on (docs/adding-a-family.md)."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            "decoders and models with cross-attention cannot be adapted, as dropped tokens would be missing from what "
            "follows; load the encoder with is_decoder=False and add_cross_attention=False"
        )
    return family


# ------------------------------------------------------------------------------------------------------- heads

HeadKind = Literal["encoder", "sequence", "token"]

_SEQUENCE_HEADS = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
)


def head_kind(model: PreTrainedModel) -> HeadKind:
    """Whether a model ends with its base encoder, a result per input, or a result per token."""
    if model.base_model is model:
        return "encoder"
    return "sequence" if type(model).__name__.endswith(_SEQUENCE_HEADS) else "token"


def reads_first_row(model: PreTrainedModel) -> bool:
    """Whether the head needs nothing but the vectors that are always kept."""
    if head_kind(model) != "sequence":
        return False
    config = model.config
    mean = getattr(config, "classifier_pooling", "cls") != "cls"
    return not mean and getattr(config, "summary_type", "first") == "first"
