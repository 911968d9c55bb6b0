"""How a model is trained: a frozen, fully explicit record. Defaults and their sources: docs/recipe.md."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from memplan import rooms, stacks
from memplan.asked.options import (
    SHORT_DTYPES,
    Option,
    elements,
    loads_onto,
    names,
    of_adapters,
    of_four_bits,
    of_optimizer,
    of_precision,
    of_step,
    pixels,
    targets,
)
from memplan.errors import MemplanError, RecipeError, UnknownName, printable


class Mode(str, Enum):
    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class DTypeName(str, Enum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class QuantType(str, Enum):
    NF4 = "nf4"
    FP4 = "fp4"


class Batches(str, Enum):
    """What a batch is made of: whole sequences, some that are shorter and so padded, or several in a row."""

    FULL = "full"
    PADDED = "padded"
    PACKED = "packed"


class Offload(str, Enum):
    """What several GPUs keep on the host."""

    OPTIMIZER = "optimizer"
    BOTH = "both"


class BackwardPrefetch(str, Enum):
    """When FSDP1 gathers the next unit of a backward pass: before this one's, behind it, or at its turn."""

    PRE = "backward_pre"
    POST = "backward_post"
    NONE = "no_prefetch"


class Kernels(str, Enum):
    """What multiplies by 4-bit weights: bitsandbytes and PEFT as they are, or ``memplan.kernels``."""

    STOCK = "stock"
    MEMPLAN = "memplan"


_LONG_DTYPES = {short: long for long, short in SHORT_DTYPES.items()}

OPTIMIZER_ALIASES = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit"}
TRAINER_ALIASES = {"llama-factory": "llama_factory", "llamafactory": "llama_factory", "hf": "peft"}

_TRAINERS = "The trainer's ([trainers.md](trainers.md))."
_AS_TRAINER = "the trainer's"

_RECORD = 20  # options; the first records had 24
_MAX_TOKENS = 1 << 26  # in one step; logits of a vocabulary of 32,000 would be 4 TiB


def _named(room: str, kind: str, aliases: Mapping[str, str] | None = None) -> BeforeValidator:
    """Takes the name of a thing of a room (:mod:`memplan.rooms`), or an alias of one."""

    def known(value: Any) -> Any:
        name = (aliases or {}).get(value, value) if isinstance(value, str) else value
        if isinstance(name, str) and name not in rooms.names(room):
            every = f"The {kind}s are {', '.join(rooms.names(room))}."
            error = UnknownName(kind, value, rooms.names(room))
            raise error if error.close else UnknownName(kind, value, (), hint=every)
        return name

    return BeforeValidator(known)


def _trainer(name: Any) -> Any:
    """Takes the name of a trainer, however it is written."""
    if not isinstance(name, str):
        return name
    plain = name.strip().lower().replace("_", "-")
    told = stacks.NOT_PLAYED.get(plain)
    if told is not None:
        raise RecipeError(f"{told}, which memplan does not play: `memplan dry-run` runs it as it is")
    found = TRAINER_ALIASES.get(plain, plain)
    if found not in rooms.names("stacks"):
        raise UnknownName("trainer", name, (), hint=f"The trainers are {', '.join(rooms.names('stacks'))}.")
    return found


def _listed(room: str) -> Any:
    return Field(json_schema_extra=lambda schema: schema.update(enum=[*rooms.names(room)]))


OptimizerName = Annotated[str, _named("optimizers", "optimizer", OPTIMIZER_ALIASES), _listed("optimizers")]
AttentionName = Annotated[str, _named("attention", "attention implementation"), _listed("attention")]
LossName = Annotated[str, _named("losses", "loss"), _listed("losses")]
StrategyName = Annotated[str, _named("strategies", "strategy"), _listed("strategies")]
TrainerName = Annotated[str, BeforeValidator(_trainer), _listed("stacks")]


def _kind_of_adapters(recipe: Recipe) -> str:
    kinds = [name for name, used in (("rsLoRA", recipe.use_rslora), ("DoRA", recipe.use_dora)) if used]
    saving = f" saving {','.join(recipe.modules_to_save)}" if recipe.modules_to_save else ""
    return (" and ".join(kinds) or ("LoRA" if saving else "plain LoRA")) + saving


def _targeted(recipe: Recipe) -> str:
    targets = recipe.target_modules
    return f"targets {targets if isinstance(targets, str) else ','.join(targets)}"


def _checkpointing(recipe: Recipe) -> str:
    if not recipe.gradient_checkpointing:
        return "no checkpointing"
    return "reentrant checkpointing" if recipe.use_reentrant else "non-reentrant checkpointing"


Elements = Annotated[int, Field(ge=0, lt=1 << 40)] | Literal["auto"]
_EXAMPLES = "transformers' examples of DeepSpeed's files"


_AWAY = {Offload.OPTIMIZER: "optimizer", Offload.BOTH: "optimizer and parameters"}


def _seen(recipe: Recipe) -> str | None:
    if not recipe.images:
        return None
    width, height = recipe.image_size
    return f"{recipe.images} image{'s' if recipe.images > 1 else ''} of {width}x{height}"


def _elements(name: str, value: int | str | None) -> str | None:
    return None if value is None else f"{name} {value if isinstance(value, str) else f'{value:,}'}"


def _switched(name: str, on: bool) -> str:
    return name if on else f"no {name}"


class Recipe(BaseModel):
    """A training recipe. Frozen; anything left as None is resolved by :meth:`resolved`.

    Raises RecipeError with one sentence, or UnknownName for a name that does not exist.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Annotated[
        Mode,
        Option(
            group="",
            help="full: every weight; lora: adapters on a 16-bit base; qlora: on a 4-bit one",
            phrase=lambda r: r.mode.value,
            source="memplan's own: the mode in which most people ask whether it fits.",
        ),
    ] = Mode.QLORA
    trainer: Annotated[
        TrainerName,
        Option(
            group="",
            help="whose defaults the run has: {names}",
            metavar="NAME",
            room="stacks",
            phrase=lambda r: stacks.find(r.trainer).title,
            source="memplan's own: the trainer that most people fine-tune with ([trainers.md](trainers.md)).",
        ),
    ] = stacks.DEFAULT
    r: Annotated[
        int,
        of_adapters(
            help="rank",
            metavar="N",
            phrase=lambda r: f"r {r.r}",
            source="PEFT, `peft/tuners/lora/config.py`, `LoraConfig.r`.",
        ),
    ] = Field(default=8, ge=1)
    lora_alpha: Annotated[
        float | None,
        of_adapters(
            help="scale; costs no memory",
            default="2 r",
            metavar="X",
            phrase=lambda r: f"alpha {2.0 * r.r if r.lora_alpha is None else r.lora_alpha:g}",
            source=(
                "Twice `r`, as LLaMA-Factory has it and most recipes do; PEFT's `LoraConfig.lora_alpha` "
                "is 8. A Python number: it takes no memory."
            ),
        ),
    ] = Field(default=None, gt=0, allow_inf_nan=False)
    lora_dropout: Annotated[
        float,
        of_adapters(
            help="dropout",
            metavar="P",
            phrase=lambda r: f"dropout {r.lora_dropout:g}",
            source="PEFT, `LoraConfig.lora_dropout`. At 0 the layer is `nn.Identity` and saves no mask.",
        ),
    ] = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False)
    target_modules: Annotated[
        str | tuple[str, ...],
        of_adapters(
            help="all-linear, attention or q,v; names with commas between them; or a regular expression, as "
            "PEFT takes them",
            metavar="T",
            read=targets,
            phrase=_targeted,
            source=(
                "PEFT's name for every linear layer but the output (`peft/utils/constants.py`, "
                "`INCLUDE_LINEAR_LAYERS_SHORTHAND`), and the QLoRA paper's choice. With none given, "
                "PEFT takes `q_proj` and `v_proj` in Llama-like models (same file): ask for `q,v`."
            ),
        ),
    ] = "all-linear"
    modules_to_save: Annotated[
        tuple[str, ...],
        of_adapters(
            help="modules trained in full beside the adapters",
            default="",
            metavar="NAMES",
            read=names,
            rest=(),
            told_with="use_rslora",
            source="PEFT, `LoraConfig.modules_to_save` is None.",
        ),
    ] = ()
    use_rslora: Annotated[
        bool,
        of_adapters(
            help="rank-stabilised scale",
            default="",
            rest=False,
            phrase=_kind_of_adapters,
            source="PEFT, `LoraConfig.use_rslora`.",
        ),
    ] = False
    use_dora: Annotated[
        bool,
        of_adapters(
            help="weight-decomposed adapters",
            default="",
            rest=False,
            told_with="use_rslora",
            source="PEFT, `LoraConfig.use_dora`.",
        ),
    ] = False
    adapter_dtype: Annotated[
        DTypeName,
        of_adapters(
            help="adapters' dtype",
            default=_AS_TRAINER,
            short=_LONG_DTYPES,
            phrase=lambda r: f"{SHORT_DTYPES[r.adapter_dtype.value]} adapters",
            source=_TRAINERS,
        ),
    ] = DTypeName.FLOAT32
    quant_type: Annotated[
        QuantType,
        of_four_bits(
            help="4-bit code",
            phrase=lambda r: r.quant_type.value + (" double-quantised" if r.double_quant else ""),
            source=(
                "The QLoRA paper and PEFT's guide to quantisation. "
                "`BitsAndBytesConfig.bnb_4bit_quant_type` is `fp4` "
                "(`transformers/utils/quantization_config.py`), of the same size."
            ),
        ),
    ] = QuantType.NF4
    double_quant: Annotated[
        bool,
        of_four_bits(
            help="quantise the quantisation constants too",
            told_with="quant_type",
            source=(
                "The QLoRA paper and LLaMA-Factory. `BitsAndBytesConfig.bnb_4bit_use_double_quant` is "
                "False: ask for `--no-double-quant`."
            ),
        ),
    ] = True
    kbit_prep: Annotated[
        bool | None,
        of_four_bits(
            help="PEFT's prepare_model_for_kbit_training, which upcasts what is not 4-bit",
            default=_AS_TRAINER,
            rest=False,
            phrase=lambda r: "kbit prep" if r.kbit_prep else "no kbit prep",
            source=f"{_TRAINERS} False in modes lora and full, which have nothing to prepare.",
        ),
    ] = None
    kernels: Annotated[
        Kernels,
        of_four_bits(
            help="what multiplies by 4-bit weights: bitsandbytes and PEFT, or memplan.kernels",
            rest=Kernels.STOCK,
            phrase=lambda r: None if r.kernels is Kernels.STOCK else f"{r.kernels.value} kernels",
            source=(
                "bitsandbytes and PEFT as they are. `memplan` is the model after "
                "`memplan.kernels.apply(model)` ([kernels.md](kernels.md)): NF4 and plain LoRA only."
            ),
        ),
    ] = Kernels.STOCK
    dtype: Annotated[
        DTypeName,
        of_precision(
            help="what weights are loaded in; bf16, fp16 and fp32 will do",
            first=True,
            default=_AS_TRAINER,
            short=_LONG_DTYPES,
            phrase=lambda r: SHORT_DTYPES[r.dtype.value],
            source=_TRAINERS,
        ),
    ] = DTypeName.BFLOAT16
    compute_dtype: Annotated[
        DTypeName | None,
        of_four_bits(
            help="what 4-bit layers multiply in, bnb_4bit_compute_dtype",
            default="as --dtype",
            short=_LONG_DTYPES,
            phrase=lambda r: (
                None
                if r.compute_dtype in (None, r.dtype)
                else f"computes in {SHORT_DTYPES[r.compute_dtype.value]}"
            ),
            source=(
                "The weights' dtype, as TRL's `get_quantization_config` has it (`trl/trainer/utils.py`). "
                "`BitsAndBytesConfig.bnb_4bit_compute_dtype` is float32 where nothing is said."
            ),
        ),
    ] = None
    autocast: Annotated[
        bool,
        of_precision(
            help="run under torch.autocast, the Trainer's bf16=True",
            first=True,
            default=_AS_TRAINER,
            phrase=lambda r: "autocast" if r.autocast else "no autocast",
            source=_TRAINERS,
        ),
    ] = False
    optimizer: Annotated[
        OptimizerName,
        of_optimizer(
            help="the Trainer's optim: {names}",
            metavar="NAME",
            room="optimizers",
            phrase=lambda r: r.optimizer + (f" with momentum {r.momentum:g}" if r.momentum else ""),
            source=_TRAINERS,
        ),
    ] = "adamw_torch_fused"
    momentum: Annotated[
        float,
        of_optimizer(
            help="of sgd",
            metavar="X",
            told_with="optimizer",
            source=(
                "torch, `torch/optim/sgd.py`; the Trainer passes one only from `optim_args` "
                "(`trainer_optimizer.py`, `_get_sgd`). Counts for `sgd` only."
            ),
        ),
    ] = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False)
    max_grad_norm: Annotated[
        float,
        of_optimizer(
            help="clip gradients; 0: never",
            metavar="X",
            phrase=lambda r: f"clip {r.max_grad_norm:g}" if r.max_grad_norm else "no clipping",
            source="transformers, `TrainingArguments.max_grad_norm`. 0 turns clipping off.",
        ),
    ] = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    gradient_accumulation_steps: Annotated[
        int,
        of_optimizer(
            help="forward and backward passes a step",
            metavar="N",
            phrase=lambda r: f"accumulate {r.gradient_accumulation_steps}",
            source="transformers, `TrainingArguments.gradient_accumulation_steps`.",
        ),
    ] = Field(default=1, ge=1)
    gradient_checkpointing: Annotated[
        bool | None,
        of_step(
            help="keep each layer's input only and recompute the rest",
            default=_AS_TRAINER,
            phrase=_checkpointing,
            source=_TRAINERS,
        ),
    ] = None
    use_reentrant: Annotated[
        bool | None,
        of_step(
            help="which of torch's two ways of checkpointing",
            default=_AS_TRAINER,
            told_with="gradient_checkpointing",
            source=(
                "Where the Trainer turns checkpointing on: False (`modeling_utils.py`, "
                "`_activation_checkpointing_enable`). Where PEFT's preparation does, it passes no kwargs and "
                "torch 2.13 is reentrant, with a warning (`torch/utils/checkpoint.py`, `checkpoint`)."
            ),
        ),
    ] = None
    use_cache: Annotated[
        bool,
        of_step(
            help="train with a cache of keys and values, which no Trainer does",
            phrase=lambda r: "key-value cache" if r.use_cache else None,
            source=(
                "transformers, `training_args.py`, `TrainingArguments.use_cache`: the Trainer sets the "
                "model's `use_cache` so (`trainer.py`, 5.23). A training loop of one's own leaves it as "
                "the config says, mostly on: ask for `--use-cache`. Checkpointing turns it off."
            ),
        ),
    ] = False
    attn: Annotated[
        AttentionName | None,
        of_step(
            help="attention kernel; flash is short for flash_attention_2",
            default="sdpa",
            room="attention",
            short={"flash": "flash_attention_2"},
            phrase=lambda r: r.attn or "sdpa",
            source="transformers, `modeling_utils.py`: `sdpa` where nothing is requested.",
        ),
    ] = None
    loss: Annotated[
        LossName,
        of_step(
            help="standard: as transformers; shifted: as its 4.46 to 4.48; chunked: as TRL; liger: fused",
            default=_AS_TRAINER,
            room="losses",
            phrase=lambda r: f"{r.loss} loss",
            source=(
                f"{_TRAINERS} "
                "`chunked` has, for a mixture of experts, the load-balancing loss that SFTTrainer adds "
                "(`aux_loss_enabled`; not where the config's `router_aux_loss_coef` is 0). `liger` is "
                "Liger-Kernel's fused linear cross entropy without its other kernels. `shifted` is that of "
                "transformers 4.46 to 4.48 (`loss/loss_utils.py`), which shifts logits and copies those of "
                "several sequences once more; all else stays as it is today."
            ),
        ),
    ] = "standard"
    batch_size: Annotated[
        int,
        of_step(
            help="sequences in one forward pass",
            first=True,
            flags=("--per-device-train-batch-size",),
            metavar="N",
            phrase=lambda r: f"{r.batch_size} × {r.seq_len} tokens",
            source=(
                "The smallest step: the question is whether a run fits at all. "
                "`TrainingArguments.per_device_train_batch_size` is 8."
            ),
        ),
    ] = Field(default=1, ge=1, le=1 << 20)
    seq_len: Annotated[
        int,
        of_step(
            help="tokens in a sequence",
            first=True,
            metavar="N",
            told_with="batch_size",
            source=(
                "No library default: the Trainer takes what the collator gives. TRL cuts at 1024, "
                "LLaMA-Factory at 2048, Axolotl at 512."
            ),
        ),
    ] = Field(default=2048, ge=1, le=1 << 24)
    batches: Annotated[
        Batches,
        of_step(
            help="full: sequences of --seq-len tokens; padded: some are shorter; packed: several to a row, "
            "kept apart by their positions",
            phrase=lambda r: None if r.batches is Batches.FULL else f"{r.batches.value} batches",
            source=(
                "Nothing is padded, so that SDPA is given no mask. `padded`: transformers, "
                "`masking_utils.py`, `_ignore_causal_mask_sdpa`: a mask is made. `packed`: TRL's `packing` "
                "and `padding_free` (`sft_trainer.py`, `DataCollatorForLanguageModeling`), transformers' "
                "`DataCollatorWithFlattening`: all rows of a batch end to end in one."
            ),
        ),
    ] = Batches.FULL
    images: Annotated[
        int,
        of_step(
            help="images in each sequence, of a model that sees",
            metavar="N",
            phrase=_seen,
            source=(
                "None: a batch of text, beside which the vision tower lies on the card. Images' tokens are "
                "part of --seq-len."
            ),
        ),
    ] = Field(default=0, ge=0, le=1 << 10)
    image_size: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1 << 16)], Annotated[int, Field(ge=1, le=1 << 16)]],
        of_step(
            help="width and height of each image in pixels, before its processor resizes it",
            default="1024x1024",
            metavar="WxH",
            read=pixels,
            told_with="images",
            source="memplan's own: a photograph as people train on it.",
        ),
    ] = (1024, 1024)
    device_map: Annotated[
        Literal["auto", "cuda"] | None,
        of_step(
            help="from_pretrained's. auto, cuda: weights are loaded onto the card; none: by the host, except "
            "in 4 bits",
            default=_AS_TRAINER,
            metavar="MAP",
            read=loads_onto,
            phrase=lambda r: f"device map {r.device_map}" if r.device_map else None,
            source=(
                f"{_TRAINERS} transformers, `modeling_utils.py`, `from_pretrained` has none: weights go to "
                "the host, and the Trainer moves the model; 4-bit ones go to the card in any case. `auto` "
                "loads all onto the card: block placement differs, by some MB. `cuda` (`cuda:0`, "
                '`{"": 0}`) does so without accelerate, which looks at the card first.'
            ),
        ),
    ] = None
    parallel: Annotated[
        StrategyName | None,
        of_step(
            help="how several GPUs share a step",
            default="ddp",
            room="strategies",
            phrase=lambda r: f"{r.parallel or 'ddp'} on {r.gpus} GPUs{_nodes(r)}" if r.gpus > 1 else None,
            source=(
                "accelerate, `commands/launch.py`: several processes without `--use_fsdp` or "
                "`--use_deepspeed` are DDP's. `fsdp2`: `--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy "
                "TRANSFORMER_BASED_WRAP --fsdp_reshard_after_forward true`. `zero1`, `zero2`, `zero3`: "
                "DeepSpeed's, with `overlap_comm` and with sizes of buckets as transformers' own examples "
                "have them (500,000,000 elements; those of ZeRO-3 `auto`). `tp`: transformers' own tensor "
                'parallel, `from_pretrained(..., tp_plan="auto")` under `torchrun`.'
            ),
        ),
    ] = None
    gpus: Annotated[
        int,
        of_step(
            help="GPUs that share a step; with --nodes those of each",
            metavar="N",
            told_with="parallel",
            source="One. `--gpu 8xh100` says it, too. In Python and JSON: all of them.",
        ),
    ] = Field(default=1, ge=1, le=4096)
    nodes: Annotated[
        int | None,
        of_step(
            help="machines with so many GPUs each, whose host's memory is of a machine",
            default="one",
            metavar="N",
            told_with="parallel",
            source="One. What a GPU takes goes by how many share the step, in however many machines.",
        ),
    ] = Field(default=None, ge=1, le=4096)
    dp_replicate: Annotated[
        int | None,
        of_step(
            help="of FSDP: how many times the model is there, each divided over its share of the GPUs (HSDP)",
            default="once",
            metavar="N",
            phrase=lambda r: f"{r.dp_replicate} replicas × {r.shards} shards" if r.dp_replicate else None,
            source=(
                "accelerate, `parallelism_config.py`, `ParallelismConfig`: `dp_replicate_size` is 1, and "
                "`dp_shard_size` all GPUs. Of FSDP1's `HYBRID_SHARD` it is the number of machines."
            ),
        ),
    ] = Field(default=None, ge=1, le=4096)
    reshard_after_forward: Annotated[
        bool | None,
        of_step(
            help="FSDP's: let go of a layer's gathered parameters until its backward (off: SHARD_GRAD_OP)",
            default="on",
            phrase=lambda r: (
                None
                if r.reshard_after_forward is None
                else _switched("reshard_after_forward", r.reshard_after_forward)
            ),
            source="accelerate, `utils/dataclasses.py`: `FSDP_RESHARD_AFTER_FORWARD` is true.",
        ),
    ] = None
    offload: Annotated[
        Offload | None,
        of_step(
            help="what ZeRO or FSDP keeps on the host",
            default="nothing",
            phrase=lambda r: f"{_AWAY[r.offload]} on the host" if r.offload else None,
            source=(
                "DeepSpeed's `offload_optimizer` and `offload_param`, with `pin_memory`; accelerate, "
                "`utils/deepspeed.py`, `map_pytorch_optim_to_deepspeed`, puts its DeepSpeedCPUAdam in the "
                "optimizer's place. FSDP offloads both (`--fsdp_offload_params true`)."
            ),
        ),
    ] = None
    overlap_comm: Annotated[
        bool | None,
        of_step(
            help="DeepSpeed's: gradients and parameters travel on streams of their own",
            default="on",
            phrase=lambda r: None if r.overlap_comm is None else _switched("overlap_comm", r.overlap_comm),
            source=f"{_EXAMPLES}; DeepSpeed's own default is off for ZeRO-1 and 2.",
        ),
    ] = None
    reduce_bucket_size: Annotated[
        Elements | None,
        of_step(
            help="DeepSpeed's: elements of gradients that are reduced together",
            metavar="N",
            default="500000000; of ZeRO-3 auto, the width squared",
            read=elements,
            phrase=lambda r: _elements("reduce_bucket_size", r.reduce_bucket_size),
            source=f"{_EXAMPLES}; DeepSpeed's own default is 500,000,000 (`runtime/zero/config.py`).",
        ),
    ] = None
    stage3_prefetch_bucket_size: Annotated[
        Elements | None,
        of_step(
            help="DeepSpeed's: elements of parameters that are gathered ahead",
            metavar="N",
            default="auto, 0.9 times the width squared",
            read=elements,
            phrase=lambda r: _elements("stage3_prefetch_bucket_size", r.stage3_prefetch_bucket_size),
            source=f"{_EXAMPLES}; DeepSpeed's own default is 50,000,000.",
        ),
    ] = None
    stage3_param_persistence_threshold: Annotated[
        Elements | None,
        of_step(
            help="DeepSpeed's: elements up to which a parameter stays whole",
            metavar="N",
            default="auto, ten times the width",
            read=elements,
            phrase=lambda r: _elements(
                "stage3_param_persistence_threshold", r.stage3_param_persistence_threshold
            ),
            source=f"{_EXAMPLES}; DeepSpeed's own default is 100,000.",
        ),
    ] = None
    shard_dtype: Annotated[
        DTypeName | None,
        of_step(
            help="what FSDP2 keeps shards of trained parameters in",
            default="float32",
            short=_LONG_DTYPES,
            phrase=lambda r: f"{SHORT_DTYPES[r.shard_dtype.value]} shards" if r.shard_dtype else None,
            source=(
                "accelerate, `utils/fsdp_utils.py`, `fsdp2_prepare_model`: what is trained is upcast to "
                "float32 under mixed precision."
            ),
        ),
    ] = None
    reduce_dtype: Annotated[
        DTypeName | None,
        of_step(
            help="what FSDP2 sums gradients over GPUs in",
            default="as it computes in",
            short=_LONG_DTYPES,
            phrase=lambda r: f"reduced in {SHORT_DTYPES[r.reduce_dtype.value]}" if r.reduce_dtype else None,
            source="accelerate, `utils/dataclasses.py`, `set_mixed_precision`: that of mixed precision.",
        ),
    ] = None
    backward_prefetch: Annotated[
        BackwardPrefetch | None,
        of_step(
            help="when FSDP1 gathers a unit's parameters for its backward",
            default="no_prefetch",
            phrase=lambda r: None if r.backward_prefetch is None else r.backward_prefetch.value,
            source=(
                "accelerate, `utils/dataclasses.py`, `FullyShardedDataParallelPlugin`: `NO_PREFETCH` where "
                "`--fsdp_backward_prefetch` is not said; `accelerate config` writes `BACKWARD_PRE`."
            ),
        ),
    ] = None
    forward_prefetch: Annotated[
        bool | None,
        of_step(
            help="FSDP1's: gather the next unit's parameters before a unit's forward",
            default="off",
            phrase=lambda r: (
                None if r.forward_prefetch is None else _switched("forward_prefetch", r.forward_prefetch)
            ),
            source="accelerate, `utils/dataclasses.py`: `FSDP_FORWARD_PREFETCH` is False.",
        ),
    ] = None
    alloc_conf: Annotated[
        str,
        of_step(
            help="PYTORCH_ALLOC_CONF of the run, such as expandable_segments:True",
            default="none",
            metavar="CONF",
            phrase=lambda r: r.alloc_conf or None,
            source="torch, `c10/core/AllocatorConfig.cpp`: `PYTORCH_ALLOC_CONF` is not set.",
        ),
    ] = ""

    if not TYPE_CHECKING:  # there, the fields are the signature

        def __init__(self, /, **options: Any) -> None:
            options = _with_trainer(options)
            try:
                super().__init__(**{**_settings(options), **options})
            except ValidationError as error:
                raise RecipeError(_sentence(error)) from None
            object.__setattr__(self, "__pydantic_fields_set__", set(options))  # the rest is the trainer's
            self._check_foreign(options)

    @field_validator("alloc_conf")
    @classmethod
    def _known_settings(cls, value: str) -> str:
        if value:
            from memplan.asked.alloc_conf import parse_settings

            parse_settings(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.mode is not Mode.QLORA and self.kbit_prep:
            raise ValueError(
                f"kbit_prep prepares a 4-bit base, which mode {self.mode.value} does not have: "
                "use --mode qlora"
            )
        if self.kernels is Kernels.MEMPLAN:
            self._check_kernels()
        if self.autocast and self.dtype is DTypeName.FLOAT16 and self.mode is Mode.FULL:
            raise ValueError(
                "full fine-tuning in fp16 under autocast needs fp32 weights: use --dtype float32 --autocast"
            )
        if self.mode is not Mode.FULL and not self._has_adapters_of(self.adapter_dtype):
            raise ValueError(
                f"adapters are float32, or of the base's dtype with PEFT's autocast_adapter_dtype=False: "
                f"{self.adapter_dtype.value} on a {self.dtype.value} base can't be had"
            )
        if self.use_reentrant is not None and self.gradient_checkpointing is False:
            raise ValueError("use_reentrant says how to checkpoint, but gradient checkpointing is off")
        if self.images:
            self._check_images()
        if self.batches is not Batches.FULL:
            self._check_batches()
        if self.gpus % (self.nodes or 1):
            raise ValueError(f"{self.gpus} GPUs are not as many on each of {self.nodes} nodes")
        if self.parallel is not None:
            self._check_spread(self.parallel)
        if self.batch_size * self.seq_len > _MAX_TOKENS:
            raise ValueError(
                f"{self.batch_size} × {self.seq_len} tokens a step is more than any GPU can hold; "
                "lower the batch size or the sequence length"
            )
        return self

    def _check_spread(self, parallel: str | None) -> None:
        """What is said of several GPUs that share a step so, or of one."""
        sharded = parallel == "fsdp2"
        by_fsdp = sharded or parallel == "fsdp"
        for name in ("shard_dtype", "reduce_dtype"):
            if getattr(self, name) is not None and not (sharded and self.autocast):
                raise ValueError(f"{name} is of FSDP2's mixed precision: use --parallel fsdp2 --autocast")
        if parallel in ZERO:
            self._check_zero()
        else:
            for name in _OF_ZERO:
                if getattr(self, name) is not None and not (by_fsdp and name == "offload"):
                    whose = "ZeRO's or FSDP's" if name == "offload" else "DeepSpeed's"
                    raise ValueError(f"{name} is {whose}: use --parallel zero2 or zero3, or leave it out")
        for name in _OF_FSDP1:
            if getattr(self, name) is not None and parallel != "fsdp":
                raise ValueError(f"{name} is FSDP1's: use --parallel fsdp, or leave it out")
        if self.reshard_after_forward is not None and not by_fsdp:
            raise ValueError("reshard_after_forward is FSDP's: use --parallel fsdp2, or leave it out")
        if self.dp_replicate is not None:
            self._check_replicas(parallel)
        if parallel == "fsdp":
            self._check_flat()
        if parallel == "tp":
            self._check_divided()
        if by_fsdp and self.offload is Offload.OPTIMIZER:
            raise ValueError("FSDP offloads parameters and the optimizer together: use --offload both")
        if not sharded:
            return
        for name, rest, why in _NOT_SHARDED:
            if getattr(self, name) not in rest:
                raise ValueError(f"{why}: leave {name} out, or use --parallel ddp")
        if self.optimizer not in _SHARDED_OPTIMIZERS:
            raise ValueError(
                f"FSDP2 is planned with {' and '.join(_SHARDED_OPTIMIZERS)}, not with {self.optimizer}"
                + (", which can't update sharded parameters" if "8bit" in self.optimizer else "")
                + ": use one of them, or `memplan dry-run`"
            )
        if self.loss in ("liger", "shifted"):
            raise ValueError(f"FSDP2 with --loss {self.loss} is not planned: use `memplan dry-run`")
        if self.mode is not Mode.FULL and not self.autocast:
            raise ValueError(
                "FSDP2 gathers adapters and what they adapt together, which without mixed precision are of "
                "two dtypes and not planned: use --autocast"
            )

    def _check_replicas(self, parallel: str | None) -> None:
        """HSDP: what a world of so many GPUs divides into."""
        if parallel not in ("fsdp", "fsdp2"):
            raise ValueError("dp_replicate is FSDP's: use --parallel fsdp2, or leave it out")
        assert self.dp_replicate is not None
        if self.gpus == 1:  # how many is not said
            return
        if self.gpus % self.dp_replicate:
            raise ValueError(f"{self.gpus} GPUs are not as many in each of {self.dp_replicate} replicas")
        if self.shards == 1:
            raise ValueError(
                f"{self.dp_replicate} replicas on {self.gpus} GPUs have nothing to shard: use --parallel ddp"
            )

    def _check_flat(self) -> None:
        """What FSDP1 was compared with PyTorch's in."""
        if self.reshard_after_forward is False and self.mode is Mode.QLORA:
            raise ValueError(
                "FSDP1 (torch 2.13) stops in backward where 4-bit weights stay gathered after forward, "
                "for it takes them for changed: use --reshard-after-forward, or --parallel fsdp2"
            )
        if self.reshard_after_forward is False and self.offload is not None:
            raise ValueError(
                "FSDP1 that keeps layers gathered and offloads them is not planned: use "
                "--reshard-after-forward"
            )
        self._check_compared("FSDP1", _FLAT_AS_COMPARED)

    def _check_divided(self) -> None:
        """What tensor parallel was compared with transformers' in."""
        if self.mode is Mode.QLORA:
            raise ValueError(
                "PEFT (0.21) can't adapt 4-bit weights that tensor parallel divides, which qlora has, the "
                "mode unless another is said: use --mode full or lora, or --parallel fsdp2"
            )
        if self.optimizer not in _DIVIDED_OPTIMIZERS:
            raise ValueError(
                f"{self.optimizer} can't update parameters that tensor parallel divides (DTensors): use "
                f"{', '.join(_DIVIDED_OPTIMIZERS)}"
            )
        self._check_compared("tensor parallel", _DIVIDED_AS_COMPARED)

    def _check_zero(self) -> None:
        """What ZeRO was compared with DeepSpeed in."""
        if self.offload is not None and self.parallel == "zero1":
            raise ValueError("ZeRO-1 with offload is not planned: use --parallel zero2 or zero3")
        if self.offload is Offload.BOTH and self.parallel != "zero3":
            raise ValueError(
                "DeepSpeed offloads parameters in ZeRO-3 alone: use --parallel zero3, or --offload optimizer"
            )
        if self.reduce_bucket_size == 0:
            raise ValueError("reduce_bucket_size must be at least 1, or auto")
        for field in _OF_ZERO3:
            if self.parallel != "zero3" and getattr(self, field) is not None:
                raise ValueError(f"{field} is of ZeRO-3: use --parallel zero3, or leave it out")
        name = f"ZeRO-{self.parallel[-1]}" if self.parallel else ""
        if not self.autocast:
            raise ValueError(f"{name} is planned in bf16, as DeepSpeed trains with bf16=True: use --autocast")
        if self.parallel == "zero3" and self.mode is Mode.QLORA:
            raise ValueError(
                "ZeRO-3 does not divide 4-bit weights, which qlora has, the mode unless another is said: use "
                "--mode full or lora, or --parallel zero2 or fsdp2"
            )
        self._check_compared(name, _AS_COMPARED)

    def _check_compared(self, engine: str, settings: _Compared) -> None:
        """Raise ValueError where a setting is none of those in which the engine was compared."""
        for field, rest in settings:
            if (value := getattr(self, field)) not in rest:
                raise ValueError(
                    f"{engine} with {field} {getattr(value, 'value', value)} is not planned: leave it out, "
                    "use --parallel ddp, or run a rank of your own program with `memplan dry-run`"
                )

    def _check_batches(self) -> None:
        kind = self.batches.value
        if self.attn == "flash_attention_2":
            raise ValueError(
                f"what FlashAttention takes of {kind} batches hangs on how long each sequence is, and is not "
                "planned: use --attn sdpa, or `memplan dry-run`"
            )
        if self.batches is Batches.PADDED and self.seq_len == 1:
            raise ValueError("in a padded batch some rows are shorter than others, and none is below 1 token")
        if self.batches is Batches.PACKED and self.use_cache:
            raise ValueError("packed sequences are told apart only without a cache: leave out use_cache")
        if self.batches is Batches.PACKED and stacks.find(self.trainer).packed is None:
            raise ValueError(
                f"{stacks.find(self.trainer).title} packs with masks of its own, which are not planned: use "
                "`memplan dry-run`"
            )

    def _check_images(self) -> None:
        """What images were compared with."""
        for name, rest, what in (
            ("batches", (Batches.FULL,), f"{self.batches.value} batches"),
            ("attn", (None, "sdpa", "eager"), f"--attn {self.attn}"),
            ("loss", ("standard", "chunked"), f"the loss {self.loss}"),
            ("kernels", (Kernels.STOCK,), "memplan's kernels"),
        ):
            if getattr(self, name) not in rest:
                raise ValueError(
                    f"images with {what} are not planned: leave {name} out, or let `memplan dry-run -- "
                    "COMMAND` run your own program"
                )

    def as_fed(self) -> Recipe:
        """The same with rows as the model is given them: of packed batches, one with all tokens."""
        if self.batches is not Batches.PACKED:
            return self
        return self.model_copy(update={"batch_size": 1, "seq_len": self.batch_size * self.seq_len})

    def _has_adapters_of(self, dtype: DTypeName) -> bool:
        if dtype in (DTypeName.FLOAT32, self.dtype):
            return True
        # PEFT moves adapters of 4-bit layers to what those multiply in; TRL casts them
        return self.mode is Mode.QLORA and (
            dtype is self.compute_dtype
            or (dtype is DTypeName.BFLOAT16 and stacks.find(self.trainer).casts_adapters_back)
        )

    def _check_foreign(self, options: Mapping[str, Any]) -> None:
        """Refuse options that say nothing in the mode. Who says as many as nobody types has a record of a
        recipe, such as a plan's or a measurement's, maybe of a memplan with fewer: there, they may rest.
        """
        known = recipe_options()
        whole = len(options) >= _RECORD
        for name in sorted(options.keys() & known.keys()):
            option, value = known[name], getattr(self, name)
            if self.mode.value in option.modes or value in (None, option.rest):
                continue
            if whole and self._at_rest(name):
                continue
            if "lora" in option.modes:
                raise RecipeError(f"{name} belongs to adapters, which mode full does not have: leave it out")
            raise RecipeError(
                f"{name} belongs to 4-bit weights, which mode {self.mode.value} does not have"
                + (" (4-bit weights can't be trained in full)" if self.mode is Mode.FULL else "")
                + ": use --mode qlora"
            )

    def _at_rest(self, name: str) -> bool:
        value = getattr(self, name)
        if name == "lora_alpha":
            return bool(value == 2.0 * self.r)
        return bool(value == type(self).model_fields[name].default)

    def _check_kernels(self) -> None:
        """What memplan's kernels compute: PEFT's plain LoRA on NF4."""
        if self.mode is not Mode.QLORA:
            raise ValueError(
                f"memplan's kernels multiply by 4-bit weights, which mode {self.mode.value} does not have: "
                "use --mode qlora, or --kernels stock"
            )
        if self.quant_type is not QuantType.NF4:
            raise ValueError(
                f"memplan's kernels decode nf4, not {self.quant_type.value}: use nf4, or --kernels stock"
            )
        if self.use_dora:
            raise ValueError(
                "memplan's kernels compute plain LoRA, not DoRA: leave it out, or --kernels stock"
            )

    @property
    def weight_format(self) -> str | None:
        """The file in :mod:`memplan.weights` of frozen linear layers; None where they are of ``dtype``."""
        return "bnb_4bit" if self.mode is Mode.QLORA else None

    @property
    def casts_adapters_back(self) -> bool:
        """Whether its trainer casts what PEFT made fp32 to bf16."""
        return (
            self.mode is Mode.QLORA
            and self.adapter_dtype is DTypeName.BFLOAT16
            and stacks.find(self.trainer).casts_adapters_back
        )

    @property
    def gpus_per_node(self) -> int:
        """Those that share a host's memory."""
        return self.gpus // (self.nodes or 1)

    @property
    def shards(self) -> int:
        """GPUs that each have a part of one model."""
        return self.gpus // (self.dp_replicate or 1)

    @property
    def adapter(self) -> str:
        """The file in :mod:`memplan.adapters`."""
        return "dora" if self.use_dora else "lora"

    def resolved(self) -> Recipe:
        """The same recipe with every None replaced by what its trainer does (docs/trainers.md). Raises
        RecipeError for a strategy of one GPU."""
        if self.parallel is not None and self.gpus == 1:
            alone = "; DeepSpeed on one is not planned" if self.parallel in ZERO else ""
            raise RecipeError(f"{self.parallel} is for several GPUs: say how many, such as --gpus 8{alone}")
        stack = stacks.find(self.trainer)
        has = stack.of(self.mode.value)
        checkpointing = self.gradient_checkpointing
        if checkpointing is None:
            checkpointing = has["gradient_checkpointing"]
        known = self.model_copy(
            update={"kbit_prep": has.get("kbit_prep", False) if self.kbit_prep is None else self.kbit_prep}
        )
        reentrant = stack.reentrant(known) if self.use_reentrant is None else self.use_reentrant
        parallel = self.parallel or ("ddp" if self.gpus > 1 else None)
        if self.parallel is None:
            try:
                self._check_spread(parallel)
            except ValueError as error:
                raise RecipeError(str(error)) from None
        if parallel == "fsdp" and known.kbit_prep:
            raise RecipeError(
                "FSDP1 lays the parameters of a layer in one tensor, which norms in float32 beside 16-bit "
                "weights can't be (prepare_model_for_kbit_training): use --no-kbit-prep, or --parallel fsdp2"
            )
        if parallel in ("fsdp", "fsdp2") and self.use_reentrant is None:
            reentrant = False
        compute = self.dtype if self.compute_dtype is None else self.compute_dtype
        return self.model_copy(
            update={
                "lora_alpha": 2.0 * self.r if self.lora_alpha is None else self.lora_alpha,
                "kbit_prep": known.kbit_prep,
                "compute_dtype": compute if self.mode is Mode.QLORA else None,
                "gradient_checkpointing": checkpointing,
                "use_reentrant": reentrant if checkpointing else None,
                "attn": self.attn or "sdpa",
                "parallel": parallel,
                "device_map": self.device_map if self.gpus == 1 else None,
            }
        )


ZERO = ("zero1", "zero2", "zero3")
_OF_ZERO3 = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_OF_ZERO = ("offload", "overlap_comm", "reduce_bucket_size", *_OF_ZERO3)
_OF_FSDP1 = ("backward_prefetch", "forward_prefetch")
# fields that say nothing of one GPU
OF_SEVERAL = (
    *("parallel", "nodes", "dp_replicate", "reshard_after_forward", "shard_dtype", "reduce_dtype"),
    *_OF_FSDP1,
    *_OF_ZERO,
)
_Compared = tuple[tuple[str, tuple[Any, ...]], ...]
_AS_COMPARED: _Compared = (
    ("optimizer", ("adamw_torch_fused",)),
    ("dtype", (DTypeName.BFLOAT16, DTypeName.FLOAT32)),
    ("kernels", (Kernels.STOCK,)),
    ("use_dora", (False,)),
    ("use_cache", (False,)),
    ("modules_to_save", ((),)),
    ("loss", ("standard", "chunked")),
    ("momentum", (0.0,)),
)
_FLAT_AS_COMPARED: _Compared = (
    ("optimizer", ("adamw_torch", "adamw_torch_fused")),
    *(of for of in _AS_COMPARED if of[0] not in ("optimizer", "loss")),
    ("loss", ("standard", "shifted", "chunked")),
    ("use_reentrant", (None, False)),
)
_DIVIDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_DIVIDED_AS_COMPARED: _Compared = tuple(of for of in _AS_COMPARED if of[0] != "optimizer")
_SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_NOT_SHARDED = (
    ("kernels", (Kernels.STOCK,), "memplan's kernels multiply by whole 4-bit weights, which FSDP2 shards"),
    ("use_dora", (False,), "DoRA under FSDP2 is not planned"),
    (
        "use_reentrant",
        (None, False),
        "FSDP2 is planned with non-reentrant checkpointing, as the Trainer has it",
    ),
    ("use_cache", (False,), "FSDP2 with a cache of keys and values is not planned"),
    ("modules_to_save", ((),), "modules_to_save under FSDP2 are not planned"),
)


_RESOLVED = frozenset({"kbit_prep", "gradient_checkpointing"})  # None is the trainer's until it is resolved


def _nodes(recipe: Recipe) -> str:
    several = (recipe.nodes or 1) > 1
    return f" ({recipe.nodes} nodes × {recipe.gpus_per_node})" if several else ""


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the trainer sets, of the fields that can't be None. Nothing where the trainer or the mode is
    wrong, which the fields say."""
    trainer, mode = options.get("trainer", stacks.DEFAULT), options.get("mode", Mode.QLORA)
    try:
        trainer = _trainer(trainer)
    except MemplanError:
        return {}
    if not isinstance(trainer, str):
        return {}
    found = stacks.find(trainer).of(str(getattr(mode, "value", mode)))
    return {name: value for name, value in found.items() if name not in _RESOLVED}


def _with_trainer(options: dict[str, Any]) -> dict[str, Any]:
    """Records of before there were trainers are of PEFT's, and of TRL's where they have its loss."""
    if "trainer" in options or len(options) < _RECORD:
        return options
    return {"trainer": "trl" if options.get("loss") == "chunked" else "peft", **options}


@cache
def recipe_options() -> dict[str, Option]:
    """What is told of each field of a recipe, by its name."""
    return {
        name: next(told for told in field.metadata if isinstance(told, Option))
        for name, field in Recipe.model_fields.items()
    }


def _sentence(error: ValidationError) -> str:
    from memplan.errors import shown

    first = error.errors()[0]
    where = printable(".".join(str(part) for part in first["loc"][:1]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {shown(first['input'])}" if where else message
