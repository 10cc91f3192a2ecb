"""The options of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spartan.commands.options.train import TrainConfig, config_from_json, read_config
from spartan.errors import ConfigError, FileError, MethodError
from spartan.methods import DualAveraging, Magnitude, Spartan


def test_json_round_trip() -> None:
    config = TrainConfig(density=0.1, exclude=("head", "0.*"), method_args=("warmup=0",), seed=3)
    assert config_from_json(config.to_json(), "x") == config
    assert config_from_json("{}", "x") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object"),
        ('{"densty": 0.1}', "did you mean 'density'"),
        ('{"epochs": "ten"}', "epochs must be int"),
        ('{"amp": 1}', "amp must be bool"),
        ('{"method_args": [1]}', "list of strings"),
        ('{"density": "x"}', "density must be a number or null"),
        ('{"epochs": 0}', "--epochs 0 must be at least 1"),
        ('{"lr": -1}', "--lr -1 must be positive"),
        ('{"optimizer": "adam"}', "did you mean 'adamw'"),
    ],
)
def test_bad_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_json(text, "run.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Cannot read the config"):
        read_config(tmp_path / "no.json")
    (tmp_path / "binary.json").write_bytes(b"\xb4\x00")
    with pytest.raises(FileError, match="Cannot read the config"):
        read_config(tmp_path / "binary.json")


def test_methods_and_their_settings() -> None:
    def make(method: str, *args: str) -> object:
        return TrainConfig(method=method, method_args=args).make_method()

    assert make("spartan", "warmup=0", "beta=1,50", "beta-scale=absolute") == Spartan(
        warmup=0, beta=(1, 50), beta_scale="absolute"
    )
    assert make("dual-averaging", "backward_density=0.5") == DualAveraging(backward_density=0.5)
    assert make("magnitude", "schedule=one-shot") == Magnitude(schedule="one-shot")
    with pytest.raises(MethodError, match="did you mean 'spartan'"):
        make("spartann")
    with pytest.raises(MethodError, match="did you mean 'warmup'"):
        make("spartan", "warmpu=1")
    with pytest.raises(ConfigError, match="takes key=value"):
        make("spartan", "warmup")
    with pytest.raises(ConfigError, match="wrong type"):
        make("spartan", "warmup=long")


def test_budget_needs_a_density() -> None:
    with pytest.raises(ConfigError, match="Give --density"):
        TrainConfig().make_budget(None)


def test_every_option_is_plain_json() -> None:
    values = json.loads(TrainConfig().to_json())
    assert all(isinstance(v, str | int | float | bool | list | None) for v in values.values())
