"""The conformance list, one module for each of its sections.

Importing this package registers all of them.
"""

from gmem.testing.conformance.cases import section_a

__all__ = ["section_a"]
