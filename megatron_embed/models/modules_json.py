"""The modules.json of a Sentence Transformers directory: the modules, their stock classes and their folders.

`"path": ""` means the directory itself. Sentence Transformers writes it for the first module, the Transformer, so that
the model's files lie where Transformers finds them; every other module has a folder. Before version 2 the Transformer
had one too, 0_Transformer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import plain_name
from megatron_embed.models.key_table import SHOWN_CHARACTERS, shown_value
from megatron_embed.models.known_keys import MODULES

Kind = Literal["Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LogitScore", "MultiVectorMask",
               "SpladePooling"]

STOCK_TYPES: dict[str, Kind] = {
    **{f"sentence_transformers.{name}": "Transformer" for name in (
        "models.Transformer", "models.Transformer.Transformer", "models.transformer.Transformer",
        "base.modules.Transformer", "base.modules.transformer.Transformer",
        "sentence_transformer.modules.Transformer", "sentence_transformer.modules.transformer.Transformer",
        "cross_encoder.modules.Transformer")},
    **{f"sentence_transformers.{name}": "Pooling" for name in (
        "models.Pooling", "models.Pooling.Pooling", "models.pooling.Pooling", "sentence_transformer.modules.Pooling",
        "sentence_transformer.modules.pooling.Pooling")},
    **{f"sentence_transformers.{name}": "Normalize" for name in (
        "models.Normalize", "models.Normalize.Normalize", "models.normalize.Normalize", "base.modules.Normalize",
        "base.modules.normalize.Normalize", "sentence_transformer.modules.Normalize",
        "sentence_transformer.modules.normalize.Normalize")},
    **{f"sentence_transformers.{name}": "Dense" for name in (
        "models.Dense", "models.Dense.Dense", "models.dense.Dense", "base.modules.Dense", "base.modules.dense.Dense",
        "sentence_transformer.modules.Dense", "sentence_transformer.modules.dense.Dense")},
    **{f"sentence_transformers.{name}": "Dropout" for name in (
        "models.Dropout", "models.Dropout.Dropout", "models.dropout.Dropout", "base.modules.Dropout",
        "base.modules.dropout.Dropout", "sentence_transformer.modules.Dropout",
        "sentence_transformer.modules.dropout.Dropout")},
    **{f"sentence_transformers.{name}": "LogitScore" for name in (
        "cross_encoder.modules.LogitScore", "cross_encoder.modules.logit_score.LogitScore")},
    **{f"sentence_transformers.{name}": "MultiVectorMask" for name in (
        "multi_vector_encoder.modules.MultiVectorMask",
        "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask")},
    **{f"sentence_transformers.sparse_encoder.{name}": "Transformer" for name in (
        "models.MLMTransformer", "models.MLMTransformer.MLMTransformer", "models.mlm_transformer.MLMTransformer",
        "modules.MLMTransformer", "modules.mlm_transformer.MLMTransformer")},
    **{f"sentence_transformers.sparse_encoder.{name}": "SpladePooling" for name in (
        "models.SpladePooling", "models.SpladePooling.SpladePooling", "models.splade_pooling.SpladePooling",
        "modules.SpladePooling", "modules.splade_pooling.SpladePooling")},
    "pylate.models.Dense.Dense": "Dense",
}
"""Full names under which Sentence Transformers, from 2 to 6, writes the modules that we compute. A class of the same
last name from another package is another class."""


def _is_supported_order(kinds: list[Kind | None]) -> bool:
    """Transformer alone, or with LogitScore or SpladePooling, or with Pooling and then any number of Dense and
    Normalize, or without Pooling, these and one MultiVectorMask; Dense alone in PyLate's."""
    if kinds[:2] == ["Transformer", "Pooling"]:
        return set(kinds[2:]) <= {"Dense", "Normalize"}
    if kinds[:1] == ["Transformer"] and kinds.count("MultiVectorMask") == 1:
        return set(kinds[1:]) <= {"Dense", "Normalize", "MultiVectorMask"}
    if kinds[:1] == ["Transformer"] and set(kinds[1:]) == {"Dense"}:
        return True
    return kinds in (["Transformer"], ["Transformer", "LogitScore"], ["Transformer", "SpladePooling"])


@dataclass(frozen=True, kw_only=True)
class Module:
    """One entry of modules.json."""

    type: str
    """The full class name in the file."""
    kind: Kind | None
    """None: not one of the stock modules that we compute."""
    path: str
    """Name of its folder; empty: the directory itself."""


def read_modules(file: Path) -> list[Module]:
    """The modules that a modules.json lists, in its order.

    Raises:
        CheckpointError: it is not readable, not a list of modules, a folder is not a plain name, or two modules have
            the same name, or one has none.
    """
    try:
        listed: Any = read_json_file(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch the file again") from error
    good = isinstance(listed, list) and all(
        isinstance(module, dict) and isinstance(module.get("type"), str) and isinstance(module.get("path"), str)
        for module in listed)
    if not good:
        raise CheckpointError(f"{file}: must hold a list of modules, each with 'type' and 'path'; fetch the file again")
    for module in listed:
        MODULES.check(file, module)
    modules = [Module(type=module["type"], kind=STOCK_TYPES.get(module["type"]), path=module["path"])
               for module in listed]
    _check_names(file, [module.get("name") for module in listed])
    for index, module in enumerate(modules):
        if index or module.path:
            plain_name(module.path, f"{file}: path of module {index} ({module.type[:SHOWN_CHARACTERS]})")
    return modules


def _check_names(file: Path, names: list[Any]) -> None:
    """Raises CheckpointError unless every module has a name of its own, by which Sentence Transformers keeps it."""
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{file}: name = {shown_value(name)} of module {index} must be a text, and Sentence "
                                  f"Transformers does not load a module without one; write {str(index)!r}")
        if name in names[:index]:
            raise CheckpointError(f"{file}: name = {shown_value(name)} stands at two modules, of which Sentence "
                                  "Transformers keeps only the later; give each a name of its own, such as its number")


def supported_modules(directory: Path) -> list[Module]:
    """The modules of a directory that a text passes through, the transformer first; empty without a modules.json.

    A Dropout is left out: it does nothing outside training.

    Raises:
        CheckpointError: a module that we do not compute, another order, or a broken file.
    """
    file = directory / "modules.json"
    if not file.is_file():
        return []
    modules = [module for module in read_modules(file) if module.kind != "Dropout"]
    for module in modules:
        if module.kind is None:
            raise CheckpointError(f"{file}: module {shown_value(module.type)} is not supported; Transformer, Pooling, "
                                  "Dense, Normalize and MultiVectorMask of Sentence Transformers are, and those of "
                                  "SPLADE (MLMTransformer, SpladePooling), under its own full names")
    if not _is_supported_order([module.kind for module in modules]):
        raise CheckpointError(f"{file}: the modules {', '.join(str(module.kind) for module in modules) or '(none)'} "
                              "are not supported in this order; Transformer, Pooling and then perhaps Dense and "
                              "Normalize are, or MultiVectorMask in place of Pooling")
    return modules


def transformer_folder(directory: Path) -> Path:
    """The folder of the Transformer's files: the directory itself, or the one of its own (0_Transformer) that
    Sentence Transformers before 2 wrote.

    Raises:
        CheckpointError: see `read_modules`.
    """
    file = directory / "modules.json"
    modules = read_modules(file) if file.is_file() else []
    own = bool(modules) and modules[0].kind == "Transformer" and modules[0].path != ""
    return directory / modules[0].path if own else directory


def transformer_settings_files(directory: Path) -> list[Path]:
    """The files that may hold the Transformer module's settings, in the order in which they are looked for."""
    return [directory / f"sentence_{kind}_config.json"
            for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")]
