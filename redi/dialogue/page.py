"""The dialogues of an evaluation as one HTML page, to filter and to read."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from redi import pages
from redi.data.files import Row
from redi.tables import Cells

STYLE = """
select { font: inherit; max-width: 16rem; } .filters { margin: 1rem 0; }
.dialogue { border-top: 1px solid var(--line); padding: .3rem 0; } summary { cursor: pointer; }
p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.student { margin-left: 3rem; } .hint { margin-left: 6rem; }
.good { color: var(--up); } .bad { color: var(--down); }
"""
SCRIPT = """\
"use strict";
const dialogues = [...document.querySelectorAll(".dialogue")];
const selects = [...document.querySelectorAll("select")];
function refresh() {
  for (const one of dialogues) {
    const tags = JSON.parse(one.dataset.tags);
    one.hidden = !selects.every(s => s.value === "" || tags[s.name].includes(s.value));
  }
  const count = dialogues.filter(one => !one.hidden).length;
  document.getElementById("count").textContent = `${count} of ${dialogues.length}`;
}
for (const select of selects) select.addEventListener("input", refresh);
refresh();
"""


def dialogues_page(title: str, about: str, table: Cells, rows: list[Row]) -> str:
    """The page, which begins with the table. Every text is escaped."""
    tags = [_tags(row) for row in rows]
    filters = []
    for name in ("side", "topic", "label"):
        values = sorted({value for one in tags for value in one[name]})
        options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
        select = f'<select name="{name}"><option value="">all</option>{options}</select>'
        filters.append(f"<label>{name} {select}</label>")
    filters.append('<span class="faint" id="count"></span>')
    head = f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n{pages.table(table)}"
    body = [head, f'<div class="filters">{" ".join(filters)}</div>', *map(_dialogue, rows, tags)]
    return pages.page(title, "\n".join(body), STYLE, SCRIPT)


def _tags(row: Row) -> dict[str, list[str]]:
    found = [*row["messages"], *row.get("replies", ())]
    labels = {one[key] for one in found for key in ("label", "hint_label") if key in one}
    return {"side": [row["side"]], "topic": [row["scenario"]["topic"]], "label": sorted(labels)}


def _dialogue(row: Row, tags: dict[str, list[str]]) -> str:
    scenario, labels = row["scenario"], tags["label"]
    facts = [row["side"], scenario["id"], f"sample {row['sample']}"] if "end" in row else []
    facts += [f"ended by {row['end']}"] if facts else [row["side"], scenario["id"]]
    lines = []
    for message in row["messages"]:
        if "hint" in message:
            lines.append(_line("hint", message["hint"], message, "hint_"))
        who = "tutor" if message["role"] == "assistant" else "student"
        lines.append(_line(who, message["content"], message))
    lines += [_line("tutor", reply["content"], reply) for reply in row.get("replies", ())]
    card = "; ".join(f"{name}: {scenario[name]}" for name in ("facts", "wants") if name in scenario)
    return (
        f'<details class="dialogue" data-tags="{escape(json.dumps(tags))}"><summary>'
        f'{escape(scenario["topic"])} <span class="faint">{escape(" · ".join(facts))}</span> '
        f"{' '.join(map(_label, labels))}</summary>"
        f'<p class="faint">{escape(card)}</p>{"".join(lines)}</details>'
    )


def _line(who: str, text: str, message: Mapping[str, Any], kind: str = "") -> str:
    judged = ""
    if who != "student" and f"{kind}label" in message:
        score = message.get(f"{kind}good")
        shown = "" if score is None else f' <span class="faint">{score:.2f}</span>'
        judged = f" {_label(message[f'{kind}label'])}{shown}"
    return f'<p class="{who}"><b>{who}</b> {escape(text)}{judged}</p>\n'


def _label(label: str) -> str:
    return f'<span class="{"good" if label == "good" else "bad"}">{escape(label)}</span>'
