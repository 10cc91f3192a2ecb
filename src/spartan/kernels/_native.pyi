from collections.abc import Sequence
from typing import Annotated

import torch

class Kernels:
    class BlockedWeights:
        def __init__(
            self,
            *,
            values: torch.Tensor,
            offsets: torch.Tensor,
            starts: torch.Tensor,
            bases: torch.Tensor,
            bias: torch.Tensor,
            bundles: int,
            outputs: int,
            height: int,
        ) -> None: ...

    class SlicedWeights:
        def __init__(
            self,
            *,
            values: torch.Tensor,
            columns: torch.Tensor,
            starts: torch.Tensor,
            rows: torch.Tensor,
            bias: torch.Tensor,
            inputs: int,
            outputs: int,
        ) -> None: ...

    class Convolution:
        def __init__(
            self,
            *,
            channels: int,
            rows: int,
            images: int,
            columns: int,
            out: Sequence[int],
            kernel: Sequence[int],
            stride: Sequence[int],
            padding: Sequence[int],
            dilation: Sequence[int],
            group: int,
            height: int,
        ) -> None: ...

    @staticmethod
    def linear(
        *,
        weights: Kernels.BlockedWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        addend: torch.Tensor | None,
        inputs: int,
        feature_major: bool,
        lanes: int,
        activation: int,
        threads: int,
    ) -> None: ...
    @staticmethod
    def vector(
        *,
        weights: Kernels.SlicedWeights,
        x: torch.Tensor,
        y: torch.Tensor,
        addend: torch.Tensor | None,
        activation: int,
        threads: int,
    ) -> None: ...
    @staticmethod
    def convolution(
        *,
        weights: Kernels.BlockedWeights,
        sizes: Kernels.Convolution,
        x: torch.Tensor,
        y: torch.Tensor,
        addend: torch.Tensor | None,
        lanes: int,
        activation: int,
        threads: int,
    ) -> None: ...

    class ConnectionLines:
        def __init__(
            self,
            *,
            starts: torch.Tensor,
            others: torch.Tensor,
            order: torch.Tensor | None,
            ends: int,
            blocks: int,
            threads: int,
        ) -> None: ...

    @staticmethod
    def connections_forward(
        *,
        lines: Kernels.ConnectionLines,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        y: torch.Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def connections_backward(
        *,
        lines: Kernels.ConnectionLines,
        values: torch.Tensor,
        x: torch.Tensor,
        dy: torch.Tensor,
        dx: torch.Tensor,
        dvalues: torch.Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def connections_pairs(
        *,
        lines: Kernels.ConnectionLines,
        dy: torch.Tensor,
        x: torch.Tensor,
        dvalues: torch.Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def connections_gather_samples(*, x: torch.Tensor, out: torch.Tensor, threads: int) -> None: ...
    @staticmethod
    def connections_checksum(*, indices: torch.Tensor) -> int: ...
    @staticmethod
    def connections_transpose(
        *,
        starts: torch.Tensor,
        others: torch.Tensor,
        column_starts: torch.Tensor,
        column_lines: torch.Tensor,
        order: torch.Tensor,
    ) -> None: ...
    @staticmethod
    def connections_merge(
        *, first: torch.Tensor, second: torch.Tensor, merged: torch.Tensor, places: torch.Tensor
    ) -> None: ...
    @staticmethod
    def connections_members(
        *, keys: torch.Tensor, known: torch.Tensor, found: torch.Tensor
    ) -> None: ...
    @staticmethod
    def mix(
        *,
        of_parents: torch.Tensor,
        of_children: torch.Tensor,
        weights: torch.Tensor,
        chosen: int,
        temperature: float,
        threads: int,
    ) -> None: ...
    @staticmethod
    def lend(count: int) -> Annotated[torch.Tensor, dict(dtype="float32", shape=(None,))]: ...
    @staticmethod
    def instruction_sets() -> list[str]: ...
    @staticmethod
    def use_instruction_set(name: str) -> None: ...
    @staticmethod
    def use_runner(address: int) -> None: ...
    @staticmethod
    def finite(*, tensors: Sequence[torch.Tensor], threads: int) -> list[bool]: ...
    @staticmethod
    def scan(
        *,
        tensors: Sequence[torch.Tensor],
        scales: Sequence[float],
        costs: Sequence[float],
        absolute: bool,
        budget: float,
        bracket: tuple[float, float],
        dual: tuple[float, float, float] | None,
        dropped: bool,
        counted: bool,
        threads: int,
    ) -> tuple[bool, float, list[int], list[int], tuple[float, float, float]]: ...
    @staticmethod
    def mass(
        *,
        tensors: Sequence[torch.Tensor],
        scales: Sequence[float],
        costs: Sequence[float],
        absolute: bool,
        dual: tuple[float, float, float],
        dropped: bool,
        threads: int,
    ) -> tuple[float, float, float]: ...
    @staticmethod
    def project(
        *,
        thetas: Sequence[torch.Tensor],
        latents: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        scales: Sequence[float],
        thresholds: Sequence[float] | None,
        tie_ends: Sequence[int] | None,
        duals: Sequence[tuple[float, float, float]] | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def earn(
        *,
        grads: Sequence[torch.Tensor],
        thetas: Sequence[torch.Tensor],
        scales: Sequence[float],
        costs: Sequence[float],
        duals: Sequence[tuple[float, float, float]],
        threads: int,
    ) -> tuple[float, float]: ...
    @staticmethod
    def pull_back(
        *,
        grads: Sequence[torch.Tensor],
        thetas: Sequence[torch.Tensor],
        scales: Sequence[float],
        costs: Sequence[float],
        duals: Sequence[tuple[float, float, float]],
        price: float,
        threads: int,
    ) -> None: ...
    @staticmethod
    def damp(
        *,
        grads: Sequence[torch.Tensor],
        thetas: Sequence[torch.Tensor],
        scales: Sequence[float],
        duals: Sequence[tuple[float, float, float]],
        per_mask: Sequence[float],
        threads: int,
    ) -> None: ...
    @staticmethod
    def mask(
        *, tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], threads: int
    ) -> None: ...
    @staticmethod
    def pool_units(
        *,
        grid: Sequence[int],
        x: torch.Tensor,
        y: torch.Tensor | None,
        units: torch.Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def scale_by_units(
        *,
        grid: Sequence[int],
        theta: torch.Tensor,
        factors: torch.Tensor,
        latent: torch.Tensor | None,
        weight: torch.Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def pull_back_by_units(
        *,
        grid: Sequence[int],
        grad: torch.Tensor,
        theta: torch.Tensor,
        m: torch.Tensor,
        terms: torch.Tensor,
        threads: int,
    ) -> None: ...
