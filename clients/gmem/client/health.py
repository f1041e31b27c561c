"""Whether a service answers: the gRPC health protocol.

`python -m gmem.client.health TARGET` asks once, for health checks of containers.
Exit status: 0 when it serves, 1 when it stops, 3 when nobody answers.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final, TypeAlias

import grpc
from grpc_health.v1 import health_pb2

from gmem.uapi.errors import TransportError

# By name: the published types of the stub class do not know its methods.
_METHOD: Final = "/grpc.health.v1.Health/Check"
_Check: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[
    health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
]


async def check_health(target: str, *, timeout: float = 2.0) -> bool:
    """Ask the service at `target` once; True when it serves, False when it stops.

    `timeout` is in seconds. Raises TransportError when nobody answers.
    """
    async with grpc.aio.insecure_channel(target) as channel:
        check: _Check = channel.unary_unary(
            _METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        call = check(health_pb2.HealthCheckRequest(), timeout=timeout)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            raise TransportError(
                f"nobody answers at {target} ({error.code().name}): "
                "look with gmemctl status",
                target=target,
            ) from error
        finally:
            # grpc.aio does not cancel a call whose awaiting task was cancelled.
            call.cancel()
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def main(target: str) -> int:
    """Ask the service at `target` once; return the exit status of the module."""
    try:
        return 0 if asyncio.run(check_health(target)) else 1
    except TransportError as error:
        sys.stderr.write(f"{error}\n")
        return 3


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m gmem.client.health TARGET")
    sys.exit(main(sys.argv[1]))
