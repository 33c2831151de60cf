"""Opening a model for any command: a Hugging Face directory or one of our checkpoints -> this rank's chunks, loaded."""

import argparse
import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_embed.checkpoint.state import load_model
from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import EmbeddingConfig, RunConfig
from megatron_embed.convert.layout import is_checkpoint, open_checkpoint
from megatron_embed.convert.source import HFDirectory, hf_weight_shards
from megatron_embed.data.prompts import Role, RoleTokenizer
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.encoder import DTYPES, EmbeddingModel, attention_kernel, build_model, padded_vocabulary
from megatron_embed.models.families import ModelShape, model_shape
from megatron_embed.models.heads import HeadSpec, head_pooling
from megatron_embed.models.pooling_names import Pooling
from megatron_embed.models.reranker_settings import RerankerSettings, read_reranker_settings
from megatron_embed.models.saved_settings import SavedSettings, read_saved_settings
from megatron_embed.parallel.topology import Topology, check_world_size, initialize, launched_rank
from megatron_embed.platform.compat import model_parallel_cuda_manual_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """A model as it lies on disk."""

    path: Path
    """As given, or where the hub's files were put."""
    checkpoint: Path | None
    """Our checkpoint, or null for a Hugging Face directory."""
    hf: Path
    """config.json, tokenizer and Sentence Transformers files."""
    shape: ModelShape
    saved: SavedSettings
    reranker: RerankerSettings | None
    """Null: the directory does not say how it is asked as a reranker."""
    max_lengths: dict[str, int]
    """Tokens by role, of a training checkpoint; empty otherwise."""

    def pooling(self, wanted: Pooling | None) -> Pooling:
        """What was asked for, else what the directory says, else lasttoken."""
        return wanted or self.saved.pooling or "lasttoken"


def local_directory(path: str) -> Path:
    """The directory itself, or a hub model's files in the local cache, fetched if need be. Raises CheckpointError."""
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if folder.exists() or path.startswith(("/", ".", "~")) or path.count("/") != 1:
        what = "a file" if path and folder.exists() else "no such directory"
        raise CheckpointError(f"{what}; give a model directory or a hub name such as Qwen/Qwen3-Embedding-0.6B")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            path, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.pt"]))
    except Exception as error:
        # The hub client raises its own, requests' and OS errors alike; to the user all mean: not here and not fetched.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no such directory, and as a hub name it could not be fetched ({reason}); correct the "
                              "path, or check the name and the network") from error


def find_model(path: str, key: str = "model.path") -> ModelDirectory:
    """Reads what a model directory says, without touching its weights. No communication.

    Raises:
        CheckpointError: beginning with `key`, the setting or option that names the directory.
    """
    with blaming(key, path):
        folder = local_directory(path)
        opened = open_checkpoint(folder) if is_checkpoint(folder) else None
        hf = folder if opened is None else opened.hf
        return ModelDirectory(path=folder, checkpoint=None if opened is None else opened.path, hf=hf,
                              shape=model_shape(hf), saved=read_saved_settings(hf), reranker=read_reranker_settings(hf),
                              max_lengths={} if opened is None else opened.info.max_lengths)


@contextlib.contextmanager
def blaming(key: str, path: str) -> Iterator[None]:
    """Errors about a model's files begin with the setting or option that names the model."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{key} = {path!r}: {error}") from error


def role_lengths(model: ModelDirectory, wanted: int | None, *, by_role: bool) -> dict[Role, int]:
    """Longest text in tokens: what was asked for, else what the directory says.

    Args:
        by_role: a training checkpoint knows a length for each role; else the longer one holds for all texts.
    Raises:
        ConfigError: `wanted` is longer than the model's positions.
    """
    limit = model.shape.longest_text
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--max-length {wanted} is longer than the model's {limit} positions; lower it to that or "
                          "less")
    if wanted is None and by_role and model.max_lengths:
        return {"query": model.max_lengths["query"], "document": model.max_lengths["document"]}
    length = wanted or min(model.saved.max_length or limit, limit)
    return {"query": length, "document": length}


def load_model_chunks(model: ModelDirectory, config: RunConfig, topology: Topology, head_spec: HeadSpec | None = None,
                      *, with_head: bool = False) -> list[EmbeddingModel]:
    """This rank's model chunks with their weights.

    Each rank reads only its own slices of a Hugging Face directory, or its own shards of a checkpoint.

    Args:
        head_spec: of a reranker.
        with_head: whether the checkpoint holds the head's weights; else they are left as they are.
    """
    model_parallel_cuda_manual_seed(config.training.seed)
    pooling = model.pooling(config.embedding.pooling) if head_spec is None else head_pooling(model.shape)
    chunks = build_model(config, model.shape, topology, pooling, head_spec)
    if model.checkpoint is not None:
        load_model(model.checkpoint, chunks, with_head=with_head)
        return chunks
    with HFDirectory(model.hf) as source, torch.no_grad():
        for chunk in chunks:
            parameters = {name: parameter for name, parameter in chunk.global_parameters().items()
                          if not name.startswith("head.")}
            shards = hf_weight_shards(source, source.family, names=parameters, tp_rank=topology.tp_rank,
                                      tp_size=topology.tp_size, etp_rank=topology.groups.expt_tp.rank(),
                                      etp_size=topology.groups.expt_tp.size(),
                                      padded_vocab_size=padded_vocabulary(model.shape.vocab_size, topology.tp_size))
            for name, shard in shards:
                parameters[name].copy_(shard)
    return chunks


def open_encoder(args: argparse.Namespace, *, prompts: bool,
                 given_prompts: dict[Role, str] | None = None) -> tuple[TextEncoder, ModelDirectory, Topology]:
    """The model that `encode`, `evaluate` and `mine` name, ready on all ranks.

    Args:
        args: --model, --pooling, --max-length, --dtype, --no-normalize and parallel.* overrides; what is not given is
            what the directory says (dtype: float32 if it says nothing we compute in).
        prompts: put the directory's prompts before the texts.
        given_prompts: in place of the directory's.
    """
    model = find_model(args.model, "--model")
    known = model.saved.dtype if model.saved.dtype in DTYPES else "float32"
    config = config_of_overrides([f"model.path={json.dumps(args.model)}", f"model.dtype={args.dtype or known}",
                                  *args.overrides])
    normalize = not args.no_normalize and model.saved.normalize is not False
    embedding = EmbeddingConfig(pooling=model.pooling(args.pooling), normalize=normalize)
    config = dataclasses.replace(config, embedding=embedding)
    _, world_size, _ = launched_rank()
    check_world_size(config.parallel, world_size)
    check_divisible(model.shape, config.parallel)
    texts = {**model.saved.prompts, **(given_prompts or {})} if prompts else {}
    lengths = role_lengths(model, args.max_length, by_role=prompts)
    with blaming("--model", args.model):
        tokenizer = RoleTokenizer(
            str(model.hf), add_eos=config.embedding.pooling == "lasttoken", query_prompt=texts.get("query", ""),
            document_prompt=texts.get("document", ""), query_max_length=lengths["query"],
            document_max_length=lengths["document"], length_keys=("--max-length", "--max-length"))
        topology = initialize(config.parallel)
        chunks = load_model_chunks(model, config, topology)
    encoder = TextEncoder(chunks, topology, tokenizer, pooling=model.pooling(args.pooling), dim=model.shape.hidden_size,
                          kernel=attention_kernel(config),
                          causal=chunks[0].causal)
    return encoder, model, topology
