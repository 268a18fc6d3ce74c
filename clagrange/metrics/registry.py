"""The names under which everything is measured and logged, in one place."""

from dataclasses import asdict, dataclass
from typing import Any

CHEAP = "cheap"
EVERY_BATCH = "every batch"
SCHEDULED = "scheduled"


@dataclass(frozen=True)
class Quantity:
    """Something that is measured.

    Attributes:
        summary: what it is.
        unit: of its values.
        kind: "stream" for what is counted batch by batch, "moment" for what `measure` reads off a network,
            "tasks" for what needs all tasks.
        cost: "cheap" for what can be measured every hundred steps without being felt, "every batch" for what
            takes further passes of every batch, "scheduled" for what takes many passes and needs a schedule. The
            last two are measured only where they are named.
        needs: what has to be given, beside the network.
    """

    summary: str
    unit: str
    kind: str
    cost: str = CHEAP
    needs: tuple[str, ...] = ()


_INPUTS = ("inputs",)
_EXAMPLES = ("inputs", "targets")
_CURVE = ("online accuracy",)
_MATRIX = ("accuracy matrix",)

METRICS: dict[str, Quantity] = {
    # counted batch by batch, each before the step on it
    "online_accuracy": Quantity("accuracy on each batch before the step on it, over the task", "1", "stream"),
    "loss": Quantity("cross-entropy on each batch before the step on it, over the task", "nats", "stream"),
    "calibration_error": Quantity(
        "Σ_b (n_b/n)·|accuracy_b − confidence_b| over 15 bins of the confidence, of the same predictions",
        "1",
        "stream",
    ),
    "brier_score": Quantity("mean of Σ_c (p_c − [c = target])² of the same predictions", "1", "stream"),
    "sample_plasticity": Quantity(
        "mean of max(1 − loss after the step / loss before it, 0) on the same examples",
        "1",
        "stream",
        EVERY_BATCH,
    ),
    # read off a network at a moment
    "task_accuracy": Quantity("accuracy on examples of the current task", "1", "moment", needs=_EXAMPLES),
    "dead_units": Quantity(
        "fraction of hidden units that are 0 on all examples, mean over layers", "1", "moment", needs=_INPUTS
    ),
    "dormant_units": Quantity(
        "fraction of hidden units of at most .025 of their layer's mean activity (ReDo), mean over layers",
        "1",
        "moment",
        needs=_INPUTS,
    ),
    "rarely_active_units": Quantity(
        "fraction of hidden units that differ from 0 on less than .01 of the examples, mean over layers",
        "1",
        "moment",
        needs=_INPUTS,
    ),
    "effective_rank": Quantity(
        "exp(entropy of the normalised singular values) of the last hidden layer's features",
        "directions",
        "moment",
        needs=_INPUTS,
    ),
    "approximate_rank": Quantity(
        "how many singular values of the same features give 99 % of the sum of squares",
        "directions",
        "moment",
        needs=_INPUTS,
    ),
    "stable_rank": Quantity(
        "how many singular values of the same features give 99 % of the sum",
        "directions",
        "moment",
        needs=_INPUTS,
    ),
    "textbook_stable_rank": Quantity(
        "squared Frobenius norm of the same features over their squared spectral norm",
        "directions",
        "moment",
        needs=_INPUTS,
    ),
    "weight_magnitude": Quantity("mean |w|", "weight", "moment"),
    "weight_norm": Quantity("Euclidean norm of all weights", "weight", "moment"),
    "distance_from_initialization": Quantity(
        "Euclidean distance of all weights from where they began", "weight", "moment", needs=("initial",)
    ),
    "gradient_norm": Quantity(
        "Euclidean norm of the gradient of the mean loss of the examples",
        "loss/weight",
        "moment",
        needs=_EXAMPLES,
    ),
    "sharpness": Quantity(
        "largest eigenvalue of the Hessian of the mean loss of the examples",
        "loss/weight²",
        "moment",
        SCHEDULED,
        _EXAMPLES,
    ),
    "mean_variance": Quantity("mean variance of the Gaussian weights", "prior variance", "moment"),
    "variance_by_layer": Quantity(
        "mean variance of the Gaussian weights of each layer, as variance_by_layer/LAYER",
        "prior variance",
        "moment",
    ),
    "determined_parameters": Quantity("effective number of weights that the data determine", "weights", "moment"),
    # of all tasks together
    "plasticity_slope": Quantity(
        "slope of the online accuracy over the tasks, with its interval", "1/task", "tasks", needs=_CURVE
    ),
    "samples_to_threshold": Quantity(
        "samples until a threshold is first reached", "samples", "tasks", needs=_CURVE
    ),
    "seconds_to_threshold": Quantity("time until a threshold is first reached", "s", "tasks", needs=_CURVE),
    "area_under_curve": Quantity("mean height of the learning curve", "1", "tasks", needs=_CURVE),
    "average_accuracy": Quantity("accuracy on all tasks after the last", "1", "tasks", needs=_MATRIX),
    "forgetting": Quantity("accuracy lost since the best, mean over tasks", "1", "tasks", needs=_MATRIX),
    "backward_transfer": Quantity(
        "accuracy after the last task less that after the task itself, mean over tasks",
        "1",
        "tasks",
        needs=_MATRIX,
    ),
    "forward_transfer": Quantity(
        "accuracy before training on a task less that of an untrained network, mean over tasks",
        "1",
        "tasks",
        needs=(*_MATRIX, "untrained accuracy"),
    ),
}
"""Everything that is measured, by the name under which it is logged."""


def names_of(kind: str, *costs: str) -> tuple[str, ...]:
    """The names of one kind and of these costs, or of all."""
    return tuple(
        name
        for name, quantity in METRICS.items()
        if quantity.kind == kind and (not costs or quantity.cost in costs)
    )


def listing() -> list[dict[str, Any]]:
    """All entries as plain data, for ``clagrange list metrics``.

    Example:
        >>> listing()[0]["name"]
        'online_accuracy'
    """
    return [{"name": name, **asdict(quantity)} for name, quantity in METRICS.items()]
