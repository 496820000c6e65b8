"""One dataclass per program: its defaults, its TOML recipe and its command-line flags.

A program declares its settings as a keyword-only dataclass. `parse` fills it; later sources win:

    dataclass default  <  --config RECIPE.toml  <  --flag value

A field's help text is part of its annotation, `lr: Annotated[float, "peak learning rate"]`; a
subclass that restates the field with another default inherits type and help. A field's name is its
TOML key and, with dashes, its flag. A field is a positional argument if it has no default. Unknown
keys and flags are errors, so a typo never trains a model.
Left out: nested sections, interpolation, environment variables. A recipe is a flat list of values.
"""

import argparse
import contextlib
import functools
import inspect
import json
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

C = TypeVar("C")
# Where recipes/ is: an installed package holds it, in a clone it lies beside the package.
HOMES = Path(__file__).parent, Path(__file__).parents[1]
# Annotated[int, "help", may_change]: does not affect the result, may differ when a run resumes.
may_change = object()


class UserError(Exception):
    """A mistake that the user can fix: which file, row or flag; what was expected; what to do."""


class RankError(UserError):
    """A UserError that only one of torchrun's processes met, so that process reports it itself."""


class Stopped(Exception):
    """The program was asked to stop and saved its state; the same command resumes."""


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise a UserError that names the flag, unless the condition holds."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}; got {value}")


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a program's `main`, so that it ends in one line on stderr instead of a traceback.
    Exit status: 2 after a UserError or OSError, 75 after Stopped, 130 after Ctrl-C, 1 after a
    broken pipe. All processes of a node meet the same UserError, so only local rank 0 prints it."""

    @functools.wraps(main)
    def wrapped() -> None:
        if hasattr(sys.stdout, "reconfigure"):  # escape what the terminal's encoding cannot print
            sys.stdout.reconfigure(errors="backslashreplace")
        is_local_rank_zero = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            main()
        except UserError as error:
            _end(2, f"error: {error}", is_local_rank_zero or isinstance(error, RankError))
        except Stopped as stopped:
            _end(os.EX_TEMPFAIL, f"stopped: {stopped}", is_local_rank_zero)
        except KeyboardInterrupt as interrupt:
            print(file=sys.stderr)  # ends the line on which the terminal shows ^C
            _end(130, f"stopped: {interrupt}" if str(interrupt) else "stopped")
        except ModuleNotFoundError as error:  # a package that only some programs need
            package = (error.name or "redi").partition(".")[0]
            if package == "redi":
                raise
            hint = f"error: {package} is not installed; pip install {package}"
            _end(2, hint, is_local_rank_zero)
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


def parse(config_class: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """Read `config_class` from a recipe and flags. Raises UserError; exits with 0 after --help."""
    flags = vars(_parser_for(config_class, description).parse_args(argv))
    recipe, *others = flags.pop("config") or [None]
    require(not others, "config", f"{recipe} and {others}", "one recipe")
    table = load_toml(recipe, f"--config {recipe}") if recipe else {}
    return config_class(**check_table(table, types_of(config_class), recipe) | flags)


def _parser_for(config_class: type, description: str) -> argparse.ArgumentParser:
    name = os.path.basename(sys.argv[0])  # "redi COMMAND" if redi/__main__.py runs it
    spec = sys.modules["__main__"].__spec__  # None unless started with python -m
    if spec and name.split()[0] != "redi":
        name = f"python -m {spec.name.removesuffix('.__main__')}"
    parser = _Parser(
        prog=name,
        description=f"{description} Flags are listed with their defaults.",
        formatter_class=functools.partial(_HelpFormatter, max_help_position=36, width=100),
        allow_abbrev=False,
    )
    recipe = {"metavar": "RECIPE.toml", "help": "settings; flags override them"}
    parser.add_argument("--config", action="append", **recipe)
    usage, hints = "%(prog)s", _hints(config_class)
    for field in fields(config_class):
        kind, (text, *_) = hints[field.name].__origin__, hints[field.name].__metadata__
        default = field.default if field.default_factory is MISSING else field.default_factory()
        # A flag that is not given must not override the recipe, so argparse has no defaults.
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        name, metavar = field.name, field.name.upper()
        if get_origin(kind) is Literal and len(get_args(kind)) == 1:  # a subcommand
            [metavar], text = get_args(kind), argparse.SUPPRESS
        elif get_origin(kind) is Literal:
            text += f" ({', '.join(get_args(kind))})"
        elif get_origin(kind) is list:
            [kind] = get_args(kind)
            options |= {"nargs": "+", "action": "extend"}
        elif kind is bool:
            options |= {"nargs": "?", "const": "true"}
        if default is MISSING:
            usage += f" {metavar}"
        else:
            dashes = "--" if len(name) > 1 else "-"
            name, metavar = f"{dashes}{name.replace('_', '-')}", _shown(default)
        options |= {"metavar": metavar, "help": text.replace("%", "%%")}
        parser.add_argument(name, type=functools.partial(_from_text, kind=kind), **options)
    parser.usage = f"{usage} [--flag value ...]"
    return parser


def _shown(default: Any) -> str:
    return "none" if default is None else json.dumps(default).replace('"', "").replace(",", "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


class _HelpFormatter(argparse.HelpFormatter):
    """One line per flag: the flag with its default, then its meaning."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return action.metavar  # the default as it is, without [] and ...


def _from_text(text: str, kind: Any) -> Any:
    """A flag's text as a value of type `kind`: a word like none, a number, or the text itself."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"expected text in UTF-8; got {text!r}")
    words = {"true": True, "false": False, "none": None}
    for read in (words.__getitem__, int, float):
        with contextlib.suppress(KeyError, ValueError, argparse.ArgumentTypeError):
            return _checked(read(text), kind)
    return _checked(text, kind)


def _checked(value: Any, kind: Any) -> Any:
    """`value` if it has the type `kind`; an int may become a float. Raises ArgumentTypeError."""
    members = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    for member in members:
        if get_origin(member) is list and isinstance(value, list):
            return [_checked(v, get_args(member)[0]) for v in value]
        if get_origin(member) is Literal and value in get_args(member):
            return value
        if member is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if member is type(value) and member is not float:
            return value
    expected = " or ".join(_kind_name(member) for member in members)
    raise argparse.ArgumentTypeError(f"expected {expected}; got {value!r}")


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    names |= {dict: "a table"}
    return "a list" if get_origin(kind) is list else names.get(kind, "none")


def recipe_path(path: str | Path) -> Path:
    """The path, or redi's own recipe of this name if there is none in the working folder."""
    path = Path(path)
    if path.parts[:1] == ("recipes",) and not path.exists():
        path = next((own for own in (folder / path for folder in HOMES) if own.exists()), path)
    return path


def load_toml(path: str | Path, label: str) -> dict[str, Any]:
    """Read a TOML file. Raises UserError: `label`, then what is wrong."""
    try:
        return tomllib.loads(recipe_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{label}: not a readable TOML file ({error})") from None


def check_table(table: dict[str, Any], kinds: dict[str, Any], where: str) -> dict[str, Any]:
    """The table, checked against `kinds` (key -> type). Raises UserError: `where`, then the key."""
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
    items = asdict(config).items()
    lines = (f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in items if v is not None)
    # TOML writes these values as JSON does, but the delete character must be escaped as well.
    return "".join(lines).replace("\x7f", "\\u007f")


def types_of(config_class: type) -> dict[str, Any]:
    """Field name -> its type, without the help."""
    return {name: hint.__origin__ for name, hint in _hints(config_class).items()}


def fields_that_may_change(config_class: type) -> set[str]:
    """The fields marked `may_change`."""
    return {name for name, hint in _hints(config_class).items() if may_change in hint.__metadata__}


def _hints(config_class: type) -> dict[str, Any]:
    """Field name -> its Annotated[type, help, ...], inherited where a subclass restates a field."""
    bases = reversed(config_class.__mro__)
    hints = chain.from_iterable(inspect.get_annotations(base).items() for base in bases)
    return {name: hint for name, hint in hints if get_origin(hint) is Annotated}
