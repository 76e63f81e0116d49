"""Digests of plain data."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest_of(data: Any) -> str:
    """SHA-256 of plain data. The order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
