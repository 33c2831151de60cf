"""Time, peak memory and recall of searches over vectors on the disk: exact, by inverted lists and by a graph.

    python tools/bench_vectors.py --directory DIR --rows 5000000 --kinds flat ivf [--queries 256] [--top-k 10]

Writes clustered vectors [rows, 384] in float16 shards (kept for the next call), then opens and searches them in a new
process for each kind, as `mine --vectors` and `evaluate --vectors` do. Prints the seconds of opening (with an index:
of building it) and of the search, the peak of resident memory and of anonymous memory, the size of the index, and the
share of the exact hits that were found.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import children
import numpy as np

WIDTH, SHARD_ROWS, CENTRES = 384, 262_144, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["flat", "ivf", "hnsw"])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--probes", type=int)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.directory / f"vectors_{args.rows}"
    if args.kind is not None:
        measure(folder, args)
        return
    write(folder, args.rows)
    size = sum(file.stat().st_size for file in folder.glob("*.npy"))
    print(f"{args.rows:,} vectors of {WIDTH}, {size / 1e9:.2f} GB in float16; {args.queries} queries, "
          f"top {args.top_k}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, load {os.getloadavg()[0]:.1f}",
          flush=True)
    for kind in args.kinds:
        children.run([sys.executable, __file__, *sys.argv[1:], "--kind", kind])


def write(folder: Path, rows: int) -> None:
    """Unit vectors around centres, about as near to each other as texts of one topic."""
    generator = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    centres = generator.standard_normal((CENTRES, WIDTH), dtype=np.float32)
    noise = generator.standard_normal((min(rows, SHARD_ROWS), WIDTH), dtype=np.float32)
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        count, file = min(SHARD_ROWS, rows - start), folder / f"{shard:06d}.npy"
        if file.is_file():
            continue
        chosen = np.random.default_rng([1, shard]).integers(0, CENTRES, count)
        vectors = centres[chosen] + np.roll(noise, shard, axis=1)[:count]
        np.save(folder / ".unfinished.npy", (vectors / np.linalg.norm(vectors, axis=1)[:, None]).astype(np.float16))
        (folder / ".unfinished.npy").rename(file)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Search by one kind and print a line."""
    import torch

    from megatron_embed.evaluation.ivf_index import IvfIndex, IvfSettings
    from megatron_embed.evaluation.search import StreamedSearch
    from megatron_embed.evaluation.vector_files import VectorFile
    from megatron_embed.evaluation.vector_index import HnswSettings, hnsw_index

    peak = {"anonymous": 0}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    vectors = VectorFile(str(folder), "--vectors", similarity="cosine")
    generator = np.random.default_rng(2)
    near = vectors.gather(generator.integers(0, len(vectors), args.queries))
    queries = vectors.scaled(near + 0.03 * torch.from_numpy(generator.standard_normal(near.shape, dtype=np.float32)))
    answers, index, size = folder.with_name(f"{folder.name}.exact.npy"), None, 0
    started, cpu = time.monotonic(), time.process_time()
    if args.kind == "ivf":
        index = IvfIndex(vectors, IvfSettings(probes=args.probes))
        size = sum(file.stat().st_size for file in Path(f"{folder}.ivf-{WIDTH}").glob("*"))
    elif args.kind == "hnsw":
        index = hnsw_index(vectors, HnswSettings())
        size = Path(f"{folder}.hnsw-{WIDTH}.faiss").stat().st_size
    opened, opened_cpu = time.monotonic() - started, time.process_time() - cpu
    started, cpu = time.monotonic(), time.process_time()
    if args.kind == "flat":
        exact = StreamedSearch(queries, args.top_k)
        for block in vectors.blocks():
            exact.add(block)
        rows = exact.result()[1].numpy()
        np.save(answers, rows)
    elif args.kind == "ivf":
        _, rows = index.search(queries, args.top_k)
    else:
        _, rows = index.search(queries.numpy(), args.top_k)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    recall = "not known: run flat first"
    if answers.is_file():
        pairs = zip(rows.tolist(), np.load(answers).tolist(), strict=True)
        recall = f"{np.mean([len(set(found) & set(wanted)) for found, wanted in pairs]) / args.top_k:.4f}"
    settings = f" ({index.lists} lists, {index.probes} probes)" if args.kind == "ivf" else ""
    print(f"  {args.kind + settings:32} opened in {opened:.1f} s ({opened_cpu:.1f} CPU s), searched in {seconds:.1f} s "
          f"({cpu:.1f} CPU s); peak RSS {status('VmHWM') / 2**20:.0f} MiB, of it anonymous at most "
          f"{peak['anonymous'] / 2**20:.0f} MiB; index {size / 1e9:.2f} GB; recall@{args.top_k} {recall}", flush=True)


def watch(peak: dict[str, int]) -> None:
    """Keep the most anonymous memory seen."""
    while True:
        peak["anonymous"] = max(peak["anonymous"], status("RssAnon"))
        time.sleep(0.05)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
