"""Adapted models as ONNX graphs, dense or length-adaptive, and their int8 forms by ONNX Runtime's own tools.

The graph is the adapted model's own forward pass, traced by ``torch.export``: how many rows each layer keeps is
computed inside of it, from the attention mask of its input. So one file serves batches of any size and length, each
example keeps what its real length allows, and the result is torch's.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lat_optuna.length_config import LengthConfig

if TYPE_CHECKING:
    import onnx
    import torch
    from transformers import PreTrainedModel

OPSET = 20
"""The first with Gelu as one operator, which ONNX Runtime knows since 1.17."""
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert")
"""Architectures whose graphs are tested against torch."""
FILES = {"onnx": "model.onnx", "onnx-int8": "model_quantized.onnx"}
"""Names that optimum gives these files."""


def need_onnx() -> None:
    """Raise a ``ValueError`` that says what to install, where the packages that this takes are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; ONNX needs: pip install 'lat-optuna[onnx]'") from None


def to_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    config: LengthConfig | None,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> Path:
    """Write an adapted model as one ONNX file with dynamic batch size and length.

    Padding is on the right, as the embeddings' positions are counted from the left.

    Args:
        model: An adapted text encoder with any head, on the CPU.
        path: Where to; its folder exists.
        config: The length configuration that the graph is for; ``None`` is dense.
        inputs: Names of the graph's inputs, all int64 and of shape (batch_size, sequence_length).

    Returns:
        ``path``. The file's ``metadata_props`` name the configuration.

    Raises:
        ValueError: The architecture cannot be exported, ONNX is not installed, or the configuration is not the model's.
    """
    need_onnx()
    import torch

    model_type = model.config.model_type
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"models of type {model_type!r} cannot be exported to ONNX; those of type {', '.join(MODEL_TYPES)} can. "
            "Any length-adaptive model can be deployed as a checkpoint (--to hf)"
        )
    # Filler that looks like text: position ids of RoBERTa leave out its padding token.
    sample = {name: torch.ones(2, 8, dtype=torch.long) for name in inputs}
    sample["input_ids"] = torch.full((2, 8), (model.config.pad_token_id or 0) + 2)
    dynamic = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    training, attention = model.training, model.config._attn_implementation
    # Eager attention, written as plain products, is what ONNX Runtime fuses best.
    model.set_attn_implementation("eager")
    model.eval()
    try:
        # A configuration that drops nothing is the dense model.
        with _quiet(), torch.no_grad(), model.at(None if config is None or config.is_full else config):  # type: ignore[operator]
            outputs = list(model(**sample).keys())
            program = torch.onnx.export(
                model,
                (),
                kwargs=sample,
                input_names=list(sample),
                output_names=outputs,
                dynamic_shapes=dict.fromkeys(sample, dynamic),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                custom_translation_table=_translations(),
            )
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    assert program is not None
    program.model.producer_name = "lat_optuna"
    program.model.metadata_props.update(_metadata(model, config))
    program.save(path)
    return Path(path)


def _metadata(model: PreTrainedModel, config: LengthConfig | None) -> dict[str, str]:
    about = {"model": type(model).__name__, "length_config": "dense" if config is None else str(config)}
    if config is not None:
        about |= {"max_length": str(config.max_length), "retention": config.retention}
    return about


def _translations() -> dict[Any, Any]:
    """Operators of ours, and of torch's those that the exporter does not know."""
    import torch
    from onnxscript import opset18 as op

    import lat_optuna.model.rows  # noqa: F401  # defines rows_at

    def stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # Of equal elements TopK puts the one with the lower index first, whichever end it sorts to.
        return op.TopK(self, op.Shape(self, start=-1), axis=-1, largest=int(descending), sorted=1)

    def gather_rows(values: Any, rows: Any) -> Any:
        last: Any = op.Constant(value_ints=[-1])
        return op.GatherND(values, op.Unsqueeze(rows, last), batch_dims=len(rows.shape) - 1)

    return {torch.ops.aten.sort.stable: stable_sort, torch.ops.lat_optuna.rows_at.default: gather_rows}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torchvision and on names of axes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# -------------------------------------------------------------------------------------------------------- int8


def quantize(source: str | os.PathLike[str], path: str | os.PathLike[str], *, keep_significance: bool = False) -> Path:
    """Quantise the weights' products of an ONNX file to int8, dynamically, one scale a column of weights.

    Args:
        source: What :func:`to_onnx` wrote.
        path: Where to.
        keep_significance: Whether the queries and keys that decide which rows stay are computed in fp32. It costs
            time and keeps the ranking of tokens as it was.

    Returns:
        ``path``.
    """
    need_onnx()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    excluded = significance_products(onnx.load(source).graph) if keep_significance else []
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to pre-process, which the exporter has done
    try:
        quantize_dynamic(
            str(source),
            str(path),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
        )
    finally:
        root.setLevel(level)
    return Path(path)


def significance_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the products with weights that significance is made of: queries and keys of layers that drop."""
    producers = {output: node for node in graph.node for output in node.output}
    weights = {initializer.name for initializer in graph.initializer}
    summed = {node.input[0] for node in graph.node if node.op_type == "ReduceSum"}
    found: dict[str, None] = {}
    for node in graph.node:
        if node.op_type != "Softmax" or node.output[0] not in summed:
            continue
        behind = [node]
        while behind:
            here = behind.pop()
            if here.op_type in ("MatMul", "Gemm") and here.input[1] in weights:
                found[here.name] = None
            elif here.op_type in ("MatMul", "Add", "Mul", "Reshape", "Transpose", "Softmax"):
                behind += [producers[name] for name in here.input if name in producers]
            elif here.op_type == "Where":  # condition, the lowest number, scores
                behind += [producers[name] for name in here.input[1:] if name in producers]
    return list(found)


# ----------------------------------------------------------------------------------------------------- running


class OnnxModel:
    """An ONNX file that is called as the torch model is: tensors by name in, outputs by name out.

    Args:
        path: The file, or a folder with one.
        threads: Threads; torch's number by default.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        need_onnx()
        import onnxruntime
        import torch

        path = Path(path)
        if path.is_dir():
            files = sorted(path.glob("*.onnx"))
            if len(files) != 1:
                raise ValueError(f"{path} holds {len(files)} ONNX files; name one of them")
            path = files[0]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input_names = [each.name for each in self.session.get_inputs()]
        self.output_names = [each.name for each in self.session.get_outputs()]

    def __call__(self, **inputs: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Inputs that the graph does not have are left out; a missing attention mask is one of ones."""
        import torch
        from transformers.utils.generic import ModelOutput

        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        arrays = {name: inputs[name].numpy() for name in self.input_names}
        found = self.session.run(self.output_names, arrays)
        return ModelOutput(
            {name: torch.from_numpy(array) for name, array in zip(self.output_names, found, strict=True)}
        )
