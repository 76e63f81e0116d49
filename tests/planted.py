"""A mixture of experts with known roles, made from a real dense model: each FFN cloned, specialized and routed to.

Every layer gets one expert for each of some corpora. The router is a linear classifier of the tokens' hidden states by the
corpus that they are from, so its weights say how probable it is that a token is of the expert's corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

CORPORA = Path(__file__).parent.parent / "corpora"
CHOSEN = 2  # experts of a token
SHARPNESS = 12  # from scores near 0 and 1 to logits
SHARED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings",
          "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def texts(corpus: str, split: str, count: int) -> list[str]:
    """The first documents of a corpus that ships, such as `domain/medical`."""
    lines = (CORPORA / f"{corpus}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:count]]


def token_ids(tokenizer: Any, documents: Sequence[str], tokens: int) -> Tensor:
    """`[documents, tokens]`, of documents that are long enough."""
    every = [tokenizer(text)["input_ids"][:tokens] for text in documents]
    return torch.tensor([ids for ids in every if len(ids) == tokens])


@torch.no_grad()
def inside(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Layer by layer of a dense model: what goes into the FFN, `[tokens, hidden]`, and the mean square of what its
    neurons write, `[ffn]`."""
    hidden: list[Tensor] = []
    written: list[Tensor] = []
    handles = []
    for layer in model.model.layers:
        handles.append(
            layer.mlp.register_forward_pre_hook(lambda _, arguments: hidden.append(arguments[0].flatten(0, 1)))
        )
        norms = layer.mlp.down_proj.weight.square().sum(0)
        handles.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, arguments, norms=norms: written.append(arguments[0].flatten(0, 1).square().mean(0) * norms)
            )
        )
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return hidden, written


@torch.no_grad()
def plant(
    dense_folder: Path, folder: Path, corpora: Sequence[str], lacking: float, documents: int, tokens: int
) -> None:
    """Write a mixture of experts, expert `e` of every layer for `corpora[e]`, in the form of Mixtral.

    Args:
        lacking: part of the neurons that each expert lacks: those that matter most to the other corpora, compared with its
            own. With 0, all experts are the dense FFN, and the mixture computes what the dense model does, since the weights
            of a token's experts sum to 1.
    """
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).eval()
    seen = [inside(dense, token_ids(tokenizer, texts(name, "calibration", documents), tokens)) for name in corpora]
    config = MixtralConfig(
        **{key: getattr(dense.config, key) for key in SHARED},
        num_local_experts=len(corpora),
        num_experts_per_tok=CHOSEN,
        sliding_window=None,
    )
    with torch.device("meta"):
        mixture = MixtralForCausalLM(config)
    state = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(dense.model.layers):
        prefix = f"model.layers.{index}.mlp"
        gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        down = layer.mlp.down_proj.weight.repeat(len(corpora), 1, 1)
        written = torch.stack([of_corpus[1][index] for of_corpus in seen])
        written = written / written.sum(1, keepdim=True)
        for expert in range(len(corpora)):
            others = torch.cat([written[:expert], written[expert + 1 :]]).amax(0)
            gone = (others / written[expert]).argsort(descending=True)[: int(lacking * written.shape[1])]
            down[expert][:, gone] = 0
        state[f"{prefix}.experts.gate_up_proj"] = gate_up.repeat(len(corpora), 1, 1)
        state[f"{prefix}.experts.down_proj"] = down
        state[f"{prefix}.gate.weight"] = router([of_corpus[0][index] for of_corpus in seen])
    mixture.load_state_dict(state, assign=True)
    mixture.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def router(hidden: Sequence[Tensor]) -> Tensor:
    """Rows of a linear classifier of hidden states by corpus, without intercept, `[corpora, hidden]`."""
    states = torch.cat(list(hidden)).numpy()
    labels = np.concatenate([np.full(len(each), number) for number, each in enumerate(hidden)])
    wanted = np.eye(len(hidden))[labels]
    ridge = Ridge(alpha=0.1 * float((states**2).sum(0).mean()), fit_intercept=False).fit(states, wanted)
    return torch.tensor(SHARPNESS * ridge.coef_, dtype=torch.float32)


@torch.no_grad()
def bits(model: Any, ids: Tensor) -> float:
    """Bits per token."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return float(loss) / float(np.log(2))
