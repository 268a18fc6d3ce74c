"""Lightning callbacks and the Lightning data module of a task stream."""

from clagrange.callbacks.datamodule import StreamDataModule
from clagrange.callbacks.inertia_monitor import InertiaMonitor
from clagrange.callbacks.intervention import InterventionCallback, VarianceInjection
from clagrange.callbacks.plasticity_monitor import PlasticityMonitor

__all__ = ["InertiaMonitor", "InterventionCallback", "PlasticityMonitor", "StreamDataModule", "VarianceInjection"]
