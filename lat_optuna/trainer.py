"""Training: LengthDrop, LayerDrop, the sandwich rule and in-place distillation (paper: section 3.1).

One optimiser step is a few passes over the same batch. The full model learns the label; random sub-models and the
smallest one learn the full model's prediction. Every pass is back-propagated before the next one starts, so that
memory stays near that of plain fine-tuning.
"""

from __future__ import annotations

import copy
import json
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import datasets
import pyarrow.compute
import safetensors
import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from lat_optuna.length_config import LengthConfig, Retention
from lat_optuna.model import adapt, at, num_layers
from lat_optuna.model.backends import without_cudnn_attention
from lat_optuna.model.checkpoint import SideFile, read_side_file, write_side_file
from lat_optuna.tasks import Task

PassKind = Literal["full", "random", "smallest"]
Divergence = Literal["forward", "reverse"]


@dataclass(frozen=True)
class SubModel:
    """One pass of an optimiser step.

    Attributes:
        kind: ``"full"``, ``"random"`` or ``"smallest"``.
        config: The length configuration; ``None`` is dense.
        skip_layers: Layers, counted from 0, that LayerDrop leaves out.
    """

    kind: PassKind
    config: LengthConfig | None = None
    skip_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LengthAdaptation:
    """How a model is made length-adaptive. The defaults are the paper's.

    Args:
        p: LengthDrop probability: a layer keeps at least ``1 - p`` of the vectors that the layer before it kept.
            The trained range reaches down to ``LengthConfig.smallest(p)``.
        layer_drop: Probability with which a random sub-model skips a layer (LayerDrop).
        num_random: ``n_s``, random sub-models in an optimiser step.
        max_length: ``l_0``, the longest input in tokens.
        retention: What shorter inputs keep, as in :class:`LengthConfig`.
        temperature: Softens both distributions of the distillation; its loss is multiplied by the square.
        sandwich: Whether the smallest sub-model is trained in every step. Without, one more random sub-model (which
            skips no layer) takes its place, so that both cost as many passes.
        distillation: Whether sub-models learn the full model's prediction. Without, they learn the label.
        label_weight: Share of the label's loss in a sub-model's, the rest being distillation.
        divergence: ``"forward"`` is KL(full || sub-model), ``"reverse"`` KL(sub-model || full).
        thin_teacher: Whether LayerDrop thins the full model, too.

    Raises:
        ValueError: A value is out of its range.
    """

    p: float = 0.2
    layer_drop: float = 0.2
    num_random: int = 2
    max_length: int = 128
    retention: Retention = "relative"
    temperature: float = 1.0
    sandwich: bool = True
    distillation: bool = True
    label_weight: float = 0.0
    divergence: Divergence = "forward"
    thin_teacher: bool = False

    def __post_init__(self) -> None:
        for name in ("p", "layer_drop", "label_weight"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.num_random < 0:
            raise ValueError(f"num_random must be at least 0, not {self.num_random}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")
        for name, values in (("retention", get_args(Retention)), ("divergence", get_args(Divergence))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, not {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def passes(self, num_layers: int, seed: int, step: int) -> tuple[SubModel, ...]:
        """The passes of one optimiser step: the full model first, the smallest last (sandwich rule).

        A function of its arguments, so that all ranks, all micro-batches of the step and a resumed run agree. The last
        pass skips no layer: under data parallelism its backward pass is the one that reduces every gradient.

        Args:
            num_layers: ``L`` of the model.
            seed: Seed of the run.
            step: Number of the optimiser step, from 0.
        """
        rng = random.Random(f"{seed}/{step}/0")
        passes = [SubModel("full", None, self._skipped(num_layers, rng) if self.thin_teacher else frozenset())]
        for number in range(1, self.num_random + (1 if self.sandwich else 2)):
            rng = random.Random(f"{seed}/{step}/{number}")
            config = LengthConfig.length_drop(self.p, num_layers, self.max_length, rng, self.retention)
            skipped = self._skipped(num_layers, rng)
            passes.append(SubModel("random", config, skipped if number <= self.num_random else frozenset()))
        if self.sandwich:
            smallest = LengthConfig.smallest(self.p, num_layers, self.max_length, self.retention)
            passes.append(SubModel("smallest", smallest))
        return tuple(passes)

    def _skipped(self, num_layers: int, rng: random.Random) -> frozenset[int]:
        """Layers that LayerDrop leaves out of one pass; not all, as a model of no layers is none."""
        skipped = {layer for layer in range(num_layers) if rng.random() < self.layer_drop}
        return frozenset(skipped - {num_layers - 1} if len(skipped) == num_layers else skipped)


class ExactTrainer(Trainer):
    """``transformers.Trainer`` with two repairs that both stages of training rest on.

    - The loss of an optimiser step is the mean over its items, however they are cut into micro-batches and ranks.
      (With encoders whose ``forward`` takes ``**kwargs`` and whose loss ignores ``num_items_in_batch``, such as BERT
      in transformers 5, Trainer adds the means of micro-batches up and multiplies by the number of ranks.)
    - The order of the examples is a function of (seed, epoch), grouped by length or not, so that a resumed run reads
      what the unbroken one would have read.

    A ``compute_loss_func`` keeps Trainer's contract: it normalises by ``num_items_in_batch`` itself.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Trainer would wrap the model in DataParallel: its threads know nothing of the sub-model in force, and its
        # batches would be as many times larger without a word.
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs; start one process a GPU with "
                f"`torchrun --nproc_per_node {self.args.n_gpu}`, or choose one with CUDA_VISIBLE_DEVICES"
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; in training, scaled to its share of the optimiser step."""
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self._share(inputs, num_items_in_batch) if model.training else 1.0
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss * share
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As in ``Trainer``, on GPUs too without a delay for every new length of input."""
        with without_cudnn_attention():
            return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in ``Trainer``, but without a pickle of the arguments where the folder is no checkpoint to resume from."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:
            Path(output_dir or self.args.output_dir or ".", "training_args.bin").unlink(missing_ok=True)

    def _share(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Any:
        """What a mean over this micro-batch counts in the mean over the optimiser step's items."""
        if num_items_in_batch is None or "labels" not in inputs:
            return 1 / self.current_gradient_accumulation_steps
        share = inputs["labels"].ne(-100).sum() / num_items_in_batch
        # The items were counted over all ranks, and averaging the gradients divides by the number of ranks again.
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not hasattr(dataset, "__len__") or strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if strategy == "random":
            return _EpochSampler(len(dataset), seed, self)
        # All ranks' batches of a step together: the ranks then work on inputs of about the same length.
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _EpochSampler(len(dataset), seed, self, _lengths(dataset), together)


class _EpochSampler(Sampler[int]):
    """Shuffles by (seed, epoch); with ``lengths``, neighbours have about the same length.

    The epoch is read from the trainer's state: ``set_epoch`` does not reach a sampler in every form that Trainer and
    accelerate give a data loader (not when a run under DDP is resumed in the middle of an epoch).
    """

    def __init__(
        self, size: int, seed: int, trainer: Trainer, lengths: list[int] | None = None, together: int = 1
    ) -> None:
        self.size, self.seed, self.trainer = size, seed, trainer
        self.lengths, self.together = lengths, together

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{epoch}").getrandbits(63))
        if self.lengths is None:
            yield from torch.randperm(self.size, generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self.lengths, self.together, generator=generator)


def _lengths(dataset: Any) -> list[int]:
    if isinstance(dataset, datasets.Dataset):  # row by row it takes seconds to minutes
        return pyarrow.compute.list_value_length(dataset.with_format("arrow")["input_ids"]).to_pylist()
    return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


class LengthAdaptiveTrainer(ExactTrainer):
    """Trains a model so that it works at any length configuration down to ``smallest(p)`` (section 3.1).

    Use it as ``transformers.Trainer``; the model is adapted in place if it is not yet. One optimiser step is the full
    model on the label, then ``num_random`` random sub-models with LayerDrop and the smallest one on the full model's
    detached prediction: forward KL, teacher to student. Each pass's loss is divided by the number of passes, their
    sum is Trainer's ``loss``; ``loss_full``, ``loss_random`` and ``loss_smallest`` are logged beside it undivided.
    Evaluation runs what ``model.length_config`` says: the dense model unless the user sets another.

    Checkpoints carry the side file that makes them length-adaptive. Data parallelism is DDP (``torchrun``).

    Args:
        model: As in ``Trainer``.
        args: As in ``Trainer``; its ``seed`` also draws the sub-models.
        adaptation: What is trained; the paper's settings by default.
        **kwargs: As in ``Trainer``.

    Raises:
        ValueError: DeepSpeed or FSDP is asked for, or one process sees several GPUs.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        adaptation: LengthAdaptation | None = None,
        **kwargs: Any,
    ) -> None:
        self.adaptation = adaptation or LengthAdaptation()
        super().__init__(None if model is None else adapt(model), args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "LengthAdaptiveTrainer runs several backward passes a step: use DDP, not DeepSpeed or FSDP"
            )
        self._logged: dict[PassKind, torch.Tensor] = {}
        self._logged_steps = 0

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """As in ``Trainer``, adapted."""
        return adapt(cast(PreTrainedModel, super().call_model_init(trial)))

    # ------------------------------------------------------------------ one step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """All passes of one micro-batch, forward and backward; returns their losses' sum, detached."""
        model.train()
        set_mode = getattr(self.optimizer, "train", None)  # of schedule-free optimisers
        if callable(set_mode):
            set_mode()
        inputs = self._prepare_inputs(inputs)
        core = cast(PreTrainedModel, self.model)  # ``model`` may be wrapped
        passes = self.adaptation.passes(num_layers(core), self.args.seed, self.state.global_step)
        teacher: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=self.args.device)
        with self._shared_by_passes(core), without_cudnn_attention():
            for sub_model in passes:
                # Gradients are reduced once a step. Trainer holds no_sync around all but the last micro-batch already.
                last = sub_model is passes[-1]
                with (
                    nullcontext() if last else self.accelerator.no_sync(model),
                    at(core, sub_model.config, sub_model.skip_layers),
                    self.compute_loss_context_manager(),
                ):
                    if sub_model.kind == "full":
                        loss, outputs = self.compute_loss(
                            model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
                        )
                        if self.adaptation.distillation:
                            teacher = _predictions(outputs)
                        del outputs
                    elif self.adaptation.distillation:
                        loss = self._sub_model_loss(model, inputs, teacher, num_items_in_batch)
                    else:
                        loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
                    self.accelerator.backward(loss / len(passes))
                loss = loss.detach()
                total += loss / len(passes)
                self._note(sub_model.kind, loss / sum(other.kind == sub_model.kind for other in passes))
        self._logged_steps += self.accelerator.sync_gradients
        return total

    @contextmanager
    def _shared_by_passes(self, model: PreTrainedModel) -> Iterator[None]:
        """What the passes of a step need not do each anew; on short inputs it is a good part of a pass.

        - The autocast of weights: the outer context, which changes no type, keeps the inner ones' cache of casts.
        - The gradient of the word embedding, as large as the vocabulary: the passes' gradients are added up where the
          vectors leave the table, and go back into it once. Not under DDP, which waits for it in the last pass, nor in
          compiled models, which see no hooks.
        """
        embedding = model.get_input_embeddings()
        simple = self.args.world_size == 1 and not self.args.torch_compile
        with torch.autocast(self.args.device.type, enabled=False):
            if not simple or not isinstance(embedding, torch.nn.Embedding) or not embedding.weight.requires_grad:
                yield
                return
            looked_up: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

            def share(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
                if not args or not output.requires_grad:
                    return output
                for ids, _, leaf in looked_up:
                    if ids is args[0]:
                        return leaf
                leaf = output.detach().requires_grad_()
                looked_up.append((args[0], output, leaf))
                return leaf

            hook = embedding.register_forward_hook(share)
            try:
                yield
            finally:
                hook.remove()
            for _, output, leaf in looked_up:
                if leaf.grad is not None:
                    output.backward(leaf.grad)

    def _sub_model_loss(
        self, model: Any, inputs: dict[str, Any], teacher: dict[str, torch.Tensor], num_items_in_batch: Any
    ) -> torch.Tensor:
        weight = self.adaptation.label_weight
        if weight:
            label_loss, student = self.compute_loss(model, dict(inputs), True, num_items_in_batch)
        else:
            label_loss, student = 0.0, model(**{k: v for k, v in inputs.items() if k not in self.label_names})
        loss = self.distillation_loss(_predictions(student, detach=False), teacher, inputs)
        return (1 - weight) * loss * self._share(inputs, num_items_in_batch) + weight * label_loss

    def distillation_loss(
        self,
        student_outputs: Mapping[str, torch.Tensor],
        teacher_outputs: Mapping[str, torch.Tensor],
        inputs: Mapping[str, Any],
    ) -> torch.Tensor:
        """How far a sub-model's prediction is from the full model's; override it for outputs of another kind.

        KL(teacher || student), or its reverse (``adaptation.divergence``). Classification: mean over examples.
        Regression: squared error. Several labels an example: KL of each label's Bernoulli, mean over labels.
        Token-level logits: mean over the tokens that carry a label, or over the real ones where none is given.
        Question answering: over the real positions, mean of start and end.

        Args:
            student_outputs: The sub-model's outputs by name, ``logits`` or ``start_logits`` and ``end_logits``.
            teacher_outputs: The full model's, detached.
            inputs: The batch as the model's ``forward`` takes it, labels included.

        Returns:
            A scalar, the mean over the batch.

        Raises:
            TypeError: The outputs are of none of these kinds.
        """
        student, teacher, temperature = student_outputs, teacher_outputs, self.adaptation.temperature
        if self.adaptation.divergence == "reverse":
            student, teacher = teacher, student
        mask = inputs.get("attention_mask")
        if "start_logits" in student and "end_logits" in student:
            start, end = (
                _kl(_real_positions(student[name], mask), _real_positions(teacher[name], mask), temperature)
                for name in ("start_logits", "end_logits")
            )
            return (start + end) / 2
        logits, labels = student.get("logits"), inputs.get("labels")
        if logits is not None and logits.ndim == 3:
            tokens = None
            if labels is not None and labels.shape == logits.shape[:2]:
                tokens = labels.ne(-100)
            elif mask is not None and mask.shape == logits.shape[:2]:
                tokens = mask.bool()
            # Picking the rows first keeps a vocabulary's worth of probabilities for unlabelled tokens out of memory.
            rows = slice(None) if tokens is None else tokens
            return _kl(logits[rows].flatten(0, -2), teacher["logits"][rows].flatten(0, -2), temperature)
        if logits is not None and logits.ndim == 2:
            problem = getattr(cast(PreTrainedModel, self.model).config, "problem_type", None)
            if problem == "regression" or (problem is None and logits.shape[1] == 1):
                return F.mse_loss(logits.float(), teacher["logits"].float())
            if problem == "multi_label_classification":
                return _bernoulli_kl(logits, teacher["logits"], temperature)
            if labels is None or labels.ndim == 1:
                return _kl(logits, teacher["logits"], temperature)
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in student.items())
        raise TypeError(
            f"no distillation loss is known for the outputs {shapes} of {type(self.model).__name__}; "
            "override LengthAdaptiveTrainer.distillation_loss, or train with distillation=False"
        )

    # ------------------------------------------------------------------ logs and checkpoints

    def _note(self, kind: PassKind, loss: torch.Tensor) -> None:
        # Sums stay on the device until they are logged: no pass waits for the one before.
        self._logged[kind] = self._logged[kind] + loss if kind in self._logged else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in ``Trainer``; adds the losses by kind of pass, averaged since they were last logged."""
        if "loss" in logs and self._logged_steps:
            means = self.accelerator.reduce(torch.stack(list(self._logged.values())), "mean") / self._logged_steps
            logs.update({f"loss_{kind}": mean for kind, mean in zip(self._logged, means.tolist(), strict=True)})
            self._logged, self._logged_steps = {}, 0
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in :class:`ExactTrainer`; writes ``length_adaptive.json`` too."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_side_file(output_dir or self.args.output_dir or ".", self._side_file())

    def _side_file(self) -> SideFile:
        training = {
            **_training(self.adaptation),
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            "seed": self.args.seed,
        }
        return SideFile(
            num_layers=num_layers(cast(PreTrainedModel, self.model)),
            max_length=self.adaptation.max_length,
            retention=self.adaptation.retention,
            training=training,
        )


def _training(adaptation: LengthAdaptation) -> dict[str, Any]:
    return {name: value for name, value in asdict(adaptation).items() if name not in ("max_length", "retention")}


def _predictions(outputs: Any, detach: bool = True) -> dict[str, torch.Tensor]:
    if not isinstance(outputs, Mapping):
        raise TypeError(
            f"the model returned a {type(outputs).__name__}; distillation needs outputs by name (return_dict=True)"
        )
    return {
        name: value.detach() if detach else value
        for name, value in outputs.items()
        if isinstance(value, torch.Tensor) and name != "loss"
    }


def _real_positions(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    # The lowest finite number, not -inf: padding gets probability 0, and 0 * (finite - finite) is 0.
    return logits if mask is None else logits.float().masked_fill(~mask.bool(), torch.finfo(torch.float32).min)


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) over the last dimension, mean over the rows; 0 where there are none."""
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / max(1, len(student))


def _bernoulli_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student, teacher = student.float() / temperature, teacher.float() / temperature
    target = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, target)
    return (cross - F.binary_cross_entropy_with_logits(teacher, target)) * temperature**2


# ---------------------------------------------------------------------- the metric on the way


class MetricCallback(TrainerCallback):
    """Measures a task's metric while a model is trained; entries of ``state.log_history`` hold what it finds.

    ``{metric_name: ..., "smallest": ..., "epoch": ..., "step": ...}``, both in percent. It draws no random number and
    leaves the model as it was: training is the same with it, bit for bit, and without.

    Args:
        task: Measured on its whole validation split, which should be small.
        smallest: Configuration to measure beside the dense model; the model must be adapted then.
        every: Optimiser steps between two measurements; by default, and in any case, one when training ends.
    """

    def __init__(self, task: Task, smallest: LengthConfig | None = None, every: int | None = None) -> None:
        self.task, self.smallest, self.every = task, smallest, every
        self._measured_at = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if self.every and state.global_step % self.every == 0:
            self._measure(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, unless training was stopped before its end."""
        if state.global_step >= state.max_steps:
            self._measure(args, state, kwargs["model"])

    def _measure(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        if not state.is_world_process_zero or self._measured_at == state.global_step:
            return
        self._measured_at = state.global_step
        figures = {self.task.metric_name: self._metric(args, model, None)}
        if self.smallest is not None:
            figures["smallest"] = self._metric(args, model, self.smallest)
        state.log_history.append({**figures, "epoch": state.epoch or 0.0, "step": state.global_step})

    def _metric(self, args: TrainingArguments, model: PreTrainedModel, config: LengthConfig | None) -> float:
        features = self.task.features("validation")
        lengths = _lengths(features)
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        predictions: list[Any] = [None] * len(order)
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        was_training = model.training
        model.eval()
        try:
            # Not inference_mode: a tensor that a model keeps from one pass to the next could not be trained with.
            with (
                torch.no_grad(),
                torch.autocast(args.device.type, dtype, enabled=args.fp16 or args.bf16),
                nullcontext() if self.smallest is None else at(model, config),
            ):
                for start in range(0, len(order), args.eval_batch_size):
                    rows = order[start : start + args.eval_batch_size]
                    batch = self.task.collate([features[row] for row in rows])
                    batch = {name: values.to(args.device) for name, values in batch.items()}
                    for row, prediction in zip(rows, self.task.predictions(model(**batch), batch), strict=True):
                        predictions[row] = prediction
        finally:
            model.train(was_training)
        return self.task.score("validation", predictions)[self.task.metric_name]


# ---------------------------------------------------------------------- a run that may be stopped


def fine_tune(
    model: PreTrainedModel,
    task: Task,
    args: TrainingArguments,
    adaptation: LengthAdaptation | None = None,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] | None = None,
) -> Trainer:
    """Fine-tune a model on a task, from where an earlier run in ``args.output_dir`` stopped if there was one.

    Batches are grouped by length. Where ``args`` ask for evaluation, it is the loss on the validation split. Nothing
    but Trainer's own checkpoints is written: ``trainer.save_model(folder)`` saves the result.

    Args:
        model: With the task's head; trained in place.
        task: Data and collation.
        args: As for ``Trainer``.
        adaptation: ``None`` for ordinary fine-tuning (stage 1), otherwise length-adaptive training (stage 2).
        resume: Whether to go on from the last complete checkpoint in ``args.output_dir``.
        callbacks: As for ``Trainer``; where there are any, they report and Trainer itself prints nothing.

    Returns:
        The trainer, after training; ``trainer.model`` is the trained model.

    Raises:
        ValueError: The checkpoints in ``args.output_dir`` belong to other settings or, without ``resume``, to another
            run; or ``adaptation`` does not fit the task.
    """
    if adaptation is not None and adaptation.max_length != task.max_length:
        raise ValueError(
            f"the adaptation's max_length is {adaptation.max_length}, the inputs of {task.name} have up to "
            f"{task.max_length} tokens: use LengthAdaptation(max_length={task.max_length})"
        )
    args = copy.copy(args)
    args.train_sampling_strategy = "group_by_length"
    checkpoint = last_complete_checkpoint(args.output_dir, args.world_size)
    if checkpoint is not None:
        if not resume:
            raise ValueError(f"{args.output_dir} holds checkpoints of an earlier run; resume it, or use another folder")
        _refuse_other_settings(checkpoint, adaptation)
    shared: dict[str, Any] = {
        "model": model,
        "args": args,
        "data_collator": task.collate,
        "train_dataset": task.features("train"),
        "eval_dataset": None if args.eval_strategy == "no" else task.features("validation"),
        "processing_class": task.tokenizer,
        "callbacks": list(callbacks or ()),
    }
    if adaptation is None:
        trainer: Trainer = ExactTrainer(**shared)
    else:
        trainer = LengthAdaptiveTrainer(adaptation=adaptation, **shared)
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if 0 < args.max_steps <= state.global_step:  # Trainer would train one more step in an epoch that has begun
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return trainer
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def last_complete_checkpoint(folder: str | Path | None, world_size: int = 1) -> Path | None:
    """The newest of Trainer's checkpoints in ``folder`` from which a run can go on.

    A checkpoint that a killed run left half-written is passed over.

    Args:
        folder: ``output_dir`` of the run; it need not exist.
        world_size: Number of processes, each of which has saved its random state.
    """
    steps = {}
    for path in Path(folder or ".").glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            steps[int(path.name.removeprefix("checkpoint-"))] = path
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_complete(steps[step], world_size)), None)


def _is_complete(checkpoint: Path, world_size: int) -> bool:
    # Trainer writes its state last. Archives end with their directory and safetensors know their size, so that a file
    # which was cut off shows, also where the machine lost power and the order of writes means little.
    rng_states = ["rng_state.pth"] if world_size <= 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safetensors.safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, safetensors.SafetensorError):
        return False
    archives = ("optimizer.pt", "scheduler.pt", *rng_states)
    return bool(weights) and all(zipfile.is_zipfile(checkpoint / name) for name in archives)


def _refuse_other_settings(checkpoint: Path, adaptation: LengthAdaptation | None) -> None:
    side = read_side_file(checkpoint)
    then = None if side is None else {**side.training, "max_length": side.max_length, "retention": side.retention}
    now = None if adaptation is None else asdict(adaptation)
    if then is None or now is None:
        differing = [] if then is now else ["adaptation"]
    else:
        differing = [name for name, value in now.items() if then.get(name) != value]
    if differing:
        raise ValueError(
            f"{checkpoint.parent} holds a run with other settings ({', '.join(differing)}): "
            "use another output_dir, or remove it to start anew"
        )
