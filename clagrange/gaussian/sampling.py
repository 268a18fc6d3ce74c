"""Weights drawn in training: one draw for a batch, or one for every example."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clagrange.gaussian.curvature import VarianceObserver
from clagrange.gaussian.precision import DiagonalPrecision, Precision
from clagrange.replicas import Generators, generator_of, randn_like

if TYPE_CHECKING:
    from clagrange.gaussian.layers import GaussianLayer

MODES = ("mean", "batch", "example")
"""What a layer may be at in training: its mean, or a draw that serves a batch or an example."""

Pair = tuple[str, str | None]
"""The names of a weight and its bias."""


@dataclass
class Stream:
    """The random stream of one network in one layer.

    Attributes:
        generator: on the device of the weights, to which it moves at the next draw.
        start: its state before the last draw, where the negative of that is due.
    """

    generator: torch.Generator
    start: Tensor | None = None

    def move(self, device: torch.device) -> None:
        """Go on on another device; on one of another kind by a seed that is drawn here."""
        if self.generator.device == device:
            return
        moved = torch.Generator(device)
        if device.type == self.generator.device.type:
            moved.set_state(self.generator.get_state())
        else:
            moved.manual_seed(_seed(self.generator))
            self.start = None
        self.generator = moved


class WeightSampler(nn.Module):
    """Draws the weights of a Gaussian layer for its training passes.

    Its modes differ in how far a draw reaches:

    * "batch": w = μ + σε, one draw for the whole batch. It holds until a backward pass has used it, so that a
      layer that is used several times in a pass has one weight, and accumulated passes have a draw each.
    * "example": the outputs are drawn in place of the weights, y = f(x; μ) + √f(x²; σ²)·ε for a map f that is
      linear in the weights (local reparametrisation). Every example, and every position in it, has a draw of its
      own, so that the noise of the gradient falls with the size of the batch. For diagonal precisions only.

    The streams are the layer's own and part of its state, so that a run goes on with the same numbers after
    loading, copying or pickling.

    Args:
        mode: "batch" or "example".
        random_streams: one, or in a stacked layer one for each replica.
        antithetic: give every second pass the negative of the noise of the one before it.

    Source: Blundell et al. (2015) for "batch"; Kingma, Salimans and Welling (2015) for "example".
    """

    replica_lists = ("random_streams",)
    gathers = ("_noise", "_sign", "_repeated", "_used")

    def __init__(self, mode: str, random_streams: list[Stream], antithetic: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.random_streams = random_streams
        self.antithetic = antithetic
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._noise: dict[str, Tensor] = {}
        self._sign = 1.0
        self._repeated = False  # whether outputs of one weight were drawn more than once
        self._used = True  # whether a backward pass has used the noise, so that the next pass is to be a new one

    def transform(
        self,
        layer: "GaussianLayer",
        function: Callable[..., Tensor],
        inputs: Tensor,
        pair: Pair,
    ) -> Tensor:
        """A function of inputs, weight and bias, linear in the last two and in the inputs, at a draw of them."""
        recomputing = torch._C._current_graph_task_id() != -1  # by activation checkpointing, in a backward pass
        if recomputing:
            self._require_noise(layer)
        elif self._used:
            self._next_pass()
        if self.mode == "batch":
            output = function(inputs, *self._drawn_weights(layer, pair))
        else:
            output = self._drawn_outputs(layer, function, inputs, pair, recomputing)
        if not recomputing:
            self._used = not output.requires_grad
            if output.requires_grad:
                output.register_hook(self._use)
        return output

    def _next_pass(self) -> None:
        self._begin_pass()
        for stream in self.random_streams if self.antithetic else ():
            if stream.start is None:
                stream.start = stream.generator.get_state()
            else:
                stream.generator.set_state(stream.start)
                stream.start = None
                self._sign = -1.0

    def _use(self, _: Tensor) -> None:
        self._used = True

    def _require_noise(self, layer: "GaussianLayer") -> None:
        if not self._noise:
            raise RuntimeError(
                f"a {type(layer).__name__} with sampling {self.mode!r} is computed in the backward pass, but was "
                f"not drawn before it; with activation checkpointing set use_reentrant=False"
            )
        if self._repeated:
            raise RuntimeError(
                f"a {type(layer).__name__} with sampling 'example' was used several times and is computed again "
                f"in the backward pass, which cannot tell its draws apart; with activation checkpointing set "
                f"sampling 'batch'"
            )

    def _drawn_weights(self, layer: "GaussianLayer", pair: Pair) -> list[Tensor | None]:
        drawn: dict[str, Tensor] = {}
        for block in layer.blocks():
            name = block.names[0]
            if set(pair).isdisjoint(block.names):
                continue
            if isinstance(block.precision, DiagonalPrecision):
                mean, variance = _moments(layer, name)
                drawn[name] = mean + (variance.sqrt() * self._held(name, layer, variance)).to(mean.dtype)
            else:
                deviation = self._held(name, layer, block.joint_mean(), block.precision)
                parts = zip(block.names, block.means, block.split(deviation), strict=True)
                drawn |= {part: mean + noise.to(mean.dtype) for part, mean, noise in parts}
        return [None if name is None else drawn.get(name) for name in pair]

    def _drawn_outputs(
        self,
        layer: "GaussianLayer",
        function: Callable[..., Tensor],
        inputs: Tensor,
        pair: Pair,
        recomputing: bool,
    ) -> Tensor:
        weight_mean, weight_variance = _moments(layer, pair[0])
        bias = pair[1] if pair[1] is not None and getattr(layer, pair[1]) is not None else None
        bias_mean, bias_variance = (None, None) if bias is None else _moments(layer, bias)
        mean = function(inputs, weight_mean, bias_mean)
        if inputs.is_floating_point():  # indices stand for one-hot inputs, which are their own squares
            inputs = inputs.to(weight_variance.dtype).square()
        with torch.autocast(inputs.device.type, enabled=False):
            variance = function(inputs, weight_variance, bias_variance)
        if not recomputing:
            self._repeated = self._repeated or pair[0] in self._noise
            self._noise.pop(pair[0], None)
        deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()  # without inputs, no slope either
        return mean + (deviation * self._held(pair[0], layer, variance)).to(mean.dtype)

    @torch.no_grad()
    def _held(
        self, name: str, layer: "GaussianLayer", like: Tensor, precision: Precision | None = None
    ) -> Tensor:
        """The noise of the present pass: standard normal, or from a precision; drawn at its first use.

        Drawn again where a weight has changed its shape since.
        """
        noise = self._noise.get(name)
        if noise is None or noise.shape != like.shape:
            for stream in self.random_streams:
                stream.move(like.device)
            generators = [stream.generator for stream in self.random_streams]
            own = generators if layer.stacked else generators[0]
            noise = randn_like(like, own) if precision is None else precision.sample(torch.zeros_like(like), own)
            noise = self._noise[name] = noise * self._sign
        return noise

    # -------------------------------------------------------------------------------------------------- state
    def __getstate__(self) -> dict[str, Any]:  # copies and pickles begin with a pass of their own
        return {**self.__dict__, "_noise": {}, "_used": True}

    def get_extra_state(self) -> dict[str, Any]:
        """The states of the streams, one a row, and those to which antithetic ones go back."""
        starts = [stream.start for stream in self.random_streams if stream.start is not None]
        return {
            "device": self.random_streams[0].generator.device.type,
            "streams": torch.stack([stream.generator.get_state() for stream in self.random_streams]),
            "starts": torch.stack(starts) if starts else None,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave."""
        if len(state["streams"]) != len(self.random_streams):
            raise ValueError(
                f"sampler: expected a checkpoint with {len(self.random_streams)} random streams, one for each "
                f"replica, got {len(state['streams'])}"
            )
        starts = [None] * len(self.random_streams) if state["starts"] is None else _rows(state["starts"])
        generators = [_restored(stream, state["device"]) for stream in _rows(state["streams"])]
        self.random_streams = [Stream(*pair) for pair in zip(generators, starts, strict=True)]
        self._begin_pass()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of a network that did not sample has no streams: these go on as they are.
        if f"{prefix}_extra_state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Its settings."""
        return f"mode={self.mode!r}, antithetic={self.antithetic}"


def streams_for(replicas: int | None, generator: Generators | None = None) -> list[Stream]:
    """A stream, or one for each of R replicas, seeded from a generator, R of them, or torch's global one.

    Raises:
        ValueError: if there is a sequence of generators that has not one for each replica.
    """
    given = None if generator is None or isinstance(generator, torch.Generator) else len(generator)
    if given is not None and given != replicas:
        expected = "one" if replicas is None else f"one, or one for each of {replicas} replicas"
        raise ValueError(f"generator: expected {expected}, got {given}")
    return [
        Stream(torch.Generator().manual_seed(_seed(generator_of(generator, replica))))
        for replica in range(replicas or 1)
    ]


def _rows(states: Tensor) -> list[Tensor]:
    return [state.clone() for state in states.cpu()]  # torch 2.13 crashes on a state that is part of a tensor


def _restored(state: Tensor, device: str) -> torch.Generator:
    """The generator of a state; seeded as that was where there is no such device."""
    if device != "cpu" and not torch.get_device_module(device).is_available():
        return torch.Generator().manual_seed(int.from_bytes(bytes(state[:8].tolist()), "little"))
    return torch.Generator(device).set_state(state)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _moments(layer: "GaussianLayer", name: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of a parameter, followed by its observer."""
    mean, variance = getattr(layer, name), layer.precision_of(name).variance()
    observer = layer.observation_of(name)
    return observer.follow(mean, variance) if isinstance(observer, VarianceObserver) else (mean, variance)
