"""The embedding table on the host: the same numbers, and nothing of it where the model's weights are."""

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import perce_lite
from perce_lite.errors import ModelError
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.model.base import load_base
from perce_lite.model.fingerprint import fingerprint, sketch
from perce_lite.model.host_embedding import HostEmbedding, keep_on_host
from perce_lite.model.scoring import compute_log_probs, store_key
from perce_lite.recipe import Recipe, load_recipe

pytest_plugins = ["cli_fixtures"]


def untied(**options):
    """A toy whose head has weights of its own."""
    return toys.toy_model("llama3", toys.VOCAB_SIZE, **options)


def kept(**options):
    model = untied(**options)
    keep_on_host(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_gradients_and_text_are_bit_identical(dtype):
    ids = torch.arange(40).view(2, 20)
    results = []
    for model in (untied(dtype=dtype), kept(dtype=dtype)):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        adapted.enable_input_require_grads()  # as training with checkpointing does
        logits = adapted(input_ids=ids).logits
        logits.float().log_softmax(-1)[..., 0].sum().backward()
        text = adapted.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        grads = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
        assert len(grads) == 28
        results.append([logits, text, *grads])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_the_table_is_in_nobodys_reach():
    model, plain = kept(), untied()
    missing = set(plain.state_dict()) - set(model.state_dict())
    assert missing == {"model.embed_tokens.weight"}
    table = plain.get_input_embeddings().weight
    numel = sum(parameter.numel() for parameter in plain.parameters()) - sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert numel == table.numel()
    model.to(torch.float16)
    model.to("meta")
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert next(model.parameters()).device.type == "meta"


def test_ids_are_looked_up_on_the_host_and_the_rows_go_back_to_their_device():
    looked_up = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.embedding.default:
                looked_up.append(out.device.type)
            return out

    table = HostEmbedding(torch.nn.Embedding(10, 4).requires_grad_(False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 3, dtype=torch.long, device="cuda")
        with Watch():
            rows = table(ids)
    assert (rows.device.type, tuple(rows.shape), looked_up) == ("cuda", (2, 3, 4), ["cpu"])


def test_fingerprint_and_sketch_are_those_of_the_same_weights():
    model, plain = kept(), untied()
    assert fingerprint(model) == fingerprint(plain)
    assert sketch(model) == sketch(plain)
    assert store_key(model, None) == store_key(plain, None)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert fingerprint(adapted) == fingerprint(plain)
    other = kept(seed=1)
    for name, parameter in other.named_parameters():
        parameter.data = plain.get_parameter(name).data  # another table and nothing else
    assert fingerprint(other) != fingerprint(plain)


def test_scores_are_bit_identical(toy_trainer):
    scored = []
    for model in (untied(), kept()):
        trainer = toy_trainer("llama3", model=model, rows=toys.toy_rows(1, 4))
        sequences = [pair.factual for pair in trainer.pairs["train"]]
        scores: dict[int, torch.Tensor] = {}
        compute_log_probs(trainer.model, sequences, False, None, scores.__setitem__)
        scored.append(scores)
    assert all(torch.equal(scored[0][index], scored[1][index]) for index in range(len(scored[0])))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_bit_identical(toy_trainer, checkpointing):
    losses = []
    for model in (untied(), kept()):
        trainer = toy_trainer("llama3", model=model, gradient_checkpointing=checkpointing, rows=toys.toy_rows(1, 4))
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_tied_head_is_refused_with_the_reason():
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    with pytest.raises(ModelError, match=r"head .* is its embedding table \(tied\).*nothing would be saved"):
        keep_on_host(model)
    assert not isinstance(model.get_input_embeddings(), HostEmbedding)


def test_a_table_that_is_to_be_trained_is_refused():
    with pytest.raises(ModelError, match="leave embed_tokens out"):
        get_peft_model(kept(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))


def test_a_recipe_trains_saves_and_answers_alike(recipe, tmp_path):
    folder = toys.toy_folder(tmp_path / "llama3", "llama3")
    answers, weights = [], []
    for hosted in ("true", "false"):
        out = f"out-{hosted}"
        steps = f"{{max_steps: 2, learning_rate: 0.05, output_dir: {out}}}"
        text = f"train: {steps}\nevaluation: {{max_rows: 1, max_new_tokens: 2}}\n"
        settings = [f"model={folder}", f"embedding_on_host={hosted}", "quantization=nf4"]
        read = load_recipe(recipe(text=text), settings)
        assert isinstance(load_base(read).model.get_input_embeddings(), HostEmbedding) == (hosted == "true")
        figures = train_and_measure(read)
        answers.append(perce_lite.load(tmp_path / out).generate("Who are you?", profile="An otter.", max_new_tokens=6))
        weights.append(load_file(tmp_path / out / "adapter" / "adapter_model.safetensors"))
        assert figures["losses"]
    assert answers[0] == answers[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert set(weights[0]) == set(weights[1])


def test_where_the_table_lies_is_no_other_run():
    plain = {"data": {"path": "x.jsonl"}}
    recipes = [Recipe.model_validate({**plain, "embedding_on_host": hosted}) for hosted in (True, False)]
    assert recipes[0].fingerprint() == recipes[1].fingerprint()
