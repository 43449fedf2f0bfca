"""A GGUF file as a transformers model: loaded dequantized, or converted to a safetensors folder.

`python -m flashhead_dist.model_source.gguf_body FILE.gguf FOLDER` converts; the default model
does it in such a process of its own, so that no rank's memory grows by the gigabytes it takes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def load_gguf_body(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model (eval mode, dense weights in `dtype`) and tokenizer of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    return model.eval(), tokenizer


def convert_gguf(path: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write model and tokenizer of a GGUF file as a Hugging Face folder."""
    model, tokenizer = load_gguf_body(path, dtype)
    # transformers keeps the model marked as quantized, and then refuses to save dense weights.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
