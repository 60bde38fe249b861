"""HTML from values: every str is escaped unless it is already `Html`.

Some of the text comes from hostile clients, so escaping is the default and control and
direction characters, which could disguise a text, are written out.
"""

import html
import unicodedata
from collections.abc import Iterable, Sequence

Cell = str


class Html(str):
    """Markup that may go onto a page as it is."""

    __slots__ = ()


def visible(text: object, limit: int | None = None) -> str:
    """One line of plain text: invisible characters written out, cut at `limit` characters."""
    shown = []
    for char in str(text)[: None if limit is None else limit + 1]:
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown.append(f"\\u{ord(char):04x}")
        else:
            shown.append(char)
    line = "".join(shown)
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def escape(value: Cell) -> Html:
    """`value` as markup; only `Html` passes unchanged."""
    return value if isinstance(value, Html) else Html(html.escape(visible(value)))


def element(tag: str, *content: Cell, css: str = "") -> Html:
    """One element around its escaped content."""
    attribute = f' class="{html.escape(css)}"' if css else ""
    return Html(f"<{tag}{attribute}>{''.join(map(escape, content))}</{tag}>")


def join(parts: Iterable[Cell], separator: str = "\n") -> Html:
    """Escaped parts one after another."""
    return Html(separator.join(map(escape, parts)))


def table(
    header: Sequence[str], rows: Iterable[Sequence[Cell]], numeric: Iterable[int] = ()
) -> Html:
    """A table that scrolls sideways where the screen is narrow.

    Args:
        header: names of the columns; empty for a table without a heading.
        numeric: columns that are aligned right.
    """
    right = set(numeric)

    def line(tag: str, cells: Sequence[Cell]) -> Html:
        return element(
            "tr", *(element(tag, c, css="n" if i in right else "") for i, c in enumerate(cells))
        )

    head = element("thead", line("th", header)) if header else ""
    body = element("tbody", Html("\n".join(line("td", row) for row in rows)))
    return Html(f'<div class="scroll"><table>{head}\n{body}</table></div>')


def section(title: str, *content: Cell) -> Html:
    """A titled part of a page."""
    return Html(f"<section>{element('h2', title)}\n{join(content)}</section>")


def details(title: str, *content: Cell) -> Html:
    """A part that opens on a click."""
    return Html(f"<details>{element('summary', title)}\n{join(content)}</details>")


def preformatted(text: str) -> Html:
    """Several lines as they are."""
    lines = (html.escape(visible(line)) for line in text.splitlines())
    return Html(f"<pre>{chr(10).join(lines)}</pre>")


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 1000 else f"{count:,.0f} TB"
