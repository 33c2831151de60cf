"""Log lines and progress of a run: a line for each logged step and each evaluation, above the bar on a terminal."""

import io
import logging
import re

import pytest

from megatron_embed.training.metrics import MetricsWriter

STEP = {"loss": 1.25, "in_batch_accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3, "tokens_per_second": 10.0}
EVALUATION = {"loss": 0.75, "margin": 0.1, "ndcg@10": 0.5, "map": 0.4, "few/ndcg@10": 0.6, "dim_16/ndcg@10": 0.3,
              "few/dim_16/ndcg@10": 0.2, "spearman": 0.9, "pearson": 0.8, "rerank/ndcg@10": 0.7, "recall@10": 0.55}
LINE = ("step 2  evaluation: recall@10 0.5500  loss 0.7500  ndcg@10 0.5000  few/ndcg@10 0.6000  spearman 0.9000  "
        "rerank/ndcg@10 0.7000")


def written(directory, *, active=True):
    writer = MetricsWriter(directory, tensorboard=False, train_steps=2, first_step=0, active=active,
                           main_metric="recall@10")
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
    assert step == "step 2  loss 1.2500  in batch accuracy 0.500  grad norm 2.000  lr 1.00e-03  10 tokens/s"
    assert evaluation == LINE


def test_other_ranks_say_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_embed"):
        written(str(tmp_path / "run"), active=False)
    assert caplog.records == [] and list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_stand_above_the_bar_of_a_terminal(monkeypatch, caplog):
    """The bar is wiped before a line and drawn again below it; afterwards messages go where they went before."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    handler, root = logging.StreamHandler(terminal), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    with caplog.at_level(logging.INFO, logger="megatron_embed"):
        written(None)
    assert re.search(rf"\r *\r{re.escape(LINE)}\n\r[^\n]*2/2", terminal.getvalue()), terminal.getvalue()
    assert "tokens/s" not in terminal.getvalue()  # the bar has the loss
    assert root.handlers == [handler]
