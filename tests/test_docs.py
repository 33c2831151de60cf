"""Pages of docs/ that follow from the code say what the code says."""

import ast
import importlib.util
import re

from tests.helpers.toys import REPOSITORY

LEAST = 12
"""Characters of a piece of a message that are looked for."""


def messages():
    """Every text of the package, its places left empty, one to a line."""
    texts = []
    for path in (REPOSITORY / "megatron_embed").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def quoted_pieces(text):
    """Parts of the messages in the first column, without numbers and what is left out."""
    for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE):
        for message in re.findall(r"`([^`]*)`", row):
            if " " in message:
                yield from re.split(r"\.\.\.|\d+|'[^']*'|[A-Z]{4,}|nan|\w+Error| = | \(|\)", message)


def test_troubleshooting_quotes_messages_that_exist():
    known = messages()
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    pieces = [piece for piece in quoted_pieces(text) if len(piece.strip()) >= LEAST]
    assert len(pieces) > 20
    missing = [piece for piece in pieces if piece.strip() not in known]
    assert not missing


def test_architecture_names_files_that_exist():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {name for name in re.findall(r"`([\w/]+/[\w/]*(?:\.py|\.md)?)`", text)
             if name.endswith((".py", ".md", "/"))}
    assert len(files) > 40
    assert [name for name in files if not any((root / name).exists() for root in (REPOSITORY / "megatron_embed",
                                                                                 REPOSITORY))] == []


def test_files_that_pages_name_exist():
    pages = [*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md"), REPOSITORY / "tools" / "README.md"]
    named = {(page.name, name) for page in pages for name in re.findall(
        r"`(?:python )?((?:tests|tools|launch|configs|examples|megatron_embed|docs)/[\w./]+)", page.read_text("utf-8"))}
    named.discard(("conversion.md", "tools/checkpoint/convert.py"))  # Megatron-LM's
    assert len(named) > 60
    assert [entry for entry in sorted(named) if not (REPOSITORY / entry[1]).exists()] == []


HEADING = r"^#+ (.*?)(?: \{ #([\w-]+) \})?$"
"""A heading and the name that links to it have, if it is not made from its words."""


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in [*(REPOSITORY / "docs").rglob("*.md"), *REPOSITORY.glob("*.md"), REPOSITORY / "tools" / "README.md"]:
        for name, section in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text("utf-8")):
            file = page.parent / name if name else page
            headings = re.findall(HEADING, file.read_text("utf-8"), re.MULTILINE) if section else []
            known = {given or re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading, given in headings}
            if not file.exists() or (section and section not in known):
                broken.append((page.name, name, section))
    assert broken == []


def test_readme_shows_every_package():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^megatron_embed/\n((?:  .*\n)+)", text, re.MULTILINE)[1]
    shown = set(re.findall(r"^  (\w+(?:/|\.py)) ", tree, re.MULTILINE))
    assert shown == {path.name + "/" * path.is_dir() for path in (REPOSITORY / "megatron_embed").iterdir()
                     if not path.name.startswith(("_", ".")) and path.name != "py.typed"}


def tool_named(name: str):
    """A module of tools/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_model_directories_says_what_the_tables_say():
    page = (REPOSITORY / "docs" / "model_directories.md").read_text(encoding="utf-8")
    assert page == tool_named("directories_page").page(), (
        "docs/model_directories.md is not up to date: python tools/directories_page.py")
    rows = re.findall(r"^\| `([^`]+)` \| (honoured|harmless|refused) \|.*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 100
    assert [key for key, _, about in rows if not about.strip()] == []


def test_page_of_other_trainers_says_what_the_table_says():
    page = (REPOSITORY / "docs" / "foreign_words.md").read_text(encoding="utf-8")
    assert page == tool_named("foreign_words_page").page(), (
        "docs/foreign_words.md is not up to date: python tools/foreign_words_page.py")


def test_reference_pages_say_what_the_code_says():
    tool, pages = tool_named("reference_pages"), REPOSITORY / "docs" / "reference"
    assert (pages / "commands.md").read_text("utf-8") == tool.commands_page(), "python tools/reference_pages.py"
    assert (pages / "python.md").read_text("utf-8") == tool.python_page(), "python tools/reference_pages.py"


def test_every_setting_is_on_the_page_of_settings_and_explained():
    module = tool_named("settings_page")
    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == module.page(), "docs/settings.md is not up to date: python tools/settings_page.py"
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 80
    assert [key for key, meaning in rows if not meaning.strip()] == []
