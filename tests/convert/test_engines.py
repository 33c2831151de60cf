"""Exports for other engines: each engine, asked for vectors or scores, gives those of the model in memory."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import onnx
import pytest
import torch

from megatron_embed.convert.convert import hf_to_megatron
from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.errors import CheckpointError, ConfigError, UserError
from megatron_embed.export.cross_encoder import export_cross_encoder
from megatron_embed.export.engines import gate
from megatron_embed.export.engines.base import Engine, PairScores, stock_features
from megatron_embed.export.engines.files import EngineFiles, gguf_files
from megatron_embed.export.engines.gate import engine_names, verify_directory
from megatron_embed.export.engines.graph import GRAPH_FILE, pooled
from megatron_embed.export.engines.limits import check_limits
from megatron_embed.export.engines.llama_cpp import scores_of_probabilities, weights_type
from megatron_embed.export.engines.rules import check_rules
from megatron_embed.export.formats import EXPORTERS
from megatron_embed.export.reranker import PairProbes
from megatron_embed.export.sentence_transformers import export_sentence_transformers
from megatron_embed.export.verified_write import ExportOptions
from megatron_embed.models.reranker_settings import RerankerSettings
from megatron_embed.names import POOLINGS, EngineName, Pooling, Role
from tests.helpers.dense_directories import add_modules
from tests.helpers.embedding_reference import save_model
from tests.helpers.families import save_family
from tests.helpers.refusals import command
from tests.helpers.toys import copy_tokenizer, save_reranker, save_toy
from tests.helpers.toys import save_model as save_model_for_run


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_in_the_graph_is_the_stock_librarys(pooling: Pooling, side: str) -> None:
    from sentence_transformers.models import Pooling as StockPooling

    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    lengths, positions = torch.tensor([[5], [2], [1]]), torch.arange(5)
    mask = (positions < lengths if side == "right" else positions >= 5 - lengths).to(torch.int64)
    stock = StockPooling(4, pooling_mode=pooling.split("+"))({"token_embeddings": hidden, "attention_mask": mask})
    torch.testing.assert_close(pooled(hidden, mask, pooling), stock["sentence_embedding"], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained BERT, from a Hugging Face directory without Sentence Transformers' files."""
    folder = tmp_path_factory.mktemp("engines")
    save_model(folder / "hf", "bert")
    hf_to_megatron(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


def test_an_unknown_or_repeated_engine_is_refused() -> None:
    assert engine_names("tei, vllm, onnxruntime") == ["onnxruntime", "vllm", "tei"]
    with pytest.raises(UserError, match="'ollama' is none of sentence-transformers, transformers, onnxruntime"):
        engine_names("vllm,ollama")
    with pytest.raises(UserError, match="--verify-with vllm, tei,vllm: names vllm twice; keep one of them"):
        engine_names("vllm, tei,vllm")


def test_llama_cpp_has_no_matryoshka_cut(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dim: llama.cpp returns all components"):
        EXPORTERS["gguf"](str(checkpoint), str(tmp_path / "out"), ExportOptions(dim=8))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine", "file"), [
    ("onnx", "ONNX Runtime", "onnx/model.onnx"), ("openvino", "OpenVINO", "openvino/openvino_model.xml"),
    ("gguf", "llama.cpp", "model-f32.gguf")])
def test_a_format_is_compared_in_its_engine(checkpoint: Path, tmp_path: Path, kind: str, engine: str,
                                            file: str) -> None:
    lines = EXPORTERS[kind](str(checkpoint), str(tmp_path / "out"), ExportOptions())  # type: ignore[index]
    assert sum(line.split(": ")[1].startswith(f"{engine} gives the same vectors") for line in lines[:-1]) == 2
    assert (tmp_path / "out" / file).is_file()
    assert list((tmp_path / "out").glob("*.safetensors")) == [] or kind != "gguf"


@pytest.mark.slow
def test_a_hugging_face_directory_is_taken_and_a_graph_has_the_names_of_its_contract(checkpoint: Path,
                                                                                     tmp_path: Path) -> None:
    import onnxruntime

    EXPORTERS["onnx"](str(checkpoint.parent / "hf"), str(tmp_path / "out"), ExportOptions(dim=8))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / GRAPH_FILE))
    assert [node.name for node in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [node.name for node in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    batch = next(stock_features(tmp_path / "out", ["one text", "another, longer text of more tokens"], None))
    vectors = session.run(["sentence_embedding"], {name: value.numpy() for name, value in batch.items()})[0]
    assert vectors.shape == (2, 8)


@pytest.mark.slow
def test_the_gate_refuses_another_model(checkpoint: Path, tmp_path: Path) -> None:
    EXPORTERS["onnx"](str(checkpoint), str(tmp_path / "out"), ExportOptions())
    assert len(verify_directory(tmp_path / "out", ["sentence-transformers", "onnxruntime"])) == 4
    pooling = tmp_path / "out" / "1_Pooling" / "config.json"
    values = json.loads(pooling.read_text(encoding="utf-8"))
    values["pooling_mode_mean_tokens"], values["pooling_mode_cls_token"] = False, True
    pooling.write_text(json.dumps(values), encoding="utf-8")
    # Our reading of the directory changes with its file, the graph that was written before does not.
    assert len(verify_directory(tmp_path / "out", ["sentence-transformers"])) == 2
    with pytest.raises(CheckpointError, match="ONNX Runtime's vector of text .* the export must not be used"):
        verify_directory(tmp_path / "out", ["onnxruntime"])


@pytest.fixture
def exported(checkpoint: Path, tmp_path: Path) -> Path:
    """The BERT in Sentence Transformers' layout."""
    shutil.copytree(checkpoint.parent / "hf", tmp_path / "bert")
    copy_tokenizer(tmp_path / "bert")
    export_sentence_transformers(tmp_path / "bert", pooling="mean", normalize=True, query_prompt="", document_prompt="",
                                 max_seq_length=48, embedding_dimension=32)
    return tmp_path / "bert"


def edit(file: Path, **values: Any) -> None:
    """Replace top-level values of a JSON file; None removes one."""
    all_values = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps({key: value for key, value in all_values.items() if value is not None}),
                    encoding="utf-8")


def test_an_engine_that_is_not_there_is_refused_before_anything_is_written(exported: Path, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PYTHON", "/no/such/python")
    code, _, message, _ = command(["convert", "megatron-to-hf", str(exported), str(tmp_path / "out"), "--verify-with",
                                   "vllm", "--format", "onnx"])
    assert code == 2 and "VLLM_PYTHON = /no/such/python: No such file" in message
    assert not (tmp_path / "out").exists()


def test_an_export_that_an_engine_refuses_is_not_left_behind(checkpoint: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise CheckpointError("another model")

    monkeypatch.setattr(gate, "verify_directory", refuse)
    code, *_ = command(["convert", "megatron-to-hf", str(checkpoint), str(tmp_path / "out"), "--no-compare",
                        "--verify-with", "transformers"])
    assert code == 2 and not (tmp_path / "out").exists()


def test_a_directory_without_weights_needs_the_model_that_it_was_made_of(exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights that this program reads .* --against MODEL"):
        verify_directory(exported, ["llama.cpp"])


def test_vllm_finds_the_kind_of_positions_of_xlm_roberta(tmp_path: Path) -> None:
    save_toy(tmp_path, "XLMRobertaModel")
    copy_tokenizer(tmp_path)
    edit(tmp_path / "config.json", position_embedding_type=None)
    export_sentence_transformers(tmp_path, pooling="mean", normalize=True, query_prompt="", document_prompt="",
                                 max_seq_length=16, embedding_dimension=24)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["position_embedding_type"] == "absolute"


@pytest.mark.parametrize(("template", "separate"), [(None, None), ("{query} {document}", False)])
def test_vllm_reads_a_pair_of_texts_as_a_pair(tmp_path: Path, template: str | None, separate: bool | None) -> None:
    save_reranker(tmp_path, "Qwen3ForSequenceClassification")
    settings = RerankerSettings(head="score", template=template, instruction="", true_token="yes", false_token="no",
                                max_length=64, activation="sigmoid")
    export_cross_encoder(tmp_path, settings, family="qwen3", encoder=False, classification=True, token_ids=None,
                         pieces=None if template is None else ["", "query", " ", "document", ""])
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).get("use_sep_token") is separate


def test_a_reranker_of_bert_is_no_gguf(checkpoint: Path, tmp_path: Path) -> None:
    reranker = tmp_path / "reranker"
    shutil.copytree(checkpoint.parent / "hf", reranker)
    edit(reranker / "config.json", architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match="llama.cpp leaves out BERT's pooler.*conversion/bert.py.*--format onnx"):
        EXPORTERS["gguf"](str(reranker), str(tmp_path / "out"), ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["reranker"]


def test_half_precision_of_gelu_keeps_rerankers_of_encoders_from_gguf(tmp_path: Path) -> None:
    save_toy(tmp_path / "reranker", "XLMRobertaForSequenceClassification", num_labels=1, vocab_size=30522)
    copy_tokenizer(tmp_path / "reranker")
    with pytest.raises(CheckpointError, match="llama.cpp takes GELU.* half precision.*vec.h.*use --format onnx"):
        EXPORTERS["gguf"](str(tmp_path / "reranker"), str(tmp_path / "out"), ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["reranker"]
    check_limits(["vllm", "onnxruntime"], tmp_path / "reranker")


class Probabilities(Engine):
    """An engine whose scores are probabilities in float32."""

    name = "Probabilities"

    def __init__(self, raw: torch.Tensor) -> None:
        self._probabilities = raw.sigmoid().double()

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> torch.Tensor:
        raise NotImplementedError

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        return scores_of_probabilities(self._probabilities)


def test_a_probability_near_1_is_compared_as_far_as_its_last_bit_tells() -> None:
    raw = torch.tensor([0.5, 9.1, 12.3, 40.0])
    probes = PairProbes(pairs=[Pair(query="a", document="b")] * 4, raw=raw, final=raw.sigmoid(), in_template=True,
                        is_cut=[False] * 4, is_full=[False] * 4)
    for change in (0.0, 3e-3, torch.nan):
        for pair in range(4):
            theirs = raw.clone()
            theirs[pair] += change
            reader = EngineFiles(engine=Probabilities(theirs), write=lambda directory: None)
            # 0.003 more: seen at 9.1, where a bit is worth 0.0005; not at 12.3, where it is worth 0.013.
            if change == 0 or (change > 0 and pair > 1):
                assert "Probabilities gives the same scores" in reader.compare_scores(Path("dir"), probes, 1e-4)
            else:
                with pytest.raises(CheckpointError, match=f"score of pair {pair} "):
                    reader.compare_scores(Path("dir"), probes, 1e-4)


@pytest.mark.parametrize(("number", "kind", "cosine"), [(0, "f32", 0.9999), (7, "q8_0", 0.999), (15, None, 0.9999)])
def test_the_bound_is_that_of_the_types_of_weights_in_a_gguf_file(tmp_path: Path, number: int, kind: str | None,
                                                                  cosine: float) -> None:
    writer = gguf.GGUFWriter(tmp_path / "any-name.gguf", "bert")
    writer.add_file_type(number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert weights_type(tmp_path) == kind
    assert gguf_files(weights_type(tmp_path)).minimum_cosine == cosine


def graph_of(inputs: Sequence[str], output: str) -> bytes:
    """An ONNX graph that gives its first input, as numbers."""
    shape = ["batch", "tokens"]
    nodes = [onnx.helper.make_node("Cast", [inputs[0]], [output], to=onnx.TensorProto.FLOAT)]
    graph = onnx.helper.make_graph(
        nodes, "graph", [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape) for name in inputs],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(("content", "match"), [
    (b"no graph", "model.onnx: ONNX Runtime cannot use it"),
    (graph_of(["input_ids"], "last_hidden_state"), "has the outputs last_hidden_state, and not sentence_embedding"),
    (graph_of(["input_ids", "position_ids"], "sentence_embedding"), "needs the input position_ids"),
    (graph_of(["input_ids"], "sentence_embedding"), "gives vectors of shape|is as wide as the texts are long")])
def test_a_graph_of_another_program_is_refused_in_a_sentence(exported: Path, content: bytes, match: str) -> None:
    (exported / "onnx").mkdir()
    (exported / "onnx" / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        verify_directory(exported, ["onnxruntime"])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\1" * 30])
def test_a_damaged_gguf_file_is_refused_in_a_sentence(exported: Path, content: bytes) -> None:
    (exported / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.gguf: not a complete GGUF file"):
        verify_directory(exported, ["llama.cpp"], against=str(exported))


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "tei"])
def test_weighted_mean_pooling_is_refused_before_anything_is_written(exported: Path, engine: EngineName) -> None:
    edit(exported / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_weightedmean_tokens=True)
    with pytest.raises(CheckpointError, match="has no weighted mean pooling .*ONNX Runtime"):
        check_limits([engine], exported)
    check_limits(["onnxruntime"], exported)


@pytest.mark.parametrize(("engine", "family", "settings", "match"), [
    ("llama.cpp", "NomicBERT", {}, "llama.cpp reads a NomicBERT by the keys .*NomicBertModel.*ONNX Runtime"),
    ("vllm", "NomicBERT", {}, "vLLM reads a NomicBERT by the keys .*NomicBertModelConfig"),
    ("tei", "NomicBERT", {}, "reads a NomicBERT by keys and tensors .*nomic.rs.*use --format onnx"),
    ("infinity", "NomicBERT", {}, "Infinity has a Transformers before 5 .*use --format onnx"),
    ("llama.cpp", "T5", {}, "llama.cpp gives other vectors for the encoder of T5.*t5.cpp"),
    ("vllm", "T5", {}, "vLLM has no T5"),
    # vLLM is what else is recommended, and cannot serve it either.
    ("tei", "T5", {}, "does not know the family .*; use Sentence Transformers, or `megatron-embed serve`$"),
    ("tei", "Gemma 2", {}, "does not know the family .*; serve it with vLLM$"),
    ("tei", "ModernBERT", {"norm_bias": True}, "leaves the biases of ModernBERT's norms out .*LayerNormNoBias"),
    ("llama.cpp", "BERT", {"hidden_act": "relu"}, "llama.cpp computes GELU in every encoder .*bert.cpp"),
    ("llama.cpp", "Phi-3", {}, "does not apply the sliding window .*phi3.cpp")])
def test_what_an_engine_lacks_of_a_family(tmp_path: Path, engine: EngineName, family: str, settings: dict[str, Any],
                                          match: str) -> None:
    save_family(tmp_path, family, **settings)
    with pytest.raises(CheckpointError, match=match):
        check_limits([engine], tmp_path)
    check_limits(["sentence-transformers"], tmp_path)


@pytest.mark.parametrize(("engine", "activation", "normalize", "match"), [
    ("transformers", "tanh", False, "loads no module behind the pooling"),
    ("vllm", "tanh", True, "a Normalize module stands before one .*try_get_dense_modules"),
    ("tei", "tanh", True, "a Normalize module stands before one .*dense_layers"),
    ("tei", "relu", False, "Tanh and Identity alone .*DenseActivation.*vLLM"),
    ("sglang", "tanh", False, "leaves Dense modules out")])
def test_what_an_engine_lacks_of_dense_modules(tmp_path: Path, engine: EngineName, activation: str, normalize: bool,
                                               match: str) -> None:
    save_toy(tmp_path, "BertModel", hidden_size=32)
    function = {"tanh": torch.nn.Tanh(), "relu": torch.nn.ReLU()}[activation]
    add_modules(tmp_path, [*([("Normalize",)] if normalize else []), ("Dense", 32, 24, True, function)], pooling="cls")
    with pytest.raises(CheckpointError, match=match):
        check_limits([engine], tmp_path)
    if not normalize:
        check_limits(["vllm"], tmp_path)
    if activation == "tanh" and not normalize:
        check_limits(["tei"], tmp_path)


def test_keys_of_the_newer_families(tmp_path: Path) -> None:
    save_family(tmp_path, "ModernBERT")
    copy_tokenizer(tmp_path)
    edit(tmp_path / "config.json", vocab_size=30522)
    for engine, match in (("tei", "config.json has no global_rope_theta"),
                          ("infinity", 'reads global_rope_theta, local_rope_theta and .*"global_rope_theta": 160000')):
        with pytest.raises(CheckpointError, match=match):
            check_rules(engine, tmp_path)  # type: ignore[arg-type]


def test_a_graph_of_experts_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_toy(tmp_path / "experts", "Qwen3MoeModel")
    with pytest.raises(CheckpointError, match="ONNX Runtime has no graph of a mixture of experts, .*vLLM"):
        EXPORTERS["onnx"](str(tmp_path / "experts"), str(tmp_path / "out"), ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


@pytest.mark.parametrize(("engine", "file", "values", "match"), [
    ("tei", "1_Pooling/config.json", {"pooling_mode_cls_token": None}, "has no pooling_mode_cls_token"),
    ("tei", "sentence_bert_config.json", {"max_seq_length": None}, "has no max_seq_length.*STConfig"),
    ("tei", "config.json", {"pad_token_id": None}, "config.json has no pad_token_id"),
    ("tei", "tokenizer_config.json", {"truncation_side": "left"}, "truncation_direction"),
    ("infinity", "sentence_bert_config.json", {"query_length": 32},
     "query_length, which Sentence Transformers 3 does not take"),
    ("sglang", "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
     "SGLang does not read 1_Pooling: it pools this family otherwise")])
def test_rules_of_engines_that_do_not_run_here(exported: Path, engine: EngineName, file: str, values: dict[str, Any],
                                               match: str) -> None:
    edit(exported / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    assert "rules of its source; it was not run" in verify_directory(exported, [engine])[0]
    edit(exported / file, **values)
    with pytest.raises(CheckpointError, match=match):
        verify_directory(exported, [engine])


@pytest.mark.slow
def test_a_directory_in_the_newer_layout_of_sentence_transformers(exported: Path, tmp_path: Path) -> None:
    """Written by the library itself, with prompts: two engines read it, Text Embeddings Inference does not."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported), device="cpu")
    model.prompts = {"query": "find: ", "document": "text: "}
    model.default_prompt_name = "document"
    model.save(str(tmp_path / "saved"))
    lines = verify_directory(tmp_path / "saved", ["sentence-transformers", "transformers"])
    assert [line.split(":")[0] for line in lines] == ["query", "document", "no prompt"] * 2
    with pytest.raises(CheckpointError, match="has no pooling_mode_cls_token .the layout of Sentence Transformers 6"):
        verify_directory(tmp_path / "saved", ["tei"])


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="vLLM has an environment of its own: docs/serving.md")
def test_vllm_gives_the_same_vectors(tmp_path: Path) -> None:
    save_model_for_run(tmp_path / "bert", "bert", tokenizer=True, hidden_size=128)
    export_sentence_transformers(tmp_path / "bert", pooling="cls", normalize=True, query_prompt="find: ",
                                 document_prompt="", max_seq_length=48, embedding_dimension=128)
    assert len(verify_directory(tmp_path / "bert", ["vllm"])) == 2
    shutil.copytree(tmp_path / "bert", tmp_path / "other")
    edit(tmp_path / "other" / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    with pytest.raises(CheckpointError, match="vLLM's vector of text .* cosine"):
        verify_directory(tmp_path / "other", ["vllm"], against=str(tmp_path / "bert"))
