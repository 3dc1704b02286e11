"""python -m benchmarks.curves --workdir=runs/gan --out=docs/adversarial_curves.png

Draws scalars that a run has written for TensorBoard, one panel for each group of names.
Needs matplotlib: pip install -e '.[plot]'.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence

from tensorboard.backend.event_processing import event_accumulator

ADVERSARIAL = (
    ("heldout/psnr",),
    ("train/l1",),
    ("train/logits_real", "train/logits_fake"),
    ("train/disc_loss",),
    ("train/d_weight",),
    ("train/grad_norm", "train/disc_grad_norm"),
)


def read_scalars(logdir: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), …]} of all event files in a folder, in order of steps."""
    events = event_accumulator.EventAccumulator(str(logdir), {"tensors": 0})
    events.Reload()
    from tensorboard.util import tensor_util

    return {
        name: sorted(
            (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
            for event in events.Tensors(name)
        )
        for name in events.Tags()["tensors"]
        if events.SummaryMetadata(name).plugin_data.plugin_name == "scalars"
    }


def draw(
    scalars: Mapping[str, Sequence[tuple[int, float]]],
    groups: Sequence[Sequence[str]],
    out: pathlib.Path,
) -> None:
    """One panel a group; values that span more than a factor of 100 on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [[n for n in names if n in scalars] for names in groups]
    groups = [names for names in groups if names]
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, names in zip(axes.flat, groups, strict=False):
        for name in names:
            steps, values = zip(*scalars[name], strict=True)
            axis.plot(steps, values, label=name.partition("/")[2], linewidth=1)
            if min(values) > 0 and max(values) > 100 * min(values):
                axis.set_yscale("log")
        axis.set_title(" and ".join(names), fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--stage", default="autoencoder")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    scalars = read_scalars(pathlib.Path(args.workdir) / "logs" / args.stage)
    draw(scalars, ADVERSARIAL, pathlib.Path(args.out))
    print(f"{len(scalars)} curves read, picture in {args.out}")


if __name__ == "__main__":
    main()
