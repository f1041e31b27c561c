"""The three clients for programs without asyncio: the same methods, which block.

    from gmem.client.sync import VmmClient

    with VmmClient("unix:/run/gmem/vmm-0.sock") as vmm:
        vm = vmm.create_vm(vm_id="first")

All of them share one event loop in one background thread, which begins with the first
client that is opened and ends when the last is closed. Any thread may call. A process
that was forked from one with open clients cannot use them: spawn instead.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Sequence,
)
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Self, TypeVar

from gmem import client as aio
from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.host_allocator.v1 import host_allocator_pb2
from gmem.api.vmm.v1 import vmm_pb2
from gmem.client.base import ServiceClient
from gmem.client.connection import Patience
from gmem.client.guest_memfd import Bytes

__all__ = [
    "GuestMemfdClient",
    "HostAllocatorClient",
    "RemoteMemory",
    "VcpuRun",
    "VmmClient",
]

C = TypeVar("C", bound=ServiceClient)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Background:
    """The loop's thread, while anybody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    def begin(self) -> None:
        """Count a user; the first starts the thread."""
        with self._lock:
            if self._users == 0:
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="gmem-client", daemon=True
                )
                self._thread.start()
            self._users += 1

    def end(self) -> None:
        """Uncount a user; the last ends the thread."""
        with self._lock:
            self._users -= 1
            loop, thread = self._loop, self._thread
            if self._users or loop is None or thread is None:
                return
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            self._loop = self._thread = None

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Await `make()` on the loop; the calling thread waits.

        RuntimeError in a forked process, and in a thread that runs a loop itself.
        """
        loop = self._require_loop()

        async def awaited() -> T:
            return await make()

        future: Future[T] = asyncio.run_coroutine_threadsafe(awaited(), loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C, or the caller's own: the call must not go on behind its back.
            future.cancel()
            raise

    def _require_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._pid != os.getpid():
            raise RuntimeError(
                "this client is not open in this process: open it with `with`, and "
                "spawn processes instead of forking them"
            )
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._loop
        raise RuntimeError(
            "a blocking client would stop this event loop: use gmem.client here"
        )


_background = _Background()


class _Client(Generic[C]):
    """A client of one service; open inside `with`."""

    ASYNC: ClassVar[type[ServiceClient]]

    def __init__(
        self,
        target: str,
        *,
        client: str = "gmem-client",
        incarnation: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        """As ServiceClient; nothing is connected before `with`."""
        self.target = target
        self._options = {
            "client": client,
            "incarnation": incarnation,
            "patience": patience,
        }
        self._inner: C | None = None

    def __enter__(self) -> Self:
        """Connect."""
        _background.begin()
        try:
            self._inner = _background.run(self._connect)
        except BaseException:
            _background.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the channel."""
        try:
            _background.run(self.inner.close)
        finally:
            self._inner = None
            _background.end()

    @property
    def inner(self) -> C:
        """The client of gmem.client behind this one; RuntimeError outside `with`."""
        if self._inner is None:
            raise RuntimeError("this client is not open: use it inside `with`")
        return self._inner

    async def _connect(self) -> C:
        made: Any = self.ASYNC(self.target, **self._options)  # type: ignore[arg-type]
        inner: C = made
        return inner

    def _iterate(self, make: Callable[[C], AsyncGenerator[T]]) -> Generator[T]:
        """Iterate over a stream; closing the iterator cancels the call."""
        inner = self.inner

        async def opened() -> AsyncGenerator[T]:
            return make(inner)

        stream = _background.run(opened)
        try:
            while True:
                try:
                    yield _background.run(stream.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            _background.run(stream.aclose)


def _blocking(
    method: Callable[Concatenate[C, P], Awaitable[R]],
) -> Callable[Concatenate[_Client[C], P], R]:
    """Return the method of `_Client` that awaits `method` on the loop."""

    def call(self: _Client[C], /, *args: P.args, **kwargs: P.kwargs) -> R:
        inner = self.inner
        return _background.run(lambda: method(inner, *args, **kwargs))

    call.__name__ = method.__name__
    call.__doc__ = method.__doc__
    return call


class HostAllocatorClient(_Client[aio.HostAllocatorClient]):
    """gmem.client.HostAllocatorClient, blocking."""

    ASYNC = aio.HostAllocatorClient

    get_capabilities = _blocking(aio.HostAllocatorClient.get_capabilities)
    get_statistics = _blocking(aio.HostAllocatorClient.get_statistics)
    get_page_flags = _blocking(aio.HostAllocatorClient.get_page_flags)
    list_pools = _blocking(aio.HostAllocatorClient.list_pools)
    update_pool = _blocking(aio.HostAllocatorClient.update_pool)
    demote_pool = _blocking(aio.HostAllocatorClient.demote_pool)
    update_vmemmap_optimization = _blocking(
        aio.HostAllocatorClient.update_vmemmap_optimization
    )
    reserve = _blocking(aio.HostAllocatorClient.reserve)
    allocate = _blocking(aio.HostAllocatorClient.allocate)
    split = _blocking(aio.HostAllocatorClient.split)
    reconstruct = _blocking(aio.HostAllocatorClient.reconstruct)
    free = _blocking(aio.HostAllocatorClient.free)
    error = _blocking(aio.HostAllocatorClient.error)
    inject_memory_error = _blocking(aio.HostAllocatorClient.inject_memory_error)
    unpoison_memory = _blocking(aio.HostAllocatorClient.unpoison_memory)
    list_memory_errors = _blocking(aio.HostAllocatorClient.list_memory_errors)
    unreserve = _blocking(aio.HostAllocatorClient.unreserve)
    list_reservations = _blocking(aio.HostAllocatorClient.list_reservations)
    create_cgroup = _blocking(aio.HostAllocatorClient.create_cgroup)
    update_cgroup = _blocking(aio.HostAllocatorClient.update_cgroup)
    delete_cgroup = _blocking(aio.HostAllocatorClient.delete_cgroup)
    get_cgroup = _blocking(aio.HostAllocatorClient.get_cgroup)
    list_cgroups = _blocking(aio.HostAllocatorClient.list_cgroups)
    list_folios = _blocking(aio.HostAllocatorClient.list_folios)

    def watch(
        self, start_revision: int = 0
    ) -> Generator[host_allocator_pb2.WatchResponse]:
        """Yield changes from `start_revision` on; close it after use."""
        return self._iterate(lambda inner: inner.watch(start_revision))


class GuestMemfdClient(_Client[aio.GuestMemfdClient]):
    """gmem.client.GuestMemfdClient, blocking."""

    ASYNC = aio.GuestMemfdClient

    get_capabilities = _blocking(aio.GuestMemfdClient.get_capabilities)
    create_guest_memfd = _blocking(aio.GuestMemfdClient.create_guest_memfd)
    get_guest_memfd = _blocking(aio.GuestMemfdClient.get_guest_memfd)
    list_guest_memfds = _blocking(aio.GuestMemfdClient.list_guest_memfds)
    delete_guest_memfd = _blocking(aio.GuestMemfdClient.delete_guest_memfd)
    fallocate = _blocking(aio.GuestMemfdClient.fallocate)
    bind_memslot = _blocking(aio.GuestMemfdClient.bind_memslot)
    unbind_memslot = _blocking(aio.GuestMemfdClient.unbind_memslot)
    get_pfn = _blocking(aio.GuestMemfdClient.get_pfn)
    convert_range = _blocking(aio.GuestMemfdClient.convert_range)
    set_mempolicy = _blocking(aio.GuestMemfdClient.set_mempolicy)
    get_mempolicy = _blocking(aio.GuestMemfdClient.get_mempolicy)
    populate_range = _blocking(aio.GuestMemfdClient.populate_range)
    pin_pages = _blocking(aio.GuestMemfdClient.pin_pages)
    keep_alive = _blocking(aio.GuestMemfdClient.keep_alive)
    unpin_pages = _blocking(aio.GuestMemfdClient.unpin_pages)
    open_view = _blocking(aio.GuestMemfdClient.open_view)
    write_range = _blocking(aio.GuestMemfdClient.write_range)
    inject_memory_error = _blocking(aio.GuestMemfdClient.inject_memory_error)
    unpoison_memory = _blocking(aio.GuestMemfdClient.unpoison_memory)
    get_operation = _blocking(aio.GuestMemfdClient.get_operation)
    list_operations = _blocking(aio.GuestMemfdClient.list_operations)

    def watch(
        self, start_revision: int = 0
    ) -> Generator[guest_memfd_pb2.WatchResponse]:
        """Yield changes from `start_revision` on; close it after use."""
        return self._iterate(lambda inner: inner.watch(start_revision))

    def read_range(self, *, name: str, offset: int, size: int) -> Generator[bytes]:
        """Yield the bytes of shared pages in chunks; for who can map nothing.

        It goes on where it was when the service is started again in between. Close it
        after use. NotFaultable at the first private page, whose `error_offset` it has.
        """
        return self._iterate(
            lambda inner: inner.read_range(name=name, offset=offset, size=size)
        )


class RemoteMemory:
    """gmem.client.RemoteMemory, blocking."""

    def __init__(self, client: GuestMemfdClient, name: str) -> None:
        """Use `client`, which is open, for the inode `name`."""
        self._inner = aio.RemoteMemory(client.inner, name)
        self.name = name

    def read(self, offset: int, size: int) -> bytes:
        """Return all bytes of a range, or none."""
        return _background.run(lambda: self._inner.read(offset, size))

    def write(self, offset: int, data: Bytes) -> None:
        """Write bytes; a refusal says in `stored` how many of them are written."""
        _background.run(lambda: self._inner.write(offset, data))


class VcpuRun:
    """gmem.client.VcpuRun, blocking; made by VmmClient.run."""

    def __init__(self, inner: aio.VcpuRun) -> None:
        self._inner = inner

    def exits(self) -> Iterator[vmm_pb2.RunResponse]:
        """Yield exits; after each one but HLT the caller must `resume`."""
        exits = self._inner.exits()
        while True:
            try:
                yield _background.run(exits.__anext__)
            except StopAsyncIteration:
                return

    def resume(self, value: int = 0) -> None:
        """Enter the guest again."""
        _background.run(lambda: self._inner.resume(value))

    def results(self) -> list[vmm_pb2.Result]:
        """Run to HLT and return all results; any other exit is resumed with 0."""
        return _background.run(self._inner.results)


class VmmClient(_Client[aio.VmmClient]):
    """gmem.client.VmmClient, blocking."""

    ASYNC = aio.VmmClient

    get_capabilities = _blocking(aio.VmmClient.get_capabilities)
    create_vm = _blocking(aio.VmmClient.create_vm)
    get_vm = _blocking(aio.VmmClient.get_vm)
    list_vms = _blocking(aio.VmmClient.list_vms)
    delete_vm = _blocking(aio.VmmClient.delete_vm)
    create_guest_memfd = _blocking(aio.VmmClient.create_guest_memfd)
    set_user_memory_region2 = _blocking(aio.VmmClient.set_user_memory_region2)
    set_memory_attributes = _blocking(aio.VmmClient.set_memory_attributes)
    get_memory_attributes = _blocking(aio.VmmClient.get_memory_attributes)
    populate_memory = _blocking(aio.VmmClient.populate_memory)
    create_vcpu = _blocking(aio.VmmClient.create_vcpu)
    pre_fault_memory = _blocking(aio.VmmClient.pre_fault_memory)
    get_stage2 = _blocking(aio.VmmClient.get_stage2)
    invalidate_begin = _blocking(aio.VmmClient.invalidate_begin)
    invalidate_end = _blocking(aio.VmmClient.invalidate_end)

    @contextmanager
    def run(
        self,
        *,
        vm: str,
        program: Sequence[vmm_pb2.Instruction],
        vcpu: int = 0,
        policy: vmm_pb2.Policy.ValueType = vmm_pb2.POLICY_CONVERT,
    ) -> Iterator[VcpuRun]:
        """KVM_RUN as a stream of exits; use as `with client.run(...) as run`."""
        made = self.inner.run(vm=vm, program=program, vcpu=vcpu, policy=policy)
        inner = _background.run(made.__aenter__)
        try:
            yield VcpuRun(inner)
        except BaseException as error:
            kind, trace = type(error), error.__traceback__
            failure = error
            _background.run(lambda: made.__aexit__(kind, failure, trace))
            raise
        else:
            _background.run(lambda: made.__aexit__(None, None, None))

    def watch(self, start_revision: int = 0) -> Generator[vmm_pb2.WatchResponse]:
        """Yield changes from `start_revision` on; close it after use."""
        return self._iterate(lambda inner: inner.watch(start_revision))
