"""One vLLM engine in this process: its log-probabilities of given tokens, or its times, as JSON. Run by `vllm_lab.py`.

    python tools/vllm_engine.py '{"model": DIR, "contender": "eager", "given": {}, "tokens": FILE, "out": FILE}'
    python tools/vllm_engine.py '{"model": DIR, "contender": "terrazzo", "given": {}, "kv_gib": 8, "answers": 5}'

`given` is what vLLM's `LLM` gets besides, or instead, but for what makes a contender what it is: fp32, no compilation,
kinds of graphs, the tokens it has to emit.

The second says in how many seconds it started, in a line of JSON to the open file number 5, and then answers lines that
it reads: `{"time": "8"}` with the milliseconds of a decode step of 8 requests, `{"time": "prefill2048"}`, `{"time":
"loop"}` with those of a loop of Python that has nothing to do with vLLM, and `"busy"` instead of `"time"` with the
microseconds that the GPU is busy: while any kernel runs, so that one that starts before the one before it has ended is
not counted twice, as it is in a sum of durations. `{"cores": [0, 1]}` moves the process and its children there.

For log-probabilities, weights are drawn here, the same for every engine: vLLM's own dummies are so small that every
token is as likely as every other. The engine named `eager` decodes greedily and leaves its tokens in the file `tokens`;
the others wait for it and are made to emit the same, so that at every step all see the same context. The engine named
`fp32` has the same weights in fp32 and compiles nothing: it stands for the exact result. Prompts of 5 to 700 tokens
come at once, and a step takes at most 1024: prefill and decode mix.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from terrazzo.lowering.errors import UserError
from terrazzo.tools.vllm_turns import LOOP, PREFILL

NEW_TOKENS = 64
PROMPTS = (5, 11, 16, 23, 32, 57, 64, 100, 128, 199, 256, 333, 400, 512, 611, 700)
WAIT_S = 300
# Prefills and loops of one answer, of which it is the median.
PREFILLS, LOOPS = 3, 5
# Tokens of a prompt before decode steps, and how many more of them the longer of two runs decodes than the shorter: for
# a time, and where every kernel is recorded.
PROMPT, STEPS, RECORDED_STEPS = 32, 48, 16


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Starts the engine, fills its weights, decodes.

    Returns:
        seconds to start, the log lines of terrazzo, tokens, and per prompt and step: the token's log-probability and
        the likeliest token.
    """
    said: list[str] = []
    start = time.perf_counter()
    with _listening(said):
        engine = _engine(asked)
        seconds = time.perf_counter() - start
        engine.apply_model(fill)
        forced = None if asked["contender"] == "eager" else _wait_for(Path(asked["tokens"]))
        results = _decode(engine, forced)
    if forced is None:
        part = Path(asked["tokens"] + ".part")
        part.write_text(json.dumps([r["tokens"] for r in results]))
        part.rename(asked["tokens"])
    return {"start_s": seconds, "said": said, "results": results}


def serve(asked: dict[str, Any], orders: Iterable[str], answers: TextIO) -> None:
    """Starts the engine and answers orders, which the header names, as long as they come."""
    import vllm  # noqa: F401  what takes seconds and is no part of the start

    start = time.perf_counter()
    engine = _served(asked)
    print(json.dumps({"init_s": time.perf_counter() - start}), file=answers, flush=True)
    for line in orders:
        print(json.dumps(_answer(engine, json.loads(line))), file=answers, flush=True)


def _answer(engine: Any, order: dict[str, Any]) -> float | None:
    if "cores" in order:
        _move(order["cores"])
        return None
    return _time_ms(engine, order["time"]) if "time" in order else _busy_us(engine, order["busy"])


def _move(cores: list[int]) -> None:
    """This process and its children to these cores, threads that exist included."""
    import psutil  # vLLM needs it

    here = psutil.Process()
    # Twice: a thread that one not moved yet makes meanwhile is where that one was.
    for process in (here, *here.children(recursive=True)) * 2:
        # Processes and threads may have ended meanwhile.
        with suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


def _engine(asked: dict[str, Any]) -> Any:
    from vllm import LLM

    options = _options(
        asked,
        max_model_len=2048,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
        async_scheduling=False,
        kv_cache_memory_bytes=4 << 30,
    )
    # What makes it this contender.
    options["logits_processors"] = ["terrazzo.tools.vllm_forcing:Forcing"]
    if asked["contender"] in ("eager", "fp32"):
        options["enforce_eager"] = True
    if asked["contender"] == "fp32":
        options["dtype"] = "float32"
    if asked.get("graphs"):
        options["compilation_config"] = options.get("compilation_config", {}) | {"cudagraph_mode": asked["graphs"]}
    return LLM(**options)


def _served(asked: dict[str, Any]) -> Any:
    """An engine as the lab's benchmark makes it, so that it finds what that one compiled. Its cache is of a given size,
    so it asks for little free memory otherwise, and two engines fit."""
    from vllm import LLM

    cache = int(asked["kv_gib"]) << 30
    return LLM(**_options(asked, max_model_len=4096, kv_cache_memory_bytes=cache, disable_log_stats=True))


def _options(asked: dict[str, Any], **own: Any) -> dict[str, Any]:
    """What both kinds of engines get, what is an engine's own, and what is given."""
    both = {
        "model": asked["model"],
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.05,
        "seed": 0,
    }
    return both | own | asked["given"]


def _time_ms(engine: Any, what: str) -> float:
    """Milliseconds of a decode step of so many requests, of a prefill of 2048 tokens, or of the loop."""
    if what == LOOP:
        return statistics.median(_ms(_loop) for _ in range(LOOPS))
    if what == PREFILL:
        run = _requests(engine, 1, 2048, 1)
        run()
        return statistics.median(_ms(run) for _ in range(PREFILLS))
    return _per_step(lambda new: _ms(_requests(engine, int(what), PROMPT, new)), STEPS)


def _loop() -> None:
    """What the host is measured by: Python that allocates nothing."""
    at = 0
    while at < 200_000:
        at += 1


def _busy_us(engine: Any, what: str) -> float:
    """For how many microseconds of the same the GPU is busy; not a number where other processes keep it so."""
    if engine.llm_engine.vllm_config.parallel_config.world_size > 1:
        return float("nan")
    if what == PREFILL:
        return _recorded(_requests(engine, 1, 2048, 1))
    return _per_step(lambda new: _recorded(_requests(engine, int(what), PROMPT, new)), RECORDED_STEPS)


def _per_step(cost: Callable[[int], float], steps: int) -> float:
    """What a decode step costs: of two lengths the difference is decode steps alone."""
    short = 3
    few, many = cost(short), cost(short + steps)
    return (many - few) / steps


def _ms(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _requests(engine: Any, batch: int, prompt: int, new: int) -> Callable[[], None]:
    """What serves so many requests, other ones each time, and returns once the GPU is done."""
    from vllm import SamplingParams

    vocab = engine.llm_engine.vllm_config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(1)
    settings = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)

    def run() -> None:
        prompts = [torch.randint(10, vocab - 10, (prompt,), generator=generator).tolist() for _ in range(batch)]
        engine.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
        torch.cuda.synchronize()

    return run


def _recorded(run: Callable[[], None]) -> float:
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as made:
        run()
    events = [e for e in made.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return busy_us((e.time_range.start, e.time_range.end) for e in events)


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@torch.inference_mode()
def fill(model: torch.nn.Module) -> None:
    """Weights that keep activations near one in size, by the parameters' order; bf16 numbers in any dtype. Eight-bit
    ones are as large as they can be told apart, and their scales, of products with some thousand terms, as small."""
    for index, (name, weight) in enumerate(model.named_parameters()):
        if "scale" in name:
            weight.data.fill_(2.0**-12)
            continue
        generator = torch.Generator(weight.device).manual_seed(index)
        if weight.dim() == 1:
            values = torch.rand(weight.shape, generator=generator, device=weight.device) + 0.5
            weight.data.copy_((values if "norm" in name else values - 1.0).bfloat16())
            continue
        # Experts one by one: the random numbers of a bank of them would be larger than the bank.
        for part in weight.data if weight.dim() == 3 else [weight.data]:
            scale = (2.0 if "embed" in name or "head" in name else 1.0) * part.shape[-1] ** -0.5
            if part.dtype.itemsize == 1:
                scale = 64.0
            part.copy_(torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.bfloat16) * scale)


def _wait_for(path: Path) -> list[list[int]]:
    end = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > end:
            raise UserError("the engine", f"no tokens came in {WAIT_S} s", stage="tools", remedy=f"Look for {path}.")
        time.sleep(0.2)
    return json.loads(path.read_text())


def _decode(engine: Any, forced: list[list[int]] | None) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    vocab = engine.llm_engine.vllm_config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, vocab - 10, (n,), generator=generator).tolist() for n in PROMPTS]
    settings = [
        SamplingParams(
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
            extra_args={"forced": tokens},
        )
        for tokens in forced or [[]] * len(prompts)
    ]
    made = engine.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    found = []
    for output in (o.outputs[0] for o in made):
        steps = list(zip(output.token_ids, output.logprobs, strict=True))
        likeliest = [max((k.logprob, token) for token, k in known.items())[1] for _, known in steps]
        logprobs = [known[token].logprob for token, known in steps]
        found.append({"tokens": list(output.token_ids), "logprobs": logprobs, "likeliest": likeliest})
    return found


@contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """Inside, what vLLM and terrazzo log about compiling is kept."""

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            if any(word in line for word in ("terrazzo", "ompil", "raph capturing", "init engine")):
                said.append(line[:400])

    handler, loggers = Keeping(), [logging.getLogger(name) for name in ("vllm", "terrazzo")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


if __name__ == "__main__":
    # In this process, so that log lines are heard, where one GPU serves; before vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    order = json.loads(sys.argv[1])
    if "answers" in order:
        with os.fdopen(order["answers"], "w") as answers:
            serve(order, sys.stdin, answers)
    else:
        # To draw weights. It is part of the key of what vLLM compiled, and the benchmark does without.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        found = main(order)
        part = Path(order["out"] + ".part")
        part.write_text(json.dumps(found))
        part.rename(order["out"])
    sys.stdout.flush()
    # vLLM's threads may hold the process at its end.
    os._exit(0)
