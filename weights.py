"""Checkpoint folders in Hugging Face layout: find them, read their tensors, write them whole.

A folder is written beside its target and renamed at the end, so a reader finds an old or a new one, never half of one.

Not covered: pytorch_model.bin, quantised tensors.
"""
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

DTYPES = ("F64", "F32", "F16", "BF16")
# what a checkpoint folder may hold besides config.json and weights; saved as it was loaded
SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def resolve_folder(path_or_hub_id):
    """The local folder of a checkpoint: a path as it is, a hub id through huggingface_hub's cache.

    Whatever exists or looks like a path is never sent to the hub. FileNotFoundError, one line.
    """
    text = str(path_or_hub_id)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or isinstance(path_or_hub_id, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        raise FileNotFoundError(f"no folder {text!r}: name a checkpoint's folder or a hub id")
    patterns = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{text} is neither a folder here nor a model that could be fetched or found in the "
                                f"hub cache ({reason})") from None


def read_json(path, default=None):
    """The object in a JSON file; `default` where the file is missing, if one is given."""
    if not path.exists():
        if default is None:
            raise FileNotFoundError(f"no {path.name} in {path.parent}: a checkpoint in Hugging Face layout has one")
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def tensor_files(folder):
    """The safetensors files of a checkpoint: the single one, else the shards its index names."""
    names = {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        names = set(read_json(index).get("weight_map", {}).values())
    for name in sorted(names):
        if not (folder / name).exists():
            raise FileNotFoundError(f"no {name} in {folder}: complete the download (pytorch_model.bin is not read)")
    return [folder / name for name in sorted(names)]


def load_tensors(folder, shapes, device, dtype):
    """{name: shape} -> {name: tensor}, converted while reading: memory holds one model and one tensor more.

    ValueError names tensors that are missing, unexpected, of another shape or an unknown dtype. Old checkpoints' rotary
    tables are skipped; the output layer of a tied model is skipped if it is the embedding.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    wanted = {**shapes, head: shapes[embedding]}
    files, problems = {}, []                # {tensor's name: the file it is in}
    for path in tensor_files(folder):
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error})") from None
        for name, stored in slices.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            files[name] = path
            if name not in wanted:
                problems.append(f"{name} is unexpected")
            elif stored.get_shape() != list(wanted[name]):
                problems.append(f"{name} is of shape {stored.get_shape()} instead of {list(wanted[name])}")
            elif stored.get_dtype() not in DTYPES:
                problems.append(f"{name} has dtype {stored.get_dtype()}; supported are {', '.join(DTYPES)}")
    problems += [f"{name} is missing" for name in shapes if name not in files]
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its config.json, {len(problems)} problems: "
                         f"{'; '.join(problems[:4])}")
    tensors = {}
    for name, path in files.items():
        # opened anew each time: what was read of a mapped file counts as this process's memory. Copied, since a file
        # that is overwritten in place would change the model.
        with safe_open(path, "pt") as file:
            tensors[name] = file.get_tensor(name).to(device, dtype, copy=True)
    if head not in shapes and head in tensors and not torch.equal(tensors.pop(head), tensors[embedding]):
        raise ValueError(f"{folder}: {head} differs from {embedding} although tie_word_embeddings is true")
    return tensors


def save_folder(path, config, tensors, side_files, shard_bytes):
    """Write a checkpoint so that `path` is the old one or the new one, whole.

    config: config.json's object. tensors: {name: tensor}, written in shards of at most shard_bytes. side_files: {name:
    bytes}. A folder that holds anything but a checkpoint is refused with a ValueError.
    """
    path = Path(path).expanduser().resolve()
    known = {"config.json", "model.safetensors.index.json", *SIDE_FILES}
    for entry in path.iterdir() if path.exists() else ():
        if entry.name not in known and entry.suffix != ".safetensors":
            raise ValueError(f"{path} holds {entry.name}, no part of a checkpoint: save in a folder of its own")
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)      # left by a killed run
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in side_files.items():
        (scratch / name).write_bytes(content)
    huggingface_hub.save_torch_state_dict(tensors, scratch, max_shard_size=shard_bytes)
    replace_folder(scratch, path)


def replace_folder(scratch, folder):
    """Flush `scratch` and the files in it to disk, then rename it to `folder`. An older folder steps aside first, since
    a full one can't be renamed over: killed in between, it is left as .NAME.old beside the complete `scratch`."""
    for entry in [*scratch.iterdir(), scratch]:
        flush(entry)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path):
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
