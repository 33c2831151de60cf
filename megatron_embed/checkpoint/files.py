"""A checkpoint's files, and the order in which they become complete: temporary name, fsync, rename, `latest`."""

import logging
import os
import re
import shutil
from pathlib import Path

from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import plain_name

logger = logging.getLogger(__name__)

INFO_FILE = "megatron_embed.json"
BEST = "best"
"""Link in a run's directory to its best checkpoint, which `remove_old` leaves alone."""
LATEST = "latest"
"""File in a run's directory that names its newest checkpoint. Write the name of an older one to go back to it."""
ABANDONED = ".abandoned"
"""End of a checkpoint's name once its run went back to one before it."""
_STEP = re.compile(r"step_(\d+)$")
_UNFINISHED = re.compile(r"\.step_\d+(\.old)?\.tmp")
_LONGEST_NAME = 4096
MARK_FILE = ".made-by-megatron-embed"
"""File in a folder that a later start of a run may remove."""


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """fsync of every file and folder below `directory`, itself included."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:  # x: a link that somebody put there is not followed
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)


def step_directories(directory: Path) -> dict[int, Path]:
    """Complete training checkpoints by number of optimizer steps done, ascending."""
    checkpoints = {}
    for entry in directory.iterdir() if directory.is_dir() else ():
        match = _STEP.match(entry.name)
        if match and (entry / INFO_FILE).is_file():
            checkpoints[int(match.group(1))] = entry
    return dict(sorted(checkpoints.items()))


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The training checkpoint that `latest` names, else the newest complete one; None if there is none."""
    folder = Path(directory)
    named = _target_of_latest(folder)
    if named is not None:
        return named
    complete = step_directories(folder)
    return complete[max(complete)] if complete else None


def _target_of_latest(folder: Path) -> Path | None:
    """The complete checkpoint that `latest` names, if it does."""
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        said = file.read(_LONGEST_NAME).decode(errors="replace").strip()
    if not said:
        return None
    named = folder / plain_name(said, f"{pointer}: the checkpoint that it names")
    return named if (named / INFO_FILE).is_file() else None


def set_aside_after(directory: Path, step: int) -> list[str]:
    """Rename the checkpoints of more than `step` steps, which a run that resumes from `step` leaves behind, so that
    they are not taken for its own: `step_000500.abandoned`, with a number appended if that exists already.

    The link `best` is removed if it leads to one of them. Returns their new names; nothing is deleted. Only before
    training starts.
    """
    moved = []
    for steps, folder in step_directories(directory).items():
        if steps <= step:
            continue
        target, count = folder.with_name(folder.name + ABANDONED), 1
        while os.path.lexists(target):
            count += 1
            target = folder.with_name(f"{folder.name}{ABANDONED}-{count}")
        best = directory / BEST
        if best.is_symlink() and best.resolve() == folder.resolve():
            best.unlink()
        folder.rename(target)
        moved.append(target.name)
    if moved:
        sync_directory(directory)
    return moved


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder by hard links where the file system allows, else by copying."""

    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)
        return other

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(MARK_FILE))


def replace_directory(new: Path, target: Path) -> None:
    """Give a complete folder its final name. An older folder of that name is deleted once the new one has it."""
    old = target.with_name(f".{target.name}.old.tmp")
    if os.path.lexists(target):
        target.rename(old)
    new.rename(target)
    sync_directory(target.parent)
    remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder of ours, or a link to one but not its target. A failure causes a warning, not the run's end."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); the run continues: remove it by hand", folder,
                       error.strerror or error)


def make_marked(folder: Path) -> None:
    """Make an empty folder with our mark in place of an earlier one.

    Raises:
        CheckpointError: the earlier one does not carry the mark, so it may be the user's own.
    """
    if os.path.lexists(folder):
        ours = folder.is_dir() and not folder.is_symlink() and (
            (folder / MARK_FILE).is_file() or (folder / INFO_FILE).is_file() or not any(folder.iterdir()))
        if not ours:
            raise CheckpointError(f"{folder}: was not made by megatron-embed, which needs this name for its own "
                                  "files; move it away, or choose another checkpoint.directory")
        for entry in folder.iterdir():  # the mark last, so that a kill leaves a folder that is known as ours
            if entry.name not in (MARK_FILE, INFO_FILE):
                remove = shutil.rmtree if entry.is_dir() and not entry.is_symlink() else os.unlink
                remove(entry)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK_FILE).touch()


def remove_old(directory: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep` training checkpoints (0 keeps all), those after a multiple of `keep_every`
    steps, the best, and the one `latest` names.

    If one was moved away and linked back, the link is deleted and its target stays.
    """
    kept = (directory / BEST).resolve(), (_target_of_latest(directory) or directory).resolve()
    complete = list(step_directories(directory).items()) if keep else []
    for old in [path for step, path in complete[:-keep] if path.resolve() not in kept
                and (keep_every is None or step % keep_every)]:
        hidden = old.with_name(f".{old.name}.old.tmp")  # first, so that a kill leaves nothing that looks whole
        try:
            old.rename(hidden)
        except OSError as error:
            logger.warning("%s: this old checkpoint cannot be removed (%s); the run continues: remove it by hand", old,
                           error.strerror or error)
        else:
            remove_folder(hidden)


def remove_unfinished(directory: Path) -> None:
    """Delete what killed saves left behind. Only before training starts: no save may be under way.

    Only names that we alone make; a folder `step_N` without our mark may be somebody else's.
    """
    for entry in directory.iterdir() if directory.is_dir() else ():
        if _UNFINISHED.fullmatch(entry.name):
            remove_folder(entry)
