"""LoRA on a mixture of experts, its experts, too, with TRL's SFTTrainer: experts.py MODEL OUT [LAYER ...],
with the experts of some layers only, as OpenAI's recipe for gpt-oss has it. Knows nothing of memplan."""

from __future__ import annotations

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, out, *layers = sys.argv[1:]
experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
said = [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "answer " * 600}]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out,
        max_length=1024,
        per_device_train_batch_size=1,
        bf16=True,
        report_to="none",
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager", "use_cache": False},
    ),
    train_dataset=Dataset.from_list([{"messages": said}] * 16),
    peft_config=LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        target_parameters=[f"{layer}.{name}" for layer in layers for name in experts] or list(experts),
    ),
)
trainer.train()
