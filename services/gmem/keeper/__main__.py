"""`python -m gmem.keeper`: hold the descriptors of one host until its service ends.

    python -m gmem.keeper --run-dir DIR --store-pages N [-- COMMAND...]
    python -m gmem.keeper --run-dir DIR --backend memfd [-- COMMAND...]

With the backend memfd it needs no privilege and no /dev/fuse. GMEM_BACKEND chooses it
too; nothing else does.
COMMAND starts the service again after a crash; without one the keeper waits until
somebody else has. With --spare one successor is loaded beforehand: COMMAND and the
flag --start-on-stdin. Exit status: 0 when the service stopped in order or on SIGTERM, 1
when it cannot start, 3 when the service died and was given up: the connection is
aborted then and mappings fail closed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from gmem.keeper import keep, making
from gmem.keeper.keep import Keeper, Options
from gmem.keeper.making import EXIT_CANNOT, CannotKeep, Terminated, log
from gmem.keeper.restarts import RESTARTS_MAX, ServicePlan
from gmem.runtime import fdpass
from gmem.runtime.backend import BACKEND_VARIABLE, Backend


def main() -> int:
    """Run the keeper; return its exit status."""
    arguments = _arguments()
    run_dir: Path = arguments.run_dir.resolve()
    options = Options(
        run_dir,
        _unfollowed(arguments.mount_point),
        _plan(arguments),
        arguments.take_over_seconds,
    )
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _terminate)
    path = run_dir / keep.SOCKET_NAME
    try:
        point = options.mount_point
        take_back = arguments.take_back or (
            arguments.or_take_back and keep.is_served(run_dir)
        )
        if point is not None and not take_back:
            keep.clean_stale(point)
            point.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        listener = fdpass.listen(path)
        if options.service.uid is not None:
            os.chown(path, options.service.uid, -1)
        held = None if take_back else _made(arguments, run_dir, point)
    except (CannotKeep, OSError) as error:
        log("cannot_start", error=str(error))
        return EXIT_CANNOT
    if held is not None:
        _say_ready(held)
    keeper = Keeper(held, listener, options)
    try:
        status = keeper.serve()
    except Terminated:
        status = keep.EXIT_OK
    # The path first: who finds no socket knows that nobody keeps.
    path.unlink(missing_ok=True)
    keeper.close()
    if keeper.held is not None:
        keep.end(keeper.held, options.mount_point, run_dir)
    _say_why(status)
    return status


def _made(
    arguments: argparse.Namespace, run_dir: Path, point: Path | None
) -> making.Held:
    if arguments.backend is Backend.MEMFD:
        return making.make_memfds()
    held = making.make(arguments.store_pages, run_dir)
    if point is not None and not held.attachable:
        raise CannotKeep("--mount-point needs CAP_SYS_ADMIN: leave it out")
    return held


def _say_ready(held: making.Held) -> None:
    survival = "on" if held.survival else "off: the kernel has no RESEND (6.9)"
    log(
        "ready",
        pid=os.getpid(),
        backend=held.backend.value,
        connection_id=held.connection_id,
        store_pages=held.nr_pages,
        crash_survival=survival,
        limits=held.limits,
    )


def _say_why(status: int) -> None:
    if status == keep.EXIT_SERVICE_DIED:
        log(
            "service_died",
            error="guest_memfd ended without saying so: a fuse connection is aborted "
            "and its mappings fail closed, memfds are dropped; start the host again",
        )
    else:
        log("stopped")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gmem.keeper", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--store-pages", type=_positive)
    parser.add_argument(
        "--backend",
        type=Backend,
        default=os.environ.get(BACKEND_VARIABLE) or Backend.FUSE,
        help="fuse or memfd",
    )
    parser.add_argument("--take-back", action="store_true")
    parser.add_argument(
        "--or-take-back",
        action="store_true",
        help="take back, where the service of a keeper that died still lives",
    )
    parser.add_argument("--mount-point", type=Path)
    parser.add_argument("--service-log", type=Path)
    parser.add_argument("--service-uid", type=int)
    parser.add_argument("--service-gid", type=int)
    parser.add_argument("--restarts-max", type=_positive, default=RESTARTS_MAX)
    parser.add_argument("--spare", action="store_true")
    parser.add_argument(
        "--take-over-seconds", type=float, default=keep.TAKE_OVER_SECONDS_MAX
    )
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    if arguments.backend is Backend.MEMFD:
        if arguments.mount_point is not None:
            parser.error("--mount-point: the backend memfd has no mount")
    elif (arguments.store_pages is None) is not arguments.take_back:
        parser.error("give --store-pages N for new views, or --take-back")
    if arguments.spare and not arguments.command:
        parser.error("--spare: give the COMMAND that it is a spare of")
    return arguments


def _plan(arguments: argparse.Namespace) -> ServicePlan:
    return ServicePlan(
        command=tuple(arguments.command),
        log=arguments.service_log,
        uid=arguments.service_uid,
        gid=arguments.service_gid,
        restarts_max=arguments.restarts_max,
        spare=arguments.spare,
    )


def _positive(word: str) -> int:
    number = int(word)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{word} is not a positive number")
    return number


def _unfollowed(path: Path | None) -> Path | None:
    """Resolve all but the last component: a dead mount there must not be asked."""
    if path is None:
        return None
    absolute = path.absolute()
    return absolute.parent.resolve() / absolute.name


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
