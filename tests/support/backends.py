"""Which tests run on which backend, and what cannot hold without faults.

A module whose tests mean the same on both backends says `BACKENDS = BOTH`: each of its
tests that has a host is then run on a host of either kind. `WEAKER` lists those that
cannot hold with plain memfds, and why. They are run all the same, and must fail: an
entry that is not needed any more fails the run, and so does one that names no test
(tests/tidy/test_backends.py).
"""

from __future__ import annotations

from typing import Final

import pytest

from gmem.runtime.backend import Backend

BOTH: Final = (Backend.FUSE, Backend.MEMFD)

SIGBUS_IS_ZEROS: Final = "nobody is asked at a fault: a private page reads as zeros"
NO_SYSTEM_CALLS: Final = "a system call on a memfd does not reach the service"

_IN_GUEST_MEMFD: Final = {
    "test_a_private_page_is_signal_7_and_its_neighbour_works": SIGBUS_IS_ZEROS,
    "test_an_inode_that_no_slot_binds_is_signal_7": SIGBUS_IS_ZEROS,
    "test_a_load_maps_cached_neighbours_too_a_listed_deviation": (
        "the kernel maps no neighbours of a page of a memfd: deviation 56 is FUSE's"
    ),
    "test_the_counters_move_as_in_the_reporting_test": (
        "fstat shows the memfd's blocks; and " + NO_SYSTEM_CALLS
    ),
    "test_system_calls_on_the_view_are_refused_as_by_the_kernel": NO_SYSTEM_CALLS,
    "test_fallocate_and_fstat_through_the_view_agree_with_the_rpc": NO_SYSTEM_CALLS,
    "test_a_guest_view_shows_what_the_host_view_refuses": (
        "a hole of the guest view is zeros; what the guest may touch its own "
        "translations decide"
    ),
}
_IN_RFC_V2: Final = {
    "test_without_support_shared_mmap_is_enodev_c083": (
        "mmap is refused by opening the file for writing alone: EACCES"
    ),
    "test_ioctls_that_are_refused": NO_SYSTEM_CALLS,
}
WEAKER: Final[dict[str, str]] = {
    f"cluster/{file}::{name}": why
    for file, entries in (
        ("test_guest_memfd.py", _IN_GUEST_MEMFD),
        ("test_rfc_v2.py", _IN_RFC_V2),
    )
    for name, why in entries.items()
}
"""`ring/file::test`, and why it cannot hold."""


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module on each backend that it names."""
    backends = getattr(metafunc.module, "BACKENDS", None)
    if backends is None or "backend" not in metafunc.fixturenames:
        return
    metafunc.parametrize(
        "backend", [_param(metafunc, one) for one in backends], indirect=True
    )


def backend_of(item: pytest.Item) -> Backend:
    """Return what the host of a collected test is made with."""
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("backend") if callspec is not None else None
    return found if isinstance(found, Backend) else Backend.FUSE


def _param(metafunc: pytest.Metafunc, backend: Backend) -> object:
    path = metafunc.definition.path
    why = WEAKER.get(f"{path.parent.name}/{path.name}::{metafunc.function.__name__}")
    if backend is Backend.FUSE or why is None:
        return pytest.param(backend, id=backend.value)
    weaker = pytest.mark.xfail(strict=True, reason=why)
    return pytest.param(backend, id=backend.value, marks=weaker)
