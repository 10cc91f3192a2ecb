"""Deployment of sparse models: packed files, sparse inference, channel removal, ONNX."""

from spartan.deploy.accelerating import accelerate
from spartan.deploy.loading import load
from spartan.deploy.packing import save
from spartan.deploy.removing import purge

__all__ = ["accelerate", "load", "purge", "save"]
