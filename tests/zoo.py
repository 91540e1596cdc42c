"""Tiny random models of every family with every head, their inputs, and a naive reference of Drop-and-Restore."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lat_optuna.length_config import LengthConfig
from lat_optuna.model.families import family_of, head_kind
from lat_optuna.model.significance import reference_rows

VOCABULARY = 60
LAYERS = 3

_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
# Large weights: attention that is far from uniform, so that which rows are kept is no matter of rounding.
_TEXT |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 66, "initializer_range": 0.4, "num_labels": 2}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 16, "n_heads": 4, "hidden_dim": 24, "n_layers": LAYERS}
_DISTILBERT |= {"max_position_embeddings": 66, "initializer_range": 0.4, "num_labels": 2}
_IMAGE = {"image_size": 12, "patch_size": 3, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
_IMAGE |= {"num_hidden_layers": LAYERS, "initializer_range": 0.4, "num_labels": 2}
_MODERNBERT = _TEXT | {"local_attention": 6, "global_attn_every_n_layers": 3, "initializer_cutoff_factor": 2.0}
_MODERNBERT |= {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}

_HEADS = ("Model", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")
_HEADS += ("ForMultipleChoice", "ForMaskedLM")


@dataclass(frozen=True)
class Case:
    """One model: ``config(**settings)`` and the class of its head."""

    name: str
    head: str
    config: str
    settings: dict[str, Any]

    def build(self, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
        """The model in evaluation mode; the same weights every time."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings, **changes)
        config._attn_implementation = attention
        model = getattr(transformers, self.head)(config)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "bias" in name:
                    weights.normal_(0, 0.1)
        return model.eval()


def _cases() -> Iterator[Case]:
    for prefix, settings, heads in (
        ("Bert", _TEXT, (*_HEADS, "ForNextSentencePrediction", "ForPreTraining")),
        ("Roberta", _TEXT, _HEADS),
        ("XLMRoberta", _TEXT, _HEADS),
        ("Electra", _TEXT | {"embedding_size": 12}, (*_HEADS, "ForPreTraining")),
        ("DistilBert", _DISTILBERT, _HEADS),
        ("Albert", _TEXT | {"embedding_size": 12}, (*_HEADS, "ForPreTraining")),
        ("ModernBert", _MODERNBERT, _HEADS),
        ("ViT", _IMAGE, ("Model", "ForImageClassification")),
        ("DeiT", _IMAGE, ("Model", "ForImageClassification", "ForImageClassificationWithTeacher")),
    ):
        for head in heads:
            yield Case(f"{prefix}{head}", f"{prefix}{head}", f"{prefix}Config", settings)
    mean = _MODERNBERT | {"classifier_pooling": "mean"}
    yield Case("ModernBert-mean", "ModernBertForSequenceClassification", "ModernBertConfig", mean)
    groups = _TEXT | {"embedding_size": 12, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}
    yield Case("Albert-groups", "AlbertForTokenClassification", "AlbertConfig", groups)


CASES = {case.name: case for case in _cases()}
TEXT_CASES = [name for name in CASES if not name.startswith(("ViT", "DeiT"))]
ONE_A_FAMILY = ["BertForSequenceClassification", "BertForQuestionAnswering", "RobertaForTokenClassification"]
ONE_A_FAMILY += ["XLMRobertaForSequenceClassification", "ElectraForMaskedLM", "DistilBertForQuestionAnswering"]
ONE_A_FAMILY += ["AlbertForQuestionAnswering", "Albert-groups", "ModernBertForSequenceClassification"]
ONE_A_FAMILY += [
    "ModernBertForTokenClassification",
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
]


def image_tokens(model: PreTrainedModel) -> int:
    return 16 + (2 if model.config.model_type == "deit" else 1)


def inputs_for(
    model: PreTrainedModel, ns: Sequence[int], pad_to: int | None = None, left: bool = False, mask: bool = True
) -> dict[str, torch.Tensor]:
    """A batch of examples with ``ns`` real tokens; example i is the same whatever it is padded to, and with whom.

    Images take the number of examples only. Multiple choice: one question with ``len(ns)`` choices.
    """
    if model.config.model_type in ("vit", "deit"):
        pixels = [torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(n)) for n in ns]
        return {"pixel_values": torch.stack(pixels)}
    width = pad_to or max(ns)
    ids = torch.full((len(ns), width), model.config.pad_token_id)
    real = torch.zeros(len(ns), width, dtype=torch.long)
    for row, n in enumerate(ns):
        where = slice(width - n, width) if left else slice(0, n)
        ids[row, where] = torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(100 + n))
        real[row, where] = 1
    batch = {"input_ids": ids}
    if mask:
        batch["attention_mask"] = real
    if left and "roberta" not in model.config.model_type:  # which reads positions off its input ids
        batch["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    if type(model).__name__.endswith("ForMultipleChoice"):
        # DistilBERT's head hands position_ids on as they come.
        flat = ("position_ids",) if model.config.model_type == "distilbert" else ()
        batch = {name: value if name in flat else value[None] for name, value in batch.items()}
    return batch


def results(model: PreTrainedModel, outputs: Any, ns: Sequence[int], left: bool = False) -> list[list[torch.Tensor]]:
    """What each example gets out of a model, without what belongs to padding."""
    per_token = head_kind(model) != "sequence"
    found = []
    for row, n in enumerate(ns):
        parts = []
        for name, value in outputs.items():
            if name == "loss":
                continue
            if type(model).__name__.endswith("ForMultipleChoice"):
                value = value.view(-1, 1)
            whole = not per_token or name in ("pooler_output", "seq_relationship_logits", "sop_logits")
            image = model.config.model_type in ("vit", "deit")
            parts.append(value[row] if whole or image else value[row, -n:] if left else value[row, :n])
        found.append(parts)
    return found


def assert_close(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]], atol: float = 2e-5) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=1e-4)


# ------------------------------------------------------------------------------------------- the naive reference


@contextmanager
def reference(model: PreTrainedModel, config: LengthConfig, n: int, restored: bool) -> Iterator[list[list[int]]]:
    """Inside, an *unadapted* eager model runs one unpadded example by the definition: Python loops and hooks.

    Args:
        model: Unadapted, with eager attention.
        config: The configuration.
        n: Tokens of the example.
        restored: Whether dropped vectors come back.

    Yields:
        The positions that each layer keeps, filled in as the layers run.
    """
    base = model.base_model
    family = family_of(base.config)
    groups = list(family.groups(base)) if family.groups else [base]
    layers = [layer for group in groups for layer in family.layers(group)]
    counts = config.at_length(n)
    kept: list[list[int]] = []
    aside: dict[int, torch.Tensor] = {}
    weights: list[torch.Tensor] = []

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = torch.tensor(kept[-1] if kept else range(n))
        mask = None
        if "position_embeddings" in kwargs:
            kwargs = {**kwargs, "position_embeddings": tuple(x[:, positions] for x in kwargs["position_embeddings"])}
            if layer.attention_type == "sliding_attention":
                far = (positions[:, None] - positions[None, :]).abs() > layer.config.sliding_window
                mask = torch.zeros(far.shape).masked_fill(far, -1e30)[None, None]
        if len(args) > 1:
            args = (args[0], mask, *args[2:])
        else:
            kwargs = {**kwargs, "attention_mask": mask}
        return args, kwargs

    def after(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        rows = reference_rows(weights.pop()[0], counts[len(kept)], family.protected)
        positions = kept[-1] if kept else list(range(n))
        for row, position in enumerate(positions):
            if row not in rows:
                aside[position] = args[0][:, row]
        kept.append([positions[row] for row in rows])
        return output[:, rows]

    def finish(module: Any, args: Any, outputs: Any) -> Any:
        if restored:
            norm = family.final_norm(base) if family.final_norm else nn.Identity()
            back = {position: norm(vector) for position, vector in aside.items()}
            back |= {position: outputs.last_hidden_state[:, row] for row, position in enumerate(kept[-1])}
            outputs.last_hidden_state = torch.stack([back[position] for position in range(n)], 1)
        return outputs

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
        hooks.append(_attention_of(layer).register_forward_hook(lambda m, a, output: weights.append(output[1])))
    hooks.append(base.register_forward_hook(finish))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _attention_of(layer: nn.Module) -> nn.Module:
    found: Callable[[str], bool] = lambda name: name.endswith("SelfAttention") or name in _ATTENTIONS  # noqa: E731
    return next(module for module in layer.modules() if found(type(module).__name__))


_ATTENTIONS = ("AlbertAttention", "ModernBertAttention", "ViTAttention", "DeiTAttention")


def wrong_in_threads(model, batch, configs):
    """Runs one model with several configurations at once; the configurations whose start logits were not their own."""
    expected = []
    for config in configs:
        with model.at(config), torch.no_grad():
            expected.append(model(**batch).start_logits)
    wrong, done, start = [], [], threading.Barrier(len(configs))

    def work(config, right):
        start.wait()
        for _ in range(15):
            with model.at(config), torch.no_grad():
                if not torch.equal(model(**batch).start_logits, right):
                    wrong.append(config)
        done.append(config)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(configs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(configs)
    return wrong
