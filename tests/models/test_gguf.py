"""GGUF files: experts written, read by transformers and run by llama.cpp with the same logits and tokens; refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import expertprune
from expertprune.arch import families
from expertprune.errors import CheckpointError, SpecError, UsageError
from expertprune.models.base import resolve_base
from expertprune.models.checkpoint import Checkpoint
from expertprune.models.gguf.writing import TYPES, check_gguf
from expertprune.models.loading import load_model, load_tokenizer
from expertprune.spec.reading import parse_spec
from expertprune.spec.schema import Base
from expertprune.stages.export import export
from tests.calling import call, call_json
from tests.engine_of_gguf import engine_of, needs_engine
from tests.experts import write_sources
from tests.oracle import (
    change_config,
    fetched,
    load,
    logits_of,
    plan_of,
    pruned,
    random_plan,
    random_units,
    read_json,
    resolved,
)
from tests.patching import everywhere
from tests.processes import server
from tests.tiny import FAMILIES
from tests.vocabularies import TEXT, save_worded

Settings = dict[str, Any]


def rope(kind: str, theta: float, **others: float) -> Settings:
    return {"rope_type": kind, "rope_theta": theta, **others}


# Rows of 32 and more, so that Q8_0 has whole blocks. What the format cannot say is as it means it: no window but Gemma's,
# logits scaled by the width of a head, one KV head for each query head of OLMoE. All else is not what readers assume.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
OWN: dict[str, Settings] = {
    "llama": {"rope_parameters": rope("default", 500000.0)},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": rope("linear", 2e4, factor=4.0),
            "sliding_attention": rope("default", 5000.0),
        },
        "layer_types": [*["sliding_attention"] * 2, "full_attention"],
    },
    "phi3": {"rope_parameters": rope("default", 1e4, partial_rotary_factor=0.5)},
    "qwen3": {"attention_bias": False, "rope_parameters": rope("default", 1e6), "rms_norm_eps": 1e-2},
    "starcoder2": {"rope_parameters": rope("default", 999999.0)},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"moe_intermediate_size": 32},
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
VARIANTS: dict[str, Settings] = {
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama with scaled rotations": {"rope_parameters": rope("llama3", 5e5, factor=32.0, **LLAMA3)},
}
WRITTEN = sorted({family.family for family in families().values() if family.gguf is not None} & set(FAMILIES))
UNREAD = ["mixtral", "olmo2", "olmoe"]  # transformers 5.19 has no reader for them
READ = [*sorted(set(WRITTEN) - set(UNREAD)), *VARIANTS]
# llama.cpp takes their number from the widths
HEADS_STAY = {"olmo2", "olmoe", "qwen2_moe", "qwen2", "starcoder2", "phi3"}
IDS = torch.arange(5, 25)[None]
# llama.cpp reads GELU from a table in half precision, whose steps are 2⁻¹¹ of its values; all else is float32 arithmetic.
ROUNDING = {"gemma2": 5e-3, "gemma3": 5e-3, "starcoder2": 5e-3}


def tiny(folder: Path, family: str, kind: str = "byte_level", **changes: Any) -> Path:
    return save_worded(folder, kind, family, **{**WIDE, **OWN.get(family, {}), **changes})


def widths_for(family: str) -> dict[str, int]:
    """What of a tiny model is kept: neurons or experts, and of heads where the format can say it."""
    routed = family == "mixtral" or "moe" in family
    heads_are_units = family in {each.family for each in families().values() if each.heads_are_units}
    heads = {"heads_per_group": 1} if heads_are_units and family not in HEADS_STAY else {}
    neurons = {"ffn": 40 if family == "llama" else 64}  # blocks of 32 do not divide rows of 40
    return ({"experts": 4} if routed else neurons) | heads


def uneven(folder: Path, store: Path) -> Path:
    """An expert each of whose layers has a width of its own."""
    base, generator = resolved(folder, store), torch.Generator().manual_seed(3)
    # llama.cpp reads other head counts of single layers of this architecture, too
    groups = [None, 1 if base.family.family == "llama" else None, None]
    kept = [random_units(shape, generator, ffn=32 + 16 * layer, kv_groups=groups[layer])
            for layer, shape in enumerate(base.layers)]  # fmt: skip
    return pruned(plan_of(base, kept), base, folder.with_name(f"{folder.name} uneven"))


Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By family, or variant of Llama: the folder of a tiny expert, and its file in float32."""
    root = tmp_path_factory.mktemp("made")
    found: dict[str, tuple[Path, Path]] = {}

    def get(case: str) -> tuple[Path, Path]:
        if case not in found:
            family = case.split()[0]
            # no family's name: llama.cpp expects tokens by what a file calls its model
            folder = tiny(root / f"tiny {len(found)}", family, **VARIANTS.get(case, {}))
            if case == "llama uneven":
                expert = uneven(folder, root / "store")
            else:
                base = resolved(folder, root / "store")
                expert = pruned(random_plan(base, **widths_for(family)), base, folder.with_name(f"{folder.name} cut"))
            found[case] = expert, export(expert, root / f"{case}.gguf", type="f32").path
        return found[case]

    return get


# --- written and read again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", READ)
def test_an_expert_comes_back_with_the_same_logits(made: Made, case: str, store: Path) -> None:
    expert, file = made(case)
    base = resolve_base(Base(model=str(file), dtype="float32"), store)
    assert (logits_of(load(fetched(base).folder), IDS) - logits_of(load(expert), IDS)).abs().max() < 1e-5
    assert base.layers == base.family.layer_shapes(Checkpoint(expert).config)
    if case not in VARIANTS:  # transformers' own reader, which takes no biases of Llama, has its own table of names
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        assert_holds(read, load(expert), "f32")
    if case == "llama with scaled rotations":  # which 20 tokens hardly show
        found, wanted = base.checkpoint.config["rope_parameters"], VARIANTS[case]["rope_parameters"]
        assert {key: found[key] for key in wanted} == wanted


QUANTIZED: list[tuple[str, str, dict[str, int]]] = [  # with the number of tensors by their types
    ("gemma3", "f16", {"F32": 6 * 3 + 1, "F16": 7 * 3 + 1}),
    ("phi3", "bf16", {"F32": 2 * 3 + 1, "BF16": 4 * 3 + 2}),
    ("llama", "q8_0", {"F32": 2 * 3 + 1, "F16": 3, "Q8_0": 6 * 3 + 2}),  # rows of 40 are no whole blocks
    ("qwen2_moe", "q8_0", {"F32": 7 * 3 + 1, "Q8_0": 10 * 3 + 2}),  # beside norms and biases, both routers
]


# Largest rounding over the largest value: half of the last bit, or of a block's step, whose scale is rounded, too.
ROUNDED = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11}


def assert_holds(found: Any, expert: Any, kind: str) -> None:
    """A file's model has the expert's values: matrices rounded, rows of no whole blocks in half precision."""
    values = found.state_dict()
    assert values.keys() == expert.state_dict().keys()
    for name, expected in expert.state_dict().items():
        stored = "f16" if kind == "q8_0" and expected.shape[-1] % 32 else kind
        exact = expected.ndim == 1 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        within = 1e-6 if exact else ROUNDED[stored]  # norms that are stored with an offset are rounded
        assert (values[name] - expected).abs().max() <= within * expected.abs().max(), name


@pytest.mark.parametrize(("family", "kind", "tensors"), QUANTIZED, ids=str)
def test_quantized_files_hold_what_their_type_holds_and_transformers_reads_the_same_bits(
    made: Made, family: str, kind: str, tensors: dict[str, int], store: Path, tmp_path: Path
) -> None:
    expert, _ = made(family)
    assert export(expert, tmp_path / "small.gguf", type=kind).tensors == tensors
    base = resolve_base(Base(model=str(tmp_path / "small.gguf"), dtype="float32"), store)
    mine = load(fetched(base).folder)
    assert_holds(mine, load(expert), kind)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    found, expected = mine.state_dict(), read.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_widths_of_single_layers_are_stated_layer_by_layer(made: Made) -> None:
    reader = GGUFReader(made("llama uneven")[1])
    assert reader.get_field("deci.feed_forward_length").contents() == [32, 48, 64]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert [shapes[f"blk.{layer}.ffn_up.weight"] for layer in range(3)] == [[64, 32], [64, 48], [64, 64]]


def test_a_window_that_the_format_cannot_say_bounds_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny(tmp_path / "model", "mistral", sliding_window=48)
    assert export(folder, tmp_path / "a.gguf", type="f32").context == 48  # of 128 positions
    assert "48 tokens" in caplog.text


@needs_engine
@pytest.mark.parametrize("case", [*WRITTEN, *VARIANTS, "llama uneven"])
def test_llama_cpp_predicts_the_same(made: Made, case: str) -> None:
    expert, file = made(case)
    logits = logits_of(load_model(expert, torch.float32), IDS)[0]
    with engine_of(file) as engine:
        for length in (1, 20):
            expected = logits[length - 1].log_softmax(-1).numpy()
            found = engine.log_probabilities(IDS[0, :length].tolist(), len(expected))
            assert np.abs(found - expected).max() < ROUNDING.get(case, 1e-4)


# --- tokenizers and chat templates ----------------------------------------------------------------------------------

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{% if m.tool_calls %}(calls){% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NAMED = {"default": PLAIN, "tool_use": TOOLS, "rag v2": "{{ messages[0].content }}"}
MESSAGES = [{"role": "user", "content": "the heart"}, {"role": "assistant", "content": "pumps"}]
MESSAGES += [{"role": "user", "content": "and then?"}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
TEXTS = [*TEXT[:7], "the  heart\n\n\tpumps 12 345", "naïve – “quoted” 🙂", " leading and trailing "]
Exported = dict[str, tuple[Path, Path]]
KIND = pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])


def with_template(folder: Path, template: str | dict[str, str]) -> Path:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """By kind of tokenizer: a folder and its file; that of `byte_level` has several chat templates."""
    found = {}
    for kind, family, template in (("byte_level", "llama", NAMED), ("sentencepiece", "gemma3", PLAIN)):
        folder = with_template(tiny(tmp_path_factory.mktemp("exported") / "model", family, kind), template)
        found[kind] = folder, export(folder, folder.with_name("a.gguf"), type="f32").path
    return found


def test_a_tokenizer_that_puts_no_space_before_a_text_comes_back_so(tmp_path: Path, store: Path) -> None:
    """And its token behind a text; transformers takes neither over for this architecture."""
    folder = tiny(tmp_path / "model", "llama", "sentencepiece")
    base = load_tokenizer(resolve_base(Base(model=str(export(folder, tmp_path / "a.gguf").path)), store).folder)
    mine = load_tokenizer(folder)
    for text in TEXTS:
        assert base(text)["input_ids"] == mine(text)["input_ids"]
        assert base.decode(base(text)["input_ids"]) == mine.decode(mine(text)["input_ids"])


@KIND
def test_the_tokenizer_comes_back_with_the_same_ids(exported: Exported, kind: str, store: Path) -> None:
    folder, file = exported[kind]
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
    assert base.chat_template == plain.chat_template == PLAIN
    rows = Checkpoint(folder).tensors["model.embed_tokens.weight"].shape[0]
    assert len(base) <= rows, "transformers adds a token that has no row"


@KIND
def test_an_expert_of_a_gguf_base_is_exported_again(exported: Exported, kind: str, tmp_path: Path, store: Path) -> None:
    sources = write_sources(tmp_path, ("en", "general"))
    data = {"name": "again", "base": str(exported[kind][1]), "dimensions": {"language": "en"}, "general": ["general"],
            "corpora": {"sources": sources}, "budget": {"ffn": 0.25, "multiple_of": 4}, "relevance": "impact",
            "compose": {"allocation": "uniform"}, "evaluate": {"enabled": False}, "serve_with": "gguf"}  # fmt: skip
    expert = expertprune.build(parse_spec(data, "spec", tmp_path), tmp_path / "expert", store=store)
    assert export(expert, tmp_path / "expert.gguf", type="f32").path.is_file()


def test_earlier_merges_of_a_sentencepiece_tokenizer_score_higher(exported: Exported) -> None:
    """Readers merge the pair whose token scores highest; the first merge that makes a token decides."""
    folder, file = exported["sentencepiece"]
    reader = GGUFReader(file)
    tokens, scores = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "scores"))
    score = dict(zip(tokens, scores, strict=True))
    made = [a + b for a, b in read_json(folder / "tokenizer.json")["model"]["merges"]]
    in_order = [score[token] for token in dict.fromkeys(made)]
    assert len(in_order) > 50
    assert in_order == sorted(in_order, reverse=True)
    assert min(in_order) > max(value for token, value in score.items() if token not in made)


@needs_engine
@KIND
def test_llama_cpp_reads_the_same_tokens_and_renders_the_same_text(exported: Exported, kind: str) -> None:
    folder, file = exported[kind]
    tokenizer = load_tokenizer(folder)
    with engine_of(file) as engine:
        for text in TEXTS:
            assert engine.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = engine.ask("/apply-template", messages=MESSAGES)["prompt"]
        used = engine.ask("/apply-template", messages=MESSAGES, tools=[TOOL])["prompt"]
    wanted = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert plain in (wanted, wanted.removeprefix(tokenizer.bos_token))  # llama.cpp adds BOS when it tokenizes
    if kind == "byte_level":
        assert used == "[look_up]" + "".join(message["content"] for message in MESSAGES)


def test_named_templates_have_keys_of_their_own(
    exported: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def templates_of(file: Path) -> dict[str, Any]:
        fields = GGUFReader(file).fields
        return {key: fields[key].contents() for key in fields if key.startswith("tokenizer.chat_template")}

    found = templates_of(exported["byte_level"][1])
    assert sorted(found.pop("tokenizer.chat_templates")) == ["rag_v2", "tool_use"]
    assert found == {
        "tokenizer.chat_template": PLAIN,
        "tokenizer.chat_template.tool_use": TOOLS,
        "tokenizer.chat_template.rag_v2": NAMED["rag v2"],
    }
    folder = with_template(tiny(tmp_path / "model", "llama"), {"tool_use": TOOLS})
    assert "tokenizer.chat_template" not in templates_of(export(folder, tmp_path / "b.gguf").path)
    assert "has chat templates (tool_use) and none named default, so llama.cpp takes ChatML" in caplog.text


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(folder: Path, out: Path, kind: str = "f32") -> str:
    with pytest.raises(CheckpointError) as caught:
        export(folder, out, type=kind)
    assert not [path for path in out.parent.iterdir() if "gguf" in path.name], "something half-written is left"
    return str(caught.value)


UNSAYABLE: list[tuple[str, Settings, str]] = [
    ("gemma2", {"query_pre_attn_scalar": 9}, "'query_pre_attn_scalar' is 9, which a GGUF file"),
    ("qwen3", {"attention_bias": True}, "'attention_bias' is True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "'norm_topk_prob' is False"),
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("olmoe", {"num_key_value_heads": 2}, "each has a KV head of its own"),
    ("phi3", {"num_attention_heads": 2}, "without query_heads and kv_groups"),  # it takes their number from the width
    ("llama", {"rope_parameters": rope("dynamic", 1e4, factor=2.0)}, "'rope_parameters.rope_type' is 'dynamic'"),
    ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 2]}, "'layer_types' is ['full_attention',"),
    ("llama", {"kind": "unigram"}, "tokenizer.json: a Unigram tokenizer cannot be written"),
    ("llama", {"kind": "byte_level_ignoring_merges"}, "has no name for this pre-tokenizer (ByteLevel, ignore_merges)"),
]


@pytest.mark.parametrize(("family", "changes", "words"), UNSAYABLE, ids=str)
def test_what_the_format_cannot_say_is_refused(family: str, changes: Settings, words: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", family, **changes)
    assert words in refusal(folder, tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        check_gguf(Checkpoint(folder))


def test_a_base_that_the_format_cannot_say_is_refused_before_it_is_profiled(tmp_path: Path) -> None:
    data = {"name": "own", "base": str(tiny(tmp_path / "model", "llama", "unigram")), "serve_with": "gguf",
            "dimensions": {"language": "en"}, "budget": {"ffn": 0.25, "multiple_of": 4},
            "corpora": {"sources": write_sources(tmp_path, ("en", "general"))}}  # fmt: skip
    with pytest.raises(SpecError, match=r"serve_with: .*a Unigram tokenizer cannot be written.*leave gguf out"):
        expertprune.validate(parse_spec(data, "spec", tmp_path))


def test_layers_of_different_widths_are_refused_where_llama_cpp_reads_none(store: Path, tmp_path: Path) -> None:
    said = refusal(uneven(tiny(tmp_path / "model", "qwen3"), store), tmp_path / "a.gguf")
    assert "'qwen3'; build it with compose.allocation: uniform" in said


def test_a_head_that_is_not_what_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama")
    change_config(folder, tie_word_embeddings=True)
    assert "set tie_word_embeddings: false in config.json" in refusal(folder, tmp_path / "a.gguf")


def test_a_part_of_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama")
    data = read_json(folder / "tokenizer.json")
    split = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    parts = [split, {**data["pre_tokenizer"], "use_regex": False}]
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert "has no name for this pre-tokenizer (Split, ByteLevel)" in refusal(folder, tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", TYPES)
def test_the_room_that_is_asked_for_is_that_of_the_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    everywhere(monkeypatch, "expertprune.files.places.require_room", lambda place, size: asked.append(size))
    folder = tiny(tmp_path / "model", "llama", hidden_size=128, intermediate_size=512)
    size = export(folder, tmp_path / "a.gguf", type=kind).path.stat().st_size
    assert 0.9 * size < asked[-1] < 1.1 * size


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "missing"), [("f32", 1), ("bf16", 3000)])
def test_a_disk_without_room_for_the_last_bytes(made: Made, kind: str, missing: int, tmp_path: Path) -> None:
    """A file that may not grow to its size fails in the middle of a write, as on a full disk."""
    folder, _ = made("llama")
    size = export(folder, tmp_path / "whole.gguf", type=kind).path.stat().st_size
    arguments = ("export", folder, "--type", kind, "--out", tmp_path / "out.gguf")
    finished = server().run(*arguments, file_limit=size - missing)
    assert finished.code == 2
    assert "no room left on the disk" in finished.stderr
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["whole.gguf"]


def test_weights_that_no_type_or_not_this_one_holds_are_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama")

    def set_head(value: float) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            if "lm_head.weight" in tensors:
                tensors["lm_head.weight"][3, 3] = value
                save_file(tensors, path, metadata={"format": "pt"})

    set_head(torch.nan)
    for kind in ("f32", "q8_0"):
        assert "lm_head.weight holds values that are not finite" in refusal(folder, tmp_path / "a.gguf", kind)
    set_head(1e5)
    said = refusal(folder, tmp_path / "a.gguf", "f16")
    assert "output.weight has weights that float16 does not hold" in said
    assert "--type f32" in said
    assert export(folder, tmp_path / "a.gguf", type="bf16").path.is_file()


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_once_and_says_how_to_store_fewer_bits(made: Made, tmp_path: Path) -> None:
    expert, file = made("llama")[0], tmp_path / "a model.gguf"
    line = ["export", expert, "--out", file]
    said = call(*line).output
    assert f"llama-quantize '{file}' '{tmp_path / 'a model-q4_k_m.gguf'}' Q4_K_M" in said.replace("\n", " ")
    assert "exists; choose another --out, or give --overwrite" in call(*line, code=2).output
    data = call_json(*line, "--overwrite")
    assert (data["kind"], data["architecture"], data["bytes"]) == ("export", "llama", file.stat().st_size)
    assert "llama-quantize" not in call(*line, "--overwrite", "--type", "q8_0").output
    assert "--type: 'q4_1' is none of f32, f16, bf16, q8_0" in call(*line, "--type", "q4_1", code=2).output
    with pytest.raises(UsageError, match="--format: 'onnx' is none of gguf"):
        export(expert, tmp_path / "b", format="onnx")
    with pytest.raises(CheckpointError, match="it is a folder"):
        export(expert, tmp_path)


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_model_and_its_tokenizer_come_back(real_store: Path, tmp_path: Path) -> None:
    folder = fetched(resolve_base(Base(model="smollm2-135m-instruct"), real_store)).folder
    export(folder, tmp_path / "a.gguf", type="q8_0")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    assert_holds(read, load(folder), "q8_0")
    plain, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf"), load_tokenizer(folder)
    for text in TEXTS:
        assert plain(text, add_special_tokens=False) == tokenizer(text, add_special_tokens=False)
