"""`clagrange verify`: it passes here, it finds what is broken, and it says so to people and programs."""

import json
import math

import pytest
import torch
from rich.console import Console

from clagrange.cli import main
from clagrange.verify import CHECKS, Check, closed_forms, conservation, report, runner, sampling, verify

PARTS = {
    "Euler-Lagrange dynamics",
    "Linear regression",
    "Energy",
    "Exact gradients",
    "Least time",
    "Samplers (in standard errors)",
    "Networks",
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_checks_pass(dtype: str) -> None:
    state = torch.get_rng_state()
    checks = verify(dtype=dtype)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == len(CHECKS) >= 21
    assert {check.part for check in checks} == PARTS
    assert torch.equal(torch.get_rng_state(), state)  # torch's global stream is left as it was
    tight = [check.tolerance for check in checks if check.tolerance < 1e-3]
    assert len(tight) >= 12
    if dtype == "float64":
        assert sum(tolerance <= 1e-11 for tolerance in tight) >= 9


def broken_root(rate, discount=math.inf):
    """The growing root in place of the decaying one."""
    return discount / 2 + (discount * discount / 4 + discount * rate) ** 0.5


@pytest.mark.parametrize(
    ("name", "replacement", "failing"),
    [
        ("stable_root", broken_root, {"stable root at γ = 1 and γ = 10", "its least discounted action: λ/2η"}),
        ("relaxation_fraction", lambda lr, discount=math.inf: lr, {"precision flow at γ = ∞ and γ = 0.1"}),
        (
            "ornstein_uhlenbeck",
            lambda mean, prior, deviation, retained, strength, noise: 0.99 * mean,
            {"Ornstein-Uhlenbeck: keeps the prior"},
        ),
        ("velocity_verlet", lambda x, v, g, h: (x + h * v, v - h * g(x)), {"velocity Verlet: drift of ½v² + L"}),
    ],
)
def test_what_is_broken_fails(name: str, replacement, failing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (closed_forms, conservation, sampling):
        if hasattr(part, name):
            monkeypatch.setattr(part, name, replacement)
    monkeypatch.setattr(runner, "CHECKS", [entry for entry in CHECKS if entry[1] in failing])
    assert {check.name for check in verify() if not check.passed} == failing


def test_a_check_that_raises_or_gives_no_number_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(place):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(
        runner, "CHECKS", [("a", "raises", raises), ("a", "nan", lambda place: (1.0, 2.0, math.nan, 1.0))]
    )
    first, second = verify()
    assert not first.passed
    assert first.found == "ZeroDivisionError: by zero"
    assert not second.passed


def test_table_is_readable_at_100_columns() -> None:
    console = Console(width=100, record=True)
    checks = verify()
    report([*checks, Check("part", "broken", "1", "2", 1.0, 0.5)], console, seconds=1.0, where="cpu, float64")
    text = console.export_text()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert sum(line.rstrip().endswith(" ok") for line in text.splitlines()) == len(checks)
    assert "FAILED" in text
    assert f"1 of {len(checks) + 1} checks failed on cpu, float64" in text
    assert "expected" in text
    assert "tolerance" in text


def test_numbers_are_whole_at_80_columns() -> None:
    console = Console(width=80, record=True)
    checks = verify()
    report(checks, console, seconds=1.0, where="cpu, float64")
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for check in checks:
        assert f"{check.error:.1e}" in text
        assert f"{check.tolerance:.1e}" in text


def test_command_for_programs_and_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    quick = [entry for entry in CHECKS if entry[0] == "Euler-Lagrange dynamics"]
    monkeypatch.setattr(runner, "CHECKS", quick)
    assert main(["verify", "--json", "--dtype", "float32"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["passed"] is True
    assert (summary["device"], summary["dtype"]) == ("cpu", "float32")
    assert set(summary["checks"][0]) == {"part", "name", "expected", "found", "error", "tolerance", "passed"}
    assert main(["verify"]) == 0
    assert "all 6 checks passed on cpu, float64" in capsys.readouterr().out

    monkeypatch.setattr(runner, "CHECKS", [*quick, ("a", "b", lambda place: (0, "", math.inf, 1.0))])
    assert main(["verify"]) == 1
    assert "1 of 7 checks failed" in capsys.readouterr().out
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][-1]["error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float16"], "dtype: expected one of float64, float32; got 'float16'"),
        (["--device", "tpu9"], "cannot compute on 'tpu9'"),
    ],
)
def test_places_that_are_not_there(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
