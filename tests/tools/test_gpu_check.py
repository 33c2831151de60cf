"""tools/gpu_check.sh without a GPU: its table says what is true, its time is kept, and all of it runs on CPU ranks."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.toys import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "gpu_check.sh"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    spec = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.OutOfTimeError = sys.modules["gpu_runs"].OutOfTimeError
    yield module
    del sys.modules["gpu_check"]


def curve(factor=1.0, steps=8, **values):
    return [{"loss": factor * (3.0 - 0.1 * step), **values} for step in range(steps)]


def table_of(text):
    """{check: (result, verdict)}"""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {what: (result, verdict) for what, result, verdict in rows}


@pytest.fixture
def decoder(tmp_path):
    """A directory that says the shape of a small model."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "vocab_size": 1000,
        "max_position_embeddings": 512}))
    return tmp_path


def test_table_says_what_the_runs_did(tool, monkeypatch, tmp_path, capsys, decoder):
    answers = {
        "reference": curve(), "float32": curve(1.0005), "bfloat16_sdpa": curve(1.06),
        "float32_full_recomputation": tool.OutOfTimeError(), "float32_micro_batches_by_tokens": curve(1.002),
        "float32_DP_2": RuntimeError("NCCL error"), "float32_TP_2": curve(steps=7)}

    def train(self, overrides, log, *, ranks=1, cuda=None):
        assert cuda is not True
        if log == "resumed":
            return curve(steps=3 if any("exit_duration" in text for text in overrides) else 8)
        answer = answers.get(log, curve(tokens_per_second=10.0, memory_gib=1.0))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def probe(self, name, **options):
        assert name != "flash"
        if name == "save":
            raise RuntimeError("no end after 90 s")
        return {"holds": name != "dropout", "text": f"{name} {options['overrides'][-1:]}", "number": 3}

    def run(self, command, environment):
        if "tools/peer_training.py" in command:
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir()
            (folder / "metrics.jsonl").write_text('{"tokens": 10, "step_seconds": 2.0}\n' * 8)
        return 0, "the report\nof doctor", ""

    monkeypatch.setattr(tool.Machine, "train", train)
    monkeypatch.setattr(tool.Machine, "run", run)
    monkeypatch.setattr(tool.Machine, "probe", probe)
    monkeypatch.setattr(tool, "small_model", lambda *args: str(decoder))
    monkeypatch.setattr(tool, "make_decoder", lambda *args: decoder)
    monkeypatch.setattr(tool, "save_qwen3", lambda *args, **settings: decoder)
    output = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu", "--output", str(output)])
    assert tool.main() == 1
    printed = capsys.readouterr().out
    table = table_of(output.read_text())
    verdicts = {what: verdict for what, (_, verdict) in table.items()}
    assert verdicts == {
        "check": "holds", "doctor": "yes", "flash kernel against float64": "not run",
        "mixture of experts, float32": "yes", "dropout replay, sdpa": "NO",
        "loss and gradients, 512 x 384": "yes", "memory of a checkpoint": "NO",
        **{f"4 toy layers of Qwen3-{size}{of}": "yes" for size in ("0.6B", "4B", "8B")
           for of in ("", ", Sentence Transformers")},
        "CPU, float32: what the others are compared with": "yes", "float32": "yes",
        "bfloat16, sdpa": "NO", "float32, full recomputation": "not run", "float32, micro-batches by tokens": "NO",
        "float32, stopped by its time budget and resumed": "yes", "float32, DP 2": "NO",
        "float32, DP 2, whole optimizer": "yes", "float32, DP 2, overlapped": "yes", "float32, TP 2": "NO",
        "float32, PP 2": "yes", "float32, PP 2, interleaved": "yes", "float32, CP 2": "yes",
        "Qwen3 of toy size, float32, ranks: 2, recompute none": "yes",
        "Qwen3 of toy size, float32, ranks: 2, recompute full": "yes",
        "tests marked gpu or multi_gpu, not slow": "not run", "tests marked gpu or multi_gpu, slow": "not run"}
    assert "within 6.0e-02 of the CPU's (allowed 5e-02)" in table["bfloat16, sdpa"][0]
    assert table["float32, DP 2"][0] == "FAILED: NCCL error"
    assert table["float32, full recomputation"][0] == "no time left"
    assert table["float32, TP 2"][0].startswith("7 steps in place of 8")
    assert table_of(printed) == table
    assert "19 hold, 6 do not, 4 were not run" in printed
    assert table["doctor"][0].startswith("of doctor, ")
    assert table["memory of a checkpoint"][0] == "FAILED: no end after 90 s"
    assert table["4 toy layers of Qwen3-8B, Sentence Transformers"][0].startswith(
        "5 tokens/s (1 with all 36 layers); ours is 2.00 times as fast")
    written = json.loads(output.with_suffix(".json").read_text())
    assert {row["check"]: (row["result"], row["holds"]) for row in written["checks"]} == {
        what: row for what, row in table.items() if what != "check"}
    assert written["values"]["dropout replay, sdpa"] == {"number": 3}
    assert written["values"]["4 toy layers of Qwen3-4B"]["tokens_per_second"] == 10.0


def test_one_gpu_leaves_layouts_out_and_nothing_is_claimed_without_a_reference(tool, monkeypatch, tmp_path):
    machine = tool.Machine(cuda=True, ranks=1, deadline=time.monotonic() + 60, folder=tmp_path)
    logs = []
    monkeypatch.setattr(tool.Machine, "train", lambda self, overrides, log, **options: logs.append(log) or curve())
    table = tool.Table("title", None)
    tool.compare_curves("model", machine, table)
    checks = {what: (result, verdict) for what, result, verdict in table.rows}
    assert checks["float32, TP 2"] == ("needs 2 GPUs, here 1", "not run")
    assert checks["bfloat16, flash"][1] == "yes"
    assert checks["bfloat16, optimizer in host memory"][1] == "yes"
    for name in ("te", "layers of te", "precision-aware optimizer"):
        assert checks[f"bfloat16, {name}"] == ("Transformer Engine is not installed", "not run")
    assert not [log for log in logs if log.endswith("_2")]
    table = tool.Table("title", None, "TP 2|flash")
    tool.compare_curves("model", machine, table)
    assert [what for what, *_ in table.rows][1:] == ["bfloat16, flash", "float32, TP 2"]
    monkeypatch.setattr(tool.Machine, "train", lambda self, *args, **options: curve(steps=1))
    table = tool.Table("title", None)
    tool.compare_curves("model", machine, table)
    assert [verdict for *_, verdict in table.rows] == ["NO"]


def test_measured_memory_is_compared_with_the_plan(tool, monkeypatch, tmp_path, decoder):
    """On a GPU the activations may differ by a fifth: here they are the plan's own, then half as much again."""
    from megatron_embed.config.load import load_config
    from megatron_embed.planning.memory import GIB, grid_of, worst_stage
    from megatron_embed.planning.shapes import shape_of

    overrides = [f"model.path={decoder}", "model.dtype=bfloat16"]
    config = load_config(str(REPOSITORY / tool.DEMO), [*tool.CURVE, *overrides])
    _, planned = worst_stage(config, shape_of(str(decoder)), grid_of(config, 1))
    machine = tool.Machine(cuda=True, ranks=1, deadline=time.monotonic() + 60, folder=tmp_path)
    for factor, holds in ((1.0, True), (1.15, True), (1.5, False)):
        held = planned.total - planned.reserve + (factor - 1.0) * planned.activations
        monkeypatch.setattr(tool.Machine, "train", lambda self, *args, held=held, **options: curve(
            memory_gib=held / GIB, tokens_per_second=1e6, tflops_per_rank=100.0, mfu=0.4))
        text, verdict = tool.beside_plan(overrides, "log", machine)
        assert verdict == holds
        assert f"{factor:.2f} of the plan's" in text and "40.0% of the peak" in text


def test_a_check_ends_with_its_own_time_and_loses_no_other(tool, tmp_path):
    machine = tool.Machine(cuda=False, ranks=2, deadline=time.monotonic() + 60, folder=tmp_path)
    table = tool.Table("title", tmp_path / "table.md", machine=machine)
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '61']); print('x', flush=True); time.sleep(60)"
    started = time.monotonic()
    assert not table.add("hangs", lambda: (machine.run([sys.executable, "-c", hangs], {})[1], True), limit=1)
    assert time.monotonic() - started < 20
    assert not table.add("raises", lambda: (str([][0]), True), limit=1)
    assert table.add("runs", lambda: (machine.run(["echo", "x"], {})[1].strip(), True), limit=30)
    results = {what: result for what, result, _ in table.rows}
    assert results["hangs"] == "FAILED: no end after 1 s" and results["raises"].startswith("FAILED: IndexError: ")
    assert results["runs"].startswith("x, ") and len(machine.failures) == 1
    assert len((tmp_path / "table.md").read_text().splitlines()) == 7


def test_a_command_ends_with_the_time(tool, tmp_path):
    machine = tool.Machine(cuda=False, ranks=2, deadline=time.monotonic() + 60, folder=tmp_path)
    assert machine.run([sys.executable, "-c", "import os; print(os.environ['A'])"], {"A": "b"}) == (0, "b\n", "")
    started = time.monotonic()
    machine.deadline = started + 1.5
    with pytest.raises(tool.OutOfTimeError):
        machine.run(["sleep", "60"], {})
    with pytest.raises(tool.OutOfTimeError):
        machine.run(["sleep", "60"], {})
    assert time.monotonic() - started < 10


def test_a_stopped_check_leaves_nothing_running(tmp_path):
    """Not a trainer on the GPU either, that the next call would share it with."""
    runs = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY / "tools")!r})
from gpu_runs import Machine
from measurement import exit_on_signals
from pathlib import Path
exit_on_signals()
Machine(cuda=False, ranks=1, deadline=time.monotonic() + 60, folder=Path()).run(
    ["sh", "-c", f'echo $$ > {tmp_path}/unfinished; mv {tmp_path}/unfinished {tmp_path}/run; sleep 60'], {{}})
"""
    process = subprocess.Popen([sys.executable, "-c", runs])
    while not (tmp_path / "run").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert ends(int((tmp_path / "run").read_text(encoding="ascii")))


def ends(pid):
    """Whether a process that was killed is gone within seconds; nobody may have asked yet for how it ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_curves_are_compared_relative_to_the_first_loss(tool):
    def difference(*losses):
        return tool.largest_difference([{"loss": loss} for loss in losses], [0.8, 0.4, 0.2], 0.05)

    assert difference(0.8, 0.436, 0.2) == ("loss of 3 steps within 4.5e-02 of the CPU's (allowed 5e-02)", True)
    assert not difference(0.8, 0.444, 0.2)[1] and not difference(0.8, 0.4, 0.156)[1] and not difference(0.8, 0.4)[1]


def test_reason_of_a_log(tool):
    log = ("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nE1125 failed\n"
           "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nlast")
    assert tool.reason_of(log) == "torch.OutOfMemoryError: CUDA out of memory"
    assert tool.reason_of("noise\nmegatron-embed: error: no rows\nValueError: x") == "megatron-embed: error: no rows"
    assert tool.reason_of("a\nb") == "b"


def test_wheels_are_unpacked_for_the_interpreter(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$PYTHONPATH: $*" >>"$STUB_LOG"\n'
                      "[[ $1 == tools/* ]] && exit 7\nexit 0\n")
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    environment = os.environ | {"PYTHON": str(python), "STUB_LOG": str(tmp_path / "log"), "PYTHONPATH": "before",
                                "TMPDIR": str(tmp_path)}
    command = [str(SCRIPT), "--wheels", str(tmp_path / "wheels"), "--cpu", "--minutes", "3"]
    empty = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (empty.returncode, "no .whl file there" in empty.stderr) == (2, True)
    for name in ("a", "b"):
        (tmp_path / "wheels" / f"{name}.whl").touch()
    assert subprocess.run(command, env=environment, check=False).returncode == 7
    pip, check = (tmp_path / "log").read_text().splitlines()
    site = re.search(r"--target (\S+) ", pip).group(1)
    assert pip.startswith("before: -m pip install -q --no-index --no-deps ") and pip.endswith("a.whl " + str(
        tmp_path / "wheels" / "b.whl"))
    assert check == f"{site}:before: tools/gpu_check.py --cpu --minutes 3"
    assert not os.path.exists(site)


@pytest.mark.slow
def test_the_whole_script_on_cpu_ranks(tmp_path):
    output = tmp_path / "table.md"
    done = subprocess.run([str(SCRIPT), "--cpu", "--minutes", "30", "--output", str(output)], capture_output=True,
                          text=True, check=False, env=os.environ | {
                              "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [verdict for _, verdict in table_of(output.read_text()).values()]
    assert verdicts == ["holds", "yes", "not run"] + ["yes"] * 25 + ["not run"]
    assert not output.with_suffix(".failures.log").exists()
