"""Batched sampling from the policy: the rollouts of the paper's GRPO. decoder.py computes.

Rows sampled together are a wave. They start together, and finished rows make room: the others move
up. On CUDA a decode step is one graph per bucket of rows, prompts and length, and the host looks at
the tokens only every few steps.

Randomness is a counter: token t of row r is looked up in the cumulative distribution at a hash of
(seed, r, t), so no row's draw depends on another's. The distribution itself can change in its last
bits with the rows beside it, because matrix products choose their kernel by shape. On the CPUs
tried, fp32 rows were bit-equal in all waves of at least FEWEST_ROWS rows; smaller waves, bf16 and
GPUs promise float tolerance only, and a draw that close to the border between two tokens can then
fall on its other side.

Not covered: beam search, top-k, repetition penalties, new rows joining a running wave.
"""
import argparse
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from decoder import BLOCK, Decoder, Wave, free_memory
from model import GPT, Tokenizer

FEWEST_ROWS = 16    # on the CPU a wave does not shrink below this; see the module docstring
MOST_ROWS = 1024    # of a wave, unless max_batch says otherwise: more gain little


@dataclass
class Completion:
    ids: list           # sampled ids, the EOS that ended it included
    logprobs: list      # log_softmax(logits / temperature) of each, over the real vocabulary
    finished: bool      # False when cut by max_new_tokens


def generate(model, prompts, *, group_size=1, max_new_tokens, temperature=1.0, top_p=1.0,
             eos_ids=(), seed=0, **options):
    """`Sampler(model).generate` with the same arguments: see there."""
    return Sampler(model).generate(prompts, group_size=group_size, max_new_tokens=max_new_tokens,
                                   temperature=temperature, top_p=top_p, eos_ids=eos_ids,
                                   seed=seed, **options)


class Sampler:
    """Samples from a fused copy of `model` in `dtype` (default: the model's own). Call `refresh()`
    after every update of the model. On CUDA the last wave's buffers and graphs are kept for the
    next call until `release()`."""

    def __init__(self, model, dtype=None):
        self.decoder = Decoder(model, dtype or model.model["embed_tokens"].weight.dtype)
        self.refresh = self.decoder.refresh
        self.release()

    def release(self):
        """Free the buffers and graphs that were kept for the next call."""
        self.wave, self.graphs, self.pool = None, {}, None

    @torch.inference_mode()
    def generate(self, prompts, *, group_size=1, max_new_tokens, temperature=1.0, top_p=1.0,
                 eos_ids=(), seed=0, row_ids=None, max_batch=None, progress=None):
        """N prompts (lists of ids) -> N * group_size Completions, those of a prompt adjacent.

        temperature 0 is greedy, with log-probs at temperature 1. top_p < 1 draws from the fewest
        tokens that hold this probability; log-probs stay those of the whole distribution.
        row_ids: one global row number a row (default 0, 1, …), for processes that share a batch.
        max_batch: most rows at a time (default: what fits in memory). progress(row, ids) is called
        with each row's new ids as they become known. One-line ValueErrors: bad requests, too
        little memory, logits that are not finite.
        """
        row_ids = list(range(len(prompts) * group_size)) if row_ids is None else list(row_ids)
        request = SimpleNamespace(
            prompts=prompts, group_size=group_size, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, eos_ids=list(eos_ids), seed=seed,
            row_ids=row_ids, max_batch=max_batch, progress=progress,
            results=[None] * len(row_ids))
        check_request(self.decoder.config, request)
        if row_ids:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            rows = [i * group_size + g for i in order for g in range(group_size)]
            size = self._rows_at_a_time(request)
            for start in range(0, len(rows), size):     # prompts of like length together
                self._sample_wave(request, rows[start:start + size])
        if not self.decoder.static:
            self.release()
        return request.results

    def _rows_at_a_time(self, request):
        """Rows of a wave: even waves of whole groups if possible. ValueError if memory is short."""
        decoder, c, group = self.decoder, self.decoder.config, request.group_size
        lengths = [len(prompt) for prompt in request.prompts]
        rows, longest = len(request.row_ids), max(lengths)
        token = (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
                 * decoder.cache_dtype.itemsize)        # bytes of cache
        row = request.max_new_tokens * (token + 20) + 20 * len(decoder.head)    # 20: ids, logits …
        prefill = (4 * (6 * c.hidden_size + 3 * c.intermediate_size)
                   * max(longest, min(sum(lengths), decoder.prefill_tokens)))
        free = free_memory(decoder.device) + (self.wave.nbytes() if self.wave else 0)

        def need(size):
            return size * row + math.ceil(size / group) * longest * token + prefill

        size = min(request.max_batch or MOST_ROWS, rows)
        while not request.max_batch and size > 1 and need(size) > free:
            size = size * 3 // 4
        if need(size) > free:
            raise ValueError(
                f"{size} rows of {longest} + {request.max_new_tokens} tokens need "
                f"{need(size) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: lower max_batch or "
                "max_new_tokens, or drop the longest prompts")
        if size > group:
            waves = math.ceil(rows / (size - size % group))
            size = math.ceil(rows / group / waves) * group
        return size

    def _sample_wave(self, request, numbers):
        """Sample these rows of the request to their end, into request.results."""
        slots = {}                                      # number of a prompt -> its slot
        prompt_of_row = [slots.setdefault(row // request.group_size, len(slots)) for row in numbers]
        prompts = [request.prompts[number] for number in slots]
        wave = self._buffers(prompts, prompt_of_row, request.max_new_tokens)
        wave.seat(list(numbers), prompt_of_row, len(prompts))
        wave.lengths.copy_(torch.tensor([len(prompts[slot]) for slot in prompt_of_row]))
        wave.uniforms.copy_(torch.from_numpy(row_uniforms(
            request.seed, [request.row_ids[row] for row in numbers], request.max_new_tokens)))
        hidden = self.decoder.prefill(wave, prompts)                        # (N, D)
        wave.column.fill_(-1)
        self._emit(wave, request, hidden[torch.tensor(prompt_of_row, device=hidden.device)])
        finished, known, last = [False] * len(numbers), 0, request.max_new_tokens - 1
        every = 16 if self.decoder.static else 1        # tokens between two looks at them
        for column in range(last + 1):                  # the column of wave.ids written last
            if column == last or column + 1 - known == every:
                new = wave.ids[:wave.rows, known:column + 1].tolist()
                known = column + 1
                for i, ids in enumerate(new):
                    if not finished[i]:
                        ids = up_to_eos(ids, request.eos_ids)
                        finished[i] = ids[-1] in request.eos_ids
                        if request.progress:
                            request.progress(wave.numbers[i], ids)
                if column == last or all(finished):
                    break
                if any(finished):
                    finished = self._shrink(wave, request, finished, known)
            self._advance(wave, request, column)
        self._collect(wave, request, list(range(wave.rows)), known)

    def _buffers(self, prompts, prompt_of_row, T):
        """A Wave for these rows: the last one where it fits (CUDA), else a new one."""
        R, N, longest = len(prompt_of_row), len(prompts), max(map(len, prompts))
        share = max(prompt_of_row.count(slot) for slot in range(N))
        wave = self.wave
        if not (self.decoder.static and wave and wave.ids.shape == (R, T)
                and len(wave.prompt_bias) == N and wave.share == share
                and longest <= wave.prompt_bias.shape[-1] <= longest + 512):
            wave = None
            self.release()                              # before the new one is born
            P = math.ceil(longest / 256) * 256 if self.decoder.static else longest
            self.wave = wave = Wave(self.decoder.config, R, N, share, P, T, self.decoder.device,
                                    self.decoder.cache_dtype)
        return wave

    def _advance(self, wave, request, column):
        """Feed token `column` of every row and sample the next: eagerly, or by a CUDA graph."""
        def step():
            self._emit(wave, request, self.decoder.step(wave, length))

        wave.column.fill_(column)
        length = column + 1
        if not self.decoder.static:
            return step()
        length = min(request.max_new_tokens, max(128, 1 << column.bit_length()))
        key = (wave.rows, wave.prompts, length, request.temperature, request.top_p)
        if key in self.graphs:
            return self.graphs[key].replay()
        step()                                          # the step, and the warm-up for capture
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                step()
            self.graphs[key], self.pool = graph, graph.pool()

    def _emit(self, wave, request, x):
        """Sample token `column` + 1 of every row from its last hidden state, x (rows, D)."""
        logits = self.decoder.logits(x)                                     # (rows, V') fp32
        if request.temperature not in (0, 1):
            logits /= request.temperature
        probabilities = torch.softmax(logits, -1)
        column = wave.column + 1
        if request.temperature == 0:
            ids = logits.argmax(-1, keepdim=True)                           # (rows, 1)
        else:
            ids = pick(keep_top(probabilities, request.top_p),
                       wave.uniforms[:wave.rows].index_select(1, column))
        wave.ids[:wave.rows].index_copy_(1, column, ids)
        wave.probabilities[:wave.rows].index_copy_(1, column, probabilities.gather(1, ids))

    def _shrink(self, wave, request, finished, used):
        """Let finished rows make room, if enough are -> `finished` of the rows that stay."""
        live, over = ([i for i in range(wave.rows) if finished[i] is state]
                      for state in (False, True))
        spare = self._slots(wave.rows, len(live)) - len(live)
        if len(over) > spare:
            self._collect(wave, request, over[spare:], used)
            rows = sorted(live + over[:spare])
            prompts = sorted({wave.prompt_of_row[i] for i in rows})
            unused = sorted(set(range(wave.prompts)) - set(prompts))
            unused = unused[:self._slots(wave.prompts, len(prompts)) - len(prompts)]
            wave.keep(rows, sorted(prompts + unused), used)
            finished = [finished[i] for i in rows]
        return finished

    def _slots(self, slots, needed):
        """How many of `slots` to go on with when `needed` are wanted."""
        if self.decoder.static:                         # halves: few graphs
            while slots > 1 and (slots + 1) // 2 >= needed:
                slots = (slots + 1) // 2
            return slots
        return max(needed, min(slots, FEWEST_ROWS)) if needed <= slots * 7 // 8 else slots

    def _collect(self, wave, request, rows, used):
        """Hand the completions of these slots to the request."""
        index = torch.tensor(rows, device=wave.ids.device)
        logprobs = wave.probabilities[index, :used].log().tolist()
        for row, ids, values in zip(rows, wave.ids[index, :used].tolist(), logprobs):
            ids = up_to_eos(ids, request.eos_ids)
            if not all(map(math.isfinite, values[:len(ids)])):
                raise ValueError(f"the logits of row {wave.numbers[row]} are not finite: the "
                                 "weights hold NaN or infinity, or overflow this dtype")
            request.results[wave.numbers[row]] = Completion(
                ids, values[:len(ids)], ids[-1] in request.eos_ids)


def mix(x):
    """splitmix64's finaliser: uint64 array -> uint64 array, every bit dependent on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_uniforms(seed, rows, length):
    """(R, length) fp64 in (0, 1): entry (i, t) is a hash of seed, rows[i] and t alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = mix(np.array([[seed % 2**64]], np.uint64) + golden)                   # (1, 1)
    key = mix(key ^ mix(np.array(rows, np.uint64)[:, None] * golden))           # (R, 1)
    bits = mix(key + np.arange(1, length + 1, dtype=np.uint64) * golden)        # (R, length)
    return ((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32


def pick(weights, uniforms):
    """Inverse of the cumulative distribution: weights (B, V) fp32 >= 0, not normalised, V whole
    blocks; uniforms (B, 1) fp64 in (0, 1) -> (B, 1) ids, never one of weight 0.

    Two levels, blocks and then the entries of one block, so that little is summed in fp64.
    """
    blocks = weights.unflatten(1, (-1, BLOCK))                                  # (B, V / 64, 64)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)                       # (B, V / 64)
    targets = uniforms * ends[:, -1:]       # below the last end: a uniform is at most 1 - 2^-33
    block = torch.searchsorted(ends, targets, right=True)
    block.clamp_(max=ends.shape[1] - 1)                                         # NaN goes past it
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    inside = inside.cumsum(-1, dtype=torch.float64)                             # (B, 64)
    # how far into the block: at least 0 and short of its end, whatever the sums' rounding
    targets = (targets - ends.gather(1, block)).add_(inside[:, -1:]).clamp_(min=0)
    targets = torch.minimum(targets, inside[:, -1:] * (1 - 2**-40))
    return block * BLOCK + torch.searchsorted(inside, targets, right=True).clamp_(max=BLOCK - 1)


def keep_top(probabilities, top_p):
    """Zero all but the fewest likeliest tokens that hold top_p; (B, V) -> (B, V)."""
    if top_p == 1:
        return probabilities
    values, order = probabilities.sort(-1, descending=True)
    before = values.cumsum(-1) - values                             # held by likelier tokens
    return torch.zeros_like(values).scatter_(1, order, values * (before < top_p))


def up_to_eos(ids, eos_ids):
    """ids up to the first EOS, that one included; all of them where there is none."""
    return next((ids[:i + 1] for i, token in enumerate(ids) if token in eos_ids), ids)


def check_request(config, request):
    """One-line ValueErrors for what cannot be sampled."""
    r, vocabulary, positions = request, config.vocab_size, config.max_position_embeddings
    if r.group_size < 1 or r.max_new_tokens < 1:
        raise ValueError(f"group_size is {r.group_size} and max_new_tokens {r.max_new_tokens}: "
                         "both must be at least 1")
    if r.temperature != 0 and not 1e-4 <= r.temperature < math.inf:
        raise ValueError(f"temperature {r.temperature} must be 0 (greedy) or at least 0.0001")
    if r.max_batch is not None and r.max_batch < 1:
        raise ValueError(f"max_batch {r.max_batch} must be at least 1")
    if not 0 < r.top_p <= 1:
        raise ValueError(f"top_p {r.top_p} must be above 0 and at most 1")
    if len(r.row_ids) != len(r.prompts) * r.group_size:
        raise ValueError(f"{len(r.row_ids)} row_ids for {len(r.prompts)} prompts x {r.group_size}")
    for i, prompt in enumerate(r.prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one id, such as BOS")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}: the "
                             f"vocabulary is 0 to {vocabulary - 1}")
        if len(prompt) + r.max_new_tokens > positions:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; with max_new_tokens "
                             f"{r.max_new_tokens} that is past the model's {positions} positions")


def main():
    parser = argparse.ArgumentParser(description="Print a model's completion of a prompt.")
    parser.error = fail
    parser.add_argument("prompt", help="the user's message; the chat template is applied")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default 1")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1: all tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ids, shown = [], 0

    def show(_, new):
        nonlocal shown
        ids.extend(new)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):     # a character of several tokens, not complete yet
            print(text[shown:], end="", flush=True)
            shown = len(text)

    try:
        model = GPT.from_pretrained(args.model, "cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer.from_pretrained(args.model)
        prompt = tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
        generate(model, [prompt], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                 top_p=args.top_p, eos_ids=tokenizer.eos_ids, seed=args.seed, progress=show)
    except (ValueError, OSError) as error:
        fail(error)
    print(tokenizer.decode(ids)[shown:])


def fail(message):
    print(f"sample.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
