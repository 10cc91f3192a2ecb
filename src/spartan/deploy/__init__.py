"""From a model with zeros to a smaller file and a faster model."""

from spartan.deploy.accelerating import accelerate
from spartan.deploy.packing import load, save
from spartan.deploy.purging import purge

__all__ = ["accelerate", "load", "purge", "save"]
