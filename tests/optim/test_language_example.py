"""The example with tied embeddings trains, draws, and every parameter of its net is in a layer."""

import torch

import fisherfn as ff
from tests.examples import DOCS, load


def test_it_runs_and_draws(tmp_path):
    runs = load("language").main(tmp_path, small=True)
    assert (tmp_path / "language.png").stat().st_size > 10_000
    first = [found["loss"][0] for found in runs.values()]
    torch.testing.assert_close(first[0], first[1], rtol=1e-5, atol=0.0)  # the same parameters and batch
    for name, found in runs.items():
        assert found["loss"][-1] < found["loss"][0] and found["held_out"] < 6, name


def test_the_embedding_and_the_output_layer_are_one_block():
    language = load("language")
    _, _, alphabet = language.letters()
    net = language.Language(alphabet)
    ids = torch.randint(alphabet, (4, language.LENGTH))
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, ids, likelihood=ff.Categorical(), context=context)
    assert not ng.layout.fallbacks
    assert len(ng.layout.block("tokens").uses) == 2 and "head.weight" not in params


def test_its_page_shows_it():
    page = (DOCS / "hugging_face.md").read_text(encoding="utf-8")
    assert "images/language.png" in page and (DOCS / "images" / "language.png").exists()
    assert "docs/examples/language.py" in page
