r"""Evaluations as one HTML page, to filter problems and read completions side by side.

The page is one file: no server, no network, nothing to install. It begins with the score table.
Below, each problem opens to its completions, one column per run, and each of these opens to its
text. The script only hides the problems that the filters leave out.

A browser can open a page of some 50 million characters, of which each completion has an equal
share. A longer one is shortened in the middle, and the page says so. Left out: typeset formulas.
"""

import json
from html import escape
from statistics import fmean

from redi import pages
from redi.config import UserError
from redi.eval.benchmarks import Problem
from redi.eval.completions import Completion, Mark, completions_file, read_lines
from redi.eval.reporting.stored import Evaluation
from redi.tables import Cells

CHARACTERS = 50_000_000  # of all completions together
SHORTENED = "Long completions are shortened; completions/ holds all of their text."
SYMBOLS = {"correct": "✓", "incorrect": "✗", "no_answer": "∅", "truncated": "…", "timeout": "⧗"}
STYLE = """
body { max-width: 100rem; }
.problem { border-top: 1px solid var(--line); padding: .4rem 0; }
.question { white-space: pre-wrap; overflow-wrap: anywhere; }
.runs { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.correct { color: var(--up); } .incorrect, .no_answer, .truncated, .timeout { color: var(--down); }
@media (max-width: 50rem) { .runs { grid-auto-flow: row; } }
"""

Samples = dict[str, list[tuple[Mark, str]]]  # run -> marks and completions, the latter as HTML


def evaluation_page(evaluations: dict[str, Evaluation], scores: Cells) -> str:
    """The page of one evaluation or several, by name, that `compare` accepts. scores: the table
    that the page begins with. Raises UserError if the completions are not those of the marks."""
    graded = [
        (run, one.out, g[0]) for run, one in evaluations.items() for g in one.benchmarks.values()
    ]
    limit, longest = CHARACTERS // sum(g.correct.size for *_, g in graded), 0
    problems = {(g.benchmark.name, p.id): p for *_, g in graded for p in g.benchmark.problems}
    samples: dict[tuple[str, str], Samples] = {key: {} for key in problems}
    for run, out, g in graded:
        marks = {mark.key: mark for row in g.rows for mark in row}
        path = completions_file(out, g.benchmark.name)
        changed = UserError(f"{path}: holds other samples than were graded; `redi regrade` it")
        for completion in read_lines(path, Completion):
            longest = max(longest, len(completion.text))
            if (mark := marks.pop(completion.key, None)) is None:
                raise changed
            shown = _completion(completion, mark, limit)
            samples[g.benchmark.name, completion.id].setdefault(run, []).append((mark, shown))
        if marks:
            raise changed
    tags = [_tags(name, problem, samples[name, id]) for (name, id), problem in problems.items()]
    found = {name: {value for one in tags for value in one[name]} - {""} for name in tags[0]}
    options = {k: sorted(found[k], key=float if k == "difficulty" else str) for k in found}
    title = " | ".join(evaluations)
    body = [
        f"<h1>{escape(title)}</h1>",
        pages.table(scores),
        pages.filters(options, "problems", "completions"),
        f'<p class="faint">{SHORTENED}</p>' if longest > limit else "",
        *map(_problem, problems, problems.values(), samples.values(), tags),
    ]
    return pages.page(title, "\n".join(body), STYLE, pages.FILTER_SCRIPT)


def _tags(name: str, problem: Problem, samples: Samples) -> dict[str, list[str]]:
    """What the filters know of a problem; the keys are the filters' names."""
    verdicts = [mark.verdict for run in samples.values() for mark, _ in run]
    correct = verdicts.count("correct")
    some = "all" if correct == len(verdicts) else "some" if correct else "none"
    found = [f"{some} correct", *(f"has {v.replace('_', ' ')}" for v in sorted(set(verdicts)))]
    shares = {
        run: fmean(mark.verdict == "correct" for mark, _ in row) for run, row in samples.items()
    }
    if len(set(shares.values())) == len(samples) == 2:
        found.append(f"{max(shares, key=shares.get)} is ahead")
    return {
        "benchmark": [name],
        "subject": [problem.subject or ""],
        "difficulty": ["" if problem.difficulty is None else f"{problem.difficulty:g}"],
        "verdicts": found,
    }


def _problem(
    key: tuple[str, str], problem: Problem, samples: Samples, tags: dict[str, list[str]]
) -> str:
    about = [*key, *tags["subject"], *(f"difficulty {d}" for d in tags["difficulty"] if d)]
    marks, columns = [], []
    for run, row in samples.items():
        symbols = (f'<span class="{m.verdict}">{SYMBOLS[m.verdict]}</span>' for m, _ in row)
        marks.append(f"{escape(run)} {''.join(symbols)}" if len(samples) > 1 else "".join(symbols))
        columns.append(f"<div><b>{escape(run)}</b>{''.join(shown for _, shown in row)}</div>")
    return (
        f'<details class="problem" data-tags="{escape(json.dumps(tags))}"><summary class="about">'
        f'<span class="faint">{escape(" · ".join(filter(None, about)))}</span> {" ".join(marks)}'
        f'<div class="question">{escape(problem.problem)}</div>'
        f"<div>gold: {escape(' or '.join(problem.answers))}</div></summary>"
        f'<div class="runs">{"".join(columns)}</div></details>'
    )


def _completion(completion: Completion, mark: Mark, limit: int) -> str:
    tokens = "" if mark.num_tokens is None else f" · {mark.num_tokens} tokens"
    answer = "none" if mark.extracted is None else f"{mark.extracted:.200}"
    facts = f"answer {answer}{tokens} · ended by {completion.finish_reason}"
    verdict = f"{SYMBOLS[mark.verdict]} {mark.verdict.replace('_', ' ')}"
    return (
        f'<details><summary>{mark.sample} <b class="{mark.verdict}">{verdict}</b> '
        f'<span class="faint">{escape(facts)}</span></summary>'
        f"<pre>{escape(_shortened(completion.text, limit))}</pre></details>"
    )


def _shortened(text: str, limit: int) -> str:
    """The beginning and the longer end of a text that exceeds `limit` characters."""
    if len(text) <= limit:
        return text
    head, tail = limit // 3, limit - limit // 3
    return f"{text[:head]}\n\n[... {len(text) - limit:,} characters left out ...]\n\n{text[-tail:]}"
