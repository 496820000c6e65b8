"""Situational dialogue, as subcommands.

redi dialogue prepare      dialogues -> training files for tutor, student and judge
redi dialogue evaluate     tutors talk in scenarios; judged, seen and unseen topics apart
redi dialogue report       the report of an evaluation again, or two of them compared
redi dialogue agreement    how far a judge agrees with labels
"""

import importlib
import sys

from redi.config import UserError, program

SUBCOMMANDS = ("prepare", "evaluate", "report", "agreement")  # modules, imported when they run


@program
def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(f"usage: redi dialogue SUBCOMMAND [--flag value ...]\n\n{__doc__}")
    elif name not in SUBCOMMANDS:
        raise UserError(f"dialogue {name}: no such subcommand; there are {', '.join(SUBCOMMANDS)}")
    else:
        sys.argv = [f"redi dialogue {name}", *arguments]
        importlib.import_module(f"redi.dialogue.{name}").main()


if __name__ == "__main__":
    main()
