"""GRPO's advantages, log-probs, loss and update.     python -m pytest tests/test_grpo.py

Everything runs on a model of two layers with random weights. Numbers of TRL are replayed from
tests/trl_reference.json, which tests/trl_reference.py wrote.
"""
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import grpo
import logprobs as logprobs_module
import model as model_module
from grpo import completion_logprobs, group_advantages, policy_loss, update
from logprobs import TokenLogprobs
from model import GPT, Config
from tests.trl_reference import MAX_LENGTH, REWARDS, SHAPE, TEMPERATURE, fill
from tests.trl_reference import inputs as reference_inputs

REFERENCE = json.loads(Path(__file__).with_name("trl_reference.json").read_text())
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
COMPLETIONS = [[20, 21, 22, 1], [23], [24, 25, 26, 27, 28, 29], [],
               [30, 1], [31, 32, 33], [34, 35, 36, 37, 38], [20, 1],
               [39, 39, 39], [3], [1, 1], [25, 26, 27, 28]]     # 1 is EOS and pad at once


@dataclass
class Sampled:
    """What sample.Completion has, as far as the update reads it."""
    ids: list
    logprobs: list
    finished: bool = True


def tiny(model_type="qwen2", real_vocab_size=40, scale=8.0, **shape):
    """A random model of two layers; `scale` makes its log-probs differ well from uniform ones."""
    config = Config(model_type=model_type, **{**SHAPE, "hidden_size": 16, "head_dim": 4, **shape})
    made = GPT(config, seed=3)
    made.real_vocab_size = real_vocab_size
    for parameter in made.parameters():
        if parameter.dim() == 2:
            parameter.data *= scale
    return made


@pytest.fixture
def float64(monkeypatch):
    """RMSNorm without its cast to fp32, whose rounding would hide an error of the layout."""
    def rms_norm(x, weight, eps):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    monkeypatch.setattr(model_module, "rms_norm", rms_norm)


def plain_logprobs(model, prompts, completions, temperature=1.0):
    """The log-probs that completion_logprobs stands for, by the full logits, one row at a time."""
    group_size, rows = len(completions) // len(prompts), []
    for number, ids in enumerate(completions):
        prompt = prompts[number // group_size]
        if not ids:
            rows.append((torch.zeros(0), torch.zeros(0)))
            continue
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1, :model.real_vocab_size]
        logs = (logits / temperature).log_softmax(-1)
        rows.append((logs.gather(1, torch.tensor(ids)[:, None])[:, 0],
                     -(logs.exp() * logs).sum(-1)))
    return rows


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def rollouts(model, prompts=PROMPTS, completions=COMPLETIONS):
    with torch.no_grad():
        logs = completion_logprobs(model, prompts, completions)[0].tolist()
    return [Sampled(ids, row[:len(ids)]) for ids, row in zip(completions, logs)]


def spread_advantages(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return group_advantages(torch.rand(3, 4, generator=generator))


def update_gradient(monkeypatch, model, advantages, **options):
    """Gradient that `update` hands to the optimiser, and its metrics; the model stays as it is."""
    seen = {}

    class Recorder(torch.optim.SGD):
        def step(self):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    metrics = update(model, Recorder(model.parameters(), lr=0.0), PROMPTS, rollouts(model),
                     advantages, **{"max_grad_norm": math.inf, **options})
    return seen, metrics


def assert_same_gradient(found, wanted, tolerance, why):
    assert found.keys() == wanted.keys() and wanted
    worst = max((found[name] - wanted[name]).abs().max().item() for name in wanted)
    largest = max(value.abs().max().item() for value in wanted.values())
    assert largest > 0 and worst <= tolerance * largest, f"{why}: off by {worst} of {largest}"


# ---------------------------------------------------------------------------- advantages

def test_advantages_are_the_formula():
    rewards = torch.tensor([[0.0, 1.0, 0.25, 0.5], [0.9, 0.2, 0.4, 0.4]])
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    assert torch.allclose(group_advantages(rewards), wanted, atol=1e-6), "(r - mean) / (std + 1e-6)"


def test_equal_rewards_give_exactly_zero():
    rewards = torch.full((3, 5), 0.1)
    assert (rewards - rewards.mean(1, keepdim=True)).abs().max() >= 0
    assert group_advantages(rewards).eq(0).all(), "residue of the mean must not become an advantage"


def test_a_tiny_true_spread_is_kept():
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0 - 1e-6]], dtype=torch.float64)
    assert group_advantages(rewards).ne(0).all(), "zero spread means equal, not nearly equal"


def test_a_lost_sample_leaves_the_statistics():
    rewards = torch.tensor([[0.0, 1.0, float("nan"), 0.5]])
    found = group_advantages(rewards)
    assert found[0, 2] == 0, "a lost sample's advantage is 0"
    kept = group_advantages(torch.tensor([[0.0, 1.0, 0.5]]))
    assert torch.allclose(found[0, [0, 1, 3]], kept[0]), "the others' must ignore it"


def test_groups_with_one_or_no_sample_left_are_zero():
    nan = float("nan")
    found = group_advantages(torch.tensor([[nan, 1.0, nan], [nan, nan, nan]]))
    assert found.eq(0).all(), "one sample has no spread: Bessel's std of it would be NaN"


@pytest.mark.parametrize("shape", [(4, 1), (4,), (2, 0)])
def test_a_group_of_one_is_refused(shape):
    with pytest.raises(ValueError, match="group size of at least 2"):
        group_advantages(torch.zeros(shape))


def test_each_group_uses_its_own_statistics():
    low, high = torch.tensor([[0.0, 0.1, 0.2]]), torch.tensor([[10.0, 10.1, 10.2]])
    both = group_advantages(torch.cat([low, high]).double())
    assert torch.allclose(both[0], both[1], atol=1e-4), "another prompt's level is irrelevant"


# ---------------------------------------------------------------------------- TRL's numbers

@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_equal_trl(scale):
    rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in REWARDS])
    found = group_advantages(rewards, normalize_std=scale == "group", eps=1e-4)
    wanted = torch.tensor(REFERENCE["advantages"][scale]).view(found.shape)
    assert torch.allclose(found, wanted, atol=1e-5), "TRL's eps is 1e-4, all else is the same"


@pytest.fixture(scope="module")
def reference():
    """The tiny llama of trl_reference.py with its inputs, by our own code."""
    model = GPT(Config(model_type="llama", **SHAPE))
    fill(model.named_parameters())
    prompts, completions, old_steps, ref_steps, advantages = reference_inputs()
    return model, prompts, completions, old_steps, ref_steps, torch.tensor(advantages)


def test_logprobs_and_entropy_equal_trl(reference):
    model, prompts, completions = reference[:3]
    found, entropy, mask = completion_logprobs(model, prompts, completions, TEMPERATURE)
    for name, values in (("logprobs", found), ("entropy", entropy)):
        wanted = torch.tensor([x for row in REFERENCE[name] for x in row])
        assert torch.allclose(values[mask], wanted, atol=1e-5), f"{name} differ from TRL's"


@pytest.mark.parametrize("case", REFERENCE["cases"],
                         ids=lambda c: f"{c['loss_type']}-{c['kl_coef']}-{c['clip_high']}")
def test_losses_equal_trl(reference, case):
    model, prompts, completions, old_steps, ref_steps, advantages = reference
    model.zero_grad()
    found, _, mask = completion_logprobs(model, prompts, completions, TEMPERATURE)
    old, ref = found.detach().clone(), found.detach().clone()
    old[mask] += torch.tensor([x for row in old_steps for x in row])
    ref[mask] += torch.tensor([x for row in ref_steps for x in row])
    weight, tokens = mask.float(), None
    if case["loss_type"] == "grpo":             # every completion weighs the same
        weight = weight / mask.sum(1, keepdim=True)
    if case["loss_type"] == "dr_grpo":          # a constant length
        tokens = len(completions) * MAX_LENGTH
    loss, metrics = policy_loss(found, old, advantages, weight, clip_high=case["clip_high"],
                                dual_clip=None, ref_logprobs=ref if case["kl_coef"] else None,
                                kl_coef=case["kl_coef"], num_tokens=tokens)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
    assert abs(loss.item() - case["loss"]) < 1e-5, "the loss differs from TRL's"
    assert abs(norm / case["grad_norm"] - 1) < 1e-4, "the gradient's norm differs from TRL's"
    if case["kl_coef"] and case["loss_type"] != "grpo":
        assert abs(metrics["kl"].item() - case["kl"]) < 1e-5, "the KL differs from TRL's"


# ---------------------------------------------------------------------------- log-probs

@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_prompt_once_equals_the_plain_layout(float64, model_type):
    model = tiny(model_type).double()
    found, entropy, mask = completion_logprobs(model, PROMPTS, COMPLETIONS, temperature=0.7)
    rows = plain_logprobs(model, PROMPTS, COMPLETIONS, temperature=0.7)
    wanted, wanted_entropy = (torch.cat(parts) for parts in zip(*rows))
    assert (found[mask] - wanted).abs().max() < 1e-9, "log-probs"
    assert (entropy[mask] - wanted_entropy).abs().max() < 1e-9, "entropies"
    weight = torch.linspace(-1, 1, len(wanted), dtype=torch.float64)
    (found[mask] * weight).sum().backward()
    shared = gradients(model)
    (wanted * weight).sum().backward()
    assert_same_gradient(shared, gradients(model), 1e-9, "gradient flows into the shared prompt")


def test_recomputing_activations_changes_nothing():
    model, found = tiny(), []
    for checkpoint in (False, True):
        completion_logprobs(model, PROMPTS, COMPLETIONS, checkpoint=checkpoint)[0].sum().backward()
        found.append(gradients(model))
    assert_same_gradient(found[1], found[0], 1e-6, "checkpoint=True")


def test_completions_of_one_prompt_do_not_see_each_other():
    model = tiny()
    found = completion_logprobs(model, PROMPTS, COMPLETIONS)[0]
    changed = copy.deepcopy(COMPLETIONS)
    changed[2] = [9, 9, 9, 9, 9, 9]
    other = completion_logprobs(model, PROMPTS, changed)[0]
    assert torch.allclose(found[[0, 1, 3]], other[[0, 1, 3]], atol=1e-6), "a row saw its neighbour"
    assert not torch.allclose(found[2], other[2])


def test_the_mask_counts_every_id_and_the_rest_is_finite():
    found, entropy, mask = completion_logprobs(tiny(), PROMPTS, COMPLETIONS)
    assert mask.sum(1).tolist() == [len(ids) for ids in COMPLETIONS], "EOS and pad ids count too"
    for values in (found, entropy):
        assert values.shape == (12, 6) and values.dtype == torch.float32
        assert values.isfinite().all() and values[~mask].eq(0).all()


def test_an_id_is_predicted_from_the_position_before_it():
    model = tiny()
    found = completion_logprobs(model, [[5, 6, 7]], [[20, 21]])[0][0]
    logs = model(torch.tensor([[5, 6, 7, 20, 21]]))[0, :, :model.real_vocab_size].log_softmax(-1)
    assert torch.allclose(found, torch.stack([logs[2, 20], logs[3, 21]]), atol=1e-5), \
        "the prompt's last position predicts the first id"


def test_padding_rows_of_the_vocabulary_take_no_part():
    model = tiny(real_vocab_size=40, tie_word_embeddings=False)
    before = completion_logprobs(model, PROMPTS, COMPLETIONS)[0].detach()
    with torch.no_grad():
        model.lm_head.weight[40:] += 100.0
    after = completion_logprobs(model, PROMPTS, COMPLETIONS)[0]
    assert torch.equal(before, after.detach()), "ids past the tokenizer's end can't be sampled"
    after.sum().backward()
    assert model.lm_head.weight.grad[40:].eq(0).all()


def test_temperature_divides_the_logits():
    model = tiny()
    warm, entropy, mask = completion_logprobs(model, PROMPTS, COMPLETIONS, temperature=2.0)
    rows = plain_logprobs(model, PROMPTS, COMPLETIONS, temperature=2.0)
    assert torch.allclose(warm[mask], torch.cat([row[0] for row in rows]), atol=1e-5)
    greedy, plain = (completion_logprobs(model, PROMPTS, COMPLETIONS, t)[0] for t in (0.0, 1.0))
    assert torch.equal(greedy, plain), "at temperature 0 log-probs are those at temperature 1"


def test_chunks_do_not_change_values_or_gradients(monkeypatch):
    model, found = tiny(), []
    for logits in (1, 3 * 40, 2 ** 24):         # chunks of 1 position, of 3, of all
        monkeypatch.setitem(logprobs_module.LOGITS_AT_ONCE, "cpu", logits)
        values = completion_logprobs(model, PROMPTS, COMPLETIONS)[0]
        (values * torch.arange(6)).sum().backward()
        found.append((values.detach(), gradients(model)))
    for values, gradient in found[:2]:
        assert torch.allclose(values, found[2][0], atol=1e-5)
        assert_same_gradient(gradient, found[2][1], 1e-5, "gradient depends on the chunk size")


def test_chunked_gradient_is_the_numerical_one(monkeypatch):
    monkeypatch.setitem(logprobs_module.LOGITS_AT_ONCE, "cpu", 2 * 11)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 6, generator=generator, dtype=torch.float64,
                                  requires_grad=True) for rows in (5, 11))
    targets = torch.tensor([0, 3, 10, 3, 7])
    assert torch.autograd.gradcheck(
        lambda h, w: TokenLogprobs.apply(h, w, targets, 0.7)[0], (hidden, weight))


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_gradient_equals_finite_differences(float64, name):
    model = tiny(scale=4.0).double()
    parameter = dict(model.named_parameters())[name]
    advantages = torch.linspace(-1, 1, 12, dtype=torch.float64)
    old = completion_logprobs(model, PROMPTS, COMPLETIONS)[0].detach() + 0.05

    def loss():
        found, _, mask = completion_logprobs(model, PROMPTS, COMPLETIONS)
        return policy_loss(found, old, advantages, mask, ref_logprobs=old - 0.2, kl_coef=0.1)[0]

    loss().backward()
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    slope = (parameter.grad * direction).sum().item()
    with torch.no_grad():
        parameter += 1e-6 * direction
        above = loss().item()
        parameter -= 2e-6 * direction
        below = loss().item()
    assert abs((above - below) / 2e-6 - slope) <= 1e-6 * max(1.0, abs(slope)), name


@pytest.mark.parametrize("prompts, completions, message", [
    (PROMPTS, COMPLETIONS[:4], "not a multiple"), ([], [[1]], "not a multiple"), ([[]], [[1]], "prompt is empty")])
def test_bad_rows_are_refused_in_one_line(prompts, completions, message):
    with pytest.raises(ValueError, match=message) as error:
        completion_logprobs(tiny(), prompts, completions)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompts, completions, shape", [
    ([], [], (0, 0)), ([[1], [2]], [], (0, 0)), ([[1]], [[], []], (2, 0)), ([[1]], [[3]], (1, 1))])
def test_small_and_empty_batches(prompts, completions, shape):
    for values in completion_logprobs(tiny(), prompts, completions):
        assert values.shape == shape


# ---------------------------------------------------------------------------- the loss

def batch(seed=0, rows=4, width=5):
    generator = torch.Generator().manual_seed(seed)
    logs, old, ref = (-torch.rand(rows, width, generator=generator) for _ in range(3))
    mask = torch.arange(width) < torch.tensor([5, 3, 1, 4]).unsqueeze(1)
    return logs.requires_grad_(), old, ref, torch.tensor([1.0, -1.0, 0.5, -2.0]), mask


def test_first_update_has_ratio_one_and_reinforce_gradient():
    logs, _, _, advantages, mask = batch()
    loss, metrics = policy_loss(logs, logs.detach(), advantages, mask)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0
    wanted = -(advantages.unsqueeze(1) * mask).sum() / mask.sum()
    assert torch.allclose(loss, wanted), "the loss is minus the mean advantage"
    loss.backward()
    assert torch.allclose(logs.grad, -advantages.unsqueeze(1) * mask / mask.sum()), \
        "and its gradient is REINFORCE's, not 0"


def test_clipping_stops_the_gradient_on_the_profitable_side_alone():
    ratio = torch.tensor([[0.5, 1.0, 1.25, 1.4, 2.9, 3.5]])
    for advantage, moves in ((1.0, [1, 1, 1, 0, 0, 0]), (-1.0, [0, 1, 1, 1, 1, 0])):
        logs = ratio.log().requires_grad_()
        loss, metrics = policy_loss(logs, torch.zeros_like(logs), torch.tensor([advantage]),
                                    torch.ones_like(logs), clip_low=0.2, clip_high=0.3)
        loss.backward()
        assert logs.grad.ne(0).int().tolist() == [moves], "0.2/0.3 and the dual clip at 3"
        assert metrics["clip_fraction"] == pytest.approx(3 / 6 if advantage > 0 else 1 / 6)


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    logs = torch.tensor([[2.0]])
    options = [torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1)]
    assert policy_loss(logs, *options)[0].item() == pytest.approx(3.0)
    assert policy_loss(logs, *options, dual_clip=None)[0].item() == pytest.approx(math.exp(2))


def test_k3_has_the_gradient_of_the_kl_from_the_reference():
    # in expectation over the policy, k3's own gradient is that of KL(ref || policy)
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logs, ref_logs = logits.log_softmax(0), ref.log_softmax(0)
    chances = logs[None].exp().detach()         # as a mask: the expectation over the policy
    loss, metrics = policy_loss(logs[None], logs[None].detach(), torch.zeros(1), chances,
                                ref_logprobs=ref_logs[None], kl_coef=1.0, num_tokens=1)
    assert metrics["kl"].item() == pytest.approx((logs.exp() * (logs - ref_logs)).sum().item()), \
        "its value is KL(policy || ref)"
    found, = torch.autograd.grad(loss, logits, retain_graph=True)
    wanted, = torch.autograd.grad((ref_logs.exp() * (ref_logs - logs)).sum(), logits)
    assert torch.allclose(found, wanted), "its gradient is that of KL(ref || policy)"


def test_k3_is_clamped_as_in_the_official_code():
    logs = torch.tensor([[-30.0, -2.0]], requires_grad=True)
    loss, metrics = policy_loss(logs, logs.detach(), torch.zeros(1), torch.ones(1, 2), kl_coef=1.0,
                                ref_logprobs=torch.tensor([[-1.0, -2.5]]))
    loss.backward()
    small = math.exp(-0.5) + 0.5 - 1
    assert metrics["kl"].item() == pytest.approx((10 + small) / 2) and logs.grad[0, 0] == 0


def test_masked_slots_are_inert_whatever_they_hold():
    logs, old, ref, advantages, mask = batch()
    mask[3] = False
    clean, _ = policy_loss(logs, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1)
    clean.backward()
    wanted = logs.grad.clone()
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        bad, bad_old, bad_ref = (torch.where(mask, x.detach(), poison) for x in (logs, old, ref))
        bad.requires_grad_()
        advantages[3] = poison
        loss, metrics = policy_loss(bad, bad_old, advantages, mask, ref_logprobs=bad_ref,
                                    kl_coef=0.1)
        loss.backward()
        assert torch.equal(loss, clean), f"{poison} in a masked slot changed the loss"
        assert torch.equal(bad.grad, wanted), f"{poison} in a masked slot reached the gradient"
        assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_any_kind_of_mask_and_any_divisor(dtype):
    logs, old, _, advantages, mask = batch()
    loss, _ = policy_loss(logs, old, advantages, mask.to(dtype))
    shared, _ = policy_loss(logs, old, advantages, mask.to(dtype), num_tokens=26)
    assert torch.allclose(loss * mask.sum() / 26, shared), "num_tokens replaces mask.sum()"


def test_nothing_counted_is_a_loss_of_zero():
    logs, old, _, advantages, mask = batch()
    loss, _ = policy_loss(logs, old, advantages, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and logs.grad.eq(0).all()


def test_a_kl_without_its_reference_is_refused():
    logs, old, _, advantages, mask = batch()
    with pytest.raises(ValueError, match="ref_logprobs is missing"):
        policy_loss(logs, old, advantages, mask, kl_coef=0.01)


def test_an_overflowing_ratio_stays_finite():
    logs = torch.tensor([[0.0, -500.0]], requires_grad=True)
    old = torch.tensor([[-500.0, 0.0]])
    loss, _ = policy_loss(logs, old, torch.tensor([-1.0]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and logs.grad.isfinite().all()


# ---------------------------------------------------------------------------- the update

def test_micro_batches_never_change_the_gradient(monkeypatch):
    model, found = tiny(), []
    for budget, count in ((10 ** 6, 1), (25, 2), (1, 3)):
        gradient, metrics = update_gradient(monkeypatch, model, spread_advantages(),
                                            micro_batch_tokens=budget)
        assert metrics["micro_batches"] == count
        found.append((gradient, metrics))
    for gradient, metrics in found[1:]:
        assert_same_gradient(gradient, found[0][0], 1e-5, "the divisor is the whole update's")
        for name in ("loss", "entropy", "ratio", "grad_norm"):
            assert metrics[name] == pytest.approx(found[0][1][name], abs=1e-5), name


def test_the_update_is_policy_loss_over_all_completions(monkeypatch):
    model, advantages = tiny(), spread_advantages()
    gradient, metrics = update_gradient(monkeypatch, model, advantages)
    found, entropy, mask = completion_logprobs(model, PROMPTS, COMPLETIONS)
    loss, _ = policy_loss(found, found.detach(), advantages.flatten(), mask)
    loss.backward()
    assert_same_gradient(gradient, gradients(model), 1e-5, "update")
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-5)
    assert metrics["tokens"] == mask.sum() and metrics["logprob_gap"] < 1e-5


def test_dropped_groups_leave_the_divisor(monkeypatch):
    model, advantages = tiny(), spread_advantages()
    advantages[1] = 0
    gradient, metrics = update_gradient(monkeypatch, model, advantages)
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    found, _, mask = completion_logprobs(model, [PROMPTS[0], PROMPTS[2]],
                                         [COMPLETIONS[row] for row in rows])
    policy_loss(found, found.detach(), advantages.flatten()[rows], mask)[0].backward()
    assert_same_gradient(gradient, gradients(model), 1e-5, "a group without spread leaves the mean")
    assert metrics["dropped_groups"] == 1


def test_lost_and_truncated_completions_count_for_nothing(monkeypatch):
    model, advantages, lost = tiny(), spread_advantages(), torch.zeros(3, 4, dtype=torch.bool)
    lost[0, 2] = True
    gradient, metrics = update_gradient(monkeypatch, model, advantages, lost=lost)
    found, _, mask = completion_logprobs(model, PROMPTS, COMPLETIONS)
    mask[2] = False
    policy_loss(found, found.detach(), advantages.flatten(), mask)[0].backward()
    wanted = gradients(model)
    assert_same_gradient(gradient, wanted, 1e-5, "a lost sample leaves loss and divisor")
    rows = rollouts(model)
    rows[2].finished = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cut = update(model, optimizer, PROMPTS, rows, advantages, mask_truncated=True)
    assert (cut["tokens"], cut["loss"]) == (metrics["tokens"], pytest.approx(metrics["loss"]))
    assert update(model, optimizer, PROMPTS, rows, advantages)["tokens"] == metrics["tokens"] + 6


def test_a_step_at_the_papers_rate_changes_fp32_weights_but_not_bf16_ones():
    model, narrow = tiny(scale=1.0), tiny(scale=1.0).bfloat16()
    changed = {}
    for name, which in (("fp32", model), ("bf16", narrow)):
        before = [p.detach().clone() for p in which.parameters()]
        update(which, torch.optim.AdamW(which.parameters(), lr=1e-6, weight_decay=0.0), PROMPTS,
               rollouts(which), spread_advantages())
        moved = sum((p != b).sum().item() for p, b in zip(which.parameters(), before))
        changed[name] = moved / sum(b.numel() for b in before)
    assert changed["fp32"] > 0.8, "masters must be fp32: a step of 1e-6 has to change them"
    assert changed["bf16"] < 0.2, "bf16 weights would round nearly every step of 1e-6 away"


def test_bf16_compute_keeps_fp32_weights_and_nearly_the_same_gradient(monkeypatch):
    model = tiny(scale=4.0)
    wide, _ = update_gradient(monkeypatch, model, spread_advantages())
    narrow, metrics = update_gradient(monkeypatch, model, spread_advantages(), dtype=torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in narrow.values())
    flat = [torch.cat([value.flatten() for value in found.values()]) for found in (wide, narrow)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99 and metrics["logprob_gap"] < 0.05


def test_a_non_finite_update_is_skipped_and_counted():
    model, advantages = tiny(), spread_advantages()
    advantages[0, 0] = math.nan
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metrics = update(model, optimizer, PROMPTS, rollouts(model), advantages)
    assert (metrics["skipped"], metrics["updates"]) == (1, 0) and metrics["loss"] is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert update(model, optimizer, PROMPTS, rollouts(model), spread_advantages())["updates"] == 1


def test_nothing_to_learn_is_no_update():
    model = tiny()
    metrics = update(model, torch.optim.AdamW(model.parameters()), PROMPTS, rollouts(model),
                     torch.zeros(3, 4))
    assert metrics["updates"] == metrics["tokens"] == metrics["skipped"] == 0
    assert metrics["dropped_groups"] == 3 and metrics["loss"] is metrics["grad_norm"] is None


def test_gradient_norm_is_clipped_and_reported_before():
    model, plain = tiny(), tiny()
    norms = {}
    for which, limit in ((model, 1e-3), (plain, math.inf)):
        start = [p.detach().clone() for p in which.parameters()]
        metrics = update(which, torch.optim.SGD(which.parameters(), lr=1.0), PROMPTS,
                         rollouts(which), spread_advantages(), max_grad_norm=limit)
        moved = sum((p - s).square().sum() for p, s in zip(which.parameters(), start)).sqrt().item()
        norms[limit] = (metrics["grad_norm"], moved)
    assert norms[1e-3][0] == norms[math.inf][0], "the reported norm is the one before clipping"
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


def test_several_updates_use_the_log_probs_from_before_the_first(monkeypatch):
    model, advantages = tiny(), spread_advantages()
    start = completion_logprobs(model, PROMPTS, COMPLETIONS)[0].detach()
    calls = []

    def spy(logprobs, old_logprobs, *rest, **options):
        calls.append((logprobs.detach(), old_logprobs))
        return policy_loss(logprobs, old_logprobs, *rest, **options)

    monkeypatch.setattr(grpo, "policy_loss", spy)
    metrics = update(model, torch.optim.SGD(model.parameters(), lr=0.01), PROMPTS, rollouts(model),
                     advantages, updates=3)
    assert metrics["updates"] == len(calls) == 3
    for number, (new, old) in enumerate(calls):
        wanted = start[4 * number:4 * number + 4, :old.shape[1]]
        assert torch.allclose(old, wanted, atol=1e-5), "old log-probs are those before any update"
        assert torch.equal(new, old) == (number == 0), "and only the first update starts at ratio 1"
    with pytest.raises(ValueError, match="do not split into 2 updates"):
        update(model, None, PROMPTS, rollouts(model), advantages, updates=2)


def test_the_kl_pulls_towards_the_reference():
    model, start = tiny(), tiny(scale=7.0)
    rows = rollouts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = dict(ref_model=start, kl_coef=1.0)
    kls = [update(model, optimizer, PROMPTS, rows, spread_advantages() * 1e-6, **options)["kl"]
           for _ in range(5)]
    assert kls[0] > 0 and kls[-1] < kls[0], "with next to no advantage the KL must fall"
    assert all(p.grad is None for p in start.parameters()), "the reference gets no gradient"
    with pytest.raises(ValueError, match="ref_logprobs is missing .*ref_model"):
        update(model, optimizer, PROMPTS, rows, spread_advantages(), kl_coef=1.0)


def test_learning_raises_the_probability_of_what_was_rewarded():
    model = tiny(scale=2.0)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    good = [0, 4, 8]
    before = completion_logprobs(model, PROMPTS, COMPLETIONS)[0].detach()[good].sum(1)
    for _ in range(10):
        update(model, optimizer, PROMPTS, rollouts(model), group_advantages(rewards))
    after = completion_logprobs(model, PROMPTS, COMPLETIONS)[0].detach()[good].sum(1)
    assert (after > before).all(), "advantages must reach the rows they belong to"


# ---------------------------------------------------------------------------- many processes

def four_groups():
    """PROMPTS and one whose group has no spread: rank 0 of 2 has two micro-batches, rank 1 one."""
    prompts, completions = PROMPTS + [[1, 2]], COMPLETIONS + [[2, 3], [4], [5, 6, 7], [8]]
    rows = rollouts(tiny(), prompts, completions)
    return prompts, rows, torch.cat([spread_advantages(), torch.zeros(1, 4)])


def train_a_shard(rank, world, folder):
    """What each process does: three updates on its half of the prompts, the model sharded."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=world)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    model = tiny()
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prompts, rows, advantages = four_groups()
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        metrics = update(model, optimizer, prompts[mine], rows[8 * rank:8 * rank + 8],
                         advantages[mine], micro_batch_tokens=1)
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    torch.save((metrics, weights), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(train_a_shard, args=(2, tmp_path), nprocs=2)
    (metrics, weights), (others, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert metrics == others, "every rank reports the whole update"
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        alone = update(model, optimizer, *four_groups())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, weights[name], atol=1e-6), f"{name} depends on the ranks"
    for name in ("loss", "entropy", "grad_norm", "logprob_gap"):
        assert metrics[name] == pytest.approx(alone[name], abs=1e-6), name
    assert metrics["tokens"] == alone["tokens"] and metrics["dropped_groups"] == 1
