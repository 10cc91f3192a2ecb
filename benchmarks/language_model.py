"""Prune a real language model after training: methods here against plain ones, in one run.

    python benchmarks/language_model.py FOLDER --shakespeare FILE [--methods …] [--cases 0.5 2:4 …]

FOLDER is a transformers folder of a Llama-like model (SmolLM2-135M in docs/benchmarks.md). All are
calibrated on the same windows of docstrings of SciPy and scikit-learn, and judged by perplexity on
windows of Python's help topics (the same kind of text) and of tiny Shakespeare (another kind).
"plain" methods are written here as their papers have them: SparseGPT in blocks of 128 columns with
1 % damping, Wanda by rows, layer after layer on the inputs that the pruned layers before give.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import pkgutil
import pydoc_data.topics
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spartan
from spartan.weights.patterns import parse_pattern

WINDOW = 512  # tokens
DECODER = "model.layers.*"


def docstrings(package: str) -> str:
    """Return the docstrings of all functions and classes of a package, in order of names."""
    found: dict[str, str] = {}
    root = importlib.import_module(package)
    names = [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.", lambda _: None)]
    for name in sorted(names):
        if any(part.startswith("_") or part == "tests" for part in name.split(".")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                members = inspect.getmembers(importlib.import_module(name))
        except Exception:  # optional parts
            continue
        for key, member in members:
            text = (
                inspect.getdoc(member)
                if inspect.isroutine(member) or inspect.isclass(member)
                else None
            )
            if text and not key.startswith("_"):
                found.setdefault(text, f"{name}.{key}")
    return "\n\n".join(found)


def windows(tokenizer: Any, text: str, count: int) -> Tensor:
    """Return evenly spaced ones of the windows that a text divides into, (count, WINDOW)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.tensor(tokenizer(text).input_ids)
    every = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return every[:: len(every) // count][:count]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return exp of the mean loss of the next token."""
    losses = []
    for window in ids:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, window[1:]))
    return float(torch.stack(losses).mean().exp())


# Plain methods ----------------------------------------------------------------------------------


def plain(model: nn.Module, ids: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Prune every linear layer of the decoder, block after block, in place."""
    hidden: list[Any] = []
    blocks = model.model.layers

    class Stop(Exception):  # noqa: N818
        pass

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        hidden.append((args[0], kwargs))
        raise Stop

    handle = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    for window in ids:
        with contextlib.suppress(Stop):
            model(input_ids=window[None], use_cache=False)
    handle.remove()
    for block in blocks:
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        grams = {n: torch.zeros(m.in_features, m.in_features) for n, m in layers.items()}

        handles = [m.register_forward_pre_hook(adder(grams[n])) for n, m in layers.items()]
        for x, kwargs in hidden:
            block(x, **kwargs)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.weight.copy_(solve(layer.weight, grams[name]))
        for i, (x, kwargs) in enumerate(hidden):
            y = block(x, **kwargs)
            hidden[i] = (y if isinstance(y, Tensor) else y[0], kwargs)


def adder(gram: Tensor) -> Callable[[nn.Module, Any], None]:
    """Return a hook that adds the inputs of a layer to its Gram matrix."""

    def hook(_: nn.Module, args: Any) -> None:
        x = args[0].flatten(0, -2)
        gram.addmm_(x.T, x)

    return hook


def kept_of(scores: Tensor, density: float, group: int | None) -> Tensor:
    """Return which of some columns stay: 2 of 4, or the largest of all."""
    if group:
        order = scores.view(len(scores), -1, group).argsort(-1, descending=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., : group // 2], True)
        return mask.view_as(scores)
    kept = round(density * scores.numel())
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(kept).indices] = True
    return mask.view_as(scores)


def sparsegpt(w: Tensor, h: Tensor, density: float, group: int | None) -> Tensor:
    """SparseGPT as published: blocks of 128 columns, damping of 1 % of the mean diagonal."""
    w, h = w.clone(), h.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], 128):
        end = min(start + 128, w.shape[1])
        block, inner = w[:, start:end].clone(), u[start:end, start:end]
        errors = torch.zeros_like(block)
        if not group:
            mask = kept_of((block / inner.diagonal()).square(), density, None)
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)
        for j in range(end - start):
            if group and j % group == 0:
                part = slice(j, j + group)
                scores = (block[:, part] / inner.diagonal()[part]).square()
                mask[:, part] = kept_of(scores, density, group)
            column = block[:, j].clone()
            block[:, j] *= mask[:, j]
            errors[:, j] = (column - block[:, j]) / inner[j, j]
            block[:, j:] -= errors[:, j, None] * inner[j, j:] * (torch.arange(j, end - start) > j)
            block[:, j] = column * mask[:, j]
        w[:, start:end] = block
        w[:, end:] -= errors @ u[start:end, end:]
    return w


def wanda(w: Tensor, h: Tensor, density: float, group: int | None) -> Tensor:
    """Wanda as published: |w| times the norm of the input, by rows."""
    scores = w.abs() * h.diagonal().sqrt()
    if group:
        return w * kept_of(scores, density, group)
    kept = round(density * w.shape[1])
    mask = torch.zeros_like(w, dtype=torch.bool)
    return w * mask.scatter(1, scores.topk(kept, 1).indices, True)


def magnitude(w: Tensor, h: Tensor, density: float, group: int | None) -> Tensor:
    """The largest weights of the layer."""
    return w * kept_of(w.abs(), density, group)


PLAIN = {"plain sparsegpt": sparsegpt, "plain wanda": wanda, "plain magnitude": magnitude}


def prune(
    model: nn.Module, ids: Tensor, method: str, case: str, settings: dict[str, Any]
) -> nn.Module:
    """Return the model pruned by a method."""
    density, group = (0.5, 4) if case == "2:4" else (1 - float(case), None)
    if method in PLAIN:
        with torch.no_grad():
            plain(model, ids, lambda w, h: PLAIN[method](w, h, density, group))
        return model
    pattern = parse_pattern("2:4") if group else None
    return spartan.compress(
        model, {"input_ids": ids}, density=density, method=method, pattern=pattern,
        include=DECODER, batch_size=1, inplace=True, **{"allocation": "uniform", **settings},
    ).model  # fmt: skip


def load(folder: str) -> tuple[nn.Module, Any]:
    """Return the model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prune and judge, one method after the other."""
    model, tokenizer = load(args.folder)
    half = args.windows // 2
    ids = torch.cat([windows(tokenizer, docstrings(p), half) for p in ("scipy", "sklearn")])
    topics = pydoc_data.topics.topics
    texts = {
        "topics": windows(tokenizer, "\n\n".join(topics[k] for k in sorted(topics)), 8),
        "shakespeare": windows(tokenizer, Path(args.shakespeare).read_text(encoding="utf-8"), 8),
    }
    judged = {name: round(perplexity(model, t), 2) for name, t in texts.items()}
    yield {"method": "dense", "case": "", **judged, "seconds": 0}
    for case in args.cases:
        for method in args.methods:
            model, _ = load(args.folder)
            began = time.perf_counter()
            model = prune(model, ids, method, case, json.loads(args.settings))
            seconds = round(time.perf_counter() - began)
            judged = {name: round(perplexity(model, t), 2) for name, t in texts.items()}
            kept = [p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
            share = sum(int(p.count_nonzero()) for p in kept) / sum(p.numel() for p in kept)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            yield {"method": method, "case": case, **judged, "seconds": seconds,
                   "density": round(share, 6), "peak_mib": peak}  # fmt: skip


def main() -> None:
    """Print a row for each method and case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--shakespeare", required=True)
    parser.add_argument("--methods", nargs="*", default=[*PLAIN, "wanda", "sparsegpt", "alps"])
    parser.add_argument("--cases", nargs="*", default=["0.5", "0.6", "0.7", "2:4"])
    parser.add_argument("--settings", default="{}", help="of spartan.compress, as JSON")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for row in rows(args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
