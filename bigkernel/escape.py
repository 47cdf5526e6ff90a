"""Names and texts from elsewhere, made safe to show on a terminal and in Markdown."""

import re

# Control characters, line ends that are none to Python, marks that turn the direction of writing
# (a name can pose as another one with them), and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]")


def printable(text: object) -> str:
    r"""``str(text)`` on one line, with escapes such as ``\n`` and ``\x1b`` for what is no print."""
    return _UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), str(text))


def markdown(text: object) -> str:
    """``printable(text)`` that Markdown shows as it is, also in a table."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def code_span(text: object) -> str:
    """``printable(text)`` between backticks, more of them than it holds in a row."""
    shown = printable(text)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
