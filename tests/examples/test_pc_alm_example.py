"""The worked example of PC-ALM: its numbers and its picture."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "pc_alm.py"


def test_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = runpy.run_path(str(EXAMPLE))["main"](["--out", str(tmp_path / "picture.png")])
    assert numbers["cosine at depth 32, PC-ALM (α = 1)"] > 0.9
    assert numbers["cosine at depth 32, predictive coding (α = 0)"] < 0.8
    assert numbers["cosine at the end, linear, ρ = 1"] > 1 - 1e-6
    assert numbers["cosine at the end, tanh, ρ = 1"] < 0.8
    assert numbers["cosine at the end, tanh, ρ = 16"] > 0.999
    assert numbers["gradient / true at 0.99 of the bound"] < 2
    assert numbers["gradient / true at 1.01 of the bound"] > 100
    assert numbers["accuracy, PC-ALM"] > 55
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    told = capsys.readouterr().out
    assert "take a larger rho" in told
    assert "picture:" in told
