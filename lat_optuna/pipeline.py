"""From a study file to a trained, searched and reported model: what the command line does, for Python too.

Everything is resumable: a finished step is recognised by what it left in the study's folder and is not repeated.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig
from lat_optuna.spec import SpecError, StudySpec, resolve_checkpoint

if TYPE_CHECKING:
    import optuna

    from lat_optuna.latency import LatencyModel
    from lat_optuna.progress import Update
    from lat_optuna.report import KeptWords
    from lat_optuna.search.evaluator import Evaluator, ModelEvaluator
    from lat_optuna.search.front import Baselines, Front
    from lat_optuna.search.plan import SearchPlan
    from lat_optuna.search.worker import Ended, OnProgress, Search
    from lat_optuna.search.worker import Progress as SearchProgress
    from lat_optuna.tasks import Split, Task

REPORTING_SPLIT: Split = "validation"
"""What people are told; no search selects on it where there is a split ``"search"``."""
SAMPLE_ROWS = 512
"""Validation rows, at most, on which the metric is looked at while a model is trained."""
PUBLISH_SECONDS = 30.0
"""Seconds between two times that a search brings the dashboard up to date."""
SHARE_OF_TIME = 0.05
"""Most of the time that goes into that."""

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------- task and training


def make_task(spec: StudySpec) -> Task:
    """The task of a study file, tokenised with its model's tokenizer."""
    settings = spec.task.model_dump(exclude={"type"})
    checkpoint = resolve_checkpoint(spec.model)
    if spec.task.type == "text_classification":
        from lat_optuna.tasks.text_classification import TextClassification

        return TextClassification(checkpoint, seed=spec.training.seed, **settings)
    if spec.task.type == "question_answering":
        from lat_optuna.tasks.question_answering import QuestionAnswering

        return QuestionAnswering(checkpoint, seed=spec.training.seed, **settings)
    if spec.task.type == "token_classification":
        from lat_optuna.tasks.token_classification import TokenClassification

        return TokenClassification(checkpoint, seed=spec.training.seed, **settings)
    if spec.task.type == "stdlib_code":
        from lat_optuna.tasks.stdlib_code import StdlibCode

        return StdlibCode(checkpoint, seed=spec.training.seed, **settings)
    from lat_optuna.tasks.stdlib_docs import StdlibDocs

    return StdlibDocs(checkpoint, seed=spec.training.seed, **settings)


def pretrained(spec: StudySpec) -> str:
    """The encoder that a study starts from, as transformers takes it, with what ``model`` changes of it.

    A changed one lies in the study's folder ``pretrained`` and is made once.

    Raises:
        SpecError: The encoder has no more layers than ``model.layers``, or no dropout on attention probabilities.
    """
    checkpoint, layers, dropout = resolve_checkpoint(spec.model), spec.model.layers, spec.model.attention_dropout
    if layers is None and dropout is None:
        return checkpoint
    folder = spec.output / "pretrained"
    if not folder.is_dir():
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(checkpoint)
        if layers is not None:
            if layers >= config.num_hidden_layers:
                raise SpecError(
                    f"model.layers: {checkpoint} has {config.num_hidden_layers} layers; keep fewer than that, "
                    f"not {layers}"
                )
            config.num_hidden_layers = layers
        if dropout is not None:
            names = [name for name in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, name)]
            if not names:
                raise SpecError(
                    f"model.attention_dropout: {checkpoint} ({config.model_type}) has no such setting; leave it out"
                )
            setattr(config, names[0], dropout)
        partial = folder.with_name("pretrained.partial")
        AutoModel.from_pretrained(checkpoint, config=config).save_pretrained(partial)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(partial)
        partial.rename(folder)
    return str(folder)


@dataclass(frozen=True)
class Variant:
    """Another second stage from the same standard model and with as many updates, to compare with.

    Attributes:
        name: Of its folder.
        adaptation: Settings of :class:`lat_optuna.trainer.LengthAdaptation` in place of the study's: an ablation.
        fixed: The one configuration that the model is trained with, on the label (PoWER-BERT's last stage); the full
            one is fine-tuning that goes on.
    """

    name: str
    adaptation: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fixed: LengthConfig | None = None


@dataclass(frozen=True)
class Stage:
    """One of the two stages of training (paper: section 4.1).

    Attributes:
        spec: The study.
        adaptive: Whether this is the stage with LengthDrop.
        variant: What is done in its place, for a comparison.
    """

    spec: StudySpec
    adaptive: bool
    variant: Variant | None = None

    @property
    def label(self) -> str:
        """What people see."""
        if self.variant is not None:
            return f"training variant {self.variant.name}"
        return "length-adaptive training" if self.adaptive else "standard fine-tuning"

    @property
    def folder(self) -> Path:
        """Where the trained model lies; it appears whole, when the stage is done."""
        if self.variant is not None:
            return self.spec.output / f"variant-{self.variant.name}"
        return self.spec.adaptive_folder if self.adaptive else self.spec.standard_folder

    @property
    def is_complete(self) -> bool:
        """Whether the stage is done.

        Raises:
            SpecError: It was done, or begun, with other settings than the study file's; the message names them.
        """
        self._check_settings()
        return self.folder.is_dir()

    def run(self, update: Update | None = None) -> Path:
        """Train to the end, from the last checkpoint if there is one.

        Args:
            update: Is told of every optimiser step.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of that moment has been saved.
        """
        from transformers import set_seed

        from lat_optuna.model import adapt, num_layers
        from lat_optuna.trainer import LengthAdaptation, MetricCallback, fine_tune

        self._check_settings()
        training = self.spec.training
        task = make_task(self.spec)
        self._note_settings()
        start = self.spec.standard_folder if self.adaptive else pretrained(self.spec)
        fixed = self.variant.fixed if self.variant else None
        adaptation = None
        if self.adaptive and fixed is None:
            adaptation = LengthAdaptation(
                p=training.p,
                layer_drop=training.layer_drop,
                num_random=training.num_random,
                max_length=self.spec.task.max_length,
                retention=self.spec.search.retention,
            )
            adaptation = replace(adaptation, **(self.variant.adaptation if self.variant else {}))
        sample = make_task(_sampled(self.spec))
        set_seed(training.seed)  # a new head's weights are drawn before Trainer seeds anything
        model: Any = task.build_model(str(start))
        if fixed is not None:
            adapt(model).length_config = None if fixed.is_full else fixed
        smallest = (
            LengthConfig.smallest(adaptation.p, num_layers(model), adaptation.max_length, adaptation.retention)
            if adaptation
            else None
        )
        metric = MetricCallback(sample, smallest, training.eval_steps)
        with _graceful_interrupt() as interrupted:
            trainer = fine_tune(
                model,
                task,
                self._arguments(),
                adaptation=adaptation,
                callbacks=[metric, _progress_callback(update, interrupted, (task.metric_name, "smallest"))],
            )
        if interrupted.is_set():
            raise KeyboardInterrupt
        partial = self.folder.with_name(self.folder.name + ".partial")
        if _is_first_rank():
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(partial))  # by all ranks: they meet inside of it
        if _is_first_rank():
            task.tokenizer.save_pretrained(str(partial))
            write_json(partial / "losses.json", trainer.state.log_history)
            partial.rename(self.folder)
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        return self.folder

    @property
    def _checkpoints(self) -> Path:
        return self.spec.output / "checkpoints" / self.folder.name

    def _arguments(self) -> Any:
        import torch
        from transformers import TrainingArguments

        training = self.spec.training
        rate = training.adaptive_learning_rate if self.adaptive else None
        precision = best_precision() if training.precision == "auto" else training.precision
        return TrainingArguments(
            output_dir=str(self._checkpoints),
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=rate or training.learning_rate,
            num_train_epochs=training.adaptive_epochs if self.adaptive else training.epochs,
            warmup_steps=training.warmup_ratio,
            weight_decay=training.weight_decay,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            seed=training.seed,
            save_strategy="steps",
            save_steps=training.save_steps,
            save_total_limit=2,
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),  # said aloud, or processes under torchrun would not meet
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
            # To pad a batch of 256 texts takes as long as a third of a GPU's step; on a CPU the cores are taken.
            dataloader_num_workers=1 if torch.accelerator.is_available() else 0,
        )

    # What a finished or begun stage was trained with lies beside it, so that a changed study file is noticed.

    @property
    def _settings_file(self) -> Path:
        return self.spec.output / f"{self.folder.name}.settings.json"

    def _settings(self) -> dict[str, Any]:
        values = self.spec.model_dump(mode="json", include={"model", "task", "training"})
        for section in ("model", "task", "training"):
            for key in {"sha256", "validation_rows", "save_steps", "eval_steps"} & set(values[section]):
                del values[section][key]
        if self.adaptive:
            values["search"] = {"retention": self.spec.search.retention}
        else:
            for key in ("adaptive_learning_rate", "adaptive_epochs", "p", "layer_drop", "num_random"):
                del values["training"][key]
        if self.variant is not None:
            values["variant"] = {"adaptation": dict(self.variant.adaptation), "fixed": str(self.variant.fixed)}
        return values

    def _note_settings(self) -> None:
        _make_folder(self.spec.output)
        if _is_first_rank():
            write_json(self._settings_file, self._settings())

    def _check_settings(self) -> None:
        if not self._settings_file.exists() or not (self.folder.exists() or self._checkpoints.exists()):
            return
        before = json.loads(self._settings_file.read_text(encoding="utf-8"))
        differing = [
            f"{section}.{key} was {before.get(section, {}).get(key)!r}, now {value!r}"
            for section, values in self._settings().items()
            for key, value in values.items()
            if before.get(section, {}).get(key) != value
        ]
        if differing:
            raise SpecError(
                f"{self.spec.output} holds a model with other settings: {'; '.join(differing)}; "
                "choose another folder with --set output=FOLDER, or delete it"
            )


def stages(spec: StudySpec) -> tuple[Stage, Stage]:
    """Standard fine-tuning, then length-adaptive training."""
    return Stage(spec, adaptive=False), Stage(spec, adaptive=True)


def train(spec: StudySpec, update: Update | None = None) -> Path:
    """Both stages, as far as they are not done; returns the folder of the length-adaptive model."""
    for stage in stages(spec):
        if not stage.is_complete:
            stage.run(update)
    return spec.adaptive_folder


def best_precision() -> str:
    """``bf16`` where the device computes it natively, else ``fp32``."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Without such instructions bf16 on a CPU is emulated, several times slower than fp32.
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


# ---------------------------------------------------------------------- search


@dataclass(frozen=True)
class MakeEvaluator:
    """Makes a study's evaluator on a device; pickles, so that every worker makes its own.

    Attributes:
        spec: The study.
        standard: Whether the standard model is measured, not the length-adaptive one.
        split: What is measured on; by default what the search selects on.
    """

    spec: StudySpec
    standard: bool = False
    split: Split | None = None

    def __call__(self, device: str) -> ModelEvaluator:
        """The evaluator of the length-adaptive model (or of the standard one) on ``device``."""
        from lat_optuna.model import adapt, load
        from lat_optuna.search.evaluator import ModelEvaluator
        from lat_optuna.search.racing import Racing

        folder = self.spec.standard_folder if self.standard else self.spec.adaptive_folder
        if not folder.is_dir():
            raise SpecError(f"{folder} does not exist; train first: lat-optuna train STUDY")
        search, task = self.spec.search, make_task(self.spec)
        searching = not self.standard and self.split is None
        return ModelEvaluator(
            adapt(task.build_model(str(folder))) if self.standard else load(folder),
            task,
            split=self.split or self.spec.search_split,
            device=device,
            precision=search.precision,
            compiled=search.compiled,
            racing=Racing() if self.spec.races and searching else None,
            protocol="real" if search.retention == "relative" else "padded",
            retention=search.retention,
            agreement=search.metric == "agreement" and searching,
        )


@dataclass(frozen=True)
class MakeSearchEvaluator:
    """Makes what a study's search evaluates with, further objectives included; pickles."""

    spec: StudySpec

    def __call__(self, device: str) -> Evaluator:
        """The evaluator on ``device``."""
        from lat_optuna.search.objectives import WithObjectives

        evaluator = MakeEvaluator(self.spec)(device)
        if not self.spec.search.objectives:
            return evaluator
        return WithObjectives(evaluator, {"latency_ms": latency_model(self.spec, evaluator).predict})


def latency_model(spec: StudySpec, evaluator: ModelEvaluator) -> LatencyModel:
    """Predicts the latency of single inputs; calibrated once, kept as ``latency.json`` in the study's folder."""
    from lat_optuna.latency import LatencyModel

    path = spec.output / "latency.json"
    if not path.exists():
        lengths = [len(tokens) for tokens in evaluator.task.features(evaluator.split)["input_ids"][:]]
        model = LatencyModel.fit(evaluator.model, lengths, batch_size=1, precision=spec.search.precision)
        if not path.exists():  # of workers that start at once the first one's calibration holds
            write_json(path, model.to_dict())
    return LatencyModel.from_dict(json.loads(path.read_text(encoding="utf-8")))


def make_plan(spec: StudySpec, evaluator: Evaluator) -> SearchPlan:
    """The search of a study file (paper: section 3.2)."""
    from lat_optuna.search.foreign import make_plan

    search = spec.search
    return make_plan(
        search.sampler,
        num_layers=evaluator.num_layers,
        max_length=evaluator.max_length,
        retention=evaluator.retention,
        seed=search.seed,
        p=spec.training.p,
        cost=evaluator.cost,
        num_initial=search.num_initial,
        num_mutations=search.num_mutations,
        num_crossovers=search.num_crossovers,
        mutation_prob=search.mutation_prob,
        max_cost=search.max_cost,
    )


def default_device() -> str:
    """Where a worker runs: the GPU of its LOCAL_RANK or SLURM_LOCALID, the first GPU, or the CPU."""
    devices = default_devices()
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return devices[int(rank) % len(devices)] if rank.isdigit() else devices[0]


def default_devices() -> list[str]:
    """Every visible GPU, or the CPU."""
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def measure_standard(spec: StudySpec, update: Update | None = None) -> Baselines:
    """Measure the standard model, dense and at the constant ratios of the search's initial population (Figure 2).

    Where the search has a split of its own, on that one and on the reporting split. Results lie in ``baselines.json``
    of the study's folder; what is there is not measured again.
    """
    from lat_optuna.search.front import Baselines, Measured, read_baselines, write_baselines

    for stage in stages(spec):
        if not stage.is_complete:
            raise SpecError(f"{stage.folder} does not exist: train first (lat-optuna train STUDY)")
    device = default_device()
    evaluator = MakeEvaluator(spec, standard=True)(device)
    reporter = None if spec.search_split == REPORTING_SPLIT else evaluator.on(REPORTING_SPLIT)
    plan = make_plan(spec, evaluator)
    identity = "; ".join(f"{key} {value}" for key, value in sorted(evaluator.identity().items()))
    if reporter is not None:
        identity += f"; reported on {reporter.identity()['data']}"
    baselines = read_baselines(spec.output)
    if baselines is None or baselines.about.get("standard model") != identity:
        baselines = Baselines(
            metric=evaluator.metric_name,
            examples=evaluator.num_examples,
            model=spec.model.checkpoint,
            data=describe_data(evaluator),
            protocol="real lengths, relative retention"
            if evaluator.retention == "relative"
            else "padded to max_length, absolute retention",
            hardware=describe_hardware(device),
            about=describe_run(spec) | {"standard model": identity},
        )
    for slot in range(plan.num_initial):
        config = plan.initial(slot)
        lengths = () if config.is_full else config.lengths
        if lengths not in {point.lengths for point in baselines.standard}:
            measured = None if config.is_full else config
            evaluation = evaluator.evaluate(measured)
            reported = None if reporter is None else reporter.evaluate(measured).metric
            ratio = 1 - config.lengths[0] / config.max_length
            point = Measured(evaluation.metric, evaluation.cost, ratio, lengths, reported)
            baselines = replace(baselines, standard=(*baselines.standard, point))
            write_baselines(spec.output, baselines)
        if update is not None:
            update(slot + 1, plan.num_initial)
    return baselines


def search(
    spec: StudySpec,
    devices: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Ended:
    """Run a study's search with one local process a device, and put the front beside the model when it ends.

    Args:
        spec: The study; its model must be trained.
        devices: One a worker; by default every visible GPU, or the CPU.
        on_progress: Is told how far the search is.
        on_message: Is told, in a line, of each worker's end.
    """
    from lat_optuna.search.worker import launch

    _make_folder(spec.output)
    publish_now_and_then = _Publisher(spec)

    def tell(now: SearchProgress) -> None:
        if on_progress is not None:
            on_progress(now)
        publish_now_and_then()

    try:
        ended = launch(
            search_of(spec),
            devices or default_devices(),
            folder=spec.output / "logs",
            on_progress=tell,
            on_message=on_message,
        )
    except BaseException:
        _try_to_publish(spec)
        raise
    measure_reported(spec)
    check_precision(spec)
    publish(spec)
    return ended


def join(spec: StudySpec, device: str | None = None, on_progress: OnProgress | None = None) -> Ended:
    """Work on a study's search as one worker, beside others anywhere.

    Of the workers that end a search together, the one that finished the last trial publishes the result.
    """
    from lat_optuna.search.worker import run_worker

    ended = run_worker(search_of(spec), device or default_device(), on_progress=on_progress)
    if ended.here and _finished_last(spec):
        measure_reported(spec, device)
        check_precision(spec, device)
        _try_to_publish(spec)
    return ended


def measure_reported(spec: StudySpec, device: str | None = None, update: Update | None = None) -> None:
    """Measure a front, and the constant ratios that it is compared with, on the split that the search did not see.

    Does nothing where the search has no split of its own. The results lie in the study's attributes ``reported``,
    configuration -> metric and details, and ``examples``; what is there is not measured again.

    Args:
        spec: The study; its search has begun.
        device: Where to measure.
        update: Is told how far it is.
    """
    from lat_optuna.search.front import Front
    from lat_optuna.search.study import load_study

    if spec.search_split == REPORTING_SPLIT:
        return
    study = load_study(spec.storage, spec.name)
    front = Front.of(study)
    initial = [point for point in front.evaluated if point.operation == "constant ratio"]
    texts = list(dict.fromkeys(point.text for point in (*front.points, *initial)))
    reported = dict(study.user_attrs.get("reported", {}))
    missing = [text for text in texts if text not in reported]
    if not missing and "examples" in study.user_attrs:
        return
    evaluator = MakeEvaluator(spec, split=REPORTING_SPLIT)(device or default_device())
    searched = evaluator.on(spec.search_split).num_examples
    study.set_user_attr("examples", {"search": searched, "reported": evaluator.num_examples})
    for text in missing:
        evaluation = evaluator.evaluate(LengthConfig.parse(text, front.max_length, front.retention))
        # Read again: two processes may both believe that they ended the search.
        reported = study.user_attrs.get("reported", {}) | {text: {"metric": evaluation.metric, **evaluation.details}}
        study.set_user_attr("reported", reported)
        if update is not None:
            update(len(texts) - len(missing) + missing.index(text) + 1, len(texts))


def _finished_last(spec: StudySpec) -> bool:
    """Whether the study's last trial was this process's: that is so in one process alone, and needs no lock."""
    from lat_optuna.search.study import WorkerId, load_study

    trials = load_study(spec.storage, spec.name).get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    last = max(finished, key=lambda trial: (trial.datetime_complete, trial.number))
    return bool(last.user_attrs.get("worker") == str(WorkerId.of_this_process()))


def check_precision(spec: StudySpec, device: str | None = None) -> None:
    """Measure what a reduced precision or compiling changes, and say so when it is more than chance would.

    The dense and the smallest model are measured both ways on the reporting split. The values lie in the
    study's attribute ``precision``, and are not measured again.
    """
    from lat_optuna.search.study import load_study

    study = load_study(spec.storage, spec.name)
    if (spec.search.precision == "fp32" and not spec.search.compiled) or "precision" in study.user_attrs:
        return
    evaluator = MakeEvaluator(spec, split=REPORTING_SPLIT)(device or default_device())
    exact, reduced = evaluator.on(REPORTING_SPLIT, exact=True), evaluator.arithmetic
    plan = make_plan(spec, evaluator)
    values: dict[str, dict[str, float]] = {}
    for name, config in (("dense", None), ("smallest", plan.smallest)):
        values[name] = {each.arithmetic: each.evaluate(config).metric for each in (exact, evaluator)}
        change = values[name][reduced] - values[name]["fp32"]
        if abs(change) > 100.0 / evaluator.num_examples**0.5:  # two standard errors of an accuracy, at most
            logger.warning(
                "%s changes the %s of the %s model by %+.2f points, to %.2f: set search.precision to fp32 and "
                "search.compiled to false",
                reduced,
                evaluator.metric_name,
                name,
                change,
                values[name][reduced],
            )
    study.set_user_attr("precision", values)


class _Publisher:
    """Brings the dashboard up to date now and then."""

    def __init__(self, spec: StudySpec) -> None:
        self._spec = spec
        self._next = time.monotonic() + PUBLISH_SECONDS

    def __call__(self) -> None:
        start = time.monotonic()
        if start >= self._next:
            _try_to_publish(self._spec)
            self._next = time.monotonic() + max(PUBLISH_SECONDS, (time.monotonic() - start) / SHARE_OF_TIME)


def _try_to_publish(spec: StudySpec) -> None:
    try:
        publish(spec)
    except Exception as error:  # a search goes on, or ends as it would have ended, without its note
        logger.warning("the study's note and figures could not be brought up to date: %s", error)


def search_of(spec: StudySpec) -> Search:
    """A study's search as its workers take it."""
    from lat_optuna.search.study import Stop
    from lat_optuna.search.worker import Search

    return Search(
        storage=spec.storage,
        name=spec.name,
        make_evaluator=MakeSearchEvaluator(spec),
        make_plan=partial(make_plan, spec),
        n_trials=spec.search.n_trials,
        metric=spec.search.metric,
        racing=spec.races,
        reproducible=spec.search.reproducible,
        stop=None if spec.search.stop_epsilon is None else Stop(spec.search.stop_epsilon, spec.search.stop_generations),
    )


# ---------------------------------------------------------------------- results


def load_front(spec: StudySpec) -> tuple[optuna.Study, Front, Baselines | None]:
    """A study's trials, their front, and what it is compared with.

    Raises:
        ValueError: The study does not exist yet, or its storage cannot be read.
    """
    from lat_optuna.search.front import Front, read_baselines
    from lat_optuna.search.study import load_study

    study = load_study(spec.storage, spec.name)
    return study, Front.of(study), _with_adaptive_curve(read_baselines(spec.output), study)


def publish(spec: StudySpec) -> None:
    """Put the front into the checkpoint's side file and the note and figures into the dashboard, as they are now."""
    try:
        found = load_front(spec)
    except ValueError:
        return  # the search ended before it had made its study
    _publish(spec, *found)


def _publish(spec: StudySpec, study: optuna.Study, front: Front, baselines: Baselines | None) -> None:
    from lat_optuna.dashboard import annotate
    from lat_optuna.model.checkpoint import read_side_file, write_side_file
    from lat_optuna.search.front import write_baselines

    side = read_side_file(spec.adaptive_folder)
    if side is not None:
        write_side_file(spec.adaptive_folder, replace(side, metric=front.metric, front=front.side_points()))
    if baselines is not None:
        write_baselines(spec.output, baselines)
    annotate(study, baselines, front=front, n_trials=spec.search.n_trials)


def report(spec: StudySpec, path: Path | None = None, study_file: str = "STUDY.yaml") -> Path:
    """Write a study's HTML report; returns its path (``report.html`` in the study's folder by default).

    ``study_file`` is shown in commands: the study's file, and the options that go with it.
    """
    from lat_optuna.report import write_report

    study, front, baselines = load_front(spec)
    _publish(spec, study, front, baselines)  # workers that joined from elsewhere leave that to us
    return write_report(
        path or spec.output / "report.html",
        study,
        baselines,
        front=front,
        n_trials=spec.search.n_trials,
        study_file=study_file,
        checkpoint=str(spec.adaptive_folder),
        words=kept_words(spec, front),
        about=describe_times(spec),
    )


def export_figures(spec: StudySpec, folder: Path, kind: str = "svg") -> list[Path]:
    """Write the figures of a study's report as files; see :func:`lat_optuna.figures.export_figure` for the kinds."""
    from lat_optuna import figures

    _, front, baselines = load_front(spec)
    return figures.export_figures(figures.study_figures(front, baselines), folder, kind)


def kept_words(spec: StudySpec, front: Front, budget: float = 0.5) -> list[KeptWords]:
    """Which words each layer keeps of one example of the evaluation set, at the best point within ``budget``."""
    from lat_optuna.model import load
    from lat_optuna.model.inspection import kept_tokens
    from lat_optuna.report import KeptWords

    if not front.points or not spec.adaptive_folder.is_dir():
        return []
    point = front.pick(budget=max(budget, front.points[0].cost))
    task = make_task(spec)
    rows = task.features("validation")
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    # One of a length that fits on a page: the first near the middle of what occurs.
    middle = min(sorted(lengths)[len(lengths) // 2], 40)
    row = rows[min(range(len(lengths)), key=lambda index: abs(lengths[index] - middle))]
    model = load(spec.adaptive_folder).eval()
    kept = kept_tokens(model, LengthConfig(point.lengths, front.max_length, spec.search.retention), row["input_ids"])
    tokens = tuple(task.tokenizer.convert_ids_to_tokens(row["input_ids"]))
    return [KeptWords(tokens, kept, f"at {point.cost:.2f}x FLOPs ({point.text})")]


def _with_adaptive_curve(baselines: Baselines | None, study: optuna.Study) -> Baselines | None:
    """The length-adaptive model at constant ratios: the study's own initial generation."""
    from lat_optuna.search.front import Measured, points_of

    if baselines is None:
        return None
    ratios = {point.lengths: point.ratio for point in baselines.standard}
    curve = []
    for point in points_of(study):
        full = len(set(point.lengths)) == 1 and point.cost >= 1
        lengths = () if full else point.lengths
        if lengths in ratios:
            curve.append(Measured(point.metric, point.cost, ratios[lengths], lengths, point.reported))
    return replace(baselines, length_adaptive=tuple(sorted(curve, key=lambda point: -point.cost)))


def describe_run(spec: StudySpec) -> dict[str, str]:
    """What was run, for reports: epochs, seeds, versions."""
    import optuna
    import torch
    import transformers

    training = spec.training
    return {
        "Training": f"epochs: {training.epochs:g} of fine-tuning, {training.adaptive_epochs:g} with LengthDrop "
        f"(p = {training.p}, LayerDrop {training.layer_drop}, {training.num_random} random sub-models), batch "
        f"{training.batch_size * training.gradient_accumulation}, learning rate {training.learning_rate:g}",
        "Seeds": f"training {training.seed}, search {spec.search.seed}",
        "Versions": f"torch {torch.__version__}, transformers {transformers.__version__}, optuna {optuna.__version__}",
    }


def describe_times(spec: StudySpec) -> dict[str, str]:
    """Wall time of both stages of training, for reports; of one that was stopped and went on, since it did."""
    from lat_optuna.summary import duration

    parts = []
    for stage in stages(spec):
        losses = stage.folder / "losses.json"
        history = json.loads(losses.read_text(encoding="utf-8")) if losses.exists() else []
        seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
        parts += [f"{duration(seconds[-1])} of {stage.label}"] if seconds else []
    return {"training time": ", ".join(parts)} if parts else {}


def describe_data(evaluator: ModelEvaluator) -> str:
    """Data set and numbers of features."""
    task = evaluator.task
    searched = "" if evaluator.split == REPORTING_SPLIT else f"{len(task.features(evaluator.split)):,} search, "
    return (
        f"{task.name} ({len(task.features('train')):,} training, {searched}"
        f"{len(task.features(REPORTING_SPLIT)):,} evaluation rows)"
    )


def describe_hardware(device: str) -> str:
    """The device's name, and threads on a CPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------- small things


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"output: cannot create {folder}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise SpecError(f"output: {folder} is not writable")


def _is_first_rank() -> bool:
    """Whether this process is the one of a ``torchrun`` that writes files."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _graceful_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _sampled(spec: StudySpec) -> StudySpec:
    """The study with few validation rows, to look at while a model is trained."""
    rows = min(spec.task.validation_rows or SAMPLE_ROWS, SAMPLE_ROWS)
    return spec.model_copy(update={"task": spec.task.model_copy(update={"validation_rows": rows})})


def _progress_callback(update: Update | None, interrupted: threading.Event, metrics: Sequence[str] = ()) -> Any:
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):
        """Tells ``update`` of every step; on an interrupt saves a checkpoint and stops."""

        def __init__(self) -> None:
            self.figures: dict[str, float] = {}
            self.read = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._show(state)
            if interrupted.is_set():
                control.should_save = control.should_training_stop = True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._show(state)

        def _show(self, state: Any) -> None:
            for entry in state.log_history[self.read :]:
                self.figures |= {k: v for k, v in entry.items() if k.startswith("loss") or k in metrics}
            self.read = len(state.log_history)
            if update is not None:
                update(state.global_step, state.max_steps, **self.figures)

    return ProgressCallback()
