"""How a model is trained: a frozen, fully explicit record. Defaults and their sources: docs/recipe.md."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
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

from memplan import rooms
from memplan.errors import RecipeError, UnknownName, printable


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


class Kernels(str, Enum):
    """What multiplies by 4-bit weights: bitsandbytes and PEFT as they are, or ``memplan.kernels``."""

    STOCK = "stock"
    MEMPLAN = "memplan"


OPTIMIZER_ALIASES = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit"}

TARGET_PRESETS = ("all-linear", "attention", "q,v")

# Options that say nothing without adapters, and without a 4-bit base.
OF_ADAPTERS = frozenset(
    (
        "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora",
        "adapter_dtype",
    )
)  # fmt: skip
OF_FOUR_BITS = frozenset(("quant_type", "double_quant"))

_MAX_TOKENS = 1 << 26  # in one step; logits of a vocabulary of 32,000 would be 4 TiB


def _named(room: str, kind: str, aliases: Mapping[str, str] | None = None) -> BeforeValidator:
    """Takes the name of a thing of a room (:mod:`memplan.rooms`), or an alias of one."""

    def known(value: Any) -> Any:
        name = (aliases or {}).get(value, value) if isinstance(value, str) else value
        if isinstance(name, str) and name not in rooms.names(room):
            raise UnknownName(kind, value, rooms.names(room))
        return name

    return BeforeValidator(known)


def _listed(room: str) -> Any:
    return Field(json_schema_extra=lambda schema: schema.update(enum=[*rooms.names(room)]))


OptimizerName = Annotated[str, _named("optimizers", "optimizer", OPTIMIZER_ALIASES), _listed("optimizers")]
AttentionName = Annotated[str, _named("attention", "attention implementation"), _listed("attention")]
LossName = Annotated[str, _named("losses", "loss"), _listed("losses")]


class Recipe(BaseModel):
    """A training recipe. Frozen; anything left as None is resolved by :meth:`resolved`.

    Raises RecipeError with one sentence, or UnknownName for a name that does not exist.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = Mode.QLORA
    r: int = Field(default=8, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False)
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    adapter_dtype: DTypeName = DTypeName.FLOAT32

    dtype: DTypeName = DTypeName.BFLOAT16
    autocast: bool = False
    quant_type: QuantType = QuantType.NF4
    double_quant: bool = True
    kbit_prep: bool | None = None
    kernels: Kernels = Kernels.STOCK

    optimizer: OptimizerName = "adamw_torch_fused"
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    gradient_accumulation_steps: int = Field(default=1, ge=1)

    gradient_checkpointing: bool | None = None
    use_reentrant: bool | None = None
    use_cache: bool = False
    attn: AttentionName | None = None
    loss: LossName = "standard"
    batch_size: int = Field(default=1, ge=1, le=1 << 20)
    seq_len: int = Field(default=2048, ge=1, le=1 << 24)

    device_map: Literal["auto"] | None = (
        None  # of from_pretrained; 4-bit models are always loaded onto the card
    )
    alloc_conf: str = ""  # PYTORCH_ALLOC_CONF

    if not TYPE_CHECKING:  # there, the fields are the signature

        def __init__(self, /, **options: Any) -> None:
            try:
                super().__init__(**options)
            except ValidationError as error:
                raise RecipeError(_sentence(error)) from None
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
                "full fine-tuning under autocast needs fp32 weights: use --dtype float32 --autocast"
            )
        if self.mode is not Mode.FULL and self.adapter_dtype not in (DTypeName.FLOAT32, self.dtype):
            raise ValueError(
                f"adapters are float32, or of the base's dtype with PEFT's autocast_adapter_dtype=False: "
                f"{self.adapter_dtype.value} on a {self.dtype.value} base can't be had"
            )
        if self.use_reentrant is not None and self.gradient_checkpointing is False:
            raise ValueError("use_reentrant says how to checkpoint, but gradient checkpointing is off")
        if self.batch_size * self.seq_len > _MAX_TOKENS:
            raise ValueError(
                f"{self.batch_size} × {self.seq_len} tokens a step is more than any GPU can hold; "
                "lower the batch size or the sequence length"
            )
        return self

    def _check_foreign(self, options: Mapping[str, Any]) -> None:
        """Refuse options that say nothing in the mode. Who says all of them has a record of a recipe, such as
        a plan's: there, those may be at rest."""
        given = {name for name in options if getattr(self, name) not in (None, ())}
        if options.keys() >= type(self).model_fields.keys():
            given = {name for name in given if not self._at_rest(name)}
        given -= {name for name in ("use_rslora", "use_dora") if not getattr(self, name)}
        for name in sorted(given & OF_FOUR_BITS if self.mode is not Mode.QLORA else ()):
            raise RecipeError(
                f"{name} belongs to 4-bit weights, which mode {self.mode.value} does not have"
                + (" (4-bit weights can't be trained in full)" if self.mode is Mode.FULL else "")
                + ": use --mode qlora"
            )
        for name in sorted(given & OF_ADAPTERS if self.mode is Mode.FULL else ()):
            raise RecipeError(f"{name} belongs to adapters, which mode full does not have: leave it out")

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
    def adapter(self) -> str:
        """The file in :mod:`memplan.adapters`."""
        return "dora" if self.use_dora else "lora"

    def resolved(self) -> Recipe:
        """The same recipe with every None replaced by what the stack does (docs/recipe.md)."""
        kbit_prep = self.mode is Mode.QLORA if self.kbit_prep is None else self.kbit_prep
        # prepare_model_for_kbit_training(use_gradient_checkpointing=True) is PEFT's default
        # (peft/utils/other.py, 0.21), so QLoRA checkpoints, with the upcasts or without them;
        # TrainingArguments leaves checkpointing off.
        checkpointing = self.gradient_checkpointing
        if checkpointing is None:
            checkpointing = self.mode is Mode.QLORA
        # transformers 5 checkpoints without reentrance when the Trainer is asked to; PEFT's preparation
        # leaves the choice to torch, whose default is still reentrant (torch/utils/checkpoint.py, 2.13).
        reentrant = self.use_reentrant
        if reentrant is None:
            reentrant = kbit_prep and self.gradient_checkpointing is None
        return self.model_copy(
            update={
                "lora_alpha": 2.0 * self.r if self.lora_alpha is None else self.lora_alpha,
                "kbit_prep": kbit_prep,
                "gradient_checkpointing": checkpointing,
                "use_reentrant": reentrant if checkpointing else None,
                "attn": self.attn or "sdpa",
            }
        )


def _sentence(error: ValidationError) -> str:
    from memplan.errors import shown

    first = error.errors()[0]
    where = printable(".".join(str(part) for part in first["loc"][:1]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {shown(first['input'])}" if where else message
