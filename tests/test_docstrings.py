"""The examples in all docstrings run and print what they say."""

import contextlib
import doctest
import importlib
import io
import pkgutil
from pathlib import Path

import pytest
import torch

import clagrange

SLOW_TO_IMPORT = ("clagrange.callbacks", "clagrange.strategies")  # Lightning and Avalanche


def modules() -> list[str]:
    """Every module of the package but the command itself."""
    found = (module.name for module in pkgutil.walk_packages(clagrange.__path__, "clagrange."))
    return ["clagrange", *(name for name in found if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_examples_of_a_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith(SLOW_TO_IMPORT):
        pytest.importorskip("lightning")
        pytest.importorskip("avalanche")
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    names = {**vars(module), "torch": torch, "nn": torch.nn, "clagrange": clagrange}
    runner, report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), io.StringIO()
    for example in doctest.DocTestFinder().find(module, name, globs=names):
        torch.manual_seed(0)
        with contextlib.redirect_stderr(io.StringIO()):
            runner.run(example, out=report.write)
    assert not runner.failures, report.getvalue()


def test_the_core_has_examples() -> None:
    """What a user calls first shows how."""
    finder = doctest.DocTestFinder()
    for thing in (
        clagrange.gaussianize,
        clagrange.collapse,
        clagrange.inject_variance,
        clagrange.variances,
        clagrange.predict,
        clagrange.optim.EulerLagrange,
        clagrange.replicas.stack,
    ):
        assert any(example.examples for example in finder.find(thing, thing.__name__)), thing
