"""From a reranker's checkpoint to a cross-encoder, compared with the model before the directory gets its name."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_embed.convert.convert import megatron_to_hf
from megatron_embed.convert.to_hf import RerankerFormat
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.evaluation.score import PairScorer
from megatron_embed.export.cross_encoder import export_cross_encoder
from megatron_embed.export.embedding import LONGEST_COMPUTED, length_probes
from megatron_embed.export.verify_reranker import ScoreReport, compare_with_cross_encoder
from megatron_embed.loading.model_directory import ModelDirectory, find_model
from megatron_embed.loading.reranker import head_spec, open_pair_tokenizer, open_scorer, saved_settings
from megatron_embed.models.heads import HeadSpec, is_encoder
from megatron_embed.models.reranker_settings import RerankerSettings, write_reranker_settings
from megatron_embed.parallel.collectives import raise_on_all_ranks

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}
"""Of a score in the stock libraries, which compute in float32, against ours, relative to max(1, |score|)."""
RESTORES_PROMPTS = (6, 2)
"""The version of Sentence Transformers from which a prompt that is cut keeps what follows the document."""
PROBE_PAIRS = (
    ("What is the capital of France?", "Paris is the capital and largest city of France."),
    ("What is the capital of France?", "Gradient checkpointing trades computation for memory."),
    ("how to average a list in python", "def mean(values):\n    return sum(values) / len(values)"),
    ("深度学习是什么？", "深度学习是机器学习的一个分支，用多层神经网络学习数据的表示。"),
    ("深度学习是什么？", "向量检索把文本变成向量，再按相似度排序。"),
    ("Which planet has rings?", "Saturn \U0001fa90 has the best known rings; those of \"{Jupiter}\" are faint."))
"""Pairs of several scripts on which an exported checkpoint is compared."""


def reranker_export(model: ModelDirectory, classification: bool) -> tuple[RerankerSettings, PairTokenizer, HeadSpec]:
    """How a checkpoint's reranker is asked once it is exported. Raises UserError for what no such export can be."""
    settings = saved_settings(model)
    tokenizer = open_pair_tokenizer(settings, model)
    if settings.head == "score" and not classification:
        raise CheckpointError(f"{model.path}: a score head has no place in a causal language model; use --format "
                              "cross-encoder")
    return settings, tokenizer, head_spec(settings, tokenizer)


def write_reranker(source: str, destination: str, model: ModelDirectory, *, classification: bool,
                   compare: Callable[[Path, RerankerFormat], None], max_shard_size: str = "5GB",
                   dtype: str | None = None, merge_lora: bool = False) -> str:
    """Writes a checkpoint's reranker with all files of a cross-encoder; the report.

    Args:
        compare: called with the complete directory before it gets its name; if it raises, nothing is left behind.
        dtype: of the written weights; null: the checkpoint's.
        merge_lora: write the checkpoint's adapters into the weights.
    """
    settings, tokenizer, spec = reranker_export(model, classification)
    token_ids = spec.token_ids if spec.kind == "yes_no" else None
    form = RerankerFormat(kind=spec.kind, classification=classification, token_ids=token_ids)

    def finish(directory: Path) -> None:
        export_cross_encoder(
            directory, family=model.shape.family, classification=classification,
            pieces=None if tokenizer.template is None else tokenizer.template.pieces(),
            instruction=settings.instruction, token_ids=token_ids, activation=settings.activation,
            max_length=settings.max_length, prompts=settings.prompts,
            default_prompt=settings.default_prompt if settings.template is None else None,
            encoder=is_encoder(model.shape), lower_case=settings.lower_case)
        write_reranker_settings(directory, dataclasses.replace(settings, head="score") if classification else settings)
        compare(directory, form)

    return str(megatron_to_hf(source, destination, max_shard_size=max_shard_size, dtype=dtype, finish=finish,
                              reranker=form, merge_lora=merge_lora))


def export_reranker_checkpoint(source: str, destination: str, *, classification: bool, max_shard_size: str = "5GB",
                               dtype: str | None = None, merge_lora: bool = False,
                               left_out: Callable[[Path], str] = lambda directory: "",
                               note: Callable[[Path], None] = lambda directory: None) -> str:
    """A checkpoint's reranker as *ForSequenceClassification or *ForCausalLM, compared in float32; the report.

    One process.

    Args:
        dtype: of the written weights; null: the checkpoint's.
        merge_lora: write the checkpoint's adapters into the weights; the scores compared are those of the model with
            adapters.
        left_out: called with the complete directory; why it is not compared, empty if it is.
        note: called with the complete directory before it is compared.
    Raises:
        CheckpointError: no reranker's checkpoint, or a library scores pairs otherwise; nothing is left behind.
    """
    model = find_model(source, "SRC")
    lines: list[str] = []

    def compare(directory: Path, form: RerankerFormat) -> None:
        note(directory)
        if reason := left_out(directory):
            lines.append(reason)
            return
        scorer, _, _ = open_scorer(source, dtype="float32")
        pairs = comparable([Pair(query=query, document=document) for query, document in PROBE_PAIRS], scorer.tokenizer)
        pairs += border_pairs(scorer.tokenizer)
        lines.append(str(compare_pairs(directory, pairs, scorer.raw_scores(pairs), scorer.tokenizer, form,
                                       "bfloat16" if dtype == "bfloat16" else "float32")))

    report = write_reranker(source, destination, model, classification=classification, compare=compare,
                            max_shard_size=max_shard_size, dtype=dtype, merge_lora=merge_lora)
    return "\n".join([*lines, report])


def export_reranker(checkpoint: str, destination: str, scorer: PairScorer, pairs: Sequence[Pair], dtype: str,
                    note: Callable[[Path], None]) -> None:
    """Writes `destination`, a cross-encoder, from a checkpoint, of a run from the newest, if the stock libraries give
    the scores of the model in memory.

    Called by all ranks; every rank raises what rank 0 met. `note` is called on rank 0, with the directory, when nothing
    is left to do but to give the export its name.

    Raises:
        CheckpointError: the export differs from the model, or cannot be written; nothing is left behind.
    """
    pairs = [*pairs, *border_pairs(scorer.tokenizer)]
    scores = scorer.raw_scores(pairs)

    def compare(directory: Path, form: RerankerFormat) -> None:
        logger.info("%s", compare_pairs(directory, pairs, scores, scorer.tokenizer, form, dtype))
        note(directory)

    error: UserError | None = None
    if dist.get_rank() == 0:
        try:
            model = find_model(checkpoint)
            logger.info("exported %s", write_reranker(checkpoint, destination, model, classification=True,
                                                      compare=compare, merge_lora=model.adapters is not None))
        except UserError as found:
            error = found
        except OSError as found:
            error = CheckpointError(f"{destination}: the export cannot be written ({found.strerror or found}); look at "
                                    "the disk, then start the run again: it goes on from its checkpoint")
    raise_on_all_ranks(error)


def comparable(pairs: Sequence[Pair], tokenizer: PairTokenizer) -> list[Pair]:
    """The pairs that are not cut (see border_pairs for those that are), under the default instruction."""
    plain = [dataclasses.replace(pair, instruction=None) for pair in pairs]
    return [pair for pair in plain if not tokenizer.tokenize([pair]).num_truncated]


def border_pairs(tokenizer: PairTokenizer) -> list[Pair]:
    """Pairs of exactly the maximum length, of one token more and of about twice as many, those that the stock library
    cuts where we do; none where they are too long to be computed on a CPU.

    An encoder's tokenizer cuts the longer text of a pair, so the document must stay the longer one. A decoder's prompt
    loses its end, which Sentence Transformers puts back since RESTORES_PROMPTS.
    """
    query, limit = PROBE_PAIRS[0][0], tokenizer.max_length
    frame = tokenizer.count_tokens(Pair(query=query, document=""))
    if limit > LONGEST_COMPUTED or limit <= frame:
        return []
    probes = length_probes(lambda text: tokenizer.count_tokens(Pair(query=query, document=text)), limit)
    stock_cuts_alike = (limit >= 2 * frame if tokenizer.template is None else
                        tuple(map(int, version("sentence-transformers").split(".")[:2])) >= RESTORES_PROMPTS)
    return [Pair(query=query, document=text) for text in (probes.texts if stock_cuts_alike else probes.fitting)]


def compare_pairs(directory: Path, pairs: Sequence[Pair], scores: Tensor, tokenizer: PairTokenizer,
                  form: RerankerFormat, dtype: str) -> ScoreReport:
    """`compare_with_cross_encoder` on these pairs."""
    rows = tokenizer.tokenize(pairs)
    return compare_with_cross_encoder(
        directory, [(pair.query, pair.document) for pair in pairs], rows.token_ids, rows.token_types, scores,
        answers=None if form.classification else form.token_ids, tolerance=TOLERANCE[dtype])
