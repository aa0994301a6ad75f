"""MoMa: mixture of modality-aware experts, one group a modality (arXiv 2407.21770 §2.2).

Stage one is fixed: a token goes to the group of its modality. Stage two is learned: inside the group each expert takes
its top-k, or, with `router: {type: token_choice}`, each token. 1t1i, 4t4i, 7t1i are `experts: {text: 4, image: 4}` and
so on.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from zoo.config import ConfigError
from zoo.experts import ExpertConfig, RoutedExperts
from zoo.registry import Place, register


@register("feedforward", "moma")
class MoMa(RoutedExperts, counter_noise=True):
    class Config(ExpertConfig):
        experts: dict[str, int] = Field(min_length=1)
        """Experts of each modality."""

        @field_validator("experts")
        @classmethod
        def _positive(cls, experts: dict[str, int]) -> dict[str, int]:
            for modality, count in experts.items():
                if count < 1:
                    raise ValueError(f"{modality} has {count} experts; every modality needs at least 1")
            return experts

        def check(self, place: Place, path: str) -> None:
            for modality in self.experts:
                place.check_modality(modality, f"{path}.experts.{modality}")
            for modality in place.modalities:
                if modality not in self.experts:
                    raise ConfigError(
                        f"{path}.experts: no entry for {modality!r}; give every modality its number of experts"
                    )
            super().check(place, path)

        @property
        def shared_by_modality(self) -> bool:
            return True

        def group_sizes(self) -> dict[str, int]:
            return self.experts

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__({modality: index for index, modality in enumerate(place.modalities)}, config, place)
