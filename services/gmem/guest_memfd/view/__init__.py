"""The FUSE session: each inode as two real files over one page store."""
