"""inject_variance: what it widens, what it draws afresh, what it leaves alone."""

import math

import pytest
import torch
from cases import R, assert_same_tensors, gaussian_parameters, mlp, tensor
from scipy import stats
from torch import nn

from clagrange import gaussianize, inject_variance, replicas


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def learned(seed: int = 0) -> nn.Sequential:
    """A network whose precisions are 1 to 11 times the prior's."""
    net = gaussianize(mlp(seed))
    for _, _, precision in gaussian_parameters(net):
        precision.precision.mul_(1 + 10 * torch.rand(precision.precision.shape, generator=stream(seed)))
    return net


def test_strength_zero_changes_nothing_and_draws_nothing() -> None:
    net, generator = learned(), stream()
    before, random = state(net), generator.get_state()
    inject_variance(net, strength=0.0, generator=generator)
    assert_same_tensors(dict(net.state_dict()), before)
    assert torch.equal(generator.get_state(), random)


@pytest.mark.parametrize("widen", [0.25, 1.0])
def test_widening_only_widens(widen: float) -> None:
    net = learned()
    before = state(net)
    inject_variance(net, strength=0.0, widen=widen)
    for name, value in net.state_dict().items():
        if name.endswith("_precision.precision"):
            prior = before[name.replace(".precision", ".prior_precision")]
            expected = before[name] + widen * (prior - before[name])
            torch.testing.assert_close(value, expected)
            assert (value <= before[name]).all()
        else:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_sampling_changes_no_precision() -> None:
    net = learned()
    before = state(net)
    inject_variance(net, strength=1.0, generator=stream())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == ("_precision" in name)


def test_determined_weights_stay_and_free_ones_are_drawn_from_the_prior() -> None:
    net = gaussianize(nn.Linear(200, 100).double(), prior_variance=0.5)
    with torch.no_grad():
        net.weight.fill_(3.0)
    net.weight_precision.precision[:50] *= 1e30
    inject_variance(net, strength=1.0, generator=stream())
    torch.testing.assert_close(net.weight[:50], torch.full((50, 200), 3.0, dtype=torch.float64))
    law = stats.norm(0.0, math.sqrt(0.5 * 2 / 200))
    assert stats.kstest(net.weight[50:].detach().flatten().numpy(), law.cdf).pvalue > 0.01


def test_partly_free_weights_keep_a_part() -> None:
    """Retained information 3/4 and strength 0.8: a = 1 − 0.8/4."""
    net = gaussianize(nn.Linear(200, 100).double())
    with torch.no_grad():
        net.weight.fill_(3.0)
    net.weight_precision.precision.mul_(4.0)
    inject_variance(net, strength=0.8, generator=stream())
    law = stats.norm(0.8 * 3.0, math.sqrt(1 - 0.8**2) * math.sqrt(2 / 200))
    assert stats.kstest(net.weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


def test_widening_comes_before_sampling() -> None:
    """Fully widened, every weight is free, however determined it was."""
    net = gaussianize(nn.Linear(100, 100).double())
    with torch.no_grad():
        net.weight.fill_(3.0)
    net.weight_precision.precision.mul_(1e6)
    inject_variance(net, strength=1.0, widen=1.0, generator=stream())
    law = stats.norm(0.0, math.sqrt(2 / 100))
    assert stats.kstest(net.weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


def test_draws_around_the_prior_mean() -> None:
    net = nn.Linear(100, 100).double()
    with torch.no_grad():
        net.weight.fill_(7.0)
    gaussianize(net, prior_mean="initial")
    with torch.no_grad():
        net.weight.fill_(-7.0)
    inject_variance(net, strength=1.0, generator=stream())
    law = stats.norm(7.0, math.sqrt(2 / 100))
    assert stats.kstest(net.weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


def test_chosen_layers_only() -> None:
    net = learned()
    before = state(net)
    inject_variance(net, strength=0.5, widen=0.5, generator=stream(), layers=["4", "[0]"])
    changed = {
        name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"0", "4"}


def test_reproducible_by_the_generator() -> None:
    nets = [learned() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        inject_variance(net, 0.5, generator=stream(seed))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)
    torch.manual_seed(4)
    inject_variance(nets[0], 0.5)
    torch.manual_seed(4)
    inject_variance(nets[1], 0.5)
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))


def test_stacked_equals_separate() -> None:
    nets = [learned(seed) for seed in range(R)]
    stacked = replicas.stack(nets)
    strengths, widens = (0.0, 0.4, 1.0), (0.3, 0.0, 1.0)
    inject_variance(stacked, tensor(*strengths), tensor(*widens), [stream(seed) for seed in range(R)])
    for seed, (net, single) in enumerate(zip(nets, replicas.unstack(stacked), strict=True)):
        inject_variance(net, strengths[seed], widens[seed], stream(seed))
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-12, atol=1e-12)


def test_half_precision_network() -> None:
    net = learned().to(torch.bfloat16)
    inject_variance(net, 0.5, 0.5, stream())
    assert net[0].weight.dtype == torch.bfloat16
    assert net[0].weight.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"strength": 1.5}, ValueError, r"strength: expected a number in \[0, 1\], got 1\.5"),
        ({"widen": -0.1}, ValueError, r"widen: expected a number in \[0, 1\], got -0\.1"),
        ({"strength": "much"}, TypeError, r"strength: expected a number"),
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
    net = learned()
    before = state(net)
    with pytest.raises(error, match=message):
        inject_variance(net, **settings)
    assert_same_tensors(dict(net.state_dict()), before)


def test_deterministic_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        inject_variance(mlp())
