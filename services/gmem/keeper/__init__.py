"""The keeper: holds the descriptors of one host's views, and makes them with root."""
