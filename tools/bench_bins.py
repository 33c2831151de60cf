"""Time per token of a forward and backward pass in micro-batches of 2,048 and 16,384 tokens, in turn.

Packed attention computes one group of similarly long sequences at a time, so the time per token must not grow with the
micro-batch: the ratio printed last stays near 1 (attention over the whole micro-batch would make that part 8 times as
expensive).

    python tools/bench_bins.py
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from small_models import packaged_model

from megatron_embed.config.schema import ModelConfig, RunConfig, TrainFile
from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import pack
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.loading.model_directory import find_model, load_model_chunks
from megatron_embed.models.encoder import DeviceMicroBatch, EmbeddingModel, attention_kernel, to_device
from megatron_embed.parallel.topology import initialize

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = (2048, 16384)


def one_pass(model: EmbeddingModel, batch: DeviceMicroBatch) -> float:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    model(batch).square().sum().backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(REPOSITORY / "examples/data/mini_en/train.jsonl"),
                        help="train.jsonl; its positives fill the micro-batches")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
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
