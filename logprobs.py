"""Log-probs of completions, each prompt run once for its whole group, the logits never built.

CodeBoost's prompts are whole programs and its answers are often short, so repeating the prompt for each of G
completions is most of an update's work. Here all tokens of a batch lie end to end, every prompt once: projections see
N·P + R·C real tokens, the attention alone pads. Loss and gradient are those of the plain layout, to rounding. The head
sees completion positions alone, in chunks, so the (R, T, V) logits never exist.
"""
from itertools import chain

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = {"cpu": 2 ** 24, "cuda": 2 ** 27}      # fp32 logits that exist at one time


class TokenLogprobs(torch.autograd.Function):
    """hidden (S, D), weight (V, D), targets (S,) -> log-probs and entropies (S,) in at least fp32.

    The backward pass computes a chunk's logits again and turns them into its gradient on the spot: one more product
    than autograd's, but no memory for all logits. Matrix products are in hidden's dtype. No gradient of the entropy.
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
    for first in range(0, hidden.shape[0], size):
        rows = slice(first, first + size)
        yield rows, (hidden[rows] @ head.T).to(torch.promote_types(head.dtype, torch.float32)).div_(temperature)


def completion_logprobs(model, prompts, completions, temperature=1.0, checkpoint=False):
    """Log-probs of R completions of N prompts -> (logprobs, entropy, mask), each (R, T).

    prompts: N lists of ids; completions: R = N·G lists of ids, rows of one prompt adjacent; T is the longest's length.
    logprobs (at least fp32, with gradient) and entropy (without) are those of softmax(logits / temperature) over the
    tokenizer's real vocabulary; temperature 0 stands for 1, as in the sampler. mask (bool) is True for every id, EOS
    and pad included; other slots hold 0. checkpoint: recompute activations. ValueError for a bad R or an empty prompt.
    """
    if len(completions) % max(len(prompts), 1) or completions and not prompts:
        raise ValueError(f"completion_logprobs: {len(completions)} completions, not a multiple of {len(prompts)}")
    if not all(prompts):
        raise ValueError("completion_logprobs: a prompt is empty, so nothing precedes its completions")
    device = model.head_weight.device
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.int64, device=device)
    mask = torch.arange(max(map(len, completions), default=0), device=device) < lengths.unsqueeze(1)   # (R, T)
    if not any(completions):
        return mask.float(), mask.float(), mask                                     # (R, 0)
    ids, positions, attention, sources = pack(prompts, completions, mask)
    hidden = model.hidden_states(ids, positions, attention, checkpoint)[0].index_select(0, sources)         # (S, D)
    if torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    weight = model.head_weight          # read after the forward pass: under FSDP it is a shard before
    if model.real_vocab_size < weight.shape[0]:
        weight = weight[:model.real_vocab_size]     # padding rows take no part in the softmax
    targets = torch.tensor(list(chain(*completions)), device=device)
    logprobs, entropy = TokenLogprobs.apply(hidden, weight, targets, temperature or 1.0)
    grid = logprobs.new_zeros(mask.shape)
    # the backward pass needs the mask as it is; callers may change theirs
    return grid.masked_scatter(mask, logprobs), grid.masked_scatter(mask, entropy), mask.clone()


def pack(prompts, completions, mask):
    """Lay all tokens end to end: every prompt, then every completion without its last id, which predicts nothing.

    -> ids (1, S), positions (1, S), which restart after the prompt for each completion, the attention that goes with
    them, and sources: for every completion id, in order, the slot whose hidden state predicts it.
    """
    device, group_size = mask.device, len(completions) // len(prompts)
    ids = list(chain(*prompts, *(ids[:-1] for ids in completions)))
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)            # (N,)
    steps = torch.arange(max(map(len, prompts + completions)), device=device)
    real = steps[:lengths.max()] < lengths.unsqueeze(1)                             # (N, P)
    own_real = mask[:, 1:]                                                          # (R, T - 1)
    slots = real.flatten().cumsum(0).view(real.shape) - 1                           # padding: that of what precedes
    own_slots = own_real.flatten().cumsum(0).view(own_real.shape) + slots[-1, -1]
    starts = lengths.repeat_interleave(group_size).unsqueeze(1)                     # (R, 1) first position
    positions = torch.cat([steps[:real.shape[1]].expand(real.shape)[real],
                           (starts + steps[:own_real.shape[1]])[own_real]])
    last = slots[:, -1:].repeat_interleave(group_size, 0)                           # (R, 1) predicts the first id
    sources = torch.cat([last, own_slots], 1)[mask]
    attention = shared_prompt_attention(slots, real, own_slots, own_real)
    return torch.tensor([ids], device=device), positions.unsqueeze(0), attention, sources


def shared_prompt_attention(slots, real, own_slots, own_real):
    """attention(layer, q, k, v) for `pack`'s tokens: prompts are causal, and a completion sees its prompt and itself.

    Slots of prompts (N, P) and of completions (R, T - 1), and which are real. A prompt's keys and values are repeated
    for its G completions, with gradient; the projections, nearly all the work, run once.
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
