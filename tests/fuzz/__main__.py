"""Play random scripts on two kernels at once: `python -m tests.fuzz --seconds 60`.

A script that showed a difference is replayed on either kernel:
`python -m tests.fuzz --replay FILE --backend kernel`.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Final

from gmem.testing.conformance.kernel import NoKernelError
from gmem.testing.hosts import missing_here
from tests.fuzz.campaign import Campaign
from tests.fuzz.kernels import EMULATOR, KERNEL, player_on
from tests.fuzz.operations import read_script, write_script
from tests.fuzz.player import ABSENT

FAILURE: Final = Path("build/fuzz/failure.jsonl")
SEEDS: Final = 1 << 32


def main() -> int:
    """Do as told; 1 after a difference, 0 also where there is no kernel to ask."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, help="the same seed is the same scripts")
    parser.add_argument("--replay", type=Path, help="a script of one operation a line")
    parser.add_argument("--backend", choices=(KERNEL, EMULATOR), default=KERNEL)
    parser.add_argument("--failure", type=Path, default=FAILURE, help="where it goes")
    arguments = parser.parse_args()
    try:
        if arguments.replay is not None:
            return replay(arguments.replay, arguments.backend)
        if missing := missing_here():
            print(f"skipped: the emulated host {missing}")
            return 0
        return fuzz(arguments.seconds, arguments.seed, arguments.failure)
    except NoKernelError as error:
        print(f"skipped: {error}")
        return 0


def fuzz(seconds: float, seed: int | None, failure: Path) -> int:
    """Run a campaign, print what it did; write the script of a difference down."""
    seed = secrets.randbelow(SEEDS) if seed is None else seed
    print(f"seed {seed}", flush=True)
    with player_on(KERNEL) as kernel, player_on(EMULATOR) as emulator:
        report = Campaign(kernel, emulator).run(seconds=seconds, seed=seed)
    print("\n".join(report.lines()))
    if report.failure is None:
        return 0
    write_script(failure, report.script)
    for backend in (KERNEL, EMULATOR):
        print(f"python -m tests.fuzz --replay {failure} --backend {backend}")
    return 1


def replay(script: Path, backend: str) -> int:
    """Play a script on one kernel and print each result."""
    with player_on(backend) as player:
        for operation in read_script(script):
            result = player.play(operation)
            if result != ABSENT:
                print(f"{result:12} {operation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
