"""What the tests of deployment leave out: waiting to see how busy the machine is."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spartan.deploy.accelerating.busy_warning", lambda: "")
