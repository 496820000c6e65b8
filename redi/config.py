"""One dataclass per program: its defaults, its TOML recipe and its command-line flags.

A program declares its settings as a keyword-only dataclass. `parse` fills it; later sources win:

    dataclass default  <  --config RECIPE.toml  <  --flag value

A field's help text is part of its annotation, `lr: Annotated[float, "peak learning rate"]`; a
subclass that restates the field with another default inherits type and help. A field's name is its
TOML key and, with dashes, its flag. A field is a positional argument if it has no default or is
marked `positional`. Unknown keys and flags are errors, so a typo never trains a model.

`program` wraps the main of every command: a mistake of the user is raised as a `UserError`,
anywhere below, and ends there as one line on stderr and exit status 2.
Left out: nested sections, interpolation, environment variables. A recipe is a flat list of values.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

C = TypeVar("C")
STOPPED = 75  # exit status for "try again later" (EX_TEMPFAIL of sysexits.h)
# Marks of a field, as in Annotated[str, "help", positional].
positional = object()  # a positional argument although it has a default
may_change = object()  # does not affect the result: may differ when a run resumes


class UserError(Exception):
    """A mistake that the user can fix: which file, row or flag; what was expected; what to do."""


class RankError(UserError):
    """A UserError that only one of torchrun's processes met, so that process reports it itself."""


class Stopped(Exception):
    """The program was asked to stop and saved its state; the same command resumes."""


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise a UserError that names the flag, unless the condition holds."""
    if not holds:
        raise UserError(f"{_flag(name)}: expected {expected}; got {value}")


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a program's `main`, so that it ends in one line on stderr instead of a traceback.

    Exit status: 2 after a UserError or OSError, 75 when Stopped, 130 after Ctrl-C, 1 after a broken
    pipe. All processes of a node meet the same UserError, so only local rank 0 prints it. A
    KeyboardInterrupt may carry a message, such as what is saved on disk; it is printed too.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        for stream in (sys.stdout, sys.stderr):  # escape what the terminal's encoding cannot print
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        is_local_rank_zero = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            main()
        except UserError as error:
            _end(2, f"error: {error}", is_local_rank_zero or isinstance(error, RankError))
        except Stopped as stopped:
            _end(STOPPED, f"stopped: {stopped}", is_local_rank_zero)
        except KeyboardInterrupt as interrupt:
            print(file=sys.stderr)  # ends the line on which the terminal shows ^C
            _end(130, f"stopped: {interrupt}" if str(interrupt) else "stopped")
        except BrokenPipeError:  # the reader of our output is gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # a full disk, a name too long, a folder in place of a file
            name = f"{error.filename}: " if error.filename else ""
            _end(2, f"error: {name}{error.strerror or error}")

    return wrapped


def _end(status: int, message: str, shown: bool = True) -> NoReturn:
    if shown:
        print(one_line(message), file=sys.stderr)
    sys.exit(status)


def one_line(text: str) -> str:
    return " ".join(text.split())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- flags and recipes -> dataclass


def parse(config_class: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """Read `config_class` from a recipe and flags. Raises UserError; exits with 0 after --help."""
    given = vars(_parser_for(config_class, description).parse_args(argv))
    values, recipe = {}, given.pop("config")
    if recipe:
        table = load_toml(recipe, f"--config {recipe}")
        values = check_table(table, types_of(config_class), recipe)
    return config_class(**values | given)


def _parser_for(config_class: type, description: str) -> argparse.ArgumentParser:
    spec = sys.modules["__main__"].__spec__  # None unless started with python -m
    parser = _Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=f"{description} Flags are listed with their defaults.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE.toml", help="settings; flags override them")
    usage, hints = "%(prog)s", _annotations(config_class)
    for field in dataclasses.fields(config_class):
        kind, (text, *marks) = hints[field.name].__origin__, hints[field.name].__metadata__
        default = field.default if field.default_factory is MISSING else field.default_factory()
        # A flag that is not given must not override the recipe, so argparse has no defaults.
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if typing.get_origin(kind) is Literal:
            text += f" ({', '.join(typing.get_args(kind))})"
        elif typing.get_origin(kind) is list:
            [kind] = typing.get_args(kind)
            options |= {"nargs": "+", "action": "extend"}
        elif kind is bool:
            options |= {"nargs": "?", "const": "true"}
        name, metavar = field.name, field.name.upper()
        if default is MISSING:
            usage += f" {metavar}"
        elif positional in marks:
            usage += f" [{metavar}]"
            text += f" (default: {_shown(default)})"
            options |= {"nargs": "?"}
        else:
            name, metavar = _flag(field.name), _shown(default)
        options |= {"metavar": metavar, "help": text.replace("%", "%%")}
        parser.add_argument(name, type=functools.partial(_from_text, kind=kind), **options)
    parser.usage = f"{usage} [--flag value ...]"
    return parser


def _shown(default: Any) -> str:
    return "none" if default is None else re.sub('[",]', "", _toml_value(default))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


class _HelpFormatter(argparse.HelpFormatter):
    """One line per flag: the flag with its default, then its meaning."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.metavar  # the default as it is, without [] and ...


def _from_text(text: str, kind: Any) -> Any:
    """A flag's text as a value of type `kind`: a word like none, a number, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    for read in (words.__getitem__, int, float):
        with contextlib.suppress(KeyError, ValueError, argparse.ArgumentTypeError):
            return _checked(read(text), kind)
    return _checked(text, kind)


def _checked(value: Any, kind: Any) -> Any:
    """`value` if its type is `kind`; an int becomes a float where only a float fits.

    Raises ArgumentTypeError, which argparse turns into an error that names the flag.
    """
    in_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    members = typing.get_args(kind) if in_union else (kind,)
    for member in members:
        if typing.get_origin(member) is list and isinstance(value, list):
            return [_checked(v, typing.get_args(member)[0]) for v in value]
        if typing.get_origin(member) is Literal and value in typing.get_args(member):
            return value
        if member is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if member is type(value) and member is not float:
            return value
    expected = " or ".join(_kind_name(member) for member in members)
    raise argparse.ArgumentTypeError(f"expected {expected}; got {value!r}")


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return "a list" if typing.get_origin(kind) is list else names.get(kind, "none")


def load_toml(path: str | Path, label: str) -> dict[str, Any]:
    """The content of a TOML file. Raises UserError, whose message begins with `label`."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{label}: not a readable TOML file ({error})") from None


def check_table(table: dict[str, Any], kinds: dict[str, Any], where: str) -> dict[str, Any]:
    """The table, each value checked against the type of its key in `kinds`.

    Raises UserError for an unknown key or a wrong type; `where` begins its message.
    """
    checked = {}
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join(sorted(kinds))
            raise UserError(f"{where}: unknown key {key!r}; known keys: {known}")
        try:
            checked[key] = _checked(value, kinds[key])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: key {key!r}: {error}") from None
    return checked


def to_toml(config: Any) -> str:
    """The dataclass as a TOML recipe that `parse` reads back; fields that are None are left out."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return "".join(f"{k} = {_toml_value(v)}\n" for k, v in fields.items() if v is not None)


def _toml_value(value: bool | int | float | str | list) -> str:
    # TOML writes these values as JSON does, but the delete character must be escaped as well.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---------------------------------------------------------------- fields of a config class


def types_of(config_class: type) -> dict[str, Any]:
    """Field name -> its type, without the help."""
    return {name: hint.__origin__ for name, hint in _annotations(config_class).items()}


def fields_that_may_change(config_class: type) -> set[str]:
    hints = _annotations(config_class).items()
    return {name for name, hint in hints if may_change in hint.__metadata__}


def _annotations(config_class: type) -> dict[str, Any]:
    """Field name -> its Annotated[type, help, ...], inherited where a subclass restates a field."""
    found: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        hints = inspect.get_annotations(base).items()
        found |= {name: hint for name, hint in hints if typing.get_origin(hint) is Annotated}
    return found
