"""The programs and the tools as one command; `python -m redi COMMAND` is the same.

    redi train-redi --config recipes/dpo.toml               as python train_redi.py --config ...
    torchrun --nproc_per_node 8 -m redi train-redi          the same on eight GPUs
    redi COMMAND --help                                     the settings of a command

Without a clone, recipes/NAME.toml is the one in the package (config.py).
"""

import importlib
import sys

from redi import __version__
from redi.config import UserError, program

# name -> module, function, what it does. A module is imported when its command runs: the core takes
# seconds, and what a tool needs may not be installed.
COMMANDS = {
    "train-sft": ("redi.programs", "train_sft", "stage 1: fine-tune on correct traces"),
    "train-redi": ("redi.programs", "train_redi", "stage 2: learn from right and wrong traces"),
    "evaluate": ("redi.programs", "evaluate", "sample a model on benchmarks and grade its answers"),
    "chat": ("redi.chat", "main", "talk to a model"),
    "prepare": ("redi.prepare.__main__", "main", "teachers' raw traces -> training files"),
    "show": ("redi.show.__main__", "main", "look at training rows before training"),
    "dialogue": ("redi.dialogue.__main__", "main", "tutors that talk inside a scene; their judges"),
    "toy": ("redi.toy", "main", "make a toy: traces, a student and a benchmark"),
    "study": ("redi.study.__main__", "main", "compare methods: train and evaluate a grid"),
    "curves": ("redi.runlog", "main", "draw the curves of runs"),
    "report": ("redi.eval.report", "main", "put evaluations side by side"),
    "regrade": ("redi.eval.grade", "main", "grade the answers of an evaluation again"),
    "export": ("redi.programs", "export", "make a model folder of a checkpoint"),
    "trace": ("redi.trace.__main__", "main", "what a run needs, on GPUs that are not there"),
    "doctor": ("redi.doctor.__main__", "main", "check this machine: packages, devices, numbers"),
}
SUBCOMMANDS = ("regrade",)  # words that their programs read themselves


@program
def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        lines = (f"  {name:<12}{text}\n" for name, (_, _, text) in COMMANDS.items())
        print(f"usage: redi COMMAND [--flag value ...]\n\n{''.join(lines)}\nredi COMMAND --help")
    elif name == "--version":
        print(f"redi {__version__}")
    elif name not in COMMANDS:
        raise UserError(f"{name}: no such command; `redi --help` lists them")
    else:
        module, function, _ = COMMANDS[name]
        started_as = ["redi", name] if name in SUBCOMMANDS else [f"redi {name}"]
        sys.argv = [*started_as, *arguments]
        getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
