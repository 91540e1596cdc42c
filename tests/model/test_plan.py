"""Counts of a batch agree with the algebra of one configuration; restoring puts every vector in its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lat_optuna.length_config import LengthConfig
from lat_optuna.model.plan import make_plan
from lat_optuna.model.rows import take_rows


@st.composite
def configs(draw, max_layers=6):
    max_length = draw(st.integers(2, 600))
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_layers))
    return LengthConfig(
        tuple(sorted(lengths, reverse=True)), max_length, draw(st.sampled_from(["relative", "absolute"]))
    )


def padded(ns, tokens, left=False):
    mask = torch.arange(tokens) < torch.tensor(ns)[:, None]
    return mask.flip(-1).long() if left else mask.long()


def test_widths_are_round_in_low_precision_on_a_cpu():
    config = LengthConfig((190, 101, 50), 384)
    exact = make_plan(config, (), 3, 384, padded([384, 200], 384))
    with torch.autocast("cpu", torch.bfloat16):
        filled = make_plan(config, (), 3, 384, padded([384, 200], 384))
        whole = make_plan(config, (), 3, 384, padded([384, 384], 384))
        short = make_plan(LengthConfig((19, 10, 5), 40), (), 3, 40, padded([40, 20], 40))
    assert [step.width for step in exact.steps] == [190, 101, 50]
    assert [step.width for step in filled.steps] == [step.width for step in whole.steps] == [192, 104, 56]
    assert [step.width for step in short.steps] == [19, 10, 5]
    assert all(a.equal(b) for a, b in zip(filled.counts, exact.counts, strict=True))
    assert whole.real is None
    assert all(step.ragged for step in whole.steps)


@given(configs(), st.lists(st.integers(1, 700), min_size=1, max_size=6), st.integers(0, 5), st.booleans())
@settings(deadline=None)
def test_every_example_keeps_what_its_own_length_allows(config, ns, more, left):
    tokens = max(ns) + more
    plan = make_plan(config, (), config.num_layers, tokens, padded(ns, tokens, left))
    expected = torch.tensor([config.at_length(n) for n in ns]).T
    before, width = torch.tensor(ns), tokens
    for layer, step in enumerate(plan.steps):
        assert step.runs
        if (expected[layer] < before).any():
            assert step.drops
        if step.drops:
            width = int(expected[layer].max())
            assert step.ragged == (int(expected[layer].min()) < width)
            if step.ragged:
                assert plan.counts[layer].tolist() == expected[layer].tolist()
        assert step.width == width
        before = expected[layer]


@given(configs(), st.integers(1, 700), st.integers(1, 4))
@settings(deadline=None)
def test_without_padding_there_is_no_tensor_in_a_plan(config, n, batch):
    bare = make_plan(config, (), config.num_layers, n, None)
    masked = make_plan(config, (), config.num_layers, n, torch.ones(batch, n))
    assert bare == masked
    assert bare.real is None
    assert bare.counts is None
    assert tuple(step.width for step in bare.steps) == config.at_length(n)


@given(configs(), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.sets(st.integers(0, 5)))
@settings(deadline=None)
def test_the_next_layer_that_runs_takes_a_skipped_layers_reduction(config, ns, skip):
    skip = {layer for layer in skip if layer < config.num_layers}
    tokens = max(ns)
    plan = make_plan(config, skip, config.num_layers, tokens, padded(ns, tokens))
    widths = [max(config.at_length(n)[layer] for n in ns) for layer in range(config.num_layers)]
    width = tokens
    for layer, step in enumerate(plan.steps):
        assert step.runs == (layer not in skip)
        assert not (step.drops and layer in skip)
        width = width if layer in skip else widths[layer]
        assert step.width == width


def test_padding_on_the_left_goes_in_the_first_layer_that_runs():
    full = LengthConfig.full(3, 8)
    plan = make_plan(full, {0}, 3, 8, padded([8, 5], 8, left=True))
    assert [step.drops for step in plan.steps] == [False, True, False]
    assert plan.steps[1].ragged
    assert plan.counts[1].tolist() == [8, 5]
    assert not any(step.drops for step in make_plan(full, (), 3, 8, padded([8, 5], 8)).steps)
    assert not any(step.drops for step in make_plan(None, (), 3, 8, padded([8, 5], 8, left=True)).steps)


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 5), (3, 7, 2, 4)])
def test_rows_are_taken_per_example(shape):
    values = torch.randn(shape)
    rows = torch.tensor([[0, 6], [3, 3], [5, 1]])
    found = take_rows(values, rows)
    for example in range(3):
        assert torch.equal(found[example], values[example][rows[example]])
