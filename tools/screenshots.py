"""Take pictures of a run's TensorBoard pages, or of the documentation site, with headless Chromium.

    python tools/screenshots.py demo/run/tensorboard docs/images
    make docs && python tools/screenshots.py --site site pictures

Debian's packages: `chromium`, and `fonts-noto-cjk` for the Chinese pages.
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

from measurement import exit_on_signals

TAGS = "train/(loss|in_batch_accuracy|margin|grad_norm|positive_similarity|negative_similarity)$"
PAGES = {"tensorboard_scalars": (f"#scalars&tagFilter={urllib.parse.quote(TAGS)}", "1240,1040"),
         "tensorboard_custom_scalars": ("#custom_scalars", "1240,3300")}
"""Name of the picture -> page, and the window size in pixels that shows all of it."""
SITE_PAGES = {"front": "index.html", "tutorial": "tutorials/scored_pairs.html", "comparison": "from/ms_swift.html",
              "chinese": "zh/index.html"}
SITE_SIZE = "1400,1500"
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


def take(address: str, size: str, picture: Path) -> None:
    """Save what the browser shows in a window of this size."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium: apt-get install chromium")
    subprocess.run([browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    "--disable-background-networking", f"--window-size={size}", "--virtual-time-budget=30000",
                    f"--screenshot={picture}", address],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=180)
    print(f"{picture}: {picture.stat().st_size:,} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="log directory of TensorBoard, or with --site the built site")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    parser.add_argument("--site", action="store_true", help="the source is the documentation site")
    arguments = parser.parse_args()
    exit_on_signals()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.site:
        for name, page in SITE_PAGES.items():
            take((arguments.source / page).resolve().as_uri(), SITE_SIZE, arguments.output / f"{name}.png")
        return 0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", str(arguments.source), "--port",
                               str(port), "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(address, server)
        for name, (page, size) in PAGES.items():
            picture = arguments.output / f"{name}.png"
            take(f"{address}/{page}", size, picture)
            if picture.stat().st_size > LARGEST_BYTES:
                sys.exit(f"{picture} is larger than {LARGEST_BYTES:,} bytes: make its window smaller")
    finally:
        server.terminate()
        server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
