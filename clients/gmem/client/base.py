"""What the three clients share: a connection, as an async context manager."""

from __future__ import annotations

from types import TracebackType
from typing import ClassVar, Self

from gmem.api.types.v1.types_pb2 import RequestId
from gmem.client.connection import Connection, Patience


class ServiceClient:
    """A typed client of one service.

    Every method has the name of its rpc and takes the rpc's fields as keywords. It
    raises the classes of `gmem.client.errors`. Mutating methods take a `request_id`
    for callers that keep their own; without one a new one is made, and kept through
    repeats. `timeout` is in seconds, of one attempt.
    """

    SERVICE: ClassVar[str]

    def __init__(
        self,
        target: str,
        *,
        client: str = "gmem-client",
        incarnation: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Connect to `target` ("unix:PATH" or "HOST:PORT") when first needed.

        `client` names the caller in logs; `incarnation` is one lifetime of it.
        """
        self.connection = Connection(
            self.SERVICE,
            target,
            client=client,
            incarnation=incarnation,
            patience=patience,
        )

    @property
    def target(self) -> str:
        """Where the service is."""
        return self.connection.target

    @property
    def peer_incarnation(self) -> str | None:
        """The lifetime of the service that answered last; None before the first."""
        return self.connection.peer_incarnation

    def new_request_id(self) -> RequestId:
        """Return an id for one mutation, to be given again when it is repeated."""
        return self.connection.new_request_id()

    async def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        await self.connection.close()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the channel."""
        await self.close()
