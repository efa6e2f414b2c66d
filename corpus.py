"""A corpus of snippets into the tasks of every step and the held-out ones.

Snippets are read, tried once, curated and split by family (paper, section 3.1); then a step's tasks are drawn over
(snippet, seed), so that one usable snippet is enough and the same seed gives the same tasks on any machine.
"""
import hashlib
import random
import sys
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from curate import curate, load_snippets
from tasks import synthesize_many


def split_families(snippets, share=0.1):
    """(training snippets, held-out snippets): a family is a `source`, held out by a hash of its name, so the bundled
    model's warm-up, training and evaluation agree on it. With fewer than ten families nothing is held out."""
    names = {snippet.source for snippet in snippets}
    mark = lambda name: int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big")
    held = {name for name in names if mark(name) < share * 2**32} if len(names) >= 10 else set()
    return [s for s in snippets if s.source not in held], [s for s in snippets if s.source in held]


def read_corpus(settings, sandbox):
    """(training snippets, held-out snippets): read, tried once each, curated, split by family; counts are printed."""
    dropped = Counter()
    snippets = load_snippets(settings.snippets, min_lines=settings.min_lines, min_chars=30, dropped=dropped)
    read = len(snippets) + dropped.total()
    usable = []
    with tqdm(total=len(snippets), desc="trying snippets", unit="snippet", disable=None) as bar:
        for i in range(0, len(snippets), 256):
            chunk = snippets[i:i + 256]
            tried = synthesize_many([(s, 0) for s in chunk], sandbox, kind="forward", augment=False,
                                    ask_stderr=settings.ask_stderr)
            usable += [s for s, task in zip(chunk, tried) if not isinstance(task, str)]
            dropped.update(task for task in tried if isinstance(task, str))
            bar.update(len(chunk))
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
    if not usable:
        raise ValueError(f"{settings.snippets}: no task can be made from its {read} snippets"
                         + (f" ({reasons})" if reasons else ""))
    kept = curate(usable, settings.threshold)
    train, held = split_families(kept)
    print(f"corpus: {read} snippets read, {len(usable)} usable" + (f" (dropped: {reasons})" if reasons else "")
          + f", {len(kept)} kept by the maximum clique: {len(train)} to train on, {len(held)} of held-out families")
    return train, held


@dataclass
class Heldout:
    tasks: list                                  # Task
    sets: list                                   # "variants" or "families" of each


def make_heldout(settings, train, held, tokenizer, sandbox):
    """Tasks of held-out families and, under seeds that training never draws, of training snippets, half and half.

    No task counts twice. Of the variants that the draws found at most half are held out: a corpus of one snippet has
    few, and training must find some that aren't.
    """
    heldout = Heldout([], [])
    families = settings.eval_tasks // 2 if held else 0
    for name, snippets, wanted in (("families", held, families), ("variants", train, settings.eval_tasks - families)):
        rng, found = random.Random(f"heldout {name} {settings.seed}"), {}              # found: prompt -> task
        goal = wanted if name == "families" else 2 * wanted
        for _ in range(8):
            if len(found) >= goal:
                break
            pairs = [(rng.choice(snippets), 2**40 + rng.getrandbits(40)) for _ in range(goal + 4)]
            for task in usable_tasks(settings, pairs, tokenizer, sandbox, Counter()):
                found.setdefault(task.prompt, task)
        kept = list(found.values())[:min(wanted, len(found) if name == "families" else len(found) // 2)]
        heldout.tasks += kept
        heldout.sets += [name] * len(kept)
    return heldout


def usable_tasks(settings, pairs, tokenizer, sandbox, dropped):
    """The tasks of (snippet, seed) pairs that fit the model; `dropped` counts the others by reason."""
    made = synthesize_many(pairs, sandbox, augment=settings.augment, max_masked=settings.max_masked,
                           ask_stderr=settings.ask_stderr)
    kept = []
    for task in made:
        if isinstance(task, str):
            dropped[task] += 1
        elif len(encode_prompt(tokenizer, task)) > settings.max_prompt_tokens:
            dropped["prompt over max_prompt_tokens"] += 1
        else:
            kept.append(task)
    return kept


def draw_tasks(settings, step, snippets, heldout, tokenizer, sandbox):
    """(tasks, their prompts' ids, reasons of those dropped) of a step: `prompts` of them, none of them held out."""
    rng = random.Random(f"tasks {settings.seed} {step}")
    hidden, tasks, dropped = {task.prompt for task in heldout.tasks}, [], Counter()
    for _ in range(30):
        pairs = [(rng.choice(snippets), rng.getrandbits(40)) for _ in range(settings.prompts - len(tasks) + 4)]
        made = usable_tasks(settings, pairs, tokenizer, sandbox, dropped)
        tasks += [task for task in made if task.prompt not in hidden]
        if len(tasks) >= settings.prompts:
            tasks = tasks[:settings.prompts]
            return tasks, [encode_prompt(tokenizer, task) for task in tasks], dropped
    print(f"train.py: step {step} found only {len(tasks)} of {settings.prompts} tasks ({dict(dropped)}); "
          "give more snippets, or a larger --max-prompt-tokens", file=sys.stderr)
    sys.exit(2)


def encode_prompt(tokenizer, task):
    return tokenizer.encode_chat([{"role": "user", "content": task.prompt}])


def key_seed(*keys):
    """A 62-bit seed that depends on what it is for: (seed, purpose, step)."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 2
