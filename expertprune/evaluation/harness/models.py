"""Models in the form that lm-evaluation-harness asks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from expertprune.corpora.batches import open_ids
from expertprune.corpora.chat import ChatTemplate, has_template
from expertprune.evaluation.harness.quiet import quiet
from expertprune.tokenizing.vocabulary import nested

_BATCH = 8


def running_model(model: Any, tokenizer: Any) -> Any:
    """A running `transformers` model for lm-evaluation-harness."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return _asked(HFLM(pretrained=model, tokenizer=_open_ended(tokenizer), batch_size=_BATCH), tokenizer)


def served_model(folder: Path, url: str, name: str, tokenizer: Any, key: str | None = None) -> Any:
    """A model behind a completions endpoint for lm-evaluation-harness.

    Args:
        folder: the model's folder; prompts are sent as tokens of its tokenizer.
        url: the endpoint's address, such as `http://127.0.0.1:8000/v1`.
        name: the name under which the endpoint serves the model.
        key: of the endpoint, if it asks for one.
    """
    import requests
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    header = {"Authorization": f"Bearer {key}"} if key else {}
    listed = requests.get(f"{url}/models", headers=header, timeout=60).json()["data"]
    opened = _open_ended(tokenizer)
    length = next((each.get("max_model_len") for each in listed if each["id"] == name), None) or 2048
    with quiet():
        made = LocalCompletionsAPI(
            model=name,
            base_url=f"{url}/completions",
            header=header,
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            add_bos_token=opened("a")["input_ids"] != opened("a", add_special_tokens=False)["input_ids"],
            max_length=length,
            num_concurrent=_BATCH,
            batch_size=1,
        )
        made.tokenizer = _open_ended(made.tokenizer)
        _with_one_bos(made, tokenizer.bos_token_id)
        return _asked(made, tokenizer)


def _open_ended(tokenizer: Any) -> Any:
    """The tokenizer. Where it puts an end behind every text, a copy that does not: answers follow what is asked."""
    if not tokenizer.is_fast or open_ids("a", tokenizer) == tokenizer("a")["input_ids"]:
        return tokenizer
    from tokenizers import Tokenizer

    opened = copy.deepcopy(tokenizer)
    data = json.loads(opened.backend_tokenizer.to_str())
    for part in nested(data["post_processor"]):
        template = part.get("single") or []
        while template and "SpecialToken" in template[-1]:
            template.pop()
    opened.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(data)).post_processor
    return opened


def _with_one_bos(model: Any, bos: int | None) -> None:
    """Drop the BOS that the tokenizer adds where the chat template has written one."""
    plain = model.tok_encode

    def once(ids: list[int]) -> list[int]:
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def encode(string: Any, *args: Any, **keys: Any) -> Any:
        found = plain(string, *args, **keys)
        return once(found) if isinstance(string, str) else [once(each) for each in found]

    model.tok_encode = encode


def _asked(model: Any, tokenizer: Any) -> Any:
    """The same model; it is asked through its chat template as tasks were built, under the same limits."""
    if has_template(tokenizer):
        model.apply_chat_template = ChatTemplate(tokenizer).question
    return model
