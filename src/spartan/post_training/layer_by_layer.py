"""Pruning layer by layer: forward passes that wait before every product with a weight.

The layers of a network are pruned one after the other, each with the inputs that the pruned layers
before it give. A pass over the calibration data for every layer would cost time that is quadratic
in depth. Here every batch has a pass of its own, in a thread, that stops where a weight is about to
be read; when all of them have come to a layer, it is pruned, and the passes go on with its new
weights. Each layer is computed once, whatever the structure of the module. One thread runs at a
time, in a fixed order, so that results do not depend on timing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from spartan.example_inputs import run_on_copy
from spartan.post_training.weight_products import (
    ProductRecorder,
    WeightProduct,
    without_fused_attention,
)
from spartan.weights.prunable import Prunable

Products = tuple[WeightProduct, WeightProduct]  # of the dense network and of the pruned one


class _StoppedError(BaseException):
    """Ends a thread whose pass is no longer wanted."""


class PausedPass:
    """One forward pass; it stands before `product`, or is through when that is None.

    The pass runs in a thread, and one of the two waits at all times: `_resume` is released by the
    caller, `_arrived` by the thread, when it stands before a product or is through. Who stops a
    pass releases `_resume` until the thread has ended, as each further product would wait again.

    Args:
        model: In evaluation mode.
        batch: Its input.
        weights: Before products with these the pass stops.
    """

    def __init__(self, model: nn.Module, batch: Any, weights: Sequence[Prunable]) -> None:
        self.product: WeightProduct | None = None
        self._model, self._batch, self._weights = model, batch, weights
        self._resume, self._arrived = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Go to the first product."""
        self._thread.start()
        self.go()

    def go(self) -> None:
        """Go on to the next product."""
        self.product = None
        self._resume.release()
        self._arrived.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the pass where it stands, also if it never began, or was interrupted on its way."""
        self._stopping = True
        while self._thread.is_alive():
            self._resume.release()
            self._thread.join(0.05)
        self.product = None

    def _run(self) -> None:
        try:
            self._resume.acquire()
            with torch.no_grad(), ProductRecorder(self._weights, self._on_product):
                run_on_copy(self._model, self._batch)
        except _StoppedError:
            pass
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        finally:
            self._batch = None
            self._arrived.release()

    def _on_product(self, product: WeightProduct) -> None:
        if self._stopping:
            raise _StoppedError
        self.product = product
        self._arrived.release()
        self._resume.acquire()
        if self._stopping:
            raise _StoppedError


class LayerByLayer:
    """Passes of the dense and of the pruned model over the same batches, side by side.

    Iterating gives, layer by layer in the order of the passes, the index of a weight and, for each
    batch, the products with it: (dense, pruned), or None where the batch does not reach it. The
    pruned model's weight may be changed before the next step of the iteration. Where the pruned
    model takes another way than the dense one, as experts do that are chosen by the data, the
    dense product stands for both.

    Args:
        dense: The dense model, in evaluation mode.
        pruned: The model that is being pruned.
        batches: Calibration batches.
        weights: Weights of the dense model, and the same of the pruned one.
        order: Indices of the weights in the order in which they are to be visited.
    """

    def __init__(
        self,
        dense: nn.Module,
        pruned: nn.Module,
        batches: Sequence[Any],
        weights: tuple[Sequence[Prunable], Sequence[Prunable]],
        order: Sequence[int],
    ) -> None:
        self._order = order
        self._passes: list[tuple[PausedPass, PausedPass]] = []
        self._arguments = dense, pruned, batches, weights
        self._unfused = contextlib.ExitStack()

    def __enter__(self) -> LayerByLayer:
        self._unfused.enter_context(without_fused_attention())
        dense, pruned, batches, (ours, theirs) = self._arguments
        try:
            for batch in batches:
                # Known before they run, so that whatever interrupts can end them.
                pair = PausedPass(dense, batch, ours), PausedPass(pruned, batch, theirs)
                self._passes.append(pair)
                for one in pair:
                    one.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pair in self._passes:
            for one in pair:
                one.stop()
        self._unfused.close()

    def __iter__(self) -> Iterator[tuple[int, list[Products | None]]]:
        left = set(self._order)  # others are only reached by batches that nothing is solved with
        for index in self._order:
            for pair in self._passes:
                for one in pair:
                    while one.product is not None and one.product.index not in left:
                        one.go()
            yield index, [_products(a, b, index) for a, b in self._passes]
            left.discard(index)


def _products(dense: PausedPass, pruned: PausedPass, index: int) -> Products | None:
    first, second = dense.product, pruned.product
    if first is None or first.index != index:
        return None
    return first, second if second is not None and second.index == index else first
