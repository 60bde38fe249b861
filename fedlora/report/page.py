"""The frame of every page: one file, no scripts, nothing fetched from elsewhere."""

from fedlora.report.markup import Cell, Html, element, join

# the policy makes a browser refuse what an escaping mistake could let in
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_CSS = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #5f6878; --grid: #dfe3ea;
  --paper: #ffffff; --card: #f6f7f9; --good: #1f7a53; --bad: #b3404f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --muted: #9aa4b5;
  --grid: #343b48; --paper: #14171d; --card: #1c2028; --good: #5cc79a; --bad: #ec8593; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.muted, small { color: var(--muted); }
.note { border-left: 3px solid #e0862c; padding: .1rem .75rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--grid); overflow-wrap: normal; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; }
td.n, td:first-child { white-space: nowrap; }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: .9rem; }
.best { font-weight: 700; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.wide { min-width: 18rem; display: inline-block; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem 1.5rem; margin: .75rem 0; align-items: start; }
.figures > div { min-width: 0; }
figure { margin: 0; }
figure.broad { overflow-x: auto; }
figure.broad svg { min-width: 38rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: .85rem; margin-top: .35rem; }
.bar { display: inline-block; height: .7rem; border-radius: 2px; background: #4c78c8;
  vertical-align: baseline; }
.track { display: inline-block; width: 9rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 6px;
  font-size: .8rem; line-height: 1.45; overflow-wrap: normal; }
"""


def page(title: str, *content: Cell) -> str:
    """A whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{element('title', title)}\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"{element('h1', title)}\n{join(content)}\n</body>\n</html>\n"
    )


def figure(svg: Html, caption: Cell = "", *, broad: bool = False) -> Html:
    """A picture with its caption.

    Args:
        broad: scrolls on a narrow screen instead of shrinking until it cannot be read.
    """
    below = element("figcaption", caption) if caption else ""
    css = ' class="broad"' if broad else ""
    return Html(f"<figure{css}>{svg}{below}</figure>")


def figures(parts: list[Html]) -> Html:
    """Pictures, or a picture and what belongs to it, side by side where there is room."""
    cells = (f"<div>{part}</div>" for part in parts)
    return Html(f'<div class="figures">{"".join(cells)}</div>')
