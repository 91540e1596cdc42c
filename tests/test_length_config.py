"""The algebra of length configurations (paper: sections 2.2, 3.1, 3.2)."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lat_optuna.length_config import LengthConfig, parameter_names, shortest

layers = st.integers(1, 48)
max_lengths = st.integers(2, 4096)
seeds = st.integers(0, 2**32)
ratios = st.floats(0, 0.95)
retentions = st.sampled_from(["relative", "absolute"])


@st.composite
def configs(draw, num_layers=layers, max_length=max_lengths):
    L, n = draw(num_layers), draw(max_length)
    return LengthConfig.length_drop(draw(ratios), L, n, random.Random(draw(seeds)), draw(retentions))


def assert_valid(config: LengthConfig) -> None:
    assert all(isinstance(length, int) for length in config.lengths)
    assert config.max_length >= config.lengths[0]
    assert list(config.lengths) == sorted(config.lengths, reverse=True)
    assert config.lengths[-1] >= 1


@given(layers, max_lengths, ratios, retentions)
def test_named_configurations_are_valid(L, n, ratio, retention):
    full = LengthConfig.full(L, n, retention)
    constant = LengthConfig.constant_ratio(ratio, L, n, retention)
    for config in (full, constant):
        assert_valid(config)
        assert config.num_layers == L
    assert full.is_full
    assert LengthConfig.smallest(ratio, L, n, retention) == constant
    assert LengthConfig.constant_ratio(0, L, n, retention) == full


@given(configs(), st.floats(0, 1), seeds)
def test_mutation_is_valid(config, prob, seed):
    mutant = config.mutate(prob, random.Random(seed))
    assert_valid(mutant)
    assert (mutant.num_layers, mutant.max_length, mutant.retention) == (
        config.num_layers,
        config.max_length,
        config.retention,
    )


@given(configs())
def test_mutation_with_probability_zero_changes_nothing(config):
    assert config.mutate(0.0, random.Random(0)) == config


@given(layers, max_lengths, seeds, seeds)
def test_crossover_is_the_layer_wise_mean(L, n, first, second):
    a = LengthConfig.length_drop(0.5, L, n, random.Random(first))
    b = LengthConfig.length_drop(0.2, L, n, random.Random(second))
    child = a.crossover(b)
    assert_valid(child)
    assert child == b.crossover(a)
    assert all(abs(c - (x + y) / 2) <= 0.5 for c, x, y in zip(child.lengths, a.lengths, b.lengths, strict=True))


@given(configs(), st.integers(1, 5000), st.integers(1, 8))
def test_at_length_is_monotone_and_bounded(config, n, min_length):
    kept = config.at_length(n, min_length)
    assert len(kept) == config.num_layers
    assert list(kept) == sorted(kept, reverse=True)
    assert kept[0] <= n
    assert kept[-1] >= min(n, min_length)


@given(configs(), st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.sampled_from(["relative", "absolute"]))
def test_at_lengths_is_at_length_of_each(config, ns, retention):
    config = LengthConfig(config.lengths, config.max_length, retention)
    assert config.at_lengths(np.array(ns)).T.tolist() == [list(config.at_length(n)) for n in ns]


def test_at_length_by_hand():
    relative = LengthConfig((96, 64, 32), 128)
    assert relative.at_length(128) == (96, 64, 32)
    assert relative.at_length(10) == (8, 5, 3)  # 7.5, 5, 2.5 rounded up
    assert relative.at_length(1) == (1, 1, 1)
    assert relative.at_length(256) == (192, 128, 64)
    absolute = LengthConfig((96, 64, 32), 128, "absolute")
    assert absolute.at_length(128) == (96, 64, 32)
    assert absolute.at_length(50) == (50, 50, 32)
    assert LengthConfig((4, 1, 1), 4).at_length(4) == (4, 2, 2)  # never fewer than min_length
    with pytest.raises(ValueError, match="at least 1 token"):
        relative.at_length(0)


@given(configs())
def test_text_and_parameters_round_trip(config):
    assert LengthConfig.parse(str(config), config.max_length, config.retention) == config
    parameters = config.parameters()
    assert list(parameters) == sorted(parameters)
    assert LengthConfig.from_parameters(parameters, config.num_layers, config.max_length, config.retention) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, LengthConfig(config.lengths, config.max_length, config.retention)}) == 1


def test_any_samplers_draw_becomes_monotone():
    drawn = {"length_01": 10, "length_02": 60, "length_03": 30}
    assert LengthConfig.from_parameters(drawn, 3, 128).lengths == (60, 30, 10)
    with pytest.raises(ValueError, match="length_04"):
        LengthConfig.from_parameters(drawn, 4, 128)


def test_parameter_names_sort_in_layer_order():
    assert parameter_names(12)[0] == "length_01"
    assert list(parameter_names(120)) == sorted(parameter_names(120))


@pytest.mark.parametrize(
    ("lengths", "max_length", "message"),
    [
        ((128, 110, 120), 128, "layer 3 keeps 120 vectors, more than the 110 of layer 2"),
        ((129, 110), 128, "layer 1 keeps 129 vectors, more than max_length=128"),
        ((128, 0), 128, "layer 2 keeps 0 vectors"),
        ((), 128, "at least one layer"),
        ((1,), 0, "max_length must be at least 1"),
    ],
)
def test_broken_rules_are_named(lengths, max_length, message):
    with pytest.raises(ValueError, match=message):
        LengthConfig(lengths, max_length)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="length of layer 2 must be an integer"):
        LengthConfig((2, 1.5), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="retention"):
        LengthConfig((2, 1), 4, "some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="128-110-96"):
        LengthConfig.parse("12,3")
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        LengthConfig.constant_ratio(1.0, 3, 128)
    with pytest.raises(ValueError, match="cannot cross"):
        LengthConfig.full(3, 128).crossover(LengthConfig.full(4, 128))


@given(st.integers(1, 5000), st.integers(0, 99))
def test_shortest_is_exact_for_decimal_ratios(length, percent):
    # Floats would say 12 for (1 - 0.45) * 20.
    assert shortest(length, percent / 100) == max(1, -(-length * (100 - percent) // 100))


def test_constant_ratio_of_the_paper():
    assert LengthConfig.constant_ratio(0.2, 4, 128).lengths == (103, 83, 67, 54)


def test_length_drop_is_uniform():
    """l_1 ~ U(ceil(0.8 * 50), 50) and l_2 ~ U(ceil(0.8 l_1), l_1): chi-square at a fixed seed."""
    rng = random.Random(2010_07003)
    draws = [LengthConfig.length_drop(0.2, 2, 50, rng).lengths for _ in range(22_000)]
    first = Counter(l1 for l1, _ in draws)
    assert set(first) == set(range(40, 51))
    assert stats.chisquare([first[k] for k in range(40, 51)]).pvalue > 0.01
    for l1 in (40, 45, 50):
        second = Counter(l2 for other, l2 in draws if other == l1)
        support = range(math.ceil(0.8 * l1), l1 + 1)
        assert set(second) == set(support)
        assert stats.chisquare([second[k] for k in support]).pvalue > 0.01


class Script:
    """A generator that answers from a script and records the ranges it was asked for."""

    def __init__(self, uniforms, integers):
        self.uniforms, self.integers, self.asked = iter(uniforms), iter(integers), []

    def random(self):
        return next(self.uniforms)

    def randint(self, a, b):
        self.asked.append((a, b))
        return next(self.integers)


def test_mutation_by_hand():
    """Layers 1 and 3 are drawn: l'_1 ~ U(l_2, l_0), l'_3 ~ U(l_4, l'_2) with l_4 = 1; layer 2 stays."""
    rng = Script(uniforms=[0.4, 0.5, 0.1], integers=[70, 20])
    assert LengthConfig((100, 60, 30), 128).mutate(0.5, rng).lengths == (70, 60, 20)
    assert rng.asked == [(60, 128), (1, 60)]


def test_mutation_sees_the_mutated_layer_before_it():
    rng = Script(uniforms=[0.0, 0.0, 0.9], integers=[65, 61])
    assert LengthConfig((100, 60, 30), 128).mutate(0.5, rng).lengths == (65, 61, 30)
    assert rng.asked == [(60, 128), (30, 65)]


def test_crossover_by_hand():
    a, b = LengthConfig((128, 100, 31), 128), LengthConfig((100, 60, 20), 128)
    assert a.crossover(b).lengths == (114, 80, 25)
