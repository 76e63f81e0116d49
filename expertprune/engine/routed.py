"""What the repair of routed experts takes, by arithmetic from shapes (see `pruning.routed_repair`)."""

from __future__ import annotations

from dataclasses import dataclass

KEPT = 2**30  # bytes of factorized equations, and of neurons, at most
SWEEPS = 3  # over the routed experts of a layer; after three, the error hardly falls any more
_BUSIEST = 2  # times its even share of the tokens: what comes to the busiest routed expert


@dataclass(frozen=True)
class RoutedSizes:
    """The routed experts that a layer keeps.

    Attributes:
        experts: their number.
        ffn: neurons of each.
        chosen: how many each token comes to.
        repaired: whether their output projections are solved for.
    """

    experts: int
    ffn: int
    hidden: int
    chosen: int
    repaired: bool

    @property
    def factors(self) -> int:
        """Bytes of the factorized equations of all."""
        return 8 * self.experts * self.ffn**2

    @property
    def factorized(self) -> int:
        """How often the equations of each one are made: once where they are kept, else in every sweep."""
        return 1 if self.factors <= KEPT else SWEEPS

    def kept_neurons(self, tokens: int) -> int:
        """Bytes of the neurons that are kept for all sweeps: of all tokens, or none."""
        size = 4 * tokens * self.chosen * self.ffn
        return size if size <= KEPT else 0

    def work(self, tokens: int, value: int) -> int:
        """Bytes on the device while a layer is solved, beside its weights and the hidden states.

        All tokens lie there: what goes into the routed experts, the residual in float32, the router's choice and
        weights, and an importance. They are there twice while the batches are joined. Then one routed expert is solved
        at a time: its tokens' neurons are computed, and are then there in float32, plain and weighted, while its
        equations are made. Its equations and neurons stay for the next sweeps, where they are not too many.

        Args:
            value: bytes of a value in the run's dtype.
        """
        pairs = tokens * self.chosen
        joined = tokens * ((value + 4) * self.hidden + 4) + pairs * (8 + value)
        in_order = pairs * (16 + value)
        busiest = min(tokens, _BUSIEST * pairs // self.experts)
        kept = self.factorized == 1
        solution = (value + 4) * self.experts * self.hidden * self.ffn + (self.factors if kept else 0)
        solution += self.kept_neurons(tokens)
        system = (12 if kept else 20) * self.ffn**2 + 28 * self.hidden * self.ffn
        neurons = busiest * value * (self.hidden + 4 * self.ffn)
        solving = busiest * 8 * self.ffn + max(busiest * 4 * self.hidden, system)
        return joined + in_order + max(joined + 8 * pairs, solution + max(neurons, solving))

    def operations(self, tokens: int) -> tuple[float, float]:
        """Operations of a layer: of matrix products over tokens, and of the equations in float64.

        In each sweep: the cross moment and what the residual loses; and the neurons, once where they are kept.
        """
        pairs, square = tokens * self.chosen, self.ffn**2
        neurons = 1 if self.kept_neurons(tokens) else SWEEPS
        products = 4 * (SWEEPS + neurons) * pairs * self.hidden * self.ffn + self.factorized * 2 * pairs * square
        equations = self.factorized * square * self.ffn / 3 + SWEEPS * 2 * self.hidden * square
        return float(products), self.experts * equations
