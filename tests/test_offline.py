"""Without a network only what is on this machine is asked for, and the question is asked once."""

import socket
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from httpx import ConnectError
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from perce_lite import hub as offline
from perce_lite.errors import DeviceError, ModelError, PerceLiteError
from perce_lite.model import base
from perce_lite.recipe import Recipe


@pytest.fixture
def network(monkeypatch):
    """Says whether names can be looked up; counts how often one was."""
    asked: list[object] = []

    def make(there: bool, proxies: bool = False, told_offline: bool = False) -> list[object]:
        def looked_up(host, port, *args):
            asked.append((host, port))
            if not there:
                raise socket.gaierror(-2, "Name or service not known")
            return []

        monkeypatch.setattr(socket, "getaddrinfo", looked_up)
        monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy"} if proxies else {})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", told_offline)
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8443")
        return asked

    offline.reachable.cache_clear()
    yield make
    offline.reachable.cache_clear()


def test_a_hub_that_cannot_be_reached_is_asked_for_once(network, capfd):
    asked = network(there=False)
    assert offline.hub_options("someone/model") == {"local_files_only": True}
    assert offline.hub_options("someone/other") == {"local_files_only": True}
    assert asked == [("hub.example", 8443)]
    assert capfd.readouterr().err.count("No connection to hub.example") == 1


def test_a_hub_that_is_there_a_proxy_and_a_folder(network, tmp_path):
    asked = network(there=True)
    assert offline.hub_options("someone/model") == {"local_files_only": False}
    assert len(asked) == 1
    offline.reachable.cache_clear()
    network(there=False, proxies=True)
    assert offline.hub_options("someone/model") == {"local_files_only": False}, "a proxy looks names up itself"
    assert offline.hub_options(str(tmp_path)) == {"local_files_only": False}
    assert len(asked) == 1


def test_a_user_who_says_so_is_offline(network):
    asked = network(there=True, told_offline=True)
    assert offline.hub_options("someone/model") == {"local_files_only": True}
    assert asked == []


def test_a_fault_of_the_gpu_or_of_the_files_is_not_told_as_one_of_the_network(monkeypatch, tmp_path):
    recipe = Recipe.model_validate({"model": "someone/model", "data": {"path": "x.jsonl"}, "device": "cpu"})
    monkeypatch.setattr(base, "load_tokenizer", lambda recipe: None)
    monkeypatch.setattr(base, "config_of", lambda recipe: None)

    def told(error: Exception) -> tuple[type, str]:
        def fail(*args, **options):
            raise error

        monkeypatch.setattr(base, "model_class", lambda config: SimpleNamespace(from_pretrained=fail))
        with pytest.raises(PerceLiteError) as caught:
            base.load_base(recipe)
        return type(caught.value), str(caught.value)

    kind, message = told(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert kind is DeviceError
    assert "The GPU failed while someone/model was loaded: CUDA error: an illegal memory access" in message
    assert told(RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"))[0] is DeviceError
    for error in (
        RuntimeError("size mismatch for q_proj"),
        ValueError("Failed to connect a mxfp4 kernel"),
        OSError("x"),
    ):
        kind, message = told(error)
        assert kind is ModelError
        assert "was found, but cannot be loaded here" in message
        assert "Offline" not in message
    for cause in (LocalEntryNotFoundError("no"), ConnectError("no route")):
        wrapped = OSError("We could not connect")
        wrapped.__cause__ = cause
        assert "nor could it be loaded from the Hub" in told(wrapped)[1]
