"""One dataclass per program: a recipe and flags fill it, flags win, unknown names are errors.

python -m pytest tests/test_config.py
"""

import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi.config import UserError, one_line, parse, positional, program, require, to_toml

ROOT = Path(__file__).parent.parent


@dataclass(kw_only=True)
class Settings:
    name: Annotated[str, "text"] = "default"
    count: Annotated[int, "whole number"] = 1
    rate: Annotated[float, "number"] = 0.5
    theta: Annotated[float | Literal["keep"], "number or a word"] = "keep"
    limit: Annotated[int | None, "whole number or nothing"] = None
    path: Annotated[str | None, "text or nothing"] = None
    kind: Annotated[Literal["red", "blue"], "one of two"] = "red"
    fast: Annotated[bool, "switch"] = False
    names: Annotated[list[str], "list"] = field(default_factory=lambda: ["a", "b"])


@dataclass(kw_only=True)
class Restated(Settings):
    count: int = 7  # another default; type and help are inherited


@dataclass(kw_only=True)
class Placed:
    source: Annotated[str, "required, positional"]
    target: Annotated[str, "positional, with a default", positional] = "out"
    size: Annotated[int, "a flag"] = 3


def read(*flags: str, config=Settings):
    return parse(config, "A program.", list(flags))


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# ---------------------------------------------------------------- which value wins


def test_default_then_recipe_then_flag(recipe):
    path = recipe('name = "recipe"\ncount = 2\n')
    assert read() == Settings()
    assert read("--config", path) == Settings(name="recipe", count=2)
    with pytest.raises(UserError, match=r"--config: expected one recipe"):
        read("--config", path, "--config", path)
    both = read("--config", path, "--count", "3")
    assert both == Settings(name="recipe", count=3)
    assert read("--count", "3", "--config", path) == both  # in either order


def test_a_subclass_restates_a_default_and_keeps_the_type(recipe):
    assert read(config=Restated).count == 7
    assert read("--count", "8", config=Restated).count == 8
    with pytest.raises(UserError, match="--count: expected a whole number"):
        read("--count", "many", config=Restated)
    with pytest.raises(UserError, match="'count'"):
        read("--config", recipe("count = 1.5\n"), config=Restated)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--count", "-3"], "count", -3),
        (["--rate", "1e-6"], "rate", 1e-6),
        (["--rate", "2"], "rate", 2.0),
        (["--rate=3.5"], "rate", 3.5),
        (["--theta", "300000"], "theta", 300_000.0),
        (["--theta", "keep"], "theta", "keep"),
        (["--limit", "4"], "limit", 4),
        (["--limit", "none"], "limit", None),
        (["--path", "none"], "path", None),
        (["--path", "5"], "path", "5"),
        (["--name", "5"], "name", "5"),
        (["--name", "none"], "name", "none"),  # text is text
        (["--name", "true"], "name", "true"),
        (["--name", ""], "name", ""),
        (["--kind", "blue"], "kind", "blue"),
        (["--fast"], "fast", True),
        (["--fast", "true"], "fast", True),
        (["--fast", "false"], "fast", False),
        (["--names", "x"], "names", ["x"]),
        (["--names", "x", "y", "z"], "names", ["x", "y", "z"]),
    ],
)
def test_a_flag_becomes_the_fields_type(flags, name, value):
    result = getattr(read(*flags), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("rate = 2", "rate", 2.0),
        ("rate = 1e-6", "rate", 1e-6),
        ("theta = 10_000", "theta", 10_000.0),
        ('theta = "keep"', "theta", "keep"),
        ("limit = 4", "limit", 4),
        ("fast = true", "fast", True),
        ('names = ["x", "y"]', "names", ["x", "y"]),
        ("names = []", "names", []),
    ],
)
def test_a_recipe_value_becomes_the_fields_type(recipe, line, name, value):
    result = getattr(read("--config", recipe(line)), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--count", "1.5"], "--count: expected a whole number; got '1.5'"),
        (["--count", ""], "--count"),
        (["--count", "none"], "--count"),
        (["--rate", "nan"], "--rate: expected a finite number; got 'nan'"),
        (["--rate", "1" * 400], "--rate: expected a finite number"),
        (["--rate", "fast"], "--rate: expected a finite number; got 'fast'"),
        (["--theta", "kept"], "--theta: expected a finite number or one of keep; got 'kept'"),
        (["--limit", "some"], "--limit: expected a whole number or none; got 'some'"),
        (["--kind", "green"], "--kind: expected one of red, blue; got 'green'"),
        (["--fast", "yes"], "--fast: expected true or false; got 'yes'"),
        (["--count"], "--count"),
        (["--names"], "--names"),
        (["--unknown", "1"], "--unknown"),
        (["--coun", "1"], "--coun"),  # no abbreviations
        (["--dry_run"], "--dry_run"),
        (["stray"], "stray"),
        (["--config"], "--config"),
    ],
)
def test_a_wrong_flag_is_an_error_naming_it(flags, said):
    with pytest.raises(UserError) as raised:
        read(*flags)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cuont = 1", "unknown key 'cuont'"),
        ("[count]\nvalue = 1", "'count'"),
        ('count = "1"', "'count': expected a whole number; got '1'"),
        ("count = true", "'count'"),
        ("count = 1.0", "'count'"),
        ("rate = true", "'rate'"),
        ("rate = inf", "'rate': expected a finite number; got inf"),
        ("rate = 1" + "0" * 400, "'rate': expected a finite number"),
        ('rate = "1"', "'rate'"),
        ("name = 1", "'name': expected text"),
        ('kind = "green"', "'kind': expected one of red, blue"),
        ("fast = 1", "'fast': expected true or false"),
        ('fast = "true"', "'fast'"),
        ('names = "x"', "'names': expected a list"),
        ("names = [1]", "'names': expected text; got 1"),
        ("count = ", "not a readable TOML file"),
        ("count = 1\ncount = 2", "not a readable TOML file"),
    ],
)
def test_a_wrong_recipe_is_an_error_naming_file_and_key(recipe, text, said):
    path = recipe(text)
    with pytest.raises(UserError) as raised:
        read("--config", path)
    assert said in str(raised.value)
    assert path in str(raised.value)


@pytest.mark.parametrize("path", ["nowhere.toml", "."])
def test_a_recipe_that_cannot_be_read_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--config"):
        read("--config", path)


def test_a_recipe_that_is_not_utf_8_is_an_error(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b'name = "\xff"\n')
    with pytest.raises(UserError, match="--config"):
        read("--config", str(path))


# ---------------------------------------------------------------- positional arguments


def test_a_field_without_a_default_is_positional():
    assert read("in", config=Placed) == Placed(source="in", target="out", size=3)
    assert read("in", "--size", "4", config=Placed).size == 4
    assert read("--size", "4", "in", config=Placed).source == "in"
    with pytest.raises(UserError, match="SOURCE"):
        read(config=Placed)


def test_a_positional_field_with_a_default_may_be_left_out():
    assert read("in", "there", config=Placed).target == "there"
    assert read("in", config=Placed).target == "out"
    with pytest.raises(UserError, match="--target"):
        read("in", "--target", "there", config=Placed)
    with pytest.raises(UserError, match="third"):
        read("in", "there", "third", config=Placed)


# ---------------------------------------------------------------- back to TOML


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))  # all but lone surrogates


@given(
    st.builds(
        Settings,
        name=texts,
        count=st.integers(-(2**62), 2**62),
        rate=finite,
        theta=st.one_of(finite, st.just("keep")),
        limit=st.one_of(st.none(), st.integers(0, 10**9)),
        path=st.one_of(st.none(), texts),
        kind=st.sampled_from(["red", "blue"]),
        fast=st.booleans(),
        names=st.lists(texts, max_size=4),
    )
)
def test_to_toml_is_read_back_to_the_same_settings(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(settings), encoding="utf-8", newline="\n")
    assert read("--config", str(path)) == settings


@pytest.mark.parametrize(
    "text",
    [
        'say "hi"',
        "C:\\new\\table",
        "two\nlines",
        "\r\n",
        "\ttab",
        "\x00\x01\x1b\x1f\x7f",
        "é\U0001f600",
    ],
)
def test_text_of_any_kind_survives_toml(text):
    assert tomllib.loads(to_toml(Settings(name=text)))["name"] == text


def test_to_toml_has_one_key_per_line_and_leaves_out_none():
    lines = to_toml(Settings(name="two\nlines")).splitlines()
    assert lines == [
        'name = "two\\nlines"',
        "count = 1",
        "rate = 0.5",
        'theta = "keep"',
        'kind = "red"',
        "fast = false",
        'names = ["a", "b"]',
    ]


@pytest.mark.parametrize("rate", [1e-6, 5e-5, 1e16, 0.1])
def test_numbers_keep_every_digit(rate):
    assert tomllib.loads(to_toml(Settings(rate=rate)))["rate"] == rate


# ---------------------------------------------------------------- how a program ends


def status_of(error: BaseException | None) -> int | str | None:
    @program
    def main() -> None:
        """What it does."""
        if error is not None:
            raise error

    assert main.__doc__ == "What it does."
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return None


def test_a_user_error_is_one_line_on_stderr_and_status_2(capsys):
    assert status_of(UserError("--lr is 0:\n  expected\tabove 0")) == 2
    shown = capsys.readouterr()
    assert shown.err == "error: --lr is 0: expected above 0\n"
    assert shown.out == ""


def test_ctrl_c_is_one_line_and_status_130(capsys):
    assert status_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "stopped"
    assert status_of(KeyboardInterrupt("after step 3; nothing was saved")) == 130
    assert capsys.readouterr().err.strip() == "stopped: after step 3; nothing was saved"


def test_success_and_other_errors_pass_through():
    assert status_of(None) is None
    with pytest.raises(ZeroDivisionError):
        status_of(ZeroDivisionError())


def test_a_broken_pipe_is_no_traceback():
    script = (
        "from redi.config import program\n"
        "@program\n"
        "def main():\n"
        "    for _ in range(100_000): print('a line', flush=True)\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_require_names_the_flag():
    require(True, "rows_per_step", 0, "at least 1")
    with pytest.raises(UserError, match="--rows-per-step: expected at least 1; got 0"):
        require(False, "rows_per_step", 0, "at least 1")


def test_one_line_is_one():
    assert one_line(" a\n b\t\tc ") == "a b c"


# ---------------------------------------------------------------- --help


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_states_every_flag_its_default_and_its_meaning(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        read(flag, "--count", "7")
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "A program." in shown
    assert "--config RECIPE.toml" in shown
    for text in ("--count 1", "--rate 0.5", "--limit none", "--fast false", "(red, blue)"):
        assert text in shown
    [line] = [line for line in shown.splitlines() if "--names [a b]" in line]
    assert line.endswith("  list")  # a flag and its meaning share a line
    with pytest.raises(SystemExit):
        read("--help", config=Placed)
    shown = capsys.readouterr().out.splitlines()
    assert "SOURCE [TARGET] [--flag value ...]" in shown[0]
    assert any("TARGET" in line and "(default: out)" in line for line in shown[1:])
