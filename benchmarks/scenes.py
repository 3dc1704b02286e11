"""python -m benchmarks.scenes

How many scenes of `openmoji_scenes` one core composes in a second, all fields of each:
the first thousands, while drawings are still rasterised, and later ones.
"""

import argparse
import time

from benchmarks import common
from ldm_jax import config as config_lib
from ldm_jax.data import openmoji_scenes


def rate(first: int, count: int, resolution: int) -> float:
    """Scenes a second of CPU time, from number `first` on."""
    began = time.process_time()
    for index in range(first, first + count):
        openmoji_scenes.scene("train", index, resolution)
    return count / (time.process_time() - began)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--count", type=int, default=3000)
    args = parser.parse_args()
    with config_lib.exit_on_user_error():
        openmoji_scenes.nouns()  # reads the names of all emoji, once
        rates = [
            rate(part * args.count, args.count, args.resolution) for part in range(3)
        ]
    print(common.environment("numpy") + "\n")
    print("| Scenes | Scenes/s |\n| --- | --- |")
    for part, value in enumerate(rates):
        first = part * args.count
        print(f"| {first} to {first + args.count - 1} | {value:.0f} |")


if __name__ == "__main__":
    main()
