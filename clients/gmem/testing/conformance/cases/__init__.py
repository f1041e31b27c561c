"""The conformance list, one module for each of its sections.

Importing this package registers all of them.
"""

from gmem.testing.conformance.cases import (
    section_a,
    section_b_c,
    section_d,
    section_e,
    section_f,
    section_g,
    section_h,
    section_i,
    section_j,
    section_k,
    section_l,
    section_m,
    section_n,
)

__all__ = [
    "section_a",
    "section_b_c",
    "section_d",
    "section_e",
    "section_f",
    "section_g",
    "section_h",
    "section_i",
    "section_j",
    "section_k",
    "section_l",
    "section_m",
    "section_n",
]
