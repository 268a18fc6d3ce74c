"""The methods that a study compares: a network's preparation, its optimizer and its interventions.

Constructor arguments are the settings that a study file gives. Every number may also be a tensor of shape
(R,), one setting for each replica of a stacked network; that is how a search tries many settings at once.
"""

from clagrange.study.methods.base import BasedMethod, Method, snake_case
from clagrange.study.methods.gaussian import (
    EulerLagrange,
    EulerLagrangeInjection,
    EulerLagrangeKronecker,
    EulerLagrangeKroneckerInjection,
)
from clagrange.study.methods.optimizers import BGD, IVON, MESU, SOAP, UPGD, Muon
from clagrange.study.methods.plain import (
    SGD,
    Adam,
    AdamInputNormalization,
    AdamL2,
    Crelu,
    FreshNetwork,
    LayerNorm,
)
from clagrange.study.methods.resets import (
    ContinualBackprop,
    GradedContinualBackprop,
    HeadReset,
    LastLayerReset,
    Redo,
    SelfNormalizedResets,
)
from clagrange.study.methods.weights import (
    HareAndTortoise,
    L2Init,
    NormalizeAndProject,
    RegenerativeL1,
    ShrinkAndPerturb,
    SoftReset,
    SpectralRegularization,
)

__all__ = [
    "BGD",
    "IVON",
    "MESU",
    "METHODS",
    "SGD",
    "SOAP",
    "UPGD",
    "Adam",
    "AdamInputNormalization",
    "AdamL2",
    "BasedMethod",
    "ContinualBackprop",
    "Crelu",
    "EulerLagrange",
    "EulerLagrangeInjection",
    "EulerLagrangeKronecker",
    "EulerLagrangeKroneckerInjection",
    "FreshNetwork",
    "GradedContinualBackprop",
    "HareAndTortoise",
    "HeadReset",
    "L2Init",
    "LastLayerReset",
    "LayerNorm",
    "Method",
    "Muon",
    "NormalizeAndProject",
    "Redo",
    "RegenerativeL1",
    "SelfNormalizedResets",
    "ShrinkAndPerturb",
    "SoftReset",
    "SpectralRegularization",
    "snake_case",
]

METHODS: dict[str, type[Method]] = {
    snake_case(method.__name__): method
    for method in (
        SGD,
        Adam,
        AdamL2,
        Muon,
        SOAP,
        AdamInputNormalization,
        ShrinkAndPerturb,
        L2Init,
        RegenerativeL1,
        HareAndTortoise,
        SpectralRegularization,
        NormalizeAndProject,
        SoftReset,
        LayerNorm,
        Crelu,
        ContinualBackprop,
        GradedContinualBackprop,
        Redo,
        SelfNormalizedResets,
        HeadReset,
        LastLayerReset,
        UPGD,
        FreshNetwork,
        IVON,
        MESU,
        BGD,
        EulerLagrange,
        EulerLagrangeInjection,
        EulerLagrangeKronecker,
        EulerLagrangeKroneckerInjection,
    )
}
"""The methods that a study file can name."""
