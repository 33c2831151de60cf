"""Write docs/model_directories.md from the code: every key of the settings files in a foreign model directory.

    python tools/directories_page.py
"""

import json
import textwrap
from pathlib import Path

from megatron_embed.models.foreign_files import FileTable, Key
from megatron_embed.models.foreign_tables import TABLES, flat_keys

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "model_directories.md"
HEAD = """# Settings files of model directories

`train`, `encode`, `evaluate`, `mine`, `convert` and `megatron_embed.load` accept directories that other programs wrote.
Every key in their settings files belongs to one of three groups:

* **honoured**: it has the same effect as in the library that wrote it. If values are listed, others are refused.
* **harmless**: it does not change the vectors or scores.
* **refused**: its effect is not implemented here. The program ends with exit code 2 and a message that names file, key,
  value and remedy. With `null` or a listed value it has no effect and is accepted.

A key that is not listed is refused, unless its value is empty (`null`, `[]`, `{}`). This page is generated from
`megatron_embed/models/foreign_tables.py` by `tools/directories_page.py`.

Without `modules.json`, an encoder (BERT, XLM-RoBERTa) uses `mean` pooling, as in Sentence Transformers; a decoder uses
`lasttoken`, or `mean` if its `config.json` contains `is_causal: false`. Vectors are L2-normalized unless
`--no-normalize` is given. A chat template is applied only if `sentence_bert_config.json` requests it with the modality
`message`; Sentence Transformers 6 also applies one if there is no `modules.json`.
"""


def values_of(key: Key) -> str:
    """Text of the column "values"."""
    if key.nested is not None:
        return "see its keys"
    if key.values is None or key.verdict == "harmless":
        return ""
    shown = ", ".join(f"`{json.dumps(value)}`" for value in key.values)
    if key.verdict == "refused":
        return f"accepted: {shown}" if shown else ""
    return shown


def section(table: FileTable) -> list[str]:
    """Section with the keys of one file."""
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
