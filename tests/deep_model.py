"""A model with enough layers to lie on several GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch


def write_deep(folder: Path) -> Path:
    """Write a random model of 12 layers with the built-in model's tokenizer: one whose layers lie
    on several GPUs where `auto` spreads them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvqtool.models import builtin_folder

    folder.mkdir()
    for path in builtin_folder().glob("tokenizer*"):
        shutil.copy(path, folder)
    config = AutoConfig.from_pretrained(builtin_folder())
    config.num_hidden_layers, config.tie_word_embeddings = 12, False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
