"""Where there is no GPU, Triton kernels run in its interpreter, on CPU tensors.

Triton reads the variable when it is first imported, its own library functions included.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
