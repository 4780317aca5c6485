"""A researcher's walk: a new activation in one place, its typing error, and a notebook's cells."""

import re
import shutil

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.walks.terminal import Terminal

pytestmark = pytest.mark.slow

NEW = """

@ACTIVATIONS.register("cubed", help="x^3")
def cubed(x: Tensor) -> Tensor:
    return x**3
"""


def test_a_new_activation_trains_and_is_in_the_help(corpus_dir, tmp_path):
    shutil.copytree(REPOSITORY / "yuzogpt", tmp_path / "fork" / "yuzogpt")
    layers = tmp_path / "fork" / "yuzogpt" / "model" / "layers.py"
    layers.write_text(layers.read_text() + NEW)
    train = f"yuzogpt train {' '.join(TINY)} --data_dir={corpus_dir} --num_workers=0 --max_iters=20"
    with Terminal(tmp_path, PYTHONPATH=str(tmp_path / "fork")) as terminal:
        assert "cubed" in terminal.run("yuzogpt train --help activation")[1]
        status, shown = terminal.run(f"{train} --activation=cubd --out_dir=out-typo")
        assert status == 2
        assert "cubed" in shown
        losses = {}
        for name in ("gelu", "cubed"):
            status, shown = terminal.run(f"{train} --activation={name} --out_dir=out-{name}")
            assert status == 0
            losses[name] = re.search(r"val loss ([\d.]+)", shown)[1]
        assert losses["gelu"] != losses["cubed"]

        terminal.type("python")
        terminal.wait_for(">>>")
        terminal.type("import yuzogpt; model = yuzogpt.load('out-cubed')")
        terminal.type("print('loss', model.loss('the king of night'))")
        assert float(terminal.wait_for(r"^loss ([\d.]+)")[1]) > 0
        terminal.type("exit()")
        assert terminal.finish()[0] == 0
