"""Does an engine serve a directory as we compute it? For any directory, also one that another program wrote."""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.export.embedding import LONGEST_COMPUTED, MINIMUM_COSINE, PROBE_TEXTS, border_texts
from megatron_embed.export.engines.base import Engine
from megatron_embed.export.engines.files import CutPairs, EngineFiles, gguf_files
from megatron_embed.export.engines.int8 import at_its_bound
from megatron_embed.export.engines.limits import check_limits
from megatron_embed.export.engines.llama_cpp import weights_type
from megatron_embed.export.engines.onnx_runtime import OnnxRuntime, OpenVino
from megatron_embed.export.engines.rules import RULES, check_rules
from megatron_embed.export.engines.stock import SentenceTransformers, Transformers
from megatron_embed.export.engines.vllm import Vllm
from megatron_embed.export.reranker import TOLERANCE, PairProbes
from megatron_embed.export.verify import weight_bytes
from megatron_embed.loading.model_directory import find_model, open_encoder
from megatron_embed.loading.reranker import is_reranker, open_scorer
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import ROLES, EngineName, Role

LONG_TEXT = " ".join(PROBE_TEXTS * 6)
"""A text of some 600 tokens, cut where the model's length is less."""


def _reads(engine: Engine, cuts: CutPairs = "all") -> EngineFiles:
    return EngineFiles(engine=engine, write=_nothing, cuts=cuts)


def _nothing(directory: Path) -> None:
    """The files are there."""


ENGINES: Mapping[EngineName, Callable[[], EngineFiles]] = {
    "sentence-transformers": lambda: _reads(SentenceTransformers()),
    "transformers": lambda: _reads(Transformers(), cuts="texts"),
    "onnxruntime": lambda: _reads(OnnxRuntime()), "openvino": lambda: _reads(OpenVino()),
    "vllm": lambda: _reads(Vllm(), cuts="texts"),
    "llama.cpp": lambda: gguf_files("f32")}
"""By the names that `convert --verify-with` takes; those of rules.py are asked by their rules."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Texts of one role, or of none, with the vectors of the model in memory."""

    role: Role | None
    texts: list[str]
    vectors: Tensor
    """[texts, dim] float32."""


def verify_directory(directory: Path, engines: Sequence[EngineName], against: str | None = None,
                     dim: int | None = None) -> list[str]:
    """The lines of the report on each engine. Raises CheckpointError for the first one that gives other results.

    One process. Short and long texts, texts at the maximum length, Chinese, code, of both roles and of none, or pairs.

    Args:
        against: the model that the directory was made of, as it is trained: a run, a checkpoint or a directory; None:
            the directory itself, as this program reads it.
        dim: components of a vector in the directory's graph; None: all.
    """
    lines = [check_rules(name, directory) for name in engines if name in RULES]
    run = [name for name in engines if name in ENGINES]
    if run and against is None and not weight_bytes(directory):
        raise CheckpointError(f"{directory}: no weights that this program reads (*.safetensors) to compare with; name "
                              "the model that it was made of: --against MODEL")
    readers = [gguf_files(weights_type(directory)) if name == "llama.cpp" else at_its_bound(ENGINES[name](), directory)
               for name in run]
    if dim is not None:
        readers = [dataclasses.replace(reader, dim=dim) for reader in readers]
    return [*lines, *(verify_with(directory, readers, against or str(directory)) if readers else ())]


def verify_with(directory: Path, readers: Sequence[EngineFiles], source: str) -> list[str]:
    """`verify_directory` with given engines; they are closed."""
    try:
        if is_reranker(find_model(source, "SRC")):
            scorer, _, _ = open_scorer(source, key="SRC", dtype="float32", own_libraries=False)
            probes = PairProbes.of(scorer)
            del scorer  # its memory goes before an engine takes as much
            return [reader.compare_scores(directory, probes, TOLERANCE["float32"]) for reader in readers]
        references = vector_references(source, directory)
        return [f"{probe.role or 'no prompt'}: {report}" for reader in readers for probe in references
                for report in (reader.compare_vectors(directory, probe.texts, probe.vectors, probe.role,
                                                      MINIMUM_COSINE["float32"]),)]
    finally:
        for reader in readers:
            reader.engine.close()


def vector_references(source: str, directory: Path) -> list[Reference]:
    """Texts for a directory that was made of `source`, with its vectors."""
    arguments = argparse.Namespace(model=source, dtype="float32", pooling=None, max_length=None, no_normalize=False,
                                   overrides=[])
    encoder, model, _ = open_encoder(arguments, prompts=True, own_libraries=False)
    longest = read_saved_settings(directory).max_length or model.shape.longest_text
    references = [_reference(encoder, role, role, longest) for role in ROLES]
    prompts = [model.saved.prompts.get(role, "") for role in ROLES]
    if all(prompts):  # else a role is without a prompt
        plain = copy.copy(encoder)
        plain.tokenizer = encoder.tokenizer.without_prompts()
        references.append(_reference(plain, None, "document", longest))
    return references


def _reference(encoder: TextEncoder, role: Role | None, length_of: Role, longest: int) -> Reference:
    limit = min(encoder.tokenizer.max_length(length_of), longest)
    texts = [*PROBE_TEXTS, *(() if limit > LONGEST_COMPUTED else border_texts(encoder.tokenizer, length_of,
                                                                              longest).texts)]
    if limit > LONGEST_COMPUTED or encoder.tokenizer.max_length(length_of) == longest:
        texts.append(LONG_TEXT)
    return Reference(role=role, texts=texts, vectors=encoder.encode(texts, length_of))


def check_engines(engines: Sequence[EngineName], source: str) -> None:
    """Refuse, before anything is written, engines that are not installed or cannot serve the model of `source`.

    Raises:
        ConfigError: not installed.
        CheckpointError: the model, its pooling or its head is one that the engine does not have.
    """
    check_limits(engines, source)
    for name in engines:
        if name in ENGINES:
            ENGINES[name]().engine.check_installed()


def engine_names(text: str) -> list[EngineName]:
    """The engines of a list with commas, in the order of the tables.

    Raises:
        UserError: a name that is none, or is there twice.
    """
    known: list[EngineName] = [*ENGINES, *RULES]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--verify-with: {name!r} is none of {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"--verify-with {text}: names {name} twice; keep one of them")
    return [name for name in known if name in names]
