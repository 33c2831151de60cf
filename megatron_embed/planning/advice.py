"""A configuration completed from the model and rows on this machine, and the reason why a layout is impossible."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.errors import ConfigError
from megatron_embed.planning.shapes import checkpoint_at, has_adapters, model_files

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig
    from megatron_embed.models.families import ModelShape
    from megatron_embed.planning.parameters import AdaptedLinears


def with_lengths_at_hand(config: "RunConfig", shape: "ModelShape") -> "RunConfig":
    """The configuration with the lengths of its model's directory, if that is here, in place of None.

    A PEFT directory has those of its base model.
    """
    folder = Path(config.model.path).expanduser()
    files = model_files(config.model.path) if folder.is_dir() else None
    if not config.workload.inherits_text_settings or files is None:
        return config
    from megatron_embed.models.saved_settings import read_saved_settings, trained_lengths

    saved = read_saved_settings(folder, files) if (folder / "modules.json").is_file() else read_saved_settings(files)
    lengths = trained_lengths(saved, shape.longest_text, {})
    return dataclasses.replace(config, data=dataclasses.replace(
        config.data, query_max_length=config.data.query_max_length or lengths["query"],
        document_max_length=config.data.document_max_length or lengths["document"]))


def with_rows_at_hand(config: "RunConfig") -> "tuple[RunConfig, str]":
    """The configuration with no more documents per query than its rows have, and a sentence with their number.

    Unchanged where an entry of `data.train` is not a file or folder of this machine: nothing is fetched.

    Raises:
        DataError: a row cannot be used.
    """
    from megatron_embed.data.row_source import files_of

    data = config.data
    if not data.train or not all(os.path.exists(file.path) or files_of(file.path) for file in data.train):
        documents = f"{data.num_positives} positive and {data.num_negatives} negative documents"
        if config.workload.rows == "rerank" and not data.num_negatives:
            documents = "1 document, since data.num_negatives = 0 takes all that a row has: set it to their number"
        return config, f"The rows of data.train are not here: each query is assumed to have {documents}."
    from megatron_embed.data.dataset import open_records

    records = open_records(data.train, config.workload.rows)
    if config.workload.rows == "rerank":
        documents = records.most_in_list(data.num_negatives)
        data = dataclasses.replace(data, num_negatives=documents - 1)
        return dataclasses.replace(config, data=data), (
            f"{len(records):,} rows of data.train, with up to {documents} documents each in use.")
    needed = config.objective.needs_own_negatives or not all(file.in_batch_negatives for file in data.train)
    data = dataclasses.replace(data, num_positives=min(data.num_positives, records.most_positives),
                               num_negatives=max(int(needed), min(data.num_negatives, records.most_negatives)))
    return dataclasses.replace(config, data=data), (
        f"{len(records):,} rows of data.train, with up to {data.num_positives} positive and {data.num_negatives} "
        "negative documents each in use.")


def with_adapters_of_model(config: "RunConfig", shape: "ModelShape") -> "RunConfig":
    """The configuration with section `lora` from the PEFT directory or checkpoint that the model is.

    Raises:
        CheckpointError: adapters that training would refuse.
    """
    if config.lora.rank or not has_adapters(config.model.path):
        return config
    checkpoint = checkpoint_at(config.model.path)
    from megatron_embed.convert.checkpoint_directory import open_checkpoint
    from megatron_embed.convert.peft import PeftAdapter
    from megatron_embed.convert.tables.lookup import rules_for

    if checkpoint is None:
        with PeftAdapter(Path(config.model.path).expanduser(), rules_for(shape.family), shape) as adapter:
            settings = adapter.settings
    else:
        saved = open_checkpoint(checkpoint).info.adapters
        if saved is None:
            return config
        settings = saved
    lora = dataclasses.replace(config.lora, rank=settings.rank, alpha=settings.alpha,
                               use_rslora=settings.use_rslora, target_modules=settings.modules)
    return dataclasses.replace(config, lora=lora)


def adapted_linears(config: "RunConfig", shape: "ModelShape") -> "AdaptedLinears | None":
    """Linear layers that get adapters by section `lora`; None: every parameter is trained."""
    if config.lora.rank == 0:
        return None
    from megatron_embed.convert.lora_names import parts_by_linear, resolve_modules
    from megatron_embed.convert.tables.lookup import rules_for

    family = rules_for(shape.family)
    return parts_by_linear(family, resolve_modules(family, config.lora.target_modules, "lora.target_modules"))


def explain_impossible(config: "RunConfig", shape: "ModelShape | None", gpus: int,
                       documents: int | None = None) -> None:
    """Raises the error that training would raise. `documents`: see check_token_budget."""
    from megatron_embed.models.backbone import check_divisible
    from megatron_embed.parallel.topology import check_batch_sizes, check_token_budget, check_world_size

    check_batch_sizes(config, check_world_size(config.parallel, gpus))
    if shape is not None:
        check_divisible(shape, config.parallel)
    check_token_budget(config, documents)


def budget_holds(config: "RunConfig") -> bool:
    """Whether training would accept the layout's token budget, if there is one."""
    from megatron_embed.parallel.topology import check_token_budget

    try:
        check_token_budget(config)
    except ConfigError:
        return False
    return True
