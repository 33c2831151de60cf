"""The `search` command: queries to the best texts of an encoded corpus."""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_embed.data.corpus import ID_KEYS, text_of_document
from megatron_embed.data.jsonl import ENDINGS, open_file, parse_object, read_lines
from megatron_embed.data.row_fields import check_keys, name_of, trusted_title
from megatron_embed.data.row_source import open_rows
from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation.ivf_index import IvfIndex, IvfSettings
from megatron_embed.evaluation.vector_files import VectorFile, load_faiss
from megatron_embed.evaluation.vector_index import (
    HnswSettings,
    flat_index,
    hnsw_index,
    recall_of,
    search_index,
    search_lists,
)
from megatron_embed.platform.terminal_text import one_line, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megatron_embed.evaluation.encode import TextEncoder

logger = logging.getLogger(__name__)

QUERIES_AT_ONCE = 512
"""Queries embedded and searched together; from a terminal, each is answered before the next is read."""
_HNSW_OPTIONS = ("links", "ef_construction", "ef_search", "no_recall")
_SAME_MODEL = 0.99
"""Cosine of a stored vector and the same text's vector now, below which they are not of one model and prompt."""


def search(args: argparse.Namespace) -> None:
    """Write the best texts of every query to stdout. One process.

    Args:
        args: the options of `search`.
    """
    _check_options(args)
    load_faiss()  # before the model is loaded
    texts = IndexedTexts(args.texts)
    from megatron_embed.loading.model_directory import find_model, open_encoder
    from megatron_embed.loading.prompts import given_prompts

    similarity = args.similarity or find_model(args.model, "--model").saved.similarity
    vectors = VectorFile(args.vectors, "--vectors", similarity=similarity, width=args.dim)
    if len(vectors) != len(texts):
        raise ConfigError(f"--vectors {args.vectors}: {len(vectors)} vectors for the {len(texts)} texts of "
                          f"{args.texts}; name the file of texts that was given to `encode`", key="--vectors")
    encoder, _, _ = open_encoder(args, prompts=True, given_prompts=given_prompts(args))
    _check_model(encoder, vectors, texts)
    settings = HnswSettings(**{name: vars(args)[name] for name in _HNSW_OPTIONS[:3] if vars(args)[name] is not None})
    lists = IvfIndex(vectors, IvfSettings(probes=args.probes)) if args.index == "ivf" else None
    index = flat_index(vectors) if args.index == "flat" else hnsw_index(vectors, settings) if lists is None else None
    if args.index == "hnsw":
        index.hnsw.efSearch = max(settings.ef_search, args.top_k)
    found, asked = 0.0, 0
    for queries in _blocks_of_queries(args):
        embedded = vectors.scaled(encoder.encode(queries, "query"))
        if lists is not None:
            scores, rows = search_lists(lists, embedded, args.top_k, texts.order, vectors)
        else:
            scores, rows = search_index(index, embedded, args.top_k, texts.order, exact=args.index == "flat")
        for query, *hits in zip(queries, scores, rows, strict=True):
            _write_hits(args.format, query, texts, *hits)
        if args.index != "flat" and not args.no_recall:
            found += recall_of(scores, embedded, vectors) * len(queries)
            asked += len(queries)
    if asked:
        logger.info("recall@%d of %s against the exact search: %.4f (%d queries)", min(args.top_k, len(texts)),
                    args.index.upper(), found / asked, asked)


def _check_options(args: argparse.Namespace) -> None:
    if not args.query and args.queries is None:
        raise ConfigError("--query: there is no query; give one, or --queries FILE, or --queries - for stdin",
                          key="--query")
    if args.queries not in (None, "-"):
        open_file(args.queries, "--queries").close()  # before the model is loaded
    allowed = {"flat": (), "ivf": ("probes", "no_recall"), "hnsw": _HNSW_OPTIONS}[args.index]
    for name in (*_HNSW_OPTIONS, "probes"):
        option, needed = f"--{name.replace('_', '-')}", "ivf" if name == "probes" else "hnsw"
        if vars(args)[name] and name not in allowed:
            raise ConfigError(f"{option}: has no effect on {'an exact search' if args.index == 'flat' else args.index}"
                              f"; add --index {needed}, or leave it out", key=option)
    if args.links == 1:
        raise ConfigError("--links 1: a graph needs at least 2 neighbours of a vector", key="--links")


class IndexedTexts:
    """The texts that were encoded, each read from its file when it is needed. Memory: 16 bytes per text, and the ids.

    Attributes:
        order: [texts] int64, position of each in the ascending order of the ids; its row, if not all have one.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError if the file cannot be opened, DataError for a row that cannot be used."""
        self._rows = open_rows(path, "--texts")
        names, count = [], 0
        for count, (row, source) in enumerate(self._rows.scan(), 1):  # noqa: B007  used after the loop
            check_keys(row, ("text",), ("text",), source)
            text_of_document(row, source)
            key = next((key for key in ID_KEYS if key in row), None)
            if key is not None:
                names.append(name_of(row[key], key, source))
        if not count:
            raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
        self.names = names if len(names) == count else None
        self.order: NDArray[np.int64] = np.arange(count)
        if self.names is not None:
            self.order[np.array(sorted(range(count), key=self.names.__getitem__))] = np.arange(count)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> str:
        return trusted_title(self._rows.row(row)[0])


def _check_model(encoder: "TextEncoder", vectors: VectorFile, texts: IndexedTexts) -> None:
    """Refuses vectors of another width than the model's, and warns of vectors that another model must have written."""
    if vectors.full_width != encoder.dim:
        raise ConfigError(f"--vectors {vectors.path}: vectors of {vectors.full_width} components, and the model's have "
                          f"{encoder.dim}; name the model that encoded them", key="--vectors")
    import torch

    stored, now = vectors.row(0), encoder.encode([texts[0]], "document")[0]
    cosine = torch.nn.functional.cosine_similarity(stored, now, dim=0).item()
    if not cosine >= _SAME_MODEL:
        logger.warning("%s: the first vector has cosine %.3f with what this model gives for the first text; was it "
                       "encoded by another model, with another prompt, or without `encode --role document`?",
                       vectors.path, cosine)


def _blocks_of_queries(args: argparse.Namespace) -> Iterator[list[str]]:
    """The queries in order, up to QUERIES_AT_ONCE at a time. Raises DataError for a row without a query."""
    at_once = 1 if args.queries == "-" and sys.stdin.isatty() else QUERIES_AT_ONCE
    block: list[str] = []
    for query in _queries(args):
        block.append(query)
        if len(block) == at_once:
            yield block
            block = []
    if block:
        yield block


def _queries(args: argparse.Namespace) -> Iterator[str]:
    yield from args.query
    if args.queries is not None:
        yield from _queries_of_file(args.queries)


def _queries_of_file(file: str) -> Iterator[str]:
    """The queries of --queries, without blank lines."""
    if file == "-":
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    if not file.endswith(ENDINGS):
        with open_file(file, "--queries") as lines:
            for number, raw in enumerate(lines, 1):
                if query := _decoded(raw, f"{file}:{number}"):
                    yield query
        return
    for line in read_lines(file, "--queries"):
        source = f"{file}:{line.line_number}"
        row = parse_object(line.raw, source)
        query = row.get("query", row.get("text"))
        if not isinstance(query, str) or not query.strip():
            raise DataError(f'{source}: no query; a row is one line such as {{"text": "..."}} or {{"query": "..."}}')
        yield query


def _decoded(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8: byte 0x{raw[error.start]:02x}; save the file as UTF-8") from None


def _write_hits(form: str, query: str, texts: IndexedTexts, scores: "NDArray[np.float32]",
                rows: "NDArray[np.int64]") -> None:
    """Write the hits of one query, and flush."""
    hits: list[dict[str, Any]] = []
    for rank, (score, row) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True), 1):
        if row >= 0:
            name = {} if texts.names is None else {"id": texts.names[row]}
            hits.append({"rank": rank, "score": score, "row": row, **name, "text": texts[row]})
    if form == "jsonl":
        lines = [json.dumps({"query": query, "hits": hits}, ensure_ascii=False)]
    else:
        lines = table(query, hits, shutil.get_terminal_size((120, 24)).columns)
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
    sys.stdout.flush()


def table(query: str, hits: Sequence[dict[str, Any]], columns: int) -> list[str]:
    """Lines of rank, score, id (or row) and the beginning of the text, as wide as the terminal."""
    names = [one_line(str(hit.get("id", hit["row"]))) for hit in hits]
    width = min(max(map(len, names), default=1), 40)
    lines = [f"query: {one_line(query)}"]
    for hit, name in zip(hits, names, strict=True):
        start = f"{hit['rank']:4d}  {hit['score']:9.4f}  {name[:40]:{width}}  "
        text = one_line(hit["text"][:4 * columns])
        space = max(columns - len(start), 20)
        lines.append(start + (text if len(text) <= space else text[:space - 1] + "…"))
    return [*lines, ""]
