"""The policy: a decoder-only transformer that loads and saves Hugging Face checkpoints.

Three architectures, which cover the four models that the paper (arXiv 2508.05242) trains: qwen2
(Qwen2.5-Coder; biases on q, k, v), qwen3 (RMS norm on q and k) and llama (Llama 3.1 with its
scaled rope, Seed-Coder, Yi-Coder). Parameters carry Hugging Face's names, so a checkpoint is a
dictionary; a config field that would change the computation and is not implemented is an error
that names it. `Tokenizer` lives in tokenizer.py and is re-exported here; weights.py reads and
writes the folders.

Not covered: sliding windows, mixtures of experts, quantised weights, yarn and dynamic rope,
pytorch_model.bin. Dropout is none, as in the official recipe.
"""
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from tokenizer import Tokenizer, highest_id     # noqa: F401 (Tokenizer is re-exported)
from weights import SIDE_FILES, load_tensors, read_json, resolve_folder, save_folder

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
                 "llama": "LlamaForCausalLM"}
ROPE_FIELDS = {"default": (), "linear": ("factor",),
               "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
# fields that change the computation, with the only value that is implemented
FIXED_FIELDS = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0,
                "partial_rotary_factor": 1, "quantization_config": None}

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
    attention_bias: bool | None = None      # on q, k, v; None: what the architecture has
    qk_norm: bool | None = None             # None: what the architecture has
    eos_token_id: int | list | None = None
    extra: dict = field(default_factory=dict)   # other fields of config.json, saved unchanged

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {self.model_type!r} is not supported; supported are "
                             f"{', '.join(ARCHITECTURES)}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of "
                                 f"num_attention_heads {self.num_attention_heads}; give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rope turns pairs of dimensions")
        if self.attention_bias is None:
            self.attention_bias = self.model_type == "qwen2"
        if self.qk_norm is None:
            self.qk_norm = self.model_type == "qwen3"

    @classmethod
    def from_dict(cls, raw):
        """A config.json's object, old or new spelling -> Config. ValueError names what is missing
        or not supported."""
        raw = dict(raw)
        architecture = (raw.pop("architectures", None) or [None])[0]
        if raw.get("model_type") not in ARCHITECTURES:
            raise ValueError(f"architecture {architecture or raw.get('model_type')} is not "
                             f"supported; supported model types are {', '.join(ARCHITECTURES)}")
        for name, value in FIXED_FIELDS.items():
            if raw.get(name) not in (None, value):
                raise ValueError(f"{name} {str(raw[name])[:60]} is not supported")
        layer_types = set(raw.get("layer_types") or ()) - {"full_attention"}
        windowed = (raw.get("use_sliding_window") and raw.get("sliding_window")
                    and raw.get("max_window_layers", 0) < raw.get("num_hidden_layers", 0))
        if layer_types or windowed and not raw.get("layer_types"):
            raise ValueError("sliding-window attention is in use and not supported (layer_types "
                             f"{sorted(layer_types)}, sliding_window {raw.get('sliding_window')})")
        if raw["model_type"] == "qwen2":
            raw.pop("attention_bias", None)     # transformers ignores it: qwen2 always has biases
        elif raw.get("attention_bias"):
            raise ValueError(f"attention_bias is not supported for {raw['model_type']}")
        raw.setdefault("head_dim", 128 if raw["model_type"] == "qwen3" else None)
        raw["rope_theta"], raw["rope_scaling"] = read_rope(raw)
        for name in ("torch_dtype", "dtype", "rope_parameters", "_name_or_path"):
            raw.pop(name, None)
        own = {name: raw.pop(name) for name in cls.__dataclass_fields__ if name in raw}
        missing = [name for name in REQUIRED_FIELDS if own.get(name) is None]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        return cls(**own, extra=raw)

    def to_dict(self):
        """The object of a config.json, in the spelling that old and new readers understand."""
        raw = asdict(self)
        extra = raw.pop("extra")
        raw.pop("qk_norm")
        return {"architectures": [ARCHITECTURES[self.model_type]], **extra, **raw,
                "hidden_act": "silu"}


REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                   "num_attention_heads")


def read_rope(raw):
    """(rope_theta, rope_scaling or None) of a config.json's object: new files keep both in
    rope_parameters, old ones have rope_theta beside rope_scaling, whose type was once `type`."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or rope_type or "default"
    if rope_type not in ROPE_FIELDS:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported are "
                         f"{', '.join(ROPE_FIELDS)}")
    if (rope.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    missing = [name for name in ROPE_FIELDS[rope_type] if name not in rope]
    if missing:
        raise ValueError(f"rope type {rope_type!r} lacks {', '.join(missing)}")
    return theta, None if rope_type == "default" else {"rope_type": rope_type, **rope}


def rope_frequencies(config):
    """(head_dim / 2,) fp32 on the CPU: radians a position turns each pair of dimensions by.

    llama3 scaling (Llama 3.1): wavelengths longer than original length / low_freq_factor are
    stretched by `factor`, those shorter than original length / high_freq_factor are kept, and
    between them the two are mixed linearly.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents              # (d/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    length = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    wavelengths = 2 * torch.pi / frequencies
    keep = ((length / wavelengths - low) / (high - low)).clamp(0, 1)   # share left as it is
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


def rope_angles(config, positions):
    """Positions of any shape (...) -> cos and sin (..., head_dim / 2), fp32, on their device."""
    angles = positions.float().unsqueeze(-1) * rope_frequencies(config).to(positions.device)
    return angles.cos(), angles.sin()


def rope_tables(config, length, device="cpu"):
    """cos and sin of positions 0 … length - 1: two (length, head_dim / 2) fp32 tensors."""
    return rope_angles(config, torch.arange(length, device=device))


def apply_rope(x, cos, sin):
    """Turn x (..., T, d) by cos and sin that broadcast to (..., T, d/2); result in x's dtype.

    Dimension i is paired with i + d/2, and cos and sin are rounded to x's dtype, both as in
    transformers.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(x, weight, eps):
    """x (..., D) over its root mean square, times weight (D,): fp32 inside, as transformers."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def causal_attention(layer, q, k, v):
    """q (B, H, T, d), k and v (B, Hkv, T, d) -> (B, H, T, d); every token sees those up to it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = (heads * config.head_dim for heads in
                           (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x, cos, sin, attention):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)   # (B, heads, T, d)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            # under autocast fp32 norm weights widen q and k; attention wants one dtype
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
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
    """The transformer. `GPT(config, seed)` is fp32 on the CPU with weights N(0, 0.02), biases 0
    and norms 1; `seed=None` leaves it on the meta device, to be filled by `from_pretrained`.

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
        tied = self.config.tie_word_embeddings
        return self.model["embed_tokens"].weight if tied else self.lm_head.weight

    def hidden_states(self, ids, positions=None, attention=None, checkpoint=False):
        """ids (B, T) int64 -> (B, T, D) after the final norm, with gradient.

        positions (B, T) int64, by default 0 … T - 1 in every row. attention(layer, q, k, v) may
        replace causal attention; its shapes are those of `causal_attention`, q and k come
        normed and turned. checkpoint=True keeps only each block's input for the backward pass.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        cos, sin = (table.unsqueeze(1) for table in rope_angles(self.config, positions))
        attention = attention or causal_attention
        x = self.model["embed_tokens"](ids)                         # (B, T, D)
        for block in self.model["layers"]:                          # cos, sin: (B or 1, 1, T, d/2)
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
        """Load a checkpoint folder or hub id; weights are read one tensor at a time.

        ValueError or FileNotFoundError, one line, names what is missing or not supported.
        """
        folder = resolve_folder(path_or_hub_id)
        raw = read_json(folder / "config.json")
        try:
            config = Config.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        model = cls(config, seed=None)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(load_tensors(folder, shapes, device, dtype), assign=True)
        model.side_files = {name: (folder / name).read_bytes() for name in SIDE_FILES
                            if (folder / name).exists()}
        if "tokenizer.json" in model.side_files:
            ids = highest_id(read_json(folder / "tokenizer.json")) + 1
            model.real_vocab_size = min(ids, config.vocab_size) or config.vocab_size
        return model

    def save_pretrained(self, path, state_dict=None, shard_bytes=5_000_000_000):
        """Write config.json, safetensors (shards of at most shard_bytes) and the side files.

        The folder appears whole or not at all: it is written beside `path` and renamed. An older
        checkpoint at `path` is replaced; a folder that holds anything else is refused with a
        ValueError. state_dict: gathered tensors to save instead of the model's own.
        """
        tensors = self.state_dict() if state_dict is None else state_dict
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config = {**self.config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
        save_folder(path, config, tensors, self.side_files, shard_bytes)
