"""The report in a real browser, on a phone: headless Chromium, where it is installed."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from clagrange.study.reporting.report import write_report
from clagrange.study.reporting.summary import summarize
from clagrange.study.results import METRICS, MethodResult

PHONE = (390, 844)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync", "--no-first-run"]
LOOK = """
<script>
window.addEventListener("load", () => {
  const boxes = (tag) => [...document.querySelectorAll(tag)].map((e) => [e, e.getBoundingClientRect()]);
  const seen = {
    window: window.innerWidth,
    page: document.documentElement.scrollWidth,
    pictures: boxes("img").map(([e, box]) => {
      const frame = e.closest("figure, div").getBoundingClientRect();
      return [e.naturalWidth, box.width, frame.right, e.alt];
    }),
    headings: boxes("h1, h2, h3").map(([e, box]) => [e.innerText, box.right, box.height]),
    smallest: Math.min(...boxes("p, td, th, li").map(([e]) => parseFloat(getComputedStyle(e).fontSize))),
    fetched: performance.getEntriesByType("resource").map((e) => e.name.slice(0, 60)),
  };
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>
"""
# A window is at least 500 wide, a frame is not.
FRAME = """
<iframe src="{page}" style="width: {width}px; height: {height}px; border: 0"></iframe>
<script>
window.addEventListener("message", (event) => {{
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").innerText = event.data;
}});
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install Debian's chromium, or Google Chrome"),
]


def run(stream: str, method: str) -> MethodResult:
    noise = np.random.default_rng([len(stream), len(method)]).random((4, 12)) / 10
    metrics = dict.fromkeys(METRICS, 0.6 + noise)
    return MethodResult(stream, method, False, (0, 1, 2, 3), metrics, (False,) * 4, steps=100, seconds=2.0)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the browser says of a report of two streams, whose methods have names as long as ours get."""
    folder = tmp_path_factory.mktemp("report")
    methods = ("sgd", "adam_input_normalization", "euler_lagrange_kronecker_injection")
    results = [run(stream, method) for stream in ("permuted_digits", "tiny") for method in methods]
    page = write_report(folder, summarize(results, status="complete", environment={}), results, "seeds: 4\n")
    page.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    assert LOOK in page.read_text()
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=PHONE[0], height=PHONE[1]))
    command = [CHROMIUM, "--headless", "--no-sandbox", *QUIET, f"--user-data-dir={folder / 'user'}"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', shown, re.DOTALL)[1]))


def test_the_page_is_as_wide_as_the_phone(seen):
    assert seen["window"] == PHONE[0]
    assert seen["page"] <= PHONE[0]
    assert seen["smallest"] >= 12.0


def test_all_pictures_are_there_in_frames_that_fit(seen):
    assert len(seen["pictures"]) >= 5
    for natural, width, right, alt in seen["pictures"]:
        assert natural >= width > 0, alt
        assert right <= PHONE[0], alt
        assert alt


def test_headings_are_seen_whole(seen):
    said = [text for text, *_ in seen["headings"]]
    assert any("permuted_digits" in text for text in said)
    assert "Learning curves" in said
    assert all(right <= PHONE[0] and height > 0 for _, right, height in seen["headings"])


def test_nothing_is_fetched_from_elsewhere(seen):
    assert all(name.startswith("data:") for name in seen["fetched"])
