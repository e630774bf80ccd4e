"""Skips that continuous integration accepts, each with its reason; any other one fails it there.

A pytest plugin (`tests/conftest.py` names it) that acts where $CI is `true`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import pytest

ALLOWED: Mapping[str, str] = {
    "pip reaches no package index": "the environment of a device is made from the index",
    "only root can mount a small disk": "a disk that fills up needs a mount",
    "mounting is not allowed here": "containers forbid it to root too",
    "needs glibc": "other C libraries keep no freed memory to set",
    "this onnxruntime aligns what it saves": "newer versions have nothing left to work around",
}
"""By regular expression for the whole reason that a test gives."""

_Skip = tuple[str, str]
_SKIPPED = pytest.StashKey[list[_Skip]]()


def unlisted(reason: str) -> bool:
    """Return whether no allowed skip gives this reason."""
    return not any(re.fullmatch(allowed, reason) for allowed in ALLOWED)


class _Skips:
    """Collects the unlisted skips of a session, those of its workers too."""

    def __init__(self, config: pytest.Config) -> None:
        self._found: list[_Skip] = []
        config.stash[_SKIPPED] = self._found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._take(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._take(report)

    def _take(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        assert isinstance(report.longrepr, tuple)
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if unlisted(reason):
            self._found.append((report.nodeid, reason))


def pytest_configure(config: pytest.Config) -> None:
    """Start collecting; a worker's reports come to whoever started it."""
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Skips(config), "unlisted-skips")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that would pass."""
    if session.config.stash.get(_SKIPPED, []) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests and their reasons."""
    found = terminalreporter.config.stash.get(_SKIPPED, [])
    if not found:
        return
    terminalreporter.section("skips that tests/support/skips.py does not list", red=True)
    for test, reason in found:
        terminalreporter.write_line(f"{test}: {reason}")
