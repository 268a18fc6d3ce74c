"""The Avalanche plugin that logs the energy of a training run."""

from typing import Any

from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metric_results import MetricValue

from clagrange._checks import check_number
from clagrange.mechanics import InertiaMeter


class InertiaPlugin(SupervisedPlugin):  # type: ignore[misc]
    """Hand kinetic and potential energy, their predicted and actual change, and the defect to the evaluator.

    A `clagrange.mechanics.InertiaMeter` follows the strategy's optimizer. Under ``prefix`` the strategy's loggers
    get the names that `InertiaMeter.collect` gives (``energy``, ``predicted``, ``change``, ``defect``,
    ``surprise`` …), every so many training iterations and at the end of each call of ``train``, plotted over the
    number of the optimizer's step; they are in ``strategy.evaluator.get_all_metrics()`` too. Training is left as
    it is. To resume, load the ``state_dict`` of the plugin before the first ``train``.

    Args:
        every_n_steps: optimizer steps from one entry to the next.
        meter: the meter to use; default one of unit mass.
        prefix: of the names.

    Raises:
        ValueError: if ``every_n_steps`` is below 1.

    Example:
        >>> from avalanche.training import Naive
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        >>> strategy = Naive(model=net, optimizer=optimizer, plugins=[InertiaPlugin()], train_mb_size=16)
    """

    def __init__(
        self, every_n_steps: int = 10, meter: InertiaMeter | None = None, prefix: str = "inertia/"
    ) -> None:
        super().__init__()
        check_number("every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps
        self.meter = InertiaMeter() if meter is None else meter
        self.prefix = prefix

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Follow the strategy's optimizer."""
        if self.meter.optimizer is not strategy.optimizer:
            self.meter.attach(strategy.optimizer)

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand on the loss, with what other plugins added to it, whose gradients the step will use."""
        self.meter.observe(strategy.loss)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand the numbers on where it is time."""
        if self.meter.steps % self.every_n_steps == 0:
            self._publish(strategy)

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Hand on the last numbers."""
        if self.meter.steps % self.every_n_steps:
            self._publish(strategy)

    def detach(self) -> None:
        """Leave the optimizer alone; the next ``train`` follows it again, as a new run."""
        self.meter.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that the next reading needs; loads with ``weights_only=True``."""
        return self.meter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.meter.load_state_dict(state)

    def _publish(self, strategy: Any) -> None:
        for name, value in self.meter.collect().items():
            metric = MetricValue(self, self.prefix + name, value, self.meter.steps)
            strategy.evaluator.publish_metric_value(metric)
