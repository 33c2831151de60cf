"""What files and other processes say is shown in messages and logs, and obeyed by no terminal."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest

from megatron_embed.__main__ import main
from megatron_embed.cli.common import write_output
from megatron_embed.platform.terminal_text import (
    LogFormatter,
    continued,
    guard_records,
    one_line,
    printable,
    setup_logging,
)
from tests.helpers.toys import REPOSITORY

ESCAPES = {
    "colour": ("\x1b[31mred", "\\u001b[31mred"), "title": ("\x1b]0;owned\x07", "\\u001b]0;owned\\u0007"),
    "C1": ("\x9b2J", "\\u009b2J"), "delete": ("a\x7fb", "a\\u007fb"), "carriage return": ("ok\rno", "ok\\rno"),
    "backwards": ("\u202egpj.exe", "\\u202egpj.exe"), "isolated": ("\u2066a\u2069", "\\u2066a\\u2069"),
    "half a character": ("\ud83d", "\\ud83d"), "byte order mark": ("\ufeffa", "\\ufeffa"),
    "tag": ("\U000e0041", "\\udb40\\udc41"), "line separator": ("a\u2028b", "a\\u2028b"), "null": ("\0", "\\u0000")}
LETTERS = "naïve 中文 日本語 한국어 हिन्दी میخواهم\u200cآن עברית ไทย 👩\u200d🔬 №½ a\u0301"


@pytest.mark.parametrize("text, shown", ESCAPES.values(), ids=ESCAPES)
def test_what_a_terminal_obeys_is_shown(text, shown):
    assert printable(text) == shown
    assert json.loads(f'"{printable(text)}"') == text


def test_letters_of_all_scripts_stay():
    assert printable(LETTERS) == LETTERS
    assert one_line(f"a\n{LETTERS}\tb\x85c") == f"a {LETTERS} b c"
    assert len(one_line("a" * 10**6)) < 10_000


@pytest.fixture
def records():
    """Sets the factory of log records back."""
    factory, handlers = logging.getLogRecordFactory(), logging.getLogger().handlers[:]
    formatters = [handler.formatter for handler in handlers]
    yield
    logging.setLogRecordFactory(factory)
    for handler, formatter in zip(handlers, formatters, strict=True):
        handler.setFormatter(formatter)


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;owned\x07", "\u202e\x9b31m", "a\nmegatron-embed: error: all is well"])
def test_error_is_one_line_that_no_terminal_obeys(tmp_path, capsys, records, name):
    for arguments in (["train", str(tmp_path / f"{name}.yaml")], ["encode", "--model", f"/{name}", "--input", "a",
                                                                   "--output", "b"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("megatron-embed: error: ")
        assert printable(error) == error


def test_rows_of_a_file_are_shown(tmp_path, capsys, records):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "a", "positive": "b", "\x9b31m\u202e": 1, "positve": 中}\n', encoding="utf-8")
    assert main(["data", "check", str(file)]) == 2
    assert "中" in (error := capsys.readouterr().err) and printable(error) == error


def test_results_stay_json(capsys):
    values = {"name": "".join(text for text, _ in ESCAPES.values()) + LETTERS}
    write_output(json.dumps(values, ensure_ascii=False))
    written = capsys.readouterr().out
    assert printable(written) == written and "中文" in written
    assert json.loads(written)["name"].encode("utf-16", "surrogatepass") == values["name"].encode(
        "utf-16", "surrogatepass")


def test_log_lines_are_shown_and_none_can_be_forged():
    record = logging.LogRecord("a", logging.INFO, "f", 1, "%s", ("x\x1b[31m\n12:00:00 INFO a: all is well",), None)
    assert LogFormatter("%(levelname)s %(message)s").format(record) == (
        "INFO x\\u001b[31m\n    12:00:00 INFO a: all is well")
    assert continued("a\nb") == "a\n    b"
    try:
        raise ValueError("\x1b[31m")
    except ValueError:
        record = logging.LogRecord("a", logging.INFO, "f", 1, "m", (), sys.exc_info())
    assert "ValueError: \\u001b[31m" in LogFormatter("%(message)s").format(record)


def test_libraries_with_handlers_of_their_own_are_covered(records):
    texts = []
    logger, handler = logging.getLogger("library"), logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    guard_records()
    logger.addHandler(handler)
    try:
        logger.warning("%s and 中", "\x1b[31m")
        logger.warning("%d of %d", 1, 2)
        logger.warning("no number: %d", "a")
    except TypeError:  # by the handler above, which formats where logging would report
        pass
    finally:
        logger.removeHandler(handler)
    assert texts == ["\\u001b[31m and 中", "1 of 2"]


def test_unexpected_error_in_a_process_of_its_own(tmp_path):
    code = ("import sys, megatron_embed.__main__ as m\n"
            "def run(args): raise KeyError('x') from RuntimeError('\\x1b[31m\\u202e中')\n"
            "m.COMMANDS['plan'].run = run\nsys.exit(m.main(['plan', 'a.yaml', '--gpus', '1']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False, cwd=tmp_path,
                          env={"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"], "PYTHONUTF8": "1"})
    error = done.stderr.decode("utf-8")
    assert done.returncode == 1 and "RuntimeError: \\u001b[31m\\u202e中" in error and printable(error) == error


def test_libraries_log_warnings_only(records):
    """Also those that set a level of their own, as bm25s does."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        setup_logging(0)
        for name in ("some_library", "megatron_embed.mining", "megatron_embedded"):
            logging.getLogger(name).setLevel(logging.DEBUG)
            logging.getLogger(name).debug("building")
            logging.getLogger(name).warning("careful")
    finally:
        logging.getLogger().removeHandler(handler)
        for name in ("some_library", "megatron_embed.mining", "megatron_embedded"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    shown = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert shown == ["WARNING some_library: careful", "DEBUG megatron_embed.mining: building",
                     "WARNING megatron_embed.mining: careful", "WARNING megatron_embedded: careful"]


@pytest.mark.slow
def test_an_optional_kernel_that_is_not_used_is_not_missed():
    """In a process of its own: bitsandbytes warns when it is first imported, on processors with bfloat16."""
    program = ("from megatron_embed.platform.terminal_text import setup_logging; setup_logging(0); "
               "import bitsandbytes; print('imported')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, "kernels" in done.stderr) == ("imported\n", False), done.stderr


def test_setting_up_twice_is_harmless(records):
    setup_logging(0)
    handlers, factory = logging.getLogger().handlers[:], logging.getLogRecordFactory()
    setup_logging(0)
    assert (logging.getLogger().handlers, logging.getLogRecordFactory()) == (handlers, factory)
    assert factory("name", logging.INFO, "file", 1, "a%s", ("\x1b",), None).getMessage() == "a\\u001b"
