"""What rests on the card before a step, against figures derived by hand."""

from __future__ import annotations

import pytest

from memplan import plan
from memplan.asked.recipe import Recipe

# model: parameters, of which in linear layers inside the decoder (7 a layer), vocabulary x hidden size
FACTS = {
    "llama-2-7b": (6_738_415_616, 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32000 * 4096),
    "llama-3.1-8b": (
        8_030_261_248,
        32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        128256 * 4096,
    ),
    "llama-3.3-70b": (
        70_553_706_496,
        80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672),
        128256 * 8192,
    ),
}
LAYERS = {"llama-2-7b": 32, "llama-3.1-8b": 32, "llama-3.3-70b": 80}
# rank 8 on all seven matrices of a layer: 8 x (rows + columns) each
ADAPTERS = {
    "llama-2-7b": 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
    "llama-3.1-8b": 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    "llama-3.3-70b": 80 * 8 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)),
}
# inv_freq and its copy: 64 fp32 frequencies each
ROTARY = 2 * 512


@pytest.mark.parametrize("model", sorted(FACTS))
def test_full_fine_tuning_keeps_six_bytes_a_parameter(model: str) -> None:
    count, *_ = FACTS[model]
    result = plan(model, Recipe(trainer="peft", mode="full", optimizer="adamw_torch"))
    assert result.parameters.total == result.parameters.trainable == count
    static = result.static_bytes
    assert static.weights == 2 * count + ROTARY
    assert static.optimizer_state == 4 * count
    assert static.adapters == static.quantization_state == 0


@pytest.mark.parametrize("model", sorted(FACTS))
def test_lora_keeps_adapters_and_their_states_in_fp32(model: str) -> None:
    count, *_ = FACTS[model]
    result = plan(model, Recipe(trainer="peft", mode="lora", r=8))
    adapters = ADAPTERS[model]
    assert result.parameters.trainable == adapters
    assert result.parameters.total == count + adapters
    static = result.static_bytes
    assert static.weights == 2 * count + ROTARY
    assert static.adapters == 4 * adapters
    # two fp32 moments, and one step counter of a block for each of the two matrices of each adapter
    assert static.optimizer_state == 8 * adapters + LAYERS[model] * 7 * 2 * 512


@pytest.mark.parametrize("model", sorted(FACTS))
@pytest.mark.parametrize("kbit_prep", [True, False])
def test_qlora_keeps_half_a_byte_a_weight(model: str, kbit_prep: bool) -> None:
    count, linear, embedding = FACTS[model]
    static = plan(model, Recipe(trainer="peft", mode="qlora", r=8, kbit_prep=kbit_prep)).static_bytes
    norms = count - linear - 2 * embedding
    assert static.weights == linear // 2 + (4 if kbit_prep else 2) * (2 * embedding + norms) + ROTARY
    # a byte for 64 weights, 4 for 64 · 256 of them; and for each matrix its code of 16 values, its offset
    # (a block of 512 bytes each) and its copy of the map of 256 values, which is also there once by itself
    matrices = LAYERS[model] * 7
    # Llama 2's three MLP matrices have 11,008 bytes of second-order scales: 21.5 blocks, charged as 22
    halves = 256 * 3 * 32 if model == "llama-2-7b" else 0
    expected = linear // 64 + linear // 64 // 256 * 4 + matrices * 2048 + 1024 + halves
    assert static.quantization_state == expected
    assert static.adapters == 4 * ADAPTERS[model]


@pytest.mark.parametrize("model", sorted(FACTS))
def test_without_double_quantisation_a_scale_is_four_bytes(model: str) -> None:
    _, linear, _ = FACTS[model]
    static = plan(model, Recipe(trainer="peft", mode="qlora", double_quant=False)).static_bytes
    assert static.quantization_state == linear // 64 * 4 + LAYERS[model] * 7 * 512


def test_foreach_adamw_peaks_at_ten_bytes_a_parameter() -> None:
    # fms-acceleration's A100 runs of Mistral-7B: 72.43 GB at batch 4 and at 8 alike
    options = {"optimizer": "adamw_torch", "gradient_checkpointing": True, "attn": "flash_attention_2"}
    peaks = {
        batch: plan(
            "mistral-7b-v0.1", Recipe(trainer="peft", mode="full", batch_size=batch, seq_len=4096, **options)
        ).peak
        for batch in (4, 8)
    }
    count = 7_241_732_096
    for peak in peaks.values():
        assert peak.phase == "optimizer"
        assert peak.operation == "_foreach_sqrt"
        assert 10 * count < peak.allocated_bytes < 10 * count * 1.001
    assert abs(peaks[4].allocated_bytes - 72_434_837_504) < 0.001 * 72_434_837_504
    assert abs(peaks[8].allocated_bytes - peaks[4].allocated_bytes) < 1 << 20
