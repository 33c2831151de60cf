"""Semantic textual similarity: correlation of the similarity of text pairs with human scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.config.data import TrainFile
from megatron_embed.data.columns import COLUMNS_OPTION
from megatron_embed.data.empty_texts import first_empty_text
from megatron_embed.data.formats import RowReader
from megatron_embed.data.records import Record
from megatron_embed.data.row_fields import Row
from megatron_embed.data.row_source import open_rows
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.evaluation.retrieval import Embed
from megatron_embed.names import Role, Similarity

METRICS = ("pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class StsData:
    """Pairs of texts with a score each; larger means more similar."""

    path: str
    name: str
    """The file's name without its extensions."""
    texts: dict[Role, list[str]]
    """query: `text_a`; document: `text_b`."""
    scores: list[float]
    sources: list[str]
    """FILE:LINE of each row."""
    instruction: str | None = None
    """Instruction in the queries' prompt; None: the tokenizer's own."""


def load_sts(path: str, key: str = "evaluation.sts", columns: dict[str, str] | None = None) -> StsData:
    """Load the pairs with a score of a file, in any format of pairs that `data.train` takes.

    Args:
        columns: those of --columns; None: there is no such option.
    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row is invalid (the message begins `FILE:LINE: `), or all scores are the same.
    """
    texts: dict[Role, list[str]] = {"query": [], "document": []}
    scores, sources = [], []
    rows = open_rows(path, key)
    reader = RowReader(TrainFile(path=path, columns=columns or {}), "pairs", holds_texts=rows.holds_texts,
                       columns_key=None if columns is None else COLUMNS_OPTION)
    first: list[tuple[Row, str]] = []
    for row, source in rows.scan():
        if not first:
            first.append((row, source))
        record = reader.read(row, source)
        assert isinstance(record, Record) and record.score is not None
        texts["query"].append(record.query)
        texts["document"].append(record.positive[0])
        scores.append(record.score)
        sources.append(source)
    if reader.format is not None:
        reader.require_columns(reader.columns.present, lambda: first[0])
    if len(set(scores)) < 2:
        raise DataError(f"{path}:1: {len(scores)} rows with {len(set(scores))} different scores have no correlation; "
                        "add pairs with other scores")
    name = Path(path).name.split(".")[0]
    return StsData(path=path, name=name, texts=texts, scores=scores, sources=sources)


def refuse_empty_pairs(data: StsData, tokenizer: RoleTokenizer) -> None:
    """Raise EmptyTextError, beginning `FILE:LINE: `, for a text without tokens that is detectable before embedding."""
    for role, texts in data.texts.items():
        labelled = ((str(row), text) for row, text in enumerate(texts))
        if (empty := first_empty_text(labelled, role, tokenizer)) is not None:
            row, text = empty
            raise EmptyTextError(0, data.sources[int(row)], text)


def evaluate_sts(embed: Embed, data: StsData, *, similarity: Similarity = "cosine",
                 dims: Sequence[int] = ()) -> dict[str, float]:
    """Correlations `pearson` and `spearman` (average ranks for equal scores) of similarity and score.

    Names for a truncated width begin with `dim_WIDTH/`.

    Args:
        embed: texts and their role -> [texts, dim], in order. `text_a` is embedded as a query, `text_b` as a document.
        similarity: cosine L2-normalizes every embedding first.
        dims: truncated widths to measure in addition.
    Raises:
        UserError: similarities that are all the same or not finite, or a text without tokens.
    """
    first, second = _embedded(embed, data, "query"), _embedded(embed, data, "document")
    metrics: dict[str, float] = {}
    for prefix, width in (("", first.shape[1]), *((f"dim_{width}/", width) for width in dims)):
        if not 1 <= width <= first.shape[1]:
            raise ConfigError(f"--dims {width}: the model's vectors have {first.shape[1]} dimensions; choose 1 to "
                              f"{first.shape[1]}")
        metrics |= {f"{prefix}{name}": value for name, value in
                    correlations(pair_similarity(first[:, :width], second[:, :width], similarity), data).items()}
    return metrics


METRICS = ("pearson", "spearman")
"""Names of the metrics of pairs."""


def pair_similarity(first: Tensor, second: Tensor, similarity: Similarity) -> Tensor:
    """Cosine or dot product of each pair of rows, [pairs] float64."""
    first, second = first.double(), second.double()
    if similarity == "cosine":
        first, second = normalize(first, dim=-1), normalize(second, dim=-1)
    return (first * second).sum(dim=-1)


def correlations(similarities: Tensor, data: StsData) -> dict[str, float]:
    """Pearson's and Spearman's correlation of similarities and scores."""
    from scipy.stats import pearsonr, spearmanr  # here, because it takes half a second of every start

    values = similarities.tolist()
    if not all(math.isfinite(value) for value in values) or len(set(values)) < 2:
        raise UserError(f"{data.name}: the similarities of the pairs are all the same or not finite; the model has "
                        "diverged or collapsed")
    return {"pearson": float(pearsonr(values, data.scores).statistic),
            "spearman": float(spearmanr(values, data.scores).statistic)}


def _embedded(embed: Embed, data: StsData, role: Role) -> Tensor:
    """Embeddings of one side of the pairs. An error about a text names its line."""
    try:
        return embed(data.texts[role], role)
    except EmptyTextError as error:
        raise EmptyTextError(error.row, data.sources[error.row], error.text) from None
