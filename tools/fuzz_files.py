"""Corrupt logs of runs, maps of vectors and directories of vectors at random, and run the program on each.

    python tools/fuzz_files.py --count 300 --seed 0

As tools/fuzz_directories.py, whose options it has, for the files that `doctor --run`, `audit` and `migrate` read. A
case must end with exit code 0 or 2 (`doctor`: also 1, which says that it has found something; `audit`: also 3),
without a traceback, within the same limits.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_directories as directories

OWN = ("log", "vectors", "orthogonal", "mlp")
"""Names of the directories that this program damages."""
_ODD_LINES = ("[" * 100_000, "[]", "{", "7", '{"step": Infinity}', '{"step": ' + "9" * 400 + "}", "\0" * 1000, "")


def make_toys(folder: Path) -> dict[str, Path]:
    """Create the directories that cases copy, by name."""
    import numpy as np
    import torch

    from megatron_embed.__main__ import main
    from megatron_embed.evaluation.vector_files import ShardWriter
    from megatron_embed.evaluation.vector_map import VectorMap

    made = directories.make_toys(folder)
    config = folder / "log.yaml"
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    text = text.replace(json.dumps(str(folder / "run")), json.dumps(str(folder / "log")))
    config.write_text(text.replace('"train_steps": 1', '"train_steps": 4'), encoding="utf-8")
    code, text, _, _ = directories.in_child(lambda: main(["train", str(config), "logging.every_steps=1"]),
                                            folder / "log.log", seconds=300)
    if code:
        raise SystemExit(f"the training of the toy run failed: {text}")
    for path in (folder / "log").glob("step_*"):  # cases are of the logs and the configuration beside them
        shutil.rmtree(path)
    (folder / "log" / "latest").unlink()
    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    writer = ShardWriter(str(folder / "vectors"), {"texts": [str(folder / "texts.jsonl"), 1, 2]}, rows=len(rows), dim=6)
    writer.write(0, rows)
    np.save(folder / "old.npy", rows.numpy())
    maps = {"orthogonal": {"weight": torch.randn(6, 4)}, "mlp": {
        "weight": torch.randn(6, 4), "bias": torch.randn(4), "hidden_weight": torch.randn(6, 3),
        "hidden_bias": torch.randn(3), "output_weight": torch.randn(3, 4)}}
    for kind, tensors in maps.items():
        VectorMap(kind=kind, tensors=tensors, unit_length=True).write(  # type: ignore[arg-type]
            str(folder / kind), {"cosine": 0.5})
    return {**made, **{name: folder / name for name in OWN}}


def change_line(case: Path, rng: random.Random) -> str:
    """Change a value in a line of a log, or the line."""
    file = rng.choice(sorted((case / "model").glob("*.jsonl")))
    lines = file.read_text(encoding="utf-8").splitlines()
    place = rng.randrange(len(lines))
    if rng.random() < 0.25:
        lines[place] = rng.choice(_ODD_LINES)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"{file.name}:{place + 1}: {lines[place][:20]}"
    record: Any = json.loads(lines[place])
    keys = rng.choice(list(directories._key_paths(record)))
    new = rng.choice([*directories.VALUES, float("nan"), float("inf"), 10**400, -5, "warm"])
    directories._set(record, keys, new)
    lines[place] = json.dumps(record)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{file.name}:{place + 1}: {'.'.join(map(str, keys))} = {str(new)[:30]!r}"


def change_setting(case: Path, rng: random.Random) -> str:
    """Change a line of a config.yaml."""
    file = rng.choice(sorted((case / "model").rglob("config.yaml")))
    lines = file.read_text(encoding="utf-8").splitlines()
    place = rng.randrange(len(lines))
    key = lines[place].partition(":")[0]
    lines[place] = f"{key}: {rng.choice(['[1]', '{}', 'null', '-1', '1.0e+400', 'x', '.nan', '99999999999999999999'])}"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{file.name}: {lines[place]}"


def make_sparse(case: Path, rng: random.Random) -> str:
    file = rng.choice(directories._files(case / "model"))
    os.truncate(file, 6 << 30)
    return f"{file.name}: 6 GiB"


def change_array_header(case: Path, rng: random.Random) -> str:
    """Change the shape or the type in the header of a .npy file."""
    file = rng.choice(directories._files(case / "model", ".npy"))
    data = file.read_bytes()
    length = 10 + int.from_bytes(data[8:10], "little")
    new = rng.choice([b"(80, 6)", b"(-1, 6)", b"(10**9, 6)", b"(99999999999999999999, 6)", b"(480,)", b"()", b"(0, 6)",
                      b"(40, 6)", b"(True, 6)", b"('a', 6)", b"[80, 6]"])
    kind = rng.choice([b"<f4", b"<f8", b"<f2", b">f4", b"<i4", b"|O", b"<c8", b"<U9", b"|V4", b"<f16"])
    header = data[10:length].replace(b"(80, 6)", new).replace(b"<f4", kind)[:length - 10].ljust(length - 11) + b"\n"
    file.write_bytes(data[:10] + header[:length - 10] + data[length:])
    return f"{file.name}: {new.decode()} of {kind.decode()}"


CHANGES = (directories.change_bytes, directories.truncate, directories.remove, directories.change_json,
           directories.change_json, directories.change_safetensors, directories.add_link, directories.add_pipe,
           change_line, change_line, change_line, change_setting, make_sparse, change_array_header)


def command(toy: str, toys: Path, case: Path, rng: random.Random) -> list[str]:
    """Command to run on the case."""
    model, output = str(case / "model"), str(case / "output" / "made")
    if toy == "log":
        return rng.choice([["doctor", "--run", model], ["audit", model, "--step", str(rng.choice([1, 2, 3]))]])
    if toy == "vectors":
        return rng.choice([["migrate", "--old", model, "--map", str(toys / "mlp"), "--output", output],
                           ["migrate", "--old", model, "--new", str(toys / "old.npy"), "--output", output]])
    return ["migrate", "--old", str(toys / "old.npy"), "--map", model, "--output", output]


def run_case(index: int, seed: int, toys: dict[str, Path], case: Path) -> directories.Outcome:
    """As that of fuzz_directories."""
    return directories.run_case(index, seed, {name: toys[name] for name in OWN}, case, changes=CHANGES,
                                command=command, codes=(0, 1, 2, 3))


if __name__ == "__main__":
    sys.exit(directories.main(make_toys, run_case))
