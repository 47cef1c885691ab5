"""The training program: set up, train, save, and at the end measure, export and show a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from moesaic import ranks
from moesaic.checkpoint import CheckpointError, wait
from moesaic.checkpoint.run_folder import EXPORT, METRICS, PROFILE, RESULT, TENSORBOARD
from moesaic.layers import MoE, reset_expert_load
from moesaic.train import finish
from moesaic.train.config import TrainConfig, profiled_steps
from moesaic.train.console import Screen, describe, open_screen
from moesaic.train.errors import TrainingError, UserError
from moesaic.train.failure import failed, way_back
from moesaic.train.folder import write_json
from moesaic.train.lora import ADAPTER
from moesaic.train.metrics import (
    TIME,
    JsonlWriter,
    LenientWriter,
    MetricWriter,
    TensorBoardWriter,
    Value,
    read_jsonl,
)
from moesaic.train.model import num_parameters
from moesaic.train.prepared import PreparedText
from moesaic.train.profile import StepProfiler
from moesaic.train.run import Run, set_up
from moesaic.train.runtime import started
from moesaic.train.scores import Scores, measuring, scores_of
from moesaic.train.signals import StopRequest, linger_on_sigterm
from moesaic.train.step import train_step
from moesaic.train.training import save, take_best
from moesaic.train.watch import metrics_of, watching


def train(config: TrainConfig) -> None:
    """Run `moesaic train` with these settings, together with the other processes of the launch.

    Raises `UserError`, `CheckpointError` or `TrainingError` on all ranks, with a text for the user. A signal makes it
    save and return.
    """
    with started(config.device, config.timeout) as runtime:
        screen = open_screen(runtime.leader)
        run: Run | None = None
        try:
            if runtime.peers is not None:
                linger_on_sigterm()
            run = set_up(config, runtime, screen.message)
            with closing(run):
                scores = scores_of(run.text, run.config, run.training.model, run.meshes, runtime.device)
                screen.message(_introduce(run))
                with closing(run.guard):
                    finished = fit(run, screen, lambda: measure_all(run, scores))
                if finished:
                    _take_best(run, screen)
                    _finish(run, scores, screen)
        except (UserError, CheckpointError, TrainingError):
            # All ranks have it.
            raise
        except Exception as error:
            raise failed(error, runtime, None if run is None else run.folder, None, config) from error


def fit(run: Run, screen: Screen, measure: Callable[[], Mapping[str, float]] = dict) -> bool:
    """Train to the last step and save. A signal makes it save and stop early; then the result is False.

    After an error on any rank all raise `TrainingError`, and have saved the last step if its weights are sound.
    """
    training, config, runtime = run.training, run.config, run.runtime
    if training.step >= config.steps or _is_enough(run):
        return True
    runtime.wait_for_long()
    writers = _open_writers(run.folder, training.step, config.tensorboard, screen) if runtime.leader else []

    def tell(signal: str) -> None:
        # torchrun sends one to all ranks when it sees that one is lost.
        if runtime.peers is None or not runtime.peers.failed:
            screen.message(f"{signal}: saving after this step, then stopping")

    with StopRequest(tell) as request:
        try:
            stopped = _steps(run, screen, measure, writers, request)
        except UserError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {way_back(run.folder)}") from error
        except TrainingError as error:
            raise TrainingError(f"{error} {way_back(run.folder, ', perhaps with a lower --lr')}") from error
        except BaseException as error:
            raise failed(error, runtime, run.folder, training, config) from error
        finally:
            screen.stop()
            for writer in writers:
                writer.close()
    runtime.wait_for_long()
    if stopped:
        screen.message(
            f"stopped after step {training.step} of {config.steps}; everything is saved. To continue, run the same "
            f"command with --resume --out {run.folder}"
        )
    return not stopped


def _steps(
    run: Run,
    screen: Screen,
    measure: Callable[[], Mapping[str, float]],
    writers: list[MetricWriter],
    request: StopRequest,
) -> bool:
    """The steps that are left, with measurements and checkpoints. Whether a signal has stopped them."""
    training, config, runtime = run.training, run.config, run.runtime
    if training.step == 0 and run.pretrained and (values := measure()):
        screen.message(f"before fine-tuning: {describe(values)}")
        _write(writers, values, 0)
    screen.start(training.step, config.steps)
    training.model.train()
    stopped = False
    clock, clock_step = time.perf_counter(), training.step
    # The first step compiles and warms up, on each rank in its own time.
    pace = runtime.slowly
    profiler = StepProfiler(profiled_steps(config.profile_steps), run.folder / PROFILE, runtime.device, screen.message)
    while training.step < config.steps and not stopped and not _is_enough(run):
        step = training.step + 1
        profiler.before(step)
        is_logged = step % config.log_every == 0 or step in (1, config.steps)
        with pace(), watching(training.model, is_logged) as watched:
            result = train_step(
                training,
                config,
                meshes=run.meshes,
                guard=run.guard,
                device=runtime.device,
                stop_wanted=request.wanted,
            )
        pace = nullcontext
        profiler.after(step)
        stopped = result.stop
        values = None
        if watched is not None:
            seconds = (time.perf_counter() - clock) / (training.step - clock_step)
            values = metrics_of(training, config, run.meshes, runtime.device, result, watched, seconds)
        reset_expert_load(training.model)
        better = False
        if _is_measured(training.step, config):
            with runtime.slowly():
                measured = dict(measure())
            values = (values or {}) | measured
            if measured:
                # The first score decides. Ranks must not differ in what they do next.
                better = training.best.note(ranks.from_leader(next(iter(measured.values()))), training.step)
        if values is not None:
            _write(writers, values, training.step)
            # The time of measurements is not part of the speed.
            clock, clock_step = time.perf_counter(), training.step
        screen.update(training.step, values)
        last = stopped or training.step == config.steps or _is_enough(run)
        regular = config.save_every and training.step % config.save_every == 0
        if last or regular or (better and config.keep_best):
            before = time.perf_counter()
            with runtime.slowly():
                # A full disk must not end the training: there may be room again at the next checkpoint.
                try:
                    wait()
                except CheckpointError as error:
                    screen.message(f"warning: {error}; training continues")
                try:
                    save(training, config, run.folder)
                    if last:
                        wait()
                except CheckpointError as error:
                    if last:
                        raise
                    screen.message(f"warning: {error}; training continues")
            clock += time.perf_counter() - before
    profiler.close(training.step)
    return stopped


def measure_all(run: Run, scores: Scores) -> dict[str, float]:
    """The scores of all sets, and of what is held out: the one that decides is the first. Collective."""
    options = measuring(run.config, run.meshes, run.runtime.device)
    return {one.name: one.measure(run.training.model, **options) for one in run.sets} | {scores.name: scores.measure()}


def _is_measured(step: int, config: TrainConfig) -> bool:
    """Whether scores are measured after a step. Where the best is kept, the last step may be the best."""
    return bool(config.eval_every) and (step % config.eval_every == 0 or (config.keep_best and step == config.steps))


def _is_enough(run: Run) -> bool:
    """Whether measurements have been no better for so long that the training is over."""
    return bool(run.config.early_stop) and run.training.best.misses >= run.config.early_stop


def _take_best(run: Run, screen: Screen) -> None:
    """Say why the training has ended early, and go back to the best weights if they are kept."""
    training, best = run.training, run.training.best
    if _is_enough(run) and training.step < run.config.steps:
        screen.message(
            f"ended after step {training.step} of {run.config.steps} (--early-stop): {best.misses} measurements in a "
            f"row were no better than {best.score:.4f}, after step {best.step}"
        )
    if not run.config.keep_best or best.step in (0, training.step):
        return
    try:
        take_best(training, run.folder)
    except CheckpointError as error:
        screen.message(f"warning: the best weights, of step {best.step}, cannot be read: {error}; these are the last")
    else:
        screen.message(f"the best weights are those of step {best.step}, which are exported (--keep-best)")


def _write(writers: Sequence[MetricWriter], values: Mapping[str, Value], step: int) -> None:
    for writer in writers:
        writer.log({**values, TIME: round(time.time(), 3)}, step)


def _open_writers(folder: Path, step: int, tensorboard: bool, screen: Screen) -> list[MetricWriter]:
    # A run that starts again in its folder measures step 0 again, too.
    last = step or -1
    kinds: dict[str, type[JsonlWriter | TensorBoardWriter]] = {METRICS: JsonlWriter}
    if tensorboard:
        kinds[TENSORBOARD] = TensorBoardWriter
    writers: list[MetricWriter] = []
    for name, kind in kinds.items():
        try:
            writers.append(LenientWriter(kind(folder / name, last), str(folder / name), screen.message))
        except ImportError:
            screen.message(
                "no TensorBoard events: pip install '.[tensorboard]' in a checkout of moesaic, or --no-tensorboard"
            )
        except OSError as error:
            screen.message(f"warning: cannot write {folder / name}: {error.strerror or error}; training continues")
    return writers


def _finish(run: Run, scores: Scores, screen: Screen) -> None:
    model, config, leader = run.training.model, run.config, run.runtime.leader
    *others, now = measure_all(run, scores).items()
    numbers: dict[str, float] = {}
    if leader:
        numbers, text = scores.compare(_first_value(run.folder / METRICS, scores.name), now[1])
        screen.message(f"\n{text}")
        for name, value in others:
            screen.message(describe({name: value}))
    folder = run.folder / EXPORT
    finish.export(model, folder, run.text.tokenizer(), config, run.source.weights)
    exported = finish.load_exported(folder)
    tokens = scores.inputs[:1].to(run.runtime.device)
    difference = finish.compare_with_export(model, exported, tokens, run.meshes, rounded=_is_rounded(run))
    if leader:
        prompt, ids = scores.prompt()
        text = prompt + finish.sample(
            exported, run.text.tokenizer(), ids, max_new_tokens=config.sample_tokens, seed=config.seed
        )
        result: dict[str, Any] = {"step": run.training.step, scores.name: numbers, **dict(others)}
        result["export_difference"] = difference
        if config.keep_best and run.training.best.step:
            result["best_step"] = run.training.best.step
        result["sample"] = text
        write_json(run.folder / RESULT, result)
        screen.message(
            f"\nexported to {folder}: AutoModelForCausalLM.from_pretrained loads it, {_equal(run, difference)}"
            f"{_of_adapters(run)}\n\nthe model continues {_shortened(prompt)!r} like this:\n\n{text}\n"
        )
    # A rank that leaves early closes connections that other ranks still use.
    ranks.barrier()


def _is_rounded(run: Run) -> bool:
    """Whether frozen experts are other numbers in the run than in its export: by quantising them, or by its dtype."""
    config = run.config
    return bool(config.quantize_experts) and (not run.source.stored or config.export_dtype != "fp32")


def _equal(run: Run, difference: float) -> str:
    if not _is_rounded(run):
        return f"logits equal within {difference:.0e}"
    why = "They were rounded to bf16 with them" if run.source.stored else "Those were not quantised"
    return f"with the adapters merged into its own weights. {why}: logits differ by {difference:.0e} of the largest"


def _of_adapters(run: Run) -> str:
    if not run.config.lora_rank:
        return ""
    return f"\nthe adapters alone are in {run.folder / EXPORT / ADAPTER}, as files of peft"


def _first_value(path: Path, name: str) -> float | None:
    """What was measured before the first step, if it was."""
    rows = read_jsonl(path) if path.exists() else []
    return next((row[name] for row in rows if row["step"] == 0 and name in row), None)


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else f"...{prompt[-57:]}"


def _introduce(run: Run) -> str:
    training, world_size, device = run.training, run.runtime.world_size, run.runtime.device.type
    processes = "process" if world_size == 1 else "processes"
    if isinstance(run.text, PreparedText):
        what, rows = "documents", f"windows of {run.config.seq_len} tokens"
    else:
        learned = {"assistant": "answers", "last": "last answers", "all": "all tokens"}[run.config.loss_on]
        what, rows = "conversations", f"rows of {run.config.seq_len} tokens; learning {learned}"
    how = "fine-tuning" if run.pretrained else "from scratch"
    if run.config.lora_rank:
        tuned = sum(parameter.numel() for parameter in training.model.parameters() if parameter.requires_grad)
        how += f" {tuned:,} parameters of adapters"
        if run.config.quantize_experts:
            how += f" around experts in {run.config.quantize_experts}"
    text = (
        f"{num_parameters(training.model) / 1e6:.1f} M parameters on {world_size} {device} {processes}: "
        f"{run.meshes.layout}\n"
        f"{_exchange(run)}"
        f"{how}; text: {run.text.train_bytes / 1e6:.1f} MB in {run.text.train_documents} {what}, "
        f"{len(training.loader.rows):,} {rows}\n"
        f"run folder: {run.folder}"
    )
    return text + (f", continuing after step {training.step}" if training.step else "")


def _exchange(run: Run) -> str:
    """How tokens go to experts on other ranks, if these may be on other nodes."""
    moe = next((module for module in run.training.model.modules() if isinstance(module, MoE)), None)
    if moe is None or run.meshes.layout.ep == 1 or run.meshes.nodes.none_crosses:
        return ""
    return f"tokens to the ranks of their experts in {run.meshes.nodes.exchange(moe.config, run.config.capacity).why}\n"
