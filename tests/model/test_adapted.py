"""``adapt``: dense is untouched, and a configuration does what the paper says, whatever the family and the head."""

import copy
import inspect
import logging
import pickle
from random import Random

import pytest
import torch
import transformers
from zoo import (
    CASES,
    LAYERS,
    ONE_A_FAMILY,
    TEXT_CASES,
    assert_close,
    image_tokens,
    inputs_for,
    reference,
    results,
    wrong_in_threads,
)

from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, at, is_adapted, num_layers
from lat_optuna.model.families import reads_first_row

NS = (13, 20, 7, 3)


def config_for(model, fractions=(0.8, 0.5, 0.25), retention="relative", max_length=20):
    layers = num_layers(model)
    chosen = [fractions[min(i * len(fractions) // layers, len(fractions) - 1)] for i in range(layers)]
    return LengthConfig(tuple(max(1, round(f * max_length)) for f in chosen), max_length, retention)


def sizes(model, ns):
    return [image_tokens(model)] * len(ns) if model.config.model_type in ("vit", "deit") else list(ns)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_dense_equals_the_unadapted_model_bit_for_bit(name, attention):
    model = CASES[name].build(attention)
    batch = inputs_for(model, NS)
    expected = model(**batch)
    assert adapt(model) is model
    model.length_config = config_for(model)
    model.length_config = None
    found = model(**batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_a_full_length_configuration_equals_dense_within_rounding(name, attention):
    model = adapt(CASES[name].build(attention))
    batch = inputs_for(model, NS)
    dense = results(model, model(**batch), NS)
    with model.at(LengthConfig.full(num_layers(model), 20)):
        assert_close(results(model, model(**batch), NS), dense)


@pytest.mark.parametrize(
    ("fractions", "retention", "max_length"),
    [
        ((0.8, 0.5, 0.25), "relative", 20),
        ((1.0, 0.4, 0.4), "relative", 20),
        ((0.5, 0.5, 0.1), "absolute", 20),
        ((0.9, 0.9, 0.05), "relative", 64),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_ragged_batch_equals_the_naive_reference_example_by_example(name, fractions, retention, max_length):
    model, plain = adapt(CASES[name].build("sdpa")), CASES[name].build("eager")
    config = config_for(model, fractions, retention, max_length)
    with model.at(config):
        ours = results(model, model(**inputs_for(model, NS)), NS)
    expected = []
    for n, size in zip(NS, sizes(model, NS), strict=True):
        with reference(plain, config, size, not reads_first_row(plain)) as kept:
            expected += results(plain, plain(**inputs_for(plain, [n], mask=False)), [n])
        assert [len(rows) for rows in kept] == list(config.at_length(size))
    assert_close(ours, expected)


@pytest.mark.parametrize("mode", ["restore", "eliminate"])
@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel", "ViTModel", "AlbertModel"])
def test_the_bare_encoder_in_both_modes(name, mode):
    model, plain = adapt(CASES[name].build("eager"), mode), CASES[name].build("eager")
    config, n = config_for(model), 17
    batch = inputs_for(model, [n], mask=False)
    with model.at(config), reference(plain, config, n, mode == "restore"):
        ours, expected = model(**batch), plain(**batch)
    assert ours.last_hidden_state.shape[1] == (n if mode == "restore" else config.at_length(n)[-1])
    assert all(torch.allclose(ours[key], expected[key], atol=2e-5) for key in expected)


@pytest.mark.parametrize("name", TEXT_CASES)
def test_neighbours_and_padding_do_not_change_an_example(name):
    model = adapt(CASES[name].build())
    with model.at(config_for(model)):
        alone = [results(model, model(**inputs_for(model, [n])), [n])[0] for n in NS]
        unmasked = [results(model, model(**inputs_for(model, [n], mask=False)), [n])[0] for n in NS]
        together = results(model, model(**inputs_for(model, NS)), NS)
        padded = results(model, model(**inputs_for(model, NS, pad_to=31)), NS)
    for other in (unmasked, together, padded):
        assert_close(other, alone)


@pytest.mark.parametrize("ns", [NS, (20, 20, 20)])
@pytest.mark.parametrize("name", TEXT_CASES)
def test_filler_up_to_a_round_width_changes_nothing(name, ns, monkeypatch):
    model = adapt(CASES[name].build())
    batch = inputs_for(model, ns)
    with model.at(config_for(model)):
        exact = results(model, model(**batch), ns)
        monkeypatch.setattr("lat_optuna.model.plan._granularity", lambda tokens, device: 8)
        filled = results(model, model(**batch), ns)
    assert_close(filled, exact)


@pytest.mark.parametrize("fractions", [(0.8, 0.5, 0.25), (1.0, 1.0, 1.0), (1.0, 1.0, 0.3)])
@pytest.mark.parametrize("name", TEXT_CASES)
def test_padding_on_the_left_changes_nothing(name, fractions):
    model = adapt(CASES[name].build())
    with model.at(config_for(model, fractions)):
        alone = [results(model, model(**inputs_for(model, [n])), [n])[0] for n in NS]
        left = results(model, model(**inputs_for(model, NS, pad_to=23, left=True)), NS, left=True)
    assert_close(left, alone)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
@pytest.mark.parametrize("fractions", [(1.0, 0.5, 0.5), (1.0, 1.0, 1.0)])
def test_layers_that_keep_everything_may_run_as_layers_that_drop(name, fractions):
    model = adapt(CASES[name].build())
    config, ns = config_for(model, fractions), sizes(model, NS)
    for each in (ns, ns[:1] * 3):
        batch = inputs_for(model, each)
        with torch.no_grad(), model.at(config):
            expected = results(model, model(**batch), each)
        with torch.no_grad(), model.at(config, drop_everywhere=True):
            assert_close(results(model, model(**batch), each), expected)


def test_padding_inside_an_input_is_no_token():
    model = adapt(CASES["BertForTokenClassification"].build())
    batch = inputs_for(model, [12])
    batch["position_ids"] = torch.arange(12)[None]
    holes = torch.tensor([0, 3, 4, 7])
    real = torch.tensor([i for i in range(12) if i not in holes])
    batch["attention_mask"][:, holes] = 0
    without = {"input_ids": batch["input_ids"][:, real], "position_ids": real[None]}
    with model.at(LengthConfig((6, 4, 2), 8)):
        torch.testing.assert_close(model(**batch).logits[:, real], model(**without).logits, atol=2e-5, rtol=1e-4)


def test_an_empty_row_in_a_batch_stays_finite_and_harms_nobody():
    model = adapt(CASES["BertForSequenceClassification"].build())
    batch = inputs_for(model, [9, 5])
    batch["attention_mask"][1] = 0
    with model.at(config_for(model)):
        found, alone = model(**batch).logits, model(**inputs_for(model, [9])).logits
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:1], alone, atol=2e-5, rtol=1e-4)


def test_a_dropped_vector_keeps_the_value_with_which_it_entered():
    model = adapt(CASES["BertModel"].build())
    batch = inputs_for(model, NS)
    embedded = model.embeddings(input_ids=batch["input_ids"])
    with model.at(LengthConfig((5, 5, 5), 20)):
        output = model(**batch).last_hidden_state
    for row, n in enumerate(NS):
        untouched = [torch.equal(output[row, i], embedded[row, i]) for i in range(n)]
        assert untouched.count(True) == n - LengthConfig((5, 5, 5), 20).at_length(n)[-1]
        assert not untouched[0]


# ------------------------------------------------------------------------------------------------- LayerDrop


def test_the_next_layer_that_runs_applies_a_skipped_layers_reduction():
    model = adapt(CASES["BertForQuestionAnswering"].build())
    batch = inputs_for(model, NS)
    layers = model.bert.encoder.layer
    with model.at(LengthConfig((16, 10, 4), 20), skip_layers={1}):
        skipped = model(**batch).start_logits
    del layers[1]
    layers[1]._length_index = 1
    model.config.num_hidden_layers = 2
    with model.at(LengthConfig((16, 4), 20)):
        assert torch.equal(model(**batch).start_logits, skipped)


def test_a_skipped_last_layer_leaves_its_reduction_out_and_a_dense_pass_can_skip():
    model = adapt(CASES["BertModel"].build(), mode="eliminate")
    batch = inputs_for(model, [20], mask=False)
    with model.at(LengthConfig((16, 10, 4), 20), skip_layers=frozenset({2})):
        assert model(**batch).last_hidden_state.shape[1] == 10
    with model.at(None, skip_layers=[0, 1, 2]):
        output = model(**batch).last_hidden_state
    assert torch.equal(output, model.embeddings(input_ids=batch["input_ids"]))


@pytest.mark.parametrize("skip", [{0}, {1, 2}, {0, 2}, {0, 1, 2}])
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_skipping_works_in_every_family_and_is_independent_of_the_batch(name, skip):
    model = adapt(CASES[name].build())
    with model.at(config_for(model), skip_layers=skip):
        alone = [results(model, model(**inputs_for(model, [n])), [n])[0] for n in NS]
        assert_close(results(model, model(**inputs_for(model, NS)), NS), alone)


# ------------------------------------------------------------------------------------------------- training


def _gradients(model, batch, config):
    model.zero_grad()
    with model.at(config) if is_adapted(model) else _nothing():
        output = model(**batch)
    total = sum((value.float() ** 2).sum() for value in output.values())
    total.backward()
    return {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.grad is not None}


class _nothing:  # noqa: N801
    def __enter__(self):
        return None

    def __exit__(self, *args):
        return None


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_gradients_equal_the_references(name):
    model, plain = adapt(CASES[name].build("sdpa")), CASES[name].build("eager")
    config, n = config_for(model), 17
    ours = _gradients(model, inputs_for(model, [n]), config)
    with reference(plain, config, sizes(model, [n])[0], not reads_first_row(plain)):
        expected = _gradients(plain, inputs_for(plain, [n], mask=False), None)
    assert ours.keys() == expected.keys()
    for weights, gradient in expected.items():
        torch.testing.assert_close(ours[weights], gradient, atol=1e-3, rtol=1e-3, msg=weights)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in ONE_A_FAMILY if not name.startswith("Albert")])
def test_gradient_checkpointing_replays_layers_to_the_same_gradients(name, reentrant):
    model = adapt(CASES[name].build())
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config, batch = config_for(model), inputs_for(model, NS)
    expected = _gradients(model, batch, config)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and "input_ids" in batch:
        model.enable_input_require_grads()
    calls = _count_calls(model)
    found = _gradients(model, batch, config)
    assert calls[0] > num_layers(model)
    assert found.keys() == expected.keys()
    for weights, gradient in expected.items():  # sums of large numbers: a first run in no_grad rounds otherwise
        near = {"atol": 1e-4 + 1e-6 * gradient.abs().max().item(), "rtol": 1e-4}
        torch.testing.assert_close(found[weights], gradient, **near, msg=weights)


def _count_calls(model):
    """How often layers' normalisations before their output ran: more often than layers where they are replayed."""
    calls = [0]

    def count(*_):
        calls[0] += 1

    for name, module in model.base_model.named_modules():
        if name.endswith(("attention.output", "sa_layer_norm", "mlp_norm", "layernorm_after")):
            module.register_forward_hook(count)
    return calls


def test_dropout_in_training_is_applied_and_evaluation_is_deterministic():
    model = adapt(CASES["BertForSequenceClassification"].build())
    batch = inputs_for(model, NS)
    with model.at(config_for(model)):
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        still = model(**batch).logits
        assert torch.equal(model(**batch).logits, still)
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.5
        assert not torch.equal(model(**batch).logits, still)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_autocast_and_low_precision_weights_run_and_stay_close(name, dtype):
    model = adapt(CASES[name].build())
    batch = inputs_for(model, NS)
    # One layer drops, by so much that the choice of a lower precision hardly matters for the shape of the answer.
    with model.at(config_for(model)), torch.no_grad():
        with torch.autocast("cpu", dtype=dtype):
            mixed = model(**batch)
        assert all(torch.isfinite(value).all() for value in mixed.values())
        low = copy.deepcopy(model).to(dtype)
    with low.at(config_for(model)), torch.no_grad():
        pure = low(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    assert all(torch.isfinite(value).all() and value.dtype == dtype for value in pure.values())


# ------------------------------------------------------------------------------------------ the user's objects


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_copies_and_pickles_are_independent_adapted_models(name):
    model = adapt(CASES[name].build())
    batch = inputs_for(model, NS)
    model.length_config = config_for(model)
    expected = model(**batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_adapted(other)
        assert other.length_config == model.length_config
        found = other(**batch)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        other.length_config = None
        for weights in other.parameters():
            weights.data.zero_()
    assert model.length_config is not None
    assert all(torch.equal(model(**batch)[key], expected[key]) for key in expected)


def test_names_signatures_and_types_stay():
    model = CASES["BertForSequenceClassification"].build()
    original, signature, text = type(model), inspect.signature(model.forward), repr(model)
    inner = inspect.signature(model.bert.forward)
    adapt(model)
    assert isinstance(model, original)
    assert type(model).__name__ == original.__name__
    assert type(model).__module__ == original.__module__
    assert inspect.signature(model.forward) == signature
    assert inspect.signature(model.bert.forward) == inner
    assert repr(model) == text


def test_dense_still_gives_attentions_and_hidden_states():
    model = CASES["BertForSequenceClassification"].build("eager")
    batch = inputs_for(model, NS)
    expected = model(**batch, output_attentions=True, output_hidden_states=True)
    found = adapt(model)(**batch, output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == LAYERS
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_a_configuration_cannot_honour_raise(name):
    model = adapt(CASES["BertForSequenceClassification"].build("eager"))
    batch = inputs_for(model, NS)
    model.length_config = config_for(model)
    with pytest.raises(ValueError, match=name):
        model(**batch, **{name: True})
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=name):
        model(**batch)


def test_masks_that_a_configuration_cannot_honour_raise():
    model = adapt(CASES["BertForSequenceClassification"].build())
    batch = inputs_for(model, [8, 8])
    model.length_config = config_for(model)
    batch["attention_mask"] = torch.ones(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"\(batch, tokens\)"):
        model(**batch)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForQuestionAnswering", "BertModel"])
def test_tuples_instead_of_outputs(name):
    model = adapt(CASES[name].build())
    batch = inputs_for(model, NS)
    with model.at(config_for(model)):
        named, plain = model(**batch), model(**batch, return_dict=False)
        assert isinstance(plain, tuple)
        assert all(map(torch.equal, plain, named.to_tuple()))
        model.config.return_dict = False
        assert isinstance(model(**batch), tuple)


def test_at_overrides_for_a_block_and_nests():
    model = adapt(CASES["BertForSequenceClassification"].build())
    batch = inputs_for(model, NS)
    small, medium = config_for(model), config_for(model, (0.9, 0.9, 0.9))
    outputs = {}
    for key, config in (("dense", None), ("small", small), ("medium", medium)):
        model.length_config = config
        outputs[key] = model(**batch).logits
    assert not torch.equal(outputs["small"], outputs["medium"])
    with model.at(small) as same:
        assert same is model
        assert torch.equal(model(**batch).logits, outputs["small"])
        with at(model, None):
            assert torch.equal(model(**batch).logits, outputs["dense"])
        assert torch.equal(model(**batch).logits, outputs["small"])
    assert torch.equal(model(**batch).logits, outputs["medium"])
    with pytest.raises(KeyError), model.at(small):
        raise KeyError
    assert torch.equal(model(**batch).logits, outputs["medium"])
    assert model.bert.length_config == medium


def test_two_models_have_configurations_of_their_own_in_one_block():
    teacher = adapt(CASES["BertForSequenceClassification"].build())
    student = copy.deepcopy(teacher)
    batch = inputs_for(teacher, NS)
    dense = teacher(**batch).logits
    with student.at(config_for(student)):
        assert torch.equal(teacher(**batch).logits, dense)
        assert not torch.equal(student(**batch).logits, dense)


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "AlbertForQuestionAnswering"])
def test_threads_run_one_model_with_different_configurations(name):
    model = adapt(CASES[name].build())
    configs = [None, config_for(model), config_for(model, (0.5, 0.5, 0.5)), config_for(model, (1.0, 0.3, 0.3))]
    assert not wrong_in_threads(model, inputs_for(model, NS), configs)


def test_a_pipeline_takes_an_adapted_model(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = adapt(CASES["BertForSequenceClassification"].build())
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    dense = classify("a good film a bad film a good film")[0]["score"]
    with model.at(LengthConfig((8, 4, 3), 11)):
        assert classify("a good film a bad film a good film")[0]["score"] != dense


def test_the_trainer_takes_an_adapted_model(tmp_path):
    model = adapt(CASES["BertForSequenceClassification"].build())
    model.length_config = config_for(model)
    rows = [
        {"input_ids": inputs_for(model, [n], mask=False)["input_ids"][0].tolist(), "label": n % 2, "unused": "x"}
        for n in range(4, 16)
    ]
    before = copy.deepcopy(model.state_dict())
    import datasets

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_steps=2
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


class _Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.found = []

    def __call__(self, graph, example_inputs):
        self.found.append(graph)
        return graph.forward

    def linears(self):
        return [sum(node.target is torch.nn.functional.linear for node in one.graph.nodes) for one in self.found]


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("BertForSequenceClassification", 18),
        pytest.param("DistilBertForQuestionAnswering", 18, marks=pytest.mark.slow),
        pytest.param("AlbertForTokenClassification", 19, marks=pytest.mark.slow),
        pytest.param("ModernBertForTokenClassification", 12, marks=pytest.mark.slow),
    ],
)
def test_compiled_the_encoder_is_one_graph_for_all_configurations_with_one_pattern(name, linears, monkeypatch):
    # Pytest would otherwise format every record of the compiler's trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    model, graphs, random = adapt(CASES[name].build()), _Graphs(), Random(0)
    compiled = torch.compile(model, backend=graphs, dynamic=True)
    for step in range(20):
        model.length_config = LengthConfig(tuple(sorted(random.sample(range(5, 39), LAYERS), reverse=True)), 40)
        ns = (40, 33, 27, 12) if step % 2 else (50, 21, 13)
        batch = inputs_for(model, ns)
        with torch.no_grad():
            assert_close(results(model, compiled(**batch), ns), results(model, model(**batch), ns))
        if step == 0:
            first = len(graphs.found)
            assert max(graphs.linears()) >= linears
    assert len(graphs.found) == first
    model.length_config = None
    with torch.no_grad():
        assert_close(results(model, compiled(**batch), ns), results(model, model(**batch), ns))
    torch._dynamo.reset()


def test_compiled_lengths_that_meet_in_some_layer_are_no_graph_of_their_own(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    model, graphs = adapt(CASES["BertForSequenceClassification"].build()), _Graphs()
    compiled = torch.compile(model, backend=graphs, dynamic=True)
    first = None
    # The shorter example keeps fewer rows in all layers, in the first two, and in none.
    for lengths, ns in (
        ((30, 20, 10), (40, 20)),
        ((30, 20, 6), (40, 38)),
        ((31, 9, 6), (40, 39)),
    ):
        model.length_config = LengthConfig(lengths, 40)
        batch = inputs_for(model, ns)
        with torch.no_grad():
            assert_close(results(model, compiled(**batch), ns), results(model, model(**batch), ns))
        first = first or len(graphs.found)
    assert len(graphs.found) == first
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------- bad input


def test_adapting_twice_changes_nothing_but_a_named_mode():
    model = adapt(CASES["BertForSequenceClassification"].build(), mode="restore")
    batch = inputs_for(model, NS)
    model.length_config = config_for(model)
    expected, kind = model(**batch).logits, type(model)
    assert type(adapt(model)) is kind
    assert adapt(model).length_config == config_for(model)
    assert torch.equal(model(**batch).logits, expected)
    assert model.bert(**batch).last_hidden_state.shape[1] == max(NS)
    adapt(model, mode="eliminate")
    assert model.bert(**batch).last_hidden_state.shape[1] == config_for(model).at_length(max(NS))[-1]


def test_a_base_that_is_adapted_already_can_get_a_head():
    model = CASES["BertForSequenceClassification"].build()
    adapt(model.bert)
    assert not is_adapted(model)
    adapt(model).length_config = config_for(model)
    assert torch.isfinite(model(**inputs_for(model, NS)).logits).all()


def test_configurations_that_do_not_fit_are_refused():
    model = adapt(CASES["BertForSequenceClassification"].build())
    with pytest.raises(ValueError, match="has 2 layers, the model has 3"):
        model.length_config = LengthConfig((5, 4), 5)
    with pytest.raises(ValueError, match="has 4 layers, the model has 3"), model.at(LengthConfig((5, 4, 4, 4), 5)):
        pass
    with pytest.raises(TypeError, match="LengthConfig or None"):
        model.length_config = (5, 4, 3)
    with pytest.raises(ValueError, match=r"skip_layers \[3\] must lie in 0..2"), model.at(None, skip_layers={3}):
        pass
    assert model.length_config is None


def test_architectures_outside_the_list_are_refused_with_the_list():
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"'gpt2' cannot be adapted; .*bert.*modernbert.*(\n.*){3}") as caught:
        adapt(transformers.GPT2Model(config))
    assert "lat_optuna/model/families.py" in str(caught.value)


@pytest.mark.parametrize("changes", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_decoders_are_refused(changes):
    with pytest.raises(ValueError, match="decoders"):
        adapt(CASES["BertModel"].build(**changes))


def test_other_wrong_use_is_refused():
    with pytest.raises(TypeError, match="transformers model"):
        adapt(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mode must be"):
        adapt(CASES["BertModel"].build(), mode="drop")
    with pytest.raises(ValueError, match="every token"):
        adapt(CASES["BertForQuestionAnswering"].build(), mode="eliminate")
    with pytest.raises(ValueError, match="not adapted"), at(CASES["BertModel"].build(), None):
        pass
