"""Inodes, faultability, filemap and conversion; no I/O."""
