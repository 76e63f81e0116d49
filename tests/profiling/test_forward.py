"""Statistics of a corpus against a slow reference: the whole model, one document at a time, with hooks of our own."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import expertprune
from expertprune.artifacts.profile import FORWARD, Profile
from expertprune.corpora.batches import make_batches
from expertprune.corpora.documents import Document
from expertprune.errors import CheckpointError
from expertprune.models.base import ResolvedBase, resolve_base
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.models.passes import TextRun
from expertprune.profiling import store as store_module
from expertprune.profiling.store import SOURCES, about_profile, measure, profile_key, profile_path, statistics_code
from expertprune.spec.schema import Base
from expertprune.units import LayerShape
from tests.masks import Tiny, assert_near, ffn_output, layer_activations, measured, tiny, token_lists
from tests.patching import everywhere

LAYERS, HEADS, GROUPS = 3, 6, 3
SHAPE = LayerShape(hidden=24, ffn=32, query_heads=HEADS, kv_heads=GROUPS, head_dim=4)


def collected(of: Tiny, tokens_per_batch: int = 30) -> dict[str, Tensor]:
    return measured(of.text(token_lists(), tokens_per_batch), "forward")


def reference(of: Tiny) -> dict[str, NDArray[np.float64]]:
    """Every activation statistic in float64, by explicit products, of one document after the other."""
    found: dict[str, list[Any]] = defaultdict(list)
    for ids in token_lists():
        seen = layer_activations(of, ids)
        found["tokens"].append(len(ids) - 1)
        for index, layer in enumerate(of.model.model.layers):
            found[f"stream.{index}.square"].append((seen[f"stream.{index}"] ** 2).mean())
            before, after = seen[f"stream.{index - 1}"], seen[f"stream.{index}"]
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            found[f"stream.{index}.influence"].append((1 - (before * after).sum(1) / norms).mean())
            for name in (f"ffn.{index}", f"heads.{index}"):
                found[f"{name}.rms"].append(np.sqrt((seen[name] ** 2).mean(0)))
                found[f"{name}.sum"].append(seen[name].sum(0))
                found[f"{name}.square_sum"].append((seen[name] ** 2).sum(0))
            weight, heads = numbers(layer.self_attn.o_proj.weight), seen[f"heads.{index}"]
            for name, units in (("heads", HEADS), ("groups", GROUPS)):
                parts = zip(np.split(heads, units, 1), np.split(weight, units, 1), strict=True)
                impact = [((part @ columns.T) ** 2).sum(1).mean() for part, columns in parts]
                found[f"{name}.{index}.impact"].append(impact)
    return {name: np.sum(rows, 0) if name.endswith("sum") else np.array(rows) for name, rows in found.items()}


def numbers(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


@pytest.fixture
def exact_rms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep per-document numbers in float32, so that they compare closer than half precision allows."""
    everywhere(
        monkeypatch,
        "expertprune.artifacts.profile.halved",
        lambda name, values: {name: values, f"{name}.scale": torch.tensor(1.0)},
    )


# --- activations ----------------------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {  # by family: plain, with biases, norms behind the blocks, fused, without a gate
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "gemma3_text": {},
    "phi3": {},
    "olmo2": {},
    "starcoder2": {},
}


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.usefixtures("exact_rms")
def test_statistics_equal_the_slow_reference_however_batches_are_cut(family: str) -> None:
    of = tiny(family, **KINDS[family])
    expected = reference(of)
    for tokens_per_batch in (1, 30, 10_000):
        statistics = collected(of, tokens_per_batch)
        assert set(expected) <= set(statistics)
        for name, values in expected.items():
            assert_near(statistics[name], torch.tensor(values), 1e-5, f"{name}, {tokens_per_batch}")


@pytest.mark.parametrize("module", ["mlp.up_proj", "self_attn.v_proj"])
def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(module: str) -> None:
    of = tiny("llama")
    with torch.no_grad():
        of.model.model.layers[1].get_submodule(module).weight[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layer 1: activations are not finite.*base\.dtype"):
        collected(of)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_weight_statistics_are_sums_over_all_that_a_unit_owns(family: str) -> None:
    of = tiny(family, **KINDS[family])
    statistics = collected(of)
    for index, layer in enumerate(of.model.model.layers):
        attention = layer.self_attn
        down, out = numbers(ffn_output(layer).weight) ** 2, numbers(attention.o_proj.weight) ** 2

        def owned(module: Any) -> NDArray[np.float64]:
            """Squares of each row of a projection or norm, with its bias where there is one."""
            return sum((numbers(each).reshape(len(each), -1) ** 2).sum(1) for each in module.parameters())

        inner = [each for each in layer.mlp.children() if each is not ffn_output(layer) and list(each.parameters())]
        neurons = np.concatenate([owned(each) for each in inner]).reshape(-1, SHAPE.ffn).sum(0) + down.sum(0)
        rows = [
            getattr(attention, name) for name in ("qkv_proj", "q_proj", "k_proj", "v_proj") if hasattr(attention, name)
        ]
        queries, keys, values = np.split(np.concatenate([owned(each) for each in rows]), [24, 36])
        if family == "olmo2":  # norms over all heads
            queries, keys = queries + owned(attention.q_norm), keys + owned(attention.k_norm)
        heads = (queries + out.sum(0)).reshape(HEADS, -1).sum(1)
        groups = (keys + values).reshape(GROUPS, -1).sum(1) + heads.reshape(GROUPS, -1).sum(1)
        expected = {f"{block}.{index}.weight_norm": each**0.5
                    for block, each in (("ffn", neurons), ("heads", heads), ("groups", groups))}  # fmt: skip
        for block, squares in (("ffn", down), ("heads", out)):
            expected[f"{block}.{index}.output_l1"] = (squares**0.5).sum(0)
            expected[f"{block}.{index}.output_l2"] = squares.sum(0) ** 0.5
        for name, values in expected.items():
            assert_near(statistics[name], torch.tensor(values), 1e-5, name)


# --- half precision -------------------------------------------------------------------------------------------------


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


# --- stored profiles ------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_llama: Path, store: Path) -> ResolvedBase:
    return resolve_base(Base(model=str(tiny_llama)), store)


def test_a_stored_profile_holds_what_was_collected(base: ResolvedBase, store: Path) -> None:
    documents = [Document("the heart pumps blood"), Document("a judge reads der law"), Document("we sum numbers")]
    tokens = [[3, 4, 5, 6], [7, 8, 9, 15, 10], [11, 12, 13]]
    model, tokenizer = load_model(base.folder, base.dtype), load_tokenizer(base.folder)
    assert [tokenizer(document.text)["input_ids"] for document in documents] == tokens
    batches = make_batches(tokens, 10)
    key = profile_key(base, "digest of the text", 32)
    text = TextRun(model, base.family, base.layers, batches)
    about = about_profile(base, "language/en", documents, key, text.tokens)
    profile = measure(text, [FORWARD], profile_path(store, key), about)
    assert profile.path == profile_path(store, key)
    again = Profile(profile.path)
    assert (again.corpus, again.tokens, again.digest) == ("language/en", 4 + 5 + 3, key.digest)
    assert again.documents == [document.digest for document in documents]
    assert again.layers == list(base.layers) == [SHAPE] * LAYERS
    expected = measured(text, "forward")
    assert all(torch.equal(again.read(name), tensor) for name, tensor in expected.items())


def test_a_profile_is_named_by_all_that_it_depends_on(base: ResolvedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = "digest of a text"
    plain = profile_key(base, documents, 32).digest
    moved = dataclasses.replace(base, name="other", folder=Path("elsewhere"), source="streamed")
    assert profile_key(moved, documents, 32).digest == plain
    weights = dataclasses.replace(base)
    vars(weights)["digest"] = "0" * 64
    others = [
        profile_key(base, "another text", 32),
        profile_key(base, documents, 33),
        profile_key(weights, documents, 32),
        profile_key(dataclasses.replace(base, tokenizer_digest="0" * 64), documents, 32),
        profile_key(dataclasses.replace(base, dtype=torch.bfloat16), documents, 32),
        profile_key(dataclasses.replace(base, device=torch.device("cuda:1")), documents, 32),
    ]
    for name, stands_in in (
        ("attention_of", lambda config: "eager"),
        ("statistics_code", lambda package: "other"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(store_module, name, stands_in)
            others.append(profile_key(base, documents, 32))
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patched:
            patched.setattr(
                "importlib.metadata.version", lambda name, package=package: "9.9" if name == package else version(name)
            )
            others.append(profile_key(base, documents, 32))
    assert len({plain, *(key.digest for key in others)}) == 1 + len(others)


def test_the_code_of_a_base_that_is_run_names_its_profiles(tiny_llama: Path, store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    plain, trusted = (dataclasses.replace(resolve_base(Base(model=str(folder)), store), trust_remote_code=trust)
                      for trust in (False, True))  # fmt: skip
    documents = "digest of a text"
    before = [profile_key(base, documents, 32).digest for base in (plain, trusted)]
    (folder / "modeling.py").write_text("x = 1")
    after = [profile_key(base, documents, 32).digest for base in (plain, trusted)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_changed_code_of_statistics_makes_new_profiles(tmp_path: Path) -> None:
    package = Path(expertprune.__file__).parent
    copy = shutil.copytree(package, tmp_path / "copy")
    found = [statistics_code(package), statistics_code(copy)]
    for file in ("reporting/card.py", "profiling/gradients.py", "models/routed.py", "arch/families/llama.yaml"):
        (copy / file).write_text((copy / file).read_text() + "\n")
        statistics_code.cache_clear()
        found.append(statistics_code(copy))
    assert found[0] == found[1] == found[2]
    assert len(set(found[2:])) == 4


# What profiling imports and its key leaves out, and why it cannot change a number.
WITHOUT_NUMBERS = {
    "errors.py": "messages",
    "registry.py": "names of functions",
    "progress.py": "what a terminal shows",
    "formats.py": "as above",
    "files": "reads and writes whole files",
    "engine/watch.py": "ends a team whose member died",
    "engine/memory.py": "how much is done at a time",
    "engine/routed.py": "as above",
    "spec": "settings; the key has what they come to",
    "corpora/chat.py": "the key has the digest of the tokens",
    "corpora/documents.py": "as above",
    "corpora/messages.py": "as above",
    "corpora/templates.py": "as above",
    "tokenizing": "as above",
    "models/base.py": "finds and checks the base, whose weights the key has by their digest",
    "models/hub.py": "as above",
    "models/gguf": "as above",
    "models/admission.py": "as above",
    "models/inventory.py": "as above",
    "models/running.py": "chooses between loading and streaming, which are both in the key",
    "relevance": "scores what profiles hold",
}


def test_the_key_has_all_code_that_profiling_imports() -> None:
    package = Path(expertprune.__file__).parent
    found, todo = set[Path](), sorted((package / "profiling").glob("*.py"))
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for module in modules_imported(path):
            inner = package.joinpath(*module.split(".")[1:])
            todo += [each for each in (inner.with_suffix(".py"), inner / "__init__.py") if each.is_file()]
    parts = [*SOURCES, *WITHOUT_NUMBERS]
    holders = {path: [each for each in parts if path.is_relative_to(package / each)] for path in found}
    assert {path for path, held in holders.items() if len(held) != 1} == set()  # neither lacking nor in both lists
    assert {each for held in holders.values() for each in held} == set(parts)  # no entry is left over


def modules_imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, and names that may be modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("expertprune.")}
