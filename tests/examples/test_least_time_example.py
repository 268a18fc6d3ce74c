"""The worked example of least time: its numbers and its picture."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "least_time.py"


def test_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = runpy.run_path(str(EXAMPLE))["main"](["--out", str(tmp_path / "picture.png")])
    assert numbers["regression, planned: samples to 1.5"] == 20.0
    assert numbers["regression, greedy: samples to 1.5"] < 22.0
    assert numbers["regression, random: samples to 1.5"] > 27.0
    for name in ("greedy", "blocks of 10"):
        assert numbers[f"digits, {name}: 95 % interval"][1] < numbers["digits, random: 95 % interval"][0]
        assert numbers[f"digits, saved by {name}, seed by seed"][1] > 5.0
        fermat = [numbers[f"digits, {which}: Fermat's time to 0.35"] for which in (name, "random")]
        assert fermat[0] < fermat[1]
    assert numbers["largest difference, costate and slope of V"] < 1e-12
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    assert "picture:" in capsys.readouterr().out
