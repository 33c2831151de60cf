"""From a checkpoint's adapters to PEFT's files, loaded with PEFT and compared before the directory gets its name."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, open_checkpoint
from megatron_embed.convert.peft import write_peft
from megatron_embed.errors import CheckpointError
from megatron_embed.export.verify_peft import PeftComparison, compare_with_peft
from megatron_embed.models.families import model_shape


def export_adapters(source: str, destination: str, *, compare: bool, too_large: Callable[[Path], str],
                    note: Callable[[Path], None]) -> str:
    """Writes the adapters of a checkpoint; the report.

    One process, in float32.

    Args:
        compare: load the result with PEFT on its base model.
        too_large: called with the base model's directory; why there is no memory for that, empty if there is.
        note: called with the complete directory before it is compared.
    Raises:
        CheckpointError: no adapters, or PEFT makes another model of them; nothing is left behind.
    """
    checkpoint = open_checkpoint(source)
    lines: list[str] = []

    def finish(directory: Path) -> None:
        note(directory)
        lines.append(_comparison(source, checkpoint, directory, too_large) if compare else
                     "not loaded with PEFT and compared on texts (--no-compare)")

    report = write_peft(source, destination, finish=finish)
    return "\n".join([*lines, str(report)])


def _comparison(source: str, checkpoint: CheckpointDirectory, directory: Path, too_large: Callable[[Path], str]) -> str:
    """The line of the report about the comparison, or about why there is none."""
    from megatron_embed.data.tokenizer import has_tokenizer_files
    from megatron_embed.loading.model_directory import local_directory

    left_out = "not loaded with PEFT and compared on texts: "
    if find_spec("peft") is None:
        return left_out + "PEFT is not installed (pip install peft)"
    if not has_tokenizer_files(directory):
        return left_out + "there are no tokenizer files"
    adapters = checkpoint.info.adapters
    assert adapters is not None
    try:
        base = local_directory(adapters.base_model)
    except CheckpointError as error:
        return f"{left_out}its base model {adapters.base_model} is not here ({error})"
    if reason := too_large(base):
        return reason
    if checkpoint.info.head is not None:
        return str(_compare_scores(source, checkpoint, directory, base))
    return str(_compare_vectors(source, checkpoint, directory, base))


def _compare_vectors(source: str, checkpoint: CheckpointDirectory, directory: Path, base: Path) -> PeftComparison:
    """Mean token vectors of the checkpoint and of PEFT's model."""
    from megatron_embed.export.embedding import PROBES, stock_runs_causally
    from megatron_embed.loading.model_directory import open_encoder

    encoder, model, _ = open_encoder(
        argparse.Namespace(model=source, dtype="float32", pooling="mean", max_length=None, no_normalize=True,
                           overrides=[]), prompts=False)
    probes = [text for texts in PROBES.values() for text in texts]
    rows = encoder.tokenizer.tokenize(probes, "document").token_ids
    texts = [text for text, ids in zip(probes, rows, strict=True) if ids]
    vectors = encoder.encode(texts, "document")
    del encoder  # its memory goes before the stock library takes as much
    return compare_with_peft(directory, base, [ids for ids in rows if ids], vectors, dtype=checkpoint.info.dtype,
                             bidirectional=stock_runs_causally(model_shape(model.hf)))


def _compare_scores(source: str, checkpoint: CheckpointDirectory, directory: Path, base: Path) -> PeftComparison:
    """Scores of the checkpoint's reranker and of PEFT's model."""
    from megatron_embed.data.pair_tokenizer import Pair
    from megatron_embed.export.reranker import PROBE_PAIRS, comparable
    from megatron_embed.loading.reranker import head_spec, open_scorer, saved_settings

    scorer, model, _ = open_scorer(source, dtype="float32")
    spec = head_spec(saved_settings(model), scorer.tokenizer)
    pairs = comparable([Pair(query=query, document=document) for query, document in PROBE_PAIRS], scorer.tokenizer)
    rows = scorer.tokenizer.tokenize(pairs)
    return compare_with_peft(
        directory, base, rows.token_ids, scorer.raw_scores(pairs), dtype=checkpoint.info.dtype, head=spec.kind,
        answers=spec.token_ids if spec.kind == "yes_no" else None, token_types=rows.token_types)
