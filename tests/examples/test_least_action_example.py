"""The worked example of least-action backpropagation: its numbers and its picture."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "least_action.py"


def test_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = runpy.run_path(str(EXAMPLE))["main"](["--out", str(tmp_path / "picture.png")])
    assert numbers["error of the gradient after 2L - 1 steps"] > 0.01
    assert numbers["error after 2L steps"] < 1e-12
    assert numbers["error of the continuous flow at time 50"] < 1e-9
    assert numbers["last loss with least action"] == pytest.approx(numbers["last loss with autograd"], abs=1e-9)
    assert numbers["last loss with autograd"] < 1.2
    assert numbers["largest difference of the weights"] < 1e-9
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    assert "picture:" in capsys.readouterr().out
