"""Small rerankers: a byte-level BPE tokenizer with Qwen's special tokens, and models of every kind of head."""

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.helpers.toys import MINI_EN

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_bpe_tokenizer(path: Path) -> int:
    """A tokenizer of Qwen's kind: byte-level, no token of its own around a text, but padding; its vocabulary size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [json.loads(line)["query"] for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:200]]
    # Words that must be single tokens.
    tokenizer.train_from_iterator([*texts, *["yes no yes no"] * 500, *["yes", "no"] * 500], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=4096,
        chat_template="{% for message in messages %}{{ '<|im_start|>' + message['role'] }}{% endfor %}")
    wrapped.save_pretrained(path)
    return len(wrapped)


def save_reranker(path: Path, kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> str:
    """A Qwen3 of class `kind` (Qwen3ForCausalLM, ...), with random weights, norms and biases."""
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = save_bpe_tokenizer(path)
    torch.manual_seed(6)
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=48, max_position_embeddings=512, tie_word_embeddings=tied, pad_token_id=0,
        **({"num_labels": 1} if "Classification" in kind else {}))
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if len(parameter) in (vocabulary, 1) else 0.1))
    model.to(dtype).save_pretrained(path)
    return str(path)
