"""What one forward pass will do, decided before its first layer runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedConfig

from lat_optuna.length_config import MIN_LENGTH, LengthConfig
from lat_optuna.model.families import Family
from lat_optuna.model.rows import Choice, is_exporting, take_rows


@dataclass(frozen=True)
class Step:
    """What one layer does with the rows of a batch. Numbers of the host: reading them costs no synchronisation.

    Attributes:
        runs: Whether LayerDrop lets the layer run.
        drops: Whether some example loses rows here.
        width: Rows that leave the layer, those of the example with the most.
        ragged: Whether some examples leave with fewer rows than ``width``.
        source: The layer before this one that dropped last, whose choice the rows that enter follow; ``None`` where
            the input enters as it came.
        first: Whether the first rows alone leave the layer, as nobody reads the others.
    """

    runs: bool
    drops: bool
    width: int
    ragged: bool
    source: int | None
    first: bool = False


@dataclass(frozen=True)
class Plan:
    """What every layer will do with a batch.

    Attributes:
        steps: One a layer.
        tokens: Rows of the input, padding included.
        real: (batch, tokens) bool, which rows are real; ``None`` where all are.
        counts: Rows that each layer keeps, one (batch,) tensor a layer; ``None`` where all examples are equally long.
        padded_left: Whether an example's first real row may be another than its first one.
    """

    steps: tuple[Step, ...]
    tokens: int
    real: torch.Tensor | None
    counts: tuple[torch.Tensor, ...] | None
    padded_left: bool = False


@dataclass
class Pass:
    """One forward pass: its plan, and what the layers wrote down on the way.

    It travels through the layers as a keyword argument. Every entry of ``choices`` and ``entered`` is written once,
    under the layer's index; a layer that gradient checkpointing replays finds its own choice again and keeps to it.

    Attributes:
        plan: What the layers will do.
        family: The model's family.
        config: The base encoder's configuration (transformers').
        choices: By layer that drops.
        entered: Hidden states that entered a layer that drops, for :func:`restore`; of a pass that eliminates, none.
        by_first_row: Whether significance is the attention of the protected rows alone.
        restores: Whether dropped vectors come back in the end; else what entered a layer need not be kept.
        masks: Masks of the rows that a layer kept, for the layers after it that drop nothing.
        groups: How many groups of shared layers ran so far (ALBERT).
    """

    plan: Plan
    family: Family
    config: PreTrainedConfig
    by_first_row: bool = False
    restores: bool = False
    choices: dict[int, Choice] = field(default_factory=dict)
    entered: dict[int, torch.Tensor] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)
    groups: int = 0

    def real_rows(self, source: int | None) -> torch.Tensor | None:
        """(batch, width) bool: which rows are real after ``source`` dropped (``None``: in the input).

        ``None`` where all are.
        """
        return self.plan.real if source is None else self.choices[source].real


def make_plan(
    config: LengthConfig | None,
    skip_layers: Collection[int],
    layers: int,
    tokens: int,
    attention_mask: torch.Tensor | None,
    first_rows: int = 0,
    compiling: bool = False,
    drop_everywhere: bool = False,
) -> Plan:
    """Count every example's rows in every layer.

    Args:
        config: The length configuration; ``None`` drops nothing.
        skip_layers: Layers, counted from 0, that LayerDrop skips. The next layer that runs applies a skipped
            layer's reduction; where none follows, nothing does (its rows would not be computed any further).
        layers: Number of layers.
        tokens: Rows of the input, padding included.
        attention_mask: (batch, tokens), zero where an input is padding; ``None`` where nothing is.
        first_rows: If not 0, the last layer that runs gives so many first rows, whatever the configuration says.
        compiling: Whether a graph is made or run. All layers of a padded batch count as ragged then: lengths that
            meet in some layer would be a graph of their own.
        drop_everywhere: Whether layers in which no example loses rows run as layers that drop all the same.

    Returns:
        The plan. With an attention mask the device is synchronised once, else never. Under ``torch.export`` the
        widths are symbols that the graph computes from the mask of its input.
    """
    if is_exporting():
        return _symbolic_plan(config, skip_layers, tokens, attention_mask, first_rows)
    runs = [layer for layer in range(layers) if layer not in skip_layers]
    everywhere = drop_everywhere and config is not None
    unpadded = (tokens,) * layers if config is None else config.at_length(tokens)
    if attention_mask is None:
        return _uniform(unpadded, runs, layers, tokens, first_rows, everywhere)

    real = attention_mask != 0
    # Both that the host must know, how many rows are real and whether the first one is, in one number an example.
    known = torch.add(real[:, 0], real.sum(-1), alpha=2).cpu().numpy()
    padded_left = not (known & 1).all()
    step = _granularity(tokens, attention_mask.device)
    if known.min() >> 1 == tokens and (step == 1 or config is None):
        return _uniform(unpadded, runs, layers, tokens, first_rows, everywhere)
    # An input without a real token (a batch filled up with empty rows) counts as one token, as nothing can attend to
    # an empty set; nobody reads its result.
    n = np.maximum(known >> 1, 1)
    counts = np.tile(n, (layers, 1)) if config is None else config.at_lengths(n)
    chain = np.concatenate([n[None], counts[runs]])
    falling = np.any(chain[1:] < chain[:-1], axis=1)
    most, least = chain.max(-1).tolist(), chain.min(-1).tolist()

    steps: list[Step] = []
    width, ragged, source = tokens, True, None
    for layer in range(layers):
        if layer not in runs:
            steps.append(Step(False, False, width, ragged, source))
            continue
        at = runs.index(layer)
        # Padding on the left goes in the first layer, whatever it keeps: poolers read row 0, which must be [CLS].
        drops = everywhere or bool(falling[at]) or (config is not None and padded_left and at == 0)
        if drops:
            width = min(width, -(-most[at + 1] // step) * step)
            ragged = compiling or least[at + 1] < width
        steps.append(Step(True, drops, width, ragged, source))
        if drops:
            source = layer
    # Detached, they are no views: a compiled graph would take a batch as large as the number of layers for a rule.
    by_layer = tuple(row.detach() for row in torch.from_numpy(counts).to(attention_mask.device).unbind())
    left = padded_left and config is not None  # dense, row 0 is read, whatever it is
    padded = real if least[0] < tokens else None
    return Plan(_last(steps, runs, first_rows), tokens, padded, by_layer, left)


def _granularity(tokens: int, device: torch.device) -> int:
    """Widths of batches are multiples of this, the rest being filler: at most one part in 32 of the input.

    In low precision on a CPU, oneDNN generates code for matrices of every shape that it meets for the first time, and
    in training every layer of every pass has widths of its own.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return 1
    return 2 ** max(0, (tokens // 32).bit_length() - 1)


def _symbolic_plan(
    config: LengthConfig | None,
    skip_layers: Collection[int],
    tokens: int,
    attention_mask: torch.Tensor | None,
    first_rows: int,
) -> Plan:
    """The plan of a graph for batches of any shape: what is known before the input is which layers may drop.

    A layer that may drop always runs as one that does, also on an input that is so short that it keeps everything.

    Raises:
        ValueError: There is no attention mask, no configuration, or a layer is skipped.
    """
    if config is None or skip_layers or attention_mask is None:
        raise ValueError("an exported model needs a length configuration, an attention_mask, and all of its layers")
    real = attention_mask != 0
    n = real.sum(-1).clamp(min=1)
    counts = _at_lengths(config, n)
    steps: list[Step] = []
    width, source = tokens, None
    for layer, (before, length) in enumerate(zip((config.max_length, *config.lengths), config.lengths, strict=False)):
        drops = length < before
        if drops:
            width = cast(int, counts[layer].amax(0).item())
            # 1 is possible too; but tracing takes rows of 1 for a case of its own, and the graph is the same.
            torch._check(width >= 2)
            torch._check(width <= tokens)
        steps.append(Step(True, drops, width, True, source))
        source = layer if drops else source
    runs = list(range(config.num_layers))
    return Plan(_last(steps, runs, first_rows), tokens, real, tuple(counts.unbind()))


def _last(steps: list[Step], runs: list[int], first_rows: int) -> tuple[Step, ...]:
    """The steps where of the last layer that runs only the first rows are read."""
    if first_rows and runs:
        source = steps[runs[-1]].source
        after = [Step(False, False, first_rows, False, runs[-1])] * (len(steps) - 1 - runs[-1])
        steps = [*steps[: runs[-1]], Step(True, True, first_rows, False, source, first=True), *after]
    return tuple(steps)


def _uniform(
    lengths: Sequence[int], runs: list[int], layers: int, tokens: int, first_rows: int, everywhere: bool = False
) -> Plan:
    """The plan of a batch without padding: no tensor, no synchronisation."""
    steps: list[Step] = []
    width, source = tokens, None
    for layer in range(layers):
        drops = layer in runs and (everywhere or lengths[layer] < width)
        width = lengths[layer] if drops else width
        steps.append(Step(layer in runs, drops, width, False, source))
        source = layer if drops else source
    return Plan(_last(steps, runs, first_rows), tokens, None, None)


def _at_lengths(config: LengthConfig, n: torch.Tensor) -> torch.Tensor:
    """``LengthConfig.at_lengths`` in a graph: (batch,) token counts to (layers, batch), in exact integers."""
    lengths = torch.tensor(config.lengths, device=n.device)[:, None]
    if config.retention == "relative":
        # Ceiling division, as floor division is the one that torch has. (`torch.div` would go through floats in ONNX.)
        kept = (lengths * n + (config.max_length - 1)) // config.max_length
    else:
        kept = lengths.expand(-1, n.size(0))  # not len(n): a graph would take the size for a constant
    return torch.minimum(kept.clamp(min=MIN_LENGTH), n)


def restore(done: Pass, output: torch.Tensor, norm: torch.nn.Module | None = None) -> torch.Tensor:
    """Put the dropped vectors back in place (Drop-and-Restore, section 3.3).

    Args:
        done: The pass after its last layer.
        output: (batch, width, hidden), the rows that were kept to the end.
        norm: What the model applies to ``output`` after its last layer (pre-norm models); applied to the vectors
            that were set aside as well.

    Returns:
        (batch, tokens, hidden). A dropped vector has the value with which it entered the layer that dropped it; so
        have padding rows, which nobody should read.
    """
    dropping = sorted(done.choices)
    if not dropping:
        return output
    # `latest` tells for each position which row of the blocks below holds its last value. Filler writes go to an
    # extra column, so that they never touch a real token.
    blocks = [done.entered[dropping[0]]]
    batch = output.size(0)
    latest = torch.arange(done.plan.tokens + 1, device=output.device).repeat(batch, 1)
    offset = done.plan.tokens
    for layer, following in zip(dropping, [*dropping[1:], None], strict=True):
        positions = done.choices[layer].positions
        rows = torch.arange(offset, offset + positions.size(1), device=output.device)
        latest.scatter_(1, positions, rows.expand_as(positions))
        offset += positions.size(1)
        if following is not None:
            blocks.append(done.entered[following])
    aside = torch.cat(blocks, 1)
    values = torch.cat([aside if norm is None else norm(aside), output], 1)
    return take_rows(values, latest[:, :-1]).to(output.dtype)
