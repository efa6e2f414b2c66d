"""Tokens per second of our sampler and of transformers' `generate`, side by side.

    python -m bench.sampler MODEL                       # a checkpoint folder or hub id
    python -m bench.sampler MODEL --batches 1 32 8x4 --dtypes bf16 --new-tokens 128 --static

A batch is R (R distinct prompts) or GxN (N prompts, G completions each). Prompts are random ids of
one length, so transformers pads nothing; neither side stops at EOS; both sample at temperature 1.
The two take turns within a repeat, the table shows medians: tokens/s with prefill, and decoding
alone (what one token takes subtracted). "of roofline" is the time that reading the weights once, at
the measured bandwidth, or multiplying them, at the measured product rate, must take (whichever is
longer), over our time for a decoding step; attention is left out of it. Peak memory: --memory runs
one side of one batch alone, since a process's peak can't be taken back.
"""
import argparse
import resource
import statistics
import time

import torch

from model import GPT
from sample import Sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function):
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth():
    """Bytes/s of reading 1 GB."""
    numbers = torch.ones(250_000_000, device=DEVICE)
    return 1e9 / min(seconds(numbers.sum) for _ in range(5))


def product_rate(dtype):
    """FLOP/s of a (1024, 2048) x (2048, 4096) product."""
    a = torch.ones(1024, 2048, dtype=dtype, device=DEVICE)
    b = torch.ones(2048, 4096, dtype=dtype, device=DEVICE)
    return 2 * 1024 * 2048 * 4096 / min(seconds(lambda: a @ b) for _ in range(10))


def ours(folder, dtype):
    sampler = Sampler(GPT.from_pretrained(folder, DEVICE, dtype))

    def run(prompts, group, new):
        rows = sampler.generate(prompts, group_size=group, max_new_tokens=new)
        assert all(len(row.ids) == new for row in rows)
    return run


def theirs(folder, dtype, cache):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)     # no EOS, no top-k

    def run(prompts, group, new):
        ids = torch.tensor(prompts, device=DEVICE)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                             num_return_sequences=group, max_new_tokens=new,
                             cache_implementation=cache)
        assert out.shape == (len(prompts) * group, len(prompts[0]) + new)
    return run


def compare(sides, prompts, group, new, repeats):
    """{side: (median seconds of `new` tokens, of one token)}, the sides taking turns."""
    times = {name: ([], []) for name in sides}
    for run in sides.values():
        run(prompts, group, 2)                      # warm-up
    for _ in range(repeats):
        for name, run in sides.items():
            times[name][0].append(seconds(lambda: run(prompts, group, new)))
            times[name][1].append(seconds(lambda: run(prompts, group, 1)))
    return {name: tuple(map(statistics.median, both)) for name, both in times.items()}


def random_prompts(count, length, vocabulary):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (count, length), generator=generator).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batches", nargs="+", default=["1", "8", "32", "8x4"], metavar="R or GxN")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--static", action="store_true", help="transformers' static cache as well")
    parser.add_argument("--memory", choices=["ours", "transformers"],
                        help="peak memory of this side alone, first dtype and batch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batches = [tuple(map(int, text.split("x"))) if "x" in text else (1, int(text))
               for text in args.batches]
    if args.memory:
        group, count = batches[0]
        build = ours if args.memory == "ours" else lambda *both: theirs(*both, None)
        run = build(args.model, DTYPES[args.dtypes[0]])
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        run(random_prompts(count, args.prompt_tokens, 1000), group, args.new_tokens)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{args.memory}: {loaded:.0f} MB at most while loading, {peak:.0f} MB with sampling")
        return
    print(f"{DEVICE}, {args.threads} threads, prompt {args.prompt_tokens}, new {args.new_tokens}, "
          f"{bandwidth() / 1e9:.1f} GB/s")
    print("dtype  batch  side          tokens/s  decoding  of roofline")
    best = {}
    for name in args.dtypes:
        dtype = DTYPES[name]
        sides = {"ours": ours(args.model, dtype), "transformers": theirs(args.model, dtype, None)}
        if args.static:
            sides["static cache"] = theirs(args.model, dtype, "static")
        model = GPT.from_pretrained(args.model)
        numbers = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n
                      or model.config.tie_word_embeddings)
        for text, (group, count) in zip(args.batches, batches):
            prompts = random_prompts(count, args.prompt_tokens, model.real_vocab_size)
            rows, new = group * count, args.new_tokens
            ideal = max(numbers * dtype.itemsize / bandwidth(),
                        2 * numbers * rows / product_rate(dtype))
            for side, (whole, first) in compare(sides, prompts, group, new, args.repeats).items():
                step = max(whole - first, 1e-9) / max(new - 1, 1)
                rate = rows * new / whole
                best[text, side] = max(best.get((text, side), 0), rate)
                print(f"{name:6} {text:6} {side:12} {rate:9.1f} {rows / step:9.1f} "
                      f"{ideal / step:9.0%}", flush=True)
    for text in args.batches:
        print(f"batch {text}: {best[text, 'ours'] / best[text, 'transformers']:.2f} times "
              "transformers, the better dtype of each")


if __name__ == "__main__":
    main()
