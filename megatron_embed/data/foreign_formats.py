"""Rows of other trainers, one function per format: (row, FILE:LINE) -> record. formats.py says which applies.

The formats are those of ms-swift 4.6, FlagEmbedding 1.4, Tevatron 3.0, Sentence Transformers 6.2, DPR, NeMo Automodel.
"""

import re

from megatron_embed.data.jsonl import check_text, json_type, shortened
from megatron_embed.data.records import Record, RerankRecord, id_from_text
from megatron_embed.data.row_fields import (
    Row,
    names,
    number,
    numbers,
    optional_numbers,
    optional_text,
    optional_texts,
    passages,
    some_texts,
    titled,
)
from megatron_embed.errors import DataError

NEGATIVE_COLUMN = re.compile(r"negative(_\d+)?")
LABEL_COLUMNS = ("label", "labels", "score", "scores")


_Passages = tuple[tuple[str, ...], tuple[str, ...] | None]
"""Texts and their ids."""


def _ids(*parts: _Passages) -> tuple[str, ...] | None:
    """The ids of all parts; where some have none, ids made from their texts. None where no part has any."""
    if not any(ids for _, ids in parts):
        return None
    return tuple(name for texts, ids in parts for name in (map(id_from_text, texts) if ids is None else ids))


def _require_some(documents: tuple[str, ...], name: str, source: str) -> None:
    if not documents:
        raise DataError(f"{source}: {name} = [] is empty; give it at least one passage or remove the row")


def read_swift_response(row: Row, source: str) -> Record:
    """ms-swift's older rows: query and response, then rejected_response or label; `system` is the instruction."""
    if row.get("history"):
        raise DataError(f"{source}: history = {shortened(row['history'])}: a conversation of several turns is no "
                        "query; write its text into query")
    score = None if row.get("label") is None else number(row["label"], "label", source)
    negatives = optional_texts(row, "rejected_response", source)
    if score is not None and negatives:
        raise DataError(f"{source}: label and rejected_response are both given; keep label for a pair with a score, or "
                        "rejected_response for negatives")
    positive = some_texts(row["response"], "response", source)
    if score is not None and len(positive) > 1:
        raise DataError(f"{source}: response has {len(positive)} texts and one label; write one row for each")
    return Record(query=check_text(row["query"], "query", source), positive=positive, negatives=negatives, score=score,
                  instruction=optional_text(row, "system", source), source=source)


def read_swift_messages(row: Row, source: str) -> Record:
    """ms-swift's rows of messages; the system message is the instruction."""
    instruction, query = _messages(row["messages"], "messages", source, system=True)
    positive = _message_lists(row["positive_messages"], "positive_messages", source)
    if not positive:
        raise DataError(f"{source}: positive_messages = [] is empty; give it at least one list of messages or remove "
                        "the row")
    negatives = ()
    if row.get("negative_messages") is not None:
        negatives = _message_lists(row["negative_messages"], "negative_messages", source)
    score = None if row.get("label") is None else number(row["label"], "label", source)
    if score is not None and (negatives or len(positive) > 1):
        raise DataError(f"{source}: label is given with {len(positive)} positives and {len(negatives)} negatives; a "
                        "pair with a score has one positive and no negatives")
    return Record(query=query, positive=positive, negatives=negatives, instruction=instruction, source=source,
                  score=score)


def _message_lists(value: object, name: str, source: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a list of lists of messages")
    return tuple(_messages(item, f"{name}[{index}]", source, system=False)[1] for index, item in enumerate(value))


def _messages(value: object, name: str, source: str, *, system: bool) -> tuple[str | None, str]:
    """(system message, the one other message) of a list of messages."""
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)} is a JSON {json_type(value)}; it must be a list of "
                        'messages such as {"role": "user", "content": ...}')
    instruction, found = None, []
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(message, dict) or "content" not in message or "role" not in message:
            raise DataError(f"{source}: {place} = {shortened(message)}: it must be a message such as "
                            '{"role": "user", "content": ...}')
        content = check_text(message["content"], f"{place}.content", source)
        if message["role"] == "system" and system and index == 0:
            instruction = content
        elif message["role"] in ("user", "assistant"):
            found.append(content)
        else:
            raise DataError(f"{source}: {place}.role = {shortened(message['role'])}: it must be user or assistant"
                            f"{', or system in the first message' if system else ''}")
    if len(found) != 1:
        raise DataError(f"{source}: {name} holds {len(found)} messages beside the system's; a text is one message")
    return instruction, found[0]


def read_flag_embedding(row: Row, source: str) -> Record:
    """FlagEmbedding's and KaLM's rows: query, pos, neg, and a teacher's pos_scores and neg_scores."""
    positive = some_texts(row["pos"], "pos", source)
    negatives = optional_texts(row, "neg", source)
    of_positive = optional_numbers(row, "pos_scores", source, len(positive), "texts of pos")
    of_negatives = optional_numbers(row, "neg_scores", source, len(negatives), "texts of neg")
    if (of_positive is None) != (of_negatives is None) and negatives:
        given, missing = ("pos", "neg") if of_negatives is None else ("neg", "pos")
        raise DataError(f"{source}: {given}_scores is given without {missing}_scores; give both or neither")
    scores = None if of_positive is None else (*of_positive, *(of_negatives or ()))
    prompt = row.get("prompt")
    ids = _ids((positive, _flag_ids(row.get("pos_id"), positive)), (negatives, _flag_ids(row.get("neg_id"), negatives)))
    return Record(query=check_text(row["query"], "query", source), positive=positive, negatives=negatives,
                  teacher_scores=scores, source=source, document_ids=ids,
                  instruction=None if prompt in (None, "") else check_text(prompt, "prompt", source))


def _flag_ids(value: object, found: tuple[str, ...]) -> tuple[str, ...] | None:
    """Ids of these texts, None unless the list has one for each: files in the wild have other things there too."""
    if not isinstance(value, list) or len(value) != len(found):
        return None
    ids = tuple(str(item) for item in value if (isinstance(item, int) and not isinstance(item, bool))
                or (isinstance(item, str) and item.strip()))
    return ids if len(ids) == len(found) else None


def read_tevatron_passages(row: Row, source: str) -> Record:
    """Tevatron's older rows: positive_passages and negative_passages with title and text."""
    positive = passages(row["positive_passages"], "positive_passages", source)
    _require_some(positive[0], "positive_passages", source)
    negatives = passages(row.get("negative_passages") or [], "negative_passages", source)
    return Record(query=check_text(row["query"], "query", source), positive=positive[0],
                  negatives=negatives[0], instruction=None, source=source, document_ids=_ids(positive, negatives))


def read_tevatron_ids(row: Row, source: str) -> Record:
    """Tevatron's newer rows: ids into a corpus, which stand in the place of the texts until they are looked up."""
    for name in ("query_image", "query_video", "query_audio"):
        if row.get(name) is not None:
            raise DataError(f"{source}: {name} = {shortened(row[name])}: only texts can be trained on; remove the row")
    positive = names(row["positive_document_ids"], "positive_document_ids", source)
    _require_some(positive, "positive_document_ids", source)
    negatives = names(row.get("negative_document_ids") or [], "negative_document_ids", source)
    field = "query_text" if "query_text" in row else "query"
    return Record(query=check_text(row[field], field, source), positive=positive, negatives=negatives,
                  instruction=None, source=source, document_ids=(*positive, *negatives))


def read_tevatron_scores(row: Row, source: str) -> Record:
    """Tevatron's rows for distillation: passages, the positive first, and a teacher's score of each."""
    found, ids = passages(row["passages"], "passages", source)
    _require_some(found, "passages", source)
    return Record(query=check_text(row["query"], "query", source), positive=found[:1], negatives=found[1:],
                  instruction=None, source=source, document_ids=ids,
                  teacher_scores=numbers(row["scores"], "scores", source, len(found), "passages"))


def read_columns(row: Row, source: str, anchor: str, positive: str) -> Record:
    """Sentence Transformers' columns: two texts and a label, or a positive and negative, negative_1, ...

    A label beside negatives is a teacher's: a score of each document, or its margin to each negative (MarginMSELoss).
    """
    found = some_texts(row[positive], positive, source)
    columns = [name for name in row if NEGATIVE_COLUMN.fullmatch(name) and row[name] is not None]
    # The order of the columns is Sentence Transformers' order of the negatives.
    negatives = tuple(text for name in columns for text in optional_texts(row, name, source))
    labels = [name for name in LABEL_COLUMNS if row.get(name) is not None]
    if len(labels) > 1:
        raise DataError(f"{source}: {labels[0]} and {labels[1]} are both given; keep one")
    score = scores = None
    if labels and negatives:
        scores = _teacher_scores(row[labels[0]], labels[0], source, len(found), len(negatives))
    elif labels and len(found) == 1:
        score = number(row[labels[0]], labels[0], source)
    elif labels:
        raise DataError(f"{source}: {positive} has {len(found)} texts and one {labels[0]}; write one row for each")
    return Record(query=check_text(row[anchor], anchor, source), positive=found, negatives=negatives,
                  instruction=optional_text(row, "instruction", source), source=source, score=score,
                  teacher_scores=scores)


def _teacher_scores(value: object, name: str, source: str, num_positive: int, num_negatives: int) -> tuple[float, ...]:
    """A score per document; of margins to the negatives, the negatives' scores where the positive has 0."""
    if num_positive == 1 and not isinstance(value, list) and num_negatives == 1:
        return 0.0, -number(value, name, source)
    if num_positive == 1 and isinstance(value, list) and len(value) == num_negatives:
        return 0.0, *(-margin for margin in numbers(value, name, source, num_negatives, "negatives"))
    return numbers(value, name, source, num_positive + num_negatives, "documents")


def read_dpr(row: Row, source: str) -> Record:
    """DPR's rows: positive_ctxs, hard_negative_ctxs, and negative_ctxs behind these."""
    keys = ("passage_id", "psg_id")
    positive = passages(row["positive_ctxs"], "positive_ctxs", source, keys)
    _require_some(positive[0], "positive_ctxs", source)
    hard = passages(row.get("hard_negative_ctxs") or [], "hard_negative_ctxs", source, keys)
    easy = passages(row.get("negative_ctxs") or [], "negative_ctxs", source, keys)
    return Record(query=check_text(row["question"], "question", source), positive=positive[0],
                  negatives=(*hard[0], *easy[0]), instruction=None, source=source,
                  document_ids=_ids(positive, hard, easy))


def read_pos_doc(row: Row, source: str) -> Record:
    """NeMo's rows: query or question, pos_doc, neg_doc; a document is a text or `{"text"}`."""
    field = "query" if "query" in row else "question"
    positive = _documents(row["pos_doc"], "pos_doc", source)
    _require_some(positive, "pos_doc", source)
    negatives = () if row.get("neg_doc") is None else _documents(row["neg_doc"], "neg_doc", source)
    return Record(query=check_text(row[field], field, source), positive=positive, negatives=negatives,
                  instruction=None, source=source)


def _documents(value: object, name: str, source: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(titled(item, f"{name}[{index}]", source) if isinstance(item, dict)
                 else check_text(item, f"{name}[{index}]", source) for index, item in enumerate(items))


def read_labelled_documents(row: Row, source: str) -> RerankRecord:
    """A list for a reranker under `docs`: texts with labels beside them, or `{"text", "label"}` each."""
    docs = row["docs"]
    if not isinstance(docs, list) or not docs:
        raise DataError(f"{source}: docs = {shortened(docs)}: it must be a list of at least one document")
    if all(isinstance(item, dict) for item in docs):
        for index, item in enumerate(docs):
            if "label" not in item:
                raise DataError(f"{source}: docs[{index}].label is missing; add it")
        labels = tuple(number(item["label"], f"docs[{index}].label", source) for index, item in enumerate(docs))
        documents = tuple(titled(item, f"docs[{index}]", source) for index, item in enumerate(docs))
    else:
        documents = some_texts(docs, "docs", source)
        if "labels" not in row:
            raise DataError(f"{source}: labels is missing; give docs one label each")
        labels = numbers(row["labels"], "labels", source, len(documents), "docs")
    return RerankRecord(query=check_text(row["query"], "query", source), documents=documents, labels=labels,
                        instruction=optional_text(row, "instruction", source), source=source,
                        teacher_scores=optional_numbers(row, "teacher_scores", source, len(documents), "docs"))
