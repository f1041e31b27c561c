"""The VM types that a line asks for, as variants."""

from __future__ import annotations

from typing import Final

from gmem.uapi.flags import VmType

VM_TYPES: Final = {"default": VmType.DEFAULT, "sw-protected": VmType.SW_PROTECTED}
