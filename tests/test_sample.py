"""The sampler against full forward passes, transformers and statistics.

    python -m pytest tests/test_sample.py
"""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from model import GPT, Config
from sample import Sampler, generate, keep_top, pick, row_uniforms

ROOT = Path(__file__).parent.parent
PROMPTS = [[1], [5, 6, 7], list(range(40)), [9] * 17, [3, 4]]      # ragged, one of a single token
EOS = [3, 17, 20]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(model_type="qwen2", real_vocab_size=127, seed=1, **settings):
    """A random model whose distributions are neither flat nor certain, biases and norms included."""
    settings = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
                **settings}
    model = GPT(Config(model_type=model_type, **settings), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.real_vocab_size = real_vocab_size
    return model


def static(sampler):
    """The code that runs on a GPU, fixed shapes and masks and all, without the graphs."""
    sampler.decoder.static, sampler.decoder.prefill_tokens = True, 50
    return sampler


def expected_logprobs(model, prompt, ids, temperature=1.0):
    """(len(ids),) by one full forward pass over prompt and completion."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1, :model.real_vocab_size]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def assert_logprobs(model, prompts, completions, temperature=1.0, tolerance=1e-4):
    for row, completion in enumerate(completions):
        prompt = prompts[row * len(prompts) // len(completions)]
        expected = expected_logprobs(model, prompt, completion.ids, temperature)
        gap = (torch.tensor(completion.logprobs) - expected).abs().max()
        assert gap <= tolerance, (
            f"row {row} (prompt of {len(prompt)}): cached decoding is {gap:.2e} from the full forward "
            "pass: positions, masks or cache slots")


def ids(completions):
    return [completion.ids for completion in completions]


@pytest.mark.parametrize("model", [
    tiny("qwen2"), tiny("qwen3"), tiny("llama", tie_word_embeddings=False, rope_scaling=LLAMA3),
    tiny("llama", num_key_value_heads=4), tiny("qwen3", num_key_value_heads=1, head_dim=32),
], ids=["qwen2", "qwen3", "llama3 rope", "one query per key", "one key head"])
@pytest.mark.parametrize("kind", [lambda sampler: sampler, static], ids=["eager", "static"])
def test_cached_decoding_equals_the_full_forward_pass(model, kind):
    completions = kind(Sampler(model)).generate(PROMPTS, group_size=4, max_new_tokens=30,
                                                eos_ids=EOS, seed=5)
    assert len({len(c.ids) for c in completions}) > 5, "rows must end at different times here"
    assert_logprobs(model, PROMPTS, completions)


def test_long_static_waves_change_length_buckets_and_halve():
    model = tiny()
    prompts = [[i, 2] for i in range(12)]
    options = {"group_size": 3, "max_new_tokens": 300, "eos_ids": [3], "seed": 3}
    sampler = static(Sampler(model))
    completions = sampler.generate(prompts, **options)
    assert max(len(c.ids) for c in completions) > 256 > 2 * min(len(c.ids) for c in completions)
    assert_logprobs(model, prompts, completions)
    assert ids(completions) == ids(Sampler(model).generate(prompts, **options))
    wave = sampler.wave
    assert ids(sampler.generate(prompts, **options)) == ids(completions)
    assert sampler.wave is wave, "equal calls must reuse the buffers that graphs were captured with"


def test_a_row_depends_on_seed_and_row_number_alone():
    model = tiny()
    options = {"max_new_tokens": 25, "eos_ids": EOS, "seed": 5}
    batch = generate(model, PROMPTS, group_size=4, **options)
    for row, completion in enumerate(batch):
        alone, = generate(model, [PROMPTS[row // 4]], row_ids=[row], **options)
        assert alone.ids == completion.ids, f"row {row} alone differs from itself in a batch"
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
    assert len({tuple(c.ids) for c in batch}) > 15, "rows of a group must differ"
    assert ids(generate(model, PROMPTS, group_size=4, **{**options, "seed": 6})) != ids(batch)


def test_processes_that_share_a_batch_draw_the_same_bits():
    """True on the CPUs tried for fp32 and shards of at least FEWEST_ROWS rows; the ids always."""
    model = tiny()
    prompts = [[i, i + 1, 2] for i in range(16)]
    options = {"group_size": 4, "max_new_tokens": 40, "eos_ids": EOS, "seed": 1}
    whole = generate(model, prompts, **options)
    shards = [c for half in (0, 1) for c in generate(
        model, prompts[8 * half:8 * half + 8], row_ids=range(32 * half, 32 * half + 32), **options)]
    assert ids(shards) == ids(whole)
    assert [c.logprobs for c in shards] == [pytest.approx(c.logprobs, abs=1e-5) for c in whole]


@pytest.mark.parametrize("max_batch", [1, 3, 4, 9, 100])
def test_waves_give_what_one_batch_gives(max_batch):
    model = tiny()
    options = {"group_size": 4, "max_new_tokens": 12, "eos_ids": EOS, "seed": 3}
    assert (ids(generate(model, PROMPTS, max_batch=max_batch, **options))
            == ids(generate(model, PROMPTS, **options)))


def chi_square(counts, probabilities):
    """Standard deviations above its mean of the statistic over the cells expected 5 times."""
    expected = counts.sum() * probabilities
    cells = expected >= 5
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = cells.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_distribution(temperature):
    model, prompt, draws = tiny(), [5, 6, 7], 20_000
    rows = generate(model, [prompt], group_size=draws, max_new_tokens=1, temperature=temperature)
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1, :127].double() / temperature
    counts = np.bincount([row.ids[0] for row in rows], minlength=127)
    far = chi_square(counts, logits.softmax(-1).numpy())
    assert abs(far) < 4, f"{draws} draws are {far:.1f} standard deviations from the softmax"
    assert_logprobs(model, [prompt], rows[:50], temperature, 1e-5)


def test_later_tokens_follow_the_distribution_too():
    """The second token given the first: the draws of one row must be independent."""
    model, prompt = tiny(), [5]
    rows = generate(model, [prompt], group_size=30_000, max_new_tokens=2, seed=8)
    firsts = np.array([row.ids[0] for row in rows])
    common = np.bincount(firsts).argmax()
    seconds = np.bincount([row.ids[1] for row in rows if row.ids[0] == common], minlength=127)
    with torch.no_grad():
        logits = model(torch.tensor([[5, int(common)]]))[0, -1, :127].double()
    assert abs(chi_square(seconds, logits.softmax(-1).numpy())) < 4


def test_a_token_of_probability_zero_is_never_picked():
    weights = torch.zeros(4, 256)
    weights[0, 255] = weights[1, 0] = 1                     # the ends
    weights[2, 64:128:2] = torch.rand(32, generator=torch.Generator().manual_seed(0)) * 1e-30
    weights[3, ::3] = 1
    edges = [0.5 / 2**32, 1e-7, 0.25, 1 / 3, 0.5, 0.999999, 1 - 0.5 / 2**32]
    for uniform in edges:
        picked = pick(weights, torch.full((4, 1), uniform, dtype=torch.float64))
        assert (weights.gather(1, picked) > 0).all(), f"uniform {uniform} picked {picked.tolist()}"


def test_pick_inverts_the_cumulative_distribution():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 640, generator=generator) ** 8
    uniforms = torch.rand(500, 1, generator=generator, dtype=torch.float64)
    exact = weights.double().cumsum(-1)
    exact = torch.searchsorted(exact, uniforms * exact[:, -1:], right=True)
    assert (pick(weights, uniforms) == exact).float().mean() > 0.99, "fp32 rounding moves few"


def test_uniforms_are_uniform_and_unrelated():
    numbers = row_uniforms(0, range(300), 200)
    assert 0 < numbers.min() and numbers.max() < 1
    assert abs(chi_square(np.histogram(numbers, 100, (0, 1))[0], np.full(100, 0.01))) < 4
    for name, a, b in (("rows", numbers[1:], numbers[:-1]), ("tokens", numbers[:, 1:],
                       numbers[:, :-1]), ("seeds", row_uniforms(1, range(300), 200), numbers)):
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.size), f"neighbouring {name}: {correlation:.4f}"
    part = row_uniforms(0, [7, 299], 50)
    assert (part == numbers[[7, 299], :50]).all(), "a number depends on seed, row and token alone"
    row_uniforms(-1, [0], 1), row_uniforms(2**80, [2**40], 1)       # any int is a seed


def test_every_eos_id_ends_a_row_and_is_included():
    model = tiny()
    completions = generate(model, PROMPTS, group_size=20, max_new_tokens=60, eos_ids=EOS, seed=1)
    for completion in completions:
        assert not set(completion.ids[:-1]) & set(EOS), "a row went on after its EOS"
        assert completion.finished == (completion.ids[-1] in EOS)
        assert completion.finished or len(completion.ids) == 60
        assert len(completion.logprobs) == len(completion.ids)
    ends = {c.ids[-1] for c in completions if c.finished}
    assert ends == set(EOS), f"only {ends} of {EOS} ended a row"


def test_eos_as_the_last_token_allowed_is_finished():
    model = tiny()
    full, = generate(model, [[5, 6]], max_new_tokens=8, seed=4)
    assert not full.finished and len(full.ids) == 8
    last = full.ids[-1]
    assert last not in full.ids[:-1], "choose another seed: the last id must be new"
    assert generate(model, [[5, 6]], max_new_tokens=8, seed=4, eos_ids=[last])[0].finished


def test_no_prompts_give_no_completions():
    assert generate(tiny(), [], max_new_tokens=5) == []


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_greedy_equals_transformers(model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(model_type, real_vocab_size=131)
    model.save_pretrained(tmp_path / "model")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model",
                                                              dtype=torch.float32)
    ours = generate(model, PROMPTS, max_new_tokens=40, temperature=0, eos_ids=[3])
    for prompt, completion in zip(PROMPTS, ours):
        given = torch.tensor([prompt])
        theirs = other.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                max_new_tokens=40, eos_token_id=[3],
                                pad_token_id=0)[0, len(prompt):].tolist()
        assert completion.ids == theirs
    assert_logprobs(model, PROMPTS, ours)       # of temperature 1


def test_padded_vocabulary_rows_are_never_sampled():
    model = tiny(real_vocab_size=100, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[100:] = model.lm_head.weight[:31] * 5      # likely, were they real
    for temperature in (0, 1, 3):
        rows = generate(model, PROMPTS, group_size=8, max_new_tokens=30, temperature=temperature)
        assert max(max(row.ids) for row in rows) < 100
        assert_logprobs(model, PROMPTS, rows, temperature or 1)


def test_refresh_follows_the_model_and_nothing_else_does():
    model = tiny("qwen3", tie_word_embeddings=False)
    sampler = Sampler(model)
    options = {"max_new_tokens": 10, "seed": 1}
    before = sampler.generate(PROMPTS, **options)
    addresses = [weight.data_ptr() for weight in sampler.decoder.weights.values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert sampler.generate(PROMPTS, **options) == before, "a half-done update must not be sampled"
    sampler.refresh()
    after = sampler.generate(PROMPTS, **options)
    assert_logprobs(model, PROMPTS, after)
    assert after != before
    assert addresses == [weight.data_ptr() for weight in sampler.decoder.weights.values()], \
        "refresh must write in place: captured graphs read these addresses"


def test_top_p_keeps_the_fewest_likeliest_tokens():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
    assert (keep_top(probabilities, 0.65) > 0).tolist() == [[False, True, False, True],
                                                            [True, False, False, False]]
    model, prompt = tiny(), [5, 6, 7]
    rows = generate(model, [prompt], group_size=3000, max_new_tokens=1, top_p=0.5, seed=2)
    with torch.no_grad():
        values, order = model(torch.tensor([prompt]))[0, -1, :127].softmax(-1).sort(descending=True)
    count = int((values.cumsum(-1) < 0.5).sum()) + 1
    assert {row.ids[0] for row in rows} == set(order[:count].tolist())
    assert_logprobs(model, [prompt], rows[:50])         # of the whole distribution: the trainer's


def test_bf16_stays_near_fp32():
    model = tiny()
    rows = Sampler(model, torch.bfloat16).generate(PROMPTS, group_size=4, max_new_tokens=20)
    assert_logprobs(model, PROMPTS, rows, tolerance=0.3)
    gaps = [abs(a - b) for row, c in enumerate(rows) for a, b in zip(
        c.logprobs, expected_logprobs(model, PROMPTS[row // 4], c.ids).tolist())]
    assert np.mean(gaps) < 0.03, f"mean gap {np.mean(gaps):.3f}"


def test_sampling_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = generate(tiny(), PROMPTS, max_new_tokens=4)
    assert (torch.random.get_rng_state() == state).all()
    torch.manual_seed(99)
    assert generate(tiny(), PROMPTS, max_new_tokens=4) == first


def test_progress_hears_of_every_id_once():
    heard = {}
    rows = generate(tiny(), PROMPTS, group_size=3, max_new_tokens=20, eos_ids=EOS,
                    progress=lambda row, new: heard.setdefault(row, []).extend(new))
    assert [heard[row] for row in range(15)] == ids(rows)


@pytest.mark.parametrize("options, words", [
    ({"prompts": [[1], []]}, "prompt 1 is empty"),
    ({"prompts": [[1, 131]]}, "prompt 0 has ids from 1 to 131"),
    ({"prompts": [[-1]]}, "vocabulary is 0 to 130"),
    ({"temperature": -1}, "temperature -1"),
    ({"temperature": math.nan}, "temperature nan"),
    ({"top_p": 0}, "top_p 0"),
    ({"top_p": 1.5}, "top_p 1.5"),
    ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"group_size": 0}, "group_size is 0"),
    ({"max_batch": -1}, "max_batch -1"),
    ({"max_new_tokens": 512}, "past the model's 512 positions"),
    ({"row_ids": [1, 2]}, "2 row_ids for 1 prompts"),
])
def test_bad_requests_are_one_clear_line(options, words):
    request = {"prompts": [[1]], "max_new_tokens": 5, **options}
    with pytest.raises(ValueError) as error:
        generate(tiny(), request.pop("prompts"), **request)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_too_little_memory_means_smaller_waves_then_a_clear_line(monkeypatch):
    model = tiny()
    options = {"group_size": 8, "max_new_tokens": 20}
    expected = ids(generate(model, PROMPTS, **options))
    monkeypatch.setattr(sample, "free_memory", lambda device: 500_000)
    sampler = Sampler(model)
    sizes = []
    whole_wave = sampler._sample_wave
    monkeypatch.setattr(sampler, "_sample_wave", lambda request, rows: (
        sizes.append(len(rows)), whole_wave(request, rows)))
    assert ids(sampler.generate(PROMPTS, **options)) == expected
    assert len(sizes) > 1 and sum(sizes) == 40, sizes
    for free, more in ((1000, {}), (500_000, {"max_batch": 40})):
        monkeypatch.setattr(sample, "free_memory", lambda device: free)
        with pytest.raises(ValueError, match=r"need .* GB and .* GB are free"):
            sampler.generate(PROMPTS, **options, **more)


def test_logits_that_are_not_finite_are_reported():
    model = tiny()
    with torch.no_grad():
        model.model["norm"].weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPTS, max_new_tokens=3)


@pytest.mark.parametrize("arguments", [["hello"], ["hello", "--model", "no/such/folder"]])
def test_the_command_reports_errors_in_one_line(arguments):
    run = subprocess.run([sys.executable, "sample.py", *arguments], cwd=ROOT, text=True,
                         capture_output=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("sample.py: ") and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.checkpoint
def test_real_checkpoints_are_sampled_as_they_compute(checkpoints):
    from model import Tokenizer
    for folder in checkpoints:
        model, tokenizer = GPT.from_pretrained(folder), Tokenizer.from_pretrained(folder)
        prompts = [tokenizer.encode(text) for text in ("def add(a, b):", "The capital of France")]
        assert_logprobs(model, prompts, generate(model, prompts, group_size=2, max_new_tokens=32,
                                                 eos_ids=tokenizer.eos_ids), tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_cuda_graphs_sample_as_the_model_computes(model_type):
    model = tiny(model_type)
    expected = tiny(model_type)
    sampler = Sampler(model.to("cuda"))
    options = {"group_size": 8, "max_new_tokens": 200, "eos_ids": [3], "seed": 2}
    first = sampler.generate(PROMPTS, **options)
    assert sampler.graphs, "decoding must run from captured graphs"
    assert_logprobs(expected, PROMPTS, first, tolerance=1e-3)
    with torch.no_grad():
        for parameter in (*model.parameters(), *expected.parameters()):
            parameter.mul_(1.05)
    sampler.refresh()
    assert_logprobs(expected, PROMPTS, sampler.generate(PROMPTS, **options), tolerance=1e-3)
