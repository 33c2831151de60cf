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
from typing import IO, Any

import torch
from torch import Tensor

from megatron_embed.config.json_file import read_json_object
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.export.engines.base import Engine, PairScores
from megatron_embed.loading.model_directory import find_model
from megatron_embed.loading.reranker import saved_settings
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import Role

INTERPRETER = "VLLM_PYTHON"
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_PROGRAM = """
import gc, json, os, sys
answers = os.fdopen(int(sys.argv[1]), "w")
from vllm import LLM, PoolingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
model, loaded, cut = None, None, {"truncate_prompt_tokens": -1}
for line in sys.stdin:
    asked = json.loads(line)
    try:
        if asked["load"] != loaded:
            if model is not None:
                model = None
                gc.collect()
                cleanup_dist_env_and_memory()
            model = LLM(**asked["load"], runner="pooling", dtype="float32", enforce_eager=True, trust_remote_code=False)
            loaded = asked["load"]
        if "texts" in asked:
            rows = [row.outputs.embedding
                    for row in model.embed(asked["texts"], tokenization_kwargs=cut, use_tqdm=False)]
        else:
            queries, documents = map(list, zip(*asked["pairs"]))
            rows = [[row.outputs.score for row in model.score(queries, documents, tokenization_kwargs=cut,
                                                              use_tqdm=False, chat_template=asked["template"],
                                                              pooling_params=PoolingParams(use_activation=activation))]
                    for activation in (False, True)]
        print(json.dumps({"rows": rows}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
"""
"""Answers, line by line, what is asked for; loads a model once for all questions that follow each other."""
_LAST_LINES = 3


class Vllm(Engine):
    """vLLM's pooling runner in float32, on the CPU where its build is for CPUs; one process until it is closed."""

    name = "vLLM"

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def check_installed(self) -> None:
        _interpreter()

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        prompt = "" if role is None else read_saved_settings(directory).prompts.get(role, "")
        return torch.tensor(self._ask(directory, {}, {"texts": [prompt + text for text in texts]}))

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        settings = saved_settings(find_model(str(directory)))
        classes = {} if settings.head == "score" else {"hf_overrides": as_classifier(directory)}
        file = directory / "chat_template.jinja"
        # vLLM takes the one that --chat-template names, not the tokenizer's.
        template = file.read_text(encoding="utf-8") if settings.template is not None and file.is_file() else None
        raw, final = self._ask(directory, classes, {
            "template": template, "pairs": [[settings.prompt + query, document] for query, document in pairs]})
        return PairScores(raw=torch.tensor(raw), final=torch.tensor(final))

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._answers.close()
            self._process = None

    def _ask(self, directory: Path, load: dict[str, Any], question: dict[str, Any]) -> Any:
        """vLLM's answer. Raises ConfigError without vLLM, CheckpointError if it does not take the model."""
        if self._process is None:
            self._process, self._answers, self._errors = _start()
        assert self._process.stdin is not None
        load = {"model": str(directory.absolute()), **load}
        try:
            self._process.stdin.write(json.dumps({"load": load, **question}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it wrote before it ended says more
        answer = json.loads(self._answers.readline() or "{}")
        if "rows" not in answer:
            self._errors.seek(0)
            last = answer.get("error") or " ".join(self._errors.read().strip().splitlines()[-_LAST_LINES:])
            self.close()
            raise CheckpointError(f"{directory}: vLLM does not take the model ({last}); the export must not be used")
        return answer["rows"]


def as_classifier(directory: Path) -> dict[str, Any]:
    """`--hf-overrides` by which vLLM serves a *ForCausalLM of two answers as a reranker."""
    settings = saved_settings(find_model(str(directory)))
    name = str(read_json_object(directory / "config.json")["architectures"][0])
    return {"architectures": [name.replace("ForCausalLM", "ForSequenceClassification")], "use_sep_token": False,
            "classifier_from_token": [settings.false_token, settings.true_token], "method": "from_2_way_softmax"}


def _environment() -> dict[str, str]:
    environment = {**os.environ, **_ON_CPU}
    environment.pop("PYTHONPATH", None)  # this program's packages are not vLLM's
    return environment


def _interpreter() -> str:
    """The python that has vLLM. Raises ConfigError if none has."""
    interpreter = os.environ.get(INTERPRETER, sys.executable)
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        missing = subprocess.run([interpreter, "-c", found], check=False, env=_environment()).returncode
    except OSError as error:
        raise ConfigError(f"{INTERPRETER} = {interpreter}: {error.strerror}; set it to the python of an environment "
                          "that has vLLM (docs/serving.md)") from error
    if missing:
        raise ConfigError(f"vLLM is not installed for {interpreter}; set {INTERPRETER} to the python of an environment "
                          "that has it (docs/serving.md)")
    return interpreter


def _start() -> tuple["subprocess.Popen[str]", IO[str], IO[str]]:
    """vLLM's process, what it answers and its log. Raises ConfigError if there is no vLLM."""
    interpreter = _interpreter()
    reading, writing = os.pipe()
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # as long as the process
    process = subprocess.Popen([interpreter, "-c", _PROGRAM, str(writing)], stdin=subprocess.PIPE, stdout=errors,
                               stderr=errors, text=True, env=_environment(), pass_fds=(writing,))
    os.close(writing)
    return process, os.fdopen(reading, encoding="utf-8"), errors
