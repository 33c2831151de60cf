"""`checkpoint.export_formats`: a run's model in several formats, each in a directory of its own beside the export."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_embed.config.load import config_of_values
from megatron_embed.errors import ConfigError
from megatron_embed.export.calibration import CALIBRATION_ROWS, calibration_rows
from megatron_embed.export.engines import int8
from megatron_embed.loading.model_directory import find_model
from megatron_embed.names import EXPORT_PACKAGES
from megatron_embed.run.preflight import check_exports
from megatron_embed.run.run_directory import pending_exports, record_export
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import MINILM, save_model, save_toy


def config_of(tmp_path, **checkpoint):
    return config_of_values({"model": {"path": "m"}, "checkpoint": {
        "directory": str(tmp_path / "run"), "export_at_end": str(tmp_path / "out"), **checkpoint}})


def test_directories_have_the_names_of_their_formats(tmp_path):
    assert config_of(tmp_path).checkpoint.exports == {None: str(tmp_path / "out")}
    exports = config_of(tmp_path, export_formats=["onnx", "gguf-q8_0"], export_at_end="runs/out/").checkpoint.exports
    assert exports == {None: "runs/out/", "onnx": "runs/out-onnx", "gguf-q8_0": "runs/out-gguf-q8_0"}
    assert list(config_of(tmp_path, export_formats="onnx-int8").checkpoint.exports) == [None, "onnx-int8"]


@pytest.mark.parametrize(("values", "words"), [
    ({"checkpoint": {"export_formats": ["onnx"]}}, r"\['onnx'\]: nothing is exported; set checkpoint.export_at_end"),
    ({"checkpoint": {"directory": "r", "export_at_end": "o", "export_formats": ["onnx", "onnx"]}}, "a format twice"),
    ({"checkpoint": {"directory": "r", "export_at_end": "o", "export_formats": ["onnxx"]}}, "did you mean 'onnx'"),
    ({"task": "reranker", "objective": {"loss": "pointwise"},
      "checkpoint": {"directory": "r", "export_at_end": "o", "export_formats": ["gguf-f32"]}}, "export a reranker to")])
def test_formats_that_cannot_be_written_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        config_of_values({"model": {"path": "m"}, **values})


def test_an_export_that_is_there_is_not_made_again(tmp_path):
    config = config_of(tmp_path, export_formats=["onnx", "openvino"])
    (tmp_path / "run").mkdir()
    assert list(pending_exports(config, 3)) == [None, "onnx", "openvino"]
    for kind in (None, "onnx"):
        Path(config.checkpoint.exports[kind]).mkdir()
        (Path(config.checkpoint.exports[kind]) / "modules.json").touch()
        record_export(config, kind, 3)
    assert list(pending_exports(config, 3)) == ["openvino"]
    assert list(pending_exports(config, 4)) == [None, "onnx", "openvino"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert", "bert", tokenizer=True)


def written(tmp_path, model, formats, **sections):
    values = settings(model, tmp_path / "run")
    values["checkpoint"] |= {"export_at_end": str(tmp_path / "out"), "export_formats": formats}
    for name, section in sections.items():
        values[name] |= section
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def refused(config, words):
    with pytest.raises(ConfigError, match=words):
        check_exports(config, find_model(str(MINILM)), pending_exports(config, 0))


def test_what_llama_cpp_does_not_compute_and_a_name_in_use_are_refused(tmp_path):
    for section, words in (({"pooling": "weightedmean"}, "no weighted mean pooling"), ({"normalize": False}, "length")):
        config = config_of_values({"model": {"path": "m"}, "embedding": section, "checkpoint": {
            "directory": str(tmp_path / "run"), "export_at_end": str(tmp_path / "out"), "export_formats": "gguf-f16"}})
        refused(config, f"checkpoint.export_formats = 'gguf-f16': llama.cpp .*{words}")
    (tmp_path / "out-onnx").mkdir()
    (tmp_path / "out-onnx" / "precious").touch()
    refused(config_of(tmp_path, export_formats="onnx"), "checkpoint.export_formats = '.*out-onnx': exists already")
    refused(config_of(tmp_path, export_formats="onnx", export_at_end=str(tmp_path / "run" / "out")),
            "lies in checkpoint.directory")


def test_a_graph_of_experts_is_refused_before_the_training(tmp_path):
    model = find_model(str(save_toy(tmp_path / "experts", "Qwen3MoeModel")))
    config = config_of(tmp_path, export_formats="openvino")
    with pytest.raises(ConfigError, match="= 'openvino': ONNX Runtime has no graph of a mixture of experts"):
        check_exports(config, model, pending_exports(config, 0))


def test_a_missing_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORT_PACKAGES, "openvino", ("no_such_package",))
    refused(config_of(tmp_path, export_formats="openvino-int8"), r"no_such_package is not installed; pip install")


@pytest.mark.slow
def test_a_run_writes_every_format_and_a_second_start_only_those_that_are_missing(tmp_path, model):
    kinds = ["onnx", "onnx-int8", "openvino", "gguf-q8_0"]
    config = written(tmp_path, model, kinds, data={"query_prompt": "query: "})
    (result,) = run_on_ranks(command, 1, ["train", config])
    assert result[0] == 0, result[2]
    for kind, file in zip(kinds, ("onnx/model.onnx", "onnx/model.onnx", "openvino/openvino_model.xml",
                                  "model-q8_0.gguf"), strict=True):
        assert (tmp_path / f"out-{kind}" / file).is_file(), kind
        assert f"# out-{kind}" in (tmp_path / f"out-{kind}" / "README.md").read_text()
        assert json.loads((tmp_path / "run" / f"export-{kind}.json").read_text())["steps"] == 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*/config.json")}
    (tmp_path / "out-onnx" / "modules.json").unlink()
    for file in sorted((tmp_path / "out-onnx").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (result,) = run_on_ranks(command, 1, ["train", config])
    assert result[0] == 0, result[2]
    changed = {path.parent.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"out-onnx"}
    times = {path: path.stat().st_mtime_ns for path in times}
    assert run_on_ranks(command, 1, ["train", config])[0][0] == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}  # the run is complete
    assert len(calibration_rows(str(tmp_path / "run"), None)) == CALIBRATION_ROWS  # of the run's own data.train


@pytest.mark.slow
def test_a_format_below_its_bound_ends_the_run_and_the_others_are_there(tmp_path, model):
    config = written(tmp_path, model, ["onnx", "onnx-int8", "openvino"])
    (result,) = run_on_ranks(refused_int8, 1, config)
    assert result[0] == 2 and "in 8 bits it gives other results" in result[2]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out", "out-onnx"]


def refused_int8(config):
    """Called by the rank: a run for whose model 8-bit integers are too coarse."""
    compare, int8._compare = int8._compare, lambda exact, ours: (False, "cosine >= 0.9000")
    try:
        return command(["train", config])
    finally:
        int8._compare = compare
