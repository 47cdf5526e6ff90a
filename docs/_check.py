"""Checks a built site: no page needs the network, and every picture it shows is there.

python docs/_check.py build/docs
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# tag -> the attribute that a browser fetches when it shows a page; links that a reader may follow
# are not fetched.
FETCHED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in FETCHED and (address := values.get(FETCHED[tag])):
            self.fetched.append(address)


def faults(site: Path) -> list[str]:
    """A line for each thing on a page that comes from elsewhere or is not there."""
    found = []
    for path in sorted(site.rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        for address in page.fetched:
            parts = urlsplit(address)
            if parts.scheme == "data" or not address.lstrip("#"):
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{path.name}: {address} is not on this site")
            elif not (path.parent / unquote(parts.path)).is_file():
                found.append(f"{path.name}: {address} does not exist")
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        if "url(http" in text or "url(//" in text or "@import" in text:
            found.append(f"{path.name}: fetches something from elsewhere")
    return found


def main() -> int:
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    found = faults(site)
    print("\n".join(found) or f"docs: {pages} pages in {site}/index.html; nothing is fetched.")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
