"""How fast this machine is at a base's shapes: a few seconds of measurement with random weights."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertprune.engine.memory import graph_estimate
from expertprune.files import own_folder
from expertprune.models.base import ResolvedBase
from expertprune.models.layers import LayerRecorder, decoder_layers, layers_replaced
from expertprune.models.passes import LOGITS, places_at_once
from expertprune.models.precision import narrow_products
from expertprune.models.streaming import empty_model

_OPERATIONS = 1e11  # of a timed run of a layer: a second on two slow cores
_ON_GPU = 100  # times as many there, where a kernel takes microseconds to start


_LEAST_TOKENS = 64


_SIDE = 1536  # of matrices whose products and factors are timed


_ROWS = 4096  # of the output matrix that is timed
_PLACES = 2048  # at most, whose products with it are timed
_OF_HEAD = 4e9  # operations of them
_FOLDS = 8  # about as many groups of documents as a profile adds probabilities over


_SAMPLE = 2**27  # bytes that are read; and at most this share of the weights
_SAMPLED = 1 / 8


@dataclass(frozen=True)
class Rates:
    """Seconds and bytes, measured on the device at a base's shapes.

    Attributes:
        forward: seconds of a token in one layer.
        both: seconds of a token in one layer, forward and back.
        graph: bytes that a token's graph holds in one layer.
        head: seconds of a token and a row of the vocabulary, where two models' predictions are compared.
        head_both: the same of one model, where the gradient of a loss is taken.
        products: operations a second in matrix products of float32, which are of TF32 on a GPU.
        factors: float64 operations a second, where equations are solved.
        norms: seconds of a value of which sums of absolute values and of squares are taken.
        fresh: seconds of a byte of memory that the process has not had yet.
        read: bytes a second of weights, from the disk to the device.
        written: bytes a second.
    """

    forward: float
    both: float
    graph: float
    head: float
    head_both: float
    products: float
    factors: float
    norms: float
    fresh: float
    read: float
    written: float

    @classmethod
    def of_shapes(cls, base: ResolvedBase) -> Rates:
        """Without measurement: only the size of the graph is known."""
        return cls(0.0, 0.0, graph_estimate(base), 0.0, 0.0, math.inf, math.inf, 0.0, 0.0, math.inf, math.inf)


def measured_rates(base: ResolvedBase, tokens: int, width: int, scratch: Path) -> Rates:
    """Time a layer, the head, the arithmetic of a repair, and the disk.

    Args:
        tokens: of the largest batch; no more are run.
        width: of its documents.
        scratch: an existing folder on the disk that is written.
    """
    device, config = base.device, base.checkpoint.config
    more = _ON_GPU if device.type == "cuda" else 1
    layer = max(range(len(base.layers)), key=lambda index: base.layers[index].neurons)
    active = _active_parameters(base, layer)
    most = max(_LEAST_TOKENS, min(tokens, int(more * _OPERATIONS / (2 * active))))
    rows, columns = max(1, most // width), min(most, width)
    with torch.no_grad():
        forward, both, graph = _timed_layer(base, layer, rows, columns)
        vocabulary, hidden = min(_ROWS, int(config.get("vocab_size") or _ROWS)), base.layers[layer].hidden
        matrix = torch.randn(vocabulary, hidden, device=device).to(base.dtype)
        places = max(_LEAST_TOKENS, min(_PLACES, int(more * _OF_HEAD / (2 * hidden * vocabulary))))
        states = torch.randn(places, hidden, device=device).to(base.dtype)
        predicting = _seconds(lambda: nn.functional.linear(states, matrix), device) / (places * vocabulary)
        compared, sloped = _predictions(base, tokens)
        norms = _seconds(lambda: (matrix.float().abs().sum(0), matrix.float().square().sum(0)), device)
        order = min(round(_SIDE * more ** (1 / 3)), base.layers[layer].ffn)  # a routed expert has its own equations
        side, right = torch.randn(order, order, device=device), torch.randn(hidden, order, device=device)
        with narrow_products(device):
            product = _seconds(lambda: side.T @ side, device)
        positive = (side.T @ side).double() + torch.eye(order, device=device) * order
        equations = _seconds(lambda: _solved(positive, right), device)
    return Rates(
        forward=forward,
        both=both,
        graph=graph,
        head=predicting + compared / 2,
        head_both=2 * predicting + sloped,
        products=2 * order**3 / product,
        factors=(order**3 / 3 + 2 * order**2 * hidden) / equations,
        norms=norms / matrix.numel(),
        fresh=_fresh(device, min(LOGITS, int(graph * rows * columns) // 4)),
        read=_reading(base),
        written=_writing(scratch, min(_SAMPLE, int(base.checkpoint.weight_bytes * _SAMPLED))),
    )


def _predictions(base: ResolvedBase, tokens: int) -> tuple[float, float]:
    """Seconds of a value of the logits, once they are there: comparing two models', and the gradient of one's loss.

    As many are timed as are held at a time: memory that is new costs as much as the arithmetic.

    Args:
        tokens: of the largest batch.
    """
    rows = int(base.checkpoint.config.get("vocab_size") or _ROWS)
    logits = torch.ones(min(tokens, places_at_once(rows)), rows, device=base.device, dtype=base.dtype)
    documents = torch.ones(_FOLDS, logits.shape[0], device=base.device)

    def compared() -> tuple[Tensor, Tensor]:  # as an evaluation does
        p, q = (torch.log_softmax(logits.float(), -1) for _ in range(2))
        return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)

    def sloped() -> tuple[Tensor, Tensor]:  # as a profile does, with the masses of rows
        chances = torch.softmax(logits.float(), -1)
        return documents @ chances, chances.mul_(2.0).to(logits.dtype)

    seconds = (_seconds(compared, base.device), _seconds(sloped, base.device))
    return seconds[0] / logits.numel(), seconds[1] / logits.numel()


def _solved(positive: Tensor, right: Tensor) -> Tensor:
    """What a repair makes of its equations."""
    factor, _ = torch.linalg.cholesky_ex(positive)
    return torch.cholesky_solve(right.double().T, factor).T.float()


def _fresh(device: torch.device, values: int) -> float:
    """Seconds of a new byte, by so many values of four; devices other than a CPU keep what they have had."""
    if device.type != "cpu":
        return 0.0
    known = torch.ones(values)
    beyond = _seconds(lambda: torch.ones(values), device) - _seconds(lambda: known.fill_(1.0), device)
    return max(0.0, beyond) / known.nbytes


def _active_parameters(base: ResolvedBase, layer: int) -> int:
    """Parameters of a layer that a token passes."""
    shape, prefix = base.layers[layer], base.family.layer_prefix(layer)
    whole = sum(info.parameters for name, info in base.checkpoint.tensors.items() if name.startswith(prefix))
    if not shape.experts:
        return whole
    idle = shape.experts - base.family.experts_per_token(base.checkpoint.config)
    return whole - idle * 3 * shape.ffn * shape.hidden


def _timed_layer(base: ResolvedBase, index: int, rows: int, columns: int) -> tuple[float, float, float]:
    """Seconds of a token forward, and forward and back; bytes of its graph."""
    model = empty_model(base.folder, base.dtype, base.trust_remote_code)
    layers = decoder_layers(model, base.family)
    own, others = base.family.layer_prefix(index), f"{base.family.layers}."
    weights = {  # the layer's, and the final norm's and the like, which the decoder runs too
        name: (torch.randn(value.shape, device=base.device) / 50).to(value.dtype)
        for name, value in model.named_parameters()
        if name.startswith(own) or not (name.startswith(others) or name in base.family.vocabulary)
    }
    model.load_state_dict(weights, strict=False, assign=True)
    layer = layers[index].requires_grad_(False)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(base.device))  # buffers
    hidden = torch.randn(rows, columns, base.layers[index].hidden, device=base.device).to(base.dtype)
    _shrink_embedding(model, base)
    recorders = [LayerRecorder(each) for each in layers]
    ids = torch.zeros(rows, columns, dtype=torch.int64, device=base.device)
    with layers_replaced(model, base.family, recorders):
        model.get_decoder()(input_ids=ids, use_cache=False)
    arguments = recorders[index].arguments

    def run(states: Tensor) -> Tensor:
        output = layer(states, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    held: dict[int, int] = {}

    def note(tensor: Tensor) -> None:  # and pack nothing: a graph that packs its own outputs is never freed
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()

    constant = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda packed: packed):
        run(hidden.clone().requires_grad_())

    def back() -> None:
        leaf = hidden.clone().requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(run(leaf), leaf, hidden)

    tokens = rows * columns
    graph = sum(size for pointer, size in held.items() if pointer not in constant) + 2 * hidden.nbytes
    forward = _seconds(lambda: run(hidden), base.device)
    return forward / tokens, _seconds(back, base.device) / tokens, graph / tokens


def _shrink_embedding(model: Any, base: ResolvedBase) -> None:
    """Put an embedding of a single row in the place of the model's, which has no memory."""
    path = base.family.vocabulary[0].removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    row = nn.Embedding(1, base.layers[0].hidden, device=base.device, dtype=base.dtype)
    setattr(model.get_submodule(parent), name, row)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The shortest of three runs, or of more where they are short: the first ones prepare memory and threads."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 10 and sum(times) < 0.3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _reading(base: ResolvedBase) -> float:
    """Bytes a second of weights, from the disk past its cache, cast as they run, to the device."""
    checkpoint = base.checkpoint
    if checkpoint.pending is not None:
        return _USUAL
    names = sorted(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].bytes, reverse=True)
    seconds, size = 0.0, 0
    for name in names:
        if size >= min(_SAMPLE, base.checkpoint.weight_bytes * _SAMPLED):
            break
        path = checkpoint.folder / checkpoint.tensors[name].file
        with contextlib.suppress(OSError, AttributeError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        checkpoint.read(name).to(base.device, base.dtype, copy=True)
        seconds += time.perf_counter() - start
        size += checkpoint.tensors[name].bytes
    return size / max(seconds, 1e-6)


_USUAL = 5e8  # bytes a second of a disk of which nothing can be measured


def _writing(folder: Path, size: int) -> float:
    """Bytes a second, of `size` bytes."""
    block = bytes(2**20)
    try:
        with own_folder(folder / "rate") as own:
            start = time.perf_counter()
            with (own / "bytes").open("wb") as file:
                for _ in range(max(1, size // len(block))):
                    file.write(block)
                written = file.tell()
                file.flush()
                os.fsync(file.fileno())
            return written / (time.perf_counter() - start)
    except OSError:
        return _USUAL
