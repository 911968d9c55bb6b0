"""Several processes that train together: what each is told, as ``accelerate launch`` tells it, and what they
measured, put together. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memplan.asked.recipe import Recipe
from memplan.errors import MemplanError
from memplan.verify.measurement import Measurement, Rank

if TYPE_CHECKING:
    from memplan.verify.job import Job

MOST_ON_A_HOST = 8  # processes; each has the libraries, which are half a GiB, and the model
# a shell's own settings, which are not the recipe's
_THEIRS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def rank_here(recipe: Recipe) -> int:
    """Which of the processes that train together this one is."""
    return int(os.environ["RANK"]) if recipe.gpus > 1 else 0


def check_engine(parallel: str | None, gpus: int) -> None:
    """Raise MemplanError where no run of several processes is verified with that engine."""
    if parallel not in (None, "ddp", "fsdp2"):
        raise MemplanError(
            f"verify trains with ddp and fsdp2, not with {parallel}: run your own script of it with "
            f"`memplan dry-run --gpu {gpus}xCARD`, and compare with the plan"
        )


def check(recipe: Recipe, device: str, loop: str) -> None:
    """Raise MemplanError unless several processes can train so."""
    if recipe.gpus == 1:
        return
    if loop == "memplan":
        raise MemplanError(
            "memplan's own loop trains on one GPU; several need transformers' Trainer: use --loop trainer"
        )
    check_engine(recipe.parallel, recipe.gpus)
    if recipe.shard_dtype is not None or recipe.reduce_dtype is not None:
        raise MemplanError(
            "accelerate sets up FSDP2's mixed precision by itself: leave out --shard-dtype and --reduce-dtype"
        )
    if device == "cpu":
        if recipe.offload is not None:
            raise MemplanError("on a CPU there is nothing to offload from: use --device cuda")
        if recipe.gpus > MOST_ON_A_HOST:
            raise MemplanError(
                f"on a CPU at most {MOST_ON_A_HOST} processes are started: --gpus {recipe.gpus} is too many"
            )


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(job: Job, inherited: Mapping[str, str], rank: int, port: int) -> dict[str, str]:
    """A rank's environment, of what all of them inherit: torchrun's variables, and those that accelerate's
    launcher sets for the engine (1.15 utils/launch.py)."""
    recipe = job.recipe
    world = str(recipe.gpus)
    found = {name: value for name, value in inherited.items() if not name.startswith(_THEIRS)}
    found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if recipe.parallel == "fsdp2":
        found |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": str(recipe.reshard_after_forward is not False).lower(),
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_OFFLOAD_PARAMS": str(recipe.offload is not None).lower(),
        }
    if recipe.gpus > recipe.shards:
        found |= {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(recipe.dp_replicate),
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(recipe.shards),
        }
    if job.device == "cpu":
        # it would call it cpu:0, which is another device than cpu: each batch would be copied
        found["ACCELERATE_TORCH_DEVICE"] = "cpu"
        found.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // recipe.gpus, 1)))
    return found


def together(measured: Mapping[int, Measurement], first_to_fail: int | None = None) -> Measurement:
    """One measurement of those of several ranks, which need not be all of them: that of the first rank, or
    of the one that failed before the others did, with every rank's figures."""
    lead = min(measured) if first_to_fail is None else first_to_fail
    ranks = []
    for rank, one in sorted(measured.items()):
        own = {name: getattr(one, name) for name in Rank.model_fields}
        ranks.append(Rank(**own | {"rank": rank, "tape": None if rank == lead else one.tape}))
    return measured[lead].model_copy(update={"rank": lead, "ranks": tuple(ranks)})
