"""Checkpoints and the run folder's files: written whole or not at all, cut back exactly on resume.

A checkpoint is the fp32 weights in Hugging Face layout, the optimiser's moments and the step; everything else of a
run follows from its seed. Folders are written under a temporary name, flushed to disk and renamed.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from weights import flush, replace_folder


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Write `folder` atomically, replacing an older one of that name."""
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(scratch)
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{key}.{name}"] = value
    save_file(moments, scratch / "optimizer.safetensors")
    (scratch / "state.json").write_text(json.dumps({"step": step}) + "\n")
    replace_folder(scratch, folder)


def load_checkpoint(folder: Path, model, optimizer) -> None:
    """Fill the model and the optimiser, in place, from a folder that `save_checkpoint` wrote."""
    weights = type(model).from_pretrained(folder, device=next(model.parameters()).device)
    model.load_state_dict(weights.state_dict())
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        state = {key: moments[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                 if f"{key}.{name}" in moments}
        if state:
            optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device)
                                          for key, value in state.items()}


def latest_checkpoint(run: Path) -> tuple[Path | None, int]:
    """The newest complete checkpoint of a run and its step; (None, 0) where there is none yet."""
    steps = [int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/state.json")
             if path.parent.name.removeprefix("step_").isdigit()]
    return (run / f"checkpoints/step_{max(steps)}", max(steps)) if steps else (None, 0)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and what an interrupted write left."""
    folders = [p for p in run.glob("checkpoints/step_*") if p.name.removeprefix("step_").isdigit()]
    folders.sort(key=lambda path: int(path.name.removeprefix("step_")))
    for path in [*folders[:-keep], *run.glob("checkpoints/*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def take_fingerprint(model, snippets) -> dict[str, str]:
    """What must not change under a run: the model's files by name and size, the corpus by content."""
    marks = {}
    for name, place, pattern in (("model", model, "*"), ("snippets", snippets, "*.py")):
        path, digest = Path(place), hashlib.sha256()
        files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                content = file.read_bytes() if name == "snippets" else b""
                head = f"{file.relative_to(path)} {file.stat().st_size} "
                digest.update(head.encode("utf-8", "surrogateescape") + content)
        marks[name] = digest.hexdigest()
    return marks


def open_run(run: Path, settings: dict, fingerprint: dict, model, optimizer) -> int:
    """The step to start after, -1 for a new run; writes config.json, loads the newest checkpoint, cuts the logs."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.json", json.dumps({**settings, "fingerprint": fingerprint}, indent=2) + "\n")
    checkpoint, step = latest_checkpoint(run)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer)
    step = step if checkpoint else -1
    for name in ("metrics.jsonl", "samples.jsonl", "heldout.jsonl"):
        cut_rows(run / name, step)
    print(f"run folder: {run}" + (f", continued after step {step}" if step >= 0 else ""))
    return step


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk, rename it."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    flush(scratch)
    scratch.rename(path)
    flush(path.parent)


def append_rows(path: Path, rows) -> None:
    """Append rows to a JSONL file as strict JSON, and flush it to disk."""
    with open(path, "a", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file; a half-written last one is left out, a missing file has none."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def cut_rows(path: Path, step: int) -> list[dict]:
    """Keep the rows up to `step`; returns them. With step < 0 the file ends up empty."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows
