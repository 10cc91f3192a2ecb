"""From a model with zeros to a smaller file and a faster model."""

from spartan.deploy.accelerate import accelerate

__all__ = ["accelerate"]
