"""The training loop: one for every stage, read from top to bottom."""

import functools
import pathlib
import signal
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from ldm_jax import adapters, inversion
from ldm_jax import config as config_lib
from ldm_jax import frozen as frozen_lib
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import kinds, tokenizers
from ldm_jax.config import UserError
from ldm_jax.data import pipeline, sources
from ldm_jax.evaluate import run_report
from ldm_jax.train import alarms as alarms_lib
from ldm_jax.train import (
    check_data,
    checkpoint,
    finetune,
    handover,
    optim,
    origin,
    preserve,
    report,
    sharding,
    step_autoencoder,
    step_classifier,
    step_diffusion,
)
from ldm_jax.train import stage as stage_lib
from ldm_jax.train import state as train_state

STAGES = ("autoencoder", "diffusion", "classifier")


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave.

    Of several processes one need be told: JAX has a handler of SIGTERM that tells the
    others, within about a second, and a SIGINT is given on to it.
    """

    def __init__(self):
        self._received, self._asked = False, 0
        signal.signal(signal.SIGINT, self._note)
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number, frame):
        del frame
        # A second Ctrl-C means now.
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def now(self) -> bool:
        """Whether to stop after this step; all processes agree on it."""
        if jax.process_count() == 1:
            return self._received
        # They agree on the number after the highest that any has asked for. A step
        # would not do: the first of a stage, or of a run that goes on, may be past it.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)


def check(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> jax.sharding.Mesh:
    """Finds the user's mistakes before anything is written; returns the mesh."""
    for name in config.stages:
        if name not in STAGES:
            hint = config_lib.nearest(name, STAGES)
            raise UserError(f"stages: no stage {name!r}; {hint}")
    mesh = sharding.make_mesh(config.mesh)
    origin.make(config, workdir)
    finetune.adopt_first_stage(config)
    if handover.is_taken(config):
        handover.adopt_config(config, workdir)
    for name in config.stages:
        section = config[f"{name}_stage"]
        own = section.batch_size is not None
        size = stage_lib.batch_size(section, config)
        sharding.check_batch_size(
            f"{name}_stage.batch_size" if own else "batch_size",
            size,
            mesh,
            section.micro_batches,
        )
        optim.make_optimizer(section.optim, section.steps, size)
    net = model_lib.build_autoencoder(config)
    if "autoencoder" in config.stages:
        step_autoencoder.check(config, net, mesh)
    if "diffusion" in config.stages:
        step_diffusion.check(config)
        inversion.adopt(config)
    if "classifier" in config.stages:
        step_classifier.check(config)
    if workdir_lib.config_path(workdir).exists():
        changed = config_lib.differences(workdir_lib.read_config(workdir), config)
        if changed:
            raise UserError(
                f"--workdir: {workdir} holds a run with another config ({changed});"
                " choose another --workdir, or take these values back"
            )
    return mesh


def make_tokenizers(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    source: sources.Source,
) -> dict[str, Any]:
    """The conditioners' tokenizers: the run's, init_from's, a hub's, or trained."""
    made = {}
    for name, section in config.conditioners.items():
        if "tokenizer" not in section:
            continue
        stored = workdir_lib.tokenizer_path(workdir, name)
        taken = finetune.tokenizer_path(config, name)
        if stored.exists() or taken is not None:
            made[name] = tokenizers.load(stored if stored.exists() else taken)
        elif section.tokenizer.train_vocab_size:
            check_data.field(name, section.field, source)
            made[name] = tokenizers.train_wordpiece(
                source.fields[section.field].tolist(),
                section.tokenizer.train_vocab_size,
            )
        else:
            made[name] = tokenizers.load(section.tokenizer.name)
    return made


def open_workdir(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    tokenizer_of: dict[str, Any],
) -> None:
    """Writes what makes a folder a run; the first write of all, by one process."""
    _wait_for_all("what was in the workdir is read")
    if jax.process_index() == 0:
        try:
            for name, tokenizer in tokenizer_of.items():
                folder = workdir_lib.tokenizer_path(workdir, name)
                if not folder.exists():
                    partial = folder.with_name(f".{name}")
                    tokenizer.save_pretrained(partial)
                    partial.rename(folder)
            if handover.is_taken(config):
                handover.copy_checkpoint(config, workdir)
            # Also where a run goes on with another report, mesh or learning rate.
            workdir_lib.write_text(
                workdir_lib.config_path(workdir), config_lib.to_json(config)
            )
        except OSError as error:
            raise UserError(
                f"--workdir: {workdir} cannot be written ({error}); choose another"
            ) from error
    _wait_for_all("the workdir is written")


def _wait_for_all(what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def run_stage(
    config: ml_collections.ConfigDict,
    stage: stage_lib.Stage,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    stop: StopSignal,
    started: float,
) -> train_state.TrainState | None:
    """Trains one stage to its end, from its newest checkpoint; None if told to stop."""
    section, steps = stage.section, stage.section.steps
    batch_size = stage_lib.batch_size(section, config)
    every = config.report

    # ---- Abstract state, then the newest checkpoint or a fresh one --------------
    key = train_state.step_key(config.seed, 0, train_state.INIT)
    abstract = jax.eval_shape(stage.create, key)
    shardings = sharding.tree_shardings(abstract, mesh)
    abstract = checkpoint.placed(abstract, shardings)
    for path in sharding.unsharded(abstract.params, mesh):
        report.say(f"{stage.name}: {path} is replicated, no dimension fits mesh.fsdp")
    saved = checkpoint.Checkpoints(workdir / stage.name, every.max_to_keep)
    if not saved.finished():
        report.say(f"{stage.name}: {report.state_memory(abstract)}")
    restored = saved.restore_newest(abstract)
    if restored is None:
        state = jax.jit(stage.create, out_shardings=shardings)(key)
        if stage.start is not None:
            params = jax.device_put(stage.start(state.params), shardings.params)
            ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
            state = state.replace(params=params, ema=ema)
    else:
        state, meta = restored
        if meta["complete"]:
            report.say(f"{stage.name}: finished at step {meta['step']}, kept as it is")
            return state
    first_step = int(state.step)
    if first_step:
        report.say(f"{stage.name}: going on from step {first_step} of {steps}")

    # ---- Data, compiled step ----------------------------------------------------
    rows = sharding.batch_sharding(mesh)
    batches = pipeline.prefetch_to_device(
        pipeline.train_batches(
            stage.train_source,
            batch_size=batch_size,
            seed=config.seed,
            start_step=first_step,
            ops=stage.ops,
            fields=stage.fields,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        rows,
        size=2,
    )
    heldout = list(
        pipeline.eval_batches(
            stage.heldout_source,
            batch_size=batch_size,
            ops=stage.ops,
            fields=stage.fields,
            limit=every.eval_images,
        )
    )
    # By way of the host: what one process holds can't be put on others' devices.
    frozen = jax.device_put(
        jax.tree.map(np.asarray, stage.frozen), sharding.replicated(mesh)
    )
    evaluate = stage_lib.make_evaluate(stage.evaluate, config.seed)
    batch = next(batches)

    @functools.lru_cache(maxsize=1)
    def compiled(phase):
        began = time.monotonic()
        step_fn = jax.jit(
            phase.step,
            in_shardings=(shardings, sharding.replicated(mesh), rows),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        step_fn = step_fn.lower(state, frozen, batch).compile()
        seconds = time.monotonic() - began
        since = f"the step from {phase.first} on, " if phase.first else ""
        report.say(
            f"{stage.name}: {since}compiled in {seconds:.1f} s"
            f"{report.step_memory(step_fn)}"
        )
        return step_fn

    def phase_at(step):
        return [phase for phase in stage.phases if phase.first <= step][-1]

    compiled(phase_at(first_step))
    dashboard = report.Dashboard(workdir, stage.name, every.profile)
    dashboard.start(config, abstract.params)

    def evaluated(step):
        params = train_state.averaged(state)
        pairs = [evaluate(params, frozen, b, i) for i, b in enumerate(heldout)]
        values = stage.summarize(report.mean_metrics(pairs), len(pairs))
        dashboard.scalars(step, {f"heldout/{k}": v for k, v in values.items()})
        # One value for each channel is more than a line can hold.
        shown = {k: v for k, v in values.items() if "/" not in k}
        shown = ", ".join(f"{k} {v:.4g}" for k, v in shown.items())
        report.say(f"{stage.name} {step}/{steps}  held-out: {shown}")

    def pictured(step):
        dashboard.images(step, stage.panels(train_state.averaged(state), frozen))

    def save(step, **facts):
        meta = {"step": step, "complete": step == steps, "versions": versions()}
        saved.save(state, meta | facts)

    # ---- Steps. Order: update, log, evaluate, look, save. -----------------------
    alarms = alarms_lib.Alarms(section)
    progress = report.Progress(stage.name, first_step, steps, batch_size)
    pending, stopped = [], False
    try:
        for step in range(first_step + 1, steps + 1):
            state, metrics = compiled(phase_at(step - 1))(state, frozen, batch)
            if step < steps:
                batch = next(batches)
            pending.append(metrics)
            if step == first_step + 1 and started:
                jax.block_until_ready(metrics)
                seconds = time.monotonic() - started
                report.say(f"{stage.name}: first step {seconds:.1f} s after the start")
            dashboard.step(step)
            stopped = stop.now()
            last = step == steps or stopped
            if step % every.log_steps == 0 or last:
                values = stage.summarize(report.mean_metrics(pending), len(pending))
                values["learning_rate"] = float(stage.schedule(step - 1))
                values |= progress.line(step, values, batches.waited)
                dashboard.scalars(step, {f"train/{k}": v for k, v in values.items()})
                for line in alarms.check(values):
                    report.say(f"{stage.name} {step}/{steps}  alarm: {line}")
                error = alarms_lib.too_many_skips(
                    int(state.skipped),
                    min(every.max_skipped, steps - first_step),
                    stage.name,
                    section.optim.learning_rate,
                )
                if error is not None:
                    raise error
                pending = []
            if stopped and step < steps:
                save(step)
                report.say(
                    f"{stage.name}: stopped at step {step}, all is saved;"
                    " the same command goes on from here"
                )
                return None
            if step % every.eval_steps == 0 or step == steps:
                evaluated(step)
            if step % every.image_steps == 0 or step == steps:
                pictured(step)
            if step == steps:
                save(step, **stage.finish(train_state.averaged(state)))
            elif step % every.checkpoint_steps == 0:
                save(step)
    finally:
        batches.close()
        dashboard.close()
        saved.close()
    return state


def plan(
    config: ml_collections.ConfigDict,
    net: nn.Module,
    model: model_lib.LatentDiffusion | None,
    pictures: int,
) -> None:
    """Says what is about to happen: per stage its size, steps, images and epochs.

    Raises UserError for options that only the nets' params tell to be wrong.
    """
    key = jax.random.key(0)
    inits = {
        "autoencoder": lambda: model_lib.init_autoencoder(config, net, key)[0],
        "diffusion": lambda: adapters.initializer(config, model)(key),
        "classifier": lambda: model_lib.init_classifier(model, key),
    }
    for name in config.stages:
        if name == "autoencoder" and handover.is_taken(config):
            continue
        section = config[f"{name}_stage"]
        size = stage_lib.batch_size(section, config)
        try:
            params = jax.eval_shape(inits[name])
        except ValueError as error:  # what a net says of its own options
            raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
        if section.optim.get("train_only"):
            optim.labels(section.optim.train_only, params)
        millions = report.count(params) / 1e6
        report.say(
            f"plan: {name}, {millions:.2f}M parameters, {section.steps} steps"
            f" of {size} images, {section.steps * size / pictures:.1f} epochs;"
            f" {optim.describe(section.optim, size)}"
        )


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    import flax
    import optax
    import orbax.checkpoint

    import ldm_jax

    modules = (jax, flax, optax, orbax.checkpoint, ldm_jax)
    return {module.__name__: module.__version__ for module in modules}


def train(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, started: float = 0.0
) -> bool:
    """Runs the stages of `config` in order; True when all are done.

    Whatever is finished in `workdir` is kept, whatever is half-done goes on, and the
    result is the same, bit for bit, as that of a run that was never stopped.
    """
    # ---- Checks: nothing is written before they pass ----------------------------
    mesh = check(config, workdir)
    stop = StopSignal()
    devices = jax.devices()
    report.say(
        f"{config.preset or 'run'} in {workdir}: stages {', '.join(config.stages)};"
        f" {len(devices)} {devices[0].device_kind} device(s) in"
        f" {jax.process_count()} process(es), mesh {dict(mesh.shape)}"
    )

    # ---- Data, nets, workdir ----------------------------------------------------
    train_source, heldout_source = sources.load_splits(config.data, config.resolution)
    net = model_lib.build_autoencoder(config)
    check_data.pictures(config, net, train_source)
    check_data.endless(config, train_source)
    report.say(
        f"data {config.data.source}: {len(train_source)} pictures to train on,"
        f" {len(heldout_source)} held out, {config.resolution} pixels"
    )
    tokenizer_of = make_tokenizers(config, workdir, train_source)
    model, frozen, base, start = None, {}, None, None
    if "diffusion" in config.stages:
        model = model_lib.build(config, tokenizer_of)
        for name, conditioner in model.conditioners.items():
            for field in kinds.required_fields({name: conditioner}):
                check_data.field(name, field, train_source)
                check_data.field(name, field, heldout_source)
        check_data.ops(config, model)
        preserve.check(config, model)
        check_data.placeholder(config, train_source)
        if "classifier" in config.stages:
            for source in (train_source, heldout_source):
                step_classifier.check_labels(config, model, source)
        taken_over = finetune.encoders(config, model, workdir)
        frozen_lib.check(model, workdir, taken_over)
        encoders = frozen_lib.load(model, workdir, taken_over)
        base, start = finetune.prepare(config, model, workdir, encoders, tokenizer_of)
    first = checkpoint.Checkpoints(workdir / "autoencoder")
    taken, tower = handover.is_taken(config), None
    if "autoencoder" in config.stages and not first.finished() and not taken:
        frozen = step_autoencoder.load_frozen(config)
        if not first.steps():
            tower = step_autoencoder.load_tower(config, net)
    plan(config, net, model, len(train_source))
    open_workdir(workdir, config, tokenizer_of)
    if model is not None and jax.process_index() == 0:
        frozen_lib.write(workdir, encoders)
        if base is not None:
            frozen_lib.write_params(workdir_lib.base_path(workdir), base)

    # ---- Stages -----------------------------------------------------------------
    for name in config.stages:
        if name == "autoencoder" and taken:
            report.say(f"autoencoder: taken from {config.autoencoder_from}")
            continue
        if name == "autoencoder":
            stage = step_autoencoder.make_stage(
                config, net, train_source, heldout_source, mesh, frozen, tower
            )
        else:
            kind = step_diffusion if name == "diffusion" else step_classifier
            first_stage = loaded_lib.load_first_stage(workdir, config)
            if name == "diffusion":
                first_stage = step_diffusion.remember(
                    model,
                    first_stage.replace(encoders=encoders),
                    train_source,
                    config.data.ops,
                )
                if jax.process_index() == 0:
                    workdir_lib.write_memory(workdir, first_stage.memory)
            options = {}
            if name == "diffusion":
                kept = preserve.drawn(config, workdir)
                options = {"base": base, "start": start, "kept": kept}
            stage = kind.make_stage(
                config, model, first_stage, train_source, heldout_source, **options
            )
        state = run_stage(config, stage, mesh, workdir, stop, started)
        started = 0.0
        if state is None:
            return False
        del state, stage

    # ---- What came out ----------------------------------------------------------
    run_report.write(workdir, train_source, heldout_source)
    report.say(f"peak memory {report.peak_memory_gb():.1f} GB")
    return True
