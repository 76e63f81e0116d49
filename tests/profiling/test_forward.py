"""Statistics of a corpus against a slow reference: the whole model, one document at a time, with hooks of our own."""

from __future__ import annotations

import dataclasses
import shutil
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
from expertprune.profiling.channels import ChannelStatistics
from expertprune.profiling.forward import forward_pass
from expertprune.profiling.store import description, measure, profile_key, profile_path, statistics_code
from expertprune.spec.schema import Base
from expertprune.units import LayerShape
from tests.masks import tiny, tiny_of, token_lists
from tests.patching import everywhere
from tests.tiny import tiny_model

LAYERS, HEADS, GROUPS, HEAD_DIM = 3, 6, 3, 4
SHAPE = LayerShape(hidden=24, ffn=32, query_heads=HEADS, kv_heads=GROUPS, head_dim=HEAD_DIM)
FAMILIES = pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("gemma3_text", {})],
    ids=["llama", "qwen2", "llama-biases", "gemma3"],
)
Arrays = dict[str, NDArray[np.float64]]


def collected(model: Any, documents: list[list[int]], tokens_per_batch: int) -> dict[str, Tensor]:
    return forward_pass(tiny_of(model).text(documents, tokens_per_batch))


def numbers(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


def inputs_of_projections(model: Any, ids: list[int]) -> tuple[list[NDArray[Any]], ...]:
    """Of each layer, the `down_proj` and `o_proj` inputs and the layer's output of one document alone.

    `[tokens, channels]` each.
    """
    ffn: list[NDArray[Any]] = []
    heads: list[NDArray[Any]] = []
    stream: list[NDArray[Any]] = []
    handles = [
        layer.register_forward_hook(lambda _, __, output: stream.append(numbers(output[0])))
        for layer in model.model.layers
    ]
    for layer in model.model.layers:
        for module, seen in ((layer.mlp.down_proj, ffn), (layer.self_attn.o_proj, heads)):
            handles.append(
                module.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(numbers(arguments[0][0])))
            )
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return ffn, heads, stream


def mean_squared_norm(outputs: NDArray[Any]) -> float:
    """`mean_t ‖y_t‖²` of `[tokens, hidden]`."""
    return float(np.mean([np.dot(token, token) for token in outputs]))


def reference(model: Any, documents: list[list[int]]) -> Arrays:
    """Every activation statistic in float64, by explicit products and loops."""
    found: dict[str, list[Any]] = {}
    for ids in documents:
        ffn, heads, stream = inputs_of_projections(model, ids)
        found.setdefault("tokens", []).append(len(ids) - 1)
        for index, layer in enumerate(model.model.layers):
            assert stream[index].shape == (len(ids), SHAPE.hidden)
            found.setdefault(f"stream.{index}.square", []).append((stream[index] ** 2).mean())
            for name, values in (("ffn", ffn[index]), ("heads", heads[index])):
                found.setdefault(f"{name}.{index}.rms", []).append(np.sqrt((values**2).mean(0)))
                found.setdefault(f"{name}.{index}.sum", []).append(values.sum(0))
                found.setdefault(f"{name}.{index}.square_sum", []).append((values**2).sum(0))
            weight = numbers(layer.self_attn.o_proj.weight)
            for name, units in (("heads", HEADS), ("groups", GROUPS)):
                width = heads[index].shape[1] // units
                found.setdefault(f"{name}.{index}.impact", []).append(
                    [
                        mean_squared_norm(
                            heads[index][:, unit * width : (unit + 1) * width]
                            @ weight[:, unit * width : (unit + 1) * width].T
                        )
                        for unit in range(units)
                    ]
                )
    return {
        name: np.sum(rows, axis=0) if name.endswith("sum") else np.array(rows, dtype=np.float64)
        for name, rows in found.items()
    }


def assert_statistic(actual: NDArray[Any], expected: NDArray[Any], relative: float, name: str) -> None:
    """Equal up to a part `relative` of each number, or of the largest where sums cancel."""
    assert actual.shape == expected.shape, name
    tolerance = {"rtol": relative, "atol": relative * float(np.abs(expected).max())}
    np.testing.assert_allclose(actual, expected, **tolerance, err_msg=name)


def stored_rms(statistics: dict[str, Tensor], block: str, layer: int) -> NDArray[np.float64]:
    return numbers(statistics[f"{block}.{layer}.rms"]) * float(statistics[f"{block}.{layer}.rms.scale"])


@pytest.fixture
def exact_rms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep per-document numbers in float32, so that they compare closer than half precision allows."""
    everywhere(
        monkeypatch,
        "expertprune.artifacts.profile.halved",
        lambda name, values: {name: values, f"{name}.scale": torch.tensor(1.0)},
    )


# --- activations ----------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("tokens_per_batch", [1, 30, 10_000])
@pytest.mark.usefixtures("exact_rms")
def test_statistics_equal_the_slow_reference_however_batches_are_cut(
    family: str, changes: dict[str, Any], tokens_per_batch: int
) -> None:
    model = tiny_model(family, **changes)
    documents = token_lists()
    statistics = collected(model, documents, tokens_per_batch)
    expected = reference(model, documents)
    assert set(expected) <= set(statistics)
    for name, values in expected.items():
        assert_statistic(numbers(statistics[name]), values, 1e-5, name)


def test_totals_are_precise_enough_for_a_variance() -> None:
    """A channel of mean 100 and deviation 1: its variance is the small difference of two large totals."""
    statistics = ChannelStatistics(2, 1)
    generator = torch.Generator().manual_seed(0)
    values = (100 + torch.randn(5000, 1, generator=generator)).split([2000, 3000])
    for document, part in enumerate(values):
        statistics.add(document, part)
    stored = statistics.tensors("ffn.0")
    assert stored["ffn.0.sum"].dtype == stored["ffn.0.square_sum"].dtype == torch.float64
    variance = float(stored["ffn.0.square_sum"] / 5000 - (stored["ffn.0.sum"] / 5000) ** 2)
    assert variance == pytest.approx(np.concatenate([numbers(part) for part in values]).var(), rel=0.01)


def test_stored_rms_is_the_reference_to_half_precision() -> None:
    model = tiny_model("llama")
    statistics = collected(model, token_lists(), 30)
    expected = reference(model, token_lists())
    for block in ("ffn", "heads"):
        for layer in range(LAYERS):
            assert statistics[f"{block}.{layer}.rms"].dtype == torch.float16
            np.testing.assert_allclose(
                stored_rms(statistics, block, layer), expected[f"{block}.{layer}.rms"], rtol=2**-10
            )


def test_progress_is_told_after_each_layer() -> None:
    calls: list[int] = []
    forward_pass(tiny("llama").text(token_lists()), lambda: calls.append(1))
    assert len(calls) == LAYERS


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    def state() -> list[tuple[str, int, int, int]]:
        return [(name, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]

    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        forward_pass(tiny_of(model).text(token_lists()), stop)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("module", ["mlp.up_proj", "self_attn.v_proj"])
def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(module: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].get_submodule(module).weight[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layer 1: activations are not finite.*base\.dtype"):
        collected(model, token_lists(), 30)


# --- weights --------------------------------------------------------------------------------------------------------


@FAMILIES
def test_weight_statistics_are_sums_over_all_that_a_unit_owns(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    statistics = collected(model, token_lists(), 30)
    for index, layer in enumerate(model.model.layers):
        own = {name: numbers(value) for name, value in layer.named_parameters()}
        down, out = own["mlp.down_proj.weight"], own["self_attn.o_proj.weight"]

        def squares(name: str, row: int, own: dict[str, Any] = own) -> float:
            """Squares of one row of a projection, with its bias where there is one."""
            bias = own.get(f"{name}.bias")
            return float((own[f"{name}.weight"][row] ** 2).sum()) + (0.0 if bias is None else float(bias[row] ** 2))

        neurons = [
            squares("mlp.gate_proj", j) + squares("mlp.up_proj", j) + sum(w**2 for w in down[:, j])
            for j in range(SHAPE.ffn)
        ]
        heads = []
        for head in range(HEADS):
            rows = range(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            heads.append(sum(squares("self_attn.q_proj", r) + sum(w**2 for w in out[:, r]) for r in rows))
        groups = []
        for group in range(GROUPS):
            rows = range(group * HEAD_DIM, (group + 1) * HEAD_DIM)
            keys = sum(squares("self_attn.k_proj", r) + squares("self_attn.v_proj", r) for r in rows)
            groups.append(keys + heads[2 * group] + heads[2 * group + 1])
        expected = {
            f"ffn.{index}.weight_norm": np.sqrt(neurons),
            f"heads.{index}.weight_norm": np.sqrt(heads),
            f"groups.{index}.weight_norm": np.sqrt(groups),
            f"ffn.{index}.output_l1": np.array([sum(abs(w) for w in column) for column in down.T]),
            f"ffn.{index}.output_l2": np.array([sum(w**2 for w in column) ** 0.5 for column in down.T]),
            f"heads.{index}.output_l1": np.array([sum(abs(w) for w in column) for column in out.T]),
            f"heads.{index}.output_l2": np.array([sum(w**2 for w in column) ** 0.5 for column in out.T]),
        }
        for name, values in expected.items():
            assert_statistic(numbers(statistics[name]), values, 1e-5, name)


# --- half precision -------------------------------------------------------------------------------------------------


def test_massive_activations_survive_the_whole_pass() -> None:
    """One neuron a million times louder than the others, as in real models."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] *= 1e6
        model.model.layers[1].mlp.down_proj.weight[:, 5] *= 1e-6
    statistics = collected(model, token_lists(), 30)
    expected = reference(model, token_lists())["ffn.1.rms"]
    assert expected[:, 5].max() > 65504
    # A quiet neuron loses precision below the largest over 2^29, half precision's own range.
    np.testing.assert_allclose(
        stored_rms(statistics, "ffn", 1), expected, rtol=2**-10, atol=float(expected.max()) * 2.0**-39
    )


def test_a_dead_layer_is_zero_and_finite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    statistics = collected(model, token_lists(), 30)
    for name in ("ffn.0.rms", "ffn.0.sum", "ffn.0.square_sum", "heads.0.rms", "heads.0.impact", "groups.0.impact"):
        assert not statistics[name].any(), name
    assert all(tensor.isfinite().all() for tensor in statistics.values())


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
    key = profile_key(base, documents, 32)
    text = TextRun(model, base.family, base.layers, batches)
    profile = measure(text, FORWARD, profile_path(store, key), description(base, "language/en", documents, key))
    assert profile.path == profile_path(store, key)
    again = Profile(profile.path)
    assert (again.corpus, again.tokens, again.digest) == ("language/en", 4 + 5 + 3, key.digest)
    assert again.documents == [document.digest for document in documents]
    assert again.layers == list(base.layers) == [SHAPE] * LAYERS
    expected = forward_pass(text)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in expected.items())


def test_a_profile_is_named_by_all_that_it_depends_on(base: ResolvedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("the heart"), Document("a judge")]
    plain = profile_key(base, documents, 32).digest
    assert profile_key(base, [Document("the heart"), Document("a judge")], 32).digest == plain
    others = [
        profile_key(base, documents[:1], 32),
        profile_key(base, documents[::-1], 32),
        profile_key(base, documents, 33),
        profile_key(dataclasses.replace(base, digest="0" * 64), documents, 32),
        profile_key(dataclasses.replace(base, tokenizer_digest="0" * 64), documents, 32),
        profile_key(dataclasses.replace(base, dtype=torch.bfloat16), documents, 32),
    ]
    for name, stands_in in (
        ("default_device", lambda: torch.device("cuda")),
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
    documents = [Document("the heart")]
    before = [profile_key(base, documents, 32).digest for base in (plain, trusted)]
    (folder / "modeling.py").write_text("x = 1")
    after = [profile_key(base, documents, 32).digest for base in (plain, trusted)]
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("profiling/gradients.py", True),
        ("models/passes.py", True),
        ("arch/families/llama.yaml", True),
        ("reporting/card.py", False),
    ],
)
def test_changed_code_of_statistics_makes_new_profiles(file: str, counts: bool, tmp_path: Path) -> None:
    package = Path(expertprune.__file__).parent
    copies = [shutil.copytree(package, tmp_path / name) for name in ("one", "other")]
    changed = copies[1] / file
    changed.write_text(changed.read_text() + "\n")
    one, other = (statistics_code(copy) for copy in copies)
    assert one == statistics_code(package)
    assert (one != other) == counts


def test_white_space_that_changes_the_tokens_changes_the_profile(base: ResolvedBase) -> None:
    """Otherwise a corpus whose line breaks or indentation were edited is answered with its old profile."""
    one_line, indented = Document("if a: return b"), Document("if a:\n    return b")
    assert profile_key(base, [one_line], 32).digest != profile_key(base, [indented], 32).digest


def test_a_profile_does_not_depend_on_where_the_base_lies(base: ResolvedBase, tmp_path: Path) -> None:
    moved = dataclasses.replace(base, name="other", folder=tmp_path)
    documents = [Document("the heart")]
    assert profile_key(moved, documents, 32).digest == profile_key(base, documents, 32).digest
