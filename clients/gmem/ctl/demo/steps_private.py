"""The first half of the demo: memory is filled, made private, and given a payload."""

from __future__ import annotations

from typing import Final

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client.program import hash_range, verify
from gmem.ctl.demo.children import ChildEndedError, describe
from gmem.ctl.demo.report import Change, StepReport
from gmem.ctl.demo.stage import (
    GPA,
    MEMORY_SIZE,
    VMEMMAP_PAGES,
    Stage,
    StepFailedError,
)
from gmem.ctl.demo.step import Step
from gmem.ctl.demo.weaker import DIED
from gmem.uapi.errors import Errno, KernelError, NotFaultable, ObjectExists, Reason
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    KVM_MEM_GUEST_MEMFD,
)
from gmem.uapi.pages import SIZE_1G

SIGBUS: Final = 7


async def boot(stage: Stage, report: StepReport) -> None:
    """Create the VM, its guest_memfd and its memslot, as a VMM does."""
    vm = await stage.vmm.create_vm(
        vm_id="demo", type=pb.VM_TYPE_SW_PROTECTED, lineage=stage.lineage.value
    )
    stage.vm = vm.name
    await stage.vmm.create_vcpu(vm=stage.vm, vcpu=0)
    stage.inode = await stage.vmm.create_guest_memfd(
        vm=stage.vm,
        size=MEMORY_SIZE,
        flags=stage.dialect.create_flags,
        page_order=stage.dialect.page_order,
    )
    descriptor = await stage.give_host_view_to_vmm()
    await stage.vmm.set_user_memory_region2(
        vm=stage.vm,
        slot=0,
        flags=KVM_MEM_GUEST_MEMFD,
        guest_phys_addr=GPA,
        memory_size=MEMORY_SIZE,
        userspace=pb.Userspace(descriptor=descriptor, offset=0),
        guest_memfd=stage.inode,
    )
    inode = await stage.guest_memfd.get_guest_memfd(stage.inode)
    report.say(f"{stage.vm} has {stage.inode}; its guest process is pid {vm.guest_pid}")
    report.check("the file has 1G pages", inode.page_size == SIZE_1G, inode.page_size)
    report.check("the file has 4 GiB", inode.size == MEMORY_SIZE, inode.size)
    word, others = "shared", inode.private_pages
    if not stage.dialect.starts_shared:
        word, others = "private", inode.shared_pages
    report.check(f"every page starts {word}", not others, others)
    report.check("nothing is allocated, only reserved", not inode.whole_folios)


async def load(stage: Stage, report: StepReport) -> None:
    """Have the loader write the payload through its own mapping of the host view."""
    loader = await stage.child("loader")
    opened = await stage.host_view()
    await loader.ask(
        "open",
        token=opened.token,
        broker=opened.broker_path,
        file=stage.inode,
        size=stage.payload.mapped_size,
    )
    answer = await loader.ask("write", path=str(stage.payload.path))
    report.say(
        f"gmem-loader ({loader.where}) wrote {answer['written']} bytes; the touch "
        "took a 1G page, which is split at once because its pages are shared"
    )
    size = stage.payload.size
    report.check("all of the file was written", answer["written"] == size)
    result = await stage.run_one(hash_range(GPA, size))
    report.check(
        "the guest reads the same bytes through shared memory",
        result.data.hex() == stage.payload.sha256,
        f"sha256 {result.data.hex()}",
    )


async def forgotten_mapping(stage: Stage, report: StepReport) -> None:
    """Convert all memory to private while the loader still maps the payload."""
    loader = await stage.child("loader")
    refused = await stage.refused_convert(0, MEMORY_SIZE, private=True)
    if refused is None:
        raise StepFailedError("mapped pages were converted to private")
    report.say(f"{stage.dialect.call}: {refused}")
    errno = refused.errno
    report.check("it fails with EINVAL", errno == Errno.EINVAL, Errno(errno or 0).name)
    reason = refused.reason
    report.check("because a page is in use", reason is Reason.PAGE_IN_USE, reason)
    holders = str(refused.numbers.get("holders", ""))
    report.check("it names the process", loader.known_as in holders, holders)
    report.check("and its name", "gmem-loader" in holders, holders)
    head = await loader.ask("read", size=min(16, stage.payload.size))
    expected = stage.payload.path.read_bytes()[:16].hex()
    report.check("the loader still reads its bytes", head["hex"] == expected)


async def dont_need(stage: Stage, report: StepReport) -> None:
    """Have the loader drop its mappings, and convert again."""
    loader = await stage.child("loader")
    await loader.ask("dont_need")
    await stage.convert(0, MEMORY_SIZE, private=True)
    report.say("madvise(MADV_DONTNEED) in the loader, and the same call succeeds")
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


async def zeroed(stage: Stage, report: StepReport) -> None:
    """Have the guest look at the pages that the loader wrote."""
    size = stage.payload.size
    result = await stage.run_one(verify(GPA, size, 0))
    report.say(
        "RFC_V1 zeroes a page at conversion: what the loader wrote is gone, so a "
        "payload has to come in another way"
    )
    report.check("the guest reads zeros there", result.count == 0, result.count)


async def populate(stage: Stage, report: StepReport) -> None:
    """Put the payload into private memory by kvm_gmem_populate."""
    loader = await stage.child("loader")
    broker = (await stage.guest_memfd.get_capabilities()).broker_path
    given = await loader.ask("give", broker=broker, path=str(stage.payload.path))
    report.say(
        f"the loader gave {given['size']} bytes in a memfd of its own to the broker "
        f"({given['descriptor']}); kvm_gmem_populate copies them into private pages"
    )
    error = await _populate(stage, given["descriptor"], given["size"])
    report.check(
        "a page that the guest has seen is refused with EEXIST",
        isinstance(error, ObjectExists) and error.reason is Reason.PAGE_PREPARED,
        error,
    )
    await stage.guest_memfd.fallocate(
        name=stage.inode,
        mode=FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        offset=0,
        length=SIZE_1G,
    )
    punched = await stage.snapshot()
    freed = punched.free - report.before.free
    report.check("punching the hole gives the 1G page back", freed == 1, f"{freed:+d}")
    error = await _populate(stage, given["descriptor"], given["size"])
    report.check("then the payload goes in", error is None, error or "")


async def guest_hash(stage: Stage, report: StepReport) -> None:
    """Have the guest hash what it was given."""
    result = await stage.run_one(hash_range(GPA, stage.payload.size))
    report.say(f"{stage.payload.path}: sha256 {stage.payload.sha256}")
    report.check(
        "the guest's hash of its private memory is that of the file",
        result.data.hex() == stage.payload.sha256,
        result.data.hex(),
    )


async def victim(stage: Stage, report: StepReport) -> None:
    """Have another process touch the private page, as any program would."""
    child = await stage.child("victim")
    opened = await stage.host_view()
    await child.ask(
        "open",
        token=opened.token,
        broker=opened.broker_path,
        file=stage.inode,
        offset=0,
    )
    status: int | None = None
    try:
        answer = await child.ask("touch")
    except ChildEndedError as ended:
        status = ended.status
        report.say(f"gmem-victim ({child.where}) {describe(status)}")
        del stage.children["victim"]
    else:
        byte = answer["byte"]
        report.say(f"gmem-victim ({child.where}) read {byte:#x} and lives")
        report.check("it saw none of the payload", byte == 0, f"{byte:#x}")
        await stage.end_child("victim")
    report.check(DIED, status == -SIGBUS, f"status {status}")
    result = await stage.run_one(hash_range(GPA, stage.payload.size))
    report.check("the guest lost nothing", result.data.hex() == stage.payload.sha256)


async def _populate(stage: Stage, descriptor: str, size: int) -> KernelError | None:
    """Ask for PopulateMemory; return its refusal."""
    try:
        await stage.vmm.populate_memory(
            vm=stage.vm, address=GPA, size=size, descriptor=descriptor, timeout=60.0
        )
    except KernelError as error:
        return error
    return None


STEPS: Final = (
    Step(
        "boot",
        "A VM (SW_PROTECTED) with 4 GiB of 1G pages: reserved, not yet allocated.",
        boot,
        Change(rsvd=+4),
    ),
    Step(
        "load",
        "A separate process maps the host view and writes the payload.",
        load,
        Change(free=-1, rsvd=-1, vmemmap_saved=-VMEMMAP_PAGES),
    ),
    Step(
        "forgotten mapping",
        "The VMM forgets to drop that mapping: conversion to private is refused.",
        forgotten_mapping,
        Change(),
    ),
    Step(
        "MADV_DONTNEED",
        "Dropped, the conversion succeeds and the 1G page is reconstructed.",
        dont_need,
        Change(vmemmap_saved=+VMEMMAP_PAGES),
    ),
    Step(
        "zeroed",
        "The guest reads zeros where the loader wrote.",
        zeroed,
        Change(stage2_1g=+1),
    ),
    Step(
        "populate",
        "The payload goes in by the series' way of populating private memory.",
        populate,
        Change(stage2_1g=-1),
    ),
    Step(
        "hash",
        "The guest hashes the payload it was given.",
        guest_hash,
        Change(stage2_1g=+1),
    ),
    Step(
        "victim",
        "Another process touches the private page and dies by signal 7.",
        victim,
        Change(stage2_1g=0),
    ),
)
