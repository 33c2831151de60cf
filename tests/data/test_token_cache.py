"""The cache of token ids: the same batches, and a cache of something else is refused."""

import json
from pathlib import Path

import pytest

from megatron_embed.__main__ import main
from megatron_embed.config.data import DataConfig, TrainFile
from megatron_embed.config.load import load_config
from megatron_embed.data.dataset import open_records
from megatron_embed.data.loader import BatchLoader
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec
from megatron_embed.data.sampler import GlobalBatchSampler
from megatron_embed.data.token_cache import Prompted, TokenCache, TokenCacheWriter, TokenizedText
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError
from megatron_embed.run.preflight import read_inputs
from tests.data.test_batch_workers import assert_equal
from tests.helpers.toys import MINI_EN, MINILM

ROWS = [{"query": f"what is {row}", "positive": [f"it is {row} " + "long " * row],
         "negatives": [f"it is {row + 1}", "it is shared"], "instruction": f"find {row % 2}"} for row in range(12)]


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A run of these rows, with a prompt, an instruction and truncated texts."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({
        "model": {"path": str(MINILM)}, "training": {"global_batch_size": 4, "micro_batch_size": 2, "train_steps": 3},
        "data": {"train": [str(tmp_path / "rows.jsonl"), {"path": str(tmp_path / "rows.jsonl"), "query_prompt": "q: "}],
                 "query_prompt": "{instruction}: ", "document_max_length": 12, "query_max_length": 32,
                 "num_negatives": 2, "document_sampling": "random", "token_cache": str(tmp_path / "tokens")}}))
    return str(path)


def test_batches_are_the_same_with_the_cache(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch):
    assert main(["data", "tokenize", config]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/tokens: 24 rows, 49 different texts, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run.yaml", "tokens"]
    cached = read_inputs(load_config(config, []))
    plain = read_inputs(load_config(config, ["data.token_cache=null"]))
    with plain.task.build_loader(plain, 0, 1) as loader:
        wanted = [loader.batch(step) for step in range(7)]
    assert sum(batch.num_truncated for batch in wanted) > 0
    monkeypatch.setattr(RoleTokenizer, "_ids_of", lambda *_: pytest.fail("a text was tokenized"))
    cached.task.tokenizer._checked |= plain.task.tokenizer._checked
    with cached.task.build_loader(cached, 0, 1) as loader:
        for step, batch in enumerate(wanted):
            assert_equal(loader.batch(step), batch)


def test_a_cache_of_something_else_is_refused(config: str, tmp_path: Path, bpe_dir: str):
    assert main(["data", "tokenize", config]) == 0
    folder = str(tmp_path / "tokens")
    settings = json.loads((tmp_path / "tokens" / "cache.json").read_text())["settings"]
    assert len(TokenCache(folder, settings)) == 49
    for name, value, message in (
            ("data.document_max_length", 16, r"another data.document_max_length \(12\) than the run's \(16\); write"),
            ("data.document_prompt", "doc: ", r'another data.document_prompt \(""\) than the run\'s \("doc: "\)'),
            ("embedding.instruction", "seek", r'another embedding.instruction \(null\) than the run\'s \("seek"\)'),
            ("prompts of data.train", [[None, None, None]], r"another prompts of data.train")):
        assert name in settings
        with pytest.raises(ConfigError, match=message):
            TokenCache(folder, {**settings, name: value})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({**ROWS[0], "query": "new"}) + "\n")
    with pytest.raises(ConfigError, match=r"was made with another content of data.train"):
        read_inputs(load_config(config, []))
    with (tmp_path / "tokens" / "tokens.bin").open("ab") as file:
        file.write(b"..")
    with pytest.raises(ConfigError, match="is damaged, or of another version"):
        TokenCache(folder, settings)
    with pytest.raises(ConfigError, match=r"data.token_cache = 'elsewhere': no token cache can be read there"):
        TokenCache("elsewhere", settings)
    one, other = (RoleTokenizer(name, add_eos=False, query_max_length=8, document_max_length=8)
                  for name in (str(MINILM), bpe_dir))
    before = one.settings_of_ids()
    one.tokenize(["a b"], "query")
    assert before == one.settings_of_ids() and before["tokenizer"] == settings["tokenizer"]
    assert before["tokenizer"] != other.settings_of_ids()["tokenizer"]


def test_what_is_not_in_the_cache_is_not_found(tmp_path: Path):
    texts = [Prompted("query", "p", f"text {number}") for number in range(100)]
    with TokenCacheWriter(str(tmp_path / "cache"), {"a": 1}, 70_000) as writer:
        assert writer.new([*texts, texts[0]]) == texts
        writer.add(texts[:60], [TokenizedText([number, 65_536], number % 2 == 0) for number in range(60)])
        assert writer.new(texts) == texts[60:]
        assert writer.finish() == 60
    found = TokenCache(str(tmp_path / "cache"), {"a": 1}).find(
        [*texts, Prompted("document", "p", "text 1"), Prompted("query", "", "ptext 1")])
    assert found[:60] == [TokenizedText([number, 65_536], number % 2 == 0) for number in range(60)]
    assert found[60:] == [None] * 42


def test_a_file_is_not_replaced_and_a_link_is_followed(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in (tmp_path / "file", "/"):
        with pytest.raises(ConfigError, match=f"data.token_cache = '{name}': exists and is not a token cache"):
            TokenCacheWriter(str(name), {}, 1)
    with TokenCacheWriter(str(tmp_path / "link"), {}, 1) as writer:
        writer.add([Prompted("query", "", "text")], [TokenizedText([1], False)])
        assert writer.finish() == 1
    assert len(TokenCache(str(tmp_path / "folder"), {})) == 1 and (tmp_path / "link").is_symlink()


def test_what_is_no_cache_is_not_replaced(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "mine.txt").write_text("mine")
    assert main(["data", "tokenize", config]) == 2
    assert "exists and is not a token cache; choose another name" in capsys.readouterr().err
    assert main(["data", "tokenize", config, "data.token_cache=null"]) == 2
    assert "data.token_cache: names no directory" in capsys.readouterr().err
    assert main(["data", "tokenize", str(MINI_EN)]) == 2
    assert "takes a run's configuration (.yaml)" in capsys.readouterr().err


def test_text_of_a_row_that_the_cache_lacks_is_tokenized(tmp_path: Path):
    tokenizer = RoleTokenizer(str(MINILM), add_eos=False, query_max_length=16, document_max_length=16)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    records = open_records((TrainFile(path=str(tmp_path / "rows.jsonl")),))
    with TokenCacheWriter(str(tmp_path / "cache"), {}, tokenizer.largest_id) as writer:
        texts = [Prompted("query", "", row["query"]) for row in ROWS[:5]]
        writer.add(texts, tokenizer.tokenize_prompted(texts))
        writer.finish()
    cached = tokenizer.with_cache(TokenCache(str(tmp_path / "cache"), {}))
    sampler = GlobalBatchSampler(records, global_batch_size=4, shuffle=True, seed=1)
    with BatchLoader(records, sampler, tokenizer, PackingSpec(), DocumentsPerQuery(), dp_rank=0, dp_size=1) as plain, \
            BatchLoader(records, sampler, cached, PackingSpec(), DocumentsPerQuery(), dp_rank=0, dp_size=1) as looked:
        for step in range(4):
            assert_equal(looked.batch(step), plain.batch(step))
    with pytest.raises(ConfigError, match=r"data.token_cache = '': must name a directory or be null"):
        DataConfig(token_cache="")
