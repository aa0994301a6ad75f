"""What a model trained on spoken digits can do: name held-out takes, and speak words that a classifier recognises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from tools.evaluate.judging import Sounds, sound_classifier
from tools.examples.make_spoken_digits import Take
from zoo.generate import Part
from zoo.modalities.speech import Spectrum
from zoo.run import Run

SAMPLES = 10
"""Takes of each word that the model speaks."""
TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A word that the model has spoken."""

    word: str
    modality: str
    sound: np.ndarray
    """(n,) float32, at the rate of its modality."""
    picture: np.ndarray
    """(mels, frames) uint8 spectrogram, low frequencies at the bottom."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was found."""

    summary: dict[str, Any]
    """Figures by name."""
    spoken: list[Spoken]
    """What the model spoke."""
    round_trip: dict[str, list[np.ndarray]]
    """Spectrograms of one held-out take of each word, as recorded and out of its positions."""


def evaluate(run: Run, takes: Sequence[Take], seed: int) -> Evaluation:
    """How well a model reads and speaks, and what positions tell of a sound."""
    name = next(name for name, modality in run.modalities.items() if modality.config.part == "audio")
    speech = run.modalities[name]
    words = sorted({take.word for take in takes})
    held_out = [take for take in takes if take.held_out]
    judge = Judge(speech.config, takes)
    right = read(run, name, held_out, words)
    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    recorded = [(take.word, speech.config.read(take.sound)) for take in held_out]
    again = [(word, speech.config.read(speech.write(speech.decode(speech.encode(sound))))) for word, sound in recorded]
    summary: dict[str, Any] = {
        "held_out_takes": len(right),
        "word_accuracy": float(np.mean(right)),
        "word_accuracy_interval": [interval.low, interval.high],
        "classifier_accuracy_on_held_out": judge.accuracy(recorded),
        "classifier_accuracy_on_held_out_as_positions": judge.accuracy(again),
        "positions_that_survive_a_round_trip": float(
            np.mean(
                [(speech.encode(a) == speech.encode(b)).mean() for (_, a), (_, b) in zip(recorded, again, strict=True)]
            )
        ),
    }
    spoken = speak(run, name, words, judge.spectrum, seed)
    summary["spoken_agreement"] = judge.accuracy([(each.word, each.sound) for each in spoken])
    first = [next(i for i, (word, _) in enumerate(recorded) if word == each) for each in words]
    rows = {
        label: [spectrogram(judge.spectrum, sounds[i][1]) for i in first]
        for label, sounds in (("recorded", recorded), ("positions", again))
    }
    return Evaluation(summary, spoken, rows)


def read(run: Run, name: str, takes: Sequence[Take], words: Sequence[str]) -> list[bool]:
    """Whether the likeliest of `words` after each take is its own."""
    heard = [[Part(name, run.modalities[name].config.read(take.sound))] for take in takes]
    said = run.log_likelihoods([(sound, word) for sound in heard for word in words]).reshape(len(takes), len(words))
    return [words[best] == take.word for best, take in zip(said.argmax(1), takes, strict=True)]


def speak(run: Run, name: str, words: Sequence[str], spectrum: Spectrum, seed: int) -> list[Spoken]:
    """`SAMPLES` sounds of each word."""
    asked = [word for word in words for _ in range(SAMPLES)]
    sounds = run.generate_all([[word] for word in asked], name, temperature=TEMPERATURE, seed=seed, progress=True)
    return [
        Spoken(word, name, sound.item, spectrogram(spectrum, sound.item))
        for word, (sound,) in zip(asked, sounds, strict=True)
    ]


def spectrogram(spectrum: Spectrum, sound: np.ndarray) -> np.ndarray:
    """(mels, frames) uint8, loud frequencies dark."""
    frames = spectrum.frames(sound)
    return np.clip((frames[:, ::-1].T + 3) * (255 / 4), 0, 255).astype(np.uint8)


class Judge:
    """Tells spoken words apart by a classifier fitted on the takes that are not held out."""

    def __init__(self, config: Any, takes: Sequence[Take]) -> None:
        self.sounds = Sounds(config.rate)
        known = [take for take in takes if not take.held_out]
        rows = self.sounds.rows([config.read(take.sound) for take in known])
        self.classify = sound_classifier(rows, [take.word for take in known])

    @property
    def spectrum(self) -> Spectrum:
        """What it sees sounds by."""
        return self.sounds.spectrum

    def accuracy(self, sounds: Sequence[tuple[str, np.ndarray]]) -> float:
        """Share of (word, sound) in which the sound is recognised as the word."""
        found = self.classify(self.sounds.rows([sound for _, sound in sounds]))
        return float(np.mean(found == np.array([word for word, _ in sounds])))
