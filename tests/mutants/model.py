"""Mistakes that the reference model must find: a wrong outcome, count or byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.model.rules import RULES
from tests.mutants.mutant import Mutant

STEPS: Final = 13_000 * len(RULES)
"""Of all machines together; one machine runs, with its share of them."""
_TEST: Final = "tests/model/test_model.py::test_cores_agree_with_the_model"
_CORE: Final = "gmem.guest_memfd.core"


def _mutant(module: str, old: str, new: str, case: str = "RFC_V1-2M") -> Mutant:
    options = ("--steps", str(STEPS), "--no-shrink")
    return Mutant(module, old, new, f"{_TEST}[{case}]", options)


MODEL: Final[Mapping[str, Mutant]] = {
    "a page that was punched in part is not zeroed": _mutant(
        f"{_CORE}.operations",
        "        yield from perform(ZeroPages(inode.number, part))\n",
        "        yield from ()\n",
    ),
    "a split restores no vmemmap": _mutant(
        "gmem.host_allocator.core.hugetlb",
        "        restored = self._restore(folio)\n",
        "        restored = 0\n",
    ),
    "a rollback is of the first page alone": _mutant(
        f"{_CORE}.conversion",
        "    inode.faultability.store(pages, back)\n",
        "    inode.faultability.store(PgRange(pages.start, pages.start + 1), back)\n",
    ),
    "pages of a file that are bound already are EEXIST": _mutant(
        f"{_CORE}.bindings",
        """                raise BadRequest(
                    Reason.BINDING_OVERLAP,
""",
        """                from gmem.uapi.errors import ObjectExists
                raise ObjectExists(
                    Reason.MEMSLOT_OVERLAP,
""",
    ),
    "error_offset is that of the last page in use": _mutant(
        f"{_CORE}.in_use",
        "    offset = users[0][0] << PAGE_SHIFT\n",
        "    offset = users[-1][0] << PAGE_SHIFT\n",
        "RFC_V1-4K",
    ),
    "a folio is made whole with its first page still shared": _mutant(
        f"{_CORE}.inode",
        "any_in(self.unit_of(index), Faultability.ALL)\n",
        "any_in(PgRange(index + 1, self.unit_of(index).stop), Faultability.ALL)\n",
        "RFC_V2-2M",
    ),
    "a punch makes pages private": _mutant(
        f"{_CORE}.operations",
        "        yield from _punch_quiet(inode, pages, begun)\n",
        """        yield from _punch_quiet(inode, pages, begun)
        inode.faultability.store(pages, Faultability.GUEST)
""",
    ),
    "a folio that could not be split is kept, and lost": _mutant(
        f"{_CORE}.folios",
        "        yield from _drop(inode, [index])\n        for part",
        "        inode.filemap.remove(index)\n        for part",
    ),
    "a conversion rounds its range out to huge pages": _mutant(
        f"{_CORE}.conversion",
        "    inode.faultability.store(pages, to)\n",
        "    inode.faultability.store(pages.rounded_out(inode.order), to)\n",
    ),
    "a held folio is punched all the same": _mutant(
        f"{_CORE}.in_use",
        "    if inode.wants_split(pages.start):\n",
        "    if False:\n",
        "RFC_V2-2M",
    ),
    "a plain reference refuses a conversion": _mutant(
        f"{_CORE}.references",
        " for pgoff, hold in holds if hold.kind is HoldKind.PIN]\n",
        " for pgoff, hold in holds]\n",
        "RFC_V1-4K",
    ),
    "a huge page that could not be split in place is left shared": Mutant(
        f"{_CORE}.conversion_in_place",
        "            inode.faultability.store(run, opposite(to))\n",
        "            pass\n",
        "tests/model/test_model.py::test_both_stop_in_place_at_the_same_huge_page",
    ),
}
"""By what is wrong; each must be found by the named machine within its steps."""
