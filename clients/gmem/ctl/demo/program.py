"""The child's side of a demo program: JSON lines in, JSON lines out.

    {"do": "write", "offset": 0}     ->     {"ok": {"written": 4096}}
                                            {"error": {"reason": ..., ...}}

A program ends at the end of its input, so that none outlives the demo. It maps views,
and therefore has no event loop and no gRPC.

With `--socket PATH` the lines come and go by the first connection to a socket there,
for a demo in another container; the program then says first where it runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from gmem.uapi.errors import KernelError, TransportError

Handler: TypeAlias = Callable[..., dict[str, Any]]


def serve(name: str, handlers: Mapping[str, Handler]) -> None:
    """Answer requests under the process name `name` until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path)
    path: Path | None = parser.parse_args().socket
    # The name that /proc/PID/comm shows, and with it an error that names who maps.
    Path("/proc/self/comm").write_text(name)
    # One of the programs is meant to die by a signal; its core is of no use.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if path is None:
        _obey(sys.stdin, sys.stdout, handlers)
    else:
        with _accept(path) as connection, connection.makefile("rw") as lines:
            lines.write(json.dumps({"hostname": socket.gethostname()}) + "\n")
            lines.flush()
            _obey(lines, lines, handlers)


def _accept(path: Path) -> socket.socket:
    """Wait at `path` for whoever tells the demo; only he is heard."""
    # Of an earlier life of this container: nobody listens there.
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        connection, _ = listener.accept()
    path.unlink()
    return connection


def _obey(requests: TextIO, answers: TextIO, handlers: Mapping[str, Handler]) -> None:
    for line in requests:
        request = json.loads(line)
        answer = _answer(handlers[request.pop("do")], request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(handler: Handler, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": handler(**arguments)}
    except KernelError as error:
        return {
            "error": {
                "reason": error.reason.value,
                "sentence": error.sentence,
                "numbers": error.numbers,
            }
        }
    except TransportError as error:
        names = {"service": error.service, "target": error.target}
        return {"dead": {"sentence": str(error), **names}}
