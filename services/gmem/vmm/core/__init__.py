"""VMs, memslots, attributes and stage 2; no I/O."""
