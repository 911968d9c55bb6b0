"""``apply`` and ``remove`` on a tiny Llama with bitsandbytes' 4-bit layers and PEFT's adapters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
from nf4_weights import DEVICE, distance, one_thread, torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries deprecate while they are imported
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

from memplan import kernels
from memplan.kernels import KernelError, launch

assert one_thread
pytestmark = pytest.mark.filterwarnings("default")  # the libraries' warnings are theirs

IDS = torch.randint(0, 99, (2, 20), generator=torch.Generator().manual_seed(3)).to(DEVICE)
LAYERS = 2 * 7  # linear layers of the tiny model


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own; a step in the interpreter is slow."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


def base(dtype: Any = torch.float32, quant_type: str = "nf4", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # multiples of the block: bitsandbytes' native CPU code is wrong where blocks run over the end of a row
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, dtype, quant_type=quant_type
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type=quant_type)
            layer.bias = module.bias
            model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.to(DEVICE)


def adapted(
    dtype: Any = torch.float32, *, dropout: float = 0.0, reentrant: bool | None = None, prepare: bool = True,
    quant_type: str = "nf4", **options: Any,
) -> Any:  # fmt: skip
    model = base(dtype, quant_type)
    if prepare:
        model = peft.prepare_model_for_kbit_training(
            model, reentrant is not None, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    options = {"target_modules": "all-linear", **options}
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config).train()


def step(model: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of one step."""
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_pefts(dtype: Any, reentrant: bool | None) -> None:
    model = adapted(dtype, reentrant=reentrant)
    loss, gradients = step(model)
    assert kernels.apply(model) == 2 * LAYERS  # each adapter, and the layer under it
    ours, our_gradients = step(model)
    assert kernels.remove(model) == 2 * LAYERS
    again, gradients_again = step(model)
    assert ours == pytest.approx(loss, rel=1e-6) and again == loss
    assert our_gradients.keys() == gradients.keys() == gradients_again.keys()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for name, gradient in gradients.items():
        assert our_gradients[name].dtype is gradient.dtype is torch.float32
        assert distance(our_gradients[name], gradient) < tolerance
        assert torch.equal(gradients_again[name], gradient)


def test_without_the_upcasts() -> None:
    """The residual stream in bf16, adapters in fp32: what the product of x and A rounds, PEFT does not."""
    model = adapted(torch.bfloat16, prepare=False)
    loss, gradients = step(model)
    kernels.apply(model)
    ours, our_gradients = step(model)
    assert ours == pytest.approx(loss, rel=5e-3)
    for name, gradient in gradients.items():
        assert our_gradients[name].dtype is gradient.dtype
        assert distance(our_gradients[name], gradient) < 5e-2


def test_dropout_is_drawn_again_in_recomputation() -> None:
    results = []
    for reentrant in (None, False, True):
        model = adapted(dropout=0.3, reentrant=reentrant)
        kernels.apply(model)
        results.append(step(model))
        model.eval()
        with torch.no_grad():
            assert not model(input_ids=IDS, labels=IDS).loss.requires_grad
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradients[name], gradient) for name, gradient in results[0][1].items())


def test_under_autocast() -> None:
    model = adapted(torch.bfloat16)
    results = []
    for put in (lambda _: 0, kernels.apply):
        put(model)
        with torch.autocast(DEVICE, torch.bfloat16):
            results.append(step(model))
    assert results[1][0] == pytest.approx(results[0][0], rel=5e-3)
    for name, gradient in results[0][1].items():
        assert results[1][1][name].dtype is gradient.dtype


def test_each_of_twenty_steps_is_pefts() -> None:
    """Training with PEFT, each step is made with the kernels as well, from the same parameters.

    Two trainings can't be held together step by step: on a CPU, adapters that begin 2^-16 away, a hundredth
    of what bf16 rounds, move the losses of PEFT's own twenty steps by up to 0.9 %.
    """
    model = adapted(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        kernels.apply(model)
        ours, our_gradients = step(model)
        kernels.remove(model)
        loss, gradients = step(model)
        assert ours == pytest.approx(loss, rel=5e-3)
        assert our_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert distance(our_gradients[name], gradient) < 5e-2, name
        losses.append(loss)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3  # it learns


def test_twenty_steps_learn() -> None:
    """With the kernels alone, as much as above."""
    model = adapted(torch.bfloat16)
    kernels.apply(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(step(model)[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


def test_what_is_saved_is_plain_peft(tmp_path: Path) -> None:
    model = adapted()
    before = set(model.state_dict())
    kernels.apply(model)
    wanted = step(model)
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(
        peft.prepare_model_for_kbit_training(base(), False), tmp_path, is_trainable=True
    ).train()
    assert {type(module) for module in fresh.modules()}.isdisjoint(
        {type(module) for module in model.modules() if "memplan" in type(module).__module__}
    )
    loss, gradients = step(fresh)
    assert loss == pytest.approx(wanted[0], rel=1e-6)
    assert gradients.keys() == wanted[1].keys()


def test_twice_and_copied() -> None:
    model = adapted()
    assert kernels.apply(model) == kernels.apply(model) == 2 * LAYERS
    twin = copy.deepcopy(model)
    assert kernels.remove(twin) == 2 * LAYERS and kernels.remove(twin) == 0
    assert step(twin)[0] == pytest.approx(step(model)[0], rel=1e-6)


def test_adapters_switched_off_or_merged_are_pefts_own() -> None:
    model = adapted()
    with model.disable_adapter():
        wanted = step_value(model)
    kernels.apply(model)
    with model.disable_adapter():
        assert step_value(model) == pytest.approx(wanted, rel=1e-6)
    wanted = step_value(model)
    model.merge_adapter()
    assert step_value(model) == pytest.approx(wanted, rel=0.1)  # 4-bit weights are rounded again


def step_value(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=IDS, labels=IDS).loss)


def test_layers_without_adapters_run_in_strips_too() -> None:
    model = adapted(target_modules=["q_proj"])
    loss, gradients = step(model)
    assert kernels.apply(model) == LAYERS + 2
    ours = step(model)
    assert ours[0] == pytest.approx(loss, rel=1e-6) and ours[1].keys() == gradients.keys()


def test_a_few_rows_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    kernels.apply(model)
    from memplan.kernels import layers

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the kernels were asked")

    monkeypatch.setattr(layers, "nf4_linear", never)
    monkeypatch.setattr(layers, "nf4_lora_linear", never)
    model(input_ids=IDS[:1, :16])
    with pytest.raises(AssertionError, match="were asked"):
        model(input_ids=IDS[:1, :17])


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "DoRA, several adapters, adapters with a bias")],
)
def test_other_adapters_stay_pefts_with_one_warning(options: dict[str, Any], reason: str) -> None:
    model = adapted(target_modules=["q_proj"], **options)
    loss = step(model)[0]
    with pytest.warns(UserWarning, match=reason) as caught:
        assert kernels.apply(model) == LAYERS - 2
    assert len([one for one in caught if "stay as they are" in str(one.message)]) == 1
    assert step(model)[0] == pytest.approx(loss, rel=1e-6)


def test_hooked_layers_stay_as_they_are() -> None:
    model = adapted()
    calls: list[int] = []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        assert kernels.apply(model) == 2 * LAYERS - 2
    step(model)
    assert calls


def test_what_has_no_nf4_layers_is_refused() -> None:
    with pytest.raises(KernelError, match="no 4-bit layers of bitsandbytes"):
        kernels.apply(torch.nn.Linear(3, 3))
    with pytest.raises(KernelError, match="'fp4'"):
        kernels.apply(adapted(quant_type="fp4"))


def test_a_gpu_that_cant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As told of a card that is not here: the sentence says what is missing."""
    launch.refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert "Ampere GPU or newer" in str(launch.refusal(torch.device("cuda", 0)))
    launch.refusal.cache_clear()
    monkeypatch.setattr(launch, "triton", None)
    assert "pip install triton" in str(launch.refusal(torch.device("cuda", 0)))
    launch.refusal.cache_clear()
    with pytest.raises(KernelError, match="not on meta"):
        launch.where(torch.empty(3, device="meta"))


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's packing")
def test_a_weight_packed_anew_for_inference_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes packs weights for a CPU's AVX512 when it first infers: afterwards they are its own."""
    model = adapted(torch.bfloat16, prepare=False).eval()
    kernels.apply(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = layer(x)
        state = layer.base_layer.weight.quant_state
        monkeypatch.setattr(state, "packing_format_for_cpu", True, raising=False)
        monkeypatch.setattr(bnb, "matmul_4bit", lambda x, weight, **_: torch.zeros(*x.shape[:-1], 192).to(x))
        theirs = layer(x)  # no KernelError
    assert theirs.shape == wanted.shape


def test_factors_of_another_kind_are_pefts() -> None:
    """Somebody else's linear layer for A may compute something else."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    model = adapted()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.lora_A["default"].__class__ = Doubled
    wanted = step_value(model)
    with pytest.warns(UserWarning, match="stay as they are"):
        assert kernels.apply(model) == 2 * LAYERS - 2
    assert step_value(model) == pytest.approx(wanted, rel=1e-6)
