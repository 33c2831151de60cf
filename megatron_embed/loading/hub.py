"""A model's directory by its path, or by its name on the hub."""

import os
from pathlib import Path

from megatron_embed.errors import CheckpointError

NOT_FETCHED = ("*.bin", "*.h5", "*.msgpack", "*.onnx", "*[!r].pt", "*[!a]r.pt")
"""Files of weights that are not read. Of *.pt two are, a joint model's, whose names end in linear.pt."""


def local_directory(path: str) -> Path:
    """The directory itself, or a hub model's files in the local cache, fetched if need be. Raises CheckpointError."""
    folder = Path(os.path.expanduser(path))
    if path and folder.is_dir():
        return folder
    if folder.exists() or path.startswith(("/", ".", "~")) or path.count("/") != 1:
        what = "a file" if path and folder.exists() else "no such directory"
        raise CheckpointError(f"{what}; give a model directory or a hub name such as Qwen/Qwen3-Embedding-0.6B")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path, ignore_patterns=list(NOT_FETCHED)))
    except Exception as error:
        # The hub client raises its own, requests' and OS errors alike; to the user all mean: not here and not fetched.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no such directory, and as a hub name it could not be fetched ({reason}); correct the "
                              "path, or check the name and the network") from error
