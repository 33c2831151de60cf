"""Writes docs/model_directories.md: every key of a foreign model directory's settings files, read from the code.

    python tools/directories_page.py
"""

import json
import textwrap
from pathlib import Path

from megatron_embed.models.key_table import FileTable, Key
from megatron_embed.models.known_keys import TABLES, flat_keys

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "model_directories.md"
HEAD = """# Settings files of model directories

`train`, `encode`, `evaluate`, `mine`, `convert` and `megatron_embed.load` take directories that other programs wrote.
Every key in their settings files is one of these:

* **honoured**: it has the effect that it has in the library that wrote it. Where values are listed, others are refused.
* **harmless**: it changes nothing in the vectors or scores.
* **refused**: its effect is not computed here. The program ends with exit code 2 and a message that names file, key,
  value and remedy. At `null`, and the values listed, it has no effect and passes.

A key that is not listed is refused by its name, unless its value is empty (`null`, `[]`, `{}`). Generated from
`megatron_embed/models/known_keys.py` by `tools/directories_page.py`.

A directory without `modules.json`: an encoder (BERT, XLM-RoBERTa) pools `mean`, as Sentence Transformers does; a
decoder `lasttoken`, or `mean` if its `config.json` says `is_causal: false`. Vectors have unit length unless
`--no-normalize` is given. A chat template is applied only where `sentence_bert_config.json` asks for it, with the
modality `message`; Sentence Transformers 6 also applies one where there is no `modules.json`.
"""


def values_of(key: Key) -> str:
    """The column of values."""
    if key.nested is not None:
        return "see its keys"
    if key.values is None or key.verdict == "harmless":
        return ""
    shown = ", ".join(f"`{json.dumps(value)}`" for value in key.values)
    if key.verdict == "refused":
        return f"passes at {shown}" if shown else ""
    return shown


def section(table: FileTable) -> list[str]:
    """One file's keys."""
    lines = [f"## {table.file}", "", *textwrap.wrap(table.about, 118), "", "| key | | values | |", "|---|---|---|---|"]
    for name, key in flat_keys(dict(table.keys)).items():
        about = key.about.replace("|", "\\|")
        lines.append(f"| `{name}` | {key.verdict} | {values_of(key)} | {about} |")
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for table in TABLES for line in section(table))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
