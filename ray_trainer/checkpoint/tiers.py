"""Where checkpoints are kept."""

import enum


class Tier(enum.IntFlag):
    """Storage, which survives everything, memory outside of the workers, which survives those, and such a survivor."""

    NONE = 0
    STORAGE = 1
    MEMORY = 2
    SURVIVOR = 4
