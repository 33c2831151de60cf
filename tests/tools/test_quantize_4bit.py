"""tools/quantize_4bit.py in an environment with llm-compressor, whose interpreter QUANT_PYTHON names."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.toys import MINI_EN, MINILM, REPOSITORY

INTERPRETER = os.environ.get("QUANT_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER is None, reason="QUANT_PYTHON names no interpreter with llm-compressor")
@pytest.mark.parametrize(("bound", "passes"), [("0.9", True), ("0.9999", False)])
def test_weights_are_packed_and_vectors_kept_or_nothing_is_written(tmp_path: Path, bound: str, passes: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(INTERPRETER), str(REPOSITORY / "tools" / "quantize_4bit.py"), str(MINILM), str(tmp_path / "out"),
         "--calibration", str(MINI_EN), "--rows", "32", "--minimum-cosine", bound],
        capture_output=True, text=True, check=False, env=environment | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == (0 if passes else 2), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if passes else [])
    if passes:
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config["quantization_config"]["format"] == "pack-quantized"
        assert (tmp_path / "out" / "model.safetensors").stat().st_size < 60e6  # 91 MB, 47 of them embeddings
