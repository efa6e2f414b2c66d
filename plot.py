"""Curves of one or several runs: `python plot.py RUN [RUN …] [--out FILE]`.

One panel a metric of RUN/metrics.jsonl, also while the run goes on: the pale line is each step, the full one the mean
of the last ten, dots are held-out tasks. matplotlib is needed here alone.
"""
import argparse
import json
from pathlib import Path

PANELS = {"reward": "reward", "exact": "exact answers", "stdout": "stdout part", "stderr": "stderr part",
          "format": "format part", "entropy": "entropy (nats)", "kl": "KL to the reference",
          "grad_norm": "gradient norm", "clip_fraction": "clipped tokens", "logprob_gap": "sampler–trainer gap"}


def read_metrics(run_dir) -> list[dict]:
    """The rows of run_dir/metrics.jsonl; a last row still being written is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no metrics.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no metrics row: {line[:40]}") from None
    if not rows:
        raise ValueError(f"{path} has no rows yet")
    return rows


def plot(run_dirs, out: Path) -> None:
    """Draw the runs over each other into `out` (.png, .svg, .pdf); ImportError without matplotlib."""
    runs = {str(run_dir): read_metrics(run_dir) for run_dir in run_dirs}
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        raise ImportError("curves need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(16, 6), layout="constrained")
    for (metric, title), axes in zip(PANELS.items(), figure.subplots(2, 5).flat, strict=True):
        axes.set(title=title, xlabel="step")
        for i, (name, rows) in enumerate(runs.items()):
            steps, values = _series(rows, metric)
            means = [sum(values[max(0, j - 9):j + 1]) / min(10, j + 1) for j in range(len(values))]
            axes.plot(steps, values, f"C{i}", alpha=0.3, linewidth=0.8)
            axes.plot(steps, means, f"C{i}", label=name)
            axes.plot(*_series(rows, f"heldout_{metric}"), f"C{i}o--", markersize=4)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    unfinished = out.with_name(out.name + ".tmp")
    figure.savefig(unfinished, format=out.suffix[1:] or "png", dpi=120)
    unfinished.replace(out)


def _series(rows, metric):
    """Steps and values of a metric, where it was measured."""
    found = [row for row in rows if row.get(metric) is not None]
    return [row["step"] for row in found], [row[metric] for row in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the curves of runs over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders that train.py wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture; by default curves.png in RUN")
    args = parser.parse_args()
    try:
        plot(args.runs, args.out or Path(args.runs[0]) / "curves.png")
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"plot.py: {error}\n")
