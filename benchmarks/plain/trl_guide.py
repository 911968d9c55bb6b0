"""TRL's SFTTrainer given a model's name, as TRL's guide to QLoRA writes it: what is not asked for is left to
TRL. Knows nothing of memplan."""

from __future__ import annotations

from common import STEPS, Peaks, divided, lora, options, quantisation, rows
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

asked = options(dtype=None)
peaks = Peaks(asked)
data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(asked)])
steps = STEPS if asked.lengths is None or asked.packing else len(data) // (asked.batch * asked.accumulate)
typed = {} if asked.dtype is None else {"dtype": asked.dtype}
trainer = SFTTrainer(
    model=asked.model,
    args=SFTConfig(
        output_dir=str(asked.out.with_suffix("")),
        max_steps=steps,
        train_sampling_strategy="sequential" if asked.lengths else "random",
        packing=asked.packing,
        max_length=asked.length,
        per_device_train_batch_size=asked.batch,
        gradient_accumulation_steps=asked.accumulate,
        model_init_kwargs={**typed, **divided(asked)} or None,
        report_to="none",
        save_strategy="steps" if asked.save else "no",
        save_steps=2,
    ),
    train_dataset=data,
    quantization_config=quantisation(asked) if asked.mode == "qlora" else None,
    peft_config=None if asked.mode == "full" else lora(asked),
    callbacks=[peaks],
)
trainer.train()
peaks.write()
