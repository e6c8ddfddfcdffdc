"""That the imitation sees: each fault planted here would end a training on a GPU, and passes on a CPU."""

import contextlib

import pytest
import torch

from imitated_card.runs import toy_recipe, train
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.evaluation.bench.imitation.tensors import CUDA, DeviceMismatchError
from perce_lite.model import scoring
from perce_lite.model.host_embedding import HostEmbedding
from perce_lite.model.prefix_cache import BatchPrefixes
from perce_lite.training import trainer as trainer_module
from perce_lite.training.trainer import PerCETrainer

MISMATCH, NUMPY, SCALER = (
    "Expected all tensors to be on the same device",
    "can't convert cuda:0",
    "unscale FP16 gradients",
)


def batch_on_the_host(patch):
    padded = scoring.padded
    patch.setattr(scoring, "padded", lambda rows, pad_id, device: padded(rows, pad_id, torch.device("cpu")))


def prefix_mask_on_the_host(patch):
    init = BatchPrefixes.__init__
    patch.setattr(
        BatchPrefixes,
        "__init__",
        lambda self, caches, counts, length, device: init(self, caches, counts, length, "cpu"),
    )


def zeros_without_a_device(patch):
    patch.setattr(PerCETrainer, "_without_profile", lambda self, twin, labels: torch.zeros(labels[:, 1:].shape))


def lookup_stays_on_the_host(patch):
    patch.setattr(HostEmbedding, "forward", lambda self, ids: self.table(ids.to("cpu")))


def ids_stay_on_the_card(patch):
    patch.setattr(HostEmbedding, "forward", lambda self, ids: self.table(ids).to(ids.device))


def figures_by_numpy(patch):
    patch.setattr(trainer_module, "weight_statistics", lambda pir, *weighting: {"mean": float(pir.numpy().mean())})


def half_precision_adapters(patch):
    init = PerCETrainer.__init__

    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float16)

    patch.setattr(PerCETrainer, "__init__", made)


FAULTS = {
    batch_on_the_host: ([], MISMATCH),
    prefix_mask_on_the_host: (["train.profile_pass=frozen"], MISMATCH),
    zeros_without_a_device: (["train.estimator=bootstrap"], MISMATCH),
    lookup_stays_on_the_host: (["embedding_on_host=true"], MISMATCH),
    ids_stay_on_the_card: (["embedding_on_host=true"], MISMATCH),
    figures_by_numpy: ([], NUMPY),
    half_precision_adapters: (["dtype=float16"], SCALER),
}
"""What is planted, the overrides with which it is met, and what a GPU would say."""


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_seen(tmp_path, monkeypatch, plant):
    more, words = FAULTS[plant]
    recipe = toy_recipe(tmp_path, "llama3", ["train.max_steps=1", *more])
    plant(monkeypatch)
    with imitated(), pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        train(recipe)


def test_arithmetic_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    torch.tanh(inputs @ weight).sum().backward()
    with imitated():
        on_card = weight.detach().to("cuda").requires_grad_()
        out = torch.tanh(inputs.to("cuda") @ on_card).sum()
        out.backward()
        assert (out.device, on_card.grad.device) == (CUDA, CUDA)
        assert torch.equal(on_card.grad.cpu(), weight.grad)


def test_live_bytes_peak_and_a_full_card():
    with imitated(memory=2**20) as card:
        held = torch.zeros(100, device="cuda")
        assert card.allocated == 512  # 400 bytes, rounded as torch does
        view = held[10:]
        del held
        assert card.allocated == 512
        del view
        assert (card.allocated, card.peak) == (0, 512)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 4\.00 MiB"):
            torch.zeros(2**20, device="cuda")
        assert card.allocated == 0


def test_what_makes_the_host_wait_is_counted():
    with imitated() as card:
        values = torch.arange(4, device="cuda")
        assert card.counts["synchronisations"] == 0
        assert values.sum().item() == 6
        assert values.tolist() == [0, 1, 2, 3]
        assert values[values > 1].cpu().tolist() == [2, 3]
        assert card.counts["synchronisations"] == 4
        assert all("test_imitation.py" in place for place in card.places)


def test_shapes_alone_take_no_memory_and_keep_masks():
    with imitated(shapes=True) as card:
        weight = torch.randn(2**14, 2**16, device="cuda", dtype=torch.bfloat16)
        assert card.allocated == weight.nbytes == 2**31
        mask = torch.arange(2**14, device="cuda") % 2 == 0
        assert weight[mask].shape == (2**13, 2**16)


def test_memory_that_nobody_wrote_to_shows():
    with imitated():
        assert torch.empty(4, device="cuda").isnan().all()
        assert torch.empty_like(torch.zeros(4, device="cuda")).isnan().all()


def test_nothing_of_a_card_of_shapes_reaches_the_next():
    with imitated(shapes=True):
        of_shapes = torch.ones(4, device="cuda")
    with imitated(), pytest.raises(DeviceMismatchError, match="of another card"):
        of_shapes + 1


def test_the_attention_kernel_is_the_one_that_torch_takes():
    attention = torch.nn.functional.scaled_dot_product_attention
    chosen = []
    for capability, heads, masked in (((8, 6), 4, False), ((8, 6), 4, True), ((7, 5), 4, False), ((7, 5), 2, False)):
        with imitated(capability=capability) as card, torch.no_grad():
            query, key = (torch.zeros(1, count, 8, 16, device="cuda", dtype=torch.float16) for count in (4, heads))
            mask = torch.ones(8, 8, dtype=torch.bool, device="cuda") if masked else None
            attention(query, key, key, attn_mask=mask, is_causal=not masked, enable_gqa=heads != 4)
        chosen += card.attention_kernels()
    assert chosen == ["flash", "memory-efficient with a mask", "memory-efficient", "plain mathematics"]


def test_nothing_is_left_behind():
    before = torch.Tensor.to, torch.empty, torch.cuda.is_available
    with contextlib.suppress(DeviceMismatchError), imitated():
        _ = torch.zeros(2, device="cuda") + torch.zeros(2)
    assert (torch.Tensor.to, torch.empty, torch.cuda.is_available) == before
    assert not torch.cuda.is_available()
