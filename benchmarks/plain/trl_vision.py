"""Fine-tuning of a model that sees with TRL's SFTTrainer. Knows nothing of memplan."""

from __future__ import annotations

from typing import Any

from common import STEPS, Peaks, arguments, load, lora, options
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

# preprocessor_config.json of Qwen/Qwen3-VL-8B-Instruct
SIZE = {"shortest_edge": 65_536, "longest_edge": 16_777_216}


def example(text: str) -> dict[str, Any]:
    """Pictures, and what is said of them."""
    pictures = [Image.new("RGB", (asked.width, asked.height)) for _ in range(asked.images)]
    return {
        "images": pictures,
        "messages": [
            {"role": "user", "content": "w1"},
            {"role": "assistant", "content": text},
        ],
    }


def tokens(text: str) -> int:
    """How many an example is."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    made = DataCollatorForVisionLanguageModeling(processor)([example(text)])
    return int(made["input_ids"].shape[1])


asked = options()
peaks = Peaks(asked)
processor = AutoProcessor.from_pretrained(asked.model, size=SIZE)
text = "w1" + " w1" * (asked.length - tokens("w1"))
assert tokens(text) == asked.length, f"{tokens(text)} tokens"
trainer = SFTTrainer(
    model=load(asked, AutoModelForImageTextToText),
    args=SFTConfig(**arguments(asked), max_length=None),
    train_dataset=Dataset.from_list([example(text) for _ in range(asked.batch * asked.accumulate * STEPS)]),
    processing_class=processor,
    peft_config=None if asked.mode == "full" else lora(asked),
    callbacks=[peaks],
)
trainer.train()
peaks.write()
