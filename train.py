"""Train a code model with CodeBoost (arXiv 2508.05242): GRPO on tasks whose answers come from running snippets.

    python train.py                                            # bundled model and snippets, minutes on a laptop
    python train.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --snippets my_code/ --steps 200
    python train.py --preset paper --model DIR --snippets data.csv
    python train.py --resume runs/NAME

One step: draw tasks, sample a group of rollouts for each, execute and reward them, update the policy. The loss is near
zero by construction (the ratio starts at 1 and a group's advantages sum to 0): watch the held-out exact-answer rate.
"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import (append_rows, open_run, prune_checkpoints, read_rows, save_checkpoint, take_fingerprint,
                        write_text)
from corpus import draw_tasks, key_seed, make_heldout, read_corpus
from evaluate import constant_answer_reward, heldout_rows, paired_change
from grpo import group_advantages, update
from model import GPT, Tokenizer
from plot import plot
from reward import score_many
from sample import Sampler
from sandbox import Sandbox
from tasks import render_answer

HERE = Path(__file__).parent
BUNDLED_LR, PAPER_LR = 3e-5, 1e-6                # a 3 M-parameter model learns nothing at the paper's rate
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EVAL_SAMPLES = 1                                 # completions of a held-out task at T = 1, besides the greedy one


@dataclass
class Settings:
    model: str = str(HERE / "data/tiny")         # folder or hub id of a qwen2, qwen3 or llama checkpoint
    snippets: str = str(HERE / "data/snippets.jsonl")  # .jsonl, official .csv, .py or a folder of .py files
    out: str = ""                                # run folder; by default a new one under runs/
    steps: int = 100                             # rollouts, each followed by its updates
    prompts: int = 16                            # tasks a step
    group_size: int = 8                          # rollouts a task
    updates: int = 1                             # optimiser updates a step; divides prompts
    max_prompt_tokens: int = 1024                # longer prompts are dropped and counted
    max_new_tokens: int = 128                    # tokens a rollout may have
    temperature: float = 1.0                     # of sampling and of the log-probs
    lr: float = 0.0                              # learning rate; 0: 3e-5 for the bundled model, else 1e-6 (paper)
    kl_coef: float = 0.01                        # weight of the k3 KL to the frozen start; 0: no reference model
    clip_low: float = 0.2                        # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.3                       # and above 1 + clip_high
    micro_batch_tokens: int = 16384              # prompt and completion tokens of one forward pass
    threshold: float = 0.5                       # curation: snippets this similar or more exclude each other
    min_lines: int = 3                           # shorter snippets are left out (paper: 10)
    max_masked: int = 1                          # most lines that a backward task hides
    augment: bool = True                         # vary programs and inputs
    ask_stderr: bool = True                      # forward tasks ask for stderr too
    pay_silence: bool = False                    # official reward: an empty stream is free marks
    mask_truncated: bool = False                 # leave completions cut by length out of the loss
    eval_every: int = 50                         # steps between held-out measurements, besides start and end
    eval_tasks: int = 256                        # held-out tasks in total
    save_every: int = 50                         # steps between checkpoints, besides the end
    keep: int = 2                                # newest checkpoints kept, besides the best
    seed: int = 0                                # everything random follows from it
    device: str = ""                             # cpu or cuda; by default cuda where there is one
    dtype: str = ""                              # compute in fp32 or bf16 (default on cuda); weights stay fp32


PRESETS = {"paper": dict(prompts=512, group_size=5, updates=4, max_prompt_tokens=4096, max_new_tokens=4096,
                         lr=PAPER_LR, min_lines=10, pay_silence=True)}


def main():
    started, stop = time.time(), catch_interrupt()
    with one_line_errors():
        settings, run, fingerprint = read_settings()
        tokenizer = Tokenizer.from_pretrained(settings.model)
        model = GPT.from_pretrained(settings.model, device=settings.device)            # fp32 masters
        compute = DTYPES[settings.dtype]
        reference = GPT.from_pretrained(settings.model, settings.device, compute) if settings.kl_coef else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)

    with Sandbox(timeout=2.0) as sandbox:
        missing = [f"{layer} ({reason})" for layer, reason in sandbox.report().items() if reason]
        print("sandbox: " + ("layers not in use: " + ", ".join(missing) if missing else "every layer in use"))
        with one_line_errors():
            snippets, heldout_snippets = read_corpus(settings, sandbox)
            heldout = make_heldout(settings, snippets, heldout_snippets, tokenizer, sandbox)
            start = open_run(run, dataclasses.asdict(settings), fingerprint, model, optimizer)
        sampler = Sampler(model, dtype=compute)
        if start < 0:                                                                  # a new run
            start, row = 0, {"step": 0, **measure(settings, 0, run, sampler, tokenizer, heldout, sandbox)}
            append_rows(run / "metrics.jsonl", [row])
        measured = [row.get("heldout_reward") for row in read_rows(run / "metrics.jsonl")]
        best = max((reward for reward in measured if reward is not None), default=-math.inf)

        for step in range(start + 1, settings.steps + 1):
            clock = [time.time()]
            tasks, prompts, dropped = draw_tasks(settings, step, snippets, heldout, tokenizer, sandbox)
            clock.append(time.time())

            rollouts = sampler.generate(prompts, group_size=settings.group_size, eos_ids=tokenizer.eos_ids,
                                        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                                        seed=key_seed(settings.seed, "rollouts", step))
            texts = [tokenizer.decode(rollout.ids) for rollout in rollouts]
            clock.append(time.time())

            row_tasks = [task for task in tasks for _ in range(settings.group_size)]
            rewards = score_many(list(zip(row_tasks, texts)), sandbox, pay_silence=settings.pay_silence)
            totals = torch.tensor([reward.total for reward in rewards]).view(len(tasks), settings.group_size)
            clock.append(time.time())

            advantages = group_advantages(totals)                                      # (N, G)
            learned = update(model, optimizer, prompts, rollouts, advantages, lost=totals.isnan(),
                             mask_truncated=settings.mask_truncated, updates=settings.updates,
                             micro_batch_tokens=settings.micro_batch_tokens, temperature=settings.temperature,
                             clip_low=settings.clip_low, clip_high=settings.clip_high, ref_model=reference,
                             kl_coef=settings.kl_coef, dtype=compute)
            sampler.refresh()
            clock.append(time.time())

            row = {"step": step, **summarize_step(rewards, rollouts, totals, learned, dropped, clock)}
            if step % settings.eval_every == 0 or step == settings.steps:
                row |= measure(settings, step, run, sampler, tokenizer, heldout, sandbox)
            append_rows(run / "samples.jsonl", sample_rows(step, tasks, texts, rewards, settings.group_size))
            append_rows(run / "metrics.jsonl", [row])
            print_step(row, settings.steps)

            if (row.get("heldout_reward") or -math.inf) > best:
                best = row["heldout_reward"]
                save_checkpoint(run / "best", model, optimizer, step)
            if step % settings.save_every == 0 or step == settings.steps or stop.is_set():
                save_checkpoint(run / f"checkpoints/step_{step}", model, optimizer, step)
                prune_checkpoints(run, settings.keep)
            if stop.is_set() and step < settings.steps:
                return print(f"stopped after step {step}; continue with: python train.py --resume {run}")
        finish(settings, run, model, heldout, sandbox, started)


# ---- Settings ----
class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, and the exit status of a user's mistake."""
        self.exit(2, f"{self.prog}: {message}\n")


def read_settings():
    """(settings, run folder, fingerprint) from the command line; the fields of Settings are the flags."""
    notes = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Settings), re.M))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        parser.add_argument("--" + field.name.replace("_", "-"), help=f"{notes[field.name]} [{field.default}]",
                            default=argparse.SUPPRESS, **kind)
    parser.add_argument("--preset", choices=PRESETS, default="", help="settings in bulk; single flags override")
    parser.add_argument("--resume", metavar="RUN", default="", help="continue a run folder; only --steps may grow")
    given = vars(parser.parse_args())
    preset, run = given.pop("preset"), given.pop("resume")
    if run:
        return resume_settings(Path(run), given | ({"preset": preset} if preset else {}))
    if preset == "paper" and "snippets" not in given:
        raise ValueError("--preset paper needs --snippets: the paper's corpus isn't bundled, README says where it is")
    settings = Settings(**{**PRESETS.get(preset, {}), **given})
    for name in ("model", "snippets"):           # so that the run can be resumed from another folder
        if os.path.exists(getattr(settings, name)):
            setattr(settings, name, os.path.abspath(getattr(settings, name)))
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings.dtype = settings.dtype or ("bf16" if settings.device.startswith("cuda") else "fp32")
    settings.lr = settings.lr or (BUNDLED_LR if settings.model == Settings.model else PAPER_LR)
    settings.out = settings.out or str(HERE / time.strftime("runs/%Y%m%d-%H%M%S"))
    check_settings(settings)
    run = Path(settings.out)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"--out {run} exists already: name a new folder, or continue that run with --resume {run}")
    return settings, run, take_fingerprint(settings.model, settings.snippets)


def check_settings(settings):
    """ValueError for the first value out of its range, with the nearest legal one."""
    least = dict(group_size=2, kl_coef=0, clip_low=0, clip_high=0, min_lines=0, eval_tasks=0, seed=0, temperature=1e-3,
                 lr=1e-12, threshold=1e-3)       # of the others 1
    most = dict(threshold=1, clip_low=1)
    for name, value in vars(settings).items():
        low, high = least.get(name, 1), most.get(name, math.inf)
        if type(value) in (int, float) and not (low <= value <= high and value < math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {low}"
                             + (f" and at most {high}" if name in most else ""))
    if settings.prompts % settings.updates:
        nearest = settings.prompts // settings.updates * settings.updates or settings.updates
        raise ValueError(f"--prompts {settings.prompts} isn't a multiple of --updates {settings.updates}; "
                         f"the nearest is {nearest}")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype {settings.dtype} must be {' or '.join(DTYPES)}")
    if settings.device != "cpu" and not (settings.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {settings.device} isn't available here; use cpu")


def resume_settings(run, given):
    """What `read_settings` returns, of an existing run; a changed setting, model or corpus is refused by name."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        fingerprint = config.pop("fingerprint")
        settings = Settings(**config)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--resume {run}: no run there, its config.json can't be used: {error}") from None
    for name, value in given.items():
        if value != config.get(name) and not (name == "steps" and value > settings.steps):
            raise ValueError(f"--{name.replace('_', '-')} {value} differs from the run's {config.get(name)}: "
                             "on resume only --steps may change, and only grow")
    settings.steps = given.get("steps", settings.steps)
    for name, value in take_fingerprint(settings.model, settings.snippets).items():
        if value != fingerprint.get(name):
            raise ValueError(f"--{name}: {getattr(settings, name)} has changed since the run began")
    summary = run / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["steps"] >= settings.steps:
        print(f"{run} finished already, after {settings.steps} steps: nothing to do (--steps N continues it)")
        sys.exit(0)
    return settings, run, fingerprint


@contextlib.contextmanager
def one_line_errors():
    """A user's mistake found during set-up ends in one line on stderr and status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def catch_interrupt():
    """An event that the first Ctrl-C sets; the second one stops at once."""
    stop = threading.Event()
    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nCtrl-C: finishing this step and saving; press it again to stop at once")
    signal.signal(signal.SIGINT, handle)
    return stop


# ---- Measuring and reporting ----

def measure(settings, step, run, sampler, tokenizer, heldout, sandbox):
    """Answer the held-out tasks, append their rows to heldout.jsonl; the two figures of metrics.jsonl."""
    rows = heldout_rows(sampler, tokenizer, heldout.tasks, heldout.sets, sandbox, step=step, samples=EVAL_SAMPLES,
                        max_new_tokens=settings.max_new_tokens, seed=key_seed(settings.seed, "heldout"),
                        score_options={"pay_silence": settings.pay_silence})
    append_rows(run / "heldout.jsonl", rows)
    reward, exact = (mean(row[name] for row in rows) for name in ("reward", "exact"))
    print(f"held-out at step {step}: reward {show(reward)}, exact {show(exact)}, "
          f"greedy exact {show(mean(row['greedy_exact'] for row in rows))}")
    return {"heldout_reward": reward, "heldout_exact": exact}


def summarize_step(rewards, rollouts, totals, learned, dropped, clock):
    """A step's row of metrics.jsonl: rates over its rollouts, what the update reported, seconds."""
    kept = [reward for reward in rewards if not reward.lost]
    tokens = sum(len(rollout.ids) for rollout in rollouts)
    row = {name: mean(float(getattr(reward, part)) for reward in kept)
           for name, part in (("reward", "total"), *((part, part) for part in ("format", "stdout", "stderr", "exact")))}
    row |= {**learned, "spread": mean(float(group[~group.isnan()].unique().numel() > 1) for group in totals),
            "length": tokens / len(rollouts), "truncated": mean(float(not r.finished) for r in rollouts),
            "lost": len(rewards) - len(kept), "dropped_tasks": dict(sorted(dropped.items()))}
    for name, start, end in zip(("tasks", "generate", "reward", "update"), clock, clock[1:]):
        row[f"seconds_{name}"] = round(end - start, 3)
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**row, "tokens_per_second": round(tokens / (clock[-1] - clock[0]), 1), "memory_mb": round(peak / 2**20)}


def sample_rows(step, tasks, texts, rewards, group_size):
    """The first two rollouts of each of a step's first two tasks, with what each part of the reward was."""
    rows = []
    for r in (0, 1, group_size, group_size + 1)[:2 * len(tasks)]:
        task, parts = tasks[r // group_size], dict(vars(rewards[r]))
        total = parts.pop("total")
        rows.append({"step": step, "kind": task.kind, "prompt": task.prompt, "completion": texts[r],
                     "answer": render_answer(task), "reward": None if rewards[r].lost else total, **parts})
    return rows


def print_step(row, steps):
    seconds = [row[f"seconds_{name}"] for name in ("tasks", "generate", "reward", "update")]
    print(f"{row['step']:4d}/{steps} | reward {show(row['reward'])} exact {show(row['exact'])} | "
          f"format {show(row['format'])} stdout {show(row['stdout'])} stderr {show(row['stderr'])} | "
          f"spread {show(row['spread'])} length {row['length']:.0f} lost {row['lost']} | kl {show(row['kl'], 4)} "
          f"entropy {show(row['entropy'])} clip {show(row['clip_fraction'], 3)} grad {show(row['grad_norm'])} | "
          f"{sum(seconds):.1f} s ({' + '.join(f'{s:.1f}' for s in seconds)}) "
          f"{row['tokens_per_second']:.0f} tokens/s {row['memory_mb']} MB | loss {show(row['loss'], 4)}", flush=True)
    if (row["logprob_gap"] or 0) > 0.1:
        print(f"warning: sampler and trainer differ by {row['logprob_gap']:.3f} nats a token; try --dtype fp32")


def mean(values):
    """Mean of the values that aren't None; None where there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def show(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def finish(settings, run, model, heldout, sandbox, started):
    """Save the model, summary.json and the curves; print held-out figures before and after."""
    model.save_pretrained(run / "model")
    rows = read_rows(run / "heldout.jsonl")
    before = [row for row in rows if row["step"] == 0]
    after = [row for row in rows if row["step"] == settings.steps]
    change, (constant, _) = {}, constant_answer_reward(heldout.tasks, sandbox, {"pay_silence": settings.pay_silence})
    summary = {"steps": settings.steps, "seconds": round(time.time() - started), "constant_answer_reward": constant}
    for name in ("reward", "exact"):
        change[name] = old, new, low, high = paired_change(*([row[name] for row in part] for part in (before, after)))
        summary |= {f"heldout_{name}_before": old, f"heldout_{name}_after": new,
                    f"heldout_{name}_change_low": low, f"heldout_{name}_change_high": high}
    summary |= {f"greedy_exact_{moment}": mean(row["greedy_exact"] for row in part)
                for moment, part in (("before", before), ("after", after))}
    print(f"\n{'held-out tasks':14} {'count':>5}  exact at T = 1    greedy exact      reward")
    for title in ("all", "variants", "families", "forward", "backward", "error"):
        pair = [[row for row in part if title in ("all", row["set"], row["kind"])] for part in (before, after)]
        cells = [" -> ".join(show(mean(row[name] for row in part)) for part in pair)
                 for name in ("exact", "greedy_exact", "reward")]
        print(f"{title:14} {len(pair[0]):5}  {cells[0]:17} {cells[1]:17} {cells[2]}")
    print(f"best constant answer: reward {show(constant)}")
    with contextlib.suppress(ImportError):       # matplotlib is optional
        plot([run], run / "curves.png")
    write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"everything is in {run}: " + " ".join(sorted(path.name for path in run.iterdir())))
    old, new, low, high = change["exact"]
    if old is not None:
        print(f"held-out exact {old:.2f} -> {new:.2f}, change {new - old:+.2f} [{low:+.2f}, {high:+.2f}]")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
