"""Moved to tests.faults.checkout."""

from tests.faults.checkout import *  # noqa: F403
