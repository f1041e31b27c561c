"""What every test run says and refuses: skips with their reasons, ring markers."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gmem.runtime.backend import Backend
from gmem.testing.watchdog import FuseWatchdog
from tests.sim.lineages import played
from tests.support.backends import backend_of, parametrize
from tests.support.dealing import scope_of
from tests.support.requirements import require_fuse, require_root

TESTS = Path(__file__).parent
# A test that serves FUSE has this long before its connections are aborted; less
# than the timeout of a test, so that the hang ends with a reason.
FUSE_BOUND_SECONDS = 60.0


def pytest_configure() -> None:
    # With rich installed structlog draws a traceback in a box, which takes half a
    # second: longer than a hasty client of ours waits.
    plain = structlog.dev.ConsoleRenderer(
        exception_formatter=structlog.dev.plain_traceback
    )
    processors = [*structlog.get_config()["processors"][:-1], plain]
    structlog.configure(processors=processors)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gmem")
    group.addoption("--seeds", type=int, default=200, help="seeds for tests/sim")
    group.addoption(
        "--lineage", type=played, help="all seeds are of this one; default: by turns"
    )
    group.addoption(
        "--kills", type=int, default=15, help="kills of a service in test_survival"
    )
    group.addoption(
        "--steps", type=int, default=25_000, help="steps of all machines of tests/model"
    )
    group.addoption("--model-seed", type=int, help="default: the same steps each time")
    group.addoption(
        "--no-shrink", action="store_true", help="a failure of tests/model as found"
    )
    group.addoption("--first-seed", type=int, default=0, help="the first of them")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in these directories starts processes: nobody can forget to say."""
    for item in items:
        path = str(item.path)
        for name in ("cluster", "compose"):
            if path.startswith(f"{TESTS}/{name}/"):
                item.add_marker(name)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    # Modules and thousands of tests stay to the end: nobody needs to look through them
    # for garbage again and again.
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal tests that share a host, or histories, to one worker: each is made once."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = scope_of
    return scheduling


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc)


def pytest_runtest_setup(item: pytest.Item) -> None:
    fuse = item.get_closest_marker("fuse") is not None
    if fuse and backend_of(item) is Backend.FUSE:
        require_fuse()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("") + terminalreporter.getreports("passed")
    lines = [
        value for r in reports for key, value in r.user_properties if key == "line"
    ]
    if lines:
        terminalreporter.section("reports")
        for line in sorted(set(lines)):
            terminalreporter.write_line(str(line))

    skipped = terminalreporter.getreports("skipped")
    reasons = Counter(_skip_reason(report) for report in skipped)
    terminalreporter.write_line(f"skipped tests: {len(skipped)}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count}: {reason}")


def _skip_reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


@pytest.fixture
def report_line(
    record_property: Callable[[str, object], None],
) -> Callable[[str], None]:
    """Print a line in the section "reports" at the end of the run, also under xdist."""
    return lambda line: record_property("line", line)


@pytest.fixture
def fuse_watchdog() -> Iterator[FuseWatchdog]:
    """A process that aborts the FUSE connections it is told of, if the test hangs."""
    require_fuse()
    require_root()
    with FuseWatchdog(bound_seconds=FUSE_BOUND_SECONDS) as watchdog:
        yield watchdog
    if watchdog.aborted:
        pytest.fail(f"the watchdog aborted the FUSE connections {watchdog.aborted}")
