"""Seconds and peak memory of mining given vectors: `python tools/bench_mining.py --vectors 100000 --dim 384`"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from megatron_embed.mining.dense import mine_vectors
from megatron_embed.mining.filters import MiningOptions


def resident_mib() -> float:
    """The most that this process has held so far. Not getrusage's: there it begins with what the parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000, help="documents, and as many queries")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--chunk", type=int, default=8192, help="documents scored at once")
    parser.add_argument("--num-negatives", type=int, default=7)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    documents = torch.empty(args.vectors, args.dim).normal_(generator=generator)
    queries = torch.empty(args.vectors, args.dim).normal_(generator=generator).add_(documents)
    for vectors in (documents, queries):  # by rows, so that scaling leaves no trace in the peak
        for start in range(0, args.vectors, 4096):
            vectors[start:start + 4096] = normalize(vectors[start:start + 4096], dim=1)
    positives = [[number] for number in range(args.vectors)]
    options = MiningOptions(num_negatives=args.num_negatives)
    mine_vectors(queries[:8], documents[:8].split(4), positives[:8], options)  # libraries loaded
    before, start = resident_mib(), time.perf_counter()
    mined = mine_vectors(queries, documents.split(4096), positives, options, show_progress=True)
    print(json.dumps({
        "vectors_mib": 2 * documents.nbytes / 2**20, "seconds": round(time.perf_counter() - start, 1),
        "peak_beyond_vectors_mib": round(resident_mib() - before, 1), "threads": torch.get_num_threads(),
        "negatives": sum(len(found.negatives) for found in mined)}))


if __name__ == "__main__":
    main()
