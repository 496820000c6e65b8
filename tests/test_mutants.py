"""The tests notice when the core is wrong: each fault of mutants.py makes its tests fail.

python -m pytest tests/test_mutants.py              the list fits the code
python -m pytest -m slow tests/test_mutants.py      every fault, one pytest process each
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
ALL_PASSED, SOME_FAILED = 0, 1  # exit statuses of pytest


def test_there_are_61_different_mutants():
    assert len(MUTANTS) == 61
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old) for mutant in MUTANTS}) == len(MUTANTS)


def test_each_mutant_changes_one_line_of_its_file_and_names_tests_that_exist():
    problems = []
    for mutant in MUTANTS:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            problems.append(f"{mutant.name}: {mutant.file} has the old text {count} times")
        if mutant.new == mutant.old or not 1 <= len(mutant.tests) <= 3:
            problems.append(f"{mutant.name}: expected another text and one to three tests")
        for test in mutant.tests:
            file, _, function = test.partition("[")[0].partition("::")
            if f"\ndef {function}(" not in (ROOT / file).read_text(encoding="utf-8"):
                problems.append(f"{mutant.name}: {file} has no {function}")
    assert not problems, "\n".join(problems)


def run_tests(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess:
    """Run tests in a copy of the tree, in a process of their own."""
    # Bytecode would outlive the mutant; PYTHONPATH would lead to the code that is not mutated.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the tree in which the listed tests pass."""
    folder = tmp_path_factory.mktemp("mutants")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "out")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    done = run_tests(folder, sorted({test for mutant in MUTANTS for test in mutant.tests}))
    assert done.returncode == ALL_PASSED, f"without a mutant:\n{done.stdout}{done.stderr}"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_makes_its_tests_fail(mutant: Mutant, copy: Path):
    file = copy / mutant.file
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run_tests(copy, mutant.tests)
    finally:
        file.write_text(original, encoding="utf-8")
    assert done.returncode == SOME_FAILED, f"{done.stdout}{done.stderr}"
