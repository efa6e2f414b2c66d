"""What sampling computes: fused weights, the key-value cache, prefill and the decode step.

The weights are a copy in the compute dtype with q, k, v and gate, up stacked, so the trained model
keeps Hugging Face's names. Attention sees two caches. A prompt's is filled once and shared by the
rows of its group, whose queries meet it in one product; a row's own holds its new tokens, token t
in slot t for all rows alike, so ragged prompts leave no gaps. One softmax runs over both.
"""
import math

import torch
import torch.nn.functional as F

from model import rope_tables

BLOCK = 64      # logits come in whole blocks of this many, those past the vocabulary -inf


class Wave:
    """The buffers of R rows of N prompts; the first `rows` and `prompts` of them are in use, rows
    sorted by prompt. L layers; K key-value heads of d; P prompt tokens, T new tokens."""

    def __init__(self, config, R, N, share, P, T, device, dtype):
        L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim

        def new(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)   # what is masked must be finite

        self.prompt_keys = new(L, N, K, d, P, dtype=dtype)      # transposed: faster on the CPU
        self.prompt_values = new(L, N, K, P, d, dtype=dtype)
        self.prompt_bias = new(N, 1, 1, P, dtype=dtype)         # 0, and -inf past the prompt's end
        self.keys = new(L, R, K, T, d, dtype=dtype)
        self.values = new(L, R, K, T, d, dtype=dtype)
        self.ids = new(R, T)
        self.probabilities = new(R, T, dtype=torch.float32)     # of those ids
        self.uniforms = new(R, T, dtype=torch.float64)
        self.lengths = new(R)                                   # tokens of the row's prompt
        self.column = new(1)                                    # the new token that is fed next
        self.share = share                      # places beside a prompt: the most rows it ever has
        self.grid = new(N * share)                              # the row at each place
        self.place = new(R)                                     # where in `grid` a row is
        cos, sin = rope_tables(config, P + T, device)           # (P + T, d / 2) each
        root = d ** -0.25       # in queries and keys: their product gets attention's 1 / sqrt(d)
        self.cos = root * torch.cat((cos, cos), 1).unsqueeze(1)     # (P + T, 1, d)
        self.sin = root * torch.cat((-sin, sin), 1).unsqueeze(1)    # (P + T, 1, d)

    def nbytes(self):
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, torch.Tensor))

    def seat(self, numbers, prompt_of_row, prompts):
        """Take rows into use, slot by slot: the caller's number of each and its prompt's slot."""
        self.numbers, self.prompt_of_row = numbers, prompt_of_row
        self.rows, self.prompts = len(numbers), prompts
        taken, place, grid = [0] * prompts, [], [0] * (prompts * self.share)
        for row, prompt in enumerate(prompt_of_row):
            place.append(prompt * self.share + taken[prompt])
            grid[place[-1]] = row
            taken[prompt] += 1
        self.grid[:len(grid)] = torch.tensor(grid)
        self.place[:len(place)] = torch.tensor(place)

    def keep(self, rows, prompts, used):
        """Move these slots of rows and prompts (ascending) to the front and forget the others.
        used: new tokens written so far."""
        for slots, tensors in (
                (rows, (self.ids, self.probabilities, self.uniforms, self.lengths,
                        *self.keys[:, :, :, :used], *self.values[:, :, :, :used])),
                (prompts, (self.prompt_bias, *self.prompt_keys, *self.prompt_values))):
            index = torch.tensor(slots, device=self.ids.device)
            for tensor in tensors:
                tensor[:len(slots)] = tensor[index]
        moved = {old: new for new, old in enumerate(prompts)}
        self.seat([self.numbers[i] for i in rows],
                  [moved[self.prompt_of_row[i]] for i in rows], len(prompts))

    def to_grid(self, x):
        """x (rows, K, H / K, X) -> (prompts * K, share * H / K, X), for the shared cache."""
        if self.rows != self.prompts * self.share:              # else the grid is 0, 1, 2, …
            x = x[self.grid[:self.prompts * self.share]]
        x = x.unflatten(0, (self.prompts, self.share)).transpose(1, 2)  # (N, K, share, H / K, X)
        return x.flatten(2, 3).flatten(0, 1)

    def to_rows(self, x, K):
        """The inverse of `to_grid`."""
        x = x.view(self.prompts, K, self.share, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x if self.rows == len(x) else x[self.place[:self.rows]]


class Decoder:
    """A fused copy of `model` in `dtype`. On the CPU, attention and its cache are fp32 whatever the
    dtype: small bf16 products are slower there."""

    def __init__(self, model, dtype):
        self.model, self.config, self.dtype = model, model.config, dtype
        self.device = model.model["embed_tokens"].weight.device
        self.static = self.device.type == "cuda"        # shapes that a graph can be captured with
        self.cache_dtype = dtype if self.static else torch.float32
        self.prefill_tokens = 8192 if self.static else 1024     # in one pass, or one prompt
        self.weights = {}
        for name, parts in fused_parameters(model).items():
            rows = sum(len(part) for part in parts)
            if name in ("embed", "head"):               # the rows added stay 0
                rows = -(-rows // BLOCK) * BLOCK
            self.weights[name] = torch.zeros(rows, *parts[0].shape[1:], dtype=dtype,
                                             device=self.device)
        self.layers = [{"index": i, **{name[1]: weight for name, weight in self.weights.items()
                                       if name[0] == i}}
                       for i in range(self.config.num_hidden_layers)]
        head = self.weights.get("head", self.weights["embed"])
        self.head = head[:-(-model.real_vocab_size // BLOCK) * BLOCK]       # (V', D)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Copy the model's present weights, in place. With a sharded model all ranks must call it:
        its parameters are gathered one at a time."""
        for name, parts in fused_parameters(self.model).items():
            row = 0
            for part in parts:
                part = part.full_tensor() if hasattr(part, "full_tensor") else part
                self.weights[name][row:row + len(part)].copy_(part)
                row += len(part)

    def norm(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)

    def logits(self, x):
        """x (B, D) from the last layer -> (B, V') fp32, V' = whole blocks, padding -inf."""
        logits = linear(self.norm(x, self.weights["norm"]), self.head).float()
        logits[:, self.model.real_vocab_size:] = -math.inf
        return logits

    def prefill(self, wave, prompts):
        """Fill the prompts' caches -> (N, D) last hidden states, some prompts in each pass."""
        hidden, slots, tokens = [], [], 0
        wave.prompt_bias.fill_(-math.inf)
        for slot, prompt in enumerate(prompts):
            if slots and tokens + len(prompt) > self.prefill_tokens:
                hidden.append(self.prefill_pass(wave, prompts, slots))
                slots, tokens = [], 0
            slots.append(slot)
            tokens += len(prompt)
        return torch.cat((*hidden, self.prefill_pass(wave, prompts, slots)))

    def prefill_pass(self, wave, prompts, slots):
        """The prompts of these slots behind one another, without padding -> (n, D)."""
        lengths = [len(prompts[slot]) for slot in slots]
        ids = torch.tensor([token for slot in slots for token in prompts[slot]])
        at = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        cos, sin = wave.cos[at], wave.sin[at]
        x = F.embedding(ids.to(self.device), self.weights["embed"])         # (M, D)
        for layer in self.layers:
            outs, parts = [], (t.split(lengths) for t in self.qkv(layer, x, cos, sin))
            for slot, q, k, v in zip(slots, *parts):                        # (length, heads, d)
                wave.prompt_keys[layer["index"], slot, ..., :len(k)] = k.permute(1, 2, 0)
                wave.prompt_values[layer["index"], slot, :, :len(v)] = v.transpose(0, 1)
                q, k, v = (t.to(self.dtype).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0,
                                                     enable_gqa=True)       # (1, H, length, d)
                outs.append(out[0].transpose(0, 1).flatten(1))
            x = self.finish_layer(layer, x, torch.cat(outs))
        for slot, length in zip(slots, lengths):
            wave.prompt_bias[slot, ..., :length] = 0
        return x[torch.tensor(lengths, device=self.device).cumsum(0) - 1]

    def step(self, wave, length):
        """Feed token `column` of every row -> (rows, D). `length` >= column + 1 slots are looked
        at. Shapes follow from (rows, prompts, length), and twice is as good as once: a CUDA graph
        can hold this."""
        ids = wave.ids[:wave.rows].index_select(1, wave.column).squeeze(1)
        at = wave.lengths[:wave.rows] + wave.column
        cos, sin = wave.cos[at], wave.sin[at]                               # (rows, 1, d)
        bias = None
        if self.static:                     # slots past `column` hold other tokens
            past = torch.arange(length, device=self.device) > wave.column
            bias = torch.zeros(length, dtype=self.cache_dtype,
                               device=self.device).masked_fill_(past, -math.inf)
        x = F.embedding(ids, self.weights["embed"])                         # (rows, D)
        for layer in self.layers:
            q, k, v = self.qkv(layer, x, cos, sin)
            out = self.attend(wave, layer["index"], q, k, v, length, bias)
            x = self.finish_layer(layer, x, out)
        return x

    def qkv(self, layer, x, cos, sin):
        """x (…, D) -> fp32 q (…, H, d), k and v (…, K, d), q and k turned by their positions."""
        K = self.config.num_key_value_heads
        x = linear(self.norm(x, layer["norm"]), layer["qkv"], layer.get("qkv_bias"))
        x = x.float().unflatten(-1, (-1, self.config.head_dim))
        qk, v = x[..., :-K, :], x[..., -K:, :]
        if self.config.qk_norm:
            qk = self.norm(qk, None) * layer["qk_norm"]
        swapped = torch.cat(qk.chunk(2, -1)[::-1], -1)      # dimension i pairs with i + d / 2
        qk = torch.addcmul(qk * cos, swapped, sin)
        return qk[..., :-K, :], qk[..., -K:, :], v

    def attend(self, wave, i, q, k, v, length, bias):
        """Put k and v (rows, K, d) into slot `column` of layer i; q (rows, H, d) sees its prompt
        and the first `length` slots -> (rows, H * d)."""
        R, N, K = wave.rows, wave.prompts, self.config.num_key_value_heads
        keys, values = wave.keys[i, :R], wave.values[i, :R]                 # (rows, K, T, d)
        keys.index_copy_(2, wave.column, k.unsqueeze(2).to(self.cache_dtype))
        values.index_copy_(2, wave.column, v.unsqueeze(2).to(self.cache_dtype))
        keys, values = (t[:, :, :length].flatten(0, 1) for t in (keys, values))
        q = q.to(self.cache_dtype).unflatten(1, (K, -1))                    # (rows, K, H / K, d)
        shared = torch.bmm(wave.to_grid(q), wave.prompt_keys[i, :N].flatten(0, 1))
        shared.unflatten(0, (N, K)).add_(wave.prompt_bias[:N])
        own = torch.bmm(q.flatten(0, 1), keys.transpose(1, 2)).unflatten(0, (R, K))
        own = own if bias is None else own + bias
        scores = torch.cat((own, wave.to_rows(shared, K)), -1)      # (rows, K, H / K, length + P)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(self.cache_dtype)
        shared = torch.bmm(wave.to_grid(weights[..., length:]),
                           wave.prompt_values[i, :N].flatten(0, 1))
        out = torch.baddbmm(wave.to_rows(shared, K).flatten(0, 1),
                            weights[..., :length].flatten(0, 1), values)    # (rows * K, H / K, d)
        return out.view(R, -1).to(self.dtype)

    def finish_layer(self, layer, x, out):
        """What follows attention: x (…, D) and out (…, H * d) -> (…, D)."""
        x = x + linear(out, layer["out"])
        gate, up = linear(self.norm(x, layer["mlp_norm"]), layer["gate_up"]).chunk(2, -1)
        return x + linear(F.silu(gate).mul_(up), layer["down"])


def linear(x, weight, bias=None):
    """F.linear, which on the CPU takes a third longer than `mv` for a single bf16 row."""
    if x.dim() == 2 and len(x) == 1 and bias is None:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return F.linear(x, weight, bias)


def fused_parameters(model):
    """{name or (layer, name): the parameters that are stacked by rows into one weight}."""
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
        if c.qk_norm:       # (H + K, d): a row for each head
            fused[i, "qk_norm"] = [attention.q_norm.weight.unsqueeze(0)] * c.num_attention_heads
            fused[i, "qk_norm"] += [attention.k_norm.weight.unsqueeze(0)] * c.num_key_value_heads
        fused[i, "out"] = [attention.o_proj.weight]
        fused[i, "mlp_norm"] = [block.post_attention_layernorm.weight]
        fused[i, "gate_up"] = [mlp.gate_proj.weight, mlp.up_proj.weight]
        fused[i, "down"] = [mlp.down_proj.weight]
    return fused


def free_memory(device):
    """Bytes that may be allocated there, less a tenth; on the CPU, within the control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return 0.9 * (torch.cuda.mem_get_info(device)[0] + unused)
    free, group = math.inf, "/sys/fs/cgroup/memory."
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if "MemAvailable" in line)
        with open(group + "max") as limit, open(group + "current") as used:
            with open(group + "stat") as stat:
                cached = dict(line.split() for line in stat)["inactive_file"]
            free = min(free, int(limit.read()) - int(used.read()) + int(cached))
    except (OSError, ValueError):       # no such files here, or the limit is "max": none
        pass
    return 0.9 * free
