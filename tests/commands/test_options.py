"""The options of commands, and the one reader of the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spartan.commands.options.adapt import AdaptConfig
from spartan.commands.options.compress import CompressConfig
from spartan.commands.options.files import Options, from_json, read_options, to_json
from spartan.commands.options.train import TrainConfig
from spartan.commands.options.world import WorldConfig
from spartan.errors import ConfigError, FileError, MethodError
from spartan.methods import DualAveraging, Magnitude, Spartan

EVERY: list[Options] = [
    TrainConfig(density=0.1, exclude=("head", "0.*"), method_args=("warmup=0",), seed=3),
    CompressConfig("run", "digits", sparsity=0.5, mean=(0.5,), std=(0.2,), augment=True),
    AdaptConfig("model", "texts.csv", adapter=("memory", "lora"), layers=(0, 2), lr=0.1),
    WorldConfig(env="pong", tau_factor=1.5, token_layers="last", width=16),
]


@pytest.mark.parametrize("options", EVERY, ids=lambda options: type(options).__name__)
def test_files_give_back_the_options_that_were_written(options: Options) -> None:
    assert from_json(type(options), to_json(options), "x") == options
    values = json.loads(to_json(options))
    assert all(isinstance(v, str | int | float | bool | list | None) for v in values.values())


def test_options_that_are_not_named_get_their_defaults() -> None:
    assert from_json(TrainConfig, "{}", "x") == TrainConfig()
    assert from_json(WorldConfig, '{"command": "world", "width": 8}', "x") == WorldConfig(width=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "one JSON object"),
        ('{"densty": 0.1}', "did you mean 'density'"),
        ('{"epochs": "ten"}', "epochs: Expected `int`, got `str`"),
        ('{"amp": 1}', "amp: Expected `bool`, got `int`"),
        ('{"method_args": [1]}', "Expected `str`, got `int`"),
        ('{"density": "x"}', "density: Expected `float | null`, got `str`"),
        ('{"epochs": 0}', "--epochs 0 must be at least 1"),
        ('{"lr": -1}', "--lr -1.0 must be positive"),
        ('{"optimizer": "adam"}', "did you mean 'adamw'"),
        ('{"command": "world"}', "holds the options of 'spartan world'"),
    ],
)
def test_bad_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(TrainConfig, text, "run.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [TrainConfig, CompressConfig, AdaptConfig, WorldConfig])
def test_every_command_refuses_alike(kind: type[Options]) -> None:
    with pytest.raises(ConfigError, match="unknown option 'sed'; did you mean 'seed'"):
        from_json(kind, '{"sed": 1}', "x")
    required = {"source": "a", "calibration": "b", "data": "c"}
    given = {k: v for k, v in required.items() if k in kind.__dataclass_fields__}
    with pytest.raises(ConfigError, match="seed: Expected `int`, got `str`"):
        from_json(kind, json.dumps({**given, "seed": "one"}), "x")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Cannot read the config"):
        read_options(TrainConfig, tmp_path / "no.json")
    (tmp_path / "binary.json").write_bytes(b"\xb4\x00")
    with pytest.raises(FileError, match="Cannot read the config"):
        read_options(TrainConfig, tmp_path / "binary.json")


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
