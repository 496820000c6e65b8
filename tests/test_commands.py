"""Every command that README and docs/ show works.

python -m pytest tests/test_commands.py             their programs accept them
python -m pytest -m slow tests/test_commands.py     they run, on a miniature (two minutes)

A line of an `sh` block is a command. A comment `# needs GPUs` or `# needs the hub` marks the lines
below it in its block: their programs parse them, and no test runs them.
"""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from processes import ROOT
from test_docs import BLOCK, TEXTS, code

from redi import config
from redi.__main__ import COMMANDS, SUBCOMMANDS

SCRIPTS = ("train_sft.py", "train_redi.py", "evaluate.py")
# Of all programs, of torchrun, of redi.dialogue.world
OTHER_FLAGS = {"--config", "--help", "--nnodes", "--shutdown-timeout", "--dialogues"}
# Run elsewhere, or too long for any test.
NOT_RUN = re.compile(r"make|pip|git|\. |python -m (pytest|bench)|python docs/make|redi study \S+$")


def commands() -> dict[str, bool]:
    """The commands in the pages' order -> whether one needs GPUs or the hub."""
    found = {}
    for block in BLOCK.findall("\n".join(TEXTS.values())):
        needs = False
        for line in block.replace("\\\n", " ").splitlines():
            needs |= line in ("# needs GPUs", "# needs the hub")
            words = shlex.split(line, comments=True)
            if words and words[0] not in ("for", "done"):
                found[shlex.join(words)] = needs
    return found


class Parsed(Exception):
    """Ends a program once it has its settings, which are the argument."""


def settings(words: list[str]) -> object:
    """What a program of redi makes of its command line. Raises UserError."""
    name, *arguments = words
    name = name.removesuffix(".py").replace("_", "-") if name in SCRIPTS else name
    module, main, _ = COMMANDS[name]
    if name == "dialogue":  # its subcommands are modules
        name, *arguments = arguments
        module = f"redi.dialogue.{name}"
    argv = [f"redi {name}", *arguments]
    arguments = [name, *arguments] if name in SUBCOMMANDS else arguments

    def stop(config_class: type, description: str) -> None:
        raise Parsed(config.parse(config_class, description, arguments))

    function = inspect.unwrap(getattr(importlib.import_module(module), main))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys.modules[function.__module__], "parse", stop)
        try:
            function()
        except Parsed as parsed:
            return parsed.args[0]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_its_program_accepts(command):
    program, *words = shlex.split(command.replace("unlikelihood", "orpo"))  # docs/objectives.md
    if program == "torchrun":  # its own words come first
        words = words[next(n for n, word in enumerate(words) if word in SCRIPTS) :]
    if program == "redi" or words[0] in SCRIPTS:
        settings(words)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        module = words[1] if words[0] == "-m" else ""
        file = f"{module.replace('.', '/')}.py" if module else words[0]
        assert module in ("pytest", "doctest") or (ROOT / file).is_file()
    else:
        assert program in ("pip", "git", ".")


def test_no_command_hides_outside_an_sh_block():
    for name, text in TEXTS.items():
        hidden = re.search(r"^ {4}(python|torchrun|redi|make|pip) .*$", BLOCK.sub("", text), re.M)
        assert not hidden, f"{name}: {hidden[0]}"


def test_flags_that_the_pages_name_exist():
    several = ("dialogue", "trace")  # programs in one
    lone = ("train-sft", "train-redi", "evaluate", "doctor")
    shortest = [[name] if name in lone else [name, "x"] for name in COMMANDS if name not in several]
    of_dialogue = ("prepare x", "report x", "agreement x y", "evaluate x --scenarios y")
    shortest += [["dialogue", *words.split()] for words in of_dialogue]
    shortest += [["trace", name] for name in ("train-sft", "train-redi", "evaluate")]
    names = {field.name for words in shortest for field in fields(settings(words))}
    flags = OTHER_FLAGS | {f"--{name.replace('_', '-')}" for name in names}
    for page, text in TEXTS.items():
        unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]+(?!\w)", code(text))) - flags
        assert not unknown or page == "CHANGELOG.md", (page, unknown)  # it names what is gone


# ---------------------------------------------------------------- the miniature

EVALUATE = "python evaluate.py --config recipes/toy_eval.toml --model"
MADE = f"""
redi toy out/demo --problems 60 --benchmark 3
redi prepare out/demo/raw.parquet --out out/demo
redi prepare out/demo/raw.parquet --out data
cp out/demo/benchmark.jsonl mine.jsonl
python train_sft.py --config recipes/toy_sft.toml --epochs 1
python train_redi.py --config recipes/toy_redi.toml
python train_sft.py --config recipes/toy_sft.toml --out out/sft --max-position-embeddings 32768
python train_redi.py --rows-per-step 4 --save-every 1 --keep all
{EVALUATE} out/demo/sft --out out/demo/eval/sft
{EVALUATE} out/demo/redi --out out/demo/eval/redi
{EVALUATE} out/sft
{EVALUATE} out/redi
sed -i s/32768/700/ out/redi/config.json   # or answers are endless
sed 's/"problem"/"sample": 0, "text"/' mine.jsonl > completions.jsonl
"""


@pytest.mark.slow
def test_the_commands_that_need_no_gpu_and_no_hub_run_on_a_miniature(tmp_path):
    for name in (*SCRIPTS, "docs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    shell = f'python() {{ {sys.executable} "$@"; }}\nredi() {{ python -m redi "$@"; }}\n'
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(command: str) -> None:
        done = subprocess.run(
            ["sh", "-c", shell + command], cwd=tmp_path, env=os.environ | environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}"

    shown = [c for c, needs in commands().items() if not needs and not NOT_RUN.match(c)]
    assert len(shown) >= 15
    for command in [*MADE.strip().split("\n"), *shown]:
        command = command.replace("--objective unlikelihood", "--objective orpo")
        run(re.sub(r"step-0\d+", "step-000001", command))
