"""Which layer feeds which: read off sequences, given by hand, or refused by name."""

import pytest
from cases import batch, step_with, still
from torch import Tensor, nn

from clagrange.interventions import ContinualBackprop
from clagrange.wiring import connections


class Branches(nn.Module):
    """Not a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc2(self.fc1(inputs).relu())


def test_unknown_structure_is_named_and_the_chain_can_be_given() -> None:
    net = Branches().double()
    optimizer = still(net)
    with pytest.raises(ValueError, match=r"past '\(root\)' of type Branches; give the chain by hand, layers="):
        ContinualBackprop().on_start(net, optimizer)
    nested = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), Branches()))
    with pytest.raises(ValueError, match=r"past '1\.1' of type Branches"):
        ContinualBackprop().on_start(nested, still(nested))
    method = ContinualBackprop(replacement_rate=1.0, maturity=0, layers=["fc1", "fc2"])
    method.on_start(net, optimizer)
    step_with(net, optimizer, method, *batch())
    assert not net.fc2.weight.any()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["fc1", "fc3"], r"layers: expected names of linear or convolution layers \(fc1, fc2\); got 'fc3'"),
        (["fc2", "fc1"], r"layers: 'fc2' has 3 units, but 'fc1' takes 5 inputs"),
        (["fc1"], r"at least two linear or convolution layers"),
    ],
)
def test_bad_chains_are_refused(layers: list[str], message: str) -> None:
    net = Branches()
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(layers=layers).on_start(net, still(net))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(5, 3)), "at least two linear or convolution layers"),
        (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), r"past '1' of type LayerNorm"),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), r"'1' is a grouped convolution"),
    ],
)
def test_networks_that_it_does_not_know_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualBackprop().on_start(net, still(net))


def test_pooling_dropout_and_nesting_are_passed() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Sequential(nn.Linear(16, 5), nn.Tanh()),
        nn.Linear(5, 3),
    )
    links = connections(net)
    assert [(link.name, link.units, link.copies) for link in links] == [("0.0", 4, 4), ("3.0", 5, 1)]
