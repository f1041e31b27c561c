"""The second half of the demo: a bounce window, a device, pins, and the way back."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import (
    HOLD_KIND_PIN,
    HOLD_KIND_PLAIN,
    HoldKind,
)
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client.program import fill, hash_range, map_gpa_range, ring, verify
from gmem.ctl.demo.report import Change, Snapshot, StepReport
from gmem.ctl.demo.stage import (
    BOUNCE_OFFSET,
    BOUNCE_SIZE,
    GPA,
    VMEMMAP_PAGES,
    Stage,
    StepFailedError,
)
from gmem.ctl.demo.step import Step
from gmem.uapi.errors import Errno, KernelError, Reason
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M

BOUNCE_GPA: Final = GPA + BOUNCE_OFFSET
NEIGHBOUR_GPA: Final = BOUNCE_GPA + BOUNCE_SIZE
"""Private memory in the same 1G page as the bounce window."""
NEIGHBOUR_SIZE: Final = 16 * PAGE_SIZE
MARK: Final = 0xA5
RING_SIZE: Final = 64 << 10
REQUESTS: Final = 200
RING_SECONDS_MAX: Final = 20.0
GONE_SECONDS_MAX: Final = 20.0
_POLL_SECONDS: Final = 0.1


async def use_second_page(stage: Stage, report: StepReport) -> None:
    """Have the guest write private memory in another 1G page."""
    await stage.run(fill(NEIGHBOUR_GPA, NEIGHBOUR_SIZE, MARK))
    result = await stage.run_one(verify(NEIGHBOUR_GPA, NEIGHBOUR_SIZE, MARK))
    report.say("the guest touches its third GiB: a whole 1G page, mapped at level 1G")
    report.check("the guest reads back what it wrote", result.count == 0)


async def share(stage: Stage, report: StepReport) -> None:
    """Let the guest share its bounce window: MAP_GPA_RANGE, answered by the VMM."""
    answer = await map_window(stage, BOUNCE_SIZE, private=False)
    report.check("the guest's hypercall is answered with 0", answer == 0, answer)
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    shared = inode.shared_pages << PAGE_SHIFT
    report.say("KVM_HC_MAP_GPA_RANGE left to the VMM, which converted 64 MiB to shared")
    report.check("64 MiB are shared", shared == BOUNCE_SIZE, shared)
    report.check("one 1G page is split", inode.split_folios == 1, inode.split_folios)
    report.check("the payload's 1G page is whole", inode.whole_folios == 1)


async def neighbours(stage: Stage, report: StepReport) -> None:
    """Look at private memory beside the window, and at the payload."""
    result = await stage.run_one(verify(NEIGHBOUR_GPA, NEIGHBOUR_SIZE, 0))
    report.say(
        "RFC_V1 forgets at a split that the huge page was prepared: private "
        "neighbours of the window are zeroed as well (later series keep them)"
    )
    report.check("neighbours in the split 1G page read zero", result.count == 0)
    payload = await stage.run_one(hash_range(GPA, stage.payload.size))
    same = payload.data.hex() == stage.payload.sha256
    report.check("the payload in the other 1G page is untouched", same)
    after = await stage.snapshot()
    pages = NEIGHBOUR_SIZE >> PAGE_SHIFT
    small = after.stage2_4k - report.before.stage2_4k
    report.check("split pages are mapped at level 4K", small == pages, f"{small:+d}")


async def device(stage: Stage, report: StepReport) -> None:
    """Exchange requests between the guest and a device process."""
    child = await stage.child("device")
    opened = await stage.host_view()
    await child.ask(
        "open",
        token=opened.token,
        broker=opened.broker_path,
        file=stage.inode,
        offset=BOUNCE_OFFSET,
        size=BOUNCE_SIZE,
    )
    answered, result = await _exchange(stage)
    report.say(
        f"gmem-device ({child.where}) answered {answered['answered']} requests "
        "with the SHA-256 of their data"
    )
    report.check(f"the device answered {REQUESTS}", answered["answered"] == REQUESTS)
    report.check("every answer reached the guest", result.count == REQUESTS)
    report.check("every answer was right", result.value == 0, f"{result.value} wrong")


async def pinned(stage: Stage, report: StepReport) -> None:
    """Pin a shared page for the device, and try to convert it back."""
    child = await stage.child("device")
    await child.ask("dont_need")
    holder = f"gmem-device {child.where}"
    await held(stage, report, HOLD_KIND_PIN, holder, Errno.EINVAL)


async def held(
    stage: Stage,
    report: StepReport,
    kind: HoldKind.ValueType,
    holder: str,
    errno: Errno,
) -> KernelError:
    """Hold a shared page, have the conversion of its window refused, let go."""
    hold = await _hold(stage, kind, holder)
    refused = await stage.refused_convert(BOUNCE_OFFSET, BOUNCE_SIZE, private=True)
    if refused is None:
        raise StepFailedError("pages in use were converted to private")
    report.say(f"{stage.dialect.call}: {refused}")
    found = Errno(refused.errno or 0)
    report.check(f"it fails with {errno.name}", found is errno, found.name)
    reason = refused.reason
    report.check("because a page is in use", reason is Reason.PAGE_IN_USE, reason)
    holders = str(refused.numbers.get("holders", ""))
    report.check("the holder is named", holder in holders, holders)
    await stage.guest_memfd.unpin_pages(hold=hold)
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    report.check("the hold is gone", not inode.holds)
    return refused


async def plain_reference(stage: Stage, report: StepReport) -> None:
    """Hold a plain reference, and convert the page all the same."""
    hold = await _hold(stage, HOLD_KIND_PLAIN, "gmem-demo get_user_pages")
    # Two MiB, so that the 1G page stays split: to reconstruct it the series does
    # need the only reference, and answers ENOMEM where it is not.
    refused = await stage.refused_convert(BOUNCE_OFFSET, SIZE_2M, private=True)
    report.say(
        "RFC_V1 looks at mappings and pins, not at reference counts: somebody still "
        "holds a page that is private now. Later series compare the count "
        "(safe_refcount)"
    )
    report.check("a plain reference does not refuse it", refused is None, refused or "")
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    still = [held.hold for held in inode.holds]
    report.check("the reference is still held", still == [hold], still)
    await stage.guest_memfd.unpin_pages(hold=hold)


async def back(stage: Stage, report: StepReport) -> None:
    """Let the guest make the window private again, and with it all of its 1G page."""
    status = await stage.end_child("device")
    report.check("the device ended in order", status == 0, status)
    answer = await map_window(stage, SIZE_1G, private=True)
    report.check("the guest's hypercall is answered with 0", answer == 0, answer)
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    report.say(
        "the guest names the whole GiB, not the window alone: RFC_V1 reconstructs "
        "huge pages that lie inside the converted range"
    )
    report.check("nothing is shared", not inode.shared_pages, inode.shared_pages)
    report.check("no 1G page is split", inode.split_folios == 0, inode.split_folios)
    report.check("two whole 1G pages", inode.whole_folios == 2, inode.whole_folios)
    payload = await stage.run_one(hash_range(GPA, stage.payload.size))
    same = payload.data.hex() == stage.payload.sha256
    report.check("the guest still has its payload", same)


async def teardown(stage: Stage, report: StepReport) -> None:
    """End the programs, the VM and the file."""
    await stage.end_children()
    await stage.vmm.delete_vm(name=stage.vm)
    stage.vm = ""
    await stage.guest_memfd.delete_guest_memfd(name=stage.inode)
    stage.release_memslot_memory()
    assert stage.baseline is not None
    after = await _settled(stage, stage.baseline)
    report.say("the VM, its memory and every program are gone")
    start, end = stage.baseline.state(), after.state()
    differing = [
        f"{key} {start[key]} -> {end[key]}" for key in start if start[key] != end[key]
    ]
    report.check(
        "every counter has its first value again", not differing, ", ".join(differing)
    )
    taken = after.vmemmap_restored - stage.baseline.vmemmap_restored
    report.check(
        "each split took 4095 vmemmap pages, and all are saved again",
        taken > 0 and taken % VMEMMAP_PAGES == 0,
        f"{taken} taken, {taken} saved",
    )
    inodes = await stage.guest_memfd.list_guest_memfds()
    report.check("no inode is left", not inodes, [inode.name for inode in inodes])
    reservations = await stage.allocator.list_reservations()
    report.check("no reservation is left", not reservations)


async def map_window(stage: Stage, size: int, *, private: bool) -> int:
    """Run the guest's MAP_GPA_RANGE from the window on; return what it was answered."""
    instruction = map_gpa_range(BOUNCE_GPA, size >> PAGE_SHIFT, private=private)
    return (await stage.run_one(instruction)).value


async def _exchange(stage: Stage) -> tuple[dict[str, Any], pb.Result]:
    """Let guest and device work at the same time."""
    child = await stage.child("device")
    timeout_ms = int(RING_SECONDS_MAX * 1000)
    async with asyncio.TaskGroup() as group:
        answering = group.create_task(
            child.ask("answer", requests=REQUESTS, seconds=int(RING_SECONDS_MAX))
        )
        asking = group.create_task(
            stage.run_one(ring(BOUNCE_GPA, RING_SIZE, REQUESTS, timeout_ms=timeout_ms))
        )
    return answering.result(), asking.result()


async def _hold(stage: Stage, kind: HoldKind.ValueType, holder: str) -> int:
    return await stage.guest_memfd.pin_pages(
        name=stage.inode,
        offset=BOUNCE_OFFSET,
        size=PAGE_SIZE,
        kind=kind,
        holder=holder,
    )


async def _settled(stage: Stage, wanted: Snapshot) -> Snapshot:
    """Wait until the counters are as `wanted`: views are released by their own ends."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GONE_SECONDS_MAX
    found = await stage.snapshot()
    while found.state() != wanted.state() and loop.time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
        found = await stage.snapshot()
    return found


STEPS: Final = (
    Step(
        "second page",
        "The guest writes private memory in another 1G page.",
        use_second_page,
        Change(free=-1, rsvd=-1, stage2_1g=+1),
    ),
    Step(
        "share",
        "The guest shares a 64 MiB bounce window: its 1G page splits.",
        share,
        Change(vmemmap_saved=-VMEMMAP_PAGES, stage2_1g=-1),
    ),
    Step(
        "neighbours",
        "What the split did to private memory around the window, and what not.",
        neighbours,
        Change(stage2_1g=0),
    ),
    Step(
        "device",
        "A device process exchanges requests with the guest through shared pages.",
        device,
        Change(),
    ),
    Step(
        "pin",
        "A pin blocks the conversion back, and is named.",
        pinned,
        Change(),
    ),
    Step(
        "plain reference",
        "A plain reference does not block it: the hole of this series.",
        plain_reference,
        Change(),
    ),
    Step(
        "back",
        "The window becomes private again: the 1G page is reconstructed.",
        back,
        Change(vmemmap_saved=+VMEMMAP_PAGES),
    ),
    Step(
        "teardown",
        "All ends, and every counter returns to its start.",
        teardown,
        None,
    ),
)
