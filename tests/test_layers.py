"""The core imports no tool and has no circle of imports, and redi/ keeps to its line budgets.

python -m pytest tests/test_layers.py -s      prints the line counts
"""

import ast
import graphlib

from processes import ROOT, run_command
from small_run import SFT

METHOD = (
    "losses", "objectives", "logprobs", "kernels", "model", "attention", "packing", "batches",
    "fused", "train",
)  # fmt: skip
CORE = {
    *METHOD, "related_losses", "recipe", "run", "distributed", "memory", "monitor", "gpus",
    "config", "hub", "runlog", "curves", "tables", "checkpoint", "data", "__init__",
}  # fmt: skip
FILES = [p for p in ROOT.glob("redi/**/*") if p.is_file() and p.suffix != ".pyc"]
NAMES = {p: p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in FILES}
TREES = {NAMES[p]: ast.parse(p.read_text("utf-8")) for p in FILES if p.suffix == ".py"}
LINES = {p: len(p.read_text("utf-8").splitlines()) for p in FILES}


def is_core(name: str) -> bool:
    return name.split(".")[1] in CORE


def imports(name: str) -> set[str]:
    """The files of redi/ that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {file for file in TREES if file.removesuffix(".__init__") in found} - {"redi.__init__"}


def test_the_core_reaches_no_tool_and_has_no_circle_of_imports():
    graph = {name: imports(name) for name in TREES if is_core(name)}
    assert [(a, b) for a, found in graph.items() for b in found if not is_core(b)] == []
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_training_without_a_benchmark_loads_no_tool(here):
    code = (
        "import sys; from redi.programs import train_sft; train_sft()\n"
        "print(*(name for name in sys.modules if name.startswith('redi.')))"
    )
    status, out, errors = run_command("-c", code, *SFT)
    assert status == 0, errors
    loaded = out.splitlines()[-1].split()
    assert "redi.train" in loaded
    assert [name for name in loaded if not is_core(name)] == ["redi.programs"]


def test_line_budgets():
    core = sum(n for p, n in LINES.items() if is_core(NAMES[p]))
    method = sum(LINES[ROOT / "redi" / f"{name}.py"] for name in METHOD)
    whole = sum(LINES.values())
    print(f"lines: core {core:,}, files of the method {method:,}, redi/ {whole:,}")
    long = [f"{p.name}: {n} lines" for p, n in LINES.items() if n > 350]
    for script in ("train_sft.py", "train_redi.py", "evaluate.py"):
        long += [script] if len((ROOT / script).read_text("utf-8").splitlines()) >= 40 else []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for name, tree in TREES.items():
        found = [node for node in ast.walk(tree) if isinstance(node, functions)]
        long += [f"{name}.{f.name}" for f in found if f.end_lineno - f.lineno >= 60]
    assert long == []
    assert core <= 5_300
    assert method <= 1_600
    assert whole <= 16_800
