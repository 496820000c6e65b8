"""One dataclass per program: its defaults, its TOML recipe, its command-line flags.

A program states its settings as a keyword-only dataclass. `parse` fills it, later wins:

    dataclass default  <  --config RECIPE.toml  <  --flag value

The help text of a field stands beside its type, `lr: Annotated[float, "peak learning rate"]`; a
subclass may restate the field with another default and inherits the text. A field's name is its
TOML key, and with dashes its flag. Unknown keys and flags are errors, so a typo never trains.

`program` is the frame every command runs in: what a user can get wrong is raised anywhere below as
`UserError` and ends here in one line on stderr and exit status 2.
Left out: nested sections, interpolation, environment variables. A recipe is a flat list of numbers.
"""

import argparse
import dataclasses
import functools
import inspect
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

C = TypeVar("C")


class UserError(Exception):
    """Something the user can mend: which file, row or flag; what was expected; what to do."""


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a program's `main`: errors of the user's end in one line and exit status 2,
    Ctrl-C in one line and 130. A `main` that knows what is on disk says so in the
    KeyboardInterrupt it raises."""

    @functools.wraps(main)
    def framed() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as interrupt:
            print(f"\nstopped: {interrupt}" if str(interrupt) else "\nstopped", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output went away, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return framed


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- flags and recipes -> dataclass


def parse(config_class: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """Read `config_class` from a recipe and flags. Raises UserError; exits 0 after --help.

    A field without a default is a required positional argument.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config")
    positional = [f.name for f in dataclasses.fields(config_class) if _is_required(f)]
    hints = typing.get_type_hints(config_class)
    for name, kind in hints.items():
        many = typing.get_origin(kind) in (list, tuple)
        nargs = "+" if many else "?" if _optional(kind)[0] is bool else None
        flag = name if name in positional else f"--{name.replace('_', '-')}"
        const = {"const": "true"} if nargs == "?" and name not in positional else {}
        parser.add_argument(flag, nargs=nargs, default=argparse.SUPPRESS, **const)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(usage(config_class, description))
        sys.exit(0)
    given = vars(parser.parse_args(arguments))
    recipe = given.pop("config")
    given.pop("help")
    values = read_toml(recipe, hints) if recipe else {}
    for name, text in given.items():
        label = name if name in positional else f"--{name.replace('_', '-')}"
        values[name] = _from_text(text, hints[name], label)
    return config_class(**values)


def read_toml(path: str | Path, hints: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe as field values, each checked against the field's type in `hints`."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: not a readable TOML file ({error})") from None
    for key, value in table.items():
        if key not in hints:
            raise UserError(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(hints))}")
        table[key] = _checked(value, hints[key], f"{path}: key {key!r}")
    return table


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
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return repr(value)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _optional(kind: Any) -> tuple[Any, bool]:
    """(inner type, may be None) of `X | None`."""
    if isinstance(kind, types.UnionType):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(kind))
    return kind, False


def _from_text(text: str | list[str], kind: Any, label: str) -> Any:
    """A flag's text as a value of the field's type."""
    kind, may_be_none = _optional(kind)
    if isinstance(text, list):
        element = typing.get_args(kind)[0]
        return [_from_text(t, element, label) for t in text]
    if may_be_none and text == "none":
        return None
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"{label}: expected true or false, got {text!r}")
        return text == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{label}: expected {_kind_name(kind)}, got {text!r}") from None
    return _checked(text, kind, label)


def _checked(value: Any, kind: Any, label: str) -> Any:
    """A TOML value (or a flag's string), checked against the field's type."""
    kind, _ = _optional(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            choices = ", ".join(map(str, typing.get_args(kind)))
            raise UserError(f"{label}: expected one of {choices}; got {value!r}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise UserError(f"{label}: expected a list, got {value!r}")
        return [_checked(v, typing.get_args(kind)[0], label) for v in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{label}: expected {_kind_name(kind)}, got {value!r}")
    return value


def _kind_name(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


# ---------------------------------------------------------------- --help


def usage(config_class: type, description: str) -> str:
    """One screen: a line a flag, with its default and its meaning."""
    notes: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            if typing.get_origin(hint) is typing.Annotated:
                notes[name] = hint.__metadata__[0]
    positional, rows = [], [("--config RECIPE.toml", "read settings from a recipe; flags win")]
    for field in dataclasses.fields(config_class):
        if _is_required(field):
            positional.append(field.name.upper())
            rows.insert(0, (field.name.upper(), notes[field.name]))
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        rows.append((f"--{field.name.replace('_', '-')} {_shown(default)}", notes[field.name]))
    width = min(max(len(left) for left, _ in rows), 36)
    lines = [f"  {left:<{width}}  {note}" for left, note in rows]
    name = Path(sys.argv[0]).name
    head = " ".join([f"usage: {name}", *positional, "[--config RECIPE.toml] [--flag value ...]"])
    return "\n".join([head, description, "", *lines])


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else repr(default).strip("'")
