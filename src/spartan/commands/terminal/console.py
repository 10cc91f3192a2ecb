"""`Terminal`: a console that prints names as they are, whatever they look like."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from spartan.errors import printable


class Terminal(Console):
    """A console on which text is text: no markup, no emoji codes, no control characters.

    Tensors, layers, runs and folders are named by others: `[/red]` in a name is no style, and
    escapes do not reach the terminal.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return text to print."""
        return super().render_str(printable(text), **settings)
