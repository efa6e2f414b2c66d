"""Checkpoint folders in Hugging Face layout: find them, read their tensors, write them whole.

Tensors are read and converted piece by piece into memory of their own. (The safetensors library maps the file instead;
its pages then count as this process's memory beside the converted copy, and a file overwritten in place would change a
loaded model.) A folder is written beside its target and renamed at the end: a reader finds an old or a new one, whole.

Not covered: pytorch_model.bin, quantised tensors.
"""
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCRATCH_BYTES = 1 << 25     # tensors are read and converted in pieces of this size
# what a checkpoint folder may hold besides config.json and weights; saved as it was loaded
SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def resolve_folder(path_or_hub_id):
    """The local folder of a checkpoint: a path as it is, a hub id through huggingface_hub's cache.

    Whatever exists or looks like a path is never sent to the hub. FileNotFoundError or NotADirectoryError, one line.
    """
    text = str(path_or_hub_id)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{text} is a file: name the folder that holds config.json")
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
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


def read_header(path):
    """{tensor's name: its entry} of a safetensors file.

    Layout: 8 bytes of header length, a JSON header with each tensor's dtype, shape and byte range, then the bytes.
    To each entry are added the file's path and `begin`, where in it the tensor's bytes start.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(start - 8))
        except ValueError:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    for entry in header.values():
        begin, end = entry["data_offsets"]
        if start + end > size:
            raise ValueError(f"{path} is truncated: {size} bytes of {start + end} or more")
        entry.update(path=path, begin=start + begin)
    return header


def read_tensor(entry, device, dtype):
    """The tensor of an entry that `read_header` gave, in a dtype and memory of its own."""
    tensor = torch.empty(entry["shape"], device=device, dtype=dtype)
    stored = DTYPES[entry["dtype"]]
    scratch = torch.empty(SCRATCH_BYTES // stored.itemsize, dtype=stored)
    with open(entry["path"], "rb") as file:
        file.seek(entry["begin"])
        for piece in tensor.view(-1).split(len(scratch)):
            part = scratch[:len(piece)]
            file.readinto(part.view(torch.uint8).numpy())
            piece.copy_(part)
    return tensor


def load_tensors(folder, shapes, device, dtype):
    """{name: shape} -> {name: tensor}, converted while reading: memory holds one model.

    ValueError names tensors that are missing, unexpected, of another shape or an unknown dtype. Old checkpoints' rotary
    tables are skipped; the output layer of a tied model is skipped if it is the embedding.
    """
    stored = {}
    for path in tensor_files(folder):
        stored |= {name: entry for name, entry in read_header(path).items()
                   if not name.endswith("rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    wanted = {**shapes, head: shapes[embedding]}
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    for name, entry in stored.items():
        if name not in wanted:
            problems.append(f"{name} is unexpected")
        elif entry["shape"] != list(wanted[name]):
            problems.append(f"{name} is of shape {entry['shape']} instead of {list(wanted[name])}")
        elif entry["dtype"] not in DTYPES:
            problems.append(f"{name} has dtype {entry['dtype']} instead of one of {', '.join(DTYPES)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:4])}{more}")
    tensors = {name: read_tensor(entry, device, dtype) for name, entry in stored.items()}
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
            raise ValueError(f"{path} holds {entry.name}, which is no part of a checkpoint: save the model in a folder "
                             "of its own")
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)      # left by a killed run
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in side_files.items():
        (scratch / name).write_bytes(content)
    huggingface_hub.save_torch_state_dict(tensors, scratch, max_shard_size=shard_bytes)
    replace_folder(scratch, path)


def replace_folder(scratch, folder):
    """Flush `scratch` and the files in it to disk, rename it to `folder` and remove an older folder of that name.

    The older one steps aside first, since a full folder can't be renamed over. Killed between the two renames, it is
    left as .NAME.old beside the complete `scratch`.
    """
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
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
