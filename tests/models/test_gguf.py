"""GGUF files: experts written, read by transformers and run by llama.cpp with the same logits; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file

from expertprune.arch import families
from expertprune.errors import CheckpointError, UsageError
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.schema import Base
from expertprune.stages.export import export
from tests.calling import call, call_json
from tests.engine_of_gguf import engine_of, finish, needs_engine
from tests.oracle import fetched, load, logits_of, plan_of, pruned, random_plan, random_units, resolved
from tests.processes import server
from tests.tiny import FAMILIES
from tests.vocabularies import TEXT, save_worded

# Rows of 32 and more, so that Q8_0 has whole blocks. What the format cannot say is as it means it: no window but Gemma's,
# logits scaled by the width of a head, one KV head for each query head of OLMoE.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "qwen3": {"attention_bias": False},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 32},
}
WRITTEN = sorted({family.family for family in families().values() if family.gguf is not None} & set(FAMILIES))
UNREAD = {"mixtral", "olmo2", "olmoe"}  # transformers 5.19 has no reader for them
READ = sorted(set(WRITTEN) - UNREAD)
# llama.cpp takes their number from the widths
HEADS_STAY = {"olmo2", "olmoe", "qwen2_moe", "qwen2", "starcoder2", "phi3"}
IDS = torch.arange(5, 25)[None]
TEXTS = [*TEXT[:7], "the  heart\n\n\tpumps 12 345", "naïve – “quoted” 🙂", " leading and trailing "]
# llama.cpp reads GELU from a table in half precision, whose steps are 2⁻¹¹ of its values; all else is float32 arithmetic.
ROUNDING = {"gemma2": 5e-3, "gemma3": 5e-3, "starcoder2": 5e-3}


def tiny(folder: Path, family: str, kind: str = "byte_level", **changes: Any) -> Path:
    return save_worded(folder, kind, family, **{**WIDE, **OWN.get(family, {}), **changes})


def expert_of(folder: Path, store: Path, seed: int = 0, **widths: int) -> Path:
    base = resolved(folder, store)
    return pruned(random_plan(base, seed, **widths), base, folder.with_name(f"{folder.name}-expert"))


def widths_for(family: str) -> dict[str, int]:
    """What of a tiny model is kept: neurons or experts, and of heads where the format can say it."""
    routed = family == "mixtral" or "moe" in family
    heads_are_units = family in {each.family for each in families().values() if each.heads_are_units}
    heads = {"heads_per_group": 1} if heads_are_units and family not in HEADS_STAY else {}
    return ({"experts": 4} if routed else {"ffn": 64}) | heads


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By family: the folder of a tiny expert, and its file in float32."""
    root, found = tmp_path_factory.mktemp("made"), {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in found:
            name = f"tiny {len(found)}"  # no family's: llama.cpp expects tokens by what a file calls its model
            expert = expert_of(tiny(root / name, family), root / "store", **widths_for(family))
            export(expert, root / f"{family}.gguf", type="f32")
            found[family] = expert, root / f"{family}.gguf"
        return found[family]

    return get


# --- written and read again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", READ)
def test_an_expert_of_each_family_comes_back_with_the_same_logits(
    made: Callable[[str], tuple[Path, Path]], family: str, store: Path
) -> None:
    expert, file = made(family)
    base = resolve_base(Base(model=str(file), dtype="float32"), store)
    assert (logits_of(load(fetched(base).folder), IDS) - logits_of(load(expert), IDS)).abs().max() < 1e-5
    assert base.layers == resolved(expert, store).layers


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gemma3", "f16"), ("phi3", "bf16"), ("llama", "q8_0"), ("qwen2_moe", "q8_0")],
)
def test_quantized_files_hold_exactly_what_their_type_holds(
    made: Callable[[str], tuple[Path, Path]], family: str, kind: str, store: Path, tmp_path: Path
) -> None:
    """The expert with its matrices rounded in NumPy has the file's logits; its own are not the same."""
    expert, _ = made(family)
    export(expert, tmp_path / "small.gguf", type=kind)
    model = load(expert)
    exact = logits_of(model, IDS)
    round_matrices(model, kind)
    base = resolve_base(Base(model=str(tmp_path / "small.gguf"), dtype="float32"), store)
    found = logits_of(load(fetched(base).folder), IDS)
    assert (found - logits_of(model, IDS)).abs().max() < 1e-4
    assert (found - exact).abs().max() > 1e-4


@torch.no_grad()
def round_matrices(model: Any, kind: str) -> None:
    """Give a model's matrices, but for routers, the values that a type holds."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and kind in ROUND and not name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            parameter.copy_(torch.from_numpy(ROUND[kind](parameter.numpy())))


def _q8_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 32 along a row share a scale, its largest magnitude over 127 in half precision; values are whole steps.

    As ggml has it, they are multiplied by the float32 reciprocal of the scale, which decides at halves.
    """
    blocks = values.reshape(-1, 32).astype(np.float32)
    scale = (np.abs(blocks).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    steps = np.where(scale == 0, 0, blocks * (np.float32(1) / np.where(scale == 0, np.float32(1), scale)))
    whole = np.sign(steps) * np.floor(np.abs(steps) + 0.5)  # halves away from zero
    return (whole * scale.astype(np.float16).astype(np.float32)).reshape(values.shape).astype(np.float32)


def _bf16(values: np.ndarray) -> np.ndarray:
    """The upper half of float32's bits, to the nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f16": lambda values: values.astype(np.float16).astype(np.float32),
    "bf16": _bf16,
    "q8_0": _q8_0,
}


def test_what_is_stored_as_what(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Vectors and routers in float32; rows that blocks of 32 do not divide, in float16."""
    expert, _ = made("qwen3_moe")
    export(expert, tmp_path / "a.gguf", type="q8_0")
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert {stored[f"{name}.weight"] for name in ("blk.0.ffn_gate_inp", "blk.2.attn_norm", "output_norm")} == {"F32"}
    assert {stored[f"{name}.weight"] for name in ("blk.0.ffn_down_exps", "token_embd", "output")} == {"Q8_0"}
    narrow = tiny(tmp_path / "narrow", "llama", intermediate_size=40)
    written = export(narrow, tmp_path / "b.gguf", type="q8_0")
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    assert {name for name, kind in stored.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in range(3)}
    assert written.tensors == {"F32": 7, "F16": 3, "Q8_0": 20}  # 2 norms a layer and one; 6 matrices a layer and two


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_tokenizer_comes_back_with_the_same_ids(kind: str, store: Path, tmp_path: Path) -> None:
    family = {"byte_level": "llama", "sentencepiece": "gemma3"}[kind]
    folder = tiny(tmp_path / "model", family, kind)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    file = export(folder, tmp_path / "a.gguf", type="f32").path
    mine = load_tokenizer(folder)
    plain = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    base = load_tokenizer(resolve_base(Base(model=str(file)), store).folder)
    extra = ["<s>the heart</s>", *(["<|turn|>the <tool>heart"] if kind == "byte_level" else [])]
    for text in [*TEXTS, *extra]:
        wanted = mine(text, add_special_tokens=False)["input_ids"]
        assert plain(text, add_special_tokens=False)["input_ids"] == wanted
        assert base(text, add_special_tokens=False)["input_ids"] == wanted
        assert base(text)["input_ids"][0] == mine(text)["input_ids"][0] == mine.bos_token_id
        assert mine.decode(wanted) == plain.decode(wanted)
    assert (plain.bos_token_id, plain.eos_token_id) == (mine.bos_token_id, mine.eos_token_id)
    assert base.chat_template == plain.chat_template == config["chat_template"]


def test_earlier_merges_of_a_sentencepiece_tokenizer_score_higher(tmp_path: Path) -> None:
    """Readers merge the pair whose token scores highest; the first merge that makes a token decides."""
    folder = tiny(tmp_path / "model", "gemma3", "sentencepiece")
    reader = GGUFReader(export(folder, tmp_path / "a.gguf", type="f32").path)
    tokens, scores = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "scores"))
    score = dict(zip(tokens, scores, strict=True))
    made = [a + b for a, b in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]
    in_order = [score[token] for token in dict.fromkeys(made)]
    assert len(in_order) > 50
    assert in_order == sorted(in_order, reverse=True)
    assert min(in_order) > max(value for token, value in score.items() if token not in made)


# --- what llama.cpp makes of it -------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("family", WRITTEN)
def test_llama_cpp_predicts_the_same(made: Callable[[str], tuple[Path, Path]], family: str) -> None:
    expert, file = made(family)
    assert_same_predictions(expert, file, ROUNDING.get(family, 1e-4))


def assert_same_predictions(expert: Path, file: Path, within: float) -> None:
    logits = logits_of(load_model(expert, torch.float32), IDS)[0]
    with engine_of(file) as engine:
        for length in (1, 6, 20):
            expected = logits[length - 1].log_softmax(-1).numpy()
            found = engine.log_probabilities(IDS[0, :length].tolist(), len(expected))
            assert np.abs(found - expected).max() < within


@needs_engine
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_llama_cpp_reads_the_same_tokens(kind: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama", kind)
    tokenizer = load_tokenizer(folder)
    with engine_of(export(folder, tmp_path / "a.gguf", type="f32").path) as engine:
        for text in TEXTS:
            assert engine.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@needs_engine
def test_llama_cpp_runs_layers_of_different_widths(store: Path, tmp_path: Path) -> None:
    expert = uneven(tiny(tmp_path / "llama", "llama"), store)
    assert_same_predictions(expert, export(expert, tmp_path / "a.gguf", type="f32").path, 1e-4)


def uneven(folder: Path, store: Path) -> Path:
    """An expert each of whose layers has a width of its own."""
    base, generator = resolved(folder, store), torch.Generator().manual_seed(3)
    # llama.cpp reads other head counts of single layers of this architecture, too
    groups = [None, 1 if "llama" in folder.name else None, None]
    kept = [random_units(shape, generator, ffn=32 + 16 * layer, kv_groups=groups[layer])
            for layer, shape in enumerate(base.layers)]  # fmt: skip
    return pruned(plan_of(base, kept), base, folder.with_name("uneven"))


def test_widths_of_single_layers_are_stated_layer_by_layer(store: Path, tmp_path: Path) -> None:
    written = export(uneven(tiny(tmp_path / "llama", "llama"), store), tmp_path / "a.gguf", type="f32")
    assert written.architecture == "deci"
    reader = GGUFReader(written.path)
    assert reader.get_field("deci.feed_forward_length").contents() == [32, 48, 64]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert [shapes[f"blk.{layer}.ffn_up.weight"] for layer in range(3)] == [[64, 32], [64, 48], [64, 64]]


# --- what a file says beside the widths -----------------------------------------------------------------------------


def rope(kind: str, theta: float, **others: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **others}


FAR = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": rope("default", 500000.0)}),
    ("starcoder2", {"rope_parameters": rope("default", 999999.0)}),
    ("qwen3", {"rope_parameters": rope("default", 1e6), "rms_norm_eps": 1e-2}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0, "sliding_window": 6}),
    (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": rope("linear", 2e4, factor=4.0),
                "sliding_attention": rope("default", 5000.0),
            },
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("phi3", {"rope_parameters": rope("default", 1e4, partial_rotary_factor=0.5)}),
    ("llama", {"rope_parameters": rope("llama3", 5e5, factor=32.0, **FAR)}),
]


@pytest.mark.parametrize(
    ("family", "changes"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
@pytest.mark.parametrize("reader", ["transformers", pytest.param("llama.cpp", marks=needs_engine)])
def test_settings_are_taken_over(
    family: str, changes: dict[str, Any], reader: str, store: Path, tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "model", family, **changes)
    file = export(folder, tmp_path / "a.gguf", type="f32").path
    plain = tiny(tmp_path / "plain", family)
    changed = (logits_of(load(folder), IDS) - logits_of(load(plain), IDS)).abs().max()
    assert changed > 1e-2 or "llama3" in str(changes)  # at 20 tokens only its far rotations differ, and a little
    if reader == "llama.cpp":
        assert_same_predictions(folder, file, ROUNDING.get(family, 1e-4))
        return
    base = resolve_base(Base(model=str(file), dtype="float32"), store)
    assert (logits_of(load(fetched(base).folder), IDS) - logits_of(load(folder), IDS)).abs().max() < 1e-5
    if "llama3" in str(changes):
        found = base.checkpoint.config["rope_parameters"]
        assert {key: found[key] for key in changes["rope_parameters"]} == changes["rope_parameters"]


def test_a_window_that_the_format_cannot_say_bounds_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny(tmp_path / "model", "mistral", sliding_window=48)
    assert export(folder, tmp_path / "a.gguf", type="f32").context == 48  # of 128 positions
    assert "48 tokens" in caplog.text


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(folder: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        export(folder, out, type="f32")
    assert not [path for path in out.parent.iterdir() if "gguf" in path.name], "something half-written is left"
    return str(caught.value)


SPLIT = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
UNSAYABLE: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"query_pre_attn_scalar": 9}, "'query_pre_attn_scalar' is 9, which a GGUF file"),
    ("qwen3", {"attention_bias": True}, "'attention_bias' is True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "'norm_topk_prob' is False"),
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("olmoe", {"num_key_value_heads": 2}, "each has a KV head of its own"),
    (
        "llama",
        {"rope_parameters": rope("yarn", 1e4, factor=2.0, original_max_position_embeddings=64)},
        "'rope_parameters.rope_type' is 'yarn'",
    ),
    (
        "gemma3",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "'layer_types' is ['full_attention',",
    ),
    ("llama", {"kind": "unigram"}, "tokenizer.json: a Unigram tokenizer cannot be written"),
    ("llama", {"kind": "byte_level_ignoring_merges"}, "ByteLevel, ignore_merges"),
]


@pytest.mark.parametrize(("family", "changes", "words"), UNSAYABLE, ids=str)
def test_what_the_format_cannot_say_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(tiny(tmp_path / "model", family, **changes), tmp_path / "a.gguf")


def test_experts_that_llama_cpp_cannot_run_are_refused(store: Path, tmp_path: Path) -> None:
    """Widths of single layers where it reads none, and other numbers of heads where it takes them from the width."""
    said = refusal(uneven(tiny(tmp_path / "qwen3", "qwen3"), store), tmp_path / "a.gguf")
    assert "'qwen3'" in said
    assert "compose.allocation: uniform" in said
    expert = expert_of(tiny(tmp_path / "phi3", "phi3"), store, kv_groups=1)
    assert "without query_heads and kv_groups" in refusal(expert, tmp_path / "a.gguf")


def test_a_part_of_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama")
    data = json.loads((folder / "tokenizer.json").read_text())
    parts = [SPLIT, {**data["pre_tokenizer"], "use_regex": False}]
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert "has no name for this pre-tokenizer (Split, ByteLevel)" in refusal(folder, tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("missing", [1, 3000])
def test_a_disk_without_room_for_the_last_bytes(
    made: Callable[[str], tuple[Path, Path]], kind: str, missing: int, tmp_path: Path
) -> None:
    """A file that may not grow to its size fails in the middle of a write, as on a full disk."""
    folder, _ = made("llama")
    size = export(folder, tmp_path / "whole.gguf", type=kind).path.stat().st_size
    arguments = ("export", folder, "--type", kind, "--out", tmp_path / "out.gguf")
    finished = server().run(*arguments, file_limit=size - missing)
    assert finished.code == 2
    assert "no room left on the disk" in finished.stderr
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["whole.gguf"]


def set_head(folder: Path, value: float) -> None:
    """Give one weight of the output head a value."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for weight in (tensors[name] for name in tensors if name == "lm_head.weight"):
            weight[3, 3] = value
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    folder = tiny(tmp_path / "model", "llama")
    set_head(folder, torch.nan)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds values that are not finite"):
        export(folder, tmp_path / "a.gguf", type=kind)
    assert not list(tmp_path.glob("*a.gguf*"))


def test_weights_that_half_precision_does_not_hold_are_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama")
    set_head(folder, 1e5)
    with pytest.raises(CheckpointError, match=r"output\.weight has weights that float16 does not hold.*--type f32"):
        export(folder, tmp_path / "a.gguf", type="f16")
    assert not list(tmp_path.glob("*a.gguf*"))
    assert export(folder, tmp_path / "a.gguf", type="bf16").path.is_file()


def test_the_command_writes_a_file_once(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    expert, _ = made("llama")
    line = ["export", expert, "--out", tmp_path / "a.gguf", "--type", "q8_0"]
    data = call_json(*line)
    size = (tmp_path / "a.gguf").stat().st_size
    assert (data["kind"], data["architecture"], data["bytes"]) == ("export", "llama", size)
    assert "exists; choose another --out, or give --overwrite" in call(*line, code=2).output
    call(*line, "--overwrite")
    assert "--type: 'q4_1' is none of f32, f16, bf16, q8_0" in call(*line[:-1], "q4_1", code=2).output
    with pytest.raises(UsageError, match="--format: 'onnx' is none of gguf"):
        export(expert, tmp_path / "b", format="onnx")
    with pytest.raises(CheckpointError, match="it is a folder"):
        export(expert, tmp_path)


@pytest.mark.parametrize("family", sorted(UNREAD))
def test_files_that_transformers_does_not_read_are_refused_by_name(
    made: Callable[[str], tuple[Path, Path]], family: str, store: Path
) -> None:
    _, file = made(family)
    with pytest.raises(CheckpointError) as caught:
        resolve_base(Base(model=str(file)), store)
    assert f"family {family!r}, which transformers does not read from GGUF files" in str(caught.value)
    assert "safetensors" in str(caught.value)
    assert not (store / "bases").exists()


def test_an_architecture_that_no_family_has_is_refused(tmp_path: Path, store: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    with pytest.raises(
        CheckpointError, match="architecture 'falcon'; GGUF files of these can be bases: gemma2, gemma3"
    ):
        resolve_base(Base(model=str(tmp_path / "a.gguf")), store)


def test_a_file_whose_tensors_transformers_leaves_out_is_refused(tmp_path: Path, store: Path) -> None:
    """A file whose keys have biases and whose outputs have none, which transformers' config has no switch for."""
    folder = tiny(tmp_path / "model", "llama", attention_bias=True)
    file = export(folder, tmp_path / "a.gguf", type="f32").path
    reader = GGUFReader(file)
    kept = [tensor for tensor in reader.tensors if not tensor.name.endswith(("attn_q.bias", "attn_output.bias"))]
    writer = GGUFWriter(tmp_path / "b.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for tensor in kept:
        writer.add_tensor(tensor.name, tensor.data)
    finish(writer)
    with pytest.raises(CheckpointError, match=r"gives no value to model\.layers\.0\.self_attn\.(o|q)_proj\.bias"):
        resolve_base(Base(model=str(tmp_path / "b.gguf")), store)


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_an_expert_of_a_real_model(kind: str, real_store: Path, store: Path, tmp_path: Path) -> None:
    base = resolve_base(Base(model="smollm2-135m-instruct"), real_store)
    kept = [replace(shape.all_kept, ffn=tuple(range(0, shape.ffn, 2))) for shape in base.layers]
    expert = pruned(plan_of(base, kept), base, tmp_path / "expert")
    file = export(expert, tmp_path / "a.gguf", type=kind).path
    model = load(expert)
    round_matrices(model, kind)
    tokenizer = load_tokenizer(expert)
    ids = torch.tensor([tokenizer("The heart pumps blood through the")["input_ids"]])
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert (logits_of(read, ids) - logits_of(model, ids)).abs().max() < 1e-3
    plain = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert plain(text, add_special_tokens=False) == tokenizer(text, add_special_tokens=False)
    assert resolve_base(Base(model=str(file)), store).checkpoint.parameters == Checkpoint(expert).parameters
