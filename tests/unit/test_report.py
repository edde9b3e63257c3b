"""`report`: the page of runs made by hand and of a real one; what is torn, empty, huge or hostile."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import experiments
import pytest

from ray_trainer.checkpoint.catalog import open_storage
from ray_trainer.cli import main
from ray_trainer.report import read_run, render
from ray_trainer.report.charts import nice_ticks, thinned
from ray_trainer.report.sentences import LONGEST, sentence

START = 1_800_000_000.0
EVENTS = [
    {"event": "run_started", "step": 0, "epoch": 0},
    {"event": "workers_started", "step": 0, "epoch": 0, "num_workers": 2},
    {"event": "checkpoint_saved", "step": 4, "checkpoint": "checkpoint_epoch0000_step00000004", "stall_s": 0.5},
    {"event": "straggler", "step": 5, "rank": 1, "ratio": 2.46, "phase": "data", "excess_s": 0.1},
    {
        "event": "hang",
        "step": 6,
        "rank": 1,
        "phase": "forward",
        "seconds": 31.0,
        "last_lines": ["model.py:7 in forward"],
    },
    {"event": "failure", "cause": "rank 1: the worker process died"},
    {"event": "workers_started", "step": 4, "epoch": 0, "num_workers": 2, "attempt": 2},
    {"event": "checkpoint_rejected", "step": 4, "checkpoint": "checkpoint_x", "reason": "a file is missing"},
    {"event": "resumed", "step": 4, "from": "checkpoint_epoch0000_step00000004", "tier": "memory"},
    {"event": "rolled_back", "step": 7, "to_step": 5, "reason": "gradient norm nan", "tier": "memory"},
    {"event": "corruption", "step": 8, "ranks": [0], "tensors": ["layers.0.weight"]},
    {"event": "preemption", "reason": "the node is drained"},
    {"event": "rejoined", "step": 9, "replaced": [1], "waited_s": 13.2},
    {"event": "run_finished", "step": 10, "epoch": 1, "reason": "the configured length is reached"},
]


def make_run(place: Path, events=EVENTS, rows=(), config="training:\n  epochs: 2\n") -> Path:
    place.mkdir(parents=True)
    stamped = [{"time": START + 10 * number, "attempt": 1, **event} for number, event in enumerate(events)]
    (place / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in stamped))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "run.yaml").write_text(config)
    return place


def row(step: int, split: str = "train", **values) -> dict:
    return {"step": step, "epoch": 0, "split": split, "time": START + step, **values}


def page_of(place: Path) -> str:
    return render(read_run(open_storage(place), START + 200))


def everything(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text",
    [
        "2 workers started.",
        "2 workers started again (attempt 2).",
        "checkpoint_epoch0000_step00000004 was saved (training waited 0.50 s).",
        "Rank 1 is slow: 2.5 times the others, mostly in data.",
        "Rank 1 hung in forward for 31 s at model.py:7 in forward, and was ended.",
        "Failure: rank 1: the worker process died",
        "Checkpoint_x is broken and set aside: a file is missing.",
        "Resumed at step 4 from checkpoint_epoch0000_step00000004.",
        "Back from step 7 to the state of step 5: gradient norm nan.",
        "Memory or a processor of rank 0 went wrong before step 8, in layers.0.weight.",
        "The node is drained.",
        "No step is lost: rank 1 was replaced after step 9, 13 s were waited.",
        "The run finished: the configured length is reached.",
    ],
)
def test_an_event_is_told_in_a_sentence(tmp_path, text):
    assert text in page_of(make_run(tmp_path / "a"))


def test_goodput_is_shown_with_its_parts(tmp_path):
    page = page_of(make_run(tmp_path / "a"))

    # workers were there from 10 to 50 and from 60 to 130; what followed the save at 20 was lost
    assert "steps done again: 30 s (25.0 %)" in page
    assert "without workers: 10 s (8.3 %)" in page
    assert "waiting for checkpoints: 0.5 s (0.4 %)" in page
    assert "Goodput: 66.2 %" in page


def test_a_real_run_is_shown_and_only_the_page_is_written(tmp_path, capsys):
    experiments.run(tmp_path / "a")
    before = everything(tmp_path / "a")

    assert main(["report", str(tmp_path / "a"), "--output", str(tmp_path / "pages" / "a.html")]) == 0

    page = (tmp_path / "pages" / "a.html").read_text()
    assert everything(tmp_path / "a") == before
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages" / "a.html")
    assert "<h1>a</h1>" in page
    assert 'class="state finished"' in page
    assert set(re.findall(r"<h3>(\w+)</h3>", page)) >= {
        "loss",
        "accuracy",
        "learning_rate",
        "samples_per_s",
        "data_wait_s",
    }
    assert experiments.checkpoints(tmp_path / "a")[-1] in page
    assert "val_loss" in page
    assert page.count("epochs: 2") == 1
    assert "<dt>torch</dt>" in page


def test_without_output_the_page_is_in_the_directory_of_the_run(tmp_path, capsys):
    run_dir = make_run(tmp_path / "a")
    before = everything(run_dir)

    assert main(["report", str(run_dir)]) == 0

    assert Path(capsys.readouterr().out.strip()) == run_dir / "report.html"
    assert everything(run_dir) == before | {run_dir / "report.html": (run_dir / "report.html").read_bytes()}


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.yaml").write_text("experiment: digits.py:experiment")  # what a run is started from

    assert main(["report", str(tmp_path / "a")]) == 2

    assert "is no run directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.yaml"]


def test_a_page_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()

    assert main(["report", str(make_run(tmp_path / "a")), "--output", str(tmp_path / "file" / "a.html")]) == 2

    assert "Name a file with --output" in capsys.readouterr().err


def test_hostile_names_and_values_stay_text(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    run_dir = make_run(
        tmp_path / "<script>",
        [{"event": "failure", "cause": evil}, {"event": evil, evil: evil}],
        [row(1, **{evil: 1.0}), row(2, **{evil: 2.0})],
        config=f"# {evil}\n",
    )
    (run_dir / "environment.json").write_text(json.dumps({"host": evil, "packages": {evil: evil}}))

    page = page_of(run_dir)

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_page_needs_nothing_else(tmp_path):
    page = page_of(make_run(tmp_path / "a", rows=[row(1, loss=1.0)]))

    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", page)


def test_empty_files_make_a_page(tmp_path):
    run_dir = make_run(tmp_path / "a", events=[], config="")

    page = page_of(run_dir)

    assert "No metric has been logged yet." in page
    assert "Nothing has been recorded yet." in page
    assert 'class="state empty"' in page


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_torn_files_make_a_page_of_what_is_whole(tmp_path, kept):
    run_dir = make_run(
        tmp_path / "a", rows=[row(step, loss=1 / step) for step in range(1, 9)], config="training: {epochs: 2}\n"
    )
    (run_dir / "environment.json").write_text('{"python": "3.11", "packages": {"torch": "2"}}')
    for path in run_dir.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])

    page = page_of(run_dir)

    assert "The run was started." in page
    assert "<h3>loss</h3>" in page


def test_rows_of_wrong_types_are_left_out(tmp_path):
    run_dir = make_run(tmp_path / "a", rows=[row(1, loss=0.5), row(2, loss=0.25)])
    odd = [
        {"event": "failure"}, {"time": "noon", "event": "failure", "cause": "x"}, {"time": 1e300, "event": "hang"},
        {"time": START, "event": ["a"]}, {"time": START, "event": "hang", "rank": {}, "phase": 1, "seconds": "long"},
        {"time": START, "event": "workers_started", "step": "3", "attempt": None, "num_workers": "two"},
        {"time": START, "event": "checkpoint_saved", "step": 1.5, "stall_s": "x", "size_bytes": []},
        {"time": START + 1, "event": "straggler", "rank": 1, "ratio": None, "phase": None},
    ]  # fmt: skip
    with (run_dir / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in odd) + "[1]\nnull\n\x00\n")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": "x", "split": "train", "loss": 9}\n'
            '{"step": 3, "split": "train", "loss": NaN, "data_wait_s": "x"}\n'
        )
        file.write('{"step": 4, "split": "train", "loss": 1' + "0" * 400 + '}\n{"step": 5, "split": [], "loss": 3}\n')

    page = page_of(run_dir)

    assert "train: 0.25 (2 not finite)" in page


def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path):
    values = [1.0, 0.5, None, 0.25, 0.2]

    page = page_of(make_run(tmp_path / "a", rows=[row(step, loss=value) for step, value in enumerate(values)]))

    assert page.count('class="curve train"') == 2
    assert "train: 0.2 (1 not finite)" in page


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [1e308, -1e308], [5e-324, 0.0], [1e-300, 2e-300], [1e16, 1e16 + 2]]
)
def test_values_of_any_size_are_drawn_inside_the_box(tmp_path, values):
    page = page_of(make_run(tmp_path / "a", rows=[row(step, loss=value) for step, value in enumerate(values)]))

    places = [
        tuple(map(float, pair.split(",")))
        for points in re.findall(r'points="([^"]+)"', page)
        for pair in points.split()
    ]
    assert places
    assert all(0 <= x <= 400 and 0 <= y <= 220 for x, y in places)


def test_thinning_keeps_the_lowest_and_the_highest():
    points = [(float(step), float(step % 97)) for step in range(100_000)]
    points[54_321] = (54_321.0, 1e6)
    points[12_345] = (12_345.0, -1e6)

    kept = thinned(points)

    assert len(kept) <= 500
    assert {points[54_321], points[12_345]} <= set(kept)
    assert kept == sorted(kept)


def test_ticks_are_round_numbers_inside_the_span():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3, 97) == [20, 40, 60, 80]


def test_many_rows_and_events_make_a_small_page(tmp_path):
    names = [f"metric_{number}" for number in range(60)]
    rows = [
        row(step, split, **dict.fromkeys(names, step * 7919 % 1000 / 7))
        for step in range(700)
        for split in ("train", "val")
    ]
    kinds = ("failure", "workers_started", "resumed", "checkpoint_saved")
    events = [
        {
            "event": kinds[number % 4],
            "cause": "x" * 5000,
            "num_workers": 2,
            "step": number,
            "from": "c",
            "checkpoint": "c",
        }
        for number in range(4000)
    ]

    page = page_of(make_run(tmp_path / "a", events, rows))

    assert len(page.encode()) < 2_000_000
    assert "lines in between are left out" in page
    assert "Not drawn: metric_40" in page


def test_repeated_checkpoints_are_one_line(tmp_path):
    saves = [
        {"event": "checkpoint_saved", "step": step, "checkpoint": f"c{step}", "stall_s": 0.25} for step in range(8)
    ]

    page = page_of(make_run(tmp_path / "a", saves))

    assert "8 checkpoints were saved until" in page
    assert "training waited 2.00 s for them" in page


def test_an_unknown_event_is_told_plainly_and_shortly():
    assert sentence({"event": "moon_landing", "time": 1.0, "crew": 3}) == "moon landing: crew 3"
    assert len(sentence({"event": "failure", "cause": "x" * 10_000})) < LONGEST + 5


def test_the_page_is_made_without_ray():
    code = "import sys, ray_trainer.report.page as page; assert 'ray' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_nothing_is_cut_off_at_400_pixels_in_a_browser(tmp_path):
    rows = [row(step, split, loss=1 / (step + 1), accuracy=step / 9) for step in range(9) for split in ("train", "val")]
    page = page_of(make_run(tmp_path / ("a_long_name_" * 8), rows=rows))
    frame = "<iframe id=f style='width:400px;height:900px;border:0' srcdoc=\"{}\"></iframe>".format(
        re.sub(r"<meta http-equiv[^>]+>", "", page).replace("&", "&amp;").replace('"', "&quot;")
    )
    cut = "document.title='w'+(d.scrollWidth-d.clientWidth)"
    measure = f"<script>onload=()=>{{let d=f.contentDocument.documentElement;{cut}}}</script>"
    (tmp_path / "page.html").write_text(f"<html><body>{frame}{measure}</body></html>")

    dom = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip

    assert re.findall(r"<title>w(\d+)</title>", dom) == ["0"]
