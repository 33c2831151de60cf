"""Log lines and progress of a run: a line for each logged step and each evaluation, above the bar on a terminal."""

import io
import json
import logging
import re

import pytest

from megatron_embed.config.schema import LoggingConfig
from megatron_embed.training import progress
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.progress import Progress, duration

STEP = {"loss": 1.25, "in_batch_accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3, "tokens_per_second": 10.0}
EVALUATION = {"loss": 0.75, "margin": 0.1, "ndcg@10": 0.5, "map": 0.4, "few/ndcg@10": 0.6, "dim_16/ndcg@10": 0.3,
              "few/dim_16/ndcg@10": 0.2, "spearman": 0.9, "pearson": 0.8, "rerank/ndcg@10": 0.7, "recall@10": 0.55,
              "margin_to_mean_negative": 0.4, "margin_to_hardest_negative": 0.1}
LINE = ("step 2  evaluation: recall@10 0.5500  loss 0.7500  ndcg@10 0.5000  few/ndcg@10 0.6000  spearman 0.9000  "
        "rerank/ndcg@10 0.7000  margin_to_mean_negative 0.4000  margin_to_hardest_negative 0.1000")
STEP_LINE = (r"step 2  loss 1.2500  in batch accuracy 0.500  grad norm 2.000  lr 1.00e-03  10 tokens/s  "
             r"2/3  epoch 0.80  ETA 0:00:00")


def written(directory, *, active=True, on_step=None):
    run = Progress(train_steps=3, first_step=0, steps_per_epoch=2.5)
    writer = MetricsWriter(directory, settings=LoggingConfig(tensorboard=False), progress=run, active=active,
                           main_metric="recall@10", on_step=on_step)
    writer.step(1, STEP, log=False)
    writer.step(2, STEP, log=True)
    writer.evaluation(2, EVALUATION)
    writer.close()
    assert writer.error is None


@pytest.mark.parametrize("directory", [None, "run"])
def test_a_line_for_each_logged_step_and_each_evaluation(directory, tmp_path, caplog):
    """Also of a run that writes no files, where it is all there is to see."""
    with caplog.at_level(logging.INFO, logger="megatron_embed"):
        written(directory and str(tmp_path / directory))
    step, evaluation = [record.getMessage() for record in caplog.records]
    assert step == STEP_LINE
    assert evaluation == LINE
    if directory:
        rows = [json.loads(line) for line in (tmp_path / directory / "metrics.jsonl").read_text().splitlines()]
        assert rows[0] == {"step": 2, **STEP, "epoch": 0.8}
        assert rows[1] == {"step": 2, **{f"eval/{name}": value for name, value in EVALUATION.items()}}


@pytest.mark.parametrize("active", [True, False])
def test_a_callback_gets_every_step_and_every_evaluation_on_every_rank(active):
    calls = []
    written(None, active=active, on_step=lambda step, metrics: calls.append((step, dict(metrics))))
    assert [step for step, _ in calls] == [1, 2, 2]
    assert calls[0][1] == {**STEP, "epoch": 0.4}
    assert calls[2][1] == {f"eval/{name}": value for name, value in EVALUATION.items()}


def test_other_ranks_say_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_embed"):
        written(str(tmp_path / "run"), active=False)
    assert caplog.records == [] and list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch):
    """A terminal for stderr, and a handler of the root logger that writes to it."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(terminal)])
    return terminal


def test_lines_stand_above_the_last_line_of_a_terminal(monkeypatch, caplog):
    """It is wiped before a line and drawn again below it; afterwards messages go where they went before."""
    terminal, root = use_terminal(monkeypatch), logging.getLogger()
    before = root.handlers
    with caplog.at_level(logging.INFO, logger="megatron_embed"):
        written(None)
    shown = terminal.getvalue()
    last = r"step 2/3  loss 1.2500  accuracy 0.500  ETA 0:00:00  epoch 0.80"
    assert re.search(rf"\r *\r{re.escape(LINE)}\n\r[^\n]*{last}", shown), shown
    assert STEP_LINE in shown
    assert root.handlers == before


@pytest.mark.parametrize("width, last", [(0, None), (10, "step 2/3"), (30, "step 2/3  loss 1.2500"), (9, "step 2/3")])
def test_terminals_of_any_width(monkeypatch, caplog, width, last):
    """No line of the terminal reaches its last column; without a width (`docker exec`) the log is all there is."""
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "terminal_width", lambda: width)
    with caplog.at_level(logging.INFO, logger="megatron_embed"):
        written(None)
    lines = [part for part in re.split(r"[\r\n]", terminal.getvalue()) if part.strip()]
    own = [line for line in lines if line not in (STEP_LINE, LINE)]
    assert lines[-1].strip() == (last or LINE)
    assert bool(own) == (last is not None) and all(len(line) < width or not line.strip() for line in own)
    assert STEP_LINE in lines and LINE in lines


def test_epochs_have_their_means(caplog):
    """Also the part of an epoch with which a run ends; steps without a finite loss do not count."""
    run = Progress(train_steps=6, first_step=1, steps_per_epoch=2.5)
    losses = {2: 1.0, 3: 2.0, 4: float("nan"), 5: 4.0, 6: 8.0}
    lines = {}
    for step, loss in losses.items():
        run.after_step(step, {"loss": loss, "accuracy": loss / 10})
        lines[step] = run.epoch_line(step)
    assert lines == {2: None, 3: "epoch 1 of 2.4, steps 2 to 3: mean loss 1.5000  accuracy 0.1500", 4: None,
                     5: "epoch 2 of 2.4, steps 4 to 5: mean loss 4.0000  accuracy 0.4000",
                     6: "epoch 3 of 2.4, steps 6 to 6: mean loss 8.0000  accuracy 0.8000"}


def test_durations():
    assert [duration(seconds) for seconds in (0.2, 61, 3600, 90061)] == ["0:00:00", "0:01:01", "1:00:00", "1 d 1:01:01"]
