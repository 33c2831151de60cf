"""`convert megatron-to-hf`, a function for each format: written, loaded by the stock library and compared.

A conversion needs neither Megatron-Core nor Transformers, whose imports take longer than a small model does. What
compares imports them.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, open_checkpoint
from megatron_embed.convert.convert import megatron_to_hf
from megatron_embed.errors import CheckpointError, ConfigError, UserError
from megatron_embed.export.model_card import write_converted_card
from megatron_embed.export.sentence_transformers import cut_on_the_right, export_sentence_transformers
from megatron_embed.export.verify import ExpectedSettings, available_memory, compare_with_transformers, weight_bytes
from megatron_embed.models.families import model_shape
from megatron_embed.models.saved_settings import default_pooling, read_saved_settings
from megatron_embed.names import ExportFormat, ModelDtype

_WORKING_COPIES = 2.5
"""Memory, in sizes of the export, that comparing takes: our model while it is loaded, then the library's."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How `convert megatron-to-hf` writes, whatever the format."""

    max_shard_size: str = "5GB"
    """Of one weight file."""
    dtype: ModelDtype | None = None
    """Of the written weights; null: the checkpoint's."""
    compare: bool = True
    """Load the result with the stock library and compare it with the checkpoint on texts."""
    merge_lora: bool = False
    """Write the checkpoint's adapters into the weights; the vectors compared are those of the model with adapters."""


def export_hf(source: str, destination: str, options: ExportOptions) -> str:
    """Hugging Face directory of a checkpoint, the architecture that it came with, loaded and compared; the report.

    One process, in the checkpoint's dtype. A reranker is compared by its scores.

    Raises:
        CheckpointError: not a checkpoint, or Transformers makes another model of the export; nothing is left behind.
    """
    head = open_checkpoint(source).info.head
    if head is not None:
        return _export_reranker(source, destination, options, classification=head == "score")
    lines: list[str] = []

    def finish(directory: Path) -> None:
        write_converted_card(directory, source=source, destination=destination, kind="hf")
        lines.append(why_not_compared(directory, options) or _compare_hf(source, directory))

    report = megatron_to_hf(source, destination, max_shard_size=options.max_shard_size, dtype=options.dtype,
                            merge_lora=options.merge_lora, finish=finish)
    return "\n".join([*lines, str(report)])


def export_cross_encoder_model(source: str, destination: str, options: ExportOptions) -> str:
    """*ForSequenceClassification of a reranker's checkpoint, as CrossEncoder reads it; the report."""
    return _export_reranker(source, destination, options, classification=True)


def _export_reranker(source: str, destination: str, options: ExportOptions, *, classification: bool) -> str:
    from megatron_embed.export.reranker import export_reranker_checkpoint

    return export_reranker_checkpoint(
        source, destination, classification=classification, max_shard_size=options.max_shard_size, dtype=options.dtype,
        merge_lora=options.merge_lora, left_out=lambda directory: why_not_compared(directory, options),
        note=functools.partial(write_converted_card, source=source, destination=destination, kind="cross-encoder"))


def export_peft(source: str, destination: str, options: ExportOptions) -> str:
    """The LoRA adapters of a checkpoint in PEFT's files, in the checkpoint's dtype; the report."""
    given = {"--merge-lora": options.merge_lora, "--dtype": options.dtype is not None,
             "--max-shard-size": options.max_shard_size != ExportOptions.max_shard_size}
    for name in (name for name, is_given in given.items() if is_given):
        raise ConfigError(f"{name}: --format peft writes the adapters apart from the weights; leave one out")
    from megatron_embed.export.peft import export_adapters

    return export_adapters(source, destination, compare=options.compare, too_large=_why_no_memory,
                           note=functools.partial(write_converted_card, source=source, destination=destination,
                                                  kind="peft"))


def why_not_compared(directory: Path, options: ExportOptions) -> str:
    """The line of the report that says why an export is not loaded; empty if it is."""
    if not options.compare:
        return "not loaded with the stock library and compared on texts (--no-compare)"
    from megatron_embed.data.vocabulary import has_tokenizer_files

    if not has_tokenizer_files(directory):
        return "not compared on texts: there are no tokenizer files"
    return _why_no_memory(directory)


def _why_no_memory(directory: Path) -> str:
    """The line of the report that says that a model cannot be loaded twice; empty if it can."""
    needed, available = _WORKING_COPIES * weight_bytes(directory), available_memory()
    if needed > available:
        return (f"not loaded with the stock library and compared on texts: that takes {needed / 1e9:.1f} GB of memory, "
                f"{available / 1e9:.1f} GB are available")
    return ""


def _compare_hf(source: str, directory: Path) -> str:
    """Mean token vectors of the checkpoint and of the export in Transformers; the line of the report."""
    from megatron_embed.export.embedding import stock_runs_causally
    from megatron_embed.loading.model_directory import open_encoder

    arguments = argparse.Namespace(model=source, dtype=None, pooling="mean", max_length=None, no_normalize=True,
                                   overrides=[])
    try:
        encoder, model, _ = open_encoder(arguments, prompts=False, given_prompts={"document": ""})
    except UserError as error:
        # Such as Sentence Transformers modules that we do not compute: they pass through a conversion all the same.
        return f"not compared on texts: {error}"
    rows = encoder.tokenizer.tokenize(_probes(), "document").token_ids
    texts = [text for text, ids in zip(_probes(), rows, strict=True) if ids]
    if not texts:
        return "not compared on texts: the tokenizer makes no token of the probes"
    vectors = encoder.encode(texts, "document")
    del encoder  # its memory goes before the stock library takes as much
    return str(compare_with_transformers(
        directory, [ids for ids in rows if ids], texts, vectors, minimum_cosine=_bound(model.saved.dtype, directory),
        bidirectional=stock_runs_causally(model.shape)))


def _probes() -> list[str]:
    from megatron_embed.export.embedding import PROBES

    return [text for texts in PROBES.values() for text in texts]


def _bound(dtype: str | None, directory: Path) -> float:
    """Cosine that the coarser of the two dtypes, the checkpoint's and the export's, must reach."""
    from megatron_embed.export.embedding import MINIMUM_COSINE

    dtypes = (dtype, read_saved_settings(directory).dtype)
    return min(MINIMUM_COSINE[dtype if dtype in MINIMUM_COSINE else "float32"] for dtype in dtypes)


def export_sentence_transformers_model(source: str, destination: str, options: ExportOptions) -> str:
    """Sentence Transformers directory of a checkpoint, compared with the checkpoint's own vectors; the report.

    One process, in the checkpoint's dtype; pooling, prompts and length are those that the checkpoint carries.

    Raises:
        CheckpointError: not a checkpoint, or the export differs from it; nothing is left behind.
    """
    from megatron_embed.export.embedding import stock_runs_causally

    checkpoint = open_checkpoint(source)
    if stock_runs_causally(model_shape(checkpoint.hf)):
        raise CheckpointError(f"{source}: its tokens attend to the whole text (model.bidirectional), and Sentence "
                              "Transformers runs such models causally, with other vectors, on transformers before 5.2: "
                              "upgrade it, use --format hf, or "
                              "`megatron-embed encode` on the checkpoint")
    lines: list[str] = []

    def finish(directory: Path) -> None:
        saved, shape = read_saved_settings(checkpoint.hf), model_shape(checkpoint.hf)
        # One length for both roles, as Sentence Transformers knows it, so that it cuts no text elsewhere than we do.
        longest = max(checkpoint.info.max_lengths.values(), default=saved.max_length or shape.longest_text)
        longest = min(longest, shape.longest_text)
        pooling = saved.pooling or default_pooling(shape)
        export_sentence_transformers(
            directory, pooling=pooling, normalize=saved.normalize is not False, saved=saved,
            query_prompt=saved.prompts.get("query", ""), document_prompt=saved.prompts.get("document", ""),
            max_seq_length=longest, embedding_dimension=shape.hidden_size,
            needs_eos=pooling == "lasttoken" and saved.adds_eos and saved.chat is None)
        _keep_training_cut(checkpoint, directory)
        write_converted_card(directory, source=source, destination=destination, kind="sentence-transformers")
        expected = ExpectedSettings(
            prompts={role: saved.prompts.get(role, "") for role in ("query", "document")}, max_seq_length=longest,
            similarity=saved.similarity, dtype=options.dtype or checkpoint.info.dtype)
        left_out = why_not_compared(directory, options)
        lines.extend([left_out] if left_out else _compare_sentence_transformers(source, directory, expected))

    report = megatron_to_hf(source, destination, max_shard_size=options.max_shard_size, dtype=options.dtype,
                            merge_lora=options.merge_lora, finish=finish)
    return "\n".join([*lines, str(report)])


def _keep_training_cut(checkpoint: CheckpointDirectory, directory: Path) -> None:
    """What was trained here was cut on the right, whatever an older version left in the tokenizer's files."""
    if checkpoint.info.max_lengths:
        cut_on_the_right(directory)


def _compare_sentence_transformers(source: str, directory: Path, expected: ExpectedSettings) -> list[str]:
    """Vectors of both roles of the checkpoint and of the export; the lines of the report."""
    from megatron_embed.export.embedding import export_probes
    from megatron_embed.loading.model_directory import open_encoder

    arguments = argparse.Namespace(model=source, dtype=None, pooling=None, max_length=expected.max_seq_length,
                                   no_normalize=False, overrides=[])
    encoder, model, _ = open_encoder(arguments, prompts=True)
    probes = export_probes(encoder, _probes(), expected.max_seq_length)
    del encoder
    minimum_cosine = _bound(model.saved.dtype, directory)
    return [f"{probe.role}: {probe.compare(directory, expected, minimum_cosine)}" for probe in probes]


EXPORTERS: dict[ExportFormat, Callable[[str, str, ExportOptions], str]] = {
    "hf": export_hf, "sentence-transformers": export_sentence_transformers_model,
    "cross-encoder": export_cross_encoder_model, "peft": export_peft}
"""The function of each of cli/convert.py's FORMATS: (checkpoint, destination, options) to the report."""
