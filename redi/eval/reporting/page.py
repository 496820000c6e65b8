r"""Evaluations as one HTML page, to filter problems and read completions side by side.

The page is one file: no server, no network, nothing to install. Its content is one JSON text in a
script element that is never run, and page.js shows it. Completions are a model's, so they never
become markup: the JSON escapes every <, > and &, and the script inserts text as text.

A browser can open a page of some 50 million characters, of which each completion has an equal
share. A longer one is shortened in the middle, and the page says so. Left out: typeset formulas.
"""

import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redi import pages
from redi.config import UserError
from redi.eval.completions import Completion, completions_file, read_lines
from redi.eval.reporting.stored import Graded, load, run_names, settings_of
from redi.eval.reporting.tables import ANSWER_FROM

CHARACTERS = 50_000_000  # of all completions together
SHORTENED = "long completions are shortened; completions/ holds all of their text"
BODY = """\
<header><h1>{title}</h1>
<label>benchmark <select id="benchmark"></select></label>
<label>verdicts <select id="verdict"></select></label>
<label>subject <select id="subject"></select></label>
<label>difficulty <select id="difficulty"></select></label>
<input type="search" id="words" placeholder="words of problem, answer, id">
<label><input type="checkbox" id="deep"> and in completions</label>
<span class="faint" id="count"></span><span class="faint">{note}</span></header>
<nav id="list" aria-label="problems"></nav>
<main><section id="question"></section><section id="panes"></section></main>
<script type="application/json" id="data">{data}</script>"""


def evaluation_page(runs: list[Path], grader: str | None = None) -> str:
    """The page of one or several evaluations. Raises UserError as `load`, and if two have different
    problems of one name."""
    loaded = [load(run, grader) for run in runs]
    count = sum(len(graded.marks) for one in loaded for graded in one.values())
    limit, longest = CHARACTERS // count, 0
    benchmarks: dict[str, dict[str, dict[str, Any]]] = {}  # name -> problem's id -> its row
    for number, (run, one) in enumerate(zip(runs, loaded)):
        for name, graded in one.items():
            rows = benchmarks.setdefault(name, {})
            for problem in graded.test.problems:
                row = {**asdict(problem), "runs": [[] for _ in runs]}
                known = rows.setdefault(problem.id, row)
                if any(known[field] != row[field] for field in ("problem", "answers")):
                    raise UserError(f"{name}: problem {problem.id!r} is not the same in all runs")
            marks = {mark.key: mark for mark in graded.marks}
            for completion in read_lines(completions_file(run, name), Completion):
                longest = max(longest, len(completion.text))
                mark = marks[completion.key]
                sample = {
                    "sample": completion.sample,
                    "verdict": mark.verdict,
                    "extracted": mark.extracted,
                    "tokens": completion.num_tokens,
                    "finish": completion.finish_reason,
                    "text": _shortened(completion.text, limit),
                }
                rows[completion.id]["runs"][number].append(sample)
    models = [str(settings_of(run).get("model", run)) for run in runs]
    content = {
        # The page of a single run moves with its folder, so it does not name the folder.
        "runs": run_names(runs) if len(runs) > 1 else models,
        "benchmarks": [{"name": n, "problems": [*rows.values()]} for n, rows in benchmarks.items()],
    }
    title = " | ".join(map(_title, models, loaded))
    note = SHORTENED if longest > limit else ""
    style, script = (
        Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    body = BODY.format(title=html.escape(title), note=note, data=_in_script(content))
    return pages.page(title, body, style, script)


def _title(model: str, graded: dict[str, Graded]) -> str:
    graders = dict.fromkeys(one.grader for one in graded.values())
    rules = dict.fromkeys(ANSWER_FROM[one.marks[0].answer_from] for one in graded.values())
    return f"{model}, graded by {', '.join(graders)}, answers read {', '.join(rules)}"


def _shortened(text: str, limit: int) -> str:
    """The beginning and the longer end of a text that exceeds `limit` characters."""
    if len(text) <= limit:
        return text
    head, tail = limit // 3, limit - limit // 3
    return f"{text[:head]}\n\n[... {len(text) - limit:,} characters left out ...]\n\n{text[-tail:]}"


def _in_script(content: Any) -> str:
    """JSON that cannot end the script element around it, nor begin anything else there."""
    text = json.dumps(content)  # ASCII alone: line separators and halves of pairs are escapes
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
