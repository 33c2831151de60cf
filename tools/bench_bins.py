"""Micro-batches packed from whole texts: time per token by their size, and how full they are.

Without options: time per token of a forward and backward pass in micro-batches of 2,048 and 16,384 tokens, in turn.
Packed attention computes one group of similarly long sequences at a time, so the time per token must not grow with the
micro-batch: the ratio printed last stays near 1 (attention over the whole micro-batch would make that part 8 times as
expensive).

With --fill: how full the micro-batches of configurations are. Real tokens of one on average, divided by the tokens it
may have: if micro-batches are counted in queries (as many as surely fit into the token budget), if they are filled up
to the budget, and in the first pass. Rows are
those of --data, with documents of other rows as hard negatives where one has too few; lengths are those that
the packaged model's tokenizer gives.

    python tools/bench_bins.py
    python tools/bench_bins.py --fill configs/qwen3_8b_embed_tp2_8xh100.yaml configs/qwen3_0.6b_embed_dp8_8xh100.yaml
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from small_models import packaged_model

from megatron_embed.batch import Capacity, EmbedBatch, MicroBatch
from megatron_embed.config.load import load_config
from megatron_embed.config.schema import ModelConfig, RunConfig, TrainFile
from megatron_embed.data.bins import bin_sizes, pad_to_sizes
from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import (
    DocumentsPerQuery,
    PackingSpec,
    build_embed_batch,
    pack,
    padding_fraction,
    split_to_count,
)
from megatron_embed.data.records import Record
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.loading.model_directory import find_model, load_model_chunks
from megatron_embed.models.encoder import DeviceMicroBatch, EmbeddingModel, attention_kernel, to_device
from megatron_embed.parallel.topology import initialize, token_alignment
from megatron_embed.planning.memory import first_pass_micro_batches, grid_of
from megatron_embed.planning.shapes import shape_of
from megatron_embed.training.first_pass import FirstPass

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = (2048, 16384)


def one_pass(model: EmbeddingModel, batch: DeviceMicroBatch) -> float:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    model(batch).square().sum().backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def rows_like(path: str, count: int, num_negatives: int) -> list[Record]:
    """`count` rows, the file's over and over, each with `num_negatives` hard negatives."""
    rows = list(open_records((TrainFile(path=path),)))
    others = [row.positive[0] for row in rows]
    filled = [dataclasses.replace(row, negatives=tuple([*row.negatives, *(
        others[(index + step) % len(rows)] for step in range(1, num_negatives + 1))][:num_negatives]))
        for index, row in enumerate(rows)]
    return [filled[index % len(filled)] for index in range(count)]


def batches_of_step(config: RunConfig, tokenizer: RoleTokenizer, rows: list[Record], dp: int,
                    packing: PackingSpec) -> list[EmbedBatch]:
    """The batch of each data-parallel rank, before the ranks agree on a number of micro-batches."""
    documents = DocumentsPerQuery(positives=config.data.num_positives, negatives=config.data.num_negatives)
    share = len(rows) // dp
    return [build_embed_batch(rows[rank * share : (rank + 1) * share], tokenizer, packing, documents)
            for rank in range(dp)]


def fill_of(path: Path, data: str) -> None:
    """Print how full a configuration's micro-batches are."""
    config, gpus = load_config(str(path), []), int(path.stem.rsplit("_", 1)[1].removesuffix("xh100"))
    grid, sizes = grid_of(config, gpus), config.parallel
    budget, alignment = config.training.micro_batch_tokens, token_alignment(sizes)
    assert budget is not None, f"{path}: training.micro_batch_tokens is not set"
    tokenizer = RoleTokenizer(packaged_model(), add_eos=False, query_prompt=config.data.prompt("query"),
                              query_max_length=config.data.max_length("query"),
                              document_max_length=config.data.max_length("document"))
    rows = rows_like(data, config.training.global_batch_size, config.data.num_negatives)
    queries = 2 ** ((budget // config.workload.tokens_per_query).bit_length() - 1)
    counted = PackingSpec(micro_batch_size=queries, alignment=alignment)
    before = [micro for batch in batches_of_step(config, tokenizer, rows, grid.dp, counted)
              for micro in batch.micro_batches]
    spec = PackingSpec(micro_batch_tokens=budget, alignment=alignment)
    ranks = batches_of_step(config, tokenizer, rows, grid.dp, spec)
    count, uniform = max(len(batch.micro_batches) for batch in ranks), sizes.pipeline_model_parallel_size > 1
    first = FirstPass(micro_batches=first_pass_micro_batches(config, shape_of(config.model.path), grid),
                      alignment=alignment, budget=budget, uniform_size=uniform)
    after: list[MicroBatch] = []
    merged: list[MicroBatch] = []
    for batch in ranks:
        agreed = split_to_count(batch, count, Capacity(0, 0, 0), keep_groups_together=False).micro_batches
        in_sizes = pad_to_sizes(agreed, bin_sizes(budget, alignment), uniform=uniform)
        after += in_sizes
        merged += first(in_sizes)
    print(f"{path.stem}: budget {budget:,} tokens, {grid.dp} data-parallel ranks")
    report(f"  {queries} queries each", before, queries * config.workload.tokens_per_query)
    report("  filled up to the budget", after, budget)
    report(f"  first pass, {first.micro_batches} as one", merged, budget * first.micro_batches)


def report(name: str, micro_batches: list[MicroBatch], budget: int) -> None:
    """Print one line."""
    real = sum(micro.num_tokens for micro in micro_batches)
    sizes = sorted({micro.token_ids.numel() for micro in micro_batches})
    print(f"{name:30} {len(micro_batches):6} micro-batches, {real / len(micro_batches):9,.0f} real tokens each = "
          f"{real / len(micro_batches) / budget:.3f} of {budget:,}; padding {padding_fraction(micro_batches):.3f}, "
          f"{len(sizes)} sizes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(REPOSITORY / "examples/data/mini_en/train.jsonl"),
                        help="train.jsonl; its positives fill the micro-batches")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fill", nargs="+", type=Path, metavar="CONFIG.yaml", help="print how full micro-batches are")
    arguments = parser.parse_args()
    if arguments.fill:
        for path in arguments.fill:
            fill_of(path, arguments.data)
    else:
        compare_sizes(arguments)


def compare_sizes(arguments: argparse.Namespace) -> None:
    """Print the time per token by the size of a micro-batch."""
    path = arguments.model or packaged_model()
    config = RunConfig(model=ModelConfig(path=path, dtype=arguments.dtype))
    topology = initialize(config.parallel)
    (model,) = load_model_chunks(find_model(path), config, topology)
    tokenizer = RoleTokenizer(path, add_eos=False, query_max_length=arguments.max_length,
                              document_max_length=arguments.max_length)
    records = open_records((TrainFile(path=arguments.data),))
    texts = [records[row].positive[0] for row in range(min(len(records), 400))]
    rows = tokenizer.tokenize(texts, "document").token_ids
    batches = {}
    for size in SIZES:
        chosen: list[list[int]] = []
        for ids in rows * 8:
            if sum(map(len, chosen)) + len(ids) > size:
                break
            chosen.append(ids)
        packed = pack(chosen, list(range(len(chosen))), tokens=None, alignment=1,
                      pad_token_id=tokenizer.pad_token_id)
        batches[size] = to_device(packed, topology, "mean", kernel=attention_kernel(config), causal=model.causal,
                                  shape=model.shape)
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for round_index in range(arguments.rounds + 1):
        for size in SIZES:
            # Equal tokens per measurement: eight small micro-batches against one large one.
            repeats = SIZES[-1] // size
            seconds = sum(one_pass(model, batches[size]) for _ in range(repeats)) / repeats
            if round_index:  # the first is a warm-up
                times[size].append(seconds / batches[size].num_tokens)
    for size in SIZES:
        print(f"micro-batch of {batches[size].num_tokens:6d} tokens: "
              f"{statistics.median(times[size]) * 1e6:8.1f} us per token "
              f"(median of {arguments.rounds}; {torch.get_num_threads()} threads)")
    ratios = [large / small for small, large in zip(times[SIZES[0]], times[SIZES[1]], strict=True)]
    print(f"ratio, large / small: {statistics.median(ratios):.3f} (median of {arguments.rounds} pairs)")


if __name__ == "__main__":
    main()
