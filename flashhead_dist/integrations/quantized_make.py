"""Write a W4A16 copy of a model: every linear layer but the head in four bits, rounded to nearest.

The folder is a compressed-tensors checkpoint ("pack-quantized"), which transformers and vLLM read.
Round to nearest needs no texts and is the weakest of the four-bit methods (GPTQ, arXiv 2210.17323,
table 3): it serves to time a four-bit body, and to test one, more than to be served.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.errors import UserError
from flashhead_dist.models import ModelSource, cache_root
from flashhead_dist.models.cache import make_once

GROUP_SIZE = 32
"""Columns that share a scale, by default: divides the layers of every size that Gemma-3 has."""


def default_w4a16_folder(source: ModelSource, group_size: int = GROUP_SIZE) -> Path:
    """The W4A16 copy of `source` in the cache, made there the first time."""
    name = f"{source.name.replace('/', '--')}-{source.weight_hash[:12]}-w4a16-g{group_size}"
    return make_once(
        cache_root() / "models" / name, lambda folder: write_w4a16(source, folder, group_size)
    )


def write_w4a16(source: ModelSource, folder: Path, group_size: int = GROUP_SIZE) -> None:
    """Quantize the body of `source` and write model and tokenizer to `folder`.

    The head and the input embedding stay as they are, so an index of `source` fits the copy too,
    unless `source` is a GGUF file, whose head is unpacked.

    Raises:
        UserError: compressed-tensors is missing, the body is quantized already, or group_size does
            not divide the columns of a layer.
    """
    try:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError as error:
        raise UserError(
            f"a W4A16 checkpoint needs compressed-tensors ({error}): run "
            '`pip install -e ".[quantized]"`'
        ) from error
    # In another dtype the head would have other bytes, and an index of the model would not fit.
    model, tokenizer = source.load_body(source.dtype)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"the body of {source.name} is quantized already: name a dense model")
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    wrong = next((layer for layer in layers if layer.in_features % group_size), None)
    if group_size < 1 or wrong is not None:
        columns = wrong.in_features if wrong is not None else "?"
        raise UserError(
            f"groups of {group_size} columns do not divide a layer of {columns} in {source.name}: "
            "choose another group size, such as 32"
        )
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    ignore = [name for name, module in model.named_modules() if module is head]
    # Bars of tqdm, which has no switch for them.
    with redirect_stderr(StringIO()), torch.no_grad():
        apply_quantization_config(
            model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore)
        )
        for layer in layers:
            _set_scales(layer, group_size, weights, calculate_qparams)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(str(folder))
    tokenizer.save_pretrained(folder)


def _set_scales(layer: Any, group_size: int, weights: Any, calculate_qparams: Any) -> None:
    groups = layer.weight.float().unflatten(-1, (-1, group_size))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
    layer.weight_scale.copy_(scales)
    if getattr(layer, "weight_zero_point", None) is not None:
        layer.weight_zero_point.zero_()
