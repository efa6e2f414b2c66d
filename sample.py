"""Batched sampling from the policy with a key-value cache: the rollouts of the paper's GRPO.

`Sampler` owns a copy of the weights in the compute dtype, with q, k, v and gate, up fused, so the
trained model keeps Hugging Face's names. Rows sampled together are a wave. Each prompt is
prefilled once and its cache shared by the rows of its group; as all rows of a wave start together,
token t of every completion lies in slot t of one static cache, and ragged prompts leave no gap.
Finished rows make room: the others move up. On CUDA a decode step is one graph per bucket of rows,
prompts and length, and the host looks at the tokens only every few steps.

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
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT, Tokenizer, rope_tables

BLOCK = 64          # vocabulary entries summed together when a token is looked up
FEWEST_ROWS = 16    # on the CPU a wave does not shrink below this; see the module docstring
MOST_ROWS = 1024    # of a wave, unless max_batch says otherwise: more gain little
PREFILL_TOKENS = {"cpu": 1, "cuda": 16384}  # at a time; CPU: one prompt, as if it were alone
CHECK_EVERY = {"cpu": 1, "cuda": 16}        # tokens between two looks for finished rows


@dataclass
class Completion:
    ids: list           # sampled ids, the EOS that ended it included
    logprobs: list      # log_softmax(logits / temperature) of each, over the real vocabulary
    finished: bool      # False when cut by max_new_tokens


@dataclass
class Wave:
    """The buffers of R rows of N prompts; the first `rows` and `prompts` of them are in use, rows
    sorted by prompt. L layers; H query heads and K key-value heads of d; P prompt and T new tokens.
    """
    prompt_keys: torch.Tensor       # (L, N, K, d, P): transposed, its products are faster on CPUs
    prompt_values: torch.Tensor     # (L, N, K, P, d)
    prompt_bias: torch.Tensor       # (N, 1, 1, P): 0, and -inf past the prompt's end
    keys: torch.Tensor              # (L, R, K, T, d)
    values: torch.Tensor            # (L, R, K, T, d)
    ids: torch.Tensor               # (R, T) int64
    probabilities: torch.Tensor     # (R, T) fp32, of those ids
    uniforms: torch.Tensor          # (R, T) fp64
    cos: torch.Tensor               # (P + T, 1, d) fp32
    sin: torch.Tensor               # (P + T, 1, d) fp32
    lengths: torch.Tensor           # (R,) int64, tokens of the row's prompt
    grid: torch.Tensor              # (N * share,) int64: the row at each place beside a prompt
    place: torch.Tensor             # (R,) int64: where the row is in `grid`
    column: torch.Tensor            # (1,) int64: the new token that is fed to the model next
    share: int                      # places beside a prompt: at least the rows it has in use
    rows: int = 0
    prompts: int = 0
    number: list = ()               # of each row in the request
    prompt: list = ()               # of each row, its slot

    def seat(self, number, prompt, prompts, exact):
        """Say which rows are in use and give each a place beside its prompt."""
        self.number, self.prompt, self.rows, self.prompts = number, prompt, len(number), prompts
        taken, place = [0] * prompts, []
        for slot in prompt:
            place.append((slot, taken[slot]))
            taken[slot] += 1
        self.share = max(taken) if exact else self.share
        place = [slot * self.share + i for slot, i in place]
        grid = [0] * (prompts * self.share)
        for row, at in enumerate(place):
            grid[at] = row
        self.grid[:len(grid)] = torch.tensor(grid)
        self.place[:len(place)] = torch.tensor(place)

    def keep(self, rows, prompts, used, exact):
        """Move these rows and prompts (ascending slots) to the front, the others are gone. used:
        new tokens written so far."""
        kept = torch.tensor(rows, device=self.ids.device)
        for tensor in (self.ids, self.probabilities, self.uniforms, self.lengths,
                       *self.keys[:, :, :, :used], *self.values[:, :, :, :used]):
            tensor[:len(rows)] = tensor[kept]
        kept = torch.tensor(prompts, device=self.ids.device)
        for tensor in (self.prompt_bias, *self.prompt_keys, *self.prompt_values):
            tensor[:len(prompts)] = tensor[kept]
        slot = {old: new for new, old in enumerate(prompts)}
        self.seat([self.number[i] for i in rows], [slot[self.prompt[i]] for i in rows],
                  len(prompts), exact)

    def to_grid(self, x):
        """x (rows, K, H / K, X) -> (prompts * K, share * H / K, X): beside the shared cache."""
        if self.rows != self.prompts * self.share:      # else the grid is 0, 1, 2, …
            x = x[self.grid[:self.prompts * self.share]]
        x = x.unflatten(0, (self.prompts, self.share)).transpose(1, 2)  # (N, K, share, H / K, X)
        return x.flatten(2, 3).flatten(0, 1)

    def to_rows(self, x, heads):
        """The inverse of `to_grid`; heads: (K, H / K)."""
        x = x.view(self.prompts, heads[0], self.share, heads[1], -1).transpose(1, 2).flatten(0, 1)
        return x if self.rows == len(x) else x[self.place[:self.rows]]


def generate(model, prompts, *, group_size=1, max_new_tokens, temperature=1.0, top_p=1.0,
             eos_ids=(), seed=0, **options):
    """`Sampler(model).generate` with the same arguments: see there."""
    return Sampler(model).generate(prompts, group_size=group_size, max_new_tokens=max_new_tokens,
                                   temperature=temperature, top_p=top_p, eos_ids=eos_ids,
                                   seed=seed, **options)


class Sampler:
    """Samples from a fused copy of `model` in `dtype` (default: the model's own). Call `refresh()`
    after every update of the model.

    On the CPU, attention and its cache are fp32 whatever the dtype: small bf16 products are slower
    there. On CUDA the last wave's buffers and graphs are kept for the next call until `release()`.
    """

    def __init__(self, model, dtype=None):
        c = self.config = model.config
        embedding = model.model["embed_tokens"].weight
        self.model, self.device, self.dtype = model, embedding.device, dtype or embedding.dtype
        self.static = self.device.type == "cuda"        # shapes that a graph can be captured with
        self.cache_dtype = self.dtype if self.static else torch.float32
        self.heads = (c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads)
        self.weights = {}
        for key, parts in fused_parameters(model).items():
            rows = sum(len(part) for part in parts)
            if key in ("embed", "head"):                # whole blocks; the rows added stay 0
                rows = -(-rows // BLOCK) * BLOCK
            self.weights[key] = torch.zeros(rows, *parts[0].shape[1:], dtype=self.dtype,
                                            device=self.device)
        self.layers = [SimpleNamespace(**{"index": i, "qkv_bias": None, "qk_norm": None, **{
            key[1]: weight for key, weight in self.weights.items() if key[0] == i}})
            for i in range(c.num_hidden_layers)]
        head = self.weights.get("head", self.weights["embed"])
        self.head = head[:-(-model.real_vocab_size // BLOCK) * BLOCK]       # (V', D)
        self.refresh()
        self.release()

    @torch.no_grad()
    def refresh(self):
        """Copy the model's present weights, in place. With a sharded model all ranks must call it:
        its parameters are gathered one at a time."""
        for key, parts in fused_parameters(self.model).items():
            row = 0
            for part in parts:
                part = part.full_tensor() if hasattr(part, "full_tensor") else part
                self.weights[key][row:row + len(part)].copy_(part)
                row += len(part)

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
            temperature=temperature, top_p=top_p, eos_ids=sorted(set(eos_ids)), seed=seed,
            row_ids=row_ids, progress=progress, results=[None] * len(row_ids))
        check_request(self.model, request)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together
        rows = [i * group_size + g for i in order for g in range(group_size)]
        size = self._rows_at_a_time(request, max_batch) if rows else 1
        for start in range(0, len(rows), size):
            self._sample_wave(request, rows[start:start + size])
        if not self.static:
            self.release()
        return request.results

    def _rows_at_a_time(self, request, max_batch):
        """Rows of a wave, whole groups if possible; ValueError where memory is short."""
        c, group, new = self.config, request.group_size, request.max_new_tokens
        longest = max(len(prompt) for prompt in request.prompts)
        token = (2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
                 * self.cache_dtype.itemsize)           # bytes of cache
        row = new * (token + 20) + 20 * len(self.head)  # logits, probabilities, sums
        prefill = 4 * (6 * c.hidden_size + 3 * c.intermediate_size) * max(
            longest, PREFILL_TOKENS[self.device.type])
        free = free_memory(self.device) - prefill
        size = min(max_batch or MOST_ROWS, len(request.row_ids))
        while True:
            size -= size % group if size > group else 0
            need = size * row + math.ceil(size / group) * longest * token
            if need <= free:
                return size
            if max_batch or size == 1:
                raise ValueError(
                    f"sampling {size} rows of {longest} + {new} tokens at a time needs "
                    f"{(need + prefill) / 1e9:.2f} GB and {(free + prefill) / 1e9:.2f} GB are free:"
                    " lower max_batch or max_new_tokens, or drop the longest prompts")
            size = max(1, size * 3 // 4)

    def _sample_wave(self, request, numbers):
        """Sample these rows of the request to their end, into request.results."""
        slots = {}                                      # number of a prompt -> its slot
        of_row = [slots.setdefault(row // request.group_size, len(slots)) for row in numbers]
        prompts = [request.prompts[number] for number in slots]
        longest = max(len(prompt) for prompt in prompts)
        share = max(of_row.count(slot) for slot in range(len(slots)))
        wave = self._buffers(len(numbers), len(prompts), share, longest, request.max_new_tokens)
        wave.seat(numbers, of_row, len(prompts), exact=True)
        wave.lengths.copy_(torch.tensor([len(prompts[slot]) for slot in of_row]))
        wave.uniforms.copy_(torch.from_numpy(row_uniforms(
            request.seed, [request.row_ids[row] for row in numbers], request.max_new_tokens)))
        hidden = self._prefill(wave, prompts)                               # (N, D)
        wave.column.fill_(-1)
        self._emit(wave, request, hidden[torch.tensor(of_row, device=self.device)])
        eos = torch.tensor(request.eos_ids, dtype=torch.int64, device=self.device)
        finished, known, last = [False] * len(numbers), 0, request.max_new_tokens - 1
        for column in range(last + 1):                  # the column of wave.ids written last
            if column == last or column + 1 - known == CHECK_EVERY[self.device.type]:
                new = wave.ids[:wave.rows, known:column + 1]
                known = column + 1
                if request.progress:
                    for row, ids, over in zip(wave.number, new.tolist(), finished):
                        if not over:
                            request.progress(row, up_to_eos(ids, request.eos_ids))
                if len(eos):
                    ended = (new.unsqueeze(-1) == eos).flatten(1).any(1).tolist()
                    finished = [a or b for a, b in zip(finished, ended)]
                if column == last or all(finished):
                    break
                if any(finished):
                    finished = self._shrink(wave, request, finished, known)
            self._advance(wave, request, column)
        self._collect(wave, request, list(range(wave.rows)), known)

    def _buffers(self, R, N, share, longest, T):
        """A Wave: the last one where it fits (CUDA), else a new one."""
        wave = self.wave
        if (self.static and wave and wave.ids.shape == (R, T) and wave.share == share
                and wave.prompt_bias.shape[0] == N
                and longest <= wave.prompt_bias.shape[3] <= longest + 512):
            return wave
        self.release()                                  # before the new one is born
        c, K, on = self.config, self.heads[0], {"device": self.device}
        L, d, cache = c.num_hidden_layers, c.head_dim, {"dtype": self.cache_dtype, **on}
        P = -(-longest // 256) * 256 if self.static else longest
        cos, sin = rope_tables(c, P + T, self.device)   # (P + T, d / 2) each
        root = d ** -0.25       # in query and key: their product gets attention's 1 / sqrt(d)
        new = torch.zeros       # what is masked must still be finite
        self.wave = Wave(
            new(L, N, K, d, P, **cache), new(L, N, K, P, d, **cache), new(N, 1, 1, P, **cache),
            new(L, R, K, T, d, **cache), new(L, R, K, T, d, **cache),
            new(R, T, dtype=torch.int64, **on), new(R, T, **on),
            new(R, T, dtype=torch.float64, **on),
            root * torch.cat((cos, cos), 1).unsqueeze(1),
            root * torch.cat((-sin, sin), 1).unsqueeze(1),
            *(new(size, dtype=torch.int64, **on) for size in (R, N * share, R, 1)), share)
        return self.wave

    def _prefill(self, wave, prompts):
        """Fill the prompts' caches -> (N, D): each prompt's last hidden state."""
        longest, hidden = max(len(prompt) for prompt in prompts), []
        step = max(1, PREFILL_TOKENS[self.device.type] // longest)
        wave.prompt_bias.fill_(-math.inf)
        for i in range(0, len(prompts), step):
            part = prompts[i:i + step]
            width = max(len(prompt) for prompt in part)
            ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in part])
            x = F.embedding(ids.to(self.device), self.weights["embed"])     # (n, width, D)
            for layer in self.layers:       # padding is on the right, so causality hides it
                q, k, v = self._qkv(layer, x, wave.cos[:width], wave.sin[:width])
                here = layer.index, slice(i, i + len(part))
                wave.prompt_keys[here][..., :width] = k.permute(0, 2, 3, 1)
                wave.prompt_values[here][:, :, :width] = v.transpose(1, 2)
                q, k, v = (t.to(self.dtype).transpose(1, 2) for t in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0,
                                                     enable_gqa=True)       # (n, H, width, d)
                x = self._finish_layer(layer, x, out.transpose(1, 2).flatten(2))
            for j, prompt in enumerate(part):
                wave.prompt_bias[i + j, ..., :len(prompt)] = 0
                hidden.append(x[j, len(prompt) - 1])
        return torch.stack(hidden)

    def _qkv(self, layer, x, cos, sin):
        """x (…, D) -> fp32 q (…, H, d), k and v (…, K, d), q and k turned by their position."""
        c, K = self.config, self.heads[0]
        x = F.rms_norm(x, (c.hidden_size,), layer.norm, c.rms_norm_eps)
        x = F.linear(x, layer.qkv, layer.qkv_bias).float().unflatten(-1, (-1, c.head_dim))
        qk, v = x[..., :-K, :], x[..., -K:, :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_norm_eps) * layer.qk_norm
        swapped = torch.cat(qk.chunk(2, -1)[::-1], -1)      # dimension i pairs with i + d / 2
        qk = torch.addcmul(qk * cos, swapped, sin)
        return qk[..., :-K, :], qk[..., -K:, :], v

    def _finish_layer(self, layer, x, out):
        """What follows attention in a block: x (…, D), out (…, H * d) -> (…, D)."""
        x = x + F.linear(out, layer.out)
        gate_up = F.linear(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.config.rms_norm_eps),
                           layer.gate_up)
        gate, up = gate_up.chunk(2, -1)
        return x + F.linear(F.silu(gate).mul_(up), layer.down)

    def _attend(self, wave, layer, q, k, v, length, bias):
        """Put k and v (rows, K, d) into slot `column`; q (rows, H, d) sees the prompt and the first
        `length` slots -> (rows, H * d). One softmax over both parts."""
        R, N, i = wave.rows, wave.prompts, layer.index
        keys, values = wave.keys[i, :R], wave.values[i, :R]                 # (rows, K, T, d)
        keys.index_copy_(2, wave.column, k.unsqueeze(2).to(self.cache_dtype))
        values.index_copy_(2, wave.column, v.unsqueeze(2).to(self.cache_dtype))
        keys, values = (t[:, :, :length].flatten(0, 1) for t in (keys, values))
        q = q.to(self.cache_dtype).unflatten(1, self.heads)                 # (rows, K, H / K, d)
        shared = torch.bmm(wave.to_grid(q), wave.prompt_keys[i, :N].flatten(0, 1))
        shared.unflatten(0, (N, -1)).add_(wave.prompt_bias[:N])
        own = torch.bmm(q.flatten(0, 1), keys.transpose(1, 2)).unflatten(0, (R, -1))
        own = own if bias is None else own + bias
        scores = torch.cat((own, wave.to_rows(shared, self.heads)), -1)     # (rows, K, H / K, …)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(self.cache_dtype)
        shared = torch.bmm(wave.to_grid(weights[..., length:]),
                           wave.prompt_values[i, :N].flatten(0, 1))
        out = torch.baddbmm(wave.to_rows(shared, self.heads).flatten(0, 1),
                            weights[..., :length].flatten(0, 1), values)    # (rows * K, H / K, d)
        return out.view(R, -1).to(self.dtype)

    def _step(self, wave, request, length):
        """Feed token `column` of every row, sample the next. Shapes depend on (rows, prompts,
        share, length) alone and running it twice is running it once, for the sake of graphs."""
        ids = wave.ids[:wave.rows].index_select(1, wave.column).squeeze(1)
        at = wave.lengths[:wave.rows] + wave.column
        cos, sin = wave.cos[at], wave.sin[at]                               # (rows, 1, d)
        bias = None
        if self.static:         # slots past `column` hold other tokens
            past = torch.arange(length, device=self.device) > wave.column
            bias = torch.zeros_like(past, dtype=self.cache_dtype).masked_fill_(past, -math.inf)
        x = F.embedding(ids, self.weights["embed"])                         # (rows, D)
        for layer in self.layers:
            q, k, v = self._qkv(layer, x, cos, sin)
            x = self._finish_layer(layer, x, self._attend(wave, layer, q, k, v, length, bias))
        self._emit(wave, request, x)

    def _emit(self, wave, request, x):
        """Sample token `column` + 1 of every row from its last hidden state, x (rows, D)."""
        x = F.rms_norm(x, x.shape[-1:], self.weights["norm"], self.config.rms_norm_eps)
        logits = F.linear(x, self.head).float()                             # (rows, V')
        logits[:, self.model.real_vocab_size:] = -math.inf
        if request.temperature not in (0, 1):
            logits /= request.temperature
        probabilities = torch.softmax(logits, -1)
        column = wave.column + 1
        if request.temperature == 0:
            ids = logits.argmax(-1, keepdim=True)
        else:
            ids = pick(keep_top(probabilities, request.top_p),
                       wave.uniforms[:wave.rows].index_select(1, column))   # (rows, 1)
        wave.ids[:wave.rows].index_copy_(1, column, ids)
        wave.probabilities[:wave.rows].index_copy_(1, column, probabilities.gather(1, ids))

    def _advance(self, wave, request, column):
        """One decode step: eagerly, or by replaying a CUDA graph."""
        wave.column.fill_(column)
        if not self.static:
            return self._step(wave, request, column + 1)
        length = min(request.max_new_tokens, max(128, 1 << column.bit_length()))
        key = (wave.rows, wave.prompts, length, request.temperature, request.top_p)
        if key in self.graphs:
            return self.graphs[key].replay()
        self._step(wave, request, length)               # the step, and the warm-up for capture
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(wave, request, length)
            self.graphs[key], self.pool = graph, graph.pool()

    def _shrink(self, wave, request, finished, used):
        """Let finished rows make room, if enough are -> `finished` of the rows that stay."""
        live = [i for i, over in enumerate(finished) if not over]
        size = self._slots(wave.rows, len(live))
        if size == wave.rows:
            return finished
        over = [i for i, over in enumerate(finished) if over]
        self._collect(wave, request, over[size - len(live):], used)
        rows = sorted(live + over[:size - len(live)])
        prompts = sorted({wave.prompt[i] for i in rows})
        spare = [i for i in range(wave.prompts) if i not in set(prompts)]
        spare = spare[:self._slots(wave.prompts, len(prompts)) - len(prompts)]
        wave.keep(rows, sorted(prompts + spare), used, exact=not self.static)
        return [finished[i] for i in rows]

    def _slots(self, slots, needed):
        """How many of `slots` to go on with when `needed` are wanted."""
        if self.static:                                 # halves: few graphs
            while slots > 1 and (slots + 1) // 2 >= needed:
                slots = (slots + 1) // 2
            return slots
        return max(needed, min(slots, FEWEST_ROWS)) if needed <= slots * 7 // 8 else slots

    def _collect(self, wave, request, rows, used):
        """Hand the completions of these slots to the request."""
        taken = torch.tensor(rows, device=self.device)
        logprobs = wave.probabilities[taken, :used].log().tolist()
        for row, ids, values in zip(rows, wave.ids[taken, :used].tolist(), logprobs):
            ids = up_to_eos(ids, request.eos_ids)
            if not all(map(math.isfinite, values[:len(ids)])):
                raise ValueError(f"the logits of row {wave.number[row]} are not finite: the "
                                 "weights hold NaN or infinity, or overflow this dtype")
            request.results[wave.number[row]] = Completion(
                ids, values[:len(ids)], ids[-1] in request.eos_ids)


def fused_parameters(model):
    """{"embed" or (layer, name): the parameters that are stacked by rows into one weight}."""
    c, inner = model.config, model.model
    fused = {"embed": [inner["embed_tokens"].weight], "norm": [inner["norm"].weight]}
    if not c.tie_word_embeddings:
        fused["head"] = [model.lm_head.weight]
    for i, block in enumerate(inner["layers"]):
        attention, mlp = block.self_attn, block.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        fused[i, "norm"] = [block.input_layernorm.weight]
        fused[i, "qkv"] = [projection.weight for projection in qkv]
        if c.attention_bias:
            fused[i, "qkv_bias"] = [projection.bias for projection in qkv]
        if c.qk_norm:       # one row a head
            fused[i, "qk_norm"] = ([attention.q_norm.weight.unsqueeze(0)] * c.num_attention_heads
                                   + [attention.k_norm.weight.unsqueeze(0)] * c.num_key_value_heads)
        fused[i, "out"] = [attention.o_proj.weight]
        fused[i, "mlp_norm"] = [block.post_attention_layernorm.weight]
        fused[i, "gate_up"] = [mlp.gate_proj.weight, mlp.up_proj.weight]
        fused[i, "down"] = [mlp.down_proj.weight]
    return fused


def mix(x):
    """splitmix64's finaliser: uint64 array -> uint64 array in which every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_uniforms(seed, rows, length):
    """(R, length) fp64 in (0, 1): entry (i, t) is a function of seed, rows[i] and t alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = mix(np.array([[seed % 2**64]], np.uint64) + golden)
    key = mix(key ^ mix(np.array(rows, np.uint64)[:, None] * golden))           # (R, 1)
    bits = mix(key + np.arange(1, length + 1, dtype=np.uint64) * golden)        # (R, length)
    return ((bits >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32


def pick(weights, uniforms):
    """Inverse of the cumulative distribution: weights (B, V) fp32 >= 0, V a multiple of BLOCK, not
    normalised; uniforms (B, 1) fp64 in (0, 1) -> (B, 1) ids, never one of weight 0.

    Two levels, blocks and then the entries of one block, so that little is summed in fp64.
    """
    blocks = weights.unflatten(1, (-1, BLOCK))                                  # (B, V / 64, 64)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)                       # (B, V / 64)
    targets = uniforms * ends[:, -1:]       # below the last end: a uniform is at most 1 - 2^-33
    block = torch.searchsorted(ends, targets, right=True).clamp_(max=ends.shape[1] - 1)  # NaN: end
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
    before = values.cumsum(-1) - values                                         # held by likelier
    return torch.zeros_like(values).scatter_(1, order, values * (before < top_p))


def up_to_eos(ids, eos_ids):
    """ids up to the first EOS, that one included; all of them where there is none."""
    return next((ids[:i + 1] for i, token in enumerate(ids) if token in eos_ids), ids)


def free_memory(device):
    """Bytes that may be allocated there, a tenth left alone: of the GPU, or of this machine and
    its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.9 * (torch.cuda.mem_get_info(device)[0] + unused)
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
        group = {}
        for name in ("max", "current", "stat"):
            with open(f"/sys/fs/cgroup/memory.{name}") as file:
                group[name] = file.read().split()
        cached = int(group["stat"][group["stat"].index("inactive_file") + 1])
        free = min(free, int(group["max"][0]) - int(group["current"][0]) + cached)
    except (OSError, ValueError, StopIteration):    # no such files, or no limit: "max"
        free = locals().get("free", math.inf)
    return 0.9 * free


def check_request(model, request):
    """One-line ValueErrors for what cannot be sampled."""
    r, c = request, model.config
    if r.group_size < 1 or r.max_new_tokens < 1:
        raise ValueError(f"group_size {r.group_size} and max_new_tokens {r.max_new_tokens} must "
                         "be at least 1")
    if r.temperature != 0 and not 1e-4 <= r.temperature < math.inf:
        raise ValueError(f"temperature {r.temperature} must be 0 (greedy) or at least 0.0001")
    if not 0 < r.top_p <= 1:
        raise ValueError(f"top_p {r.top_p} must be above 0 and at most 1")
    if len(r.row_ids) != len(r.prompts) * r.group_size:
        raise ValueError(f"{len(r.row_ids)} row_ids for {len(r.prompts)} prompts x {r.group_size}")
    for i, prompt in enumerate(r.prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: give at least one id, such as BOS")
        if min(prompt) < 0 or max(prompt) >= c.vocab_size:
            raise ValueError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}; the "
                             f"vocabulary is 0 to {c.vocab_size - 1}")
        if len(prompt) + r.max_new_tokens > c.max_position_embeddings:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens and max_new_tokens is "
                             f"{r.max_new_tokens}: more than the model's "
                             f"{c.max_position_embeddings} positions")


def main():
    parser = argparse.ArgumentParser(description="Print a model's completion of a prompt.")
    parser.error = lambda message: fail(message)
    parser.add_argument("prompt", help="the user's message; the chat template is applied")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1: all tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ids, shown = [], ""

    def show(row, new):
        nonlocal shown
        ids.extend(new)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):     # else a character is still incomplete
            print(text[len(shown):], end="", flush=True)
            shown = text

    try:
        model = GPT.from_pretrained(args.model, "cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer.from_pretrained(args.model)
        prompt = tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
        generate(model, [prompt], max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                 top_p=args.top_p, eos_ids=tokenizer.eos_ids, seed=args.seed, progress=show)
    except (ValueError, OSError) as error:
        fail(error)
    print(tokenizer.decode(ids)[len(shown):])


def fail(message):
    print(f"sample.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
