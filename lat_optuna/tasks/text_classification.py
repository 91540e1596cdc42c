"""Classification of texts and of pairs of texts: GLUE, any data set of the hub, local files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lat_optuna.tasks.data import (
    DataSource,
    data_name,
    encode,
    fingerprint,
    hold_out,
    load_model,
    load_tokenizer,
    need_columns,
    overlap,
    read_rows,
    sample_rows,
)

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lat_optuna.tasks import Split

GLUE: dict[str, tuple[str, ...]] = {
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "cola": ("sentence",),
}
"""Task -> columns of its texts. (STS-B, the ninth, is a regression.)"""


class Classification:
    """Rows with text columns and a label column as a task; see :class:`lat_optuna.tasks.Task`.

    The metric is accuracy, also where GLUE has another one: Matthews correlation for CoLA, F1 beside accuracy for MRPC
    and QQP.

    Args:
        name: Short name for titles.
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        rows: The splits' rows.
        text_columns: One column, or two for pairs.
        label_names: Names of the classes; labels are indices into it.
        label_column: Name of the column of labels.
        max_length: Longest input in tokens, special tokens included; pairs are cut at the longer side.
        sample: Split -> number of rows to draw from it; all rows where it is ``None``.
        seed: Of the draws.
    """

    metric_name = "accuracy"

    def __init__(
        self,
        name: str,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        rows: Mapping[Split, datasets.Dataset],
        *,
        text_columns: Sequence[str],
        label_names: Sequence[str],
        label_column: str = "label",
        max_length: int = 128,
        sample: Mapping[Split, int | None],
        seed: int = 0,
    ) -> None:
        from transformers import DataCollatorWithPadding

        self.name = name
        self.max_length = max_length
        self.label_names = tuple(label_names)
        self.tokenizer = load_tokenizer(tokenizer_or_checkpoint, max_length)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self._text_columns = tuple(text_columns)
        self._label_column = label_column
        self._rows = {
            split: sample_rows(part, sample.get(split), seed, f"{split}_rows") for split, part in rows.items()
        }
        self._features: dict[Split, datasets.Dataset] = {}
        self._known_labels: dict[Split, np.ndarray] = {}

    def build_model(self, checkpoint: str) -> PreTrainedModel:
        """A classifier with the task's classes on the weights of ``checkpoint``, in fp32.

        A new head is drawn from torch's global generator: call ``transformers.set_seed`` before, to repeat it.
        """
        from transformers import AutoModelForSequenceClassification

        return load_model(
            AutoModelForSequenceClassification,
            checkpoint,
            num_labels=len(self.label_names),
            id2label=dict(enumerate(self.label_names)),
            label2id={name: index for index, name in enumerate(self.label_names)},
        )

    def features(self, split: Split) -> datasets.Dataset:
        """Tokens, not padded, and ``labels``; made once."""
        if split not in self._features:
            if split not in self._rows:
                raise ValueError(f"the task {self.name} was made without rows for {split}")
            rows = self._rows[split]
            texts = [rows[column][:] for column in self._text_columns]
            self._features[split] = encode(self.tokenizer, texts, rows[self._label_column][:], self.max_length)
        return self._features[split]

    def predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Logits, one vector of ``len(label_names)`` an example."""
        return list(outputs.logits.detach().float().cpu().numpy())

    def log_probs(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Natural log-probability of the right class, one fp32 number an example, on the outputs' device."""
        logits = outputs.logits.detach().float()
        return logits.log_softmax(-1).gather(-1, batch["labels"].to(logits.device)[:, None])[:, 0]

    def score(self, split: Split, predictions: Sequence[np.ndarray]) -> dict[str, float]:
        """Accuracy in percent; NaN if a logit is NaN, which would be class 0 otherwise."""
        scores = self.score_examples(split, range(len(predictions)), predictions)
        return {name: float(values.mean()) for name, values in scores.items()}

    def score_examples(
        self, split: Split, features: Sequence[int], predictions: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The metrics of some examples, one fp64 number each, whose means are what :meth:`score` gives.

        Args:
            split: Part of the data.
            features: Rows of its features.
            predictions: Their predictions.
        """
        import numpy as np

        logits = np.stack(predictions)
        right = 100.0 * (logits.argmax(-1) == self._labels(split)[np.asarray(features)])
        return {"accuracy": np.where(np.isnan(logits).any(-1), np.nan, right)}

    def agreement(
        self, split: Split, features: Sequence[int], predictions: Sequence[np.ndarray], full: Sequence[np.ndarray]
    ) -> np.ndarray:
        """How far predictions agree with the full model's; percent, one number an example."""
        import numpy as np

        return overlap(np.stack(predictions), np.stack(full))

    def _labels(self, split: Split) -> np.ndarray:
        import numpy as np

        if split not in self._known_labels:
            self._known_labels[split] = np.asarray(self.features(split)["labels"][:])
        return self._known_labels[split]

    def fingerprint(self, split: Split) -> str:
        """Sha256 of the split's tokens and labels, the classes and the metric."""
        settings = {"metric": self.metric_name, "max_length": self.max_length, "labels": self.label_names}
        return fingerprint(self.features(split), settings)


class TextClassification(Classification):
    """Texts or pairs of texts with a label, from GLUE, the hub or local files.

    Args:
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        data: A GLUE task (``"sst2"``), a data set of the hub (``"imdb"``), a local folder with a file for each split
            (``train.parquet``, ``validation.csv``, ``.tsv``, ``.json``, ``.jsonl``), or a mapping from split to file
            or files. ``"./sst2"`` is a folder even where a GLUE task has its name.
        subset: Which part of the hub's data set, where it has several.
        text_columns: One column, or two for pairs; by default the columns of a GLUE task, or ``text``.
        label_column: Column of labels: ints from 0, or strings.
        max_length: Longest input in tokens, special tokens included.
        train_rows: Number of rows to draw from the training split; all by default.
        validation_rows: Likewise.
        search_rows: Training rows to hold out as split ``"search"``; see :func:`lat_optuna.tasks.data.hold_out`.
        test_rows: Likewise as split ``"test"``.
        disjoint: Leave out training rows whose first text stands in the validation split as well.
        train_split: Name of the split or of its file; ``None`` if there is nothing to train on.
        validation_split: Likewise. For MNLI ``"validation"`` is ``"validation_matched"``.
        label_names: Names of the classes in the order of their ids; by default those of the data.
        seed: Of the draws of rows.

    Raises:
        FileNotFoundError: A folder, file or split is missing; the message tells which ones are there.
        ValueError: A column is missing or has empty cells, a label is not one of the classes, or an argument is out of
            range.
    """

    def __init__(
        self,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        data: DataSource,
        subset: str | None = None,
        text_columns: Sequence[str] | None = None,
        label_column: str = "label",
        max_length: int = 128,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        search_rows: int | None = None,
        test_rows: int | None = None,
        disjoint: bool = False,
        train_split: str | None = "train",
        validation_split: str | None = "validation",
        label_names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(data, str) and subset is None and data in (*GLUE, "stsb"):
            if data == "stsb":
                raise ValueError("stsb is a regression task; text classification needs classes")
            data, subset, text_columns = "nyu-mll/glue", data, text_columns or GLUE[data]
        if isinstance(text_columns, str):
            text_columns = (text_columns,)
        wanted: dict[Split, str | None] = {"train": train_split, "validation": validation_split}
        rows = {split: read_rows(data, name, subset) for split, name in wanted.items() if name is not None}
        if not rows:
            raise ValueError("train_split and validation_split are both None: nothing is left of the data")
        text_columns = _text_columns(next(iter(rows.values()))) if text_columns is None else tuple(text_columns)
        if not 1 <= len(text_columns) <= 2:
            raise ValueError(f"text_columns must name one column or two, not {list(text_columns)}")
        for split, part in rows.items():
            need_columns(part, (*text_columns, label_column), f"split {wanted[split]!r}")
        rows = {split: part.select_columns([*text_columns, label_column]) for split, part in rows.items()}
        names = _label_names(rows, label_column) if label_names is None else tuple(label_names)
        rows = {split: _with_ids(part, label_column, names, f"split {wanted[split]!r}") for split, part in rows.items()}
        if disjoint and len(rows) == 2:
            seen = set(rows["validation"][text_columns[0]][:])
            texts = rows["train"][text_columns[0]][:]
            rows["train"] = rows["train"].select([row for row, text in enumerate(texts) if text not in seen])
        held: dict[Split, int | None] = {"search": search_rows, "test": test_rows}
        if "train" in rows:
            rows |= hold_out(rows["train"], held, text_columns[0], seed)
        elif any(count is not None for count in held.values()):
            raise ValueError("search_rows and test_rows are held out from the training rows, but train_split is None")
        super().__init__(
            data_name(data, subset),
            tokenizer_or_checkpoint,
            rows,
            text_columns=text_columns,
            label_names=names,
            label_column=label_column,
            max_length=max_length,
            sample={"train": train_rows, "validation": validation_rows},
            seed=seed,
        )


def _text_columns(rows: datasets.Dataset) -> tuple[str, ...]:
    known = dict.fromkeys((*GLUE.values(), ("text",)))
    for columns in known:
        if set(columns) <= set(rows.column_names):
            return columns
    raise ValueError(f"which columns hold the texts? Set text_columns; there is {', '.join(rows.column_names)}")


def _label_names(rows: Mapping[Split, datasets.Dataset], column: str) -> tuple[str, ...]:
    """The names that the data set gives, else ``"0", "1", ...`` up to the highest label, else the strings, sorted."""
    for part in rows.values():
        if names := getattr(part.features[column], "names", None):
            return tuple(names)
    labels = sorted({label for part in rows.values() for label in part.unique(column)}, key=str)
    ids = [_as_id(label) for label in labels]
    if min(ids) >= 0:
        return tuple(map(str, range(max(ids) + 1)))
    for label in labels:
        if not isinstance(label, str):
            raise ValueError(f"column {column!r} holds the label {label!r}; labels are ints from 0, or strings")
    return tuple(labels)


def _with_ids(rows: datasets.Dataset, column: str, names: tuple[str, ...], what: str) -> datasets.Dataset:
    import datasets

    ids = {name: index for index, name in enumerate(names)}
    if len(ids) < 2 or len(ids) < len(names):
        raise ValueError(f"{what}: column {column!r} must have two or more classes, each named once, not {names}")
    mapped = []
    for row, label in enumerate(rows[column][:]):
        number = ids[label] if label in ids else _as_id(label)
        if not 0 <= number < len(names):
            raise ValueError(f"{what}: label {label!r} in row {row} is not one of the classes {', '.join(names)}")
        mapped.append(number)
    texts = rows.remove_columns(column)
    return texts.add_column(column, mapped, new_fingerprint="ids", feature=datasets.Value("int64"))


def _as_id(label: Any) -> int:
    """A label as a class id: a whole number, or digits as CSV has them; -1 if it is neither."""
    if isinstance(label, str):
        return int(label) if label.isascii() and label.isdigit() else -1
    return int(label) if label == int(label) else -1
