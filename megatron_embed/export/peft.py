"""From a checkpoint's adapters to PEFT's files, loaded with PEFT and compared before the directory gets its name."""

import argparse
import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, open_checkpoint
from megatron_embed.convert.peft import write_peft
from megatron_embed.errors import CheckpointError
from megatron_embed.export.equal_llama import has_own_code
from megatron_embed.export.verified_write import export, why_no_memory
from megatron_embed.export.verify import Report
from megatron_embed.export.verify_peft import compare_with_peft
from megatron_embed.models.families import model_shape


def export_adapters(source: str, destination: str, *, compare: bool, note: Callable[[Path], None]) -> list[str]:
    """Writes the adapters of a checkpoint; the lines of the report.

    One process, in float32.

    Args:
        compare: load the result with PEFT on its base model.
        note: see `export.write.export`.
    Raises:
        CheckpointError: no adapters, or PEFT makes another model of them; nothing is left behind.
    """
    checkpoint = open_checkpoint(source)

    def verify(directory: Path) -> list[str]:
        return [_compare(source, checkpoint, directory) if compare else
                "not loaded with PEFT and compared on texts (--no-compare)"]

    return export(functools.partial(write_peft, source, destination), verify=verify, note=note)


def _compare(source: str, checkpoint: CheckpointDirectory, directory: Path) -> str:
    """The line of the report about the comparison, or about why there is none."""
    from megatron_embed.data.vocabulary import has_tokenizer_files
    from megatron_embed.loading.hub import local_directory

    not_compared = "not loaded with PEFT and compared on texts: "
    if find_spec("peft") is None:
        return not_compared + "PEFT is not installed (pip install peft)"
    if not has_tokenizer_files(directory):
        return not_compared + "there are no tokenizer files"
    adapters = checkpoint.info.adapters
    assert adapters is not None
    try:
        base = local_directory(adapters.base_model)
    except CheckpointError as error:
        return f"{not_compared}its base model {adapters.base_model} is not here ({error})"
    if has_own_code(base):
        return f"{not_compared}Transformers has no class for {base}, and its own code is not run"
    if reason := why_no_memory(base):
        return reason
    compare = _compare_vectors if checkpoint.info.head is None else _compare_scores
    return str(compare(source, checkpoint, directory, base))


def _compare_vectors(source: str, checkpoint: CheckpointDirectory, directory: Path, base: Path) -> Report:
    """Compares mean token vectors of the checkpoint and of PEFT's model."""
    from megatron_embed.export.embedding import PROBE_TEXTS, stock_runs_causally
    from megatron_embed.loading.model_directory import open_encoder

    encoder, model, _ = open_encoder(
        argparse.Namespace(model=source, dtype="float32", pooling="mean", max_length=None, no_normalize=True,
                           overrides=[]), prompts=False, with_dense=False, own_libraries=False)
    rows = encoder.tokenizer.tokenize(PROBE_TEXTS, "document").token_ids
    texts = [text for text, ids in zip(PROBE_TEXTS, rows, strict=True) if ids]
    vectors = encoder.encode(texts, "document")
    del encoder  # its memory goes before the stock library takes as much
    return compare_with_peft(directory, base, [ids for ids in rows if ids], vectors, dtype=checkpoint.info.dtype,
                             bidirectional=stock_runs_causally(model_shape(model.hf)),
                             quantized=checkpoint.info.quantized_base)


def _compare_scores(source: str, checkpoint: CheckpointDirectory, directory: Path, base: Path) -> Report:
    """Compares scores of the checkpoint's reranker and of PEFT's model."""
    from megatron_embed.export.reranker import PROBES, comparable
    from megatron_embed.loading.reranker import head_spec, open_scorer, saved_settings

    scorer, model, _ = open_scorer(source, dtype="float32", own_libraries=False)
    spec = head_spec(saved_settings(model), scorer.tokenizer)
    pairs = comparable(PROBES, scorer.tokenizer)
    rows = scorer.tokenizer.tokenize(pairs)
    return compare_with_peft(
        directory, base, rows.token_ids, scorer.raw_scores(pairs), dtype=checkpoint.info.dtype, head=spec.kind,
        answers=spec.token_ids if spec.kind == "yes_no" else None, token_types=rows.token_types,
        quantized=checkpoint.info.quantized_base)
