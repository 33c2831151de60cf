"""From a reranker's checkpoint to a cross-encoder, compared with the model before the directory gets its name."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_embed.convert.convert import megatron_to_hf
from megatron_embed.convert.to_hf import RerankerFormat
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.errors import CheckpointError
from megatron_embed.evaluation.score import PairScorer
from megatron_embed.export.cross_encoder import export_cross_encoder
from megatron_embed.export.embedding import LONGEST_COMPUTED, length_probes
from megatron_embed.export.verified_write import (
    ExportOptions,
    WantedExport,
    export,
    export_on_rank_0,
    why_not_compared,
)
from megatron_embed.export.verify_reranker import compare_with_cross_encoder
from megatron_embed.loading.model_directory import ModelDirectory, find_model
from megatron_embed.loading.reranker import head_spec, open_pair_tokenizer, open_scorer, saved_settings
from megatron_embed.models.heads import is_encoder
from megatron_embed.models.reranker_settings import RerankerSettings, write_reranker_settings

if TYPE_CHECKING:
    from megatron_embed.export.engines.files import EngineFiles

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}
"""Largest difference of a score in the stock libraries, which compute in float32, relative to max(1, |score|)."""
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


PROBES = tuple(Pair(query=query, document=document) for query, document in PROBE_PAIRS)


@dataclass(frozen=True, kw_only=True)
class PairProbes:
    """Pairs with the scores of the model in memory."""

    pairs: list[Pair]
    raw: Tensor
    """[pairs] float32, before the activation."""
    final: Tensor
    """[pairs] float32, after it."""
    in_template: bool
    """Whether a pair is put into a prompt, not tokenized as a pair of texts."""
    is_cut: list[bool]
    """Whether a pair is longer than the model's length."""
    is_full: list[bool]
    """Whether a pair has as many tokens as that, or more."""

    @classmethod
    def of(cls, scorer: PairScorer, given: Sequence[Pair] = PROBES) -> "PairProbes":
        """The given pairs that fit, and pairs at the border of the maximum length, scored. Called by all ranks."""
        tokenizer = scorer.tokenizer
        pairs = [*comparable(given, tokenizer), *border_pairs(tokenizer)]
        return cls(pairs=pairs, raw=scorer.raw_scores(pairs), final=scorer.score(pairs),
                   in_template=tokenizer.template is not None,
                   is_cut=[tokenizer.tokenize([pair]).num_truncated > 0 for pair in pairs],
                   is_full=[length >= tokenizer.max_length for length in tokenizer.count_tokens(pairs)])

    def without(self, excluded: Sequence[bool]) -> "PairProbes":
        """The other pairs."""
        kept = [index for index, is_excluded in enumerate(excluded) if not is_excluded]
        return dataclasses.replace(
            self, pairs=[self.pairs[index] for index in kept], raw=self.raw[kept], final=self.final[kept],
            is_cut=[self.is_cut[index] for index in kept], is_full=[self.is_full[index] for index in kept])


@dataclass(frozen=True, kw_only=True)
class RerankerExport:
    """A checkpoint's reranker as its export has it."""

    model: ModelDirectory
    settings: RerankerSettings
    tokenizer: PairTokenizer
    form: RerankerFormat

    @classmethod
    def open(cls, model: ModelDirectory, *, classification: bool) -> "RerankerExport":
        """The export as *ForSequenceClassification, else as *ForCausalLM. Raises UserError for what cannot be one."""
        settings = saved_settings(model)
        tokenizer = open_pair_tokenizer(settings, model)
        if settings.head == "score" and not classification:
            raise CheckpointError(f"{model.path}: a score head has no place in a causal language model; use --format "
                                  "cross-encoder")
        spec = head_spec(settings, tokenizer)
        return cls(model=model, settings=settings, tokenizer=tokenizer, form=RerankerFormat(
            kind=spec.kind, classification=classification,
            token_ids=spec.token_ids if spec.kind == "yes_no" else None))

    def complete(self, directory: Path) -> None:
        """Adds the files of a cross-encoder."""
        settings, template, classification = self.settings, self.tokenizer.template, self.form.classification
        export_cross_encoder(
            directory, settings, family=self.model.shape.family, encoder=is_encoder(self.model.shape),
            classification=classification, pieces=None if template is None else template.pieces(),
            token_ids=self.form.token_ids)
        write_reranker_settings(directory, dataclasses.replace(settings, head="score") if classification else settings)

    def compare(self, directory: Path, pairs: Sequence[Pair], scores: Tensor, dtype: str) -> list[str]:
        """Compares the stock libraries' scores with [pairs] `scores`; `dtype`: the coarser one of both models."""
        rows = self.tokenizer.tokenize(pairs)
        reports = compare_with_cross_encoder(
            directory, [(pair.query, pair.document) for pair in pairs], rows.token_ids, rows.token_types, scores,
            answers=None if self.form.classification else self.form.token_ids, tolerance=TOLERANCE[dtype])
        return [str(report) for report in reports]


def export_reranker_checkpoint(source: str, destination: str, options: ExportOptions | None = None, *,
                               classification: bool, addition: "EngineFiles | None" = None,
                               note: Callable[[Path], None] = lambda directory: None) -> list[str]:
    """A checkpoint's reranker as *ForSequenceClassification or *ForCausalLM, compared in float32; the report's lines.

    One process.

    Args:
        addition: files of another engine, whose scores are compared as well.
        note: see `export.write.export`.
    Raises:
        CheckpointError: not a reranker's checkpoint, or a library scores pairs otherwise; nothing is left behind.
    """
    options = options or ExportOptions()
    reranker = RerankerExport.open(find_model(source, "SRC"), classification=classification)

    def verify(directory: Path) -> list[str]:
        if reason := why_not_compared(directory, options):
            return [reason]
        scorer, _, _ = open_scorer(source, dtype="float32", own_libraries=False)
        probes, dtype = PairProbes.of(scorer), options.dtype or "float32"
        lines = reranker.compare(directory, probes.pairs, probes.raw, dtype)
        return lines if addition is None else [*lines, addition.compare_scores(directory, probes, TOLERANCE[dtype])]

    def complete(directory: Path) -> None:
        reranker.complete(directory)
        if addition is not None:
            addition.write(directory)

    return export(functools.partial(megatron_to_hf, source, destination, reranker=reranker.form, **options.weights),
                  complete=complete, verify=verify, note=note)


def export_reranker(checkpoint: str, wanted: Sequence[WantedExport], scorer: PairScorer, pairs: Sequence[Pair],
                    dtype: str) -> None:
    """Writes each directory, a cross-encoder, from a checkpoint, of a run from the newest, if the stock libraries, and
    the engine whose files it has, give the scores of the model in memory. Called by all ranks; see `export_on_rank_0`.
    """
    probes = PairProbes.of(scorer, pairs)

    def verify(reranker: RerankerExport, addition: "EngineFiles | None", directory: Path) -> list[str]:
        lines = reranker.compare(directory, probes.pairs, probes.raw, dtype)
        return lines if addition is None else [*lines, addition.compare_scores(directory, probes, TOLERANCE[dtype])]

    def run_export(item: WantedExport) -> list[str]:
        model = find_model(checkpoint)
        reranker = RerankerExport.open(model, classification=True)

        def complete(directory: Path) -> None:
            reranker.complete(directory)
            item.complete(directory)

        write = functools.partial(megatron_to_hf, checkpoint, item.destination, reranker=reranker.form,
                                  merge_lora=model.adapters is not None)
        return export(write, complete=complete, verify=functools.partial(verify, reranker, item.addition),
                      note=item.finish)

    export_on_rank_0({item.destination: functools.partial(run_export, item) for item in wanted})


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
    frame = tokenizer.count_tokens([Pair(query=query, document="")])[0]
    if limit > LONGEST_COMPUTED or limit <= frame:
        return []
    probes = length_probes(lambda text: tokenizer.count_tokens([Pair(query=query, document=text)])[0], limit)
    stock_cuts_alike = (limit >= 2 * frame if tokenizer.template is None else
                        tuple(map(int, version("sentence-transformers").split(".")[:2])) >= RESTORES_PROMPTS)
    return [Pair(query=query, document=text) for text in (probes.texts if stock_cuts_alike else probes.fitting)]
