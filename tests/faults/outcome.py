"""What came of a fault."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """One row of the table.

    Attributes
    ----------
    fault : str
        What was done to which part.
    injected, survived : int
        How often, and how often nothing was lost and nothing wrong.
    lost, wrong : int
        How often something was missing afterwards, or other than without the fault.
    details : str
        What else was measured.
    """

    fault: str
    injected: int
    survived: int
    lost: int
    wrong: int
    details: str = ""
