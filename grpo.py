"""GRPO: advantages, the loss, and the update of one training step (log-probs are in logprobs.py).

CodeBoost (arXiv 2508.05242, section 3.4) trains with GRPO (2402.03300) with DAPO's (2503.14476) token mean and higher
upper clip, the defaults here. The functions give plain GRPO with a mask of 1 / length in each row, where all
completions weigh the same, and Dr. GRPO (2503.20783) with normalize_std=False and a constant num_tokens.

Departures from the official code, for exactness: the loss is the mean over all tokens of an update, whatever the
micro-batches (the official one averages batches of two, so overweights the tokens of short ones); groups without spread
leave loss and denominator, and never reach the model.
"""
import math
from collections import Counter, namedtuple

import torch
import torch.distributed as dist

from logprobs import completion_logprobs

MAX_LOG_RATIO = 20.0    # log-ratios are clamped to ±20 before exp, as the official code does
MAX_KL = 10.0           # and the k3 estimate of a token to ±10


def group_advantages(rewards, *, normalize_std=True, eps=1e-6):
    """Rewards (N, G) -> advantages (N, G): (r - mean) / (std + eps) in each row, Bessel's std.

    normalize_std=False leaves the division out. A reward that is not finite is a lost sample: statistics are over the
    others and its advantage is 0. A row whose rewards are all equal gives exactly 0. Computed in float64, returned in
    the rewards' floating dtype (fp32 for integers). ValueError for G < 2 or another shape.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"group_advantages: rewards {tuple(rewards.shape)}, not (prompts, group size of at least 2)")
    wide = rewards.double()
    scored = wide.isfinite()                                        # (N, G)
    count = scored.sum(1, keepdim=True)                             # (N, 1)
    # counted from the row's highest reward, equal ones are exactly 0 before anything is rounded
    highest = wide.masked_fill(~scored, -torch.inf).amax(1, keepdim=True)
    below = torch.where(scored, wide - highest, 0.0)
    centred = torch.where(scored, below - below.sum(1, keepdim=True) / count, 0.0)
    if normalize_std:
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    return centred.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.3, dual_clip=3.0,
                ref_logprobs=None, kl_coef=0.0, num_tokens=None):
    """The clipped GRPO loss -> (0-d loss, metrics).

    logprobs, old_logprobs, ref_logprobs (R, T), advantages (R,); the gradient flows into logprobs. mask (R, T) is True
    where a token counts; a float mask weighs tokens. The loss is the weighted sum over tokens of

        max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef k3,   r = exp(new - old),

    divided by num_tokens, by default mask.sum(). Where A < 0 the first part is at most -A dual_clip (arXiv 1912.09729;
    None: no such bound); k3 = exp(d) - d - 1 with d = ref - new (joschu.net/blog/kl-approx.html). Whatever sits in
    masked slots, NaN included, is inert. metrics, 0-d means over the mask: ratio, clip_fraction (the clipped branch
    decides), kl (only with ref_logprobs). ValueError for a kl_coef without ref_logprobs.
    """
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError("policy_loss: ref_logprobs is missing (in `update`: ref_model); pass it, or kl_coef=0")
    weight = mask.to(logprobs.dtype)                                # (R, T)
    total = weight.sum().clamp(min=1e-8)
    divisor = total if num_tokens is None else num_tokens

    def inert(values):          # before any arithmetic: 0 * NaN is NaN, in the backward pass too
        return torch.where(mask != 0, values, 0.0)

    def mean(values):
        return (weight * values).sum().detach() / total

    logprobs, old_logprobs = inert(logprobs), inert(old_logprobs)
    advantages = inert(advantages.unsqueeze(1).to(logprobs.dtype))  # (R, T)
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        token_loss = torch.where(advantages < 0, torch.minimum(token_loss, -advantages * dual_clip), token_loss)
    loss = (weight * token_loss).sum() / divisor
    metrics = {"ratio": mean(ratio), "clip_fraction": mean(clipped > plain)}
    if ref_logprobs is not None:
        away = (inert(ref_logprobs) - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = (away.exp() - away - 1).clamp(-MAX_KL, MAX_KL)         # (R, T)
        loss = loss + kl_coef * (weight * kl).sum() / divisor
        metrics["kl"] = mean(kl)
    return loss, metrics


# A prompt (ids) and what an update needs of its completions: rows, G pairs of ids and the sampler's log-probs, both
# empty where one is left out; advantages (G,); tokens, the number in prompt and rows.
Group = namedtuple("Group", "prompt rows advantages tokens")
# A rank with fewer micro-batches than another runs this one, counting nothing of it: ranks that disagree about the
# number of collective forward passes would hang.
IDLE = [Group([0], [([0], [0.0])], torch.zeros(1), 2)]


def update(model, optimizer, prompts, completions, advantages, *, lost=None, mask_truncated=False, updates=1,
           micro_batch_tokens=16384, temperature=1.0, ref_model=None, max_grad_norm=1.0, dtype=torch.float32,
           checkpoint=False, **loss_options):
    """The update of one training step: learn from one rollout; changes model and optimizer.

    prompts: N lists of ids; completions: R = N·G records with .ids, .logprobs and .finished (sample.Completion), rows
        of one prompt adjacent; advantages (N, G) of `group_advantages`.
    lost (N, G) bool: samples that count for nothing; mask_truncated: nor do those cut by length.
    updates: optimiser updates, of N / updates prompts each; old log-probs are those of the weights at the start.
    micro_batch_tokens: most prompt and completion tokens of one forward pass; a longer group runs alone.
    dtype: torch.bfloat16 computes in bf16; weights, gradients, log-probs stay fp32. checkpoint: recompute activations
    loss_options: clip_low, clip_high, dual_clip, kl_coef of `policy_loss`; ref_model: the frozen start, for kl_coef
    Groups whose advantages are all 0 never reach the model. A gradient whose norm is not finite is skipped and counted.
    Under torch.distributed each rank passes its own prompts, the same number, and gradients are averaged, as by FSDP.

    -> dict of numbers, of all ranks: loss kl entropy clip_fraction ratio logprob_gap (mean |trainer's - sampler's|
    before any update) grad_norm (before clipping), each None where it has no finite value or, kl, no ref_model;
    tokens (learnt from) micro_batches dropped_groups updates (made) skipped. ValueError where sizes do not fit.
    """
    device = model.head_weight.device
    groups = make_groups(prompts, completions, advantages, lost, mask_truncated)

    def run(which, batch):      # (logprobs, entropy, mask), (R, T) each
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            return completion_logprobs(which, [group.prompt for group in batch],
                                       [ids for group in batch for ids, _ in group.rows], temperature, checkpoint)

    parts, divisors = plan(groups, updates, micro_batch_tokens, device)
    with torch.no_grad():       # the first part's own log-probs are its old ones: no forward for it
        old = [[run(model, batch)[0] if number else None for batch in part] for number, part in enumerate(parts)]
    sums = Counter(tokens=0, micro_batches=0, dropped_groups=groups.count(None))
    for part, part_old, divisor in zip(parts, old, divisors):
        for batch, old_logprobs in zip(part, part_old):
            with torch.no_grad():
                ref_logprobs = run(ref_model, batch)[0] if ref_model is not None else None
            logprobs, entropy, mask = run(model, batch)
            old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
            row_advantages = torch.cat([group.advantages for group in batch]).to(device)        # (R,)
            counts = mask & (batch is not IDLE)                                                 # (R, T)
            loss, metrics = policy_loss(logprobs, old_logprobs, row_advantages, counts, ref_logprobs=ref_logprobs,
                                        num_tokens=divisor, **loss_options)
            loss.backward()
            sampled = torch.tensor([x for group in batch for _, row in group.rows for x in row], device=device)
            gap = (old_logprobs[mask] - sampled).abs() * counts[mask]
            sums.update({name: value * counts.sum() for name, value in metrics.items()}, tokens=counts.sum(),
                        micro_batches=batch is not IDLE, loss=loss.detach() * divisor,
                        entropy=(entropy * counts).sum(), logprob_gap=gap.sum())
        if part:                # else no rank has anything to learn
            take_step(model, optimizer, max_grad_norm, sums)
    return summarize(sums, device)


def make_groups(prompts, completions, advantages, lost, mask_truncated):
    """One Group a prompt, None where there is nothing to learn from; arguments as `update`'s."""
    groups, size = [], advantages.shape[1]
    for n, prompt in enumerate(prompts):
        rows = []
        for g, row in enumerate(completions[n * size:(n + 1) * size]):
            left_out = lost is not None and lost[n][g] or mask_truncated and not row.finished
            rows.append(([], []) if left_out else (row.ids, row.logprobs))
        tokens = sum(len(ids) for ids, _ in rows)
        useful = tokens and advantages[n].any()
        groups.append(Group(prompt, rows, advantages[n], len(prompt) + tokens) if useful else None)
    return groups


def plan(groups, updates, budget, device):
    """Groups, None among them -> for each update its micro-batches, as many on every rank, and its loss's divisor.

    Whole groups within `budget` tokens; longest first: memory fails at once or never, and like lengths pad little.
    """
    if updates < 1 or len(groups) % updates:
        raise ValueError(f"update: {len(groups)} prompts do not split into {updates} updates; use a divisor")
    size, parts, tokens = len(groups) // updates, [], []
    for number in range(updates):
        kept = [group for group in groups[number * size:(number + 1) * size] if group]
        part = []
        for group in sorted(kept, key=lambda group: group.tokens, reverse=True):
            if not part or sum(other.tokens for other in part[-1]) + group.tokens > budget:
                part.append([])
            part[-1].append(group)
        parts.append(part)
        tokens.append(sum(group.tokens - len(group.prompt) for group in kept))
    counts = over_ranks([len(part) for part in parts], device, "MAX")
    parts = [part + [IDLE] * (int(count) - len(part)) for part, count in zip(parts, counts)]
    *totals, world = over_ranks([*tokens, 1], device)
    return parts, [total / world for total in totals]       # FSDP's mean of the gradients divides by the world again


def take_step(model, optimizer, max_grad_norm, sums):
    """Clip and apply the gradient, or skip it if it is not finite: one NaN would poison every weight for good."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)      # FSDP: a DTensor
    if math.isfinite(norm):
        optimizer.step()
        sums.update(updates=1, grad_norm=norm)
    else:
        sums.update(skipped=1)
    optimizer.zero_grad(set_to_none=True)


def over_ranks(values, device, op="SUM"):
    """Numbers -> floats: their sums (or maxima) over all ranks; one process keeps its own."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values, getattr(dist.ReduceOp, op))
    return values.tolist()


def summarize(sums, device):
    """Sums over micro-batches -> the metrics of `update`, the same on every rank."""
    means = ["loss", "kl", "entropy", "clip_fraction", "ratio", "logprob_gap"]
    counts = ["tokens", "micro_batches", "dropped_groups"]
    totals = over_ranks([sums.get(name, math.nan) for name in means + counts], device)      # kl may be missing
    totals = dict(zip(means + counts, totals))
    metrics = {name: totals[name] / max(totals["tokens"], 1) for name in means}
    metrics["grad_norm"] = sums["grad_norm"] / (sums["updates"] or math.nan)
    metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    metrics |= {name: int(totals[name]) for name in counts}
    return metrics | {"updates": sums["updates"], "skipped": sums["skipped"]}
