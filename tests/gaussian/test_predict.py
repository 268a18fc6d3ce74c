"""Predictions over draws of the weights and through the tangent network, and the draws."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import R, assert_same_tensors, batch, convnet, gaussian_parameters, images, mlp, normed, train
from torch import Tensor, nn

from clagrange import GaussianLinear, gaussianize, predict, replicas, variances
from clagrange.gaussian import KroneckerPrecision, gaussian_blocks, gaussian_layers, sample_parameters
from clagrange.gaussian.prediction import softmax_of_gaussian
from clagrange.optim import EulerLagrange


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned(
    net: nn.Module, structure: str, inputs: Tensor | None = None, prior_variance: float = 1.0
) -> nn.Module:
    """A Gaussian network that has seen some batches, so that its precisions are far from the prior."""
    gaussianize(net, precision=structure, prior_variance=prior_variance)
    optimizer = EulerLagrange(net, lr=0.02, temperature=0.05 * prior_variance, variance_rate=0.2)
    for step in range(6):
        seen = batch(step)[0] if inputs is None else inputs
        outputs = net(seen)
        targets = torch.randn(outputs.shape, generator=stream(step), dtype=outputs.dtype)
        optimizer.zero_grad()
        (outputs - targets).square().sum().div(len(seen)).backward()
        optimizer.step()
    return net


def uneven(layer: GaussianLinear, seed: int = 0) -> GaussianLinear:
    """Give every weight a variance of its own."""
    for precision in (layer.weight_precision, layer.bias_precision):
        precision.precision.mul_(0.5 + torch.rand(precision.precision.shape, generator=stream(seed)))
    return layer


def test_linear_layer_against_the_closed_form() -> None:
    """Mean Wx + b, variance Σ x²σ² + σ_b², both within four standard errors of the Monte Carlo estimate."""
    layer = uneven(GaussianLinear(5, 3, dtype=torch.float64))
    inputs, _ = batch(size=4)
    samples = 1000
    mean, variance = predict(layer, inputs, samples, generator=stream())
    exact = inputs**2 @ variances(layer)["weight"].T + variances(layer)["bias"]
    assert ((mean - layer(inputs)).abs() < 4 * (exact / samples).sqrt()).all()
    assert ((variance - exact).abs() < 4 * exact * math.sqrt(2 / samples)).all()


def test_equals_the_plain_mean_and_variance_of_the_draws() -> None:
    net, (inputs, _) = gaussianize(mlp()), batch()
    mean, variance = predict(net, inputs, samples=5, transform=nn.Softmax(-1), generator=stream())
    draws, generator = [], stream()
    for _ in range(5):
        weights = sample_parameters(net, generator)
        draws.append(torch.func.functional_call(net, weights, (inputs,)).softmax(-1))
    torch.testing.assert_close(mean, torch.stack(draws).mean(0))
    torch.testing.assert_close(variance, torch.stack(draws).var(0))
    torch.testing.assert_close(mean.sum(-1), torch.ones(8, dtype=torch.float64))


def test_reproducible_by_the_generator_and_by_the_global_stream() -> None:
    net, (inputs, _) = gaussianize(mlp()), batch()
    first, again, other = (predict(net, inputs, 3, generator=stream(seed)).mean for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    unseeded = predict(net, inputs, 3).mean
    torch.manual_seed(5)
    assert torch.equal(predict(net, inputs, 3).mean, unseeded)


def test_leaves_the_network_as_it_is() -> None:
    net = gaussianize(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    )
    net[1].eval()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mean, _ = predict(net, batch()[0], 4)
    assert [module.training for module in net.modules()] == modes
    assert_same_tensors(dict(net.state_dict()), before)
    assert not mean.requires_grad
    assert all(layer.examples == 0 for layer in (net[0], net[3]))


def test_runs_in_evaluation_mode() -> None:
    net = gaussianize(nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.9))).double()
    for _, _, precision in gaussian_parameters(net):
        precision.precision.fill_(1e30)
    inputs, _ = batch()
    mean, variance = predict(net, inputs, 2)
    torch.testing.assert_close(mean, net[0](inputs))
    assert (variance < 1e-20).all()


def test_restores_the_modes_when_the_network_fails() -> None:
    net = gaussianize(mlp())
    net[1].eval()
    with pytest.raises(RuntimeError):
        predict(net, torch.zeros(2, 99))
    assert net.training
    assert not net[1].training
    assert net[0].training


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize(
    "settings",
    [{"noise_variance": torch.tensor([0.1, 0.2, 0.3])}, {"likelihood": "classification"}],
    ids=["regression", "classification"],
)
def test_stacked_equals_separate(structure: str, settings: dict[str, Any]) -> None:
    nets = [learned(mlp(seed), structure) for seed in range(R)]
    inputs = torch.stack([batch(seed)[0] for seed in range(R)])
    stacked = predict(replicas.stack(nets), inputs, 3, generator=[stream(seed) for seed in range(R)], **settings)
    for r, net in enumerate(nets):
        own = {name: float(value[r]) if isinstance(value, Tensor) else value for name, value in settings.items()}
        single = predict(net, inputs[r], 3, generator=stream(r), **own)
        for name, value in vars(single).items():
            if value is not None:
                torch.testing.assert_close(getattr(stacked, name)[r], value)


def test_a_wrong_number_of_streams_is_refused() -> None:
    net = replicas.stack([gaussianize(mlp(seed)) for seed in range(R)])
    with pytest.raises(ValueError, match=r"generators: expected one for each of the replicas .* got 2"):
        predict(net, torch.zeros(R, 2, 5), 2, generator=[stream(), stream()])


@pytest.mark.parametrize("samples", [1, 0, -3, 2.5, True, "many"])
def test_a_bad_number_of_samples_is_refused(samples: object) -> None:
    with pytest.raises(ValueError, match=r"samples: expected a whole number of at least 2, got"):
        predict(gaussianize(mlp()), batch()[0], samples)


def test_deterministic_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        predict(mlp(), batch()[0])


def test_draws_of_a_whole_network_have_the_right_moments() -> None:
    net, generator, samples = gaussianize(mlp(), prior_variance=0.3), stream(), 1000
    draws = [sample_parameters(net, generator) for _ in range(samples)]
    for name, mean, precision in gaussian_parameters(net):
        values = torch.stack([draw[name] for draw in draws])
        variance = precision.variance()
        # the largest of n standard normal deviations stays below 5 for the few hundred entries here
        assert ((values.mean(0) - mean).abs() < 5 * (variance / samples).sqrt()).all()
        assert ((values.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / samples)).all()


# ------------------------------------------------------------------------------------------- what it consists of
def test_regression_adds_the_noise_to_the_variance() -> None:
    net, (inputs, _) = learned(mlp(), "diagonal"), batch()
    plain = predict(net, inputs, 4, generator=stream())
    noisy = predict(net, inputs, 4, generator=stream(), noise_variance=0.3)
    assert torch.equal(plain.variance, plain.epistemic)
    assert torch.equal(noisy.epistemic, plain.epistemic)
    assert torch.equal(noisy.aleatoric, torch.full_like(plain.mean, 0.3))
    torch.testing.assert_close(noisy.variance, plain.epistemic + 0.3)
    mean, variance = noisy
    assert torch.equal(mean, plain.mean)
    assert torch.equal(variance, noisy.variance)
    assert noisy.entropy is noisy.mutual_information is None


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_classes_by_the_draws_themselves(structure: str) -> None:
    """Moments, entropies and the law of total variance, from the probabilities of every draw."""
    net, (inputs, _) = learned(mlp(), structure), batch()
    prediction = predict(net, inputs, 6, likelihood="classification", generator=stream())
    generator = stream()
    draws = torch.stack(
        [torch.func.functional_call(net, sample_parameters(net, generator), (inputs,)) for _ in range(6)]
    ).softmax(-1)
    mean = draws.mean(0)
    torch.testing.assert_close(prediction.mean, mean)
    torch.testing.assert_close(prediction.epistemic, draws.var(0))
    torch.testing.assert_close(prediction.aleatoric, (draws * (1 - draws)).mean(0))
    torch.testing.assert_close(prediction.variance, mean * (1 - mean) + prediction.epistemic / 6)
    torch.testing.assert_close(prediction.entropy, torch.distributions.Categorical(mean).entropy())
    left = torch.distributions.Categorical(draws).entropy().mean(0)
    torch.testing.assert_close(prediction.mutual_information, prediction.entropy - left)
    assert (prediction.mutual_information > 0).all()


# ------------------------------------------------------------------------------------------ the tangent network
def test_bayesian_linear_regression_exactly() -> None:
    """With the exact posterior in the precision the prediction is that of the dense normal equations."""
    generator, (n, d, noise, prior) = stream(3), (40, 5, 0.3, 0.7)
    inputs = (
        torch.randn(n, d, generator=generator, dtype=torch.float64)
        @ torch.randn(d, d, generator=generator).double()
    )
    targets = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    design = torch.cat([inputs, torch.ones(n, 1, dtype=torch.float64)], 1)
    covariance = torch.linalg.inv(design.T @ design / noise + torch.eye(d + 1, dtype=torch.float64) / prior)
    posterior_mean = covariance @ design.T @ targets / noise
    layer = GaussianLinear(d, 2, precision="kronecker", prior_variance=prior * d / 2, dtype=torch.float64)
    precision = layer.weight_precision
    with torch.no_grad():
        layer.weight.copy_(posterior_mean[:-1].T)
        layer.bias.copy_(posterior_mean[-1])
        precision.inputs.copy_(design.T @ design / n)
        precision.outputs.copy_(torch.eye(2))
        precision.temperature.fill_(noise / n)
    new = torch.randn(9, d, generator=generator, dtype=torch.float64)
    seen = torch.cat([new, torch.ones(9, 1, dtype=torch.float64)], 1)
    exact = ((seen @ covariance) * seen).sum(1, keepdim=True).expand(9, 2)
    tangent = predict(layer, new, method="linearized", noise_variance=noise)
    torch.testing.assert_close(tangent.mean, seen @ posterior_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tangent.epistemic, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(tangent.variance, exact + noise, rtol=1e-9, atol=0)
    samples = 1000
    sampled = predict(layer, new, samples, noise_variance=noise, generator=stream())
    assert ((sampled.mean - tangent.mean).abs() < 4 * (exact / samples).sqrt()).all()
    assert ((sampled.epistemic - exact).abs() < 4 * exact * math.sqrt(2 / samples)).all()


class Twice(nn.Module):
    """A linear layer used twice, and one whose weight also serves elsewhere, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(5, 5).double(), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.tied(torch.tanh(self.first(self.first(x))))) @ self.tied.weight


class Rows(nn.Module):
    """A network of sequences, (B, T, 5) to (B, T, 3), that folds positions into the batch on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = mlp(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]))).cumsum(1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: batch(size=5)[0]),
    "one layer": (lambda: nn.Linear(5, 3).double(), lambda: batch(size=5)[0]),
    "without biases": (
        lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double(),
        lambda: batch(size=5)[0],
    ),
    "convolutions": (convnet, lambda: images(size=3)[0]),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)).double(),
        lambda: images(size=3)[0],
    ),
    "normalised": (
        lambda: nn.Sequential(normed(), nn.BatchNorm1d(3).double(), nn.Dropout(0.5)),
        lambda: batch(size=5)[0],
    ),
    "shared": (Twice, lambda: batch(size=5)[0]),
    "sequences": (Rows, lambda: torch.stack([batch(step, 4)[0] for step in range(3)])),
    "one number": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double(),
        lambda: batch(size=5)[0],
    ),
}


def dense_covariance(net: nn.Module, outputs: Tensor) -> Tensor:
    """J S⁻¹ Jᵀ of all outputs, (n, n), by one backward pass after another and matrices of all weights."""
    total = torch.zeros(outputs.numel(), outputs.numel(), dtype=torch.float64)
    for _, block in gaussian_blocks(net):
        rows = [
            torch.autograd.grad(output, block.means, retain_graph=True, allow_unused=True)
            for output in outputs.flatten()
        ]
        precision = block.precision
        if isinstance(precision, KroneckerPrecision):
            jacobian = torch.stack(
                [torch.cat([g.flatten(1) if g.dim() > 1 else g[:, None] for g in row], 1) for row in rows]
            )
            out, size = precision.outputs.shape[-1], precision.inputs.shape[-1]
            jacobian = jacobian.reshape(len(rows), -1, out * size)
            factors = precision.outputs.reshape(-1, out, out), precision.inputs.reshape(-1, size, size)
            for group, (outer, inner) in enumerate(zip(*factors, strict=True)):
                matrix = torch.kron(outer, inner) / precision.temperature.flatten()[0]
                matrix += precision.prior_precision.flatten()[0] * torch.eye(out * size)
                total += jacobian[:, group] @ torch.linalg.solve(matrix, jacobian[:, group].T)
        else:
            jacobian = torch.stack([row[0].flatten() for row in rows])
            total += jacobian / precision.precision.flatten() @ jacobian.T
    return total


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("name", NETWORKS)
def test_covariance_against_dense_matrices(name: str, structure: str) -> None:
    make, data = NETWORKS[name]
    torch.manual_seed(1)
    inputs = data()
    net = learned(make(), structure, inputs)
    prediction = predict(net, inputs, method="linearized")
    net.eval()
    outputs = net(inputs)
    exact = dense_covariance(net, outputs)
    assert exact.diagonal().min() > 1e-3
    torch.testing.assert_close(prediction.mean, outputs.detach())
    torch.testing.assert_close(prediction.epistemic, exact.diagonal().view_as(outputs), rtol=1e-8, atol=1e-10)
    if outputs.dim() < 2:
        return
    classes = predict(net, inputs, method="linearized", likelihood="classification")
    blocks = exact.view(-1, outputs.shape[-1], outputs.numel() // outputs.shape[-1], outputs.shape[-1])
    covariance = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).view(*outputs.shape, outputs.shape[-1])
    for field, value in vars(softmax_of_gaussian(outputs.detach(), covariance)).items():
        torch.testing.assert_close(getattr(classes, field), value, rtol=1e-7, atol=1e-9)


def test_layers_of_one_vector_an_example_need_no_jacobian_of_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which of the two ways is taken: all of the first network's layers the fast one, none of the second's."""
    wanted: list[set[str]] = []
    jacrev = torch.func.jacrev

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(parameters: dict[Any, Any], example: Tensor) -> Tensor:
            wanted.append({name for _, name in parameters})
            return jacrev(function)(parameters, example)

        return called

    monkeypatch.setattr(torch.func, "jacrev", spy)
    predict(learned(mlp(), "kronecker"), batch()[0], method="linearized")
    assert wanted == [{"bias"}]
    wanted.clear()
    predict(learned(Twice(), "kronecker"), batch()[0], method="linearized")
    assert wanted == [{"bias"}, {"weight", "bias"}]


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 100])
def test_chunks_change_nothing(chunk_size: int) -> None:
    net, inputs = learned(convnet(), "kronecker", images(size=5)[0]), images(size=5)[0]
    whole = predict(net, inputs, method="linearized")
    parts = predict(net, inputs, method="linearized", chunk_size=chunk_size)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.epistemic, whole.epistemic)


def test_a_transform_is_linearised_too() -> None:
    net, (inputs, _) = learned(mlp(), "diagonal"), batch()
    exact = dense_covariance(net, net(inputs).exp())
    prediction = predict(net, inputs, method="linearized", transform=torch.exp)
    torch.testing.assert_close(prediction.mean, net(inputs).exp().detach())
    torch.testing.assert_close(prediction.epistemic, exact.diagonal().view(8, 3))


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_draws_agree_with_the_tangent_where_the_variance_is_small(structure: str, likelihood: str) -> None:
    net, (inputs, _), samples = learned(mlp(), structure, prior_variance=1e-6), batch(size=4), 500
    tangent = predict(net, inputs, method="linearized", likelihood=likelihood)
    sampled = predict(net, inputs, samples, likelihood=likelihood, generator=stream())
    error = 5 * (tangent.epistemic / samples).sqrt()
    assert ((sampled.mean - tangent.mean).abs() < error).all()
    assert ((sampled.aleatoric - tangent.aleatoric).abs() <= error).all()
    ratio = sampled.epistemic / tangent.epistemic
    assert ((ratio - 1).abs() < 5 * math.sqrt(2 / samples)).all()
    if likelihood == "classification":
        torch.testing.assert_close(sampled.entropy, tangent.entropy, rtol=0, atol=1e-3)
        torch.testing.assert_close(sampled.mutual_information, tangent.mutual_information, rtol=0.4, atol=0)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_the_tangent_leaves_network_gradients_and_random_stream_alone(structure: str) -> None:
    net = learned(nn.Sequential(normed(), nn.BatchNorm1d(3).double(), nn.Dropout(0.5)), structure)
    net[1].eval()
    inputs = batch()[0]
    net(inputs).square().sum().backward()
    layers = [layer for _, layer in gaussian_layers(net)]
    before = [module.training for module in net.modules()], [layer.examples for layer in layers]
    tensors = copy.deepcopy(dict(net.state_dict()))
    gradients = [p.grad.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    prediction = predict(net, inputs, method="linearized")
    assert torch.equal(torch.get_rng_state(), state)
    assert ([module.training for module in net.modules()], [layer.examples for layer in layers]) == before
    assert_same_tensors(dict(net.state_dict()), tensors)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(net.parameters(), gradients, strict=True))
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert not prediction.epistemic.requires_grad
    net.zero_grad()
    net(inputs).square().sum().backward()  # the layers still see
    assert all(layer.examples == len(inputs) for layer in layers)


@pytest.mark.parametrize("method", ["sampled", "linearized"])
def test_in_inference_mode(method: str) -> None:
    net, (inputs, _) = learned(mlp(), "kronecker"), batch()
    expected = predict(net, inputs, 3, method=method, generator=stream())
    with torch.inference_mode():
        prediction = predict(net, inputs.clone(), 3, method=method, generator=stream())
    torch.testing.assert_close(prediction.mean, expected.mean)
    torch.testing.assert_close(prediction.epistemic, expected.epistemic)
    train(net, EulerLagrange(net, lr=0.01, temperature=0.01), range(2))  # what it cached does no harm


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("method", ["sampled", "linearized"])
def test_half_precision(method: str, structure: str) -> None:
    net, inputs = learned(mlp(), structure), batch()[0]
    expected = predict(net, inputs, 8, method=method, generator=stream())
    prediction = predict(net.bfloat16(), inputs.bfloat16(), 8, method=method, generator=stream())
    assert prediction.mean.dtype == prediction.epistemic.dtype == torch.float32
    if method == "linearized":
        torch.testing.assert_close(prediction.epistemic.double(), expected.epistemic, rtol=0.2, atol=1e-2)
    assert prediction.epistemic.isfinite().all()


def test_eigenvectors_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = learned(mlp(), "kronecker"), batch()[0]
    calls = itertools.count()
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (next(calls), eigh(matrix))[1])
    for _ in range(3):
        predict(net, inputs, 4)
        predict(net, inputs, method="linearized")
    assert next(calls) == 6  # two factors for each of three layers


# ------------------------------------------------------------------------------------ classes of Gaussian logits
def random_logits(classes: int, scale: float, cases: int = 100) -> tuple[Tensor, Tensor]:
    generator = stream(classes)
    logits = 2 * torch.randn(cases, classes, generator=generator, dtype=torch.float64)
    root = torch.randn(cases, classes, classes, generator=generator, dtype=torch.float64)
    return logits, scale * root @ root.mT / classes


def drawn_softmax(logits: Tensor, covariance: Tensor, draws: int = 2000) -> dict[str, Tensor]:
    """The same moments over draws of the logits."""
    noise = torch.randn(draws, *logits.shape, 1, generator=stream(7), dtype=torch.float64)
    probabilities = (logits + (torch.linalg.cholesky(covariance) @ noise).squeeze(-1)).softmax(-1)
    mean = probabilities.mean(0)
    entropy = torch.distributions.Categorical(mean).entropy()
    return {
        "mean": mean,
        "epistemic": probabilities.var(0),
        "aleatoric": (probabilities * (1 - probabilities)).mean(0),
        "entropy": entropy,
        "mutual_information": entropy - torch.distributions.Categorical(probabilities).entropy().mean(0),
    }


@pytest.mark.parametrize(("classes", "tolerance"), [(2, 0.006), (3, 0.03), (10, 0.02)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_closed_form_against_draws_of_the_logits(classes: int, tolerance: float, scale: float) -> None:
    """Mean absolute error of the moments, and relative error of the information, over random cases."""
    logits, covariance = random_logits(classes, scale)
    closed, exact = softmax_of_gaussian(logits, covariance), drawn_softmax(logits, covariance)
    for name in ("mean", "epistemic", "aleatoric"):
        assert (getattr(closed, name) - exact[name]).abs().mean() < tolerance, name
    information = exact["mutual_information"]
    assert (closed.mutual_information - information).abs().mean() < 0.32 * information.mean()
    torch.testing.assert_close(closed.mean.sum(-1), torch.ones(100, dtype=torch.float64))
    torch.testing.assert_close(closed.variance, closed.mean * (1 - closed.mean))


def test_closed_form_to_first_order() -> None:
    logits, covariance = random_logits(4, 1.0)
    small = 1e-6
    closed = softmax_of_gaussian(logits, small * covariance)
    p = logits.softmax(-1)
    slope = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    torch.testing.assert_close(closed.mean, p, rtol=1e-4, atol=0)
    delta = (slope @ covariance @ slope).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(closed.epistemic / small, delta, rtol=1e-4, atol=1e-8)
    information = 0.5 * (slope @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(closed.mutual_information / small, information, rtol=1e-4, atol=1e-8)


def test_closed_form_in_its_limits() -> None:
    logits, covariance = random_logits(5, 1.0)
    certain = softmax_of_gaussian(logits, 0 * covariance)
    torch.testing.assert_close(certain.mean, logits.softmax(-1))
    assert (certain.epistemic == 0).all()
    assert (certain.mutual_information == 0).all()
    unknown = softmax_of_gaussian(logits, 1e12 * torch.eye(5, dtype=torch.float64).expand_as(covariance))
    torch.testing.assert_close(unknown.mean, torch.full_like(logits, 0.2), rtol=1e-3, atol=0)
    assert (unknown.aleatoric < 1e-5).all()
    assert (unknown.mutual_information > 0.999 * unknown.entropy).all()
    saturated = softmax_of_gaussian(torch.tensor([[1e4, 0.0, -1e4]]), torch.eye(3)[None])
    assert all(value.isfinite().all() for value in vars(saturated).values())


def test_what_all_logits_have_in_common_does_not_matter() -> None:
    logits, covariance = random_logits(3, 1.0)
    here, there = softmax_of_gaussian(logits, covariance), softmax_of_gaussian(logits + 7, covariance + 50)
    for name, value in vars(here).items():
        torch.testing.assert_close(getattr(there, name), value, rtol=1e-9, atol=1e-11)


# ----------------------------------------------------------------------------------------------- what is refused
def test_a_stacked_network_is_not_linearised() -> None:
    net = replicas.stack([gaussianize(mlp(seed)) for seed in range(R)])
    with pytest.raises(
        ValueError, match=r"module: expected a single network .* got 3 stacked ones; use method='sampled'"
    ):
        predict(net, torch.zeros(R, 2, 5).double(), method="linearized")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "linearised"},
            r"method: expected one of sampled, linearized; got 'linearised'; did you mean",
        ),
        ({"likelihood": "classes"}, r"likelihood: expected one of regression, classification; got 'classes'"),
        ({"noise_variance": -1.0}, r"noise_variance: expected a number in \[0, inf\), got -1"),
        ({"noise_variance": torch.ones(3)}, r"noise_variance: expected a number, got 3 numbers"),
        ({"noise_variance": 0.1, "likelihood": "classification"}, r"noise_variance: expected 0 with likelihood="),
        ({"transform": torch.exp, "likelihood": "classification"}, r"transform: expected None with likelihood="),
        ({"method": "linearized", "chunk_size": 0}, r"chunk_size: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(gaussianize(mlp()), batch()[0], **settings)


@pytest.mark.parametrize("method", ["sampled", "linearized"])
def test_a_single_logit_is_refused(method: str) -> None:
    with pytest.raises(
        ValueError, match=r"at least two classes in the last dimension, got outputs of shape \(8, 1\)"
    ):
        predict(gaussianize(nn.Linear(5, 1).double()), batch()[0], method=method, likelihood="classification")
