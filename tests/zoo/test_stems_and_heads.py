"""Vectors and channels in a model: how they enter, what is predicted, what it costs, and who runs which parameter."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from tests.zoo.helpers import ATTENTION, D_MODEL, DENSE, MOMA, VOCABULARY, columns, ids, stream
from zoo import ConfigError
from zoo.batch import Batch

MODALITIES = ("text", "image", "speech")
VECTORS = {"type": "vectors", "width": 3}
CHANNELS = {"type": "channels", "count": 4, "size": 5}
ROWS = ("tiiit|tss", "ssst|iit", "tttt....")
FEEDFORWARD = MOMA | {"experts": {"text": 2, "image": 2, "speech": 1}}


def config(**changes):
    layers = [{"mixer": ATTENTION, "feedforward": feedforward} for feedforward in (DENSE, FEEDFORWARD)]
    both = {"image": VECTORS, "speech": CHANNELS}
    model = {"modalities": list(MODALITIES), "d_model": D_MODEL, "vocab_size": VOCABULARY, "layers": layers}
    return model | {"stem": both, "head": both} | changes


def build(**changes):
    return zoo.build("model", config(**changes)).double()


def batch(*rows: str) -> Batch:
    context = stream(*(rows or ROWS), modalities=MODALITIES)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(context.totals[1], 3, generator=generator, dtype=torch.float64)
    return Batch(
        ids(context), context, {"image": image, "speech": torch.randint(5, (context.totals[2], 4), generator=generator)}
    )


def objective(model=None, **options):
    heads = zoo.ModelConfig.parse(config() if model is None else model).own_heads
    return zoo.build("objective", {"type": "autoregressive", **options}, modalities=MODALITIES, heads=heads)


def test_a_position_enters_as_its_id_and_what_it_carries():
    model, given = build(), batch()
    flat = model._enter(given.tokens, given.context, given.content, {}).reshape(-1, D_MODEL)
    embedded = model.embedding.weight[given.tokens.reshape(-1)]
    table = model.stems.speech.weight.view(4, 5, D_MODEL)
    seen = {"image": 0, "speech": 0}
    for place, m in enumerate(given.context.modality.reshape(-1).tolist()):
        expected = embedded[place] if m >= 0 else torch.zeros(D_MODEL, dtype=torch.float64)
        if m == 1:
            expected = expected + model.stems.image.weight @ given.content["image"][seen["image"]]
            seen["image"] += 1
        if m == 2:
            expected = expected + sum(
                table[c, i] for c, i in enumerate(given.content["speech"][seen["speech"]].tolist())
            )
            seen["speech"] += 1
        torch.testing.assert_close(flat[place], expected)
    assert seen == {"image": 5, "speech": 5}


def test_first_weights_enter_as_large_as_an_id():
    model = zoo.build("model", config(d_model=256))
    vectors = model.stems.image(torch.randn(500, 3))
    channels = model.stems.speech(torch.randint(5, (500, 4)))
    for entered in (vectors.norm(dim=-1).square().mean(), channels.norm(dim=-1).square().mean()):
        assert 0.8 < float(entered.detach()) < 1.25


@pytest.mark.parametrize("read", [False, True])
def test_without_own_stems_a_model_is_what_it_was(read):
    """Only the ids' stem and head, under their old names."""
    model = build(stem={"image": {"type": "ids"}}, head={"text": {"type": "ids"}})
    names = [name for name, _ in model.named_parameters() if not name.startswith("layers")]
    assert names == ["embedding.weight", "norm.weight", "head.weight"]
    given = batch()
    logits = model(given.tokens, given.context)
    assert logits.shape == (3, 8, VOCABULARY)
    if read:
        assert torch.equal(model(given.tokens, given.context, read={})[0], logits)


def test_losses_by_hand():
    """Mean squared error over a vector, mean cross-entropy over channels; of positions that follow in their
    document."""
    model, given = build(), batch()
    sums, counts = objective()(model, given), objective().counts(given)
    assert counts == {"text": 9 - 3, "image": 5 - 1, "speech": 5 - 1}  # first tokens of documents have no predecessor
    x = []
    model.norm.register_forward_hook(lambda module, arguments, output: x.append(output))
    logits = model(given.tokens, given.context, content=given.content)
    before = torch.nn.functional.pad(x[0], (0, 0, 1, 0))[:, :-1]
    log_p = torch.nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1].log_softmax(-1)
    document, expected = given.context.document, {"text": 0.0, "image": 0.0, "speech": 0.0}
    seen = {"image": 0, "speech": 0}
    for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(8)).tolist():
        m = int(given.context.modality[row, column])
        follows = column > 0 and document[row, column] == document[row, column - 1] and m >= 0
        hidden = before[row, column]
        if m == 0 and follows:
            expected["text"] -= log_p[row, column, given.tokens[row, column]]
        elif m == 1:
            error = (model.heads.image.weight @ hidden - given.content["image"][seen["image"]]).square().mean()
            expected["image"] += error * follows
            seen["image"] += 1
        elif m == 2:
            channels = (model.heads.speech.weight @ hidden).view(4, 5).log_softmax(-1)
            target = given.content["speech"][seen["speech"]]
            expected["speech"] -= channels[torch.arange(4), target].mean() * follows
            seen["speech"] += 1
    for name in MODALITIES:
        torch.testing.assert_close(sums[name], torch.as_tensor(expected[name]), msg=name)


def test_an_open_end_is_learned_by_the_head_of_the_ids():
    model = config(head={"image": VECTORS | {"open_ended": True}, "speech": CHANNELS})
    plain, given = objective(model), batch()
    assert plain.parts == ("text", "image", "speech", "image_length")
    sums, counts = plain(build(), given), plain.counts(given)
    assert counts["image_length"] == counts["image"] == 4
    log_p = build()(given.tokens, given.context, content=given.content)[:, :-1].log_softmax(-1)
    places = [(0, 0), (0, 1), (0, 2), (1, 4)]  # whose next position carries a vector
    torch.testing.assert_close(sums["image_length"], -sum(log_p[b, t, given.tokens[b, t + 1]] for b, t in places))
    loss = plain.combine(sums, counts).item()
    assert loss == pytest.approx(sum(sums.values()).item() / (6 + 4 + 4))
    with_z = objective(model, z_loss=0.5)
    assert with_z.counts(given)["z_loss"] == 6 + 4, "text, and whether an image goes on; not speech"


@pytest.mark.parametrize("rows", [("tttt",), ("tttt", "t|tt."), ("....",)])
@pytest.mark.parametrize("given", [True, False])
def test_every_parameter_runs_without_such_positions(rows, given):
    model, empty = build(), batch(*rows)
    content = empty.content if given else {}
    if not given:
        logits = model(empty.tokens, empty.context)
        assert torch.equal(logits, model(empty.tokens, empty.context, content=empty.content))
        return
    sums = objective()(model, Batch(empty.tokens, empty.context, content))
    named = {name: p for name, p in model.named_parameters() if "auxiliary" not in name}
    gradients = torch.autograd.grad(sum(sums.values()), list(named.values()))
    for name, gradient in zip(named, gradients, strict=True):
        assert bool(gradient.isfinite().all()), name
        assert not name.startswith(("stems", "heads")) or not gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision(dtype):
    model, given = build().to(dtype), batch()
    sums = objective()(model, given)
    assert all(total.dtype in (torch.float32, torch.float64) for total in sums.values())
    sum(sums.values()).backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if p.grad is not None)
    assert model.stems.image.weight.grad.any() and model.stems.speech.weight.grad.any()


def test_nothing_earlier_moves():
    model, given = build(layers=[{"mixer": ATTENTION, "feedforward": DENSE}]), batch()
    for name, position in (("image", (1, 4)), ("speech", (0, 6))):
        changed = dict(given.content)
        row = int((given.context.index(MODALITIES.index(name)) == position[0] * 8 + position[1]).nonzero())
        changed[name] = changed[name].clone()
        changed[name][row] = 4 - changed[name][row]
        moved = (
            (
                model(given.tokens, given.context, content=given.content)
                - model(given.tokens, given.context, content=changed)
            )
            .abs()
            .amax(-1)
        )
        places = moved.gt(1e-12).nonzero().tolist()
        assert list(position) in places
        document = given.context.document
        assert all(r == position[0] and c >= position[1] and document[r, c] == document[position] for r, c in places)


def test_decoded_step_by_step_it_is_the_full_forward():
    """With what each step's positions carry; heads are read where the step is."""
    model, given = build(layers=[{"mixer": ATTENTION, "feedforward": DENSE}] * 2), batch("tiiitss", "tssstii")
    context = given.context.replace(routing="causal")
    places = {name: context.index(m) for m, name in ((1, "image"), (2, "speech"))}
    full, heads = model(given.tokens, context, content=given.content, read=places)
    states = model.init_state(*context.shape)
    for t in range(context.shape[1]):
        step = columns(context, t, t + 1)
        rows = {name: (index % context.shape[1]) == t for name, index in places.items()}
        content = {name: given.content[name][rows[name]] for name in rows}
        read = {name: step.index(MODALITIES.index(name)) for name in rows}
        logits, predicted = model(given.tokens[:, t : t + 1], step, states, content, read=read)
        torch.testing.assert_close(logits[:, 0], full[:, t], rtol=0, atol=1e-10)
        for name in rows:
            torch.testing.assert_close(predicted[name], heads[name][rows[name]], rtol=0, atol=1e-10)


def test_cost():
    """Each modality its own ends, the vocabulary's head for all; weights of channels that a position meets."""
    model, plain = build(), build(stem={}, head={})
    more = [a - b for a, b in zip(model.cost(8).flops, plain.cost(8).flops, strict=True)]
    assert more == [0.0, 2.0 * (3 + 3) * D_MODEL, 2.0 * 4 * 5 * D_MODEL]
    more = [a - b for a, b in zip(model.cost(8).active, plain.cost(8).active, strict=True)]
    assert more == [0.0, (3 + 3) * D_MODEL, (4 + 4 * 5) * D_MODEL]
    total = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert total == (3 + 3 + 20 + 20) * D_MODEL


def test_content_must_fit():
    model, given = build(), batch()
    with pytest.raises(ValueError, match="content: 0 rows of image, but the context has 5 of its positions"):
        model(given.tokens, given.context)
    with pytest.raises(ValueError, match="content: 4 rows of speech"):
        model(given.tokens, given.context, content={**given.content, "speech": given.content["speech"][:4]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stem": {"image": VECTORS}, "head": {}},
            "model.head.image: predicts ids, but model.stem.image takes Vectors",
        ),
        (
            {"head": {"image": VECTORS | {"width": 4}, "speech": CHANNELS}},
            r"model.head.image: predicts Vectors\(width=4\), but model.stem.image takes Vectors\(width=3\)",
        ),
        ({"stem": {"imag": VECTORS}}, r"model.stem.imag: unknown modality; .*did you mean 'image'"),
        (
            {"stem": {"image": {"type": "vector"}}},
            r"model.stem.image.type: 'vector' is not known; known: ids, vectors, noisy_vectors, ch",
        ),
        ({"head": {"image": {"type": "vectors", "width": 0}}}, "model.head.image.width: 0: must be greater than 0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(**changes)


def test_uniform_channels_cost_log_size():
    """A head of channels that knows nothing."""
    head = zoo.ModelConfig.parse(config()).own_heads["speech"]
    losses = head.loss(torch.zeros(6, 4, 5), torch.randint(5, (6, 4)))
    torch.testing.assert_close(losses, torch.full((6,), math.log(5)))
