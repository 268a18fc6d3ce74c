"""Put the tables, the findings and the picture of a finished demo into the README.

    python benchmarks/readme.py runs/demo

Keeps the summary and the picture in benchmarks/demo.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from clagrange.study.report import findings
from clagrange.study.runner import Folder, stored_results
from clagrange.study.summary import markdown

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "demo"


def main(run: Path) -> None:
    """Copy what is kept and rewrite the part of the README between the demo's marks."""
    summary = json.loads((run / "summary.json").read_text())
    if summary["status"] != "complete":
        sys.exit(f"{run}: expected a complete study, got status {summary['status']!r}; run make demo")
    KEPT.mkdir(exist_ok=True)
    for name in ("summary.json", "accuracy.png"):
        shutil.copyfile(run / name, KEPT / name)
    parts = [markdown(summary).strip(), "![online accuracy by task](benchmarks/demo/accuracy.png)"]
    for stream in summary["streams"]:
        runs = [(stream["name"], method["name"]) for method in stream["methods"]]
        said = findings(stream, stored_results(Folder(run), runs))
        parts.append("\n".join([f"What the numbers of {stream['name']} say:\n", *(f"- {line}" for line in said)]))
    machine = summary["environment"]
    parts.append(f"Measured on {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}.")
    section = "\n\n".join(parts)
    readme = ROOT / "README.md"
    marks = r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)"
    readme.write_text(re.sub(marks, lambda m: f"{m[1]}\n{section}\n\n{m[2]}", readme.read_text(), flags=re.S))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
