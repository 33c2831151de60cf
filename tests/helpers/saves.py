"""A saver without a training run, and what its saves add to the resident memory."""

import ctypes
import gc
import re
import time
from contextlib import nullcontext
from pathlib import Path

from tests.helpers.old_checkpoints import written_as_before
from tests.helpers.toys import open_model


def open_saver(config, folder, background):
    """A saver of a model and its optimizer, before the first step."""
    import torch.distributed as dist

    from megatron_embed.checkpoint.load import TrainingState
    from megatron_embed.checkpoint.save import Saver
    from megatron_embed.platform.compat import initialize_optimizer_state
    from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp

    opened = open_model(config)
    optimizer = build_optimizer(config, wrap_in_ddp(opened.chunks, config, opened.topology), opened.topology)
    initialize_optimizer_state(optimizer)
    state = TrainingState(models=opened.chunks, optimizer=optimizer,
                          scheduler=build_scheduler(optimizer, config.training, 10))
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return Saver(str(folder), state, assets=assets, keep=0, background=background, on_complete=None)


def written(folder, step):
    import torch.distributed as dist

    dist.barrier()
    return sum(file.stat().st_size for file in (folder / f"step_{step:06d}" / "model").glob(f"__{dist.get_rank()}_*"))


def resident():
    """Bytes: (resident memory, its peak since the last reset)."""
    text = Path("/proc/self/status").read_text()
    return tuple(1024 * int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmRSS", "VmHWM"))


def growth_of_saves(config, folder, background):
    """Per way of saving, as before and in slices: (bytes by which the resident memory grew at most, bytes that this
    rank wrote, seconds until the next step may begin)."""
    saver, results = open_saver(config, folder, background), []
    for step, context in enumerate((written_as_before(), nullcontext(), written_as_before(), nullcontext()), 1):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the save before has freed would be used again
        Path("/proc/self/clear_refs").write_text("5")
        before, _ = resident()
        started = time.monotonic()
        with context:
            saver.save(step)
            seconds = time.monotonic() - started
            saver.finish()
        results.append((resident()[1] - before, written(folder, step), seconds))
    return results
