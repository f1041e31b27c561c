"""The demo in IN_PLACE: memory begins private, and huge pages are converted one by one.

What is not said here is as in RFC_V2.
"""

from __future__ import annotations

from typing import Final

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import HOLD_KIND_PIN
from gmem.ctl.demo import steps_private, steps_rfc_v2
from gmem.ctl.demo.report import Change, StepReport
from gmem.ctl.demo.stage import BOUNCE_OFFSET, BOUNCE_SIZE, MEMORY_SIZE, Stage
from gmem.ctl.demo.step import Step
from gmem.uapi.errors import Errno
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G

_BOOT: Final = {step.name: step for step in steps_private.STEPS}["boot"]
_GIB_BEFORE: Final = BOUNCE_OFFSET - SIZE_1G


async def share_all(stage: Stage, report: StepReport) -> None:
    """Convert all memory to shared, so that somebody can load it."""
    await stage.convert(0, MEMORY_SIZE, private=False)
    report.say(
        f"{stage.dialect.call} on the file; nothing is there yet that could be split"
    )
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    report.check("every page is shared", not inode.private_pages, inode.private_pages)
    report.check("nothing is allocated", not inode.whole_folios + inode.split_folios)


async def partial(stage: Stage, report: StepReport) -> None:
    """Convert two huge pages of which the second is held."""
    await stage.convert(_GIB_BEFORE, SIZE_1G, private=False)
    hold = await stage.guest_memfd.pin_pages(
        name=stage.inode,
        offset=BOUNCE_OFFSET,
        size=PAGE_SIZE,
        kind=HOLD_KIND_PIN,
        holder="gmem-demo",
    )
    refused = await stage.refused_convert(
        _GIB_BEFORE, SIZE_1G + BOUNCE_SIZE, private=True
    )
    await stage.guest_memfd.unpin_pages(hold=hold)
    report.say(f"{stage.dialect.call} of two 1G pages: {refused}")
    errno = None if refused is None else refused.errno
    report.check("it fails with EAGAIN", errno == Errno.EAGAIN, errno)
    at = None if refused is None else refused.numbers.get("error_offset")
    report.check("error_offset is where it stopped", at == BOUNCE_OFFSET, at)
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    left = inode.shared_pages << PAGE_SHIFT
    report.check("the 1G page before it stays private", left == BOUNCE_SIZE, left)


_MORE: Final = {
    "boot": (
        _BOOT,
        Step(
            "share all",
            "Memory begins private: the VMM shares it, so that it can be loaded.",
            share_all,
            Change(),
        ),
    ),
    "ioctl": (
        {step.name: step for step in steps_rfc_v2.STEPS}["ioctl"],
        Step(
            "partial",
            "Of two huge pages the second is held: the first stays converted.",
            partial,
            Change(),
        ),
    ),
}

STEPS: Final = tuple(
    step for first in steps_rfc_v2.STEPS for step in _MORE.get(first.name, (first,))
)
