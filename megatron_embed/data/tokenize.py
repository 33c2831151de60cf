"""Writes the token ids of all rows of a run into a cache."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from tqdm import tqdm

from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.records import AnyRecord, Record
from megatron_embed.data.token_cache import Prompted, TokenCacheWriter
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.names import ROLES

ROWS_AT_ONCE = 2048


def tokenize_rows(records: RecordSet, tokenizer: RoleTokenizer, directory: str,
                  settings: Mapping[str, Any]) -> tuple[int, int]:
    """Write the cache; the numbers of different texts and of tokens.

    Args:
        settings: all that decides the ids, by name.
    Raises:
        UserError: a row cannot be used, or the directory cannot be written.
    """
    rows = iter(records)
    with TokenCacheWriter(directory, settings, tokenizer.largest_id) as writer, \
            tqdm(total=len(records), unit="row", desc="tokenize", disable=None) as bar:
        while block := list(islice(rows, ROWS_AT_ONCE)):
            new = writer.new(prompted_texts(block, tokenizer))
            for role in ROLES:
                if texts := [text for text in new if text.role == role]:
                    writer.add(texts, tokenizer.tokenize_prompted(texts))
            bar.update(len(block))
        return writer.finish(), writer.num_tokens


def prompted_texts(records: Sequence[AnyRecord], tokenizer: RoleTokenizer) -> Iterator[Prompted]:
    """All texts of the rows with their prompts."""
    for record in records:
        assert isinstance(record, Record)
        yield Prompted("query", tokenizer.fill_prompt("query", record.instruction, record.query_prompt), record.query)
        prompt = tokenizer.fill_prompt("document", None, record.document_prompt)
        for text in (*record.positive, *record.negatives):
            yield Prompted("document", prompt, text)
