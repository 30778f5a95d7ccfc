"""Takes the first pictures of each class out of a folder of pictures, for training that a CPU can do.

    python scripts/subset.py SOURCE TARGET --train 100 --test 100

Both are folders as `main.py --dataset folder` reads them. The pictures are copied byte for byte, in the order
of their names, so that everyone with the same SOURCE gets the same TARGET; the SHA-256 of its pictures stands
in the config.json of each run.
"""

import argparse
import shutil
import sys
from pathlib import Path


def first_pictures(source: Path, counts: dict[str, int]) -> list[Path]:
    """Paths below `source` of the first so many pictures of each class, for each part ("train", "test").

    Raises:
        ValueError: a part is missing or has no classes, or a class has fewer pictures.
    """
    chosen = []
    for part, count in counts.items():
        if not (source / part).is_dir():
            raise ValueError(f"{source / part} is no directory; it should hold one folder for each class")
        classes = sorted(path for path in (source / part).iterdir() if path.is_dir() and path.name[0] != ".")
        if not classes:
            raise ValueError(f"{source / part} holds no folders of pictures")
        for directory in classes:
            pictures = sorted(path for path in directory.iterdir() if path.name[0] != ".")
            if len(pictures) < count:
                raise ValueError(f"{directory} holds {len(pictures)} pictures, fewer than {count}")
            chosen += [path.relative_to(source) for path in pictures[:count]]
    return chosen


def main() -> int:
    """Copy, and say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="must not exist yet")
    for part in ("train", "test"):
        parser.add_argument(f"--{part}", type=int, required=True, metavar="N", help="of each class")
    args = parser.parse_args()
    try:
        if min(args.train, args.test) < 1:
            raise ValueError("--train and --test must be at least 1")
        chosen = first_pictures(args.source, {"train": args.train, "test": args.test})
        args.target.mkdir(parents=True)
        for path in chosen:
            (args.target / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.source / path, args.target / path)
    except (OSError, ValueError) as error:
        print(f"subset.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(chosen):,} pictures in {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
