"""A finished run in memory, ready to draw: `ldm_jax.load(workdir).sample(prompts)`.

Needs no TensorFlow, no torch, and nothing that only training needs.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from ldm_jax import adapters, inversion, lora, picture
from ldm_jax import draw as draw_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import frozen as frozen_lib
from ldm_jax import inputs as inputs_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.conditioning import kinds, pictures
from ldm_jax.config import UserError
from ldm_jax.convert import embedding_files
from ldm_jax.nets import autoencoder
from ldm_jax.train import checkpoint, sharding

STRENGTH = 0.75  # of an --init_image that has no mask


class LoadedAutoencoder(NamedTuple):
    """A first stage alone, which draws nothing."""

    config: ml_collections.ConfigDict
    net: nn.Module
    first_stage: first_stage_lib.FirstStage


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A finished run: nets with their averaged params, ready to draw."""

    config: ml_collections.ConfigDict
    model: model_lib.LatentDiffusion
    params: Mapping[str, Any]
    first_stage: first_stage_lib.FirstStage
    step: int
    tokenizers: Mapping[str, Any]
    classifier: Any = None  # params of the classifier of noisy latents, if trained
    factors: Any = None  # of low rank, already in `params`, if a run trained them

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of `inputs` that this model takes."""
        return kinds.required_fields(self.model.conditioners)

    @property
    def size(self) -> tuple[int, int]:
        """[H, W] of the pictures that it was trained on."""
        return _size_of(self.model)

    @property
    def condition_nets(self) -> dict[str, tuple[Any, Any]]:
        """{name: (net, params)} of all conditions that have some, trained or frozen."""
        params = {**self.params["conditioners"], **self.first_stage.encoders}
        return {
            name: (conditioner.net, params[name])
            for name, conditioner in self.model.conditioners.items()
            if conditioner.has_params
        }

    @functools.lru_cache(maxsize=4)  # noqa: B019  one entry a size
    def sized(self, size: tuple[int, int]) -> model_lib.LatentDiffusion:
        """The same nets for pictures of `size` [H, W].

        Raises UserError where the first stage or the UNet can't halve it.
        """
        if size == self.size:
            return self.model
        factor = first_stage_lib.downsampling(self.model.autoencoder)
        factor *= 2 ** (len(self.model.unet.channel_mult) - 1)
        if min(size) < 1 or any(side % factor for side in size):
            near = "x".join(str(max(round(s / factor), 1) * factor) for s in size)
            raise UserError(
                f"--size: {size[0]}x{size[1]}; the nets need multiples of {factor}, so"
                f" use {near}"
            )
        return model_lib.build(self.config, self.tokenizers, size)

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        count: int | None = None,
        steps: int | None = None,
        guidance_scale: draw_lib.Guidance | None = None,
        guidance_rescale: float | None = None,
        classifier_scale: float | None = None,
        seed: int = 0,
        eta: float | None = None,
        sampler: str = "ddim",
        spacing: str | None = None,
        strength: float | None = None,
        noise: np.ndarray | None = None,
        interpolate: int | None = None,
        size: int | tuple[int, int] | None = None,
        tile: bool = False,
        progress: bool = False,
        batch_size: int = 16,
        noise_level: int | None = None,
        output: Literal["array", "pil"] = "array",
    ) -> np.ndarray | list[Image.Image]:
        """Draws one picture per prompt or row of `inputs`: uint8 [b, H, W, 3], or PIL.

        `inputs` {column: rows} holds what this model takes (see `fields`): `prompts` is
        short for its `caption`, and one row serves for all. `count` draws one row more
        than once, or says how many where the model is unconditional. `steps`, `spacing`
        and `guidance_scale` default to those of the run's config, `eta` (and `spacing`
        where that has none) to the sampler's. Picture i of a seed is the same in every
        call and batch.

        Any model starts from the rows of `init_image` among the `inputs`: `strength` 1
        draws them anew, 0 leaves them; with a `mask` (1 is drawn anew) the rest is kept
        to the pixel. `noise` [b, h, w, c] replaces what `seed` would draw, see
        `invert`. `interpolate` draws so many pictures on the way from the first row to
        the last. `size` [H, W] is another than the training pictures'; with `tile` the
        net sees windows of the size that it was trained on. `progress` gives what the
        model thought at each step instead, [b, steps, H, W, 3]. Where the run trained a
        classifier of noisy latents, rows of `label` are drawn towards their class, as
        strongly as `classifier_scale` says (1 unless given).
        """
        if output not in ("array", "pil"):
            raise UserError(f"output: {output!r}; choose array or pil")
        model, fields, start, n, labels = self._prepare(
            prompts, inputs, count, size, strength, noise
        )
        if interpolate is not None and start.init is not None:
            raise UserError(
                f"--interpolate: {interpolate}, but --init_image is one place to start"
                " from; leave one of them out"
            )
        classifier = self._classifier(labels, classifier_scale)
        if interpolate is not None and (n < 2 or interpolate < 2):
            raise UserError(
                f"--interpolate: {interpolate} pictures between {n}; choose 2 or more"
                " of both (--count=2 makes two of one input)"
            )
        settings = draw_lib.Settings(
            sampler=sampler,
            steps=self.config.sample.steps if steps is None else steps,
            eta=eta,
            spacing=spacing or self.config.sample.get("spacing"),
            window=self.model.latent_shape[:2] if tile else None,
            trajectory=progress,
        )
        if guidance_scale is None:
            guidance_scale = self.config.sample.guidance_scale
        drawn = draw_lib.draw(
            model,
            self.params,
            self.first_stage,
            fields,
            count=n,
            settings=settings,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            seed=seed,
            batch_size=batch_size,
            noise_level=noise_level,
            noise=noise,
            start=start,
            classifier=classifier,
            frames=interpolate,
        )
        images = picture.to_uint8(drawn.trajectory if progress else drawn.images)
        if output == "array":
            return images
        flat = images.reshape(-1, *images.shape[-3:])
        return [Image.fromarray(x) for x in flat]

    def invert(
        self,
        init_image: np.ndarray,
        prompts: str | Sequence[str] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The noise [b, h, w, c] from which DDIM draws about these pictures, unguided.

        `init_image` uint8 [b, H, W, 3] with the conditions that describe it. Given to
        `sample(noise=…)` with others, it draws the pictures changed; the same `steps`
        bring them back.
        """
        init_image = np.asarray(init_image)
        inputs = dict(inputs or {}) | {"init_image": init_image}
        model, fields, start, *_ = self._prepare(
            prompts, inputs, None, init_image.shape[1:3], None, None
        )
        settings = draw_lib.Settings(
            steps=self.config.sample.steps if steps is None else steps,
            spacing=self.config.sample.get("spacing"),
        )
        return draw_lib.invert(
            model,
            self.params,
            self.first_stage,
            fields,
            start.init,
            settings=settings,
            seed=seed,
        )

    def with_lora(
        self,
        lora_file: str | os.PathLike | Mapping[str, Any],
        scale: float = 1.0,
        *,
        option: str = "lora_file",
    ) -> "LoadedModel":
        """This model with a LoRA of diffusers, PEFT or kohya added to it.

        To its UNet, and to CLIP's text tower where the file has factors of that too.
        `lora_file` is a file or a state dict, `scale` how strongly it is added. Raises
        UserError, which names `option`, where it is none of these nets.
        """
        encoders = self.first_stage.encoders
        nets = {**self.params["conditioners"], **encoders}
        tree = {"unet": self.params["unet"], "conditioners": nets}
        for factors, rank, alpha in lora.read(self.model, lora_file, option):
            tree = lora.add(tree, factors, scale * alpha / rank)
        tree = jax.tree.map(jnp.asarray, tree)
        nets = tree["conditioners"]
        own = {name: nets[name] for name in self.params["conditioners"]}
        params = {**self.params, "unet": tree["unet"], "conditioners": own}
        frozen = {name: nets[name] for name in encoders}
        return dataclasses.replace(
            self, params=params, first_stage=self.first_stage.replace(encoders=frozen)
        )

    def save_lora(self, path: str | os.PathLike) -> None:
        """Writes the factors that this run trained as diffusers reads them.

        `path` is a new .safetensors file, written whole or not at all. Raises UserError
        for a run without factors, or with those of another net than the UNet and CLIP's
        text tower.
        """
        if self.factors is None:
            raise UserError(
                f"path: {path}, but this run trained no factors; train with"
                " diffusion_stage.lora.rank"
            )
        path, settings = _new_file(path), self.config.diffusion_stage.lora
        state = lora.state_dict(self.model, self.factors, settings)
        frozen_lib.write_params(path, state)

    def with_tokens(
        self,
        tokens_file: str | os.PathLike | Mapping[str, Any],
        token: str | None = None,
    ) -> "LoadedModel":
        """This model with a token of textual inversion more, to be used in prompts.

        `tokens_file` is a file of diffusers, CompVis or the web UI, or what one holds;
        `token` is what to call it instead of what that says. Raises UserError where it
        is of another text net, or the model has such a word.
        """
        name = inversion.condition(self.config)
        width = self.model.conditioners[name].net.dim
        token, rows = embedding_files.read(tokens_file, token, width)
        config, params, first_stage = inversion.add(
            self.config, self.params, self.first_stage, token, rows
        )
        model = model_lib.build(config, self.tokenizers)
        return dataclasses.replace(
            self, config=config, model=model, params=params, first_stage=first_stage
        )

    def save_tokens(self, path: str | os.PathLike, token: str | None = None) -> None:
        """Writes a token's embeddings as diffusers and the web UI read them.

        `path` is a new .safetensors file, written whole or not at all; `token` is
        needed where the model has several. Raises UserError where it has none.
        """
        found = inversion.embeddings(self.config, self.params, self.first_stage)
        if not found:
            raise UserError(
                f"path: {path}, but this model has no token of textual inversion; train"
                f" one with {inversion.OPTION}.placeholder_token"
            )
        if token is None and len(found) == 1:
            (token,) = found
        if token not in found:
            raise UserError(f"token: {token!r}; choose one of {', '.join(found)}")
        frozen_lib.write_params(_new_file(path), {token: found[token]})

    def _prepare(self, prompts, inputs, count, size, strength, noise):
        """(model of this size, prepared fields, start, how many, their classes)."""
        inputs = dict(inputs or {})
        if prompts is not None:
            inputs["caption"] = [prompts] if isinstance(prompts, str) else list(prompts)
        model = self.model
        if size is not None:
            model = self.sized((size, size) if isinstance(size, int) else tuple(size))
        optional = kinds.optional_fields(model.conditioners)
        taken = (*self.fields, *(name for name in optional if name in inputs))
        extras = ["init_image", "mask", "label"][: 2 + (self.classifier is not None)]
        extras = [name for name in extras if name in inputs]
        extras = [name for name in extras if name not in taken]
        if "mask" in extras and "init_image" not in inputs:
            raise UserError("--mask: this model needs an --init_image with it")
        if strength is not None and "init_image" not in inputs:
            raise UserError(f"--strength: {strength}, but there is no --init_image")
        if strength is not None and not 0 <= strength <= 1:
            raise UserError(f"--strength: {strength}; choose from 0 (keep) to 1 (anew)")
        if noise is not None and noise.shape[1:] != model.latent_shape:
            raise UserError(
                f"noise: {list(noise.shape[1:])}; it must be latents of"
                f" {list(model.latent_shape)}"
            )
        if noise is not None and count is None:
            count = len(noise) if len(noise) > 1 else None
        rows, n = inputs_lib.collect((*taken, *extras), inputs, count)
        fields = conditioning.prepare(model.conditioners, rows)
        start = draw_lib.Start()
        if "init_image" in extras:
            size, mask = _size_of(model), None
            init = pictures.prepare_images(size, rows["init_image"], "init_image")
            if "mask" in extras:
                mask = pictures.prepare_masks(size, rows["mask"]).astype(np.float32)
            if strength is None:
                strength = STRENGTH if mask is None else 1.0
            start = draw_lib.Start(np.asarray(pictures.to_float(init)), strength, mask)
        return model, fields, start, n, rows.get("label")

    def _classifier(self, labels, scale):
        """What guides besides the conditions, if anything."""
        if self.classifier is None:
            if scale is not None:
                raise UserError(
                    f"--classifier_scale: {scale}, but this run trained no classifier;"
                    " leave it out"
                )
            return None
        if labels is None:
            if scale is not None:
                raise UserError(f"--classifier_scale: {scale}, but there is no --label")
            return None
        labels = np.asarray(labels, np.int32)
        classes = self.model.classifier.out_channels
        if labels.min() < 0 or labels.max() >= classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(
                f"label: {wrong} is no class; choose from 0 to {classes - 1}"
            )
        scale = 1.0 if scale is None else scale
        return draw_lib.Classifier(self.classifier, labels, scale)


Loaded = LoadedModel | LoadedAutoencoder


def _size_of(model: model_lib.LatentDiffusion) -> tuple[int, int]:
    factor = first_stage_lib.downsampling(model.autoencoder)
    h, w = model.latent_shape[:2]
    return factor * h, factor * w


def _new_file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"path: {path}; give a name that ends in .safetensors")
    if path.exists():
        raise UserError(f"path: {path} is there already; give another name")
    return path


def load_first_stage(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh | None = None,
) -> first_stage_lib.FirstStage:
    """The finished autoencoder of a run with the statistics of its latents.

    Where a config's first stage is the identity, pixels are the latents. `mesh` is that
    of `load`.
    """
    net = model_lib.build_autoencoder(config)
    if isinstance(net, autoencoder.Identity):
        c = net.embed_dim
        return first_stage_lib.FirstStage({}, jnp.zeros(c), jnp.ones(c))
    abstract = jax.eval_shape(
        lambda: model_lib.init_autoencoder(config, net, jax.random.key(0))[0]
    )
    saved = checkpoint.Checkpoints(workdir / "autoencoder")
    params, meta = saved.load_averaged(_placed(abstract, mesh))
    if "latent" not in meta:
        raise UserError(
            f"--workdir: the autoencoder of {workdir} is not finished; run the training"
            " command again to go on with it"
        )
    return first_stage_lib.FirstStage(
        params=params["autoencoder"],
        mean=jnp.asarray(meta["latent"]["mean"], jnp.float32),
        std=jnp.asarray(meta["latent"]["std"], jnp.float32),
    )


def load_autoencoder(workdir: pathlib.Path) -> LoadedAutoencoder:
    """Loads a finished run of stage one alone."""
    config = workdir_lib.read_config(workdir)
    net = model_lib.build_autoencoder(config)
    return LoadedAutoencoder(config, net, load_first_stage(workdir, config))


def _placed(abstract: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Shapes placed on this process's first device, or as training would on `mesh`."""
    if mesh is None:
        return checkpoint.single_device(abstract)
    return checkpoint.placed(abstract, sharding.tree_shardings(abstract, mesh))


def load(
    workdir: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None
) -> LoadedModel:
    """Loads a run's newest checkpoint, finished or not, with its averaged params.

    With a `mesh` they are spread over it as they would be in training.
    """
    workdir = pathlib.Path(workdir)
    config = workdir_lib.read_config(workdir)
    workdir_lib.check_draws(workdir, config)
    tokenizers = workdir_lib.load_tokenizers(workdir, config)
    model = model_lib.build(config, tokenizers)
    looking = [k for k, c in model.conditioners.items() if c.remembered is not None]
    first_stage = load_first_stage(workdir, config, mesh).replace(
        memory=workdir_lib.load_memory(workdir, looking),
        encoders=frozen_lib.load(model, workdir),
    )
    abstract = jax.eval_shape(adapters.initializer(config, model), jax.random.key(0))
    saved = checkpoint.Checkpoints(workdir / "diffusion")
    params, meta = saved.load_averaged(_placed(abstract, mesh))
    factors = None
    if adapters.is_on(config):
        factors = params if lora.is_on(config) else None
        # A file of arrays has no place for conditions that are all frozen.
        base = {"conditioners": {}}
        base |= frozen_lib.read_params(workdir_lib.base_path(workdir))
        params, first_stage = adapters.merge(
            config.diffusion_stage, base, first_stage, params
        )
    classifier = None
    if "classifier" in config.stages and (workdir / "classifier").is_dir():
        abstract = jax.eval_shape(
            lambda: model_lib.init_classifier(model, jax.random.key(0))
        )
        saved = checkpoint.Checkpoints(workdir / "classifier")
        trained, _ = saved.load_averaged(_placed(abstract, mesh))
        classifier = trained["classifier"]
    # What was read by numpy would go to the device again with every call.
    params, first_stage = jax.tree.map(jnp.asarray, (params, first_stage))
    step = meta["step"]
    return LoadedModel(
        config, model, params, first_stage, step, tokenizers, classifier, factors
    )
