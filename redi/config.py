"""One dataclass per program: its defaults, its TOML recipe, its command-line flags.

A program states its settings as a keyword-only dataclass. `parse` fills it, later wins:

    dataclass default  <  --config RECIPE.toml  <  --flag value

The help text of a field stands beside its type, `lr: Annotated[float, "peak learning rate"]`; a
subclass may restate the field with another default and inherits type and text. A field's name is
its TOML key, and with dashes its flag; a field without a default, or one annotated with
`positional` after its help, is given by place. Unknown keys and flags are errors, so a typo never
trains.

`program` is the frame every command runs in: what a user can get wrong is raised anywhere below as
`UserError` and ends here in one line on stderr and exit status 2.
Left out: nested sections, interpolation, environment variables. A recipe is a flat list of numbers.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import math
import os
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

C = TypeVar("C")
STOPPED = 75  # exit status: "try again later" among the system's own
# Marks of a field, as in Annotated[str, "help", positional].
positional = object()  # a positional argument, though it has a default
may_change = object()  # does not affect the result: may differ when a run resumes


class UserError(Exception):
    """Something the user can mend: which file, row or flag; what was expected; what to do."""


class RankError(UserError):
    """One that a single process met, of those that torchrun started: it says so itself."""


class Stopped(Exception):
    """The program was asked to stop and did so in good order; the same command goes on."""


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises UserError naming the flag."""
    if not holds:
        raise UserError(f"{_flag(name)}: expected {expected}; got {value}")


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a program's `main`: errors of the user's end in one line and exit status 2, Ctrl-C
    in one line and 130, a stop in good order in one line and 75. Of the processes that torchrun
    started on a node, which all find the same, the first one says it. A `main` that knows what is
    on disk says so in the KeyboardInterrupt it raises."""

    @functools.wraps(main)
    def framed() -> None:
        for stream in (sys.stdout, sys.stderr):  # a terminal without a character shows its number
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            main()
        except UserError as error:
            if first or isinstance(error, RankError):
                print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)
        except Stopped as stopped:
            if first:
                print(f"stopped: {one_line(str(stopped))}", file=sys.stderr)
            sys.exit(STOPPED)
        except KeyboardInterrupt as interrupt:
            print(f"\nstopped: {interrupt}" if str(interrupt) else "\nstopped", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output went away, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # a full disk, a name too long, a folder in place of a file
            named = f"{error.filename}: " if error.filename else ""
            print(f"error: {one_line(f'{named}{error.strerror or error}')}", file=sys.stderr)
            sys.exit(2)

    return framed


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- flags and recipes -> dataclass


def parse(config_class: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """Read `config_class` from a recipe and flags. Raises UserError; exits 0 after --help."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    hints, by_place = types_of(config_class), _given_by_place(config_class)
    for field in dataclasses.fields(config_class):
        kind, name = hints[field.name], field.name
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if typing.get_origin(kind) in (list, tuple):
            options |= {"nargs": "+", "action": "extend"}
        elif kind is bool:
            options |= {"nargs": "?", "const": "true"}
        elif name in by_place and not _is_required(field):
            options["nargs"] = "?"
        parser.add_argument(name if name in by_place else _flag(name), **options)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(usage(config_class, description))
        sys.exit(0)
    given = vars(parser.parse_args(arguments))
    recipe = given.pop("config")
    values = read_toml(recipe, hints) if recipe else {}
    for name, text in given.items():
        values[name] = _from_text(text, hints[name], name if name in by_place else _flag(name))
    return config_class(**values)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_toml(path: str | Path, hints: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe as field values, each checked against the field's type in `hints`."""
    return check_table(load_toml(path, f"--config {path}"), hints, str(path))


def load_toml(path: str | Path, label: str) -> dict[str, Any]:
    """A TOML file as it is. Raises UserError, which begins with `label`."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{label}: not a readable TOML file ({error})") from None


def check_table(table: dict[str, Any], hints: dict[str, Any], where: str) -> dict[str, Any]:
    """The table with each value checked against the type of its key in `hints`."""
    for key in table:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}; known keys: {', '.join(sorted(hints))}")
    return {key: _checked(v, hints[key], f"{where}: key {key!r}") for key, v in table.items()}


def to_toml(config: Any) -> str:
    """The dataclass as a TOML recipe that `parse` reads back; None is left out."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return "".join(f"{k} = {_toml_value(v)}\n" for k, v in fields.items() if v is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, which wants the delete character escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _given_by_place(config_class: type) -> set[str]:
    """Names of the fields that are positional arguments."""
    hints = _annotations(config_class).items()
    marked = {name for name, hint in hints if positional in hint.__metadata__}
    return marked | {f.name for f in dataclasses.fields(config_class) if _is_required(f)}


def types_of(config_class: type) -> dict[str, Any]:
    """Field name -> its type, without the help."""
    return {name: hint.__origin__ for name, hint in _annotations(config_class).items()}


def fields_that_may_change(config_class: type) -> set[str]:
    hints = _annotations(config_class).items()
    return {name for name, hint in hints if may_change in hint.__metadata__}


def _annotations(config_class: type) -> dict[str, Any]:
    """Field name -> its `Annotated[type, help]`, the one of the base class that has it."""
    notes: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            if typing.get_origin(hint) is typing.Annotated:
                notes[name] = hint
    return notes


def _members(kind: Any) -> tuple:
    """The types that a value may have: those of `X | Y | None`."""
    united = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if united else (kind,)


def _from_text(text: str | list[str], kind: Any, label: str) -> Any:
    """A flag's text as a value of the field's type."""
    if isinstance(text, list):
        return [_from_text(part, typing.get_args(kind)[0], label) for part in text]
    if text == "none" and type(None) in _members(kind):
        return None
    if text in ("true", "false") and kind is bool:
        return text == "true"
    for number in (int, float):
        if number in _members(kind):
            try:
                return _checked(number(text), kind, label)
            except ValueError:
                continue
    return _checked(text, kind, label)


def _checked(value: Any, kind: Any, label: str) -> Any:
    """A TOML value (or a flag's string), checked against the field's type."""
    members = _members(kind)
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            if value in typing.get_args(member):
                return value
        elif typing.get_origin(member) in (list, tuple):
            if isinstance(value, list):
                return [_checked(v, typing.get_args(member)[0], label) for v in value]
        elif type(value) is member and (member is not float or math.isfinite(value)):
            return value
        elif member is float and type(value) is int:
            return float(value)
    expected = " or ".join(_kind_name(member) for member in members)
    raise UserError(f"{label}: expected {expected}; got {value!r}")


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        return "a list"
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(kind, "none")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


# ---------------------------------------------------------------- --help


WIDTH = 110  # of a line of --help


def usage(config_class: type, description: str) -> str:
    """One screen: a flag a line, with its default and its meaning."""
    annotations, by_place = _annotations(config_class), _given_by_place(config_class)
    notes = {name: hint.__metadata__[0] for name, hint in annotations.items()}
    hints = types_of(config_class)
    spec = sys.modules["__main__"].__spec__  # None unless started with python -m
    name = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    head, places, flags = ["usage:", name], [], []
    for field in dataclasses.fields(config_class):
        default = "" if _is_required(field) else " " + _shown(field)
        if field.name in by_place:
            head.append(f"[{field.name.upper()}]" if default else field.name.upper())
            note = f"{notes[field.name]}{f' (default{default})' if default else ''}"
            places.append((field.name.upper(), note))
        else:
            note = notes[field.name] + _choices(hints[field.name])
            flags.append((_flag(field.name) + default, note))
    rows = [*places, ("--config RECIPE.toml", "read settings from a recipe; flags win"), *flags]
    width = min(max(len(left) for left, _ in rows), 36)
    lines = []
    for left, note in rows:
        first, *more = textwrap.wrap(note, WIDTH - width - 4, break_on_hyphens=False) or [""]
        lines += [f"  {left:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in more)]
    return "\n".join([" ".join([*head, "[--flag value ...]"]), description, "", *lines])


def _choices(kind: Any) -> str:
    fixed = typing.get_origin(kind) is typing.Literal
    return f" ({', '.join(typing.get_args(kind))})" if fixed else ""


def _shown(field: dataclasses.Field) -> str:
    made = field.default is dataclasses.MISSING
    default = field.default_factory() if made else field.default
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else repr(default).strip("'")
