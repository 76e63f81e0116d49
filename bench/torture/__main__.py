"""Torture expertprune, and print what did not hold.

python -m bench.torture
python -m bench.torture --part kills --number 1000
python -m bench.torture --part pairs --number 50
python -m bench.torture --part disk --number 1000
python -m bench.torture --part fuzz --number 10000

With `--save`, the numbers go into the table of bench/README.md: after an interruption too, and added to
those of other seeds at the same commit.
"""

from __future__ import annotations

import os

# Libraries read these when they are first imported: no network is tried, and no thread is lost in a fork.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from bench.torture.trials import main

main(__doc__)
