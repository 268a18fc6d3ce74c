"""The Avalanche plugin: moments in order and number, hooks, state."""

import copy
from typing import Any

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche_runs import evaluator, naive, small_benchmark, small_stream
from torch import nn

import clagrange as cl
from clagrange.interventions import InputNormalization, Intervention, ShrinkAndPerturb
from clagrange.strategies import InterventionPlugin


class Recorder(Intervention):
    """Notes every moment, and checks that gradients are there before a step and weights differ after it."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[str] = []

    def on_start(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().on_start(network, optimizer)
        self.moments.append("start")

    def on_gradient(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert all(parameter.grad is not None for parameter in network.parameters())
        self.before = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        self.moments.append("gradient")

    def on_step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        after = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        assert not torch.equal(after, self.before)
        self.moments.append("step")

    def on_switch(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.moments.append("switch")


STEPS = ["gradient", "step"] * small_stream().steps


def recording(**settings: Any) -> tuple[Any, Recorder, InterventionPlugin]:
    recorder = Recorder()
    plugin = InterventionPlugin(recorder)
    return naive(cl.networks.mlp(64, [16], 10), plugins=[plugin], **settings), recorder, plugin


def test_moments_come_in_order() -> None:
    strategy, recorder, _ = recording(train_epochs=2)
    scenario = small_benchmark()
    for experience in scenario.train_stream:
        strategy.train(experience)
        strategy.eval(scenario.test_stream)
    later = ["start", "switch", *STEPS, *STEPS]
    assert recorder.moments == ["start", *STEPS, *STEPS, *later, *later]


def test_moments_in_one_call_of_train_with_evaluation_within() -> None:
    strategy, recorder, plugin = recording(eval_every=1)
    strategy.train(small_benchmark().train_stream)
    later = ["start", "switch", *STEPS]
    # Avalanche evaluates once before training: the hooks have to be there by then
    assert recorder.moments == ["start", "start", *STEPS, *later, *later]
    assert plugin.state_dict()["tasks"] == 3


@pytest.mark.parametrize(("boundaries", "switches"), [(True, 2), (False, 0)])
def test_pieces_of_an_online_stream_are_no_switches(boundaries: bool, switches: int) -> None:
    strategy, recorder, _ = recording()
    pieces = split_online_stream(small_benchmark().train_stream, 80, access_task_boundaries=boundaries, seed=0)
    strategy.train(pieces, eval_streams=[])
    assert recorder.moments.count("switch") == switches
    assert recorder.moments.count("step") == 3 * small_stream().steps


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("drift", "switches"), [("gradual", 0), ("abrupt", 2)])
def test_switches_that_a_stream_hides_are_not_announced(drift: str, switches: int, pieces: bool) -> None:
    strategy, recorder, _ = recording()
    turning = cl.tasks.RotatedMNIST("digits", tasks=3, examples=160, batch_size=16, drift=drift)
    stream = turning.as_benchmark().train_stream
    if pieces:  # who splits the stream may not give away what it hides
        stream = split_online_stream(stream, 80, access_task_boundaries=True, seed=0)
    strategy.train(stream, eval_streams=[])
    assert recorder.moments.count("step") == 30
    assert recorder.moments.count("switch") == switches


def test_interventions_act_in_the_given_order() -> None:
    order: list[str] = []

    class Named(Intervention):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def on_step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            order.append(self.name)

    strategy = naive(cl.networks.mlp(64, [16], 10), plugins=[InterventionPlugin(Named("a"), Named("b"))])
    strategy.train(small_benchmark(tasks=1).train_stream)
    assert order == ["a", "b"] * small_stream().steps


def test_normalised_inputs_are_normalised_in_eval_and_only_training_feeds_them() -> None:
    normalization = InputNormalization()
    net = cl.networks.mlp(64, [16], 10)
    strategy = naive(net, plugins=[InterventionPlugin(normalization)], evaluator=evaluator())
    scenario = small_benchmark()
    for number, experience in enumerate(scenario.train_stream, start=1):
        strategy.train(experience)
        results = strategy.eval(scenario.test_stream[number - 1 : number])
        assert normalization.state["count"] == 160 * number
        inputs = small_stream().task(number - 1).inputs
        mean, variance = normalization.state["mean"], normalization.state["variance"]
        normalization.detach()
        with torch.no_grad():
            guesses = net((inputs - mean) / (variance + 1e-4).sqrt()).argmax(-1)
        expected = float((guesses == small_stream().task(number - 1).targets).double().mean())
        assert results["Top1_Acc_Stream/eval_phase/test_stream/Task000"] == pytest.approx(expected)
    seen = torch.cat([small_stream().task(number).inputs for number in range(3)])
    torch.testing.assert_close(normalization.state["mean"], seen.mean(0))
    torch.testing.assert_close(normalization.state["variance"], seen.var(0, correction=0), atol=1e-6, rtol=1e-4)


def test_detached_interventions_no_longer_change_the_network() -> None:
    net = cl.networks.mlp(64, [16], 10)
    plugin = InterventionPlugin(InputNormalization())
    strategy = naive(net, plugins=[plugin])
    strategy.train(small_benchmark(tasks=1).train_stream)
    inputs = small_stream().task(0).inputs
    normalised = net.eval()(inputs)
    plugin.detach()
    assert not torch.allclose(net(inputs), normalised)
    strategy.eval(small_benchmark(tasks=1).test_stream)
    torch.testing.assert_close(net(inputs), normalised)


def test_a_loaded_plugin_goes_on_counting(tmp_path: Any) -> None:
    scenario = small_benchmark()
    strategy, _, plugin = recording()
    strategy.train(scenario.train_stream[0])
    torch.save(plugin.state_dict(), tmp_path / "plugin.pt")
    again, continued, restored = recording()
    restored.load_state_dict(torch.load(tmp_path / "plugin.pt", weights_only=True))
    again.train(scenario.train_stream[1])
    assert continued.moments == ["start", "switch", *STEPS]


def test_a_loaded_plugin_can_be_saved_again_before_it_trains() -> None:
    scenario = small_benchmark()
    plugin = InterventionPlugin(ShrinkAndPerturb(noise=1e-2), InputNormalization())
    naive(cl.networks.mlp(64, [16], 10), plugins=[plugin]).train(scenario.train_stream[0])
    stored = copy.deepcopy(plugin.state_dict())
    copied = InterventionPlugin(ShrinkAndPerturb(noise=1e-2), InputNormalization())
    copied.load_state_dict(plugin.state_dict())
    naive(cl.networks.mlp(64, [16], 10), plugins=[plugin]).train(scenario.train_stream[1])  # no longer theirs
    for before, after in zip(stored["interventions"], copied.state_dict()["interventions"], strict=True):
        assert before["state"].keys() == after["state"].keys()
        for name, value in before["state"].items():
            assert torch.equal(torch.as_tensor(after["state"][name]), torch.as_tensor(value))
        assert all(map(torch.equal, before["generators"], after["generators"]))
    assert len(stored["interventions"][0]["generators"]) == 1


def test_inputs_pass_unchanged_until_there_are_statistics() -> None:
    net = cl.networks.mlp(64, [16], 10)
    scenario = small_benchmark(tasks=1)
    bare = naive(net, evaluator=evaluator()).eval(scenario.test_stream)
    hooked = naive(net, plugins=[InterventionPlugin(InputNormalization())], evaluator=evaluator())
    assert hooked.eval(scenario.test_stream) == bare


def test_the_state_of_other_interventions_is_refused() -> None:
    state = InterventionPlugin(ShrinkAndPerturb(), InputNormalization()).state_dict()
    with pytest.raises(ValueError, match="state: expected the state of 1 interventions, got 2"):
        InterventionPlugin(ShrinkAndPerturb()).load_state_dict(state)


def test_a_list_of_interventions_is_refused() -> None:
    with pytest.raises(TypeError, match="give them one by one"):
        InterventionPlugin([ShrinkAndPerturb()])  # type: ignore[arg-type]


def test_an_optimizer_keeps_the_state_it_was_loaded_with() -> None:
    net = cl.networks.mlp(64, [16], 10)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(7):
        optimizer.step()
    strategy = naive(net, optimizer=optimizer, plugins=[InterventionPlugin()])
    strategy.train(small_benchmark(tasks=1).train_stream)
    assert [float(entry["step"]) for entry in optimizer.state.values()] == [7 + small_stream().steps] * 4
