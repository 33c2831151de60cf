"""`convert megatron-to-hf`, a function for each format: written, loaded by the stock library and compared.

A conversion needs neither Megatron-Core nor Transformers, whose imports take longer than a small model does. What
compares imports them.
"""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, is_checkpoint, open_checkpoint
from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.errors import CheckpointError, ConfigError, UserError
from megatron_embed.export.calibration import calibration_rows
from megatron_embed.export.model_card import write_converted_card
from megatron_embed.export.sentence_transformers import export_sentence_transformers, set_right_truncation
from megatron_embed.export.verified_write import ExportOptions, export, why_not_compared
from megatron_embed.export.verify import ExpectedSettings, compare_with_transformers
from megatron_embed.models.families import model_shape
from megatron_embed.models.joint_files import find_joint_heads
from megatron_embed.models.saved_settings import default_pooling, read_saved_settings
from megatron_embed.names import ROLES, ExportFormat

if TYPE_CHECKING:
    from megatron_embed.export.engines.files import EngineFiles


def export_hf(source: str, destination: str, options: ExportOptions) -> list[str]:
    """Hugging Face directory of a checkpoint, the architecture that it came with, loaded and compared.

    One process, in the checkpoint's dtype. A reranker is compared by its scores.

    Raises:
        CheckpointError: not a checkpoint, or Transformers makes another model of the export; nothing is left behind.
    """
    head = open_checkpoint(source).info.head
    if head is not None:
        return _export_reranker(source, destination, options, classification=head == "score")
    return export(functools.partial(megatron_to_hf, source, destination, **options.weights),
                  verify=_unless_left_out(options, functools.partial(_compare_hf, source)),
                  note=_card(source, destination, "hf"))


def export_cross_encoder_model(source: str, destination: str, options: ExportOptions) -> list[str]:
    """*ForSequenceClassification of a reranker's checkpoint, as CrossEncoder reads it."""
    return _export_reranker(source, destination, options, classification=True)


def _export_reranker(source: str, destination: str, options: ExportOptions, *, classification: bool,
                     addition: "EngineFiles | None" = None) -> list[str]:
    from megatron_embed.export.reranker import export_reranker_checkpoint

    def note(directory: Path) -> None:
        if addition is not None:
            addition.tidy(directory)
        write_converted_card(directory, source=source, destination=destination, kind="cross-encoder")

    return export_reranker_checkpoint(source, destination, options, classification=classification, addition=addition,
                                      note=note)


def export_for_engine(kind: ExportFormat, source: str, destination: str, options: ExportOptions) -> list[str]:
    """The directory of an embedding model or a reranker with the files of another engine, whose results are compared.

    Args:
        source: one of our checkpoints, or a Hugging Face directory, of which a checkpoint is made meanwhile.
    Raises:
        ConfigError: a package is missing.
        CheckpointError: not a model, the engine has no such model, or it gives other results; nothing is left behind.
    """
    from megatron_embed.export.engines.files import ENGINE_FILES
    from megatron_embed.export.engines.int8 import int8_files
    from megatron_embed.export.engines.limits import check_limits
    from megatron_embed.loading.model_directory import find_model
    from megatron_embed.loading.reranker import is_reranker, saved_settings

    addition = (ENGINE_FILES[kind](options) if options.quantize is None else
                int8_files(kind, options, calibration_rows(source, options.calibration)))
    check_limits([addition.limits], source)
    with _as_checkpoint(source, destination) as checkpoint:
        model = find_model(checkpoint, "SRC")
        model.require_one_vector("SRC", f"--format {kind} holds")
        if not is_reranker(model):
            return export_sentence_transformers_model(checkpoint, destination, options, addition)
        # llama.cpp takes the two answers from the language-model head itself.
        classification = kind != "gguf" or saved_settings(model, "SRC").head == "score"
        return _export_reranker(checkpoint, destination, options, classification=classification, addition=addition)


def check_quantization(kind: ExportFormat, options: ExportOptions) -> None:
    """Raises ConfigError for settings of quantized graphs that have no effect, or would leave one unverified."""
    if options.calibration is not None and options.quantize is None:
        raise ConfigError("--calibration: nothing is quantized; add --quantize int8, or remove it")
    if options.quantize is None:
        return
    if kind not in ("onnx", "openvino"):
        other = "; use --gguf-type q8_0" if kind == "gguf" else ", which has a graph: --format onnx or openvino"
        raise ConfigError(f"--quantize: not of --format {kind}{other}")
    if not options.compare:
        raise ConfigError("--quantize: the result is only kept if its vectors or scores are close to the model's; "
                          "remove --no-compare")


@contextmanager
def _as_checkpoint(source: str, destination: str) -> Iterator[str]:
    """The checkpoint `source`, or one beside the destination for as long as the block takes."""
    if is_checkpoint(Path(source)):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=Path(destination).absolute().parent) as folder:
        hf_to_megatron(source, Path(folder) / "checkpoint")
        yield str(Path(folder) / "checkpoint")


def export_peft(source: str, destination: str, options: ExportOptions) -> list[str]:
    """The LoRA adapters of a checkpoint in PEFT's files, in the checkpoint's dtype."""
    given = {"--merge-lora": options.merge_lora, "--dtype": options.dtype is not None,
             "--max-shard-size": options.max_shard_size != ExportOptions.max_shard_size}
    for name in (name for name, is_given in given.items() if is_given):
        raise ConfigError(f"{name}: --format peft writes the adapters apart from the weights; leave one out")
    from megatron_embed.export.peft import export_adapters

    return export_adapters(source, destination, compare=options.compare, note=_card(source, destination, "peft"))


def export_sentence_transformers_model(source: str, destination: str, options: ExportOptions,
                                       addition: "EngineFiles | None" = None) -> list[str]:
    """Sentence Transformers directory of a checkpoint, compared with the checkpoint's own vectors.

    One process, in the checkpoint's dtype; pooling, prompts and length are those that the checkpoint carries.

    Args:
        addition: files of another engine, whose vectors are compared as well.
    Raises:
        CheckpointError: not a checkpoint, or the export differs from it; nothing is left behind.
    """
    from megatron_embed.export.embedding import stock_runs_causally

    checkpoint = open_checkpoint(source)
    shape = model_shape(checkpoint.hf)
    if stock_runs_causally(shape):
        raise CheckpointError(f"{source}: its tokens attend to the whole text (model.bidirectional), and Sentence "
                              "Transformers runs such models causally, with other vectors, on transformers before 5.2: "
                              "upgrade it, use --format hf, or "
                              "`megatron-embed encode` on the checkpoint")
    saved = read_saved_settings(checkpoint.hf)
    # One length for both roles, as Sentence Transformers knows it, so that it cuts no text elsewhere than we do.
    longest = max(checkpoint.info.max_lengths.values(), default=saved.max_length or shape.longest_text)
    expected = ExpectedSettings(
        prompts={role: saved.prompts.get(role, "") for role in ("query", "document")},
        max_seq_length=min(longest, shape.longest_text),
        similarity=saved.similarity if saved.vectors is None else "maxsim",
        dtype=options.dtype or checkpoint.info.dtype)

    def complete(directory: Path) -> None:
        _add_sentence_transformers(checkpoint, expected, directory)
        if addition is not None:
            addition.write(directory)

    def note(directory: Path) -> None:
        if addition is not None:
            addition.tidy(directory)
        write_converted_card(directory, source=source, destination=destination, kind="sentence-transformers")

    return export(functools.partial(megatron_to_hf, source, destination, **options.weights), complete=complete,
                  verify=_unless_left_out(options, functools.partial(_compare_sentence_transformers, source, expected,
                                                                     addition)), note=note)


def export_pylate_model(source: str, destination: str, options: ExportOptions) -> list[str]:
    """PyLate's directory of a multi-vector checkpoint, compared in Sentence Transformers, which reads it too.

    Raises:
        CheckpointError: not a checkpoint, not such a model, or the export differs from it; nothing is left behind.
    """
    from megatron_embed.export.pylate import check_pylate, write_pylate

    checkpoint = open_checkpoint(source)
    saved, shape = read_saved_settings(checkpoint.hf), model_shape(checkpoint.hf)
    check_pylate(source, saved)
    prompts = {role: saved.prompts.get(role, "") for role in ROLES}
    lengths = {role: min(length, shape.longest_text) for role, length in (
        checkpoint.info.max_lengths or saved.role_lengths).items()}
    expected = ExpectedSettings(
        prompts=prompts, similarity="maxsim", dtype=options.dtype or checkpoint.info.dtype,
        max_seq_length=min(max(lengths.values(), default=saved.max_length or shape.longest_text), shape.longest_text))
    said: dict[str, str] = {}

    def complete(directory: Path) -> None:
        _add_sentence_transformers(checkpoint, expected, directory)
        said.update(write_pylate(directory, saved, prompts, lengths))

    def compare(directory: Path) -> list[str]:
        return _compare_sentence_transformers(source, dataclasses.replace(expected, prompts=said), None, directory)

    return export(functools.partial(megatron_to_hf, source, destination, **options.weights), complete=complete,
                  verify=_unless_left_out(options, compare), note=_card(source, destination, "pylate"))


def _unless_left_out(options: ExportOptions,
                     compare: Callable[[Path], Sequence[str]]) -> Callable[[Path], Sequence[str]]:
    """The comparison, or the line that says why there is none."""
    def verify(directory: Path) -> Sequence[str]:
        reason = why_not_compared(directory, options)
        return [reason] if reason else compare(directory)

    return verify


def _card(source: str, destination: str, kind: ExportFormat) -> Callable[[Path], None]:
    return functools.partial(write_converted_card, source=source, destination=destination, kind=kind)


def _compare_hf(source: str, directory: Path) -> list[str]:
    """Compares mean token vectors of the checkpoint and of the export in Transformers."""
    from megatron_embed.export.embedding import PROBE_TEXTS, stock_runs_causally
    from megatron_embed.loading.model_directory import open_encoder

    arguments = argparse.Namespace(model=source, dtype=None, pooling="mean", max_length=None, no_normalize=True,
                                   overrides=[])
    try:
        encoder, model, _ = open_encoder(arguments, prompts=False, with_dense=False, given_prompts={"document": ""},
                                         own_libraries=False)
    except UserError as error:
        # Such as Sentence Transformers modules that we do not compute: they pass through a conversion all the same.
        return [f"not compared on texts: {error}"]
    rows = encoder.tokenizer.tokenize(PROBE_TEXTS, "document").token_ids
    texts = [text for text, ids in zip(PROBE_TEXTS, rows, strict=True) if ids]
    if not texts:
        return ["not compared on texts: the tokenizer makes no token of the probes"]
    vectors = encoder.encode(texts, "document")
    del encoder  # its memory goes before the stock library takes as much
    return [str(compare_with_transformers(
        directory, [ids for ids in rows if ids], texts, vectors,
        minimum_cosine=_minimum_cosine(model.saved.dtype, directory), bidirectional=stock_runs_causally(model.shape)))]


def _minimum_cosine(dtype: str | None, directory: Path) -> float:
    """Cosine that the coarser of the two dtypes, the checkpoint's and the export's, must reach."""
    from megatron_embed.export.embedding import MINIMUM_COSINE

    dtypes = (dtype, read_saved_settings(directory).dtype)
    return min(MINIMUM_COSINE[dtype if dtype in MINIMUM_COSINE else "float32"] for dtype in dtypes)


def _add_sentence_transformers(checkpoint: CheckpointDirectory, expected: ExpectedSettings, directory: Path) -> None:
    """Adds Sentence Transformers' files, as the checkpoint pools, prompts and cuts."""
    saved, shape = read_saved_settings(checkpoint.hf), model_shape(checkpoint.hf)
    pooling = saved.pooling or default_pooling(shape)
    export_sentence_transformers(
        directory, pooling=pooling, normalize=saved.normalize is not False, saved=saved,
        query_prompt=expected.prompts["query"], document_prompt=expected.prompts["document"],
        max_seq_length=expected.max_seq_length, embedding_dimension=shape.hidden_size,
        needs_eos=pooling == "lasttoken" and saved.adds_eos and saved.chat is None)
    if checkpoint.info.max_lengths:
        # What was trained here was cut on the right, whatever an older version left in the tokenizer's files.
        set_right_truncation(directory)


def _compare_sentence_transformers(source: str, expected: ExpectedSettings, addition: "EngineFiles | None",
                                   directory: Path) -> list[str]:
    """Compares vectors of both roles of the checkpoint and of the export."""
    from megatron_embed.export.embedding import PROBE_TEXTS, export_probes
    from megatron_embed.loading.model_directory import open_encoder

    hf = open_checkpoint(source).hf
    several = read_saved_settings(hf).vectors is not None  # they have a length for each role
    arguments = argparse.Namespace(model=source, dtype=None, pooling=None, no_normalize=False, overrides=[],
                                   max_length=None if several else expected.max_seq_length)
    encoder, model, _ = open_encoder(arguments, prompts=True, own_libraries=False,
                                     multi_vector=True if find_joint_heads(hf) is None else "joint")
    probes = export_probes(encoder, PROBE_TEXTS, expected.max_seq_length)
    del encoder  # its memory goes before the stock library takes as much
    minimum_cosine = _minimum_cosine(model.saved.dtype, directory)
    lines = [f"{probe.role}: {probe.compare(directory, expected, minimum_cosine)}" for probe in probes]
    return lines + ([] if addition is None else [
        f"{probe.role}: {addition.compare_vectors(directory, probe.texts, probe.one_each, probe.role, minimum_cosine)}"
        for probe in probes])


EXPORTERS: dict[ExportFormat, Callable[[str, str, ExportOptions], list[str]]] = {
    "hf": export_hf, "sentence-transformers": export_sentence_transformers_model, "pylate": export_pylate_model,
    "cross-encoder": export_cross_encoder_model, "peft": export_peft,
    **{kind: functools.partial(export_for_engine, kind) for kind in ("onnx", "openvino", "gguf")}}
"""By cli/convert.py's FORMATS: (checkpoint, destination, options) to the lines of the report."""
