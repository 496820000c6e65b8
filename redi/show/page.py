"""What redi.show found as one HTML page, and a picture of the lengths.

The page shows rows token by token. It is one file that loads nothing and runs nothing: traces may
contain `</script>`, so every text is escaped, and a policy in its head forbids everything else.
"""

import base64
import html
import io

import numpy as np

from redi.data.tokenizer import ChatTokenizer
from redi.show.rows import Stretch, Table, tokens_of, visible

ENDS = (400, 200)  # tokens of a stretch that are shown; five rows of pairs stay under 500 kB
# Distinguishable for those who do not see red and green as two colors (Okabe and Ito).
INK = {"prompt": "#8a8a8a", "response": "#009e73", "chosen": "#009e73", "rejected": "#d55e00"}

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1c1c, #e4e4e2);
  --faint: light-dark(#6a6a6a, #9c9c9a); --line: light-dark(#d8d8d8, #3a3a3a);
  --paper: light-dark(#fff, #161616); --sheet: light-dark(#f8f8f6, #1f1f1e);
  --up: light-dark(#dcf1e8, #12352b); --up-2: light-dark(#bfe5d5, #1d5142);
  --up-ink: light-dark(#007a59, #4fd1a5); --down: light-dark(#fbe6d8, #42260f);
  --down-2: light-dark(#f5cfb6, #5e371c); --down-ink: light-dark(#b34700, #ff9c5c); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; font-weight: 400; }
thead th { font-weight: 600; } th:first-child, .values td { text-align: left; }
.values td { white-space: normal; overflow-wrap: anywhere; } .values th { color: var(--faint); }
.wide { overflow-x: auto; } img { max-width: 100%; border-radius: 6px; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { padding: .4rem .8rem; cursor: pointer; } p { color: var(--faint); margin: .4rem 0; }
.stretch { font: 13px/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem .8rem;
  border-left: 5px solid var(--line); border-top: 1px solid var(--line); background: var(--sheet); }
.stretch h3 { font: 600 12px/1.4 system-ui, sans-serif; margin: 0 0 .3rem; color: var(--faint); }
.stretch i { font-style: normal; border-radius: 2px; } .stretch i:hover { outline: 1px solid; }
.stretch b { font-weight: 600; color: var(--paper); background: var(--ink); padding: 0 3px;
  border-radius: 3px; }
.end, .gap, .given i { color: var(--faint); } .gap { display: block; padding: .5rem 0; }
.response, .chosen { border-left-color: var(--up-ink); }
.response i, .chosen i { background: var(--up); }
.response i:nth-of-type(even), .chosen i:nth-of-type(even) { background: var(--up-2); }
.rejected { border-left-color: var(--down-ink); } .rejected i { background: var(--down); }
.rejected i:nth-of-type(even) { background: var(--down-2); }
"""
CAPTIONS = {
    "given": "given, not learned from",
    "response": "response: learned from",
    "chosen": "chosen: made more likely",
    "rejected": "rejected: made less likely",
}


def page(
    title: str,
    tables: list[Table],
    picture: bytes,
    rows: list[tuple[str, list[Stretch]]],
    chat: ChatTokenizer,
) -> str:
    """One HTML file. picture: a PNG. rows: (caption, row); the first one is open."""
    drawn = "".join(
        f"<details{' open' if number == 0 else ''}><summary>{_escaped(caption)}</summary>"
        f"{''.join(_stretch_as_html(stretch, chat) for stretch in row)}</details>\n"
        for number, (caption, row) in enumerate(rows)
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    data = base64.b64encode(picture).decode()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{_escaped(title)}</h1>\n{''.join(map(_table_as_html, tables))}"
        f'<h2>Lengths</h2>\n<img alt="histograms" src="data:image/png;base64,{data}">\n'
        "<h2>Rows as the model sees them</h2>\n"
        "<p>Each shade is a token; the pointer shows its position and id. Boxes are control "
        f"tokens, and ↵ is a line break of the text.</p>\n{drawn}</body></html>\n"
    )


def _table_as_html(table: Table) -> str:
    head = "".join(f"<th>{_escaped(cell)}</th>" for cell in ("", *table.header))
    body = "".join(
        f"<tr><th>{_escaped(name)}</th>{''.join(f'<td>{_escaped(v)}</td>' for v in values)}</tr>"
        for name, *values in table.rows
    )
    start = f"<table><thead><tr>{head}</tr></thead>" if table.header else '<table class="values">'
    return (
        f'<h2>{_escaped(table.title)}</h2>\n<div class="wide">{start}<tbody>{body}</tbody></table>'
        "</div>\n"
    )


def _stretch_as_html(stretch: Stretch, chat: ChatTokenizer) -> str:
    gap = f'<span class="gap">{stretch.left_out(ENDS)}</span>'
    ends = (_tokens_as_html(position, ids, chat) for position, ids in stretch.ends(ENDS))
    caption = f"{CAPTIONS[stretch.kind]}, {len(stretch.ids):,} tokens"
    return f'<div class="stretch {stretch.kind}"><h3>{caption}</h3>{gap.join(ends)}</div>'


def _tokens_as_html(position: int, ids: list[int], chat: ChatTokenizer) -> str:
    spans = []
    for text, its_ids, control in tokens_of(ids, chat):
        tag = "b" if control else "i"
        hint = f"token {position}, id {' '.join(map(str, its_ids))}"
        shown = _escaped(text).replace("\n", '<span class="end">↵</span>\n')
        spans.append(f'<{tag} title="{hint}">{shown}</{tag}>')
        position += len(its_ids)
    return "".join(spans)


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def draw_histograms(lengths: dict[str, np.ndarray], limits: dict[str, int]) -> bytes:
    """Share of the rows by length, as a PNG. Only the parts in INK are drawn: turns between answers
    may have no tokens, which a logarithmic axis cannot show."""
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import LogLocator, NullLocator

    lengths = {name: of for name, of in lengths.items() if name in INK}
    shortest = min(int(of.min()) for of in lengths.values())
    longest = max(int(of.max()) for of in lengths.values())
    bins = np.geomspace(0.9 * shortest, 1.1 * longest, 50)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, of in lengths.items():
        look = {"histtype": "stepfilled", "fc": (INK[name], 0.25), "ec": INK[name]}
        style = "--" if name == "rejected" else "-"
        axis.hist(of, bins, weights=np.full(len(of), 1 / len(of)), label=name, ls=style, **look)
    for line, (name, limit) in enumerate(limits.items()):
        axis.axvline(limit, color="black", lw=0.9, ls=":")
        axis.text(
            limit, 1 + 0.08 * line, f"{limit:,}: limit of {name} ", ha="right", va="bottom",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
    axis.set(xscale="log", xlabel="tokens", ylabel="share of the rows")
    axis.grid(alpha=0.25)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(frameon=False)
    figure.savefig(file := io.BytesIO(), dpi=110, format="png")
    return file.getvalue()
