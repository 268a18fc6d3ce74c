"""Who is best in a study, and how sure that is: one method against each other, in the form of `summary.json`.

Everything is computed from the scores by seed that a summary holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clagrange.metrics.intervals import Array, Interval, interval
from clagrange.study.reporting.aggregates import improvement_interval, interquartile_interval
from clagrange.study.reporting.significance import holm, paired_permutation_test

OWN_METHODS = "euler_lagrange"
"""Methods whose names begin so are Euler-Lagrange methods."""
NO_INTERVAL = Interval(None, None, None).as_dict()
"""What a summary holds where there is no number."""
_NOT_COMPARED = {"difference": NO_INTERVAL, "p": None, "p_holm": None, "improvement": NO_INTERVAL}


def judged_by_loss(stream: Mapping[str, Any]) -> bool:
    """Whether less is better on a stream."""
    return stream.get("measure") == "loss"  # older summaries know accuracies only


def best(stream: Mapping[str, Any]) -> str | None:
    """Name of the method with the best mean; the first of equals, None without any."""
    return next(iter(ranking(stream)), None)


def ranking(stream: Mapping[str, Any]) -> list[str]:
    """Names of the methods that have a mean, the best first, equals in the order of the study."""
    measure = "loss" if judged_by_loss(stream) else "online_accuracy"
    means = {method["name"]: method[measure]["mean"] for method in stream["methods"]}
    finished = {name: mean for name, mean in means.items() if mean is not None}
    return sorted(finished, key=finished.__getitem__, reverse=not judged_by_loss(stream))


def own_best(stream: Mapping[str, Any]) -> str | None:
    """Name of the Euler-Lagrange method with the best mean in a stream; None without any."""
    own = [method for method in stream["methods"] if method["name"].startswith(OWN_METHODS)]
    return best({**stream, "methods": own})


def compare(stream: Mapping[str, Any], reference: str | None = None) -> dict[str, Any]:
    """One method of a stream against each other finished one.

    Args:
        stream: of a summary, with "by_seed" in its methods.
        reference: name of the method; default: the best Euler-Lagrange method, or the best method if there is
            none. A reference that is chosen from the same numbers is favoured a little.

    Returns:
        ``{"reference", "methods": [{"name", "difference": {"mean", "low", "high"}, "p", "p_holm",
        "improvement": {"mean", "low", "high"}}]}``: the difference, reference minus method, of what the stream is
        judged by, seed by seed; p of `paired_permutation_test`, and corrected by `holm` for the number of
        methods; the probability that a run of the reference is better than one of the method. null where the
        two were not run on the same seeds or a seed has no number. No methods if the reference is not finished.

    Example:
        >>> accuracy = {"a": [0.75, 0.75, 0.75], "b": [0.5, 0.5, 0.5]}
        >>> methods = [
        ...     {"name": name, "seeds": [0, 1, 2], "by_seed": by_seed, "online_accuracy": {"mean": by_seed[0]}}
        ...     for name, by_seed in accuracy.items()
        ... ]
        >>> found = compare({"name": "digits", "methods": methods})
        >>> found["reference"], found["methods"][0]["difference"]["mean"], found["methods"][0]["p"]
        ('a', 0.25, 0.25)
    """
    sign = -1.0 if judged_by_loss(stream) else 1.0
    scores = {method["name"]: _by_seed(method) for method in stream["methods"] if method["seeds"]}
    seeds = {method["name"]: method["seeds"] for method in stream["methods"]}
    reference = reference or own_best(stream) or best(stream)
    if reference not in scores:
        return {"reference": None, "methods": []}
    paired = {name: of for name, of in scores.items() if name != reference and seeds[name] == seeds[reference]}
    judged = _against(scores[reference], paired, sign)
    return {
        "reference": reference,
        "methods": [{"name": name, **judged.get(name, _NOT_COMPARED)} for name in scores if name != reference],
    }


def compare_streams(streams: Sequence[Mapping[str, Any]], reference: str | None = None) -> dict[str, Any] | None:
    """The methods over all streams of accuracies together; None with fewer than two such streams or methods.

    Each stream counts the same, and accuracies are taken as they are: a point on an easy stream is a point on a
    hard one.

    Args:
        streams: of a summary, with "by_seed" in their methods.
        reference: name of the method that the others are judged against; default as in `compare`.

    Returns:
        ``{"streams": [names], "reference", "methods": [{"name", "mean", "interquartile_mean": {...},
        "difference": {...}, "p", "p_holm", "improvement": {...}}]}``, of the methods that have a number for the
        same seeds on all of these streams. Intervals of the interquartile mean are stratified by stream; the
        test exchanges the labels of each pair of runs, a pair for each seed and stream. The reference has null
        against itself.
    """
    chosen = [stream for stream in streams if not judged_by_loss(stream)]
    if len(chosen) < 2:
        return None
    found: dict[str, list[Array]] = {}
    seeds: list[int] = next(
        (method["seeds"] for stream in chosen for method in stream["methods"] if method["seeds"]), []
    )
    for stream in chosen:
        for method in stream["methods"]:
            scores = _by_seed(method)
            if method["seeds"] == seeds and len(scores) and np.isfinite(scores).all():
                found.setdefault(method["name"], []).append(scores)
    matrices = {name: np.stack(of, 1) for name, of in found.items() if len(of) == len(chosen)}
    if len(matrices) < 2:
        return None
    own = [name for name in matrices if name.startswith(OWN_METHODS)]
    if reference not in matrices:
        reference = max(own or matrices, key=lambda name: float(matrices[name].mean()))
    others = {name: matrix for name, matrix in matrices.items() if name != reference}
    judged = _against(matrices[reference], others, 1.0)
    return {
        "streams": [stream["name"] for stream in chosen],
        "reference": reference,
        "methods": [
            {
                "name": name,
                "mean": float(matrix.mean()),
                "interquartile_mean": interquartile_interval(matrix).as_dict(),
                **judged.get(name, _NOT_COMPARED),
            }
            for name, matrix in matrices.items()
        ],
    }


def _against(reference: Array, others: Mapping[str, Array], sign: float) -> dict[str, dict[str, Any]]:
    """The comparisons of one family; scores (seeds,) or (seeds, streams), more is better after ``sign``."""
    p_values = {name: paired_permutation_test(reference, other) for name, other in others.items()}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    judged = {}
    for name, other in others.items():
        with np.errstate(invalid="ignore"):
            differences = (reference - other).reshape(len(reference), -1).mean(1)
        judged[name] = {
            "difference": interval(differences).as_dict(),
            "p": p_values[name],
            "p_holm": corrected[name],
            "improvement": improvement_interval(sign * reference, sign * other).as_dict(),
        }
    return judged


def _by_seed(method: Mapping[str, Any]) -> Array:
    """The scores of a method, NaN where a seed has none; none in older summaries."""
    return np.array([np.nan if score is None else score for score in method.get("by_seed", ())], dtype=np.float64)
