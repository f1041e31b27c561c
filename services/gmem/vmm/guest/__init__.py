"""The guest process of one VM: vCPUs, their programs, and the only mappings."""
