"""Options as trainers and people call them, turned into memplan's own before they are parsed.

What has another name here is read and said in memplan's words; what moves no memory is left out and said so;
what memplan cannot plan is refused in one sentence. An option that the command has itself is left as it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memplan.asked.gpus import together
from memplan.errors import MemplanError, shown

# Ours, and what else it is called: TRL, PEFT and transformers, axolotl, LLaMA-Factory, Unsloth, torchtune,
# llama.cpp, and what people type.
NAMES: dict[str, str] = {
    "r": "rank lora-r lora-rank lora-dim -r",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "target-modules": "lora-target-modules lora-target lora-targets targets lora-modules",
    "modules-to-save": "lora-modules-to-save additional-target",
    "use-rslora": "rslora peft-use-rslora",
    "use-dora": "dora peft-use-dora",
    "batch-size": "bs batch micro-batch-size micro-bs micro-batch per-device-train-batch-size "
    "per-device-batch-size train-batch-size per-gpu-train-batch-size per-gpu-batch-size mbs -b",
    "seq-len": "max-length max-seq-length max-seq-len cutoff-len sequence-len sequence-length seq-length "
    "seqlen context-length context-len ctx ctx-len ctx-size n-ctx context model-max-length block-size "
    "max-tokens -s",
    "optimizer": "optim",
    "gradient-accumulation-steps": "gradient-accumulation grad-accum grad-accum-steps grad-accumulation "
    "grad-acc ga gas accumulate accumulation accumulation-steps accumulate-grad-batches",
    "gradient-checkpointing": "activation-checkpointing grad-checkpointing checkpointing grad-ckpt ckpt "
    "use-gradient-checkpointing enable-activation-checkpointing",
    "max-grad-norm": "gradient-clipping clip-grad-norm max-norm clip",
    "attn": "attn-implementation attention attention-implementation attention-backend",
    "dtype": "torch-dtype model-dtype weight-dtype load-dtype precision",
    "quant-type": "bnb-4bit-quant-type",
    "double-quant": "bnb-4bit-use-double-quant use-double-quant use-bnb-nested-quant double-quantization "
    "nested-quant",
    "kbit-prep": "prepare-model-for-kbit-training",
    "mode": "finetuning-type finetune-type tuning-type adapter method",
    "backward-prefetch": "fsdp-backward-prefetch",
    "forward-prefetch": "fsdp-forward-prefetch",
    "gpu": "card gpu-type gpu-name",
    "gpus": "num-gpus n-gpus n-gpu gpus-per-node num-gpus-per-node nproc-per-node",
    "nodes": "num-nodes nnodes n-nodes num-machines",
    "dp-replicate": "replicate replicas dp-replicate-size parallelism-config-dp-replicate-size "
    "data-parallel-replicate-degree",
    "reshard-after-forward": "fsdp-reshard-after-forward",
}
_IN_ALL = ("num-processes", "world-size")  # GPUs of all nodes
_IN_SHARDS = (  # GPUs that divide one model between them
    "dp-shard", "dp-shard-size", "parallelism-config-dp-shard-size", "data-parallel-shard-degree",
)  # fmt: skip

# Those without a value of their own, or with true or false: what stands for them, with and without "no".
SWITCHES: dict[str, tuple[str, str]] = {
    "qlora": ("--mode qlora", ""),
    "lora": ("--mode lora", ""),
    "full": ("--mode full", ""),
    "fft": ("--mode full", ""),
    "full-finetune": ("--mode full", ""),
    "full-finetuning": ("--mode full", ""),
    "use-peft": ("--mode lora", "--mode full"),
    "use-lora": ("--mode lora", "--mode full"),
    "load-in-4bit": ("--mode qlora", ""),
    "4bit": ("--mode qlora", ""),
    "bf16": ("--autocast", "--no-autocast"),
    "fp16": ("--dtype float16 --autocast", "--no-autocast"),
    "liger": ("--loss liger", ""),
    "liger-kernel": ("--loss liger", ""),
    "use-liger": ("--loss liger", ""),
    "use-liger-kernel": ("--loss liger", ""),
    "enable-liger-kernel": ("--loss liger", ""),
    "liger-fused-linear-cross-entropy": ("--loss liger", ""),
    "flash": ("--attn flash_attention_2", ""),
    "fa2": ("--attn flash_attention_2", ""),
    "flash-attn": ("--attn flash_attention_2", ""),
    "flash-attention": ("--attn flash_attention_2", ""),
    "flash-attn-2": ("--attn flash_attention_2", ""),
    "flash-attention-2": ("--attn flash_attention_2", ""),
    "use-flash-attn": ("--attn flash_attention_2", ""),
    "use-flash-attention-2": ("--attn flash_attention_2", ""),
    "sdp-attention": ("--attn sdpa", ""),
    "eager-attention": ("--attn eager", ""),
    "packing": ("", ""),
    "sample-packing": ("", ""),
    "padding-free": ("--batches packed", ""),
    "ddp": ("--parallel ddp", ""),
    "fsdp1": ("--parallel fsdp", ""),
    "fsdp2": ("--parallel fsdp2", ""),
    "zero1": ("--parallel zero1", ""),
    "zero2": ("--parallel zero2", ""),
    "zero3": ("--parallel zero3", ""),
    "save": ("", ""),
}
_FULL = (
    "every sequence is as long as --seq-len, which is what is planned; --batches packed has the mask that "
    "packing takes without FlashAttention"
)
_AS_PLANNED = {
    "packing": _FULL,
    "sample-packing": _FULL,
    "save": "writing a checkpoint takes no more of the card than a step (docs/fit.md)",
}

# Values that are called otherwise, of ours; compared in small letters, with - for _.
VALUES: dict[str, dict[str, str]] = {
    "mode": {"fft": "full", "full-finetune": "full", "4bit": "qlora", "freeze": "freeze"},
    "target-modules": {
        **dict.fromkeys(("all", "all-linear", "all-linear-layers", "linear"), "all-linear"),
        **dict.fromkeys(("attn", "attention"), "attention"),
        **dict.fromkeys(("qv", "q-v", "q+v", "default"), "q,v"),
    },
    "attn": {
        **dict.fromkeys(
            ("fa", "fa2", "flash", "flash2", "flash-attn", "flash-attn-2", "flash-attn2", "flash-attention",
             "flash-attention-2", "flashattention", "flashattention2"),
            "flash_attention_2",
        ),
        **dict.fromkeys(("sdp", "torch", "auto", "disabled"), "sdpa"),
        "math": "eager",
    },
    "optimizer": {
        **dict.fromkeys(("adam", "adamw", "adamw-torch-fused"), "adamw_torch_fused"),
        **dict.fromkeys(("adam8bit", "adamw8bit", "8bit-adam", "8bit-adamw", "adam-8bit"), "adamw_bnb_8bit"),
        **dict.fromkeys(("paged-adamw8bit", "pagedadamw8bit", "paged-adam-8bit"), "paged_adamw_8bit"),
    },
    "backward-prefetch": {
        "backward-pre": "backward_pre",
        "backward-post": "backward_post",
        **dict.fromkeys(("none", "no-prefetch"), "no_prefetch"),
    },
    "dtype": {
        **dict.fromkeys(("bf16", "bfloat16", "auto", "torch.bfloat16"), "bfloat16"),
        **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "float16"),
        **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "float32"),
    },
}  # fmt: skip

_OTHERWISE = (
    "of several GPUs memplan plans DDP, FSDP, ZeRO and tensor parallel (--gpus N --parallel ddp, fsdp, "
    "fsdp2, zero1, zero2, zero3 or tp; --offload optimizer or both; --config FILE for DeepSpeed's file or "
    "accelerate's); "
    "`memplan dry-run --gpu 8xa100 -- COMMAND` runs any such program on cards that are not there"
)
_NOT_PLANNED = {
    _OTHERWISE: "deepspeed ds-config fsdp fsdp-config fsdp-version zero zero-stage "
    "tensor-parallel-size tp tp-size pp pipeline-parallel-size context-parallel-size "
    "sequence-parallel-size sp-size ddp-backend cpu-offload activation-offloading offload-optimizer "
    "offload-params offload-param offload-optimizer-device offload-param-device use-deepspeed "
    "deepspeed-config-file",
    "8-bit weights are not planned, 4-bit ones (--mode qlora) and 16-bit ones are": "load-in-8bit 8bit",
    "GPTQ and AWQ weights are not planned, bitsandbytes' 4-bit ones (--mode qlora) are": "gptq awq",
    "FP8 training is not planned": "fp8",
    "how many sequences an evaluation takes is read from a trainer's file (--config FILE); else they are the "
    "Trainer's 8, and where these take more than a step, the answer says what one takes": "eval-batch-size "
    "per-device-eval-batch-size",
    "GaLore, BAdam, APOLLO and LoMo are not planned": "use-galore galore use-badam use-apollo lomo "
    "galore-rank optim-target-modules",
    "layers that are frozen in full fine-tuning are not planned: use --mode lora, or --mode full for all of "
    "them": "freeze-trainable-layers unfrozen-parameters freeze",
    "preference training is not planned yet; `memplan dry-run -- COMMAND` runs the trainer itself on a card "
    "that is not there": "dpo grpo kto orpo ppo rloo rm reward rlhf rl beta ref-model num-generations",
    "NEFTune's noise is not planned": "neftune-noise-alpha",
    "what torch.compile saves is not planned": "torch-compile torch-compile-backend compile",
    "LoRA variants other than rsLoRA and DoRA are not planned": "use-lora-fa pissa-init lora-fa loraplus "
    "use-vera vera oft",
    "Liger-Kernel's other kernels are not planned, its fused loss is (--loss liger)": "liger-rope "
    "liger-rms-norm liger-glu-activation liger-layer-norm liger-swiglu",
}
_REFUSED = {name: sentence for sentence, names in _NOT_PLANNED.items() for name in names.split()}

# What moves no memory of the card in a step, or so little that nobody asks.
_HARMLESS = (
    "learning-rate lr lr-scheduler lr-scheduler-type warmup warmup-steps warmup-ratio weight-decay epochs "
    "num-epochs num-train-epochs max-steps steps seed dataset dataset-name dataset-config dataset-dir "
    "dataset-text-field dataset-num-proc datasets template chat-template do-train do-eval stage output-dir "
    "output overwrite-output-dir logging-steps logging-dir logging-strategy save-steps save-strategy "
    "save-total-limit save-only-model eval-steps eval-strategy report-to wandb-project run-name push-to-hub "
    "hub-model-id adam-beta1 adam-beta2 adam-epsilon preprocessing-num-workers dataloader-num-workers "
    "overwrite-cache plot-loss trust-remote-code bias lora-bias lora-task-type tf32 group-by-length val-size "
    "max-samples resume-from-checkpoint ddp-timeout remove-unused-columns load-best-model-at-end "
    "disable-tqdm log-level train-on-inputs completion-only-loss assistant-only-loss eos-token pad-token"
)
HARMLESS = frozenset(_HARMLESS.split())

_OURS = {name: ours for ours, names in NAMES.items() for name in names.split()}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "null")
_MODULES = re.compile(r"\w*_proj|lm_head|embed_tokens|gate|query_key_value|dense\w*|c_attn|c_proj|fc\d")


class Unplanned(MemplanError):
    """An option of a trainer that has no meaning here."""


@dataclass
class Reading:
    """A command line in memplan's words. ``echoed``: what was read as what; ``left_out``: what moves no
    memory."""

    words: list[str] = field(default_factory=list)
    echoed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def remarks(self) -> Iterator[str]:
        """Sentences that say how the command line was read."""
        if self.echoed:
            yield "read as memplan's options: " + ", ".join(dict.fromkeys(self.echoed))
        if self.left_out:
            yield "left out, for it moves no memory: " + ", ".join(dict.fromkeys(self.left_out))


def read(arguments: Sequence[str], actions: Mapping[str, argparse.Action]) -> Reading:
    """The command line in memplan's words, for a command that takes the options ``actions``. Raises
    Unplanned."""
    if "--seq-len" not in actions:  # the command asks about no recipe
        return Reading(_with_hyphens(arguments, actions))
    return _Reader(arguments, actions).read()


def refuse_unplanned(typed: str, name: str) -> None:
    """Raise Unplanned where a name, of an option or of a mode, stands for what is known and not planned."""
    sentence = _REFUSED.get(name.lower().replace("_", "-"))
    if sentence is not None:
        raise Unplanned(f"{typed}: {sentence}")


def close(name: str, actions: Mapping[str, argparse.Action]) -> str | None:
    """The option that a misspelt one means, as it is called here; None where nothing is close."""
    from difflib import get_close_matches

    known = {option: option for option in actions if option.startswith("--")}
    if "--seq-len" in actions:
        known |= {f"--{word}": f"--{ours}" for word, ours in _OURS.items() if f"--{ours}" in actions}
        known |= {f"--{word}": f"--{word}" for word in (*SWITCHES, *_IN_ALL)}
    matches = get_close_matches(name.lower().replace("_", "-"), known, n=1, cutoff=0.8)
    return known[matches[0]] if matches else None


def length(text: str) -> str:
    """A number of tokens, which may be written 4k or 32K."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s?[kK]", text.strip())
    return text if found is None else str(int(float(found[1]) * 1024))


def _with_hyphens(arguments: Sequence[str], actions: Mapping[str, argparse.Action]) -> list[str]:
    """Options with - for _, up to a ``--``."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [*(_hyphened(word, actions) for word in arguments[:end]), *arguments[end:]]


def _hyphened(word: str, actions: Mapping[str, argparse.Action]) -> str:
    name, equals, value = word.partition("=")
    ours = name.replace("_", "-")
    return word if name in actions or ours not in actions else ours + equals + value


class _Reader:
    def __init__(self, arguments: Sequence[str], actions: Mapping[str, argparse.Action]) -> None:
        self.rest, self.actions = list(arguments), actions
        self.reading = Reading()
        self.modes: list[str] = []  # that switches stand for
        self.unquantised: str | None = None  # what says that the base is not in 4 bits
        self.halves: set[str] = set()  # which of bf16 and fp16 are on
        self.in_all: tuple[str, str] | None = None  # GPUs of all nodes: as typed, and how many
        self.in_shards: tuple[str, str] | None = None  # those that divide a model

    def read(self) -> Reading:
        while self.rest:
            word = self.rest.pop(0)
            if word == "--":
                self.reading.words += [word, *self.rest]
                break
            if word.startswith("-") and len(word) > 1:
                self._option(word)
            else:
                self.reading.words.append(word)
        self._settle_mode()
        self._settle_nodes()
        self._settle_shards()
        return self.reading

    def _option(self, word: str) -> None:
        typed, equals, value = word.partition("=")
        name = typed.lstrip("-").lower().replace("_", "-")
        given = value if equals else None
        if typed in self.actions or f"--{name}" in self.actions:
            self._ours(typed, typed if typed in self.actions else f"--{name}", given)
        elif typed.startswith("--") and name in _IN_ALL and "--gpus" in self.actions:
            self.in_all = typed, given or self._take_value() or ""
        elif typed.startswith("--") and name in _IN_SHARDS and "--dp-replicate" in self.actions:
            self.in_shards = typed, given or self._take_value() or ""
        elif typed.startswith("--") and name.removeprefix("no-") in SWITCHES:
            self._switch(typed, name, given)
        elif (ours := _OURS.get(name if typed.startswith("--") else typed)) and f"--{ours}" in self.actions:
            self._ours(typed, f"--{ours}", given)
        elif typed.startswith("--") and name.removeprefix("no-") in _OURS:
            ours = f"--no-{_OURS[name.removeprefix('no-')]}"
            self._ours(typed, ours if ours in self.actions else typed, given)
        elif typed.startswith("--") and name in ("quantization-bit", "quantization-bits", "bits"):
            self._bits(typed, given)
        elif typed.startswith("--") and name in HARMLESS:
            self.reading.left_out.append(typed)
            given = self._take_value() if given is None else given
            if name == "stage":  # LLaMA-Factory's: sft, or what is planned no more than --dpo
                refuse_unplanned(f"{typed} {given}", given or "")
        elif typed.startswith("--"):
            refuse_unplanned(typed, name)
            self.reading.words.append(word)
        else:
            self.reading.words.append(word)

    def _take_value(self) -> str | None:
        """The word after an option, if it is no option."""
        return self.rest.pop(0) if self.rest and not self.rest[0].startswith("--") else None

    def _truth(self, given: str | None) -> bool:
        """What follows a switch: true, false, or nothing, which is true."""
        if given is None and self.rest and self.rest[0].lower() in (*_TRUE, *_FALSE):
            given = self.rest.pop(0)
        if given is None or given.lower() in _TRUE:
            return True
        if given.lower() in _FALSE:
            return False
        raise Unplanned(f"{shown(given)} is neither true nor false")

    def _ours(self, typed: str, ours: str, given: str | None) -> None:
        """One of memplan's own options, however it was typed."""
        words = self.reading.words
        action = self.actions.get(ours)
        if action is None or action.nargs == 0:
            switch = isinstance(action, argparse.BooleanOptionalAction)
            if switch and not self._truth(given):
                ours = ours.replace("--no-", "--", 1) if ours.startswith("--no-") else f"--no-{ours[2:]}"
            elif not switch and given is not None:
                ours = f"{ours}={given}"  # which argparse refuses in its words
            words.append(ours)
            if typed != ours and _plain(typed) != ours:
                self._echo(typed, None, ours)
            return
        if given is None and action.nargs is None:
            given = self._take_value()
        if given is None:
            words.append(ours)  # which takes several values, or argparse says that one is missing
            return
        typed_value = given
        if ours == "--target-modules":
            while (
                self.rest
                and _MODULES.fullmatch(given.rpartition(",")[2])
                and _MODULES.fullmatch(self.rest[0])
            ):
                given += "," + self.rest.pop(0)
        value = self._value(ours[2:], given)
        words.append(f"{ours}={value}")
        if _plain(typed) != ours or (value != typed_value and value.lower() != typed_value.lower()):
            self._echo(typed, given, f"{ours} {value}")

    def _value(self, ours: str, given: str) -> str:
        if ours in ("seq-len", "batch-size"):
            return length(given)
        known = VALUES.get(ours, {})
        plain = given.strip().lower()
        if ours == "mode":
            refuse_unplanned(f"--mode {given}", plain)
        if plain.replace("_", "-") in known:
            return known[plain.replace("_", "-")]
        action = self.actions[f"--{ours}"]
        choices = [str(choice) for choice in action.choices or ()]
        if "," in plain and {*plain.split(",")} <= {*choices}:
            raise Unplanned(f"--{ours} takes one of them; `memplan compare MODEL --sweep {ours}={plain}` all")
        if ours == "optimizer" or (choices and given not in choices and plain in choices):
            return plain
        return given

    def _switch(self, typed: str, name: str, given: str | None) -> None:
        bare = name.removeprefix("no-")
        if bare == "flash-attn" and given is None and self.rest:  # LLaMA-Factory's takes a kernel
            after = self.rest[0].lower().replace("_", "-")
            given = self.rest.pop(0) if after in VALUES["attn"] or after in ("sdpa", "eager") else None
        if given is not None and given.lower() not in (*_TRUE, *_FALSE) and bare == "flash-attn":
            self._ours(typed, "--attn", given)
            return
        on = self._truth(given) is (bare == name)
        if bare in _AS_PLANNED:
            self.reading.echoed.append(f"{typed}: {_AS_PLANNED[bare]}")
            return
        stands_for = SWITCHES[bare][0 if on else 1]
        if SWITCHES[bare][0] == "--mode qlora" and not on:
            self.unquantised = f"{typed} false" if bare == name else typed
        if bare in ("bf16", "fp16") and on:
            self.halves.add(bare)
            if len(self.halves) > 1:
                raise Unplanned("a run is in one of bf16 and fp16: leave out the other")
        if stands_for.startswith("--mode "):
            self.modes.append(stands_for.split()[1])
        elif stands_for:
            if bare == "fp16" and on and self._full():  # full fine-tuning in fp16 keeps its weights in fp32
                stands_for = "--dtype float32 --autocast"
            self.reading.words += stands_for.split()
        self._echo(
            typed,
            None if on or bare != name else "false",
            stands_for or ("no mode qlora" if self.unquantised else "the default"),
        )

    def _bits(self, typed: str, given: str | None) -> None:
        bits = given or self._take_value() or ""
        if bits == "4":
            self.modes.append("qlora")
            self._echo(typed, bits, "--mode qlora")
        elif bits in ("16", "none"):
            self.unquantised = f"{typed} {bits}"
        else:
            raise Unplanned(
                f"{typed} {bits}: weights of 4 bits (--mode qlora) and 16 bits are planned, no others"
            )

    def _full(self) -> bool:
        every = " ".join([*self.reading.words, *self.rest, *(f"--mode={mode}" for mode in self.modes)])
        return re.search(r"--mode[= ]full\b|--(full|fft|full.finetun(e|ing))\b", every) is not None

    def _settle_mode(self) -> None:
        """One mode of all that was said: adapters on a 4-bit base are QLoRA."""
        words = self.reading.words
        said = [word for word in words if word.startswith("--mode=")]
        modes = {*self.modes, *(word.removeprefix("--mode=") for word in said)}
        if self.unquantised and "--mode" in self.actions and (not modes or "qlora" in modes):
            raise Unplanned(
                f"{self.unquantised}: the base is in 4 bits in mode qlora; give --mode lora or full"
            )
        if not self.modes:
            return
        if "full" in modes and len(modes) > 1:
            other = "4-bit weights" if "qlora" in modes else "adapters"
            raise Unplanned(f"mode full has no {other}: ask for one of {' and '.join(sorted(modes))}")
        mode = "qlora" if "qlora" in modes else self.modes[-1]
        self.reading.words = [word for word in words if word not in said] + [f"--mode={mode}"]

    def _settle_nodes(self) -> None:
        """GPUs of all nodes, as GPUs of each."""
        if self.in_all is None:
            return
        typed, told = self.in_all
        nodes = self._number("--nodes") or 1
        each = told
        if nodes > 1 and told.isdecimal() and len(told) < 10:
            if int(told) % nodes:
                raise Unplanned(f"{typed} {told} are all of them, which {nodes} nodes can't divide evenly")
            each = str(int(told) // nodes)
        self.reading.words.append(f"--gpus={each}")
        self._echo(typed, told, f"--gpus {each}" + (f" on each of {nodes} nodes" if nodes > 1 else ""))

    def _settle_shards(self) -> None:
        """GPUs that divide a model, as how many times it is there, or as how many GPUs each node has."""
        if self.in_shards is None:
            return
        typed, told = self.in_shards
        if not told.isdecimal() or not 0 < int(told[:5]) < 5000:
            raise Unplanned(f"{typed} takes a whole number of GPUs, not {shown(told)}")
        shards, nodes, replicas = int(told), self._number("--nodes") or 1, self._number("--dp-replicate")
        named = [word.partition("=")[2] for word in self.reading.words if word.startswith("--gpu=")]
        each = self._number("--gpus") or (together(named) if named else None)
        if each is None:
            every = shards * (replicas or 1)
            if every % nodes:
                raise Unplanned(f"{every} GPUs are not as many on each of {nodes} nodes")
            self.reading.words.append(f"--gpus={every // nodes}")
            self._echo(typed, told, f"--gpus {every // nodes}")
            return
        every = each * nodes
        if every % shards or replicas not in (None, every // shards):
            times = "" if replicas is None else f" times {replicas} replicas"
            raise Unplanned(f"{typed} {told}{times} does not make {every} GPUs")
        if every > shards and replicas is None:
            self.reading.words.append(f"--dp-replicate={every // shards}")
        self._echo(typed, told, f"--dp-replicate {every // shards} of {every} GPUs")

    def _number(self, option: str) -> int | None:
        """What was said of an option that takes a small number."""
        said = [word.partition("=")[2] for word in self.reading.words if word.startswith(f"{option}=")]
        return int(said[-1]) if said and said[-1].isdecimal() and len(said[-1]) < 5 else None

    def _echo(self, typed: str, value: str | None, ours: str) -> None:
        self.reading.echoed.append(f"{typed}{'' if value is None else f' {value}'} is {ours}")


def _plain(typed: str) -> str:
    return typed.replace("_", "-")
