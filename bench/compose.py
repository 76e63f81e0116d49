"""How long composing takes at the size of an 8-billion-parameter model, and how much memory.

    python bench/compose.py                       # 3 dimensions, 32 layers of 14,336 neurons, 256 documents

Profiles of random statistics are written to a temporary folder (0.7 GB) first; the base is a checkpoint of the right
shapes whose weights are a hole in a sparse file, since composing reads headers only.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import resource
import struct
import tempfile
import time
from pathlib import Path

import torch

from expertprune.arch import family_of
from expertprune.artifacts.profile import Profile, halved, save_profile
from expertprune.composition.plan import compose
from expertprune.corpora.documents import CorpusName
from expertprune.models.base import ResolvedBase
from expertprune.models.checkpoint import Checkpoint
from expertprune.spec.reading import parse_spec
from expertprune.units import LayerShape


def sparse_checkpoint(folder: Path, shape: LayerShape, layers: int) -> Checkpoint:
    """A checkpoint whose headers say the shapes and whose values take no disk."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": layers,
    }
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes = {"model.embed_tokens.weight": [128256, shape.hidden]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "mlp.gate_proj.weight": [shape.ffn, shape.hidden],
            prefix + "mlp.up_proj.weight": [shape.ffn, shape.hidden],
            prefix + "mlp.down_proj.weight": [shape.hidden, shape.ffn],
            prefix + "self_attn.q_proj.weight": [queries, shape.hidden],
            prefix + "self_attn.k_proj.weight": [keys, shape.hidden],
            prefix + "self_attn.v_proj.weight": [keys, shape.hidden],
            prefix + "self_attn.o_proj.weight": [shape.hidden, queries],
        }
    header, offset = {}, 0
    for name, size in shapes.items():
        end = offset + 2 * size[0] * size[1]
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def random_profile(path: Path, shape: LayerShape, layers: int, documents: int, seed: int) -> Profile:
    """FFN statistics of a corpus, log-normal."""
    generator = torch.Generator().manual_seed(seed)
    statistics = {}
    for layer in range(layers):
        rms = torch.randn(documents, shape.ffn, generator=generator).exp_()
        statistics |= halved(f"ffn.{layer}.rms", rms)
        for name in ("output_l1", "output_l2", "weight_norm"):
            statistics[f"ffn.{layer}.{name}"] = torch.rand(shape.ffn, generator=generator) + 0.5
        statistics[f"ffn.{layer}.sum"] = torch.zeros(shape.ffn, dtype=torch.float64)
        statistics[f"ffn.{layer}.square_sum"] = 100 * rms.double().square().sum(0)
    statistics["tokens"] = torch.full((documents,), 100.0)
    about = {"digest": str(seed), "corpus": str(seed), "documents": [], "tokens": 100 * documents}
    return save_profile(path, {**about, "layers": [dataclasses.asdict(shape)] * layers}, statistics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--documents", type=int, default=256)
    arguments = parser.parse_args()
    shape = LayerShape(4096, arguments.neurons, 32, 8, 128)
    data = {
        "name": "bench",
        "base": "bench",
        "dimensions": {"language": "en", "domain": "medical", "task": "qa"},
        "general": [],
        "relevance": {"criterion": "impact"},
        "compose": {"allocation": "uniform"},
        "budget": {"ffn": 0.25},
    }
    spec = parse_spec(data, "bench", Path.cwd())
    names = [CorpusName("language", "en"), CorpusName("domain", "medical"), CorpusName("task", "qa")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = sparse_checkpoint(folder, shape, arguments.layers)
        base = ResolvedBase(
            "bench", folder, checkpoint, family_of("llama"), (shape,) * arguments.layers, "", "", torch.bfloat16
        )
        profiles = {
            name: random_profile(folder / f"{i}.safetensors", shape, arguments.layers, arguments.documents, i)
            for i, name in enumerate(names)
        }
        start = time.perf_counter()
        plan = compose(spec, base, profiles)
        plan.save(folder / "plan.json")
        elapsed = time.perf_counter() - start
    assert all(len(kept.ffn) == arguments.neurons * 3 // 4 for kept in plan.kept)
    print(
        json.dumps(
            {
                "dimensions": len(names),
                "layers": arguments.layers,
                "neurons": arguments.neurons,
                "documents": arguments.documents,
                "seconds": round(elapsed, 2),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "date": datetime.date.today().isoformat(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
