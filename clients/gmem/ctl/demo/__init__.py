"""The demo: one VM with 1G pages from boot to teardown, in separate processes."""
