"""Planned data order: closed form, greedy, blocks, and the sampler on features of real digits."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import clagrange
from clagrange.mechanics.least_time import samples_to_threshold
from clagrange.mechanics.planning import (
    greedy_inputs,
    linear_error,
    plan,
    planned_error,
    planned_inputs,
    planned_samples,
)
from clagrange.mechanics.sampler import PlannedSampler, last_layer_features
from clagrange.metrics.intervals import interval
from clagrange.tasks.digits import digits

P = 10


def unit_rows(count: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(count, P, generator=generator, dtype=torch.float64), dim=1)


def test_the_planned_order_attains_the_least_time() -> None:
    """ε = σ²(1 + p/n) at the end of every block of p, so T(δ) = pσ²/(δ − σ²) exactly."""
    rows = planned_inputs(100, P, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(100).double())
    for noise in (1.0, 0.3):
        errors = [linear_error(rows[:n], noise) for n in range(1, 101)]
        assert errors[:9] == [float("inf")] * 9
        for n in range(P, 101, P):
            assert errors[n - 1] == pytest.approx(planned_error(n, P, noise), rel=1e-12)
        for factor, expected in ((2.0, P), (1.5, 2 * P), (1.2, 5 * P)):
            threshold = factor * noise
            assert planned_samples(threshold, P, noise) == pytest.approx(expected)
            found = samples_to_threshold(errors, np.arange(1, 101), threshold * (1 + 1e-12))
            assert found.per_seed == (expected,)


def test_the_error_is_that_of_least_squares() -> None:
    """The formula against regressions with drawn noise, and with a prior against Bayesian ones."""
    generator = torch.Generator().manual_seed(1)
    rows, noise = unit_rows(25, generator), 0.5
    draws = 20_000
    for ridge in (0.0, 2.0):
        spread = (noise / ridge) ** 0.5 if ridge else 3.0
        truth = spread * torch.randn(P, draws, generator=generator, dtype=torch.float64)
        targets = rows @ truth + noise**0.5 * torch.randn(25, draws, generator=generator, dtype=torch.float64)
        solved = torch.linalg.solve(rows.T @ rows + ridge * torch.eye(P).double(), rows.T @ targets)
        errors = noise + (solved - truth).square().sum(0) / P
        standard = float(errors.std()) / draws**0.5
        assert float(errors.mean()) == pytest.approx(linear_error(rows, noise, ridge=ridge), abs=4 * standard)


def test_excess_of_a_random_order() -> None:
    """p = 10: ε/σ² − 1 is 0.99, 0.2455, 0.1102 at n = 20, 50, 100 where the planned order has 0.5, 0.2, 0.1."""
    generator = torch.Generator().manual_seed(2)
    for samples, published, planned in ((20, 0.99, 0.5), (50, 0.2455, 0.2), (100, 0.1102, 0.1)):
        rows = F.normalize(torch.randn(3000, samples, P, generator=generator, dtype=torch.float64), dim=2)
        grams = rows.transpose(1, 2) @ rows
        excess = torch.linalg.inv(grams).diagonal(dim1=1, dim2=2).sum(1) / P
        standard = float(excess.std()) / 3000**0.5
        assert float(excess.mean()) == pytest.approx(published, abs=3 * standard + 0.005 * published)
        assert planned == pytest.approx(planned_error(samples, P) - 1.0)
        assert float(excess.min()) > planned


def test_greedy_addition_reaches_the_optimum_after_every_block() -> None:
    first = unit_rows(1, torch.Generator().manual_seed(3))
    rows = greedy_inputs(5 * P, first)
    for block in range(1, 6):
        assert linear_error(rows[: block * P]) == pytest.approx(1.0 + 1.0 / block, rel=1e-10)
    crooked = unit_rows(7, torch.Generator().manual_seed(4))
    before = linear_error(torch.cat([crooked, greedy_inputs(30, crooked)[7:29]]))
    after = greedy_inputs(30, crooked)
    best = linear_error(after)
    for other in unit_rows(200, torch.Generator().manual_seed(5)):  # no input of length 1 does better
        assert linear_error(torch.cat([after[:29], other[None]])) > best
    assert best < before


def trace(pool: Tensor, chosen: list[int], ridge: float, moment: Tensor) -> float:
    strength = ridge * float(moment.trace()) / pool.shape[1]
    return linear_error(pool[chosen], 1.0, moment, strength) - 1.0


def small_pool() -> tuple[Tensor, Tensor]:
    pool = torch.randn(12, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    pool = pool * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return pool, pool.T @ pool / 12


def test_each_greedy_choice_is_the_best_of_the_pool() -> None:
    pool, moment = small_pool()
    order = plan(pool, 12, ridge=0.1)
    assert sorted(order) == list(range(12))
    for n in range(12):
        rest = [index for index in range(12) if index not in order[:n]]
        traces = {index: trace(pool, [*order[:n], index], 0.1, moment) for index in rest}
        assert min(traces, key=traces.__getitem__) == order[n]


def test_exchange_finds_the_best_block() -> None:
    """Against all subsets: greedy misses the best of them at some sizes, exchange finds nearly all."""
    pool, moment = small_pool()
    found = {"greedy": 0, "exchanged": 0}
    for size in range(2, 9):
        best = min(trace(pool, list(some), 0.01, moment) for some in itertools.combinations(range(12), size))
        greedy = trace(pool, plan(pool, size, ridge=0.01), 0.01, moment)
        block = plan(pool, size, ridge=0.01, exchange=20)
        exchanged = trace(pool, block, 0.01, moment)
        assert len(set(block)) == size
        assert best <= exchanged + 1e-12 <= greedy + 2e-12
        found["greedy"] += greedy < best * (1 + 1e-9)
        found["exchanged"] += exchanged < best * (1 + 1e-9)
    assert found["exchanged"] >= 6 > found["greedy"]


def test_what_is_learned_already_counts() -> None:
    pool, _ = small_pool()
    order = plan(pool, 6, ridge=0.1)
    assert plan(pool, 3, ridge=0.1, chosen=torch.tensor(order[:3])) == order[3:]
    single = torch.zeros(3, 3, dtype=torch.float64)
    single[2, 2] = 1.0  # only the third feature is asked for
    assert plan(pool, 1, ridge=1e4, moment=single)[0] == int(pool[:, 2].abs().argmax())


def test_the_sampler_in_a_loader() -> None:
    pool, _ = small_pool()
    data = TensorDataset(pool, torch.arange(12))
    sampler = PlannedSampler(pool, samples=8, ridge=0.1)
    assert len(sampler) == 8
    batches = [numbers.tolist() for _, numbers in DataLoader(data, batch_size=3, sampler=sampler)]
    assert [len(numbers) for numbers in batches] == [3, 3, 2]
    assert list(itertools.chain(*batches)) == plan(pool, 8, ridge=0.1)
    blocked = PlannedSampler(pool, block=4, ridge=0.1)
    order = list(blocked)
    assert sorted(order) == list(range(12))
    assert order[:4] == plan(pool, 4, ridge=0.1, exchange=3)
    assert list(blocked) == order


def test_features_are_those_of_the_network_as_it_is_at_each_block() -> None:
    net = clagrange.networks.mlp(3, [4], 2, seed=0).double()
    pool, _ = small_pool()
    calls = []

    def features() -> Tensor:
        calls.append(last_layer_features(net, pool))
        return calls[-1]

    sampler = PlannedSampler(features, samples=9, block=3)
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=3, sampler=sampler)
    calls.clear()
    learned: list[int] = []
    for (numbers,) in loader:
        expected = plan(
            last_layer_features(net, pool), 3, chosen=torch.tensor(learned, dtype=torch.long), exchange=3
        )
        assert numbers.tolist() == expected
        learned += expected
        with torch.no_grad():
            for parameter in net.parameters():  # the network learns
                parameter.add_(0.1 * torch.randn(parameter.shape).double())
    assert len(calls) == 3
    assert not torch.equal(calls[0], calls[2])
    hidden = torch.relu(net[1](pool))
    torch.testing.assert_close(last_layer_features(net, pool), torch.cat([hidden, torch.ones(12, 1).double()], 1))
    assert last_layer_features(torch.nn.Linear(3, 2).double(), pool).shape == (12, 4)


def second_task(seed: int) -> tuple[Tensor, Tensor]:
    """Features that an MLP learned on the digits 0–4, of the digits 5–9, and these digits minus 5."""
    inputs, targets = digits()
    old = targets < 5
    net = clagrange.networks.mlp(64, [32], 5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    seen, labels = inputs[old], targets[old]
    for _ in range(150):
        chosen = torch.randint(len(seen), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(seen[chosen]), labels[chosen]).backward()
        optimizer.step()
    return last_layer_features(net, inputs[~old]).double(), targets[~old] - 5


def test_on_digits_the_planned_sampler_is_there_first() -> None:
    """Ridge regression of the classes 5–9 on the last hidden layer that was trained on 0–4; 10 seeds."""
    threshold, samples = 0.35, np.arange(5, 151, 5)
    errors: dict[str, list[list[float]]] = {"random": [], "greedy": [], "blocks": []}
    for seed in range(10):
        features, targets = second_task(seed)
        wanted = F.one_hot(targets, 5).double()
        shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(100 + seed))
        test, train = shuffled[:300], shuffled[300:]
        pool = features[train]
        strength = float(pool.square().sum(1).mean()) / pool.shape[1] * torch.eye(pool.shape[1]).double()
        orders = {
            "random": list(range(150)),
            "greedy": list(PlannedSampler(pool, samples=150)),
            "blocks": list(PlannedSampler(pool, samples=150, block=10)),
        }
        for name, order in orders.items():
            curve = []
            for count in samples:
                rows, labels = pool[order[:count]], wanted[train[order[:count]]]
                weights = torch.linalg.solve(rows.T @ rows + strength, rows.T @ labels)
                curve.append(float((features[test] @ weights - wanted[test]).square().sum(1).mean()))
            errors[name].append(curve)
    times = {name: samples_to_threshold(curves, samples, threshold) for name, curves in errors.items()}
    assert all(time.reached == 1.0 for time in times.values())
    for name in ("greedy", "blocks"):
        assert times[name].interval.high < times["random"].interval.low
        saved = interval(np.subtract(times["random"].per_seed, times[name].per_seed))
        assert saved.low > 5.0


def test_bad_arguments() -> None:
    pool, _ = small_pool()
    with pytest.raises(ValueError, match=r"samples: expected a number in .*13; every example is drawn once"):
        PlannedSampler(pool, samples=13)
    with pytest.raises(ValueError, match=r"ridge: expected a number in .*got 0; with fewer rows"):
        plan(pool, 2, ridge=0.0)
    with pytest.raises(ValueError, match=r"features: expected shape \(pool, features\), got \(12, 3, 1\)"):
        plan(pool[..., None], 2)
    with pytest.raises(ValueError, match=r"samples: expected a number in \[10, inf\], got 9; each parameter"):
        planned_error(9, 10)
    with pytest.raises(ValueError, match=r"threshold: expected .* noise stays in every test error"):
        planned_samples(1.0, 10)
    with pytest.raises(ValueError, match="block: expected"):
        PlannedSampler(pool, block=0)
