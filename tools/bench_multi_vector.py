"""Memory of late interaction's loss as the global batch grows, on two data-parallel ranks.

    python tools/bench_multi_vector.py --documents 256 512 1024 2048 4096

Per size, in processes of their own: what a rank's peak resident memory grows by during the loss and its gradient,
beyond the rank's own vectors and their gradient; beside it the bytes of all dot products at once, which other
implementations hold ([queries of a rank, documents, vectors of a query, vectors of a document]).
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measurement import exit_on_signals

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.config.schema import EmbeddingConfig, ModelConfig, ObjectiveConfig, RunConfig
from megatron_embed.losses import maxsim
from megatron_embed.objectives import document_tiles, multi_vector

RANKS = 2
MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096],
                        help="of the global batch")
    parser.add_argument("--query-vectors", type=int, default=8)
    parser.add_argument("--document-vectors", type=int, default=24, help="of the longest; of others half as many")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tile", type=int, default=maxsim.MAXSIM_TILE_ELEMENTS, help="numbers of a tile")
    return parser.parse_args()


def batch_of(num_queries: int, arguments: argparse.Namespace, generator: torch.Generator) -> EmbedBatch:
    """One rank's queries with a document each."""
    rows = torch.arange(num_queries)
    longest = arguments.document_vectors
    documents = torch.randint(longest // 2, longest + 1, (num_queries,), generator=generator)
    ids = torch.randint(2**40, (num_queries,), generator=generator)
    return EmbedBatch(
        micro_batches=(), num_truncated=0, num_queries=num_queries, num_documents=num_queries, positive_index=rows,
        is_positive=torch.ones(num_queries, dtype=torch.bool), document_query=rows, query_ids=ids,
        positive_query=rows, positive_ids=ids, document_ids=ids,
        vector_counts=torch.cat([torch.full_like(documents, arguments.query_vectors), documents]),
        capacity=Capacity(num_queries, num_queries, num_queries),
        micro_capacity=Capacity(num_queries, num_queries, num_queries))


def measure(rank: int, store: str, num_documents: int, arguments: argparse.Namespace, results: Any) -> None:
    """Sends a rank's numbers to the first process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for module in (maxsim, document_tiles, multi_vector):
        module.MAXSIM_TILE_ELEMENTS = arguments.tile
    config = RunConfig(model=ModelConfig(path="none"), embedding=EmbeddingConfig(head="multi_vector"),
                       objective=ObjectiveConfig(temperature=1.0, mask_duplicates=True))
    objective = multi_vector.MultiVectorContrastive(config, dist.group.WORLD)
    generator = torch.Generator().manual_seed(rank)

    def step(num_queries: int) -> tuple[int, float, float]:
        batch = batch_of(num_queries, arguments, generator)
        assert batch.vector_counts is not None
        vectors = torch.randn(int(batch.vector_counts.sum()), arguments.dim, generator=generator)
        embeddings = torch.nn.functional.normalize(vectors, dim=1, out=vectors)
        gradient = torch.ones_like(embeddings)  # allocated before the peak is read
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        del gradient
        started = time.perf_counter()
        objective(embeddings, batch, total=float(num_queries * RANKS))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return embeddings.nbytes, (after - before) / 1024, time.perf_counter() - started

    step(8)  # libraries allocate their buffers
    results.put(step(num_documents // RANKS))
    dist.barrier()


def main() -> None:
    arguments = parse_arguments()
    exit_on_signals()  # which ends daemons
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back to the kernel: the peak is what is held
    context = multiprocessing.get_context("spawn")
    for num_documents in arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            results, store = context.Queue(), str(Path(folder) / "store")
            workers = [context.Process(target=measure, args=(rank, store, num_documents, arguments, results),
                                       daemon=True)
                       for rank in range(RANKS)]
            for worker in workers:
                worker.start()
            measured = [results.get() for _ in workers]
            for worker in workers:
                worker.join()
        own, beyond, seconds = (max(values) for values in zip(*measured, strict=True))
        products = num_documents // RANKS * num_documents * arguments.query_vectors * arguments.document_vectors * 4
        print(json.dumps({"documents": num_documents, "own_vectors_mib": round(own / MIB, 1),
                          "beyond_them_and_their_gradient_mib": round(beyond, 1),
                          "all_dot_products_mib": round(products / MIB), "seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
