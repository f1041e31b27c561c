"""Who maps a page is read from the page tables of the processes that do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gmem.runtime.mappings import (
    MappedRun,
    MappingFinder,
    can_see_other_processes,
    comm_of,
)
from gmem.uapi.pages import PAGE_SIZE, PgRange

pytestmark = pytest.mark.skipif(
    not can_see_other_processes(),
    reason="needs CAP_SYS_PTRACE to read other processes' page tables",
)

# Maps eight pages from the second on, touches the listed ones, and waits.
CHILD = """
import mmap, sys
fd, touched = int(sys.argv[1]), [int(page) for page in sys.argv[2:]]
window = mmap.mmap(fd, 8 * 4096, offset=4096)
for page in touched:
    window[page * 4096] = 1
print("ready", flush=True)
for line in sys.stdin:
    window.madvise(mmap.MADV_DONTNEED)
    print("dropped", flush=True)
"""


@contextmanager
def mapping_child(fd: int, *touched: int) -> Iterator[subprocess.Popen[str]]:
    """Run a process that maps pages 1 to 8 of `fd` and has touched some."""
    argv = [sys.executable, "-c", CHILD, str(fd), *map(str, touched)]
    with subprocess.Popen(
        argv,
        pass_fds=(fd,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


@pytest.fixture
def memfd() -> Iterator[int]:
    """Give a memfd of 16 pages that is mapped with 4K pages only."""
    fd = os.memfd_create("mapped")
    os.ftruncate(fd, 16 * PAGE_SIZE)
    yield fd
    os.close(fd)


def finder_of(fd: int, *left_out: int) -> tuple[MappingFinder, int]:
    """Return a finder for the file system of `fd`, and its inode number."""
    status = os.fstat(fd)
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return MappingFinder(device, lambda: frozenset(left_out)), status.st_ino


def test_find_names_the_process_and_exactly_the_touched_pages(memfd: int) -> None:
    """Only present pages count: a window that nobody touched maps nothing."""
    finder, st_ino = finder_of(memfd)
    with mapping_child(memfd, 0, 1, 5) as child:
        runs = finder.find(st_ino, [PgRange(0, 16)])
        expected = [PgRange(1, 3), PgRange(6, 7)]
        assert runs == tuple(
            MappedRun(child.pid, comm_of(child.pid), pages) for pages in expected
        )
        assert finder.find(st_ino, [PgRange(3, 6)]) == ()


def test_find_sees_that_dontneed_dropped_the_pages(memfd: int) -> None:
    """MADV_DONTNEED empties the page tables, as the series' userspace must."""
    finder, st_ino = finder_of(memfd)
    with mapping_child(memfd, 3) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert finder.find(st_ino, [PgRange(4, 5)])
        child.stdin.write("drop\n")
        child.stdin.flush()
        assert child.stdout.readline() == "dropped\n"
        assert finder.find(st_ino, [PgRange(0, 16)]) == ()


def test_find_leaves_out_the_processes_that_stand_for_stage_2(memfd: int) -> None:
    """A guest process is no host mapping."""
    with mapping_child(memfd, 0) as child:
        finder, st_ino = finder_of(memfd, child.pid)
        assert finder.find(st_ino, [PgRange(0, 16)]) == ()


def test_find_ignores_other_files_of_the_mount(memfd: int) -> None:
    """The inode number decides, not the file system alone."""
    finder, _ = finder_of(memfd)
    with mapping_child(memfd, 0):
        other = os.memfd_create("other")
        try:
            assert finder.find(os.fstat(other).st_ino, [PgRange(0, 16)]) == ()
        finally:
            os.close(other)


def test_find_goes_on_after_more_regions_than_one_call_returns() -> None:
    """1,100 separate pages are more than two calls of PAGEMAP_SCAN can name."""
    fd = os.memfd_create("many")
    os.ftruncate(fd, 4096 * PAGE_SIZE)
    child = """
import mmap, sys
window = mmap.mmap(int(sys.argv[1]), 4096 * 4096)
window.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, 2200, 2):
    window[page * 4096] = 1
print("ready", flush=True)
sys.stdin.read()
"""
    argv = [sys.executable, "-c", child, str(fd)]
    with subprocess.Popen(
        argv, pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        finder, st_ino = finder_of(fd)
        runs = finder.find(st_ino, [PgRange(0, 4096)])
        process.kill()
    os.close(fd)
    pages = {page for run in runs for page in run.pages}
    assert pages == set(range(0, 2200, 2))


def test_comm_of_a_process_that_is_gone_is_a_question_mark() -> None:
    """A pid that cannot exist has no name, and that is no error."""
    assert comm_of(2**22 + 1) == "?"
