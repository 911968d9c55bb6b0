"""Fine-tuning with Unsloth, as its notebooks have it: unsloth_sft.py MODEL OUT. Knows nothing of memplan."""

from __future__ import annotations

import sys

from unsloth import FastLanguageModel  # isort: skip  # before the others, which it changes

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

name, out = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(model_name=name, max_seq_length=2048, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=Dataset.from_dict({"text": ["word " * (1000 + 16 * number) for number in range(64)]}),
    args=SFTConfig(
        dataset_text_field="text",
        max_length=2048,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=60,
        learning_rate=2e-4,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=out,
        report_to="none",
    ),
)
trainer.train()
