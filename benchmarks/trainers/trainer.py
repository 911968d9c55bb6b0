"""Fine-tuning with the Hugging Face Trainer and its own options, as transformers' examples write it:

    trainer.py --model_name MODEL --method lora --output_dir OUT --bf16 ... [--deepspeed FILE]

It knows nothing of memplan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class Options:
    model_name: str
    method: str = field(default="full", metadata={"help": "full, lora or qlora"})
    length: int = 2048
    rows: int = 256
    weights: str = field(default="bfloat16", metadata={"help": "dtype that the model is loaded in"})


parser = HfArgumentParser((Options, TrainingArguments))
asked, arguments = parser.parse_args_into_dataclasses()  # before the model: ZeRO-3 shards it as it is loaded
quantized = {}
if asked.method == "qlora":
    quantized["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
model = AutoModelForCausalLM.from_pretrained(
    asked.model_name, dtype=getattr(torch, asked.weights), **quantized
)
if asked.method == "qlora" and not arguments.fsdp:
    checkpointing = arguments.gradient_checkpointing
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
if asked.method != "full":
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, adapter)
ids = list(range(1, 101)) * (asked.length // 100 + 1)
row = {"input_ids": ids[: asked.length], "labels": ids[: asked.length]}
trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list([row] * asked.rows))
trainer.train()
