"""Objectives that denoise items, against a loop over documents and items that shares no line with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.zoo.helpers import ATTENTION, D_FF, D_MODEL, DENSE, VOCABULARY, columns, ids, rows, stream
from zoo import ConfigError, TokenContext, noise
from zoo.batch import Batch
from zoo.kernels import available

MODALITIES, WIDTH = ("text", "image"), 3
NOISY, HEAD = {"type": "noisy_vectors", "width": WIDTH}, {"type": "vectors", "width": WIDTH}
ROWS = ("tt[iii]tt|t[ii]tttt", "tt[iii]ttt[iii]tt", "tttt|ttt......", "..tt[ii]tt")
"""Every item between markers, as documents have them; the second item of the first row stands before its caption."""
KINDS = {"transfusion": {"denoising_weight": 5.0}, "flow": {"denoising_weight": 2.0}}


def model_config(*layers: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"mixer": {"type": "attention", "heads": 2}, "feedforward": DENSE}
    ends = {"stem": {"image": NOISY}, "head": {"image": HEAD}}
    config = {"modalities": list(MODALITIES), "d_model": D_MODEL, "vocab_size": VOCABULARY}
    return config | {"layers": list(layers) or [plain]} | ends


def build(*layers: Mapping[str, Any], **options: Any) -> Any:
    return zoo.build("model", model_config(*layers), **options).double()


def objective(kind: str = "transfusion", **options: Any) -> Any:
    heads = zoo.ModelConfig.parse(model_config()).own_heads
    return zoo.build("objective", {"type": kind, **options}, heads=heads, bidirectional=("image",))


def batch(*texts: str, **options: Any) -> Batch:
    context = stream(*(texts or ROWS), **options)
    vectors = torch.randn(context.totals[1], WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return Batch(ids(context), context, {"image": vectors})


# -------------------------------------------------------------------------------------------------- a loop of its own


def uniform(key: int, salt: int, count: int) -> list[float]:
    """Numbers in (0, 1) by arithmetic on Python integers."""

    def mix(value: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            value = ((value ^ (value >> shift)) * factor) % 2**32
        return value

    values = [mix((((key ^ salt) % 2**32) + column * 0x9E3779B9) % 2**32) for column in range(count)]
    return [((value >> 8) + 0.5) / 2**24 for value in values]


def normal(key: int, salt: int, count: int) -> Tensor:
    half = (count + 1) // 2
    u = uniform(key, salt, 2 * half)
    pairs = [(math.sqrt(-2 * math.log(u[j])), 2 * math.pi * u[half + j]) for j in range(half)]
    both = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
    return torch.tensor(both[:count], dtype=torch.float64)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def document_forward(p: Mapping[str, Tensor], entered: Tensor, item: list[int]) -> Tensor:
    """One layer of attention (2 heads) and SwiGLU over one document (T, D)."""
    x, length, width = entered, len(entered), D_MODEL // 2
    inner = norm(x, p["layers.0.mixer_norm.weight"])
    mixed = []
    for head in range(2):
        part = slice(head * width, (head + 1) * width)
        turned = {}
        for name in ("q_proj", "k_proj"):
            y = inner @ p[f"layers.0.mixer.{name}.weight"][part].T
            angle = torch.arange(length).double()[:, None] * 10_000.0 ** -(torch.arange(0, width, 2).double() / width)
            a, b = y[:, : width // 2], y[:, width // 2 :]
            turned[name] = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
        value = inner @ p["layers.0.mixer.v_proj.weight"][part].T
        outputs = []
        for t in range(length):
            seen = [s for s in range(length) if s <= t or (item[t] >= 0 and item[s] == item[t])]
            weights = (turned["k_proj"][seen] @ turned["q_proj"][t] / math.sqrt(width)).softmax(0)
            outputs.append(weights @ value[seen])
        mixed.append(torch.stack(outputs))
    x = x + torch.cat(mixed, -1) @ p["layers.0.mixer.o_proj.weight"].T
    inner = norm(x, p["layers.0.feedforward_norm.weight"]) @ p["layers.0.feedforward.w_in.weight"].T
    gate, up = inner[:, :D_FF], inner[:, D_FF:]
    x = x + (gate * torch.sigmoid(gate) * up) @ p["layers.0.feedforward.w_out.weight"].T
    return norm(x, p["norm.weight"])


def expected_loss(p: Mapping[str, Tensor], given: Batch, kind: str, weight: float, limit: float) -> Tensor:
    context = given.context
    document, modality = context.document.tolist(), context.modality.tolist()
    item = context.item.tolist() if context.item is not None else [[-1] * len(row) for row in document]
    vectors, text_losses, image_losses = iter(given.content["image"]), [], []
    salts = [noise.salt(f"objective.image.{what}", context.step) for what in ("time", "noise")]
    for b, owners in enumerate(document):
        for d in sorted({owner for owner in owners if owner >= 0}):
            places = [t for t, owner in enumerate(owners) if owner == d]
            entered, targets, sizes = [], {}, {}
            for n, t in enumerate(places):
                x = p["embedding.weight"][given.tokens[b, t]]
                if modality[b][t] == 1:
                    own = [k for k, s in enumerate(places) if item[b][s] == item[b][t]]
                    share = uniform(int(context.key[b, places[own[0]]]), salts[0], 1)[0]
                    alone = own[0] > 2 or own[-1] + 3 >= len(places)
                    time = share * (1.0 if alone else limit)
                    if kind == "transfusion":
                        time = math.ceil(time * 1000) / 1000
                        a, s = math.cos(math.pi / 2 * time), math.sin(math.pi / 2 * time)
                    else:
                        time = 1 / (1 + math.exp(-float(torch.special.ndtri(torch.tensor(share).double()))))
                        time *= 1.0 if alone else limit
                        a, s = 1 - time, time
                    data, drawn = next(vectors), normal(int(context.key[b, t]), salts[1], WIDTH)
                    angle = 1000 * time * 1e4 ** -(torch.arange(128).double() / 128)
                    told = torch.cat((angle.sin(), angle.cos()))
                    x = x + p["stems.image.weight"] @ (a * data + s * drawn) + p["stems.image.time"] @ told
                    targets[n] = drawn if kind == "transfusion" else drawn - data
                    sizes[n] = len(own)
                entered.append(x)
            out = document_forward(p, torch.stack(entered), [item[b][t] for t in places])
            for n in range(len(places)):
                if n in targets:
                    error = (p["heads.image.weight"] @ out[n] - targets[n]).square().mean()
                    image_losses.append(error / sizes[n])
                elif n + 1 < len(places) and n + 1 not in targets:
                    log_p = (p["head.weight"] @ out[n]).log_softmax(-1)
                    text_losses.append(-log_p[given.tokens[b, places[n + 1]]])
    images = len({(b, i) for b, row in enumerate(item) for i in row if i >= 0})
    return sum(text_losses) / len(text_losses) + weight * sum(image_losses) / images


@pytest.mark.parametrize("limit", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_a_loop(kind, limit):
    model, given = build(), batch(step=3)
    own = objective(kind, **KINDS[kind], limit_before_caption=limit)
    loss = own.combine(own(model, given), own.counts(given))
    parameters = dict(model.named_parameters())
    theirs = expected_loss(parameters, given, kind, KINDS[kind]["denoising_weight"], limit)
    # noise and times are computed in fp32, and the sines are of 1000 times a time
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    ours, others = (torch.autograd.grad(value, list(parameters.values())) for value in (loss, theirs))
    for name, mine, other in zip(parameters, ours, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=5e-4 * float(other.abs().max()), msg=name)


# ------------------------------------------------------------------------------------------------------------ the parts


def test_counts_are_of_tokens_and_of_items():
    own, given = objective(), batch()
    counts = own.counts(given)
    # text after text: no target is an item's position, nor what follows one
    assert counts["text"] == (1 + 1) + (3) + (1 + 2 + 1) + (3 + 2) + (1 + 1)
    assert counts["image"] == 5 and sum(counts[name] for name in own.parts if "@" in name) == 5
    assert set(counts) == set(own.parts)
    with torch.no_grad():
        sums = own(build(), given)
    assert float(sum(sums[name] for name in own.parts if "@" in name)) == pytest.approx(float(sums["image"]))


def test_no_item_no_loss_and_every_parameter_in_the_graph():
    model, given = build(), batch("tttt", "tt|tt")
    for kind in KINDS:
        own = objective(kind)
        sums = own(model, given)
        assert own.counts(given)["image"] == 0 and not sums["image"].detach().any()
        gradients = torch.autograd.grad(own.combine(sums, own.counts(given)), list(model.parameters()))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_into_micro_batches_changes_nothing(kind):
    """Eight rows at once = four and four = one by one: sums, and the gradient of the step's loss."""
    texts = ROWS + ("t[iii]|t[iii]t[ii]tt", "[iii]", "ttttttttttt", "tt[ii]t[iii]t")
    own, model, whole = objective(kind, drop_context=0.5, limit_before_caption=0.5), build(), batch(*texts, step=7)
    results = []
    for size in (8, 4, 1):
        parts, taken = [], 0
        for start in range(0, 8, size):
            context = rows(whole.context, start, start + size, step=7)
            content = {"image": whole.content["image"][taken : taken + context.totals[1]]}
            taken += context.totals[1]
            parts.append(own.prepare(Batch(whole.tokens[start : start + size], context, content)))
        counts = [own.counts(part) for part in parts]
        counts = {name: sum(count[name] for count in counts) for name in own.parts}
        loss = sum(own.combine(own(model, part), counts) for part in parts)
        results.append((counts, loss, torch.autograd.grad(loss, list(model.parameters()))))
    for counts, loss, gradients in results[1:]:
        assert counts == results[0][0]
        torch.testing.assert_close(loss, results[0][1], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients, results[0][2], rtol=0, atol=1e-12)


def test_packed_is_separate():
    """Every document in a row of its own, with the same keys, gives what all give together."""
    own, model, packed = objective("flow"), build(), batch()
    total: dict[str, Tensor] = {}
    taken = 0
    for row, start, length in packed.context.document_spans:
        piece = slice(start, start + length)
        item = packed.context.item[row : row + 1, piece]
        context = TokenContext.from_modality(
            packed.context.modality[row : row + 1, piece],
            key=packed.context.key[row : row + 1, piece],
            item=item,
        )
        content = {"image": packed.content["image"][taken : taken + context.totals[1]]}
        taken += context.totals[1]
        for name, value in own(model, Batch(packed.tokens[row : row + 1, piece], context, content)).items():
            total[name] = total.get(name, torch.zeros(())) + value
    torch.testing.assert_close(total, own(model, packed), rtol=1e-12, atol=1e-12)


def test_noise_moves_with_the_step_and_is_one_time_an_item():
    own, given = objective(), batch(step=1)
    times = own.times(given.context, "image")
    spans = [length for _, _, length in given.context.item_spans]
    assert times.size.tolist() == [size for size in spans for _ in range(size)]
    for part in times.time.split(spans):
        assert len(part.unique()) == 1
    first = own.noisy(given, "image", times)
    again = own.noisy(given, "image", own.times(given.context, "image"))
    later = own.noisy(given.under(step=2), "image", own.times(given.under(step=2).context, "image"))
    assert torch.equal(first.mixture, again.mixture) and torch.equal(first.time, again.time)
    assert not (first.target == later.target).any() and not (first.time == later.time).any()


def test_evaluation_asks_at_the_same_few_times():
    own, given = objective("flow", times="uniform"), batch("tt[ii]t" + "t[ii]t" * 30)
    drawn = own.times(given.context, "image")
    own.eval()
    fixed = own.times(given.context, "image")
    assert torch.equal(fixed.column, drawn.column)
    torch.testing.assert_close(fixed.time, (fixed.column + 0.5) / 5)
    assert len(fixed.time.unique()) == 5 and len(drawn.time.unique()) == 31
    assert [name for name in own.parts if "@" in name] == [
        f"image@{t}" for t in ("0.10", "0.30", "0.50", "0.70", "0.90")
    ]
    assert ((drawn.time * 5).long() == drawn.column).all()


def test_only_an_item_before_its_caption_is_limited():
    own = objective("flow", limit_before_caption=0.25)
    given = batch("tt[iii]tttt|tt[iii]tt|ttt[iii]ttttt|t[ii]t|t[ii]tt|t[ii]ttt")
    times = own.times(given.context, "image")
    assert [int(column) < 0 for column in times.column[times.begins]] == [True, False, False, False, False, True]
    assert float(times.time[:3].max()) < 0.25


# ----------------------------------------------------------------------------------------------------- what sees what


@pytest.mark.parametrize("kernel", available("attention"))
def test_an_item_sees_itself_whole_and_nothing_later(kernel):
    """And moving a later item, or one of another document, moves no prediction before it."""
    model, own = build(kernels={"attention": kernel}), objective("flow")
    given = batch("tt[iii]tt[iii]ttt|tt[iii]tt")
    before = _predictions(model, own, given)
    for changed in range(9):
        content = given.content["image"].detach().clone()
        content[changed] += 1
        moved = _predictions(model, own, Batch(given.tokens, given.context, {"image": content}))
        seen = ((moved - before).abs().amax(-1) > 1e-12).tolist()
        item, last = changed // 3, 2 if changed >= 6 else 1
        assert seen == [item <= n // 3 <= last for n in range(9)], (kernel, changed)


def _predictions(model: Any, own: Any, given: Batch) -> Tensor:
    """What the head says at every position of an item."""
    times = own.times(given.context, "image")
    noisy = own.noisy(given, "image", times)
    _, predicted = model(
        given.tokens,
        given.context,
        content={"image": noisy.mixture},
        time={"image": noisy.time},
        read={"image": given.context.index(1)},
    )
    return predicted["image"].detach()


def test_decoded_in_pieces_it_is_the_full_forward():
    """Text token by token, items whole, at some time."""
    model, given = build(*[{"mixer": ATTENTION, "feedforward": DENSE}] * 2), batch("tt[iii]ttt[ii]tt")
    context = given.context.replace(routing="causal")
    time = torch.tensor([0.2] * 3 + [0.9] * 2)
    full, predicted = model(
        given.tokens, context, content=given.content, time={"image": time}, read={"image": context.index(1)}
    )
    states, taken, start = model.init_state(*context.shape), 0, 0
    for stop in (1, 2, 5, 6, 7, 8, 10, 11, 12):
        step = columns(context, start, stop)
        rows_ = slice(taken, taken + step.totals[1])
        logits, heads = model(
            given.tokens[:, start:stop],
            step,
            states,
            {"image": given.content["image"][rows_]},
            time={"image": time[rows_]},
            read={"image": step.index(1)},
        )
        torch.testing.assert_close(logits, full[:, start:stop], rtol=0, atol=1e-10)
        torch.testing.assert_close(heads["image"], predicted["image"][rows_], rtol=0, atol=1e-10)
        start, taken = stop, taken + step.totals[1]


# ------------------------------------------------------------------------------------------------- dropping the caption


def test_an_item_whose_context_is_dropped_stands_in_a_document_of_its_own():
    own = objective(drop_context=1.0)
    given = batch("ttttt[iii]tt|tt[ii]ttt", "tttt[iii]ttt[ii]tt|ttt")
    prepared = own.prepare(given)
    expected = stream("tttt|t[iii]tt|tt[ii]ttt", "ttt|t[iii]tt|t[ii]tt|ttt")
    assert prepared.context.document_spans == expected.document_spans
    assert prepared.context.item_spans == given.context.item_spans
    assert torch.equal(prepared.context.position, given.context.position), "rotations go by the distance alone"
    assert torch.equal(prepared.context.key, given.context.key)
    assert own.counts(prepared)["text"] == own.counts(given)["text"] - 3
    assert objective().prepare(given) is given


def test_the_share_that_is_dropped():
    own, given = objective(drop_context=0.3), batch(*["tttt[i]tt"] * 400)
    alone = len(own.prepare(given).context.document_spans) - 400
    assert 90 < alone < 150
    part = rows(given.context, 100, 200)
    prepared = own.prepare(Batch(given.tokens[100:200], part, {"image": given.content["image"][100:200]}))
    whole = own.prepare(given).context.document_spans
    assert len(prepared.context.document_spans) == sum(100 <= row < 200 for row, _, _ in whole)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        ({}, {"bidirectional": ()}, "objective.type: 'transfusion' denoises items whose positions all see each other"),
        (
            {},
            {"heads": {}},
            "objective.type: 'transfusion' puts noise on vectors, but positions of modalities.image carry ids",
        ),
        ({"weights": {"image": 2.0}}, {}, "objective.weights.image: its items are denoised, and objective.denoising"),
        ({"weights": {"imag": 2.0}}, {}, "objective.weights.imag: unknown modality"),
        ({"denoising_weight": -1.0}, {}, "objective.denoising_weight: -1.0: must be greater than or equal to 0"),
        ({"limit_before_caption": 0.0}, {}, "objective.limit_before_caption: 0.0: must be greater than 0"),
        ({"drop_context": 1.5}, {}, "objective.drop_context: 1.5: must be less than or equal to 1"),
        ({"steps": 0}, {}, "objective.steps: 0: must be greater than 0"),
        ({"shift": 1.0}, {}, "objective.shift: unknown key"),
    ],
)
def test_errors(options, place, message):
    heads = zoo.ModelConfig.parse(model_config()).own_heads
    with pytest.raises(ConfigError) as error:
        zoo.build(
            "objective", {"type": "transfusion", **options}, **{"heads": heads, "bidirectional": ("image",)} | place
        )
    assert str(error.value).startswith(message)


def test_positions_without_an_item_are_refused():
    with pytest.raises(ValueError, match="^context: positions of image belong to no item"):
        objective()(build(), batch("ttiit"))
