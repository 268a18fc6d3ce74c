"""What a search says about each setting, from hand-made trials and from the stored searches."""

import json
import math
from pathlib import Path

import pytest

from clagrange.study.files import FileProblem
from clagrange.study.reporting.sensitivity import method_trials, read_searches, sensitivity_figure

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def trials(*found, measure="online_accuracy"):
    return [{"settings": settings, measure: score} for settings, score in found]


def test_the_share_is_of_the_tried_range_on_its_scale():
    found = method_trials(
        "adam",
        trials(
            ({"lr": 1e-4, "decay": 0.5, "betas": 0.9}, 0.30),
            ({"lr": 1e-3, "decay": 0.6, "betas": 0.99}, 0.795),
            ({"lr": 1e-2, "decay": 0.9, "betas": 0.9}, 0.80),
            ({"lr": 1e-1, "decay": 1.0, "betas": 0.99}, 0.7899),
            ({"lr": 1e0, "decay": 0.7, "betas": 0.9}, None),
        ),
        first_round=4,
    )
    assert (found.method, found.best, found.good, found.tried) == ("adam", 0.8, 2, 4)
    lr, decay, betas = found.settings
    assert (lr.setting, lr.scale, lr.share) == ("lr", "log", pytest.approx(1 / 4))
    assert lr.good == (False, True, True, False, False)
    assert math.isnan(lr.scores[4])
    assert (decay.scale, decay.share) == ("linear", pytest.approx(0.3 / 0.5))
    assert (betas.scale, betas.share) == ("choice", pytest.approx(1.0))


def test_a_choice_counts_its_values_and_what_is_fixed_is_left_out():
    found = method_trials(
        "sgd",
        trials(*(({"beta": beta, "pull": 0.0}, 0.8 if beta < 0.99 else 0.5) for beta in (0.9, 0.95, 0.99) * 2)),
        first_round=6,
    )
    (beta,) = found.settings
    assert (beta.setting, beta.scale, beta.share) == ("beta", "choice", pytest.approx(2 / 3))


def test_variants_are_judged_by_the_best_of_the_method():
    found = method_trials(
        "l2_init",
        trials(
            *(({"base": "sgd", "kind": "x", "lr": lr}, 0.7) for lr in (0.1, 0.2)),
            *(({"base": "adam", "kind": "x", "lr": lr}, 0.8) for lr in (0.001, 0.002)),
        ),
        first_round=4,
    )
    shares = {setting.variant: setting.share for setting in found.settings}
    assert shares == {"l2_init, base sgd": 0.0, "l2_init, base adam": 1.0}
    assert found.good == 2


def test_of_a_loss_less_is_better():
    found = method_trials(
        "sgd",
        trials(*(({"lr": lr}, loss) for lr, loss in ((1, 0.2), (2, 0.209), (3, 0.3))), measure="loss"),
        first_round=3,
    )
    (lr,) = found.settings
    assert found.best == -0.2
    assert lr.good == (True, True, False)
    assert lr.share == 0.5
    (panel,) = sensitivity_figure([found], title="numbers").axes
    bottom, top = panel.get_ylim()
    assert bottom > 0.3 > 0.2 > top  # the smallest loss is highest


def test_trials_without_any_number_are_not_good():
    found = method_trials("sgd", trials(({"lr": 0.1}, math.nan), ({"lr": 1.0}, None)), first_round=2)
    assert math.isnan(found.best)
    assert found.good == 0
    assert found.settings[0].share == 0.0
    with pytest.raises(ValueError, match="methods: expected one with a setting that its trials vary"):
        sensitivity_figure([], title="")


def test_the_stored_searches_can_be_read_and_drawn():
    found = read_searches([BENCHMARKS / "permuted_search.json", BENCHMARKS / "demo_search.json"])
    assert {"permuted_digits", "permuted_mnist", "random_label_digits"} <= set(found)
    by_name = {method.method: method for method in found["permuted_digits"]}
    stored = json.loads((BENCHMARKS / "permuted_search.json").read_text())
    of_sgd = stored["streams"]["permuted_digits"]["methods"]["sgd"]["trials"]
    best = max(trial["online_accuracy"] for trial in of_sgd)
    good = [trial["settings"]["lr"] for trial in of_sgd if trial["online_accuracy"] >= best - 0.01]
    rates = [trial["settings"]["lr"] for trial in of_sgd]
    (lr,) = by_name["sgd"].settings
    assert lr.share == pytest.approx(math.log(max(good) / min(good)) / math.log(max(rates) / min(rates)))
    for method in by_name.values():
        assert all(0 <= setting.share <= 1 for setting in method.settings)
        assert 1 <= method.tried <= 12
    figure = sensitivity_figure([by_name["sgd"], by_name["l2_init"]], title="permuted_digits")
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["lr", *("lr", "strength") * 2]
    assert {"sgd", "l2_init, base sgd", "l2_init, base adam"} < {text.get_text() for text in figure.texts}


@pytest.mark.parametrize("text", ["{", "[]", '{"streams": {"digits": {}}}', '{"trials": 1}'])
def test_a_foreign_file_is_named(tmp_path, text):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(
        FileProblem, match=r"search: expected a file that clagrange tune wrote, got .*search\.json"
    ):
        read_searches([path])
    with pytest.raises(FileProblem, match=r"none\.json"):
        read_searches([tmp_path / "none.json"])
