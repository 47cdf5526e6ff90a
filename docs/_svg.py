"""A pen for the figures: SVG that can be read on a phone, in light and in dark.

Figures are WIDTH units wide and shown at about that many pixels on a phone, so the smallest letters
are 13 units high. Colours are names; STYLE gives each one a value for light and for dark.
"""

from html import escape

WIDTH = 380
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
LIGHT = {
    "ink": "#1f2328",
    "dim": "#59636e",
    "line": "#c4ccd4",
    "paper": "#ffffff",
    "box": "#f3f5f8",
    "ours": "#1a6fd4",
    "soft": "#cfe3fb",
    "weak": "#b35900",
    "warm": "#fde3bf",
    "good": "#1a7f37",
}
DARK = {
    "ink": "#e6edf3",
    "dim": "#a3adb8",
    "line": "#4a535e",
    "paper": "#14181d",
    "box": "#20262e",
    "ours": "#5aa7f7",
    "soft": "#1d3b5e",
    "weak": "#f0a04b",
    "warm": "#57401f",
    "good": "#56d364",
}


def variables(colours: dict[str, str]) -> str:
    """CSS that gives the colours their values."""
    return ";".join(f"--{name}:{value}" for name, value in colours.items())


STYLE = (
    f"svg.bk{{{variables(LIGHT)}}}@media (prefers-color-scheme:dark){{svg.bk{{{variables(DARK)}}}}}"
)


class Pen:
    """Collects shapes; coordinates are units from the top left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.height = 0.0
        self.shapes: list[str] = []

    def _reach(self, y: float) -> None:
        self.height = max(self.height, y)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "box",
        line: str | None = None,
        radius: float = 6,
    ) -> None:
        stroke = f' stroke="var(--{line})"' if line else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="var(--{fill})"{stroke}/>'
        )
        self._reach(y + height)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 15,
        colour: str = "ink",
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        place = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="var(--{colour})"'
            f"{weight}{place}>{escape(words)}</text>"
        )
        self._reach(y + 5)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = "line", width: float = 1.5
    ) -> None:
        self.shapes.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="var(--{colour})" '
            f'stroke-width="{width:g}"/>'
        )
        self._reach(max(y1, y2))

    def polygon(
        self, points: list[tuple[float, float]], fill: str, line: str | None = None
    ) -> None:
        stroke = f' stroke="var(--{line})" stroke-width="2"' if line else ""
        places = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polygon points="{places}" fill="var(--{fill})"{stroke}/>')
        self._reach(max(y for _, y in points))

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = "dim", width: float = 1.5
    ) -> None:
        """A line with a head; straight down or to the right."""
        self.line(x1, y1, x2, y2, colour, width)
        if x1 == x2:
            self.polygon([(x2 - 4, y2 - 6), (x2 + 4, y2 - 6), (x2, y2)], colour)
        else:
            self.polygon([(x2 - 6, y2 - 4), (x2 - 6, y2 + 4), (x2, y2)], colour)

    def svg(self) -> str:
        height = round(self.height + 10)
        return (
            f'<svg class="bk" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH * 1.3:g}" height="{height * 1.3:g}" role="img" '
            f'aria-label="{escape(self.title)}" font-family="{escape(FONT)}">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n"
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="var(--paper)"/>\n'
            + "\n".join(self.shapes)
            + "\n</svg>\n"
        )


def flow(pen: Pen, y: float, steps: list[tuple[str, list[str]]], number: int = 1) -> float:
    """Numbered boxes, one below the other, an arrow between; returns where the last one ends."""
    for i, (head, lines) in enumerate(steps):
        height = 32 + 19 * len(lines)
        pen.rect(12, y, WIDTH - 24, height)
        pen.rect(12, y, 4, height, "ours", radius=2)
        pen.text(26, y + 22, f"{number + i}", 15, "ours", bold=True)
        pen.text(46, y + 22, head, 15, bold=True)
        for k, line in enumerate(lines):
            pen.text(46, y + 42 + 19 * k, line, 13.5, "dim")
        y += height
        if i + 1 < len(steps):
            pen.arrow(WIDTH / 2, y + 1, WIDTH / 2, y + 13)
            y += 15
    return y
