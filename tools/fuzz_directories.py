"""Corrupt small model directories and checkpoints at random, and run the program on each: it must succeed or refuse.

    python tools/fuzz_directories.py --count 500 --seed 0

Each case is a copy of a toy (a Sentence Transformers directory, one with sharded weights, a PEFT adapter, a converted
checkpoint, a training run) with one to three changes: bytes, JSON values, paths outside the directory, pickles with
code, links, pipes, truncation, huge numbers. A forked child with limits on time and memory converts it or encodes with
it. Every case must end with exit code 0 or 2 and without a traceback, write and remove nothing but its output, leave no
output when it refuses, and run no code (code of a pickle would create the file `canary`). A case is determined by its
seed and index: `--only 17 --keep DIR` repeats one.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PRELOADED = ("megatron_embed.loading.model_directory", "megatron_embed.run.assemble", "megatron_embed.export.formats",
             "megatron_embed.evaluation.encode", "sentence_transformers", "transformers.models.bert.modeling_bert",
             "torch.distributed.checkpoint")
SECONDS = 60
MEMORY = 2 << 30
"""Bytes that a child may allocate."""


@dataclass(frozen=True)
class Outcome:
    """Result of one case."""

    index: int
    what: str
    """Toy, command and changes."""
    code: int
    message: str
    seconds: float
    peak_bytes: int
    """Peak memory of the child, including its inherited libraries."""
    faults: tuple[str, ...]


class Trap:
    """An object whose pickle creates a file when it is loaded by the unsafe loader."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.canary,)


def make_toys(folder: Path) -> dict[str, Path]:
    """Create the directories that cases copy, by name."""
    import torch
    from safetensors.torch import save_file

    from megatron_embed.__main__ import main
    from megatron_embed.convert.convert import hf_to_megatron
    from megatron_embed.export.sentence_transformers import export_sentence_transformers
    from tests.helpers.toys import MINI_EN, save_model

    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    (folder / "texts.jsonl").write_text('{"text": "one text"}\n{"text": "another, longer text"}\n', encoding="utf-8")
    bert = Path(save_model(folder / "bert", "bert", tokenizer=True, **small))
    export_sentence_transformers(bert, pooling="mean", normalize=True, query_prompt="query: ", document_prompt="",
                                 max_seq_length=64, embedding_dimension=16)
    qwen = Path(save_model(folder / "qwen3", "qwen3", tokenizer=True, head_dim=8, num_key_value_heads=1, **small))
    _shard(qwen)
    hf_to_megatron(bert, folder / "converted")
    peft = folder / "peft"
    peft.mkdir()
    rows = {f"base_model.model.layers.0.self_attn.q_proj.lora_{matrix}.weight": torch.randn(shape)
            for matrix, shape in (("A", (2, 16)), ("B", (16, 2)))}
    save_file(rows, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(qwen),
        "target_modules": ["q_proj"]}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qwen / name, peft)
    settings = {"model.path": str(bert), "model.dtype": "float32", "embedding.pooling": "mean",
                "data.train": [str(MINI_EN)], "data.query_max_length": 16, "data.document_max_length": 16,
                "training.global_batch_size": 2, "training.micro_batch_size": 2, "training.train_steps": 1,
                "checkpoint.directory": str(folder / "run"), "logging.tensorboard": False}
    config = folder / "run.yaml"
    config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in _nested(settings).items()),
                      encoding="utf-8")
    code, text, _, _ = in_child(lambda: main(["train", str(config)]), folder / "train.log", seconds=300)
    if code:
        raise SystemExit(f"the training of the toy run failed: {text}")
    for name in (".assets", "metrics.jsonl"):  # no command reads them
        shutil.rmtree(folder / "run" / name, ignore_errors=True)
    return {"bert": bert, "qwen3": qwen, "converted": folder / "converted", "peft": peft, "run": folder / "run"}


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = collections.defaultdict(dict)
    for key, value in values.items():
        section, name = key.split(".")
        nested[section][name] = value
    return nested


def _shard(directory: Path) -> None:
    """Replace the weight file by two shards and their index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}),
        encoding="utf-8")


# Changes. Each gets the case's folder, in which `model` is the copy and `outside` belongs to another owner, and returns
# a description of the change.

NUMBERS = (0, -1, 1, 2**31, 10**9, 10**18, 2**63, 10**30, 0.5, -0.0, 1e308, True, False)
VALUES = (None, "", ".", "..", [], {}, [[]], "x" * 10000, "\x1b[2J", "null", *NUMBERS)


def _files(model: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in model.rglob("*") if path.is_file() and not path.is_symlink()
                  and path.stat().st_size < 1 << 30  # an earlier change made it sparse
                  and (not suffixes or path.name.endswith(suffixes)))


def _write(file: Path, text: str) -> None:
    """Replace a file, or a link or pipe that an earlier change created."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


def _home_of_tokenizer(model: Path) -> Path:
    """Folder of the Hugging Face files: the directory itself, or hf/ of a checkpoint."""
    return next((file.parent for file in _files(model) if file.name == "tokenizer_config.json"), model)


def elsewhere(case: Path, rng: random.Random) -> str:
    """A path outside the model's directory."""
    return rng.choice([str(case / "outside"), str(case / "outside" / "kept"), "../outside", "1_Pooling/../../outside",
                       "./../outside/kept", "..", ".", "", "/dev/zero", "a\0b", "1_Pooling/", "..\\outside"])


def change_bytes(case: Path, rng: random.Random) -> str:
    file = rng.choice(_files(case / "model"))
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 3, 30]) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return f"bytes of {file.name}"


def change_header(case: Path, rng: random.Random) -> str:
    """Change the first bytes: lengths and magic numbers."""
    file = rng.choice(_files(case / "model", ".safetensors", ".distcp", ".pt", ".metadata"))
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 2, 4])):
        data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    file.write_bytes(data)
    return f"first bytes of {file.name}"


def truncate(case: Path, rng: random.Random) -> str:
    file = rng.choice(_files(case / "model"))
    os.truncate(file, rng.choice([0, 1, file.stat().st_size // 2, max(0, file.stat().st_size - 1)]))
    return f"{file.name} truncated"


def remove(case: Path, rng: random.Random) -> str:
    file = rng.choice(_files(case / "model"))
    file.unlink()
    return f"{file.name} removed"


def _key_paths(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:60]:
        yield (*keys, key)
        yield from _key_paths(inner, (*keys, key))


def _set(value: Any, keys: tuple[Any, ...], new: Any) -> None:
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = new


def change_json(case: Path, rng: random.Random) -> str:
    file = rng.choice([path for path in _files(case / "model", ".json") if path.stat().st_size < 100_000])
    values = json.loads(file.read_text(encoding="utf-8"))
    key_paths = list(_key_paths(values))
    if not key_paths:
        return change_bytes(case, rng)
    keys, new = rng.choice(key_paths), rng.choice([*VALUES, elsewhere(case, rng)])
    _set(values, keys, new)
    file.write_text(json.dumps(values), encoding="utf-8")
    return f"{file.name}: {'.'.join(map(str, keys))} = {str(new)[:30]!r}"


def change_safetensors(case: Path, rng: random.Random) -> str:
    files = _files(case / "model", ".safetensors")
    if not files:
        return change_json(case, rng)
    file = rng.choice(files)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    keys = rng.choice(list(_key_paths(header)))
    new = rng.choice([*VALUES, [-1, -2], [1.0], [True], [0, 10**12], "F64", "F4", [10**30]])
    _set(header, keys, new)
    text = json.dumps(header).encode()
    file.write_bytes(rng.choice([len(text), len(text), 2**40, 2**63]).to_bytes(8, "little") + text + data[8 + length:])
    return f"{file.name}: header {'.'.join(map(str, keys))} = {str(new)[:30]!r}"


def change_module(case: Path, rng: random.Random) -> str:
    folder = _home_of_tokenizer(case / "model")
    kind = rng.choice(["sentence_transformers.models.Pooling", "evil.Transformer", "os.system", "Pooling",
                       "sentence_transformers.models.Normalize"])
    path = elsewhere(case, rng)
    _write(folder / "modules.json", json.dumps([
        {"idx": 0, "name": "0", "path": rng.choice(["", "", path]), "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": path, "type": kind}]))
    return f"modules.json: {kind} in {path!r}"


def change_shard(case: Path, rng: random.Random) -> str:
    files = _files(case / "model", ".index.json")
    if not files:
        return change_module(case, rng)
    values = json.loads(files[0].read_text(encoding="utf-8"))
    name, path = rng.choice(sorted(values["weight_map"])), elsewhere(case, rng)
    values["weight_map"][name] = path
    files[0].write_text(json.dumps(values), encoding="utf-8")
    return f"{files[0].name}: {name} in {path!r}"


def change_pointer(case: Path, rng: random.Random) -> str:
    """Change a path in our files or in PEFT's."""
    model, path = case / "model", elsewhere(case, rng)
    if (model / "latest").is_file():
        (model / "latest").write_text(path + "\n", encoding="utf-8")
        return f"latest: {path!r}"
    if (model / "adapter_config.json").is_file():
        values = json.loads((model / "adapter_config.json").read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = path
        (model / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
        return f"base model: {path!r}"
    return change_shard(case, rng)


def change_metadata(case: Path, rng: random.Random) -> str:
    """Change the metadata of a checkpoint's tensors: code, other files, other sizes."""
    import torch

    files = _files(case / "model", ".metadata")
    if not files or b"canary" in files[0].read_bytes():  # an earlier change put code into it, which would run here
        return add_pickle(case, rng)
    metadata: Any = pickle.loads(files[0].read_bytes())
    info = rng.choice(list(metadata.storage_data.values()))
    key = rng.choice(sorted(metadata.state_dict_metadata))
    entry, trap = metadata.state_dict_metadata[key], Trap(str(case / "canary"))
    kind = rng.choice(["planner_data", "whole", "relative_path", "offset", "length", "size", "storage", "transform",
                       "tensor"])
    if kind == "planner_data":
        metadata.planner_data = {"x": trap}
    elif kind == "whole":
        metadata = trap
    elif kind == "relative_path":
        info.relative_path = rng.choice([elsewhere(case, rng), trap])
    elif kind in ("offset", "length"):
        vars(info)[kind] = rng.choice(NUMBERS)
    elif kind == "size":
        entry.size = torch.Size([rng.choice([0, 1, 10**6, 10**12]) for _ in entry.size])
    elif kind == "storage":
        metadata.storage_data = rng.choice([{}, None, {"x": trap}])
    elif kind == "transform":
        info.transform_descriptors = rng.choice([["zstd"], [trap], ["os.system"]])
    else:
        metadata.state_dict_metadata[key] = trap
    files[0].write_bytes(pickle.dumps(metadata))
    return f".metadata: {kind}"


def add_pickle(case: Path, rng: random.Random) -> str:
    """Put code into a file that could be a pickle, or into a new file beside the weights."""
    import torch

    trap, files = Trap(str(case / "canary")), _files(case / "model", ".pt", ".metadata", ".distcp")
    file = rng.choice(files) if files else case / "model" / rng.choice(
        ["pytorch_model.bin", "training_args.bin", "model.safetensors", "adapter_model.bin", "tokenizer.json"])
    if rng.random() < 0.5:
        file.write_bytes(pickle.dumps({"state_dict": trap}))
    else:
        content = io.BytesIO()  # torch.save accepts only some file names
        torch.save({"model": trap}, content)
        file.write_bytes(content.getvalue())
    return f"code in {file.name}"


def add_python(case: Path, rng: random.Random) -> str:
    """Add Python code to the model's directory."""
    model = case / "model"
    folder = _home_of_tokenizer(model)
    _write(folder / "evil.py", f"import os\nos.mkdir({str(case / 'canary')!r})\n")
    name = rng.choice(["config.json", "tokenizer_config.json"])
    values = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
    values["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    if name == "tokenizer_config.json":
        values["tokenizer_class"] = rng.choice(["T", "evil.T", values.get("tokenizer_class")])
    _write(folder / name, json.dumps(values))
    return f"auto_map in {name}"


def add_link(case: Path, rng: random.Random) -> str:
    file = rng.choice(_files(case / "model"))
    file.unlink()
    target = rng.choice([str(case / "outside" / "kept"), "/dev/zero", "/dev/stdin", "/proc/self/mem", "nothing",
                         str(case / "outside"), file.name, "../outside/kept", "/etc/passwd"])
    file.symlink_to(target)
    return f"{file.name} -> {target}"


def add_pipe(case: Path, rng: random.Random) -> str:
    file = rng.choice(_files(case / "model"))
    file.unlink()
    os.mkfifo(file)
    return f"{file.name} is a pipe"


def add_folder_link(case: Path, rng: random.Random) -> str:
    folder = rng.choice([case / "model", *sorted(path for path in (case / "model").rglob("*") if path.is_dir())])
    name = rng.choice(["1_Pooling", "2_Normalize", "additional_chat_templates", "extra", "model", "hf"])
    if (folder / name).is_dir() and not (folder / name).is_symlink():
        shutil.rmtree(folder / name)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(case / "outside")
    return f"{name} -> outside"


def change_config(case: Path, rng: random.Random) -> str:
    files = [file for file in _files(case / "model", "config.json") if file.name in ("config.json",
                                                                                     "adapter_config.json")]
    file = rng.choice(files)
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not values:
        return change_json(case, rng)
    numbers = [key for key, value in values.items() if isinstance(value, int | float)]
    key, new = rng.choice(numbers or list(values)), rng.choice(NUMBERS)
    values[key] = new
    file.write_text(json.dumps(values), encoding="utf-8")
    return f"{file.name}: {key} = {new}"


CHANGES = (change_bytes, change_header, truncate, remove, change_json, change_json, change_safetensors,
           change_safetensors, change_module, change_module, change_shard, change_pointer, change_metadata,
           change_metadata, add_pickle, add_python, add_link, add_pipe, add_folder_link, change_config, change_config)


Change = Callable[[Path, random.Random], str]
Command = Callable[[str, Path, Path, random.Random], list[str]]


def change(toy: str, case: Path, rng: random.Random, changes: Sequence[Change] = CHANGES) -> str:
    """Apply one to three changes; a change whose files the toy lacks is replaced by `change_bytes`."""
    descriptions = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            descriptions.append(rng.choice(changes)(case, rng))
        except (IndexError, ValueError, TypeError, AttributeError, pickle.UnpicklingError, OSError, EOFError, KeyError):
            try:
                descriptions.append(change_bytes(case, rng))
            except IndexError:
                descriptions.append("nothing")
    return f"{toy}: {'; '.join(descriptions)}"


def command(toy: str, toys: Path, case: Path, rng: random.Random) -> list[str]:
    """Command to run on the case."""
    model, output = str(case / "model"), case / "output"
    encode = ["encode", "--model", model, "--input", str(toys / "texts.jsonl"), "--output", str(output / "v.npy"),
              "--role", "query"]
    if toy in ("bert", "qwen3"):
        return rng.choice([encode, ["convert", "hf-to-megatron", model, str(output / "made")]])
    if toy == "peft":
        return encode
    back = ["convert", "megatron-to-hf", model, str(output / "made")]
    return rng.choice([encode, encode, back, [*back, "--format", "sentence-transformers"]])


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """Entries below a folder with mode, size and modification time."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        entries[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return entries


def in_child(work: Callable[[], int], log: Path, *, seconds: int, memory: int | None = None,
             home: Path | None = None) -> tuple[int, str, float, int]:
    """Run `work` in a forked child. Returns exit code (negative: a signal), output, seconds and peak bytes."""
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if home is not None:
                os.environ["HOME"] = str(home)
                os.chdir(home)
            if memory is not None:
                limit = _virtual() + memory
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.alarm(seconds)  # not handled, so it ends the child
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return (code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - started,
            used.ru_maxrss * 1024)


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def run_case(index: int, seed: int, toys: dict[str, Path], case: Path, *, changes: Sequence[Change] = CHANGES,
             command: Command = command, codes: Sequence[int] = (0, 2)) -> Outcome:
    """Create a case in the empty folder `case`, run it, and check the result.

    Args:
        codes: exit codes that are no fault.
    """
    from megatron_embed.__main__ import main

    rng = random.Random(f"{seed}-{index}")
    toy = rng.choice(sorted(toys))
    for name in ("outside", "output", "home"):
        (case / name).mkdir(parents=True)
    for name in ("kept", "config.json", "model.safetensors"):
        (case / "outside" / name).write_text("another owner's file\n", encoding="utf-8")
    shutil.copytree(toys[toy], case / "model", symlinks=True)
    what = change(toy, case, rng, changes)
    arguments = command(toy, toys[toy].parent, case, rng)
    kept = {name: tree(path) for name, path in
            (("the directory", case / "model"), ("outside", case / "outside"), ("the toys", toys[toy].parent))}
    code, text, seconds, peak = in_child(lambda: main(arguments), case / "log", seconds=SECONDS, memory=MEMORY,
                                         home=case / "home")
    faults = []
    if code not in codes:
        faults.append("hung" if code == -signal.SIGALRM else f"exit code {code}")
    if "Traceback" in text:
        faults.append("traceback")
    if os.path.lexists(case / "canary"):
        faults.append("CODE WAS RUN")
    faults += [f"{name} was changed" for name, before in kept.items() if tree(
        {"the directory": case / "model", "outside": case / "outside", "the toys": toys[toy].parent}[name]) != before]
    if set(os.listdir(case)) - {"model", "outside", "output", "home", "log", "canary"}:
        faults.append("files beside the output")
    if code == 2 and os.listdir(case / "output"):
        faults.append("refused, and left an output")
    lines = [line for line in text.splitlines() if "error: " in line] or text.splitlines()[-1:] or [""]
    return Outcome(index, f"{what} | {' '.join(arguments[:2])}", code, lines[-1][:400], seconds, peak, tuple(faults))


def fuzz(indices: Sequence[int], seed: int, folder: Path, *, keep: bool = False,
         report: Callable[[Outcome], None] = lambda outcome: None,
         make: Callable[[Path], dict[str, Path]] = make_toys, run: Callable[..., Outcome] = run_case) -> list[Outcome]:
    """Run the cases; files of faulty cases stay in `folder`."""
    for module in PRELOADED:  # imported once, not in every child
        importlib.import_module(module)
    (folder / "toys").mkdir()
    toys = make(folder / "toys")
    outcomes = []
    for index in indices:
        case = folder / f"case_{index}"
        outcome = run(index, seed, toys, case)
        report(outcome)
        outcomes.append(outcome)
        if not outcome.faults and not keep:
            shutil.rmtree(case)
    return outcomes


def main(make: Callable[[Path], dict[str, Path]] = make_toys, run: Callable[..., Outcome] = run_case) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="index of a single case, whose files are kept")
    parser.add_argument("--keep", type=Path, help="folder for the files of faulty cases")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    args = parser.parse_args()
    indices = range(args.first, args.first + args.count) if args.only is None else [args.only]

    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.faults or args.verbose or args.only is not None:
            sys.stdout.write(f"{outcome.index}: {', '.join(outcome.faults) or outcome.code} | {outcome.what} | "
                             f"{outcome.peak_bytes >> 20} MiB | {outcome.message}\n")
            sys.stdout.flush()

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(KeyboardInterrupt):
            fuzz(indices, args.seed, folder, keep=args.only is not None, report=report, make=make, run=run)
    codes = collections.Counter(outcome.code for outcome in outcomes)
    faulty = [outcome for outcome in outcomes if outcome.faults]
    sys.stdout.write(
        f"{len(outcomes)} cases, seed {args.seed}: {codes[0]} succeeded, {codes[2]} were refused, {len(faulty)} "
        f"faults; at most {max(outcome.peak_bytes for outcome in outcomes) / 2**20:.0f} MiB and "
        f"{max(outcome.seconds for outcome in outcomes):.1f} s each; {time.monotonic() - started:.0f} s in all\n")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
