"""What an adapted model of any family promises. A family is a row of FAMILIES; every test here runs for each: for the
first of them, LLaVA, always; for the others when slow tests are asked for, beside a short form of two tests always."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.zoo.adapt.families import FAMILIES, Family
from tests.zoo.adapt.pictures import IMAGE, UNSAID, VIDEO
from zoo import UserError
from zoo.adapt import Trace, adapt, cache_report, load_adapted, restore, save_adapted
from zoo.adapt.cache import RoutedLayer
from zoo.adapt.family import FIXED

ROWS = FAMILIES["llava"].rows
NEW = 5

METHODS: dict[str, dict[str, Any]] = {
    "gamma_mod": {
        "router": {"shared": True, "input": "norm", "initial_scale": 3.0},
        "gate": {"activation": "softmax"},
        "auxiliary": {"type": "membership"},
    },
    "p_mod": {"router": {"initial_scale": 3.0, "bias": True}, "gate": {"activation": "tanh", "symmetric": True}},
    "videollm_mod": {"router": {"initial_scale": 3.0}, "gate": {"activation": "sigmoid", "branch": "block"}},
}


@functools.cache
def _built(name: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    model.set_attn_implementation(attention)
    return model if attention == "eager" else model.double()  # eager attention's softmax is fp32, its masks no float64


CASES = [
    pytest.param((name, attention), id=f"{name}-{attention}", marks=[] if name == "llava" else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for attention in family.attention
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Family, nn.Module]:
    """A family, and a model of it that the test may change."""
    name, attention = request.param
    return FAMILIES[name], copy.deepcopy(_built(name, attention))


def config(family: Family, keep: float = 0.4, method: str = "gamma_mod", **changes: Any) -> dict[str, Any]:
    return {
        "layers": list(family.layers),
        "group": "frame",
        "capacity": {"type": "constant", "value": keep},
        **METHODS[method],
        **changes,
    }


def generate(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """Greedy, never a placeholder, with the logits of every step."""
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=UNSAID,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def close(ours: Tensor, theirs: Tensor) -> None:
    """Up to rounding, relative to the largest entry; logits that a family forbids are about the least number there
    is."""
    forbidden = theirs < -1e30
    assert torch.equal(ours < -1e30, forbidden)
    ours, theirs = ours.masked_fill(forbidden, 0.0), theirs.masked_fill(forbidden, 0.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(theirs) * float(theirs.detach().abs().max()))


def rounding(value: Tensor) -> float:
    return 1e-9 if value.dtype == torch.float64 else 2e-5


def placeholders(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


def kept(family: Family, counts: list[int], keep: float) -> int:
    """Tokens that a routed layer keeps of the pictures of a row."""
    return sum(math.ceil(size * keep) for picture in family.inputs.of(counts) for size in picture.groups)


def gradients(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor | None = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss on the labels, or on the words that follow, and the gradient of each parameter; routers' names apart."""
    if labels is None:
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        predicted = real & torch.nn.functional.pad(real, (1, -1))  # padding predicts nothing
        labels = ids.masked_fill(placeholders(ids) | ~predicted, -100)
    model.zero_grad()
    loss = model(**inputs, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """Up to `tolerance` relative to the largest of all: some (of key biases) are rounding around zero."""
    assert list(ours) == list(theirs)
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("branch", ["mlp", "block"])
def test_everything_kept_and_the_gate_at_one_is_the_original(case: tuple[Family, nn.Module], branch: str) -> None:
    family, model = case
    inputs = family.inputs(model, family.rows)
    real = inputs["attention_mask"].bool()
    before, loss_and_gradients = model(**inputs, output_hidden_states=True), gradients(model, inputs)
    identity = {"router": {"initial_scale": 0.0}, "gate": {"activation": "tanh", "branch": branch, "symmetric": True}}
    adapt(model, config(family, 1.0, "p_mod", **identity))
    after, (loss, grads) = model(**inputs, output_hidden_states=True), gradients(model, inputs)
    close(after.logits[real], before.logits[real])
    assert len(after.hidden_states) == len(before.hidden_states)
    for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
        close(ours[real], theirs[real])
    close(loss, loss_and_gradients[0])
    ours = {name: grad for name, grad in grads.items() if "mod_router" not in name}
    same_gradients(ours, loss_and_gradients[1], 10 * rounding(loss))


@pytest.mark.parametrize("method", METHODS)
def test_cached_equals_uncached(case: tuple[Family, nn.Module], method: str) -> None:
    family, model = case
    adapt(model, config(family, method=method))
    inputs = family.inputs(model, family.rows)
    cached, uncached = generate(model, inputs), generate(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for ours, theirs in zip(cached.logits, uncached.logits, strict=True):
        close(ours, theirs)


def test_tokens_are_skipped(case: tuple[Family, nn.Module]) -> None:
    """The other tests would pass on a model that routes nothing."""
    family, model = case
    inputs = family.inputs(model, family.rows)
    before = model(**inputs).logits
    adapt(model, config(family, method="p_mod"))
    trace = Trace()
    after = model(**inputs, mod_trace=trace).logits
    assert (after - before).abs().max() > 1e-3
    images = placeholders(inputs["input_ids"])
    for layer in family.layers:
        keep = trace.decisions[f"layers.{layer}"].kept
        assert (keep & images).sum(1).tolist() == [kept(family, counts, 0.4) for counts in family.rows]
        assert bool((keep == inputs["attention_mask"].bool())[~images].all())


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_equals_one_by_one(case: tuple[Family, nn.Module], method: str) -> None:
    family, model = case
    adapt(model, config(family, method=method))
    inputs = family.inputs(model, family.rows)
    together = generate(model, inputs)
    for row, counts in enumerate(family.rows):
        single = family.inputs(model, [counts])
        alone = generate(model, single)
        length = int(inputs["attention_mask"][row].sum())
        assert length == single["input_ids"].shape[1]
        assert torch.equal(together.sequences[row, -NEW - length :], alone.sequences[0])
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            close(ours[row], theirs[0])


def test_chunked_prefill_between_images(case: tuple[Family, nn.Module]) -> None:
    family, model = case
    if not family.chunks:
        pytest.skip("the dense model cannot be given a prompt in parts")
    counts = [5, 4, 3]
    inputs, features = family.inputs(model, [counts]), family.inputs.features(counts)
    boundary = counts[0] + len(family.inputs.pictures[0].block) + 2  # inside the words between the images
    length = inputs["input_ids"].shape[1]
    parts = [
        family.inputs.part(model, counts, 0, boundary, features[:1]),
        family.inputs.part(model, counts, boundary, length, features[1:]),
    ]
    for group in ("image", "frame"):
        routed = adapt(copy.deepcopy(model), config(family, group=group))
        whole = routed(**inputs).logits
        cache = transformers.DynamicCache(config=routed.config)
        pieces = [routed(**part, past_key_values=cache, use_cache=True).logits for part in parts]
        close(torch.cat(pieces, 1), whole)
    routed = adapt(copy.deepcopy(model), config(family, group="sample"))
    cache = transformers.DynamicCache(config=routed.config)
    routed(**parts[0], past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="group: sample .* one forward"):
        routed(**parts[1], past_key_values=cache, use_cache=True)


def test_a_prompt_cut_inside_an_image_is_refused(case: tuple[Family, nn.Module]) -> None:
    """`generate` cuts anywhere; the model itself refuses the features of a whole image for a part of its tokens."""
    family, model = case
    counts = [5, 4]
    inputs = family.inputs(model, [counts])
    adapt(model, config(family, group="image"))
    middle = counts[0] + len(family.inputs.pictures[0].block) // 2
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=middle)
    behind = counts[0] + len(family.inputs.pictures[0].block) + 1
    between = family.inputs.pictures[0].block[0] != IMAGE or model.config.model_type not in FIXED
    if family.splits and between:
        pieces = generate(model, inputs, prefill_chunk_size=behind).logits
        for ours, theirs in zip(pieces, generate(model, inputs).logits, strict=True):
            close(ours, theirs)
    whole = family.inputs.part(model, counts, 0, middle, family.inputs.features(counts))
    with pytest.raises((ValueError, RuntimeError), match="do not match|shape mismatch"):  # Phi-4's are torch's words
        model(**whole)


def test_frames_come_one_by_one(case: tuple[Family, nn.Module]) -> None:
    """A stream of frames is what it is in one forward: the choice in a frame depends on that frame alone."""
    family, model = case
    clip = family.inputs.pictures[0]
    if clip.frame is None:
        pytest.skip("the family has no frames without something between them")
    counts = [5, 3]
    inputs, (features,) = family.inputs(model, [counts]), family.inputs.features(counts)
    start = int(placeholders(inputs["input_ids"][0]).nonzero()[0])
    borders = [0] + [start + sum(clip.frames[: i + 1]) for i in range(len(clip.frames))]
    parts = [
        family.inputs.part(model, counts, first, last, [clip.frame(features, i)])
        for i, (first, last) in enumerate(zip(borders, borders[1:], strict=False))
    ] + [family.inputs.part(model, counts, borders[-1], inputs["input_ids"].shape[1], [])]
    routed = adapt(copy.deepcopy(model), config(family, 0.2, "videollm_mod", candidates="video"))
    trace = Trace()
    whole = routed(**inputs, mod_trace=trace).logits
    keep = trace.decisions["layers.1"].kept[0, start : borders[-1]]
    assert [int(frame.sum()) for frame in keep.split(clip.frames)] == [math.ceil(n / 5) for n in clip.frames]
    cache = transformers.DynamicCache(config=routed.config)
    pieces = [routed(**part, past_key_values=cache, use_cache=True).logits for part in parts]
    close(torch.cat(pieces, 1), whole)
    routed = adapt(model, config(family, group="image"))
    cache = transformers.DynamicCache(config=routed.config)
    routed(**parts[0], past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="row 0: .* right after"):
        routed(**parts[1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(case: tuple[Family, nn.Module], method: str, reentrant: bool) -> None:
    family, model = case
    adapt(model.train(), config(family, method=method))
    inputs = family.inputs(model, family.rows)
    loss, grads = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, recomputed = gradients(model, inputs)
    assert torch.equal(loss, again)
    assert any("mod_router" in name for name in grads)
    missing = {name for name, grad in grads.items() if name not in recomputed}
    assert not [name for name in missing if "vision" not in name], missing  # reentrant: the tower's inputs need none
    tolerance = rounding(loss) if reentrant else 0.0  # a reentrant backward adds a gradient's paths in its own order
    same_gradients(recomputed, {name: grads[name] for name in recomputed}, tolerance)


def test_beam_search(case: tuple[Family, nn.Module]) -> None:
    family, model = case
    adapt(model, config(family))
    inputs = family.inputs(model, family.rows)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached, uncached = generate(model, inputs, **options), generate(model, inputs, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached.sequences_scores, uncached.sequences_scores)


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(case: tuple[Family, nn.Module]) -> None:
    family, model = case
    if not family.chunks:
        pytest.skip("a word after its prompt changes all of it")
    adapt(model, config(family))
    inputs = family.inputs(model, [family.rows[1]])
    cache = transformers.DynamicCache(config=model.config)
    cache.activate_past_recording()  # or layers with a window cannot be cropped
    cache = generate(model, inputs, past_key_values=cache).past_key_values
    extra = NEW - 1  # the last token is never fed back
    prompt = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == prompt + extra
    cache.crop(-extra)
    assert cache.get_seq_length() == prompt
    word = torch.tensor([[7]])
    ones = torch.ones(1, prompt + 1, dtype=torch.int64)
    ids = torch.cat((inputs["input_ids"], word), 1)
    whole = inputs | {"input_ids": ids, "attention_mask": ones} | family.inputs.types(ids)
    step = {name: value[..., -1:] for name, value in family.inputs.positions(model, whole).items()}
    step |= {"input_ids": word, "attention_mask": ones, "past_key_values": cache}
    ours = model(**step, use_cache=True).logits[:, -1]
    close(ours, model(**whole).logits[:, -1])


def test_memory_saved_is_what_was_promised(case: tuple[Family, nn.Module]) -> None:
    family, model = case
    before = generate(model, family.inputs(model, [family.rows[0]] * 2)).past_key_values
    adapt(model, config(family, 0.25))
    inputs = family.inputs(model, [family.rows[0]] * 2)
    images = int(placeholders(inputs["input_ids"])[0].sum())
    cache = generate(model, inputs).past_key_values
    report = cache_report(cache)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert report.bytes == sum(held)
    length = inputs["input_ids"].shape[1] + NEW - 1
    left = length - images + kept(family, family.rows[0], 0.25)
    dense = cache_report(before).slots  # a layer with a window holds less
    assert report.slots == tuple(left if i in family.layers else dense[i] for i in range(len(cache.layers)))
    assert report.dense_bytes == sum(
        size // slots * n for size, slots, n in zip(held, report.slots, dense, strict=True)
    )
    assert [isinstance(layer, RoutedLayer) for layer in cache.layers] == [
        i in family.layers for i in range(len(cache.layers))
    ]


def test_saved_and_loaded_bit_for_bit(case: tuple[Family, nn.Module], tmp_path: Any) -> None:
    family, model = case
    model = model.float()  # some have constants beside their weights, which are rounded as they are made
    inputs = family.inputs(model, family.rows)
    dense = model(**inputs).logits
    for method, folder in (("gamma_mod", tmp_path / "shared"), ("p_mod", tmp_path / "own")):
        routed = adapt(copy.deepcopy(model), config(family, method=method))
        with torch.no_grad():
            for parameter in routed.parameters():
                if parameter.dim() == 1 and parameter.shape[0] <= 2:
                    parameter += 0.5  # the routers' biases are zero at first
        save_adapted(routed, folder)
        again = load_adapted(folder, attn_implementation=model.config._attn_implementation)
        assert torch.equal(again(**inputs).logits, routed(**inputs).logits)
        plain = type(model).from_pretrained(folder, attn_implementation=model.config._attn_implementation)
        assert torch.equal(plain(**inputs).logits, dense)
        assert not [name for name in plain.state_dict() if "mod_router" in name]


def test_restored_is_the_original(case: tuple[Family, nn.Module]) -> None:
    family, model = case
    inputs = family.inputs(model, family.rows)
    before, names = model(**inputs).logits, list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    restore(adapt(model, config(family)))
    assert torch.equal(model(**inputs).logits, before)
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == classes


def test_a_static_cache_is_refused(case: tuple[Family, nn.Module]) -> None:
    family, model = case
    adapt(model, config(family))
    with pytest.raises(UserError, match="StaticLayer.*DynamicCache"):
        generate(model, family.inputs(model, family.rows), cache_implementation="static")


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_images_uses_every_router(case: tuple[Family, nn.Module], method: str) -> None:
    family, model = case
    adapt(model.train(), config(family, method=method))
    _, grads = gradients(model, family.inputs(model, [[6], [4]]))
    names = [name for name, _ in model.named_parameters() if "mod_router" in name]
    assert names and all(grads[name].abs().max() == 0 for name in names)


def test_a_picture_that_is_masked_whole_is_not_there(case: tuple[Family, nn.Module]) -> None:
    """Beside a row of text whose words compete: what the row and the routers learn is what they learn without it."""
    family, model = case
    adapt(model.float().train(), config(family, candidates="image_and_answer"))  # the families' own loss is fp32
    found = []
    for rows in ([[9]], [[9], [5, 3]]):
        inputs = family.inputs(model, rows)
        ids = inputs["input_ids"]
        inputs["attention_mask"] = inputs["attention_mask"] * ~placeholders(ids)
        labels = torch.full_like(ids, -100)
        labels[0, -8:] = ids[0, -8:]  # the first of nine words would be predicted from padding
        trace = Trace()
        loss, grads = gradients(model, inputs, labels=labels, mod_trace=trace)
        found.append((loss, grads, {name: count for name, (_, count) in trace.losses.items()}))
    (alone, expected, counts), (loss, grads, counted) = found
    close(loss, alone)
    assert counted == counts and set(counts.values()) == {8}
    same_gradients({name: grads[name] for name in expected}, expected, 10 * rounding(loss))
    assert all(not grad.any() for name, grad in grads.items() if name not in expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava"])
def test_of_every_family(name: str) -> None:
    """The short form: in fp32, everything kept is the original, and cached equals uncached."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, family.rows[:2])
    real = inputs["attention_mask"].bool()
    before = model(**inputs).logits
    identity = {"router": {"initial_scale": 0.0}, "gate": {"activation": "tanh"}}
    close(adapt(model, config(family, 1.0, "p_mod", **identity))(**inputs).logits[real], before[real])
    adapt(restore(model), config(family))
    trace = Trace()
    cached, uncached = generate(model, inputs), generate(model, inputs, use_cache=False)
    for ours, theirs in zip(cached.logits, uncached.logits, strict=True):
        close(ours, theirs)
    model(**inputs, mod_trace=trace)
    images = placeholders(inputs["input_ids"])
    found = trace.decisions["layers.1"].kept & images
    assert found.sum(1).tolist() == [kept(family, counts, 0.4) for counts in family.rows[:2]]
