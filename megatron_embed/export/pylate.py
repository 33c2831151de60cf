"""The files of PyLate (https://github.com/lightonai/pylate), which Sentence Transformers' MultiVectorEncoder reads too.

A Transformer and Dense modules; prefix tokens, lengths, expansion and skip list are in
config_sentence_transformers.json, and vectors always get unit length.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import read_json_file, read_json_object
from megatron_embed.convert.checkpoint_directory import write_json
from megatron_embed.errors import CheckpointError
from megatron_embed.export.sentence_transformers import load_export_tokenizer
from megatron_embed.models.multi_vector_settings import DEFAULT_QUERY_LENGTH, PYLATE
from megatron_embed.models.saved_settings import SavedSettings
from megatron_embed.names import ROLES

DENSE_TYPE = "pylate.models.Dense.Dense"


def check_pylate(source: str, saved: SavedSettings) -> None:
    """Raises CheckpointError for a model that PyLate would compute otherwise."""
    vectors = saved.vectors
    reason = None
    if vectors is None:
        reason = "it gives one vector for a text"
    elif saved.normalize is False:
        reason = "its vectors have other lengths than 1"
    elif any(settings.normalize_input for settings in saved.dense):
        reason = "a Normalize module stands before a Dense one"
    elif not saved.dense:
        reason = "it has no Dense module, and PyLate would add a new one"
    elif vectors.skiplist_tasks != ("document",) and vectors.skiplist_words:
        reason = f"its skip list is for {', '.join(vectors.skiplist_tasks)}, and PyLate's for documents"
    elif vectors.expansion is not None and not vectors.expansion.truncates:
        reason = "its longer queries are not cut to the length of the expansion"
    elif vectors.expansion is not None and vectors.expansion.token is not None:
        reason = "its queries are expanded by another token than the tokenizer's mask"
    if reason is not None:
        raise CheckpointError(f"{source}: PyLate cannot hold this model: {reason}; use --format sentence-transformers")


def write_pylate(directory: Path, saved: SavedSettings, prompts: Mapping[str, str],
                 lengths: Mapping[str, int]) -> dict[str, str]:
    """Turn a complete directory of MultiVectorEncoder into one of PyLate, in place.

    Args:
        prompts: by role; one that is a token of the vocabulary becomes PyLate's prefix token.
        lengths: tokens of each role's longest text.
    Returns:
        The prompts that Sentence Transformers then says, by role.
    """
    assert saved.vectors is not None
    tokenizer = load_export_tokenizer(directory)
    prefixes = {role: prompt.strip() if prompt.strip() in tokenizer.get_vocab() else ""
                for role, prompt in prompts.items()}
    texts = {role: "" if prefixes[role] else prompt for role, prompt in prompts.items()}
    _write_modules(directory)
    for key in ("query_length", "document_length", "query_expansion"):
        _drop_key(directory / "sentence_bert_config.json", key)
    expansion, file = saved.vectors.expansion, directory / "config_sentence_transformers.json"
    query_length = lengths.get("query", DEFAULT_QUERY_LENGTH) if expansion is None else expansion.length
    settings: dict[str, Any] = {
        **read_json_object(file), "model_type": PYLATE, "similarity_fn_name": "MaxSim", "prompts": texts,
        "default_prompt_name": None, "query_length": query_length,
        "document_length": lengths.get("document", saved.max_length), "do_query_expansion": expansion is not None,
        "attend_to_expansion_tokens": expansion is not None and expansion.attend,
        "skiplist_words": list(saved.vectors.skiplist_words),
        **{f"{role}_prefix": prefixes[role] for role in ROLES}}
    write_json(file, settings)
    return {role: prefixes[role] + texts[role] for role in ROLES}


def _write_modules(directory: Path) -> None:
    """modules.json without what PyLate does itself."""
    kept = []
    for module in read_json_file(directory / "modules.json"):
        kind = module["type"].rpartition(".")[2]
        if kind in ("MultiVectorMask", "Normalize"):
            shutil.rmtree(directory / module["path"], ignore_errors=True)
            continue
        index = len(kept)
        type_ = DENSE_TYPE if kind == "Dense" else "sentence_transformers.models.Transformer"
        kept.append({"idx": index, "name": str(index), "path": module["path"], "type": type_})
        if kind == "Dense":
            file = directory / module["path"] / "config.json"
            for key in ("module_input_name", "module_output_name"):
                _drop_key(file, key)
            write_json(file, {**read_json_object(file), "use_residual": False})
    write_json(directory / "modules.json", kept)


def _drop_key(file: Path, key: str) -> None:
    values = read_json_object(file)
    if key in values:
        del values[key]
        write_json(file, values)
