"""`spartan evaluate`: measures a run's model on its held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from spartan.commands.accuracy import loss_and_accuracy, pick_device
from spartan.commands.images import load_data
from spartan.commands.opening import open_model
from spartan.commands.runs.facts import read_facts
from spartan.commands.runs.folder import Run
from spartan.commands.terminal.console import Terminal
from spartan.deploy import accelerate
from spartan.errors import ConfigError


@dataclass(frozen=True)
class Evaluate:
    """Measure a run's model on its held-out images."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    device: str = "auto"
    """auto, cpu, cuda, …"""
    weights: Path | None = None
    """Safetensors file to use instead of the run's own, packed or not."""
    accelerated: bool = False
    """Run the sparse layers on sparse kernels."""
    trust: bool = False
    """Call the function that a run folder names as its model, if it is not a model of spartan, timm
    or transformers: whoever wrote the folder chooses what runs."""

    def run(self) -> int:
        """Run the command."""
        run = Run.open(self.folder)
        config = run.config()
        facts = read_facts(run)
        if not facts.images:
            raise ConfigError(
                f"{str(self.folder)!r} was not calibrated with images: none can be tested."
            )
        # Sparse kernels run on the CPU.
        device = pick_device("cpu" if self.accelerated else self.device)
        data = load_data(config.data, config.image_size)
        model, _ = open_model(str(self.folder), self.weights, None, len(data.classes), self.trust)
        state = model.state_dict()
        kept = sum(int(state[layer.name].count_nonzero()) for layer in facts.layers)
        if self.accelerated:
            example = torch.zeros(config.batch_size, data.channels, data.size, data.size)
            model = accelerate(model, example, verbose=False)
        tested = facts.normalize_like(data)
        loss, accuracy = loss_and_accuracy(
            model.to(device), data.test, tested, device, config.workers
        )
        source = self.folder if self.weights is None else self.weights
        Terminal().print(
            f"{source}: step {facts.step} of {facts.total_steps}, accuracy {accuracy:.2%}, "
            f"loss {loss:.4f}, density {kept / facts.numel:.4%} ({kept:,} of {facts.numel:,} "
            "prunable weights)",
            highlight=False,
            soft_wrap=True,
        )
        return 0
