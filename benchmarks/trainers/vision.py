"""Fine-tuning of a model that takes pictures, with TRL's SFTTrainer, as its documentation has it:
vision.py MODEL OUT. Knows nothing of memplan."""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import SFTConfig, SFTTrainer


def example(number: int) -> dict[str, Any]:
    """A picture of 640 × 480 to 1,088 × 816, and what is said of it."""
    width = 640 + 64 * (number % 8)
    return {
        "images": [Image.new("RGB", (width, width * 3 // 4))],
        "prompt": [{"role": "user", "content": "What is in the picture ?"}],
        "completion": [{"role": "assistant", "content": "words " * 100}],
    }


model, out = sys.argv[1:]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out,
        max_length=None,  # pictures' tokens are not cut off
        per_device_train_batch_size=2,
        bf16=True,
        report_to="none",
        model_init_kwargs={"dtype": "bfloat16"},
    ),
    train_dataset=Dataset.from_list([example(number) for number in range(16)]),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
