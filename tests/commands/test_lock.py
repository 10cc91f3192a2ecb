"""One process at a time works in a run folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spartan.commands.options.train import TrainConfig
from spartan.commands.runs.folder import Run
from spartan.commands.runs.lock import hold
from spartan.errors import ConfigError

pytest.importorskip("fcntl", reason="locks of files are those of POSIX")

HOLD = """
import sys, time
from pathlib import Path
from spartan.commands.runs.lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    hold(mine)
    hold(mine)  # again, in the same process
    first, second = other_process(mine), other_process(theirs)
    try:
        assert "Another process is working" in first.communicate(timeout=60)[1]
        assert second.stdout is not None
        assert second.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="Another process is working"):
            Run.create(TrainConfig(out=str(theirs)))
        assert not (theirs / "config.json").exists()
    finally:
        first.kill()
        second.send_signal(signal.SIGKILL)
        second.communicate()
    (theirs / ".model.safetensors.0123456789abcdef.tmp").write_text("half", encoding="utf-8")
    Run.create(TrainConfig(out=str(theirs)))
    assert [path.name for path in theirs.iterdir()] == ["config.json"]
    with pytest.raises(ConfigError, match="already holds a run"):
        Run.create(TrainConfig(out=str(theirs)))
