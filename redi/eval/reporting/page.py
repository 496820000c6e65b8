r"""Evaluations as one HTML page, to filter problems and read completions side by side.

The page is one file: no server, no network, nothing to install. `page.html` is the template; the
data is one JSON text in a script element that is never run. Completions are a model's, so they
never become markup: the JSON escapes every <, > and &, the page inserts text as text, and its
policy forbids it to load anything.

A browser can open a page of some 50 million characters. If the completions have more, the longest
are shortened in the middle, and the page says so. Left out: typeset formulas.
"""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from redi.config import UserError
from redi.eval.completions import Completion, completions_file, read_lines
from redi.eval.report import Graded, load, run_names, settings_of
from redi.eval.reporting.tables import ANSWER_FROM

TEMPLATE = Path(__file__).with_name("page.html")
CHARACTERS = 50_000_000  # of all completions together
PLACE = "/* the data */"


def page(runs: list[Path], grader: str | None = None) -> str:
    """The page of one evaluation or of several. Raises UserError as `report.load`, and where two
    ask other problems under one name."""
    loaded = [{name: graded[0] for name, graded in load(run, grader).items()} for run in runs]
    lengths = [len(c.text) for run, tests in zip(runs, loaded) for c in _stored(run, tests)]
    limit = _limit(lengths)
    problems: dict[str, dict[str, dict[str, Any]]] = {}  # benchmark -> id -> problem
    for number, (run, tests) in enumerate(zip(runs, loaded)):
        for name, (test, marks, _) in tests.items():
            rows = problems.setdefault(name, {})
            for problem in test.problems:
                row = {**dataclasses.asdict(problem), "runs": [[] for _ in runs]}
                known = rows.setdefault(problem.id, row)
                if any(known[field] != row[field] for field in ("problem", "answers")):
                    raise UserError(f"{name}: problem {problem.id!r} is not the same in all runs")
            verdicts = {mark.key: mark for mark in marks}
            for completion in read_lines(completions_file(run, name), Completion):
                mark = verdicts[completion.key]
                rows[completion.id]["runs"][number].append(
                    {
                        "sample": completion.sample,
                        "verdict": mark.verdict,
                        "extracted": mark.extracted,
                        "tokens": completion.num_tokens,
                        "finish": completion.finish_reason,
                        "text": _shortened(completion.text, limit),
                    }
                )
    models = [str(settings_of(run).get("model", run)) for run in runs]
    names = run_names(runs) if len(runs) > 1 else models  # the page of a run moves with its folder
    content = {
        "runs": [
            {"name": name, "model": model, **_rules(tests.values())}
            for name, model, tests in zip(names, models, loaded)
        ],
        "shortened": max(lengths, default=0) > limit,
        "benchmarks": [
            {"name": name, "problems": list(rows.values())} for name, rows in problems.items()
        ],
    }
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, _in_script(content))


def _rules(graded: Collection[Graded]) -> dict[str, str]:
    answers = dict.fromkeys(ANSWER_FROM[g.marks[0].answer_from] for g in graded)
    graders = dict.fromkeys(g.grader for g in graded)
    return {"grader": ", ".join(graders), "answers": ", ".join(answers)}


def _stored(run: Path, names: Iterable[str]) -> Iterator[Completion]:
    for name in names:
        yield from read_lines(completions_file(run, name), Completion)


def _limit(lengths: list[int]) -> int:
    """The longest length to show, so that all together stay within CHARACTERS."""
    left, remaining = CHARACTERS, len(lengths)
    for length in sorted(lengths):
        if length * remaining > left:
            return left // remaining
        left -= length
        remaining -= 1
    return max(lengths, default=0)


def _shortened(text: str, limit: int) -> str:
    """The beginning and the longer end of a text that exceeds `limit` characters."""
    if len(text) <= limit:
        return text
    head, tail = limit // 3, limit - limit // 3
    return f"{text[:head]}\n\n[... {len(text) - limit:,} characters left out ...]\n\n{text[-tail:]}"


def _in_script(content: Any) -> str:
    """JSON that cannot end the script element it stands in, nor begin anything else there."""
    text = json.dumps(content)  # ASCII alone: line separators and halves of pairs are escapes
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
