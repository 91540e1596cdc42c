"""Latencies are measured beside the dense model, and predicted from tables; neither test looks at the clock."""

import json

import pytest
import torch
from zoo import CASES

from lat_optuna.latency import Conditions, Latency, LatencyMeter, LatencyModel, batches_of
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt

SMALL = LengthConfig((15, 8, 4), 20)


def bert():
    return adapt(CASES["BertForSequenceClassification"].build())


def test_every_configuration_is_measured_in_turns_with_the_dense_model():
    model, seen = bert(), []
    model.bert.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    found = LatencyMeter(model.train(), [5, 9, 20, 7], batch_size=2).measure([SMALL, None], rounds=3, warmup=1)
    assert [one.config for one in found] == [SMALL, None]
    assert all(one.milliseconds > 0 and one.rounds == 3 for one in found)
    assert found[0].dense == found[1].milliseconds == found[1].dense
    assert len(seen) == (1 + 3) * 2 * 2  # rounds, configurations, batches
    assert not any(seen)
    assert model.length_config is None


def test_what_a_latency_depends_on_is_recorded():
    conditions = LatencyMeter(bert(), [5, 9, 20, 7], batch_size=2, precision="bf16").conditions
    assert conditions.lengths == ((5, 7), (9, 20))
    assert conditions.device.startswith("cpu")
    assert (conditions.precision, conditions.batch_size) == ("bf16", 2)
    assert conditions.threads == torch.get_num_threads()


def test_only_batches_that_need_it_have_a_mask():
    model, masks = bert(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    LatencyMeter(model, [5, 5, 7, 9], batch_size=2).measure([], rounds=1, warmup=0)
    assert masks[0] is None
    assert masks[1].sum(-1).tolist() == [7, 9]


def test_lengths_become_batches_of_neighbours_evenly_spaced():
    assert batches_of(7, 3, 8) == [(7, 7, 7)]
    assert batches_of([9, 1, 5, 3, 7], 2, 8) == [(1, 3), (5, 7)]
    assert batches_of(range(1, 101), 1, 4) == [(13,), (38,), (63,), (88,)]


def test_speedup():
    assert Latency(SMALL, 2.0, 5.0, 3).speedup == 2.5


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "DistilBertForQuestionAnswering", "AlbertModel"])
def test_other_heads(name):
    assert LatencyMeter(adapt(CASES[name].build()), 6).measure([SMALL], rounds=1, warmup=0)[0].milliseconds > 0


def test_a_libc_that_cannot_be_told_to_keep_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert LatencyMeter(bert(), 6).measure([SMALL], rounds=1, warmup=0)[0].milliseconds > 0


def test_images():
    model = adapt(CASES["ViTForImageClassification"].build())
    assert LatencyMeter(model, 17, 2).measure([LengthConfig((17, 9, 3), 17)], rounds=1, warmup=0)[0].milliseconds > 0


class Arithmetic:
    """Stands in for a clock: milliseconds of a pass by a formula."""

    def __init__(self, batches, layers=3):
        self.batches, self.layers = batches, layers

    def __call__(self, batch, config, skip=frozenset()):
        lengths = self.batches[batch]
        rows, total = max(lengths), 0.3 + 0.01 * max(lengths)
        if len(set(lengths)) > 1 and (config is not None or skip):
            total += 0.6  # planning counts the rows of padded batches, once a pass
        kept = [(n,) * self.layers if config is None else config.at_length(n) for n in lengths]
        before = list(lengths)
        for layer in range(0 if skip else self.layers):
            after = [each[layer] for each in kept]
            leave = max(after)
            layer_takes = 0.5 + 0.02 * rows + 0.06 * leave + 1e-4 * rows * (rows + leave)
            total += layer_takes * (1.2 if config is None else 1)  # dense layers are slower than a configuration's
            if after != before:
                total += 0.1 + 3e-4 * rows * rows
            rows, before = leave, after
        return total / 1000


def calibrated(monkeypatch, lengths, batch_size):
    """A model that was calibrated on passes whose time is arithmetic, and the arithmetic for further batches."""
    from lat_optuna import latency

    class Passes(latency._Passes):
        def __init__(self, model, batches, precision):
            super().__init__(model, batches, precision)
            self.time = Arithmetic(batches)

    monkeypatch.setattr(latency, "_Passes", Passes)
    return LatencyModel.fit(bert(), lengths, batch_size, rounds=1)


@pytest.mark.parametrize(("lengths", "batch_size"), [(60, 1), (60, 4), ([9, 17, 40, 22, 60, 33, 12, 35], 2)])
def test_configurations_that_were_not_measured_are_predicted_within_5_percent(monkeypatch, lengths, batch_size):
    model = calibrated(monkeypatch, lengths, batch_size)
    batches = model.conditions.lengths
    clock = Arithmetic(batches)
    ratios = (0.1, 0.2, 0.25, 0.4, 0.6)
    for config in (*(LengthConfig.constant_ratio(ratio, 3, 60) for ratio in ratios), LengthConfig((60, 60, 20), 60)):
        expected = sum(1000 * clock(batch, config) for batch in range(len(batches))) / len(batches)
        assert model.predict(config) == pytest.approx(expected, rel=0.05)
    expected = sum(1000 * clock(batch, None) for batch in range(len(batches))) / len(batches)
    assert model.predict(None) == pytest.approx(expected, rel=0.02)
    assert model.error < 0.02


def test_a_model_is_json_and_comes_back(monkeypatch):
    model = calibrated(monkeypatch, [9, 17, 40, 22], 2)
    again = LatencyModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again.conditions == model.conditions
    assert again.predict(SMALL) == model.predict(SMALL)
    assert again.predict(SMALL, lengths=[20, 30]) == model.predict(SMALL, lengths=[20, 30])
    assert again.predict(SMALL, lengths=[20, 20]) != again.predict(SMALL, lengths=[40, 40])
    for names in (("outside", "whole"), ("outside", "dense", "dense padded")):
        earlier = {**model.to_dict(), "tables": {name: [1.0] for name in names}}
        with pytest.raises(ValueError, match="an earlier version, fit it again"):
            LatencyModel.from_dict(earlier)


def test_calibrated_without_padding_it_takes_padded_batches_for_such_as_are_not(monkeypatch):
    model = calibrated(monkeypatch, 40, 2)
    padded, alike = model.predict(SMALL, lengths=[38, 40]), model.predict(SMALL, lengths=[40, 40])
    assert padded == pytest.approx(alike, rel=0.05)


def test_a_model_is_calibrated_on_the_real_clock():
    model = LatencyModel.fit(bert(), 20, rounds=1)
    assert model.predict(SMALL) > 0
    assert isinstance(model.conditions, Conditions)


def test_wrong_use_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="not adapted"):
        LatencyMeter(CASES["BertModel"].build(), 5)
    with pytest.raises(ValueError, match="fp32, bf16, fp16, not 'int8'"):
        LatencyMeter(bert(), 5, precision="int8")
    with pytest.raises(ValueError, match="2 lengths do not fill a batch of 3"):
        LatencyMeter(bert(), [5, 6], 3)
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        LatencyMeter(bert(), 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        LatencyMeter(bert(), 5, 0)
    model = calibrated(monkeypatch, 20, 1)
    with pytest.raises(ValueError, match="has 2 layers, the model has 3"):
        model.predict(LengthConfig((5, 4), 5))
    with pytest.raises(ValueError, match="up to 20 tokens, not 21"):
        model.predict(SMALL, lengths=21)
