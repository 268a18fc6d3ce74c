"""What survives saving, loading, copying, pickling, changes of type and new parameter objects."""

import copy
import io
import pickle

import pytest
import torch
from cases import EULER_LAGRANGE, R, assert_same_tensors, batch, convnet, gaussian_parameters, images, mlp, train
from torch import nn

from clagrange import collapse, gaussianize, replicas, variances
from clagrange.gaussian import owner_of
from clagrange.optim import EulerLagrange


def trained(seed: int = 0, **settings: object) -> nn.Sequential:
    """A Gaussian network some steps away from its prior."""
    net = gaussianize(mlp(seed), **settings)
    train(net, EULER_LAGRANGE.make(net), range(5))
    return net


def assert_linked(net: nn.Module) -> None:
    for name, mean, _ in gaussian_parameters(net):
        layer, _, mean_name = name.rpartition(".")
        assert owner_of(mean) == (net.get_submodule(layer), mean_name)


def test_state_dict_holds_everything_and_loads() -> None:
    source = trained(prior_variance=0.3)
    keys = {
        f"{layer}.{mean}{rest}"
        for layer in "024"
        for mean in ("weight", "bias")
        for rest in (
            "",
            *(f"_precision.{b}" for b in ("precision", "curvature", "prior_mean", "prior_precision")),
        )
    }
    assert set(source.state_dict()) == keys
    target = gaussianize(mlp(9), prior_variance=5.0, prior_mean="zero")
    target.load_state_dict(source.state_dict())
    assert_same_tensors(dict(target.state_dict()), dict(source.state_dict()))
    assert_linked(target)


def test_file_loads_with_weights_only() -> None:
    source, file = trained(), io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = gaussianize(mlp(9))
    target.load_state_dict(torch.load(file, weights_only=True))
    assert_same_tensors(dict(target.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("assign", [False, True])
def test_deterministic_checkpoint_loads_strictly_and_returns_to_the_prior(assign: bool) -> None:
    net, checkpoint = trained(prior_variance=0.3), mlp(7).state_dict()
    keys = list(checkpoint)
    net.load_state_dict(checkpoint, assign=assign)
    assert list(checkpoint) == keys
    fresh = gaussianize(mlp(7), prior_variance=0.3)
    assert_same_tensors(dict(net.state_dict()), dict(fresh.state_dict()))
    assert_linked(net)


def test_partial_checkpoint_resets_only_what_it_has() -> None:
    net = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fresh = gaussianize(mlp(7))
    part = {name: value for name, value in mlp(7).state_dict().items() if name in ("0.bias", "2.weight")}
    missing, unexpected = net.load_state_dict(part, strict=False)
    assert unexpected == []
    assert "0.weight" in missing
    for name, value in net.state_dict().items():
        expected = fresh.state_dict() if name.startswith(("0.bias", "2.weight")) else before
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_precision_that_is_only_half_there_is_missed() -> None:
    net, state = trained(), trained().state_dict()
    del state["2.weight_precision.curvature"]
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.weight_precision\.curvature"):
        net.load_state_dict(state)


def test_gaussian_checkpoint_of_a_stacked_network_loads() -> None:
    source = replicas.stack([trained(seed) for seed in range(R)])
    target = gaussianize(replicas.stack([mlp() for _ in range(R)]))
    target.load_state_dict(source.state_dict())
    assert_same_tensors(dict(target.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_link_and_train(clone) -> None:
    net = trained()
    copied = clone(net)
    assert_same_tensors(dict(copied.state_dict()), dict(net.state_dict()))
    assert_linked(copied)
    optimizer = EulerLagrange(copied.parameters(), lr=0.02, temperature=1e-3)
    before = {name: value.clone() for name, value in copied.state_dict().items()}
    train(copied, optimizer, range(1))
    after = copied.state_dict()
    assert all(
        not torch.equal(after[f"0.weight{x}"], before[f"0.weight{x}"]) for x in ("", "_precision.precision")
    )


def test_deepcopy_is_independent() -> None:
    net = trained()
    copied = copy.deepcopy(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(copied, EULER_LAGRANGE.make(copied), range(3))
    assert_same_tensors(dict(net.state_dict()), before)
    assert_linked(net)


def test_module_file_loads() -> None:
    net, file = trained(), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same_tensors(dict(loaded.state_dict()), dict(net.state_dict()))
    assert_linked(loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_gaussian_state_its_digits(dtype: torch.dtype) -> None:
    net = trained().float()
    train(net, EULER_LAGRANGE.make(net), range(5, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.to(dtype)
    for name, value in net.state_dict().items():
        assert value.dtype == (torch.float32 if "_precision" in name else dtype)
        if "_precision" in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert_linked(net)
    net.float()
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}


def test_the_methods_half_and_bfloat16_do_the_same() -> None:
    assert trained().float().half()[0].weight_precision.precision.dtype == torch.float32
    assert trained().float().bfloat16()[0].weight_precision.curvature.dtype == torch.float32


def test_gaussianized_in_half_precision_has_a_float32_state() -> None:
    net = gaussianize(mlp().half(), prior_mean="initial")
    assert {variance.dtype for variance in variances(net).values()} == {torch.float32}
    assert net[0].weight_precision.prior_mean.dtype == torch.float32


def test_double_takes_the_state_along() -> None:
    net = gaussianize(mlp().float()).double()
    assert {value.dtype for value in net.state_dict().values()} == {torch.float64}
    assert_linked(net)


def test_conversion_that_makes_new_parameter_objects_keeps_the_link() -> None:
    net = trained()
    old = net[0].weight
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert net[0].weight is not old
    assert_linked(net)


def test_a_new_parameter_object_is_linked() -> None:
    net = trained()
    old = net[0].weight
    net[0].weight = nn.Parameter(old.detach() + 1)
    assert owner_of(net[0].weight) == (net[0], "weight")
    train(net, EULER_LAGRANGE.make(net), range(2))


def test_link_goes_with_collapse_and_with_the_network() -> None:
    net = trained()
    weight = net[0].weight
    collapse(net)
    assert owner_of(weight) is None
    net = trained()
    weight = net[0].weight
    del net
    assert owner_of(weight) is None


def test_unpickled_network_without_gradients_still_predicts() -> None:
    net = gaussianize(convnet())
    inputs, _ = images()
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(inputs), net(inputs), rtol=0, atol=0)


def test_nothing_of_a_training_step_is_pickled() -> None:
    net = trained()
    net(batch()[0]).sum().backward()
    assert pickle.loads(pickle.dumps(net))[0].examples == 0
