"""Prediction with uncertainty: over draws of the weights, or in closed form through the network's Jacobian."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clagrange._checks import Number, check_choice, check_count, check_nonnegative, check_replicas, per_replica
from clagrange._modes import evaluating
from clagrange.gaussian.conversion import collapse
from clagrange.gaussian.kronecker import KroneckerPrecision
from clagrange.gaussian.layers import GaussianBlock, GaussianLinear
from clagrange.gaussian.network import gaussian_blocks, gaussian_layers
from clagrange.gaussian.precision import DiagonalPrecision
from clagrange.replicas import Generators, replicas_of

Transform = Callable[[Tensor], Tensor]
Parameter = tuple[str, str]  # name of the layer, name in it

JACOBIAN_NUMBERS = 2**25
"""Entries of Jacobians that the linearised form holds at a time by default: 128 MB in float32."""


@dataclass(frozen=True)
class Prediction:
    """What a network predicts and how sure it is of it; ``mean, variance = prediction`` unpacks the two.

    The law of total variance splits the variance of a target y given its inputs: Var[y] = Var_w[E[y|w]] +
    E_w[Var[y|w]], with w the weights. The first part shrinks with more data, the second does not.

    Attributes:
        mean: E[y]: of the outputs, or the probabilities of the classes; of the outputs' shape.
        epistemic: Var_w[E[y|w]], the variance that comes from not knowing the weights; of the same shape and in
            squared units of the outputs.
        aleatoric: E_w[Var[y|w]], the variance that would be left if the weights were known; likewise. For classes
            y is one-hot: E_w[p(1 − p)].
        entropy: of the classes, H[E_w p], in nats, without the last dimension; None in regression.
        mutual_information: between class and weights, H[E_w p] − E_w H[p], in nats: the epistemic part of the
            entropy; None in regression.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """Var[y], the sum of both parts."""
        return self.epistemic + self.aleatoric

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.mean, self.variance))


def sample_parameters(module: nn.Module, generator: Generators | None = None) -> dict[str, Tensor]:
    """One draw of every Gaussian parameter, by name, for `torch.func.functional_call`."""
    return {
        _full_name(name, part): value
        for name, block in gaussian_blocks(module)
        for part, value in zip(
            block.names, block.split(block.precision.sample(block.joint_mean(), generator)), strict=True
        )
    }


@torch.no_grad()
def predict(
    module: nn.Module,
    x: Tensor,
    samples: int = 32,
    *,
    method: str = "sampled",
    likelihood: str = "regression",
    noise_variance: Number = 0.0,
    transform: Transform | None = None,
    generator: Generators | None = None,
    chunk_size: int | None = None,
) -> Prediction:
    """Predictive mean and variance under the Gaussian weights, in evaluation mode.

    The method "sampled" averages over draws of the weights; its variances are unbiased (for classes their sum
    then exceeds p̄(1 − p̄) by epistemic/samples). "linearized" puts the tangent at the mean weights μ in the place
    of the network, f(x; w) ≈ f(x; μ) + J(w − μ), under which outputs are Gaussian with covariance Σ = J S⁻¹ Jᵀ, S
    the precision of the weights. Nothing is random then, and the mean is the output at the mean weights. It costs
    a backward pass for each output, and memory for the Jacobians of all but linear layers with a bias.

    Probabilities of classes with Gaussian logits f have no closed form. With z_c = f_c − log Σ_{i≠c} exp f_i the
    log-odds of class c and v_c their variance to first order in Σ, "linearized" uses

        p̄_c ∝ σ(z_c/√(1 + π v_c/8)), with sum 1                         (MacKay 1992, for two classes)
        aleatoric_c = p̄_c(1 − p̄_c)/√(1 + 2 p̄_c(1 − p̄_c) v_c),  epistemic_c = p̄_c(1 − p̄_c) − aleatoric_c
        mutual information = H(1 − exp(−I/H)),  I = ½ log det(1 + (diag p̄ − p̄p̄ᵀ)Σ),  H the entropy of p̄.

    The epistemic part and the mutual information are exact to first order in Σ and tend to p̄(1 − p̄) and H where
    it is large. What all logits have in common changes nothing, as it must be; in the usual mean-field form,
    p̄ = softmax(f_c/√(1 + π Σ_cc/8)) (Daxberger et al. 2021), it does.

    Args:
        module: a network with Gaussian layers; left as it is.
        x: inputs, (B, ...) or, for a stacked network, (R, B, ...).
        samples: number of draws, at least 2; of "sampled".
        method: "sampled", or "linearized" for single networks that treat examples independently.
        likelihood: "regression", where outputs are the means of Gaussian targets, or "classification", where they
            are logits of classes along the last dimension.
        noise_variance: of the targets given the weights, in regression, in squared units of the outputs; a
            number, or shape (R,) for a stacked network. At 0 the prediction is that of the outputs themselves.
        transform: applied to every output before averaging, in regression; "linearized" takes it to first order.
        generator: random stream; a sequence of R of them for a stacked network. Default: torch's global one.
        chunk_size: examples whose Jacobians are in memory at a time; default: as many as make 2²⁵ numbers.

    Returns:
        The prediction, which unpacks into mean and variance: of the (transformed) outputs' shape, in float32 or
        float64.

    Raises:
        ValueError: for a bad setting, a network without Gaussian layers, or a stacked one with "linearized".

    Source: MacKay (1992), "The evidence framework applied to classification networks"; Daxberger et al. (2021),
    "Laplace Redux"; for the entropies Houlsby et al. (2011). The aleatoric part and the mutual information under
    Gaussian logits interpolate between their limits; they are not from there.

    Example:
        >>> net = clagrange.gaussianize(nn.Linear(4, 2))
        >>> mean, variance = predict(net, torch.zeros(3, 4), samples=8)
        >>> mean.shape, variance.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
        >>> classes = predict(net, torch.ones(3, 4), method="linearized", likelihood="classification")
        >>> bool((classes.mutual_information < classes.entropy).all())
        True
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples: expected a whole number of at least 2, got {samples!r}")
    check_choice("method", method, ("sampled", "linearized"))
    check_choice("likelihood", likelihood, ("regression", "classification"))
    check_nonnegative("noise_variance", noise_variance)
    replicas = replicas_of(module)
    check_replicas("noise_variance", noise_variance, replicas)
    if likelihood == "classification":
        _refuse_in_classification(noise_variance, transform)
    with evaluating(module):
        if method == "sampled":
            draws = (_output(module, sample_parameters(module, generator), x, transform) for _ in range(samples))
            return _averaged(draws, samples, likelihood == "classification", noise_variance)
        if replicas is not None:
            raise ValueError(
                f"module: expected a single network for method='linearized', got {replicas} stacked ones; use "
                f"method='sampled', or clagrange.replicas.unstack"
            )
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        mean, covariance = _gaussian_outputs(module, x, transform, chunk_size)
    if likelihood == "classification":
        return softmax_of_gaussian(mean, covariance)
    epistemic = covariance.diagonal(dim1=-2, dim2=-1).reshape(mean.shape)
    return Prediction(mean, epistemic, _noise(noise_variance, mean))


def _refuse_in_classification(noise_variance: Number, transform: Transform | None) -> None:
    if transform is not None:
        raise ValueError(
            "transform: expected None with likelihood='classification', which applies the softmax itself; for "
            "the variance of transformed outputs leave likelihood='regression'"
        )
    if isinstance(noise_variance, Tensor) or noise_variance != 0.0:
        raise ValueError(
            f"noise_variance: expected 0 with likelihood='classification', whose noise is that of drawing a "
            f"class; got {noise_variance}"
        )


def _require_classes(logits: Tensor) -> None:
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"likelihood: 'classification' expected logits of at least two classes in the last dimension, got "
            f"outputs of shape {tuple(logits.shape)}; give a single logit z as the two logits 0 and z"
        )


def _noise(variance: Number, mean: Tensor) -> Tensor:
    noise = torch.as_tensor(per_replica(variance, mean), dtype=mean.dtype, device=mean.device)
    return noise.expand_as(mean)


def _full_name(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _output(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, transform: Transform | None) -> Tensor:
    raw: Tensor = torch.func.functional_call(module, parameters, (x,))
    output = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return output if transform is None else transform(output)


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return entropy


# ---------------------------------------------------------------------------------------- averages over draws
def _averaged(draws: Iterable[Tensor], samples: int, classes: bool, noise_variance: Number) -> Prediction:
    mean = squares = conditional_entropy = torch.zeros(())
    for count, draw in enumerate(draws, 1):  # Welford's update: one output in memory, no cancellation
        if classes:
            _require_classes(draw)
            draw = draw.softmax(-1)
            conditional_entropy = conditional_entropy + _entropy(draw) / samples
        deviation = draw - mean
        mean = mean + deviation / count
        squares = squares + deviation * (draw - mean)
    epistemic = squares / (samples - 1)
    if not classes:
        return Prediction(mean, epistemic, _noise(noise_variance, mean))
    aleatoric = (mean * (1.0 - mean) - squares / samples).clamp(min=0.0)  # the average of p(1 - p)
    entropy = _entropy(mean)
    return Prediction(mean, epistemic, aleatoric, entropy, (entropy - conditional_entropy).clamp(min=0.0))


# --------------------------------------------------------------------------------------- the tangent network
def _gaussian_outputs(
    module: nn.Module, x: Tensor, transform: Transform | None = None, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the outputs of a network linearised at its mean weights.

    Args:
        module: a single network, in evaluation mode.
        x: inputs, (B, ...).
        transform: as in `predict`.
        chunk_size: as in `predict`.

    Returns:
        f(x; μ), (B, ..., C), and J S⁻¹ Jᵀ along its last dimension, (B, ..., C, C); where an example has one
        output without a dimension of its own, (B,) and (B, 1, 1).
    """
    tangent = _Tangent(module, transform)
    parts = [tangent(part) for part in x.split(chunk_size or tangent.chunk_size(x[:1]))]
    means, covariances = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(covariances)


class _Tangent:
    """A network linearised at its mean weights.

    For a linear layer y = Wx + b that sees one vector of each example, the Jacobian of the outputs with respect
    to W is the outer product of that with respect to b and of x. The covariance follows from these two, many
    times faster than from the Jacobian itself. Whether a layer is of this kind is found out: it is called once,
    with one vector for each example, and the gradient with respect to W of a random combination of all outputs is
    the sum of the outer products (which it is not where W also serves elsewhere).

    Args:
        module: the network.
        transform: of its outputs.
    """

    def __init__(self, module: nn.Module, transform: Transform | None) -> None:
        self.network = collapse(copy.deepcopy(module))  # counts no examples and observes no gradients
        self.transform = transform
        self.blocks = list(gaussian_blocks(module))
        self.linear = {
            name: layer
            for name, layer in gaussian_layers(module)
            if isinstance(layer, GaussianLinear) and _has_known_axes(layer)
        }

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x; μ) and its covariance along the last dimension."""
        outputs, vectors = self._outputs_and_vectors(x)
        slopes = self._jacobians([(name, "bias") for name in vectors], x)
        vectors = self._outer_products(x, outputs, vectors, slopes)
        others = [(name, block) for name, block in self.blocks if name not in vectors]
        jacobians = self._jacobians([(name, part) for name, block in others for part in block.names], x)
        terms = [
            _linear_covariance(self.linear[name], slopes[name, "bias"], seen) for name, seen in vectors.items()
        ]
        terms += [_covariance(block, [jacobians[name, part] for part in block.names]) for name, block in others]
        return outputs, torch.stack(terms).sum(0).to(outputs.dtype)

    def chunk_size(self, example: Tensor) -> int:
        """How many examples make `JACOBIAN_NUMBERS` numbers; from a batch of one."""
        outputs, vectors = self._outputs_and_vectors(example)
        numbers = sum(self.linear[name].out_features for name in vectors)
        numbers += sum(mean.numel() for name, block in self.blocks if name not in vectors for mean in block.means)
        return max(1, JACOBIAN_NUMBERS // (numbers * outputs.numel()))

    def _outputs(self, parameters: dict[Parameter, Tensor], x: Tensor) -> Tensor:
        by_name = {_full_name(*parameter): value for parameter, value in parameters.items()}
        return _output(self.network, by_name, x, self.transform)

    def _means(self, parameters: Iterable[Parameter]) -> dict[Parameter, Tensor]:
        return {
            parameter: self.network.get_parameter(_full_name(*parameter)).detach() for parameter in parameters
        }

    def _outputs_and_vectors(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs, and what enters the linear layers that are called once with one vector for each example."""
        calls: dict[str, list[Tensor]] = {name: [] for name in self.linear}

        def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, inputs: calls[name].append(inputs[0])

        hooks = [self.network.get_submodule(name).register_forward_pre_hook(recorder(name)) for name in calls]
        outputs = self._outputs({}, x)
        for hook in hooks:
            hook.remove()
        once = {name: seen[0] for name, seen in calls.items() if len(seen) == 1}
        return outputs, {name: seen for name, seen in once.items() if seen.dim() == 2 and len(seen) == len(x)}

    def _jacobians(self, parameters: Sequence[Parameter], x: Tensor) -> dict[Parameter, Tensor]:
        """Of the outputs with respect to each of some parameters: (B, ..., C, *shape)."""
        if not parameters:
            return {}

        def outputs(values: dict[Parameter, Tensor], example: Tensor) -> Tensor:
            output = self._outputs(values, example.unsqueeze(0))[0]
            return output if output.dim() else output.unsqueeze(0)

        jacobian = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))
        return dict(jacobian(self._means(parameters), x))

    def _outer_products(
        self, x: Tensor, outputs: Tensor, vectors: dict[str, Tensor], slopes: dict[Parameter, Tensor]
    ) -> dict[str, Tensor]:
        """Those of ``vectors`` whose outer product with ``slopes`` is the Jacobian with respect to a weight."""
        if not vectors:
            return {}
        factors = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
        weights = self._means((name, "weight") for name in vectors)
        gradients = torch.func.grad(lambda values: (self._outputs(values, x) * factors).sum())(weights)
        found = {}
        for name, seen in vectors.items():
            gradient = gradients[name, "weight"]
            slope = slopes[name, "bias"].flatten(1, -2)
            product = (factors.reshape(len(x), 1, -1).to(slope) @ slope).squeeze(1).mT @ seen
            if torch.dist(gradient, product) <= 0.01 * gradient.norm():
                found[name] = seen
        return found


def _has_known_axes(layer: GaussianLinear) -> bool:
    return {name for name, _ in layer.means()} == {"weight", "bias"} and isinstance(
        layer.precision_of("weight"), (DiagonalPrecision, KroneckerPrecision)
    )


def _linear_covariance(layer: GaussianLinear, slopes: Tensor, vectors: Tensor) -> Tensor:
    """Covariance of outputs with the Jacobians ``slopes`` ⊗ [``vectors``, 1]: (B, ..., C, C).

    Args:
        layer: a linear layer.
        slopes: derivatives of the outputs with respect to what the layer gives, (B, ..., C, out).
        vectors: its inputs, (B, in).
    """
    weight = layer.precision_of("weight")
    slopes, vectors = (tensor.to(weight.prior_precision.dtype) for tensor in (slopes, vectors))
    if isinstance(weight, KroneckerPrecision):
        rows, columns = weight._eigen()
        vectors = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], -1)
        vectors = vectors if columns.vectors is None else vectors @ columns.vectors
        slopes = slopes if rows.vectors is None else slopes @ rows.vectors
        spread = vectors.square() @ weight.spectrum().reciprocal().mT
    else:
        spread = vectors.square() @ weight.variance().mT + layer.precision_of("bias").variance()
    return (slopes * spread.view(len(spread), *[1] * (slopes.dim() - 2), -1)) @ slopes.mT


def _covariance(block: GaussianBlock, jacobians: Sequence[Tensor]) -> Tensor:
    """Covariance of outputs with the Jacobians (B, ..., C, *shape) with respect to a block's parameters."""
    leading = jacobians[0].shape[: jacobians[0].dim() - block.means[0].dim()]
    joint = torch.func.vmap(block.joint)([jacobian.flatten(0, len(leading) - 1) for jacobian in jacobians])
    precision = block.precision
    along_axes = precision.to_axes(joint.to(precision.prior_precision.dtype)) * precision.spectrum().rsqrt()
    along_axes = along_axes.reshape(*leading, -1)
    return along_axes @ along_axes.mT


def softmax_of_gaussian(logits: Tensor, covariance: Tensor) -> Prediction:
    """The prediction of classes whose logits are Gaussian, by the formulas of `predict`.

    Args:
        logits: their mean, (..., C).
        covariance: (..., C, C).

    Example:
        >>> softmax_of_gaussian(torch.tensor([0.0, 2.0]), torch.eye(2)).mean
        tensor([0.1829, 0.8171])
    """
    _require_classes(logits)
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    others = torch.where(identity > 0, -math.inf, logits.unsqueeze(-2))  # row c: the logits of all but class c
    odds = logits - others.logsumexp(-1)
    direction = identity - others.softmax(-1)
    variance = ((direction @ covariance) * direction).sum(-1).clamp(min=0.0)
    mean = nn.functional.logsigmoid(odds * (1.0 + math.pi / 8.0 * variance).rsqrt()).softmax(-1)
    total = mean * (1.0 - mean)
    epistemic = -total * torch.expm1(-0.5 * torch.log1p(2.0 * total * variance))
    entropy = _entropy(mean)
    fisher = torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    capacity = 0.5 * torch.logdet(identity + fisher @ covariance).clamp(min=0.0)
    information = -entropy * torch.expm1(-capacity / entropy.clamp(min=torch.finfo(entropy.dtype).tiny))
    return Prediction(mean, epistemic, total - epistemic, entropy, information)
