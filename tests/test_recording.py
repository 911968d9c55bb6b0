"""``record()`` around steps that nobody but their author knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    from memplan.trace import record, trace

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.asked.recipe import Recipe
from memplan.tape import Category, Phase, Tape, replay, static_bytes

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


def own_step() -> tuple[Callable[[], None], list[Any]]:
    """A model of one's own, an optimizer with its state, a batch; 64 x 256 fp32."""
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(64, 256)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step, [model, optimizer, {"x": x}]


def started(tape: Tape) -> list[int]:
    """Changes in live bytes from the forward on."""
    return tape.deltas[next(s.start for s in tape.segments if s.phase is Phase.FORWARD) :]


def test_a_training_loop_written_by_hand_is_the_traced_one() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    recipe = Recipe(trainer="peft", mode="lora", seq_len=100, gradient_checkpointing=True, use_reentrant=True)
    expected = trace({**LLAMA, "torch_dtype": "bfloat16"}, recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        tokens = torch.zeros(1, 100, dtype=torch.int64)
        batch = {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}

        def step() -> None:
            loss = model(**batch).loss
            loss.backward()
            loss = loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step()
        with record(model, optimizer, batch) as tape:
            step()
    assert started(tape) == started(expected)
    assert replay(tape) == replay(expected)
    assert tape.provenance == "traced"


def test_fake_and_real_agree_but_for_cuda() -> None:
    step, there = own_step()
    with record(*there) as real:
        step()
    with FakeTensorMode():
        step, there = own_step()
        with record(*there) as fake:
            step()
    # forward and backward of linear layers take the same on both; the optimizer is foreach on CUDA alone
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        deltas = [
            [tape.deltas[s.start : s.stop] for s in tape.segments if s.phase is phase]
            for tape in (real, fake)
        ]
        assert deltas[0] == deltas[1]
    assert any(name.startswith("_foreach") for name in fake.operations)
    assert not any(name.startswith("_foreach") for name in real.operations)
    assert "cublas_workspace" in fake.operations
    assert "cublas_workspace" not in real.operations


def test_phases_and_categories_follow_from_calls() -> None:
    step, there = own_step()
    with record(*there) as tape:
        step()
    assert [s.phase for s in tape.segments if s.phase is not Phase.SETUP] == [
        Phase.FORWARD,
        Phase.BACKWARD,
        Phase.OPTIMIZER,
    ]
    weights = 4 * (256 * 1024 + 1024 + 1024 * 256 + 256)
    static = static_bytes(tape)
    assert static[Category.WEIGHTS] == weights
    assert static[Category.ACTIVATIONS] == 4 * 64 * 256
    peak = replay(tape)
    assert peak.phase is Phase.OPTIMIZER
    assert peak.by_category[Category.GRADIENTS] == weights
    assert peak.by_category[Category.OPTIMIZER_STATE] == 2 * weights + 4 * 512  # and four step counts
    assert sum(started(tape)) == 0


def test_two_forwards_before_one_update() -> None:
    step, there = own_step()
    model, optimizer, batch = there
    with record(*there) as tape:
        for _ in range(2):
            model(batch["x"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    phases = [
        segment.phase
        for segment in tape.segments
        if segment.phase is not Phase.SETUP
        and any(event >= 0 for event in tape.events[segment.start : segment.stop])
    ]
    assert phases == [Phase.FORWARD, Phase.BACKWARD] * 2 + [Phase.OPTIMIZER]


def test_only_the_card_counts_where_there_is_one() -> None:
    # the meta device in the place of a GPU: host tensors beside it are not its memory
    x = torch.ones(1000, 1000, device="meta")
    with record(x) as tape:
        host = torch.ones(500) * 2
        card = x * 2
    del host, card
    assert [tape.sizes[event] for event in tape.events if event >= 0] == [4_000_256, 4_000_256]


def test_how_much_of_a_mask_is_true_is_not_guessed() -> None:
    with FakeTensorMode():
        x, mask = torch.zeros(4, 8), torch.zeros(4, dtype=torch.bool)
        with pytest.raises(Exception, match="nonzero"), record(x, mask):
            x[mask]
        with pytest.raises(Exception, match="equal"), record(x, mask):
            torch.equal(x, x + 1)


def test_patches_are_gone_afterwards() -> None:
    before = torch.autograd.backward, torch.autograd.grad, len(nn.modules.module._global_forward_pre_hooks)
    step, there = own_step()
    with pytest.raises(ZeroDivisionError), record(*there):
        raise ZeroDivisionError
    after = torch.autograd.backward, torch.autograd.grad, len(nn.modules.module._global_forward_pre_hooks)
    assert before == after
