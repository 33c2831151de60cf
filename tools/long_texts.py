"""Gradients and memory of one long text under context parallelism on CPU ranks, with a tiny model.

    python tools/long_texts.py                          # 8,192 to 32,768 tokens, 4 ranks, both ways of attention
    python tools/long_texts.py --tokens 4096 --ranks 2

For every number of tokens: the peak of a rank's memory over what it held before the forward pass, largest of all ranks;
for the longest text also the largest relative error of any parameter's gradient against one process (Transformers in
float64). Exit code 1 if an error is above 1e-5, or if memory grows faster than the tokens.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Freed tensors leave the process at once, so that its resident memory is what it holds.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.helpers.gradient_errors import largest_error, save_gradients  # noqa: E402
from tests.helpers.long_texts import one_text  # noqa: E402
from tests.helpers.ranks import run_on_ranks, shutdown_ranks  # noqa: E402
from tests.helpers.toys import random_texts, run_config, save_model  # noqa: E402

BOUND = 1e-5
LINEAR = 1.15
"""Memory may grow this much faster than the tokens: parts of it do not depend on them, others are rounded."""
WIDTH = 64
MODEL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
         "head_dim": 8, "intermediate_size": 96}


def save_reference(directory: str, ids: list[int], weights: torch.Tensor, path: Path) -> float:
    """Gradients of one process, by Transformers in float64; their norm."""
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float64).eval()
    states = model(torch.tensor([ids])).last_hidden_state[0]
    (torch.nn.functional.normalize(states.mean(0), dim=0) * weights).sum().backward()
    return save_gradients(model, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    sizes, failed = sorted(arguments.tokens), False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        directory = save_model(folder / "model", "qwen3", max_position_embeddings=sizes[-1], **MODEL)
        weights = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
        (ids,) = random_texts([sizes[-1]])
        norm = save_reference(directory, ids, weights, folder / "gradients")
        for method in ("all_gather", "a2a"):
            config = run_config(directory, parallel={"context_parallel_size": arguments.ranks, "cp_comm_type": method})
            peaks: list[int] = []
            for tokens in sizes:
                reference = str(folder / "gradients") if tokens == sizes[-1] else None
                results = run_on_ranks(one_text, arguments.ranks, config, ids[:tokens], weights, reference,
                                       timeout_seconds=1800)
                peaks.append(max(peak for peak, _ in results))
                line = f"{method}, {arguments.ranks} ranks, {tokens:,} tokens: {peaks[-1] / 2**20:.1f} MiB per rank"
                if reference is not None:
                    error, worst = largest_error([errors for _, errors in results], norm)
                    line += f"; largest error of a gradient {error:.1e} ({worst})"
                    failed = failed or not error <= BOUND
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            shutdown_ranks()
            failed = failed or peaks[-1] * sizes[0] > LINEAR * peaks[0] * sizes[-1]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
