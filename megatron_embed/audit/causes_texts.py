"""Causes of other token ids than the rows have, or of other labels: the step's batch is built in other ways."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_embed.audit.case import Case, Cause
from megatron_embed.audit.causes_rows import repeated_micro_batch
from megatron_embed.batch import EmbedBatch, RerankBatch
from megatron_embed.data.loader import BatchLoader, StepLoader
from megatron_embed.errors import UserError
from megatron_embed.training.fingerprints import hash_of, set_hashes, text_hashes

PROMPTS = ("query: ", "passage: ", "search_query: ", "search_document: ", "document: ", "text: ", "clustering: ",
           "classification: ", "title: none | text: ", "task: search result | query: ",
           "Represent this sentence for searching relevant passages: ",
           "Represent this query for retrieving relevant documents: ")
"""Prompts of well-known models."""
_TEXTS = ("query_set", "query_order", "document_set", "document_order")
_MODULUS = 2**64


def explain(case: Case) -> list[Cause]:
    """The first cause that gives the logged hashes; else what the counts say."""
    loader = case.replay.loader
    if case.difference.part == "labels":
        return _labels(case)
    for candidates in (_tokenizers, _documents, _positions, _micro_batch, _one_text):
        for cause in candidates(case, loader):
            return [cause]
    return _counts(case)


def _built(case: Case, loader: StepLoader[Any]) -> EmbedBatch | RerankBatch:
    """This rank's batch of the step as another loader makes it."""
    step, inputs = case.step - 1, case.replay.inputs
    batch: EmbedBatch | RerankBatch = loader.build(inputs.records, loader.rows(step), step)
    return batch


def _is_logged(case: Case, loader: StepLoader[Any]) -> bool:
    """Whether a loader gives the logged texts."""
    try:
        batch = _built(case, loader)
    except (UserError, ValueError):
        batch = None  # such as a prompt that is longer than the texts may be
    if batch is None:
        return False
    found = case.replay.fingerprint(batch)
    return all(found[name] == case.record[name] for name in _TEXTS)


def _with_tokenizer(loader: StepLoader[Any], attribute: str, changes: Mapping[str, Any]) -> StepLoader[Any]:
    """The loader with other prompts or lengths of its tokenizer."""
    other = copy.copy(loader)
    tokenizer = copy.copy(vars(loader)["_tokenizer"])
    vars(tokenizer)[attribute] = {**vars(tokenizer)[attribute], **changes}
    vars(other)["_tokenizer"] = tokenizer
    return other


def _tokenizers(case: Case, loader: StepLoader[Any]) -> Iterator[Cause]:
    """Other prompts, lengths or an end of text."""
    if not isinstance(loader, BatchLoader):
        return
    own = vars(vars(loader)["_tokenizer"])["_prompts"]
    changed = [role for role in ("query", "document") if case.record[f"{role}_set"] != _replayed(case, f"{role}_set")]
    known = dict.fromkeys(("", own["document"], own["query"], own["query"].strip(), own["document"].strip(),
                           *case.replay.inputs.task.model.saved.prompts.values(), *PROMPTS))
    swapped = {"query": own["document"], "document": own["query"]}
    trials = [swapped, {"query": "", "document": ""}, *({role: prompt} for role in changed for prompt in known)]
    for prompts in trials:
        if _is_logged(case, _with_tokenizer(loader, "_prompts", prompts)):
            said = " and ".join(f"the {role} prompt {prompt!r} instead of {own[role]!r}"
                                for role, prompt in prompts.items() if prompt != own[role])
            yield Cause(name="wrong prompt", text=f"the token ids are those with {said}")
            return
    configured = vars(vars(loader)["_tokenizer"])["_max_lengths"]
    found = {role: length for role in changed if (length := _length_of(case, loader, role)) is not None}
    for lengths in (*({role: length} for role, length in found.items()), found):
        if lengths and _is_logged(case, _with_tokenizer(loader, "_max_lengths", lengths)):
            said = " and ".join(f"the {role} texts are cut to {length} tokens, not to {configured[role]}"
                                for role, length in lengths.items())
            yield Cause(name="wrong maximum length", text=said)
            return
    with _toggled_eos(loader) as other:
        if other is not None and _is_logged(case, other):
            yield Cause(name="end of text", text="the end-of-text token behind the texts is missing, or there is one "
                        "too many")


def _replayed(case: Case, name: str) -> Any:
    """The replayed value of a hash; the logged one, if it does not differ."""
    return case.difference.values.get(name, (None, case.record[name]))[1]


def _length_of(case: Case, loader: StepLoader[Any], role: str) -> int | None:
    """The maximum length that gives the logged number of tokens of the role, by halving; None: not all can be tried."""
    wanted, low, high = case.record[f"{role}_tokens"], 2, 1 << 15
    while low < high:
        middle = (low + high) // 2
        try:
            batch = _built(case, _with_tokenizer(loader, "_max_lengths", {role: middle}))
            tokens = int(case.replay.fingerprint(batch)[f"{role}_tokens"])
        except (UserError, ValueError):
            return None
        low, high = (middle + 1, high) if tokens < wanted else (low, middle)
    return low


@contextmanager
def _toggled_eos(loader: StepLoader[Any]) -> Iterator[StepLoader[Any] | None]:
    tokenizer = copy.copy(vars(loader)["_tokenizer"])
    if tokenizer.eos_token_id is None:
        yield None
        return
    vars(tokenizer)["_eos"] = [] if vars(tokenizer)["_eos"] else [tokenizer.eos_token_id]
    other = copy.copy(loader)
    vars(other)["_tokenizer"] = tokenizer
    yield other


def _documents(case: Case, loader: StepLoader[Any]) -> Iterator[Cause]:
    """Another number of documents per query."""
    if not isinstance(loader, BatchLoader):
        return
    own = vars(loader)["_documents"]
    for name, what in (("negatives", "hard negatives"), ("positives", "positives")):
        for number in range(0 if name == "negatives" else 1, vars(own)[name] + 3):
            other = copy.copy(loader)
            vars(other)["_documents"] = replace(own, **{name: number})
            if number != vars(own)[name] and _is_logged(case, other):
                yield Cause(name=f"number of {what}", text=f"each query has up to {number} {what}, not "
                            f"{vars(own)[name]}")
                return
    other = copy.copy(loader)
    vars(other)["_documents"] = replace(own, seed=case.replay.inputs.config.training.seed if own.seed is None else None)
    if _is_logged(case, other):
        yield Cause(name="sampling of documents", text="documents are drawn at random" if own.seed is None else
                    "the first documents of each row are taken, not drawn at random")


def _positions(case: Case, loader: StepLoader[Any]) -> Iterator[Cause]:
    """Positions that are counted across texts, or texts in each other's role."""
    batch = _built(case, loader)
    running = replace(batch, micro_batches=tuple(
        replace(micro, position_ids=torch.arange(len(micro.position_ids))) for micro in batch.micro_batches))
    found = case.replay.fingerprint(running)
    if all(found[name] == case.record[name] for name in _TEXTS):
        yield Cause(name="wrong positions", text="positions do not begin at 0 in each text, they go on through the "
                    "micro-batch")
    if case.record["query_set"] == _replayed(case, "document_set"):
        yield Cause(name="queries and documents exchanged", text="the queries are the documents of the rows")


def _micro_batch(case: Case, loader: StepLoader[Any]) -> Iterator[Cause]:
    """The texts of a micro-batch are there in place of another one's."""
    batch, training = _built(case, loader), case.replay.inputs.config.training
    if training.micro_batch_tokens is not None or not isinstance(batch, EmbedBatch):
        return
    hashes = set_hashes(text_hashes(batch)[0])
    documents = np.zeros(batch.num_queries, np.uint64)
    np.add.at(documents, batch.document_query.numpy(), hashes[batch.num_queries :])
    causes = []
    for role, own in (("query", hashes[: batch.num_queries]), ("document", documents)):
        values, size = case.replay.gathered(own.tolist()), training.micro_batch_size
        parts = [sum(values[first : first + size]) % _MODULUS for first in range(0, len(values), size)]
        causes.append(list(repeated_micro_batch(case, parts, hash_of(case.record, f"{role}_set"))))
    if causes[0] == causes[1]:
        yield from causes[0]


def _one_text(case: Case, loader: StepLoader[Any]) -> Iterator[Cause]:
    """One text is missing, there twice, or has been changed."""
    batch = _built(case, loader)
    hashes, _ = text_hashes(batch)
    for role, part in (("query", slice(0, _num_queries(batch))), ("document", slice(_num_queries(batch), None))):
        difference = (hash_of(case.record, f"{role}_set") - int(_replayed(case, f"{role}_set"), 16)) % _MODULUS
        own = set_hashes(hashes[part]).tolist()
        everywhere = case.replay.gathered([int(value) for value in own])
        count = case.record["queries" if role == "query" else "documents"] - len(everywhere)
        positions = {value: position for position, value in enumerate(everywhere)}
        if count == -1 and (lost := positions.get(-difference % _MODULUS)) is not None:
            yield Cause(name="dropped row" if role == "query" else "dropped document", text=f"{role} {lost + 1} of the "
                        f"global batch was left out{_row_of(case, role, lost)}")
            return
        if count == 1 and difference in positions:
            yield Cause(name=f"duplicated {role}", text=f"{role} {positions[difference] + 1} of the global batch is "
                        f"there twice{_row_of(case, role, positions[difference])}")
            return
        if count == 0 and difference:
            wanted = {(difference + value) % _MODULUS: position for position, value in enumerate(everywhere)}
            for value, position in positions.items():
                if (lost := wanted.get(value)) is not None:
                    yield Cause(name="duplicated row" if role == "query" else "duplicated document",
                                text=f"{role} {position + 1} of the global batch is there twice, and {role} {lost + 1} "
                                f"is missing{_row_of(case, role, lost)}")
                    return
    if all(case.record[f"{role}_set"] == _replayed(case, f"{role}_set") for role in ("query", "document")):
        yield Cause(name="texts in another order", text="the texts are the right ones, in other positions of the "
                    "batch: a query has documents of another")


def _num_queries(batch: EmbedBatch | RerankBatch) -> int:
    """Queries that are rows of their own."""
    return batch.num_queries if isinstance(batch, EmbedBatch) else 0


def _row_of(case: Case, role: str, position: int) -> str:
    if role != "query":
        return ""
    row = case.replay.inputs.sampler.rows_of_step(case.step - 1)[position]
    return f": row {row} ({case.replay.inputs.records[row].source})"


def _counts(case: Case) -> list[Cause]:
    """Causes that the numbers of texts and tokens show, where no trial gave the ids."""
    found, record, values = [], case.record, case.difference.values
    for role, count in (("query", "queries"), ("document", "documents")):
        logged, replayed = values.get(f"{role}_tokens", (record[f"{role}_tokens"],) * 2)
        texts = max(1, record[count])
        if count in values:
            found.append(Cause(name="number of texts",
                               text=f"{values[count][0]} {count} instead of {values[count][1]}"))
        elif logged != replayed and (logged - replayed) % texts == 0:
            more = (logged - replayed) // texts
            found.append(Cause(name="wrong prompt", text=f"each of the {texts} {count} has {more:+d} tokens: "
                               "an unknown prompt, or special tokens"))
        elif logged != replayed:
            found.append(Cause(name="other token ids", text=f"the {count} have {logged - replayed:+d} tokens together: "
                               "another tokenizer, prompt, length or text"))
    if not found and any(name.startswith(("query", "document")) for name in values):
        found.append(Cause(name="other token ids", text="as many tokens, but other ones: another tokenizer, a changed "
                           "text, or a prompt, of equal length or of texts that are cut to the maximum length"))
    return found


def _labels(case: Case) -> list[Cause]:
    """Changes of the labels that give the logged hash."""
    batch = case.replay.batch(case.step)
    for shift in (1, -1, 2, -2) if isinstance(batch, EmbedBatch) else ():
        for field in ("positive_index", "query_ids", "scores", "teacher_scores"):
            value = vars(batch)[field]
            if value is None:
                continue
            other = replace(batch, **{field: torch.roll(value, shift)})
            if case.replay.fingerprint(other)["labels"] == case.record["labels"]:
                name = "shifted labels" if field == "positive_index" else f"shifted {field.replace('_', ' ')}"
                return [Cause(name=name, text=f"each row has the {field.replace('_', ' ')} of the one {shift:+d} "
                              "positions away on its rank")]
    return [Cause(name="other labels", text="positives, scores or the hashes of equal texts are not those of the rows")]
