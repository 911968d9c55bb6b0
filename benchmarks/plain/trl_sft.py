"""Fine-tuning with TRL's SFTTrainer. Knows nothing of memplan."""

from __future__ import annotations

from common import Peaks, arguments, load, lora, options, rows
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

asked = options()
peaks = Peaks(asked)
trainer = SFTTrainer(
    model=load(asked),
    args=SFTConfig(**arguments(asked), max_length=asked.length),
    train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(asked)]),
    processing_class=AutoTokenizer.from_pretrained(asked.model),
    peft_config=None if asked.mode == "full" else lora(asked),
    callbacks=[peaks],
)
trainer.train()
peaks.write()
