"""What the CPU's tests say holds on a GPU as well: run it there, in less than a minute, with nothing but pytest.

``LAT_TEST_DEVICE=cpu`` runs the same tests on a CPU, to see that the tests themselves are right.
"""

import copy
import logging
import math
import os
from random import Random

import pytest
import torch
from tiny_text import sentences, tiny_checkpoint, write_parquet
from zoo import CASES, LAYERS, ONE_A_FAMILY, TEXT_CASES, assert_close, inputs_for, results, wrong_in_threads

from lat_optuna.latency import LatencyMeter
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, num_layers
from lat_optuna.model.inspection import kept_tokens

DEVICE = os.environ.get("LAT_TEST_DEVICE", "cuda")
NS = (13, 20, 7, 3)
TEXT_FAMILIES = [name for name in ONE_A_FAMILY if name in TEXT_CASES]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
ATOL = 1e-4  # other kernels, and for other shapes other ones again

pytestmark = pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """No TF32, which is the usual thing for convolutions (images are cut into patches by one)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(name, device=DEVICE):
    return CASES[name].build().to(device)


def config_for(model, fractions=(0.8, 0.5, 0.25)):
    layers = num_layers(model)
    chosen = [fractions[min(i * len(fractions) // layers, len(fractions) - 1)] for i in range(layers)]
    return LengthConfig(tuple(max(1, round(f * 20)) for f in chosen), 20)


def autocast(precision):
    return torch.autocast(DEVICE, LOW.get(precision, torch.bfloat16), enabled=precision != "fp32")


def batch_for(model, ns, **options):
    return {name: value.to(model.device) for name, value in inputs_for(model, ns, **options).items()}


def answers(model, ns=NS, config=None, precision="fp32", **options):
    """What each example gets out of the model, on the CPU in fp32."""
    with model.at(config), torch.no_grad(), autocast(precision):
        found = results(model, model(**batch_for(model, ns, **options)), ns)
    return [[part.float().cpu() for part in parts] for parts in found]


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_dense_equals_the_unadapted_model_bit_for_bit(name, precision):
    model = build(name)
    batch = batch_for(model, NS)
    with torch.no_grad(), autocast(precision):
        expected = model(**batch)
        found = adapt(model)(**batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_full_length_configuration_equals_dense_within_rounding(name):
    model = adapt(build(name))
    full = LengthConfig.full(num_layers(model), 20)
    assert_close(answers(model, config=full), answers(model), ATOL)


@pytest.mark.parametrize("fractions", [(0.8, 0.5, 0.25), (1.0, 0.4, 0.4)])
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_results_are_those_of_the_cpu(name, fractions):
    here, there = adapt(build(name)), adapt(build(name, "cpu"))
    config = config_for(here, fractions)
    with there.at(config), torch.no_grad():
        expected = results(there, there(**inputs_for(there, NS, pad_to=23)), NS)
    assert_close(answers(here, config=config, pad_to=23), expected, ATOL)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_kept_tokens_are_those_of_the_cpu(name):
    here, there = adapt(build(name)), adapt(build(name, "cpu"))
    config = config_for(here)
    for n in NS:
        tokens = inputs_for(there, [n])["input_ids"][0].tolist()
        assert kept_tokens(here, config, tokens) == kept_tokens(there, config, tokens)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_low_precision_is_near_fp32_where_it_keeps_the_same_tokens(name, precision):
    model = adapt(build(name))
    config = config_for(model)
    exact, low = (answers(model, config=config, precision=each) for each in ("fp32", precision))
    assert all(part.isfinite().all() for parts in low for part in parts)
    same = 0
    for n, expected, found in zip(NS, exact, low, strict=True):
        tokens = inputs_for(model, [n])["input_ids"][0].tolist()
        kept = kept_tokens(model, config, tokens)
        with autocast(precision):
            if kept_tokens(model, config, tokens) != kept:
                continue
        same += 1
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() <= (0.1 if precision == "bf16" else 0.02) * (1 + y.abs().max())
    assert same


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_images_in_low_precision_are_near_fp32(name, precision):
    model = adapt(build(name))
    full = LengthConfig.full(LAYERS, 20)
    assert_close(answers(model, config=full, precision=precision), answers(model, config=full), 0.1)
    dropped = answers(model, config=config_for(model), precision=precision)
    assert all(part.isfinite().all() for parts in dropped for part in parts)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_neighbours_and_padding_do_not_change_an_example(name):
    model = adapt(build(name))
    config = config_for(model)
    alone = [answers(model, [n], config)[0] for n in NS]
    unmasked = [answers(model, [n], config, mask=False)[0] for n in NS]
    for other in (unmasked, answers(model, config=config), answers(model, config=config, pad_to=31)):
        assert_close(other, alone, ATOL)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ModernBertForTokenClassification"])
def test_padding_on_the_left_changes_nothing(name):
    model = adapt(build(name))
    config = config_for(model)
    with model.at(config), torch.no_grad():
        left = results(model, model(**batch_for(model, NS, pad_to=23, left=True)), NS, left=True)
    assert_close([[part.cpu() for part in parts] for parts in left], answers(model, config=config), ATOL)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_gradients_are_those_of_the_cpu(name):
    found, expected = (_gradients(adapt(build(name, device))) for device in (DEVICE, "cpu"))
    assert found.keys() == expected.keys()
    for weights, gradient in expected.items():
        torch.testing.assert_close(found[weights], gradient, atol=1e-3, rtol=1e-3, msg=weights)


def _gradients(model):
    with model.at(config_for(model)):
        outputs = model(**batch_for(model, NS))
    sum((value.float() ** 2).mean() for value in outputs.values()).backward()
    return {name: weights.grad.cpu() for name, weights in model.named_parameters() if weights.grad is not None}


def test_threads_run_one_model_with_different_configurations():
    model = adapt(build("BertForQuestionAnswering"))
    configs = [config_for(model), config_for(model, (1.0, 0.3, 0.3))]
    assert not wrong_in_threads(model, batch_for(model, NS), configs)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("BertForSequenceClassification", "inductor"),
        ("ModernBertForTokenClassification", "eager"),
    ],
)
def test_compiled_it_is_one_graph_for_all_configurations_with_one_pattern(name, backend, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    # Pytest would otherwise format every record of the compiler's trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    model, graphs, random = adapt(build(name)), CompileCounterWithBackend(backend), Random(0)
    compiled = torch.compile(model, backend=graphs, dynamic=True)
    for step in range(10):
        model.length_config = LengthConfig(tuple(sorted(random.sample(range(5, 39), LAYERS), reverse=True)), 40)
        ns = (40, 33, 27, 12) if step % 2 else (50, 21, 13)
        batch = batch_for(model, ns)
        with torch.no_grad():
            assert_close(results(model, compiled(**batch), ns), results(model, model(**batch), ns), ATOL)
        if step == 0:
            first = graphs.frame_count
            assert first
    assert graphs.frame_count == first
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(checkpoint, tmp_path_factory):
    from lat_optuna.tasks.text_classification import TextClassification

    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "validation.parquet", sentences(40, seed=2, longest=15))
    return TextClassification(checkpoint, folder, max_length=20, train_split=None)


def evaluate(task, checkpoint, config, device=DEVICE, **settings):
    from lat_optuna.search.evaluator import ModelEvaluator

    evaluator = ModelEvaluator(adapt(task.build_model(checkpoint)), task, device=device, **settings)
    return evaluator.evaluate(config), evaluator


CONFIGS = [None, LengthConfig((12, 9, 6), 20)]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_evaluation_is_that_of_the_cpu(task, checkpoint, config):
    here, evaluator = evaluate(task, checkpoint, config)
    there, _ = evaluate(task, checkpoint, config, "cpu")
    assert evaluator.model.device.type == torch.device(DEVICE).type
    assert (here.metric, here.cost) == (there.metric, there.cost)
    assert here.details["log_prob"] == pytest.approx(there.details["log_prob"], abs=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_an_evaluation_in_low_precision_is_near(task, checkpoint, precision, config):
    from lat_optuna.pipeline import best_precision

    low, _ = evaluate(task, checkpoint, config, precision=best_precision() if precision == "auto" else precision)
    exact, _ = evaluate(task, checkpoint, config)
    assert low.details["log_prob"] == pytest.approx(exact.details["log_prob"], abs=0.05)
    assert abs(low.metric - exact.metric) <= 10  # of 40 examples


def test_too_little_memory_halves_the_budget(task, checkpoint):
    from lat_optuna.search.evaluator import ModelEvaluator

    expected, _ = evaluate(task, checkpoint, CONFIGS[1])
    model = adapt(task.build_model(checkpoint))

    def ask_for_too_much(module, args, kwargs):
        if kwargs["input_ids"].numel() > 60:
            if DEVICE == "cpu":
                raise torch.OutOfMemoryError("no room")
            torch.empty(2**45, device=DEVICE)

    model.register_forward_pre_hook(ask_for_too_much, with_kwargs=True)
    evaluator = ModelEvaluator(model, task, device=DEVICE, tokens_per_batch=400)
    found = evaluator.evaluate(CONFIGS[1])
    assert evaluator.tokens_per_batch == 25
    assert found.metric == expected.metric
    assert found.details["log_prob"] == pytest.approx(expected.details["log_prob"], abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_latencies_are_measured(precision):
    model = adapt(build("BertForSequenceClassification"))
    meter = LatencyMeter(model, [5, 9, 20, 7], 2, precision)
    found = meter.measure([config_for(model), None], rounds=3, warmup=1)
    assert all(one.milliseconds > 0 and one.dense > 0 for one in found)
    if DEVICE != "cpu":
        assert meter.conditions.device == torch.cuda.get_device_name()


# ----------------------------------------------------------------------------------------------------- training


def test_training_in_bf16_moves_every_weight(tmp_path):
    pytest.importorskip("datasets")
    from test_trainer import ADAPTATION, arguments, bert, collate, rows

    from lat_optuna.trainer import LengthAdaptiveTrainer

    model = bert(dropout=0.1)
    before = copy.deepcopy(model.state_dict())
    trainer = LengthAdaptiveTrainer(
        model,
        arguments(tmp_path, max_steps=3, bf16=True, use_cpu=DEVICE == "cpu", learning_rate=0.01),
        train_dataset=rows(),
        data_collator=collate,
        adaptation=ADAPTATION,
    )
    assert trainer.model.device.type == torch.device(DEVICE).type
    assert math.isfinite(trainer.train().training_loss)
    for name, weights in model.state_dict().items():
        assert weights.isfinite().all(), name
        # No gradient reaches a bias of keys: softmax takes no notice of it.
        if "key.bias" not in name:
            assert not torch.equal(weights.cpu(), before[name]), name


def test_gradient_checkpointing_changes_nothing(tmp_path):
    pytest.importorskip("datasets")
    from test_trainer import bert, gradients, rows, same

    data, place = rows(), {"use_cpu": DEVICE == "cpu"}
    plain = gradients(tmp_path / "plain", bert(), data, **place)
    replayed = gradients(tmp_path / "replayed", bert(), data, activation_checkpointing=True, **place)
    same(replayed, plain, 1e-5)
    if DEVICE != "cpu":
        on_cpu = gradients(tmp_path / "cpu", bert(), data)
        same({name: gradient.cpu() for name, gradient in plain.items()}, on_cpu, 1e-4)
