"""A run whose layers are on several stages: what its settings mean, and what is put together of the stages."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from moesaic import ranks
from moesaic.layers import expert_load
from moesaic.parallel.mesh import MeshLayout
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.schedules import SCHEDULES, check_schedule
from moesaic.parallel.split import PipelineConfig, Stages, layers_of_stages, name_in_whole
from moesaic.train.config import TrainConfig
from moesaic.train.errors import UserError

T = TypeVar("T")


def passes(config: TrainConfig) -> int:
    """How many parts a batch is cut into, each with a forward and a backward pass of its own."""
    return config.accumulate * microbatches(config)


def microbatches(config: TrainConfig) -> int:
    """How many of these parts are in the stages of a pipeline at the same time; 1 without stages."""
    if config.pp == 1:
        return 1
    # Twice as many as stages leave a third of the time idle in 1f1b, and are few enough for most batches.
    return config.microbatches or 2 * config.pp


def pipeline_config(config: TrainConfig) -> PipelineConfig:
    """How the model is cut."""
    return PipelineConfig(
        schedule=config.pp_schedule,
        stages_per_rank=config.stages_per_rank,
        layers=config.layers_per_stage or None,
    )


def pipeline_of(model: nn.Module, config: TrainConfig) -> Pipeline | None:
    """What trains a model that is cut into stages; None for others."""
    return Pipeline(model, microbatches(config), config.accumulate) if isinstance(model, Stages) else None


_FLAGS = {
    "microbatches": "--microbatches",
    "schedule": "--pp-schedule",
    "stages_per_rank": "--stages-per-rank",
    "layers": "--layers-per-stage",
    "pp": "--pp",
}


def check_pipeline(config: TrainConfig, layout: MeshLayout, num_layers: int | None) -> None:
    """Raise `UserError` if a run cannot have these stages. `num_layers` are those of the model, if they are known."""
    if config.pp == 1:
        given = {
            "--microbatches": config.microbatches,
            "--stages-per-rank": config.stages_per_rank,
            "--layers-per-stage": config.layers_per_stage or None,
        }
        if of_stages := [flag for flag, value in given.items() if value is not None]:
            instead = "; --accumulate cuts a batch into parts without stages" if "--microbatches" in of_stages else ""
            raise UserError(f"{of_stages[0]} is for a pipeline: add --pp, or leave it out{instead}")
        return
    without = {
        "--main-grads": (
            config.main_grads and SCHEDULES[config.pp_schedule].splits_backward,
            f"--pp-schedule {config.pp_schedule} makes the gradients of weights apart; choose 1f1b or interleaved",
        ),
        "--compile": (
            config.compile and SCHEDULES[config.pp_schedule].splits_backward,
            f"--pp-schedule {config.pp_schedule} makes the gradients of weights apart, which compiled layers cannot; "
            "choose 1f1b or interleaved",
        ),
        "--aux-loss": (
            config.aux_loss == "pooled" and config.aux_loss_coef != 0,
            "pooled is one loss over all layers, and a stage has some of them; choose batch or sequence",
        ),
    }
    for flag, (is_given, why) in without.items():
        if is_given:
            raise UserError(f"{flag} with --pp {config.pp}: {why}")
    options = pipeline_config(config)
    try:
        check_schedule(config.pp_schedule, layout, config.stages_per_rank, microbatches(config))
        if num_layers is not None:
            layers_of_stages(num_layers, config.pp * options.stages_on_a_rank(), options.layers)
    except ValueError as error:
        argument, _, text = str(error).partition(": ")
        raise UserError(f"{_FLAGS[argument]}: {text}") from error


def whole_load(model: nn.Module) -> dict[str, list[int]]:
    """How many tokens each expert of each layer got, also of layers on other stages. Collective."""
    loads = {name.rpartition(".")[0]: load.tolist() for name, load in expert_load(model).items()}
    return of_all_stages(model, loads) if isinstance(model, Stages) else loads


def of_all_stages(stages: Stages, own: dict[str, T]) -> dict[str, T]:
    """What belongs to the modules of all stages, by their names in the whole model, from what is here. Collective."""
    everyone: dict[str, T] = {}
    for theirs in ranks.gather({name_in_whole(name): value for name, value in own.items()}, stages.meshes.stages):
        everyone |= theirs
    order: list[str] = [name for name, _ in stages.skeleton.named_modules()]
    return {name: everyone[name] for name in order if name in everyone}
