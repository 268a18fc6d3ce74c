"""ReDo: recycling dormant units."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_count, check_nonnegative, per_replica
from clagrange.distributed import mean_over_processes
from clagrange.interventions.unit_reset import UnitReset, incoming_gradient, zeros_for
from clagrange.wiring import LayerMap


class ReDo(UnitReset):
    """Every so many steps, let the units start over that are dormant beside the others of their layer.

        score_i = E|h_i| / mean_k E|h_k|        "activation", h the unit's output
        score_i = E|g_i| / mean_k E|g_k|        "gradient", E|g_i| the mean |∂L/∂w_in| over its incoming weights

    Units with score ≤ ``threshold`` get incoming weights ~ U(±gain·√(3/fan_in)), bias 0, outgoing weights 0 and
    entries of normalisation layers as new; the optimizer's state of these entries becomes 0, a Gaussian precision
    returns to its prior. In a layer that is dormant as a whole all units start over; a layer of which nothing was
    seen in the window, such as a branch that was not taken or, by its gradients, a frozen layer, stays as it is.

    Args:
        threshold: τ ≥ 0.
        every: steps from one check to the next.
        score: "activation" (Sokar et al.) or "gradient" (Liu et al.).
        window: steps before a check whose batches give the expectation; 1 is the batch of the check alone, as in
            the published code, too few where batches are small. Default: all since the last check.
        layers: names of the layers in order, each feeding the next, or of each layer those that it feeds;
            default: found by tracing.
        gain: of the initialisation, √2 for ReLU.
        seed: of the random stream.

    Source: Sokar, Agarwal, Castro, Evci, "The dormant neuron phenomenon in deep reinforcement learning", ICML
    2023; of the gradient score Liu, Wu, Obando-Ceron, Castro, Courville, Pan, "Measure gradients, not
    activations!", NeurIPS 2025.
    """

    def __init__(
        self,
        threshold: Number = 0.025,
        every: int = 1000,
        score: str = "activation",
        window: int | None = None,
        layers: LayerMap | None = None,
        gain: float = math.sqrt(2.0),
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(layers, gain, seed)
        check_nonnegative("threshold", threshold)
        check_count("every", every)
        check_choice("score", score, ("activation", "gradient"))
        if window is not None:
            check_count("window", window)
        self.threshold = threshold
        self.every = every
        self.score = score
        self.window = window
        self.watches = score == "activation"
        self.state["steps"] = 0

    @property
    def needs_gradients(self) -> bool:
        """Whether the score is one of gradients."""
        return self.score == "gradient"

    @property
    def replays(self) -> bool:
        """Unless gradients count in some steps only."""
        return not self.needs_gradients or self.window is None

    def _prepare(self) -> None:
        for connection in self._connections:
            zeros = zeros_for(connection)
            self._bind(connection, magnitude=zeros, counted=zeros.new_zeros(zeros.shape[:-1]))

    @torch.no_grad()
    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Add up the gradients."""
        if self.score == "gradient" and not self._saw_nothing(network) and self._counts():
            for connection in self._connections:
                gradient = incoming_gradient(connection)
                if gradient is not None:
                    self.state[connection.name]["magnitude"] += gradient
                    self.state[connection.name]["counted"] += 1

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Add up the activations; at a check let the dormant units start over."""
        active = self._active()
        if self._counts():
            for connection, entering in active:
                magnitude = self.state[connection.name]["magnitude"]
                for consumer, inputs in zip(connection.consumers, entering, strict=True):
                    activations = connection.activations(inputs, consumer).abs().to(magnitude.dtype)
                    magnitude += mean_over_processes(activations.mean(-2))
                self.state[connection.name]["counted"] += 1
        self.state["steps"] += 1
        if self.state["steps"] % self.every == 0:
            for connection in self._connections:
                magnitude, counted = (self.state[connection.name][name] for name in ("magnitude", "counted"))
                limit = per_replica(self.threshold, magnitude) * magnitude.mean(-1, keepdim=True)
                dormant = (magnitude <= limit) & (counted > 0).unsqueeze(-1)
                if dormant.any():
                    self._start_over(connection, dormant, optimizer)
                magnitude.zero_()
                counted.zero_()

    def _counts(self) -> bool:
        """Whether the coming step lies in the window of the next check."""
        return self.window is None or self.every - self.state["steps"] % self.every <= self.window
