"""The worked example in the documentation works as it stands there."""

import re
from pathlib import Path

import torch
from zoo import LAYERS, Case, assert_close, inputs_for, reference, results

from lat_optuna.flops import Architecture
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, families

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
SETTINGS = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
SETTINGS |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 66, "initializer_range": 0.4}
CASE = Case("", "RobertaPreLayerNormForTokenClassification", "RobertaPreLayerNormConfig", SETTINGS)


def test_the_worked_example_adds_a_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(DOCUMENT), "exec"), {})
    dense, plain = CASE.build(), CASE.build("eager")
    batch = inputs_for(dense, [20, 9])
    expected = dense(**batch).logits
    model, config = adapt(dense), LengthConfig((14, 9, 4), 20)
    assert torch.equal(model(**batch).logits, expected)
    with model.at(config):
        found = results(model, model(**batch), [20, 9])
    by_definition = []
    for n in (20, 9):
        with reference(plain, config, n, restored=True):
            by_definition += results(plain, plain(**inputs_for(plain, [n], mask=False)), [n])
    assert_close(found, by_definition)
    assert Architecture.of(model).example_flops(config, 20) < Architecture.of(model).example_flops(None, 20)
