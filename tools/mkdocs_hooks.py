"""Hook of mkdocs.yml: lines of a Chinese paragraph are joined without a blank, which a browser would otherwise show."""

import re
from typing import Any

CHINESE = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef\u201c\u201d"
LINE_BREAK = re.compile(rf"(?<=[{CHINESE}])\n *(?=[{CHINESE}\[*]|`[^`])")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINE_BREAK.sub("", markdown)
