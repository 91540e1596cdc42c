"""A tokenizer, a checkpoint and data sets that fit into a test."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("good", "bad", "film", "plot", "actor", "very", "not", "dull", "bright", "the")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word is one token if it is one of WORDS, else one a letter. It brings truncation and padding along."""
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *characters, *(f"##{c}" for c in characters)]
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_checkpoint(folder: Path, labels: int = 2) -> str:
    """A BERT of three layers with random weights, always the same, and its tokenizer; saved."""
    config = BertConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.4,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]):  # the same weights whatever was drawn before
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Rows of the form of SST-2."""
    rng = random.Random(seed)
    return [
        {"sentence": " ".join(rng.choices(WORDS, k=rng.randint(1, longest))), "label": rng.randint(0, 1)}
        for _ in range(count)
    ]


def questions(count: int, seed: int = 0, words: int = 60) -> list[dict[str, Any]]:
    """Rows of the form of SQuAD; the first answer is a word that occurs once."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        context = rng.choices(WORDS, k=words)
        context[rng.randrange(words)] = f"k{index}"
        text = " ".join(context)
        answers = {"text": [f"k{index}", f"the k{index}"], "answer_start": [text.index(f"k{index}"), 0]}
        rows.append({"id": f"q{index}", "context": text, "question": " what k?", "answers": answers})
    return rows
