"""The Avalanche plugin that carries interventions."""

from typing import Any

from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin

from clagrange.interventions import Intervention


class InterventionPlugin(SupervisedPlugin):  # type: ignore[misc]
    """Let interventions act in any Avalanche strategy.

    ``on_start`` comes when Avalanche has adapted model and optimizer to an experience, ``on_switch`` right after
    it for every experience but the first that was ever trained (also over several calls of ``train``),
    ``on_gradient`` before and ``on_step`` after the optimizer's step. The pieces of an online stream
    (`avalanche.benchmarks.OnlineCLExperience`) are switches where a new task begins and the stream grants access
    to the boundaries; where it does not, nobody announces a switch, and neither where an experience says
    ``hidden_switches``, as those of a task stream do whose change is gradual. An intervention with a detector
    acts at the switches that this notices, whatever is announced.

    Hooks stay in the network, so that normalised inputs are normalised in ``eval`` too and in a call of the
    network after training; what they gather, they gather in training mode only. `detach` takes them out.

    A plugin also keeps Avalanche from emptying the optimizer's state at the first ``train``, so that a loaded
    one is gone on with. To resume, load the ``state_dict`` of model, optimizer and plugin, in any order, before
    the first ``train``; all three load with ``weights_only=True``. Avalanche's own ``save_checkpoint`` cannot
    pickle today's optimizers.

    Args:
        interventions: in the order in which they act.

    Raises:
        TypeError: if one is not an intervention.

    Example:
        >>> from avalanche.training import Naive
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> plugin = InterventionPlugin(clagrange.interventions.ShrinkAndPerturb())
        >>> strategy = Naive(model=net, optimizer=optimizer, plugins=[plugin], train_mb_size=16)
    """

    def __init__(self, *interventions: Intervention) -> None:
        super().__init__()
        for intervention in interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(
                    f"interventions: expected instances of clagrange.interventions.Intervention, "
                    f"got {intervention!r}; give them one by one, InterventionPlugin(first, second)"
                )
        self.interventions = interventions
        self._tasks = 0
        self._network: Any = None

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the optimizer's state: what Avalanche believes to have registered already, it does not wipe."""
        if strategy.optimized_param_id is None and strategy.optimizer.state:
            strategy.optimized_param_id = dict(strategy.model.named_parameters())

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start, and announce the switch."""
        self._start(strategy)
        if _begins_task(strategy.experience):
            if self._tasks:
                for intervention in self.interventions:
                    intervention.switch_announced(strategy.model, strategy.optimizer)
            self._tasks += 1

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand on the loss."""
        for intervention in self.interventions:
            intervention.loss_known(strategy.model, strategy.loss)

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand on the gradients."""
        for intervention in self.interventions:
            intervention.gradient_known(strategy.model, strategy.optimizer)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand on the step."""
        for intervention in self.interventions:
            intervention.step_taken(strategy.model, strategy.optimizer)

    def before_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start where evaluation comes before training, as in a run that was loaded."""
        if strategy.model is not self._network:
            self._start(strategy)

    def detach(self) -> None:
        """Remove all hooks from the network; the next ``train`` or ``eval`` makes them again."""
        for intervention in self.interventions:
            intervention.detach()
        self._network = None

    def state_dict(self) -> dict[str, Any]:
        """The number of tasks begun and the state of every intervention."""
        return {
            "tasks": self._tasks,
            "interventions": [intervention.state_dict() for intervention in self.interventions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: if it is of another number of interventions.
        """
        stored = state["interventions"]
        if len(stored) != len(self.interventions):
            raise ValueError(
                f"state: expected the state of {len(self.interventions)} interventions, got {len(stored)}; "
                f"make the plugin with the interventions that it was saved with"
            )
        for intervention, entry in zip(self.interventions, stored, strict=True):
            intervention.load_state_dict(entry)
        self._tasks = state["tasks"]

    def _start(self, strategy: Any) -> None:
        for intervention in self.interventions:
            intervention.on_start(strategy.model, strategy.optimizer)
        self._network = strategy.model


def _begins_task(experience: Any) -> bool:
    """Whether training is told that another task begins with this experience."""
    if isinstance(experience, OnlineCLExperience):
        if not (experience.access_task_boundaries and experience.is_first_subexp):
            return False
        experience = experience.origin_experience
    return not getattr(experience, "hidden_switches", False)
