"""Training numbers, completions and prepared files are those recorded at commit 760cfaf.

    python -m pytest tests/test_golden.py

golden/runs.py defines the runs; golden/record.py says how and when the files are recorded.
"""

import json
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
    return runs.record(tmp_path_factory.mktemp("golden"))


def flat(values: list) -> list[float]:
    """Flatten a list of numbers or of pairs of numbers."""
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("ranks", runs.RANKS)
@pytest.mark.parametrize("objective", runs.OBJECTIVES)
def test_steps(now, objective, ranks):
    case = f"{objective} on {ranks}"
    found, expected = now["steps"][case], golden("steps")[case]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert flat(found[name]) == pytest.approx(flat(values), rel=RELATIVE, abs=ABSOLUTE), name


def test_every_case_is_recorded():
    cases = {f"{objective} on {ranks}" for objective in runs.OBJECTIVES for ranks in runs.RANKS}
    assert golden("steps").keys() == cases
    assert golden("completions").keys() == runs.SAMPLINGS.keys()
    assert golden("prepared").keys() == runs.PREPARATIONS.keys()


@pytest.mark.parametrize("sampling", runs.SAMPLINGS)
def test_completions(now, sampling):
    assert now["completions"][sampling] == golden("completions")[sampling]


@pytest.mark.parametrize("rules", runs.PREPARATIONS)
def test_prepared_files(now, rules):
    assert now["prepared"][rules] == golden("prepared")[rules]
