"""The Hamilton-Jacobi-Bellman form: quadratic loss, constant metric, linear drift, by a Riccati equation."""

import torch
from torch import Tensor

from clagrange._checks import check_nonnegative, check_positive
from clagrange.dynamics.closed_forms import check_finite_action
from clagrange.dynamics.metrics import check_metric


class LinearRule:
    """The optimal feedback for L = ½(θ − θ*)ᵀH(θ − θ*), metric G and drift f = Jθ, at any discount.

    The cost to go V(θ) = ½θᵀPθ − qᵀθ + c solves γV = kL + fᵀ∇V − (η/2)∇VᵀG⁻¹∇V; the rule is the feedback
    θ' = f − ηG⁻¹∇V = −M(θ − θ_∞). P solves a Riccati equation (`scipy.linalg.solve_continuous_are`), which picks
    the stable manifold by itself; the closed forms are its special cases.

    Args:
        hessian: H, (n, n), or its diagonal (n,); positive semi-definite.
        minimum: θ*, (n,).
        metric: G, (n, n) or (n,); None is Euclidean.
        drift: J, (n, n); None is no drift.
        discount: γ ≥ 0.
        lr: η > 0.
        loss_weight: k > 0.

    Attributes:
        decay: M = ηG⁻¹P − J, (n, n); the path is θ_∞ + e^{−Mt}(θ₀ − θ_∞).
        end: θ_∞, (n,); where M is singular, the smallest point at which M rests.

    Raises:
        ValueError: for an infinite action (discount 0 with a drift that does not vanish at the end), a metric
            that is not positive definite, or directions that nothing brings to rest (such as one that the Hessian
            does not hold, at discount 0).

    Example:
        >>> rule = LinearRule(torch.eye(1), torch.zeros(1), discount=1.0)
        >>> round(rule.decay.item(), 6)
        0.618034
    """

    def __init__(
        self,
        hessian: Tensor,
        minimum: Tensor,
        *,
        metric: Tensor | None = None,
        drift: Tensor | None = None,
        discount: float,
        lr: float = 1.0,
        loss_weight: float = 1.0,
    ) -> None:
        from scipy.linalg import solve_continuous_are

        check_nonnegative("discount", discount)
        check_positive("lr", lr)
        check_positive("loss_weight", loss_weight)
        hessian = (torch.diag(hessian) if hessian.dim() == 1 else hessian).double()
        minimum = minimum.double()
        size = len(hessian)
        identity = torch.eye(size, dtype=torch.float64)
        if metric is None:
            metric = identity
        check_metric(metric)
        metric = (torch.diag(metric) if metric.dim() == 1 else metric).double()
        drift = torch.zeros_like(identity) if drift is None else drift.double()
        if hessian.shape != (size, size) or not hessian.shape == metric.shape == drift.shape:
            raise ValueError(
                f"hessian, metric and drift: expected shape (n, n) each, got {tuple(hessian.shape)}, "
                f"{tuple(metric.shape)} and {tuple(drift.shape)}"
            )
        check_finite_action(discount, moving=bool((drift @ minimum).abs().max() > 0))
        try:
            riccati = solve_continuous_are(
                (drift - 0.5 * discount * identity).numpy(),
                identity.numpy(),
                (loss_weight * hessian).numpy(),
                (metric / lr).numpy(),
            )
        except (ValueError, ArithmeticError) as error:
            raise ValueError(
                f"hessian: expected one that holds every direction which the drift does not bring to rest, got "
                f"eigenvalues {torch.linalg.eigvalsh(hessian).tolist()} at discount {discount:g}: the Riccati "
                f"equation has no stabilising solution, so no path of least action comes to rest ({error})"
            ) from error
        self._quadratic = torch.from_numpy(riccati)
        gain = lr * torch.linalg.solve(metric, self._quadratic)
        self.decay = gain - drift
        self._linear = torch.linalg.solve(
            discount * identity - drift.mT + gain.mT, loss_weight * hessian @ minimum
        )
        pull = lr * torch.linalg.solve(metric, self._linear)
        self.end = torch.linalg.pinv(self.decay) @ pull
        if not torch.allclose(self.decay @ self.end, pull, rtol=1e-6, atol=1e-9):
            raise ValueError(
                "drift: expected one with which the path comes to rest, got one along a direction that the loss "
                "does not hold; no point there is at rest"
            )
        running = 0.5 * loss_weight * minimum @ hessian @ minimum - 0.5 * self._linear @ pull
        # without a discount the running cost vanishes (else the action is infinite), and so does V at the end
        at_end = 0.5 * self.end @ self._quadratic @ self.end - self._linear @ self.end
        self._constant = running / discount if discount else -at_end

    def cost(self, position: Tensor) -> Tensor:
        """V(θ), (…,): the least action from here over an unbounded horizon."""
        position = position.double()
        curved = 0.5 * (position @ self._quadratic * position).sum(-1)
        value: Tensor = curved - position @ self._linear + self._constant
        return value

    def velocity(self, position: Tensor) -> Tensor:
        """θ' = −M(θ − θ_∞), (…, n)."""
        value: Tensor = -(position.double() - self.end) @ self.decay.mT
        return value

    def path(self, start: Tensor, times: Tensor) -> Tensor:
        """θ(t) = θ_∞ + e^{−Mt}(θ₀ − θ_∞), (m, n)."""
        flow = torch.linalg.matrix_exp(-times.double().reshape(-1, 1, 1) * self.decay)
        value: Tensor = self.end + flow @ (start.double() - self.end)
        return value
