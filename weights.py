"""Checkpoint folders in Hugging Face layout: find them, read their tensors, write them whole.

Tensors are read and converted piece by piece into memory of their own. (The safetensors library
maps the file instead; its pages then count as this process's memory beside the converted copy, and
a file overwritten in place would change a loaded model.) Writing goes to a folder beside the
target that is renamed at the end, so a reader finds an old checkpoint or a new one, never half of
one.

Not covered: pytorch_model.bin, quantised tensors.
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCRATCH_BYTES = 1 << 25     # tensors are read and converted in pieces of this size
# what a checkpoint folder may hold besides config.json and weights; saved as it was loaded
SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template.jinja", "chat_template.json")


def resolve_folder(path_or_hub_id, weights=False):
    """The local folder of a checkpoint: a path as it is, a hub id through huggingface_hub's cache.

    Whatever exists or looks like a path is never sent to the hub. weights=False leaves the
    safetensors files out of a download. FileNotFoundError or NotADirectoryError, one line.
    """
    text = str(path_or_hub_id)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{text} is a file: name the folder that holds config.json")
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        raise FileNotFoundError(f"no folder {text!r}: name a checkpoint's folder or a hub id")
    import huggingface_hub      # half a second to import, and only hub ids need it
    patterns = ["*.json", "*.jinja", "*.txt"] + ["*.safetensors"] * weights
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=patterns,
                                                      ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{text} is neither a folder here nor a model that could be fetched"
                                f" or found in the hub cache ({reason})") from None


def read_json(path, default=None):
    """The object in a JSON file; `default` where the file is missing, if one is given."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is None:
            raise FileNotFoundError(f"no {path.name} in {path.parent}: a checkpoint in Hugging Face"
                                    " layout has one") from None
        return default
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def tensor_files(folder):
    """The safetensors files of a checkpoint: the single one, else the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        binary = "pytorch_model.bin is not read: convert it" if any(folder.glob("*.bin")) else (
            "the weights are missing")
        raise FileNotFoundError(f"no model.safetensors in {folder}: {binary}")
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for shard in shards:
        if not (folder / shard).exists():
            raise FileNotFoundError(f"no {shard} in {folder}, which {index.name} names: the "
                                    "download is incomplete")
    return [folder / shard for shard in shards]


def read_tensors(path, shapes, device, dtype):
    """Yield (name, tensor) for each name in a safetensors file.

    shapes: {name: shape}. A tensor that it lacks, or of another shape, is yielded as the string
    that says so, unread. Layout: 8 bytes of header length, a JSON header with each tensor's
    dtype, shape and byte range, then the bytes.
    """
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
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
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise ValueError(f"{path} is truncated: {size} bytes of {end}")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name not in shapes:
                yield name, "unexpected"
                continue
            if list(shapes[name]) != entry["shape"]:
                yield name, f"of shape {entry['shape']} instead of {list(shapes[name])}"
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; supported are "
                                 f"{', '.join(DTYPES)}")
            tensor = torch.empty(entry["shape"], device=device, dtype=dtype)
            part = scratch.view(DTYPES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            if end - begin != tensor.numel() * part.itemsize:
                raise ValueError(f"{path} is corrupt: {name} takes {end - begin} bytes, not "
                                 f"{tensor.numel() * part.itemsize}")
            file.seek(start + begin)
            for piece in tensor.view(-1).split(len(part)):
                file.readinto(part[:len(piece)].view(torch.uint8).numpy())
                piece.copy_(part[:len(piece)])
            yield name, tensor


def load_tensors(folder, shapes, device, dtype):
    """{name: shape} -> {name: tensor}, converted while reading: memory holds one model.

    ValueError names tensors that are missing, unexpected or of another shape. Old checkpoints'
    rotary tables are skipped; the output layer of a tied model is skipped if it is the embedding.
    """
    tensors, problems = {}, []
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = head not in shapes
    wanted = {**shapes, head: shapes[embedding]}
    for path in tensor_files(folder):
        for name, tensor in read_tensors(path, wanted, device, dtype):
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if isinstance(tensor, str):
                problems.append(f"{name} is {tensor}")
            else:
                tensors[name] = tensor
    if tied and head in tensors and not torch.equal(tensors.pop(head), tensors[embedding]):
        problems.append(f"{head} differs from {embedding} although tie_word_embeddings is true")
    named = {problem.split(" ")[0] for problem in problems}
    problems += [f"{name} is missing" for name in shapes if name not in tensors and
                 name not in named]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the weights in {folder} do not fit its config.json: "
                         f"{'; '.join(problems[:4])}{more}")
    return tensors


def save_folder(path, config, tensors, side_files, shard_bytes):
    """Write a checkpoint so that `path` is the old one or the new one, whole.

    config: config.json's object. tensors: {name: tensor}. side_files: {name: bytes}. A folder
    that holds anything but a checkpoint is refused. Killed between the last two renames, the old
    folder is left as .NAME.old and the new one as .NAME.partial, both complete.
    """
    path = Path(path).expanduser().resolve()
    known = {"config.json", "model.safetensors.index.json", *SIDE_FILES}
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder to save the model in")
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in known
                    and entry.suffix != ".safetensors") if path.exists() else []
    if others:
        raise ValueError(f"{path} holds {others[0]}, which is no part of a checkpoint: save the "
                         "model in a folder of its own")
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)      # left by a killed run
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in side_files.items():
        (partial / name).write_bytes(content)
    save_shards(partial, tensors, shard_bytes)
    for entry in [*partial.iterdir(), partial]:
        sync(entry)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path):
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save_shards(folder, tensors, shard_bytes):
    """One model.safetensors, or numbered shards of at most shard_bytes with their index."""
    shards, room = [], 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        # contiguous CPU copies, where needed, of one shard at a time
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()},
                  folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
