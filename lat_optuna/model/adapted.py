"""``adapt(model)``: the one door.

Three kinds of modules of the user's own model change their class to a subclass made here: the model on top (it gains
``length_config`` and ``at``), its base encoder (it plans a forward pass and restores dropped vectors after it) and the
layers (they drop). Nothing is wrapped or copied; names, parameters, hooks and signatures stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from lat_optuna.length_config import LengthConfig
from lat_optuna.model import kernels
from lat_optuna.model.families import ALL, KEY_VALUE, QUERY, Family, family_of, head_kind, reads_first_row
from lat_optuna.model.plan import Pass, make_plan, restore
from lat_optuna.model.rows import Choice, is_exporting, take_rows
from lat_optuna.model.significance import (
    Keep,
    as_choice,
    attend_and_choose,
    attend_from,
    choose,
    first_row_significance,
)

Mode = Literal["restore", "eliminate"]
Significance = Literal["all", "cls"]
LastLayer = Literal["all", "cls"]
Model = TypeVar("Model", bound=PreTrainedModel)
Override = tuple[LengthConfig | None, frozenset[int], bool]

PASS = "length_pass"
OFFSET = "length_offset"

_overrides: ContextVar[Mapping[int, Override]] = ContextVar("lat_optuna_overrides", default={})  # noqa: B039


def adapt(
    model: Model,
    mode: Literal["auto", "restore", "eliminate"] = "auto",
    significance: Significance | None = None,
    last_layer: LastLayer | None = None,
) -> Model:
    """Let a model run at any length per layer (sections 2.2 and 3.3). Works in place.

    Dense it stays what it was, bit for bit, until a configuration is set::

        model = adapt(AutoModelForSequenceClassification.from_pretrained(...))
        model.length_config = LengthConfig.constant_ratio(0.2, num_layers(model), 128)

    With a configuration, outputs and options that it cannot honour (``output_attentions``, ``output_hidden_states``)
    raise a ``ValueError``, and the values of padding rows in a restored output mean nothing. With padding on the left,
    the pooled output is that of the first real token.

    Args:
        model: A transformers model with any head, or a bare encoder.
        mode: ``"restore"`` puts dropped vectors back in place after the last layer, ``"eliminate"`` does not: the
            encoder's output is short. ``"auto"`` eliminates where the head reads the first token alone.
        significance: Whose attention tells what a word vector is worth. ``"all"`` (the paper): every real token's.
            ``"cls"``: that of [CLS] alone; the kept tokens are known before attention then, and nothing of the
            others is computed but key and value. It keeps other tokens: train, search and deploy with the same.
        last_layer: ``"cls"``: the last layer gives [CLS] alone, with or without a configuration; its length in a
            configuration counts for nothing then. For heads that read nothing else; results stay the same but for
            rounding. ``"all"``: it is a layer like the others.

    Returns:
        The same object. Adapting it again changes only what is named; at first, the last two are ``"all"``.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: No family covers the architecture (the message says which there are), it is a decoder, an option
            is unknown, the head needs more than ``mode`` or ``last_layer`` leave it, or [CLS] does not see all
            tokens in every layer and ``significance`` is ``"cls"``.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"adapt() takes a transformers model, not {type(model).__name__}; adapt it before it is wrapped"
        )
    if mode not in ("auto", "restore", "eliminate"):
        raise ValueError(f"mode must be 'auto', 'restore' or 'eliminate', not {mode!r}")
    for name, value in (("significance", significance), ("last_layer", last_layer)):
        if value not in (None, "all", "cls"):
            raise ValueError(f"{name} must be 'all' or 'cls', not {value!r}")
    if mode == "eliminate" and head_kind(model) == "token":
        raise ValueError(f"{type(model).__name__} needs a vector for every token: mode 'eliminate' leaves it none")
    base: Any = model.base_model
    family = family_of(base.config)
    if significance == "cls" and family.window is not None:
        raise ValueError(
            f"significance 'cls' needs layers in which [CLS] attends to every token; those of "
            f"{base.config.model_type} have sliding windows"
        )
    first = not is_adapted(model)
    chosen: Mode = "eliminate" if reads_first_row(model) else "restore"
    if mode != "auto":
        chosen = mode
    elif not first:
        chosen = base._length_mode
    economical = last_layer or getattr(base, "_length_last_layer", "all")
    if economical == "cls" and (chosen == "restore" or not (reads_first_row(model) or head_kind(model) == "encoder")):
        raise ValueError(
            f"last_layer 'cls' leaves nothing but [CLS], and {type(model).__name__} in mode {chosen!r} needs more; "
            "it is for heads that read [CLS] alone, in mode 'eliminate'"
        )
    if first:
        if not is_adapted(base):
            _adapt_encoder(base, family)
        if model is not base:
            _change_class(model, "model")
    base._length_mode = chosen
    base._length_last_layer = economical
    base._length_significance = significance or getattr(base, "_length_significance", "all")
    return model


def _adapt_encoder(base: Any, family: Family) -> None:
    groups: list[Any] = list(family.groups(base)) if family.groups else [base]
    for group in groups:
        layers: list[Any] = list(family.layers(group))
        for index, layer in enumerate(layers):
            layer._length_index = index
            _change_class(layer, "layer")
        if family.groups:
            group._length_layers = len(layers)
            _change_class(group, "group")
    base._length_config = None
    _change_class(base, "encoder")


def is_adapted(model: nn.Module) -> bool:
    """Whether ``adapt`` has been called on this model."""
    return isinstance(model, LengthAdaptive)


def num_layers(model: PreTrainedModel) -> int:
    """How many layers a configuration of this model has; of a layer that is used many times every use counts."""
    return _layer_count(cast(Any, model.base_model))


@contextmanager
def at(
    model: PreTrainedModel,
    config: LengthConfig | None,
    skip_layers: Collection[int] = frozenset(),
    drop_everywhere: bool = False,
) -> Iterator[PreTrainedModel]:
    """Run an adapted model with a configuration inside a ``with`` block, in this thread only.

    Args:
        model: An adapted model.
        config: The configuration; ``None`` is dense.
        skip_layers: Layers, counted from 0, that are skipped (LayerDrop, section 3.1). The next layer that runs
            applies a skipped layer's reduction; where none follows, it is not applied.
        drop_everywhere: Whether layers that keep everything run as layers that drop, too. It takes longer, and a
            compiled model needs one graph for all configurations instead of one for every set of dropping layers.

    Yields:
        The model.

    Raises:
        ValueError: The configuration or a skipped layer does not fit the model, or the model is not adapted.
    """
    if not is_adapted(model):
        raise ValueError("the model is not adapted; call lat_optuna.model.adapt(model) first")
    base: Any = model.base_model
    _check_config(base, config)
    layers = _layer_count(base)
    skipped = frozenset(skip_layers)
    if not skipped <= set(range(layers)):
        raise ValueError(f"skip_layers {sorted(skipped)} must lie in 0..{layers - 1}, the layers of the model")
    token = _overrides.set({**_overrides.get(), id(base): (config, skipped, drop_everywhere)})
    try:
        yield model
    finally:
        _overrides.reset(token)


class LengthAdaptive:
    """What an adapted model has beside what it had."""

    @property
    def length_config(self) -> LengthConfig | None:
        """The configuration that the model runs with; ``None`` is dense. :meth:`at` overrides it for a block."""
        return cast(Any, self).base_model._length_config

    @length_config.setter
    def length_config(self, config: LengthConfig | None) -> None:
        base = cast(Any, self).base_model
        _check_config(base, config)
        base._length_config = config

    def at(
        self, config: LengthConfig | None, skip_layers: Collection[int] = frozenset(), drop_everywhere: bool = False
    ) -> Any:
        """:func:`at` as a method: ``with model.at(config): ...``."""
        return at(cast(PreTrainedModel, self), config, skip_layers, drop_everywhere)


def _check_config(base: Any, config: LengthConfig | None) -> None:
    if config is None:
        return
    if not isinstance(config, LengthConfig):
        raise TypeError(f"a length configuration is a LengthConfig or None (dense), not {type(config).__name__}")
    layers = _layer_count(base)
    if config.num_layers != layers:
        raise ValueError(f"the configuration {config} has {config.num_layers} layers, the model has {layers}")


def _layer_count(base: Any) -> int:
    return base.config.num_hidden_layers * getattr(base.config, "inner_group_num", 1)


# ---------------------------------------------------------------------------------------- the base encoder


def _encoder_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """The base encoder's ``forward``: as it was when dense; else plan, run, restore."""
    dense = original.forward
    names = list(inspect.signature(dense).parameters)[1:]

    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        this = _begin(self, arguments, torch.compiler.is_compiling())
        if this is None:
            return dense(self, *args, **kwargs)
        as_tuple = not _option(self.config, arguments, "return_dict", True)
        outputs = dense(self, *args, **{**kwargs, "return_dict": True, PASS: this})
        if this.restores:
            norm = this.family.final_norm(self) if this.family.final_norm else None
            outputs.last_hidden_state = restore(this, outputs.last_hidden_state, norm)
        return outputs.to_tuple() if as_tuple else outputs

    return forward


# Planning reads a context variable and, with a mask, the device: compiled regions begin after it. What follows depends
# on which layers drop, but its numbers are symbols there: configurations with one pattern share one graph.
@torch.compiler.disable
def _begin(base: Any, arguments: Mapping[str, Any], compiling: bool) -> Pass | None:
    """The plan of this forward pass; ``None`` where it is dense."""
    config, skipped, everywhere = _overrides.get().get(id(base), (base._length_config, frozenset(), False))
    economical = base._length_last_layer == "cls"
    if config is None and not skipped and not economical:
        return None
    _refuse(base.config, arguments)
    family = family_of(base.config)
    tokens = family.tokens(base, arguments)
    first_rows = family.protected if economical else 0
    mask = arguments.get("attention_mask")
    plan = make_plan(config, skipped, _layer_count(base), tokens, mask, first_rows, compiling, everywhere)
    return Pass(plan, family, base.config, base._length_significance == "cls", base._length_mode == "restore")


def _option(config: Any, arguments: Mapping[str, Any], name: str, default: Any) -> Any:
    value = arguments.get(name)
    return getattr(config, name, default) if value is None else value


def _refuse(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise on what a forward pass that drops tokens cannot honour."""
    for name in ("output_attentions", "output_hidden_states"):
        if _option(config, arguments, name, False):
            raise ValueError(
                f"{name} cannot be honoured with a length configuration (or last_layer 'cls'): rows drop out on the way"
            )
    for name in ("encoder_hidden_states", "past_key_values"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be honoured with a length configuration: it is for decoders")
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise ValueError("with a length configuration, attention_mask must be a tensor of shape (batch, tokens)")


# -------------------------------------------------------------------------------------------------- layers


def _layer_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """A layer's ``forward``: as it was without a plan; else drop, or keep all."""
    dense = original.forward

    @functools.wraps(dense)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        this: Pass | None = kwargs.pop(PASS, None)
        if this is None:
            return dense(self, hidden_states, *args, **kwargs)
        index = kwargs.pop(OFFSET, 0) + self._length_index
        step = this.plan.steps[index]
        if not step.runs:
            return hidden_states
        if step.source is not None and this.family.follow:
            kwargs = this.family.follow(kwargs, this.choices[step.source].positions)
        if step.drops:
            return _drop(self, this, index, hidden_states, kwargs)
        if not self.training and kernels.attend(hidden_states):
            return _keep_all(self, this, index, hidden_states, kwargs)
        if step.source is not None:
            mask = _mask_after(self, this, step.source, hidden_states)
            if args:
                args = (mask, *args[1:])
            else:
                kwargs["attention_mask"] = mask
        return dense(self, hidden_states, *args, **kwargs)

    return forward


def _drop(layer: Any, this: Pass, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """One layer that keeps the most significant rows: only kept rows are computed to the end.

    Args:
        layer: The layer.
        this: The pass; gets the layer's choice and what entered the layer.
        index: Which layer of the pass this is.
        hidden: (batch, rows, hidden).
        kwargs: Keyword arguments of the layer.

    Returns:
        (batch, kept, hidden).
    """
    family, step = this.family, this.plan.steps[index]
    allowed = _allowed(layer, this, step.source, hidden)
    dropout = family.dropout(layer) if layer.training else 0.0
    known = this.choices.get(index)  # a layer that gradient checkpointing replays keeps to its choice
    keep = _keep(this, index)
    if step.first or this.by_first_row:
        choice, context = _choose_and_attend(layer, this, index, hidden, kwargs, allowed, keep, known, dropout)
    else:
        query, key, value = family.project(layer, hidden, kwargs, ALL)
        choice, context = attend_and_choose(query, key, value, allowed, keep, known, dropout)
    if known is None:
        this.choices[index] = choice
        if this.restores:
            this.entered[index] = hidden
    return family.finish(layer, context, choice.of(hidden))


def _keep_all(layer: Any, this: Pass, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """:func:`_drop` for a layer that drops nothing, where a kernel of ours attends sooner than torch's attention."""
    query, key, value = this.family.project(layer, hidden, kwargs, ALL)
    allowed = _allowed(layer, this, this.plan.steps[index].source, hidden)
    return this.family.finish(layer, attend_from(query, key, value, allowed), hidden)


def _keep(this: Pass, index: int) -> Keep:
    """Which rows may stay in a layer."""
    plan, step = this.plan, this.plan.steps[index]
    counts = plan.counts[index] if plan.counts is not None and step.ragged else None
    packed = not is_exporting() and (step.source is not None or not plan.padded_left)
    positions = None if step.source is None else this.choices[step.source].positions
    real = this.real_rows(step.source)
    return Keep(step.width, counts, real, this.family.protected, packed, positions, plan.tokens)


def _choose_and_attend(
    layer: Any,
    this: Pass,
    index: int,
    hidden: torch.Tensor,
    kwargs: dict[str, Any],
    allowed: torch.Tensor | None,
    keep: Keep,
    choice: Choice | None,
    dropout: float,
) -> tuple[Choice, torch.Tensor]:
    """Where the rows that stay are known before attention: queries, scores and context of no others."""
    family, step = this.family, this.plan.steps[index]
    query: torch.Tensor | None = None
    if family.fused:
        query, key, value = family.project(layer, hidden, kwargs, ALL)
    else:
        key, value = family.project(layer, hidden, kwargs, KEY_VALUE)

    def query_of(rows: torch.Tensor, flat: torch.Tensor | None = None) -> torch.Tensor:
        if query is not None:
            return take_rows(query.transpose(1, 2), rows, flat).transpose(1, 2)
        return family.project(layer, take_rows(hidden, rows, flat), kwargs, QUERY)[0]

    if choice is None:
        first = _first_rows(this, step.source, hidden)
        if step.first:
            choice = as_choice(first, keep, hidden.size(1))
        else:
            with torch.no_grad():  # a replay, which does not choose again, must save the same tensors
                votes = first_row_significance(query_of(first), key, allowed)
            choice = choose(votes, keep)
    kept = query_of(choice.rows, choice.flat)
    return choice, attend_from(kept, key, value, allowed, choice, dropout, few=step.first)


def _first_rows(this: Pass, source: int | None, hidden: torch.Tensor) -> torch.Tensor:
    """(batch, protected) rows of [CLS] (and of DeiT's distillation token)."""
    rows = torch.arange(this.family.protected, device=hidden.device).expand(hidden.size(0), -1)
    if source is None and this.plan.padded_left and this.plan.real is not None:
        rows = rows + this.plan.real.int().argmax(-1, keepdim=True)
    return rows


def _allowed(layer: Any, this: Pass, source: int | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """Which keys a query may look at, broadcastable to (batch, heads, queries, keys); ``None``: all of them."""
    real = this.real_rows(source)
    keys = None if real is None else real[:, None, None, :]
    window = this.family.window(layer) if this.family.window else None
    if window is None:
        return keys
    if source is None:
        positions = torch.arange(hidden.size(1), device=hidden.device)[None]
    else:
        positions = this.choices[source].positions
    near = ((positions[:, :, None] - positions[:, None, :]).abs() <= window)[:, None]
    return near if keys is None else near & keys


def _mask_after(layer: Any, this: Pass, source: int, hidden: torch.Tensor) -> Any:
    """The mask of the rows that ``source`` kept, in the form that the model's attention implementation takes."""
    implementation = this.config._attn_implementation
    if this.family.window and this.family.window(layer) is not None:
        allowed = _allowed(layer, this, source, hidden)
        assert allowed is not None
        return _as_mask(allowed, implementation, hidden)
    if source not in this.masks:
        real = this.real_rows(source)
        if real is None:
            this.masks[source] = None
        elif implementation in ("sdpa", "eager"):  # transformers' own way asks the device whether anything is masked
            this.masks[source] = _as_mask(real[:, None, None], implementation, hidden)
        else:
            this.masks[source] = create_bidirectional_mask(this.config, hidden, real)
    return this.masks[source]


def _as_mask(allowed: torch.Tensor, implementation: str, hidden: torch.Tensor) -> torch.Tensor:
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~allowed, lowest)
    raise ValueError(
        f"sliding windows over kept tokens need the attention implementation 'sdpa' or 'eager', not "
        f"{implementation!r}; load the model with attn_implementation='sdpa'"
    )


def _group_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """``forward`` of a group of layers that is called again and again: tells its layers how often it was."""
    dense = original.forward

    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        this: Pass | None = kwargs.get(PASS)
        if this is not None:
            kwargs[OFFSET] = this.groups * self._length_layers
            this.groups += 1
        return dense(self, *args, **kwargs)

    return forward


# ------------------------------------------------------------------------------------------------- classes

Role = Literal["model", "encoder", "layer", "group"]


def _change_class(module: nn.Module, role: Role) -> None:
    original: Any = type(module)
    module.__class__ = _adapted_class(original, role)


@functools.cache
def _adapted_class(original: Any, role: Role) -> type[nn.Module]:
    """A subclass that goes by its original's name: what transformers looks up by name stays what it was.

    Pickling and copying name the original and the role instead of this class, which no module holds.
    """

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        return _revive, (original, role), self.__dict__

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
    }
    if role == "encoder":
        namespace["forward"] = _encoder_forward(original)
    elif role == "layer":
        namespace["forward"] = _layer_forward(original)
    elif role == "group":
        namespace["forward"] = _group_forward(original)
    bases = (LengthAdaptive, original) if role in ("model", "encoder") else (original,)
    return type(original.__name__, bases, namespace)


def _revive(original: Any, role: Role) -> nn.Module:
    made = _adapted_class(original, role)
    return made.__new__(made)
