"""Samplers: as many trials for every method, all within the ranges, the same for the same seed."""

import itertools
import math
import sys

import pytest
from scipy import stats

from clagrange.study.problems import SettingsError
from clagrange.study.samplers import SAMPLERS, Dimension, Grid, Halton, Optuna, Random, Space
from clagrange.study.search_file import load_search

LR = Dimension("log", (1e-4, 1.0))
L2 = Dimension("uniform", (0.0, 2.0))
DECAY = Dimension("choice", (0.9, 0.99, 0.999))
SPACES = {
    "one": [Space({}, {"lr": LR})],
    "three": [Space({"base": "adam"}, {"lr": LR, "l2": L2, "decay": DECAY})],
    "two spaces": [Space({"base": "sgd"}, {"lr": LR}), Space({"base": "adam"}, {"lr": LR, "l2": L2})],
    "nothing to choose": [Space({"lr": 0.1}, {})],
}

FILE = """\
seeds: [100]
trials: {trials}
{more}study: {{seeds: 2, tasks: {{}}}}
streams:
  permuted_digits:
    stream: {{tasks: 1, examples: 100, batch_size: 10}}
    hidden: [4]
    methods:
      {methods}
"""


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


def tried(sampler, spaces, trials, refinements, goodness):
    """All settings of a plan, round by round."""
    plan, rounds = sampler.plan(spaces, trials, refinements), []
    settings = next(plan)
    while True:
        rounds.append(settings)
        try:
            settings = plan.send([goodness(values) for values in settings])
        except StopIteration:
            return rounds


def near(values):
    """Best at a rate of 0.01."""
    return -((math.log10(values["lr"]) + 2) ** 2)


def within(space, settings):
    assert list(settings) == [*space.fixed, *space.ranges]
    for name, dimension in space.ranges.items():
        low, high = dimension.values[0], dimension.values[-1]
        assert (
            settings[name] in dimension.values if dimension.scale == "choice" else low <= settings[name] <= high
        )


@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("name", ["halton", "random", "grid", "tpe", "gp", "cmaes"])
def test_every_sampler_tries_as_many_within_the_ranges_and_the_same_again(name, spaces):
    if name in SAMPLERS:
        make, trials, refinements = SAMPLERS[name], 24, 5
    else:
        pytest.importorskip("optuna")
        make, trials, refinements = (lambda seed=0: Optuna(name, seed=seed, rounds=2)), 8, 0
    spaces = SPACES[spaces]
    found = tried(make(), spaces, trials, refinements, near)
    settings = list(itertools.chain(*found))
    varied = bool(spaces[0].ranges)
    assert len(settings) == (trials + refinements if varied or name != "grid" else 1)
    for values in settings:
        of_base = [space for space in spaces if space.fixed.get("base") == values.get("base")]
        within(of_base[0], values)
    shared = [sum(values.get("base") == base for values in settings[:trials]) for base in ("sgd", "adam")]
    assert len(spaces) == 1 or name == "grid" or shared == [trials // 2] * 2
    assert tried(make(), spaces, trials, refinements, near) == found
    if varied and name != "grid":
        assert tried(make(seed=1), spaces, trials, refinements, near)[0] != found[0]


def test_random_settings_are_uniform_over_the_logarithm_and_independent():
    (space,) = SPACES["three"]
    points = Random(seed=3).points(space, 2000, 0)
    shares = [math.log(point["lr"] / 1e-4) / math.log(1e4) for point in points]
    assert stats.kstest(shares, "uniform").pvalue > 0.01
    assert stats.kstest([point["l2"] / 2 for point in points], "uniform").pvalue > 0.01
    assert abs(stats.spearmanr(shares, [point["l2"] for point in points]).statistic) < 0.06
    counts = [sum(point["decay"] == value for point in points) for value in DECAY.values]
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(
    ("trials", "sizes"), [(12, (3, 2)), (13, (3, 2)), (24, (4, 3)), (6, (2, 1)), (48, (6, 4)), (49, (6, 4))]
)
def test_a_grid_fills_the_trials_as_evenly_as_it_can(trials, sizes):
    choice = Dimension("choice", (0.9, 0.99))
    ranges = {"lr": LR, "l2": L2, "decay": choice} if sizes[1] > 1 else {"lr": LR, "decay": DECAY}
    found = Grid().sizes(Space({}, ranges), trials)
    assert [found[name] for name in ranges] == [*sizes[: len(ranges) - 1], len(ranges["decay"].values)]


def test_a_grid_has_every_combination_with_both_ends():
    space = Space({"base": "sgd"}, {"lr": Dimension("log", (1e-3, 1e-1), points=3), "decay": DECAY})
    assert Grid().points(space, 12, 0) == [
        {"base": "sgd", "lr": lr, "decay": decay} for lr in (0.001, 0.01, 0.1) for decay in (0.9, 0.99, 0.999)
    ]
    first, more = tried(Grid(), [space], 12, 2, near)
    assert len(first) == 9
    assert len(more) == 5
    assert all(0.0056 <= values["lr"] <= 0.0178 for values in more)
    (only,) = tried(Grid(), [Space({}, {"decay": DECAY})], 12, 2, lambda values: 0.0)
    assert len(only) == 3


def test_what_a_grid_leaves_is_tried_around_its_best_without_refinements():
    space = Space({}, {"lr": Dimension("log", (1e-3, 1e-1), points=3)})
    first, more = tried(Grid(), [space], 5, 0, near)
    assert [values["lr"] for values in first] == [0.001, 0.01, 0.1]
    assert len(more) == 2
    assert all(0.0056 <= values["lr"] <= 0.0178 for values in more)
    (only,) = tried(Grid(), [space], 3, 0, near)
    assert only == first


@pytest.mark.parametrize(("algorithm", "trials"), [("tpe", 48), ("cmaes", 48), ("gp", 24)])
def test_optuna_learns_from_what_it_is_told(optuna, algorithm, trials):
    space = SPACES["three"][0]

    def goodness(values):
        return near(values) - (values["l2"] - 0.5) ** 2

    found = tried(Optuna(algorithm, rounds=8), [space], trials, 0, goodness)
    assert [len(settings) for settings in found] == [trials // 3] + [trials // 12] * 8
    middle = sorted(goodness(values) for values in found[0])[trials // 6]
    later = [goodness(values) > middle for settings in found[-3:] for values in settings]
    assert sum(later) >= 0.8 * len(later)


@pytest.mark.parametrize("algorithm", ["tpe", "cmaes"])
def test_optuna_keeps_away_from_settings_that_diverge(optuna, algorithm):
    space = SPACES["one"][0]
    found = tried(Optuna(algorithm, rounds=6), [space], 36, 0, lambda v: near(v) if v["lr"] < 0.1 else -math.inf)
    assert any(values["lr"] >= 0.1 for values in found[0])
    assert sum(values["lr"] >= 0.1 for settings in found[-3:] for values in settings) <= 3
    nothing = tried(Optuna(algorithm), [space], 12, 0, lambda values: -math.inf)
    assert sum(map(len, nothing)) == 12


def load(tmp_path, methods="sgd: {lr: {log: [0.01, 1]}}", more="", trials=6):
    path = tmp_path / "search.yaml"
    path.write_text(FILE.format(methods=methods, more=more, trials=trials))
    return load_search(path)


@pytest.mark.parametrize(
    ("more", "sampler"),
    [
        ("", Halton()),
        ("sampler: random\n", Random()),
        ("sampler: {kind: halton, seed: 3}\nrefinements: 2\n", Halton(seed=3)),
        ("sampler: grid\n", Grid()),
    ],
)
def test_a_search_file_names_its_sampler(tmp_path, more, sampler):
    search = load(tmp_path, more=more)
    assert search.sampler == sampler
    assert search.sampler.written == {
        "kind": type(sampler).__name__.lower(),
        **({} if more.endswith("grid\n") else {"seed": sampler.seed}),
    }


def test_a_search_file_names_optuna(tmp_path, optuna):
    assert load(tmp_path, more="sampler: optuna\n").sampler == Optuna("tpe")
    assert load(tmp_path, more="sampler: {optuna: gp, rounds: 2}\n").sampler == Optuna("gp", rounds=2)
    with pytest.raises(SettingsError, match=r"search\.yaml:3: sampler\.algorithm: .*did you mean 'tpe'\?"):
        load(tmp_path, more="sampler: {optuna: tpee}\n")
    with pytest.raises(SettingsError, match=r"search\.yaml:4: refinements: expected 0 with Optuna.*got 3"):
        load(tmp_path, more="sampler: optuna\nrefinements: 3\n")


@pytest.mark.parametrize(("algorithm", "module"), [("tpe", "optuna"), ("cmaes", "cmaes")])
def test_without_its_package_optuna_is_refused_with_the_remedy(tmp_path, monkeypatch, algorithm, module):
    if module == "cmaes":
        pytest.importorskip("optuna")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        SettingsError,
        match=rf"yaml:3: sampler.*{module}, which is not installed; pip install 'clagrange\[optuna\]'",
    ):
        load(tmp_path, more=f"sampler: {{optuna: {algorithm}}}\n")


@pytest.mark.parametrize(
    ("more", "methods", "message"),
    [
        ("sampler: haltn\n", "sgd: {}", r"3: sampler\.kind: expected .*; did you mean 'halton'\?"),
        ("sampler: {kind: random, sede: 1}\n", "sgd: {}", r"3: sampler\.sede: .*did you mean 'seed'\?"),
        ("sampler: {random: 1}\n", "sgd: {}", "3: sampler: expected one of halton, random, grid, optuna"),
        ("sampler: {kind: random, seed: -1}\n", "sgd: {}", r"3: sampler\.seed: expected .*got -1"),
        ("", "sgd: {lr: {log: [0.01, 1], points: 3}}", r"9: .*lr\.points: expected only with sampler: grid"),
        (
            "sampler: grid\n",
            "sgd: {lr: {log: [0.01, 1], points: 1}}",
            r"10: .*points: expected at least 2, got 1",
        ),
        (
            "sampler: grid\n",
            "sgd: {lr: {choice: [0.1, 1], points: 2}}",
            r"10: .*points: expected none of a choice",
        ),
        (
            "sampler: grid\n",
            "adam_l2: {lr: {log: [0.01, 1]}, l2: {log: [0.01, 1], points: 4}}",
            r"10: .*adam_l2: expected a grid of at most 6 points.*got 8 \(lr 2 × l2 4\)",
        ),
        ("sampler: grid\n", "sgd: {lr: {uniform: [1.001, 1.002]}}", "10: .*differ in three digits"),
        ("", "sgd: {lr: {choice: [0.1]}}", r"9: .*lr\.choice: expected at least two values"),
        ("", "sgd: {lr: {log: [0.1]}}", r"9: .*lr\.log: expected \[low, high\]"),
        (
            "",
            "shrink_and_perturb: {shrink: {uniform: [0.5, 1.2]}}",
            r"9: .*\.shrink: expected a number.*got 1\.19",
        ),
        ("sampler: grid\n", "mesu: {trust_region: {log: [0.1, 1]}}", r"10: .*\.trust_region: expected .*got 1$"),
        ("", "sgd: {lr: 1}\n      sgd: {lr: 2}", "10: .*sgd: expected each name once"),
        ("", "a/b: {kind: sgd}", "9: .*a/b: expected a name of letters"),
        ("sapmler: grid\n", "sdg: {}", "3: sapmler: .*\n.*10: .*did you mean 'sgd'"),
    ],
)
def test_bad_samplers_and_ranges_are_named_with_their_line(tmp_path, more, methods, message):
    with pytest.raises(SettingsError, match=r"search\.yaml:" + message):
        load(tmp_path, methods, more)


def test_numbers_that_yaml_reads_as_words_are_numbers(tmp_path):
    search = load(tmp_path, "sgd: {lr: {choice: [1e-3, 1e-2]}}", more="sampler: grid\n")
    (space,) = search.methods["permuted_digits"]["sgd"].spaces
    assert space.ranges["lr"].values == (0.001, 0.01)


def test_an_end_that_no_trial_reaches_may_be_excluded(tmp_path):
    search = load(tmp_path, "mesu: {trust_region: {log: [0.1, 1]}}", trials=48)
    (first,) = search.plan(search.methods["permuted_digits"]["mesu"])
    assert max(settings["trust_region"] for settings in first) < 1
