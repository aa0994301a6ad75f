"""An exported model under Transformers: equal to the run, whatever Transformers does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.zoo.hf.exports import exported, opened
from tests.zoo.test_generate import ATTENTION, KINDS, LAYERS, item_of, plain
from zoo import Part, Run, UserError
from zoo.generate import document
from zoo.hf import ZooCache, ZooForCausalLM
from zoo.prefix import together

Model = Any
PROMPTS: list[list[Part | str]] = [["ab"], [], ["a longer text"], ["x"]]
IDS = ["ids", "ids, open-ended"]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Model, Any, Path]:
    """A sparse run of each kind of modality, and its export."""
    folder = tmp_path_factory.mktemp("exported")
    run = exported(folder, request.param, "sparse")
    return run, *opened(folder), folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any, Path]:
    folder = tmp_path_factory.mktemp("exported")
    exported(folder, "ids", "dense")
    return *opened(folder), folder


def prompts_of(run: Run) -> list[list[Part | str]]:
    return [["ab", item_of(run), "c"], ["x"], [item_of(run), "de", item_of(run)]]


@torch.no_grad()
def test_logits_are_the_runs(case: tuple[Run, Model, Any, Path]) -> None:
    """Documents of different lengths, padded on the left, against each by itself; with what positions carry."""
    run, model, processor, _ = case
    prompts = prompts_of(run)
    logits = model(**processor(prompts), use_cache=False).logits
    for row, prompt in zip(logits, prompts, strict=True):
        piece = document(run, prompt)
        batch = together([piece], run.model, [0], [0])
        expected = run.model(batch.tokens, batch.context, content=batch.content)[0]
        torch.testing.assert_close(row[len(row) - len(piece) :], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", IDS)
def test_greedy_is_ours(tmp_path: Path, kind: str, layers: str) -> None:
    run = exported(tmp_path, kind, layers)
    model, processor = opened(tmp_path)
    rows = processor.batch_parts(model.generate(**processor(PROMPTS), max_new_tokens=12))
    ours = run.generate_all(PROMPTS, temperature=0.0, max_tokens=12)
    for prompt, row, mine in zip(PROMPTS, rows, ours, strict=True):
        written = plain([Part("text", "".join(map(str, prompt))), *mine])
        merged: list[tuple[str, Any]] = []
        for name, item in written:  # text after text is one text
            if name == "text" and merged and merged[-1][0] == "text":
                merged[-1] = (name, merged[-1][1] + item)
            elif name != "text" or item:
                merged.append((name, item))
        # an item that the room has cut is left out of the one, and not written by the other
        assert plain(row) == merged


def test_generate_with_and_without_a_cache(case: tuple[Run, Model, Any, Path]) -> None:
    """Greedy, beams and samples; what the prompt's positions carry is repeated for the beams."""
    run, model, processor, _ = case
    inputs = processor(prompts_of(run))
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_p": 0.9}]
    for options in ways:
        rows = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            rows.append(model.generate(**inputs, **options, max_new_tokens=6, use_cache=use_cache))
        assert torch.equal(*rows), options
    assert len(rows[0]) == 3


def test_chunks_of_a_prompt_and_a_cache_of_ones_own(dense: tuple[Model, Any, Path]) -> None:
    model, processor, _ = dense
    inputs, cache = processor(PROMPTS), ZooCache()
    expected = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=8, prefill_chunk_size=3, past_key_values=cache), expected
    )
    assert cache.get_seq_length() == expected.shape[1] - 1 and len(cache) == 2
    more = torch.cat([inputs["attention_mask"], torch.ones(4, expected.shape[1] - inputs["input_ids"].shape[1])], 1)
    longer = model.generate(expected, attention_mask=more, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(longer[:, : expected.shape[1]], expected)
    again = model.generate(expected, attention_mask=more, max_new_tokens=4)
    assert torch.equal(longer, again)


@torch.no_grad()
def test_packed_documents_are_apart(case: tuple[Run, Model, Any, Path]) -> None:
    run, model, processor, _ = case
    one, two = (processor([prompt]) for prompt in prompts_of(run)[:2])
    content = one.get("content") or {}
    both = torch.cat([one["input_ids"], two["input_ids"]], 1)
    padded = {
        name: torch.cat([v, v.new_zeros(1, two["input_ids"].shape[1], *v.shape[2:])], 1) for name, v in content.items()
    }
    logits = model(both, content=padded).logits
    torch.testing.assert_close(logits[:, : one["input_ids"].shape[1]], model(**one).logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[:, one["input_ids"].shape[1] :], model(**two).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_loss_is_the_objectives(tmp_path: Path) -> None:
    run = exported(tmp_path, "ids", "sparse")
    model, processor = opened(tmp_path)
    inputs = processor(prompts_of(run))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    pieces = [document(run, prompt) for prompt in prompts_of(run)]
    batch = together(pieces, run.model, [0] * 3, [0] * 3)
    sums, counts = run.objective(run.model, batch), run.objective.counts(batch)
    expected = sum(float(sums[name]) for name in ("text", "x")) / sum(counts[name] for name in ("text", "x"))
    assert float(model(**inputs, labels=labels).loss) == pytest.approx(
        expected, abs=1e-5
    )  # Transformers takes it in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_opened_again(case: tuple[Run, Model, Any, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit: weights, buffers, config, modalities."""
    run, _, processor, folder = case
    model = ZooForCausalLM.from_pretrained(folder / "out", dtype=dtype)
    model.save_pretrained(tmp_path / "out", max_shard_size="8KB")
    processor.save_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again, other = opened(tmp_path, "auto")
    assert again.dtype == dtype and again.config.to_diff_dict() == model.config.to_diff_dict()
    for (name, value), (same, back) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == same and value.dtype == back.dtype and torch.equal(value, back), name
    for name, modality in processor.modalities.items():
        assert other.modalities[name].fingerprint == modality.fingerprint
    for name, value in run.model.state_dict().items():
        assert torch.equal(value.to(again.state_dict()[f"model.{name}"].dtype), again.state_dict()[f"model.{name}"])


UNTIED = {"mixer": {"type": "attention", "heads": 2, "untied": ["q_proj", "k_proj"]}, "untied_norms": True}
MAMBA = {"mixer": {"type": "mamba", "d_state": 3}, "feedforward": {"type": "experts", "experts": 2, "d_ff": 8}}


def test_peft_attaches(tmp_path: Path) -> None:
    """LoRA on projections, tied, untied and Mamba's: gradients, saving, opening, merging."""
    exported(tmp_path, "ids", [ATTENTION, UNTIED, MAMBA])
    model, processor = opened(tmp_path)
    inputs = processor([["ab"], ["x"]])
    before = model(**inputs).logits
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "in_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora)
    assert torch.equal(tuned(**inputs).logits, before)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (2 + 2 + 1) and all(g is not None for g in gradients.values())
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "lora_B" in name)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = tuned(**inputs).logits
    assert (after - before).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(opened(tmp_path)[0], tmp_path / "lora")
    torch.testing.assert_close(again(**inputs).logits, after, rtol=0, atol=1e-10)
    torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, after, rtol=0, atol=1e-8)
    assert torch.equal(
        tuned.generate(**inputs, max_new_tokens=4), tuned.generate(**inputs, max_new_tokens=4, use_cache=False)
    )


def test_peft_takes_the_stacked_weights_of_experts(tmp_path: Path) -> None:
    exported(tmp_path, "ids", "sparse")
    model, processor = opened(tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.w_in"], task_type="CAUSAL_LM")
    tuned, inputs = peft.get_peft_model(model, lora), processor([["abcdefgh"]])
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in tuned.named_parameters() if "lora_B" in name]
    assert gradients and any(g is not None and g.abs().max() > 0 for g in gradients)


def test_recomputation_changes_no_gradient(tmp_path: Path) -> None:
    """Dropout of a step is drawn from torch's random state, and drawn again in the recomputation."""
    layers = [{**layer, "dropout": 0.3} for layer in LAYERS["sparse"]]
    exported(tmp_path, "ids", layers)
    found = []
    for recompute in (False, True):
        model, processor = opened(tmp_path)
        if recompute:
            model.activation_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(3)
        inputs = processor([["abcd"], ["efghi"]])
        losses = [model.train()(**inputs, labels=inputs["input_ids"]).loss for _ in range(2)]
        assert not torch.equal(*losses), "another step, another dropout"
        sum(losses).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=1e-12)


def test_topk_routing_sees_later_tokens(tmp_path: Path) -> None:
    exported(tmp_path, "ids", "sparse")
    model, processor = opened(tmp_path)
    one, two = (processor([["abcd" + last]])["input_ids"] for last in "xy")
    with torch.no_grad():
        differences = []
        for routing in ("causal", "topk"):
            model.config.routing = routing
            differences.append(float((model(one).logits - model(two).logits)[:, :-1].abs().max()))
        assert differences[0] < 1e-10 and differences[1] > 1e-4


def test_a_new_model_has_first_values(dense: tuple[Model, Any, Path]) -> None:
    torch.manual_seed(0)
    models = [ZooForCausalLM(dense[0].config) for _ in range(2)]
    for (name, one), (_, two) in zip(*(model.named_parameters() for model in models), strict=True):
        assert one.isfinite().all() and (not torch.equal(one, two) or bool((one == 1).all())), name


def test_what_cannot_be_is_refused(case: tuple[Run, Model, Any, Path]) -> None:
    run, model, processor, _ = case
    inputs = processor([["ab"], ["c"]])
    ids, used = inputs["input_ids"], ZooCache()
    model(**inputs, past_key_values=used)
    cases: list[tuple[Any, str]] = [
        (
            lambda: model(ids, past_key_values=transformers.DynamicCache()),
            "past_key_values: a DynamicCache cannot hold",
        ),
        (lambda: model(ids[:1], past_key_values=used), "past_key_values: holds 2 rows, but there are 1"),
        (lambda: used.crop(-1), "cannot forget their last tokens"),
        (lambda: model(inputs_embeds=torch.zeros(1, 2, 16)), "inputs_embeds: the ids say which modality"),
        (lambda: model(ids + 10_000), "input_ids: token ids lie in"),
        (lambda: model(ids, attention_mask=torch.ones(2, 1)), "attention_mask: shape (2, 1) does not go with ids"),
        (lambda: model(ids, content={"text": torch.zeros(2, 3)}), "content: 'text' carries ids"),
        (lambda: model(ids, labels=ids, logits_to_keep=1), "logits_to_keep: a loss needs all logits"),
        (lambda: model.resize_token_embeddings(9), "cannot be resized to 9"),
        (lambda: model.activation_checkpointing_enable(every_n_layers=2), "every_n_layers: 2"),
        (lambda: processor(["ab"]), "processor: give a list of documents"),
        (lambda: processor([["ab"]], truncation=True), "processor: takes documents"),
        (lambda: processor([[Part("y", 1)]]), "part 1: 'y' is no modality of"),
    ]
    if run.modalities["x"].config.bidirectional:
        whole = processor([[item_of(run)]])
        cut = {name: value[:, :4] for name, value in whole["content"].items()}

        def in_two_pieces() -> Any:
            cache = ZooCache()
            model(whole["input_ids"][:, :4], content=cut, past_key_values=cache)
            rest = {name: value[:, 4:] for name, value in whole["content"].items()}
            model(whole["input_ids"][:, 4:], content=rest, past_key_values=cache)

        cases.append((in_two_pieces, "an item that sees all of itself is in two pieces"))
    for call, reason in cases:
        with pytest.raises(UserError) as caught:
            call()
        assert reason in str(caught.value) and "\n" not in str(caught.value)
