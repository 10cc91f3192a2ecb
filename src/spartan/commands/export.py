"""`spartan export`: an ONNX file, checked against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from spartan.commands.inputs import Inputs
from spartan.commands.opening import open_model
from spartan.commands.terminal.console import Terminal
from spartan.deploy.onnx import export_onnx


@dataclass(frozen=True)
class Export:
    """Write an ONNX file, and check it against ONNX Runtime."""

    model: tyro.conf.Positional[str]
    """Run folder, or a model as in `spartan train --model`."""
    onnx: Path
    """File to write."""
    input: tuple[str, ...] = ()
    """What goes in, batch first: 1x3x32x32, or input_ids=1x128:int64 mask=1x128:bool, or a function
    that returns it (package.module:function). A run knows its own."""
    weights: Path | None = None
    """Safetensors file, packed or not; a run's own weights by default."""
    classes: int = 10
    """Classes of a model by name."""
    purge: bool = True
    """Remove channels that are zero first."""
    trust: bool = False
    """Call the function that a run folder names as its model, if it is not a model of spartan, timm
    or transformers: whoever wrote the folder chooses what runs."""

    def run(self) -> int:
        """Run the command."""
        inputs = Inputs(self.input)
        opened, shape = open_model(self.model, self.weights, inputs.shape, self.classes, self.trust)
        example = inputs.make(opened, shape)
        exported = export_onnx(opened, example, self.onnx, purge=self.purge)
        Terminal().print(str(exported), highlight=False, soft_wrap=True)
        return 0
