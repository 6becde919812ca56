"""vLLM 0.10.0's own Llama and Qwen3 models, with its own layers and attention op, in terrazzo's dispatcher."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.compilation", reason="tests/vllm/run.sh makes an environment that has vLLM")
platform010 = pytest.importorskip("platform010", reason="tests/vllm/run.sh puts the test platform on the path")

from harness010 import EMULATED, MAX_TOKENS, OURS, WORDS, Served, serve  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)

from terrazzo.runtime.dispatcher import PiecewiseBackend  # noqa: E402

MODELS = {"llama": "LlamaModel", "qwen3": "Qwen3Model"}
LAYERS = 2
PIECES = LAYERS + 1
TINY = SimpleNamespace(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=MAX_TOKENS,
    vocab_size=WORDS,
    tie_word_embeddings=False,
)


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory):
    """The groups of processes that vLLM's layers ask about, with this process alone in each."""
    with set_current_vllm_config(VllmConfig()):
        meeting = tmp_path_factory.mktemp("groups") / "meeting"
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


def model(name, backend=None, **options):
    module = importlib.import_module(f"vllm.model_executor.models.{name}")
    splitting_ops = ["vllm.unified_attention", "vllm.unified_attention_with_output"]
    return Served(
        lambda config: getattr(module, MODELS[name])(vllm_config=config, prefix="model"),
        backend,
        hf_config=TINY,
        splitting_ops=splitting_ops,
        **options,
    )


@pytest.mark.parametrize("name", MODELS)
def test_captured_sizes_replay_with_new_inputs(ended, name):
    served = model(name, EMULATED, use_cudagraph=True, cudagraph_capture_sizes=[1, 4], compile_sizes=[4])
    counts = serve(model(name), served, [MAX_TOKENS, *[4, 1] * 3, 7, 4], None)
    made = platform010.EmulatedBackend.made
    assert counts["num_cudagraph_captured"] == PIECES * 2
    assert counts["num_piecewise_capturable_graphs_seen"] == len(made) == PIECES
    assert [[g.replays for g in piece.graphs] for piece in made] == [[3, 2]] * PIECES
    assert len(ended) == 1


@pytest.mark.parametrize("name", MODELS)
def test_terrazzos_own_plans_serve_the_named_sizes(ended, monkeypatch, name):
    pytest.importorskip("terrazzo.runtime.compiled", reason="the compiler is not there")
    failed = []
    monkeypatch.setattr(PiecewiseBackend, "_fall_back", lambda piece, entry, error: failed.append(error))
    served = model(name, OURS, use_cudagraph=True, cudagraph_capture_sizes=[1, 4], compile_sizes=[4])
    serve(model(name), served, [MAX_TOKENS, 4, 1, 4, 3], None)
    assert not failed
