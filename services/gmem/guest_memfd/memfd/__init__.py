"""The data plane without FUSE: a memfd per inode and view, weaker enforcement."""
