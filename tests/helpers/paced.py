"""The command line with some sleep per training step while a file exists, as many seconds as it says: stands in for a
slow model.

    python paced.py FILE -m megatron_embed train ...
"""

import sys
import time
from pathlib import Path


def main() -> int:
    file, arguments = Path(sys.argv[1]), sys.argv[4:]
    from megatron_embed.__main__ import main as command

    if arguments[0] == "train":
        from megatron_embed.training import loop

        original = loop.train_step

        def train_step(*args, **kwargs):
            if file.exists():
                time.sleep(float(file.read_text()))
            return original(*args, **kwargs)

        loop.train_step = train_step
    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
