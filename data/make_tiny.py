"""Make the bundled model, `data/tiny`: a tokenizer and a small qwen2 that already answers in the right format.

    python -m data.make_tiny                     # about an hour on 2 cores; run again to resume
    python -m data.make_tiny --steps 200 --out runs/tiny --tasks 2000     # a quick look

Tokenizer: byte-level BPE, digits one by one, the prompts' fixed sentences as single tokens. Warm-up: next-token loss
on tasks that tasks.py made and the sandbox answered, from the bundled training families under augmentation and from
small random programs (`random_program`) that teach the interpreter's first steps. Held-out families are never seen.
"""
import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

import tasks
from checkpoint import flush, write_text
from corpus import split_families
from curate import Snippet, load_snippets
from model import GPT, Config
from sandbox import Sandbox
from tokenizer import QWEN_SPLIT
from tokenizer import Tokenizer as ChatTokenizer

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"]
CHAT = ("{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 192,
    "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "use_sliding_window": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 3,
}


def random_program(rng: random.Random) -> Snippet:
    """A program of 2 to 7 lines over a few typed variables: arithmetic, strings, lists, branches, loops, errors."""
    ints, texts, lists, lines = [], [], [], []
    names = rng.sample(["a", "b", "n", "total", "count", "x", "size", "price", "word", "name", "items", "left"], 6)
    words = ["cat", "blue", "river", "Tom", "apple", "tree", "zip", "note", "fox", "salt", "Ada", "ink"]
    number = lambda: rng.choice(ints) if ints and rng.random() < 0.6 else str(rng.randint(0, rng.choice([9, 20, 99])))
    text = lambda: rng.choice(texts) if texts and rng.random() < 0.8 else repr(rng.choice(words))
    for name in names[:rng.randint(1, 3)]:
        kind = rng.random()
        if kind < 0.5:
            lines.append(f"{name} = {number()}" + rng.choice(["", "", f" {rng.choice('+-*')} {number()}"]))
            ints.append(name)
        elif kind < 0.75:
            lines.append(f"{name} = {rng.choice(words)!r}")
            texts.append(name)
        else:
            pool = words if rng.random() < 0.3 else range(20)
            lines.append(f"{name} = {[rng.choice(pool) for _ in range(rng.randint(2, 5))]!r}")
            lists.append(name)
    for _ in range(rng.randint(0, 2)):
        choice = rng.random()
        if ints and choice < 0.3:
            lines.append(f"{rng.choice(ints)} {rng.choice(['+=', '-=', '*='])} {rng.randint(1, 9)}")
        elif ints and choice < 0.5:
            lines += [f"if {number()} {rng.choice(['<', '>', '==', '!=', '<=', '>='])} {number()}:",
                      f"    {rng.choice(ints)} = {number()}"]
        elif lists and choice < 0.7:
            chosen = rng.choice(lists)
            lines.append(rng.choice([f"{chosen}.append({rng.randint(0, 20)})", f"{chosen}.reverse()", f"{chosen}.pop()",
                                     f"{chosen} = {chosen}[{rng.randint(0, 2)}:]", f"{chosen} = {chosen}[::-1]"]))
        elif texts:
            chosen = rng.choice(texts)
            lines.append(f"{chosen} = {chosen}.{rng.choice(['upper()', 'lower()', 'title()', 'strip()'])}")
        elif ints:
            lines += [f"for i in range({rng.randint(2, 4)}):", f"    {rng.choice(ints)} += {rng.choice(['i', '1', '2'])}"]
    for _ in range(rng.randint(1, 2)):
        shown = [f"{number()} {rng.choice(['+', '-', '*', '//', '%'])} {number()}", number(), f"{text()} + {text()}",
                 f"len({text()})", f"{text()}[{rng.randint(-2, 2)}]", f"{text()}[{rng.randint(0, 2)}:]", text()]
        for chosen in lists:
            shown += [chosen, f"len({chosen})", f"{chosen}[{rng.randint(-3, 3)}]", f"{chosen}[0], {chosen}[-1]",
                      f"sorted({chosen})", f"max({chosen})", f"{chosen}[:{rng.randint(1, 3)}]"]
        lines.append(f"print({rng.choice(shown)})")
    return Snippet("\n".join(lines) + "\n", [], "random")


def make_tasks(path: Path, count: int, share: float, seed: int) -> list[dict]:
    """`count` rows {"prompt", "answer"} in a JSONL file; `share` of them from random programs. Resumes."""
    snippets, _ = split_families(load_snippets(Path(__file__).parent / "snippets.jsonl"))
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    bar = tqdm(total=count, initial=len(rows), desc="tasks", unit="task")
    drawn = {row["drawn"] for row in rows}
    start = max(drawn, default=-1) + 1
    with Sandbox(timeout=1.0) as sandbox, open(path, "a") as f:
        while len(rows) < count:
            pairs = []
            for i in range(start, start + 512):
                rng = random.Random(f"tiny {seed} {i}")
                snippet = random_program(rng) if rng.random() < share else rng.choice(snippets)
                pairs.append((snippet, 2**41 + i))         # seeds that train.py never draws
            made = tasks.synthesize_many(pairs, sandbox, timeout=0.5)
            fresh = [{"drawn": start + i, "prompt": t.prompt, "answer": tasks.render_answer(t)}
                     for i, t in enumerate(made) if not isinstance(t, str)]
            f.write("".join(json.dumps(row) + "\n" for row in fresh))
            f.flush()
            rows += fresh
            start += 512
            bar.update(len(fresh))
    return rows[:count]


def make_tokenizer(out: Path, rows, vocab_size: int) -> None:
    """Train the BPE on prompts and answers; write tokenizer.json, its config and the generation config."""
    templates = [tasks.PROGRAM, tasks.NO_INPUT, tasks.STDIN, tasks.FORWARD, tasks.BACKWARD, tasks.RESTORE,
                 *tasks.EXAMPLE.values()]
    sentences = [piece for template in templates for piece in re.split(r"\{\w+\}", template) if len(piece) > 4]
    fences = [f"```{tag}\n" for tag in ("stdout", "stderr", "stdin", "line_1")] + ["```"]
    bpe = Tokenizer(models.BPE())
    # AutoTokenizer imposes Qwen's normaliser and splitting (digits one by one) on every qwen2 checkpoint
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    fixed = list(dict.fromkeys(sentences + fences))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(fixed), special_tokens=SPECIAL,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    strip = re.compile("|".join(re.escape(text) for text in sorted(fixed, key=len, reverse=True)))
    bpe.train_from_iterator((strip.sub(" ", row["prompt"] + "\n" + row["answer"]) for row in rows[:20000]), trainer)
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in fixed])
    out.mkdir(parents=True, exist_ok=True)
    bpe.save(str(out / "tokenizer.json"))
    write_text(out / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[3], "model_max_length": ARCHITECTURE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False}, indent=2) + "\n")
    write_text(out / "generation_config.json", json.dumps({"eos_token_id": [0], "pad_token_id": 3}) + "\n")
    config = {**ARCHITECTURE, "vocab_size": bpe.get_vocab_size(), "dtype": "float32"}
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def batches(examples, tokens_per_batch, seed):
    """Endless batches of similar length, each of at most `tokens_per_batch` padded tokens; same seed, same order."""
    for epoch in range(10**9):
        rng = random.Random(f"epoch {seed} {epoch}")
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]) // 16, rng.random()))
        groups, group = [], []
        for i in order:
            width = max(len(examples[i][0]), len(examples[group[0]][0]) if group else 0)
            if group and width * (len(group) + 1) > tokens_per_batch:
                groups.append(group)
                group = []
            group.append(i)
        groups.append(group)
        rng.shuffle(groups)
        yield from groups


def train(out: Path, scratch: Path, rows, args) -> None:
    """Next-token training with AdamW and a cosine schedule; a checkpoint every 200 steps, resumed from."""
    tokenizer = ChatTokenizer.from_pretrained(out)
    examples = []
    for row in tqdm(rows, desc="encode", unit="task"):
        prompt = tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}])
        answer = tokenizer.encode_chat([{"role": "user", "content": row["prompt"]},
                                        {"role": "assistant", "content": row["answer"]}])
        assert answer[:len(prompt)] == prompt
        answer = answer[:answer.index(0) + 1]              # up to and with <|endoftext|>
        if len(answer) <= args.max_tokens:
            examples.append((np.array(answer, dtype=np.int16), len(prompt)))
    print(f"{len(examples)} examples of {np.mean([len(ids) for ids, _ in examples]):.0f} tokens, "
          f"{np.mean([len(ids) - n for ids, n in examples]):.0f} of them answer")

    torch.manual_seed(args.seed)
    model = GPT(Config.from_dict(json.loads((out / "config.json").read_text())))
    parameters = list(model.parameters())
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, vocabulary {model.config.vocab_size}")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    state, start = scratch / "state.pt", 0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    stream = batches(examples, args.batch_tokens, args.seed)
    bar, began, seen, average = tqdm(range(args.steps), desc="warm-up", unit="step"), time.time(), 0, None
    for step in bar:
        group = next(stream)
        if step < start:
            continue
        width = max(len(examples[i][0]) for i in group)
        ids = torch.full((len(group), width), 3)                                       # (B, T)
        weight = torch.zeros(len(group), width)                                        # (B, T)
        for row, i in enumerate(group):
            tokens, prompt = examples[i]
            ids[row, :len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            weight[row, :prompt] = args.prompt_weight
            weight[row, prompt:len(tokens)] = 1.0
        lr = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for g in optimizer.param_groups:
            g["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = model(ids[:, :-1])                                                # (B, T-1, V)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answers = (weight[:, 1:] == 1).flatten()
        value = losses[answers].mean().item()
        average = value if average is None else 0.98 * average + 0.02 * value
        seen += ids.numel()
        bar.set_postfix_str(f"answer loss {average:.3f}, {seen / (time.time() - began):.0f} tokens/s")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                       scratch / "state.tmp")
            flush(scratch / "state.tmp")
            (scratch / "state.tmp").rename(state)
            with open(scratch / "loss.csv", "a") as f:
                f.write(f"{step + 1},{average:.4f},{time.time() - began:.0f}\n")
    save_weights(model, out)


def save_weights(model, out):
    """model.safetensors in bfloat16: half the bytes in git; everything loads it as fp32."""
    from safetensors.torch import save_file
    save_file({name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()},
              out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    write_text(out / "config.json", json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--scratch", type=Path, default=Path("runs/make_tiny"), help="tasks and state, to resume")
    parser.add_argument("--tasks", type=int, default=15_000)
    parser.add_argument("--random-share", type=float, default=0.4, help="share of tasks from random programs")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2_600)
    parser.add_argument("--batch-tokens", type=int, default=6_144)
    parser.add_argument("--max-tokens", type=int, default=512, help="longer examples are left out")
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="weight of prompt tokens in the loss")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    rows = make_tasks(args.scratch / "tasks.jsonl", args.tasks, args.random_share, args.seed)
    if not (args.scratch / "state.pt").exists():
        make_tokenizer(args.out, rows, args.vocab_size)
    train(args.out, args.scratch, rows, args)


if __name__ == "__main__":
    main()
