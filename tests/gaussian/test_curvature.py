"""Curvature estimators: exact squares and factors against brute force, expectations against the Fisher matrix."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from clagrange import collapse, gaussianize, replicas
from clagrange.gaussian import Diagonal, DiagonalPrecision, Kronecker, KroneckerPrecision
from clagrange.gaussian.curvature import FactorObserver, PerExampleObserver, proportion
from clagrange.gaussian.layers import GaussianLayer
from clagrange.optim.euler_lagrange_step import squared_gradient

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "tokens": (lambda: nn.Linear(4, 3), (5, 4)),
    "grid": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
    "strided": (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, dilation=2, padding="valid"), (2, 7, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "one-dimensional": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 3, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), (4,)),
}
"""A layer and the shape of one input."""
OTHERS = ("one-dimensional", "transposed", "embedding")
"""Those whose factors are checked beside all other layers."""


def make(name: str, precision: object, seed: int = 0) -> tuple[GaussianLayer, Tensor]:
    """A Gaussian layer in float64 and six inputs for it."""
    torch.manual_seed(seed)
    form, shape = LAYERS[name]
    layer = gaussianize(form().double(), precision=precision)
    one_hot = isinstance(layer, nn.Embedding)
    return layer, torch.randint(5, (6, *shape)) if one_hot else torch.randn(6, *shape, dtype=torch.float64)


def loss_of(outputs: Tensor) -> Tensor:
    """A loss for each example that is not a sum over its outputs."""
    flat = outputs.flatten(1)
    weighted = flat * torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)
    return weighted.logsumexp(1) + flat.mean(1).square()


def example_gradients(layer: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The gradient of every example's own loss, one after the other."""
    plain = collapse(copy.deepcopy(layer))
    names, parameters = zip(*plain.named_parameters(), strict=True)
    single = [torch.autograd.grad(loss_of(plain(x.unsqueeze(0))).sum(), parameters) for x in inputs]
    return {name: torch.stack(values) for name, values in zip(names, zip(*single, strict=True), strict=True)}


def estimate(layer: GaussianLayer, name: str, examples: int, **settings: float) -> Tensor:
    """What the observer of a parameter reports for its present gradient."""
    return layer.observation_of(name).curvature(layer.get_parameter(name).grad, examples, **settings)


# ------------------------------------------------------------------------------ squares of single examples
@pytest.mark.parametrize("name", LAYERS)
def test_per_example_squares_are_exact(name: str) -> None:
    layer, inputs = make(name, Diagonal("per_example"))
    loss_of(layer(inputs)).mean().backward()
    for part, gradients in example_gradients(layer, inputs).items():
        found = estimate(layer, part, len(inputs))
        assert found.shape == layer.get_parameter(part).shape
        torch.testing.assert_close(found, gradients.square().mean(0), rtol=1e-10, atol=1e-14)


class SelfAttention(nn.Module):
    """Attention of inputs to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]


def test_per_example_squares_of_attention() -> None:
    """Its three projections are parts of one weight."""
    torch.manual_seed(0)
    net, inputs = gaussianize(SelfAttention().double(), precision=Diagonal("per_example")), torch.randn(6, 5, 4)
    inputs = inputs.double()
    loss_of(net(inputs)).mean().backward()
    for name, gradients in example_gradients(net, inputs).items():
        path, _, part = name.rpartition(".")
        found = estimate(net.get_submodule(path), part, len(inputs))
        torch.testing.assert_close(found, gradients.square().mean(0), rtol=1e-10, atol=1e-14)


def test_per_example_squares_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is too large for all examples at once."""
    monkeypatch.setattr("clagrange.gaussian.curvature._BUDGET", 2 * 3 * 18)
    layer, inputs = make("convolution", Diagonal("per_example"))
    loss_of(layer(inputs)).mean().backward()
    expected = example_gradients(layer, inputs)["weight"].square().mean(0)
    torch.testing.assert_close(estimate(layer, "weight", 6), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["linear", "tokens", "grouped"])
def test_per_example_squares_of_replicas(name: str) -> None:
    singles, inputs = zip(*(make(name, Diagonal("per_example"), seed) for seed in range(3)), strict=True)
    stacked = replicas.stack(singles)
    sum(loss_of(output).mean() for output in stacked(torch.stack(inputs))).backward()
    for part in ("weight", "bias"):
        expected = []
        for layer, x in zip(singles, inputs, strict=True):
            layer.zero_grad()
            loss_of(layer(x)).mean().backward()
            expected.append(estimate(layer, part, 6))
        torch.testing.assert_close(estimate(stacked, part, 6), torch.stack(expected), rtol=1e-12, atol=0)


def test_a_layer_that_is_used_twice() -> None:
    """Each use counts as a position of its own: the squares add up, without the products between the uses."""
    layer, inputs = make("linear", Diagonal("per_example"))
    other = inputs.flip(1)
    (layer(inputs).square().sum(1) + layer(other).square().sum(1)).mean().backward()
    separate = [(2 * layer(x)).unsqueeze(-1).square() * x.unsqueeze(-2).square() for x in (inputs, other)]
    torch.testing.assert_close(estimate(layer, "weight", 6), sum(separate).mean(0).detach(), rtol=1e-12, atol=0)


def one_hot_case() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, P) of a vocabulary of 5, some of them repeated, as numbers and as rows, and output gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (6, 4), generator=generator)
    d = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64) / 6
    return tokens, nn.functional.one_hot(tokens, 5).double(), d


def test_per_example_squares_of_one_hot_inputs() -> None:
    tokens, rows, d = one_hot_case()
    observer = PerExampleObserver(DiagonalPrecision(torch.zeros(5, 3, dtype=torch.float64)))
    observer.add(tokens, d)
    gradients = rows.mT @ d  # of each example
    found = observer.curvature(3.0 * gradients.sum(0), 6)  # a gradient that was multiplied with 3
    torch.testing.assert_close(found, 9.0 * 6.0 * gradients.square().sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), ((1, 3), (2, 0))])
def test_per_example_squares_of_convolutions_by_torch_func(
    groups: int, stride: int | tuple[int, int], padding: int | tuple[int, int]
) -> None:
    """Through a network, against the gradients of single examples by torch.func."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride, padding, groups=groups), nn.Tanh(), nn.Conv2d(8, 4, 2, groups=groups)
    ).double()
    inputs = torch.randn(5, 4, 8, 9, dtype=torch.float64)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(functional_call(plain, values, (x.unsqueeze(0),))).squeeze()

    parameters = {name: value.detach() for name, value in plain.named_parameters()}
    expected = vmap(grad(loss), (None, 0))(parameters, inputs)
    net = gaussianize(plain, precision=Diagonal("per_example"))
    loss_of(net(inputs)).mean().backward()
    for name, gradients in expected.items():
        found = estimate(net[int(name[0])], name[2:], len(inputs))
        torch.testing.assert_close(found, gradients.square().mean(0), rtol=1e-9, atol=1e-14)


# -------------------------------------------------------------------------------------- Kronecker factors
def factors(layer: GaussianLayer, examples: int) -> tuple[Tensor, Tensor]:
    """G and A of a pass, as a precision takes them that moves all the way."""
    block = next(layer.blocks())
    gradient = block.joint([mean.grad for mean in block.means])
    block.precision.observe(layer.observation_of("weight").curvature(gradient, examples))
    block.precision.relax(1.0, 1.0)
    return block.precision.outputs, block.precision.inputs


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in OTHERS])
def test_factors_by_brute_force(name: str) -> None:
    """G = the mean over examples of Σ d dᵀ over positions, A = the mean over both of x xᵀ; by loops."""
    layer, inputs = make(name, Kronecker())
    outputs = layer(inputs)
    outputs.retain_grad()
    loss_of(outputs).mean().backward()
    found_outputs, found_inputs = factors(layer, 6)
    d = 6.0 * outputs.grad
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        step, dilation = layer.stride[0], layer.dilation[0]
        height, width = ((k - 1) * dilation + 1 for k in layer.kernel_size)
        patches = [
            padded[n, :, i * step : i * step + height : dilation, j * step : j * step + width : dilation]
            for n in range(6)
            for i in range(d.shape[2])
            for j in range(d.shape[3])
        ]
        x = torch.stack([patch.reshape(layer.groups, -1) for patch in patches], 1)
        d = d.movedim(1, -1).flatten(0, 2).unflatten(-1, (layer.groups, -1)).movedim(1, 0)
    else:
        x, d = inputs.reshape(1, -1, 4), d.reshape(1, -1, 3)
    if layer.bias is not None:
        x = torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], -1)
    for found, expected in ((found_outputs, d.mT @ d / 6), (found_inputs, x.mT @ x / x.shape[1])):
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-10, atol=1e-14)


def test_factors_of_one_example_are_its_gradient_squared() -> None:
    layer, inputs = make("linear", Kronecker())
    loss_of(layer(inputs[:1])).mean().backward()
    gradient = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(-1)], -1).flatten()
    torch.testing.assert_close(torch.kron(*factors(layer, 1)), gradient.outer(gradient), rtol=1e-12, atol=1e-16)


def test_factors_of_one_hot_inputs() -> None:
    tokens, rows, d = one_hot_case()
    found = []
    for x in (tokens, rows):
        precision = KroneckerPrecision(torch.zeros(3, 5, dtype=torch.float64), diagonal_inputs=True)
        observer = FactorObserver(precision, bias=False)
        for start in (0, 3):  # two passes, so that both add up
            observer.add(x[start : start + 3], d[start : start + 3])
        precision.observe(observer.curvature(0.5 * (rows.mT @ d).sum(0).mT, 6))
        precision.relax(1.0, 1.0)
        found.append((precision.outputs, precision.inputs))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0][1], rows.flatten(0, 1).mean(0), rtol=1e-12, atol=0)


# ------------------------------------------------------------------- expectations over labels and over draws
SAMPLES = 500
"""Stacked networks, each a sample of its own."""


def classifier(activation: type[nn.Module] = nn.Tanh) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small classifier, its inputs, and its predicted probabilities."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), activation(), nn.Linear(3, 3)).double()
    inputs = torch.randn(10, 4, dtype=torch.float64)
    return net, inputs, torch.softmax(net(inputs), -1).detach()


def label_gradients(plain: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """−∂ log p of every label at every input, (n, classes, ...)."""
    parameters = {name: value.detach() for name, value in plain.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(plain, values, (x,)), label)

    of_labels = vmap(grad(loss), (None, None, 0))
    return vmap(of_labels, (None, 0, None))(parameters, inputs, torch.arange(3))


def fisher(examples: int = 10) -> dict[str, Tensor]:
    """Σ_c p_c (∂ log p_c)², the mean over the inputs; for a log-likelihood also the Gauss-Newton diagonal."""
    plain, inputs, probabilities = classifier()
    return {
        name: torch.einsum("nc...,nc->...", value.square(), probabilities[:examples]) / examples
        for name, value in label_gradients(plain, inputs[:examples]).items()
    }


def many(plain: nn.Module, precision: object) -> nn.Module:
    """A network many times over, Gaussian."""
    return gaussianize(replicas.stack([plain] * SAMPLES), precision=precision)


def backward(net: nn.Module, inputs: Tensor, labels: Tensor, weight: float = 1.0) -> None:
    """Gradients of each network's own mean loss: inputs (n, ...) or (R, n, ...), labels likewise."""
    inputs = inputs if inputs.dim() > 2 else inputs.expand(SAMPLES, *inputs.shape)
    labels = labels.expand(inputs.shape[:2])
    losses = nn.functional.cross_entropy(net(inputs).movedim(-1, 1), labels, reduction="none")
    (weight * losses.mean(1).sum()).backward()


def assert_mean(samples: Tensor, expected: Tensor, errors: float = 5.0) -> None:
    """The mean of independent samples is right to some of its standard errors, which are small."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < errors * error + 1e-12).all()
    assert error.norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("curvature", ["squared_gradient", "per_example"])
def test_with_labels_of_the_model_the_expectation_is_the_fisher_diagonal(curvature: str) -> None:
    plain, inputs, probabilities = classifier()
    net = many(plain, Diagonal(curvature))
    labels = torch.multinomial(probabilities, SAMPLES, True, generator=torch.Generator().manual_seed(1)).mT
    backward(net, inputs, labels)
    for name, expected in fisher().items():
        layer, part = net[int(name[0])], name[2:]
        if curvature == "per_example":
            samples = estimate(layer, part, 10)
        else:
            samples = 10 * layer.get_parameter(part).grad.square()
        assert_mean(samples, expected)


def test_squared_gradient_exceeds_the_mean_of_squares_by_the_mean_gradient() -> None:
    """Over batches of n from the data, E[n g²] = the mean of squares + (n − 1)·(mean gradient)²."""
    plain, inputs, _ = classifier()
    net = many(plain, Diagonal("per_example"))
    labels, layer = torch.arange(10) % 3, net[2]
    backward(net, inputs, labels)
    everything, mean = estimate(layer, "weight", 10)[0], layer.weight.grad[0].clone()
    net.zero_grad()
    chosen = torch.randint(10, (SAMPLES, 4), generator=torch.Generator().manual_seed(2))
    backward(net, inputs[chosen], labels[chosen])
    assert_mean(estimate(layer, "weight", 4), everything)
    assert_mean(4 * layer.weight.grad.square(), everything + 3 * mean.square())
    assert (3 * mean.square()).norm() > 0.2 * everything.norm()


class Enumerated(NamedTuple):
    """A batch of three with every combination of labels: a network for each, after its backward pass.

    Attributes:
        plain: the network.
        inputs: (3, 4).
        probabilities: of each input's labels, (3, classes).
        net: the stacked networks, (27, ...).
        weights: the probability of each combination, (27,).
    """

    plain: nn.Sequential
    inputs: Tensor
    probabilities: Tensor
    net: nn.Sequential
    weights: Tensor

    def mean(self, samples: Tensor) -> Tensor:
        """The expectation of an estimate over the labels, exactly."""
        return torch.einsum("l...,l->...", samples, self.weights)

    def variance(self, samples: Tensor) -> Tensor:
        """The variance of every entry of an estimate over the labels, exactly."""
        return self.mean((samples - self.mean(samples)).square())


def enumerated(precision: object, activation: type[nn.Module] = nn.Tanh, head: float = 1.0) -> Enumerated:
    """All labels of a batch, with the last layer multiplied with ``head``."""
    plain, inputs, _ = classifier(activation)
    with torch.no_grad():
        plain[2].weight.mul_(head)
        plain[2].bias.mul_(head)
        inputs = inputs[:3]
        probabilities = torch.softmax(plain(inputs), -1)
    labels = torch.cartesian_prod(*[torch.arange(3)] * 3)
    weights = probabilities[torch.arange(3), labels].prod(1)
    net = gaussianize(replicas.stack([plain] * 27), precision=precision)
    backward(net, inputs.expand(27, *inputs.shape), labels)
    return Enumerated(plain, inputs, probabilities, net, weights)


def moments(case: Enumerated, values: Tensor) -> Tensor:
    """The expectation over its label for every example: (3, ...) from (3, classes, ...)."""
    return torch.einsum("nc...,nc->n...", values, case.probabilities)


def test_mean_and_variance_of_per_example_squares() -> None:
    """Over all labels: the Fisher diagonal; Σ Var(g²)/n² with the examples' own gradients g."""
    case = enumerated(Diagonal("per_example"))
    for name, gradients in label_gradients(case.plain, case.inputs).items():
        samples = estimate(case.net[int(name[0])], name[2:], 3)
        torch.testing.assert_close(case.mean(samples), fisher(3)[name], rtol=1e-10, atol=0)
        spread = moments(case, gradients**4) - moments(case, gradients.square()).square()
        torch.testing.assert_close(case.variance(samples), spread.sum(0) / 9, rtol=1e-8, atol=0)


def test_mean_and_variance_of_the_squared_gradient() -> None:
    """Over all labels: the Fisher diagonal, and (Σ k − Σ m² + 2 Σ_{i ≠ j} m_i m_j)/n².

    With the second and fourth moments m and k of the examples' gradients, which have mean 0.
    """
    case = enumerated(Diagonal())
    for name, gradients in label_gradients(case.plain, case.inputs).items():
        samples = squared_gradient(case.net.get_parameter(name).grad, 3)
        torch.testing.assert_close(case.mean(samples), fisher(3)[name], rtol=1e-10, atol=0)
        second, fourth = moments(case, gradients.square()), moments(case, gradients**4)
        pairs = second.sum(0).square() - second.square().sum(0)
        expected = (fourth - second.square()).sum(0) + 2 * pairs
        torch.testing.assert_close(case.variance(samples), expected / 9, rtol=1e-8, atol=0)


def rows_of(case: Enumerated, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows x of a layer, and Jacobians of the logits by torch.func.

    x with 1 appended, (3, in + 1); by the layer's outputs, (3, classes, out); by its weights and biases,
    (3, classes, out·(in + 1)).
    """
    plain, layer = case.plain, case.plain[index]
    x = plain[:index](case.inputs)
    joint = torch.cat([layer.weight, layer.bias.unsqueeze(-1)], -1).detach()

    def logits_of(outputs: Tensor) -> Tensor:
        return plain[index + 1 :](outputs)

    def logits(joint: Tensor, x: Tensor) -> Tensor:
        return logits_of(joint[:, :-1] @ x + joint[:, -1])

    by_outputs = vmap(jacrev(logits_of))(layer(x))
    by_weights = vmap(jacrev(logits), (None, 0))(joint, x).flatten(2)
    return torch.cat([x, torch.ones(3, 1)], -1).detach(), by_outputs.detach(), by_weights.detach()


def gauss_newton(case: Enumerated, jacobian: Tensor) -> Tensor:
    """Jᵀ(diag p − p pᵀ)J of every example."""
    p = case.probabilities
    hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return jacobian.mT @ hessian @ jacobian


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_mean_and_variance_of_kronecker_factors(activation: type[nn.Module], index: int) -> None:
    """Over all labels E[Ĝ] is the Gauss-Newton matrix of the layer's outputs; Var[Ĝ] = Σ Var(d dᵀ)/n²."""
    case = enumerated(Kronecker(), activation)
    outputs, inputs = factors(case.net[index], 3)
    x, by_outputs, _ = rows_of(case, index)
    torch.testing.assert_close(case.mean(outputs), gauss_newton(case, by_outputs).mean(0), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(inputs, (x.mT @ x / 3).expand_as(inputs), rtol=1e-10, atol=1e-14)
    errors = torch.eye(3, dtype=torch.float64) - case.probabilities.unsqueeze(1)  # of each label, up to the sign
    d = errors @ by_outputs
    squares = d.unsqueeze(-1) * d.unsqueeze(-2)
    spread = (moments(case, squares.square()) - moments(case, squares).square()).sum(0) / 9
    torch.testing.assert_close(case.variance(outputs), spread, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("index", [0, 2])
def test_error_of_the_kronecker_product(index: int) -> None:
    """G ⊗ A differs from the Fisher matrix by the covariance over the examples of d dᵀ and x xᵀ.

    With three examples and ReLU, some of whose units are off, that is less than three quarters of it in norm.
    """
    case = enumerated(Kronecker(), nn.ReLU)
    outputs, inputs = factors(case.net[index], 3)
    x, by_outputs, by_weights = rows_of(case, index)
    fisher = gauss_newton(case, by_weights).mean(0)
    found = case.mean(torch.stack([torch.kron(*pair) for pair in zip(outputs, inputs, strict=True)]))
    blocks = gauss_newton(case, by_outputs), x.unsqueeze(-1) * x.unsqueeze(-2)
    apart = [block - block.mean(0) for block in blocks]
    covariance = torch.stack([torch.kron(*pair) for pair in zip(*apart, strict=True)]).mean(0)
    torch.testing.assert_close(found, fisher - covariance, rtol=1e-8, atol=1e-13)
    assert 0.01 * fisher.norm() < covariance.norm() < 0.75 * fisher.norm()


def test_kronecker_product_is_exact_where_errors_are_independent_of_inputs() -> None:
    """Of a last layer that predicts the same for all inputs."""
    case = enumerated(Kronecker(), head=0.0)
    outputs, inputs = factors(case.net[2], 3)
    fisher = gauss_newton(case, rows_of(case, 2)[2]).mean(0)
    found = torch.kron(case.mean(outputs), inputs[0])
    torch.testing.assert_close(found, fisher, rtol=1e-9, atol=1e-14)


def drawn(mode: str, antithetic: bool, passes: int = 2) -> nn.Sequential:
    """Classifiers with weights of standard deviation 1e-3 after some passes over the same batch."""
    plain, inputs, _ = classifier()
    net = many(plain, Diagonal("sampled", sampling=mode, antithetic=antithetic))
    for layer in (net[0], net[2]):
        for block in layer.blocks():
            block.precision.precision.fill_(1e6)
    for _ in range(passes):
        backward(net, inputs, torch.arange(10) % 3, weight=1 / passes)
    return net


@pytest.mark.parametrize("mode", ["batch", "example"])
def test_sampled_has_the_expectation_of_the_hessian(mode: str) -> None:
    """Of the last layer, where that is the Gauss-Newton matrix; at small variances, so that it is at the mean."""
    net = drawn(mode, antithetic=True, passes=8)
    for part in ("weight", "bias"):
        assert_mean(estimate(net[2], part, 80), fisher()[f"2.{part}"])


def test_sampled_is_noisy_as_the_gradient_over_the_standard_deviation() -> None:
    """What every weight's own noise makes of the gradient, g ε/σ; a pair of opposite noise cancels it."""
    net = drawn("batch", antithetic=False)
    spread = estimate(net[2], "weight", 20).std(0)
    gradient = net[2].weight.grad.mean(0)
    torch.testing.assert_close(spread, gradient.abs() * 1e3 / math.sqrt(2.0), rtol=0.15, atol=0.1)
    net = drawn("batch", antithetic=True)
    assert estimate(net[2], "weight", 20).std(0).norm() < 0.1 * spread.norm()


@pytest.mark.parametrize("name", ["linear", "no bias", "tokens", "convolution", "grouped"])
@pytest.mark.parametrize("mode", ["batch", "example"])
def test_sampled_on_a_quadratic_is_its_hessian_at_any_variance(name: str, mode: str) -> None:
    """½|y|² summed over outputs has the Hessian Σ (∂y)² in each weight.

    With a draw for each position instead of each example nothing is lost here, since the loss is a sum over them.
    """
    layer, inputs = make(name, "diagonal")
    plain, inputs = collapse(copy.deepcopy(layer)), inputs[:3]
    net = many(plain, Diagonal("sampled", sampling=mode, antithetic=True))
    for block in net.blocks():
        block.precision.precision.fill_(2.0)
    for _ in range(2):
        (0.5 * net(inputs.expand(SAMPLES, *inputs.shape)).square().sum() / 3 / 2).backward()
    for part, value in plain.named_parameters():
        jacobian = torch.autograd.functional.jacobian(
            lambda value, part=part: functional_call(plain, {part: value}, (inputs,)), value.detach()
        )
        expected = jacobian.square().sum(tuple(range(inputs.dim()))) / 3
        assert_mean(estimate(net, part, 6), expected)


@pytest.mark.parametrize("mode", ["batch", "example"])
def test_mean_and_variance_of_sampled_on_a_quadratic(mode: str) -> None:
    """Of ½|y − t|² with residuals r, at any variances σ² of the weights.

    For one draw of the weights of an output, with the gradient g and the Hessian H, the estimate
    (g + Hσε)_i ε_i/σ_i has mean H_ii and variance g_i²/σ_i² + H_ii² + Σ_j H_ij² σ_j²/σ_i². For draws of the
    outputs with variances s² = Σ x²σ² it is the mean of x²(r + sε)ε/s: mean H_ii, variance Σ x⁴(r²/s² + 2)/n².
    """
    torch.manual_seed(0)
    count, x, targets = 5000, torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    plain = nn.Linear(2, 2).double()
    net = gaussianize(replicas.stack([plain] * count), precision=Diagonal("sampled", sampling=mode))
    variances = torch.tensor([[0.5, 1.0], [2.0, 0.3]]).double(), torch.tensor([0.7, 0.4]).double()
    for block, variance in zip(net.blocks(), variances, strict=True):
        block.precision.precision.copy_(1 / variance)
    (0.5 * (net(x.expand(count, 3, 2)) - targets).square().sum() / 3).backward()
    samples = torch.cat([estimate(net, "weight", 3), estimate(net, "bias", 3).unsqueeze(-1)], -1)
    x = torch.cat([x, torch.ones(3, 1)], -1)
    residuals = (plain(x[:, :2]) - targets).detach()
    variance = torch.cat([variances[0], variances[1].unsqueeze(-1)], -1)
    hessian, gradient = x.mT @ x / 3, residuals.mT @ x / 3
    if mode == "batch":
        others = hessian.square() @ variance.mT
        expected = (gradient.square() + others.mT) / variance + hessian.diagonal().square()
    else:
        own = x.square() @ variance.mT  # s², (n, out)
        expected = (residuals.square() / own + 2).mT @ x**4 / 9
    assert_mean(samples, hessian.diagonal().expand(2, 3), errors=4.0)
    torch.testing.assert_close(samples.var(0), expected, rtol=0.2, atol=0)


# -------------------------------------------------------------------------------------- belief and gradient
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_bound_of_the_belief_raises_it_as_documented(noise: float) -> None:
    """In units of H, with b = ``noise``; many weights, averaged over many steps."""
    decay, total = 0.99, 0.0
    precision = DiagonalPrecision(torch.zeros(4000))
    precision.curvature.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1500):
        drawn = torch.randn(4000, generator=generator)
        precision.observe(1.0 + noise / math.sqrt((1 - decay) / 2) * drawn, decay)
        assert precision.curvature.min() >= 0
        total += float(precision.curvature.mean()) * (step >= 500) / 1000
    density = math.exp(-0.5 / noise**2) / math.sqrt(2 * math.pi)
    below = 0.5 * math.erfc(-1 / noise / math.sqrt(2))
    assert total == pytest.approx(1 + noise * density / below, rel=0.05)


observed = pytest.mark.parametrize(
    "precision", [Diagonal("per_example"), Diagonal("sampled", "example"), Kronecker()], ids=str
)


def after_changes(layer: GaussianLayer, inputs: Tensor, *changes: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The estimate for each of some changes that are made to the gradient of a mean loss of each network."""
    layer.zero_grad()
    loss_of(layer(inputs).flatten(0, int(layer.stacked))).mean().backward()
    before = [mean.grad.clone() for _, mean in layer.means()]
    found = []
    for change in changes:
        for (_, mean), gradient in zip(layer.means(), before, strict=True):
            mean.grad = change(gradient)
        joint = isinstance(next(layer.blocks()).precision, KroneckerPrecision)
        found.append(factors(layer, 6)[0].clone() if joint else estimate(layer, "weight", 6))
    return found


def power_of(precision: object) -> int:
    """The power with which an estimate follows a number that its gradient is multiplied with."""
    return 1 if "sampled" in str(precision) else 2


@observed
@pytest.mark.parametrize("number", [-3.0, 0.1, 1.0, 1 / 65536])
def test_a_gradient_that_was_multiplied(precision: object, number: float) -> None:
    """Squares scale by the number's square, the sampled estimate by itself."""
    layer, inputs = make("tokens", precision)
    found = after_changes(layer, inputs, lambda g: g, lambda g: number * g)
    torch.testing.assert_close(found[1], number ** power_of(precision) * found[0], rtol=1e-10, atol=0)


@observed
def test_a_gradient_that_was_replaced(precision: object) -> None:
    """By one of about the same size: the estimate stays. By one of another size: it follows the size."""
    layer, inputs = make("tokens", precision)
    found = after_changes(layer, inputs, lambda g: g, lambda g: g.roll(1, 0), lambda g: -g.roll(1, 0) / 65536)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)
    share = (found[2] / found[0]).flatten() ** (1 / power_of(precision)) * 65536
    assert ((share > 0.25) & (share < 4.0)).all()


@observed
def test_a_gradient_with_an_entry_that_is_not_finite(precision: object) -> None:
    """Its other entries still tell with what it was multiplied, and the estimate is finite."""
    layer, inputs = make("linear", precision)

    def spoilt(gradient: Tensor, number: float, value: float) -> Tensor:
        gradient = number * gradient
        gradient.view(3, -1)[:2, 0] = value
        return gradient

    numbers = [(1.0, math.inf), (1.0, math.nan), (1 / 65536, math.inf)]
    changes = [lambda g, number=number: spoilt(g, *number) for number in numbers]
    whole, *found = after_changes(layer, inputs, lambda g: g, *changes)
    for (number, _), spoilt_estimate in zip(numbers, found, strict=True):
        torch.testing.assert_close(spoilt_estimate, number ** power_of(precision) * whole, rtol=1e-10, atol=0)


@observed
def test_a_gradient_of_zeros(precision: object) -> None:
    """It is 0 times what was seen; where that is 0 as well, nothing tells that it was multiplied."""
    layer, inputs = make("linear", precision)
    assert (after_changes(layer, inputs, torch.zeros_like)[0] == 0).all()
    numbers, _ = proportion(torch.zeros(1, 3), torch.zeros(1, 3), stacked=True)
    assert numbers.tolist() == [1.0]


@pytest.mark.parametrize("precision", [Diagonal("per_example"), Kronecker()], ids=str)
@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_replicas_are_multiplied_with_numbers_of_their_own(precision: object, name: str) -> None:
    """Also where some are clipped value by value; of all groups of a convolution it is the same number."""
    layer, inputs = make(name, precision)
    stacked = replicas.stack([layer] * 4)

    def change(gradient: Tensor) -> Tensor:
        largest = gradient[2].abs().max() / 65536
        clipped = (gradient[2] / 65536).clamp(-0.9 * largest, 0.9 * largest)
        return torch.stack([gradient[0], 0.5 * gradient[1], clipped, 0.0 * gradient[3]])

    whole, changed = after_changes(stacked, inputs.expand(4, *inputs.shape), lambda g: g, change)
    for r, number in enumerate((1.0, 0.5, 1 / 65536, 0.0)):
        rtol = 0.5 if r == 2 else 1e-10  # the projections are of clipped entries too
        torch.testing.assert_close(changed[r], number**2 * whole[r], rtol=rtol, atol=0)


@pytest.mark.parametrize("precision", [Diagonal("per_example"), Diagonal("sampled", "batch"), Kronecker()])
def test_nothing_seen_is_no_estimate(precision: object) -> None:
    layer, inputs = make("linear", precision)
    assert layer.observation_of("weight").curvature(torch.zeros(3, 5), 6) is None
    loss_of(layer(inputs)).mean().backward()
    layer.clear_examples()
    assert layer.observation_of("weight").curvature(torch.zeros(3, 5), 6) is None


def test_sampled_in_evaluation_sees_nothing() -> None:
    layer, inputs = make("linear", Diagonal("sampled", sampling="batch"))
    loss_of(layer.eval()(inputs)).mean().backward()
    assert layer.observation_of("weight").curvature(layer.weight.grad, 6) is None


@pytest.mark.parametrize("precision", [Diagonal("per_example"), Kronecker()])
def test_transforms_of_torch_func_are_not_observed(precision: object) -> None:
    layer, inputs = make("linear", precision)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def one(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, values, (x,)).square().sum()

    gradients = vmap(grad(one), (None, 0))(parameters, inputs)
    assert gradients["weight"].shape == (6, 3, 4)
    assert layer.observation_of("weight").curvature(torch.zeros(3, 5), 6) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "hessian"}, r"curvature: expected one of squared_gradient, per_example, sampled"),
        ({"curvature": "per_exampel"}, r"did you mean 'per_example'"),
        ({"sampling": "weights"}, r"sampling: expected one of mean, batch, example"),
        ({"curvature": "sampled"}, r"sampling: curvature='sampled' .* expected 'batch' or 'example', got 'mean'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diagonal(**settings)
