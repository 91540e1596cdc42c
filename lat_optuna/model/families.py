"""Where each architecture keeps its layers: one small entry a family. ``docs/adding-a-family.md`` adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from lat_optuna.model.rows import take_rows

Heads = tuple[torch.Tensor, ...]
"""Query, key and value (or those of them that were asked for), each (batch, heads, rows, head size)."""
ALL, QUERY, KEY_VALUE = slice(0, 3), slice(0, 1), slice(1, 3)


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
            the layer (rotary embeddings, say) come as the third argument, and as the fourth which of the three
            are wanted: all, ``QUERY`` or ``KEY_VALUE``.
        finish: Layer, context (batch, kept, heads * head size) and the same rows of the layer's input to its output.
        dropout: Layer to its dropout on attention probabilities.
        protected: How many of the first rows always stay.
        tokens: Base encoder and the arguments of its ``forward`` to the number of rows of its input.
        final_norm: Base encoder to what it applies after the last layer (pre-norm models).
        groups: Base encoder to modules that hold layers and are called again and again (ALBERT).
        follow: Keyword arguments of a layer and (batch, width) positions to keyword arguments for these rows only.
        window: Layer to how far it looks to either side; ``None`` is everywhere.
        fused: Whether one matrix makes query, key and value, so that none comes cheaper without the others.
    """

    model_types: tuple[str, ...]
    layers: Callable[[Any], Sequence[nn.Module]]
    project: Callable[[Any, torch.Tensor, Mapping[str, Any], slice], Heads]
    finish: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    dropout: Callable[[Any], float]
    protected: int = 1
    tokens: Callable[[Any, Mapping[str, Any]], int] = _text_size
    final_norm: Callable[[Any], nn.Module] | None = None
    groups: Callable[[Any], Sequence[nn.Module]] | None = None
    follow: Callable[[dict[str, Any], torch.Tensor], dict[str, Any]] | None = None
    window: Callable[[Any], int | None] | None = None
    fused: bool = False


def project_heads(hidden: torch.Tensor, projections: Sequence[nn.Module], head_size: int) -> Heads:
    """(batch, rows, hidden) through each projection to (batch, heads, rows, head size)."""
    if len(projections) > 1 and torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))  # once instead of in every projection
    return tuple(each(hidden).unflatten(-1, (-1, head_size)).transpose(1, 2) for each in projections)


# ---------------------------------------------------------------------------------------------- BERT and its kin


def _bert_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any], parts: slice = ALL) -> Heads:
    own = layer.attention.self
    return project_heads(hidden, (own.query, own.key, own.value)[parts], own.attention_head_size)


def _bert_finish(layer: Any, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return layer.feed_forward_chunk(layer.attention.output(context, residual))


BERT = Family(
    model_types=("bert", "roberta", "xlm-roberta", "electra"),
    layers=lambda base: base.encoder.layer,
    project=_bert_project,
    finish=_bert_finish,
    dropout=lambda layer: layer.attention.self.dropout.p,
)


def _distilbert_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any], parts: slice = ALL) -> Heads:
    own = layer.attention
    return project_heads(hidden, (own.q_lin, own.k_lin, own.v_lin)[parts], own.attention_head_size)


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


def _albert_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any], parts: slice = ALL) -> Heads:
    own = layer.attention
    return project_heads(hidden, (own.query, own.key, own.value)[parts], own.attention_head_size)


def _albert_finish(layer: Any, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    own = layer.attention
    attended = own.LayerNorm(residual + own.output_dropout(own.dense(context)))
    return layer.full_layer_layer_norm(layer.ff_chunk(attended) + attended)


ALBERT = Family(
    model_types=("albert",),
    layers=lambda group: group.albert_layers,
    groups=lambda base: base.encoder.albert_layer_groups,
    project=_albert_project,
    finish=_albert_finish,
    dropout=lambda layer: layer.attention.attention_dropout.p,
)


# ------------------------------------------------------------------------------- pre-norm: ModernBERT, ViT, DeiT


def _modernbert_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any], parts: slice = ALL) -> Heads:
    own = layer.attn
    projected = own.Wqkv(layer.attn_norm(hidden)).unflatten(-1, (3, -1, own.head_dim))
    query, key, value = (each.transpose(1, 2) for each in projected.unbind(-3))
    cos, sin = kwargs["position_embeddings"]
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return (query, key, value)[parts]


def _modernbert_finish(layer: Any, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    hidden = residual + layer.attn.out_drop(layer.attn.Wo(context))
    return hidden + layer.mlp(layer.mlp_norm(hidden))


def _modernbert_follow(kwargs: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
    def of_kept(table: torch.Tensor) -> torch.Tensor:
        """(1 or batch, tokens, head size) to (batch, width, head size); filler takes the last token's."""
        valid = positions.clamp(max=table.size(1) - 1)
        return table[0][valid] if table.size(0) == 1 else take_rows(table, valid)

    cos, sin = kwargs["position_embeddings"]
    return {**kwargs, "position_embeddings": (of_kept(cos), of_kept(sin))}


MODERNBERT = Family(
    model_types=("modernbert",),
    layers=lambda base: base.layers,
    project=_modernbert_project,
    finish=_modernbert_finish,
    dropout=lambda layer: layer.attn.attention_dropout,
    final_norm=lambda base: base.final_norm,
    follow=_modernbert_follow,
    fused=True,
    window=lambda layer: layer.config.sliding_window if layer.attention_type == "sliding_attention" else None,
)


def _vit_project(layer: Any, hidden: torch.Tensor, kwargs: Mapping[str, Any], parts: slice = ALL) -> Heads:
    own = layer.attention
    projections = (own.q_proj, own.k_proj, own.v_proj)[parts]
    return project_heads(layer.layernorm_before(hidden), projections, own.head_dim)


def _vit_finish(layer: Any, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    hidden = residual + layer.dropout(layer.attention.o_proj(context))
    return hidden + layer.dropout(layer.mlp(layer.layernorm_after(hidden)))


def _vit_size(base: Any, arguments: Mapping[str, Any]) -> int:
    """Patches of the image, and the special tokens before them."""
    pixels = arguments.get("pixel_values")
    if pixels is None:
        raise ValueError("You have to specify pixel_values")
    height, width = base.embeddings.patch_embeddings.projection.stride
    special = base.embeddings.position_embeddings.size(1) - base.embeddings.patch_embeddings.num_patches
    return (pixels.shape[-2] // height) * (pixels.shape[-1] // width) + special


VIT = Family(
    model_types=("vit",),
    layers=lambda base: base.layers,
    project=_vit_project,
    finish=_vit_finish,
    dropout=lambda layer: layer.attention.attention_dropout,
    tokens=_vit_size,
    final_norm=lambda base: base.layernorm,
)

# The second token is distillation's; its head reads it.
DEIT = replace(VIT, model_types=("deit",), protected=2)

FAMILIES = [BERT, DISTILBERT, ALBERT, MODERNBERT, VIT, DEIT]
"""Searched in this order. A program may append a family of its own before it adapts a model."""


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
            "3. add a tiny model of it to tests/zoo.py, which every test runs on (docs/adding-a-family.md)."
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
    if type(model).__name__ == "ModernBertForMultipleChoice":
        return False  # looks for [CLS] where the attention mask of the whole input begins
    config = model.config
    mean = getattr(config, "classifier_pooling", "cls") != "cls"
    return not mean and getattr(config, "summary_type", "first") == "first"
