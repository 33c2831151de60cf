"""What other models than the one in training give a run: vectors of its rows' texts, computed once or read."""

import argparse
import functools
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed import __version__
from megatron_embed.config.load import to_dict
from megatron_embed.config.schema import EmbeddingConfig, RunConfig
from megatron_embed.data.corpus import ID_KEYS, text_of_document
from megatron_embed.data.index_store import default_directory
from megatron_embed.data.records import ANY_NUMBER, Record, documents_in_use, text_id
from megatron_embed.data.row_fields import name_of
from megatron_embed.data.row_source import open_rows
from megatron_embed.data.row_texts import UniqueTexts, documents_of, unique_texts
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.text_vectors import TextVectors
from megatron_embed.evaluation.vector_cache import VectorCache, VectorSource, model_digest
from megatron_embed.evaluation.vector_files import VectorFile, are_vectors, read_summary
from megatron_embed.loading.model_directory import ModelDirectory, find_model, open_encoder
from megatron_embed.models.backbone import check_divisible
from megatron_embed.names import Role, Similarity
from megatron_embed.objectives.fixed_vectors import FixedVectors
from megatron_embed.objectives.learned_projection import LearnedProjection
from megatron_embed.parallel.collectives import broadcast_from_rank0, raise_on_all_ranks
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.task import Inputs

logger = logging.getLogger(__name__)


def old_source(config: RunConfig) -> tuple[str, str] | None:
    """(key, path) of what gives documents the vectors that training leaves as they are; None: nothing does."""
    if config.objective.compatible_with is not None:
        return "objective.compatible_with", config.objective.compatible_with
    return ("model.path", config.model.path) if config.training.query_side_only else None


def check_other_models(config: RunConfig, model: ModelDirectory) -> None:
    """Refuse, before the first collective, other models and vectors that the run cannot use.

    Raises:
        UserError: they cannot be read, are not as wide as needed, or do not fit the layout.
    """
    objective, dim = config.objective, model.dim(config.embedding)
    if objective.guide_model is not None:
        _find_other(config, "objective.guide_model", objective.guide_model)
    if objective.teacher_model is not None:
        width = _width_of(config, "objective.teacher_model", objective.teacher_model)
        if width != dim and not objective.teacher_projection:
            raise ConfigError(f"objective.teacher_model = {objective.teacher_model!r}: its vectors have {width} "
                              f"components, and those of the model in training {dim}; set objective.teacher_projection:"
                              f" true, or embedding.embedding_dim: {width}", key="objective.teacher_model")
    source = old_source(config)
    if source is None:
        return
    key, path = source
    if are_vectors(path):
        width = VectorFile(path, key, similarity=_similarity(config)).full_width
        _texts_of_vectors(config, path)
    else:
        width = _width_of(config, *source)
    if width != dim:
        is_own = model.dim(replace(config.embedding, embedding_dim=None)) == width
        remedy = "remove embedding.embedding_dim" if is_own else f"set embedding.embedding_dim: {width}"
        raise ConfigError(f"{key} = {path!r}: its vectors have {width} components, and those of the model in training "
                          f"{dim}; {remedy}, or bring the vectors of the index to {dim} with `megatron-embed migrate` "
                          "first", key=key)


def _width_of(config: RunConfig, key: str, path: str) -> int:
    """Components of another model's vectors."""
    return _find_other(config, key, path).dim(EmbeddingConfig())


def _find_other(config: RunConfig, key: str, path: str) -> ModelDirectory:
    """The directory of another model, which this run's layout can hold."""
    other = find_model(path, key)
    other.require_one_vector(key, "here a model has")
    try:
        check_divisible(other.shape, config.parallel)
    except ConfigError as error:
        raise ConfigError(f"{key} = {path!r} runs in the layout of the run: {error}; or encode its texts before, with "
                          "`megatron-embed encode`, and name the vectors", key=key) from error
    return other


def fixed_vectors(inputs: Inputs, topology: Topology, tokenizer: RoleTokenizer) -> FixedVectors:
    """The vectors that the objective looks up. Called by all ranks, which compute together what is not cached.

    Args:
        tokenizer: the run's, whose prompts are part of the queries' ids.
    Raises:
        UserError: on all ranks alike, if a text has none, or they cannot be written.
    """
    config = inputs.config
    objective, source = config.objective, old_source(config)
    old = guide_query = guide_document = teacher_query = teacher_document = projection = None
    if source is not None:
        compute = _stored_documents if are_vectors(source[1]) else _computed_documents
        old = compute(inputs, topology, *source)
    if objective.guide_model is not None:
        source = "objective.guide_model", objective.guide_model
        guide_query = _computed_queries(inputs, topology, tokenizer, *source)
        guide_document = _computed_documents(inputs, topology, *source)
    if objective.teacher_model is not None:
        source = "objective.teacher_model", objective.teacher_model
        teacher_query = _computed_queries(inputs, topology, tokenizer, *source)
        teacher_document = _computed_documents(inputs, topology, *source)
        if objective.teacher_projection:
            projection = LearnedProjection(
                config, inputs.task.model.dim(config.embedding), teacher_document.dim, dp_group=topology.dp_group,
                pp_group=topology.groups.pp, device=topology.device)
    return FixedVectors(old_document=old, guide_query=guide_query, guide_document=guide_document,
                        teacher_query=teacher_query, teacher_document=teacher_document, projection=projection)


def _similarity(config: RunConfig) -> Similarity:
    return "cosine" if config.embedding.unit_length else "dot"


def _documents(inputs: Inputs) -> UniqueTexts:
    """The documents of all rows and, where a run searches with them, of its evaluation sets."""
    data = inputs.config.data
    counts = (ANY_NUMBER, ANY_NUMBER) if data.samples_documents else (data.num_positives, data.num_negatives)
    corpora = [each.document_texts for each in inputs.suite.retrieval] if inputs.config.training.query_side_only else []
    return unique_texts(_rows(inputs), functools.partial(
        documents_of, num_positives=counts[0], num_negatives=counts[1]), corpora)


def _rows(inputs: Inputs) -> Sequence[Any]:
    """All rows, those that are held out included."""
    if inputs.validation is None:
        return inputs.records
    return _Chained(inputs.records, inputs.validation)


class _Chained(Sequence[Any]):
    """The rows of two sets."""

    def __init__(self, first: Sequence[Any], second: Sequence[Any]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, row: Any) -> Any:
        return self._first[row] if row < len(self._first) else self._second[row - len(self._first)]


def _computed_documents(inputs: Inputs, topology: Topology, key: str, path: str) -> TextVectors:
    """The documents' vectors by another model, as `encode --role document` gives them."""
    texts = _documents(inputs)
    return _computed(texts, "document", inputs.config, topology, key=key, path=path,
                     digest=hashlib.blake2b(texts.ids.tobytes()).hexdigest())


def _computed_queries(inputs: Inputs, topology: Topology, tokenizer: RoleTokenizer, key: str,
                      path: str) -> TextVectors:
    """The queries' vectors by another model, each with that model's prompt and the row's instruction."""
    prompt, default = find_model(path, key).saved.prompts.get("query", ""), inputs.config.embedding.instruction

    def query_of(record: Record) -> list[tuple[int, str]]:
        instruction = record.instruction if record.instruction is not None else default
        if "{instruction}" in prompt and instruction is None:
            raise ConfigError(f"{key} = {path!r}: its prompt {prompt!r} needs an instruction, and {record.source} has "
                              "none; set embedding.instruction", key=key)
        own = tokenizer.fill_prompt("query", record.instruction, record.query_prompt) + record.query
        return [(text_id(own), prompt.replace("{instruction}", instruction or "") + record.query)]

    queries = unique_texts(_rows(inputs), query_of)
    digest = hashlib.blake2b(queries.ids.tobytes())
    for text in queries.texts:  # whose instructions the run's own prompt may leave out
        digest.update(text_id(text).to_bytes(8, "little", signed=True))
    return _computed(queries, "query", inputs.config, topology, key=key, path=path, digest=digest.hexdigest())


def _computed(texts: UniqueTexts, role: Role, config: RunConfig, topology: Topology, *, key: str, path: str,
              digest: str) -> TextVectors:
    """The vectors of texts by another model, read from the cache or computed.

    Args:
        digest: of the texts.
    """
    model = find_model(path, key)
    of_model = broadcast_from_rank0(model_digest(model.read_from) if topology.rank == 0 else "")
    name = hashlib.blake2b(json.dumps([__version__, of_model, role, digest]).encode(), digest_size=20).hexdigest()
    directory = config.objective.vector_cache or default_directory().parent / "vectors"
    cache = VectorCache(directory, rank=topology.rank, key="objective.vector_cache")

    def compute() -> Iterator[Tensor]:
        if topology.rank == 0:
            logger.info("%s = %s embeds %d %s texts, once; %s keeps their vectors", key, path, len(texts.ids), role,
                        directory)
        yield from VectorSource(_open(config, topology, key, path), None, "", {}).blocks(role, texts.texts)

    try:
        vectors = cache.on_disk(f"{name}.npy", len(texts.ids), compute)
    except EmptyTextError as error:
        raise ConfigError(f"{key} = {path!r}: the text {error.text[:40]!r} has no tokens in its tokenizer; remove its "
                          "row", key=key) from None
    return TextVectors(texts.ids, vectors.rows, vectors.dim, _similarity(config))


def _open(config: RunConfig, topology: Topology, key: str, path: str) -> TextEncoder:
    """Another model, loaded in the run's layout with its own settings. Queries carry their prompts already."""
    layout = [f"parallel.{name}={json.dumps(value)}" for name, value in to_dict(config)["parallel"].items()]
    args = argparse.Namespace(model=path, pooling=None, max_length=None, dtype=None, no_normalize=False,
                              overrides=layout)
    encoder, *_ = open_encoder(args, prompts=True, given_prompts={"query": ""}, start=lambda parallel: topology,
                               key=key, own_libraries=False)
    return encoder


def _texts_of_vectors(config: RunConfig, path: str) -> str:
    """The file of texts that stored vectors are of.

    Raises:
        ConfigError: it is not known, or was changed since.
    """
    if config.objective.compatible_texts is not None:
        return config.objective.compatible_texts
    key, missing = "objective.compatible_with", "set objective.compatible_texts to the file that was encoded"
    described = read_summary(path, key).get("texts")
    if described is None:
        raise ConfigError(f"{key} = {path!r}: does not say which texts its vectors are of; {missing}", key=key)
    status = os.stat(described[0]) if os.path.isfile(described[0]) else None
    if status is None or [status.st_size, status.st_mtime_ns] != described[1:]:
        raise ConfigError(f"{key} = {path!r}: its texts, {described[0]}, are gone or were changed since; {missing}",
                          key=key)
    return str(described[0])


def _stored_documents(inputs: Inputs, topology: Topology, key: str, path: str) -> TextVectors:
    """The documents' vectors in an index."""
    error, documents, found = None, _documents(inputs), None
    try:
        found = _find_documents(inputs, documents, key, path)
    except UserError as user_error:
        error = user_error
    raise_on_all_ranks(error)
    assert found is not None
    vectors, rows = found
    return TextVectors(documents.ids, lambda chosen: vectors.gather(rows[chosen]), vectors.full_width,
                       _similarity(inputs.config))


def _find_documents(inputs: Inputs, documents: UniqueTexts, key: str,
                    path: str) -> tuple[VectorFile, NDArray[np.int64]]:
    """(the vectors of an index, [documents] the row of each document in it): by the texts that were encoded or, where a
    row of data gives its document's id, by that.

    Raises:
        UserError: a document has no vector.
    """
    vectors = VectorFile(path, key, similarity=_similarity(inputs.config))
    file = _texts_of_vectors(inputs.config, path)
    texts, names = _encoded_texts(file)
    if len(texts) != len(vectors):
        raise ConfigError(f"{key} = {path!r}: {len(vectors)} vectors for the {len(texts)} texts of {file}; name the "
                          "file that was encoded in objective.compatible_texts", key=key)
    rows = _positions(texts, documents.ids)
    missing = set(documents.ids[rows < 0].tolist())
    by_name = _rows_by_name(inputs, names, missing) if missing and names is not None else {}
    for place in np.flatnonzero(rows < 0).tolist() if by_name else ():
        rows[place] = by_name.get(int(documents.ids[place]), -1)
    _refuse_missing(inputs, set(documents.ids[rows < 0].tolist()), f"{key} = {path!r}", file)
    return vectors, rows


def _encoded_texts(file: str) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """([rows] ids of the texts of a file, [rows] hashes of the names of its rows; None: not all have one)."""
    texts, names = array("q"), array("q")
    for row, source in open_rows(file, "objective.compatible_texts").scan():
        if "text" not in row:
            raise DataError(f"{source}: the row lacks text; name the file of texts that was encoded")
        texts.append(text_id(text_of_document(row, source)))
        key = next((key for key in ID_KEYS if key in row), None)
        names.extend([] if key is None else [text_id(name_of(row[key], key, source))])
    return np.array(texts, dtype=np.int64), (np.array(names, dtype=np.int64) if len(names) == len(texts) else None)


def _positions(known: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """[wanted] place of each in `known`, -1 where it is not there."""
    order = np.argsort(known, kind="stable")
    places = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
    found: NDArray[np.int64] = np.where(known[order][places] == wanted, order[places], -1)
    return found


def _rows_by_name(inputs: Inputs, names: NDArray[np.int64], missing: set[int]) -> dict[int, int]:
    """Text id -> row of the index, of documents whose rows give their ids. Reads every row."""
    found: dict[int, int] = {}
    rows = _rows(inputs)
    for record in (rows[row] for row in range(len(rows))):
        for name, document in zip(record.document_ids or (), (*record.positive, *record.negatives), strict=False):
            if text_id(document) in missing:
                found[text_id(document)] = text_id(name)
    places = _positions(names, np.array(list(found.values()), dtype=np.int64)) if found else np.zeros(0, np.int64)
    return {text: place for text, place in zip(found, places.tolist(), strict=True) if place >= 0}


def _refuse_missing(inputs: Inputs, missing: set[int], what: str, file: str) -> None:
    """Raises an error for the first document that has no vector, if any."""
    if not missing:
        return
    data, rows, rest = inputs.config.data, _rows(inputs), f"{len(missing)} documents have no vector"
    remedy = (f"encode them too ({what}, texts {file}), or name the model that the index was made with instead of its "
              "vectors")
    for record in (rows[row] for row in range(len(rows))):
        assert isinstance(record, Record)
        used = documents_in_use(record, ANY_NUMBER if data.samples_documents else data.num_negatives,
                                ANY_NUMBER if data.samples_documents else data.num_positives)
        for text in used:
            if text_id(text) in missing:
                raise DataError(f"{record.source}: the document {text[:60]!r} is not in the index: {rest}; {remedy}")
    for each in inputs.suite.retrieval:
        for name, text in zip(each.document_ids, each.document_texts, strict=True):
            if text_id(text) in missing:
                raise ConfigError(f"evaluation.retrieval = {each.directory!r}: document {name!r} is not in the index: "
                                  f"{rest}; {remedy}", key="evaluation.retrieval")
