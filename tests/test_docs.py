"""README and docs/ are true: links, paths, names, messages, figures. Commands: test_commands.py.

python -m pytest tests/test_docs.py
"""

import importlib
import inspect
import re
import sys
from importlib.util import find_spec

from processes import ROOT

import redi
from redi import losses
from redi.eval import external
from redi.eval.reporting.paper_results import RESULTS

sys.path.insert(0, str(ROOT / "docs"))
import make_measured

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"]
GUIDES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES + GUIDES}
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)  # of commands


def code(text: str) -> str:
    """What a page shows as commands or names."""
    return " ".join([*BLOCK.findall(text), *re.findall(r"`([^`\n]+)`", text)])


def test_pages_have_their_shape():
    assert TEXTS["README.md"].count("\n") <= 150
    for page in GUIDES:
        text, titles = TEXTS[page], re.findall(r"^## (.*)$", TEXTS[page], re.MULTILINE)
        assert text.index("```sh") < text.index("\n## "), page
        assert titles[-1] == "When it fails", page


def test_the_citation_is_of_this_version():
    assert f"\nversion: {redi.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_links_and_paths_exist():
    for page, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
        for path in re.findall(r"(?<!\S)(?:redi|tests|bench|docs|recipes)/[a-z\d_./]+", code(text)):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_names_and_tests_of_the_details_exist():
    details = TEXTS["README.md"].partition("## Details that matter")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w.]+)`", line) for line in details.splitlines() if "`test_" in line]
    assert len(rows) == 10
    for name, *tests in rows:
        assert all((ROOT / f"tests/{test}.py").is_file() for test in tests), tests
        module, _, attribute = f"redi.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or find_spec(f"redi.{name}")


def test_messages_that_have_an_answer_are_in_the_code():
    source = "".join(path.read_text() for path in sorted((ROOT / "redi").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message in several strings
    for page in GUIDES:
        for row in TEXTS[page].partition("## When it fails")[2].splitlines()[4:]:
            for message in re.findall(r"`([^`]+ [^`]+)`", row.split("|")[1]):
                parts = re.split(r"\b[A-Z]+\b|\.\.\.", message)  # N, DIR and so on
                assert re.search("[^\n]*".join(map(re.escape, parts)), source), (page, message)


def test_the_lines_of_redi_loss_are_those_of_the_code():
    [shown] = re.findall(r"<!-- redi_loss -->\n```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    code = inspect.getsource(losses.redi_loss)
    assert shown == re.sub(r' {4}""".*?"""\n', "", code, flags=re.DOTALL)


def test_figures_are_those_of_the_results():
    found = make_measured.results()
    for page in make_measured.PAGES:  # else: python docs/make_measured.py
        text = page.read_text(encoding="utf-8")
        assert text == make_measured.filled(text, found)
    with_goals = {key for key, entry in found.items() if entry.get("goal") is not None}
    assert with_goals <= set(re.findall(r"^\| ([\w.]+) \|", TEXTS["docs/measured.md"], re.M))


def test_a_changed_result_changes_its_row_and_a_missed_goal_is_bold():
    page = "| id | what | median | goal |\n|---|---|---|---|\n| C1 | memory | 1 | ≤ 1 |\n"
    entry = {"median": 0.2, "min": 0.1, "max": 0.3, "n": 3, "goal": 0.12}
    changed = make_measured.filled(page, {"C1": entry})
    assert changed.splitlines()[2] == "| C1 | memory | **0.200** | ≤ 0.12 |"
    assert make_measured.filled(page, {}).splitlines()[2] == "| C1 | memory | not measured | ≤ 1 |"


def test_the_objectives_figures_are_the_papers_and_the_studys():
    rows = re.findall(
        r"^\| `?([\w ]+)`? \|(.*)\|(.*)\|(.*)\|(.*)\|.*\|$", TEXTS["docs/objectives.md"], re.M
    )
    paper = {"stage 1": "SFT 3 epochs", "redi": "SFT 3 + REDI", "symmetric": "SFT 3 + symmetric"}
    paper |= {"dpo": "SFT 3 + DPO", "simpo": "SFT 3 + SimPO"}
    assert {name for name, *_ in rows} >= {*paper, "positives"}
    for name, *figures in rows:
        if name in paper:
            scores = [first for first, _ in RESULTS[paper[name]]]
            expected = *scores[:2], sum(scores) / 5
            assert [f"{score:.1f}" for score in expected] == [f.strip() for f in figures[:3]]
        if figures[3].strip():
            assert f"| {figures[3].strip()} |" in TEXTS["docs/study.md"]


def test_the_script_for_vllm_compiles_and_reads_the_fields_that_redi_writes():
    script = (ROOT / "docs/vllm.py").read_text(encoding="utf-8")
    compile(script, "vllm.py", "exec")
    read = set(re.findall(r'row\["(\w+)"\]', script))
    assert read <= set(
        re.findall(r'^ +"(\w+)": ', inspect.getsource(external.export_prompts), re.M)
    )
    assert set(external.FIELDS) <= set(re.findall(r'^ +"(\w+)": ', script, re.MULTILINE))
