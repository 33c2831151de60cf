"""Checks of `doctor --config` on a run's output directories and their disks."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.platform.doctor import Check

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig
    from megatron_embed.models.families import ModelShape
    from megatron_embed.planning.parameters import AdaptedLinears

GIB = 2**30


def check_output_directories(config: "RunConfig", min_free_gib: int) -> list[Check]:
    """Whether each output directory can be written, and whether each of their disks has space for what the run writes.

    Args:
        min_free_gib: what must be free on every disk, however little the run writes.
    """
    directories = {"checkpoint.directory": config.checkpoint.directory, "logging.directory": config.logging.directory}
    exports = list(config.checkpoint.exports.values())
    checks, disks = [], dict[int, dict[str, Path]]()
    for key, directory in [*directories.items(), *(("checkpoint.export_at_end", name) for name in exports)]:
        if directory is None:
            continue
        if key == "checkpoint.export_at_end":
            folder = Path(directory).resolve().parent
            check = _check_export(config, directory, folder)
        else:
            folder = Path(directory)
            check = _check_writable(key, directory, folder)
        checks.append(check)
        if not check.remedy:
            disks.setdefault(os.stat(folder).st_dev, {})[key] = folder
    wanted = _bytes_to_write(config)
    return checks + [_check_space(folders, wanted, min_free_gib) for folders in disks.values()]


def _check_writable(key: str, directory: str, folder: Path) -> Check:
    """Whether a file can be made in `folder`, which is made if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".doctor-{os.uname().nodename}-{os.getpid()}"
        probe.open("x").close()
        probe.unlink()
    except OSError as error:
        return Check(name=key, value=directory, remedy=f"{key} = {directory!r}: cannot be written "
                       f"({error.strerror}); choose a directory that can")
    return Check(name=key, value=directory)


def _check_export(config: "RunConfig", target: str, folder: Path) -> Check:
    """Whether the export can be written beside its name, and whether that is free."""
    key = "checkpoint.export_at_end"
    if os.path.exists(target) and not (os.path.isdir(target) and not os.listdir(target)) and not _steps_there(config):
        return Check(name=key, value=target, remedy=f"{key} = {target!r}: exists already, and the run has no "
                       "checkpoint yet; remove it or choose another name")
    return _check_writable(key, target, folder)


def _steps_there(config: "RunConfig") -> list[int]:
    """Steps of the complete checkpoints that the run has."""
    from megatron_embed.checkpoint.files import step_directories

    return list(step_directories(Path(config.checkpoint.directory or os.devnull)))


def _bytes_to_write(config: "RunConfig") -> dict[str, tuple[int, str]]:
    """Bytes that the run is going to write, with their derivation, by setting; empty where the model is not known."""
    from megatron_embed.planning.disk import checkpoint_bytes, checkpoints_at_once, export_bytes, total_steps

    shape, parts = _trained(config)
    if shape is None:
        return {}
    steps, there = total_steps(config), _steps_there(config)
    if steps is not None and there and there[-1] >= steps:
        return {}
    each, export = checkpoint_bytes(config, shape, parts), export_bytes(config, shape)
    count = checkpoints_at_once(config)
    more = max(1, count - len(there))
    what = f"{count} checkpoints of {_size(each)}" if count > 1 else f"1 checkpoint of {_size(each)}"
    return {"checkpoint.directory": (more * each, what + (f", {len(there)} of them there" if there else "")),
            "checkpoint.export_at_end": (export, f"{len(config.checkpoint.exports)} exports of {_size(export)} in all"
                                         if config.checkpoint.export_formats else f"an export of {_size(export)}")}


def _trained(config: "RunConfig") -> "tuple[ModelShape | None, AdaptedLinears | None]":
    """Shape of the model, and the linear layers whose adapters are trained; no shape where either is not known."""
    from megatron_embed.planning.advice import adapted_linears
    from megatron_embed.planning.shapes import has_adapters
    from megatron_embed.run.input_checks import readable_shape

    shape = readable_shape(config.model.path)
    if shape is None:
        return None, None
    if config.lora.rank == 0 and has_adapters(config.model.path):
        return None, None  # which are trained on
    return shape, adapted_linears(config, shape)


def _check_space(folders: dict[str, Path], wanted: dict[str, tuple[int, str]], min_free_gib: int) -> Check:
    """Whether the disk that these directories lie on has space for what is written to them."""
    free = min(shutil.disk_usage(folder).free for folder in folders.values())
    parts = [wanted[key] for key in folders if key in wanted]
    needed, where = sum(size for size, _ in parts), next(iter(folders.values()))
    name, value = "free disk", f"{_size(free)} for {' and '.join(folders)}"
    said = " and ".join(words for _, words in parts)
    if needed > free:
        return Check(name=name, value=value, remedy=f"{where}: the run writes {_size(needed)} ({said}) and "
                       f"{_size(free)} are free; free some space, choose another disk, or lower checkpoint.keep")
    if free < min_free_gib * GIB:
        return Check(name=name, value=value, remedy=f"{where}: less than {min_free_gib} GiB are free; free some space, "
                       "or choose another disk")
    note = "" if parts else "how much the run writes is not known" if not wanted else ""
    return Check(name=name, value=f"{value}; the run writes {_size(needed)}: {said}" if parts else value, note=note)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
