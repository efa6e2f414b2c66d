"""Measure a model: held-out tasks of our own, and public benchmarks from files that the user names.

    python evaluate.py --model M --benchmark cruxeval-o --data cruxeval.jsonl --out before.jsonl
    python evaluate.py --benchmark mbpp --data mbpp.jsonl --completions texts.jsonl
    python evaluate.py --compare before.jsonl after.jsonl

A benchmark turns a row of its file into (id, prompt, completion -> program). A completion passes if its program ends
normally in our sandbox after its last line, which prints a fresh random word: neither exit(0) nor printing passes.

Prompts and extraction follow the benchmarks' own harnesses. Departures: prompts go through the model's chat template
(a base model gets plain text); completions are cut after sampling, not by stop words; our time limits.
CRUXEval: the assertion is parsed, so "==" inside a string splits nothing (official: cut at the first "=="). Outputs are
  compared with f deleted (official: refuses the text f(INPUT) alone); an input must be one call of f.
HumanEval: EvalPlus's instruction, not its opening of the reply; the prompt stands before the code. The first fenced
  block that defines the function counts, else the first, else the text (EvalPlus: the longest stretch that parses).
MBPP: zero-shot (official: three shots); published figures are of tasks 11-510. MBPP+: see data/mbpp_plus.py.
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
from collections import Counter, defaultdict
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
CODE = ("Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        "```\n{}\n```\n")
MBPP = ("You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n\n"
        "Put the code in one fenced python block.\n")


def heldout_rows(sampler, tokenizer, tasks, sets, sandbox, *, step, samples=1, max_new_tokens, seed,
                 score_options=None) -> list[dict]:
    """Answer held-out tasks at T = 1 and greedily: the rows of heldout.jsonl, one per task in order.

    sets: "variants" or "families" of each task. `reward` and `exact` are means over `samples` completions at T = 1,
    None where the sandbox lost all. score_options: keywords of reward.score_many. Equal arguments give equal rows.
    """
    prompts, options = [task.prompt for task in tasks], {"max_new_tokens": max_new_tokens, "seed": seed}
    sampled = answer(sampler, tokenizer, prompts, group_size=samples, temperature=1.0, **options)
    greedy = answer(sampler, tokenizer, prompts, group_size=1, temperature=0.0, **options)
    pairs = [(task, text) for task, texts, best in zip(tasks, sampled, greedy) for text in texts + best]
    rewards = iter(score_many(pairs, sandbox, **(score_options or {})))
    rows = []
    for n, (task, name) in enumerate(zip(tasks, sets, strict=True)):
        row = {"step": step, "task": n, "set": name, "kind": "error" if task.stderr else task.kind}
        row["reward"], row["exact"] = _means([next(rewards) for _ in range(samples)])
        row["greedy_reward"], row["greedy_exact"] = _means([next(rewards)])
        rows.append(row)
    return rows


def answer(sampler, tokenizer, prompts, *, group_size, max_new_tokens, **options):
    """`group_size` texts for each prompt, as a list of lists, with a progress bar; options are the sampler's."""
    chats = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    lengths = Counter()                                # ids that each row has so far
    with tqdm(total=len(chats) * group_size, desc="answers", unit="row", leave=False, disable=None) as bar:
        def count(row, ids):
            lengths[row] += len(ids)
            bar.update(ids[-1] in tokenizer.eos_ids or lengths[row] == max_new_tokens)

        rows = sampler.generate(chats, group_size=group_size, max_new_tokens=max_new_tokens,
                                eos_ids=tokenizer.eos_ids, progress=count, **options)
    texts = [tokenizer.decode(row.ids) for row in rows]
    return [texts[start:start + group_size] for start in range(0, len(texts), group_size)]


def constant_answer_reward(tasks, sandbox, score_options=None):
    """What the best constant answers earn on the tasks: (mean reward, exact rate), (None, None) without tasks.

    For each kind the one strategy of reward.constant_answers with the best mean reward, weighted by tasks. Error tasks
    are kinds of their own, forward and backward apart, because strategies line up only within a kind of answer.
    """
    groups, best = defaultdict(list), []               # best: (reward, exact) for each task
    for task in tasks:
        groups[task.kind, bool(task.stderr)].append(task)
    for group in groups.values():
        strategies = zip(*map(constant_answers, group))                     # each: its answers to the tasks
        means = [_means(score_many(list(zip(group, texts)), sandbox, **(score_options or {}))) for texts in strategies]
        scored = [mean for mean in means if mean[0] is not None]
        best += [max(scored)] * len(group) if scored else []
    return tuple(np.mean(best, axis=0).tolist()) if best else (None, None)


def _means(rewards):
    """(mean reward, exact rate) of what the sandbox didn't lose, or (None, None)."""
    kept = [(reward.total, reward.exact) for reward in rewards if not reward.lost]
    return tuple(np.mean(kept, axis=0).tolist()) if kept else (None, None)


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
    rng, changes = np.random.default_rng(seed), new - old
    means = [rng.choice(changes, len(changes)).mean() for _ in range(resamples)]
    return float(old.mean()), float(new.mean()), *np.percentile(means, [2.5, 97.5]).tolist()


def cruxeval(row, mode, cot=False):
    """CRUXEval: predict the output of f on an input, or find an input that gives the output."""
    code, truth = row["code"], row["output"]
    question = f"f({row['input']}) == ??" if mode == "output" else f"f(??) == {truth}"
    shots = (DATA / "prompts" / f"cruxeval-{mode}{'-cot' * cot}.txt").read_text(encoding="utf-8")
    prompt = f"{shots}[PYTHON]\n{code}\nassert {question}\n[/PYTHON]\n{'[THOUGHT]' if cot else '[ANSWER]'}\n"

    def program(completion):
        side = extract_assertion(completion, mode)
        one_call = f"assert __import__('ast').parse({side!r}, mode='eval').body.func.id == 'f'"
        return f"{code}\n{'del f' if mode == 'output' else one_call}\nassert {truth} == eval({side!r})"
    return row["id"], prompt, program


def humaneval(row):
    """HumanEval: complete a function from its signature and docstring."""
    start, name, tests = row["prompt"], row["entry_point"], row["test"]
    return row["task_id"], CODE.format(start.strip()), lambda completion: (
        f"{start}{extract_code(completion, name)}\n\n{tests}\ncheck({name})")


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


BENCHMARKS = {
    "cruxeval-o": partial(cruxeval, mode="output"), "cruxeval-o-cot": partial(cruxeval, mode="output", cot=True),
    "cruxeval-i": partial(cruxeval, mode="input"), "cruxeval-i-cot": partial(cruxeval, mode="input", cot=True),
    "humaneval": humaneval, "mbpp": mbpp, "mbppplus": mbpp_plus, "mbppplus-base": partial(mbpp_plus, plus=False)}


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
    except (SyntaxError, ValueError, RecursionError, MemoryError, AttributeError, IndexError):
        left, *right = text.split("==")                # no assertion of a comparison: the official way
        return left.split("assert")[-1].strip() if mode == "input" else (right or [left])[0].strip()


def run_programs(programs, sandbox, timeout=TIMEOUT):
    """Whether each program ends normally after its last line: True or False; None where the sandbox lost it."""
    word = secrets.token_hex(16)
    end = f"\n\n__import__('sys').__stdout__.write('\\n{word}\\n')\n"
    # what the sandbox refuses and Python couldn't read either: lone surrogates, NUL
    texts = [program.encode("utf-8", "replace").decode().replace("\0", "?") for program in programs]
    jobs = [Job(text + end, timeout=timeout) for text in texts]
    return [None if run.status == "lost" else run.status == "ok" and word in run.stdout.split("\n")
            for run in sandbox.run_many(jobs)]


def read_rows(path, unfinished=False, **fields):
    """The dicts of a .jsonl or .json file, gzipped or not, with these typed fields; drops an `unfinished` end."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        text = data[:data.rfind(b"\n") + 1 if unfinished else None].decode()
        rows = json.loads(text) if text[:1] == "[" else [json.loads(row) for row in text.split("\n") if row.strip()]
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} doesn't hold JSON rows: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in fields.items()):
            raise ValueError(f"{path} row {number} is no dict with {', '.join(fields)} of the right types")
    return rows


def by_id(rows):
    """{id as text: its rows}; ids are numbers in some files, text in others."""
    groups = defaultdict(list)
    for row in rows:
        groups[str(row["id"])].append(row)
    return groups


def run_benchmark(args):
    """Answer (or read), execute and store, a chunk at a time; then print the summary."""
    items = {}                                         # id as text: (id, prompt, completion -> program)
    for number, row in enumerate(read_rows(args.data), 1):
        try:
            item = BENCHMARKS[args.benchmark](row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{args.data} row {number} is no {args.benchmark} row: {error!r}") from None
        items[str(item[0])] = item
    given = by_id(read_rows(args.completions, id=(str, int), completion=str)) if args.completions else {}
    names = [name for name in list(items)[:args.limit] if args.model or name in given]
    run = {key: value for key, value in vars(args).items() if key not in ("limit", "out", "compare")}
    done = {}
    if args.out and os.path.exists(args.out):
        rows = read_rows(args.out, unfinished=True, id=(str, int), completion=str, passed=bool)
        if any(row.get("run") != run for row in rows):
            raise ValueError(f"{args.out} was made by another model, benchmark, file or setting: name another --out")
        os.truncate(args.out, Path(args.out).read_bytes().rfind(b"\n") + 1)
        done = by_id(rows)
    todo = [name for name in names if len(done.get(name, ())) < args.samples]
    if args.model and todo:
        import torch                                   # scoring given completions needs neither torch nor a model
        from model import GPT, Tokenizer
        from sample import Sampler
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        sampler = Sampler(GPT.from_pretrained(args.model, device=device, dtype=dtype))
        tokenizer = Tokenizer.from_pretrained(args.model)
    timeout = PLUS_TIMEOUT if args.benchmark.startswith("mbppplus") else TIMEOUT
    with open(args.out or os.devnull, "a") as out, Sandbox(memory_mb=4096) as sandbox:     # EvalPlus's memory limit
        for start in tqdm(range(0, len(todo), CHUNK), desc=args.benchmark, unit=f"{CHUNK} items", disable=None):
            chunk = todo[start:start + CHUNK]
            if args.model:
                # numbered over the whole file: a run that was cut goes on with the draws it would have had
                row_ids = [names.index(name) * args.samples + n for name in chunk for n in range(args.samples)]
                texts = answer(sampler, tokenizer, [items[name][1] for name in chunk], group_size=args.samples,
                               max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
                               row_ids=row_ids)
            else:
                texts = [[row["completion"] for row in given[name]] for name in chunk]
            pairs = [(items[name], text) for name, group in zip(chunk, texts) for text in group]
            verdicts = run_programs([item[2](text) for item, text in pairs], sandbox, timeout)
            rows = [{"id": item[0], "completion": text, "passed": passed, "run": run}
                    for (item, text), passed in zip(pairs, verdicts) if passed is not None]
            done |= by_id(rows)
            out.writelines(json.dumps(row) + "\n" for row in rows)
            out.flush()
    summarize([[row["passed"] for row in done.get(name, ())] for name in names])


def summarize(items):
    """Print the pass rate of items (lists of bool), its interval over items, and pass@k (Chen et al. 2021, eq. 1)."""
    scored = [passed for passed in items if passed]
    if not scored:
        raise ValueError("no item was scored")
    rates, lost = [np.mean(passed) for passed in scored], len(items) - len(scored)
    _, rate, low, high = (100 * value for value in paired_change([0.0] * len(rates), rates))     # its change from 0
    print(f"passed {sum(map(sum, scored))}/{sum(map(len, scored))} = {rate:.1f} % [{low:.1f}, {high:.1f}]"
          + f" (the sandbox lost {lost} items: run this again)" * (lost > 0))
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
    source, add = parser.add_mutually_exclusive_group(), parser.add_argument
    source.add_argument("--model", help="model folder or hub id")
    source.add_argument("--completions", help="JSONL of id, completion: score these, without a model")
    source.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two --out files: difference, interval, McNemar")
    add("--benchmark", choices=list(BENCHMARKS))
    add("--data", help="the benchmark's file as published: .jsonl, .json, .gz")
    add("--out", help="JSONL of id, completion, passed; the same command goes on where it stopped")
    add("--limit", type=int, help="the first N rows only")
    add("--max-new-tokens", type=int, help="default 128 for cruxeval-o and -i, else 1000")
    add("--samples", type=int, default=1, help="completions of each item, for pass@k")
    add("--temperature", type=float, default=0.0, help="0 is greedy; several --samples need more")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.max_new_tokens is None:
        args.max_new_tokens = 128 if args.benchmark in ("cruxeval-o", "cruxeval-i") else 1000
    try:
        if args.compare:
            return compare(*args.compare)
        if not (args.benchmark and args.data and (args.model or args.completions)):
            raise ValueError("give --benchmark and --data with --model or --completions, or --compare A B")
        run_benchmark(args)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
