"""A VMM: it runs a guest and does what the guest asks for."""

from tiny_vmm.vmm import TinyVmm

__all__ = ["TinyVmm"]
