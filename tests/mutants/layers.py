"""The mutants of each layer: which ring of tests is to find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.mutants.model import MODEL
from tests.mutants.mutant import Mutant
from tests.mutants.sim import SIM

LAYERS: Final[Mapping[str, Mapping[str, Mutant]]] = {
    "model": MODEL,
    "sim": SIM,
}
