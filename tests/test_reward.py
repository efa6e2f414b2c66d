"""Rewards, and ways to cheat: python -m pytest tests/test_reward.py"""
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import Snippet
from reward import Reward, constant_answers, extract_blocks, score, score_many
from sandbox import Execution, Sandbox
from tasks import Task, block, render_answer, synthesize


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=2.0) as sandbox:
        yield sandbox


def forward(stdout="30\n", stderr=""):
    return Task("forward", "", "print(30)\n", "", stdout, stderr)


def answer(stdout=None, stderr=None):
    blocks = [block(tag, text) for tag, text in (("stdout", stdout), ("stderr", stderr)) if text is not None]
    return "Let me see.\n\n" + "\n".join(blocks)


def backward(code, sandbox, number, inputs=(), **options):
    """The backward task of `code` that hides line `number`."""
    for seed in range(200):
        task = synthesize(Snippet(code, list(inputs), "s"), seed, sandbox, kind="backward", augment=False, **options)
        if isinstance(task, Task) and task.masked == (number,):
            return task
    raise AssertionError(f"line {number} is never masked: {task}")


# ---- extraction ----

@pytest.mark.parametrize("text, blocks", [
    ("```stdout\n1\n```", {"stdout": "1\n"}),
    ("```stdout\n```\n```stderr\n\n```", {"stdout": "", "stderr": "\n"}),
    ("```stdout\n1\n```\nno:\n```stdout\n2\n```", {"stdout": "2\n"}),
    ("```python\nx = 1\n```stdout\n1\n```", {"stdout": "1\n"}),                # an unclosed block before it
    ("```stdout\n1\n", {}),                                                    # never closed
    ("```stdout\r\n1\r\n2\r\n```\r\n", {"stdout": "1\n2\n"}),
    ("  ```stdout\n1\n```", {}),                                              # a fence starts its line
    ("```stdout \n a \n```  ", {"stdout": " a \n"}),
    ("", {}), ("```", {}), ("no block", {}),
])
def test_extraction(text, blocks):
    found = extract_blocks(text)
    assert {tag: body for tag, body in found.items() if tag} == blocks


@given(st.text(alphabet="`\n\r stdoutline_1\0x\ud800", max_size=200))
@settings(max_examples=300, deadline=None)
def test_extraction_never_raises(text):
    assert all(isinstance(body, str) for body in extract_blocks(text).values())


@pytest.mark.parametrize("text", ["`" * 4_000_000, "```\n" * 1_000_000, "```stdout\n" * 400_000, "\n" * 4_000_000,
                                  "```stdout\n" + "a\n" * 2_000_000])
def test_extraction_is_linear(text):
    start = time.time()
    extract_blocks(text)
    assert time.time() - start < 5, "4 MB take about a second, not minutes"


# ---- forward ----

def test_forward_parts():
    task = forward()
    assert score(task, answer("30\n", ""), None) == Reward(1.0, 1.0, 1.0, 1.0, True)
    assert score(task, answer("30", ""), None).total == 1, "one newline at the end is forgiven"
    assert score(task, answer("\n30\n", ""), None).total == 1, "and one at the start"
    assert score(task, answer("30 \n", ""), None).stdout == 0, "blanks count"
    assert score(task, answer("3", ""), None).stdout == 0, "a prefix is wrong"
    assert score(task, "nothing", None).total == 0
    only = score(task, answer("30\n"), None)
    assert only.format == 0.5 and only.stdout == 1 and only.stderr == 0 and not only.exact


def test_silence_earns_the_format_alone():
    clean, error = forward(), forward("", "Traceback\nValueError: x\n")
    for task in (clean, error):
        assert score(task, answer("", ""), None).total == pytest.approx(0.1)
    assert score(clean, answer("31\n", ""), None).total == pytest.approx(0.1)
    assert score(error, answer("", "Traceback\n"), None).total == pytest.approx(0.1 + 0.9 * 0.5), "half the traceback"
    [paid] = score_many([(clean, answer("", ""))], None, pay_silence=True)
    assert paid.total == pytest.approx(0.1 + 0.9 / 3), "the official free part, on demand"


def test_stderr_is_compared_as_a_multiset_of_lines():
    task = forward("1\n", "a\nb\nb\n")
    for text, iou in (("a\nb\nb\n", 1), ("b\na\nb\n", 1), ("a\nb\n", 2 / 3), ("a\nb\nb\nc\n", 3 / 4), (" a\nb\nb\n", 2 / 4),
                      ("", 0)):
        assert score(task, answer("1\n", text), None).stderr == pytest.approx(iou), text


def test_without_stderr_stdout_is_all():
    task = Task("forward", "", "print(1)\n", "", "1\n", "", ask_stderr=False)
    assert score(task, answer("1\n"), None).total == 1 and score(task, answer("2\n"), None).total == 0.1


@given(st.text(alphabet="ab \n", min_size=1, max_size=12).filter(str.strip), st.text(alphabet="ab \n", max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_truth_can_be_matched_and_rewards_stay_in_range(stdout, other):
    task = forward(stdout)
    assert score(task, render_answer(task), None).total == 1
    assert 0 <= score(task, answer(other, other), None).total <= 1


# ---- backward ----

SUM = "values = [3, 5, 8]\ntotal = 0\nfor v in values:\n    total += v\nprint('sum', total)\n"


@pytest.fixture(scope="module")
def sum_task(sandbox):
    return backward(SUM, sandbox, 4)


def line(text, tag="line_1"):
    return block(tag, text + "\n")


def test_backward_pays_the_line_and_its_equals(sandbox, sum_task):
    assert score(sum_task, render_answer(sum_task), sandbox).total == 1
    assert score(sum_task, line("    total = total + v"), sandbox).exact, "another line that does the same"
    for wrong in ("    total -= v", "    pass", "total += v", ""):
        reward = score(sum_task, line(wrong), sandbox)
        assert reward.total == pytest.approx(0.1) and not reward.exact, wrong


def test_as_many_lines_as_were_masked(sandbox, sum_task):
    for text in ("    total += v\n    total += 0", "    total += v\n\n"):
        assert score(sum_task, line(text), sandbox).total == pytest.approx(0.1)
    assert score(sum_task, "```line_2\n    total += v\n```", sandbox).total == 0


CHEATS = [
    "    print('sum', 16); raise SystemExit",
    "    print('sum', 16); import os; os._exit(0)",
    "    import os; os.write(1, b'sum 16\\n'); os._exit(0)",
    "    print('sum', 16); exit(0)",
    "    print('sum', 16); break",
    "    import sys, os; print('sum', 16); sys.stdout = open(os.devnull, 'w')",
    "    print('sum', 16); print = lambda *a: None",
    "    import builtins; builtins.print('sum', 16); builtins.print = id",
    "    total = 16",
    "    total = 16; v = 0",
    "    exec('print(\"sum\", 16)'); import os; os.kill(os.getpid(), 9)",
    "    import atexit, os; atexit.register(os._exit, 0); print('sum', 16)",
    "    import os; [os._exit(0) for _ in [os.write(1, b'sum 16\\n')]]",
    "    import sys; sys.settrace(None); print('sum', 16); sys.exit(0)",
    "    import os; os.write(1, b'sum 16\\n'); os.close(1)",
    "    import sys; sys.stdout.write('sum 16\\n'); sys.stdout.write = len",
    "    import os; print('sum', 16, flush=True); os.dup2(os.open('/dev/null', 1), 1)",
    "    print(open(__file__).read())",
    "    import gc; print([o for o in gc.get_objects() if 'sum 16' in str(o)])",
    "    raise Exception",
    "    while True: pass",
    "    print('x' * 10**9)",
    "    total += v\r    print(1)",
    "    total += v\0",
    "    total += '\ud800'",
]


@pytest.mark.parametrize("cheat", CHEATS, ids=range(len(CHEATS)))
def test_cheats_earn_no_more_than_ignorance(cheat, sandbox, sum_task):
    assert score(sum_task, line(cheat), sandbox).total <= 0.1 + 1e-9


def test_hard_coding_the_shown_value_fails_on_other_inputs(sandbox):
    code = "n = int(input())\nsquare = n * n\nprint(square)\n"
    inputs = [{"input": "4\n"}, {"input": "9\n"}]
    task = backward(code, sandbox, 2, inputs)
    assert score(task, line("square = n ** 2"), sandbox).exact
    assert score(task, line(f"square = {task.stdout.strip()}"), sandbox).total == pytest.approx(0.1)


def test_a_failing_run_must_fail_alike(sandbox):
    code = "items = [1, 2]\nindex = len(items) + 1\nprint('start')\nprint(items[index])\n"
    task = backward(code, sandbox, 2)
    assert task.ending == "IndexError" and score(task, render_answer(task), sandbox).exact
    assert score(task, line("index = 3"), sandbox).total >= 0.1
    assert score(task, line("index = 'a'"), sandbox).total == pytest.approx(0.1), "another exception"
    assert score(task, line("raise IndexError"), sandbox).total == pytest.approx(0.1), "too early"


def test_a_lost_run_is_marked_and_never_paid():
    class Broken:
        def run_many(self, jobs):
            return [Execution("", "", None, "lost", 0.0) for _ in jobs]
    task = Task("backward", "", "print(1)\n", "", "1\n", "", (1,))
    reward = score(task, line("print(1)"), Broken())
    assert reward.lost and reward.total != reward.total and not reward.exact


# ---- constants ----

def test_constant_answers_line_up_and_earn_next_to_nothing(sandbox, sum_task):
    tasks = [forward(), forward("x\n", "e\n")]
    assert len({len(constant_answers(task)) for task in tasks}) == 1
    for task in tasks:
        assert max(score(task, text, sandbox).total for text in constant_answers(task)) <= 0.1 + 1e-9
    task = sum_task
    assert "    pass" in constant_answers(task)[1], "at the right indentation"
    assert max(score(task, text, sandbox).total for text in constant_answers(task)) <= 0.1 + 1e-9


def test_the_prompts_example_earns_nothing(sandbox, sum_task):
    task = synthesize(Snippet(SUM, [], "s"), 0, sandbox, kind="forward")
    assert score(task, task.prompt, sandbox).total <= 0.1 + 1e-9
    task = sum_task
    assert score(task, task.prompt, sandbox).total <= 0.1 + 1e-9


def test_one_batch_scores_as_one_by_one(sandbox, sum_task):
    pairs = [(sum_task, line(text)) for text in ("    total += v", "    pass")] + [(forward(), answer("30\n", ""))]
    assert score_many(pairs, sandbox) == [score(*pair, sandbox) for pair in pairs]
    assert score_many([], sandbox) == []
