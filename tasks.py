"""Snippets into tasks whose answers come from running them (paper, section 3.2; official code's task synthesis).

Forward tasks show a program and its input and ask what it prints. Backward tasks hide lines of the program, show
what it printed and ask for the lines. Programs that crash are tasks too ("error-aware"): the traceback is part of
the answer. Every truth is executed, twice, under different hash seeds and in different folders; nothing is guessed.

Departures from the official code (each has its reason in the README's table):
  - errors are told apart by the type of the exception that ended the run, not by a substring of stderr;
  - calls are stitched as the program's last line, keyword arguments by name; stdin reaches the program byte for byte;
  - only lines that ran and whose blanking changes the run are masked, never the stitched call, and never a line that
    the shown output quotes;
  - backward tasks carry further inputs (`checks`) and, where the program takes none, further programs with other
    number literals (`variants`), on which a restored line must agree too: printing the shown output isn't enough.
"""
import ast
import random
import re
from dataclasses import dataclass, replace

from augment import CLASSES, augment_arguments, augment_code, augment_stdin
from curate import Snippet
from sandbox import Job

# The exceptions that the paper keeps; subclasses count.
ERRORS = {"SyntaxError", "IndexError", "ValueError", "NameError", "TypeError", "KeyError", "ZeroDivisionError"}

# The prompts. Every word that the model reads besides program, input and output is here.
PROGRAM = "The file `main.py` holds this program:\n\n```python\n{program}```\n\n"
NO_INPUT = "It is run with `python main.py`; standard input is empty.\n\n"
STDIN = "It is run with `python main.py`; standard input is:\n\n```stdin\n{stdin}```\n\n"
FORWARD = ("Predict exactly what this run writes. End your answer with two fenced blocks, tagged `stdout` and "
           "`stderr`, that hold the exact text of each stream. Both blocks are required: where nothing is written to a "
           "stream, its block is empty. The form of the answer:\n\n")
FORWARD_STDOUT = ("Predict exactly what this run writes to standard output. End your answer with a fenced block, "
                  "tagged `stdout`, that holds the exact text. The form of the answer:\n\n")
BACKWARD = ("Each placeholder `<line_1>`, `<line_2>` and so on hides one line of the program. With the hidden lines in "
            "place, the run writes this:\n\n")
RESTORE = ("Find the hidden lines. End your answer with one fenced block for each, tagged with its name, that holds "
           "this one line of code with its indentation and nothing else. The form of the answer:\n\n")
BLOCK = "```{tag}\n{text}```\n"
EXAMPLE = {"stdout": "<text>\n", "stderr": "<text, or nothing>\n", "line": "<code>\n"}


@dataclass(frozen=True)
class Task:
    kind: str                    # "forward" or "backward"
    prompt: str                  # the user's message
    program: str                 # main.py, whole and unmasked, the call stitched in as its last line
    stdin: str
    stdout: str                  # the executed truth
    stderr: str
    masked: tuple = ()           # hidden line numbers, 1-based, sorted
    checks: tuple = ()           # further (stdin or call, stdout, stderr)
    variants: tuple = ()         # further (program, stdout, stderr): other number literals, the same hidden lines
    call: str = ""               # the stitched last line, "" when the program isn't called
    ending: str | None = None    # type of the exception that ended the run
    exit_code: int = 0
    lines: tuple = ()            # line numbers that the run visited, the hidden ones left out (backward)
    ask_stderr: bool = True

    @property
    def tags(self):
        """The blocks that an answer must hold."""
        if self.kind == "backward":
            return tuple(f"line_{i}" for i in range(1, len(self.masked) + 1))
        return ("stdout", "stderr") if self.ask_stderr else ("stdout",)


@dataclass
class _Draft:
    """A task under construction."""
    kind: str
    code: str = ""               # the augmented program without its call
    call: str = ""
    stdin: str = ""
    others: tuple = ()           # further stdin texts or calls
    rng: random.Random = None
    dropped: str | None = None   # why it makes no task
    truth: object = None         # the Execution
    masked: tuple = ()
    checks: tuple = ()
    variants: tuple = ()

    @property
    def program(self):
        return self.code + self.call


def synthesize_many(pairs, sandbox, *, kind=None, augment=True, max_masked=1, ask_stderr=True,
                    backward_share=0.25, max_output=2000, timeout=2.0) -> list[Task | str]:
    """Turn (snippet, seed) pairs into tasks, all executions in a few batches.

    Args:
        pairs: list of (Snippet, int). A pair's task depends on the pair, the options and the interpreter alone.
        kind: "forward" or "backward" forces the kind; None draws it, backward with `backward_share` (paper: 0.25).
        augment: True for all of augment.CLASSES, False for none, or the classes wanted.
        max_masked: a backward task hides 1..max_masked lines.
        ask_stderr: False asks forward tasks for stdout alone.
        max_output: characters of stdout and stderr together above which a task is dropped.
        timeout: seconds a program may run.
    Returns: a Task, or the reason why there is none, for each pair in order.
    Raises: ValueError for an option out of its range.
    """
    if kind not in (None, "forward", "backward"):
        raise ValueError(f"kind must be None, 'forward' or 'backward', not {kind!r}")
    if max_masked < 1:
        raise ValueError(f"max_masked must be at least 1, not {max_masked}")
    classes = set(CLASSES) if augment is True else set(augment or ())
    if unknown := classes - set(CLASSES):
        raise ValueError(f"unknown augmentation class {min(unknown)!r}; known: {', '.join(CLASSES)}")

    drafts = []
    for snippet, seed in pairs:
        rng = random.Random(f"task {seed} {snippet.code}")
        wanted = "backward" if rng.random() < backward_share else "forward"
        drafts.append(_draft(snippet, kind or wanted, classes, rng))

    live = [d for d in drafts if not d.dropped]
    runs = [(d.program, d.stdin, d.kind == "backward") for d in live]
    for draft, run in zip(live, _truths(runs, sandbox, timeout)):
        draft.truth = run
        draft.dropped = run if isinstance(run, str) else _unusable(run, ask_stderr, max_output)
    backward = [d for d in live if d.kind == "backward" and not d.dropped]
    _choose_masked(backward, max_masked, sandbox, timeout)
    _add_checks([d for d in backward if not d.dropped], sandbox, timeout)
    return [draft.dropped or _finish(draft, ask_stderr) for draft in drafts]


def synthesize(snippet: Snippet, seed: int, sandbox, **options) -> Task | str:
    """The one-pair case of `synthesize_many`."""
    return synthesize_many([(snippet, seed)], sandbox, **options)[0]


def render_answer(task: Task) -> str:
    """The completion of a perfect model: `reward.score` pays it 1.0."""
    if task.kind == "backward":
        lines = task.program.split("\n")
        texts = [lines[number - 1] for number in task.masked]
    else:
        texts = [task.stdout, task.stderr]
    return "\n".join(block(tag, text) for tag, text in zip(task.tags, texts)).rstrip("\n")


def block(tag: str, text: str) -> str:
    """A fenced block; a newline is added where the text has none at its end."""
    return BLOCK.format(tag=tag, text=text if text.endswith("\n") or not text else text + "\n")


def rebuild(program: str, masked, lines) -> str:
    """The program with its lines `masked` (1-based) replaced by `lines`."""
    rows = program.split("\n")
    for number, line in zip(masked, lines):
        rows[number - 1] = line
    return "\n".join(rows)


def check_programs(task: Task, lines) -> list[tuple]:
    """The further runs of a backward task with `lines` restored: (program, stdin, stdout, stderr) each."""
    base = rebuild(task.program, task.masked, lines)
    runs = []
    for text, stdout, stderr in task.checks:
        if task.call:
            runs.append((base.removesuffix(task.call) + text, "", stdout, stderr))
        else:
            runs.append((base, text, stdout, stderr))
    for program, stdout, stderr in task.variants:
        runs.append((rebuild(program, task.masked, lines), task.stdin, stdout, stderr))
    return runs


def render_call(case) -> str | None:
    """`print(f(…))` for a call case, its arguments as literals; None where one has no literal."""
    arguments = case["input"]
    name = case["func_name"]
    if isinstance(arguments, dict):
        if not all(isinstance(key, str) and key.isidentifier() for key in arguments):
            return None
        rendered = [f"{key}={value!r}" for key, value in arguments.items()]
        values = list(arguments.values())
    else:
        values = list(arguments) if isinstance(arguments, (list, tuple)) else [arguments]
        rendered = [repr(value) for value in values]
    try:
        if any(ast.literal_eval(repr(value)) != value for value in values):
            return None
        call = f"print({name}({', '.join(rendered)}))"
        compile(call, "call", "eval")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return call + "\n"


def _draft(snippet, kind, classes, rng):
    """Choose the case, augment program and input, stitch the call."""
    code = snippet.code.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").rstrip() + "\n"
    if "\0" in code or "```" in code or "<line_" in code:
        return _Draft(kind, dropped="not expressible in blocks")
    code = augment_code(code, rng, classes=classes - {"stdin", "arguments"})
    cases = list(snippet.inputs)
    case = cases.pop(rng.randrange(len(cases))) if cases else {"input": ""}
    # further inputs for a backward task: the snippet's other cases, then this case redrawn
    further = [*cases, case, *(_perturbed(case, CLASSES, rng) for _ in range(2))]
    wanted = [_perturbed(case, classes, rng), *(c for c in further if ("func_name" in c) == ("func_name" in case))]
    if "func_name" in case:
        own, *others = map(render_call, wanted)
        draft = _Draft(kind, code, call=own or "", dropped=None if own else "arguments without a literal")
    else:
        own, *others = (c["input"] for c in wanted)
        draft = _Draft(kind, code, stdin=own, dropped=None if _fits_blocks(own) else "not expressible in blocks")
    draft.rng = rng
    draft.others = [text for text in dict.fromkeys(others) if text is not None and text != own][:3]
    return draft


def _perturbed(case, classes, rng):
    """The case, its input augmented where the classes say so."""
    if "func_name" in case:
        return {**case, "input": augment_arguments(case["input"], rng)} if "arguments" in classes else case
    return {"input": augment_stdin(case["input"], rng)} if "stdin" in classes else case


def _truths(runs, sandbox, timeout):
    """Execute (program, stdin, trace) runs twice: an Execution where both agree, else the reason to drop it.

    The second run has another hash seed, another folder, and is traced where asked or where the program failed.
    """
    first = sandbox.run_many([Job(program, stdin, timeout=timeout) for program, stdin, _ in runs])
    truths = [run if run.status in ("ok", "error") else run.status for run in first]
    again = [i for i, run in enumerate(truths) if not isinstance(run, str)]
    second = sandbox.run_many([Job(runs[i][0], runs[i][1], timeout=2 * timeout, hash_seed=1,
                                   trace=runs[i][2] or truths[i].exit_code != 0) for i in again])
    for i, run in zip(again, second):
        truths[i] = run if _outcome(run) == _outcome(truths[i]) else "not deterministic"
    return truths


def _outcome(run):
    return run.stdout, run.stderr, run.exit_code


def _unusable(run, ask_stderr, max_output):
    """Why an executed program makes no task, or None."""
    if run.exit_code != 0:
        bases = set(run.ending_bases or ())
        if bases & {"OSError", "ImportError"}:
            return "needs files, network or packages"
        if not bases & ERRORS:
            return "unsupported error"
    shown = run.stdout + (run.stderr if ask_stderr else "")
    if not shown.strip() or (run.stdout and not run.stdout.strip()):
        return "no output"
    if len(run.stdout) + len(run.stderr) > max_output:
        return "too long"
    if not _fits_blocks(shown):
        return "not expressible in blocks"
    # a library's frames and warnings hold paths and line numbers of this machine
    named = re.findall(r'File "([^"]*)"', run.stderr) + re.findall(r"^(\S+\.py):\d+: ", run.stderr, re.M)
    if set(named) - {"main.py"}:
        return "stderr names another file"
    return None


def _fits_blocks(text):
    """Whether a fenced block can carry the text: no fence of its own, no lone surrogates, no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text and not any(line.startswith("```") for line in text.split("\n"))


def _choose_masked(drafts, max_masked, sandbox, timeout):
    """Set `masked` of each draft to 1..max_masked lines that ran and whose blanking changes the run."""
    trials = []
    for draft in drafts:
        rows = draft.code.split("\n")
        shown = draft.truth.stdout + draft.truth.stderr
        candidates = [n for n in draft.truth.lines if n < len(rows)          # the stitched call is the last row
                      and rows[n - 1].strip() and rows[n - 1].strip() not in shown]
        draft.rng.shuffle(candidates)
        wanted = draft.rng.randint(1, max_masked)
        trials += [(draft, number, wanted) for number in candidates[:wanted + 2]]
    blanked = sandbox.run_many([Job(rebuild(draft.program, [number], [""]), draft.stdin, timeout=timeout)
                                for draft, number, _ in trials])
    for (draft, number, wanted), run in zip(trials, blanked):
        if run.status != "lost" and _outcome(run) != _outcome(draft.truth) and len(draft.masked) < wanted:
            draft.masked = tuple(sorted((*draft.masked, number)))
    for draft in drafts:
        draft.dropped = None if draft.masked else "no line that matters"


def _add_checks(drafts, sandbox, timeout):
    """Set `checks` from further inputs and, for programs without input, `variants` with other number literals."""
    runs = []                                              # (draft, input or None, program, stdin)
    for draft in drafts:
        for text in draft.others:
            runs.append((draft, text, *((draft.code + text, "") if draft.call else (draft.program, text))))
        if not draft.call and not draft.stdin:
            rows = draft.code.split("\n")
            for _ in range(2):
                other = augment_code(draft.code, draft.rng, classes={"digits"}, probability=0.5)
                program = rebuild(other, draft.masked, [rows[number - 1] for number in draft.masked])
                runs.append((draft, None, program, ""))
    truths = _truths([(program, stdin, False) for _, _, program, stdin in runs], sandbox, timeout)
    for (draft, text, program, _), truth in zip(runs, truths):
        if isinstance(truth, str) or _outcome(truth) == _outcome(draft.truth):
            continue
        if text is None:
            draft.variants += ((program, truth.stdout, truth.stderr),)
        else:
            draft.checks += ((text, truth.stdout, truth.stderr),)


def _finish(draft, ask_stderr):
    """The Task of a draft whose truth and hidden lines are known; a str where its prompt would give it away."""
    truth = draft.truth
    lines = tuple(n for n in truth.lines or () if n not in draft.masked)
    task = Task(draft.kind, "", draft.program, draft.stdin, truth.stdout, truth.stderr, draft.masked, draft.checks,
                draft.variants, draft.call, truth.ending, truth.exit_code, lines, ask_stderr)
    names = [f"<line_{i}>" for i in range(1, len(draft.masked) + 1)]
    prompt = PROGRAM.format(program=rebuild(draft.program, draft.masked, names))
    prompt += STDIN.format(stdin=draft.stdin.removesuffix("\n") + "\n") if draft.stdin else NO_INPUT
    if draft.kind == "forward":
        prompt += FORWARD if ask_stderr else FORWARD_STDOUT
    else:
        prompt += BACKWARD + block("stdout", truth.stdout) + "\n" + block("stderr", truth.stderr) + "\n" + RESTORE
    prompt += "\n".join(block(tag, EXAMPLE[tag.split("_")[0]]) for tag in task.tags)
    return "prompt holds the answer" if render_answer(task) in prompt else replace(task, prompt=prompt)
