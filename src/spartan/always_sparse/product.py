r"""Autograd function for the sparse-dense product of an always-sparse layer.

    y = W x + b
    dx = Wᵀ dy,    dθ_i = dy_b · x_a  for each connection i = (b, a),    db = Σ dy

Nothing of the size of W is formed, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spartan.errors import MethodError, StateError
from spartan.kernels import connected
from spartan.kernels.connections import Connections

# A gradient is that of some passes if the angle between them is this small: 1 - cos. Rounding of a
# number with error ε turns it by about ε² / 2, and reductions between processes may round too.
_ANGLE, _ROUNDINGS = 1e-4, 32


class Passes:
    """What backward passes went through a layer since its gradient was last cleared.

    Gradients at pairs that are not connected come from here, and so it must be known which passes
    the gradient that an optimizer uses is made of. A backward pass adds what it has at hand; when
    it has also accumulated the gradient of the values (`begin`, `finish`), it counts. Passes for
    something else (the gradient of an input, a norm that is logged) never accumulate. `explain`
    compares what is left with the gradient itself.
    """

    def __init__(self) -> None:
        self._running: list[_Pass] = []
        self._done: list[_Pass] = []
        self._cleared = True

    def add(self, x: Tensor, dy: Tensor, dvalues: Tensor) -> None:
        """Take what a backward pass has at hand.

        Args:
            x: Inputs: (panels, features, samples).
            dy: Gradients of the outputs: (panels, features, samples).
            dvalues: What it adds to the gradient of the values: (connections,).
        """
        self._running.append(_Pass(x, dy, dvalues, x._version, _graph_task()))

    def begin(self, gradient: Tensor | None) -> None:
        """Take note of the gradient there is before a backward pass adds to it."""
        self._cleared = gradient is None or not bool(gradient.any())

    def finish(self) -> None:
        """Count the backward pass that has just accumulated its gradient."""
        if self._cleared:  # the passes before were not for the coming step
            self._done = []
        self._done += [one for one in self._running if one.task == _graph_task()]
        self._running = []

    def explain(self, gradient: Tensor, mean: Callable[[Tensor], Tensor]) -> bool:
        """Keep the passes that a gradient is made of, and say whether there are such.

        The gradient may have been scaled, or its largest entries clipped. It may lack the first
        passes, where it was set to zero between them.

        Args:
            gradient: What the optimizer uses: (connections,).
            mean: Averages a tensor over processes.
        """
        if not bool(gradient.any()):
            return True
        if not self._done:
            return False
        total = torch.stack([one.dvalues for one in self._done]).double().sum(0)
        for first, one in enumerate(self._done):
            if _same_direction(gradient, mean(total.clone())):
                self._done = self._done[first:]
                return True
            total -= one.dvalues
        return False

    def checked(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return inputs and gradients of the outputs.

        Raises:
            StateError: An input was overwritten since.
        """
        if any(one.x._version != one.version for one in self._done):
            raise StateError(
                f"The input of the layer of {name!r} was overwritten between backward and the "
                "optimizer's step, which grows connections by it: give the layer a copy."
            )
        return [(one.x, one.dy) for one in self._done]


class _Pass(NamedTuple):
    x: Tensor
    dy: Tensor
    dvalues: Tensor
    version: int  # of x
    task: int


def _graph_task() -> int:
    """Return the number of the backward pass that is running."""
    number: int = torch._C._current_graph_task_id()
    return number


def _same_direction(gradient: Tensor, other: Tensor) -> bool:
    size = gradient.abs()
    below = size < size.max()  # the largest may have been clipped to this
    gradient, other = gradient[below].double(), other[below].double()
    product, norms = float(gradient @ other), float(gradient.norm() * other.norm())
    if norms == 0:
        return float(gradient.norm()) == float(other.norm())
    most = max(_ANGLE, _ROUNDINGS * torch.finfo(size.dtype).eps ** 2)
    return 1 - product / norms <= most


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
        dbias = dy.sum((0, 2)) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            dvalues = [connected.at_pairs(ctx.connections, x, d) for x, d in parts]
            dx = None
        else:
            both = [connected.gradients(ctx.connections, values, x, d) for x, d in parts]
            dx = _like(ctx.shape, connected.join([dx for dx, _ in both], dy.shape[0]))
            dvalues = [one for _, one in both]
        if ctx.passes is not None and ctx.needs_input_grad[1]:
            for (x, d), one in zip(parts, dvalues, strict=True):
                ctx.passes.add(x, d, one)
        return dx, _total(dvalues), dbias, None, None


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

    Raises:
        MethodError: It is called inside of a transform of `torch.func`.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise MethodError(
            "Always-sparse layers do not go inside of torch.func (grad, vmap, jacrev): call the "
            "model and backward() as usual, or make them dense with always_sparse.to_dense."
        )
    y: Tensor = _SparseProduct.apply(  # type: ignore[no-untyped-call]
        x, values, bias, connections, passes
    )
    return y
