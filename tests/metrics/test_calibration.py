"""Calibration metrics against numpy and scikit-learn: accumulated, in two processes, pickled, in other types."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from clagrange.metrics import (
    BrierScore,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)

CLASSES = 4

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "calibration error": expected_calibration_error,
    "likelihood": negative_log_likelihood,
    "Brier": brier_score,
}
METRICS: dict[str, Callable[[], Any]] = {
    "calibration error": lambda: ExpectedCalibrationError(CLASSES),
    "likelihood": NegativeLogLikelihood,
    "Brier": BrierScore,
}


def predictions(seed: int = 0, count: int = 300, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """Probabilities and classes that follow softer ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return (sharpness * logits).softmax(-1), targets


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Bin by bin; the last bin holds a confidence of 1."""
    confidence, hits = probabilities.max(1), probabilities.argmax(1) == targets
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [bin_of == number for number in range(bins)]
    return sum(abs(hits[part].mean() - confidence[part].mean()) * part.mean() for part in parts if part.any())


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "calibration error": calibration_error,
    "likelihood": lambda p, y: log_loss(y, p, labels=range(CLASSES)),
    "Brier": lambda p, y: brier_score_loss(y, p, labels=range(CLASSES), scale_by_half=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_against_numpy_and_scikit_learn(name: str, sharpness: float) -> None:
    probabilities, targets = predictions(sharpness=sharpness)
    value = float(FUNCTIONS[name](probabilities, targets))
    assert value == pytest.approx(ORACLES[name](probabilities.numpy(), targets.numpy()), rel=1e-6)
    assert value > 0.01


def test_bins() -> None:
    probabilities, targets = predictions()
    for bins in (1, 5, 40):
        exact = calibration_error(probabilities.numpy(), targets.numpy(), bins)
        assert float(expected_calibration_error(probabilities, targets, bins)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stacked_equals_separate(name: str) -> None:
    several = [predictions(seed) for seed in range(3)]
    stacked = FUNCTIONS[name](torch.stack([p for p, _ in several]), torch.stack([y for _, y in several]))
    torch.testing.assert_close(stacked, torch.stack([FUNCTIONS[name](*each) for each in several]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_views_of_tensors(name: str) -> None:
    several = [predictions(seed) for seed in range(2)]
    p, y = torch.stack([p.T for p, _ in several], -1).permute(2, 1, 0), torch.stack([y for _, y in several], 1).T
    torch.testing.assert_close(FUNCTIONS[name](p, y), FUNCTIONS[name](p.contiguous(), y.contiguous()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_after_batch_equals_all_at_once(name: str) -> None:
    probabilities, targets = predictions()
    metric = METRICS[name]()
    for p, y in zip(probabilities.split(70), targets.split(70), strict=True):
        metric.update(p, y)
    expected = FUNCTIONS[name](probabilities, targets)
    torch.testing.assert_close(metric.compute().double(), expected.double(), rtol=1e-6, atol=0)
    metric.reset()
    torch.testing.assert_close(metric(*predictions(1)), FUNCTIONS[name](*predictions(1)), check_dtype=False)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pickled_in_between(name: str) -> None:
    (p, y), (q, z) = predictions(0), predictions(1)
    metric = METRICS[name]()
    metric.update(p, y)
    metric = pickle.loads(pickle.dumps(metric))
    metric.update(q, z)
    expected = FUNCTIONS[name](torch.cat([p, q]), torch.cat([y, z]))
    torch.testing.assert_close(metric.compute(), expected, check_dtype=False)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    probabilities, targets = predictions(sharpness=2.0)
    value = FUNCTIONS[name](probabilities.log().to(dtype).softmax(-1), targets.int())
    assert value.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert float(value) == pytest.approx(float(FUNCTIONS[name](probabilities, targets)), rel=tolerance)


def test_rounding_above_one_does_not_turn_probabilities_into_logits() -> None:
    """An average of softmaxes may sum to a little more than 1."""
    probabilities = torch.tensor([[1.0 + 1.2e-7, 0.0], [0.8, 0.2], [0.6, 0.4]])
    targets = torch.tensor([0, 0, 1])
    for value in (
        expected_calibration_error(probabilities, targets),
        in_a_metric(probabilities, targets),
    ):
        assert float(value) == pytest.approx((0.0 + 0.2 + 0.6) / 3, abs=1e-6)


def in_a_metric(probabilities: Tensor, targets: Tensor) -> Tensor:
    metric = ExpectedCalibrationError(2)
    metric.update(probabilities, targets)
    return metric.compute()


def test_a_confidence_of_one_is_in_the_last_bin() -> None:
    """Accuracy 1/2 at mean confidence .98: in bins of their own the two would count as .04/2 and 1/2."""
    probabilities = torch.tensor([[0.96, 0.04], [1.0, 0.0]])
    assert float(expected_calibration_error(probabilities, torch.tensor([0, 1]))) == pytest.approx(0.48)


def test_a_probability_of_zero_costs_a_finite_number() -> None:
    surprise = negative_log_likelihood(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert 87 < float(surprise) < 88


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (
            torch.randn(5, 3),
            torch.zeros(5).long(),
            r"probabilities: expected numbers .* apply .softmax\(-1\) to logits",
        ),
        (
            torch.full((5, 3), torch.nan),
            torch.zeros(5).long(),
            r"look for a network that diverged where there are NaN",
        ),
        (torch.tensor([[1.5, -0.5]]), torch.zeros(1).long(), r"numbers of at least 0"),
        (torch.ones(5), torch.zeros(5).long(), r"probabilities: expected shape .* got \(5,\)"),
        (torch.ones(5, 1), torch.zeros(5).long(), r"with C at least 2, got \(5, 1\)"),
        (torch.ones(5, 2).long(), torch.zeros(5).long(), r"probabilities: expected floating-point numbers"),
        (
            torch.full((5, 2), 0.5),
            torch.zeros(4).long(),
            r"targets: expected class numbers of shape \(5,\), got .* \(4,\)",
        ),
        (torch.full((5, 2), 0.5), torch.zeros(5), r"targets: expected class numbers .* got torch.float32"),
        (
            torch.full((5, 2), 0.5),
            torch.full((5,), 2),
            r"targets: expected class numbers from 0 to 1, got 2 to 2",
        ),
        (
            torch.full((5, 2), 0.5),
            torch.full((5,), -1),
            r"targets: expected class numbers from 0 to 1, got -1 to -1",
        ),
    ],
)
def test_bad_inputs_are_refused(probabilities: Tensor, targets: Tensor, message: str) -> None:
    for function in FUNCTIONS.values():
        with pytest.raises(ValueError, match=message):
            function(probabilities, targets)


def test_metrics_are_of_single_networks() -> None:
    p, y = predictions()
    for make in METRICS.values():
        with pytest.raises(
            ValueError, match=r"probabilities: expected shape \(N, C\) with C .*, got \(2, 300, 4\)"
        ):
            make().update(torch.stack([p, p]), torch.stack([y, y]))
    with pytest.raises(ValueError, match=r"with C 3, got \(300, 4\)"):
        ExpectedCalibrationError(3).update(p, y)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        probabilities, targets = predictions()
        part = slice(0, 100) if rank == 0 else slice(100, 300)  # unequal: a mean of means would be off
        results = {}
        for name, make in METRICS.items():
            metric = make()
            metric.update(probabilities[part], targets[part])
            results[name] = metric.compute()
        torch.save(results, Path(folder, str(rank)))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_all_examples_in_one(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        results: dict[str, Any] = torch.load(tmp_path / str(rank), weights_only=True)
        for name, value in results.items():
            assert float(value) == pytest.approx(float(FUNCTIONS[name](*predictions())), rel=1e-6)
