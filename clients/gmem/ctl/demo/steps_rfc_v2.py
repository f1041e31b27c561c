"""The demo in RFC_V2: the kernel unmaps by itself, contents stay, references count.

What is not said here is as in the first series.
"""

from __future__ import annotations

from typing import Final

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import HOLD_KIND_PIN, HOLD_KIND_PLAIN
from gmem.client.program import hash_range, verify
from gmem.ctl.demo import steps_private, steps_shared
from gmem.ctl.demo.children import Program
from gmem.ctl.demo.report import Change, StepReport
from gmem.ctl.demo.stage import (
    BOUNCE_OFFSET,
    BOUNCE_SIZE,
    GPA,
    MEMORY_SIZE,
    VMEMMAP_PAGES,
    Stage,
)
from gmem.ctl.demo.step import Step
from gmem.ctl.demo.steps_shared import (
    MARK,
    NEIGHBOUR_GPA,
    NEIGHBOUR_SIZE,
    held,
    map_window,
)
from gmem.ctl.demo.weaker import IOCTL
from gmem.runtime.backend import Backend
from gmem.uapi.errors import Errno, NotFaultable
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE

_FIRST: Final = {
    step.name: step for step in (*steps_private.STEPS, *steps_shared.STEPS)
}


async def mapped(stage: Stage, report: StepReport) -> None:
    """Convert all memory to private while the loader still maps the payload."""
    loader = await stage.child("loader")
    await stage.convert(0, MEMORY_SIZE, private=True)
    report.say(
        f"{stage.dialect.call} unmapped the loader's pages itself: nobody had to call "
        "MADV_DONTNEED"
    )
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    report.check("every page is private", not inode.shared_pages, inode.shared_pages)
    report.check("the 1G page is whole again", inode.whole_folios == 1)
    report.check("no 1G page is split", inode.split_folios == 0)
    try:
        await loader.ask("read", size=1)
    except NotFaultable as error:
        report.check("gmem.memory refuses to read it now", held=True, found=error)
    else:
        report.check("gmem.memory refuses to read it now", held=False)


async def kept(stage: Stage, report: StepReport) -> None:
    """Have the guest hash what the loader wrote, in private memory now."""
    result = await stage.run_one(hash_range(GPA, stage.payload.size))
    report.say(
        f"{stage.payload.path}: sha256 {stage.payload.sha256}; a conversion keeps what "
        "is in the pages, so nothing has to be populated"
    )
    report.check(
        "the guest's hash of its private memory is that of the file",
        result.data.hex() == stage.payload.sha256,
        result.data.hex(),
    )


async def neighbours(stage: Stage, report: StepReport) -> None:
    """Look at private memory beside the window, and at the payload."""
    result = await stage.run_one(verify(NEIGHBOUR_GPA, NEIGHBOUR_SIZE, MARK))
    report.say(
        f"{stage.lineage} keeps a folio's flags through a split, and with them its "
        "bytes"
    )
    report.check("neighbours in the split 1G page are as they were", result.count == 0)
    payload = await stage.run_one(hash_range(GPA, stage.payload.size))
    same = payload.data.hex() == stage.payload.sha256
    report.check("the payload in the other 1G page is untouched", same)
    after = await stage.snapshot()
    pages = NEIGHBOUR_SIZE >> PAGE_SHIFT
    small = after.stage2_4k - report.before.stage2_4k
    report.check("split pages are mapped at level 4K", small == pages, f"{small:+d}")


async def ioctl(stage: Stage, report: StepReport) -> None:
    """Have the device convert the page that it maps, by the kernel's own ioctl."""
    child = await stage.child("device")
    before = await child.ask("read", size=16)
    await _convert_by_device(stage, child, private=True)
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    left = inode.shared_pages << PAGE_SHIFT
    report.say(
        f"gmem-device ({child.where}) made {stage.dialect.ioctl} on its descriptor of "
        "the host view, with the page mapped"
        if stage.backend is Backend.FUSE
        else f"the VMM made the page private that gmem-device ({child.where}) maps"
    )
    report.check(IOCTL, stage.backend is Backend.FUSE)
    report.check("one page is private", left == BOUNCE_SIZE - PAGE_SIZE, left)
    try:
        await child.ask("read", size=1)
    except NotFaultable as error:
        report.check("it is gone from the device itself", held=True, found=error)
    else:
        report.check("it is gone from the device itself", held=False)
    await _convert_by_device(stage, child, private=False)
    after = await child.ask("read", size=16)
    report.check("shared again, it has what it had", after == before, after["hex"])


async def _convert_by_device(stage: Stage, child: Program, *, private: bool) -> None:
    """Convert by the device's ioctl, or for it where that reaches nobody."""
    if stage.backend is Backend.FUSE:
        call = stage.dialect.call
        await child.ask("convert", call=call, private=private, size=PAGE_SIZE)
    else:
        await stage.convert(BOUNCE_OFFSET, PAGE_SIZE, private=private)


async def pinned(stage: Stage, report: StepReport) -> None:
    """Pin a shared page for the device, and try to convert it back."""
    child = await stage.child("device")
    holder = f"gmem-device {child.where}"
    refused = await held(stage, report, HOLD_KIND_PIN, holder, Errno.EAGAIN)
    offset = refused.numbers.get("error_offset")
    report.check("error_offset is the page's", offset == BOUNCE_OFFSET, offset)
    still = await child.ask("read", size=1)
    report.check("the device has its window back", len(still["hex"]) == 2)


async def plain_reference(stage: Stage, report: StepReport) -> None:
    """Hold a plain reference: this series counts it."""
    report.say(
        f"{stage.lineage} compares the reference count: what the first series "
        "overlooked"
    )
    holder = "gmem-demo get_user_pages"
    await held(stage, report, HOLD_KIND_PLAIN, holder, Errno.EAGAIN)


async def back(stage: Stage, report: StepReport) -> None:
    """Let the guest make the window private again: that is enough for its 1G page."""
    status = await stage.end_child("device")
    report.check("the device ended in order", status == 0, status)
    answer = await map_window(stage, BOUNCE_SIZE, private=True)
    report.check("the guest's hypercall is answered with 0", answer == 0, answer)
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    report.say(
        f"the guest names the window alone: {stage.lineage} looks at every huge page "
        "that the range touches"
    )
    report.check("nothing is shared", not inode.shared_pages, inode.shared_pages)
    report.check("no 1G page is split", inode.split_folios == 0, inode.split_folios)
    report.check("two whole 1G pages", inode.whole_folios == 2, inode.whole_folios)
    payload = await stage.run_one(hash_range(GPA, stage.payload.size))
    same = payload.data.hex() == stage.payload.sha256
    report.check("the guest still has its payload", same)


STEPS: Final = (
    _FIRST["boot"],
    _FIRST["load"],
    Step(
        "mapped",
        "The loader still maps its pages: the conversion unmaps them and succeeds.",
        mapped,
        Change(vmemmap_saved=+VMEMMAP_PAGES),
    ),
    Step(
        "kept",
        "The guest finds what the loader wrote, in private memory.",
        kept,
        Change(stage2_1g=+1),
    ),
    _FIRST["victim"],
    _FIRST["second page"],
    _FIRST["share"],
    Step(
        "neighbours",
        "Private memory around the window keeps its content.",
        neighbours,
        Change(stage2_1g=0),
    ),
    _FIRST["device"],
    Step(
        "ioctl",
        "The device converts a page that it has mapped, by an ioctl on its descriptor.",
        ioctl,
        Change(),
    ),
    Step(
        "pin",
        "A pin blocks the conversion back with EAGAIN, and is named.",
        pinned,
        Change(),
    ),
    Step(
        "plain reference",
        "So does a plain reference: the hole of the first series is closed.",
        plain_reference,
        Change(),
    ),
    Step(
        "back",
        "The window becomes private again: the 1G page is reconstructed.",
        back,
        Change(vmemmap_saved=+VMEMMAP_PAGES),
    ),
    _FIRST["teardown"],
)
