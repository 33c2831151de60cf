"""The command line: exit codes, one line of error from one rank, the status file, and how fast help comes."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from megatron_embed import __main__ as command_line
from megatron_embed.__main__ import main
from megatron_embed.cli import completion
from megatron_embed.errors import DataError, UserError
from megatron_embed.platform import status
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  fixtures
from tests.helpers.toys import REPOSITORY


@pytest.fixture
def doctor_that(monkeypatch):
    """Let the command `doctor` do something else."""

    def replace(action):
        monkeypatch.setattr(command_line.doctor, "run", action)

    return replace


def raising(error):
    def run(args):
        raise error

    return run


def run_program(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "megatron_embed", *arguments], capture_output=True, text=True,
                          env=os.environ | environment, timeout=60)


def test_help_answers_at_once_and_without_heavy_imports():
    code = (
        "import sys; from megatron_embed.__main__ import build_parser; build_parser().format_help(); "
        "heavy = {'torch', 'numpy', 'yaml', 'transformers', 'megatron'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run_program("--help")
        seconds.append(time.perf_counter() - started)
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "convert", "encode", "evaluate", "doctor"))
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: {path: m}\nobjective: {temprature: 1}\n",
         ["run.yaml:2", "objective.temprature", "did you mean 'temperature'?"]),
        ("model: {path: m}\ntraining:\n  seed: x\n", ["run.yaml:3", "training.seed = 'x'", "expected a whole number"]),
        (None, ["run.yaml", "No such file"]),
    ],
)
def test_bad_configuration_is_one_line_and_exit_code_2(tmp_path, text, words):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    result = run_program("train", str(tmp_path / "run.yaml"))
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("megatron-embed: error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'; did you mean `train`?"),
        (["export", "a"], "did you mean `convert megatron-to-hf`?"),
        (["train", "--config", "a.yaml"], "its value stands alone: `megatron-embed train a.yaml`"),
        (["serve", "--model", "m"], "--model is not an option, its value stands alone: `megatron-embed serve m`"),
        (["train", "a.yaml", "--dryrun"], "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (["train", "a.yaml", "--learning_rate", "2e-5"], "--learning_rate; settings have no dashes: write training."
                                                        "learning_rate=VALUE"),
        (["train", "a.yaml", "--num_train_epochs=2"], "num_train_epochs is training.epochs here"),
        (["train", "a.yaml", "--no_such_thing", "2"], "--no_such_thing; settings have no dashes: write section.key"),
        (["mine", "--model", "m", "--range_min", "5"], "unrecognized arguments: --range_min"),
        (["evaluate", "--model_name_or_path", "m"], "unrecognized arguments: --model_name_or_path"),
        (["mine", "--model", "a", "--num_negs", "3"], "did you mean --num-negatives?"),
        (["train"], "CONFIG.yaml"),
        (["train", "a.yaml", "seed"], "'seed' is not a setting; write section.key=value"),
        (["encode", "--model", "a"], "--input, --output"),
        (["encode", "--model", "a", "--input", "b", "--output", "c", "training.seed=1"], "write parallel.KEY=VALUE"),
        (["evaluate", "--model", "a", "--data", "b", "--max-length", "0"], "'0' is not a whole number above 0"),
        (["convert", "megatron-to-hf", "a", "b", "--format", "x"], "invalid choice: 'x'"),
        (["convert", "hf-to-megatron", "a", "b", "--format", "hf"], "unrecognized arguments: --format"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, arguments, words):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert "--help`" in line


@pytest.mark.parametrize("arguments", [
    ["convert", "hf-to-megatron", 5000 * "x", "out"],
    ["doctor", "--config", 5000 * "x"],
    ["data", "check", 5000 * "x"]], ids=["convert", "doctor", "data"])
def test_paths_too_long_for_the_file_system_are_one_line_and_exit_code_2(capsys, arguments):
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "xxx" in line]
    assert "too long" in line or "longer than this file system takes; give a shorter one" in line


def test_arguments_reach_the_command():
    parse = command_line.build_parser().parse_args
    args = parse(["encode", "--model", "m", "--input", "i", "--output", "o", "--role", "query", "--dtype", "bfloat16",
                  "--max-length", "64", "--no-normalize", "parallel.tensor_model_parallel_size=2"])
    assert (args.role, args.dtype, args.max_length, args.no_normalize) == ("query", "bfloat16", 64, True)
    assert (args.pooling, args.overrides) == (None, ["parallel.tensor_model_parallel_size=2"])
    args = parse(["evaluate", "--model", "m", "--data", "d"])
    assert (args.split, args.no_normalize, args.overrides) == (None, False, [])
    args = parse(["convert", "megatron-to-hf", "a", "b", "--format", "sentence-transformers"])
    assert (args.direction, args.source, args.destination) == ("megatron-to-hf", "a", "b")
    assert args.format == "sentence-transformers"
    assert parse(["train", "run.yaml", "training.seed=1", "a.b=c"]).overrides == ["training.seed=1", "a.b=c"]


def test_settings_may_stand_behind_options():
    parse = command_line.build_parser().parse_args
    for words in ("run.yaml --gpus 8 a.b=c d.e=f", "--gpus 8 run.yaml a.b=c d.e=f", "run.yaml a.b=c --gpus 8 d.e=f"):
        args = parse(["plan", *words.split()])
        assert (args.config, args.gpus, args.overrides) == ("run.yaml", 8, ["a.b=c", "d.e=f"]), words
    assert parse(["data", "check", "run.yaml", "--json", "a.b=c"]).inputs == ["run.yaml", "a.b=c"]
    assert parse(["encode", "parallel.a=2", "--model", "m", "--input", "i", "--output", "o", "parallel.b=3"]
                 ).overrides == ["parallel.a=2", "parallel.b=3"]
    with pytest.raises(UserError, match="'nonsense' is not a setting; write section.key=value; see `megatron-"):
        parse(["plan", "run.yaml", "--gpus", "8", "nonsense"])
    with pytest.raises(UserError, match="unrecognized arguments: --gpuu"):
        parse(["plan", "run.yaml", "--gpus", "8", "--gpuu", "h100"])


@pytest.mark.parametrize("arguments", ["convert hf-to-megatron a b", "merge --method linear a b --output c",
                                       "data check a.yaml", "plan a.yaml --gpus 8"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_work_of_one_process_is_refused_on_several_ranks(monkeypatch, capsys, arguments, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments.split()) == 2
    err = capsys.readouterr().err
    command = arguments.split()[0]
    assert err == ("" if rank == "1" else f"megatron-embed: error: {command} runs in one process, and "
                   "torchrun's WORLD_SIZE says 2 ranks; start it once, without a launcher\n")


def test_every_command_says_how_many_ranks_it_has():
    kinds = (*command_line.MULTI_RANK_COMMANDS, *command_line.SINGLE_PROCESS_COMMANDS, "doctor")
    assert sorted(kinds) == sorted(command_line.COMMANDS)


@pytest.mark.parametrize("names, others", [
    (["RANK"], {"WORLD_SIZE": "2"}), (["SLURM_PROCID", "SLURM_LOCALID"], {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"})])
def test_only_rank_0_prints_and_every_rank_ends_with_2(doctor_that, monkeypatch, capsys, tmp_path, names, others):
    doctor_that(raising(DataError("a.jsonl:3: no\nquery; add one")))
    for name, value in {status.STATUS_FILE_VARIABLE: str(tmp_path / "status"), **dict.fromkeys(names, "1"),
                        **others}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "status").exists()
    for name in names:
        monkeypatch.setenv(name, "0")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "megatron-embed: error: a.jsonl:3: no query; add one\n"
    assert json.loads((tmp_path / "status").read_text()) == {"exit_code": 2, "message": "a.jsonl:3: no query; add one"}


@pytest.mark.parametrize(
    "action, code, words",
    [
        (lambda args: 0, 0, ""),
        (lambda args: 75, 75, ""),
        (raising(SystemExit(75)), 75, ""),
        (raising(SystemExit(None)), 0, ""),
        (raising(SystemExit("stopped")), 1, "stopped\n"),
        (raising(KeyboardInterrupt()), 130, ""),
    ],
)
def test_exit_codes_are_kept(doctor_that, monkeypatch, capsys, tmp_path, action, code, words):
    doctor_that(action)
    monkeypatch.setenv(status.STATUS_FILE_VARIABLE, str(tmp_path / "status"))
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == words
    assert json.loads((tmp_path / "status").read_text())["exit_code"] == code


def test_anything_else_is_a_traceback_and_exit_code_1(doctor_that, capsys):
    doctor_that(raising(ZeroDivisionError("a bug")))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "ZeroDivisionError: a bug" in text


def test_a_killed_run_leaves_no_status_of_an_earlier_one(doctor_that, monkeypatch, tmp_path):
    file = tmp_path / "status"
    file.write_text('{"exit_code": 0, "message": ""}\n')
    monkeypatch.setenv(status.STATUS_FILE_VARIABLE, str(file))
    seen = []
    doctor_that(lambda args: seen.append(file.exists()) or 0)
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor"]) == 0
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor"]) == 0
    assert seen == [True, False]
    assert json.loads(file.read_text())["exit_code"] == 0


def test_status_file_that_cannot_be_written_changes_nothing(doctor_that, monkeypatch, caplog, tmp_path):
    doctor_that(lambda args: 0)
    monkeypatch.setenv(status.STATUS_FILE_VARIABLE, str(tmp_path / "absent" / "status"))
    assert main(["doctor"]) == 0
    assert "cannot write the status" in caplog.text


def every_parser():
    """(name, parser) of each command and of the commands of these."""
    parser = command_line.build_parser()
    for name, command in completion.subcommands(parser).items():
        yield name, command
        yield from ((f"{name} {nested}", inner) for nested, inner in completion.subcommands(command).items())


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_help_has_examples_that_parse_and_a_page_that_exists(name):
    module = command_line.COMMANDS[name]
    parser = command_line.build_parser()
    text = completion.subcommands(parser)[name].format_help()
    assert text.endswith(f"\n\nmore: {module.PAGE}\n") and (REPOSITORY / module.PAGE).is_file()
    for example in module.EXAMPLES:
        assert f"\n  {example}\n" in text
        words = shlex.split(re.sub(r"""^eval "\$\((.*)\)".*""", r"\1", example).partition(" < ")[0])
        if words[0].startswith("launch/"):
            assert (REPOSITORY / words[0]).is_file()
        else:
            assert words[0] == "megatron-embed"
            assert parser.parse_args(words[1:]).command == name


def test_help_says_every_default():
    for name, parser in every_parser():
        for action in parser._actions:
            if action.option_strings and action.default not in (None, False, (), [], {}, argparse.SUPPRESS):
                said = str(action.default) in action.help or "without N" in action.help
                assert said, f"{name} {action.option_strings[0]}: {action.default!r} is not in its help"


@pytest.mark.parametrize("words, offered", [
    (["tr"], {"train"}), (["train", "--dr"], {"--dry-run"}),
    (["train", "run.yaml", "training.ep"], {"training.epochs="}), (["data", "c"], {"check"}),
    (["convert", "megatron"], {"megatron-to-hf"}), (["convert", "--merge"], {"--merge-lora"}),
    (["encode", "parallel.ten"], {"parallel.tensor_model_parallel_size="}), (["plan", "model.pat"], {"model.path="}),
    (["completion", ""], {"bash", "zsh", "-h", "--help"}), (["merge", "training."], set())])
def test_bash_completes_commands_options_and_settings(words, offered, bash_completion):
    line = " ".join(f"'{word}'" for word in ["megatron-embed", *words])
    script = (f"{bash_completion}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _megatron_embed; "
              'printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.fixture(scope="module")
def bash_completion():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["completion", "bash"]) == 0
    return out.getvalue()


def test_zsh_completion_has_the_same_words(capsys, bash_completion):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    cases = [set(re.findall(r"\*:train\) candidates=[\"(](.*)[\")] ;;", text)[0].split())
             for text in (bash_completion, script)]
    assert cases[0] == cases[1] > {"--dry-run", "checkpoint.save_every_epochs="}
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n"], input=script, text=True, check=True, timeout=60)


def test_torchrun_is_told_the_error(doctor_that, monkeypatch, tmp_path, capsys):
    """Its last lines show the file's message in place of its advice on tracebacks."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv(status.TORCHRUN_FILE_VARIABLE, str(file))
    doctor_that(raising(DataError("a.jsonl:3: no query")))
    assert main(["doctor"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    shown = str(ChildFailedError("megatron_embed", {0: failure})).splitlines()
    assert shown[-2].strip() == "traceback : megatron-embed: error: a.jsonl:3: no query", shown
    monkeypatch.setenv(status.TORCHRUN_FILE_VARIABLE, str(tmp_path / "nowhere" / "error.json"))
    assert main(["doctor"]) == 2 and capsys.readouterr().err.count("no query") == 2
