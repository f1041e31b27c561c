"""Run by every Python that is started with this directory on PYTHONPATH."""

from mutant_hook import install_from_environment  # type: ignore[import-not-found]

install_from_environment()
