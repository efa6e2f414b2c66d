"""Measure a model: held-out tasks of our own, and public benchmarks from files that the user names.

    python evaluate.py --model M --benchmark cruxeval-o --data cruxeval.jsonl --out before.jsonl
    python evaluate.py --benchmark mbpp --data mbpp.jsonl --completions texts.jsonl
    python evaluate.py --compare before.jsonl after.jsonl

A benchmark is a function from a row of its file to (id, prompt, completion -> program). A completion passes if its
program, run in our sandbox, ends normally after its last line, which prints a fresh random word: neither exit(0)
nor printing passes. Rows of --out hold id, completion, passed and the settings that made them (`run`).

Prompts and extraction follow the benchmarks' own harnesses. Departures: prompts go through the model's chat template
(a base model gets plain text); completions are cut after sampling, not by stop words; our time limits.
CRUXEval: the completed assertion is parsed, so "==" inside a string splits nothing (official: cut at the first "==",
  still done where parsing fails). Outputs are compared with f deleted (official: refuses the text f(INPUT) alone);
  an input must be one call of f (official: holds the text "f("). data/prompts holds the official prompts.
HumanEval: EvalPlus's chat instruction, not its opening of the reply. The first fenced block that defines the function
  counts, else the first block, else the text (EvalPlus: the longest stretch that parses). The prompt stands before
  the code, so a body and a whole function both work and the prompt's imports are there.
MBPP: zero-shot in the paper's words (official: three shots). Published figures are of its test split, tasks 11-510.
MBPP+: prompt as for HumanEval, check in data/mbpp_plus.py. mbppplus-base runs the base inputs alone.
Not covered: HumanEval+, LiveCodeBench, BigCodeBench.
"""
import argparse
import ast
import gzip
import json
import os
import re
import secrets
import zlib
from functools import partial
from math import comb
from pathlib import Path

import numpy as np
from tqdm import tqdm

from reward import constant_answers, score_many
from sandbox import Job, Sandbox

TIMEOUT, PLUS_TIMEOUT = 20.0, 300.0    # seconds a program may run; on MBPP+ each call has a limit of its own
CHUNK = 64                             # items answered between two writes of --out
DATA = Path(__file__).parent / "data"
UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)      # what ast.parse raises on a model's text
CODE = ("Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        "```\n{}\n```\n")
MBPP = ("You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n\n"
        "Put the code in one fenced python block.\n")


def heldout_rows(sampler, tokenizer, tasks, sets, sandbox, *, step, samples=1, max_new_tokens, seed,
                 score_options=None) -> list[dict]:
    """Answer held-out tasks at T = 1 and greedily: the rows of heldout.jsonl, one per task in order.

    sets: "variants" or "families" for each of `tasks` (ValueError where the lengths differ). `reward` and `exact` are
    means over `samples` completions at T = 1, None where the sandbox lost all. `kind` is "error" where the true stderr
    isn't empty. score_options: keywords of reward.score_many. Equal arguments give equal rows.
    """
    if len(tasks) != len(sets):
        raise ValueError(f"{len(tasks)} tasks but {len(sets)} sets: give one set for each task")
    prompts = [tokenizer.encode_chat([{"role": "user", "content": task.prompt}]) for task in tasks]
    options = {"max_new_tokens": max_new_tokens, "eos_ids": tokenizer.eos_ids, "seed": seed}
    sampled = sampler.generate(prompts, group_size=samples, temperature=1.0, **options)    # tasks * samples rows
    greedy = sampler.generate(prompts, group_size=1, temperature=0.0, **options)
    pairs = [(tasks[r // samples], tokenizer.decode(completion.ids)) for r, completion in enumerate(sampled)]
    pairs += [(task, tokenizer.decode(completion.ids)) for task, completion in zip(tasks, greedy)]
    rewards = score_many(pairs, sandbox, **(score_options or {}))
    rows = []
    for n, (task, name) in enumerate(zip(tasks, sets)):
        row = {"step": step, "task": n, "set": name, "kind": "error" if task.stderr else task.kind}
        row["reward"], row["exact"] = _means(rewards[n * samples:(n + 1) * samples])
        row["greedy_reward"], row["greedy_exact"] = _means([rewards[len(sampled) + n]])
        rows.append(row)
    return rows


def constant_answer_reward(tasks, sandbox, score_options=None):
    """What the best constant answers earn on the tasks: (mean reward, exact rate), (None, None) without tasks.

    For each kind the one strategy of reward.constant_answers with the best mean reward, weighted by tasks. Error tasks
    are kinds of their own, forward and backward apart, because strategies line up only within a kind of answer.
    """
    groups = {}
    for task in tasks:
        groups.setdefault((task.kind, bool(task.stderr)), []).append((task, constant_answers(task)))
    pairs = [(task, text) for group in groups.values() for task, texts in group for text in texts]
    rewards = iter(score_many(pairs, sandbox, **(score_options or {})))
    totals, count = np.zeros(2), 0                     # (reward, exact) summed over tasks
    for group in groups.values():
        table = [[next(rewards) for _ in texts] for _, texts in group]       # (tasks, strategies)
        means = [mean for mean in map(_means, zip(*table)) if mean[0] is not None]
        if means:
            totals += len(group) * np.array(max(means, key=lambda mean: mean[0]))
            count += len(group)
    return tuple(float(total) for total in totals / count) if count else (None, None)


def _means(rewards):
    """(mean reward, exact rate) of what the sandbox didn't lose, or (None, None)."""
    kept = [(reward.total, reward.exact) for reward in rewards if not reward.lost]
    return tuple(float(mean) for mean in np.mean(kept, axis=0)) if kept else (None, None)


def paired_change(before, after, seed=0, resamples=10_000):
    """How much a measure changed on the same tasks: (mean before, mean after, low, high), all None without a pair.

    before, after: a float or None for each task; pairs with a None are dropped. low and high: the 95 % percentile
    bootstrap interval of mean(after) - mean(before), pairs resampled. ValueError where the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before but {len(after)} after: pairs need the same tasks")
    pairs = [(b, a) for b, a in zip(before, after) if b is not None and a is not None]
    if not pairs:
        return None, None, None, None
    old, new = np.array(pairs, dtype=float).T
    return float(old.mean()), float(new.mean()), *_interval(new - old, seed, resamples)


def _interval(values, seed=0, resamples=10_000):
    """95 % percentile bootstrap interval (low, high) of the mean of values (n,)."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return tuple(float(bound) for bound in np.percentile(means, [2.5, 97.5]))


def cruxeval(row, mode, cot=False):
    """CRUXEval: predict the output of f on an input, or find an input that gives the output."""
    truth = row["output"]
    question = f"f({row['input']}) == ??" if mode == "output" else f"f(??) == {truth}"
    shots = DATA / "prompts" / f"cruxeval-{mode}{'-cot' * cot}.txt"
    prompt = (f"{shots.read_text(encoding='utf-8')}[PYTHON]\n{row['code']}\nassert {question}\n[/PYTHON]\n"
              f"{'[THOUGHT]' if cot else '[ANSWER]'}\n")

    def program(completion):
        answer = extract_assertion(completion, mode)
        try:
            tree = ast.parse(answer, mode="eval").body
        except UNPARSED:
            return "assert False"
        if mode == "input" and not (isinstance(tree, ast.Call) and ast.unparse(tree.func) == "f"):
            return "assert False"
        return f"{row['code']}\n{'del f' * (mode == 'output')}\nassert {truth} == (\n{answer}\n)"
    return row["id"], prompt, program


def humaneval(row):
    """HumanEval: complete a function from its signature and docstring."""
    name = row["entry_point"]
    return row["task_id"], CODE.format(row["prompt"].strip()), lambda completion: (
        f"{row['prompt']}{extract_code(completion, name)}\n\n{row['test']}\ncheck({name})")


def mbpp(row):
    """MBPP, whole or sanitized: write a function that passes the assertions shown."""
    tests = "\n".join(row["test_list"])
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
    prompt = MBPP.format(row["text" if "text" in row else "prompt"], tests)
    return row["task_id"], prompt, lambda completion: f"{extract_code(completion)}\n\n{setup}\n{tests}"


def mbpp_plus(row, plus=True):
    """MBPP+: agree with the canonical solution on many inputs."""
    name, source = row["entry_point"], (DATA / "mbpp_plus.py").read_text(encoding="utf-8")
    inputs = json.dumps([*row["base_input"], *(row["plus_input"] if plus else ())])     # one row has {} for none
    values = (name, row["canonical_solution"], row["assertion"], inputs, row["atol"])
    check = f"exec({source!r}, plus := {{}})\nplus['check']({name}, *{values!r})"          # its names are its own
    return row["task_id"], CODE.format(row["prompt"].strip()), lambda text: f"{extract_code(text, name)}\n\n{check}"


BENCHMARKS = {"cruxeval-o": partial(cruxeval, mode="output"), "cruxeval-i": partial(cruxeval, mode="input"),
              "humaneval": humaneval, "mbpp": mbpp, "mbppplus": mbpp_plus,
              "mbppplus-base": partial(mbpp_plus, plus=False)}


def extract_code(completion, name=r"\w+"):
    """The first fenced block that defines `name`, else the first, else the text (a bare body up to a stop word)."""
    blocks = re.findall(r"^```[^`\n]*\n(.*?)(?:^```|\Z)", completion, re.S | re.M)
    defining = [block for block in blocks if re.search(rf"^def\s+{name}\s*\(", block, re.M)]
    body = re.split(r"\n(?=class|def|#|if|print)", completion)[0] if completion[:1].isspace() else completion
    return (defining or blocks or [body])[0]


def extract_assertion(completion, mode):
    """CRUXEval's answer as source: the left side of the completed assertion for "input", the right for "output"."""
    text = completion.split("[ANSWER]")[1 if "[ANSWER]" in completion else 0].split("[/ANSWER]")[0].strip()
    try:
        sides = ast.parse(text).body[0].test
        return ast.get_source_segment(text, sides.left if mode == "input" else sides.comparators[0])
    except (*UNPARSED, AttributeError, IndexError):    # no assertion of a comparison
        left, *right = text.split("==")
        return left.split("assert")[-1].strip() if mode == "input" else (right or [left])[0].strip()


def run_programs(programs, sandbox, timeout=TIMEOUT):
    """Whether each program ends normally after its last line: True or False; None where the sandbox lost it."""
    words = [secrets.token_hex(16) for _ in programs]
    ends = [f"\n\n__import__('sys').__stdout__.write('\\n{word}\\n')\n" for word in words]
    texts = [program.encode("utf-8", "replace").decode() + end for program, end in zip(programs, ends)]
    return [None if run.status == "lost" else run.status == "ok" and word in run.stdout.split("\n")
            for run, word in zip(sandbox.run_many([Job(text, timeout=timeout) for text in texts]), words)]


def read_rows(path, unfinished=False, **fields):
    """The dicts of a .jsonl or .json file, gzipped or not, with these typed fields; drops an `unfinished` end."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        text = data[:data.rfind(b"\n") + 1 if unfinished else None].decode()
        rows = json.loads(text) if text[:1] == "[" else [json.loads(row) for row in text.split("\n") if row.strip()]
    except (ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} doesn't hold JSON rows: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in fields.items()):
            raise ValueError(f"{path} row {number} is no dict with {', '.join(fields)} of the right types")
    return rows


def by_id(rows):
    """{id as text: its rows}; ids are numbers in some files, text in others."""
    groups = {}
    for row in rows:
        groups.setdefault(str(row["id"]), []).append(row)
    return groups


def sampled_answers(args, chunks):
    """Yields, for each chunk of items, `--samples` completions of each item; the model is loaded at the first."""
    import torch                                       # scoring given completions needs neither torch nor a model
    from model import GPT, Tokenizer
    from sample import Sampler
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    sampler = Sampler(GPT.from_pretrained(args.model, device=device, dtype=dtype))
    tokenizer = Tokenizer.from_pretrained(args.model)
    for chunk in chunks:
        prompts = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for _, prompt, _ in chunk]
        rows = sampler.generate(prompts, group_size=args.samples, max_new_tokens=args.max_new_tokens,
                                temperature=args.temperature, eos_ids=tokenizer.eos_ids,
                                seed=zlib.crc32(f"{args.seed} {chunk[0][0]}".encode()))
        texts = iter([tokenizer.decode(row.ids) for row in rows])
        yield [[next(texts) for _ in range(args.samples)] for _ in chunk]


def run_benchmark(args):
    """Answer (or read), execute and store, a chunk at a time; then print the summary."""
    items = {}                                         # id as text: (id, prompt, completion -> program)
    for number, row in enumerate(read_rows(args.data), 1):
        try:
            item = BENCHMARKS[args.benchmark](row, **({"cot": True} if args.cot else {}))
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{args.data} row {number} is no {args.benchmark} row: {error!r}") from None
        items[str(item[0])] = item
    given = by_id(read_rows(args.completions, id=(str, int), completion=str)) if args.completions else {}
    if unknown := given.keys() - items:
        raise ValueError(f"{args.completions} has the id {min(unknown)!r}, which {args.data} has not")
    names = [name for name in list(items)[:args.limit] if args.model or name in given]
    run = {key: getattr(args, key) for key in "benchmark model cot max_new_tokens samples temperature seed".split()}
    run["files"] = [zlib.crc32(Path(path).read_bytes()) for path in (args.data, args.completions) if path]
    done = {}
    if args.out and os.path.exists(args.out):
        done = by_id(read_rows(args.out, unfinished=True, id=(str, int), completion=str, passed=bool))
        if any(row.get("run") != run for rows in done.values() for row in rows):
            raise ValueError(f"{args.out} was made by another model, benchmark, file or setting: name another --out")
        with open(args.out, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    todo = [items[name] for name in names if len(done.get(name, ())) < args.samples]
    chunks = [todo[start:start + CHUNK] for start in range(0, len(todo), CHUNK)]
    answers = sampled_answers(args, chunks) if args.model else (
        [[row["completion"] for row in given[str(item[0])]] for item in chunk] for chunk in chunks)
    timeout = PLUS_TIMEOUT if args.benchmark.startswith("mbppplus") else TIMEOUT
    with Sandbox(memory_mb=4096) as sandbox:           # EvalPlus's memory limit
        for chunk, texts in zip(tqdm(chunks, desc=args.benchmark, unit=f"{CHUNK} items", delay=0.1), answers):
            pairs = [(item, text) for item, group in zip(chunk, texts) for text in group]
            verdicts = run_programs([item[2](text) for item, text in pairs], sandbox, timeout)
            rows = [{"id": item[0], "completion": text, "passed": passed, "run": run}
                    for (item, text), passed in zip(pairs, verdicts) if passed is not None]
            done |= by_id(rows)
            with open(args.out or os.devnull, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
    summarize([[row["passed"] for row in done.get(name, [])] for name in names])


def summarize(items):
    """Print the pass rate of items (lists of bool), its interval over items, and pass@k (Chen et al. 2021, eq. 1)."""
    scored = [passed for passed in items if passed]
    if not scored:
        raise ValueError("no item was scored")
    rates, lost = [np.mean(passed) for passed in scored], len(items) - len(scored)
    low, high = _interval(rates)
    print(f"passed {sum(map(sum, scored))}/{sum(map(len, scored))} = {100 * np.mean(rates):.1f} % "
          f"[{100 * low:.1f}, {100 * high:.1f}]" + f" (the sandbox lost {lost} items: run this again)" * (lost > 0))
    fewest = min(map(len, scored))
    for k in sorted({k for k in (1, 10, 100, fewest) if 1 < fewest >= k}):
        values = [1 - comb(len(passed) - sum(passed), k) / comb(len(passed), k) for passed in scored]
        print(f"pass@{k} = {100 * np.mean(values):.1f} %")


def compare(path_a, path_b):
    """Print how B differs from A on the items of both: paired interval and McNemar's exact p."""
    a, b = (by_id(read_rows(path, unfinished=True, id=(str, int), passed=bool)) for path in (path_a, path_b))
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(f"{path_a} and {path_b} have no item in common")
    before, after = ([float(np.mean([row["passed"] for row in rows[name]])) for name in names] for rows in (a, b))
    old, new, low, high = (100 * value for value in paired_change(before, after))
    gained, lost = sum(x < y for x, y in zip(before, after)), sum(x > y for x, y in zip(before, after))
    tail = sum(comb(gained + lost, i) for i in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    print(f"passed {old:.1f} % -> {new:.1f} %, change {new - old:+.1f} [{low:+.1f}, {high:+.1f}] points, on "
          f"{len(names)} items ({len(a) + len(b) - 2 * len(names)} left out that only one file has)\n"
          f"gained {gained}, lost {lost}, McNemar exact p = {min(1, 2 * tail):.4f}")


def main():
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Public benchmarks, in our sandbox.")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {' '.join(str(message).split())}\n")
    add = parser.add_argument
    add("--model", help="model folder or hub id")
    add("--benchmark", choices=list(BENCHMARKS))
    add("--data", help="the benchmark's file as published: .jsonl, .json, .gz")
    add("--limit", type=int, default=10**9, help="the first N rows only")
    add("--max-new-tokens", type=int, help="default 128 for CRUXEval, 1000 with --cot, 768 for code")
    add("--out", help="JSONL of id, completion, passed; the same command goes on where it stopped")
    add("--completions", help="JSONL of id, completion: score these, without a model")
    add("--cot", action="store_true", help="CRUXEval's chain-of-thought prompts")
    add("--samples", type=int, default=1, help="completions of each item, for pass@k")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0)
    add("--compare", nargs=2, metavar=("A", "B"), help="two --out files: difference, interval, McNemar")
    args = parser.parse_args()
    crux = str(args.benchmark).startswith("cruxeval")
    if args.max_new_tokens is None:
        args.max_new_tokens = 768 if not crux else 1000 if args.cot else 128
    wrong = {"--benchmark and --data are needed": not (args.benchmark and args.data),
             "give --model or --completions, one of the two": bool(args.model) == bool(args.completions),
             "--cot is for CRUXEval alone": args.cot and not crux,
             "--limit, --max-new-tokens and --samples are at least 1":
                 min(args.limit, args.max_new_tokens, args.samples) < 1,
             "several --samples need a --temperature above 0": args.samples > 1 and not args.temperature > 0,
             "--out names a file in a folder that isn't there": args.out and not Path(args.out).parent.is_dir()}
    try:
        if args.compare:
            return compare(*args.compare)
        for message in (message for message, is_wrong in wrong.items() if is_wrong):
            raise ValueError(message)
        run_benchmark(args)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
