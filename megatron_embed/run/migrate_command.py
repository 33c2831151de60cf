"""The `migrate` command: a map from an old model's vectors to a new one's, and its application to an index."""

import argparse
import functools
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed import __version__
from megatron_embed.data.corpus import Picked, TextsOnDisk
from megatron_embed.errors import ConfigError, EmptyTextError, UserError
from megatron_embed.evaluation.beir import BeirData, load_beir
from megatron_embed.evaluation.given_vectors import GivenVectors
from megatron_embed.evaluation.retrieval import evaluate_queries, mean_metrics
from megatron_embed.evaluation.vector_files import ShardWriter, VectorFile, read_summary, write_shards
from megatron_embed.evaluation.vector_map import (
    FEWEST_PAIRS,
    Fitted,
    MappedVectors,
    Pairs,
    VectorMap,
    fit_best,
)
from megatron_embed.loading.model_directory import open_encoder
from megatron_embed.loading.prompts import given_prompts
from megatron_embed.names import MAP_KINDS, MapKind, Similarity
from megatron_embed.parallel.collectives import gather_objects, raise_on_all_ranks
from megatron_embed.parallel.lost_rank import monitored_ranks

if TYPE_CHECKING:
    from megatron_embed.evaluation.encode import TextEncoder

logger = logging.getLogger(__name__)

MOST_PAIRS = 20000
"""Pairs that are sampled if --max-pairs is not given."""
_UNIT = 1e-3
"""Lengths of unit vectors differ from 1 by less."""


def fit_map(args: argparse.Namespace) -> tuple[str, int]:
    """(what is known of the map that was fitted and written, as JSON, this rank). Called by all ranks with --model."""
    old = VectorFile(args.old, "--old", similarity="dot")
    if len(old) < FEWEST_PAIRS:
        raise ConfigError(f"--old {args.old}: {len(old)} vectors; a map needs at least {FEWEST_PAIRS} pairs",
                          key="--old")
    most = MOST_PAIRS if args.max_pairs is None else args.max_pairs
    if most < FEWEST_PAIRS:
        raise ConfigError(f"--max-pairs {most}: a map needs at least {FEWEST_PAIRS} pairs; raise it", key="--max-pairs")
    rows = _sampled(len(old), most)
    kinds: Sequence[MapKind] = MAP_KINDS if args.kind in (None, "auto") else (args.kind,)
    if args.model is None:
        new = VectorFile(args.new, "--new", similarity="dot")
        _require_equal(len(old), len(new), f"--new {args.new}", "vectors", key="--new")
        fitted = _fit(old, rows, new.gather(rows), kinds)
        report = _report(fitted, args, len(rows))
        error = fitted.vector_map.write(args.output, report)
        if error is not None:
            raise error
        return json.dumps(report), 0
    return _fit_to_model(args, old, rows, kinds)


def _fit_to_model(args: argparse.Namespace, old: VectorFile, rows: NDArray[np.int64],
                  kinds: Sequence[MapKind]) -> tuple[str, int]:
    """The same where the new model embeds the sampled texts."""
    data = None if args.data is None else load_beir(args.data, args.split or "test")
    texts: Sequence[str]
    of_option = "--data" if args.pairs is None else "--pairs"
    if args.pairs is not None:
        texts = TextsOnDisk(args.pairs, "--pairs")
        _require_equal(len(old), len(texts), f"--pairs {args.pairs}", "texts", key="--pairs")
    else:
        assert data is not None
        texts = data.document_texts
    if data is not None:
        _require_equal(len(old), len(data.document_ids), f"--data {args.data}", "documents", key="--data")
    with monitored_ranks() as start:
        encoder, model, topology = open_encoder(args, prompts=True, given_prompts=given_prompts(args), start=start)
        is_first = topology.rank == 0
        try:
            new = encoder.encode(Picked(texts, rows.tolist()), "document", show_progress=is_first)
        except EmptyTextError as empty:
            raise EmptyTextError(empty.row, f"text number {rows[empty.row] + 1} of {of_option}", empty.text) from None
        # The first rank's, since another one's processor may round otherwise.
        fitted = gather_objects(_fit(old, rows, new, kinds) if is_first else None, dist.group.WORLD)[0]
        assert fitted is not None
        report = _report(fitted, args, len(rows))
        if data is not None:
            report |= _retention(args, encoder, data, fitted.vector_map, model.saved.similarity)
        raise_on_all_ranks(fitted.vector_map.write(args.output, report) if is_first else None)
    return json.dumps(report), topology.rank


def map_vectors(args: argparse.Namespace) -> None:
    """Write all vectors of --old, mapped, as `encode` writes vectors; an interrupted call goes on. One process."""
    vector_map = VectorMap.read(args.map, "--map")
    mapped = MappedVectors(args.old, "--old", vector_map, similarity="dot")
    summary = read_summary(args.old, "--old")
    settings = {"version": __version__, "map": vector_map.identity(), "mapped from": mapped.stamps(),
                **({"texts": summary["texts"]} if "texts" in summary else {})}
    writer = ShardWriter(args.output, settings, rows=len(mapped), dim=vector_map.new_dim)

    def agree(error: UserError | None) -> None:
        if error is not None:
            raise error

    write_shards(writer, writer.missing(), lambda rows: mapped.rows(rows.start, rows.stop), rank=0, world_size=1,
                 agree=agree)


def _sampled(count: int, most: int) -> NDArray[np.int64]:
    """Rows to fit on, ascending: all, or so many at random."""
    rows = np.random.default_rng(0).permutation(count)[:most]
    return np.sort(rows)


def _require_equal(vectors: int, others: int, what: str, unit: str, *, key: str) -> None:
    if vectors != others:
        raise ConfigError(f"{what}: {others} {unit} for the {vectors} vectors of --old; name those of the same texts "
                          "in the same order", key=key)


def _fit(old: VectorFile, rows: NDArray[np.int64], new: Tensor, kinds: Sequence[MapKind]) -> Fitted:
    for name, vectors in (("old", old.gather(rows)), ("new", new)):
        if bool((vectors == vectors[0]).all()):
            raise ConfigError(f"--{name}: all {len(rows)} sampled vectors are equal, so that no map can be fitted to "
                              "them; encode the texts again", key=f"--{name}")
    unit_length = bool(((new.norm(dim=1) - 1).abs() < _UNIT).all())
    fitted = fit_best(kinds, Pairs.split(old.gather(rows), new), unit_length=unit_length)
    logger.info("cosine of mapped and new vectors, held out: %s; chosen: %s", ", ".join(
        f"{kind} {cosine:.4f}" for kind, cosine in fitted.cosines.items()), fitted.vector_map.kind)
    return fitted


def _report(fitted: Fitted, args: argparse.Namespace, pairs: int) -> dict[str, Any]:
    chosen = fitted.vector_map.kind
    return {"map": chosen, "pairs": pairs, "cosine": fitted.cosines[chosen], "cosine_by_kind": dict(fitted.cosines),
            "cosine_before": fitted.before, "old": args.old, "new": args.new or args.model}


def _retention(args: argparse.Namespace, encoder: "TextEncoder", data: BeirData, vector_map: VectorMap,
               similarity: Similarity) -> dict[str, Any]:
    """nDCG@10 of the new model's queries over documents that it embeds, mapped old vectors, and old ones as they are
    where they are as wide. Called by all ranks."""
    encode = functools.partial(encoder.encode, show_progress=encoder.topology.rank == 0)
    files = {"re_embedded": None, "mapped": MappedVectors(args.old, "--old", vector_map, similarity=similarity)}
    if vector_map.old_dim == vector_map.new_dim:
        files["old"] = VectorFile(args.old, "--old", similarity=similarity)
    scores = {}
    for name, vectors in files.items():
        given = None if vectors is None else GivenVectors(vectors=vectors, kind="flat", index=None)
        metrics = mean_metrics(evaluate_queries(encode, data, similarity=similarity, group=dist.group.WORLD,
                                                device=encoder.topology.device, given=given))
        scores[name] = metrics["ndcg@10"]
    return {"ndcg@10": scores, "retention": scores["mapped"] / scores["re_embedded"] if scores["re_embedded"] else None}
