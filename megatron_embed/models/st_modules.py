"""A Sentence Transformers directory's modules.json: which modules there are, of which stock class, and where they lie.

`"path": ""` means the directory itself. Sentence Transformers writes it for the first module, the Transformer, so that
the model's files lie where Transformers finds them; every other module has a folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import plain_name
from megatron_embed.models.foreign_tables import MODULES

Kind = Literal["Transformer", "Pooling", "Normalize", "Dropout", "LogitScore"]

STOCK_TYPES: dict[str, Kind] = {
    **{f"sentence_transformers.{place}": "Transformer" for place in (
        "models.Transformer", "models.Transformer.Transformer", "models.transformer.Transformer",
        "base.modules.Transformer", "base.modules.transformer.Transformer",
        "sentence_transformer.modules.Transformer", "sentence_transformer.modules.transformer.Transformer",
        "cross_encoder.modules.Transformer")},
    **{f"sentence_transformers.{place}": "Pooling" for place in (
        "models.Pooling", "models.Pooling.Pooling", "models.pooling.Pooling", "sentence_transformer.modules.Pooling",
        "sentence_transformer.modules.pooling.Pooling")},
    **{f"sentence_transformers.{place}": "Normalize" for place in (
        "models.Normalize", "models.Normalize.Normalize", "models.normalize.Normalize", "base.modules.Normalize",
        "base.modules.normalize.Normalize", "sentence_transformer.modules.Normalize",
        "sentence_transformer.modules.normalize.Normalize")},
    **{f"sentence_transformers.{place}": "Dropout" for place in (
        "models.Dropout", "models.Dropout.Dropout", "models.dropout.Dropout", "base.modules.Dropout",
        "base.modules.dropout.Dropout", "sentence_transformer.modules.Dropout",
        "sentence_transformer.modules.dropout.Dropout")},
    **{f"sentence_transformers.{place}": "LogitScore" for place in (
        "cross_encoder.modules.LogitScore", "cross_encoder.modules.logit_score.LogitScore")},
}
"""Full names under which Sentence Transformers, from 2 to 6, writes the modules that we compute. A class of the same
last name from another package is another class."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """One entry of modules.json."""

    type: str
    """As the file says it."""
    kind: Kind | None
    """None: none of the stock modules that we compute."""
    path: str
    """Name of its folder; empty: the directory itself."""


def read_modules(file: Path) -> list[Module]:
    """The modules that a modules.json lists, in its order.

    Raises:
        CheckpointError: it is not readable, no list of modules, or a folder is no plain name.
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
    for number, module in enumerate(modules):
        if number or module.path:
            plain_name(module.path, f"{file}: path of module {number} ({module.type})")
    return modules
