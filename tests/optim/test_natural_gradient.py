"""Natural gradient and geometric mean: against dense matrices, in their limits, and through hooks."""

import copy
import gc
import io
import pickle

import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, mlp, tensor, train
from torch import nn

from clagrange import replicas
from clagrange.metrics import gradient_norm, sharpness
from clagrange.optim import Ballistic, GeometricMean, NaturalGradient
from clagrange.optim.kronecker import kronecker_solve, raised_diagonal
from clagrange.optim.natural_gradient import geometric_mean

KRONECKER = [
    (NaturalGradient, {"lr": 0.02, "damping": 0.1, "structure": "kronecker"}),
    (GeometricMean, {"lr": 0.02, "damping": 0.1, "structure": "kronecker"}),
    (GeometricMean, {"lr": 0.02, "damping": 0.1, "metric_decay": 0.9, "structure": "kronecker"}),
]
kronecker = pytest.mark.parametrize(("form", "settings"), KRONECKER, ids=["natural", "ballistic", "mean"])


def positive(size: int, seed: int) -> torch.Tensor:
    """A positive definite matrix."""
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


def dense_root(matrix: torch.Tensor) -> torch.Tensor:
    """The positive definite square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


# ------------------------------------------------------------------------------------------------- diagonal
def test_natural_gradient_with_the_hessian_is_newtons_method() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    optimizer = NaturalGradient([weight], lr=1.0, metric_decay=1.0, damping=1e-14)
    curvature = torch.tensor([0.1, 40.0], dtype=torch.float64)
    optimizer.set_metric(weight, curvature)
    weight.grad = curvature * weight.detach()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", [NaturalGradient, GeometricMean])
def test_large_damping_is_sgd(form) -> None:
    nets = [mlp(), mlp()]
    train(nets[0], form(nets[0].parameters(), lr=0.1 * 1e9, damping=1e9), range(20))
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.1), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-7, atol=1e-8)


def test_equal_beliefs_make_the_geometric_mean_the_natural_gradient() -> None:
    nets = [mlp(), mlp()]
    train(nets[0], GeometricMean(nets[0].parameters(), 0.02, 0.9, 0.9, damping=0.1), range(20))
    train(nets[1], NaturalGradient(nets[1].parameters(), 0.02, 0.9, damping=0.1), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-11, atol=1e-12)


def test_euclidean_metric_makes_the_geometric_mean_ballistic() -> None:
    nets = [mlp(), mlp()]
    train(nets[0], GeometricMean(nets[0].parameters(), 0.002, None, 0.9, damping=1e-15), range(20))
    train(nets[1], Ballistic(nets[1].parameters(), 0.002, 0.9, eps=1e-30), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-9, atol=1e-10)


def test_held_beliefs_give_one_over_the_root_of_their_product() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = GeometricMean([weight], lr=1.0, metric_decay=1.0, curvature_decay=1.0, damping=1e-15)
    metric, curvature = tensor(1.0, 2.0, 50.0), tensor(0.1, 8.0, 0.3)
    optimizer.set_metric(weight, metric)
    optimizer.set_curvature(weight, curvature)
    weight.grad = tensor(1.0, -3.0, 0.2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -weight.grad / (metric * curvature).sqrt())


# ------------------------------------------------------------------------------------------ dense matrices
def test_geometric_mean_of_matrices() -> None:
    """X G⁻¹ X = H; symmetric in both; G#I = G^{1/2}; G#G = G; (B₁⊗A₁)#(B₂⊗A₂) = (B₁#B₂)⊗(A₁#A₂)."""
    G, H, A, B = positive(4, 0), positive(4, 1), positive(3, 2), positive(3, 3)
    identity = torch.eye(4, dtype=torch.float64)
    X = geometric_mean(G, H)
    torch.testing.assert_close(X @ torch.linalg.solve(G, X), H)
    torch.testing.assert_close(X, X.T)
    torch.testing.assert_close(geometric_mean(H, G), X)
    torch.testing.assert_close(geometric_mean(G, identity), dense_root(G))
    torch.testing.assert_close(geometric_mean(G, G), G)
    torch.testing.assert_close(
        geometric_mean(torch.kron(G, A), torch.kron(H, B)), torch.kron(X, geometric_mean(A, B))
    )
    torch.testing.assert_close(geometric_mean(torch.stack([G, H]), torch.stack([H, G])), torch.stack([X, X]))


def test_geometric_mean_refuses_a_metric_that_is_not_positive_definite() -> None:
    with pytest.raises(
        ValueError, match=r"metric: expected a positive definite matrix, got eigenvalues down to -1"
    ):
        geometric_mean(torch.diag(torch.tensor([1.0, -1.0])), torch.eye(2))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_kronecker_solve_against_the_dense_matrix(power: float) -> None:
    B, A = positive(3, 0), positive(5, 1)
    g = torch.randn(3, 5, dtype=torch.float64)
    dense = torch.kron(B, A)
    dense = dense if power == 1.0 else dense_root(dense)
    expected = torch.linalg.solve(dense + 0.3 * torch.eye(15, dtype=torch.float64), g.flatten()).view(3, 5)
    torch.testing.assert_close(kronecker_solve((B, A), g, 0.3, power), expected)


@pytest.mark.parametrize("parts", [[8], [3, 5]], ids=["whole", "accumulated"])
def test_hooks_see_the_factors_of_each_example(parts: list[int]) -> None:
    """E[xxᵀ] and E[δδᵀ] with δ from per-example gradients of the logits, by torch.func."""
    net = mlp()
    optimizer = NaturalGradient(net, structure="kronecker")
    inputs, targets = batch(0)
    net(inputs[:2]).sum().backward()  # another backward pass, whose gradients are thrown away
    optimizer.zero_grad()
    for part_inputs, part_targets in zip(inputs.split(parts), targets.split(parts), strict=True):
        (nn.functional.cross_entropy(net(part_inputs), part_targets, reduction="sum") / 8).backward()
    with torch.no_grad():
        net(inputs)  # evaluation in between is not seen
    hidden = net[:4](inputs).detach()
    loss = nn.functional.cross_entropy
    deltas = torch.stack(
        [torch.func.grad(loss)(net[4](h).detach(), y) for h, y in zip(hidden, targets, strict=True)]
    )
    outputs, seen = optimizer._observer_of(net[4].weight).factors()
    torch.testing.assert_close(outputs, deltas.T @ deltas / 8)
    torch.testing.assert_close(seen, hidden.T @ hidden / 8)
    optimizer.step()
    assert optimizer._observer_of(net[4].weight).factors() is None


def test_the_first_kronecker_step_against_the_dense_fisher_matrix() -> None:
    """One layer: −lr·(E[δδᵀ] ⊗ E[xxᵀ] + d)⁻¹g, and the diagonal of E[δδᵀ] for the bias."""
    torch.manual_seed(1)
    net = nn.Linear(5, 3).double()
    start = copy.deepcopy(net)
    inputs, targets = batch(0)
    steps = {}
    for name, form, settings in (
        ("natural", NaturalGradient, {}),
        ("ballistic", GeometricMean, {}),
        ("mean", GeometricMean, {"metric_decay": 0.5}),
    ):
        layer = copy.deepcopy(start)
        optimizer = form(layer, lr=0.1, damping=0.2, structure="kronecker", **settings)
        backward(layer, optimizer, inputs, targets)
        gradient, bias_gradient = layer.weight.grad.clone(), layer.bias.grad.clone()
        optimizer.step()
        steps[name] = layer.weight.detach() - start.weight.detach(), layer.bias.detach() - start.bias.detach()
    deltas = start(inputs).softmax(1).detach() - nn.functional.one_hot(targets, 3)
    B, A = deltas.T @ deltas / 8, inputs.T @ inputs / 8
    fisher, damping = torch.kron(B, A), 0.2 * torch.eye(15, dtype=torch.float64)
    # B has rank 2 at most (the rows of δ sum to 0), so its root is taken with round-off removed
    root = torch.kron(dense_root(B + 1e-14 * torch.eye(3)), dense_root(A))
    for name, matrix in (("natural", fisher), ("ballistic", root), ("mean", fisher)):
        expected = -0.1 * torch.linalg.solve(matrix + damping, gradient.flatten()).view(3, 5)
        torch.testing.assert_close(steps[name][0], expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(steps["natural"][1], -0.1 * bias_gradient / (B.diagonal() + 0.2))
    torch.testing.assert_close(steps["ballistic"][1], -0.1 * bias_gradient / (B.diagonal().sqrt() + 0.2))


# ----------------------------------------------------------------------------- the battery, through hooks
@kronecker
def test_learns(form, settings: dict) -> None:
    net = mlp()
    optimizer = form(net, **settings)
    losses = [backward(net, optimizer, *batch(0)).item()]
    for _ in range(60):
        optimizer.step()
        losses.append(backward(net, optimizer, *batch(0)).item())
    assert losses[-1] < 0.5 * losses[0]


@kronecker
def test_checkpoint_and_copies_continue_identically(form, settings: dict) -> None:
    net = mlp()
    optimizer = form(net, **settings)
    train(net, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    pairs = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = mlp(8)
    other = form(resumed, **{**settings, "lr": 0.5})
    resumed.load_state_dict(checkpoint["net"])
    other.load_state_dict(checkpoint["optimizer"])
    train(net, optimizer, range(4, 9))
    for copied, its in [*pairs, (resumed, other)]:
        train(copied, its, range(4, 9))
        assert_same_tensors(dict(copied.state_dict()), dict(net.state_dict()))


@kronecker
def test_accumulated_gradients_equal_the_big_batch(form, settings: dict) -> None:
    nets = mlp(), mlp()
    optimizers = [form(net, **settings) for net in nets]
    for step in range(4):
        inputs, targets = batch(step, size=12)
        backward(nets[0], optimizers[0], inputs, targets)
        optimizers[0].step()
        optimizers[1].zero_grad()
        for part in (slice(0, 2), slice(2, 8), slice(8, 12)):
            loss = nn.functional.cross_entropy(nets[1](inputs[part]), targets[part], reduction="sum") / 12
            loss.backward()
        optimizers[1].step()
    assert_same_tensors(dict(nets[1].state_dict()), dict(nets[0].state_dict()), rtol=1e-8, atol=1e-9)


@kronecker
def test_stacked_equals_separate(form, settings: dict) -> None:
    nets = [mlp(seed) for seed in range(R)]
    stacked = replicas.stack(nets)
    numbers = {"lr": [0.02, 0.005, 0.01], "damping": [0.1, 1.0, 0.3]}
    optimizer = form(stacked, **{**settings, **{name: tensor(*values) for name, values in numbers.items()}})
    singles = [
        form(net, **{**settings, **{name: values[r] for name, values in numbers.items()}})
        for r, net in enumerate(nets)
    ]
    for step in range(10):
        batches = [batch(100 * r + step) for r in range(R)]
        backward(stacked, optimizer, *(torch.stack(part) for part in zip(*batches, strict=True)))
        optimizer.step()
        for net, single, (inputs, targets) in zip(nets, singles, batches, strict=True):
            backward(net, single, inputs, targets)
            single.step()
    for net, single in zip(nets, replicas.unstack(stacked), strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-7, atol=1e-8)


@kronecker
def test_a_frozen_weight_leaves_its_bias_to_learn(form, settings: dict) -> None:
    net = mlp()
    net[2].weight.requires_grad_(False)
    optimizer = form(net, **settings)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, range(3))
    assert torch.equal(net[2].weight, before["2.weight"])
    assert not torch.equal(net[2].bias, before["2.bias"])


@kronecker
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, settings: dict, dtype: torch.dtype) -> None:
    net = mlp(dtype=dtype)
    optimizer = form(net, **settings)
    train(net, optimizer, range(10))
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_two_optimizers_share_the_hooks_of_a_network() -> None:
    net = mlp()
    first, second = (NaturalGradient(net, structure="kronecker") for _ in range(2))
    for layer in (net[0], net[2], net[4]):
        assert len(layer._forward_hooks) == 1
    assert first._observer_of(net[0].weight) is second._observer_of(net[0].weight)


def test_hooks_go_with_the_optimizers_that_use_them() -> None:
    net = mlp()
    first, second = (NaturalGradient(net, structure="kronecker") for _ in range(2))
    train(net, first, range(1))
    del first
    gc.collect()
    train(net, second, range(2))
    alone = copy.deepcopy(net)  # a copy without its optimizer
    del second
    gc.collect()
    assert not any(layer._forward_hooks for layer in net)
    optimizer = NaturalGradient(alone, structure="kronecker")
    assert [len(alone[index]._forward_hooks) for index in (0, 2, 4)] == [1, 1, 1]
    train(alone, optimizer, range(2))


@kronecker
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.bfloat16, 1e-2)])
def test_scaled_losses_make_the_same_steps(form, settings: dict, dtype: torch.dtype, tolerance: float) -> None:
    """Output gradients arrive scaled, and the gradients of the parameters are unscaled before the step."""
    nets = mlp(dtype=dtype), mlp(dtype=dtype)
    for net, enabled in zip(nets, (True, False), strict=True):
        optimizer = form(net, **settings)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for step in range(5):
            inputs, targets = batch(step, dtype=dtype)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(inputs), targets)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert not torch.equal(nets[1][0].weight, mlp(dtype=dtype)[0].weight)
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=tolerance, atol=tolerance)


def test_factors_are_of_the_gradient_that_the_optimizer_sees() -> None:
    """Multiplied with a number of each replica, weights and biases; at 1 they are the same to the last bit."""
    stacked = replicas.stack([mlp(seed) for seed in range(R)])
    optimizer = NaturalGradient(stacked, structure="kronecker")
    backward(stacked, optimizer, *(torch.stack(part) for part in zip(*map(batch, range(R)), strict=True)))
    observer = optimizer._observer_of(stacked[2].weight)
    outputs, inputs = observer.factors()
    factors = tensor(1.0, 1e-5, -0.5)
    for parameter, at in ((stacked[2].weight, outputs), (stacked[2].bias, outputs.diagonal(dim1=-2, dim2=-1))):
        shape = (R, *[1] * (at.dim() - 1))
        gradient = parameter.grad * factors.view(R, *[1] * (parameter.dim() - 1))
        seen, *rest = optimizer._observed(parameter, gradient, optimizer.param_groups[0])
        torch.testing.assert_close(seen, at * factors.square().view(shape))
        assert torch.equal(seen[0], at[0])
        assert all(torch.equal(other, inputs) for other in rest)


@kronecker
def test_passes_of_functional_transforms_are_not_seen(form, settings: dict) -> None:
    """`clagrange.metrics.gradient_norm` between the backward pass and the step, and after it."""
    nets = mlp(), mlp()
    for net in nets:
        optimizer = form(net, **settings)
        for step in range(3):
            inputs, targets = batch(step)
            optimizer.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(net(inputs), targets).backward()
            if net is nets[0]:
                gradient_norm(net, inputs[:3], targets[:3])
            optimizer.step()
            if net is nets[0]:
                sharpness(net, inputs[:3], targets[:3])
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=0, atol=0)


@kronecker
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_replica_that_is_not_finite_leaves_the_others_alone(form, settings: dict, bad: float) -> None:
    stacks = [replicas.stack([mlp(seed) for seed in range(R)]) for _ in range(2)]
    for net in stacks:
        optimizer = form(net, **settings)
        for step in range(4):
            inputs, targets = (
                torch.stack(part) for part in zip(*[batch(step + r) for r in range(R)], strict=True)
            )
            if net is stacks[0] and step == 2:
                inputs[1] = bad
            backward(net, optimizer, inputs, targets)
            optimizer.step()
    bad_net, good_net = (replicas.unstack(net) for net in stacks)
    for index in (0, 2):
        others = dict(bad_net[index].state_dict()), dict(good_net[index].state_dict())
        assert_same_tensors(*others, rtol=1e-12, atol=1e-12)
    assert not any(value.isfinite().all() for value in bad_net[1].state_dict().values())


@pytest.mark.parametrize("rows", [8, 32])
def test_wide_layers_with_few_rows_in_single_precision(rows: int) -> None:
    """The factors are singular, and what is added to their diagonal is more than their rounding."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.zeros(64, 64)
    for _ in range(30):
        x = torch.rand(rows, 64, generator=generator) * torch.logspace(-3, 2, 64)
        factor = 0.99 * factor + x.mT @ x
        for scale in (1e-8, 1.0, 1e8):
            assert bool(torch.isfinite(geometric_mean(raised_diagonal(scale * factor), factor)).all())


def test_what_kronecker_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params: expected a network with torch.nn.Linear layers"):
        NaturalGradient(nn.Sequential(nn.Conv2d(1, 1, 3)), structure="kronecker")
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"two that share one"):
        GeometricMean(tied, structure="kronecker")
    net = mlp()
    with pytest.raises(ValueError, match=r"metric_decay: expected a number in \[0, 1\), got 1"):
        NaturalGradient(net, metric_decay=1.0, structure="kronecker")
    optimizer = NaturalGradient(net, structure="kronecker")
    with pytest.raises(ValueError, match=r"metric: .*whose factors are seen through hooks"):
        optimizer.set_metric(net[0].weight, 1.0)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(RuntimeError, match=r"shape \(6, 5\) has a gradient, but its layer saw no example"):
        optimizer.step()
