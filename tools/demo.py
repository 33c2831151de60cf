"""Demonstration: evaluate, train with two ranks, evaluate, export, load the export with Sentence Transformers.

    python tools/demo.py            # writes demo/export/, demo/run/, demo/result.json and demo/why.png
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import children
from small_models import packaged_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/minilm_22m_embed_dp2_cpu.yaml"
BEIR = "examples/data/mini_zh/beir"
MAX_LENGTH = 192
RANKS = 2


def run(*arguments: str, capture: bool = False) -> str:
    """Run a megatron-embed command on two ranks. Returns its stdout if captured; exits if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or RANKS) // RANKS))}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "-m", "megatron_embed",
               *arguments]
    finished = children.run(command, cwd=ROOT, env=environment, check=False,
                            stdout=subprocess.PIPE if capture else None)
    if finished.returncode:
        sys.exit(f"demo: `megatron-embed {arguments[0]}` failed with exit code {finished.returncode}")
    return finished.stdout or ""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    demo = ROOT / "demo"
    shutil.rmtree(demo, ignore_errors=True)
    demo.mkdir()
    say = lambda text: print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)  # noqa: E731
    model = packaged_model()
    say("1/4 all-MiniLM-L6-v2 before training, on 200 held-out Chinese questions")
    answer = run("evaluate", "--model", model, "--data", BEIR, "--max-length", str(MAX_LENGTH), capture=True)
    before = json.loads(answer.splitlines()[-1])["ndcg@10"]
    say(f"    nDCG@10 {before:.4f}")
    say(f"2/4 training with {RANKS} ranks on 1,000 questions: 20 steps of 50")
    run("train", CONFIG, f"model.path={model}")
    rows = [json.loads(line) for line in (demo / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    after = next(row["eval/ndcg@10"] for row in reversed(rows) if "eval/ndcg@10" in row)
    say(f"3/4 nDCG@10 {after:.4f}; exported to demo/export")
    say("4/4 the export, embedded by Sentence Transformers alone")
    # Imported here because these take seconds; the first quiets a library that the others import.
    from megatron_embed.platform.terminal_text import setup_logging

    setup_logging(0)
    from demo_picture import draw, in_sentence_transformers

    from megatron_embed.evaluation.beir import load_beir

    data = load_beir(str(ROOT / BEIR))
    search_before = in_sentence_transformers(model, data, MAX_LENGTH)
    search_after = in_sentence_transformers(str(demo / "export"), data, MAX_LENGTH)
    export = search_after.ndcg
    steps = [row for row in rows if "loss" in row]
    draw(demo / "why.png", steps, search_before, search_after)
    result = {"before": before, "after": after, "export": export, "first_loss": steps[0]["loss"],
              "last_loss": steps[-1]["loss"], "seconds": round(time.monotonic() - started, 1)}
    (demo / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"""
  held-out nDCG@10
  -------------------------------------  ------
  all-MiniLM-L6-v2                       {before:.4f}
  after 20 steps on {RANKS} ranks              {after:.4f}   ({after - before:+.4f})
  the export in Sentence Transformers    {export:.4f}

  Why:     demo/why.png
  Curves:  tensorboard --logdir demo/run
  Use it:
    from sentence_transformers import SentenceTransformer
    vectors = SentenceTransformer("demo/export").encode(["载域龙属是由谁命名的？"])
""")


if __name__ == "__main__":
    main()
