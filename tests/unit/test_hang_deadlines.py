"""How long a phase may last, and what stacks and places say of a process that does not go on."""

import mmap
import random
import signal
import subprocess
import sys

import pytest

from ray_trainer import pulse
from ray_trainer.pulse import Phase, Pulse
from ray_trainer.pulse.board import SIZE_BYTES, Board, Durations, file_in_memory
from ray_trainer.pulse.deadlines import LEARNED_AFTER, Terms, deadline_s, percentile_s
from ray_trainer.pulse.desk import FRESH_S, PATIENCE_FLOORS, SETTLED_S, Desk, Report
from ray_trainer.pulse.stacks import Activity, Frame, StackFile, activity, are_alike, frames_of
from ray_trainer.pulse.verdict import Place, blame

TERMS = Terms(floor_s=10.0, patience_s=1800.0)


def durations(*seconds: float) -> Durations:
    counts = [0] * 42
    for duration in seconds:
        counts[int(duration * 1e6).bit_length()] += 1
    return Durations(tuple(counts), max(seconds, default=0.0))


def test_phase_of_which_little_is_known_gets_all_the_time():
    assert deadline_s(Phase.FORWARD, durations(), TERMS) == 1800
    assert deadline_s(Phase.FORWARD, durations(*[0.01] * (LEARNED_AFTER - 1)), TERMS) == 1800


def test_short_phases_are_given_the_floor():
    assert deadline_s(Phase.FORWARD, durations(*[0.01] * 50), TERMS) == 10


def test_long_phases_are_given_three_times_what_is_usual():
    assert deadline_s(Phase.FORWARD, durations(*[20.0] * 50), TERMS) == pytest.approx(60)


def test_compiling_first_step_is_forgotten_once_it_is_one_of_many():
    few, many = durations(90.0, *[0.1] * 20), durations(90.0, *[0.1] * 500)

    assert deadline_s(Phase.FORWARD, few, TERMS) == pytest.approx(270)
    assert deadline_s(Phase.FORWARD, many, TERMS) == 10


@pytest.mark.parametrize("phase", [Phase.DATA, Phase.HOOK, Phase.VALIDATION])
def test_phase_that_is_long_now_and_then_is_given_three_times_its_longest(phase):
    assert deadline_s(phase, durations(40.0, *[0.001] * 5000), TERMS) == pytest.approx(120)


@pytest.mark.parametrize("phase", [Phase.SETUP, Phase.SAVE, Phase.OTHER])
def test_saving_and_setting_up_are_given_all_the_time_however_short_they_were(phase):
    assert deadline_s(phase, durations(*[0.001] * 5000), TERMS) == 1800
    assert deadline_s(phase, durations(900.0, 0.1), TERMS) == 2700


def test_percentile_is_not_below_the_true_one_and_at_most_twice_it():
    numbers = random.Random(1)
    for _ in range(50):
        seconds = [numbers.lognormvariate(-3, 2) for _ in range(numbers.randint(1, 400))]
        true = sorted(seconds)[-(-99 * len(seconds) // 100) - 1]
        assert true <= percentile_s(durations(*seconds), 0.99) * (1 + 1e-9) <= 2 * true + 2e-6


def test_board_shows_another_process_where_a_pulse_is():
    descriptor = file_in_memory("board", SIZE_BYTES)
    board = Board(descriptor)
    beating = Pulse(memoryview(mmap.mmap(descriptor, SIZE_BYTES)))

    with pulse.begun(beating):
        pulse.beat(Phase.DATA)
        pulse.step(7)
        with pulse.during(Phase.EXCHANGE):
            inside = board.read()
        pulse.beat(Phase.UPDATE)
    pulse.beat(Phase.SAVE)  # nobody's any more

    reading = board.read()
    assert (inside.phase, inside.step, inside.exchanges) == (Phase.EXCHANGE, 7, 1)
    assert (reading.phase, reading.step, reading.beats) == (Phase.UPDATE, 7, 4)
    assert sum(board.durations(Phase.DATA).counts) == 2
    assert board.durations(Phase.DATA).longest_s > 0


STACKS = """Thread 0x00007f8b5d3fe700 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 629 in wait

Current thread 0x00007f8b6b1c4b80 (most recent call first):
  File "/home/me/model.py", line 12 in forward
  File "/home/me/train.py", line 3 in <module>
"""


def test_stack_of_the_training_thread_is_found_among_all():
    assert frames_of(STACKS, 0x7F8B6B1C4B80) == (
        Frame("/home/me/model.py", "12", "forward"),
        Frame("/home/me/train.py", "3", "<module>"),
    )
    assert frames_of(STACKS, 1) == frames_of("", 1) == ()


def test_stack_that_is_not_yet_written_to_its_end_is_like_the_whole_one_and_like_no_other():
    whole = frames_of(STACKS, 0x7F8B6B1C4B80)

    for size in range(len(STACKS)):
        assert are_alike(frames_of(STACKS[:size], 0x7F8B6B1C4B80), whole)
    assert not are_alike(frames_of(STACKS.replace("line 12", "line 13"), 0x7F8B6B1C4B80), whole)
    assert not are_alike(frames_of(STACKS.replace("line 3 ", "line 4 "), 0x7F8B6B1C4B80), whole)


def frames(*files: str) -> tuple[Frame, ...]:
    return tuple(Frame(file, "1", "f") for file in files)


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (frames("/home/me/model.py", "/x/torch/nn/modules/module.py"), Activity.OWN),
        (frames("/x/torch/distributed/distributed_c10d.py", "/home/me/hooks.py"), Activity.WAITS),
        (frames("/x/torch/autograd/graph.py", "/x/torch/_tensor.py"), Activity.WAITS),
        (frames("/home/me/function.py", "/x/torch/autograd/function.py", "/x/torch/autograd/graph.py"), Activity.OWN),
        (frames("/usr/lib/subprocess.py", "/x/torch/_inductor/compile_fx.py", "/home/me/model.py"), Activity.EXCUSED),
        (frames("/usr/lib/python3.11/pdb.py", "/home/me/model.py"), Activity.EXCUSED),
        (frames("/x/site-packages/ray/_private/worker.py", "/home/me/data.py"), Activity.EXCUSED),
        (frames("/usr/lib/python3.11/ssl.py", "/x/http/client.py", "/home/me/data.py"), Activity.OUTSIDE),
        (frames("/usr/lib/python3.11/threading.py", "/usr/lib/python3.11/queue.py", "/home/me/d.py"), Activity.OUTSIDE),
        (frames("/x/ray_trainer/storage/directory.py", "/x/ray_trainer/data/ordered.py"), Activity.OUTSIDE),
        (frames("/home/me/my_queue.py", "/home/me/data.py"), Activity.OWN),
        (frames("/home/me/model.py", *["/x/y.py"] * 9, "/x/site-packages/ray/train/session.py"), Activity.OWN),
        ((), Activity.OWN),
    ],
)
def test_stack_tells_own_work_from_waiting_and_from_what_takes_long(stack, expected):
    assert activity(stack) is expected


def test_rank_that_skipped_an_exchange_is_to_blame_of_two():
    found = blame({0: Place(119, 2, Phase.EXCHANGE), 1: Place(120, 0, Phase.BACKWARD)})

    assert found.ranks == {1}
    assert found.is_certain


def test_rank_that_differs_from_the_others_is_to_blame_be_it_ahead_or_behind():
    usual, ahead, behind = Place(9, 1, 4), Place(10, 0, 3), Place(9, 0, 6)

    assert blame({0: usual, 1: usual, 2: ahead}).ranks == {2}
    assert blame({0: usual, 1: behind, 2: usual}).ranks == {1}


def test_ranks_that_wait_at_the_same_place_are_all_replaced_after_a_long_time():
    place = Place(9, 1, 4)
    now = [100.0]
    desk = Desk(2, floor_s=10.0, clock=lambda: now[0])
    answers = []
    while now[0] < 100 + PATIENCE_FLOORS * 10 + 2:
        answers.append([desk.consider(Report(rank, place, 5)) for rank in (0, 1)])
        now[0] += 1

    first = next(number for number, pair in enumerate(answers) if pair != [None, None])
    assert first >= PATIENCE_FLOORS * 10
    assert all("all ranks wait" in answer for answer in answers[-1])


def test_desk_blames_nobody_while_one_rank_does_something_else():
    now = [100.0]
    desk = Desk(3, floor_s=1.0, clock=lambda: now[0])
    for _ in range(100):
        assert desk.consider(Report(0, Place(9, 1, 4), 5)) is None
        assert desk.consider(Report(2, Place(8, 1, 4), 5)) is None
        now[0] += 1


def test_desk_forgets_what_a_rank_said_that_went_on():
    now = [100.0]
    desk = Desk(2, floor_s=1.0, clock=lambda: now[0])
    behind, ahead = Report(0, Place(9, 1, 4), 5), Report(1, Place(10, 0, 3), 8)

    assert desk.consider(ahead) is None
    now[0] += FRESH_S
    assert desk.consider(behind) is None  # what the other said is old by now
    assert desk.consider(ahead) is None  # and just begins to hold
    now[0] += SETTLED_S
    assert desk.consider(behind) is None  # not the one to blame
    assert "ahead" in (desk.consider(ahead) or "")


SLOW_WRITER = """
import os, signal, sys, time

def write(number, frame):
    os.write(int(sys.argv[1]), b'Thread 0x1 (most recent call first):\\n  File "other.py", line 1 in wait\\n')
    time.sleep(0.2)
    os.write(int(sys.argv[1]), b'Thread 0x2 (most recent call first):\\n  File "mine.py", line 2 in train\\n')

signal.signal(signal.SIGUSR2, write)
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_stacks_are_waited_for_until_the_thread_that_trains_is_among_them():
    """Who writes them may be held up in between on a busy machine."""
    descriptor = file_in_memory("stacks")
    command = [sys.executable, "-c", SLOW_WRITER, str(descriptor)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[descriptor]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        text = StackFile(process.pid, descriptor, signal.SIGUSR2).take_stopped(thread=2)
        process.kill()

    assert frames_of(text, 2) == (Frame("mine.py", "2", "train"),)
