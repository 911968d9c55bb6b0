"""Fine-tuning with the Hugging Face Trainer, as PEFT's guides write it. Knows nothing of memplan."""

from __future__ import annotations

from common import Peaks, arguments, load, lora, options, rows
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

asked = options()
model = load(asked)
if asked.mode == "qlora" and asked.prepare:
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not asked.open)
if asked.mode != "full":
    model = get_peft_model(model, lora(asked))
peaks = Peaks(asked)
trainer = Trainer(
    model=model,
    args=TrainingArguments(**arguments(asked)),
    train_dataset=Dataset.from_list(list(rows(asked))),
    callbacks=[peaks],
)
trainer.train()
peaks.write()
