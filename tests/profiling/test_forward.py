"""Statistics of a corpus against a slow reference: the whole model, one document at a time, with hooks of our own."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import expertprune
from expertprune.errors import CheckpointError
from expertprune.files import code_digest
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.profiling import store as store_module
from expertprune.profiling.store import SOURCES, profile_key
from expertprune.spec.schema import Base
from tests.masks import LENGTHS, Tiny, assert_near, ffn_output, layer_activations, measured, tiny, token_lists

LAYERS, HEADS, GROUPS = 3, 6, 3
Array = NDArray[np.float64]
ALIKE = tuple(np.ones(length) for length in LENGTHS)


def collected(of: Tiny, tokens_per_batch: int = 30) -> dict[str, Tensor]:
    return measured(of.text(token_lists(), tokens_per_batch), "forward")


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def reference(of: Tiny, weights: Sequence[Array] = ALIKE) -> dict[str, Array]:
    """Every activation statistic in float64, by explicit products, of one document after the other.

    Args:
        weights: what each token counts.
    """
    found: dict[str, list[Any]] = defaultdict(list)
    for ids, weight in zip(token_lists(), weights, strict=True):

        def mean(values: Array, weight: Array = weight) -> Any:
            return np.average(values, axis=0, weights=weight)

        seen = layer_activations(of, ids)
        found["weights"].append(weight.sum())
        for index, layer in enumerate(of.model.model.layers):
            before, after = seen[f"stream.{index - 1}"], seen[f"stream.{index}"]
            found[f"stream.{index}.square"].append(mean((after**2).mean(1)))
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            found[f"stream.{index}.influence"].append(mean(1 - (before * after).sum(1) / norms))
            for name in (f"ffn.{index}", f"heads.{index}"):
                found[f"{name}.rms"].append(np.sqrt(mean(seen[name] ** 2)))
                found[f"{name}.sum"].append((seen[name] * weight[:, None]).sum(0))
                found[f"{name}.square_sum"].append((seen[name] ** 2 * weight[:, None]).sum(0))
            output, heads = numbers(layer.self_attn.o_proj.weight), seen[f"heads.{index}"]
            for name, units in (("heads", HEADS), ("groups", GROUPS)):
                parts = zip(np.split(heads, units, 1), np.split(output, units, 1), strict=True)
                impact = [mean(((part @ columns.T) ** 2).sum(1)) for part, columns in parts]
                found[f"{name}.{index}.impact"].append(impact)
    return {name: np.sum(rows, 0) if name.endswith("sum") else np.array(rows) for name, rows in found.items()}


def weight_reference(of: Tiny, olmo: bool) -> dict[str, Array]:
    """The same of weights: sums over all that a unit owns, and over columns of output projections."""
    found: dict[str, Array] = {}
    for index, layer in enumerate(of.model.model.layers):
        attention = layer.self_attn
        down, out = numbers(ffn_output(layer).weight) ** 2, numbers(attention.o_proj.weight) ** 2

        def owned(module: Any) -> Array:
            """Squares of each row of a projection or norm, with its bias where there is one."""
            return sum((numbers(each).reshape(len(each), -1) ** 2).sum(1) for each in module.parameters())

        inner = [each for each in layer.mlp.children() if each is not ffn_output(layer) and list(each.parameters())]
        neurons = np.concatenate([owned(each) for each in inner]).reshape(-1, 32).sum(0) + down.sum(0)
        names = [name for name in ("qkv_proj", "q_proj", "k_proj", "v_proj") if hasattr(attention, name)]
        rows = np.concatenate([owned(getattr(attention, name)) for name in names])
        queries, keys, values = np.split(rows, [24, 36])
        if olmo:  # norms over all heads
            queries, keys = queries + owned(attention.q_norm), keys + owned(attention.k_norm)
        heads = (queries + out.sum(0)).reshape(HEADS, -1).sum(1)
        groups = (keys + values).reshape(GROUPS, -1).sum(1) + heads.reshape(GROUPS, -1).sum(1)
        for block, each in (("ffn", neurons), ("heads", heads), ("groups", groups)):
            found[f"{block}.{index}.weight_norm"] = each**0.5
        for block, squares in (("ffn", down), ("heads", out)):
            found[f"{block}.{index}.output_l1"] = (squares**0.5).sum(0)
            found[f"{block}.{index}.output_l2"] = squares.sum(0) ** 0.5
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gemma3_text", {}),  # norms behind the blocks
        ("phi3", {}),  # fused
        ("olmo2", {}),
        ("starcoder2", {}),  # without a gate
    ],
)
@pytest.mark.usefixtures("not_halved")
def test_statistics_equal_the_slow_reference_however_batches_are_cut(family: str, changes: dict[str, Any]) -> None:
    of = tiny(family, **changes)
    expected = reference(of) | weight_reference(of, family == "olmo2")
    for tokens_per_batch in (1, 30):
        statistics = collected(of, tokens_per_batch)
        assert statistics["tokens"].tolist() == [length - 1 for length in LENGTHS]
        for name, values in expected.items():
            assert_near(statistics[name], torch.tensor(values), 1e-5, f"{name}, {tokens_per_batch}")


@pytest.mark.parametrize("module", ["mlp.up_proj", "self_attn.v_proj"])
def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(module: str) -> None:
    of = tiny("llama")
    with torch.no_grad():
        of.model.model.layers[1].get_submodule(module).weight[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layer 1: activations are not finite.*base\.dtype"):
        collected(of)


def test_massive_activations_survive_the_whole_pass() -> None:
    """One neuron a million times louder than the others, as in real models."""
    of = tiny("llama")
    with torch.no_grad():
        of.model.model.layers[1].mlp.up_proj.weight[5] *= 1e6
        of.model.model.layers[1].mlp.down_proj.weight[:, 5] *= 1e-6
    statistics, expected = collected(of), reference(of)
    assert expected["ffn.1.rms"][:, 5].max() > 65504
    for name in (f"{block}.{layer}.rms" for block in ("ffn", "heads") for layer in range(LAYERS)):
        assert statistics[name].dtype == torch.float16
        stored = numbers(statistics[name]) * float(statistics[f"{name}.scale"])
        # A quiet neuron loses precision below the largest over 2^29, half precision's own range.
        np.testing.assert_allclose(stored, expected[name], rtol=2**-10, atol=float(expected[name].max()) * 2.0**-39)


TEXT = "digest of a text"


@pytest.fixture
def base(tiny_llama: Path, store: Path) -> ResolvedBase:
    return resolve_base(Base(model=str(tiny_llama)), store)


def test_a_profile_is_named_by_all_that_it_depends_on(base: ResolvedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = profile_key(base, TEXT, 32).digest
    moved = dataclasses.replace(base, name="other", folder=Path("elsewhere"), source="streamed")
    assert profile_key(moved, TEXT, 32).digest == plain
    weights = dataclasses.replace(base)
    vars(weights)["digest"] = "0" * 64
    changed = [{"tokenizer_digest": "0" * 64}, {"dtype": torch.bfloat16}, {"device": torch.device("cuda:1")}]
    others = [profile_key(base, "another text", 32), profile_key(base, TEXT, 33), profile_key(weights, TEXT, 32)]
    others += [profile_key(dataclasses.replace(base, **each), TEXT, 32) for each in changed]  # type: ignore[arg-type]
    stand_ins: list[tuple[Any, ...]] = [
        (store_module, "attention_of", lambda config: "eager"),
        (store_module, "code_digest", lambda sources: "other"),
        ("importlib.metadata.version", lambda name: "9.9" if name == "torch" else version(name)),
        ("importlib.metadata.version", lambda name: "9.9" if name == "transformers" else version(name)),
    ]
    for stand_in in stand_ins:
        with monkeypatch.context() as patched:
            patched.setattr(*stand_in)
            store_module._versions.cache_clear()
            others.append(profile_key(base, TEXT, 32))
    store_module._versions.cache_clear()
    assert len({plain, *(key.digest for key in others)}) == 1 + len(others)


def test_code_that_gives_other_numbers_makes_new_profiles(tiny_llama: Path, store: Path, tmp_path: Path) -> None:
    """The package's own, and a base's where it is run."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    base = resolve_base(Base(model=str(folder)), store)
    both = [dataclasses.replace(base, trust_remote_code=trust) for trust in (False, True)]
    before = [profile_key(each, TEXT, 32).digest for each in both]
    (folder / "modeling.py").write_text("x = 1")
    after = [profile_key(each, TEXT, 32).digest for each in both]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]
    package = Path(expertprune.__file__).parent
    copy = shutil.copytree(package, tmp_path / "copy")
    found = [code_digest(SOURCES), code_digest(SOURCES, copy)]
    for file in ("reporting/card.py", "profiling/gradients.py", "models/routed.py", "arch/families/llama.yaml"):
        (copy / file).write_text((copy / file).read_text() + "\n")
        code_digest.cache_clear()
        found.append(code_digest(SOURCES, copy))
    assert found[0] == found[1] == found[2]
    assert len(set(found[2:])) == 4


# What profiling imports and its key leaves out, because it cannot change a number.
WITHOUT_NUMBERS = [
    *("errors.py", "registry.py", "progress.py", "formats.py", "files"),  # messages, names, whole files
    *("engine/watch.py", "engine/memory.py", "engine/routed.py"),  # teams that end, and how much is done at a time
    *("spec", "corpora/chat.py", "corpora/documents.py", "corpora/messages.py", "corpora/templates.py", "tokenizing"),
    # The key has the weights' digest, and settings and tokens as they come out; loading and streaming are both in it.
    *("models/base.py", "models/hub.py", "models/gguf", "models/admission.py", "models/inventory.py"),
    *("models/running.py", "models/containers.py", "relevance"),  # the latter scores what profiles hold
]


def test_the_key_has_all_code_that_profiling_imports() -> None:
    package = Path(expertprune.__file__).parent
    found, todo = set[Path](), sorted((package / "profiling").glob("*.py"))
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                inner = package.joinpath(*name.split(".")[1:])
                files = [inner.with_suffix(".py"), inner / "__init__.py"] if name.startswith("expertprune.") else []
                todo += [each for each in files if each.is_file()]
    parts = [*SOURCES, *WITHOUT_NUMBERS]
    holders = {path: [each for each in parts if path.is_relative_to(package / each)] for path in found}
    assert {path for path, held in holders.items() if len(held) != 1} == set()  # neither lacking nor in both lists
    assert {each for held in holders.values() for each in held} == set(parts)  # no entry is left over
