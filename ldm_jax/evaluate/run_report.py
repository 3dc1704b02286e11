"""The report on a finished run: reconstructions, caption retrieval, a picture grid."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from ldm_jax import picture, sample
from ldm_jax import workdir as workdir_lib
from ldm_jax.data import pipeline, sources
from ldm_jax.evaluate import metrics


def images(source: sources.Source, ops: Any) -> np.ndarray:
    """All pictures of a source as the nets see them, uint8 [n, h, w, c]."""
    batches = pipeline.eval_batches(source, batch_size=64, ops=ops, fields=("image",))
    rows = [batch["image"][batch["_mask"] > 0] for batch in batches]
    return picture.to_uint8(np.concatenate(rows))


def reconstruction(
    loaded: sample.LoadedModel, source: sources.Source, limit: int
) -> dict[str, float]:
    """PSNR and SSIM of the first stage on the first `limit` pictures of a source."""
    reconstruct = jax.jit(loaded.model.autoencoder.apply)
    variables = {"params": loaded.first_stage.params}
    source = source.take(min(limit, len(source)))
    psnr, ssim = [], []
    ops = loaded.config.data.ops
    for batch in pipeline.eval_batches(
        source, batch_size=64, ops=ops, fields=("image",)
    ):
        keep = batch["_mask"] > 0
        x = picture.to_uint8(batch["image"])[keep]
        x_hat = picture.to_uint8(np.asarray(reconstruct(variables, batch["image"])))[
            keep
        ]
        psnr.append(metrics.psnr(x, x_hat))
        ssim.append(metrics.ssim(x, x_hat))
    return {
        "psnr": float(np.mean(np.concatenate(psnr))),
        "ssim": float(np.mean(np.concatenate(ssim))),
        "images": len(source),
    }


def spread(source: sources.Source, count: int) -> sources.Source:
    """`count` examples of a source, fixed, drawn without order or repetition."""
    order = np.random.default_rng(0).permutation(len(source))[:count]
    return sources.Source(
        {name: values[np.sort(order)] for name, values in source.fields.items()},
        source.attribution,
    )


def retrieval(
    loaded: sample.LoadedModel, source: sources.Source, count: int
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """Draws `count` captions of a source and finds each among the true pictures.

    Returns the scores, the pictures and the captions. Chance is 1/count for top-1.
    """
    chosen = spread(source, count)
    captions = chosen.fields["caption"].tolist()
    drawn = loaded.sample(captions)
    ranks = metrics.retrieval_ranks(drawn, images(chosen, loaded.config.data.ops))
    scores = {
        "top1": float(np.mean(ranks < 1)),
        "top5": float(np.mean(ranks < 5)),
        "captions": len(captions),
    }
    return scores, drawn, captions


def evaluate(
    workdir: pathlib.Path,
    train_source: sources.Source,
    heldout_source: sources.Source,
) -> dict[str, dict[str, float]]:
    """Scores a run and draws its grids into `pictures/`."""
    loaded = sample.load(workdir)
    settings = loaded.config.report
    scores = {
        "reconstruction, held out": reconstruction(
            loaded, heldout_source, settings.eval_images
        )
    }
    if "caption" not in train_source.fields:
        return scores
    for name, source in (("training", train_source), ("held-out", heldout_source)):
        count = min(settings.retrieval_captions, len(source))
        found, drawn, captions = retrieval(loaded, source, count)
        scores[f"retrieval, {name} captions"] = found
        if jax.process_index() == 0:
            picture.save(
                picture.grid(drawn[:32], captions[:32]),
                workdir / "pictures" / f"samples_{name.replace('-', '')}.png",
            )
    return scores


def table(scores: dict[str, dict[str, float]]) -> str:
    """The scores as aligned text."""
    width = max(map(len, scores))
    rows = []
    for name, values in scores.items():
        cells = []
        for key, value in values.items():
            if key in ("images", "captions"):
                cells.append(f"{value} {key}")
            elif key.startswith("top"):
                cells.append(f"top-{key[3:]} {value:.1%}")
            else:
                cells.append(f"{key.upper()} {value:.4g}")
        rows.append(f"{name.ljust(width)}  {'  '.join(cells)}")
    return "\n".join(rows)


def write(
    workdir: pathlib.Path,
    train_source: sources.Source,
    heldout_source: sources.Source,
) -> None:
    """Evaluates a run on every process alike; the first one writes and prints."""
    scores = evaluate(workdir, train_source, heldout_source)
    if jax.process_index() > 0:
        return
    workdir_lib.write_text(workdir / "report.json", json.dumps(scores, indent=2) + "\n")
    print(table(scores))
    print(f"pictures: {workdir / 'pictures' / 'samples_training.png'}", flush=True)
