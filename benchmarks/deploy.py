"""Sparse models against dense ones and other runtimes: speed and size.

    python benchmarks/deploy.py --threads 1 2 [--deepsparse PYTHON] [--openvino PYTHON]

Models with random masks: an MLP, a ResNet-18 for 32 x 32 images, and the MLP and attention
projections of a ViT-B/16 at 197 tokens. The same weights run dense in torch, in ONNX Runtime, in
OpenVINO and in DeepSparse 1.8.0 (each in the Python that is given for it), and accelerated here.
Ratios over the better of torch and ONNX Runtime come first; sizes come beside zstd. Every side runs
alone, one after the other, on an otherwise idle machine. About fifteen minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spartan
from deploy_runtimes import median
from spartan.deploy.sizes import measure_sizes
from spartan.deploy.timing import busy_warning


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1024)
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential()
        if stride > 1:
            skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.skip = nn.Sequential(skip, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def resnet18() -> nn.Module:
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [
        Block(before, after, 1 if before == after else 2)
        for before, after in itertools.pairwise(widths)
    ]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Projections(nn.Module):
    """What a ViT-B/16 block multiplies by weights; the attention itself is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(768, 3 * 768), nn.Linear(768, 768)
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.qkv(x)[..., :768])
        return x + self.down(F.gelu(self.up(x)))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batches: tuple[int, ...]
    rows: int = 1  # of a block


CASES = [
    Case("MLP 1024-4096-4096-1024", mlp, (1024,), (1, 64)),
    Case("ResNet-18, 32 x 32", resnet18, (3, 32, 32), (1, 16)),
    Case("ViT-B/16 projections", Projections, (197, 768), (1, 16)),
    Case("ViT-B/16 projections, 16 x 1", Projections, (197, 768), (1, 16), 16),
]


def pruned(case: Case, sparsity: float) -> nn.Module:
    """Make a model with random masks; the first convolution and the classifier stay dense."""
    torch.manual_seed(0)
    model = case.make()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.numel() > 6000:
            rows = len(module.weight) // case.rows
            kept = torch.rand(rows, *module.weight.shape[1:]) >= sparsity
            module.weight.data *= kept.repeat_interleave(case.rows, 0)
            module.weight.data += 0.0  # no minus zeros
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    return model.eval()


def in_runtime(
    python: str, runtime: str, threads: int, seconds: float, files: Sequence[Path]
) -> dict[str, float]:
    script = str(Path(__file__).with_name("deploy_runtimes.py"))
    command = [python, script, runtime, str(threads), str(seconds), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{runtime} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    results: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return results


def speeds(case: Case, sparsity: float, threads: int, options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(threads)
    model = pruned(case, sparsity)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for batch in case.batches:
            x = torch.randn(batch, *case.shape)
            files.append(Path(folder) / f"{batch}.onnx")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # The older exporter: DeepSparse reads no newer files.
                torch.onnx.export(model, (x,), files[-1], opset_version=13, dynamo=False)
            fast = spartan.accelerate(model, x, seconds=options.seconds / 10, verbose=False)
            with torch.inference_mode():
                row = {
                    "torch": median(lambda: model(x), options.seconds),  # noqa: B023
                    "here": median(lambda: fast(x), options.seconds),  # noqa: B023
                }
            rows.append({"model": case.name, "sparsity": sparsity, "batch": batch, **row})
        pythons = {"onnxruntime": sys.executable}
        pythons |= {"openvino": options.openvino} if options.openvino else {}
        pythons |= {"deepsparse": options.deepsparse} if options.deepsparse else {}
        for runtime, python in pythons.items():
            times = in_runtime(python, runtime, threads, options.seconds, files)
            for row, file in zip(rows, files, strict=True):
                row[runtime] = times.get(str(file), float("nan"))
    return [{"threads": threads, **row} for row in rows]


def print_speeds(rows: list[dict]) -> None:
    others = [k for k in ("torch", "onnxruntime", "openvino", "deepsparse") if k in rows[0]]
    head = "".join(f"{f'{name}, ms':>16}" for name in others)
    print(f"{'model':30}{'sparsity':>9}{'batch':>6}{'threads':>8}"
          f"{'over dense':>12}{'over DeepSparse':>16}{'here, ms':>10}{head}")  # fmt: skip
    for row in rows:
        dense = min(row["torch"], row["onnxruntime"])
        bar = row.get("deepsparse", float("nan"))
        times = "".join(f"{1e3 * row[name]:16.2f}" for name in others)
        print(
            f"{row['model']:30}{row['sparsity']:9.0%}{row['batch']:6}{row['threads']:8}"
            f"{dense / row['here']:11.2f}x{bar / row['here']:15.2f}x"
            f"{1e3 * row['here']:10.2f}{times}",
            flush=True,
        )


def print_sizes() -> None:
    """Print sizes beside zstd, for clean zeros and for those that `weight * mask` leaves."""
    head = f"{'file':30}{'sparsity':>9}{'packed / dense':>16}"
    print(f"{head}{'zstd -12 / packed':>19}{'with minus zeros':>18}{'bytes':>14}")
    for case in (CASES[0], CASES[1]):
        for sparsity in (0.9, 0.95):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "x.safetensors"
                state = pruned(case, sparsity).state_dict()
                stored = spartan.save(state, path)
                sizes = measure_sizes(stored, path.stat().st_size, state)
                for tensor in state.values():
                    if tensor.dim() > 1:
                        tensor.copysign_(torch.randn_like(tensor))
                masked = measure_sizes(stored, path.stat().st_size, state)
            assert sizes.zstd is not None
            assert masked.zstd is not None
            print(
                f"{case.name:30}{sparsity:9.0%}{sizes.packed / sizes.dense:16.4f}"
                f"{sizes.zstd / sizes.packed:18.2f}x{masked.zstd / sizes.packed:17.2f}x"
                f"{sizes.packed:14,}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--deepsparse", help="Python with deepsparse 1.8.0")
    parser.add_argument("--openvino", help="Python with openvino")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    print(busy_warning(), end="")
    rows = [
        row
        for threads in options.threads
        for case in CASES
        for sparsity in (0.9, 0.95)
        for row in speeds(case, sparsity, threads, options)
    ]
    print_speeds(rows)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    print_sizes()


if __name__ == "__main__":
    main()
