"""Checkpoint folders: loading, saving, and a line for each bad one.

Run: python -m pytest tests/test_weights.py [--checkpoint DIR ...]
"""
import json
import os
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import (CLASSES, LLAMA31, edit_config, largest_difference, one_thread,  # noqa: F401
                        peer, tiny, token_ids)

from model import GPT


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_what_we_save(tmp_path, family, tied):
    rope = LLAMA31 if family == "llama" else None
    ours = tiny(family, tie_word_embeddings=tied, rope_scaling=rope, rope_theta=7000.0)
    ours.save_pretrained(tmp_path / "saved")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert theirs.dtype == torch.float32, "the saved config must state the dtype it was saved in"
    assert largest_difference(ours, theirs, token_ids()) <= 1e-4


def test_a_saved_model_loads_bit_equal_and_saves_the_same_config(tmp_path):
    peer("llama", rope_parameters={"rope_theta": 5000.0, **LLAMA31}).save_pretrained(tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text('{"eos_token": "x"}')
    first = GPT.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    second = GPT.from_pretrained(tmp_path / "b")
    assert first.config == second.config
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_shards_are_written_with_an_index_and_read_back(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path / "sharded", shard_bytes=30_000)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(p.stat().st_size < 31_500 for p in shards), "a shard may not exceed its limit"
    again = GPT.from_pretrained(tmp_path / "sharded")
    assert all(map(torch.equal, ours.parameters(), again.parameters()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert largest_difference(ours, theirs, token_ids()) <= 1e-4


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_any_dtype_on_disk_loads_as_the_dtype_asked_for(tmp_path, stored, wanted):
    theirs = peer("qwen3").to(stored)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=wanted)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == wanted and parameter.requires_grad
        assert torch.equal(parameter, tensors[name].to(wanted)), name


def test_overwriting_the_file_does_not_change_a_loaded_model(tmp_path):
    ours = tiny()
    ours.save_pretrained(tmp_path / "m")
    loaded = GPT.from_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    with open(file, "r+b") as handle:
        handle.write(b"\0" * file.stat().st_size)
    assert all(map(torch.equal, ours.parameters(), loaded.parameters()))


def test_saving_over_the_folder_it_came_from_replaces_it(tmp_path):
    tiny().save_pretrained(tmp_path / "m", shard_bytes=30_000)
    ours = GPT.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        ours.model["norm"].weight.fill_(3.0)
    ours.save_pretrained(tmp_path / "m")
    names = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert names == ["config.json", "model.safetensors"], "old shards must go"
    assert GPT.from_pretrained(tmp_path / "m").model["norm"].weight.eq(3.0).all()
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "nothing may be left beside it"


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        tiny("llama").save_pretrained(tmp_path / "m")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="thesis.tex.*folder of its own"):
        tiny().save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_vocabulary_padding_is_read_from_the_tokenizer(tmp_path):
    tiny().save_pretrained(tmp_path / "m")
    assert GPT.from_pretrained(tmp_path / "m").real_vocab_size == 97
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(
        {"model": {"vocab": {"a": 0, "b": 40}}, "added_tokens": [{"id": 89, "content": "<e>"}]}))
    assert GPT.from_pretrained(tmp_path / "m").real_vocab_size == 90, "highest id + 1, holes count"


# ---- bad input: one line that names it ----------------------------------------------------------

def drop(name):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
    return change


def put(name, tensor):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: tensor}, folder / "model.safetensors")
    return change


def configure(**changes):
    return lambda folder: edit_config(folder, **changes)


def truncate(size):
    def change(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
    return change


def index_names_a_shard_that_is_not_there(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}))


def wrong_kind_of_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "json is not valid JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "architecture": (configure(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
                     "architecture GPT2LMHeadModel is not supported.*qwen2, qwen3, llama"),
    "quantised": (configure(quantization_config={"method": "awq"}), "quantization_config.*awq"),
    "window": (configure(use_sliding_window=True, sliding_window=32, max_window_layers=1,
                         layer_types=...), "use_sliding_window True is not supported"),
    "layer types": (configure(layer_types=["full_attention", "sliding_attention",
                                           "sliding_attention"]),
                    r"layer_types \['sliding_attention'\] is not supported"),
    "rope type": (configure(rope_parameters=..., rope_scaling={"type": "yarn", "factor": 4.0}),
                  "rope type 'yarn' is not supported"),
    "rope factors": (configure(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
                     "missing factor, low_freq_factor, high_freq_factor"),
    "activation": (configure(hidden_act="gelu"), "hidden_act gelu"),
    "missing field": (configure(hidden_size=...), "config.json: missing hidden_size"),
    "heads": (configure(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of"),
    "missing tensor": (drop("model.layers.1.mlp.up_proj.weight"),
                       "model.layers.1.mlp.up_proj.weight is missing"),
    "extra tensor": (put("model.layers.0.self_attn.o_proj.bias", torch.zeros(48)),
                     "model.layers.0.self_attn.o_proj.bias is unexpected"),
    "shape": (put("model.norm.weight", torch.zeros(47)),
              r"model.norm.weight is of shape \[47\] instead of \[48\]"),
    "dtype": (put("model.norm.weight", torch.zeros(48, dtype=torch.int8)), "dtype I8"),
    "untied copy": (lambda f: (put("lm_head.weight", torch.ones(97, 48))(f),
                               edit_config(f, tie_word_embeddings=True)),
                    "lm_head.weight differs from model.embed_tokens.weight"),
    "truncated data": (truncate(-100), "model.safetensors is truncated"),
    "truncated header": (truncate(50), "truncated or no safetensors"),
    "empty file": (truncate(0), "truncated or no safetensors"),
    "garbage header": (lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 8) + b"notjson!"), "no safetensors file.*invalid JSON in header"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in"),
    "pickle": (wrong_kind_of_weights, "pytorch_model.bin is not read"),
    "missing shard": (index_names_a_shard_that_is_not_there, "no model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_checkpoint_is_named_in_one_line(tmp_path, case):
    damage, expected = BAD_FOLDERS[case]
    peer("qwen2").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_unused_sliding_window_is_accepted(tmp_path):
    peer("qwen2").save_pretrained(tmp_path)
    edit_config(tmp_path, use_sliding_window=False, sliding_window=4096, layer_types=...)
    GPT.from_pretrained(tmp_path)


def test_a_stored_copy_of_a_tied_embedding_is_accepted(tmp_path):
    theirs = peer("qwen2", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    put("lm_head.weight", embedding)(tmp_path)
    put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6))(tmp_path)
    assert largest_difference(GPT.from_pretrained(tmp_path), theirs, token_ids()) <= 1e-4


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "~/nowhere", "../nowhere",
                                  "runs/a/model", "nowhere/", Path("org/model")], ids=str)
def test_what_looks_like_a_path_is_never_sent_to_the_hub(monkeypatch, path):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        GPT.from_pretrained(path)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(FileNotFoundError, match="no folder .*model.gguf"):
        GPT.from_pretrained(str(tmp_path / "model.gguf"))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """huggingface_hub offline, with an empty cache; returns the cache folder."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_without_a_cached_copy_is_one_clear_line_offline(offline_hub):
    with pytest.raises(FileNotFoundError, match="someone/model is neither a folder") as caught:
        GPT.from_pretrained("someone/model")
    assert "\n" not in str(caught.value)


def test_a_cached_hub_id_loads_offline(offline_hub):
    repository = offline_hub / "models--someone--model"
    ours = tiny()
    ours.save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    assert torch.equal(GPT.from_pretrained("someone/model").head_weight, ours.head_weight)


@pytest.mark.checkpoint
def test_real_checkpoints_survive_saving(checkpoints, tmp_path):
    for folder in checkpoints:
        ours = GPT.from_pretrained(folder, dtype=torch.bfloat16)
        ours.save_pretrained(tmp_path / "saved")
        again = GPT.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        assert all(map(torch.equal, ours.parameters(), again.parameters())), folder
        for name in os.listdir(folder):
            if "token" in name:
                saved = (tmp_path / "saved" / name).read_bytes()
                assert saved == (Path(folder) / name).read_bytes(), name
