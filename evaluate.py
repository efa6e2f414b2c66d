"""Measure a model: held-out tasks of our own."""
import numpy as np

from reward import constant_answers, score_many


def heldout_rows(sampler, tokenizer, tasks, sets, sandbox, *, step, samples=1, max_new_tokens, seed,
                 score_options=None) -> list[dict]:
    """Answer held-out tasks at T = 1 and greedily: the rows of heldout.jsonl, one per task in order.

    Args:
        sampler: sample.Sampler (or anything with its `generate`).
        tasks, sets: list of Task, and "variants" or "families" for each.
        step: the step that the rows carry.
        samples: completions of each task at T = 1, over which `reward` and `exact` are means.
        seed: of the sampling; equal arguments give equal rows.
        score_options: keywords of reward.score_many.
    Returns: dicts of step, task (index), set, kind ("error" where the true stderr isn't empty), reward, exact,
        greedy_reward, greedy_exact. What the sandbox lost is left out of the means; null where nothing is left.
    Raises: ValueError where tasks and sets differ in length.
    """
    if len(tasks) != len(sets):
        raise ValueError(f"{len(tasks)} tasks but {len(sets)} sets: give one set for each task")
    if not tasks:
        return []
    prompts = [tokenizer.encode_chat([{"role": "user", "content": task.prompt}]) for task in tasks]
    options = dict(max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids, seed=seed)
    sampled = sampler.generate(prompts, group_size=samples, temperature=1.0, **options)
    greedy = sampler.generate(prompts, group_size=1, temperature=0.0, **options)

    pairs = [(tasks[r // samples], tokenizer.decode(c.ids)) for r, c in enumerate(sampled)]
    pairs += [(task, tokenizer.decode(c.ids)) for task, c in zip(tasks, greedy)]
    rewards = score_many(pairs, sandbox, **(score_options or {}))
    rows = []
    for n, (task, name) in enumerate(zip(tasks, sets)):
        reward, exact = _means(rewards[n * samples:(n + 1) * samples])
        greedy_reward, greedy_exact = _means([rewards[len(tasks) * samples + n]])
        rows.append({"step": step, "task": n, "set": name, "kind": "error" if task.stderr else task.kind,
                     "reward": reward, "exact": exact,
                     "greedy_reward": greedy_reward, "greedy_exact": greedy_exact})
    return rows


def constant_answer_reward(tasks, sandbox, score_options=None):
    """What the best constant answers earn on the tasks: (mean reward, exact rate), (None, None) without tasks.

    For each kind the one strategy of reward.constant_answers with the best mean reward, weighted by tasks: a policy
    that learnt nothing but the shape of an answer gets this far. Error tasks are kinds of their own, forward and
    backward apart, because strategies line up only within a kind of answer.
    """
    kinds = {}
    for task in tasks:
        kinds.setdefault((task.kind, bool(task.stderr)), []).append(task)
    groups = [[(task, constant_answers(task)) for task in group] for group in kinds.values()]
    pairs = [(task, text) for group in groups for task, texts in group for text in texts]
    rewards = iter(score_many(pairs, sandbox, **(score_options or {})))

    totals, count = np.zeros(2), 0                     # (reward, exact) summed over tasks
    for group in groups:
        table = [[next(rewards) for _ in texts] for _, texts in group]       # (tasks, strategies)
        means = [mean for mean in map(_means, zip(*table)) if mean[0] is not None]
        if means:
            totals += len(group) * np.array(max(means, key=lambda mean: mean[0]))
            count += len(group)
    return tuple(float(total) for total in totals / count) if count else (None, None)


def _means(rewards):
    """(mean reward, exact rate) of what the sandbox didn't lose, or (None, None)."""
    kept = [reward for reward in rewards if not reward.lost]
    if not kept:
        return None, None
    return float(np.mean([r.total for r in kept])), float(np.mean([r.exact for r in kept]))


def paired_change(before, after, seed=0, resamples=10_000):
    """How much a measure changed on the same tasks: (mean before, mean after, low, high).

    before, after: floats or None, one per task; pairs with a None are dropped. low and high are the 95 % percentile
    bootstrap interval of mean(after) - mean(before), tasks resampled in pairs. All four are None without a pair.
    Raises: ValueError where the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before but {len(after)} after: pairs need the same tasks")
    pairs = np.array([(b, a) for b, a in zip(before, after) if b is not None and a is not None], dtype=float)
    if not len(pairs):
        return None, None, None, None
    low, high = _interval(pairs[:, 1] - pairs[:, 0], seed, resamples)
    return float(pairs[:, 0].mean()), float(pairs[:, 1].mean()), low, high


def _interval(values, seed=0, resamples=10_000):
    """95 % percentile bootstrap interval of the mean of values (n,)."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
