"""Texts without tokens are found without tokenizing what cannot be one."""

import json

import pytest

from megatron_embed.config.vector_format import PUNCTUATION, VectorFormat
from megatron_embed.data.empty_texts import first_empty_text
from megatron_embed.data.tokenizer import RoleTokenizer, TextFormat
from tests.helpers.toys import MINILM

BLANK = "\u200b"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """No special tokens; unknown words become [UNK], zero-width blanks nothing."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": BLANK}, "content": ""},
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}))
    return str(folder)


def open_tokenizer(directory, **settings):
    return RoleTokenizer(directory, add_eos=settings.pop("add_eos", False), query_max_length=9, document_max_length=9,
                         **settings)


@pytest.mark.parametrize("before", [0, 1, 1023, 1024, 3000])
def test_the_first_text_without_tokens(directory, before):
    texts = [(f"line {index}", "..." if index % 2 else "a strange text") for index in range(before)]
    texts += [("bad", BLANK), ("good", "a"), ("worse", BLANK * 2)]
    assert first_empty_text(texts, "document", open_tokenizer(directory)) == ("bad", BLANK)
    del texts[-1], texts[-2]
    assert first_empty_text(texts[:-1], "document", open_tokenizer(directory)) is None


def test_only_texts_without_letters_are_tokenized(directory, monkeypatch):
    tokenizer, seen = open_tokenizer(directory), []
    original = tokenizer.tokenize
    monkeypatch.setattr(tokenizer, "tokenize", lambda texts, role, **_: seen.extend(texts) or original(texts, role))
    assert first_empty_text([(0, "a b"), (1, "?!"), (2, "深度"), (3, "7")], "query", tokenizer) is None
    assert seen[1:] == ["?!"]


@pytest.mark.parametrize("settings", [{"add_eos": True}, {"document_prompt": "a "}])
def test_nothing_is_read_where_every_text_gets_a_token(directory, settings):
    def unread():
        raise AssertionError
        yield

    tokenizer = open_tokenizer(directory, **settings)
    assert tokenizer.tokenize([BLANK], "document").token_ids[0]
    assert first_empty_text(unread(), "document", tokenizer) is None


@pytest.mark.parametrize("words, texts, first", [
    (["."], ["a", ". .", "b"], None), (["[UNK]"], ["a", "a x", ". .", "b"], ". ."),
    (["b"], ["a", "a b", "b b", "b"], "b b")])
def test_a_text_of_the_skip_list_alone_is_found(directory, words, texts, first):
    """Words with letters, and ones that are unknown to the vocabulary, too; only documents skip them."""
    tokenizer = open_tokenizer(directory, text_format=TextFormat(vectors=VectorFormat(skiplist_words=tuple(words))))
    labelled = list(enumerate(texts))
    assert first_empty_text(labelled, "query", tokenizer) is None
    assert first_empty_text(labelled, "document", tokenizer) == (None if first is None else (texts.index(first), first))


def test_a_prompt_of_the_skip_list_gives_no_vector(directory):
    vectors = VectorFormat(skiplist_words=("b",))
    skipped, kept = (open_tokenizer(directory, document_prompt=prompt, text_format=TextFormat(vectors=vectors))
                     for prompt in ("b ", "a "))
    assert first_empty_text([(0, "a"), (1, "b")], "document", skipped) == (1, "b")
    assert first_empty_text([(0, "a"), (1, "b")], "document", kept) is None


def test_special_tokens_of_a_document_of_punctuation_give_vectors():
    """As in ColBERT: [CLS] and [SEP] are no punctuation, so nothing is refused."""
    vectors = VectorFormat(skiplist_words=PUNCTUATION)
    tokenizer = open_tokenizer(str(MINILM), text_format=TextFormat(vectors=vectors))
    assert first_empty_text([(0, "... !")], "document", tokenizer) is None
    assert tokenizer.tokenize(["... !"], "document").kept == [[True, False, False, False, False, True]]


def test_an_empty_prompt_of_the_other_role_helps_nobody(directory):
    tokenizer = open_tokenizer(directory, query_prompt="a ")
    assert first_empty_text([(0, BLANK)], "query", tokenizer) is None
    assert first_empty_text([(0, BLANK)], "document", tokenizer) == (0, BLANK)
