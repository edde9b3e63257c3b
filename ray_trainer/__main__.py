"""``python -m ray_trainer`` is ``ray-trainer``."""

import sys

from ray_trainer.cli import main

sys.exit(main())
