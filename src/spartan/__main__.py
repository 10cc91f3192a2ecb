"""Entry point of the `spartan` command: errors become one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from spartan.errors import MissingExtraError, SpartanError, printable


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 128 + signal when interrupted."""
    warnings.showwarning = _show_warning
    try:
        sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))
    except SpartanError as error:
        print(printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        signum = getattr(error, "signum", None)
        sys.exit(2 if signum is None else 128 + signum)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has gone (`spartan report … | head`); the interpreter's own
        # flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _run(words: list[str]) -> int:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import tyro  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"The command line needs {error.name}: pip install 'spartan-torch[cli]'."
        ) from error
    from spartan.commands.app import run_command

    return run_command(words)


def _show_warning(message: Any, *args: Any, **kwargs: Any) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
