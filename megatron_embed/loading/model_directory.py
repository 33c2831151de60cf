"""Opening a model for any command: a Hugging Face directory or one of our checkpoints -> this rank's chunks, loaded."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_embed.checkpoint.load import load_model
from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import EmbeddingConfig, LoraConfig, RunConfig
from megatron_embed.config.vector_format import JointFormat, format_of_run, with_format
from megatron_embed.convert.checkpoint_directory import is_checkpoint, open_checkpoint
from megatron_embed.convert.hf_directory import HFDirectory, hf_weight_shards
from megatron_embed.convert.lora_names import parts_by_linear, resolve_modules
from megatron_embed.convert.peft import CONFIG_FILE, PeftAdapter, base_of, is_peft_directory
from megatron_embed.convert.quantized_base import base_directory
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.to_hf import check_sizes
from megatron_embed.data.tokenizer import RoleTokenizer, TextFormat
from megatron_embed.data.vocabulary import has_tokenizer_files
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.loading.dense_weights import holds_dense_weights, load_dense_weights
from megatron_embed.loading.hub import local_directory
from megatron_embed.loading.joint_heads import as_joint_model, joint_pooling, with_joint_heads
from megatron_embed.loading.quantized import load_quantized_weights, quantized_as
from megatron_embed.loading.vocabulary_head import check_sparse, holds_vocabulary_head, load_vocabulary_head
from megatron_embed.models.auto_dtype import resolve_dtype
from megatron_embed.models.auto_matmul import libraries_for_encoding
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.dense_settings import DenseSettings, dense_of_run, embedding_width, joint_projection
from megatron_embed.models.encoder import DTYPES, EmbeddingModel, attention_kernel, build_model
from megatron_embed.models.families import ModelShape, model_shape
from megatron_embed.models.file_checks import check_files, check_tokenizer_names
from megatron_embed.models.heads import HeadSpec, head_pooling
from megatron_embed.models.lora_settings import Adapters, AdapterSettings, is_adapter
from megatron_embed.models.modules_json import supported_modules, transformer_folder
from megatron_embed.models.quantization import QuantizedBase, StoredQuantization, stored_quantization
from megatron_embed.models.reranker_settings import RerankerSettings, read_reranker_settings
from megatron_embed.models.saved_settings import SavedSettings, default_pooling, read_saved_settings
from megatron_embed.models.vocabulary_shape import padded_vocabulary
from megatron_embed.names import ModelPooling, Pooling, Role, pools_last_token
from megatron_embed.parallel.lost_rank import Start
from megatron_embed.parallel.topology import Topology, check_world_size, initialize
from megatron_embed.platform.compat import model_parallel_cuda_manual_seed
from megatron_embed.platform.launcher import launched_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """A model as it lies on disk."""

    path: Path
    """As given, or where the hub's files were put."""
    checkpoint: Path | None
    """Our checkpoint, or None for a Hugging Face directory."""
    hf: Path
    """config.json, weights and tokenizer."""
    root: Path
    """modules.json and the folders of the modules: `hf`, unless the transformer has a folder of its own there."""
    shape: ModelShape
    saved: SavedSettings
    reranker: RerankerSettings | None
    """None: the directory does not say how it is asked as a reranker."""
    max_lengths: dict[str, int]
    """Tokens by role, of a training checkpoint; empty otherwise."""
    name: str
    """Name of the model without adapters, for others to find it: its whole path, or the hub's name."""
    adapters: AdapterSettings | None = None
    """Adapters of a PEFT directory, or of a checkpoint that holds some."""
    peft: Path | None = None
    """The PEFT directory; `path` is then its base model's."""
    quantized: QuantizedBase | None = None
    """What a checkpoint says of its base model, if its adapters were trained over quantized weights."""
    stored: StoredQuantization | None = None
    """How the weights of a Hugging Face directory are quantized already; None: they are not."""
    base: Path | None = None
    """The base model's Hugging Face directory then, from which the weights come."""
    new_vectors: bool = False
    """A run makes a multi-vector model of it, which it is not by its files."""
    joint: JointFormat | None = None
    """The rows that it gives as a joint model; None: it is used as another one."""

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer's directory: an adapter may have its own."""
        return self.peft if self.peft is not None and has_tokenizer_files(self.peft) else self.hf

    @property
    def text_format(self) -> TextFormat:
        """The format in which its texts are tokenized, beside the tokenizer."""
        saved, chat = self.saved, self.saved.chat
        return TextFormat(lower_case=saved.lower_case, truncation_side=saved.truncation_side,
                          chat_content=None if chat is None else chat.content,
                          chat_variables={} if chat is None else chat.variables, vectors=saved.vectors,
                          joint=self.joint, token_types=self.shape.type_vocab_size > 0,
                          pools_prompts=saved.pools_prompts)

    @property
    def read_from(self) -> tuple[Path, ...]:
        """Every directory whose files decide what the model computes."""
        base = self.checkpoint or self.path
        return (base,) if self.peft is None else (base, self.peft)

    @property
    def dense_directory(self) -> Path:
        """The directory of the Dense modules' weights: an adapter with a modules.json has its own."""
        return self.peft if self.peft is not None and (self.peft / "modules.json").is_file() else self.root

    def dense(self, config: EmbeddingConfig) -> tuple[DenseSettings, ...]:
        """Its Dense modules, or the new one of a run. Raises ConfigError, see `dense_of_run`."""
        if self.joint is not None:
            return (joint_projection(self.joint),)
        return dense_of_run(config, self.saved.dense, self.shape, self.pooling(config.pooling),
                            new_vectors=self.new_vectors)

    def dim(self, config: EmbeddingConfig) -> int:
        """Numbers of a vector."""
        return embedding_width(self.dense(config), self.shape, self.pooling(config.pooling))

    def require_one_vector(self, key: str, what: str, option: str | None = None) -> None:
        """Raises ConfigError, beginning with the option `key`, for a multi-vector or sparse model; `what` tells why, or
        `option`, without which such a model could be given."""
        if self.saved.vectors is None and not self.saved.sparse:
            return
        kind, stock = ("multi-vector model, with a vector for every token", "MultiVectorEncoder")
        if self.saved.sparse:
            kind, stock = ("sparse model, with a weight for every token of the vocabulary", "SparseEncoder")
        if option is not None:
            raise ConfigError(f"{option}: {self.path} is a {kind}, and this needs one vector for each text; leave it "
                              "out, or give a model with a pooling", key=option)
        raise ConfigError(f"{key} {self.path}: a {kind}, and {what} one vector for each text; give a model with a "
                          f"pooling, or use encode, evaluate, mine or Sentence Transformers' {stock}", key=key)

    def of_run(self, config: EmbeddingConfig, score_weights: tuple[float, ...] | None = None) -> "ModelDirectory":
        """The model with the head that a run gives it, whose settings are complete; see `with_format`.

        `score_weights`: of a joint model; None: its own.
        """
        if config.head == "joint":
            return with_joint_heads(self, config, score_weights)
        vectors = format_of_run(config, self.saved.vectors)
        return dataclasses.replace(
            self, new_vectors=self.new_vectors or (vectors is not None and self.saved.vectors is None),
            saved=dataclasses.replace(self.saved, vectors=vectors, sparse=config.head == "sparse"))

    def pooling(self, wanted: Pooling | None) -> ModelPooling:
        """`wanted`, else the model's own setting, else mean of an encoder and lasttoken of a decoder; `tokens` of a
        multi-vector model, `splade` of a sparse one, one of JOINT_POOLINGS of a joint one."""
        if self.saved.sparse or self.saved.vectors is not None:
            return "splade" if self.saved.sparse else "tokens"
        own = wanted or self.saved.pooling or default_pooling(self.shape)
        return own if self.joint is None else joint_pooling(own)


def find_model(path: str, key: str = "model.path") -> ModelDirectory:
    """Reads what a model directory says, without touching its weights. No communication.

    Raises:
        CheckpointError: beginning with `key`, the setting or option that names the directory.
    """
    with error_context(key, path):
        folder = local_directory(path)
        check_files(folder)
        if is_peft_directory(folder) and not is_checkpoint(folder):
            return _find_adapted(folder)
        opened = open_checkpoint(folder) if is_checkpoint(folder) else None
        root = folder if opened is None else opened.hf
        hf = transformer_folder(root)
        check_tokenizer_names(hf)
        stored = stored_quantization(hf)
        supported_modules(root)
        return ModelDirectory(path=folder, checkpoint=None if opened is None else opened.path, hf=hf, root=root,
                              shape=model_shape(hf), saved=read_saved_settings(root),
                              reranker=read_reranker_settings(hf),
                              max_lengths={} if opened is None else opened.info.max_lengths,
                              name=str(folder.resolve()) if os.path.isdir(os.path.expanduser(path)) else path,
                              adapters=None if opened is None else opened.info.adapters,
                              quantized=None if opened is None else opened.info.quantized_base, stored=stored,
                              base=None if opened is None else base_directory(opened))


def _find_adapted(folder: Path) -> ModelDirectory:
    """The base model of a PEFT directory, with the adapters; pooling and prompts are the directory's if it has any."""
    key, named = f"{folder / CONFIG_FILE}: base_model_name_or_path", base_of(folder)
    # Before it is read, which would never end where an adapter names itself.
    adapted = os.path.isdir(named) and is_peft_directory(named) and not is_checkpoint(named)
    base = None if adapted else find_model(named, key)
    if base is None or base.adapters is not None:
        raise CheckpointError(f"{key} = {(named if base is None else base.name)!r} has adapters itself; merge them "
                              "first (convert megatron-to-hf --merge-lora, or PEFT's merge_and_unload)", key=key)
    with PeftAdapter(folder, rules_for(base.shape.family), base.shape) as adapter:
        settings = dataclasses.replace(adapter.settings, base_model=base.name)
    check_tokenizer_names(folder)
    own = read_saved_settings(folder, base.hf)
    if not (folder / "modules.json").is_file():  # it has no more than a tokenizer
        own = dataclasses.replace(base.saved, adds_eos=own.adds_eos, truncation_side=own.truncation_side)
    return dataclasses.replace(base, adapters=settings, peft=folder, saved=own,
                               reranker=read_reranker_settings(folder) or base.reranker)


def adapters_of(config: LoraConfig, model: ModelDirectory) -> AdapterSettings | None:
    """The adapters of a run: new ones as `lora` says, or those that the model has. No communication.

    Raises:
        ConfigError: the model's are others than `lora` says, `lora` says nothing that has an effect, or it names
            linear layers that the model does not have.
    """
    if config.rank == 0:
        if model.adapters is None and config.dropout:
            raise ConfigError(f"lora.dropout = {config.dropout}: does nothing while lora.rank is 0 and model.path "
                              "holds no adapters; set the rank, or remove this", key="lora.dropout")
        return model.adapters
    wanted = AdapterSettings(
        rank=config.rank, alpha=config.alpha, use_rslora=config.use_rslora, base_model=model.name,
        modules=resolve_modules(rules_for(model.shape.family), config.target_modules, "lora.target_modules"))
    if model.adapters is not None and dataclasses.replace(model.adapters, base_model=model.name) != wanted:
        present = model.adapters
        raise ConfigError(f"lora.rank = {config.rank}: model.path holds adapters of rank {present.rank}, alpha "
                          f"{present.alpha:g}, on {', '.join(present.modules)}, and `lora` says otherwise; leave "
                          "lora.rank at 0 to train these", key="lora.rank")
    return wanted if model.adapters is None else model.adapters


@contextlib.contextmanager
def error_context(key: str, path: str) -> Iterator[None]:
    """Errors about a model's files begin with the setting or option that names the model."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{key} = {path!r}: {error}", key=key) from error


def role_lengths(model: ModelDirectory, wanted: int | None, *, by_role: bool) -> dict[Role, int]:
    """Longest text in tokens: `wanted`, else the model's own setting.

    Args:
        by_role: a training checkpoint knows a length for each role; else the longer one holds for all texts.
    Raises:
        ConfigError: `wanted` is longer than the model's positions.
        CheckpointError: the model expands its queries beyond them.
    """
    limit = model.shape.longest_text
    expansion = None if model.saved.vectors is None else model.saved.vectors.expansion
    if expansion is not None and expansion.length > limit:
        raise CheckpointError(f"{model.root}: its queries are expanded to {expansion.length:,} tokens (length of "
                              f"query_expansion, or PyLate's query_length), and the model has {limit:,} positions; "
                              "correct it")
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--max-length {wanted} is longer than the model's {limit} positions; lower it to that or "
                          "less")
    if wanted is None and by_role and model.max_lengths:
        return {"query": model.max_lengths["query"], "document": model.max_lengths["document"]}
    length = wanted or min(model.saved.max_length or limit, limit)
    own = model.saved.role_lengths if wanted is None and by_role else {}
    return {"query": min(own.get("query", length), limit), "document": min(own.get("document", length), limit)}


def load_model_chunks(model: ModelDirectory, config: RunConfig, topology: Topology, head_spec: HeadSpec | None = None,
                      *, with_head: bool = False, new_weights: bool = False) -> list[EmbeddingModel]:
    """This rank's model chunks with their weights; adapters that the model does not have yet as they are drawn.

    Each rank reads only its own slices of a Hugging Face directory, or its own shards of a checkpoint.

    Args:
        head_spec: a reranker's head.
        with_head: whether the checkpoint holds the head's weights; else they are left as they are.
        new_weights: the model is to be trained, and an encoder may lack tensors of its vocabulary head.
    """
    _check_sizes(model)
    model_parallel_cuda_manual_seed(config.training.seed)
    pooling = model.pooling(config.embedding.pooling) if head_spec is None else head_pooling(model.shape)
    settings = adapters_of(config.lora, model)
    if pooling == "splade":
        check_sparse(model.shape, str(model.peft or model.path), adapters=settings, chat=model.saved.chat)
        with_head = model.checkpoint is not None and holds_vocabulary_head(model.checkpoint, model.shape)
    adapters = None if settings is None else Adapters(
        rank=settings.rank, scale=settings.scale, dropout=config.lora.dropout, seed=config.training.seed,
        parts=parts_by_linear(rules_for(model.shape.family), settings.modules))
    dense = model.dense(config.embedding) if head_spec is None else ()
    chunks = build_model(config, model.shape, topology, pooling, head_spec, adapters, dense)
    stored = holds_dense_weights(model, dense)
    if model.checkpoint is None or model.base is not None:
        _load_hf_weights(model.base or model.hf, model.shape, chunks, topology)
    if config.model.quantization != "none":
        load_quantized_weights(model.base or model.hf, config, chunks, topology)
    if model.checkpoint is not None:
        load_model(model.checkpoint, chunks, with_head=with_head, with_dense=stored,
                   with_adapters=model.adapters is not None and model.peft is None)
    if not stored:
        load_dense_weights(model, chunks, config.training.seed, dense)
    if pooling == "splade" and not with_head:
        load_vocabulary_head(chunks[-1].head, model.hf, model.checkpoint, model.shape, new_weights=new_weights)
    if model.peft is not None:
        _load_peft_weights(model.peft, model, chunks, topology, with_head=head_spec is not None)
    return chunks


def _check_sizes(model: ModelDirectory) -> None:
    """Refuses weights of other sizes than config.json has, before memory is taken for them. Reads headers alone."""
    if model.checkpoint is None or model.base is not None:
        HFDirectory(model.base or model.hf).close()
    else:
        check_sizes(model.checkpoint / "model", rules_for(model.shape.family), model.shape)


def _load_hf_weights(directory: Path, shape: ModelShape, chunks: Sequence[EmbeddingModel], topology: Topology) -> None:
    with HFDirectory(directory) as source, torch.no_grad():
        for chunk in chunks:
            parameters = {name: parameter for name, parameter in chunk.global_parameters().items()
                          if not name.startswith(("head.", "dense.")) and not is_adapter(name)}
            shards = hf_weight_shards(source, names=parameters, tp_rank=topology.tp_rank,
                                      tp_size=topology.tp_size, etp_rank=topology.groups.expt_tp.rank(),
                                      etp_size=topology.groups.expt_tp.size(),
                                      padded_vocab_size=padded_vocabulary(shape.vocab_size, topology.tp_size))
            for name, shard in shards:
                parameters[name].copy_(shard)


def _load_peft_weights(path: Path, model: ModelDirectory, chunks: Sequence[EmbeddingModel],
                       topology: Topology, *, with_head: bool) -> None:
    etp = topology.groups.expt_tp
    with PeftAdapter(path, rules_for(model.shape.family), model.shape) as source, torch.no_grad():
        if source.head and not with_head:
            logger.info("%s: %s and %d more tensors belong to a head that embeddings do not use; they are left out",
                        path, min(source.head), len(source.head) - 1)
        for chunk in chunks:
            parameters = {name: parameter for name, parameter in chunk.global_parameters().items() if is_adapter(name)}
            for name, shard in source.shards(parameters, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                                             etp_rank=etp.rank(), etp_size=etp.size()):
                parameters[name].copy_(shard)


def open_role_tokenizer(model: ModelDirectory, *, pooling: ModelPooling, max_length: int | None, prompts: bool,
                        given_prompts: dict[Role, str] | None = None) -> RoleTokenizer:
    """The tokenizer of an embedding model with its prompts and lengths; arguments as those of `open_encoder`."""
    texts = {**(model.saved.prompts if prompts else {"document": model.saved.default_prompt}), **(given_prompts or {})}
    lengths = role_lengths(model, max_length, by_role=prompts)
    key = "--max-length" if max_length is not None or not model.saved.length_key else model.saved.length_key
    text_format = dataclasses.replace(
        model.text_format, tell_role=prompts, raises_query_length=max_length is None and bool(model.max_lengths))
    return RoleTokenizer(
        str(model.tokenizer_directory), add_eos=pools_last_token(pooling) and model.saved.adds_eos,
        text_format=text_format, query_prompt=texts.get("query", ""), document_prompt=texts.get("document", ""),
        query_max_length=lengths["query"], document_max_length=lengths["document"], length_keys=(key, key),
        vocab_size=model.shape.vocab_size)


def open_encoder(args: argparse.Namespace, *, prompts: bool, with_dense: bool = True,
                 given_prompts: dict[Role, str] | None = None, start: Start = initialize, key: str = "--model",
                 multi_vector: bool | Literal["joint"] = False, option: str | None = None,
                 own_libraries: bool = True) -> tuple[TextEncoder, ModelDirectory, Topology]:
    """The model that `encode`, `evaluate` and `mine` name, ready on all ranks.

    Args:
        args: --model, --pooling, --max-length, --dtype, --no-normalize and parallel.* overrides; what is not given is
            the model's own setting (dtype: float32 if that is not one we compute in).
        prompts: put the directory's prompts before the texts; else every text is a document, and has the directory's
            default prompt if it names one.
        with_dense: with the model's Dense modules; else its vectors are the pooled ones.
        given_prompts: in place of the directory's.
        start: makes the process groups.
        key: the option that names the directory, for messages.
        multi_vector: whether a model may give a vector for every token; joint: with the joint heads of its directory.
        option: that was given and keeps a model from doing so.
        own_libraries: on CPU ranks, multiply by the libraries that suit this model; False: by those of the process, as
            a model inside a training run does, and one that an export is compared with.
    """
    model = find_model(args.model, key)
    if multi_vector == "joint":
        model = as_joint_model(model, key, normalize=not args.no_normalize)
    if not with_dense:
        saved = dataclasses.replace(model.saved, dense=(), vectors=None, sparse=False)
        model = dataclasses.replace(model, saved=saved)
    if not multi_vector:
        model.require_one_vector(key, "here a model has", option)
    if args.pooling is not None and (model.saved.vectors is not None or model.saved.sparse):
        raise ConfigError(f"--pooling {args.pooling}: {args.model} is a multi-vector or sparse model, whose vectors "
                          "come without a choice of pooling; leave it out", key="--pooling")
    known = model.saved.dtype if model.saved.dtype in DTYPES else "float32"
    config = config_of_overrides([f"model.path={json.dumps(args.model)}", f"model.dtype={args.dtype or known}",
                                  *args.overrides])
    normalize = not (args.no_normalize or model.saved.normalize is False or model.saved.sparse)
    embedding = EmbeddingConfig(pooling=args.pooling, normalize=normalize, head="joint" if model.joint else None)
    embedding = with_format(embedding, model.saved.vectors, sparse=model.saved.sparse)
    config = quantized_as(dataclasses.replace(config, embedding=embedding), model)
    _, world_size, _ = launched_rank()
    check_world_size(config.parallel, world_size)
    check_divisible(model.shape, config.parallel)
    with error_context(key, args.model):
        tokenizer = open_role_tokenizer(model, pooling=model.pooling(args.pooling), max_length=args.max_length,
                                        prompts=prompts, given_prompts=given_prompts)
        topology = start(config.parallel)
        config = resolve_dtype(config)
        libraries = libraries_for_encoding(config, model.shape, model.checkpoint) if own_libraries else None
        chunks = load_model_chunks(model, config, topology)
    encoder = TextEncoder(chunks, topology, tokenizer, pooling=model.pooling(args.pooling), dim=model.dim(embedding),
                          kernel=attention_kernel(config, model.shape), causal=chunks[0].causal, libraries=libraries)
    return encoder, model, topology
