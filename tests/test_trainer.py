import copy
import random
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, at
from lat_optuna.model.checkpoint import SIDE_FILE, read_side_file
from lat_optuna.trainer import (
    ExactTrainer,
    LengthAdaptation,
    LengthAdaptiveTrainer,
    fine_tune,
    last_complete_checkpoint,
)

LAYERS, MAX_LENGTH, VOCABULARY = 3, 24, 60
ADAPTATION = LengthAdaptation(p=0.3, layer_drop=0.3, max_length=MAX_LENGTH)


def bert(head=BertForSequenceClassification, dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = BertConfig(
        **sizes,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        **{"num_labels": 3, **options},
    )
    return head(config)


def distilbert():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 64}
    config = DistilBertConfig(
        **sizes, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.3, num_labels=3
    )
    return DistilBertForSequenceClassification(config)


def rows(count=12, labels="class", seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        # The models' own loss of a span counts padding: only inputs of one length have one loss in any batch.
        n = MAX_LENGTH if labels == "span" else rng.randint(6, MAX_LENGTH)
        row = {"input_ids": [rng.randrange(1, VOCABULARY) for _ in range(n)], "attention_mask": [1] * n}
        if labels == "class":
            row["labels"] = rng.randrange(3)
        elif labels == "tokens":
            row["labels"] = [rng.choice([-100, 0, 1, 2]) for _ in range(n)]
        elif labels == "span":
            row["start_positions"], row["end_positions"] = rng.randrange(n), rng.randrange(n)
        made.append(row)
    return made


def collate(features):
    width = max(len(feature["input_ids"]) for feature in features)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if isinstance(values[0], list):
            values = [value + [fill[name]] * (width - len(value)) for value in values]
        batch[name] = torch.tensor(values)
    return batch


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step, after clipping."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(folder, model, data, adaptation=ADAPTATION, trainer=LengthAdaptiveTrainer, **options):
    watch = Gradients()
    extra = {"adaptation": adaptation} if trainer is LengthAdaptiveTrainer else {}
    trainer(
        model,
        arguments(folder, **options),
        train_dataset=data,
        data_collator=collate,
        callbacks=[watch],
        **extra,
    ).train()
    return watch.kept


def same(left, right, atol=2e-6):
    assert left.keys() == right.keys()
    assert all(value.abs().max() < 1e3 for value in left.values())
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------ what a step consists of


def test_passes_are_a_function_of_seed_and_step():
    first = ADAPTATION.passes(LAYERS, seed=1, step=5)
    assert first == ADAPTATION.passes(LAYERS, seed=1, step=5)
    assert first[1:-1] != ADAPTATION.passes(LAYERS, seed=1, step=6)[1:-1]
    assert first[1:-1] != ADAPTATION.passes(LAYERS, seed=2, step=5)[1:-1]
    assert first[1] != first[2]


def test_sandwich_is_dense_first_and_smallest_whole_last():
    for step in range(20):
        full, *random_ones, smallest = ADAPTATION.passes(6, 0, step)
        assert (full.kind, full.config, full.skip_layers) == ("full", None, frozenset())
        assert smallest.kind == "smallest"
        assert smallest.config == LengthConfig.smallest(0.3, 6, MAX_LENGTH)
        assert smallest.skip_layers == frozenset()
        assert [sub_model.kind for sub_model in random_ones] == ["random", "random"]
        for sub_model in random_ones:
            assert all(a >= b for a, b in zip(sub_model.config, smallest.config, strict=True))


def test_layer_drop_skips_layers_at_its_rate_and_never_all():
    adaptation = LengthAdaptation(layer_drop=0.25, num_random=1)
    skipped = [len(adaptation.passes(8, 0, step)[1].skip_layers) for step in range(1000)]
    assert abs(sum(skipped) / 8000 - 0.25) < 0.02
    most = LengthAdaptation(layer_drop=0.99, num_random=1)
    assert max(len(most.passes(4, 0, step)[1].skip_layers) for step in range(200)) == 3
    none = LengthAdaptation(layer_drop=0.0, num_random=3)
    assert not any(sub_model.skip_layers for sub_model in none.passes(4, 0, 0))


def test_ablations():
    no_sandwich = LengthAdaptation(sandwich=False, layer_drop=0.5)
    for step in range(20):
        passes = no_sandwich.passes(8, 0, step)
        assert [sub_model.kind for sub_model in passes] == ["full", "random", "random", "random"]
        assert passes[-1].skip_layers == frozenset()
    assert [sub_model.kind for sub_model in LengthAdaptation(num_random=0).passes(4, 0, 0)] == ["full", "smallest"]
    no_drop = LengthAdaptation(p=0.0).passes(4, 0, 0)
    assert all(sub_model.config.is_full for sub_model in no_drop[1:])
    thin = [LengthAdaptation(thin_teacher=True).passes(8, 0, step) for step in range(300)]
    assert sum(len(passes[0].skip_layers) for passes in thin) / (300 * 8) == pytest.approx(0.2, abs=0.03)
    assert all(passes[0].config is None for passes in thin)
    assert [passes[1:] for passes in thin] == [LengthAdaptation().passes(8, 0, step)[1:] for step in range(300)]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"p": 1.0}, "p must"),
        ({"p": -0.1}, "p must"),
        ({"layer_drop": 1.0}, "layer_drop"),
        ({"num_random": -1}, "num_random"),
        ({"max_length": 0}, "max_length"),
        ({"retention": "half"}, "retention"),
        ({"temperature": 0.0}, "temperature"),
        ({"label_weight": 1.0}, "label_weight"),
        ({"divergence": "both"}, "divergence"),
    ],
)
def test_adaptation_refuses(wrong, word):
    with pytest.raises(ValueError, match=word):
        LengthAdaptation(**wrong)


# ------------------------------------------------------------------ gradients


def by_hand(model, batch, adaptation, seed=7, step=0):
    """The gradients of one optimiser step as section 3.1 says them."""
    model = adapt(copy.deepcopy(model)).train()
    passes = adaptation.passes(LAYERS, seed, step)
    total = 0.0
    with model.at(None):
        full = model(**batch)
    total = total + full.loss
    target = full.logits.detach().softmax(-1)
    for sub_model in passes[1:]:
        with model.at(sub_model.config, skip_layers=sub_model.skip_layers):
            student = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        total = total + (target * (target.log() - student.logits.log_softmax(-1))).sum(-1).mean()
    (total / len(passes)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [bert, distilbert])
def test_step_is_the_sum_of_its_passes(tmp_path, build):
    data = rows(8)
    expected = by_hand(build(), collate(data), ADAPTATION)
    same(gradients(tmp_path, build(), data, per_device_train_batch_size=8), expected)


def test_full_pass_is_dense_whatever_configuration_is_set(tmp_path):
    data = rows(8)
    model = adapt(bert())
    model.length_config = chosen = LengthConfig.smallest(0.5, LAYERS, MAX_LENGTH)
    got = gradients(tmp_path, model, data, per_device_train_batch_size=8)
    same(got, by_hand(bert(), collate(data), ADAPTATION))
    assert model.length_config == chosen


def test_without_distillation_sub_models_learn_the_label(tmp_path):
    data, adaptation = rows(8), LengthAdaptation(p=0.3, max_length=MAX_LENGTH, distillation=False)
    model, batch = adapt(bert()).train(), collate(data)
    passes = adaptation.passes(LAYERS, 7, 0)
    for sub_model in passes:
        with model.at(sub_model.config, skip_layers=sub_model.skip_layers):
            (model(**batch).loss / len(passes)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(gradients(tmp_path, bert(), data, adaptation, per_device_train_batch_size=8), expected)


def test_a_sub_models_loss_may_be_shared_with_the_label(tmp_path):
    data = rows(8)
    parts = {
        weight: gradients(
            tmp_path,
            bert(),
            data,
            LengthAdaptation(p=0.3, max_length=MAX_LENGTH, label_weight=weight),
            per_device_train_batch_size=8,
        )
        for weight in (0.0, 0.25)
    }
    label = LengthAdaptation(p=0.3, max_length=MAX_LENGTH, distillation=False)
    parts[1.0] = gradients(tmp_path, bert(), data, label, per_device_train_batch_size=8)
    mixed = {name: 0.75 * parts[0.0][name] + 0.25 * parts[1.0][name] for name in parts[0.0]}
    same(parts[0.25], mixed)


@pytest.mark.parametrize("trainer", [ExactTrainer, LengthAdaptiveTrainer])
@pytest.mark.parametrize(
    ("head", "labels", "cuts"),
    [
        (BertForSequenceClassification, "class", [(2, 4), (3, 3)]),
        (BertForTokenClassification, "tokens", [(2, 4), (3, 3)]),
        (BertForQuestionAnswering, "span", [(2, 4)]),
    ],
)
def test_accumulation_equals_one_batch(tmp_path, trainer, head, labels, cuts):
    data = rows(8, labels)
    options = {"num_labels": 2} if labels == "span" else {}
    whole = gradients(tmp_path, bert(head, **options), data, trainer=trainer, per_device_train_batch_size=8)
    for size, steps in cuts:
        cut = gradients(
            tmp_path,
            bert(head, **options),
            data,
            trainer=trainer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        same(cut, whole, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    data = rows(8)
    options = {"per_device_train_batch_size": 8}
    plain = gradients(tmp_path, bert(), data, **options)
    same(gradients(tmp_path, bert(), data, activation_checkpointing=True, **options), plain)


def test_clipping_sees_the_gradient_of_the_whole_step(tmp_path):
    data = rows(8)
    options = {"per_device_train_batch_size": 8}
    plain = gradients(tmp_path, bert(), data, **options)
    norm = torch.stack([value.norm() for value in plain.values()]).norm()
    clipped = gradients(tmp_path, bert(), data, max_grad_norm=norm.item() / 2, **options)
    same(clipped, {name: value / 2 for name, value in plain.items()})


def test_label_smoothing_is_of_the_full_model_alone(tmp_path):
    data = rows(8)
    batch = collate(data)
    trainer = LengthAdaptiveTrainer(
        bert(),
        arguments(tmp_path, per_device_train_batch_size=8, label_smoothing_factor=0.2),
        adaptation=ADAPTATION,
        train_dataset=data,
        data_collator=collate,
    )
    trainer.train()
    smoothed = F.cross_entropy(bert().train()(**batch).logits, batch["labels"], label_smoothing=0.2)
    assert trainer.state.log_history[0]["loss_full"] == pytest.approx(smoothed.item(), rel=1e-5)


def test_bf16_autocast_is_near_fp32(tmp_path):
    data = rows(8)
    exact = gradients(tmp_path, bert(), data, per_device_train_batch_size=8)
    rough = gradients(tmp_path, bert(), data, per_device_train_batch_size=8, bf16=True)
    exact, rough = (torch.cat([value.flatten() for value in kept.values()]) for kept in (exact, rough))
    assert not torch.equal(exact, rough)
    assert F.cosine_similarity(exact, rough, dim=0) > 0.9


# ------------------------------------------------------------------ the loop


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("head", [BertForSequenceClassification, BertForMaskedLM])
def test_what_passes_share_changes_no_gradient(tmp_path, monkeypatch, head, bf16):
    def data():
        made = rows()
        return made if head is BertForSequenceClassification else [row | {"labels": row["input_ids"]} for row in made]

    adaptation = replace(ADAPTATION, distillation=False)
    filled = []
    embed = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional, "embedding", lambda ids, weight, *args: filled.append(weight) or embed(ids, weight, *args)
    )
    shared = gradients(tmp_path, bert(head, dropout=0.1), data(), adaptation, bf16=bf16)
    assert filled  # the models do look their words up
    monkeypatch.setattr(LengthAdaptiveTrainer, "_shared_by_passes", lambda self, model: nullcontext())
    apart = gradients(tmp_path, bert(head, dropout=0.1), data(), adaptation, bf16=bf16)
    same(shared, apart)


def test_the_vocabularys_gradient_is_made_once_a_step(tmp_path):
    model = bert()
    made = []
    model.get_input_embeddings().weight.register_hook(lambda gradient: made.append(gradient))
    gradients(tmp_path, model, rows())
    assert len(made) == 1


def test_sub_models_are_the_same_for_all_micro_batches(tmp_path, monkeypatch):
    seen = []

    def watched(model, config, skip_layers):
        seen.append((config, skip_layers))
        return at(model, config, skip_layers)

    monkeypatch.setattr("lat_optuna.trainer.at", watched)
    LengthAdaptiveTrainer(
        bert(),
        arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2),
        adaptation=ADAPTATION,
        train_dataset=rows(12),
        data_collator=collate,
    ).train()
    steps = [[(one.config, one.skip_layers) for one in ADAPTATION.passes(LAYERS, 7, step)] for step in (0, 1)]
    assert seen == [*steps[0] * 3, *steps[1] * 3]


def test_losses_are_logged_apart_and_add_up(tmp_path):
    trainer = LengthAdaptiveTrainer(
        bert(),
        arguments(tmp_path, gradient_accumulation_steps=2, max_steps=6, logging_steps=3),
        adaptation=ADAPTATION,
        train_dataset=rows(20),
        data_collator=collate,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [3, 6]
    for entry in logs:
        parts = entry["loss_full"] + 2 * entry["loss_random"] + entry["loss_smallest"]
        assert entry["loss"] == pytest.approx(parts / 4, rel=1e-4)
        assert min(entry["loss_full"], entry["loss_random"], entry["loss_smallest"]) > 0
    assert logs[0]["loss_full"] != logs[1]["loss_full"]


def test_logged_full_loss_is_the_dense_models(tmp_path):
    data = rows(8)
    trainer = LengthAdaptiveTrainer(
        bert(),
        arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        adaptation=ADAPTATION,
        train_dataset=data,
        data_collator=collate,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss_full"] == pytest.approx(bert()(**collate(data)).loss.item(), rel=1e-5)


def test_evaluation_is_dense_and_leaves_the_configuration(tmp_path):
    data = rows(8)
    dense = bert().eval()(**collate(data)).loss.item()
    trainer = LengthAdaptiveTrainer(
        bert(),
        arguments(tmp_path, per_device_eval_batch_size=8),
        adaptation=ADAPTATION,
        eval_dataset=data,
        data_collator=collate,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense, rel=1e-5)
    trainer.model.length_config = chosen = LengthConfig.smallest(0.6, LAYERS, MAX_LENGTH)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(dense, rel=1e-3)
    assert trainer.model.length_config == chosen


def test_model_init_is_adapted(tmp_path):
    trainer = LengthAdaptiveTrainer(
        args=arguments(tmp_path),
        model_init=lambda: bert(),
        adaptation=ADAPTATION,
        train_dataset=rows(4),
        data_collator=collate,
    )
    trainer.train()
    assert trainer.model.length_config is None
    assert "loss_smallest" in trainer.state.log_history[0]


def test_saved_model_is_a_length_adaptive_checkpoint(tmp_path):
    trainer = LengthAdaptiveTrainer(
        bert(),
        arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2),
        adaptation=ADAPTATION,
        train_dataset=rows(8),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
        side = read_side_file(folder)
        assert (side.num_layers, side.max_length, side.retention, side.front) == (LAYERS, MAX_LENGTH, "relative", ())
        assert (side.training["p"], side.training["layer_drop"], side.training["num_random"]) == (0.3, 0.3, 2)
        assert (side.training["steps"], side.training["seed"]) == (2, 7)
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names == {"config.json", "model.safetensors", SIDE_FILE}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert type(loaded) is BertForSequenceClassification
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


# ------------------------------------------------------------------ distillation


def loss_of(tmp_path, student, teacher, inputs, model=None, **options):
    trainer = LengthAdaptiveTrainer(
        bert() if model is None else model,
        arguments(tmp_path),
        adaptation=LengthAdaptation(max_length=MAX_LENGTH, **options),
        train_dataset=rows(2),
        data_collator=collate,
    )
    return trainer.distillation_loss(student, teacher, inputs)


def kl(teacher, student):
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_classes_learn_by_forward_kl(tmp_path):
    s, t = torch.randn(2, 5, 3)
    got = loss_of(tmp_path, {"logits": s}, {"logits": t}, {})
    torch.testing.assert_close(got, kl(t, s).mean())
    warm = loss_of(tmp_path, {"logits": s}, {"logits": t}, {}, temperature=2.0)
    torch.testing.assert_close(warm, 4 * kl(t / 2, s / 2).mean())
    reverse = loss_of(tmp_path, {"logits": s}, {"logits": t}, {}, divergence="reverse")
    torch.testing.assert_close(reverse, kl(s, t).mean())


def test_regression_learns_by_squared_error(tmp_path):
    s, t = torch.randn(2, 5, 1)
    got = loss_of(tmp_path, {"logits": s}, {"logits": t}, {}, model=bert(num_labels=1))
    torch.testing.assert_close(got, ((s - t) ** 2).mean())


def test_several_labels_learn_by_the_kl_of_each(tmp_path):
    s, t = torch.randn(2, 5, 3)
    model = bert(problem_type="multi_label_classification")
    got = loss_of(tmp_path, {"logits": s}, {"logits": t}, {"labels": torch.ones(5, 3)}, model=model)
    both = [torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (t, s)]
    torch.testing.assert_close(got, kl(*both).mean())


def test_spans_learn_over_real_positions(tmp_path):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    s = {name: torch.randn(2, 5, requires_grad=True) for name in ("start_logits", "end_logits")}
    t = {name: torch.randn(2, 5) for name in s}
    got = loss_of(tmp_path, s, t, {"attention_mask": mask})
    expected = 0.0
    for name in s:
        for row, real in ((0, 5), (1, 3)):
            expected = expected + kl(t[name][row, :real], s[name][row, :real]) / 4
    torch.testing.assert_close(got, expected)
    got.backward()
    assert s["start_logits"].grad[1, 3:].eq(0).all()
    assert s["start_logits"].grad.isfinite().all()


def test_tokens_learn_where_they_carry_a_label(tmp_path):
    s, t = torch.randn(2, 2, 4, 3)
    labels = torch.tensor([[-100, 1, 2, -100], [-100, 0, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    divergence = kl(t, s)
    got = loss_of(tmp_path, {"logits": s}, {"logits": t}, {"labels": labels, "attention_mask": mask})
    torch.testing.assert_close(got, divergence[labels.ne(-100)].mean())
    got = loss_of(tmp_path, {"logits": s}, {"logits": t}, {"attention_mask": mask})
    torch.testing.assert_close(got, divergence[mask.bool()].mean())
    nothing = loss_of(tmp_path, {"logits": s}, {"logits": t}, {"labels": torch.full((2, 4), -100)})
    assert nothing.item() == 0.0


def test_masked_language_models_train(tmp_path):
    model = bert(BertForMaskedLM)
    kept = gradients(tmp_path, model, rows(8, "tokens"), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert all(value.isfinite().all() for value in kept.values())


def test_unknown_outputs_are_refused_by_name(tmp_path):
    outputs = {"prediction_logits": torch.randn(2, 4, 3), "seq_relationship_logits": torch.randn(2, 2)}
    with pytest.raises(TypeError, match=r"prediction_logits \(2, 4, 3\).*distillation_loss"):
        loss_of(tmp_path, outputs, outputs, {})


# ------------------------------------------------------------------ stopped and resumed


class Tokenizer:
    model_input_names = ("input_ids", "attention_mask")

    def save_pretrained(self, folder):
        return ()


class StandInTask:
    name = "stand-in"
    metric_name = "accuracy"
    max_length = MAX_LENGTH
    tokenizer = Tokenizer()
    collate = staticmethod(collate)

    def features(self, split):
        return Dataset.from_list(rows(22, seed=0 if split == "train" else 1))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(folder, adaptation, stop=None, **options):
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, **options}
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", **settings}
    torch.manual_seed(random.randrange(1000))  # a run depends on nothing that was drawn before it
    model = bert(dropout=0.1, seed=3)
    callbacks = None if stop is None else [StopAt(stop)]
    return fine_tune(model, StandInTask(), arguments(folder, **settings), adaptation, callbacks=callbacks)


@pytest.mark.parametrize("adaptation", [None, ADAPTATION], ids=["stage-1", "stage-2"])
@pytest.mark.parametrize("stop", [5, 7, 9])  # 6 steps an epoch: within the first, at its end, within the second
def test_stopped_and_resumed_ends_where_an_unbroken_run_ends(tmp_path, adaptation, stop):
    unbroken = run(tmp_path / "unbroken", adaptation)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", adaptation, stop)
    # killed while it wrote the next checkpoint
    last = last_complete_checkpoint(tmp_path / "stopped")
    assert last.name == f"checkpoint-{stop // 2 * 2}"
    half = shutil.copytree(last, last.with_name(f"checkpoint-{stop + 1}"))
    (half / "trainer_state.json").unlink()
    resumed = run(tmp_path / "stopped", adaptation)
    assert resumed.state.global_step == unbroken.state.global_step == 12
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    finals = [trainer.state.log_history[-2]["loss"] for trainer in (unbroken, resumed)]
    assert finals[0] == finals[1]


@pytest.mark.parametrize("options", [{}, {"max_steps": 8, "num_train_epochs": 1}], ids=["epochs", "max_steps"])
def test_a_finished_run_is_not_trained_again(tmp_path, options):
    first = run(tmp_path, ADAPTATION, **options)
    again = run(tmp_path, ADAPTATION, stop=first.state.global_step + 1, **options)
    assert again.state.global_step == first.state.global_step
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize(
    "broken", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_half_written_checkpoints_are_passed_over(tmp_path, broken):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    run(tmp_path, None, max_steps=4)
    path = tmp_path / "checkpoint-4" / broken
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    path.unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_other_settings_do_not_resume(tmp_path):
    run(tmp_path, ADAPTATION, max_steps=2)
    with pytest.raises(ValueError, match=r"other settings \(p\)"):
        run(tmp_path, LengthAdaptation(p=0.35, layer_drop=0.3, max_length=MAX_LENGTH), max_steps=4)
    with pytest.raises(ValueError, match=r"other settings \(adaptation\)"):
        run(tmp_path, None, max_steps=4)
    with pytest.raises(ValueError, match="earlier run"):
        fine_tune(bert(), StandInTask(), arguments(tmp_path), ADAPTATION, resume=False)


def test_adaptation_has_the_tasks_length(tmp_path):
    with pytest.raises(ValueError, match=rf"LengthAdaptation\(max_length={MAX_LENGTH}\)"):
        run(tmp_path, LengthAdaptation(max_length=128))


def test_batches_are_grouped_by_length_and_reshuffled(tmp_path):
    widths = []

    class Watched(StandInTask):
        @staticmethod
        def collate(features):
            widths.append([len(feature["input_ids"]) for feature in features])
            return collate(features)

        def features(self, split):
            return Dataset.from_list(rows(64))

    fine_tune(bert(), Watched(), arguments(tmp_path, max_steps=-1, num_train_epochs=2))
    spread = [max(batch) - min(batch) for batch in widths]
    assert sum(spread) / len(spread) < 5  # shuffled batches of four have 11
    epochs = [sorted(map(tuple, widths[:16])), sorted(map(tuple, widths[16:]))]
    flat = [sorted(sum(epoch, ())) for epoch in epochs]
    assert flat[0] == flat[1] == sorted(len(row["input_ids"]) for row in rows(64))
    assert widths[:16] != widths[16:]
