"""A feed-forward network as a chain of layers, each one map with parameters and what follows it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from clagrange.replicas import POINTWISE


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer with the layers without parameters that follow it: x^l = f_l(x^(l−1))."""

    modules: tuple[nn.Module, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it without hooks, because states on the way to rest are no activations to be monitored."""
        for module in self.modules:
            x = module.forward(x)
        return x


def layers_of(network: nn.Module) -> tuple[Layer, ...]:
    """The network as a chain of layers that begin with a Linear or Conv2d; what comes before joins the first."""
    groups: list[list[nn.Module]] = [[]]
    depth = 0
    for name, module in _flat(network, ""):
        if type(module) in (nn.Linear, nn.Conv2d):
            if depth:
                groups.append([])
            depth += 1
        elif type(module) not in (*POINTWISE, nn.Flatten):
            known = ", ".join(kind.__name__ for kind in (nn.Linear, nn.Conv2d, *POINTWISE, nn.Flatten))
            raise ValueError(
                f"network: layer {name or '(root)'!r} of type {type(module).__name__} has no place "
                f"in a least-action network; expected {known} in nn.Sequential "
                f"(Gaussian layers: clagrange.collapse first)"
            )
        elif not depth and getattr(module, "inplace", False):
            raise ValueError(f"network: layer {name!r} would overwrite the inputs; expected inplace=False there")
        groups[-1].append(module)
    if not depth:
        raise ValueError("network: expected at least one Linear or Conv2d layer, got none")
    return tuple(Layer(tuple(group)) for group in groups)


def _flat(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for key, child in module._modules.items():  # named_children leaves out a layer's second place
            assert child is not None
            yield from _flat(child, f"{name}.{key}" if name else key)
    else:
        yield name, module
