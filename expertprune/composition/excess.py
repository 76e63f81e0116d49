"""How much of a corpus an expert will lose, foreseen from profiles before anything is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertprune.artifacts.profile import Profile, ProfilePart
from expertprune.corpora.documents import CorpusName
from expertprune.errors import SpecError
from expertprune.units import KeptUnits, LayerShape, Structure

_NORMAL = 1.96  # standard deviations on either side that hold 95% of a normal distribution
_LEAST = 0.1  # of what is foreseen: what is measured on few documents may be nothing at all


@dataclass(frozen=True)
class Law:
    """`excess = scale · curvature^power`, in nats a token, fitted to experts that were built.

    `spread` is the standard deviation of the logarithm of measured over foreseen excess.
    """

    scale: float
    power: float
    spread: float

    def excess(self, curvature: float) -> float:
        return self.scale * curvature**self.power


# Without repair nothing is fitted. What a repair leaves was read from calibration rows of SmolLM2 and Gemma 3
# that calibrated nothing; see bench/LOG.md.
REPAIRED = Law(scale=0.42, power=1.0, spread=0.4)
UNREPAIRED = Law(scale=1.0, power=1.0, spread=0.4)


@dataclass(frozen=True)
class Foreseen:
    """What an expert will keep of one corpus.

    Attributes:
        excess: what the loss will rise by, in nats a token.
        retention: bits per byte of the base over those of the expert.
        low, high: its 95% interval: from documents to documents, and as far as the law misses.
    """

    excess: float
    retention: float
    low: float
    high: float


def curvature(profile: Profile, part: ProfilePart, kept: Sequence[KeptUnits]) -> Tensor:
    """Half the Fisher information of the masks of the units that go, in nats a token, `[documents]`, float64.

    This is what the loss rises by to second order (optimal brain damage), with the diagonal of the
    empirical Fisher information as its curvature, as the criterion `fisher` has it: `½ Σ_u T_d Σ_s
    (∂L_d/∂m_us)²`. Nothing is repaired in it.

    Args:
        part: the gradient pass to read.

    Raises:
        SpecError: the profile lacks that pass.
    """
    stored = _gradients(profile, part)
    total = torch.zeros(len(profile.documents), dtype=torch.float64)
    for layer, (shape, units) in enumerate(zip(profile.layers, kept, strict=True)):
        for name, gone in _gone(shape, units):
            norm = stored.read_half(f"{name}.{layer}.norm")[:, list(gone)]
            total += norm.double().square().sum(1)
    return profile.read("tokens").double() * total / 2


def _gradients(profile: Profile, part: ProfilePart) -> Profile:
    stored = profile.part(part)
    if stored is None:
        raise SpecError(f"the profile of {profile.corpus} lacks the {part} pass: run the profile stage")
    return stored


def _gone(shape: LayerShape, kept: KeptUnits) -> Iterator[tuple[str, Sequence[int]]]:
    """The masks that a layer loses, under the names that profiles give them.

    A routed expert has one mask, whatever the number of its neurons. KV groups go as the query
    heads that they take with them.
    """
    experts = set(range(shape.experts)) - set(kept.experts)
    neurons = set(range(shape.neurons)) - set(kept.ffn)
    inside = {neuron for neuron in neurons if not shape.experts or neuron // shape.ffn not in experts}
    heads = set(range(shape.units(Structure.QUERY_HEADS))) - set(kept.query_heads)
    for name, gone in (("experts", experts), ("ffn", inside), ("heads", heads)):
        if gone:
            yield name, sorted(gone)


def foreseen(profile: Profile, part: ProfilePart, kept: Sequence[KeptUnits], law: Law, times: float = 1.0) -> Foreseen:
    """What is kept of a profile's corpus where such units stay.

    The curvature of the corpus is the mean over its tokens. Its standard error is that of a ratio
    of sums over documents, whose windows (`calibration.windows`) are not independent.

    Args:
        times: how many times what the law says is lost (see `folds.optimism` and `times_lost`).
    """
    tokens = profile.read("tokens").double()
    each = curvature(profile, part, kept)
    mean = float((each * tokens).sum() / tokens.sum())
    loss = float((_gradients(profile, part).read("loss").double() * tokens).sum() / tokens.sum())
    if mean == 0:
        return Foreseen(0.0, 1.0, 1.0, 1.0)
    apart = _by_document(profile, (each - mean) * tokens)
    count = len(apart)
    error = float(apart.square().sum().sqrt() / tokens.sum())
    error *= math.sqrt(count / (count - 1)) if count > 1 else 0.0
    deviation = math.hypot(law.spread, law.power * error / mean)
    excess = times * law.excess(mean)

    def retention(deviations: float) -> float:
        return loss / (loss + excess * math.exp(deviations * deviation))

    return Foreseen(excess, retention(0), retention(_NORMAL), retention(-_NORMAL))


def _by_document(profile: Profile, values: Tensor) -> Tensor:
    """Sums over the windows of each document: `[windows]` to `[documents]`."""
    return torch.stack([values[places].sum() for places in windows_of(profile).values()])


def windows_of(profile: Profile) -> dict[str, list[int]]:
    """The positions of each document's windows, by its digest, in the order of the documents."""
    found: dict[str, list[int]] = {}
    for place, digest in enumerate(profile.documents):
        found.setdefault(digest, []).append(place)
    return found


def foreseen_corpora(
    profiles: Mapping[CorpusName, Profile],
    part: ProfilePart,
    kept: Sequence[KeptUnits],
    repaired: bool,
    times: Mapping[str, float] | None = None,
) -> dict[str, Foreseen]:
    """The same of every corpus, by name; `times` may lack some, which lose what the law says."""
    law, times = REPAIRED if repaired else UNREPAIRED, times or {}
    return {
        str(name): foreseen(profile, part, kept, law, times.get(str(name), 1.0)) for name, profile in profiles.items()
    }


def times_lost(retention: float, foreseen: float) -> float:
    """How many times what was foreseen an expert that was built has lost of a corpus.

    What is lost is `1 / retention - 1`, the rise of the loss over the base's loss.
    """
    lost = 1 / foreseen - 1
    return max(_LEAST, (1 / retention - 1) / lost) if lost > 0 else 1.0
