"""Training numbers, completions and prepared files are those recorded at commit 760cfaf.

    python -m pytest tests/test_golden.py

golden/runs.py defines the runs. Record the files again only when a change of numbers is intended,
with RECORD_GOLDEN=1 before this command, and say in the commit which numbers change and why.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from golden import runs

GOLDEN = Path(__file__).parent / "golden"
RELATIVE, ABSOLUTE = 1e-9, 1e-12  # tolerances


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict[str, Any]:
    recorded = runs.record(tmp_path_factory.mktemp("golden"))
    if os.environ.get("RECORD_GOLDEN"):
        for name, value in recorded.items():
            text = json.dumps(value, indent=1)  # floats keep all their digits
            text = re.sub(r"(?<=[\[{])\n   +|\n +(?=[]}])", "", text)
            text = re.sub(r"\n   +", " ", text)  # one line per entry of a case
            (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return recorded


@pytest.mark.parametrize("case", runs.CASES)
def test_steps(now, case):
    assert now["steps"].keys() == golden("steps").keys()
    found, expected = now["steps"][case], golden("steps")[case]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for number, recorded in zip(found[name], values, strict=True):
            assert number == pytest.approx(recorded, rel=RELATIVE, abs=ABSOLUTE), name


@pytest.mark.parametrize("name", ["completions", "prepared"])
def test_completions_and_prepared_files(now, name):
    assert now[name] == golden(name)
