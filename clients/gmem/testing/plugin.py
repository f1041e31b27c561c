"""The pytest plugin of the distribution: `pip install gmem-emulator[testing]`.

    @pytest.mark.gmem(lineages=["RFC_V1", "RFC_V2"], page_sizes=["4K", "1G"])
    def test_my_vmm(gmem_vm, gmem_inode, guest_memory, gmem_audit):
        ...

Fixtures: `gmem_host` (a running host), `gmem_vm` (a VM of it), `gmem_inode` (a
guest_memfd, bound to the VM's slot 0), `guest_memory` (a process that has it mapped),
`gmem_audit` (fails the test if it leaves anything behind). The host is one for all
tests, or one for a test that is marked `gmem(host="test")`.

Every plain pytest run imports this file, so it imports nothing big by itself.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from gmem.runtime.config import HostShape
    from gmem.testing.artifacts import Marks
    from gmem.testing.conformance.emulator import Emulator
    from gmem.testing.conformance.kvm import GuestMemfd, Vm
    from gmem.testing.conformance.toucher import Window
    from gmem.testing.hosts import EmulatedHost

MARKER: Final = "gmem"
OPTIONS: Final = frozenset({"lineages", "page_sizes", "pages", "host", "private"})
SESSION, TEST = "session", "test"
_PARAMETERS: Final = {"gmem_lineage": "lineages", "gmem_page_size": "page_sizes"}
GPA: Final = 4 << 30
"""Where `gmem_inode` is bound in `gmem_vm`."""
DEFAULT_LINEAGE: Final = "RFC_V1"
DEFAULT_PAGE_SIZE: Final = "4K"
_MARKS: Final[pytest.StashKey[Marks]] = pytest.StashKey()
_HELP: Final = (
    "gmem(lineages=[...], page_sizes=[...], pages=1, private=False, host='session'): "
    "what an emulated host gives a test; it runs once for each lineage and page size"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how hosts are shared, and where artefacts go."""
    group = parser.getgroup("gmem", "emulated hosts")
    group.addoption(
        "--gmem-host",
        choices=(SESSION, TEST),
        default=SESSION,
        help="one emulated host for the session, or one for each test that needs one",
    )
    group.addoption(
        "--gmem-artifacts",
        type=Path,
        default=Path("gmem-artifacts"),
        help="directory for logs, trace and state of tests that fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _HELP)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a marked test once for each lineage and page size."""
    options = _options(metafunc.definition)
    for fixture, option in (
        ("gmem_lineage", "lineages"),
        ("gmem_page_size", "page_sizes"),
    ):
        if option in options and fixture in metafunc.fixturenames:
            values = [str(value) for value in options[option]]
            metafunc.parametrize(fixture, values, indirect=True, ids=values)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep what a host has to say about a test that failed."""
    report = yield
    if report.failed and _MARKS in item.stash:
        below = item.config.getoption("--gmem-artifacts")
        saved = item.stash[_MARKS].save(below.absolute(), item.nodeid)
        report.sections.append(("emulated host", f"logs, trace and state: {saved}"))
    return report


# Hosts.


@pytest.fixture(scope="session")
def gmem_host_shape() -> HostShape:
    """Nodes, memory and pools of the hosts; override it to have others."""
    from gmem.testing.conformance.emulator import SHAPE  # noqa: PLC0415

    return SHAPE


@pytest.fixture(scope="session")
def gmem_session_kernel(gmem_host_shape: HostShape) -> Iterator[Emulator]:
    """The host that tests share, as a kernel that can be asked."""
    with _kernel(gmem_host_shape) as kernel:
        yield kernel


@pytest.fixture
def gmem_kernel(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """The test's host as a kernel: KVM's calls, see gmem.testing.conformance.kvm."""
    from gmem.testing.artifacts import Marks  # noqa: PLC0415

    scope = _options(request.node).get("host", request.config.getoption("--gmem-host"))
    if scope == TEST:
        with _kernel(request.getfixturevalue("gmem_host_shape")) as kernel:
            request.node.stash[_MARKS] = Marks.of(kernel)
            yield kernel
        return
    kernel = request.getfixturevalue("gmem_session_kernel")
    kernel.host.rearm()
    request.node.stash[_MARKS] = Marks.of(kernel)
    yield kernel
    if kernel.host.watchdog.aborted:
        pytest.fail("the watchdog had to end the host's files: a test hung")


@pytest.fixture
def gmem_host(gmem_kernel: Emulator) -> EmulatedHost:
    """A running host: `target(service)`, `pid(service)`, `kill`, `log`, `run_dir`."""
    return gmem_kernel.host


# What a test asks of it.


@pytest.fixture
def gmem_lineage(request: pytest.FixtureRequest) -> str:
    """The kernel series; the marker may name several."""
    return str(getattr(request, "param", DEFAULT_LINEAGE))


@pytest.fixture
def gmem_page_size(request: pytest.FixtureRequest) -> int:
    """Bytes of a page of `gmem_inode`; the marker may name several, as 4K, 2M, 1G."""
    from gmem.runtime.config import parse_size  # noqa: PLC0415

    return parse_size(str(getattr(request, "param", DEFAULT_PAGE_SIZE)))


@pytest.fixture
def gmem_audit(gmem_kernel: Emulator) -> Iterator[None]:
    """Fail a test that leaves anything: processes, mounts, descriptors, counts, ...."""
    from gmem.testing.audit import Audit  # noqa: PLC0415

    audit = Audit(gmem_kernel)
    yield
    if left := audit.left():
        pytest.fail("left behind: " + "; ".join(left))


@pytest.fixture
def gmem_vm(
    request: pytest.FixtureRequest, gmem_kernel: Emulator, gmem_lineage: str
) -> Iterator[Vm]:
    """A VM of the lineage, of the type that it has private memory for."""
    from gmem.testing.conformance.dialect import DIALECTS  # noqa: PLC0415

    if "gmem_audit" in request.fixturenames:
        # Whatever the order of the arguments: the audit looks last.
        request.getfixturevalue("gmem_audit")
    vm_type = DIALECTS[gmem_lineage].vm_type
    vm = gmem_kernel.create_vm(lineage=gmem_lineage, vm_type=vm_type)
    yield vm
    vm.close()


@pytest.fixture
def gmem_inode(
    request: pytest.FixtureRequest, gmem_vm: Vm, gmem_lineage: str, gmem_page_size: int
) -> Iterator[GuestMemfd]:
    """A guest_memfd that the host may touch, bound to slot 0 at gmem.testing's GPA."""
    from gmem.testing.conformance import dialect  # noqa: PLC0415
    from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD  # noqa: PLC0415

    options = _options(request.node)
    flags = dialect.DIALECTS[gmem_lineage].private if options.get("private") else None
    if flags is None and options.get("private"):
        pytest.skip(f"{gmem_lineage} has no file that starts private and can be mapped")
    size = gmem_page_size * int(options.get("pages", 1))
    file = gmem_vm.create_guest_memfd(
        size,
        dialect.create_flags(gmem_lineage, gmem_page_size, flags),
        dialect.page_order(gmem_lineage, gmem_page_size),
    )
    try:
        if flags is None:
            dialect.share(gmem_lineage, gmem_page_size, gmem_vm, file)
        gmem_vm.set_user_memory_region2(
            slot=0,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=GPA,
            memory_size=size,
            guest_memfd=file,
        )
        yield file
    finally:
        file.close()


@pytest.fixture
def guest_memory(gmem_inode: GuestMemfd) -> Iterator[Window]:
    """The inode mapped by another process; a refused `load` or `store` kills it."""
    from gmem.testing.conformance.toucher import Toucher  # noqa: PLC0415

    with Toucher(gmem_inode) as toucher:
        yield toucher.map(gmem_inode.size)


@contextmanager
def _kernel(shape: HostShape) -> Iterator[Emulator]:
    """Start a host, or skip the test where this machine cannot have one."""
    from gmem.testing.conformance.emulator import Emulator  # noqa: PLC0415
    from gmem.testing.hosts import missing_here, running_host  # noqa: PLC0415

    if why := missing_here():
        pytest.skip(why)
    with running_host(shape) as host, Emulator(host) as kernel:
        yield kernel


def _options(node: pytest.Item | pytest.Function) -> Mapping[str, Any]:
    """Return what the closest marker says. UsageError for what it does not know."""
    marker = node.get_closest_marker(MARKER)
    if marker is None:
        return {}
    unknown = sorted(set(marker.kwargs) - OPTIONS)
    if unknown or marker.args:
        words = ", ".join([*map(repr, marker.args), *unknown])
        raise pytest.UsageError(f"{node.nodeid}: gmem({words}): write {_HELP}")
    return marker.kwargs
