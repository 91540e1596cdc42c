"""The evaluator measures what the model does, once, in any batching, and counts its cost by arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_text import questions, sentences, tiny_checkpoint, write_parquet
from torch._dynamo.testing import CompileCounter

from lat_optuna.flops import Architecture
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt
from lat_optuna.search.evaluator import Evaluator, ModelEvaluator, weights_hash
from lat_optuna.tasks.question_answering import QuestionAnswering
from lat_optuna.tasks.text_classification import TextClassification

SHORT = LengthConfig((12, 9, 6), 20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "validation.parquet", sentences(40, seed=2, longest=15))
    return TextClassification(checkpoint, folder, max_length=20, train_split=None)


@pytest.fixture
def model(task, checkpoint):
    return adapt(task.build_model(checkpoint))


@pytest.fixture
def passes(model, monkeypatch):
    """Batches that the model has seen."""
    seen = []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    return seen


def one_by_one(model, task, config):
    """Accuracy and mean log-probability, example by example, without any batching."""
    right, log_probs = [], []
    for feature in task.features("validation"):
        with torch.no_grad(), model.at(config):
            logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0]
        right.append(logits.argmax().item() == feature["labels"])
        log_probs.append(logits.log_softmax(-1)[feature["labels"]].item())
    return 100 * np.mean(right), np.mean(log_probs)


@pytest.mark.parametrize("tokens_per_batch", [1, 70, 100_000])
@pytest.mark.parametrize("config", [None, SHORT])
def test_values_are_those_of_single_examples(model, task, tokens_per_batch, config):
    evaluator: Evaluator = ModelEvaluator(model, task, tokens_per_batch=tokens_per_batch)
    accuracy, log_prob = one_by_one(model, task, config)
    evaluation = evaluator.evaluate(config)
    assert evaluation.metric == pytest.approx(accuracy)
    assert evaluation.details["log_prob"] == pytest.approx(log_prob, abs=1e-5)


def test_compiled_values_are_the_same_and_configurations_share_their_graphs(model, task, monkeypatch):
    counter, original, freezing = CompileCounter(), torch.compile, []

    def backend(graph, inputs):
        freezing.append(torch._inductor.config.freezing)
        return counter(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, backend=backend, **options))
    torch.compiler.reset()
    plain = ModelEvaluator(copy.deepcopy(model), task, tokens_per_batch=70)
    compiled = ModelEvaluator(model, task, tokens_per_batch=70, compiled=True)
    counted = []
    for lengths in ((12, 9, 6), (20, 9, 9), (20, 20, 6), (7, 7, 7), (12, 9, 9)):
        config = LengthConfig(lengths, 20)
        found, expected = compiled.evaluate(config), plain.evaluate(config)
        assert found.metric == expected.metric
        assert found.details["log_prob"] == pytest.approx(expected.details["log_prob"], abs=1e-5)
        counted.append(counter.frame_count)
    assert counted[0] > 0
    assert counted[0] == counted[-1]
    assert len(freezing) > 1
    assert all(freezing[1:])  # the first one was made to see whether there is a compiler
    assert not torch._inductor.config.freezing
    assert compiled.identity()["precision"] == compiled.arithmetic == "fp32, compiled"
    assert compiled.on("validation").compiled
    assert compiled.on("validation", exact=True).arithmetic == "fp32"


def test_without_a_compiler_it_says_so_at_once(model, task, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"needs what torch.compile compiles with on cpu.*search.compiled to false"):
        ModelEvaluator(model, task, compiled=True)


def test_batches_keep_to_the_budget(model, task, passes):
    ModelEvaluator(model, task, tokens_per_batch=70).evaluate(None)
    assert sum(rows for rows, _ in passes) == 40
    assert all(rows * width <= 70 * 2**0.5 for rows, width in passes)
    assert all(rows in (1, 2, 4, 8, 16, 32) for rows, _ in passes[:-1])  # few shapes; the last one takes what is left
    assert len(passes) < 20


def test_cost_is_the_mean_over_real_lengths(model, task):
    evaluator = ModelEvaluator(model, task)
    lengths = [len(tokens) for tokens in task.features("validation")["input_ids"]]
    architecture = Architecture.of(model)
    expected = architecture.mean_flops(SHORT, lengths) / architecture.mean_flops(None, lengths)
    assert evaluator.cost(SHORT) == evaluator.evaluate(SHORT).cost == pytest.approx(expected)
    assert evaluator.cost(None) == 1.0
    assert evaluator.cost(LengthConfig.full(3, 20)) == pytest.approx(1.0)


def test_padded_cost_is_that_of_full_width_and_predictions_need_no_padding(model, task):
    config = LengthConfig((12, 9, 6), 20, "absolute")
    real = ModelEvaluator(model, task, retention="absolute")
    padded = ModelEvaluator(model, task, protocol="padded")
    architecture = Architecture.of(model)
    assert padded.retention == "absolute"
    assert padded.cost(config) == pytest.approx(
        architecture.example_flops(config, 20) / architecture.example_flops(None, 20)
    )
    assert padded.cost(config) < real.cost(config)
    assert padded.evaluate(config).details == real.evaluate(config).details
    assert padded.identity() != real.identity()


def test_a_configuration_is_measured_once(model, task, passes):
    evaluator = ModelEvaluator(model, task)
    first = evaluator.evaluate(SHORT)
    seen = len(passes)
    again = evaluator.evaluate(LengthConfig((12, 9, 6), 20))
    assert len(passes) == seen > 0
    assert (again.metric, again.cost, again.details) == (first.metric, first.cost, first.details)


def test_configurations_that_keep_the_same_tokens_share_a_result(model, task, passes):
    evaluator = ModelEvaluator(model, task, retention="absolute")
    longest = max(len(tokens) for tokens in task.features("validation")["input_ids"])
    assert longest < 19
    one, other = LengthConfig((19, 18, 6), 20, "absolute"), LengthConfig((20, 18, 6), 20, "absolute")
    assert evaluator.kept(one) == evaluator.kept(other)
    metric = evaluator.evaluate(one).metric
    seen = len(passes)
    assert evaluator.evaluate(other).metric == metric
    assert len(passes) == seen
    evaluator.evaluate(LengthConfig((20, 18, 5), 20, "absolute"))
    assert len(passes) > seen


def test_too_little_memory_halves_the_budget(model, task, monkeypatch):
    expected = ModelEvaluator(model, task).evaluate(SHORT)

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    evaluator = ModelEvaluator(model, task, tokens_per_batch=400)
    evaluation = evaluator.evaluate(SHORT)
    assert evaluator.tokens_per_batch == 25
    assert evaluation.metric == expected.metric
    assert evaluation.details["log_prob"] == pytest.approx(expected.details["log_prob"], abs=1e-5)


def test_too_little_memory_for_one_example_is_an_error(model, task):
    def refuse(*call):
        raise torch.OutOfMemoryError("no room")

    model.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        ModelEvaluator(model, task).evaluate(SHORT)


def test_a_broken_model_s_metric_is_nan(model, task):
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    assert np.isnan(ModelEvaluator(model, task).evaluate(SHORT).metric)


def test_bf16_is_close_and_says_so_in_its_identity(model, task):
    full, reduced = (ModelEvaluator(model, task, precision=precision) for precision in ("fp32", "bf16"))
    difference = reduced.evaluate(None).details["log_prob"] - full.evaluate(None).details["log_prob"]
    assert 0 < abs(difference) < 0.05
    assert full.identity() != reduced.identity()


def test_question_answering_is_evaluated_over_all_features(checkpoint, tmp_path):
    write_parquet(tmp_path / "validation.parquet", questions(6))
    task = QuestionAnswering(checkpoint, tmp_path, max_length=40, stride=10, train_split=None)
    evaluator = ModelEvaluator(adapt(task.build_model(checkpoint)), task, tokens_per_batch=100)
    config = LengthConfig((30, 20, 10), 40)
    for evaluation in (evaluator.evaluate(None), evaluator.evaluate(config)):
        assert 0 <= evaluation.details["exact_match"] <= evaluation.metric <= 100
        assert evaluation.details["log_prob"] < 0
    assert evaluator.metric_name == "f1"
    assert len(evaluator._lengths) > 6


def test_options_of_adapt_are_part_of_the_identity_and_of_the_cost(model, task):
    usual, cost = ModelEvaluator(model, task).identity(), ModelEvaluator(model, task).cost(SHORT)
    other = ModelEvaluator(adapt(copy.deepcopy(model), significance="cls", last_layer="cls"), task)
    assert {*other.identity().items()} - {*usual.items()} == {("significance", "cls"), ("last_layer", "cls")}
    assert other.cost(None) == 1.0
    assert other.cost(SHORT) != cost


def test_identity_tells_weights_and_data_apart(model, task, checkpoint):
    identity = ModelEvaluator(model, task).identity()
    assert identity == ModelEvaluator(model, task, tokens_per_batch=33).identity()
    assert identity["data"] == task.fingerprint("validation")
    before = weights_hash(model)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    assert weights_hash(model) != before == identity["weights"]


def test_the_hash_is_of_the_weights_not_of_their_file(model, checkpoint, task, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert weights_hash(task.build_model(str(tmp_path))) == weights_hash(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "fast"}, "protocol must be one of real, padded, not 'fast'"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, not 'int8'"),
        ({"protocol": "padded", "retention": "relative"}, "absolute retention"),
        ({"tokens_per_batch": 0}, "at least 1, not 0"),
    ],
)
def test_bad_settings_are_named(model, task, settings, message):
    with pytest.raises(ValueError, match=message):
        ModelEvaluator(model, task, **settings)


@pytest.mark.parametrize(
    "config", [LengthConfig((9, 6), 20), LengthConfig((9, 6, 6), 21), LengthConfig((9, 6, 6), 20, "absolute")]
)
def test_a_configuration_of_another_model_is_refused(model, task, config):
    with pytest.raises(ValueError, match="the evaluation is of 3 layers, max_length 20 and relative retention"):
        ModelEvaluator(model, task).evaluate(config)
