"""Where checkpoints are kept."""

import enum


class Tier(enum.IntFlag):
    """Storage, which survives everything, and memory outside of the workers, which survives those."""

    NONE = 0
    STORAGE = 1
    MEMORY = 2
