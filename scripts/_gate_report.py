"""pytest plug-in of the gate: write what a run counted to the file $KVSHARE_GATE_REPORT.

Its first line is the number of GPU tests that did not run, skipped and deselected ones alike, its
second that of tests with real weights; its third is pytest's own summary.
"""

import os
from pathlib import Path

import pytest

MARKERS = ("gpu", "weights")

_skipped: dict[str, set[str]] = {marker: set() for marker in MARKERS}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for marker in MARKERS:
        if report.skipped and marker in report.keywords:
            _skipped[marker].add(report.nodeid)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for marker in MARKERS:
        _skipped[marker].update(item.nodeid for item in items if item.get_closest_marker(marker))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    parts, _ = terminalreporter.build_summary_stats_line()
    counts = [str(len(_skipped[marker])) for marker in MARKERS]
    summary = ", ".join(text for text, _ in parts)
    Path(os.environ["KVSHARE_GATE_REPORT"]).write_text("\n".join([*counts, summary, ""]))
