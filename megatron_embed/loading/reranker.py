"""Opening a reranker for any command: settings, prompt, head and weights, and the scorer over all ranks."""

import dataclasses
import json
import logging
from collections.abc import Sequence

import torch

from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import RerankerConfig, RunConfig
from megatron_embed.convert.checkpoint_directory import open_checkpoint
from megatron_embed.convert.head_tensors import read_head, score_names
from megatron_embed.convert.peft import PeftAdapter
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.pair_tokenizer import (
    QWEN3_RERANKER_INSTRUCTION,
    QWEN3_RERANKER_TEMPLATE,
    PairFormat,
    PairTemplate,
    PairTokenizer,
)
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.evaluation.score import PairScorer
from megatron_embed.loading.foreign_reranker import Inherited, inherited
from megatron_embed.loading.model_directory import ModelDirectory, error_context, find_model, load_model_chunks
from megatron_embed.loading.quantized import quantized_as
from megatron_embed.loading.vocabulary_head import passthrough_tensors, require_new_weights
from megatron_embed.models.auto_dtype import resolve_dtype
from megatron_embed.models.auto_matmul import libraries_for_encoding
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.cross_encoder_settings import is_saved_cross_encoder
from megatron_embed.models.encoder import DTYPES, EmbeddingModel, attention_kernel
from megatron_embed.models.head_shapes import reranker_head_shapes
from megatron_embed.models.heads import HeadSpec, initialize_head, is_encoder
from megatron_embed.models.reranker_settings import RerankerSettings, head_of_architecture
from megatron_embed.names import Activation
from megatron_embed.parallel.lost_rank import Start
from megatron_embed.parallel.topology import Topology, check_world_size, initialize
from megatron_embed.platform.cpu_linear import Libraries
from megatron_embed.platform.launcher import launched_rank

logger = logging.getLogger(__name__)

INHERITED = ("head", "template", "instruction", "true_token", "false_token", "max_length", "activation")
"""Settings of section `reranker` that are the model directory's unless they are set."""


def reranker_settings(config: RerankerConfig, model: ModelDirectory, *, longest: int,
                      lengths_are_set: bool = True) -> RerankerSettings:
    """A reranker's settings in training: the given, else the model's own, else our defaults. The log says what
    was taken from the model.

    Args:
        longest: tokens of a pair where nothing else says; cut to the model's positions.
        lengths_are_set: the run asks for `longest`, whatever the directory says.
    Raises:
        ConfigError: a setting that does not go with the model.
        CheckpointError: the directory says what is not computed.
    """
    encoder, limit = is_encoder(model.shape), model.shape.longest_text
    _check_settings(config, model)
    with error_context("model.path", str(model.path)):
        own = inherited(model, reading=False, own_template=config.template is None)
    settings = RerankerSettings(
        head="score" if encoder else "yes_no", template=None if encoder else QWEN3_RERANKER_TEMPLATE,
        instruction=QWEN3_RERANKER_INSTRUCTION, true_token="yes", false_token="no", activation="sigmoid",
        max_length=min(limit, longest))
    says: frozenset[str] = frozenset()
    if own is not None:
        says = own.says - ({"max_length"} if lengths_are_set else set())
        length = min(limit, own.settings.max_length if "max_length" in says else longest)
        settings = dataclasses.replace(own.settings, max_length=length)
    asked = dataclasses.asdict(config)
    given = {name: asked[name] for name in INHERITED if asked[name] is not None}
    settings = dataclasses.replace(settings, **given)
    if "template" in given:
        settings = dataclasses.replace(settings, prompts={}, default_prompt=None)
    log_taken(settings, says - given.keys(), model)
    return settings


def log_taken(settings: RerankerSettings, taken: frozenset[str], model: ModelDirectory) -> None:
    """One line of those of the fields that have an effect."""
    without = {"instruction"} if "{instruction}" not in (settings.template or "") else set()
    without |= {"true_token", "false_token"} if settings.head == "score" else set()
    without |= {"prompts"} | ({"default_prompt"} if not settings.prompt else set())
    without |= set() if settings.lower_case else {"lower_case"}
    words = [f"{name} = {shortened(value)}" for name, value in dataclasses.asdict(settings).items()
             if name in taken - without]
    if words:
        logger.info("not set, so as %s says: reranker.%s", model.peft or model.path, ", ".join(words))


def _check_settings(config: RerankerConfig, model: ModelDirectory) -> None:
    """Refuses settings that do not go with the model's family or its positions."""
    encoder, limit = is_encoder(model.shape), model.shape.longest_text
    if model.shape.relative_positions is not None:
        raise ConfigError(f"task = 'reranker': no stock class scores pairs with the encoder of a {model.shape.family} "
                          "model; take another family, or task: embedding", key="task")
    if encoder and config.head == "yes_no":
        raise ConfigError(f"reranker.head = 'yes_no': a {model.shape.family} model has no language-model head to "
                          "answer with; set it to score", key="reranker.head")
    if encoder and config.template is not None:
        raise ConfigError(f"reranker.template = {config.template[:40]!r}: a {model.shape.family} model reads query and "
                          "document as a pair of texts, as the stock cross-encoders do; set it to null",
                          key="reranker.template")
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(f"reranker.max_length = {config.max_length} is longer than the model's {limit} positions; "
                          "lower it to that or less", key="reranker.max_length")


def is_reranker(model: ModelDirectory) -> bool:
    """Whether a directory's files say that it is a reranker, not an embedding model."""
    if model.reranker is not None or is_saved_cross_encoder(model.hf):
        return True
    head = head_of_architecture(model.hf)
    # Embedding models of decoder families are *ForCausalLM by name, too; they say how they pool.
    saved = model.saved
    embeds = saved.pooling is not None or saved.vectors is not None or saved.sparse
    return head == "score" or (head == "yes_no" and not embeds)


def saved_settings(model: ModelDirectory, key: str = "--model") -> RerankerSettings:
    """Settings of a directory's reranker: its own, else those of CrossEncoder."""
    return _saved(model, key).settings


def _saved(model: ModelDirectory, key: str) -> Inherited:
    with error_context(key, str(model.path)):
        own = inherited(model, reading=True)
    if own is None:
        raise ConfigError(f"{key} {model.path}: not a reranker: its config.json names neither a "
                          "*ForSequenceClassification nor a *ForCausalLM, and reranker.json is missing; give a model "
                          "trained with task: reranker, or a cross-encoder")
    return own


def open_pair_tokenizer(settings: RerankerSettings, model: ModelDirectory, length_key: str = "reranker.max_length", *,
                        foreign_pad: int | None = None) -> PairTokenizer:
    """The model's tokenizer with the reranker's prompt and length.

    Args:
        foreign_pad: of another library's model, which is used as it is: the padding token of config.json; None: that
            of an export, the tokenizer's.
    """
    template, encoder = None, is_encoder(model.shape)
    if settings.template is not None:
        template = PairTemplate(text=settings.template, instruction=settings.instruction)
    tokenizer = PairTokenizer(str(model.hf), template=template, max_length=settings.max_length, length_key=length_key,
                              vocab_size=model.shape.vocab_size, pair_format=PairFormat(
                                  prompt=settings.prompt, token_types=model.shape.type_vocab_size if encoder else 0,
                                  lower_case=settings.lower_case,
                                  own_truncation_side=foreign_pad is not None))
    if settings.head == "score" and not encoder:
        tokenizer.unread = tokenizer.pad_token_id if foreign_pad is None else foreign_pad
    return tokenizer


def check_last_token(settings: RerankerSettings, tokenizer: PairTokenizer, key: str) -> None:
    """Raises ConfigError, beginning with `key`, for a template whose last token the tokenizer pads with: the stock
    class would read the score before it."""
    if tokenizer.template is None or tokenizer.template.pieces()[-1] == "":
        return
    if tokenizer.last_token() == tokenizer.pad_token_id:
        raise ConfigError(f"{key} = {shortened(settings.template or '')}: its last token is the one that the tokenizer "
                          "pads with, and the stock class of an export reads the score at the last token that is not "
                          "padding, which is another one; let the template end otherwise, or give "
                          "tokenizer_config.json another pad_token", key=key)


def head_spec(settings: RerankerSettings, tokenizer: PairTokenizer) -> HeadSpec:
    """The head with its token ids, which must be single tokens."""
    if settings.head == "score":
        return HeadSpec(kind="score")
    true = tokenizer.token_of(settings.true_token, "reranker.true_token")
    false = tokenizer.token_of(settings.false_token, "reranker.false_token")
    if true == false:
        raise ConfigError(f"reranker.false_token = {settings.false_token!r}: is the token of reranker.true_token; the "
                          "score would always be 0", key="reranker.false_token")
    return HeadSpec(kind="yes_no", true_token_id=true, false_token_id=false)


def load_reranker_chunks(model: ModelDirectory, config: RunConfig, topology: Topology, spec: HeadSpec, *,
                         new_weights: bool) -> list[EmbeddingModel]:
    """This rank's model chunks with their weights, the head on the last one: the checkpoint's or the directory's.

    Args:
        new_weights: the model is to be trained, and what the directory lacks of the head is new; the log names it.
    Raises:
        UserError: the head does not go with the model, or a tensor of it does not fit or is missing, on every rank
            alike.
    """
    if spec.kind == "yes_no" and model.shape.logit_softcap is not None:
        raise ConfigError(f"reranker.head = 'yes_no': a {model.shape.family} model bounds its logits "
                          f"(final_logit_softcapping = {model.shape.logit_softcap:g}), and a score is the difference "
                          "of two that are not; set it to score", key="reranker.head")
    trained = None if model.checkpoint is None else open_checkpoint(model.checkpoint).info.head
    if trained is not None and trained != spec.kind:
        raise ConfigError(f"reranker.head = {spec.kind!r}: {model.path} is a reranker with the head {trained}; set it "
                          "to that, or begin from the model that it was made of", key="reranker.head")
    tensors = _head_tensors(model, spec, is_trained=trained is not None)  # on every rank, as its errors
    new = [] if trained is not None else [
        name for name in reranker_head_shapes(spec.kind, model.shape) if name not in tensors]
    if new:
        names = score_names(model.shape.family)
        require_new_weights(str(model.peft or model.path), [names[name] for name in new], "reranker's head",
                            new_weights)
    chunks = load_model_chunks(model, config, topology, spec, with_head=trained is not None, new_weights=new_weights)
    head = chunks[-1].head
    if head is not None:
        parameters = dict(head.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
        initialize_head(parameters, new, config.training.seed, model.shape.initializer_range)
    return chunks


def _head_tensors(model: ModelDirectory, spec: HeadSpec, *, is_trained: bool) -> dict[str, torch.Tensor]:
    """The head's tensors that a model directory and its adapter have, by our names, each of the right shape; of a
    checkpoint's trained head, only the adapter's."""
    adapted = _head_of_adapter(model, spec)
    if is_trained:
        return adapted
    with passthrough_tensors(model.hf, model.checkpoint) as source:
        return {**read_head(source, model.shape, spec.kind, spec.token_ids if spec.kind == "yes_no" else None,
                            str(model.path)), **adapted}


def _head_of_adapter(model: ModelDirectory, spec: HeadSpec) -> dict[str, torch.Tensor]:
    """The head's tensors that a PEFT directory holds, by our names. Raises CheckpointError for others."""
    if model.peft is None:
        return {}
    names = score_names(model.shape.family) if spec.kind == "score" else {}
    shapes = reranker_head_shapes(spec.kind, model.shape)
    with PeftAdapter(model.peft, rules_for(model.shape.family), model.shape) as adapter:
        others = sorted(set(adapter.head) - {names[ours] for ours in shapes if ours in names})
        if others:
            raise CheckpointError(f"{model.peft}: holds {others[0]}, which does not belong to a reranker with the head "
                                  f"{spec.kind}; merge the adapter with PEFT's merge_and_unload, or choose the other "
                                  "reranker.head")
        tensors = {ours: adapter.read_head(name) for ours, name in names.items() if name in adapter.head}
    for ours, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[ours]:
            raise CheckpointError(f"{model.peft}: {names[ours]} has shape {list(tensor.shape)}, but the base model's "
                                  f"head has {list(shapes[ours])}; use the base model that the adapter was made for")
    return tensors


def open_saved_pair_tokenizer(model: ModelDirectory, key: str = "--model",
                              max_length: int | None = None) -> tuple[PairTokenizer, RerankerSettings]:
    """The tokenizer of a directory's reranker, and how it is asked; arguments and errors as those of `open_scorer`."""
    own = _saved(model, key)
    settings = own.settings
    if max_length is not None:
        limit = model.shape.longest_text
        if max_length > limit:
            raise ConfigError(f"--max-length {max_length} is longer than the model's {limit} positions; lower it "
                              "to that or less")
        settings = dataclasses.replace(settings, max_length=max_length)
    length_key = "--max-length" if key == "--model" or max_length is not None else "its max_length"
    with error_context(key, str(model.peft or model.path)):
        return open_pair_tokenizer(settings, model, length_key, foreign_pad=own.foreign_pad), settings


def open_scorer(directory: str, *, key: str = "--model", max_length: int | None = None, dtype: str | None = None,
                overrides: Sequence[str] = (), topology: Topology | None = None,
                start: Start = initialize, own_libraries: bool = True) -> tuple[PairScorer, ModelDirectory, Topology]:
    """The reranker of a directory, ready on all ranks; what is not given is the model's own setting.

    Args:
        key: the option that names the directory, for messages.
        overrides: parallel.* settings.
        topology: of these settings, if another model is open already; else `start` makes the process groups.
        own_libraries: see `open_encoder`.
    Raises:
        UserError: it is not a reranker, or cannot be loaded.
    """
    model = find_model(directory, key)
    tokenizer, settings = open_saved_pair_tokenizer(model, key, max_length)
    known = model.saved.dtype if model.saved.dtype in DTYPES else "float32"
    config = quantized_as(config_of_overrides(
        [f"model.path={json.dumps(directory)}", f"model.dtype={dtype or known}", *overrides]), model)
    _, world_size, _ = launched_rank()
    check_world_size(config.parallel, world_size)
    check_divisible(model.shape, config.parallel)
    with error_context(key, directory):
        spec = head_spec(settings, tokenizer)
        topology = topology or start(config.parallel)
        config = resolve_dtype(config)
        libraries = libraries_for_encoding(config, model.shape, model.checkpoint) if own_libraries else None
        chunks = load_reranker_chunks(model, config, topology, spec, new_weights=False)
    scorer = scorer_of(chunks, chunks, topology, tokenizer, config, settings.activation, libraries)
    return scorer, model, topology


def scorer_of(chunks: Sequence[torch.nn.Module], models: Sequence[EmbeddingModel], topology: Topology,
              tokenizer: PairTokenizer, config: RunConfig, activation: Activation,
              libraries: Libraries | None = None) -> PairScorer:
    """The scorer of loaded chunks (`models` are the same, not wrapped by DDP)."""
    return PairScorer(chunks, topology, tokenizer, pooling=models[0].pooling, causal=models[0].causal,
                      kernel=attention_kernel(config, models[0].shape), activation=activation, libraries=libraries)
