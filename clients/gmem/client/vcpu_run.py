"""KVM_RUN as seen by a VMM's vCPU thread: exits come out, answers go in.

async with client.run(vm=vm, program=[...], policy=POLICY_NONE) as run:
    async for exit in run.exits():
        if exit.WhichOneof("exit") == "hypercall":
            await run.resume(0)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self, TypeAlias

import grpc

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client.connection import Connection
from gmem.uapi.errors import InUse, Reason

_Call: TypeAlias = grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]
_Method: TypeAlias = grpc.aio.StreamStreamMultiCallable[pb.RunRequest, pb.RunResponse]

_FINAL = "hlt"
_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError)

END_SECONDS_MAX = 0.25
"""How long leaving a program that has not halted waits for the vCPU to be out."""


class VcpuRun:
    """One program on one vCPU; leaving the `async with` takes the vCPU out of it."""

    def __init__(
        self, connection: Connection, method: _Method, start: pb.RunStart
    ) -> None:
        """Made by VmmClient.run."""
        self._connection = connection
        self._method = method
        self._start = start
        self._call: _Call | None = None
        self.revision = 0
        """Of the last exit."""

    async def __aenter__(self) -> Self:
        """Start the program."""
        self._call = self._method()
        await self._write(pb.RunRequest(start=self._start))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the stream, wherever the program is.

        A vCPU that waits for an answer, or has halted, is out of the program when this
        returns; one that is busy hears of the end a moment later.
        """
        assert self._call is not None
        if kind is None:
            with contextlib.suppress(*_ENDED):
                async with asyncio.timeout(END_SECONDS_MAX):
                    await self._call.done_writing()
                    while isinstance(await self._call.read(), pb.RunResponse):
                        pass
        self._call.cancel()

    async def exits(self) -> AsyncGenerator[pb.RunResponse]:
        """Yield exits; after each one but HLT the caller must `resume`.

        Raises what the service refused with, or TransportError.
        """
        assert self._call is not None, "use `async with`"
        try:
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.RunResponse):
                    return
                self.revision = response.revision
                yield response
                if response.WhichOneof("exit") == _FINAL:
                    return
        except grpc.aio.AioRpcError as error:
            raise self._connection.translated(error) from error

    async def resume(self, value: int = 0) -> None:
        """Enter the guest again; `value` is what a hypercall or an MMIO read yields.

        Raises what ended the run meanwhile; STATE_WRONG after HLT.
        """
        await self._write(pb.RunRequest(resume=pb.RunResume(value=value)))

    async def results(self) -> list[pb.Result]:
        """Run to HLT and return all results; any other exit is resumed with 0."""
        results: list[pb.Result] = []
        async for response in self.exits():
            results += response.results
            if response.WhichOneof("exit") != _FINAL:
                await self.resume()
        return results

    async def _write(self, request: pb.RunRequest) -> None:
        assert self._call is not None, "use `async with`"
        try:
            try:
                await self._call.write(request)
            except asyncio.InvalidStateError:
                # The stream has ended: its status, if it failed, says why.
                await self._call.read()
                raise InUse(
                    Reason.STATE_WRONG, "the program is over; start another with run()"
                ) from None
        except grpc.aio.AioRpcError as error:
            # A write that meets the end of the stream on its way is INTERNAL to
            # grpc.aio, which then forgets the status: a TransportError without it.
            raise self._connection.translated(error) from error
