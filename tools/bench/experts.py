"""Feed-forwards at equal FLOPs: MoMa, experts over all tokens, and untied ones against the dense network."""

from __future__ import annotations

from torch import Tensor, nn

from tools.bench import packages
from tools.bench.benchmark import HIGHER, Comparison, Goal, Group, Settings, benchmark, goals, leaf
from tools.bench.blocks import MODALITIES, alternating, build, variant, variants
from tools.bench.measure import Variant, both_modes
from zoo import TokenContext
from zoo.layers import RMSNorm
from zoo.model import initialise
from zoo.untied import TIED, Grouping

ROWS, LENGTH = 4, 1024


def moma(hidden: int, auxiliary: bool = False) -> dict:
    """MoMa 4t4i as in the paper: expert choice over the micro-batch, each expert a quarter of its modality."""
    return {"type": "moma", "experts": {"text": 4, "image": 4}, "d_ff": hidden, "auxiliary": auxiliary}


@benchmark("moma.512", width=512, hidden=1536, goal=Goal(1.10, 1.05))
@benchmark("moma.1024", width=1024, hidden=2816, goal=Goal(1.20, 1.05))
def moma_over_dense(settings: Settings, width: int, hidden: int, goal: Goal) -> Group:
    """Routed SwiGLU experts over the dense SwiGLU of equal FLOPs, 4,096 tokens; auxiliary routers in a row of their
    own."""
    width, hidden = settings.size(width), settings.size(hidden)
    configs = {
        "dense": {"type": "dense", "d_ff": hidden},
        "MoMa 4t4i": moma(hidden),
        "MoMa 4t4i with auxiliary routers": moma(hidden, auxiliary=True),
        "experts EC-8x": {"type": "experts", "experts": 8, "d_ff": hidden, "auxiliary": False},
    }
    pairs = [
        Comparison("MoMa 4t4i", "dense", goals=goals(both=goal)),
        Comparison("MoMa 4t4i with auxiliary routers", "dense", note="trains the routers of causal use besides"),
        Comparison("experts EC-8x", "dense"),
    ]
    return Group(both_modes(variants(configs, "feedforward", (ROWS, settings.size(LENGTH), width))), pairs)


@benchmark("moma.mixtral")
def moma_against_mixtral(settings: Settings) -> Group:
    """Transformers' Mixtral block, eager, 8 experts, top-1, against MoMa and against our experts under the same
    routing."""
    width, hidden, length = settings.size(512), settings.size(1536), settings.size(LENGTH)
    theirs = packages.mixtral_block(width, hidden, experts=8)
    x, context = leaf(ROWS, length, width), alternating(ROWS, length)
    token_choice = {
        "type": "experts",
        "experts": 8,
        "d_ff": hidden,
        "router": {"type": "token_choice", "top_k": 1, "balance": {"type": "none"}},
    }
    both = {
        "MoMa 4t4i": variant(build("feedforward", moma(hidden), width), x, context),
        "experts, token choice": variant(build("feedforward", token_choice, width), x, context),
        "Mixtral's block": Variant(lambda: theirs(x), [x, *theirs.parameters()]),
    }
    pairs = [Comparison(ours, "Mixtral's block", HIGHER) for ours in list(both)[:2]]
    return Group(both_modes(both), pairs)


class Normed(nn.Module):
    """A feed-forward and the norm of its result, as a Mixture-of-Transformers layer has them."""

    def __init__(self, feedforward: nn.Module, grouping: Grouping, width: int) -> None:
        super().__init__()
        self.feedforward, self.norm, self.grouping = feedforward, RMSNorm(width, grouping.count), grouping

    def forward(self, x: Tensor, context: TokenContext) -> Tensor:
        return self.norm(self.feedforward(x, context), self.grouping.group_of_token(context))


@benchmark("mot.512", width=512, hidden=1536)
@benchmark("mot.1024", width=1024, hidden=2816)
def untied_over_dense(settings: Settings, width: int, hidden: int) -> Group:
    """Mixture-of-Transformers' feed-forward, weights by modality, over the dense one of equal FLOPs, 4,096 tokens."""
    width, hidden, length = settings.size(width), settings.size(hidden), settings.size(LENGTH)
    x, context = leaf(ROWS, length, width), alternating(ROWS, length)
    dense, untied = ({"type": "dense", "d_ff": hidden, "untied": untied} for untied in (False, True))

    def normed(config: dict, grouping: Grouping) -> nn.Module:
        module = Normed(build("feedforward", config, width), grouping, width)
        initialise(module, 0)
        return module

    blocks = {
        "dense": build("feedforward", dense, width),
        "untied": build("feedforward", untied, width),
        "dense with norm": normed(dense, TIED),
        "untied with norm": normed(untied, Grouping.of(MODALITIES)),
    }
    pairs = [
        Comparison("untied", "dense", goals=goals(both=Goal(1.00))),
        Comparison("untied with norm", "dense", goals=goals(both=Goal(1.07)), note="the dense one has no norm"),
        Comparison("untied with norm", "dense with norm"),
    ]
    return Group(both_modes({name: variant(block, x, context) for name, block in blocks.items()}), pairs)
