"""What the server adds to `generate`: time to the first token and tokens a second, adapter in memory and on disk."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from transformers.generation import BaseStreamer

from perce_lite.model.answering import Answerer, Stop
from perce_lite.serve.server import Server, Settings, make_server, running

QUESTION = "Write a short note about the first snow of the winter."
TOKENS = 48

Times = list[float]
"""Seconds from the question to each piece of its answer."""


class _Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.started, self.times = time.monotonic(), Times()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic() - self.started)

    def end(self) -> None:
        """Nothing is held back."""


def serve_bench(adapter: Path, repeats: int) -> dict[str, Any]:
    """Measures one question without a profile, answered greedily by the adapter in `adapter`, `repeats` times each.

    The ways take turns, so that a slower minute of the machine meets all of them. An answer ends where the adapter ends
    it, after `TOKENS` tokens at the most.
    """
    times: dict[str, list[Times]] = {"generate": [], "served, in memory": [], "served, from disk": []}
    with running(make_server(adapter, None, Settings(port=0))) as server:
        answers = server.service.answers
        metadata = answers.directory.reference
        _served(server)  # what is made at first use is made
        for _ in range(repeats):
            answerer = answers.pool.take(metadata)
            times["generate"].append(_generated(Answerer(answerer.opened)))
            answerer.forget()  # the last prompt, which is the same
            times["served, in memory"].append(_served(server))
            answers.pool.drop_all()
            times["served, from disk"].append(_served(server))
    return {
        "adapter": str(adapter),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "ways": {name: _summary(runs) for name, runs in times.items()},
    }


def _summary(runs: Sequence[Times]) -> dict[str, float]:
    """Medians over the runs: seconds to the first token, tokens a second after it."""

    def median(of: Callable[[Times], float]) -> float:
        return statistics.median(map(of, runs))

    rate = median(lambda times: (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0)
    return {"first_token_s": median(lambda times: times[0]), "tokens_per_s": rate}


def _generated(answerer: Answerer) -> Times:
    """The times of `generate`'s tokens; the prompt, which a streamer is given first, is none."""
    clock = _Clock()
    messages = [{"role": "user", "content": QUESTION}]
    answerer.answer(messages, "", True, TOKENS, Stop(), clock)
    return clock.times[1:]


def _served(server: Server) -> Times:
    """The times of the pieces of a stream."""
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "adapter", "messages": messages, "max_tokens": TOKENS, "stream": True}
    kind = {"Content-Type": "application/json"}
    started, times = time.monotonic(), Times()
    with urlopen(Request(f"{server.url}v1/chat/completions", json.dumps(body).encode(), kind)) as events:
        for line in events:
            if b'"content": "' in line and b'"role"' not in line:
                times.append(time.monotonic() - started)
    return times
