"""The head over scored positions: bit by bit TRL's, for every family, with mixtures, adapters and gradients."""

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from perce_lite.data.pairs import IGNORED
from perce_lite.model import fused_head
from perce_lite.model.fused_head import (
    base_of,
    project_scored_positions_only,
    scoring_forward,
    training_forward,
    without_needless_mask,
)

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

OTHERS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, output_router_logits=True),
    "granite": dict(logits_scaling=8.0),
    "cohere": dict(logit_scale=0.0625),
    "gemma3_text": dict(sliding_window=4, query_pre_attn_scalar=16),
}


def model_of(family: str, dtype=torch.float32):
    """A toy of the tests, or of another family that scales its logits or mixes experts."""
    if family not in OTHERS:
        return toys.toy_model(family, toys.VOCAB_SIZE, dtype=dtype)
    config = AutoConfig.for_model(
        family, vocab_size=toys.VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, **OTHERS[family],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


FAMILIES = ["chatml", "llama3", "gemma", "qwen3", "mixtral", "qwen3_moe", "granite", "cohere"]


def batch_of(empty: bool = False):
    """Two rows of which some positions are scored, padding at the end of one."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, toys.VOCAB_SIZE, (2, 12), generator=generator)
    labels = torch.full_like(ids, IGNORED)
    if not empty:
        labels[0, 5:9], labels[1, 0:2], labels[1, 8:10] = ids[0, 5:9], ids[1, 0:2], ids[1, 8:10]
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class StandIn:
    """What TRL's own fused forward takes for the model: a backbone whose output is cut to the scored positions.

    TRL's code then computes everything behind the backbone: the reference.
    """

    def __init__(self, model):
        self.model = model

    def base_model(self, *args, scored, **inputs):
        outputs = self.model.base_model(*args, **inputs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][scored][None]
        return outputs

    def __getattr__(self, name):
        return getattr(self.model, name)


def by_trl(model, batch, fields=("log_probs",), **options):
    """TRL's output for the scored positions, (1, N)."""
    base = base_of(model)
    own = base.__dict__.get("forward")
    add_fused_lm_head(base, outputs=fields, **options)
    forward = base.__dict__.pop("forward").__func__
    if own is not None:
        base.forward = own
    labels = batch["labels"]
    scored = labels[:, 1:] != IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return forward(StandIn(base), scored=scored, shift_labels=labels[:, 1:][scored][None], fused_lm_head=True, **inputs)


def adapted(model):
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_trls_forward(family, dtype):
    model = adapted(model_of(family, dtype))
    for make, float32_head in ((scoring_forward, True), (training_forward, False)):
        forward = make(model)
        assert "forward" not in base_of(model).__dict__, "the model's own forward is not touched"
        ours = forward(**batch_of())
        theirs = by_trl(model, batch_of(), cast_lm_head_to_fp32=float32_head).log_probs[0]
        assert ours.dtype == theirs.dtype == torch.float32
        assert ours.shape == (7,)
        assert torch.equal(ours, theirs)
        ours, theirs = gradients(model, -ours.sum()), gradients(model, -theirs.sum())
        assert len(ours) == 12
        assert any(gradient.abs().max() > 0 for gradient in ours)
        assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_output_is_that_of_trls_forward(family, autocast):
    """Every field, the loss and the router's; laid out as TRL lays it out, zero where nothing is scored."""
    model = adapted(model_of(family))
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        add_fused_lm_head(base_of(model), outputs=PER_TOKEN)
        every_position = model(**batch, fused_lm_head=True)
        theirs = by_trl(model, batch, PER_TOKEN)
        project_scored_positions_only(model)
        ours = model(**batch, fused_lm_head=True)
    mask = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(ours.label_mask, mask)
    for name in PER_TOKEN:
        assert torch.equal(ours[name][mask], theirs[name][0]), name
        assert not ours[name][~mask].any(), name
        assert ours[name].dtype == every_position[name].dtype
        torch.testing.assert_close(ours[name].float(), every_position[name].float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.loss, theirs.loss)
    assert (ours.aux_loss is None) == (theirs.aux_loss is None) == (family not in ("mixtral", "qwen3_moe"))
    if ours.aux_loss is not None:
        assert torch.equal(ours.aux_loss, theirs.aux_loss)
    pairs = zip(gradients(model, ours.loss), gradients(model, theirs.loss), strict=True)
    assert all(torch.equal(*both) for both in pairs)


def test_the_loss_is_divided_by_the_tokens_of_the_window_as_trls():
    model = adapted(model_of("mixtral"))
    add_fused_lm_head(base_of(model))
    theirs = model(**batch_of(), fused_lm_head=True, num_items_in_batch=13).loss
    project_scored_positions_only(model)
    torch.testing.assert_close(model(**batch_of(), fused_lm_head=True, num_items_in_batch=13).loss, theirs)


def test_a_batch_in_which_nothing_is_scored_gives_a_zero_with_a_gradient():
    model = adapted(model_of("chatml"))
    add_fused_lm_head(base_of(model))
    project_scored_positions_only(model)
    output = model(**batch_of(empty=True), fused_lm_head=True)
    assert output.loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(model, output.loss))


def test_without_the_fused_head_the_models_own_forward_answers():
    model = adapted(model_of("chatml"))
    plain = model(**batch_of())
    add_fused_lm_head(base_of(model))
    project_scored_positions_only(model)
    assert torch.equal(model(**batch_of()).logits, plain.logits)
    assert torch.equal(model(**batch_of()).loss, plain.loss)


def test_where_trl_projects_scored_positions_alone_its_forward_stays(monkeypatch):
    """As on a GPU with Triton; without Triton, on a GPU too, ours takes its place."""
    asked = []
    monkeypatch.setattr(
        fused_head, "head_projects_scored_positions_only", lambda device: (asked.append(device.type), True)[1]
    )
    model = model_of("chatml")
    add_fused_lm_head(model)
    forward = model.forward
    project_scored_positions_only(model)
    assert model.forward == forward
    assert asked == ["cpu"]


@pytest.mark.parametrize("family", ["chatml", "gemma", "qwen3", "granite", "cohere", "gemma3_text"])
def test_rows_padded_on_the_right_need_no_mask(family):
    """`gemma3_text` with a sliding window shorter than the rows."""
    model, batch = model_of(family), batch_of()
    without = without_needless_mask(model, batch)
    assert set(batch) - set(without) == {"attention_mask"}
    real = batch["attention_mask"].bool()
    hidden = [model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[real]]
    hidden.append(
        model.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state[real]
    )
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-6)
    ours, theirs = (gradients(model, training_forward(model)(**inputs).sum()) for inputs in (without, batch))
    assert len(ours) == len(theirs) > 10
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "option"),
    [("mixtral", {}), ("chatml", {"use_bidirectional_attention": True}), ("chatml", {"layer_types": ["linear"]})],
)
def test_a_mask_that_is_needed_stays(family, option):
    model = model_of(family)
    vars(model.config).update(option)
    assert "attention_mask" in without_needless_mask(model, batch_of())
