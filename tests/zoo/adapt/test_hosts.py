"""What Transformers' Trainer, accelerate, PEFT and bitsandbytes do to a model and its loss: an adapted one is equal to
itself in each, or refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.pretrain.ranks import run_ranks
from tests.zoo.adapt.families import FAMILIES, small_text, small_vision
from tests.zoo.adapt.test_conformance import METHODS
from zoo import Trace, UserError
from zoo.adapt import adapt, auxiliary_loss, load_adapted, routers, save_adapted
from zoo.adapt.select import ModRouter
from zoo.adapt.wrap import adaptation

LLAVA = FAMILIES["llava"]
CONFIG: dict[str, Any] = {
    "layers": [1, 2],
    "capacity": {"type": "constant", "value": 0.4},
    **METHODS["gamma_mod"],
    "auxiliary": {"type": "membership", "weight": 0.5},
}
OWN = CONFIG | {"router": {"initial_scale": 3.0}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate keeps for the whole process is that of one test."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def model_of(config: dict[str, Any] | None = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    model = LLAVA.build()
    return model if config is None else adapt(model, config)


def samples(*answers: int) -> list[dict[str, Tensor]]:
    """A sample with a picture for each number of labels."""
    found = []
    for number, count in enumerate(answers):
        one = {name: value[0] for name, value in LLAVA.inputs(model_of(None), [[2, 12]], seed=number).items()}
        labels = torch.full_like(one["input_ids"], -100)
        labels[-count:] = one["input_ids"][-count:]
        found.append(one | {"labels": labels})
    return found


def trainer(model: nn.Module, data: list[dict[str, Tensor]], folder: Path, **options: Any) -> transformers.Trainer:
    """One step over all the data by plain gradient descent, unless told otherwise."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 1,
        "per_device_train_batch_size": len(data),
    }
    return transformers.Trainer(model, transformers.TrainingArguments(**settings | options), train_dataset=data)


def stack(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in data]) for name in data[0]}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def stepped(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The weights after a step of gradient descent at a learning rate of 1."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {name: (p if grad is None else p - grad).detach() for (name, p), grad in pairs}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def weighed_step(model: nn.Module, data: list[dict[str, Tensor]], parts: int) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step of so many micro-batches, and the weights after it: the language loss is a mean over all their
    labels, and so is the auxiliary one, each micro-batch's mean counted by its labels."""
    size = len(data) // parts
    micro = [stack(data[start : start + size]) for start in range(0, len(data), size)]
    total = sum(int((one["labels"][:, 1:] != -100).sum()) for one in micro)
    expected = torch.zeros(())
    for one in micro:
        trace = Trace()
        logits = model(**{name: value for name, value in one.items() if name != "labels"}, mod_trace=trace).logits
        own = one["labels"][:, 1:]
        language = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), own.flatten(), reduction="sum")
        share = int((own != -100).sum()) / total
        expected = expected + language / total + share * auxiliary_loss(trace, adaptation(model))
    return float(expected.detach()), stepped(model, expected)


def trained_in_order(model: nn.Module, data: list[dict[str, Tensor]], folder: Path, **options: Any) -> float:
    """The loss that the Trainer says of one step over the data in its order."""
    host = trainer(model, data, folder, **options)
    host._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    host.train()
    return host.state.log_history[0]["loss"]


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_trainer_weighs_the_auxiliary_loss_as_its_own(tmp_path: Path, parts: int) -> None:
    """However many micro-batches a step is made of (`num_items_in_batch`)."""
    data, model = samples(3, 8, 5, 4), model_of().train()
    expected, after = weighed_step(model, data, parts)
    options = {"per_device_train_batch_size": len(data) // parts, "gradient_accumulation_steps": parts}
    assert trained_in_order(model, data, tmp_path, **options) == pytest.approx(expected, rel=1e-5)
    close(weights(model), after)


def one_rank_of_two(folder: Path) -> tuple[float, dict[str, Tensor]]:
    data, model = samples(3, 8, 5, 4), model_of().train()
    loss = trained_in_order(model, data, folder, per_device_train_batch_size=2)
    torch.distributed.destroy_process_group()  # accelerate's
    return loss, weights(model)


@pytest.mark.slow
def test_trainer_on_two_ranks(tmp_path: Path) -> None:
    """The step that one rank takes over the same samples as two micro-batches, on both ranks."""
    expected, after = weighed_step(model_of().train(), samples(3, 8, 5, 4), 2)
    for loss, found in run_ranks("tests.zoo.adapt.test_hosts:one_rank_of_two", 2, tmp_path, folder=tmp_path / "run"):
        assert loss == pytest.approx(expected, rel=1e-5)
        close(found, after)


def test_trainers_evaluation_is_of_the_language_loss_alone(tmp_path: Path) -> None:
    data, model = samples(3, 3), model_of()
    loss = trainer(model, data, tmp_path, per_device_eval_batch_size=2).evaluate(data)["eval_loss"]
    inputs = stack(data)
    assert loss == pytest.approx(float(model.eval()(**inputs).loss), rel=1e-6)
    assert abs(float(model.train()(**inputs).loss) - loss) > 0.01


def test_trainer_takes_no_labels_away_in_silence(tmp_path: Path) -> None:
    data = samples(3, 3)
    with pytest.raises(UserError, match="auxiliary.type: membership: .* label_smoothing_factor"):
        trainer(model_of(), data, tmp_path, label_smoothing_factor=0.1).train()
    answers = CONFIG | {"auxiliary": {"type": "none"}, "candidates": "image_and_answer"}
    with pytest.raises(UserError, match="candidates: image_and_answer: .* which tokens are answers"):
        trainer(model_of(answers), data, tmp_path, label_smoothing_factor=0.1).train()
    trainer(model_of(CONFIG | {"auxiliary": {"type": "none"}}), data, tmp_path, label_smoothing_factor=0.1).train()


def test_trls_losses_of_its_own() -> None:
    """They are made of log-probabilities and would leave the auxiliary loss out; without one they are right."""
    inputs = stack(samples(3, 5))
    with pytest.raises(UserError, match="auxiliary.type: membership: .* TRL makes a loss of its own"):
        model_of().train()(**inputs, fused_lm_head=True)
    from trl.trainer.utils import add_fused_lm_head

    model = model_of(CONFIG | {"auxiliary": {"type": "none"}}).train()
    expected = model(**inputs).loss
    add_fused_lm_head(model)
    after = stepped(model, expected)
    loss = model(**inputs, fused_lm_head=True).loss
    torch.testing.assert_close(loss, expected)
    close(stepped(model, loss), after, 1e-4)


def test_routers_score_in_fp32_under_autocast(tmp_path: Path) -> None:
    """bf16 would make ties; Trainer's and accelerate's bf16 are autocast."""
    router, x = next(router for _, router in routers(model_of())), torch.randn(50, 32)
    assert isinstance(router, ModRouter)
    with torch.autocast("cpu", torch.bfloat16):
        scores = router(x)
    assert torch.equal(scores, router(x)) and scores.dtype == torch.float32
    losses = []
    for options in ({}, {"bf16": True}):
        host = trainer(model_of(), samples(3, 8), tmp_path, **options)
        host.train()
        losses.append(host.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_accelerate_divides_both_losses_by_its_micro_batches() -> None:
    from accelerate import Accelerator

    data, model = samples(4, 4, 4, 4), model_of().train()
    after = stepped(model, model(**stack(data)).loss)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for part in (data[:2], data[2:]):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**stack(part)).loss)
            optimizer.step()
            optimizer.zero_grad()
    close(weights(model), after)


def test_accelerates_offloading_of_an_adapted_model(tmp_path: Path) -> None:
    from accelerate import disk_offload

    model = model_of().eval()
    inputs = LLAVA.inputs(model, LLAVA.rows)
    before = model(**inputs).logits
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(model(**inputs).logits, before)


def test_a_context_on_another_device_is_made_once() -> None:
    model, seen = model_of(), []
    hook = lambda module, args, kwargs: seen.append(kwargs["mod_context"])  # noqa: E731
    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    model(**LLAVA.inputs(model, LLAVA.rows))
    (context,) = seen
    other = context.to("meta", non_blocking=True)
    assert other.competing.is_meta and other.dense.is_meta and other is context.to("meta")
    assert context.to("cpu") is context


def test_data_parallel_is_refused() -> None:
    model = model_of()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(UserError, match="torch.nn.DataParallel"):
        replica(**LLAVA.inputs(model, LLAVA.rows))


def lora(model: nn.Module, **options: Any) -> Any:
    import peft

    torch.manual_seed(1)
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


ADAPTERS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "routers": {"modules_to_save": ["mod_router"]},
}


QUICK = ("LoRA-shared", "DoRA-own", "routers-shared")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(name, config, id=f"{name}-{kind}", marks=[] if f"{name}-{kind}" in QUICK else pytest.mark.slow)
        for name in ADAPTERS
        for kind, config in (("shared", CONFIG), ("own", OWN))
    ],
)
def test_adapters_train_with_routers_and_come_back(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    """Adapters that do nothing yet change nothing; after a step, saved and opened again, the answers are the same."""
    LLAVA.build().save_pretrained(tmp_path / "base")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapt(base, config)
    inputs = stack(samples(3, 5))
    before = base(**inputs).logits
    none = lora(copy.deepcopy(base), **ADAPTERS[name] | {"init_lora_weights": True}).eval()
    torch.testing.assert_close(none(**inputs).logits, before, rtol=0, atol=1e-5)  # DoRA divides a norm by itself
    model = lora(base, **ADAPTERS[name]).train()
    if name != "routers":
        for _, router in routers(model):
            router.requires_grad_(True)
    first = {key: router.weight.clone() for key, router in routers(model)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    assert all(not torch.equal(router.weight, first[key]) for key, router in routers(model))
    save_adapted(model, tmp_path / "out")
    again = load_adapted(tmp_path / "out")
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    if name in ("LoRA", "DoRA"):
        merged = model.merge_and_unload()
        assert adaptation(merged) == adaptation(again)
        torch.testing.assert_close(merged(**inputs).logits, again(**inputs).logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize("config", [CONFIG, pytest.param(OWN, marks=pytest.mark.slow)], ids=["shared", "own"])
def test_trainer_resumes_adapters_and_routers(tmp_path: Path, config: dict[str, Any]) -> None:
    """Routers named in `modules_to_save` are in PEFT's own checkpoints."""
    data = samples(3, 8, 5, 4)
    options = {"per_device_train_batch_size": 2, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1}

    def run(folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
        model = lora(model_of(config), modules_to_save=["mod_router"])
        host = trainer(model, data, folder, max_steps=steps, **options)
        host.train(resume_from_checkpoint=resume or None)
        return weights(model)

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    resumed = run(tmp_path / "parts", 2, True)
    assert any("mod_router" in name for name in whole)
    close(resumed, whole, 0.0)


def test_adapters_that_would_not_be_found_again(tmp_path: Path) -> None:
    import peft

    for config, message in (
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type: .*IA3.*LoRA's adapters alone"),
        (peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "pissa changes the base"),
    ):
        with pytest.raises(UserError, match=message):
            save_adapted(peft.get_peft_model(model_of(), config), tmp_path / "out")
    model = peft.get_peft_model(model_of(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="other")
    with pytest.raises(UserError, match="adapters other: only one set, named default"):
        save_adapted(model, tmp_path / "out")
    model = model_of()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"use peft\.get_peft_model"):
        save_adapted(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def quantized_base(folder: Path) -> Path:
    """A base whose widths bitsandbytes takes."""
    vision = small_vision(hidden_size=64, intermediate_size=128)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**small_text(hidden_size=64, intermediate_size=128)),
        image_token_index=63,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return folder


BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize(
    ("bits", "prepared"),
    [
        pytest.param(bits, prepared, marks=[] if bits == "nf4" and prepared else pytest.mark.slow)
        for bits in BITS
        for prepared in (False, True)
    ],
)
def test_adapters_of_a_quantised_base(tmp_path: Path, bits: str, prepared: bool) -> None:
    """QLoRA: routers learn beside codes that do not, and the folder opens by itself, with the same answers."""
    import peft

    folder = quantized_base(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(**BITS[bits])
    kind = transformers.LlavaForConditionalGeneration
    dense = kind.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how)
    inputs = stack(samples(3, 5))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = adapt(
        kind.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how),
        CONFIG
        | {
            "capacity": {"type": "constant", "value": 1.0},
            "router": {"initial_scale": 0.0},
            "gate": {"activation": "tanh"},
        },
    )
    before = dense.train()(**inputs).logits
    assert torch.equal(model.train()(**inputs, mod_trace=Trace()).logits, before), "everything kept is the original"
    model = adapt(dense, CONFIG)
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = lora(model, modules_to_save=["mod_router"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**inputs).loss.backward()
    assert all(router.weight.grad.abs().max() > 0 for _, router in routers(model))
    optimizer.step()
    save_adapted(model, tmp_path / "out")
    again = load_adapted(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    there = {name: parameter.dtype for name, parameter in again.named_parameters()}
    assert there == {name: parameter.dtype for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match="made for a base with weights"):
        load_adapted(tmp_path / "out", quantization_config=None)
