"""Pairs to ids: those of the stock libraries. In a template nothing but the document is ever cut."""

import jinja2.sandbox
import pytest
from transformers import AutoTokenizer

from megatron_embed.data.pair_tokenizer import (
    QWEN3_RERANKER_TEMPLATE,
    Pair,
    PairFormat,
    PairTemplate,
    PairTokenizer,
)
from megatron_embed.errors import ConfigError, DataError
from megatron_embed.export.cross_encoder import chat_template
from tests.helpers.toys import MINILM, save_bpe_tokenizer

PAIRS = [Pair(query="Which is the largest city of {document} France?", source="rows:1",
              document="Paris, of course. It lies on the Seine."),
         Pair(query="多长？", document="很长的一段话 🪐 \"quotes\" \\n and\n\nline ends",
              instruction="judge {query}"),
         Pair(query="a", document=" leading space")]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe")
    save_bpe_tokenizer(path)
    return str(path)


def template(text=QWEN3_RERANKER_TEMPLATE):
    return PairTemplate(text=text, instruction="the default")


def filled(pair):
    instruction = "the default" if pair.instruction is None else pair.instruction
    head, rest = QWEN3_RERANKER_TEMPLATE.split("{instruction}")
    middle, rest = rest.split("{query}")
    before, tail = rest.split("{document}")
    return head + instruction + middle + pair.query + before, pair.document, tail


def test_ids_are_those_of_the_whole_text(bpe):
    rows = PairTokenizer(bpe, template=template(), max_length=4000).tokenize(PAIRS)
    stock = AutoTokenizer.from_pretrained(bpe)
    assert rows.token_ids == [stock("".join(filled(pair)), add_special_tokens=False).input_ids for pair in PAIRS]
    assert rows.num_truncated == 0 and rows.token_types is None
    short = PairTokenizer(bpe, template=template(), max_length=300)
    assert short.count_tokens(PAIRS) == [len(ids) for ids in rows.token_ids]
    assert short.tokenize(PAIRS).num_truncated == sum(count > 300 for count in short.count_tokens(PAIRS))


@pytest.mark.parametrize("kept", [3, 6])
def test_only_the_document_is_cut(bpe, kept):
    stock = AutoTokenizer.from_pretrained(bpe)
    for pair in PAIRS[:2]:
        head, document, tail = (stock(text, add_special_tokens=False).input_ids for text in filled(pair))
        # The document's first token may take a space from before it: then it counts as the head's.
        whole = stock("".join(filled(pair)), add_special_tokens=False).input_ids
        assert whole[-len(tail):] == tail
        max_length = len(whole) - len(document) + kept
        (ids,) = PairTokenizer(bpe, template=template(), max_length=max_length).tokenize([pair]).token_ids
        assert len(ids) == max_length
        assert ids == whole[:max_length - len(tail)] + tail
        assert len(ids) > len(head) + len(tail) - 1


def test_a_pair_that_leaves_no_room_is_refused(bpe):
    tokenizer = PairTokenizer(bpe, template=template(), max_length=260)
    with pytest.raises(DataError, match="^rows:1: the query .* leaves none for the document"):
        tokenizer.tokenize([Pair(query="word " * 200, document="a document", source="rows:1")])
    with pytest.raises(DataError, match="leaves none"):
        tokenizer.check_query_length([Pair(query="word " * 200, document="a document", source="rows:1")])
    tokenizer.check_query_length([Pair(query="short", document="a document " * 100)])


def test_encoders_take_a_pair_of_texts():
    tokenizer = PairTokenizer(str(MINILM), template=None, max_length=16)
    stock = AutoTokenizer.from_pretrained(str(MINILM))
    rows = tokenizer.tokenize(PAIRS)
    for pair, ids, types in zip(PAIRS, rows.token_ids, rows.token_types, strict=True):
        encoded = stock(pair.query, pair.document, truncation="longest_first", max_length=16)
        assert (ids, types) == (encoded.input_ids, encoded.token_type_ids)
        assert 1 in types and len(ids) <= 16
    assert rows.num_truncated == 2
    long = Pair(query="word " * 20, document="a document")
    assert tokenizer.tokenize([long]).token_ids == [stock("word " * 20, "a document", truncation=True,
                                                          max_length=16).input_ids]
    tokenizer.check_query_length([long])
    with pytest.raises(DataError, match="leaves none"):  # before training
        tokenizer.check_query_length([long], strict=True)
    with pytest.raises(ConfigError, match="special tokens alone"):
        PairTokenizer(str(MINILM), template=None, max_length=3).tokenize([long])


def test_a_prompt_stands_before_the_query_of_a_pair():
    stock = AutoTokenizer.from_pretrained(str(MINILM))
    tokenizer = PairTokenizer(str(MINILM), template=None, max_length=64, pair_format=PairFormat(prompt="judge: "))
    rows = tokenizer.tokenize(PAIRS)
    assert rows.token_ids == [stock("judge: " + pair.query, pair.document).input_ids for pair in PAIRS]
    assert tokenizer.count_tokens(PAIRS) == [len(ids) for ids in rows.token_ids]


def test_an_unread_token_is_left_out_at_the_end_alone(bpe):
    stock = AutoTokenizer.from_pretrained(bpe)
    pad = stock.pad_token_id
    tokenizer = PairTokenizer(bpe, template=None, max_length=64,
                              pair_format=PairFormat(unread=pad, token_types=0))
    ends = Pair(query="a<|endoftext|>b", document="c<|endoftext|><|endoftext|>")
    rows = tokenizer.tokenize([ends, Pair(query="<|endoftext|>", document="<|endoftext|>")])
    whole = stock(ends.query, ends.document).input_ids
    assert whole[-2:] == [pad, pad] and whole.count(pad) == 3
    assert rows.token_ids == [whole[:-2], [pad]]  # where there is nothing else, the stock class reads the first
    assert tokenizer.last_token() == stock("b").input_ids[-1]


@pytest.mark.parametrize("text, message", [
    ("{query} only", "{document} occurs 0 times"), ("{query} {document} {document}", "{document} occurs 2 times"),
    ("{document} then {query}", "document} comes before {query}")])
def test_templates_that_cannot_work(text, message):
    with pytest.raises(ConfigError, match="reranker.template") as error:
        template(text)
    assert message in str(error.value)


def test_answers_must_be_single_tokens(bpe):
    tokenizer = PairTokenizer(bpe, template=template(), max_length=100)
    assert tokenizer.token_of("yes", "reranker.true_token") != tokenizer.token_of(" yes", "reranker.true_token")
    with pytest.raises(ConfigError, match="reranker.true_token = 'certainly not': is [0-9]+ tokens"):
        tokenizer.token_of("certainly not", "reranker.true_token")


def test_chat_template_renders_the_prompt_exactly():
    """As Transformers and vLLM render it, white space at the end and all."""
    engine = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = QWEN3_RERANKER_TEMPLATE + "{% raw %} }} {{ 'x' }}\t\\n é 🪐\n"
    prompt = template(text)
    compiled = engine.from_string(chat_template(prompt.pieces(), prompt.instruction))
    for pair in PAIRS:
        messages = [{"role": "query", "content": pair.query}, {"role": "document", "content": pair.document}]
        if pair.instruction is not None:
            messages.insert(0, {"role": "system", "content": pair.instruction})
        assert compiled.render(messages=messages) == prompt.fill(pair)[0]
