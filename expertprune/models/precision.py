"""In which precision a device multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_NARROW = ("cuda",)  # kinds of devices with TF32


@contextlib.contextmanager
def narrow_products(device: torch.device) -> Iterator[None]:
    """On a GPU, float32 products in the block read their inputs in TF32, and add in float32.

    TF32 has the range of float32 and the digits of half precision, more than bfloat16 has. On other
    devices nothing changes. The setting is torch's own, of the whole process; behind the block it
    is what it was.
    """
    if device.type not in _NARROW:
        yield
        return
    products: Any = torch.backends.cuda.matmul
    name, narrow = ("fp32_precision", "tf32") if hasattr(products, "fp32_precision") else ("allow_tf32", True)
    before = getattr(products, name)
    setattr(products, name, narrow)
    try:
        yield
    finally:
        setattr(products, name, before)
