"""Moved to tests.faults.kills."""

from tests.faults.kills import *  # noqa: F403
