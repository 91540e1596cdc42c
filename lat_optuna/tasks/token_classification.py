"""A label for every word: named entities, parts of speech, any data set with columns of words and of tags."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lat_optuna.tasks.data import (
    CHUNK,
    DataSource,
    data_name,
    fingerprint,
    hold_out,
    load_model,
    load_tokenizer,
    need_columns,
    overlap,
    read_rows,
    sample_rows,
    token_table,
)

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lat_optuna.tasks import Split

NO_LABEL = -100
"""What transformers takes for "this token has no label"."""


class Tagging:
    """Rows of words with a tag for each as a task; see :class:`lat_optuna.tasks.Task`.

    A word's tag lies on its first token; further tokens of the word carry no label. A row that is too long becomes
    several features, so that no word goes unread. The metric is the F1 of entities where the tags are IOB, and
    accuracy over the words that carry a tag otherwise.

    Args:
        name: Short name for titles.
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        rows: The splits' rows, with a list of words and a list of tag ids each; a tag of -100 is none.
        label_names: Names of the tags; ids are indices into it.
        tokens_column: Column of words.
        tags_column: Column of tag ids.
        max_length: Longest input in tokens, special tokens included.
        sample: Split -> number of rows to draw from it; all rows where it is ``None``.
        seed: Of the draws.
    """

    def __init__(
        self,
        name: str,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        rows: Mapping[Split, datasets.Dataset],
        *,
        label_names: Sequence[str],
        tokens_column: str = "tokens",
        tags_column: str = "ner_tags",
        max_length: int = 128,
        sample: Mapping[Split, int | None],
        seed: int = 0,
    ) -> None:
        from transformers import DataCollatorForTokenClassification

        self.name = name
        self.max_length = max_length
        self.label_names = tuple(label_names)
        self.metric_name = "f1" if is_iob(self.label_names) else "accuracy"
        self.tokenizer = _for_words(load_tokenizer(tokenizer_or_checkpoint, max_length))
        self.collate = DataCollatorForTokenClassification(self.tokenizer)
        self._columns = (tokens_column, tags_column)
        self._rows = {
            split: sample_rows(part, sample.get(split), seed, f"{split}_rows") for split, part in rows.items()
        }
        self._features: dict[Split, datasets.Dataset] = {}
        self._sources: dict[Split, list[int]] = {}

    def build_model(self, checkpoint: str) -> PreTrainedModel:
        """A tagger with the task's tags on the weights of ``checkpoint``, in fp32.

        A new head is drawn from torch's global generator: call ``transformers.set_seed`` before, to repeat it.
        """
        from transformers import AutoModelForTokenClassification

        return load_model(
            AutoModelForTokenClassification,
            checkpoint,
            num_labels=len(self.label_names),
            id2label=dict(enumerate(self.label_names)),
            label2id={name: index for index, name in enumerate(self.label_names)},
        )

    def features(self, split: Split) -> datasets.Dataset:
        """Tokens, not padded, and ``labels``, one a token; made once."""
        if split not in self._features:
            if split not in self._rows:
                raise ValueError(f"the task {self.name} was made without rows for {split}")
            self._features[split], self._sources[split] = self._encode(self._rows[split])
        return self._features[split]

    def predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Logits, ``[tokens, len(label_names)]`` a feature."""
        logits = outputs.logits.detach().float().cpu().numpy()
        real = batch["attention_mask"].bool().cpu().numpy()
        return [feature[mask] for feature, mask in zip(logits, real, strict=True)]

    def log_probs(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean natural log-probability of the right tags, one fp32 number a feature; NaN where no word has a tag."""
        log_probs = outputs.logits.detach().float().log_softmax(-1)
        labels = batch["labels"].to(log_probs.device)
        tagged = labels.ne(NO_LABEL)
        right = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return right.masked_fill(~tagged, 0.0).sum(-1) / tagged.sum(-1)

    def score(self, split: Split, predictions: Sequence[np.ndarray]) -> dict[str, float]:
        """F1 of entities, its precision and recall and the words' accuracy, in percent; NaN if a logit is NaN.

        Accuracy alone where the tags are not IOB.
        """
        import numpy as np

        features = self.features(split)
        right: list[list[int]] = [[] for _ in self._rows[split]]
        tagged: list[list[int]] = [[] for _ in self._rows[split]]
        broken = False
        for row, labels, logits in zip(self._sources[split], features["labels"][:], predictions, strict=True):
            where = np.flatnonzero(np.asarray(labels) != NO_LABEL)
            broken = broken or bool(np.isnan(logits[where]).any())
            right[row] += [labels[token] for token in where]
            tagged[row] += logits[where].argmax(-1).tolist()
        words = sum(map(len, right))
        same = sum(a == b for row, found in zip(right, tagged, strict=True) for a, b in zip(row, found, strict=True))
        scores = {"accuracy": 100.0 * same / words if words else 0.0}
        if self.metric_name == "f1":
            names = self.label_names
            golds = [[names[tag] for tag in row] for row in right]
            found = [[names[tag] for tag in row] for row in tagged]
            scores = entity_scores(golds, found) | scores
        return dict.fromkeys(scores, float("nan")) if broken else scores

    def agreement(
        self, split: Split, features: Sequence[int], predictions: Sequence[np.ndarray], full: Sequence[np.ndarray]
    ) -> np.ndarray:
        """How far the tags of words agree with the full model's; percent, one number a feature, NaN without words."""
        import numpy as np

        values = []
        for labels, mine, its in zip(self.features(split)["labels"][features], predictions, full, strict=True):
            tagged = np.asarray(labels) != NO_LABEL
            values.append(overlap(mine[tagged], its[tagged]).mean() if tagged.any() else np.nan)
        return np.array(values)

    def examples(self, split: Split) -> np.ndarray:
        """``[features]``: which row each feature is a part of."""
        import numpy as np

        self.features(split)
        return np.asarray(self._sources[split])

    def fingerprint(self, split: Split) -> str:
        """Sha256 of the split's tokens and labels, the tags and the metric."""
        features = self.features(split)
        settings = {
            "metric": self.metric_name,
            "max_length": self.max_length,
            "labels": self.label_names,
            "rows": self._sources[split],
        }
        return fingerprint(features, settings)

    def _encode(self, rows: datasets.Dataset) -> tuple[datasets.Dataset, list[int]]:
        """The features, and the row that each is a part of."""
        import datasets
        import pyarrow as pa

        tables, sources = [], []
        for begin in range(0, len(rows), CHUNK):
            words, tags = (rows[column][begin : begin + CHUNK] for column in self._columns)
            encoded = self.tokenizer(
                words,
                is_split_into_words=True,
                truncation=True,
                padding=False,
                max_length=self.max_length,
                return_overflowing_tokens=True,
                return_attention_mask=True,
            )
            parts = encoded.pop("overflow_to_sample_mapping")
            labels, last = [], (-1, -1)
            for feature, row in enumerate(parts):
                found = []
                for word in encoded.word_ids(feature):
                    # The rest of a word that a feature ends in begins the next one, and is not its first token.
                    first = word is not None and (row, word) > last
                    found.append(tags[row][word] if first else NO_LABEL)
                    last = (row, word) if first else last
                labels.append(found)
            table = token_table(encoded, {})
            tables.append(table.append_column("labels", pa.array(labels, pa.list_(pa.int64()))))
            sources += [begin + row for row in parts]
        return datasets.Dataset(pa.concat_tables(tables)), sources


class TokenClassification(Tagging):
    """Words with tags from the hub or local files, in the form of CoNLL-2003's data sets.

    Args:
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        data: A data set of the hub, a local folder with a file for each split (``train.parquet``,
            ``validation.jsonl``), or a mapping from split to file or files.
        subset: Which part of the hub's data set, where it has several.
        tokens_column: Column of lists of words.
        tags_column: Column of lists of tags: ints from 0, or strings.
        label_names: Names of the tags in the order of their ids; by default those of the data.
        max_length: Longest input in tokens, special tokens included.
        train_rows: Number of rows to draw from the training split; all by default.
        validation_rows: Likewise.
        search_rows: Training rows to hold out as split ``"search"``; see :func:`lat_optuna.tasks.data.hold_out`.
        test_rows: Likewise as split ``"test"``.
        train_split: Name of the split or of its file.
        validation_split: Likewise.
        seed: Of the draws of rows.

    Raises:
        FileNotFoundError: A folder, file or split is missing; the message tells which ones are there.
        ValueError: A column is missing or has empty cells, a row has more words than tags, a tag is not one of the
            names, or an argument is out of range.
    """

    def __init__(
        self,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        data: DataSource,
        subset: str | None = None,
        tokens_column: str = "tokens",
        tags_column: str = "ner_tags",
        label_names: Sequence[str] | None = None,
        max_length: int = 128,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        search_rows: int | None = None,
        test_rows: int | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        seed: int = 0,
    ) -> None:
        wanted: dict[Split, str] = {"train": train_split, "validation": validation_split}
        rows = {split: read_rows(data, name, subset) for split, name in wanted.items()}
        for split, part in rows.items():
            need_columns(part, (tokens_column, tags_column), f"split {wanted[split]!r}")
        names = _label_names(rows, tags_column) if label_names is None else tuple(label_names)
        made: dict[Split, datasets.Dataset] = {
            split: _with_ids(part, tokens_column, tags_column, names, f"split {wanted[split]!r}")
            for split, part in rows.items()
        }
        made |= hold_out(made["train"], {"search": search_rows, "test": test_rows}, "text", seed)
        super().__init__(
            data_name(data, subset),
            tokenizer_or_checkpoint,
            made,
            label_names=names,
            tokens_column=tokens_column,
            tags_column=tags_column,
            max_length=max_length,
            sample={"train": train_rows, "validation": validation_rows},
            seed=seed,
        )


def _for_words(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer; of a byte-level one (RoBERTa) a copy that takes lists of words, each as if a blank preceded it."""
    from tokenizers import pre_tokenizers

    if not isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_prefix_space = True
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def is_iob(label_names: Sequence[str]) -> bool:
    """Whether the tags mark entities: ``O``, ``B-...`` and ``I-...`` and nothing else."""
    kinds = [name[:2] for name in label_names if name != "O"]
    return bool(kinds) and set(kinds) <= {"B-", "I-"}


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Entities of a row of IOB tags as (type, first word, word behind the last), as conlleval and seqeval read them.

    An ``I-`` of another type than the tag before it, or after ``O``, begins an entity as well.
    """
    kind, start = "", 0
    for word, tag in enumerate([*tags, "O"]):
        here = tag[2:] if tag != "O" else ""
        goes_on = tag.startswith("I-") and here == kind and word > 0 and tags[word - 1] != "O"
        if goes_on:
            continue
        if word > 0 and tags[word - 1] != "O":
            yield kind, start, word
        kind, start = here, word


def entity_scores(golds: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall of entities, in percent; an entity counts when type and words agree."""
    right = {(row, *entity) for row, tags in enumerate(golds) for entity in entities(tags)}
    claimed = {(row, *entity) for row, tags in enumerate(found) for entity in entities(tags)}
    both = len(right & claimed)
    return {
        "f1": 200.0 * both / (len(right) + len(claimed)) if right or claimed else 0.0,
        "precision": 100.0 * both / len(claimed) if claimed else 0.0,
        "recall": 100.0 * both / len(right) if right else 0.0,
    }


def _label_names(rows: Mapping[Split, datasets.Dataset], column: str) -> tuple[str, ...]:
    """The names that the data set gives, else ``"0", "1", ...`` up to the highest tag, else the strings, O first."""
    for part in rows.values():
        if names := getattr(getattr(part.features[column], "feature", None), "names", None):
            return tuple(names)
    tags = {tag for part in rows.values() for row in part[column][:] for tag in row}
    if all(isinstance(tag, int) for tag in tags):
        return tuple(map(str, range(max(tags, default=-1) + 1)))
    if not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"column {column!r} holds tags of several kinds; tags are ints from 0, or strings")
    return tuple(sorted(tags, key=lambda tag: (tag != "O", tag)))


def _with_ids(
    rows: datasets.Dataset, tokens_column: str, tags_column: str, names: tuple[str, ...], what: str
) -> datasets.Dataset:
    import datasets

    ids = {name: index for index, name in enumerate(names)}
    if len(ids) < 2 or len(ids) < len(names):
        raise ValueError(f"{what}: column {tags_column!r} must have two or more tags, each named once, not {names}")
    words, tags = rows[tokens_column][:], rows[tags_column][:]
    mapped = []
    for row, (texts, marks) in enumerate(zip(words, tags, strict=True)):
        if len(texts) != len(marks):
            raise ValueError(f"{what}: row {row} has {len(texts)} words and {len(marks)} tags")
        numbers = [ids.get(mark, mark) for mark in marks]
        for mark, number in zip(marks, numbers, strict=True):
            if not isinstance(number, int) or not (0 <= number < len(names) or number == NO_LABEL):
                raise ValueError(f"{what}: tag {mark!r} in row {row} is not one of {', '.join(names)}")
        mapped.append(numbers)
    return datasets.Dataset.from_dict(
        {tokens_column: words, tags_column: mapped, "text": [" ".join(texts) for texts in words]}
    )
