"""The package: its requirements, the command `redi`, and the wheel.

python -m pytest tests/test_package.py -m slow      builds the wheel and uses it (minutes)
"""

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest
from processes import ROOT, main_in_this_process, run_command

import redi
from redi.__main__ import COMMANDS
from redi.__main__ import main as redi_main
from redi.doctor import __main__ as doctor

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def lines_of(name: str) -> list[str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


# ---------------------------------------------------------------- one list of requirements


def test_the_requirements_files_are_those_of_the_package():
    whole, *dev = EXTRAS["dev"]
    assert whole == "redi[data,eval,plots]"
    used = [
        *PROJECT["dependencies"],
        *(line for e in ("data", "eval", "plots") for line in EXTRAS[e]),
    ]
    assert lines_of("requirements.txt") == used
    assert lines_of("requirements-dev.txt") == dev
    pinned = {name_of(line) for line in lines_of("constraints.txt")}
    assert {name_of(line) for line in [*used, *dev]} - pinned == {"triton"}


def test_the_doctor_knows_the_packages():
    needed = dict(line.split(",")[0].split(">=") for line in PROJECT["dependencies"])
    assert needed == doctor.REQUIRED
    optional = {name_of(line) for e in ("data", "eval", "plots") for line in EXTRAS[e]}
    assert doctor.OPTIONAL.keys() == optional | {"triton"}


def test_there_is_one_version():
    assert PROJECT["dynamic"] == ["version"]
    if (citation := ROOT / "CITATION.cff").is_file():
        assert f"\nversion: {redi.__version__}\n" in citation.read_text("utf-8")


# ---------------------------------------------------------------- the command


def run(*arguments: str) -> int:
    return main_in_this_process(redi_main, *arguments)


def test_help_lists_the_commands_with_a_line_each(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  ([\w-]+) +\S.*$", shown, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert run() == 0
    assert capsys.readouterr().out == shown
    assert run("--version") == 0
    assert capsys.readouterr().out == f"redi {redi.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_the_main_of_its_module(name, capsys):
    assert run(name, "--help") == 0
    [usage, *_] = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: redi ")
    module, function, _ = COMMANDS[name]
    assert callable(getattr(importlib.import_module(module), function))


def test_a_word_that_is_no_command_is_an_error_in_one_line(capsys):
    assert run("train") == 2
    assert capsys.readouterr().err == "error: train: no such command; `redi --help` lists them\n"


def test_help_imports_no_package():
    code = "import sys; from redi.__main__ import main; main(); print('', *sys.modules)"
    status, shown, _ = run_command("-c", code)
    assert status == 0
    loaded = set(shown.splitlines()[-1].split())
    assert "redi.config" in loaded
    assert not {name_of(line) for line in PROJECT["dependencies"]} & loaded


def test_a_package_that_a_command_needs_and_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("toy", str(tmp_path)) == 2
    expected = "error: pyarrow is not installed; pip install pyarrow\n"
    assert capsys.readouterr().err == expected


def test_a_recipe_of_redis_own_is_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("study", "recipes/study_toy.toml", "--dry-run") == 0
    assert "-m redi train-sft" in capsys.readouterr().out
    Path("recipes").mkdir()
    Path("recipes/study_toy.toml").write_text("x = 1")  # the user's own comes first
    assert run("study", "recipes/study_toy.toml", "--dry-run") == 2
    assert "unknown key 'x'" in capsys.readouterr().err
    assert run("train-sft", "--config", "recipes/none.toml") == 2
    assert capsys.readouterr().err == "error: --config recipes/none.toml: no such file\n"


# ---------------------------------------------------------------- the wheel

STUDY = """\
seeds = [1]
[toy]
operations = 2
problems = 100
benchmark = 8
[stage1]
epochs = 1
lr = 4e-3
max_length = 256
rope_theta = "keep"
max_position_embeddings = "keep"
[stage2]
max_response = 128
max_length = 256
[evaluation]
samples = 2
user_prompt = "plain"
max_new_tokens = 32
[[method]]
name = "REDI"
objective = "redi"
lr = 1e-4
"""
COMMAND_LINES = """\
redi toy out/demo --problems 200 --benchmark 8
redi prepare out/demo/raw.parquet --out out/demo
redi show out/demo/pairs.jsonl --model out/demo/student --html page.html
redi train-sft --config recipes/toy_sft.toml --epochs 1
redi train-redi --config recipes/toy_redi.toml --save-every 1
torchrun --standalone --nproc_per_node 2 -m redi train-redi --config recipes/toy_redi.toml --out o
redi evaluate --config recipes/toy_eval.toml --model out/demo/redi --out out/eval --samples 2
redi report out/eval --card
redi regrade out/eval --grader paper
redi curves out/demo/redi
redi export out/demo/redi/checkpoints/step-000002 --out out/exported
redi study study.toml --workers 1
redi doctor"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    status, _, errors = run_command(*build, seconds=300)
    assert status == 0, errors
    [path] = folder.glob("redi-*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_data_files_and_the_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix() if folder == "redi" else f"redi/recipes/{path.name}"
        for folder in ("redi", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_every_command_works_from_an_empty_folder_with_the_wheel_alone(wheel, tmp_path):
    """Other packages are those of this environment: installing them takes minutes."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    status, _, errors = run_command(
        "-m", "pip", f"--python={python}", "install", "--no-deps", wheel
    )
    assert status == 0, errors
    [packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (work := tmp_path / "work").mkdir()
    (work / "study.toml").write_text(STUDY)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for line in COMMAND_LINES.splitlines():
        name, *arguments = line.split()
        launcher = [str(python), "-m", "torch.distributed.run"]
        command = launcher if name == "torchrun" else [str(python.with_name(name))]
        run = partial(subprocess.run, cwd=work, env=environment, text=True, check=False)
        done = run([*command, *arguments], capture_output=True, timeout=300)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    card = (work / "out/demo/redi/README.md").read_text()
    assert "| benchmark |" in card.split("<!-- scores -->")[1]
    assert (work / "out/study/report.html").is_file()
