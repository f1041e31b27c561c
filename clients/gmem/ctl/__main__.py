"""`python -m gmem.ctl` is gmemctl."""

from __future__ import annotations

from gmem.ctl.main import main

main()
