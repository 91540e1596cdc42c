"""Extractive question answering in the form of SQuAD 1.1, scored as its official script does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

LONGEST_ANSWER = 30
"""Tokens of the longest answer that is considered, as in BERT's script."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class _Split:
    """A split's rows and what its features do not tell.

    Attributes:
        features: What the model reads.
        contexts: Of each row.
        golds: Of each row, the texts of its right answers.
        examples: ``[features]``; the row that a feature is a part of.
        offsets: Of each feature, ``[tokens, 2]``: where a token stands in the context; -1 for other tokens.
    """

    features: datasets.Dataset
    contexts: list[str]
    golds: list[list[str]]
    examples: np.ndarray
    offsets: list[np.ndarray]


class QuestionAnswering:
    """Answers are spans of a context; see :class:`lat_optuna.tasks.Task`.

    A context that is too long becomes several features, which overlap by ``stride`` tokens. Where the first answer
    does not lie wholly within a feature, that feature's answer is the first token ([CLS]), in training as in BERT's
    script; predictions are always spans of the context, since every question of SQuAD 1.1 has an answer.

    Args:
        tokenizer_or_checkpoint: A fast tokenizer, or the hub name or folder of a checkpoint that has one.
        data: ``"squad"`` or another data set of the hub, a local folder with a file for each split (``.parquet``,
            ``.json``, ``.jsonl``), or a mapping from split to file or files. Its columns: ``id``, ``context``,
            ``question``, ``answers`` with ``text`` and ``answer_start`` (characters into the context).
        subset: Which part of the hub's data set, where it has several.
        max_length: Longest input in tokens, special tokens included.
        stride: Tokens that consecutive features of one context share.
        train_rows: Number of questions to draw from the training split; all by default.
        validation_rows: Likewise.
        search_rows: Training questions to hold out as split ``"search"``, whole contexts at a time.
        test_rows: Likewise as split ``"test"``.
        train_split: Name of the split or of its file; ``None`` if there is nothing to train on.
        validation_split: Likewise.
        seed: Of the draws of rows.

    Raises:
        FileNotFoundError: A folder, file or split is missing; the message tells which ones are there.
        ValueError: A column is missing or has empty cells, an answer is missing or not where it should be, or an
            argument is out of range.
    """

    metric_name = "f1"

    def __init__(
        self,
        tokenizer_or_checkpoint: str | PreTrainedTokenizerBase,
        data: DataSource,
        subset: str | None = None,
        max_length: int = 384,
        stride: int = 128,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        search_rows: int | None = None,
        test_rows: int | None = None,
        train_split: str | None = "train",
        validation_split: str | None = "validation",
        seed: int = 0,
    ) -> None:
        from transformers import DataCollatorWithPadding

        self.name = data_name(data, subset)
        self.max_length = max_length
        self.stride = stride
        self.tokenizer = load_tokenizer(tokenizer_or_checkpoint, max_length)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        if not 0 <= stride <= max_length // 2:
            raise ValueError(f"stride must lie between 0 and half of max_length ({max_length // 2}), not {stride}")
        wanted: dict[Split, tuple[str | None, int | None]] = {
            "train": (train_split, train_rows),
            "validation": (validation_split, validation_rows),
        }
        self._rows: dict[Split, datasets.Dataset] = {}
        held: dict[Split, int | None] = {"search": search_rows, "test": test_rows}
        if train_split is None and any(count is not None for count in held.values()):
            raise ValueError("search_rows and test_rows are held out from the training rows, but train_split is None")
        for split, (name, count) in wanted.items():
            if name is not None:
                rows = read_rows(data, name, subset)
                need_columns(rows, ("id", "context", "question", "answers"), f"split {name!r}")
                if split == "train":
                    self._rows |= hold_out(rows, held, "context", seed)
                    rows = self._rows["train"]
                self._rows[split] = sample_rows(rows, count, seed, f"{split}_rows")
        if not self._rows:
            raise ValueError("train_split and validation_split are both None: nothing is left of the data")
        self._splits: dict[Split, _Split] = {}

    def build_model(self, checkpoint: str) -> PreTrainedModel:
        """A span predictor on the weights of ``checkpoint``, in fp32.

        A new head is drawn from torch's global generator: call ``transformers.set_seed`` before, to repeat it.
        """
        from transformers import AutoModelForQuestionAnswering

        return load_model(AutoModelForQuestionAnswering, checkpoint)

    def features(self, split: Split) -> datasets.Dataset:
        """Tokens, not padded, ``start_positions`` and ``end_positions`` (inclusive); made once."""
        return self._split(split).features

    def predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Logits of starts and ends, ``[2, tokens]`` a feature."""
        import torch

        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).detach().float().cpu().numpy()
        real = batch["attention_mask"].bool().cpu().numpy()
        return [feature[:, mask] for feature, mask in zip(logits, real, strict=True)]

    def log_probs(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean of the natural log-probabilities of the right start and end, one fp32 number a feature.

        NaN where a feature has no answer.
        """
        import torch

        padding = ~batch["attention_mask"].bool().to(outputs.start_logits.device)
        log_probs = []
        for logits, positions in (
            (outputs.start_logits, batch["start_positions"]),
            (outputs.end_logits, batch["end_positions"]),
        ):
            scores = logits.detach().float().masked_fill(padding, -torch.inf).log_softmax(-1)
            log_probs.append(scores.gather(-1, positions.to(scores.device)[:, None])[:, 0])
        answered = batch["end_positions"].to(padding.device) > 0
        return torch.where(answered, (log_probs[0] + log_probs[1]) / 2, torch.nan)

    def score(self, split: Split, predictions: Sequence[np.ndarray]) -> dict[str, float]:
        """F1 and exact match in percent, as SQuAD's official script defines them; NaN if a logit is NaN."""
        scores = self.score_examples(split, range(len(predictions)), predictions)
        return {name: float(values.mean()) for name, values in scores.items()}

    def score_examples(
        self, split: Split, features: Sequence[int], predictions: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The metrics of some questions, one fp64 number each, whose means are what :meth:`score` gives.

        Args:
            split: Part of the data.
            features: Rows of its features: of every question all or none.
            predictions: Their predictions.

        Returns:
            Questions are in the order of :meth:`examples`.
        """
        import numpy as np

        golds, owners = self._split(split).golds, self.examples(split)
        spoilt = {owners[row] for row, feature in zip(features, predictions, strict=True) if np.isnan(feature).any()}
        answers = self._answers(split, features, predictions)
        scores: dict[str, np.ndarray] = {}
        for name, measure in (("f1", f1), ("exact_match", exact_match)):
            values = [
                np.nan if example in spoilt else 100.0 * max(measure(answers[example], text) for text in golds[example])
                for example in sorted(answers)
            ]
            scores[name] = np.array(values)
        return scores

    def agreement(
        self, split: Split, features: Sequence[int], predictions: Sequence[np.ndarray], full: Sequence[np.ndarray]
    ) -> np.ndarray:
        """How far starts and ends agree with the full model's; percent, one number a feature."""
        import numpy as np

        return np.array([overlap(mine, its).mean() for mine, its in zip(predictions, full, strict=True)])

    def examples(self, split: Split) -> np.ndarray:
        """The question, counted from 0, that each feature belongs to."""
        return self._split(split).examples

    def answers(self, split: Split, predictions: Sequence[np.ndarray]) -> list[str]:
        """The best span of each question, over all of its features: no more than 30 tokens, all in the context."""
        answers = self._answers(split, range(len(predictions)), predictions)
        return [answers[example] for example in sorted(answers)]

    def _answers(self, split: Split, features: Sequence[int], predictions: Sequence[np.ndarray]) -> dict[int, str]:
        import numpy as np

        made = self._split(split)
        texts = {int(made.examples[row]): "" for row in features}
        inside = [np.flatnonzero(made.offsets[row][:, 0] >= 0) for row in features]
        # The context's logits of all features as one array: padded to the longest, where nothing begins or ends.
        starts = np.full((len(inside), max(map(len, inside), default=0)), -np.inf, np.float32)
        ends = starts.copy()
        for index, (context, logits) in enumerate(zip(inside, predictions, strict=True)):
            starts[index, : len(context)], ends[index, : len(context)] = logits[:, context]
        best: dict[int, float] = {}
        for row, context, start, end, score in zip(features, inside, *best_spans(starts, ends), strict=True):
            example, offsets = int(made.examples[row]), made.offsets[row]
            if score > best.get(example, -np.inf):
                best[example] = score
                texts[example] = made.contexts[example][offsets[context[start], 0] : offsets[context[end], 1]]
        return texts

    def fingerprint(self, split: Split) -> str:
        """Sha256 of the split's tokens, positions and answers, and of what makes features and metrics of them."""
        made = self._split(split)
        settings = {
            "metric": self.metric_name,
            "max_length": self.max_length,
            "stride": self.stride,
            "longest_answer": LONGEST_ANSWER,
            "answers": made.golds,
            "examples": made.examples.tolist(),
        }
        return fingerprint(made.features, settings)

    def _split(self, split: Split) -> _Split:
        if split not in self._splits:
            if split not in self._rows:
                raise ValueError(f"the task {self.name} was made without rows for {split}")
            self._splits[split] = self._encode(self._rows[split])
        return self._splits[split]

    def _encode(self, rows: datasets.Dataset) -> _Split:
        import datasets
        import numpy as np
        import pyarrow as pa

        tables, examples, offsets = [], [], []
        for begin in range(0, len(rows), CHUNK):
            chunk = rows[begin : begin + CHUNK]
            encoded = self.tokenizer(
                self._short_questions(chunk["question"]),
                chunk["context"],
                truncation="only_second",
                padding=False,
                max_length=self.max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=True,
            )
            sources = encoded.pop("overflow_to_sample_mapping")
            encoded.pop("offset_mapping")
            starts, ends = [], []
            for feature, source in enumerate(sources):
                encoding = encoded.encodings[feature]
                within = np.asarray([part == 1 for part in encoding.sequence_ids])
                where = np.where(within[:, None], np.asarray(encoding.offsets, dtype=np.int32), -1)
                answer = _first_answer(chunk, source)
                start, end = _positions(where, answer[0], answer[1])
                starts.append(start)
                ends.append(end)
                offsets.append(where)
                examples.append(begin + source)
            tables.append(token_table(encoded, {"start_positions": starts, "end_positions": ends}))
        return _Split(
            features=datasets.Dataset(pa.concat_tables(tables)),
            contexts=rows["context"][:],
            golds=[gold["text"] for gold in rows["answers"][:]],
            examples=np.asarray(examples),
            offsets=offsets,
        )

    def _short_questions(self, questions: Sequence[str]) -> list[str]:
        """Questions without leading blanks; one that would leave no room for new context is cut."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.stride - 1
        questions = [question.lstrip() for question in questions]
        encoded = self.tokenizer(
            questions,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            question if len(offsets) <= room else question[: offsets[room - 1][1]]
            for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
        ]


def best_spans(
    starts: np.ndarray, ends: np.ndarray, longest: int = LONGEST_ANSWER
) -> tuple[list[int], list[int], list[float]]:
    """Of each row the span ``start <= end < start + longest`` with the highest ``starts[start] + ends[end]``.

    All spans are looked at: what BERT's script finds with an n-best list that is long enough. Of equal ones the
    shortest counts, then the first.

    Args:
        starts: Logits ``[rows, n]``; ``-inf`` where no span may begin.
        ends: Logits ``[rows, n]``, likewise.
        longest: Most tokens of an answer.

    Returns:
        Starts, ends and sums, one a row; 0, 0 and ``-inf`` where a row has no span.
    """
    import numpy as np

    rows, n = starts.shape
    start, more, score = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.full(rows, -np.inf)
    for length in range(min(longest, n)):
        sums = starts[:, : n - length] + ends[:, length:]
        first = sums.argmax(1)
        highest = sums[np.arange(rows), first]
        better = highest > score
        start[better], more[better], score[better] = first[better], length, highest[better]
    return start.tolist(), (start + more).tolist(), score.tolist()


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are equal after :func:`normalise`, else 0."""
    return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words after :func:`normalise`."""
    predicted, right = normalise(prediction).split(), normalise(answer).split()
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0


@lru_cache(maxsize=1 << 17)  # the same answers come back at every evaluation
def normalise(answer: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_NO_PUNCTUATION)).split())


def _first_answer(chunk: Mapping[str, Any], row: int) -> tuple[int, int]:
    """Where the first answer begins and ends in its context, in characters."""
    gold = chunk["answers"][row]
    try:
        text, start = gold["text"][0], gold["answer_start"][0]
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"question {chunk['id'][row]!r} has no answer of the form {{'text': [...], 'answer_start': [...]}}; "
            "SQuAD 1.1 is meant, where every question has one"
        ) from None
    if chunk["context"][row][start : start + len(text)] != text:
        raise ValueError(f"question {chunk['id'][row]!r}: its context does not hold {text!r} at character {start}")
    return start, start + len(text)


def _positions(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters ``start..end``; ``(0, 0)`` if they are not all in the feature."""
    import numpy as np

    touched = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] >= 0))
    inside = offsets[offsets[:, 0] >= 0]
    if not len(touched) or inside[0, 0] > start or inside[-1, 1] < end:
        return 0, 0
    return int(touched[0]), int(touched[-1])
