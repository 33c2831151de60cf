"""8-bit integers in the graph: what is refused, what stays float32, and how close the vectors are."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from megatron_embed.errors import CheckpointError, ConfigError, UserError
from megatron_embed.export.calibration import CALIBRATION_ROWS, calibration_rows
from megatron_embed.export.engines import int8
from megatron_embed.export.engines.files import EngineFiles
from megatron_embed.export.engines.gate import verify_directory
from megatron_embed.export.engines.graph import GRAPH_FILE
from megatron_embed.export.engines.onnx_runtime import OnnxRuntime
from megatron_embed.export.formats import EXPORTERS, check_quantization
from megatron_embed.export.verified_write import ExportOptions
from tests.helpers.cross_encoders import cross_encoder  # noqa: F401  a fixture
from tests.helpers.toys import MINI_EN, MINILM


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("gguf", {"quantize": "int8"}, "--quantize: not of --format gguf; use --gguf-type q8_0"),
    ("hf", {"quantize": "int8"}, "--quantize: not of --format hf, which has"),
    ("onnx", {"quantize": "int8", "compare": False}, "remove --no-compare"),
    ("onnx", {"calibration": "rows.jsonl"}, "--calibration: nothing is quantized")])
def test_options_without_effect_and_unverified_graphs_are_refused(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        check_quantization(kind, ExportOptions(**options))
    check_quantization("openvino", ExportOptions(quantize="int8", calibration="rows.jsonl"))


def test_calibration_rows_are_spaced_over_the_file_and_must_be_there(tmp_path):
    lines = MINI_EN.read_text(encoding="utf-8").splitlines()
    rows = calibration_rows("anything", str(MINI_EN))
    assert len(rows) == CALIBRATION_ROWS < len(lines)
    queries = [json.loads(line)["query"] for line in lines]
    assert rows[0][0] == queries[0] and rows[-1][0] == queries[255 * len(lines) // 256]
    with pytest.raises(ConfigError, match="is not the checkpoint of a run.* give --calibration FILE"):
        calibration_rows(str(MINILM), None)
    with pytest.raises(UserError, match=r"--calibration = .*gone\.jsonl"):
        calibration_rows("anything", str(tmp_path / "gone.jsonl"))


def test_a_vector_below_the_bound_is_refused(monkeypatch):
    """0.99, and not the 0.9999 that float32 must reach."""
    files = int8._bounded(EngineFiles(engine=OnnxRuntime(), write=lambda directory: None))
    exact = torch.tensor([[1.0, 0.0]])
    for cosine, passes in ((0.992, True), (0.985, False)):
        vector = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]])
        monkeypatch.setattr(OnnxRuntime, "vectors", lambda self, directory, texts, role, vector=vector: vector)
        if passes:
            assert files.compare_vectors(Path("d"), ["a"], exact, "query", 0.9999).minimum_cosine > 0.99
        else:
            with pytest.raises(CheckpointError, match=r"below 0\.99; the export must not be used"):
                files.compare_vectors(Path("d"), ["a"], exact, "query", 0.9999)


def small_graph(file: Path, *, outlier: float) -> dict[str, np.ndarray]:
    """Two products after an embedding; one component of the second one's input is `outlier` times as large."""
    random = np.random.default_rng(3)
    table, first, second = (random.normal(size=size).astype(np.float32) for size in ((50, 64), (64, 512), (512, 32)))
    first[:, 0] *= outlier
    second[0] /= outlier
    constants = [numpy_helper.from_array(value, name) for name, value in
                 (("table", table), ("first", first), ("second", second), ("axes", np.array([1])))]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
             helper.make_node("MatMul", ["tokens", "first"], ["middle"], name="a"),
             helper.make_node("MatMul", ["middle", "second"], ["states"], name="b"),
             helper.make_node("ReduceMean", ["states", "axes"], ["sentence_embedding"], keepdims=0)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 32])], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return {"input_ids": random.integers(0, 50, size=(6, 9))}


@pytest.mark.parametrize(("outlier", "recipe"), [(1.0, "static"), (60.0, "blocks")])
def test_the_first_recipe_that_keeps_the_results_is_taken(tmp_path, monkeypatch, outlier, recipe):
    (tmp_path / "onnx").mkdir()
    feed = small_graph(tmp_path / GRAPH_FILE, outlier=outlier)
    exact = int8._results(tmp_path / GRAPH_FILE, [feed])
    monkeypatch.setattr(int8, "_batches", lambda directory, rows: ([feed], [feed]))
    int8.quantize_graph(tmp_path, [])
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    graph = onnx.load(str(tmp_path / GRAPH_FILE)).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == (2 if recipe == "blocks" else 0)
    assert operators.count("QuantizeLinear") == (2 if recipe == "static" else 0)
    cosine = torch.nn.functional.cosine_similarity(exact, int8._results(tmp_path / GRAPH_FILE, [feed]))
    assert 0.99 < cosine.min() < 0.999999
    assert int8._is_quantized(EngineFiles(engine=OnnxRuntime(), write=lambda directory: None), tmp_path)
    if recipe == "static":
        scales = [tensor for tensor in graph.initializer if tensor.name.startswith("second") and "scale" in tensor.name]
        assert [list(tensor.dims) for tensor in scales] == [[32]]  # one for every output


def test_results_that_no_recipe_keeps_are_refused(tmp_path, monkeypatch):
    (tmp_path / "onnx").mkdir()
    feed = small_graph(tmp_path / GRAPH_FILE, outlier=60.0)
    before = (tmp_path / GRAPH_FILE).read_bytes()
    monkeypatch.setattr(int8, "_batches", lambda directory, rows: ([feed], [feed]))
    monkeypatch.delitem(int8.RECIPES, "blocks")
    with pytest.raises(CheckpointError, match=r"than in float32 \(static cosine >= .*without --quantize int8"):
        int8.quantize_graph(tmp_path, [])
    assert (tmp_path / GRAPH_FILE).read_bytes() == before
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_scores_are_compared_by_rank_and_by_difference():
    exact = torch.linspace(-4, 4, 50, dtype=torch.float64)[:, None]
    assert int8._compare(exact, exact + 0.05) == (True, "rank correlation 1.0000, largest difference of a score 0.050")
    assert not int8._compare(exact, exact + 0.5)[0]
    assert not int8._compare(exact, exact.flip(0))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_trained_model_keeps_its_vectors(tmp_path, kind, engine):
    options = ExportOptions(quantize="int8", calibration=str(MINI_EN))
    lines = EXPORTERS[kind](str(MINILM), str(tmp_path / "out"), options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == ["model.onnx"]
    assert (tmp_path / "out" / GRAPH_FILE).stat().st_size < 65e6  # 91 MB in float32, 47 of which are embeddings
    assert len([line for line in lines if "gives the same vectors" in line]) == 4
    assert len(verify_directory(tmp_path / "out", [engine])) == 2  # by the bound of int8


@pytest.mark.slow
def test_naive_dynamic_quantization_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def naive(prepared, result, calibration, large):
        quantize_dynamic(str(prepared), str(result), weight_type=QuantType.QInt8)

    monkeypatch.setattr(int8, "RECIPES", {"naive": naive})
    options = ExportOptions(quantize="int8", calibration=str(MINI_EN))
    with pytest.raises(CheckpointError, match=r"naive cosine >= 0\.[89]"):
        EXPORTERS["onnx"](str(MINILM), str(tmp_path / "out"), options)
    assert not list(tmp_path.iterdir())
    # The comparison with the model in memory is not blind either, should the quantizer's own be.
    monkeypatch.setattr(int8, "_compare", lambda exact, ours: (True, ""))
    with pytest.raises(CheckpointError, match=r"ONNX Runtime's vector of text .* below 0\.99"):
        EXPORTERS["onnx"](str(MINILM), str(tmp_path / "out"), options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reranker_is_quantized(tmp_path, cross_encoder):
    lines = EXPORTERS["onnx"](str(cross_encoder), str(tmp_path / "out"),
                              ExportOptions(quantize="int8", calibration=str(MINI_EN)))
    assert any(line.startswith("ONNX Runtime gives the same scores") for line in lines), lines
    assert len(verify_directory(tmp_path / "out", ["onnxruntime"])) == 1
