"""Exports that were altered after they were written: the gate refuses each, against the model that they are of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_embed.convert.convert import hf_to_megatron
from megatron_embed.errors import CheckpointError
from megatron_embed.export.engines.gate import verify_directory
from megatron_embed.export.formats import EXPORTERS
from megatron_embed.export.reranker import export_reranker_checkpoint
from megatron_embed.export.sentence_transformers import export_sentence_transformers
from megatron_embed.export.verified_write import ExportOptions
from megatron_embed.names import EngineName, Pooling
from tests.helpers.tensor_files import edit_config
from tests.helpers.toys import MINILM, save_model, save_reranker

PROMPT = "Instruct: find the answer\nQuery: "
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def edit(file: Path, **values: Any) -> None:
    """Replace top-level values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def save_embedder(path: Path, kind: str, pooling: Pooling, *, normalize: bool = True) -> Path:
    """A model in Sentence Transformers' layout: BERT, or a bidirectional Qwen3 that ends every text with an EOS."""
    if kind == "bert":
        save_model(path, "bert", tokenizer=True)
    else:
        save_reranker(path, "Qwen3Model")
        edit_config(path, is_causal=False)
    export_sentence_transformers(path, pooling=pooling, normalize=normalize, query_prompt=PROMPT, document_prompt="",
                                 max_seq_length=48, embedding_dimension=32)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("bert") / "model", "bert", "mean")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("qwen3") / "model", "qwen3", "lasttoken")


@pytest.fixture(scope="module")
def large(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with embeddings beyond float16's largest number, which the norm after them makes small."""
    path = shutil.copytree(bert, tmp_path_factory.mktemp("large") / "model")
    change_weights(path, lambda name, tensor: tensor * 1e6 if name.startswith("embeddings.") and tensor.dim() == 2
                   else tensor)
    return path


def refused(source: Path, altered: Path, alter: Callable[[Path], None], match: str,
            engine: EngineName = "sentence-transformers") -> None:
    """Copy, alter, ask the engine."""
    shutil.copytree(source, altered)
    alter(altered)
    with pytest.raises(CheckpointError, match=match):
        verify_directory(altered, [engine], against=str(source))


def pool_otherwise(directory: Path) -> None:
    edit(directory / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)


def lose_prompt(directory: Path) -> None:
    edit(directory / "config_sentence_transformers.json", prompts={"query": "", "document": ""})


def lose_eos(directory: Path) -> None:
    edit(directory / "tokenizer.json", post_processor=None)


def add_chat_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    message = {"method": "forward", "method_output_name": "last_hidden_state"}
    edit(directory / "sentence_bert_config.json", transformer_task="feature-extraction",
         module_output_name="token_embeddings", modality_config={"text": message, "message": {**message,
                                                                                             "format": "flat"}})


def add_normalization(directory: Path) -> None:
    modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
    modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"})
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (directory / "2_Normalize").mkdir()


def make_causal(directory: Path) -> None:
    edit(directory / "config.json", is_causal=True)


def cut_on_the_left(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", truncation_side="left")


def change_weights(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = directory / "model.safetensors"
    save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}, file,
              metadata={"format": "pt"})


def take_older_weights(directory: Path) -> None:
    """As before a step of training."""
    change_weights(directory, lambda name, tensor: tensor + 0.05 * torch.ones_like(tensor).cumsum(-1).cos())


def store_in_float16(directory: Path) -> None:
    change_weights(directory, lambda name, tensor: tensor.half())


def test_prompt_lost(bert: Path, tmp_path: Path) -> None:
    refused(bert, tmp_path / "out", lose_prompt, "Sentence Transformers' vector of text .* cosine")


def test_pooling_changed(bert: Path, tmp_path: Path) -> None:
    refused(bert, tmp_path / "out", pool_otherwise, "Transformers' vector of text .* cosine", "transformers")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sentence-transformers", "transformers"])
@pytest.mark.parametrize(("model", "alter", "match"), [
    ("bert", pool_otherwise, "cosine"), ("bert", lose_prompt, "cosine"), ("qwen3", lose_eos, "cosine"),
    ("qwen3", add_chat_template, "cosine|chat template"), ("qwen3", make_causal, "cosine"),
    ("bert", cut_on_the_left, "cosine"), ("bert", take_older_weights, "cosine"),
    ("large", store_in_float16, "cosine nan")])
def test_an_altered_embedder_is_refused(request: pytest.FixtureRequest, tmp_path: Path, engine: EngineName, model: str,
                                        alter: Callable[[Path], None], match: str) -> None:
    source = request.getfixturevalue(model)
    verify_directory(source, [engine])  # it is the alteration that is refused
    refused(source, tmp_path / "out", alter, match, engine)


@pytest.mark.slow
def test_normalization_that_the_model_does_not_have(tmp_path: Path) -> None:
    source = save_embedder(tmp_path / "model", "bert", "mean", normalize=False)
    verify_directory(source, ["sentence-transformers"])
    refused(source, tmp_path / "out", add_normalization, "times as long")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a yes/no reranker, with its two exports."""
    folder = tmp_path_factory.mktemp("reranker")
    save_reranker(folder / "source", "Qwen3ForCausalLM")
    hf_to_megatron(folder / "source", folder / "checkpoint")
    for kind in ("hf", "cross-encoder"):
        export_reranker_checkpoint(str(folder / "checkpoint"), str(folder / kind), ExportOptions(compare=False),
                                   classification=kind == "cross-encoder")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "file", "values"), [
    ("cross-encoder", "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.linear.Identity"}),
    ("hf", "1_LogitScore/config.json", {"true_token_id": 7}),
    ("hf", "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.linear.Identity"})])
def test_an_altered_reranker_is_refused(reranker: Path, tmp_path: Path, kind: str, file: str,
                                        values: dict[str, Any]) -> None:
    verify_directory(reranker / kind, ["sentence-transformers"], against=str(reranker / "checkpoint"))
    shutil.copytree(reranker / kind, tmp_path / "out")
    edit(tmp_path / "out" / file, **values)
    with pytest.raises(CheckpointError, match="Sentence Transformers's score of pair .* differs"):
        verify_directory(tmp_path / "out", ["sentence-transformers"], against=str(reranker / "checkpoint"))


@pytest.mark.slow
def test_naive_int8_and_a_stale_graph_are_refused(bert: Path, tmp_path: Path) -> None:
    """Naive quantization by a trained model: of random weights it is good enough, as none of their activations are much
    larger than the others."""
    from onnxruntime.quantization import quantize_dynamic

    for source, directory in ((MINILM, tmp_path / "trained"), (bert, tmp_path / "random")):
        EXPORTERS["onnx"](str(source), str(directory), ExportOptions(compare=False))
        verify_directory(directory, ["onnxruntime"], against=str(source))
    graph = tmp_path / "trained" / "onnx" / "model.onnx"
    shutil.copy(graph, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", graph)
    with pytest.raises(CheckpointError, match="ONNX Runtime's vector of text .* cosine"):
        verify_directory(tmp_path / "trained", ["onnxruntime"], against=str(MINILM))
    newer = shutil.copytree(bert, tmp_path / "newer")
    take_older_weights(newer)
    with pytest.raises(CheckpointError, match="ONNX Runtime's vector of text .* cosine"):
        verify_directory(tmp_path / "random", ["onnxruntime"], against=str(newer))
