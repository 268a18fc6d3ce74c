"""The worked example of conserved inertia: its numbers and its picture."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "conserved_inertia.py"


def test_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = runpy.run_path(str(EXAMPLE))["main"](["--out", str(tmp_path / "picture.png")])
    assert [numbers[f"drift Verlet, h = {step}"] for step in (0.1, 0.05, 0.025)] == pytest.approx(
        [5.7e-3, 1.4e-3, 3.5e-4], rel=0.02
    )
    assert numbers["drift Forest-Ruth, h = 0.1"] < 1e-4
    assert numbers["largest change of the energy, m = 1"] < 1e-12
    assert numbers["largest difference, measured and predicted"] < 1e-12
    assert abs(numbers["stationary energy, Langevin"] - 0.18) < 3 * numbers["its standard error"]
    jumps = [value for name, value in numbers.items() if name.startswith("surprise at the switch")]
    assert len(jumps) == 2
    assert min(jumps) > 3 * numbers["largest other surprise"]
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    assert "picture:" in capsys.readouterr().out
