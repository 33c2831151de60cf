"""Run commands on the hostile model directories and checkpoints of docs/security.md; print how each ends.

Each row has the exit code, effects on files outside the directory, peak memory and seconds.

    python tools/hostile_directories.py
"""

import argparse
import importlib
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_directories import MEMORY, PRELOADED, Trap, in_child, tree
from fuzz_files import make_toys

SECONDS = 30


def modules(name: str, kind: str = "sentence_transformers.models.Pooling") -> Callable[[Path], None]:
    def write(case: Path) -> None:
        (case / "model" / "modules.json").write_text(json.dumps([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": name.format(case=case), "type": kind}]), encoding="utf-8")

    return write


def link(name: str, target: str) -> Callable[[Path], None]:
    def write(case: Path) -> None:
        (case / "model" / name).unlink(missing_ok=True)
        (case / "model" / name).symlink_to(target.format(case=case))

    return write


def pipe(name: str) -> Callable[[Path], None]:
    def write(case: Path) -> None:
        (case / "model" / name).unlink(missing_ok=True)
        os.mkfifo(case / "model" / name)

    return write


def header(**changes: Any) -> Callable[[Path], None]:
    """Change the first tensor in the weights' header."""
    def write(case: Path) -> None:
        file = case / "model" / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        values = json.loads(data[8:8 + length])
        first = next(name for name in values if name != "__metadata__")
        values[first] |= changes
        text = json.dumps(values).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])

    return write


def long_header(case: Path) -> None:
    """A sparse file of a terabyte whose length field covers all of it."""
    file = case / "model" / "model.safetensors"
    file.write_bytes((10**12 - 8).to_bytes(8, "little"))
    os.truncate(file, 10**12)


def code_in_metadata(case: Path) -> None:
    file = next((case / "model").rglob(".metadata"))
    file.write_bytes(pickle.dumps(Trap(str(case / "canary"))))


def code_in_common(case: Path) -> None:
    next((case / "model").rglob("common.pt")).write_bytes(pickle.dumps(Trap(str(case / "canary"))))


def tensors_outside(case: Path) -> None:
    file = next((case / "model").rglob(".metadata"))
    metadata: Any = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        shutil.copy(file.parent / info.relative_path, case / "outside" / info.relative_path)
        info.relative_path = str(case / "outside" / info.relative_path)
    file.write_bytes(pickle.dumps(metadata))


def index_outside(case: Path) -> None:
    file = case / "model" / "model.safetensors.index.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["weight_map"][min(values["weight_map"])] = str(case / "outside" / "kept")
    file.write_text(json.dumps(values), encoding="utf-8")


def sparse(name: str) -> Callable[[Path], None]:
    def write(case: Path) -> None:
        (case / "model" / name).touch()
        os.truncate(case / "model" / name, 6 << 30)

    return write


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(case: Path) -> None:
        (case / "model" / name).write_text(content, encoding="utf-8")

    return write


def template(content: str) -> Callable[[Path], None]:
    """Make the model one of chats."""
    def write(case: Path) -> None:
        from tests.helpers.foreign_directories_helpers import chat

        (case / "model" / "sentence_bert_config.json").write_text(json.dumps(chat("flat")), encoding="utf-8")
        (case / "model" / "chat_template.jinja").write_text(content, encoding="utf-8")

    return write


def normalizer(*contents: tuple[str, str]) -> Callable[[Path], None]:
    """Replacements, one after the other."""
    def write(case: Path) -> None:
        file = case / "model" / "tokenizer.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in contents]}
        file.write_text(json.dumps(values), encoding="utf-8")

    return write


def tensors(**changes: list[int]) -> Callable[[Path], None]:
    """Tensors of a map in other shapes."""
    def write(case: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        file = case / "model" / "vector_map.safetensors"
        save_file({**load_file(file), **{name: torch.ones(shape) for name, shape in changes.items()}}, file)

    return write


ENCODE, CONVERT, EXPORT, TRAIN = "encode", "convert", "export", "train"
DOCTOR, AUDIT, MAP, MAPPED = "doctor", "audit", "map", "mapped"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(a='xx') %}{% for i in range(33) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}"
CASES: tuple[tuple[str, str, str, Callable[[Path], None]], ...] = (
    ("`modules.json`: `path` is an absolute folder, `train`", "bert", TRAIN, modules("{case}/outside")),
    ("`modules.json`: `path` is `1_Pooling/../../outside`, `train`", "bert", TRAIN, modules("1_Pooling/../../outside")),
    ("`modules.json`: `path` is `.`, `train`", "bert", TRAIN, modules(".")),
    ("`modules.json`: type `evil.Pooling`, `encode`", "bert", ENCODE, modules("1_Pooling", "evil.Pooling")),
    ("weights' index names a file elsewhere, `convert`", "qwen3", CONVERT, index_outside),
    ("`.metadata` with code, `encode`", "converted", ENCODE, code_in_metadata),
    ("`.metadata` with code, `convert`", "converted", EXPORT, code_in_metadata),
    ("`common.pt` with code, `encode`", "converted", ENCODE, code_in_common),
    ("`.metadata`: tensors in an absolute path, `encode`", "converted", ENCODE, tensors_outside),
    ("`.metadata` is a pipe, `encode`", "converted", ENCODE, pipe("model/.metadata")),
    ("`config.json` is a link to `/dev/zero`, `encode`", "bert", ENCODE, link("config.json", "/dev/zero")),
    ("`vocab.txt` is a link to a file outside, `convert`", "bert", CONVERT, link("vocab.txt", "{case}/outside/kept")),
    ("`notes.txt` is a link to `/dev/zero`, `convert`", "bert", CONVERT, link("notes.txt", "/dev/zero")),
    ("`notes.txt` is a pipe, `convert`", "bert", CONVERT, pipe("notes.txt")),
    ("weights' header: a negative shape, `encode`", "bert", ENCODE, header(shape=[-1, -16])),
    ("weights' header: a shape of fractions, `encode`", "bert", ENCODE, header(shape=[16.0], data_offsets=[0, 64.0])),
    ("weights' header: a shape of booleans, `encode`", "bert", ENCODE, header(shape=[True, 16])),
    ("weights' header: a terabyte long, in a sparse file, `convert`", "bert", CONVERT, long_header),
    ("chat template `{{ 'x ' * 2000000000 }}`, `encode`", "bert", ENCODE, template("{{ 'x ' * 2000000000 }}")),
    ("chat template that doubles a text 33 times, `encode`", "bert", ENCODE, template(DOUBLED)),
    ("chat template of 10^10 turns, `encode`", "bert", ENCODE, template(LOOPS)),
    ("a normalizer makes 10^8 letters of one, `encode`", "qwen3", ENCODE, normalizer(
        ("a", "b" * 1000), ("b", "c" * 1000), ("c", "d e" * 100))),
    ("`metrics.jsonl` is a link to `/dev/zero`, `doctor --run`", "log", DOCTOR, link("metrics.jsonl", "/dev/zero")),
    ("`metrics.jsonl` is a pipe, `doctor --run`", "log", DOCTOR, pipe("metrics.jsonl")),
    ("`metrics.jsonl` is 6 GiB of zeros, sparse, `doctor --run`", "log", DOCTOR, sparse("metrics.jsonl")),
    ("`audit.jsonl` nested 10^5 deep, `audit`", "log", AUDIT, text("audit.jsonl", "[" * 100_000 + "\n")),
    ("`audit.jsonl`: `step` is Infinity, `audit`", "log", AUDIT, text("audit.jsonl", '{"step": Infinity}\n')),
    ("a map's `vector_map.json` is a link to `/dev/zero`, `migrate`", "mlp", MAP, link("vector_map.json", "/dev/zero")),
    ("a map's `vector_map.safetensors` is a pipe, `migrate`", "mlp", MAP, pipe("vector_map.safetensors")),
    ("a map's bias has one element, `migrate`", "mlp", MAP, tensors(bias=[1])),
    ("a map's bias has a row for each vector, `migrate`", "mlp", MAP, tensors(bias=[80, 4])),
    ("`vectors.json` nested 10^5 deep, `migrate`", "vectors", MAPPED, text("vectors.json", "[" * 100_000)),
    ("a `.npy` file is a pipe, `migrate`", "vectors", MAPPED, pipe("000000.npy")),
)


def arguments_of(kind: str, toys: Path, case: Path) -> list[str]:
    """Command to run on a case."""
    model, output = str(case / "model"), case / "output"
    if kind == ENCODE:
        return ["encode", "--model", model, "--input", str(toys / "texts.jsonl"), "--output", str(output / "v.npy")]
    if kind == CONVERT:
        return ["convert", "hf-to-megatron", model, str(output / "made")]
    if kind == EXPORT:
        return ["convert", "megatron-to-hf", model, str(output / "made")]
    if kind == DOCTOR:
        return ["doctor", "--run", model]
    if kind == AUDIT:
        return ["audit", model, "--step", "1"]
    if kind in (MAP, MAPPED):
        old, vector_map = (str(toys / "old.npy"), model) if kind == MAP else (model, str(toys / "mlp"))
        return ["migrate", "--old", old, "--map", vector_map, "--output", str(output / "made")]
    config = case / "run.yaml"
    config.write_text((toys / "run.yaml").read_text(encoding="utf-8").replace(
        json.dumps(str(toys / "bert")), json.dumps(model)).replace(
        json.dumps(str(toys / "run")), json.dumps(str(output / "run"))), encoding="utf-8")
    return ["train", str(config)]


def show(name: str, toy: Path, kind: str, change: Callable[[Path], None], case: Path) -> str:
    """Run one case in an empty folder. Returns its row of the table."""
    from megatron_embed.__main__ import main

    for folder in ("outside", "output", "home"):
        (case / folder).mkdir(parents=True)
    (case / "outside" / "kept").write_text("another owner's file\n", encoding="utf-8")
    shutil.copytree(toy, case / "model")
    change(case)
    arguments, before = arguments_of(kind, toy.parent, case), tree(case / "outside")
    code, text, seconds, peak = in_child(lambda: main(arguments), case / "log", seconds=SECONDS, memory=MEMORY,
                                         home=case / "home")
    results = ["exit code " + str(code) if code >= 0 else f"did not end in {SECONDS} s"]
    if not (case / "outside").is_dir() or tree(case / "outside") != before:
        results.append("**files outside were changed**")
    if os.path.lexists(case / "canary"):
        results.append("**the code ran**")
    if "Traceback" in text:
        results.append("a traceback")
    lines = [line for line in text.splitlines() if "error: " in line] if code == 2 else []
    message = lines[-1].replace(str(case), "DIR")[:300] if lines else ""
    return f"| {name} | {', '.join(results)} | {peak / 2**20:.0f} MiB | {seconds:.1f} | {message} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out the first N inputs")
    first = parser.parse_args().first
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "toys").mkdir()
        toys = make_toys(folder / "toys")
        for index, (name, toy, kind, change) in list(enumerate(CASES))[first:]:
            sys.stdout.write(show(name, toys[toy], kind, change, folder / f"case_{index}") + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
