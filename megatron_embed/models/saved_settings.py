"""Pooling, normalization, prompts and lengths in the Sentence Transformers files of a model directory.

Every key of these files is looked up in known_keys.py, so that no key that changes the vectors is silently ignored.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_embed.config.data import DEFAULT_LENGTH
from megatron_embed.config.json_file import read_json_object, read_optional_json_object
from megatron_embed.config.vector_format import VectorFormat
from megatron_embed.errors import CheckpointError
from megatron_embed.models.dense_settings import ACTIVATION_CLASSES, LARGEST_FEATURES, DenseSettings, check_chain
from megatron_embed.models.families import ModelShape, read_hf_config
from megatron_embed.models.key_table import shown_value
from megatron_embed.models.known_keys import (
    CONFIG_SENTENCE_TRANSFORMERS,
    DENSE,
    NORMALIZE,
    POOLING,
    POOLING_FLAGS,
    SPLADE_POOLING,
    TOKEN_DENSE,
    TOKEN_NORMALIZE,
)
from megatron_embed.models.modules_json import (
    Module,
    supported_modules,
    transformer_folder,
)
from megatron_embed.models.multi_vector_settings import (
    is_multi_vector,
    is_pylate,
    pylate_defaults,
    pylate_prompts,
    query_expansion,
    refuse_other_kinds_keys,
    refuse_stanford,
    vector_format,
)
from megatron_embed.models.transformer_settings import ChatFormat, TransformerSettings
from megatron_embed.names import POOLINGS, ROLES, Pooling, Similarity, TruncationSide

logger = logging.getLogger(__name__)

SPARSE_ENCODER = "SparseEncoder"
"""Value of `model_type` in config_sentence_transformers.json of a sparse model."""

_UNREACHED_PROMPTS = ("passage", "corpus")
"""Names under which Sentence Transformers would look for a documents' prompt if every model did not have an empty one
named document."""


@dataclass(frozen=True, kw_only=True)
class SavedSettings:
    """None: the directory has no such setting."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    """Whether the last module scales to unit length."""
    dense: tuple[DenseSettings, ...] = ()
    """Dense modules between pooling and the finished vector, in order."""
    max_length: int | None = None
    """Tokens, special tokens included: sentence_bert_config.json's, else the tokenizer's."""
    stated_length: int | None = None
    """The same without the tokenizer's, which is a limit and not the length that the model was trained with."""
    length_key: str = ""
    """File and key of `max_length`, for messages."""
    role_lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of a query or document, for a role that has a length of its own."""
    similarity: Similarity = "cosine"
    prompts: dict[str, str] = field(default_factory=dict)
    """By role."""
    named_prompts: dict[str, str] = field(default_factory=dict)
    """All prompts, by name."""
    default_prompt_name: str | None = None
    """The prompt of texts without a role."""
    pools_prompts: bool = True
    """False: the pooling leaves out the tokens of a prompt, so that a text must not have one here."""
    truncation_side: TruncationSide | None = None
    """The end at which a text that is too long loses its tokens; None: as tokenizer.json says, else the right one."""
    lower_case: bool = False
    """Every text is lowercased before the tokenizer's own normalization."""
    chat: ChatFormat | None = None
    """The chat template is applied to every text; None: texts are tokenized as they are."""
    adds_eos: bool = False
    """tokenizer_config.json asks for an EOS token after every text."""
    dtype: str | None = None
    """The dtype in config.json."""
    vectors: VectorFormat | None = None
    """The tokens of a multi-vector model that give vectors; None: a text gives one vector."""
    sparse: bool = False
    """A text gives a weight for every token of the vocabulary."""

    @property
    def default_prompt(self) -> str:
        """The prompt of texts without a role, empty if there is none."""
        return "" if self.default_prompt_name is None else self.named_prompts.get(self.default_prompt_name, "")

    @property
    def trains_unit_length(self) -> bool:
        """Whether a training run normalizes its vectors by default: unless they are compared by dot product and the
        directory has no Normalize module."""
        return self.normalize is not False or self.similarity == "cosine"


def default_pooling(shape: ModelShape) -> Pooling:
    """Pooling of a directory without that setting: the mean if every token sees the whole text, else the last token."""
    return "mean" if shape.bidirectional else "lasttoken"


def trained_lengths(saved: SavedSettings, longest: int, by_role: Mapping[str, int]) -> dict[str, int]:
    """Tokens of `query` and `document` that a model was trained with; 512 if that is not known.

    Args:
        longest: the model's positions.
        by_role: the lengths in a checkpoint of ours, if it is one.
    """
    return {role: min(by_role.get(role) or saved.role_lengths.get(role) or saved.stated_length or DEFAULT_LENGTH,
                      longest) for role in ROLES}


def _pooling(path: Path) -> tuple[Pooling, bool]:
    """The pooling of a 1_Pooling/config.json, in either spelling, and whether the prompt's tokens are pooled too."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, and modules.json names it; fetch it into its folder")
    config = read_json_object(path)
    if config.get("pooling_mode") is None:
        active = [name for flag, name in POOLING_FLAGS.items() if config.get(flag)]
        POOLING.check(path, config)
        active = active or ["mean"]  # the library's default
    else:
        mode = config["pooling_mode"]
        active = mode if isinstance(mode, list) else [mode]
        # The library then ignores the older flags.
        POOLING.check(path, {key: value for key, value in config.items() if not key.startswith("pooling_mode_")})
    pooling = next((name for name in POOLINGS if name.split("+") == active), None)
    if pooling is None:
        raise CheckpointError(f"{path}: pooling {active} is not supported; one of {', '.join(POOLINGS)} is")
    # In the library null is false.
    return pooling, config.get("include_prompt", True) is True


def _dense(file: Path, path: str, *, normalize_input: bool, of_tokens: bool) -> DenseSettings:
    """Settings of a Dense module; `file`: its config.json, `path`: the name of its folder."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, and modules.json names it; fetch it into its folder")
    values = read_json_object(file)
    (TOKEN_DENSE if of_tokens else DENSE).check(file, values)
    sizes = []
    for key in ("in_features", "out_features"):
        size = values.get(key)
        if type(size) is not int or not 0 < size <= LARGEST_FEATURES:
            raise CheckpointError(f"{file}: {key} = {shown_value(size)} must be a whole number from 1 to "
                                  f"{LARGEST_FEATURES:,}; fetch the file again")
        sizes.append(size)
    activation = ACTIVATION_CLASSES[values.get("activation_function", "torch.nn.modules.activation.Tanh")]
    return DenseSettings(in_features=sizes[0], out_features=sizes[1], bias=values.get("bias", True),
                         activation=activation, normalize_input=normalize_input, path=path)


def _after_pooling(folder: Path, modules: Sequence[Module]) -> tuple[tuple[DenseSettings, ...], bool]:
    """The Dense modules, and whether a Normalize module stands behind the last of them."""
    dense: list[DenseSettings] = []
    normalize, of_tokens = False, is_multi_vector(modules)
    for module in modules:
        file = folder / module.path / "config.json"
        if module.kind == "Normalize":
            values = read_optional_json_object(file)
            (TOKEN_NORMALIZE if of_tokens else NORMALIZE).check(file, values)
            if of_tokens and "module_input_name" not in values:
                raise CheckpointError(f"{file}: without module_input_name Sentence Transformers scales the vector of a "
                                      "text, which this model has not; write 'token_embeddings' if the tokens' vectors "
                                      "are to have unit length, or take the module out of modules.json")
            normalize = True
        elif module.kind == "Dense":
            dense.append(_dense(file, module.path, normalize_input=normalize, of_tokens=of_tokens))
            normalize = False
    check_chain(folder, dense)
    return tuple(dense), normalize


def read_saved_settings(directory: str | Path, base: Path | None = None) -> SavedSettings:
    """Settings of a Hugging Face or Sentence Transformers directory.

    Args:
        base: the directory of config.json, if it is another one (a PEFT adapter has none), and of the tokenizer, if
            `directory` has none.
    Raises:
        CheckpointError: a key, module or pooling that we do not compute, or a broken file.
    """
    folder = Path(directory)
    modules = supported_modules(folder)
    own = transformer_folder(folder)
    hf = read_hf_config(base or own)
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    file = folder / "config_sentence_transformers.json"
    settings = read_optional_json_object(file) if modules else {}
    CONFIG_SENTENCE_TRANSFORMERS.check(file, settings)
    pylate = is_pylate(settings) and is_multi_vector(modules)
    transformer = TransformerSettings(own, base, known=bool(modules),
                                      defaults=pylate_defaults(file, settings) if pylate else {})
    common: dict[str, Any] = {"dtype": dtype if isinstance(dtype, str) else None, "adds_eos": transformer.adds_eos,
                              "max_length": transformer.max_length, "stated_length": transformer.stated_length,
                              "length_key": transformer.length_key, "truncation_side": transformer.truncation_side}
    if not modules:
        refuse_stanford(folder, hf)
        return SavedSettings(**common)
    pooling, pools_prompts = _check_modules(folder, modules, transformer)
    dense, normalize = _after_pooling(folder, modules)
    named, default = named_prompts(file, settings, also_default=ROLES)
    vectors = vector_format(folder, modules, settings, query_expansion(transformer.file, transformer.values))
    refuse_other_kinds_keys(file, settings, several=vectors is not None)
    sparse = any(module.kind == "SpladePooling" for module in modules)
    if pylate:
        named, normalize = pylate_prompts(file, settings, named), True
    prompts = _by_role(file, named)
    if not pools_prompts and any([*prompts.values(), named.get(default or "")]):
        raise CheckpointError(f"{folder}: include_prompt = false in its pooling is not supported together with "
                              "prompts; set it to true, or empty the prompts in config_sentence_transformers.json")
    return SavedSettings(
        pooling=pooling, dense=dense, normalize=normalize, prompts=prompts, named_prompts=named,
        default_prompt_name=default, similarity=_similarity(file, settings, sparse=sparse),
        role_lengths=transformer.role_lengths, lower_case=transformer.lower_case, chat=transformer.chat,
        vectors=vectors, sparse=sparse, pools_prompts=pools_prompts, **common)


def _check_modules(folder: Path, modules: Sequence[Module],
                   transformer: TransformerSettings) -> tuple[Pooling | None, bool]:
    """The pooling, if there is one, and whether it takes the prompt's tokens too. Raises CheckpointError if the
    Transformer's settings do not go with the module behind it."""
    pooling, pools_prompts = None, True
    for module in modules:
        if module.kind == "Pooling":
            pooling, pools_prompts = _pooling(folder / module.path / "config.json")
        if module.kind in ("Pooling", "MultiVectorMask"):
            transformer.check_embeds()
        if module.kind == "SpladePooling":
            _check_splade(folder / module.path / "config.json", transformer, modules[0])
    return pooling, pools_prompts


def _check_splade(file: Path, transformer: TransformerSettings, first: Module) -> None:
    """Raises CheckpointError unless the settings of a SpladePooling in `file`, and what comes before it, are known."""
    SPLADE_POOLING.check(file, read_optional_json_object(file))
    transformer.check_gives_logits(by_default="MLMTransformer" in first.type)


def _similarity(file: Path, settings: Mapping[str, Any], *, sparse: bool) -> Similarity:
    """What vectors are compared by: those of a sparse model always by dot product.

    Raises:
        CheckpointError: the file says otherwise of a sparse model, or calls another one sparse.
    """
    kind, compared = settings.get("model_type"), settings.get("similarity_fn_name")
    if (sparse and kind not in (None, SPARSE_ENCODER)) or (not sparse and kind == SPARSE_ENCODER):
        raise CheckpointError(f"{file}: model_type = {kind!r}, but modules.json names {'a' if sparse else 'no'} "
                              "SpladePooling; fetch both files again")
    if sparse and compared not in (None, "dot", "dot_product"):
        raise CheckpointError(f"{file}: similarity_fn_name = {compared!r}: sparse vectors are compared by dot product "
                              "here; write 'dot', if the model may be used so")
    return "dot" if sparse or compared in ("dot", "dot_product") else "cosine"


def named_prompts(file: Path, settings: Mapping[str, Any], *,
                  also_default: Sequence[str] = ()) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the default prompt.

    Args:
        also_default: names that the default may have without being among the prompts.
    """
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise CheckpointError(f"{file}: prompts = {shown_value(prompts)} must map names to texts; correct it")
    default = settings.get("default_prompt_name")
    if default not in (None, *also_default, *prompts):
        raise CheckpointError(f"{file}: default_prompt_name = {shown_value(default)} is none of the prompts "
                              f"{', '.join(prompts) or '(none)'}; correct it")
    return {name: text or "" for name, text in prompts.items()}, default


def _by_role(file: Path, prompts: dict[str, str]) -> dict[str, str]:
    """The prompts of queries and of documents, if there are any."""
    if "document" not in prompts:
        for name in _UNREACHED_PROMPTS:
            if prompts.get(name):
                _warn_of_unreached_prompt(file, name)
    return {role: prompts[role] for role in ROLES if role in prompts}


@functools.cache
def _warn_of_unreached_prompt(file: Path, name: str) -> None:
    logger.warning("%s: prompts has %r but no 'document': documents get no prompt, as in Sentence Transformers' "
                   "encode_document; rename it to 'document' if they should", file, name)
