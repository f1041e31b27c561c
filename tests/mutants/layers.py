"""The mutants of each layer: which ring of tests is to find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.mutants.conformance import CONFORMANCE
from tests.mutants.model import MODEL
from tests.mutants.mutant import Mutant
from tests.mutants.sim import SIM

LAYERS: Final[Mapping[str, Mapping[str, Mutant]]] = {
    "conformance": CONFORMANCE,
    "model": MODEL,
    "sim": SIM,
}
