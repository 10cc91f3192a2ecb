"""`spartan methods`: every method, when to choose it, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from spartan import methods as registry
from spartan import post_training
from spartan.adapters import ADAPTERS
from spartan.commands.terminal.console import Terminal
from spartan.registry import Registered


@dataclass(frozen=True)
class Methods:
    """Print every method: when to choose it, its paper, and what it costs per step."""

    def run(self) -> int:
        """Run the command."""
        print_methods(Terminal())
        return 0


def print_methods(console: Console) -> None:
    """Print every method: when to choose it, what it costs, where it comes from."""
    for method in registry.available():
        _print_method(console, method, "adds")
    console.print("\nfor `spartan compress`, besides fcpts:", highlight=False)
    for solver in post_training.METHODS.values():
        if issubclass(solver, post_training.LayerSolver):
            _print_method(console, solver, "costs")
    console.print("\nfor `spartan adapt`:", highlight=False)
    for adapter in ADAPTERS.values():
        _print_method(console, adapter, "adds")


def _print_method(console: Console, method: type[Registered], verb: str) -> None:
    source = f"; {method.paper}" if method.paper else ""
    console.print(
        Text(f"{method.name:17}", style="bold"),
        f"{method.summary}\n{'':17} {verb} {method.step_cost}{source}",
        soft_wrap=True,
    )
