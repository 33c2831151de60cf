"""Check that the built documentation site is complete in itself: no page fetches anything from another host.

    python tools/site_check.py site

Links that a reader may follow are allowed; scripts, styles, fonts, pictures and frames of other hosts are not.
"""

import html.parser
import re
import sys
from pathlib import Path

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
          "embed": "src", "object": "data", "use": "href"}
"""Element -> attribute whose address a browser loads by itself."""
LOADED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
ELSEWHERE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
STYLE_ADDRESS = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)")


class Page(html.parser.HTMLParser):
    """Collects what a page loads from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        address = values.get(LOADED.get(tag, ""), "")
        if tag == "link" and LOADED_LINKS & set(values.get("rel", "").lower().split()):
            address = values.get("href", "")
        if ELSEWHERE.match(address):
            self.addresses.append(f"<{tag}> {address}")


def loaded_from_elsewhere(site: Path) -> list[str]:
    """A line for every address of another host that a page or a style sheet loads."""
    lines = []
    for path in sorted(site.rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        lines += [f"{path.relative_to(site)}: {address}" for address in page.addresses]
    for path in sorted(site.rglob("*.css")):
        lines += [f"{path.relative_to(site)}: {address}" for address in STYLE_ADDRESS.findall(path.read_text("utf-8"))]
    return lines


def main() -> int:
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    lines = loaded_from_elsewhere(site)
    print("\n".join([*lines, f"{pages} pages, {len(lines)} addresses of other hosts that they load"]))
    return 0 if pages and not lines else 1


if __name__ == "__main__":
    sys.exit(main())
