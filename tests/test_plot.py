"""plot.py: curves of one or several runs, and one line where there is nothing to draw.

    python -m pytest tests/test_plot.py
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from plot import plot, read_metrics

SCRIPT = Path(__file__).parent.parent / "plot.py"


def write_run(folder, steps=12, tail=""):
    """A run as train.py writes it: row 0 is the held-out start, null where nothing was measured."""
    folder.mkdir()
    rows = [{"step": step, "reward": step / 20 if step else None, "exact": 0.1 if step else None,
             "kl": None, "heldout_reward": 0.2 + step / 50 if step % 5 == 0 else None}
            for step in range(steps)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def command(*arguments, isolate=()):
    return subprocess.run([sys.executable, *isolate, SCRIPT, *arguments],
                          capture_output=True, text=True)


def test_a_run_gets_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    done = command(run)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "curves.png"}, (
        "no unfinished file may stay")


def test_several_runs_are_drawn_over_each_other_into_the_named_file(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "first"), write_run(tmp_path / "second", steps=3)]
    plot(runs, tmp_path / "both.svg")
    picture = (tmp_path / "both.svg").read_text()
    assert "#1f77b4" in picture and "#ff7f0e" in picture, "each run has a colour of its own"
    assert not (runs[0] / "curves.png").exists()


def test_a_run_with_nothing_but_the_start_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot([write_run(tmp_path / "run", steps=1)], tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()


def test_a_row_still_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=4, tail='{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(run)] == [0, 1, 2, 3]


def test_a_broken_row_is_named_with_its_line(tmp_path):
    run = write_run(tmp_path / "run", steps=2, tail='oops\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 3 .*oops"):
        read_metrics(run)


@pytest.mark.parametrize("make", [
    lambda path: path, lambda path: path.mkdir(),
    lambda path: write_run(path, steps=0), lambda path: write_run(path, 2, tail="oops\noops\n")])
def test_what_is_no_run_is_one_line_and_status_2(tmp_path, make):
    make(tmp_path / "run")
    done = command(tmp_path / "run")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path / "run") in done.stderr, done.stderr


def test_an_unknown_kind_of_picture_is_one_line_and_leaves_no_file(tmp_path):
    pytest.importorskip("matplotlib")
    done = command(write_run(tmp_path / "run"), "--out", tmp_path / "curves.xyz")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_matplotlib_it_says_what_to_do(tmp_path):
    run = write_run(tmp_path / "run")
    done = command(run, isolate=["-I", "-S"])  # -S: no installed packages
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install matplotlib" in done.stderr
