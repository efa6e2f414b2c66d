"""Synthesis: python -m pytest tests/test_tasks.py"""
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from curate import Snippet, load_snippets
from reward import score, score_many
from sandbox import Sandbox
from corpus import split_families
from tasks import ERRORS, Task, rebuild, render_answer, render_call, synthesize, synthesize_many

SNIPPETS = load_snippets(Path(__file__).parent.parent / "data/snippets.jsonl")
LOOP = "total = 0\nfor n in range(5):\n    total += n * n\nprint(total)\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout=2.0) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def tasks(sandbox):
    """A forward and a backward task of every second bundled snippet, augmented."""
    pairs = [(snippet, seed) for seed, snippet in enumerate(SNIPPETS[::2])]
    made = synthesize_many(pairs, sandbox, kind="forward") + synthesize_many(pairs, sandbox, kind="backward")
    return [task for task in made if isinstance(task, Task)]


def forward(code, sandbox, inputs=(), **options):
    return synthesize(Snippet(code, list(inputs), "s"), 0, sandbox, kind="forward", augment=False, **options)


def test_a_forward_task_holds_what_the_program_printed(sandbox):
    task = forward(LOOP, sandbox)
    assert (task.kind, task.program, task.stdout, task.stderr) == ("forward", LOOP, "30\n", "")
    assert LOOP in task.prompt and "```stdout" in task.prompt and "```stderr" in task.prompt


def test_stdin_reaches_the_program_byte_for_byte(sandbox):
    text = "50% 'of' \"it\" $HOME \\n\n"
    task = forward("print(repr(input()))\n", sandbox, [{"input": text}])
    assert task.stdin == text and task.stdout == repr(text[:-1]) + "\n"
    assert text in task.prompt


def test_calls_positional_keyword_and_methods(sandbox):
    code = "def area(width, height=2):\n    return width * height\n"
    assert forward(code, sandbox, [{"input": [3], "func_name": "area"}]).stdout == "6\n"
    task = forward(code, sandbox, [{"input": {"height": 5, "width": 4}, "func_name": "area"}])
    assert task.stdout == "20\n" and task.program.endswith("print(area(height=5, width=4))\n")
    code = "class Box:\n    def twice(self, text):\n        return text * 2\n"
    assert forward(code, sandbox, [{"input": ["ab"], "func_name": "Box().twice"}]).stdout == "abab\n"


def test_a_call_works_with_code_after_the_main_block(sandbox):
    code = "def f(x):\n    return x + 1\nif __name__ == '__main__':\n    print('main')\nBASE = 3\n# the end"
    assert forward(code, sandbox, [{"input": [1], "func_name": "f"}]).stdout == "main\n2\n"


def test_arguments_are_literals_or_the_task_is_dropped(sandbox):
    assert render_call({"input": [{1, 2}, (3,), b"x", None], "func_name": "f"}) == "print(f({1, 2}, (3,), b'x', None))\n"
    assert render_call({"input": [float("inf")], "func_name": "f"}) is None
    assert render_call({"input": {"not a name": 1}, "func_name": "f"}) is None


@pytest.mark.parametrize("code, reason", [
    ("import time\ntime.sleep(9)\n", "timeout"),
    ("print(hash('a'))\n", "not deterministic"),
    ("import os\nprint(os.getcwd())\n", "not deterministic"),
    ("x = 1\n", "no output"),
    ("print()\n", "no output"),
    ("print('x' * 5000)\n", "too long"),
    ("raise RuntimeError('boom')\n", "unsupported error"),
    ("raise Exception('not a ValueError')\n", "unsupported error"),
    ("import sys\nsys.exit(3)\n", "unsupported error"),
    ("import no_such_package\n", "needs files, network or packages"),
    ("print(open('data.txt').read())\n", "needs files, network or packages"),
    ("print('`' * 3)\n", "not expressible in blocks"),
    ("print('```')\n", "not expressible in blocks"),
    ("import sys\nsys.stdout.buffer.write(b'\\xff\\n')\n", "not expressible in blocks"),
    ("import json\njson.loads('{')\n", "stderr names another file"),
    ("import os\nos.abort()\n", "crash"),
])
def test_a_snippet_is_dropped_by_reason(code, reason, sandbox):
    assert forward(code, sandbox, timeout=1.0) == reason


@pytest.mark.parametrize("line, name", [
    ("print(1 +", "SyntaxError"), ("[][1]", "IndexError"), ("int('x')", "ValueError"), ("print(nope)", "NameError"),
    ("'a' + 1", "TypeError"), ("{}['k']", "KeyError"), ("1 / 0", "ZeroDivisionError"),
])
def test_errors_of_the_supported_kinds_are_tasks(line, name, sandbox):
    task = forward(f"print('before')\n{line}\n", sandbox)
    assert task.ending == name and name in ERRORS and task.exit_code == 1
    assert 'File "main.py", line 2' in task.stderr, "no folder in a truth"


def test_subclasses_of_the_supported_errors_count(sandbox):
    task = forward("class BadRecord(ValueError):\n    pass\nraise BadRecord('row 3')\n", sandbox)
    assert task.ending == "BadRecord"


def test_a_warning_that_mentions_an_error_is_not_an_error(sandbox):
    task = forward("import sys\nprint('ValueError: no', file=sys.stderr)\nprint(1)\n", sandbox)
    assert task.ending is None and task.exit_code == 0


def test_without_stderr_only_stdout_is_asked_for(sandbox):
    task = forward(LOOP, sandbox, ask_stderr=False)
    assert task.tags == ("stdout",) and "```stderr" not in task.prompt
    assert score(task, render_answer(task), sandbox).total == 1


def test_a_backward_task_hides_a_line_that_matters(sandbox):
    code = '"""A docstring."""\n# a comment\nunused = 5\nprice = 4\nprint(price * 3)\n'
    hidden = Counter()
    for seed in range(30):
        task = synthesize(Snippet(code, [], "s"), seed, sandbox, kind="backward", augment=False)
        [number] = task.masked
        hidden[number] += 1
        assert "<line_1>" in task.prompt.split("\n") and "12" in task.prompt
        assert code.split("\n")[number - 1] not in task.prompt.split("\n"), "the answer is not shown"
    assert set(hidden) == {4, 5}, f"docstrings, comments and unused names don't matter: {hidden}"


def test_masked_lines_are_never_quoted_by_the_shown_output(sandbox):
    code = "rows = [3, 4]\nprint(len(rows))\nrows[5]\n"
    for seed in range(10):
        task = synthesize(Snippet(code, [], "s"), seed, sandbox, kind="backward", augment=False)
        assert task.masked != (3,), "the traceback shows line 3"


def test_the_stitched_call_is_never_masked(sandbox):
    snippet = Snippet("def f(x):\n    return x + 1\n", [{"input": [1], "func_name": "f"}] * 2, "s")
    for seed in range(10):
        task = synthesize(snippet, seed, sandbox, kind="backward")
        assert isinstance(task, str) or task.program.count("\n") not in task.masked


def test_several_lines_can_be_masked(sandbox):
    code = "a = 3\nb = 4\nc = a * b\nprint(c)\nprint(a + c)\n"
    sizes = set()
    for seed in range(12):
        task = synthesize(Snippet(code, [], "s"), seed, sandbox, kind="backward", augment=False, max_masked=3)
        assert task.masked == tuple(sorted(set(task.masked)))
        sizes.add(len(task.masked))
        assert score(task, render_answer(task), sandbox).total == 1
    assert sizes == {1, 2, 3}


def test_checks_hold_what_the_program_does_on_other_inputs(sandbox):
    snippet = Snippet("n = int(input())\nprint(n * 2)\n", [{"input": "4\n"}, {"input": "10\n"}, {"input": "x\n"}], "s")
    task = synthesize(snippet, 1, sandbox, kind="backward", augment=False)
    assert len(task.checks) >= 2
    for stdin, stdout, stderr in task.checks:
        run = sandbox.run(task.program, stdin)
        assert (run.stdout, run.stderr) == (stdout, stderr) and stdin != task.stdin


def test_the_same_pair_gives_the_same_task(sandbox):
    pairs = [(snippet, 7) for snippet in SNIPPETS[:40]]
    whole = synthesize_many(pairs, sandbox)
    assert whole == synthesize_many(pairs, sandbox)
    assert whole[5:8] == synthesize_many(pairs[5:8], sandbox), "a task depends on its pair, not on the batch"


def test_augmentation_changes_some_programs_and_can_be_off(sandbox):
    pairs = [(snippet, 3) for snippet in SNIPPETS[:100]]
    plain = synthesize_many(pairs, sandbox, augment=False, kind="forward")
    varied = synthesize_many(pairs, sandbox, augment=True, kind="forward")
    both = [(a, b) for a, b in zip(plain, varied) if isinstance(a, Task) and isinstance(b, Task)]
    assert sum((a.program, a.stdin) != (b.program, b.stdin) for a, b in both) > len(both) / 5
    assert all(task.program.startswith(s.code.rstrip()) for (s, _), task in zip(pairs, plain) if isinstance(task, Task))


def test_wrong_options_are_one_clear_line(sandbox):
    for options in ({"kind": "sideways"}, {"augment": ["no such class"]}, {"max_masked": 0}):
        with pytest.raises(ValueError) as error:
            synthesize(Snippet(LOOP, [], "s"), 0, sandbox, **options)
        assert "\n" not in str(error.value)


def test_nothing_from_nothing(sandbox):
    assert synthesize_many([], sandbox) == []


def test_most_bundled_snippets_make_both_kinds(tasks):
    kinds = Counter(task.kind for task in tasks)
    assert kinds["forward"] >= 0.8 * len(SNIPPETS[::2]) and kinds["backward"] >= 0.6 * len(SNIPPETS[::2]), kinds


def test_a_perfect_answer_is_paid_in_full(tasks, sandbox):
    for task, reward in zip(tasks, score_many([(task, render_answer(task)) for task in tasks], sandbox)):
        assert reward.total == 1 and reward.exact, (task, reward)
        assert render_answer(task) not in task.prompt


def test_truths_are_those_of_real_python(tasks, tmp_path):
    for i, task in enumerate(tasks[::12]):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "main.py").write_text(task.program)
        run = subprocess.run([sys.executable, "main.py"], cwd=folder, input=task.stdin.encode(), capture_output=True)
        stderr = run.stderr.decode().replace(f"{folder}/", "")
        assert (run.stdout.decode(), stderr, run.returncode) == (task.stdout, task.stderr, task.exit_code), task.program


def test_rebuild_goes_by_line_number():
    program = "\n".join(f"line {i}" for i in range(1, 13))
    rows = rebuild(program, (1, 10), ["first", "tenth"]).split("\n")
    assert rows[0] == "first" and rows[9] == "tenth" and rows[1] == "line 2" and len(rows) == 12


def test_families_are_split_by_name_alone():
    train, held = split_families(SNIPPETS)
    again = split_families(list(reversed(SNIPPETS)))
    assert {s.source for s in held} == {s.source for s in again[1]}
    assert split_families(SNIPPETS[:3]) == (SNIPPETS[:3], []), "too few families: nothing is held out"
