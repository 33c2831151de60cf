"""Rows of other trainers, one function per format: the fields of a row -> record. formats.py says which applies.

The formats are those of ms-swift 4.6, FlagEmbedding 1.4, Tevatron 3.0, Sentence Transformers 6.2, DPR, NeMo Automodel.
"""

import re
from typing import Any

from megatron_embed.data.jsonl import check_text, json_type, shortened
from megatron_embed.data.records import Record, RerankRecord, id_from_text
from megatron_embed.data.row_fields import Fields, Passages, number, titled, trusted_title
from megatron_embed.errors import DataError

NEGATIVE_COLUMN = re.compile(r"negative(_\d+)?")
LABEL_COLUMNS = ("label", "labels", "score", "scores")


def _ids(*parts: Passages) -> tuple[str, ...] | None:
    """The ids of all parts; where some have none, ids made from their texts. None where no part has any."""
    if not any(ids for _, ids in parts):
        return None
    return tuple(name for texts, ids in parts for name in (map(id_from_text, texts) if ids is None else ids))


def _require_some(documents: tuple[str, ...], name: str, source: str) -> None:
    if not documents:
        raise DataError(f"{source}: {name} = [] is empty; give it at least one passage or remove the row")


def read_swift_response(fields: Fields) -> Record | RerankRecord:
    """ms-swift's older rows: query and response, then rejected_response or label; `system` is the instruction.

    With `labels` or `scores`: a list of Sentence Transformers' miner, made from such rows.
    """
    source = fields.source
    if fields.row.get("labels") is not None or fields.row.get("scores") is not None:
        return read_columns(fields, "query", "response")
    if history := fields.row.get("history"):
        raise DataError(f"{source}: history = {shortened(history)}: a conversation of several turns is not a query; "
                        "write its text into query")
    score, negatives = fields.optional_number("label"), fields.optional_texts("rejected_response")
    if score is not None and negatives:
        raise DataError(f"{source}: label and rejected_response are both given; keep label for a pair with a score, or "
                        "rejected_response for negatives")
    positive = fields.some_texts("response")
    if score is not None and len(positive) > 1:
        raise DataError(f"{source}: response has {len(positive)} texts and one label; write one row for each")
    return Record(query=fields.text("query"), positive=positive, negatives=negatives, score=score,
                  instruction=fields.optional_text("system"), source=source)


def read_swift_messages(fields: Fields) -> Record:
    """ms-swift's rows of messages; the system message is the instruction."""
    row, source = fields.row, fields.source
    instruction, query = _messages(row["messages"], "messages", fields, system=True)
    positive = _message_lists(row["positive_messages"], "positive_messages", fields)
    if not positive:
        raise DataError(f"{source}: positive_messages = [] is empty; give it at least one list of messages or remove "
                        "the row")
    negatives = ()
    if row.get("negative_messages") is not None:
        negatives = _message_lists(row["negative_messages"], "negative_messages", fields)
    score = fields.optional_number("label")
    if score is not None and (negatives or len(positive) > 1):
        raise DataError(f"{source}: label is given with {len(positive)} positives and {len(negatives)} negatives; a "
                        "pair with a score has one positive and no negatives")
    return Record(query=query, positive=positive, negatives=negatives, instruction=instruction, source=source,
                  score=score)


def _message_lists(lists: Any, name: str, fields: Fields) -> tuple[str, ...]:
    if not isinstance(lists, list):
        raise DataError(f"{fields.source}: {name} = {shortened(lists)}: it must be a list of lists of messages")
    return tuple(_messages(messages, f"{name}[{index}]", fields, system=False)[1]
                 for index, messages in enumerate(lists))


def _messages(messages: Any, name: str, fields: Fields, *, system: bool) -> tuple[str | None, str]:
    """(system message, the one other message) of a list of messages."""
    if not fields.trusted:
        _check_messages(messages, name, fields.source, system=system)
    # The other message is the last one: only the first may be the system's.
    instruction = messages[0]["content"] if messages[0]["role"] == "system" else None
    return instruction, messages[-1]["content"]


def _check_messages(messages: object, name: str, source: str, *, system: bool) -> None:
    """Refuse what is not one message of the user or assistant, with one of the system before it if that is allowed."""
    if not isinstance(messages, list):
        raise DataError(f"{source}: {name} = {shortened(messages)} is a JSON {json_type(messages)}; it must be a list "
                        'of messages such as {"role": "user", "content": ...}')
    num_texts = 0
    for index, message in enumerate(messages):
        field = f"{name}[{index}]"
        if not isinstance(message, dict) or "content" not in message or "role" not in message:
            raise DataError(f"{source}: {field} = {shortened(message)}: it must be a message such as "
                            '{"role": "user", "content": ...}')
        check_text(message["content"], f"{field}.content", source)
        if message["role"] in ("user", "assistant"):
            num_texts += 1
        elif message["role"] != "system" or not system or index:
            raise DataError(f"{source}: {field}.role = {shortened(message['role'])}: it must be user or assistant"
                            f"{', or system in the first message' if system else ''}")
    if num_texts != 1:
        raise DataError(f"{source}: {name} holds {num_texts} messages beside the system's; a text is one message")


def read_flag_embedding(fields: Fields) -> Record:
    """FlagEmbedding's and KaLM's rows: query, pos, neg, and a teacher's pos_scores and neg_scores."""
    row, source = fields.row, fields.source
    positive, negatives = fields.some_texts("pos"), fields.optional_texts("neg")
    positive_scores = fields.optional_numbers("pos_scores", len(positive), "texts of pos")
    negative_scores = fields.optional_numbers("neg_scores", len(negatives), "texts of neg")
    if (positive_scores is None) != (negative_scores is None) and negatives:
        given, missing = ("pos", "neg") if negative_scores is None else ("neg", "pos")
        raise DataError(f"{source}: {given}_scores is given without {missing}_scores; give both or neither")
    scores = None if positive_scores is None else (*positive_scores, *(negative_scores or ()))
    ids = _ids((positive, _flag_ids(row.get("pos_id"), positive)), (negatives, _flag_ids(row.get("neg_id"), negatives)))
    return Record(query=fields.text("query"), positive=positive, negatives=negatives, teacher_scores=scores,
                  source=source, document_ids=ids,
                  instruction=None if row.get("prompt") in (None, "") else fields.text("prompt"))


def _flag_ids(value: object, texts: tuple[str, ...]) -> tuple[str, ...] | None:
    """Ids of these texts, None unless the list has one for each: files in the wild have other things there too."""
    if not isinstance(value, list) or len(value) != len(texts):
        return None
    ids = tuple(str(item) for item in value if (isinstance(item, int) and not isinstance(item, bool))
                or (isinstance(item, str) and item.strip()))
    return ids if len(ids) == len(texts) else None


def read_tevatron_passages(fields: Fields) -> Record:
    """Tevatron's older rows: positive_passages and negative_passages with title and text."""
    positive = fields.passages("positive_passages")
    _require_some(positive[0], "positive_passages", fields.source)
    negatives = fields.optional_passages("negative_passages")
    return Record(query=fields.text("query"), positive=positive[0], negatives=negatives[0], instruction=None,
                  source=fields.source, document_ids=_ids(positive, negatives))


def read_tevatron_ids(fields: Fields) -> Record:
    """Tevatron's newer rows: ids into a corpus, which stand in the place of the texts until they are looked up."""
    for name in ("query_image", "query_video", "query_audio"):
        if (value := fields.row.get(name)) is not None:
            raise DataError(f"{fields.source}: {name} = {shortened(value)}: only texts can be trained on; remove the "
                            "row")
    positive = fields.ids("positive_document_ids")
    _require_some(positive, "positive_document_ids", fields.source)
    negatives = fields.optional_ids("negative_document_ids")
    return Record(query=fields.text("query_text" if "query_text" in fields.row else "query"), positive=positive,
                  negatives=negatives, instruction=None, source=fields.source, document_ids=(*positive, *negatives))


def read_tevatron_scores(fields: Fields) -> Record:
    """Tevatron's rows for distillation: passages, the positive first, and a teacher's score of each."""
    texts, ids = fields.passages("passages")
    _require_some(texts, "passages", fields.source)
    return Record(query=fields.text("query"), positive=texts[:1], negatives=texts[1:], instruction=None,
                  source=fields.source, document_ids=ids,
                  teacher_scores=fields.numbers("scores", len(texts), "passages"))


def read_columns(fields: Fields, anchor: str, positive: str) -> Record | RerankRecord:
    """Sentence Transformers' columns: two texts and a label, a list with labels or scores, or a positive and negative,
    negative_1, ...

    A label beside negatives is a teacher's: a score of each document, or its margin to each negative (MarginMSELoss).
    """
    row, source = fields.row, fields.source
    positives = fields.some_texts(positive)
    # The order of the columns is Sentence Transformers' order of the negatives.
    negatives = tuple(text for name in row if NEGATIVE_COLUMN.fullmatch(name) for text in fields.optional_texts(name))
    labels = [name for name in LABEL_COLUMNS if row.get(name) is not None]
    if len(labels) > 1:
        raise DataError(f"{source}: {labels[0]} and {labels[1]} are both given; keep one")
    score = scores = None
    if labels and negatives:
        scores = _teacher_scores(fields, labels[0], len(positives), len(negatives))
    elif labels and isinstance(row[labels[0]], list):
        return _mined_list(fields, anchor, positive, labels[0])
    elif labels and len(positives) == 1:
        score = fields.number(labels[0])
    elif labels:
        raise DataError(f"{source}: {positive} has {len(positives)} texts and one {labels[0]}; write one row for each")
    return Record(query=fields.text(anchor), positive=positives, negatives=negatives,
                  instruction=fields.optional_text("instruction"), source=source, score=score, teacher_scores=scores)


def _mined_list(fields: Fields, anchor: str, positive: str, name: str) -> RerankRecord:
    """A `labeled-list` of mine_hard_negatives: documents with a label each, or the positive first and a similarity for
    each, which is a teacher's score."""
    documents = fields.some_texts(positive)
    values = fields.numbers(name, len(documents), f"texts of {positive}")
    is_label = name in ("label", "labels")
    return RerankRecord(query=fields.text(anchor), documents=documents, source=fields.source,
                        labels=values if is_label else (1.0, *(0.0 for _ in documents[1:])),
                        instruction=fields.optional_text("instruction"), teacher_scores=None if is_label else values)


def _teacher_scores(fields: Fields, name: str, num_positive: int, num_negatives: int) -> tuple[float, ...]:
    """A score per document; of margins to the negatives, the negatives' scores where the positive has 0."""
    value = fields.row[name]
    if num_positive == 1 and not isinstance(value, list) and num_negatives == 1:
        return 0.0, -fields.number(name)
    if num_positive == 1 and isinstance(value, list) and len(value) == num_negatives:
        return 0.0, *(-margin for margin in fields.numbers(name, num_negatives, "negatives"))
    return fields.numbers(name, num_positive + num_negatives, "documents")


def read_dpr(fields: Fields) -> Record:
    """DPR's rows: positive_ctxs, hard_negative_ctxs, and negative_ctxs behind these."""
    keys = ("passage_id", "psg_id")
    positive = fields.passages("positive_ctxs", keys)
    _require_some(positive[0], "positive_ctxs", fields.source)
    hard = fields.optional_passages("hard_negative_ctxs", keys)
    easy = fields.optional_passages("negative_ctxs", keys)
    return Record(query=fields.text("question"), positive=positive[0], negatives=(*hard[0], *easy[0]),
                  instruction=None, source=fields.source, document_ids=_ids(positive, hard, easy))


def read_pos_doc(fields: Fields) -> Record:
    """NeMo's rows: query or question, pos_doc, neg_doc; a document is a text or `{"text"}`."""
    positive = _documents(fields, "pos_doc")
    _require_some(positive, "pos_doc", fields.source)
    negatives = () if fields.row.get("neg_doc") is None else _documents(fields, "neg_doc")
    return Record(query=fields.text("query" if "query" in fields.row else "question"), positive=positive,
                  negatives=negatives, instruction=None, source=fields.source)


def _documents(fields: Fields, name: str) -> tuple[str, ...]:
    documents = fields.row[name] if isinstance(fields.row[name], list) else [fields.row[name]]
    if fields.trusted:
        return tuple(trusted_title(item) if isinstance(item, dict) else item for item in documents)
    return tuple(titled(item, f"{name}[{index}]", fields.source) if isinstance(item, dict)
                 else check_text(item, f"{name}[{index}]", fields.source) for index, item in enumerate(documents))


def read_labelled_documents(fields: Fields) -> RerankRecord:
    """A list for a reranker under `docs`: texts with labels beside them, or `{"text", "label"}` each."""
    row, source = fields.row, fields.source
    docs = row["docs"]
    if not isinstance(docs, list) or not docs:
        raise DataError(f"{source}: docs = {shortened(docs)}: it must be a list of at least one document")
    if all(isinstance(item, dict) for item in docs):
        for index, item in enumerate(docs):
            if "label" not in item:
                raise DataError(f"{source}: docs[{index}].label is missing; add it")
        labels = tuple(number(item["label"], f"docs[{index}].label", source) for index, item in enumerate(docs))
        documents = _documents(fields, "docs")
    else:
        documents = fields.some_texts("docs")
        if "labels" not in row:
            raise DataError(f"{source}: labels is missing; give docs one label each")
        labels = fields.numbers("labels", len(documents), "docs")
    return RerankRecord(query=fields.text("query"), documents=documents, labels=labels,
                        instruction=fields.optional_text("instruction"), source=source,
                        teacher_scores=fields.optional_numbers("teacher_scores", len(documents), "docs"))
