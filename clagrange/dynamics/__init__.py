"""The learning Lagrangian, its paths and closed forms, and one-step rules as pure functions of tensors."""

from clagrange.dynamics.beliefs import Belief, observe_gaussian, observe_moments, updated_belief
from clagrange.dynamics.boundary_value import settling_trajectory
from clagrange.dynamics.closed_forms import (
    decay_matrix,
    decay_rate,
    decaying_path,
    discrete_gain,
    geometric_mean,
    optimal_step,
    rotating_path,
)
from clagrange.dynamics.gaussian_weights import gaussian_weights
from clagrange.dynamics.lagrangian import LearningLagrangian, euler_lagrange_residual
from clagrange.dynamics.linear_rule import LinearRule
from clagrange.dynamics.metrics import GaussianFisher
from clagrange.dynamics.rules import (
    ballistic_step,
    flat_direction_growth,
    log_variance_flow,
    log_variance_step,
    mean_displacement,
    ornstein_uhlenbeck,
    relaxation_fraction,
    relaxed_precision,
    second_order_manifold,
    stable_root,
    zero_discount_flow,
)
from clagrange.dynamics.trajectories import Trajectory, minimize_action

__all__ = [
    "Belief",
    "GaussianFisher",
    "LearningLagrangian",
    "LinearRule",
    "Trajectory",
    "ballistic_step",
    "decay_matrix",
    "decay_rate",
    "decaying_path",
    "discrete_gain",
    "euler_lagrange_residual",
    "flat_direction_growth",
    "gaussian_weights",
    "geometric_mean",
    "log_variance_flow",
    "log_variance_step",
    "mean_displacement",
    "minimize_action",
    "observe_gaussian",
    "observe_moments",
    "optimal_step",
    "ornstein_uhlenbeck",
    "relaxation_fraction",
    "relaxed_precision",
    "rotating_path",
    "second_order_manifold",
    "settling_trajectory",
    "stable_root",
    "updated_belief",
    "zero_discount_flow",
]
