"""Completions into rewards: format and execution (paper, section 3.3; official code's reward functions).

    total = 0.1 * format + 0.9 * accuracy

format: the share of the required blocks that are there; no block at all scores 0 in everything.
accuracy: (2s + e) / 3, where s says whether stdout is equal and e is the line IoU of stderr. Silence earns nothing by
itself: where the true stderr is empty its part is e*s, where the true stdout is empty its part is s*e.

Departures from the official code: a perfect answer earns 1.0 (official: 0.775); the last block of each tag counts
(official: the alphabetically last); nothing is stripped, so truths that end in blanks can be matched; empty blocks
earn 0.1 (official: 0.325 of 1 on any clean program, `pay_silence=True` restores that).

Backward answers are rebuilt by line number and run. Their accuracy is 0 unless the run
  - ends as the original did: normally, or by the same exception type and exit code. `os._exit`, a signal or a
    `SystemExit` of its own is another ending (control must return to the sandbox's harness);
  - visits every line that the original visited, so skipping the rest of the program earns nothing;
  - agrees on both streams on every further input (`Task.checks`), and, for programs without input, with other number
    literals (`Task.variants`), so printing the expected text or hard-coding the value earns nothing.
Not closed: a program without input and without number literals has no further run to disagree on.
"""
from collections import Counter
from dataclasses import dataclass

from sandbox import Job
from tasks import Task, block, check_programs, rebuild


@dataclass(frozen=True)
class Reward:
    """All parts lie in [0, 1]. `lost`: the sandbox failed, not the answer; `total` is NaN then, never a paid 0."""
    total: float
    format: float = 0.0
    stdout: float = 0.0          # s, before the silence rule
    stderr: float = 0.0          # e, before the silence rule
    exact: bool = False          # accuracy is 1
    lost: bool = False


def score(task: Task, completion: str, sandbox) -> Reward:
    """The one-pair case of `score_many`."""
    return score_many([(task, completion)], sandbox)[0]


def score_many(pairs, sandbox, *, pay_silence=False) -> list[Reward]:
    """Score (task, completion text) pairs; the executions of all backward answers run in two batches.

    pay_silence: restore the official free part for an empty stream (paper preset).
    """
    rewards, runs = [], []                             # runs: (index, task, lines) of restored programs
    for i, (task, completion) in enumerate(pairs):
        blocks = extract_blocks(completion)
        present = sum(tag in blocks for tag in task.tags) / len(task.tags)
        if task.kind == "forward":
            s = float("stdout" in blocks and _equal(task.stdout, blocks["stdout"]))
            e = _line_iou(task.stderr, blocks["stderr"]) if "stderr" in blocks else 0.0
            rewards.append(_combine(task, present, s, e, pay_silence))
        else:
            rewards.append(Reward(0.1 * present, present))
            lines = [_single_line(blocks[tag]) for tag in task.tags if tag in blocks]
            if present == 1 and None not in lines:
                runs.append((i, task, lines))

    jobs = [Job(rebuild(task.program, task.masked, lines), task.stdin, trace=True) for _, task, lines in runs]
    passed = []
    for (i, task, lines), run in zip(runs, sandbox.run_many(jobs) if jobs else ()):
        if run.status == "lost":
            rewards[i] = Reward(float("nan"), lost=True)
        elif _ends_alike(task, run):
            s = float(_equal(task.stdout, run.stdout))
            e = _line_iou(task.stderr, run.stderr)
            passed.append((i, task, lines, _combine(task, 1.0, s, e, pay_silence)))
    for i, reward in _gate(passed, sandbox):
        rewards[i] = reward
    return rewards


def _gate(passed, sandbox):
    """Keep the rewards whose programs agree on all further runs; yields (index, reward)."""
    further = [(n, *run) for n, (_, task, lines, _) in enumerate(passed) for run in check_programs(task, lines)]
    jobs = [Job(program, stdin) for _, program, stdin, _, _ in further]
    verdicts = [True] * len(passed)                    # True, False, or None where the sandbox lost a run
    for (n, _, _, stdout, stderr), run in zip(further, sandbox.run_many(jobs) if jobs else ()):
        if verdicts[n] and run.status == "lost":
            verdicts[n] = None
        elif run.status != "lost" and (run.stdout, run.stderr) != (stdout, stderr):
            verdicts[n] = False
    for (i, _, _, reward), verdict in zip(passed, verdicts):
        if verdict:
            yield i, reward
        elif verdict is None:
            yield i, Reward(float("nan"), lost=True)


def _combine(task, present, s, e, pay_silence):
    """The reward of s and e under the silence rule."""
    if present == 0:
        return Reward(0.0)
    paid_s = s if task.stdout or pay_silence else s * e
    paid_e = e if task.stderr or pay_silence else e * s
    accuracy = (2 * paid_s + paid_e) / 3 if "stderr" in task.tags or task.kind == "backward" else s
    return Reward(0.1 * present + 0.9 * accuracy, present, s, e, accuracy == 1)


def _ends_alike(task, run):
    """The gates that one traced run decides."""
    return (run.ending == task.ending and run.exit_code == task.exit_code and run.status in ("ok", "error")
            and set(task.lines) <= set(run.lines or ()))


def _equal(truth, answer):
    """Equal, give or take one newline at each end (a block can't show whether the last line was ended)."""
    trim = lambda text: text.removeprefix("\n").removesuffix("\n")
    return truth == answer or trim(truth) == trim(answer)


def _line_iou(truth, answer):
    """Intersection over union of the two texts' lines as multisets; 1 where both are empty."""
    a, b = (Counter(text.removesuffix("\n").split("\n")) if text else Counter() for text in (truth, answer))
    union = (a | b).total()
    return (a & b).total() / union if union else 1.0


def _single_line(text):
    """The one line of a block, or None where it isn't one line that a program can hold."""
    line = text.removesuffix("\n")
    try:
        line.encode()
    except UnicodeEncodeError:
        return None
    return None if any(c in line for c in "\n\r\0") else line


def extract_blocks(text: str) -> dict[str, str]:
    """The last closed fenced block of each tag, its text with every line's newline; linear in len(text).

    A line that starts with three backticks and more is an opening, also where a block was left unclosed; a bare one
    closes the open block. A block whose opening line ends in CRLF has its CRLFs read as newlines.
    """
    blocks = {}
    tag, start = None, 0                               # the open block: its tag and its first line
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        info = line[3:].strip()
        if info or tag is None:
            tag, start = info, i + 1
        else:
            body = "".join(row + "\n" for row in lines[start:i])
            blocks[tag] = body.replace("\r\n", "\n") if lines[start - 1].endswith("\r") else body
            tag = None
    return blocks


def constant_answers(task: Task) -> list[str]:
    """Answers that a policy could give to any task of the kind, in the same order for every task of a kind.

    What they earn on the same tasks stands beside the model's reward in every report.
    """
    if task.kind == "forward":
        answers = [("", ""), ("", "Traceback (most recent call last):\n"), ("0\n", ""), ("True\n", ""), ("[]\n", "")]
        return ["".join(map(block, task.tags, texts)) for texts in answers]
    rows = task.program.split("\n")
    indents = [rows[n - 1][:len(rows[n - 1]) - len(rows[n - 1].lstrip())] for n in task.masked]
    statements = ["", "pass", "return", "continue", "print()", "x = 0"]
    return ["".join(block(tag, indent + statement if statement else "") for tag, indent in zip(task.tags, indents))
            for statement in statements]
