"""Texts without tokens, found before the first step if that costs little."""

from collections.abc import Iterable
from typing import TypeVar

from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.records import documents_in_use
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import EmptyTextError
from megatron_embed.names import Role

Label = TypeVar("Label")

_UNKNOWN = "\ue000"
"""A character for private use: no vocabulary holds it."""
_CHUNK_TEXTS = 1024


def first_empty_text(texts: Iterable[tuple[Label, str]], role: Role, tokenizer: RoleTokenizer,
                     prompt: str | None = None) -> tuple[Label, str] | None:
    """The first labelled text that has no tokens; None if all have some.

    Costs nothing if special tokens, an EOS or the prompt come with every text. A tokenizer with tokens for every
    letter can still drop blanks and control characters: then only texts without letters and digits are tokenized,
    unless a multi-vector model's skip list holds some.

    `prompt`: of a data set, in place of the role's.
    """
    if tokenizer.always_adds_tokens(role, prompt):
        return None
    drops_letters = tokenizer.skips_letters(role) or not tokenizer.tokenize(
        [_UNKNOWN], role, prompts=[prompt]).token_ids[0]
    waiting: list[tuple[Label, str]] = []
    for item in texts:
        if drops_letters or not any(character.isalnum() for character in item[1]):
            waiting.append(item)
        if len(waiting) == _CHUNK_TEXTS:
            if (empty := _first_empty(waiting, role, tokenizer, prompt)) is not None:
                return empty
            waiting.clear()
    return _first_empty(waiting, role, tokenizer, prompt)


def _first_empty(texts: list[tuple[Label, str]], role: Role, tokenizer: RoleTokenizer,
                 prompt: str | None) -> tuple[Label, str] | None:
    rows = tokenizer.tokenize([text for _, text in texts], role, prompts=[prompt] * len(texts)).token_ids
    return next((item for item, ids in zip(texts, rows, strict=True) if not ids), None)


def refuse_empty_rows(records: RecordSet, tokenizer: RoleTokenizer, num_negatives: int,
                      num_positives: int = 1) -> None:
    """Raises EmptyTextError, beginning `FILE:LINE: `, if a text that training uses has no tokens.

    No communication. Reads every row where the tokenizer may give no tokens.
    """
    for file in records.files:
        queries = ((row, record.query) for row, record in enumerate(file))
        documents = ((row, text) for row, record in enumerate(file)
                     for text in documents_in_use(record, num_negatives, num_positives))
        roles: tuple[tuple[Role, Iterable[tuple[int, str]], str | None], ...] = (
            ("query", queries, file.file.query_prompt), ("document", documents, file.file.document_prompt))
        for role, texts, prompt in roles:
            if (empty := first_empty_text(texts, role, tokenizer, prompt)) is not None:
                row, text = empty
                raise EmptyTextError(row, file[row].source, text)
