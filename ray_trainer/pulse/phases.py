"""What a training process may be doing."""

import enum


class Phase(enum.IntEnum):
    """Where a process is; the time since the last change is what tells a hang.

    `SETUP`, `SAVE` and `OTHER` reach outside or happen once, so what is usual there is not known: they get all the
    time. In `EXCHANGE` a rank waits for others, and in `BACKWARD` it may.
    """

    SETUP = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    EXCHANGE = 4
    UPDATE = 5
    HOOK = 6
    VALIDATION = 7
    SAVE = 8
    OTHER = 9


#: Phases whose time is a rank's own: no waiting for other ranks, no work that is one rank's duty.
COMPARED = (Phase.DATA, Phase.FORWARD, Phase.UPDATE, Phase.HOOK)
#: Never learned: unlike each other, or too seldom.
PATIENT = frozenset({Phase.SETUP, Phase.SAVE, Phase.OTHER})
#: Judged by the longest so far: a fetch may open a file, a hook may evaluate, each now and then.
UNEVEN = frozenset({Phase.DATA, Phase.HOOK, Phase.VALIDATION})
