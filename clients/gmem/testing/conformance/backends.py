"""The kernels that can be asked, by the name that `--backend` has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from gmem.ctl.errors import ControlError
from gmem.testing.conformance.emulator import SHAPE, Emulator
from gmem.testing.conformance.kernel import DEV_KVM, AbsentKernel, Kernel, NoKernelError
from gmem.testing.conformance.kvm import Backend
from gmem.testing.hosts import missing_here, running_host


@contextmanager
def emulated() -> Iterator[Backend]:
    """Start a host of its own, and end it afterwards. Raises ControlError."""
    if why := missing_here():
        raise ControlError(f"no host can be emulated here: it {why}")
    with running_host(SHAPE) as host, Emulator(host) as backend:
        yield backend


@contextmanager
def this_machine(device: Path = DEV_KVM) -> Iterator[Backend]:
    """Open /dev/kvm; where it cannot be asked anything, every case is a skip."""
    kernel: Backend
    try:
        kernel = Kernel(device)
    except NoKernelError as error:
        kernel = AbsentKernel(str(error))
    with kernel:
        yield kernel


BACKENDS: Final[Mapping[str, Callable[[], AbstractContextManager[Backend]]]] = {
    "emulator": emulated,
    "kernel": this_machine,
}


def open_backend(name: str) -> AbstractContextManager[Backend]:
    """Return a kernel to enter. Raises ControlError for a name that is none."""
    if name not in BACKENDS:
        raise ControlError(f"--backend {name}: there are {', '.join(BACKENDS)}")
    return BACKENDS[name]()
