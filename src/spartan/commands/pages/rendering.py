"""HTML pages from jinja templates, complete and escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from spartan.files import write_text


def write_rendered(path: Path, template: str, **values: Any) -> None:
    """Fill in a template, named by its path below `commands`, and write the page.

    Raises:
        FileError: It cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spartan.commands", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    write_text(path, environment.get_template(template).render(**values))


def _percent(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}%}"
