r"""Autograd function for the sparse-dense product of an always-sparse layer.

    y = W x + b
    dx = Wᵀ dy,    dθ_i = dy_b · x_a  for each connection i = (b, a),    db = Σ dy

Nothing of the size of W is formed, forward or backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spartan.errors import StateError
from spartan.kernels import connected
from spartan.kernels.connections import Connections


class Passes:
    """What backward passes went through a layer since its gradient was last cleared.

    Gradients at pairs that are not connected come from here. A backward pass adds to the running
    ones; `finish`, when its gradient has arrived, makes them done, and forgets those done before if
    the gradient had been cleared meanwhile. What is done at the step is what its gradient sums.
    """

    def __init__(self) -> None:
        self._running: list[_Pass] = []
        self._done: list[_Pass] = []

    def add(self, x: Tensor, dy: Tensor) -> None:
        """Take what a running backward pass has at hand: (panels, features, samples) each."""
        self._running.append(_Pass(x, dy, x._version))

    def finish(self, gradient: Tensor | None) -> None:
        """End a backward pass, before its gradient is added to the one there is.

        If that was cleared, the passes before were not for the coming step: it was skipped.
        """
        if gradient is None or not bool(gradient.any()):
            self._done = []
        self._done += self._running
        self._running = []

    def checked(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and gradients of the outputs.

        Raises:
            StateError: An input was overwritten since.
        """
        if any(x._version != version for x, _, version in self._done):
            raise StateError(
                f"The input of the layer of {name!r} was overwritten between backward and the "
                "optimizer's step, which grows connections by it: give the layer a copy."
            )
        return [(x, dy) for x, dy, _ in self._done]


class _Pass(NamedTuple):
    x: Tensor
    dy: Tensor
    version: int  # of x


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        connections: Connections,
        passes: Passes | None,
    ) -> Tensor:
        images = _images(x)
        parts = connected.split(images)
        ctx.save_for_backward(values, *parts)
        ctx.connections, ctx.passes, ctx.shape = connections, passes, x.shape
        outputs = [connected.multiply(connections, values, bias, part) for part in parts]
        return _like(x.shape, connected.join(outputs, images.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, *inputs = ctx.saved_tensors
        dy = _images(grad)
        parts = list(zip(inputs, connected.split(dy), strict=True))
        for x, d in parts if ctx.passes is not None else []:
            ctx.passes.add(x, d)
        dbias = dy.sum((0, 2)) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            dvalues = [connected.at_pairs(ctx.connections, x, d) for x, d in parts]
            return None, _total(dvalues), dbias, None, None
        both = [connected.gradients(ctx.connections, values, x, d) for x, d in parts]
        dx = connected.join([dx for dx, _ in both], dy.shape[0])
        return _like(ctx.shape, dx), _total([dvalues for _, dvalues in both]), dbias, None, None


# Views are made inside of the function, where they leave no nodes in the graph.
def _images(x: Tensor) -> Tensor:
    return x.t().unsqueeze(0) if x.dim() == 2 else x


def _like(shape: torch.Size, images: Tensor) -> Tensor:
    return images.squeeze(0).t() if len(shape) == 2 else images


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    connections: Connections,
    passes: Passes | None = None,
) -> Tensor:
    """Return W x + b.

    Args:
        x: (samples, inputs) or (images, inputs, samples), floating point.
        values: W at its connections, (connections,), of the same dtype and device.
        bias: (outputs,), or None.
        connections: Where W is not zero.
        passes: Where backward passes leave their inputs and gradients; None for nowhere.

    Returns:
        (samples, outputs), in which samples are neighbours in memory, or (images, outputs,
        samples).
    """
    y: Tensor = _SparseProduct.apply(  # type: ignore[no-untyped-call]
        x, values, bias, connections, passes
    )
    return y
