"""The models: what their pieces hold, that they add up to the model, and that a stored piece is the same piece."""

from __future__ import annotations

import json
import operator
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from terrazzo.lowering.errors import UserError
from terrazzo.tools.models import (
    DTYPES,
    Piece,
    Whole,
    build,
    config,
    load_piece,
    names,
    piece_of,
    pieces,
    run_eagerly,
    run_whole,
    save_piece,
    whole,
)
from terrazzo.tools.models.fakes import TensorSpec, from_dim, symbols_of, to_dim, with_fakes

NAMES = names()
CUDA = torch.device("cuda", 0)


@cache
def tiny(name: str) -> Whole:
    """A tiny model on the CPU in fp32, captured once for all tests."""
    return whole(name, tiny=True, dtype=torch.float32, layers=3)


@cache
def published(name: str) -> list[Piece]:
    """The published model's pieces for a CUDA device."""
    return pieces(name, device="cuda")


def tokens(name: str, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, config(name, tiny=True).vocab, (count,), generator=torch.Generator().manual_seed(seed))
    return ids.to(torch.int32), torch.arange(count)


def computed(piece: Piece, args: list[Any]) -> list[torch.Tensor]:
    """The piece's results, without the buffer that attention will fill: that one holds nothing yet."""
    result = piece.graph(*args)
    results = result if isinstance(result, tuple) else (result,)
    nodes = piece.graph.graph.output_node().all_input_nodes
    kept = [r for r, node in zip(results, nodes, strict=True) if node.args[0].target is not torch.empty]
    assert len(kept) == len(results) - (piece.kind != "last")
    return kept


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 7, 33])
def test_pieces_in_order_give_the_models_own_output(name: str, count: int) -> None:
    parts = tiny(name)
    ids, positions = tokens(name, count)
    got = run_whole(parts, run_eagerly, ids, positions)
    assert torch.equal(got, parts.model(ids, positions))
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_runner_gets_every_piece_once_and_its_result_counts(name: str) -> None:
    parts = tiny(name)
    seen: list[str] = []

    def zero_last(piece: Piece, args: list[Any]) -> Any:
        seen.append(piece.kind)
        assert all(args[i] == 5 for i in piece.sym_shape_indices)
        result = piece.graph(*args)
        return torch.zeros_like(result) if piece.kind == "last" else result

    assert not run_whole(parts, zero_last, *tokens(name, 5)).any()
    assert seen == ["first", "middle", "middle", "last"]


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_causal_and_sees_the_tokens_before(name: str) -> None:
    parts = tiny(name)
    ids, positions = tokens(name, 9)
    full, other = parts.model(ids, positions), ids.clone()
    other[4] = (other[4] + 1) % 256
    changed = (parts.model(other, positions) - full).abs().amax(-1) > 0
    assert changed.tolist() == [False] * 4 + [True] * 5


@pytest.mark.parametrize("name", NAMES)
def test_every_node_has_a_value_and_a_place(name: str) -> None:
    for piece in published(name):
        envs = set()
        for node in piece.graph.graph.nodes:
            if node.op == "output":
                continue
            value = node.meta["example_value"]
            if isinstance(value, FakeTensor):
                assert value.device == CUDA
                envs.add(id(value.fake_mode.shape_env))
            if node.op != "placeholder":
                assert "tools/models" in node.meta["stack_trace"]
        assert len(envs) == 1
        [index] = piece.sym_shape_indices
        inputs = piece.graph.graph.find_nodes(op="placeholder")
        assert isinstance(inputs[index].meta["example_value"], torch.SymInt)
        assert not any("terrazzo_models.attention" in str(n.target) for n in piece.graph.graph.nodes)


def test_capturing_published_sizes_costs_seconds_and_no_memory() -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert len(pieces("mixtral-8x7b", device="cuda", layers=2)) == 3
    # Its two layers hold 5.8 GB of weights in bf16; ru_maxrss is in KB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    assert time.monotonic() - start < 30


def test_weights_and_work_of_the_published_pieces() -> None:
    c = config("llama-3.1-8b")
    dense = c.hidden * (c.q_size + c.q_size + 2 * c.kv_size + 3 * c.intermediate)
    middle = published("llama-3.1-8b")[1]
    assert middle.weight_bytes() == 2 * dense == 436_207_616
    assert middle.flops(64) == 2 * 64 * dense
    moe, m = published("mixtral-8x7b")[1], config("mixtral-8x7b")
    around = m.hidden * (m.q_size + m.q_size + 2 * m.kv_size + m.experts)
    expert = 3 * m.hidden * m.intermediate
    assert [moe.weight_bytes(s) for s in (1, 3, 100)] == [2 * (around + n * expert) for n in (2, 6, 8)]
    assert moe.flops(10) == 2 * 10 * (around + 2 * expert)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 13])
def test_inputs_are_true_to_the_placeholders_and_repeatable(name: str, size: int) -> None:
    for piece in tiny(name).pieces.values():
        inputs = piece.make_inputs(size, "cpu", seed=3)
        again, other = piece.make_inputs(size, "cpu", seed=3), piece.make_inputs(size, "cpu", seed=4)
        fakes = [n.meta["example_value"] for n in piece.graph.graph.find_nodes(op="placeholder")]
        for value, same, fake in zip(inputs, again, fakes, strict=True):
            if isinstance(fake, torch.SymInt):
                assert value == same == size
                continue
            assert value.dtype == fake.dtype
            assert [d if isinstance(d, int) else size for d in fake.shape] == list(value.shape)
            assert torch.equal(value, same)
        assert any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in zip(inputs, other, strict=True))
        assert all(torch.isfinite(t).all() for t in computed(piece, inputs))


def test_weights_are_drawn_by_their_role() -> None:
    def named(name: str, part: str, kind: str = "middle") -> torch.Tensor:
        piece = next(p for p in tiny(name).pieces.values() if p.kind == kind)
        inputs = piece.graph.graph.find_nodes(op="placeholder")
        [index] = [i for i, n in enumerate(inputs) if part in n.name]
        return piece.make_inputs(4, "cpu")[index]

    assert abs(named("llama-3.1-8b", "input_layernorm").mean() - 1) < 0.1
    assert abs(named("gemma-2-9b", "input_layernorm").mean()) < 0.1
    assert abs(named("llama-3.1-8b", "o_proj").std() * config("llama-3.1-8b", tiny=True).q_size ** 0.5 - 1) < 0.05
    assert named("gemma-2-9b", "normalizer", "first") == pytest.approx(96**0.5)
    assert named("gpt2", "positions", "first").tolist() == [0, 1, 2, 3]
    cache = named("llama-3.1-8b", "cos_sin_cache")
    half = cache.shape[1] // 2
    torch.testing.assert_close(cache[:, :half] ** 2 + cache[:, half:] ** 2, torch.ones(cache.shape[0], half))
    assert cache[0].tolist() == [1.0] * half + [0.0] * half


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_a_stored_piece_is_the_same_piece(name: str, dtype: str, tmp_path: Path) -> None:
    if (name, dtype) == ("gpt2", "fp8"):
        pytest.skip("it has no form in eight bits")
    for piece in tiny(name).pieces.values() if dtype == "fp32" else pieces(name, tiny=True, dtype=DTYPES[dtype]):
        path = tmp_path / f"{piece.index}.json"
        save_piece(piece, path)
        back = load_piece(path)
        assert replace(back, graph=piece.graph) == piece
        assert back.graph.code.split("):\n")[1] == piece.graph.code.split("):\n")[1]
        results = computed(piece, piece.make_inputs(6, "cpu")), computed(back, back.make_inputs(6, "cpu"))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        save_piece(back, tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_graph_that_a_backend_gets_is_a_piece(tmp_path: Path) -> None:
    model, x = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 12), torch.nn.SiLU()), torch.randn(5, 8)

    def saving(graph: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        save_piece(piece_of("mine", 0, "first", graph), tmp_path / "p.json")
        return graph

    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        torch.compile(model, backend=saving)(x)
    back = load_piece(tmp_path / "p.json")
    inputs = back.make_inputs(3, "cpu")
    assert len(back.sym_shape_indices) == 1 and {3, *back.graph(*inputs)[0].shape} == {3, 12}


def test_a_graph_without_values_is_no_piece() -> None:
    with pytest.raises(UserError, match=r"input x: it has no meta\['example_value'\]"):
        piece_of("mine", 0, "first", fx.symbolic_trace(lambda x: x + 1))
    with pytest.raises(UserError, match="kind 'only' is none of first, middle, last"):
        piece_of("mine", 0, "only", fx.symbolic_trace(lambda x: x + 1))


def test_a_stored_piece_moves_to_another_device(tmp_path: Path) -> None:
    save_piece(published("qwen3-8b")[1], tmp_path / "p.json")
    for node in load_piece(tmp_path / "p.json", device="cpu").graph.graph.nodes:
        value = node.meta.get("example_value")
        assert not isinstance(value, FakeTensor) or value.device.type == "cpu"
        assert node.kwargs.get("device", torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize(
    "key",
    [0, -1, slice(1, 4), (slice(None), 2), (..., 3), (..., None, slice(None, None, 2)), (1, ..., slice(-3, None))],
)
def test_fake_indexing_is_torchs_indexing(key: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.getitem, (x, key)))
    spec = TensorSpec((5, "s", ["mul", 2, "s"]), (["mul", 2, "s", "s"], ["mul", 2, "s"], 1), torch.float32, CUDA)
    module = with_fakes(fx.GraphModule({}, graph), [spec])
    value = module.graph.output_node().args[0].meta["example_value"]
    real = torch.empty(5, 7, 14)[key]
    for fake, true in ((value.shape, real.shape), (value.stride(), real.stride())):
        assert [from_dim(to_dim(d), dict.fromkeys(symbols_of(to_dim(d)), 7)) for d in fake] == list(true)


def _first_call(data: dict[str, Any], **changes: Any) -> None:
    node = next(n for n in data["nodes"] if n["op"].startswith("call"))
    node.update(changes)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda d: _first_call(d, op="call_function", target="os:system", args=["true"]), "no call_function of that"),
        (lambda d: _first_call(d, op="call_function", target="torch:load", args=["x"]), "no call_function of that"),
        (lambda d: _first_call(d, op="call_function", target="ops:aten.from_file", args=["x"]), "refused by name"),
        (lambda d: _first_call(d, op="call_function", target="ops:other.op", args=[]), "allowed namespace"),
        (lambda d: _first_call(d, op="call_method", target="__reduce__"), "no call_method of that"),
        (lambda d: _first_call(d, op="get_attr", target="x"), "no get_attr of that"),
        (lambda d: _first_call(d, args=[{"node": "nobody"}]), "damaged"),
        (lambda d: d["nodes"][0]["value"].update(shape=["__import__('os')"]), "damaged"),
        (lambda d: d.update(format="else"), "format 'else'"),
        (lambda d: d.pop("nodes"), "damaged"),
    ],
)
def test_a_file_names_nothing_outside_the_lists(damage: Callable[[dict], None], fact: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_piece(next(iter(tiny("gpt2").pieces.values())), path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=fact):
        load_piece(path)


def test_unknown_names_get_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"llama-3\.1-8b"):
        config("llama-3-8b")
    assert config("tiny-gpt2") == config("gpt2", tiny=True)


def test_building_on_meta_allocates_nothing_and_seeds_repeat() -> None:
    assert all(p.is_meta for p in build("llama-3.1-8b", device="meta").parameters())
    a, b = (build("gpt2", tiny=True, dtype=torch.float32, seed=1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_pieces_add_up_too(name: str) -> None:
    parts = whole(name, tiny=True, dtype=torch.bfloat16, device="cuda", layers=2)
    ids, positions = (t.cuda() for t in tokens(name, 11))
    assert torch.equal(run_whole(parts, run_eagerly, ids, positions), parts.model(ids, positions))


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    written = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
    }
    folder = tmp_path / "llama-3.2-1b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written))
    assert config(str(folder)) == config("llama-3.2-1b")
    older = {**written, "rope_parameters": None, "rope_scaling": rope, "rope_theta": 5e5}
    (folder / "config.json").write_text(json.dumps(older))
    assert config(str(folder), tiny=True) == config("tiny-llama-3.2-1b")


def written(**more: Any) -> str:
    """The least that a config.json says, and more."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return json.dumps({"architectures": ["MixtralForCausalLM"], "vocab_size": 256, **sizes, **more})


def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(written(max_position_embeddings=None))
    made = config(str(tmp_path))
    assert (made.experts, made.experts_per_token, made.rope_theta, made.kv_heads) == (8, 2, 1e6, 4)


def test_a_mixture_of_qwen3_has_its_own_names(tmp_path: Path) -> None:
    more = {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "num_experts": 16}
    (tmp_path / "config.json").write_text(written(**more, intermediate_size=None))
    made = config(str(tmp_path))
    assert (made.family, made.experts, made.experts_per_token, made.qk_norm) == ("mixtral", 16, 8, True)
    assert (made.intermediate, made.head_dim, made.kv_heads) == (768, 16, 4)
    tiny = config(str(tmp_path), tiny=True)
    assert tiny.experts_per_token < tiny.experts


def test_what_another_architectures_entries_are_called_says_nothing(tmp_path: Path) -> None:
    others = {"num_experts": 4, "moe_intermediate_size": 8, "norm_topk_prob": False, "decoder_sparse_step": 2}
    (tmp_path / "config.json").write_text(written(**others, architectures=["LlamaForCausalLM"]))
    made = config(str(tmp_path))
    assert (made.experts, made.intermediate) == (0, 128)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "cannot be read"),
        (written(architectures=["Qwen3MoeForCausalLM"]), "it has norm_topk_prob"),
        (
            written(architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, mlp_only_layers=[0]),
            "it has mlp_only_layers",
        ),
        ('{"architectures": ["FalconForCausalLM"]}', "its architecture is Falcon"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}', "lacks intermediate_size"),
        ("[]", "its architecture is not said"),
        (written(attention_bias=True), "it has attention_bias"),
        (written(rope_scaling={"type": "yarn", "factor": 4.0}), "scaled as 'yarn'"),
        (written(rope_scaling={"type": "llama3", "factor": 4.0}), "not all of that is said"),
    ],
)
def test_a_folder_that_is_no_model_says_so(text: str, fact: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=fact):
        config(str(tmp_path))
