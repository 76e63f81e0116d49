"""Silence lm-evaluation-harness's progress bars and warnings."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence its progress bars and warnings, unless the user asked for logs."""
    import datasets
    from tqdm.std import tqdm

    if log.isEnabledFor(logging.INFO):
        yield
        return
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    original, bars = tqdm.__init__, datasets.are_progress_bars_disabled()

    def disabled(self: Any, *args: Any, **keys: Any) -> None:
        original(self, *args, **{**keys, "disable": True})

    tqdm.__init__ = disabled
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        tqdm.__init__ = original
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
