"""The plugin stays out unless it is named, and the platform settles a configuration or hands it back to vLLM."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest

from terrazzo.runtime import vllm_compat, vllm_platform, vllm_plugin
from terrazzo.runtime.vllm_platform import COMPILER, DISPATCHER, compiles, settle

PLATFORM = "terrazzo.runtime.vllm_platform.Platform"


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What was said, in a process in which nothing was said before."""
    monkeypatch.setattr(vllm_compat, "_said", set())
    monkeypatch.delenv("VLLM_USE_MEGA_AOT_ARTIFACT", raising=False)
    caplog.set_level(logging.INFO)
    return caplog


def vllm_with(monkeypatch, **hooks):
    """A vLLM whose CUDA platform has these hooks; its parts are as the real ones name them."""

    class Base:
        @classmethod
        def check_and_update_config(cls, vllm_config):
            vllm_config.checked = True

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config):
            return ["vllm_c", "native"]

    if hooks.pop("early", True):
        Base.apply_config_platform_defaults = classmethod(lambda cls, vllm_config: setattr(vllm_config, "seen", True))
    for name, value in hooks.items():
        setattr(Base, name, classmethod(lambda cls, value=value: value))
    priority = SimpleNamespace(with_default=lambda order: order)
    modules = {
        "vllm": {},
        "vllm.platforms": {"builtin_platform_plugins": {"cuda": lambda: "vllm.platforms.cuda.CudaPlatform"}},
        "vllm.platforms.cuda": {"CudaPlatform": Base},
        "vllm.config": {},
        "vllm.config.kernel": {"IrOpPriorityConfig": priority},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(vars(vllm_platform), "Platform", raising=False)


def platform_with(monkeypatch, **hooks):
    """terrazzo's platform over such a vLLM's."""
    vllm_with(monkeypatch, **hooks)
    return vllm_platform.Platform


def config(**given):
    """A configuration as vLLM 0.22.1 shows it to its platform."""
    passes = SimpleNamespace(enable_sp=False, fuse_gemm_comms=False)
    values = {"backend": COMPILER, "mode": 3, "custom_ops": [], "ir_enable_torch_wrap": None, "pass_config": passes}
    values |= {"use_inductor_graph_partition": None} | {k: v for k, v in given.items() if k != "lora_config"}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(**values), optimization_level=2, lora_config=given.get("lora_config")
    )


def test_vllm_finds_the_plugin():
    found = {point.name: point for point in entry_points(group="vllm.platform_plugins")}
    assert found["terrazzo"].load() is vllm_plugin.register


@pytest.mark.parametrize("plugins", [None, "", "other", "terrazzo2,other"])
def test_it_stays_out_unless_it_is_named(monkeypatch, plugins, said):
    vllm_with(monkeypatch)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert vllm_plugin.register() is None
    assert not said.messages


@pytest.mark.parametrize("plugins", ["terrazzo", "other, terrazzo"])
def test_named_it_takes_the_cuda_platforms_place(monkeypatch, plugins):
    vllm_with(monkeypatch)
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert vllm_plugin.register() == PLATFORM


def test_without_a_cuda_device_it_stays_out_and_says_so_once(monkeypatch, said):
    vllm_with(monkeypatch)
    sys.modules["vllm.platforms"].builtin_platform_plugins["cuda"] = lambda: None
    monkeypatch.setenv("VLLM_PLUGINS", "terrazzo")
    assert vllm_plugin.register() is vllm_plugin.register() is None
    assert len(said.messages) == 1 and "no CUDA device" in said.messages[0]


def test_importing_the_plugin_imports_nothing_heavy():
    heavy = "{'torch', 'triton', 'vllm', 'sympy'}"
    code = f"import sys, terrazzo.runtime.vllm_plugin; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_generations_find_their_hook(monkeypatch, said):
    platform = platform_with(monkeypatch, get_piecewise_backend_cls="vllm.Own")
    assert platform.get_piecewise_backend_cls() == DISPATCHER
    assert platform.get_compile_backend() == COMPILER
    assert f"{platform.__module__}.{platform.__qualname__}" == PLATFORM
    assert not said.messages


def test_a_vllm_without_either_hook_is_told(monkeypatch, said):
    platform_with(monkeypatch)
    assert ["lets no platform bring a compiler" in m for m in said.messages] == [True]


def test_pieces_stay_fusable(monkeypatch, said):
    platform, ours = platform_with(monkeypatch, get_compile_backend="inductor"), config(mode=None)
    platform.apply_config_platform_defaults(ours)
    assert ours.seen
    assert ours.compilation_config.custom_ops == ["none"]
    assert ours.compilation_config.ir_enable_torch_wrap is True
    assert platform.get_default_ir_op_priority(ours) == ["native"]
    assert os.environ.pop("VLLM_USE_MEGA_AOT_ARTIFACT") == "0"
    assert not said.messages


def test_what_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", "1")
    ours = config(custom_ops=["all", "-rms_norm"], ir_enable_torch_wrap=False)
    settle(ours)
    assert ours.compilation_config.custom_ops == ["all", "-rms_norm"]
    assert ours.compilation_config.ir_enable_torch_wrap is False
    assert os.environ["VLLM_USE_MEGA_AOT_ARTIFACT"] == "1"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"backend": "inductor"}, "compilation_config.backend is 'inductor'"),
        ({"lora_config": object()}, "LoRA"),
        ({"mode": 1}, "mode 1"),
        ({"mode": 0}, "compilation is off"),
    ],
)
def test_what_it_does_not_compile_is_left_to_vllm_with_one_line(monkeypatch, said, given, line):
    platform, theirs = platform_with(monkeypatch, get_compile_backend="inductor"), config(**given)
    for _ in range(2):
        platform.apply_config_platform_defaults(theirs)
    assert theirs.compilation_config.custom_ops == []
    assert theirs.compilation_config.ir_enable_torch_wrap is None
    assert not compiles(theirs)
    assert platform.get_default_ir_op_priority(theirs) == ["vllm_c", "native"]
    assert line in said.messages[0]
    # Handed back to Inductor, vLLM's second look finds that backend chosen.
    assert len(said.messages) <= 2


@pytest.mark.parametrize("switch", ["use_inductor_graph_partition", "enable_sp", "fuse_gemm_comms"])
def test_passes_of_inductor_are_turned_off_with_one_line(said, switch):
    ours = config()
    holder = ours.compilation_config if switch.startswith("use_") else ours.compilation_config.pass_config
    setattr(holder, switch, True)
    settle(ours)
    settle(ours)
    assert getattr(holder, switch) is False
    assert ours.compilation_config.custom_ops == ["none"]
    assert [switch in m for m in said.messages] == [True]


def test_a_vllm_that_asks_late_gets_native_layers(monkeypatch, said):
    platform = platform_with(monkeypatch, get_compile_backend="inductor", early=False)
    ours = config(custom_ops=["all", "-rms_norm"], use_inductor_graph_partition=False)
    for _ in range(2):
        platform.check_and_update_config(ours)
    assert ours.checked and ours.compilation_config.custom_ops == ["none", "-rms_norm"]
    assert not said.messages


@pytest.mark.parametrize("given", [{"use_inductor_graph_partition": True}, {"lora_config": object()}, {"mode": 0}])
def test_what_cannot_be_settled_late_is_left_to_vllm(monkeypatch, said, given):
    platform = platform_with(monkeypatch, get_compile_backend="inductor", early=False)
    theirs = config(custom_ops=["all"], **given)
    platform.check_and_update_config(theirs)
    assert theirs.compilation_config.custom_ops == ["all"]
    assert theirs.compilation_config.backend == (COMPILER if "mode" in given else "inductor")
    assert len(said.messages) == 1


@pytest.mark.parametrize(("inductor", "custom_ops"), [(False, ["none"]), (True, [])])
def test_the_old_protocol_gets_native_layers_where_vllm_would_not(monkeypatch, said, inductor, custom_ops):
    platform = platform_with(monkeypatch, get_piecewise_backend_cls="vllm.Own")
    passes = SimpleNamespace(enable_sequence_parallelism=False)
    compilation = SimpleNamespace(use_inductor=inductor, custom_ops=[], pass_config=passes)
    old = SimpleNamespace(compilation_config=compilation, lora_config=None)
    platform.check_and_update_config(old)
    assert old.checked and compilation.custom_ops == custom_ops
    assert platform.get_piecewise_backend_cls() == DISPATCHER
    assert not said.messages


@pytest.mark.parametrize("what", ["lora_config", "enable_sequence_parallelism"])
def test_the_old_protocol_leaves_the_pieces_to_vllms_own_class(monkeypatch, said, what):
    platform = platform_with(monkeypatch, get_piecewise_backend_cls="vllm.Own")
    passes = SimpleNamespace(enable_sequence_parallelism=what == "enable_sequence_parallelism")
    compilation = SimpleNamespace(use_inductor=False, custom_ops=[], pass_config=passes)
    lora = object() if what == "lora_config" else None
    platform.check_and_update_config(SimpleNamespace(compilation_config=compilation, lora_config=lora))
    assert platform.get_piecewise_backend_cls() == "vllm.Own"
    assert compilation.custom_ops == []
    assert len(said.messages) == 1
