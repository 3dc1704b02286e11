"""python -m benchmarks.loading

Seconds and memory until the 3.4 GB of Stable Diffusion 1.5's UNet (random weights, made
here) are in memory, ours and diffusers' in processes of their own, by turns. Both read
the same .safetensors in the layout of diffusers, which this side also transposes; the
file is in the page cache.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

WANTED, WANTED_OF_MEMORY = 1.5, 1.3
FILE = "diffusion_pytorch_model.safetensors"
_UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def make(folder: pathlib.Path, widths: tuple[int, ...]) -> None:
    """Saves a UNet of diffusers with random weights."""
    import diffusers

    net = diffusers.UNet2DConditionModel(**_UNET, block_out_channels=widths)
    net.save_pretrained(folder, max_shard_size="100GB")


def ours(folder: pathlib.Path) -> Callable[[], object]:
    """Prepares the load here."""
    import jax

    from ldm_jax import released
    from ldm_jax.convert import files, networks

    jax.devices()
    config = json.loads((folder / "config.json").read_text())

    def load():
        state = files.read(folder / FILE, "--folder")
        net = networks.module_of(state, config)
        params = networks.params_of(net, state, place=released.on_device)
        return jax.block_until_ready(params)

    return load


def theirs(folder: pathlib.Path) -> Callable[[], object]:
    """Prepares the load by diffusers; every page of the weights is touched."""
    import diffusers
    import torch

    torch.set_grad_enabled(False)

    def load():
        net = diffusers.UNet2DConditionModel.from_pretrained(folder)
        for param in net.parameters():
            float(param.view(-1)[::1024].sum())
        return net

    return load


def resident() -> int:
    """Bytes of this process that are in memory, pages of files among them."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(load: Callable[[], object]) -> dict[str, float]:
    """Seconds of `load`, and by how much it raised memory: at most, and at the end."""
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    after = resident()
    del loaded
    return {
        "seconds": seconds,
        "peak": max(peak[0], after) - before,
        "after": after - before,
    }


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, help="keep the weights there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", default="320,640,1280,1280")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        prepare = {"ours": ours, "theirs": theirs}[args.side]
        print(json.dumps(measure(prepare(args.folder))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch)
        if not (folder / FILE).is_file():
            make(folder, tuple(int(w) for w in args.widths.split(",")))
        compare(folder, args.rounds)


def compare(folder: pathlib.Path, rounds: int) -> None:
    """Both sides by turns."""
    results: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side, rows in results.items():
            (folder / FILE).read_bytes()  # into the page cache
            command = [sys.executable, "-m", "benchmarks.loading"]
            command += [f"--side={side}", f"--folder={folder}"]
            said = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(said.stdout.splitlines()[-1]))
    size = (folder / FILE).stat().st_size
    print(f"{size / 1e9:.2f} GB, {rounds} rounds, medians\n")
    print("| side | seconds | memory at most | memory after |")
    print("| --- | --- | --- | --- |")
    medians = {}
    for side, rows in results.items():
        values = {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        medians[side] = values
        print(
            f"| {side} | {values['seconds']:.2f} | {values['peak'] / 1e9:.2f} GB |"
            f" {values['after'] / 1e9:.2f} GB |"
        )
    ratios = [
        a["seconds"] / b["seconds"]
        for a, b in zip(results["ours"], results["theirs"], strict=True)
    ]
    largest = largest_array(folder / FILE)
    over = (medians["ours"]["peak"] - medians["ours"]["after"]) / largest
    print(
        f"\nratio of the times {statistics.median(ratios):.2f} (wanted {WANTED})\n"
        f"memory at most is above that after by {over:.2f} times the largest array of"
        f" {largest / 1e6:.0f} MB (wanted {WANTED_OF_MEMORY})"
    )


def largest_array(path: pathlib.Path) -> int:
    """Bytes of the largest array of a .safetensors file."""
    from ldm_jax.convert import mapped

    return max(array.nbytes for array in mapped.read_safetensors(path).values())


if __name__ == "__main__":
    main()
