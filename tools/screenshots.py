"""Take pictures of a run's TensorBoard pages with headless Chromium (Debian's package `chromium`).

    python tools/screenshots.py demo/run/tensorboard docs/images
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

TAGS = "train/(loss|in_batch_accuracy|margin|grad_norm|positive_similarity|negative_similarity)$"
PAGES = {"tensorboard_scalars": (f"#scalars&tagFilter={urllib.parse.quote(TAGS)}", "1240,1040"),
         "tensorboard_custom_scalars": ("#custom_scalars", "1240,3300")}
"""Name of the picture -> page, and the window size in pixels that shows all of it."""
LARGEST_BYTES = 300_000


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until TensorBoard has read the run."""
    for _ in range(240):
        if server.poll() is not None:
            sys.exit("tensorboard ended; is the directory right?")
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                if len(answer.read()) > 10:
                    return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)
            continue
        time.sleep(0.5)
    sys.exit("tensorboard shows no scalars after two minutes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium: apt-get install chromium")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments.output.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", str(arguments.logdir), "--port",
                               str(port), "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(address, server)
        for name, (page, size) in PAGES.items():
            picture = arguments.output / f"{name}.png"
            subprocess.run([browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                            f"--window-size={size}", "--virtual-time-budget=30000",
                            f"--screenshot={picture}", f"{address}/{page}"],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=180)
            length = picture.stat().st_size
            print(f"{picture}: {length:,} bytes")
            if length > LARGEST_BYTES:
                sys.exit(f"{picture} is larger than {LARGEST_BYTES:,} bytes: make its window smaller")
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
