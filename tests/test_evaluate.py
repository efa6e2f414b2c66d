"""Held-out figures and public benchmarks: python -m pytest tests/test_evaluate.py

The benchmark rows here are made up; only their fields are those of the published files.
"""
import gzip
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch

import evaluate
from evaluate import constant_answer_reward, extract_assertion, extract_code, heldout_rows, paired_change
from model import GPT, Config
from reward import Reward
from sandbox import Execution, Sandbox
from tasks import Task, render_answer

ROWS = {
    "cruxeval-o": [{"id": "s_0", "code": "def f(a, b):\n    return a + '==' + b", "input": "'x', 'y'",
                    "output": "'x==y'"},
                   {"id": "s_1", "code": "def f(n):\n    return [n] * 2", "input": "3", "output": "[3, 3]"}],
    "humaneval": [{"task_id": "H/0", "entry_point": "first", "canonical_solution": "    return xs[0]\n",
                   "prompt": "from typing import List\n\n\ndef first(xs: List[int]) -> int:\n    \"\"\" The first.\n"
                             "    >>> first([7, 8])\n    7\n    \"\"\"\n",
                   "test": "def check(candidate):\n    assert candidate([1, 2]) == 1\n"}],
    "mbpp": [{"task_id": 1, "text": "Add two numbers.", "code": "def plus(a, b):\r\n  return a + b",
              "test_setup_code": "", "test_list": ["assert plus(1, 2) == 3", "assert plus(0, 0) == 0"]}],
    "mbppplus": [{"task_id": "Mbpp/1", "entry_point": "mid", "atol": 0, "contract": "", "plus_input": [[[4, 4], 1]],
                  "prompt": '"""\nMean and type of a tuple.\nassert mid((1, 2), 1) == (1.5, "tuple")\n"""\n',
                  "canonical_solution": "def mid(xs, n):\n    return (sum(xs) / len(xs) * n, type(xs).__name__)\n",
                  "base_input": [[[1, 2], 1], [[3], 2]], "assertion": 'assert mid((1, 2), 1) == (1.5, "tuple")\n'},
                 {"task_id": "Mbpp/2", "entry_point": "third", "atol": 0, "contract": "", "plus_input": {},
                  "prompt": '"""\nA third.\nassert third(3) == 1\n"""\n',
                  "canonical_solution": "def third(x):\n    return x / 3\n", "base_input": [[1], [7]],
                  "assertion": "assert third(3 * 1) == 1\n"}],
}
ROWS["cruxeval-i"] = ROWS["cruxeval-o"]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=5.0) as sandbox:
        yield sandbox


def canonical(benchmark, row):
    if benchmark.startswith("cruxeval"):
        return f"[ANSWER]\nassert f({row['input']}) == {row['output']}\n[/ANSWER]"
    code = row["code"] if "code" in row else row["canonical_solution"]
    return f"Here:\n\n```python\n{row['prompt'] + code if benchmark == 'humaneval' else code}\n```\nDone."


def judge(benchmark, completion, sandbox, row=0):
    _, _, program = evaluate.BENCHMARKS[benchmark](ROWS[benchmark][row])
    return evaluate.run_programs([program(completion)], sandbox, timeout=5.0)[0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cli(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of evaluate.py."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = 0
    try:
        evaluate.main()
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


# ---- benchmarks ----

@pytest.mark.parametrize("benchmark, n", [(name, n) for name in ROWS for n in range(len(ROWS[name]))])
def test_canonical_solutions_pass(benchmark, n, sandbox):
    assert judge(benchmark, canonical(benchmark, ROWS[benchmark][n]), sandbox, n) is True


@pytest.mark.parametrize("benchmark, completion", [
    ("cruxeval-o", "[ANSWER]\nassert f('x', 'y') == 'xy'\n[/ANSWER]"),
    ("cruxeval-o", "[ANSWER]\nassert f('x', 'y') == f('x',  'y')\n[/ANSWER]"),        # asks Python for the answer
    ("cruxeval-o", "assert f('x', 'y') == 'no' or True"),
    ("cruxeval-o", "''), ('"), ("cruxeval-o", "exit()"), ("cruxeval-o", ""), ("cruxeval-o", "\0"),
    ("cruxeval-i", "[ANSWER]\nassert f('y', 'x') == 'x==y'\n[/ANSWER]"),
    ("cruxeval-i", "assert 'x==y' == 'x==y'"),                                        # no call of f
    ("cruxeval-i", "[ANSWER]\nassert (f('', '') or 'x==y') == 'x==y'\n[/ANSWER]"),
    ("humaneval", "    return xs[-1]\n"), ("humaneval", "    pass\n"), ("humaneval", ""),
    ("mbpp", "```python\ndef plus(a, b):\n    return 3\n```"), ("mbpp", "I can't."), ("mbpp", "\ud800"), ("mbpp", "\0"),
    ("mbppplus", "```python\ndef mid(xs, n):\n    return (sum(xs) / len(xs), 'tuple')\n```"),
])
def test_wrong_answers_fail(benchmark, completion, sandbox):
    assert judge(benchmark, completion, sandbox) is False


@pytest.mark.parametrize("end", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "print('passed')", "raise SystemExit",
    "import os; os.kill(os.getpid(), 9)", "assert_ = True\nif True: exit()", "x = 1 + \\", "'''", "while True: pass",
    "import atexit, os; atexit.register(os._exit, 0)\nraise ValueError",
])
def test_leaving_before_the_tests_never_passes(end, sandbox):
    code = f"```python\ndef plus(a, b):\n    return 3 if b else 0\n{end}\n```".replace("3 if b else 0", "7")
    assert judge("mbpp", code, sandbox) is False, f"a program that never met its tests passed by {end!r}"


def test_prints_of_the_candidate_do_not_hide_a_pass(sandbox):
    assert judge("mbpp", "```python\ndef plus(a, b):\n    print(a, end='')\n    return a + b\n```", sandbox)


@pytest.mark.parametrize("completion", [
    "    return xs[0]\n", "    return xs[0]\n\nprint(first([]))\n", "def first(xs):\n    return xs[0]",
    "```python\nimport os\n```\nthen\n```py\ndef first(xs: List[int]):\n    return xs[0]\n```",
    "```python\ndef first(xs):\n    return xs[0]\n",                                   # cut before the fence closed
])
def test_bodies_and_whole_functions_both_work(completion, sandbox):
    assert judge("humaneval", completion, sandbox)


def test_plus_names_do_not_meet_the_candidates(sandbox):
    row = {**ROWS["mbppplus"][1], "entry_point": "check", "assertion": "assert check(3) == 1",
           "canonical_solution": "def check(x):\n    return x / 3\n"}
    program = evaluate.mbpp_plus(row)[2]("def check(x):\n    return time(x) / 3\n\ndef time(x):\n    return x")
    assert evaluate.run_programs([program], sandbox) == [True], "the harness took a name of the candidate"


def test_plus_tolerates_rounding_only_in_floats(sandbox):
    assert judge("mbppplus", "def third(x):\n    return x / 3 + 1e-9", sandbox, 1)
    assert judge("mbppplus", "def third(x):\n    return x / 3 + 1e-3", sandbox, 1) is False


def test_plus_stops_a_call_that_takes_far_longer_than_the_canonical_one(sandbox):
    _, _, program = evaluate.mbpp_plus(ROWS["mbppplus"][1])
    run = sandbox.run(program("def third(x):\n    while True: pass"), timeout=30.0)
    assert run.status == "crash" and run.seconds < 10


@pytest.mark.parametrize("value, examples, expected", [
    ([1, 2], [(3, 4)], (1, 2)), ([[1], [2]], [[(3,)]], [(1,), (2,)]), ([1, [2, [3]]], [(0, (1,))], (1, (2, (3,)))),
    ([1, 1], [{2}], {1}), ("(1+2j)", [3], 1 + 2j), ("x1", [3], "x1"), ("12", ["a"], "12"),
    ({"a": [1]}, [{"b": (2, 3)}], {"a": (1,)}), ([1], [[2], (3,)], [1]), ([], [], []), (None, [(1,)], None),
])
def test_types_that_json_lost_come_back(value, examples, expected):
    namespace = {}
    exec((evaluate.DATA / "mbpp_plus.py").read_text(), namespace)
    assert repr(namespace["restore_types"](value, examples)) == repr(expected)


@pytest.mark.parametrize("text, left, right", [
    ("[ANSWER]\nassert f(1) == 2\n[/ANSWER]", "f(1)", "2"),
    ("thought\n[ANSWER]\nassert f('a == b') == 'c == d'  # so\n[/ANSWER]\n[ANSWER]no", "f('a == b')", "'c == d'"),
    ("assert f(1) == 2\n[/ANSWER]\n[PYTHON]", "f(1)", "2"), (" 17\n[/ANSWER]", "17", "17"),
    ("assert f(1) == 2 == 3", "f(1)", "2"), ("so assert f(1) == 2", "f(1)", "2"),
])
def test_cruxeval_extraction(text, left, right):
    assert (extract_assertion(text, "input"), extract_assertion(text, "output")) == (left, right)


def test_code_extraction_takes_the_block_that_defines_the_function():
    text = "```\npip install x\n```\n```python\ndef g():\n    pass\n```\n```python\ndef f():\n    g()\n```"
    assert extract_code(text, "f") == "def f():\n    g()\n"
    assert extract_code(text, "h") == "pip install x\n" and extract_code("x = 1") == "x = 1"


@pytest.mark.parametrize("mode, cot", [("output", False), ("output", True), ("input", False), ("input", True)])
def test_cruxeval_prompts_end_where_the_model_goes_on(mode, cot):
    row = ROWS["cruxeval-o"][1]
    prompt = evaluate.BENCHMARKS[f"cruxeval-{mode[0]}{'-cot' * cot}"](row)[1]
    question = "f(3) == ??" if mode == "output" else "f(??) == [3, 3]"
    tag = "[THOUGHT]" if cot else "[ANSWER]"
    assert prompt.endswith(f"\n\n[PYTHON]\n{row['code']}\nassert {question}\n[/PYTHON]\n{tag}\n")
    hidden = row["output"] if mode == "output" else "f(3)"
    assert hidden not in prompt, "the prompt gives the answer away"


# ---- the command line ----

@pytest.mark.parametrize("benchmark", ROWS)
def test_given_completions_are_scored_without_a_model(benchmark, tmp_path, monkeypatch, capsys):
    rows = ROWS[benchmark]
    data = tmp_path / "rows.jsonl.gz"
    data.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    ids = [row.get("id", row.get("task_id")) for row in rows]
    given = write(tmp_path / "texts", [{"id": i, "completion": canonical(benchmark, row)} for i, row in zip(ids, rows)])
    out = tmp_path / "out.jsonl"
    status, stdout, _ = cli(monkeypatch, capsys, "--benchmark", benchmark, "--data", data, "--completions", given,
                            "--out", out)
    assert status == 0 and f"passed {len(rows)}/{len(rows)} = 100.0 % [100.0, 100.0]" in stdout
    stored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["passed"]) for row in stored] == [(i, True) for i in ids]


def crux(tmp_path, count=6, wrong=(1,)):
    rows = [{"id": f"s_{n}", "code": "def f(x):\n    return x", "input": str(n), "output": str(n)}
            for n in range(count)]
    texts = [{"id": row["id"], "completion": "assert f(0) == -1" if n in wrong else canonical("cruxeval-o", row)}
             for n, row in enumerate(rows)]
    return write(tmp_path / "data.jsonl", rows), write(tmp_path / f"texts{len(wrong)}.jsonl", texts)


def test_a_cut_run_resumes_and_ends_alike(tmp_path, monkeypatch, capsys):
    data, given = crux(tmp_path)
    out = tmp_path / "out.jsonl"
    command = ("--benchmark", "cruxeval-o", "--data", data, "--completions", given, "--out", out)
    first = cli(monkeypatch, capsys, *command)
    whole = out.read_text()
    out.write_text(whole[:whole.index('"s_3"') + 9])                        # killed while it wrote row 3
    ran = []
    run = evaluate.run_programs
    monkeypatch.setattr(evaluate, "run_programs", lambda *args: ran.append(len(args[0])) or run(*args))
    assert cli(monkeypatch, capsys, *command)[:2] == first[:2] and out.read_text() == whole
    assert ran == [3], "rows 0 to 2 were whole: only the other three run again"
    assert cli(monkeypatch, capsys, *command)[1] == first[1] and ran == [3]


def test_another_setting_does_not_continue_a_file(tmp_path, monkeypatch, capsys):
    data, given = crux(tmp_path)
    out = tmp_path / "out.jsonl"
    cli(monkeypatch, capsys, "--benchmark", "cruxeval-o", "--data", data, "--completions", given, "--out", out)
    before = out.read_text()
    status, _, stderr = cli(monkeypatch, capsys, "--benchmark", "cruxeval-i", "--data", data, "--completions", given,
                            "--out", out)
    assert status == 2 and "name another --out" in stderr and out.read_text() == before


def test_a_cut_run_of_a_model_goes_on_with_the_same_draws(tiny_model, tmp_path, monkeypatch, capsys):
    data, _ = crux(tmp_path, count=4)
    out = tmp_path / "out.jsonl"
    command = ["--model", tiny_model, "--benchmark", "cruxeval-o", "--data", data, "--max-new-tokens", 6,
               "--temperature", 1, "--out", out]
    cli(monkeypatch, capsys, *command)
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:2]))
    cli(monkeypatch, capsys, *command)
    assert out.read_text() == whole


def test_limit_and_several_samples(tmp_path, monkeypatch, capsys):
    data, _ = crux(tmp_path)
    given = write(tmp_path / "many", [{"id": "s_0", "completion": f"assert f(0) == {n % 2}"} for n in range(4)])
    status, stdout, _ = cli(monkeypatch, capsys, "--benchmark", "cruxeval-o", "--data", data, "--completions", given,
                            "--limit", 1)
    assert status == 0 and "passed 2/4 = 50.0 %" in stdout
    assert "pass@1 = 50.0 %" in stdout and "pass@4 = 100.0 %" in stdout


def test_compare_pairs_items(tmp_path, monkeypatch, capsys):
    paths = []
    for name, passed in (("a", [0] * 8 + [1] * 4), ("b", [1] * 12 + [0])):
        rows = [{"id": n, "completion": "", "passed": bool(p)} for n, p in enumerate(passed)]
        paths.append(write(tmp_path / name, rows))
    status, stdout, _ = cli(monkeypatch, capsys, "--compare", *paths)
    assert status == 0 and "passed 33.3 % -> 100.0 %, change +66.7 [" in stdout
    assert "gained 8, lost 0, McNemar exact p = 0.0078" in stdout, "2 / 2**8"
    assert "12 items (1 left out" in stdout


@pytest.mark.parametrize("arguments, words", [
    ([], "give --benchmark and --data with --model or --completions, or --compare"),
    (["--completions", "TEXTS"], "give --benchmark and --data"),
    (["--compare", "TEXTS", "TEXTS", "--model", "x"], "not allowed with argument --compare"),
    (["--benchmark", "x"], "invalid choice: 'x'"),
    (["--benchmark", "mbpp", "--data", "DATA"], "with --model or --completions"),
    (["--benchmark", "mbpp", "--data", "DATA", "--completions", "TEXTS"], "is no mbpp row: KeyError"),
    (["--benchmark", "humaneval", "--data", "HALF", "--completions", "TEXTS"], "row 1 is no humaneval row"),
    (["--benchmark", "cruxeval-o", "--data", "none", "--completions", "TEXTS"], "none"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--completions", "DATA"], "row 1 is no dict with id, completion"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--completions", "BAD"], "doesn't hold JSON rows"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--completions", "STRANGE"], "no item was scored"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--completions", "TEXTS", "--limit", "0"], "no item was scored"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--completions", "TEXTS", "--limit", "many"], "invalid int"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--completions", "TEXTS", "--out", "no/where"], "no/where"),
    (["--benchmark", "cruxeval-o", "--data", "DATA", "--model", "no-such-folder/x/y"], "no-such-folder"),
    (["--compare", "DATA", "none"], "row 1"), (["--compare", "TEXTS"], "expected 2 arguments"), (["--nope"], "--nope"),
])
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    data, texts = crux(tmp_path)
    (tmp_path / "bad").write_text('{"id": 1, "comp')
    write(tmp_path / "strange", [{"id": "zz", "completion": ""}])
    half = write(tmp_path / "half", [{key: value for key, value in ROWS["humaneval"][0].items() if key != "test"}])
    names = {"HALF": half, "DATA": data, "TEXTS": texts, "BAD": tmp_path / "bad", "STRANGE": tmp_path / "strange"}
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = cli(monkeypatch, capsys, *[names.get(argument, argument) for argument in arguments])
    assert status == 2 and stdout == "" and words in stderr, (status, stderr)
    assert stderr.count("\n") == 1 and "\r" not in stderr, "one line, and no progress bar before it"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A checkpoint folder of a small random model with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.set_num_threads(1)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<eos>"])
    model = GPT(Config(model_type="llama", vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048), seed=0)
    model.save_pretrained(folder)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "clean_up_tokenization_spaces": False}))
    return folder


def test_a_model_answers_and_the_answers_score_alike(tiny_model, tmp_path, monkeypatch, capsys):
    data, _ = crux(tmp_path, count=3)
    out = tmp_path / "out.jsonl"
    command = ["--benchmark", "cruxeval-o", "--data", data, "--max-new-tokens", 6, "--samples", 2, "--temperature", 1]
    status, stdout, _ = cli(monkeypatch, capsys, "--model", tiny_model, *command, "--out", out)
    assert status == 0 and "passed 0/6 = 0.0 %" in stdout and "pass@2" in stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["s_0", "s_0", "s_1", "s_1", "s_2", "s_2"]
    assert rows[0]["completion"] != rows[1]["completion"], "samples of one item must differ"
    again = tmp_path / "again.jsonl"
    cli(monkeypatch, capsys, "--model", tiny_model, *command, "--out", again)
    assert again.read_text() == out.read_text(), "equal seeds, equal answers"


# ---- held-out tasks ----

CLEAN = Task("forward", "what?", "print(30)\n", "", "30\n", "")
ERROR = Task("forward", "why?", "1/0\n", "", "", "ZeroDivisionError: division by zero\n", exit_code=1)


class Recorded:
    """A sampler and a tokenizer in one: each prompt's answers are given."""
    eos_ids = [0]

    def __init__(self, *answers):
        self.answers, self.calls = answers, []

    def encode_chat(self, messages):
        return [len(messages[0]["content"])]

    def decode(self, ids):
        return ids

    def generate(self, prompts, *, group_size, temperature, progress, **options):
        self.calls.append((prompts, group_size, temperature, options))
        texts = [self.answers[n] for n in range(len(prompts))]
        return [SimpleNamespace(ids=text) for group in texts for text in (group if temperature else group[-1:])]


def test_heldout_rows_hold_what_the_log_needs(sandbox):
    wrong = replace(CLEAN, stdout="1\n")
    model = Recorded([render_answer(CLEAN), "", render_answer(wrong)], [render_answer(ERROR)] * 3)
    rows = heldout_rows(model, model, [CLEAN, ERROR], ["variants", "families"], sandbox, step=7, samples=3,
                        max_new_tokens=9, seed=5)
    assert [list(row) for row in rows] == 2 * [
        ["step", "task", "set", "kind", "reward", "exact", "greedy_reward", "greedy_exact"]]
    assert [(row["step"], row["task"], row["set"], row["kind"]) for row in rows] == [
        (7, 0, "variants", "forward"), (7, 1, "families", "error")]
    assert rows[0]["exact"] == pytest.approx(1 / 3) and rows[0]["greedy_exact"] == 0.0
    assert rows[0]["reward"] == pytest.approx((1 + 0 + 0.1) / 3), "the mean over the samples, in [0, 1]"
    assert (rows[1]["reward"], rows[1]["greedy_reward"], rows[1]["exact"]) == (1.0, 1.0, 1.0)
    options = {"max_new_tokens": 9, "eos_ids": [0], "seed": 5}
    assert model.calls == [([[5], [4]], 3, 1.0, options), ([[5], [4]], 1, 0.0, options)]


def test_lost_samples_are_left_out(monkeypatch):
    rewards = [Reward(1.0, exact=True), Reward(float("nan"), lost=True), Reward(float("nan"), lost=True)]
    monkeypatch.setattr(evaluate, "score_many", lambda pairs, sandbox: rewards)
    model = Recorded(["a", "b"])
    row, = heldout_rows(model, model, [CLEAN], ["variants"], None, step=0, samples=2, max_new_tokens=1, seed=0)
    assert (row["reward"], row["exact"], row["greedy_reward"], row["greedy_exact"]) == (1.0, 1.0, None, None)
    json.dumps(row, allow_nan=False)


def test_heldout_rows_of_a_real_sampler_repeat(tiny_model, sandbox, capsys):
    from model import Tokenizer
    from sample import Sampler
    sampler, tokenizer = Sampler(GPT.from_pretrained(tiny_model)), Tokenizer.from_pretrained(tiny_model)
    measure = lambda tasks: heldout_rows(sampler, tokenizer, tasks, ["variants"] * len(tasks), sandbox, step=0,
                                         samples=2, max_new_tokens=4, seed=1)
    assert measure([CLEAN, ERROR]) == measure([CLEAN, ERROR]) and measure([]) == []
    assert capsys.readouterr().err == "", "no progress bar where stderr is no terminal"


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_the_progress_bar_counts_finished_rows(at_once, monkeypatch):
    rows = {0: [5, 0], 1: [5, 6, 7, 8], 2: [0]}                             # 0 ends a row, and so do 4 tokens

    class Bar:
        counts = []
        __init__ = __exit__ = lambda self, *_, **__: None
        __enter__ = lambda self: self
        update = counts.append

    def generate(chats, progress, **_):
        for row, ids in rows.items():
            for start in range(0, len(ids), at_once):
                progress(row, ids[start:start + at_once])
        return [SimpleNamespace(ids=ids) for ids in rows.values()]

    monkeypatch.setattr(evaluate, "tqdm", Bar)
    evaluate.answer(SimpleNamespace(generate=generate), Recorded(), ["a", "b", "c"], group_size=1, max_new_tokens=4)
    assert sum(Bar.counts) == 3, "three rows ended, however many tokens came at a time"


def test_constant_answers_take_the_best_strategy_of_each_kind(sandbox):
    tasks = [replace(CLEAN, stdout="0\n"), replace(CLEAN, stdout="0\n"), CLEAN, ERROR]
    reward, exact = constant_answer_reward(tasks, sandbox)
    assert exact == 0.5, "answering 0 is right for two of the four"
    assert reward == pytest.approx((1 + 1 + 0.1 + 0.1) / 4)
    assert constant_answer_reward([], sandbox) == (None, None)


def test_constant_answers_survive_a_sandbox_that_loses_everything():
    class Lossy:
        def run_many(self, jobs):
            return [Execution("", "", None, "lost", 0.0) for _ in jobs]
    backward = Task("backward", "", "x = 1\nprint(x)\n", "", "1\n", "", masked=(1,), lines=(2,))
    reward, exact = constant_answer_reward([backward], Lossy())
    assert reward is None or np.isfinite(reward)


def test_paired_change_is_paired():
    before = [0.0, 1.0] * 50
    after = [value + 0.1 for value in before]
    old, new, low, high = paired_change(before, after)
    assert (old, new) == (0.5, pytest.approx(0.6))
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1), "all pairs changed alike: no spread is left"


def test_paired_change_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        before = rng.random(60)
        after = before + rng.normal(0.2, 1, 60)
        _, _, low, high = paired_change(list(before), list(after), resamples=400)
        hits += low <= 0.2 <= high
    assert 88 <= hits <= 99, f"a 95 % interval held the truth {hits} times in 100"


def test_paired_change_drops_nulls_and_repeats():
    assert paired_change([], []) == (None,) * 4 and paired_change([None, 1.0], [1.0, None]) == (None,) * 4
    assert paired_change([0.0, None, 1.0], [1.0, 0.5, 1.0])[:2] == (0.5, 1.0)
    values = ([0.1, 0.5, 0.2], [0.3, 0.4, 0.9])
    assert paired_change(*values, seed=3) == paired_change(*values, seed=3)
    with pytest.raises(ValueError, match="same tasks"):
        paired_change([1.0], [])
