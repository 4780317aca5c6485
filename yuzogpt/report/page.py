"""A report as one HTML file that needs nothing else: no script, no font, no other host.

Every text is escaped here, and nowhere else.
"""

from collections.abc import Iterable, Sequence
from html import escape

from yuzogpt.report.plots import Plot
from yuzogpt.report.summary import Summary
from yuzogpt.report.tables import PROSE, Facts, Table, percent, plain

MAX_ROWS = 500  # of a table: the newest

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2024; --dim: #60646c;
  --line: #e0e1e6; --good: #30a46c; --lost: #e5484d; }
@media (prefers-color-scheme: dark) { :root { --page: #111316; --card: #1a1d21; --text: #edeef0;
  --dim: #9ba1a9; --line: #32363c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 76rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: 1.5rem; line-height: 1.25; }
h2 { margin: 2rem 0 .6rem; font-size: 1.05rem; }
dl, .plots { display: grid; gap: .75rem; margin: 0; }
dl { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
@media (min-width: 45rem) { dl { grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); } }
dl > div, figure, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
dl > div { padding: .55rem .8rem; }
dt, .dim { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-weight: 600; }
.bar { display: flex; height: .9rem; margin-top: .75rem; border-radius: 4px; overflow: hidden;
  background: var(--lost); }
.bar > div { background: var(--good); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); }
figure { margin: 0; padding: .8rem; }
figcaption { margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.table { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top;
  white-space: nowrap; }
th { color: var(--dim); font-size: .85rem; font-weight: 500; }
td { border-top: 1px solid var(--line); }
.number { text-align: right; }
.prose { min-width: 18rem; white-space: normal; }
"""

DEFINITIONS = (
    "Effective training time is the productive share of wall time, which runs from the first start "
    "to the last record. A restart loses the time from the last train record that was kept to the "
    "first new one, less what those steps usually take. Evaluations and checkpoints are productive."
)


# Whatever a record may hold, a browser fetches nothing and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{name}: report</title>
<style>{style}</style>
</head>
<body>
<h1>{name}</h1>
<dl>
{facts}
</dl>
{time_bar}
<h2>Curves</h2>
<div class="plots">
{plots}
</div>
{tables}
<p class="dim">{definitions}</p>
</body>
</html>
"""
FACT = "<div><dt>{}</dt><dd>{}</dd></div>"


def page(summary: Summary, facts: Facts, tables: Sequence[Table], plots: Iterable[Plot]) -> str:
    """Return the whole page."""
    return PAGE.format(
        policy=POLICY,
        style=STYLE,
        name=escape(plain(summary.name)),
        facts="\n".join(FACT.format(escape(key), escape(value)) for key, value in facts),
        time_bar=time_bar(summary),
        plots="\n".join(map(figure, plots)),
        tables="\n".join(map(section, tables)),
        definitions=escape(DEFINITIONS),
    )


def is_page(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of such a page."""
    return head.startswith(b"<!DOCTYPE html>") and b": report</title>\n<style>" in head


def time_bar(summary: Summary) -> str:
    """Return the productive share of wall time as a bar."""
    if not summary.wall:
        return ""
    label = f"{percent(summary.effective)} of wall time was productive"
    part = f'<div style="width:{100 * summary.effective:.2f}%"></div>'
    return f'<div class="bar" role="img" aria-label="{label}">{part}</div>'


def figure(plot: Plot) -> str:
    """Return a plot with its title and caption."""
    title = f"<strong>{escape(plot.title)}</strong>"
    caption = f'<span class="dim">{escape(plot.caption)}</span>'
    return f"<figure>\n<figcaption>{title} {caption}</figcaption>\n{plot.svg}\n</figure>"


def section(table: Table) -> str:
    """Return a table with its newest rows."""
    hidden = len(table.rows) - MAX_ROWS
    more = f'<p class="dim">{hidden:,} before these are left out.</p>' if hidden > 0 else ""
    head = cells("th", table, table.columns)
    rows = "\n".join(cells("td", table, row) for row in table.rows[-MAX_ROWS:])
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="table"><table>\n<thead>{head}</thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>{more}"
    )


def cells(tag: str, table: Table, row: Sequence[str]) -> str:
    """Return a row of a table; `tag`: th or td."""
    drawn = ""
    for column, text in zip(table.columns, row, strict=True):
        classes = {"number": column in table.numeric, "prose": column in PROSE}
        marks = "".join(f' class="{name}"' for name, applies in classes.items() if applies)
        drawn += f"<{tag}{marks}>{escape(text)}</{tag}>"
    return f"<tr>{drawn}</tr>"
