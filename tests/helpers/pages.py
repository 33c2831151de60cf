"""Code blocks of the documentation's pages: what they write, what they run, and one shell script of it all.

A block's language and title say what it is:

- `bash`: commands to run.
- `python` without a title: a script to run.
- any language with a title that looks like the name of a file: that file.
- everything else (`text`, no language): shown only.

A comment `<!-- not run: REASON -->` on the line above a block leaves it out of the script.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.toys import REPOSITORY

DOCS = REPOSITORY / "docs"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->\n\Z")
END = "END_OF_BLOCK"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str | None
    text: str
    line: int
    """Number of the line with its fence."""
    not_run: str | None
    """Why it is left out; None: it is run."""

    @property
    def file(self) -> str | None:
        """Name of the file that it is."""
        return self.title if self.title is not None and "." in self.title else None


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block, in order."""
    source, blocks = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(source):
        indent = match["indent"]
        text = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        reason = NOT_RUN.search(source[:match.start()].removesuffix(indent))
        blocks.append(Block(language=match["language"], title=match["title"], text=text,
                            line=source.count("\n", 0, match.start()) + 1,
                            not_run=None if reason is None else reason["reason"]))
    return blocks


def script_of(page: Path) -> str:
    """One bash script that writes the page's files and runs its commands, in order; it ends at the first failure."""
    parts = ["set -euo pipefail\n"]
    for block in blocks_of(page):
        if block.not_run is not None:
            continue
        source = f"{page.relative_to(REPOSITORY)}:{block.line}"
        if block.file is not None:
            parts.append(f"echo '== {source} {block.file}' >&2\ncat > {shlex.quote(block.file)} <<'{END}'\n{block.text}"
                         f"{END}\n")
        elif block.language == "bash":
            parts.append(f"echo '== {source}' >&2\n{block.text}")
        elif block.language == "python":
            parts.append(f"echo '== {source}' >&2\npython - <<'{END}'\n{block.text}{END}\n")
    return "".join(parts)


def commands_of(block: Block) -> Iterator[list[str]]:
    """Arguments of every call of `megatron-embed` in a bash block, without redirections; 1 for every variable."""
    text = re.sub(r"\$\{?\w+\}?", "1", block.text.replace("\\\n", " "))
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        words = [word for word in words if word not in ("!", "if", "then")]
        for start, word in enumerate(words):
            if word == "megatron-embed" or (word == "megatron_embed" and words[start - 1] == "-m"):
                rest = words[start + 1:]
                ends = (index for index, other in enumerate(rest) if re.fullmatch(r"\d?>{1,2}|\||&&|\|\||;|then", other)
                        or other.endswith(";"))
                end = next(ends, None)
                if end is not None and rest[end] not in (";", "then") and rest[end].endswith(";"):
                    rest[end] = rest[end].removesuffix(";")
                    end += 1
                yield rest[:end]
                break
