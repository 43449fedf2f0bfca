"""Where there is no GPU, Triton kernels run in its interpreter, on CPU tensors.

Triton reads the variable when it is first imported, its own library functions included.

A shell has its background jobs ignore Ctrl-C, and what they start as well; tests that send it to a
process of theirs want it heard.
"""

from __future__ import annotations

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
