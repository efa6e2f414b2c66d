"""Curves of one or several runs: `python plot.py RUN [RUN …] [--out FILE]`.

One panel a metric of RUN/metrics.jsonl, also while the run goes on: the pale line is each step, the
full one the mean of the last ten, dots are held-out tasks. matplotlib is needed here alone.
"""
import argparse
import json
import os
from pathlib import Path

PANELS = (  # title, metric of the training steps, held-out metric beside it
    ("reward", "reward", "heldout_reward"), ("exact answers", "exact", "heldout_exact"),
    ("stdout part", "stdout", None), ("stderr part", "stderr", None),
    ("format part", "format", None), ("entropy (nats)", "entropy", None),
    ("KL to the reference", "kl", None), ("gradient norm", "grad_norm", None),
    ("clipped tokens", "clip_fraction", None), ("sampler–trainer gap", "logprob_gap", None),
)


def read_metrics(run_dir) -> list[dict]:
    """The rows of run_dir/metrics.jsonl; a last row still being written is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no metrics.jsonl")
    lines, rows = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path} line {number} is no metrics row: {line[:40]}") from None
    if not rows:
        raise ValueError(f"{path} has no rows yet")
    return rows


def plot(run_dirs, out) -> None:
    """Draw the runs over each other into `out` (.png, .svg, .pdf); needs matplotlib."""
    runs = {str(run_dir): read_metrics(run_dir) for run_dir in run_dirs}
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        raise ImportError("curves need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(16, 6), layout="constrained")
    for (title, trained, heldout), axes in zip(PANELS, figure.subplots(2, 5).flat, strict=True):
        axes.set(title=title, xlabel="step")
        for i, (name, rows) in enumerate(runs.items()):
            steps, values = _series(rows, trained)
            means = [sum(values[max(0, j - 9):j + 1]) / min(10, j + 1) for j in range(len(values))]
            axes.plot(steps, values, f"C{i}", alpha=0.3, linewidth=0.8)
            axes.plot(steps, means, f"C{i}", label=name)
            axes.plot(*_series(rows, heldout), f"C{i}o--", markersize=4)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    out = Path(out)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            figure.savefig(file, format=out.suffix[1:] or "png", dpi=120)
            os.fsync(file.fileno())
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def _series(rows, metric):
    """Steps and values of a metric, where it was measured."""
    found = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the curves of runs over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders that train.py wrote")
    parser.add_argument("--out", metavar="FILE", help="the picture; by default curves.png in RUN")
    args = parser.parse_args()
    try:
        plot(args.runs, args.out or Path(args.runs[0]) / "curves.png")
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"plot.py: {error}\n")
