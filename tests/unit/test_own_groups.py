"""Processes that do not hear a signal to the group of who started them."""

import json
import subprocess
import sys

# in a process of its own: a fork beside threads is not safe where libraries such as torch are at work
PROGRAM = """
import json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from ray_trainer.cluster.own_groups import own_process_groups

def is_in_group():  # of a process that is started as Ray starts its own: with something to do between fork and exec
    command = [sys.executable, "-c", "import os; print(os.getpgrp())"]
    child = subprocess.run(command, preexec_fn=lambda: None, stdout=subprocess.PIPE, check=True)
    return int(child.stdout) == os.getpgrp()

found = {"before": is_in_group()}
with own_process_groups(), ThreadPoolExecutor(1) as other_thread:
    found["inside"] = is_in_group()
    found["by another thread"] = other_thread.submit(is_in_group).result()
found["after"] = is_in_group()
print(json.dumps(found))
"""


def test_only_processes_that_this_thread_starts_inside_are_not_in_the_group_of_their_parent():
    told = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)

    assert json.loads(told.stdout) == {"before": True, "inside": False, "by another thread": True, "after": True}
