"""Accuracy of Spartan's default, with a sharper end, and as published; with and without norms.

    python benchmarks/beta_scale.py

scikit-learn's digits, the built-in MLP with batch norms and the same MLP without, three densities,
three seeds, 30 epochs, one recipe. Accuracy in percent, mean ± standard deviation. A run that a NaN
ended counts as chance.
"""

from __future__ import annotations

import argparse

from torch import nn

import one_run
from spartan.commands.images import ImageData, load_data
from spartan.commands.options.train import TrainConfig
from spartan.errors import NonFiniteError

ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "magnitude": ("magnitude", ()),
    "dual averaging": ("dual-averaging", ()),
    "Spartan, default (β 1 → 4)": ("spartan", ()),
    "Spartan, β 1 → 20": ("spartan", ("beta=1,20",)),
    "Spartan, published": (
        "spartan",
        ("beta_scale=absolute", "beta=1,20", "warmup=0.2", "annealing=linear"),
    ),
}
DENSITIES = (0.05, 0.02, 0.01)


def without_norms(channels: int, image_size: int, classes: int) -> nn.Module:
    """The built-in MLP, less its batch norms."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def accuracy(
    model: str, row: tuple[str, tuple[str, ...]], density: float, seed: int, data: ImageData
) -> float:
    method, settings = row
    config = TrainConfig(
        model=model, method=method, method_args=settings, density=density, epochs=30, seed=seed
    )
    try:
        return float(one_run.train(config, data)["accuracy"])
    except NonFiniteError:
        return 1 / len(data.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = load_data("digits")
    for model in ("mlp", "beta_scale:without_norms"):
        print(f"\n{model}\n\n| method | " + " | ".join(f"{d:.0%}" for d in DENSITIES) + " |")
        print("|---" * (len(DENSITIES) + 1) + "|")
        for name, row in ROWS.items():
            cells = [
                one_run.mean_and_spread(
                    [accuracy(model, row, d, seed, data) for seed in range(args.seeds)]
                )
                for d in DENSITIES
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
