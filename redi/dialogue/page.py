"""The dialogues of an evaluation as one HTML page, to filter and to read."""

import json
from html import escape

from redi import pages
from redi.data.files import Row
from redi.tables import Cells

STYLE = """
.dialogue { border-top: 1px solid var(--line); padding: .3rem 0; }
p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.student { margin-left: 3rem; } .hint { margin-left: 6rem; }
.good { color: var(--up); } .bad { color: var(--down); }
"""


def labels(row: Row, key: str = "label") -> list[str]:
    """Of the tutor's replies in an evaluation's row, in order; by hint_label, of its hints."""
    return [one[key] for one in row["messages"] + row.get("replies", []) if key in one]


def dialogues_page(title: str, about: str, table: Cells, rows: list[Row]) -> str:
    """The page, which begins with the table. Every text is escaped."""
    tags = [_tags(row) for row in rows]
    names = ("side", "topic", "label")
    options = {name: sorted({value for one in tags for value in one[name]}) for name in names}
    body = [
        f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>",
        pages.table(table),
        pages.filters(options, "dialogues", "their turns"),
        *map(_dialogue, rows, tags),
    ]
    return pages.page(title, "\n".join(body), STYLE, pages.FILTER_SCRIPT)


def _tags(row: Row) -> dict[str, list[str]]:
    found = sorted({*labels(row), *labels(row, "hint_label")})
    return {"side": [row["side"]], "topic": [row["scenario"]["topic"]], "label": found}


def _dialogue(row: Row, tags: dict[str, list[str]]) -> str:
    scenario, facts = row["scenario"], [row["side"], row["scenario"]["id"]]
    if "end" in row:
        facts += [f"sample {row['sample']}", f"ended by {row['end']}"]
    lines = []
    for said in row["messages"] + row.get("replies", []):
        if "hint" in said:
            lines.append(_line("hint", said["hint"], said, "hint_"))
        who = "student" if said.get("role") == "user" else "tutor"
        lines.append(_line(who, said["content"], said))
    given = (name for name in ("tasks", "facts", "wants") if name in scenario)
    card = "".join(f"<br>{name}: {escape('; '.join(scenario[name]))}" for name in given)
    return (
        f'<details class="dialogue" data-tags="{escape(json.dumps(tags))}"><summary class="about">'
        f'{escape(scenario["topic"])} <span class="faint">{escape(" · ".join(facts))}</span> '
        f"{' '.join(map(_label, tags['label']))}</summary>"
        f'<p class="faint">{card.removeprefix("<br>")}</p>{"".join(lines)}</details>'
    )


def _line(who: str, text: str, said: Row, kind: str = "") -> str:
    judged = ""
    if f"{kind}label" in said:
        score = f"{said[f'{kind}good']:.2f}"
        judged = f' {_label(said[f"{kind}label"])} <span class="faint">{score}</span>'
    return f'<p class="{who}"><b>{who}</b> {escape(text)}{judged}</p>\n'


def _label(label: str) -> str:
    return f'<span class="{"good" if label == "good" else "bad"}">{escape(label)}</span>'
