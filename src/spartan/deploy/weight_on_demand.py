"""`WeightOnDemand`: the dense weight of a sparse layer, made when somebody reads its values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What a tensor says of itself without its values. Models ask for it in every forward pass, as for
# the dtype to cast their input to, so it must not cost a dense weight.
_FACTS: frozenset[Callable[..., Any]] = frozenset(
    [
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__),
        *(Tensor.ndimension, Tensor.nelement, Tensor.__hash__, Tensor.get_device),
        *(
            vars(torch._C.TensorBase)[name].__get__
            for name in (
                *("dtype", "shape", "device", "layout", "ndim", "requires_grad", "is_leaf"),
                *("grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize"),
                "nbytes",
            )
        ),
    ]
)


class WeightOnDemand(Tensor):
    """Stands for a weight: tells shape, dtype and device; everything else is done to the dense one.

    To `isinstance` it is an `nn.Parameter`, as the weight of a dense layer is.

    Args:
        shape: Of the weight.
        like: A tensor of its dtype, on its device.
        dense: Returns the dense weight, an ordinary tensor; writes into it are the layer's matter.
    """

    _is_param = True
    _dense: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[WeightOnDemand], shape: Sequence[int], like: Tensor, dense: Callable[[], Tensor]
    ) -> WeightOnDemand:
        made: WeightOnDemand = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        made._dense = dense
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return an ordinary parameter: a copy belongs to no layer."""
        return copy.deepcopy(self._dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary parameter."""
        return self._dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what needs no values; do the rest with the dense weight."""
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do with the dense weight what C++ code asks for."""
        args, kwargs = tree_map(lambda x: x._dense() if type(x) is cls else x, (args, kwargs or {}))
        return func(*args, **kwargs)
