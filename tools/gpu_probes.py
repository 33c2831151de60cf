"""One measurement of tools/gpu_check.py, in a process of its own, so that a crash or a hang ends that one alone.

    python tools/gpu_probes.py flash|experts|dropout|loss|save '{"option": value}'

Prints a JSON object: {"holds": bool, "text": what to show, ...numbers}. On a machine without a GPU it runs on the CPU.
"""

import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
LENGTHS = (5, 200, 1, 37, 130, 16)
HEADS, HEAD_DIM = 4, 64
Result = dict[str, Any]


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flash(options: dict[str, Any]) -> Result:
    """The flash kernel's values and gradients of a decoder with grouped heads and of an encoder, whose sequences are
    long enough for torch 2.14 to choose cuDNN's, against a softmax in float64."""
    import torch

    from megatron_embed.models.attention import PackedAttention, PackedSequences
    from megatron_embed.models.flash_chunks import flash_calls
    from megatron_embed.parallel.device_copy import copy_to_device
    from megatron_embed.platform.compat import AttnMaskType, TransformerConfig
    from megatron_embed.platform.flash_attention import choose_version

    version = choose_version(dropout=0.0)
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    worst = {}
    for kind, groups, causal in (("decoder", 2, True), ("encoder", HEADS, False)):
        config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS,
                                   num_query_groups=groups, kv_channels=HEAD_DIM, attention_dropout=0.0)
        module = PackedAttention(config, 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, "self")
        torch.manual_seed(1)
        exact = [torch.randn(int(bounds[-1]), heads, HEAD_DIM).bfloat16().double() for heads in (HEADS, groups, groups)]
        weights = torch.randn(int(bounds[-1]), HEADS * HEAD_DIM).bfloat16()
        packed = copy_to_device(PackedSequences(
            cu_seqlens=bounds, max_seqlen=max(LENGTHS), num_tokens=int(bounds[-1]),
            calls=flash_calls(bounds, ((0, int(bounds[-1])),), causal)), torch.device("cuda"))
        inputs = [tensor.to("cuda", torch.bfloat16).requires_grad_() for tensor in exact]
        output = module(*(tensor[:, None] for tensor in inputs), None, packed_seq_params=packed)[:, 0]
        ours = [output, *torch.autograd.grad(output, inputs, weights.to("cuda"))]
        truth = [tensor.requires_grad_() for tensor in exact]
        expected = softmax_attention(*truth, bounds.tolist(), causal)
        right = [expected, *torch.autograd.grad(expected, truth, weights.double())]
        worst[kind] = max(float((one.cpu().double() - other).norm() / other.norm())
                          for one, other in zip(ours, right, strict=True))
    return {"holds": max(worst.values()) < 2**-6, "errors": worst,
            "text": ", ".join(f"{kind} within {error:.1e}" for kind, error in worst.items()) +
            f" (allowed 1.6e-02); {version}"}


def softmax_attention(query: Any, key: Any, value: Any, bounds: list[int], causal: bool) -> Any:
    """[tokens, heads * head_dim] of packed sequences."""
    import torch

    shared, parts = query.shape[1] // key.shape[1], []
    for first, last in itertools.pairwise(bounds):
        k, v = (tensor[first:last].repeat_interleave(shared, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[first:last], k) / math.sqrt(HEAD_DIM)
        if causal:
            scores = scores.masked_fill(torch.ones(last - first, last - first).triu(1).bool(), float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.cat(parts)


def run(options: dict[str, Any], *overrides: str) -> dict[str, float]:
    """Train in this process. Returns the last step's metrics."""
    from megatron_embed.config.load import load_config
    from megatron_embed.run.assemble import run_training

    return run_training(load_config(options["config"], [*options["overrides"], *overrides]))


def experts(options: dict[str, Any]) -> Result:
    """A mixture of experts trains without Transformer Engine."""
    metrics = run(options)
    return {"holds": math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0, "loss": metrics["loss"],
            "text": f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f} in the last step"}


def dropout(options: dict[str, Any]) -> Result:
    """Both passes of a step with dropout give the same embeddings, bit for bit, and another step gives others."""
    import torch

    from megatron_embed.models.encoder import EmbeddingModel

    original, seen = EmbeddingModel.forward, []

    def forward(model: Any, batch: Any) -> Any:
        output = original(model, batch)
        seen.append((torch.is_grad_enabled(), output.detach().clone()))
        return output

    EmbeddingModel.forward = forward  # type: ignore[method-assign]
    # The rate is next to 0 and both steps have the same rows: without dropout, or with one seed, they would be equal.
    # Every micro-batch goes through both passes: none is merged in the first, or kept from it.
    run(options, "training.hidden_dropout=0.1", f"training.attention_dropout={options['attention_dropout']}",
        "training.train_steps=2", "training.warmup_steps=0", "training.learning_rate=1e-12",
        "training.keep_activations=0", "training.first_pass_micro_batches=1")
    first, second = ([output for graph, output in seen if graph == wanted] for wanted in (False, True))
    half = len(first) // 2
    replayed = sum(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    drops = sum(not torch.equal(one, two) for one, two in zip(first[:half], first[half:], strict=True))
    return {"holds": replayed == len(first) and drops == half > 1, "micro_batches": len(first),
            "text": f"pass 2 = pass 1 in {replayed} of {len(first)} micro-batches, step 2 differs from step 1 in "
                    f"{drops} of {half}"}


def loss(options: dict[str, Any]) -> Result:
    """Loss and gradients of as many queries as documents: time and memory beyond inputs and gradients."""
    import torch

    from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, contrastive_gradients
    from megatron_embed.platform import compat  # noqa: F401
    # With it, TF32 is off, as in a run.

    rows, dim = options["rows"], options["dim"]
    query, document = (torch.nn.functional.normalize(torch.randn(rows, dim, device=device()), dim=-1) for _ in "qd")
    candidates = Candidates(document=document, positive_index=torch.arange(rows, device=device()))
    seconds, beyond = [], 0.0
    for _ in range(options["rounds"] + 1):
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        wait()
        start = time.perf_counter()
        gradient = contrastive_gradients(query, candidates, ContrastiveSettings(temperature=0.05), total=rows)
        wait()
        seconds.append(time.perf_counter() - start)
        if device() == "cuda":
            outputs = gradient.anchor.nbytes + gradient.document.nbytes
            beyond = (torch.cuda.max_memory_allocated() - before - outputs) / 2**20
        del gradient
    median = statistics.median(seconds[1:]) * 1e3
    return {"holds": True, "milliseconds": median, "mib_beyond": beyond, "rows": rows, "dim": dim,
            "text": f"{median:.0f} ms with gradients (median of {options['rounds']}), {beyond:.0f} MiB beyond inputs "
                    "and gradients, float32 without TF32"}


def resident(field: str) -> float:
    """GiB of this process: VmRSS, now, or VmHWM, at most since the last reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def save(options: dict[str, Any]) -> Result:
    """Host memory that a checkpoint takes at most, and keeps, beside what it writes; GPU memory on top."""
    import torch

    from megatron_embed.checkpoint.save import Saver

    original, seen = Saver.save, []

    def measured(saver: Any, step: int, **others: Any) -> None:
        wait()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before, on_gpu = resident("VmRSS"), 0
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
            on_gpu = torch.cuda.memory_allocated()
        start = time.perf_counter()
        original(saver, step, **others)
        wait()
        gpu = torch.cuda.max_memory_allocated() - on_gpu if device() == "cuda" else 0
        seen.append({"seconds": time.perf_counter() - start, "host_peak_gib": max(0.0, resident("VmHWM") - before),
                     "host_kept_gib": max(0.0, resident("VmRSS") - before), "gpu_peak_gib": gpu / 2**30})

    Saver.save = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run(options, f"checkpoint.directory={folder}", "checkpoint.keep=1")
        (latest,) = [path for path in Path(folder).glob("step_*") if path.is_dir()]
        size = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file()) / 2**30
    row = seen[-1]
    return {"holds": True, **row, "file_gib": size,
            "text": f"{size:.2f} GiB written in {row['seconds']:.1f} s; host memory {row['host_peak_gib']:.2f} GiB at "
                    f"most ({row['host_peak_gib'] / size:.2f} of it), {row['host_kept_gib']:.2f} kept; GPU "
                    f"{row['gpu_peak_gib']:.2f} on top"}


PROBES = {"flash": flash, "experts": experts, "dropout": dropout, "loss": loss, "save": save}


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(PROBES[name](options)), flush=True)


if __name__ == "__main__":
    main()
