"""Run histories from the command line: `python -m tests.sim --seed 8121 --trace`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.mutants.sim import SIM
from tests.sim.lineages import played


def main() -> int:
    """Run the seeds; print what went wrong with the command that repeats it."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--lineage", type=played, help="default: by the seed")
    parser.add_argument("--trace", action="store_true", help="print every effect")
    parser.add_argument("--hash", action="store_true", help="print the trace hashes")
    parser.add_argument("--mutant", choices=sorted(SIM), help="a mistake")
    arguments = parser.parse_args()
    if arguments.mutant is not None:
        SIM[arguments.mutant].install()

    # After the mutant is in place: this imports the cores.
    from tests.sim.campaign import run

    marks: Counter[str] = Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        show = print if arguments.trace else None
        history = run(seed, show, lineage=arguments.lineage)
        marks += history.marks
        if history.failure:
            print(f"{history.failure}\n{history.replay}")
            return 1
        if arguments.hash:
            print(seed, history.lineage, history.trace_hash)
        elif arguments.seeds == 1:
            print(f"{history.lineage} {seed}: {history.steps} steps, {history.options}")
    if not arguments.hash:
        for mark, count in sorted(marks.items()):
            print(f"{count:7} {mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
