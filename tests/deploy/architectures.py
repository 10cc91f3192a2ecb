"""Twenty small architectures of transformers and twelve convolutional blocks, and what is done.

`python -m tests.deploy.architectures` writes the table of docs/deployment.md.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spartan
from spartan.deploy.accelerating import plan_of
from spartan.deploy.comparison import relative_error
from spartan.deploy.onnx import export_onnx
from spartan.deploy.timing import Timing
from spartan.errors import SpartanError
from spartan.example_inputs import run_on

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
_MARKS = ("<!-- architectures -->\n", "<!-- end of architectures -->")
WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def ids(length: int = 8) -> Tensor:
    return torch.randint(3, 64, (2, length))


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def _language(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {
        **sizes,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **more,
    }


def _sequences(**more: Any) -> dict[str, Any]:
    layers = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    wide = {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
    return {"vocab_size": 64, "d_model": 32, **layers, **heads, **wide, **more}


_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}

# Name, class, its configuration, settings, inputs.
_MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "BERT": ("BertModel", "BertConfig", _language(), lambda: {"input_ids": ids()}),
    "RoBERTa": ("RobertaModel", "RobertaConfig", _language(), lambda: {"input_ids": ids()}),
    "DeBERTa": ("DebertaV2Model", "DebertaV2Config", _language(type_vocab_size=0),
                lambda: {"input_ids": ids()}),
    "T5": ("T5Model", "T5Config",
           {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
            "num_heads": 4},
           lambda: {"input_ids": ids(), "decoder_input_ids": ids(5), "use_cache": False}),
    "BART": ("BartModel", "BartConfig", _sequences(max_position_embeddings=64),
             lambda: {"input_ids": ids(), "use_cache": False}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config",
              {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
               **_TOKENS},
              lambda: {"input_ids": ids(), "use_cache": False}),
    "Llama, grouped queries": ("LlamaForCausalLM", "LlamaConfig", _language(**_GROUPED),
                               lambda: {"input_ids": ids(), "use_cache": False}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _language(**_GROUPED),
                lambda: {"input_ids": ids(), "use_cache": False}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", _language(**_GROUPED, num_local_experts=4),
                lambda: {"input_ids": ids(), "use_cache": False}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _language(**_GROUPED, head_dim=8),
              lambda: {"input_ids": ids(), "use_cache": False}),
    "Mamba": ("MambaForCausalLM", "MambaConfig",
              {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
              lambda: {"input_ids": ids(), "use_cache": False}),
    "ViT": ("ViTModel", "ViTConfig", _VISION, lambda: {"pixel_values": images()}),
    "Swin": ("SwinModel", "SwinConfig",
             {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
              "num_heads": [2, 4], "window_size": 4},
             lambda: {"pixel_values": images()}),
    "ConvNeXt": ("ConvNextModel", "ConvNextConfig",
                 {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
                 lambda: {"pixel_values": images()}),
    "ResNet": ("ResNetForImageClassification", "ResNetConfig",
               {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                "layer_type": "basic", "num_labels": 5},
               lambda: {"pixel_values": images()}),
    "MobileNetV2": ("MobileNetV2ForImageClassification", "MobileNetV2Config",
                    {"image_size": 32, "depth_multiplier": 0.35, "num_labels": 5},
                    lambda: {"pixel_values": images()}),
    "CLIP": ("CLIPModel", "CLIPConfig",
             {"text_config": _language(**_TOKENS), "vision_config": _VISION, "projection_dim": 16},
             lambda: {"input_ids": ids(), "pixel_values": images()}),
    "SigLIP": ("SiglipModel", "SiglipConfig",
               {"text_config": _language(**_TOKENS), "vision_config": _VISION},
               lambda: {"input_ids": ids(), "pixel_values": images()}),
    "Whisper": ("WhisperModel", "WhisperConfig",
                _sequences(max_source_positions=16, max_target_positions=16, num_mel_bins=8,
                           pad_token_id=0, decoder_start_token_id=1, **_TOKENS),
                lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids(5),
                         "use_cache": False}),
    "SegFormer": ("SegformerForSemanticSegmentation", "SegformerConfig",
                  {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1],
                   "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2],
                   "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                   "decoder_hidden_size": 32, "num_labels": 5},
                  lambda: {"pixel_values": images()}),
}  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.pool, self.conv2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.conv1(x)))
        return x + self.conv2(y * torch.sigmoid(self.excite(F.relu(self.squeeze(self.pool(y))))))


class Growing(nn.Module):
    """As DenseNet: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(28, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(40, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x))
        z = F.relu(self.conv2(torch.cat([x, y], 1)))
        return self.conv3(torch.cat([x, y, z], 1))


class Twice(nn.Module):
    """Concatenates a tensor with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x))
        return self.conv2(torch.cat([y, y], 1))


class SplitAndJoin(nn.Module):
    """As YOLO's C2f: a list of chunks grows, and is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1)
        self.inner = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.conv1(x)).chunk(2, 1))
        y.extend(layer(y[-1]) for layer in self.inner)
        return self.conv2(torch.cat(y, 1))


class Inverted(nn.Module):
    """As MobileNetV2: depthwise, between a wide and a narrow layer."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.norm2, self.project = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)))
        return x + self.project(F.relu6(self.norm2(self.depthwise(y))))


class UpAndDown(nn.Module):
    """As U-Net: a transposed convolution, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 12, 2, 2), nn.Conv2d(28, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(F.relu(self.middle(F.relu(self.down(x))))))
        return self.out(torch.cat([y, x], 1))


class Branches(nn.Module):
    """As Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(16, 8, 1)
        self.three = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(16, 8, 1))
        self.out = nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(torch.cat((self.one(x), self.three(x), self.pooled(x)), dim=1)))


class Plain(nn.Sequential):
    """A chain, and what comes in."""

    def __init__(self, *layers: nn.Module, shape: Sequence[int] = (2, 16, 8, 8)) -> None:
        super().__init__(*layers)
        self.shape = tuple(shape)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "squeeze and excitation": SqueezeExcite,
    "DenseNet": Growing,
    "concatenated with itself": Twice,
    "YOLO's C2f": SplitAndJoin,
    "inverted residual": Inverted,
    "U-Net": UpAndDown,
    "Inception": Branches,
    "group norm": lambda: Plain(
        nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    "pixel shuffle": lambda: Plain(
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1)),
    "ResNeXt": lambda: Plain(
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)),
    "Conv1d": lambda: Plain(
        nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4), shape=(2, 16, 9)),
    "Conv3d": lambda: Plain(
        nn.Conv3d(16, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, 3),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 4), shape=(2, 16, 5, 5, 5)),
}  # fmt: skip


def names() -> list[str]:
    """Return all of them."""
    return [*_MODELS, *BLOCKS]


def make(name: str) -> tuple[nn.Module, Any]:
    """Return a model with pruned outputs and single weights, and an input for it."""
    torch.manual_seed(0)
    if name in BLOCKS:
        model = BLOCKS[name]()
        example: Any = torch.randn(getattr(model, "shape", (2, 16, 8, 8)))
    else:
        import transformers

        logging.getLogger("transformers").setLevel(logging.ERROR)
        kind, config, settings, inputs = _MODELS[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
        example = inputs()
    return prune(model), example


def prune(model: nn.Module) -> nn.Module:
    """Zero half of the outputs of every layer, and two thirds of the other weights."""
    for layer in model.modules():
        if isinstance(layer, WEIGHTS):
            outputs = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            gone = torch.rand(layer.weight.shape[outputs]) < 0.5
            with torch.no_grad():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.35)
                layer.weight.transpose(0, outputs)[gone] = 0.0
                if layer.bias is not None:
                    nn.init.normal_(layer.bias)
        if type(layer).__name__ == "Conv1D":  # of transformers
            with torch.no_grad():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.35)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def sparse_wins(calls: Sequence[Callable[[], object]], *_: Any) -> list[Timing]:
    """Stand in for timing: whatever can run sparse wins."""
    for call in calls:
        call()
    return [Timing(1.0 / (i + 1), 0, 0, 1) for i in range(len(calls))]


def accelerated(name: str) -> str:
    """Accelerate with `sparse_wins`; return how many weights run sparse."""
    model, example = make(name)
    fast = spartan.accelerate(model, example, seconds=0.0, verbose=False)
    check(fast, model, example)
    layers = plan_of(fast).layers
    assert all(layer.note or layer.format != "dense" for layer in layers)
    sparse = sum(layer.format != "dense" for layer in layers)
    if not sparse:
        return f"dense: {layers[-1].note}"
    return f"{sparse} of {len(layers)}{', fused' if plan_of(fast).traced else ''}"


def purged(name: str) -> str:
    """Purge; return how many parameters are left."""
    model, example = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which layers stay
        small = spartan.purge(model, example)
    check(small, model, example)
    return f"{_count(small):,} of {_count(model):,}"


def saved(name: str) -> str:
    """Pack, unpack and load; return whether all is the same to the bit."""
    model, example = make(name)
    other, _ = make(name)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        packed, plain = Path(folder) / "packed.safetensors", Path(folder) / "plain.safetensors"
        spartan.save(model, packed)
        spartan.save(spartan.load(packed), plain, compress=False)
        spartan.load(plain, other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    with torch.inference_mode():
        assert relative_error(run_on(other, example), run_on(model, example)) == 0.0
    return "exact"


def exported(name: str) -> str:
    """Export; return which dimensions are free besides the batch, or why it was refused."""
    model, example = make(name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = export_onnx(model, example, Path(folder) / "x.onnx")
        except SpartanError as error:
            return f"refused: {error}"
    free = sum(map(len, found.free.values()))
    return f"free batch and {free} more" if free else "free batch"


def check(found: nn.Module, model: nn.Module, example: Any) -> None:
    """Assert that a model computes what another does."""
    with torch.inference_mode():
        assert relative_error(run_on(found, example), run_on(model, example)) <= 1e-5


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table_rows() -> dict[str, list[str]]:
    """Return the cells of the table in the docs, by the name of the row."""
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(_MARKS[0]) : text.index(_MARKS[1])].splitlines()[3:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


def write_table() -> None:
    """Write the table of the docs anew."""
    from unittest import mock

    lines = [
        "| model | accelerate | purge | pack, unpack, load | export |",
        "|---|---|---|---|---|",
    ]
    with (
        mock.patch("spartan.deploy.accelerating.time_side_by_side", sparse_wins),
        mock.patch("spartan.deploy.choosing.time_side_by_side", sparse_wins),
        mock.patch("spartan.deploy.accelerating.busy_warning", return_value=""),
    ):
        for name in names():
            cells = [cell(name) for cell in (accelerated, purged, saved, exported)]
            lines.append(f"| {' | '.join([name, *cells])} |")
            print(lines[-1], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(_MARKS[0]) + len(_MARKS[0]), text.index(_MARKS[1])
    PAGE.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    write_table()
