"""`SparseLayer`: base of always-sparse layers; nonzero values and int32 CSR structure."""

from __future__ import annotations

import math
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from spartan.always_sparse.product import Passes, product
from spartan.always_sparse.random_graphs import random_connections
from spartan.errors import BudgetError, KernelError, StateError
from spartan.kernels.connections import Connections
from spartan.kernels.memory import sample


class SparseLayer(nn.Module):
    """A matrix of outputs x inputs of which only single connections exist.

    Attributes:
        values: One weight for each connection: (connections,), by output and then by input.
        row_starts: int32, (outputs + 1,): where the connections of each output begin in `values`.
        columns: int32, (connections,): the input of each connection.
        bias: (outputs,), or None.
    """

    values: nn.Parameter
    row_starts: Tensor
    columns: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        outputs: int,
        inputs: int,
        connections: Connections,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.matrix_shape = (outputs, inputs)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(connections.count, **made))
        if self.values.is_meta:
            raise BudgetError(
                "An always-sparse layer cannot be made on the meta device, where a graph has no "
                "place; it takes little memory anywhere else."
            )
        self.register_buffer("row_starts", connections.starts.to(self.values.device))
        self.register_buffer("columns", connections.columns.to(self.values.device))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(outputs, **made)) if bias else None
        )
        self._known: tuple[tuple[int, ...], Connections] | None = None
        self._lineage = Lineage()
        self._copied_at: int | None = None  # moves of the lineage when this layer was copied
        self._copied: Tensor | None = None  # some of the values it had then
        self.passes: Passes | None = None
        self.reset_parameters()

    @property
    def connections(self) -> Connections:
        """The graph; indices that the products need are kept until it changes."""
        stamp = self._stamp()
        if self._known is None or self._known[0] != stamp:
            found = Connections(self.row_starts, self.columns, self.matrix_shape[1])
            self._known = stamp, found
        return self._known[1]

    def _stamp(self) -> tuple[int, ...]:
        """Return what changes when the tensors of the graph are others, or are written into."""
        tensors = (self.row_starts, self.columns)
        versions = (0 if t.is_inference() else t._version for t in tensors)
        return (*map(id, tensors), *versions)

    @property
    def density(self) -> float:
        """Connections as a fraction of all pairs."""
        return self.values.numel() / math.prod(self.matrix_shape)

    def reset_parameters(self) -> None:
        """Draw values and bias uniformly from ±sqrt(3 / fan-in), each unit with its own fan-in.

        Inputs of unit variance then give outputs of unit variance (the initialisation of the code
        of Heddes et al., 2024).
        """
        with torch.no_grad():
            fan_in = self.connections.fan_in
            bound = (3 / fan_in.clamp(min=1)).sqrt().to(self.values.dtype)
            each = bound.repeat_interleave(fan_in, output_size=self.values.numel())
            self.values.uniform_(-1, 1).mul_(each)
            if self.bias is not None:
                self.bias.uniform_(-1, 1).mul_(bound)

    @torch.no_grad()
    def rewire(self, connections: Connections, values: Tensor) -> None:
        """Take other connections, with their values; `values` stays the same parameter."""
        resize(self.values, values)
        self.row_starts, self.columns = connections.starts, connections.columns
        self._known = self._stamp(), connections
        if self._copied_at is None:
            self._lineage.moves += 1
        else:
            self.begin_lineage()

    @property
    def is_copy(self) -> bool:
        """Whether this is a copy of another layer, and has not been trained itself."""
        return self._copied_at is not None

    def begin_lineage(self) -> None:
        """Let the connections of a copy move on their own from here on."""
        self._lineage.copies.discard(self)
        self._lineage, self._copied_at = Lineage(), None

    @property
    def averaged(self) -> bool:
        """Whether something writes into a copy of this layer that is not trained itself."""
        return any(layer.was_written for layer in self._lineage.copies)

    @property
    def was_written(self) -> bool:
        """Whether something has written values into this copy."""
        now = self.values.detach()
        return self._copied is not None and not torch.equal(sample(now), self._copied)

    def _require_unmixed(self) -> None:
        """Raise `StateError` if this is an average over connections that have moved."""
        moved = self._copied_at is not None and self._lineage.moves != self._copied_at
        if moved and self.was_written:
            raise StateError(
                "Values were written into this copy of an always-sparse layer, as averages of a "
                "model do, and connections of the layer have moved since it was copied: they are "
                "values of different connections. Average when connections no longer move (end=), "
                "or average always_sparse.to_dense(copy.deepcopy(model))."
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._copied_at is not None:
            self._require_unmixed()
        self.connections.require_unchanged()
        super()._save_to_state_dict(*args, **kwargs)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, were it dense."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return a dense layer with the same weights, zeros included."""

    @torch.no_grad()
    def copy_to(self, dense: nn.Module) -> None:
        """Write the weights, zeros included, and what else a dense layer shares with this one."""
        self.connections.require_unchanged()
        weight = self.connections.dense(self.values.detach()).view(self.weight_shape)
        dense.weight = nn.Parameter(weight, self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone(), self.bias.requires_grad)
        dense.train(self.training)

    def multiply(self, x: Tensor) -> Tensor:
        """Return W x + b; see `product`."""
        if self._copied_at is not None:
            self._require_unmixed()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.values.dtype)
        if x.dtype != self.values.dtype or x.device != self.values.device:
            raise RuntimeError(
                f"The input is {x.dtype} on {x.device}, the layer {self.values.dtype} on "
                f"{self.values.device}: they must agree."
            )
        if self.values.shape != self.columns.shape:
            raise StateError(
                f"The layer has {self.values.numel():,} values and {self.columns.numel():,} "
                "connections: load both from one state dict."
            )
        connections = self.connections
        connections.require_unchanged()
        y: Tensor = product(x, self.values, self.bias, connections, self.passes)
        return y

    def connections_of(self, state: Mapping[str, Any], prefix: str) -> Connections | None:
        """Return the graph of a state dict; None if the state does not hold it.

        Raises:
            StateError: It is no graph of this layer.
        """
        given = [state.get(prefix + key) for key in ("values", "row_starts", "columns")]
        if not all(isinstance(tensor, Tensor) for tensor in given):
            return None
        values, *graph = (tensor for tensor in given if tensor is not None)
        starts, columns = (tensor.to(self.values.device, copy=True) for tensor in graph)
        outputs, inputs = self.matrix_shape
        try:
            found = Connections(starts, columns, inputs)
            if (found.outputs, found.count) != (outputs, values.numel()):
                raise KernelError(
                    f"There are {values.numel():,} values, {found.count:,} columns and row_starts "
                    f"of {found.outputs:,} outputs, and the layer has {outputs:,} outputs."
                )
        except KernelError as error:
            raise StateError(
                f"The state of {prefix.rstrip('.') or 'the layer'!r} is damaged or of another "
                f"layer, and was not loaded. {error}"
            ) from error
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the state's graph, which may have another number of connections."""
        # Ordinary tensors, that can be trained, also where the state is loaded in inference mode.
        with torch.inference_mode(False):
            found = self.connections_of(state_dict, prefix)
            if found is not None:
                self.rewire(found, state_dict[f"{prefix}values"].to(self.values, copy=True))
        if found is None:  # the three go together: all are missing
            graph = {prefix + key for key in ("values", "row_starts", "columns")}
            state_dict = {key: value for key, value in state_dict.items() if key not in graph}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"bias={self.bias is not None}, connections={self.values.numel():,}, "
            f"density={self.density:.4g}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "passes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_lineage": Lineage(), **state})  # type: ignore[no-untyped-call]
        self._copied_at = self._lineage.moves
        self._copied = sample(self.values.detach())
        self._lineage.copies.add(self)
        if self.values.requires_grad:  # a copy that gets a gradient is trained itself
            copied = weakref.ref(self)
            self.values.register_post_accumulate_grad_hook(lambda _: _trained(copied()))


def _trained(layer: SparseLayer | None) -> None:
    if layer is not None and layer._copied_at is not None:
        layer.begin_lineage()


class Lineage:
    """What a layer and its copies have in common: how often connections of it have moved."""

    def __init__(self) -> None:
        self.moves = 0
        self.copies: weakref.WeakSet[SparseLayer] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lineage:
        return self

    def __reduce__(self) -> tuple[type[Lineage], tuple[()]]:
        return Lineage, ()


def resize(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, perhaps of another length."""
    if parameter.shape == values.shape:
        parameter.copy_(values)
        return
    parameter.grad = None
    # A graph that is still alive holds the node that accumulates this gradient, and with it the
    # old shape; torch makes a new one only when the dtype changes.
    other = torch.float32 if values.dtype != torch.float32 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=values.device)
    parameter.data = values


def draw_connections(
    outputs: int,
    inputs: int,
    density: float | None,
    connections_per_unit: float | None,
    connections: Connections | None,
    every_unit: bool,
) -> Connections:
    """Return the graph of a new layer: a random one, or the one that is given.

    Raises:
        BudgetError: Not one of density, connections_per_unit and connections is given, or it cannot
            be reached.
    """
    if min(outputs, inputs) < 1:
        raise BudgetError(f"A layer of {inputs} inputs and {outputs} outputs has no connections.")
    if sum(given is not None for given in (density, connections_per_unit, connections)) != 1:
        raise BudgetError("Give one of density=, connections_per_unit= and connections=.")
    if connections is not None:
        if (connections.outputs, connections.inputs) != (outputs, inputs):
            raise BudgetError(
                f"The connections are of {connections.inputs:,} inputs and "
                f"{connections.outputs:,} outputs, the layer has {inputs:,} and {outputs:,}."
            )
        return connections
    if max(outputs, inputs) >= 2**31:
        raise BudgetError("A layer has less than 2^31 inputs and outputs: indices are int32.")
    pairs = outputs * inputs
    if density is not None:
        asked, number, most, of_most = f"density={density}", density, 1, "1"
    else:
        assert connections_per_unit is not None
        asked = f"connections_per_unit={connections_per_unit}"
        number, most, of_most = connections_per_unit, inputs, f"{inputs:,} inputs"
    if not 0 < number <= most:
        raise BudgetError(f"{asked} must be more than 0 and at most {of_most}.")
    count = round(Fraction(str(number)) * (pairs // most))  # as a budget takes decimals
    if count >= 2**31:
        raise BudgetError(f"{asked} gives {count:,} connections; there can be less than 2^31.")
    fewest = outputs if every_unit else 1
    if count < fewest:
        raise BudgetError(
            f"{asked} gives {count:,} connections to {outputs:,} output units; at least {fewest:,} "
            f"are needed, a density of {fewest / pairs:.3g}."
        )
    drawn = random_connections(outputs, inputs, count, every_unit)
    warn_of_unconnected({"": drawn}, stacklevel=5)
    return drawn


def warn_of_unconnected(drawn: Mapping[str, Connections], stacklevel: int) -> None:
    """Warn of output units that nothing leads to, of layers by their names."""
    empty = {name: int((graph.fan_in == 0).sum()) for name, graph in drawn.items()}
    found = [
        f"{empty[name]:,} of {graph.outputs:,} output units{f' of {name!r}' if name else ''}"
        for name, graph in drawn.items()
        if empty[name]
    ]
    if found:
        warnings.warn(
            f"{', '.join(found)} have no connection and give their bias only. Take a higher "
            "density, or every_unit=True (--every-unit) to give each unit at least one.",
            stacklevel=stacklevel,
        )
