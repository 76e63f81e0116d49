"""Peer methods of one-shot structured pruning, in memory.

Each is a function `(model, batches, fraction, seed) -> (model, removed)`:

- `model`: a running transformers model (`expertprune.models.loading.load_model`), pruned in
  place;
- `batches`: calibration text (`expertprune.corpora.batches.make_batches`), the same for every
  method;
- `fraction`: of the FFN neurons. Every method is asked to remove as many parameters as they have,
  be it as FFN neurons, layers or residual channels;
- `seed`: where chance plays a part;
- `removed`: the parameters that the network no longer has, less those that the method added.

All are written anew from their papers. Where a paper leaves something open, its published code
decides. Each says where it deviates.
"""

import functools
from collections.abc import Callable
from typing import Any

from .common import Pruned
from .fluctuation import flap
from .layer_removal import shortgpt
from .least_squares import flap_least_squares, wanda_sp_least_squares
from .linear_map import replaceme
from .llm_pruner import llm_pruner_taylor
from .nystrom import modegpt
from .reference import magnitude, random
from .residual_slicing import slicegpt
from .rising import slimgpt
from .wanda import wanda_sp

METHODS: dict[str, Callable[[Any, Any, float, int], Pruned]] = {
    "random": random,
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "flap": flap,
    "flap_heads": functools.partial(flap, heads=True),
    "llm_pruner_taylor": llm_pruner_taylor,
    "shortgpt": shortgpt,
    "slicegpt": slicegpt,
    "wanda_sp_least_squares": wanda_sp_least_squares,
    "flap_least_squares": flap_least_squares,
    "modegpt": modegpt,
    "slimgpt": slimgpt,
    "replaceme": replaceme,
}

__all__ = ["METHODS", *METHODS]
