"""Mistakes that show only at the outermost interface: files, signals, killed processes.

Each starts a host of its own, mutated as a whole, for the one case that must see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.mutants.mutant import Mutant

_CASE: Final = "tests/conformance/test_conformance.py::test_conformance"
_REVOCATION: Final = "tests/cluster/test_guest_memfd_revocation.py"

CONFORMANCE: Final[Mapping[str, Mutant]] = {
    "a READ is answered short": Mutant(
        "gmem.guest_memfd.view.channel",
        "self._write([OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique), *data])\n",
        """half = b"".join(data)[: size // 2]
        self._write([OUT_HEADER.pack(OUT_HEADER.size + len(half), 0, unique), half])
""",
        f"{_CASE}[C030-RFC_V1-4K]",
    ),
    "INVAL is rounded out to 2M": Mutant(
        "gmem.guest_memfd.view.quiesce",
        "(start << PAGE_SHIFT, (stop - start) << PAGE_SHIFT)\n",
        "(start >> 9 << 21, ((stop + 511 >> 9) - (start >> 9)) << 21)\n",
        f"{_REVOCATION}::test_a_conversion_unmaps_exactly_its_range",
    ),
    "what became private is still mapped": Mutant(
        "gmem.guest_memfd.memory_ports",
        "quiesce(effect.inode, ViewKind.HOST, pages.start, pages.stop)\n",
        "quiesce(effect.inode, ViewKind.HOST, pages.start, pages.start)\n",
        f"{_CASE}[C087-RFC_V2-4K]",
    ),
    "a conversion forgets to have pages zeroed": Mutant(
        "gmem.guest_memfd.memory_ports",
        "self._contents.clear_uptodate(self._tables[effect.inode], effect.pages)\n",
        "del effect\n",
        f"{_CASE}[C022-RFC_V1-4K]",
    ),
    "a mapped page is EAGAIN in every series": Mutant(
        "gmem.uapi.errors",
        "    (Reason.PAGE_IN_USE, Lineage.RFC_V1): Errno.EINVAL,\n",
        "    (Reason.PAGE_IN_USE, Lineage.RFC_V1): Errno.EAGAIN,\n",
        f"{_CASE}[C019-RFC_V1-4K]",
    ),
    "an ioctl gives error_offset back as it came": Mutant(
        "gmem.guest_memfd.ioctls",
        "        return _CONVERT.pack(self.offset, self.size, offset)\n",
        "        return _CONVERT.pack(self.offset, self.size, self.error_offset)\n",
        f"{_CASE}[C092-RFC_V2-4K-pin]",
    ),
    "a punch frees what lies before a held page in every series": Mutant(
        "gmem.guest_memfd.core.lineage",
        "    require_punchable=require_unreferenced_if_huge,\n",
        "    require_punchable=anything_is_freeable,\n",
        f"{_CASE}[C122-IN_PLACE-2M-pin]",
    ),
    "a successor forgets the request_ids that it finds": Mutant(
        "gmem.runtime.replies",
        '        client.entries[row["id"]] = _Entry(fingerprint, stored=row)\n',
        "        del client, fingerprint\n",
        "tests/cluster/test_recovery.py::test_a_reply_survives_the_service_that_gave_it",
    ),
    "a request is acknowledged before it is committed": Mutant(
        "gmem.runtime.journal",
        "        await _ended(self.journal.release(self.entry, rows))\n",
        "        self.journal.release(self.entry, rows)\n",
        "tests/unit/runtime/test_journal.py"
        "::test_a_request_and_its_reply_are_one_transaction",
    ),
}
"""By what is wrong with the host that is started."""
