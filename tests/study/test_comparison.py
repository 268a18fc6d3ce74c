"""One method against each other, from scores by seed, and the pictures of it."""

import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from clagrange.metrics.intervals import interval
from clagrange.study.reporting.comparison import compare, compare_streams, own_best, ranking
from clagrange.study.reporting.comparison_plots import cost_figure, improvement_figure, profile_figure
from clagrange.study.reporting.significance import holm
from clagrange.study.results import METRICS, MethodResult


def stream(name, scores, *, measure="online_accuracy", seeds=None):
    """A stream of a summary, as far as comparisons read it."""
    methods = [
        {
            "name": method,
            "seeds": list(range(len(by_seed))) if seeds is None else seeds[method],
            "by_seed": [None if score is None else float(score) for score in by_seed],
            measure: {"mean": None if None in by_seed or not len(by_seed) else float(np.mean(by_seed))},
        }
        for method, by_seed in scores.items()
    ]
    return {"name": name, "measure": measure, "methods": methods}


def sign_p(differences):
    observed = abs(sum(differences)) - 1e-12
    totals = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    return sum(total >= observed for total in totals) / len(totals)


def test_every_method_is_compared_with_the_best_own_one():
    random = np.random.default_rng(0)
    scores = {
        "sgd": random.normal(0.75, 0.03, 6),
        "adam": random.normal(0.9, 0.03, 6),
        "euler_lagrange": random.normal(0.7, 0.03, 6),
        "euler_lagrange_injection": random.normal(0.8, 0.03, 6),
    }
    digits = stream("digits", scores)
    assert ranking(digits) == ["adam", "euler_lagrange_injection", "sgd", "euler_lagrange"]
    assert own_best(digits) == "euler_lagrange_injection"
    found = compare(digits)
    assert found["reference"] == "euler_lagrange_injection"
    own = scores["euler_lagrange_injection"]
    others = ["sgd", "adam", "euler_lagrange"]
    assert [method["name"] for method in found["methods"]] == others
    p_values = [sign_p(own - scores[name]) for name in others]
    for method, p, corrected in zip(found["methods"], p_values, holm(p_values), strict=True):
        other = scores[method["name"]]
        assert method["difference"] == interval(own - other).as_dict()
        assert (method["p"], method["p_holm"]) == pytest.approx((p, corrected))
        wins = np.mean([a > b for a in own for b in other])
        assert method["improvement"]["mean"] == pytest.approx(wins)
    assert compare(digits, "sgd")["reference"] == "sgd"
    without_own = stream("digits", {name: scores[name] for name in ("sgd", "adam")})
    assert compare(without_own)["reference"] == "adam"


def test_of_a_loss_the_smaller_is_better():
    found = compare(stream("numbers", {"sgd": [0.1, 0.2], "adam": [0.3, 0.4]}, measure="loss"))
    assert found["reference"] == "sgd"
    assert found["methods"][0]["difference"]["mean"] == pytest.approx(-0.2)
    assert found["methods"][0]["improvement"]["mean"] == 1


def test_what_cannot_be_paired_has_no_numbers_and_does_not_count():
    scores = {"a": [0.5, 0.6, 0.7], "other": [0.1, 0.2, 0.3], "broken": [0.1, None, 0.2], "b": [0.2, 0.3, 0.5]}
    seeds = {"a": [0, 1, 2], "other": [0, 1, 3], "broken": [0, 1, 2], "b": [0, 1, 2], "planned": []}
    other, broken, b, *rest = compare(stream("digits", {**scores, "planned": []}, seeds=seeds), "a")["methods"]
    nothing = {"mean": None, "low": None, "high": None}
    for method in (other, broken):
        assert (method["p"], method["p_holm"]) == (None, None)
        assert method["difference"] == method["improvement"] == nothing
    assert b["p"] == b["p_holm"] == 0.25
    assert rest == []  # of what is not finished
    assert compare(stream("digits", {"a": []})) == {"reference": None, "methods": []}
    assert compare(stream("digits", {"a": [0.1]}), "elsewhere") == {"reference": None, "methods": []}


def test_streams_together_are_those_of_accuracies_that_a_method_has_all_of():
    random = np.random.default_rng(1)
    a, b = random.normal(0.8, 0.01, (2, 2, 3))  # streams and seeds
    streams = [
        stream("one", {"x": a[0], "y": b[0], "only_here": [0.9, 0.9, 0.9]}),
        stream("numbers", {"x": [9.0, 9.0, 9.0], "y": [1.0, 1.0, 1.0]}, measure="loss"),
        stream("two", {"x": a[1], "y": b[1]}),
    ]
    found = compare_streams(streams, "x")
    assert (found["streams"], found["reference"]) == (["one", "two"], "x")
    x, y = found["methods"]
    assert (x["name"], x["p"], y["name"]) == ("x", None, "y")
    assert y["mean"] == pytest.approx(b.mean())
    assert x["interquartile_mean"]["mean"] == pytest.approx(np.sort(a.reshape(-1))[1:-1].mean())
    assert y["p"] == pytest.approx(sign_p((a - b).reshape(-1)))  # a pair for each seed and stream
    assert y["difference"]["mean"] == pytest.approx((a - b).mean())
    assert y["improvement"]["mean"] == pytest.approx(
        np.mean([left > right for at in range(2) for left in a[at] for right in b[at]])
    )
    assert compare_streams(streams)["reference"] == ("x" if a.mean() > b.mean() else "y")
    assert compare_streams(streams[:2]) is None
    assert compare_streams([streams[0], stream("two", {"x": a[1]})]) is None


def result(method, by_seed, *, name="digits", measure="online_accuracy", seconds=6.0):
    shape = (len(by_seed), 2)
    metrics = {metric: np.full(shape, np.nan) for metric in METRICS}
    metrics[measure] = np.repeat(np.asarray(by_seed, dtype=float)[:, None], 2, axis=1)
    return MethodResult(name, method, False, tuple(range(shape[0])), metrics, (False,) * shape[0], 4, seconds)


def test_pictures_show_the_scores():
    results = [
        result("worse", [0.5, 0.6, 0.7]),
        result("better", [0.65, 0.8, 0.9], seconds=60.0),
        result("broken", [0.5, np.nan, 0.7]),
        *(result(method, [0.1, 0.2], name="numbers", measure="loss") for method in ("worse", "better")),
    ]
    digits, numbers = profile_figure(results).axes
    assert (digits.get_ylabel(), numbers.get_ylabel()) == ("share of runs above τ", "share of runs below τ")
    taus, share = digits.lines[1].get_data()
    np.testing.assert_allclose(share, [np.mean(np.array([65, 80, 90]) > tau) for tau in taus])
    assert len(digits.lines) == 2
    digits, numbers = improvement_figure(results).axes
    assert [tick.get_text() for tick in digits.get_yticklabels()] == ["better", "worse"]
    assert [text.get_text() for text in digits.texts] == [f"{100 * 8 / 9:.0f}", f"{100 / 9:.0f}"]
    digits, numbers = cost_figure(results).axes
    points = [line for line in digits.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [
        (2.0, pytest.approx(60)),
        (20.0, pytest.approx(235 / 3)),
    ]
    assert numbers.get_ylabel() == "online loss"


def test_sixteen_methods_have_different_looks_and_labels_that_do_not_overlap():
    random = np.random.default_rng(2)
    methods = [f"a_method_of_long_name_{at}" for at in range(16)]
    results = [
        result(method, random.normal(0.8, 0.003, 3), seconds=float(at + 1)) for at, method in enumerate(methods)
    ]
    figure = cost_figure(results)
    (panel,) = figure.axes
    points = [line for line in panel.lines if len(line.get_xdata()) == 1]
    assert len({(line.get_color(), line.get_marker()) for line in points}) == 16
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in panel.texts), key=lambda box: box.y0)  # no lines
    assert len(boxes) == 16
    for below, above in itertools.pairwise(boxes):
        assert above.y0 >= below.y1 - 1
    edge = figure.bbox
    for box in boxes:
        assert box.x1 <= edge.x1
        assert edge.y0 <= box.y0 < box.y1 <= edge.y1
