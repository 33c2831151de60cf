"""A multi-vector model in the files of its directory: Sentence Transformers' MultiVectorEncoder.

After its Transformer come Dense modules over every token's state, MultiVectorMask, which says the tokens whose vectors
count, and Normalize; no Pooling.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import read_json_object
from megatron_embed.config.vector_format import PUNCTUATION, QueryExpansion, VectorFormat
from megatron_embed.errors import CheckpointError
from megatron_embed.models.key_table import shown_value
from megatron_embed.models.known_keys import MULTI_VECTOR_MASK
from megatron_embed.models.modules_json import Module
from megatron_embed.names import ROLES, Role

MULTI_VECTOR = "MultiVectorEncoder"
PYLATE = "ColBERT"
"""Values of `model_type` in config_sentence_transformers.json. PyLate's models are a Transformer and Dense modules;
prefixes, lengths and the skip list are in that file, and vectors always get unit length."""
PYLATE_KEYS = ("query_prefix", "document_prefix", "query_length", "document_length", "do_query_expansion",
               "attend_to_expansion_tokens", "skiplist_words")
DEFAULT_QUERY_LENGTH = 32
"""Tokens of a query in ColBERT."""


def is_multi_vector(modules: Sequence[Module]) -> bool:
    """Whether the modules of a directory give a vector for every token."""
    kinds = [module.kind for module in modules]
    return "MultiVectorMask" in kinds or ("Dense" in kinds and "Pooling" not in kinds)


def is_pylate(settings: Mapping[str, Any]) -> bool:
    """Whether a config_sentence_transformers.json is PyLate's, which at first wrote no `model_type`."""
    return settings.get("model_type") == PYLATE or (
        settings.get("model_type") is None and "query_prefix" in settings)


def refuse_stanford(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a checkpoint of Stanford's ColBERT, whose projection lies among the backbone's
    tensors; `config`: contents of config.json."""
    if config.get("architectures") == ["HF_ColBERT"]:
        raise CheckpointError(f"{folder}: a checkpoint of Stanford's ColBERT, which has no modules.json; rewrite it "
                              "once: python -c \"from sentence_transformers import MultiVectorEncoder; "
                              f"MultiVectorEncoder('{folder}').save_pretrained('NEW_DIR')\", and give NEW_DIR")


def refuse_other_kinds_keys(file: Path, settings: Mapping[str, Any], *, several: bool) -> None:
    """Refuse keys of config_sentence_transformers.json that its library does not read in a model of this kind.

    Args:
        several: the model gives several vectors for a text.
    Raises:
        CheckpointError: maxsim for one vector, or PyLate's keys in a model of another library.
    """
    similarity = settings.get("similarity_fn_name")
    if not several and similarity in ("maxsim", "MaxSim"):
        raise CheckpointError(f"{file}: similarity_fn_name = {similarity!r} compares vectors of tokens, and this model "
                              "gives one vector for a text; write 'cosine' or 'dot'")
    # In a multi-vector model Sentence Transformers expands queries if one of the keys is there, even as null.
    given = [] if several and is_pylate(settings) else [
        key for key in (*PYLATE_KEYS, "attend_to_mask_tokens")
        if (key in settings if several else settings.get(key) is not None)]
    if given:
        raise CheckpointError(f"{file}: {given[0]} = {shown_value(settings[given[0]])}: a key of PyLate, which "
                              "Sentence Transformers does not know in a model of this kind; remove the key")


def vector_format(folder: Path, modules: Sequence[Module], settings: Mapping[str, Any],
                  expansion: QueryExpansion | None) -> VectorFormat | None:
    """The tokens of a directory's model that give vectors; None: a text gives one.

    Args:
        settings: contents of config_sentence_transformers.json.
        expansion: what sentence_bert_config.json says of queries, or PyLate's keys in its place.
    Raises:
        CheckpointError: its files contradict each other, or a value is none that is supported.
    """
    file, kind = folder / "config_sentence_transformers.json", settings.get("model_type")
    mask = next((module for module in modules if module.kind == "MultiVectorMask"), None)
    if is_pylate(settings) and mask is None and is_multi_vector(modules):
        return _format_of_pylate(file, settings, expansion)
    if mask is None:
        if is_multi_vector(modules):
            raise CheckpointError(f"{folder / 'modules.json'}: Dense without Pooling before it is only supported in a "
                                  f"model of PyLate; {file.name} says model_type = {kind!r}")
        if kind in (MULTI_VECTOR, PYLATE):
            raise CheckpointError(f"{file}: model_type = {kind!r}, but modules.json names no MultiVectorMask; fetch "
                                  "both files again")
        if expansion is not None:
            raise CheckpointError(f"{folder}: query_expansion in sentence_bert_config.json, but modules.json names no "
                                  "MultiVectorMask, without which Sentence Transformers does not score the appended "
                                  "tokens; remove the key")
        return None
    if kind != MULTI_VECTOR:
        raise CheckpointError(f"{file}: model_type = {kind!r}, but modules.json names a MultiVectorMask; write "
                              "'MultiVectorEncoder'")
    words, tasks = _mask(mask, folder)
    return VectorFormat(skiplist_words=words, skiplist_tasks=tasks, expansion=expansion)


def _format_of_pylate(file: Path, settings: Mapping[str, Any], expansion: QueryExpansion | None) -> VectorFormat:
    """The format by PyLate's keys; `expansion`: see `pylate_defaults`."""
    words = settings.get("skiplist_words")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise CheckpointError(f"{file}: skiplist_words = {shown_value(words)} must be a list of texts; correct it")
    return VectorFormat(skiplist_words=PUNCTUATION if words is None else tuple(words), expansion=expansion,
                        prefix_tokens=True)


def pylate_defaults(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of sentence_bert_config.json as PyLate's keys say them; that file's own stand before them.

    Queries are expanded if any key of PyLate is there, whatever its value, and none turns it off.

    Raises:
        CheckpointError: a length that is none.
    """
    defaults: dict[str, Any] = {f"{role}_length": length for role, length in _pylate_lengths(file, settings).items()}
    if "query_expansion" in settings or settings.get("do_query_expansion") is False:  # null, others are refused
        return {**defaults, "query_expansion": None}
    if any(key in settings for key in (*PYLATE_KEYS, "attend_to_mask_tokens")):
        attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
        length = defaults.pop("query_length", DEFAULT_QUERY_LENGTH)
        defaults["query_expansion"] = {"strategy": "fixed", "attend": bool(attend), "length": length}
    return defaults


def _pylate_lengths(file: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of queries and documents that PyLate's keys say, by role."""
    lengths: dict[str, int] = {}
    for role in ROLES:
        length = settings.get(f"{role}_length")
        if length is not None and (type(length) is not int or length < 1):
            raise CheckpointError(f"{file}: {role}_length = {shown_value(length)} must be a whole number of tokens "
                                  "above 0; correct it")
        lengths |= {} if length is None else {role: length}
    return lengths


def pylate_prompts(file: Path, settings: Mapping[str, Any], prompts: Mapping[str, str]) -> dict[str, str]:
    """The prompts with PyLate's prefix tokens before those of queries and documents."""
    result = dict(prompts)
    for role in ROLES:
        prefix = settings.get(f"{role}_prefix")
        if not isinstance(prefix, str | None):
            raise CheckpointError(f"{file}: {role}_prefix = {shown_value(prefix)} must be a text; correct it")
        if prefix:
            result[role] = prefix + result.get(role, "").removeprefix(prefix)
    return result


def _mask(module: Module, folder: Path) -> tuple[tuple[str, ...], tuple[Role, ...]]:
    """The skipped words of a MultiVectorMask, and the roles in which they are."""
    file = folder / module.path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, and modules.json names it; fetch it into its folder")
    values = read_json_object(file)
    MULTI_VECTOR_MASK.check(file, values)
    words, tasks = values.get("skiplist_words") or [], values.get("skiplist_tasks")
    tasks = ["document"] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    for key, value in (("skiplist_words", words), ("skiplist_tasks", tasks)):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise CheckpointError(f"{file}: {key} = {shown_value(value)} must be a list of texts; correct it")
    unknown = [task for task in tasks if task not in ROLES]
    if unknown:
        raise CheckpointError(f"{file}: skiplist_tasks = {shown_value(tasks)}: only query and document are supported; "
                              "remove the others")
    return tuple(words), tuple(role for role in ROLES if role in tasks)


def query_expansion(file: Path, values: Mapping[str, Any]) -> QueryExpansion | None:
    """`query_expansion` of a sentence_bert_config.json; None without it.

    Raises:
        CheckpointError: a value that Sentence Transformers does not take either.
    """
    given = values.get("query_expansion")
    if given is None:
        return None
    length, token = given.get("length"), given.get("token")
    if "strategy" not in given:
        raise CheckpointError(f"{file}: query_expansion has no strategy; write 'fixed' if longer queries are cut to "
                              "its length, else 'min'")
    if type(length) is not int or length < 1:
        raise CheckpointError(f"{file}: query_expansion.length = {shown_value(length)} must be a whole number of "
                              "tokens above 0; correct it")
    longest = values.get("query_length")
    if type(longest) is int and longest < length:
        raise CheckpointError(f"{file}: query_length = {longest} is shorter than query_expansion.length = {length}, to "
                              "which every query is expanded; lower that, or raise query_length")
    if not isinstance(token, str | None):
        raise CheckpointError(f"{file}: query_expansion.token = {shown_value(token)} must be a text; correct it")
    return QueryExpansion(length=length, truncates=given.get("strategy") == "fixed",
                          attend=given.get("attend", False), token=token)
