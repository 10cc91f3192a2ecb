"""`AdapterConfig` and `AddOn`: base classes of adapters on a frozen backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spartan.adapters.layers import Layer
from spartan.errors import AdapterError, did_you_mean
from spartan.registry import Registered


class AddOn(nn.Module):
    """What changes the output of a module of the backbone.

    Attributes:
        mergeable: Whether the module's weights can express it.
    """

    mergeable: ClassVar[bool] = False

    def forward(self, output: Tensor, inputs: tuple[Any, ...], module: nn.Module) -> Tensor:
        """Return the new output.

        Args:
            output: Output of the module, (..., width).
            inputs: What the module was called with.
            module: The module.
        """
        raise NotImplementedError

    def merge(self, module: nn.Module) -> None:
        """Write what this adds into the module's weights, if it is `mergeable`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Registered):
    """Base of all adapters. A method is one subclass, and its row in `ADAPTERS`.

    Attributes:
        target_layers: `"all"`; numbers of layers; the path of the list that holds the layers, where
            they are not found; or paths or globs of single modules.
        modules_to_save: Modules, by name or end of name, that are trained and saved whole: the
            head, usually.
        train_layernorm: Whether all norms are trained too.
    """

    target_layers: str | Sequence[int] | Sequence[str] = "all"
    modules_to_save: Sequence[str] = ()
    train_layernorm: bool = False

    def __post_init__(self) -> None:
        # As tuples they can be compared and written down.
        for name in ("target_layers", "modules_to_save"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise AdapterError(
                f"modules_to_save={self.modules_to_save!r} must be a list of names, such as "
                f"[{self.modules_to_save!r}]."
            )

    def add_ons(self, layers: Sequence[Layer]) -> Iterator[tuple[str, AddOn]]:
        """Yield the path of a module and what is to be added to it, in float32 on the CPU."""
        return iter(())

    def copied(self, model: nn.Module) -> list[str]:
        """Return the paths of the modules that are trained as copies."""
        paths = [path for name in self.modules_to_save for path in _find(model, name)]
        if self.train_layernorm:
            paths += norms(model)
        return outermost(paths)

    def to_dict(self) -> dict[str, Any]:
        """Return the adapter's name and settings as JSON knows them."""
        return self.settings()


def config_from(values: Mapping[str, Any], kinds: Mapping[str, type[AdapterConfig]]) -> Any:
    """Create the config that `to_dict` was called on.

    Raises:
        AdapterError: The kind or an option is unknown, or a value is out of range.
    """
    if not isinstance(values, Mapping):
        raise AdapterError(f"Settings of an adapter are names and values, not {values!r:.60}.")
    settings = dict(values)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise AdapterError(f"Unknown adapter {name!r:.60}; {did_you_mean(str(name), kinds)}")
    known = {field.name for field in dataclasses.fields(kinds[name])}
    for key in settings:
        if key not in known:
            raise AdapterError(f"{name} has no setting {key!r}; {did_you_mean(key, known)}")
    try:
        return kinds[name](**settings)
    except AdapterError:
        raise
    except (OverflowError, TypeError, ValueError) as error:
        raise AdapterError(f"A setting of {name} has the wrong type: {error}.") from error


def norms(model: nn.Module) -> list[str]:
    """Return the paths of all layer and RMS norms with parameters."""
    return [
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        and any(True for _ in module.parameters(recurse=False))
    ]


def owners(model: nn.Module) -> list[str]:
    """Return the outermost modules that own parameters themselves."""
    paths = [p for p, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    return outermost(paths)


def outermost(paths: Sequence[str]) -> list[str]:
    """Return the paths that lie in no other one, each once."""
    unique = list(dict.fromkeys(paths))
    return [p for p in unique if not any(q != p and is_inside(p, q) for q in unique)]


def initialized(weight: Tensor, std: float) -> nn.Parameter:
    """Return a parameter drawn from N(0, std²), cut at two standard deviations."""
    return nn.Parameter(nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std))


def is_inside(path: str, outer: str) -> bool:
    """Whether a path is that of a module, or lies inside it."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def require_counts(**values: object) -> None:
    """Raise `AdapterError` unless all are whole numbers of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError(f"{name}={value!r} must be a whole number of at least 1.")


def _listed(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    try:
        listed = tuple(value)
    except TypeError as error:
        raise AdapterError(f"{name}={value!r} must be a list.") from error
    if not all(isinstance(one, str | int) for one in listed):
        raise AdapterError(f"{name}={value!r} must hold names or numbers.")
    return listed


def _find(model: nn.Module, name: str) -> list[str]:
    paths = [path for path, _ in model.named_modules() if path]
    found = [path for path in paths if path == name or path.endswith("." + name)]
    if not found:
        raise AdapterError(
            f"modules_to_save names {name!r}, which {type(model).__name__} does not have; "
            + did_you_mean(name, paths)
        )
    return found


def adapter_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype to train in beside a module: at least float32."""
    dtypes = {p.dtype for p in module.parameters()}
    return torch.float64 if torch.float64 in dtypes else torch.float32
