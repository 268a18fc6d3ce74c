"""The README's usage runs as it stands, and its table is what the stored demo gave."""

import json
import re
from pathlib import Path

import pytest

from clagrange.study.reporting.summary import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^In ([^\n]+):\n\n```python\n(.*?)```", README, flags=re.M | re.S)


def test_the_usages():
    assert [name for name, _ in BLOCKS] == [
        "a plain loop",
        "a plain loop, with matrix-Gaussian weights",
        "Lightning",
        "Avalanche",
        "a plain loop, with any method",
    ]


@pytest.mark.parametrize(("name", "code"), BLOCKS, ids=[name for name, _ in BLOCKS])
# a data module that holds its batches in memory has no use for the loader workers that Lightning misses
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_usage_runs_as_written(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("tasks=3", "tasks=2, examples=400"), f"README: {name}", "exec"), {})


def test_the_table_is_the_stored_demo():
    summary = json.loads((ROOT / "benchmarks" / "demo" / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert markdown(summary).strip() in README
    assert summary["environment"]["processor"] in README
