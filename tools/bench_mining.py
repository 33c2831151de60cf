"""Seconds and peak memory of mining with random vectors: `python tools/bench_mining.py --vectors 100000 --dim 384`"""

import argparse
import json
import time

import torch
from measurement import peak_memory_mib
from torch.nn.functional import normalize

from megatron_embed.evaluation import search
from megatron_embed.mining.dense import mine_vectors
from megatron_embed.mining.filters import MiningOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000, help="number of documents and of queries")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--chunk", type=int, default=8192, help="documents scored together")
    parser.add_argument("--num-negatives", type=int, default=7)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    documents = torch.empty(args.vectors, args.dim).normal_(generator=generator)
    queries = torch.empty(args.vectors, args.dim).normal_(generator=generator).add_(documents)
    for vectors in (documents, queries):  # in blocks, so that normalization does not raise the peak
        for start in range(0, args.vectors, 4096):
            vectors[start:start + 4096] = normalize(vectors[start:start + 4096], dim=1)
    positives = [[query] for query in range(args.vectors)]
    search.DOCUMENTS_PER_CHUNK = args.chunk
    options = MiningOptions(num_negatives=args.num_negatives)
    mine_vectors(queries[:8], documents[:8].split(4), positives[:8], options)  # loads the libraries
    before, start = peak_memory_mib(), time.perf_counter()
    mined = mine_vectors(queries, documents.split(4096), positives, options, show_progress=True)
    print(json.dumps({
        "vectors_mib": 2 * documents.nbytes / 2**20, "seconds": round(time.perf_counter() - start, 1),
        "peak_beyond_vectors_mib": round(peak_memory_mib() - before, 1), "threads": torch.get_num_threads(),
        "negatives": sum(len(result.negatives) for result in mined)}))


if __name__ == "__main__":
    main()
