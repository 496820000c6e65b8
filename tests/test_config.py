"""One dataclass per program: a recipe and flags fill it, flags win, unknown names are errors."""

from dataclasses import dataclass, field
from typing import Annotated, Literal
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from processes import command, main_in_this_process
from small_run import refusal

from redi.config import UserError, parse, program, to_toml


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
    source: Annotated[str, "positional"]
    target: Annotated[str, "positional, the second"]
    size: Annotated[int, "a flag"] = 3


@dataclass(kw_only=True)
class Subcommand:
    command: Annotated[Literal["grade"], "hidden"]
    file: Annotated[str, "positional"]


def read(*flags: str, config=Settings):
    return parse(config, "A program.", list(flags))


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> the flags that read a recipe of this text."""

    def write(text: str) -> list[str]:
        (tmp_path / "recipe.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
        return ["--config", str(tmp_path / "recipe.toml")]

    return write


# ---------------------------------------------------------------- which value wins, and its type


def test_a_flag_overrides_a_recipe_and_a_recipe_a_default(recipe):
    flags = recipe('name = "recipe"\ncount = 2\n')
    assert read() == Settings()
    assert read(*flags) == Settings(name="recipe", count=2)
    for both in ([*flags, "--count", "3"], ["--count", "3", *flags]):
        assert read(*both) == Settings(name="recipe", count=3)
    assert "--config: expected one recipe" in refusal(read, *flags, *flags)


def test_a_subclass_restates_a_default_and_keeps_the_type(recipe):
    assert read(config=Restated).count == 7
    error = refusal(read, "--count", "many", config=Restated)
    assert "--count: expected a whole number" in error
    assert "'count'" in refusal(read, *recipe("count = 1.5\n"), config=Restated)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--count -3 --rate 1e-6 --limit 4", Settings(count=-3, rate=1e-6, limit=4)),
        ("--rate 2 --theta 300000 --kind blue", Settings(rate=2.0, theta=3e5, kind="blue")),
        ("--rate=3.5 --theta keep --limit none", Settings(rate=3.5, theta="keep", limit=None)),
        ("--path none --name none", Settings(path=None, name="none")),  # text is text
        ("--path 5 --name true --fast true", Settings(path="5", name="true", fast=True)),
        ("--fast --name ", Settings(fast=True, name="")),
        ("--fast false --names x", Settings(fast=False, names=["x"])),
        ("--names x y z --fast", Settings(names=["x", "y", "z"], fast=True)),
    ],
)
def test_a_flag_becomes_the_fields_type(flags, settings):
    assert repr(read(*flags.split(" "))) == repr(settings)  # == would not tell 1, 1.0 and True


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ('rate = 2\ntheta = "keep"\nlimit = 4', Settings(rate=2.0, theta="keep", limit=4)),
        ("rate = 1e-6\ntheta = 10_000\nnames = []", Settings(rate=1e-6, theta=1e4, names=[])),
        ('fast = true\nnames = ["x", "y"]', Settings(fast=True, names=["x", "y"])),
    ],
)
def test_a_recipe_value_becomes_the_fields_type(recipe, text, settings):
    assert repr(read(*recipe(text))) == repr(settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--count 1.5", "--count: expected a whole number; got '1.5'"),
        ("--rate nan", "--rate: expected a finite number; got 'nan'"),
        ("--rate " + "1" * 400, "--rate: expected a finite number"),
        ("--theta kept", "--theta: expected a finite number or one of keep; got 'kept'"),
        ("--limit some", "--limit: expected a whole number or none; got 'some'"),
        ("--kind green", "--kind: expected one of red, blue; got 'green'"),
        ("--fast yes", "--fast: expected true or false; got 'yes'"),
        ("--count", "--count"),
        ("--unknown 1", "--unknown"),
        ("--name \udcff", "--name: expected text in UTF-8; got '\\udcff'"),
        ("--coun 1", "--coun"),  # no abbreviations
        ("stray", "stray"),
        ("--config nowhere.toml", "--config nowhere.toml: no such file"),
        ("--config .", "--config .: not a readable TOML file"),
    ],
)
def test_a_wrong_flag_is_one_line_naming_it(flags, message):
    assert message in refusal(read, *flags.split(" "))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont = 1", "unknown key 'cuont'"),
        ("[count]\nvalue = 1", "'count'"),
        ("count = true", "'count': expected a whole number; got True"),
        ("count = 1.0", "'count'"),
        ("rate = inf", "'rate': expected a finite number; got inf"),
        ('rate = "1"', "'rate'"),
        ("name = 1", "'name': expected text"),
        ('kind = "green"', "'kind': expected one of red, blue"),
        ("fast = 1", "'fast': expected true or false"),
        ("names = [1]", "'names': expected text; got 1"),
        ("count = 1\ncount = 2", "not a readable TOML file"),
        ('name = "\udcff"', "not a readable TOML file"),  # not UTF-8
    ],
)
def test_a_wrong_recipe_is_one_line_naming_file_and_key(recipe, text, message):
    flags = recipe(text)
    error = refusal(read, *flags)
    assert message in error
    assert flags[1] in error


def test_fields_without_a_default_are_positional_and_required():
    for flags in (("--size", "4", "in", "there"), ("in", "--size", "4", "there")):
        assert read(*flags, config=Placed) == Placed(source="in", target="there", size=4)
    assert "required: TARGET" in refusal(read, "in", config=Placed)
    assert "--target" in refusal(read, "in", "--target", "there", config=Placed)
    assert "third" in refusal(read, "in", "there", "third", config=Placed)


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
@example(Settings(name='say "hi" C:\\new\\table', path="two\nlines\r\n\ttab", rate=1e-6))
@example(Settings(name="\x00\x01\x1b\x1f\x7f", path="é\U0001f600", rate=1e16, theta=0.1))
def test_to_toml_is_read_back_to_the_same_settings(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(settings), encoding="utf-8", newline="\n")
    assert read("--config", str(path)) == settings


# ---------------------------------------------------------------- how a program ends


def ending(error: BaseException | None) -> int:
    """The exit status of a program that raises this."""
    return main_in_this_process(program(mock.Mock(side_effect=error)))


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (None, 0, ""),
        (UserError("--lr is 0:\n  expected\tabove 0"), 2, "error: --lr is 0: expected above 0\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (KeyboardInterrupt("after step 3"), 130, "\nstopped: after step 3\n"),
    ],
)
def test_a_program_ends_in_one_line_on_stderr_and_a_status(error, status, shown, capsys):
    assert ending(error) == status
    assert capsys.readouterr() == ("", shown)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())


def test_a_broken_pipe_is_no_traceback():
    lines = "lambda: [print('a line', flush=True) for _ in range(100_000)]"
    process = command("-c", f"from redi.config import program; program({lines})()")
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_subcommand_is_shown_as_the_word_that_is_typed(capsys):
    with pytest.raises(SystemExit):
        read("--help", config=Subcommand)
    shown = capsys.readouterr().out
    assert " grade FILE [--flag value ...]" in shown
    assert "hidden" not in shown
    assert "required: grade, FILE" in refusal(read, config=Subcommand)


def test_help_states_every_flag_its_default_and_its_meaning(capsys):
    for flag, config in (("-h", Settings), ("--help", Placed)):
        with pytest.raises(SystemExit) as stop:
            read(flag, config=config)
        assert not stop.value.code
    shown = capsys.readouterr().out
    for text in (
        "A program.", "--config RECIPE.toml", "--count 1", "--rate 0.5", "--limit none",
        "--fast false", "(red, blue)", "SOURCE TARGET [--flag value ...]",
    ):  # fmt: skip
        assert text in shown
    [names] = [line for line in shown.splitlines() if "--names [a b]" in line]
    assert names.endswith("  list")  # a flag and its meaning share a line
