"""What `doctor` says of a machine, a package out of range, and an apex that is not NVIDIA's."""

import importlib.metadata
import socket
import time

import pytest
from packaging.requirements import Requirement

from megatron_embed.__main__ import main
from megatron_embed.platform.doctor import (
    Check,
    _name_lookup,
    check_requirement,
    cpu_features,
    report,
    requirements_of,
    run_checks,
)
from megatron_embed.run.doctor_checks import _open_files
from tests.helpers.toys import REPOSITORY


@pytest.fixture
def checks():
    return {check.name: check for check in run_checks()}


def test_this_machine_can_run(checks):
    assert "gloo" in checks["process groups"].value
    assert checks["megatron-core import"].remedy == ""
    assert "usable cores" in checks["cpu"].value


@pytest.mark.parametrize(
    "requirement, value, remedy",
    [
        ("numpy>=1", "", ""),
        ("numpy>=1000", "outside >=1000", "pip install 'numpy>=1000'"),
        ("no-such-package>=2", "missing", "pip install 'no-such-package>=2'"),
    ],
)
def test_requirements_are_compared_with_what_is_installed(requirement, value, remedy):
    check = check_requirement(Requirement(requirement))
    assert value in check.value
    assert check.remedy == remedy


def test_checkout_that_is_not_installed_is_checked_all_the_same(monkeypatch, tmp_path, checks):
    """As on a machine without network, where the sources and some wheels were copied."""
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    by_name = {check.name: check for check in run_checks()}
    assert "runs from" in by_name["installation"].value and not by_name["installation"].remedy
    assert len(requirements_of(REPOSITORY / "setup.py")) > 10
    assert {name: by_name[name] for name in ("torch", "megatron-core", "transformers", "psutil")} == {
        name: checks[name] for name in ("torch", "megatron-core", "transformers", "psutil")}
    assert requirements_of(tmp_path / "setup.py") == []
    (tmp_path / "setup.py").write_text("OTHER = ['numpy']\n")
    assert requirements_of(tmp_path / "setup.py") == []


@pytest.mark.parametrize("nvidia", [False, True])
def test_apex_is_known_by_what_is_in_it(tmp_path, monkeypatch, nvidia):
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").touch()
    if nvidia:
        (package / "optimizers").mkdir()
        (package / "multi_tensor_apply").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    # Only looked up, never imported: Megatron-Core was imported long before this test.
    check = next(check for check in run_checks() if check.name == "apex")
    assert ("wrong package" in check.value) is not nvidia
    assert ("pip uninstall apex" in check.remedy) is not nvidia


@pytest.mark.parametrize("seconds, note", [(0.0, False), (0.7, True)])
def test_slow_name_server_is_named(monkeypatch, seconds, note):
    """torch looks up the name of every address that it connects to."""
    asked = []
    monkeypatch.setattr(socket, "getnameinfo", lambda address, flags: (asked.append(address[0]), time.sleep(seconds)))
    check = _name_lookup("127.0.0.1")
    assert ("RES_OPTIONS" in check.note) is note and not check.remedy
    assert set(asked) == {"::ffff:127.0.0.1"} and len(asked) == (1 if note else 3)
    assert "no-such-host.invalid" in _name_lookup("no-such-host.invalid").value


def test_cpu_features_are_read_from_cpuinfo(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\n"
                    "processor\t: 1\nmodel name\t: Some CPU\nflags\t\t: fpu\n")
    assert cpu_features(str(file)) == (["avx2", "avx512f", "avx512_bf16"], "Some CPU")
    assert cpu_features(str(tmp_path / "absent"))[0] == []


def test_report_marks_problems_and_ends_with_what_to_do():
    lines = report([Check(name="a", value="1"), Check(name="bb", value="2", note="by the way"),
                    Check(name="c", value="3", remedy="install it")]).splitlines()
    assert lines == ["ok a   1", "-- bb  2  (by the way)", "!! c   3", "", "c: install it", "1 thing to put right"]


@pytest.mark.parametrize("remedy, code", [("", 0), ("install it", 1)])
def test_command_prints_the_report_and_its_exit_code_tells(monkeypatch, capsys, remedy, code):
    checks = [Check(name="a", value="1", remedy=remedy)]
    monkeypatch.setattr("megatron_embed.platform.doctor.run_checks", lambda: checks)
    assert main(["doctor"]) == code
    assert "a  1" in capsys.readouterr().out


@pytest.mark.parametrize(("override", "gpus", "remedy"), [
    (None, 0, ""), ("model.attention=te", 0, "model.attention needs GPUs"),
    ("optimizer.cpu_offload=true", 0, "optimizer.cpu_offload needs GPUs"), ("optimizer.cpu_offload=true", 8, "")])
def test_run_that_needs_a_gpu_is_told_so_before_it_starts(monkeypatch, tmp_path, capsys, override, gpus, remedy):
    monkeypatch.setattr("megatron_embed.run.doctor_checks.visible_gpus", lambda: gpus)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    config = tmp_path / "run.yaml"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    config.write_text(f"model: {{path: org/model}}\ndata: {{train: [{tmp_path}/rows.jsonl]}}\n"
                      "training: {global_batch_size: 64}\n"
                      f"checkpoint: {{directory: {tmp_path}/run}}\n")
    code = main(["doctor", "--config", str(config), "--ranks", "8", *([override] if override else [])])
    said = capsys.readouterr().out
    assert code == (1 if remedy else 0) and remedy in said and ("needs GPUs" in said) == bool(remedy)


@pytest.mark.parametrize(("ranks", "hard", "value", "remedy"), [
    (1024, 4096, "up to 4,096 (now 64); 2,148 where the store is", ""),
    (1024, 1024, "up to 1,024 (now 64); 636 where the store is, through one rank of each node (without: 2,148)", ""),
    (1024, 600, "up to 600 (now 64); 636 where", "ask for a hard limit of 636 "),
    (8, 110, "up to 110 (now 64); 116 where the store is", "ask for a hard limit of 116 "),  # a single node
])
def test_limit_of_open_files_is_compared_with_connections_to_the_store(monkeypatch, ranks, hard, value, remedy):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, hard))
    check = _open_files(ranks, 8)
    assert check.value.startswith(value) and bool(check.remedy) == bool(remedy) and check.remedy.startswith(remedy)
