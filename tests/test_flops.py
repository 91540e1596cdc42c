"""FLOPs by arithmetic are exactly what torch counts on the adapted model."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig
from zoo import CASES, TEXT_CASES, image_tokens, inputs_for

from lat_optuna.flops import Architecture
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, num_layers


def counted(model, config, batch):
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), model.at(config), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=TEXT_CASES)
def text_model(request):
    return adapt(CASES[request.param].build())


@given(data=st.data())
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_of_text(text_model, data):
    ns = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    max_length = data.draw(st.integers(2, 40))
    layers = num_layers(text_model)
    lengths = data.draw(st.lists(st.integers(1, max_length), min_size=layers, max_size=layers))
    retention = data.draw(st.sampled_from(["relative", "absolute"]))
    config = data.draw(st.sampled_from([None, LengthConfig(tuple(sorted(lengths)[::-1]), max_length, retention)]))
    left = data.draw(st.booleans())
    architecture = Architecture.of(text_model)
    assert counted(text_model, config, inputs_for(text_model, ns, left=left)) == architecture.batch_flops(config, ns)
    alone = inputs_for(text_model, ns[:1], mask=False)
    assert counted(text_model, config, alone) == architecture.example_flops(config, ns[0])


@pytest.mark.parametrize("name", sorted(set(CASES) - set(TEXT_CASES)))
@pytest.mark.parametrize("lengths", [None, (17, 9, 3), (2, 2, 1)])
def test_batches_of_images(name, lengths):
    model = adapt(CASES[name].build())
    config = lengths and LengthConfig(lengths, 17)
    ns = [image_tokens(model)] * 3
    assert counted(model, config, inputs_for(model, ns)) == Architecture.of(model).batch_flops(config, ns)


@pytest.mark.parametrize("mode", ["restore", "eliminate"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertModel", "AlbertModel", "ModernBert-mean"])
def test_both_modes(name, mode):
    if (name, mode) == ("ModernBert-mean", "eliminate"):
        mode = "auto"
    model = adapt(CASES[name].build(), mode)
    config, ns = LengthConfig((15, 7, 4), 20), [20, 9]
    assert counted(model, config, inputs_for(model, ns)) == Architecture.of(model).batch_flops(config, ns)


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_without_weights_tells_the_same(name):
    model = CASES[name].build()
    config = model.config
    config.architectures = [type(model).__name__]
    assert Architecture.of(config) == Architecture.of(model) == Architecture.of(adapt(model))


def test_bert_base_by_hand():
    architecture = Architecture.of(BertConfig())
    n, h = 128, 768
    layer = 12 * n * h * h + 2 * n * n * h
    assert architecture.example_flops(None, n) == 2 * (12 * layer + h * h)
    half = LengthConfig((64,) * 12, 128)
    first = n * 3 * h * h + n * n * h + 64 * n * h + 64 * 9 * h * h
    rest = 12 * 64 * h * h + 2 * 64 * 64 * h
    assert architecture.example_flops(half, n) == 2 * (first + 11 * rest + h * h)


def test_the_mean_over_a_task_weighs_every_example_alike():
    architecture = Architecture.of(CASES["BertForSequenceClassification"].build())
    config, lengths = LengthConfig((15, 7, 4), 20), [3, 20, 3, 11, 1]
    expected = sum(architecture.example_flops(config, n) for n in lengths) / 5
    assert architecture.mean_flops(config, lengths) == expected
    assert architecture.mean_flops(None, iter(lengths)) > expected


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DeiTForImageClassification"])
@pytest.mark.parametrize("significance", ["all", "cls"])
@pytest.mark.parametrize("last_layer", ["all", "cls"])
def test_the_mean_is_exact_with_every_option_and_retention(name, significance, last_layer):
    mode = "eliminate" if last_layer == "cls" else "auto"
    architecture = Architecture.of(adapt(CASES[name].build(), mode, significance, last_layer))
    counts = {1: 3, 2: 1, 7: 2, 13: 1, 20: 4, 500: 1}
    lengths = ((20, 20, 20), (20, 11, 11), (15, 7, 1), (1, 1, 1))
    absolute = [LengthConfig(each, 20, "absolute") for each in lengths]
    for config in (None, *(LengthConfig(each, 20) for each in lengths), *absolute):
        expected = sum(times * architecture.example_flops(config, n) for n, times in counts.items()) / 12
        assert architecture.mean_flops(config, counts) == expected


def test_a_full_configuration_costs_what_dense_costs_and_dropping_costs_less():
    architecture = Architecture.of(CASES["BertForQuestionAnswering"].build())
    full = LengthConfig.full(3, 20)
    assert architecture.example_flops(full, 13) == architecture.example_flops(None, 13)
    assert architecture.example_flops(LengthConfig((20, 20, 19), 20), 20) < architecture.example_flops(full, 20)


def test_wrong_use_is_refused():
    architecture = Architecture.of(CASES["BertModel"].build())
    with pytest.raises(ValueError, match="has 2 layers, the model has 3"):
        architecture.example_flops(LengthConfig((5, 5), 5), 4)
    with pytest.raises(ValueError, match="at least 1 token"):
        architecture.example_flops(None, 0)
    with pytest.raises(ValueError, match="at least one length"):
        architecture.mean_flops(None, [])
    with pytest.raises(ValueError, match="has 2 layers, the model has 3"):
        architecture.mean_flops(LengthConfig((5, 5), 5), [4])
    assert architecture.batch_flops(None, []) == 0
