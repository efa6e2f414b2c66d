"""GRPO: advantages, log-probs of completions, the loss, and the update of one training step.

CodeBoost (arXiv 2508.05242, section 3.4) trains with GRPO (arXiv 2402.03300): for each prompt a
group of G completions, each with the advantage (r - mean) / (std + 1e-6), and the clipped policy
gradient with a k3 KL to the frozen start. By arguments, not by classes, the same functions give

    DAPO (2503.14476)    clip_high > clip_low, mean_over="tokens" (the default)
    GRPO (2402.03300)    mean_over="completions": every completion weighs the same
    Dr. GRPO (2503.20783)  normalize_std=False, mean_over=L: sums divided by a constant length L

Departures from the official code, each for exactness (docs and README have the whole table):
- The loss is averaged over all tokens of an update, so micro-batching never changes it; the
  official one averages micro-batches of two, and so overweights the tokens of short ones.
- Groups without spread leave loss and denominator, and never reach the model.

`completion_logprobs` lives in logprobs.py: each prompt runs through the model once for its group.
"""
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from logprobs import completion_logprobs

MAX_LOG_RATIO = 20.0    # log-ratios are clamped to ±20 before exp, as the official code does
MAX_KL = 10.0           # and the k3 estimate of a token to ±10


def group_advantages(rewards, *, normalize_std=True, eps=1e-6):
    """Rewards (N, G) -> advantages (N, G): (r - mean) / (std + eps) in each row, Bessel's std.

    normalize_std=False leaves the division out (Dr. GRPO). A reward that is not finite is a lost
    sample: statistics are over the others and its advantage is 0. A row whose rewards are all
    equal gives exactly 0, decided before any rounding. Computed in float64, returned in the
    rewards' floating dtype (fp32 for integers). ValueError for G < 2 or another shape.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"group_advantages: rewards of shape {tuple(rewards.shape)}; they must be "
                         f"(prompts, group size) with a group size of at least 2")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    wide = rewards.double()
    scored = wide.isfinite()                                        # (N, G)
    count = scored.sum(1, keepdim=True)                             # (N, 1)
    mean = torch.where(scored, wide, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(scored, wide - mean, 0.0)
    if normalize_std:
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    highest = wide.masked_fill(~scored, -torch.inf).amax(1, keepdim=True)
    lowest = wide.masked_fill(~scored, torch.inf).amin(1, keepdim=True)
    return torch.where(highest > lowest, centred, 0.0).to(dtype)


def policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.3,
                dual_clip=3.0, ref_logprobs=None, kl_coef=0.0, num_tokens=None):
    """The clipped GRPO loss -> (0-d loss, metrics).

    logprobs, old_logprobs, ref_logprobs (R, T), advantages (R,); the gradient flows into logprobs.
    mask (R, T) is True where a token counts; a float mask weighs tokens (1 / length in every row
    gives the mean over completions). The loss is the weighted sum over tokens of

        max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef k3,   r = exp(new - old),

    divided by num_tokens, by default mask.sum(). Where A < 0 the first part is at most -A dual_clip
    (arXiv 1912.09729; None: no such bound); k3 = exp(d) - d - 1 with d = ref - new
    (joschu.net/blog/kl-approx.html). Whatever sits in masked slots, NaN included, is inert in loss
    and gradient. metrics, 0-d tensors: policy_loss (divided like the loss), and the means over the
    mask of kl (only with ref_logprobs), clip_fraction (the clipped branch decides) and ratio.
    """
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"policy_loss: kl_coef is {kl_coef} but ref_logprobs is missing; pass the "
                         f"reference model's log-probs or kl_coef=0")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"policy_loss: dual_clip is {dual_clip}; it must be above 1, or None")
    counts = mask != 0

    def inert(values):          # before any arithmetic: 0 * NaN is NaN, in the backward pass too
        return torch.where(counts, values, 0.0)

    weight = mask.to(logprobs.dtype)                                # (R, T)
    logprobs, old_logprobs = inert(logprobs), inert(old_logprobs)
    advantages = inert(advantages.unsqueeze(1).to(logprobs.dtype))  # (R, T)
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(token_loss, -advantages * dual_clip)
        token_loss = torch.where(advantages < 0, bounded, token_loss)

    total = weight.sum()
    denominator = total.clamp(min=1e-8) if num_tokens is None else num_tokens

    def mean(values):
        return (weight * values).sum().detach() / total.clamp(min=1e-8)

    loss = (weight * token_loss).sum() / denominator
    metrics = {"policy_loss": loss.detach(), "ratio": mean(ratio),
               "clip_fraction": mean((clipped > plain).to(weight.dtype))}
    if ref_logprobs is not None:
        away = (inert(ref_logprobs) - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = (away.exp() - away - 1).clamp(-MAX_KL, MAX_KL)         # (R, T)
        loss = loss + kl_coef * (weight * kl).sum() / denominator
        metrics["kl"] = mean(kl)
    return loss, metrics


@dataclass
class Group:
    """One prompt and what an update needs of its G completions; one left out has no ids."""
    prompt: list                # ids
    completions: list           # G lists of ids
    sampled: list               # G lists of the sampler's log-probs
    advantages: torch.Tensor    # (G,)

    def tokens(self):
        return len(self.prompt) + sum(map(len, self.completions))


# A rank with fewer micro-batches than another runs this one, counting nothing of it: ranks that
# disagree about the number of collective forward passes would hang.
IDLE = [Group([0], [[0]], [[0.0]], torch.zeros(1))]


def update(model, optimizer, prompts, completions, advantages, *, lost=None, mask_truncated=False,
           updates=1, mean_over="tokens", micro_batch_tokens=16384, temperature=1.0, clip_low=0.2,
           clip_high=0.3, dual_clip=3.0, ref_model=None, kl_coef=0.0, max_grad_norm=1.0,
           dtype=torch.float32, checkpoint=False):
    """The update of one training step: learn from one rollout; changes model and optimizer.

    prompts: N lists of ids; completions: R = N·G records with .ids, .logprobs and .finished
    (sample.Completion), rows of one prompt adjacent; advantages (N, G) of `group_advantages`.
    lost (N, G) bool: samples that count for nothing; mask_truncated: nor do those cut by length.
    updates: optimiser updates, of N / updates prompts each; from the second on, the old log-probs
        are the trainer's own, by the weights at the start.
    mean_over: "tokens"; "completions"; or a length L: sums divided by L times the completions.
    micro_batch_tokens: most prompt and completion tokens of one forward pass; it takes whole
        groups, the longest first, and a longer group runs alone.
    dtype: torch.bfloat16 computes in bf16; weights, gradients and log-probs stay fp32.
    ref_model: the frozen start, needed where kl_coef > 0. checkpoint: recompute activations.
    Groups whose advantages are all 0 never reach the model. A gradient whose norm is not finite is
    skipped and counted. Under torch.distributed each rank passes its own prompts, the same number;
    means are over all ranks and gradients are taken to be averaged over them, as FSDP does.

    -> dict of numbers: loss kl entropy clip_fraction ratio grad_norm (before clipping) logprob_gap
    (mean |trainer's - sampler's| before any update), each None where it has no finite value or, kl,
    no ref_model; tokens (learnt from) updates (made) skipped dropped_groups micro_batches.
    """
    if kl_coef > 0 and ref_model is None:
        raise ValueError(f"update: kl_coef is {kl_coef} but ref_model is missing; pass the frozen "
                         f"start or kl_coef=0")
    groups = make_groups(prompts, completions, advantages, lost, mask_truncated)
    device = model.head_weight.device
    parts = plan(groups, updates, micro_batch_tokens, device)
    run = partial(forward, temperature=temperature, dtype=dtype, checkpoint=checkpoint)
    loss_options = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
                        kl_coef=kl_coef)
    with torch.no_grad():       # the first part's own log-probs are its old ones: no forward for it
        old = [[run(model, batch)[0] for batch in part] for part in parts[1:]]
    old.insert(0, [None] * len(parts[0]))
    sums = defaultdict(float, dropped_groups=groups.count(None))
    optimizer.zero_grad(set_to_none=True)
    for part, part_old in zip(parts, old):
        if not part:            # on every rank alike
            continue
        divisor = over_ranks([part_weight(part, mean_over)], device)[0]
        for batch, batch_old in zip(part, part_old):
            learn(model, ref_model, batch, batch_old, run, mean_over, divisor, loss_options, sums)
        sums["divisor"] += divisor
        take_step(model, optimizer, max_grad_norm, sums)
    return summarize(sums, device)


def make_groups(prompts, completions, advantages, lost, mask_truncated):
    """One Group a prompt, None where there is nothing to learn from; arguments as `update`'s."""
    if advantages.dim() != 2 or (len(prompts), len(completions)) != (len(advantages),
                                                                     advantages.numel()):
        raise ValueError(f"update: {len(prompts)} prompts and {len(completions)} completions do not"
                         f" fit advantages of shape {tuple(advantages.shape)}, (prompts, group)")
    groups, size = [], advantages.shape[1]
    for n, prompt in enumerate(prompts):
        rows = completions[n * size:(n + 1) * size]
        kept = [(c.finished or not mask_truncated) and not (lost is not None and lost[n][g])
                for g, c in enumerate(rows)]
        ids = [row.ids if keep else [] for row, keep in zip(rows, kept)]
        sampled = [row.logprobs if keep else [] for row, keep in zip(rows, kept)]
        useful = bool(advantages[n].any()) and any(ids)
        groups.append(Group(prompt, ids, sampled, advantages[n]) if useful else None)
    return groups


def plan(groups, updates, budget, device):
    """Groups, None among them -> for each update its micro-batches, lists of whole groups of at
    most `budget` tokens; as many on every rank. Longest first: what does not fit in memory fails
    in the first step, and neighbours of like length waste little in the attention's padding."""
    if updates < 1 or len(groups) % updates:
        raise ValueError(f"update: {len(groups)} prompts do not split into {updates} updates; "
                         f"use a divisor of the number of prompts")
    size, parts = len(groups) // updates, []
    for number in range(updates):
        part, room = [], 0
        kept = [group for group in groups[number * size:(number + 1) * size] if group]
        for group in sorted(kept, key=Group.tokens, reverse=True):
            if group.tokens() > room:
                part.append([])
                room = budget
            part[-1].append(group)
            room -= group.tokens()
        parts.append(part)
    counts = over_ranks([len(part) for part in parts], device, "MAX")
    return [part + [IDLE] * (int(count) - len(part)) for part, count in zip(parts, counts)]


def forward(model, batch, temperature, dtype, checkpoint):
    """completion_logprobs of a micro-batch, in bf16 where dtype says so."""
    with torch.autocast(model.head_weight.device.type, dtype, dtype != torch.float32):
        return completion_logprobs(model, [group.prompt for group in batch],
                                   [ids for group in batch for ids in group.completions],
                                   temperature, checkpoint)


def part_weight(part, mean_over):
    """What this rank adds to the divisor of an update's loss."""
    lengths = [len(ids) for batch in part if batch is not IDLE for group in batch
               for ids in group.completions if ids]
    if mean_over == "tokens":
        return sum(lengths)
    if mean_over == "completions":
        return len(lengths)
    if not isinstance(mean_over, int) or mean_over < 1:
        raise ValueError(f"update: mean_over is {mean_over!r}; use 'tokens', 'completions' or a "
                         f"positive whole number of tokens")
    return mean_over * len(lengths)


def learn(model, ref_model, batch, old_logprobs, run, mean_over, divisor, loss_options, sums):
    """Forward and backward of one micro-batch: its share of the update's gradient and metrics."""
    logprobs, entropy, mask = run(model, batch)                         # (R, T) each
    ref_logprobs = None
    if ref_model is not None:
        with torch.no_grad():
            ref_logprobs = run(ref_model, batch)[0]
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    weight = mask.to(logprobs.dtype) * (batch is not IDLE)
    if mean_over == "completions":
        weight = weight / mask.sum(1, keepdim=True).clamp(min=1)
    sampled = torch.zeros_like(old_logprobs)
    sampled[mask] = torch.tensor([x for group in batch for row in group.sampled for x in row],
                                 dtype=sampled.dtype, device=sampled.device)
    advantages = torch.cat([group.advantages for group in batch]).to(logprobs.device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    share = divisor / world             # FSDP's mean over ranks makes this the whole update's
    loss, metrics = policy_loss(logprobs, old_logprobs, advantages, weight, num_tokens=share,
                                ref_logprobs=ref_logprobs, **loss_options)
    loss.backward()
    count = weight.sum()
    sums["weight"] += count
    sums["loss"] += loss.detach() * share
    for name in metrics.keys() - {"policy_loss"}:
        sums[name] += metrics[name] * count
    sums["entropy"] += (entropy * weight).sum()
    sums["logprob_gap"] += ((old_logprobs - sampled).abs() * weight).sum()
    sums["tokens"] += (weight > 0).sum()
    sums["micro_batches"] += batch is not IDLE


def take_step(model, optimizer, max_grad_norm, sums):
    """Clip and apply the accumulated gradient, or skip it where its norm is not finite: one NaN
    in a reward or an activation would otherwise poison every weight for good."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP: a DTensor
    if math.isfinite(norm):
        optimizer.step()
        sums["updates"] += 1
        sums["grad_norm"] += norm
    else:
        sums["skipped"] += 1
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
    counts = ["tokens", "dropped_groups", "micro_batches"]
    names = means + counts + ["weight"]
    totals = dict(zip(names, over_ranks([sums.get(name, 0) for name in names], device)))
    made, skipped = int(sums["updates"]), int(sums["skipped"])
    divisors = dict.fromkeys(means, totals["weight"])
    divisors.update(loss=sums["divisor"], grad_norm=made)
    totals["grad_norm"] = sums["grad_norm"]
    if "kl" not in sums:        # no reference model: not measured, which is not the same as 0
        totals["kl"] = math.nan
    metrics = {name: totals[name] / divisor if divisor and math.isfinite(totals[name]) else None
               for name, divisor in divisors.items()}
    metrics |= {name: int(totals[name]) for name in counts}
    return metrics | {"updates": made, "skipped": skipped}
