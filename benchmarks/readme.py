"""Put the tables, the findings and the picture of finished studies into the README or benchmarks/README.md.

    python benchmarks/readme.py runs/demo [runs/permuted ...]

A study goes between the marks of its folder's name. Its summary and picture are kept in the folder of that name
here; of a study of many streams a picture of each.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from clagrange.study.files import file_name
from clagrange.study.reporting.findings import findings
from clagrange.study.reporting.summary import markdown
from clagrange.study.store import Folder, stored_results

ROOT = Path(__file__).parents[1]
MANY = 5
"""Streams from which on each has a picture of its own."""


def main(run: Path) -> None:
    """Copy what is kept and rewrite what stands between the study's marks."""
    name = run.resolve().name
    marks = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    texts = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    text = next((text for text in texts if re.search(marks, text.read_text(), flags=re.S)), None)
    if text is None:
        sys.exit(f"{run}: expected a study whose name has marks in a README, got {name!r}")
    summary = json.loads((run / "summary.json").read_text())
    if summary["status"] != "complete":
        sys.exit(f"{run}: expected a complete study, got status {summary['status']!r}; go on with it by --resume")
    kept = ROOT / "benchmarks" / name
    kept.mkdir(exist_ok=True)
    many = len(summary["streams"]) >= MANY
    for file in ("summary.json", *([] if many else ["accuracy.png"])):
        shutil.copyfile(run / file, kept / file)
    folder = kept.relative_to(text.parent)
    parts = [markdown(summary).strip()] + ([] if many else [f"![online accuracy by task]({folder}/accuracy.png)"])
    for stream in summary["streams"]:
        if many:
            picture = f"{file_name(stream['name'])}.png"
            shutil.copyfile(run / "streams" / picture, kept / picture)
            parts.append(f"![{stream['name']} by task]({folder}/{picture})")
        runs = [(stream["name"], method["name"]) for method in stream["methods"]]
        said = findings(stream, stored_results(Folder(run), runs))
        parts.append("\n".join([f"What the numbers of {stream['name']} say:\n", *(f"- {line}" for line in said)]))
    machine = summary["environment"]
    parts.append(f"Measured on {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}.")
    section = "\n\n".join(parts)
    text.write_text(re.sub(marks, lambda m: f"{m[1]}\n{section}\n\n{m[2]}", text.read_text(), flags=re.S))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        main(Path(argument))
