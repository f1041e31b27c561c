"""The allocator's state machines; no I/O."""
