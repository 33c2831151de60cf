"""A model and rows for mining, and runs of `mine`."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from megatron_embed.mining.documents import CorpusFile
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import MINI_EN, MINILM, save_model

_FOLDERS = []


def corpus_of(texts):
    """A corpus of these texts, in a file that stays until the tests end."""
    folder = tempfile.TemporaryDirectory()
    _FOLDERS.append(folder)
    path = Path(folder.name) / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return CorpusFile(str(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained BERT that pools and normalizes as all-MiniLM-L6-v2 does."""
    path = tmp_path_factory.mktemp("models") / "bert"
    save_model(path, "bert", tokenizer=True)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        shutil.copy(MINILM / name, path)
    shutil.copytree(MINILM / "1_Pooling", path / "1_Pooling")
    (path / "2_Normalize").mkdir()
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 rows; in the first the query has an instruction."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:60]]
    lines[0]["instruction"] = "find it"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def mined(arguments, ranks=1):
    results = run_on_ranks(command, ranks, ["mine", *map(str, arguments)])
    assert all(code == 0 for code, *_ in results), results[0][2]
    return results
