"""Peer methods of one-shot structured pruning, in memory, for tables in which every method gets the same.

Each is a function `(model, batches, fraction, seed) -> (model, removed)`:

- `model`: a running float32 transformers model (`expertprune.models.loading.load_model`), pruned in place;
- `batches`: calibration text (`expertprune.corpora.batches.make_batches`), the same for every method;
- `fraction`: of the FFN neurons; their parameters are what every method is asked to remove, be it as FFN neurons, as
  layers or as residual channels;
- `seed`: where chance plays a part;
- `removed`: the parameters that the network no longer has, less those that the method added.

All are written anew from their papers, and with their published code as the measure of what a paper leaves open; each
says where it deviates.
"""

import functools

from .fluctuation import flap
from .layer_removal import shortgpt
from .llm_pruner import llm_pruner_taylor
from .reference import magnitude, random
from .residual_slicing import slicegpt
from .wanda import wanda_sp

METHODS = {
    "random": random,
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "flap": flap,
    "flap_heads": functools.partial(flap, heads=True),
    "llm_pruner_taylor": llm_pruner_taylor,
    "shortgpt": shortgpt,
    "slicegpt": slicegpt,
}

__all__ = ["METHODS", *METHODS]
