"""Log-probs of completions, each prompt run once for its whole group, the logits never built.

CodeBoost's prompts are whole programs and its answers are often short, so repeating the prompt for each of G
completions is most of an update's work. Here all tokens of a batch lie end to end, every prompt once, so that every
projection sees N·P + R·C real tokens and no padding; the attention alone pads, and lets a completion see its prompt and
itself. Loss and gradient are those of the plain layout, to rounding. The head sees completion positions alone, in
chunks, so the (R, T, V) logits never exist.
"""
from itertools import chain

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = {"cpu": 2 ** 24, "cuda": 2 ** 27}      # fp32 logits that exist at one time


class TokenLogprobs(torch.autograd.Function):
    """hidden (S, D), weight (V, D), targets (S,) -> log-probs and entropies (S,) in at least fp32.

    The backward pass computes a chunk's logits again and turns them into its gradient on the spot: one more product
    with the head than autograd's, in place of memory for all logits. The entropy carries no gradient. Matrix products
    are in hidden's dtype, everything else in at least fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs, entropies = [], []
        for rows, logs in logits_in_chunks(hidden, weight.to(hidden.dtype), temperature):
            logs = logs.log_softmax(1)                                              # (s, V)
            logprobs.append(logs.gather(1, targets[rows].unsqueeze(1)).squeeze(1))
            entropies.append(-logs.exp().mul_(logs).sum(1))
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, slope in logits_in_chunks(hidden, head, ctx.temperature):
            scale = (grad[rows] / ctx.temperature).unsqueeze(1)                     # (s, 1)
            slope = slope.softmax(1).mul_(-scale)
            slope.scatter_add_(1, targets[rows].unsqueeze(1), scale)                # onehot - softmax, scaled
            slope = slope.to(hidden.dtype)                                          # (s, V)
            grad_hidden[rows] = slope @ head
            grad_weight += slope.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None


def logits_in_chunks(hidden, head, temperature):
    """Yield slices of rows and their (s, V) logits over temperature; keeps no reference to what it yielded."""
    size = max(1, LOGITS_AT_ONCE.get(hidden.device.type, 2 ** 24) // head.shape[0])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for first in range(0, hidden.shape[0], size):
        rows = slice(first, first + size)
        yield rows, (hidden[rows] @ head.T).to(wide).div_(temperature)


def completion_logprobs(model, prompts, completions, temperature=1.0, checkpoint=False):
    """Log-probs of R completions of N prompts -> (logprobs, entropy, mask), each (R, T).

    prompts: N lists of ids, none empty; completions: R = N·G lists of ids, rows of one prompt adjacent, empty ones
    allowed; T is the longest one's length. logprobs (at least fp32, with gradient) and entropy (without) are those of
    softmax(logits / temperature) over the tokenizer's real vocabulary; temperature 0 stands for 1, as in the sampler.
    mask (bool) is True for every id of a completion, EOS and pad ids included; the other slots hold 0. checkpoint=True
    recomputes each block in the backward pass. ValueError when R is not a multiple of N, a prompt is empty or an id is
    not in the vocabulary.
    """
    check_rows(prompts, completions, model.config.vocab_size, model.real_vocab_size)
    device = model.head_weight.device
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.int64)
    mask = torch.arange(max(lengths.tolist(), default=0)) < lengths.unsqueeze(1)    # (R, T)
    if not any(completions):
        empty = torch.zeros(mask.shape, device=device)
        return empty, empty, mask.to(device)
    ids, positions, attention, sources = pack(prompts, completions, mask, device)
    hidden = model.hidden_states(ids, positions, attention, checkpoint).squeeze(0).index_select(0, sources)   # (S, D)
    if torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    weight = model.head_weight          # read after the forward pass: under FSDP it is a shard before
    if model.real_vocab_size < weight.shape[0]:
        weight = weight[:model.real_vocab_size]     # padding rows take no part in the softmax
    mask, targets = mask.to(device), torch.tensor(list(chain(*completions)), device=device)
    logprobs, entropy = TokenLogprobs.apply(hidden, weight, targets, temperature or 1.0)
    grid = logprobs.new_zeros(mask.shape)
    # the backward pass needs the mask as it is; callers may change theirs
    return grid.masked_scatter(mask, logprobs), grid.masked_scatter(mask, entropy), mask.clone()


def check_rows(prompts, completions, vocab_size, real_vocab_size):
    """One clear ValueError for what would fail, or pass unnoticed, further down."""
    if len(completions) % max(len(prompts), 1) or completions and not prompts:
        raise ValueError(f"completion_logprobs: {len(completions)} completions are not a multiple of {len(prompts)} "
                         f"prompts; pass the same number for each prompt")
    if not all(prompts):
        raise ValueError("completion_logprobs: a prompt is empty, so nothing precedes its completions; encode at least "
                         "one token")
    for rows, limit in ((prompts, vocab_size), (completions, real_vocab_size)):
        for number in chain(*rows):
            if not 0 <= number < limit:
                raise ValueError(f"completion_logprobs: id {number} is outside the vocabulary of {limit}; encode with "
                                 f"this model's tokenizer")


def pack(prompts, completions, mask, device):
    """Lay all tokens end to end: every prompt, then every completion without its last id, which predicts nothing.

    -> ids (1, S), positions (1, S), which restart after the prompt for each completion, the attention that goes with
    them, and sources: for every completion id, in order, the slot whose hidden state predicts it.
    """
    group_size = len(completions) // len(prompts)
    ids = list(chain(*prompts, *(ids[:-1] for ids in completions)))
    lengths = torch.tensor([len(ids) for ids in prompts])                           # (N,)
    real, own_real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1), mask[:, 1:]   # (N, P), (R, T - 1)
    slots = real.flatten().cumsum(0).view(real.shape) - 1                           # padding: any slot will do
    own_slots = own_real.flatten().cumsum(0).view(own_real.shape) + slots.max()
    starts = lengths.repeat_interleave(group_size).unsqueeze(1)                     # (R, 1) first position
    positions = torch.cat([torch.arange(real.shape[1]).expand(real.shape)[real],
                           (starts + torch.arange(own_real.shape[1]))[own_real]])
    last = (lengths.cumsum(0) - 1).repeat_interleave(group_size).unsqueeze(1)       # (R, 1) predicts the first id
    sources = torch.cat([last, own_slots], 1)[mask]
    attention = shared_prompt_attention(slots.to(device), real.to(device), own_slots.to(device), own_real.to(device))
    return torch.tensor([ids], device=device), positions.unsqueeze(0).to(device), attention, sources.to(device)


def shared_prompt_attention(slots, real, own_slots, own_real):
    """attention(layer, q, k, v) for `pack`'s tokens: prompts are causal, and a completion sees its prompt and itself.

    Slots of prompts (N, P) and of completions (R, T - 1), and which of them are real. Keys and values of a prompt are
    repeated for its G completions, so that gradient flows back into them; the projections, nearly all the work, run
    once, and scores of one completion on another are never computed.
    """
    (num_rows, width), group_size = own_slots.shape, len(own_slots) // len(slots)
    see_prompt = real.repeat_interleave(group_size, 0)[:, None, None, :].expand(-1, -1, width, -1)
    see_own = torch.ones(width, width, dtype=torch.bool, device=real.device).tril().expand(num_rows, 1, -1, -1)
    visible = torch.cat([see_prompt, see_own], 3)                                   # (R, 1, T - 1, P + T - 1)
    kept = torch.cat([real.flatten(), own_real.flatten()]).nonzero().squeeze(1)
    gqa = real.device.type == "cpu"     # CUDA's kernel that takes a mask wants as many key heads as query heads

    def pad(x, slots):                  # (1, H, S, d) -> (B, H, longest, d)
        rows = x[0].transpose(0, 1).index_select(0, slots.flatten())
        return rows.unflatten(0, slots.shape).transpose(1, 2)

    def attention(layer, q, k, v):
        shared = pad(k, slots), pad(v, slots)                                       # (N, Hkv, P, d) each
        parts = [F.scaled_dot_product_attention(pad(q, slots), *shared, is_causal=True, enable_gqa=True)]
        if width:
            seen = [torch.cat([prompt.repeat_interleave(group_size, 0), pad(x, own_slots)], 2)
                    for prompt, x in zip(shared, (k, v))]                           # (R, Hkv, P + T - 1, d) each
            if not gqa:
                seen = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in seen]
            parts.append(F.scaled_dot_product_attention(pad(q, own_slots), *seen, attn_mask=visible, enable_gqa=gqa))
        out = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
        return out.index_select(0, kept).transpose(0, 1).unsqueeze(0)               # (1, H, S, d)

    return attention
