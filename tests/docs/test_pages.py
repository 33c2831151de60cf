"""Pages of the site: the navigation is complete, configurations load, commands parse; marked slow: every block runs."""

import itertools
import os
import re
import subprocess
import sys

import pytest
import yaml

from megatron_embed.__main__ import build_parser
from megatron_embed.config.load import load_config, load_text
from megatron_embed.init.translate import translated
from tests.helpers.pages import DOCS, blocks_of, commands_of, script_of
from tests.helpers.toys import MINILM, REPOSITORY

GUIDES = sorted([*(DOCS / "tutorials").glob("*.md"), *(DOCS / "recipes").glob("*.md")])
COMING_FROM = sorted((DOCS / "from").glob("*.md"))
FOREIGN_FILES = ("swift_",)
"""Beginnings of the names of files that belong to another trainer."""
REASONS = {"needs the hub", "needs GPUs", "the same on a machine with GPUs"}
OURS = "megatron_embed"
"""Title of our side in a comparison."""


def name_of(page):
    return str(page.relative_to(DOCS).with_suffix(""))


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_parse_and_configurations_load(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser, blocks, configurations, count = build_parser(), blocks_of(page), [], 0
    for block in blocks:
        if block.not_run is not None:
            assert block.not_run in REASONS, f"{page}:{block.line}"
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text)
            if block.file.endswith(".yaml") and not block.file.startswith(FOREIGN_FILES):
                load_config(block.file, [])
                configurations.append(block.file)
        if block.language == "bash":
            for arguments in commands_of(block):
                count += 1
                parsed = parser.parse_args(arguments)
                if parsed.command == "train" and parsed.config in configurations:
                    load_config(parsed.config, parsed.overrides)
    assert configurations and count >= 2
    assert sum(block.not_run is not None for block in blocks) <= 3


@pytest.mark.parametrize("page", COMING_FROM, ids=name_of)
def test_our_side_of_a_comparison_is_valid(page, tmp_path):
    parser, yamls, commands, theirs = build_parser(), 0, 0, 0
    for block in blocks_of(page):
        if block.title != OURS:
            theirs += block.title is not None
        elif block.language == "yaml":
            (tmp_path / "run.yaml").write_text(block.text)
            load_config(str(tmp_path / "run.yaml"), [])
            yamls += 1
        elif block.language == "bash":
            for arguments in commands_of(block):
                parser.parse_args(arguments)
                commands += 1
    assert yamls and commands and theirs >= yamls


def test_ours_beside_a_launch_line_of_ms_swift_is_what_init_writes():
    blocks, count = blocks_of(DOCS / "from" / "ms_swift.md"), 0
    for theirs, ours in itertools.pairwise(blocks):
        if "swift sft" in theirs.text and ours.language == "yaml":
            assert load_text(ours.text, "page") == load_text(translated(theirs.text).text(), "init")
            count += 1
    assert count == 2


@pytest.mark.parametrize("page", sorted((DOCS / "zh" / "tutorials").glob("*.md")), ids=name_of)
def test_a_chinese_tutorial_has_the_blocks_of_the_english_one(page):
    assert [(block.language, block.title, block.text, block.not_run) for block in blocks_of(page)] == [
        (block.language, block.title, block.text, block.not_run) for block in blocks_of(DOCS / "tutorials" / page.name)]


def test_every_tutorial_is_in_both_languages():
    assert [page.name for page in sorted((DOCS / "tutorials").glob("*.md"))] == [
        page.name for page in sorted((DOCS / "zh" / "tutorials").glob("*.md"))]
    assert len(GUIDES) >= 8 and len(COMING_FROM) == 5


def pages_in(nav):
    for entry in nav:
        for value in entry.values():
            yield from pages_in(value) if isinstance(value, list) else [value]


def test_navigation_has_every_page_once():
    """As a strict build demands, without the packages for it."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((REPOSITORY / "mkdocs.yml").read_text("utf-8"), loader)
    assert sorted(pages_in(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert settings["theme"]["font"] is False


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_block_runs(page, tmp_path):
    """As a reader would type them, in a folder with examples/ in it."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash"], input=script_of(page), capture_output=True, encoding="utf-8", errors="replace",
                          cwd=tmp_path, env=environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def test_the_script_writes_runs_and_skips(tmp_path):
    page = DOCS / "tutorials" / "scored_pairs.md"
    script = script_of(page)
    assert script.index("cat > sts.yaml") < script.index("megatron-embed train sts.yaml")
    assert "hf download" not in script and "hf download" in page.read_text("utf-8")
    assert MINILM.is_dir() and re.search(r"python - <<'END_OF_BLOCK'\nimport json", script)
