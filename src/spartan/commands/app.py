"""The command line: finds the command that words name, parses its options and runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tyro

from spartan.commands.adapt.command import Adapt
from spartan.commands.bench import Bench
from spartan.commands.compress.command import Compress
from spartan.commands.doctor import Doctor
from spartan.commands.evaluate import Evaluate
from spartan.commands.export import Export
from spartan.commands.inspection import Inspect
from spartan.commands.methods import Methods
from spartan.commands.pack import Pack, Unpack
from spartan.commands.report.command import Report
from spartan.commands.train.command import Train
from spartan.commands.world.command import WORLD_COMMANDS


class Command(Protocol):
    """A frozen dataclass: its fields are the arguments, its docstring is the help."""

    def run(self) -> int:
        """Run the command and return the exit code."""


class World:
    """Learn which object influences which: train, evaluate, adapt, show; see world --help."""

    def run(self) -> int:
        """Show what there is."""
        return run_command(["world", "--help"])


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "report": Report,
    "inspect": Inspect,
    "methods": Methods,
    "compress": Compress,
    "adapt": Adapt,
    "world": World,
    "pack": Pack,
    "unpack": Unpack,
    "bench": Bench,
    "doctor": Doctor,
    "export": Export,
}


def run_command(words: Sequence[str]) -> int:
    """Parse a command line, run its command and return the exit code."""
    if words[:1] == ["world"]:
        about = "Learn which object influences which, in each state."
        return _run(WORLD_COMMANDS, "spartan world", about, words[1:])
    about = "Train, prune and ship networks at an exact sparsity."
    return _run(COMMANDS, "spartan", about, words)


def _run(
    commands: dict[str, type[Command]], prog: str, description: str, words: Sequence[str]
) -> int:
    def parse(known: dict[str, Callable[..., Any]]) -> Any:
        return tyro.extras.subcommand_cli_from_dict(
            known, prog=prog, description=description, args=words
        )

    command = parse({**commands})
    if isinstance(command, Train) or hasattr(command, "file_options"):
        # With --config or --resume, options that are not given are those of a file.
        based_on = command.file_options()
        if based_on is not None:
            kind = functools.partial(type(command), options=based_on)
            command = parse({**commands, words[0]: kind})
    code: int = command.run()
    return code
