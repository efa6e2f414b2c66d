"""Log-probs of completions, each prompt run once for its whole group, the logits never built.

CodeBoost's prompts are whole programs and its answers are often short, so repeating the prompt for
each of G completions is most of an update's work. Here all tokens of a batch lie end to end, every
prompt once, so that every projection sees N·P + R·C real tokens and no padding; the attention
alone pads, and lets a completion see its prompt and itself. Positions restart after the prompt for
each completion. Loss and gradient are those of the plain layout, to rounding. The head sees
completion positions alone, in chunks, so the (R, T, V) logits never exist.
"""
from itertools import chain

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = {"cpu": 2 ** 24, "cuda": 2 ** 27}      # fp32 logits that exist at one time


class TokenLogprobs(torch.autograd.Function):
    """hidden (S, D), weight (V, D), targets (S,) -> log-probs and entropies (S,) in at least fp32.

    The logits exist for one chunk of positions at a time. The backward pass computes a chunk's
    logits again and turns them into its gradient on the spot: one more product with the head
    than autograd's, in place of memory for all logits. The entropy carries no gradient.
    Matrix products are in hidden's dtype, everything else in at least fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.temperature = temperature
        head = weight.to(hidden.dtype)
        logprobs, entropies = [], []
        for rows in chunks_of_rows(hidden, weight):
            logs = chunk_logits(hidden[rows], head, temperature).log_softmax(1)     # (s, V)
            logprobs.append(logs.gather(1, targets[rows].unsqueeze(1)).squeeze(1))
            entropies.append(-logs.exp().mul_(logs).sum(1))
        ctx.save_for_backward(hidden, weight, targets)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, targets = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in chunks_of_rows(hidden, weight):
            scale = (grad[rows] / ctx.temperature).unsqueeze(1)                     # (s, 1)
            slope = chunk_logits(hidden[rows], head, ctx.temperature).softmax(1).mul_(-scale)
            slope.scatter_add_(1, targets[rows].unsqueeze(1), scale)    # onehot - softmax, scaled
            slope = slope.to(hidden.dtype)                                          # (s, V)
            grad_hidden[rows] = slope @ head
            grad_weight += slope.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None


def chunks_of_rows(hidden, weight):
    """Slices of hidden's rows, as long as the logits of one fit LOGITS_AT_ONCE."""
    size = max(1, LOGITS_AT_ONCE.get(hidden.device.type, 2 ** 24) // weight.shape[0])
    return [slice(first, first + size) for first in range(0, hidden.shape[0], size)]


def chunk_logits(hidden, head, temperature):
    """(s, D), (V, D) -> (s, V) logits over temperature, at least fp32."""
    logits = hidden @ head.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def completion_logprobs(model, prompts, completions, temperature=1.0, checkpoint=False):
    """Log-probs of R completions of N prompts -> (logprobs, entropy, mask), each (R, T).

    prompts: N lists of ids, none empty; completions: R = N·G lists of ids, rows of one prompt
    adjacent, empty ones allowed; T is the longest one's length. logprobs (at least fp32, with
    gradient) and entropy (without) are those of softmax(logits / temperature) over the tokenizer's
    real vocabulary; temperature 0 stands for 1, as in the sampler. mask (bool) is True for every
    id of a completion, EOS and pad ids included; the other slots hold 0. checkpoint=True recomputes
    each block in the backward pass. Each prompt runs once; its last position gives the logits of
    the first id. ValueError when R is not a multiple of N or an id is not in the vocabulary.
    """
    check_rows(prompts, completions, model.config.vocab_size, model.real_vocab_size)
    device = model.head_weight.device
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.int64)
    width = int(lengths.max()) if completions else 0
    mask = torch.arange(width) < lengths.unsqueeze(1)               # (R, T)
    if width == 0:
        empty = torch.zeros(len(completions), 0, device=device)
        return empty, empty.clone(), mask.to(device)
    ids, positions, attention, sources = pack(prompts, completions, device)
    hidden = model.hidden_states(ids, positions, attention, checkpoint).squeeze(0)     # (S, D)
    if torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    weight = model.head_weight
    if model.real_vocab_size < weight.shape[0]:
        weight = weight[:model.real_vocab_size]     # padding rows take no part in the softmax
    targets = torch.tensor(list(chain(*completions)), device=device)
    logprobs, entropy = TokenLogprobs.apply(hidden.index_select(0, sources.to(device)), weight,
                                            targets, temperature or 1.0)
    slots = mask.flatten().nonzero().squeeze(1).to(device)
    grid = logprobs.new_zeros(mask.numel())
    logprobs = grid.index_copy(0, slots, logprobs).view(mask.shape)
    return logprobs, grid.index_copy(0, slots, entropy).view(mask.shape), mask.to(device)


def check_rows(prompts, completions, vocab_size, real_vocab_size):
    """One clear ValueError for what would fail, or pass unnoticed, further down."""
    if len(completions) % max(len(prompts), 1) or completions and not prompts:
        raise ValueError(f"completion_logprobs: {len(completions)} completions are not a multiple "
                         f"of {len(prompts)} prompts; pass the same number for each prompt")
    if not all(prompts):
        raise ValueError("completion_logprobs: a prompt is empty, so nothing precedes its "
                         "completions; encode at least one token")
    for rows, limit in ((prompts, vocab_size), (completions, real_vocab_size)):
        for number in chain(*rows):
            if not 0 <= number < limit:
                raise ValueError(f"completion_logprobs: id {number} is outside the vocabulary of "
                                 f"{limit}; encode with this model's tokenizer")


def pack(prompts, completions, device):
    """Lay all tokens end to end: every prompt, then every completion without its last id.

    -> ids (1, S), positions (1, S), the attention that goes with them, and sources (on the CPU):
    for every completion id, in order, the packed slot whose hidden state predicts it.
    """
    group_size = len(completions) // len(prompts)
    shared = torch.tensor([len(ids) for ids in prompts])                # (N,) prompt lengths
    lengths = torch.tensor([len(ids) for ids in completions])           # (R,)
    own = (lengths - 1).clamp(min=0)                                    # (R,) the last id predicts
    ids = list(chain(*prompts, *(ids[:-1] for ids in completions)))     # nothing and stays out
    shared_slots, shared_real = rows_end_to_end(shared, 0)              # (N, P)
    own_slots, own_real = rows_end_to_end(own, shared.sum())            # (R, T - 1)
    starts = shared.repeat_interleave(group_size).unsqueeze(1)          # (R, 1) first position
    steps = torch.arange(max(shared_real.shape[1], own_real.shape[1] + 1))
    positions = torch.cat([steps[:shared_real.shape[1]].expand(shared_real.shape)[shared_real],
                           (starts + steps[:own_real.shape[1]])[own_real]])
    last = (shared.cumsum(0) - 1).repeat_interleave(group_size).unsqueeze(1)        # (R, 1)
    sources = torch.cat([last, own_slots], 1)                           # (R, T)
    sources = sources[steps[:sources.shape[1]] < lengths.unsqueeze(1)]
    attention = shared_prompt_attention(shared_slots, shared_real, own_slots, own_real, device)
    return (torch.tensor([ids], device=device), positions.unsqueeze(0).to(device), attention,
            sources)


def rows_end_to_end(lengths, start):
    """B rows of these lengths, end to end from `start` -> slots (B, longest) of each row's tokens,
    0 for padding, and (B, longest) bool, False for padding. On the CPU, where lengths are known."""
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths.unsqueeze(1)
    return torch.where(real, (start + lengths.cumsum(0) - lengths).unsqueeze(1) + steps, 0), real


def shared_prompt_attention(shared_slots, shared_real, own_slots, own_real, device):
    """attention(layer, q, k, v) for `pack`'s tokens: prompts are causal, and a completion sees its
    prompt and itself. Slots (N, P) and (R, T - 1), and which are real: `rows_end_to_end`.

    A prompt's keys and values are repeated for its G completions, so that gradient flows back into
    them; scores of one completion on another are never computed. Keys and values alone are
    repeated: the projections, which hold nearly all the work, run once.
    """
    (num_rows, width), group_size = own_slots.shape, own_slots.shape[0] // shared_slots.shape[0]
    see_prompt = shared_real.repeat_interleave(group_size, 0)[:, None, None, :]
    see_own = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
    visible = torch.cat([see_prompt.expand(-1, -1, width, -1),
                         see_own.expand(num_rows, -1, -1, -1)], 3)      # (R, 1, T - 1, P + T - 1)
    visible = visible.to(device)
    kept = torch.cat([shared_real.flatten(), own_real.flatten()]).nonzero().squeeze(1).to(device)
    shared_slots, own_slots = shared_slots.to(device), own_slots.to(device)
    # the kernel that takes a mask on CUDA wants as many key heads as query heads
    gqa = device.type == "cpu"

    def pad(x, slots):              # (1, H, S, d) -> (B, H, longest, d)
        rows = x[0].transpose(0, 1).index_select(0, slots.flatten())
        return rows.unflatten(0, slots.shape).transpose(1, 2)

    def extend(x, shared, heads):   # a prompt's keys or values, then the completion's own
        x = torch.cat([shared.repeat_interleave(group_size, 0), pad(x, own_slots)], 2)
        return x if gqa else x.repeat_interleave(heads // x.shape[1], 1)

    def attention(layer, q, k, v):
        shared_k, shared_v = pad(k, shared_slots), pad(v, shared_slots)     # (N, Hkv, P, d)
        parts = [F.scaled_dot_product_attention(pad(q, shared_slots), shared_k, shared_v,
                                                is_causal=True, enable_gqa=True)]
        if width:
            own_k, own_v = (extend(x, shared, q.shape[1])
                            for x, shared in ((k, shared_k), (v, shared_v)))
            parts.append(F.scaled_dot_product_attention(pad(q, own_slots), own_k, own_v,
                                                        attn_mask=visible, enable_gqa=gqa))
        out = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
        return out.index_select(0, kept).transpose(0, 1).unsqueeze(0)       # (1, H, S, d)

    return attention
