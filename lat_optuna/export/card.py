"""The model card of an exported folder: a README.md as the Hugging Face hub shows it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lat_optuna.search.front import Front, Point

PICTURE = "front.svg"
SHOWN_POINTS = 20
_PIPELINES = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
}

_HF = """\
```python
from transformers import AutoTokenizer, pipeline
import lat_optuna

model = lat_optuna.load("{folder}")              # with the configuration above; budget=0.5 takes another point
tokenizer = AutoTokenizer.from_pretrained("{folder}")
predict = pipeline("{task}", model=model, tokenizer=tokenizer)
```

Without `lat_optuna` it is an ordinary checkpoint: `{auto_class}.from_pretrained("{folder}")` runs it dense. The budget
of a running model changes from one call to the next:

```python
from lat_optuna.model.checkpoint import read_side_file

model.length_config = read_side_file("{folder}").pick(budget=0.5)    # or None: dense
```
"""

_ONNX = """\
```python
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("{folder}/{file}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer(["Any text of yours.", "And another."], padding=True, return_tensors="np")
outputs = session.run(None, {{each.name: inputs[each.name] for each in session.get_inputs()}})
```

Batch size and length are free, padding is on the right. How many rows each layer keeps follows each input's real
length, inside the graph.
"""


def write_card(
    folder: Path,
    *,
    name: str,
    kind: str,
    file: str | None,
    architecture: str,
    base_model: str,
    licence: str | None,
    checks: Mapping[str, Any],
    front: Front,
    chosen: Point,
    about: Mapping[str, str],
    picture: bool,
) -> Path:
    """Write ``README.md``.

    Args:
        folder: Where to.
        name: The study's name, the title.
        kind: ``"hf"``, ``"onnx"`` or ``"onnx-int8"``.
        file: Name of the ONNX file.
        architecture: Class of the model, ``"BertForQuestionAnswering"``.
        base_model: The pretrained encoder, as the study file names it.
        licence: Of the base model, where it is known.
        checks: What lies in ``export.json``.
        front: All points that one may choose.
        chosen: The one that was chosen.
        about: What was trained on what, line by line.
        picture: Whether ``front.svg`` lies beside it.
    """
    suffix = next((suffix for suffix in _PIPELINES if architecture.endswith(suffix)), None)
    task, auto_class = _PIPELINES.get(suffix or "", ("feature-extraction", "AutoModel"))
    head = {
        "library_name": "transformers" if kind == "hf" else "onnx",
        "pipeline_tag": task,
        "base_model": None if ":" in base_model or base_model.startswith((".", "/", "~")) else base_model,
        "license": licence.lower() if licence else None,
        "tags": "[length-adaptive-transformer]",
    }
    usage = (_HF if kind == "hf" else _ONNX).format(folder="FOLDER", file=file, task=task, auto_class=auto_class)
    licence_line = (
        f"{licence} (of the base model)" if licence else "not known here: that of the base model, and of the data"
    )
    parts = [
        "---\n" + "".join(f"{key}: {value}\n" for key, value in head.items() if value) + "---",
        f"# {name}",
        f"{architecture}, length-adaptive ([Kim & Cho, 2021](https://arxiv.org/abs/2010.07003)): layer *j* keeps the "
        f"word vectors that receive most attention. Of an input of {checks['max_length']} tokens the layers keep "
        f"`{chosen.text}`, of shorter ones "
        + ("the same share." if checks["retention"] == "relative" else "as many, or all.")
        + f" That takes {chosen.cost:.3f} of the dense model's FLOPs.",
        "## How to load it",
        usage.rstrip(),
        "## What was measured",
        _checks_table(checks),
        "## The front",
        *([f"![{front.metric} against FLOPs]({PICTURE})"] if picture else []),
        _front_table(front, chosen),
        "## Where it comes from",
        "\n".join(f"- {key}: {value}" for key, value in {**about, "Licence": licence_line}.items() if value),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _checks_table(checks: Mapping[str, Any]) -> str:
    metric, latency = checks["metric"], checks["latency"]
    error = checks["standard_error"]
    spread = "" if error is None else f" ± {error:.2f}"
    lines = [
        f"On split `{checks['split']}` ({checks['examples']:,} examples):",
        "",
        f"| | {checks['metric_name']} (%) | answers that differ | ms an input |",
        "| --- | ---: | ---: | ---: |",
        f"| dense, torch | {metric['dense_torch']:.2f} | | {latency['ms']['dense_torch']:.2f} |",
        f"| this configuration, torch | {metric['torch']:.2f}{spread} | | {latency['ms']['torch']:.2f} |",
    ]
    if checks["kind"] != "hf":
        lines += [
            f"| dense, {checks['kind']} | {metric['dense_exported']:.2f} | | {latency['ms']['dense_exported']:.2f} |"
        ]
    lines += [
        f"| **this folder** | **{metric['exported']:.2f}**{spread} | {checks['differing']} against torch | "
        f"**{latency['ms']['exported']:.2f}** |",
        "",
        f"± is one standard error. Latencies: batches of {latency['batch_size']}, {latency['tokens']:.0f} tokens on "
        f"average (the split's real lengths), medians in turns, {checks['hardware']}.",
    ]
    return "\n".join(lines)


def _front_table(front: Front, chosen: Point) -> str:
    points: Sequence[Point] = front.points
    if len(points) > SHOWN_POINTS:
        step = (len(points) - 1) / (SHOWN_POINTS - 1)
        points = [points[index] for index in sorted({round(at * step) for at in range(SHOWN_POINTS)})]
    if chosen not in points:
        points = sorted([*points, chosen], key=lambda point: point.cost)
    reported = any(point.reported is not None for point in points)
    heading = f"| FLOPs | {front.metric} (%) |" + (" reported (%) |" if reported else "") + " configuration | |"
    rule = "| ---: | ---: |" + (" ---: |" if reported else "") + " --- | --- |"
    lines = [heading, rule]
    for point in points:
        told = "" if not reported else f" {'' if point.reported is None else f'{point.reported:.2f}'} |"
        mark = "this one" if point == chosen else ""
        lines.append(f"| {point.cost:.3f}x | {point.metric:.2f} |{told} {point.text} | {mark} |")
    if reported:
        lines += ["", "The search chose by what it measured on its own split; *reported* is on one it did not see."]
    return "\n".join(lines)


def licence_of(checkpoint: str, folder: str) -> str | None:
    """The licence that a base model names, in the head of its card or as metadata of the package that it came in.

    Args:
        checkpoint: As the study file has it.
        folder: Where it lies, or its name on the hub.
    """
    card = Path(folder) / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        head = text.split("---")[1] if text.startswith("---") else ""
        if found := re.search(r"^license:\s*(\S+)", head, re.MULTILINE):
            return found[1].strip("'\"")
    if checkpoint.startswith("package:"):
        name = checkpoint.removeprefix("package:").partition("/")[0]
        try:
            about: Any = importlib.metadata.metadata(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            return None
        for key in ("License-Expression", "License"):
            if value := about.get(key):
                return str(value).splitlines()[0]
    return None
