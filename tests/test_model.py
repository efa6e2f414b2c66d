"""The model against transformers. Run: python -m pytest tests/test_model.py

Real checkpoints: python -m pytest tests/test_model.py --checkpoint DIR [--checkpoint DIR2]
"""
import json
from pathlib import Path

import pytest
import torch
import transformers

import model as model_module
from model import GPT, Config, apply_rope, rope_tables

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}
CLASSES = {"qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
           "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
TINY = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peer(family, seed=0, **changes):
    """A random-weight model of transformers; the spread is wide so that wrong logits show."""
    config_class, model_class = CLASSES[family]
    settings = {**TINY, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        other = model_class(config_class(**settings)).eval()
        for parameter in other.parameters():
            parameter.data.normal_(0, 0.15).add_(1.0 if parameter.dim() == 1 else 0.0)
    return other


def tiny(family="qwen2", **changes):
    return GPT(Config(model_type=family, **{**TINY, **changes}), seed=1)


def token_ids(batch=2, length=150, vocab=97, seed=3):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def largest_difference(ours, theirs, ids):
    with torch.no_grad():
        return (ours(ids) - theirs(ids).logits).abs().max().item()


def edit_config(folder, **changes):
    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text())
    raw.update({key: value for key, value in changes.items() if value is not ...})
    for key in [key for key, value in changes.items() if value is ...]:
        raw.pop(key, None)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("heads", [(4, 4, None), (4, 1, None), (6, 2, 16)], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family, rope", [("qwen2", None), ("qwen3", None), ("llama", None),
                                          ("llama", LLAMA31),
                                          ("llama", {"rope_type": "linear", "factor": 2.0})],
                         ids=["qwen2", "qwen3", "llama", "llama3.1", "llama-linear"])
def test_logits_are_those_of_transformers(tmp_path, family, rope, tied, heads):
    changes = dict(num_attention_heads=heads[0], num_key_value_heads=heads[1],
                   tie_word_embeddings=tied)
    if heads[2] and family != "qwen2":
        changes["head_dim"] = heads[2]
    theirs = peer(family, rope_parameters={"rope_theta": 5000.0, "rope_type": "default",
                                           **(rope or {})}, **changes)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    difference = largest_difference(ours, theirs, token_ids())
    assert difference <= 1e-4, f"a logit is off by {difference:.2e}: every ratio would be off"


def test_old_and_new_config_spellings_mean_the_same(tmp_path):
    theirs = peer("llama", rope_parameters={"rope_theta": 5000.0, **LLAMA31})
    theirs.save_pretrained(tmp_path)
    new = GPT.from_pretrained(tmp_path)
    scaling = {**LLAMA31, "type": LLAMA31["rope_type"]}
    del scaling["rope_type"]
    edit_config(tmp_path, rope_parameters=..., dtype=..., head_dim=..., rope_theta=5000.0,
                rope_scaling=scaling, torch_dtype="float32")
    old = GPT.from_pretrained(tmp_path)
    assert old.config.rope_scaling == new.config.rope_scaling == LLAMA31
    assert torch.equal(old(token_ids()), new(token_ids())), "two spellings of one model"


def test_attention_bias_in_a_qwen2_config_is_ignored_as_transformers_does(tmp_path):
    peer("qwen2").save_pretrained(tmp_path)
    edit_config(tmp_path, attention_bias=False)
    assert GPT.from_pretrained(tmp_path).config.attention_bias, "qwen2 always has q, k, v biases"


def test_later_tokens_do_not_change_earlier_logits():
    ours, ids = tiny(), token_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 97
    assert torch.equal(ours(ids)[:, :12], ours(changed)[:, :12]), "attention must be causal"
    assert not torch.equal(ours(ids)[:, 12:], ours(changed)[:, 12:])


def test_only_relative_positions_matter():
    ours, ids = tiny(), token_ids(2, 20)
    shifted = torch.arange(20).expand(2, 20) + torch.tensor([[5], [90]])
    moved = ours.hidden_states(ids, positions=shifted)
    assert torch.allclose(moved, ours.hidden_states(ids), atol=1e-4), "rope is relative"


def test_given_positions_reach_every_layer():
    ours, ids = tiny(), token_ids(1, 6)
    order = torch.tensor([[0, 1, 2, 9, 10, 11]])
    assert not torch.allclose(ours.hidden_states(ids, positions=order), ours.hidden_states(ids),
                              atol=1e-6), "a gap in the positions must change the result"


def test_a_custom_attention_gets_turned_heads_and_layer_numbers():
    ours, ids, seen = tiny("qwen3"), token_ids(2, 7), []

    def attention(layer, q, k, v):
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return model_module.causal_attention(layer, q, k, v)

    custom = ours.hidden_states(ids, attention=attention)
    assert torch.equal(custom, ours.hidden_states(ids))
    assert seen == [(i, (2, 4, 7, 12), (2, 2, 7, 12), (2, 2, 7, 12)) for i in range(3)]


def test_recomputing_blocks_gives_the_same_gradients():
    ours, ids = tiny("llama"), token_ids(2, 9)
    gradients = []
    for checkpoint in (False, True):
        ours.zero_grad()
        ours.hidden_states(ids, checkpoint=checkpoint).square().sum().backward()
        gradients.append([p.grad.clone() for n, p in ours.named_parameters() if "lm_head" not in n])
    assert all(map(torch.equal, *gradients)), "checkpointing trades time for memory, nothing else"


@pytest.mark.parametrize("family", CLASSES)
def test_autocast_computes_near_the_same(family):
    ours, ids = tiny(family), token_ids(2, 20)
    exact = ours.hidden_states(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ours.hidden_states(ids)
    assert (rounded.float() - exact).abs().max() < 0.1, "fp32 masters with bf16 compute must work"


def test_rope_tables_turn_as_the_model_does():
    config = tiny("llama").config
    cos, sin = rope_tables(config, 5)
    x = torch.randn(1, 5, config.head_dim, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, cos, sin)
    assert cos.shape == (5, config.head_dim // 2) and cos.dtype == torch.float32
    assert torch.equal(turned[:, 0], x[:, 0]), "position 0 is not turned"
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1)), "a rotation keeps lengths"


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = tiny(), tiny()
    assert torch.equal(torch.random.get_rng_state(), before), "GPT(...) must not touch global RNG"
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert abs(first.head_weight.std().item() - 0.02) < 2e-3


@pytest.mark.checkpoint
def test_real_logits_are_those_of_transformers(checkpoints):
    for folder in checkpoints:
        ours = GPT.from_pretrained(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = token_ids(2, 200, ours.real_vocab_size)
        difference = largest_difference(ours, theirs, ids)
        assert difference <= 1e-4, f"{folder}: a logit is off by {difference:.2e}"
