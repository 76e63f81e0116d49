"""llama.cpp itself, where its Python package is installed (`pip install llama-cpp-py-sync`): what it makes of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def installed() -> bool:
    try:
        import llama_cpp_py_sync  # noqa: F401
    except Exception:
        return False
    return True


needs_engine = pytest.mark.skipif(not installed(), reason="llama.cpp is not installed: pip install llama-cpp-py-sync")


def engine_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits `[tokens, vocabulary]` of a file's model, key-value cache and all in float32, without flash attention."""
    from llama_cpp_py_sync import Llama

    llama = Llama(str(path), n_ctx=128, n_threads=1, type_k="f32", type_v="f32", flash_attn_type=0)
    try:
        lib, count = llama._lib, len(tokens)
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, 1
        assert lib.llama_decode(llama._ctx, batch) == 0
        width = llama.n_vocab
        found = [llama._ffi.unpack(lib.llama_get_logits_ith(llama._ctx, at), width) for at in range(count)]
        lib.llama_batch_free(batch)
        return np.array(found, dtype=np.float32)
    finally:
        llama.close()


def engine_tokens(path: Path, text: str) -> list[int]:
    """What a file's tokenizer makes of a text, without BOS and EOS."""
    from llama_cpp_py_sync import Llama

    llama = Llama(str(path), n_ctx=32, n_threads=1)
    try:
        return list(llama.tokenize(text, add_special=False))
    finally:
        llama.close()
