"""The `spartan` command: finds the command that was typed, parses its options and runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class ResumableCommand(Command, Protocol):
    """A command whose options may come from a file, by --config or --resume."""

    def file_options(self) -> Any:
        """Return the options of that file; None if none is named."""


@dataclass(frozen=True)
class World:
    """Learn which object influences which: train, evaluate, adapt, show; see world --help."""

    def run(self) -> int:
        """Show what there is."""
        return run_command(["world", "--help"])


COMMANDS: dict[str, Callable[..., Command]] = {
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
    commands: dict[str, Callable[..., Command]], prog: str, description: str, words: Sequence[str]
) -> int:
    def parse(known: dict[str, Callable[..., Any]]) -> Any:
        return tyro.extras.subcommand_cli_from_dict(
            known, prog=prog, description=description, args=words
        )

    command: Command = parse({**commands})
    if isinstance(command, ResumableCommand) and (found := command.file_options()) is not None:
        # Options that are not given are those of the file: parsed once more, with these defaults.
        kind = functools.partial(commands[words[0]], options=found)
        command = parse({**commands, words[0]: kind})
    return command.run()
