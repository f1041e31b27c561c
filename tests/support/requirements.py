"""What a test needs from the machine; where it is missing the skip says what."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FUSE_DEVICE = Path("/dev/fuse")


def require_root() -> None:
    """Skip unless the test may mount: root of this user namespace."""
    if os.geteuid() != 0:
        pytest.skip(f"needs root to mount, runs as uid {os.geteuid()}")


def require_fuse() -> None:
    """Skip unless /dev/fuse is there and opens; looks, and mounts nothing."""
    if not FUSE_DEVICE.exists():
        pytest.skip(f"needs {FUSE_DEVICE}, which this machine does not have")
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"needs {FUSE_DEVICE}, which does not open: {error.strerror}")


def require_programs(*names: str) -> None:
    """Skip unless all these programs are installed."""
    for name in names:
        if shutil.which(name) is None:
            pytest.skip(f"needs the program {name}, which is not installed")


def require_engine() -> None:
    """Skip unless a container engine answers, and a compose that speaks to it."""
    if shutil.which("docker") is None:
        pytest.skip("needs a container engine: no docker command here")
    info = subprocess.run(
        ["docker", "info", "--format", "{{.ServerVersion}}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if info.returncode or not info.stdout.strip():
        why = (info.stderr.strip() or "no answer").splitlines()[-1]
        pytest.skip(f"needs a container engine that runs: {why}")
    plugin = subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False, timeout=30
    )
    if plugin.returncode and shutil.which("docker-compose") is None:
        pytest.skip("needs 'docker compose' or 'docker-compose'")
