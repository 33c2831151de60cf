"""vLLM: offline inference by its Python interface, in an environment of its own, since it pins other packages.

The environment variable VLLM_PYTHON names the interpreter that has vLLM; without it, the one that runs this program.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.export.engines.base import Engine
from megatron_embed.models.reranker_settings import read_reranker_settings
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import Role

INTERPRETER = "VLLM_PYTHON"
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_PROGRAM = """
import json, sys
from vllm import LLM
asked = json.load(open(sys.argv[1]))
model = LLM(asked["directory"], runner="pooling", dtype="float32", enforce_eager=True, trust_remote_code=False)
if "texts" in asked:
    answers = model.embed(asked["texts"], truncate_prompt_tokens=-1, use_tqdm=False)
    results = [answer.outputs.embedding for answer in answers]
else:
    queries, documents = zip(*asked["pairs"])
    results = [answer.outputs.score for answer in model.score(list(queries), list(documents), use_tqdm=False)]
json.dump(results, open(sys.argv[2], "w"))
"""
_LAST_LINES = 3


class Vllm(Engine):
    """vLLM's pooling runner in float32, on the CPU where its build is for CPUs."""

    name = "vLLM"

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        prompt = "" if role is None else read_saved_settings(directory).prompts.get(role, "")
        return torch.tensor(_run(directory, {"texts": [prompt + text for text in texts]}))

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> Tensor:
        settings = read_reranker_settings(directory)
        scores = torch.tensor(_run(directory, {"pairs": [list(pair) for pair in pairs]}), dtype=torch.float64)
        # vLLM applies the sigmoid that the directory asks for.
        return torch.logit(scores).float() if settings is None or settings.activation == "sigmoid" else scores.float()


def _run(directory: Path, asked: dict[str, Any]) -> Any:
    """What vLLM answers. Raises ConfigError without vLLM, CheckpointError if it does not take the model."""
    interpreter = os.environ.get(INTERPRETER, sys.executable)
    environment = {**os.environ, **_ON_CPU}
    environment.pop("PYTHONPATH", None)
    probe = subprocess.run([interpreter, "-c", "import vllm"], capture_output=True, text=True, check=False,
                           env=environment)
    if probe.returncode:
        raise ConfigError(f"vLLM cannot be imported by {interpreter}; set {INTERPRETER} to the python of an "
                          "environment that has it (docs/serving.md)")
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "answered.json"
        question.write_text(json.dumps({**asked, "directory": str(directory.absolute())}), encoding="utf-8")
        done = subprocess.run([interpreter, "-c", _PROGRAM, str(question), str(answer)], capture_output=True, text=True,
                              check=False, env=environment)
        if done.returncode or not answer.is_file():
            last = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
            raise CheckpointError(f"{directory}: vLLM does not take the model ({last}); the export must not be used")
        return json.loads(answer.read_text(encoding="utf-8"))
