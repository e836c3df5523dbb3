"""pytest plug-in of the gate: write what a run counted to the file $KVSHARE_GATE_REPORT.

Its first line is the number of GPU tests that did not run, skipped and deselected ones
alike; its second is pytest's own summary.
"""

import os
from pathlib import Path

import pytest

_skipped: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "gpu" in report.keywords:
        _skipped.add(report.nodeid)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _skipped.update(item.nodeid for item in items if item.get_closest_marker("gpu"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    parts, _ = terminalreporter.build_summary_stats_line()
    summary = ", ".join(text for text, _ in parts)
    Path(os.environ["KVSHARE_GATE_REPORT"]).write_text(f"{len(_skipped)}\n{summary}\n")
