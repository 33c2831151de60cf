"""A fingerprint of a model directory's weights, to recognize the base model of adapters that do not contain it."""

import xxhash

from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.storage.byte_range import read_at

SAMPLE = 1 << 14
"""Bytes read at the beginning, in the middle and at the end of each tensor."""


def fingerprint(source: HFDirectory) -> str:
    """XXH3-128 of every backbone tensor's name, dtype, shape and samples of its bytes, in hexadecimal.

    Reads 48 KiB of a tensor, not all of it: training changes values everywhere. The names of files and the directory do
    not count, so a copy has the same. No communication.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(set(source.stored_names) - set(source.passthrough)):
        entry, data = source.entry(name), source.byte_range(name)
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
        last = max(0, data.length - SAMPLE)
        for start in (0, last // 2, last):
            sample = bytearray(min(SAMPLE, data.length))
            read_at(data.file.fileno(), memoryview(sample), data.start + start)
            digest.update(bytes(sample))
    return digest.hexdigest()
