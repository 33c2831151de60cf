"""What a model directory's Sentence Transformers files say about pooling, normalization, prompts and length."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import read_hf_config
from megatron_embed.models.pooling_names import POOLINGS, Pooling

_LEGACY_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}

_NO_LIMIT = 10**9
"""Transformers writes 1e30 where a tokenizer has no limit."""


@dataclass(frozen=True, kw_only=True)
class SavedSettings:
    """null: the directory does not say."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    """Tokens, special tokens included: sentence_bert_config.json's, else the tokenizer's."""
    similarity: Literal["cosine", "dot"] = "cosine"
    prompts: dict[str, str] = field(default_factory=dict)
    """By role; `passage` counts as document."""
    dtype: str | None = None
    """Of config.json."""


def _json(path: Path) -> Any:
    try:
        return read_json_file(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from error


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    values = _json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(values).__name__}; fetch the file again")
    return values


def _modules(path: Path) -> list[dict[str, str]]:
    """The modules of a modules.json, each with its type and its folder."""
    modules = _json(path)
    good = isinstance(modules, list) and all(
        isinstance(module, dict) and isinstance(module.get("type"), str) and isinstance(module.get("path"), str)
        for module in modules)
    if not good:
        raise CheckpointError(f"{path}: must hold a list of modules, each with 'type' and 'path'; fetch the file again")
    assert isinstance(modules, list)
    return modules


def _pooling(path: Path, config: dict[str, Any]) -> Pooling | None:
    """The one pooling that a 1_Pooling/config.json switches on, in either spelling."""
    mode = config.get("pooling_mode")
    active = [mode] if mode else [name for flag, name in _LEGACY_FLAGS.items() if config.get(flag)]
    others = [flag for flag, on in config.items()
              if flag.startswith("pooling_mode_") and on is True and flag not in _LEGACY_FLAGS]
    if len(active) + len(others) == 0:
        return None
    if others or len(active) != 1 or active[0] not in POOLINGS:
        raise CheckpointError(f"{path}: pooling {active + others} is not supported; one of {', '.join(POOLINGS)} is")
    return active[0]  # type: ignore[no-any-return]


def read_saved_settings(directory: str | Path, base: Path | None = None) -> SavedSettings:
    """Settings of a Hugging Face or Sentence Transformers directory.

    Args:
        base: where config.json lies instead (a PEFT adapter has none).
    Raises:
        CheckpointError: a module or pooling that we do not compute, or a broken file.
    """
    folder = Path(directory)
    hf = read_hf_config(base or folder)
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    common = {"dtype": dtype if isinstance(dtype, str) else None, "max_length": _max_length(folder)}
    if not (folder / "modules.json").is_file():
        return SavedSettings(**common)
    pooling, normalize, include_prompt = None, False, True
    modules = _modules(folder / "modules.json")
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            path = folder / module["path"] / "config.json"
            pooling, include_prompt = _pooling(path, _object(path)), _object(path).get("include_prompt", True)
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "LogitScore"):  # the latter is a reranker's, see reranker_settings.py
            raise CheckpointError(f"{folder / 'modules.json'}: module {module['type']!r} is not supported; "
                                  "Transformer, Pooling and Normalize are")
    settings = _object(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{folder / 'config_sentence_transformers.json'}: prompts = {prompts!r} must map names "
                              "to texts; correct it")
    if "passage" in prompts:
        prompts.setdefault("document", prompts["passage"])
    roles = {role: text for role, text in prompts.items() if role in ("query", "document")}
    if not include_prompt and any(roles.values()):
        raise CheckpointError(f"{folder}: include_prompt = false in its pooling is not supported together with "
                              "prompts; set it to true, or empty the prompts in config_sentence_transformers.json")
    similarity = "dot" if settings.get("similarity_fn_name") in ("dot", "dot_product") else "cosine"
    return SavedSettings(pooling=pooling, normalize=normalize, prompts=roles, similarity=similarity, **common)


def _max_length(folder: Path) -> int | None:
    length = _object(folder / "sentence_bert_config.json").get("max_seq_length")
    if length is None:
        length = _object(folder / "tokenizer_config.json").get("model_max_length")
    return length if isinstance(length, int) and 0 < length < _NO_LIMIT else None
