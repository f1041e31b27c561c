"""Remove from a virtual environment what no program of the image ever imports.

    python -I strip.py DIRECTORY

Only the image build runs it: pip and setuptools, tests that came with packages, type
stubs and sources of C extensions. Byte code stays: the image is read-only, and without
it every start would compile again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("pip", "pip-*", "setuptools", "setuptools-*", "_distutils_hack")
FILES = ("*.pyi", "*.pyx", "*.pxd", "*.h", "*.a", "distutils-precedence.pth")
DIRECTORIES = ("tests", "f2py", "_pyinstaller", "testing/tests")


def main() -> None:
    """Strip the directory that the command line names."""
    root = Path(sys.argv[1])
    before = size(root)
    (site,) = root.glob("lib/python3*/site-packages")
    for pattern in PACKAGES:
        remove(site.glob(pattern))
    for pattern in (*DIRECTORIES, *FILES):
        remove(list(site.rglob(pattern)))
    remove(root.glob("bin/pip*"))
    remove(root.glob("bin/[Aa]ctivate*"))
    sys.stdout.write(f"{before >> 20} MiB stripped to {size(root) >> 20} MiB\n")


def remove(paths: Iterable[Path]) -> None:
    """Remove files and directories; one may lie in another that is gone already."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def size(root: Path) -> int:
    """Return the bytes of all files below `root`."""
    files = (path for path in root.rglob("*") if not path.is_symlink())
    return sum(path.stat().st_size for path in files if path.is_file())


main()
