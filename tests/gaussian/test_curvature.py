"""Curvature estimators: exact squares and factors against brute force, expectations against the Fisher matrix."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from clagrange import collapse, gaussianize, replicas
from clagrange.gaussian import Diagonal, DiagonalPrecision, Kronecker, KroneckerPrecision
from clagrange.gaussian.curvature import FactorObserver, PerExampleObserver
from clagrange.gaussian.layers import GaussianLayer

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


def classifier() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small classifier, its inputs, and its predicted probabilities."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    inputs = torch.randn(10, 4, dtype=torch.float64)
    return net, inputs, torch.softmax(net(inputs), -1).detach()


def fisher() -> dict[str, Tensor]:
    """Σ_c p_c (∂ log p_c)², the mean over the inputs; for a log-likelihood also the Gauss-Newton diagonal."""
    plain, inputs, probabilities = classifier()
    parameters = {name: value.detach() for name, value in plain.named_parameters()}

    def log_probability(values: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(functional_call(plain, values, (x,)), label)

    of_labels = vmap(grad(log_probability), (None, None, 0))
    gradients = vmap(of_labels, (None, 0, None))(parameters, inputs, torch.arange(3))
    return {
        name: torch.einsum("nc...,nc->...", value.square(), probabilities) / len(inputs)
        for name, value in gradients.items()
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


@pytest.mark.parametrize("precision", [Diagonal("per_example"), Diagonal("sampled", "example"), Kronecker()])
def test_a_gradient_that_was_multiplied(precision: object) -> None:
    """Squares scale by the number's square, the sampled estimate by itself; a replaced gradient changes none."""
    layer, inputs = make("tokens", precision)
    loss_of(layer(inputs)).mean().backward()
    before = [mean.grad.clone() for _, mean in layer.means()]
    found = []
    for change in (lambda g: g, lambda g: 0.1 * g, torch.randn_like):
        for (_, mean), gradient in zip(layer.means(), before, strict=True):
            mean.grad = change(gradient)
        joint = isinstance(precision, Kronecker)
        found.append(factors(layer, 6)[0].clone() if joint else estimate(layer, "weight", 6))
    power = 1 if "sampled" in str(precision) else 2
    torch.testing.assert_close(found[1], 0.1**power * found[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=0)


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
