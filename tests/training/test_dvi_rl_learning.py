"""What is collected, and the two steps, against slow obvious code: whole prefixes through the model, one draft at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoTokenizer

import tiny
from training import rl
from understudy.assets import pocket_path
from understudy.core.errors import UserError
from understudy.target.target import Target
from understudy.training.dvi_rl import inject_lora
from understudy.training.dvi_rl.adapters import DEEP, SHALLOW
from understudy.training.dvi_rl.buffer import Record, ReplayBuffer, Rollout
from understudy.training.dvi_rl.config import DviRlConfig
from understudy.training.dvi_rl.learner import Learner
from understudy.training.dvi_rl.rollout import Prompts, Sample, collect
from understudy.training.dvi_rl.update import fast_step, observed_text, policy, slow_step
from understudy.training.rollouts.trainer import BAD_STEPS

E, K, TOKENS = 2, 3, 14
PROMPT = tiny.prompt(9, seed=1)


def adapted(family="llama", deep=True, **overrides):
    adapters = inject_lora(rl.target(family, **overrides), E, rank=3, alpha=6.0, deep=deep)
    rl.stir(adapters, SHALLOW, std=0.05)
    if deep:
        rl.stir(adapters, DEEP, std=0.05)
    return adapters


def rollout_of(adapters, prompt=PROMPT, reference=(), tokens=TOKENS):
    return collect(adapters.target, adapters.drafter(K, 0.0), Sample(0, prompt, list(reference)), tokens)


def drafting_model(family, adapters):
    """A model whose first E layers have lora_S multiplied in; what it says after them is read off by `exit_logits`."""
    return rl.merged(family, adapters, SHALLOW)


def exit_logits(model, tokens):
    """[T, D] what the head reads after layer E, and its logits [T, V]."""
    state = model.get_decoder().norm(tiny.hidden_states(model, tokens)[E])
    logits = model.get_output_embeddings()(state)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return state, cap * torch.tanh(logits / cap) if cap else logits


@torch.inference_mode()
def slow_rollout(family, adapters, prompt, count):
    """(text, [(row, draft, reward, confidence, state)], nll) by greedy drafting and verifying without any cache."""
    drafts_with, verifies = drafting_model(family, adapters), rl.merged(family, adapters, DEEP)
    text, judged = list(prompt), []
    text.append(int(tiny.logits(verifies, text)[-1].argmax()))
    while (room := len(prompt) + count - len(text)) > 0:
        at, drafted = len(text), list(text)
        for _ in range(min(K, room - 1)):
            drafted.append(int(exit_logits(drafts_with, drafted)[1][-1].argmax()))
        law = tiny.logits(verifies, drafted).softmax(-1)
        states = exit_logits(drafts_with, drafted)[0]
        for row in range(at - 1, len(drafted) - 1):
            choice, draft = int(law[row].argmax()), drafted[row + 1]
            judged.append((row, draft, float(draft == choice), law[row, draft].item(), states[row]))
            text.append(choice)
            if draft != choice:
                break
        else:
            text.append(int(law[-1].argmax()))
    said = tiny.logits(verifies, text).log_softmax(-1)
    nll = -sum(said[i - 1, text[i]].item() for i in range(len(prompt), len(text)))
    return text, judged, nll


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_rollout_is_what_slow_speculation_gives(family):
    adapters = adapted(family)
    rewards = []
    for seed in range(3):
        prompt = tiny.prompt(7 + seed, seed=seed)
        rollout = rollout_of(adapters, prompt)
        text, judged, nll = slow_rollout(family, adapters, prompt, TOKENS)
        assert (rollout.tokens, rollout.prompt, rollout.new_tokens) == (text, len(prompt), TOKENS)
        assert [(r.row, r.draft_token, r.reward) for r in rollout.records] == [x[:3] for x in judged]
        for record, (*_, confidence, state) in zip(rollout.records, judged, strict=True):
            assert record.verifier_confidence == pytest.approx(confidence, rel=1e-3, abs=1e-6)
            torch.testing.assert_close(record.exit_hidden, state, rtol=1e-3, atol=1e-4)
            assert record.exit_hidden.dtype == torch.float32
        assert rollout.nll == pytest.approx(nll, rel=1e-4)
        rewards += [record.reward for record in rollout.records]
    assert {0.0, 1.0} == set(rewards), "both kinds of draft have to occur"


def test_nothing_is_recorded_beyond_a_stop_token():
    whole = inject_lora(rl.target(), 3, deep=False)  # often right, so blocks reach beyond a stop token
    output, _ = rl.speculate(whole.target, whole.drafter(K, 0.0), PROMPT, TOKENS)
    for end in sorted(set(output))[:6]:
        target = rl.target(eos_token_id=end)
        target.model.generation_config.eos_token_id = end
        again = inject_lora(target, 3, deep=False)
        rollout = collect(target, again.drafter(K, 0.0), Sample(0, PROMPT, []), TOKENS)
        assert rollout.tokens[rollout.prompt :] == output[: output.index(end) + 1]
        for record in rollout.records:
            assert record.row + 1 < len(rollout.tokens)
            assert record.reward == (rollout.tokens[record.row + 1] == record.draft_token)


def reference_policy_loss(family, adapters, rollouts, baseline):
    """-(1/N) sum (r - b) log pi by whole prefixes, one record at a time, through peft on a fresh Hugging Face model."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.fresh_model(family)
    maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=6.0, target_modules=maps, layers_to_transform=[0, 1], layers_pattern="layers")
    inject_adapter_in_model(config, model, adapter_name="x")
    named = dict(model.named_parameters())
    for key, tensor in adapters.get_peft_model_state_dict(SHALLOW).items():
        named[key.replace(".weight", ".x.weight")].data.copy_(tensor)
    terms = []
    for rollout in rollouts:
        for record in rollout.records:
            seen = []
            hook = model.get_decoder().layers[E].register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
            model(input_ids=torch.tensor([rollout.tokens[: record.row + 1]]), use_cache=False)
            hook.remove()
            logits = model.get_output_embeddings()(model.get_decoder().norm(seen[0][0, -1]))
            terms.append((record.reward - baseline) * logits.log_softmax(-1)[record.draft_token])
    loss = -sum(terms) / len(terms)
    loss.backward()
    loss = loss.detach()
    grads = {
        key: named[key.replace(".weight", ".x.weight")].grad for key in adapters.get_peft_model_state_dict(SHALLOW)
    }
    return float(loss), grads


def test_the_fast_step_has_the_gradient_of_the_slow_oracle():
    adapters = adapted(deep=False)
    rollouts = [rollout_of(adapters, tiny.prompt(6 + i, seed=i), tokens=8) for i in range(2)]
    loss, grads = reference_policy_loss("llama", adapters, rollouts, baseline=0.3)
    before = rl.weights(adapters, SHALLOW)
    step = fast_step(adapters.drafter(K), torch.optim.SGD(adapters.trainable(SHALLOW), lr=1.0), rollouts, 0.3, 0.0)
    assert step.loss == pytest.approx(loss, rel=1e-4)
    assert step.stepped
    assert step.hidden_error < 1e-4, "made again, the states are those that were stored"
    moved = {key: before[key] - now for key, now in rl.weights(adapters, SHALLOW).items()}
    for key, grad in grads.items():
        torch.testing.assert_close(moved[key], grad, rtol=1e-3, atol=1e-5)
    assert step.grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads.values())), rel=1e-3)


def test_the_slow_step_has_the_gradient_of_the_slow_oracle():
    """Cross-entropy and KL through the model's own forward, whose lora_D the step trains."""
    adapters = adapted()
    rollouts = [
        rollout_of(adapters, tiny.prompt(6, seed=0), [5, 6, 7]),
        rollout_of(adapters, tiny.prompt(8, seed=1), []),
    ]
    ce = kl = torch.zeros(())
    count = 0
    for rollout in rollouts:
        text = observed_text(rollout, "auto")
        logits = adapters.target.model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        log_p = logits[rollout.prompt - 1 : -1].log_softmax(-1)
        log_frozen = tiny.logits(tiny.model("llama"), text)[rollout.prompt - 1 : -1].log_softmax(-1)
        ce = ce + F.nll_loss(log_p, torch.tensor(text[rollout.prompt :]), reduction="sum")
        kl = kl + (log_p.exp() * (log_p - log_frozen)).sum()
        count += len(text) - rollout.prompt
    assert count == 3 + TOKENS
    loss = (ce + 0.7 * kl) / count
    named = {n.replace(".lora_D.", "."): p for n, p in adapters.target.model.named_parameters() if "lora_" in n}
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    before = rl.weights(adapters, DEEP)
    step = slow_step(adapters, torch.optim.SGD(adapters.trainable(DEEP), lr=1.0), rollouts, 0.7, "auto", max_norm=0.0)
    assert (step.loss, step.tokens) == (pytest.approx(loss.item(), rel=1e-4), count)
    assert step.ce == pytest.approx(ce.item() / count, rel=1e-4)
    assert step.kl == pytest.approx(kl.item() / count, rel=1e-3)
    assert step.kl > 1e-3, "an adapter that changes nothing has no distance to the frozen verifier"
    for key, now in rl.weights(adapters, DEEP).items():
        torch.testing.assert_close(before[key] - now, grads[key], rtol=1e-3, atol=1e-5)


def test_observed_tokens():
    rollout = Rollout([1, 2, 3, 4, 5], prompt=2, reference=[8, 9])
    assert observed_text(rollout, "auto") == [1, 2, 8, 9]
    assert observed_text(rollout, "committed") == [1, 2, 3, 4, 5]
    rollout.reference = []
    assert observed_text(rollout, "auto") == [1, 2, 3, 4, 5]


def test_accepted_tokens_become_more_probable_and_rejected_ones_less():
    adapters = inject_lora(rl.target(), 3, rank=3, alpha=6.0, deep=False)
    drafter = adapters.drafter(K, 0.0)
    rollouts = [collect(adapters.target, drafter, Sample(i, tiny.prompt(7, seed=i), []), 24) for i in range(3)]
    reward = torch.tensor([record.reward for rollout in rollouts for record in rollout.records])
    assert min(reward.sum(), (1 - reward).sum()) >= 8

    def log_pi():
        return torch.cat([policy(drafter, rollout)[0].detach() for rollout in rollouts])

    before = log_pi()
    optimizer = torch.optim.AdamW(adapters.trainable(SHALLOW), lr=1e-3)
    for _ in range(3):
        fast_step(drafter, optimizer, rollouts, 0.5, 1.0)
    gained = log_pi() - before
    assert gained[reward == 1].mean() > 0.01
    assert gained[reward == 0].mean() < -0.01


def test_reinforce_learns_to_be_accepted():
    """One prompt over and over: what is accepted there goes up. The verifier, and so the text, stays."""
    config = DviRlConfig(exit_layer=E, steps=K, threshold=0.0, lr_s=1e-2, rank=8)
    learner = Learner(rl.target(), config)
    sample, rates, texts = Sample(0, PROMPT, []), [], set()
    for _ in range(20):
        rollout = collect(learner.adapters.target, learner.drafter, sample, 24)
        rates.append(learner.learn([rollout])["accept_rate"])
        texts.add(tuple(rollout.tokens))
    assert len(texts) == 1
    assert sum(rates[-5:]) / 5 > sum(rates[:5]) / 5 + 0.2


def rejected_only(rollout):
    return Rollout(
        rollout.tokens, rollout.prompt, [], [record for record in rollout.records if not record.reward], rollout.nll
    )


def test_a_drafter_that_is_always_rejected_learns_too():
    learner = Learner(rl.target(), DviRlConfig(exit_layer=1, steps=K, threshold=0.0, lr_s=1e-2))
    rollout = rejected_only(collect(learner.adapters.target, learner.drafter, Sample(0, PROMPT, []), 24))
    buffer = ReplayBuffer(len(rollout.records), fast_batch=10**6)
    buffer.add(rollout)
    assert (buffer.due, buffer.accepted) == ("full", 0)
    before = policy(learner.drafter, rollout)[0].detach()
    line = learner.learn(buffer.take())
    assert line["accept_rate"] == 0 and line["grad_norm"] > 0
    assert (policy(learner.drafter, rollout)[0] < before).float().mean() > 0.8
    assert learner.progress.baseline == pytest.approx(0.45)

    flat = Learner(rl.target(), DviRlConfig(exit_layer=1, steps=K, threshold=0.0, baseline_init=0.0))
    assert flat.learn([rollout])["grad_norm"] == 0, "why the running mean does not begin at 0"


def test_each_step_moves_its_own_adapter_only_and_never_the_model():
    adapters = adapted()
    target, weights = adapters.target, rl.base(adapters.target)
    rollouts = [rollout_of(adapters)]
    s, d = rl.weights(adapters, SHALLOW), rl.weights(adapters, DEEP)
    fast_step(adapters.drafter(K), torch.optim.AdamW(adapters.trainable(SHALLOW), lr=1e-2), rollouts, 0.5, 1.0)
    s_after = rl.weights(adapters, SHALLOW)
    assert all(torch.equal(d[key], now) for key, now in rl.weights(adapters, DEEP).items())
    assert any(not torch.equal(s[key], now) for key, now in s_after.items())
    slow_step(adapters, torch.optim.AdamW(adapters.trainable(DEEP), lr=1e-2), rollouts, 0.1, "auto", 1.0)
    assert all(torch.equal(s_after[key], now) for key, now in rl.weights(adapters, SHALLOW).items())
    assert any(not torch.equal(d[key], now) for key, now in rl.weights(adapters, DEEP).items())
    assert all(torch.equal(weights[name], now) for name, now in rl.base(target).items())
    assert all(p.grad is None for p in target.model.parameters())


def test_kl_holds_the_verifier_to_what_it_was():
    """The same steps on the same text, once without and once with a heavy leash."""
    kept = []
    for beta in (0.0, 50.0):
        adapters = inject_lora(rl.target(), E, rank=3)
        rollouts = [rollout_of(adapters, reference=tiny.prompt(8, seed=3))]
        optimizer = torch.optim.AdamW(adapters.trainable(DEEP), lr=5e-3)
        kept.append([slow_step(adapters, optimizer, rollouts, beta, "auto", 1.0) for _ in range(8)])
    free, held = kept
    assert free[0].kl == pytest.approx(0, abs=1e-5)
    assert free[-1].ce < free[0].ce - 0.5, "it learns the answer"
    assert held[-1].kl < 0.2 * free[-1].kl


def test_the_baseline_is_a_running_mean_and_the_log_line_is_of_this_batch():
    learner = Learner(rl.target(), DviRlConfig(exit_layer=E, steps=K, threshold=0.0, baseline_momentum=0.75))
    rollouts = [
        collect(learner.adapters.target, learner.drafter, Sample(i, tiny.prompt(6, seed=i), []), 10) for i in range(3)
    ]
    records = [record for rollout in rollouts for record in rollout.records]
    rate = sum(record.reward for record in records) / len(records)
    line = learner.learn(rollouts)
    assert list(line)[:5] == ["step", "loss_rl", "loss_slow", "accept_rate", "ppl_sample"]
    assert (line["step"], line["loss_slow"], line["baseline"]) == (1, None, 0.5)
    assert line["accept_rate"] == pytest.approx(rate)
    assert learner.progress.baseline == pytest.approx(0.75 * 0.5 + 0.25 * rate)
    assert line["confidence"] == pytest.approx(sum(r.verifier_confidence for r in records) / len(records))
    losses = [
        F.cross_entropy(
            tiny.logits(tiny.model("llama"), r.tokens)[r.prompt - 1 : -1], torch.tensor(r.tokens[r.prompt :])
        )
        for r in rollouts
    ]
    assert line["ppl_sample"] == pytest.approx(math.exp(sum(map(float, losses)) / 3), rel=1e-4)


def test_a_loss_that_is_no_number_moves_nothing_and_ends_the_run_when_it_stays():
    learner = Learner(rl.target(), DviRlConfig(exit_layer=E, steps=K, threshold=0.0))
    rollout = collect(learner.adapters.target, learner.drafter, Sample(0, PROMPT, []), 10)
    before = rl.weights(learner.adapters, SHALLOW)
    learner.progress.baseline = math.nan
    for _ in range(BAD_STEPS - 1):
        assert learner.learn([rollout])["stepped"] is False
    assert all(torch.equal(before[key], now) for key, now in rl.weights(learner.adapters, SHALLOW).items())
    with pytest.raises(UserError, match="lower --lr-s"):
        learner.learn([rollout])


def not_a_number(learner, name):
    """From now on gradients of one adapter are no numbers."""
    for parameter in learner.adapters.trainable(name):
        parameter.register_hook(lambda gradient: gradient * math.nan)


def test_a_step_that_moves_nothing_does_not_move_the_baseline():
    learner = Learner(rl.target(), DviRlConfig(exit_layer=E, steps=K, threshold=0.0))
    rollout = collect(learner.adapters.target, learner.drafter, Sample(0, PROMPT, []), 10)
    line = learner.learn([rollout])
    before = learner.progress.baseline
    assert line["stepped"] and before != line["baseline"]
    not_a_number(learner, SHALLOW)
    assert not learner.learn([rollout])["stepped"]
    assert (learner.progress.baseline, learner.progress.bad_steps) == (before, 1)


@pytest.mark.parametrize("slow_every", [1, 2])
def test_slow_steps_that_are_no_number_end_the_run_too(slow_every):
    """However many steps of lora_S go well between them."""
    learner = Learner(rl.target(), DviRlConfig(exit_layer=E, steps=K, threshold=0.0, slow_every=slow_every))
    rollout = collect(learner.adapters.target, learner.drafter, Sample(0, PROMPT, []), 6)
    for _ in range(slow_every):
        learner.learn([rollout])
    before = rl.weights(learner.adapters, DEEP)
    not_a_number(learner, DEEP)
    for _ in range(BAD_STEPS * slow_every - 1):
        assert learner.learn([rollout])["stepped"]
    with pytest.raises(UserError, match=r"loss_slow .* lower --lr-d"):
        learner.learn([rollout])
    assert all(torch.equal(before[key], now) for key, now in rl.weights(learner.adapters, DEEP).items())
    assert (learner.progress.slow_steps, learner.progress.bad_slow_steps) == (1, BAD_STEPS)


# The buffer


def record(reward):
    return Record(torch.zeros(2), 1, float(reward), 0.5, 3)


@given(
    st.lists(st.lists(st.booleans(), max_size=6), max_size=30), st.integers(1, 20), st.integers(1, 10)
)  # rewards by rollout
@settings(deadline=None)
def test_the_buffer_is_bounded_and_empties_in_order(stream, capacity, fast_batch):
    buffer, taken, pending = ReplayBuffer(capacity, fast_batch), [], []
    for rewards in stream:
        rollout = Rollout([1, 2], 1, [], [record(r) for r in rewards])
        buffer.add(rollout)
        pending += [rollout] if rewards else []
        assert len(buffer) == sum(len(r.records) for r in pending) < capacity + 6
        assert buffer.accepted == sum(r.reward == 1 for x in pending for r in x.records)
        want = "accepted" if buffer.accepted >= fast_batch else "full" if len(buffer) >= capacity else None
        assert buffer.due == want
        if want:
            batch = buffer.take()
            assert batch == pending and len(buffer) == 0 and buffer.due is None
            taken, pending = taken + batch, []
    assert sum(len(r.records) for r in [*taken, *pending]) == sum(map(len, stream))


# The stream


def test_prompts_are_first_turns_with_their_answer(tmp_path):
    path = rl.data(tmp_path / "rows.jsonl", 6)
    with path.open("a") as lines:
        lines.write("broken\n")
        lines.write('{"messages": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]}\n')
        lines.write('{"prompt": "' + rl.text(list(range(5, 30))) + '"}\n')
    prompts = Prompts(path, rl.target(), max_prompt_tokens=12, max_new_tokens=4)
    samples = list(prompts)
    assert [s.position for s in samples] == [0, 1, 2, 3, 4, 5, 6]
    assert [s.prompt for s in samples[:6]] == [tiny.prompt(8 + i % 4, seed=i) for i in range(6)]
    assert samples[0].reference == tiny.prompt(6, seed=100)[:4]
    assert samples[1].reference == samples[6].reference == []
    assert samples[6].prompt == [1, 2, 3]
    assert (prompts.skipped.count, prompts.too_long) == (1, 1)
    assert list(prompts.after(4)) == samples[4:]


def test_a_prompt_leaves_room_for_the_answer(tmp_path):
    path = rl.data(tmp_path / "rows.jsonl", 4)  # prompts of 8, 9, 10, 11
    prompts = Prompts(path, rl.target(max_position_embeddings=20), max_prompt_tokens=100, max_new_tokens=10)
    assert [len(s.prompt) for s in prompts] == [8, 9, 10]


def test_a_target_without_a_tokenizer_is_refused(tmp_path):
    target = rl.target()
    target.tokenizer = None
    with pytest.raises(UserError, match="has no tokenizer"):
        Prompts(tmp_path / "rows.jsonl", target, 10, 10)


OPENS = (  # the prompt opens a thought that no written answer has
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n<think>\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chats(path, *rows):
    path.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows)
    )
    return path


def templated(template=None):
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    if template is not None:
        tokenizer.chat_template = template
    return Target(tiny.fresh_model("llama", max_position_embeddings=512), tokenizer, name="tiny")


def test_references_are_what_the_chat_template_writes_stop_token_and_all(tmp_path):
    target, answer = templated(), "def add(a, b):\n    return a + b"
    asked = [("system", "Be brief."), ("assistant", "Hello."), ("user", "Write add.")]
    path = chats(
        tmp_path / "rows.jsonl", [*asked, ("assistant", answer), ("user", "Thanks."), ("assistant", "Bye.")], asked
    )
    sample, unanswered = Prompts(path, target, 400, 64)
    whole = [{"role": role, "content": text} for role, text in [*asked, ("assistant", answer)]]
    said = target.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert sample.reference == [*said, target.tokenizer.eos_token_id]
    written = target.tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
    assert sample.prompt + sample.reference == written[: len(sample.prompt) + len(sample.reference)]
    assert unanswered.reference == [] and unanswered.prompt == sample.prompt
    assert [s.reference for s in Prompts(path, target, 400, 3)] == [said[:3], []]


def test_answers_that_the_chat_template_writes_otherwise_are_no_references(tmp_path):
    path = chats(tmp_path / "rows.jsonl", [("user", "Write add."), ("assistant", "no")])
    (sample,) = Prompts(path, templated(OPENS), 400, 64)
    assert sample.prompt and sample.reference == []


def test_a_conversation_that_the_chat_template_refuses_is_left_out(tmp_path):
    row = [("user", "Write add."), ("assistant", "no")]
    path = chats(tmp_path / "rows.jsonl", [("system", "Be brief."), *row], row)
    prompts = Prompts(path, templated(NO_SYSTEM), 400, 64)
    assert [sample.position for sample in prompts] == [1]
    assert prompts.skipped.count == 1 and "no system message" in prompts.skipped.first[0]
