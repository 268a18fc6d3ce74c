"""consolidate: the posterior as the next prior, exact where it can be, and what it keeps of old tasks."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from cases import EULER_LAGRANGE, R, assert_same_tensors, convnet, images, mlp, tensor, tensors_of, train
from scipy import stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

from clagrange import collapse, consolidate, gaussianize, inject_variance, networks, replicas
from clagrange.gaussian import (
    DiagonalPrecision,
    Kronecker,
    KroneckerPrecision,
    Precision,
    gaussian_blocks,
)
from clagrange.gaussian.factors import eigen, left_product, merged_product
from clagrange.gaussian.kronecker import Factors
from clagrange.optim import EulerLagrange
from clagrange.tasks.digits import digits

STRUCTURES = ["diagonal", "kronecker", Kronecker(damping="exact")]
each = pytest.mark.parametrize("structure", STRUCTURES, ids=["diagonal", "factored", "exact"])
T = 1e-2


def trained(structure: object, seed: int = 0, steps: int = 5, **settings: object) -> nn.Sequential:
    """A Gaussian network some steps away from its prior."""
    net = gaussianize(mlp(seed), precision=structure, **settings)
    train(net, EulerLagrange(net, lr=0.02, temperature=T), range(steps))
    return net


def precisions(net: nn.Module) -> list[Precision]:
    return [block.precision for _, block in gaussian_blocks(net)]


def known(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network but for the inverses and eigenvectors that are made anew from them."""
    made = ("_solver", "_damping", "solver_spectrum", "temperature")
    return {name: value for name, value in tensors_of(net).items() if not name.endswith(made)}


def square(seed: int, size: int, *leading: int) -> Tensor:
    """A random positive definite factor."""
    rows = torch.randn(*leading, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.mT


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ the formula
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_diagonal_prior_by_hand(weight: float) -> None:
    """Twice, with 1/σ_0² = 2: what the first consolidation kept is weighted again by the second."""
    mean, learnt = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 6.0])
    precision = DiagonalPrecision(torch.zeros(2), prior_variance=0.5)
    held = torch.zeros(2)
    for centre in (mean, 2 * mean):
        precision.precision.add_(learnt)
        precision.curvature.fill_(1.0)
        held = weight * (held + learnt)
        precision.consolidate(centre, weight)
        close(precision.prior_precision, 2.0 + held)
        close(precision.precision, 2.0 + held)
        close(precision.prior_mean, centre)
        assert not precision.curvature.any()


def kronecker(seed: int = 0, temperature: float = T, **settings: object) -> tuple[Tensor, KroneckerPrecision]:
    """A mean of shape (3, 4), and a precision that has learnt something."""
    mean = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    precision = KroneckerPrecision(mean, prior_variance=0.5, **settings)
    learn(precision, seed, temperature)
    return mean, precision


def learn(precision: KroneckerPrecision, seed: int, temperature: float = T, fraction: float = 0.5) -> None:
    outputs, inputs = square(seed, 3), square(seed + 100, 4)
    diagonal_outputs, diagonal_inputs = precision.diagonal_sides
    precision.observe(
        Factors(
            outputs.diagonal() if diagonal_outputs else outputs,
            inputs.diagonal() if diagonal_inputs else inputs,
            8,
        )
    )
    precision.relax(temperature, fraction)


def dense(precision: KroneckerPrecision, posterior: bool = True) -> Tensor:
    """S, or what the prior has for it."""
    if posterior:
        columns = [
            precision.from_axes(precision.spectrum() * precision.to_axes(e.view(3, 4))) for e in identity(12)
        ]
        return torch.stack([column.flatten() for column in columns], 1)
    held = (torch.diag(f) if f.dim() == 1 else f for f in (precision.prior_outputs, precision.prior_inputs))
    return torch.kron(*held) + precision.prior_precision.squeeze() * identity(12)


FORMS = [{}, {"diagonal_inputs": True}, {"diagonal_outputs": True, "diagonal_inputs": True}]


@pytest.mark.parametrize("form", FORMS, ids=["full", "diagonal inputs", "both diagonal"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_kronecker_prior_is_the_dense_formula(weight: float, form: dict) -> None:
    mean, precision = kronecker(**form)
    before = dense(precision)
    precision.consolidate(mean, weight)
    expected = 2.0 * identity(12) + weight * (before - 2.0 * identity(12))
    close(dense(precision, posterior=False), expected)
    close(dense(precision), expected)
    close(precision.prior_mean, mean)
    assert not precision.outputs.any()
    assert abs(float(precision.kl(mean))) < 1e-11


def test_kronecker_priors_accumulate() -> None:
    """Tasks with the same inputs and other outputs: their precisions add up exactly, weighted by their age."""
    mean, precision = kronecker()
    expected = torch.zeros(12, 12, dtype=torch.float64)
    precision.reset()
    for seed in range(3):
        outputs, inputs = square(seed, 3), square(7, 4)
        precision.observe(Factors(outputs, inputs, 8))
        precision.relax(T, 1.0)
        expected = 0.8 * (expected + torch.kron(outputs, inputs) / T)
        precision.consolidate(mean, 0.8)
    close(dense(precision, posterior=False), expected + 2.0 * identity(12))


@each
def test_weight_zero_moves_the_centre_only(structure: object) -> None:
    net = trained(structure)
    before = [precision.prior_precision.clone() for precision in precisions(net)]
    consolidate(net, 0.0)
    for (_, block), prior_precision in zip(gaussian_blocks(net), before, strict=True):
        precision = block.precision
        close(precision.spectrum(), prior_precision.expand_as(precision.spectrum()))
        close(precision.prior_mean, block.joint_mean())


@each
def test_nothing_but_the_prior_changes(structure: object) -> None:
    net = trained(structure)
    before = {name: value.clone() for name, value in net.named_parameters()}
    variances = [precision.variance() for precision in precisions(net)]
    retained = [precision.retained_information() for precision in precisions(net)]
    consolidate(net)
    assert_same_tensors(dict(net.named_parameters()), before)
    for precision, variance, information in zip(precisions(net), variances, retained, strict=True):
        assert float(information.max()) > 0.005
        close(precision.variance(), variance)
        close(precision.retained_information(), information)
    for _, block in gaussian_blocks(net):
        assert float(block.precision.kl(block.joint_mean()).abs()) < 1e-9


def test_a_later_temperature_leaves_the_prior_as_it_is() -> None:
    mean, precision = kronecker()
    precision.consolidate(mean)
    prior = dense(precision)
    for temperature in (1e-4, 1.0):
        precision.relax(temperature, 0.5)
        close(dense(precision), prior)
    close(dense(precision, posterior=False), prior)


def test_chosen_layers_only() -> None:
    net = trained("diagonal")
    before = tensors_of(net)
    consolidate(net, layers=["[04]"])
    changed = {name.split(".")[0] for name, value in tensors_of(net).items() if name not in before}
    assert changed == {"0", "4"}
    assert_same_tensors(
        {name: value for name, value in tensors_of(net).items() if name.startswith("2")},
        {name: value for name, value in before.items() if name.startswith("2")},
    )


# -------------------------------------------------------------------------------- two products as one product
def traces(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Both partial traces of the sum of two products."""
    total = sum(torch.kron(*pair) for pair in (first, second)).view(3, 4, 3, 4)
    return [torch.einsum("ikjk->ij", total), torch.einsum("kikj->ij", total)]


def test_merged_product_keeps_the_partial_traces() -> None:
    first, second = (square(0, 3), square(1, 4)), (square(2, 3), 0.1 * square(3, 4))
    outputs, inputs = merged_product(first, second, (False, False))
    rows, columns = traces(first, second)
    close(outputs * inputs.trace(), rows)
    close(inputs * outputs.trace(), columns)
    assert (torch.linalg.eigvalsh(outputs) > 0).all()
    assert (torch.linalg.eigvalsh(inputs) > 0).all()


@pytest.mark.parametrize(
    ("scale_outputs", "scale_inputs"),
    [(None, 3.0), (0.2, None), (0.2, 3.0), (0.0, None), (None, 0.0), (0.0, 0.0)],
)
def test_merged_product_is_exact(scale_outputs: float | None, scale_inputs: float | None) -> None:
    """Where a factor is the same but for a number (which may be 0), in either order."""
    outputs, inputs = square(0, 3), square(1, 4)
    other = (
        square(2, 3) if scale_outputs is None else scale_outputs * outputs,
        square(3, 4) if scale_inputs is None else scale_inputs * inputs,
    )
    expected = torch.kron(outputs, inputs) + torch.kron(*other)
    for pair in (((outputs, inputs), other), (other, (outputs, inputs))):
        close(torch.kron(*merged_product(*pair, (False, False))), expected)


def test_merged_product_of_nothing_is_nothing() -> None:
    nothing = torch.zeros(3, 3), torch.zeros(4, 4)
    assert not torch.kron(*merged_product(nothing, (torch.eye(3), torch.zeros(4, 4)), (False, False))).any()
    assert not torch.kron(*merged_product(nothing, nothing, (False, False))).any()


def test_merged_product_of_diagonals_and_blocks() -> None:
    first, second = ((square(seed, 3, 2), square(seed + 1, 4, 2)) for seed in (0, 5))
    first, second = ((outputs, inputs.diagonal(dim1=-2, dim2=-1)) for outputs, inputs in (first, second))
    outputs, inputs = merged_product(first, second, (False, True))
    for block in range(2):
        alone = merged_product(
            *((G[block], torch.diag(A[block])) for G, A in (first, second)),
            (False, False),
        )
        close(torch.kron(outputs[block], torch.diag(inputs[block])), torch.kron(*alone))


def test_projection_and_left_product_are_dense() -> None:
    factor, other = square(0, 4), square(1, 4)
    axes = eigen(factor, diagonal=False)
    close(axes.project(other), (axes.vectors.mT @ other @ axes.vectors).diagonal())
    close(eigen(factor.diagonal(), diagonal=True).project(other.diagonal()), other.diagonal())
    close(left_product(other.diagonal(), factor, True), torch.diag(other.diagonal()) @ factor)


# --------------------------------------------------------------------------------- the force and the divergence
@pytest.mark.parametrize("form", FORMS, ids=["full", "diagonal inputs", "both diagonal"])
def test_kl_to_a_consolidated_prior_is_exact(form: dict) -> None:
    mean, precision = kronecker(**form)
    precision.consolidate(mean)
    learn(precision, seed=1)
    later = mean + 0.1 * torch.arange(12, dtype=torch.float64).view(3, 4)
    posterior = MultivariateNormal(later.flatten(), precision_matrix=dense(precision))
    prior = MultivariateNormal(mean.flatten(), precision_matrix=dense(precision, posterior=False))
    assert float(precision.kl(later)) == pytest.approx(float(kl_divergence(posterior, prior)), rel=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=["full", "diagonal inputs", "both diagonal"])
def test_the_pull_is_that_of_the_exact_prior(form: dict) -> None:
    """−φ S⁻¹P(μ − μ_p) where no data pull, and −φ S⁻¹(g/T + pull·P(μ − μ_p)) where they do."""
    mean, precision = kronecker(damping="exact", **form)
    precision.consolidate(mean)
    learn(precision, seed=1)
    later = mean + 0.1 * torch.arange(12, dtype=torch.float64).view(3, 4)
    force = dense(precision, posterior=False) @ (later - mean).flatten()
    for gradient, pull in ((torch.zeros_like(mean), 1.0), (torch.ones_like(mean), 0.3)):
        step = precision.displacement(later, gradient, lr=0.1, temperature=T, prior_pull=pull)
        expected = -(1 - math.exp(-0.1)) * torch.linalg.solve(
            dense(precision), gradient.flatten() / T + pull * force
        )
        close(step.flatten(), expected)
        precision._due = [True]


def test_without_pull_the_prior_does_not_hold_the_mean() -> None:
    mean, precision = kronecker()
    precision.consolidate(mean)
    step = precision.displacement(mean + 1.0, torch.zeros_like(mean), lr=0.1, temperature=T, prior_pull=0.0)
    assert not step.any()


def test_factored_inverses_are_those_of_the_merged_factors_until_the_next_refresh() -> None:
    mean, precision = kronecker()
    precision.consolidate(mean)
    learn(precision, seed=1)
    held = T * precision.prior_outputs, precision.prior_inputs
    outputs, inputs = merged_product((precision.outputs, precision.inputs), held, (False, False))
    for _ in range(2):
        precision.displacement(mean, torch.ones_like(mean), lr=0.1, temperature=T)
        balance = ((inputs.trace() / 4) / (outputs.trace() / 3)).sqrt()
        close(torch.linalg.inv(precision.input_solver), inputs + balance * (2 * T) ** 0.5 * identity(4), 1e-9)
        close(torch.linalg.inv(precision.output_solver), outputs + (2 * T) ** 0.5 / balance * identity(3), 1e-9)
        learn(precision, seed=2)


@pytest.mark.parametrize("options", EULER_LAGRANGE.options)
def test_multi_tensor_kernels_equal_the_loop_after_consolidation(options: dict) -> None:
    nets = [trained("diagonal") for _ in range(2)]
    for net, foreach in zip(nets, (True, False), strict=True):
        consolidate(net)
        train(net, EULER_LAGRANGE.make(net, **{**options, "foreach": foreach}), range(5, 12))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------- Bayesian regression, chunk by chunk
def settle(layer: nn.Linear, hessian: Tensor | Factors, gradient: Tensor, temperature: float) -> None:
    """Take the posterior to its end: all of the curvature, and one whole Newton step of the mean."""
    ((_, block),) = gaussian_blocks(layer)
    precision = block.precision
    precision.observe(hessian, 0.0)
    precision.relax(temperature, 1.0)
    mean = block.joint_mean()
    step = precision.displacement(mean, gradient, lr=1e3, temperature=temperature)
    with torch.no_grad():
        block.set_mean(mean + step)


def regression(layer: nn.Linear, inputs: Tensor, targets: Tensor, diagonal: bool) -> None:
    """The posterior of a linear model under noise of variance 1/4, given a batch."""
    count, temperature = len(inputs), 0.25 / len(inputs)
    moments = inputs.T @ inputs / count
    gradient = (inputs @ layer.weight.detach().T - targets).T @ inputs / count
    outputs = len(layer.weight)
    curvature = moments.diagonal().expand(outputs, -1) if diagonal else Factors(identity(outputs), moments, count)
    settle(layer, curvature, gradient, temperature)


@pytest.mark.parametrize("structure", ["diagonal", Kronecker(damping="exact")], ids=["diagonal", "kronecker"])
def test_two_chunks_of_a_linear_regression_equal_the_whole(structure: object) -> None:
    """Diagonal: orthogonal inputs, other in each chunk. Kronecker: the same inputs in both, and other targets."""
    generator = torch.Generator().manual_seed(0)
    diagonal = structure == "diagonal"

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    chunks = [torch.diag(draw(5)), torch.diag(draw(5))] if diagonal else [draw(9, 5)] * 2
    answers = [draw(len(chunk), 3) for chunk in chunks]
    start = nn.Linear(5, 3, bias=False).double()
    whole, parts = (gaussianize(start, structure, "initial", 0.7, copied=True) for _ in range(2))
    regression(whole, torch.cat(chunks), torch.cat(answers), diagonal)
    for inputs, targets in zip(chunks, answers, strict=True):
        regression(parts, inputs, targets, diagonal)
        consolidate(parts)
    close(parts.weight, whole.weight)
    close(parts.weight_precision.variance(), whole.weight_precision.variance())
    # and both are the closed form
    inputs, targets, prior = torch.cat(chunks), torch.cat(answers), 1 / (0.7 * 2 / 5)
    precision = inputs.T @ inputs / 0.25 + prior * identity(5)
    expected = torch.linalg.solve(precision, inputs.T @ targets / 0.25 + prior * start.weight.detach().T)
    close(whole.weight.T, expected)
    close(whole.weight_precision.variance(), torch.linalg.inv(precision).diagonal().expand(3, -1))


# ------------------------------------------------------------------------------------------------ what survives
@each
def test_state_loads_into_a_fresh_network_and_back(structure: object) -> None:
    consolidated, fresh = trained(structure), trained(structure, seed=3)
    consolidate(consolidated)
    train(consolidated, EULER_LAGRANGE.make(consolidated), range(5, 9))
    file = io.BytesIO()
    torch.save(consolidated.state_dict(), file)
    file.seek(0)
    target, original = gaussianize(mlp(9), structure, prior_variance=3.0), copy.deepcopy(fresh)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert_same_tensors(dict(target.state_dict()), dict(consolidated.state_dict()))
    train(target, EULER_LAGRANGE.make(target), range(9, 12))
    train(consolidated, EULER_LAGRANGE.make(consolidated), range(9, 12))
    assert_same_tensors(dict(target.state_dict()), dict(consolidated.state_dict()))

    target.load_state_dict(original.state_dict())
    assert_same_tensors(dict(target.state_dict()), dict(original.state_dict()))
    for net in (target, original):
        train(net, EULER_LAGRANGE.make(net), range(5))
    assert_same_tensors(dict(target.state_dict()), dict(original.state_dict()))


@each
def test_a_state_of_another_size_is_refused(structure: object) -> None:
    net = trained(structure)
    consolidate(net)
    other = gaussianize(
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3)), structure
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight_precision\.prior_mean"):
        other.double().load_state_dict(net.state_dict())


@each
def test_deterministic_checkpoint_forgets_what_was_consolidated(structure: object) -> None:
    net = trained(structure)
    consolidate(net)
    net.load_state_dict(mlp(7).state_dict())
    fresh = gaussianize(mlp(7), structure)
    assert set(tensors_of(net)) == set(tensors_of(fresh))
    assert_same_tensors(known(net), known(fresh))


@each
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_identically(structure: object, clone) -> None:
    net = trained(structure)
    optimizer = EULER_LAGRANGE.make(net)
    consolidate(net)
    train(net, optimizer, range(5, 8))
    pairs = [(net, optimizer), clone((net, optimizer))]
    for model, its_optimizer in pairs:
        train(model, its_optimizer, range(8, 11))
        consolidate(model, 0.5)
    assert_same_tensors(dict(pairs[1][0].state_dict()), dict(net.state_dict()))


@each
def test_half_precision_leaves_the_prior_its_digits(structure: object) -> None:
    net = trained(structure).float()
    consolidate(net)
    before = {name: value for name, value in tensors_of(net).items() if "_precision" in name}
    net.bfloat16()
    after = {name: value for name, value in tensors_of(net).items() if "_precision" in name}
    assert_same_tensors(after, before)
    consolidate(net)
    assert {precision.prior_mean.dtype for precision in precisions(net)} == {torch.float32}
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
    assert net.float()[0].weight_precision.origin_mean.dtype == torch.float32


@each
def test_stacked_equals_separate(structure: object) -> None:
    """A weight of its own for every replica, and steps before and after; unstacking gives single networks."""
    nets = [trained(structure, seed) for seed in range(R)]
    stacked = replicas.stack(nets)
    weights = (1.0, 0.0, 2.5)
    inputs, targets = torch.randn(R, 8, 5, dtype=torch.float64), torch.arange(8).remainder(3).expand(R, -1)
    for _ in range(2):
        consolidate(stacked, tensor(*weights))
        optimizer = EulerLagrange(stacked, lr=0.02, temperature=T)
        networks.cross_entropy(stacked(inputs), targets).backward()
        optimizer.step()
        for net, weight, x, y in zip(nets, weights, inputs, targets, strict=True):
            consolidate(net, weight)
            single = EulerLagrange(net, lr=0.02, temperature=T)
            single.zero_grad()
            F.cross_entropy(net(x), y).backward()
            single.step()
        optimizer.zero_grad()
        for net, single in zip(nets, replicas.unstack(stacked), strict=True):
            assert_same_tensors(known(single), known(net), rtol=1e-9, atol=1e-10)
    for (_, many), *single in zip(gaussian_blocks(stacked), *(gaussian_blocks(net) for net in nets), strict=True):
        alone = torch.stack([block.precision.kl(block.joint_mean()) for _, block in single])
        torch.testing.assert_close(many.precision.kl(many.joint_mean()), alone, rtol=1e-7, atol=1e-9)


def test_consolidated_and_other_networks_are_not_stacked() -> None:
    nets = [trained("diagonal"), trained("diagonal", 1)]
    consolidate(nets[1])
    with pytest.raises(ValueError, match="network 1 differs"):
        replicas.stack(nets)


@each
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(structure: object, groups: int) -> None:
    net = convnet()
    net[2] = nn.Conv2d(4, 4 - (groups == 1), 3, stride=2, groups=groups).double()
    net[5] = nn.Linear(12 + 4 * (groups == 2), 5).double()
    gaussianize(net, structure)
    optimizer = EulerLagrange(net, lr=0.02, temperature=T)
    for step in range(4):
        if step == 2:
            before = [precision.variance() for precision in precisions(net)]
            consolidate(net)
            for precision, variance in zip(precisions(net), before, strict=True):
                close(precision.variance(), variance)
        inputs, targets = images(step)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    for _, block in gaussian_blocks(net):
        assert float(block.precision.kl(block.joint_mean())) > 0


@pytest.mark.parametrize("lr", [0.006, 0.06, 2.0])
def test_the_pull_of_a_consolidated_prior_brings_back_at_every_rate(lr: float) -> None:
    """Also where one product stands for the sum of two that have nothing in common, and understates the prior."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(12, 20, dtype=torch.float64)
    precision = KroneckerPrecision(mean, prior_variance=1.0, refresh_every=1)
    for task, size in enumerate((1.0, 100.0)):
        outputs, inputs = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
        outputs.diagonal()[4 * task : 4 * task + 4] = size
        inputs.diagonal()[8 * task : 8 * task + 8] = size
        precision.observe(Factors(outputs, inputs, 8))
        precision.relax(1e-3, 1.0)
        if task == 0:
            precision.consolidate(mean)
    away = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    distances = []
    for _ in range(300):
        away += precision.displacement(away, torch.zeros_like(away), lr=lr, temperature=1e-3)
        distances.append(float((away * precision._times_prior(away)).sum()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(distances))


# ------------------------------------------------------------- what resets, widens and injects after it
@each
def test_widening_stops_at_the_consolidated_prior(structure: object) -> None:
    net = trained(structure)
    consolidate(net)
    held = [precision.variance() for precision in precisions(net)]
    train(net, EULER_LAGRANGE.make(net), range(5, 12))
    assert any(not torch.allclose(p.variance(), v, rtol=1e-3) for p, v in zip(precisions(net), held, strict=True))
    inject_variance(net, strength=0.0, widen=1.0)
    for precision, variance in zip(precisions(net), held, strict=True):
        close(precision.variance(), variance)


@each
def test_injection_leaves_what_is_held_and_draws_the_rest_from_the_origin(structure: object) -> None:
    """The first half of the inputs was seen: its weights stay. The others are drawn from N(0, 1/50)."""
    layer = nn.Linear(100, 40, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(3.0)
    gaussianize(layer, structure)
    precision = layer.weight_precision
    seen = torch.cat([torch.full((50,), 1e12), torch.zeros(50)]).double()
    if isinstance(precision, DiagonalPrecision):
        precision.precision.add_(seen)
    else:
        precision.observe(Factors(identity(40), torch.diag(seen), 1))
        precision.relax(1.0, 1.0)
    consolidate(layer)
    inject_variance(layer, strength=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        layer.weight[:, :50], torch.full((40, 50), 3.0, dtype=torch.float64), rtol=1e-4, atol=0
    )
    drawn = layer.weight[:, 50:].detach().flatten().numpy()
    assert stats.kstest(drawn, stats.norm(0.0, math.sqrt(2 / 100)).cdf).pvalue > 0.01


def test_injection_into_what_is_held_in_part() -> None:
    """Retained information 3/4 and strength 0.8: a = 1 − 0.8/4, toward N(0, 1/50)."""
    layer = gaussianize(nn.Linear(100, 200, bias=False).double())
    with torch.no_grad():
        layer.weight.fill_(3.0)
    layer.weight_precision.precision.mul_(4.0)
    consolidate(layer)
    inject_variance(layer, strength=0.8, generator=torch.Generator().manual_seed(0))
    law = stats.norm(0.8 * 3.0, math.sqrt(1 - 0.8**2) * math.sqrt(2 / 100))
    assert stats.kstest(layer.weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


@each
@pytest.mark.parametrize("prior_mean", ["zero", "initial"])
def test_reset_is_as_before_any_consolidation(structure: object, prior_mean: str) -> None:
    net = trained(structure, prior_mean=prior_mean)
    fresh = gaussianize(mlp(), structure, prior_mean)
    consolidate(net)
    consolidate(net, 2.0)
    for precision, untouched in zip(precisions(net), precisions(fresh), strict=True):
        precision.reset()
        assert not precision.consolidated
        close(precision.variance(), untouched.variance())
        close(precision.prior_mean, untouched.prior_mean)
        assert precision.prior_precision.shape == untouched.prior_precision.shape


def test_reset_of_some_weights_forgets_what_was_consolidated_about_them() -> None:
    net = trained("diagonal")
    consolidate(net)
    precision, mask = net[2].weight_precision, torch.zeros(4, 6, dtype=torch.bool)
    mask[1], mask[:, 2] = True, True
    mean, prior = precision.prior_mean.clone(), precision.prior_precision.clone()
    precision.reset(mask)
    close(precision.prior_mean, mean.masked_fill(mask, 0.0))
    close(precision.prior_precision, prior.masked_fill(mask, 6 / 2))
    close(precision.precision, precision.prior_precision)


def test_reset_of_units_forgets_what_was_consolidated_about_them() -> None:
    mean, precision = kronecker(prior_mean="zero")
    precision.consolidate(mean)
    before = dense(precision, posterior=False).view(3, 4, 3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1], mask[:, 2] = True, True
    precision.reset(mask)
    after = dense(precision, posterior=False).view(3, 4, 3, 4)
    kept = ~(mask.view(3, 4, 1, 1) | mask)
    close(after, torch.where(kept, before, 2.0 * identity(12).view(3, 4, 3, 4)))
    close(precision.prior_mean, mean.masked_fill(mask, 0.0))


@each
def test_a_fresh_start_leaves_nothing(structure: object) -> None:
    net = trained(structure, prior_mean="initial")
    consolidate(net)
    for _, block in gaussian_blocks(net):
        block.precision.start_over(block.joint_mean())
        close(block.precision.prior_mean, block.joint_mean())
        assert float(block.precision.kl(block.joint_mean()).abs()) < 1e-12
        assert not block.precision.consolidated


@each
def test_collapse_after_consolidation(structure: object) -> None:
    net = trained(structure)
    consolidate(net)
    assert set(collapse(net).state_dict()) == set(mlp().state_dict())


# ------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weight": -0.5}, ValueError, r"weight: expected a number in \[0, inf\), got -0\.5"),
        ({"weight": math.inf}, ValueError, r"weight: .*got inf"),
        ({"weight": "all"}, TypeError, r"weight: expected a number"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: expected a number, got 3 numbers"),
        (
            {"layers": ["head"]},
            ValueError,
            r"layers: .* Gaussian layers \(0, 2, 4\); got 'head', which fits none",
        ),
        ({"layers": ["0", "head"]}, ValueError, r"layers: .*'head'"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(
    settings: dict, error: type[Exception], message: str
) -> None:
    net = trained("diagonal")
    before = tensors_of(net)
    with pytest.raises(error, match=message):
        consolidate(net, **settings)
    assert_same_tensors(tensors_of(net), before)


def test_deterministic_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        consolidate(mlp())


# ------------------------------------------------------------------------------------------ what it is there for
def permuted_digits(seeds: range) -> list[tuple[Tensor, Tensor]]:
    """Inputs (R, 1797, 64) and targets (R, 1797) of two tasks, the digits and the digits with other pixels."""
    inputs, targets = digits()
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return [
        (inputs.expand(len(seeds), -1, -1), targets.expand(len(seeds), -1)),
        (torch.stack([inputs[:, order] for order in orders]), targets.expand(len(seeds), -1)),
    ]


@pytest.mark.parametrize(
    ("structure", "settings", "size"),
    [
        ("diagonal", {"lr": 5e-2, "temperature": 1e-4}, 40),
        ("kronecker", {"lr": 6e-2, "temperature": 1 / 1400}, 50),
    ],
)
def test_consolidation_keeps_an_old_task_of_real_digits(
    structure: str, settings: dict[str, float], size: int
) -> None:
    """Accuracy on the first task after the second: 3 seeds, 4 epochs of 1,400 examples a task, 397 to judge."""
    seeds = range(3)
    tasks = permuted_digits(seeds)
    accuracy = {}
    for consolidating in (False, True):
        net = replicas.stack([networks.mlp(64, [32], 10, seed=seed) for seed in seeds])
        gaussianize(net, structure)
        optimizer = EulerLagrange(net, **settings)
        generator = torch.Generator().manual_seed(0)
        for number, (inputs, targets) in enumerate(tasks):
            if number and consolidating:
                consolidate(net)
            for _ in range(4):
                for chosen in torch.randperm(1400, generator=generator).split(size):
                    optimizer.zero_grad()
                    networks.cross_entropy(net(inputs[:, chosen]), targets[:, chosen]).backward()
                    optimizer.step()
        with torch.no_grad():
            accuracy[consolidating] = [
                (net(inputs[:, 1400:]).argmax(-1) == targets[:, 1400:]).double().mean(1)
                for inputs, targets in tasks
            ]
    (old, new), (kept, newer) = accuracy[False], accuracy[True]
    assert (kept > old + 0.2).all()
    assert (kept - old).mean() > 0.3
    assert (newer > new - 0.12).all()
