"""What is exported gives what torch gives, follows each input's length, and leaves nothing half-written behind."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from lat_optuna import LengthConfig, adapt, load
from lat_optuna.deploy import whole_folder
from lat_optuna.export.onnx import OnnxModel, quantize, significance_products, to_onnx
from lat_optuna.spec import SpecError
from tests.in_process import run
from tests.test_cli import finished  # noqa: F401
from tests.zoo import CASES, LAYERS, assert_close, inputs_for, results

pytest.importorskip("onnxruntime")

CONFIG = LengthConfig((20, 20, 9), 30)
BATCHES = ([5, 17, 30], [4], [2, 2], [1, 30, 29, 7], [30])


def exported(case: str, path, config: LengthConfig | None):
    model = adapt(CASES[case].build())
    to_onnx(model, path, config)
    return model, OnnxModel(path, threads=1)


@pytest.mark.parametrize(
    "case",
    [
        "BertForSequenceClassification",
        "RobertaForQuestionAnswering",
        "ElectraForTokenClassification",
        "DistilBertForSequenceClassification",
    ],
)
def test_one_graph_serves_every_batch_as_torch_does(case, tmp_path):
    model, graph = exported(case, tmp_path / "model.onnx", CONFIG)
    for ns in BATCHES:
        batch = inputs_for(model, ns)
        with torch.inference_mode(), model.at(CONFIG):
            expected = results(model, model(**batch), ns)
        assert_close(results(model, graph(**batch), ns), expected)
        # Further padding changes nothing.
        wider = inputs_for(model, ns, pad_to=max(ns) + 5)
        assert_close(results(model, graph(**wider), ns), expected)
    assert [each.shape for each in graph.session.get_inputs()] == [["batch_size", "sequence_length"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "BertForQuestionAnswering",
        "BertForTokenClassification",
        "RobertaForSequenceClassification",
        "XLMRobertaForTokenClassification",
        "ElectraForQuestionAnswering",
        "DistilBertForTokenClassification",
        "AlbertForSequenceClassification",
        "AlbertForTokenClassification",
    ],
)
@pytest.mark.parametrize("config", [CONFIG, LengthConfig((12, 9, 3), 20, "absolute"), None])
def test_every_family_and_head_and_retention(case, config, tmp_path):
    model, graph = exported(case, tmp_path / "model.onnx", config)
    for ns in BATCHES:
        batch = inputs_for(model, ns)
        with torch.inference_mode(), model.at(config):
            expected = results(model, model(**batch), ns)
        assert_close(results(model, graph(**batch), ns), expected)


def test_absolute_retention_serves_every_batch_too(tmp_path):
    config = LengthConfig((12, 9, 3), 20, "absolute")
    model, graph = exported("BertForQuestionAnswering", tmp_path / "model.onnx", config)
    for ns in BATCHES:
        batch = inputs_for(model, ns)
        with torch.inference_mode(), model.at(config):
            expected = results(model, model(**batch), ns)
        assert_close(results(model, graph(**batch), ns), expected)


def test_counts_are_exact_where_a_float_would_round(tmp_path):
    """ceil(l * n / max_length) at a length where l * n / max_length is whole: one row more would show."""
    config = LengthConfig((49, 21, 7), 49)
    model, graph = exported("BertForTokenClassification", tmp_path / "model.onnx", config)
    for n in (7, 14, 21, 28, 35, 42, 49):
        batch = inputs_for(model, [n])
        with torch.inference_mode(), model.at(config):
            expected = results(model, model(**batch), [n])
        assert_close(results(model, graph(**batch), [n]), expected)


def test_int8_can_keep_the_ranking_of_tokens_in_fp32(tmp_path):
    import onnx

    model, graph = exported("BertForQuestionAnswering", tmp_path / "model.onnx", CONFIG)
    kept = significance_products(onnx.load(tmp_path / "model.onnx").graph)
    assert len(kept) == 4  # queries and keys of the two layers that drop; the second does not
    everything = quantize(tmp_path / "model.onnx", tmp_path / "all.onnx")
    most = quantize(tmp_path / "model.onnx", tmp_path / "most.onnx", keep_significance=True)

    def integer_products(path) -> int:
        return sum(node.op_type == "MatMulInteger" for node in onnx.load(path).graph.node)

    assert integer_products(everything) == integer_products(most) + 4
    batch = inputs_for(model, [5, 17, 30])
    for path in (everything, most):
        found = OnnxModel(path, threads=1)(**batch)
        assert torch.isfinite(found["start_logits"]).all()
        assert not torch.equal(found["start_logits"], graph(**batch)["start_logits"])


def test_a_family_that_cannot_be_exported_is_named(tmp_path):
    model = adapt(CASES["ViTForImageClassification"].build())
    with pytest.raises(ValueError, match=r"'vit' cannot be exported.*bert.*--to hf"):
        to_onnx(model, tmp_path / "model.onnx", LengthConfig.full(LAYERS, 17))
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime is not installed.*pip install 'lat-optuna\[onnx\]'"):
        to_onnx(adapt(CASES["BertModel"].build()), tmp_path / "model.onnx", CONFIG)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as folder:
        (folder / "all").write_text("")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(SpecError, match="exists"), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(SpecError, match="cannot write to /proc/out"), whole_folder(type(tmp_path)("/proc/out")):
        pass


# ------------------------------------------------------------------------------------------------- the command


def test_the_chosen_point_as_a_checkpoint_that_everybody_can_load(finished, tmp_path):  # noqa: F811
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    folder, study, _ = finished
    out = tmp_path / "deployed"
    done = run("export", study, "--budget", "0.9", "--to", "hf", out)
    assert done.returncode == 0, done.stderr
    point = json.loads(run("front", study, "--json", "--budget", "0.9").stdout)["points"][0]
    checks = json.loads((out / "export.json").read_text())
    assert checks["length_config"] == point["configuration"]
    assert checks["differing"] == 0
    assert checks["metric"]["exported"] == checks["metric"]["torch"] == pytest.approx(point["accuracy"])
    assert "0 of 40 answers differ" in done.stdout
    model = load(out)
    assert str(model.length_config) == point["configuration"]
    other = load(folder / "out" / "length_adaptive", budget=0.9).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["a good film", "very dull plot, not the actor"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model.eval()(**batch).logits, other(**batch).logits)
    assert pipeline("text-classification", model=model, tokenizer=tokenizer)("a good film")[0]["label"] in "01"
    assert pipeline("text-classification", model=str(out))("a good film")[0]["label"] in "01"
    dense = AutoModelForSequenceClassification.from_pretrained(out).eval()
    with torch.inference_mode(), model.at(None):
        assert torch.equal(model(**batch).logits, dense(**batch).logits)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    assert f"| {point['accuracy']:.2f} | {point['configuration']} | this one |" in card
    again = run("export", study, "--budget", "0.9", out)
    assert again.returncode == 2
    assert "exists" in again.stderr


@pytest.mark.parametrize(("kind", "file"), [("onnx", "model.onnx"), ("onnx-int8", "model_quantized.onnx")])
def test_an_onnx_folder_runs_in_plain_onnxruntime(finished, tmp_path, kind, file):  # noqa: F811
    import onnx
    import onnxruntime
    from transformers import AutoTokenizer

    _, study, _ = finished
    out = tmp_path / kind
    done = run("export", study, "--budget", "0.9", "--to", kind, out)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in out.iterdir()} - {"front.svg", "special_tokens_map.json", "vocab.txt"}
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json", "length_adaptive.json", "export.json"}
    assert names == expected | {"README.md", file}
    checks = json.loads((out / "export.json").read_text())
    if kind == "onnx":
        assert checks["differing"] == 0
    assert set(checks["latency"]["ms"]) == {"dense_torch", "torch", "exported", "dense_exported"}
    about = {each.key: each.value for each in onnx.load(out / file).metadata_props}
    assert about["length_config"] == checks["length_config"]
    session = onnxruntime.InferenceSession(str(out / file))
    inputs = AutoTokenizer.from_pretrained(out)(["a good film", "dull"], padding=True, return_tensors="np")
    found = session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})
    assert found[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "16-16", "{tmp}/out"], 2, "--config 16-16"),
        (["--config", "16-15-1", "{tmp}/out"], 2, "not a point of the front; near it are"),
        (["--budget", "0.01", "{tmp}/out"], 1, "the smallest costs"),
        (["{tmp}/out"], 2, "choose a point"),
        (["--budget", "0.9", "/proc/out"], 2, "cannot write to /proc/out"),
        (["--budget", "0.9", "--to", "tensorrt", "{tmp}/out"], 2, "tensorrt"),
    ],
)
def test_wrong_use_of_export(finished, tmp_path, arguments, code, message):  # noqa: F811
    _, study, _ = finished
    done = run("export", study, *(each.format(tmp=tmp_path) for each in arguments))
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
