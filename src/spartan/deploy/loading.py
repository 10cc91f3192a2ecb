"""`load`: reads safetensors files, packed or not, into a model that they fit."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spartan.container import bits_of
from spartan.deploy.packed import PackedTensors
from spartan.deploy.shards import ShardedTensors, open_tensors
from spartan.errors import DeployError

_Tensors = PackedTensors | ShardedTensors


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    strict: bool = True,
    max_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Read a safetensors file, packed or ordinary.

    Everything is checked before the model is changed. A file fits if it has each tensor of the
    model under one of its names: a tied one needs to be there once. Names may lack or have the
    prefixes that DistributedDataParallel and torch.compile add, `module.` and `_orig_mod.`.

    Args:
        path: The file; the index of several (`model.safetensors.index.json`); or a folder.
        model: If given, its tensors are overwritten, one at a time.
        strict: Whether the file must have all tensors of the model and no others; without, those
            that only one side has are named in a warning, and left.
        max_bytes: What the packed tensors of a file may take together; by default 1,000 times the
            size of the file, or 64 MiB for small ones.

    Returns:
        The tensors by name; with a model, its state dict.

    Raises:
        FileError: The file is missing, damaged or contradicts itself.
        DeployError: It is not a file of this model: names, shapes or values do not fit, or it has
            two different tensors for one.
    """
    tensors = open_tensors(path, max_bytes)
    if model is None:
        own = {name: tensors[name] for name in tensors if name not in tensors.aliases}
        return {name: own[tensors.aliases.get(name, name)] for name in tensors}
    state = model.state_dict()
    _check_own(model, state)
    targets = _targets(tensors, state)
    _check_names(tensors, state, targets, strict)
    for name, target in targets.items():
        _check_fit(tensors, name, target, state[target])
    tensors.check()
    with torch.no_grad():
        _check_values(tensors, state, targets)
        _check_shared(tensors, state, targets)
        for name, target in targets.items():
            state[target].copy_(tensors[name])
    return state


def _targets(tensors: _Tensors, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each tensor of the file that the model has, its name there."""
    same = {name: name for name in tensors if name in state}
    bare = {_bare(name): name for name in state}
    if len(same) == len(tensors) or len(bare) < len(state):
        return same
    wrapped = {name: bare[_bare(name)] for name in tensors if _bare(name) in bare}
    one_each = len(set(wrapped.values())) == len(wrapped)
    return wrapped if one_each and len(wrapped) > len(same) else same


def _bare(name: str) -> str:
    """Return a name without what wrappers put before it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _check_names(
    tensors: _Tensors, state: Mapping[str, Tensor], targets: Mapping[str, str], strict: bool
) -> None:
    given = {_place(state[target]) for target in targets.values()}
    # Older files do not count batches; like torch, leave the model's own count.
    missing = [
        name
        for name, tensor in state.items()
        if name not in targets.values()
        and _place(tensor) not in given
        and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in tensors if name not in targets]
    if not missing and not unknown:
        return
    told = f"it lacks {_some(missing)} and has {_some(unknown)} besides"
    if strict:
        raise DeployError(
            f"{str(tensors.path)!r} is not a file of this model: {told}. strict=False leaves those."
        )
    warnings.warn(f"{str(tensors.path)!r} was loaded in part: {told}.", UserWarning, stacklevel=3)


def _some(names: Sequence[str]) -> str:
    return f"{sorted(names)[:5]}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def _place(tensor: Tensor) -> object:
    """Return what tied tensors have in common; of empty ones, nothing is."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_own(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse models whose state is made for the occasion: writing into it would do nothing."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())
           if not x.is_meta and not is_lazy(x)}  # fmt: skip
    for name, tensor in state.items():
        made = not isinstance(tensor, Tensor) or is_lazy(tensor)
        if not made and tensor.numel() and not tensor.is_meta:
            made = tensor.untyped_storage().data_ptr() not in own
        if made:
            raise DeployError(
                f"{name!r} of the model's state is no tensor of the model (extra state, a hook, or "
                "a lazy layer): use model.load_state_dict(spartan.load(path)) instead."
            )


def _check_fit(tensors: _Tensors, name: str, target: str, tensor: Tensor) -> None:
    writable = not tensor.is_meta and (0 not in tensor.stride() or tensor.numel() < 2)
    if not writable:
        raise DeployError(
            f"{target!r} of the model cannot be written: it is expanded or on the meta device."
        )
    if tuple(tensor.shape) != tensors.shapes[name]:
        raise DeployError(
            f"{str(tensors.path)!r} is not a file of this model: {name!r} has shape "
            f"{tensors.shapes[name]} in the file and {tuple(tensor.shape)} in the model."
        )
    wide, own = _rank(tensors.dtype(name)), _rank(tensor.dtype)
    if wide > own:
        raise DeployError(
            f"{str(tensors.path)!r} is not a file of this model: {name!r} is "
            f"{tensors.dtype(name)} in the file and {tensor.dtype} in the model."
        )


def _rank(dtype: torch.dtype) -> int:
    """Order kinds of numbers: those of the lower kinds can be held by the higher ones."""
    return 2 if dtype.is_complex else int(dtype.is_floating_point)


def _check_values(
    tensors: _Tensors, state: Mapping[str, Tensor], targets: Mapping[str, str]
) -> None:
    """Refuse values that would become others: infinite, wrapped around, or rounded integers."""
    for name, target in targets.items():
        dtype = state[target].dtype
        if tensors.dtype(name) is dtype:
            continue
        given = tensors[name]
        if not _fits(given, dtype):
            raise DeployError(
                f"{str(tensors.path)!r} does not fit this model: {name!r} is {given.dtype} in the "
                f"file and holds values that {dtype} cannot. Load into a model of {given.dtype}."
            )


def _fits(given: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds these values, floats but for rounding."""
    try:
        held = given.to(dtype)
        if not given.is_floating_point() and not given.is_complex():
            limits = None if dtype.is_floating_point or dtype is torch.bool else torch.iinfo(dtype)
            inside = limits is None or not given.numel() or given.dtype is torch.bool or (
                limits.min <= int(given.min()) and int(given.max()) <= limits.max
            )  # fmt: skip
            return inside and torch.equal(held.to(given.dtype), given)
        # In the widest numbers there are, so that the comparison itself overflows nothing.
        a, b = held.to(torch.complex128), given.to(torch.complex128)
    except (NotImplementedError, RuntimeError):
        return False  # torch does not convert every dtype
    real, wanted = torch.view_as_real(a), torch.view_as_real(b)
    if not torch.equal(real.isnan(), wanted.isnan()) or not torch.equal(
        real.isinf(), wanted.isinf()
    ):
        return False
    finite = wanted.isfinite()
    # Rounding to the shortest mantissas moves a number by less than half; what is smaller than a
    # dtype resolves becomes 0. A lost sign or a limit moves it by more.
    small = 2 * torch.finfo(dtype).tiny
    return torch.allclose(real[finite], wanted[finite], rtol=0.5, atol=small)


def _check_shared(
    tensors: _Tensors, state: Mapping[str, Tensor], targets: Mapping[str, str]
) -> None:
    """Refuse two different tensors for memory that the model has once."""
    sharing: dict[object, list[str]] = defaultdict(list)
    for name, target in targets.items():
        if state[target].numel():
            storage = state[target].untyped_storage()
            sharing[state[target].device, storage.data_ptr()].append(name)
    for names in sharing.values():
        if len(names) < 2 or not _overlap(state[targets[name]] for name in names):
            continue
        memory = state[targets[names[0]]].untyped_storage().clone()
        views = {name: _on(memory, state[targets[name]]) for name in names}
        for name, view in views.items():
            view.copy_(tensors[name])
        for name, view in views.items():
            if not np.array_equal(bits_of(view), bits_of(tensors[name].to(view))):
                others = [other for other in names if other != name]
                raise DeployError(
                    f"{str(tensors.path)!r} has different values for {name!r} and {others[0]!r}, "
                    "which the model holds in one tensor: untie them in the model, or leave one "
                    "out of the file."
                )


def _overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors of one storage may have elements in common."""
    spans = []
    for x in tensors:
        begin = x.storage_offset() * x.element_size()
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        spans.append((begin, begin + reach * x.element_size()))
    spans.sort()
    return any(first[1] > second[0] for first, second in pairwise(spans))


def _on(memory: torch.UntypedStorage, like: Tensor) -> Tensor:
    """Return a tensor on other memory, where `like` is on its own."""
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return empty.set_(memory, like.storage_offset(), like.shape, like.stride())
