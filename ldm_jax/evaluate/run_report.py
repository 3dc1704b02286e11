"""The report on a finished run: reconstructions, samples found again, a sheet."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from PIL import Image

from ldm_jax import first_stage as first_stage_lib
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax import picture, shown
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import kinds
from ldm_jax.data import pipeline, sources
from ldm_jax.evaluate import frechet, metrics
from ldm_jax.nets import autoencoder, lpips, quantize


def reconstruction(
    config: ml_collections.ConfigDict,
    net: nn.Module,
    first_stage: first_stage_lib.FirstStage,
    source: sources.Source,
    limit: int,
    weights: Mapping[str, Any],
) -> dict[str, float]:
    """Scores of the first stage on the first `limit` pictures of a source.

    Pictures go through the posterior's mode, or the nearest codes, and are compared in
    8 bits. `weights` holds the params of nets that may be there: `lpips`, `inception`.
    """
    params = first_stage.params
    vq = isinstance(net, autoencoder.VQModel)
    key = jax.random.key(0) if vq else None  # of codes that a remap doesn't know

    @jax.jit
    def reconstruct(params, x):
        encoded = first_stage_lib.encode_moments(net, params, x)
        bottleneck = net.apply({"params": params}, encoded, key, method="bottleneck")
        x_hat = net.apply({"params": params}, bottleneck.z, method="decode")
        return x_hat, bottleneck.penalty, bottleneck.indices, encoded

    @jax.jit
    def distance(params, x, x_hat):
        return lpips.LPIPS().apply({"params": params}, x, x_hat)

    source = source.take(min(limit, len(source)))
    pairs, values = [], {"psnr": [], "ssim": []}
    uses, latent_size = 0, 1
    for batch in pipeline.eval_batches(
        source, batch_size=64, ops=config.data.ops, fields=("image",)
    ):
        keep = batch["_mask"] > 0
        x_hat, penalty, indices, encoded = reconstruct(params, batch["image"])
        pair = [picture.to_uint8(np.asarray(x))[keep] for x in (batch["image"], x_hat)]
        pairs.append(pair)
        values["psnr"].append(metrics.psnr(*pair))
        values["ssim"].append(metrics.ssim(*pair))
        if "lpips" in weights:
            x, y = (np.float32(x) / 127.5 - 1 for x in pair)
            values.setdefault("lpips", []).append(
                np.asarray(distance(weights["lpips"], x, y))
            )
        if vq:
            kept = np.asarray(indices).reshape(len(keep), -1)[keep]
            uses = uses + np.bincount(kept.ravel(), minlength=net.num_indices)
        else:
            latent_size = encoded[0].size // 2
            values.setdefault("kl_per_dim", []).append(
                np.asarray(penalty)[keep] / latent_size
            )
    scores = {k: float(np.mean(np.concatenate(v))) for k, v in values.items()}
    if vq:
        scores["codes_used"] = float(quantize.usage(uses))
        scores["perplexity"] = float(quantize.perplexity(uses))
    real, fake = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if len(real) > 1:
        scores |= distances(real, fake, weights)
    return scores | {"images": len(source)}


def distances(
    real: np.ndarray, fake: np.ndarray, weights: Mapping[str, Any]
) -> dict[str, float]:
    """Fréchet distances between two sets of pictures: FID too where Inception is there.

    The other one needs no weights; see evaluate/frechet.py.
    """

    def between(features):
        a, b = (frechet.Statistics.of(features(x)) for x in (real, fake))
        return frechet.frechet_distance(a, b)

    scores = {"random_net_distance": between(frechet.random_features)}
    if "inception" in weights:
        params = weights["inception"]
        scores["fid"] = between(lambda x: frechet.inception_features(params, x)[0])
    return scores


def spread(source: sources.Source, count: int) -> sources.Source:
    """`count` examples of a source, fixed, drawn without order or repetition."""
    order = np.random.default_rng(0).permutation(len(source))[:count]
    return sources.Source(
        {name: values[np.sort(order)] for name, values in source.fields.items()},
        source.attribution,
    )


def raw_conditions(
    model: model_lib.LatentDiffusion, source: sources.Source, ops: Any
) -> dict[str, Any]:
    """The columns that a model's conditions read; pictures as the nets see them."""
    names = kinds.required_fields(model.conditioners)
    also = kinds.optional_fields(model.conditioners)
    return {
        name: pipeline.pictures(source, ops) if name == "image" else source.fields[name]
        for name in (*names, *(name for name in also if name in source.fields))
    }


def sampling(
    loaded: loaded_lib.LoadedModel, source: sources.Source, count: int
) -> tuple[dict[str, float], Image.Image]:
    """Draws a picture for each of `count` examples' conditions; scores and a sheet.

    Each is looked for among the true pictures (chance is 1/count for top-1); where the
    condition is a picture too, PSNR says how near it came. Of an unconditional model
    the distance between the two sets is all that can be told.
    """
    chosen, ops = spread(source, count), loaded.config.data.ops
    conditions = raw_conditions(loaded.model, chosen, ops)
    n = len(chosen)
    drawn = loaded.sample(inputs=conditions, count=None if conditions else n)
    true = pipeline.pictures(chosen, ops)
    if conditions:
        ranks = metrics.retrieval_ranks(drawn, true)
        scores = {f"top{k}": float(np.mean(ranks < k)) for k in (1, 5)}
    else:
        scores = distances(true, drawn, {})
    if any("concat" in c.slots for c in loaded.model.conditioners.values()):
        scores["psnr"] = float(np.mean(metrics.psnr(true, drawn)))
    scores["captions" if set(conditions) == {"caption"} else "images"] = n

    texts, side = shown.words(conditions, n), drawn.shape[1]
    condition = shown.picture(conditions, side)
    if condition is None:
        return scores, picture.grid(drawn[:32], texts[:32] if any(texts) else None)
    triples = np.stack([condition, drawn, true], axis=1)[:12]
    texts = [word for text in texts[:12] for word in (text, "drawn", "true")]
    return scores, picture.grid(triples.reshape(-1, side, side, 3), texts, columns=6)


def evaluate(
    workdir: pathlib.Path,
    train_source: sources.Source,
    heldout_source: sources.Source,
    weights: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """Scores a run and draws its grids into `pictures/`."""
    config = workdir_lib.read_config(workdir)
    settings, scores = config.report, {}
    net = model_lib.build_autoencoder(config)
    if not isinstance(net, autoencoder.Identity):
        scores["reconstruction, held out"] = reconstruction(
            config,
            net,
            loaded_lib.load_first_stage(workdir, config),
            heldout_source,
            settings.eval_images,
            weights,
        )
    if "diffusion" not in config.stages:
        return scores
    loaded = loaded_lib.load(workdir)
    for name, source in (("training", train_source), ("held-out", heldout_source)):
        count = min(settings.retrieval_captions, len(source))
        found, sheet = sampling(loaded, source, count)
        captions = set(loaded.fields) == {"caption"}
        row = f"retrieval, {name} captions" if captions else f"samples, {name}"
        scores[row] = found
        if jax.process_index() == 0:
            path = workdir / "pictures" / f"samples_{name.replace('-', '')}.png"
            picture.save(sheet, path)
    return scores


# How a score is called and written.
_SHOWN = {
    "psnr": "PSNR {:.2f} dB",
    "ssim": "SSIM {:.4f}",
    "lpips": "LPIPS {:.4f}",
    "kl_per_dim": "KL {:.3g} nats/dim",
    "codes_used": "codes used {:.1%}",
    "perplexity": "perplexity {:.4g}",
    "fid": "FID {:.4g}",
    "random_net_distance": "random-net Fréchet distance {:.4g}",
    "top1": "top-1 {:.1%}",
    "top5": "top-5 {:.1%}",
    "images": "{} images",
    "captions": "{} captions",
}


def table(scores: dict[str, dict[str, float]]) -> str:
    """The scores as aligned text."""
    width = max(map(len, scores), default=0)
    return "\n".join(
        name.ljust(width)
        + "".join(f"  {_SHOWN[key].format(value)}" for key, value in values.items())
        for name, values in scores.items()
    )


def write(
    workdir: pathlib.Path,
    train_source: sources.Source,
    heldout_source: sources.Source,
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Evaluates a run on every process alike; the first one writes and prints."""
    scores = evaluate(workdir, train_source, heldout_source, weights or {})
    if jax.process_index() > 0:
        return
    workdir_lib.write_text(workdir / "report.json", json.dumps(scores, indent=2) + "\n")
    print(table(scores))
    print(f"pictures: {workdir / 'pictures'}", flush=True)
