"""The conformance list as cases, and what runs them against a kernel.

`kvm` has what a case asks, `emulator` answers it with an emulated host. `registry` has
the cases, once `gmem.testing.conformance.cases` was loaded; `runner` runs them.
"""
