"""`python tools/check_data.py ...` is `megatron-embed data check ...`."""

import sys

from megatron_embed.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["data", "check", *sys.argv[1:]]))
