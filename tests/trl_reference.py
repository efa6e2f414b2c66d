"""Write tests/trl_reference.json: TRL's own numbers for the inputs that tests/test_grpo.py replays.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    trl/bin/python tests/trl_reference.py

TRL's GRPOTrainer computes log-probs, entropies, losses, KL, gradient norms and advantages of a tiny
llama whose weights follow a formula, so that nothing but numbers need be kept. TRL divides by
std + 1e-4 where the official CodeBoost code has 1e-6; the test passes eps=1e-4. TRL's KL is the
plain k3 of the GRPO paper (use_bias_correction_kl=False; by default 1.16 multiplies it by the
ratio).
"""
import itertools
import json
import os
import tempfile
from pathlib import Path

SHAPE = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
GROUP, MAX_LENGTH, TEMPERATURE = 4, 12, 0.7
REWARDS = [[0.0, 1.0, 0.25, 0.5], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, None], [0.9, 0.2, 0.4, 0.4]]


def fill(parameters):
    """The formula of the weights: parameters is an iterable of (Hugging Face name, tensor)."""
    import torch
    for number, (name, tensor) in enumerate(sorted(parameters)):
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * (1.3 + number)) / 3
        wave = wave + 1 if tensor.dim() == 1 else wave
        tensor.data.copy_(wave.view(tensor.shape))


def inputs():
    """Prompts, completions, and old and reference log-probs minus the model's own."""
    import torch
    generator = torch.Generator().manual_seed(7)

    def ids(length):
        return torch.randint(1, SHAPE["vocab_size"], (length,), generator=generator).tolist()

    prompts = [ids(3), ids(7), ids(5)]
    completions = [ids(length) for length in (9, 1, 4, 12, 6, 2, 12, 3, 7, 5, 8, 1)]
    steps = [[[round(float(x), 4) for x in torch.randn(len(c), generator=generator) * scale]
              for c in completions] for scale in (0.3, 0.5)]
    advantages = [round(float(x), 4) for x in torch.randn(len(completions), generator=generator)]
    return prompts, completions, steps[0], steps[1], advantages


def padded(rows, left=False):
    import torch
    width = max(map(len, rows))
    sides = [([0] * (width - len(row)), row) for row in rows]
    return torch.tensor([pad + row if left else row + pad for pad, row in sides])


def make_trainer(folder, **options):
    """A GRPOTrainer on the tiny llama, with a word tokenizer and REWARDS as its reward function."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w2", pad_token="w0")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=2, pad_token_id=0, bos_token_id=1))
    fill(model.named_parameters())
    model.save_pretrained(folder)       # with a KL the trainer loads a reference model by this name
    model.name_or_path = model.config._name_or_path = folder
    flat = itertools.cycle([reward for row in REWARDS for reward in row])
    args = GRPOConfig(output_dir=folder, report_to=[], use_cpu=True, bf16=False,
                      num_generations=GROUP, per_device_train_batch_size=len(REWARDS) * GROUP,
                      temperature=TEMPERATURE, max_completion_length=MAX_LENGTH,
                      gradient_checkpointing=False, **options)
    return GRPOTrainer(model, lambda completions, **_: [next(flat) for _ in completions], args,
                       train_dataset=Dataset.from_dict({"prompt": ["w3 w4"] * len(REWARDS)}),
                       processing_class=tokenizer)


def loss_case(folder, loss_type, kl_coef, clip_high):
    """One loss of TRL's, its KL, and the norm of its gradient."""
    import torch
    trainer = make_trainer(folder, loss_type=loss_type, beta=kl_coef, epsilon=0.2,
                           epsilon_high=clip_high, use_bias_correction_kl=False)
    model = trainer.model.train()
    prompts, completions, old_steps, ref_steps, advantages = inputs()
    rows = [prompt for prompt in prompts for _ in range(GROUP)]
    mask = padded([[1] * len(ids) for ids in completions])
    batch = {"prompt_ids": padded(rows, left=True), "completion_ids": padded(completions),
             "prompt_mask": padded([[1] * len(ids) for ids in rows], left=True),
             "completion_mask": mask, "advantages": torch.tensor(advantages),
             "num_items_in_batch": mask.sum()}
    full = {name: torch.cat([batch["prompt_" + name], batch["completion_" + name]], 1)
            for name in ("ids", "mask")}
    with torch.no_grad():
        logprobs, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model, full["ids"], full["mask"], mask.shape[1], compute_entropy=True)
    batch["old_per_token_logps"] = logprobs + padded(old_steps)
    batch["ref_per_token_logps"] = logprobs + padded(ref_steps)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
    kl = trainer._metrics["train"].get("kl", [None])[-1]
    case = dict(loss_type=loss_type, kl_coef=kl_coef, clip_high=clip_high, loss=loss.item(), kl=kl,
                grad_norm=norm.item())
    return case, [[row[:len(ids)] for row, ids in zip(values.tolist(), completions)]
                  for values in (logprobs, entropy)]


def main():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import trl
    with tempfile.TemporaryDirectory() as folder:
        cases, advantages = [], {}
        for options in itertools.product(("grpo", "bnpo", "dapo", "dr_grpo"), (0.0, 0.04),
                                         (0.2, 0.28)):
            case, (logprobs, entropy) = loss_case(folder, *options)
            cases.append(case)
        for scale in ("group", "none"):
            trainer = make_trainer(folder, scale_rewards=scale)
            trainer.model.train()
            rows = [{"prompt": "w3 w4"} for row in REWARDS for _ in row]
            advantages[scale] = trainer._generate_and_score_completions(rows)["advantages"].tolist()
    result = dict(trl=trl.__version__, logprobs=logprobs, entropy=entropy, cases=cases,
                  advantages=advantages)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items()]
    Path(__file__).with_suffix(".json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
