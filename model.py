"""The policy: a decoder-only transformer that loads and saves Hugging Face checkpoints.

Three architectures cover the models that the paper (arXiv 2508.05242) trains: qwen2 (Qwen2.5-Coder; biases on q, k, v),
qwen3 (RMS norm on q and k) and llama (Llama 3.1 with its scaled rope, Seed-Coder, Yi-Coder). Parameters carry Hugging
Face's names, so a checkpoint is a dictionary; a config field that would change the computation and is not implemented
is an error that names it. weights.py reads and writes the folders; tokenizer.py's `Tokenizer` is re-exported here.

Not covered: sliding windows, mixtures of experts, quantised weights, yarn and dynamic rope, pytorch_model.bin, dropout.
"""
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from tokenizer import Tokenizer, highest_id     # noqa: F401 (Tokenizer is re-exported)
from weights import SIDE_FILES, load_tensors, read_json, resolve_folder, save_folder

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_REQUIRED = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
# fields that change the computation, with the only value that is implemented
FIXED = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "attention_dropout": 0, "layer_types": None,
         "use_sliding_window": False, "partial_rotary_factor": 1, "quantization_config": None}


@dataclass
class Config:
    """The shape of a model, under Hugging Face's names; `from_dict` reads a config.json."""
    model_type: str                         # a key of ARCHITECTURES
    vocab_size: int                         # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: one per query head
    head_dim: int | None = None             # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # {"rope_type": "llama3", "factor": ..., ...}
    max_position_embeddings: int = 32768    # tokens
    tie_word_embeddings: bool = False
    extra: dict = field(default_factory=dict)   # other fields of config.json, saved unchanged

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.attention_bias = self.model_type == "qwen2"    # on q, k and v
        self.qk_norm = self.model_type == "qwen3"

    @classmethod
    def from_dict(cls, raw, source="config.json"):
        """A config.json's object, old or new spelling -> Config. ValueError: what `source` lacks or isn't supported."""
        raw = {name: value for name, value in raw.items() if name not in ("dtype", "torch_dtype")}
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            name = (raw.get("architectures") or [model_type])[0]
            raise ValueError(f"{source}: architecture {name} is not supported, only {', '.join(ARCHITECTURES)}")
        if model_type == "qwen2":
            raw.pop("attention_bias", None)     # transformers ignores it: qwen2 always has biases
        # new files keep all of rope in rope_parameters; in old ones the type was once called `type`
        rope = {**(raw.pop("rope_scaling", None) or {}), **(raw.pop("rope_parameters", None) or {})}
        old_type = rope.pop("type", "default")
        rope_type = rope.setdefault("rope_type", old_type)
        raw["rope_theta"] = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
        other_layers = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
        given = {**raw, **rope, "layer_types": other_layers or None}
        problems = [f"{name} {str(given[name])[:60]} is not supported" for name, value in FIXED.items()
                    if given.get(name) not in (None, value)]
        if rope_type not in ROPE_REQUIRED:
            problems.append(f"rope type {rope_type!r} is not supported (supported are {', '.join(ROPE_REQUIRED)})")
        missing = [name for name in REQUIRED + ROPE_REQUIRED.get(rope_type, ()) if given.get(name) is None]
        if missing:
            problems.append(f"missing {', '.join(missing)}")
        elif raw["num_attention_heads"] % (raw.get("num_key_value_heads") or 1):
            problems.append(f"num_attention_heads {raw['num_attention_heads']} is not a multiple of "
                            f"num_key_value_heads {raw['num_key_value_heads']}")
        if problems:
            raise ValueError(f"{source}: {'; '.join(problems)}")
        if model_type == "qwen3":
            raw.setdefault("head_dim", 128)
        own = {name: raw.pop(name) for name in cls.__dataclass_fields__ if name in raw}
        return cls(**own, rope_scaling=None if rope_type == "default" else rope, extra=raw)


def rope_angles(config, positions):
    """Positions of any shape (...) -> cos and sin (..., head_dim / 2), fp32, of the angles that pairs are turned by.

    llama3 scaling (Llama 3.1): wavelengths longer than original length / low_freq_factor are stretched by `factor`,
    those shorter than original length / high_freq_factor are kept, between them the two are mixed linearly.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents              # (d/2,) radians a position, on the CPU
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        length = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        wavelengths = 2 * torch.pi / frequencies
        keep = ((length / wavelengths - low) / (high - low)).clamp(0, 1)    # share left as it is
        frequencies = (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
    angles = positions.float().unsqueeze(-1) * frequencies.to(positions.device)
    return angles.cos(), angles.sin()


def rope_tables(config, length, device="cpu"):
    """cos and sin of positions 0 … length - 1: two (length, head_dim / 2) fp32 tensors."""
    return rope_angles(config, torch.arange(length, device=device))


def apply_rope(x, cos, sin):
    """Turn x (..., T, d) by cos and sin that broadcast to (..., T, d/2); result in x's dtype.

    As in transformers, dimension i is paired with i + d/2, and cos and sin are rounded to x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(x, weight, eps):
    """x (..., D) over its root mean square, times weight (D,): at least fp32 inside, as transformers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))     # F.rms_norm: the same numbers, slower on the CPU
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def causal_attention(layer, q, k, v):
    """q (B, H, T, d), k and v (B, Hkv, T, d) -> (B, H, T, d); every token sees those up to it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attention):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, heads, T, d)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # under autocast fp32 norm weights widen q and k; attention wants one dtype
        q, k = (apply_rope(head.to(v.dtype), cos, sin) for head in (self.q_norm(q), self.k_norm(k)))
        return self.o_proj(attention(self.layer, q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, attention):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The transformer: fp32 on the CPU, weights N(0, 0.02), biases 0, norms 1; seed=None: on the meta device, unfilled.

    real_vocab_size: ids the tokenizer has; sampler and trainer normalise over these rows alone.
    side_files: {name: bytes} of tokenizer and generation config, written back by save_pretrained.
    """

    def __init__(self, config, seed=0):
        super().__init__()
        self.config, self.real_vocab_size, self.side_files = config, config.vocab_size, {}
        with torch.device("meta"):      # PyTorch's own initialisation would use global RNG state
            self.model = nn.ModuleDict({
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if seed is not None:
            self.to_empty(device="cpu")
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02, generator=generator)
                else:
                    nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    @property
    def head_weight(self):
        """(V, D) output projection: the embedding itself where the two are tied."""
        return self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden_states(self, ids, positions=None, attention=causal_attention, checkpoint=False):
        """ids (B, T) int64 -> (B, T, D) after the final norm, with gradient.

        positions (B, T) int64, by default 0 … T - 1 in every row. attention(layer, q, k, v) has the shapes of
        `causal_attention`; q and k come normed and turned. checkpoint=True keeps only each block's input for backward.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        cos, sin = (table.unsqueeze(1) for table in rope_angles(self.config, positions))    # (B or 1, 1, T, d/2)
        x = self.model["embed_tokens"](ids)                                                 # (B, T, D)
        for block in self.model["layers"]:
            if checkpoint:
                x = recompute(block, x, cos, sin, attention, use_reentrant=False)
            else:
                x = block(x, cos, sin, attention)
        return self.model["norm"](x)

    def forward(self, ids):
        """ids (B, T) int64 -> (B, T, V) logits. For small inputs: training never builds these."""
        return F.linear(self.hidden_states(ids), self.head_weight)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, device="cpu", dtype=torch.float32):
        """Load a folder or hub id. ValueError or OSError, one line, names what is missing or not supported."""
        folder = resolve_folder(path_or_hub_id)
        config = Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
        model = cls(config, seed=None)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(load_tensors(folder, shapes, device, dtype), assign=True)
        model.side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).exists()}
        if "tokenizer.json" in model.side_files:
            model.real_vocab_size = min(highest_id(read_json(folder / "tokenizer.json")) + 1, config.vocab_size)
        return model

    def save_pretrained(self, path, shard_bytes=5_000_000_000):
        """Write config.json, safetensors (shards of at most shard_bytes) and the side files, whole or not at all.

        An older checkpoint at `path` is replaced; a folder that holds anything else is refused with a ValueError.
        """
        own, dtype = asdict(self.config), str(self.head_weight.dtype).removeprefix("torch.")
        config = {**own.pop("extra"), **own, "architectures": [ARCHITECTURES[self.config.model_type]],
                  "hidden_act": "silu", "dtype": dtype, "torch_dtype": dtype}       # old readers know torch_dtype
        save_folder(path, config, self.state_dict(), self.side_files, shard_bytes)
