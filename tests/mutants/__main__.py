"""Look whether tests find known mistakes: `python -m tests.mutants --layer model`."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tests.mutants.layers import LAYERS
from tests.mutants.mutant import Mutant
from tests.mutants.running import Verdict, require_caught, require_passed


def main() -> int:
    """Run the mutants of the layers; print a table; 1 where a test misses one."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__
    )
    parser.add_argument("--layer", choices=list(LAYERS), help="default: all")
    parser.add_argument("--only", help="mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    arguments = parser.parse_args()
    layers = [arguments.layer] if arguments.layer else list(LAYERS)
    mutants = {
        (layer, name): mutant
        for layer in layers
        for name, mutant in LAYERS[layer].items()
        if (arguments.only or "") in name
    }
    if not mutants:
        print(f"no mutant of {', '.join(layers)} is called like {arguments.only!r}")
        return 2
    problems = _without(mutants.values())
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(require_caught, mutants.values()))
    verdicts = dict(zip(mutants, found, strict=True))
    _print_table(mutants, verdicts)
    problems += [
        f"{layer}: {name}: {verdict.problem}"
        for (layer, name), verdict in verdicts.items()
        if verdict.problem
    ]
    for problem in problems:
        print(problem)
    print(f"{len(mutants)} mutants, {len(problems)} problems")
    return 1 if problems else 0


def _without(mutants: Iterable[Mutant]) -> list[str]:
    """Run each named test once without a mutant; return what did not pass."""
    named: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for mutant in mutants:
        named[mutant.options][mutant.caught_by] = None
    problems = []
    for options, tests in named.items():
        verdict = require_passed(list(tests), options)
        print(
            f"{len(tests)} tests without a mutant: {verdict.seconds:.0f} s", flush=True
        )
        if verdict.problem:
            problems.append(verdict.problem)
    return problems


def _print_table(
    mutants: Mapping[tuple[str, str], Mutant],
    verdicts: Mapping[tuple[str, str], Verdict],
) -> None:
    rows = [("MUTANT", "LAYER", "CAUGHT BY", "SECONDS")]
    for (layer, name), mutant in mutants.items():
        verdict = verdicts[layer, name]
        caught_by = "-" if verdict.problem else mutant.caught_by
        rows.append((name, layer, caught_by, f"{verdict.seconds:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *words, seconds in rows:
        cells = [word.ljust(width) for word, width in zip(words, widths, strict=True)]
        print("  ".join([*cells, seconds.rjust(7)]))


if __name__ == "__main__":
    sys.exit(main())
