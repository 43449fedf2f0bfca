"""`python -m flashhead_dist.models.convert_gguf FILE.gguf FOLDER`: GGUF to safetensors.

The default model is converted in such a process of its own, so that no rank's memory grows by the
gigabytes that it takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from flashhead_dist.errors import UserError
from flashhead_dist.models.body import load_gguf_body


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
    try:
        convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
