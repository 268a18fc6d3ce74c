"""The methods that a study compares: what each trains with, and what is measured at the mean."""

import json
import re
import sys

import pytest
import torch
import yaml
from cases import assert_same_tensors, backward, batch, mlp
from torch import nn

from clagrange import replicas
from clagrange.cli import main
from clagrange.gaussian import gaussian_layers
from clagrange.replicas import generators_from_seeds
from clagrange.study import clock
from clagrange.study.engine import Run
from clagrange.study.extras import EXTRAS
from clagrange.study.ivon import IVON, IVONSampling
from clagrange.study.methods import METHODS
from clagrange.tasks import PermutedDigits

SETTINGS = {"lr": 0.2, "ess": 50.0, "hess_init": 0.3, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.01}


@pytest.fixture
def package():
    return pytest.importorskip("ivon", reason="ivon-opt is not installed")


def stream(seed=0, tasks=1):
    return PermutedDigits(tasks=tasks, examples=80, batch_size=8, seed=seed)


def ivon_run(steps, net=None, optimizer=None, sampling=None):
    """Steps of the adapter with the random stream of seed 3."""
    net = mlp() if net is None else net
    optimizer = IVON(net.parameters(), **SETTINGS) if optimizer is None else optimizer
    sampling = IVONSampling(seed=3) if sampling is None else sampling
    sampling.on_start(net, optimizer)
    for step in steps:
        backward(net, optimizer, *batch(step))
        optimizer.step()
    return net, optimizer, sampling


# ------------------------------------------------------------------------------------------------- Muon
def test_muon_moves_the_weights_of_a_stacked_network_and_adamw_its_biases():
    run = Run(METHODS["muon"](), [stream(0), stream(1)], [8])
    run.run_task()
    state = run.optimizer.state
    for name, parameter in run.network.named_parameters():
        assert ("momentum_buffer" in state[parameter]) == name.endswith("weight"), name
        assert ("gradient_square" in state[parameter]) == name.endswith("bias"), name


# ------------------------------------------------------------------------------------------------- IVON
def test_ivon_is_the_package_s_own_loop(package):
    """Bit for bit, with torch's global stream at the same place; the global stream itself stays where it is."""
    ours, _, _ = ivon_run(range(10))
    theirs = mlp()
    optimizer = package.IVON(theirs.parameters(), **SETTINGS)
    torch.set_rng_state(generators_from_seeds(3, purpose="IVONSampling").get_state())
    for step in range(10):
        with optimizer.sampled_params(train=True):
            backward(theirs, optimizer, *batch(step))
        optimizer.step()
    assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()))
    net = mlp()
    torch.manual_seed(8)
    ivon_run(range(2), net)
    after = torch.randn(3)
    torch.manual_seed(8)
    assert torch.equal(after, torch.randn(3))


@pytest.mark.usefixtures("package")
def test_ivon_of_stacked_networks_takes_a_setting_for_each():
    nets = [mlp(seed) for seed in range(2)]
    stacked = replicas.stack(nets)
    numbers = {name: torch.tensor([value, value * 0.9], dtype=torch.float64) for name, value in SETTINGS.items()}
    optimizer = IVON(stacked.parameters(), replicas=2, **numbers)
    sampling = IVONSampling(seed=[5, 6])
    sampling.on_start(stacked, optimizer)
    for step in range(6):
        inputs, targets = batch(step)
        backward(stacked, optimizer, inputs.expand(2, -1, -1), targets.expand(2, -1))
        optimizer.step()
    for r, (net, single) in enumerate(zip(nets, replicas.unstack(stacked), strict=True)):
        alone = IVON(net.parameters(), **{name: float(value[r]) for name, value in numbers.items()})
        ivon_run(range(6), net, alone, IVONSampling(seed=5 + r))
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("package")
def test_ivon_goes_on_from_a_checkpoint_with_its_step_count(tmp_path):
    """The bias correction of its momentum needs the count, which the package's own state lacks."""
    whole, _, _ = ivon_run(range(6))
    net, optimizer, sampling = ivon_run(range(2))
    torch.save([part.state_dict() for part in (net, optimizer, sampling)], tmp_path / "checkpoint")
    resumed = mlp(seed=9)
    parts = (resumed, IVON(resumed.parameters(), lr=1.0), IVONSampling(seed=0))
    for part, state in zip(parts, torch.load(tmp_path / "checkpoint", weights_only=True), strict=True):
        part.load_state_dict(state)
    ivon_run(range(2, 6), *parts)
    assert_same_tensors(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.usefixtures("package")
def test_ivon_heeds_a_changed_learning_rate():
    net, optimizer, sampling = ivon_run(range(2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer.param_groups[0]["lr"] = 0.0
    ivon_run(range(2, 4), net, optimizer, sampling)
    assert_same_tensors(dict(net.state_dict()), before)


@pytest.mark.usefixtures("package")
def test_ivon_draws_once_for_a_step_and_never_for_an_evaluation():
    net, optimizer, _ = ivon_run([])
    inputs, targets = batch()
    mean = net.eval()(inputs)
    net.train()
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), mean, rtol=0, atol=0)
    first, second = net(inputs), net(inputs)
    assert not torch.allclose(first, mean, rtol=1e-3)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for output in (first, second):  # gradients accumulate at one draw
        (nn.functional.cross_entropy(output, targets) / 2).backward()
    optimizer.step()
    reference, _, _ = ivon_run([0])
    torch.testing.assert_close(net.eval()(inputs), reference.eval()(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number in"),
        ({"ess": 0.0}, "ess: expected a number in"),
        ({"hess_init": 0.0}, "hess_init: "),
        ({"beta2": 1.5}, "beta2: "),
        ({"weight_decay": -1.0}, "weight_decay: "),
        ({"lr": torch.ones(3)}, "lr: .*replicas"),
    ],
)
def test_bad_settings_of_ivon_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        IVON(mlp().parameters(), **settings)


@pytest.mark.usefixtures("package")
def test_ivon_without_a_draw_is_refused():
    net = mlp()
    optimizer = IVON(net.parameters())
    backward(net, optimizer, *batch())
    with pytest.raises(RuntimeError, match=r"expected a draw before the forward pass.*IVONSampling"):
        optimizer.step()


@pytest.mark.parametrize(("name", "extra"), [(name, kind.extra) for name, kind in METHODS.items() if kind.extra])
def test_without_its_package_a_method_is_left_out_and_refused_where_it_is_asked_for(
    name, extra, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, EXTRAS[extra].module, None)
    remedy = f"pip install 'clagrange[{extra}]'"
    with pytest.raises(ModuleNotFoundError, match=f"{EXTRAS[extra].package}.*{re.escape(remedy)}"):
        METHODS[name]()
    methods = {"sgd": {}, name: {}}
    study = {"seeds": 1, "streams": {"permuted_digits": {"stream": {"tasks": 1}, "methods": methods}}}
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    command = ["compare", str(config), "--out", str(out), "--workers", "1"]
    assert main([*command, "--methods", f"sgd,{name}"]) == 2
    error = capsys.readouterr().err
    assert f"permuted_digits.methods.{name}: " in error
    assert remedy in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert main(command) == 0
    error = capsys.readouterr().err
    assert f"left out: streams.permuted_digits.methods.{name}: " in error
    assert remedy in error
    summary = json.loads((out / "summary.json").read_text())
    assert [method["name"] for method in summary["streams"][0]["methods"]] == ["sgd"]
    assert main(["list", "methods"]) == 0
    assert f"needs {remedy}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- drawn weights
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.samples_weights])
def test_drawn_weights_are_measured_at_the_mean(name):
    """Steps so small that the fresh network stays: its own accuracy and loss on the task are the online ones."""
    if name == "ivon":
        pytest.importorskip("ivon", reason="ivon-opt is not installed")
    settings = {"ivon": {"lr": 0.0, "ess": 10.0}}.get(name, {"lr": 1e-9, "prior_variance": 5.0})
    run = Run(METHODS[name](**settings), [stream(2)], [8], dtype=torch.float64)
    task = run.streams[0].task(0)
    order = run.streams[0].order(0, 0).flatten()
    run.network.eval()
    with torch.no_grad():
        logits = run.network(task.inputs[order].double().unsqueeze(0))[0]
    run.network.train()
    run.run_task()
    right = float((logits.argmax(-1) == task.targets[order]).double().mean())
    assert run.metrics["online_accuracy"][0, 0] == pytest.approx(right)
    loss = float(nn.functional.cross_entropy(logits, task.targets[order]))
    assert run.metrics["loss"][0, 0] == pytest.approx(loss, rel=1e-5)


def test_measuring_at_the_mean_is_off_the_clock(monkeypatch):
    """A clock that only evaluation moves stands still in the run's seconds."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    run = Run(METHODS["mesu"](), [stream()], [8])

    def pass_time(network, *_):
        now[0] += 0.0 if network.training else 1.0

    run.network.register_forward_hook(pass_time)
    run.run_task()
    assert now[0] > run.streams[0].steps
    assert run.seconds == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["mesu", "bgd"])
def test_layers_draw_from_the_streams_of_the_replicas_seeds(name):
    def outputs(seeds):
        run = Run(METHODS[name](), [stream(seed) for seed in seeds], [8], dtype=torch.float64)
        assert all(layer.sampler.mode == "batch" for _, layer in gaussian_layers(run.network))
        with torch.no_grad():
            for parameter in run.network.parameters():
                parameter.zero_()
        return run.network(torch.ones(len(seeds), 1, 64, dtype=torch.float64)).detach()

    both = outputs([4, 9])
    torch.testing.assert_close(both[0], outputs([4])[0], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(both[0], both[1])
