"""Steps under a metric: the natural gradient, and the geometric mean of metric and curvature."""

from typing import Any

from torch import Tensor

from clagrange._checks import Number
from clagrange.optim.base import numbers
from clagrange.optim.kronecker import eigh, kronecker_solve, raised_diagonal
from clagrange.optim.metric import FisherOptimizer


class NaturalGradient(FisherOptimizer):
    """θ ← θ − lr·(G + d)⁻¹g with G the Fisher matrix: the optimal rule under a metric, at large discount.

    For an agent that pays θ'ᵀGθ'/(2η) for its speed the overdamped limit of the optimal step is
    −(ηkΔt/γ)·G⁻¹g, so lr = ηkΔt/γ.

    ``structure="diagonal"`` averages n·g². ``structure="kronecker"`` needs the network and gives the weight of
    every linear layer G = E[δδᵀ] ⊗ E[xxᵀ] of its inputs x and per-example output gradients δ (the loss being the
    mean over examples), seen through hooks and solved exactly with its damping in the joint eigenbasis (two
    eigendecompositions a layer and step: for small layers); the bias takes the diagonal of E[δδᵀ], all other
    parameters n·g². Averages are divided by the weight of what they have seen. Where the gradient was multiplied
    with a number before the step (unscaled from mixed precision, or clipped) δ is multiplied with it too, as n·g²
    has it. Under torch.distributed the factors are means over the processes, as DistributedDataParallel's
    gradients are.

    Limits: d → ∞: SGD with learning rate lr/d. lr = 1 and G the Hessian (`set_metric`, or a likelihood at its
    optimum) with d → 0: Newton's step. `GeometricMean` with one belief for metric and curvature.

    Args:
        params: parameters or groups of them, or the network; may have a leading replica dimension.
        lr: ηkΔt/γ ≥ 0, in units of θ² × curvature: the fraction of a natural step.
        metric_decay: β of the averages, in [0, 1], with "kronecker" below 1. At 1 the metric is held where it was
            set.
        damping: d > 0, in units of the curvature.
        structure: "diagonal" or "kronecker".
        examples: n > 0: the batch size makes n·g² the curvature of the mean loss per example.
        maximize: ascend instead of descend.

    Every number may be a tensor of shape (R,).

    Raises:
        TypeError: if "kronecker" is given parameters without their network.
        ValueError: if a number is out of range, or "kronecker" finds no linear layer.
        RuntimeError: in ``step``, if ``metric_decay`` is 1 and no metric was set, or a linear layer saw no
            example.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 8-10; Amari (1998); Martens and Grosse (2015) for the factors.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> optimizer = NaturalGradient(net, lr=0.1, structure="kronecker")
        >>> nn.functional.cross_entropy(net(torch.ones(4, 3)), torch.tensor([0, 1, 0, 0])).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        metric_decay: Number = 0.99,
        damping: Number = 1e-3,
        *,
        structure: str = "diagonal",
        examples: Number = 1,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "metric_decay": metric_decay,
            "damping": damping,
            "examples": examples,
            "maximize": maximize,
        }
        super().__init__(params, defaults, structure)

    def set_metric(self, parameter: Tensor, metric: Tensor | float) -> None:
        """Say what the diagonal metric of a parameter is; with ``metric_decay=1`` it stays so.

        Raises:
            ValueError: if it is negative or not finite: motion would then cost less than nothing.
        """
        self._set("metric", parameter, metric)

    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        lr, damping = numbers(group, gradient, "lr", "damping")
        observed = self._observed(parameter, gradient, group)
        return -lr * _solve(self._averaged("metric", parameter, observed, state, group), gradient, damping)


class GeometricMean(FisherOptimizer):
    """θ ← θ − lr·(G#H + d)⁻¹g, G#H the geometric mean of metric and curvature: the ballistic rule under a metric.

    Where γ² ≪ 4ηk·eig(G⁻¹H) an optimal step is −√(ηk)Δt·(G⁻¹H)^{1/2}H⁻¹g = −√(ηk)Δt·(G#H)⁻¹g with
    G#H = G^{1/2}(G^{−1/2}HG^{−1/2})^{1/2}G^{1/2}, so lr = √(ηk)·Δt. Diagonal: 1/√(G_iH_i). Kronecker:
    (B₁⊗A₁)#(B₂⊗A₂) = (B₁#B₂)⊗(A₁#A₂).

    Metric and curvature are beliefs over the Fisher matrix with memories of their own, as in `NaturalGradient`:
    what it costs to move is what the network has been (a long memory), what the loss is like is what it is now.

    Limits: ``metric_decay=None`` is the Euclidean metric: H^{−1/2}g, the ballistic rule, with "kronecker" for
    whole layers. Equal memories: G = H = F, the natural gradient F⁻¹g. d → ∞: SGD with learning rate lr/d.

    Args:
        params: parameters or groups of them, or the network; may have a leading replica dimension.
        lr: √(ηk)·Δt ≥ 0.
        metric_decay: β of the metric's averages, in [0, 1], with "kronecker" below 1; None for the Euclidean
            metric. At 1 the metric is held where `set_metric` put it.
        curvature_decay: β of the curvature's averages, likewise with `set_curvature`.
        damping: d > 0, in units of G#H (of the root of the curvature for the Euclidean metric).
        structure: "diagonal" or "kronecker".
        examples: n > 0: the batch size makes n·g² the curvature of the mean loss per example.
        maximize: ascend instead of descend.

    Every number may be a tensor of shape (R,).

    Raises:
        TypeError: if "kronecker" is given parameters without their network.
        ValueError: if a number is out of range, or "kronecker" finds no linear layer.
        RuntimeError: in ``step``, if a decay is 1 and nothing was set, or a linear layer saw no example.

    Source: Vastola, Gershman, Rajan (2025), Eq. 10.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = GeometricMean([weight], lr=1.0, metric_decay=1.0, curvature_decay=1.0, damping=1e-9)
        >>> optimizer.set_metric(weight, 2.0)
        >>> optimizer.set_curvature(weight, 8.0)
        >>> weight.grad = torch.tensor([1.0])
        >>> optimizer.step(); weight.data  # 1/√(2·8)
        tensor([0.7500])
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        metric_decay: Number | None = None,
        curvature_decay: Number = 0.99,
        damping: Number = 1e-4,
        *,
        structure: str = "diagonal",
        examples: Number = 1,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "metric_decay": metric_decay,
            "curvature_decay": curvature_decay,
            "damping": damping,
            "examples": examples,
            "maximize": maximize,
        }
        super().__init__(params, defaults, structure)

    def set_metric(self, parameter: Tensor, metric: Tensor | float) -> None:
        """Say what the diagonal metric of a parameter is; with ``metric_decay=1`` it stays so.

        Raises:
            ValueError: if it is negative or not finite: motion would then cost less than nothing.
        """
        self._set("metric", parameter, metric)

    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        lr, damping = numbers(group, gradient, "lr", "damping")
        observed = self._observed(parameter, gradient, group)
        curvature = self._averaged("curvature", parameter, observed, state, group)
        if group["metric_decay"] is None:
            return -lr * _solve(curvature, gradient, damping, power=0.5)
        metric = self._averaged("metric", parameter, observed, state, group)
        if len(metric) == 1:
            mean: tuple[Tensor, ...] = ((metric[0] * curvature[0]).sqrt(),)
        else:
            mean = tuple(
                geometric_mean(raised_diagonal(g), raised_diagonal(h))
                for g, h in zip(metric, curvature, strict=True)
            )
        return -lr * _solve(mean, gradient, damping)


def geometric_mean(metric: Tensor, curvature: Tensor) -> Tensor:
    """G#H = G^{1/2}(G^{−1/2}HG^{−1/2})^{1/2}G^{1/2}: the one positive definite X with XG⁻¹X = H.

    Args:
        metric: G (…, n, n), symmetric and positive definite.
        curvature: H, likewise, or positive semi-definite.

    Raises:
        ValueError: if G is not positive definite: motion in some direction would cost nothing, and the step there
            would be without bound.

    Example:
        >>> geometric_mean(torch.eye(2) * 2.0, torch.diag(torch.tensor([8.0, 2.0])))
        tensor([[4.0000, 0.0000],
                [0.0000, 2.0000]])
    """
    values, vectors = eigh(metric)
    if bool((values <= 0).any()):
        raise ValueError(
            f"metric: expected a positive definite matrix, got eigenvalues down to "
            f"{float(values[values <= 0].min()):g}; "
            f"motion in such a direction would cost nothing and no finite step is optimal"
        )
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    inner, basis = eigh(inverse @ curvature @ inverse)
    middle: Tensor = (basis * inner.clamp(min=0).sqrt().unsqueeze(-2)) @ basis.mT
    mean: Tensor = root @ middle @ root
    return mean


def _solve(belief: tuple[Tensor, ...], gradient: Tensor, damping: Number, power: float = 1.0) -> Tensor:
    """(F^power + d)⁻¹g for a diagonal or for two Kronecker factors."""
    if len(belief) == 2:
        return kronecker_solve((belief[0], belief[1]), gradient, damping, power)
    solution: Tensor = gradient / (belief[0] ** power + damping)
    return solution
