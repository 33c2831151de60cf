import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_embed.data.pair_tokenizer import PairTokenizer
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import CheckpointError, ConfigError
from tests.data.conftest import MINI_EN, MINI_ZH, real_texts

TEXTS = [*real_texts(MINI_ZH, 40), *real_texts(MINI_EN, 40), "  two  spaces ", "\n\tx", "[SEP] <|endoftext|> <|end|>",
         "e\u0301 \U0001f600", "x"]
DIRECTORIES = ["minilm_dir", "bpe_dir", "bpe_final_dir", "bpe_bos_dir"]
PROMPT = "Instruct: find the passage\nQuery:"


def make(directory: str, *, add_eos: bool = True, query_max_length: int = 10**6, document_max_length: int = 10**6,
         query_prompt: str = "", document_prompt: str = "") -> RoleTokenizer:
    return RoleTokenizer(directory, add_eos=add_eos, query_prompt=query_prompt, document_prompt=document_prompt,
                         query_max_length=query_max_length, document_max_length=document_max_length)


@pytest.fixture(params=DIRECTORIES)
def directory(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("prompt", ["", "query: ", PROMPT])
def test_ids_are_those_of_the_stock_tokenizer(directory: str, prompt: str):
    stock = AutoTokenizer.from_pretrained(directory)
    expected = [stock(prompt + text, truncation=False, padding=False)["input_ids"] for text in TEXTS]
    assert max(len(ids) for ids in expected) > 100  # the truncation left in the fixture's file is not in force
    tokenizer = make(directory, add_eos=False, query_prompt=prompt)
    rows = tokenizer.tokenize(TEXTS, "query")
    assert rows.token_ids == expected
    assert rows.num_truncated == 0
    assert tokenizer.tokenize(TEXTS, "document").token_ids == [
        stock(text, truncation=False, padding=False)["input_ids"] for text in TEXTS]


def test_eos_is_added_only_where_the_tokenizer_ends_a_text_with_nothing(directory: str):
    without = make(directory, add_eos=False).tokenize(TEXTS, "document").token_ids
    with_eos = make(directory, add_eos=True).tokenize(TEXTS, "document").token_ids
    added = [] if directory.endswith(("model", "bpe_final")) else [1]  # 1 is <|end|>
    assert with_eos == [ids + added for ids in without]


@pytest.mark.parametrize("max_length", [24, 30, 57])
def test_truncation_takes_the_end_of_the_text_alone(directory: str, max_length: int):
    whole = make(directory, query_prompt="query: ").tokenize(TEXTS, "query").token_ids
    tokenizer = make(directory, query_prompt="query: ", query_max_length=max_length)
    rows = tokenizer.tokenize(TEXTS, "query")
    tail = 1  # each of the four ends a sequence with one token, its own or the EOS
    expected = [ids if len(ids) <= max_length else ids[:max_length - tail] + ids[-tail:] for ids in whole]
    assert rows.token_ids == expected
    num_longer = sum(len(ids) > max_length for ids in whole)
    assert 0 < num_longer < len(TEXTS)
    assert rows.num_truncated == num_longer
    assert len({ids[-1] for ids in rows.token_ids}) == 1


def test_each_role_has_its_own_length_and_prompt(minilm_dir: str):
    tokenizer = make(minilm_dir, query_max_length=8, document_max_length=16, document_prompt="passage: ")
    assert {len(ids) for ids in tokenizer.tokenize(TEXTS[:20], "query").token_ids} == {8}
    documents = tokenizer.tokenize(TEXTS[:20], "document").token_ids
    assert max(len(ids) for ids in documents) == 16
    stock = AutoTokenizer.from_pretrained(minilm_dir)
    start = stock("passage: ")["input_ids"][:-1]
    assert all(ids[:len(start)] == start for ids in documents)
    assert tokenizer.tokenize([], "query").token_ids == []


def test_instructions_fill_the_prompt_row_by_row(bpe_dir: str):
    stock = AutoTokenizer.from_pretrained(bpe_dir)
    tokenizer = make(bpe_dir, add_eos=False, query_prompt="{instruction} {x}\nQuery:")
    assert tokenizer.needs_instructions
    rows = tokenizer.tokenize(["a", "b"], "query", ["find it", "judge"])
    assert rows.token_ids == [stock(text, truncation=False, padding=False)["input_ids"]
                              for text in ("find it {x}\nQuery:a", "judge {x}\nQuery:b")]
    with pytest.raises(ConfigError, match="data.query_prompt = .* needs an instruction and the row has none; give"):
        tokenizer.tokenize(["a"], "query", [None])
    with pytest.raises(ConfigError, match="needs an instruction"):
        tokenizer.tokenize(["a"], "query")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:7: data.query_prompt = .* needs an instruction"):
        tokenizer.check_prompts({"fine": "rows.jsonl:1", None: "rows.jsonl:7"})
    with pytest.raises(ConfigError, match="data.document_prompt = '{instruction} ': only data.query_prompt can hold"):
        make(bpe_dir, document_prompt="{instruction} ")


def test_a_prompt_without_room_for_text_is_refused(minilm_dir: str):
    prompt = "a b c d e f"  # six tokens, and two special ones
    make(minilm_dir, query_prompt=prompt, query_max_length=9)
    message = ("data.query_max_length = 8 tokens: the prompt 'a b c d e f' and the special tokens take 8 of them, "
               "which leaves none for text; raise it or use a shorter query prompt")
    with pytest.raises(ConfigError, match=message):
        make(minilm_dir, query_prompt=prompt, query_max_length=8)
    with pytest.raises(ConfigError, match="data.document_max_length = 8 tokens"):
        make(minilm_dir, document_prompt=prompt, document_max_length=8)
    filled = make(minilm_dir, query_prompt="{instruction} ", query_max_length=8)
    filled.tokenize(["x"], "query", ["a b c d e"])
    with pytest.raises(ConfigError, match="rows:3: data.query_max_length = 8 tokens: the prompt 'a b c d e f '"):
        filled.check_prompts({prompt: "rows:3"})


def test_ids_and_lengths_that_others_need(minilm_dir: str, bpe_dir: str, bpe_final_dir: str, bpe_bos_dir: str):
    tokenizers = [make(directory) for directory in (minilm_dir, bpe_dir, bpe_final_dir, bpe_bos_dir)]
    assert [t.pad_token_id for t in tokenizers] == [0, 0, 0, 1]  # the last has no padding token: its EOS
    assert [t.eos_token_id for t in tokenizers] == [None, 1, 1, 1]


def test_long_texts_raise_no_warning(minilm_dir: str, caplog: pytest.LogCaptureFixture,
                                     capfd: pytest.CaptureFixture[str]):
    with caplog.at_level(logging.WARNING):
        rows = make(minilm_dir, query_max_length=20).tokenize(["word " * 2000], "query")
    assert [len(ids) for ids in rows.token_ids] == [20]
    assert not caplog.records
    assert "Token indices" not in capfd.readouterr().err


def test_two_threads_share_a_tokenizer(minilm_dir: str):
    tokenizer = make(minilm_dir)
    expected = tokenizer.tokenize(TEXTS, "query").token_ids
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(
        all(tokenizer.tokenize(TEXTS, "query").token_ids == expected for _ in range(5)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


def test_directories_without_a_usable_tokenizer_are_refused(tmp_path: Path, minilm_dir: str, bpe_dir: str):
    with pytest.raises(CheckpointError, match="gone: no such directory; name a model directory with tokenizer files"):
        make(str(tmp_path / "gone"))
    # Transformers answers this one with an empty vocabulary.
    shutil.copy(Path(minilm_dir) / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no tokenizer files; copy tokenizer.json"):
        make(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the tokenizer cannot be loaded: ") as caught:
        make(str(tmp_path))
    assert "\n" not in str(caught.value)

    no_eos = tmp_path / "no_eos"
    shutil.copytree(bpe_dir, no_eos)
    settings = json.loads((no_eos / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (no_eos / "tokenizer_config.json").write_text(json.dumps(settings))
    make(str(no_eos), add_eos=False)
    with pytest.raises(CheckpointError, match="its tokenizer names no eos_token, which last-token pooling needs"):
        make(str(no_eos))


def test_prompts_of_a_data_set_come_in_place_of_the_roles(bpe_dir: str):
    """Row by row, under truncation too, with the EOS kept and the instruction in its place."""
    settings = {"add_eos": True, "query_max_length": 24, "document_max_length": 12}
    tokenizer = RoleTokenizer(bpe_dir, query_prompt="global: ", document_prompt="text: ", **settings)
    texts, prompts = ["one", "two " * 30, "three"], ["{instruction} -> ", "set: ", None]
    tokenized = tokenizer.tokenize(texts, "query", ["find", "unused", "unused"], prompts)
    for row, (text, prompt) in enumerate(zip(texts, ["find -> ", "set: ", "global: "], strict=True)):
        alone = RoleTokenizer(bpe_dir, query_prompt=prompt, **settings)
        assert tokenized.token_ids[row] == alone.tokenize([text], "query").token_ids[0]
        assert tokenized.token_ids[row][-1] == tokenizer.eos_token_id
    assert (tokenized.num_truncated, len(tokenized.token_ids[1])) == (1, 24)
    assert tokenizer.count_tokens(texts, "query", ["find"] * 3, prompts)[::2] == [
        len(tokenized.token_ids[0]), len(tokenized.token_ids[2])]
    assert tokenizer.count_tokens(texts, "query", ["find"] * 3, prompts)[1] > 24
    without = tokenizer.tokenize(["a"], "document", prompts=[""]).token_ids[0]
    assert without == RoleTokenizer(bpe_dir, **settings).tokenize(["a"], "document").token_ids[0]
    assert without != tokenizer.tokenize(["a"], "document").token_ids[0]


def test_prompts_of_a_data_set_are_checked_before_the_first_step(bpe_dir: str):
    tokenizer = RoleTokenizer(bpe_dir, add_eos=False, query_max_length=9, document_max_length=9)
    tokenizer.check_prompts({None: "rows.jsonl:1", "x": "rows.jsonl:2"}, "q: ", "d: ")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: data.query_prompt = .* needs an instruction"):
        tokenizer.check_prompts({None: "rows.jsonl:1"}, "{instruction}: ")
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: data.document_max_length = 9 tokens: the prompt"):
        tokenizer.check_prompts({None: "rows.jsonl:1"}, None, "far too long for nine tokens of this tokenizer: ")


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows_is_refused(minilm_dir):
    size = max(AutoTokenizer.from_pretrained(minilm_dir).get_vocab().values()) + 1
    lengths = {"add_eos": False, "query_max_length": 9, "document_max_length": 9}
    assert RoleTokenizer(minilm_dir, vocab_size=size, **lengths).tokenize(["a"], "query").token_ids
    with pytest.raises(CheckpointError, match=rf"the id {size - 1}, but the model ends at id {size - 2} .*vocab_size = "
                                              rf"{size - 1}\); copy the model's own tokenizer"):
        RoleTokenizer(minilm_dir, vocab_size=size - 1, **lengths)
    with pytest.raises(CheckpointError, match="ends at id"):
        PairTokenizer(minilm_dir, template=None, max_length=9, vocab_size=size - 1)


def test_added_tokens_without_a_row_are_harmless_until_a_text_holds_one(minilm_dir, tmp_path):
    directory = shutil.copytree(minilm_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    size = len(tokenizer)
    tokenizer.add_tokens(["<mark>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    tokenizer.save_pretrained(directory)
    lengths = {"add_eos": False, "query_max_length": 9, "document_max_length": 9, "vocab_size": size}
    own = RoleTokenizer(str(directory), **lengths)
    assert own.tokenize(["a b"], "query") == RoleTokenizer(minilm_dir, **lengths).tokenize(["a b"], "query")
    assert own.pad_token_id < size
    with pytest.raises(CheckpointError, match=rf"a text holds '<mark>'.* id {size}\D.* vocab_size = {size}\)"):
        own.tokenize(["a", "a <mark>"], "query")
