"""Options of ``adapt``: significance by [CLS] alone, and a last layer that gives [CLS] alone."""

import pytest
import torch
from test_adapted import NS, config_for, sizes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, TEXT_CASES, assert_close, inputs_for, results

from lat_optuna.flops import Architecture
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, load, num_layers, save
from lat_optuna.model.checkpoint import SideFile
from lat_optuna.model.families import head_kind, reads_first_row
from lat_optuna.model.inspection import kept_tokens

ALL_BUT_WINDOWS = [name for name in CASES if not name.startswith("ModernBert")]
FIRST_ROW = [name for name in CASES if reads_first_row(CASES[name].build())]
ONE_OF_EACH = ["BertForSequenceClassification", "RobertaForTokenClassification", "DistilBertForQuestionAnswering"]
ONE_OF_EACH += ["Albert-groups", "ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]


def by_definition(model, config, n):
    """Rows that [CLS] attends to most, layer by layer, from attentions of an unadapted eager model's layers."""
    embedded = model.embeddings(**inputs_for(model, [n], mask=False))
    positions, kept = list(range(n)), []
    for layer, count in zip(model.encoder.layer, config.at_length(n), strict=True):
        _, probabilities = layer.attention.self(embedded)
        votes = probabilities[0, :, 0].sum(0).tolist()
        ranked = sorted(range(len(positions)), key=lambda row: (row > 0, -votes[row], row))
        rows = sorted(ranked[:count])
        embedded = layer(embedded)[:, rows]
        positions = [positions[row] for row in rows]
        kept.append(tuple(index in positions for index in range(n)))
    return tuple(kept), embedded


@pytest.mark.parametrize("n", [20, 9])
def test_the_tokens_that_cls_attends_to_stay(n):
    model = adapt(CASES["BertModel"].build(), "eliminate", significance="cls")
    config = config_for(model)
    kept, output = by_definition(CASES["BertModel"].build("eager"), config, n)
    batch = inputs_for(model, [n], mask=False)
    assert kept_tokens(model, config, batch["input_ids"][0].tolist()) == kept
    with model.at(config):
        torch.testing.assert_close(model(**batch).last_hidden_state, output, atol=2e-5, rtol=1e-4)
    assert kept_tokens(adapt(model, significance="all"), config, batch["input_ids"][0].tolist()) != kept


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_by_cls_an_example_is_independent_of_its_batch(name, gradients):
    model = adapt(CASES[name].build(), significance="cls")
    with model.at(config_for(model)), torch.set_grad_enabled(gradients):
        alone = [results(model, model(**inputs_for(model, [n])), [n])[0] for n in NS]
        together = results(model, model(**inputs_for(model, NS)), NS)
        assert_close(together, alone)
        if "input_ids" in inputs_for(model, NS):
            left = results(model, model(**inputs_for(model, NS, pad_to=23, left=True)), NS, left=True)
            assert_close(left, alone)


@pytest.mark.parametrize("name", FIRST_ROW)
def test_a_last_layer_of_cls_alone_changes_no_result(name):
    plain = adapt(CASES[name].build())
    model = adapt(CASES[name].build(), last_layer="cls")
    batch = inputs_for(model, NS)
    config = config_for(model)
    for chosen in (None, config, LengthConfig.full(num_layers(model), 20)):
        with torch.no_grad(), model.at(chosen), plain.at(chosen):
            assert_close(results(model, model(**batch), NS), results(plain, plain(**batch), NS))
    with torch.no_grad(), model.at(config), plain.at(config):
        if "input_ids" in batch and "Multiple" not in name:
            left = inputs_for(model, NS, pad_to=23, left=True)
            ours, theirs = model(**left), plain(**left)
            assert_close(results(model, ours, NS, left=True), results(plain, theirs, NS, left=True))


def test_the_last_layer_that_runs_is_the_last():
    plain, model = (adapt(CASES["BertForSequenceClassification"].build(), last_layer=it) for it in ("all", "cls"))
    batch = inputs_for(model, NS)
    for skip in ({2}, {0, 1, 2}, {0, 1}):
        with model.at(config_for(model), skip), plain.at(config_for(model), skip):
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, atol=2e-5, rtol=1e-4)


def test_gradients_of_both_options_and_checkpointing():
    model = adapt(CASES["BertForSequenceClassification"].build(), significance="cls", last_layer="cls")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, found = inputs_for(model.train(), NS), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with model.at(config_for(model)):
            model(**batch).logits.square().sum().backward()
        found.append(
            {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-4, rtol=1e-4)


def counted(model, config, batch):
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), model.at(config), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("last_layer", ["all", "cls"])
@pytest.mark.parametrize("significance", ["all", "cls"])
@pytest.mark.parametrize("name", CASES)
def test_flops_of_every_family_and_option(name, significance, last_layer):
    plain = CASES[name].build()
    if significance == "cls" and name.startswith("ModernBert"):
        with pytest.raises(ValueError, match="sliding windows"):
            adapt(plain, significance=significance)
        return
    if last_layer == "cls" and not reads_first_row(plain):
        if head_kind(plain) == "token":
            with pytest.raises(ValueError, match="nothing but"):
                adapt(plain, last_layer=last_layer)
            return
        if head_kind(plain) == "sequence":
            return
    mode = "eliminate" if last_layer == "cls" else "auto"
    model = adapt(plain, mode, significance, last_layer)
    architecture = Architecture.of(model)
    assert (architecture.significance, architecture.last_layer) == (significance, last_layer)
    for ns in (sizes(model, NS), sizes(model, [20, 19])):
        for config in (
            None,
            config_for(model),
            config_for(model, (1.0, 0.9, 0.87)),
            config_for(model, (1.0, 1.0, 0.3)),
        ):
            assert counted(model, config, inputs_for(model, ns)) == architecture.batch_flops(config, ns)
    if name in TEXT_CASES:
        alone = inputs_for(model, [13], mask=False)
        assert counted(model, config_for(model), alone) == architecture.example_flops(config_for(model), 13)


def test_what_an_option_saves():
    architectures = {}
    for options in (("all", "all"), ("cls", "all"), ("all", "cls")):
        model = adapt(CASES["BertForSequenceClassification"].build(), "auto", *options)
        architectures[options] = Architecture.of(model)
    config = config_for(model)
    usual, by_cls, last = (architecture.example_flops(config, 20) for architecture in architectures.values())
    assert by_cls < usual
    assert last < usual
    # The dense model is counted with the same economy, and the last length of a configuration with none.
    assert architectures["all", "cls"].example_flops(None, 20) < architectures["all", "all"].example_flops(None, 20)
    other = LengthConfig((*config.lengths[:-1], 1), config.max_length)
    assert architectures["all", "cls"].example_flops(other, 20) == last


def test_options_stay_until_they_are_named():
    model = adapt(CASES["BertForSequenceClassification"].build(), significance="cls", last_layer="cls")
    assert Architecture.of(adapt(model)) == Architecture.of(model)
    assert Architecture.of(adapt(model, last_layer="all")).last_layer == "all"
    assert Architecture.of(model).significance == "cls"


def test_a_checkpoint_is_loaded_with_options(tmp_path):
    save(adapt(CASES["BertForSequenceClassification"].build()), tmp_path, SideFile(3, 20))
    architecture = Architecture.of(load(tmp_path, significance="cls", last_layer="cls"))
    assert (architecture.significance, architecture.last_layer) == ("cls", "cls")
    assert Architecture.of(load(tmp_path)).significance == "all"


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="significance must be 'all' or 'cls', not 'mean'"):
        adapt(CASES["BertModel"].build(), significance="mean")
    with pytest.raises(ValueError, match="last_layer must be 'all' or 'cls', not 1"):
        adapt(CASES["BertModel"].build(), last_layer=1)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification in mode 'restore' needs more"):
        adapt(CASES["BertForSequenceClassification"].build(), "restore", last_layer="cls")
    model = adapt(CASES["BertForSequenceClassification"].build(), last_layer="cls")
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**inputs_for(model, [5]), output_hidden_states=True)
