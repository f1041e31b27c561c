"""Which published kernel series an inode follows."""

from __future__ import annotations

from enum import StrEnum


class Lineage(StrEnum):
    """A kernel series; chosen when an inode or a VM is created, never changed after.

    A difference between series is a row in a table keyed by lineage, or a policy
    object chosen once; never a comparison in the middle of a core.
    """

    RFC_V1 = "RFC_V1"
    """"1G page support for guest_memfd", 39 patches, September 2024."""

    RFC_V2 = "RFC_V2"
    """Its second version, 51 patches, May 2025."""

    IN_PLACE = "IN_PLACE"
    """"In-place conversion support", eighth version, June 2026, with its branch for
    huge pages."""

    MAINLINE = "MAINLINE"
    """torvalds/linux 7.x: mmap, one memory policy per range, pages of 4K alone."""
