"""The serving example: answers are the model's; a deep queue gets small budgets, an empty one the whole model."""

from __future__ import annotations

import threading

import torch

from examples.serve import AnytimeServer, ladder_of
from lat_optuna import LengthConfig, adapt, load
from lat_optuna.model import save
from lat_optuna.model.checkpoint import FrontPoint, SideFile
from tests.tiny_text import sentences, tiny_checkpoint, tiny_tokenizer


def test_the_budget_falls_as_the_queue_grows(tmp_path):
    from transformers import AutoModelForSequenceClassification

    front = (FrontPoint((8, 6, 2), 70.0, 0.4), FrontPoint((16, 12, 8), 80.0, 0.7))
    model = adapt(AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint(tmp_path / "plain")))
    folder = save(model, tmp_path / "adaptive", SideFile(3, 16, front=front, metric="accuracy"), tiny_tokenizer())
    ladder = ladder_of(folder)
    assert ladder == [None, LengthConfig((16, 12, 8), 16), LengthConfig((8, 6, 2), 16)]
    assert ladder_of(folder, [0.5]) == [None, LengthConfig.constant_ratio(0.5, 3, 16)]

    server = AnytimeServer(folder, ladder)
    everybody_waits, seen = threading.Event(), []

    def note(module, args, kwargs) -> None:
        everybody_waits.wait(60)
        seen.append(module.length_config)

    server.model.register_forward_pre_hook(note, with_kwargs=True)
    texts = [row["sentence"] for row in sentences(6)]
    answers = [server.submit(text) for text in texts]
    everybody_waits.set()
    found = [answer.result(60).logits for answer in answers]
    assert seen[1:] == [ladder[2], ladder[2], ladder[2], ladder[1], None]
    other = load(folder).eval()
    for text, config, logits in zip(texts, seen, found, strict=True):
        with torch.inference_mode(), other.at(config):
            assert torch.equal(other(**server.tokenizer(text, return_tensors="pt")).logits, logits)
