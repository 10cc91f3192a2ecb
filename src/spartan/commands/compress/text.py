"""Hugging Face causal language models for `spartan compress`, and calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spartan.commands.options.compress import CompressConfig
from spartan.errors import CalibrationError, ConfigError, FileError, MissingExtraError
from spartan.seeds import derive_seed


def open_text_model(config: CompressConfig) -> tuple[nn.Module, dict[str, Tensor]]:
    """Open a causal language model, and windows of a text file as its inputs.

    Returns:
        The model, and `input_ids` (samples, tokens).

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: It cannot open the model.
        CalibrationError: The text is too short.
        FileError: The text cannot be read.
    """
    name = config.source.removeprefix("transformers:")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"transformers:{name} needs transformers: pip install transformers."
        ) from error
    try:
        text = Path(config.calibration).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the text {config.calibration!r}: {error}.") from error
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(name)
    except Exception as error:
        raise ConfigError(f"transformers cannot open {name!r}: {error}") from error
    model.config.use_cache = False  # nothing is generated
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    windows = tokens[: len(tokens) // config.tokens * config.tokens].view(-1, config.tokens)
    if len(windows) < 2:
        raise CalibrationError(
            f"{config.calibration!r} has {len(tokens):,} tokens: two samples of {config.tokens} "
            "are the least. Give more text, or smaller --tokens."
        )
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "calibration", 0))
    order = torch.randperm(len(windows), generator=generator)[: config.samples]
    return model, {"input_ids": windows[order]}
