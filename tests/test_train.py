"""The command line, end to end on the bundled model: python -m pytest tests/test_train.py"""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from corpus import key_seed

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data/tiny"
SMALL = ["--prompts", "3", "--group-size", "4", "--max-new-tokens", "24", "--eval-tasks", "6", "--eval-every", "2",
         "--save-every", "2"]
TIMES = {"tokens_per_second", "memory_mb"}


@pytest.fixture(scope="module")
def snippets(tmp_path_factory):
    """The first 30 bundled programs: enough for ten families."""
    path = tmp_path_factory.mktemp("corpus") / "snippets.jsonl"
    path.write_text("".join((ROOT / "data/snippets.jsonl").read_text().splitlines(keepends=True)[:30]))
    return path


def command(*arguments):
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def run(*arguments, **options):
    result = subprocess.run(command(*arguments), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(folder, name="metrics.jsonl"):
    """The rows of a log without what may differ between equal runs."""
    parsed = map(json.loads, (folder / name).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("seconds_")} for row in parsed]


@pytest.fixture(scope="module")
def finished(snippets, tmp_path_factory):
    """A run of four steps: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run("--snippets", snippets, "--out", folder, "--steps", 4, *SMALL)


def test_a_run_folder_holds_what_the_design_names(finished):
    folder, printed = finished
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "heldout.jsonl", "summary.json", "model/config.json"):
        assert (folder / name).is_file(), name
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    for name in ("reward", "format", "stdout", "stderr", "exact", "loss", "grad_norm", "entropy", "kl",
                 "clip_fraction", "logprob_gap"):
        assert all(name in row for row in metrics[1:]), name
    assert [row["step"] for row in metrics if "heldout_exact" in row] == [0, 2, 4]
    assert "held-out exact" in printed.splitlines()[-1]
    assert json.loads((folder / "config.json").read_text())["steps"] == 4


def test_heldout_rows_one_per_measurement_and_task(finished):
    found = rows(finished[0], "heldout.jsonl")
    keys = [(row["step"], row["task"]) for row in found]
    assert len(set(keys)) == len(keys) and {row["step"] for row in found} == {0, 2, 4}
    assert {row["set"] for row in found} <= {"variants", "families"}
    assert set(found[0]) == {"step", "task", "set", "kind", "reward", "exact", "greedy_reward", "greedy_exact"}


def test_the_summary_has_both_measures_with_intervals(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    for name in ("reward", "exact"):
        for part in ("before", "after", "change_low", "change_high"):
            assert summary[f"heldout_{name}_{part}"] is not None
    assert 0 <= summary["constant_answer_reward"] <= 1
    assert {"greedy_exact_before", "greedy_exact_after"} <= set(summary)


def test_the_trained_model_moved_and_loads_everywhere(finished):
    import transformers
    trained, start = load_file(finished[0] / "model/model.safetensors"), load_file(TINY / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert any(not torch.equal(trained[name], start[name].float()) for name in start)
    model = transformers.AutoModelForCausalLM.from_pretrained(finished[0] / "model")
    assert model.config.model_type == "qwen2"
    transformers.AutoTokenizer.from_pretrained(finished[0] / "model")


def test_the_same_command_gives_the_same_rows_and_one_interrupted_continues_bit_equal(finished, snippets, tmp_path):
    """Stopped by Ctrl-C, killed hard, resumed twice: the logs and weights are those of the run never stopped."""
    folder, cut = finished[0], tmp_path / "cut"
    process = subprocess.Popen(command("--snippets", snippets, "--out", cut, "--steps", 4, *SMALL),
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("   1/4"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and f"--resume {cut}" in rest, rest
    assert len(rows(cut)) < 5, "it stopped early"
    process = subprocess.Popen(command("--resume", cut), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("   3/4"):
            process.kill()
            break
    process.wait()
    run("--resume", cut)
    assert rows(cut) == rows(folder) and rows(cut, "heldout.jsonl") == rows(folder, "heldout.jsonl")
    assert rows(cut, "samples.jsonl") == rows(folder, "samples.jsonl")
    assert (cut / "model/model.safetensors").read_bytes() == (folder / "model/model.safetensors").read_bytes()


def test_killed_before_the_first_checkpoint_starts_again(finished, snippets, tmp_path):
    process = subprocess.Popen(command("--snippets", snippets, "--out", tmp_path / "r", "--steps", 2, *SMALL),
                               stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "r/config.json").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    run("--resume", tmp_path / "r")
    assert rows(tmp_path / "r")[:3] == rows(finished[0])[:3]


def test_a_finished_run_is_left_alone_and_may_grow(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "finished already" in run("--resume", folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run("--resume", folder, "--steps", 5)
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4, 5]


def test_one_usable_snippet_is_enough(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"code": "n = int(input())\nm = n * 3 + 1\nprint(m, n)\n",
                                "inputs": [{"input": "42\n"}, {"input": "17\n"}], "source": "one"}) + "\n")
    printed = run("--snippets", path, "--out", tmp_path / "r", "--steps", 1, *SMALL)
    assert "1 to train on, 0 of held-out families" in printed
    path.write_text(json.dumps({"code": "a = 'x'\nb = 'y'\nc = 'z'\nprint(a, b, c)\n", "source": "no variants"}) + "\n")
    run("--snippets", path, "--out", tmp_path / "s", "--steps", 1, *SMALL)


def test_a_folder_of_ordinary_files_is_counted_by_reason(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "fine.py").write_text("for i in range(3):\n    print(i * i)\nprint('done')\n")
    (folder / "silent.py").write_text("def f():\n    return 1\n\nx = f() + f() + f()\n")
    (folder / "broken.py").write_bytes(b"print('\xff\xfe')\n" * 9)
    (folder / "binary.py").write_bytes(b"\0\1\2" * 99)
    (folder / "sub").mkdir()
    (folder / "sub/needs.py").write_text("import no_such_package\nno_such_package.run()\nprint('never here')\n")
    printed = run("--snippets", folder, "--out", tmp_path / "r", "--steps", 1, *SMALL)
    [line] = [line for line in printed.splitlines() if line.startswith("corpus:")]
    assert "5 snippets read, 1 usable" in line
    for reason in ("no output 1", "binary", "needs files, network or packages 1"):
        assert reason in line, line


# ---- bad input: one line on stderr, status 2, nothing created ----

def refuse(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            train.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured
    lines = [line for line in captured.err.splitlines() if "snippet/s" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("train.py: "), captured.err
    return lines[0]


@pytest.mark.parametrize("arguments, part", [
    (["--no-such-flag"], "--no-such-flag"),
    (["--steps", "many"], "--steps"),
    (["--lr", "-1"], "--lr -1.0 must be at least"),
    (["--lr", "nan"], "--lr nan"),
    (["--group-size", "1"], "--group-size 1 must be at least 2"),
    (["--prompts", "0"], "--prompts 0"),
    (["--prompts", "5", "--updates", "2"], "the nearest is 4"),
    (["--temperature", "0"], "--temperature"),
    (["--threshold", "2"], "--threshold 2.0"),
    (["--dtype", "fp8"], "--dtype fp8"),
    (["--device", "tpu"], "--device tpu"),
    (["--preset", "paper"], "--preset paper needs --snippets"),
    (["--model", "./no-such-model"], "no-such-model"),
    (["--snippets", "no-such.jsonl"], "no-such.jsonl"),
    (["--resume", "no-such-run"], "no-such-run"),
])
def test_wrong_flags_and_places(arguments, part, capsys, monkeypatch, tmp_path):
    out = [] if "--resume" in arguments else ["--out", tmp_path / "r"]
    assert part in refuse(capsys, monkeypatch, *arguments, *out)
    assert not (tmp_path / "r").exists(), "a refused run creates no file"


def broken_model(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(TINY, folder)
    if name == "no-config":
        (folder / "config.json").unlink()
    elif name == "unsupported":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2"]}))
    else:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:len(content) // 2])
    return folder


@pytest.mark.parametrize("name, part", [("no-config", "config.json"), ("unsupported", "GPT2"),
                                        ("truncated", "model.safetensors")])
def test_broken_model_folders(name, part, capsys, monkeypatch, tmp_path):
    assert part in refuse(capsys, monkeypatch, "--model", broken_model(tmp_path, name), "--out", tmp_path / "r")


@pytest.mark.parametrize("text, part", [
    ('{"code": "print(1)", "inputs": []}\n{"code": \n', ":2"),
    ("", "no task can be made"),
    ('{"code": "x = 1 # nothing is ever printed\\ny = 2\\nz = 3\\n", "inputs": []}\n', "no output 1"),
])
def test_broken_and_useless_corpora(text, part, capsys, monkeypatch, tmp_path):
    path = tmp_path / "snippets.jsonl"
    path.write_text(text)
    line = refuse(capsys, monkeypatch, "--snippets", path, "--out", tmp_path / "r")
    assert part in line and str(path) in line


def test_an_existing_run_is_not_overwritten(finished, capsys, monkeypatch):
    assert "--resume" in refuse(capsys, monkeypatch, "--out", finished[0])


def test_a_changed_setting_or_corpus_is_refused_by_name(finished, snippets, capsys, monkeypatch, tmp_path):
    assert "--lr" in refuse(capsys, monkeypatch, "--resume", finished[0], "--lr", "0.5")
    assert "--steps" in refuse(capsys, monkeypatch, "--resume", finished[0], "--steps", "1")
    folder, corpus = tmp_path / "r", tmp_path / "snippets.jsonl"
    shutil.copytree(finished[0], folder)
    corpus.write_text(snippets.read_text() + "\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "snippets": str(corpus)}))
    assert "--snippets" in refuse(capsys, monkeypatch, "--resume", folder, "--steps", "9")


def test_seeds_depend_on_what_they_are_for():
    assert len({key_seed(0, "rollouts", 1), key_seed(0, "rollouts", 2), key_seed(0, "heldout", 1),
                key_seed(1, "rollouts", 1)}) == 4


def test_the_paper_preset_has_the_papers_numbers():
    paper = train.Settings(**train.PRESETS["paper"])
    assert (paper.prompts, paper.group_size, paper.updates, paper.lr) == (512, 5, 4, 1e-6)
    assert (paper.clip_low, paper.clip_high, paper.kl_coef, paper.max_new_tokens) == (0.2, 0.3, 0.01, 4096)
