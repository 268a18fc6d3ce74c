"""What the numbers of a stream say, in sentences: nothing is claimed that the seeds cannot tell."""

from collections.abc import Mapping, Sequence
from typing import Any

from clagrange.study.reporting.comparison import OWN_METHODS, judged_by_loss, own_best, ranking
from clagrange.study.reporting.statistics import Interval, paired_difference
from clagrange.study.reporting.summary import number, spread
from clagrange.study.results import MethodResult


def in_short(stream: Mapping[str, Any]) -> str:
    """The best method of a stream, the next, and how many lose plasticity; empty without any.

    Example:
        >>> nothing = {"low": None, "high": None}
        >>> methods = [
        ...     {"name": name, "seeds": [0], "online_accuracy": {"mean": mean, **nothing}, "change": nothing}
        ...     for name, mean in {"sgd": 0.7, "adam": 0.8}.items()
        ... ]
        >>> in_short({"name": "digits", "methods": methods})
        'On digits, adam has the highest online accuracy of 2 methods, 80.0 %; the next is sgd with 70.0 %.'
    """
    order, loss = ranking(stream), judged_by_loss(stream)
    if not order:
        return ""
    measure, unit = ("loss", "") if loss else ("online_accuracy", " %")
    by_name = {method["name"]: method for method in stream["methods"]}
    said = {name: spread(by_name[name][measure], loss=loss).replace(" [", f"{unit} [", 1) for name in order[:2]}
    said = {name: text if "[" in text else text + unit for name, text in said.items()}
    text = (
        f"On {stream['name']}, {order[0]} has the {'lowest online loss' if loss else 'highest online accuracy'}"
    )
    text += f" of {len(order)} methods, {said[order[0]]}" if len(order) > 1 else f", {said[order[0]]}"
    text += f"; the next is {order[1]} with {said[order[1]]}." if len(order) > 1 else "."
    signs = [_sign(by_name[name]["change"]) for name in order]
    if any(signs) and stream.get("equally_hard", True):
        worse = "above" if loss else "below"
        text += f" {signs.count(worse)} of {len(order)} lose plasticity between the first and the last tenth."
    return text


def comparisons(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> dict[str, Interval | None]:
    """Paired difference of the best Euler-Lagrange method to each other finished method of a stream.

    Returns:
        For each other method the interval of (best Euler-Lagrange method − method) in what the stream is judged
        by; None where the two were not run on the same seeds. Empty if no Euler-Lagrange method is finished.
    """
    own = own_best(stream)
    finished = {method["name"] for method in stream["methods"] if method["seeds"]}
    of_stream = {
        result.method: result
        for result in results
        if result.stream == stream["name"] and result.method in finished
    }
    if own is None or own not in of_stream:
        return {}
    return {
        name: paired_difference(of_stream[own], other) if other.seeds == of_stream[own].seeds else None
        for name, other in of_stream.items()
        if name != own
    }


def findings(stream: Mapping[str, Any], results: Sequence[MethodResult] | None = None) -> list[str]:
    """What the numbers of a stream say, in sentences: nothing is claimed where an interval contains 0.

    Args:
        stream: of a summary.
        results: that it was made of; default: the best Euler-Lagrange method is not compared with the others.
    """
    finished = [method for method in stream["methods"] if method["seeds"]]
    if not finished:
        return ["No method is finished."]
    loss, alike = judged_by_loss(stream), stream.get("equally_hard", True)
    sentences = []
    changes = {method["name"]: method["change"] for method in finished}
    worse, better = ("above", "below") if loss else ("below", "above")
    lose = [name for name, change in changes.items() if _sign(change) == worse]
    gain = [name for name, change in changes.items() if _sign(change) == better]
    neither = [name for name, change in changes.items() if _sign(change) == "undecided"]
    unknown = [name for name, change in changes.items() if _sign(change) is None]
    said = {
        name: f"{name} ({number(change['mean'], signed=True, loss=loss)})" for name, change in changes.items()
    }
    unit = "of the loss" if loss else "(in points)"
    if lose and not alike:
        sentences.append(f"Become worse; the interval of the change lies {worse} 0: {_listed(said, lose)}.")
    elif lose:
        sentences.append(
            f"Lose plasticity; the change from the first to the last tenth {unit} lies {worse} 0: "
            f"{_listed(said, lose)}."
        )
    elif alike and (neither or gain):
        sentences.append(f"No method shows a loss of plasticity: no interval of the change lies {worse} 0.")
    if neither:
        sentences.append(f"Show no change that the seeds can tell from 0: {_listed(said, neither)}.")
    if gain:
        sentences.append(f"Become better; the interval of the change lies {better} 0: {_listed(said, gain)}.")
    if not alike:
        sentences.append("The tasks are not equally hard here, so that a change is not the network's alone.")
    if unknown:
        sentences.append(
            f"Without an interval, so nothing is claimed about their change: {_listed(said, unknown)}."
        )
    sentences += [] if results is None else _findings_about_own(stream, results)
    diverged = [f"{m['name']} ({m['diverged']} of {len(m['seeds'])} seeds)" for m in finished if m["diverged"]]
    if diverged:
        sentences.append(
            f"Diverged: {', '.join(diverged)}. Their numbers include the diverged seeds; if one has no number, "
            f"neither has the method."
        )
    unfinished = [method["name"] for method in stream["methods"] if not method["seeds"]]
    if unfinished:
        sentences.append(f"Not finished, so not judged: {', '.join(unfinished)}.")
    return sentences


def _findings_about_own(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> list[str]:
    own, against = own_best(stream), comparisons(stream, results)
    if not any(method["name"].startswith(OWN_METHODS) for method in stream["methods"]):
        return []
    if own is None:
        return ["No Euler-Lagrange method is finished, so there is nothing to compare it with."]
    if not against:
        return [f"{own} is alone, so there is nothing to compare it with."]
    loss = judged_by_loss(stream)
    said = {
        name: f"{name} ({number(difference.mean, signed=True, loss=loss)})" if difference else name
        for name, difference in against.items()
    }
    measured = "in online loss" if loss else "in online accuracy, in points"
    signs = {name: _sign(difference.as_dict()) if difference else None for name, difference in against.items()}
    sentences = []
    for sign, words in {
        "above": "is above",
        "below": "is below",
        "undecided": "cannot be told apart, with these seeds, from",
    }.items():
        names = [name for name, of_name in signs.items() if of_name == sign]
        if names:
            sentences.append(f"{own} {words} {_listed(said, names)} {measured}, paired by seed.")
    unknown = [name for name, sign in signs.items() if sign is None]
    if unknown:
        sentences.append(
            f"Without an interval, so {own} is not judged against them: {_listed(said, unknown)} "
            f"(an interval needs two seeds at least, the same for both methods, all with finite numbers)."
        )
    return sentences


def _sign(of: Mapping[str, float | None]) -> str | None:
    """Where the interval lies: above 0, below 0, undecided; None without an interval."""
    if of["low"] is None or of["high"] is None:
        return None
    return "above" if of["low"] > 0 else "below" if of["high"] < 0 else "undecided"


def _listed(said: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(said[name] for name in names)
