"""What the tools' HTML pages share: one file each, with one style, that loads nothing.

Pages show texts that a model or a data set wrote. So every text is escaped, and the policy in the
head forbids the page to load anything: no script but the page's own, no image but an embedded one.
"""

import base64
import hashlib
import html

from redi.tables import Cells

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1c1c, #e4e4e2);
  --faint: light-dark(#646b78, #9aa2b1); --line: light-dark(#d8d8d8, #3a3a3a);
  --paper: light-dark(#fff, #161616); --raised: light-dark(#f6f6f5, #1f1f1e);
  --up: light-dark(#007a59, #4fd1a5); --down: light-dark(#b34700, #ff9c5c); }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .15rem .9rem .15rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; font-weight: 400; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; border-radius: 6px; }
.filters { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin: 1rem 0; align-items: center; }
select, input { font: inherit; max-width: 14rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--raised); padding: .7rem; font-size: .85rem; }
figure { margin: 1rem 0; } figcaption, .faint { color: var(--faint); }
"""
FILTER_SCRIPT = """\
"use strict";
const units = [...document.querySelectorAll("[data-tags]")];
const selects = [...document.querySelectorAll("select")];
const byId = id => document.getElementById(id);
function refresh() {
  const words = byId("words").value.toLowerCase().split(/\\s+/);
  for (const unit of units) {
    const tags = JSON.parse(unit.dataset.tags);
    const searched = byId("deep").checked ? unit : unit.querySelector(".about");
    const text = searched.textContent.toLowerCase();
    unit.hidden = !selects.every(s => s.value === "" || tags[s.name].includes(s.value)) ||
      !words.every(word => text.includes(word));
  }
  const count = units.filter(unit => !unit.hidden).length;
  byId("count").textContent = `${count} of ${units.length} ${byId("count").dataset.unit}`;
}
for (const input of document.querySelectorAll("select, input"))
  input.addEventListener("input", refresh);
refresh();
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page. body: HTML; style: CSS after STYLE; script: JavaScript that runs at the end."""
    script = f"\n{script}" if script else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:{scripts}"
    end = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n{end}</body></html>\n"
    )


def table(rows: Cells) -> str:
    """A table of texts, the header first. It scrolls where the window is narrower."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>\n")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def figure(name: str, png: bytes, caption: str) -> str:
    """An embedded picture with its caption."""
    data = base64.b64encode(png).decode()
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def filters(options: dict[str, list[str]], units: str, texts: str) -> str:
    """The controls of FILTER_SCRIPT, which hides the elements that do not fit them. An element has
    data-tags, JSON {name of an option: [values]}, and inside it the class `about`, whose words are
    searched first. units, texts: what such elements are, and what else is in them."""
    selects = "".join(_select(name, values) for name, values in options.items() if len(values) > 1)
    return (
        f'<div class="filters">{selects}'
        f'<input type="search" id="words" placeholder="words of the {units}">'
        f'<label><input type="checkbox" id="deep"> and of {texts}</label>'
        f'<span class="faint" id="count" data-unit="{units}"></span></div>'
    )


def _select(name: str, values: list[str]) -> str:
    texts = map(html.escape, values)  # without value=, an option's value has single spaces
    options = "".join(f'<option value="{text}">{text}</option>' for text in texts)
    options = f'<option value="">all</option>{options}'
    return f'<label>{name} <select name="{name}">{options}</select></label>'
