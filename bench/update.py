"""Time and memory of an update's forward and backward: each prompt once against once a completion.

    python -m bench.update                                     # SmolLM2-135M's shape, all lengths
    python -m bench.update --lengths 512:64 --dtype bf16 --threads 2

Both layouts run the same code on random weights: "once" passes a prompt with its G completions,
"plain" passes it G times. Each measurement is a process of its own, the two layouts alternating;
memory is the growth of the peak resident set over the loaded model with its gradient. FLOPs are 6
per weight and token that the layout needs, over the rate of a large matrix product in that dtype.
Not covered: TRL beside it, sampling, the optimiser's step, GPUs.
"""
import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from grpo import completion_logprobs, policy_loss
from model import GPT, Config

LENGTHS = "128:64,256:64,512:64,1024:64,128:512,256:512,512:512,1024:512"
SHAPE = dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
             num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matmul_rate(dtype):
    """FLOP/s of a 1024 x 1024 x 4096 product, best of five."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 4096, dtype=dtype)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 1024 * 4096 / best


def measure(layout, prompt_tokens, completion_tokens, args):
    """Seconds, memory and share of the matrix-product rate of one forward and backward."""
    torch.set_num_threads(args.threads)
    dtype, group = DTYPES[args.dtype], args.group_size
    model = GPT(Config(num_hidden_layers=args.layers, **SHAPE))
    body = sum(p.numel() for p in model.model["layers"].parameters())
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist()

    prompts, completions = [ids(prompt_tokens)], [ids(completion_tokens) for _ in range(group)]
    if layout == "plain":
        prompts = prompts * group

    def step(prompts, completions):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            logprobs, _, mask = completion_logprobs(model, prompts, completions)
        loss, _ = policy_loss(logprobs, logprobs.detach(), torch.linspace(-1, 1, group), mask)
        loss.backward()
        return time.perf_counter() - start

    step([ids[:4] for ids in prompts], [ids[:2] for ids in completions])    # gradients exist
    before = peak_mb()
    seconds = min(step(prompts, completions) for _ in range(args.repeats))
    tokens = len(prompts) * prompt_tokens + group * (completion_tokens - 1)
    work = 6 * (body * tokens + model.head_weight.numel() * group * completion_tokens)
    return {"seconds": seconds, "mb": peak_mb() - before,
            "share": work / seconds / matmul_rate(dtype)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=LENGTHS, help="prompt:completion tokens")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=1, help="the fastest counts")
    parser.add_argument("--layout", choices=["once", "plain"], help="measure this alone, as JSON")
    args = parser.parse_args()
    lengths = [[int(part) for part in pair.split(":")] for pair in args.lengths.split(",")]
    if args.layout:
        print(json.dumps(measure(args.layout, *lengths[0], args)))
        return
    print(f"{args.layers} layers, group of {args.group_size}, {args.dtype}, {args.threads} threads")
    print("prompt completion | once: s    MB of matmul | plain: s    MB of matmul | faster memory")
    for prompt, completion in lengths:
        found = {}
        for layout in ("once", "plain"):
            command = [sys.executable, "-m", "bench.update", "--layout", layout,
                       "--lengths", f"{prompt}:{completion}"]
            for name in ("group_size", "layers", "dtype", "threads", "repeats"):
                command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            found[layout] = json.loads(subprocess.check_output(command, text=True))
        columns = [f"{run['seconds']:8.2f} {run['mb']:6.0f} {run['share']:9.0%}"
                   for run in found.values()]
        faster = found["plain"]["seconds"] / found["once"]["seconds"]
        memory = found["once"]["mb"] / found["plain"]["mb"]
        print(f"{prompt:6} {completion:10} |{columns[0]} |{columns[1]} | {faster:5.2f}x "
              f"{memory:5.0%}", flush=True)


if __name__ == "__main__":
    main()
