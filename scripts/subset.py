"""Takes the first images of each class out of a folder of images, for training that a CPU can do.

    python scripts/subset.py SOURCE TARGET --train 100 --test 100

Both are folders as `main.py --dataset folder` reads them. The images are copied byte for byte, in the order
of their names, so that everyone with the same SOURCE gets the same TARGET; each run's config.json has the
SHA-256 of its images.
"""

import argparse
import shutil
import sys
from pathlib import Path


def first_images(folder: Path, count: int) -> list[Path]:
    """The first so many images of each class, by name; ValueError or OSError where there are not so many."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    chosen = [sorted(path for path in c.iterdir() if path.name[0] != ".")[:count] for c in classes]
    if count < 1 or not classes or any(len(images) < count for images in chosen):
        raise ValueError(f"{folder} should hold one folder for each class, each with at least {count} images")
    return [path for images in chosen for path in images]


def main() -> int:
    """Copy, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="must not exist yet")
    for part in ("train", "test"):
        parser.add_argument(f"--{part}", type=int, required=True, metavar="N", help="of each class")
    args = parser.parse_args()
    try:
        counts = {"train": args.train, "test": args.test}
        chosen = [path for part, count in counts.items() for path in first_images(args.source / part, count)]
        args.target.mkdir(parents=True)
        for path in chosen:
            copy = args.target / path.relative_to(args.source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    except (OSError, ValueError) as error:
        print(f"subset.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(chosen):,} images in {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
