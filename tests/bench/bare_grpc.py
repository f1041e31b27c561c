"""``python -m tests.bench.bare_grpc PATH``: a grpc.aio server that echoes, no more.

Bytes in, the same bytes out, over the UNIX socket PATH; no protobuf, no interceptor.
Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

SERVICE, METHOD = "bench.Bare", "Echo"


async def echo(request: bytes, _context: Any) -> bytes:
    return request


async def main() -> None:
    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    handlers = grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})
    server.add_generic_rpc_handlers((handlers,))
    server.add_insecure_port(f"unix:{sys.argv[1]}")
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
