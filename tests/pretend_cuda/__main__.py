"""Run Python on the pretend device: `python -m tests.pretend_cuda ARGUMENTS OF PYTHON`.

    python -m tests.pretend_cuda -m pytest -m "gpu or multi_gpu" tests/gpu
    python -m tests.pretend_cuda -m megatron_embed train CONFIG.yaml
    PRETEND_LOG=waits.txt python -m tests.pretend_cuda -m megatron_embed train CONFIG.yaml
"""

import os
import sys

from tests.pretend_cuda.environment import environment


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
