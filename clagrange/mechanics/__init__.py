"""The mechanics of learning: energy of a training run, least time, least-action backpropagation."""

from clagrange.mechanics.control import Control, QuadraticValue, bellman_quadratic, costates
from clagrange.mechanics.energy import (
    damped_energy,
    damping_change,
    kinetic_energy,
    langevin_energy,
    midstep_potential,
    momentum_change,
    noise_change,
    work_change,
)
from clagrange.mechanics.inertia import InertiaMeter
from clagrange.mechanics.integrators import (
    Trajectory,
    damped,
    damped_verlet,
    forest_ruth,
    integrate,
    langevin,
    velocity_verlet,
)
from clagrange.mechanics.laws import adam_metric
from clagrange.mechanics.least_action import (
    LeastAction,
    Phase,
    least_action,
    least_action_gradients,
    steps_to_rest,
)
from clagrange.mechanics.least_time import (
    LearningSpeed,
    TimeToThreshold,
    fermat_time,
    learning_speed,
    samples_to_threshold,
    seconds_to_threshold,
)
from clagrange.mechanics.pc_alm import (
    NotSettledWarning,
    PCALMResult,
    assign_gradients,
    constraint_curvature,
    half_squared_error,
    largest_stable_step,
    pc_alm_gradients,
)
from clagrange.mechanics.planning import (
    greedy_inputs,
    linear_error,
    plan,
    planned_error,
    planned_inputs,
    planned_samples,
)
from clagrange.mechanics.readings import Reading, RunningScore
from clagrange.mechanics.relaxation_errors import RelaxationErrors, relaxation_errors
from clagrange.mechanics.residual_network import residual_network
from clagrange.mechanics.sampler import PlannedSampler, last_layer_features

__all__ = [
    "Control",
    "InertiaMeter",
    "LearningSpeed",
    "LeastAction",
    "NotSettledWarning",
    "PCALMResult",
    "Phase",
    "PlannedSampler",
    "QuadraticValue",
    "Reading",
    "RelaxationErrors",
    "RunningScore",
    "TimeToThreshold",
    "Trajectory",
    "adam_metric",
    "assign_gradients",
    "bellman_quadratic",
    "constraint_curvature",
    "costates",
    "damped",
    "damped_energy",
    "damped_verlet",
    "damping_change",
    "fermat_time",
    "forest_ruth",
    "greedy_inputs",
    "half_squared_error",
    "integrate",
    "kinetic_energy",
    "langevin",
    "langevin_energy",
    "largest_stable_step",
    "last_layer_features",
    "learning_speed",
    "least_action",
    "least_action_gradients",
    "linear_error",
    "midstep_potential",
    "momentum_change",
    "noise_change",
    "pc_alm_gradients",
    "plan",
    "planned_error",
    "planned_inputs",
    "planned_samples",
    "relaxation_errors",
    "residual_network",
    "samples_to_threshold",
    "seconds_to_threshold",
    "steps_to_rest",
    "velocity_verlet",
    "work_change",
]
