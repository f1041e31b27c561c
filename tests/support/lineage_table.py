"""What the lineages differ in, as a table of docs/semantics.md, read from the code.

`make tables` (``python -m tests.support.lineage_table``) writes it; a test compares.
A policy that has no words here is an error, so that none is forgotten.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from gmem.effects import Mode
from gmem.guest_memfd.core.conversion import convert
from gmem.guest_memfd.core.conversion_exact import convert_exactly
from gmem.guest_memfd.core.conversion_in_place import convert_in_place
from gmem.guest_memfd.core.conversion_none import refuse_conversion
from gmem.guest_memfd.core.eviction import (
    free_at_once,
    free_page_by_page,
    merge_then_free_page_by_page,
)
from gmem.guest_memfd.core.in_use import (
    anything_is_freeable,
    require_unreferenced_if_huge,
    require_unreferenced_if_split,
)
from gmem.guest_memfd.core.inode import InodeOptions
from gmem.guest_memfd.core.lineage import LineageRules, Operation, rules_of
from gmem.guest_memfd.core.restructure import Eager
from gmem.uapi import flags as uapi
from gmem.uapi.errors import BadRequest, Reason, errno_of
from gmem.uapi.flags import Faultability, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZES, format_size
from gmem.vmm.core.lineage import VmRules, vm_rules_of
from gmem.vmm.core.mmu import (
    LPAGE_RULES,
    attributes_agree,
    attributes_agree_where_they_count,
    file_agrees,
    inside_slot,
    userspace_agrees,
)
from tests.support.sources import REPOSITORY

PAGE: Final = REPOSITORY / "docs" / "semantics.md"
BEGIN: Final = "<!-- Made by `make tables` from the tables of the code. -->\n"
END: Final = "<!-- Here it ends. -->\n"

FLAGS: Final = ("support_shared", "init_private", "mmap", "init_shared")
VIEWS: Final = {
    Faultability.ALL: "shared",
    Faultability.GUEST: "private",
    None: "by the type of the VM, when bound",
}
NONE: Final = "-"
WORDS: Final[Mapping[object, str]] = {
    convert: "all ranges at once; a failure writes the opposite over all of them",
    convert_exactly: "all ranges at once; a failure changes nothing",
    convert_in_place: "4K: each range at once; huge: page by page, what was done stays",
    refuse_conversion: "none: ENOTTY",
    free_at_once: "reconstructed and freed while the inode waits",
    free_page_by_page: "split or held ones page by page, merged at last",
    merge_then_free_page_by_page: "merged at once, held ones page by page",
    (anything_is_freeable, anything_is_freeable): "goes through",
    (anything_is_freeable, require_unreferenced_if_split): (
        "EAGAIN, what lies before it is gone"
    ),
    (require_unreferenced_if_huge, anything_is_freeable): "EAGAIN, nothing is gone",
    inside_slot: "inside the memslot",
    userspace_agrees: "gpa and userspace side agree",
    file_agrees: "gpa and file offset agree",
    attributes_agree: "one attribute",
    attributes_agree_where_they_count: "one attribute, unless GMEM_ONLY",
}


@dataclass(frozen=True, slots=True)
class Column:
    """One lineage as one host has it."""

    title: str
    lineage: Lineage
    rules: LineageRules
    vm_rules: VmRules


def columns() -> list[Column]:
    """Return the lineages, and again those that a parameter of the host changes."""
    found: list[Column] = []
    for on in (True, False):
        files, vms = (
            rules_of(in_place_conversion=on),
            vm_rules_of(in_place_conversion=on),
        )
        suffix = "" if on else ", parameter off"
        made = [Column(f"{one}{suffix}", one, files[one], vms[one]) for one in Lineage]
        known = {(id(column.rules), id(column.vm_rules)) for column in found}
        found += [one for one in made if (id(one.rules), id(one.vm_rules)) not in known]
    return found


def _options(column: Column, names: tuple[str, ...], page_size: int) -> InodeOptions:
    chosen: dict[str, Any] = dict.fromkeys(names, True)
    return InodeOptions(page_size, page_size, column.lineage, **chosen)


def _accepted(column: Column, page_size: int = PAGE_SIZES[0]) -> Iterator[InodeOptions]:
    """Yield the combinations of flags that a file may be created with."""
    for number in range(len(FLAGS) + 1):
        for names in combinations(FLAGS, number):
            options = _options(column, names, page_size)
            try:
                column.rules.creation.require(options)
            except BadRequest:
                continue
            yield options


def _named(options: InodeOptions) -> str:
    names = [name for name in FLAGS if getattr(options, name)]
    return " with ".join(names) if names else "no flag"


def _by_flags(column: Column, look: Callable[[InodeOptions], str]) -> str:
    """Say what follows from the flags, as shortly as it can be said."""
    by_word: dict[str, list[str]] = {}
    for options in _accepted(column):
        by_word.setdefault(look(options), []).append(_named(options))
    if len(by_word) == 1:
        return next(iter(by_word))
    return "; ".join(f"{', '.join(names)}: {word}" for word, names in by_word.items())


def _yes(answer: object) -> str:
    return "yes" if answer else "no"


def _page_sizes(column: Column) -> str:
    sizes = [size for size in PAGE_SIZES if any(_accepted(column, size))]
    return ", ".join(format_size(size) for size in sizes)


def _initial(column: Column) -> str:
    creation = column.rules.creation
    return _by_flags(column, lambda options: VIEWS[creation.initial(options)])


def _mmap(column: Column) -> str:
    creation = column.rules.creation
    words = {True: "yes", False: "ENODEV"}
    return _by_flags(column, lambda options: words[creation.host_mmap(options)])


def _shared_from(column: Column) -> str:
    creation = column.rules.creation
    words = {True: "the file", False: "the userspace side"}
    return _by_flags(column, lambda options: words[creation.serves_shared(options)])


def _who_says(column: Column) -> str:
    types = [kind.name for kind in VmType if kind in column.vm_rules.files_say_private]
    if not types:
        return "attributes of the VM"
    which = "each file" if column.vm_rules.every_file_says else "a GMEM_ONLY file"
    whose = "" if len(types) == len(VmType) else f" of a {' or '.join(types)} VM"
    return f"{which}{whose}, else the attributes"


def _vm_ioctl(column: Column) -> str:
    if not column.vm_rules.vm_attributes:
        return "PRIVATE is EINVAL"
    converts = column.vm_rules.attributes_convert
    return "converts the files" if converts else "stores attributes alone"


def _ioctls(column: Column) -> str:
    names = {
        value: name
        for name, value in vars(uapi).items()
        if name.startswith(("KVM_GMEM_", "KVM_SET_")) and isinstance(value, int)
    }
    found = [f"`{names[number]}`" for number in sorted(column.rules.convert_ioctls)]
    return ", ".join(found) or "ENOTTY"


def _reconstructs(column: Column) -> str:
    policy = column.rules.restructure
    assert isinstance(policy, Eager), policy
    return "that a range touches" if policy.rounds_out else "inside the range"


def _of_conversion(column: Column, word: str) -> str:
    return NONE if column.rules.convert is refuse_conversion else word


def _levels(column: Column) -> str:
    return ", ".join(WORDS[rule] for rule in LPAGE_RULES[column.lineage])


def _capability(column: Column) -> str:
    answers = column.vm_rules.flags_capability
    if answers is None:
        return "not there"
    if len(set(answers.values())) == 1:
        return hex(next(iter(answers.values())))
    return ", ".join(f"{kind.name} {value:#x}" for kind, value in answers.items())


ROWS: Final[Mapping[str, Callable[[Column], str]]] = {
    "page sizes": _page_sizes,
    "pages begin": _initial,
    "`mmap`": _mmap,
    "a bind changes who may fault": lambda c: _yes(c.rules.bind_sets_faultability),
    "VMs with guest_memfd memslots": lambda c: (
        "all" if c.vm_rules.gmem_for_every_type else "with private memory"
    ),
    "KVM_CAP_GUEST_MEMFD_FLAGS": _capability,
    "the userspace side must be the file": lambda c: _yes(
        c.vm_rules.looks_at_userspace
    ),
    "shared accesses of the guest reach": _shared_from,
    "what is private, says": _who_says,
    "KVM_SET_MEMORY_ATTRIBUTES": _vm_ioctl,
    "conversion ioctls of the file": _ioctls,
    "conversion of files": lambda c: WORDS[c.rules.convert],
    "a page in use refuses it with": lambda c: (
        errno_of(Reason.PAGE_IN_USE, c.lineage).name
    ),
    "contents": lambda c: "kept" if c.rules.restructure.keeps_content else "zeroed",
    "reconstructed are huge pages": _reconstructs,
    "`fallocate` takes multiples of": lambda c: (
        "the page size" if c.rules.fallocates_folios else "4K"
    ),
    "`st_blocks` counts pages of 4K": lambda c: _yes(c.rules.counts_base_pages),
    "a punch of a split page that is held": lambda c: WORDS[
        c.rules.require_punchable, c.rules.require_freeable
    ],
    "a page that is held keeps its inode": lambda c: _yes(c.rules.holds_keep_inode),
    "folios of a dead inode": lambda c: WORDS[c.rules.evict_folios],
    "`get_pfn` takes the invalidate lock": lambda c: (
        "shared"
        if c.rules.lock_modes[Operation.GET_PFN] is Mode.SHARED
        else "not at all"
    ),
    "memory policy": lambda c: (
        "of the inode, by range"
        if c.rules.mempolicy_by_range
        else "of CreateGuestMemfd"
    ),
    "a cgroup pays for reservations": lambda c: _yes(c.rules.charges_rsvd),
    "a huge entry of stage 2 needs": _levels,
}


def table() -> str:
    """Return the table in Markdown."""
    shown = columns()
    lines = [
        "| | " + " | ".join(column.title for column in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for label, look in ROWS.items():
        cells = [look(column) for column in shown]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the page with the table that the code has now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE} has no line {BEGIN!r}"
    assert end, f"{PAGE} has no line {END!r}"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    made = with_table(text)
    PAGE.write_text(made)
    sys.stdout.write(f"{'unchanged' if made == text else 'wrote'} {PAGE.name}\n")


if __name__ == "__main__":
    main()
