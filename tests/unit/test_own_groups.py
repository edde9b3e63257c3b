"""Processes that do not hear a signal to the group of who started them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from ray_trainer.cluster.own_groups import own_process_groups


def group_of_a_child() -> int:
    """As Ray starts its processes: with something to do between fork and exec."""
    command = [sys.executable, "-c", "import os; print(os.getpgrp())"]
    return int(subprocess.run(command, preexec_fn=lambda: None, stdout=subprocess.PIPE, check=True).stdout)


def test_process_started_inside_is_not_in_the_group_of_its_parent():
    with own_process_groups():
        assert group_of_a_child() != os.getpgrp()


def test_processes_started_outside_and_by_other_threads_stay_in_the_group():
    with own_process_groups(), ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(group_of_a_child).result() == os.getpgrp()

    assert group_of_a_child() == os.getpgrp()
